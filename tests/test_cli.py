"""The continuous scripts through their command line: output, determinism, survival, bad input, learning."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, largest_file, read_checkpoint
from pausing import interrupt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "learning_rate", "SPS")}
TAGS |= {f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "grad_norm", "explained_variance")}
TAGS |= {"eval/episodic_return"}
SPPO_TAGS = TAGS | {"losses/approx_kl", "losses/clipfrac", "losses/sign_flips"}
RESULT_KEYS = {"script", "env_id", "seed", "args", "total_timesteps", "eval_returns", "eval_mean", "train_last10_mean"}
RESULT_KEYS |= {"sps", "wall_seconds", "versions", "commit", "device"}
PENDULUM = ("--env-id", "InvertedDoublePendulum-v4")
SPPO_UPDATE = ("--num-minibatches", "4", "--update-epochs", "2")
both = pytest.mark.parametrize("script", CONTINUOUS, indirect=True)
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

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        code = 0
        try:
            assert script.main() is None
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


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


def in_bash(command, cwd):
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True)


def read_curves(run_dir):
    with (run_dir / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def steps(run_dir):
    return [int(row["global_step"]) for row in read_curves(run_dir)]


def curve_points(run_dir):
    """{tag: [(step, value)]} of curves.csv"""
    rows = read_curves(run_dir)
    points = {tag: [(int(r["global_step"]), float(r[tag])) for r in rows if r[tag]] for tag in rows[0]}
    return {tag: p for tag, p in points.items() if p and tag != "global_step"}


def event_points(run_dir):
    """{tag: [(step, value)]} of the TensorBoard events"""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_curves_are_those_of_tensorboard(run_dir):
    curves, events = curve_points(run_dir), event_points(run_dir)
    assert curves.keys() == events.keys()
    for tag, points in curves.items():
        assert [step for step, _ in points] == [step for step, _ in events[tag]], tag
        np.testing.assert_allclose([v for _, v in points], [v for _, v in events[tag]], rtol=1e-5, err_msg=tag)


def read_result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def returns_text(result):
    returns = " ".join(f"{r:.1f}" for r in result["eval_returns"])
    return f"seed {result['seed']}: {result['eval_mean']:.1f} ({returns})"


def checkpoint_step(run_dir):
    return read_checkpoint(run_dir)["progress"]["global_step"]


def snapshot(directory):
    """{path: (content, modification time)} of everything below directory"""
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in directory.rglob("*")}


def assert_refused(code, err, *words):
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


FINISHED = (*PENDULUM, "--total-timesteps", "5000", "--seed", "3")


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory):
    """(working directory, stdout, stderr) of a run that has ended; its directory is "run"."""
    cwd = tmp_path_factory.mktemp("finished")
    code, out, err = run_script(script, cwd, *FINISHED, *small(script, 256), "--eval-every", 2048, "--run-dir", "run")
    assert code == 0, err
    return cwd, out, err


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run, killed before its result was written."""
    run_dir = shutil.copytree(finished[0] / "run", tmp_path / "run")
    (run_dir / "result.json").unlink()
    return run_dir


