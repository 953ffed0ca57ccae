"""Result files into Markdown and figures: our scores beside the paper's cells.

    python benchmark/report.py runs/                          # writes report/report.md and PNGs beside it
    python benchmark/report.py runs/ more-runs/ --out report/

Reads every result.json below the folders and the curves.csv beside it; models, environments and the machine that made
them are not needed. A score is the mean of the 10 evaluation episodes of one seed, of a language run the mean reward of
its evaluation samples; means and standard errors are over seeds. A run is compared with a cell of the paper only if its
settings, its models and its length are those of the paper (the defaults of the scripts with --target-coef 0.1, and
Tables 5 to 7); all others have tables of their own. Win rates are those of benchmark/judge.py.
"""

import ast
import csv
import io
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from PIL import Image
from scipy import stats

PAPER_NUMBERS = Path(__file__).with_name("paper_numbers.csv")
ROOT = Path(__file__).resolve().parent.parent
TABLES = (11, 8, 12, 13, 9, 10)  # 1 and 2 are parts of 11 and 13; 4 has a section of its own
PARTS = {1: 11, 2: 13}
LANGUAGE_TABLES = (3, 14)
BASELINES = {"SPPO": "PPO", "SA2C": "A2C", "DSPPO": "DPPO", "DSA2C": "DA2C"}  # the paper counts wins over these
PRINTED_WINS = {(8, "none"): 12, (8, "BSC(0.1)"): 15, (11, "none"): 16, (11, "BSC(0.1)"): 19}
FAILURE = 1000  # percent; an improvement above says that the baseline failed, not how good the other one is
COLORS = {("Gaussian", "none"): "black", ("Gaussian", "noise"): "tab:purple"}  # the other four are Figure 3's
COLORS |= {("baseline", "none"): "tab:blue", ("symmetric", "none"): "tab:orange"}
COLORS |= {("baseline", "noise"): "tab:green", ("symmetric", "noise"): "tab:red"}
UNNORMALIZED = "PPO (without A normalization)"  # a row of Table 14; the other one is the PPO of Table 3
COLORS |= {(UNNORMALIZED, "none"): "tab:gray"}

PPO_TIMESTEPS = {  # Table 6, and the authors' files where it is silent (docs/paper-notes.md); A2C: 2e6 everywhere
    "Ant-v4": 2_000_000,
    "BipedalWalker-v3": 1_000_000,
    "HalfCheetah-v4": 2_000_000,
    "Hopper-v4": 2_000_000,
    "HumanoidStandup-v4": 10_000_000,
    "InvertedDoublePendulum-v4": 1_000_000,
    "LunarLanderContinuous-v3": 2_000_000,
    "Swimmer-v4": 2_000_000,
    "Walker2d-v4": 5_000_000,
}
ATARI_TIMESTEPS = 10_000_000
AUTHORS_ATARI_TIMESTEPS = 5_000_000
# Tables 5 and 6: beta of (algorithm, noise), and the environments that have another one. alpha is 0.5 everywhere.
BETAS = {
    ("SPPO", "none"): (1.0, {}),
    ("SPPO", "BSC(0.1)"): (10.0, {}),
    ("SA2C", "none"): (5.0, {}),
    ("SA2C", "BSC(0.1)"): (
        5.0,
        {1.0: "Alien Assault Gravitar MsPacman Qbert StarGunner TimePilot UpNDown VideoPinball"},
    ),
    ("DSPPO", "none"): (20.0, {}),
    ("DSPPO", "N(0, 0.05^2)"): (25.0, {20.0: "Ant LunarLanderContinuous", 50.0: "Hopper Swimmer"}),
    ("DSA2C", "none"): (5.0, {0.2: "Ant Hopper Swimmer Walker2d", 0.5: "BipedalWalker HumanoidStandup"}),
    ("DSA2C", "N(0, 0.05^2)"): (10.0, {0.2: "Ant", 5.0: "LunarLanderContinuous"}),
}
LANGUAGE = {"sppo_rlhf_imdb": ("IMDB", 60, 0.4), "sppo_rlhf_tldr": ("TL;DR", 100, 0.2)}  # Table 7: updates, SPPO's beta
TARGET_COEF = 0.1  # of the language runs behind the paper's numbers (docs/paper-notes.md)
MODELS = ("policy", "dataset", "reward_model")
SFT_UPDATES = 10  # the SFT row of TL;DR is the policy after these (Section 5.3)
JUDGE = ("gpt-4-turbo-2024-04-09", 100)  # the paper's, and the samples that it is taken to have judged
METRICS = {"rm_score": "score", "perplexity": "perplexity", "win_rate": "win rate (%)"}
SCRIPTS = ("sppo_continuous_discretized", "sa2c_continuous_discretized", "sppo_atari", "sa2c_atari")
SET_PER_CELL = (
    "env_id",
    "total_timesteps",
    "num_updates",
    "seed",
    "num_seeds",
    "alpha",
    "beta",
    "reward_noise_std",
    "reward_flip_prob",
    "micro_batch_size",  # this and the next: how a run is computed, not what
    "rollout_batch_size",
)


