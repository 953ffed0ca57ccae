"""Training speed of the scripts as ratios to Stable-Baselines3, or TRL, at the same settings, measured in turn.

    python benchmark/peers/throughput.py     # all four scripts, eager and compiled
    python benchmark/peers/throughput.py --scripts sppo_continuous_discretized --num-seeds 10
    python benchmark/peers/throughput.py --scripts sppo_continuous_discretized --scaling 1 2 5 10 30
    python benchmark/peers/throughput.py --scripts sppo_rlhf_imdb    # beside TRL 1.12.0, 6-layer GPT-2

Machines are shared and drift, so every round runs Stable-Baselines3 and each variant of ours one after the other,
backwards in every second round, and only ratios within a round are compared: of steps per second and, which neighbours
disturb less, of steps per CPU second of the whole process. Printed are medians with 95 % bootstrap intervals over the
rounds after the first, absolute steps per second, the processor and the load of the machine. Compilation and evaluation
are not counted, on either side. Both sides of Atari use a GPU where there is one. Where the time goes is printed too
(with a GPU, where the program waits for it), and the share of the physical limit: of what the environments alone would
reach (continuous scripts), or the script's matrix products and convolutions at the rate of large matrix products.
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
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stats import bootstrap_interval

SCRIPTS = "sppo_continuous_discretized", "sa2c_continuous_discretized", "sppo_atari", "sa2c_atari"


@dataclass
class Speed:
    """What one run did, summed over its agents."""

    wall: float  # steps per second
    cpu: float  # steps per CPU second of the process with all its threads
    shares: dict[str, float] = field(default_factory=dict)  # of the time by the clock
    memory: float = 0.0  # GiB, at most


@dataclass
class Args:
    scripts: tuple[str, ...] = SCRIPTS
    """scripts to measure"""
    env_id: str | None = None
    """environment; default HalfCheetah-v4 and BreakoutNoFrameskip-v4"""
    steps: int | None = None
    """environment steps of each agent and measurement; default 20,480 and on Atari 4,096; language: updates, 3"""
    rounds: int = 10
    """rounds that count; one more comes first and does not"""
    num_seeds: int = 1
    """agents trained at once by the continuous scripts; their steps are added up"""
    threads: int | None = None
    """torch threads on both sides; default 1 and on Atari 2"""
    variants: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """without and with --compile"""
    scaling: tuple[int, ...] = ()
    """instead of ratios: numbers of agents in one process to compare (continuous scripts, compiled)"""


def stable_baselines3(script: str, env_id: str, steps: int, threads: int) -> Speed:
    """Stable-Baselines3's PPO or A2C at the settings of the script."""
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    policy, algorithm = "MlpPolicy", PPO if script.startswith("sppo") else A2C
    if script == "sppo_atari":
        num_envs, options = 8, {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}
    elif script == "sa2c_atari":
        rmsprop = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
        num_envs, options = 16, {"ent_coef": 0.01, "vf_coef": 0.25, "policy_kwargs": rmsprop}
    else:
        num_envs, options = (1, {}) if algorithm is PPO else (4, {"n_steps": 8})
    if script.endswith("atari"):
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        policy, env = "CnnPolicy", VecFrameStack(make_atari_env(env_id, n_envs=num_envs), n_stack=4)
    else:
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None)
        env = VecNormalize(make_vec_env(env_id, n_envs=num_envs))
    device = "auto" if script.endswith("atari") else "cpu"  # as our scripts choose
    model = algorithm(policy, env, device=device, seed=1, **options)
    model.learn(num_envs * model.n_steps)  # warm up
    first = model.num_timesteps
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(steps, reset_num_timesteps=False)
    wall, cpu, steps = time.perf_counter() - wall, time.process_time() - cpu, model.num_timesteps - first
    return Speed(steps / wall, steps / cpu)


LENGTHS = {"prompt_length": 64, "response_length": 32}
# glibc's malloc keeps what tensors above 32 MB leave, see docs/language-models.md
MEMORY_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
LANGUAGE = {"num_trajectories": 16, "update_epochs": 2, "minibatch_size": 8, "rollout_batch_size": 16}


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
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words[1:], 128)) for _ in range(200)]
    for split in ("train", "validation"):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / "dataset" / f"{split}.jsonl").write_text("".join(lines))
    return {name: str(folder / name) for name in ("policy", "reward_model", "dataset")}