def test_finished_run_leaves_the_agreed_files_and_nothing_else(finished):
    cwd, _, err = finished
    assert err == ""
    assert [p.name for p in cwd.iterdir()] == ["run"]
    names = {p.name for p in (cwd / "run").iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {"args.json", "checkpoint.pt", "model.safetensors", "curves.csv", "result.json"}


def test_finished_run_has_said_where_it_is_how_it_went_and_what_came_out(script, finished):
    cwd, out, _ = finished
    result, lines = read_result(cwd / "run"), out.splitlines()
    progress = [line for line in lines if "%" in line]
    assert 1 <= len(progress) <= 1 + result["wall_seconds"] / 10  # seldom, and in any case the end
    first, *evaluations, last = [line for line in lines if line not in progress]
    command = f"{sys.executable} {script.__file__} --resume {cwd}/run"
    assert first == f"run directory {cwd}/run; if it stops, continue with: {command}"
    assert evaluations[::2] == [
        f"evaluation, {x}: 10 episodes of every agent" for x in ("step2048", "step4096", "final")
    ]
    assert all(line.startswith("seed 3: ") for line in evaluations[1::2])
    assert evaluations[-1] == returns_text(result)
    number = r"[\d,.]+"
    end = rf"100%  step 5,120  return {number}  {number} steps/s per agent  0:00:00 left"
    assert re.fullmatch(end, progress[-1]) and f"  {result['sps']:,.0f} steps/s" in progress[-1]
    assert last == f"everything is in {cwd}/run"


def test_result_has_the_agreed_keys_and_total_rounds_up_to_whole_rollouts(script, finished):
    run_dir = finished[0] / "run"
    result = read_result(run_dir)
    assert set(result) == RESULT_KEYS
    assert (result["script"], result["env_id"], result["seed"]) == (script.SCRIPT, "InvertedDoublePendulum-v4", 3)
    assert result["args"] == json.loads((run_dir / "args.json").read_text())["args"]
    assert result["args"]["total_timesteps"] == 5000 and result["args"]["num_seeds"] == 1
    assert result["total_timesteps"] == 5120
    assert len(result["eval_returns"]) == 10 and all(isinstance(r, float) for r in result["eval_returns"])
    assert len(set(result["eval_returns"])) == 10
    assert result["eval_mean"] == pytest.approx(np.mean(result["eval_returns"]))
    assert 20 < result["train_last10_mean"] < 10_000
    assert result["sps"] > 100 and result["wall_seconds"] > (5120 - 512) / result["sps"]
    assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu"


def test_curves_hold_the_same_values_as_tensorboard_and_the_last_step_once(script, finished):
    run_dir = finished[0] / "run"
    assert set(curve_points(run_dir)) == SPPO_TAGS
    assert steps(run_dir) == [2048, 4096, 5120]
    assert_curves_are_those_of_tensorboard(run_dir)
    evaluations = curve_points(run_dir)["eval/episodic_return"]
    assert [step for step, _ in evaluations] == [2048, 4096, 5120]
    assert evaluations[-1][1] == pytest.approx(read_result(run_dir)["eval_mean"], rel=1e-5)


def test_evaluate_repeats_the_final_evaluation(script, finished, call, monkeypatch):
    run_dir, evaluate, seen = finished[0] / "run", script.evaluate, []
    monkeypatch.setattr(script, "evaluate", lambda *inputs: seen.append(evaluate(*inputs)) or seen[-1])
    result, before = read_result(run_dir), snapshot(finished[0])
    said = f"evaluation, final: 10 episodes of every agent\n{returns_text(result)}\n"
    assert call("--evaluate", run_dir) == (0, said, "")
    assert call("--evaluate", run_dir / "model.safetensors") == (0, said, "")
    assert [returns.tolist() for returns in seen] == [[result["eval_returns"]]] * 2
    assert snapshot(finished[0]) == before


def test_saved_model_is_enough_to_act_with_numpy_alone(script, finished):
    run_dir = finished[0] / "run"
    with safe_open(run_dir / "model.safetensors", "numpy") as file:
        metadata, model = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    args = json.loads(metadata["args"])
    assert metadata["script"] == script.SCRIPT and args == read_result(run_dir)["args"]
    env = script.make_env(args["env_id"])
    bins = np.linspace(env.action_space.low, env.action_space.high, args["num_bins"])
    returns = []
    for seed in np.random.SeedSequence([args["seed"], script.EVALUATION]).generate_state(10).tolist():
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


def test_same_seed_gives_the_same_run_with_or_without_evaluations_and_another_seed_does_not(
    script, finished, call, tmp_path
):
    assert call(*FINISHED, *small(script, 256), "--run-dir", "same")[0] == 0
    assert call(*FINISHED, *small(script, 256), "--seed", 4, "--total-timesteps", 2048, "--run-dir", "other")[0] == 0

    def outcome(run_dir):
        rows = read_curves(run_dir)
        for row in rows:
            del row["charts/SPS"], row["eval/episodic_return"]
        return rows, read_result(run_dir)["eval_returns"]

    expected, same, other = (outcome(d) for d in (finished[0] / "run", tmp_path / "same", tmp_path / "other"))
    assert same == expected
    assert other[0][0] != expected[0][0] and not set(other[1]) & set(expected[1])
    model, again = (load_file(d / "model.safetensors") for d in (finished[0] / "run", tmp_path / "same"))
    assert model.keys() == again.keys() and all(torch.equal(model[key], again[key]) for key in model)


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


def test_box2d_run_records_a_playable_video(script, call, tmp_path):
    flags = ("--env-id", "LunarLanderContinuous-v3", *small(script, 64), "--total-timesteps", "250")
    code, _, err = call(*flags, "--run-dir", "run", "--capture-video")
    assert (code, err) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert read_result(tmp_path / "run")["total_timesteps"] == 256
    (video,) = (tmp_path / "run" / "videos" / "final").rglob("*.mp4")
    frames = list(imageio.get_reader(video).iter_data())
    assert len(frames) > 40 and frames[0].shape == (400, 600, 3)
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.parametrize("env_id", TABLE_6)
def test_every_environment_of_table_6_trains(script, call, monkeypatch, tmp_path, env_id):
    make_env = script.make_env
    monkeypatch.setattr(script, "make_env", lambda *a: gym.wrappers.TimeLimit(make_env(*a), 12))
    flags = ("--env-id", env_id, *small(script), "--total-timesteps", 64, "--eval-episodes", 1)
    code, _, err = call(*flags, "--run-dir", "run")
    assert (code, err) == (0, "")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in model.values())
    assert np.isfinite(read_result(tmp_path / "run")["eval_returns"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("env_id, obs_dim", [("Toy-v0", 3 + 4), ("ToySwitches-v0", 4 + 2), ("ToyPlain-v0", 3 + 4)])
def test_flattened_observations_matrices_of_actions_and_no_render_mode_work(script, call, tmp_path, env_id, obs_dim):
    code, out, err = call("--env-id", env_id, *small(script), "--total-timesteps", 128, "--run-dir", "run")
    assert (code, err) == (0, "")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert model["obs_mean"].shape == (obs_dim,) and model["actor.4.bias"].shape == (1, 2 * 3 * 11)
    code, again, _ = call("--evaluate", "run")
    assert code == 0 and again in out and again.endswith(f"{returns_text(read_result(tmp_path / 'run'))}\n")


@pytest.fixture(scope="session")
def survivor(script, tmp_path_factory):
    """A run stopped three times and resumed to its end, with what was seen on the way. Every rollout gets a row."""
    cwd = tmp_path_factory.mktemp("survivor")
    run_dir = cwd / "run"
    flags = (*PENDULUM, *small(script, 128), "--total-timesteps", 2048, "--run-dir", "run")
    resume = ("--resume", "run")
    seen = {"run_dir": run_dir}

    # Killed with a row past the checkpoint, then in the middle of another row:
    code, _ = interrupt(script, cwd, flags, "save_checkpoint", 3, signal.SIGKILL)
    assert code == -signal.SIGKILL and checkpoint_step(run_dir) == 512 and steps(run_dir) == [256, 512, 768]
    seen["kept"] = read_curves(run_dir)[:2]
    with (run_dir / "curves.csv").open("a") as file:
        file.write("2")

    # Ctrl-C in the second rollout from there:
    seen["ctrl_c"] = interrupt(script, cwd, resume, "gae", 2, signal.SIGINT)
    assert checkpoint_step(run_dir) == 768
    seen["kept"] += read_curves(run_dir)[2:]

    # Killed in the final evaluation:
    interrupt(script, cwd, resume, "evaluate", 1, signal.SIGKILL)
    assert (run_dir / "model.safetensors").exists() and not (run_dir / "result.json").exists()
    assert checkpoint_step(run_dir) == 1792

    command = shlex.join([sys.executable, script.__file__, *resume])
    seen["end"] = in_bash(f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}", cwd)
    return seen


def test_run_killed_at_any_moment_resumes_to_the_same_total_though_nobody_reads_its_output(survivor):
    done = survivor["end"]
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    result = read_result(survivor["run_dir"])
    assert result["total_timesteps"] == 2048 and len(result["eval_returns"]) == 10
    assert [p.name for p in survivor["run_dir"].parent.iterdir()] == ["run"]


def test_resumed_run_keeps_its_rows_and_writes_no_step_twice(survivor):
    rows = read_curves(survivor["run_dir"])
    kept = [{tag: row[tag] for tag in old} for row, old in zip(rows, survivor["kept"])]
    assert kept == survivor["kept"] and len(kept) == 3  # of the checkpoints; a later tag adds a column
    assert steps(survivor["run_dir"]) == list(range(256, 2049, 256))


def test_tensorboard_of_a_resumed_run_has_every_row_of_its_curves(survivor):
    assert_curves_are_those_of_tensorboard(survivor["run_dir"])


def test_ctrl_c_ends_in_one_line(survivor):
    assert survivor["ctrl_c"] == (130, "error: stopped\n")


def test_a_row_is_in_the_files_when_write_returns_and_a_new_tag_gets_a_column(script, tmp_path):
    log = script.RunLog(str(tmp_path / "run"), 0)
    for step in range(1, 6):
        tags = ["charts/a", "charts/b"] if step > 3 else ["charts/a"]
        log.write(step, {tag: float(step) for tag in tags})
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / f"copy{step}"))
        for points in (event_points(copy), curve_points(copy)):
            assert {tag: p[-1] for tag, p in points.items()} == {tag: (step, step) for tag in tags}
    log.writer.close()
    assert (tmp_path / "run/curves.csv").read_text().splitlines()[:2] == ["global_step,charts/a,charts/b", "1,1,"]


