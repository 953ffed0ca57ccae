"""What is compared with what, how surely they differ, and what all cells say together."""

import numpy as np
import pandas as pd
import stats
from runs import BASELINES, FAMILY, SAME

MODES = {("continuous_ppo", "Swimmer-v4"): 60.0, ("continuous_ppo", "HalfCheetah-v4"): 2000.0}  # scores in between
PRINTED_WINS = {(8, "none"): 12, (8, "BSC(0.1)"): 15, (11, "none"): 16, (11, "BSC(0.1)"): 19}
OURS, PAPERS = ("ours", "se", "n"), ("paper", "paper_se", "paper_n")
CELL = ["table", "family", "environment", "noise"]


def short(environment: str) -> str:
    """Alien for AlienNoFrameskip-v4; the others keep their ids."""
    return environment.removesuffix("NoFrameskip-v4")


def plain(environment: str) -> str:
    """HalfCheetah for HalfCheetah-v4, LunarLander for LunarLanderContinuous-v3."""
    return short(environment).partition("-")[0].removesuffix("Continuous")


def symmetric_of(family: str) -> tuple[str, str, str]:
    """Symmetric algorithm, baseline and control of a family."""
    symmetric = ("D" if family.startswith("continuous") else "") + ("SA2C" if family.endswith("a2c") else "SPPO")
    return symmetric, BASELINES[symmetric], f"{BASELINES[symmetric]} control"


def pairs(cells: pd.DataFrame, first: str, second: str, values: tuple[str, str, str] = OURS) -> pd.DataFrame:
    """Where both algorithms have a cell, side by side (_a, _b), with t, p and z of the difference and p by Holm.

    values: the columns with mean, standard error and n, PAPERS for the paper's own cells.
    """
    some = cells[cells[values[0]].notna() & (cells.in_paper if values == PAPERS else True)]
    a, b = (some[some.algorithm == name] for name in (first, second))
    both = a.merge(b, on=CELL, suffixes=("_a", "_b"))
    a, b = ([both[f"{name}_{side}"] for name in values] for side in "ab")
    both["t"], both["p"], both["z"] = stats.welch(*a, *b)
    both["holm"], both["among"] = stats.holm(both.p), both.p.notna().sum()
    both["difference"], both["joint"] = a[0] - b[0], np.hypot(a[1], b[1])
    both["gain"] = [stats.gain(*x) for x in zip(both.difference, both.joint)]
    both["n"] = both.n_a.astype(int).astype(str) + ", " + both.n_b.astype(int).astype(str)
    return both


def chance(both: pd.DataFrame) -> str:
    """Probability of improvement over some cells, with its interval."""
    return stats.interval_text([*both.scores_a, *both.scores_b], stats.probability_of_improvement)


def chances(both: pd.DataFrame) -> list[str]:
    """Probability of improvement in every cell."""
    return [chance(both.iloc[[i]]) for i in range(len(both))]


def chance_rows(both: pd.DataFrame) -> list[tuple[str, str]]:
    """(which cells, probability of improvement) over all, and without the environment that moves it most."""
    rows = [(f"all {len(both)}", chance(both))] if len(both) > 1 else []
    if len(both) > 2:
        single = [stats.probability_of_improvement(*map(np.array, two)) for two in zip(both.scores_a, both.scores_b)]
        out = both.index[np.argmax(np.abs(single - np.mean(single)))]
        rows.append((f"all but {short(both.environment[out])}", chance(both.drop(out))))
    return rows


def drop_noise(frame: pd.DataFrame, cells: pd.DataFrame, table: int) -> pd.DataFrame:
    """Without the column of the noise where the table has one, which its title names."""
    one = cells.noise[(cells.table == table) & cells.in_paper].nunique() == 1
    return frame.drop(columns="Noise") if one else frame


