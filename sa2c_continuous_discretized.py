"""Symmetric A2C (SA2C) for continuous control with discretized actions, the paper's DSA2C.

    python sa2c_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1
    python sa2c_continuous_discretized.py --env-id HalfCheetah-v4 --seed 1 --alpha 1 --beta 0  # DA2C, the baseline

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
Arrays have a leading agent dimension: --num-seeds N trains N independent agents side by side in one process.
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from gymnasium.vector import SyncVectorEnv
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
EVAL_EPISODES = 10
LOG_EVERY = 2048  # steps
TRAINING, EVALUATION = 0, 1  # streams of environment seeds
PACKAGES = ("torch", "gymnasium", "mujoco", "Box2D", "numpy")  # their versions go into result.json
METRICS = (
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
)


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """gymnasium id of an environment with a bounded Box action space"""
    total_timesteps: int = 2_000_000
    """environment steps of each seed, rounded up to whole rollouts (Table 6)"""
    seed: int = 1
    """seed of the first agent"""
    num_seeds: int = 1
    """agents trained side by side, with seeds seed .. seed + num_seeds - 1"""
    alpha: float = 0.5
    """weight of the A2C loss in Eq. 9"""
    beta: float = 5.0
    """weight of the reverse A2C loss in Eq. 9; alpha 1 and beta 0 is plain A2C"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters"""
    num_bins: int = 11
    """bins per action dimension, evenly spaced from low to high inclusive"""
    reward_noise_std: float = 0.0
    """standard deviation of the Gaussian noise on normalized training rewards (the paper's noise: 0.05)"""

    learning_rate: float = 7e-4
    """RMSprop's learning rate"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    num_envs: int = 4
    """environments of each agent"""
    num_steps: int = 8
    """steps per environment and rollout"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 1.0
    """lambda of generalized advantage estimation"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """global gradient norm above which gradients are scaled down"""

    run_dir: str | None = None
    """where everything goes; default runs/<env>__<script>__<seed>__<time>. With several seeds, parent of seed<k>/"""
    resume: str | None = None
    """run directory to continue; all other arguments come from the run"""
    evaluate: str | None = None
    """run directory or model.safetensors to evaluate instead of training"""
    eval_every: int = 0
    """steps between evaluations during training; 0: only the final one"""
    checkpoint_every: int = 100_000
    """steps between checkpoints"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project_name: str = "symmetric-rl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""
    capture_video: bool = False
    """record the first episode of every evaluation (pip install moviepy)"""
    compile: bool = False
    """compile the gradient computation with torch.compile (needs a C++ compiler)"""
    cuda: bool = False
    """use a GPU; for one agent of this size the CPU is faster"""
    num_threads: int = 1
    """CPU threads of torch; networks this small gain nothing from more"""


class InputError(ValueError):
    """Bad input: main() prints its one line and exits with code 2."""


class RunError(RuntimeError):
    """A run that had to stop: main() prints its one line and exits with code 1."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def make_env(env_id: str, video_dir: Path | None = None) -> gym.Env:
    """One environment with flat observations; with video_dir, its first episode is recorded there."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's MuJoCo ids are v4
    # MuJoCo's own handler also writes MUJOCO_LOG.TXT into the working directory.
    mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(f"MuJoCo: {text}", file=sys.stderr))
    env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video_dir else {}))
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda episode: episode == 0)
    return env if len(env.observation_space.shape or ()) == 1 else gym.wrappers.FlattenObservation(env)


