# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d,mujoco]==1.4.0", "mujoco==4.0.0", "Box2D==2.3.10", "numpy==2.4.6",
#     "safetensors==0.8.0", "tensorboard==2.21.0", "tyro==1.0.17"]
# ///
"""Symmetric A2C (SA2C) for continuous control with discretized actions, the paper's DSA2C.

    python sa2c_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1
    python sa2c_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1 --alpha 1 --beta 0  # DA2C, the baseline

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
Arrays have a leading agent dimension: --num-seeds N trains N independent agents side by side in one process.
"""

import errno
import fcntl
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import safetensors.torch
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
VERSION = 3  # of the format of checkpoint.pt
EVAL_EPISODES = 10
EVAL_MAX_STEPS = 20_000  # of an episode in an environment without a time limit
LOG_EVERY = 2048  # steps between rows of curves.csv, and checkpoints
SHOW_EVERY = 10  # seconds between lines of progress
TRAINING, EVALUATION = 0, 1  # streams of environment seeds
PACKAGES = ("torch", "gymnasium", "mujoco", "Box2D", "numpy")  # their versions go into result.json


@dataclass(frozen=True)
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id, with a bounded Box of actions; module:Id-v0 imports the module first
    env_kwargs: str = "{}"  # keyword arguments of the environment in JSON, such as '{"xml_file": "a.xml"}'
    total_timesteps: int = 2_000_000  # environment steps of each seed, rounded up to whole rollouts (Table 6)
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained side by side, with seeds seed .. seed + num_seeds - 1
    alpha: float = 0.5  # weight of the A2C loss in Eq. 9
    beta: float = 5.0  # weight of the reverse A2C loss in Eq. 9; alpha 1 and beta 0 is plain A2C
    Z: float = -1.0  # the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters
    num_bins: int = 11  # bins per action dimension, evenly spaced from low to high inclusive
    reward_noise_std: float = 0.0  # std of the Gaussian noise on normalized training rewards (the paper's: 0.05)

    learning_rate: float = 7e-4  # RMSprop's learning rate
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    num_envs: int = 4  # environments of each agent
    num_steps: int = 8  # steps per environment and rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # lambda of generalized advantage estimation
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global gradient norm above which gradients are scaled down

    run_dir: str | None = None  # default runs/<env>__<script>__<seed>__<time>; with several seeds, parent of seed<k>/
    resume: str | None = None  # run directory to continue; all other arguments come from the run
    evaluate: str | None = None  # run directory or model.safetensors to evaluate instead of training
    eval_every: int = 0  # steps between evaluations during training; 0: only the final one
    eval_episodes: int = 10  # episodes of every evaluation
    track: bool = False  # log to Weights & Biases as well; WANDB_PROJECT and WANDB_ENTITY say where (pip install wandb)
    capture_video: bool = False  # record an episode of every evaluation, the first agent's (pip install moviepy)
    compile: bool = False  # compile the gradient computation with torch.compile (needs a C++ compiler)
    cuda: bool = False  # use a GPU; for one agent of this size the CPU is faster
    num_threads: int = 1  # CPU threads of torch; networks this small gain nothing from more

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def split(self) -> list["Args"]:
        """Every agent's own arguments, as if it were alone; its files go into their run_dir."""
        dirs = [f"{self.run_dir}/seed{seed}" if self.num_seeds > 1 else self.run_dir for seed in self.seeds]
        return [replace(self, seed=seed, num_seeds=1, run_dir=d) for seed, d in zip(self.seeds, dirs)]


def is_vector(space: gym.Space) -> bool:
    """True if all values of the space are numbers that an MLP can take, also in a Dict or a Tuple. Pixels are not."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = space.values() if isinstance(space, gym.spaces.Dict) else space
        return all(is_vector(part) for part in parts)
    if isinstance(space, gym.spaces.Box):
        return len(space.shape) < 2 or space.dtype != np.uint8
    return isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary | gym.spaces.Text)


def make_env(env_id: str, env_kwargs: str = "{}", **options) -> gym.Env:
    """Make one environment with flat observations. env_kwargs (JSON) and options are its arguments."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's MuJoCo ids are v4
    # MuJoCo's own handler writes MUJOCO_LOG.TXT into the working directory. Some v4 files warn of settotalmass.
    mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or say(f"MuJoCo: {text}", sys.stderr))
    if ":" in env_id and not re.fullmatch(r"[\w.]+:[^:]+", env_id):
        fail(f"--env-id {env_id}: not of the form module:Id-v0")
    try:
        env = gym.make(env_id, disable_env_checker=True, **json.loads(env_kwargs), **options)
    except (gym.error.Error, ImportError, json.JSONDecodeError, TypeError) as error:
        if isinstance(error, TypeError) and "argument" not in str(error):
            raise  # a bug of the environment
        fail(f"--env-id {env_id}: {error} (--env-kwargs {env_kwargs})")
    space = env.observation_space
    if not is_vector(space):
        with suppress(Exception):
            env.close()
        fail(f"--env-id {env_id}: {space} is no vector of numbers. sppo_atari.py has a network for images")
    is_flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return env if is_flat else gym.wrappers.FlattenObservation(env)


