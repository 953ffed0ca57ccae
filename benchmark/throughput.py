"""Training speed of the scripts as ratios to Stable-Baselines3 at the same settings, measured alternately in one run.

    python benchmark/throughput.py                                            # all four scripts, eager and compiled
    python benchmark/throughput.py --scripts sppo_continuous_discretized --num-seeds 10
    python benchmark/throughput.py --scripts sppo_continuous_discretized --scaling 1 2 5 10 30

Machines are shared and drift, so every round runs Stable-Baselines3 and each variant of ours one after the other, and
only ratios within a round are compared. Compilation and evaluation are not counted, on either side. --scaling shows how
the total grows with the number of agents in one process, where the time goes, and the memory that it takes.
"""

import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    scripts: tuple[str, ...] = (
        "sppo_continuous_discretized",
        "sa2c_continuous_discretized",
        "sppo_atari",
        "sa2c_atari",
    )
    """scripts to measure"""
    env_id: str | None = None
    """environment; default HalfCheetah-v4 and BreakoutNoFrameskip-v4"""
    steps: int | None = None
    """environment steps of each agent and measurement; default 20,480 and on Atari 4,096"""
    rounds: int = 5
    """rounds; the median ratio is printed with the smallest and the largest"""
    num_seeds: int = 1
    """agents trained at once by the continuous scripts; their steps are added up"""
    threads: int | None = None
    """torch threads on both sides; default 1 and on Atari 2"""
    variants: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """without and with --compile"""
    scaling: tuple[int, ...] = ()
    """instead of ratios: numbers of agents in one process to compare (continuous scripts, compiled)"""


def stable_baselines3(script: str, env_id: str, steps: int, threads: int) -> float:
    """Steps per second of Stable-Baselines3's PPO or A2C at the settings of the script."""
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    policy, algorithm = "MlpPolicy", PPO if script.startswith("sppo") else A2C
    if script == "sppo_atari":
        num_envs, options = 8, {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}
    elif script == "sa2c_atari":
        rmsprop = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
        num_envs, options = 16, {"ent_coef": 0.01, "vf_coef": 0.25, "policy_kwargs": rmsprop}
    else:
        num_envs, options = (1, {}) if algorithm is PPO else (4, {"n_steps": 8})
    if script.endswith("atari"):
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        policy, env = "CnnPolicy", VecFrameStack(make_atari_env(env_id, n_envs=num_envs), n_stack=4)
    else:
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None)
        env = VecNormalize(make_vec_env(env_id, n_envs=num_envs))
    model = algorithm(policy, env, device="cpu", seed=1, **options)
    model.learn(num_envs * model.n_steps)  # warm up
    start = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return steps / (time.perf_counter() - start)


def environments_alone(script: str, env_id: str, steps: int, num_seeds: int) -> float:
    """Steps per second of the training environments of num_seeds agents in one process, actions constant."""
    module = importlib.import_module(script)
    envs = module.make_envs(env_id, num_seeds * module.Args().num_envs)
    actions = np.zeros(envs.action_space.shape, envs.action_space.dtype)
    envs.reset(seed=list(range(envs.num_envs)))
    start = time.perf_counter()
    for _ in range(steps):
        envs.step(actions)
    return steps * envs.num_envs / (time.perf_counter() - start)


