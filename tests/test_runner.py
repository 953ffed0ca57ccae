"""The runner against small fake scripts, the cells of every sweep against Tables 5 to 7, and two sweeps for real."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from peers import sb3_baseline
from peers.sb3_baseline import Discretized, NoisyReward
from runner import batches
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from sweeps import SWEEPS, Script, cells, seconds, speeds, take_seeds

from sppo_continuous_discretized import EVALUATION, action_bins, make_env

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "benchmark" / "runner.py"
NARROWING = ("SEEDS", "ENVS", "STEPS", "WORKERS", "BATCH", "TASKS", "DATASET", "POLICY", "REWARD_MODEL", "FLAGS")
NARROWING += ("BASE_PRECISION", "CONTROL", "TABLE")

FAKE = """
import argparse, json, os, signal, sys, threading, time
from pathlib import Path

class Args:
    env_id: str = "Toy-v0"
    total_timesteps: int = 10
    seed: int = 1
    num_seeds: int = 1
    beta: float = 1.0
    norm_adv: bool = True
    run_dir: str = None
    resume: str = None
    compile: bool = False
    num_threads: int = os.cpu_count()

parser = argparse.ArgumentParser()
for name in Args.__annotations__:
    if name not in ("norm_adv", "compile"):
        default = getattr(Args, name)
        parser.add_argument("--" + name.replace("_", "-"), default=default, type=type(default) if default else str)
parser.add_argument("--no-norm-adv", dest="norm_adv", action="store_false")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()
run_dir = Path(args.resume or args.run_dir)
if not args.resume:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f".{os.getpid()}")  # as in the scripts: another runner sees all or nothing
    temporary.mkdir()
    (temporary / "args.json").write_text(json.dumps({"script": Path(__file__).stem, "args": vars(args)}))
    os.replace(temporary, run_dir)
saved = json.loads((run_dir / "args.json").read_text())
first, count = saved["args"]["seed"], saved["args"].get("num_seeds", 1)
folders = {seed: run_dir / f"seed{seed}" if count > 1 else run_dir for seed in range(first, first + count)}
with (run_dir / "history").open("a") as history:
    history.write(f"{'resume' if args.resume else 'start'} {os.getpid()}\\n")
stopped = threading.Event()
def finish(but=None):
    for seed, folder in folders.items():
        folder.mkdir(exist_ok=True)
        result = saved | {"seed": seed, "eval_mean": 10.0 * seed, "env_id": saved["args"].get("env_id"), "sps": 2.0}
        if seed != but:
            (folder / "result.json").write_text(json.dumps(result | {"wall_seconds": first + 0.5 + seed / 10_000}))
"""
FAKES = {
    "succeed": "finish()",
    "crash": "print('\\n'.join(f'line {i}' for i in range(40)), flush=True); sys.exit('boom')",
    "diverge": "finish(but=2); sys.exit('error: seed 2: the loss is not finite')",
    # Killed at first; --resume finishes.
    "killed": "finish() if args.resume else os.kill(os.getpid(), signal.SIGKILL)",
    # Waits for the file go in the working directory, and ends with a checkpoint on SIGINT and SIGTERM.
    "wait": """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stopped.set())
(run_dir / "ready").touch()
while not Path("go").exists() and not stopped.is_set():
    time.sleep(0.02)
if stopped.is_set():
    (run_dir / "checkpoint.pt").touch()
    sys.exit(130)
time.sleep(0.3)
finish()""",
    "hang": """
signal.signal(signal.SIGINT, lambda *_: (run_dir / "asked").touch())
(run_dir / "ready").touch()
while True: time.sleep(1)""",
}
ONE_BY_ONE = FAKE.replace("    num_seeds: int = 1\n", "")
NO_RESUME = ONE_BY_ONE.replace("    resume: str = None\n", "").replace("args.resume", "None")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A working directory that holds the fake scripts."""
    monkeypatch.chdir(tmp_path)
    for name in NARROWING:
        monkeypatch.delenv(name, raising=False)
    for name, body in FAKES.items():
        (tmp_path / f"{name}.py").write_text(FAKE + body)
    (tmp_path / "single.py").write_text(ONE_BY_ONE + FAKES["succeed"])
    (tmp_path / "restart.py").write_text(NO_RESUME + "time.sleep(0) if Path('go').exists() else sys.exit(1)\nfinish()")
    return tmp_path


def launch(cells, *flags, **environment):
    command = [sys.executable, str(RUNNER), "--root", ".", "--out", "runs", *flags]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, env=os.environ | environment, **streams)
    process.stdin.write("\n".join(cells) + "\n")
    process.stdin.close()
    process.stdin = None  # for communicate()
    return process


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def run(cells, *flags, **environment):
    return finish(launch(cells, *flags, **environment))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count(folder, name):
    """Files of that name below folder; unlike rglob it does not mind folders that come and go meanwhile."""
    return sum(name in files for _, _, files in os.walk(folder))


def history(run_dir):
    """["start", "resume", ...]: how often the run was launched, and how."""
    return [line.split()[0] for line in (run_dir / "history").read_text().splitlines()]


def pid(run_dir):
    return int((run_dir / "history").read_text().split()[-1])