def action_bins(space: gym.Space, num_bins: int) -> np.ndarray:
    """Grid of (num_bins, action_dim) action values, evenly spaced from low to high inclusive (Section 5.2)."""
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        with np.errstate(over="ignore", invalid="ignore"):  # where the difference of the bounds is infinite
            bins = np.linspace(space.low.flatten(), space.high.flatten(), num_bins, dtype=space.dtype)
        if bins.size and np.isfinite(bins).all():
            return bins
    fail(f"--env-id: bins need a Box of floating point actions between finite bounds, not {space}")


class Envs:
    """num_envs environments for every agent, whose actions are bins; all arrays are (num_agents, num_envs, ...).
    They reset within the step that ends an episode. gymnasium's SyncVectorEnv takes four times as long."""

    @torch.enable_grad()  # train turns gradients off; an environment may need them
    def __init__(self, args: Args, num_envs: int):
        self.env_id, self.shape, self.envs = args.env_id, (args.num_seeds, num_envs), []
        try:
            for i in range(args.num_seeds * num_envs):
                options = {"render_mode": "rgb_array"} if args.capture_video and i == 0 else {}
                self.envs.append(make_env(args.env_id, args.env_kwargs, **options))
            self.action_space = self.envs[0].action_space
            self.bins = action_bins(self.action_space, args.num_bins)
        except BaseException:  # one cannot be opened
            self.close()
            raise
        self.action_dim, self.obs_dim = self.bins.shape[1], self.envs[0].observation_space.shape[0]

    def close(self) -> None:
        for env in self.envs:
            with suppress(Exception):  # no result is lost for an environment that cannot be closed
                env.close()

    def take(self, what: str, x: object, size: int) -> np.ndarray:
        """Copy x to (size,): the environment may write into the same array again."""
        x = np.array(x).ravel()
        if x.size != size:  # numpy would broadcast it
            fail(f"--env-id {self.env_id}: its {what} has {x.size} numbers, not {size}")
        return x

    @torch.enable_grad()
    def reset(self, seeds: range, *stream: int) -> np.ndarray:
        """Start every environment; returns observations. Each stream (training, evaluation) has its own episodes."""
        states = [np.random.SeedSequence([seed, *stream]).generate_state(self.shape[1]) for seed in seeds]
        pairs = list(zip(self.envs, np.concatenate(states).tolist()))
        for env, seed in pairs:  # environments may sample their spaces
            gym.spaces.Tuple([env.unwrapped.action_space, env.unwrapped.observation_space]).seed(seed)
        for limit in (2**32, 2**31, 1000):  # some environments need a C int, others a small number
            try:
                obs = [self.take("observation", env.reset(seed=seed % limit)[0], self.obs_dim) for env, seed in pairs]
                return np.array(obs).reshape(*self.shape, -1)
            except Exception:
                if limit == 1000:
                    raise

    @torch.enable_grad()
    def step(self, actions: np.ndarray, running: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Take bins (num_agents, num_envs, action_dim); the last array is the observations before any reset.
        In an evaluation only the running environments take a step; the others have reward 0, and none resets."""
        values = self.bins[actions, np.arange(self.action_dim)].reshape(-1, *self.action_space.shape)
        obs, final_obs = np.zeros((2, len(self.envs), self.obs_dim))
        reward, terminated, truncated = np.zeros((3, len(self.envs), 1))  # takes arrays of one number; None is nan
        for i in range(len(self.envs)) if running is None else np.flatnonzero(running):
            its_obs, its_reward, terminated[i], truncated[i], _ = self.envs[i].step(values[i])
            obs[i] = final_obs[i] = self.take("observation", its_obs, self.obs_dim)
            reward[i] = self.take("reward", its_reward, 1)
            if running is None and (terminated[i, 0] > 0 or truncated[i, 0] > 0):
                obs[i] = self.take("observation", self.envs[i].reset()[0], self.obs_dim)
        obs, final_obs = obs.reshape(*self.shape, -1), final_obs.reshape(*self.shape, -1)
        return obs, *(x.reshape(self.shape) for x in (reward, terminated > 0, truncated > 0)), final_obs


class Normalizer(nn.Module):
    """Observation and reward normalization of Stable-Baselines3's VecNormalize, one per agent (eps 1e-8, clip 10)."""

    def __init__(self, num_agents: int, num_envs: int, obs_dim: int, gamma: float):
        super().__init__()
        for name, shape in (("obs", (num_agents, 1, obs_dim)), ("return", (num_agents, 1))):
            for key, size, start in (("mean", shape, 0.0), ("var", shape, 1.0), ("count", (), 1e-4)):
                self.register_buffer(f"{name}_{key}", torch.full(size, start, dtype=torch.float64))
        self.statistics = {name: x.numpy() for name, x in self.named_buffers()}  # views: both change together
        self.returns = np.zeros((num_agents, num_envs))  # discounted return so far of the running episodes
        self.gamma = gamma

    def count(self, obs: np.ndarray) -> None:
        """Update mean and variance with observations (num_agents, num_envs, obs_dim), by deviations from the old mean
        (Chan et al.). rewards does the same; one function for both makes a compiled agent 7 % slower."""
        mean, var, count = (self.statistics[f"obs_{key}"] for key in ("mean", "var", "count"))
        delta, n = obs - mean, count + obs.shape[1]
        shift = delta.sum(1, keepdims=True) / n
        var[:] = (count * var + np.square(delta).sum(1, keepdims=True)) / n - np.square(shift)
        mean += shift
        count[...] = n

    def obs(self, obs: np.ndarray) -> np.ndarray:
        """(num_agents, num_envs, obs_dim), raw -> normalized float32"""
        mean, std = self.statistics["obs_mean"], np.sqrt(self.statistics["obs_var"] + 1e-8)
        return ((obs - mean) / std).clip(-10, 10).astype(np.float32)

    def rewards(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Divide a rollout's rewards, (num_agents, num_steps, num_envs), by the std of the discounted return so far."""
        returns, steps = np.empty(rewards.shape), np.arange(1, rewards.shape[1] + 1)[:, None]
        for t in range(len(steps)):
            returns[:, t] = self.returns = self.returns * self.gamma + rewards[:, t]
            self.returns[dones[:, t]] = 0
        mean, var, count = (self.statistics[f"return_{key}"] for key in ("mean", "var", "count"))
        delta, n = returns - mean[:, None], count + rewards.shape[2] * steps  # after each step, as what follows
        shift = delta.sum(2, keepdims=True).cumsum(1) / n
        new_var = (count * var[:, None] + np.square(delta).sum(2, keepdims=True).cumsum(1)) / n - np.square(shift)
        mean += shift[:, -1]
        var[:] = new_var[:, -1]
        count[...] = n[-1, 0]
        return (rewards / np.sqrt(new_var + 1e-8)).clip(-10, 10)  # no mean is subtracted


class BatchedLinear(nn.Module):
    """One linear layer per agent: (num_agents, batch, in_features) -> (num_agents, batch, out_features).
    On one core, ten agents side by side train twice as fast as ten processes of one agent."""

    def __init__(self, generators: list[torch.Generator], in_features: int, out_features: int, gain: float):
        super().__init__()
        weights = [nn.init.orthogonal_(torch.empty(out_features, in_features), gain, generator=g).T for g in generators]
        self.weight = nn.Parameter(torch.stack(weights).contiguous())
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Agent(nn.Module):
    """Policy and value MLPs of every agent, 64-64 tanh; the policy is a product of categoricals over the bins."""

    def __init__(self, generators: list[torch.Generator], obs_dim: int, action_dim: int, num_bins: int):
        super().__init__()

        def mlp(out_features: int, gain: float) -> nn.Sequential:
            sizes = (obs_dim, 64, 2**0.5), (64, 64, 2**0.5), (64, out_features, gain)
            first, second, last = (BatchedLinear(generators, *size) for size in sizes)
            return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

        self.actor = mlp(action_dim * num_bins, 0.01)
        self.critic = mlp(1, 1.0)
        self.action_shape = (action_dim, num_bins)

    def logits(self, obs: Tensor) -> Tensor:
        """(num_agents, batch, obs_dim) -> (num_agents, batch, action_dim, num_bins)"""
        return self.actor(obs).unflatten(-1, self.action_shape)

    def value(self, obs: Tensor) -> Tensor:
        """(num_agents, batch, obs_dim) -> (num_agents, batch)"""
        return self.critic(obs).squeeze(-1)


def logprob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-probability of the actions and entropy of the policy, both (...): sums over the action dimensions.
    logits: (..., action_dim, num_bins); actions: (..., action_dim), bin indices."""
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)
    return logprob, -(logp.exp() * logp).sum((-2, -1))


def symmetric_a2c_loss(logprob: Tensor, advantages: Tensor, alpha: float, beta: float, Z: float) -> Tensor:
    """alpha * L_a2c + beta * L_ra2c (Eq. 9), averaged over the last dimension: (..., batch) -> (...).
    logprob is the joint log-probability of the sampled actions under pi. The other actions' probabilities sum to
    1 - pi, so Eq. 7 is L_ra2c = -A Z (1 - pi). For A < 0 we use the same form, because the printed sign
    contradicts Eq. 33-34."""
    L_a2c = -advantages * logprob  # Eq. 16
    L_ra2c = advantages * Z * torch.expm1(logprob)  # Eq. 7; expm1(log pi) = -(1 - pi)
    return (alpha * L_a2c + beta * L_ra2c).mean(-1)  # Eq. 9


def gae(rewards, values, dones, last_value, gamma: float, gae_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation (Schulman et al. 2018): advantages and returns, both shaped like rewards.
    rewards, values, dones: (..., num_steps, num_envs). dones is true where an episode ended in that step; a time
    limit's bootstrap value is already in its reward. last_value: (..., num_envs), of the next observation."""
    next_values = np.concatenate([values[..., 1:, :], last_value[..., None, :]], axis=-2)
    deltas = rewards + gamma * next_values * ~dones - values
    decay = gamma * gae_lambda * ~dones
    advantages, advantage = np.zeros_like(values), np.zeros_like(last_value)
    for t in reversed(range(rewards.shape[-2])):
        advantages[..., t, :] = advantage = deltas[..., t, :] + decay[..., t, :] * advantage
    return advantages, advantages + values


@torch.enable_grad()
def backward(agent: Agent, batch: tuple[Tensor, ...], args: Args) -> dict[str, Tensor]:
    """Write every agent's clipped gradient on its own batch into p.grad; returns {tag: (num_agents,)} to log.
    batch: observations (num_agents, batch, obs_dim), actions (num_agents, batch, action_dim), and (num_agents, batch)
    of advantages and returns."""
    obs, actions, advantages, returns = batch
    logprob, entropy = logprob_and_entropy(agent.logits(obs), actions)
    policy_loss = symmetric_a2c_loss(logprob, advantages, args.alpha, args.beta, args.Z)
    value_loss = (agent.value(obs) - returns).square().mean(-1)  # as in Stable-Baselines3: no 0.5, no clipping
    entropy = entropy.mean(-1)
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy

    # Agents share no parameter: the gradient of the sum holds each agent's own gradient.
    params = list(agent.parameters())
    grads = [g.reshape(len(loss), -1) for g in torch.autograd.grad(loss.sum(), params)]  # (num_agents, parameters)
    grad_norm = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in grads]).norm(dim=0)
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1).unsqueeze(1)
    for p, g in zip(params, grads):
        p.grad = (g * scale).view_as(p)

    return {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/grad_norm": grad_norm,
    }


