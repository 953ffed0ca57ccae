"""Do DPPO and DA2C learn as Stable-Baselines3's PPO and A2C do, with the same bins?

Yes: in six cells of 200,000 steps no difference exceeds 1.2 joint standard errors. Written down in
docs/questions.md. Runs of same_as_sb3.sh into two figures and a table:

    python benchmark/peers/same_as_sb3.py runs/benchmark --document docs/questions.md

The return of a run is the mean of its training curve over the last tenth of the steps; errors are over seeds.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from beside_sb3 import beside, both_sides
from documents import replace_section
from runs import read_runs
from stats import markdown

MARKER = "same as Stable-Baselines3"


def section(cells: pd.DataFrame, out: Path, base: Path) -> str:
    """Writes the figures into out; the text names them as seen from the folder base."""
    rows, text = [], []
    for family, some in cells[cells.noise == "none"].groupby("family", sort=False):
        path = out / f"same_as_sb3_{family[-3:]}.png"
        rows.append(beside(some, path).drop(columns="Noise"))
        if path.exists():
            text.append(f"![{family[-3:].upper()} with bins]({os.path.relpath(path, base)})\n")
    return "\n".join([*text, markdown(pd.concat(rows)), ""])


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/benchmark"),)
    """folders with runs of same_as_sb3.sh"""
    out: Path = Path("docs")
    """where the figures go"""
    document: Path | None = None
    """write the table between the marker lines of this Markdown file instead of printing it"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    runs, _ = read_runs(list(args.folders))
    cells = both_sides(runs) if len(runs) else runs
    if cells.empty or all(cells.noise != "none"):
        print("error: no finished runs of both sides; start benchmark/peers/same_as_sb3.sh", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    text = section(cells, args.out, args.document.parent if args.document else Path())
    if args.document:
        args.document.write_text(replace_section(args.document.read_text("utf-8"), text, MARKER), "utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
