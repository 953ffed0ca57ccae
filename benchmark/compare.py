"""Is my change better? Trains two sides, each a script with flags, and answers in a sentence, a table and a picture.

    python benchmark/compare.py "my_loss.py" "sppo_continuous_discretized.py"
    python benchmark/compare.py "my_loss.py --beta 50" "my_loss.py" --hours 1 -- --reward-noise-std 0.05

Flags after -- go to both sides. A score is the mean training return over all steps so far. Ctrl-C or a kill loses
nothing: the same command continues, and --seeds 20 adds seeds. docs/compare.md explains the rule and how often it errs.
"""

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import compare_rule as rule
import numpy as np
import pandas as pd
import runner
import tyro
from matplotlib.figure import Figure
from runner import fail
from stats import difference_interval, gain, interval_text, markdown, mean_text, p_text, probability_of_improvement
from sweeps import NOT_COMPARED, ROOT, CellError, Script, find

SEEDS, LEAST_SEEDS, BATCH = 10, 4, 10  # BATCH agents train in one process
PPO_STEPS, A2C_STEPS = 300_000, 1_000_000
PLANS = [(20, 3), (20, 2), (20, 1), (15, 1), (10, 1), (10, 0.5), (5, 0.5), (5, 0.25)]  # of --hours: seeds, times steps
OTHER_SEEDS = 1000  # added to B's seeds if both sides are one algorithm: from the same ones they would start alike
ORIGINALS = ("sppo_continuous_discretized", "sa2c_continuous_discretized", "sppo_atari", "sa2c_atari")
ORIGINALS += ("sppo_rlhf_imdb", "sppo_rlhf_tldr")
SET_HERE = {"env_id", "dataset", "seed", "num_seeds", "total_timesteps", "num_updates", "run_dir", "resume", "evaluate"}


@dataclass
class Args:
    first: tyro.conf.Positional[str]  # side A: a script anywhere and its flags, in quotes
    second: tyro.conf.Positional[str]  # side B
    envs: str = ""  # environments, games or data sets, in quotes; default HalfCheetah, Hopper, Swimmer, BipedalWalker
    seeds: int | None = None  # seeds of a side in each environment; default 10
    steps: int | None = None  # steps, or updates, of a seed; default 300,000, for A2C 1,000,000
    hours: float | None = None  # choose the seeds and steps that fit into so many hours
    out: Path | None = None  # folder of everything; default runs/compare/<A>__<B>
    workers: int = len(os.sched_getaffinity(0))  # processes at once
    dry_run: bool = False  # train two rollouts of each side, print the plan and stop


@cache
def without_comments(code: str) -> str:
    return ast.unparse(ast.parse(code))