@dataclass(frozen=True)
class Cell:
    """One number of the paper; it prints the mean and standard error as the paper does. Table 4 has no errors."""

    printed_mean: str
    printed_se: str

    @property
    def mean(self) -> float:
        return float(self.printed_mean)

    @property
    def se(self) -> float:
        return float(self.printed_se) if self.printed_se else math.nan

    def __str__(self) -> str:
        return f"{self.printed_mean} ± {self.printed_se}" if self.printed_se else self.printed_mean


@dataclass(frozen=True)
class Group:
    """What runs must share to be averaged: they differ in the seed only."""

    environment: str
    algorithm: str  # as in the paper's header: PPO, SPPO, A2C, SA2C, DPPO, DSPPO, DA2C, DSA2C; or UNNORMALIZED
    noise: str  # "none", "BSC(0.1)", "N(0, 0.05^2)"
    timesteps: int  # the paper's number where it is that, rounded up to whole rollouts
    paper_timesteps: int | None  # None: no such cell in the paper
    differences: tuple[tuple[str, object], ...]  # settings that are not the paper's for this cell

    @property
    def kind(self) -> str:
        if self.differences or self.paper_timesteps is None:
            return "other"
        return "shorter" if self.timesteps < self.paper_timesteps else "paper"

    @property
    def family(self) -> str:
        domain = "atari" if self.environment.endswith("NoFrameskip-v4") else "continuous"
        return f"{domain}_{'a2c' if 'A2C' in self.algorithm else 'ppo'}"

    @property
    def columns(self) -> list[str]:
        return [short_name(self.environment), self.algorithm, self.noise]

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.environment, self.algorithm, self.noise

    @property
    def unit(self) -> str:
        return "steps"

    def difference_text(self) -> str:
        texts = [f"{name} {value:{'g' if type(value) is float else ''}}" for name, value in self.differences]
        return ", ".join((["not in the paper"] if self.paper_timesteps is None else []) + texts)


@dataclass(frozen=True)
class LanguageGroup(Group):
    """Language runs: timesteps are updates, and the environment is the task or, where not the paper's, the models."""

    script: str
    models: tuple[str, ...]  # policy, data set, reward model

    @property
    def family(self) -> str:
        return self.script.removeprefix("sppo_")

    @property
    def task(self) -> str:
        return LANGUAGE[self.script][0]

    @property
    def unit(self) -> str:
        return "updates"

    def difference_text(self) -> str:
        others = tuple(difference for difference in self.differences if difference[0] not in MODELS)
        return Group.difference_text(replace(self, differences=others))


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


def short_name(environment: str) -> str:
    """Alien for AlienNoFrameskip-v4; the others keep their ids."""
    return environment.removesuffix("NoFrameskip-v4")


def read_paper() -> dict[int, dict[tuple[str, str, str], Cell]]:
    """{table: {(environment, algorithm, noise): cell}}; language tables have the metric in place of the noise."""
    tables = defaultdict(dict)
    with PAPER_NUMBERS.open(newline="") as file:
        for row in csv.DictReader(file):
            table = int(row["table"])
            last = row["metric"] if table in LANGUAGE_TABLES else row["noise"]
            tables[table][row["environment"], row["algorithm"], last] = Cell(row["mean"], row["standard_error"])
    return dict(tables)


@cache
def script_settings(script: str) -> dict[str, object]:
    """Defaults of a script's flags up to run_dir and eval_samples, the paper's settings; read, not imported."""
    body = ast.parse((ROOT / f"{script}.py").read_text()).body
    fields = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    nodes = iter([node for node in fields if isinstance(node, ast.AnnAssign)])
    settings = list(itertools.takewhile(lambda node: node.target.id != "run_dir", nodes))
    settings += [node for node in nodes if node.target.id == "eval_samples"]
    return {n.target.id: ast.literal_eval(n.value) for n in settings if n.target.id not in SET_PER_CELL}


def paper_settings(script: str, environment: str, algorithm: str, noise: str) -> dict[str, object]:
    """What a run must have to be the paper's, for one cell; beta is None where Tables 5 and 6 have none."""
    own = {}
    if script == "sb3_baseline":
        own = {} if algorithm.startswith("D") else {"num_bins": None}
        script = {"PPO": "sppo", "A2C": "sa2c"}[algorithm.removeprefix("D")] + "_continuous_discretized"
    settings = script_settings(script) | own
    if algorithm in BASELINES:
        beta, exceptions = BETAS.get((algorithm, noise), (None, {}))
        name = short_name(environment).partition("-")[0]
        beta = next((value for value, names in exceptions.items() if name in names.split()), beta)
        return {"alpha": 0.5, "beta": beta} | settings
    del settings["Z"]  # it plays no role without the reverse loss
    return settings


