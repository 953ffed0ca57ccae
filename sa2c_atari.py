# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[atari]==1.4.0",
#     "ale-py==0.12.1",
#     "numpy==2.4.6",
#     "safetensors==0.8.0",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
# ]
# ///
"""Symmetric A2C (SA2C) for Atari games.

    python sa2c_atari.py --env-id BreakoutNoFrameskip-v4 --seed 1
    python sa2c_atari.py --env-id BreakoutNoFrameskip-v4 --seed 1 --alpha 1 --beta 0  # A2C, the baseline

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
"""

import csv
import ctypes
import difflib
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import ale_py
import numpy as np
import safetensors.torch
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
VERSION = 2  # of the format of checkpoint.pt
EVAL_EPISODES = 10
LOG_EVERY = 2048  # steps
TRAINING, EVALUATION = 0, 1  # streams of environment seeds
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")  # their versions go into result.json


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # the game; ALE/Breakout-v5 and breakout are the same
    sticky_actions: bool = False  # repeat the previous action with probability 0.25
    total_timesteps: int = 5_000_000  # environment steps of 4 frames each, rounded up to whole rollouts
    seed: int = 1  # seed of everything random
    alpha: float = 0.5  # weight of the A2C loss in Eq. 9
    beta: float = 5.0  # weight of the reverse A2C loss in Eq. 9; alpha 1 and beta 0 is plain A2C
    Z: float = -1.0  # the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters
    reward_flip_prob: float = 0.0  # that a clipped training reward r becomes 1 - r (the paper's BSC noise: 0.1)

    learning_rate: float = 7e-4  # RMSprop's learning rate
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    num_envs: int = 16  # games played at once
    num_steps: int = 5  # steps per environment and rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # lambda of generalized advantage estimation
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.25  # weight of the value loss
    max_grad_norm: float = 0.5  # global gradient norm above which gradients are scaled down

    run_dir: str | None = None  # where everything goes; default runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run directory to continue; all other arguments come from the run
    evaluate: str | None = None  # run directory or model.safetensors to evaluate instead of training
    eval_every: int = 0  # steps between evaluations during training; 0: only the final one
    checkpoint_every: int = 100_000  # steps between checkpoints
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project_name: str = "symmetric-rl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    capture_video: bool = False  # record the first game of every evaluation (pip install moviepy)
    compile: bool = False  # compile the gradient computation with torch.compile (needs a C++ compiler)
    cuda: bool = True  # use a GPU where there is one
    num_threads: int = min(4, os.cpu_count() or 1)  # CPU threads of torch, and of the emulators


class Stop(Exception):
    """Ends the script in one line: exit code 2 for a wrong argument, 1 for what a run can meet, such as a full disk."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def require(condition: bool, message: str, code: int = 2) -> None:
    if not condition:
        raise Stop(message, code)


def find_game(env_id: str) -> str:
    """ale-py's name (ms_pacman) of MsPacmanNoFrameskip-v4, ALE/MsPacman-v5, MsPacman or ms_pacman."""
    games = {game.replace("_", ""): game for game in ale_py.roms.get_all_rom_ids()}
    name = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?-v\d+$|_", "", env_id).lower()
    near = ", ".join(games[match] for match in difflib.get_close_matches(name, games)) or "see ale_py.roms"
    require(name in games, f"--env-id {env_id}: no such game. Near matches: {near}")
    return games[name]


def canonical_id(env_id: str) -> str:
    """MsPacmanNoFrameskip-v4 for every spelling of the game."""
    return find_game(env_id).title().replace("_", "") + "NoFrameskip-v4"