class Side:
    """A script and its flags. It runs from a copy in the folder scripts, where the same command finds it later."""

    def __init__(self, label: str, text: str, common: list[str], scripts: Path):
        name, *flags = shlex.split(text) or [""]
        path = next((path for path in (Path(name), ROOT / name) if path.suffix == ".py" and path.is_file()), None)
        if path is None:
            fail(f"side {label}: there is no script {name!r}")
        copy = scripts / label / path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        elif copy.read_bytes() != path.read_bytes():
            print(f"{path} has changed. This comparison continues with {copy}; for the new one choose another --out.")
        self.label, self.text, self.seeds_from, self.flags = label, text, 0, []
        for word in [*flags, *common]:
            self.flags += word.split("=", 1) if word.startswith("--") else [word]
        try:
            self.script = Script(copy.stem, copy.parent)
            given = self.script.parse(self.flags)
        except (ValueError, SyntaxError) as error:
            fail(f"side {label}: {path}: {str(error).replace(str(copy), path.name)}")
        if taken := sorted(SET_HERE & given.keys()):
            fail(f"side {label}: --{taken[0].replace('_', '-')} is set by --envs, --seeds, --steps or --out")
        self.settings, self.command = self.script.defaults | given, [path.name, *self.flags]
        counts_updates = self.script.length == "num_updates"  # as the language scripts do
        self.tag, self.unit = (rule.SCORES, "updates") if counts_updates else (rule.RETURN, "steps")

    def algorithm(self) -> tuple[str, dict]:
        """Code without comments, and settings. They are equal for two sides that are one algorithm, but for rounding.

        A factor of the whole loss changes nothing: gradients are clipped at a norm, and the optimizer divides by it.
        """
        settings = {name: value for name, value in self.settings.items() if name not in {*NOT_COMPARED, "seed"}}
        code = without_comments(self.script.path.read_text())
        originals = (without_comments((ROOT / f"{name}.py").read_text()) for name in ORIGINALS)
        if code in originals:  # in a changed copy the identity may not hold
            alpha, reverse = settings.pop("alpha"), -settings.pop("beta") * settings.pop("Z")
            weights = [alpha + reverse] if "clip_coef" in settings else [alpha, reverse]
            weights += [settings.pop(name, 0) for name in ("vf_coef", "ent_coef", "target_coef", "max_grad_norm")]
            settings["weights"] = [f"{weight / weights[0]:.9g}" for weight in weights]
        return code, settings

    def job(self, env: str, first: int, last: int, steps: int, out: Path) -> runner.Job:
        """The process that trains seeds first to last."""
        where = "--dataset" if "dataset" in self.settings else "--env-id"
        length = "--" + self.script.length.replace("_", "-")
        flags = [*self.flags, where, env, length, str(steps), "--seed", str(self.seeds_from + first)]
        flags += ["--num-seeds", str(last - first + 1)] if last > first else []
        name = f"seeds{first}-{last}" if last > first else f"seed{first}"
        return runner.Job(self.script, [*flags, "--run-dir", str(cell(out, self.label, env) / name)])

    def trial(self, env: str, agents: int, folder: Path) -> dict:
        """Seconds of a short run, and the speed of all its agents. What cannot be trained ends here, in its words."""
        rollout = self.settings.get("num_steps", 1) * self.settings.get("num_envs", 1)
        steps = 1 if self.unit == "updates" else max(2 * rollout, 4096)
        job, begin = self.job(env, 1, agents, steps, folder), time.monotonic()
        command = job.command(runner.Args(out=folder))
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if not last.startswith("error: "):  # a bug in a copy keeps its traceback
                print(done.stderr, file=sys.stderr)
            raise CellError(f"side {self.label} cannot be trained on {env}: {last.removeprefix('error: ')}")
        seconds, result = time.monotonic() - begin, json.loads(find([job.run_dir], "result.json")[0].read_text())
        return {"seconds": seconds, "speed": agents * (result.get("sps") or steps / seconds)}


def cell(out: Path, label: str, env: str) -> Path:
    return out / label / env.replace("/", "-")


def make_jobs(sides: list[Side], plan: dict, out: Path) -> list[tuple]:
    """(side and environment, process) in the order in which they start, both sides side by side."""
    jobs = []
    for env in plan["envs"]:
        for first, last in runner.batches(cell(out, "A", env), plan["seeds"], plan["agents"]):
            jobs += [(f"{side.label} {env}", side.job(env, first, last, plan["steps"], out)) for side in sides]
    return jobs


def hours(jobs: list[tuple], trials: dict, workers: int) -> float:
    """How long the rest of the jobs takes at the speed of the trials."""
    rest = [(trials[key], job.steps - job.steps_done()) for key, job in jobs if job.state() != "finished"]
    times = [trial["seconds"] + steps / trial["speed"] for trial, steps in rest]
    return max(sum(times) / workers, *times, 0) / 3600


def try_all(sides: list[Side], plan: dict, workers: int, folder: Path) -> dict:
    """{side and environment: trial}"""
    print(f"trying both sides in {', '.join(plan['envs'])} ...", flush=True)
    pairs, agents = [(side, env) for env in plan["envs"] for side in sides], min(plan["agents"], plan["seeds"])
    with ThreadPoolExecutor(workers) as pool:
        trials = pool.map(lambda pair: pair[0].trial(pair[1], agents, folder), pairs)
        return {f"{side.label} {env}": trial for (side, env), trial in zip(pairs, trials)}


def fit(sides: list[Side], plan: dict, workers: int, out: Path) -> dict:
    """Seeds and steps of the best plan that fits into its hours."""
    for seeds, times in PLANS:
        sizes = {"seeds": seeds, "steps": int(times * plan["steps"])}
        time_left = hours(make_jobs(sides, plan | sizes, out), plan["trials"], workers)
        if time_left <= plan["hours"]:
            return sizes
    fail(f"--hours {plan['hours']}: {seeds} seeds of {sizes['steps']:,} steps, the smallest plan, take {time_left:.2f}")


