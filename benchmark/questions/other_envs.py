"""Do threads, processes or EnvPool step the environments of many agents faster?

Not enough to be taken: ten agents on two cores train at 1.10 times the speed with two threads (for 1.15 times the CPU
seconds), at 0.99 with two processes, and with EnvPool at 1.2 to 1.7 per CPU second. Written down in docs/speed.md.

    python benchmark/questions/other_envs.py --ways threads processes --workers 2
    PYTHONPATH=FOLDER python benchmark/questions/other_envs.py --ways envpool    # FOLDER: see envpool_check.py

Each way takes the place of Envs in sppo_continuous_discretized.py, compiled, in turn with the script as it is
(throughput.py). Threads and processes first show on 2,000 random steps that they return what the script's environments
return, bit for bit; EnvPool's environments are others (envpool_check.py).
"""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
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


def serve(connection, args, num_envs: int) -> None:
    """A worker process: resets or steps its environments for every message until the other end is closed."""
    envs = importlib.import_module(SCRIPT).Envs(args, num_envs)
    try:
        while True:
            method, inputs = connection.recv()
            connection.send(getattr(envs, method)(*inputs))
    except (EOFError, KeyboardInterrupt):
        pass


class Split:
    """The script's environments in equal parts of the agents, each stepped by a thread or a process of its own."""

    def __init__(self, way: str, envs_class, args, num_envs: int, workers: int):
        sizes = [len(part) for part in np.array_split(np.arange(args.num_seeds), workers)]
        self.way, self.bounds = way, np.cumsum(sizes)[:-1]
        whole = envs_class(replace(args, num_seeds=1), 1)
        self.action_dim, self.obs_dim, self.bins = whole.action_dim, whole.obs_dim, whole.bins
        arguments = [replace(args, num_seeds=size) for size in sizes]
        if way == "threads":
            self.parts = [envs_class(own, num_envs) for own in arguments]
            self.executor = ThreadPoolExecutor(workers)
        else:
            context, self.parts = get_context("spawn"), []
            for own in arguments:
                connection, other = context.Pipe()
                context.Process(target=serve, args=(other, own, num_envs), daemon=True).start()
                self.parts.append(connection)

    def call(self, method: str, inputs: list[tuple]) -> list:
        if self.way == "threads":
            return list(self.executor.map(lambda part, own: getattr(part, method)(*own), self.parts, inputs))
        for connection, own in zip(self.parts, inputs):
            connection.send((method, own))
        return [connection.recv() for connection in self.parts]

    def reset(self, seeds: range, *stream: int) -> np.ndarray:
        parts = np.split(np.array(seeds), self.bounds)
        return np.concatenate(self.call("reset", [(part.tolist(), *stream) for part in parts]))

    def step(self, actions: np.ndarray) -> tuple:
        results = self.call("step", [(part,) for part in np.split(actions, self.bounds)])
        return tuple(map(np.concatenate, zip(*results)))

    def close(self) -> None:
        if self.way == "threads":
            self.executor.shutdown()
        for part in self.parts:
            part.close()


class Pool:
    """EnvPool's environments, one thread; those that ended are reset by their number within the step."""

    def __init__(self, envs_class, args, num_envs: int):
        import envpool

        whole = envs_class(replace(args, num_seeds=1), 1)
        self.action_dim, self.obs_dim, self.bins = whole.action_dim, whole.obs_dim, whole.bins
        self.shape, number = (args.num_seeds, num_envs), args.num_seeds * num_envs
        self.make = lambda seed: envpool.make_gymnasium(args.env_id, num_envs=number, num_threads=1, seed=seed)

    def reset(self, seeds: range, *stream: int) -> np.ndarray:
        states = [np.random.SeedSequence([seed, *stream]).generate_state(self.shape[1]) for seed in seeds]
        self.envs = self.make([int(s) % 2**31 for s in np.concatenate(states)])  # it takes 32 bits with a sign
        return self.envs.reset()[0].reshape(*self.shape, -1)

    def step(self, actions: np.ndarray) -> tuple:
        values = self.bins[actions, np.arange(self.action_dim)].reshape(-1, self.action_dim)
        final_obs, reward, terminated, truncated, _ = self.envs.step(values)
        obs, ended = final_obs, np.flatnonzero(terminated | truncated)
        if len(ended):
            obs = final_obs.copy()
            obs[ended] = self.envs.reset(ended)[0]
        results = obs, reward.astype(np.float64), terminated, truncated & ~terminated, final_obs
        return tuple(x.reshape(*self.shape, *x.shape[1:]) for x in results)

    def close(self) -> None:
        self.envs.close()


def make(way: Way, envs_class, args, num_envs: int, workers: int):
    return Pool(envs_class, args, num_envs) if way == "envpool" else Split(way, envs_class, args, num_envs, workers)


def train(way: Way, env_id: str, steps: int, num_seeds: int, workers: int) -> Speed:
    module = importlib.import_module(SCRIPT)
    envs_class = module.Envs
    if way != "as it is":

        class Envs(Pool if way == "envpool" else Split):
            def __init__(self, args, num_envs: int):
                inputs = (envs_class, args, num_envs)
                super().__init__(*inputs) if way == "envpool" else super().__init__(way, *inputs, workers)

        module.Envs = Envs
    return ours(SCRIPT, env_id, steps, 1, num_seeds, True)


def is_same(way: Way, env_id: str, num_agents: int, workers: int, steps: int = 2000) -> bool:
    """Whether random bins lead to the same observations, rewards and ends as in the script's environments."""
    module = importlib.import_module(SCRIPT)
    args = module.Args(env_id=env_id, num_seeds=num_agents)
    both = module.Envs(args, 1), make(way, module.Envs, args, 1, workers)
    rng = np.random.default_rng(1)
    same = np.array_equal(*[envs.reset(args.seeds, 0) for envs in both])
    for _ in range(steps):
        actions = rng.integers(0, args.num_bins, (num_agents, 1, both[0].action_dim))
        same = same and all(np.array_equal(a, b) for a, b in zip(*(envs.step(actions) for envs in both)))
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
