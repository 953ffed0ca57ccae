"""Environments of the kinds that strangers bring: --env-id strange_envs:Array-v0, with this folder in PYTHONPATH.

Importing this registers them. Each is the toy below but for one habit.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading

import gymnasium as gym
import numpy as np
import torch
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


class OldReset(Toy):
    """As gym's before 2022: reset returns the observation alone."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0]


class Shrinking(Toy):
    """After a while one number stands for three."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs[:1] if self.steps > 3 else obs, *rest


class ShortSeed(Toy):
    """Takes the seed of a generator in C."""

    def reset(self, *, seed=None, options=None):
        np.zeros(1, np.int32).fill(seed or 0)
        return super().reset(seed=seed)


class Scenario(Toy):
    """The seed is the number of a scenario."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and not 0 <= seed < 1000:
            raise ValueError(f"there is no scenario {seed}")
        return super().reset(seed=seed)


class GlobalDraws(Toy):
    """Draws from the generators that the whole process shares, in its constructor as well."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.size = random.random()

    def see(self):
        return np.array([random.random() * self.size, np.random.random(), torch.rand(1).item()], np.float32)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + float(obs.sum()), *rest


class Afterwards(Toy):
    """Its later copies, those of the evaluation, end at different times and can do nothing afterwards."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.length, self.over, self.late = 3 + Toy.opened % 5, False, Toy.opened > 2

    def reset(self, **kwargs):
        if self.late and self.over:
            raise RuntimeError("one episode was enough")
        return super().reset(**kwargs)

    def step(self, action):
        if self.late and self.over:
            raise RuntimeError("one episode was enough")
        obs, _, _, _, info = super().step(action)
        self.over = self.over or self.steps == self.length
        return obs, 1.0, self.steps == self.length, False, info


class Sampling(Toy):
    """Draws from its own spaces, as the environments of stable_baselines3.common.envs do."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.observation_space, self.action_space = Box(-1, 1, (3,)), Box(-1, 1, (2,))

    def see(self):
        return self.observation_space.sample()

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + float(self.action_space.sample().sum()), *rest


class NotClosable(Toy):
    def close(self):
        raise AttributeError("no window")


class Wandering(Toy):
    """Changes the working directory, as wrappers of simulators do."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        os.chdir(tempfile.gettempdir())


class Learning(Toy):
    """Its reward is what a network has learned, and its physics a gradient."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.net = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01)
        self.mass = torch.ones(1, requires_grad=True) * 2

    def reset(self, **kwargs):
        torch.autograd.grad((self.mass**2).sum(), self.mass)
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        loss = self.net(torch.from_numpy(obs)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return obs, reward + loss.item(), *rest


class Mission(gym.Space):
    """A space that gymnasium does not know."""


class OwnSpace(Toy):
    observation_space = gym.spaces.Dict(x=Box(-1, 1, (3,)), mission=Mission())


class Pictures(Toy):
    observation_space = Box(0, 255, (16, 16, 3), np.uint8)


class PicturesToo(Toy):
    observation_space = gym.spaces.Dict(x=Box(-1, 1, (3,)), picture=Box(0, 255, (16, 16), np.uint8))


class Growing(Toy):
    def render(self):
        return np.zeros((64 + 2 * self.steps, 64, 3), np.uint8)


class Gray(Toy):
    def render(self):
        return np.zeros((64, 64), np.uint8)


class OneFrame(Toy):
    """Renders into the same array every time."""

    frame = np.zeros((64, 64, 3), np.uint8)

    def render(self):
        self.frame[:] = 20 * self.steps
        return self.frame


class NoFps(Toy):
    metadata = {"render_modes": ["rgb_array"], "render_fps": None}  # noqa: RUF012


class Breakable(Toy):
    """Cannot be rendered from its fifth step on."""

    def render(self):
        if self.steps > 4:
            raise RuntimeError("the window was closed")
        return super().render()


class Scaled(Toy):
    """Takes an argument."""

    def __init__(self, scale=1.0, render_mode=None):
        super().__init__(render_mode)
        self.scale = scale

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.scale, *rest


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
    "NoneFlags": regular(wrap_flag=lambda x: x or None),
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
    "TwoRewards": regular(wrap_reward=lambda x: np.array([x, 0.5])),
}
TOYS |= {toy.__name__: toy for toy in (OldReset, Shrinking, ShortSeed, Scenario, GlobalDraws, Afterwards, NotClosable)}
TOYS |= {toy.__name__: toy for toy in (Wandering, Learning, OwnSpace, Pictures, PicturesToo)}
TOYS |= {toy.__name__: toy for toy in (Growing, Gray, NoFps, Breakable, Scaled, OneFrame, Sampling)}
for name, toy in TOYS.items():
    gym.register("PlainToy-v0" if name == "Toy" else f"{name}-v0", entry_point=toy)
gym.register("NoModule-v0", entry_point="no_such_module:Toy")
gym.register("NoClass-v0", entry_point="strange_envs:NoSuchClass")
