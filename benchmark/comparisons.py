"""What is compared with what, how surely they differ, and what all cells say together: tables and sentences."""

from itertools import chain

import numpy as np
import pandas as pd
from runs import BASELINES, FAMILY
from stats import (
    beyond_by_chance,
    bracket_text,
    chance_text,
    gain,
    holm,
    improvements,
    markdown,
    mean_interval,
    number,
    p_text,
    probability_of_improvement,
    span,
    stouffer,
    welch,
)

MODES = {("continuous_ppo", "Swimmer-v4"): 60.0, ("continuous_ppo", "HalfCheetah-v4"): 2000.0}  # scores in between
TWO_MODES = ("Swimmer-v4", "HalfCheetah-v4")
MANY = 5  # cells, of which a mean says something
OURS, PAPERS = ("ours", "se", "n"), ("paper", "paper_se", "paper_n")
LEFT = ("Algorithm", "Noise", "Difference / joint SE", "Scores of the seeds, sorted")


def short(environment: str) -> str:
    """Alien for AlienNoFrameskip-v4; the others keep their ids."""
    return environment.removesuffix("NoFrameskip-v4")


def plain(environment: str) -> str:
    """HalfCheetah for HalfCheetah-v4, LunarLander for LunarLanderContinuous-v3."""
    return short(environment).partition("-")[0].removesuffix("Continuous")


def place(row) -> str:
    return plain(row.environment) + (" with noise" if row.noise != "none" else "")


def symmetric_of(family: str) -> tuple[str, str, str]:
    """Symmetric algorithm, baseline and control of a family."""
    symmetric = ("D" if family.startswith("continuous") else "") + ("SA2C" if family.endswith("a2c") else "SPPO")
    return symmetric, BASELINES[symmetric], f"{BASELINES[symmetric]} control"


def tables_of(family: str) -> str:
    """Tables 12 and 13."""
    numbers = [str(table) for table in sorted(FAMILY) if FAMILY[table] == family]
    return f"Table{'s' * (len(numbers) > 1)} {' and '.join(numbers)}"


def pairs(cells: pd.DataFrame, first: str, second: str, values: tuple[str, str, str] = OURS) -> pd.DataFrame:
    """Where both algorithms have a cell, side by side (_a, _b), with t, p and z of the difference and p by Holm.

    values: the columns with mean, standard error and n, PAPERS for the paper's own cells.
    """
    some = cells[cells[values[0]].notna() & (cells.in_paper if values == PAPERS else True)]
    a, b = (some[some.algorithm == name] for name in (first, second))
    both = a.merge(b, on=["table", "family", "environment", "noise"], suffixes=("_a", "_b"))
    sides = [[both[f"{name}_{side}"] for name in values] for side in "ab"]
    both["t"], both["p"], both["z"] = welch(*sides[0], *sides[1])
    both["holm"], both["among"] = holm(both.p), len(both)
    both["difference"], both["joint"] = sides[0][0] - sides[1][0], np.hypot(sides[0][1], sides[1][1])
    return both


def gains(both: pd.DataFrame) -> list[str]:
    return [gain(*x) for x in zip(both.difference, both.joint)]


def seeds(both: pd.DataFrame) -> pd.Series:
    return both.n_a.astype(str) + ", " + both.n_b.astype(str)


def chance(both: pd.DataFrame) -> str:
    """Probability of improvement over some cells, with its interval."""
    return chance_text(both.scores_a, both.scores_b)


def chances(both: pd.DataFrame) -> list[str]:
    """Probability of improvement in every cell."""
    return [chance_text([x], [y]) for x, y in zip(both.scores_a, both.scores_b)]


def most_moving(both: pd.DataFrame) -> int:
    """The cell that changes the probability of improvement over all most."""
    single = [probability_of_improvement(np.array(x), np.array(y)) for x, y in zip(both.scores_a, both.scores_b)]
    return int(np.argmax(np.abs(single - np.mean(single))))


def drop_noise(frame: pd.DataFrame, cells: pd.DataFrame, table: int) -> pd.DataFrame:
    """Without the column of the noise where the table has one, which its title names."""
    one = cells.noise[(cells.table == table) & cells.in_paper].nunique() == 1
    return frame.drop(columns="Noise") if one else frame


