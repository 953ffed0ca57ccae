"""What the runs say beyond the paper's tables: the tables of docs/findings.md."""

import numpy as np
import pandas as pd
import stats
from comparisons import CELL, OURS, PAPERS, chance, pairs, plain, ran, symmetric_of, together, together_text
from runs import FAMILY, MODELS, TASKS, UNNORMALIZED, Found, bin_means, read_cells, series
from tables import other_groups, settings_table

TRAINING = {"approx_kl": "KL", "clipfrac": "Clip fraction", "entropy": "Entropy", "value_loss": "Value loss"}
TESTED = TRAINING | {"sign_flips": "Sign flips"}
TRAINING |= {"grad_norm": "Gradient norm"}


def means(folders: list[str], tag: str, part: tuple[float, float] = (0, 1)) -> np.ndarray:
    """Mean of a tag over a part of each run, (seeds,); nan where no run logged it."""
    found = []
    for values in (series(folder, tag) for folder in folders):
        if len(values) > 1:
            edges = values.index[0] + np.ptp(values.index) * np.array(part)
            found.append(bin_means(values, edges)[0])
    return np.array(found or [np.nan])


def weight_in_training(cells: pd.DataFrame) -> pd.DataFrame:
    """What SPPO's weight changes in continuous control: DSPPO over DPPO, means over the run and the seeds.

    A row per cell and tag: the ratio, its standard error (of first order), DPPO's own mean and error, and Welch's
    z and p of the seeds.
    """
    rows = []
    for x in ran(pairs(cells, "DSPPO", "DPPO")).itertuples():
        for tag in TRAINING | TESTED:
            first, second = (means(folders, f"losses/{tag}") for folders in (x.folders_a, x.folders_b))
            (other, other_se, _), (own, se, _) = stats.summary(first), stats.summary(second)
            error = other / own * np.hypot(other_se / other, se / own)
            _, p, z = stats.welch_of(first, second)
            rows.append([x.environment, x.noise, x.n, tag, other / own, error, own, se, z, p])
    columns = ["environment", "noise", "n", "tag", "ratio", "error", "own", "se", "z", "p"]
    found = pd.DataFrame(rows, columns=columns)
    return found.groupby(["environment", "noise"], sort=False).filter(lambda cell: cell.ratio.notna().all())


def weight_text(found: Found) -> str:
    some = weight_in_training(found.cells)
    some = some[some.tag.isin(TRAINING)]
    if some.empty:
        return ""
    norm = some[some.tag == "grad_norm"]
    spans = {tag: f"{x.min():.2f} to {x.max():.2f}" for tag, x in some.groupby("tag").ratio}
    texts = some.assign(text=[f"{x.ratio:.2f} ± {x.error:.2f}" for x in some.itertuples()])
    table = texts.set_index(["environment", "noise", "n", "tag"]).text.unstack(sort=False)
    table = table.rename(columns={tag: f"{title}, DSPPO / DPPO" for tag, title in TRAINING.items()}).reset_index()
    table["Gradient norm, DPPO"] = [f"{x.own:.2f} ± {x.se:.2f}" for x in norm.itertuples()]
    table["environment"] = table.environment.map(plain)
    return (
        f"DSPPO over DPPO in {len(table)} cells, means over the run and the seeds: KL {spans['approx_kl']}, "
        f"clip fraction {spans['clipfrac']}, entropy {spans['entropy']}, value loss {spans['value_loss']}. The "
        f"gradient norm before the clip is {spans['grad_norm']} times as large. DPPO's own norm is "
        f"{norm.own.min():.2f} to {norm.own.max():.2f}; the clip is at 0.5.\n\n"
        f"{stats.markdown(table.rename(columns={'environment': 'Environment', 'noise': 'Noise'}))}\n"
    )


def weight_tests_text(found: Found) -> str:
    """Whether the weight's ratios differ from 1: in all cells together, and in the clearest cell."""
    rows = []
    for tag, cells in weight_in_training(found.cells).groupby("tag", sort=False):
        if tag in TESTED:
            mean, low, high = np.exp(stats.mean_interval(np.log(cells.ratio)))
            first, by_holm = cells.loc[cells.p.fillna(1).idxmin()], stats.holm(cells.p)
            where = (
                f"{plain(first.environment)}, {'without' if first.noise == 'none' else 'with'} noise, {first.ratio:.2f}"
            )
            interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
            row = [TESTED[tag], f"{mean:.2f}{interval}", stats.p_text(stats.stouffer(cells.z)[1])]
            rows.append([*row, where, stats.p_text(np.nanmin(by_holm)), f"{(by_holm < 0.05).sum()} of {len(cells)}"])
    if not rows:
        return ""
    columns = ["DSPPO / DPPO", "Geometric mean [95 %]", "p, all cells", "Clearest cell", "its p, by Holm"]
    return stats.markdown(pd.DataFrame(rows, columns=[*columns, "Cells with p < 0.05 by Holm"])) + "\n"