def test_runs_every_cell_once_and_skips_what_is_finished(fake):
    cells = ["single --env-id Ant-v4 --beta 20 --no-norm-adv --seeds 2", "succeed --env-id ALE/Pong-v5 --seeds 5"]
    code, output = run(cells, "--workers", "2", "--batch", "2")
    single, batched = fake / "runs/Ant-v4__single__beta20_no_norm_adv", fake / "runs/ALE-Pong-v5__succeed"
    assert code == 0 and "finished 5 (0 before), failed 0, running 0, waiting 0" in output, output
    folders = ["seeds1-2/seed1", "seeds1-2/seed2", "seeds3-4/seed3", "seeds3-4/seed4", "seed5"]
    expected = {single / "seed1", single / "seed2", *(batched / folder for folder in folders)}
    assert {path.parent for path in fake.rglob("result.json")} == expected
    assert json.loads((single / "seed2/args.json").read_text())["args"]["norm_adv"] is False

    code, output = run(cells, "--batch", "3", SEEDS="7")
    assert code == 0 and "finished 11 (5 before), failed 0" in output, output
    assert (batched / "seeds6-7/seed7/result.json").exists()
    assert all(history(path.parent) == ["start"] for path in fake.rglob("history"))


@pytest.mark.parametrize(
    ("existing", "num_seeds", "most", "expected"),
    [
        ([], 1, 10, [(1, 1)]),
        ([], 25, 10, [(1, 10), (11, 20), (21, 25)]),
        (["seeds1-10"], 5, 10, [(1, 10)]),
        (["seed1", "seed1.log"], 12, 10, [(1, 1), (2, 11), (12, 12)]),
        (["seeds4-6"], 9, 10, [(1, 3), (4, 6), (7, 9)]),
        ([], 3, 1, [(1, 1), (2, 2), (3, 3)]),
    ],
)
def test_batches_complete_what_exists(tmp_path, existing, num_seeds, most, expected):
    for name in existing:
        (tmp_path / name).touch() if name.endswith(".log") else (tmp_path / name).mkdir()
    assert batches(tmp_path, num_seeds, most) == expected


def test_a_crash_is_reported_with_the_end_of_its_log_and_stops_nothing(fake):
    code, output = run(["crash", "succeed"], "--workers", "1")
    assert code == 1 and "finished 1 (0 before), failed 1, running 0, waiting 0" in output, output
    assert "failed: runs/Toy-v0__crash/seed1: exit code 1" in output
    assert "    line 39\n    boom\n" in output and "line 20" not in output
    assert "line 0\n" in (fake / "runs/Toy-v0__crash/seed1.log").read_text()


def test_a_killed_run_is_reported_and_resumed(fake):
    code, output = run(["killed --seeds 2"])
    assert code == 1 and "seeds1-2: killed by SIGKILL" in output, output
    code, output = run(["killed --seeds 2"], "--dry-run")
    assert code == 0
    assert shlex.split(output, comments=True)[1:] == ["killed.py", "--resume", "runs/Toy-v0__killed/seeds1-2"]
    code, output = run(["killed --seeds 2"])
    assert code == 0, output
    assert history(fake / "runs/Toy-v0__killed/seeds1-2") == ["start", "resume"]


def test_a_seed_that_diverged_is_reported_again_and_the_others_are_kept(fake):
    for launches in (["start"], ["start", "resume"]):
        code, output = run(["diverge --seeds 3"])
        assert code == 1 and "failed: runs/Toy-v0__diverge/seeds1-3: exit code 1" in output, output
        assert "    error: seed 2: the loss is not finite\n" in output
        assert history(fake / "runs/Toy-v0__diverge/seeds1-3") == launches
        assert sorted(path.parent.name for path in fake.rglob("result.json")) == ["seed1", "seed3"]


def test_runs_of_the_former_layout_are_finished(fake):
    """args.json in every seed's directory, none in their parent."""
    args = {"env_id": "Toy-v0", "total_timesteps": 10, "num_seeds": 1, "beta": 1.0, "norm_adv": True}
    for seed in (1, 2):
        (run_dir := fake / f"runs/Toy-v0__succeed/seeds1-2/seed{seed}").mkdir(parents=True)
        for name in ("args.json", "result.json"):
            (run_dir / name).write_text(json.dumps({"script": "succeed", "args": args | {"seed": seed}}))
    assert "finished 2 (1 before)" in run(["succeed --seeds 3"])[1]
    job = "succeed --seed 1 --num-seeds 2 --beta 2 --run-dir runs/Toy-v0__succeed/seeds1-2"
    assert "seeds1-2/seed1 holds a run with beta 1.0, not 2.0" in run([job])[1]


def test_a_changed_copy_runs_as_the_original_does(fake):
    (fake / "my_loss.py").write_text((fake / "succeed.py").read_text().replace("beta: float = 1.0", "tau: float = 0.5"))
    code, output = run(["my_loss --seeds 5 --env-id Hopper-v4 --tau 0.1"])
    assert code == 0 and "finished 1 (0 before), failed 0" in output, output
    result = json.loads((fake / "runs/Hopper-v4__my_loss__tau0.1/seeds1-5/seed5/result.json").read_text())
    assert (result["script"], result["seed"], result["args"]["tau"]) == ("my_loss", 5, 0.1)


def test_a_sweep_names_cells_scores_and_logs_and_says_how_to_go_on(fake):
    _, output = run(["succeed --seeds 3", "single --env-id Ant-v4"])
    lines = output.splitlines()
    for cell, score in (("Toy-v0__succeed/seeds1-3", "20 ± 5.774 (n 3)"), ("Ant-v4__single/seed1", "10")):
        assert f"started: runs/{cell}; log: runs/{cell}.log" in lines
        assert f"finished: runs/{cell}: score {score}; log: runs/{cell}.log" in lines
    tables = shlex.split(lines[-1].removeprefix("results: runs; tables: "))
    assert Path(tables[1]).resolve() == ROOT / "benchmark" / "report.py" and tables[2] == "runs"


