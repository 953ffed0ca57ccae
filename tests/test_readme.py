"""README and docs: what they name exists, what they show runs."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, ROOT, load_agent, train_here

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
of_today = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is gone
pages_of_today = pytest.mark.parametrize("page", of_today, ids=lambda path: path.name)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8_192


@pages
def test_links_and_images_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert targets or page.name != "README.md"
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


PROGRAMS = {path.name: path for folder in (ROOT, ROOT / "tests", ROOT / "benchmark") for path in folder.glob("*.py")}
PROGRAMS |= {path.name: path for path in (ROOT / "benchmark").glob("*/*.py")}
PROGRAMS |= {path.name: ROOT / "benchmark/runner.py" for path in (ROOT / "benchmark").rglob("*.sh")}
OF_OTHERS = {"--extra-index-url", "--logdir", "--flag", "--help", "--nproc-per-node", "--nproc", "--array"}


@cache
def flags_of(path: Path) -> set[str]:
    """The flags of a program, read from its Args: importing the language scripts would take seconds."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [field for node in classes if node.name == "Args" for field in node.body if hasattr(field, "annotation")]
    names = [field.target.id.replace("_", "-") for field in fields]
    switches = [name for name, field in zip(names, fields) if ast.unparse(field.annotation).startswith("bool")]
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in switches} | {"--help"}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


@pages_of_today
def test_flags_exist(page):
    known = set().union(*map(flags_of, PROGRAMS.values()), OF_OTHERS)
    assert not flags_in(page.read_text()) - known


@pages_of_today
def test_commands_have_flags_that_their_program_has(page):
    """What stands behind the name of a program, up to the end of the command; a copy that is not here has any flags."""
    wrong = {}
    for program, rest in re.findall(r"([\w.]+\.(?:py|sh))((?:[^`|;&#<()\\\n]|\\\n)*)", page.read_text()):
        if program == "compare.py":  # other scripts' flags stand in quotes, and behind --
            rest = re.sub(r'"[^"]*"', "", rest).partition(" -- ")[0]
        if unknown := flags_in(rest) - flags_of(PROGRAMS[program]) if program in PROGRAMS else set():
            wrong[program] = unknown
    assert not wrong


def test_the_flags_of_a_program_are_its_own():
    assert "--slurm" in flags_of(PROGRAMS["continuous_ppo.sh"]) and "--slurm" not in flags_of(PROGRAMS["sppo_atari.py"])
    assert {"--no-norm-adv", "--beta"} <= flags_of(PROGRAMS["sppo_atari.py"])
    assert "--no-beta" not in flags_of(PROGRAMS["sppo_atari.py"])


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)|`make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"run", "test"} <= named <= targets


def agent_in_numpy() -> str:
    (block,) = re.findall(
        r"```py\n(import gymnasium.*?)```", (ROOT / "docs/changing-a-script.md").read_text(), re.DOTALL
    )
    return block


def run_code(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code + "print(total)\n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_the_agent_in_numpy_acts_with_a_kept_model():
    code = agent_in_numpy()
    expected = float(re.search(r"# (\d+): this Ant runs", code)[1])
    assert run_code(code) == pytest.approx(expected, rel=0.05)  # another processor rounds differently


def test_pages_begin_with_what_a_reader_gets():
    for page in (page for page in PAGES if page.name != "language-models.md"):
        title, first, *_ = page.read_text().split("\n\n")
        assert title.startswith("# ") and len(first) > 60 and first[0] not in "#|`-!", page


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_agent_in_numpy_acts_like_the_script_with_a_new_model(name, tmp_path):
    """A model that was just trained: the return is that of the script's own policy from the same start."""
    script = importlib.import_module(name)
    flags = {"env_id": "Hopper-v4", "num_envs": 1, "num_steps": 64, "total_timesteps": 128, "learning_rate": 1e-2}
    train_here(script, tmp_path, **flags)
    code, replaced = re.subn(r'"[^"]*/model.safetensors"', repr(str(tmp_path / "model.safetensors")), agent_in_numpy())
    assert replaced == 1

    args, agent, normalizer = load_agent(script, tmp_path)
    env = gym.make(args.env_id)
    bins = script.action_bins(env.action_space, args.num_bins)
    obs, total, steps, done = env.reset(seed=0)[0], 0.0, 0, False
    while not done:
        x = torch.from_numpy(normalizer.obs(obs.reshape(1, 1, -1)))
        actions = agent.logits(x).argmax(-1).numpy().ravel()
        obs, reward, terminated, truncated, _ = env.step(bins[actions, np.arange(bins.shape[1])])
        total, steps, done = total + reward, steps + 1, terminated or truncated
    assert steps > 5
    assert run_code(code) == pytest.approx(total, rel=1e-9)


def test_animations_are_below_one_megabyte():
    assert not [gif.name for gif in (ROOT / "docs").glob("*.gif") if gif.stat().st_size >= 1_000_000]