def comparison(cells: pd.DataFrame, table: int, first: str, second: str) -> str | None:
    """Two algorithms in one table, environment by environment, ours and the paper's; None where no pair was run."""
    family = cells[cells.family == FAMILY[table]]
    both, printed = (pairs(family, first, second, values) for values in (OURS, PAPERS))
    base = family[family.algorithm == symmetric_of(FAMILY[table])[1]].rename(columns={"paper": "unit"})
    both = both.merge(printed[[*CELL, "gain"]], "left", CELL, suffixes=("", "_paper"))
    both = both.merge(base[[*CELL, "unit"]], "left", CELL)
    parts, lines, title = [], [], f"{first} minus {second}"
    for noise, some in both[both.table == table].groupby("noise", sort=False):
        frame = {"Environment": some.environment.map(short), "Noise": noise, "n": some.n, f"{title}, ours": some.gain}
        frame |= {"the paper's": some.gain_paper, "Probability of improvement": chances(some)}
        frame |= {"Welch's p": some.p.map(stats.p_text), "by Holm": some.holm.map(stats.p_text)}
        parts.append(pd.DataFrame(frame))
        rows = [(name, noise, text) for name, text in chance_rows(some)]
        parts.append(pd.DataFrame(rows, columns=["Environment", "Noise", "Probability of improvement"]))
        wins = wins_text(some, printed[(printed.table == table) & (printed.noise == noise)], f"{first} over {second}")
        lines.append(f"- {wins}{f' Noise: {noise}.' if FAMILY[table].startswith('atari') else ''}")
    if not parts:
        return None
    frame = drop_noise(pd.concat(parts), cells, table).dropna(axis=1, how="all")
    return f"{stats.markdown(frame)}\n\n" + "\n".join(lines)


def wins_text(some: pd.DataFrame, printed: pd.DataFrame, title: str) -> str:
    """Wins, average improvement and interquartile means over the cells of one table and noise, ours and the paper's."""
    texts = [f"{title}: higher mean in {(some.ours_a > some.ours_b).sum()} of {len(some)} environments"]
    texts.append(f"average improvement {stats.improvement_text(some.ours_b, some.ours_a)}")
    if len(printed):
        same, wins = printed[printed.environment.isin(some.environment)], (printed.paper_a > printed.paper_b).sum()
        claimed = PRINTED_WINS.get((some.table.iloc[0], some.noise.iloc[0]), wins)
        misprint = f" (the paper prints {claimed})" if claimed != wins else ""
        here, everywhere = (stats.improvement_text(cells.paper_b, cells.paper_a) for cells in (same, printed))
        these = (same.paper_a > same.paper_b).sum()
        texts[0] += f" (the paper's cells: {these} of these, {wins} of all {len(printed)}{misprint})"
        texts[1] += f" (the paper's cells: {here} in these environments, {everywhere} in all {len(printed)})"
    units = [[np.divide(x, unit) for x, unit in zip(scores, some.unit)] for scores in (some.scores_a, some.scores_b)]
    means = " and ".join(stats.interval_text(values, stats.interquartile_mean) for values in units)
    return f"{'; '.join(texts)}; interquartile means of score / the paper's baseline {means}."


def modes_table(cells: pd.DataFrame, table: int) -> str | None:
    """Scores of all seeds where they have shown two modes, and how many lie below the bar between them."""
    rows, run = [], cells[(cells.table == table) & (cells.n > 0)].sort_values(["environment", "algorithm"])
    for row in run[run.environment.isin([environment for _, environment in MODES])].itertuples():
        bar, values = MODES.get((row.family, row.environment), np.inf), np.sort(row.scores)
        parts = [
            ", ".join(map(stats.number, part)) for part in (values[values <= bar], values[values > bar]) if len(part)
        ]
        counts = [f"{bar:g}", (values <= bar).sum(), (values > bar).sum()] if bar < np.inf else [None, None, None]
        rows.append([row.environment, row.algorithm, row.noise, row.n, *counts, "; ".join(parts)])
    header = ["Environment", "Algorithm", "Noise", "n", "Bar", "Below", "Above", "Scores of the seeds, sorted"]
    frame = drop_noise(pd.DataFrame(rows, columns=header), cells, table).dropna(axis=1, how="all")
    return stats.markdown(frame) or None


