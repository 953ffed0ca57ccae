# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[box2d,mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "Box2D==2.3.10",
#     "numpy==2.4.6",
#     "safetensors==0.8.0",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
# ]
# ///
"""Symmetric PPO (SPPO) for continuous control with discretized actions, the paper's DSPPO.

    python sppo_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1
    python sppo_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1 --alpha 1 --beta 0  # DPPO, the baseline

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
Arrays have a leading agent dimension: --num-seeds N trains N independent agents side by side in one process.
"""

import csv
import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import distributions
from importlib.util import find_spec
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
VERSION = 2  # of the format of checkpoint.pt
EVAL_EPISODES = 10
EVAL_MAX_STEPS = 20_000  # of an episode in an environment without a time limit
LOG_EVERY = 2048  # steps
TRAINING, EVALUATION = 0, 1  # streams of environment seeds
PACKAGES = ("torch", "gymnasium", "mujoco", "Box2D", "numpy")  # their versions go into result.json


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of an environment with a bounded Box action space
    total_timesteps: int = 2_000_000  # environment steps of each seed, rounded up to whole rollouts (Table 6)
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained side by side, with seeds seed .. seed + num_seeds - 1
    alpha: float = 0.5  # weight of the PPO loss in Eq. 9
    beta: float = 20.0  # weight of the reverse PPO loss in Eq. 9; alpha 1 and beta 0 is plain PPO
    Z: float = -1.0  # the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters
    num_bins: int = 11  # bins per action dimension, evenly spaced from low to high inclusive
    reward_noise_std: float = 0.0  # of the Gaussian noise on normalized training rewards (the paper's noise: 0.05)

    learning_rate: float = 3e-4  # Adam's learning rate
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    num_envs: int = 1  # environments of each agent
    num_steps: int = 2048  # steps per environment and rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # epochs per rollout
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # PPO's epsilon (Eq. 3)
    anneal_clip: bool = False  # lower the clip range linearly to 0
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global gradient norm above which gradients are scaled down

    run_dir: str | None = None  # default runs/<env>__<script>__<seed>__<time>; with several seeds, parent of seed<k>/
    resume: str | None = None  # run directory to continue; all other arguments come from the run
    evaluate: str | None = None  # run directory or model.safetensors to evaluate instead of training
    eval_every: int = 0  # steps between evaluations during training; 0: only the final one
    checkpoint_every: int = 100_000  # steps between checkpoints
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project_name: str = "symmetric-rl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    capture_video: bool = False  # record the first episode of every evaluation (pip install moviepy)
    compile: bool = False  # compile the gradient computation with torch.compile (needs a C++ compiler)
    cuda: bool = False  # use a GPU; for one agent of this size the CPU is faster
    num_threads: int = 1  # CPU threads of torch; networks this small gain nothing from more


class Stop(Exception):
    """Ends the script in one line: exit code 2 for a wrong argument, 1 for what a run can meet, such as a full disk."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def require(condition: bool, message: str, code: int = 2) -> None:
    if not condition:
        raise Stop(message, code)


def make_env(env_id: str, video_dir: Path | None = None) -> gym.Env:
    """One environment with flat observations; with video_dir, its first episode is recorded there."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's MuJoCo ids are v4
    # MuJoCo's own handler also writes MUJOCO_LOG.TXT into the working directory.
    mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(f"MuJoCo: {text}", file=sys.stderr))
    env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video_dir else {}))
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda episode: episode == 0)
    space = env.observation_space
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return env if flat else gym.wrappers.FlattenObservation(env)


class Envs(gym.vector.SyncVectorEnv):
    """Environments that reset within the step that ends an episode, so that no transition is junk.

    SyncVectorEnv's own bookkeeping takes four times as long: of all infos only final_obs, the observations before any
    reset, are collected here.
    """

    def reset(self, seed: list[int]):
        return np.array([env.reset(seed=s)[0] for env, s in zip(self.envs, seed)]), {}

    def step(self, actions: np.ndarray):
        obs, final_obs, rewards, terminated, truncated = [], [], [], [], []
        for env, action in zip(self.envs, actions):
            last_obs, reward, is_terminated, is_truncated, _ = env.step(action)
            done = is_terminated or is_truncated
            final_obs.append(np.copy(last_obs) if done else last_obs)  # reset may write into the same array
            obs.append(env.reset()[0] if done else last_obs)
            rewards.append(reward)
            terminated.append(is_terminated)
            truncated.append(is_truncated)
        infos = {"final_obs": np.array(final_obs)}
        return np.array(obs), np.array(rewards), np.array(terminated, bool), np.array(truncated, bool), infos


