"""The continuous scripts against independent references: Stable-Baselines3, torch.distributions and plain torch."""

import csv
import json
from contextlib import closing
from copy import deepcopy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import import_scripts
from gymnasium.spaces import Box, MultiDiscrete
from safetensors.torch import load_file
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Categorical
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmark.peers.sb3_baseline import weighted

for_each_script = pytest.mark.parametrize("script", import_scripts("*_continuous_discretized.py"))
ppo_scripts = pytest.mark.parametrize("script", import_scripts("sppo_continuous_discretized.py"))
one_script = ppo_scripts  # for what the SA2C script has word for word (test_siblings.py)


class ClockEnv(gym.Env):
    """Actions change nothing. Episodes end at random and are cut off after 5 steps; the 300th reward is a spike."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(np.float32([-1, -2]), np.float32([1, 3]))
    actions: list[np.ndarray] = []  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.total_steps = 0

    def observe(self) -> np.ndarray:
        return self.np_random.normal(5, 3, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.actions.append(action.copy())
        self.t, self.total_steps = self.t + 1, self.total_steps + 1
        reward = self.np_random.normal(0.5) + 1000 * (self.total_steps == 300)
        terminated = bool(self.np_random.random() < 0.15)
        return self.observe(), reward, terminated, self.t == 5, {"cut_off": self.t == 5}


class MultiDiscreteEnv(ClockEnv):
    action_space = MultiDiscrete([11, 11])


gym.register("Clock-v0", ClockEnv)


def is_ppo(script) -> bool:
    return script.__name__.startswith("sppo")


def train_recorded(script, run_dir, env_id="Clock-v0", **options) -> SimpleNamespace:
    """Run train() and return what went through the policy, the environments, gae(), backward() and the optimizer."""
    if is_ppo(script):
        options = {"num_minibatches": 4, "update_epochs": 2} | options
    options = {"total_timesteps": options["num_envs"] * options["num_steps"]} | options
    args = script.Args(env_id=env_id, run_dir=str(run_dir), **options)
    record = SimpleNamespace(rollouts=[], minibatches=[], learning_rates=[])
    gae, backward, obs_seen, bins_sent = script.gae, script.backward, [], []

    class Agent(script.Agent):
        def __init__(self, generators, *sizes):
            super().__init__(generators, *sizes)
            record.agent, record.generators = self, generators

        def logits(self, obs):
            obs_seen.extend([obs.numpy().copy()] * (obs.shape[1] == args.num_envs))  # in a rollout
            return super().logits(obs)

    class Normalizer(script.Normalizer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            record.normalizer = self

    def recorded_gae(rewards, values, dones, last_value, *hyperparameters):
        inputs = {"rewards": rewards, "values": values, "dones": dones, "last_value": last_value}
        advantages, returns = gae(*inputs.values(), *hyperparameters)
        rollout = SimpleNamespace(
            **deepcopy(inputs | {"advantages": advantages, "agent": record.agent, "actions": ClockEnv.actions}),
            statistics=deepcopy(record.normalizer.statistics),
            hyperparameters=hyperparameters,
            rng=[g.get_state() for g in record.generators],
            obs=np.array(obs_seen),
            bins=np.array(bins_sent),
        )
        record.rollouts.append(rollout)
        for seen in (obs_seen, bins_sent, ClockEnv.actions):
            seen.clear()
        return advantages, returns

    def recorded_backward(agent, batch, args):
        record.minibatches.append([x.clone() for x in batch])
        return backward(agent, batch, args)

    def note_optimizer(optimizer, *_):
        record.optimizer = optimizer
        record.learning_rates.append(optimizer.param_groups[0]["lr"])

    run_dir.mkdir()
    hook = register_optimizer_step_pre_hook(note_optimizer)
    with pytest.MonkeyPatch.context() as patch, closing(script.Envs(args, args.num_envs)) as envs:
        for name, recorded in (("Agent", Agent), ("Normalizer", Normalizer), ("gae", recorded_gae)):
            patch.setattr(script, name, recorded)
        patch.setattr(script, "backward", recorded_backward)
        patch.setattr(ClockEnv, "actions", [])
        step = envs.step
        envs.step = lambda bins: (bins_sent.append(bins.copy()), step(bins))[1]
        script.train(args, envs)
    hook.remove()
    return record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What train() did with a script, once for all tests: rollouts of two agents in three environments each."""
    done = {}

    def recorded(script, env_id="Clock-v0"):
        if (script, env_id) not in done:
            options = {"num_seeds": 2, "num_envs": 3, "num_steps": 120, "gamma": 0.9, "gae_lambda": 0.8}
            options["total_timesteps"] = 1080 if env_id == "Clock-v0" else 360
            run_dir = tmp_path_factory.mktemp("recorded") / "run"
            done[script, env_id] = train_recorded(script, run_dir, env_id, **options)
        return done[script, env_id]

    return recorded


