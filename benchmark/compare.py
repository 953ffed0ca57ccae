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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import runner
import tyro
from compare_rule import ENVS, RETURN, SCORES, Verdict, decide, has_two_modes, kept_scores, least_difference
from compare_rule import mean_between, read_curve, residuals, welch_floored
from stats import chance_text, difference_interval, gain, markdown, mean_text, number, p_text
from sweeps import NOT_COMPARED, ROOT, CellError, Script, find

SEEDS, LEAST_SEEDS, BATCH = 10, 4, 10
PPO_STEPS, A2C_STEPS = 300_000, 1_000_000
PLANS = [(20, 3), (20, 2), (20, 1), (15, 1), (10, 1), (10, 0.5), (5, 0.5), (5, 0.25)]  # of --hours: seeds, times steps
ORIGINALS = ("sppo_continuous_discretized", "sa2c_continuous_discretized", "sppo_atari", "sa2c_atari")
ORIGINALS += ("sppo_rlhf_imdb", "sppo_rlhf_tldr")
SET_HERE = {"env_id", "dataset", "seed", "num_seeds", "total_timesteps", "num_updates", "run_dir", "resume", "evaluate"}
OTHER_SEEDS = 1000  # added to B's where both sides are one algorithm: from the same seeds they would start alike


@dataclass
class Args:
    first: tyro.conf.Positional[str]
    """side A: a script anywhere and its flags, in quotes"""
    second: tyro.conf.Positional[str]
    """side B"""
    envs: str = ""
    """environments, games or data sets, separated by spaces; default HalfCheetah, Hopper, Swimmer, BipedalWalker"""
    seeds: int | None = None
    """seeds of a side in each environment; default 10"""
    steps: int | None = None
    """steps, or updates, of a seed; default 300,000, for A2C 1,000,000"""
    hours: float | None = None
    """choose the seeds and steps that fit into so many hours"""
    out: Path | None = None
    """folder of everything; default runs/compare/<A>__<B>"""
    workers: int = len(os.sched_getaffinity(0))
    """processes at once"""
    dry_run: bool = False
    """print the plan and stop"""


def fail(message: object, code: int = 2) -> None:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


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
        self.label, self.text, self.first_seed, self.flags = label, text, 0, []
        for word in [*flags, *common]:
            self.flags += word.split("=", 1) if word.startswith("--") else [word]
        try:
            self.script = Script(copy.stem, copy.parent)
            given = self.script.parse(self.flags)
        except (ValueError, SyntaxError) as error:
            fail(f"side {label}: {str(error).replace(str(copy), str(path))}")
        if taken := sorted(SET_HERE & given.keys()):
            fail(f"side {label}: --{taken[0].replace('_', '-')} is set by --envs, --seeds, --steps or --out")
        self.settings = self.script.defaults | given
        self.tag = SCORES if self.script.length == "num_updates" else RETURN

    def algorithm(self) -> tuple[str, dict]:
        """Code without comments, and settings. They are equal for two sides that are one algorithm, but for rounding.

        A factor of the whole loss changes nothing: gradients are clipped at a norm, and the optimizer divides by it.
        """
        settings = {name: value for name, value in self.settings.items() if name not in {*NOT_COMPARED, "seed"}}
        paths = self.script.path, *(ROOT / f"{name}.py" for name in ORIGINALS)
        code, *originals = (ast.unparse(ast.parse(path.read_text())) for path in paths)
        if code in originals:  # in a changed copy the identity may not hold
            alpha, reverse = settings.pop("alpha"), -settings.pop("beta") * settings.pop("Z")
            weights = [alpha + reverse] if "clip_coef" in settings else [alpha, reverse]
            weights += [settings.pop(name, 0) for name in ("vf_coef", "ent_coef", "target_coef", "max_grad_norm")]
            settings["weights"] = [f"{weight / weights[0]:.9g}" for weight in weights]
        return code, settings

    def job(self, env: str, seeds: tuple[int, int], steps: int, run_dir: Path) -> runner.Job:
        """The process that trains the first to the last of these seeds."""
        first, last = seeds
        where = "--dataset" if "dataset" in self.settings else "--env-id"
        length = "--" + self.script.length.replace("_", "-")
        flags = [*self.flags, where, env, length, str(steps), "--seed", str(self.first_seed + first)]
        flags += ["--num-seeds", str(last - first + 1)] if last > first else []
        return runner.Job(self.script, [*flags, "--run-dir", str(run_dir)])

    def trial(self, env: str, agents: int, folder: Path) -> dict:
        """Seconds of a short run and the speed of all its agents. What cannot be trained ends here, in its own words."""
        rollout = self.settings.get("num_steps", 1) * self.settings.get("num_envs", 1)
        steps = 1 if self.tag == SCORES else max(2 * rollout, 4096)
        job = self.job(env, (1, agents), steps, run_folder(folder, self.label, env, 1, agents))
        command, begin = job.command(runner.Args(out=folder)), time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if not last.startswith("error: "):  # a bug in a copy keeps its traceback
                print(done.stderr, file=sys.stderr)
            fail(f"side {self.label} cannot be trained on {env}: {last.removeprefix('error: ')}")
        seconds, result = time.monotonic() - begin, json.loads(find([job.run_dir], "result.json")[0].read_text())
        return {"seconds": seconds, "speed": agents * (result.get("sps") or steps / seconds)}


