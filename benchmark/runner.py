"""Run the cells of a sweep, read from standard input, on this machine or as one Slurm job array.

    benchmark/continuous_ppo.sh --dry-run                          # the sweeps pipe their cells in here
    ENVS=Ant-v4 SEEDS=3 WORKERS=2 benchmark/continuous_ppo.sh
    benchmark/atari_ppo.sh --slurm --partition cpu --time 24:00:00 --cpus-per-task 4

A cell is one line: a script, its flags, and --seeds N for the seeds 1 ... N. It becomes the run directories
<out>/<env or data set>__<script>__<label>/seed<k>; a script with --num-seeds trains up to BATCH seeds in one process,
in .../seeds<first>-<last>/seed<k>. What has its result.json is skipped, what was interrupted goes on with --resume. The
output of a run is in <run directory>.log, and its process holds a lock on that file: another runner waits until the
process has ended, however it ends.
"""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from sweeps import NOT_COMPARED, CellError, Script, seconds, speeds, take_seeds
from tqdm import tqdm

NOT_IN_LABEL = ("env_id", "dataset", "total_timesteps", "num_updates", *NOT_COMPARED)
SHORT = {"algo": "", "reward_noise_std": "noise", "reward_flip_prob": "flip"}  # in labels
SHORT |= {"policy": "", "reward_model": "", "base_precision": "", "target_coef": "target"}
MAX_ARRAY = 1000  # tasks; Slurm's default MaxArraySize is 1001
LOG_TAIL = 10  # lines


def fail(message: object, code: int = 2) -> None:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def whole_number(variable: str, default: int | None = None) -> int | None:
    """The number in an environment variable, by which a sweep is narrowed too."""
    value = os.environ.get(variable, "")
    if value and not value.isdigit():
        fail(f"{variable} must be a whole number, not {value!r}")
    return int(value) if value else default


@dataclass
class Args:
    out: Path = Path("runs/benchmark")  # parent of all run directories
    seeds: int | None = whole_number("SEEDS")  # seeds of every cell instead of its own number [SEEDS]
    envs: str = os.environ.get("ENVS", "")  # only these environments or data sets: "Ant-v4 Hopper Alien" [ENVS]
    steps: int | None = whole_number("STEPS")  # timesteps, or updates, of every cell instead of its own [STEPS]
    workers: int = whole_number("WORKERS", len(os.sched_getaffinity(0)))  # processes at once [WORKERS]
    batch: int = whole_number("BATCH", 10)  # most seeds of one process, for scripts with --num-seeds [BATCH]
    threads: int = 1  # threads of each process
    compile: bool = False  # add --compile where the script has it
    dry_run: bool = False  # print the commands, or the job array, and run nothing
    cells: bool = False  # print the cells that ENVS leaves, and run nothing
    root: Path = Path(os.path.relpath(Path(__file__).resolve().parent.parent))
    """folder of the scripts, which may also be in its benchmark/ or benchmark/peers/"""

    slurm: bool = False  # submit one job array instead of running here
    partition: str | None = None  # Slurm partition
    time: str | None = None
    """Slurm time limit of a task, some minutes at least; a run that comes near it is requeued and resumed"""
    notice: int = 120  # seconds before that limit at which a task has to save; longer than one update takes
    cpus_per_task: int = 1  # Slurm CPUs, and threads, of a task
    gpus_per_task: int = 0  # Slurm GPUs of a task
    array_limit: int | None = None  # most tasks at once
    task: str | None = None  # internal: I/N is task I of an array of N and runs every N-th job