@torch.no_grad()
def train(args: Args, envs: Envs) -> list[dict]:
    """Train agents side by side, from the checkpoint in run_dir if there is one, and return their results."""
    start_time, commit = time.monotonic(), git_commit()
    torch.set_num_threads(args.num_threads)
    N, E, T = args.num_seeds, args.num_envs, args.num_steps  # agents, environments of each, steps of a rollout
    total_timesteps = -(-args.total_timesteps // (T * E)) * T * E

    generators = [torch.Generator().manual_seed(seed) for seed in args.seeds]  # an agent's own random numbers
    agent = Agent(generators, envs.obs_dim, envs.action_dim, args.num_bins).to(args.device)
    assert N == 1 or all(len(p) == N for p in agent.parameters()), "the first dimension of parameters is the agent's"
    optimizer = torch.optim.RMSprop(agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5, foreach=True)
    normalizer = Normalizer(N, E, envs.obs_dim, args.gamma)
    torch._dynamo.config.trace_autograd_ops = True  # forward and backward in one graph
    compiled_backward = torch.compile(backward, disable=not args.compile, options={"cpp_wrapper": not args.cuda})

    # A resumed run restores the state_dict() of every part, and the numbers, lists and tensors in progress.
    parts = {"agent": agent, "optimizer": optimizer, "normalizer": normalizer}
    progress = {"global_step": 0, "sps": None, "wall_seconds": 0.0, "generators": []}
    progress |= {"last_returns": [[] for _ in args.seeds], "eval_returns": None} | load_checkpoint(args, parts)
    for generator, state in zip(generators, progress["generators"]):
        generator.set_state(state)
    start_time -= progress["wall_seconds"]  # of the process or processes before
    first_step = global_step = progress["global_step"]
    if global_step == total_timesteps:  # only files may be missing
        save_models(args, agent, normalizer)
    logs = [RunLog(own_args.run_dir, global_step) for own_args in args.split()]
    failed, last_shown, train_seconds = np.zeros(N, bool), start_time, 0.0

    # One rollout of every agent; the agent is the first dimension everywhere.
    obs_buf = np.zeros((N, T, E, envs.obs_dim), np.float32)
    action_buf = np.zeros((N, T, E, envs.action_dim), np.int64)
    reward_buf, done_buf = np.zeros((N, T, E)), np.zeros((N, T, E), bool)
    episode_return, episode_length = np.zeros((N, E)), np.zeros((N, E))
    episodes, stats = [[] for _ in args.seeds], []  # since the last log
    tensor = partial(torch.as_tensor, device=args.device)
    raw_obs = envs.reset(args.seeds, TRAINING, global_step)  # a resumed run starts new episodes
    normalizer.count(raw_obs)
    obs = normalizer.obs(raw_obs)
    while global_step < total_timesteps:
        iteration_start = time.perf_counter()
        seed_globals(args.seed, TRAINING, global_step)  # so evaluations and stops do not change later draws

        # Rollout. argmax(logits + Gumbel noise) is a sample of the policy; the noise is drawn once per rollout.
        shape = (T, E, envs.action_dim, args.num_bins)
        gumbel = -torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators]).log().numpy()
        reward_noise = args.reward_noise_std * torch.stack([torch.randn(T, E, generator=g) for g in generators]).numpy()
        bootstrap = np.zeros((N, T, E), np.float32)
        for t in range(T):
            actions = (agent.logits(tensor(obs)).cpu().numpy() + gumbel[:, t]).argmax(-1)
            obs_buf[:, t], action_buf[:, t] = obs, actions
            raw_obs, reward_buf[:, t], terminated, truncated, final_obs = envs.step(actions)
            normalizer.count(raw_obs)
            obs = normalizer.obs(raw_obs)
            done_buf[:, t] = done = terminated | truncated
            episode_return += reward_buf[:, t]
            episode_length += 1
            if done.any():
                time_limit = truncated & ~terminated  # the return goes on: add gamma * V(final observation)
                if time_limit.any():
                    final_value = agent.value(tensor(normalizer.obs(final_obs))).cpu().numpy()
                    bootstrap[:, t][time_limit] = args.gamma * final_value[time_limit]
                for i, e in np.argwhere(done):
                    episodes[i].append((float(episode_return[i, e]), float(episode_length[i, e])))
                episode_return[done], episode_length[done] = 0, 0
        global_step += T * E

        # Advantages. The critic is still that of the rollout: one forward pass gives V for all of it.
        b_obs, b_actions = (tensor(x).flatten(1, 2) for x in (obs_buf, action_buf))
        values, last_value = agent.value(b_obs).view(N, T, E).cpu().numpy(), agent.value(tensor(obs)).cpu().numpy()
        rewards = (normalizer.rewards(reward_buf, done_buf) + reward_noise).astype(np.float32) + bootstrap
        advantages, returns = gae(rewards, values, done_buf, last_value, args.gamma, args.gae_lambda)
        batch = b_obs, b_actions, *(tensor(x).flatten(1, 2) for x in (advantages, returns))

        # Update
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.0, 1 - global_step / args.total_timesteps)
        stats.append(compiled_backward(agent, batch, args))
        optimizer.step()
        check_finite(args, global_step, stats[-1]["losses/grad_norm"].tolist(), normalizer, failed)  # waits for the GPU
        if global_step > first_step + T * E:  # the first iteration compiles
            train_seconds += time.perf_counter() - iteration_start

        # Evaluate, log, save
        finished = global_step == total_timesteps
        evaluate_now = finished or (args.eval_every and global_step % args.eval_every < T * E)
        if not evaluate_now and global_step % LOG_EVERY >= T * E:
            continue
        sps = (global_step - first_step - T * E) / max(train_seconds, 1e-9)  # of each agent
        if finished:  # before the evaluation, where an environment may fail
            save_models(args, agent, normalizer)
        if evaluate_now:
            progress["eval_returns"] = evaluate(args, agent, normalizer, None if finished else global_step).tolist()
        means = {tag: torch.stack([s[tag] for s in stats]).mean(0).tolist() for tag in stats[0]}
        unexplained = (returns - values).var((1, 2)) / (returns.var((1, 2)) + 1e-8)
        for i, log in enumerate(logs):
            metrics = {tag: mean[i] for tag, mean in means.items()} | {"losses/explained_variance": 1 - unexplained[i]}
            metrics |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps}
            if episodes[i]:
                metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes[i], axis=0)
            if evaluate_now:
                metrics["eval/episodic_return"] = np.mean(progress["eval_returns"][i])
            log.write(global_step, metrics)
            progress["last_returns"][i] = [*progress["last_returns"][i], *(r for r, _ in episodes[i])][-EVAL_EPISODES:]
        episodes, stats = [[] for _ in args.seeds], []
        progress |= {"global_step": global_step, "sps": sps, "wall_seconds": time.monotonic() - start_time}
        progress["generators"] = [g.get_state() for g in generators]
        save_checkpoint(args, parts, progress)
        if finished or time.monotonic() - last_shown > SHOW_EVERY:
            last_shown = time.monotonic()
            mean_return = np.mean([r for last in progress["last_returns"] for r in last] or [np.nan])
            left = timedelta(seconds=int((total_timesteps - global_step) / sps)) if sps else "?"
            line = f"{global_step / total_timesteps:4.0%}  step {global_step:,}  return {mean_return:.1f}"
            say(f"{line}  {sps:,.0f} steps/s per agent  {left} left")

    return save_results(args, progress, commit, logs)


