"""What strangers bring: environments, ids, folders, terminals and second processes that the scripts have not seen."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import strange_envs
import torch
from conftest import ROOT, import_scripts, is_one_line, small, wait_for_the_next_second

# One script stands for those that have the same text (test_siblings.py), and one of each domain where domains differ.
continuous = pytest.mark.parametrize("script", import_scripts("sppo_continuous_discretized.py"))
atari = pytest.mark.parametrize("script", import_scripts("sa2c_atari.py"))
domains = pytest.mark.parametrize(
    "script", import_scripts("sppo_continuous_discretized.py") + import_scripts("sa2c_atari.py")
)
names = pytest.mark.parametrize("script", ["sppo_continuous_discretized", "sa2c_atari"])


@pytest.fixture
def start(tmp_path):
    """Start a script, or a command, by a shell with a redirection, in an empty folder; none survives the test."""
    processes = []

    def start(script: str, *flags: str, redirect: str = "") -> subprocess.Popen:
        command = script if " " in script else shlex.join([sys.executable, str(ROOT / f"{script}.py"), *flags])
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        bash = ["bash", "-c", f"exec {command} {redirect}"]
        processes.append(subprocess.Popen(bash, cwd=tmp_path, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        with suppress(ProcessLookupError):  # behind head the script outlives the shell
            os.killpg(process.pid, signal.SIGKILL)


# Regular numbers


@continuous
@pytest.mark.parametrize("form", ["Array", "Deep", "Scalar", "NumpyBool", "List", "NoneFlags", "OneBuffer"])
def test_numbers_in_any_form_are_the_same_numbers(script, form):
    def play(env_id: str) -> list[np.ndarray]:
        with closing(script.Envs(script.Args(env_id=env_id), 3)) as envs:
            arrays = [envs.reset(range(1, 2), 0)]
            for t in range(12):
                arrays += envs.step(np.full((1, 3, 2), t % 11))
        return arrays

    for expected, array in zip(play("strange_envs:PlainToy-v0"), play(f"strange_envs:{form}-v0"), strict=True):
        assert array.shape == expected.shape and np.allclose(array, expected)
    assert (expected[0] != expected[0, 0]).any()  # final observations of copies differ


@continuous
@pytest.mark.parametrize("form", ["Array", "Mixed", "Int", "Bool", "Half"])
def test_numbers_in_any_form_train_and_evaluate(script, call, form):
    code, out, err = call(script, *small(script.__name__, f"strange_envs:{form}-v0"), "--run-dir", "run")
    assert code == 0, err
    assert np.isfinite(json.loads(Path("run/result.json").read_text())["eval_returns"]).all()
    assert "were cut off" not in out


# A trained model is never lost


@continuous
@pytest.mark.parametrize("habit, error", [("Licence", RuntimeError), ("Port", OSError), ("Tired", RuntimeError)])
def test_model_survives_an_evaluation_that_cannot_be_played(script, call, capsys, monkeypatch, habit, error):
    with pytest.raises(error):  # with its traceback
        call(script, *small(script.__name__, f"strange_envs:{habit}-v0"), "--run-dir", "run")
    assert "evaluation, final" in capsys.readouterr().out  # says what it is at
    monkeypatch.setattr(strange_envs.Toy, "opened", -100)  # mended
    code, out, err = call(script, "--evaluate", "run")
    assert code == 0 and "seed 1: " in out, err


@atari
def test_model_survives_a_game_that_cannot_be_opened(script, call, capsys, monkeypatch):
    class Unopened(script.Envs):
        def __init__(self, args, num_envs, **options):
            if num_envs == args.eval_episodes:
                raise RuntimeError("no memory for the games")
            super().__init__(args, num_envs, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(script, "Envs", Unopened)
        call(script, *small(script.__name__), "--eval-episodes", "3", "--run-dir", "run")
    assert "evaluation, final" in capsys.readouterr().out
    code, out, err = call(script, "--evaluate", "run")
    assert code == 0 and "seed 1: " in out, err


@continuous
def test_seeds_beside_one_that_fails_leave_their_results(script, call):
    flags = [*small(script.__name__, "strange_envs:FirstNan-v0"), "--num-seeds", "3", "--run-dir", "run"]
    code, _, err = call(script, *flags)
    assert code == 1 and "no result of seed 1:" in err
    assert [Path(f"run/seed{seed}/result.json").exists() for seed in (1, 2, 3)] == [False, True, True]


# One writer


def first_line(process) -> str:
    """The line with the run directory. An environment may print before, as the step is tried that comes before it."""
    return next((line for line in process.stdout if line.startswith("run directory")), "")


@names
def test_a_run_has_one_writer_until_its_process_is_gone(script, start, tmp_path):
    first = start(script, *small(script, total=10**7), "--run-dir", "run")
    assert f"run directory {tmp_path}/run;" in first_line(first)
    for flags in (["--resume", "run"], [*small(script), "--run-dir", "run"]):
        second = start(script, *flags)
        _, err = second.communicate(timeout=300)
        assert second.returncode == 2 and is_one_line(err), err
    first.kill()  # there may be no checkpoint yet
    first.wait()
    third = start(script, "--resume", "run")
    assert f"run directory {tmp_path}/run;" in first_line(third)
    third.send_signal(signal.SIGINT)
    assert third.wait(300) == 130


@continuous
@pytest.mark.parametrize("text", ["", '{"lr": 1}'])
def test_a_folder_that_a_kill_or_another_program_left_is_refused_in_one_line(script, call, text):
    Path("run").mkdir()
    Path("run/args.json").write_text(text)
    code, _, err = call(script, "--resume", "run")
    assert code == 2 and is_one_line(err)
    assert Path("run/args.json").read_text() == text


# A default name is free


@domains
def test_runs_of_the_same_second_have_names_of_their_own(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wait_for_the_next_second()
    monkeypatch.setattr(script, "train", lambda args, envs: args.run_dir)
    assert len({script.run(script.Args()) for _ in range(3)}) == 3


# Environments are closed however the script ends


@continuous
@pytest.mark.parametrize("end", ["", "Nan", "Raise", "Sequence", "Integer"])
def test_environments_are_closed_however_the_script_ends(script, call, end):
    try:
        code, *_ = call(script, *small(script.__name__, f"strange_envs:Children{end}-v0"), "--run-dir", "run")
        assert code == {"": 0, "Nan": 1, "Sequence": 2, "Integer": 2}[end]
    except RuntimeError:
        assert end == "Raise"
    assert strange_envs.Children.running == []


@domains
@pytest.mark.parametrize("end", ["run directory in use", "loss not finite", "Ctrl-C"])
def test_games_and_environments_are_closed_at_an_early_end(script, call, monkeypatch, end):
    opened, closed = [], []

    class Counted(script.Envs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            opened.append(self)
            close, self.close = self.close, lambda: (closed.append(self), close())

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "Envs", Counted)
    Path("used").mkdir()
    Path("used/file").touch()
    if end == "Ctrl-C":
        monkeypatch.setattr(script, "gae", stop)
    infinite = ["--learning-rate", "1e38"] if end == "loss not finite" else []
    run_dir = "used" if end == "run directory in use" else "run"
    code, _, err = call(script, *small(script.__name__, total=256), *infinite, "--run-dir", run_dir)
    assert code == {"run directory in use": 2, "loss not finite": 1, "Ctrl-C": 130}[end] and is_one_line(err), err
    assert closed == opened != []


# What an id can be

IDS = [
    "",
    " ",
    ":",
    ":Hopper-v4",
    "Hopper-v4:",
    "a:b:Hopper-v4",
    "os.nope:Hopper-v4",
    "a-b:Hopper-v4",
    "HalfCheetah-v2",
]
IDS += ["Hopper-v99", "nope/Hopper-v4", "../Hopper-v4", "Pusher-v4", "CartPole-v1", "BreakoutNoFrameskip-v4"]
IDS += ["phys2d/Pendulum-v0", "strange_envs:NoModule-v0", "strange_envs:ChildrenSequence-v0"]
GAMES = ["", " ", "ALE/", "NoFrameskip-v4", "Hopper-v4", "Breakout-v4", "Breakout-ram-v4", "../breakout"]
GAMES += ["combat", "JoustNoFrameskip-v4", "Warlords", "maze_craze", "BreakoutNoFrameskip-v0", "ALE/Breakout-v5"]


@continuous
@pytest.mark.parametrize("env_id", IDS)
def test_ids_that_cannot_be_played_are_refused_in_one_line(script, env_id, call):
    code, _, err = call(script, *small(script.__name__), "--env-id", env_id)
    assert code == 2 and is_one_line(err) and not os.listdir()


@atari
@pytest.mark.parametrize("env_id", GAMES)
def test_ids_of_games_that_cannot_be_played_are_refused_in_one_line(script, env_id, call, monkeypatch):
    # A game without an emulator kills the process that opens it, which is this one.
    monkeypatch.setattr(script, "Envs", lambda *args: pytest.fail("was opened"))
    code, _, err = call(script, *small(script.__name__), "--env-id", env_id)
    assert code == 2 and is_one_line(err) and not os.listdir()


@atari
def test_ids_that_promise_sticky_actions_are_played_with_them(script):
    for env_id in ("BreakoutNoFrameskip-v0", "ALE/Breakout-v5"):
        assert script.find_game(script.Args(env_id=env_id, sticky_actions=True)) == "breakout"


@continuous
@pytest.mark.parametrize("habit", ["NoMode", "Text", "Unrenderable"])
def test_video_of_what_cannot_be_rendered_is_refused_in_one_line(script, habit, call):
    pytest.importorskip("moviepy")
    code, _, err = call(script, *small(script.__name__, f"strange_envs:{habit}-v0"), "--capture-video")
    assert code == 2 and is_one_line(err) and not os.listdir()


# Bounds


@continuous
@pytest.mark.parametrize(
    "box", ["IntegerBox", "BoolBox", "Uint8Box", "Overflow", "Doubles", "OneSided", "PartlyOneSided", "Empty"]
)
def test_boxes_that_have_no_even_bins_are_refused_in_one_line(script, box, call):
    code, _, err = call(script, *small(script.__name__, f"strange_envs:{box}-v0"))
    assert code == 2 and is_one_line(err) and "finite bounds" in err and not os.listdir()


@continuous
@pytest.mark.parametrize("box", ["HalfFloats", "Wide", "Point"])
def test_bins_of_unusual_boxes_are_actions_of_theirs(script, box):
    args = script.Args(env_id=f"strange_envs:{box}-v0")
    with closing(script.Envs(args, 1)) as envs:
        low, high = envs.action_space.low.flatten(), envs.action_space.high.flatten()
        assert np.array_equal(envs.bins[[0, -1]], [low, high]) and (np.diff(envs.bins, axis=0) > 0).all()


# Where output goes


@pytest.mark.parametrize("script", ["sppo_continuous_discretized"])
@pytest.mark.parametrize(
    "redirect",
    [
        pytest.param(">&-", id="no_output"),
        pytest.param("2>&-", id="no_error"),
        pytest.param("<&- >&- 2>&-", id="nothing"),
        pytest.param("2>&1 | head -1", id="head"),
        pytest.param(">/dev/full 2>&1", id="full"),
    ],
)
def test_a_run_whose_reader_has_gone_ends_with_all_its_files(script, redirect, start, tmp_path):
    process = start(script, *small(script, total=256), "--run-dir", "run", redirect=redirect)
    process.communicate(timeout=300)  # the shell waits for both ends of a pipe
    assert process.returncode == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["total_timesteps"] == 256
    assert json.loads((tmp_path / "run/args.json").read_text())["script"] == script
    assert {"curves.csv", "checkpoint.pt", "model.safetensors"} < set(os.listdir(tmp_path / "run"))


# Packages that are not there


@domains
@pytest.mark.parametrize("flag, package", [("track", "wandb"), ("capture_video", "moviepy")])
def test_an_empty_folder_is_no_package(script, flag, package, monkeypatch, tmp_path, capsys):
    (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(SystemExit) as end:
        script.check_args(script.Args(**{flag: True, "num_threads": 1}))
    assert end.value.code == 2 and f"pip install {package}" in capsys.readouterr().err


# Hints that can be pasted


@names
def test_hints_can_be_pasted(script, start, tmp_path):
    run_dir = f"{tmp_path}/it's ü $HOME"
    process = start(script, *small(script, total=10**7), "--run-dir", run_dir)
    hint = first_line(process).partition("continue with: ")[2].strip()
    process.kill()
    process.wait()
    process = start(script, *small(script), "--run-dir", run_dir)
    assert f"--resume {shlex.quote(run_dir)}" in process.communicate(timeout=300)[1]
    assert f"run directory {run_dir}" in first_line(start(hint))


# Memory of videos


@continuous
def test_one_environment_of_all_is_rendered_in_its_first_episode(script, tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    args = script.Args(env_id="strange_envs:PlainToy-v0", num_seeds=3, capture_video=True, run_dir=str(tmp_path))
    with closing(script.Envs(args, 4)) as envs:
        assert [env.render_mode for env in envs.envs] == ["rgb_array"] + 11 * [None]
    frames, save_video = [], importlib.import_module("gymnasium.utils.save_video").save_video
    monkeypatch.setattr(
        gym.utils.save_video, "save_video", lambda x, *a, **k: (frames.extend(x), save_video(x, *a, **k))
    )
    agent = script.Agent([torch.Generator().manual_seed(seed) for seed in args.seeds], 3, 2, 11)
    script.evaluate(args, agent, script.Normalizer(3, 4, 3, 0.99))
    assert [frame[0, 0, 0] for frame in frames] == list(range(10))
    assert (tmp_path / "videos/final/rl-video-episode-0.mp4").stat().st_size > 1000
