# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "safetensors==0.8.0",
#     "tensorboard==2.21.0", "tyro==1.0.17"]
# ///
"""Symmetric A2C (SA2C) for Atari games.

    python sa2c_atari.py --env-id BreakoutNoFrameskip-v4 --seed 1
    python sa2c_atari.py --env-id BreakoutNoFrameskip-v4 --seed 1 --alpha 1 --beta 0  # A2C, the baseline

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
"""

import ctypes
import difflib
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
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from importlib import import_module, metadata
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
VERSION = 3  # of the format of checkpoint.pt
EVAL_EPISODES = 10
LOG_EVERY = 2048  # steps between rows of curves.csv
SAVE_EVERY = 60  # seconds between checkpoints, which take 20 MB
SHOW_EVERY = 10  # seconds between lines of progress
TRAINING, EVALUATION = 0, 1  # streams of environment seeds
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")  # their versions go into result.json


@dataclass(frozen=True)
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # the game; Breakout and breakout are the same
    sticky_actions: bool = False  # repeat the previous action with probability 0.25
    total_timesteps: int = 5_000_000  # environment steps of 4 frames each, rounded up to whole rollouts
    seed: int = 1  # seed of everything random
    alpha: float = 0.5  # weight of the A2C loss in Eq. 9
    beta: float = 5.0  # weight of the reverse A2C loss in Eq. 9; alpha 1 and beta 0 is plain A2C
    Z: float = -1.0  # the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters
    reward_flip_prob: float = 0.0  # probability that a clipped training reward r becomes 1 - r (the paper's: 0.1)

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
    eval_episodes: int = 10  # games of every evaluation
    track: bool = False  # log to Weights & Biases as well; WANDB_PROJECT and WANDB_ENTITY say where (pip install wandb)
    capture_video: bool = False  # record the first game of every evaluation (pip install moviepy)
    compile: bool = False  # compile the gradient computation with torch.compile (needs a C++ compiler)
    cuda: bool = True  # use a GPU where there is one
    bfloat16: bool = False  # convolutions in bfloat16: faster on GPUs and on CPUs with AVX512_BF16 or AMX
    num_threads: int = min(4, os.cpu_count() or 1)  # CPU threads of torch, and of the emulators

    @property
    def device(self) -> str:
        return "cuda" if self.cuda and torch.cuda.is_available() else "cpu"


def find_game(args: Args) -> str:
    """ale-py's name (ms_pacman) of MsPacmanNoFrameskip-v4, MsPacman or ms_pacman."""
    roms = ale_py.roms.get_all_rom_ids()  # the emulator lacks four of them, which would kill the process
    supported = filter(lambda rom: ale_py.ALEInterface.isSupportedROM(ale_py.roms.get_rom_path(rom)), roms)
    games = {rom.replace("_", ""): rom for rom in supported}
    match = re.fullmatch(r"(?:ALE/)?(\w+?)(NoFrameskip-v4|NoFrameskip-v0|-v5)?", args.env_id)
    name = match[1].replace("_", "").lower() if match else args.env_id
    if name not in games:
        near = ", ".join(games[near] for near in difflib.get_close_matches(name, games)) or "see ale_py.roms"
        fail(f"--env-id {args.env_id}: no such game. Near matches: {near}")
    if match[2] in ("NoFrameskip-v0", "-v5") and not args.sticky_actions:
        fail(f"--env-id {args.env_id} has sticky actions: add --sticky-actions, or name {games[name]}")
    return games[name]


