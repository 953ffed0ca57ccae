"""--num-seeds: each agent of a batch is the run of its seed, and what happens to one is nothing to the others."""

import io
import json
import re
import sys
from contextlib import redirect_stdout

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import import_scripts, read_checkpoint
from safetensors.torch import load_file

SEEDS = (5, 6, 7)
FLAGS = "--env-id Fragile-v0 --num-envs 2 --num-steps 16 --total-timesteps 160 --reward-noise-std 0.05"
SPPO_FLAGS = "--num-minibatches 4 --update-epochs 2"
BATCH = "--seed 5 --num-seeds 3"


class FragileEnv(gym.Env):
    """Episodes of random length, cut off after 6 steps. An environment seed in faults makes it fail, after 40 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 3]))
    faults: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.fault, self.lifetime = None, 0

    def observation(self, push=0.0):
        return self.np_random.normal(3 + push, 2, 4).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.fault = self.faults.get(seed, self.fault)
        return self.observation(), {}

    def step(self, action):
        self.lifetime += 1
        if self.fault == "step" and self.lifetime > 40:
            raise ValueError("motor burnt")
        reward = float("nan") if self.lifetime > 40 and self.fault == "nan" else float(action.sum())
        return self.observation(action.sum()), reward, bool(self.np_random.random() < 0.1), False, {}


@pytest.fixture(scope="session", params=import_scripts("*_continuous_discretized.py"))
def script(request):
    return request.param


@pytest.fixture(scope="session", autouse=True)
def fragile_env():
    gym.register("Fragile-v0", FragileEnv, max_episode_steps=6)


@pytest.fixture(autouse=True)
def no_faults():
    yield
    FragileEnv.faults.clear()


def run_main(script, *flags) -> int:
    """The exit code of main()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *(word for flag in flags for word in str(flag).split())])
        try:
            return script.main() or 0
        except SystemExit as end:
            return end.code


def train_flags(script):
    return f"{FLAGS} {SPPO_FLAGS if script.SCRIPT.startswith('sppo') else ''}"


def record(script, patch):
    """Note what main() does: for every Envs the seeds of its environments and the values that the actions have."""
    seen = []

    class Envs(script.Envs):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append({"seeds": [], "actions": []})
            self.seen = seen[-1]
            for env in self.envs:
                env.reset = lambda seed=None, reset=env.reset: (self.seen["seeds"].append(seed), reset(seed=seed))[1]
                env.step = lambda action, step=env.step: (self.seen["actions"].append(action.copy()), step(action))[1]

        def reset(self, *inputs):
            for recorded in self.seen.values():
                recorded.clear()  # of the step that is tried before training
            return super().reset(*inputs)

    patch.setattr(script, "Envs", Envs)
    patch.setattr(script, "LOG_EVERY", 32)
    return seen


def first_seeds(envs):
    return [seed for seed in envs["seeds"] if seed is not None]


@pytest.fixture(scope="session")
def runs(script, tmp_path_factory):
    """A batch of three seeds and three single runs: {"batch" or seed: (directory, environments, stdout)}."""
    top, seen = tmp_path_factory.mktemp("seeds"), {}
    for name, choice in [("batch", BATCH)] + [(seed, f"--seed {seed}") for seed in SEEDS]:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
            envs = record(script, patch)
            assert run_main(script, train_flags(script), choice, "--eval-every 96 --run-dir", top / str(name)) == 0
        seen[name] = (top / str(name), envs, out.getvalue())
    return seen


def pairs(runs):
    """(seed, its directory in the batch, directory of its single run)"""
    return [(seed, runs["batch"][0] / f"seed{seed}", runs[seed][0]) for seed in SEEDS]


def read_json(path):
    return json.loads(path.read_text())


def flat(tree):
    """Leaves of nested dicts and lists, as {path: leaf}"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {"": tree}
    return {f"{key}/{path}": leaf for key, value in items for path, leaf in flat(value).items()}


def agent_states(run_dir):
    """What the checkpoint in run_dir holds of each agent: [{path: tensor without the agent dimension}]"""
    checkpoint = read_checkpoint(run_dir)
    generators = checkpoint.pop("progress")["generators"]
    N, leaves = len(generators), flat(checkpoint)
    tensors = {path: x for path, x in leaves.items() if isinstance(x, torch.Tensor) and x.shape[:1] == (N,)}
    return [{path: x[i] for path, x in tensors.items()} | {"generator": generators[i]} for i in range(N)]


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)


def snapshot(directory):
    """Content and time of every file but TensorBoard's, whose writer may flush late when a kill was only simulated."""
    paths = [p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("events.")]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def file_names(run_dir):
    return ["events" if p.name.startswith("events.out.tfevents.") else p.name for p in run_dir.iterdir()]


