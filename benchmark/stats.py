"""Tests and intervals of scores over seeds, by scipy, and how they are printed.

Two samples are compared by Welch's t. With 5 to 10 seeds t has heavier tails than a normal number, so 1 / sqrt(cells)
is too narrow for a mean of t over cells. What is averaged over cells is therefore z, the normal quantile of Welch's p.
"""

import math

import numpy as np
import pandas as pd
import tabulate
from scipy import stats

tabulate.MIN_PADDING = 0  # no more spaces in a header than its column needs

RESAMPLES = 2000
FAILURE = 1000  # percent; an improvement above says that the baseline failed, not how good the other one is


def welch(mean, se, n, other_mean, other_se, other_n) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, p, z) of the first means minus the others, element by element; nan where one has a single seed.

    t is the difference in joint standard errors, p two-sided, z the normal number with t's sign and p.
    """
    mean, se, n, other_mean, other_se, other_n = (
        np.asarray(x, float) for x in (mean, se, n, other_mean, other_se, other_n)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        sd, other_sd = se * np.sqrt(n), other_se * np.sqrt(other_n)
        t, p = stats.ttest_ind_from_stats(mean, sd, n, other_mean, other_sd, other_n, equal_var=False)
    t = np.where(np.hypot(se, other_se) > 0, t, np.nan)  # without any spread there is no unit
    p = np.where(np.isnan(t), np.nan, p)
    return t, p, np.sign(t) * stats.norm.isf(p / 2)


def summary(values) -> tuple[float, float, int]:
    """Mean, standard error and number of scores; the error of a single one is nan."""
    values = np.asarray(values, float)
    se = float(stats.sem(values)) if len(values) > 1 else math.nan
    return float(values.mean()) if len(values) else math.nan, se, len(values)


def welch_of(first, second) -> tuple[float, float, float]:
    """(t, p, z) of two samples of scores."""
    return tuple(float(x) for x in welch(*summary(first), *summary(second)))


def difference_interval(first, second) -> tuple[float, float]:
    """95 % interval of the difference of two means, by Welch's t; nan if one has one seed or neither varies."""
    if min(len(first), len(second)) < 2 or max(np.ptp(first), np.ptp(second)) == 0:
        return math.nan, math.nan
    return tuple(map(float, stats.ttest_ind(first, second, equal_var=False).confidence_interval()))


def stouffer(z) -> tuple[float, float]:
    """(sum of z / sqrt(cells), its two-sided p): whether cells together differ from chance."""
    total = float(np.sum(z) / math.sqrt(len(z)))
    return total, float(2 * stats.norm.sf(abs(total)))


def mean_interval(values) -> tuple[float, float, float]:
    """Mean over cells and its 95 % interval, that of a t test over cells; nan bounds for fewer than three cells."""
    values = np.asarray(values, float)
    bounds = stats.ttest_1samp(values, 0).confidence_interval() if len(values) > 2 else (math.nan, math.nan)
    return float(values.mean()), float(bounds[0]), float(bounds[1])


def holm(p) -> np.ndarray:
    """p values corrected for their number, by Holm's method; nan counts for none and stays."""
    p = pd.Series(np.asarray(p, float))
    ordered = p.dropna().sort_values()
    adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return adjusted.reindex(p.index).to_numpy()


def difference(mean, se, n, other_mean, other_se, other_n) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The difference of means as (mean, se, n), n - 1 being its degrees of freedom (Welch-Satterthwaite).

    So two differences can be compared by welch in turn.
    """
    variance, other = np.square(np.asarray(se, float)), np.square(np.asarray(other_se, float))
    degrees = (variance + other) ** 2 / (variance**2 / (np.asarray(n) - 1) + other**2 / (np.asarray(other_n) - 1))
    return np.asarray(mean, float) - other_mean, np.sqrt(variance + other), degrees + 1


def beyond_by_chance(se, n, other_se, other_n, bound: float = 2) -> float:
    """How many of so many cells lie beyond a bound in joint standard errors if none differs, by Welch's t."""
    _, _, degrees = difference(0, se, n, 0, other_se, other_n)
    return float(2 * stats.t.sf(bound, degrees - 1).sum())


