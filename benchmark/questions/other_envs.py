"""Do threads, processes or EnvPool step the environments of many agents faster?

Not enough to be taken: ten agents on two cores train at 1.10 times the speed with two threads (for 1.15 times the CPU
seconds), at 0.99 with two processes, and with EnvPool at 1.2 to 1.7 per CPU second. Written down in docs/speed.md.

    python benchmark/questions/other_envs.py --ways threads processes --workers 2
    PYTHONPATH=FOLDER python benchmark/questions/other_envs.py --ways envpool    # FOLDER: see envpool_check.py

Each way takes the place of make_envs in sppo_continuous_discretized.py, compiled, in turn with the script as it is
(throughput.py). Threads and processes first show on 2,000 random steps that they return what the script's environments
return, bit for bit; EnvPool's environments are others (envpool_check.py).
"""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers.throughput import Speed, in_fresh_process, in_turn, median_wall, ours, ratio

SCRIPT = "sppo_continuous_discretized"
Way = Literal["as it is", "threads", "processes", "envpool"]


@dataclass
class Args:
    ways: tuple[Literal["threads", "processes", "envpool"], ...] = ("threads", "processes")
    """what to compare with the script's own environments"""
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "Ant-v4", "LunarLanderContinuous-v3")
    """environments"""
    num_seeds: int = 10
    """agents trained at once"""
    steps: int = 20_480
    """environment steps of each agent and measurement"""
    rounds: int = 10
    """rounds that count; one more comes first and does not"""
    workers: int = 2
    """threads or processes that share the environments"""


def join(parts: list[tuple]) -> tuple:
    """One result of step from those of the workers."""
    *arrays, infos = zip(*parts)
    final_obs = np.concatenate([info["final_obs"] for info in infos])
    return *map(np.concatenate, arrays), {"final_obs": final_obs}


def serve(connection, env_id: str, num_envs: int) -> None:
    """A worker process: resets or steps its environments for every message until the other end is closed."""
    envs = importlib.import_module(SCRIPT).make_envs(env_id, num_envs)
    try:
        while True:
            method, value = connection.recv()
            connection.send(getattr(envs, method)(value))
    except (EOFError, KeyboardInterrupt):
        pass


class Split:
    """The script's environments in equal parts, each part stepped by a thread or a process of its own."""

    def __init__(self, way: str, make_envs, env_id: str, num_envs: int, workers: int):
        sizes = [len(part) for part in np.array_split(np.arange(num_envs), workers)]
        self.way, self.bounds = way, np.cumsum(sizes)[:-1]
        whole = make_envs(env_id, num_envs)
        self.num_envs, self.action_space = num_envs, whole.action_space
        self.single_action_space, self.single_observation_space = (
            whole.single_action_space,
            whole.single_observation_space,
        )
        if way == "threads":
            self.parts = [make_envs(env_id, size) for size in sizes]
            self.executor = ThreadPoolExecutor(workers)
        else:
            context, self.parts = get_context("spawn"), []
            for size in sizes:
                connection, other = context.Pipe()
                context.Process(target=serve, args=(other, env_id, size), daemon=True).start()
                self.parts.append(connection)

    def call(self, method: str, values: list) -> list:
        if self.way == "threads":
            return list(self.executor.map(lambda part, value: getattr(part, method)(value), self.parts, values))
        for connection, value in zip(self.parts, values):
            connection.send((method, value))
        return [connection.recv() for connection in self.parts]

    def reset(self, seed: list[int]) -> tuple[np.ndarray, dict]:
        seeds = [part.tolist() for part in np.split(np.array(seed), self.bounds)]
        return np.concatenate([obs for obs, _ in self.call("reset", seeds)]), {}

    def step(self, actions: np.ndarray) -> tuple:
        return join(self.call("step", np.split(actions, self.bounds)))

    def close(self) -> None:
        if self.way == "threads":
            self.executor.shutdown()
        for part in self.parts:
            part.close()


