"""sppo_atari.py and sa2c_atari.py: environments, scores, noise, optimizer, command line."""

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, import_scripts, largest_file, read_checkpoint
from pausing import interrupt
from safetensors.torch import load_file

SCRIPTS = import_scripts("s*_atari.py")
TABLE_11 = (
    "Alien Assault Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Gravitar Krull MsPacman "
    "NameThisGame Qbert Riverraid RoadRunner Seaquest StarGunner TimePilot UpNDown VideoPinball WizardOfWor"
).split()
sppo_atari, sa2c_atari = (param.values[0] for param in reversed(SCRIPTS))
both = pytest.mark.parametrize("script", SCRIPTS)
one = pytest.mark.parametrize("script", [sppo_atari])  # for what SA2C's script has word for word (test_siblings.py)

gym.register_envs(ale_py)


@pytest.mark.parametrize("game", TABLE_11)
def test_games_of_table_11_step(game):
    games = sppo_atari.Games(sppo_atari.Args(env_id=f"{game}NoFrameskip-v4", num_threads=1), 2)
    obs = games.reset([1, 2])
    rng, changed = np.random.default_rng(0), False
    for _ in range(200):
        previous = obs
        obs, *_ = games.step(rng.integers(games.num_actions, size=2))
        changed = changed or not np.array_equal(obs, previous)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8 and changed
    assert len(games.envs.ale.get_action_set()) == gym.make(f"{game}NoFrameskip-v4").action_space.n  # minimal set


@one
def test_all_spellings_of_a_game_mean_the_same(script):
    for spelling in ("MsPacmanNoFrameskip-v4", "ALE/MsPacman-v5", "MsPacman-v4", "MsPacman", "ms_pacman", "mspacman"):
        assert script.find_game(spelling) == "ms_pacman"
        assert script.canonical_id(spelling) == "MsPacmanNoFrameskip-v4"
    for game in TABLE_11:
        assert script.canonical_id(f"ALE/{game}-v5") == f"{game}NoFrameskip-v4"
    with pytest.raises(script.Stop, match="breakout"):
        script.find_game("Braekout-v5")


def captured_training(script, tmp_path, monkeypatch, **options):
    """Train on Breakout for one rollout; what gae() was given and gave first, and the calls of gradients()."""
    captured = {"minibatches": [], "clip_coefs": []}
    gae, gradients, evaluate = script.gae, script.gradients, script.evaluate

    def spy_gae(*inputs):
        names = ("rewards", "values", "dones", "last_value", "gamma", "gae_lambda")
        if "rewards" not in captured:
            captured.update({name: deepcopy(x) for name, x in zip(names, inputs)})
            captured["advantages"] = gae(*inputs)[0]
        return gae(*inputs)

    def spy_gradients(agent, batch, *rest):
        captured.setdefault("agent", deepcopy(agent))
        grads, losses = gradients(agent, batch, *rest)
        captured.setdefault("losses", losses)
        captured["minibatches"].append([x.clone() for x in batch])
        captured["clip_coefs"].append(rest[0].item() if len(rest) > 1 else None)
        return grads, losses

    monkeypatch.setattr(script, "gae", spy_gae)
    monkeypatch.setattr(script, "gradients", spy_gradients)
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(10))
    settings = {"num_steps": 96, "num_envs": 4, "total_timesteps": 384, "num_threads": 1} | options
    args = script.Args(**settings)
    script.create_run_dir(args, tmp_path)
    script.train(args, tmp_path)
    monkeypatch.setattr(script, "evaluate", evaluate)
    return captured


@both
def test_fire_after_a_lost_life_is_stored_with_its_own_logprob_and_as_not_chosen(script, tmp_path, monkeypatch):
    steps = []
    step = script.Games.step

    def spy_step(games, actions):
        steps.append((games.must_fire.copy(), actions.copy()))
        return step(games, actions)

    monkeypatch.setattr(script.Games, "step", spy_step)
    options = {"num_minibatches": 1, "anneal_clip": False} if script is sppo_atari else {}
    captured = captured_training(script, tmp_path, monkeypatch, **options)
    forced = np.concatenate([actions[must_fire] for must_fire, actions in steps])
    assert len(forced) > 0 and (forced == 1).all()
    assert (
        captured["minibatches"][0][1].bincount().tolist() == np.bincount(np.concatenate([a for _, a in steps])).tolist()
    )
    chosen = captured["minibatches"][0][2]
    assert (chosen == 0).sum() == len(forced) and (captured["minibatches"][0][1][chosen == 0] == 1).all()
    if script is sa2c_atari:
        return
    # Before the first step the policy is that of the rollout: the ratio is 1 for every stored action, forced or not,
    # but for rounding, since batches differ in size. (The annealed clip range would be 0 here and count it as clipped.)
    assert captured["losses"]["losses/approx_kl"] == pytest.approx(0, abs=1e-8)
    assert captured["losses"]["losses/clipfrac"] == 0