def probability_of_improvement(*samples, axis=-1):
    """How often a run of the first half of the samples scores above one of the second half, a tie counting half.

    Samples are one environment's each; the mean over environments is taken. axis is the last one, as scipy names it.
    """
    half = len(samples) // 2
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(samples[:half], samples[half:])]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], axis=0)


def bootstrap_interval(samples, statistic) -> tuple[float, float] | None:
    """95 % interval of a statistic, seeds resampled within each environment; None if one has one seed."""
    if min(map(len, samples)) < 2:
        return None
    options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
    return tuple(stats.bootstrap(samples, statistic, **options).confidence_interval)


def interval_text(samples, statistic) -> str:
    """A statistic with its interval; none where no resampling can change it, which says nothing about other seeds."""
    samples = [np.asarray(sample, float) for sample in samples]
    value, interval = f"{statistic(*samples):.2f}", bootstrap_interval(samples, statistic)
    if interval is None:
        return f"{value} (one seed: no interval)"
    low, high = interval
    return f"{value} [{low:.2f}, {high:.2f}]" if low < high else f"{value} (no interval)"


def improvements(baseline, symmetric) -> np.ndarray:
    """Percent by which each symmetric mean exceeds its baseline's; a baseline of 0 is left out."""
    baseline, symmetric = np.asarray(baseline, float), np.asarray(symmetric, float)
    some = baseline != 0
    return 100 * (symmetric - baseline)[some] / abs(baseline[some])


def improvement_text(baseline, symmetric) -> str:
    """Mean improvement in percent with its interval over cells, and without the failures of a baseline."""
    percent = improvements(baseline, symmetric)
    if not len(percent):
        return "undefined for a baseline of 0"
    without = percent[percent <= FAILURE]
    text = percent_text(percent)
    if len(without) < len(percent):
        rest = percent_text(without) if len(without) else "nothing left"
        text += f" ({rest} without the {len(percent) - len(without)} above {FAILURE} %)"
    return text


def percent_text(percent) -> str:
    """+3.1 % [-4.2, +10.4], the mean alone where there is no interval."""
    mean, low, high = mean_interval(percent)
    return f"{mean:+.1f} %" + (f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else "")


def number(value: float, like: float | None = None) -> str:
    """No decimals from 1000 up, one from 10 up, two from 1 up, else three, by the size of like."""
    size = abs(value if like is None else like)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def mean_se(mean: float, se: float = math.nan) -> str:
    """Mean ± standard error, the mean alone where there is no error; empty for no mean."""
    if math.isnan(mean):
        return ""
    return number(mean) + (f" ± {number(se, mean)}" if math.isfinite(se) else "")


def mean_text(values) -> str:
    """Mean ± standard error of scores."""
    return mean_se(*summary(values)[:2])


def gain(difference: float, se: float = math.nan) -> str:
    """A difference of two means with its sign, ± its standard error if there is one; empty for no difference."""
    if math.isnan(difference):
        return ""
    size = max(abs(difference), se) if math.isfinite(se) else difference
    text = f"{'+' if difference > 0 else ''}{number(difference, size)}"
    return text + (f" ± {number(se, size)}" if math.isfinite(se) else "")


def p_text(p: float) -> str:
    """A p value with two digits."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.{3 if p < 0.0995 else 2}f}"


def mean_z_text(z) -> str:
    """+0.12 [-0.30, +0.54]: mean over cells, alone where there is no interval."""
    mean, low, high = mean_interval(z)
    return f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")


def bounds_text(low: float, high: float, like: float) -> str:
    """[0.12, 0.34], empty where there is no interval; digits are those of like."""
    return f"[{number(low, like)}, {number(high, like)}]" if math.isfinite(low) else ""


def span(numbers, unit: str = "") -> str:
    """5, or 5 to 10."""
    low, high = min(numbers), max(numbers)
    return (f"{low}" if low == high else f"{low} to {high}") + unit


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table, columns of numbers to the right; what is missing is empty."""
    texts = frame.astype(object).where(frame.notna(), "").astype(str)
    right = [texts[name].str.match(r"[-+<]?\s*[\d.]|-?$").all() for name in texts]
    sides = ["right" if number else "left" for number in right]
    return texts.to_markdown(index=False, disable_numparse=True, colalign=sides) if len(texts) else ""
