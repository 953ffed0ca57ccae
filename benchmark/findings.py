"""What the runs say beyond the paper's tables: the numbers of docs/findings.md, each finding a table and a sentence.

A finding is a function that returns a table of numbers; `sections` makes Markdown of all of them.
"""

import numpy as np
import pandas as pd
from comparisons import OURS, PAPERS, chance, pairs, plain, symmetric_of, together
from runs import FAMILY, GROUP, MODELS, TASKS, UNNORMALIZED, bin_means, by_group, last_tenths, series
from stats import (
    bracket_text,
    difference,
    difference_interval,
    gain,
    holm,
    improvements,
    markdown,
    mean_interval,
    mean_text,
    p_text,
    stouffer,
    summary,
    welch,
    welch_of,
)
from tables import LAST_TENTH

TRAINING = {"approx_kl": "KL", "clipfrac": "clipped share", "entropy": "entropy", "grad_norm": "gradient norm"}
FLIPS = "losses/sign_flips"
CONTINUOUS = ("continuous_ppo", "continuous_a2c")


def means(folders: list[str], tag: str, part: tuple[float, float] = (0, 1)) -> np.ndarray:
    """Mean of a tag over a part of each run, (seeds,); runs that did not log it are left out."""
    found = []
    for values in (series(folder, tag) for folder in folders):
        if len(values) > 1:
            edges = values.index[0] + np.ptp(values.index) * np.array(part)
            found.append(bin_means(values, edges)[0])
    return np.array(found)


def wide(cells: pd.DataFrame, family: str) -> pd.DataFrame:
    """Folders of a family's cells that were run: a row per environment and noise, a column per algorithm."""
    some = cells[(cells.family == family) & (cells.n > 0)]
    frame = some.pivot(index=["environment", "noise"], columns="algorithm", values="folders")
    return frame.reindex(pd.MultiIndex.from_frame(some[["environment", "noise"]].drop_duplicates()))


def weight_in_training(cells: pd.DataFrame) -> pd.DataFrame:
    """What SPPO's weight changes in continuous control: DSPPO over DPPO, means over the run and the seeds.

    A row per cell: ratios of KL estimate, clipped share, entropy and gradient norm before the clip, and DPPO's norm.
    """
    rows = []
    for (environment, noise), row in wide(cells, "continuous_ppo").dropna(subset=["DPPO", "DSPPO"]).iterrows():
        both = [[means(row[name], f"losses/{tag}").mean() for tag in TRAINING] for name in ("DSPPO", "DPPO")]
        rows.append([environment, noise, *np.divide(*both), both[1][-1]])
    return pd.DataFrame(rows, columns=["environment", "noise", *TRAINING, "baseline_grad_norm"])


def sign_flips(cells: pd.DataFrame) -> pd.DataFrame:
    """Advantage sign flips in percent without and with reward noise, means over the run, of DPPO and DSPPO.

    all_below: every seed of DPPO with noise is below every one without; p: Welch's, of DPPO.
    """
    rows = []
    frame = wide(cells, "continuous_ppo")
    for environment, some in frame.groupby(level=0, sort=False):
        shares = {
            (name, noise != "none"): 100 * means(row[name], FLIPS)
            for (_, noise), row in some.iterrows()
            for name in ("DPPO", "DSPPO")
            if isinstance(row[name], list)
        }
        if len(shares) == 4:
            without, noisy = shares["DPPO", False], shares["DPPO", True]
            row = [environment, *(values.mean() for values in shares.values())]
            rows.append([*row, noisy.max() < without.min(), welch_of(noisy, without)[1]])
    names = ["DPPO", "DSPPO", "DPPO, noise", "DSPPO, noise"]
    return pd.DataFrame(rows, columns=["environment", *names, "all_below", "p"])


