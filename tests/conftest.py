import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the references compute on the CPU
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell script
    signal.signal(signal.SIGINT, signal.default_int_handler)
caches = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": caches.name}  # before anything imports the libraries that read them


CONTINUOUS = ["sppo_continuous_discretized", "sa2c_continuous_discretized"]
ATARI = ["sppo_atari", "sa2c_atari"]
CONTROL = [*CONTINUOUS, *ATARI]
LANGUAGE = ["sppo_rlhf_imdb", "sppo_rlhf_tldr"]
SCRIPTS = [*CONTROL, *LANGUAGE]


SMALL = {
    "sppo_continuous_discretized": "--num-steps 32 --num-envs 2 --num-minibatches 2 --update-epochs 1",
    "sa2c_continuous_discretized": "--num-steps 32 --num-envs 2",
    "sppo_atari": "--num-steps 32 --num-envs 2 --num-minibatches 2 --update-epochs 1 --no-cuda --num-threads 1",
    "sa2c_atari": "--num-steps 32 --num-envs 2 --no-cuda --num-threads 1",
}
ENV = {name: "strange_envs:Chatty-v0" if name in CONTINUOUS else "Breakout" for name in CONTROL}


def import_scripts(pattern: str) -> list:
    """The scripts whose file name matches, as parameters for pytest.mark.parametrize; no other file of the folder."""
    names = sorted(name for name in SCRIPTS if fnmatch(f"{name}.py", pattern))
    return [pytest.param(importlib.import_module(name), id=name) for name in names]


def small(script: str, env_id: str | None = None, total: int = 64) -> list[str]:
    return [*SMALL[script].split(), "--env-id", env_id or ENV[script], "--total-timesteps", str(total)]


def is_one_line(err: str) -> bool:
    return "Traceback" not in err and [line[:7] for line in err.splitlines()].count("error: ") == 1


def wait_for_the_next_second():
    """Before a resume in this process, which is too fast for TensorBoard.

    It reads event files in the order of their names: the second in which they were begun, then the process id.
    """
    time.sleep(1.01 - time.time() % 1)


def read_checkpoint(run_dir: Path) -> dict:
    """What checkpoint.pt holds: the version, the state of every part and the progress."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def train_here(script, run_dir: Path, **flags) -> None:
    """A run of a continuous script in this process, without its command line."""
    args = script.Args(**flags, run_dir=str(run_dir))
    for own_args in args.split():
        Path(own_args.run_dir).mkdir(parents=True, exist_ok=True)
    envs = script.Envs(args, args.num_envs)
    script.train(args, envs)
    envs.close()


def load_agent(script, run_dir: Path):
    """Arguments, networks and normalization of a continuous script's saved model."""
    from safetensors.torch import load_file

    saved = json.loads((run_dir / "result.json").read_text())["args"]
    args, tensors = script.Args(**saved), load_file(run_dir / "model.safetensors")
    normalizer = script.Normalizer(1, 1, len(tensors["obs_mean"]), args.gamma)
    normalizer.load_state_dict({name: tensors.pop(name)[None, None] for name in ("obs_mean", "obs_var")}, strict=False)
    action_dim = tensors["actor.4.bias"].numel() // args.num_bins
    agent = script.Agent([torch.Generator()], normalizer.obs_mean.shape[-1], action_dim, args.num_bins)
    agent.load_state_dict({name: x[None] for name, x in tensors.items()})
    return args, agent, normalizer


@contextmanager
def largest_file(num_bytes: int):
    """Stands for a full disk: what makes a file of this process larger fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def ends_with(capsys):
    """What is in the block ends the program with that exit code, and its last line is an error that matches."""

    @contextmanager
    def ends_with(pattern: str, code: int = 2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            yield
        line = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == code and line.startswith("error: ") and re.search(pattern, line), line

    return ends_with


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a script's main in an empty folder; its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    import strange_envs

    monkeypatch.setattr(strange_envs.Toy, "opened", 0)

    def call(script, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        code = 0
        try:
            script.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Folder of tiny models and data sets for the language scripts."""
    import tiny  # takes seconds, which the tests of the other scripts need not wait for

    return tiny.build(tmp_path_factory.mktemp("assets"))