class Job:
    """One process to run: a script and all its flags, --seed and --run-dir among them."""

    def __init__(self, script: Script, flags: list[str]):
        self.script, self.flags, self.process = script, flags, None
        self.settings = script.defaults | script.parse(flags)
        self.run_dir = Path(self.settings["run_dir"])
        self.log = Path(f"{self.run_dir}.log")
        first, count = int(self.settings["seed"]), self.settings.get("num_seeds", 1)
        seeds = range(first, first + count)
        self.seed_dirs = [self.run_dir / f"seed{seed}" for seed in seeds] if count > 1 else [self.run_dir]
        self.steps = self.settings[script.length] * count

    def finished(self) -> bool:
        return all((folder / "result.json").exists() for folder in self.seed_dirs)

    def state(self) -> str:
        """new, unfinished or finished. Raises CellError when the directory holds another run."""
        paths = [folder / name for folder in (self.run_dir, *self.seed_dirs) for name in ("args.json", "result.json")]
        files = [path for path in paths if path.exists()]
        if not files and self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise CellError(f"{self.run_dir} is in use, but there is no args.json in it")
        ours = {"script": self.script.name} | self.settings
        for file in files:
            try:
                saved = json.loads(file.read_text())
                theirs = self.script.defaults | saved["args"] | {"script": saved["script"]}  # a run may lack a new flag
            except (OSError, ValueError, KeyError, TypeError):
                raise CellError(f"{file} cannot be read") from None
            for key in ours.keys() - {"seed", *NOT_COMPARED}:
                if theirs[key] != ours[key] and (theirs[key] or ours[key]):  # {} is None
                    raise CellError(f"{file.parent} holds a run with {key} {theirs[key]}, not {ours[key]}")
        return "finished" if self.finished() else "unfinished" if files else "new"

    def starts_over(self) -> bool:
        return "resume" not in self.script.defaults and self.state() == "unfinished"

    def command(self, args: Args) -> list[str]:
        """What starts or resumes the run."""
        command, has = [sys.executable, str(self.script.path)], self.script.defaults
        if "resume" in has and self.state() == "unfinished":
            return [*command, "--resume", str(self.run_dir)]
        threads = ["--num-threads", str(args.threads)] if "num_threads" in has else []
        return [*command, *self.flags, *threads, *(["--compile"] if args.compile and "compile" in has else [])]

    def start(self, args: Args) -> bool:
        """Start the process, unless it has finished by now. False while another process has the run."""
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            try:  # The child inherits the open file as its output, and with it the lock, for as long as it lives.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.state() == "finished":
                return True
            command = self.command(args)
            if self.starts_over():
                shutil.rmtree(self.run_dir)
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # In a session of its own, so that Ctrl-C reaches the runner alone, which passes it on.
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        return True

    def steps_done(self) -> int:
        """Steps of all seeds up to the last row of curves.csv."""
        try:
            with (self.seed_dirs[0] / "curves.csv").open("rb") as file:
                file.seek(-min(file.seek(0, os.SEEK_END), 10_000), os.SEEK_END)
                last_row = file.read().splitlines()[-1]
            return min(int(last_row.split(b",")[0]) * len(self.seed_dirs), self.steps)
        except (OSError, ValueError, IndexError):
            return 0

    def failure(self) -> str:
        """How the process ended, with the tail of its log."""
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LOG_TAIL:]
        return "\n    ".join([f"failed: {self.run_dir}: {how}; the end of {self.log}:", *lines])

    def success(self) -> str:
        """The score of its seeds."""
        results = [json.loads((path / "result.json").read_text()) for path in self.seed_dirs]
        found = [result.get("eval_mean", result.get("eval_score")) for result in results]
        scores = [score for score in found if isinstance(score, float) and math.isfinite(score)]
        text = f"{statistics.mean(scores):.4g}" if scores else "unknown"
        if len(scores) > 1:
            text += f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.4g} (n {len(scores)})"
        return f"finished: {self.run_dir}: score {text}; log: {self.log}"


def batches(cell: Path, num_seeds: int, most: int) -> list[tuple[int, int]]:
    """(first, last) seed of each process: those that lie in cell already, then what is missing up to num_seeds."""
    found = [re.fullmatch(r"seeds?(\d+)(?:-(\d+))?", path.name) for path in cell.glob("seed*") if path.is_dir()]
    old = [(int(m[1]), int(m[2] or m[1])) for m in found if m and int(m[1]) <= num_seeds]
    taken, new = {seed for first, last in old for seed in range(first, last + 1)}, []
    for seed in (seed for seed in range(1, num_seeds + 1) if seed not in taken):
        if new and new[-1][1] == seed - 1 and seed - new[-1][0] < most:
            new[-1] = new[-1][0], seed
        else:
            new.append((seed, seed))
    return sorted(old + new)


def env_names(line: str) -> set[str]:
    """The names by which ENVS may call a cell's environment or data set: AlienNoFrameskip-v4 and Alien."""
    try:
        flags = pairwise(shlex.split(line))
    except ValueError:
        return set()  # expand() says what is wrong
    named = [value for flag, value in flags if flag in ("--env-id", "--dataset")]
    return {short for name in named for short in (name, Path(name).name, re.sub(r"(NoFrameskip)?-v\d+$", "", name))}


def part_of_label(key: str, value: bool | float | int | str | list) -> str:
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    if isinstance(value, float):
        return f"{key}{value:g}"
    if isinstance(value, list) or str(value).startswith("{"):  # JSON
        return key + "-".join(re.findall(r"[^\s\"'{}\[\]:,/]+", str(value)))
    return key + Path(str(value)).name


