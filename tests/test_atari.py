"""sppo_atari.py and sa2c_atari.py: environments, scores, noise, update, command line."""

import json
import signal
import subprocess
import sys
from contextlib import closing, nullcontext
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import import_scripts, largest_file, read_checkpoint
from pausing import interrupt
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

SCRIPTS = import_scripts("s*_atari.py")
TABLE_11 = (
    "Alien Assault Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Gravitar Krull MsPacman "
    "NameThisGame Qbert Riverraid RoadRunner Seaquest StarGunner TimePilot UpNDown VideoPinball WizardOfWor"
).split()
sppo_atari, sa2c_atari = (param.values[0] for param in reversed(SCRIPTS))
both = pytest.mark.parametrize("script", SCRIPTS)
one = pytest.mark.parametrize("script", [sa2c_atari])  # for what SPPO's script has word for word (test_siblings.py)

gym.register_envs(ale_py)


@pytest.mark.parametrize("game", TABLE_11)
def test_games_of_table_11_step(game):
    with closing(sppo_atari.Envs(sppo_atari.Args(env_id=f"{game}NoFrameskip-v4", num_threads=1), 2)) as envs:
        obs = envs.reset([1, 2])
        rng, changed = np.random.default_rng(0), False
        for _ in range(200):
            previous = obs
            obs, *_ = envs.step(rng.integers(envs.num_actions, size=2))
            changed = changed or not np.array_equal(obs, previous)
        assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8 and changed
        with gym.make(f"{game}NoFrameskip-v4") as reference:
            assert len(envs.envs.ale.get_action_set()) == reference.action_space.n  # minimal set


