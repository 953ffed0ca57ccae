"""Sections of README.md and docs/ that are made from the runs, each between two marker lines."""

from functools import partial
from pathlib import Path
from textwrap import fill

import comparisons
import findings
import pandas as pd
import stats
from comparisons import MANY, chance, clearest, most_moving, pairs, plain, symmetric_of
from language import language_cells
from missing import missing_text
from runs import FAMILY, PARTS, Found
from tables import cells_table, gains_text, table_4, title

CONTINUOUS = [table for table, family in FAMILY.items() if family.startswith("continuous")]


def standing_text(cells: pd.DataFrame) -> list[str]:
    """How many continuous cells were found again, which side the others are, and what all say together."""
    found, texts = comparisons.standing(cells), []
    if found["run"]:
        sides = [f"{side} the paper, {', '.join(found[side])}" for side in ("below", "above") if found[side]]
        texts.append(
            f"{found['run']} of the paper's {found['cells']} continuous-control cells were run ({found['seeds']} seeds "
            f"each). {found['near']} are within two joint standard errors of the paper's; chance alone would leave "
            f"{found['by_chance']:.0f}. {'Further are, ' * bool(sides)}{'; '.join(sides)}"
            f"{'. ' * bool(sides)}{found['significant'] or 'None'} of these differences is significant by Holm's method "
            f"(smallest p {stats.p_text(found['smallest_holm'])})."
        )
    lie = [
        f"{stats.bracket_text(low_mean, low, high)} ({name}, {n} cells, p {stats.p_text(p)}, {percent:+.1f} %)"
        for name, n, _, _, low_mean, low, high, _, p, percent in comparisons.together(cells).itertuples(index=False)
        if n >= MANY
    ]
    if lie:
        texts.append(f"All cells together lie from the paper's, as mean z [95 %], by {', '.join(lie)}.")
    return texts


def verdict(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    """What can be said of the paper's continuous cells and of the symmetric algorithms, as bullets."""
    texts = standing_text(cells)
    for family in ("continuous_ppo", "continuous_a2c"):
        symmetric, baseline, control = symmetric_of(family)
        both = pairs(pooled[pooled.family == family], symmetric, baseline)
        if both.empty:
            continue
        text = f"{symmetric} beside {baseline}: the clearest difference is {clearest(both)}."
        chances = []
        for prefix, some in (("without", both[both.noise == "none"]), ("with", both[both.noise != "none"])):
            if len(some) > 2:
                out = some.index[most_moving(some)]
                where = f"leaving out {plain(some.environment[out])}, which moves it most, {chance(some.drop(out))}"
                chances.append(f"{chance(some)} {prefix} noise ({len(some)} environments; {where})")
        if chances:
            text += f" A run of {symmetric} scores above one of {baseline} with probability {' and '.join(chances)}."
        beside = pairs(cells[cells.family == family], symmetric, control)
        if "A2C" in symmetric and len(beside):
            text += f" Beside its control, which has no reverse loss: {clearest(beside)}."
        texts.append(text)
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(fill(f"- {text}", 120, **options) for text in texts) + "\n"


def scores_table(cells: pd.DataFrame) -> str:
    """A row per environment: DPPO and DSPPO, without and with noise, each beside the paper's mean."""
    some = cells[cells.table.isin([12, 13]) & cells.algorithm.isin(["DPPO", "DSPPO"]) & (cells.n > 0)]
    rows = []
    for environment, own in some.groupby("environment", sort=False):
        row = {"Mean ± SE (the paper's mean)": plain(environment), "n": stats.span(own.n)}
        row |= dict.fromkeys(("DPPO", "DSPPO", "DPPO, noise", "DSPPO, noise"), "")
        for x in own.itertuples():
            text = f"{stats.mean_se(x.ours, x.se)} ({x.printed.split()[0]})"
            row[x.algorithm + ("" if x.noise == "none" else ", noise")] = text
        rows.append(row)
    return stats.markdown(pd.DataFrame(rows)) + "\n"


def tables_text(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    """The paper's tables of continuous control as far as they were run."""
    parts = []
    for table in CONTINUOUS:
        if (cells.n[cells.table == table] > 0).any():
            made = [comparisons.comparison_table(pooled, table), comparisons.control_table(cells, table)]
            made += [comparisons.modes_table(cells, table)]
            parts += [f"### {title(cells, table)}", cells_table(cells, table), *filter(None, made)]
    return "\n\n".join(parts) + "\n"


def coverage_table(found: Found) -> str:
    """Cells of the paper's tables that were run at its settings and length."""
    rows, cells = [], found.cells[found.cells.in_paper]
    for family, some in cells.groupby("family", sort=False):
        tables = sorted([*some.table.unique(), *(part for part, whole in PARTS.items() if FAMILY[whole] == family)])
        where = "Atari" if family.startswith("atari") else "MuJoCo and Box2D"
        run = f"{(some.n > 0).sum()} of {len(some)}"
        rows.append([", ".join(map(str, tables)), f"{', '.join(some.algorithm.unique())}: {where}", run])
    betas, language = table_4(found.runs), language_cells(found.runs)
    run = f"{(betas.games == 22).sum()} of {len(betas)}"
    rows.insert(1, ["4", "SPPO over PPO for five betas, all games: Atari", run])
    for table, what in ((3, "PPO, SPPO: IMDB and TL;DR"), (14, "advantage normalization: IMDB and TL;DR")):
        some = language[(language.table == table) & language.in_paper]
        rows.append([str(table), what, f"{(some.n > 0).sum()} of {len(some)}"])
    header = ["Tables", "Cells of the paper", "Run"]
    return stats.markdown(pd.DataFrame(rows, columns=header), ("Cells of the paper",)) + "\n"


def sentences_text(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    families = ("continuous_ppo", "continuous_a2c")
    return "".join(f"- {text}\n" for family in families for text in comparisons.sentences(cells, pooled, family))


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
    both, text = (found.cells, found.pooled), path.read_text("utf-8")
    sections = {
        "verdict": lambda: verdict(*both),
        "scores": lambda: scores_table(found.cells),
        "together": lambda: (comparisons.together_table(found.cells) or "") + "\n",
        "sentences": lambda: sentences_text(*both),
        "tables": lambda: tables_text(*both),
        "coverage": lambda: coverage_table(found),
        "gains": lambda: gains_text(found.cells),
        "missing cells": lambda: missing_text(found.folders, found.runs),
    }
    sections |= {name: partial(make, found) for name, make in findings.FINDINGS.items()}
    names = [marker for marker in sections if f"<!-- {marker}: begin -->\n" in text]
    if not names:
        raise ValueError(f"it has no line <!-- NAME: begin -->, NAME one of {', '.join(sections)}")
    for marker in names:
        text = replace_section(text, sections[marker](), marker)
    return text