@both
def test_sampled_actions_have_the_frequencies_of_the_policy(script, tmp_path, monkeypatch):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])

    def forward(self, obs):
        zeros = 0 * sum(p.sum() for p in self.parameters()) + torch.zeros(len(obs))
        return zeros[:, None] + logits, zeros

    monkeypatch.setattr(script.Agent, "forward", forward)
    captured = captured_training(script, tmp_path, monkeypatch, num_steps=512, total_timesteps=2048)
    steps = len(captured["minibatches"]) // (script.Args.update_epochs if script is sppo_atari else 1)
    actions, chosen = (torch.cat([batch[k] for batch in captured["minibatches"][:steps]]) for k in (1, 2))
    observed = actions[chosen > 0].bincount()
    expected = logits.softmax(-1) * observed.sum()
    assert observed.sum() > 1900 and ((observed - expected) ** 2 / expected).sum() < 16.3  # 0.999 quantile, 3 degrees


@both
def test_learning_sees_clipped_flipped_rewards_and_lost_lives(script, tmp_path, monkeypatch):
    clean = captured_training(script, tmp_path / "clean", monkeypatch, env_id="MsPacman")
    noisy = captured_training(script, tmp_path / "noisy", monkeypatch, env_id="MsPacman", reward_flip_prob=0.1)
    assert set(np.unique(clean["rewards"])) == {0, 1}  # a pellet is worth 10
    flipped = noisy["rewards"] != clean["rewards"]
    assert np.array_equal(noisy["rewards"][flipped], 1 - clean["rewards"][flipped])
    assert 0.05 < flipped.mean() < 0.16
    breakout = captured_training(script, tmp_path / "lives", monkeypatch)
    assert breakout["dones"].sum() >= 4


@both
def test_the_frame_limit_adds_the_value_of_the_final_observation(script, tmp_path, monkeypatch):
    steps, agents, gradients = [], [], script.gradients

    class ShortGames(script.Games):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options | {"max_num_frames_per_episode": 100, "noop_max": 0})

        def step(self, actions):
            result = super().step(actions)
            steps.append((np.sign(result[1]), result[3] & ~result[2], result[5].get("final_obs")))
            return result

    def spy_gradients(agent, *rest):
        agents.append(deepcopy(agent))
        return gradients(agent, *rest)

    monkeypatch.setattr(script, "Games", ShortGames)
    monkeypatch.setattr(script, "gradients", spy_gradients)
    captured = captured_training(script, tmp_path / "run", monkeypatch)
    assert sum(cut.sum() for _, cut, _ in steps) >= 8
    for t, (reward, cut, final_obs) in enumerate(steps):
        if cut.any():
            with torch.no_grad():
                reward = reward + 0.99 * agents[0](torch.from_numpy(final_obs))[1].numpy() * cut
            assert captured["dones"][t][cut].all() and np.abs(reward[cut]).max() > 1e-3
        np.testing.assert_allclose(captured["rewards"][t], reward, rtol=1e-4, atol=1e-6)