def seen_text(seeds: int, envs: int, look: int) -> str:
    """What so many seeds show in four of five cases."""
    in_all, alone = (rule.least_difference(seeds, envs, one, look) for one in (False, True))
    if in_all == math.inf:
        return "no difference of any size"
    text = f"a difference of {in_all:.1f} standard deviations"
    if envs == 1:
        return text
    return f"{text} in all environments" + (f" or of {alone:.1f} in one alone" if alone < math.inf else "")


def print_plan(sides: list[Side], plan: dict, time_left: float) -> None:
    """What runs, how long that takes, and which difference it shows."""
    seeds, envs, look = plan["seeds"], plan["envs"], len(plan["looks"]) + 1
    for side in sides:
        print(f"{side.label}: {shlex.join(side.command)}")
    runs = f"{', '.join(envs)}: {seeds} seeds a side, {plan['steps']:,} {sides[0].unit}"
    print(f"{runs}, about {60 * time_left:.0f} minutes to go")
    print(f"In four of five cases this shows {seen_text(seeds, len(envs), look)}.", flush=True)
    seen = rule.seen_table([seeds], envs, plan["steps"], plan["ppo"], look)
    if any(name.startswith("on ") for name in seen):  # there are kept runs of some
        print(f"\nIn units of the returns of kept runs:\n\n{markdown(seen)}\n", flush=True)


def read_scores(sides: list[Side], plan: dict, out: Path) -> pd.DataFrame:
    """A row for each finished seed: its score, the same over the last tenth of the steps, and its folder."""
    rows, steps = [], plan["steps"]
    for env in plan["envs"]:
        for side in sides:
            for path in find([cell(out, side.label, env)], "result.json"):
                curve, seed = rule.read_curve(path.parent, side.tag), json.loads(path.read_text())["seed"]
                scores = [rule.mean_between(curve, begin, steps) for begin in (0, 0.9 * steps)]
                rows.append([env, side.label, seed, *scores, path.parent])
    return pd.DataFrame(rows, columns=["environment", "side", "seed", "score", "last_tenth", "folder"]).dropna()


def effect(first: np.ndarray, second: np.ndarray) -> float:
    """The difference of two means in standard deviations of seeds."""
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    return float(first.mean() - second.mean()) / spread if spread else 0.0