def main(script, monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    script.main()


@one
def test_bfloat16_is_the_trunk_alone(script):
    """Beside a copy of the trunk whose weights are bfloat16; the rest, and every gradient, stays in float32."""
    frames = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    agent = script.Agent(6, torch.Generator().manual_seed(2), bfloat16=True)
    logits, values = agent(frames)
    features = deepcopy(agent.trunk).bfloat16()((frames / 255).bfloat16().to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, agent.actor(features.float()))
    torch.testing.assert_close(values, agent.critic(features.float())[:, 0])
    (logits.square().sum() + values.square().sum()).backward()
    assert {x.dtype for p in agent.parameters() for x in (p, p.grad)} == {logits.dtype} == {torch.float32}
    agent.bfloat16 = False
    assert 0 < (agent(frames)[0] - logits).abs().max() < 1e-3


@one
def test_bfloat16_that_is_slower_is_said(script, monkeypatch, capsys):
    for times, message in (
        ((0, 1, 2, 5), "warning: --bfloat16 makes the network 3.0 times slower here\n"),
        ((0, 2, 2, 3), ""),
    ):
        monkeypatch.setattr(script.time, "perf_counter", iter(times).__next__)
        script.warn_if_slower("cpu")
        assert capsys.readouterr().err == message


@one
def test_an_agent_of_bfloat16_is_loaded_as_one(script, tmp_path):
    args = script.Args(env_id="Pong", bfloat16=True, run_dir=str(tmp_path), cuda=False)
    with closing(script.Envs(args, 1)) as envs:
        script.save_model(args, script.Agent(envs.num_actions, torch.Generator(), True))
    assert script.load_model(tmp_path)[1].bfloat16


@one
def test_all_spellings_of_a_game_mean_the_same(script, monkeypatch):
    class Found(Exception):
        pass

    def found(args, *_):
        raise Found(args.env_id)

    monkeypatch.setattr(script, "Envs", found)
    spellings = {f"{game}NoFrameskip-v4": (game, f"{game}NoFrameskip-v4", game.lower()) for game in TABLE_11}
    spellings["MsPacmanNoFrameskip-v4"] += ("ms_pacman",)
    for env_id, names in spellings.items():
        for name in names:
            with pytest.raises(Found, match=f"^{env_id}$"):
                main(script, monkeypatch, "--env-id", name)
        for sticky in (f"ALE/{names[0]}-v5", f"{names[0]}NoFrameskip-v0"):
            with pytest.raises(Found, match=f"^{env_id}$"):
                main(script, monkeypatch, "--env-id", sticky, "--sticky-actions")


def recorded(script, folder, frame_limit=None, **options) -> SimpleNamespace:
    """Train on Breakout for a rollout; what the environments, gae(), backward() and the optimizer had and gave.

    agent is the one of the first rollout. frame_limit is that of a game, which then starts without no-ops.
    """
    seen = SimpleNamespace(steps=[], gae=[], agent=None, minibatches=[], metrics=[], clip_coefs=[], learning_rates=[])
    limit = {"max_num_frames_per_episode": frame_limit, "noop_max": 0} if frame_limit else {}
    gae, backward = script.gae, script.backward

    class Envs(script.Envs):
        def __init__(self, *inputs):
            super().__init__(*inputs, **limit)

        def step(self, actions):
            step = SimpleNamespace(must_fire=self.must_fire.copy(), actions=actions.copy())
            result = super().step(actions)
            step.obs, step.rewards, step.terminated, step.truncated, step.game_over, step.infos = deepcopy(result)
            seen.steps.append(step)
            return result

    def spy_gae(*inputs):
        names = ("rewards", "values", "dones", "last_value", "gamma", "gae_lambda")
        seen.gae.append(SimpleNamespace(**dict(zip(names, deepcopy(inputs)))))
        seen.gae[-1].advantages, returns = gae(*inputs)
        return seen.gae[-1].advantages, returns

    def spy_backward(agent, batch, *rest):
        seen.agent = seen.agent or deepcopy(agent)
        seen.minibatches.append([x.clone() for x in batch])
        seen.clip_coefs.append(rest[0].item() if len(rest) > 1 else None)
        seen.metrics.append(backward(agent, batch, *rest))
        return seen.metrics[-1]

    settings = {"num_steps": 96, "num_envs": 4, "total_timesteps": 384, "num_threads": 1} | options
    args = script.Args(**settings, run_dir=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.learning_rates.append(optimizer.param_groups[0]["lr"])
    )
    with pytest.MonkeyPatch.context() as patch, closing(Envs(args, args.num_envs)) as envs:
        for name, stub in (("gae", spy_gae), ("backward", spy_backward), ("evaluate", lambda *_: np.zeros(10))):
            patch.setattr(script, name, stub)
        script.train(args, envs)
    hook.remove()
    seen.folder = folder
    return seen


@pytest.fixture(scope="module", params=SCRIPTS)
def breakout(request, tmp_path_factory):
    """A rollout of Breakout without schedules."""
    script = request.param
    options = {"anneal_clip": False} if script is sppo_atari else {}
    options |= {"anneal_lr": False, "gamma": 0.97, "gae_lambda": 0.9}
    return script, recorded(script, tmp_path_factory.mktemp("breakout"), **options)


@pytest.fixture(scope="module", params=[sa2c_atari])
def pacman(request, tmp_path_factory):
    """A rollout of MsPacman that every game's frame limit falls into."""
    script = request.param
    return script, recorded(script, tmp_path_factory.mktemp("pacman"), frame_limit=340, env_id="MsPacman")


def epochs(script, seen) -> list[list[torch.Tensor]]:
    """What the update was given: frames, actions and so on, each epoch's in the order of its minibatches."""
    size = len(seen.minibatches) // (script.Args.update_epochs if script is sppo_atari else 1)
    parts = [seen.minibatches[i : i + size] for i in range(0, len(seen.minibatches), size)]
    return [[torch.cat(x) for x in zip(*part)] for part in parts]


def test_fire_after_a_lost_life_is_stored_with_its_own_logprob_and_as_not_chosen(breakout):
    script, seen = breakout
    forced = np.concatenate([step.actions[step.must_fire] for step in seen.steps])
    assert len(forced) > 0 and (forced == 1).all()
    _, actions, chosen, *_ = epochs(script, seen)[0]
    taken = np.concatenate([step.actions for step in seen.steps])
    assert actions.bincount().tolist() == np.bincount(taken).tolist()
    assert (chosen == 0).sum() == len(forced) and (actions[chosen == 0] == 1).all()
    if script is sa2c_atari:
        return
    # Before the first step the policy is that of the rollout: the ratio is 1 for every stored action, forced or not,
    # but for rounding, since batches differ in size. (The annealed clip range would be 0 here and count it as clipped.)
    obs, actions, chosen, old_logprob, *_ = epochs(script, seen)[0]
    with torch.no_grad():
        logprob, _ = script.logprob_and_entropy(seen.agent(obs)[0], actions)
    torch.testing.assert_close(logprob[chosen == 0], old_logprob[chosen == 0], rtol=1e-4, atol=1e-5)
    assert seen.metrics[0]["losses/approx_kl"] == pytest.approx(0, abs=1e-8)
    assert seen.metrics[0]["losses/clipfrac"] == 0


@one
def test_sampled_actions_have_the_frequencies_of_the_policy(script, tmp_path, monkeypatch):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])

    def forward(self, obs):
        zeros = 0 * sum(p.sum() for p in self.parameters()) + torch.zeros(len(obs))
        return zeros[:, None] + logits, zeros

    monkeypatch.setattr(script.Agent, "forward", forward)
    seen = recorded(script, tmp_path, num_steps=512, total_timesteps=2048)
    _, actions, chosen, *_ = epochs(script, seen)[0]
    observed = actions[chosen > 0].bincount()
    expected = logits.softmax(-1) * observed.sum()
    assert observed.sum() > 1900 and ((observed - expected) ** 2 / expected).sum() < 16.3  # 0.999 quantile, 3 degrees


