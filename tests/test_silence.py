"""What would go wrong in silence or lose a run, in all four control scripts; Python's way to run them."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import FrozenInstanceError
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import strange_envs
import torch
from conftest import CONTINUOUS, import_scripts, is_one_line, small, wait_for_the_next_second
from safetensors.torch import load_file

# One script stands for those that have the same text (test_siblings.py), and one of each domain where domains differ.
continuous = pytest.mark.parametrize("script", import_scripts("sppo_continuous_discretized.py"))
atari = pytest.mark.parametrize("script", import_scripts("sa2c_atari.py"))
domains = pytest.mark.parametrize(
    "script", import_scripts("sppo_continuous_discretized.py") + import_scripts("sa2c_atari.py")
)


def flags(script, env_id=None, *others) -> list[str]:
    short = small(script.__name__, env_id and f"strange_envs:{env_id}-v0")
    return [*short, "--eval-episodes", "2", "--run-dir", "run", *map(str, others)]


def result() -> dict:
    return json.loads(Path("run/result.json").read_text())


# Nothing wrong in silence


@continuous
@pytest.mark.parametrize(
    "env_id, words",
    [("OldReset", "its observation has 1 numbers, not 3"), ("TwoRewards", "its reward has 2 numbers, not 1")],
)
def test_another_shape_than_the_spaces_promise_is_refused_in_one_line(script, call, env_id, words):
    code, _, err = call(script, *flags(script, env_id))
    assert code == 2 and is_one_line(err) and words in err and not os.listdir()


@continuous
def test_a_shape_that_changes_later_ends_the_run(script, call):
    code, _, err = call(script, *flags(script, "Shrinking"))
    assert code == 2 and is_one_line(err) and "its observation has 1 numbers, not 3" in err
    assert not Path("run/result.json").exists()


@continuous
def test_global_generators_are_those_of_the_seed_in_training_and_evaluation(script, call, capsys):
    models, returns = [], []
    for seed, others in ((1, []), (1, ["--eval-every", "64"]), (2, [])):
        for noise in (np.random, torch, strange_envs.random):
            noise.seed()  # what the process did before
        short = flags(script, "GlobalDraws", "--seed", seed, "--total-timesteps", "128")  # two rollouts
        assert call(script, *short, *others)[0] == 0
        models.append(load_file("run/model.safetensors"))
        returns.append(result()["eval_returns"])
        np.random.seed()
        code, out, _ = call(script, "--evaluate", "run")
        assert code == 0 and " ".join(f"{x:.1f}" for x in returns[-1]) in out
        shutil.rmtree("run")
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())
    assert returns[0] == returns[1] != returns[2]
    assert not torch.equal(models[0]["obs_mean"], models[2]["obs_mean"])


@continuous
def test_spaces_that_an_environment_samples_draw_from_the_seed(script, call):
    returns = []
    for seed in (1, 1, 2):
        assert call(script, *flags(script, "Sampling", "--seed", seed))[0] == 0
        returns.append(result()["eval_returns"])
        out = call(script, "--evaluate", "run")[1]
        assert " ".join(f"{x:.1f}" for x in returns[-1]) in out
        shutil.rmtree("run")
    assert returns[0] == returns[1] != returns[2] and len(set(returns[0])) == 2


@continuous
def test_environments_get_their_seed_or_the_part_of_it_that_they_take(script):
    def first(env_id, limit):
        seen = []
        with closing(script.Envs(script.Args(env_id=f"strange_envs:{env_id}-v0"), 10)) as envs:
            for env in envs.envs:
                env.reset = lambda seed, reset=env.reset: (seen.append(seed), reset(seed=seed))[1]
            envs.reset(range(1, 2), script.EVALUATION)
        expected = np.random.SeedSequence([1, script.EVALUATION]).generate_state(10).tolist()
        assert max(expected) >= 2**31 and seen[-10:] == [seed % limit for seed in expected]

    first("PlainToy", 2**32)
    first("ShortSeed", 2**31)
    first("Scenario", 1000)


@continuous
@pytest.mark.parametrize("env_id", ["ShortSeed", "Scenario"])
def test_environments_that_take_few_seeds_train_and_are_evaluated(script, call, env_id):
    assert call(script, *flags(script, env_id, "--eval-episodes", 10))[0] == 0
    code, out, _ = call(script, "--evaluate", "run")
    assert code == 0 and f"{result()['eval_mean']:.1f} (" in out


@continuous
def test_what_follows_the_measured_episode_does_not_count(script, call):
    code, _, err = call(script, *flags(script, "Afterwards", "--eval-episodes", 10))
    assert code == 0, err
    assert sorted(result()["eval_returns"]) == sorted(3.0 + (i % 5) for i in range(10))


@domains
def test_versions_are_those_of_what_was_imported(script, call, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    for name, text in (("numpy", b"Name: numpy\nVersion: 0.1\n"), ("torch", b"Name: torch\nAuthor: J\xf6rg\n")):
        (folder / f"{name}-0.1.dist-info").mkdir()
        (folder / f"{name}-0.1.dist-info/METADATA").write_bytes(text)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path, str(folder)])
    assert call(script, *flags(script))[0] == 0
    versions = result()["versions"]
    assert versions["numpy"] == np.__version__ and versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0] and versions["gymnasium"] == gym.__version__
    assert "atari" in script.__name__ or versions["mujoco"] == mujoco.__version__


@continuous
def test_commit_is_that_of_the_repository_that_tracks_the_script(script, tmp_path, monkeypatch):
    def git(folder, *command) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True).stdout

    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init")
        (tmp_path / name / "file.py").write_text(name)
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-m", name)
    mine = git(tmp_path / "mine", "rev-parse", "HEAD").strip()
    (tmp_path / "other/link.py").symlink_to(tmp_path / "mine/file.py")
    (tmp_path / "mine/untracked.py").touch()

    def commit(path):
        monkeypatch.setattr(script, "__file__", str(tmp_path / path))
        return script.git_commit()

    assert commit("mine/file.py") == commit("other/link.py") == mine
    assert commit("mine/untracked.py") is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert commit("mine/file.py") == mine
    (tmp_path / "mine/file.py").write_text("changed")
    assert commit("mine/file.py") == f"{mine}-dirty"
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "file.py").touch()
    assert commit("file.py") is None
    git(tmp_path, "init")
    git(tmp_path, "add", "file.py")
    assert commit("file.py") is None  # nothing is committed yet


@continuous
def test_arguments_cannot_change_during_a_run(script):
    with pytest.raises(FrozenInstanceError):
        script.Args().beta = 1.0


@continuous
@pytest.mark.parametrize("env_id", ["CarRacing-v3", "strange_envs:Pictures-v0", "strange_envs:PicturesToo-v0"])
def test_images_are_refused_with_a_word_about_the_script_for_them(script, call, env_id):
    code, _, err = call(script, *small(script.__name__, env_id))
    assert code == 2 and is_one_line(err) and "sppo_atari.py" in err and not os.listdir()


# Nothing trained or evaluated is lost


@continuous
@pytest.mark.parametrize("env_id", ["Growing", "Gray", "NoFps", "Breakable", "NotClosable"])
def test_a_video_or_an_environment_that_cannot_be_closed_costs_no_result(script, call, env_id):
    pytest.importorskip("moviepy")
    code, _, err = call(script, *flags(script, env_id, "--capture-video"))
    assert code == 0, err
    assert len(result()["eval_returns"]) == 2
    assert (env_id in ("NoFps", "NotClosable", "Breakable")) == Path("run/videos/final/rl-video-episode-0.mp4").exists()
    assert err.count("no video of evaluation") == (env_id in ("Growing", "Gray"))


@continuous
def test_a_video_shows_every_frame_of_an_environment_that_renders_into_one_array(script, call):
    imageio = pytest.importorskip("imageio.v2")
    assert call(script, *flags(script, "OneFrame", "--capture-video"))[0] == 0
    frames = list(imageio.get_reader("run/videos/final/rl-video-episode-0.mp4").iter_data())
    assert len({int(frame.mean()) for frame in frames}) >= 9  # the encoder may drop the last


@atari
def test_a_video_that_cannot_be_encoded_costs_no_result(script, call, monkeypatch):
    pytest.importorskip("moviepy")

    def broken(*args, **kwargs):
        raise OSError("no encoder")

    monkeypatch.setattr(importlib.import_module("gymnasium.utils.save_video"), "save_video", broken)
    code, _, err = call(script, *flags(script, None, "--capture-video", "--eval-episodes", "1"))
    assert code == 0 and "no video of evaluation final: OSError('no encoder')" in err
    assert len(result()["eval_returns"]) == 1


@domains
def test_a_finished_checkpoint_becomes_the_model_and_the_result(script, call):
    assert call(script, *flags(script))[0] == 0
    expected, model = result(), load_file("run/model.safetensors")
    Path("run/model.safetensors").unlink()
    Path("run/result.json").unlink()
    wait_for_the_next_second()
    code, _, err = call(script, "--resume", "run")
    assert code == 0, err
    again = load_file("run/model.safetensors")
    assert result() == expected and all(torch.equal(x, again[name]) for name, x in model.items())


@continuous
def test_an_environment_that_changes_the_directory_does_not_move_the_run(script, call):
    here = Path.cwd()
    code, out, err = call(script, *flags(script, "Wandering"))
    assert code == 0, err
    assert Path.cwd() != here and f"everything is in {here}/run\n" in out
    os.chdir(here)
    assert result()["args"]["run_dir"] == f"{here}/run"
    assert os.listdir() == ["run"]


@continuous
def test_environments_may_learn_and_differentiate(script, call):
    code, _, err = call(script, *flags(script, "Learning"))
    assert code == 0, err
    assert np.isfinite(result()["eval_returns"]).all()


# One line


REFUSED = [
    (["--env-id", "strange_envs:NeedsArgument-v0"], "missing 1 required positional argument: 'model'"),
    (["--env-id", "strange_envs:OwnSpace-v0"], "is no vector of numbers"),
    (["--env-kwargs", "{"], "--env-kwargs {"),
    (["--env-kwargs", "[1]"], "--env-kwargs [1]"),
    (["--env-kwargs", '{"size": 1}'], "unexpected keyword argument 'size'"),
    (["--total-timesteps", 10**18], "--total-timesteps <= 10**12 must hold"),
    (["--eval-episodes", 0], "--eval-episodes >= 1 must hold"),
]


@continuous
@pytest.mark.parametrize("others, words", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(script, call, others, words):
    code, _, err = call(script, *flags(script, "PlainToy", *others))
    assert code == 2 and is_one_line(err) and words in err and not os.listdir()


@continuous
def test_a_bug_of_an_environment_keeps_its_traceback(script, call, monkeypatch):
    def bug(self, render_mode=None):
        self.size = 1 + "1"

    monkeypatch.setattr(strange_envs.Toy, "__init__", bug)
    with pytest.raises(TypeError, match="unsupported operand"):
        call(script, *flags(script, "PlainToy"))


@atari
def test_more_steps_than_can_be_counted_down_are_refused(script, call):
    code, _, err = call(script, *flags(script, None, "--total-timesteps", 10**18))
    assert code == 2 and is_one_line(err) and not os.listdir()


@domains
def test_an_error_without_a_text_has_a_name(script, call, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(script, "train", full)
    code, _, err = call(script, *flags(script))
    assert code == 1 and err == f"error: {Path.cwd()}/run: MemoryError\n"


@continuous
def test_a_name_that_the_output_cannot_encode_is_escaped(script, tmp_path):
    """In a process of its own, whose output is ASCII."""
    command = [sys.executable, script.__file__, *flags(script), "--run-dir", "wüste"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"everything is in " + str(tmp_path).encode() + rb"/w\xfcste" + b"\n")
    assert json.loads((tmp_path / "wüste/result.json").read_text())["args"]["run_dir"] == str(tmp_path / "wüste")


@continuous
def test_a_name_that_is_no_text_is_refused_in_one_line(script, call):
    code, _, err = call(script, *flags(script), "--run-dir", os.fsdecode(b"w\xff"))
    assert code == 2 and is_one_line(err) and "cannot be opened as a run directory" in err and not os.listdir()


# Arguments of the environment, and long evaluations


@continuous
def test_arguments_of_the_environment_are_kept_with_the_run(script, call):
    code, _, err = call(script, *flags(script, "Scaled", "--env-kwargs", '{"scale": 2.5}'))
    assert code == 0, err
    assert result()["eval_returns"] == [25.0, 25.0] and result()["args"]["env_kwargs"] == '{"scale": 2.5}'
    assert "seed 1: 25.0 (25.0 25.0)" in call(script, "--evaluate", "run")[1]


@domains
def test_evaluations_say_how_far_they_are_and_play_as_many_episodes_as_wanted(script, call, monkeypatch):
    monkeypatch.setattr(script, "SHOW_EVERY", -1)
    code, out, _ = call(script, *flags(script, None, "--eval-episodes", 3))
    assert code == 0 and len(result()["eval_returns"]) == 3
    assert "evaluation, final: step 2, 3 of 3 " in out


# From Python


@domains
def test_a_script_runs_from_python_as_from_the_command_line(script, call, tmp_path):
    assert call(script, *flags(script))[0] == 0
    expected, name = result(), script.__name__
    defaults = vars(script.Args())
    given = {key: x for key, x in expected["args"].items() if x != defaults[key] and key != "run_dir"}
    given["seed"] = np.int64(expected["seed"])  # as a loop over np.arange gives it
    args = script.Args(**given, run_dir="python")
    results = script.run(args)
    first = results[0] if name in CONTINUOUS else results
    assert first["eval_returns"] == expected["eval_returns"]
    assert first == json.loads(Path("python/result.json").read_text())
    assert json.loads(Path("python/args.json").read_text())["args"] == first["args"]
    assert script.run(script.Args(resume="python")) == results  # it has finished
    model = script.load_model("python", cuda=False)
    returns = script.evaluate(*model)
    assert np.ravel(returns).tolist() == expected["eval_returns"]
    Path("python/result.json").unlink()
    wait_for_the_next_second()
    assert script.run(script.Args(resume="python")) == results
    evaluated = script.run(script.Args(evaluate="python"))
    assert (evaluated[0] if name in CONTINUOUS else evaluated)["eval_returns"] == expected["eval_returns"]


@domains
def test_a_search_that_draws_its_settings_draws_new_ones_after_every_run(script, call):
    assert call(script, *flags(script))[0] == 0  # tyro draws as well
    Path("run/checkpoint.pt").unlink()
    Path("run/result.json").unlink()

    def draw() -> list[float]:
        return [strange_envs.random.random(), np.random.random(), torch.rand(1).item()]

    def seed():
        for generator in (strange_envs.random.seed, np.random.seed, torch.manual_seed):
            generator(1)

    threads = threading.active_count()
    seed()
    expected = [draw() for _ in range(2)]
    seed()
    drawn = [draw()]
    script.run(script.Args(resume="run"))
    drawn.append(draw())
    script.run(script.Args(evaluate="run"))
    drawn.append(draw())
    script.evaluate(*script.load_model("run", cuda=False))
    drawn.append(draw())
    files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]  # a long search has a thousand runs
    assert not [file for file in files if file.startswith(f"{os.getcwd()}/run/")]
    assert threading.active_count() == threads
    assert drawn[:2] == expected
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn))  # loading a model may draw, and repeats nothing


@domains
def test_python_gets_the_same_refusals(script, call, capsys, tmp_path):
    for args, words in (
        (script.Args(resume="run", seed=5), "drop --seed"),
        (script.Args(evaluate="run", gamma=0.5), "drop --gamma"),
        (script.Args(total_timesteps=1), "must hold"),
    ):
        with pytest.raises(SystemExit) as end:
            script.run(args)
        assert end.value.code == 2 and words in capsys.readouterr().err