def test_a_script_without_resume_starts_over(fake):
    assert run(["restart"])[0] == 1
    assert run(["restart"], "--dry-run")[1].startswith("rm -r runs/Toy-v0__restart/seed1 && ")
    (fake / "go").touch()
    assert run(["restart"])[0] == 0
    assert history(fake / "runs/Toy-v0__restart/seed1") == ["start"]


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_goes_on(fake):
    run_dir = fake / "runs/Toy-v0__wait/seed1"
    runner = launch(["wait", "succeed"], "--workers", "1")
    wait_for(lambda: (run_dir / "ready").exists())
    runner.send_signal(signal.SIGINT)
    code, output = finish(runner)
    assert code == 130 and "stopped" in output and "failed:" not in output, output
    assert (run_dir / "checkpoint.pt").exists() and not (fake / "runs/Toy-v0__succeed").exists()
    (fake / "go").touch()
    assert run(["wait", "succeed"])[0] == 0
    assert history(run_dir) == ["start", "resume"]


def test_a_second_ctrl_c_kills_what_hangs(fake):
    run_dir = fake / "runs/Toy-v0__hang/seed1"
    runner = launch(["hang"])
    wait_for(lambda: (run_dir / "ready").exists())
    runner.send_signal(signal.SIGINT)
    wait_for(lambda: (run_dir / "asked").exists())
    assert runner.poll() is None
    runner.send_signal(signal.SIGINT)
    assert finish(runner)[0] == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid(run_dir), 0)


def test_two_runners_share_a_sweep(fake):
    cells = ["wait --seeds 4", "succeed --seeds 4"]
    runners = [launch(cells, "--workers", "2", "--batch", "1") for _ in range(2)]
    wait_for(lambda: count(fake, "history") >= 4)
    (fake / "go").touch()
    for runner in runners:
        code, output = finish(runner)
        assert code == 0 and "failed 0, running 0, waiting 0" in output, output
    assert len(list(fake.rglob("result.json"))) == 8
    assert all(history(path.parent) == ["start"] for path in fake.rglob("history"))


def test_a_run_outlives_its_killed_runner_and_its_own_death_frees_it(fake):
    run_dir = fake / "runs/Toy-v0__wait/seed1"
    first = launch(["wait"])
    wait_for(lambda: (run_dir / "history").exists())
    first.kill()
    first.communicate()
    second = launch(["wait"])
    shown = ""
    while "running 0, waiting 1" not in shown:  # in a line that is not ended
        shown += second.stdout.read(1)
    assert second.poll() is None and history(run_dir) == ["start"]
    os.kill(pid(run_dir), signal.SIGKILL)
    wait_for(lambda: history(run_dir) == ["start", "resume"])
    (fake / "go").touch()
    assert finish(second)[0] == 0


def test_another_run_in_the_directory_is_an_error(fake):
    assert run(["succeed --total-timesteps 10"])[0] == 0
    (fake / "runs/Toy-v0__succeed__beta2/seed1").mkdir(parents=True)
    (fake / "runs/Toy-v0__succeed__beta2/seed1/notes").touch()
    wrong = ["--total-timesteps 20", "--beta 2", "--beta 3", "--gamma 1", "'"]
    code, output = run([*(f"succeed {flags}" for flags in wrong), "none"])
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("failed:")]
    assert errors == [
        "failed: succeed --gamma 1: succeed.py has no flag --gamma, or the flag has no value",
        "failed: succeed ': No closing quotation",
        "failed: none: there is no none.py in ., benchmark, benchmark/peers",
        "failed: runs/Toy-v0__succeed/seed1 holds a run with total_timesteps 10, not 20",
        "failed: runs/Toy-v0__succeed__beta2/seed1 is in use, but there is no args.json in it",
    ]
    assert "finished 1 (0 before), failed 5, running 0, waiting 0" in output


def test_language_cells_go_by_data_set_and_updates(fake):
    settings = '''    targets: tuple = ("q", "v")
    policy: str = "hub/gpt2"
    env_kwargs: str = "{}"
    dataset: str = "hub/imdb"'''
    language = ONE_BY_ONE.replace("total_timesteps", "num_updates").replace('    env_id: str = "Toy-v0"', settings)
    language = language.replace('type=type(default) if default else str)', 'type=type(default) if default else str, '
                                'nargs="+" if name == "targets" else None)')  # fmt: skip
    (fake / "lm.py").write_text(language + "finish()")
    cells = ["lm --seeds 2 --num-updates 60", "lm --dataset some/reviews --policy some/small --num-updates 60 --beta 2"]
    code, output = run(cells, STEPS="3")
    assert code == 0 and "finished 3 (0 before)" in output, output
    assert {path.name for path in (fake / "runs").iterdir()} == {"imdb__lm__steps3", "reviews__lm__small_beta2_steps3"}
    saved = json.loads((fake / "runs/imdb__lm__steps3/seed2/args.json").read_text())["args"]
    assert saved["num_updates"] == 3
    for name in ("reviews", "some/reviews"):
        assert "finished 1 (1 before)" in run(cells, ENVS=name, STEPS="3")[1]
    cells = ["lm --num-updates 3 --targets q k", """lm --env-kwargs '{"size": 3}' --num-updates 3 --targets q v"""]
    _, output = run(cells, "--dry-run")
    assert re.findall(r"runs/(.*?)/", output) == ["imdb__lm__targetsq-k", "imdb__lm__env_kwargssize-3_targetsq-v"]
    code, output = run(["lm --dataset other/reviews --policy some/small --num-updates 3 --beta 2"], STEPS="3")
    assert code == 1 and "holds a run with dataset some/reviews, not other/reviews" in output