def identify(result: dict, paper: dict) -> Group:
    """The group of a run, from its script and arguments; raises ValueError for what is no run of a known script."""
    script, args = result["script"], result["args"]
    if script in LANGUAGE:
        return identify_language(result)
    environment = result["env_id"]
    if script == "sb3_baseline":
        algorithm = "D" * bool(args.get("num_bins")) + args["algo"].upper()
    elif script in SCRIPTS:
        prefix = "D" if script.endswith("_discretized") else ""
        symmetric = "SPPO" if script.startswith("sppo") else "SA2C"
        plain = args["alpha"] == 1 and args["beta"] == 0
        algorithm = prefix + (BASELINES[symmetric] if plain else symmetric)
    else:
        raise ValueError(f"no comparison for the script {script}")
    std, flip = args.get("reward_noise_std", 0), args.get("reward_flip_prob", 0)
    noise = f"N(0, {std:g}^2)" if std else f"BSC({flip:g})" if flip else "none"

    timesteps, paper_timesteps = int(result["total_timesteps"]), None
    if any((environment, algorithm, noise) in paper[table] for table in TABLES):
        atari = environment.endswith("NoFrameskip-v4")
        continuous = 2_000_000 if "A2C" in algorithm else PPO_TIMESTEPS.get(environment)
        paper_timesteps = ATARI_TIMESTEPS if atari else continuous
    expected = paper_settings(script, environment, algorithm, noise)
    differences = [(name, args[name]) for name, value in expected.items() if name in args and args[name] != value]
    if algorithm.startswith("D") and script == "sb3_baseline":  # a check on our scripts, not their result
        differences.append(("script", script))
    if args.get("policy_coef", 1) != 1:
        differences.append(("policy_coef", args["policy_coef"]))
    if paper_timesteps and paper_timesteps <= timesteps <= 1.01 * paper_timesteps:
        timesteps = paper_timesteps  # totals are rounded up to whole rollouts
    elif paper_timesteps and timesteps > paper_timesteps:
        differences.append(("total_timesteps", timesteps))
    return Group(environment, algorithm, noise, timesteps, paper_timesteps, tuple(differences))


def identify_language(result: dict) -> LanguageGroup:
    script, args = result["script"], result["args"]
    task, paper_updates, beta = LANGUAGE[script]
    expected = script_settings(script) | {"alpha": 0.5, "beta": beta, "target_coef": TARGET_COEF}
    algorithm = "SPPO"
    if args["alpha"] == 1 and args["beta"] == 0:
        algorithm = "PPO" if args.get("norm_adv", True) else UNNORMALIZED
        for name in ("alpha", "beta", "Z", "norm_adv"):
            del expected[name]
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    differences = [(name, args[name]) for name, value in expected.items() if name in args and args[name] != value]
    models = tuple(args.get(name, expected[name]) for name in MODELS)
    theirs = all(expected[name] == model for name, model in zip(MODELS, models))
    updates = int(result["num_updates"])
    if updates > paper_updates:
        differences.append(("num_updates", updates))
    environment = task if theirs else ", ".join(Path(model).name for model in models)
    return LanguageGroup(environment, algorithm, "none", updates, paper_updates, tuple(differences), script, models)


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


def load(folders: list[Path], paper: dict) -> Results:
    results = Results()
    paths = sorted({path for folder in folders for path in folder.rglob("result.json")})
    for path in paths:
        try:
            result = json.loads(path.read_text())
            group = identify(result, paper)
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

    for path in sorted({path for folder in folders for path in folder.rglob("args.json")}):
        if not (path.parent / "result.json").exists():
            steps, _ = read_curve(path.parent, "global_step")
            unit = "updates" if len(read_curve(path.parent, "objective/kl")[0]) else "steps"
            so_far = f"{steps[-1] if len(steps) else 0:,.0f} {unit} so far"
            results.left_out.append((path.parent, f"not finished, {so_far}"))
    return results


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
                    points.append((float(row["global_step"]), float(row[tag])))
                except (KeyError, TypeError, ValueError):
                    continue  # a tag that is not logged in every row, or a line cut short by a crash
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    points = np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 2)
    return points[:, 0], points[:, 1]


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


