"""benchmark/questions/evaluate_same_starts.py plays saved agents as their scripts do."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, import_scripts, load_agent, train_here


@pytest.fixture(scope="module")
def lunar_runs(tmp_path_factory):
    """Two short runs of each continuous script on LunarLander and one on another task, in a folder of their own."""
    folder = tmp_path_factory.mktemp("runs")
    for parameter in import_scripts("*_continuous_discretized.py"):
        (script,) = parameter.values
        for env_id, num_seeds in (("LunarLanderContinuous-v3", 2), ("InvertedPendulum-v4", 1)):
            flags = {"env_id": env_id, "total_timesteps": 2048, "num_seeds": num_seeds}
            train_here(script, folder / f"{env_id}-{script.__name__}", **flags)
    return folder


def reset_from_common_starts(envs, *_) -> np.ndarray:
    return np.array([env.reset(seed=seed)[0] for seed, env in enumerate(envs.envs)]).reshape(*envs.shape, -1)


def same_starts(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark/questions/evaluate_same_starts.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_same_starts_plays_saved_agents_as_their_scripts_do(monkeypatch, tmp_path, lunar_runs):
    out = tmp_path / "returns.csv"
    done = same_starts(lunar_runs, "--env-id", "LunarLanderContinuous-v3", "--episodes", 10, "--out", out)
    assert done.returncode == 0, done.stderr
    header, *rows = csv.reader(out.open(newline=""))
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
            assert f"{name}: {expected.mean():.1f} ± {expected.std(ddof=1) / 10**0.5:.1f} " in done.stdout
    best = returns.mean(0).max(), returns.max(1).mean()
    assert best[0] < best[1]
    numbers = [float(line.rpartition(" ")[2]) for part in done.stdout.splitlines()[-2:] for line in part.split(";")]
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
def test_same_starts_refuses_in_one_line(lunar_runs, arguments, message):
    done = same_starts(lunar_runs, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and message in done.stderr


def test_same_starts_names_a_damaged_model_and_a_full_disk(tmp_path, lunar_runs):
    (tmp_path / "model.safetensors").write_text("junk")
    done = same_starts(tmp_path, "--env-id", "LunarLanderContinuous-v3")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'model.safetensors'} is damaged")
    done = same_starts(lunar_runs, "--env-id", "LunarLanderContinuous-v3", "--episodes", 2, "--out", "/dev/full")
    assert done.returncode == 1 and done.stderr == "error: --out /dev/full cannot be written: No space left on device\n"
    assert "best agent" in done.stdout
