"""Gaussian PPO and A2C of Tables 9, 10, 12 and 13: Stable-Baselines3 itself, at its default settings.

    python benchmark/peers/sb3_baseline.py --algo ppo --env-id HalfCheetah-v4 --seed 1 --run-dir runs/gaussian

Reward noise, evaluation and result.json are those of our scripts, whose environments it uses. With --num-bins 11 it is
DPPO and DA2C, and with --policy-coef 20.5 as well DSPPO (alpha 0.5, beta 20): a check on our scripts from outside.
"""

import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

try:
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install -r requirements-benchmark.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sppo_continuous_discretized import EVAL_EPISODES, EVALUATION, RunLog, git_commit, make_env, write_atomic

SCRIPT = Path(__file__).stem
PACKAGES = ("stable_baselines3", "torch", "gymnasium", "mujoco", "Box2D", "numpy")
LOG_EVERY = 2048  # steps


@dataclass
class Args:
    run_dir: str  # where everything goes; must be new or empty
    algo: Literal["ppo", "a2c"] = "ppo"
    """PPO with 1 environment and 2048 steps, or A2C with 4 and 8 (Section C.1); the rest is the library's default"""
    env_id: str = "HalfCheetah-v4"  # gymnasium id of an environment with a Box action space
    total_timesteps: int = 2_000_000  # environment steps, rounded up to whole rollouts (Table 6)
    seed: int = 1  # seed of everything random
    reward_noise_std: float = 0.0
    """standard deviation of the Gaussian noise on normalized training rewards (the paper's noise: 0.05)"""
    gamma: float = 0.99  # discount factor, of the reward normalization too
    num_bins: int | None = None  # bins of every action dimension; without, actions are Gaussian
    policy_coef: float = 1.0  # weight of PPO's policy loss; alpha - beta Z makes it SPPO (docs/paper-notes.md)
    num_threads: int = 1  # CPU threads of torch


class Discretized(gym.ActionWrapper):
    """Bins instead of values as actions: num_bins in every dimension, evenly spaced from low to high inclusive."""

    def __init__(self, env: gym.Env, num_bins: int):
        super().__init__(env)
        box = env.action_space
        self.values = np.linspace(box.low, box.high, num_bins, dtype=box.dtype)  # (num_bins, action_dim)
        self.action_space = gym.spaces.MultiDiscrete([num_bins] * box.shape[0])

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.array([self.values[bin, dimension] for dimension, bin in enumerate(action)])


class NoisyReward(VecEnvWrapper):
    """Adds Gaussian noise to the rewards: around VecNormalize, after normalization and clipping."""

    def __init__(self, venv: VecNormalize, std: float, seed: int):
        super().__init__(venv)
        self.std, self.rng = std, np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards + self.std * self.rng.standard_normal(len(rewards)), dones, infos


class Curves(BaseCallback):
    """Logs as our scripts do, and keeps return and length of all episodes."""

    def __init__(self, log: RunLog):
        super().__init__()
        self.log, self.episodes, self.logged = log, [], 0  # logged: episodes that rows of the log have counted
        self.last_row, self.begin = 0, time.monotonic()

    def _on_step(self) -> bool:
        episodes = [info["episode"] for info in self.locals["infos"] if "episode" in info]
        self.episodes += [(float(episode["r"]), episode["l"]) for episode in episodes]
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps - self.last_row >= LOG_EVERY:
            metrics, new = {}, self.episodes[self.logged :]
            if new:
                metrics = dict(zip(("charts/episodic_return", "charts/episodic_length"), np.mean(new, axis=0)))
            sps = self.num_timesteps / (time.monotonic() - self.begin)
            self.log.write(self.num_timesteps, metrics | {"charts/SPS": sps})
            self.last_row, self.logged = self.num_timesteps, len(self.episodes)


def make(args: Args) -> gym.Env:
    env = make_env(args.env_id)
    return Discretized(env, args.num_bins) if args.num_bins else env


