"""The Atari scripts against independent references: gymnasium's preprocessing, Stable-Baselines3 and plain torch."""

from contextlib import closing

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn

import sa2c_atari
import sppo_atari

both = pytest.mark.parametrize("script", [sppo_atari, sa2c_atari], ids=["sppo_atari", "sa2c_atari"])

gym.register_envs(ale_py)


def reference_env(game: str) -> gym.Env:
    """gymnasium's own preprocessing of the same game, without random no-ops."""
    env = gym.make(f"{game}NoFrameskip-v4")
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0, terminal_on_life_loss=False)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


@pytest.mark.parametrize("game", ["Breakout", "MsPacman", "VideoPinball"])
def test_whole_game_equals_gymnasiums_preprocessing(game):
    """Frames, lost lives, game over and the score over all lives, on the same actions."""
    games = sppo_atari.Envs(sppo_atari.Args(env_id=game), 1, noop_max=0, use_fire_reset=False)
    reference = reference_env(game)
    obs, (expected, info) = games.reset([3]), reference.reset(seed=3)
    rng, lives, score, expected_score, lost_lives = np.random.default_rng(0), info["lives"], 0, 0, 0
    assert np.array_equal(obs[0], expected)
    while True:
        action = rng.integers(games.num_actions)
        obs, reward, terminated, truncated, game_over, infos = games.step(np.array([action]))
        expected, expected_reward, expected_over, _, info = reference.step(action)
        score, expected_score = score + reward[0], expected_score + expected_reward
        last_frames = infos["final_obs"][0] if game_over[0] else obs[0]
        assert np.array_equal(last_frames, expected)
        assert game_over[0] == expected_over and not truncated[0]
        assert terminated[0] == (expected_over or info["lives"] < lives)
        assert games.must_fire[0] == (terminated[0] and not expected_over and games.fire is not None)
        lost_lives += terminated[0]
        lives = info["lives"]
        if expected_over:
            break
    assert score == expected_score > 0
    assert lost_lives > 1


def test_an_extra_life_is_no_new_game_and_a_reset_is_one():
    class Emulator:
        def step(self, actions):
            frames, lives = self.script.pop(0)
            total = frames + (120 if len(self.script) < 3 else 0) + (8 if len(self.script) < 1 else 0)
            info = {"episode_frame_number": np.array([frames]), "frame_number": np.array([total])}
            return None, np.zeros(1), np.array([lives < 3]), np.zeros(1, bool), info | {"lives": np.array([lives])}

    games = sppo_atari.Envs(sppo_atari.Args(), 1)
    games.reset([1])
    games.envs, games.game_start = Emulator(), np.array([0])
    # An extra life, a lost one; game over; and again after 8 frames, fewer than the next game's no-ops.
    games.envs.script = [(104, 3), (108, 4), (112, 2), (5, 3), (9, 3), (29, 3)]
    assert [bool(games.step(np.array([0]))[4][0]) for _ in range(6)] == [False, False, False, True, False, True]


def test_the_frame_limit_truncates_and_ends_the_game():
    games = sppo_atari.Envs(sppo_atari.Args(), 1, max_num_frames_per_episode=100, noop_max=0)
    games.reset([1])
    for _ in range(40):
        _, _, terminated, truncated, game_over, infos = games.step(np.array([0]))
        if truncated[0]:
            break
    assert game_over[0] and not terminated[0]
    assert infos["final_obs"].shape == (1, 4, 84, 84)


def test_flip_noise_is_a_binary_symmetric_channel():
    rng = np.random.default_rng(0)
    rewards = rng.integers(-1, 2, 300_000)
    noisy = sppo_atari.flip_rewards(rewards, rng.random(rewards.shape), 0.1)
    for reward, flipped in ((0, 1), (1, 0), (-1, 2)):
        outcomes = noisy[rewards == reward]
        assert set(outcomes) == {reward, flipped}
        assert np.mean(outcomes == flipped) == pytest.approx(0.1, abs=0.004)
    assert np.array_equal(sppo_atari.flip_rewards(rewards, rng.random(rewards.shape), 0.0), rewards)


@both
def test_optimizer_is_that_of_the_published_runs(script, tmp_path, monkeypatch):
    """The optimizer as train() makes it, before its first step."""

    class Made(Exception):
        pass

    def stop(args, parts):
        raise Made(parts)

    monkeypatch.setattr(script, "load_checkpoint", stop)
    args = script.Args(num_envs=1, num_threads=1, cuda=False, run_dir=str(tmp_path))
    with closing(script.Envs(args, 1)) as envs, pytest.raises(Made) as made:
        script.train(args, envs)
    (parts,) = made.value.args
    agent, optimizer = parts["agent"], parts["optimizer"]
    twins = [nn.Parameter(p.detach().clone()) for p in agent.parameters()]
    if script is sppo_atari:
        reference = torch.optim.Adam(twins, 2.5e-4, eps=1e-5)
    else:
        reference = RMSpropTFLike(twins, 7e-4, alpha=0.99, eps=1e-5)
    for _ in range(3):
        for p, twin in zip(agent.parameters(), twins):
            p.grad = 1e-5 * torch.randn_like(p)  # as small as eps, so that eps matters
            twin.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, twin in zip(agent.parameters(), twins):
        torch.testing.assert_close(p, twin, atol=1e-6, rtol=1e-5)