def make_envs(env_id: str, num_envs: int, video_dirs: Sequence[Path] = ()) -> Envs:
    """num_envs environments. With video_dirs, one per agent, the first environment of each agent is recorded."""
    videos = {i * num_envs // len(video_dirs): video_dir for i, video_dir in enumerate(video_dirs)}
    return Envs([lambda i=i: make_env(env_id, videos.get(i)) for i in range(num_envs)])


def env_seeds(seeds: list[int], num_envs: int, *stream: int) -> list[int]:
    """Seeds of num_envs environments per agent; another stream (evaluation, a resumed run) gives other seeds."""
    return [int(s) for seed in seeds for s in np.random.SeedSequence([seed, *stream]).generate_state(num_envs)]


def action_bins(space: gym.spaces.Box, num_bins: int) -> np.ndarray:
    """Grid of (num_bins, action_dim) action values, evenly spaced from low to high inclusive (Section 5.2)."""
    return np.linspace(space.low.flatten(), space.high.flatten(), num_bins, dtype=space.dtype)


class RunningMeanStd:
    """Running mean and variance per agent; batches are merged by Chan et al.'s formula, as in Stable-Baselines3."""

    def __init__(self, num_agents: int, *shape: int):
        self.mean = np.zeros((num_agents, *shape))
        self.var = np.ones((num_agents, *shape))
        self.count = np.full((num_agents, *[1] * len(shape)), 1e-4)

    def update(self, x: np.ndarray) -> None:
        """Take in x: (num_agents, batch, *shape)."""
        batch_mean = x.sum(1) / x.shape[1]
        batch_var = np.square(x - batch_mean[:, None]).sum(1) / x.shape[1]
        delta = batch_mean - self.mean
        self.count = self.count + x.shape[1]
        weight = x.shape[1] / self.count
        self.mean = self.mean + weight * delta
        self.var = self.var + weight * (batch_var - self.var + (1 - weight) * np.square(delta))


class Normalizer:
    """Observation and reward normalization of Stable-Baselines3's VecNormalize, one per agent (eps 1e-8, clip 10)."""

    def __init__(self, num_agents: int, num_envs: int, obs_dim: int, gamma: float):
        self.obs_rms = RunningMeanStd(num_agents, obs_dim)
        self.return_rms = RunningMeanStd(num_agents)
        self.returns = np.zeros((num_agents, num_envs))  # discounted return so far of the running episodes
        self.gamma = gamma

    def obs(self, obs: np.ndarray, update: bool = True) -> np.ndarray:
        """Normalize obs: (num_agents, num_envs, obs_dim) to float32, after counting them in where update is set."""
        if update:
            self.obs_rms.update(obs)
        mean, std = self.obs_rms.mean[:, None], np.sqrt(self.obs_rms.var + 1e-8)[:, None]
        return ((obs - mean) / std).clip(-10, 10).astype(np.float32)

    def reward(self, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Divide reward: (num_agents, num_envs) by the running std of the discounted return; no mean is subtracted."""
        self.returns = self.returns * self.gamma + reward
        self.return_rms.update(self.returns)
        self.returns[done] = 0
        return (reward / np.sqrt(self.return_rms.var + 1e-8)[:, None]).clip(-10, 10)


class BatchedLinear(nn.Module):
    """One linear layer per agent: (num_agents, batch, in_features) -> (num_agents, batch, out_features)."""

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
            return nn.Sequential(
                BatchedLinear(generators, obs_dim, 64, 2**0.5),
                nn.Tanh(),
                BatchedLinear(generators, 64, 64, 2**0.5),
                nn.Tanh(),
                BatchedLinear(generators, 64, out_features, gain),
            )

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

    logits: (..., action_dim, num_bins); actions: (..., action_dim), bin indices.
    """
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)
    return logprob, -(logp.exp() * logp).sum((-2, -1))


def symmetric_ppo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    clip_coef: float | Tensor,
    alpha: float,
    beta: float,
    Z: float,
) -> Tensor:
    """alpha * L_ppo + beta * L_rppo (Eq. 9), averaged over the last dimension: (..., batch) -> (...).

    logprob and old_logprob are joint log-probabilities of the sampled actions under pi and pi_old. The reverse loss
    is Eq. 8 with the aligned sign for A < 0 (Eq. 33-34): one form, L_rppo = -A Z (1 - pi) / pi_old, for both signs,
    since the other actions' probabilities sum to 1 - pi. Its constant part -A Z / pi_old is left out of the value:
    it has no gradient, and its size (11^17 with 17 action dimensions) would bury everything else.
    """
    ratio = (logprob - old_logprob).exp()  # r_t of Eq. 3
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    L_ppo = -torch.min(unclipped, clipped)  # Eq. 3
    active = unclipped <= clipped  # samples that still have a PPO gradient (Section A.4)
    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8
    return (alpha * L_ppo + beta * L_rppo).mean(-1)  # Eq. 9