def test_learning_sees_clipped_flipped_rewards_and_lost_lives(pacman, tmp_path):
    script, clean = pacman
    noisy = recorded(script, tmp_path, frame_limit=340, env_id="MsPacman", reward_flip_prob=0.1)
    free = ~np.array([step.truncated for step in clean.steps])  # of the value that the frame limit adds
    rewards, flipped = clean.gae[0].rewards[free], noisy.gae[0].rewards[free]
    assert set(np.unique(rewards)) == {0, 1}  # a pellet is worth 10
    changed = flipped != rewards
    assert np.array_equal(flipped[changed], 1 - rewards[changed])
    assert 0.05 < changed.mean() < 0.16


def test_a_lost_life_is_an_end_for_learning(breakout):
    _, seen = breakout
    ends = np.array([step.terminated for step in seen.steps])
    assert np.array_equal(seen.gae[0].dones, ends) and ends.sum() >= 4
    assert ends.sum() > sum(step.game_over.sum() for step in seen.steps)


def test_the_frame_limit_adds_the_value_of_the_final_observation(pacman):
    _, seen = pacman
    cuts = 0
    for t, step in enumerate(seen.steps):
        reward, cut = np.sign(step.rewards), step.truncated & ~step.terminated
        if cut.any():
            with torch.no_grad():
                reward = reward + 0.99 * seen.agent(torch.from_numpy(step.infos["final_obs"]))[1].numpy() * cut
            assert seen.gae[0].dones[t][cut].all() and np.abs(reward[cut]).max() > 1e-3
            cuts += cut.sum()
        np.testing.assert_allclose(seen.gae[0].rewards[t], reward, rtol=1e-4, atol=1e-6)
    assert cuts >= 4