def together(cells: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm: how its cells lie from the paper's, all together; no interval for fewer than 5 cells."""
    rows, run = [], cells[cells.z.notna() & cells.in_paper]
    for name, some in run.groupby("algorithm", sort=False):
        mean, low, high = stats.mean_interval(some.z if len(some) >= 5 else [some.z.mean()])
        percent = stats.improvements(some.paper, some.ours).mean()
        rows.append(
            [name, len(some), stats.span(some.n), some.t.mean(), mean, low, high, *stats.stouffer(some.z), percent]
        )
    return pd.DataFrame(rows, columns=["algorithm", "cells", "seeds", "t", "mean", "low", "high", "z", "p", "percent"])


def together_text(cells: pd.DataFrame) -> str:
    some = together(cells)
    frame = {"Algorithm": some.algorithm, "Cells": some.cells, "Seeds of a cell": some.seeds}
    frame |= {"Mean difference / joint SE": some.t.map("{:+.2f}".format)}
    frame |= {"Mean z [95 %]": map(stats.bracket_text, some["mean"], some.low, some.high)}
    frame |= {
        "p, all cells": some.p.map(stats.p_text),
        "In per cent of the paper's means": some.percent.map("{:+.1f} %".format),
    }
    return f"{stats.markdown(pd.DataFrame(frame))}\n"


def clearest(some: pd.DataFrame) -> str:
    """HalfCheetah-v4 with noise, +658 ± 362 (20, 10 seeds; Welch's p 0.083, by Holm over 14 comparisons 1.00)."""
    row = some.assign(size=-some.t.abs()).sort_values(["p", "size"], kind="stable").iloc[0]
    corrected = f", by Holm over {row.among} comparisons {stats.p_text(row.holm)}" if row.among > 1 else ""
    where = row.environment + (" with noise" if row.noise != "none" else "")
    return f"{where}, {row.gain} ({row.n} seeds; Welch's p {stats.p_text(row.p)}{corrected})"


def sentences(cells: pd.DataFrame, pooled: pd.DataFrame, family: str) -> list[str]:
    """On a family of the paper's tables: without noise, with noise, and what the control says."""
    symmetric, baseline, control = symmetric_of(family)
    both = pairs(pooled[pooled.family == family], symmetric, baseline)
    beside, weight = (pairs(cells[cells.family == family], *two) for two in ((symmetric, control), (control, baseline)))
    factor = "alpha - beta Z, by the identity the same algorithm" if control in SAME else "alpha"
    texts = []
    for where, first, second, some in (
        ("Without noise", symmetric, baseline, both[both.noise == "none"]),
        ("With noise", symmetric, baseline, both[both.noise != "none"]),
        (f"The control is {baseline} with its policy loss times {factor}:", symmetric, "the control", beside),
        ("By the weight alone", "the control", baseline, weight),
    ):
        if len(some):
            higher = f"{(some.ours_a > some.ours_b).sum()} of {len(some)} cell{'s' * (len(some) > 1)}"
            texts.append(
                f"{where} {first} has the higher mean than {second} in {higher} "
                f"({stats.span([*some.n_a, *some.n_b])} seeds); a run of the one scores above a run of the other with "
                f"probability {chance(some)}; the clearest difference is on {clearest(some)}."
            )
    return texts


def standing(cells: pd.DataFrame) -> dict:
    """How the continuous cells lie from the paper's: numbers within two joint standard errors, names of the others."""
    control = cells[cells.family.str.startswith("continuous") & cells.in_paper]
    run = control[control.t.notna()]
    names = run.algorithm + " on " + run.environment.map(plain) + np.where(run.noise == "none", "", " with noise")
    found = {"cells": len(control), "run": len(run), "near": int((run.t.abs() <= 2).sum())}
    found |= {"below": list(names[run.t < -2]), "above": list(names[run.t > 2])}
    if len(run):
        corrected = stats.holm(run.p)
        found |= {"seeds": stats.span(run.n), "smallest": corrected.min(), "significant": int((corrected < 0.05).sum())}
        found["by_chance"] = len(run) - stats.beyond_by_chance(run.se, run.n, run.paper_se, run.paper_n)
    return found


def standing_text(cells: pd.DataFrame) -> list[str]:
    """How many continuous cells were found again, on which side the others are, and what all say together."""
    found, texts = standing(cells), []
    if found["run"]:
        sides = [
            f" {side.capitalize()} the paper: {', '.join(found[side])}." for side in ("below", "above") if found[side]
        ]
        texts.append(
            f"{found['run']} of the paper's {found['cells']} continuous-control cells were run ({found['seeds']} seeds "
            f"each). {found['near']} are within two joint standard errors of the paper's; chance alone would leave "
            f"{found['by_chance']:.0f}.{''.join(sides)} Significant by Holm's method: "
            f"{found['significant'] or 'none'} (smallest p {stats.p_text(found['smallest'])})."
        )
    lie = [
        f"{name} {stats.bracket_text(*bounds)} ({cells} cells, p {stats.p_text(p)}, {percent:+.1f} %)"
        for name, cells, _, _, *bounds, _, p, percent in together(cells).itertuples(index=False)
    ]
    return [*texts, f"All cells together, ours minus the paper's as mean z [95 %]: {', '.join(lie)}."] if lie else texts
