"""The sweeps, which are the list of what the paper ran, the scripts that they name, and how fast those were."""

import ast
import json
import os
import statistics
import subprocess
from collections import defaultdict
from functools import cache
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = {  # and the tables of the paper that they fill
    "continuous_ppo": (12, 13),
    "continuous_a2c": (9, 10),
    "atari_ppo": (11,),
    "atari_a2c": (8,),
    "beta_sensitivity": (4,),
    "rlhf_imdb": (3,),
    "rlhf_tldr": (3,),
    "advantage_norm": (14,),
}
NOT_COMPARED = ("run_dir", "resume", "evaluate", "num_seeds")  # how a run is computed, not what
NOT_COMPARED += ("num_threads", "cuda", "cpu", "compile", "micro_batch_size", "rollout_batch_size")
NOT_COMPARED += ("checkpoint_every", "eval_every", "capture_video", "gradient_checkpointing")
NOT_COMPARED += ("track", "wandb_project_name", "wandb_entity")


class CellError(ValueError):
    """A cell that cannot run: its one line is printed, and the others go on."""


@cache
class Script:
    """A script and the defaults of its Args, read without importing it (torch takes seconds)."""

    def __init__(self, name: str, root: Path):
        folders = root, root / "benchmark", root / "benchmark/peers"
        path = next((folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").exists()), None)
        if path is None:
            raise CellError(f"there is no {name}.py in {', '.join(map(str, folders))}")
        self.name, self.path, self.defaults, self.types = name, path, {}, {}
        tree = ast.parse(path.read_text())
        args = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"), None)
        if args is None:
            raise CellError(f"{path} has no class Args")
        for field in (node for node in args.body if isinstance(node, ast.AnnAssign)):
            try:
                self.defaults[field.target.id] = ast.literal_eval(field.value)
            except ValueError:  # computed, such as a number of threads
                self.defaults[field.target.id] = None
            if isinstance(self.defaults[field.target.id], tuple):  # result.json has lists
                self.defaults[field.target.id] = list(self.defaults[field.target.id])
            annotation = ast.unparse(field.annotation).removesuffix(" | None")
            self.types[field.target.id] = {"int": int, "float": float}.get(annotation, str)
        self.length = "num_updates" if "num_updates" in self.defaults else "total_timesteps"

    def parse(self, flags: list[str]) -> dict:
        """["--beta", "20", "--no-norm-adv"] -> {"beta": 20.0, "norm_adv": False}, in the types of Args."""
        given, rest = {}, list(flags)
        while rest:
            flag = rest.pop(0)
            name = flag.removeprefix("--").replace("-", "_")
            if isinstance(self.defaults.get(name.removeprefix("no_")), bool):
                given[name.removeprefix("no_")] = not name.startswith("no_")
            elif isinstance(self.defaults.get(name), list):
                given[name] = list(takewhile(lambda value: not value.startswith("--"), rest))
                del rest[: len(given[name])]
            elif flag.startswith("--") and name in self.defaults and rest:
                given[name] = self.types[name](rest.pop(0))
            else:
                raise CellError(f"{self.path} has no flag {flag}, or the flag has no value")
        return given


def take_seeds(flags: list[str]) -> tuple[int, list[str]]:
    """N of --seeds N, 1 without it, and the other flags."""
    if "--seeds" not in flags:
        return 1, flags
    i = flags.index("--seeds")
    return int(flags[i + 1]), flags[:i] + flags[i + 2 :]


@cache
def cells(sweep: str, control: bool = False) -> tuple[str, ...]:
    """Lines of a sweep as it stands, whatever narrows sweeps in this process's environment."""
    command = ["bash", str(ROOT / "benchmark" / f"{sweep}.sh"), "--cells"]
    environment = {"PATH": os.environ["PATH"], "CONTROL": str(int(control))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(done.stdout.splitlines())


def find(folders: list[Path], name: str) -> list[Path]:
    """Files of that name below the folders, also behind symbolic links, which Path.rglob does not enter; each once."""
    found, seen = [], set()
    for top in folders:
        for folder, subfolders, files in os.walk(top, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            found += [Path(folder, name)] * (name in files)
    return sorted(found)


def process_kind(script: str, args: dict) -> tuple[str, str, bool]:
    """What decides on the speed of a process, besides the environment: a baseline's algorithm, and --compile."""
    return script, args.get("algo") or "", bool(args.get("compile"))


def speeds(folders: list[Path]) -> dict[tuple[str, str, bool, str], float]:
    """Steps, or updates, per second of a process of a kind in an environment or of a policy: the median of those found.

    Environment "" stands for any, which a policy does not: its size decides.
    """
    processes = defaultdict(float)
    for path in find(folders, "result.json"):
        try:
            result = json.loads(path.read_text())
            kind = process_kind(result["script"], result["args"])
            if "env_id" in result:
                # Agents of one process share its sps to the last digit. Their wall_seconds differ, by writing files.
                processes[kind, result["env_id"], path.parent.parent, result["sps"]] += result["sps"]
            else:
                processes[kind, result["policy"], path.parent, ""] = result["num_updates"] / result["wall_seconds"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # not a finished run, or one that was finished in no time
    found = defaultdict(list)
    for (kind, where, _, sps), speed in processes.items():
        found[*kind, where].append(speed)
        if sps != "":
            found[*kind, ""].append(speed)
    return {key: statistics.median(values) for key, values in found.items() if min(values) > 0}


def seconds(speed: dict, script: str, args: dict, steps: int) -> tuple[float | None, bool]:
    """How long steps take in one process, None where no run has told; False: told by runs unlike these in --compile."""
    name, algorithm, compiled = process_kind(script, args)
    for alike in (True, False):
        for where in (args.get("env_id") or args.get("policy"), ""):
            if rate := speed.get((name, algorithm, compiled == alike, where)):
                return steps / rate, alike
    return None, True