def make_agent(script, obs_dim=3, seeds=(1, 2)):
    return script.Agent([torch.Generator().manual_seed(seed) for seed in seeds], obs_dim, 2, 11)


def random_rollout(rng, T=60, shape=(2, 4)):
    """Rewards, values and dones (agents, T, envs) and the last values (agents, envs)."""
    *agents, envs = shape
    rewards, values = rng.normal(size=(2, *agents, T, envs)).astype(np.float32)
    return rewards, values, rng.random(rewards.shape) < 0.15, rng.normal(size=shape).astype(np.float32)


@one_script
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 1.0), (0.5, 0.0), (1.0, 1.0)])
def test_gae_equals_stable_baselines3(script, gamma, gae_lambda):
    rollout = rewards, values, dones, last_value = random_rollout(np.random.default_rng(0))
    advantages, returns = script.gae(*rollout, gamma, gae_lambda)
    _, T, E = rewards.shape
    buffer = RolloutBuffer(T, Box(-1, 1, (3,)), Box(-1, 1, (2,)), gamma=gamma, gae_lambda=gae_lambda, n_envs=E)
    for i in range(2):
        buffer.reset()
        buffer.rewards, buffer.values = rewards[i], values[i]
        buffer.episode_starts[1:] = dones[i, :-1]  # step t starts an episode if t - 1 ended one
        buffer.compute_returns_and_advantage(torch.tensor(last_value[i]), dones[i, -1])
        np.testing.assert_allclose(advantages[i], buffer.advantages, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(returns[i], buffer.returns, rtol=1e-5, atol=1e-5)


@one_script
def test_gae_is_the_discounted_sum_of_td_errors_up_to_the_end_of_the_episode(script):
    rewards, values, dones, last_value = (x.astype(float) for x in random_rollout(np.random.default_rng(1), 30, (3,)))
    dones = dones.astype(bool)
    advantages, returns = script.gae(rewards, values, dones, last_value, 0.9, 0.8)
    next_values = [*values[1:], last_value]
    for t, e in np.ndindex(rewards.shape):
        expected = 0.0
        for k in range(t, len(rewards)):
            delta = rewards[k, e] - values[k, e] + (0 if dones[k, e] else 0.9 * next_values[k][e])
            expected += (0.9 * 0.8) ** (k - t) * delta
            if dones[k, e]:
                break
        assert advantages[t, e] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(returns, advantages + values)


@one_script
def test_networks_start_orthogonal_with_their_gains_and_zero_biases(script):
    state = make_agent(script, obs_dim=5).state_dict()
    assert sorted(state) == sorted(
        f"{net}.{i}.{p}" for net in ("actor", "critic") for i in (0, 2, 4) for p in ("weight", "bias")
    )
    for net, head_gain, head_size in (("actor", 0.01, 22), ("critic", 1.0, 1)):
        for layer, gain, shape in ((0, 2**0.5, (5, 64)), (2, 2**0.5, (64, 64)), (4, head_gain, (64, head_size))):
            weight = state[f"{net}.{layer}.weight"]
            assert weight.shape == (2, *shape)
            assert not torch.equal(weight[0], weight[1])
            rows = weight if shape[0] <= shape[1] else weight.mT
            expected = torch.eye(min(shape)).expand(2, -1, -1)
            torch.testing.assert_close(rows @ rows.mT / gain**2, expected, rtol=0, atol=1e-5)
            assert not state[f"{net}.{layer}.bias"].any()


@one_script
def test_logprob_and_entropy_are_sums_of_categoricals_over_the_action_dimensions(script):
    logits = 2 * torch.randn(2, 7, 3, 11, generator=torch.Generator().manual_seed(0))
    actions = torch.randint(11, (2, 7, 3), generator=torch.Generator().manual_seed(1))
    expected = Categorical(logits=logits)
    logprob, entropy = script.logprob_and_entropy(logits, actions)
    torch.testing.assert_close(logprob, expected.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, expected.entropy().sum(-1))


@one_script
def test_bins_are_evenly_spaced_from_low_to_high_inclusive_in_each_dimension(script):
    bins = script.action_bins(Box(np.float32([-1, -2, 0]), np.float32([1, 3, 0.5])), script.Args().num_bins)
    assert bins.shape == (11, 3)
    assert bins.dtype == np.float32
    np.testing.assert_array_equal(bins[[0, -1]], np.float32([[-1, -2, 0], [1, 3, 0.5]]))
    np.testing.assert_allclose(np.diff(bins, axis=0), [[0.2, 0.5, 0.05]] * 10, atol=1e-6)


@for_each_script
def test_sampled_actions_have_the_frequencies_of_the_joint_policy(script, monkeypatch, tmp_path):
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5], [1.5, 0.0, 0.0, -0.5]])  # (action_dim, num_bins)
    monkeypatch.setattr(script.Agent, "logits", lambda self, obs: 0 * self.actor(obs).unflatten(-1, (2, 4)) + logits)
    record = train_recorded(script, tmp_path / "run", num_bins=4, num_envs=2, num_steps=2000)
    bins = np.linspace([-1, -2], [1, 3], 4)
    actions = np.array(record.rollouts[0].actions)
    indices = np.abs(actions[:, None] - bins).argmin(1)
    np.testing.assert_allclose(bins[indices, [0, 1]], actions, atol=1e-6)
    observed = np.zeros((4, 4))
    np.add.at(observed, (indices[:, 0], indices[:, 1]), 1)
    probs = logits.softmax(-1).numpy()
    expected = 4000 * probs[0][:, None] * probs[1]
    assert ((observed - expected) ** 2 / expected).sum() < 37.7  # 0.999 quantile of chi-square with 15 degrees


