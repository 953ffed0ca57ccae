"""Do DPPO and DA2C learn as Stable-Baselines3's PPO and A2C do, with the same bins?

Yes: in six cells of 200,000 steps no difference exceeds 1.2 joint standard errors. Written down in
docs/questions.md. Runs of same_as_sb3.sh into two figures and a table:

    python benchmark/peers/same_as_sb3.py runs/benchmark --document docs/questions.md

The return of a run is the mean of its training curve over the last tenth of the steps; errors are over seeds.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import stats
from comparisons import plain, short
from documents import replace_section
from figures import figure
from runs import GROUP, RETURN, by_group, last_tenths, read_runs, series

COLORS = {"Stable-Baselines3": "tab:blue", "ours": "tab:orange"}
NUMBERS = ["Steps", "Stable-Baselines3", "Ours", "n", "Difference / joint SE", "Welch's p"]
NOTE = """\
Returns of training episodes, mean over the last tenth of the steps to which both sides go; errors are over seeds.
Stable-Baselines3's PPO with its policy loss times alpha - beta Z is SPPO, by the identity."""
MARKER = "same as Stable-Baselines3"


def both_sides(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per cell that both sides have run: family, environment, noise, weight of the policy loss, folders of both.

    Of several lengths the longest counts.
    """
    groups = by_group(runs.assign(weight=runs.alpha - runs.beta * runs.Z), [*GROUP, "weight"]).sort_values("steps")
    theirs = groups[groups.other_settings.str.fullmatch(r"num_bins 11(, policy_coef \S+)?")]
    coef = theirs.other_settings.str.extract(r"policy_coef (\S+)", expand=False).astype(float).fillna(1.0)
    theirs = theirs[theirs.origin == "sb3_baseline"].assign(weight=coef)
    known = [("continuous_ppo", "DPPO"), ("continuous_ppo", "DSPPO"), ("continuous_a2c", "DA2C")]
    ours = groups[(groups.kind != "other") & pd.MultiIndex.from_frame(groups[["family", "algorithm"]]).isin(known)]
    key = ["family", "environment", "noise", "weight"]
    ours, theirs = (side.drop_duplicates(key, keep="last")[[*key, "folders"]] for side in (ours, theirs))
    return ours.merge(theirs, on=key, suffixes=("_ours", "_theirs")).sort_values(key, ignore_index=True)


def numbers(ours: list[str], theirs: list[str]) -> list[str] | None:
    """Returns of both sides, the difference and Welch's p; None where one has no curves."""
    ends = [curve.index[-1] for curve in (series(folder, RETURN) for folder in [*ours, *theirs]) if len(curve) > 1]
    own, sb3 = (last_tenths(folders, RETURN, min(ends, default=0)) for folders in (ours, theirs))
    if not (own and sb3):
        return None
    t, p, _ = stats.welch_of(own, sb3)
    texts = [stats.mean_text(sb3), stats.mean_text(own), f"{len(sb3)}, {len(own)}"]
    return [f"{min(ends):,.0f}", *texts, f"{t:+.2f}" if np.isfinite(t) else "-", stats.p_text(p)]


def beside(cells: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A row of texts for each cell, and the figure at path; no row where no cell has curves of both sides."""
    rows, panels = [], {}
    for cell in cells.itertuples():
        if texts := numbers(cell.folders_ours, cell.folders_theirs):
            name = cell.family[-3:].upper() + (f", policy loss times {cell.weight:g}" if cell.weight != 1 else "")
            rows.append([short(cell.environment), name, cell.noise, *texts])
            sides = zip(COLORS, (cell.folders_theirs, cell.folders_ours))
            lines = [(side, {"color": COLORS[side]}, folders) for side, folders in sides]
            panels.setdefault(f"{plain(cell.environment)}, {name}", []).extend(lines)
    figure(path, [(title, "training return", RETURN, 1, lines) for title, lines in panels.items()])
    return pd.DataFrame(rows, columns=["Environment", "With bins", "Noise", *NUMBERS])


def section(cells: pd.DataFrame, out: Path, base: Path) -> str:
    """Writes the figures into out; the text names them as seen from the folder base."""
    rows, text = [], []
    for family, some in cells[cells.noise == "none"].groupby("family", sort=False):
        path = out / f"same_as_sb3_{family[-3:]}.png"
        rows.append(beside(some, path).drop(columns="Noise"))
        if path.exists():
            text.append(f"![{family[-3:].upper()} with bins]({os.path.relpath(path, base)})\n")
    return "\n".join([*text, stats.markdown(pd.concat(rows)), ""])


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/benchmark"),)  # folders with runs of same_as_sb3.sh
    out: Path = Path("docs")  # where the figures go
    document: Path | None = None  # write between the marker lines of this Markdown file instead of printing


def write(section: Callable[[Path, Path], str], out: Path, document: Path | None, marker: str) -> None:
    """The text of section(out, folder of the document) between marker lines of the document, or else printed."""
    out.mkdir(parents=True, exist_ok=True)
    text = section(out, document.parent if document else Path())
    if document:
        document.write_text(replace_section(document.read_text("utf-8"), text, marker), "utf-8")
    else:
        print(text)


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    runs, _ = read_runs(list(args.folders))
    cells = both_sides(runs) if len(runs) else runs
    if cells.empty or all(cells.noise != "none"):
        print("error: no finished runs of both sides; start benchmark/peers/same_as_sb3.sh", file=sys.stderr)
        return 2
    write(partial(section, cells), args.out, args.document, MARKER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
