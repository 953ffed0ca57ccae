"""A copy of a script with changes of each kind, as in docs/changing-a-script.md, trains, resumes and is evaluated."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import CONTINUOUS, CONTROL, ROOT
from safetensors.torch import load_file

LOSS = {
    "sppo": (
        "    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8\n",
        "    L_rppo = -0.1 * logprob  # changed\n",
    ),
    "sa2c": ("    L_a2c = -advantages * logprob  # Eq. 16\n", "    L_a2c = -advantages.sign() * logprob  # changed\n"),
}
TAG = ('        "losses/entropy": ', '        "losses/advantage_std": advantages.std(-1),\n        "losses/entropy": ')
FLAG = ("    gamma: float = 0.99", "    value_scale: float = 1.0  # of the value loss\n    gamma: float = 0.99")
USE = ("args.vf_coef * value_loss", "args.vf_coef * args.value_scale * value_loss")
NETWORK = {
    "continuous_discretized": [
        (
            "        self.critic = mlp(1, 1.0)\n",
            "        self.critic = mlp(1, 1.0)\n"
            "        self.log_temperature = nn.Parameter(torch.zeros(len(generators), 1, 1, 1))\n",
        ),
        (
            "self.actor(obs).unflatten(-1, self.action_shape)",
            "self.actor(obs).unflatten(-1, self.action_shape) / self.log_temperature.exp()",
        ),
    ],
    "atari": [
        (
            "            init(nn.Linear(64 * 7 * 7, 512), 2**0.5),\n",
            "            init(nn.Linear(64 * 7 * 7, 512), 2**0.5),\n            nn.LayerNorm(512),\n",
        )
    ],
}
LAYER_NORM = (
    "                BatchedLinear(generators, 64, 64, 2**0.5),\n",
    "                BatchedLinear(generators, 64, 64, 2**0.5),\n                nn.LayerNorm(64),\n",
)


def copy(original, tmp_path, name, *edits):
    """The script with (old, new) replacements, each of which has one place, imported from tmp_path/name.py."""
    source = (ROOT / f"{original}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edits_of(original):
    algorithm, domain = original.split("_", 1)
    return LOSS[algorithm], TAG, FLAG, USE, *NETWORK[domain]


def call(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    return module.main()


def small(original):
    """Flags of two rollouts with one update of one minibatch each."""
    env = "Breakout" if "atari" in original else "InvertedPendulum-v4"
    flags = ["--env-id", env, "--num-envs", 2, "--num-steps", 8, "--total-timesteps", 32, "--num-threads", 1]
    return [*flags, *(["--num-minibatches", 1, "--update-epochs", 1] if original.startswith("sppo") else [])]


@pytest.fixture(params=["sppo_continuous_discretized", "sa2c_atari"])
def original(request):
    """A script of each domain and of each algorithm; what is the algorithm's alone is tested with all four."""
    return request.param


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("original", CONTROL)
def test_a_copy_with_all_four_changes_trains_logs_and_is_evaluated(original, monkeypatch, tmp_path, capsys):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    monkeypatch.setattr(changed, "EVAL_EPISODES", 1)
    assert call(changed, monkeypatch, *small(original), "--value-scale", 0.5, "--run-dir", "run") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["script"] == "my_copy" and result["args"]["value_scale"] == 0.5
    header, *rows = (tmp_path / "run/curves.csv").read_text().splitlines()
    column = header.split(",").index("losses/advantage_std")
    assert float(rows[0].split(",")[column]) > 0
    plain = copy(original, tmp_path, "my_plain_copy", *edits_of(original)[1:])
    monkeypatch.setattr(plain, "EVAL_EPISODES", 1)
    assert call(plain, monkeypatch, *small(original), "--value-scale", 0.5, "--run-dir", "plain") == 0
    model, unchanged = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    assert model.keys() == unchanged.keys() and not torch.equal(
        model["actor.bias" if "atari" in original else "actor.4.bias"],
        unchanged["actor.bias" if "atari" in original else "actor.4.bias"],
    )
    capsys.readouterr()
    assert call(changed, monkeypatch, "--evaluate", "run") == 0
    assert capsys.readouterr().out.startswith(f"evaluation {result['eval_mean']:.1f} (")