@both
def test_every_epoch_has_each_sample_once_with_its_own_advantage_and_rollout_logprob(script, tmp_path, monkeypatch):
    last_obs, step = [], script.Games.step

    def spy_step(games, actions):
        result = step(games, actions)
        last_obs[:] = [result[0].copy()]
        return result

    monkeypatch.setattr(script.Games, "step", spy_step)
    captured = captured_training(script, tmp_path, monkeypatch, gamma=0.97, gae_lambda=0.9)
    agent, epochs = captured["agent"], 4 if script is sppo_atari else 1
    assert len(captured["minibatches"]) == (16 if epochs > 1 else 1)
    assert (captured["gamma"], captured["gae_lambda"]) == (0.97, 0.9)
    with torch.no_grad():
        expected = agent(torch.from_numpy(last_obs[0]))[1].numpy()
    np.testing.assert_allclose(captured["last_value"], expected, rtol=1e-4, atol=1e-6)
    orders = []
    for epoch in np.array_split(np.arange(len(captured["minibatches"])), epochs):
        batches = zip(*(captured["minibatches"][k] for k in epoch))
        obs, actions, _, *old_logprob, advantages, returns = (torch.cat(x) for x in batches)
        with torch.no_grad():
            logits, values = agent(obs)
        torch.testing.assert_close(returns - advantages, values, rtol=1e-4, atol=1e-5)
        if old_logprob:
            expected, _ = script.logprob_and_entropy(logits, actions)
            torch.testing.assert_close(old_logprob[0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.sort(advantages), np.sort(captured["advantages"].flatten()))
        orders.append(advantages)
    assert all(not torch.equal(one, other) for one, other in pairwise(orders))


@both
def test_training_scores_are_raw_and_over_whole_games(script, tmp_path, monkeypatch):
    steps = []

    class ShortGames(script.Games):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options | {"max_num_frames_per_episode": 340, "noop_max": 0})

        def step(self, actions):
            result = super().step(actions)
            steps.append((result[1].copy(), result[4].copy()))
            return result

    monkeypatch.setattr(script, "Games", ShortGames)
    captured_training(script, tmp_path / "run", monkeypatch, env_id="MsPacman")
    scores = []
    for rewards, game_over in zip(*(np.array(x).T for x in zip(*steps))):
        scores += [rewards[: np.flatnonzero(game_over)[0] + 1].sum()]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["train_last10_mean"] == pytest.approx(np.mean(scores)) and np.mean(scores) > 20
    assert result["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


@both
def test_schedules_start_below_the_start_value_and_end_at_zero(script, tmp_path, monkeypatch):
    """Stable-Baselines3 evaluates them after the rollout was counted. In A2C they are off by default."""
    learning_rates, clip_coefs = [], []

    class Learner(script.Learner):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            step = self.optimizer.step

            def spy():
                learning_rates.append(self.optimizer.param_groups[0]["lr"])
                step()

            self.optimizer.step = spy

    monkeypatch.setattr(script, "Learner", Learner)
    start = script.Args.learning_rate
    for anneal in (True, False):
        learning_rates.clear()
        options = {"anneal_lr": anneal} | ({"anneal_clip": anneal} if script is sppo_atari else {})
        folder = tmp_path / str(anneal)
        captured = captured_training(script, folder, monkeypatch, total_timesteps=256, num_steps=32, **options)
        clip_coefs = [c for c in captured["clip_coefs"] if c is not None]
        first, last = (0.5, 0.0) if anneal else (1.0, 1.0)
        assert learning_rates[0] == pytest.approx(first * start) and learning_rates[-1] == pytest.approx(last * start)
        if script is sppo_atari:
            assert clip_coefs[0] == pytest.approx(first * 0.1) and clip_coefs[-1] == pytest.approx(last * 0.1)
    assert script.Args.anneal_lr == (script is sppo_atari)
    assert getattr(script.Args, "anneal_clip", True)


@both
def test_runs_differ_by_seed_and_by_nothing_else(script, tmp_path, monkeypatch):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        captured = captured_training(
            script, tmp_path / str(i), monkeypatch, seed=seed, num_steps=16, total_timesteps=64
        )
        start = torch.cat([p.flatten() for p in captured["agent"].parameters()])
        runs.append((start, *captured["minibatches"][-1]))
    assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[1]))
    start, obs, actions = zip(runs[0][:3], runs[2][:3])
    assert not torch.equal(*start) and not torch.equal(*obs) and not torch.equal(*actions)


@one
def test_games_start_after_their_own_number_of_no_ops(script):
    games = script.Games(script.Args(env_id="MsPacman", num_threads=1), 12)
    _, info = games.envs.reset(seed=np.arange(12))
    assert set(info["frame_number"]) <= set(range(30)) and len(set(info["frame_number"])) > 5


