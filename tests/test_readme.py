"""README and docs: what they name exists, what they show runs."""

import ast
import importlib
import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, ROOT, SCRIPTS, load_agent, train_here

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


@pages
def test_links_and_images_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert targets or page.name != "README.md"
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def flags_of(script: str) -> set[str]:
    """The flags of a script, read from its Args: importing the language scripts would take seconds."""
    (args,) = [
        node
        for node in ast.parse((ROOT / f"{script}.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    return {f"--{node.target.id.replace('_', '-')}" for node in args.body if isinstance(node, ast.AnnAssign)}


@pages
def test_flags_exist(page):
    """Flags in backticks or after a script's name are arguments of a script or of a program in benchmark/."""
    text = page.read_text()
    words = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
    known = {flag for name in SCRIPTS for flag in flags_of(name)}
    programs = [path for pattern in ("*.py", "*.sh") for path in (ROOT / "benchmark").rglob(pattern)]
    sources = "".join(path.read_text() for path in programs)
    helpers = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", sources, re.MULTILINE)}
    helpers |= set(re.findall(r"--[a-z][a-z0-9-]+", sources))
    others = {"--extra-index-url", "--logdir", "--flag", "--help", "--nproc-per-node", "--array"}
    if page.name == "CHANGELOG.md":  # names what is gone, too
        return
    switched_off = {f"--no-{flag[2:]}" for flag in known}
    unknown = set(words) - known - helpers - switched_off - others
    assert not {flag for flag in unknown if not flag.startswith("--nproc")}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)|`make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"run", "test"} <= named <= targets


def readme_code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def run_code(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code + "print(total)\n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_the_readmes_code_acts_with_a_kept_model():
    code = readme_code()
    expected = float(re.search(r"# (\d+): this Ant runs", code)[1])
    assert run_code(code) == pytest.approx(expected, rel=0.05)  # another processor rounds differently


def test_pages_begin_with_what_a_reader_gets():
    for page in (page for page in PAGES if page.name != "language-models.md"):
        title, first, *_ = page.read_text().split("\n\n")
        assert title.startswith("# ") and len(first) > 60 and first[0] not in "#|`-!", page


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_readmes_code_acts_like_the_script_with_a_new_model(name, tmp_path):
    """A model that was just trained: the return is that of the script's own policy from the same start."""
    script = importlib.import_module(name)
    flags = {"env_id": "Hopper-v4", "num_envs": 1, "num_steps": 64, "total_timesteps": 128, "learning_rate": 1e-2}
    train_here(script, tmp_path, **flags)
    code, replaced = re.subn(r'"[^"]*/model.safetensors"', repr(str(tmp_path / "model.safetensors")), readme_code())
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