def epochs(script, record):
    """The minibatches of the first rollout's epochs, put together again: [[observations, actions, ...]]"""
    size, count = (4, 2) if is_ppo(script) else (1, 1)
    assert len(record.minibatches) == 3 * size * count
    parts = [record.minibatches[i * size : (i + 1) * size] for i in range(count)]
    return [[torch.cat(x, dim=1) for x in zip(*minibatches)] for minibatches in parts]


@for_each_script
def test_environment_receives_the_bins_that_the_update_learns_from(script, recorded):
    record = recorded(script)
    bins = np.linspace([-1, -2], [1, 3], 11).astype(np.float32)
    received = np.reshape(record.rollouts[0].actions, (120, 2, 3, 2))
    for _, actions, *_ in epochs(script, record):
        for i in range(2):
            learned, expected = bins[actions[i].numpy(), [0, 1]], received[:, i].reshape(-1, 2)
            np.testing.assert_allclose(learned[np.lexsort(learned.T)], expected[np.lexsort(expected.T)], atol=1e-6)


@for_each_script
@pytest.mark.parametrize("env_id", ["Clock-v0", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3"])
def test_rollout_is_that_of_vec_normalize_and_only_truncated_episodes_bootstrap(script, recorded, env_id):
    N, E, T, gamma = 2, 3, 120, 0.9
    rollout = recorded(script, env_id).rollouts[0]
    assert rollout.hyperparameters == (gamma, 0.8)
    ends = {"truncated": 0, "terminated": 0, "both": 0}
    for i in range(N):

        def value(obs, i=i):
            with torch.no_grad():
                return rollout.agent.value(torch.tensor(obs).expand(N, -1, -1))[i].numpy()

        # In 64 bits: of LunarLander's 32 VecNormalize makes sums in 32, where ours are in 64.
        envs = DummyVecEnv([lambda: gym.wrappers.DtypeObservation(gym.make(env_id), np.float64)] * E)
        # The seeds of an agent's environments are a stream of its own of numpy's SeedSequence.
        envs._seeds = np.random.SeedSequence([1 + i, script.TRAINING, 0]).generate_state(E).tolist()
        venv = VecNormalize(envs, gamma=gamma)
        bins = np.linspace(venv.action_space.low, venv.action_space.high, 11, dtype=np.float32)
        obs = venv.reset()
        for t in range(T):
            assert rollout.obs.dtype == np.float32
            np.testing.assert_allclose(rollout.obs[t, i], obs, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(rollout.values[i, t], value(obs), rtol=1e-5, atol=1e-5)
            obs, rewards, dones, infos = venv.step(bins[rollout.bins[t, i], range(bins.shape[1])])
            np.testing.assert_array_equal(rollout.dones[i, t], dones)
            for e, info in enumerate(infos):
                if info["TimeLimit.truncated"]:  # never set where the episode terminated in the same step
                    rewards[e] += gamma * value(info["terminal_observation"][None]).item()
                    ends["truncated"] += 1
                elif dones[e]:
                    ends["both" if info.get("cut_off") else "terminated"] += 1
            np.testing.assert_allclose(rollout.rewards[i, t], rewards, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rollout.last_value[i], value(obs), rtol=1e-5, atol=1e-5)
        for name, expected in (("obs", venv.obs_rms), ("return", venv.ret_rms)):
            mean, var, count = (rollout.statistics[f"{name}_{key}"] for key in ("mean", "var", "count"))
            tolerance = 1e-10 if name == "obs" else 1e-6  # DummyVecEnv rounds rewards to 32 bits
            np.testing.assert_allclose(mean[i].squeeze(), expected.mean, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(var[i].squeeze(), expected.var, rtol=tolerance)
            np.testing.assert_allclose(count, expected.count)
        venv.close()
    assert min(ends.values()) > 5 if env_id == "Clock-v0" else ends["terminated"] >= 3


@for_each_script
def test_reward_noise_comes_after_normalization_and_clipping_and_touches_nothing_else(script, tmp_path):
    options, global_rng = {"num_envs": 8, "num_steps": 400}, torch.get_rng_state()
    clean, noisy = (train_recorded(script, tmp_path / str(std), reward_noise_std=std, **options) for std in (0.0, 0.05))
    a, b = clean.rollouts[0], noisy.rollouts[0]
    np.testing.assert_array_equal(a.actions, b.actions)
    np.testing.assert_array_equal(a.dones, b.dones)
    np.testing.assert_array_equal(a.values, b.values)
    assert len(a.statistics) == 6
    for name, statistic in a.statistics.items():
        np.testing.assert_array_equal(statistic, b.statistics[name], err_msg=name)

    noise = (b.rewards - a.rewards) / 0.05  # 3200 samples
    assert abs(noise.mean()) < 3 / noise.size**0.5
    assert abs(noise.std() - 1) < 0.04
    assert noise.mean(-1).std() == pytest.approx(8**-0.5, rel=0.1)  # independent between the 8 environments
    for z, probability in ((0.5, 0.3829), (1, 0.6827), (2, 0.9545)):
        assert (np.abs(noise) < z).mean() == pytest.approx(probability, abs=0.03)
    clipped = a.rewards == 10  # the spikes of step 299
    assert clipped[0, 299].sum() >= 4
    assert (b.rewards[clipped] != 10).all()
    assert b.rewards[clipped].max() > 10

    assert torch.equal(a.rng[0], b.rng[0])  # the noise is drawn from the agent's generator, whatever its size
    assert torch.equal(torch.get_rng_state(), global_rng)
    episodic_returns, eval_returns = [], []
    for std in ("0.0", "0.05"):
        rows = csv.DictReader((tmp_path / std / "curves.csv").open())
        episodic_returns.append([row["charts/episodic_return"] for row in rows if row["charts/episodic_return"]])
        eval_returns.append(json.loads((tmp_path / std / "result.json").read_text())["eval_returns"])
    assert len(episodic_returns[0]) == 1
    assert episodic_returns[0] == episodic_returns[1]
    assert eval_returns[0] == eval_returns[1]


@for_each_script
def test_every_epoch_has_each_sample_once_with_its_own_advantage_and_rollout_logprob(script, recorded):
    record = recorded(script)
    agent, orders = record.rollouts[0].agent, []
    for obs, actions, *old_logprob, advantages, returns in epochs(script, record):
        with torch.no_grad():
            torch.testing.assert_close(returns - advantages, agent.value(obs), rtol=1e-4, atol=1e-5)
            if old_logprob:
                expected, _ = script.logprob_and_entropy(agent.logits(obs), actions)
                torch.testing.assert_close(old_logprob[0], expected)
        for i in range(2):
            expected = np.sort(record.rollouts[0].advantages[i].flatten())
            np.testing.assert_array_equal(np.sort(advantages[i].numpy()), expected)
        orders.append(advantages)
    assert len(orders) == 1 or not torch.equal(*orders)


def sppo_loss(dist, actions, old_logprob, advantages, args):
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pi, pi_old = dist.log_prob(actions).sum(-1).exp(), old_logprob.exp()
    L_ppo = -torch.min(pi / pi_old * advantages, (pi / pi_old).clamp(0.8, 1.2) * advantages)
    active = torch.where(advantages > 0, pi / pi_old < 1.2, pi / pi_old > 0.8)
    L_rppo = -advantages * args.Z * (1 - pi) / pi_old * active
    return (args.alpha * L_ppo + args.beta * L_rppo).mean()


def sa2c_loss(dist, actions, advantages, args):
    logprob = dist.log_prob(actions).sum(-1)
    L_ra2c = -advantages * args.Z * (1 - logprob.exp())
    return (args.alpha * -advantages * logprob + args.beta * L_ra2c).mean()


def parameters(agent, i: int) -> list[torch.Tensor]:
    """Agent i's parameters in the layout of nn.Linear, actor first."""
    return [p[i].T if name.endswith("weight") else p[i, 0] for name, p in agent.named_parameters()]


class Reference:
    """An agent's networks and optimizer in plain torch, from the same weights."""

    def __init__(self, script, agent, i: int):
        def mlp(out_features):
            hidden = [nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
            return nn.Sequential(*hidden, nn.Linear(64, out_features)).double()

        self.actor, self.critic = mlp(2 * 11), mlp(1)
        self.params = [*self.actor.parameters(), *self.critic.parameters()]
        for p, value in zip(self.params, parameters(agent, i)):
            p.data.copy_(value)
        if is_ppo(script):
            self.optimizer = torch.optim.Adam(self.params, 3e-4, eps=1e-5)
            self.policy_loss = sppo_loss
        else:
            self.optimizer = torch.optim.RMSprop(self.params, 7e-4, alpha=0.99, eps=1e-5)
            self.policy_loss = sa2c_loss

    def update(self, batch, args) -> float:
        obs, actions, *rest, returns = batch
        dist = Categorical(logits=self.actor(obs).view(*actions.shape, 11))
        value_loss = nn.functional.mse_loss(self.critic(obs).squeeze(-1), returns)
        entropy = dist.entropy().sum(-1).mean()
        loss = self.policy_loss(dist, actions, *rest, args) + 0.5 * value_loss - args.ent_coef * entropy
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, args.max_grad_norm)
        self.optimizer.step()
        return norm.item()


def random_batch(script, agent, g: torch.Generator, dtype=torch.float64) -> list[torch.Tensor]:
    """64 samples per agent; old log-probabilities are such that some ratios leave the clip range."""
    N, n = len(agent.actor[0].weight), 64
    obs = torch.randn(N, n, 3, generator=g, dtype=dtype)
    actions = torch.randint(11, (N, n, 2), generator=g)
    advantages, returns = 1 + 3 * torch.randn(2, N, n, generator=g, dtype=dtype)
    if not is_ppo(script):
        return [obs, actions, advantages, returns]
    with torch.no_grad():
        logprob, _ = script.logprob_and_entropy(agent.logits(obs), actions)
    return [obs, actions, logprob + 0.2 * torch.randn(N, n, generator=g, dtype=dtype), advantages, returns]


def like_recorded(record, agent) -> torch.optim.Optimizer:
    """An optimizer for the agent as train() has made one."""
    settings = {name: x for name, x in record.optimizer.param_groups[0].items() if name != "params"}
    return type(record.optimizer)(agent.parameters(), **settings)


@for_each_script
@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 20.0), (1.0, 0.0)], ids=["symmetric", "plain"])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1000.0], ids=["clipped", "unclipped"])
def test_updates_equal_those_of_plain_torch(script, recorded, max_grad_norm, alpha, beta, ent_coef):
    args = script.Args(alpha=alpha, beta=beta, ent_coef=ent_coef, max_grad_norm=max_grad_norm)
    agent = make_agent(script).double()
    optimizer = like_recorded(recorded(script), agent)
    references = [Reference(script, agent, i) for i in range(2)]
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        batch = random_batch(script, agent, g)
        losses = script.backward(agent, batch, args)
        optimizer.step()
        for i, reference in enumerate(references):
            norm = reference.update([x[i] for x in batch], args)
            assert losses["losses/grad_norm"][i].item() == pytest.approx(norm)
            assert (norm > max_grad_norm) == (max_grad_norm == 0.5)
            torch.testing.assert_close(parameters(agent, i), reference.params, rtol=1e-8, atol=1e-10)


