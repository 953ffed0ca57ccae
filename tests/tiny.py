"""Tiny models and data sets for the tests of the language scripts, built in a second and without a network."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
REVIEWS = [
    f"the movie was {a} and the {b} was {c} to watch" + " again" * (i % 5)
    for i, a in enumerate(("good", "bad", "fine", "awful"))
    for b in ("plot", "cast", "music")
    for c in ("nice", "dull", "great", "a pain")
]
POSTS = [f"{review}. I went to see it." for review in REVIEWS]
SUMMARIES = [" ".join(review.split()[3 : 6 + i % 4]) for i, review in enumerate(REVIEWS)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(REVIEWS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=1024)


def gpt2(vocabulary: int, **changes) -> GPT2LMHeadModel:
    """Dropout is on in the configuration: it must never be active."""
    options = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    options |= {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **options | changes))


def llama_config(vocabulary: int, **changes) -> LlamaConfig:
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"num_key_value_heads": 1, "max_position_embeddings": 96, "initializer_range": 0.3}
    options |= {"attention_dropout": 0.5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaConfig(vocab_size=vocabulary, **options | changes)


def gptj_config(vocabulary: int) -> GPTJConfig:
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 96, "initializer_range": 0.3}
    options |= {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    return GPTJConfig(vocab_size=vocabulary, pad_token_id=0, **options)


def neox_config(vocabulary: int) -> GPTNeoXConfig:
    """Pythia's class."""
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"max_position_embeddings": 96, "initializer_range": 0.3, "attention_dropout": 0.5}
    options |= {"hidden_dropout": 0.5, "classifier_dropout": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    return GPTNeoXConfig(vocab_size=vocabulary, pad_token_id=0, **options)


def pythia_reward(vocabulary: int) -> GPTNeoXForSequenceClassification:
    """As the public reward model: one label, a token of its own to pad with, more embeddings than tokens."""
    config = neox_config(vocabulary + 8)
    config.pad_token_id, config.num_labels = vocabulary, 1
    return GPTNeoXForSequenceClassification(config)


def classifier(vocabulary: int, labels: list[str], **changes) -> DistilBertForSequenceClassification:
    options = {"max_position_embeddings": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    options |= {"initializer_range": 0.5, "pad_token_id": 0, "dropout": 0.5, "seq_classif_dropout": 0.5}
    options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=vocabulary, **options | changes))


def randomize(parameters, std: float, seed: int = 0) -> None:
    """Add noise to (name, parameter) pairs, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in parameters:
            p += std * torch.randn(p.shape, generator=generator)


def reward_adapter(config: PreTrainedConfig, folder: Path, **changes) -> None:
    """A LoRA adapter with a scalar head for a model, as peft saves one that was trained as a sequence classifier."""
    changes = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"} | changes
    model = AutoModelForSequenceClassification.from_config(
        type(config)(**config.to_dict() | {"id2label": {0: "reward"}})
    )
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, **changes))
    randomize([(name, p) for name, p in model.named_parameters() if p.requires_grad], 0.3, seed=1)
    model.save_pretrained(folder)


def build(folder: Path) -> Path:
    """gpt2 and FAMILIES, sentiment and scalar (classifiers), adapters; reviews and posts, data sets."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    llama = LlamaForCausalLM(llama_config(len(tokenizer)))
    for name, model in {"gpt2": gpt2(len(tokenizer)), "llama": llama}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reward_adapter(llama.config, folder / "adapter")
    for name, config in {"gptj": gptj_config(len(tokenizer)), "neox": neox_config(len(tokenizer))}.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        reward_adapter(config, folder / f"{name}-adapter", target_modules=list(FAMILIES[name]["lora_targets"]))
    reward = pythia_reward(len(tokenizer)).bfloat16()
    reward.save_pretrained(folder / "neox-reward")
    (folder / "neox-reward" / "model.safetensors").unlink()  # the public one has a pickle
    torch.save(reward.state_dict(), folder / "neox-reward" / "pytorch_model.bin")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder / "neox-reward")
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = END, 64
    for name, labels in {"sentiment": ["POSITIVE", "NEGATIVE"], "scalar": ["reward"]}.items():
        classifier(len(tokenizer), labels).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for split, part in {"train": slice(0, 40), "validation": slice(40, 48)}.items():
        write_jsonl(folder / "reviews" / f"{split}.jsonl", [{"text": text, "label": 1} for text in REVIEWS[part]])
        posts = [{"prompt": p + "\nTL;DR:", "label": " " + s} for p, s in zip(POSTS[part], SUMMARIES[part])]
        write_jsonl(folder / "posts" / f"{split}.jsonl", posts)
    return folder


# Policies of the TL;DR script, each with what else it needs.
FAMILIES = {
    "llama": {"reward_model": "adapter", "lora_targets": ("q_proj", "v_proj")},
    "gptj": {"reward_model": "gptj-adapter", "lora_targets": ("q_proj", "v_proj")},
    "neox": {"reward_model": "neox-adapter", "lora_targets": ("query_key_value",)},
}


