"""What the runs say beyond the paper's tables: the numbers of docs/findings.md.

Each finding is a function that returns a table of numbers, and one that makes Markdown of it.
"""

import numpy as np
import pandas as pd
import stats
from comparisons import CELL, OURS, PAPERS, chance, pairs, plain, symmetric_of, together, together_text
from runs import FAMILY, GROUP, MODELS, TASKS, UNNORMALIZED, Found, bin_means, by_group, read_cells, series
from tables import last_texts

TRAINING = {"approx_kl": "KL", "clipfrac": "Clip fraction", "entropy": "Entropy", "value_loss": "Value loss"}
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

    A row per cell: ratios of KL, clip fraction, entropy, value loss and gradient norm before the clip, and DPPO's norm.
    """
    rows = []
    for x in pairs(cells, "DSPPO", "DPPO").itertuples():
        both = [[means(folders, f"losses/{tag}").mean() for tag in TRAINING] for folders in (x.folders_a, x.folders_b)]
        rows.append([x.environment, x.noise, *np.divide(*both), both[1][-1]])
    return pd.DataFrame(rows, columns=["environment", "noise", *TRAINING, "norm"]).dropna()


def weight_text(found: Found) -> str:
    some = weight_in_training(found.cells)
    if some.empty:
        return ""
    spans = {name: f"{some[name].min():.2f} to {some[name].max():.2f}" for name in [*TRAINING, "norm"]}
    frame = {"Environment": some.environment.map(plain), "Noise": some.noise}
    frame |= {f"{title}, DSPPO / DPPO": some[name].map("{:.2f}".format) for name, title in TRAINING.items()}
    return (
        f"DSPPO over DPPO in {len(some)} cells, means over the run and the seeds: KL {spans['approx_kl']}, "
        f"clip fraction {spans['clipfrac']}, entropy {spans['entropy']}, value loss {spans['value_loss']}. The "
        f"gradient norm before the clip is {spans['grad_norm']} times as large. DPPO's own norm is {spans['norm']}; "
        "the clip is at 0.5.\n\n"
        f"{stats.markdown(pd.DataFrame(frame | {'Gradient norm, DPPO': some.norm.map('{:.2f}'.format)}))}\n"
    )


def sign_flips(cells: pd.DataFrame) -> pd.DataFrame:
    """Advantage sign flips in percent without and with reward noise, means over the run, of DPPO and DSPPO.

    all_below: every seed of DPPO with noise is below every one without; p: Welch's, of DPPO.
    """
    rows, both = [], pairs(cells, "DSPPO", "DPPO")
    for environment, some in both.groupby("environment", sort=False):
        if set(some.noise == "none") == {True, False}:
            some = some.sort_values("noise", key=lambda noise: noise != "none")
            sppo, ppo = ([100 * means(x, "losses/sign_flips") for x in some[f"folders_{side}"]] for side in "ab")
            row = [environment, ppo[0].mean(), ppo[1].mean(), sppo[0].mean(), sppo[1].mean(), min(map(len, ppo + sppo))]
            rows.append([*row, ppo[1].max() < ppo[0].min(), stats.welch_of(*ppo)[1]])
    names = ["DPPO", "DPPO, noise", "DSPPO", "DSPPO, noise"]
    return pd.DataFrame(rows, columns=["environment", *names, "n", "all_below", "p"]).dropna(subset=names)


def flips_text(found: Found) -> str:
    some = sign_flips(found.cells)
    if some.empty:
        return ""
    shares = some.drop(columns=["environment", "n", "all_below", "p"]).map("{:.1f}".format)
    frame = {"Sign flips (%)": some.environment.map(plain), "Seeds, at least": some.n, **shares}
    frame |= {"Welch's p, DPPO": some.p.map(stats.p_text)}
    lower, below = (some["DPPO, noise"] < some.DPPO).sum(), some.all_below.sum()
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
    both = pairs(found.cells, symmetric, control)
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


def rise(both: pd.DataFrame, values: tuple[str, str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(z, p) of the gain with noise minus the gain without, an element per environment that has both."""
    quiet, noisy = (both[(both.noise == "none") == x].set_index("environment") for x in (True, False))
    both = noisy.join(quiet, lsuffix="_noisy", rsuffix="_quiet", how="inner")
    gains = [[both[f"{name}_{side}_{which}"] for side in "ab" for name in values] for which in ("noisy", "quiet")]
    _, p, z = stats.welch(*stats.difference(*gains[0]), *stats.difference(*gains[1]))
    return z, p