@ppo_scripts
def test_norm_adv_off_leaves_advantages_alone(script):
    agent = make_agent(script).double()
    batch = random_batch(script, agent, torch.Generator().manual_seed(0))
    obs, actions, old_logprob, advantages, _ = batch
    losses = script.backward(agent, batch, script.Args(norm_adv=False))
    logprob, _ = script.logprob_and_entropy(agent.logits(obs), actions)
    expected = script.symmetric_ppo_loss(logprob, old_logprob, advantages, 0.2, 0.5, 20.0, -1.0)
    torch.testing.assert_close(losses["losses/policy_loss"], expected.detach())


@ppo_scripts
def test_logged_kl_clip_fraction_and_sign_flips_are_those_of_the_batch(script):
    agent = make_agent(script, seeds=[1]).double()
    batch = random_batch(script, agent, torch.Generator().manual_seed(0))
    obs, actions, old_logprob, advantages, _ = (x[0] for x in batch)
    losses = script.backward(agent, batch, script.Args())
    log_ratio = Categorical(logits=agent.logits(obs[None])[0]).log_prob(actions).sum(-1) - old_logprob
    ratio = log_ratio.exp()
    flips = ((advantages > 0) & (advantages < advantages.mean())).float().mean()
    flips += ((advantages < 0) & (advantages > advantages.mean())).float().mean()
    assert losses["losses/approx_kl"].item() == pytest.approx((ratio - 1 - log_ratio).mean().item())
    assert losses["losses/clipfrac"].item() == ((ratio < 0.8) | (ratio > 1.2)).float().mean().item()
    assert 0 < losses["losses/sign_flips"].item() == flips.item()


