"""What models, tokenizers and settings of others do to the language scripts. What is right is computed beside them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from conftest import import_scripts
from peft import IA3Config, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BitsAndBytesConfig,
    ElectraConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    Llama4TextConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
    SiglipVisionConfig,
)

IMDB, TLDR = (param.values[0] for param in import_scripts("sppo_rlhf_*.py"))
both = pytest.mark.parametrize("script", import_scripts("sppo_rlhf_*.py"))
# For what is the same text in both (test_siblings.py).
either = pytest.mark.parametrize("script", import_scripts("sppo_rlhf_*.py")[:1])


@pytest.fixture
def make_learner(assets):
    def make(script, **changes):
        args = script.Args(**tiny.flags(script.SCRIPT, assets) | {key: value for key, value in changes.items()})
        return script.Learner(args), args

    return make


def policy_of(learner):
    ac = learner.actor_critic
    return ac.switch_to("policy_adapter") if hasattr(ac, "switch_to") else ac.policy


# The end of a response


def generate_alone(model, prompt, ends, num_tokens):
    options = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": ends, "pad_token_id": 0}
    tokens = torch.tensor([prompt])
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()


@both
def test_every_end_token_that_a_model_lists_ends_a_response(script, assets, make_learner, tmp_path):
    """As in transformers' own generate(), one prompt at a time; "special" or not, an end is no part of the text."""
    name = Path(tiny.flags(script.SCRIPT, assets)["policy"]).name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(assets / name), AutoTokenizer.from_pretrained(assets / name)
    tiny.randomize(model.named_parameters(), 0.3)
    learner, args = make_learner(script)
    rows = learner.rows[:8]
    prompts = script.make_examples(tokenizer, rows, args).prompts
    free = [generate_alone(model, prompt, [0], 6) for prompt in prompts]
    ends = [0, free[0][0], free[1][2], 10**6]  # the second makes an empty response; the last is in no vocabulary
    expected = [generate_alone(model, prompt, ends[:3], 6) for prompt in prompts]
    assert {len(response) for response in expected} > {1}
    model.generation_config = GenerationConfig(eos_token_id=ends, temperature=0.7, do_sample=True, max_new_tokens=99)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    changes = {"top_k": 1, "rollout_batch_size": 8}  # in one batch, where the short ones are padded
    learner, args = make_learner(script, policy=str(tmp_path / "policy"), **changes)
    texts = []
    learner.reward = lambda prompts, responses, rows: texts.append(responses) or [0.0] * len(rows)
    rollout, metrics, _ = script.rollout(learner, rows, args)
    assert rollout.responses == expected
    ended = [response[-1] in ends for response in expected]
    assert metrics["val/eos_rate"] == sum(ended) / 8 > 0 and rollout.mask.sum(1).tolist() == [*map(len, expected)]
    shown = [r[:-1] if e else r for r, e in zip(expected, ended)]
    assert texts[0] == [tokenizer.decode(p + r)[len(tokenizer.decode(p)) :] for p, r in zip(prompts, shown)]
    assert "" in texts[0]
    script.Run(replace(args, run_dir=str(tmp_path / "run")), learner).save_policy()
    if script is IMDB:  # nothing of the run's settings, all of the model's own
        saved = GenerationConfig.from_pretrained(tmp_path / "run" / "policy")
        assert saved.to_dict() == model.generation_config.to_dict()


@either
def test_no_end_token_is_sampled_before_the_shortest_length(script, assets, make_learner, tmp_path):
    name = Path(tiny.flags(script.SCRIPT, assets)["policy"]).name
    model = AutoModelForCausalLM.from_pretrained(assets / name)
    model.generation_config.eos_token_id = [0, *range(1, 300)]
    model.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(assets / name).save_pretrained(tmp_path / "policy")
    learner, args = make_learner(script, policy=str(tmp_path / "policy"), min_response_length=3)
    responses = script.rollout(learner, learner.rows[:8], args)[0].responses
    assert all(token >= 300 for response in responses for token in response[:3])
    assert all(token >= 300 for response in responses for token in response[3:-1])


# What a reward model reads


def causal_classifier(folder, labels, **changes):
    """A GPT-2 that scores the last token of a text; its tokenizer has nothing but the end token to pad with."""
    torch.manual_seed(1)
    tokenizer = tiny.byte_level_tokenizer()
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    options = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, **options | names | changes)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return tokenizer