def run_folder(out: Path, label: str, env: str, first: int, last: int) -> Path:
    return out / label / env.replace("/", "-") / (f"seeds{first}-{last}" if last > first else f"seed{first}")


def make_jobs(sides: list[Side], envs: list[str], seeds: int, steps: int, agents: int, out: Path) -> list[tuple]:
    """(side and environment, process) in the order in which they start, both sides side by side."""
    jobs = []
    for env in envs:
        for first, last in runner.batches(run_folder(out, "A", env, 1, 1).parent, seeds, agents):
            for side in sides:
                folder = run_folder(out, side.label, env, first, last)
                jobs.append((f"{side.label} {env}", side.job(env, (first, last), steps, folder)))
    return jobs


def hours(jobs: list[tuple], trials: dict, workers: int) -> float:
    """How long the rest of the jobs takes at the speed of the trials."""
    rest = [(trials[key], job.steps - job.steps_done()) for key, job in jobs if job.state() != "finished"]
    times = [trial["seconds"] + steps / trial["speed"] for trial, steps in rest]
    return max(sum(times) / workers, *times, 0) / 3600


def try_all(sides: list[Side], envs: list[str], agents: int, workers: int, folder: Path) -> dict:
    """{side and environment: its trial}"""
    print(f"trying both sides in {len(envs)} environments ...", flush=True)
    pairs = [(side, env) for env in envs for side in sides]
    with ThreadPoolExecutor(workers) as pool:
        trials = pool.map(lambda pair: pair[0].trial(pair[1], agents, folder), pairs)
        return {f"{side.label} {env}": trial for (side, env), trial in zip(pairs, trials)}


def seen_text(seeds: int, envs: int, look: int) -> str:
    """The difference that so many seeds show in four of five cases."""
    in_all, alone = (least_difference(seeds, envs, one, look) for one in (False, True))
    if envs == 1:
        return f"{in_all:.1f} standard deviations" if in_all < math.inf else "no difference of any size"
    text = f"{in_all:.1f} standard deviations in all environments"
    return (
        f"{text} or {alone:.1f} in one alone"
        if alone < math.inf
        else f"{text}; in one alone, no difference of any size"
    )


def print_plan(plan: dict, ppo: bool, look: int, time: float) -> None:
    """What runs, how long it takes, and which difference it shows, also in the units of the kept runs."""
    seeds, envs, steps = plan["seeds"], plan["envs"], plan["steps"]
    print(f"A: {shlex.join(plan['A'])}\nB: {shlex.join(plan['B'])}")
    print(f"{len(envs)} environments, {seeds} seeds a side, {steps:,} steps each: {time:.1f} hours to go")
    print(f"seen in four of five cases: a difference of {seen_text(seeds, len(envs), look)}")
    rows = []
    for env in envs:
        if kept := kept_scores(env, steps, ppo):
            mean, spread = np.concatenate(kept).mean(), residuals(kept).std()
            sizes = [least_difference(seeds, len(envs), alone, look) * spread for alone in (False, True)]
            rows.append([env, number(mean), *(f"{number(x)} ({100 * x / abs(mean):.0f} %)" for x in sizes)])
    if rows:
        names = ["environment", "mean of kept runs", "seen if in all", "if in one alone"]
        print("", markdown(pd.DataFrame(rows, columns=names)), "", sep="\n", flush=True)


