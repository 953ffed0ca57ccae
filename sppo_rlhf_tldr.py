# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "safetensors==0.8.0", "tensorboard==2.21.0", "tyro==1.0.17",
#     "transformers==5.23.0", "datasets==5.2.0", "peft==0.21.2", "accelerate==1.15.0", "rouge_score==0.1.2",
#     "huggingface_hub==2.4.0"]
# ///
"""Symmetric PPO (SPPO) for summarization: a language model with LoRA adapters learns to write TL;DRs of Reddit posts.

    python sppo_rlhf_tldr.py --seed 1
    python sppo_rlhf_tldr.py --seed 1 --alpha 1 --beta 0    # PPO, the baseline
    torchrun --nproc_per_node 4 sppo_rlhf_tldr.py --seed 1  # on several processes or GPUs

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
An action is a token, an episode one summary. Policy, value model and reward model are adapters on one base model in
memory, and the base with its adapters off is the reference.
"""

import csv
import errno
import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from glob import escape
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

import accelerate
import datasets
import huggingface_hub
import numpy as np
import peft
import torch
import transformers
import tyro
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

SCRIPT = Path(__file__).stem
VERSION = 4  # of the format of checkpoint.pt
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
TRAINING, EVALUATION = 0, 1  # streams of random numbers
OOM_HINT = "lower --micro-batch-size and --rollout-batch-size, which --resume takes as well, or begin anew with "
OOM_HINT += "--gradient-checkpointing or a smaller --base-precision"
TOKENIZERS = {"CarperAI/openai_summarize_tldr_sft": "EleutherAI/gpt-j-6b"}  # where the authors took it
DISK_FULL = rf"(Errno|os error) ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b"  # in an error's text
LOCKED = errno.EACCES, errno.EAGAIN
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy")  # their versions go into result.json
PROMPT_END = "\nTL;DR:"
ROUGE = RougeScorer(("rouge1", "rouge2", "rougeL"), use_stemmer=True)
FILES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}  # data files, and datasets' readers


@dataclass(frozen=True)
class Args:
    policy: str = "CarperAI/openai_summarize_tldr_sft"  # model to start from, base of all adapters: hub id or folder
    tokenizer: str | None = None  # hub id or folder; default the policy's own, or what TOKENIZERS has for it
    base_precision: Literal["4bit", "bfloat16", "float32"] = "4bit"  # of the base; 4bit needs bitsandbytes
    double_quant: bool = True  # quantize the scales of a 4bit base as well, as in the authors' files
    gradient_checkpointing: bool = False  # recompute activations within layers in the backward pass: less memory
    lora_rank: int = 8  # rank r of the adapters
    lora_alpha: int = 64  # alpha of the adapters, whose output is multiplied by alpha / rank
    lora_targets: Sequence[str] = ("q_proj", "v_proj")  # names of the linear layers that get adapters
    reward_model: str = "jdchang/tldr_rm_adapter"  # adapter with a scalar head, or classifier with one label
    reward_end: str = ""  # text that follows a summary for a classifier, such as <|endoftext|>
    reward_function: str | None = None  # module:name of a function (prompts, responses, rows) -> rewards
    dataset: str = "CarperAI/openai_summarize_tldr"  # columns "prompt", "label": hub id, file or folder of splits
    revision: dict[str, str] = field(default_factory=dict)  # hub ids, each followed by its branch, tag or commit
    num_updates: int = 100  # rollouts, each with update_epochs passes over it
    seed: int = 1  # seed of everything random
    alpha: float = 0.5  # weight of the PPO loss in Eq. 9
    beta: float = 0.2  # weight of the reverse PPO loss in Eq. 9; alpha 1 and beta 0 is plain PPO
    Z: float = -1.0  # the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters
    kl_coef: float = 0.002  # charge per token on log pi - log pi_ref, fixed
    target_coef: float = 0.0  # weight of a cross-entropy on the human summary and its end (authors' runs: 0.1)

    prompt_length: int = 495  # maximum tokens of a post; the rest is cut off
    instruction: str | None = None  # prompt by the chat template with this before the post, not by "TL;DR:"
    response_length: int = 50  # tokens of a response at most
    min_response_length: int = 0  # tokens before the end-of-text token may be sampled
    top_k: int = 50  # sample among the k most likely tokens; 0: all. Evaluation is greedy; log-probabilities are of all

    num_trajectories: int = 64  # responses per rollout, over all processes
    update_epochs: int = 4  # epochs per rollout
    minibatch_size: int = 32  # responses per optimizer step, over all processes
    micro_batch_size: int = 4  # responses per forward and backward pass of a process; changes memory, not the result
    rollout_batch_size: int = 32  # responses generated and scored at once by a process; changes memory and the samples
    learning_rate: float = 5e-6  # AdamW's learning rate
    weight_decay: float = 0.01  # AdamW's weight decay, not of biases and norms
    gamma: float = 1.0  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    norm_adv: bool = True  # normalize the advantages of each minibatch, over real tokens (Table 14 compares)
    clip_coef: float = 0.2  # PPO's epsilon (Eq. 3)
    clip_coef_value: float = 0.2  # clip range of the value loss
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0  # global gradient norm of policy and value adapter above which gradients are scaled down

    run_dir: str | None = None  # where everything goes; default runs/<dataset>__<script>__<seed>__<time>
    resume: str | None = None  # run directory to continue; only --micro-batch-size and --rollout-batch-size may change
    evaluate: str | None = None  # run directory to evaluate instead of training
    eval_every: int = 0  # updates between evaluations during training; 0: only before and after
    eval_samples: int = 100  # validation prompts of an evaluation; 0: all. Perplexity is that of their references
    checkpoint_every: int = 10  # updates between checkpoints
    track: bool = False  # log to Weights & Biases as well; WANDB_PROJECT and WANDB_ENTITY say where (pip install wandb)
    tf32: bool = False  # on CUDA, multiply float32 matrices in TF32: faster, with 10 bits of mantissa
    cpu: bool = False  # stay on the CPU where there is a GPU
    num_threads: int = 0  # CPU threads of torch; 0: as torch chooses


def symmetric_ppo_loss(logprob, old_logprob, advantages, clip_coef, alpha, beta, Z, mask) -> Tensor:
    """alpha * L_ppo + beta * L_rppo (Eq. 9), averaged over the real tokens: (sequence, token) -> scalar.
    logprob and old_logprob are log-probabilities of the sampled tokens under pi and pi_old; mask is True on real
    tokens. The other tokens' probabilities sum to 1 - pi, so Eq. 8 is L_rppo = -A Z (1 - pi) / pi_old. For A < 0 we
    use the same form, because the printed sign contradicts Eq. 33-34. The value leaves out the constant part
    -A Z / pi_old: it has no gradient, and with a vocabulary it is large."""
    ratio = torch.where(mask, logprob - old_logprob, 0.0).exp()  # r_t of Eq. 3
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    L_ppo = -torch.min(unclipped, clipped)  # Eq. 3
    active = unclipped <= clipped  # tokens that still have a PPO gradient (Section A.4)
    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8
    return masked_mean(alpha * L_ppo + beta * L_rppo, mask)  # Eq. 9


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float, mask: Tensor) -> Tensor:
    """Half the mean, over real tokens, of the larger of the plain and the clipped squared error: scalar."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (clipped - returns).square()), mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the elements where mask, of the same shape, is True: scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def normalize(x: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """(x - mean) / (std + 1e-8) where mask is True, std unbiased, else 0; reduce adds up over all processes."""
    count, total = reduce(mask.sum()), reduce(torch.where(mask, x, 0.0).sum())
    centred = torch.where(mask, x - total / count, 0.0)
    std = (reduce(centred.square().sum()) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-8)


def token_rewards(scores: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token, (batch, length): -kl_coef (log pi - log pi_ref), and on the last real token the score."""
    rewards = torch.where(mask, -kl_coef * (logprob - ref_logprob), 0.0)  # of either sign: KL's one-sample estimate
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores  # a sampled end-of-text token is an action as well
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2018): advantages and returns, (batch, length) like rewards."""
    values = torch.where(mask, values, 0.0)  # the episode is over after the last real token
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages, advantage = torch.zeros_like(values), 0.0
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * gae_lambda * advantage
    return advantages, advantages + values


def run_network(network: Callable, tokens: Tensor, attention_mask: Tensor, **options):
    """Output of a network for padded sequences. Positions count from the first real token of each sequence."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return network(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False, **options)


