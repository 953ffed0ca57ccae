"""Does PPO of sppo_rlhf_imdb.py learn as TRL's does?

Yes: on the small policy, 5 seeds each, no difference exceeds 1.1 joint standard errors. Written down in
docs/language-models.md, "Beside TRL". Runs of same_as_trl.sh into a figure and a table:

    python benchmark/peers/same_as_trl.py runs/benchmark --document docs/language-models.md

The figure has the mean score of the rollouts against tokens sampled (a response that ended early counts in full) and
against the KL estimate of the same rollouts, both averaged over every tenth of the run. Errors are over seeds.
"""

import io
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from documents import replace_section
from runs import series
from stats import markdown, mean_text, summary, welch_of
from sweeps import find

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = {"trl_baseline": "TRL", "sppo_rlhf_imdb": "ours"}
COLORS = {"TRL": "tab:blue", "ours": "tab:orange"}
MARKER = "same as TRL"
PARTS = 10  # of a run, for the figure


@dataclass
class Run:
    result: dict
    scores: np.ndarray  # (updates,), of the rollouts
    kl: np.ndarray
    tokens: np.ndarray  # sampled up to the end of each update

    def parts(self, values: np.ndarray) -> np.ndarray:
        return np.array([part.mean() for part in np.array_split(values, PARTS)])


def load(folder: Path) -> dict[str, list[Run]]:
    """Finished runs of either side, by seed. Raises ValueError where they are not of one sweep."""
    found, tasks = defaultdict(dict), set()
    for path in find([folder], "result.json"):
        result = json.loads(path.read_text())
        if side := SIDES.get(result["script"]):
            args = result["args"]
            scores, kl = (series(str(path.parent), f"objective/{tag}") for tag in ("scores", "kl"))
            tokens = scores.index.to_numpy() * args["num_trajectories"] * args["response_length"]
            found[side][args["seed"]] = Run(result, scores.to_numpy(), kl.to_numpy(), tokens)
            same = "policy reward_model dataset num_updates num_trajectories response_length learning_rate".split()
            tasks.add(tuple(args[name] for name in same))
    if len(tasks) > 1:
        raise ValueError(f"{folder} has runs of {len(tasks)} tasks: give the folder of one sweep")
    return {side: [runs[seed] for seed in sorted(runs)] for side, runs in found.items()}


def plot(found: dict[str, list[Run]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for side, runs in found.items():
        scores, kl, tokens = np.array([[r.parts(x) for x in (r.scores, r.kl, r.tokens)] for r in runs]).swapaxes(0, 1)
        se = [summary(column)[1] for column in scores.T]
        left.errorbar(tokens[0] / 1000, scores.mean(0), se, color=COLORS[side], label=f"{side}, {len(runs)} seeds")
        right.errorbar(kl.mean(0), scores.mean(0), se, color=COLORS[side], marker=".")
    left.set_xlabel("thousand tokens")
    right.set_xlabel("KL estimate, nats per response")
    left.set_ylabel("score of the rollouts")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=90)
        Image.open(file).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    plt.close(figure)


def section(found: dict[str, list[Run]], out: Path, base: Path) -> str:
    """Writes the figure into out; the text names it as seen from the folder base."""
    path, rows, columns = out / "same_as_trl.png", [], []
    plot(found, path)
    for side in SIDES.values():
        runs = found[side]
        values = {name: np.array([run.result[name] for run in runs]) for name in ("eval_score", "eval_perplexity")}
        values["rollouts"] = np.array([run.parts(run.scores)[-1] for run in runs])
        values["kl"] = np.array([run.parts(run.kl)[-1] for run in runs])
        columns.append(values)
        before = np.array([run.result["before"]["eval_score"] for run in runs])
        texts = [mean_text(values[name]) for name in ("eval_score", "rollouts", "kl", "eval_perplexity")]
        rows.append([side, mean_text(before), *texts, str(len(runs))])
    theirs, ours = columns
    differences = []
    for name in ("eval_score", "rollouts", "kl", "eval_perplexity"):
        t = welch_of(ours[name], theirs[name])[0]
        differences.append("-" if math.isnan(t) else f"{t:+.2f}")
    rows.append(["difference / joint SE", "", *differences, ""])
    header = ["", "Score before", "Score after", "Rollouts' score", "KL", "Perplexity", "n"]
    table = markdown(pd.DataFrame(rows, columns=header))
    return f"![Score against tokens and against KL]({os.path.relpath(path, base)})\n\n{table}\n"


@dataclass
class Args:
    folder: tyro.conf.Positional[Path] = Path("runs/benchmark")
    """folder with runs of same_as_trl.sh"""
    out: Path = Path("docs")
    """where the figure goes"""
    document: Path | None = None
    """write the table between the marker lines of this Markdown file instead of printing it"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        found = load(args.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found.keys() != set(SIDES.values()):
        print("error: no finished runs of both sides; start benchmark/peers/same_as_trl.sh", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    text = section(found, args.out, args.document.parent if args.document else Path())
    if args.document:
        args.document.write_text(replace_section(args.document.read_text("utf-8"), text, MARKER), "utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