@one
def test_evaluation_counts_the_first_game_alone_and_fires_where_it_must(script, monkeypatch, tmp_path):
    lengths, sent = np.arange(3, 13), []

    class FakeGames:
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

    monkeypatch.setattr(script, "Games", FakeGames)
    args = script.Args(cuda=False)
    scores = script.evaluate(script.Learner(args, 4), args, tmp_path)
    assert scores.tolist() == [10.0 * length * (1 if i % 2 else -3) for i, length in enumerate(lengths)]
    assert len(sent) == 12
    forced = np.concatenate([actions[must] for must, actions in sent])
    free = np.concatenate([actions[~must] for must, actions in sent])
    assert len(forced) > 20 and (forced == 1).all() and set(free) == {0, 1, 2, 3}


@one
def test_evaluation_plays_whole_games(script, monkeypatch, tmp_path):
    ends, step = [], script.Games.step

    def spy(games, actions):
        result = step(games, actions)
        ends.append(result[4].copy())
        return result

    monkeypatch.setattr(script.Games, "step", spy)
    monkeypatch.setattr(script, "EVAL_EPISODES", 3)
    args = script.Args(env_id="QbertNoFrameskip-v4", num_threads=1)
    scores = script.evaluate(script.Learner(args, 6), args, tmp_path)
    assert np.stack(ends).any(0).all()  # every game came to its end, four lives each
    assert len(ends) > 100 and scores.shape == (3,)
    assert len(set(script.env_seeds(args.seed, 10, script.EVALUATION))) == 10


def command(script, *flags) -> list[str]:
    small = ["--env-id", "breakout", "--num-threads", "1", "--num-envs", "4"]
    small += ["--num-steps", "32", "--total-timesteps", "256"] if "--resume" not in flags else []
    if {"--resume", "--evaluate"} & set(flags):
        small = []
    return [sys.executable, str(ROOT / f"{script.SCRIPT}.py"), *small, *map(str, flags)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run made through the command line, with a video."""
    script = sppo_atari
    folder = tmp_path_factory.mktemp(script.SCRIPT)
    done = subprocess.run(
        command(script, "--run-dir", folder / "run", "--capture-video"), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return script, folder / "run", done


def test_run_leaves_its_files(finished):
    _, run_dir, done = finished
    assert done.stderr == ""
    result = json.loads((run_dir / "result.json").read_text())
    assert result["env_id"] == "BreakoutNoFrameskip-v4" and result["total_timesteps"] == 256
    assert len(result["eval_returns"]) == 10 and all(r == int(r) for r in result["eval_returns"])
    names = {path.name.split(".out.")[0] for path in run_dir.iterdir()}
    assert names == {"args.json", "checkpoint.pt", "curves.csv", "events", "model.safetensors", "result.json", "videos"}
    video = next(run_dir.glob("videos/*/*.mp4"))
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        assert clip.size == [160, 210] and clip.duration > 1


def test_saved_model_repeats_the_final_evaluation(finished):
    script, run_dir, _ = finished
    result = json.loads((run_dir / "result.json").read_text())
    args, learner = script.load_model(run_dir)
    assert script.evaluate(learner, args, run_dir).tolist() == result["eval_returns"]


def test_videos_of_a_saved_model_need_moviepy(finished, capsys, monkeypatch):
    script, run_dir, _ = finished
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--evaluate", str(run_dir), "--capture-video"])
    assert script.main() == 2
    assert capsys.readouterr().err == "error: --capture-video needs moviepy: pip install moviepy\n"


def test_resume_of_a_finished_run_says_so(finished, capsys, monkeypatch):
    script, run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", str(run_dir)])
    assert script.main() == 0
    assert capsys.readouterr().out == f"{run_dir} has finished; evaluate again with --evaluate\n"
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


@pytest.mark.parametrize("flag", [("--seed", "5"), ("--num-envs", "9"), ("--sticky-actions",)])
def test_resume_takes_no_other_flag(finished, flag, capsys, monkeypatch):
    script, run_dir, _ = finished
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", str(run_dir), *flag])
    assert script.main() == 2
    assert capsys.readouterr().err.endswith(f"drop {flag[0]}\n")


@one
def test_killed_run_resumes_to_the_same_total(script, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    flags = command(script, "--run-dir", run_dir, "--total-timesteps", "512", "--checkpoint-every", "256")[2:]
    interrupt(script, tmp_path, flags, "flip_rewards", 70, signal.SIGKILL)
    killed_at = read_checkpoint(run_dir)["counters"]["global_step"]
    assert killed_at == 256 and not (run_dir / "result.json").exists()
    monkeypatch.setattr(script, "EVAL_EPISODES", 1)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", str(run_dir)])
    assert script.main() == 0
    assert json.loads((run_dir / "result.json").read_text())["total_timesteps"] == 512


@both
def test_run_killed_before_its_result_resumes_to_the_same_model(script, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for kill -9: nothing in the scripts may catch it."""

    def die_at_the_result(path, content):
        if path.name == "result.json":
            raise Killed
        write_json(path, content)

    def recorded_reset(games, game_seeds):
        seeds.append(set(game_seeds))
        return reset(games, game_seeds)

    write_json, run_dir, reset, seeds = script.write_json, tmp_path / "run", script.Games.reset, []
    monkeypatch.setattr(script.Games, "reset", recorded_reset)
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(10))
    monkeypatch.setattr(script, "write_json", die_at_the_result)
    monkeypatch.setattr(sys, "argv", command(script, "--run-dir", run_dir)[1:])
    with pytest.raises(Killed):
        script.main()
    model = load_file(run_dir / "model.safetensors")
    (run_dir / "model.safetensors").unlink()
    monkeypatch.setattr(script, "write_json", write_json)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", str(run_dir)])
    assert script.main() == 0
    assert len(seeds) == 2 and not seeds[0] & seeds[1]  # no game is played again
    resumed = load_file(run_dir / "model.safetensors")
    assert all(torch.equal(model[name], resumed[name]) for name in model)


