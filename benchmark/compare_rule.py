"""The rule of compare.py. Run as a script, it shows how often the rule errs and which differences it finds.

python benchmark/compare_rule.py               # 10,000 comparisons a row, resampled from benchmark/results
"""

import math
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm
from stats import markdown, welch

RESULTS = Path(__file__).with_name("results")
ENVS = ("HalfCheetah-v4", "Hopper-v4", "Swimmer-v4", "BipedalWalker-v3")
TWENTY_SEEDS = ("Swimmer-v4", "BipedalWalker-v3", "InvertedDoublePendulum-v4", "LunarLanderContinuous-v3")  # are kept
RETURN, SCORES = "charts/episodic_return", "objective/scores"
WORDS = np.array(["Not shown", "Better", "Worse", "Mixed"])
SEEN = 0.8  # a difference counts as seen if so many comparisons show it
NORMAL_SAMPLES = 4000  # beside which two modes are looked for


def read_curve(folder: Path, tag: str) -> pd.Series:
    """A tag of curves.csv by step, or update."""
    frame = pd.read_csv(folder / "curves.csv", index_col=0)
    return frame[tag].dropna() if tag in frame else pd.Series(dtype=float)


def mean_between(curve: pd.Series, begin: float, end: float) -> float:
    """Mean of a curve, linear between its rows, over the steps from begin to end that it has; nan without rows."""
    if curve.empty:
        return math.nan
    steps = np.linspace(max(begin, curve.index[0]), min(end, curve.index[-1]), 200)
    return float(np.interp(steps, curve.index, curve).mean())


def welch_floored(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, z) of Welch's test over the last dimension. No p is below the least that a permutation test could give."""
    n, m, gap = first.shape[-1], second.shape[-1], first.mean(-1) - second.mean(-1)
    errors = [x.std(-1, ddof=1) / math.sqrt(x.shape[-1]) for x in (first, second)]
    p = welch(first.mean(-1), errors[0], n, second.mean(-1), errors[1], m)[1]
    p = np.where(np.isnan(p), gap == 0, p)  # neither side varies
    p = np.clip(p, 2 / math.comb(n + m, n), 1)
    return p, np.sign(gap) * norm.isf(p / 2)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's p over the last dimension, of many comparisons at once."""
    order, tests = np.argsort(p, -1), p.shape[-1]
    ordered = np.take_along_axis(p, order, -1) * np.arange(tests, 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(ordered, -1))
    return np.take_along_axis(adjusted, np.argsort(order, -1), -1)


class Verdict(NamedTuple):
    """What the rule says of one comparison, or of an array of them."""

    word: np.ndarray  # one of WORDS
    p: np.ndarray  # over all environments
    shown: np.ndarray  # whether that p is small enough
    holm: np.ndarray  # p of each environment, in the last dimension, corrected for their number
    ways: np.ndarray  # +1 or -1 where that environment is shown to be better or worse, else 0


def decide(p: np.ndarray, z: np.ndarray, look: int = 1) -> Verdict:
    """The rule on Welch's p and z of each environment, in the last dimension.

    At the second look at the answer, with more seeds, every p counts 4 times, at the third 9 times.
    """
    environments = p.shape[-1]
    total = z.sum(-1) / math.sqrt(environments)  # Stouffer
    over_all, adjusted = 2 * norm.sf(abs(total)) * look**2, holm(p) * look**2
    shown = over_all <= (0.025 if environments > 1 else 0.05)
    level = np.where(shown | (environments == 1), 0.05, 0.025)[..., None]
    ways = np.where(adjusted <= level, np.sign(z), 0)
    better, worse = ((ways == way).any(-1) | (shown & (np.sign(total) == way)) for way in (1, -1))
    return Verdict(WORDS[better + 2 * worse], np.minimum(1, over_all), shown, np.minimum(1, adjusted), ways)


def words(x: np.ndarray, y: np.ndarray, look: int = 1) -> np.ndarray:
    """What the rule says of comparisons (..., environments, seeds)."""
    return decide(*welch_floored(x, y), look).word


