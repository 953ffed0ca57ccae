"""Training speed of the scripts as ratios to Stable-Baselines3, or TRL, at the same settings, measured in turn.

    python benchmark/peers/throughput.py     # all four scripts, eager and compiled
    python benchmark/peers/throughput.py --scripts sppo_continuous_discretized --num-seeds 10
    python benchmark/peers/throughput.py --scripts sppo_continuous_discretized --scaling 1 2 5 10 30
    python benchmark/peers/throughput.py --scripts sppo_rlhf_imdb    # beside TRL 1.12.0, 6-layer GPT-2

Machines are shared and drift, so every round runs all sides one after the other, backwards in every second round, and
only ratios within a round are compared: by the clock and, which neighbours disturb less, by CPU seconds of the whole
process. Printed are their medians with 95 % bootstrap intervals over the rounds after the first, absolute speeds and
peak memory. Compilation and evaluation are not counted, on either side. Both sides of Atari use a GPU where there is
one.

"environments" and "arithmetic" are physical limits: what the environments alone would reach (continuous scripts), or
the script's matrix products and convolutions at the rate of large matrix products.
--scaling shows in the same way how the total grows with the number of agents in one process.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stats import bootstrap_interval, markdown

CONTROL = "sppo_continuous_discretized", "sa2c_continuous_discretized", "sppo_atari", "sa2c_atari"
LENGTHS = {"prompt_length": 64, "response_length": 32}
LANGUAGE = {"num_trajectories": 16, "update_epochs": 2, "minibatch_size": 8, "rollout_batch_size": 16}
# glibc's malloc keeps what tensors above 32 MB leave, see docs/language-models.md
MEMORY_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


@dataclass
class Args:
    scripts: tuple[str, ...] = CONTROL  # scripts to measure
    env_id: str | None = None  # environment; default HalfCheetah-v4 and BreakoutNoFrameskip-v4
    steps: int | None = None
    """environment steps of each agent and measurement; default 20,480 and on Atari 4,096; language: updates, 3"""
    rounds: int = 10  # rounds that count; one more comes first and does not
    num_seeds: int = 1  # agents trained at once by the continuous scripts; their steps are added up
    threads: int | None = None  # torch threads on both sides; default 1 and on Atari 2
    variants: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")  # without and with --compile
    scaling: tuple[int, ...] = ()
    """instead of ratios: numbers of agents in one process to compare (continuous scripts, compiled)"""


@dataclass
class Speed:
    """What one run did, summed over its agents."""

    wall: float  # steps, or tokens of responses, per second
    cpu: float  # the same per CPU second of the process with all its threads
    memory: float = 0.0  # GiB, at most


def clocks() -> np.ndarray:
    """Seconds by the clock, and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def speed(steps: int, seconds: np.ndarray) -> Speed:
    """Of so many steps in so many seconds by the clock and of CPU."""
    return Speed(*map(float, steps / seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


# One run of a side


def stable_baselines3(script: str, env_id: str, steps: int, threads: int) -> Speed:
    """Stable-Baselines3's PPO or A2C at the settings of the script."""
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    rmsprop = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    algorithm, num_envs, options = {
        "sppo_atari": (PPO, 8, {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}),
        "sa2c_atari": (A2C, 16, {"ent_coef": 0.01, "vf_coef": 0.25, "policy_kwargs": rmsprop}),
        "sppo_continuous_discretized": (PPO, 1, {}),
        "sa2c_continuous_discretized": (A2C, 4, {"n_steps": 8}),
    }[script]
    if script.endswith("atari"):
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        env = VecFrameStack(make_atari_env(env_id, n_envs=num_envs), n_stack=4)
        model = algorithm("CnnPolicy", env, device="auto", seed=1, **options)  # the device that our scripts choose
    else:
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None)
        model = algorithm("MlpPolicy", VecNormalize(make_vec_env(env_id, num_envs)), device="cpu", seed=1, **options)
    model.learn(num_envs * model.n_steps)  # warm up
    first, start = model.num_timesteps, clocks()
    model.learn(steps, reset_num_timesteps=False)
    return speed(model.num_timesteps - first, clocks() - start)


def ours(script: str, env_id: str, steps: int, threads: int, num_seeds: int, compiled: bool) -> Speed:
    """One of our scripts, steps summed over its agents.

    train calls perf_counter before and after each iteration; the CPU time is taken there too.
    """
    marks, perf_counter = [], time.perf_counter

    def clock() -> float:
        now = perf_counter()
        if sys._getframe(1).f_code.co_name == "train":
            marks.append((now, time.process_time()))
        return now

    with mock.patch("time.perf_counter", clock):
        results = finished_run(script, env_id, steps, threads, num_seeds, compiled)
    timed = iterations(marks)
    counted = len(timed) / (len(timed) + 1)  # the first one is not timed: it may compile
    total, seconds = num_seeds * results[0]["total_timesteps"] * counted, timed.sum(0)
    if abs(sum(result["sps"] for result in results) / (total / seconds[0]) - 1) > 0.01:
        raise RuntimeError(f"{script} counts other iterations than this program")
    return speed(total, seconds)


def iterations(marks: list[tuple[float, float]]) -> np.ndarray:
    """Seconds by the clock and of CPU of each timed iteration; the first has a start and no end."""
    ends = np.array(marks[len(marks) % 2 :]).reshape(-1, 2, 2)
    return ends[:, 1] - ends[:, 0]


def finished_run(script: str, env_id: str, steps: int, threads: int, num_seeds: int, compiled: bool) -> list[dict]:
    """What one of our scripts leaves in result.json, of every agent, without the evaluation."""
    module = importlib.import_module(script)
    module.evaluate = lambda args, *_: np.zeros((num_seeds, 10) if hasattr(args, "num_seeds") else 10)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        sys.argv = [script, "--env-id", env_id, "--run-dir", str(run_dir), "--total-timesteps", str(steps)]
        sys.argv += ["--num-threads", str(threads), *["--compile"] * compiled]
        sys.argv += ["--num-seeds", str(num_seeds)] if num_seeds > 1 else []
        with contextlib.redirect_stdout(io.StringIO()):
            module.main()
        return [json.loads(path.read_text()) for path in run_dir.rglob("result.json")]


def environments_alone(script: str, env_id: str, steps: int, num_seeds: int) -> Speed:
    """The training environments of num_seeds agents in one process, actions constant."""
    module = importlib.import_module(script)
    args = module.Args(env_id=env_id, num_seeds=num_seeds)
    envs = module.Envs(args, args.num_envs)
    actions = np.zeros((*envs.shape, envs.action_dim), np.int64)
    envs.reset(args.seeds, 0)
    start = clocks()
    for _ in range(steps):
        envs.step(actions)
    return speed(steps * num_seeds * args.num_envs, clocks() - start)


def arithmetic_alone(run: Callable[[], int], threads: int) -> Speed:
    """Steps per second of a run, which returns their number, were there nothing but its products and convolutions.

    They are done at the rate of matrix products of 2048 by 2048.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        steps = run()
    torch.set_num_threads(threads)
    x = torch.randn(2048, 2048, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(5):
        start = clocks()
        (x @ x).sum().item()  # waits for a GPU
        seconds.append(clocks() - start)
    return speed(steps, np.min(seconds, 0) * counter.get_total_flops() / (2 * 2048**3))


def control_arithmetic(script: str, env_id: str, steps: int, threads: int) -> Speed:
    run = partial(finished_run, script, env_id, steps, threads, 1, False)
    return arithmetic_alone(lambda: run()[0]["total_timesteps"], threads)


def language_models(folder: Path) -> dict[str, str]:
    """Random GPT-2s of 6 layers as policy and reward model, and texts whose first halves are 64 tokens: their paths."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<|endoftext|>", *(f"w{i}" for i in range(50_256))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0], model_max_length=1024)
    torch.manual_seed(1)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    config = GPT2Config(n_layer=6, bos_token_id=0, eos_token_id=0, **labels)
    for name, model in (("policy", GPT2LMHeadModel(config)), ("reward_model", GPT2ForSequenceClassification(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "dataset").mkdir()
    texts = np.random.default_rng(1).choice(words[1:], (200, 128))
    for split in ("train", "validation"):
        rows = pd.DataFrame({"text": map(" ".join, texts)})
        rows.to_json(folder / "dataset" / f"{split}.jsonl", orient="records", lines=True)
    return {name: str(folder / name) for name in ("policy", "reward_model", "dataset")}


def language(side: str, paths: dict[str, str], updates: int, threads: int, lengths: dict[str, int]) -> Speed:
    """sppo_rlhf_imdb.py ("ours") or TRL's trainer over the same networks: tokens of responses, after one update more.

    Evaluation, checkpoints and the saved policy are left out on both sides. "arithmetic": see arithmetic_alone.
    """
    script, marks = importlib.import_module("sppo_rlhf_imdb"), []
    settings = LANGUAGE | lengths | paths | {"num_updates": updates + 1, "num_threads": threads}
    tokens = LANGUAGE["num_trajectories"] * lengths["response_length"]  # of an update
    script.evaluate = lambda *_: ({"eval/score": 0.0, "eval/perplexity": 0.0}, [])
    script.Run.save = script.Run.save_policy = script.Run.finish = lambda *_: None
    write = script.Run.log

    def log(self, update: int, metrics: dict[str, float], *samples) -> None:
        write(self, update, metrics, *samples)
        if "objective/scores" in metrics:  # the end of an update
            marks.append(clocks())

    def train_ours(folder: str) -> int:
        same = {"alpha": 1.0, "beta": 0.0, "top_k": 0, "min_response_length": 0, "max_grad_norm": 1e9}
        args = script.Args(run_dir=folder, **settings, **same)
        learner = script.Learner(args)
        run = script.Run(args, learner)
        run.log(0, {})
        script.train(args, learner, run)
        return tokens * len(marks)

    script.Run.log = log
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if side == "arithmetic":
            return arithmetic_alone(partial(train_ours, folder), threads)
        if side == "TRL":
            trl_baseline = importlib.import_module("peers.trl_baseline")
            trl_baseline.train(trl_baseline.Args(folder, **settings), Path(folder))
        else:
            train_ours(folder)
    return speed(tokens * updates, marks[-1] - marks[0])


# All sides in turn


def in_fresh_process(function: Callable, *inputs):
    """What function(*inputs) returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(function, *inputs).result()


def in_turn(rounds: int, sides: dict[str, Callable[[], Speed]], label: str) -> dict[str, list[Speed]]:
    """Each side once in every round, backwards in every second one; without the first round."""
    found, loads, start = {name: [] for name in sides}, [], time.perf_counter()
    for i in range(rounds + 1):
        loads.append(os.getloadavg()[0])
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(sides[name]())
        left = (time.perf_counter() - start) / (i + 1) * (rounds - i) / 60
        print(f"{label}: round {i} of {rounds}, {left:.0f} min left", file=sys.stderr, flush=True)
    print(f"{label}, {rounds} rounds; {processor()}, {len(os.sched_getaffinity(0))} CPUs, ", end="")
    print(f"load {min(loads):.1f} to {max(loads):.1f} at the start of a round\n")
    return {name: speeds[1:] for name, speeds in found.items()}


def processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def ratio(speeds: list[Speed], others: list[Speed], kind: str) -> str:
    """Median ratio of the rounds, by the clock ("wall") or by CPU seconds ("cpu"), with its 95 % bootstrap interval."""
    ratios = np.array([getattr(a, kind) / getattr(b, kind) for a, b in zip(speeds, others)])
    interval = bootstrap_interval([ratios], np.median)
    return f"{np.median(ratios):.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def table(found: dict[str, list[Speed]], bases: list[str]) -> pd.DataFrame:
    """A row for each side: its ratios to each of bases, its median speed and its memory."""
    rows = []
    for name, speeds in found.items():
        row = {"": name}
        for base in bases:
            row[f"times {base}"] = ratio(speeds, found[base], "wall")
            row[f"per CPU second, times {base}"] = ratio(speeds, found[base], "cpu")
        row["per second"] = f"{np.median([one.wall for one in speeds]):,.0f}"
        row["per CPU second"] = f"{np.median([one.cpu for one in speeds]):,.0f}"
        rows.append(row | {"GiB": f"{max(one.memory for one in speeds):.2f}"})
    return pd.DataFrame(rows)


def control_sides(args: Args, script: str) -> tuple[dict[str, Callable[[], Speed]], list[str], str]:
    """What to run, to which sides the ratios are, and a title."""
    atari = script.endswith("atari")
    env_id = args.env_id or ("BreakoutNoFrameskip-v4" if atari else "HalfCheetah-v4")
    steps, threads = args.steps or (4096 if atari else 20_480), args.threads or (2 if atari else 1)
    agents = 1 if atari else args.num_seeds
    title = f"{script}, {env_id}, {threads} thread(s), {steps:,} steps"

    def measure(function: Callable, *inputs) -> Callable[[], Speed]:
        return partial(in_fresh_process, function, script, env_id, *inputs)

    if args.scaling:
        sides = {f"{n} agents": measure(ours, steps, threads, n, True) for n in args.scaling}
        return sides, [f"{args.scaling[0]} agents"], f"{title}, compiled"
    sides = {"Stable-Baselines3": measure(stable_baselines3, steps, threads)}
    sides |= {name: measure(ours, steps, threads, agents, name == "compile") for name in args.variants}
    if atari:
        limit, sides["arithmetic"] = "arithmetic", measure(control_arithmetic, steps // 2, threads)
    else:
        limit, sides["environments"] = "environments", measure(environments_alone, 3000, agents)
    return sides, ["Stable-Baselines3", limit], f"{title}, {agents} agent(s)"


def language_sides(args: Args, folder: Path) -> tuple[dict[str, Callable[[], Speed]], list[str], str]:
    """The same beside TRL."""
    updates, threads = args.steps or 3, args.threads or 1
    paths = in_fresh_process(language_models, folder)

    def measure(side: str, updates: int, environment: dict[str, str]) -> Speed:
        with mock.patch.dict(os.environ, environment):  # the C library reads it when a process starts
            return in_fresh_process(language, side, paths, updates, threads, LENGTHS)

    sides = {side: partial(measure, side, updates, {}) for side in ("TRL", "ours")}
    sides |= {f"{side}, memory kept": partial(measure, side, updates, MEMORY_KEPT) for side in sides}
    sides["arithmetic"] = partial(measure, "arithmetic", 0, {})
    title = f"sppo_rlhf_imdb, 6-layer GPT-2, {threads} thread(s), {updates} update(s)"
    return sides, ["TRL", "TRL, memory kept", "ours", "arithmetic"], title


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    numbers = (args.rounds, args.num_seeds, args.threads, args.steps, *args.scaling)
    if any(number is not None and number < 1 for number in numbers):
        print("error: --rounds, --num-seeds, --threads, --steps and --scaling must be at least 1", file=sys.stderr)
        return 2
    if unknown := {*args.scripts} - {*CONTROL, "sppo_rlhf_imdb"}:
        names = ", ".join([*CONTROL, "sppo_rlhf_imdb"])
        print(f"error: --scripts {' '.join(sorted(unknown))}: known are {names}", file=sys.stderr)
        return 2
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            control = script in CONTROL
            sides, bases, title = control_sides(args, script) if control else language_sides(args, Path(folder))
            found = in_turn(args.rounds, sides, title)
        print(markdown(table(found, bases)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