@one
def test_full_disk_stops_the_run_in_one_line(script, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", command(script, "--run-dir", run_dir, "--checkpoint-every", "128")[1:])
    save_checkpoint, saved = script.save_checkpoint, []

    def save_until_full(*args):
        saved.append(args)
        with largest_file(1_000_000) if len(saved) > 1 else nullcontext():
            save_checkpoint(*args)

    monkeypatch.setattr(script, "save_checkpoint", save_until_full)
    assert script.main() == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: [Errno 27] File too large"
    assert f"--resume {run_dir}" in hint and not list(run_dir.glob("*.tmp"))


@both
def test_learner_state_survives_a_checkpoint(script, tmp_path):
    def make() -> object:
        return script.Learner(script.Args(cuda=False), 4)

    learner = make()
    for p in learner.agent.parameters():
        p.grad = torch.randn(p.shape)
    learner.optimizer.step()
    torch.rand(3, generator=learner.generator)  # a new learner's generator is not where this one is
    torch.save(learner.state(), tmp_path / "state.pt")
    other = make()
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path / "state.pt")
    for p, q in zip(learner.agent.parameters(), other.agent.parameters()):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    learner.optimizer.step()
    other.optimizer.step()
    for p, q in zip(learner.agent.parameters(), other.agent.parameters()):
        assert torch.equal(p, q)
    assert torch.equal(torch.rand(3, generator=learner.generator), torch.rand(3, generator=other.generator))


@both
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "Brekout-v5"], "breakout"),
        (["--reward-flip-prob", "1.5"], "between 0 and 1"),
        (["--beta", "-1"], "0 or above"),
        (["--alpha", "0"], "above 0"),
        (["--Z", "0.5"], "below 0"),
        (["--total-timesteps", "10"], "at least one rollout"),
        (["--resume", "nowhere"], "holds no run"),
        (["--evaluate", "nowhere"], "cannot be read as a model"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(script, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, *flags])
    assert script.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and words in error
    assert list(tmp_path.iterdir()) == []


@both
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch, capsys):
    gae = script.gae

    def nan_gae(*inputs):
        advantages, returns = gae(*inputs)
        return advantages * np.nan, returns

    monkeypatch.setattr(script, "gae", nan_gae)
    flags = command(script, "--run-dir", tmp_path / "run")[2:]
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, *flags])
    assert script.main() == 1
    error = capsys.readouterr().err
    assert "step 128" in error and "BreakoutNoFrameskip-v4" in error and "--learning-rate" in error
    assert not (tmp_path / "run" / "result.json").exists()