def sign_flips(cells: pd.DataFrame) -> pd.DataFrame:
    """Advantage sign flips of each seed in percent, means over the run: a row per environment, four columns."""
    some = cells[cells.algorithm.isin(["DPPO", "DSPPO"]) & (cells.n > 0)]
    name = some.algorithm + np.where(some.noise == "none", "", ", noise")
    flips = some.folders.map(lambda folders: 100 * means(folders, "losses/sign_flips"))
    flips = flips.where([np.isfinite(x).all() for x in flips])
    frame = some.assign(name=name, flips=flips).set_index(["environment", "name"]).flips.unstack(sort=False)
    return frame.reindex(columns=["DPPO", "DPPO, noise", "DSPPO", "DSPPO, noise"]).dropna()


def flips_text(found: Found) -> str:
    some = sign_flips(found.cells)
    if some.empty:
        return ""
    without, noisy = some["DPPO"], some["DPPO, noise"]
    lower = sum(x.mean() > y.mean() for x, y in zip(without, noisy))
    below = sum(x.min() > y.max() for x, y in zip(without, noisy))
    frame = {"Sign flips (%)": some.index.map(plain), "Seeds, at least": some.map(len).min(axis=1)}
    frame |= {name: some[name].map(lambda x: f"{x.mean():.1f} ± {stats.summary(x)[1]:.1f}") for name in some}
    frame |= {"Welch's p, DPPO": [stats.p_text(stats.welch_of(*x)[1]) for x in zip(without, noisy)]}
    return (
        f"Reward noise lowers DPPO's sign flips in {lower} of {len(some)} environments; in {below} of them every seed "
        f"with noise is below every seed without.\n\n{stats.markdown(pd.DataFrame(frame))}\n"
    )


def sample_weights(found: Found) -> pd.DataFrame:
    """What SA2C's weight alpha - beta Z pi is, and what it does: DSA2C beside its control, a row per cell.

    pi: exp(-entropy), the geometric mean of the sampled actions' probability, of the first and the last tenth. factor:
    the weight over the control's alpha at that pi.
    """
    symmetric, _, control = symmetric_of("continuous_a2c")
    both = ran(pairs(found.cells, symmetric, control))
    runs = found.runs[(found.runs.kind == "paper") & (found.runs.algorithm == symmetric)]
    both = both.merge(runs.drop_duplicates(CELL[1:])[[*CELL[1:], "alpha", "beta", "Z"]], "left", CELL[1:])
    for name, part in (("first", (0, 0.1)), ("last", (0.9, 1))):
        both[f"pi_{name}"] = [np.exp(-means(x, "losses/entropy", part).mean()) for x in both.folders_a]
        both[f"factor_{name}"] = 1 - both.beta * both.Z * both[f"pi_{name}"] / both.alpha
    return both.dropna(subset="pi_last")


def sample_weight_text(found: Found) -> str:
    some = sample_weights(found)
    if some.empty:
        return ""
    frame = {"Environment": some.environment.map(plain), "Noise": some.noise, "beta": some.beta.map("{:g}".format)}
    frame |= {"pi": [f"{x.pi_first:.2g} to {x.pi_last:.2g}" for x in some.itertuples()]}
    frame |= {"Weight / alpha": [f"{x.factor_first:.2f} to {x.factor_last:.2f}" for x in some.itertuples()]}
    frame |= {"n": some.n, "DSA2C minus control": some.gain, "Welch's p": some.p.map(stats.p_text)}
    z, p = stats.stouffer(some.z)
    return (
        "pi: exp(-entropy), the geometric mean of the sampled actions' probability, in the first and the last tenth of "
        "training; the weight is alpha - beta Z pi, the control's is alpha. DSA2C minus control over all "
        f"{len(some)} cells: z {z:+.2f}, p {stats.p_text(p)} (Stouffer); smallest p {stats.p_text(some.p.min())}, by "
        f"Holm {stats.p_text(some.holm.min())}.\n\n{stats.markdown(pd.DataFrame(frame))}\n"
    )


def difference(both: pd.DataFrame, values: tuple[str, str, str], suffix: str = "") -> tuple:
    """Mean, standard error and degrees of freedom + 1 of the difference of both sides."""
    return stats.difference(*(both[f"{name}_{side}{suffix}"] for side in "ab" for name in values))


