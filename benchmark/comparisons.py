"""What is compared with what, how surely they differ, and what all cells say together."""

import numpy as np
import pandas as pd
import stats
from runs import BASELINES

MODES = {("continuous_ppo", "Swimmer-v4"): 60.0, ("continuous_ppo", "HalfCheetah-v4"): 2000.0}  # scores in between
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


def compare(both: pd.DataFrame, values: tuple[str, str, str] = OURS, prefix: str = "") -> pd.DataFrame:
    """both with the difference of its two sides (_a minus _b), its error, t, p, z, p by Holm and a text.

    values: the columns with mean, standard error and n; prefix: of the new columns.
    """
    a, b = ([both[f"{name}_{side}"] for name in values] for side in "ab")
    t, p, z = stats.welch(*a, *b)
    found = {"difference": a[0] - b[0], "joint": np.hypot(a[1], b[1]), "t": t, "p": p, "z": z, "holm": stats.holm(p)}
    found["among"] = np.isfinite(p).sum()  # comparisons that Holm's method counts
    found["gain"] = [stats.gain(*x) for x in zip(found["difference"], found["joint"])]
    return both.assign(**{prefix + name: column for name, column in found.items()})


def pairs(cells: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Two algorithms side by side in every cell that the runs or the paper have of both: see compare.

    Columns with paper_ in front are of the paper's own cells.
    """
    both = pd.merge(*(cells[cells.algorithm == name] for name in (first, second)), on=CELL, suffixes=("_a", "_b"))
    printed = both.in_paper_a & both.in_paper_b
    both["paper_a"], both["paper_b"] = both.paper_a.where(printed), both.paper_b.where(printed)
    both["n"] = both.n_a.astype(str) + ", " + both.n_b.astype(str)
    return compare(compare(both), PAPERS, "paper_")


def ran(both: pd.DataFrame) -> pd.DataFrame:
    """The cells in which both sides were run."""
    return both[both.difference.notna()]


def chance(both: pd.DataFrame) -> str:
    """Probability of improvement over some cells, with its interval."""
    return stats.interval_text([*both.scores_a, *both.scores_b], stats.probability_of_improvement)


def chances(both: pd.DataFrame) -> list[str]:
    """Probability of improvement in every cell."""
    return [chance(both.iloc[[i]]) for i in range(len(both))]


def chance_rows(both: pd.DataFrame) -> dict[str, str]:
    """Probability of improvement over all cells, and without the environment that moves it most."""
    rows = {f"all {len(both)}": chance(both)} if len(both) > 1 else {}
    if len(both) > 2:
        single = [stats.probability_of_improvement(*map(np.array, two)) for two in zip(both.scores_a, both.scores_b)]
        out = both.index[np.argmax(np.abs(single - np.mean(single)))]
        rows[f"all but {short(both.environment[out])}"] = chance(both.drop(out))
    return rows


def comparison_text(both: pd.DataFrame, first: str, second: str) -> str | None:
    """The pairs of one table, ours and the paper's, environment by environment; None where no pair was run."""
    parts, lines = [], []
    for noise, cells in both.groupby("noise", sort=False):
        if (some := ran(cells)).empty:
            continue
        frame = {"Environment": some.environment.map(short), "Noise": noise, "n": some.n}
        frame |= {f"{first} minus {second}, ours": some.gain, "the paper's": some.paper_gain}
        frame |= {"Probability of improvement": chances(some)}
        frame |= {"Welch's p": some.p.map(stats.p_text), "by Holm": some.holm.map(stats.p_text)}
        rows = chance_rows(some)
        more = {"Environment": rows.keys(), "Noise": noise, "Probability of improvement": rows.values()}
        parts += [pd.DataFrame(frame), pd.DataFrame(more)]
        lines.append(f"- {first} over {second}, noise {noise}: {wins_text(cells)}.")
    if not parts:
        return None
    frame = pd.concat(parts).fillna("")
    return f"{stats.markdown(frame.loc[:, (frame != '').any()])}\n\n" + "\n".join(lines)


def wins_text(cells: pd.DataFrame) -> str:
    """In how many cells the first one has the higher mean and by how much, ours and the paper's."""
    some, printed = ran(cells), cells[cells.paper_difference.notna()]
    wins = f"higher mean in {(some.difference > 0).sum()} of {len(some)} environments"
    gain = f"average improvement {stats.improvement_text(some.ours_b, some.ours_a)}"
    if len(printed):
        same = ran(printed)
        here, everywhere = (stats.improvement_text(x.paper_b, x.paper_a) for x in (same, printed))
        these, all_of_them = ((x.paper_difference > 0).sum() for x in (same, printed))
        wins += f" (the paper's cells: {these} of these, {all_of_them} of all {len(printed)})"
        gain += f" (the paper's cells: {here} in these environments, {everywhere} in all {len(printed)})"
    return f"{wins}; {gain}"


def pairs_text(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    """A row per pair of the discretized algorithms: wins, probability of improvement, the clearest difference."""
    rows = []
    for family in ("continuous_ppo", "continuous_a2c"):
        symmetric, baseline, control = symmetric_of(family)
        both = ran(pairs(pooled, symmetric, baseline))
        sets = [(symmetric, baseline, noise, some) for noise, some in both.groupby("noise", sort=False)]
        sets += [(*two, "both", ran(pairs(cells, *two))) for two in ((symmetric, control), (control, baseline))]
        for first, second, noise, some in sets:
            if len(some):
                row = some.assign(size=-some.t.abs()).sort_values(["p", "size"], kind="stable").iloc[0]
                where = plain(row.environment) + (" with noise" if row.noise != "none" else "")
                texts = [f"{first} over {second}", noise, f"{(some.difference > 0).sum()} of {len(some)}"]
                texts += [stats.span([*some.n_a, *some.n_b]), chance(some), f"{where}, {row.gain} ({row.n} seeds)"]
                rows.append([*texts, stats.p_text(row.p), f"{stats.p_text(row.holm)} (of {row.among})"])
    header = ["Pair", "Noise", "Higher mean in", "Seeds", "Probability of improvement", "Clearest difference"]
    return stats.markdown(pd.DataFrame(rows, columns=[*header, "Welch's p", "by Holm"])) + "\n"


def modes_text(cells: pd.DataFrame) -> str:
    """Scores of all seeds where they have shown two modes, and how many lie below the bar between them."""
    rows, known = [], [environment for _, environment in MODES]
    for x in cells[cells.environment.isin(known)].sort_values(["environment", "algorithm"]).itertuples():
        bar, values = MODES.get((x.family, x.environment), np.inf), np.sort(x.scores)
        parts = [values[values <= bar], values[values > bar]]
        counts = [f"{bar:g}", *map(len, parts)] if bar < np.inf else [""] * 3
        texts = "; ".join(", ".join(map(stats.number, part)) for part in parts if len(part))
        rows.append([x.environment, x.algorithm, x.noise, x.n, *counts, texts])
    header = ["Environment", "Algorithm", "Noise", "n", "Bar", "Below", "Above", "Scores of the seeds, sorted"]
    frame = pd.DataFrame(rows, columns=header)
    return stats.markdown(frame.loc[:, (frame != "").any()])


def together(cells: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm: how its cells lie from the paper's, all together."""
    rows, run = [], cells[cells.z.notna() & cells.in_paper]
    for name, some in run.groupby("algorithm", sort=False):
        row = {"Algorithm": name, "Cells": len(some), "Seeds of a cell": stats.span(some.n)}
        row |= {"Mean difference / joint SE": f"{some.t.mean():+.2f}", "Mean z [95 %]": stats.mean_z_text(some.z)}
        row |= {"p, all cells": stats.p_text(stats.stouffer(some.z)[1])}
        rows.append(row | {"In per cent of the paper's means [95 %]": stats.improvement_text(some.paper, some.ours)})
    return pd.DataFrame(rows)


def together_text(cells: pd.DataFrame) -> str:
    return stats.markdown(together(cells)) + "\n"


def standing_text(cells: pd.DataFrame) -> str:
    """How many continuous cells were found again, and on which side of the paper's the others are."""
    some = cells[cells.family.str.startswith("continuous") & cells.in_paper]
    run = some[some.t.notna()]
    if run.empty:
        return ""
    names = run.algorithm + " on " + run.environment.map(plain) + np.where(run.noise == "none", "", " with noise")
    sides = {"Below": names[run.t < -2], "Above": names[run.t > 2]}
    sides = [f" {side} the paper: {', '.join(which)}." for side, which in sides.items() if len(which)]
    corrected = stats.holm(run.p)
    by_chance = len(run) - stats.beyond_by_chance(run.se, run.n, run.paper_se, run.paper_n)
    return (
        f"{len(run)} of the paper's {len(some)} continuous-control cells were run ({stats.span(run.n)} seeds each). "
        f"{(run.t.abs() <= 2).sum()} are within two joint standard errors of the paper's; chance alone would leave "
        f"{by_chance:.0f}.{''.join(sides)} Significant by Holm's method: {(corrected < 0.05).sum() or 'none'} "
        f"(smallest p {stats.p_text(np.nanmin(corrected))}).\n"
    )