def claims(found: Found) -> pd.DataFrame:
    """The paper's claim, symmetric above baseline, tested alike on its own cells and on ours: a row per set of cells.

    Mean z and its interval over cells, Stouffer's z and p, cells with p below 0.05, smallest p, smallest p by Holm.
    """
    rows = []
    for family in dict.fromkeys(FAMILY.values()):
        symmetric, baseline, _ = symmetric_of(family)
        printed = pairs(found.cells[found.cells.family == family], symmetric, baseline, PAPERS)
        ours = pairs(found.pooled[found.pooled.family == family], symmetric, baseline)
        both = ours[ours.z.notna()].merge(printed, on=CELL, suffixes=("", "_printed"))
        sets = {"the paper's": (printed.z, printed.p), "the paper's, with noise minus without": rise(printed, PAPERS)}
        if len(both):
            gains = [stats.difference(*(both[f"{name}_{side}"] for side in "ab" for name in x)) for x in (OURS, PAPERS)]
            _, p, z = stats.welch(*gains[0], *gains[1])
            sets["the paper's, cells that were run here"] = both.z_printed, both.p_printed
            sets |= {"ours": (both.z, both.p), "ours minus the paper's": (z, p)}
            sets["ours, with noise minus without"] = rise(ours, OURS)
        for whose, (z, p) in ((whose, x) for whose, x in sets.items() if len(x[0])):
            row = [len(z), *stats.mean_interval(z), *stats.stouffer(z), int((np.asarray(p) < 0.05).sum())]
            where = " (Atari)" if family.startswith("atari") else ""
            rows.append([f"{symmetric} minus {baseline}{where}", whose, *row, np.min(p), np.min(stats.holm(p))])
    names = ["cells", "mean", "low", "high", "z", "p", "below", "smallest", "smallest_holm"]
    return pd.DataFrame(rows, columns=["claim", "whose", *names])


def claims_text(found: Found) -> str:
    some = claims(found)
    frame = {"Difference": some.claim, "Whose": some.whose, "Cells": some.cells}
    frame |= {"Mean z [95 %]": map(stats.bracket_text, some["mean"], some.low, some.high)}
    frame |= {"z of all": some.z.map("{:+.1f}".format), "p of all": some.p.map(stats.p_text), "p < 0.05": some.below}
    frame |= {"Smallest p": some.smallest.map(stats.p_text), "by Holm": some.smallest_holm.map(stats.p_text)}
    return stats.markdown(pd.DataFrame(frame)) + "\n"


def algorithms(found: Found) -> pd.DataFrame:
    """One table of the discretized algorithms: a row each.

    run: cells run, of all; distance: ours minus the paper's as mean z; gain and paper_gain: over the baseline in per
    cent on the same cells; chance: probability of improvement over it, without and with noise.
    """
    rows, lie = [], together(found.cells).set_index("algorithm")[["mean", "low", "high", "p"]]
    for family in ("continuous_ppo", "continuous_a2c"):
        symmetric, baseline, _ = symmetric_of(family)
        both = pairs(found.pooled[found.pooled.family == family], symmetric, baseline)
        for name in (baseline, symmetric):
            some = found.cells[(found.cells.algorithm == name) & found.cells.in_paper]
            row = [name, (some.n > 0).sum(), len(some), *lie.reindex([name]).to_numpy()[0], None, None, None, None]
            if name == symmetric and len(both):
                row[-4:-2] = [stats.improvements(both[f"{x}_b"], both[f"{x}_a"]).mean() for x in ("ours", "paper")]
                parts = both[both.noise == "none"], both[both.noise != "none"]
                row[-2:] = [chance(part) if len(part) else None for part in parts]
            rows.append(row)
    names = "algorithm run cells distance low high p gain paper_gain chance noisy_chance"
    return pd.DataFrame(rows, columns=names.split())


