"""Runs as one table, a row for each, and the paper's cells joined to it by family, environment, algorithm and noise.

`benchmark/results/scores.csv` is that table of the kept runs. A run stands beside a cell of the paper only if its
settings, its models and its length are those of the sweep that runs the cell.
"""

import json
import math
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from stats import summary, welch
from sweeps import NOT_COMPARED, ROOT, SWEEPS, CellError, Script, find, take_seeds
from sweeps import cells as lines_of

PAPER = ROOT / "benchmark/paper"
KEY = ["family", "environment", "algorithm", "noise"]
MODELS = ["policy", "dataset", "reward_model"]
GROUP = [*KEY, "steps", "other_settings", *MODELS]  # runs that are alike in these differ in the seed only
FAMILY = {11: "atari_ppo", 8: "atari_a2c"}  # of a table; Tables 1 and 2 are parts of 11 and 13
FAMILY |= {12: "continuous_ppo", 13: "continuous_ppo", 9: "continuous_a2c", 10: "continuous_a2c"}
PARTS = {1: 11, 2: 13}
TASKS = {"rlhf_imdb": "IMDB", "rlhf_tldr": "TL;DR"}  # of the language scripts
SYMMETRIC = {  # scripts, and what the paper calls the algorithm of each
    "sppo_continuous_discretized": "DSPPO",
    "sa2c_continuous_discretized": "DSA2C",
    "sppo_atari": "SPPO",
    "sa2c_atari": "SA2C",
    "sppo_rlhf_imdb": "SPPO",
    "sppo_rlhf_tldr": "SPPO",
}
BASELINES = {"SPPO": "PPO", "SA2C": "A2C", "DSPPO": "DPPO", "DSA2C": "DA2C"}
SAME = {"DPPO control": "DSPPO", "PPO control": "SPPO"}  # by the identity, where the weights agree
UNNORMALIZED = "PPO (without A normalization)"  # a row of Table 14; the other one is the PPO of Table 3
ORDER = [UNNORMALIZED, "PPO", "A2C", "DPPO", "DA2C", "SPPO", "SA2C", "DSPPO", "DSA2C"]  # in tables and legends
WEIGHTS = ["alpha", "beta", "Z"]
IN_KEY = {"env_id", "seed", "total_timesteps", "num_updates", "reward_noise_std", "reward_flip_prob"}
PAPER_SEEDS = {"continuous": 30, "atari": 5, "rlhf": 4}  # of a cell
RETURN, SCORES = "charts/episodic_return", "objective/scores"


def place(script: str, args: dict) -> tuple[str, str, str]:
    """Family (the sweep that has such runs), algorithm and noise of a script's arguments."""
    std, flip = args.get("reward_noise_std", 0), args.get("reward_flip_prob", 0)
    noise = f"N(0, {std:g}^2)" if std else f"BSC({flip:g})" if flip else "none"
    if script == "sb3_baseline":
        return f"continuous_{args['algo']}", args["algo"].upper(), noise
    domain = "atari" if script.endswith("_atari") else "continuous"
    family = f"{domain}_{'a2c' if script.startswith('sa2c') else 'ppo'}"
    family = script.removeprefix("sppo_") if script.startswith("sppo_rlhf") else family
    symmetric = SYMMETRIC[script]
    if args["beta"] != 0:
        return family, symmetric, noise
    if args["alpha"] != 1:
        return family, f"{BASELINES[symmetric]} control", noise
    unnormalized = symmetric == "SPPO" and not args.get("norm_adv", True)
    return family, UNNORMALIZED if unnormalized else BASELINES[symmetric], noise


def parse(line: str) -> dict:
    """A line of a sweep as a row: its key, script, number of seeds, all settings, steps."""
    name, *flags = shlex.split(line)
    script, (seeds, flags) = Script(name, ROOT), take_seeds(flags)
    settings = script.defaults | script.parse(flags)
    family, algorithm, noise = place(name, settings)
    row = {"family": family, "environment": TASKS.get(family) or settings["env_id"], "algorithm": algorithm}
    row |= {"noise": noise, "script": name, "seeds": seeds, "settings": settings}
    return row | {"steps": int(settings[script.length]), "line": " ".join(line.split())}


