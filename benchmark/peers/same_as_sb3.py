"""Do DPPO and DA2C learn as Stable-Baselines3's PPO and A2C do, with the same bins?

Yes: in six cells of 200,000 steps no difference exceeds 1.2 joint standard errors. Written down in docs/results.md,
"Beside Stable-Baselines3's PPO and A2C". Runs of same_as_sb3.sh into two figures and a table:

    python benchmark/peers/same_as_sb3.py runs/benchmark --document docs/results.md

The return of a run is the mean of its training curve over the last tenth of the steps; errors are over seeds.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables_and_plots.cells import Group
from tables_and_plots.documents import replace_section
from tables_and_plots.figures import bin_means, plot
from tables_and_plots.runs import Runs, load, read_curve
from tables_and_plots.scores import format_mean, standard_error
from tables_and_plots.tables import markdown_table, sort_key

TAG = "charts/episodic_return"  # raw returns of the episodes that ended since the last row, on both sides
FAMILIES = {"continuous_ppo": ("PPO", "DPPO"), "continuous_a2c": ("A2C", "DA2C")}  # theirs, ours
MARKER = "same as Stable-Baselines3"
COLORS = {"Stable-Baselines3": "tab:blue", "ours": "tab:orange"}


def side(group: Group) -> str | None:
    """Whose discretized baseline a group is; None: another group."""
    theirs, ours = FAMILIES.get(group.family, ("", ""))
    if group.noise != "none":
        return None
    if group.algorithm == theirs and group.differences == (("num_bins", 11),):
        return "Stable-Baselines3"
    return "ours" if group.algorithm == ours and not group.differences else None


def last_tenth(runs: Runs) -> np.ndarray:
    """A mean return for each seed that has a curve."""
    curves = [read_curve(folder, TAG) for _, folder in sorted(runs.folders.items())]
    return np.array([bin_means(*c, c[0][-1] * np.array([0.9, 1]))[0] for c in curves if len(c[0]) > 1])


def line_style(group: Group, _: set) -> tuple[str, str]:
    return side(group), COLORS[side(group)]


def section(groups: dict[Group, Runs], out: Path, base: Path) -> str:
    """Writes the figures into out; the text names them as seen from the folder base."""
    rows, text = [], []
    for family, (theirs, _) in FAMILIES.items():
        found = {group: runs for group, runs in groups.items() if group.family == family and side(group)}
        path = out / f"same_as_sb3_{theirs.lower()}.png"
        if found and plot(found, TAG, "training return", 1, path, line_style):
            text += [f"![{theirs} with bins]({os.path.relpath(path, base)})", ""]
        for environment in dict.fromkeys(group.environment for group in sorted(found, key=sort_key)):
            both = {side(group): last_tenth(runs) for group, runs in found.items() if group.environment == environment}
            if len(both) == 2:
                ours, sb3 = both["ours"], both["Stable-Baselines3"]
                joint = math.hypot(standard_error(ours), standard_error(sb3))
                difference = f"{(ours.mean() - sb3.mean()) / joint:+.2f}" if joint > 0 else "-"
                seeds = f"{len(sb3)}, {len(ours)}"
                rows.append([environment, theirs, format_mean(sb3), format_mean(ours), seeds, difference])
    header = ["Environment", "With bins", "Stable-Baselines3", "Ours", "n", "Difference / joint SE"]
    return "\n".join([*text, markdown_table(header, rows, right="|".join(header[2:])), ""])


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
    if not {"ours", "Stable-Baselines3"} <= {side(group) for group in groups}:
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