class Envs(SyncVectorEnv):
    """Environments that reset within the step that ends an episode, so that no transition is junk.

    SyncVectorEnv's own bookkeeping takes four times as long. No infos but final_obs, the observations before any reset,
    are collected, and an error gets the attribute env_index.
    """

    def reset(self, seed: list[int]):
        obs = []
        try:
            for env, env_seed in zip(self.envs, seed):
                obs.append(env.reset(seed=env_seed)[0])
        except Exception as error:
            error.env_index = len(obs)
            raise
        return np.array(obs), {}

    def step(self, actions: np.ndarray):
        obs, final_obs, rewards, terminated, truncated = [], [], [], [], []
        try:
            for env, action in zip(self.envs, actions):
                last_obs, reward, is_over, is_cut, _ = env.step(action)
                is_last = is_over or is_cut
                final_obs.append(np.copy(last_obs) if is_last else last_obs)  # reset may write into the same array
                obs.append(env.reset()[0] if is_last else last_obs)
                rewards.append(reward)
                terminated.append(is_over)
                truncated.append(is_cut)
        except Exception as error:
            error.env_index = len(obs)
            raise
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def logits(self, obs: torch.Tensor) -> torch.Tensor:
        """(num_agents, batch, obs_dim) -> (num_agents, batch, action_dim, num_bins)"""
        return self.actor(obs).unflatten(-1, self.action_shape)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """(num_agents, batch, obs_dim) -> (num_agents, batch)"""
        return self.critic(obs).squeeze(-1)


def logprob_and_entropy(logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint log-probability of the actions and entropy of the policy, both (...): sums over the action dimensions.

    logits: (..., action_dim, num_bins); actions: (..., action_dim), bin indices.
    """
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)
    return logprob, -(logp.exp() * logp).sum((-2, -1))


def symmetric_a2c_loss(
    logprob: torch.Tensor, advantages: torch.Tensor, alpha: float, beta: float, Z: float
) -> torch.Tensor:
    """alpha * L_a2c + beta * L_ra2c (Eq. 9), averaged over the last dimension: (..., batch) -> (...).

    logprob is the joint log-probability of the sampled actions under pi. The reverse loss is Eq. 7 with the aligned
    sign for A < 0 (Eq. 33-34): one form, L_ra2c = -A Z (1 - pi), for both signs, since the other actions'
    probabilities sum to 1 - pi.
    """
    L_a2c = -advantages * logprob  # Eq. 16
    L_ra2c = advantages * Z * torch.expm1(logprob)  # Eq. 7; expm1(log pi) = -(1 - pi)
    return (alpha * L_a2c + beta * L_ra2c).mean(-1)  # Eq. 9


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    dones: np.ndarray,
    last_value: np.ndarray,
    gamma: float,
    gae_lambda: float,
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
    agent: Agent, batch: Sequence[torch.Tensor], args: Args
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Clipped gradients of every agent on a batch of its own, and its losses as {tag: (num_agents,)}.

    batch: observations (num_agents, batch, obs_dim), actions (num_agents, batch, action_dim), and (num_agents, batch)
    of advantages and returns.
    """
    obs, actions, advantages, returns = batch
    logprob, entropy = logprob_and_entropy(agent.logits(obs), actions)
    policy_loss = symmetric_a2c_loss(logprob, advantages, args.alpha, args.beta, args.Z)
    value_loss = (agent.value(obs) - returns).square().mean(-1)  # as in Stable-Baselines3: no 0.5, no clipping
    entropy = entropy.mean(-1)
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy

    # Agents share no parameter: the gradient of the sum holds each agent's own gradient.
    grads = torch.autograd.grad(loss.sum(), list(agent.parameters()))
    grad_norm = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in grads]).norm(dim=0)
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1).view(-1, 1, 1)

    return [g * scale for g in grads], {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/grad_norm": grad_norm,
    }


class RMSprop(torch.optim.Optimizer):
    """torch.optim.RMSprop, number for number, in two thirds of its time for networks of this size."""

    def __init__(self, params, lr: float, alpha: float = 0.99, eps: float = 1e-5):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        if not self.state:
            self.state.update({p: {"square_avg": torch.zeros_like(p)} for p in group["params"]})
        grads = [p.grad for p in group["params"]]
        squares = [self.state[p]["square_avg"] for p in group["params"]]
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["alpha"])
        roots = torch._foreach_add(torch._foreach_sqrt(squares), group["eps"])
        torch._foreach_addcdiv_(group["params"], grads, roots, -group["lr"])


