"""What of the paper was not run: the cells of the sweeps without runs, and how long they take."""

from pathlib import Path

import numpy as np
import pandas as pd
from comparisons import short
from runs import GROUP, describe, parse
from stats import markdown
from sweeps import SWEEPS, cells, seconds, speeds


def plan(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per cell of the sweeps, each once, described as the runs that its line makes; missing: it has no run."""
    rows = []
    for sweep in SWEEPS:
        for line in map(parse, cells(sweep)):
            lengths = dict.fromkeys(("total_timesteps", "num_updates"), line["steps"])
            result = {"script": line["script"], "env_id": line["environment"], "args": line["settings"]}
            rows.append(line | describe(result | lengths) | {"sweep": sweep})
    planned = pd.DataFrame(rows).drop_duplicates(GROUP, ignore_index=True)
    merged = planned.merge(runs[GROUP].drop_duplicates(), "left", GROUP, indicator=True)
    return planned.assign(missing=merged._merge == "left_only")


def hours(rows: pd.DataFrame, speed: dict) -> list[float]:
    """Of one process after the other, with --compile where the script has it; nan where no run has told the speed."""
    found = []
    for x in rows.itertuples():
        settings = x.settings | ({"compile": True} if "compile" in x.settings else {})
        time, _ = seconds(speed, x.script, settings, x.seeds * x.steps)
        found.append(time / 3600 if time else np.nan)
    return found


def missing_text(folders: list[Path], runs: pd.DataFrame) -> str:
    """A row per algorithm and noise of a sweep, with the environments that lack it."""
    planned = plan(runs)
    planned["hours"], rows = hours(planned, speeds(folders)), []
    names = (planned.algorithm + " " + planned.other_settings).str.strip()
    for (sweep, name, noise), some in planned.groupby(["sweep", names, "noise"], sort=False):
        left = some[some.missing]
        if len(left):
            where = f"all {len(left)}" if 2 < len(left) == len(some) else ", ".join(left.environment.map(short))
            time = left.hours.sum()
            estimate = f"{time:,.{0 if time >= 10 else 1}f}{'+' if left.hours.isna().any() else ''}" if time else "-"
            tables = ", ".join(map(str, SWEEPS[sweep]))
            rows.append([tables, name, noise, f"{len(left)} of {len(some)}", where, left.seeds.iloc[0], estimate])
    header = ["Tables", "Algorithm", "Noise", "Cells missing", "Environments", "Seeds", "Hours"]
    where, total = ", ".join(f"`{folder}`" for folder in folders), planned.hours[planned.missing].sum()
    return (
        f"{planned.missing.sum()} of the {len(planned)} cells of the sweeps have no run at the paper's settings and "
        f"length. Hours are those of one process after the other, at the speeds of the runs in {where}: {total:,.0f} "
        "in all, without what no run has told the speed of (- or +). `benchmark/judge.py` finds the win rates of Table "
        f"3 when the runs are there.\n\n{markdown(pd.DataFrame(rows, columns=header))}\n"
    )