def test_kill_before_the_result_costs_no_second_evaluation(script, finished, unfinished, call, monkeypatch):
    monkeypatch.setattr(script, "evaluate", None)
    before = snapshot(unfinished)
    assert call("--resume", unfinished)[0] == 0
    result, expected = read_result(unfinished), read_result(finished[0] / "run")
    assert result.pop("args") == expected.pop("args") | {"run_dir": str(unfinished)}
    assert expected.pop("versions").items() <= result.pop("versions").items()  # other tests may have imported Box2D
    assert result == expected
    rewritten = {unfinished / "model.safetensors"}  # with the name of this run directory
    after, kept = snapshot(unfinished), {p for p in before if "events" not in p.name} - rewritten
    assert {p: after[p][0] for p in kept} == {p: before[p][0] for p in kept}


def flat(tree):
    """Leaves of nested dicts and lists, as {path: leaf}"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {"": tree}
    return {f"{key}/{path}": leaf for key, value in items for path, leaf in flat(value).items()}


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts may catch it."""


@both
def test_round_trip_through_a_checkpoint_is_exact(script, call, monkeypatch, tmp_path):
    """With environments that have no state a resumed run trains what one without a stop does, bit for bit."""

    class Stateless(script.Envs):
        def reset(self, seeds, *stream):
            self.t = 0 if seeds else self.t
            return np.ones((*self.shape, self.obs_dim))

        def step(self, actions):
            self.t += 1
            ends, obs = np.ones(self.shape, bool), self.reset(None)
            if self.t % 16:  # the rollout has not ended
                obs[..., 0] = actions.sum(-1)
            return obs, actions.mean(-1), ends, ends, obs

    class Normalizer(script.Normalizer):
        started = False

        def count(self, obs):  # not the observations of the reset, which a resumed run has once more
            if self.started:
                super().count(obs)
            self.started = True

    monkeypatch.setattr(script, "Envs", Stateless)
    monkeypatch.setattr(script, "Normalizer", Normalizer)
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros((2, 10)))
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    flags = ("--env-id", "Toy-v0", *small(script), "--total-timesteps", 128, "--num-seeds", 2, "--anneal-lr")
    assert call(*flags, "--reward-noise-std", 0.1, "--run-dir", "unbroken")[0] == 0
    gae, calls = script.gae, []

    def dying(*inputs):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return gae(*inputs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "gae", dying)
        call(*flags, "--reward-noise-std", 0.1, "--run-dir", "killed")
    assert checkpoint_step(tmp_path / "killed") == 64
    assert call("--resume", "killed")[0] == 0
    unbroken, resumed = (flat(read_checkpoint(tmp_path / name)) for name in ("unbroken", "killed"))
    assert unbroken.keys() == resumed.keys() and len(unbroken) > 40
    for path in unbroken.keys() - {"progress/sps/", "progress/wall_seconds/"}:
        a, b = unbroken[path], resumed[path]
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def test_checkpoint_holds_parameters_statistics_and_progress_of_the_run(script, finished):
    run_dir = finished[0] / "run"
    checkpoint, result, model = read_checkpoint(run_dir), read_result(run_dir), load_file(run_dir / "model.safetensors")
    progress = checkpoint["progress"]
    assert progress["global_step"] == 5120 and len(progress["generators"]) == 1
    for key in ("sps", "wall_seconds"):
        assert progress[key] == result[key]
    assert progress["eval_returns"] == [result["eval_returns"]]
    assert np.mean(progress["last_returns"][0]) == pytest.approx(result["train_last10_mean"])
    assert checkpoint["agent"].keys() == model.keys() - {"obs_mean", "obs_var"}
    assert all(torch.equal(checkpoint["agent"][key][0], model[key]) for key in checkpoint["agent"])
    for key in ("obs_mean", "obs_var"):
        assert torch.equal(checkpoint["normalizer"][key][0, 0], model[key])


