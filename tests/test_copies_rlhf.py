"""A copy of a language script with changes of each kind trains, resumes and is evaluated; see test_copies.py."""

import json
import sys

import pytest
import tiny
import torch
from conftest import LANGUAGE
from test_copies import copy

LOSS = (
    "    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8\n",
    "    L_rppo = -0.1 * logprob  # changed\n",
)
TAG = (
    '                "val/ratio": share * masked_mean(ratio, mask),\n',
    '                "val/ratio": share * masked_mean(ratio, mask),\n'
    '                "val/advantage": share * masked_mean(A, mask),\n',
)
FLAG = ("    vf_coef: float = ", "    value_scale: float = 1.0  # of the value loss\n    vf_coef: float = ")
USE = ("args.vf_coef * value_loss", "args.vf_coef * args.value_scale * value_loss")
NETWORK = (
    "        self.value_head = nn.Linear({size}, 1){comment}\n",
    "        self.value_head = nn.Sequential(nn.LayerNorm({size}), nn.Linear({size}, 1))\n"
    "        self.value_scale = nn.Parameter(torch.ones(1))\n",
)
SCALED = ("logprob, self.value_head(", "logprob, self.value_scale * self.value_head(")


def call(module, monkeypatch, *flags):
    """Exit code of the copy's main()."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    try:
        assert module.main() is None
    except SystemExit as end:
        return end.code
    return 0


def edits_of(original):
    options = {"size": "self.hidden_size", "comment": ""}
    if original == "sppo_rlhf_imdb":
        options = {"size": "hidden.shape[-1]", "comment": "  # the width need not be the one inside the model"}
    return LOSS, TAG, FLAG, USE, tuple(text.format(**options) for text in NETWORK), SCALED


def small(original, assets, **changes):
    """Command line of two updates with a checkpoint after each."""
    flags = {"num_updates": 2, "checkpoint_every": 1, "update_epochs": 1, "run_dir": "run"}
    return tiny.command_line(tiny.flags(original, assets) | flags | changes)


def stopped_before_the_end(module, monkeypatch, *flags):
    """Train, and end as by Ctrl-C before the policy is saved."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.Run, "save_policy", stop)
        assert call(module, monkeypatch, *flags) == 130


@pytest.fixture
def original():
    """What the tests below change is the same text in both scripts, but for the network."""
    return LANGUAGE[0]


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("original", LANGUAGE)
def test_a_copy_with_all_changes_trains_logs_resumes_and_is_evaluated(original, assets, monkeypatch, tmp_path, capsys):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    stopped_before_the_end(changed, monkeypatch, *small(original, assets), "--value-scale", 0.5)
    learned = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    for name in ("value_scale", "value_head.0.weight"):
        assert name in learned and not torch.equal(learned[name], torch.ones_like(learned[name]))
    assert call(changed, monkeypatch, "--resume", "run") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["script"] == "my_copy" and result["args"]["value_scale"] == 0.5 and result["num_updates"] == 2
    header, _, *rows = (line.split(",") for line in (tmp_path / "run/curves.csv").read_text().splitlines())
    assert float(rows[0][header.index("val/advantage")]) != 0
    capsys.readouterr()
    assert call(changed, monkeypatch, "--evaluate", "run") == 0
    assert capsys.readouterr().out.startswith(f"evaluation: score {result['eval_score']:.4f}, ")


def test_changed_loss_is_the_one_that_is_trained_with(original, assets, monkeypatch, tmp_path):
    for name, edits in (("plain", ()), ("changed", [LOSS])):
        module = copy(original, tmp_path, name, *edits)
        stopped_before_the_end(module, monkeypatch, *small(original, assets, num_updates=1, run_dir=f"run_{name}"))
    plain, changed = (torch.load(tmp_path / f"run_{name}/checkpoint.pt") for name in ("plain", "changed"))
    plain, changed = (checkpoint["model"] for checkpoint in (plain, changed))
    assert plain.keys() == changed.keys() and any(not torch.equal(plain[name], changed[name]) for name in plain)


def test_gradients_of_a_new_layer_are_clipped_with_all_others(original, assets, monkeypatch, tmp_path):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    step, norms = torch.optim.AdamW.step, []

    def spy(optimizer, *inputs, **options):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(optimizer, *inputs, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert call(changed, monkeypatch, *small(original, assets, max_grad_norm=1e-3, num_updates=1)) == 0
    assert norms == pytest.approx([1e-3] * 2, rel=0.01)


def test_a_run_from_before_a_new_flag_resumes_with_its_default(original, assets, monkeypatch, tmp_path):
    before = copy(original, tmp_path, "my_copy", *edits_of(original)[:2])
    stopped_before_the_end(before, monkeypatch, *small(original, assets))
    after = copy(original, tmp_path, "my_copy", *edits_of(original)[:4])
    assert call(after, monkeypatch, "--resume", "run") == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["args"]["value_scale"] == 1.0
    assert call(after, monkeypatch, "--evaluate", "run") == 0


def test_metrics_may_be_of_any_library_and_new_when_a_run_resumes(original, assets, monkeypatch, tmp_path):
    line = "        metrics |= {tag: float(np.mean([s[tag] for s in stats])) for tag in stats[0]}\n"
    logged = '        metrics |= {"my/numpy": np.float32(0.5), "my/torch": trajectories.mask.sum()}\n'
    evaluated = '    metrics = {"eval/mine": np.float32(0.5)} | {f"eval/'
    before = copy(original, tmp_path, "my_copy", (line, line + logged))
    stopped_before_the_end(before, monkeypatch, *small(original, assets))
    after = copy(original, tmp_path, "my_copy", (line, line + logged), ('    metrics = {f"eval/', evaluated))
    assert call(after, monkeypatch, "--resume", "run") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    evaluations = {key for key in result if key.startswith("eval_")} - {"eval_scores"}
    assert result["eval_mine"] == 0.5 and evaluations - result["before"].keys() == {"eval_mine"}


def test_a_run_of_another_copy_or_network_is_refused_and_a_removed_flag_ignored(
    original, assets, monkeypatch, tmp_path, capsys
):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    stopped_before_the_end(changed, monkeypatch, *small(original, assets))
    other = copy(original, tmp_path, "your_copy", *edits_of(original))
    capsys.readouterr()
    assert call(other, monkeypatch, "--resume", "run") == 2
    assert capsys.readouterr().err == "error: run is of my_copy, not of your_copy\n"
    plain = copy(original, tmp_path, "my_copy", *edits_of(original)[:2])
    with pytest.raises(KeyError, match=r"value_head\.weight"):
        call(plain, monkeypatch, "--resume", "run")
    no_flag = copy(original, tmp_path, "my_copy", *edits_of(original)[:2], *edits_of(original)[4:])
    assert call(no_flag, monkeypatch, "--resume", "run") == 0
    assert "value_scale" not in json.loads((tmp_path / "run/result.json").read_text())["args"]


def test_a_bug_in_a_changed_loss_keeps_its_traceback(original, assets, monkeypatch, tmp_path):
    broken = copy(original, tmp_path, "my_copy", (LOSS[0], LOSS[1].replace("logprob", "no_such_name")))
    with pytest.raises(NameError, match="no_such_name") as error:
        call(broken, monkeypatch, *small(original, assets))
    assert error.traceback[-1].name == "symmetric_ppo_loss"
