"""Sections of README.md and docs/ that are made from result files, each between two marker lines."""

from pathlib import Path
from textwrap import fill

import numpy as np

from .cells import PARTS, TABLES
from .comparisons import (
    algorithms_of,
    clearest_text,
    comparison_table,
    control_table,
    in_sentences,
    leave_one_out,
    modes_table,
    pairs,
    probability,
    together,
    together_table,
)
from .missing import missing_section
from .runs import Results, language_cells
from .scores import format_mean, joint_difference, markdown_table, standard_error
from .tables import cells_table, gains_text, row_keys, table_4_means, table_title

CONTINUOUS = [table for table, family in TABLES.items() if family.startswith("continuous")]
MANY = 5  # cells, of which a mean says something
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
    """How many continuous cells were found again, and what can be said of the symmetric algorithms, as bullets."""
    cells = {key: cell for table in CONTINUOUS for key, cell in paper[table].items()}
    differences, seeds = {}, []
    for key in cells.keys() & ours.keys():
        values = ours[key][1].values
        differences[key] = joint_difference(values.mean(), standard_error(values), cells[key])
        seeds.append(len(values))
    far = [(e, a, noise) for e, a, noise in cells if abs(differences.get((e, a, noise), 0)) > 2]
    names = [f"{a} on {plain(e)}{'' if noise == 'none' else ' with noise'}" for e, a, noise in far]
    near = sum(abs(difference) <= 2 for difference in differences.values())
    own = f" ({min(seeds)} to {max(seeds)} seeds each)" if seeds else ""
    bullets = [
        f"{len(differences)} of the paper's {len(cells)} continuous-control cells were run{own}. {near} of them are "
        f"within two joint standard errors of the paper's{'; further are ' * bool(far)}{', '.join(names)}."
    ]
    lie = [
        f"{np.mean(d):+.2f} ± {len(d) ** -0.5:.2f} ({name}, {len(d)} cells, {np.mean(percent):+.1f}\N{NO-BREAK SPACE}%)"
        for name, (d, percent, _) in together(paper, ours).items()
        if len(d) >= MANY
    ]
    if lie:
        bullets.append(f"All cells together differ from the paper's, in joint standard errors, by {', '.join(lie)}.")
    for table in (12, 9):
        symmetric, baseline, control = algorithms_of(table, paper)
        compared = pairs(TABLES[table], paper, ours, symmetric, baseline)
        if not compared:
            continue
        text = f"{symmetric} beside {baseline}: the clearest difference is {clearest_text(compared, compared)}."
        chances = []
        for prefix, wanted in (("without", True), ("with", False)):
            samples = {key: both for key, both in compared.items() if (key[1] == "none") == wanted}
            if len(samples) > 2:
                left_out, rest = leave_one_out(samples)
                where = f"{len(samples)} environments; leaving out {plain(left_out)}, which moves it most, {rest}"
                chances.append(f"{probability(samples)} {prefix} noise ({where})")
        if chances:
            text += f" A run of {symmetric} scores above one of {baseline} with probability {' and '.join(chances)}."
        if table == 9 and (beside := pairs(TABLES[table], paper, ours, symmetric, control)):
            text += f" Beside its control, which has no reverse loss: {clearest_text(beside, beside)}."
        bullets.append(text)
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(fill(f"- {text}", 120, **options) for text in bullets) + "\n"


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


def coverage_section(paper: dict, results: Results) -> str:
    """Cells of the paper's tables that were run at its settings and length."""
    ours, language, rows = results.paper_cells(), language_cells(results, "paper"), []
    for family in dict.fromkeys(TABLES.values()):
        tables = [table for table, name in TABLES.items() if name == family]
        cells = [key for table in tables for key in paper[table]]
        numbers = sorted([*tables, *(part for part, whole in PARTS.items() if whole in tables)])
        algorithms = ", ".join(dict.fromkeys(algorithm for _, algorithm, _ in cells))
        where = "Atari" if family.startswith("atari") else "MuJoCo and Box2D"
        run = sum(key in ours for key in cells)
        rows.append([", ".join(map(str, numbers)), f"{algorithms}: {where}", f"{run} of {len(cells)}"])
    games = {e for e, *_ in paper[11]}
    run = sum(beta is not None and games <= means.keys() for (beta, _), means in table_4_means(results).items())
    rows.insert(1, ["4", "SPPO over PPO for five betas, all games: Atari", f"{run} of {len(paper[4])}"])
    for table, what in ((3, "PPO, SPPO: IMDB and TL;DR"), (14, "advantage normalization: IMDB and TL;DR")):
        run = sum(key in language for key in paper[table])
        rows.append([str(table), what, f"{run} of {len(paper[table])}"])
    return markdown_table(["Tables", "Cells of the paper", "Run"], rows, right="Run", padded=False) + "\n"


def tables_section(paper: dict, ours: dict) -> str:
    """The paper's tables of continuous control as far as they were run."""
    parts = []
    for table in CONTINUOUS:
        if row_keys(table, paper[table], ours):
            parts += [f"### {table_title(table, paper[table])}", cells_table(table, paper[table], ours)]
            made = (make(table, paper, ours) for make in (comparison_table, control_table, modes_table))
            parts += filter(None, made)
    return "\n\n".join(parts) + "\n"


def sentences_section(paper: dict, ours: dict) -> str:
    """What follows from them, by algorithm."""
    texts = {table: in_sentences(table, paper, ours) for table in (12, 9)}
    return "\n".join(f"- {text}" for table in texts for text in texts[table]) + "\n"


def filled(path: Path, folders: list[Path], results: Results, paper: dict) -> str:
    """The file's text with those sections renewed whose marker lines it has. Raises OSError, ValueError if none."""
    ours, text = results.paper_cells(), path.read_text("utf-8")
    sections = {
        "verdict": lambda: verdict(paper, ours),
        "scores": lambda: scores_section(paper, ours),
        "together": lambda: (together_table(paper, ours) or "") + "\n",
        "sentences": lambda: sentences_section(paper, ours),
        "tables": lambda: tables_section(paper, ours),
        "coverage": lambda: coverage_section(paper, results),
        "gains": lambda: gains_text(paper, ours),
        "missing cells": lambda: missing_section(folders, {*results.groups, *results.language}),
    }
    found = [marker for marker in sections if f"<!-- {marker}: begin -->\n" in text]
    if not found:
        raise ValueError(f"it has no line <!-- NAME: begin -->, NAME one of {', '.join(sections)}")
    for marker in found:
        text = replace_section(text, sections[marker](), marker)
    return text