def test_every_epoch_has_each_sample_once_with_its_own_advantage_and_rollout_logprob(breakout):
    script, seen = breakout
    assert len(seen.minibatches) == (16 if script is sppo_atari else 1)
    (inputs,) = seen.gae
    assert (inputs.gamma, inputs.gae_lambda) == (0.97, 0.9)
    with torch.no_grad():
        expected = seen.agent(torch.from_numpy(seen.steps[-1].obs))[1].numpy()
    np.testing.assert_allclose(inputs.last_value, expected, rtol=1e-4, atol=1e-6)
    orders = []
    for obs, actions, _, *old_logprob, advantages, returns in epochs(script, seen):
        with torch.no_grad():
            logits, values = seen.agent(obs)
        torch.testing.assert_close(returns - advantages, values, rtol=1e-4, atol=1e-5)
        if old_logprob:
            expected, _ = script.logprob_and_entropy(logits, actions)
            torch.testing.assert_close(old_logprob[0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.sort(advantages), np.sort(inputs.advantages.flatten()))
        orders.append(advantages)
    assert all(not torch.equal(one, other) for one, other in pairwise(orders))


def test_training_scores_are_raw_and_over_whole_games(pacman):
    _, seen = pacman
    scores = []
    for rewards, game_over in zip(*(np.array([getattr(s, x) for s in seen.steps]).T for x in ("rewards", "game_over"))):
        scores += [rewards[: np.flatnonzero(game_over)[0] + 1].sum()]
    result = json.loads((seen.folder / "result.json").read_text())
    assert result["train_last10_mean"] == pytest.approx(np.mean(scores)) and np.mean(scores) > 20
    assert result["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def test_schedules_start_below_the_start_value_and_end_at_zero(breakout, tmp_path):
    """Stable-Baselines3 evaluates them after the rollout was counted. In A2C they are off by default."""
    script, constant = breakout
    options = {"anneal_lr": True} | ({"anneal_clip": True} if script is sppo_atari else {})
    annealed = recorded(script, tmp_path, total_timesteps=256, num_steps=32, **options)
    for seen, first, last in ((annealed, 0.5, 0.0), (constant, 1.0, 1.0)):
        rates, clip_coefs = seen.learning_rates, seen.clip_coefs
        start = script.Args.learning_rate
        assert len(rates) == len(seen.minibatches)
        assert rates[0] == pytest.approx(first * start) and rates[-1] == pytest.approx(last * start)
        if script is sppo_atari:
            assert clip_coefs[0] == pytest.approx(first * 0.1) and clip_coefs[-1] == pytest.approx(last * 0.1)
    assert script.Args.anneal_lr == (script is sppo_atari)
    assert getattr(script.Args, "anneal_clip", True)


@one
def test_runs_differ_by_seed_and_by_nothing_else(script, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        seen = recorded(script, tmp_path / str(i), seed=seed, num_steps=16, total_timesteps=64)
        start = torch.cat([p.flatten() for p in seen.agent.parameters()])
        runs.append((start, *seen.minibatches[-1]))
    assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[1]))
    start, obs, actions = zip(runs[0][:3], runs[2][:3])
    assert not torch.equal(*start) and not torch.equal(*obs) and not torch.equal(*actions)


@one
def test_games_start_after_their_own_number_of_no_ops(script):
    envs = script.Envs(script.Args(env_id="MsPacman", num_threads=1), 12)
    _, info = envs.envs.reset(seed=np.arange(12))
    assert set(info["frame_number"]) <= set(range(30)) and len(set(info["frame_number"])) > 5


@one
def test_evaluation_counts_the_first_game_alone_and_fires_where_it_must(script, monkeypatch):
    lengths, sent = np.arange(3, 13), []

    class FakeEnvs:
        num_actions, fire = 4, 1

        def __init__(self, *inputs):
            self.t = 0

        def reset(self, seeds):
            self.must_fire = np.zeros(10, bool)
            return np.zeros((10, 4, 84, 84), np.uint8)

        def step(self, actions):
            sent.append((self.must_fire, actions.copy()))
            self.t += 1
            self.must_fire = np.arange(10) % 4 == self.t % 4
            rewards = np.full(10, 10.0) * np.where(np.arange(10) % 2, 1, -3)
            done = np.zeros(10, bool)
            return np.zeros((10, 4, 84, 84), np.uint8), rewards, done, done, self.t % lengths == 0, {}

        def close(self):
            sent.append("closed")

    monkeypatch.setattr(script, "Envs", FakeEnvs)
    scores = script.evaluate(script.Args(cuda=False), script.Agent(4, torch.Generator()))
    assert scores.tolist() == [10.0 * length * (1 if i % 2 else -3) for i, length in enumerate(lengths)]
    assert len(sent) == 13 and sent.pop() == "closed"
    forced = np.concatenate([actions[must] for must, actions in sent])
    free = np.concatenate([actions[~must] for must, actions in sent])
    assert len(forced) > 20 and (forced == 1).all() and set(free) == {0, 1, 2, 3}


@one
def test_evaluation_plays_whole_games(script, monkeypatch):
    ends, step = [], script.Envs.step

    def spy(envs, actions):
        result = step(envs, actions)
        ends.append(result[4].copy())
        return result

    monkeypatch.setattr(script.Envs, "step", spy)
    args = script.Args(env_id="QbertNoFrameskip-v4", num_threads=1, eval_episodes=3)
    scores = script.evaluate(args, script.Agent(6, torch.Generator()).to(args.device))
    assert np.stack(ends).any(0).all()  # every game came to its end, four lives each
    assert len(ends) > 100 and scores.shape == (3,)
    assert len(set(script.env_seeds(args.seed, 10, script.EVALUATION))) == 10


SMALL = "--env-id breakout --num-threads 1 --num-envs 4 --num-steps 32 --total-timesteps 256".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run made through the command line, with a video."""
    folder = tmp_path_factory.mktemp("sa2c_atari")
    flags = [*SMALL, "--eval-episodes", "2", "--run-dir", folder / "run", "--capture-video"]
    command = [sys.executable, sa2c_atari.__file__, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sa2c_atari, folder / "run", done


def test_run_leaves_its_files(finished):
    _, run_dir, done = finished
    assert done.stderr == ""
    result = json.loads((run_dir / "result.json").read_text())
    assert result["env_id"] == "BreakoutNoFrameskip-v4" and result["total_timesteps"] == 256
    assert len(result["eval_returns"]) == 2 and all(r == int(r) for r in result["eval_returns"])
    names = {path.name.split(".out.")[0] for path in run_dir.iterdir()}
    assert names == {"args.json", "checkpoint.pt", "curves.csv", "events", "model.safetensors", "result.json", "videos"}
    video = next(run_dir.glob("videos/*/*.mp4"))
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        assert clip.size == [160, 210] and clip.duration > 1


def test_saved_model_repeats_the_final_evaluation(finished, monkeypatch, capsys):
    script, run_dir, done = finished
    result = json.loads((run_dir / "result.json").read_text())
    main(script, monkeypatch, "--evaluate", run_dir)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line for line in done.stdout.splitlines() if line.startswith(("evaluation", "seed 1"))]
    returns = " ".join(f"{r:.1f}" for r in result["eval_returns"])
    assert lines[-1] == f"seed 1: {result['eval_mean']:.1f} ({returns})"


def refused(script, monkeypatch, capsys, *flags) -> str:
    """The one line of an argument that is not allowed."""
    with pytest.raises(SystemExit) as end:
        main(script, monkeypatch, *flags)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_videos_of_a_saved_model_need_moviepy(finished, capsys, monkeypatch):
    script, run_dir, _ = finished
    monkeypatch.setattr(script.metadata, "distributions", lambda name: [])
    error = refused(script, monkeypatch, capsys, "--evaluate", run_dir, "--capture-video")
    assert error == "error: --capture-video needs moviepy: pip install moviepy\n"


def test_resume_of_a_finished_run_says_so(finished, capsys, monkeypatch):
    script, run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    main(script, monkeypatch, "--resume", run_dir)
    assert capsys.readouterr().out == f"{run_dir} has finished; --evaluate plays its final evaluation again\n"
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


@pytest.mark.parametrize("flag", [("--seed", "5"), ("--num-envs", "9"), ("--sticky-actions",)])
def test_resume_takes_no_other_flag(finished, flag, capsys, monkeypatch):
    script, run_dir, _ = finished
    assert refused(script, monkeypatch, capsys, "--resume", run_dir, *flag).endswith(f"drop {flag[0]}\n")


@one
def test_killed_run_resumes_to_the_same_total(script, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    flags = [*SMALL, "--total-timesteps", 512, "--eval-episodes", 1, "--run-dir", run_dir]
    interrupt(script, tmp_path, flags, "flip_rewards", 70, signal.SIGKILL)  # of 32 a rollout
    assert read_checkpoint(run_dir)["progress"]["global_step"] == 256 and not (run_dir / "result.json").exists()
    main(script, monkeypatch, "--resume", run_dir)
    assert json.loads((run_dir / "result.json").read_text())["total_timesteps"] == 512


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts may catch it."""


def kill_at(script, monkeypatch, name: str, call: int = 1) -> None:
    """Before that call of a function of the script."""
    function, calls = getattr(script, name), []

    def dying(*inputs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return function(*inputs)

    monkeypatch.setattr(script, name, dying)


@one
def test_run_killed_before_its_result_resumes_to_the_same_model_and_result(script, tmp_path, monkeypatch):
    run_dir, returns = tmp_path / "run", np.arange(10.0)
    monkeypatch.setattr(script, "evaluate", lambda *_: returns)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(script, patch, "save_result")
        main(script, patch, *SMALL, "--run-dir", run_dir)
    model = load_file(run_dir / "model.safetensors")
    monkeypatch.setattr(script, "evaluate", None)  # nothing is evaluated again
    main(script, monkeypatch, "--resume", run_dir)
    resumed, result = load_file(run_dir / "model.safetensors"), json.loads((run_dir / "result.json").read_text())
    assert all(torch.equal(model[name], resumed[name]) for name in model)
    assert result["total_timesteps"] == 256 and result["eval_returns"] == returns.tolist()


@both
def test_resumed_run_goes_on_with_everything_but_the_games(script, tmp_path, monkeypatch):
    """With games that have no state a resumed run trains what one without a stop does, bit for bit."""
    seeds = []

    class Stateless(script.Envs):
        def reset(self, game_seeds):
            seeds.append(tuple(game_seeds))
            self.frames = super().reset([1, 2, 3, 4])
            return self.frames

        def step(self, actions):
            none = np.zeros(4, bool)
            return self.frames, actions - 1.0, none, none, none, {}

    monkeypatch.setattr(script, "Envs", Stateless)
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(10))
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(script, "SAVE_EVERY", 0)
    flags = ["--num-minibatches", 1, "--update-epochs", 2] if script is sppo_atari else []
    flags += [*SMALL, "--total-timesteps", 384, "--anneal-lr", "--run-dir"]  # the last of three rollouts learns nothing
    main(script, monkeypatch, *flags, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(script, patch, "gae", 2)
        main(script, patch, *flags, tmp_path / "killed")
    main(script, monkeypatch, "--resume", tmp_path / "killed")
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "killed"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    begun, killed, resumed = seeds
    assert begun == killed and not set(begun) & set(resumed)  # no game is played again


@one
def test_full_disk_stops_the_run_in_one_line(script, tmp_path, monkeypatch, capsys):
    save_checkpoint, saved, run_dir = script.save_checkpoint, [], tmp_path / "run"

    def save_until_full(*args):
        saved.append(args)
        with largest_file(1_000_000) if len(saved) > 1 else nullcontext():
            save_checkpoint(*args)

    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(10))
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(script, "SAVE_EVERY", 0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(script, "save_checkpoint", save_until_full)
        main(script, patch, *SMALL, "--run-dir", run_dir)
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err == f"error: {run_dir}: [Errno 27] File too large\n"
    assert out.splitlines()[0].endswith(f"--resume {run_dir}")
    assert read_checkpoint(run_dir)["progress"]["global_step"] == 128  # the last one that had room
    main(script, monkeypatch, "--resume", run_dir)
    assert (run_dir / "result.json").exists() and not list(run_dir.glob("*.tmp"))


@one
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "Brekout"], "Near matches: breakout"),
        (["--env-id", "ALE/Breakout-v5"], "add --sticky-actions, or name breakout"),
        (["--env-id", "BreakoutNoFrameskip-v0"], "add --sticky-actions, or name breakout"),
        (["--env-id", "Warlords"], "no such game"),  # a ROM that kills the emulator
        (["--reward-flip-prob", "1.5"], "0 <= --reward-flip-prob <= 1 must hold"),
        (["--beta", "-1"], "0 <= --beta < inf must hold"),
        (["--alpha", "0"], "0 < --alpha < inf must hold"),
        (["--Z", "0.5"], "-inf < --Z < 0 must hold"),
        (["--total-timesteps", "10"], "--num-envs * --num-steps <= --total-timesteps <= 10**12 must hold"),
        (["--resume", "nowhere"], "cannot be opened as a run directory"),
        (["--evaluate", "nowhere"], "no such .safetensors"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(script, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refused(script, monkeypatch, capsys, *flags)
    assert list(tmp_path.iterdir()) == []


@both
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch, capsys):
    gae = script.gae
    monkeypatch.setattr(script, "gae", lambda *inputs: [x * np.nan for x in gae(*inputs)])
    with pytest.raises(SystemExit) as end:
        main(script, monkeypatch, *SMALL, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert "step 128" in error and "not finite" in error and "--learning-rate" in error
    assert not (tmp_path / "run" / "result.json").exists()
