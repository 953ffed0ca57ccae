"""Sections of README.md and docs/ that are made from the runs, each between two marker lines."""

from pathlib import Path
from textwrap import fill

import pandas as pd
import stats
from comparisons import plain, sentences, standing_text, together_text
from findings import FINDINGS
from language import language_cells
from missing import missing_text
from runs import Found
from tables import coverage_table, gains_text

FAMILIES = ("continuous_ppo", "continuous_a2c")


def verdict(found: Found) -> str:
    """What can be said of the paper's continuous cells and of the symmetric algorithms, as bullets."""
    texts = standing_text(found.cells)
    texts += [text for family in FAMILIES for text in sentences(found.cells, found.pooled, family)[:2]]
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return "".join(fill(f"- {text}", 120, **options) + "\n" for text in texts)


def scores_table(cells: pd.DataFrame) -> str:
    """A row per environment: DPPO and DSPPO, without and with noise, each beside the paper's mean."""
    some, rows = cells[(cells.family == FAMILIES[0]) & cells.algorithm.isin(["DPPO", "DSPPO"]) & (cells.n > 0)], []
    for environment, own in some.groupby("environment", sort=False):
        row = {"Mean ± SE (the paper's mean)": plain(environment), "n": stats.span(own.n)}
        row |= dict.fromkeys(("DPPO", "DSPPO", "DPPO, noise", "DSPPO, noise"))
        for x in own.itertuples():
            text = f"{stats.mean_se(x.ours, x.se)} ({x.printed.split()[0]})"
            row[x.algorithm + ("" if x.noise == "none" else ", noise")] = text
        rows.append(row)
    return stats.markdown(pd.DataFrame(rows)) + "\n"


SECTIONS = FINDINGS | {
    "verdict": verdict,
    "scores": lambda found: scores_table(found.cells),
    "together": lambda found: together_text(found.cells),
    "sentences": lambda found: "".join(
        f"- {text}\n" for family in FAMILIES for text in sentences(found.cells, found.pooled, family)
    ),
    "coverage": lambda found: coverage_table(found.cells, language_cells(found.runs), found.runs) + "\n",
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