@for_each_script
@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
def test_plain_updates_equal_those_of_stable_baselines3(script, recorded, ent_coef):
    args = script.Args(alpha=1.0, beta=0.0, ent_coef=ent_coef)
    if is_ppo(script):
        model = PPO("MlpPolicy", MultiDiscreteEnv(), n_steps=64, batch_size=64, n_epochs=1, ent_coef=ent_coef)
    else:
        model = A2C("MlpPolicy", MultiDiscreteEnv(), n_steps=64, ent_coef=ent_coef)
    compare_updates(script, args, model, recorded(script))


@ppo_scripts
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 20.0), (0.5, 0.2), (1.0, 0.0)])
def test_symmetric_updates_equal_those_of_stable_baselines3_with_another_weight(script, recorded, alpha, beta):
    model = PPO("MlpPolicy", MultiDiscreteEnv(), n_steps=64, batch_size=64, n_epochs=1, **weighted(alpha + beta))
    compare_updates(script, script.Args(alpha=alpha, beta=beta), model, recorded(script))


def compare_updates(script, args, model, record):
    """Four updates of the script and of model.train(), which have the same parameters and data."""
    agent = make_agent(script, seeds=[1])
    optimizer = like_recorded(record, agent)
    policy, extractor = model.policy, model.policy.mlp_extractor
    actor = [extractor.policy_net[0], extractor.policy_net[2], policy.action_net]
    critic = [extractor.value_net[0], extractor.value_net[2], policy.value_net]
    params = [p for linear in (*actor, *critic) for p in (linear.weight, linear.bias)]
    for p, value in zip(params, parameters(agent, 0)):
        p.data.copy_(value)
    model.set_logger(Logger(None, []))
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        batch = random_batch(script, agent, g, torch.float32)
        script.backward(agent, batch, args)
        optimizer.step()
        obs, actions, *old_logprob, advantages, returns = (x.transpose(0, 1).numpy() for x in batch)
        buffer = model.rollout_buffer
        buffer.reset()
        buffer.observations, buffer.actions = obs, actions.astype(np.float32)
        buffer.advantages, buffer.returns = advantages, returns
        if old_logprob:
            buffer.log_probs = old_logprob[0]
        buffer.full = True
        model.train()
        torch.testing.assert_close(parameters(agent, 0), params, rtol=1e-4, atol=2e-6)