def gae(
    rewards: np.ndarray, values: np.ndarray, dones: np.ndarray, last_value: np.ndarray, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation (Schulman et al. 2018): advantages and returns, (num_steps, ...) like rewards.

    dones[t] is true where an episode ended in step t; a time limit's bootstrap value is already in rewards[t].
    last_value: (...), value of the observation after the last step.
    """
    next_values = np.concatenate([values[1:], last_value[None]])
    deltas = rewards + gamma * next_values * ~dones - values
    decay = gamma * gae_lambda * ~dones
    advantages = np.zeros_like(values)
    advantage = np.zeros_like(last_value)
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + decay[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


@torch.enable_grad()
def gradients(
    agent: Agent, batch: Sequence[Tensor], clip_coef: Tensor, args: Args
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Clipped gradients of every agent on a minibatch of its own, and its losses as {tag: (num_agents,)}.

    batch: observations (num_agents, batch, obs_dim), actions (num_agents, batch, action_dim), and (num_agents, batch)
    of old log-probabilities, advantages and returns.
    """
    obs, actions, old_logprob, advantages, returns = batch
    logprob, entropy = logprob_and_entropy(agent.logits(obs), actions)
    normalized = advantages
    if args.norm_adv:
        normalized = (advantages - advantages.mean(-1, keepdim=True)) / (advantages.std(-1, keepdim=True) + 1e-8)
    policy_loss = symmetric_ppo_loss(logprob, old_logprob, normalized, clip_coef, args.alpha, args.beta, args.Z)
    value_loss = (agent.value(obs) - returns).square().mean(-1)  # as in Stable-Baselines3: no 0.5, no clipping
    entropy = entropy.mean(-1)
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy

    # Agents share no parameter: the gradient of the sum holds each agent's own gradient.
    grads = torch.autograd.grad(loss.sum(), list(agent.parameters()))
    flat = [g.reshape(len(loss), -1) for g in grads]  # (num_agents, parameters of an agent)
    grad_norm = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat]).norm(dim=0)
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1).unsqueeze(1)

    logratio = logprob.detach() - old_logprob
    return [(f * scale).view_as(g) for f, g in zip(flat, grads)], {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/approx_kl": (logratio.exp() - 1 - logratio).mean(-1),
        "losses/clipfrac": ((logratio.exp() - 1).abs() > clip_coef).float().mean(-1),
        "losses/sign_flips": ((advantages > 0) != (normalized > 0)).float().mean(-1),  # Figure 2
        "losses/grad_norm": grad_norm,
    }


