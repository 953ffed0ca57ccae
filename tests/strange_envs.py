"""Environments of the kinds that strangers bring: --env-id strange_envs:Array-v0, with this folder in PYTHONPATH.

Importing this registers them. Each is the toy below but for one habit.
"""

import contextlib
import os
import subprocess
import sys
import threading

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

LARGEST = np.finfo(np.float32).max


class Toy(gym.Env):
    """Ten-step episodes; three numbers to see, two to do."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = Box(-1, 1, (3,))
    action_space = Box(-1, 1, (2,))
    opened = 0

    def __init__(self, render_mode=None):
        self.render_mode, self.steps = render_mode, 0
        Toy.opened += 1

    def see(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), {}

    def step(self, action):
        self.steps += 1
        return self.see(), float(action.sum()), False, self.steps == 10, {}

    def render(self):
        return np.full((64, 64, 3), self.steps, np.uint8)


def regular(wrap_obs=lambda x: x, wrap_reward=lambda x: x, wrap_flag=lambda x: x):
    """A toy whose step returns its numbers in another form."""

    class Regular(Toy):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return wrap_obs(obs), info

        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            return wrap_obs(obs), wrap_reward(reward), wrap_flag(terminated), wrap_flag(truncated), info

    return Regular


class Mixed(Toy):
    """A list and a whole number in most steps, arrays at the end, which copies reach at different times."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.length = 5 + Toy.opened % 3

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        if self.steps < self.length:
            return obs, 0, [terminated], False, info
        return obs, np.array([reward]), terminated, np.array([True]), info


class OneBuffer(Toy):
    """All copies write what they see into the same array."""

    buffer = np.zeros(3, np.float32)

    def see(self):
        self.buffer[:] = super().see()
        return self.buffer


class Licence(Toy):
    """Of which only four can be opened in a process."""

    def __init__(self, render_mode=None):
        if Toy.opened >= 4:
            raise RuntimeError("no licence left")
        super().__init__(render_mode)


class Port(Toy):
    def __init__(self, render_mode=None):
        if Toy.opened >= 4:
            raise OSError(98, "Address already in use")
        super().__init__(render_mode)


class Tired(Toy):
    """Its later copies raise in a step: those of the evaluation."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.late = Toy.opened > 4

    def step(self, action):
        if self.late:
            raise RuntimeError("tired")
        return super().step(action)


class FirstNan(Toy):
    """The first copy, of the first seed, has no numbers."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.first = Toy.opened == 1

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, float("nan") if self.first else reward, *rest


class Children(Toy):
    """With a child process, and a thread that keeps the process alive, until it is closed."""

    running = []  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait, args=(60,)).start()
        self.running.append(self.child)

    def close(self):
        self.closed.set()
        self.child.kill()
        self.child.wait()
        self.running.remove(self.child)


class ChildrenNan(Children):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan"), *rest


class ChildrenSequence(Children):
    observation_space = gym.spaces.Sequence(gym.spaces.Discrete(3))


class ChildrenInteger(Children):
    action_space = Box(0, 5, (2,), np.int64)


class ChildrenRaise(Children):
    def step(self, action):
        raise RuntimeError("tired")


class Chatty(Toy):
    """Writes to the descriptors themselves, as C libraries do."""

    def reset(self, **kwargs):
        for fd in (1, 2):
            with contextlib.suppress(OSError):
                os.write(fd, b"hello from C\n")
        return super().reset(**kwargs)


class NoMode(Toy):
    metadata = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()


class Text(Toy):
    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012

    def render(self):
        return "text"


class Unrenderable(Toy):
    def render(self):
        raise RuntimeError("no display\nat all")


def bounded(*args, **kwargs):
    class Bounded(Toy):
        action_space = Box(*args, **kwargs)

        def step(self, action):
            assert self.action_space.contains(np.asarray(action)), action
            return super().step(np.asarray(action, np.float64) * 1e-38)

    return Bounded


class NeedsArgument(Toy):
    def __init__(self, model, render_mode=None):
        super().__init__(render_mode)


TOYS = {
    "Toy": Toy,
    "Array": regular(np.array, lambda x: np.array([x]), lambda x: np.array([x])),
    "Deep": regular(lambda x: x[None], lambda x: np.array([[x]]), lambda x: np.array([[x]])),
    "Scalar": regular(np.array, np.array, np.array),
    "NumpyBool": regular(list, np.float32, np.bool_),
    "Int": regular(list, lambda x: int(x), int),
    "Bool": regular(np.float64, lambda x: x > 0, lambda x: x),
    "Half": regular(np.float16, np.float16, np.int8),
    "List": regular(tuple, lambda x: [x], lambda x: [x]),
    "Mixed": Mixed,
    "OneBuffer": OneBuffer,
    "Licence": Licence,
    "Port": Port,
    "Tired": Tired,
    "FirstNan": FirstNan,
    "Children": Children,
    "ChildrenNan": ChildrenNan,
    "ChildrenSequence": ChildrenSequence,
    "ChildrenInteger": ChildrenInteger,
    "ChildrenRaise": ChildrenRaise,
    "Chatty": Chatty,
    "NoMode": NoMode,
    "Text": Text,
    "Unrenderable": Unrenderable,
    "IntegerBox": bounded(0, 5, (2,), np.int64),
    "BoolBox": bounded(0, 1, (2,), bool),
    "Uint8Box": bounded(0, 255, (2,), np.uint8),
    "Overflow": bounded(-LARGEST, LARGEST, (2,)),
    "HalfFloats": bounded(-1, 1, (2,), np.float16),
    "Doubles": bounded(-1e308, 1e308, (2,), np.float64),
    "Wide": bounded(0, LARGEST, (2,)),
    "OneSided": bounded(0, np.inf, (2,)),
    "PartlyOneSided": bounded(np.array([0, 0], np.float32), np.array([1, np.inf], np.float32)),
    "Empty": bounded(-1, 1, (0,)),
    "Point": bounded(-1, 1, ()),
    "NeedsArgument": NeedsArgument,
}
for name, toy in TOYS.items():
    gym.register("PlainToy-v0" if name == "Toy" else f"{name}-v0", entry_point=toy)
gym.register("NoModule-v0", entry_point="no_such_module:Toy")
gym.register("NoClass-v0", entry_point="strange_envs:NoSuchClass")
