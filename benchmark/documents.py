"""Sections of README.md and docs/ that are made from the runs, each between two marker lines."""

from pathlib import Path

import pandas as pd
import stats
from comparisons import pairs_text, plain, short, standing_text, together_text
from findings import FINDINGS
from runs import GROUP, Found, describe, parse
from sweeps import SWEEPS, seconds, speeds
from sweeps import cells as lines_of
from tables import gains_text


def scores_table(cells: pd.DataFrame) -> str:
    """A row per environment: DPPO and DSPPO, without and with noise, each beside the paper's mean."""
    some = cells[cells.algorithm.isin(["DPPO", "DSPPO"]) & (cells.n > 0)]
    texts = [f"{stats.mean_se(x.ours, x.se)} ({x.printed.split()[0]})" for x in some.itertuples()]
    names = some.algorithm + some.noise.map(lambda noise: "" if noise == "none" else ", noise")
    table = some.assign(text=texts, name=names).set_index(["environment", "name"]).text.unstack(sort=False)
    table = table.reindex(columns=["DPPO", "DSPPO", "DPPO, noise", "DSPPO, noise"])
    table.insert(0, "n", some.groupby("environment").n.agg(stats.span))
    table.insert(0, "Mean ± SE (the paper's mean)", table.index.map(plain))
    return stats.markdown(table) + "\n"


def plan(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per cell of the sweeps, each once, described as the runs that its line makes; missing: it has no run."""
    rows = []
    for sweep in SWEEPS:
        for line in map(parse, lines_of(sweep)):
            lengths = dict.fromkeys(("total_timesteps", "num_updates"), line["steps"])
            result = {"script": line["script"], "env_id": line["environment"], "args": line["settings"]}
            rows.append(line | describe(result | lengths) | {"sweep": sweep})
    planned = pd.DataFrame(rows).drop_duplicates(GROUP, ignore_index=True)
    merged = planned.merge(runs[GROUP].drop_duplicates(), "left", GROUP, indicator=True)
    return planned.assign(missing=merged._merge == "left_only")


def missing_text(folders: list[Path], runs: pd.DataFrame) -> str:
    """A row per algorithm and noise of a sweep, with the environments that lack it."""
    planned, speed, rows = plan(runs), speeds(folders), []
    times = [
        seconds(speed, x.script, x.settings | {"compile": "compile" in x.settings}, x.seeds * x.steps)[0]
        for x in planned.itertuples()
    ]
    planned["hours"] = pd.Series(times, dtype=float) / 3600
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
        "in all. - and + mark cells whose speed no run has measured: they count as 0. `benchmark/judge.py` finds the "
        f"win rates of Table 3 when the runs are there.\n\n{stats.markdown(pd.DataFrame(rows, columns=header))}\n"
    )


SECTIONS = FINDINGS | {
    "verdict": lambda found: standing_text(found.cells),
    "scores": lambda found: scores_table(found.cells),
    "together": lambda found: together_text(found.cells),
    "pairs": lambda found: pairs_text(found.cells, found.pooled),
    "gains": lambda found: gains_text(found.cells),
    "missing cells": lambda found: missing_text(found.folders, found.runs),
}


def replace_section(text: str, section: str, marker: str) -> str:
    """text with the section between its marker lines. Raises ValueError where it has none."""
    first, last = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->\n"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"it has no lines {first}and {last}".replace("\n", " ").strip())
    return before + begin + section + end + after


def filled(path: Path, found: Found) -> str:
    """The file's text with those sections renewed whose marker lines it has. Raises OSError, ValueError if none."""
    text = path.read_text("utf-8")
    names = [name for name in SECTIONS if f"<!-- {name}: begin -->\n" in text]
    if not names:
        raise ValueError(f"it has no line <!-- NAME: begin -->, NAME one of {', '.join(SECTIONS)}")
    for name in names:
        text = replace_section(text, SECTIONS[name](found), name)
    return text