class Learner:
    """All agents with what a checkpoint holds of them: networks, optimizer, normalization, random numbers."""

    def __init__(self, args: Args, seeds: list[int], obs_dim: int, action_dim: int):
        self.device = torch.device("cuda" if args.cuda else "cpu")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.agent = Agent(self.generators, obs_dim, action_dim, args.num_bins).to(self.device)
        self.optimizer = RMSprop(self.agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5)
        self.normalizer = Normalizer(len(seeds), args.num_envs, obs_dim, args.gamma)

    def draw(self, *shape: int, kind: str) -> torch.Tensor:
        """Random numbers (shape[0], num_agents, *shape[1:]), each agent's from its own generator."""
        return torch.stack([getattr(torch.empty(shape), kind)(generator=g) for g in self.generators], dim=1)

    def state(self, i: int) -> dict:
        """State of agent i, without the agent dimension."""
        moments = [self.optimizer.state[p] for p in self.agent.parameters()]
        statistics = {name: vars(getattr(self.normalizer, name)) for name in ("obs_rms", "return_rms")}
        return {
            "agent": {k: v[i].clone() for k, v in self.agent.state_dict().items()},
            "optimizer": [{k: (v if k == "step" else v[i]).clone() for k, v in m.items()} for m in moments],
            "normalizer": {name: {k: torch.tensor(v[i]) for k, v in s.items()} for name, s in statistics.items()},
            "rng": self.generators[i].get_state(),
        }

    def load(self, states: list[dict]) -> None:
        """Take over one state per agent, all of the same step."""
        first = states[0]
        self.agent.load_state_dict({k: torch.stack([s["agent"][k] for s in states]) for k in first["agent"]})
        for j, p in enumerate(self.agent.parameters()):
            for k, v in first["optimizer"][j].items():
                stacked = v if k == "step" else torch.stack([s["optimizer"][j][k] for s in states])
                self.optimizer.state[p][k] = stacked.to(self.device)
        for name, statistics in first["normalizer"].items():
            for k in statistics:
                stacked = np.stack([s["normalizer"][name][k].numpy() for s in states])
                setattr(getattr(self.normalizer, name), k, stacked)
        for generator, state in zip(self.generators, states):
            generator.set_state(state["rng"])