@both
@pytest.mark.parametrize(("norm_adv", "max_grad_norm"), [(True, 0.5), (False, 0.5), (True, 1000.0)])
@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_network_and_gradient_step_equal_plain_torch(script, beta, norm_adv, max_grad_norm):
    """Every fourth action was forced upon the policy: it counts in the value loss and in the means' denominators."""
    torch.manual_seed(0)
    agent = script.Agent(6, torch.Generator().manual_seed(1))
    for name, gain in (("trunk.0", 2**0.5), ("trunk.7", 2**0.5), ("actor", 0.01), ("critic", 1.0)):
        weight = agent.get_submodule(name).weight.flatten(1)
        rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
    trunk = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
    )
    reference = nn.ModuleDict({"trunk": trunk, "actor": nn.Linear(512, 6), "critic": nn.Linear(512, 1)})
    reference.load_state_dict(agent.state_dict())
    obs = torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8)
    actions, advantages, returns = torch.randint(0, 6, (32,)), torch.randn(32), torch.randn(32)
    features = reference["trunk"](obs.float() / 255)
    policy = torch.distributions.Categorical(logits=reference["actor"](features))
    value_loss = nn.functional.mse_loss(reference["critic"](features).flatten(), returns)
    chosen = (torch.arange(32) % 4 > 0).float()
    logprob, entropy = policy.log_prob(actions), policy.entropy()[chosen > 0].sum() / 32
    alpha, Z = (1.0, -1.0) if beta == 0 else (0.5, -2.0)
    if script is sppo_atari:
        args = script.Args(alpha=alpha, beta=beta, Z=Z, norm_adv=norm_adv, max_grad_norm=max_grad_norm)
        advantages = 1 + advantages  # so that normalization changes signs
        old_logprob = (logprob + 0.2 * torch.randn(32)).detach()
        used = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if norm_adv else advantages
        pi, pi_old = logprob.exp(), old_logprob.exp()
        L_ppo = -torch.min(pi / pi_old * used, (pi / pi_old).clamp(0.9, 1.1) * used)
        active = torch.where(used > 0, pi / pi_old < 1.1, pi / pi_old > 0.9)
        assert 0 < active.sum() < 32
        policy_loss = (alpha * L_ppo + beta * -used * Z * (1 - pi) / pi_old * active)[chosen > 0].sum() / 32
        batch = [obs, actions, chosen, old_logprob, advantages, returns]
        losses = script.backward(agent, batch, torch.tensor(0.1), args)
        flips = ((advantages > 0) != (used > 0)).float().mean().item()
        assert losses["losses/sign_flips"].item() == pytest.approx(flips) and (flips > 0) == norm_adv
    else:
        args = script.Args(alpha=alpha, beta=beta, Z=Z, max_grad_norm=max_grad_norm)
        loss = alpha * -advantages * logprob + beta * -advantages * Z * (1 - logprob.exp())
        policy_loss = loss[chosen > 0].sum() / 32
        losses = script.backward(agent, [obs, actions, chosen, advantages, returns], args)
    (policy_loss + args.vf_coef * value_loss - 0.01 * entropy).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
    assert (norm > max_grad_norm) == (max_grad_norm == 0.5)
    torch.testing.assert_close(losses["losses/grad_norm"], norm, rtol=1e-3, atol=0)
    for (name, p), ours in zip(reference.named_parameters(), agent.parameters()):
        torch.testing.assert_close(ours.grad, p.grad, atol=1e-6, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_rmsprop_tf_equals_a_hand_computed_case():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = sa2c_atari.RMSpropTF([p], lr=0.1, alpha=0.9, eps=0.01)
    p.grad = torch.tensor([2.0])
    optimizer.step()  # square average 0.9 * 1 + 0.1 * 4 = 1.3; step 0.1 * 2 / sqrt(1.31)
    assert p.item() == pytest.approx(1 - 0.2 / 1.31**0.5, abs=1e-6)
    p.grad = torch.tensor([-1.0])
    optimizer.step()  # square average 0.9 * 1.3 + 0.1 = 1.27; step -0.1 / sqrt(1.28)
    assert p.item() == pytest.approx(1 - 0.2 / 1.31**0.5 + 0.1 / 1.28**0.5, abs=1e-6)


def test_rmsprop_tf_equals_stable_baselines3s():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    a = sa2c_atari.RMSpropTF([ours], lr=7e-4, alpha=0.99, eps=1e-5)
    b = RMSpropTFLike([theirs], lr=7e-4, alpha=0.99, eps=1e-5)
    for _ in range(20):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)
