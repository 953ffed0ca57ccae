"""Could EnvPool's environments take the place of gymnasium's?

Not taken: HalfCheetah and Hopper are the same to rounding, Ant is not, and training runs 1.2 to 1.7 times as fast for a
second class of environments and 530 MB. Written down in docs/speed.md, "EnvPool, tried and not taken".

    pip install --no-deps --target FOLDER envpool==1.2.5 dm-env dm-tree optree \\
        "envpool-assets<0.4" "envpool-assets-mujoco-large<0.4"
    PYTHONPATH=FOLDER python benchmark/questions/envpool_check.py

MuJoCo: gymnasium is set to EnvPool's state before every step (then after a reset only), and both take the same
random action. LunarLander's state, terrain and engine noise cannot be set: returns of gymnasium's own heuristic pilot
are compared. Then environments that ended are reset by their number, and a coarse timing.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

try:
    import envpool
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: the head of {Path(__file__).name} says how to get it", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gymnasium.envs.box2d.lunar_lander import heuristic

from sppo_continuous_discretized import Args as ScriptArgs
from sppo_continuous_discretized import Envs, make_env

warnings.filterwarnings("ignore")  # the v4 ids are deprecated
LANDER = "LunarLanderContinuous-v3"


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "Ant-v4", LANDER)
    """environments to compare"""
    steps: int = 5000
    """steps of the comparison and of the timing"""
    episodes: int = 200
    """of the heuristic pilot, on either side"""
    num_envs: int = 10
    """environments of the timing, on one thread"""


def compare_steps(env_id: str, steps: int, free: bool) -> str:
    """Differences of one step, and whether episodes end alike; free: steps until observations differ."""
    pool, env = envpool.make_gymnasium(env_id, num_envs=1, seed=1), make_env(env_id)
    env.reset(seed=1)
    model, rng = env.unwrapped.model, np.random.default_rng(1)
    obs, fresh = pool.reset()[0][0], True
    differences, ends, alike = [], 0, 0
    for t in range(steps):
        if fresh or not free:  # positions that the observation leaves out change nothing
            position = np.append(np.zeros(model.nq + model.nv - len(obs)), obs[: -model.nv])
            env.unwrapped.set_state(position, obs[-model.nv :])
        action = rng.uniform(env.action_space.low, env.action_space.high)
        (obs,), (reward,), (terminated,), (truncated,), _ = pool.step(action[None])
        other, other_reward, *other_ends, _ = env.step(action)
        differences.append((np.abs(obs - other).max(), abs(reward - other_reward)))
        if free and differences[-1][0] > 1e-6:
            return f"free: observations differ by more than 1e-6 after {t + 1} steps"
        fresh = bool(terminated or truncated or any(other_ends))
        if fresh:
            ends, alike = ends + 1, alike + ([terminated, truncated] == other_ends)
            obs = pool.reset()[0][0]
            env.reset()
    (obs, reward), most = np.median(differences, axis=0), np.max(differences, axis=0)
    text = (
        f"{'free' if free else 'one step'}: {steps} steps, {ends} episodes of which {alike} end alike; difference of "
    )
    return f"{text}observations {obs:.0e} (most {most[0]:.0e}), of rewards {reward:.0e} (most {most[1]:.0e})"


def heuristic_returns(env_id: str, episodes: int) -> str:
    """Mean returns of the pilot in both, with standard errors."""
    pool, env = envpool.make_gymnasium(env_id, num_envs=1, seed=1), make_env(env_id)
    texts = []
    for name in ("EnvPool", "gymnasium"):
        returns = []
        for episode in range(episodes):
            obs, done, total = pool.reset()[0][0] if name == "EnvPool" else env.reset(seed=episode)[0], False, 0.0
            while not done:
                action = heuristic(env, obs).astype(np.float32)
                if name == "EnvPool":
                    (obs,), (reward,), (terminated,), (truncated,), _ = pool.step(action[None])
                else:
                    obs, reward, terminated, truncated, _ = env.step(action)
                total, done = total + float(reward), terminated or truncated
            returns.append(total)
        texts.append(f"{name} {np.mean(returns):.1f} ± {np.std(returns, ddof=1) / episodes**0.5:.1f}")
    return f"return of the heuristic pilot, {episodes} episodes: {', '.join(texts)}"


def step_pool(pool, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """A step after which environments that ended are reset at once; observations before that are the final ones."""
    final_obs, _, terminated, truncated, info = pool.step(actions)
    obs, ended = final_obs, np.flatnonzero(terminated | truncated)
    if len(ended):
        obs = final_obs.copy()
        obs[ended] = pool.reset(ended)[0]
    return obs, final_obs, ended, info


def check_resets(env_id: str, steps: int) -> str:
    """Of environments reset by their number the next step is the first one; the others go on."""
    pool, rng = envpool.make_gymnasium(env_id, num_envs=4, seed=1), np.random.default_rng(1)
    pool.reset()
    length, resets = np.zeros(4, int), 0
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (4, *pool.action_space.shape)).astype(pool.action_space.dtype)
        _, _, ended, info = step_pool(pool, actions)
        length += 1
        if (info["elapsed_step"] != length).any():
            return f"after {resets} resets by number the steps counted are {info['elapsed_step']}, not {length}"
        length[ended], resets = 0, resets + len(ended)
    return f"{resets} resets by number, after each the first step follows"


def coarse_speed(env_id: str, steps: int, num_envs: int) -> str:
    """Steps per CPU second on one thread, both with resets within the step; one run each, alternating tenths."""
    pool = envpool.make_gymnasium(env_id, num_envs=num_envs, num_threads=1, seed=1)
    envs = Envs(ScriptArgs(env_id=env_id), num_envs)
    pool.reset()
    envs.reset(range(1), 0)
    bins = np.zeros((*envs.shape, envs.action_dim), np.int64)
    actions = np.zeros((num_envs, *envs.action_space.shape), envs.action_space.dtype)
    seconds = np.zeros(2)
    for _ in range(10):
        for i, step in enumerate((lambda: step_pool(pool, actions), lambda: envs.step(bins))):
            start = time.process_time()
            for _ in range(steps // 10):
                step()
            seconds[i] += time.process_time() - start
    speeds = steps * num_envs / seconds
    return f"coarse, {num_envs} environments: {speeds[0] / speeds[1]:.1f} times gymnasium's steps per CPU second"


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    print(f"envpool {envpool.__version__}")
    for env_id in args.env_ids:
        if env_id == LANDER:
            lines = [heuristic_returns(env_id, args.episodes)]
        else:
            lines = [compare_steps(env_id, args.steps, free) for free in (False, True)]
        lines += [check_resets(env_id, args.steps), coarse_speed(env_id, args.steps, args.num_envs)]
        print(env_id, *lines, sep="\n  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
