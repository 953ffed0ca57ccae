"""Does PPO of sppo_rlhf_imdb.py learn as TRL's does?

Yes: on the small policy, 5 seeds each, no difference exceeds 1.1 joint standard errors. Written down in
docs/language-models.md, "Beside TRL". Runs of same_as_trl.sh into a figure and a table:

    python benchmark/peers/same_as_trl.py runs/benchmark --document docs/language-models.md

The figure has the mean score of the rollouts against tokens sampled (a response that ended early counts in full) and
against the KL estimate of the same rollouts, both averaged over every tenth of the run. Errors are over seeds.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers.same_as_sb3 import write
from runs import series
from stats import markdown, mean_text, welch_of
from sweeps import find

SIDES = {"trl_baseline": "TRL", "sppo_rlhf_imdb": "ours"}
TASK = "policy reward_model dataset num_updates num_trajectories response_length learning_rate".split()
METRICS = {"after": "Score after", "rollouts": "Rollouts' score", "kl": "KL", "perplexity": "Perplexity"}
MARKER = "same as TRL"
PARTS = 10  # of a run, for the figure


def load(folders: tuple[Path, ...]) -> pd.DataFrame:
    """A row per finished run: side, seed, metrics, and curves (3, PARTS) of tokens, score and KL of the rollouts.

    Raises ValueError where they are not of one sweep.
    """
    rows, tasks = [], set()
    for path in find(list(folders), "result.json"):
        result = json.loads(path.read_text())
        if side := SIDES.get(result["script"]):
            args = result["args"]
            tasks.add(tuple(args[name] for name in TASK))
            scores, kl = (series(str(path.parent), f"objective/{tag}") for tag in ("scores", "kl"))
            tokens = scores.index.to_numpy() * args["num_trajectories"] * args["response_length"]
            curves = [[part.mean() for part in np.array_split(x, PARTS)] for x in (tokens, scores.to_numpy(), kl)]
            row = {"side": side, "seed": args["seed"], "before": result["before"]["eval_score"], "curves": curves}
            row |= {"after": result["eval_score"], "perplexity": result["eval_perplexity"]}
            rows.append(row | {"rollouts": curves[1][-1], "kl": curves[2][-1]})
    if len(tasks) > 1:
        raise ValueError(f"there are runs of {len(tasks)} tasks: give the folder of one sweep")
    frame = pd.DataFrame(rows, columns=["side", "seed", "before", "curves", *METRICS])
    return frame.drop_duplicates(["side", "seed"], keep="last")


def plot(found: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for side, runs in found.groupby("side"):
        curves = np.array(runs.curves.tolist())
        (tokens, scores, kl), count = curves.mean(0), len(runs)
        se = curves[:, 1].std(0, ddof=1) / math.sqrt(count) if count > 1 else None
        left.errorbar(tokens / 1000, scores, se, label=f"{side}, {count} seeds")
        right.errorbar(kl, scores, se, marker=".")
    left.set(xlabel="thousand tokens", ylabel="score of the rollouts")
    right.set(xlabel="KL estimate, nats per response")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def section(found: pd.DataFrame, out: Path, base: Path) -> str:
    """Writes the figure into out; the text names it as seen from the folder base."""
    plot(found, out / "same_as_trl.png")
    rows, sides = [], [found[found.side == side] for side in SIDES.values()]
    for name, runs in zip(SIDES.values(), sides):
        texts = [mean_text(runs[metric]) for metric in ("before", *METRICS)]
        rows.append([name, *texts, str(len(runs))])
    differences = [welch_of(sides[1][metric], sides[0][metric])[0] for metric in METRICS]
    rows.append(["difference / joint SE", "", *("-" if math.isnan(t) else f"{t:+.2f}" for t in differences), ""])
    table = markdown(pd.DataFrame(rows, columns=["", "Score before", *METRICS.values(), "n"]))
    picture = os.path.relpath(out / "same_as_trl.png", base)
    return f"![Score against tokens and against KL]({picture})\n\n{table}\n"


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/benchmark"),)  # folders with runs of same_as_trl.sh
    out: Path = Path("docs")  # where the figure goes
    document: Path | None = None  # write between the marker lines of this Markdown file instead of printing


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        found = load(args.folders)
        if {*found.side} != {*SIDES.values()}:
            raise ValueError("no finished runs of both sides; start benchmark/peers/same_as_trl.sh")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(partial(section, found), args.out, args.document, MARKER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
