"""Result files, grouped by what their runs share, and the curves beside them."""

import csv
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sweeps import find

from .cells import Group, LanguageGroup, identify

SFT_UPDATES = 10  # the SFT row of TL;DR is the policy after these (Section 5.3)
JUDGE = ("gpt-4-turbo-2024-04-09", 100)  # the paper's, and the samples that it is taken to have judged


@dataclass
class Runs:
    """The runs of one group, by seed; the last two are of language runs."""

    scores: dict[int, float] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)  # and before training: before_score, ...
    judged: dict[tuple[str, str, int], dict[int, float]] = field(default_factory=dict)  # (against, judge, samples): %

    @property
    def values(self) -> np.ndarray:
        return np.array([self.scores[seed] for seed in sorted(self.scores)])

    def metric(self, name: str) -> np.ndarray:
        """Of the seeds that have it."""
        return np.array([metrics[name] for _, metrics in sorted(self.metrics.items()) if name in metrics])


@dataclass
class Results:
    """Everything found below the folders."""

    groups: dict[Group, Runs] = field(default_factory=dict)
    language: dict[LanguageGroup, Runs] = field(default_factory=dict)
    left_out: list[tuple[Path, str]] = field(default_factory=list)  # and why
    made_by: Counter = field(default_factory=Counter)  # (commit, versions) of the counted runs

    def of_kind(self, kind: str) -> dict[Group, Runs]:
        return {group: runs for group, runs in self.groups.items() if group.kind == kind}

    def paper_cells(self) -> dict[tuple[str, str, str], tuple[Group, Runs]]:
        """The groups that may stand beside a cell of the paper."""
        return {group.cell: (group, runs) for group, runs in self.of_kind("paper").items()}


def load(folders: list[Path]) -> Results:
    results = Results()
    for path in find(folders, "result.json"):
        try:
            result = json.loads(path.read_text())
            group = identify(result)
            language = isinstance(group, LanguageGroup)
            key = "eval_score" if language else "eval_mean"
            seed, score = int(result["seed"]), float(result[key])
            if not math.isfinite(score):
                raise ValueError(f"{key} is {score}")
            runs = (results.language if language else results.groups).setdefault(group, Runs())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            results.left_out.append((path.parent, f"result.json: {reason}"))
            continue
        if seed in runs.scores:
            results.left_out.append((path.parent, f"seed {seed} again, as in {runs.folders[seed]}"))
            continue
        runs.scores[seed], runs.folders[seed] = score, path.parent
        if language:
            runs.metrics[seed] = language_metrics(result)
            for key, win_rate in read_judges(path.parent):
                runs.judged.setdefault(key, {})[seed] = win_rate
        versions = ", ".join(f"{name} {number}" for name, number in (result.get("versions") or {}).items())
        commit, dash, dirty = (result.get("commit") or "unknown").partition("-")
        results.made_by[commit[:10] + dash + dirty, versions] += 1

    for folder in unfinished(folders):
        steps, _ = read_curve(folder, "global_step")
        unit = "updates" if len(read_curve(folder, "objective/kl")[0]) else "steps"
        results.left_out.append((folder, f"not finished, {steps[-1] if len(steps) else 0:,.0f} {unit} so far"))
    return results


def unfinished(folders: list[Path]) -> list[Path]:
    """Run directories without a result; of runs with several seeds, whose args.json is the parent's, the seeds'."""
    found = set()
    for path in find(folders, "args.json"):
        try:
            args = json.loads(path.read_text())["args"]
            seeds = range(args["seed"], args["seed"] + args["num_seeds"]) if args["num_seeds"] > 1 else ()
        except (OSError, ValueError, KeyError, TypeError):
            seeds = ()
        found |= {path.with_name(f"seed{seed}") for seed in seeds} or {path.parent}
    return sorted(folder for folder in found if not (folder / "result.json").exists())


def language_metrics(result: dict) -> dict[str, float]:
    """Metrics of the evaluation after training (score, perplexity, ...) and before it (before_score, ...)."""
    metrics = {}
    for prefix, values in (("", result), ("before_", result.get("before") or {})):
        for key, value in values.items():
            if key.startswith("eval_") and isinstance(value, (float, int)):
                metrics[prefix + key.removeprefix("eval_")] = value
    return metrics


def read_judges(folder: Path) -> list[tuple[tuple[str, str, int], float]]:
    """((against, judge, samples), win rate in percent) of every judge.json of a run; another run goes by its cell."""
    found = []
    for path in sorted(folder.glob("judge*.json")):
        try:
            judge = json.loads(path.read_text())
            against = Path(judge["against"])  # "reference" or a run directory
            name = against.parent.name if against.name.startswith("seed") else against.name
            found.append(((name, judge["judge_model"], int(judge["samples"])), 100 * float(judge["win_rate"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not written by judge.py
    return found


def read_curve(folder: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one tag of curves.csv, rows without a value left out; empty if there is nothing."""
    points = []
    try:
        with (folder / "curves.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    step = row.get("global_step", row.get("update"))  # of language runs
                    points.append((float(step), float(step if tag == "global_step" else row[tag])))
                except (KeyError, TypeError, ValueError):
                    continue  # a tag that is not logged in every row, or a line cut short by a crash
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    points = np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def language_cells(results: Results, kind: str) -> dict[tuple[str, str, str], np.ndarray]:
    """{(task, algorithm, metric): values over seeds} of a kind, as in Tables 3 and 14, and of the initial policies."""
    cells, initial = {}, defaultdict(dict)
    for group, runs in results.language.items():
        if group.kind == "other":
            continue
        for metric, name in (("rm_score", "score"), ("perplexity", "perplexity")):
            for seed, metrics in runs.metrics.items():  # whatever the algorithm and the length, they begin alike
                if f"before_{name}" in metrics:
                    initial[group.task, metric][seed] = metrics[f"before_{name}"]
            if group.kind == kind:
                cells[group.task, group.algorithm, metric] = runs.metric(name)
            if group.kind == kind and (group.task, group.algorithm) == ("TL;DR", "PPO"):
                curves = [read_curve(runs.folders[seed], f"eval/{name}") for seed in sorted(runs.folders)]
                cells["TL;DR", "SFT", metric] = np.concatenate(
                    [values[steps == SFT_UPDATES] for steps, values in curves]
                )
        if group.kind == kind:
            judged = runs.judged.get(("reference", *JUDGE), {})
            cells[group.task, group.algorithm, "win_rate"] = np.array([judged[seed] for seed in sorted(judged)])
            if group.algorithm == "PPO":
                cells[group.task, "PPO (with A normalization)", "rm_score"] = runs.values
    for (task, metric), by_seed in initial.items():
        values = np.array([by_seed[seed] for seed in sorted(by_seed)])
        cells[task, "SFT" if task == "IMDB" else "initial policy", metric] = values
    return {key: values for key, values in cells.items() if len(values)}
