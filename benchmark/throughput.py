"""Training speed of the scripts as a ratio to Stable-Baselines3 at the same settings, alternating within one run.

    python benchmark/throughput.py                        # SPPO and SA2C, eager and compiled
    python benchmark/throughput.py --scripts sppo_continuous_discretized --num-seeds 10 --rounds 5

Machines are shared and drift, so each round runs Stable-Baselines3 and every variant of ours one after the other, and
only ratios within a round are compared. Compilation and evaluation are not counted, on either side.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    scripts: tuple[str, ...] = ("sppo_continuous_discretized", "sa2c_continuous_discretized")
    """scripts to measure"""
    env_id: str = "HalfCheetah-v4"
    """environment"""
    steps: int = 20_480
    """environment steps of each measurement and agent"""
    rounds: int = 5
    """rounds; the median ratio is printed with the smallest and the largest"""
    num_seeds: int = 1
    """agents trained at once by our scripts; their steps are added up"""
    threads: int = 1
    """torch threads on both sides"""
    peer: str | None = None
    """internal: measure Stable-Baselines3's PPO or A2C and print its steps per second"""


def measure_peer(args: Args) -> float:
    """Steps per second of Stable-Baselines3's PPO or A2C with VecNormalize, at the settings of our scripts."""
    import mujoco
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    warnings.filterwarnings("ignore")
    mujoco.set_mju_user_warning(lambda text: None)
    torch.set_num_threads(args.threads)
    algorithm, num_envs, settings = {"PPO": (PPO, 1, {}), "A2C": (A2C, 4, {"n_steps": 8})}[args.peer]
    model = algorithm(
        "MlpPolicy", VecNormalize(make_vec_env(args.env_id, n_envs=num_envs)), device="cpu", seed=1, **settings
    )
    model.learn(num_envs * model.n_steps)  # warm up
    start = time.perf_counter()
    model.learn(args.steps, reset_num_timesteps=False)
    return args.steps / (time.perf_counter() - start)


def measure_ours(args: Args, script: str, *flags: str) -> float:
    """Steps per second of one of our scripts, summed over its agents, as its result.json has it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", args.env_id, "--run-dir", str(run_dir)]
        command += ["--total-timesteps", str(args.steps), "--num-seeds", str(args.num_seeds)]
        command += ["--num-threads", str(args.threads), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return sum(json.loads(path.read_text())["sps"] for path in run_dir.rglob("result.json"))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.peer:
        print(measure_peer(args))
        return
    print(f"{args.env_id}, {args.threads} threads, {args.num_seeds} agents, {args.steps:,} steps, {args.rounds} rounds")
    for script in args.scripts:
        peer = "PPO" if "ppo" in script else "A2C"
        command = [sys.executable, __file__, "--peer", peer, "--env-id", args.env_id, "--steps", str(args.steps)]
        ratios = {"eager": [], "--compile": []}
        for _ in range(args.rounds):
            output = subprocess.run(
                [*command, "--threads", str(args.threads)], check=True, stdout=subprocess.PIPE
            ).stdout
            baseline = float(output)
            ratios["eager"].append(measure_ours(args, script) / baseline)
            ratios["--compile"].append(measure_ours(args, script, "--compile") / baseline)
        for variant, values in ratios.items():
            print(
                f"{script} {variant:9} {statistics.median(values):.2f} times Stable-Baselines3's {peer} "
                f"(from {min(values):.2f} to {max(values):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
