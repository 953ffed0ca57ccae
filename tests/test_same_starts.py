"""benchmark/questions/evaluate_same_starts.py plays saved agents as their scripts do."""

import csv
import sys

import numpy as np
import pytest
from conftest import import_scripts, load_agent, train_here
from questions import evaluate_same_starts


@pytest.fixture(scope="module")
def lunar_runs(tmp_path_factory):
    """Two short runs of each continuous script on LunarLander and one on another task, in a folder of their own."""
    small = {"total_timesteps": 256, "num_steps": 32, "num_envs": 2}
    folder = tmp_path_factory.mktemp("runs")
    for parameter in import_scripts("*_continuous_discretized.py"):
        (script,) = parameter.values
        flags = small | ({"update_epochs": 1, "num_minibatches": 2} if script.__name__.startswith("sppo") else {})
        for env_id, num_seeds in (("LunarLanderContinuous-v3", 2), ("InvertedPendulum-v4", 1)):
            train_here(script, folder / f"{env_id}-{script.__name__}", env_id=env_id, num_seeds=num_seeds, **flags)
    return folder


def reset_from_common_starts(envs, *_) -> np.ndarray:
    return np.array([env.reset(seed=seed)[0] for seed, env in enumerate(envs.envs)]).reshape(*envs.shape, -1)


@pytest.fixture
def same_starts(monkeypatch, capsys):
    """Exit code, standard output and standard error of the program."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate_same_starts.py", *map(str, arguments)])
        return evaluate_same_starts.main(), *capsys.readouterr()

    return run


def test_same_starts_plays_saved_agents_as_their_scripts_do(same_starts, monkeypatch, tmp_path, lunar_runs):
    path = tmp_path / "returns.csv"
    arguments = "--env-id", "LunarLanderContinuous-v3", "--episodes", 10, "--out", path
    code, out, error = same_starts(lunar_runs, *arguments)
    assert code == 0, error
    header, *rows = csv.reader(path.open(newline=""))
    returns = np.array(rows, float)[:, 1:]  # (episodes, agents)
    assert [row[0] for row in rows] == [str(i) for i in range(10)] and returns.shape == (10, 4)
    assert header[1:] == [
        f"LunarLanderContinuous-v3-{s}/seed{i}"
        for s in ("sa2c_continuous_discretized", "sppo_continuous_discretized")
        for i in (1, 2)
    ]
    for parameter in import_scripts("*_continuous_discretized.py"):
        (script,) = parameter.values
        monkeypatch.setattr(script.Envs, "reset", reset_from_common_starts)
        for i in (1, 2):
            name = f"LunarLanderContinuous-v3-{script.__name__}/seed{i}"
            expected = script.evaluate(*load_agent(script, lunar_runs / name))[0]
            np.testing.assert_allclose(returns[:, header.index(name) - 1], expected, atol=0.051)
            assert f"{name}: {expected.mean():.1f} ± {expected.std(ddof=1) / 10**0.5:.1f} " in out
    best = returns.mean(0).max(), returns.max(1).mean()
    assert best[0] < best[1]
    numbers = [float(line.rpartition(" ")[2]) for part in out.splitlines()[-2:] for line in part.split(";")]
    np.testing.assert_allclose(numbers, (returns.mean(), *best), atol=0.11)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--env-id", "Acrobot-v1"), "trained on Acrobot below"),
        (("--env-id", "NoSuchTask-v1"), "NoSuchTask"),
        (("--env-id", "LunarLanderContinuous-v3", "--episodes", "1"), "--episodes must be at least 2, got 1"),
        (("--env-id", "LunarLanderContinuous-v3", "--out", "missing/returns.csv"), "there is no folder missing"),
        (("--env-id", "LunarLanderContinuous-v3", "--out", "."), "--out . is a folder"),
    ],
)
def test_same_starts_refuses_in_one_line(same_starts, lunar_runs, arguments, message):
    code, out, error = same_starts(lunar_runs, *arguments)
    assert (code, out) == (2, "") and error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_same_starts_names_a_damaged_model_and_a_full_disk(same_starts, tmp_path, lunar_runs):
    (tmp_path / "model.safetensors").write_text("junk")
    code, _, error = same_starts(tmp_path, "--env-id", "LunarLanderContinuous-v3")
    assert code == 2 and error.startswith(f"error: {tmp_path / 'model.safetensors'} is damaged")
    arguments = "--env-id", "LunarLanderContinuous-v3", "--episodes", 2, "--out", "/dev/full"
    code, out, error = same_starts(lunar_runs, *arguments)
    assert (code, error) == (1, "error: --out /dev/full cannot be written: No space left on device\n")
    assert "best agent" in out
