"""Sections of README.md and docs/ that are made from result files, each between two marker lines."""

from pathlib import Path
from textwrap import fill

from .cells import TABLES
from .missing import missing_section
from .runs import Results
from .scores import format_mean, joint_difference, standard_error
from .tables import (
    cells_table,
    comparison_table,
    leave_one_out,
    markdown_table,
    probability,
    row_keys,
    run_of_both,
    table_title,
)

CONTINUOUS = [table for table, family in TABLES.items() if family.startswith("continuous")]
SCORES = {12: "", 13: ", noise"}  # tables of which README.md has the scores


def replace_section(text: str, section: str, marker: str) -> str:
    """text with the section between its marker lines. Raises ValueError where it has none."""
    first, last = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->\n"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"it has no lines {first}and {last}".replace("\n", " ").strip())
    return before + begin + section + end + after


def plain(environment: str) -> str:
    """HalfCheetah for HalfCheetah-v4, LunarLander for LunarLanderContinuous-v3."""
    return environment.partition("-")[0].removesuffix("Continuous")


def verdict(paper: dict, ours: dict) -> str:
    """How many continuous cells were found again, and how probably DSPPO is better than DPPO, as one paragraph."""
    cells = {key: cell for table in CONTINUOUS for key, cell in paper[table].items()}
    differences = {}
    for key in cells.keys() & ours.keys():
        values = ours[key][1].values
        differences[key] = joint_difference(values.mean(), standard_error(values), cells[key])
    far = [(e, a, noise) for e, a, noise in cells if abs(differences.get((e, a, noise), 0)) > 2]
    names = [f"{a} on {plain(e)}{'' if noise == 'none' else ' with noise'}" for e, a, noise in far]
    near = sum(abs(difference) <= 2 for difference in differences.values())
    texts = []
    for table, noise in {12: "none", 13: "N(0, 0.05^2)"}.items():
        if len(samples := run_of_both(paper[table], ours, noise)) > 2:
            noisy, (left_out, rest) = "without" if noise == "none" else "with", leave_one_out(samples)
            where = f"{len(samples)} environments; {rest} without {plain(left_out)}"
            texts.append(f"{probability(samples)} {noisy} noise ({where})")
    paragraph = (
        f"{len(differences)} of the paper's {len(cells)} continuous-control cells were run. {near} of them are within "
        f"two joint standard errors of the paper's{'; further are ' * bool(far)}{', '.join(names)}. The probability "
        f"that a run of DSPPO scores above one of DPPO is {' and '.join(texts)}."
    )
    return fill(paragraph, 120, break_on_hyphens=False, break_long_words=False) + "\n"


def scores_section(paper: dict, ours: dict) -> str:
    """A row per environment: DPPO and DSPPO, without and with noise, each beside the paper's mean."""
    columns = [(t, a, noise) for t, noise in SCORES.items() for a in ("DPPO", "DSPPO")]
    rows = []
    for environment in dict.fromkeys(e for e, *_ in paper[12]):
        texts, seeds = [], []
        for table, algorithm, _ in columns:
            key = next(key for key in paper[table] if key[:2] == (environment, algorithm))
            values = ours[key][1].values if key in ours else []
            texts.append(f"{format_mean(values)} ({paper[table][key].printed_mean})" if len(values) else "")
            seeds += [len(values)] if len(values) else []
        if seeds:
            number = str(seeds[0]) if len({*seeds}) == 1 else f"{min(seeds)} to {max(seeds)}"
            rows.append([plain(environment), number, *texts])
    header = ["Mean ± SE (the paper's mean)", "n", *(algorithm + noise for _, algorithm, noise in columns)]
    return markdown_table(header, rows, right="|".join(header[1:])) + "\n"


def tables_section(paper: dict, ours: dict) -> str:
    """The paper's tables of continuous control as far as they were run."""
    parts = []
    for table in CONTINUOUS:
        if row_keys(table, paper[table], ours):
            parts += [f"**{table_title(table, paper[table])}**", cells_table(table, paper[table], ours)]
            parts += filter(None, [comparison_table(paper[table], ours)])
    return "\n\n".join(parts) + "\n"


def filled(path: Path, folders: list[Path], results: Results, paper: dict) -> str:
    """The file's text with those sections renewed whose marker lines it has. Raises OSError, ValueError if none."""
    ours, text = results.paper_cells(), path.read_text("utf-8")
    sections = {
        "verdict": lambda: verdict(paper, ours),
        "scores": lambda: scores_section(paper, ours),
        "tables": lambda: tables_section(paper, ours),
        "missing cells": lambda: missing_section(folders, {*results.groups, *results.language}),
    }
    found = [marker for marker in sections if f"<!-- {marker}: begin -->\n" in text]
    if not found:
        raise ValueError(f"it has no line <!-- NAME: begin -->, NAME one of {', '.join(sections)}")
    for marker in found:
        text = replace_section(text, sections[marker](), marker)
    return text