def read_scores(sides: list[Side], envs: list[str], steps: int, out: Path) -> pd.DataFrame:
    """A row for each finished seed, with its score and the same over the last tenth of the steps."""
    rows = []
    for env in envs:
        for side in sides:
            for path in find([run_folder(out, side.label, env, 1, 1).parent], "result.json"):
                curve, seed = read_curve(path.parent, side.tag), json.loads(path.read_text())["seed"]
                scores = [mean_between(curve, begin, steps) for begin in (0, 0.9 * steps)]
                rows.append([env, side.label, seed, *scores, path.parent])
    return pd.DataFrame(rows, columns=["environment", "side", "seed", "score", "last_tenth", "folder"]).dropna()


def pairs_of(scores: pd.DataFrame, column: str) -> dict[str, list[np.ndarray]]:
    """{environment: [numbers of A, numbers of B]}, where each side has two seeds."""
    pairs = {}
    for env, rows in scores.groupby("environment", sort=False):
        pairs[env] = [rows[rows.side == label][column].to_numpy() for label in "AB"]
    return {env: pair for env, pair in pairs.items() if min(map(len, pair)) > 1}


def effect(first: np.ndarray, second: np.ndarray) -> float:
    """The difference of two means in standard deviations of seeds."""
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    return float(first.mean() - second.mean()) / spread if spread else 0.0


def sentence(pairs: dict, last: dict, verdict: Verdict, steps: str, seen: str) -> str:
    """The answer; pairs and last are of the scores over all steps and over the last tenth."""
    better, worse = (", ".join(np.array(list(pairs))[verdict.ways == way]) for way in (1, -1))
    where = " and ".join([f"better on {better}"] * bool(better) + [f"worse on {worse}"] * bool(worse))
    place = f"over all {len(pairs)} environments" if len(pairs) > 1 else f"on {next(iter(pairs))}"
    chance = f"a run of A scores above one of B with probability {chance_text(*zip(*pairs.values()))}"
    measured = f"in the first {steps}, {place}, {chance}, p {p_text(verdict.p)}"
    if verdict.word == "Not shown":
        return f"Not shown: {measured}. In four of five cases, a difference of {seen} would have been seen."
    if verdict.word == "Mixed" or not verdict.shown:
        text = f"{'Mixed: ' * (verdict.word == 'Mixed')}{where}"
        text = f"{text[0].upper()}{text[1:]}{', not shown over all' * (not verdict.shown)}: {measured}."
    else:
        alone = f"; by itself {where or 'no environment shows it'}" if len(pairs) > 1 else ""
        text = f"{verdict.word}: {measured}{alone}."
    ways = verdict.ways if verdict.ways.any() else np.full(len(pairs), 1 if verdict.word == "Better" else -1)
    lead, end = (np.mean([way * effect(*pair) for way, pair in zip(ways, x.values()) if way]) for x in (pairs, last))
    closing = "is closing: longer runs may end otherwise" if end < lead / 2 else "is not closing"
    return f"{text} The lead {closing} ({lead:.1f} standard deviations over all steps, {end:.1f} in the last tenth)."


def table(pairs: dict, last: dict, p: np.ndarray, verdict: Verdict) -> pd.DataFrame:
    """A row for each environment, and one over all."""
    rows = []
    for (env, pair), p_alone, p_holm in zip(pairs.items(), p, verdict.holm):
        interval = difference_interval(*pair)
        between = f" [{', '.join(map(gain, interval))}]" if interval else ""
        effects = [f"{effect(*x[env]):+.1f}" for x in (pairs, last)]
        row = [env, ", ".join(str(len(x)) for x in pair), *map(mean_text, pair), gain(pair[0].mean() - pair[1].mean())]
        rows.append(
            [*row[:-1], row[-1] + between, *effects, chance_text(*([x] for x in pair)), *map(p_text, (p_alone, p_holm))]
        )
    rows.append(["over all", *[""] * 6, chance_text(*zip(*pairs.values())), p_text(verdict.p), ""])
    names = ["Environment", "seeds", "A", "B", "A - B", "in sd", "in the last tenth", "A above B", "p", "Holm"]
    return pd.DataFrame(rows, columns=names)