@for_each_script
@pytest.mark.parametrize(
    ("total_timesteps", "remaining"),
    [(128, [0.75, 0.5, 0.25, 0]), (112, [1 - 32 / 112, 1 - 64 / 112, 1 - 96 / 112, 0])],
    ids=["whole rollouts", "rounded up"],
)
def test_learning_rate_starts_below_its_start_value_and_ends_at_zero(script, tmp_path, total_timesteps, remaining):
    options = {"anneal_lr": True, "num_envs": 2, "num_steps": 16, "total_timesteps": total_timesteps}
    learning_rates = train_recorded(script, tmp_path / "run", **options).learning_rates
    remaining = np.repeat(remaining, len(learning_rates) // 4)
    np.testing.assert_allclose(learning_rates, script.Args().learning_rate * remaining, atol=1e-12)


@for_each_script
def test_learning_rate_is_constant_by_default(script, recorded):
    assert set(recorded(script).learning_rates) == {script.Args().learning_rate}


@ppo_scripts
def test_symmetric_update_equals_that_of_ppo_with_the_policy_loss_times_alpha_minus_beta_z(
    script, monkeypatch, tmp_path
):
    """The identity at the defaults, on a real environment: 320 gradient steps with (0.5, 20) and with (20.5, 0)."""
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros((1, 10)))

    def trained(alpha: float, beta: float) -> torch.Tensor:
        run_dir = tmp_path / f"{alpha} {beta}"
        run_dir.mkdir()
        settings = {"total_timesteps": 2048, "alpha": alpha, "beta": beta, "run_dir": str(run_dir)}
        args = script.Args(env_id="InvertedDoublePendulum-v4", **settings)
        with closing(script.Envs(args, 1)) as envs:
            script.train(args, envs)
        model = load_file(run_dir / "model.safetensors")
        return torch.cat([model[name].flatten() for name in sorted(model)])

    sppo, control, ppo = trained(0.5, 20), trained(20.5, 0), trained(1, 0)
    difference = (control - sppo).abs().max()
    assert difference < 1e-5 < 0.02 < (ppo - sppo).abs().max()