def language(side: str, paths: dict[str, str], updates: int, threads: int, lengths: dict[str, int]) -> Speed:
    """sppo_rlhf_imdb.py ("ours") or TRL's trainer over the same networks: tokens of responses, after one update more.

    Evaluation, checkpoints and the saved policy are left out on both sides. "arithmetic": see arithmetic_alone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    script, marks = importlib.import_module("sppo_rlhf_imdb"), []
    settings = LANGUAGE | lengths | paths | {"num_updates": updates + 1, "num_threads": threads}
    script.evaluate = lambda *_: ({"eval/score": 0.0, "eval/perplexity": 0.0}, [])
    script.Run.save = script.Run.save_policy = script.Run.finish = lambda *_: None
    write = script.Run.log

    def log(self, update: int, metrics: dict[str, float], *samples) -> None:
        write(self, update, metrics, *samples)
        if "objective/scores" in metrics:  # the end of an update
            marks.append((time.perf_counter(), time.process_time()))

    script.Run.log = log
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if side == "TRL":
            trl_baseline = importlib.import_module("peers.trl_baseline")
            trl_baseline.train(trl_baseline.Args(folder, **settings), Path(folder))
        else:
            settings |= {"run_dir": folder, "alpha": 1.0, "beta": 0.0, "top_k": 0, "min_response_length": 0}
            args = script.Args(**settings, max_grad_norm=1e9)
            learner, counter = script.Learner(args), FlopCounterMode(display=False)
            run = script.Run(args, learner)
            run.log(0, {})
            with counter if side == "arithmetic" else contextlib.nullcontext():
                script.train(args, learner, run)
    if side == "arithmetic":
        tokens = LANGUAGE["num_trajectories"] * lengths["response_length"] * (updates + 1)
        operations, rate = counter.get_total_flops() / tokens, large_products(threads)
        return Speed(rate.wall / operations, rate.cpu / operations)
    wall, cpu = np.array(marks[-1]) - marks[0]
    total = LANGUAGE["num_trajectories"] * lengths["response_length"] * updates
    return Speed(total / wall, total / cpu, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def environments_alone(script: str, env_id: str, steps: int, num_seeds: int) -> Speed:
    """The training environments of num_seeds agents in one process, actions constant."""
    module = importlib.import_module(script)
    args = module.Args(env_id=env_id, num_seeds=num_seeds)
    envs = module.Envs(args, args.num_envs)
    actions = np.zeros((*envs.shape, envs.action_dim), np.int64)
    envs.reset(args.seeds, 0)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        envs.step(actions)
    total = steps * num_seeds * args.num_envs
    return Speed(total / (time.perf_counter() - wall), total / (time.process_time() - cpu))


def ours(script: str, env_id: str, steps: int, threads: int, num_seeds: int, compiled: bool) -> Speed:
    """One of our scripts, steps summed over its agents, and where the time goes.

    train calls perf_counter before and after each iteration; the CPU time is taken there too.
    """
    module = importlib.import_module(script)
    marks, seconds, busy, perf_counter = [], {}, [], time.perf_counter

    def clock() -> float:
        now = perf_counter()
        if sys._getframe(1).f_code.co_name == "train":
            marks.append((now, time.process_time()))
        return now

    def time_method(owner: type, name: str, part: str) -> None:
        import torch

        method = getattr(owner, name)

        def timed(*inputs, **options):
            if busy or torch.compiler.is_compiling() or torch.is_grad_enabled():  # the update's forward passes
                return method(*inputs, **options)
            busy.append(part)  # what it calls is in its own time
            start = perf_counter()
            result = method(*inputs, **options)
            seconds[part] = seconds.get(part, 0.0) + perf_counter() - start
            busy.clear()
            return result

        setattr(owner, name, timed)

    time.perf_counter = clock
    atari = script.endswith("atari")
    time_method(module.Envs, "step", "environment")
    time_method(module.Agent, "forward" if atari else "logits", "policy")
    for name in () if atari else ("count", "obs", "rewards"):
        time_method(module.Normalizer, name, "normalization")
    results = finished_run(script, env_id, steps, threads, num_seeds, compiled)
    seconds_of = iterations(marks)
    counted = len(seconds_of) / (len(seconds_of) + 1)  # the first one is not timed: it may compile
    wall, cpu = seconds_of.sum(0)
    total = num_seeds * results[0]["total_timesteps"] * counted
    if abs(sum(result["sps"] for result in results) / (total / wall) - 1) > 0.01:
        raise RuntimeError(f"{script} counts other iterations than this program")
    shares = {part: value / wall * counted for part, value in seconds.items()}
    shares["update and the rest"] = 1 - sum(shares.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Speed(total / wall, total / cpu, shares, memory)


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


def large_products(threads: int) -> Speed:
    """Operations per second, by the clock and per CPU second, of matrix products of 2048 by 2048."""
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(2048, 2048, device="cuda" if torch.cuda.is_available() else "cpu")
    speeds = []
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        (x @ x).sum().item()  # waits for a GPU
        speeds.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = np.min(speeds, 0)
    return Speed(2 * 2048**3 / wall, 2 * 2048**3 / cpu)


def arithmetic_alone(script: str, env_id: str, steps: int, threads: int) -> Speed:
    """Steps per second, were there nothing but the script's products and convolutions, at the rate of large ones."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        (result,) = finished_run(script, env_id, steps, threads, 1, False)
    operations, rate = counter.get_total_flops() / result["total_timesteps"], large_products(threads)
    return Speed(rate.wall / operations, rate.cpu / operations)