@torch.no_grad()
def evaluate(args: Args, agent: Agent, normalizer: Normalizer, step: int | None = None) -> np.ndarray:
    """Raw returns (num_agents, eval_episodes), each of the first episode in an environment of its own, with the most
    likely bins and frozen statistics. Each evaluation during training has its own starts."""
    name, stream = ("final", (EVALUATION,)) if step is None else (f"step{step}", (EVALUATION, step))
    say(f"evaluation, {name}: {args.eval_episodes} episodes of every agent")
    with seed_globals(args.seed, *stream), closing(Envs(args, args.eval_episodes)) as envs:
        raw_obs = envs.reset(args.seeds, *stream)
        returns, running, steps = np.zeros(envs.shape), np.ones(envs.shape, bool), 0
        frames, last_shown = [], time.monotonic()
        while running.any() and steps < EVAL_MAX_STEPS:
            if args.capture_video and running[0, 0] and len(frames) == steps:  # all frames so far could be rendered
                with suppress(Exception):
                    frames.append(np.array(envs.envs[0].render()))  # a copy
            obs = torch.from_numpy(normalizer.obs(raw_obs)).to(args.device)
            actions = agent.logits(obs).argmax(-1).cpu().numpy()
            raw_obs, reward, terminated, truncated, _ = envs.step(actions, running)
            returns += reward
            running &= ~(terminated | truncated)
            steps += 1
            if time.monotonic() - last_shown > SHOW_EVERY:
                last_shown = time.monotonic()
                say(f"evaluation, {name}: step {steps:,}, {running.sum()} of {running.size} episodes still run")
    if running.any():
        say(f"evaluation: {running.sum()} episodes of {args.env_id} were cut off after {steps:,} steps")
    if args.capture_video:
        try:
            fps = envs.envs[0].metadata.get("render_fps") or 30
            import_module("gymnasium.utils.save_video").save_video(frames, f"{args.run_dir}/videos/{name}", fps=fps)
        except Exception as error:  # costs no result
            say(f"no video of evaluation {name}, after {len(frames)} frames: {error!r}", sys.stderr)
    for seed, agent_returns in zip(args.seeds, returns):
        say(f"seed {seed}: {agent_returns.mean():.1f} ({' '.join(f'{r:.1f}' for r in agent_returns)})")
    return returns