def comparison_table(pooled: pd.DataFrame, table: int) -> str | None:
    """The symmetric algorithm beside its baseline, environment by environment; None where no pair was run."""
    symmetric, baseline, _ = symmetric_of(FAMILY[table])
    both, printed = (pairs(pooled[pooled.family == FAMILY[table]], symmetric, baseline, v) for v in (OURS, PAPERS))
    printed = pd.Series(gains(printed), pd.MultiIndex.from_frame(printed[["environment", "noise"]]), dtype=object)
    title, parts = f"{symmetric} minus {baseline}", []
    for noise, some in both[both.table == table].groupby("noise", sort=False):
        where = pd.MultiIndex.from_frame(some[["environment", "noise"]])
        frame = {"Environment": some.environment.map(short), "Noise": noise, "n": seeds(some)}
        frame |= {f"{title}, ours": gains(some), f"{title}, the paper's": printed.reindex(where).to_numpy()}
        frame |= {"Probability of improvement, ours": chances(some), "Welch's p": some.p.map(p_text)}
        parts.append(pd.DataFrame(frame | {"by Holm": some.holm.map(p_text)}))
        rows = [[f"all {len(some)}", noise, chance(some)]] if len(some) > 1 else []
        if len(some) > 2:
            out = some.index[most_moving(some)]
            rows.append([f"all but {short(some.environment[out])}", noise, chance(some.drop(out))])
        parts.append(pd.DataFrame(rows, columns=["Environment", "Noise", "Probability of improvement, ours"]))
    if not parts:
        return None
    one = f" Runs of the control count as {symmetric}, which they are by the identity." * ("PPO" in symmetric)
    note = (
        f"n: seeds of {symmetric} and of {baseline}.{one} Welch's p: of a difference of the means as large, either "
        f"way; by Holm: in view of all comparisons of {symmetric} with {baseline} in {tables_of(FAMILY[table])}, "
        f"{len(both)} so far."
    )
    return f"{markdown(drop_noise(pd.concat(parts), pooled, table), LEFT)}\n\n{note}"


def control_table(cells: pd.DataFrame, table: int) -> str | None:
    """The symmetric algorithm beside its control, and that beside the baseline; None where no control was run."""
    symmetric, baseline, control = symmetric_of(FAMILY[table])
    family, parts = cells[cells.family == FAMILY[table]], []
    for first, second in ((symmetric, control), (control, baseline)):
        both = pairs(family, first, second)
        corrected = both.p.map(p_text) + " (" + both.holm.map(p_text) + ")"
        texts = {"n": seeds(both), f"{first} minus {second}".replace(control, "control"): gains(both)}
        texts |= {"Probability of improvement": chances(both), "Welch's p (by Holm)": corrected}
        where = {"Environment": both.environment.map(short), "Noise": both.noise}
        parts.append(pd.DataFrame(where | texts)[both.table == table].set_index(["Environment", "Noise"]))
    frame = pd.concat(parts, axis=1)
    if frame.empty:
        return None
    weight = "alpha" if "A2C" in baseline else "alpha - beta Z"
    note = (
        f"The control is {baseline} with its policy loss times {weight}, so that {symmetric} minus control is "
        f"{'the reverse loss' if weight == 'alpha' else 'chance, by the identity'}, and control minus {baseline} the "
        "weight. By Holm: in view of all such differences in both tables."
    )
    return f"{markdown(drop_noise(frame.reset_index(), cells, table))}\n\n{note}"


def modes_table(cells: pd.DataFrame, table: int) -> str | None:
    """Scores of all seeds where they have two modes; None where nothing was run there."""
    rows = []
    run = cells[(cells.table == table) & (cells.n > 0)].sort_values("algorithm", kind="stable")
    for row in chain.from_iterable(run[run.environment == name].itertuples() for name in TWO_MODES):
        bar, values = MODES.get((row.family, row.environment), np.inf), np.sort(row.scores)
        parts = [", ".join(map(number, part)) for part in (values[values <= bar], values[values > bar]) if len(part)]
        counts = [f"{bar:g}", (values <= bar).sum(), (values > bar).sum()] if bar < np.inf else ["", "", ""]
        rows.append([row.environment, row.algorithm, row.noise, row.n, *counts, "; ".join(parts)])
    header = ["Environment", "Algorithm", "Noise", "n", "Bar", "Below", "Above", "Scores of the seeds, sorted"]
    frame = drop_noise(pd.DataFrame(rows, columns=header), cells, table)
    if frame.empty:
        return None
    note = (
        "Scores of all seeds where they have two modes. Bar: Swimmer's agents that stay on a plateau score less; "
        "HalfCheetah's that scored less ran on their backs, wherever that was looked at."
    )
    if not frame.Bar.any():
        frame = frame.drop(columns=["Bar", "Below", "Above"])
        note = "Scores of all seeds, in environments where they have shown two modes."
    return f"{markdown(frame, LEFT)}\n\n{note}"