def logits_alone(folder, tokens):
    """Logits of texts, each alone and at its last token, by the head itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model.score(model.transformer(torch.tensor([t])).last_hidden_state[:, -1]) for t in tokens])


TEXTS = ["the movie was good", "so bad", "the cast was a pain to watch again again", "all fine", "x" * 300 + " plot"]


def add_end(tokenizer, begin=""):
    special = [(tiny.END, tokenizer.eos_token_id)]
    single = f"{begin} $A {tiny.END}".strip()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("padding", [None, tiny.END])
@pytest.mark.parametrize("adds_end", [False, True])
def test_reward_end_is_what_a_classifier_scores_whatever_pads(make_learner, tmp_path, padding, adds_end):
    tokenizer = causal_classifier(tmp_path, ["reward"])
    plain = [[*tokenizer(f"{text[0]} {text[1:]}").input_ids[-63:], 0] for text in TEXTS]
    tokenizer.pad_token = padding
    (add_end(tokenizer) if adds_end else tokenizer).save_pretrained(tmp_path)
    expected = logits_alone(tmp_path, plain).squeeze(-1).tolist()
    learner, _ = make_learner(TLDR, reward_model=str(tmp_path), reward_end=tiny.END)
    actual = learner.reward([text[0] for text in TEXTS], [text[1:] for text in TEXTS], [{}] * 5)
    assert actual == pytest.approx(expected, abs=1e-5)


def test_classifier_of_imdb_is_read_at_the_end_token_that_its_tokenizer_adds(make_learner, tmp_path):
    tokenizer = causal_classifier(tmp_path, ["POSITIVE", "NEGATIVE"])
    plain = [[*tokenizer(text).input_ids[-63:], 0] for text in TEXTS]
    tokenizer.pad_token = tiny.END
    add_end(tokenizer).save_pretrained(tmp_path)
    learner, _ = make_learner(IMDB, reward_model=str(tmp_path))
    expected = logits_alone(tmp_path, plain).softmax(-1)[:, 0].tolist()
    assert learner.reward(TEXTS, [""] * 5, [{}] * 5) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("labels", [["POSITIVE"], ["NEGATIVE", "POSITIVE", "MIXED"]])
def test_independent_outputs_of_a_classifier_are_sigmoids(make_learner, tmp_path, labels):
    tokenizer = causal_classifier(tmp_path, labels, problem_type="multi_label_classification")
    tokenizer.save_pretrained(tmp_path)
    learner, _ = make_learner(IMDB, reward_model=str(tmp_path))
    tokens = [tokenizer(text).input_ids[-64:] for text in TEXTS]
    expected = logits_alone(tmp_path, tokens).sigmoid()[:, labels.index("POSITIVE")].tolist()
    assert learner.reward(TEXTS, [""] * 5, [{}] * 5) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "labels, problem_type",
    [(["POSITIVE"], None), (["POSITIVE"], "regression"), (["POSITIVE", "NEGATIVE"], "regression")],
)
def test_classifier_whose_outputs_are_no_probabilities_is_refused(
    make_learner, tmp_path, ends_with, labels, problem_type
):
    causal_classifier(tmp_path, labels, problem_type=problem_type).save_pretrained(tmp_path)
    with ends_with(rf"--reward-model .*problem_type {problem_type}"):
        make_learner(IMDB, reward_model=str(tmp_path))


@either
def test_reward_model_that_gives_nan_is_named(script, make_learner, ends_with):
    learner, args = make_learner(script)
    learner.reward = lambda prompts, responses, rows: [0.5] * 7 + [float("nan")]
    for function in (lambda: script.rollout(learner, learner.rows[:8], args), lambda: script.evaluate(learner, args)):
        with ends_with("the reward .* returned nan for '", code=1):
            function()


@either
def test_classifier_with_fewer_tokens_than_positions_reads_the_end_of_a_long_text(script, make_learner, tmp_path):
    """RoBERTa counts positions from 2 on; its tokenizer may know of no limit."""
    torch.manual_seed(1)
    tokenizer = tiny.byte_level_tokenizer()
    labels = ["POSITIVE", "NEGATIVE"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **options | names)
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    learner, _ = make_learner(script, reward_model=str(tmp_path))
    texts = ["the movie was good", "x" * 300 + " the plot"]
    tokens = [tokenizer(text + "fine").input_ids[-64:] for text in texts]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([t])).logits for t in tokens]).softmax(-1)[:, 0]
    assert learner.reward(texts, ["fine"] * 2, [{}] * 2) == pytest.approx(expected.tolist(), abs=1e-5)


# Tokenizers


def sentencepiece_like(prepend: str) -> PreTrainedTokenizerFast:
    """As Llama's: words begin with a mark, which is also put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend, split=True)
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"{text}\nTL;DR: [INST] [/INST] In short\n\n" for text in tiny.POSTS], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prepend", ["always", "first"])
def test_prompts_begin_with_what_begins_a_text_and_have_no_end_in_them_and_no_stray_space(prepend):
    tokenizer = sentencepiece_like(prepend)
    tokens = tokenizer.convert_ids_to_tokens
    post = "the movie was good"
    (prompt,) = TLDR.encode_prompts(tokenizer, [{"prompt": f"{post}\nTL;DR:"}], 50)
    assert prompt == [0, *tokenizer(f"{post}\nTL;DR:", add_special_tokens=False).input_ids]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == f"{post}\nTL;DR:"
    row = {"prompt": "", "label": " the plot"}
    (label,) = TLDR.make_examples(tokenizer, [row], TLDR.Args(target_coef=0.1)).targets
    assert prompt + label == [0, *tokenizer(f"{post}\nTL;DR: the plot", add_special_tokens=False).input_ids, 1]
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    (prompt,) = TLDR.encode_prompts(tokenizer, [{"prompt": f"{post}\nTL;DR:"}], 50, "In short")
    assert "".join(tokens(prompt)).replace("▁", " ").replace("<s> ", "<s>") == f"<s>[INST] In short\n\n{post} [/INST]"
    rows = [{"text": f"{post} and the other half"}]
    whole = tokenizer(post, add_special_tokens=False).input_ids
    for length, expected in ((50, [0, *whole]), (3, [0, *whole[-2:]]), (1, [0])):
        assert IMDB.make_examples(tokenizer, rows, IMDB.Args(prompt_length=length)).prompts == [expected]