# Nothing below knows the algorithm.

RULES = """
--num-seeds >= 1, --num-envs >= 1, --num-steps >= 1, --num-threads >= 1, --num-bins >= 2, --eval-every >= 0
--eval-episodes >= 1, --num-envs * --num-steps <= --total-timesteps <= 10**12
0 <= --seed < 2**63, 0 <= --gamma <= 1, 0 <= --gae-lambda <= 1
0 < --alpha < inf, 0 <= --beta < inf, -inf < --Z < 0, 0 <= --reward-noise-std < inf, 0 < --learning-rate < inf
0 <= --ent-coef < inf, 0 <= --vf-coef < inf, 0 < --max-grad-norm < inf
"""  # of arguments, in the flags' spelling: the one that does not hold is the error message


def fail(message: object, code: int = 2) -> None:
    """End in one line, with code 2 for a wrong argument and 1 for other errors. A bug keeps Python's traceback."""
    say(f"error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(code)


def say(text: str, file=None) -> None:
    """Print; characters that the output lacks become escapes. A closed pipe, as behind | head, does not stop a run."""
    try:
        print(text, file=file, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode(), file)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def seed_globals(*stream: int) -> ExitStack:
    """Seed the global generators of Python, numpy and torch, because environments and layers may draw from them."""
    before = ExitStack()  # for use by with: its end restores the generators, from which a caller of run may draw
    before.callback(random.setstate, random.getstate())
    before.callback(np.random.set_state, np.random.get_state())
    before.callback(torch.set_rng_state, torch.get_rng_state())
    random.seed(repr(stream))
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(63))
    return before


