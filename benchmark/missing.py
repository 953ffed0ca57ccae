"""What of the paper was not run: every such cell, the command that runs it, and how long that takes."""

from pathlib import Path

import pandas as pd
from comparisons import short
from runs import GROUP, describe, parse
from stats import markdown
from sweeps import SWEEPS, cells, seconds, speeds


def plan() -> pd.DataFrame:
    """A row per cell of the sweeps, each once, described as the runs that its line makes."""
    rows = []
    for sweep in SWEEPS:
        for line in map(parse, cells(sweep)):
            lengths = dict.fromkeys(("total_timesteps", "num_updates"), line["steps"])
            result = {"script": line["script"], "env_id": line["environment"], "args": line["settings"]}
            rows.append(line | describe(result | lengths) | {"sweep": sweep})
    return pd.DataFrame(rows).drop_duplicates(GROUP, ignore_index=True)


def cell_names(rows: pd.DataFrame) -> str:
    """PPO, SPPO; with noise: SPPO."""
    names = (rows.algorithm + " " + rows.other_settings).str.strip()
    parts = {"": names[rows.noise == "none"], "with noise: ": names[rows.noise != "none"]}
    return "; ".join(prefix + ", ".join(dict.fromkeys(some)) for prefix, some in parts.items() if len(some))


def hours(rows: pd.DataFrame, speed: dict) -> tuple[float, bool, bool]:
    """Of one process after the other, as far as runs have told; whether all have, and whether with --compile."""
    can = ["compile" in settings for settings in rows.settings]
    settings = [x | ({"compile": True} if c else {}) for x, c in zip(rows.settings, can)]
    found = [seconds(speed, x.script, own, x.seeds * x.steps) for x, own in zip(rows.itertuples(), settings)]
    compiled = any(can) and all(time and alike for (time, alike), c in zip(found, can) if c)
    return sum(time or 0 for time, _ in found) / 3600, all(time for time, _ in found), compiled


def command(part: pd.DataFrame, some: pd.DataFrame, compiled: bool) -> str:
    """What runs a part of a sweep's cells: the line of a single one, or the sweep, narrowed to environments."""
    flag = " --compile" * compiled
    if not part.whole.all():
        return f'benchmark/run_cells.sh{flag} <<< "{part.line.iloc[0]}"'
    sweep = f"benchmark/{part.sweep.iloc[0]}.sh{flag}"
    names = list(dict.fromkeys(short(x.get("env_id") or Path(x["dataset"]).name) for x in part.settings))
    if len(names) == some.environment.nunique():
        return sweep
    return f"ENVS={names[0]} {sweep}" if len(names) == 1 else f'ENVS="{" ".join(names)}" {sweep}'


def missing_text(folders: list[Path], runs: pd.DataFrame) -> str:
    """A row for the environments of a sweep of which nothing was run, and one for each cell that others lack."""
    planned, speed, rows, total, unknown = plan(), speeds(folders), [], 0.0, 0
    merged = planned.merge(runs[GROUP].drop_duplicates(), "left", GROUP, indicator=True)
    planned["run"] = merged._merge == "both"
    planned["whole"] = ~planned.groupby(["sweep", "environment"]).run.transform("any")
    for sweep, some in planned.groupby("sweep", sort=False):
        left = some[~some.run]
        names = {environment: cell_names(rows) for environment, rows in left.groupby("environment")}
        together = left.environment.map(names).where(left.whole, left.index.astype(str))
        for _, part in sorted(left.groupby(together, sort=False), key=lambda item: item[1].whole.all()):
            time, known, compiled = hours(part, speed)
            total, unknown = total + time, unknown + (not known)
            estimate = f"{time:,.{0 if time >= 10 else 1}f}{'' if known else '+'}" if time else "-"
            where = list(dict.fromkeys(part.environment.map(short)))
            where = f"all {len(where)}" if 2 < len(where) == some.environment.nunique() else ", ".join(where)
            texts = [", ".join(map(str, SWEEPS[sweep])), where, cell_names(part), part.seeds.iloc[0]]
            rows.append([*texts, f"`{command(part, some, compiled)}`", estimate])
    header = ["Table", "Environment", "Cells", "Seeds", "Command", "Hours"]
    table = markdown(pd.DataFrame(rows, columns=header))
    names = ", ".join(f"`{folder}`" for folder in folders)
    return (
        f"{(~planned.run).sum()} of the {len(planned)} cells of the sweeps have no run at the paper's settings and "
        f"length. Hours are those of one process after the other, at the speeds of the runs in {names}: {total:,.0f} "
        f"in all, without what no run has told the speed of ({unknown} rows, - or +). `benchmark/judge.py` finds the "
        f"win rates of Table 3 when the runs are there.\n\n{table}\n"
    )