class Pool:
    """EnvPool's environments, one thread; those that ended are reset by their number within the step."""

    def __init__(self, env_id: str, num_envs: int):
        import envpool

        self.make = lambda seed: envpool.make_gymnasium(env_id, num_envs=num_envs, num_threads=1, seed=seed)
        self.envs, self.num_envs = self.make(1), num_envs
        self.single_action_space = self.envs.action_space
        self.single_observation_space = self.envs.observation_space
        self.action_space = SimpleNamespace(shape=(num_envs, *self.envs.action_space.shape))

    def reset(self, seed: list[int]) -> tuple[np.ndarray, dict]:
        self.envs = self.make([s % 2**31 for s in seed])  # it takes 32 bits with a sign
        return self.envs.reset()[0], {}

    def step(self, actions: np.ndarray) -> tuple:
        final_obs, reward, terminated, truncated, _ = self.envs.step(actions)
        obs, ended = final_obs, np.flatnonzero(terminated | truncated)
        if len(ended):
            obs = final_obs.copy()
            obs[ended] = self.envs.reset(ended)[0]
        return obs, reward.astype(np.float64), terminated, truncated & ~terminated, {"final_obs": final_obs}

    def close(self) -> None:
        self.envs.close()


def make(way: Way, make_envs, env_id: str, num_envs: int, workers: int):
    return Pool(env_id, num_envs) if way == "envpool" else Split(way, make_envs, env_id, num_envs, workers)


def train(way: Way, env_id: str, steps: int, num_seeds: int, workers: int) -> Speed:
    module = importlib.import_module(SCRIPT)
    make_envs = module.make_envs
    if way != "as it is":
        module.make_envs = lambda env_id, num_envs: make(way, make_envs, env_id, num_envs, workers)
    return ours(SCRIPT, env_id, steps, 1, num_seeds, True)


def is_same(way: Way, env_id: str, num_envs: int, workers: int, steps: int = 2000) -> bool:
    """Whether random actions lead to the same observations, rewards and ends as in the script's environments."""
    make_envs = importlib.import_module(SCRIPT).make_envs
    both = make_envs(env_id, num_envs), make(way, make_envs, env_id, num_envs, workers)
    rng, seeds = np.random.default_rng(1), list(range(num_envs))
    space = both[0].single_action_space
    same = np.array_equal(*[envs.reset(seed=seeds)[0] for envs in both])
    for _ in range(steps):
        actions = rng.uniform(space.low, space.high, (num_envs, *space.shape)).astype(space.dtype)
        results = [(*result, infos["final_obs"]) for *result, infos in (envs.step(actions) for envs in both)]
        same = same and all(np.array_equal(a, b) for a, b in zip(*results))
    both[1].close()
    return same


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if min(args.num_seeds, args.steps, args.rounds, args.workers) < 1 or args.workers > args.num_seeds:
        print("error: numbers must be at least 1, and --workers at most --num-seeds", file=sys.stderr)
        return 2
    for env_id in args.env_ids:
        for way in args.ways:
            if way != "envpool" and not in_fresh_process(is_same, way, env_id, args.num_seeds, args.workers):
                print(f"error: {env_id} by {way} is not the same", file=sys.stderr)
                return 1
        inputs = env_id, args.steps, args.num_seeds, args.workers
        runs = {way: partial(in_fresh_process, train, way, *inputs) for way in ("as it is", *args.ways)}
        label = f"{SCRIPT}, {env_id}, {args.num_seeds} agents, {args.workers} workers, {args.steps:,} steps, compiled"
        found = in_turn(args.rounds, runs, label)
        for way in args.ways:
            text = ratio(found[way], found["as it is"])
            text = text.partition(" (per CPU")[0] if way == "processes" else text  # only the parent's are counted
            print(f"  {way}: {text} times the script, ", end="")
            print(f"{median_wall(found[way])} and {median_wall(found['as it is'])} steps/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
