"""No tensor is left on the wrong device: whole runs on a pretended GPU, stopped and resumed.

Convolutions and attention take other kernels there, which round differently; without them every number is the CPU's.
"""

import subprocess
import sys

import pytest
from conftest import ATARI, CONTINUOUS, LANGUAGE, ROOT
from same_numbers import numbers, same

FLAGS = dict.fromkeys(CONTINUOUS, "--env-id Pendulum-v1 --num-steps 128 --total-timesteps 768 --num-seeds 2")
FLAGS |= dict.fromkeys(ATARI, "--num-steps 8 --total-timesteps 48 --num-threads 1")
COMMON = "--num-envs 2 --anneal-lr --ent-coef 0.01"
SPPO = "--num-minibatches 4 --update-epochs 2"


def train(script, flags, folder):
    """Runs in folder/cpu and folder/gpu; their numbers."""
    command = [sys.executable, ROOT / "tests/pretended_gpu.py", script, folder, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [numbers(folder / device) for device in ("cpu", "gpu")]


@pytest.mark.parametrize("script", FLAGS)
def test_control_script_mixes_no_devices(script, tmp_path):
    cpu, gpu = train(script, f"{FLAGS[script]} {COMMON} {SPPO * script.startswith('sppo')}".split(), tmp_path)
    assert len(cpu) > 10 and cpu.keys() == gpu.keys()
    assert script in ATARI or [key for key in cpu if not same(cpu[key], gpu[key])] == []


@pytest.mark.parametrize("reward", ["sentiment", "adapter", "scalar"])
def test_language_script_mixes_no_devices(reward, assets, tmp_path):
    import tiny

    script = LANGUAGE[reward != "sentiment"]
    small = {"num_updates": 2, "update_epochs": 1, "eval_samples": 4, "target_coef": 0.1}
    flags = tiny.flags(script, assets) | small | {"reward_model": str(assets / reward)}
    train(script, tiny.command_line(flags), tmp_path)
