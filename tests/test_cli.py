"""The scripts through their command line: output, determinism, survival, bad input, learning, likeness."""

import csv
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, CONTROL, largest_file, read_checkpoint, wait_for_the_next_second
from pausing import interrupt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/learning_rate",
    "charts/SPS",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/grad_norm",
    "losses/explained_variance",
    "eval/episodic_return",
}
SPPO_TAGS = TAGS | {"losses/approx_kl", "losses/clipfrac", "losses/sign_flips"}
PENDULUM = ("--env-id", "InvertedDoublePendulum-v4")
SPPO_UPDATE = ("--num-minibatches", "4", "--update-epochs", "2")
both = pytest.mark.parametrize("script", CONTINUOUS, indirect=True)
RESULT_KEYS = {
    "script",
    "env_id",
    "seed",
    "args",
    "total_timesteps",
    "eval_returns",
    "eval_mean",
    "train_last10_mean",
    "sps",
    "wall_seconds",
    "versions",
    "commit",
    "device",
}
TABLE_6 = (
    "Ant-v4",
    "BipedalWalker-v3",
    "HalfCheetah-v4",
    "Hopper-v4",
    "HumanoidStandup-v4",
    "InvertedDoublePendulum-v4",
    "LunarLanderContinuous-v3",
    "Swimmer-v4",
    "Walker2d-v4",
)
TOY_LOW = np.array([[-1, -2, -3], [0, 1, 2]], np.float32)
TOY_HIGH = np.array([[1, 2, 3], [5, 6, 7]], np.float32)


class ToyEnv(gym.Env):
    """Ten-step episodes, Dict observations and a (2, 3) Box of actions with bounds of their own in every entry."""

    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (3,)), "mode": gym.spaces.Discrete(4)})

    def __init__(self, render_mode=None, infinite=False, nan_after=None):
        self.render_mode, self.nan_after, self.steps, self.lifetime = render_mode, nan_after, 0, 0
        self.action_space = gym.spaces.Box(TOY_LOW, np.full_like(TOY_HIGH, np.inf) if infinite else TOY_HIGH)

    def observation(self):
        return {"position": self.np_random.uniform(-1, 1, 3).astype(np.float32), "mode": self.steps % 4}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def step(self, action):
        bins = (action - TOY_LOW) / (TOY_HIGH - TOY_LOW) * 10
        assert action.shape == (2, 3) and np.allclose(bins, bins.round(), atol=1e-4), action
        self.steps += 1
        self.lifetime += 1
        reward = float("nan") if self.nan_after and self.lifetime > self.nan_after else float(bins.mean())
        return self.observation(), reward, self.steps == 10, False, {}


class BrokenEnv(ToyEnv):
    """An environment with a bug, in its constructor or, later, in a step."""

    def __init__(self, broken_after, render_mode=None):
        super().__init__(render_mode)
        self.parts = {"left": 1} if broken_after else {}["missing_key"]
        self.broken_after = broken_after

    def step(self, action):
        if self.lifetime == self.broken_after // 2:
            self.parts["missing_key"]
        return super().step(action)


class EndlessEnv(ToyEnv):
    def step(self, action):
        return *super().step(action)[:2], False, False, {}


class PlainEnv(ToyEnv):
    """An environment that knows no render_mode, which gymnasium does not demand."""

    def __init__(self):
        super().__init__()


class SwitchesEnv(ToyEnv):
    """Observations of one dimension that are no Box."""

    observation_space = gym.spaces.MultiDiscrete([4, 2])

    def observation(self):
        return np.array([self.steps % 4, self.steps % 2])


@pytest.fixture(scope="session", params=CONTINUOUS[:1])
def script(request):
    """SPPO's script, with which the other has in common what is no matter of the algorithm (test_siblings.py)."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session", autouse=True)
def toy_envs():
    gym.register("Toy-v0", ToyEnv)
    gym.register("ToyPlain-v0", PlainEnv)
    gym.register("ToyInfinite-v0", ToyEnv, kwargs={"infinite": True})
    gym.register("ToyNaN-v0", ToyEnv, kwargs={"nan_after": 40})
    gym.register("ToyBroken-v0", BrokenEnv, kwargs={"broken_after": 40})
    gym.register("ToyUnborn-v0", BrokenEnv, kwargs={"broken_after": 0})
    gym.register("ToyEndless-v0", EndlessEnv)
    gym.register("ToySwitches-v0", SwitchesEnv)


@pytest.fixture
def call(script, monkeypatch, capsys, tmp_path):
    """main() in this process, with tmp_path as working directory; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        code = script.main()
        return code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def small(script, num_steps=16):
    """Flags of a rollout of 2 * num_steps steps."""
    return ("--num-envs", "2", "--num-steps", num_steps, *(SPPO_UPDATE if script.SCRIPT.startswith("sppo") else ()))