def env_seeds(seed: int, num_envs: int, *stream: int) -> list[int]:
    """Seeds for num_envs environments. Each stream (training, evaluation, a resumed run) has its own."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(num_envs)]  # ale-py: 31 bits


class Envs:
    """Several copies of one game: no-ops, frame skip 4 with max-pooling, 84x84 gray frames in stacks of 4, minimal
    action set, 108,000 frames at most. Rewards are raw. docs/paper-notes.md says where the published results differ.
    A lost life ends the episode for learning, but the game plays on. FIRE starts the next life in games that have it:
    if must_fire is set, the caller has to take the action fire."""

    def __init__(self, args: Args, num_envs: int, **options):
        self.envs = AtariVectorEnv(
            find_game(args),
            num_envs,
            num_threads=args.num_threads,
            repeat_action_probability=0.25 if args.sticky_actions else 0.0,
            autoreset_mode=AutoresetMode.SAME_STEP,
            life_loss_info=True,  # episodic_life would reset the game at every lost life
            reward_clipping=False,  # the clipped reward would hide the score
            **options,
        )
        actions = self.envs.ale.get_action_set()
        self.num_actions = len(actions)
        self.fire = actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None
        self.close = self.envs.close

    def reset(self, seeds: list[int]) -> np.ndarray:
        """Start every game; frames (num_envs, 4, 84, 84), uint8."""
        obs, info = self.envs.reset(seed=np.array(seeds))
        self.game_start = info["frame_number"] - info["episode_frame_number"]
        self.must_fire = np.zeros(len(seeds), dtype=bool)
        return obs

    def step(self, actions: np.ndarray):
        """Frames, raw rewards, terminated (life lost or game over), truncated, game_over, infos: (num_envs, ...).
        infos["final_obs"] holds the last frames of games that ended; the frames returned are the next game's."""
        obs, rewards, terminated, truncated, infos = self.envs.step(actions)
        # Lives do not show a game's end: they are then the next game's, and games award extra ones. Frame numbers do.
        game_start = infos["frame_number"] - infos["episode_frame_number"]  # frames before the running game
        game_over = game_start != self.game_start
        self.game_start = game_start
        self.must_fire = terminated & ~game_over & (self.fire is not None)
        return obs, rewards, terminated, truncated, game_over, infos


class Agent(nn.Module):
    """Nature CNN shared by policy and value. Convolutions run channels-last, which is faster on CPUs and GPUs."""

    def __init__(self, num_actions: int, generator: torch.Generator, bfloat16: bool = False):
        super().__init__()
        self.bfloat16 = bfloat16  # the trunk computes in it; weights, heads and loss stay in float32

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
        obs = obs.to(torch.float32, memory_format=torch.channels_last).div_(255)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            features = self.trunk(obs)
        features = features.float()
        return self.actor(features), self.critic(features).squeeze(-1)


def logprob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the actions and entropy of the policy, both (...).
    logits: (..., num_actions); actions: (...), indices."""
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return logprob, -(logp.exp() * logp).sum(-1)


def flip_rewards(rewards: np.ndarray, uniform: np.ndarray, flip_prob: float) -> np.ndarray:
    """Clipped rewards through a binary symmetric channel: r becomes 1 - r where uniform < flip_prob (Section 5.1).
    rewards, uniform (numbers in [0, 1)) and the result have the same shape."""
    return np.where(uniform < flip_prob, 1 - rewards, rewards)


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
    """Write the clipped gradient on a batch into p.grad; returns {tag: ()} to log.
    batch: frames (batch, 4, 84, 84) and (batch,) of actions, whether the policy chose them (1 or 0), advantages and
    returns. Actions that it did not choose train the value alone."""
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

    params = list(agent.parameters())
    grads = torch.autograd.grad(loss, params)
    grad_norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
    scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    for p, g in zip(params, grads):
        p.grad = g * scale

    return {
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


def keep_memory() -> None:
    """Make glibc keep freed memory. Getting it from the kernel again takes a tenth of the time of an update on CPUs."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


