"""Keep finished runs in benchmark/results/: result files, thinned curves, judge.json, and all of them in scores.csv.

python benchmark/keep.py runs/benchmark     # the folders below it keep their names; no models, no samples
python benchmark/keep.py                    # writes scores.csv anew, after a folder was removed by hand
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from runs import read_judgments, read_runs
from sweeps import find


@dataclass
class Args:
    runs: tyro.conf.Positional[Path | None] = None  # folder with runs, searched to any depth
    out: Path = Path(__file__).parent / "results"  # where to keep them
    rows: int = 100  # rows of curves.csv to keep at most, evenly spaced, besides the rows with an evaluation


def thin(path: Path, copy: Path, rows: int) -> None:
    """Copy a curves.csv with every n-th row and every row that has an evaluation."""
    lines = pd.read_csv(path, dtype=str, keep_default_na=False)
    evaluated = lines["eval/score" if "eval/score" in lines else "eval/episodic_return"] != ""
    every = -(-len(lines) // rows)
    lines[(np.arange(len(lines)) % every == 0) | evaluated].to_csv(copy, index=False)


def keep(result: Path, name: Path, folder: Path, rows: int) -> None:
    """Copy what is kept of one run into folder; name is where it was, without what only its machine knows."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(result.read_text())
    if content.get("args", {}).get("run_dir"):
        content["args"]["run_dir"] = str(name)
    (folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    for path in result.parent.glob("judge*.json"):
        shutil.copyfile(path, folder / path.name)
    thin(result.with_name("curves.csv"), folder / "curves.csv", rows)


def scores(out: Path) -> str:
    """scores.csv of a folder with runs: a row each. What cannot be read is named on standard error."""
    runs, left_out = read_runs([out])
    for folder, reason in left_out:
        print(f"left out: {folder}: {reason}", file=sys.stderr)
    judged = read_judgments(runs.folder)
    texts = judged.percent.map("{:.1f} % against ".format) + judged.against + " by " + judged.judge
    runs["win_rates"] = runs.folder.map(texts.groupby(judged.folder).agg("; ".join))
    runs["folder"] = [Path(folder).relative_to(out).as_posix() for folder in runs.folder]
    first = "folder script family environment algorithm noise seed kind score score_is train_return steps".split()
    runs = runs[[*first, *(name for name in runs if name not in first and name != "origin")]]
    return runs.to_csv(index=False, lineterminator="\n")


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    results = find([args.runs], "result.json") if args.runs else []
    if not results and (args.runs or not find([args.out], "result.json")):
        print(f"error: no result.json below {args.runs or args.out}", file=sys.stderr)
        return 2
    for result in results:
        name = result.parent.relative_to(args.runs)
        keep(result, name, args.out / name, args.rows)
    (args.out / "scores.csv").write_text(scores(args.out))
    print(f"{len(results)} runs copied to {args.out}; all are in scores.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
