"""SPPO is PPO with vf_coef, ent_coef, max_grad_norm and Adam's eps divided by w = alpha - beta Z, bit for bit.

Adam divides a gradient by its own size, so the loss may be divided by w. Where w and the number of samples in a
minibatch are powers of two, both runs round alike. The test also divides the 1e-6 that the clip adds to the norm; no
flag sets it, nor Adam's eps.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from test_copies import copy

W = 16
CONTINUOUS = "--env-id Hopper-v4 --num-steps 512 --num-minibatches 8 --total-timesteps 1536"
ATARI = "--env-id Breakout --num-envs 2 --num-steps 64 --total-timesteps 384 --num-threads 1"
LANGUAGE = "--response-length 8 --min-response-length 8 --num-updates 2"  # minibatches of 4 * 8 tokens
RUNS = {  # flags of a run of several updates, and the settings that w divides
    "sppo_continuous_discretized": (CONTINUOUS, {"vf-coef": 0.5, "ent-coef": 0.01, "max-grad-norm": 0.5}),
    "sppo_atari": (ATARI, {"vf-coef": 0.5, "ent-coef": 0.01, "max-grad-norm": 0.5}),
    "sppo_rlhf_imdb": (LANGUAGE, {"vf-coef": 0.5, "target-coef": 0.1, "max-grad-norm": 0.5}),
    "sppo_rlhf_tldr": (LANGUAGE, {"vf-coef": 0.1, "target-coef": 0.1, "max-grad-norm": 0.5}),
}


def clip_grad_norm(w: int):
    """In the place of accelerate's, whose 1e-6 cannot be set."""

    def clip(accelerator, parameters, max_norm):
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        for grad in grads:
            grad *= (max_norm / (norm + 1e-6 / w)).clamp(max=1)
        return norm

    return clip


def trained(script: str, folder: Path, w: int, request, **flags: float) -> dict[str, torch.Tensor]:
    """All parameters that a run leaves, with Adam's eps and the 1e-6 beside the norm divided by w."""
    edits, patches, words = [("eps=1e-5", f"eps=1e-5 / {w}")], ExitStack(), RUNS[script][0].split()
    if "rlhf" in script:
        import tiny
        from accelerate import Accelerator

        words = [*tiny.command_line(tiny.flags(script, request.getfixturevalue("assets"))), *words]
        patches.enter_context(patch.object(Accelerator, "clip_grad_norm_", clip_grad_norm(w)))
    else:
        edits.append(("grad_norm + 1e-6", f"grad_norm + 1e-6 / {w}"))
    folder.mkdir()
    module = copy(script, folder, "my_copy", *edits)
    words += [word for flag, value in flags.items() for word in (f"--{flag}", repr(value))]
    with patches, patch.object(sys, "argv", [module.__file__, *words, "--run-dir", str(folder / "run")]):
        module.main()
    files = sorted((folder / "run").rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {name}": x for path in files for name, x in load_file(path).items()}


def divided(script: str) -> dict[str, float]:
    return {"alpha": 1.0, "beta": 0.0} | {name: value / W for name, value in RUNS[script][1].items()}


@pytest.mark.parametrize("script", RUNS)
def test_sppo_is_ppo_with_its_other_settings_divided(script, tmp_path, request):
    sppo = trained(script, tmp_path / "sppo", 1, request, alpha=0.5, beta=W - 0.5, **RUNS[script][1])
    ppo = trained(script, tmp_path / "ppo", W, request, **divided(script))
    assert sppo and sppo.keys() == ppo.keys()
    assert all(torch.equal(sppo[name], ppo[name]) for name in sppo)


def test_each_setting_has_to_be_divided(tmp_path, request):
    """On Atari, where policy and value share a network: with one setting left as it was, another network comes out."""
    script, short = "sppo_atari", {"total-timesteps": 256}
    ppo = trained(script, tmp_path / "all", W, request, **divided(script), **short)
    for name, value in RUNS[script][1].items():
        other = trained(script, tmp_path / name, W, request, **divided(script) | {name: value}, **short)
        assert any(not torch.equal(ppo[key], other[key]) for key in ppo), name