@torch.no_grad()
def train(args: Args, envs: Envs) -> dict:
    """Train, from the checkpoint in run_dir if there is one, and return the result."""
    start_time, commit = time.monotonic(), git_commit()
    torch.set_num_threads(args.num_threads)
    E, T = args.num_envs, args.num_steps  # environments, steps of a rollout
    total_timesteps = -(-args.total_timesteps // (T * E)) * T * E

    generator = torch.Generator().manual_seed(args.seed)
    agent = Agent(envs.num_actions, generator, args.bfloat16).to(args.device)
    optimizer = RMSpropTF(agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5)
    torch._dynamo.config.trace_autograd_ops = True  # forward and backward in one graph
    compiled_backward = torch.compile(backward, disable=not args.compile)

    # A resumed run restores the state_dict() of every part, and the numbers, lists and tensors in progress.
    parts = {"agent": agent, "optimizer": optimizer}
    progress = {"global_step": 0, "sps": None, "wall_seconds": 0.0, "generator": generator.get_state()}
    progress |= {"last_returns": [], "eval_returns": None} | load_checkpoint(args, parts)
    generator.set_state(progress["generator"])
    start_time -= progress["wall_seconds"]  # of the process or processes before
    first_step = global_step = progress["global_step"]
    if global_step == total_timesteps:  # only files may be missing
        save_model(args, agent)
    log = RunLog(args.run_dir, global_step)
    train_seconds, last_saved, last_shown = 0.0, time.monotonic(), 0.0

    # Channels-last in memory, so that no minibatch has to be reordered.
    obs_buf = torch.zeros((T, E, 84, 84, 4), dtype=torch.uint8, device=args.device).permute(0, 1, 4, 2, 3)
    action_buf = torch.zeros((T, E), dtype=torch.int64, device=args.device)
    chosen_buf = torch.ones((T, E), device=args.device)  # 0 where FIRE was forced: the policy did not choose it
    value_buf = torch.zeros((T, E), device=args.device)
    reward_buf, done_buf = np.zeros((T, E), np.float32), np.zeros((T, E), bool)
    episode_return, episode_length = np.zeros(E), np.zeros(E)
    episodes, stats = [], []  # since the last log
    tensor = partial(torch.as_tensor, device=args.device)
    obs = envs.reset(env_seeds(args.seed, E, TRAINING, global_step))  # a resumed run starts new episodes
    while global_step < total_timesteps:
        iteration_start = time.perf_counter()
        seed_globals(args.seed, TRAINING, global_step)  # so evaluations and stops do not change later draws

        # Rollout. argmax(logits + Gumbel noise) is a sample of the policy; the noise is drawn once per rollout.
        gumbel = -torch.empty(T, E, envs.num_actions).exponential_(generator=generator).log().to(args.device)
        uniform = torch.empty(T, E).uniform_(generator=generator).numpy()
        for t in range(T):
            obs_buf[t] = tensor(obs)
            logits, value_buf[t] = agent(obs_buf[t])
            action_buf[t] = (logits + gumbel[t]).argmax(-1)
            chosen_buf[t] = tensor(~envs.must_fire)
            if envs.must_fire.any():
                action_buf[t][tensor(envs.must_fire)] = envs.fire
            obs, raw_reward, terminated, truncated, game_over, infos = envs.step(action_buf[t].cpu().numpy())
            reward_buf[t] = flip_rewards(np.sign(raw_reward), uniform[t], args.reward_flip_prob)
            done_buf[t] = terminated | truncated
            episode_return += raw_reward
            episode_length += 1
            time_limit = truncated & ~terminated  # the return goes on: add gamma * V(final observation)
            if time_limit.any():
                _, final_value = agent(tensor(infos["final_obs"]))
                reward_buf[t] += args.gamma * final_value.cpu().numpy() * time_limit
            for e in np.flatnonzero(game_over):
                episodes.append((float(episode_return[e]), float(episode_length[e])))
            episode_return[game_over], episode_length[game_over] = 0, 0
        global_step += T * E

        # Advantages
        values, last_value = value_buf.cpu().numpy(), agent(tensor(obs))[1].cpu().numpy()
        advantages, returns = gae(reward_buf, values, done_buf, last_value, args.gamma, args.gae_lambda)
        stored = obs_buf, action_buf, chosen_buf, tensor(advantages), tensor(returns)
        batch = [x.flatten(0, 1) for x in stored]

        # Update
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.0, 1 - global_step / args.total_timesteps)
        stats.append(compiled_backward(agent, batch, args))
        optimizer.step()
        if not stats[-1]["losses/grad_norm"].isfinite():  # waits for the GPU
            fail(f"the loss is not finite at step {global_step:,}: try a lower --learning-rate or --beta", code=1)
        if global_step > first_step + T * E:  # the first iteration compiles
            train_seconds += time.perf_counter() - iteration_start

        # Evaluate, log, save
        finished = global_step == total_timesteps
        evaluate_now = finished or (args.eval_every and global_step % args.eval_every < T * E)
        if not evaluate_now and global_step % LOG_EVERY >= T * E:
            continue
        sps = (global_step - first_step - T * E) / max(train_seconds, 1e-9)
        if finished:  # before the evaluation, where a game may fail
            save_model(args, agent)
        if evaluate_now:
            progress["eval_returns"] = evaluate(args, agent, None if finished else global_step).tolist()
        metrics = {tag: torch.stack([s[tag] for s in stats]).mean().item() for tag in stats[0]}
        metrics["losses/explained_variance"] = 1 - (returns - values).var() / (returns.var() + 1e-8)
        metrics |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps}
        if episodes:
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, axis=0)
        if evaluate_now:
            metrics["eval/episodic_return"] = np.mean(progress["eval_returns"])
        log.write(global_step, metrics)
        progress["last_returns"] = [*progress["last_returns"], *(r for r, _ in episodes)][-EVAL_EPISODES:]
        episodes, stats = [], []
        if finished or time.monotonic() - last_saved >= SAVE_EVERY:
            last_saved = time.monotonic()
            progress |= {"global_step": global_step, "sps": sps, "wall_seconds": last_saved - start_time}
            progress["generator"] = generator.get_state()
            save_checkpoint(args, parts, progress)
        if finished or time.monotonic() - last_shown > SHOW_EVERY:
            last_shown = time.monotonic()
            mean_return = np.mean(progress["last_returns"] or [np.nan])
            left = timedelta(seconds=int((total_timesteps - global_step) / sps)) if sps else "?"
            line = f"{global_step / total_timesteps:4.0%}  step {global_step:,}  return {mean_return:.1f}"
            say(f"{line}  {sps:,.0f} steps/s  {left} left")

    return save_result(args, progress, commit, log)


