"""An animated GIF of a trained continuous agent: an episode of its final evaluation.

    python benchmark/tables_and_plots/animation.py benchmark/results/halfcheetah-sppo/seed1 --out halfcheetah.gif

MuJoCo without a display: MUJOCO_GL=egl, or MUJOCO_GL=osmesa.
"""

import importlib
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sppo_continuous_discretized", "sa2c_continuous_discretized")
FPS = 15  # about: every n-th frame is kept
COLORS = 64


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """finished run of a continuous script"""
    out: Path
    """the GIF"""
    episode: int = 1
    """which of the 10 of the evaluation"""
    seconds: float = 4.0
    """of the episode to show, from its start"""
    width: int = 240
    """pixels"""


def load_learner(run_dir: Path):
    """The script of a finished run, its arguments, and its agent with the normalization statistics.

    Raises ValueError where there is no model of a continuous script.
    """
    path = run_dir / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("script")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if name not in SCRIPTS:
        raise ValueError(f"{path} is of {name}, not of {' or '.join(SCRIPTS)}")
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name)
    with safe_open(path, "pt") as file:
        args = script.saved_args(path, name, json.loads(file.metadata()["args"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    normalizer = script.Normalizer(1, 1, len(tensors["obs_mean"]), args.gamma)
    normalizer.load_state_dict({key: tensors.pop(key)[None, None] for key in ("obs_mean", "obs_var")}, strict=False)
    action_dim = tensors["actor.4.bias"].numel() // args.num_bins
    agent = script.Agent([torch.Generator()], normalizer.obs_mean.shape[-1], action_dim, args.num_bins)
    agent.load_state_dict({key: tensors[key].reshape(x.shape) for key, x in agent.state_dict().items()})
    return script, args, (agent, normalizer)


def make_env(env_id: str) -> gym.Env:
    """The environment, seen by the camera that follows the body where its MuJoCo model has one."""
    options = {"render_mode": "rgb_array", "disable_env_checker": True}
    env = gym.make(env_id, **options)
    model = getattr(env.unwrapped, "model", None)
    if "track" not in [model.camera(i).name for i in range(getattr(model, "ncam", 0))]:
        return env
    env.close()
    return gym.make(env_id, camera_name="track", **options)


@torch.no_grad()
def play(script, args, learner, episode: int, seconds: float) -> tuple[list[Image.Image], float, float]:
    """Frames of the first seconds of an episode, milliseconds per frame, and the return of the whole episode."""
    env = make_env(args.env_id)
    fps = env.metadata["render_fps"]
    every = max(1, round(fps / FPS))
    bins = script.action_bins(env.action_space, args.num_bins)
    seeds = np.random.SeedSequence([args.seed, script.EVALUATION]).generate_state(script.EVAL_EPISODES)
    obs, _ = env.reset(seed=int(seeds[episode - 1]))
    agent, normalizer = learner
    frames, total, step, done = [], 0.0, 0, False
    while not done:
        if step % every == 0 and step < seconds * fps:
            frames.append(Image.fromarray(env.render()))
        x = torch.from_numpy(normalizer.obs(obs.reshape(1, 1, -1)))
        actions = agent.logits(x).argmax(-1).numpy().ravel()  # the most likely bins
        action = bins[actions, np.arange(bins.shape[1])].reshape(env.action_space.shape)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, step, done = total + float(reward), step + 1, terminated or truncated
    env.close()
    return frames, 1000 * every / fps, total


def save_gif(frames: list[Image.Image], milliseconds: float, width: int, path: Path) -> None:
    """One palette for all frames, that of a few of them side by side."""
    size = (width, round(width * frames[0].height / frames[0].width))
    small = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    some = np.concatenate([np.asarray(frame) for frame in small[:: max(1, len(small) // 8)]])
    palette = Image.fromarray(some).quantize(COLORS)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    options = {"append_images": indexed[1:], "duration": round(milliseconds), "loop": 0, "optimize": True}
    indexed[0].save(path, "GIF", save_all=True, **options)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's MuJoCo ids are v4
    try:
        if args.seconds <= 0 or args.width < 1:
            raise ValueError("--seconds and --width must be above 0")
        script, run_args, learner = load_learner(args.run_dir)
        if not 1 <= args.episode <= script.EVAL_EPISODES:
            raise ValueError(f"--episode must be between 1 and {script.EVAL_EPISODES}, got {args.episode}")
        frames, milliseconds, total = play(script, run_args, learner, args.episode, args.seconds)
        save_gif(frames, milliseconds, args.width, args.out)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    result = args.run_dir / "result.json"
    score = f"; the run's score is {json.loads(result.read_text())['eval_mean']:.1f}" if result.exists() else ""
    size = args.out.stat().st_size / 2**10
    print(f"{args.out}: {len(frames)} frames, {size:,.0f} KiB; return of the whole episode {total:.1f}{score}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
