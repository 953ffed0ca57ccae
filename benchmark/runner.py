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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from sweeps import NOT_COMPARED, CellError, Script, seconds, speeds, take_seeds

NOT_IN_LABEL = ("env_id", "dataset", "total_timesteps", "num_updates", *NOT_COMPARED)
SHORT = {"algo": "", "reward_noise_std": "noise", "reward_flip_prob": "flip"}  # in labels
SHORT |= {"policy": "", "reward_model": "", "base_precision": "", "target_coef": "target"}
MAX_ARRAY = 1000  # tasks; Slurm's default MaxArraySize is 1001
LOG_TAIL = 10  # lines


def whole_number(variable: str, default: int | None = None) -> int | None:
    value = os.environ.get(variable, "")
    if not value:
        return default
    if not value.isdigit():
        print(f"error: {variable} must be a whole number, not {value!r}", file=sys.stderr)
        sys.exit(2)
    return int(value)


@dataclass
class Args:
    out: Path = Path("runs/benchmark")
    """parent of all run directories"""
    seeds: int | None = whole_number("SEEDS")
    """seeds of every cell instead of its own number [SEEDS]"""
    envs: str = os.environ.get("ENVS", "")
    """only these environments or data sets, separated by spaces: Ant-v4 or Ant, AlienNoFrameskip-v4 or Alien [ENVS]"""
    steps: int | None = whole_number("STEPS")
    """total timesteps, or updates, of every cell instead of its own, in run directories that say so [STEPS]"""
    workers: int = whole_number("WORKERS", len(os.sched_getaffinity(0)))
    """processes at once [WORKERS]"""
    batch: int = whole_number("BATCH", 10)
    """most seeds of one process, for scripts with --num-seeds [BATCH]"""
    threads: int = 1
    """threads of each process"""
    compile: bool = False
    """add --compile where the script has it"""
    dry_run: bool = False
    """print the commands, or the job array, and run nothing"""
    root: Path = Path(os.path.relpath(Path(__file__).resolve().parent.parent))
    """folder of the scripts, which may also be in its benchmark/ or benchmark/peers/"""

    slurm: bool = False
    """submit one job array instead of running here"""
    partition: str | None = None
    """Slurm partition"""
    time: str | None = None
    """Slurm time limit of a task, some minutes at least; a run that comes near it is requeued and resumed"""
    notice: int = 120
    """seconds before that limit at which a task has to save; longer than one update takes"""
    cpus_per_task: int = 1
    """Slurm CPUs, and threads, of a task"""
    gpus_per_task: int = 0
    """Slurm GPUs of a task"""
    array_limit: int | None = None
    """most tasks at once"""
    task: str | None = None
    """internal: I/N is task I of an array of N and runs every N-th job"""