def family(name: str, folder: Path) -> dict:
    """Arguments of the TL;DR script for a family of models."""
    return FAMILIES[name] | {"policy": str(folder / name), "reward_model": str(folder / FAMILIES[name]["reward_model"])}


def flags(script: str, folder: Path) -> dict:
    """Arguments of a small run of a script on the tiny models."""
    small = {"num_trajectories": 8, "minibatch_size": 4, "micro_batch_size": 3, "rollout_batch_size": 3, "cpu": True}
    small |= {"prompt_length": 12, "response_length": 6, "update_epochs": 2, "num_updates": 3, "num_threads": 1}
    if script == "sppo_rlhf_imdb":
        names = {"policy": "gpt2", "reward_model": "sentiment", "dataset": "reviews"}
        small |= {"min_response_length": 0, "learning_rate": 1e-3}
    else:
        names = {"policy": "llama", "reward_model": "adapter", "dataset": "posts"}
        small |= {"base_precision": "float32", "learning_rate": 2e-3, "eval_samples": 0}
    return small | {flag: str(folder / name) for flag, name in names.items()}


def command_line(flags: dict) -> list[str]:
    result = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        values = value if isinstance(value, tuple) else (value,)
        no = "no-" if value is False else ""
        result += [f"--{no}{flag}", *(str(x) for x in values if not isinstance(x, bool))]
    return result


def responses(num: int, length: int, vocabulary: int, end: int = 0) -> list[list[int]]:
    """Responses of unequal lengths: at once the end token, cut off without one, and in between."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for i in range(num):
        tokens = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        result.append(tokens if i % 3 == 2 else tokens[: i % length] + [end])
    return result


def fixed_rollout(script, learner, args):
    """A rollout of 8 trajectories whose policy and values are not quite the learner's, so that some tokens clip."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = learner.tokenizer.vocab_size
    prompts = [torch.randint(1, vocabulary, (2 + 3 * i % 11,), generator=generator).tolist() for i in range(8)]
    answers = responses(8, args.response_length, vocabulary)
    targets = [torch.randint(1, vocabulary, (1 + 2 * i % 5,), generator=generator).tolist() for i in range(8)]
    mask = torch.tensor([[t < len(answer) for t in range(args.response_length)] for answer in answers])
    with torch.no_grad():
        tokens, attention, _ = script.pad(prompts, answers, learner.device)
        logprob, values = learner.actor_critic(tokens, attention, args.response_length)
    noise = torch.randn(4, *mask.shape, generator=generator) * mask
    logprob, values = (logprob + 0.2 * noise[0]) * mask, (values + 0.3 * noise[1]) * mask
    return script.Rollout(prompts, answers, targets, mask, logprob, values, noise[2] + 0.7 * mask, noise[3])


def bandit(folder: Path) -> Path:
    """A world of twelve words in which a text is worth more the more often it says "good"; models as in build()."""
    torch.manual_seed(0)
    words = [END, "good", "TL;DR:", *"red green blue cyan pink grey gold lime teal".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="red"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=64)
    small = {"n_layer": 1, "n_embd": 32, "initializer_range": 0.1}
    policies = {
        "gpt2": gpt2(len(words), **small),
        "llama": LlamaForCausalLM(llama_config(len(words), num_hidden_layers=1, hidden_size=32)),
    }
    rewards = {
        "sentiment": classifier(len(words), ["NEGATIVE", "POSITIVE"], n_heads=1),
        "scalar": classifier(len(words), ["reward"], n_heads=1),
    }
    for model in rewards.values():
        count_words(model, words.index("good"))
    for name, model in (policies | rewards).items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for split, num in {"train": 64, "validation": 16}.items():
        lengths = torch.randint(4, 9, (num,), generator=generator).tolist()
        texts = [[words[i] for i in torch.randint(3, len(words), (n,), generator=generator)] for n in lengths]
        write_jsonl(folder / "reviews" / f"{split}.jsonl", [{"text": " ".join(text)} for text in texts])
        posts = [{"prompt": " ".join(text[:4]) + "\nTL;DR:", "label": " good"} for text in texts]
        write_jsonl(folder / "posts" / f"{split}.jsonl", posts)
    return folder


@torch.no_grad()
def count_words(model: DistilBertForSequenceClassification, word: int) -> None:
    """Set the weights by hand: the last logit grows with the share of the word among a text's tokens."""
    for name, p in model.named_parameters():
        p.fill_(1.0 if "LayerNorm.weight" in name or "layer_norm.weight" in name else 0.0)
    embedding = model.distilbert.embeddings.word_embeddings.weight
    embedding[:, :4] = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    embedding[word, :2] = torch.tensor([1.0, -1.0])
    attention = model.distilbert.transformer.layer[0].attention  # queries and keys are 0: the mean over all tokens
    attention.v_lin.weight[:2, :2] = torch.eye(2)
    for linear in (attention.out_lin, model.pre_classifier):
        linear.weight.copy_(torch.eye(len(linear.weight)))
    model.pre_classifier.bias[:2] = 4.0  # keeps both entries above 0, where relu changes nothing
    model.classifier.weight[-1, :2] = torch.tensor([4.0, -4.0])
    model.classifier.bias[-1] = 17.0  # 0 is about half a response