def sample_weights(cells: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """What SA2C's weight alpha - beta Z pi is, and what it does: a row per cell.

    pi: exp(-entropy), the geometric mean of the sampled actions' probability, of the first and last tenth. factor: the
    weight over alpha at that pi. Then DSA2C minus its control, which has alpha alone, as z by Welch's p, and the p.
    """
    symmetric, _, control = symmetric_of("continuous_a2c")
    family = cells[cells.family == "continuous_a2c"]
    weights = runs[(runs.algorithm == symmetric) & (runs.kind == "paper")].drop_duplicates(["environment", "noise"])
    weights = weights.set_index(["environment", "noise"])
    rows = []
    for row in pairs(family, symmetric, control).itertuples():
        alpha, beta, z = weights.loc[(row.environment, row.noise), ["alpha", "beta", "Z"]]
        pi = [np.exp(-means(row.folders_a, "losses/entropy", part).mean()) for part in ((0, 0.1), (0.9, 1))]
        factors = [1 - beta * z * x / alpha for x in pi]
        tested = [row.difference, row.joint, row.z, row.p]
        rows.append([row.environment, row.noise, beta, *pi, *factors, row.n_a, row.n_b, *tested])
    names = ["environment", "noise", "beta", "pi_first", "pi_last", "factor_first", "factor_last", "n", "n_control"]
    return pd.DataFrame(rows, columns=[*names, "difference", "joint", "z", "p"])


def claims(cells: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """The paper's claim, symmetric above baseline, tested alike on its own cells and on ours: a row per set of cells.

    Mean z and its interval over cells, Stouffer's z and p, cells with p below 0.05, smallest p, smallest p by Holm.
    """
    rows = []
    for family in dict.fromkeys(FAMILY.values()):
        symmetric, baseline, _ = symmetric_of(family)
        printed = pairs(cells[cells.family == family], symmetric, baseline, PAPERS)
        ours = pairs(pooled[pooled.family == family], symmetric, baseline)
        both = ours[ours.z.notna()].merge(printed, on=["table", "environment", "noise"], suffixes=("", "_printed"))
        sets = {"the paper's": (printed.z, printed.p)}
        if len(both):
            gains = [difference(*(both[f"{name}_{side}"] for side in "ab" for name in some)) for some in (OURS, PAPERS)]
            _, p, z = welch(*gains[0], *gains[1])
            sets["the paper's, cells that were run here"] = both.z_printed, both.p_printed
            sets |= {"ours": (both.z, both.p), "ours minus the paper's": (z, p)}
        for whose, (z, p) in sets.items():
            together_z, together_p = stouffer(z)
            row = [len(z), *mean_interval(z), together_z, together_p, int((np.asarray(p) < 0.05).sum())]
            rows.append([f"{symmetric} minus {baseline}", whose, *row, np.min(p), holm(p).min()])
    names = ["cells", "mean", "low", "high", "z", "p", "below", "smallest", "smallest_holm"]
    return pd.DataFrame(rows, columns=["claim", "whose", *names])


def algorithms(cells: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """One table of the discretized algorithms: a row each.

    run: cells run, of all; distance: ours minus the paper's as z; gain and paper_gain: over the baseline in per cent on
    the same cells; chance: probability of improvement over it without and with noise.
    """
    rows, lie = [], together(cells).set_index("algorithm")
    for family in CONTINUOUS:
        symmetric, baseline, _ = symmetric_of(family)
        ours = pairs(pooled[pooled.family == family], symmetric, baseline)
        for name in (baseline, symmetric):
            some = cells[(cells.algorithm == name) & cells.in_paper]
            row = [
                name,
                (some.n > 0).sum(),
                len(some),
                *lie.reindex([name])[["mean", "low", "high", "p"]].to_numpy()[0],
            ]
            if name == symmetric and len(ours):
                row += [improvements(ours[f"{side}_b"], ours[f"{side}_a"]).mean() for side in ("ours", "paper")]
                noisy = ours.noise != "none"
                row += [chance(part) if len(part) else None for part in (ours[~noisy], ours[noisy])]
            rows.append(row)
    names = [
        "algorithm",
        "run",
        "cells",
        "distance",
        "low",
        "high",
        "p",
        "gain",
        "paper_gain",
        "chance",
        "chance_noise",
    ]
    return pd.DataFrame(rows, columns=names)


def without_normalization(runs: pd.DataFrame) -> pd.DataFrame:
    """PPO of language models without advantage normalization minus all other arms of the same task, pooled.

    A row per task, length and metric: difference, its standard error and 95 % interval, seeds. Seen post hoc.
    """
    rows, same = [], ["environment", "steps", *MODELS]
    language = runs[runs.family.isin(TASKS)]
    for where, some in language.groupby(same):
        alike = some[some.other_settings.str.replace(r"^alpha \S+(, )?", "", regex=True).duplicated(keep=False)]
        first, others = alike[alike.algorithm == UNNORMALIZED], alike[alike.algorithm != UNNORMALIZED]
        for name in ("score", "perplexity", "kl") if min(len(first), len(others)) > 1 else ():
            mean, se, _ = difference(*summary(first[name]), *summary(others[name]))
            low, high = difference_interval(first[name], others[name])
            rows.append([where[0], where[1], name, float(mean), float(se), low, high, len(first), len(others)])
    return pd.DataFrame(rows, columns=["task", "updates", "metric", "mean", "se", "low", "high", "n", "n_others"])


def arms(runs: pd.DataFrame, families: tuple[str, ...] = ("atari_ppo", "atari_a2c")) -> dict[tuple, pd.DataFrame]:
    """Runs that are not the paper's beside each other: {(family, environment, noise, steps): a row per arm}.

    An arm is an algorithm with its other settings. Training return, entropy and value loss are of the last tenth.
    """
    found = {}
    others = runs[runs.family.isin(families) & (runs.kind != "paper")]
    for key, alike in others.groupby(["family", "environment", "noise", "steps"]):
        groups = by_group(alike, GROUP).sort_values(["rank", "other_settings"], ignore_index=True)
        if len(groups) > 2:
            for tag in LAST_TENTH.values():
                groups[tag] = [last_tenths(folders, tag) for folders in groups.folders]
            found[key] = groups
    return found


def spread(numbers: pd.Series, digits: int = 2) -> str:
    """0.97 to 1.04: smallest and largest."""
    return f"{numbers.min():.{digits}f} to {numbers.max():.{digits}f}"


def noises(frame: pd.DataFrame) -> dict:
    """The first two columns of most tables."""
    return {"Environment": frame.environment.map(plain), "Noise": frame.noise}


def weight_text(cells: pd.DataFrame) -> str:
    if (some := weight_in_training(cells)).empty:
        return ""
    texts = {f"{name}, DSPPO / DPPO": some[tag].map("{:.2f}".format) for tag, name in TRAINING.items()}
    texts["DPPO's gradient norm"] = some.baseline_grad_norm.map("{:.2f}".format)
    share = f"{spread(some.approx_kl, 3)} (KL estimate), {spread(some.clipfrac, 3)} (clipped share)"
    return (
        f"DSPPO over DPPO in {len(some)} cells, means over the run and the seeds: {share} and {spread(some.entropy)} "
        f"(entropy), while the gradient norm before the clip is {spread(some.grad_norm, 0)} times as large. DPPO's own "
        f"norm is {spread(some.baseline_grad_norm, 1)}, above the clip of 0.5 already.\n\n"
        f"{markdown(pd.DataFrame(noises(some) | texts), ('Noise',))}\n"
    )


def flips_text(cells: pd.DataFrame) -> str:
    if (some := sign_flips(cells)).empty:
        return ""
    frame = some.drop(columns=["all_below", "p"]).rename(columns={"environment": "Sign flips (%)"})
    frame = frame.assign(**{name: frame[name].map("{:.1f}".format) for name in frame if name != "Sign flips (%)"})
    frame["Sign flips (%)"], frame["Welch's p, DPPO"] = some.environment.map(plain), some.p.map(p_text)
    lower = (some["DPPO, noise"] < some.DPPO).sum()
    return (
        f"Reward noise lowers DPPO's sign flips in {lower} of {len(some)} environments; in {some.all_below.sum()} of "
        f"them every seed with noise is below every seed without.\n\n{markdown(frame)}\n"
    )


def sample_weight_text(cells: pd.DataFrame, runs: pd.DataFrame) -> str:
    if (some := sample_weights(cells, runs)).empty:
        return ""
    pi = [f"{first:.2g} to {last:.2g}" for first, last in zip(some.pi_first, some.pi_last)]
    factor = [f"{first:.2f} to {last:.2f}" for first, last in zip(some.factor_first, some.factor_last)]
    frame = noises(some) | {"beta": some.beta.map("{:g}".format), "pi": pi, "Weight / alpha": factor}
    frame |= {
        "n": some.n.astype(str) + ", " + some.n_control.astype(str),
        "DSA2C minus control": map(gain, some.difference, some.joint),
    }
    z, p = stouffer(some.z)
    return (
        "pi: exp(-entropy), the geometric mean of the sampled actions' probability, in the first and the last tenth of "
        f"training; the weight alpha - beta Z pi there over alpha. DSA2C minus its control, which has the weight alpha: "
        f"z over all {len(some)} cells {z:+.2f} (Stouffer's p {p_text(p)}), smallest p {p_text(some.p.min())}, by Holm "
        f"{p_text(holm(some.p).min())}.\n\n"
        f"{markdown(pd.DataFrame(frame | {'p': some.p.map(p_text)}), ('Noise',))}\n"
    )


def claims_text(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    some = claims(cells, pooled)
    frame = {"Cells of": some.claim, "Whose": some.whose, "Cells": some.cells}
    frame |= {"Mean z [95 %]": map(bracket_text, some["mean"], some.low, some.high)}
    frame |= {"Together z": some.z.map("{:+.1f}".format)}
    frame |= {"p": some.p.map(p_text), "p < 0.05": some.below, "Smallest p": some.smallest.map(p_text)}
    return markdown(pd.DataFrame(frame | {"by Holm": some.smallest_holm.map(p_text)}), ("Whose",)) + "\n"


def algorithms_text(cells: pd.DataFrame, pooled: pd.DataFrame) -> str:
    some = algorithms(cells, pooled)
    percent = [some[name].map("{:+.1f} %".format, na_action="ignore") for name in ("gain", "paper_gain")]
    frame = {"Algorithm": some.algorithm, "Cells run": some.run.astype(str) + " of " + some.cells.astype(str)}
    frame |= {"Ours minus the paper's, z [95 %]": map(bracket_text, some.distance, some.low, some.high)}
    frame |= {"Gain over its baseline, ours": percent[0], "the paper's, same cells": percent[1]}
    frame |= {"Above its baseline with probability": some.chance, "with noise": some.chance_noise}
    return markdown(pd.DataFrame(frame)) + "\n"


def arms_text(key: tuple, groups: pd.DataFrame) -> str:
    """A table of arms; its first column names the setting."""
    _, environment, noise, steps = key
    names = groups.algorithm + (", " + groups.other_settings).where(groups.other_settings != "", "")
    frame = {"Arm": names, "n": groups.n, "Score": map(mean_text, groups.scores)}
    frame |= {title: groups[tag].map(mean_text) for title, tag in LAST_TENTH.items()}
    title = f"{plain(environment)}, {steps:,} steps, noise {noise}: means of the last tenth, but for the score"
    return f"{title}.\n\n{markdown(pd.DataFrame(frame))}\n"


FINDINGS = {  # by the markers of the sections that show them
    "algorithms": lambda found: algorithms_text(found.cells, found.pooled),
    "claims": lambda found: claims_text(found.cells, found.pooled),
    "weight": lambda found: weight_text(found.cells),
    "flips": lambda found: flips_text(found.cells),
    "sample weight": lambda found: sample_weight_text(found.cells, found.runs),
    "arms": lambda found: "\n".join(arms_text(*item) for item in arms(found.runs).items()),
}