def test_a_run_from_before_a_new_flag_resumes_with_its_default(original, monkeypatch, tmp_path):
    before = copy(original, tmp_path, "my_copy", *edits_of(original)[:2])
    monkeypatch.setattr(before, "EVAL_EPISODES", 1)
    assert call(before, monkeypatch, *small(original), "--run-dir", "run") == 0
    (tmp_path / "run/result.json").unlink()
    after = copy(original, tmp_path, "my_copy", *edits_of(original)[:4])
    monkeypatch.setattr(after, "EVAL_EPISODES", 1)
    assert call(after, monkeypatch, "--resume", "run") == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["args"]["value_scale"] == 1.0
    assert call(after, monkeypatch, "--evaluate", "run") == 0


def test_a_run_of_another_copy_or_network_or_with_a_removed_flag_is_refused_in_one_line(
    original, monkeypatch, tmp_path, capsys
):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    monkeypatch.setattr(changed, "EVAL_EPISODES", 1)
    assert call(changed, monkeypatch, *small(original), "--run-dir", "run") == 0
    for edits, name, word in (
        (edits_of(original)[:2], "my_copy", "value_scale"),
        (edits_of(original)[:4], "my_copy", "does not fit the networks"),
        (edits_of(original), "your_copy", "is of my_copy, not of your_copy"),
    ):
        other = copy(original, tmp_path, name, *edits)
        capsys.readouterr()
        assert call(other, monkeypatch, "--evaluate", "run") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_a_bug_in_a_changed_loss_keeps_its_traceback(original, monkeypatch, tmp_path):
    old, new = LOSS[original.split("_", 1)[0]]
    broken = copy(original, tmp_path, "my_copy", (old, new.replace("logprob", "no_such_name")))
    with pytest.raises(NameError, match="no_such_name") as error:
        call(broken, monkeypatch, *small(original), "--run-dir", "run")
    assert error.traceback[-1].name in ("symmetric_ppo_loss", "symmetric_a2c_loss")


@pytest.mark.parametrize("original", CONTINUOUS)
def test_a_parameter_per_agent_goes_with_a_batch_of_seeds(original, monkeypatch, tmp_path):
    changed = copy(original, tmp_path, "my_copy", *edits_of(original))
    monkeypatch.setattr(changed, "EVAL_EPISODES", 1)
    assert call(changed, monkeypatch, *small(original), "--num-seeds", 2, "--run-dir", "batch") == 0
    assert call(changed, monkeypatch, *small(original), "--seed", 2, "--run-dir", "single") == 0
    batch, single = (load_file(tmp_path / name / "model.safetensors") for name in ("batch/seed2", "single"))
    assert single["log_temperature"].item() != 0
    for name in single:
        torch.testing.assert_close(batch[name], single[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("original", CONTINUOUS)
def test_one_agent_may_have_any_layer_and_several_agents_are_told_what_is_wrong_with_it(
    original, monkeypatch, tmp_path
):
    changed = copy(original, tmp_path, "my_copy", LAYER_NORM)
    monkeypatch.setattr(changed, "EVAL_EPISODES", 1)
    assert call(changed, monkeypatch, *small(original), "--run-dir", "run") == 0
    assert load_file(tmp_path / "run/model.safetensors")["actor.3.weight"].shape == (64,)
    assert call(changed, monkeypatch, "--evaluate", "run") == 0
    with pytest.raises(ValueError, match=r"actor.3.weight of shape \(64,\) has no dimension for 2 agents"):
        call(changed, monkeypatch, *small(original), "--num-seeds", 2, "--run-dir", "batch")