class Learner:
    """All agents with what a checkpoint holds of them: networks, optimizer, normalization, random numbers.

    With several agents the first dimension of every parameter and buffer is the agent's; that of one agent may have
    any shape.
    """

    def __init__(self, args: Args, seeds: Sequence[int], obs_dim: int, action_dim: int):
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.agent = Agent(self.generators, obs_dim, action_dim, args.num_bins).to(self.device)
        for name, x in self.agent.state_dict().items():
            if len(seeds) > 1 and x.shape[:1] != (len(seeds),):
                raise ValueError(f"{name} of shape {tuple(x.shape)} has no dimension for {len(seeds)} agents")
        self.optimizer = torch.optim.Adam(self.agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        self.normalizer = Normalizer(len(seeds), args.num_envs, obs_dim, args.gamma)

    def draw(self, *shape: int, kind: str) -> Tensor:
        """Random numbers (shape[0], num_agents, *shape[1:]), each agent's from its own generator."""
        return torch.stack([getattr(torch.empty(shape), kind)(generator=g) for g in self.generators], dim=1)

    def state(self) -> dict:
        statistics = {name: vars(getattr(self.normalizer, name)) for name in ("obs_rms", "return_rms")}
        return {
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "normalizer": {name: {k: torch.from_numpy(v) for k, v in s.items()} for name, s in statistics.items()},
            "generators": [g.get_state() for g in self.generators],
        }

    def load_networks(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Take over tensors from path, with or without the dimension of one agent. Raises Stop if they do not fit."""
        own = self.agent.state_dict()
        try:
            tensors = {k: x.reshape(own[k].shape) if k in own else x for k, x in tensors.items()}
            self.agent.load_state_dict(tensors)
        except RuntimeError as error:
            raise Stop(f"{path} does not fit the networks of this {SCRIPT}.py: {error}") from None

    def load_state(self, state: dict, path: Path) -> None:
        self.load_networks(state["agent"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, statistics in state["normalizer"].items():
            vars(getattr(self.normalizer, name)).update({k: v.numpy() for k, v in statistics.items()})
        for generator, generator_state in zip(self.generators, state["generators"]):
            generator.set_state(generator_state)


def agent_first(x: np.ndarray, device: torch.device) -> Tensor:
    """(num_steps, num_agents, num_envs, ...) -> (num_agents, num_steps * num_envs, ...)"""
    return torch.from_numpy(x).to(device).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def train(args: Args, run_dir: Path) -> None:
    """Train agents side by side, from the checkpoint in run_dir where there is one; each leaves a result.json."""
    start_time, commit = time.monotonic(), git_commit()
    torch.set_num_threads(args.num_threads)
    N, E, T = args.num_seeds, args.num_envs, args.num_steps
    seeds = seed_dirs(args, run_dir)  # {seed: directory}
    rollout_size = T * E
    total_timesteps = -(-args.total_timesteps // rollout_size) * rollout_size

    envs = make_envs(args.env_id, N * E)
    bins = action_bins(envs.single_action_space, args.num_bins)  # (num_bins, action_dim)
    action_dim, obs_dim = bins.shape[1], envs.single_observation_space.shape[0]
    learner = Learner(args, seeds, obs_dim, action_dim)
    agent, normalizer, device = learner.agent, learner.normalizer, learner.device
    clip_coef = torch.tensor(args.clip_coef, device=device)
    counters = {"global_step": 0, "train_steps": 0, "train_seconds": 0.0, "wall_seconds": 0.0}
    counters |= {"last_returns": [[] for _ in seeds], "curves": [[] for _ in seeds]}
    counters |= load_checkpoint(run_dir, learner)
    start_time -= counters["wall_seconds"]  # of the process or processes before
    first_step = global_step = counters["global_step"]
    logs = []
    for (seed, seed_dir), rows in zip(seeds.items(), counters["curves"]):
        logs.append(RunLog(seed_dir, replace(args, seed=seed, num_seeds=1), rows, global_step))  # rows: for checkpoints
    progress = Progress(total_timesteps, "step")
    stop_signals = collect_signals()
    failed = np.zeros(N, bool)  # agents whose loss is not finite any more

    torch._dynamo.config.trace_autograd_ops = True  # forward and backward in one graph
    compute_gradients = torch.compile(gradients, disable=not args.compile)

    obs_buf = np.zeros((T, N, E, obs_dim), np.float32)
    action_buf = np.zeros((T, N, E, action_dim), np.int64)
    reward_buf, done_buf = np.zeros((T, N, E), np.float32), np.zeros((T, N, E), bool)
    episode_return, episode_length = np.zeros((N, E)), np.zeros((N, E))
    episodes, stats, last_log = [[] for _ in seeds], [], global_step  # since the last log

    raw_obs, _ = envs.reset(seed=env_seeds(seeds, E, TRAINING, global_step))  # a resumed run has other episodes
    obs = normalizer.obs(raw_obs.reshape(N, E, obs_dim), update=global_step < total_timesteps)
    while global_step < total_timesteps and not stop_signals:
        iteration_start = time.perf_counter()

        # Rollout. argmax(logits + Gumbel noise) is a sample of the policy; the noise is drawn once per rollout.
        gumbel = -learner.draw(T, E, action_dim, args.num_bins, kind="exponential_").log().to(device)
        noise = args.reward_noise_std * learner.draw(T, E, kind="normal_").numpy()
        for t in range(T):
            actions = (agent.logits(torch.from_numpy(obs).to(device)) + gumbel[t]).argmax(-1).cpu().numpy()
            obs_buf[t], action_buf[t] = obs, actions
            action_values = bins[actions, np.arange(action_dim)].reshape(envs.action_space.shape)
            raw_obs, raw_reward, terminated, truncated, infos = envs.step(action_values)
            raw_obs, raw_reward = raw_obs.reshape(N, E, obs_dim), raw_reward.reshape(N, E)
            done = (terminated | truncated).reshape(N, E)
            obs = normalizer.obs(raw_obs)
            reward_buf[t] = normalizer.reward(raw_reward, done) + noise[t]
            done_buf[t] = done
            episode_return += raw_reward
            episode_length += 1
            if done.any():
                time_limit = (truncated & ~terminated).reshape(N, E)
                if time_limit.any():  # truncated, not terminated: add gamma * V(final observation)
                    final_obs = normalizer.obs(infos["final_obs"].reshape(N, E, obs_dim), update=False)
                    final_value = agent.value(torch.from_numpy(final_obs).to(device)).cpu().numpy()
                    reward_buf[t][time_limit] += args.gamma * final_value[time_limit]
                for i, e in np.argwhere(done):
                    episodes[i].append((episode_return[i, e], episode_length[i, e]))
                    counters["last_returns"][i].append(float(episode_return[i, e]))
                episode_return[done], episode_length[done] = 0, 0

        # Advantages. The policy is still that of the rollout: one forward pass gives pi_old and V for all of it.
        b_obs, b_actions = (agent_first(x, device) for x in (obs_buf, action_buf))
        b_logprob, _ = logprob_and_entropy(agent.logits(b_obs), b_actions)
        values = agent.value(b_obs).unflatten(1, (T, E)).transpose(0, 1).cpu().numpy()
        last_value = agent.value(torch.from_numpy(obs).to(device)).cpu().numpy()
        advantages, returns = gae(reward_buf, values, done_buf, last_value, args.gamma, args.gae_lambda)
        b_advantages, b_returns = (agent_first(x, device) for x in (advantages, returns))

        # Update
        global_step += rollout_size
        remaining = max(0.0, 1 - global_step / args.total_timesteps)
        if args.anneal_lr:
            learner.optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        if args.anneal_clip:
            clip_coef.fill_(args.clip_coef * remaining)
        for _ in range(args.update_epochs):
            order = torch.stack([torch.randperm(rollout_size, generator=g) for g in learner.generators]).to(device)
            agents = torch.arange(N, device=device).unsqueeze(1)
            shuffled = (x[agents, order] for x in (b_obs, b_actions, b_logprob, b_advantages, b_returns))
            for minibatch in zip(*(x.chunk(args.num_minibatches, dim=1) for x in shuffled)):
                grads, losses = compute_gradients(agent, minibatch, clip_coef, args)
                for p, g in zip(agent.parameters(), grads):
                    p.grad = g
                learner.optimizer.step()
                stats.append(losses)

        check_finite(args, global_step, stats[-1]["losses/grad_norm"].tolist(), failed, learner)  # waits for the GPU
        counters["global_step"] = global_step
        counters["wall_seconds"] = time.monotonic() - start_time
        if global_step > first_step + rollout_size or not args.compile:  # the first iteration compiles
            counters["train_steps"] += rollout_size
            counters["train_seconds"] += time.perf_counter() - iteration_start

        # Evaluate, log, save
        sps = counters["train_steps"] / max(counters["train_seconds"], 1e-9)
        eval_returns = None
        if args.eval_every and global_step % args.eval_every < rollout_size and global_step < total_timesteps:
            eval_returns = evaluate(learner, args, run_dir, global_step)
        if global_step - last_log >= LOG_EVERY or global_step == total_timesteps or eval_returns is not None:
            means = {tag: torch.stack([s[tag] for s in stats]).mean(0).tolist() for tag in stats[0]}
            unexplained = (returns - values).var((0, 2)) / (returns.var((0, 2)) + 1e-8)
            for i, log in enumerate(logs):
                metrics = {tag: mean[i] for tag, mean in means.items()}
                metrics["losses/explained_variance"] = 1 - unexplained[i]
                metrics["charts/learning_rate"] = learner.optimizer.param_groups[0]["lr"]
                metrics["charts/SPS"] = sps
                if episodes[i]:
                    metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes[i], axis=0)
                if eval_returns is not None:
                    metrics["eval/episodic_return"] = eval_returns[i].mean()
                log.write(global_step, metrics)
            episodes, stats, last_log = [[] for _ in seeds], [], global_step
        counters["last_returns"] = [last[-EVAL_EPISODES:] for last in counters["last_returns"]]
        mean_return = np.mean([r for last in counters["last_returns"] for r in last] or [np.nan])
        progress.show(global_step, sps, f"return {mean_return:.1f}  {N * sps:,.0f} steps/s")
        if global_step % args.checkpoint_every < rollout_size or global_step == total_timesteps or stop_signals:
            save_checkpoint(run_dir, learner, counters)

    for number in (signal.SIGINT, signal.SIGTERM):  # from here on a stop loses nothing
        signal.signal(number, signal.default_int_handler)
    envs.close()
    if stop_signals:
        raise KeyboardInterrupt
    eval_returns = evaluate(learner, args, run_dir)
    counters["wall_seconds"] = time.monotonic() - start_time
    save_results(learner, args, logs, eval_returns, counters, commit)


@torch.no_grad()
def evaluate(learner: Learner, args: Args, run_dir: Path, step: int | None = None) -> np.ndarray:
    """Raw returns (num_agents, 10) of the first episode in each of 10 environments of its own per agent.

    The most likely bin of every action dimension is taken, and the normalization statistics are frozen. An evaluation
    during training, at a step, has starts of its own. With args.capture_video each agent's first episode is recorded.
    """
    name = "final" if step is None else f"step{step}"
    stream = (EVALUATION,) if step is None else (EVALUATION, step)
    seeds = seed_dirs(args, run_dir)
    videos = [seed_dir / "videos" / name for seed_dir in seeds.values()] if args.capture_video else []
    envs = make_envs(args.env_id, len(seeds) * EVAL_EPISODES, videos)
    bins = action_bins(envs.single_action_space, args.num_bins)
    raw_obs, _ = envs.reset(seed=env_seeds(seeds, EVAL_EPISODES, *stream))
    returns = np.zeros(envs.num_envs)
    running, steps = np.ones(envs.num_envs, dtype=bool), 0
    while running.any() and steps < EVAL_MAX_STEPS:
        obs = learner.normalizer.obs(raw_obs.reshape(len(seeds), EVAL_EPISODES, -1), update=False)
        actions = learner.agent.logits(torch.from_numpy(obs).to(learner.device)).argmax(-1).cpu().numpy()
        action_values = bins[actions, np.arange(bins.shape[1])].reshape(envs.action_space.shape)
        raw_obs, reward, terminated, truncated, _ = envs.step(action_values)
        returns += reward * running
        running &= ~(terminated | truncated)
        steps += 1
    envs.close()
    if running.any():
        print(f"evaluation: {running.sum()} episodes of {args.env_id} were cut off after {steps:,} steps")
    return returns.reshape(len(seeds), EVAL_EPISODES)


def load_model(path: Path) -> tuple[Args, Learner]:
    """Arguments and agent of a saved model, a file or in a run directory. Raises Stop when it is none of ours."""
    if runs := sorted(path.glob("seed*/model.safetensors")):
        raise Stop(f"{path} holds the runs of several seeds: name one, such as {runs[0].parent}")
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        script, saved = metadata.get("script"), json.loads(metadata.get("args", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Stop(f"{path} cannot be read as a model, which a run leaves when it has finished ({error})") from None
    args = saved_args(path, script, saved)
    require(all(x.isfinite().all() for x in tensors.values()), f"{path} holds values that are not finite")
    obs_dim, action_dim = check_env(args)
    learner = Learner(args, [args.seed], obs_dim, action_dim)
    statistics = [tensors.pop(name, torch.empty(0)).numpy() for name in ("obs_mean", "obs_var")]
    fits = all(x.shape == (obs_dim,) for x in statistics)
    require(fits, f"{path} holds no statistics of the {obs_dim} observations of {args.env_id}")
    learner.normalizer.obs_rms.mean, learner.normalizer.obs_rms.var = (x[None] for x in statistics)
    learner.load_networks(tensors, path)
    return args, learner


def collect_signals() -> list[int]:
    """Ctrl-C and SIGTERM go into the returned list, so that the rollout ends with a checkpoint; a second one kills."""
    received = []

    def handler(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return received


def check_finite(args: Args, step: int, grad_norms: list[float], failed: np.ndarray, learner: Learner) -> None:
    """Mark in failed the agents whose loss is not finite, and name each once. Raises Stop when none is left."""
    for i in np.flatnonzero(~np.isfinite(grad_norms) & ~failed):
        failed[i] = True
        reason = "the loss is not finite. Try a lower --learning-rate or a lower --beta"
        statistics = [learner.normalizer.return_rms.var[i], *learner.normalizer.obs_rms.var[i]]
        if not np.isfinite(statistics).all():  # they have seen every observation and reward
            reason = "the environment's observations or rewards are not finite"
        message = f"seed {args.seed + i} of {args.env_id} failed at step {step:,}: {reason}"
        require(not failed.all(), message, code=1)
        print(f"{message}; it leaves no result", file=sys.stderr)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write, then rename: a kill or a full disk leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def seed_dirs(args: Args, run_dir: Path) -> dict[int, Path]:
    """Every seed and the directory of its results."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    return {seed: run_dir / f"seed{seed}" if args.num_seeds > 1 else run_dir for seed in seeds}


def create_run_dir(args: Args, run_dir: Path) -> None:
    """Make run_dir with args.json in it. Raises Stop when it is in use or cannot be made."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        in_use = f"--run-dir {run_dir} is in use: continue it with --resume {run_dir}, or name another"
        require(not any(run_dir.iterdir()), in_use)
        write_json(run_dir / "args.json", {"script": SCRIPT, "args": asdict(args) | {"run_dir": str(run_dir)}})
    except OSError as error:
        raise Stop(f"--run-dir {run_dir} cannot be made: {error.strerror}") from None


def open_run_dir(run_dir: Path) -> Args:
    """Arguments of the run in run_dir. Raises Stop when there is none of this script."""
    path = run_dir / "args.json"
    version_1 = not path.exists() and any(run_dir.glob("seed*/args.json"))
    require(not version_1, f"{run_dir} was begun by version 1 of {SCRIPT}.py: continue it with that one")
    require(path.exists(), f"{run_dir} holds no run: there is no args.json in it")
    try:
        content = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise Stop(f"{path} is damaged") from None
    return saved_args(path, content.get("script"), content.get("args"))


def saved_args(path: Path, script: str | None, saved: dict) -> Args:
    """Arguments of a run or model; new ones get their defaults. Raises Stop where they do not fit this script."""
    require(script == SCRIPT, f"{path} is of {script or 'something else'}, not of {SCRIPT}")
    require(isinstance(saved, dict), f"{path} is damaged")
    unknown = ", ".join(saved.keys() - {f.name for f in fields(Args)})
    require(not unknown, f"{path} was written by a version of {SCRIPT}.py with other arguments: {unknown}")
    return Args(**saved)


def changed_args(saved: Args, *allowed: str) -> Args:
    """Saved arguments with the command line's over them. Raises Stop when others than allowed change."""
    args = tyro.cli(Args, description=__doc__, default=saved)
    changed = [f.name for f in fields(Args) if getattr(args, f.name) != getattr(saved, f.name)]
    extra = ", ".join("--" + name.replace("_", "-") for name in changed if name not in allowed)
    require(not extra, f"--{allowed[0]} takes its arguments from the run: drop {extra}")
    return args


def save_checkpoint(run_dir: Path, learner: Learner, counters: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "learner": learner.state(), "counters": counters}, buffer)
    write_atomic(run_dir / "checkpoint.pt", buffer.getbuffer())


def load_checkpoint(run_dir: Path, learner: Learner) -> dict:
    """Load the run's last checkpoint into learner and return its counters, {} before the first. May raise Stop."""
    path = run_dir / "checkpoint.pt"
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        return {}
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, pickle.UnpicklingError) as error:
        raise Stop(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    version = checkpoint.get("version", 1)
    require(version == VERSION, f"{path} was written by version {version} of {SCRIPT}.py: continue it with that one")
    learner.load_state(checkpoint["learner"], path)
    return checkpoint["counters"]


def save_results(
    learner: Learner, args: Args, logs: list, eval_returns: np.ndarray, counters: dict, commit: str | None
) -> None:
    """What each finished agent leaves: model.safetensors, which loads without pickle, and result.json."""
    failed, rms, step = [], learner.normalizer.obs_rms, counters["global_step"]
    sps = counters["train_steps"] / counters["train_seconds"] if counters["train_steps"] else None
    versions = {"python": sys.version.split()[0]} | {d.name: d.version for d in distributions() if d.name in PACKAGES}
    for i, (log, last_returns) in enumerate(zip(logs, counters["last_returns"])):
        seed, folder = args.seed + i, log.path.parent
        own_args = asdict(args) | {"seed": seed, "num_seeds": 1, "run_dir": str(folder)}
        tensors = {"obs_mean": torch.tensor(rms.mean[i]), "obs_var": torch.tensor(rms.var[i])}
        for name, x in learner.agent.state_dict().items():
            tensors[name] = (x[i] if x.shape[:1] == (args.num_seeds,) else x).cpu().contiguous()
        if not all(x.isfinite().all() for x in tensors.values()):
            failed.append(str(seed))
        elif not (folder / "result.json").exists():
            content = safetensors.torch.save(tensors, {"script": SCRIPT, "args": json.dumps(own_args)})
            write_atomic(folder / "model.safetensors", content)
            result = {"script": SCRIPT, "env_id": args.env_id, "seed": seed, "args": own_args, "total_timesteps": step}
            result |= {"eval_returns": eval_returns[i].tolist(), "eval_mean": eval_returns[i].mean()}
            result |= {"train_last10_mean": np.mean(last_returns) if last_returns else None, "sps": sps}
            result |= {"wall_seconds": counters["wall_seconds"], "versions": versions, "commit": commit}
            result["device"] = torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu"
            write_json(folder / "result.json", result)
            log.write(step, {"eval/episodic_return": eval_returns[i].mean()})
            print(f"seed {seed}: {step:,} steps, evaluation {scores_text(eval_returns[i])}")
            print(f"  everything is in {folder}; evaluate again with --evaluate {folder}")
        log.close()
    require(not failed, f"no result of seed {', '.join(failed)}: the loss is not finite", code=1)


def scores_text(returns: np.ndarray) -> str:
    return f"{returns.mean():.1f} ({' '.join(f'{r:.1f}' for r in returns)})"


def git_commit() -> str | None:
    """Commit of the repository this file is in, with "-dirty" when this file differs; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commands = [*git, "rev-parse", "HEAD"], [*git, "status", "--porcelain", "--", __file__]
    try:
        commit, changes = (subprocess.run(c, capture_output=True, text=True).stdout.strip() for c in commands)
    except FileNotFoundError:
        return None
    return (f"{commit}-dirty" if changes else commit) or None


class RunLog:
    """TensorBoard, curves.csv and Weights & Biases of one run. rows: those of curves.csv so far; new ones are added."""

    def __init__(self, run_dir: Path, args: Args, rows: list[dict], global_step: int):
        self.path, self.rows, self.wandb = run_dir / "curves.csv", rows, None
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        if args.track:
            import wandb

            id_file = run_dir / "wandb_id.txt"
            if not id_file.exists():
                id_file.write_text(os.urandom(8).hex())
            options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": asdict(args)}
            options |= {"name": run_dir.name, "id": id_file.read_text(), "resume": "allow", "reinit": "create_new"}
            self.wandb = wandb.init(dir=run_dir, **options)

    def write(self, global_step: int, metrics: dict[str, float]) -> None:
        """Log {tag: value}, any tags. curves.csv is written anew, whole, with a column for every tag so far."""
        self.rows.append({"global_step": global_step} | {tag: f"{value:.6g}" for tag, value in metrics.items()})
        columns, text = dict.fromkeys(tag for row in self.rows for tag in row), io.StringIO()
        lines = [columns, *([row.get(tag, "") for tag in columns] for row in self.rows)]
        csv.writer(text, lineterminator="\n").writerows(lines)
        write_atomic(self.path, text.getvalue().encode())
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step)
        self.writer.flush()  # a kill loses nothing that a later checkpoint counts as written
        if self.wandb:
            self.wandb.log(metrics, step=global_step)

    def close(self) -> None:
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


class Progress:
    """One line: redrawn in place on a terminal, printed every 30 seconds when output is redirected."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.last = total, unit, time.monotonic()

    def show(self, done: int, per_second: float, text: str) -> None:
        terminal, finished = sys.stdout.isatty(), done >= self.total
        if time.monotonic() - self.last < (0.2 if terminal else 30) and not finished:
            return
        self.last = time.monotonic()
        left = timedelta(seconds=int((self.total - done) / per_second)) if per_second else "?"
        line = f"{done / self.total:4.0%}  {self.unit} {done:,}  {text}  {left} left"
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and not finished else "\n", flush=True)