def launch(script, cwd, *flags):
    command = [sys.executable, script.__file__, *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(script, cwd, *flags):
    process = launch(script, cwd, *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read_curves(run_dir):
    with (run_dir / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def curve_points(run_dir):
    """{tag: [(step, value)]} of curves.csv"""
    rows = read_curves(run_dir)
    points = {tag: [(int(r["global_step"]), float(r[tag])) for r in rows if r[tag]] for tag in rows[0]}
    return {tag: p for tag, p in points.items() if p and tag != "global_step"}


def event_points(run_dir):
    """{tag: [(step, value)]} of the TensorBoard events"""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def snapshot(directory):
    """{path: (content, modification time)} of everything below directory"""
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in directory.rglob("*")}


def assert_refused(code, err, *words):
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


FINISHED_STEPS = ("--total-timesteps", "5000", "--seed", "3")


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory):
    """(working directory, stdout, stderr) of a run that has ended; its directory is "run"."""
    cwd = tmp_path_factory.mktemp("finished")
    flags = (*PENDULUM, *FINISHED_STEPS, *small(script, 256), "--eval-every", "2048", "--run-dir", "run")
    code, out, err = run_script(script, cwd, *flags)
    assert code == 0, err
    return cwd, out, err


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run with its last checkpoint, before its result was written."""
    run_dir = shutil.copytree(finished[0] / "run", tmp_path / "run")
    (run_dir / "result.json").unlink()
    (run_dir / "model.safetensors").unlink()
    return run_dir


@both
def test_finished_run_leaves_the_agreed_files_and_nothing_else(finished):
    cwd, _, err = finished
    assert err == ""
    assert [p.name for p in cwd.iterdir()] == ["run"]
    names = {p.name for p in (cwd / "run").iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {"args.json", "checkpoint.pt", "model.safetensors", "curves.csv", "result.json"}


@both
def test_result_has_the_agreed_keys_and_total_rounds_up_to_whole_rollouts(script, finished):
    cwd, out, _ = finished
    result = read_result(cwd / "run")
    assert set(result) == RESULT_KEYS
    assert (result["script"], result["env_id"], result["seed"]) == (script.SCRIPT, "InvertedDoublePendulum-v4", 3)
    assert result["args"] == json.loads((cwd / "run" / "args.json").read_text())["args"]
    assert result["args"]["total_timesteps"] == 5000 and result["args"]["num_seeds"] == 1
    assert result["total_timesteps"] == 5120
    assert len(result["eval_returns"]) == 10 and all(isinstance(r, float) for r in result["eval_returns"])
    assert len(set(result["eval_returns"])) == 10
    assert result["eval_mean"] == pytest.approx(np.mean(result["eval_returns"]))
    assert 20 < result["train_last10_mean"] < 10_000
    assert result["sps"] > 100 and result["wall_seconds"] > 5120 / result["sps"]
    assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu"
    assert "5,120" in out and f"{result['eval_mean']:.1f}" in out and "run" in out


@both
def test_curves_hold_the_same_values_as_tensorboard(script, finished):
    run_dir = finished[0] / "run"
    tags = SPPO_TAGS if script.SCRIPT.startswith("sppo") else TAGS
    assert set(read_curves(run_dir)[0]) == {"global_step"} | tags
    assert [int(row["global_step"]) for row in read_curves(run_dir)] == [2048, 4096, 5120, 5120]
    curves, events = curve_points(run_dir), event_points(run_dir)
    assert set(curves) == set(events) == tags
    for tag, points in curves.items():
        assert [step for step, _ in points] == [step for step, _ in events[tag]], tag
        np.testing.assert_allclose([v for _, v in points], [v for _, v in events[tag]], rtol=1e-5, err_msg=tag)


@both
def test_periodic_evaluations_and_the_final_one_are_logged(finished):
    points = curve_points(finished[0] / "run")["eval/episodic_return"]
    assert [step for step, _ in points] == [2048, 4096, 5120]
    assert points[-1][1] == pytest.approx(read_result(finished[0] / "run")["eval_mean"], rel=1e-5)


def test_evaluate_prints_the_returns_of_the_final_evaluation(script, finished, call):
    run_dir = finished[0] / "run"
    result = read_result(run_dir)
    line = f"evaluation {result['eval_mean']:.1f} ({' '.join(f'{r:.1f}' for r in result['eval_returns'])})\n"
    before = snapshot(finished[0])
    assert call("--evaluate", run_dir) == (0, line, "")
    assert call("--evaluate", run_dir / "model.safetensors") == (0, line, "")
    args, learner = script.load_model(run_dir)
    assert script.evaluate(learner, args, run_dir)[0].tolist() == result["eval_returns"]
    assert snapshot(finished[0]) == before


@both
def test_saved_model_is_enough_to_act_with_numpy_alone(script, finished):
    run_dir = finished[0] / "run"
    with safe_open(run_dir / "model.safetensors", "numpy") as file:
        metadata, model = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    args = json.loads(metadata["args"])
    assert metadata["script"] == script.SCRIPT and args == read_result(run_dir)["args"]
    env = script.make_env(args["env_id"])
    bins = np.linspace(env.action_space.low, env.action_space.high, args["num_bins"])
    returns = []
    for seed in script.env_seeds([args["seed"]], 10, script.EVALUATION):
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            x = ((obs - model["obs_mean"]) / np.sqrt(model["obs_var"] + 1e-8)).clip(-10, 10)
            for layer in (0, 2):
                x = np.tanh(x @ model[f"actor.{layer}.weight"] + model[f"actor.{layer}.bias"][0])
            logits = (x @ model["actor.4.weight"] + model["actor.4.bias"][0]).reshape(-1, args["num_bins"])
            obs, reward, terminated, truncated, _ = env.step(bins[logits.argmax(-1), range(len(logits))])
            total, done = total + reward, terminated or truncated
        returns.append(total)
    np.testing.assert_allclose(returns, read_result(run_dir)["eval_returns"], rtol=1e-6)


@both
def test_same_seed_gives_the_same_run_another_seed_does_not(script, finished, call, tmp_path):
    flags = (*PENDULUM, *small(script, 256), "--total-timesteps", "5000", "--eval-every", "2048")
    assert call(*flags, "--seed", 3, "--run-dir", "same")[0] == 0
    assert call(*flags, "--seed", 4, "--run-dir", "other")[0] == 0

    def outcome(run_dir):
        rows = [{tag: value for tag, value in row.items() if tag != "charts/SPS"} for row in read_curves(run_dir)]
        return rows, read_result(run_dir)["eval_returns"]

    expected, same, other = (outcome(d) for d in (finished[0] / "run", tmp_path / "same", tmp_path / "other"))
    assert same == expected
    assert all(a != b for a, b in zip(other[0], expected[0]))
    assert not set(other[1]) & set(expected[1])


@both
def test_periodic_evaluation_does_not_change_training(script, finished, call, tmp_path):
    assert call(*PENDULUM, *FINISHED_STEPS, *small(script, 256), "--run-dir", "without")[0] == 0
    with_eval, without = (load_file(d / "model.safetensors") for d in (finished[0] / "run", tmp_path / "without"))
    assert with_eval.keys() == without.keys()
    assert all(torch.equal(with_eval[key], without[key]) for key in with_eval)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_update_equals_the_eager_one(script, call, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes, each of which imports torch
    flags = (*PENDULUM, *small(script), "--total-timesteps", 64)
    assert call(*flags, "--run-dir", "eager")[0] == 0
    assert call(*flags, "--run-dir", "compiled", "--compile")[0] == 0
    eager, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    start = script.Agent([torch.Generator().manual_seed(1)], 8 + 3, 1, 11).state_dict()
    moved = [key for key in start if start[key][0].shape != eager[key].shape or not start[key][0].equal(eager[key])]
    assert len(moved) == len(start)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-4, atol=1e-6, msg=key)


def test_box2d_run_records_a_playable_video(script, tmp_path):
    flags = ("--env-id", "LunarLanderContinuous-v3", *small(script, 64), "--total-timesteps", "250")
    code, _, err = run_script(script, tmp_path, *flags, "--run-dir", "run", "--capture-video")
    assert code == 0, err
    assert "Warning" not in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert set(read_result(tmp_path / "run")) == RESULT_KEYS
    assert read_result(tmp_path / "run")["total_timesteps"] == 256
    videos = list((tmp_path / "run" / "videos").rglob("*.mp4"))
    assert len(videos) == 1
    frames = list(imageio.get_reader(videos[0]).iter_data())
    assert len(frames) > 40 and frames[0].shape == (400, 600, 3)
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.parametrize("env_id", TABLE_6)
def test_every_environment_of_table_6_trains(script, call, monkeypatch, tmp_path, env_id):
    make_env = script.make_env
    monkeypatch.setattr(script, "EVAL_EPISODES", 1)
    monkeypatch.setattr(script, "make_env", lambda *a: gym.wrappers.TimeLimit(make_env(*a), 12))
    code, _, err = call("--env-id", env_id, *small(script), "--total-timesteps", 64, "--run-dir", "run")
    assert (code, err) == (0, "")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in model.values())
    assert np.isfinite(read_result(tmp_path / "run")["eval_returns"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("env_id, obs_dim", [("Toy-v0", 3 + 4), ("ToySwitches-v0", 4 + 2)])
def test_flattened_observations_and_matrices_of_actions_work(script, call, tmp_path, env_id, obs_dim):
    code, _, err = call("--env-id", env_id, *small(script), "--total-timesteps", 128, "--run-dir", "run")
    assert (code, err) == (0, "")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert model["obs_mean"].shape == (obs_dim,) and model["actor.4.bias"].shape == (1, 2 * 3 * 11)
    run_dir = tmp_path / "run"
    args, learner = script.load_model(run_dir)
    assert script.evaluate(learner, args, run_dir)[0].tolist() == read_result(run_dir)["eval_returns"]


def test_environment_that_knows_no_render_mode_works(script, call, tmp_path):
    code, _, err = call("--env-id", "ToyPlain-v0", *small(script), "--total-timesteps", 32, "--run-dir", "run")
    assert (code, err) == (0, "")
    assert len(read_result(tmp_path / "run")["eval_returns"]) == 10


def rows_of(run_dir):
    """Complete lines of curves.csv without the header; none before it exists."""
    path = run_dir / "curves.csv"
    return [r for r in path.read_text().splitlines(keepends=True)[1:] if r.endswith("\n")] if path.exists() else []


def step_of(row):
    return int(row.split(",")[0])


def checkpoint_step(run_dir):
    return read_checkpoint(run_dir)["counters"]["global_step"] if (run_dir / "checkpoint.pt").exists() else 0


@pytest.fixture(scope="session")
def survivor(script, tmp_path_factory):
    """A run stopped four times and resumed to its end, with what was seen on the way."""
    cwd = tmp_path_factory.mktemp("survivor")
    run_dir = cwd / "run"
    flags = (*PENDULUM, *small(script, 128), "--total-timesteps", 12_288, "--checkpoint-every", 4096)
    flags = (*flags, "--run-dir", "run")
    resume = ("--resume", "run")
    seen = {"run_dir": run_dir}

    # Rows come every 2048 steps. Killed with one row and no checkpoint:
    code, _ = interrupt(script, cwd, flags, "RunLog.write", 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert len(rows_of(run_dir)) == 1 and not (run_dir / "checkpoint.pt").exists()

    # Killed with a row past the checkpoint:
    interrupt(script, cwd, resume, "RunLog.write", 4, signal.SIGKILL)
    seen["killed_at"], seen["killed_rows"] = checkpoint_step(run_dir), rows_of(run_dir)

    # Ctrl-C between two checkpoints:
    seen["ctrl_c"] = interrupt(script, cwd, resume, "RunLog.write", 1, signal.SIGINT)
    seen["stopped_at"], seen["stopped_rows"] = checkpoint_step(run_dir), rows_of(run_dir)

    # Killed after the last checkpoint:
    interrupt(script, cwd, resume, "evaluate", 1, signal.SIGKILL)
    seen["evaluating"] = checkpoint_step(run_dir) == 12_288 and not (run_dir / "result.json").exists()

    (run_dir / "curves.csv").write_bytes(b"\xff\xfe\x00")  # is written anew, from the checkpoint
    seen["end"] = run_script(script, cwd, *resume)
    return seen


def test_run_killed_at_any_moment_resumes_to_the_same_total(survivor):
    assert survivor["evaluating"]
    code, out, err = survivor["end"]
    assert (code, err) == (0, "")
    result = read_result(survivor["run_dir"])
    assert result["total_timesteps"] == 12_288 and len(result["eval_returns"]) == 10
    assert "12,288" in out
    assert [p.name for p in survivor["run_dir"].parent.iterdir()] == ["run"]


def test_resumed_run_continues_from_its_checkpoint(survivor):
    rows = rows_of(survivor["run_dir"])
    for moment in ("killed", "stopped"):
        step = survivor[f"{moment}_at"]
        kept = [row.rstrip(",\n") for row in survivor[f"{moment}_rows"] if step_of(row) <= step]
        assert kept and [row.rstrip(",\n") for row in rows[: len(kept)]] == kept  # a later tag adds a column
        assert step < step_of(rows[len(kept)]) <= step + 2048 + 256
    assert survivor["stopped_at"] > survivor["killed_at"] >= 4096


def test_resumed_run_writes_no_step_twice(survivor):
    steps = [step_of(row) for row in rows_of(survivor["run_dir"])]
    assert steps[-1] == steps[-2] == 12_288
    assert all(a < b for a, b in pairwise(steps[:-1]))
    for tag, points in event_points(survivor["run_dir"]).items():
        assert all(a < b for (a, _), (b, _) in pairwise(points)), tag


def test_tensorboard_of_a_resumed_run_has_every_row_of_its_curves(survivor):
    events = event_points(survivor["run_dir"])
    for tag, points in curve_points(survivor["run_dir"]).items():
        assert [step for step, _ in events[tag]] == [step for step, _ in points], tag


def test_a_row_is_in_the_files_when_write_returns_and_a_new_tag_gets_a_column(script, tmp_path):
    log = script.RunLog(tmp_path / "run", script.Args(), [], 0)
    for step in range(1, 6):
        tags = ["charts/a", "charts/b"] if step > 3 else ["charts/a"]
        log.write(step, {tag: float(step) for tag in tags})
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / f"copy{step}"))
        for points in (event_points(copy), curve_points(copy)):
            assert {tag: p[-1] for tag, p in points.items()} == {tag: (step, step) for tag in tags}
    log.close()
    assert (tmp_path / "run/curves.csv").read_text().splitlines()[:2] == ["global_step,charts/a,charts/b", "1,1,"]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(survivor):
    code, err = survivor["ctrl_c"]
    assert code == 130
    assert "--resume run" in err and "Traceback" not in err
    assert survivor["killed_at"] < step_of(survivor["stopped_rows"][-1]) <= survivor["stopped_at"] < 12_288


@pytest.mark.parametrize("name, number", zip(CONTROL, (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)))
def test_either_signal_stops_after_the_rollout_with_a_checkpoint(name, number, monkeypatch, capsys, tmp_path):
    def unhandled(*_):
        pytest.fail("the script does not handle this signal")

    def gae_with_signal(*inputs):
        os.kill(os.getpid(), number)
        return gae(*inputs)

    control = importlib.import_module(name)
    gae = control.gae
    monkeypatch.setattr(control, "gae", gae_with_signal)
    game = "Breakout" if "atari" in control.SCRIPT else PENDULUM[1]
    flags = ("--env-id", game, *small(control), "--num-threads", 1, "--checkpoint-every", 10**6)
    flags = (*flags, "--run-dir", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [control.__file__, *map(str, flags)])
    handlers = {n: signal.signal(n, unhandled) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert control.main() == 130
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert capsys.readouterr().err == f"stopped\nto go on: python {control.SCRIPT}.py --resume {tmp_path / 'run'}\n"
    assert read_checkpoint(tmp_path / "run")["counters"]["global_step"] == 32
    assert not (tmp_path / "run/result.json").exists()


def test_ctrl_c_during_an_evaluation_has_nothing_to_go_on_with(script, finished, call, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate", interrupted)
    assert call("--evaluate", finished[0] / "run") == (130, "", "stopped\n")


def test_kill_between_the_final_evaluation_and_the_result_leaves_one_evaluation_row_and_the_same_model(
    script, call, monkeypatch, tmp_path
):
    class Killed(BaseException):
        """Stands for kill -9: nothing in the scripts may catch it."""

    def die_at_the_result(path, content):
        if path.name == "result.json":
            raise Killed
        write_json(path, content)

    write_json, run_dir = script.write_json, tmp_path / "run"
    monkeypatch.setattr(script, "write_json", die_at_the_result)
    with pytest.raises(Killed):
        call(*PENDULUM, *small(script), "--total-timesteps", "64", "--run-dir", run_dir)
    monkeypatch.setattr(script, "write_json", write_json)
    model = load_file(run_dir / "model.safetensors")
    wait_for_the_next_second()
    assert call("--resume", run_dir)[0] == 0
    evaluations = [row for row in rows_of(run_dir) if not row.endswith(",\n")]
    assert [step_of(row) for row in evaluations] == [64]
    assert [step for step, _ in event_points(run_dir)["eval/episodic_return"]] == [64]
    resumed = load_file(run_dir / "model.safetensors")
    assert all(torch.equal(model[name], resumed[name]) for name in model)


def random_batch(script, num_agents, seed):
    """A minibatch as gradients() takes it, for 4 observations, 2 action dimensions and 5 bins."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(num_agents, 16, generator=generator) for _ in range(2)]
    obs = torch.randn(num_agents, 16, 4, generator=generator)
    actions = torch.randint(5, (num_agents, 16, 2), generator=generator)
    old_logprob = [torch.full((num_agents, 16), -2 * np.log(5))] if script.SCRIPT.startswith("sppo") else []
    return [obs, actions, *old_logprob, *normal]


def update(script, learner, args, batch):
    """One update as train() does it; one normalization update and some random numbers besides."""
    clip = [torch.tensor(0.2)] if script.SCRIPT.startswith("sppo") else []
    grads, _ = script.gradients(learner.agent, batch, *clip, args)
    for p, g in zip(learner.agent.parameters(), grads):
        p.grad = g
    learner.optimizer.step()
    learner.normalizer.obs(batch[0].numpy().astype(float))
    learner.normalizer.reward(batch[-1][:, : args.num_envs].numpy(), np.zeros((len(batch[0]), args.num_envs), bool))
    return learner.draw(3, kind="normal_")


def flat(tree):
    """Leaves of nested dicts and lists, as {path: leaf}"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {"": tree}
    return {f"{key}/{path}": leaf for key, value in items for path, leaf in flat(value).items()}


@both
def test_learner_state_round_trip_is_exact_and_training_goes_on_as_before(script, tmp_path):
    args = script.Args(num_bins=5, num_envs=2)
    learner = script.Learner(args, [7, 8], 4, 2)
    for seed in range(3):
        update(script, learner, args, random_batch(script, 2, seed))
    torch.save(learner.state(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)

    other = script.Learner(args, [1, 2], 4, 2)
    other.load_state(state, tmp_path / "state")
    other.normalizer.returns = learner.normalizer.returns.copy()
    before = flat(torch.load(tmp_path / "state", weights_only=True))
    for seed in range(3, 6):
        batch = random_batch(script, 2, seed)
        assert torch.equal(update(script, other, args, batch), update(script, learner, args, batch))
    ours, theirs = flat(learner.state()), flat(other.state())
    assert ours.keys() == theirs.keys()
    tensors = [path for path in ours if isinstance(ours[path], torch.Tensor)]
    assert all(torch.equal(ours[path], theirs[path]) for path in tensors)
    assert not any(torch.equal(ours[path], before[path]) for path in tensors if path.startswith("agent/"))


@both
def test_checkpoint_holds_parameters_statistics_and_counters_of_the_run(script, finished):
    run_dir = finished[0] / "run"
    checkpoint = read_checkpoint(run_dir)
    result, model = read_result(run_dir), load_file(run_dir / "model.safetensors")
    assert checkpoint["counters"]["global_step"] == checkpoint["counters"]["train_steps"] == 5120
    assert result["sps"] == pytest.approx(5120 / checkpoint["counters"]["train_seconds"])
    assert 0 < checkpoint["counters"]["wall_seconds"] < result["wall_seconds"]
    assert np.mean(checkpoint["counters"]["last_returns"][0]) == pytest.approx(result["train_last10_mean"])
    state = checkpoint["learner"]
    assert state["agent"].keys() == model.keys() - {"obs_mean", "obs_var"}
    assert all(torch.equal(state["agent"][key][0], model[key]) for key in state["agent"])
    assert torch.equal(state["normalizer"]["obs_rms"]["mean"][0], model["obs_mean"])
    assert torch.equal(state["normalizer"]["obs_rms"]["var"][0], model["obs_var"])


def test_resume_of_a_finished_run_says_so_and_changes_nothing(finished, call):
    run_dir = finished[0] / "run"
    before = snapshot(finished[0])
    code, out, err = call("--resume", run_dir)
    assert (code, err) == (0, "")
    assert out == f"{run_dir} has finished; evaluate again with --evaluate\n"
    assert snapshot(finished[0]) == before


def change_script(path, name):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"script": name}))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def change_checkpoint(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def checkpoint_of_another_network(path):
    learner = torch.load(path, weights_only=True)["learner"]
    learner["agent"]["actor.0.weight"] = torch.zeros(1, 3, 64)
    change_checkpoint(path, learner=learner)


def run_of_version_1(path):
    """A batch of seeds as version 1 left it: everything in the directories of the seeds."""
    (path / "seed3").mkdir()
    for name in ("args.json", "checkpoint.pt"):
        (path / name).rename(path / "seed3" / name)


DAMAGE = {
    "args of another script": lambda d: change_script(d / "args.json", "sppo_atari"),
    "truncated args": lambda d: truncate(d / "args.json"),
    "args that are a list": lambda d: (d / "args.json").write_text("[1]"),
    "no args": lambda d: (d / "args.json").unlink(),
    "batch of version 1": run_of_version_1,
    "truncated checkpoint": lambda d: truncate(d / "checkpoint.pt"),
    "empty checkpoint": lambda d: (d / "checkpoint.pt").write_bytes(b""),
    "checkpoint that is a list": lambda d: torch.save([1, 2], d / "checkpoint.pt"),
    "checkpoint of version 1": lambda d: torch.save({"learner": {}}, d / "checkpoint.pt"),
    "checkpoint of another network": lambda d: checkpoint_of_another_network(d / "checkpoint.pt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_refuses_a_damaged_or_foreign_run(unfinished, call, damage):
    DAMAGE[damage](unfinished)
    before = snapshot(unfinished.parent)
    code, out, err = call("--resume", unfinished)
    assert_refused(code, err, str(unfinished))
    assert out == ""
    assert snapshot(unfinished.parent) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--resume", "run", "--seed", "5"), ("--seed", "--resume")),
        (("--resume", "run", "--beta", "5.5", "--num-envs", "3"), ("--beta", "--num-envs")),
        (
            ("--resume", "run", "--num-bins", "12", "--gae_lambda=0.9", "--compile"),
            ("--num-bins, --gae-lambda, --compile",),
        ),
        (("--resume", "run", "--run-dir", "new"), ("--run-dir",)),
        (("--resume", "missing"), ("missing",)),
        (("--run-dir", "run"), ("--run-dir", "--resume")),
        (("--run-dir", "run/args.json"), ("--run-dir",)),
        (("--run-dir", "run/args.json/new"), ("--run-dir",)),
        (("--evaluate", "run"), ("run/model.safetensors cannot be read as a model", "No such file")),
        (("--resume", ""), ("--resume", "need a path")),
        (("--evaluate", ""), ("--evaluate", "need a path")),
        (("--run-dir", ""), ("--run-dir", "need a path")),
    ],
)
def test_resume_run_dir_and_evaluate_refuse_what_they_cannot_honour(unfinished, call, flags, words):
    before = snapshot(unfinished.parent)
    code, out, err = call(*flags)
    assert_refused(code, err, *words)
    assert out == ""
    assert snapshot(unfinished.parent) == before


@pytest.mark.parametrize("flag", ["--seed 5", "--resume run", "--compile", "--reward-noise-std 0.05"])
def test_evaluate_takes_its_arguments_from_the_model(finished, call, flag):
    before = snapshot(finished[0])
    code, out, err = call("--evaluate", finished[0] / "run", *flag.split())
    assert_refused(code, err, "--evaluate takes its arguments from the run: drop " + flag.split()[0])
    assert out == "" and snapshot(finished[0]) == before


def model_of_a_missing_environment(path, good):
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    args = metadata["args"].replace("InvertedDoublePendulum-v4", "NotInstalled-v0")
    save_file(load_file(good), path, metadata | {"args": args})


def several_seeds(path, good):
    for seed in (2, 1):
        (path / f"seed{seed}").mkdir(parents=True)
        (path / f"seed{seed}" / "model.safetensors").write_text("")


def model_with(path, good, **tensors):
    with safe_open(good, "pt") as file:
        save_file(load_file(good) | tensors, path, file.metadata())


MODELS = {
    "not a number": lambda path, good: model_with(path, good, obs_mean=torch.full((9,), torch.nan)),
    "another observation size": lambda path, good: model_with(path, good, obs_mean=torch.zeros(4)),
    "another network": lambda path, good: model_with(path, good, **{"actor.0.bias": torch.zeros(1, 32)}),
    "parent of several runs": several_seeds,
    "missing directory": lambda path, good: path,
    "run without a model": lambda path, good: path.mkdir(),
    "text": lambda path, good: path.write_text("hello"),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:-1000]),
    "pickle": lambda path, good: torch.save({"a": torch.zeros(3)}, path),
    "no metadata": lambda path, good: save_file(load_file(good), path),
    "damaged metadata": lambda path, good: save_file(load_file(good), path, {"script": CONTINUOUS[0], "args": "{"}),
    "another script": lambda path, good: save_file(load_file(good), path, {"script": "sppo_atari", "args": "{}"}),
    "environment that is not installed": model_of_a_missing_environment,
}


@pytest.mark.parametrize("kind", MODELS)
def test_evaluate_refuses_what_is_no_model_of_this_script(finished, call, tmp_path, kind):
    MODELS[kind](tmp_path / "model", finished[0] / "run" / "model.safetensors")
    before = snapshot(tmp_path)
    code, out, err = call("--evaluate", tmp_path / "model")
    word = "model/seed1" if "several" in kind else "NotInstalled-v0" if "installed" in kind else tmp_path / "model"
    assert_refused(code, err, str(word))
    assert out == ""
    assert snapshot(tmp_path) == before


BAD_INPUT = [
    ("--env-id HalfCheeta-v4", "--env-id", "HalfCheetah"),
    ("--env-id Nothing-v0", "--env-id", "Nothing"),
    ("--env-id nopackage:Nothing-v0", "--env-id", "nopackage"),
    ("--env-id CartPole-v1", "--env-id", "Discrete", "Box"),
    ("--env-id ToyInfinite-v0", "--env-id", "infinite", "finite"),
    ("--num-bins 1", "--num-bins", "at least 2"),
    ("--num-bins 999999999", "--num-bins", "GiB"),
    ("--num-seeds 1000000000", "--num-seeds", "GiB"),
    ("--beta -1", "--beta", "0 or above"),
    ("--beta nan", "--beta", "0 or above"),
    ("--beta inf", "--beta", "0 or above"),
    ("--alpha 0", "--alpha", "above 0"),
    ("--alpha nan", "--alpha", "above 0"),
    ("--alpha -0.5", "--alpha", "above 0"),
    ("--Z 0", "--Z", "below 0"),
    ("--Z 1", "--Z", "below 0"),
    ("--Z nan", "--Z", "below 0"),
    ("--reward-noise-std -0.05", "--reward-noise-std", "0 or above"),
    ("--total-timesteps 63 --num-envs 2 --num-steps 32", "--total-timesteps", "64"),
    ("--total-timesteps 0", "--total-timesteps", "at least"),
    ("--seed -1", "--seed", "0 or above"),
    (f"--seed {2**63}", "--seed", "below 2**63"),
    ("--num-seeds 0", "--num-seeds", "at least 1"),
    ("--num-envs 0", "--num-envs", "at least 1"),
    ("--num-steps 0", "--num-steps", "at least 1"),
    ("--checkpoint-every 0", "--checkpoint-every", "at least 1"),
    ("--eval-every -1", "--eval-every", "0 or above"),
    ("--learning-rate 0", "--learning-rate", "above 0"),
    ("--max-grad-norm 0", "--max-grad-norm", "above 0"),
    ("--gamma 1.01", "--gamma", "between 0 and 1"),
    ("--gae-lambda -0.1", "--gae-lambda", "between 0 and 1"),
]
BAD_SPPO_INPUT = [
    ("--num-steps 100", "--num-steps", "--num-minibatches", "multiple"),
    ("--num-steps 32", "--num-minibatches", "--no-norm-adv"),
    ("--num-minibatches 0", "--num-minibatches", "at least 1"),
    ("--update-epochs 0", "--update-epochs", "at least 1"),
    ("--clip-coef 0", "--clip-coef", "above 0"),
]


@both
@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in BAD_INPUT])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(call, tmp_path, flags, words):
    code, out, err = call(*flags.split())
    assert_refused(code, err, *words)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in BAD_SPPO_INPUT])
def test_rollouts_that_do_not_make_minibatches_are_refused(call, tmp_path, flags, words):
    code, out, err = call(*flags.split())
    assert_refused(code, err, *words)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_minibatches_of_one_sample_are_fine_without_advantage_normalization(call, tmp_path):
    flags = (*PENDULUM, "--num-steps", 4, "--num-minibatches", 4, "--update-epochs", 1, "--total-timesteps", 8)
    assert call(*flags, "--no-norm-adv", "--run-dir", "run")[0] == 0
    assert read_result(tmp_path / "run")["total_timesteps"] == 8


def test_cuda_flag_is_refused_without_a_cuda_device(call, tmp_path):
    code, _, err = call("--cuda")
    assert_refused(code, err, "--cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag, package", [("--capture-video", "moviepy"), ("--track", "wandb")])
def test_flag_whose_package_is_missing_names_the_package(script, call, monkeypatch, tmp_path, flag, package):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    code, _, err = call(flag)
    assert_refused(code, err, flag, f"pip install {package}")
    assert list(tmp_path.iterdir()) == []


def test_videos_of_a_saved_model_need_moviepy_too(script, finished, call, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    before = snapshot(finished[0])
    code, _, err = call("--evaluate", finished[0] / "run", "--capture-video")
    assert_refused(code, err, "--capture-video", "pip install moviepy")
    assert snapshot(finished[0]) == before


def test_result_names_the_versions_of_what_is_installed(script, call, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "PACKAGES", ("torch", "no-such-package"))
    flags = (*PENDULUM, *small(script), "--total-timesteps", 32, "--run-dir", "run")
    assert call(*flags)[0] == 0
    versions = {"torch": version("torch"), "python": platform.python_version()}
    assert read_result(tmp_path / "run")["versions"] == versions


WANDB = """
import json
from pathlib import Path

def init(config, **other):
    with Path("tracked").open("a") as file:
        file.write(json.dumps({"config": config, "id": other["id"], "name": other["name"]}) + "\\n")
    return Run()

class Run:
    def log(self, metrics, step):
        assert metrics and step > 0

    def finish(self):
        Path("finished").open("a").write("x")
"""


def test_every_seed_of_a_batch_is_tracked_as_itself(script, call, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    flags = ("--total-timesteps", 32, "--seed", 4, "--num-seeds", 2, "--track", "--run-dir", "run")
    assert call(*PENDULUM, *small(script), *flags)[0] == 0
    monkeypatch.delitem(sys.modules, "wandb")
    tracked = [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]
    assert [(t["name"], t["config"]["seed"], t["config"]["num_seeds"]) for t in tracked] == [
        ("seed4", 4, 1),
        ("seed5", 5, 1),
    ]
    assert len({t["id"] for t in tracked}) == 2 and (tmp_path / "finished").read_text() == "xx"


def test_compile_flag_is_refused_without_a_compiler(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("--compile")
    assert_refused(code, err, "--compile", "compiler")
    assert list(tmp_path.iterdir()) == []


def test_video_of_an_environment_without_frames_is_refused(call, monkeypatch, tmp_path):
    monkeypatch.setattr(ToyEnv, "render", lambda self: None)
    code, _, err = call("--env-id", "Toy-v0", "--capture-video", "--total-timesteps", 2048)
    assert_refused(code, err, "error: --env-id Toy-v0 cannot render: drop --capture-video")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id", ["ToyBroken-v0", "ToyUnborn-v0"])
def test_a_bug_of_the_environment_keeps_its_traceback_and_the_run_its_checkpoint(script, call, tmp_path, env_id):
    flags = ("--env-id", env_id, *small(script), "--total-timesteps", 640, "--checkpoint-every", 32)
    with pytest.raises(KeyError, match="missing_key") as error:
        call(*flags, "--run-dir", "run")
    assert error.traceback[-1].name == ("step" if "Broken" in env_id else "__init__")
    if "Broken" in env_id:
        assert error.value.__notes__ == [f"to go on: python {script.SCRIPT}.py --resume run"]
        assert checkpoint_step(tmp_path / "run") == 32
    else:
        assert list(tmp_path.iterdir()) == []


def test_an_environment_without_an_episode_limit_is_cut_off_and_said_so(script, call, monkeypatch):
    monkeypatch.setattr(script, "EVAL_MAX_STEPS", 30)
    code, out, _ = call("--env-id", "ToyEndless-v0", *small(script), "--total-timesteps", 32, "--run-dir", "run")
    assert code == 0 and "evaluation: 10 episodes of ToyEndless-v0 were cut off after 30 steps\n" in out


def test_loss_that_is_not_finite_stops_the_run_with_advice(script, call, tmp_path):
    flags = ("--env-id", "Toy-v0", *small(script), "--total-timesteps", 640, "--seed", 6, "--run-dir", "run")
    code, _, err = call(*flags, "--learning-rate", 1e38)
    assert code == 1 and err.count("\n") == 1
    for word in ("step ", "Toy-v0", "seed 6", "the loss is not finite", "--learning-rate", "--beta"):
        assert word in err
    assert not (tmp_path / "run" / "result.json").exists()


@both
def test_numbers_of_the_environment_that_are_not_finite_stop_the_run_and_are_blamed_on_it(script, call, tmp_path):
    flags = ("--env-id", "ToyNaN-v0", *small(script), "--total-timesteps", 640, "--seed", 6, "--run-dir", "run")
    code, _, err = call(*flags)
    assert code == 1
    assert "Traceback" not in err and err.count("error:") == 1
    message = err.splitlines()[0]
    for word in ("step 96", "ToyNaN-v0", "seed 6", "the environment's observations or rewards are not finite"):
        assert word in message, message
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_full_disk_stops_the_run_in_one_line_and_keeps_the_last_checkpoint(script, call, tmp_path):
    flags = (*small(script), "--total-timesteps", 96, "--checkpoint-every", 32, "--run-dir", "run")
    save_checkpoint, saved = script.save_checkpoint, []

    def save_until_full(*args):
        saved.append(args)
        with largest_file(1000) if len(saved) > 1 else nullcontext():
            save_checkpoint(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_until_full)
        code, _, err = call(*PENDULUM, *flags)
    assert code == 1 and "Traceback" not in err
    error, hint = err.splitlines()
    assert error == "error: [Errno 27] File too large" and hint.endswith("--resume run")
    assert checkpoint_step(tmp_path / "run") == 32 and not list(tmp_path.rglob("*.tmp"))
    assert call("--resume", "run")[0] == 0
    assert read_result(tmp_path / "run")["total_timesteps"] == 96


LEARN = {
    "sppo_continuous_discretized": "--num-envs 4 --num-steps 128 --num-minibatches 8 --learning-rate 1e-3",
    "sa2c_continuous_discretized": "--learning-rate 2e-3",
}


@both
def test_short_run_learns_to_balance_the_pendulum(script, call, tmp_path):
    flags = ("--env-id", "InvertedPendulum-v4", "--total-timesteps", 20_480, "--run-dir", "run")
    assert call(*flags, *LEARN[script.SCRIPT].split())[0] == 0
    assert (
        read_result(tmp_path / "run")["eval_mean"] > 150
    )  # untrained: 31 at most over 30 seeds; with the sign of the loss flipped: 3


def test_progress_on_a_terminal_is_one_line_that_ends_with_the_run(script, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = script.Progress(100, "step")
    progress.last = -1e9
    progress.show(25, 0.0, "return 1.0")  # before the first iteration that is timed
    assert capsys.readouterr().out.endswith("return 1.0  ? left\x1b[K")
    progress.last = -1e9
    progress.show(50, 10.0, "return 1.0")
    assert capsys.readouterr().out == "\r 50%  step 50  return 1.0  0:00:05 left\x1b[K"
    progress.show(100, 10.0, "return 1.0")
    assert capsys.readouterr().out.endswith("0:00:00 left\x1b[K\n")
