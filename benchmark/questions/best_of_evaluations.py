"""Could the paper's scores be each agent's best of many short evaluations?

On LunarLander with noise it cannot be excluded: such numbers would reach its DPPO and come near its DSPPO. As a rule
no: its cells without noise, and InvertedDoublePendulum's, lie far below. Written down in
docs/questions.md. Computed from the returns that evaluate_same_starts.py wrote:

    python benchmark/questions/best_of_evaluations.py benchmark/results/lunar-same-starts.csv

An evaluation is the mean of 10 returns drawn with replacement from an agent's. Prints for each cell (the folder of its
agents) the mean ± standard error over agents, of all their returns and of the best of 400 evaluations, which is as many
as 2e6 steps have at one every 5,000.
"""

import csv
import sys
from collections import defaultdict

import numpy as np

EPISODES, EVALUATIONS, REPEATS = 10, 400, 100  # repeats: averaged, so that the draw does not matter


def best_of_evaluations(returns: np.ndarray, rng: np.random.Generator) -> float:
    """Expected best of 400 evaluations of an agent with these returns."""
    return rng.choice(returns, (REPEATS, EVALUATIONS, EPISODES)).mean(-1).max(-1).mean()


def mean_and_se(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1) / len(scores) ** 0.5:.1f}"


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with open(sys.argv[1], newline="") as file:
            names, *rows = csv.reader(file)
        table = np.array(rows, dtype=float)
    except (OSError, ValueError) as error:
        print(f"error: {sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    rng = np.random.default_rng(0)
    means, best = defaultdict(list), defaultdict(list)
    for name, returns in zip(names[1:], table.T[1:]):
        cell = name.rpartition("/")[0]
        means[cell].append(returns.mean())
        best[cell].append(best_of_evaluations(returns, rng))
    for cell in means:
        print(f"{cell}: mean {mean_and_se(means[cell])}, best of {EVALUATIONS} {mean_and_se(best[cell])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