def together(cells: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm: how its cells lie from the paper's, all together."""
    rows, run = [], cells[cells.z.notna() & cells.in_paper]
    for name, some in run.groupby("algorithm", sort=False):
        mean, low, high = mean_interval(some.z if len(some) >= MANY else [some.z.mean()])
        percent = improvements(some.paper, some.ours).mean()
        z, p = stouffer(some.z)
        rows.append([name, len(some), span(some.n), some.t.mean(), mean, low, high, z, p, percent])
    return pd.DataFrame(rows, columns=["algorithm", "cells", "seeds", "t", "mean", "low", "high", "z", "p", "percent"])


def together_table(cells: pd.DataFrame) -> str | None:
    some = together(cells)
    frame = {"Algorithm": some.algorithm, "Cells": some.cells, "Seeds of a cell": some.seeds}
    frame |= {"Mean difference / joint SE": some.t.map("{:+.2f}".format)}
    frame |= {"as z [95 %]": [bracket_text(*x) for x in zip(some["mean"], some.low, some.high)]}
    frame |= {"p, all cells (Stouffer)": some.p.map(p_text)}
    frame |= {"In per cent of the paper's means": some.percent.map("{:+.1f} %".format)}
    return markdown(pd.DataFrame(frame)) if len(some) else None


TOGETHER_NOTE = (
    "Every cell counts once. z is the normal number with the p of Welch's t, so that few seeds do not count too much; "
    "the interval is that of a t test over cells, Stouffer's p tests that all cells are the paper's."
)


def clearest(some: pd.DataFrame) -> str:
    """HalfCheetah-v4 with noise, +658 ± 362 (20, 10 seeds; p 0.096, by Holm over 14 comparisons 1.00)."""
    size = -(some.difference / some.joint).abs()
    row = some.assign(size=size, n=seeds(some), text=gains(some)).sort_values(["p", "size"], kind="stable").iloc[0]
    corrected = f", by Holm over {row.among} comparisons {p_text(row.holm)}" if row.among > 1 else ""
    where = row.environment + (" with noise" if row.noise != "none" else "")
    return f"{where}, {row.text} ({row.n} seeds; Welch's p {p_text(row.p)}{corrected})"


def sentences(cells: pd.DataFrame, pooled: pd.DataFrame, family: str) -> list[str]:
    """On a family of the paper's tables: without noise, with noise, and what the control says."""
    symmetric, baseline, control = symmetric_of(family)
    both = pairs(pooled[pooled.family == family], symmetric, baseline)
    beside, weight = (pairs(cells[cells.family == family], *two) for two in ((symmetric, control), (control, baseline)))
    factor = "alpha" if "A2C" in baseline else "alpha - beta Z, by the identity the same algorithm"
    texts = []
    for where, first, second, some, unit in (
        ("Without noise ", symmetric, baseline, both[both.noise == "none"], "environment"),
        ("With noise ", symmetric, baseline, both[both.noise != "none"], "environment"),
        (f"The control is {baseline} with its policy loss times {factor}: ", symmetric, "the control", beside, "cell"),
        ("By the weight alone: ", "the control", baseline, weight, "cell"),
    ):
        if len(some):
            higher = f"{(some.ours_a > some.ours_b).sum()} of {len(some)} {unit}{'s' * (len(some) > 1)}"
            number_of = span([*some.n_a, *some.n_b], " seeds")
            texts.append(
                f"{where}{first} has the higher mean than {second} in {higher} ({number_of}); a run of the one scores "
                f"above a run of the other with probability {chance(some)}; the clearest difference is on "
                f"{clearest(some)}."
            )
    return texts


def standing(cells: pd.DataFrame) -> dict:
    """How the continuous cells lie from the paper's: numbers within two joint standard errors, names of the others."""
    control = cells[cells.family.str.startswith("continuous") & cells.in_paper]
    run = control[control.t.notna()].assign(holm=lambda frame: holm(frame.p))
    far = run[run.t.abs() > 2]
    names = far.algorithm + " on " + far.apply(place, axis=1) if len(far) else far.algorithm
    sides = {side: list(names[far.t < 0 if side == "below" else far.t > 0]) for side in ("below", "above")}
    found = {"cells": len(control), "run": len(run), "near": len(run) - len(far), **sides}
    if len(run):
        beyond = beyond_by_chance(run.se, run.n, run.paper_se, run.paper_n)
        found |= {"seeds": span(run.n), "by_chance": len(run) - beyond, "smallest_holm": run.holm.min()}
        found |= {"significant": int((run.holm < 0.05).sum())}
    return found