def test_defaults_are_compared_and_the_number_of_threads_is_not(fake):
    assert run(["succeed"], "--threads", "1")[0] == 0
    assert "(1 before)" in run(["succeed"], "--threads", "2")[1]
    script = fake / "succeed.py"
    script.write_text(script.read_text().replace("norm_adv: bool = True", "norm_adv: bool = False"))
    code, output = run(["succeed"])
    assert code == 1 and "holds a run with norm_adv True, not False" in output


def test_dry_run_prints_commands_that_run_as_they_are(fake):
    code, output = run(["single --seeds 2", "succeed --seeds 3"], "--dry-run", STEPS="5")
    lines = output.splitlines()
    assert code == 0 and len(lines) == 4 and not (fake / "runs").exists()
    for line in lines:
        subprocess.run(line, shell=True, check=True)
    assert len(list(fake.glob("runs/*__steps5/**/result.json"))) == 5
    code, output = run(["single --seeds 2", "succeed --seeds 3"], "--dry-run", STEPS="5")
    assert (code, output) == (0, "# 5 runs, 5 of them finished; 0 to do in 0 processes, 0 steps\n")


def test_a_dry_run_ends_with_totals(fake):
    cells = ["succeed --seeds 3 --total-timesteps 360000", "single --seeds 2"]
    totals = run(cells, "--dry-run", "--workers", "1")[1].splitlines()[-1]
    assert totals.startswith(
        "# 5 runs, 0 of them finished; 5 to do in 3 processes, 1,080,020 steps, hours unknown with 1 at"
    )
    assert "(single, succeed: not counted, since no finished run has measured its speed; a short run here" in totals
    assert run(cells, STEPS="4")[0] == 0  # three seeds in one process at 2 steps per second each
    assert run(cells[1:])[0] == 0
    totals = run(cells, "--dry-run", "--workers", "1")[1].splitlines()[-1]
    assert totals == "# 5 runs, 2 of them finished; 3 to do in 1 processes, 1,080,000 steps, 50.0 hours with 1 at once"
    # two processes of 50 and 75 hours: two at once end with the longer one
    two = [cells[0], "succeed --total-timesteps 360000 --beta 2 --seeds 2"]
    totals = run(two, "--dry-run", "--workers", "2")[1]
    assert "5 to do in 2 processes, 1,800,000 steps, 50.0 hours with 2 at once" in totals
    totals = run(cells, "--dry-run", "--compile", "--workers", "1")[1].splitlines()[-1]
    assert "50.0 hours with 1 at once (succeed: measured only without --compile;" in totals


def test_a_speed_is_that_of_all_agents_of_a_process_and_knows_compile_and_the_baselines_algorithm(tmp_path):
    def write(name: str, sps: float, script="sppo_continuous_discretized", seeds=(1, 2, 3), **args) -> None:
        for seed in seeds:  # whose files are written one after the other
            folder = tmp_path / name / f"seed{seed}"
            folder.mkdir(parents=True)
            times = {"sps": sps, "wall_seconds": 100 + seed / 1000}
            result = {"script": script, "env_id": "Hopper-v4", "seed": seed, "args": args} | times
            (folder / "result.json").write_text(json.dumps(result))

    write("compiled", 700.123, compile=True)
    write("eager", 500.0, compile=False)
    write("eager", 250.0, compile=False, seeds=(4, 5))  # a second process, in the same folder
    write("ppo", 600.0, "sb3_baseline", algo="ppo", seeds=(1,))
    write("a2c", 2000.0, "sb3_baseline", algo="a2c", seeds=(1,))
    speed = speeds([tmp_path])
    for script, args, rate in (
        ("sppo_continuous_discretized", {"compile": True}, 3 * 700.123),
        ("sppo_continuous_discretized", {}, (3 * 500 + 2 * 250) / 2),  # the median of two
        ("sb3_baseline", {"algo": "ppo"}, 600),
        ("sb3_baseline", {"algo": "a2c"}, 2000),
    ):
        assert seconds(speed, script, args | {"env_id": "Hopper-v4"}, 10**6) == (pytest.approx(10**6 / rate), True)
    del speed["sppo_continuous_discretized", "", True, "Hopper-v4"], speed["sppo_continuous_discretized", "", True, ""]
    asked = {"env_id": "Hopper-v4", "compile": True}
    assert seconds(speed, "sppo_continuous_discretized", asked, 1000) == (1.0, False)
    assert seconds(speed, "sa2c_continuous_discretized", asked, 1000) == (None, True)


