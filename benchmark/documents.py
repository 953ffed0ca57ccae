"""Sections of README.md and docs/ that are made from the runs, each between two marker lines."""

from pathlib import Path

import pandas as pd
import stats
from comparisons import pairs_text, plain, standing_text, together_text
from findings import FINDINGS
from missing import missing_text
from runs import Found
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