@both
def test_a_tokenizer_that_adds_an_end_changes_nothing(script, assets, make_learner, tmp_path):
    """Prompts, rewards and perplexity are those of the tokenizer without it."""
    name = Path(tiny.flags(script.SCRIPT, assets)["policy"]).name
    AutoModelForCausalLM.from_pretrained(assets / name).save_pretrained(tmp_path)
    add_end(AutoTokenizer.from_pretrained(assets / name)).save_pretrained(tmp_path)
    metrics = []
    for folder in (assets / name, tmp_path):
        learner, args = make_learner(script, policy=str(folder), target_coef=0.1)
        torch.manual_seed(0)
        rollout, means, _ = script.rollout(learner, learner.rows[:8], args)
        del means["perf/generation_seconds"]
        metrics.append((rollout.prompts, rollout.targets, means, script.evaluate(learner, args)))
    assert metrics[0] == metrics[1]


# Models


@both
def test_widths_and_positions_are_those_of_the_loaded_model(script, assets, make_learner, tmp_path, ends_with):
    """A multimodal model keeps them in text_config; OPT-350m's last hidden states are narrower than the others."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 1, "max_position_embeddings": 96, "vocab_size": 320, "eos_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **vision)
    gemma = Gemma3Config(text_config=Gemma3TextConfig(**text), vision_config=vision, mm_tokens_per_image=4)
    gemma.boi_token_index, gemma.eoi_token_index, gemma.image_token_index = 317, 318, 319
    opt = OPTConfig(
        vocab_size=320,
        hidden_size=24,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        do_layer_norm_before=False,
        pad_token_id=1,
        eos_token_id=0,
    )
    for i, config in enumerate((gemma, opt)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(assets / "gpt2").save_pretrained(folder)
        changes = {"policy": str(folder)} | ({"reward_model": str(assets / "scalar")} if script is TLDR else {})
        learner, args = make_learner(script, **changes)
        rollout, metrics, _ = script.rollout(learner, learner.rows[:8], args)
        assert abs(metrics["objective/kl"]) < 1e-4
        for prompt, response, logprob in zip(rollout.prompts, rollout.responses, rollout.logprob):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(logprob[: len(response)], expected, rtol=1e-4, atol=1e-4)
        losses = script.backward(learner, rollout, list(range(8)), args)
        assert losses["val/ratio"] == pytest.approx(1, abs=1e-4)
        with ends_with("the policy has 96 positions"):
            make_learner(script, prompt_length=95, **changes)


PADDING_MATTERS = {
    "recurrent state": RwkvConfig(
        vocab_size=320, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=96, eos_token_id=0
    ),
    "recurrent blocks": RecurrentGemmaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=16,
        attention_window_size=32,
        eos_token_id=0,
        pad_token_id=0,
    ),
    "decoder of an encoder-decoder": BartConfig(
        vocab_size=320,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=96,
        init_std=0.3,
        eos_token_id=0,
        pad_token_id=1,
        is_decoder=True,
    ),
}


@either
@pytest.mark.parametrize("kind", PADDING_MATTERS)
def test_policy_whose_numbers_padding_changes_is_refused_by_name(
    script, assets, make_learner, tmp_path, ends_with, kind
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PADDING_MATTERS[kind])
    tiny.randomize(model.named_parameters(), 0.2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(assets / "gpt2").save_pretrained(tmp_path)
    change = "(padding or a longer text beside it|what comes after a token)"
    with ends_with(rf"--policy {tmp_path}: {change} changes its numbers by \d"):
        make_learner(script, policy=str(tmp_path))


SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0}
SMALL |= {"pad_token_id": 0, "num_key_value_heads": 4}
SEE_WHAT_COMES = {
    "a BERT without is_decoder": BertConfig(**SMALL),
    "an ELECTRA without is_decoder": ElectraConfig(**SMALL, embedding_size=32),
    "a Llama that is not causal": LlamaConfig(**SMALL, is_causal=False),
    "a Gemma with bidirectional attention": Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True),
}


def save_policy(config, assets, folder, tokenizer="gpt2"):
    """A model with random weights, and a tokenizer; its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tiny.randomize(model.named_parameters(), 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets / tokenizer).save_pretrained(folder)
    return folder