class ReusingEnv(ClockEnv):
    """Writes every observation into one array: -1 after a reset, else the number of steps."""

    def __init__(self, render_mode=None):
        self.obs = np.zeros(3, np.float32)

    def reset(self, *, seed=None, options=None):
        self.t, self.obs[:] = 0, -1
        return self.obs, {}

    def step(self, action):
        self.t += 1
        self.obs[:] = self.t
        return self.obs, 0.0, False, self.t == 5, {}


gym.register("Reusing-v0", ReusingEnv)


@one_script
def test_reset_does_not_overwrite_the_final_observation(script):
    with closing(script.Envs(script.Args(env_id="Reusing-v0"), 1)) as envs:
        envs.reset(range(1, 2), 0)
        for t in range(1, 6):
            obs, _, _, truncated, final_obs = envs.step(np.zeros((1, 1, 2), int))
            assert final_obs.tolist() == [[[t] * 3]]
            assert obs.tolist() == [[[t if t < 5 else -1] * 3]] and truncated.tolist() == [[t == 5]]


@for_each_script
@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1000.0, 0.1), (-3.0, 1e-5)])
def test_statistics_of_observations_are_vec_normalizes_to_1e_10(script, num_envs, mean, std):
    rng, normalizer, expected = (
        np.random.default_rng(3),
        script.Normalizer(2, num_envs, 3, 0.99),
        RunningMeanStd(shape=(3,)),
    )
    for _ in range(500):
        obs = rng.normal(mean, std, (2, num_envs, 3))
        normalizer.count(obs)
        expected.update(obs[1])
    np.testing.assert_allclose(normalizer.statistics["obs_mean"][1, 0], expected.mean, rtol=1e-10)
    np.testing.assert_allclose(normalizer.statistics["obs_var"][1, 0], expected.var, rtol=1e-10)
    assert normalizer.statistics["obs_count"] == expected.count