def picture(scores: pd.DataFrame, sides: list[Side], steps: int, path: Path) -> None:
    """Mean curves with bands of one standard error, a panel for each environment."""
    grid, envs = np.linspace(0, steps, 100), scores.environment.unique()
    figure, axes = plt.subplots(1, len(envs), figsize=(4 * len(envs), 3.5), squeeze=False, layout="constrained")
    for env, panel in zip(envs, axes[0]):
        for side in sides:
            folders = scores[(scores.environment == env) & (scores.side == side.label)].folder
            curves = [read_curve(folder, side.tag) for folder in folders]
            values = np.array([np.interp(grid, curve.index, curve) for curve in curves])
            mean, error = values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
            panel.plot(grid, mean, label=f"{side.label}: {side.text}")
            panel.fill_between(grid, mean - error, mean + error, alpha=0.3)
        panel.set(title=env, xlabel="steps" if side.tag == RETURN else "updates")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path)


def notes_on(scores: pd.DataFrame, plan: dict, look: int) -> list[str]:
    """What a reader of the answer has to know besides."""
    notes = []
    if plan["one_algorithm"]:
        notes.append("Both sides are one algorithm, with other seeds: what differs is chance.")
    if look > 1:
        notes.append(f"This is look {look} at the answer: every p is multiplied by {look**2}.")
    for env in plan["envs"]:
        for label in "AB":
            have = scores[(scores.environment == env) & (scores.side == label)]
            if missing := plan["seeds"] - len(have):
                notes.append(
                    f"{missing} of {plan['seeds']} seeds of {label} on {env} have no result and count nowhere."
                )
            if has_two_modes(have.score.to_numpy()):
                notes.append(f"The scores of {label} on {env} have two modes: its mean is typical of neither.")
    return notes


def answer(sides: list[Side], plan: dict, out: Path) -> int:
    """Print the answer and write it into out. Returns the exit code, 1 where seeds are missing."""
    unit = f"{plan['steps']:,} {'updates' if sides[0].tag == SCORES else 'steps'}"
    scores = read_scores(sides, plan["envs"], plan["steps"], out)
    pairs, last = pairs_of(scores, "score"), pairs_of(scores, "last_tenth")
    if not pairs:
        fail(f"no environment has two finished seeds on both sides; the logs are in {out}", 1)
    if len(scores) not in plan["looks"]:
        plan["looks"].append(len(scores))
        save_plan(plan, out)
    look = plan["looks"].index(len(scores)) + 1
    p, z = np.array([welch_floored(*pair) for pair in pairs.values()]).T
    verdict, least = decide(p, z, look), min(len(x) for pair in pairs.values() for x in pair)
    text = sentence(pairs, last, verdict, unit, seen_text(least, len(pairs), look))
    lines = [text, *notes_on(scores, plan, look), f"A: `{shlex.join(plan['A'])}`; B: `{shlex.join(plan['B'])}`."]
    frame = table(pairs, last, p, verdict)
    scores = scores[scores.environment.isin(list(pairs))]
    picture(scores, sides, plan["steps"], out / "curves.png")
    frame.to_csv(out / "answer.csv", index=False)
    scores.to_csv(out / "scores.csv", index=False)
    (out / "answer.md").write_text("\n\n".join([*lines, markdown(frame), "![Curves](curves.png)"]) + "\n")
    print("", *lines, "", markdown(frame), "", f"in {out}: answer.md, answer.csv, scores.csv, curves.png", sep="\n")
    return int(len(scores) < 2 * plan["seeds"] * len(plan["envs"]))


def save_plan(plan: dict, out: Path) -> None:
    temporary = out / "compare.json.tmp"
    temporary.write_text(json.dumps(plan, indent=2) + "\n")
    temporary.replace(out / "compare.json")


