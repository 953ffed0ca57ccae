"""The paper's numbers, the settings behind them as the sweeps have them, and which of them a run belongs to."""

import csv
import math
import shlex
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from sweeps import NOT_COMPARED, ROOT, CellError, Script, cells, take_seeds

PAPER_NUMBERS = ROOT / "benchmark/paper/paper_numbers.csv"
PUBLIC_SCORES = ROOT / "benchmark/paper/public_scores.csv"
TABLES = {11: "atari_ppo", 8: "atari_a2c"}  # 1 and 2 are parts of 11 and 13; 4 has a section of its own
TABLES |= {12: "continuous_ppo", 13: "continuous_ppo", 9: "continuous_a2c", 10: "continuous_a2c"}
PARTS = {1: 11, 2: 13}
LANGUAGE_TABLES = (3, 14)
LANGUAGE = {"rlhf_imdb": "IMDB", "rlhf_tldr": "TL;DR"}  # tasks
MODELS = ("policy", "dataset", "reward_model")
SYMMETRIC = {  # scripts, and what the paper calls the algorithm of each
    "sppo_continuous_discretized": "DSPPO",
    "sa2c_continuous_discretized": "DSA2C",
    "sppo_atari": "SPPO",
    "sa2c_atari": "SA2C",
    "sppo_rlhf_imdb": "SPPO",
    "sppo_rlhf_tldr": "SPPO",
}
BASELINES = {"SPPO": "PPO", "SA2C": "A2C", "DSPPO": "DPPO", "DSA2C": "DA2C"}  # the paper counts wins over these
UNNORMALIZED = "PPO (without A normalization)"  # a row of Table 14; the other one is the PPO of Table 3
IN_GROUP = ("env_id", "seed", "total_timesteps", "num_updates", "reward_noise_std", "reward_flip_prob")  # or its seeds
OWN = ("alpha", "beta", "Z")  # what a changed copy of a script sets as it likes


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


@dataclass
class Public:
    """Published scores of one algorithm."""

    source: str
    algorithm: str
    steps: int  # 0: not stated
    seeds: int
    url: str
    means: dict[str, float] = field(default_factory=dict)  # by environment

    @property
    def steps_text(self) -> str:
        return f"{self.steps:,} steps" if self.steps else "steps not stated"


@dataclass(frozen=True)
class Planned:
    """A line of a sweep."""

    script: str
    environment: str  # of language scripts: the task
    algorithm: str
    noise: str
    seeds: int
    settings: dict[str, object]  # all arguments

    @property
    def timesteps(self) -> int:
        return int(self.settings[Script(self.script, ROOT).length])


@dataclass(frozen=True)
class Group:
    """What runs must share to be averaged: they differ in the seed only."""

    family: str  # the sweep that has such runs: continuous_ppo, ..., rlhf_tldr
    environment: str
    algorithm: str  # as in the paper's header: PPO, SPPO, ...; UNNORMALIZED; "DPPO control"; a changed copy's name
    noise: str  # "none", "BSC(0.1)", "N(0, 0.05^2)"
    timesteps: int  # the paper's number where it is that, rounded up to whole rollouts
    paper_timesteps: int | None  # None: no sweep has such a cell
    differences: tuple[tuple[str, object], ...]  # settings that are not the paper's for this cell
    origin: str  # the script, or the one of which it is a changed copy
    changed: bool  # such a copy

    @property
    def kind(self) -> str:
        if self.differences or self.paper_timesteps is None:
            return "other"
        if self.timesteps == self.paper_timesteps:
            return "paper"
        return "shorter" if self.timesteps < self.paper_timesteps else "longer"

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
        texts = [setting_text(name, value) for name, value in self.differences]
        return ", ".join((["not in the paper"] if self.paper_timesteps is None else []) + texts)


@dataclass(frozen=True)
class LanguageGroup(Group):
    """Language runs: timesteps are updates, and the environment is the task or, where not the paper's, the models."""

    models: tuple[str, ...]  # policy, data set, reward model

    @property
    def task(self) -> str:
        return LANGUAGE[self.family]

    @property
    def unit(self) -> str:
        return "updates"

    def difference_text(self) -> str:
        others = tuple(difference for difference in self.differences if difference[0] not in MODELS)
        return Group.difference_text(replace(self, differences=others))


def setting_text(name: str, value: object) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


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
def read_public() -> list[Public]:
    """Published Atari scores of PPO and A2C, without noise, in the order of the file."""
    found = {}
    with PUBLIC_SCORES.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["source"], row["algorithm"], int(row["steps"] or 0), int(row["seeds"]), row["url"]
            found.setdefault(key, Public(*key)).means[row["environment"]] = float(row["mean"])
    return list(found.values())