def test_environments_of_a_batch_get_the_seeds_of_the_single_runs(runs):
    stages = [2, 10, 10]  # environments of an agent in training, its evaluation at step 96 and the final one
    assert len(runs["batch"][1]) == len(stages)
    for stage, envs_per_agent in enumerate(stages):
        batch = np.reshape(first_seeds(runs["batch"][1][stage]), (3, envs_per_agent))
        for i, seed in enumerate(SEEDS):
            assert batch[i].tolist() == first_seeds(runs[seed][1][stage])
    assert len({seed for envs in runs["batch"][1] for seed in first_seeds(envs)}) == 3 * sum(stages)  # none twice


def test_agents_of_a_batch_act_as_their_single_runs(runs):
    batch = np.reshape(runs["batch"][1][0]["actions"], (80, 3, 2, 2))  # the last: envs_per_agent, action_dim
    for i, seed in enumerate(SEEDS):
        np.testing.assert_array_equal(batch[:, i], np.reshape(runs[seed][1][0]["actions"], (80, 2, 2)))
    assert (batch[:, 0] != batch[:, 1]).any()


def test_agents_of_a_batch_end_in_the_state_of_their_single_runs(runs):
    states = agent_states(runs["batch"][0])
    for state, seed in zip(states, SEEDS):
        (expected,) = agent_states(runs[seed][0])
        assert state.keys() == expected.keys() and len(state) >= 12 + 12 + 4 + 1  # generator
        assert torch.equal(state["generator"], expected["generator"])
        for path in state:
            torch.testing.assert_close(state[path], expected[path], rtol=1e-4, atol=1e-6, msg=f"seed {seed} {path}")
    assert not states[0]["agent/actor.0.weight/"].allclose(states[1]["agent/actor.0.weight/"], atol=0.1)