@pytest.mark.parametrize(
    ("name", "narrowing", "expected"),
    [
        ("continuous_ppo", {"TABLE": "13", "ENVS": "Ant Hopper-v4"}, 6),
        ("continuous_ppo", {"TABLE": "12", "CONTROL": "1"}, 36),
        ("continuous_a2c", {"TABLE": "10"}, 27),
        ("atari_ppo", {"ENVS": "Alien"}, 6),
        ("beta_sensitivity", {"ENVS": "AlienNoFrameskip-v4"}, 12),
        ("sign_flips", {"ENVS": "Ant", "TABLE": ""}, 1),
        ("rlhf_tldr", {"ENVS": "openai_summarize_tldr"}, 2),
        ("advantage_norm", {"ENVS": "imdb"}, 2),
    ],
)
def test_cells_are_narrowed(tmp_path, name, narrowing, expected):
    listed = sweep(name, tmp_path, "--cells", **narrowing).stdout.splitlines()
    assert len(listed) == expected
    noise = {"12": 0, "10": 27, "13": 6}.get(narrowing.get("TABLE"))
    assert noise is None or sum("--reward-noise-std" in line for line in listed) == noise


@pytest.mark.parametrize(
    ("name", "flag", "narrowing", "message"),
    [
        ("atari_ppo", "--cells", {"ENVS": "Alien Nope"}, "error: ENVS: this sweep has no Nope"),
        ("continuous_ppo", "--dry-run", {"TABLE": "9"}, "error: TABLE is 12 (without noise) or 13 (with noise), not 9"),
        ("continuous_a2c", "--cells", {"TABLE": "13"}, "error: TABLE is 9 (without noise) or 10 (with noise), not 13"),
    ],
)
def test_what_a_sweep_has_not_is_refused(tmp_path, name, flag, narrowing, message):
    done = sweep(name, tmp_path, flag, **narrowing)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_hours_without_a_run_here_are_those_of_the_kept_results(tmp_path):
    *runs, totals = sweep(
        "continuous_ppo", tmp_path, "--dry-run", "--seeds", "1", ENVS="HalfCheetah"
    ).stdout.splitlines()
    assert len(runs) == 6
    assert re.search(r", [\d.]+ hours with \d+ at once \(", totals) and "unknown" not in totals
    assert "at the speed of the finished runs in benchmark/results, not of this machine;" in totals
    assert "; a short run here, with STEPS and SEEDS=1, measures it)" in totals


@pytest.mark.parametrize(
    ("cells", "environment", "message"),
    [
        (["succeed --env-id Ant-v4"], {"ENVS": "Ant Bee"}, "ENVS: this sweep has no Bee"),
        (["succeed"], {"WORKERS": "many"}, "WORKERS must be a whole number"),
        (["succeed"], {"SEEDS": "0"}, "every number must be at least 1"),
        ([], {}, "no cells on standard input"),
        (["succeed"], {"PATH": ""}, "there is no sbatch"),
    ],
)
def test_bad_input(fake, cells, environment, message):
    code, output = run(cells, *(["--slurm"] if "PATH" in environment else []), **environment)
    assert code == 2 and message in output and len(output.splitlines()) == 1, output


# The sweeps

ALL_SWEEPS = (*SWEEPS, "sign_flips")
LANGUAGE_SWEEPS = ("rlhf_imdb", "rlhf_tldr", "advantage_norm")
IMDB, TLDR = "sppo_rlhf_imdb", "sppo_rlhf_tldr"
TABLE_7 = {
    IMDB: {"num_trajectories": 112, "update_epochs": 5, "minibatch_size": 28, "gamma": 0.99},
    TLDR: {"num_trajectories": 64, "update_epochs": 4, "minibatch_size": 32, "gamma": 1.0},
}
for table in TABLE_7.values():
    table |= {"learning_rate": 5e-6, "gae_lambda": 0.95, "clip_coef": 0.2, "Z": -1.0, "target_coef": 0.1}


