"""Every script runs with the packages of its requirements file alone."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tiny
from conftest import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
RUN_WITHOUT = """
import importlib, os, sys
from importlib.machinery import PathFinder

script, *absent = sys.argv.pop(1).split()

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.argv[0] = script
sys.path[0] = os.path.dirname(script)
script = importlib.import_module(os.path.basename(script)[:-3])
sys.exit(script.main())
"""
CONTINUOUS = "--env-id InvertedDoublePendulum-v4 --num-envs 1 --num-steps 16 --total-timesteps 32 --eval-episodes 1"
ATARI = "--env-id Breakout --num-envs 1 --num-threads 1 --num-steps 16 --total-timesteps 32 --eval-episodes 1"


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def listed(path: Path) -> set[str]:
    """The distributions that a requirements file and those it includes name."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    included = set().union(*(listed(path.with_name(line[3:])) for line in lines if line.startswith("-r ")))
    return included | {normalized(re.split(r"[\[=]", line)[0]) for line in lines if not line.startswith("-r ")}


def run_with(requirements: str, script: str, flags: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """The script in a process that finds no module of a package which the requirements file does not name."""
    names = listed(ROOT / requirements)
    modules = packages_distributions().items()
    absent = [module for module, packages in modules if not names & {normalized(package) for package in packages}]
    assert {"moviepy", "stable_baselines3", "pytest"} <= set(absent) and "torch" not in absent
    command = [sys.executable, "-c", RUN_WITHOUT, " ".join([str(ROOT / f"{script}.py"), *absent]), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("sppo_continuous_discretized", f"{CONTINUOUS} --num-minibatches 2"),
        ("sa2c_continuous_discretized", CONTINUOUS),
        ("sppo_atari", f"{ATARI} --num-minibatches 2"),
        ("sa2c_atari", ATARI),
    ],
)
def test_control_scripts_need_nothing_else(script, flags, tmp_path):
    process = run_with("requirements.txt", script, [*flags.split(), "--run-dir", "run"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("script", ["sppo_rlhf_imdb", "sppo_rlhf_tldr"])
def test_language_scripts_need_nothing_else(script, assets, tmp_path):
    flags = tiny.command_line(tiny.flags(script, assets) | {"num_updates": 1, "run_dir": "run"})
    process = run_with("requirements-rlhf.txt", script, flags, tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run/result.json").exists()


def test_a_package_that_is_not_listed_is_not_found(tmp_path):
    (tmp_path / "script.py").write_text("import moviepy")
    process = run_with("requirements.txt", tmp_path / "script", [], tmp_path)
    assert process.returncode == 1 and "ModuleNotFoundError" in process.stderr


def metadata(script: str) -> dict:
    """The inline metadata (PEP 723) at the head of a script."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    assert lines[0] == "# /// script"
    return tomllib.loads("\n".join(line[2:] for line in lines[1 : lines.index("# ///")]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_names_what_the_script_imports_with_the_pins_of_the_requirements(script):
    pins = [
        line for name in ("requirements.txt", "requirements-rlhf.txt") for line in (ROOT / name).read_text().split()
    ]
    versions = {normalized(re.split(r"[\[=]", pin)[0]): pin.partition("==")[2] for pin in pins if "==" in pin}
    named = {}
    for dependency in metadata(script)["dependencies"]:
        name, _, version = dependency.partition("==")
        named[normalized(name.partition("[")[0])] = version
    assert named == {name: versions[name] for name in named}
    assert metadata(script)["requires-python"] == ">=3.11"
    nodes = list(ast.walk(ast.parse((ROOT / f"{script}.py").read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"wandb"}
    packages = packages_distributions()
    missing = {module for module in modules if not {normalized(p) for p in packages[module]} & named.keys()}
    assert missing <= {"huggingface_hub"}  # transformers brings it
