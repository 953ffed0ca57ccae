"""What takes the time of sppo_atari.py, and can it take less?

The update takes 71 % of it, six sevenths of which are PyTorch's convolutions and matrix products, as in
Stable-Baselines3. Threads that sleep while they wait (1.02 times the speed by the clock) and games in two halves
(rollouts at 0.88 times) were not taken. Written down in docs/speed.md.

    python benchmark/questions/atari_parts.py    # all three, some 20 minutes
    python benchmark/questions/atari_parts.py --parts halves --rounds 3

update: shares of torch.profiler in the gradient computation and the optimizer step. waiting: training with threads of
torch that sleep while they wait (OMP_WAIT_POLICY=passive), in turn with training as it is. halves: rollouts in which
half of the games step while the policy acts for the other half, in turn with rollouts of all games at once, after a
check that both leave the same frames, logits and rewards, bit for bit.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers.throughput import Speed, in_fresh_process, in_turn, median_wall, ours, ratio

import sppo_atari as script

KINDS = {
    "convolutions, backward": ("aten::convolution_backward",),
    "convolutions, forward": ("aten::mkldnn_convolution", "aten::_convolution"),
    "matrix products": ("aten::mm", "aten::addmm"),
}


@dataclass
class Args:
    parts: tuple[Literal["update", "waiting", "halves"], ...] = ("update", "waiting", "halves")
    """what to measure"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """game"""
    threads: int = 2
    """torch threads, and threads of the emulators"""
    steps: int = 2048
    """environment steps of a training run; rollouts take as many steps of eight games"""
    rounds: int = 10
    """rounds that count; one more comes first and does not"""


@torch.no_grad()
def update_shares(env_id: str, threads: int, minibatches: int) -> dict[str, float]:
    """Shares of the time of operators by kind, in minibatches of random frames after five that do not count."""
    args = script.Args(env_id=env_id, num_threads=threads)
    torch.set_num_threads(threads)
    script.keep_memory()
    agent = script.Agent(script.Envs(args, 1).num_actions, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    size = args.num_envs * args.num_steps // args.num_minibatches
    frames = torch.randint(0, 255, (size, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    actions, chosen = torch.zeros(size, dtype=torch.int64), torch.ones(size)
    batch = [frames, actions, chosen, torch.randn(size) - 1, torch.randn(size), torch.randn(size)]

    def update(times: int) -> None:
        for _ in range(times):
            script.backward(agent, batch, torch.tensor(args.clip_coef), args)
            optimizer.step()

    update(5)
    with torch.profiler.profile() as profile:
        update(minibatches)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {kind: sum(times.get(n, 0) for n in names) / sum(times.values()) for kind, names in KINDS.items()}


def train(policy: str, env_id: str, steps: int, threads: int) -> Speed:
    """Training in a process whose threads wait by OMP_WAIT_POLICY=policy; "" leaves it as it is."""
    if policy:
        os.environ["OMP_WAIT_POLICY"] = policy
    try:
        return in_fresh_process(ours, "sppo_atari", env_id, steps, threads, 1, False)
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)


@torch.no_grad()
def rollouts(parts: int, env_id: str, threads: int, num_steps: int) -> tuple[Speed, list[np.ndarray]]:
    """num_steps steps of eight games, whose parts step while the policy acts for the next one, without training.

    Also frames, logits and rewards of all steps, (num_steps, 8, ...), for the check that they do not depend on parts.
    """
    args = script.Args(env_id=env_id, num_threads=threads)
    torch.set_num_threads(threads)
    script.keep_memory()
    rows = np.array_split(np.arange(args.num_envs), parts)
    games = [script.Envs(args, len(part)) for part in rows]
    agent = script.Agent(games[0].num_actions, torch.Generator().manual_seed(1))
    shape = num_steps, args.num_envs, games[0].num_actions
    gumbel = -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(1)).log()
    frames = np.zeros((num_steps, args.num_envs, 4, 84, 84), np.uint8)
    logits, rewards = np.zeros(shape, np.float32), np.zeros((num_steps + 1, args.num_envs))
    obs = [game.reset(part.tolist()) for game, part in zip(games, rows)]
    wall, cpu = time.perf_counter(), time.process_time()
    for t in range(num_steps):
        for i, (game, part) in enumerate(zip(games, rows)):
            if t:
                obs[i], rewards[t, part], *_ = game.envs.recv()
            part_logits = agent(torch.from_numpy(obs[i]))[0]
            game.envs.send((part_logits + gumbel[t, part]).argmax(-1).numpy())
            frames[t, part], logits[t, part] = obs[i], part_logits.numpy()
    for game in games:
        game.envs.recv()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Speed(num_steps * args.num_envs / wall, num_steps * args.num_envs / cpu), [frames, logits, rewards]


def rollout_speed(parts: int, env_id: str, threads: int, num_steps: int) -> Speed:
    return rollouts(parts, env_id, threads, num_steps)[0]


def is_same(env_id: str, threads: int, num_steps: int) -> bool:
    """Whether rollouts of halves are those of all games at once, bit for bit."""
    both = [rollouts(parts, env_id, threads, num_steps)[1] for parts in (1, 2)]
    return all(np.array_equal(a, b) for a, b in zip(*both))


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if min(args.threads, args.steps, args.rounds) < 1:
        print("error: numbers must be at least 1", file=sys.stderr)
        return 2
    inputs, label = (args.env_id, args.threads), f"{args.env_id}, {args.threads} thread(s)"
    if "update" in args.parts:
        shares = in_fresh_process(update_shares, *inputs, 20)
        print(f"update, {label}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()), flush=True)
    if "waiting" in args.parts:
        runs = {p: lambda p=p: train(p, args.env_id, args.steps, args.threads) for p in ("", "passive")}
        found = in_turn(args.rounds, runs, f"waiting, {label}, {args.steps:,} steps")
        print(f"  passive: {ratio(found['passive'], found[''])} times as it is; ", end="")
        for policy, speeds in found.items():
            parts = {part: np.median([1e3 * s.shares[part] / s.wall for s in speeds]) for part in speeds[0].shares}
            texts = ", ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in parts.items())
            print(f"{policy or 'as it is'}: {texts} ms per step", end="; " if not policy else "\n", flush=True)
    if "halves" in args.parts:
        num_steps = max(1, args.steps // 8)
        if not in_fresh_process(is_same, *inputs, min(num_steps, 256)):
            print("error: rollouts of halves are not the same", file=sys.stderr)
            return 1
        runs = {n: lambda n=n: in_fresh_process(rollout_speed, n, *inputs, num_steps) for n in (1, 2)}
        found = in_turn(args.rounds, runs, f"halves, {label}, rollouts of {num_steps:,} steps")
        print(f"  halves: {ratio(found[2], found[1])} times all games at once, ", end="")
        print(f"{median_wall(found[2])} and {median_wall(found[1])} steps/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