@torch.no_grad()
def evaluate(args: Args, agent: Agent, step: int | None = None) -> np.ndarray:
    """Raw scores (eval_episodes,), each of the first whole game in an environment of its own; actions are sampled.
    Each evaluation during training has its own starts and draws."""
    name, stream = ("final", (EVALUATION,)) if step is None else (f"step{step}", (EVALUATION, step))
    say(f"evaluation, {name}: {args.eval_episodes} games")
    seeds = env_seeds(args.seed, args.eval_episodes, *stream)
    generator = torch.Generator().manual_seed(seeds[0])
    with seed_globals(args.seed, *stream), closing(Envs(args, args.eval_episodes)) as envs:
        obs = envs.reset(seeds)
        if args.capture_video:  # the vector environment cannot render: a twin in color plays the same game
            twin = Envs(args, 1, img_height=210, img_width=160, grayscale=False, stack_num=1)
            frames = [twin.reset(seeds[:1])[0, -1]]
        returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
        steps, last_shown = 0, time.monotonic()
        while running.any():
            gumbel = -torch.empty(args.eval_episodes, envs.num_actions).exponential_(generator=generator).log()
            logits, _ = agent(torch.from_numpy(obs).to(args.device))
            actions = (logits + gumbel.to(args.device)).argmax(-1).cpu().numpy()
            if envs.must_fire.any():
                actions[envs.must_fire] = envs.fire
            if args.capture_video and running[0]:
                frames.append(twin.step(actions[:1])[0][0, -1])
            obs, reward, _, _, game_over, _ = envs.step(actions)
            returns += reward * running
            running &= ~game_over
            steps += 1
            if time.monotonic() - last_shown > SHOW_EVERY:
                last_shown = time.monotonic()
                say(f"evaluation, {name}: step {steps:,}, {running.sum()} of {running.size} games still run")
    if args.capture_video:
        try:
            import_module("gymnasium.utils.save_video").save_video(frames, f"{args.run_dir}/videos/{name}", fps=15)
        except Exception as error:  # costs no result
            say(f"no video of evaluation {name}: {error!r}", sys.stderr)
    say(f"seed {args.seed}: {returns.mean():.1f} ({' '.join(f'{r:.1f}' for r in returns)})")
    return returns


# Nothing below knows the algorithm.

