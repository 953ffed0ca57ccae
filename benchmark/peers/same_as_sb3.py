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

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables_and_plots.beside_sb3 import FAMILIES, HEADER, TAG, beside_rows, both_sides, line_style
from tables_and_plots.cells import Group
from tables_and_plots.documents import replace_section
from tables_and_plots.figures import plot
from tables_and_plots.runs import Runs, load
from tables_and_plots.scores import markdown_table

MARKER = "same as Stable-Baselines3"


def section(groups: dict[Group, Runs], out: Path, base: Path) -> str:
    """Writes the figures into out; the text names them as seen from the folder base."""
    rows, text = [], []
    for family, (theirs, *_) in FAMILIES.items():
        found = {key: two for key, two in both_sides(groups).items() if key[0] == family and key[2] == "none"}
        shown = {group: groups[group] for two in found.values() for group in two.values()}
        path = out / f"same_as_sb3_{theirs.lower()}.png"
        if shown and plot(shown, TAG, "training return", 1, path, line_style):
            text += [f"![{theirs} with bins]({os.path.relpath(path, base)})", ""]
        for (_, environment, _, weight), two in found.items():
            name = theirs + (f", policy loss times {weight:g}" if weight != 1 else "")
            rows += [[environment, name, *more] for more in [beside_rows(groups, two)] if more]
    header = ["Environment", "With bins", *HEADER]
    return "\n".join([*text, markdown_table(header, rows, right="|".join(HEADER)), ""])


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
    groups = load(list(args.folders)).groups
    if all(noise != "none" for _, _, noise, _ in both_sides(groups)):
        print("error: no finished runs of both sides; start benchmark/peers/same_as_sb3.sh", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    text = section(groups, args.out, args.document.parent if args.document else Path())
    if args.document:
        args.document.write_text(replace_section(args.document.read_text("utf-8"), text, MARKER), "utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