def test_directories_of_a_batch_hold_the_results_that_single_runs_leave(script, runs):
    names = sorted(p.name for p in runs["batch"][0].iterdir())
    assert names == ["args.json", "checkpoint.pt", *(f"seed{seed}" for seed in SEEDS)]
    assert read_json(runs["batch"][0] / "args.json")["args"]["num_seeds"] == 3
    for _, ours, theirs in pairs(runs):
        assert sorted(file_names(ours)) == sorted(set(file_names(theirs)) - {"args.json", "checkpoint.pt"})
        model, expected = (load_file(d / "model.safetensors") for d in (ours, theirs))
        assert model.keys() == expected.keys()
        for name in model:
            torch.testing.assert_close(model[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_curves_of_a_batch_are_those_of_the_single_runs(runs):
    for _, ours, theirs in pairs(runs):
        rows, expected = ((d / "curves.csv").read_text().splitlines() for d in (ours, theirs))
        assert rows[0] == expected[0] and len(rows) == len(expected) == 1 + 5
        sps = rows[0].split(",").index("charts/SPS")
        for row, expected_row in zip(rows[1:], expected[1:]):
            cells, expected_cells = row.split(","), expected_row.split(",")
            del cells[sps], expected_cells[sps]
            assert [c != "" for c in cells] == [c != "" for c in expected_cells]
            values, expected_values = ([float(c) for c in r if c] for r in (cells, expected_cells))
            np.testing.assert_allclose(values, expected_values, rtol=1e-3, atol=1e-5)


def test_results_of_a_batch_are_those_of_the_single_runs(script, runs):
    for seed, ours, theirs in pairs(runs):
        result, expected = read_json(ours / "result.json"), read_json(theirs / "result.json")
        assert result.keys() == expected.keys()
        assert result["args"].pop("run_dir") == str(runs["batch"][0] / f"seed{seed}")
        assert result["args"] == {key: value for key, value in expected["args"].items() if key != "run_dir"}
        for key in ("script", "env_id", "seed", "total_timesteps", "versions"):
            assert result[key] == expected[key], key
        assert result["seed"] == seed and result["total_timesteps"] == 160
        for key in ("eval_returns", "eval_mean", "train_last10_mean"):
            np.testing.assert_allclose(result[key], expected[key], rtol=1e-6, err_msg=key)


def test_sps_of_a_batch_is_each_agents_own_in_results_and_on_the_screen(runs):
    sps = read_checkpoint(runs["batch"][0])["progress"]["sps"]
    assert [read_json(ours / "result.json")["sps"] for _, ours, _ in pairs(runs)] == [sps] * 3
    assert f"  {sps:,.0f} steps/s per agent  " in runs["batch"][2]


def test_evaluate_repeats_the_evaluation_of_each_agent_of_a_batch(script, runs, capsys, monkeypatch):
    evaluate, seen = script.evaluate, []
    monkeypatch.setattr(script, "evaluate", lambda *inputs: seen.append(evaluate(*inputs)) or seen[-1])
    for seed, ours, _ in pairs(runs):
        assert run_main(script, "--evaluate", ours) == 0
        assert seen.pop().tolist() == [read_json(ours / "result.json")["eval_returns"]]
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"seed {seed}: ") and line in runs["batch"][2].splitlines()


def test_resume_of_a_finished_batch_says_so_and_changes_nothing(script, runs, capsys):
    before = snapshot(runs["batch"][0])
    assert run_main(script, "--resume", runs["batch"][0]) == 0
    said = f"{runs['batch'][0]} has finished; --evaluate plays its final evaluation again\n"
    assert capsys.readouterr().out == said
    assert snapshot(runs["batch"][0]) == before


def random_minibatch(script):
    """Three agents' minibatches as backward() takes them, with 4 observations, 2 action dimensions and 5 bins."""
    generator = torch.Generator().manual_seed(0)
    obs, advantages, returns = (torch.randn(3, 16, *shape, generator=generator) for shape in ((4,), (), ()))
    actions = torch.randint(5, (3, 16, 2), generator=generator)
    old_logprob = [torch.full((3, 16), -2 * np.log(5))] if script.SCRIPT.startswith("sppo") else []
    return [obs, actions, *old_logprob, advantages, returns]


@pytest.mark.parametrize("what", ["parameters", "observations", "NaN observations", "advantages", "returns"])
def test_gradients_of_an_agent_do_not_depend_on_the_others(script, what):
    args = script.Args(num_bins=5)
    agent = script.Agent([torch.Generator().manual_seed(seed) for seed in SEEDS], 4, 2, 5)

    def gradients_and_losses(batch):
        losses = script.backward(agent, batch, args)
        return [p.grad for p in agent.parameters()], losses

    before, losses_before = gradients_and_losses(random_minibatch(script))
    batch = random_minibatch(script)
    with torch.no_grad():
        if what == "parameters":
            for p in agent.parameters():
                p[1] += 0.1 * torch.randn(p[1].shape)
        elif what == "NaN observations":
            batch[0][1] = torch.nan
        else:
            batch[{"observations": 0, "advantages": -2, "returns": -1}[what]][1] *= -1000
    after, losses_after = gradients_and_losses(batch)
    for i in (0, 2):
        assert all(torch.equal(a[i], b[i]) for a, b in zip(before, after))
        assert all(torch.equal(losses_before[tag][i], losses_after[tag][i]) for tag in losses_before)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(before, after))