def env_seeds(seed: int, num_envs: int, *stream: int) -> list[int]:
    """Seeds of num_envs environments; another stream (evaluation, a resumed run) gives other seeds."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(num_envs)]  # ale-py: 31 bits


class Games:
    """Several copies of one game: no-ops, frame skip 4 with max-pooling, 84x84 gray frames in stacks of 4, minimal
    action set, 108,000 frames at most. Rewards are raw. docs/paper-notes.md says where the published results differ.

    A lost life ends the episode for learning, but the game plays on. FIRE starts the next life in games that have it:
    where must_fire is set, the caller has to take the action fire.
    """

    def __init__(self, args: Args, num_games: int, **options):
        self.envs = AtariVectorEnv(
            find_game(args.env_id),
            num_games,
            num_threads=args.num_threads,
            repeat_action_probability=0.25 if args.sticky_actions else 0.0,
            autoreset_mode=AutoresetMode.SAME_STEP,
            life_loss_info=True,  # episodic_life would reset the game at every lost life
            reward_clipping=False,  # the clipped reward would leave no score anywhere
            **options,
        )
        actions = self.envs.ale.get_action_set()
        self.num_actions = len(actions)
        self.fire = actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None

    def reset(self, seeds: list[int]) -> np.ndarray:
        """Start every game; frames (num_games, 4, 84, 84), uint8."""
        obs, info = self.envs.reset(seed=np.array(seeds))
        self.game_start = info["frame_number"] - info["episode_frame_number"]
        self.must_fire = np.zeros(len(seeds), dtype=bool)
        return obs

    def step(self, actions: np.ndarray):
        """Frames, raw rewards, terminated (life lost or game over), truncated, game_over, infos: (num_games, ...).

        infos["final_obs"] holds the last frames of games that ended; the frames returned are the next game's.
        """
        obs, rewards, terminated, truncated, infos = self.envs.step(actions)
        # Lives cannot tell: at game over they are the next game's, and games award extra ones. Frame numbers can.
        game_start = infos["frame_number"] - infos["episode_frame_number"]  # frames before the running game
        game_over = game_start != self.game_start
        self.game_start = game_start
        self.must_fire = terminated & ~game_over & (self.fire is not None)
        return obs, rewards, terminated, truncated, game_over, infos


class Agent(nn.Module):
    """Nature CNN shared by policy and value. Convolutions run channels-last, which is faster on CPUs and GPUs."""

    def __init__(self, num_actions: int, generator: torch.Generator):
        super().__init__()

        def init(layer: nn.Module, gain: float) -> nn.Module:
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            nn.init.zeros_(layer.bias)
            return layer

        self.trunk = nn.Sequential(
            init(nn.Conv2d(4, 32, 8, stride=4), 2**0.5),
            nn.ReLU(),
            init(nn.Conv2d(32, 64, 4, stride=2), 2**0.5),
            nn.ReLU(),
            init(nn.Conv2d(64, 64, 3), 2**0.5),
            nn.ReLU(),
            nn.Flatten(),
            init(nn.Linear(64 * 7 * 7, 512), 2**0.5),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.actor = init(nn.Linear(512, num_actions), 0.01)
        self.critic = init(nn.Linear(512, 1), 1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (batch, 4, 84, 84), uint8 -> logits (batch, num_actions), values (batch,)"""
        features = self.trunk(obs.to(torch.float32, memory_format=torch.channels_last).div_(255))
        return self.actor(features), self.critic(features).squeeze(-1)


def logprob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the actions and entropy of the policy, both (...).

    logits: (..., num_actions); actions: (...), indices.
    """
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return logprob, -(logp.exp() * logp).sum(-1)


def flip_rewards(rewards: np.ndarray, uniform: np.ndarray, flip_prob: float) -> np.ndarray:
    """Clipped rewards through a binary symmetric channel: r becomes 1 - r where uniform < flip_prob (Section 5.1).

    rewards and uniform, numbers in [0, 1), have the same shape, which is also the result's.
    """
    return np.where(uniform < flip_prob, 1 - rewards, rewards)


def symmetric_a2c_loss(logprob: Tensor, advantages: Tensor, alpha: float, beta: float, Z: float) -> Tensor:
    """alpha * L_a2c + beta * L_ra2c (Eq. 9), averaged over the last dimension: (..., batch) -> (...).

    logprob is the joint log-probability of the sampled actions under pi. The reverse loss is Eq. 7 with the aligned
    sign for A < 0 (Eq. 33-34): one form, L_ra2c = -A Z (1 - pi), for both signs, since the other actions'
    probabilities sum to 1 - pi.
    """
    L_a2c = -advantages * logprob  # Eq. 16
    L_ra2c = advantages * Z * torch.expm1(logprob)  # Eq. 7; expm1(log pi) = -(1 - pi)
    return (alpha * L_a2c + beta * L_ra2c).mean(-1)  # Eq. 9


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
def gradients(agent: Agent, batch: Sequence[Tensor], args: Args) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Clipped gradients on a batch, and its losses as {tag: ()}.

    batch: frames (batch, 4, 84, 84) and (batch,) of actions, whether the policy chose them (1 or 0),
    advantages and returns. Actions that it did not choose train the value alone.
    """
    obs, actions, chosen, advantages, returns = batch
    logits, values = agent(obs)
    logprob, entropy = logprob_and_entropy(logits, actions)
    A = advantages * chosen
    policy_loss = symmetric_a2c_loss(logprob, A, args.alpha, args.beta, args.Z)
    value_loss = (values - returns).square().mean(-1)  # as in Stable-Baselines3: no 0.5, no clipping
    entropy = (entropy * chosen).mean(-1)
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy

    grads = torch.autograd.grad(loss, list(agent.parameters()))
    grad_norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)

    return [g * scale for g in grads], {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/grad_norm": grad_norm,
    }


