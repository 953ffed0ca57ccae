"""Does a redesign change a number? Short runs of every script at an old commit and in this tree, compared bit for bit.

    python tests/same_numbers.py 44aff54                    # all, about 5 minutes on one core
    python tests/same_numbers.py 44aff54 --only seeds tldr  # the cases whose names contain one of these words

The same seeds must leave the same parameters, statistics and evaluation. Both sides run on this machine, eagerly, on
the CPU. A case that ends in "resumed" is stopped before its second gae() and goes on with --resume: control scripts are
killed and log, and so save, every rollout; language scripts get a Ctrl-C.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTINUOUS = "--env-id Hopper-v4 --reward-noise-std 0.05"
ATARI = "--env-id BreakoutNoFrameskip-v4 --reward-flip-prob 0.1 --num-threads 1"
CASES = {
    "sppo_continuous_discretized": f"{CONTINUOUS} --total-timesteps 6000",
    "sa2c_continuous_discretized": f"{CONTINUOUS} --total-timesteps 2000",
    "sppo_continuous_discretized seeds": f"{CONTINUOUS} --total-timesteps 6000 --num-seeds 3 --ent-coef 0.01",
    "sa2c_continuous_discretized seeds": f"{CONTINUOUS} --total-timesteps 2000 --num-seeds 3 --anneal-lr",
    "sppo_continuous_discretized resumed": f"{CONTINUOUS} --total-timesteps 6000 --anneal-lr",
    "sa2c_continuous_discretized resumed": f"{CONTINUOUS} --total-timesteps 2000",
    "sppo_continuous_discretized seeds resumed": f"{CONTINUOUS} --total-timesteps 6000 --num-seeds 3",
    "sppo_atari": f"{ATARI} --total-timesteps 3072",
    "sa2c_atari": f"{ATARI} --total-timesteps 640",
    "sppo_atari resumed": f"{ATARI} --total-timesteps 3072",
    "sa2c_atari resumed": f"{ATARI} --total-timesteps 640",
    "sppo_rlhf_imdb": "--target-coef 0.1",
    "sppo_rlhf_tldr": "--target-coef 0.1",
    "sppo_rlhf_imdb resumed": "",
    "sppo_rlhf_tldr resumed": "",
}
KEPT = ("eval_", "before", "train_last10_mean", "total_timesteps")  # of result.json: times and versions may differ


def run(tree: Path, case: str, flags: str, folder: Path, assets: Path) -> Path:
    """Run a case with a tree's scripts; its run directory."""
    script, *how = case.split()
    if "rlhf" in script:
        import tiny

        flags = f"{' '.join(tiny.command_line(tiny.flags(script, assets)))} {flags}"
    run_dir = folder / case.replace(" ", "-")
    start = [sys.executable, tree / f"{script}.py"]
    if "resumed" in how:
        start = [sys.executable, "-c", INTERRUPT, tree / f"{script}.py", "gae", "2"]
        if "rlhf" not in script and "checkpoint_every:" in (tree / f"{script}.py").read_text():  # before version 3
            flags += " --checkpoint-every 1"
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, *flags.split(), "--run-dir", run_dir]
    done = subprocess.run(command, env=environment, **options)
    if "resumed" in how:
        if done.returncode not in (130, -signal.SIGKILL):
            raise SystemExit(f"{case} was not interrupted: {done.stderr}")
        done = subprocess.run([sys.executable, tree / f"{script}.py", "--resume", run_dir], env=environment, **options)
    if done.returncode:
        raise SystemExit(f"{case} failed in {tree}: {done.stderr}")
    return run_dir


# Ctrl-C or kill -9 at the beginning of the n-th call of a function of the script.
INTERRUPT = """
import importlib, os, signal, sys
path, name, n, *flags = sys.argv[1:]
sys.path.insert(0, os.path.dirname(path))
script = importlib.import_module(os.path.basename(path)[:-3])
function, calls = getattr(script, name), []
def interrupted(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(n):
        os.kill(os.getpid(), signal.SIGINT if "rlhf" in path else signal.SIGKILL)
    return function(*args, **kwargs)
setattr(script, name, interrupted)
script.LOG_EVERY, script.SAVE_EVERY = 1, 0  # steps, and Atari's seconds between checkpoints
sys.argv = [path, *flags]
sys.exit(script.main())
"""


def numbers(run_dir: Path) -> dict:
    """Everything a run has trained and scored, by name: tensors, and numbers of result.json."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(run_dir.rglob("*.safetensors")):
        found |= {f"{path.relative_to(run_dir)} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(run_dir.rglob("result.json")):
        result = json.loads(path.read_text())
        found |= {f"{path.relative_to(run_dir)} {key}": result[key] for key in result if key.startswith(KEPT)}
    return found


def same(old, new) -> bool:
    import torch

    if isinstance(old, torch.Tensor):
        return isinstance(new, torch.Tensor) and old.dtype == new.dtype and torch.equal(old, new)
    return old == new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--only", nargs="+", default=[""], help="words: run the cases whose names contain one of them")
    args = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", folder / "base", args.base], check=True)
        try:
            assets = None
            for case, flags in CASES.items():
                if not any(word in case for word in args.only):
                    continue
                if "rlhf" in case and not assets:
                    import tiny

                    assets = tiny.build(folder / "assets")
                found = []
                for side, tree in (("old", folder / "base"), ("new", ROOT)):
                    (folder / side).mkdir(exist_ok=True)
                    found.append(numbers(run(tree, case, flags, folder / side, assets)))
                old, new = found
                wrong = [key for key in old.keys() | new.keys() if not same(old.get(key), new.get(key))]
                differ += bool(wrong) or not old
                print(
                    f"{case}: {', '.join(sorted(wrong)[:5]) + ' differ' if wrong else f'{len(old)} equal'}", flush=True
                )
        finally:
            subprocess.run([*git, "remove", "--force", folder / "base"], check=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