def agent_first(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """(num_steps, num_agents, num_envs, ...) -> (num_agents, num_steps * num_envs, ...)"""
    return torch.from_numpy(x).to(device).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def train(args: Args, run_dirs: dict[int, Path]) -> None:
    """Train the agents of run_dirs ({seed: directory}) side by side and leave a result.json in each directory.

    All continue from their checkpoints, which must be of one step. Raises RunError when a loss is not finite or an
    environment fails, and KeyboardInterrupt on Ctrl-C or SIGTERM, in each case after a checkpoint of what goes on.
    """
    start_time, commit = time.monotonic(), git_commit()
    torch.set_num_threads(args.num_threads)
    seeds, N, E, T = list(run_dirs), len(run_dirs), args.num_envs, args.num_steps
    rollout_size = T * E
    total_timesteps = -(-args.total_timesteps // rollout_size) * rollout_size

    envs = make_envs(args.env_id, N * E)
    bins = action_bins(envs.single_action_space, args.num_bins)  # (num_bins, action_dim)
    action_dim, obs_dim = bins.shape[1], envs.single_observation_space.shape[0]
    learner = Learner(args, seeds, obs_dim, action_dim)
    agent, normalizer, device = learner.agent, learner.normalizer, learner.device
    counters = {"global_step": 0, "train_steps": 0, "train_seconds": 0.0, "wall_seconds": 0.0}
    last_returns = [deque(maxlen=EVAL_EPISODES) for _ in seeds]
    checkpoints = [load_checkpoint(run_dir) for run_dir in run_dirs.values()]
    if checkpoints[0]:
        try:
            learner.load([c["learner"] for c in checkpoints])
        except (RuntimeError, KeyError):
            raise InputError(f"the checkpoint in {next(iter(run_dirs.values()))} is of another network") from None
        counters = checkpoints[0]["counters"]
        for recent, c in zip(last_returns, checkpoints):
            recent.extend(c["last_returns"])
    global_step = counters["global_step"]
    logs = [RunLog(run_dir, replace(args, seed=seed, num_seeds=1), global_step) for seed, run_dir in run_dirs.items()]
    progress = Progress(total_timesteps, N)

    def save_checkpoints(but: Sequence[int] = ()) -> None:
        now = counters | {"wall_seconds": counters["wall_seconds"] + time.monotonic() - start_time}
        for i in set(range(N)) - set(but):
            state = {
                "script": SCRIPT,
                "learner": learner.state(i),
                "counters": now,
                "last_returns": list(last_returns[i]),
            }
            write_atomic(run_dirs[seeds[i]] / "checkpoint.pt", partial(torch.save, state))

    def stop_without(failed: Sequence[int], reason: str) -> None:
        """Mark the failed agents, save the others and stop: --resume goes on without the failed ones."""
        save_checkpoints(but=failed)
        names = ", ".join(str(seeds[i]) for i in failed)
        message = f"seed {names} of {args.env_id} stopped at step {global_step:,}: {reason}"
        for i in failed:
            (run_dirs[seeds[i]] / "failed.txt").write_text(message + "\n")
        raise RunError(message)

    @contextmanager
    def naming_the_seed(envs_per_agent: int):
        try:
            yield
        except Exception as error:
            if not hasattr(error, "env_index"):
                raise
            stop_without([error.env_index // envs_per_agent], f"the environment raised {error!r}")

    def video_dirs(step: int) -> list[Path]:
        return [run_dir / "videos" / f"step{step}" for run_dir in run_dirs.values()] if args.capture_video else []

    stop_signals = []

    def on_signal(number: int, _) -> None:
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    compute_gradients = gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # forward and backward in one graph
        compute_gradients = torch.compile(gradients)
    timed = not args.compile  # the first iteration compiles

    obs_buf = np.zeros((T, N, E, obs_dim), np.float32)
    action_buf = np.zeros((T, N, E, action_dim), np.int64)
    reward_buf = np.zeros((T, N, E), np.float32)
    done_buf = np.zeros((T, N, E), bool)
    episode_return, episode_length = np.zeros((N, E)), np.zeros((N, E))
    episodes, stats, last_log = [[] for _ in seeds], [], global_step  # since the last log

    with naming_the_seed(E):
        raw_obs, _ = envs.reset(seed=env_seeds(seeds, E, TRAINING, global_step))
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
            with naming_the_seed(E):
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
                if time_limit.any():  # the episode was cut, not over: add gamma * V(final observation)
                    final_obs = normalizer.obs(infos["final_obs"].reshape(N, E, obs_dim), update=False)
                    final_value = agent.value(torch.from_numpy(final_obs).to(device)).cpu().numpy()
                    reward_buf[t][time_limit] += args.gamma * final_value[time_limit]
                for i, e in np.argwhere(done):
                    episodes[i].append((episode_return[i, e], episode_length[i, e]))
                    last_returns[i].append(float(episode_return[i, e]))
                episode_return[done], episode_length[done] = 0, 0

        # Advantages. The critic is still that of the rollout: one forward pass gives V for all of it.
        b_obs, b_actions = (agent_first(x, device) for x in (obs_buf, action_buf))
        values = agent.value(b_obs).unflatten(1, (T, E)).transpose(0, 1).cpu().numpy()
        last_value = agent.value(torch.from_numpy(obs).to(device)).cpu().numpy()
        advantages, returns = gae(reward_buf, values, done_buf, last_value, args.gamma, args.gae_lambda)
        b_advantages, b_returns = (agent_first(x, device) for x in (advantages, returns))

        # Update
        global_step += rollout_size
        remaining = max(0.0, 1 - global_step / args.total_timesteps)
        if args.anneal_lr:
            learner.optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        grads, losses = compute_gradients(agent, [b_obs, b_actions, b_advantages, b_returns], args)
        for p, g in zip(agent.parameters(), grads):
            p.grad = g
        learner.optimizer.step()
        stats.append(losses)

        counters["global_step"] = global_step
        failed = (~stats[-1]["losses/grad_norm"].isfinite()).nonzero().flatten().tolist()  # waits for the GPU
        if timed:
            counters["train_steps"] += rollout_size
            counters["train_seconds"] += time.perf_counter() - iteration_start
        timed = True
        if failed:
            stop_without(failed, "the loss is not finite. Try a lower --learning-rate or a lower --beta")

        # Evaluate, log, save
        sps = counters["train_steps"] / max(counters["train_seconds"], 1e-9)
        evaluated = None
        if args.eval_every and global_step % args.eval_every < rollout_size and global_step < total_timesteps:
            with naming_the_seed(EVAL_EPISODES):
                evaluated = evaluate(agent, normalizer, args, seeds, video_dirs(global_step))
        if global_step - last_log >= LOG_EVERY or global_step == total_timesteps or evaluated is not None:
            means = {tag: torch.stack([s[tag] for s in stats]).mean(0).tolist() for tag in stats[0]}
            unexplained = (returns - values).var((0, 2)) / (returns.var((0, 2)) + 1e-8)
            for i, log in enumerate(logs):
                metrics = {tag: mean[i] for tag, mean in means.items()}
                metrics |= {"losses/explained_variance": 1 - unexplained[i]}
                metrics |= {"charts/learning_rate": learner.optimizer.param_groups[0]["lr"], "charts/SPS": sps}
                if episodes[i]:
                    mean_return, mean_length = np.mean(episodes[i], axis=0)
                    metrics |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
                if evaluated is not None:
                    metrics["eval/episodic_return"] = evaluated[i].mean()
                log.write(global_step, metrics)
            episodes, stats, last_log = [[] for _ in seeds], [], global_step
        recent = np.concatenate(last_returns)
        progress.show(global_step, recent.mean() if len(recent) else np.nan, sps)
        if global_step % args.checkpoint_every < rollout_size or global_step == total_timesteps or stop_signals:
            save_checkpoints()

    for number, handler in handlers.items():
        signal.signal(number, handler)
    envs.close()
    if stop_signals:
        raise KeyboardInterrupt

    with naming_the_seed(EVAL_EPISODES):
        evaluated = evaluate(agent, normalizer, args, seeds, video_dirs(global_step))
    installed = {d.name: d.version for d in distributions()}
    versions = {"python": platform.python_version()} | {p: installed[p] for p in PACKAGES if p in installed}
    for i, eval_returns in enumerate(evaluated):
        run_dir = run_dirs[seeds[i]]
        own_args = json.loads((run_dir / "args.json").read_text())["args"]
        save_model(run_dir, learner, i, own_args)
        result = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "seed": seeds[i],
            "args": own_args,
            "total_timesteps": global_step,
            "eval_returns": eval_returns.tolist(),
            "eval_mean": eval_returns.mean(),
            "train_last10_mean": np.mean(last_returns[i]) if last_returns[i] else None,
            "sps": counters["train_steps"] / counters["train_seconds"] if counters["train_steps"] else None,
            "wall_seconds": counters["wall_seconds"] + time.monotonic() - start_time,
            "versions": versions,
            "commit": commit,
        }
        write_json(run_dir / "result.json", result)
        logs[i].write(global_step, {"eval/episodic_return": eval_returns.mean()})
        logs[i].close()


@torch.no_grad()
def evaluate(
    agent: Agent, normalizer: Normalizer, args: Args, seeds: list[int], video_dirs: Sequence[Path] = ()
) -> np.ndarray:
    """Raw returns (num_agents, 10) of the first episode in each of 10 environments of its own per agent.

    The most likely bin of every action dimension is taken, and the normalization statistics are frozen.
    """
    envs = make_envs(args.env_id, len(seeds) * EVAL_EPISODES, video_dirs)
    bins = action_bins(envs.single_action_space, args.num_bins)
    device = next(agent.parameters()).device
    raw_obs, _ = envs.reset(seed=env_seeds(seeds, EVAL_EPISODES, EVALUATION))
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, dtype=bool)
    while running.any():
        obs = normalizer.obs(raw_obs.reshape(len(seeds), EVAL_EPISODES, -1), update=False)
        actions = agent.logits(torch.from_numpy(obs).to(device)).argmax(-1).cpu().numpy()
        action_values = bins[actions, np.arange(bins.shape[1])].reshape(envs.action_space.shape)
        raw_obs, reward, terminated, truncated, _ = envs.step(action_values)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns.reshape(len(seeds), EVAL_EPISODES)


def evaluate_saved(path: Path, capture_video: bool) -> np.ndarray:
    """Returns (10,) of a saved model in the episodes of its run's final evaluation.

    Raises InputError when path is neither a model.safetensors of this script nor a run directory that holds one.
    """
    if runs := sorted(path.glob("seed*/args.json")):
        raise InputError(f"{path} holds the runs of several seeds: name one, such as {runs[0].parent}")
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path} does not exist: a model is written when its run has finished")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {k: file.get_tensor(k).unsqueeze(0) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None
    if metadata.get("script") != SCRIPT:
        raise InputError(f"{path} is a model of {metadata.get('script', 'something else')}, not of {SCRIPT}")
    try:
        args = Args(**json.loads(metadata["args"]))
        obs_mean, obs_var = tensors.pop("obs_mean").numpy(), tensors.pop("obs_var").numpy()
        action_dim = tensors["actor.4.bias"].shape[-1] // args.num_bins
        agent = Agent([torch.Generator()], obs_mean.shape[1], action_dim, args.num_bins)
        agent.load_state_dict(tensors)
        agent.to("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    except (KeyError, ValueError, TypeError, RuntimeError):
        raise InputError(f"{path} is damaged: arguments or tensors are missing") from None
    check_env(args.env_id, capture_video)
    torch.set_num_threads(args.num_threads)
    normalizer = Normalizer(1, EVAL_EPISODES, obs_mean.shape[1], args.gamma)
    normalizer.obs_rms.mean, normalizer.obs_rms.var = obs_mean, obs_var
    return evaluate(agent, normalizer, args, [args.seed], [path.parent / "videos"] if capture_video else [])[0]


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename: a kill or a full disk leaves the old file or the new one.

    Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have exceptions of their own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, is the disk full? {error}") from error


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def create_run_dirs(args: Args, run_dir: Path) -> dict[int, Path]:
    """Make run_dir, with seed<k>/ for each of several seeds; each holds the arguments of a run of that seed alone.

    Returns {seed: directory}. Raises InputError when run_dir is in use or cannot be made.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"--run-dir {run_dir} is in use: continue it with --resume {run_dir}, or name another")
    seeds = range(args.seed, args.seed + args.num_seeds)
    inside = {seed: Path(f"seed{seed}" if args.num_seeds > 1 else "") for seed in seeds}
    require(run_dir.name not in ("", ".."), f"--run-dir {run_dir} has no name of its own: name a directory")
    temporary = run_dir.with_name(f".{run_dir.name}.{os.getpid()}")
    try:
        for seed, sub in inside.items():
            (temporary / sub).mkdir(parents=True)
            own_args = asdict(args) | {"seed": seed, "num_seeds": 1, "run_dir": str(run_dir / sub)}
            write_json(temporary / sub / "args.json", {"script": SCRIPT, "args": own_args})
        os.replace(temporary, run_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"--run-dir {run_dir} cannot be made: {error.strerror or error}") from None
    return {seed: run_dir / sub for seed, sub in inside.items()}


def open_run_dirs(path: Path) -> tuple[Args, dict[int, Path]]:
    """Arguments and {seed: directory} of an existing run, or of all runs when path is a parent of seed<k>/.

    Raises InputError when path holds no run of this script.
    """
    directories = [path] if (path / "args.json").exists() else [p.parent for p in path.glob("seed*/args.json")]
    if not directories:
        raise InputError(f"{path} holds no run of {SCRIPT}.py: there is no args.json in it")
    run_dirs = {}
    for directory in directories:
        try:
            saved = json.loads((directory / "args.json").read_text())
            args = Args(**saved["args"]) if saved["script"] == SCRIPT else None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{directory / 'args.json'} cannot be read") from None
        require(args is not None, f"{directory} is a run of {saved['script']}.py, not of {SCRIPT}.py")
        run_dirs[args.seed] = directory
    return args, dict(sorted(run_dirs.items()))


def load_checkpoint(run_dir: Path) -> dict | None:
    """The run's last checkpoint, None before the first. Raises InputError when it cannot be read."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["script"] == SCRIPT
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint of {SCRIPT}.py ({type(error).__name__})") from None
    return checkpoint


def save_model(run_dir: Path, learner: Learner, i: int, args: dict) -> None:
    """Networks and observation statistics of agent i, with its arguments as metadata; loads without pickle."""
    tensors = {k: v[i].cpu().contiguous() for k, v in learner.agent.state_dict().items()}
    rms = learner.normalizer.obs_rms
    tensors |= {"obs_mean": torch.tensor(rms.mean[i]), "obs_var": torch.tensor(rms.var[i])}
    metadata = {"script": SCRIPT, "args": json.dumps(args)}
    write_atomic(run_dir / "model.safetensors", lambda temporary: save_file(tensors, temporary, metadata))


def git_commit() -> str | None:
    """Commit of the repository this file is in, with "-dirty" when this file differs; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", __file__))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changes else "")


class RunLog:
    """TensorBoard, curves.csv and Weights & Biases of one run; on resume, what lies past the checkpoint goes."""

    def __init__(self, run_dir: Path, args: Args, global_step: int):
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        path = run_dir / "curves.csv"
        rows = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= global_step]
        header = ",".join(("global_step", *METRICS)) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(header + "".join(rows)))
        self.file = path.open("a", newline="")
        self.csv = csv.DictWriter(self.file, ("global_step", *METRICS), lineterminator="\n")
        self.wandb = None
        if args.track:
            import wandb

            begun = (run_dir / "args.json").stat().st_mtime_ns  # a new run in an old place is another one
            run_id = hashlib.sha1(f"{run_dir.resolve()} {begun}".encode()).hexdigest()[:12]
            self.wandb = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                reinit="create_new",
                config=asdict(args),
                dir=run_dir,
            )

    def write(self, global_step: int, metrics: dict[str, float]) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step)
        self.csv.writerow({"global_step": global_step} | {tag: f"{value:.6g}" for tag, value in metrics.items()})
        self.file.flush()
        self.writer.flush()  # a kill loses nothing that a later checkpoint counts as written
        if self.wandb:
            self.wandb.log(metrics, step=global_step)

    def close(self) -> None:
        self.writer.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class Progress:
    """One line: redrawn in place on a terminal, printed every 30 seconds when output is redirected."""

    def __init__(self, total: int, num_agents: int):
        self.total, self.num_agents, self.last = total, num_agents, time.monotonic()

    def show(self, global_step: int, episodic_return: float, sps: float) -> None:
        terminal = sys.stdout.isatty()
        if time.monotonic() - self.last < (0.2 if terminal else 30) and global_step < self.total:
            return
        self.last = time.monotonic()
        left = int((self.total - global_step) / sps) if sps else 0
        done = global_step / self.total
        bar = f"[{'#' * int(20 * done):20}] " if terminal else ""
        line = f"{bar}{done:4.0%}  step {global_step:,}  return {episodic_return:.1f}  "
        line += f"{self.num_agents * sps:,.0f} steps/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        end = "" if terminal and global_step < self.total else "\n"
        print(f"\r{line}\x1b[K" if terminal else line, end=end, flush=True)


def validate(args: Args) -> None:
    """Raise InputError with one line that says what is wrong and what is allowed."""
    counts = "num_seeds num_envs num_steps checkpoint_every num_threads"
    for allowed, is_allowed, names in (
        ("at least 1", lambda x: x >= 1, counts),
        ("at least 2", lambda x: x >= 2, "num_bins"),
        ("above 0", lambda x: 0 < x < np.inf, "alpha learning_rate max_grad_norm"),
        ("0 or above", lambda x: 0 <= x < np.inf, "beta reward_noise_std ent_coef vf_coef eval_every"),
        ("0 or above, below 2**63", lambda x: 0 <= x < 2**63, "seed"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma gae_lambda"),
        ("below 0", lambda x: -np.inf < x < 0, "Z"),
    ):
        for name in names.split():
            value = getattr(args, name)
            require(is_allowed(value), f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    rollout_size = args.num_envs * args.num_steps
    require(
        args.total_timesteps >= rollout_size,
        f"--total-timesteps must be at least one rollout, {rollout_size} steps, got {args.total_timesteps}",
    )
    require(not args.cuda or torch.cuda.is_available(), "--cuda needs a CUDA device, and torch sees none")
    require(
        not args.compile or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
        "--compile needs a C++ compiler (on Debian: apt install g++)",
    )
    require(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")
    check_env(args.env_id, args.capture_video)


def check_env(env_id: str, capture_video: bool) -> None:
    """Raise InputError unless env_id is an environment that this script can train on, and record."""
    try:
        env = make_env(env_id)
        env.close()
    except Exception as error:  # whatever the environment's constructor raises
        raise InputError(f"--env-id {env_id}: {(str(error) or repr(error)).splitlines()[0]}") from None
    space, obs_space = env.action_space, env.observation_space
    kind = type(space).__name__
    require(isinstance(space, gym.spaces.Box), f"--env-id {env_id} has {kind} actions; this script needs a Box")
    finite = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    require(finite, f"--env-id {env_id} has infinite action bounds; bins need finite ones")
    flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    require(flat, f"--env-id {env_id} has observations that cannot be flattened")
    if capture_video:
        require(find_spec("moviepy"), "--capture-video needs moviepy: pip install moviepy")
        try:
            env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
            env.reset()
            frame = env.render()
            env.close()
        except Exception as error:
            hint = "MuJoCo without a display needs MUJOCO_GL=egl"
            raise InputError(f"--capture-video: {env_id} cannot render here ({error!r}; {hint})") from None
        require(frame is not None, f"--env-id {env_id} cannot render: drop --capture-video")


def given() -> list[str]:
    """Names of the arguments on the command line."""
    flags = {word.partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
    return [f.name for f in fields(Args) if {f"__{f.name}", f"__no_{f.name}"} & flags]


def only(*names: str) -> None:
    """Raise InputError when any other argument than names was given."""
    extra = [name for name in given() if name not in names]
    require(not extra, f"--{names[0]} takes its arguments from the run: drop --{', --'.join(extra).replace('_', '-')}")


def run(args: Args, run_dirs: dict[int, Path]) -> int:
    """Train what is unfinished in run_dirs, seeds with the same checkpoint step side by side; print the results."""
    groups = {}
    for seed, run_dir in run_dirs.items():
        failed = run_dir / "failed.txt"
        if failed.exists() and len(run_dirs) > 1:
            print(f"{failed.read_text().strip()} (retry with --resume {run_dir})")
        elif not (run_dir / "result.json").exists():
            checkpoint = load_checkpoint(run_dir)
            failed.unlink(missing_ok=True)
            groups.setdefault(checkpoint["counters"]["global_step"] if checkpoint else 0, {})[seed] = run_dir
    for _, group in sorted(groups.items()):
        train(args, group)
    finished = {seed: run_dir for seed, run_dir in run_dirs.items() if (run_dir / "result.json").exists()}
    for seed, run_dir in finished.items():
        result = json.loads((run_dir / "result.json").read_text())
        returns = " ".join(f"{r:.1f}" for r in result["eval_returns"])
        print(f"seed {seed}: {result['total_timesteps']:,} steps, evaluation {result['eval_mean']:.1f} ({returns})")
        print(f"  everything is in {run_dir}; evaluate again with --evaluate {run_dir}")
    return 0 if len(finished) == len(run_dirs) else 1


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    name = f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    try:
        empty = "" in (args.run_dir, args.resume, args.evaluate)
        require(not empty, "--run-dir, --resume and --evaluate need a path, got an empty one")
        if args.evaluate:
            only("evaluate", "capture_video")
            returns = evaluate_saved(Path(args.evaluate), args.capture_video)
            print(f"evaluation {returns.mean():.1f} ({' '.join(f'{r:.1f}' for r in returns)})")
            return 0
        if args.resume:
            only("resume")
            args, run_dirs = open_run_dirs(run_dir)
            validate(args)
        else:
            validate(args)
            run_dirs = create_run_dirs(args, run_dir)
        return run(args, run_dirs)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        message = "\n" * sys.stdout.isatty() + f"error: {' '.join(str(error).split())}"
        message += f"\nto go on: python {SCRIPT}.py --resume {run_dir}" * run_dir.exists()
        print(message, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = f"; to go on: python {SCRIPT}.py --resume {run_dir}" * run_dir.exists()
        print(f"\nstopped{how}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