def check_args(args: Args) -> None:
    for rule in RULES.strip().replace("\n", ", ").split(", "):
        values = re.sub(r"--([\w-]+)", lambda flag: str(getattr(args, flag[1].replace("-", "_"))), rule)
        if not eval(values, {"inf": np.inf, "nan": np.nan}):
            fail(f"{rule} must hold, and {values} does not")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda needs a CUDA device, and torch sees none")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and not any(metadata.distributions(name=package)):  # import also finds an empty folder
            fail(f"--{flag.replace('_', '-')} needs {package}: pip install {package}")


def try_out(args: Args, envs: Envs) -> None:
    """Play a step and render a frame, so that a faulty environment fails before training."""
    envs.reset(args.seeds, TRAINING)
    envs.step(np.zeros((*envs.shape, envs.action_dim), int))
    if args.capture_video:
        try:
            np.asarray(envs.envs[0].render(), np.uint8)
        except Exception as error:  # also numpy's, if this is no frame
            fail(f"--capture-video: {args.env_id} cannot be rendered: {error!r}. Without a display try MUJOCO_GL=egl")


def check_finite(args: Args, step: int, grad_norms: list[float], normalizer: Normalizer, failed: np.ndarray) -> None:
    """Mark agents whose loss is not finite in failed, print each once, and end if no other agent is left."""
    for i in np.flatnonzero(~np.isfinite(grad_norms) & ~failed):
        failed[i] = True
        reason = "the loss is not finite. Try a lower --learning-rate or a lower --beta"
        if not all(np.isfinite(normalizer.statistics[name][i]).all() for name in ("obs_var", "return_var")):
            reason = "the environment's observations or rewards are not finite"
        message = f"seed {args.seeds[i]} of {args.env_id} failed at step {step:,}: {reason}"
        if failed.all():
            fail(message, code=1)
        say(f"{message}; it leaves no result", sys.stderr)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write, then rename: a kill or a full disk leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