def expand(line: str, args: Args) -> list[Job]:
    """The jobs of a cell. A line that names its run directory is a job already."""
    name, *flags = shlex.split(line)
    script = Script(name, args.root)
    if "--run-dir" in flags:
        return [Job(script, flags)]
    num_seeds, flags = take_seeds(flags)
    num_seeds = args.seeds or num_seeds
    given = script.parse(flags)
    if "dataset" in script.defaults:
        env = Path(given.get("dataset") or script.defaults["dataset"]).name
    else:
        env = (given.get("env_id") or script.defaults["env_id"]).replace("/", "-")
    parts = [part_of_label(SHORT.get(k, k), v) for k, v in given.items() if k not in NOT_IN_LABEL]
    if args.steps:
        flags += [f"--{script.length.replace('_', '-')}", str(args.steps)]  # the last one counts
        parts.append(f"steps{args.steps}")
    cell = args.out / "__".join(filter(None, (env, name, "_".join(parts))))
    jobs = []
    for first, last in batches(cell, num_seeds, args.batch if "num_seeds" in script.defaults else 1):
        several = ["--num-seeds", str(last - first + 1)] if last > first else []
        folder = f"seeds{first}-{last}" if several else f"seed{first}"
        jobs.append(Job(script, [*flags, "--seed", str(first), *several, "--run-dir", str(cell / folder)]))
    return jobs


def run(jobs: list[Job], args: Args, finished: int = 0, failed: int = 0) -> int:
    """Run the jobs, WORKERS at a time, after finished and failed others. Returns the exit code."""
    signals, passed_on = [], 0
    stops = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in stops}
    before, waiting, running = finished, list(jobs), []

    def counts() -> str:
        ended = f"finished {finished} ({before} before), failed {failed}"
        return f"{ended}, running {len(running)}, waiting {len(waiting)}"

    steps = {job.run_dir: job.steps_done() for job in jobs}
    options = {"initial": sum(steps.values()), "smoothing": 0, "mininterval": 0.5 if sys.stderr.isatty() else 60}
    bar = tqdm(total=sum(job.steps for job in jobs), unit=" steps", unit_scale=True, **options)
    while running or (waiting and not signals):
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            if job.finished():
                finished += 1
                steps[job.run_dir] = job.steps
                bar.write(job.success())
            elif not signals:
                failed += 1
                bar.write(job.failure())
        for job in list(waiting):
            if signals or len(running) >= args.workers:
                break
            try:
                if not job.start(args):
                    continue  # another runner has it
                if job.process:
                    running.append(job)
                    bar.write(f"started: {job.run_dir}; log: {job.log}")
                else:
                    finished += 1
            except CellError as error:
                failed += 1
                bar.write(f"failed: {error}")
            waiting.remove(job)
        for number in signals[passed_on:]:
            # The first asks for a checkpoint: by SIGINT, because Slurm sends SIGTERM to the children itself, and a
            # second one would end them at once. A second Ctrl-C kills.
            if not passed_on or number == signal.SIGINT:
                for job in running:
                    job.process.send_signal(signal.SIGKILL if passed_on else signal.SIGINT)
            passed_on += 1
        bar.set_postfix_str(counts(), refresh=counts() != bar.postfix)
        steps |= {job.run_dir: job.steps_done() for job in running}
        bar.update(sum(steps.values()) - bar.n)
        time.sleep(0.2)
    bar.close()
    print(counts(), flush=True)
    for number, handler in handlers.items():  # a caller goes on
        signal.signal(number, handler)
    if not signals:
        return 1 if failed else 0
    print("stopped; the same command goes on", flush=True)
    if signal.SIGUSR1 in signals:  # the task's time limit is near
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return 130


# The list of jobs is fixed in the script, so that a requeued task finds its own again.
JOB_ARRAY = """#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --ntasks=1
#SBATCH --job-name={args.out.name}
#SBATCH --array=1-{tasks}{limit}
#SBATCH --cpus-per-task={args.cpus_per_task}
#SBATCH --output={args.out}/slurm-%A_%a.out
#SBATCH --signal=B:USR1@{args.notice}
{options}
exec {command} --task $SLURM_ARRAY_TASK_ID/{tasks} <<'JOBS'
{jobs}
JOBS
"""


def job_array(jobs: list[Job], args: Args) -> str:
    """The sbatch script of one array."""
    tasks, limit = min(len(jobs), MAX_ARRAY), f"%{args.array_limit}" if args.array_limit else ""
    given = {"partition": args.partition, "time": args.time, "gpus-per-task": args.gpus_per_task}
    options = "\n".join(f"#SBATCH --{name}={value}" for name, value in given.items() if value)
    command = [sys.executable, os.path.relpath(__file__), "--root", str(args.root), "--out", str(args.out)]
    command += ["--workers", "1", "--threads", str(args.cpus_per_task), *["--compile"] * args.compile]
    lines = "\n".join(shlex.join([job.script.name, *job.flags]) for job in jobs)
    return JOB_ARRAY.format(
        args=args, tasks=tasks, limit=limit, options=options, command=shlex.join(command), jobs=lines
    )