class Job:
    """One process to run: a script and all its flags, --seed and --run-dir among them."""

    def __init__(self, script: Script, flags: list[str]):
        self.script, self.flags, self.given = script, flags, script.parse(flags)
        self.run_dir = Path(self.given["run_dir"])
        self.log = Path(f"{self.run_dir}.log")
        first, count = int(self.given["seed"]), self.given.get("num_seeds", 1)
        seeds = range(first, first + count)
        self.seed_dirs = {seed: self.run_dir / f"seed{seed}" if count > 1 else self.run_dir for seed in seeds}
        self.steps = (script.defaults | self.given)[script.length] * count
        self.steps_before, self.process = 0, None

    def state(self) -> str:
        """new, unfinished or finished. Raises CellError when the directory holds another run."""
        finished = [path / "result.json" for path in self.seed_dirs.values() if (path / "result.json").exists()]
        begun = [path / "args.json" for path in (self.run_dir, *self.seed_dirs.values())]
        held = [*finished, *(path for path in begun if path.exists())]
        if not held and self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise CellError(f"{self.run_dir} is in use, but there is no args.json in it")
        ours = {"script": self.script.name} | self.script.defaults | self.given
        for file in held:
            try:
                saved = json.loads(file.read_text())
                theirs = {"script": saved["script"]} | saved["args"]
            except (OSError, ValueError, KeyError, TypeError):
                raise CellError(f"{file} cannot be read") from None
            for key, value in ours.items():
                their = theirs.get(key, self.script.defaults.get(key))  # a run older than a flag has its default
                if key not in ("seed", *NOT_COMPARED) and their != value:
                    raise CellError(f"{file.parent} holds a run with {key} {their}, not {value}")
        if len(finished) == len(self.seed_dirs):
            return "finished"
        return "unfinished" if held else "new"

    def has_finished(self) -> bool:
        try:
            return self.state() == "finished"
        except CellError:
            return False

    def starts_over(self) -> bool:
        return "resume" not in self.script.defaults and self.state() == "unfinished"

    def command(self, args: Args) -> list[str]:
        """What starts or resumes the run."""
        command, has = [sys.executable, str(self.script.path)], self.script.defaults
        if self.state() == "unfinished" and "resume" in has:
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
            self.steps_before = self.steps_done()
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
                start_new_session=True,  # Ctrl-C reaches the runner alone, which passes it on
            )
        return True

    def steps_done(self) -> int:
        """Steps of all seeds up to the last row of curves.csv."""
        try:
            rows = (next(iter(self.seed_dirs.values())) / "curves.csv").read_text().splitlines()
            return int(rows[-1].split(",")[0]) * len(self.seed_dirs)
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
        results = [json.loads((path / "result.json").read_text()) for path in self.seed_dirs.values()]
        found = [result.get("eval_mean", result.get("eval_score")) for result in results]
        scores = [score for score in found if isinstance(score, float) and math.isfinite(score)]
        mean = f"{statistics.mean(scores):.4g}" if scores else "unknown"
        se = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.4g} (n {len(scores)})" if len(scores) > 1 else ""
        return f"finished: {self.run_dir}: score {mean}{se}; log: {self.log}"

    def seconds(self, speed: dict, compile: bool) -> tuple[float | None, bool]:
        """How long the whole of it takes, by the speeds of finished runs."""
        compiled = {"compile": True} if compile and "compile" in self.script.defaults else {}
        return seconds(speed, self.script.name, self.script.defaults | self.given | compiled, self.steps)


def batches(cell: Path, num_seeds: int, most: int) -> list[tuple[int, int]]:
    """(first, last) seed of each process: those that lie in cell already, then what is missing up to num_seeds."""
    found = [re.fullmatch(r"seeds?(\d+)(?:-(\d+))?", path.name) for path in cell.glob("seed*") if path.is_dir()]
    ranges = [(int(m[1]), int(m[2] or m[1])) for m in found if m and int(m[1]) <= num_seeds]
    taken = {seed for first, last in ranges for seed in range(first, last + 1)}
    seed = 1
    while seed <= num_seeds:
        last = seed
        while last < min(num_seeds, seed + most - 1) and last + 1 not in taken:
            last += 1
        if seed not in taken:
            ranges.append((seed, last))
            seed = last
        seed += 1
    return sorted(ranges)


def env_names(line: str) -> set[str]:
    """The names by which ENVS may call a cell's environment or data set: AlienNoFrameskip-v4 and Alien."""
    try:
        words = shlex.split(line)
    except ValueError:
        return set()  # expand() says what is wrong
    env_ids = [value for flag, value in pairwise(words) if flag == "--env-id"]
    data = [value for flag, value in pairwise(words) if flag == "--dataset"]
    return {*env_ids, *(re.sub(r"(NoFrameskip)?-v\d+$", "", e) for e in env_ids), *data, *(Path(d).name for d in data)}


def part_of_label(key: str, value: bool | float | int | str | list) -> str:
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    if isinstance(value, list):
        return key + "-".join(value)
    return key + (f"{value:g}" if isinstance(value, float) else Path(str(value)).name)


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
        length = f"--{script.length.replace('_', '-')}"
        if length in flags:
            i = flags.index(length)
            del flags[i : i + 2]
        flags += [length, str(args.steps)]
        parts.append(f"steps{args.steps}")
    cell = args.out / "__".join(filter(None, (env, name, "_".join(parts))))
    jobs = []
    for first, last in batches(cell, num_seeds, args.batch if "num_seeds" in script.defaults else 1):
        several = ["--num-seeds", str(last - first + 1)] if last > first else []
        folder = f"seeds{first}-{last}" if several else f"seed{first}"
        jobs.append(Job(script, [*flags, "--seed", str(first), *several, "--run-dir", str(cell / folder)]))
    return jobs


