"""Statistics of scores over seeds, and how they are printed."""

import math
from functools import cache

import numpy as np
from scipy import stats

from .cells import Cell

FAILURE = 1000  # percent; an improvement above says that the baseline failed, not how good the other one is


def standard_error(values: np.ndarray) -> float:
    """Of the mean over seeds; nan for a single one."""
    return np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def joint_difference(mean: float, se: float, paper: Cell) -> float:
    """Ours minus the paper's, in units of sqrt(SE_ours^2 + SE_paper^2); nan where there is no such unit."""
    joint = math.hypot(se, paper.se)
    return (mean - paper.mean) / joint if joint > 0 else math.nan


def count_wins(pairs: list[tuple[float, float]]) -> int:
    """Pairs (baseline mean, symmetric mean): as in the paper, the higher mean wins, whatever the standard errors."""
    return sum(symmetric > baseline for baseline, symmetric in pairs)


def improvements(pairs: list[tuple[float, float]]) -> np.ndarray:
    """Percent by which the symmetric mean exceeds the baseline mean; pairs with a baseline of 0 are left out."""
    return np.array([100 * (symmetric - baseline) / abs(baseline) for baseline, symmetric in pairs if baseline])


def interquartile_mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all runs; each sample holds the normalized scores of one environment, (..., seeds)."""
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def probability_of_improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """How often a run of the first half of the samples scores above one of the second half, a tie counting half.

    A sample is an environment's; the mean over environments is taken. axis is the last one, as scipy names it.
    """
    half = len(samples) // 2
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(samples[:half], samples[half:])]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], axis=0)


def permutation_test(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of the difference of two means: exact up to two samples of ten, beyond that of 200,000 splits.

    nan where one has one seed.
    """
    return _permutation_test(tuple(first), tuple(second)) if min(len(first), len(second)) > 1 else math.nan


@cache
def _permutation_test(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis) - y.mean(axis)

    options = {"vectorized": True, "n_resamples": 200_000, "batch": 20_000, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((first, second), difference, **options).pvalue)


def holm(ps: list[float]) -> list[float]:
    """p values in view of each other, by Holm's method; nan is none."""
    adjusted, running = [math.nan] * len(ps), 0.0
    order = sorted((i for i in range(len(ps)) if not math.isnan(ps[i])), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = running
    return adjusted


def difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the difference of two means, by Welch's t; None if one has one seed or neither varies."""
    if min(len(first), len(second)) < 2 or max(np.ptp(first), np.ptp(second)) == 0:
        return None
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    return float(interval.low), float(interval.high)


def bootstrap_interval(samples: list[np.ndarray], statistic=interquartile_mean) -> tuple[float, float] | None:
    """95 % interval of a statistic, seeds resampled within each environment; None if one has one seed."""
    if min(len(sample) for sample in samples) < 2:
        return None
    interval = stats.bootstrap(
        samples, statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return interval.low, interval.high


def format_number(value: float, like: float | None = None) -> str:
    """No decimals from 1000 up, one from 10 up, two from 1 up, else three, by the size of like."""
    size = abs(value if like is None else like)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def format_mean(values: np.ndarray) -> str:
    mean, se = values.mean(), standard_error(values)
    return format_number(mean) + (f" ± {format_number(se, like=mean)}" if math.isfinite(se) else "")


def format_gain(gain: float, se: float) -> str:
    """A difference of two means, with its sign and its standard error if there is one."""
    size = max(abs(gain), se) if math.isfinite(se) else gain
    text = f"{'+' if gain > 0 else ''}{format_number(gain, size)}"
    return text + (f" ± {format_number(se, size)}" if math.isfinite(se) else "")


def format_difference(difference: float) -> str:
    if math.isnan(difference):
        return "-"
    return f"{difference:+.2f}, {'exceeds' if abs(difference) > 1 else 'within'}"


def format_p(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.{3 if p < 0.0995 else 2}f}"


def format_improvement(pairs: list[tuple[float, float]]) -> str:
    percent = improvements(pairs)
    if not len(percent):
        return "undefined for a baseline of 0"
    without = percent[percent <= FAILURE]
    text = f"{percent.mean():+.1f} %"
    if len(without) < len(percent):
        rest = f"{without.mean():+.1f} %" if len(without) else "nothing left"
        text += f" ({rest} without the {len(percent) - len(without)} above {FAILURE} %)"
    return text


def format_interval(samples: list[np.ndarray], statistic=interquartile_mean) -> str:
    """A statistic with its interval; none where no resampling can change it, which says nothing about other seeds."""
    interval = bootstrap_interval(samples, statistic)
    bounds = "(one seed: no interval)"
    if interval:
        bounds = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval[0] < interval[1] else "(no interval)"
    return f"{statistic(*samples):.2f} {bounds}"


def markdown_table(header: list[str], rows: list[list[str]], right: str = "", padded: bool = True) -> str:
    """Padded, so that it reads well as plain text too; right: the header's names that are aligned to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) if padded else 3 for i in range(len(header))]
    aligned = [name in right.split("|") for name in header]

    def line(row: list[str]) -> str:
        texts = [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(row, widths, aligned)]
        return f"| {' | '.join(texts)} |"

    rule = [("-" * (width - 1) + ":") if r else "-" * width for width, r in zip(widths, aligned)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