def test_training_of_an_agent_does_not_depend_on_the_others(script, runs, monkeypatch, tmp_path):
    class Disturbed(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            with torch.no_grad():
                for p in self.parameters():
                    p[1] += 0.3

    monkeypatch.setattr(script, "Agent", Disturbed)
    assert run_main(script, train_flags(script), BATCH, "--run-dir", tmp_path / "run") == 0
    states = zip(agent_states(tmp_path / "run"), agent_states(runs["batch"][0]))
    assert [equal_states(state, undisturbed) for state, undisturbed in states] == [True, False, True]


def second_environment_of_seed_6(script, fault):
    """It fails in the third rollout."""
    FragileEnv.faults[int(np.random.SeedSequence([6, script.TRAINING, 0]).generate_state(2)[1])] = fault


def test_agent_whose_loss_is_not_finite_is_named_and_disturbs_no_other(script, runs, capsys, tmp_path):
    second_environment_of_seed_6(script, "nan")
    run_dir, error = tmp_path / "run", "error: no result of seed 6: the loss is not finite\n"
    assert run_main(script, train_flags(script), BATCH, "--run-dir", run_dir) == 1
    reason = "the environment's observations or rewards are not finite; it leaves no result"
    assert capsys.readouterr().err == f"seed 6 of Fragile-v0 failed at step 96: {reason}\n{error}"
    assert not (run_dir / "seed6/result.json").exists() and not (run_dir / "seed6/model.safetensors").exists()
    for seed in (5, 7):
        assert read_json(run_dir / f"seed{seed}/result.json")["total_timesteps"] == 160
        model, expected = (load_file(d / f"seed{seed}/model.safetensors") for d in (run_dir, runs["batch"][0]))
        assert all(torch.equal(model[name], expected[name]) for name in expected)

    before = {seed: snapshot(run_dir / f"seed{seed}").keys() for seed in SEEDS}
    assert run_main(script, "--resume", run_dir) == 1
    assert capsys.readouterr().err == error
    assert {seed: snapshot(run_dir / f"seed{seed}").keys() for seed in SEEDS} == before


def test_batch_in_which_no_agent_is_left_stops(script, capsys, tmp_path):
    assert run_main(script, train_flags(script), BATCH, "--learning-rate 1e38 --run-dir", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert all(f"seed {seed} of Fragile-v0 failed at step" in err for seed in SEEDS)
    assert re.match(r"error: seed \d of Fragile-v0 .*--learning-rate", err.splitlines()[-1])
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("model.safetensors"))


def test_environment_that_raises_keeps_its_traceback_and_the_batch_its_checkpoint(script, monkeypatch, tmp_path):
    second_environment_of_seed_6(script, "step")
    run_dir = tmp_path / "run"
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    with pytest.raises(ValueError, match="motor burnt") as error:
        run_main(script, train_flags(script), BATCH, "--run-dir", run_dir)
    assert error.traceback[-1].name == "step"
    FragileEnv.faults.clear()
    assert read_checkpoint(run_dir)["progress"]["global_step"] == 64
    assert run_main(script, "--resume", run_dir) == 0
    assert [read_json(run_dir / f"seed{seed}/result.json")["total_timesteps"] for seed in SEEDS] == [160] * 3


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts may catch it."""


@pytest.mark.parametrize("point", ["save_checkpoint", "gae"])
def test_killed_batch_resumes_to_the_same_total(script, monkeypatch, tmp_path, point):
    """Killed in the third rollout: with three rows of which two are in the checkpoint, or with two."""
    function, calls, run_dir = getattr(script, point), [], tmp_path / "run"

    def dying(*inputs):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return function(*inputs)

    envs_seen = record(script, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, point, dying)
        run_main(script, train_flags(script), BATCH, "--run-dir", run_dir)
    before = {seed: (run_dir / f"seed{seed}/curves.csv").read_text().splitlines() for seed in SEEDS}
    assert run_main(script, "--resume", run_dir) == 0
    begun, resumed, evaluated = (first_seeds(envs) for envs in envs_seen)
    assert len({*begun, *resumed, *evaluated}) == 6 + 6 + 30  # no episode is played again
    for seed, old_rows in before.items():
        assert len(old_rows) == (4 if point == "save_checkpoint" else 3)
        assert read_json(run_dir / f"seed{seed}/result.json")["total_timesteps"] == 160
        rows = (run_dir / f"seed{seed}/curves.csv").read_text().splitlines()
        columns = len(old_rows[0].split(","))  # a later tag adds one
        assert [row.split(",")[:columns] for row in rows[:3]] == [row.split(",") for row in old_rows[:3]]
        assert [int(row.split(",")[0]) for row in rows[1:]] == [32, 64, 96, 128, 160]


@pytest.mark.parametrize("script", import_scripts("*_atari.py"))
def test_no_evaluation_of_a_game_starts_where_training_did(script):
    streams = (script.TRAINING, 0), (script.TRAINING, 2048), (script.EVALUATION,), (script.EVALUATION, 2048)
    assert len({seed for stream in streams for seed in script.env_seeds(3, 10, *stream)}) == 40