def weighted(policy_coef: float) -> dict:
    """Settings with which PPO multiplies its policy loss, 1 / policy_coef times the rest: Adam's steps are the same."""
    eps = {"optimizer_kwargs": {"eps": 1e-5 / policy_coef}}
    return {"vf_coef": 0.5 / policy_coef, "max_grad_norm": 0.5 / policy_coef, "policy_kwargs": eps}


def train(args: Args, run_dir: Path) -> dict:
    """Train, save the model with its statistics, and return the result."""
    start, commit = time.monotonic(), git_commit()
    torch.set_num_threads(args.num_threads)
    algorithm, num_envs, settings = PPO, 1, weighted(args.policy_coef)
    if args.algo == "a2c":
        algorithm, num_envs, settings = A2C, 4, {"n_steps": 8}
    normalize = VecNormalize(DummyVecEnv([lambda: Monitor(make(args))] * num_envs), gamma=args.gamma)
    envs = NoisyReward(normalize, args.reward_noise_std, args.seed)
    model = algorithm("MlpPolicy", envs, gamma=args.gamma, seed=args.seed, device="cpu", **settings)
    log = RunLog(str(run_dir), 0)
    curves = Curves(log)
    train_start = time.monotonic()
    model.learn(args.total_timesteps, callback=curves)
    sps = model.num_timesteps / (time.monotonic() - train_start)

    eval_returns = evaluate(model, normalize, args)
    log.write(model.num_timesteps, {"eval/episodic_return": eval_returns.mean()})
    model.save(run_dir / "model.zip")
    normalize.save(str(run_dir / "vecnormalize.pkl"))
    versions = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    last_returns = [total for total, _ in curves.episodes[-EVAL_EPISODES:]]
    return {
        "script": SCRIPT,
        "env_id": args.env_id,
        "seed": args.seed,
        "args": asdict(args),
        "total_timesteps": model.num_timesteps,
        "eval_returns": eval_returns.tolist(),
        "eval_mean": eval_returns.mean(),
        "train_last10_mean": np.mean(last_returns) if last_returns else None,
        "sps": sps,
        "wall_seconds": time.monotonic() - start,
        "versions": versions | {"python": platform.python_version()},
        "commit": commit,
        "device": "cpu",
    }


def evaluate(model: PPO | A2C, normalize: VecNormalize, args: Args) -> np.ndarray:
    """Raw returns (10,) of one episode in each of 10 environments of its own, as in our scripts."""
    returns = []
    for seed in np.random.SeedSequence([args.seed, EVALUATION]).generate_state(EVAL_EPISODES).tolist():  # as ours
        env = make(args)
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(normalize.normalize_obs(obs), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done = terminated or truncated
        env.close()
        returns.append(total)
    return np.array(returns)


def check(args: Args, run_dir: Path) -> None:
    """Raises ValueError where an argument is wrong."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"--run-dir {run_dir} is in use: name another, or remove it to start over")
    if args.total_timesteps < 1:
        raise ValueError(f"--total-timesteps must be at least 1, not {args.total_timesteps}")
    if not 0 <= args.gamma <= 1:
        raise ValueError(f"--gamma must be between 0 and 1, not {args.gamma}")
    if args.num_bins is not None and args.num_bins < 2:
        raise ValueError(f"--num-bins must be at least 2, not {args.num_bins}")
    if not 0 < args.policy_coef < math.inf or (args.policy_coef != 1 and args.algo != "ppo"):
        raise ValueError(f"--policy-coef must be above 0, and 1 with --algo a2c, not {args.policy_coef}")
    make(args).close()  # ends the program where there is no such environment


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    run_dir = Path(args.run_dir)
    try:
        check(args, run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    temporary = run_dir.with_name(f".{run_dir.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    (temporary / "args.json").write_text(json.dumps({"script": SCRIPT, "args": asdict(args)}, indent=2))
    os.replace(temporary, run_dir)
    try:
        result = train(args, run_dir)
    except KeyboardInterrupt:
        print("\nstopped; this script cannot resume", file=sys.stderr)
        return 130
    write_atomic(run_dir / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"seed {args.seed}: {result['total_timesteps']:,} steps, evaluation {result['eval_mean']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
