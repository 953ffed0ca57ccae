"""The runner against small fake scripts, the cells of every sweep against Tables 5 to 7, and two sweeps for real."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from benchmark import sb3_baseline
from benchmark.runner import Script, batches
from benchmark.sb3_baseline import Discretized, NoisyReward
from sppo_continuous_discretized import EVALUATION, action_bins, env_seeds, make_env

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "benchmark" / "runner.py"
NARROWING = ("SEEDS", "ENVS", "STEPS", "WORKERS", "BATCH", "TASKS", "DATASET", "POLICY", "REWARD_MODEL", "FLAGS")
NARROWING += ("BASE_PRECISION",)

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
    num_threads: int = os.cpu_count()

parser = argparse.ArgumentParser()
for name in Args.__annotations__:
    if name != "norm_adv":
        default = getattr(Args, name)
        parser.add_argument("--" + name.replace("_", "-"), default=default, type=type(default) if default else str)
parser.add_argument("--no-norm-adv", dest="norm_adv", action="store_false")
args = parser.parse_args()
run_dir = Path(args.resume or args.run_dir)
if args.resume:
    folders = [run_dir] if (run_dir / "args.json").exists() else sorted(run_dir.glob("seed*"))
else:
    seeds = range(args.seed, args.seed + args.num_seeds)
    folders = [run_dir / f"seed{s}" if args.num_seeds > 1 else run_dir for s in seeds]
    for seed, folder in zip(seeds, folders):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f".{os.getpid()}")  # as in the scripts: another runner sees all or nothing
        temporary.mkdir()
        own = vars(args) | {"seed": seed, "num_seeds": 1}
        (temporary / "args.json").write_text(json.dumps({"script": Path(__file__).stem, "args": own}))
        os.replace(temporary, folder)
with (folders[0] / "history").open("a") as history:
    history.write(f"{'resume' if args.resume else 'start'} {os.getpid()}\\n")
stopped = threading.Event()
def finish():
    for folder in folders:
        (folder / "result.json").write_text((folder / "args.json").read_text())
"""
FAKES = {
    "succeed": "finish()",
    "crash": "print('\\n'.join(f'line {i}' for i in range(40)), flush=True); sys.exit('boom')",
    # Killed at first; --resume finishes.
    "killed": "finish() if args.resume else os.kill(os.getpid(), signal.SIGKILL)",
    # Waits for the file go in the working directory, and ends with a checkpoint on SIGINT and SIGTERM.
    "wait": """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stopped.set())
(folders[0] / "ready").touch()
while not Path("go").exists() and not stopped.is_set():
    time.sleep(0.02)
if stopped.is_set():
    (folders[0] / "checkpoint.pt").touch()
    sys.exit(130)
time.sleep(0.3)
finish()""",
    "hang": """
signal.signal(signal.SIGINT, lambda *_: (folders[0] / "asked").touch())
(folders[0] / "ready").touch()
while True: time.sleep(1)""",
}
ONE_BY_ONE = FAKE.replace("    num_seeds: int = 1\n", "").replace("args.num_seeds", "1")
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
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
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


def history(run_dir):
    """["start", "resume", ...]: how often the run was launched, and how."""
    return [line.split()[0] for line in (run_dir / "history").read_text().splitlines()]


def pid(run_dir):
    return int((run_dir / "history").read_text().split()[-1])