class RunLog:
    """TensorBoard and curves.csv of one agent. On resume, rows logged after the checkpoint are dropped."""

    def __init__(self, run_dir: str, global_step: int):
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        self.path, self.columns, self.lines = Path(run_dir, "curves.csv"), ["global_step"], []
        if self.path.exists():
            header, *lines = self.path.read_text().splitlines()
            self.columns = header.split(",")
            self.lines = [line for line in lines if "," in line and int(line.partition(",")[0]) <= global_step]

    def write(self, global_step: int, metrics: dict[str, float]) -> None:
        """Log {tag: value}, any tags; a new one gets a column of curves.csv."""
        new_tags = [tag for tag in metrics if tag not in self.columns]
        self.columns += new_tags
        self.lines = [line + "," * len(new_tags) for line in self.lines]
        row = {"global_step": str(global_step)} | {tag: f"{x:.6g}" for tag, x in metrics.items()}
        self.lines.append(",".join(row.get(tag, "") for tag in self.columns))
        write_atomic(self.path, "\n".join([",".join(self.columns), *self.lines, ""]).encode())
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step)
        self.writer.flush()  # before the next checkpoint, which counts these rows as written


def save_checkpoint(args: Args, parts: dict, progress: dict) -> None:
    state, buffer = {name: part.state_dict() for name, part in parts.items()}, io.BytesIO()
    torch.save(state | {"version": VERSION, "progress": progress}, buffer)
    write_atomic(Path(args.run_dir, "checkpoint.pt"), buffer.getbuffer())


def load_checkpoint(args: Args, parts: dict) -> dict:
    """Load the last checkpoint into parts and return its progress, or {} if there is none."""
    path = Path(args.run_dir, "checkpoint.pt")
    if not path.exists():
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        fail(f"{path} was written by version {state.get('version', 1)} of {SCRIPT}.py: continue it with that one")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["progress"]


def save_models(args: Args, agent: Agent, normalizer: Normalizer) -> None:
    """Write model.safetensors, all that an agent needs to act, for every agent whose numbers are finite."""
    for i, own_args in enumerate(args.split()):
        tensors = {"obs_mean": normalizer.obs_mean[i, 0], "obs_var": normalizer.obs_var[i, 0]}
        for name, x in agent.state_dict().items():
            tensors[name] = (x[i] if x.shape[:1] == (args.num_seeds,) else x).cpu().contiguous()
        if all(x.isfinite().all() for x in tensors.values()):
            content = safetensors.torch.save(tensors, {"script": SCRIPT, "args": json.dumps(asdict(own_args))})
            write_atomic(Path(own_args.run_dir, "model.safetensors"), content)


