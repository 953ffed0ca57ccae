"""Which families of language models give a response in a padded batch the log-probabilities that it has alone?

    python tests/model_families.py              # all of them: a Markdown table (docs/language-models.md)
    python tests/model_families.py gpt2 rwkv    # these

A tiny model with random weights is made from the configuration of each family alone: nothing is downloaded, nothing
written. Policy and value model of sppo_rlhf_imdb.py read a batch that is padded as in training, once of short texts
and once of long ones. Compared are its log-probabilities and values with those that the bare model gives for one text
at a time, each token from a text that ends before it: so padding, positions, neighbours and later tokens must not
matter. The script's own check, check_policy, has to say the same. Exit code 1 if a family that is listed as running
differs, one that is listed as refused does not, or the check says something else than the comparison.
"""

import contextlib
import io
import math
import sys
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
import tyro
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sppo_rlhf_imdb import ActorCritic, check_policy, pad
from sppo_rlhf_imdb import Args as ScriptArgs

TOLERANCE = 1e-5  # of log-probabilities and values in float32, that of rounding: differences of families seen are 1e-6
SMALL = {  # under the names that families have for them; windows are shorter than the texts
    "vocab_size": 96,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "attention_hidden_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 8),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "state_size": 8, "num_experts_per_tok": 2},
    **{"use_sliding_window": True, "max_window_layers": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
STATES = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"head_dim": 4, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LONG_ROPE = {"original_max_position_embeddings": 32, "num_key_value_heads": 4}
LONG_ROPE["rope_parameters"] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
CHANGES = {  # what a configuration has besides SMALL
    **dict.fromkeys(("gemma2", "gemma3_text", "cohere2", "gpt_oss", "olmo3"), WINDOWS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), STATES),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon with ALiBi": {"alibi": True},
    "opt with projections": {"word_embed_proj_dim": 16},
    "deepseek_v3": LATENT,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "phi3 with LongRoPE": LONG_ROPE,
    "llama that is not causal": {"is_causal": False},
    "gemma3_text with bidirectional attention": {"use_bidirectional_attention": True},
    "bert as a decoder": {"is_decoder": True},
}
NUMBERED = "it numbers positions from the first column, padding or not"
NO_CLASS = "transformers has no causal language model of it"
SEES = "its tokens see later ones without is_decoder in its configuration"
REFUSED = {  # and why
    "recurrent_gemma": "padding goes into the convolutions of its recurrent layers",
    "rwkv": "padding goes into its recurrent state: it takes no attention mask",
    **dict.fromkeys(("bart", "marian", "pegasus"), NUMBERED),
    **dict.fromkeys(("t5", "llava"), NO_CLASS),
    **dict.fromkeys(("bert", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert"), SEES),
    "xlm": "its tokens see later ones",
    "llama that is not causal": "its tokens see later ones",
    "gemma3_text with bidirectional attention": "its tokens see later ones",
    "llama4_text": "transformers does not give its body without the head",
    "phi3 with LongRoPE": "positions change when a text of the batch is longer than original_max_position_embeddings",
}
SHORT_ONLY = ("phi3 with LongRoPE",)  # refused only where the texts are long
FAMILIES = """
gpt2 openai-gpt gpt_neo gptj gpt_neox gpt_bigcode opt bloom mpt falcon codegen xglm biogpt ctrl llama mistral ministral3
mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma3 phi phi3 stablelm starcoder2 olmo olmo2 olmo3
granite cohere cohere2 persimmon smollm3 nemotron glm4 gpt_oss deepseek_v3 mamba mamba2 falcon_mamba jamba qwen3_next
qwen3_5_text
""".split()
FAMILIES += [
    "falcon with ALiBi",
    "opt with projections",
    "bert as a decoder",
    *REFUSED,
]  # types of models, and variants
LENGTHS = ((3, 17, 9), (7, 5, 2)), ((3, 40, 9), (7, 20, 2))  # of prompts and responses: short, long


def tiny_config(config_class: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    known = {field.name for field in fields(config_class)} | config_class.attribute_map.keys()
    options = {name: size for name, size in SMALL.items() if name in known}
    for name, part in config_class.sub_configs.items():  # of text and images
        if part is not AutoConfig:
            options[name] = tiny_config(part, {})
    return config_class(**options | changes)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """In float32, with noise on every weight: also on those that begin as 0 or 1, biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@torch.no_grad()
def difference(policy: PreTrainedModel, prompt_lengths: tuple, response_lengths: tuple) -> float:
    """Largest difference of a log-probability or a value in a padded batch from that after its own text alone."""
    network = ActorCritic(policy, deepcopy(policy.base_model)).eval()
    generator = torch.Generator().manual_seed(1)
    prompts, responses = (
        [torch.randint(3, SMALL["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
        for lengths in (prompt_lengths, response_lengths)
    )
    tokens, attention_mask, mask = pad(prompts, responses, torch.device("cpu"))
    padded = torch.stack(network(tokens, attention_mask, mask.shape[1]), -1)[mask]  # (tokens of responses, 2)
    alone = []
    for prompt, response in zip(prompts, responses):
        for t, token in enumerate(response):
            before = torch.tensor([prompt + response[:t]])
            logits = policy(before, use_cache=False).logits[0, -1]
            hidden = network.value_model(before, use_cache=False).last_hidden_state[0, -1]
            alone.append(torch.stack([logits.log_softmax(-1)[token], network.value_head(hidden)[0]]))
    return (padded - torch.stack(alone)).abs().max().item()


def accepted(policy: PreTrainedModel, prompt_lengths: tuple, response_lengths: tuple) -> bool:
    """Whether sppo_rlhf_imdb.py takes the model for texts of these lengths."""
    args = ScriptArgs(response_length=max(response_lengths))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            check_policy(args, policy, max(prompt_lengths), tolerance=1e-3)
    except SystemExit:
        return False
    return True


@dataclass
class Args:
    families: tyro.conf.Positional[tuple[str, ...]] = tuple(FAMILIES)
    """families to compare; default all"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    unknown = [family for family in args.families if family not in FAMILIES]
    if unknown:
        print(f"error: no family {', '.join(unknown)}, only {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    transformers.utils.logging.set_verbosity_error()
    print("| Family | Difference, short | Difference, long | Verdict |\n|---|---:|---:|---|")
    surprises = []
    for family in args.families:
        config = tiny_config(CONFIG_MAPPING[family.split()[0]], CHANGES.get(family, {}))
        exists, numbers, reason = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, [], REFUSED.get(family)
        policy = tiny_model(config) if exists else None
        for lengths in LENGTHS:
            has_body = exists and policy.base_model is not policy
            largest = difference(policy, *lengths) if has_body else math.inf
            numbers.append(f"{largest:.1g}" if has_body else "")
            expected = reason is None or (family in SHORT_ONLY and lengths is LENGTHS[0])
            taken = exists and accepted(policy, *lengths)
            if not taken == (largest <= TOLERANCE) == expected and family not in surprises:
                surprises.append(family)
        verdict = f"refused{' where texts are long' * (family in SHORT_ONLY)}: {reason}" if reason else "runs"
        print(f"| {family} | {' | '.join(numbers)} | {verdict} |", flush=True)
    if surprises:
        print(f"error: not as listed: {', '.join(surprises)}", file=sys.stderr)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
