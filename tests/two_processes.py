"""Run by test_rlhf_cli.py under torchrun: gradients of a fixed rollout that is split over processes, and whole runs."""

import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import conftest
import tiny
import torch
from torch.distributed import distributed_c10d

SCRIPTS = [param.values[0] for param in conftest.import_scripts("sppo_rlhf_*.py")]
CHANGES = ({}, {"target_coef": 0.5}, {"norm_adv": False})


def shard(script, rollout):
    """The trajectories of this process; all 8 where there is only one."""
    rows, share = range(script.RANK, 8, script.WORLD_SIZE), {}
    for name, x in rollout._asdict().items():
        share[name] = x[list(rows)] if torch.is_tensor(x) else [x[i] for i in rows]
    return script.Rollout(**share)


def gradients(script, assets, changes):
    """Losses, and gradients after each of two minibatches that are added up: the first half of the rows, then all."""
    args = script.Args(**tiny.flags(script.SCRIPT, assets) | changes)
    learner = script.Learner(args)
    trained = {name: p for name, p in learner.actor_critic.named_parameters() if p.requires_grad}
    tiny.randomize(trained.items(), 0.1)
    rollout = shard(script, tiny.fixed_rollout(script, learner, args))
    result = []
    for num_rows in (4, 8):
        learner.optimizer.zero_grad()
        rows = list(range(num_rows // script.WORLD_SIZE))
        losses = script.backward(learner, rollout, rows, replace(args, micro_batch_size=3))
        result.append((losses, {name: p.grad.clone() for name, p in trained.items()}, rollout.mask[rows].sum().item()))
    return result


def run(script, assets, run_dir, rank):
    """A run that Ctrl-C stops, in its second process alone, and that is resumed. Exit codes of the two parts, and
    whether the checkpoint, for which the first process takes its time, was there when this process stopped.

    Which rows, seed and responses this process had in its updates goes into a file.
    """
    rollout, save, seen = script.rollout, script.Run.save, []

    def spy(learner, rows, args):
        seed = torch.initial_seed()
        trajectories, *rest = rollout(learner, rows, args)
        seen.append((rows, seed, trajectories.responses))
        if rank == 1 and len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return trajectories, *rest

    def slow(run):
        time.sleep(2 * (rank == 0))
        save(run)

    flags = tiny.flags(script.SCRIPT, assets) | {"num_updates": 2, "target_coef": 0.1, "run_dir": run_dir}
    codes, saved = [], []
    with patch.object(script, "rollout", spy), patch.object(script.Run, "save", slow):
        for arguments in (tiny.command_line(flags), ["--resume", str(run_dir)]):
            with patch.object(sys, "argv", [script.__file__, *arguments]):
                try:
                    codes.append(script.main() or 0)
                except SystemExit as end:
                    codes.append(end.code)
            saved.append((run_dir / "checkpoint.pt").exists())
    torch.save(seen, f"{run_dir}-rank{rank}.pt")
    return codes, saved[0]


def slow_start(script, assets):
    """Accelerator of a learner whose first process prepares the data for longer than torch waits by default."""
    load_rows = script.load_rows

    def slow(*inputs):
        time.sleep(6 * (int(os.environ["RANK"]) == 0))
        return load_rows(*inputs)

    args = script.Args(**tiny.flags(script.SCRIPT, assets))
    short = timedelta(seconds=3)
    with patch.object(script, "load_rows", slow), patch.object(distributed_c10d, "default_pg_timeout", short):
        return script.Learner(args).accelerator


def main():
    assets, out = map(Path, sys.argv[1:])
    accelerator = slow_start(SCRIPTS[0], assets)
    assert accelerator.num_processes == 2
    results = {
        (script.SCRIPT, i): gradients(script, assets, changes)
        for script in SCRIPTS
        for i, changes in enumerate(CHANGES)
    }
    torch.save(results, out / f"rank{accelerator.process_index}.pt")
    for script in SCRIPTS:
        codes, saved = run(script, assets, out / script.SCRIPT, accelerator.process_index)
        assert codes == [130, 0] and saved, (script.SCRIPT, accelerator.process_index, codes, saved)


if __name__ == "__main__":
    main()