def test_runs_every_cell_once_and_skips_what_is_finished(fake):
    cells = ["single --env-id Ant-v4 --beta 20 --no-norm-adv --seeds 2", "succeed --env-id ALE/Pong-v5 --seeds 5"]
    code, output = run(cells, "--workers", "2", "--batch", "2")
    single, batched = fake / "runs/Ant-v4__single__beta20_no_norm_adv", fake / "runs/ALE-Pong-v5__succeed"
    runs = [single / "seed1", single / "seed2", batched / "seeds1-2", batched / "seeds3-4", batched / "seed5"]
    assert code == 0 and "finished 5 (0 before), failed 0, running 0, waiting 0" in output, output
    assert sorted(p.parent for p in fake.rglob("result.json")) == sorted(
        [
            *runs[:2],
            *(batched / f"seeds{b}/seed{s}" for b, s in (("1-2", 1), ("1-2", 2), ("3-4", 3), ("3-4", 4))),
            runs[4],
        ]
    )
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
    assert shlex.split(output)[1:] == ["killed.py", "--resume", "runs/Toy-v0__killed/seeds1-2"]
    code, output = run(["killed --seeds 2"])
    assert code == 0, output
    assert history(fake / "runs/Toy-v0__killed/seeds1-2/seed1") == ["start", "resume"]


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
    wait_for(lambda: len(list(fake.rglob("history"))) >= 4)
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
    assert "running 0, waiting 1" in second.stdout.readline()
    assert second.poll() is None and history(run_dir) == ["start"]
    os.kill(pid(run_dir), signal.SIGKILL)
    wait_for(lambda: history(run_dir) == ["start", "resume"])
    (fake / "go").touch()
    assert finish(second)[0] == 0


def test_another_run_in_the_directory_is_an_error(fake):
    assert run(["succeed --total-timesteps 10"])[0] == 0
    (fake / "runs/Toy-v0__succeed__beta2/seed1").mkdir(parents=True)
    (fake / "runs/Toy-v0__succeed__beta2/seed1/notes").touch()
    code, output = run(
        [
            "succeed --total-timesteps 20",
            "succeed --beta 2",
            "succeed --beta 3",
            "succeed --gamma 1",
            "none",
            "succeed '",
        ]
    )
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("failed:")]
    assert errors == [
        "failed: succeed --gamma 1: succeed.py has no flag --gamma, or the flag has no value",
        "failed: none: there is no none.py in . or benchmark",
        "failed: succeed ': No closing quotation",
        "failed: runs/Toy-v0__succeed/seed1 holds a run with total_timesteps 10, not 20",
        "failed: runs/Toy-v0__succeed__beta2/seed1 is in use, but there is no args.json in it",
    ]
    assert "finished 1 (0 before), failed 5, running 0, waiting 0" in output


def test_language_cells_go_by_data_set_and_updates(fake):
    language = FAKE.replace("total_timesteps", "num_updates").replace("    num_seeds: int = 1\n", "")
    language = language.replace("args.num_seeds", "1").replace('env_id: str = "Toy-v0"', 'dataset: str = "hub/imdb"')
    language = language.replace(
        "    beta: float", '    targets: tuple = ("q", "v")\n    policy: str = "hub/gpt2"\n    beta: float'
    )
    language = language.replace(
        "default = getattr(Args, name)", 'default = getattr(Args, name) if name != "targets" else ""'
    )
    language = language.replace('"args": own', '"args": own | {"targets": own["targets"].split() or ["q", "v"]}')
    (fake / "lm.py").write_text(language + "finish()")
    cells = ["lm --seeds 2 --num-updates 60", "lm --dataset some/reviews --policy some/small --num-updates 60 --beta 2"]
    code, output = run(cells, STEPS="3")
    assert code == 0 and "finished 3 (0 before)" in output, output
    names = {path.name for path in (fake / "runs").iterdir()}
    assert names == {"imdb__lm__steps3", "reviews__lm__small_beta2_steps3"}
    saved = json.loads((fake / "runs/imdb__lm__steps3/seed2/args.json").read_text())["args"]
    assert saved["num_updates"] == 3
    code, output = run(cells, ENVS="reviews", STEPS="3")
    assert code == 0 and "finished 1 (1 before)" in output, output
    assert "finished 1 (1 before)" in run(cells, ENVS="some/reviews", STEPS="3")[1]
    assert "ENVS: this sweep has no Ant" in run(cells, ENVS="Ant")[1]
    code, output = run(["lm --num-updates 3 --targets q k", "lm --num-updates 3 --targets q v"], "--dry-run")
    assert [line.split("runs/")[1].split("/")[0] for line in output.splitlines()] == [
        "imdb__lm__targetsq-k",
        "imdb__lm__targetsq-v",
    ]
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
    assert code == 0 and len(lines) == 3 and not (fake / "runs").exists()
    for line in lines:
        subprocess.run(line, shell=True, check=True)
    assert len(list(fake.glob("runs/*__steps5/**/result.json"))) == 5
    assert run(["single --seeds 2", "succeed --seeds 3"], "--dry-run", STEPS="5") == (0, "")


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