@cache
def least_difference(seeds: int, envs: int, alone: bool = False, look: int = 1) -> float:
    """Standard deviations of seeds that the rule sees in four of five cases, as the difference in all environments or
    in one alone; inf if no difference is enough. Simulated with normal scores."""
    x, y = np.random.default_rng(0).standard_normal((2, 4000, envs, seeds))
    where = np.arange(envs)[:, None] < (1 if alone else envs)

    def lacking(difference: float) -> float:
        return SEEN - (words(x + difference * where, y, look) != "Not shown").mean()

    return brentq(lacking, 0, 10, xtol=0.01) if lacking(10) < 0 else math.inf


def separation(samples: np.ndarray) -> np.ndarray:
    """Largest share of the variance that a cut in two parts explains, at least a fifth of the seeds in each."""
    samples = np.sort(samples, -1)
    n, total, best = samples.shape[-1], samples.var(-1) * samples.shape[-1], 0.0
    for cut in range(max(2, n // 5), n - max(2, n // 5) + 1):
        within = samples[..., :cut].var(-1) * cut + samples[..., cut:].var(-1) * (n - cut)
        best = np.maximum(best, 1 - within / total)
    return best


def has_two_modes(scores: np.ndarray) -> bool:
    """Whether scores separate into two parts more than all but 1 in 200 normal samples do; False below 8 seeds."""
    if len(scores) < 8 or np.ptp(scores) == 0:
        return False
    normal = np.random.default_rng(0).standard_normal((NORMAL_SAMPLES, len(scores)))
    return bool((separation(normal) >= separation(scores)).mean() <= 0.005)


def kept_scores(env: str, steps: int | None = None, ppo: bool = True) -> list[np.ndarray]:
    """Scores of the runs in benchmark/results without reward noise, one array for each algorithm; without steps those
    of the final evaluation."""
    runs = pd.read_csv(RESULTS / "scores.csv")
    runs = runs[(runs.environment == env) & (runs.noise == "none") & (runs.steps >= (steps or 0))]
    runs = runs[runs.family.str.endswith("_ppo" if ppo else "_a2c")]
    if steps:
        curves = [read_curve(RESULTS / folder, RETURN) for folder in runs.folder]
        runs = runs.assign(score=[mean_between(curve, 0, steps) for curve in curves])
    groups = runs.groupby(["alpha", "beta"], sort=False).score  # without Stable-Baselines3's, which have none
    return [scores.to_numpy() for _, scores in groups if len(scores) > 1]


def residuals(groups: list[np.ndarray]) -> np.ndarray:
    """Scores less their group's mean, spread as wide as what they are a sample of."""
    return np.concatenate([(x - x.mean()) * math.sqrt(len(x) / (len(x) - 1)) for x in groups])


def seen_table(seeds: Iterable[int], envs: list[str], steps: int, ppo: bool, look: int = 1) -> pd.DataFrame:
    """What so many seeds show in four of five cases, in standard deviations and in units of the kept runs."""
    rows = []
    kept = {env: groups for env in envs if (groups := kept_scores(env, steps, ppo))}
    for n in seeds:
        in_all, alone = (least_difference(n, len(envs), one, look) for one in (False, True))
        sizes = [(in_all * residuals(groups).std(), abs(np.concatenate(groups).mean())) for groups in kept.values()]
        percent = [f"{x:.3g} ({100 * x / mean:.0f} %)" for x, mean in sizes]
        rows.append([n, f"{in_all:.1f}", *percent, f"{alone:.1f}"])
    names = ["Seeds", "difference in all", *(f"on {env}" for env in kept), "or in one alone"]
    frame = pd.DataFrame(rows, columns=names).replace("inf", "never seen")
    return frame if len(envs) > 1 else frame.drop(columns=names[-1]).rename(columns={names[1]: "difference"})


def bands_apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether bands of one standard error lie apart in any environment, which many take for a difference."""
    gap, errors = abs(x.mean(-1) - y.mean(-1)), [z.std(-1, ddof=1) / math.sqrt(z.shape[-1]) for z in (x, y)]
    return (gap > sum(errors)).any(-1)


def calibrate(count: int) -> pd.DataFrame:
    """What the rule says of so many comparisons a row."""
    rng = np.random.default_rng(0)

    def draw(pools: list[np.ndarray], n: int) -> np.ndarray:
        """Seeds resampled from residuals, in standard deviations, with a little noise against ties."""
        x = np.stack([rng.choice(pool / pool.std(), (count, n)) for pool in pools], 1)
        return (x + 0.1 * rng.standard_normal(x.shape)) / math.sqrt(1.01)

    def halves(pools: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ten and ten kept seeds, none twice."""
        x = np.stack([rng.permuted(np.tile(pool / pool.std(), (count, 1)), axis=1)[:, :20] for pool in pools], 1)
        return x[..., :10], x[..., 10:]

    def normal(n: int) -> np.ndarray:
        return rng.standard_normal((count, 4, n))

    def modes(share: float) -> np.ndarray:
        """Two modes five standard deviations apart, a share of the seeds in the upper one."""
        return normal(10) + 5 * (rng.random((count, 4, 10)) < share)

    kept = [residuals(kept_scores(env, 300_000)) for env in ENVS]
    most = [residuals(kept_scores(env, 300_000)) for env in TWENTY_SEEDS]
    bimodal = [residuals(kept_scores(env, None, ppo)) for env in (ENVS[0], ENVS[2]) for ppo in (True, False)]
    one = np.array([1, 0, 0, 0])[:, None]
    rows = [(f"one algorithm, {n} seeds", draw(kept, n), draw(kept, n)) for n in (4, 5, 10, 20)]
    rows += [
        ("one algorithm, 3 seeds in one environment", draw(kept[:1], 3), draw(kept[:1], 3)),
        ("one algorithm, ten kept seeds against ten others", *halves(most)),
        ("one algorithm, final evaluations with two modes", draw(bimodal, 10), draw(bimodal, 10)),
        ("one algorithm, half of the seeds in an upper mode", modes(0.5), modes(0.5)),
        ("one algorithm, a fifth of the seeds in an upper mode", modes(0.2), modes(0.2)),
        ("the same mean, twice the spread", draw(kept, 10), 2 * draw(kept, 10)),
        ("the same mean, twice the spread, 10 and 6 seeds", draw(kept, 10), 2 * draw(kept, 6)),
    ]
    for n in (4, 5, 10, 20, 30):
        d = least_difference(n, 4)
        rows.append((f"{d:.2f} better in all, {n} seeds, normal", normal(n) + d, normal(n)))
        if n == 10:
            rows.append((f"{d:.2f} better in all, {n} seeds", draw(kept, n) + d, draw(kept, n)))
    for n in (10, 20, 30):
        d = least_difference(n, 4, alone=True)
        rows.append((f"{d:.2f} better in one alone, {n} seeds, normal", normal(n) + d * one, normal(n)))
    rows.append(("1.5 better in one, 1.5 worse in another, normal", normal(10) + 1.5 * (one - one[::-1]), normal(10)))
    table = []
    for title, x, y in rows:
        said = words(x, y)
        shares = [said != "Not shown", said == "Better", said == "Worse", said == "Mixed", bands_apart(x, y)]
        table.append([title, *(round(100 * share.mean(), 1) for share in shares)])
    columns = ["In four environments", "says something, %", "better", "worse", "mixed", "bands apart in any"]
    return pd.DataFrame(table, columns=columns)


def look_again(rng: np.random.Generator, count: int) -> pd.DataFrame:
    """How often the rule says something of one algorithm when seeds are added after looks at the answer."""
    table = []
    for seeds in ((10,), (10, 20), (10, 15, 20), (5, 10, 15, 20, 25, 30)):
        x, y = rng.standard_normal((2, count, 4, max(seeds)))
        counted = [words(x[..., :n], y[..., :n], look) != "Not shown" for look, n in enumerate(seeds, 1)]
        uncounted = [words(x[..., :n], y[..., :n]) != "Not shown" for n in seeds]
        shares = [100 * np.any(said, 0).mean() for said in (uncounted, counted)]
        table.append([", ".join(map(str, seeds)), *np.round(shares, 1)])
    return pd.DataFrame(table, columns=["Looks at so many seeds", "looks not counted, %", "counted, %"])


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(markdown(calibrate(number)), markdown(look_again(np.random.default_rng(0), number)), sep="\n\n", end="\n\n")
    print(markdown(seen_table((4, 5, 10, 20, 30), list(ENVS), 300_000, ppo=True)))