@cache
def planned() -> dict[tuple, dict]:
    """{key: line of a sweep}, with the controls of the identity; Table 4's other betas are runs at other settings."""
    rows = [parse(line) for sweep in SWEEPS if sweep != "beta_sensitivity" for line in lines_of(sweep, True)]
    return {tuple(row[name] for name in KEY): row for row in rows}


def setting_text(name: str, value: object) -> str:
    value = tuple(value) if isinstance(value, list) else value
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def copy_name(script: str, origin: str, args: dict) -> str:
    """A changed copy by its name and, where they are not its defaults, alpha, beta, Z and its new flags."""
    theirs = Script(origin, ROOT).defaults
    try:
        defaults = Script(script, ROOT).defaults
    except CellError:  # it is on another machine
        defaults = theirs
    own = [name for name in args if (name in WEIGHTS or name not in theirs) and name not in NOT_COMPARED]
    return ", ".join([script, *(setting_text(name, args[name]) for name in own if args[name] != defaults.get(name))])


def describe(result: dict) -> dict:
    """Where a run belongs, from its script and arguments: a row of the table without what was measured."""
    script, args = result["script"], result["args"]
    changed = script not in SYMMETRIC and script != "sb3_baseline"  # a copy: of the script with most flags in common
    origin = min(SYMMETRIC, key=lambda s: len(args.keys() ^ Script(s, ROOT).defaults.keys())) if changed else script
    family, algorithm, noise = place(origin, args)
    environment = TASKS.get(family) or result["env_id"]
    cell = planned().get((family, environment, SYMMETRIC[origin] if changed else algorithm, noise))
    algorithm = copy_name(script, origin, args) if changed else algorithm

    defaults = Script(origin, ROOT).defaults
    expected = cell["settings"] if cell else defaults | {"beta": None}
    settings = {name: args.get(name, value) for name, value in defaults.items()}  # a run may be older than a flag
    ignored = {*NOT_COMPARED, *IN_KEY, *(WEIGHTS if changed else ())}
    if not changed and args.get("beta") == 0:  # without the reverse loss
        ignored |= {"beta", "Z", *(["alpha"] if args["alpha"] == 1 else [])}
    theirs = {name: x for name, x in settings.items() if name not in ignored}
    others = {name: x for name, x in theirs.items() if x != expected[name] and (x or expected[name])}  # {} is None

    full = cell["steps"] if cell else None
    steps = int(result["num_updates"] if family in TASKS else result["total_timesteps"])
    if full and family not in TASKS and full <= steps <= 1.01 * full:
        steps = full  # totals are rounded up to whole rollouts
    kind = "other" if others or not full else "paper" if steps == full else "shorter" if steps < full else "longer"
    texts = [setting_text(name, x) for name, x in others.items() if name not in MODELS]
    row = {"script": script, "origin": origin, "family": family, "environment": environment, "algorithm": algorithm}
    row |= {"noise": noise, "kind": kind, "steps": steps, "paper_steps": full, "other_settings": ", ".join(texts)}
    row |= {name: args.get(name) for name in WEIGHTS}
    return row | {name: settings.get(name) for name in MODELS}


def measure(result: dict, folder: str, language: bool) -> dict:
    """What a run measured. Raises ValueError where its score is not finite."""
    score_is = "eval_score" if language else "eval_mean"
    score = float(result[score_is])
    if not math.isfinite(score):
        raise ValueError(f"{score_is} is {score}")
    commit, dash, dirty = (result.get("commit") or "unknown").partition("-")
    seconds, steps = result.get("wall_seconds"), result["num_updates" if language else "total_timesteps"]
    row = {"seed": int(result["seed"]), "score": score, "score_is": score_is}
    row |= {"train_return": float(f"{last_tenth(folder, SCORES if language else RETURN):.6g}")}
    row |= {"sps": result.get("sps") or (steps / seconds if seconds else None), "wall_seconds": seconds}
    row |= {"compile": bool(result["args"].get("compile")), "commit": commit[:10] + dash + dirty}
    row |= {"versions": ", ".join(f"{name} {number}" for name, number in (result.get("versions") or {}).items())}
    for prefix, values in (("", result), ("before_", result.get("before") or {})) if language else ():
        metrics = {name.removeprefix("eval_"): x for name, x in values.items() if name.startswith("eval_")}
        row |= {prefix + name: x for name, x in metrics.items() if isinstance(x, (int, float))}
    if language:
        kl = series(folder, "objective/kl")
        row["kl"] = float(f"{kl.tail(math.ceil(len(kl) / 10)).mean():.6g}") if len(kl) else None
    return row