def make_plan(args: Args, sides: list[Side], old: dict, out: Path) -> dict:
    """What to run, from the arguments or from what out was begun with; only seeds can be added to that."""
    lines = {side.label: [side.script.path.name, *side.flags] for side in sides}
    wanted = lines | {"envs": list(dict.fromkeys(args.envs.split())), "steps": args.steps, "hours": args.hours}
    if old:
        for name, value in wanted.items():
            if value and value != old[name]:
                texts = [" ".join(x) if isinstance(x, list) else x for x in (old[name], value)]
                fail(f"{out} holds a comparison with {name} {texts[0]}, not {texts[1]}: choose another --out")
        if args.seeds and args.seeds < old["seeds"]:
            fail(f"{out} has {old['seeds']} seeds a side, and seeds can only be added")
        return old | {"seeds": args.seeds or old["seeds"]}
    both = [side.settings for side in sides]
    if len({side.script.length for side in sides}) == 2:
        fail("one side counts its length in updates, the other in steps")
    if not all("num_seeds" in settings for settings in both):
        if not (wanted["envs"] and args.steps):
            fail("name --envs and --steps: only scripts with --num-seeds have defaults")
    steps = PPO_STEPS if all("clip_coef" in settings for settings in both) else A2C_STEPS
    one_algorithm = sides[0].algorithm() == sides[1].algorithm()
    plan = {"envs": wanted["envs"] or list(ENVS), "steps": args.steps or steps, "seeds": args.seeds or SEEDS}
    return wanted | plan | {"one_algorithm": one_algorithm, "looks": [], "trials": {}}


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, common = tyro.cli(Args, args=words[:end], description=__doc__), words[end + 1 :]
    counts = [x for x in (args.seeds, args.steps, args.hours, args.workers) if x is not None]
    for wrong, message in (
        (min(counts) <= 0, "--seeds, --steps, --hours and --workers must be above 0"),
        (args.seeds and args.seeds < LEAST_SEEDS, f"--seeds {args.seeds}: fewer than {LEAST_SEEDS} seeds show nothing"),
        (args.hours and (args.seeds or args.steps), "--hours chooses seeds and steps: drop --seeds and --steps"),
    ):
        if wrong:
            fail(message)
    names = [" ".join([Path(side.split()[0]).stem, *side.split()[1:], *common]) for side in (args.first, args.second)]
    out = args.out or Path("runs/compare", "__".join(re.sub(r"[^\w.]+", "_", name) for name in names))
    old = json.loads((out / "compare.json").read_text()) if (out / "compare.json").exists() else {}
    with tempfile.TemporaryDirectory() as new:
        folder = out if old else Path(new)
        sides = [Side(label, text, common, folder / "scripts") for label, text in zip("AB", (args.first, args.second))]
        plan = make_plan(args, sides, old, out)
        sides[1].first_seed = OTHER_SEEDS * plan["one_algorithm"]
        agents = BATCH if all("num_seeds" in side.settings for side in sides) else 1

        def jobs_of(seeds: int, steps: int) -> list[tuple]:
            return make_jobs(sides, plan["envs"], seeds, steps, agents, out)

        if not old:
            plan["trials"] = try_all(sides, plan["envs"], min(agents, plan["seeds"]), args.workers, folder)
        if args.hours and not old:
            fits = [(seeds, int(times * plan["steps"])) for seeds, times in PLANS]
            fits = [some for some in fits if hours(jobs_of(*some), plan["trials"], args.workers) <= args.hours]
            if not fits:
                fail(f"--hours {args.hours}: not even the smallest plan, {PLANS[-1][0]} seeds, fits")
            plan["seeds"], plan["steps"] = fits[0]
        jobs = jobs_of(plan["seeds"], plan["steps"])
        print_plan(
            plan, "clip_coef" in sides[1].settings, len(plan["looks"]) + 1, hours(jobs, plan["trials"], args.workers)
        )
        if args.dry_run:
            return 0
        if not old:
            shutil.copytree(folder / "scripts", out / "scripts", dirs_exist_ok=True)
            save_plan(plan, out)
            for side in sides:
                side.script = Script(side.script.name, out / "scripts" / side.label)
    jobs = [job for _, job in jobs_of(plan["seeds"], plan["steps"])]
    todo = [job for job in jobs if job.state() != "finished"]
    if todo and runner.run(todo, runner.Args(out=out, workers=args.workers), len(jobs) - len(todo), 0) == 130:
        return 130
    return answer(sides, plan, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail("stopped", 130)