TABLE_6 = {  # steps of SPPO; beta of SPPO and of SA2C, without and with noise
    "Ant-v4": (2_000_000, (20, 20), (0.2, 0.2)),
    "BipedalWalker-v3": (1_000_000, (20, 25), (0.5, 10)),
    "HalfCheetah-v4": (2_000_000, (20, 25), (5, 10)),
    "Hopper-v4": (2_000_000, (20, 50), (0.2, 10)),
    "HumanoidStandup-v4": (10_000_000, (20, 25), (0.5, 10)),
    "InvertedDoublePendulum-v4": (1_000_000, (20, 25), (5, 10)),
    "LunarLanderContinuous-v3": (2_000_000, (20, 20), (5, 5)),
    "Swimmer-v4": (2_000_000, (20, 50), (0.2, 10)),
    "Walker2d-v4": (5_000_000, (20, 25), (0.2, 10)),
}
GAMES = """Alien Assault Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Gravitar Krull MsPacman
NameThisGame Qbert Riverraid RoadRunner Seaquest StarGunner TimePilot UpNDown VideoPinball WizardOfWor""".split()
SA2C_NOISE_BETA_1 = "Alien Assault Gravitar MsPacman Qbert StarGunner TimePilot UpNDown VideoPinball".split()


def sweep(name, out, *flags, **environment):
    environment = {k: v for k, v in os.environ.items() if k not in NARROWING} | {"PYTHON": sys.executable} | environment
    command = [str(ROOT / "benchmark" / f"{name}.sh"), "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def dry_run(name, out, **environment):
    """(script, {flag: value}) of every command."""
    process = sweep(name, out, "--dry-run", **environment)
    assert process.returncode == 0, process.stderr
    commands = [shlex.split(line) for line in process.stdout.splitlines()]
    return [(Path(c[1]).stem, dict(zip(c[2::2], c[3::2]))) for c in commands]


def settings(commands):
    """(script, algo, env_id, steps, alpha, beta, noise) of every command, sorted."""
    found = []
    for script, flags in commands:
        noise = float(flags.get("--reward-noise-std", flags.get("--reward-flip-prob", 0)))
        weights = [float(flags[k]) for k in ("--alpha", "--beta")] if "--alpha" in flags else [0.0, 0.0]
        steps = int(flags["--total-timesteps"])
        found.append((script, flags.get("--algo", ""), flags["--env-id"], steps, *weights, noise))
    return sorted(found)


def continuous(script, algo, env_id, steps, betas):
    """The cells of an environment: Gaussian, discretized baseline and ours, without and with noise."""
    cells = []
    for noise, beta in zip((0.0, 0.05), betas):
        cells.append(("sb3_baseline", algo, env_id, steps, 0.0, 0.0, noise))
        cells += [(script, "", env_id, steps, *weights, noise) for weights in ((1.0, 0.0), (0.5, beta))]
    return cells


def atari(script, game, betas, noisy_betas):
    cells = []
    for noise, values in ((0.0, betas), (0.1, noisy_betas)):
        for weights in ((1.0, 0.0), *((0.5, beta) for beta in values)):
            cells.append((script, "", f"{game}NoFrameskip-v4", 10_000_000, *weights, noise))
    return cells


SWEEPS = {
    "continuous_ppo": [
        cell
        for env_id, (steps, betas, _) in TABLE_6.items()
        for cell in continuous("sppo_continuous_discretized", "ppo", env_id, steps, betas)
    ],
    "continuous_a2c": [
        cell
        for env_id, (_, _, betas) in TABLE_6.items()
        for cell in continuous("sa2c_continuous_discretized", "a2c", env_id, 2_000_000, betas)
    ],
    "atari_ppo": [cell for game in GAMES for cell in atari("sppo_atari", game, (1,), (10,))],
    "atari_a2c": [
        cell for game in GAMES for cell in atari("sa2c_atari", game, (5,), (1 if game in SA2C_NOISE_BETA_1 else 5,))
    ],
    "beta_sensitivity": [
        cell for game in GAMES for cell in atari("sppo_atari", game, (0.5, 1, 5, 10, 25), (0.5, 1, 5, 10, 25))
    ],
    "sign_flips": [
        *(atari("sppo_atari", game, (), ())[0] for game in ("CrazyClimber", "WizardOfWor")),
        ("sppo_continuous_discretized", "", "Ant-v4", 2_000_000, 1.0, 0.0, 0.0),
        ("sppo_continuous_discretized", "", "Walker2d-v4", 5_000_000, 1.0, 0.0, 0.0),
    ],
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_what_the_paper_ran(name, tmp_path):
    commands = dry_run(name, tmp_path)
    assert set(settings(commands)) == set(SWEEPS[name])
    seeds = Counter()  # of every cell
    for setting, command in zip(settings(commands), sorted(commands, key=lambda c: settings([c]))):
        first, count = int(command[1]["--seed"]), int(command[1].get("--num-seeds", 1))
        seeds.update((setting, seed) for seed in range(first, first + count))
    expected = {(s, seed) for s in SWEEPS[name] for seed in range(1, 6 if "atari" in s[0] else 31)}
    assert set(seeds) == expected and set(seeds.values()) == {1}
    assert len({command[1]["--run-dir"] for command in commands}) == len(commands)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_smoke_form_of_a_sweep(name, tmp_path):
    env_id = SWEEPS[name][-1][2]
    commands = dry_run(name, tmp_path, SEEDS="1", STEPS="4096", ENVS=env_id.replace("NoFrameskip-v4", ""))
    cells = [(*s[:3], 4096, *s[4:]) for s in SWEEPS[name] if s[2] == env_id]
    assert settings(commands) == sorted(cells)
    assert all(flags["--run-dir"].endswith("steps4096/seed1") for _, flags in commands)


def test_sweeps_share_the_runs_they_have_in_common(tmp_path):
    run_dirs = {
        name: {flags["--run-dir"] for _, flags in dry_run(name, tmp_path)}
        for name in ("atari_ppo", "beta_sensitivity", "continuous_ppo", "sign_flips")
    }
    assert run_dirs["atari_ppo"] <= run_dirs["beta_sensitivity"]
    assert run_dirs["sign_flips"] <= run_dirs["atari_ppo"] | run_dirs["continuous_ppo"]


TABLE_7 = {
    "sppo_rlhf_imdb": {
        "num_updates": 60,
        "num_trajectories": 112,
        "update_epochs": 5,
        "minibatch_size": 28,
        "gamma": 0.99,
    },
    "sppo_rlhf_tldr": {
        "num_updates": 100,
        "num_trajectories": 64,
        "update_epochs": 4,
        "minibatch_size": 32,
        "gamma": 1.0,
    },
}
for table in TABLE_7.values():
    table |= {"learning_rate": 5e-6, "gae_lambda": 0.95, "clip_coef": 0.2, "Z": -1.0, "target_coef": 0.1}
IMDB, TLDR = TABLE_7
LANGUAGE_SWEEPS = {  # script, alpha, beta, advantage normalization
    "rlhf_imdb": [(IMDB, 1.0, 0.0, True), (IMDB, 0.5, 0.4, True)],
    "rlhf_tldr": [(TLDR, 1.0, 0.0, True), (TLDR, 0.5, 0.2, True)],
    "advantage_norm": [(script, 1.0, 0.0, norm_adv) for script in TABLE_7 for norm_adv in (True, False)],
}


def language_dry_run(name, out, *flags, **environment):
    """(script, all its arguments, which were given) of every command."""
    process = sweep(name, out, "--dry-run", *flags, **environment)
    assert process.returncode == 0, process.stderr
    commands = []
    for line in process.stdout.splitlines():
        words = shlex.split(line)
        script = Script(Path(words[1]).stem, ROOT)
        given = script.parse(words[2:])
        commands.append((script.name, script.defaults | given, given))
    return commands


@pytest.mark.parametrize("name", LANGUAGE_SWEEPS)
def test_a_language_sweep_is_what_the_paper_ran(name, tmp_path):
    commands = language_dry_run(name, tmp_path)
    cells = [(script, args["alpha"], args["beta"], args["norm_adv"]) for script, args, _ in commands]
    assert cells == [cell for cell in LANGUAGE_SWEEPS[name] for _ in range(4)]
    assert [int(args["seed"]) for _, args, _ in commands] == [1, 2, 3, 4] * (len(commands) // 4)
    for script, args, given in commands:
        assert {key: args[key] for key in TABLE_7[script]} == TABLE_7[script]
        assert args["dataset"] == Script(script, ROOT).defaults["dataset"]
        assert not {"policy", "reward_model"} & given.keys()
        assert script == IMDB or (args["base_precision"], args["eval_every"]) == ("4bit", 10)
    assert len({args["run_dir"] for _, args, _ in commands}) == len(commands)


@pytest.mark.parametrize("name", LANGUAGE_SWEEPS)
def test_the_smoke_form_of_a_language_sweep_with_local_models(name, tmp_path):
    local = {"DATASET": "assets/my reviews", "POLICY": "assets/policy", "REWARD_MODEL": "assets/reward"}
    local |= {"BASE_PRECISION": "float32", "FLAGS": "--learning-rate 1e-4 --target-coef 0 --cpu", "STEPS": "1"}
    task = {"rlhf_imdb": "imdb"}.get(name, "tldr")
    commands = language_dry_run(name, tmp_path, SEEDS="1", TASKS=task, **local)
    assert len(commands) == 2
    for script, args, _ in commands:
        assert script == f"sppo_rlhf_{task}" and (args["num_updates"], args["target_coef"]) == (1, 0)
        assert [args[key] for key in ("dataset", "policy", "reward_model")] == [local[k] for k in list(local)[:3]]
        assert args["learning_rate"] == 1e-4 and args["cpu"] and args.get("base_precision", "float32") == "float32"
        label = "policy_reward" + ("_float32" if task == "tldr" else "") + "_target0_alpha"
        assert args["run_dir"].startswith(f"{tmp_path}/my reviews__{script}__{label}")
        assert args["run_dir"].endswith("_learning_rate0.0001_steps1/seed1")


def test_language_sweeps_share_the_runs_they_have_in_common(tmp_path):
    run_dirs = {name: {args["run_dir"] for _, args, _ in language_dry_run(name, tmp_path)} for name in LANGUAGE_SWEEPS}
    assert len(run_dirs["advantage_norm"] & run_dirs["rlhf_imdb"]) == 4
    assert len(run_dirs["advantage_norm"] & run_dirs["rlhf_tldr"]) == 4
    assert [script for script, *_ in language_dry_run("advantage_norm", tmp_path, SEEDS="1", ENVS="imdb")] == [IMDB] * 2
    process = sweep("advantage_norm", tmp_path, "--dry-run", POLICY="assets/policy")
    assert process.returncode == 2 and "need TASKS=imdb or TASKS=tldr" in process.stderr


def test_a_command_line_in_full(tmp_path):
    process = sweep("continuous_ppo", tmp_path, "--dry-run", ENVS="Hopper", SEEDS="12")
    flags = "--env-id Hopper-v4 --total-timesteps 2000000 --alpha 0.5 --beta 50 --reward-noise-std 0.05"
    cell = f"{tmp_path}/Hopper-v4__sppo_continuous_discretized__alpha0.5_beta50_noise0.05"
    command = f"{sys.executable} sppo_continuous_discretized.py {flags}"
    assert process.stdout.splitlines()[-2:] == [
        f"{command} --seed 1 --num-seeds 10 --run-dir {cell}/seeds1-10 --num-threads 1",
        f"{command} --seed 11 --num-seeds 2 --run-dir {cell}/seeds11-12 --num-threads 1",
    ]


def test_continuous_ppo_for_real(tmp_path):
    narrow = {"ENVS": "InvertedDoublePendulum-v4", "SEEDS": "1", "STEPS": "2048", "WORKERS": "3"}
    process = sweep("continuous_ppo", tmp_path, **narrow)
    assert process.returncode == 0, process.stdout + process.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert Counter(r["script"] for r in results) == {"sb3_baseline": 2, "sppo_continuous_discretized": 4}
    assert len({tuple(r) for r in results}) == 1  # the same keys in the same order
    assert {r["total_timesteps"] for r in results} == {2048}
    assert all(len(r["eval_returns"]) == 10 for r in results)
    curves = next(tmp_path.glob("*sb3_baseline*/seed1/curves.csv")).read_text().splitlines()
    assert [row.split(",")[0] for row in curves] == ["global_step", "2048", "2048"]
    process = sweep("continuous_ppo", tmp_path, **narrow)
    assert process.returncode == 0 and "finished 6 (6 before)" in process.stdout


def test_rlhf_imdb_for_real(tmp_path, assets):
    flags = "--num-trajectories 4 --minibatch-size 2 --update-epochs 1 --prompt-length 8 --response-length 4"
    narrow = {"DATASET": assets / "reviews", "POLICY": assets / "gpt2", "REWARD_MODEL": assets / "sentiment"}
    narrow = {name: str(path) for name, path in narrow.items()} | {"SEEDS": "1", "STEPS": "1", "ENVS": "reviews"}
    narrow |= {"FLAGS": f"{flags} --min-response-length 4 --eval-samples 3 --cpu"}
    process = sweep("rlhf_imdb", tmp_path / "runs", **narrow)
    assert process.returncode == 0, process.stdout + process.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("result.json")]
    assert sorted((r["args"]["alpha"], r["args"]["beta"]) for r in results) == [(0.5, 0.4), (1, 0)]
    assert {(r["num_updates"], len(r["eval_scores"]), r["args"]["target_coef"]) for r in results} == {(1, 3, 0.1)}
    process = sweep("rlhf_imdb", tmp_path / "runs", **narrow)
    assert process.returncode == 0 and "finished 2 (2 before)" in process.stdout, process.stdout
    narrow["FLAGS"] += " --micro-batch-size 1"  # changes memory, not the result
    assert "finished 2 (2 before)" in sweep("rlhf_imdb", tmp_path / "runs", **narrow).stdout


@pytest.fixture
def baseline(tmp_path):
    """Trains the baseline in this process on 4,096 steps of LunarLander: its run directory and arguments."""

    def train(name, **options):
        (tmp_path / name).mkdir()
        settings = {"env_id": "LunarLanderContinuous-v3", "total_timesteps": 4096} | options
        args = sb3_baseline.Args(str(tmp_path / name), **settings)
        return tmp_path / name, args, sb3_baseline.train(args, tmp_path / name)

    return train


@pytest.mark.parametrize("algo, settings", [("ppo", (1, 2048, 0.5, 3e-4)), ("a2c", (4, 8, 0.5, 7e-4))])
def test_the_gaussian_baseline_is_stable_baselines3_with_the_papers_rollout(baseline, algo, settings):
    run_dir, args, result = baseline("run", algo=algo)
    model = {"ppo": PPO, "a2c": A2C}[algo].load(run_dir / "model.zip")
    assert (model.n_envs, model.n_steps, model.vf_coef, model.learning_rate) == settings
    assert isinstance(model.action_space, gym.spaces.Box)
    # What was saved, evaluated as Stable-Baselines3 does it: normalized observations, most likely actions.
    envs = VecNormalize.load(run_dir / "vecnormalize.pkl", DummyVecEnv([lambda: make_env(args.env_id)]))
    envs.training = envs.norm_reward = False
    for seed, expected in zip(env_seeds([args.seed], 10, EVALUATION), result["eval_returns"]):
        envs.seed(seed)
        obs, total, done = envs.reset(), 0.0, [False]
        while not done[0]:
            obs, reward, done, _ = envs.step(model.predict(obs, deterministic=True)[0])
            total += float(reward[0])
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_noise_reaches_the_baselines_learning(baseline):
    runs = [baseline(f"run{i}", reward_noise_std=std)[2] for i, std in enumerate((0.0, 0.0, 5.0))]
    assert runs[0]["eval_returns"] == runs[1]["eval_returns"] != runs[2]["eval_returns"]


@pytest.mark.parametrize("flags", [("--policy-coef", "20.5"), ("--algo", "a2c")])
def test_stable_baselines3_trains_with_discretized_actions(tmp_path, flags):
    command = [sys.executable, "benchmark/sb3_baseline.py", "--run-dir", tmp_path / "run", "--num-bins", "3", *flags]
    command += ["--env-id", "LunarLanderContinuous-v3", "--total-timesteps", "2048"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["args"]["num_bins"] == 3 and len(result["eval_returns"]) == 10
    model = (A2C if "a2c" in flags else PPO).load(tmp_path / "run/model.zip")
    assert model.action_space == gym.spaces.MultiDiscrete([3, 3])


def test_flags_have_the_types_that_result_files_have():
    flags = "--num-bins 11 --policy-coef 2 --reward-noise-std 0 --seed 3 --algo ppo".split()
    expected = {"num_bins": 11, "policy_coef": 2.0, "reward_noise_std": 0.0, "seed": 3, "algo": "ppo"}
    given = Script("sb3_baseline", ROOT).parse(flags)
    assert given == expected and [*map(type, given.values())] == [*map(type, expected.values())]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-bins", "1"], "--num-bins must be "),
        (["--policy-coef", "0"], "--policy-coef must be "),
        (["--policy-coef", "2", "--algo", "a2c"], "--policy-coef must be "),
        (["--env-id", "NoSuchEnv-v4"], "--env-id NoSuchEnv-v4: "),
    ],
)
def test_stable_baselines3_refuses_what_it_cannot_do(tmp_path, flags, words):
    command = [sys.executable, "benchmark/sb3_baseline.py", "--run-dir", tmp_path / "run", *flags]
    command += ["--total-timesteps", "2048"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith(f"error: {words}")
    assert process.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


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
    assert code == 0 and lines[0] == "#!/bin/bash" and lines[-1] == "JOBS"
    assert lines[-4] == "single --seed 1 --run-dir runs/Toy-v0__single/seed1"
    for (
        option
    ) in "requeue array=1-3%8 partition=cpu time=1:00:00 cpus-per-task=4 gpus-per-task=1 signal=B:USR1@600".split():
        assert f"#SBATCH --{option}" in lines
    jobs = lines[-4:-1]
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


@pytest.mark.skipif(not slurm_runs(), reason="no Slurm here; benchmark/slurm_local.sh starts one")
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
        return len(list(fake.rglob("result.json"))) == 3

    wait_for(finished)
    assert history(run_dir) == ["start", "resume"]