def iterations(marks: list[tuple[float, float]]) -> np.ndarray:
    """Seconds by the clock and of CPU of each timed iteration; the first has a start and no end."""
    ends = np.array(marks[len(marks) % 2 :]).reshape(-1, 2, 2)
    return ends[:, 1] - ends[:, 0]


def in_fresh_process(function: Callable, *inputs):
    """What function(*inputs) returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(function, *inputs).result()


def in_turn(rounds: int, measure: dict[str, Callable[[], Speed]], label: str) -> dict[str, list[Speed]]:
    """Each of measure once in every round, backwards in every second one; without the first round."""
    found, loads, start = {name: [] for name in measure}, [], time.perf_counter()
    for i in range(rounds + 1):
        loads.append(os.getloadavg()[0])
        for name in list(measure)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(measure[name]())
        left = (time.perf_counter() - start) / (i + 1) * (rounds - i) / 60
        print(f"{label}: round {i} of {rounds}, {left:.0f} min left", file=sys.stderr, flush=True)
    print(f"{label}, {rounds} rounds; {processor()}, {len(os.sched_getaffinity(0))} CPUs, ", end="")
    print(f"load {min(loads):.1f} to {max(loads):.1f} at the start of a round")
    return {name: speeds[1:] for name, speeds in found.items()}


def processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def ratio(speeds: list[Speed], others: list[Speed]) -> str:
    """Median ratios of the rounds, by the clock and by CPU seconds, with their 95 % bootstrap intervals."""
    texts = []
    for kind in ("wall", "cpu"):
        ratios = np.array([getattr(a, kind) / getattr(b, kind) for a, b in zip(speeds, others)])
        interval = bootstrap_interval([ratios], np.median)
        texts.append(f"{np.median(ratios):.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
    return f"{texts[0]} (per CPU second {texts[1]})"


def median_wall(speeds: list[Speed]) -> str:
    return f"{np.median([speed.wall for speed in speeds]):,.0f}"


def parts(speeds: list[Speed]) -> str:
    """Median shares of the time by the clock."""
    return ", ".join(f"{part} {np.median([s.shares.get(part, 0) for s in speeds]):.0%}" for part in speeds[0].shares)


def compare(args: Args, script: str) -> None:
    env_id, steps, threads = settings(args, script)
    num_seeds = 1 if script.endswith("atari") else args.num_seeds

    def measure(function: Callable, *inputs) -> Callable[[], Speed]:
        return lambda: in_fresh_process(function, script, env_id, *inputs)

    runs = {"Stable-Baselines3": measure(stable_baselines3, steps, threads)}
    runs |= {v: measure(ours, steps, threads, num_seeds, v == "compile") for v in args.variants}
    if script.endswith("atari"):
        limit, runs["limit"] = "arithmetic", measure(arithmetic_alone, steps // 2, threads)
    else:
        limit, runs["limit"] = "environments", measure(environments_alone, 3000, num_seeds)
    label = f"{script}, {env_id}, {num_seeds} agent(s), {threads} thread(s), {steps:,} steps"
    found = in_turn(args.rounds, runs, label)
    peer, alone = found["Stable-Baselines3"], found["limit"]
    for variant in args.variants:
        print(f"  {variant}: {ratio(found[variant], peer)} times Stable-Baselines3, ", end="")
        print(f"{median_wall(found[variant])} and {median_wall(peer)} steps/s; {parts(found[variant])}")
        print(f"    {ratio(found[variant], alone)} of its {limit} alone, {median_wall(alone)} steps/s", flush=True)


def compare_with_trl(args: Args) -> None:
    updates, threads, kept = args.steps or 3, args.threads or 1, ", memory kept"

    def measure(side: str, updates: int, environment: dict[str, str]) -> Callable[[], Speed]:
        def run() -> Speed:
            with mock.patch.dict(os.environ, environment):  # the C library reads it when a process starts
                return in_fresh_process(language, side, paths, updates, threads, LENGTHS)

        return run

    with tempfile.TemporaryDirectory() as folder:
        paths = in_fresh_process(language_models, Path(folder))
        runs = {side: measure(side, updates, {}) for side in ("TRL", "ours")}
        runs |= {side + kept: measure(side, updates, MEMORY_KEPT) for side in runs}
        runs["arithmetic"] = measure("arithmetic", 0, {})
        found = in_turn(args.rounds, runs, f"sppo_rlhf_imdb, 6-layer GPT-2, {threads} thread(s), {updates} update(s)")
    alone = found.pop("arithmetic")
    for side in ("TRL", "ours"):
        print(f"  {side}{kept}: {ratio(found[side + kept], found[side])} times {side}")
    print(f"  ours{kept}: {ratio(found['ours' + kept], found['TRL' + kept])} times TRL{kept}")
    for side, speeds in found.items():
        print(f"  {side}: {ratio(speeds, found['TRL'])} times TRL, {ratio(speeds, alone)} of our arithmetic alone")
        seconds = LANGUAGE["num_trajectories"] * LENGTHS["response_length"] / np.median([s.cpu for s in speeds])
        print(f"    {median_wall(speeds)} tokens/s, {seconds:.1f} CPU seconds per update, ", end="")
        print(f"{max(s.memory for s in speeds):.2f} GiB", flush=True)


def scale(args: Args, script: str) -> None:
    env_id, steps, threads = settings(args, script)
    runs = {
        f"{n} agents": lambda n=n: in_fresh_process(ours, script, env_id, steps, threads, n, True) for n in args.scaling
    }
    found = in_turn(args.rounds, runs, f"{script}, {env_id}, {threads} thread(s), {steps:,} steps, compiled")
    first = found[f"{args.scaling[0]} agents"]
    for name, speeds in found.items():
        print(f"  {name}: {ratio(speeds, first)} times {args.scaling[0]}, {median_wall(speeds)} steps/s; ", end="")
        print(f"{parts(speeds)}; {max(s.memory for s in speeds):.2f} GiB", flush=True)


def settings(args: Args, script: str) -> tuple[str, int, int]:
    """Environment, steps and threads for a script where the command line does not say."""
    if script.endswith("atari"):
        return args.env_id or "BreakoutNoFrameskip-v4", args.steps or 4096, args.threads or 2
    return args.env_id or "HalfCheetah-v4", args.steps or 20_480, args.threads or 1


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    numbers = (args.rounds, args.num_seeds, args.threads, args.steps, *args.scaling)
    if any(number is not None and number < 1 for number in numbers):
        print("error: --rounds, --num-seeds, --threads, --steps and --scaling must be at least 1", file=sys.stderr)
        return 2
    for script in args.scripts:
        if script == "sppo_rlhf_imdb":
            compare_with_trl(args)
        elif args.scaling:
            scale(args, script)
        else:
            compare(args, script)
    return 0


if __name__ == "__main__":
    sys.exit(main())