def by_environment(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of A and of B, Welch's p and z, and the effect over all steps and over the last tenth, where a side has
    two seeds at least."""
    found = {}
    for env, rows in scores.groupby("environment", sort=False):
        both = [rows[rows.side == label] for label in "AB"]
        if min(map(len, both)) > 1:
            (a, b), last = ([side[column].to_numpy() for side in both] for column in ("score", "last_tenth"))
            p, z = rule.welch_floored(a, b)
            found[env] = {"A": a, "B": b, "p": float(p), "z": float(z), "effect": effect(a, b), "last": effect(*last)}
    return pd.DataFrame.from_dict(found, orient="index")


def chance_text(first: Iterable, second: Iterable) -> str:
    """How often a run of A scores above one of B, with its interval; both hold an array for each environment."""
    return interval_text([*first, *second], probability_of_improvement)


def sentence(found: pd.DataFrame, verdict: rule.Verdict, steps: str, seen: str) -> str:
    """The answer."""
    names = {way: ", ".join(found.index[verdict.ways == way]) for way in (1, -1)}
    where = " and ".join(f"{word} on {names[way]}" for word, way in (("better", 1), ("worse", -1)) if names[way])
    place = f"over all {len(found)} environments" if len(found) > 1 else f"on {found.index[0]}"
    chance = f"a run of A scores above one of B with probability {chance_text(found.A, found.B)}"
    measured = f"in the first {steps}, {place}, {chance}, p {p_text(verdict.p)}"
    if verdict.word == "Not shown":
        return f"Not shown: {measured}. In four of five cases {seen} would have been seen."
    if verdict.word == "Mixed":
        text = f"Mixed: {where}; {measured}."
    elif verdict.shown:
        text = f"{verdict.word}: {measured}; by itself {where or 'no environment shows it'}."
    else:
        text = f"{where[0].upper()}{where[1:]}, not shown over all: {measured}."
    ways = verdict.ways if verdict.ways.any() else np.full(len(found), 1 if verdict.word == "Better" else -1)
    lead, end = ((ways * found[column])[ways != 0].mean() for column in ("effect", "last"))
    closing = "is closing, and longer runs may end otherwise" if end < lead / 2 else "is not closing"
    return f"{text} The lead {closing}: {lead:.1f} standard deviations over all steps, {end:.1f} in the last tenth."


def table(found: pd.DataFrame, verdict: rule.Verdict) -> pd.DataFrame:
    """A row for each environment, and one over all."""
    rows = []
    for (env, row), p_holm in zip(found.iterrows(), verdict.holm):
        difference = gain(row.A.mean() - row.B.mean())
        if np.ptp(row.A) or np.ptp(row.B):
            low, high = difference_interval(row.A, row.B)
            difference += f" [{gain(low)}, {gain(high)}]"
        cells = [env, f"{len(row.A)}, {len(row.B)}", mean_text(row.A), mean_text(row.B), difference]
        cells += [f"{row.effect:+.1f}", f"{row['last']:+.1f}", chance_text([row.A], [row.B])]
        rows.append([*cells, p_text(row.p), p_text(p_holm)])
    rows.append(["over all", *[""] * 6, chance_text(found.A, found.B), p_text(verdict.p), ""])
    names = ["Environment", "seeds", "A", "B", "A - B", "in sd", "in the last tenth", "A above B", "p", "Holm"]
    return pd.DataFrame(rows, columns=names)


def picture(scores: pd.DataFrame, sides: list[Side], plan: dict, path: Path) -> None:
    """Mean curves with bands of one standard error, a panel for each environment."""
    grid, envs = np.linspace(0, plan["steps"], 100), plan["envs"]
    figure = Figure(figsize=(4 * len(envs), 3.5), layout="constrained")
    for env, panel in zip(envs, figure.subplots(1, len(envs), squeeze=False)[0]):
        for side in sides:
            folders = scores[(scores.environment == env) & (scores.side == side.label)].folder
            curves = [rule.read_curve(folder, side.tag) for folder in folders]
            values = pd.DataFrame([np.interp(grid, curve.index, curve) for curve in curves], columns=grid)
            panel.plot(grid, values.mean(), label=f"{side.label}: {side.text}")
            panel.fill_between(grid, values.mean() - values.sem(), values.mean() + values.sem(), alpha=0.3)
        panel.set(title=env, xlabel=side.unit, ylabel=side.tag)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path)


def notes_on(scores: pd.DataFrame, plan: dict, look: int) -> list[str]:
    """What else a reader of the answer has to know."""
    notes = ["Both sides are one algorithm with other seeds: they differ by chance."] if plan["one_algorithm"] else []
    if look > 1:
        notes.append(f"This is look {look} at the answer, so every p is multiplied by {look**2}.")
    for env in plan["envs"]:
        for label in "AB":
            some = scores[(scores.environment == env) & (scores.side == label)].score
            if failed := plan["seeds"] - len(some):
                notes.append(f"{failed} of {plan['seeds']} seeds of {label} on {env} have no result and count nowhere.")
            if rule.has_two_modes(some.to_numpy()):
                notes.append(f"The scores of {label} on {env} have two modes: the mean describes neither.")
    return notes


def answer(sides: list[Side], plan: dict, out: Path) -> int:
    """Print the answer and write it to out. Returns the exit code, 1 if seeds are missing."""
    scores = read_scores(sides, plan, out)
    found = by_environment(scores)
    if found.empty:
        fail(f"no environment has two finished seeds on both sides; {out} holds the logs", 1)
    if len(scores) not in plan["looks"]:
        plan["looks"].append(len(scores))
        save_plan(plan, out)
    look, fewest = plan["looks"].index(len(scores)) + 1, min(map(len, [*found.A, *found.B]))
    verdict = rule.decide(found.p.to_numpy(), found.z.to_numpy(), look)
    steps = f"{plan['steps']:,} {sides[0].unit}"
    lines = [sentence(found, verdict, steps, seen_text(fewest, len(found), look)), *notes_on(scores, plan, look)]
    lines += [f"{side.label}: `{shlex.join(side.command)}`" for side in sides]
    lines.append(markdown(frame := table(found, verdict)))
    frame.to_csv(out / "answer.csv", index=False)
    scores.to_csv(out / "scores.csv", index=False)
    picture(scores, sides, plan, out / "curves.png")
    (out / "answer.md").write_text("\n\n".join([*lines, "![Curves](curves.png)"]) + "\n")
    print("", *lines, f"{out} holds answer.md, answer.csv, scores.csv and curves.png", sep="\n\n")
    return int(len(scores) < 2 * plan["seeds"] * len(plan["envs"]))


def save_plan(plan: dict, out: Path) -> None:
    temporary = out / "compare.json.tmp"
    temporary.write_text(json.dumps(plan, indent=2) + "\n")
    temporary.replace(out / "compare.json")


def make_plan(args: Args, sides: list[Side], old: dict, out: Path) -> dict:
    """What to run: as out was begun, to which only seeds can be added, or as the arguments say."""
    wanted = {"A": sides[0].command, "B": sides[1].command, "envs": list(dict.fromkeys(args.envs.split()))}
    wanted |= {"steps": args.steps, "hours": args.hours}
    if old:
        for name, value in wanted.items():
            if value and value != old[name]:
                fail(f"{out} holds a comparison with {name} {old[name]}, not {value}: choose another --out")
        if args.seeds and args.seeds < old["seeds"]:
            fail(f"--seeds {args.seeds}: {out} has {old['seeds']}, and seeds can only be added")
        return old | {"seeds": args.seeds or old["seeds"]}
    if sides[0].unit != sides[1].unit:
        fail("one side counts updates and the other steps")
    batched = all("num_seeds" in side.settings for side in sides)
    if not batched and not (args.envs and args.steps):
        fail("--envs and --steps have defaults for the continuous scripts alone: name them")
    ppo = all("clip_coef" in side.settings for side in sides)
    plan = {"envs": wanted["envs"] or list(rule.ENVS), "steps": args.steps or (PPO_STEPS if ppo else A2C_STEPS)}
    plan |= {"seeds": args.seeds or SEEDS, "agents": BATCH if batched else 1, "ppo": ppo, "looks": []}
    return wanted | plan | {"one_algorithm": sides[0].algorithm() == sides[1].algorithm()}


def compare(args: Args, common: list[str], out: Path) -> int:
    """Begin the comparison in out, or go on with it. Returns the exit code."""
    begun = (out / "compare.json").exists()
    with tempfile.TemporaryDirectory() as temporary:
        folder = out if begun else Path(temporary)
        sides = [Side(label, text, common, folder / "scripts") for label, text in zip("AB", (args.first, args.second))]
        plan = make_plan(args, sides, json.loads((out / "compare.json").read_text()) if begun else {}, out)
        sides[1].seeds_from = OTHER_SEEDS * plan["one_algorithm"]
        if not begun:
            plan["trials"] = try_all(sides, plan, args.workers, folder)
            if args.hours:
                plan |= fit(sides, plan, args.workers, out)
        if time_left := hours(make_jobs(sides, plan, out), plan["trials"], args.workers):
            print_plan(sides, plan, time_left)
        if args.dry_run:
            return 0
        if not begun:
            shutil.copytree(folder / "scripts", out / "scripts", dirs_exist_ok=True)
    save_plan(plan, out)
    for side in sides:
        side.script = Script(side.script.name, out / "scripts" / side.label)
    jobs = [job for _, job in make_jobs(sides, plan, out)]
    todo = [job for job in jobs if job.state() != "finished"]
    if todo and runner.run(todo, runner.Args(out=out, workers=args.workers), len(jobs) - len(todo)) == 130:
        return 130
    return answer(sides, plan, out)


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, common = tyro.cli(Args, args=words[:end], description=__doc__), words[end + 1 :]
    if min(x for x in (args.seeds, args.steps, args.hours, args.workers) if x is not None) <= 0:
        fail("--seeds, --steps, --hours and --workers must be above 0")
    if args.seeds is not None and args.seeds < LEAST_SEEDS:
        fail(f"--seeds {args.seeds}: fewer than {LEAST_SEEDS} seeds a side show nothing")
    if args.hours and (args.seeds or args.steps):
        fail("--hours chooses seeds and steps: drop --seeds and --steps")
    names = []
    for text in (args.first, args.second):
        script, *flags = text.split() or [""]
        names.append(re.sub(r"[^\w.]+", "_", " ".join([Path(script).stem, *flags, *common])))
    try:
        return compare(args, common, args.out or Path("runs/compare", "__".join(names)))
    except CellError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on", 130)


if __name__ == "__main__":
    sys.exit(main())