def read_runs(folders: list[Path]) -> tuple[pd.DataFrame, list[tuple[Path, str]]]:
    """A row per finished run below the folders, and (folder, reason) of what is left out."""
    rows, left_out = [], []
    for path in find(folders, "result.json"):
        folder = str(path.parent)
        try:
            result = json.loads(path.read_text())
            row = {"folder": folder} | describe(result)
            rows.append(row | measure(result, folder, row["family"] in TASKS))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            left_out.append((path.parent, f"result.json: {reason}"))
    runs = pd.DataFrame(rows)
    if len(runs):
        first = runs.groupby([*GROUP, "seed"], dropna=False).folder.transform("first")
        again = runs.folder != first
        left_out += [
            (Path(folder), f"seed {seed} again, as in {where}")
            for folder, seed, where in zip(runs.folder[again], runs.seed[again], first[again])
        ]
        runs = runs[~again].reset_index(drop=True)
    for folder in unfinished(folders):
        steps = curve(str(folder)).index
        unit = "updates" if len(series(str(folder), "objective/kl")) else "steps"
        left_out.append((folder, f"not finished, {steps[-1] if len(steps) else 0:,.0f} {unit} so far"))
    return runs, left_out


def unfinished(folders: list[Path]) -> list[Path]:
    """Run directories without a result; the parent of several seeds, which has the args.json of all, is none."""
    begun = {path.parent for name in ("args.json", "curves.csv", "result.json") for path in find(folders, name)}
    parents = {folder.parent for folder in begun}
    return sorted(folder for folder in begun - parents if not (folder / "result.json").exists())