def algorithms_text(found: Found) -> str:
    some = algorithms(found)
    gains = [some[name].map("{:+.1f} %".format, na_action="ignore") for name in ("gain", "paper_gain")]
    frame = {"Algorithm": some.algorithm, "Cells run": some.run.astype(str) + " of " + some.cells.astype(str)}
    frame |= {"Ours minus the paper's, mean z [95 %]": map(stats.bracket_text, some.distance, some.low, some.high)}
    frame |= {"Gain over its baseline": gains[0], "the paper's, same cells": gains[1]}
    frame |= {"P(above its baseline)": some.chance, "with noise": some.noisy_chance}
    return stats.markdown(pd.DataFrame(frame)) + "\n"


def without_normalization(runs: pd.DataFrame) -> pd.DataFrame:
    """PPO of language models without advantage normalization minus all other arms of the same task, pooled.

    A row per task, length and metric: difference, its standard error and 95 % interval, seeds. Seen post hoc.
    """
    rows = []
    for (task, updates, *_), some in runs[runs.family.isin(TASKS)].groupby(["environment", "steps", *MODELS]):
        plain_ppo = some.algorithm == UNNORMALIZED
        first, others = some[plain_ppo], some[~plain_ppo]
        for name in ("score", "perplexity", "kl") if min(len(first), len(others)) > 1 else ():
            mean, se, _ = stats.difference(*stats.summary(first[name]), *stats.summary(others[name]))
            interval = stats.difference_interval(first[name], others[name])
            rows.append([task, updates, name, float(mean), float(se), *interval, len(first), len(others)])
    return pd.DataFrame(rows, columns=["task", "updates", "metric", "mean", "se", "low", "high", "n", "n_others"])


def normalization_text(found: Found) -> str:
    lines = []
    for x in without_normalization(found.runs).itertuples():
        difference = f"{stats.gain(x.mean, x.se)} {stats.bounds_text(x.low, x.high, x.mean)}"
        lines.append(
            f"- {x.task}, {x.updates} updates: without advantage normalization {x.metric} differs by {difference} from "
            f"the other arms pooled ({x.n}, {x.n_others} seeds; seen post hoc).\n"
        )
    return "".join(lines)


def arms(runs: pd.DataFrame) -> dict[tuple, pd.DataFrame]:
    """Atari runs that are not the paper's beside each other: {(family, environment, noise, steps): a row per arm}.

    An arm is an algorithm with its other settings; three or more make a set.
    """
    found, others = {}, runs[runs.family.str.startswith("atari") & (runs.kind != "paper")]
    for key, alike in others.groupby(["family", "environment", "noise", "steps"]):
        groups = by_group(alike, GROUP).sort_values(["rank", "other_settings"], ignore_index=True)
        if len(groups) > 2:
            found[key] = groups
    return found


def arms_text(found: Found) -> str:
    parts = []
    for (_, environment, noise, steps), groups in arms(found.runs).items():
        names = groups.algorithm + (", " + groups.other_settings).where(groups.other_settings != "", "")
        frame = {"Arm": names, "n": groups.n, "Score": map(stats.mean_se, groups.ours, groups.se)} | last_texts(groups)
        title = f"{plain(environment)}, {steps:,} steps, noise {noise}; all but the score are means of the last tenth."
        parts.append(f"{title}\n\n{stats.markdown(pd.DataFrame(frame))}\n")
    return "\n".join(parts)


def training_text(found: Found) -> str:
    """Where all cells would lie with the training return of the last tenth in place of the evaluation."""
    runs = found.runs.assign(score=found.runs.train_return)
    return together_text(read_cells(runs[runs.score.notna()]))


FINDINGS = {"algorithms": algorithms_text, "claims": claims_text, "weight": weight_text, "flips": flips_text}
FINDINGS |= {"sample weight": sample_weight_text, "arms": arms_text, "normalization": normalization_text}
FINDINGS |= {"training returns": training_text}