class RMSpropTF(torch.optim.Optimizer):
    """RMSprop as in TensorFlow and the published A2C: the square average starts at one, eps is inside the root."""

    def __init__(self, params, lr: float, alpha: float = 0.99, eps: float = 1e-5):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["square_avg"] = torch.ones_like(p)
                state["square_avg"].lerp_(p.grad.square(), 1 - group["alpha"])
                p.addcdiv_(p.grad, (state["square_avg"] + group["eps"]).sqrt(), value=-group["lr"])


class Learner:
    """The agent with what a checkpoint holds of it: network, optimizer, random numbers."""

    def __init__(self, args: Args, num_actions: int):
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator().manual_seed(args.seed)
        self.agent = Agent(num_actions, self.generator).to(self.device)
        self.optimizer = RMSpropTF(self.agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5)

    def state(self) -> dict:
        optimizer = self.optimizer.state_dict()
        return {"agent": self.agent.state_dict(), "optimizer": optimizer, "generator": self.generator.get_state()}

    def load_networks(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Take over tensors from path. Raises Stop if they do not fit."""
        try:
            self.agent.load_state_dict(tensors)
        except RuntimeError as error:
            raise Stop(f"{path} does not fit the networks of this {SCRIPT}.py: {error}") from None

    def load_state(self, state: dict, path: Path) -> None:
        self.load_networks(state["agent"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def keep_memory() -> None:
    """Make glibc keep freed memory: fetching it anew from the kernel takes a tenth of the time of an update on CPUs."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


@torch.no_grad()
def train(args: Args, run_dir: Path) -> None:
    """Train from the checkpoint in run_dir where there is one, and leave a result.json."""
    start_time, commit = time.monotonic(), git_commit()
    keep_memory()
    torch.set_num_threads(args.num_threads)
    E, T = args.num_envs, args.num_steps
    rollout_size = T * E
    total_timesteps = -(-args.total_timesteps // rollout_size) * rollout_size

    games = Games(args, E)
    learner = Learner(args, games.num_actions)
    agent, generator, device = learner.agent, learner.generator, learner.device
    counters = {"global_step": 0, "train_steps": 0, "train_seconds": 0.0, "wall_seconds": 0.0}
    counters |= {"last_returns": [], "curves": []}
    counters |= load_checkpoint(run_dir, learner)
    start_time -= counters["wall_seconds"]  # of the process or processes before
    first_step = global_step = counters["global_step"]
    log = RunLog(run_dir, args, counters["curves"], global_step)
    progress = Progress(total_timesteps, "step")
    stop_signals = collect_signals()

    torch._dynamo.config.trace_autograd_ops = True  # forward and backward in one graph
    compute_gradients = torch.compile(gradients, disable=not args.compile)

    # Channels-last in memory, so that no minibatch has to be reordered.
    obs_buf = torch.zeros((T, E, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    action_buf = torch.zeros((T, E), dtype=torch.int64, device=device)
    chosen_buf = torch.ones((T, E), device=device)  # 0 where FIRE was forced, an action that the policy did not choose
    value_buf = torch.zeros((T, E), device=device)
    reward_buf, done_buf = np.zeros((T, E), np.float32), np.zeros((T, E), bool)
    episode_return, episode_length = np.zeros(E), np.zeros(E)
    episodes, stats, last_log = [], [], global_step  # since the last log

    obs = games.reset(env_seeds(args.seed, E, TRAINING, global_step))
    while global_step < total_timesteps and not stop_signals:
        iteration_start = time.perf_counter()

        # Rollout. argmax(logits + Gumbel noise) is a sample of the policy; the noise is drawn once per rollout.
        gumbel = -torch.empty(T, E, games.num_actions).exponential_(generator=generator).log().to(device)
        uniform = torch.empty(T, E).uniform_(generator=generator).numpy()
        for t in range(T):
            obs_buf[t] = torch.from_numpy(obs).to(device, non_blocking=True)
            logits, value_buf[t] = agent(obs_buf[t])
            action_buf[t] = (logits + gumbel[t]).argmax(-1)
            chosen_buf[t] = torch.from_numpy(~games.must_fire)
            if games.must_fire.any():
                action_buf[t][torch.from_numpy(games.must_fire)] = games.fire
            obs, raw_reward, terminated, truncated, game_over, infos = games.step(action_buf[t].cpu().numpy())
            reward_buf[t] = flip_rewards(np.sign(raw_reward), uniform[t], args.reward_flip_prob)
            done_buf[t] = terminated | truncated
            episode_return += raw_reward
            episode_length += 1
            time_limit = truncated & ~terminated
            if time_limit.any():  # truncated, not terminated: add gamma * V(final observation)
                _, final_value = agent(torch.from_numpy(infos["final_obs"]).to(device))
                reward_buf[t] += args.gamma * final_value.cpu().numpy() * time_limit
            for e in np.flatnonzero(game_over):
                episodes.append((episode_return[e], episode_length[e]))
                counters["last_returns"].append(float(episode_return[e]))
            episode_return[game_over], episode_length[game_over] = 0, 0

        # Advantages
        values = value_buf.cpu().numpy()
        last_value = agent(torch.from_numpy(obs).to(device))[1].cpu().numpy()
        advantages, returns = gae(reward_buf, values, done_buf, last_value, args.gamma, args.gae_lambda)
        b_advantages, b_returns = (torch.from_numpy(x).to(device).flatten() for x in (advantages, returns))
        stored = (x.flatten() for x in (action_buf, chosen_buf))
        batch = (obs_buf.flatten(0, 1), *stored, b_advantages, b_returns)

        # Update
        global_step += rollout_size
        remaining = max(0.0, 1 - global_step / args.total_timesteps)
        if args.anneal_lr:
            learner.optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        grads, losses = compute_gradients(agent, batch, args)
        for p, g in zip(agent.parameters(), grads):
            p.grad = g
        learner.optimizer.step()
        stats.append(losses)

        finite = bool(stats[-1]["losses/grad_norm"].isfinite())  # waits for the GPU
        reason = "the loss is not finite. Try a lower --learning-rate or a lower --beta"
        require(finite, f"seed {args.seed} of {args.env_id} failed at step {global_step:,}: {reason}", code=1)
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
            metrics = {tag: torch.stack([s[tag] for s in stats]).mean().item() for tag in stats[0]}
            metrics["losses/explained_variance"] = 1 - (returns - values).var() / (returns.var() + 1e-8)
            metrics["charts/learning_rate"] = learner.optimizer.param_groups[0]["lr"]
            metrics["charts/SPS"] = sps
            if episodes:
                metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, axis=0)
            if eval_returns is not None:
                metrics["eval/episodic_return"] = eval_returns.mean()
            log.write(global_step, metrics)
            episodes, stats, last_log = [], [], global_step
        counters["last_returns"] = counters["last_returns"][-EVAL_EPISODES:]
        mean_return = np.mean(counters["last_returns"]) if counters["last_returns"] else np.nan
        progress.show(global_step, sps, f"return {mean_return:.1f}  {sps:,.0f} steps/s")
        if global_step % args.checkpoint_every < rollout_size or global_step == total_timesteps or stop_signals:
            save_checkpoint(run_dir, learner, counters)

    for number in (signal.SIGINT, signal.SIGTERM):  # from here on a stop loses nothing
        signal.signal(number, signal.default_int_handler)
    if stop_signals:
        raise KeyboardInterrupt
    eval_returns = evaluate(learner, args, run_dir)
    counters["wall_seconds"] = time.monotonic() - start_time
    save_results(learner, args, run_dir, eval_returns, counters, commit)
    log.write(global_step, {"eval/episodic_return": eval_returns.mean()})
    log.close()


@torch.no_grad()
def evaluate(learner: Learner, args: Args, run_dir: Path, step: int | None = None) -> np.ndarray:
    """Raw scores (10,) of the first whole game in each of 10 environments of its own; actions are sampled.

    An evaluation during training, at a step, has starts and draws of its own. With args.capture_video the first of the
    games is recorded.
    """
    name = "final" if step is None else f"step{step}"
    stream = (EVALUATION,) if step is None else (EVALUATION, step)
    agent, device = learner.agent, learner.device
    seeds = env_seeds(args.seed, EVAL_EPISODES, *stream)
    generator = torch.Generator().manual_seed(seeds[0])
    games = Games(args, EVAL_EPISODES)
    obs = games.reset(seeds)
    if args.capture_video:  # the vector environment cannot render: a twin in color plays the same game
        twin = Games(args, 1, img_height=210, img_width=160, grayscale=False, stack_num=1)
        video = [twin.reset(seeds[:1])[0, -1]]
    returns = np.zeros(EVAL_EPISODES)
    running = np.ones(EVAL_EPISODES, dtype=bool)
    while running.any():
        gumbel = -torch.empty(EVAL_EPISODES, games.num_actions).exponential_(generator=generator).log().to(device)
        actions = (agent(torch.from_numpy(obs).to(device))[0] + gumbel).argmax(-1).cpu().numpy()
        if games.must_fire.any():
            actions[games.must_fire] = games.fire
        if args.capture_video and running[0]:
            video.append(twin.step(actions[:1])[0][0, -1])
        obs, reward, _, _, game_over, _ = games.step(actions)
        returns += reward * running
        running &= ~game_over
    if args.capture_video:
        from gymnasium.utils.save_video import save_video  # needs moviepy

        save_video(video, str(run_dir / "videos" / name), fps=15)
    return returns


def load_model(path: Path) -> tuple[Args, Learner]:
    """Arguments and agent of a saved model, a file or in a run directory. Raises Stop when it is none of ours."""
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        script, saved = metadata.get("script"), json.loads(metadata.get("args", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Stop(f"{path} cannot be read as a model, which a run leaves when it has finished ({error})") from None
    args = saved_args(path, script, saved)
    require(all(x.isfinite().all() for x in tensors.values()), f"{path} holds values that are not finite")
    learner = Learner(args, Games(args, 1).num_actions)
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
    learner: Learner, args: Args, run_dir: Path, eval_returns: np.ndarray, counters: dict, commit: str | None
) -> None:
    """What a finished run leaves: model.safetensors, which loads without pickle, and result.json."""
    last_returns = counters["last_returns"]
    tensors = {name: x.cpu().contiguous() for name, x in learner.agent.state_dict().items()}
    content = safetensors.torch.save(tensors, {"script": SCRIPT, "args": json.dumps(asdict(args))})
    write_atomic(run_dir / "model.safetensors", content)
    versions = {"python": sys.version.split()[0]} | {d.name: d.version for d in distributions() if d.name in PACKAGES}
    sps = counters["train_steps"] / counters["train_seconds"] if counters["train_steps"] else None
    result = {"script": SCRIPT, "env_id": args.env_id, "seed": args.seed, "args": asdict(args)}
    result |= {"total_timesteps": counters["global_step"], "eval_returns": eval_returns.tolist()}
    result |= {"eval_mean": eval_returns.mean(), "train_last10_mean": np.mean(last_returns) if last_returns else None}
    result |= {"sps": sps, "wall_seconds": counters["wall_seconds"], "versions": versions, "commit": commit}
    result["device"] = torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu"
    write_json(run_dir / "result.json", result)
    print(f"seed {args.seed}: {counters['global_step']:,} steps, evaluation {scores_text(eval_returns)}")
    print(f"  everything is in {run_dir}; evaluate again with --evaluate {run_dir}")


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
    counts = "num_envs num_steps checkpoint_every num_threads"
    for allowed, is_allowed, names in (
        ("at least 1", lambda x: x >= 1, counts),
        ("above 0", lambda x: 0 < x < np.inf, "alpha learning_rate max_grad_norm"),
        ("0 or above", lambda x: 0 <= x < np.inf, "beta ent_coef vf_coef eval_every"),
        ("0 or above, below 2**63", lambda x: 0 <= x < 2**63, "seed"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "reward_flip_prob gamma gae_lambda"),
        ("below 0", lambda x: -np.inf < x < 0, "Z"),
    ):
        for name in names.split():
            value = getattr(args, name)
            require(is_allowed(value), f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    rollout = args.num_envs * args.num_steps
    message = f"--total-timesteps must be at least one rollout, {rollout} steps, got {args.total_timesteps}"
    require(args.total_timesteps >= rollout, message)
    compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    require(compiler or not args.compile, "--compile needs a C++ compiler (on Debian: apt install g++)")
    require(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")
    check_game(args)
    rollout_bytes = args.num_envs * (args.num_steps * 84 * 84 * 4 + 2**22)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = f"a rollout takes {rollout_bytes / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}"
    require(rollout_bytes < memory, f"{sizes}: lower --num-envs or --num-steps")


def check_game(args: Args) -> None:
    """Raise Stop unless env_id is a game, and can be recorded if it has to be."""
    find_game(args.env_id)
    require(find_spec("moviepy") or not args.capture_video, "--capture-video needs moviepy: pip install moviepy")


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
            check_game(args)
            torch.set_num_threads(args.num_threads)
            returns = evaluate(learner, args, path if path.is_dir() else path.parent)
            print(f"evaluation {scores_text(returns)}")
            return 0
        if args.resume:
            args = replace(changed_args(open_run_dir(run_dir), "resume"), resume=None)
            validate(args)
        else:
            validate(args)
            args = replace(args, env_id=canonical_id(args.env_id), run_dir=str(run_dir))
            create_run_dir(args, run_dir)
        if (run_dir / "result.json").exists():
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