def hours(jobs: list[Job], args: Args) -> str:
    """How long the jobs take by the speeds of finished runs, below --out or else kept ones, and what that misses."""
    kept, own = speeds([Path(__file__).with_name("results")]), speeds([args.out])
    times, notes = [], defaultdict(set)
    for job in jobs:
        settings = job.settings | ({"compile": True} if args.compile and "compile" in job.settings else {})
        time, alike = seconds(kept | own, job.script.name, settings, job.steps)
        times.append(time or 0)
        if time is None:
            notes["not counted, since no finished run has measured its speed"].add(job.script.name)
        elif not alike:
            notes[f"measured only {'without' if args.compile else 'with'} --compile"].add(job.script.name)
        elif seconds(own, job.script.name, settings, job.steps)[0] is None:
            note = "at the speed of the finished runs in benchmark/results, not of this machine"
            notes[note].add(job.script.name)
    at_once = min(len(jobs), (args.array_limit or MAX_ARRAY) if args.slurm else args.workers)
    total = max(sum(times) / at_once, *times) / 3600
    texts = [f"{', '.join(sorted(scripts))}: {note}" for note, scripts in notes.items()]
    more = f" ({'; '.join(texts)}; a short run here, with STEPS and SEEDS=1, measures it)" if texts else ""
    return f"{f'{total:,.1f} hours' if total else 'hours unknown'} with {at_once} at once{more}"


def totals(jobs: list[Job], todo: list[Job], args: Args) -> str:
    """Runs, steps, what is finished, and hours, as a comment of the shell."""
    runs, left = (sum(len(job.seed_dirs) for job in some) for some in (jobs, todo))
    units = dict.fromkeys("updates" if job.script.length == "num_updates" else "steps" for job in jobs)
    text = f"# {runs} runs, {runs - left} of them finished; {left} to do in {len(todo)} processes, "
    text += f"{sum(job.steps for job in todo):,} {' and '.join(units)}"
    return f"{text}, {hours(todo, args)}" if todo else text


def read_cells(args: Args) -> list[str]:
    """The lines on standard input that ENVS leaves. Ends the program where they or the arguments are wrong."""
    lines = [line for line in map(str.strip, sys.stdin) if line]
    wanted, known = set(args.envs.split()), set().union(*map(env_names, lines))
    counts = [args.workers, args.batch, args.threads, args.cpus_per_task]
    counts += [args.array_limit, args.notice, args.seeds, args.steps]
    if not lines:
        fail("no cells on standard input; start a sweep such as benchmark/continuous_ppo.sh")
    if args.task:  # its list was narrowed before
        return lines
    if wanted - known:
        fail(f"ENVS: this sweep has no {' '.join(sorted(wanted - known))}")
    if any(count is not None and count < 1 for count in counts):
        fail("every number must be at least 1")
    if args.slurm and not args.dry_run and not shutil.which("sbatch"):
        fail("--slurm: there is no sbatch on this machine")
    return [line for line in lines if not wanted or env_names(line) & wanted]


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    lines = read_cells(args)
    if args.cells:
        print(*lines, sep="\n")
        return 0

    jobs, todo, failed = {}, [], 0
    for line in lines:
        try:
            jobs |= {job.run_dir: job for job in expand(line, args)}
        except ValueError as error:
            failed += 1
            print(f"failed: {line}: {error}", file=sys.stderr, flush=True)
    jobs = list(jobs.values())
    if args.task:
        index, count = map(int, args.task.split("/"))
        jobs = jobs[index - 1 :: count]
    finished = 0
    for job in jobs:
        try:
            if job.state() == "finished":
                finished += 1
            else:
                todo.append(job)
        except CellError as error:
            failed += 1
            print(f"failed: {error}", file=sys.stderr, flush=True)

    if args.dry_run:
        if args.slurm:
            print(job_array(todo, args), end="")
        else:
            for job in todo:
                print(f"rm -r {job.run_dir} && " * job.starts_over() + shlex.join(job.command(args)))
        print(totals(jobs, todo, args))
        return 1 if failed else 0
    if args.slurm:
        print(f"finished {finished} before, failed {failed}, to submit {len(todo)}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        if todo:
            failed += subprocess.run(["sbatch"], input=job_array(todo, args), text=True).returncode
        return 1 if failed else 0
    code = run(todo, args, finished, failed)
    if any(job.finished() for job in jobs):
        report = os.path.relpath(Path(__file__).with_name("report.py"))
        print(f"results: {args.out}; tables: {shlex.join([sys.executable, report, str(args.out)])}")
    return code


if __name__ == "__main__":
    sys.exit(main())