class Progress:
    """One line: redrawn in place on a terminal, printed when it changes or a minute has passed otherwise."""

    def __init__(self, jobs: list[Job]):
        self.total, self.begin = sum(job.steps for job in jobs), time.monotonic()
        self.terminal, self.shown, self.shown_at = sys.stdout.isatty(), "", 0.0

    def say(self, message: str) -> None:
        print(("\r\x1b[K" if self.terminal else "") + message, flush=True)

    def show(self, status: str, running: list[Job], waiting: list[Job], ended: list[Job]) -> None:
        now = time.monotonic()
        if status == self.shown and now - self.shown_at < (1 if self.terminal else 60):
            return
        self.shown, self.shown_at = status, now
        new = sum(max(0, job.steps_done() - job.steps_before) for job in [*running, *ended])
        todo = sum(job.steps - job.steps_done() for job in running) + sum(job.steps for job in waiting)
        if new and todo > 0:
            left = int((now - self.begin) * todo / new)
            status += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        if self.terminal:
            done = 1 - todo / max(1, self.total)
            print(f"\r[{'#' * int(20 * done):20}] {status}\x1b[K", end="", flush=True)
        else:
            print(status, flush=True)


def run(jobs: list[Job], args: Args, finished: int, failed: int) -> int:
    """Run the jobs, WORKERS at a time, after finished and failed others. Returns the exit code."""
    signals, passed_on = [], 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    before, waiting, running, ended, progress = finished, list(jobs), [], [], Progress(jobs)
    while True:
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            if job.has_finished():
                finished += 1
                ended.append(job)
                progress.say(job.success())
            elif not signals:
                failed += 1
                progress.say(job.failure())
        for job in list(waiting):
            if signals or len(running) >= args.workers:
                break
            try:
                if not job.start(args):
                    continue
                if job.process:
                    running.append(job)
                    progress.say(f"started: {job.run_dir}; log: {job.log}")
                else:
                    finished += 1
            except CellError as error:
                failed += 1
                progress.say(f"failed: {error}")
            waiting.remove(job)
        for number in signals[passed_on:]:
            # The first asks for a checkpoint: by SIGINT, because Slurm sends SIGTERM to the children itself, and a
            # second one would end them at once. A second Ctrl-C kills.
            if not passed_on or number == signal.SIGINT:
                for job in running:
                    job.process.send_signal(signal.SIGKILL if passed_on else signal.SIGINT)
            passed_on += 1
        counts = f"finished {finished} ({before} before), failed {failed}, running {len(running)}"
        progress.show(f"{counts}, waiting {len(waiting)}", running, waiting, ended)
        if not running and (signals or not waiting):
            break
        time.sleep(0.2)
    if progress.terminal:
        print()
    if finished:
        report = os.path.relpath(Path(__file__).with_name("report.py"))
        print(f"results: {args.out}; tables: {shlex.join([sys.executable, report, str(args.out)])}", flush=True)
    if not signals:
        return 1 if failed else 0
    print("stopped; the same command goes on", flush=True)
    if signal.SIGUSR1 in signals:  # the task's time limit is near
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return 130


def job_array(jobs: list[Job], args: Args) -> str:
    """The sbatch script of one array. Its list of jobs is fixed here, so that a requeued task finds its own again."""
    tasks = min(len(jobs), MAX_ARRAY)
    options = {
        "job-name": args.out.name,
        "array": f"1-{tasks}" + (f"%{args.array_limit}" if args.array_limit else ""),
        "partition": args.partition,
        "time": args.time,
        "ntasks": 1,
        "cpus-per-task": args.cpus_per_task,
        "gpus-per-task": args.gpus_per_task or None,
        "output": args.out / "slurm-%A_%a.out",
        "open-mode": "append",
        "signal": f"B:USR1@{args.notice}",
    }
    header = ["#!/bin/bash", "#SBATCH --requeue"]
    header += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, os.path.relpath(__file__), "--root", str(args.root), "--workers", "1"]
    command += ["--threads", str(args.cpus_per_task), *(["--compile"] if args.compile else [])]
    body = [f"exec {shlex.join(command)} --task $SLURM_ARRAY_TASK_ID/{tasks} <<'JOBS'"]
    body += [shlex.join([job.script.name, *job.flags]) for job in jobs]
    return "\n".join([*header, *body, "JOBS"]) + "\n"