def rise(both: pd.DataFrame, values: tuple[str, str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(z, p) of the gain with noise minus the gain without, an element per environment that has both."""
    noisy, quiet = both[both.noise != "none"], both[both.noise == "none"]
    both = noisy.merge(quiet, on="environment", suffixes=("_noisy", "_quiet"))
    _, p, z = stats.welch(*(x for suffix in ("_noisy", "_quiet") for x in difference(both, values, suffix)))
    return z, p


def claims(found: Found) -> pd.DataFrame:
    """The paper's claim, symmetric above baseline, tested alike on its own cells and on ours: z and p by set of cells.

    A row per set: claim, whose, z and p of its cells.
    """
    rows = []
    for family in dict.fromkeys(FAMILY.values()):
        symmetric, baseline, _ = symmetric_of(family)
        both = pairs(found.pooled[found.pooled.family == family], symmetric, baseline)
        printed, ours = both[both.paper_z.notna()], both[both.z.notna()]
        _, p, z = stats.welch(*difference(ours, OURS), *difference(ours, PAPERS))
        sets = {
            "the paper's": (printed.paper_z, printed.paper_p),
            "the paper's, with noise minus without": rise(printed, PAPERS),
            "the paper's, cells that were run here": (ours.paper_z, ours.paper_p),
            "ours": (ours.z, ours.p),
            "ours minus the paper's": (z, p),
            "ours, with noise minus without": rise(ours, OURS),
        }
        claim = f"{symmetric} minus {baseline}{' (Atari)' if family.startswith('atari') else ''}"
        rows += [[claim, whose, np.array(z), np.array(p)] for whose, (z, p) in sets.items() if len(z)]
    return pd.DataFrame(rows, columns=["claim", "whose", "z", "p"])


def claims_text(found: Found) -> str:
    some = claims(found)
    stouffer = [stats.stouffer(z) for z in some.z]
    frame = {"Difference": some.claim, "Whose": some.whose, "Cells": some.z.map(len)}
    frame |= {"Mean z [95 %]": some.z.map(stats.mean_z_text), "z of all": [f"{z:+.1f}" for z, _ in stouffer]}
    frame |= {"p of all": [stats.p_text(p) for _, p in stouffer], "p < 0.05": [(p < 0.05).sum() for p in some.p]}
    frame |= {"Smallest p": [stats.p_text(p.min()) for p in some.p]}
    frame |= {"by Holm": [stats.p_text(stats.holm(p).min()) for p in some.p]}
    return stats.markdown(pd.DataFrame(frame)) + "\n"


def algorithms_text(found: Found) -> str:
    """One table of the discretized algorithms: distance from the paper, and gain over the baseline."""
    rows, lie = [], together(found.cells)
    lie = dict(zip(lie["Algorithm"], lie["Mean z [95 %]"])) if len(lie) else {}
    for family in ("continuous_ppo", "continuous_a2c"):
        symmetric, baseline, _ = symmetric_of(family)
        both = ran(pairs(found.pooled[found.pooled.family == family], symmetric, baseline))
        for name in (baseline, symmetric):
            some = found.cells[(found.cells.algorithm == name) & found.cells.in_paper]
            row = {"Algorithm": name, "Cells run": f"{(some.n > 0).sum()} of {len(some)}"}
            row |= {"Ours minus the paper's, mean z [95 %]": lie.get(name)}
            if name == symmetric and len(both):
                row["Gain [95 %]"] = stats.improvement_text(both.ours_b, both.ours_a)
                row["Paper's, same cells"] = stats.improvement_text(both.paper_b, both.paper_a)
                parts = {"P(above its baseline)": both.noise == "none", "with noise": both.noise != "none"}
                row |= {title: chance(both[part]) for title, part in parts.items() if part.any()}
            rows.append(row)
    return stats.markdown(pd.DataFrame(rows)) + "\n"


def normalization_text(found: Found) -> str:
    """PPO of language models without advantage normalization minus all other arms of the same task, pooled."""
    rows = []
    for (task, updates, *_), some in found.runs[found.runs.family.isin(TASKS)].groupby(
        ["environment", "steps", *MODELS]
    ):
        arm = some.algorithm == UNNORMALIZED
        for name in ("score", "perplexity", "kl") if min(arm.sum(), (~arm).sum()) > 1 else ():
            first, others = some[name][arm], some[name][~arm]
            mean, se, _ = stats.difference(*stats.summary(first), *stats.summary(others))
            interval = stats.bounds_text(*stats.difference_interval(first, others), float(mean))
            difference = f"{stats.gain(float(mean), float(se))} {interval}"
            rows.append([task, updates, name, f"{len(first)}, {len(others)}", difference])
    header = ["Task", "Updates", "Metric", "n", "Without normalization minus all other arms [95 %]"]
    return stats.markdown(pd.DataFrame(rows, columns=header)) + "\n" if rows else ""


def arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Atari runs that are not the paper's and differ in algorithm or settings alone, where there are three or more."""
    groups = other_groups(runs[runs.family.str.startswith("atari")])
    return groups[groups.groupby(["family", "environment", "noise", "steps"]).n.transform("size") > 2]


def arms_text(found: Found) -> str:
    groups = arms(found.runs)
    return settings_table(groups) + "\n" if len(groups) else ""


def training_text(found: Found) -> str:
    """Where all cells would lie with the training return of the last tenth in place of the evaluation."""
    runs = found.runs.assign(score=found.runs.train_return)
    return together_text(read_cells(runs[runs.score.notna()]))


FINDINGS = {"algorithms": algorithms_text, "claims": claims_text, "weight": weight_text, "flips": flips_text}
FINDINGS |= {
    "weight tests": weight_tests_text,
    "sample weight": sample_weight_text,
    "arms": arms_text,
    "normalization": normalization_text,
}
FINDINGS |= {"training returns": training_text}