def ours(script: str, env_id: str, steps: int, threads: int, num_seeds: int, *flags: str) -> float:
    """Steps per second of one of our scripts, summed over its agents, as result.json has it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", env_id, "--run-dir", str(run_dir)]
        command += ["--total-timesteps", str(steps), "--num-threads", str(threads), *flags]
        if num_seeds > 1:
            command += ["--num-seeds", str(num_seeds)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return sum(json.loads(path.read_text())["sps"] for path in run_dir.rglob("result.json"))


def breakdown(script: str, env_id: str, steps: int, num_seeds: int) -> tuple[float, dict[str, float], float]:
    """Total steps per second of num_seeds agents (compiled), shares of the time by part, peak memory in GiB."""
    import torch

    module = importlib.import_module(script)
    seconds = {}

    def time_method(owner: type, name: str, part: str) -> None:
        method = getattr(owner, name)

        def timed(*inputs, **options):
            if torch.compiler.is_compiling():
                return method(*inputs, **options)
            start = time.perf_counter()
            result = method(*inputs, **options)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    time_method(module.Envs, "step", "environment")
    time_method(module.Agent, "logits", "policy")
    time_method(module.Normalizer, "obs", "normalization")
    time_method(module.Normalizer, "reward", "normalization")
    module.evaluate = lambda learner, args, run_dir: np.zeros((num_seeds, 10))
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(env_id=env_id, total_timesteps=steps, num_seeds=num_seeds, compile=True)
        run_dir = Path(folder) / "run"
        module.create_run_dir(args, run_dir)
        module.train(args, run_dir)
        result = json.loads(next(Path(folder).rglob("result.json")).read_text())
    shares = {part: value / result["total_timesteps"] * result["sps"] for part, value in seconds.items()}
    shares["update and the rest"] = 1 - sum(shares.values())
    return num_seeds * result["sps"], shares, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_fresh_process(function: Callable, *inputs):
    """What function(*inputs) returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(function, *inputs).result()


def compare(args: Args, script: str) -> None:
    env_id, steps, threads = settings(args, script)
    num_seeds = 1 if script.endswith("atari") else args.num_seeds
    ratios = {variant: [] for variant in args.variants}
    of_environments = []
    start = time.perf_counter()
    for done in range(args.rounds):
        peer = in_fresh_process(stable_baselines3, script, env_id, steps, threads)
        for variant, values in ratios.items():
            speed = ours(script, env_id, steps, threads, num_seeds, *(["--compile"] if variant == "compile" else []))
            values.append(speed / peer)
        if not script.endswith("atari"):
            alone = in_fresh_process(environments_alone, script, env_id, 3000, num_seeds)
            of_environments.append(speed / alone)
        left = (time.perf_counter() - start) / (done + 1) * (args.rounds - done - 1) / 60
        latest = ", ".join(f"{variant} {values[-1]:.2f}" for variant, values in ratios.items())
        print(f"{script}: round {done + 1}: {latest}; {left:.0f} min left", file=sys.stderr, flush=True)
    print(f"{script}, {env_id}, {num_seeds} agent(s), {threads} thread(s), {args.rounds} rounds of {steps:,} steps")
    for variant, values in ratios.items():
        print(f"  {variant:9} {summary(values)} times Stable-Baselines3")
    if of_environments:
        print(f"  {variant:9} {summary(of_environments)} of the speed of its environments alone", flush=True)


def scale(args: Args, script: str) -> None:
    env_id, steps, _ = settings(args, script)
    print(f"{script}, {env_id}, 1 thread, compiled: total speed relative to {args.scaling[0]} agent(s)")
    first = None
    for num_seeds in args.scaling:
        speed, shares, memory = in_fresh_process(breakdown, script, env_id, steps, num_seeds)
        first = first or speed
        parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        print(f"  {num_seeds:3} agents: {speed / first:5.2f} times; {parts}; peak memory {memory:.2f} GiB", flush=True)


def settings(args: Args, script: str) -> tuple[str, int, int]:
    """Environment, steps and threads for a script where the command line does not say."""
    if script.endswith("atari"):
        return args.env_id or "BreakoutNoFrameskip-v4", args.steps or 4096, args.threads or 2
    return args.env_id or "HalfCheetah-v4", args.steps or 20_480, args.threads or 1


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if min(args.rounds, args.num_seeds, args.threads or 1, args.steps or 1, *args.scaling) < 1:
        print("error: --rounds, --num-seeds, --threads, --steps and --scaling must be at least 1", file=sys.stderr)
        return 2
    for script in args.scripts:
        if args.scaling:
            scale(args, script)
        else:
            compare(args, script)
    return 0


if __name__ == "__main__":
    sys.exit(main())