def totals(jobs: list[Job], todo: list[Job], args: Args) -> str:
    """Runs, steps, what is finished, and hours on this machine, as a comment of the shell."""
    here, kept = speeds([args.out]), speeds([Path(__file__).with_name("results")])
    times, elsewhere, unlike, unknown = [], set(), set(), set()  # the sets are of scripts
    for job in todo:
        (own, alike), (other, other_alike) = (job.seconds(speed, args.compile) for speed in (here, kept))
        if own is None:
            (unknown if other is None else elsewhere).add(job.script.name)
        if not (alike if own else other_alike):
            unlike.add(job.script.name)
        times.append(own or other or 0)
    at_once = min(len(todo), (args.array_limit or MAX_ARRAY) if args.slurm else args.workers)
    runs, left = (sum(len(job.seed_dirs) for job in some) for some in (jobs, todo))
    units = dict.fromkeys("updates" if job.script.length == "num_updates" else "steps" for job in jobs)
    text = f"# {runs} runs, {runs - left} of them finished; {left} to do in {len(todo)} processes, "
    text += f"{sum(job.steps for job in todo):,} {' and '.join(units)}"
    if todo:
        time = max(sum(times) / at_once, *times)
        hours = "hours unknown" if unknown and not time else f"{time / 3600:,.1f} hours"
        text += f", {hours} with {at_once} at once"
    for scripts, why in (
        (elsewhere, "at the speed of the finished runs in benchmark/results, not of this machine"),
        (unlike, f"known only {'without' if args.compile else 'with'} --compile"),
        (unknown, "not in the hours, no finished run tells its speed"),
    ):
        if scripts:
            text += f" ({', '.join(sorted(scripts))}: {why}; a short run here, with STEPS and SEEDS=1, tells)"
    return text


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    lines = [line for line in map(str.strip, sys.stdin) if line]
    wanted, known = set(args.envs.split()), set().union(*map(env_names, lines))
    counts = [args.workers, args.batch, args.threads, args.cpus_per_task]
    counts += [args.array_limit, args.notice, args.seeds, args.steps]
    for wrong, message in (
        (not lines, "no cells on standard input; start a sweep such as benchmark/continuous_ppo.sh"),
        (wanted - known and not args.task, f"ENVS: this sweep has no {' '.join(sorted(wanted - known))}"),
        (any(count is not None and count < 1 for count in counts), "every number must be at least 1"),
        (args.slurm and not args.dry_run and not shutil.which("sbatch"), "--slurm: there is no sbatch on this machine"),
    ):
        if wrong:
            print(f"error: {message}", file=sys.stderr)
            return 2
    if wanted and not args.task:
        lines = [line for line in lines if env_names(line) & wanted]

    jobs, todo, finished, failed = {}, [], 0, 0
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
    for job in jobs:
        try:
            if job.state() == "finished":
                finished += 1
            else:
                todo.append(job)
        except CellError as error:
            failed += 1
            print(f"failed: {error}", file=sys.stderr, flush=True)
    if not args.slurm and not args.dry_run:
        return run(todo, args, finished, failed)
    if args.dry_run:
        commands = [(f"rm -r {job.run_dir} && " * job.starts_over()) + shlex.join(job.command(args)) for job in todo]
        print(job_array(todo, args) if args.slurm else "".join(f"{command}\n" for command in commands), end="")
        print(totals(jobs, todo, args))
    else:
        print(f"finished {finished} before, failed {failed}, to submit {len(todo)}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        if todo and subprocess.run(["sbatch"], input=job_array(todo, args), text=True).returncode:
            return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
