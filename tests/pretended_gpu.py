"""Run by test_devices.py: a script on the CPU, then on a GPU that is none, each time stopped by Ctrl-C and resumed.

    python tests/pretended_gpu.py SCRIPT FOLDER FLAGS...    # run directories FOLDER/cpu and FOLDER/gpu

Tensors on the GPU say so and hold their numbers in tensors of the CPU, where everything is computed. What CUDA refuses
raises: operations on tensors of both devices, but for copies and for indices, and numpy() of a tensor on the GPU. So
does what CUDA only makes slow: matrix products on the CPU, and a scalar of the CPU among tensors of the GPU. Random
numbers of the control scripts must come from the CPU's generators, which a replayed CUDA graph cannot freeze.
"""

import importlib
import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")  # for the rest of the process: hence one of its own
torch.gpu.get_rng_state = lambda *_: torch.get_rng_state()  # the pretended device has no generator
torch.gpu.set_rng_state = lambda *_: None
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]
GPU, aten = torch.device("gpu", 0), torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # the indices may be anywhere
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution}
CHECKS = ("check_policy",)  # some texts while models are loaded, wherever the model is
checking = []
drawn_on_gpu = set()  # operations that drew random numbers there


class GPUTensor(torch.Tensor):
    """A tensor on the pretended GPU; numbers is the tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        options = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **options, device=GPU)
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.numbers.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:  # tells those who save a model which tensors are tied
        return self.numbers.untyped_storage()

    def __reduce_ex__(self, protocol: int):  # in a checkpoint, as load_checkpoint reads it
        return self.numbers.__reduce_ex__(protocol)


class Computing(TorchDispatchMode):
    """Sees the operations that no tensor on the GPU goes into."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    """What operation returns, on the device that it names or else on that of its tensors."""
    name, tensors = operation.overloadpacket, tensors_of(args, kwargs)
    meeting = tensors if name not in INDEXING else tensors_of(args[0], args[2:], kwargs)
    devices = {x.device for x in meeting}
    slow = name in PRODUCTS and devices != {GPU} and not checking
    if (len(devices) > 1 and name not in COPIES) or slow:
        raise RuntimeError(f"{operation} of {', '.join(f'{tuple(x.shape)} on {x.device}' for x in meeting)}")
    device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
    if device == GPU and torch.Tag.nondeterministic_seeded in operation.tags:
        drawn_on_gpu.add(str(operation))
    if kwargs.get("device"):
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(GPUTensor, lambda x: x.numbers, (args, kwargs))
    written = {id(x.numbers): x for x in tensors if isinstance(x, GPUTensor)}  # an operation in place returns it
    result = operation(*args, **kwargs)
    if device.type == "cpu":
        return result
    return tree_map_only(torch.Tensor, lambda x: written[id(x)] if id(x) in written else GPUTensor(x), result)


def tensors_of(*tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@contextmanager
def pretended_gpu(script):
    """Within it a script finds a GPU."""
    with ExitStack() as stack:
        if hasattr(script, "accelerate"):
            stack.enter_context(patch.object(script.accelerate.Accelerator, "device", GPU))
            for name in CHECKS:
                stack.enter_context(patch.object(script, name, check(getattr(script, name))))
        else:
            device = script.Args.device.fget
            pretended = property(lambda args: GPU if device(args) == "cuda" else "cpu")
            stack.enter_context(patch.object(script.Args, "device", pretended))
            stack.enter_context(patch.object(script, "torch", TorchWithGPU("torch")))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) makes it on the CPU and copies it
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(Computing())
        yield


def check(function):
    """The function, which may use the CPU."""

    def checks(*inputs, **options):
        checking.append(function)
        try:
            return function(*inputs, **options)
        finally:
            checking.pop()

    return checks


class TorchWithGPU(ModuleType):
    """torch as a script sees it where there is a GPU."""

    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str):
        return getattr(torch, name)


def make_eventful(script) -> None:
    """Games in which a time limit and a lost life come every few steps."""
    step, calls = script.Envs.step, []

    def eventful(envs, actions):
        obs, rewards, terminated, truncated, game_over, infos = step(envs, actions)
        calls.append(envs)
        if len(actions) == 2 and len(calls) % 5 == 0:  # of training
            truncated[0], envs.must_fire[1] = True, True
            infos["final_obs"] = obs
        return obs, rewards, terminated, truncated, game_over, infos

    script.Envs.step = eventful


def run(script, run_dir: Path, flags: list[str]) -> None:
    """A run that Ctrl-C stops in its second iteration, and the rest of it."""
    gae, calls = script.gae, []

    def interrupting(*inputs):
        calls.append(inputs)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return gae(*inputs)

    for expected, options in ((130, [*flags, "--run-dir", str(run_dir)]), (0, ["--resume", str(run_dir)])):
        with patch.object(sys, "argv", [script.__file__, *options]), patch.object(script, "gae", interrupting):
            try:
                code = script.main() or 0
            except SystemExit as end:
                code = end.code
        if code != expected:
            raise SystemExit(f"{' '.join(options)} ended with exit code {code}")


def main() -> None:
    name, folder, *flags = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    script = importlib.import_module(name)
    language = hasattr(script, "accelerate")
    if name.endswith("atari"):
        make_eventful(script)
    script.LOG_EVERY, script.SAVE_EVERY = 1, 0  # of control: a checkpoint of every rollout
    flags = flags if language else [*flags, "--eval-episodes", "1"]
    run(script, Path(folder, "cpu"), flags)
    with pretended_gpu(script):
        run(script, Path(folder, "gpu"), flags if language else [*flags, "--cuda"])
    if drawn_on_gpu and not language:
        raise SystemExit(f"random numbers of the GPU: {', '.join(drawn_on_gpu)}")


if __name__ == "__main__":
    main()
