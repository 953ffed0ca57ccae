"""Copy finished runs into benchmark/results/, small enough to version: result files and thinned curves, no models.

Of language runs the verdict of the judge as well (judge.json), not the samples.

python benchmark/thin_results.py runs/benchmark        # the folders below it keep their names
python benchmark/report.py benchmark/results/
"""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from sweeps import find


@dataclass
class Args:
    runs: tyro.conf.Positional[Path]
    """folder with runs, searched to any depth"""
    out: Path = Path(__file__).parent / "results"
    """where to copy them"""
    rows: int = 100
    """rows of curves.csv to keep at most, evenly spaced, besides the rows with an evaluation"""


def thin(path: Path, copy: Path, rows: int) -> None:
    """Copy a curves.csv with every n-th row and every row that has an evaluation."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    every = -(-len(lines) // rows)
    evaluated = "eval/score" if "eval/score" in reader.fieldnames else "eval/episodic_return"
    kept = [line for i, line in enumerate(lines) if i % every == 0 or line[evaluated]]
    with copy.open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    results = find([args.runs], "result.json")
    if not results:
        print(f"error: no result.json below {args.runs}", file=sys.stderr)
        return 2
    for result in results:
        folder = args.out / result.parent.relative_to(args.runs)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(result.read_text())
        if content.get("args", {}).get("run_dir"):  # where it was on the machine that made it says nothing to others
            content["args"]["run_dir"] = str(result.parent.relative_to(args.runs))
        (folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")
        for path in result.parent.glob("judge*.json"):
            shutil.copyfile(path, folder / path.name)
        thin(result.with_name("curves.csv"), folder / "curves.csv", args.rows)
    print(f"{len(results)} runs copied to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