def sweep(name, out, *flags, **environment):
    environment = {k: v for k, v in os.environ.items() if k not in NARROWING} | {"PYTHON": sys.executable} | environment
    command = [str(ROOT / "benchmark" / f"{name}.sh"), *flags, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@cache
def dry_run(name, **environment):
    """(script, all its arguments, which were given) of every command."""
    process = sweep(name, "no/runs", "--dry-run", **environment)
    assert process.returncode == 0, process.stderr
    *lines, totals = process.stdout.splitlines()
    assert totals.startswith("# ")
    commands = []
    for words in map(shlex.split, lines):
        script = Script(Path(words[1]).stem, ROOT)
        given = script.parse(words[2:])
        commands.append((script.name, script.defaults | given, given))
    return commands


def seeds_of(script, args):
    """(script, what decides the result, seed) of every seed."""
    rest = {k: v for k, v in args.items() if k not in ("seed", "num_seeds", "num_threads", "run_dir")}
    return [(script, json.dumps(rest), args["seed"] + i) for i in range(args.get("num_seeds", 1))]


def all_seeds(lines):
    """seeds_of the lines of a sweep."""
    found = []
    for name, *flags in map(shlex.split, lines):
        seeds, flags = take_seeds(flags)
        script = Script(name, ROOT)
        args = script.defaults | script.parse(flags)
        found += [run for seed in range(1, seeds + 1) for run in seeds_of(name, args | {"seed": seed, "num_seeds": 1})]
    return found


@pytest.mark.parametrize("name", ALL_SWEEPS)
def test_a_sweep_starts_every_seed_of_every_cell_once(name):
    commands = dry_run(name)
    started = Counter(run for script, args, _ in commands for run in seeds_of(script, args))
    assert started == Counter(dict.fromkeys(all_seeds(cells(name)), 1))
    assert len({args["run_dir"] for _, args, _ in commands}) == len(commands)


def test_the_smoke_form_of_a_sweep():
    for name, env_id in (("continuous_a2c", "Walker2d-v4"), ("beta_sensitivity", "WizardOfWorNoFrameskip-v4")):
        commands = dry_run(name, SEEDS="1", STEPS="4096", ENVS=env_id.replace("NoFrameskip-v4", ""))
        assert len(commands) == len({line for line in cells(name) if f" {env_id} " in line}) > 5
        for _, args, _ in commands:
            assert (args["env_id"], args["total_timesteps"]) == (env_id, 4096)
            assert args["run_dir"].endswith("steps4096/seed1")


def test_sweeps_share_the_runs_they_have_in_common():
    run_dirs = {name: {args["run_dir"] for _, args, _ in dry_run(name)} for name in ALL_SWEEPS}
    assert {path for path in run_dirs["atari_ppo"] if "no_norm_adv" not in path} <= run_dirs["beta_sensitivity"]
    assert run_dirs["sign_flips"] <= run_dirs["atari_ppo"] | run_dirs["continuous_ppo"]
    for name in ("rlhf_imdb", "rlhf_tldr"):
        assert len(run_dirs["advantage_norm"] & run_dirs[name]) == 4


def test_derived_sweeps_vary_what_their_tables_vary():
    assert Counter(line.split()[4] for line in cells("sign_flips")) == dict.fromkeys(
        ("CrazyClimberNoFrameskip-v4", "WizardOfWorNoFrameskip-v4", "Ant-v4", "Walker2d-v4"), 1
    )
    parsed = [Script(line.split()[0], ROOT).parse(line.split()[3:]) for line in cells("beta_sensitivity")]
    weights = Counter((args["alpha"], args["beta"], args.get("reward_flip_prob", 0)) for args in parsed)
    for noise in (0, 0.1):
        assert {w[:2] for w in weights if w[2] == noise} == {(1, 0), *((0.5, beta) for beta in (0.5, 1, 5, 10, 25))}
    assert set(weights.values()) == {22}
    for plain, without in zip(cells("advantage_norm")[::2], cells("advantage_norm")[1::2]):
        assert without == f"{plain} --no-norm-adv" and "--alpha 1 --beta 0" in plain


@pytest.mark.parametrize("name", [name for name in SWEEPS if name not in ("beta_sensitivity", "advantage_norm")])
def test_the_control_arms_are_the_symmetric_ones_without_reverse_loss(name):
    added = set(cells(name, control=True)) - set(cells(name))
    expected = set()
    for line in cells(name):
        if match := re.search("--alpha 0.5 --beta ([0-9.]+)", line):
            alpha = 0.5 if "a2c" in name else 0.5 + float(match[1])  # alpha - beta Z
            expected.add(line.replace(match[0], f"--alpha {alpha:g} --beta 0"))
    assert added == expected and added


def test_a_sweep_without_an_interpreter_says_so(tmp_path):
    process = sweep("sign_flips", tmp_path, PYTHON="no/python")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: there is no no/python") and process.stderr.count("\n") == 1
    assert "PYTHON=" in process.stderr and "requirements-benchmark.txt" in process.stderr


@pytest.mark.parametrize("name", LANGUAGE_SWEEPS)
def test_a_language_sweep_has_the_settings_of_table_7(name):
    for script, args, given in dry_run(name):
        assert {key: args[key] for key in TABLE_7[script]} == TABLE_7[script]
        assert args["dataset"] == Script(script, ROOT).defaults["dataset"]
        assert not {"policy", "reward_model"} & given.keys()
        assert script == IMDB or (args["base_precision"], args["eval_every"]) == ("4bit", 10)


@pytest.mark.parametrize("name", LANGUAGE_SWEEPS)
def test_the_smoke_form_of_a_language_sweep_with_local_models(name):
    local = {"DATASET": "assets/my reviews", "POLICY": "assets/policy", "REWARD_MODEL": "assets/reward"}
    local |= {"BASE_PRECISION": "float32", "FLAGS": "--learning-rate 1e-4 --target-coef 0 --cpu", "STEPS": "1"}
    task = {"rlhf_imdb": "imdb"}.get(name, "tldr")
    commands = dry_run(name, SEEDS="1", TASKS=task, **local)
    assert len(commands) == 2
    for script, args, _ in commands:
        assert script == f"sppo_rlhf_{task}" and (args["num_updates"], args["target_coef"]) == (1, 0)
        assert [args[key] for key in ("dataset", "policy", "reward_model")] == [local[k] for k in list(local)[:3]]
        assert args["learning_rate"] == 1e-4 and args["cpu"] and args.get("base_precision", "float32") == "float32"
        label = "policy_reward" + ("_float32" if task == "tldr" else "") + "_target0_alpha"
        assert args["run_dir"].startswith(f"no/runs/my reviews__{script}__{label}")
        end = "_learning_rate0.0001" + ("" if args["norm_adv"] else "_no_norm_adv")
        assert args["run_dir"].endswith(f"{end}_steps1/seed1")


def test_advantage_norm_takes_one_task(tmp_path):
    assert [script for script, *_ in dry_run("advantage_norm", SEEDS="1", ENVS="imdb")] == [IMDB] * 2
    process = sweep("advantage_norm", tmp_path, "--dry-run", POLICY="assets/policy")
    assert process.returncode == 2 and "need TASKS=imdb or TASKS=tldr" in process.stderr


def test_continuous_a2c_for_real(tmp_path):
    narrow = {"ENVS": "InvertedDoublePendulum-v4", "SEEDS": "1", "STEPS": "2048", "WORKERS": "3", "TABLE": "9"}
    process = sweep("continuous_a2c", tmp_path, **narrow)
    assert process.returncode == 0, process.stdout + process.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert Counter(r["script"] for r in results) == {"sb3_baseline": 1, "sa2c_continuous_discretized": 2}
    assert len({tuple(r) for r in results}) == 1  # the same keys in the same order
    assert {r["total_timesteps"] for r in results} == {2048}
    assert all(len(r["eval_returns"]) == 10 for r in results)
    curves = next(tmp_path.glob("*sb3_baseline*/seed1/curves.csv")).read_text().splitlines()
    assert [row.split(",")[0] for row in curves] == ["global_step", "2048", "2048"]


def test_rlhf_imdb_for_real(tmp_path, assets):
    flags = "--num-trajectories 4 --minibatch-size 2 --update-epochs 1 --prompt-length 8 --response-length 4"
    narrow = {"DATASET": assets / "reviews", "POLICY": assets / "gpt2", "REWARD_MODEL": assets / "sentiment"}
    narrow = {name: str(path) for name, path in narrow.items()} | {"SEEDS": "1", "STEPS": "1", "ENVS": "reviews"}
    narrow |= {"FLAGS": f"{flags} --min-response-length 4 --eval-samples 3 --cpu", "WORKERS": "2"}
    process = sweep("rlhf_imdb", tmp_path / "runs", **narrow)
    assert process.returncode == 0, process.stdout + process.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("result.json")]
    assert sorted((r["args"]["alpha"], r["args"]["beta"]) for r in results) == [(0.5, 0.4), (1, 0)]
    assert {(r["num_updates"], len(r["eval_scores"]), r["args"]["target_coef"]) for r in results} == {(1, 3, 0.1)}
    narrow["FLAGS"] += " --micro-batch-size 1"  # changes memory, not the result
    assert "finished 2 (2 before)" in sweep("rlhf_imdb", tmp_path / "runs", **narrow).stdout


