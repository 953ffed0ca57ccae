"""Our runs beside those of Stable-Baselines3 with the same bins, at the same step: a section of the report.

The return of a run is the mean of its training curve over the last tenth of the steps; errors are over seeds.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import stats
from comparisons import plain, short
from figures import figure
from runs import GROUP, RETURN, by_group, last_tenths, series

COLORS = {"Stable-Baselines3": "tab:blue", "ours": "tab:orange"}
NUMBERS = ["Steps", "Stable-Baselines3", "Ours", "n", "Difference / joint SE", "Welch's p"]
NOTE = """\
Returns of training episodes, mean over the last tenth of the steps to which both sides go; errors are over seeds.
Stable-Baselines3's PPO with its policy loss times alpha - beta Z is SPPO, by the identity."""


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