def test_resume_of_a_finished_run_says_so_and_changes_nothing(finished, call):
    run_dir = finished[0] / "run"
    before = snapshot(finished[0])
    said = f"{run_dir} has finished; --evaluate plays its final evaluation again\n"
    assert call("--resume", run_dir) == (0, said, "")
    assert snapshot(finished[0]) == before


def change_script(path, name):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"script": name}))


FOREIGN = {
    "args of another script": (lambda d: change_script(d / "args.json", "sppo_atari"), "is of sppo_atari, not of"),
    "no args": (lambda d: (d / "args.json").unlink(), "cannot be opened as a run directory: No such file"),
    "version 1": (lambda d: torch.save({"learner": {}}, d / "checkpoint.pt"), "was written by version 1 of"),
    "version 2": (lambda d: torch.save({"version": 2}, d / "checkpoint.pt"), "was written by version 2 of"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_resume_refuses_what_is_no_run_of_this_script(unfinished, call, kind):
    damage, words = FOREIGN[kind]
    damage(unfinished)
    before = snapshot(unfinished.parent)
    code, _, err = call("--resume", unfinished)
    assert_refused(code, err, str(unfinished), words)
    assert snapshot(unfinished.parent) == before


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def checkpoint_of_another_network(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["agent"]["actor.0.weight"] = torch.zeros(1, 3, 64)
    torch.save(checkpoint, path)


DAMAGE = {
    "args": (lambda d: truncate(d / "args.json"), json.JSONDecodeError, "delimiter|Unterminated|Expecting"),
    "checkpoint": (lambda d: truncate(d / "checkpoint.pt"), RuntimeError, "zip archive"),
    "network": (
        lambda d: checkpoint_of_another_network(d / "checkpoint.pt"),
        RuntimeError,
        "size mismatch for actor.0",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_resume_of_a_damaged_run_raises_what_the_library_says_and_changes_nothing(unfinished, call, kind):
    damage, error, words = DAMAGE[kind]
    damage(unfinished)
    before = snapshot(unfinished.parent)
    with pytest.raises(error, match=words):
        call("--resume", unfinished)
    assert snapshot(unfinished.parent) == before


FLAGS = [
    ("--resume run --seed 5", "--resume takes its arguments from the run: drop --seed"),
    ("--resume run --num-bins 12 --gae_lambda=0.9 --compile", "drop --compile, --gae-lambda, --num-bins"),
    ("--resume run --run-dir new", "drop --run-dir"),
    ("--resume missing", "missing cannot be opened as a run directory: No such file"),
    ("--run-dir run", "/run is in use: name another, or try --resume /"),
    ("--run-dir run/args.json", "run/args.json cannot be opened as a run directory: File exists"),
    ("--run-dir run/args.json/new", "run/args.json/new cannot be opened as a run directory: Not a directory"),
    ("--evaluate run --seed 5", "--evaluate takes its arguments from the run: drop --seed"),
    ("--evaluate run --resume run", "--resume takes its arguments from the run: drop --evaluate"),
    ("--evaluate run --compile --reward-noise-std 0.05", "drop --compile, --reward-noise-std"),
    ("--evaluate missing", "--evaluate missing: no such .safetensors file"),
    ("--evaluate run/checkpoint.pt", "--evaluate run/checkpoint.pt: no such .safetensors file"),
    ("--evaluate .", "--evaluate model.safetensors: no such .safetensors file."),
]


@pytest.mark.parametrize("flags, words", FLAGS)
def test_resume_run_dir_and_evaluate_refuse_what_they_cannot_honour(unfinished, call, flags, words):
    before = snapshot(unfinished.parent)
    code, out, err = call(*flags.split())
    assert_refused(code, err, words)
    assert out == ""
    assert snapshot(unfinished.parent) == before


def model_of_a_missing_environment(path, good):
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    args = metadata["args"].replace("InvertedDoublePendulum-v4", "NotInstalled-v0")
    save_file(load_file(good), path, metadata | {"args": args})


def model_with(path, good, **tensors):
    with safe_open(good, "pt") as file:
        save_file(load_file(good) | tensors, path, file.metadata())


MODELS = {  # the last three are damaged: the library says how
    "no metadata": (lambda path, good: save_file(load_file(good), path), "is of something else, not of"),
    "another script": (
        lambda path, good: save_file(load_file(good), path, {"script": "sppo_atari", "args": "{}"}),
        "is of sppo_atari, not of",
    ),
    "environment that is not installed": (model_of_a_missing_environment, "--env-id NotInstalled-v0: "),
    "truncated": (lambda path, good: path.write_bytes(good.read_bytes()[:-1000]), SafetensorError),
    "another observation size": (
        lambda path, good: model_with(path, good, obs_mean=torch.zeros(4)),
        RuntimeError,
    ),
    "another network": (
        lambda path, good: model_with(path, good, **{"actor.0.bias": torch.zeros(1, 32)}),
        RuntimeError,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_evaluate_plays_nothing_that_is_no_model_of_this_script(finished, call, tmp_path, kind):
    damage, expected = MODELS[kind]
    damage(tmp_path / "model.safetensors", finished[0] / "run" / "model.safetensors")
    before = snapshot(tmp_path)
    if isinstance(expected, str):
        code, out, err = call("--evaluate", tmp_path / "model.safetensors")
        assert_refused(code, err, expected)
        assert out == ""
    else:
        with pytest.raises(expected):
            call("--evaluate", tmp_path / "model.safetensors")
    assert snapshot(tmp_path) == before


# What breaks each of RULES, and how it looks with its values.
BROKEN_RULES = {
    "--num-seeds >= 1": ("--num-seeds 0", "0 >= 1"),
    "--num-envs >= 1": ("--num-envs 0", "0 >= 1"),
    "--num-steps >= 1": ("--num-steps 0", "0 >= 1"),
    "--num-minibatches >= 1": ("--num-minibatches 0", "0 >= 1"),
    "--update-epochs >= 1": ("--update-epochs 0", "0 >= 1"),
    "--num-threads >= 1": ("--num-threads 0", "0 >= 1"),
    "--num-bins >= 2": ("--num-bins 1", "1 >= 2"),
    "--eval-every >= 0": ("--eval-every -1", "-1 >= 0"),
    "0 <= --seed < 2**63": (f"--seed {2**63}", f"0 <= {2**63} < 2**63"),
    "0 <= --gamma <= 1": ("--gamma 1.01", "0 <= 1.01 <= 1"),
    "0 <= --gae-lambda <= 1": ("--gae-lambda -0.1", "0 <= -0.1 <= 1"),
    "0 < --alpha < inf": ("--alpha 0", "0 < 0.0 < inf"),
    "0 <= --beta < inf": ("--beta nan", "0 <= nan < inf"),
    "-inf < --Z < 0": ("--Z 0", "-inf < 0.0 < 0"),
    "0 <= --reward-noise-std < inf": ("--reward-noise-std -0.05", "0 <= -0.05 < inf"),
    "0 < --learning-rate < inf": ("--learning-rate 0", "0 < 0.0 < inf"),
    "0 < --clip-coef < inf": ("--clip-coef 0", "0 < 0.0 < inf"),
    "0 <= --ent-coef < inf": ("--ent-coef inf", "0 <= inf < inf"),
    "0 <= --vf-coef < inf": ("--vf-coef -1", "0 <= -1.0 < inf"),
    "0 < --max-grad-norm < inf": ("--max-grad-norm 0", "0 < 0.0 < inf"),
    "--num-envs * --num-steps % --num-minibatches == 0": ("--num-envs 1 --num-steps 100", "1 * 100 % 32 == 0"),
    "--num-envs * --num-steps > --num-minibatches or not --norm-adv": (
        "--num-envs 1 --num-steps 32",
        "1 * 32 > 32 or not True",
    ),
    "--eval-episodes >= 1": ("--eval-episodes 0", "0 >= 1"),
    "--num-envs * --num-steps <= --total-timesteps <= 10**12": (
        "--total-timesteps 63 --num-envs 2 --num-steps 32",
        "2 * 32 <= 63 <= 10**12",
    ),
}


@both
def test_an_argument_that_breaks_a_rule_is_refused_in_one_line_before_anything_is_written(script, call, tmp_path):
    rules = script.RULES.strip().replace("\n", ", ").split(", ")
    assert set(rules) == set(BROKEN_RULES) if script.SCRIPT.startswith("sppo") else set(rules) < set(BROKEN_RULES)
    for rule in rules:
        flags, values = BROKEN_RULES[rule]
        assert call(*flags.split()) == (2, "", f"error: {rule} must hold, and {values} does not\n")
    assert list(tmp_path.iterdir()) == []


BAD_INPUT = [
    ("--env-id HalfCheeta-v4", "--env-id HalfCheeta-v4: ", "HalfCheetah"),
    ("--env-id Nothing-v0", "--env-id Nothing-v0: "),
    ("--env-id nopackage:Nothing-v0", "--env-id nopackage:Nothing-v0: ", "nopackage"),
    ("--env-id ../x:Nothing-v0", "not of the form module:Id-v0"),
    ("--env-id CartPole-v1", "--env-id", "Discrete(2)"),
    ("--env-id ToyInfinite-v0", "--env-id", "finite bounds", "inf"),
    ("--beta -1", "0 <= --beta < inf must hold"),
    ("--alpha nan", "0 < --alpha < inf must hold"),
    ("--Z 1", "-inf < --Z < 0 must hold"),
    ("--seed -1", "0 <= --seed < 2**63 must hold"),
    ("--cuda", "--cuda needs a CUDA device"),
    ("--env-id Toy-v0 --capture-video", "--capture-video: Toy-v0 cannot be rendered"),
]


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in BAD_INPUT])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(call, monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(ToyEnv, "render", lambda self: None)
    code, out, err = call(*flags.split())
    assert_refused(code, err, *words)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_minibatches_of_one_sample_are_fine_without_advantage_normalization(script, call, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "PACKAGES", ("torch", "no-such-package"))  # one that was not imported
    flags = (*PENDULUM, "--num-steps", 4, "--num-minibatches", 4, "--update-epochs", 1, "--total-timesteps", 8)
    assert call(*flags, "--no-norm-adv", "--run-dir", "run")[0] == 0
    result = read_result(tmp_path / "run")
    assert result["total_timesteps"] == 8
    versions = {"torch": version("torch"), "python": sys.version.split()[0]}
    assert result["versions"] == versions  # of what is installed


@pytest.mark.parametrize("evaluated", [False, True])
def test_videos_need_moviepy(script, finished, call, monkeypatch, evaluated):
    before = snapshot(finished[0])
    monkeypatch.setattr(script.metadata, "distributions", lambda name: [])
    code, _, err = call(*(("--evaluate", finished[0] / "run") if evaluated else ()), "--capture-video")
    assert_refused(code, err, "--capture-video needs moviepy: pip install moviepy")
    assert snapshot(finished[0]) == before


WANDB = """
import json
from pathlib import Path

def init(**settings):
    assert not list(Path(settings["dir"]).rglob("events*"))  # TensorBoard is listened to from its beginning
    with Path("tracked").open("a") as file:
        file.write(json.dumps(settings))
"""


def test_runs_are_tracked_through_their_tensorboard_files(script, call, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    flags = ("--env-id", "Toy-v0", *small(script), "--total-timesteps", 32, "--num-seeds", 2, "--track")
    (tmp_path / "wandb").mkdir()  # as runs without the package leave it: no package
    assert_refused(*call(*flags, "--run-dir", "run")[::2], "--track needs wandb: pip install wandb")
    (tmp_path / "wandb").rmdir()
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "wandb-1.0.dist-info").mkdir()
    (tmp_path / "wandb-1.0.dist-info/METADATA").write_text("Name: wandb")
    importlib.invalidate_caches()
    assert call(*flags, "--run-dir", "run")[0] == 0
    monkeypatch.delitem(sys.modules, "wandb")
    args = json.loads((tmp_path / "run/args.json").read_text())["args"]
    expected = {"dir": f"{tmp_path}/run", "config": args, "sync_tensorboard": True, "resume": "auto"}
    expected["reinit"] = "finish_previous"  # without it, a second run() in a process is written into the first one's
    assert json.loads((tmp_path / "tracked").read_text()) == expected


@pytest.mark.parametrize("env_id", ["ToyBroken-v0", "ToyUnborn-v0"])
def test_a_bug_of_the_environment_keeps_its_traceback_and_the_run_its_checkpoint(
    script, call, monkeypatch, tmp_path, env_id
):
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    with pytest.raises(KeyError, match="missing_key") as error:
        call("--env-id", env_id, *small(script), "--total-timesteps", 640, "--run-dir", "run")
    assert error.traceback[-1].name == ("step" if "Broken" in env_id else "__init__")
    if "Broken" in env_id:
        assert checkpoint_step(tmp_path / "run") == 32
    else:
        assert list(tmp_path.iterdir()) == []


def test_an_environment_without_an_episode_limit_is_cut_off_and_said_so(script, call, monkeypatch):
    monkeypatch.setattr(script, "EVAL_MAX_STEPS", 30)
    code, out, _ = call("--env-id", "ToyEndless-v0", *small(script), "--total-timesteps", 32, "--run-dir", "run")
    assert code == 0 and "evaluation: 10 episodes of ToyEndless-v0 were cut off after 30 steps\n" in out


@both
@pytest.mark.parametrize("env_id", ["Toy-v0", "ToyNaN-v0"])
def test_numbers_that_are_not_finite_stop_the_run_and_are_blamed_on_who_made_them(script, call, tmp_path, env_id):
    flags = ("--env-id", env_id, *small(script), "--total-timesteps", 640, "--seed", 6, "--run-dir", "run")
    if env_id == "Toy-v0":
        flags, step = (*flags, "--learning-rate", 1e38), r"\d+"
        reason = r"the loss is not finite\. Try a lower --learning-rate or a lower --beta"
    else:
        step, reason = 96, "the environment's observations or rewards are not finite"
    code, _, err = call(*flags)
    expected = rf"error: seed 6 of {env_id} failed at step {step}: {reason}\n"
    assert code == 1 and re.fullmatch(expected, err), err
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_full_disk_stops_the_run_in_one_line_and_keeps_the_last_checkpoint(script, call, monkeypatch, tmp_path):
    save_checkpoint, saved = script.save_checkpoint, []

    def save_until_full(*args):
        saved.append(args)
        with largest_file(1000) if len(saved) > 1 else nullcontext():
            save_checkpoint(*args)

    monkeypatch.setattr(script, "LOG_EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_until_full)
        code, _, err = call(*PENDULUM, *small(script), "--total-timesteps", 96, "--run-dir", "run")
    assert code == 1 and err == f"error: {tmp_path}/run: [Errno 27] File too large\n"
    assert checkpoint_step(tmp_path / "run") == 32
    assert call("--resume", "run")[0] == 0
    assert read_result(tmp_path / "run")["total_timesteps"] == 96 and not list(tmp_path.rglob("*.tmp"))


LEARN = {
    "sppo_continuous_discretized": "--num-envs 4 --num-steps 128 --num-minibatches 8 --learning-rate 1e-3",
    "sa2c_continuous_discretized": "--learning-rate 2e-3",
}


@both
def test_short_run_learns_to_balance_the_pendulum(script, call, tmp_path):
    flags = ("--env-id", "InvertedPendulum-v4", "--total-timesteps", 20_480, "--run-dir", "run")
    assert call(*flags, *LEARN[script.SCRIPT].split())[0] == 0
    # Untrained: 31 at most over 30 seeds; with the sign of the loss flipped: 3.
    assert read_result(tmp_path / "run")["eval_mean"] > 150
    assert set(curve_points(tmp_path / "run")) == (SPPO_TAGS if script.SCRIPT.startswith("sppo") else TAGS)


def test_progress_says_what_is_left_as_soon_as_an_iteration_was_timed(script, call, monkeypatch):
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(script, "SHOW_EVERY", -1)
    _, out, _ = call("--env-id", "Toy-v0", *small(script), "--total-timesteps", 96, "--run-dir", "run")
    lines = [line for line in out.splitlines() if "%" in line]
    assert [line.partition("  return ")[0] for line in lines] == [" 33%  step 32", " 67%  step 64", "100%  step 96"]
    assert [re.search(r"(\?|\d:\d\d:\d\d) left$", line)[1] for line in lines] == ["?", "0:00:00", "0:00:00"]