@either
@pytest.mark.parametrize("kind", SEE_WHAT_COMES)
def test_policy_that_sees_later_tokens_is_refused_by_name(script, assets, make_learner, tmp_path, ends_with, kind):
    policy = save_policy(SEE_WHAT_COMES[kind], assets, tmp_path)
    with ends_with(rf"--policy {tmp_path}: what comes after a token changes its numbers by \d"):
        make_learner(script, policy=str(policy))


def long_rope(tokens=32, **changes):
    """Rotary positions that are others as soon as any text of a batch is longer than so many tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "factor": 8.0}
    rope |= {"long_factor": [4.0, 8.0, 16.0, 32.0], "original_max_position_embeddings": tokens}
    return Phi3Config(**SMALL, original_max_position_embeddings=tokens, rope_parameters=rope, **changes)


@both
def test_policy_whose_numbers_depend_on_the_length_of_neighbours_is_refused_at_such_lengths(
    script, assets, make_learner, tmp_path, ends_with
):
    save_policy(long_rope(), assets, tmp_path)
    changes = {"policy": str(tmp_path)}
    if script is TLDR:
        changes |= {"reward_model": str(assets / "scalar"), "lora_targets": ("qkv_proj",)}
    learner, args = make_learner(script, **changes)
    assert abs(script.rollout(learner, learner.rows[:8], args)[1]["objective/kl"]) < 1e-4
    with ends_with(rf"--policy {tmp_path}: padding or a longer text beside it changes its numbers by \d"):
        make_learner(script, **changes, prompt_length=60)


@both
def test_classifier_whose_numbers_depend_on_the_length_of_neighbours_is_refused_at_such_lengths(
    script, assets, make_learner, tmp_path, ends_with
):
    torch.manual_seed(0)
    labels = {0: "POSITIVE", 1: "NEGATIVE"} if script is IMDB else {0: "reward"}
    names = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    model = AutoModelForSequenceClassification.from_config(long_rope(**names))
    tiny.randomize(model.named_parameters(), 0.2)
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(assets / "gpt2").save_pretrained(tmp_path / "classifier")
    row, changes = (
        {"text": "so bad", "prompt": "so bad", "label": "bad"},
        {"reward_model": str(tmp_path / "classifier")},
    )
    short = tiny.write_jsonl(tmp_path / "short.jsonl", [row] * 10)
    long = tiny.write_jsonl(tmp_path / "long.jsonl", [row] * 10 + [{x: "very bad " * 20 for x in row}])
    make_learner(script, dataset=str(short), **changes)
    with ends_with(r"--reward-model .*classifier: padding or a longer text beside it changes its numbers by \d"):
        make_learner(script, dataset=str(long), **changes)


def test_reward_adapter_whose_numbers_depend_on_the_length_of_neighbours_is_refused_at_such_lengths(
    assets, make_learner, tmp_path, ends_with
):
    save_policy(long_rope(40), assets, tmp_path / "policy", "llama")
    tiny.reward_adapter(long_rope(40), tmp_path / "adapter", target_modules=["qkv_proj"])
    changes = {"policy": str(tmp_path / "policy"), "reward_model": str(tmp_path / "adapter")}
    changes |= {"lora_targets": ("qkv_proj",), "prompt_length": 5}
    rows = [{"prompt": "so bad", "label": "bad"}] * 10
    make_learner(TLDR, dataset=str(tiny.write_jsonl(tmp_path / "a.jsonl", rows)), **changes)
    rows += [{"prompt": "so bad", "label": "very bad " * 20}]
    with ends_with(r"--reward-model .*adapter: padding or a longer text beside it changes its numbers by \d"):
        make_learner(TLDR, dataset=str(tiny.write_jsonl(tmp_path / "b.jsonl", rows)), **changes)


@pytest.mark.parametrize("kind", ["embeddings", "norms", "biases", "PiSSA", "more layers", "IA3"])
def test_reward_adapter_that_would_change_the_policy_is_refused(assets, make_learner, tmp_path, ends_with, kind):
    """Compared with a run without it: were it accepted, the reference would have other numbers."""
    config = AutoModelForCausalLM.from_pretrained(assets / "llama").config
    changes = {
        "embeddings": {"modules_to_save": ["score", "embed_tokens"]},
        "norms": {"modules_to_save": ["score", "norm"]},
        "biases": {"bias": "all"},
        "PiSSA": {"init_lora_weights": "pissa"},
        "more layers": {"layer_replication": [[0, 2], [1, 2]]},
        "IA3": {},
    }[kind]
    if kind == "biases":
        config.attention_bias = True
        save_policy(config, assets, tmp_path / "policy", "llama")
    tiny.reward_adapter(config, tmp_path / "adapter", **changes)
    if kind == "IA3":
        model = AutoModelForSequenceClassification.from_pretrained(assets / "llama", num_labels=1)
        ia3 = IA3Config(task_type="SEQ_CLS", target_modules=["k_proj"], feedforward_modules=[])
        get_peft_model(model, ia3).save_pretrained(tmp_path / "adapter")
    policy = {"policy": str(tmp_path / "policy")} if kind == "biases" else {}
    with ends_with(r"--reward-model .*(would change|changes) the policy"):
        make_learner(TLDR, reward_model=str(tmp_path / "adapter"), **policy)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "4bit"])
def test_base_that_is_quantized_in_another_way_than_told_is_refused(
    make_learner, assets, tmp_path, ends_with, precision
):
    pytest.importorskip("bitsandbytes")
    kind = {"load_in_8bit": True} if precision == "4bit" else {"load_in_4bit": True}
    config = BitsAndBytesConfig(**kind)
    model = AutoModelForCausalLM.from_pretrained(assets / "llama", quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    AutoTokenizer.from_pretrained(assets / "llama").save_pretrained(tmp_path / "quantized")
    with ends_with(r"--policy .*quantized is quantized in another way than --base-precision says"):
        make_learner(TLDR, policy=str(tmp_path / "quantized"), base_precision=precision)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


class NotATensor:
    pass


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": NotATensor()}, folder / "pytorch_model.bin")


def quantized(method):
    return lambda folder: edit_config(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 8})


UNLOADABLE = {
    "configuration and weights disagree": (
        lambda folder: edit_config(folder, vocab_size=321),
        "has no weights, of the configuration's shape, for .*weight of",
    ),
    "gptq": (quantized("gptq"), "cannot be loaded .*(optimum|gptq)"),
    "awq": (quantized("awq"), "cannot be loaded .*(?i:awq|package|device)"),
    "compressed-tensors": (quantized("compressed-tensors"), "cannot be loaded .*compressed.tensors"),
    "a pickle": (pickled, "cannot be loaded .*[Ww]eights"),
}


@either
@pytest.mark.parametrize("kind", UNLOADABLE)
def test_model_that_cannot_be_loaded_is_refused_in_a_line_that_says_why(
    script, assets, make_learner, tmp_path, ends_with, kind
):
    damage, words = UNLOADABLE[kind]
    folder = Path(shutil.copytree(tiny.flags(script.SCRIPT, assets)["policy"], tmp_path / "policy"))
    damage(folder)
    with ends_with(rf"--policy {folder} {words}"):
        make_learner(script, policy=str(folder))


@either
def test_tokenizer_with_an_id_beyond_the_embeddings_is_refused(script, assets, make_learner, tmp_path, ends_with):
    """However few tokens it has."""
    ids = {tiny.END: 0, "<unk>": 1, "the": 2, "movie": 399}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tiny.END, unk_token="<unk>").save_pretrained(folder)
    with ends_with(r"--tokenizer .*: tokens up to 399, \d+ embeddings: different models"):
        make_learner(script, tokenizer=str(folder))


@either
def test_positions_of_mpt_are_counted(script, assets, make_learner, tmp_path, ends_with):
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=20, vocab_size=320, expansion_ratio=2)
    save_policy(config, assets, tmp_path)
    make_learner(script, policy=str(tmp_path), prompt_length=14)
    with ends_with("are 21 tokens; the policy has 20 positions"):
        make_learner(script, policy=str(tmp_path), prompt_length=15)


@either
def test_policy_whose_body_transformers_does_not_give_is_refused(script, assets, make_learner, tmp_path, ends_with):
    config = Llama4TextConfig(**SMALL, intermediate_size_mlp=32, head_dim=8, num_local_experts=2)
    save_policy(config, assets, tmp_path)
    with ends_with("--policy .*transformers has no Llama4ForCausalLM without its head"):
        make_learner(script, policy=str(tmp_path))


def test_lora_on_embeddings_learns(assets, make_learner):
    learner, args = make_learner(TLDR, lora_targets=("embed_tokens", "q_proj"))
    rollout, metrics, _ = TLDR.rollout(learner, learner.rows[:8], args)
    losses = TLDR.backward(learner, rollout, list(range(8)), args)
    assert metrics["objective/kl"] == 0 and losses["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert any("embed_tokens" in name and p.grad.any() for name, p in learner.trained.items() if p.grad is not None)


def test_a_chat_template_counts_among_the_positions(assets, make_learner, tmp_path, ends_with):
    AutoModelForCausalLM.from_pretrained(assets / "llama").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(assets / "llama")
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u>"
    tokenizer.save_pretrained(tmp_path)
    instruction = "Summarize this in one line"
    around = len(tokenizer(f"<u>{instruction}\n\n").input_ids) + len(tokenizer("</u>").input_ids)
    fits = {"policy": str(tmp_path), "instruction": instruction, "prompt_length": 96 - 6 - around}
    learner, args = make_learner(TLDR, **fits)
    rows = [{"prompt": "good " * 200, "label": " fine"}] * 8
    assert len(TLDR.rollout(learner, rows, args)[0].prompts[0]) == 90
    with ends_with("are 97 tokens; the policy has 96"):
        make_learner(TLDR, **fits | {"prompt_length": fits["prompt_length"] + 1})


# Settings from outside


@both
def test_settings_of_accelerate_launch_change_nothing(script, assets, monkeypatch):
    args, results = script.Args(**tiny.flags(script.SCRIPT, assets)), []
    for outside in ({}, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}):
        AcceleratorState._reset_state(True)
        for name, value in outside.items():
            monkeypatch.setenv(name, value)
        learner = script.Learner(args)
        torch.manual_seed(0)
        rollout, metrics, _ = script.rollout(learner, learner.rows[:8], args)
        script.backward(learner, rollout, list(range(8)), args)
        grads = [p.grad.clone() for p in learner.trained.values() if p.grad is not None]
        results.append((rollout.logprob, metrics["objective/kl"], grads))
    AcceleratorState._reset_state(True)
    (logprob, kl, grads), (other_logprob, other_kl, other_grads) = results
    assert torch.equal(logprob, other_logprob) and kl == other_kl == 0
    assert len(grads) > 2 and all(map(torch.equal, grads, other_grads))
    assert not any(name.startswith("ACCELERATE_") for name in os.environ)


# Data


ROWS = [{"text": f"review {i} of a café", "label": str(i)} for i in range(10)]
FILES = {
    "a.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path),
    "a.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: tiny.write_jsonl(path, ROWS),
    "a.CSV": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path),
}


@either
@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_file_are_read_whatever_its_format(script, tmp_path, name):
    FILES[name](tmp_path / name)
    train, validation, _ = script.load_rows(script.Args(dataset=str(tmp_path / name)), ["text"])
    assert len(train) == 8 and sorted(row["text"] for row in train + validation) == [row["text"] for row in ROWS]


@either
def test_a_file_whose_name_looks_like_a_pattern_is_the_one_that_is_read(script, tmp_path):
    for name in ("a1.jsonl", "a[1].jsonl"):
        tiny.write_jsonl(tmp_path / name, [{"text": name}] * 5)
    train, _, _ = script.load_rows(script.Args(dataset=str(tmp_path / "a[1].jsonl")), ["text"])
    assert train == [{"text": "a[1].jsonl"}] * 4


@either
@pytest.mark.parametrize("name", ["a.tsv", "a.csv.gz", "a.arrow", "a.txt", "a"])
def test_files_of_other_kinds_are_refused_in_a_line_that_names_those_that_are_read(script, tmp_path, ends_with, name):
    (tmp_path / name).write_text("text\na review\n" * 9)
    with ends_with(rf"--dataset {tmp_path / name} .*: \.csv, \.parquet, \.json, \.jsonl$"):
        script.load_rows(script.Args(dataset=str(tmp_path / name)), ["text"])


@either
@pytest.mark.parametrize("cell", ["None", "null", "N/A", ""])
def test_csv_cells_that_pandas_takes_for_missing_are_named(script, tmp_path, ends_with, cell):
    (tmp_path / "a.csv").write_text("text,label\na review,1\nanother,0\n" + f"{cell},1\n" + "the last,0\n")
    with ends_with(r"row \(number 3\) whose text is no text; its columns are text, label; pandas takes CSV cells"):
        script.load_rows(script.Args(dataset=str(tmp_path / "a.csv")), ["text"])


@either
def test_folder_with_a_loading_script_is_refused_in_a_line_that_says_why(script, tmp_path, ends_with):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text("import datasets\n")
    with ends_with(r"--dataset .*cannot be loaded \(Dataset scripts are no longer supported"):
        script.load_rows(script.Args(dataset=str(folder)), ["text"])


@either
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "folder/train.jsonl"])
def test_text_that_is_not_utf_8_is_refused_by_that_name(script, tmp_path, ends_with, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    lines = [
        f"{row['text']},{row['label']}" if name == "a.csv" else json.dumps(row, ensure_ascii=False) for row in ROWS
    ]
    path.write_bytes("\n".join(["text,label"] * (name == "a.csv") + lines).encode("latin-1"))
    dataset = path.parent if "/" in name else path
    with ends_with(rf"--dataset {dataset}.*'utf-8' codec can't decode"):
        script.load_rows(script.Args(dataset=str(dataset)), ["text"])


@either
def test_a_split_that_is_not_used_is_named(script, tmp_path, capsys):
    for split in ("train", "test", "unsupervised"):
        tiny.write_jsonl(tmp_path / f"{split}.jsonl", ROWS)
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list(ROWS) for split in ("train", "test", "unsupervised")}
    ).save_to_disk(tmp_path / "disk")
    train, validation, _ = script.load_rows(script.Args(dataset=str(tmp_path / "disk")), ["text"])
    assert (len(train), len(validation)) == (8, 2)
    assert "no split validation: a fifth of train is; test, unsupervised is not used" in capsys.readouterr().out
