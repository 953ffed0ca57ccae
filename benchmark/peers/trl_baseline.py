"""PPO of TRL 1.12.0, the last release that has it, on the task of sppo_rlhf_imdb.py: what ours is compared with.

    pip install -r requirements-trl.txt
    python benchmark/peers/trl_baseline.py --policy assets/gpt2-reviews --reward-model assets/sentiment \
        --dataset assets/reviews --run-dir runs/trl

Policy, value model, reference, reward and data are those of our script, loaded by it, and so is the evaluation. The
loop is TRL's. It samples from the full softmax (ours: --top-k 0 --min-response-length 0), does not clip gradients
(--max-grad-norm 1e9), normalizes advantages over the rollout instead of the minibatch, and puts the reward of a
response that has ended one token behind its end. same_as_trl.sh has the flags with which ours does the same.
"""

import gc
import json
import os
import platform
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor, nn

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    import datasets
    import transformers
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    import sppo_rlhf_imdb as script
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install -r requirements-trl.txt", file=sys.stderr)
    sys.exit(2)

SCRIPT = Path(__file__).stem
PACKAGES = ("trl", *script.PACKAGES)


@dataclass
class Args:
    run_dir: str
    """where everything goes; must be new or empty"""
    policy: str = "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"
    """what follows has the names, meanings and defaults of sppo_rlhf_imdb.py"""
    reward_model: str = "lvwerra/distilbert-imdb"
    dataset: str = "stanfordnlp/imdb"
    num_updates: int = 60
    seed: int = 1
    kl_coef: float = 0.001
    prompt_length: int = 64
    response_length: int = 48
    num_trajectories: int = 112
    update_epochs: int = 5
    minibatch_size: int = 28
    rollout_batch_size: int = 56
    learning_rate: float = 5e-6
    weight_decay: float = 1e-6
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    clip_coef_value: float = 0.2
    vf_coef: float = 0.5
    eval_samples: int = 0
    num_threads: int = 0


class TextReward(nn.Module):
    """Our reward of text as TRL calls a reward model: a backbone over tokens and a head over what it returns."""

    base_model_prefix = "backbone"

    def __init__(self, learner: script.Learner):
        super().__init__()
        self.learner, self.score = learner, nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_) -> SimpleNamespace:
        tokens = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask.bool())]
        texts = [self.learner.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        scores = self.learner.reward([""] * len(texts), texts, [{}] * len(texts))
        scores = torch.tensor(scores, device=input_ids.device)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


class ValueModel(nn.Module):
    """Our value model as TRL calls one."""

    base_model_prefix = "backbone"

    def __init__(self, learner: script.Learner):
        super().__init__()
        self.backbone, self.score = learner.actor_critic.value_model, learner.actor_critic.value_head


class Log(TrainerCallback):
    """TRL's metrics into curves.csv and TensorBoard, under its tags."""

    def __init__(self, run: script.Run, num_updates: int):
        self.run, self.num_updates, self.start = run, num_updates, time.monotonic()

    def on_log(self, args, state, control, logs: dict, **_) -> None:
        self.run.log(state.global_step, {tag: value for tag, value in logs.items() if "/" in tag})
        text = f"score {logs['objective/scores']:.4f}  KL {logs['objective/kl']:.3f}"
        update, total = state.global_step, self.num_updates
        left = timedelta(seconds=int((time.monotonic() - self.start) / update * (total - update)))
        print(f"update {update} of {total}  {text}  {left} left", flush=True)


def settings(args: Args) -> script.Args:
    """Those of our script."""
    own = {f.name: getattr(args, f.name) for f in fields(Args)}
    return script.Args(**own, alpha=1.0, beta=0.0, top_k=0, min_response_length=0, cpu=not torch.cuda.is_available())


def config(args: Args, run_dir: Path) -> PPOConfig:
    return PPOConfig(
        output_dir=str(run_dir),
        total_episodes=args.num_updates * args.num_trajectories,
        # With one accumulation step TRL makes an optimizer step for each of its minibatches, otherwise fewer.
        per_device_train_batch_size=args.num_trajectories,
        gradient_accumulation_steps=1,
        num_mini_batches=args.num_trajectories // args.minibatch_size,
        num_ppo_epochs=args.update_epochs,
        local_rollout_forward_batch_size=args.rollout_batch_size,
        response_length=args.response_length,
        stop_token="eos",
        temperature=1.0,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=args.weight_decay,
        adam_epsilon=1e-5,
        kl_coef=args.kl_coef,
        gamma=args.gamma,
        lam=args.gae_lambda,
        cliprange=args.clip_coef,
        cliprange_value=args.clip_coef_value,
        vf_coef=args.vf_coef,
        seed=args.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def make_trainer(args: Args, run_dir: Path, learner: script.Learner, log: Log) -> PPOTrainer:
    """TRL's trainer over the networks of learner."""
    tokenizer = learner.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # TRL leaves out padding, and the end token must stay
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokens = script.make_examples(tokenizer, learner.rows, settings(args)).prompts
    policy = learner.actor_critic.policy
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.generation_config.top_k, policy.generation_config.min_new_tokens = None, None
    trainer = PPOTrainer(
        args=config(args, run_dir),
        processing_class=tokenizer,
        model=policy,
        ref_model=learner.reference,
        reward_model=TextReward(learner),
        value_model=ValueModel(learner),
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": tokens[:1]}),
        callbacks=[log],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(args: Args, run_dir: Path) -> dict:
    """Train, evaluate as our script does, and return the result."""
    start = time.monotonic()
    learner = script.Learner(settings(args))
    before, _ = script.evaluate(learner, settings(args))
    run = script.Run(settings(args), learner)
    arguments = {"script": SCRIPT, "args": asdict(args)}
    (run_dir / "args.json").write_text(json.dumps(arguments, indent=2))  # in place of our script's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # there are no checkpoints to wait for
    run.log(0, before)
    make_trainer(args, run_dir, learner, Log(run, args.num_updates)).train()
    gc.collect()
    sampling = script.generation_config(settings(args), learner.ends)
    learner.actor_critic.policy.generation_config = sampling  # TRL has changed it
    metrics, samples = script.evaluate(learner, settings(args))
    run.log(args.num_updates, metrics)
    run.writer.close()
    versions = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    result = {"script": SCRIPT, "policy": args.policy, "dataset": args.dataset, "seed": args.seed}
    result |= {"args": asdict(args), "reward_model": args.reward_model, "num_updates": args.num_updates}
    result |= {tag.replace("/", "_"): value for tag, value in metrics.items()}
    result["eval_scores"] = [round(sample["score"], 6) for sample in samples]
    result["before"] = {tag.replace("/", "_"): value for tag, value in before.items()}
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() if learner.device.type == "cuda" else memory
    result["peak_memory_gib"] = memory / 2**30
    result |= {"wall_seconds": time.monotonic() - start, "commit": run.commit}
    return result | {"versions": versions | {"python": platform.python_version()}}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    run_dir = Path(args.run_dir)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    script.parse_args(settings(args))
    try:
        result = train(args, run_dir)
    except KeyboardInterrupt:
        print("\nstopped; this script cannot resume", file=sys.stderr)
        return 130
    (temporary := run_dir / "result.json.tmp").write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(run_dir / "result.json")
    print(f"seed {args.seed}: {args.num_updates} updates, {json.dumps(result['eval_score'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