@pytest.fixture
def baseline(tmp_path):
    """Trains the baseline in this process for 2,048 steps: its run directory, arguments and result."""

    def train(name, **options):
        (tmp_path / name).mkdir()
        settings = {"env_id": "InvertedDoublePendulum-v4", "total_timesteps": 2048} | options
        args = sb3_baseline.Args(str(tmp_path / name), **settings)
        return tmp_path / name, args, sb3_baseline.train(args, tmp_path / name)

    return train


@pytest.mark.parametrize("algo, settings", [("ppo", (1, 2048, 0.5, 3e-4)), ("a2c", (4, 8, 0.5, 7e-4))])
def test_the_gaussian_baseline_is_stable_baselines3_with_the_papers_rollout(baseline, algo, settings):
    gamma = {"ppo": 0.99, "a2c": 0.9999}[algo]
    run_dir, args, result = baseline("run", algo=algo, gamma=gamma)
    model = {"ppo": PPO, "a2c": A2C}[algo].load(run_dir / "model.zip")
    assert (model.n_envs, model.n_steps, model.vf_coef, model.learning_rate) == settings
    assert isinstance(model.action_space, gym.spaces.Box)
    # What was saved, evaluated as Stable-Baselines3 does it: normalized observations, most likely actions.
    envs = VecNormalize.load(run_dir / "vecnormalize.pkl", DummyVecEnv([lambda: make_env(args.env_id)]))
    assert model.gamma == envs.gamma == gamma
    envs.training = envs.norm_reward = False
    for seed, expected in zip(
        np.random.SeedSequence([args.seed, EVALUATION]).generate_state(10).tolist(), result["eval_returns"]
    ):
        envs.seed(seed)
        obs, total, done = envs.reset(), 0.0, [False]
        while not done[0]:
            obs, reward, done, _ = envs.step(model.predict(obs, deterministic=True)[0])
            total += float(reward[0])
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_noise_reaches_the_baselines_learning(baseline):
    short = {"algo": "a2c", "total_timesteps": 512}
    runs = [baseline(f"run{i}", reward_noise_std=std, **short)[2] for i, std in enumerate((0.0, 0.0, 5.0))]
    assert runs[0]["eval_returns"] == runs[1]["eval_returns"] != runs[2]["eval_returns"]


def test_stable_baselines3_trains_with_discretized_actions(tmp_path):
    command = "--algo a2c --num-bins 3 --env-id LunarLanderContinuous-v3 --total-timesteps 64".split()
    assert sb3_baseline.main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["args"]["num_bins"] == 3 and len(result["eval_returns"]) == 10
    assert A2C.load(tmp_path / "run/model.zip").action_space == gym.spaces.MultiDiscrete([3, 3])