@cache
def curve(folder: str) -> pd.DataFrame:
    """curves.csv of a run by step, or update; what a crash cut short is nan, and what is not there empty."""
    try:
        frame = pd.read_csv(Path(folder, "curves.csv"), on_bad_lines="skip")
    except (OSError, ValueError):
        return pd.DataFrame()
    for name in frame.select_dtypes(exclude="number"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame.dropna(subset=frame.columns[0]).set_index(frame.columns[0])


def series(folder: str, tag: str) -> pd.Series:
    """One tag of curves.csv by step, rows without a finite value left out."""
    frame = curve(folder)
    values = frame[tag] if tag in frame else pd.Series(dtype=float)
    return values[np.isfinite(values)]


def bin_means(values: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Means of a piecewise linear curve between neighbouring edges, (len(edges) - 1,)."""
    grid = np.union1d(values.index, edges)
    y = np.interp(grid, values.index, values)
    areas = np.append(0, np.cumsum(np.diff(grid) * (y[1:] + y[:-1]) / 2))
    return np.diff(areas[np.searchsorted(grid, edges)]) / np.diff(edges)


def last_tenth(folder: str, tag: str, steps: float | None = None) -> float:
    """Mean of a tag over the last tenth of so many steps, or of the run's; nan where it was not logged twice."""
    values = series(folder, tag)
    if len(values) < 2:
        return math.nan
    return float(bin_means(values, (steps or values.index[-1]) * np.array([0.9, 1]))[0])


def last_tenths(folders: list[str], tag: str, steps: float | None = None) -> list[float]:
    """last_tenth of the runs that have it."""
    return [x for x in (last_tenth(folder, tag, steps) for folder in folders) if math.isfinite(x)]


def read_paper() -> pd.DataFrame:
    """The paper's numbers, each once: table, environment, algorithm, noise, metric, paper, paper_se, printed."""
    paper = pd.read_csv(PAPER / "paper_numbers.csv", dtype={"mean": str, "standard_error": str}, keep_default_na=False)
    printed = paper["mean"] + (" ± " + paper.standard_error).where(paper.standard_error != "", "")
    numbers = paper[["mean", "standard_error"]].apply(pd.to_numeric)
    paper = paper.drop(columns=["mean", "standard_error"])
    paper = paper.assign(paper=numbers["mean"], paper_se=numbers.standard_error, printed=printed)
    return paper[~paper.table.isin(PARTS)].reset_index(drop=True)


def by_group(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row per group: our mean, se and n, the scores and folders by seed, and its other columns."""
    groups = runs.sort_values("seed", kind="stable").groupby(keys, sort=False, dropna=False)
    rest = [name for name in ("steps", "paper_steps", "kind", "script", "origin", *GROUP) if name not in keys]
    found = groups.agg(scores=("score", list), folders=("folder", list), **{name: (name, "first") for name in rest})
    found[["ours", "se", "n"]] = pd.DataFrame([summary(x) for x in found.scores], found.index, [0, 1, 2])
    rank = found.reset_index().algorithm.map(lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return found.reset_index().assign(rank=rank)


def read_cells(runs: pd.DataFrame, pooled: bool = False) -> pd.DataFrame:
    """A row per cell of the control tables in the paper's order: what it prints, ours, and t, p, z of the difference.

    After the cells of an environment come controls, changed copies and PPO without normalization, which has no cell of
    its own and stands beside PPO's. pooled: a control that is the symmetric algorithm by the identity counts as
    one, and runs of one seed count as their mean: they begin alike, so they are not independent.
    """
    paper = read_paper().query("table in @FAMILY").reset_index(names="order").drop(columns="metric")
    paper = paper.assign(family=paper.table.map(FAMILY), in_paper=True)
    ppo = paper[(paper.table == 11) & (paper.algorithm == "PPO")]
    paper = pd.concat([paper, ppo.assign(algorithm=UNNORMALIZED, in_paper=False, order=np.inf)])
    ours = runs[(runs.kind == "paper") & ~runs.family.isin(TASKS)]
    if pooled:
        ours = ours.assign(algorithm=ours.algorithm.replace(SAME))
        ours["score"] = ours.groupby([*KEY, "seed"], dropna=False).score.transform("mean")
        ours = ours.drop_duplicates([*KEY, "seed"])
    cells = paper.merge(by_group(ours, KEY), "outer", KEY)
    cells["in_paper"], cells["n"] = cells.in_paper.eq(True), cells.n.fillna(0).astype(int)
    cells = cells[cells.in_paper | (cells.n > 0)].fillna({"order": np.inf})
    cells[["ours", "se"]] = cells[["ours", "se"]].astype(float)  # where there are no runs they are objects
    same = cells.groupby(["family", "environment", "noise"])
    cells["table"], cells["first"] = same.table.transform("first").astype(int), same.order.transform("min")
    cells["paper_n"] = cells.family.str.partition("_")[0].map(PAPER_SEEDS)
    numbers = [cells[name] for name in ("ours", "se", "n", "paper", "paper_se", "paper_n")]
    cells["t"], cells["p"], cells["z"] = welch(*numbers)
    cells["tables"] = cells.table.map(list(FAMILY).index)
    return cells.sort_values(["tables", "first", "order", "rank", "algorithm"], ignore_index=True)


def read_judgments(folders: pd.Series) -> pd.DataFrame:
    """A row per judge.json of the runs; against is "reference" or the cell of another run, percent the win rate."""
    rows = []
    for folder in folders:
        for path in sorted(Path(folder).glob("judge*.json")):
            try:
                judge = json.loads(path.read_text())
                against = Path(judge["against"])
                name = against.parent.name if against.name.startswith("seed") else against.name
                rows.append([folder, name, judge["judge_model"], int(judge["samples"]), 100 * float(judge["win_rate"])])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not written by judge.py
    return pd.DataFrame(rows, columns=["folder", "against", "judge", "samples", "percent"])


class Found:
    """Runs below some folders, what is left out, the cells of the control tables, and these with controls pooled."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self.runs, self.left_out = read_runs(folders)
        if len(self.runs):
            self.cells, self.pooled = read_cells(self.runs), read_cells(self.runs, pooled=True)