def response_logprobs(lm: Callable, tokens: Tensor, attention_mask: Tensor, num_actions: int) -> Tensor:
    """Log-probabilities (batch, num_actions), float32, of the last tokens, each from the logits one token before."""
    logits = run_network(lm, tokens, attention_mask, logits_to_keep=num_actions + 1).logits[:, -num_actions - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, tokens[:, -num_actions:].unsqueeze(-1)).squeeze(-1)


class ActorCritic(nn.Module):
    """One base model with LoRA adapters for policy, value and perhaps reward; with all off, it is the reference."""

    def __init__(self, base: PreTrainedModel, args: Args):
        super().__init__()
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=list(args.lora_targets))
        self.lm = base  # the adapters are put into it; peft finds them by names that no module of it may have
        self.adapters = peft.get_peft_model(base, lora, "policy_adapter", revision=args.revision.get(args.policy))
        self.adapters.add_adapter("value_adapter", lora)
        hidden = base.base_model(torch.zeros(1, 1, dtype=torch.long, device=base.device)).last_hidden_state
        self.hidden_size = hidden.shape[-1]  # which need not be the width inside the model
        self.value_head = nn.Linear(self.hidden_size, 1)
        self.switch_to("policy_adapter")
        for layer in base.modules() if args.gradient_checkpointing else ():
            if isinstance(layer, GradientCheckpointingLayer):  # transformers' own way needs training mode, with dropout
                layer.forward = partial(self.checkpoint_layer, layer.forward)

    def checkpoint_layer(self, forward: Callable, *inputs, **options):
        """A layer's forward pass, which the backward pass repeats with the adapter that it had."""
        options |= {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(self.forward_as, self.active, forward, *inputs, **options)

    def forward_as(self, adapter: str, forward: Callable, *inputs, **options):
        if self.active != adapter:
            self.switch_to(adapter)
        return forward(*inputs, **options)

    def switch_to(self, adapter: str) -> PreTrainedModel:
        """Return the base model, which computes with this adapter until the next switch."""
        self.adapters.set_adapter(adapter)  # also freezes the others
        self.adapters.set_requires_grad(["policy_adapter", "value_adapter"])
        self.active = adapter
        return self.lm

    def load_adapter(self, adapter: str, weights: dict[str, Tensor], source: str) -> None:
        """Load the weights of an adapter. End if they do not fit this one."""
        try:
            keys = peft.set_peft_model_state_dict(self.adapters, weights, adapter)
            wrong = [*keys.unexpected_keys, *(key for key in keys.missing_keys if f".{adapter}." in key)]
        except RuntimeError as error:  # tensors of other shapes
            wrong = [error]
        require(not wrong, f"{source} does not fit this model: {', '.join(map(str, wrong[:3]))}")

    @property
    def policy(self) -> PreTrainedModel:
        return self.switch_to("policy_adapter")

    def hidden(self, adapter: str, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states with an adapter: (batch, length) -> (batch, length, hidden size), float32."""
        network = self.switch_to(adapter).base_model
        return run_network(network, tokens, attention_mask).last_hidden_state.float()

    def forward(self, tokens: Tensor, attention_mask: Tensor, num_actions: int, num_rows: int | None = None):
        """Log-probabilities of the last num_actions tokens, and values before them of the first num_rows sequences."""
        logprob = response_logprobs(self.policy, tokens, attention_mask, num_actions)
        hidden = self.hidden("value_adapter", tokens[:num_rows], attention_mask[:num_rows])
        return logprob, self.value_head(hidden[:, -num_actions - 1 : -1]).squeeze(-1)


# Trajectories of one process. Targets are for --target-coef. mask (True on real tokens), logprob (of pi_old) and what
# follows are (trajectories, response_length), 0 past the last real token.
Rollout = namedtuple("Rollout", "prompts responses targets mask logprob values advantages returns")


@torch.no_grad()
def rollout(learner: "Learner", rows: list[dict], args: Args) -> tuple[Rollout, dict[str, float], list[str]]:
    """Sample this process's trajectories; returns them, {tag: mean over processes}, and a few responses to look at."""
    device, examples = learner.device, make_examples(learner.tokenizer, rows, args)
    prompts, policy, start = examples.prompts, learner.actor_critic.policy, time.perf_counter()
    responses = generate(policy, prompts, args.rollout_batch_size, sample=True)
    generation_seconds = time.perf_counter() - start
    texts = decode(learner, prompts, responses)
    scores = torch.tensor(learner.score(examples.seen, texts, rows), device=device)

    # pi_old, V and pi_ref from a fresh forward pass: generation has other log-probabilities (top-k) and other kernels.
    mask = torch.zeros(len(prompts), args.response_length, dtype=torch.bool, device=device)
    logprob, values, ref_logprob = torch.zeros(3, *mask.shape, device=device)
    for batch, *padded, real in padded_batches(prompts, responses, args.rollout_batch_size, device):
        R = real.shape[1]
        mask[batch, :R] = real
        logprob[batch, :R], values[batch, :R] = learner.actor_critic(*padded, R)
        ref_logprob[batch, :R] = learner.reference_logprobs(*padded, R)
    logprob, values, ref_logprob = (torch.where(mask, x, 0.0) for x in (logprob, values, ref_logprob))

    rewards = token_rewards(scores, logprob, ref_logprob, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    kl, unexplained = (logprob - ref_logprob).sum(1).sum(), (returns - values)[mask].var() / returns[mask].var()
    sums = {"objective/scores": scores.sum(), "objective/kl": kl, "objective/entropy": -logprob.sum()}
    sums |= {"objective/non_score_reward": -args.kl_coef * kl, "objective/rlhf_reward": rewards.sum()}
    sums |= {"val/response_length": mask.sum(), "losses/explained_variance": len(prompts) * (1 - unexplained)}
    sums["val/eos_rate"] = torch.tensor(sum(response[-1] in learner.ends for response in responses))
    means = learner.sum(torch.stack([x.float().to(device) for x in sums.values()])) / args.num_trajectories
    metrics = dict(zip(sums, means.tolist())) | {"perf/generation_seconds": generation_seconds}
    samples = [f"{score:.3f} | {p}{r}" for score, p, r in zip(scores.tolist()[:4], examples.seen, texts)]
    return Rollout(prompts, responses, examples.targets, mask, logprob, values, advantages, returns), metrics, samples


def backward(learner: "Learner", trajectories: Rollout, rows: list[int], args: Args) -> dict[str, float]:
    """Add up the gradients of a minibatch, rows of this process's rollout; returns {tag: mean over processes}."""
    minibatch_mask, advantages = trajectories.mask[rows], trajectories.advantages[rows]
    normalized = normalize(advantages, minibatch_mask, learner.sum) if args.norm_adv else advantages
    num_tokens = learner.sum(minibatch_mask.sum())
    num_target_tokens = learner.sum(sum(len(trajectories.targets[i]) for i in rows)).clamp(min=1)
    weights, sums = (args.clip_coef, args.alpha, args.beta, args.Z), Counter()  # Counter.update() adds
    for start in range(0, len(rows), args.micro_batch_size):
        micro = rows[start : start + args.micro_batch_size]
        prompts, responses = ([x[i] for i in micro] for x in (trajectories.prompts, trajectories.responses))
        targets = [trajectories.targets[i] for i in micro] if args.target_coef else []
        prompts += prompts[: len(targets)]  # one pass of the policy over responses and targets
        tokens, attention_mask, mask = pad(prompts, responses + targets, learner.device)
        mask, target_mask, R = mask[: len(micro)], mask[len(micro) :], mask.shape[1]
        A, A_normalized = (x[start : start + args.micro_batch_size, :R] for x in (advantages, normalized))
        old_logprob, old_values = trajectories.logprob[micro, :R], trajectories.values[micro, :R]
        last = start + args.micro_batch_size >= len(rows)
        with nullcontext() if last else learner.accelerator.no_sync(learner.model):
            logprob, values = learner.model(tokens, attention_mask, R, len(micro))
            logprob, target_logprob = logprob[: len(micro)], logprob[len(micro) :]
            policy_loss = symmetric_ppo_loss(logprob, old_logprob, A_normalized, *weights, mask)
            returns = trajectories.returns[micro, :R]
            value_loss = clipped_value_loss(values, old_values, returns, args.clip_coef_value, mask)
            share = mask.sum() / num_tokens  # every mean is over the real tokens of the whole minibatch
            target_loss = -torch.where(target_mask, target_logprob, 0.0).sum() / num_target_tokens
            loss = share * (policy_loss + args.vf_coef * value_loss) + args.target_coef * target_loss
            learner.accelerator.backward(loss * WORLD_SIZE)  # Accelerate averages over processes

        with torch.no_grad():
            logratio = torch.where(mask, logprob - old_logprob, 0.0)
            ratio, value_change = logratio.exp(), (values - old_values).abs()
            stats = {
                "loss/policy_avg": share * policy_loss,
                "loss/value_avg": share * value_loss,
                "loss/target_avg": target_loss,
                "policy/approxkl_avg": share * masked_mean(ratio - 1 - logratio, mask),  # TRL's: logratio^2 / 2
                "policy/clipfrac_avg": share * masked_mean(((ratio - 1).abs() > args.clip_coef).float(), mask),
                "val/clipfrac_avg": share * masked_mean((value_change > args.clip_coef_value).float(), mask),
                "val/ratio": share * masked_mean(ratio, mask),
                "losses/sign_flips": share * masked_mean(((A > 0) != (A_normalized > 0)).float(), mask),  # Figure 2
            }
            sums.update(stats)
    return dict(zip(sums, learner.sum(torch.stack(list(sums.values()))).tolist()))


def train(args: Args, learner: "Learner", run: "Run") -> None:
    """Train from the update that the run has reached, and save the policy and result.json."""
    for update in range(len(run.rows), args.num_updates + 1):  # row 0 is the evaluation before training
        # Rollout
        rollout_start = time.perf_counter()
        torch.manual_seed(np.random.SeedSequence((args.seed, TRAINING, update - 1, RANK)).generate_state(1)[0].item())
        indices = prompt_indices(len(learner.rows), update - 1, args.num_trajectories, args.seed)[RANK::WORLD_SIZE]
        trajectories, metrics, samples = rollout(learner, [learner.rows[i] for i in indices], args)

        # Update
        update_start = time.perf_counter()
        stats, rows_per_minibatch = [], args.minibatch_size // WORLD_SIZE
        for _ in range(args.update_epochs):
            order = torch.randperm(len(indices)).tolist()
            for start in range(0, len(order), rows_per_minibatch):
                learner.optimizer.zero_grad()
                losses = backward(learner, trajectories, order[start : start + rows_per_minibatch], args)
                grad_norm = learner.accelerator.clip_grad_norm_(learner.model.parameters(), args.max_grad_norm).item()
                failed = f"seed {args.seed} of {args.dataset} failed in update {update}: the loss is not finite. "
                require(np.isfinite(grad_norm), failed + "Try a lower --learning-rate or a lower --beta", code=1)
                learner.optimizer.step()
                stats.append(losses | {"losses/grad_norm": grad_norm})
        update_end = time.perf_counter()

        # Evaluate, log, save
        metrics |= {tag: float(np.mean([s[tag] for s in stats])) for tag in stats[0]}
        tokens = metrics["val/response_length"] * args.num_trajectories
        metrics["perf/rollout_seconds"] = update_start - rollout_start
        metrics["perf/update_seconds"] = update_end - update_start
        metrics["perf/rollout_tokens_per_second"] = tokens / metrics["perf/rollout_seconds"]
        metrics["perf/update_tokens_per_second"] = args.update_epochs * tokens / metrics["perf/update_seconds"]
        if args.eval_every and update % args.eval_every == 0 and update < args.num_updates:
            metrics |= evaluate(learner, args)[0]
        stopped = learner.sum(len(run.signals)) > 0  # in any process
        run.log(update, metrics, samples)
        if update % args.checkpoint_every == 0 or update == args.num_updates or stopped:
            run.save()
        left = timedelta(seconds=int((update_end - rollout_start) * (args.num_updates - update)))
        progress = f"score {metrics['objective/scores']:.4f}  KL {metrics['objective/kl']:.3f}"
        say(f"update {update} of {args.num_updates}  {progress}  {left} left")
        if stopped:
            learner.accelerator.wait_for_everyone()  # a process that ends makes torchrun stop the one that writes
            raise KeyboardInterrupt

    run.save_policy()  # before the evaluation, in which a reward may fail
    metrics, samples = evaluate(learner, args)
    run.log(args.num_updates, metrics)
    run.finish(metrics, samples)


def evaluate(learner: "Learner", args: Args) -> tuple[dict[str, float], list[dict]]:
    """Scores and perplexity of Table 3, and ROUGE, on the validation posts as {tag: value}, and what was scored."""
    torch.manual_seed(np.random.SeedSequence((args.seed, EVALUATION, RANK)).generate_state(1)[0].item())
    index = range(len(learner.validation))[: args.eval_samples or None][RANK::WORLD_SIZE]
    rows = [learner.validation[i] for i in index]
    examples = make_examples(learner.tokenizer, rows, args)
    policy, prompts = learner.actor_critic.policy, examples.prompts
    responses = generate(policy, prompts, args.rollout_batch_size, sample=False)
    texts = {"score": decode(learner, prompts, responses)}
    texts |= {"score_reference": examples.references, "score_empty": [""] * len(rows)}
    texts["score_truncated"] = decode(learner, prompts, [response[: len(response) // 2] for response in responses])
    scored = {name: learner.score(examples.whole, x, rows) for name, x in texts.items()}
    rouge = [ROUGE.score(reference, text) for reference, text in zip(examples.references, texts["score"])]
    scored |= {name: [scores[name].fmeasure for scores in rouge] for name in ROUGE.rouge_types}
    columns = {"index": index, "prompt": examples.whole, "response": [text.strip() for text in texts["score"]]}
    columns |= {"reference": examples.references} | scored
    samples = [dict(zip(columns, values)) for values in zip(*columns.values())]
    samples = sorted(accelerate.utils.gather_object(samples), key=lambda sample: sample["index"])
    metrics = {f"eval/{name}": float(np.mean([sample[name] for sample in samples])) for name in scored}
    for name in ("empty", "truncated"):  # how often these score above the policy's own (compare Figure 1, Table 15)
        metrics[f"eval/{name}_wins"] = float(np.mean([s[f"score_{name}"] > s["score"] for s in samples]))
    texts = [sample["reference"] for sample in samples]
    metrics["eval/perplexity"] = perplexity(learner, learner.actor_critic.policy, texts)
    rouge = " / ".join(f"{100 * metrics[f'eval/{name}']:.1f}" for name in ROUGE.rouge_types)
    say(f"evaluation: score {metrics['eval/score']:.4f}, perplexity {metrics['eval/perplexity']:.2f}, ROUGE {rouge}")
    return metrics, samples


@torch.no_grad()
def perplexity(learner: "Learner", policy: PreTrainedModel, texts: list[str]) -> float:
    """Perplexity of texts, joined by blank lines: strides of 512 tokens after as many as the policy has room for."""
    text = learner.tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor([begin_tokens(learner.tokenizer) + text], device=learner.device)
    room = min(num_positions(policy), 2048)  # no more than GPT-J has
    stride = min(512, room // 2)
    loss = torch.zeros((), dtype=torch.float64, device=learner.device)
    for start in range(0, tokens.shape[1], stride)[RANK::WORLD_SIZE]:
        window = tokens[:, max(0, start + stride - room) : start + stride]
        num_predicted = min(stride, tokens.shape[1] - start) - (start == 0)  # nothing predicts the first token
        if num_predicted:
            loss -= response_logprobs(policy, window, torch.ones_like(window), num_predicted).sum()
    return (learner.sum(loss) / (tokens.shape[1] - 1)).exp().item()


# Nothing below knows the algorithm: texts and tokens, rewards, what is loaded, files of a run.


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts before a text, without the end token that some tokenizers put behind it."""
    text, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


# Lists with an item per row of the data set. Prompts and targets are tokens. A reward reads seen, the prompt as the
# policy saw it, in training, and whole in an evaluation. A reference is the data set's own response.
Examples = namedtuple("Examples", "prompts targets seen whole references")


def encode_inside(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that follow others, without the space that SentencePiece puts before a text's first word."""
    result = []
    for text in texts:
        before = "a" if text[:1].isspace() else "\n"  # merges with nothing that may follow
        three = [text, before, before + text]
        alone, before, both = tokenizer(three, add_special_tokens=False, verbose=False).input_ids
        result.append(both[len(before) :] if both[: len(before)] == before else alone)
    return result


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: list, max_length: int, instruction=None) -> list[list]:
    """Posts, their end cut off at max_length tokens, and "TL;DR:"; with an instruction, chats of it and a post."""
    posts = [row["prompt"].strip().removesuffix("TL;DR:").strip() for row in rows]
    if instruction is None:
        before, (after,) = begin_tokens(tokenizer), encode_inside(tokenizer, [PROMPT_END])
        posts = tokenizer(posts, add_special_tokens=False, verbose=False).input_ids
    else:
        chat = [{"role": "user", "content": f"{instruction}\n\n{PROMPT_END}"}]  # PROMPT_END marks the post's place
        chat = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).rsplit(PROMPT_END, 1)
        before = tokenizer(chat[0], add_special_tokens=False).input_ids  # a chat template brings its special tokens
        after, *posts = encode_inside(tokenizer, [chat[1], *posts])
    return [before + post[:max_length] + after for post in posts]


def make_examples(tokenizer: PreTrainedTokenizerBase, rows: list[dict], args: Args) -> Examples:
    """Posts; targets are the human summaries, with the end-of-text token where they leave room for it."""
    prompts, plain = (encode_prompts(tokenizer, rows, args.prompt_length, x) for x in (args.instruction, None))
    posts = [tokenizer.decode(post, skip_special_tokens=True) for post in plain]  # a reward reads no chat template
    references = [row["label"].strip() for row in rows]
    labels = encode_inside(tokenizer, [f" {text}" for text in references]) if args.target_coef else [None] * len(rows)
    targets = [[*label, tokenizer.eos_token_id][: args.response_length] if args.target_coef else [] for label in labels]
    return Examples(prompts, targets, posts, posts, references)


def decode(learner: "Learner", prompts: list[list[int]], responses: list[list[int]]) -> list[str]:
    """Responses as texts, each decoded together with its prompt, since some tokenizers drop a leading space."""
    shown = [x[:-1] if x and x[-1] in learner.ends else x for x in responses]  # not every end counts as special
    befores = learner.tokenizer.batch_decode(prompts, skip_special_tokens=True)
    wholes = learner.tokenizer.batch_decode([p + r for p, r in zip(prompts, shown)], skip_special_tokens=True)
    return [whole[len(before) :] for before, whole in zip(befores, wholes)]


def pad(prompts: list[list[int]], responses: list[list[int]], device: torch.device, padding: int = 0) -> tuple:
    """Tokens and mask, prompts padded on the left and responses on the right, and the mask of the responses alone."""
    P, R = max(map(len, prompts)), max(map(len, responses))
    tokens = [[padding] * (P - len(p)) + p + r + [padding] * (R - len(r)) for p, r in zip(prompts, responses)]
    mask = [[0] * (P - len(p)) + [1] * (len(p) + len(r)) + [0] * (R - len(r)) for p, r in zip(prompts, responses)]
    tokens, mask = torch.tensor(tokens, device=device), torch.tensor(mask, device=device)  # (batch, P + R)
    return tokens, mask, mask[:, P:].bool()  # the masks keep padding out of everything, whatever token it is


def padded_batches(prompts: list, responses: list, size: int, device: torch.device, padding: int = 0, lengths=None):
    """Yield batches of sequences of similar length: their indices and the three outputs of pad()."""
    lengths = lengths or [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield batch, *pad([prompts[i] for i in batch], [responses[i] for i in batch], device, padding)


def generate(policy: PreTrainedModel, prompts: list[list[int]], batch_size: int, sample: bool) -> list[list[int]]:
    """Sample a response to each prompt; it includes its end token, if any. Batches hold prompts of similar length."""
    responses, ends = [[] for _ in prompts], policy.generation_config.eos_token_id
    for batch, tokens, mask, _ in padded_batches(prompts, responses, batch_size, policy.device):
        output = policy.generate(tokens, attention_mask=mask, do_sample=sample)[:, tokens.shape[1] :].tolist()
        for i, response in zip(batch, output):
            length = next((t + 1 for t, token in enumerate(response) if token in ends), len(response))
            responses[i] = response[:length]
    return responses


def prompt_indices(num_prompts: int, update: int, num_trajectories: int, seed: int) -> np.ndarray:
    """Indices of an update's prompts, (num_trajectories,). Every epoch is a permutation that the seed determines."""
    start = update * num_trajectories
    epochs = range(start // num_prompts, (start + num_trajectories - 1) // num_prompts + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in epochs])
    return order[start % num_prompts :][:num_trajectories]


def generation_config(args: Args, ends: list[int]) -> transformers.GenerationConfig:
    """Settings of sampling, in place of the model's own, which would fill in what the arguments leave open."""
    options = {"max_new_tokens": args.response_length, "min_new_tokens": args.min_response_length}
    options |= {"eos_token_id": ends, "pad_token_id": ends[0], "remove_invalid_values": True}  # NaNs show in the loss
    return transformers.GenerationConfig(do_sample=True, top_k=args.top_k, **options)


class Classifier:
    """Logit of a classifier with one label on prompt, summary and --reward-end. Long texts are cut at the left."""

    def __init__(self, args: Args, learner: "Learner"):
        flag, name, auto_class = "reward-model", args.reward_model, transformers.AutoModelForSequenceClassification
        self.model, self.tokenizer = load_network(args, flag, name, auto_class, dtype=torch.float32)  # not the file's
        self.batch_size, self.tokenizer.truncation_side = args.rollout_batch_size, "left"
        self.max_length = min(self.tokenizer.model_max_length, num_positions(self.model))
        self.model.to(learner.device).eval().requires_grad_(False)
        require(self.model.config.num_labels == 1, f"--{flag} {name} has several labels; a reward is one number")
        self.end, end = args.reward_end, self.tokenizer.eos_token_id
        if self.tokenizer(self.end).input_ids[-2:] == [end, end]:  # the tokenizer adds one itself
            self.end = self.end.removesuffix(self.tokenizer.eos_token)

    def __call__(self, prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
        texts = [f"{prompt} {response.strip()}{self.end}" for prompt, response in zip(prompts, responses)]
        return self.logits(texts).squeeze(-1).tolist()

    @torch.no_grad()
    def logits(self, texts: list[str]) -> Tensor:
        """Logits (text, label). No text ends with the padding: some models read the last token that is not padding."""
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids
        ends, candidates = {text[-1] for text in tokens}, range(self.model.get_input_embeddings().num_embeddings)
        padding = next(i for i in (self.tokenizer.pad_token_id, *candidates) if i is not None and i not in ends)
        self.model.config.get_text_config().pad_token_id = padding
        logits, lengths = torch.zeros(len(texts), self.model.config.num_labels), [len(text) for text in texts]
        inputs = [[]] * len(texts), tokens, self.batch_size, self.model.device, padding, lengths
        for batch, padded, mask, _ in padded_batches(*inputs):
            logits[batch] = self.model(padded, attention_mask=mask).logits.cpu()
        return logits


class AdapterReward:
    """Scalar head of an adapter at the end of <|startoftext|>, text, <|endoftext|>. Long texts are cut at the left."""

    def __init__(self, args: Args, learner: "Learner"):
        self.actor_critic, self.tokenizer = learner.actor_critic, learner.tokenizer
        self.batch_size, flag, name = args.rollout_batch_size, "reward-model", args.reward_model
        config = load(args, flag, name, peft.PeftConfig.from_pretrained)
        weights = load(args, flag, name, peft.load_peft_weights, device="cpu")
        # PiSSA and its like change the base, and so the policy, as does layer_replication.
        plain = config.peft_type == "LORA" and config.init_lora_weights in (True, False, "gaussian")
        require(plain and not config.layer_replication, f"--{flag} {name} is no plain LoRA: it would change the policy")
        lora = {key: x for key, x in weights.items() if "lora_" in key}
        others = {key: x for key, x in weights.items() if key not in lora and ".original_module." not in key}
        *biases, head = sorted(others.values(), key=Tensor.dim) or [torch.zeros(0)]
        is_head = head.shape == (1, self.actor_critic.hidden_size) and [x.shape for x in biases] in ([], [(1,)])
        found = ", ".join(sorted(others)[:3]) or "nothing"
        require(is_head, f"--{flag} {name} needs LoRA and one scalar head (more would change the policy), not {found}")
        self.head, self.bias = head.float(), sum(x.item() for x in biases)
        config.modules_to_save, config.inference_mode = None, True  # the head is not a module of the base model
        try:
            self.actor_critic.adapters.add_adapter("reward_adapter", config)
        except ValueError as error:
            require(False, f"--{flag} {name} does not fit --policy {args.policy}: {error}")
        self.actor_critic.load_adapter("reward_adapter", lora, f"--{flag} {name} on --policy {args.policy}")

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
        lm, room = self.actor_critic.lm, num_positions(self.actor_critic.lm)
        begin, end = begin_tokens(self.tokenizer), self.tokenizer.eos_token_id
        texts = [f"<|startoftext|>{prompt} {response.strip()}" for prompt, response in zip(prompts, responses)]
        texts = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        texts = [[*begin, *text, end][-room:] for text in texts]  # the beginning goes, the summary stays
        scores, none = torch.zeros(len(texts)), [[]] * len(texts)
        for batch, tokens, mask, _ in padded_batches(texts, none, self.batch_size, lm.device):
            last = self.actor_critic.hidden("reward_adapter", tokens, mask)[:, -1]
            scores[batch] = (last @ self.head.to(lm.device).T + self.bias).squeeze(-1).cpu()
        return scores.tolist()


def load_function(name: str) -> Callable:
    """Import the function module:name from the working directory or an installed package.
    Lists of prompts, responses (in an evaluation also empty ones) and rows of the data set -> as many numbers."""
    flag, (module, _, function) = f"--reward-function {name}", name.partition(":")
    require(module and function, f"{flag}: give a module and a function in it, module:name")
    sys.path.append(os.getcwd())
    try:
        with unchanged(flag):
            found = getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        its_own = not f"{module}.".startswith(f"{error.name}.")  # one that the module imports
        require(its_own, f"{flag}: there is no module {module}, without .py, in the working directory or installed")
        raise
    require(callable(found), f"{flag}: {module} has no function {function}")
    return found


@contextmanager
def unchanged(name: str) -> Iterator[None]:
    """Run a user's code. If it exits or changes settings that the run depends on, end in one line that names it."""
    settings = {"torch's default dtype": torch.get_default_dtype, "torch's default device": torch.get_default_device}
    settings |= {"torch's grad mode": torch.is_grad_enabled, "the working directory": os.getcwd}
    before = {setting: get() for setting, get in settings.items()}
    try:
        with torch.random.fork_rng():
            yield
    except SystemExit as end:
        require(False, f"{name} called sys.exit({end.code!r})", code=1)
    changed = [setting for setting, get in settings.items() if get() != before[setting]]
    require(not changed, f"{name} changed {' and '.join(changed)}", code=1)


def load_base(args: Args, device: torch.device) -> tuple:
    """Load the base model and its tokenizer. A quantized model is on the device already."""
    options = {"dtype": torch.float32 if args.base_precision == "float32" else torch.bfloat16}
    if args.base_precision == "4bit":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        nf4["bnb_4bit_use_double_quant"] = args.double_quant
        options |= {"quantization_config": transformers.BitsAndBytesConfig(**nf4), "device_map": {"": device}}
    return load_network(args, "policy", args.policy, transformers.AutoModelForCausalLM, **options)


def eval_mode(model: nn.Module) -> nn.Module:
    """Dropout is never active. In eval mode bitsandbytes has no gradient on CPUs with AVX512-BF16."""
    for layer in model.modules():
        layer.training = hasattr(layer, "quant_state")
    return model


class Learner:
    """Data and networks of a run on this process: the base model with its adapters, and the reward."""

    def __init__(self, args: Args):
        torch.set_num_threads(args.num_threads or torch.get_num_threads())
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # of accelerate launch, such as a mixed precision: the flags alone say what is done
        patient = accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one process downloads
        on_cpu = args.cpu or not torch.cuda.is_available()
        self.accelerator = accelerate.Accelerator(cpu=on_cpu, kwargs_handlers=[patient])
        self.device, seen = self.accelerator.device, self.accelerator.num_processes
        require(seen == WORLD_SIZE, f"Accelerate sees {seen} processes, not the {WORLD_SIZE} that run: use torchrun")
        with self.accelerator.main_process_first():  # the others find the data set prepared
            self.rows, self.validation, data_commit = load_rows(args, ["prompt", "label"])
        sizes = len(self.rows), len(self.validation)
        require(min(sizes) >= WORLD_SIZE, f"--dataset {args.dataset} has {sizes} rows")
        references = any(row["label"].strip() for row in self.validation[: args.eval_samples or None])
        require(references, f"--dataset {args.dataset}: its references are empty; perplexity would be that of nothing")
        saved = Path(args.run_dir or "", "policy")
        has_policy = args.evaluate is None or (saved / "adapter_model.safetensors").exists()
        require(has_policy, f"{args.run_dir} holds no policy: it is written at the end of training")
        self.reward_name, function = args.reward_function or args.reward_model, args.reward_function
        self.reward = load_function(function) if function else None
        # All load models at once: of what has to be downloaded, huggingface_hub lets one process fetch each file.
        base, self.tokenizer = load_base(args, self.device)
        quantized = {getattr(base, kind, False) for kind in ("is_quantized", "is_loaded_in_4bit")}
        as_told = quantized == {args.base_precision == "4bit"}
        require(as_told, f"--policy {args.policy} is quantized in another way than --base-precision says")
        eval_mode(nn.Module.to(base, self.device))  # PreTrainedModel.to refuses 4 bit
        can_chat = args.instruction is None or self.tokenizer.chat_template
        require(can_chat, f"--instruction needs a chat template, and the tokenizer of --policy {args.policy} has none")
        (frame,) = encode_prompts(self.tokenizer, [{"prompt": ""}], 0, args.instruction)
        tolerance = 0.5 if args.tf32 or args.base_precision != "float32" else 1e-3  # of rounding
        check_policy(args, base, args.prompt_length + len(frame), tolerance)
        listed = base.generation_config.eos_token_id  # chat models also end a response with the end of a turn
        ends = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        self.ends = sorted(ends.intersection(range(base.get_input_embeddings().num_embeddings)))
        base.generation_config = generation_config(args, self.ends)
        torch.manual_seed(args.seed)  # the adapters and the value head are the same in every process
        try:
            self.actor_critic = ActorCritic(base, args)
        except ValueError as error:  # peft names the layers it did not find
            require(False, f"--lora-targets {' '.join(args.lora_targets)}: {error}")
        if not function:
            adapter = load(args, "reward-model", args.reward_model, transformers.utils.find_adapter_config_file)
            self.reward = AdapterReward(args, self) if adapter else Classifier(args, self)
        self.hub_commits = {args.dataset: data_commit} if data_commit else {}
        names = args.policy, self.tokenizer.name_or_path, *([] if function else [args.reward_model])
        for name in [name for name in names if not Path(name).exists()]:
            options = {"revision": args.revision.get(name), "local_files_only": True, "allow_patterns": []}
            self.hub_commits[name] = Path(huggingface_hub.snapshot_download(name, **options)).name
        eval_mode(self.actor_critic.to(self.device))
        if not function:
            longest = max(self.rows + self.validation, key=lambda row: len(row["prompt"]))
            (longest,) = make_examples(self.tokenizer, [longest], args).whole
            longest += " " + max((row["label"] for row in self.rows + self.validation), key=len)
            alone = torch.tensor(self.reward(["a b"], [""], []))
            beside = torch.tensor(self.reward(["a b", longest], ["", ""], [])[:1])
            tolerance = tolerance if adapter else 1e-3
            check_same("reward-model", args.reward_model, beside, alone, tolerance * (1 + alone.abs().item()))
        self.actor_critic.switch_to("policy_adapter")  # which makes the reward's not trainable
        if args.evaluate is not None:
            weights = load(args, "evaluate", str(saved), peft.load_peft_weights, device="cpu")
            self.actor_critic.load_adapter("policy_adapter", weights, str(saved))
        self.trained = {name: p for name, p in self.actor_critic.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        others = [p for p in self.trained.values() if p.ndim <= 1]  # biases and norms
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, args.learning_rate, eps=1e-5, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.actor_critic, optimizer)

    def reference_logprobs(self, tokens: Tensor, attention_mask: Tensor, num_actions: int) -> Tensor:
        """Log-probabilities (batch, num_actions) of the last num_actions tokens by the model without its adapters."""
        with self.actor_critic.adapters.disable_adapter():
            return response_logprobs(self.actor_critic.lm, tokens, attention_mask, num_actions)

    def score(self, prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
        """Rewards as floats. End if one is not finite: it would later look like a diverging loss."""
        name = f"the reward {self.reward_name}"
        with unchanged(name):
            scores = self.reward(*deepcopy((prompts, responses, rows)))
        scores = scores.tolist() if hasattr(scores, "tolist") else scores  # of numpy or torch
        is_list = isinstance(scores, (list, tuple)) and len(scores) == len(rows)
        require(is_list, f"{name} returned {scores!r:.100}, which is no list of {len(rows)} numbers", code=1)
        for prompt, response, score in zip(prompts, responses, scores):
            is_number = isinstance(score, (int, float, np.number)) and abs(score) <= torch.finfo(torch.float32).max
            text = (prompt + response)[-100:]
            require(is_number, f"{name} returned {score!r:.100} for {text!r}: no finite number of 32 bits", code=1)
        return [float(score) for score in scores]

    def sum(self, x: Tensor | float) -> Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(torch.as_tensor(x, device=self.device), "sum")


RULES = """
--num-updates >= 1, --prompt-length >= 1, --response-length >= 1, --num-trajectories >= 1, --update-epochs >= 1
--minibatch-size >= 1, --micro-batch-size >= 1, --rollout-batch-size >= 1, --checkpoint-every >= 1, --lora-rank >= 1
--lora-alpha >= 1, --top-k >= 0, --eval-every >= 0, --eval-samples >= 0, --num-threads >= 0, 0 <= --seed < 2**63
0 < --alpha < inf, 0 <= --beta < inf, -inf < --Z < 0, 0 <= --kl-coef < inf, 0 <= --target-coef < inf
0 < --clip-coef < inf, 0 < --clip-coef-value < inf, 0 <= --vf-coef < inf, 0 < --max-grad-norm < inf
0 < --learning-rate < inf, 0 <= --weight-decay < inf, 0 <= --gamma <= 1, 0 <= --gae-lambda <= 1
0 <= --min-response-length <= --response-length, --num-trajectories % --minibatch-size == 0
--minibatch-size % WORLD_SIZE == 0, --eval-samples == 0 or --eval-samples >= WORLD_SIZE
"""  # of arguments, in the flags' spelling; the message names the rule that is broken


def require(condition: object, message: object, code: int = 2) -> None:
    """End in one line if the condition does not hold, with code 2 for a wrong argument and 1 for other errors."""
    if not condition:
        process = f"process {RANK}: " if RANK else ""
        say(f"error: {process}{' '.join(str(message).split())}", sys.stderr)
        raise SystemExit(code)


def say(text: str, file=None) -> None:
    """Print; characters that the output lacks become escapes. A closed pipe, as behind | head, does not stop a run.
    With several processes the first prints; each prints its errors."""
    try:
        print(text, file=file, flush=True) if RANK == 0 or file else None
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode(), file)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def parse_args(args: Args) -> Args:
    """Check the arguments. With --resume or --evaluate, all but batch sizes are those of the run."""
    require(args.resume is None or args.evaluate is None, "give --resume or --evaluate, not both")
    run = args.resume if args.evaluate is None else args.evaluate
    if run is None:
        name = f"{Path(args.dataset).name}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        args = replace(args, run_dir=os.path.abspath(args.run_dir or f"runs/{name}"))
        used = os.path.isfile(args.run_dir) or (os.path.isdir(args.run_dir) and os.listdir(args.run_dir))
        hint = f"name another, or try --resume {shlex.quote(args.run_dir)}"
        require(not used, f"--run-dir {args.run_dir} is in use: {hint}")
    else:
        path = Path(run, "args.json")
        require(run and path.exists(), f"{run or 'an empty name'}: there is no run, no args.json")
        content = json.loads(path.read_text() or "{}")  # a kill in the first moment leaves it empty
        require(content.get("script") == SCRIPT, f"{run} is of {content.get('script')}, not of {SCRIPT}")
        known = {name: x for name, x in content["args"].items() if name in vars(args) and x is not None}
        known |= {"run_dir": os.path.abspath(run), "resume": args.resume, "evaluate": args.evaluate}
        saved = Args(**known)
        args = tyro.cli(Args, default=saved)
        changed = {f"--{name.replace('_', '-')}" for name, x in vars(args).items() if x != getattr(saved, name)}
        changed -= {"--micro-batch-size", "--rollout-batch-size"}
        require(not changed, f"{run} keeps its arguments: drop {', '.join(sorted(changed))}")
    is_utf8 = args.run_dir.encode(errors="ignore").decode() == args.run_dir
    require(is_utf8, f"--run-dir {args.run_dir} is not in UTF-8, as TensorBoard needs it")
    for rule in RULES.strip().replace("\n", ", ").split(", "):
        values = re.sub(r"--([\w-]+)", lambda flag: str(getattr(args, flag[1].replace("-", "_"))), rule)
        holds = eval(values, {"inf": np.inf, "nan": np.nan, "WORLD_SIZE": WORLD_SIZE})
        require(holds, f"{rule} must hold, and {values} does not".replace("WORLD_SIZE", f"{WORLD_SIZE} processes"))
    hub_ids = {args.policy, args.tokenizer, *TOKENIZERS.values(), args.reward_model, args.dataset}
    unused = [name for name in args.revision if name not in hub_ids or Path(name).exists()]
    require(not unused, f"--revision: {', '.join(unused)} is no hub id of the policy, tokenizer, reward model or data")
    is_4bit = args.base_precision == "4bit"
    for flag, package, wanted in (("--track", "wandb", args.track), ("--base-precision 4bit", "bitsandbytes", is_4bit)):
        installed = any(metadata.distributions(name=package))  # import also finds an empty folder
        require(installed or not wanted, f"{flag} needs {package}: pip install {package}")
    return args


def load(args: Args, flag: str, name: str, function: Callable, **options):
    """Load a hub id or folder with a library's function. If that fails, end in one line with the library's reason."""
    try:
        return function(name, revision=args.revision.get(name), **options)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or repr(error)
        instead = "a hub id that can be reached from here, or a local folder, such as benchmark/rlhf_assets.py makes"
        require(False, f"--{flag} {name} cannot be loaded ({reason}): give {instead}")


def load_network(args: Args, flag: str, name: str, auto_class: type, **options) -> tuple:
    """Load a model and its tokenizer. End if weights are missing or the tokenizer does not belong to the model."""
    adapter = load(args, flag, name, transformers.utils.find_adapter_config_file)
    require(not adapter, f"--{flag} {name} is an adapter: give a model that it has been merged into")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the info lists mismatches too
    model, info = load(args, flag, name, auto_class.from_pretrained, trust_remote_code=False, **options)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}  # drawn at random
    names = f"{', '.join(sorted(missing)[:5])} of {type(model).__name__}"
    require(not missing, f"--{flag} {name} has no weights, of the configuration's shape, for {names}")
    if flag == "policy" and (other := args.tokenizer or TOKENIZERS.get(name)):
        flag, name = "tokenizer", other
    tokenizer = load(args, flag, name, transformers.AutoTokenizer.from_pretrained, trust_remote_code=False)
    tokens = tokenizer("text", add_special_tokens=False).input_ids  # transformers may make an empty tokenizer up
    require(tokens, f"--{flag} {name} has no tokenizer{': give one with --tokenizer' * (flag == 'policy')}")
    rows, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    require(largest < rows, f"--{flag} {name}: tokens up to {largest}, {rows} embeddings: different models")
    require(tokenizer.eos_token or flag == "reward-model", f"--{flag} {name}: the tokenizer has no end-of-text token")
    return model, tokenizer


def num_positions(model: PreTrainedModel) -> int:
    """Number of positions. Those of RoBERTa and its like begin behind the padding token's id, which leaves fewer."""
    sizes = (getattr(model.config.get_text_config(), name, None) for name in ("max_position_embeddings", "max_seq_len"))
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    paddings = (getattr(table, "padding_idx", None) for table in tables)
    return next(filter(None, sizes), sys.maxsize) - next((i + 1 for i in paddings if i is not None), 0)


@torch.no_grad()
def check_policy(args: Args, model: PreTrainedModel, prompt_length: int, tolerance: float) -> None:
    """End if a prompt and its response may be too long for the model, or if log-probabilities of a short text change
    when the text goes on, or when it is padded beside a text of the run's full length."""
    length, room = prompt_length + args.response_length, num_positions(model)
    require(length <= room, f"--prompt-length + --response-length are {length} tokens; the policy has {room} positions")
    kind = type(model).__name__
    require(model.base_model is not model, f"--policy {args.policy}: transformers has no {kind} without its head")
    p, r, rows = min(prompt_length, 3), min(args.response_length, 4), model.get_input_embeddings().num_embeddings
    text = [3 * (i % 19 + 1) % rows for i in range(max(length, 20))]
    texts = (torch.tensor([text[:n]], device=model.device) for n in (p + r, min(room, 20)))
    logits = (model(x, use_cache=False).logits[:, p - 1 : p + r - 1].float().log_softmax(-1) for x in texts)
    tokens = torch.tensor([text[p : p + r]], device=model.device).unsqueeze(-1)
    alone, longer = (x.gather(-1, tokens).squeeze(-1) for x in logits)
    check_same("policy", args.policy, longer, alone, tolerance, what="what comes after a token")
    tokens, mask, _ = pad([text[:p], text[:prompt_length]], [text[p : p + r], text[prompt_length:length]], model.device)
    beside = response_logprobs(model, tokens, mask, args.response_length)[:1, :r]
    check_same("policy", args.policy, beside, alone, tolerance)


def check_same(flag, name, changed: Tensor, alone: Tensor, tolerance: float, what="padding or a longer text beside it"):
    error, others = (changed - alone).abs().max().item(), "docs/language-models.md names models for which it does not"
    require(error <= tolerance, f"--{flag} {name}: {what} changes its numbers by {error:.2g}; {others}")


def load_rows(args: Args, columns: list[str]) -> tuple[list[dict], list[dict], str | None]:
    """Rows of the training and the validation split, and the commit on the hub. End if a column is not all text."""
    name, path = args.dataset, Path(args.dataset)
    kind = FILES.get(path.suffix.lower())
    require(kind or not path.is_file(), f"--dataset {name} is no file of a kind that is read: {', '.join(FILES)}")

    def read(name: str, revision: str | None) -> tuple:
        if path.is_file():
            data = datasets.load_dataset(kind, data_files=escape(name))  # a name such as a[1].csv is no pattern
        elif any((path / file).exists() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, revision=revision)
        data = data if isinstance(data, datasets.DatasetDict) else {"train": data}
        require("train" in data, f"--dataset {name} has no split train, only {', '.join(data)}")
        train, validation = data["train"], data.get("validation", data.get("valid"))
        return data, train, validation, train.to_list() + (validation.to_list() if validation else [])

    data, train, validation, rows = load(args, "dataset", name, read)
    why = "; pandas takes CSV cells such as None, null and N/A for missing" if kind == "csv" else ""
    for number, row in enumerate(rows, 1):
        wrong = " and ".join(column for column in columns if not isinstance(row.get(column), str))
        what = f"whose {wrong} is no text; its columns are {', '.join(row)}{why}"
        require(not wrong, f"--dataset {name} has a row (number {number}) {what}")
    commit = re.search(r"/([0-9a-f]{40})/", str(train.cache_files))  # names a folder of the cache
    if validation is None:
        if others := ", ".join(split for split in data if split != "train"):
            say(f"--dataset {name} has no split validation: a fifth of train is; {others} is not used")
        require(len(train) > 1, f"--dataset {name} has {len(train)} rows: too few for training and validation")
        train, validation = train.train_test_split(test_size=0.2, seed=args.seed).values()
    return train.to_list(), validation.to_list(), commit and commit[1]


def git_commit() -> str | None:
    """Commit of the repository that tracks this file, with "-dirty" if the file has changed; else None."""
    path = Path(__file__).resolve()
    git = """unset $(git rev-parse --local-env-vars)
        git cat-file -e "HEAD:./$0" && git rev-parse HEAD && git diff --quiet HEAD -- "$0" || echo -dirty"""
    done = subprocess.run(["sh", "-c", git, path.name], cwd=path.parent, capture_output=True, text=True)
    return "".join(done.stdout.split()).removeprefix("-dirty") or None


class Run:
    """A run's directory: args.json, TensorBoard, curves.csv, checkpoint.pt, policy/, and when it has finished
    eval_samples.jsonl and result.json. The first process writes. rows are those of curves.csv, at full precision."""

    def __init__(self, args: Args, learner: Learner):
        """Make and lock the directory, or take that of --resume and load its last checkpoint."""
        self.args, self.learner, self.folder = replace(args, resume=None), learner, Path(args.run_dir)
        self.rows, self.num_processes_from, wall_seconds = [], {}, 0.0
        if RANK == 0:
            self.open(args)
        if (path := self.folder / "checkpoint.pt").exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = state.get("version", 1)
            require(version == VERSION, f"{path} is of version {version} of {SCRIPT}.py: continue it with that one")
            model = {name: state["model"][name] for name in learner.trained}
            learner.actor_critic.load_state_dict(model, strict=False)
            learner.optimizer.load_state_dict(state["optimizer"])
            self.rows, self.num_processes_from, wall_seconds = state["progress"]
        if [*self.num_processes_from.values()][-1:] != [WORLD_SIZE]:
            self.num_processes_from[str(max(0, len(self.rows) - 1))] = WORLD_SIZE
        self.start_time, self.signals = time.monotonic() - wall_seconds, []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        self.commit = git_commit()
        if RANK == 0 and args.track:
            import_module("wandb").init(dir=args.run_dir, config=asdict(args), sync_tensorboard=True, resume="auto")
        self.writer = SummaryWriter(args.run_dir, purge_step=len(self.rows)) if RANK == 0 else None

    def open(self, args: Args) -> None:
        """Make the directory with args.json, or take that of --resume, and lock it."""
        new = os.O_CREAT | os.O_EXCL if args.resume is None else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / "args.json", os.O_RDWR | new, 0o666)
        except OSError as error:
            require(re.search(DISK_FULL, str(error)), f"--run-dir {self.folder} cannot be made: {error.strerror}")
            raise
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it with the process
        except OSError as error:  # another error: this file system has no locks, go on without
            require(error.errno not in LOCKED, f"{self.folder} is being trained by another process")
        if new:
            os.write(file, json.dumps({"script": SCRIPT, "args": asdict(args)}, indent=2).encode())
        resume = shlex.join([sys.executable, __file__, "--resume", args.run_dir])
        say(f"run directory {args.run_dir}; if it stops, continue with: {resume}")

    def stop(self, number: int, _) -> None:
        """Ctrl-C or SIGTERM: the update ends with a checkpoint; a second one kills."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        if RANK == 0:
            say("stopping when this update has ended and is saved; once more stops at once", sys.stderr)

    def log(self, update: int, metrics: dict[str, float], samples: list[str] | None = None) -> None:
        """Log {tag: value}, any tags, in the row of an update, which may already exist."""
        if update == len(self.rows):
            self.rows.append({"update": update})
        self.rows[update] |= {tag: float(value) for tag, value in metrics.items()}  # of Python, numpy or torch
        if RANK == 0:
            columns = {tag: tag for row in self.rows for tag in row}
            rows = [{tag: f"{x:.6g}" for tag, x in row.items()} for row in self.rows]
            with (temporary := self.folder / "curves.csv.tmp").open("w", newline="") as file:
                csv.DictWriter(file, columns, lineterminator="\n").writerows([columns, *rows])
            temporary.replace(self.folder / "curves.csv")
            for tag, value in metrics.items():
                self.writer.add_scalar(tag, value, update)
            if samples:
                self.writer.add_text("samples", "\n\n".join(samples), update)
            self.writer.flush()  # before the next checkpoint, which counts these rows as written

    def save(self) -> None:
        if RANK == 0:
            state = {"version": VERSION, "model": {name: p.detach() for name, p in self.learner.trained.items()}}
            state["optimizer"] = self.learner.optimizer.state_dict()
            state["progress"] = self.rows, self.num_processes_from, time.monotonic() - self.start_time
            with (temporary := self.folder / "checkpoint.pt.tmp").open("wb") as file:
                torch.save(state, file)
            temporary.replace(self.folder / "checkpoint.pt")

    def save_policy(self) -> None:
        """Save the policy's adapter as a folder that peft loads (safetensors, configuration), with the tokenizer."""
        for number in (signal.SIGINT, signal.SIGTERM):  # from here on a stop loses nothing
            signal.signal(number, signal.default_int_handler)
        if RANK == 0:  # the checkpoint stays until there is a result, and writes this folder again
            folder, temporary = self.folder / "policy", self.folder / "policy.tmp"
            self.learner.actor_critic.adapters.save_pretrained(temporary, selected_adapters=["policy_adapter"])
            self.learner.tokenizer.save_pretrained(temporary / "policy_adapter")
            shutil.rmtree(folder, ignore_errors=True)  # of a process whose evaluation did not end
            os.replace(temporary / "policy_adapter", folder)
            shutil.rmtree(temporary)
            say("trained and saved; evaluating")

    def finish(self, metrics: dict[str, float], samples: list[dict]) -> None:
        """Write eval_samples.jsonl and result.json, and delete the checkpoint."""
        args, on_gpu, (before, *updates) = self.args, self.learner.device.type == "cuda", self.rows
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = self.learner.sum((torch.cuda.max_memory_allocated() if on_gpu else memory) / 2**30).item()
        if RANK > 0:
            return
        rows = updates[-1], before  # a run from before a new metric has it in the last row alone
        scores, before = ({tag.replace("/", "_"): row[tag] for tag in metrics if tag in row} for row in rows)
        tokens = args.num_trajectories * sum(row["val/response_length"] for row in updates)
        phases = "generation", "rollout", "update"
        generation, rollout, update = (sum(row[f"perf/{phase}_seconds"] for row in updates) for phase in phases)
        result = {"script": SCRIPT, "policy": args.policy, "dataset": args.dataset, "seed": args.seed}
        result |= {"args": asdict(args), "reward_model": self.learner.reward_name, "num_updates": len(updates)} | scores
        result |= {"eval_scores": [round(sample["score"], 6) for sample in samples], "before": before}
        result |= {"rollout_tokens_per_second": tokens / rollout, "peak_memory_gib": memory}
        result["update_tokens_per_second"] = args.update_epochs * tokens / update
        result |= {"generation_time_share": generation / (rollout + update), "num_processes": WORLD_SIZE}
        result |= {"num_processes_from": self.num_processes_from, "wall_seconds": time.monotonic() - self.start_time}
        result |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "commit": self.commit}
        result["hub_commits"] = self.learner.hub_commits
        versions = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
        result["versions"] = versions | {"python": sys.version.split()[0]}
        (self.folder / "eval_samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        (temporary := self.folder / "result.json.tmp").write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(self.folder / "result.json")
        (self.folder / "checkpoint.pt").unlink()  # it is several times as large as the policy
        say(f"everything is in {self.folder}")


def main() -> None:
    for name in ("stdin", "stdout", "stderr"):  # reopen closed ones: no file of the run may get descriptor 0, 1 or 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for library in (transformers.utils, huggingface_hub.utils, datasets):
        library.logging.set_verbosity(library.logging.CRITICAL)  # errors come as exceptions
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    args = parse_args(tyro.cli(Args, description=__doc__))
    if args.resume is not None and Path(args.run_dir, "result.json").exists():
        return say(f"{args.run_dir} has finished; --evaluate evaluates its policy again")
    try:
        learner = Learner(args)
        before = evaluate(learner, args)[0] if args.resume is None else {}  # a run begins when all has worked once
        if args.evaluate is not None:
            return
        run = Run(args, learner)
        if not run.rows:
            run.log(0, before or evaluate(learner, args)[0])
        train(args, learner, run)
    except KeyboardInterrupt:
        require(False, "stopped", code=130)
    except torch.OutOfMemoryError:
        require(False, f"the GPU is out of memory: {OOM_HINT}", code=1)
    except Exception as error:  # torch hides a full disk behind its own error; libraries in Rust give no errno
        texts = [str(x) for x in (error, error.__context__) if re.search(DISK_FULL, str(x))]
        if not texts:
            raise
        require(False, f"{args.run_dir}: {texts[0]}", code=1)


if __name__ == "__main__":
    main()