def validate(args: Args) -> None:
    """Raise Stop with one line that says what is wrong and what is allowed."""
    counts = "num_seeds num_envs num_steps num_minibatches update_epochs checkpoint_every num_threads"
    for allowed, is_allowed, names in (
        ("at least 1", lambda x: x >= 1, counts),
        ("at least 2", lambda x: x >= 2, "num_bins"),
        ("above 0", lambda x: 0 < x < np.inf, "alpha learning_rate clip_coef max_grad_norm"),
        ("0 or above", lambda x: 0 <= x < np.inf, "beta reward_noise_std ent_coef vf_coef eval_every"),
        ("0 or above, below 2**63", lambda x: 0 <= x < 2**63, "seed"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma gae_lambda"),
        ("below 0", lambda x: -np.inf < x < 0, "Z"),
    ):
        for name in names.split():
            value = getattr(args, name)
            require(is_allowed(value), f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    rollout, minibatches = args.num_envs * args.num_steps, args.num_minibatches
    message = f"a rollout of {rollout} steps, --num-envs times --num-steps, must be "
    require(rollout % minibatches == 0, message + f"a multiple of --num-minibatches, {minibatches}")
    require(rollout > minibatches or not args.norm_adv, message + "more than --num-minibatches, or add --no-norm-adv")
    message = f"--total-timesteps must be at least one rollout, {rollout} steps, got {args.total_timesteps}"
    require(args.total_timesteps >= rollout, message)
    require(not args.cuda or torch.cuda.is_available(), "--cuda needs a CUDA device, and torch sees none")
    compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    require(compiler or not args.compile, "--compile needs a C++ compiler (on Debian: apt install g++)")
    require(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")
    obs_dim, action_dim = check_env(args)
    bytes_per_step = 4 * obs_dim + 8 * action_dim + 8 * action_dim * args.num_bins  # buffers and Gumbel noise
    rollout_bytes = args.num_seeds * args.num_envs * (args.num_steps * bytes_per_step + 2**17)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = f"a rollout takes {rollout_bytes / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}"
    require(rollout_bytes < memory, f"{sizes}: lower --num-seeds, --num-envs, --num-steps or --num-bins")


def check_env(args: Args) -> tuple[int, int]:
    """Observation and action dimensions. Raises Stop unless the environment can be trained on, and recorded."""
    name = f"--env-id {args.env_id}"
    module = args.env_id.rpartition(":")[0].split(".")[0]
    require(not module or find_spec(module), f"{name}: there is no module {module}")
    try:
        env = make_env(args.env_id)
    except gym.error.Error as error:
        raise Stop(f"{name}: {error}") from None
    env.close()
    actions, obs = env.action_space, env.observation_space
    is_box = isinstance(actions, gym.spaces.Box)
    require(is_box, f"{name} has {type(actions).__name__} actions; this script needs a Box")
    require(np.isfinite([actions.low, actions.high]).all(), f"{name} has infinite action bounds; bins need finite ones")
    flat = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1
    require(flat, f"{name} has observations that cannot be flattened")
    if args.capture_video:
        require(find_spec("moviepy"), "--capture-video needs moviepy: pip install moviepy")
        env = gym.make(args.env_id, render_mode="rgb_array", disable_env_checker=True)
        env.reset()
        require(env.render() is not None, f"{name} cannot render: drop --capture-video")
        env.close()
    return obs.shape[0], actions.low.size


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    name = f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    try:
        require("" not in (args.run_dir, args.resume, args.evaluate), "--run-dir, --resume and --evaluate need a path")
        if args.evaluate:
            path = Path(args.evaluate)
            saved, learner = load_model(path)
            args = changed_args(saved, "evaluate", "capture_video")
            check_env(args)
            torch.set_num_threads(args.num_threads)
            returns = evaluate(learner, args, path if path.is_dir() else path.parent)[0]
            print(f"evaluation {scores_text(returns)}")
            return 0
        if args.resume:
            args = replace(changed_args(open_run_dir(run_dir), "resume"), resume=None)
            validate(args)
        else:
            validate(args)
            create_run_dir(args, run_dir)
        if all((seed_dir / "result.json").exists() for seed_dir in seed_dirs(args, run_dir).values()):
            print(f"{run_dir} has finished; evaluate again with --evaluate")
        else:
            train(args, run_dir)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
        if code != 2 and not args.evaluate and (run_dir / "checkpoint.pt").exists():
            error.add_note(f"to go on: python {SCRIPT}.py --resume {run_dir}")
        disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not disk_full and not isinstance(error, (Stop, KeyboardInterrupt, torch.OutOfMemoryError)):
            raise  # a bug: Python's own traceback, and the note below it
        print(end="\n" if code != 2 and sys.stdout.isatty() else "")  # end the progress line
        message = "stopped" if code == 130 else f"error: {' '.join(str(error).split())}"
        print(message, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