RULES = """
--num-envs >= 1, --num-steps >= 1, --num-threads >= 1, --eval-every >= 0, --eval-episodes >= 1
--num-envs * --num-steps <= --total-timesteps <= 10**12, 0 <= --seed < 2**63, 0 <= --gamma <= 1, 0 <= --gae-lambda <= 1
0 < --alpha < inf, 0 <= --beta < inf, -inf < --Z < 0, 0 <= --reward-flip-prob <= 1, 0 < --learning-rate < inf
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
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and not any(metadata.distributions(name=package)):  # import also finds an empty folder
            fail(f"--{flag.replace('_', '-')} needs {package}: pip install {package}")


@torch.no_grad()
def warn_if_slower(device: str) -> None:
    """Print a warning if the network is slower in bfloat16 than in float32, as on CPUs without instructions for it."""
    agent = Agent(1, torch.Generator()).to(device)
    frames, seconds = torch.zeros((64, 4, 84, 84), dtype=torch.uint8, device=device), []
    for agent.bfloat16 in (False, True):
        agent(frames)  # the first call prepares kernels
        begin = time.perf_counter()
        agent(frames)[1].sum().item()  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    if seconds[1] > seconds[0]:
        say(f"warning: --bfloat16 makes the network {seconds[1] / seconds[0]:.1f} times slower here", sys.stderr)


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


def save_model(args: Args, agent: Agent) -> None:
    """Write model.safetensors, all that the agent needs to act."""
    tensors = {name: x.cpu().contiguous() for name, x in agent.state_dict().items()}
    content = safetensors.torch.save(tensors, {"script": SCRIPT, "args": json.dumps(asdict(args))})
    write_atomic(Path(args.run_dir, "model.safetensors"), content)


def save_result(args: Args, progress: dict, commit: str | None, log: RunLog) -> dict:
    """Close the log, write result.json and return its content."""
    log.writer.close()
    modules = {name: sys.modules.get(name.replace("-", "_")) for name in PACKAGES}
    versions = {name: module.__version__ for name, module in modules.items() if module}
    returns, last = progress["eval_returns"], progress["last_returns"]
    result = {
        "script": SCRIPT,
        "env_id": args.env_id,
        "seed": args.seed,
        "args": asdict(args),
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
    write_atomic(Path(args.run_dir, "result.json"), (json.dumps(result, indent=2) + "\n").encode())
    say(f"everything is in {args.run_dir}")
    return result


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


def load_model(path: str, capture_video: bool = False, cuda: bool = True) -> tuple[Args, Agent]:
    """Load a trained agent from its run directory or model.safetensors; returns the arguments of evaluate."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        fail(f"--evaluate {file}: no such .safetensors file. A run leaves it at its end")
    with safetensors.safe_open(file, "pt") as model:
        saved, tensors = model.metadata() or {}, {name: model.get_tensor(name) for name in model.keys()}  # noqa: SIM118
    args = saved_args(file, saved.get("script"), json.loads(saved.get("args", "{}")))
    args = replace(args, run_dir=str(file.parent.absolute()), capture_video=capture_video, cuda=cuda)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    with closing(Envs(args, 1)) as envs:
        agent = Agent(envs.num_actions, torch.Generator(), args.bfloat16).to(args.device)
    agent.load_state_dict(tensors)
    return args, agent


def run(args: Args, given: set[str] | None = None) -> dict:
    """Do what the command line does: check args, train in a run directory, return the result; or --resume, --evaluate.
    given: the flags on the command line; by default those whose value is not the default."""
    if given is None:
        given = {f"--{name.replace('_', '-')}" for name, x in vars(args).items() if x != getattr(Args, name)}
    for flag, others in (("--resume", set()), ("--evaluate", {"--capture-video", "--cuda", "--no-cuda"})):
        if flag in given and (extra := given - others - {flag}):
            fail(f"{flag} takes its arguments from the run: drop {', '.join(sorted(extra))}")
    if args.evaluate is not None:
        returns = evaluate(*load_model(args.evaluate, args.capture_video, args.cuda)).tolist()
        return {"eval_returns": returns, "eval_mean": np.mean(returns)}
    if args.resume is not None:
        args, _lock = open_run(args)
        result = Path(args.run_dir, "result.json")
        if result.exists():
            say(f"{args.run_dir} has finished; --evaluate plays its final evaluation again")
            return json.loads(result.read_text())
    check_args(args)
    args = replace(args, env_id=find_game(args).title().replace("_", "") + "NoFrameskip-v4")
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    args = replace(args, run_dir=os.path.abspath(args.run_dir or f"runs/{name}"))
    keep_memory()
    try:
        if args.bfloat16:
            warn_if_slower(args.device)
        with seed_globals(args.seed), closing(Envs(args, args.num_envs)) as envs:
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
