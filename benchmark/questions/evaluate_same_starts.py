"""Is it the ten evaluation episodes, or the environment's version, that sets a cell apart from the paper's?

Neither, on LunarLander with noise and on Hopper: from 100 common starts, in the paper's versions too, the agents score
what they scored. Written down in docs/questions.md.

    python benchmark/questions/evaluate_same_starts.py runs/benchmark --env-id Hopper-v4 --out same_starts.csv

Lets finished continuous agents play the same episodes. Prints every agent's mean return, and last what the best agent
of each start, picked in hindsight, would have scored, which none of them does. Needs numpy, gymnasium, safetensors and
tyro alone, also old ones: the same agents can be tried in an environment's older versions.
"""

import csv
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open

SCRIPTS = ("sppo_continuous_discretized", "sa2c_continuous_discretized")


@dataclass
class Args:
    runs: tyro.conf.Positional[Path]  # folder with runs, searched to any depth
    env_id: str  # environment to play: agents trained on it (any version) take part
    episodes: int = 100  # starts: episode i is reset with seed i, for every agent
    out: Path | None = None  # CSV for the returns: a row per start, a column per agent


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """Arguments and tensors of a model.safetensors, or None when it is not of a continuous script.

    Raises ValueError when the file cannot be read.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("script") not in SCRIPTS:
                return None
            return json.loads(metadata["args"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def play(env: gym.Env, args: dict, tensors: dict[str, np.ndarray], episodes: int) -> np.ndarray:
    """Returns (episodes,), raw, of the most likely bins, with the normalization statistics of training."""
    space = env.action_space
    bins = np.linspace(space.low.ravel(), space.high.ravel(), args["num_bins"], dtype=space.dtype)
    layers = [(tensors[f"actor.{i}.weight"], tensors[f"actor.{i}.bias"][0]) for i in (0, 2, 4)]
    std = np.sqrt(tensors["obs_var"] + 1e-8)
    returns = np.zeros(episodes)
    for i in range(episodes):
        obs, _ = env.reset(seed=i)
        done = False
        while not done:
            x = np.clip((obs - tensors["obs_mean"]) / std, -10, 10).astype(np.float32)
            for weight, bias in layers[:-1]:
                x = np.tanh(x @ weight + bias)
            logits = (x @ layers[-1][0] + layers[-1][1]).reshape(bins.shape[1], -1)
            action = bins[logits.argmax(1), np.arange(bins.shape[1])].reshape(space.shape)
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            done = terminated or truncated
    return returns


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.episodes < 2:
            raise ValueError(f"--episodes must be at least 2, got {args.episodes}")
        if args.out and not args.out.absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
        if args.out and args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder: name a file")
        warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's MuJoCo ids are v4
        env = gym.make(args.env_id)
        task = args.env_id.rpartition("-v")[0]
        agents = {}
        for path in sorted(args.runs.rglob("model.safetensors")):
            if (model := load(path)) and model[0]["env_id"].rpartition("-v")[0] == task:
                agents[str(path.parent.relative_to(args.runs))] = model
        if not agents:
            raise ValueError(f"no model.safetensors of an agent trained on {task} below {args.runs}")
    except (ValueError, gym.error.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2

    returns, start = {}, time.monotonic()
    for name, (run_args, tensors) in agents.items():
        returns[name] = play(env, run_args, tensors, args.episodes)
        mean, sd = returns[name].mean(), returns[name].std(ddof=1)
        left = (time.monotonic() - start) / len(returns) * (len(agents) - len(returns))
        print(f"{name}: {mean:.1f} ± {sd / args.episodes**0.5:.1f}  {left:.0f} s left", flush=True)
    table = np.array([*returns.values()])  # (agents, episodes)
    print(f"mean of {len(agents)} agents, {args.episodes} episodes each: {table.mean():.1f}")
    print(f"best agent: {table.mean(1).max():.1f}; best agent of each start, in hindsight: {table.max(0).mean():.1f}")
    if args.out:
        try:
            with args.out.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["start", *returns])
                writer.writerows([i, *(f"{r:.1f}" for r in row)] for i, row in enumerate(table.T))
        except OSError as error:
            print(f"error: --out {args.out} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped: nothing was written", file=sys.stderr)
        sys.exit(130)