def bootstrap_interval(samples: list[np.ndarray]) -> tuple[float, float] | None:
    """95 % interval of the interquartile mean, seeds resampled within each environment; None if one has one seed."""
    if min(len(sample) for sample in samples) < 2:
        return None
    interval = stats.bootstrap(
        samples, interquartile_mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return interval.low, interval.high


def format_number(value: float, like: float | None = None) -> str:
    """No decimals from 1000 up, one from 10 up, two from 1 up, else three, by the size of like."""
    size = abs(value if like is None else like)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def format_mean(values: np.ndarray) -> str:
    mean, se = values.mean(), standard_error(values)
    return format_number(mean) + (f" ± {format_number(se, like=mean)}" if math.isfinite(se) else "")


def format_difference(difference: float) -> str:
    if math.isnan(difference):
        return "-"
    return f"{difference:+.2f}, {'exceeds' if abs(difference) > 1 else 'within'}"


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


def markdown_table(header: list[str], rows: list[list[str]], right: str = "") -> str:
    """Padded, so that it reads well as plain text too; right: the header's names that are aligned to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    aligned = [name in right.split("|") for name in header]

    def line(row: list[str]) -> str:
        texts = [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(row, widths, aligned)]
        return f"| {' | '.join(texts)} |"

    rule = [("-" * (width - 1) + ":") if r else "-" * width for width, r in zip(widths, aligned)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def sort_key(group: Group) -> tuple:
    order = (UNNORMALIZED, "PPO", "A2C", "DPPO", "DA2C", "SPPO", "SA2C", "DSPPO", "DSA2C")
    return group.environment, group.noise != "none", order.index(group.algorithm), group.timesteps, str(group)


def table_title(table: int, cells: dict) -> str:
    algorithms = list(dict.fromkeys(algorithm for _, algorithm, _ in cells))
    noises = list(dict.fromkeys(noise for *_, noise in cells))
    noise = "without noise" if noises == ["none"] else f"with noise {noises[0]}" if len(noises) == 1 else ""
    domain = "Atari" if table in (8, 11) else "MuJoCo and Box2D"
    return ", ".join(filter(None, [f"Table {table}: {', '.join(algorithms)}", domain, noise]))


def overview_section(paper: dict, results: Results, shorter: set, table_4_run: bool) -> str:
    ours = results.paper_cells()
    rows = []
    for table in TABLES:
        for noise in dict.fromkeys(noise for *_, noise in paper[table]):
            cells = {key: cell for key, cell in paper[table].items() if key[2] == noise}
            values = [(ours[key][1].values, cell) for key, cell in cells.items() if key in ours]
            differences = [joint_difference(v.mean(), standard_error(v), cell) for v, cell in values]
            algorithms = ", ".join(dict.fromkeys(algorithm for _, algorithm, _ in cells))
            counts = [f"{len(values)} of {len(cells)}", str(len(shorter & cells.keys() - ours.keys()))]
            rows.append([str(table), algorithms, noise, *counts, str(sum(abs(d) > 1 for d in differences))])
    full, short = (language_cells(results, kind) for kind in ("paper", "shorter"))
    for table in LANGUAGE_TABLES:
        cells = paper[table]
        values = [(full[key], cell) for key, cell in cells.items() if key in full]
        differences = [joint_difference(v.mean(), standard_error(v), cell) for v, cell in values]
        counts = [f"{len(values)} of {len(cells)}", str(len(short.keys() & cells.keys() - full.keys()))]
        algorithms = ", ".join(dict.fromkeys(algorithm for _, algorithm, _ in cells))
        rows.append([str(table), algorithms, "none", *counts, str(sum(abs(d) > 1 for d in differences))])
    header = ["Table", "Algorithms", "Noise", "Cells run", "Shorter only", "Beyond the joint SE"]
    table = markdown_table(header, rows, right="Table|Cells run|Shorter only|Beyond the joint SE")
    parts = "; ".join(f"Table {part} is a part of Table {whole}" for part, whole in PARTS.items())
    table_4 = "" if table_4_run else " No cell of Table 4 was run."
    return f"{table}\n\n{parts}.{table_4}\n"


def table_section(table: int, cells: dict, ours: dict, shorter: set) -> str:
    """One table of the paper as far as it was run, and what follows from its cells."""
    names = 2 if len({noise for *_, noise in cells}) == 1 else 3  # the title has the noise
    rows = []
    for key, cell in cells.items():
        if key not in ours:
            continue
        group, runs = ours[key]
        mean, se = runs.values.mean(), standard_error(runs.values)
        difference = format_difference(joint_difference(mean, se, cell))
        texts = [format_mean(runs.values), str(len(runs.values)), f"{group.timesteps:,}", str(cell), difference]
        rows.append([*group.columns[:names], *texts])
    header = ["Environment", "Algorithm", "Noise"][:names]
    header += ["Ours", "n", "Timesteps", "Paper", "Difference / joint SE"]
    text = [f"## {table_title(table, cells)}", "", markdown_table(header, rows, right="Ours|n|Timesteps|Paper"), ""]
    for noise in dict.fromkeys(noise for *_, noise in cells):
        text += noise_summary(table, cells, ours, noise)

    missing = defaultdict(list)
    for environment, algorithm, noise in cells.keys() - ours.keys():
        what = "Shorter runs only" if (environment, algorithm, noise) in shorter else "Not run"
        missing[what, algorithm if names == 2 else f"{algorithm}, noise {noise}"].append(short_name(environment))
    per_column = len(cells) // len({key[1:] for key in cells})
    for (what, column), environments in sorted(missing.items()):
        where = "everywhere" if len(environments) == per_column else ", ".join(sorted(environments))
        text.append(f"- {what}: {column}: {where}.")
    return "\n".join(text) + "\n"


def noise_summary(table: int, cells: dict, ours: dict, noise: str) -> list[str]:
    """Wins, improvement and interquartile means of one table and noise, ours beside the paper's, as bullets."""
    algorithms = list(dict.fromkeys(algorithm for _, algorithm, _ in cells))
    symmetric = algorithms[-1]
    baseline = BASELINES[symmetric]
    environments = [e for e in dict.fromkeys(e for e, *_ in cells) if (e, symmetric, noise) in cells]
    paper_pairs = {e: (cells[e, baseline, noise].mean, cells[e, symmetric, noise].mean) for e in environments}
    both = [e for e in environments if (e, baseline, noise) in ours and (e, symmetric, noise) in ours]
    prefix = "" if noise == "none" or table not in (8, 11) else f"Noise {noise}: "
    text = []
    if both:
        our_pairs = [tuple(ours[e, a, noise][1].values.mean() for a in (baseline, symmetric)) for e in both]
        same_pairs = [paper_pairs[e] for e in both]
        all_pairs = list(paper_pairs.values())
        recomputed, printed = count_wins(all_pairs), PRINTED_WINS.get((table, noise))
        misprint = f" (the paper prints {printed})" if printed not in (None, recomputed) else ""
        wins, improvement = count_wins(same_pairs), format_improvement(same_pairs)
        these, everywhere = f" in {wins} of these", f" {improvement} in these environments"
        if len(both) < len(environments):
            these, everywhere = f"{these} and in", f"{everywhere},"
        else:
            these, everywhere = " in", ""
        text += [
            f"- {prefix}{symmetric} has the higher mean than {baseline} in {count_wins(our_pairs)} of {len(both)} "
            f"environments; in the paper's cells{these} {recomputed} of all {len(all_pairs)}{misprint}.",
            f"- {prefix}Average improvement of {symmetric} over {baseline}: {format_improvement(our_pairs)}; "
            f"the paper's cells:{everywhere} {format_improvement(all_pairs)} in all {len(all_pairs)}.",
        ]
    run = [a for a in algorithms if any((e, a, noise) in ours for e in environments)]
    common = [e for e in environments if all((e, a, noise) in ours for a in run)]
    if run and common:
        parts = []
        for algorithm in run:
            samples = [ours[e, algorithm, noise][1].values / cells[e, baseline, noise].mean for e in common]
            interval = bootstrap_interval(samples)
            bounds = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "(one seed: no interval)"
            parts.append(f"{algorithm} {interquartile_mean(*samples):.3f} {bounds}")
        text.append(
            f"- {prefix}Interquartile mean of score / the paper's {baseline} cell, with 95 % stratified-bootstrap "
            f"interval, over {len(common)} environment{'s' * (len(common) > 1)}: {', '.join(parts)}."
        )
    return text


def table_4_section(paper: dict, results: Results) -> str | None:
    """Improvement of SPPO over PPO for each beta, and what Table 11's cells say about the paper's rule."""
    ours = defaultdict(dict)  # (beta or None for PPO, noise): {environment: mean}
    for group, runs in results.groups.items():
        differences = dict(group.differences)
        if group.family != "atari_ppo" or not group.paper_timesteps or group.timesteps < group.paper_timesteps:
            continue
        if group.algorithm == "PPO" and not differences:
            ours[None, group.noise][group.environment] = runs.values.mean()
        elif group.algorithm == "SPPO" and differences.keys() <= {"beta"}:
            beta = differences.get("beta", BETAS["SPPO", group.noise][0])
            ours[beta, group.noise][group.environment] = runs.values.mean()
    rows = []
    for (_, algorithm, noise), cell in paper[4].items():
        beta = float(algorithm.removeprefix("SPPO (beta ").removesuffix(")"))
        both = sorted(ours[None, noise].keys() & ours[beta, noise].keys())
        pairs = [(ours[None, noise][e], ours[beta, noise][e]) for e in both]
        text = format_improvement(pairs) if pairs else "not run"
        rows.append([f"{beta:g}", noise, text, f"{len(both)} of 22", f"{cell} %"])
    if not any(ours.values()):
        return None
    rule = []
    for noise, beta in (("none", 1.0), ("BSC(0.1)", 10.0)):
        environments = [e for e, a, n in paper[11] if (a, n) == ("PPO", noise)]
        pairs = [(paper[11][e, "PPO", noise].mean, paper[11][e, "SPPO", noise].mean) for e in environments]
        printed = paper[4]["22 Atari games", f"SPPO (beta {beta})", noise]
        rule.append(f"{format_improvement(pairs)} for beta {beta:g} (noise: {noise}) where Table 4 prints {printed} %")
    header = ["beta", "Noise", "Ours", "Games", "Paper"]
    return "\n".join(
        [
            "## Table 4: improvement of SPPO over PPO, alpha 0.5",
            "",
            markdown_table(header, rows, right="beta|Games|Paper"),
            "",
            "- Table 4's own rule (very large improvements left out of the average) does not reproduce from Table 11's "
            f"cells. They give {'; '.join(rule)}.",
            "",
        ]
    )


def shorter_section(paper: dict, groups: dict[Group, Runs]) -> str:
    cells = {key: cell for table in TABLES for key, cell in paper[table].items()}
    rows = []
    for group in sorted(groups, key=sort_key):
        values = groups[group].values
        steps = f"{group.timesteps:,} of {group.paper_timesteps:,}"
        rows.append([*group.columns, steps, format_mean(values), str(len(values)), str(cells[group.cell])])
    header = ["Environment", "Algorithm", "Noise", "Timesteps", "Ours, shorter", "n", "Paper, full length"]
    text = ["## Shorter than the paper", "", "The paper's settings, but not its length: no comparison.", ""]
    text += [markdown_table(header, rows, right="Timesteps|Ours, shorter|n|Paper, full length"), ""]
    authors_length = (AUTHORS_ATARI_TIMESTEPS, 1.01 * AUTHORS_ATARI_TIMESTEPS)
    if any("atari" in g.family and authors_length[0] <= g.timesteps <= authors_length[1] for g in groups):
        text += [
            "5e6 steps are the length in the authors' files for Atari; the paper follows RL-Zoo, which has 1e7.",
            "",
        ]
    return "\n".join(text)


def other_section(groups: dict[Group, Runs]) -> str:
    rows = []
    for group in sorted(groups, key=sort_key):
        values = groups[group].values
        steps = f"{group.timesteps:,}"
        if group.paper_timesteps and group.timesteps < group.paper_timesteps:
            steps += f" of {group.paper_timesteps:,}"
        rows.append([*group.columns, group.difference_text(), steps, format_mean(values), str(len(values))])
    header = ["Environment", "Algorithm", "Noise", "Not the paper's", "Timesteps", "Ours", "n"]
    table = markdown_table(header, rows, right="Timesteps|Ours|n")
    return f"## Other settings\n\nNot the paper's for these cells, so they are in no table above.\n\n{table}\n"


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


def language_table_section(table: int, cells: dict, ours: dict) -> str:
    """Table 3 or 14 as far as it was run."""
    title = {3: "language models", 14: "PPO without and with advantage normalization, language models"}[table]
    labels = {("IMDB", "SFT"): "initial policy", ("TL;DR", "SFT"): f"PPO after {SFT_UPDATES} updates"}
    keys = [key for key in ours if key[1] == "initial policy"] if table == 3 else []
    tasks = list(dict.fromkeys(task for task, _, _ in cells))
    rows = []
    for task, algorithm, metric in sorted([*keys, *cells], key=lambda key: tasks.index(key[0])):
        key = task, algorithm, metric
        if key not in ours:
            continue
        values, cell = ours[key], cells.get(key)
        difference = joint_difference(values.mean(), standard_error(values), cell) if cell else math.nan
        texts = [format_mean(values), str(len(values)), str(cell or "-"), format_difference(difference)]
        rows.append([task, labels.get((task, algorithm), algorithm), METRICS[metric], *texts])
    header = ["Task", "Algorithm", "Metric", "Ours", "n", "Paper", "Difference / joint SE"]
    text = [f"## Table {table}: {title}", "", markdown_table(header, rows, right="Ours|n|Paper"), ""]
    if table == 3:
        text += [
            f"- Beside the paper's SFT: of IMDB the initial policy; of TL;DR the policy after {SFT_UPDATES} updates "
            "(Section 5.3), which does not say whether of PPO or SPPO: here of PPO.",
            f"- Win rates stand here if {JUDGE[0]} judged {JUDGE[1]} samples against the references.",
        ]
    missing = defaultdict(list)
    for task, algorithm, metric in cells.keys() - ours.keys():
        missing[task, labels.get((task, algorithm), algorithm)].append(METRICS[metric])
    for (task, algorithm), metrics in sorted(missing.items()):
        text.append(f"- Not run: {task}, {algorithm}: {', '.join(sorted(metrics))}.")
    return "\n".join(text) + "\n"


def format_change(runs: Runs, name: str, factor: float = 1) -> str:
    """A metric before and after training."""
    both = [factor * runs.metric(prefix + name) for prefix in ("before_", "")]
    return " → ".join(format_mean(values) for values in both if len(values)) or "-"


def language_section(groups: dict[LanguageGroup, Runs]) -> str:
    """All language runs, the paper's settings or not, with what the reward model gives to other texts."""
    text = [
        "## Language runs",
        "",
        "Before → after training. Below each table, what the reward model gives to texts other than the policy's: the "
        'references, nothing at all (IMDB: the prompt alone), and the policy\'s response cut in half; "wins" is how '
        "often such a text scores above the policy's whole response (compare Figure 1 and Table 15).",
        "",
    ]
    combinations = dict.fromkeys((group.task, group.models) for group in sorted(groups, key=sort_key))
    for task, models in sorted(combinations, key=lambda combination: combination[0]):
        policy, data, reward = models
        text += [f"### {task}: policy `{policy}`, data set `{data}`, reward model `{reward}`", ""]
        rouge = ("rouge1", "rouge2", "rougeL") if task == "TL;DR" else ()
        rows, errors, judged = [], [], []
        for group in sorted(groups, key=sort_key):
            if (group.task, group.models) != (task, models):
                continue
            runs, updates = groups[group], f"{group.timesteps} of {group.paper_timesteps}"
            if group.timesteps >= group.paper_timesteps:
                updates = str(group.timesteps)
            names = [group.algorithm, group.difference_text(), updates, str(len(runs.scores))]
            changes = [format_change(runs, name) for name in ("score", "perplexity")]
            rows.append([*names, *changes, *(format_change(runs, name, 100) for name in rouge)])
            fixed = [runs.metric(f"score_{name}") for name in ("reference", "empty")]  # the same after as before
            errors.append([*names, *(format_mean(values) if len(values) else "-" for values in fixed)])
            errors[-1].append(format_change(runs, "score_truncated"))
            errors[-1] += [format_change(runs, f"{name}_wins", 100) for name in ("empty", "truncated")]
            for (against, judge, samples), by_seed in sorted(runs.judged.items()):
                against = "the references" if against == "reference" else against
                values = np.array([by_seed[seed] for seed in sorted(by_seed)])
                judged.append(
                    f"- Win rate of {', '.join(filter(None, names[:2]))}, {updates} updates, against {against}: "
                    f"{format_mean(values)} % (n {len(values)}), {samples} samples judged by {judge}."
                )
        header = ["Algorithm", "Not the paper's", "Updates", "n"]
        scores = ["Score", "Perplexity", *(f"ROUGE-{name[5:]}" for name in rouge)]
        others = ["References", "Empty", "Cut in half", "Empty wins (%)", "Cut in half wins (%)"]
        for names, table in ((scores, rows), (others, errors)):
            text += [markdown_table([*header, *names], table, right="|".join(["Updates", "n", *names])), ""]
        text += [*judged, ""] if judged else []
    return "\n".join(text)


def line_style(group: Group) -> tuple[str, str | None]:
    """Label and color of a group's line; the color is None where only the cycle can keep lines apart."""
    label = group.algorithm + (f", {group.noise}" if group.noise != "none" else "")
    if group.kind == "shorter" or (group.unit == "updates" and group.timesteps < group.paper_timesteps):
        label += f", {group.timesteps:,} {group.unit}"
    if group.kind == "other":
        return ", ".join(filter(None, [label, group.difference_text()])), None
    gaussian = group.family.startswith("continuous") and not group.algorithm.startswith("D")
    role = "symmetric" if group.algorithm in BASELINES else "Gaussian" if gaussian else "baseline"
    role = UNNORMALIZED if group.algorithm == UNNORMALIZED else role
    return label, COLORS[role, "none" if group.noise == "none" else "noise"]


def bin_means(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of a piecewise linear curve between neighbouring edges, (len(edges) - 1,)."""
    grid = np.union1d(steps, edges)
    values = np.interp(grid, steps, values)
    areas = np.append(0, np.cumsum(np.diff(grid) * (values[1:] + values[:-1]) / 2))
    return np.diff(areas[np.searchsorted(grid, edges)]) / np.diff(edges)


def plot(groups: dict[Group, Runs], tag: str, ylabel: str, scale: float, path: Path) -> bool:
    """Mean and standard error over seeds of one tag, a panel for each environment; False if nobody logged it."""
    lines = defaultdict(list)  # environment: [(group, steps, values of shape (seeds, 100))]
    for group in sorted(groups, key=sort_key):
        curves = [read_curve(folder, tag) for folder in groups[group].folders.values()]
        curves = [(steps, values) for steps, values in curves if len(steps) > 1]
        first, last = max((s[0] for s, _ in curves), default=0), min((s[-1] for s, _ in curves), default=0)
        if first < last:
            edges = np.linspace(first, last, 101)
            values = scale * np.array([bin_means(*curve, edges) for curve in curves])
            lines[group.environment].append((group, (edges[1:] + edges[:-1]) / 2, values))
    if not lines:
        return False
    columns = min(len(lines), 5 if len(lines) > 9 else 3)
    rows = math.ceil(len(lines) / columns)
    width, height = (2.6, 2.1) if columns == 5 else (3.6, 2.8) if columns > 1 else (6, 4)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    handles, cycle = {}, {}
    unit = lines[next(iter(lines))][0][0].unit
    size = 1e6 if unit == "steps" else 1
    for ax, (environment, panel) in zip(axes.flat, lines.items()):
        for group, steps, values in panel:
            label, color = line_style(group)
            color = color or cycle.setdefault(label, f"C{len(cycle) % 10}")
            mean = values.mean(0)
            (handle,) = ax.plot(steps / size, mean, color=color, linewidth=1.2)
            handles.setdefault(label, (sort_key(group)[1:], handle))
            if len(values) > 1:
                se = values.std(0, ddof=1) / math.sqrt(len(values))
                ax.fill_between(steps / size, mean - se, mean + se, color=color, alpha=0.25, linewidth=0)
        ax.set_title(short_name(environment), fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(lines) :]:
        ax.axis("off")
    for ax in [axes.flat[i] for i in range(max(0, len(lines) - columns), len(lines))]:
        ax.set_xlabel("million steps" if unit == "steps" else unit, fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel, fontsize=8)
    labels = sorted(handles, key=lambda label: handles[label][0])
    ncols = max(1, int(width * columns * 12 / (max(map(len, labels)) + 8)))  # some 12 characters an inch
    figure.set_layout_engine("constrained")
    figure.legend([handles[label][1] for label in labels], labels, loc="outside lower center", ncols=ncols, fontsize=8)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=90)
        Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    plt.close(figure)
    return True


def figures_section(results: Results, out: Path) -> str:
    titles = {"paper": "paper's settings and length", "shorter": "shorter than the paper", "other": "other settings"}
    domains = {"atari_ppo": "Atari, PPO", "atari_a2c": "Atari, A2C", "continuous_ppo": "MuJoCo and Box2D, PPO"}
    domains |= {"continuous_a2c": "MuJoCo and Box2D, A2C"}
    language = {"rlhf_imdb": "IMDB", "rlhf_tldr": "TL;DR"}
    figures = (
        ("curves", "charts/episodic_return", "training return", 1, "Learning curves", domains),
        ("curves", "objective/scores", "score of the rollouts", 1, "Learning curves", language),
        (
            "sign_flips",
            "losses/sign_flips",
            "advantage sign flips (%)",
            100,
            "Advantage sign flips (Figure 2)",
            domains,
        ),
    )
    all_groups = results.groups | results.language
    text = [
        "## Figures",
        "",
        "Mean over seeds, averaged over each hundredth of the run; the band is the standard error.",
        "",
    ]
    for name, tag, ylabel, scale, caption, families in figures:
        for kind, title in titles.items():
            for family, domain in families.items():
                groups = {g: runs for g, runs in all_groups.items() if (g.kind, g.family) == (kind, family)}
                path = out / f"{name}_{family}{'' if kind == 'paper' else f'_{kind}'}.png"
                path.unlink(missing_ok=True)
                if groups and plot(groups, tag, ylabel, scale, path):
                    text += [f"{caption}: {domain}, {title}.", "", f"![{caption}]({path.name})", ""]
    without = [f for runs in all_groups.values() for f in runs.folders.values() if not (f / "curves.csv").exists()]
    if without:
        text += [f"Without curves.csv, in no figure: {', '.join(map(str, sorted(without)))}.", ""]
    return "\n".join(text)


def write_report(folders: list[Path], results: Results, paper: dict, out: Path) -> None:
    kinds = dict.fromkeys(("paper", "shorter", "other"), 0)
    for group, runs in (results.groups | results.language).items():
        kinds[group.kind] += len(runs.scores)
    ours = results.paper_cells()
    sections = [
        "# Our results beside the paper's\n\n"
        f"{sum(kinds.values())} runs in {', '.join(f'`{folder}`' for folder in folders)}: {kinds['paper']} at the "
        f"paper's settings and length, {kinds['shorter']} shorter, {kinds['other']} at other settings, "
        f"{len(results.left_out)} left out.\n\n"
        "Ours: mean ± standard error (SE) over n seeds (the paper: 5 on Atari, 4 on the language tasks, 30 elsewhere); "
        "the score of a seed is the mean of its 10 evaluation episodes, or of its evaluation samples. Difference: ours "
        "minus the paper's, in units of the joint SE, √(SE_ours² + SE_paper²), and whether it exceeds one. By chance "
        "alone a third of the cells would.\n"
    ]
    shorter = {group.cell for group in results.of_kind("shorter")}
    table_4 = table_4_section(paper, results)
    sections.append(overview_section(paper, results, shorter, bool(table_4)))
    for table in TABLES:
        if ours.keys() & paper[table].keys():
            sections.append(table_section(table, paper[table], ours, shorter))
    if table_4:
        sections.append(table_4)
    language = language_cells(results, "paper")
    for table in LANGUAGE_TABLES:
        if language.keys() & paper[table].keys():
            sections.append(language_table_section(table, paper[table], language))
    if shorter:
        sections.append(shorter_section(paper, results.of_kind("shorter")))
    if other := results.of_kind("other"):
        sections.append(other_section(other))
    if results.language:
        sections.append(language_section(results.language))
    if results.left_out:
        alike = defaultdict(list)  # seeds side by side usually share their reason
        for path, reason in results.left_out:
            alike[path.parent, reason].append(path.name)
        lines = [f"- `{parent}`, {', '.join(names)}: {reason}" for (parent, reason), names in alike.items()]
        sections.append("\n".join(["## Left out", "", *lines, ""]))
    sections.append(figures_section(results, out))
    lines = [f"- {number} runs: commit {c}; {versions}" for (c, versions), number in results.made_by.most_common()]
    sections.append("\n".join(["## Made by", "", *lines, ""]))
    (out / "report.md").write_text("\n".join(sections), encoding="utf-8")


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with runs, searched with all their subfolders"""
    out: Path = Path("report")
    """where report.md and the figures go"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    paper = read_paper()
    for folder in args.folders:
        if not any(folder.rglob("result.json")):
            unfinished = len(list(folder.rglob("args.json")))
            hint = f", {unfinished} unfinished runs" if unfinished else "" if folder.is_dir() else ", no such folder"
            print(f"{folder}: no result.json{hint}", file=sys.stderr)
            return 2
    results = load(list(args.folders), paper)
    if not (results.groups or results.language):
        path, reason = results.left_out[0]
        print(f"no usable result.json among {len(results.left_out)}; the first, {path}: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(list(args.folders), results, paper, args.out)
    counted = sum(len(runs.scores) for runs in (results.groups | results.language).values())
    print(f"{counted} runs, {len(results.left_out)} left out: {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