def family_of(script: str, args: dict) -> str:
    if script == "sb3_baseline":
        return f"continuous_{args['algo']}"
    if script.startswith("sppo_rlhf"):
        return script.removeprefix("sppo_")
    domain = "atari" if script.endswith("_atari") else "continuous"
    return f"{domain}_{'a2c' if script.startswith('sa2c') else 'ppo'}"


def noise_of(args: dict) -> str:
    std, flip = args.get("reward_noise_std", 0), args.get("reward_flip_prob", 0)
    return f"N(0, {std:g}^2)" if std else f"BSC({flip:g})" if flip else "none"


def algorithm_of(script: str, args: dict) -> str:
    if script == "sb3_baseline":
        return args["algo"].upper()
    symmetric = SYMMETRIC[script]
    if args["beta"] != 0:
        return symmetric
    if args["alpha"] != 1:
        return f"{BASELINES[symmetric]} control"
    return UNNORMALIZED if symmetric == "SPPO" and not args.get("norm_adv", True) else BASELINES[symmetric]


def parse(line: str) -> Planned:
    """A cell as a sweep has it."""
    name, *flags = shlex.split(line)
    script, (seeds, flags) = Script(name, ROOT), take_seeds(flags)
    args = script.defaults | script.parse(flags)
    environment = args["env_id"] if "env_id" in args else LANGUAGE[family_of(name, args)]
    return Planned(name, environment, algorithm_of(name, args), noise_of(args), seeds, args)


@cache
def planned() -> dict[tuple[str, str, str, str], Planned]:
    """{(family, environment, algorithm, noise): line of a sweep}, the control of the identity included."""
    lines = [parse(line) for sweep in (*TABLES.values(), *LANGUAGE, "advantage_norm") for line in cells(sweep, True)]
    return {(family_of(p.script, p.settings), p.environment, p.algorithm, p.noise): p for p in lines}


def origin_of(args: dict) -> str:
    """The script of which a changed copy is one: that with the most flags in common."""
    return min(SYMMETRIC, key=lambda script: len(args.keys() ^ Script(script, ROOT).defaults.keys()))


def copy_name(script: str, origin: str, args: dict) -> str:
    """A changed copy by its name and, where they are not its defaults, alpha, beta, Z and its new flags."""
    theirs = Script(origin, ROOT).defaults
    try:
        defaults = Script(script, ROOT).defaults
    except CellError:  # it is on another machine
        defaults = theirs
    own = [name for name in args if (name in OWN or name not in theirs) and name not in NOT_COMPARED]
    return ", ".join([script, *(setting_text(name, args[name]) for name in own if args[name] != defaults.get(name))])


def settings_of(args: dict, plan: Planned | None, origin: str, changed: bool) -> tuple[dict, list[tuple[str, object]]]:
    """Settings of a run, and those of them that are not the planned ones; without a plan, not the script's defaults."""
    defaults = Script(origin, ROOT).defaults
    expected = plan.settings if plan else defaults | {"beta": None}
    settings = {name: args.get(name, value) for name, value in defaults.items()}  # a run may be older than a flag
    ignored = {*NOT_COMPARED, *IN_GROUP} | (set(OWN) if changed else set())
    if not changed and args.get("beta") == 0:
        ignored |= {"beta", "Z"} | ({"alpha"} if args["alpha"] == 1 else set())  # without the reverse loss
    differences = [(n, x) for n, x in settings.items() if n not in ignored and x != expected[n]]
    return settings, [(n, tuple(x) if isinstance(x, list) else x) for n, x in differences]


def identify(result: dict) -> Group:
    """The group of a run, from its script and arguments."""
    script, args = result["script"], result["args"]
    changed = script not in SYMMETRIC and script != "sb3_baseline"
    origin = origin_of(args) if changed else script
    family, noise = family_of(origin, args), noise_of(args)
    language = family in LANGUAGE
    environment = LANGUAGE[family] if language else result["env_id"]
    algorithm = copy_name(script, origin, args) if changed else algorithm_of(script, args)
    plan = planned().get((family, environment, SYMMETRIC[origin] if changed else algorithm, noise))
    settings, differences = settings_of(args, plan, origin, changed)
    if plan and differences == [("gamma", Script(origin, ROOT).defaults["gamma"])]:  # where a sweep has another
        algorithm, differences = f"{algorithm}, gamma {settings['gamma']}", []

    timesteps = int(result["num_updates"] if language else result["total_timesteps"])
    full = plan.timesteps if plan else None
    if full and not language and full <= timesteps <= 1.01 * full:
        timesteps = full  # totals are rounded up to whole rollouts
    if not language:
        return Group(family, environment, algorithm, noise, timesteps, full, tuple(differences), origin, changed)
    models = tuple(settings[name] for name in MODELS)
    if any(name in MODELS for name, _ in differences):
        environment = ", ".join(Path(model).name for model in models)
    shared = family, environment, algorithm, noise, timesteps, full, tuple(differences), origin, changed
    return LanguageGroup(*shared, models)