class SpikesEnv(ClockEnv):
    """Rewards of every size, in episodes that end at random."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward * 10.0 ** self.np_random.integers(-6, 6), *rest


@one_script
@pytest.mark.parametrize("num_envs", [1, 4])
def test_rewards_of_rollouts_are_vec_normalizes_to_1e_10_across_rollouts_and_a_resume(script, num_envs):
    venv = VecNormalize(DummyVecEnv([lambda: SpikesEnv()] * num_envs), gamma=0.97)
    venv.seed(1)
    venv.reset()
    normalizer = script.Normalizer(1, num_envs, 3, 0.97)
    for rollout in range(4):
        raw, done, expected = [], [], []
        for _ in range(150):
            _, _, dones, _ = venv.step(np.zeros((num_envs, *venv.action_space.shape), np.float32))
            rewards = venv.old_reward / np.sqrt(venv.ret_rms.var + venv.epsilon)  # not yet rounded to 32 bits
            for recorded, x in ((raw, venv.old_reward), (done, dones), (expected, rewards.clip(-10, 10))):
                recorded.append(x.copy())
        if rollout == 2:  # resumed
            old, normalizer = normalizer, script.Normalizer(1, num_envs, 3, 0.97)
            normalizer.load_state_dict(old.state_dict())
            normalizer.returns = old.returns  # the environments here go on
        ours = normalizer.rewards(np.array(raw, float)[None], np.array(done)[None])[0]
        np.testing.assert_allclose(ours, expected, rtol=1e-10)
        np.testing.assert_allclose(normalizer.statistics["return_var"].squeeze(), venv.ret_rms.var, rtol=1e-10)
    assert np.array(done).sum() > 5