def test_flags_have_the_types_that_result_files_have():
    flags = "--num-bins 11 --policy-coef 2 --reward-noise-std 0 --seed 3 --algo ppo".split()
    expected = {"num_bins": 11, "policy_coef": 2.0, "reward_noise_std": 0.0, "seed": 3, "algo": "ppo"}
    given = Script("sb3_baseline", ROOT).parse(flags)
    assert given == expected and [*map(type, given.values())] == [*map(type, expected.values())]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-bins", "1"], "--num-bins must be "),
        (["--gamma", "1.1"], "--gamma must be between 0 and 1"),
        (["--total-timesteps", "-1"], "--total-timesteps must be at least 1, not -1"),
        (["--policy-coef", "0"], "--policy-coef must be "),
        (["--policy-coef", "2", "--algo", "a2c"], "--policy-coef must be "),
        (["--policy-coef", "nan"], "--policy-coef must be "),
        (["--env-id", "NoSuchEnv-v4"], "--env-id NoSuchEnv-v4: "),
    ],
)
def test_stable_baselines3_refuses_what_it_cannot_do(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(sb3_baseline.main(["--run-dir", str(tmp_path / "run"), "--total-timesteps", "2048", *flags]))
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {words}") and output.err.count("\n") == 1
    assert not output.out and not any(tmp_path.iterdir())


def test_the_baseline_without_its_package_names_the_requirements_file(tmp_path):
    (tmp_path / "stable_baselines3.py").write_text("raise ModuleNotFoundError(name='stable_baselines3')")
    (tmp_path / "torch.py").touch()  # the real one takes seconds
    command = [sys.executable, "benchmark/peers/sb3_baseline.py", "--run-dir", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    message = "error: there is no stable_baselines3: pip install -r requirements-benchmark.txt\n"
    assert (process.returncode, process.stderr) == (2, message)


def test_bins_of_the_baseline_are_those_of_the_scripts():
    env = make_env("LunarLanderContinuous-v3")
    discretized = Discretized(env, 11)
    assert discretized.action_space == gym.spaces.MultiDiscrete([11, 11])
    bins = action_bins(env.action_space, 11)
    for action in ([0, 10], [3, 7], [5, 5]):
        np.testing.assert_array_equal(discretized.action(np.array(action)), bins[action, [0, 1]])


def test_gaussian_noise_comes_after_normalization_and_clipping():
    rewards, statistics = [], []
    for std in (0.0, 0.05):
        normalize = VecNormalize(DummyVecEnv([lambda: make_env("InvertedDoublePendulum-v4")] * 4), clip_reward=1.0)
        envs = NoisyReward(normalize, std, seed=1)
        envs.seed(1)
        envs.reset()
        rewards.append(np.array([envs.step(np.zeros((4, 1)))[1] for _ in range(500)]))
        statistics.append((normalize.ret_rms.mean, normalize.ret_rms.var))
    noise = rewards[1] - rewards[0]
    assert rewards[0].max() == 1.0 < rewards[1].max()
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 0.05) < 0.003
    assert statistics[0] == statistics[1]


# Slurm


def test_a_job_array_lists_its_jobs(fake):
    options = "--slurm --dry-run --partition cpu --time 1:00:00 --cpus-per-task 4 --gpus-per-task 1 --array-limit 8"
    options += " --notice 600"
    code, output = run(["single --seeds 3"], *options.split())
    lines = output.splitlines()
    assert code == 0 and lines[0] == "#!/bin/bash" and lines[-2] == "JOBS"
    assert lines[-1].startswith("# 3 runs, 0 of them finished; 3 to do in 3 processes, 30 steps")
    assert lines[-5] == "single --seed 1 --run-dir runs/Toy-v0__single/seed1"
    expected = "requeue array=1-3%8 partition=cpu time=1:00:00 cpus-per-task=4 gpus-per-task=1 signal=B:USR1@600"
    assert {f"#SBATCH --{option}" for option in expected.split()} <= set(lines)
    jobs = lines[-5:-2]
    assert run(jobs, "--task", "1/2")[0] == 0
    assert {path.parent.name for path in fake.rglob("result.json")} == {"seed1", "seed3"}


def test_a_task_near_its_time_limit_saves_and_is_requeued(fake):
    """With a scontrol that only writes down how it was called."""
    (fake / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    (fake / "scontrol").chmod(0o755)
    path, run_dir = f"{fake}:{os.environ['PATH']}", fake / "runs/Toy-v0__wait/seed1"
    jobs = [f"wait --seed 1 --run-dir {run_dir}"]
    task = launch(jobs, "--task", "1/1", PATH=path, SLURM_JOB_ID="17")
    wait_for(lambda: (run_dir / "ready").exists())
    task.send_signal(signal.SIGUSR1)
    assert "the same command goes on" in task.communicate(timeout=60)[0] and task.returncode == 130
    assert (run_dir / "checkpoint.pt").exists() and not (run_dir / "result.json").exists()
    assert (fake / "requeued").read_text() == "requeue 17\n"
    (fake / "go").touch()
    assert run(jobs, "--task", "1/1")[0] == 0 and (run_dir / "result.json").exists()


def slurm_runs():
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not slurm_runs(), reason="no Slurm here; tests/slurm_local.sh starts one")
def test_a_job_array_survives_being_requeued(fake):
    run_dir = fake / "runs/Toy-v0__wait/seed1"
    code, output = run(["succeed --seeds 2", "wait"], "--slurm", "--batch", "1")
    assert code == 0, output
    job = output.split()[-1]
    wait_for(lambda: (run_dir / "ready").exists())
    subprocess.run(["scontrol", "requeue", f"{job}_3"], check=True)
    wait_for(lambda: (run_dir / "checkpoint.pt").exists())
    (fake / "go").touch()

    def finished():  # Slurm lets a requeued job wait for two minutes, unless it is told not to
        subprocess.run(["scontrol", "update", f"jobid={job}_3", "starttime=now"], capture_output=True)
        return count(fake, "result.json") == 3

    wait_for(finished)
    assert history(run_dir) == ["start", "resume"]