def save_results(args: Args, progress: dict, commit: str | None, logs: list[RunLog]) -> list[dict]:
    """Close the logs, write result.json for every agent that has a model, and return their contents."""
    modules = {name: sys.modules.get(name.replace("-", "_")) for name in PACKAGES}
    versions = {name: module.__version__ for name, module in modules.items() if module}
    results, failed = [], []
    agents = zip(args.split(), logs, progress["eval_returns"], progress["last_returns"])
    for own_args, log, returns, last in agents:
        log.writer.close()
        folder = Path(own_args.run_dir)
        if not (folder / "model.safetensors").exists():
            failed.append(str(own_args.seed))
            continue
        result = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "seed": own_args.seed,
            "args": asdict(own_args),
            "total_timesteps": progress["global_step"],
            "eval_returns": returns,
            "eval_mean": np.mean(returns),
            "train_last10_mean": np.mean(last) if last else None,
            "sps": progress["sps"] or None,
            "wall_seconds": progress["wall_seconds"],
            "versions": versions | {"python": sys.version.split()[0]},
            "commit": commit,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        }
        write_atomic(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        say(f"everything is in {folder}")
        results.append(result)
    if failed:
        fail(f"no result of seed {', '.join(failed)}: the loss is not finite", code=1)
    return results


def git_commit() -> str | None:
    """Commit of the repository that tracks this file, with "-dirty" if the file has changed; else None."""
    path = Path(__file__).resolve()
    git = """unset $(git rev-parse --local-env-vars)
        git cat-file -e "HEAD:./$0" && git rev-parse HEAD && git diff --quiet HEAD -- "$0" || echo -dirty"""
    done = subprocess.run(["sh", "-c", git, path.name], cwd=path.parent, capture_output=True, text=True)
    return "".join(done.stdout.split()).removeprefix("-dirty") or None


def saved_args(path: Path, script: str | None, saved: dict) -> Args:
    """Arguments of the run or model in path; missing ones get their defaults, unknown ones are ignored."""
    if script != SCRIPT:
        fail(f"{path} is of {script or 'something else'}, not of {SCRIPT}")
    return Args(**{name: value for name, value in saved.items() if name in vars(Args())})


def open_run(args: Args) -> tuple[Args, object]:
    """Make the run directory, or take that of --resume, lock it; returns the run's arguments and the lock, a file."""
    run_dir = Path(args.resume or args.run_dir).absolute()
    try:
        str(run_dir).encode()  # TensorBoard needs names in UTF-8
        if args.resume is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(run_dir.iterdir()):
                fail(f"--run-dir {run_dir} is in use: name another, or try --resume {shlex.quote(str(run_dir))}")
        file = os.open(run_dir / "args.json", os.O_RDWR | (os.O_CREAT if args.resume is None else 0), 0o666)
    except (OSError, UnicodeError) as error:
        fail(f"{run_dir} cannot be opened as a run directory: {getattr(error, 'strerror', error)}")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # other errors: this file system has no locks, go on without
            fail(f"{run_dir} is being trained by another process")
    if args.resume is None:
        os.write(file, json.dumps({"script": SCRIPT, "args": asdict(args)}, indent=2, default=np.generic.item).encode())
    saved = json.loads(os.pread(file, 2**20, 0) or "{}")  # a kill in the first moment leaves it empty
    return replace(saved_args(run_dir, saved.get("script"), saved.get("args")), run_dir=str(run_dir)), os.fdopen(file)


def load_model(path: str, capture_video: bool = False, cuda: bool = False) -> tuple[Args, Agent, Normalizer]:
    """Load a trained agent from its run directory or model.safetensors; returns the arguments of evaluate."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        fail(f"--evaluate {file}: no such .safetensors file. A run leaves it at its end, a batch one in every seed<k>/")
    with safetensors.safe_open(file, "pt") as model:
        saved, tensors = model.metadata() or {}, {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118
    args = saved_args(file, saved.get("script"), json.loads(saved.get("args", "{}")))
    args = replace(args, run_dir=str(file.parent.absolute()), capture_video=capture_video, cuda=cuda)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    with closing(Envs(args, 1)) as envs:
        agent = Agent([torch.Generator()], envs.obs_dim, envs.action_dim, args.num_bins).to(args.device)
        normalizer = Normalizer(1, 1, envs.obs_dim, args.gamma)
    normalizer.load_state_dict({name: tensors.pop(name)[None, None] for name in ("obs_mean", "obs_var")}, strict=False)
    shapes = {name: x.shape for name, x in agent.state_dict().items()}  # a saved agent has no agent dimension
    agent.load_state_dict({name: x.reshape(shapes.get(name, x.shape)) for name, x in tensors.items()})
    return args, agent, normalizer


def run(args: Args, given: set[str] | None = None) -> list[dict]:
    """Do what the command line does: check args, train in a run directory, return the results; or --resume, --evaluate.
    given: the flags on the command line; by default those whose value is not the default."""
    if given is None:
        given = {f"--{name.replace('_', '-')}" for name, x in vars(args).items() if x != getattr(Args, name)}
    for flag, others in (("--resume", set()), ("--evaluate", {"--capture-video", "--cuda", "--no-cuda"})):
        if flag in given and (extra := given - others - {flag}):
            fail(f"{flag} takes its arguments from the run: drop {', '.join(sorted(extra))}")
    if args.evaluate is not None:
        evaluated = evaluate(*load_model(args.evaluate, args.capture_video, args.cuda))
        return [{"eval_returns": returns, "eval_mean": np.mean(returns)} for returns in evaluated.tolist()]
    if args.resume is not None:
        args, _lock = open_run(args)
        results = [Path(own.run_dir, "result.json") for own in args.split()]
        if all(path.exists() for path in results):
            say(f"{args.run_dir} has finished; --evaluate plays its final evaluation again")
            return [json.loads(path.read_text()) for path in results]
    check_args(args)
    name = f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    args = replace(args, run_dir=os.path.abspath(args.run_dir or f"runs/{name}"))  # environments may change directory
    try:
        with seed_globals(args.seed), closing(Envs(args, args.num_envs)) as envs:
            try_out(args, envs)
            if "--resume" not in given:
                args, _lock = open_run(args)
            if args.track:
                settings = {"dir": args.run_dir, "config": asdict(args), "sync_tensorboard": True, "resume": "auto"}
                import_module("wandb").init(**settings, reinit="finish_previous")  # of an earlier run()
            resume = shlex.join([sys.executable, __file__, "--resume", args.run_dir])
            say(f"run directory {args.run_dir}; if it stops, continue with: {resume}")
            return train(args, envs)
    except KeyboardInterrupt:
        fail("stopped", code=130)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        if getattr(error, "errno", errno.ENOSPC) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # neither the disk nor the memory is full
        fail(f"{args.run_dir}: {str(error) or type(error).__name__}", code=1)


def main() -> None:
    for name in ("stdin", "stdout", "stderr"):  # reopen closed ones: no file of the run may get descriptor 0, 1 or 2
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    flags = {word.partition("=")[0].replace("_", "-") for word in sys.argv[1:] if word.startswith("--")}
    run(tyro.cli(Args, description=__doc__), flags)


if __name__ == "__main__":
    main()
