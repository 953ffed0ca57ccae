"""Symmetric PPO (SPPO) for positive sentiment: a language model learns to continue movie reviews favourably.

    python sppo_rlhf_imdb.py --seed 1
    python sppo_rlhf_imdb.py --seed 1 --alpha 1 --beta 0    # PPO, the baseline
    torchrun --nproc_per_node 4 sppo_rlhf_imdb.py --seed 1  # on several processes or GPUs

Equation, table and section numbers are those of "Symmetric Reinforcement Learning Loss for Robust Learning on
Diverse Tasks and Model Scales". docs/paper-notes.md says where the paper is silent and what was chosen.
An action is a token, an episode one response; policy, value model and frozen reference are separate networks.
"""

import csv
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

SCRIPT = Path(__file__).stem
TRAINING, EVALUATION = 0, 1  # streams of random numbers
MAY_CHANGE = ("micro_batch_size", "rollout_batch_size")  # on resume and for an evaluation
OOM_HINT = "lower --micro-batch-size and --rollout-batch-size, which --resume takes as well"
TOKENIZERS = {"rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews": "lvwerra/gpt2-imdb"}  # where the authors took it
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")  # their versions go into result.json
METRICS = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "loss/target_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/response_length",
    "val/eos_rate",
    "losses/sign_flips",
    "losses/grad_norm",
    "losses/explained_variance",
    "perf/rollout_tokens_per_second",
    "perf/update_tokens_per_second",
    "eval/score",
    "eval/perplexity",
)


@dataclass
class Args:
    policy: str = "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"
    """causal language model to start from: hub id or local folder"""
    tokenizer: str | None = None
    """the policy's tokenizer: hub id or local folder; default its own, for the paper's policy that of TOKENIZERS"""
    reward_model: str = "lvwerra/distilbert-imdb"
    """sequence classifier with a label "positive", whose probability is the reward: hub id or local folder"""
    dataset: str = "stanfordnlp/imdb"
    """reviews in a column "text": hub id, JSONL file, or folder (train.jsonl and validation.jsonl, or save_to_disk)"""
    num_updates: int = 60
    """rollouts, each with update_epochs passes over it"""
    seed: int = 1
    """seed of everything random"""
    alpha: float = 0.5
    """weight of the PPO loss in Eq. 9"""
    beta: float = 0.4
    """weight of the reverse PPO loss in Eq. 9; alpha 1 and beta 0 is plain PPO"""
    Z: float = -1.0
    """the constant that stands for log 0 in the reverse loss (Section 4.1); only beta * Z matters"""
    kl_coef: float = 0.001
    """charge per token on log pi - log pi_ref, fixed"""
    target_coef: float = 0.0
    """weight of a cross-entropy on the review's first tokens, put after the prompt; the authors' runs had it at 0.1"""

    prompt_length: int = 64
    """tokens of a prompt at most; the prompt is the first half of a review, cut off at its left"""
    response_length: int = 48
    """tokens of a response at most"""
    min_response_length: int = 48
    """tokens before the end-of-text token may be sampled"""
    top_k: int = 50
    """sample among the k most likely tokens; 0: among all. Log-probabilities are always of the full softmax"""

    num_trajectories: int = 112
    """responses per rollout, over all processes"""
    update_epochs: int = 5
    """epochs per rollout"""
    minibatch_size: int = 28
    """responses per optimizer step, over all processes"""
    micro_batch_size: int = 28
    """responses per forward and backward pass of a process; changes memory, not the result"""
    rollout_batch_size: int = 56
    """responses generated at once by a process; changes memory, not the algorithm"""
    learning_rate: float = 5e-6
    """AdamW's learning rate"""
    weight_decay: float = 1e-6
    """AdamW's weight decay"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    norm_adv: bool = True
    """normalize the advantages of each minibatch, over real tokens (Table 14 compares)"""
    clip_coef: float = 0.2
    """PPO's epsilon (Eq. 3)"""
    clip_coef_value: float = 0.2
    """clip range of the value loss"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 1.0
    """global gradient norm of policy and value model above which gradients are scaled down"""

    run_dir: str | None = None
    """where everything goes; default runs/<dataset>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue; all other arguments but the two batch sizes that fit memory come from the run"""
    evaluate: str | None = None
    """run directory to evaluate instead of training"""
    eval_every: int = 0
    """updates between evaluations during training; 0: only before and after"""
    eval_samples: int = 0
    """validation prompts of an evaluation; 0: all. Perplexity is always that of all"""
    checkpoint_every: int = 10
    """updates between checkpoints"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project_name: str = "symmetric-rl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""
    cpu: bool = False
    """stay on the CPU where there is a GPU"""
    num_threads: int = 0
    """CPU threads of torch; 0: as torch chooses"""


class InputError(ValueError):
    """Bad input: main() prints its one line and exits with code 2."""


class RunError(RuntimeError):
    """A run that had to stop: main() prints its one line and exits with code 1."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def load(flag: str, name: str, from_pretrained: Callable, **options):
    """from_pretrained(name), hub id or local folder. Raises InputError with one line that says what to give instead."""
    try:
        return from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the libraries raise for a name, a network or a file that is wrong
        reason = (str(error) or repr(error)).splitlines()[0]
        instead = "a hub id that can be reached from here, or a local folder, such as benchmark/rlhf_assets.py makes"
        raise InputError(f"--{flag} {name} cannot be loaded ({reason}): give {instead}") from None


def load_auto(flag: str, name: str, auto_class: type, **options):
    """A model or tokenizer by one of transformers' Auto classes; code that comes with it is never run."""
    return load(flag, name, auto_class.from_pretrained, trust_remote_code=False, **options)


def load_texts(name: str, columns: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """Rows of the training and the validation split; without one, a random fifth of the training split.

    Raises InputError when there is no such data set or column, no row, or something else than text in a row.
    """
    path = Path(name)
    if path.is_file():
        data = load("dataset", name, lambda file: datasets.load_dataset("json", data_files=file))
    elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        data = load("dataset", name, datasets.load_from_disk)
    else:
        data = load("dataset", name, datasets.load_dataset)
    data = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    require("train" in data, f"--dataset {name} has no split train, only {', '.join(data)}")
    train = data["train"]
    if names := [name for name in ("validation", "valid") if name in data]:
        validation = data[names[0]]
    else:
        require(len(train) > 1, f"--dataset {name} has {len(train)} rows: too few for training and validation")
        train, validation = train.train_test_split(test_size=0.2, seed=0).values()
    for split in (train, validation):
        missing = [column for column in columns if column not in split.column_names]
        require(not missing, f"--dataset {name} has no column {', '.join(missing)}, only {split.column_names}")
        texts = all(isinstance(cell, str) for column in columns for cell in split[column])
        require(texts, f"--dataset {name} has rows in which {' or '.join(columns)} is no text")
    return train.select_columns(columns).to_list(), validation.select_columns(columns).to_list()


def first_half(review: str) -> str:
    """First half of a review's words."""
    words = review.split()
    return " ".join(words[: len(words) // 2])


def encode_targets(tokenizer: PreTrainedTokenizerBase, reviews: list[str], max_length: int) -> list[list[int]]:
    """The first tokens of reviews as responses."""
    tokenizer.truncation_side = "right"
    return tokenizer(reviews, add_special_tokens=False, truncation=True, max_length=max_length).input_ids


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, side: str) -> list[list[int]]:
    """Tokens of each text, at most max_length of them: side "left" cuts the beginning off, "right" the end."""
    tokenizer.truncation_side = side
    return tokenizer(texts, truncation=True, max_length=max_length).input_ids


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]) -> str:
    """The response as text; decoded together with its prompt, since some tokenizers drop a leading space."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + response, skip_special_tokens=True)[len(before) :]


def pad(prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Prompts padded on the left and responses on the right, so that all responses begin in one column.

    Returns tokens and attention mask, both (batch, longest prompt + longest response), and the mask of the responses'
    real tokens, (batch, longest response). Padding is token 0, which the masks keep out of everything.
    """
    P, R = max(map(len, prompts)), max(map(len, responses))
    tokens = [[0] * (P - len(p)) + p + r + [0] * (R - len(r)) for p, r in zip(prompts, responses)]
    mask = [[0] * (P - len(p)) + [1] * (len(p) + len(r)) + [0] * (R - len(r)) for p, r in zip(prompts, responses)]
    tokens, mask = torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
    return tokens, mask, mask[:, P:].bool()


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token in its own sequence, (batch, length): the first real one is at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (batch, length), float32, of tokens (batch, length) under logits (batch, length, vocabulary).

    The softmax is normalized one sequence at a time, and once more in the backward pass: no second tensor of the
    logits' size is made or, for bfloat16 logits in float32, kept.
    """
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return chosen - torch.stack([recompute(lambda x: x.float().logsumexp(-1), row, **options) for row in logits])


def response_logprobs(lm: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, num_actions: int) -> torch.Tensor:
    """Log-probabilities (batch, num_actions) of the last num_actions tokens, each from the logits one token before."""
    out = lm(tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=num_actions + 1)
    return token_logprobs(out.logits[:, :-1], tokens[:, -num_actions:])


class ActorCritic(nn.Module):
    """Policy and value model in one module, which Accelerate wraps and whose gradients are clipped jointly."""

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.value_head = nn.Linear(policy.config.hidden_size, 1)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, num_actions: int, target=None):
        """Log-probabilities and values (batch, num_actions) of the last num_actions tokens and the states before them.

        target: prompts with reference responses, as from pad(), whose log-probabilities come third; None without.
        """
        logprob = response_logprobs(self.policy, tokens, mask, num_actions)
        out = self.value_model(tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        values = self.value_head(out.last_hidden_state[:, -num_actions - 1 : -1]).squeeze(-1)
        target_logprob = None
        if target:
            target_tokens, target_mask, real = target
            target_logprob = response_logprobs(self.policy, target_tokens, target_mask, real.shape[1])
        return logprob, values, target_logprob


class Reward:
    """Probability of "positive" under a sequence classifier; of a text that is too long, the end counts."""

    def __init__(self, args: Args, device: torch.device):
        self.model = load_auto("reward-model", args.reward_model, AutoModelForSequenceClassification)
        self.tokenizer = load_auto("reward-model", args.reward_model, AutoTokenizer)
        check_vocabulary("reward-model", args.reward_model, self.tokenizer, self.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        require(self.tokenizer.pad_token, f"--reward-model {args.reward_model}: the tokenizer has no token to pad with")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        labels = {str(label).lower(): i for i, label in self.model.config.id2label.items()}
        positive = [i for label, i in labels.items() if label in ("positive", "pos")]
        require(positive, f"--reward-model {args.reward_model} has no label positive, only {', '.join(labels)}")
        self.positive, self.batch_size = positive[0], args.rollout_batch_size
        room = getattr(self.model.config, "max_position_embeddings", None) or 2**30
        self.max_length = min(self.tokenizer.model_max_length, room)
        self.tokenizer.truncation_side = "left"
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[float]:
        scores, order = [0.0] * len(texts), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            options = {"truncation": True, "max_length": self.max_length, "padding": True, "return_tensors": "pt"}
            batch = self.tokenizer([texts[i] for i in rows], **options).to(self.model.device)
            for i, score in zip(rows, self.model(**batch).logits.softmax(-1)[:, self.positive].tolist()):
                scores[i] = score
        return scores


def symmetric_ppo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    clip_coef: float,
    alpha: float,
    beta: float,
    Z: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """alpha * L_ppo + beta * L_rppo (Eq. 9), averaged over the real tokens: (sequence, token) -> scalar.

    logprob and old_logprob are log-probabilities of the sampled tokens under pi and pi_old; mask is True on real
    tokens. The reverse loss is Eq. 8 with the aligned sign for A < 0 (Eq. 33-34): one form,
    L_rppo = -A Z (1 - pi) / pi_old, for both signs, since the other tokens' probabilities sum to 1 - pi. Its constant
    part -A Z / pi_old is left out of the value: it has no gradient, and with a vocabulary it is large.
    """
    ratio = torch.where(mask, logprob - old_logprob, 0.0).exp()  # r_t of Eq. 3
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    L_ppo = -torch.min(unclipped, clipped)  # Eq. 3
    active = unclipped <= clipped  # tokens that still have a PPO gradient (Section A.4)
    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8
    return masked_mean(alpha * L_ppo + beta * L_rppo, mask)  # Eq. 9


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_coef: float, mask: torch.Tensor
) -> torch.Tensor:
    """Half the mean, over real tokens, of the larger of the plain and the clipped squared error.

    (sequence, token) -> scalar
    """
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (clipped - returns).square()), mask)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the elements where mask, of the same shape, is True: scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def normalize(x: torch.Tensor, mask: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(x - mean) / (std + 1e-8) over the elements where mask is True, unbiased std; 0 elsewhere.

    reduce adds up a tensor over all processes: mean and std are those of the whole minibatch.
    """
    count, total = reduce(mask.sum()), reduce(torch.where(mask, x, 0.0).sum())
    centred = torch.where(mask, x - total / count, 0.0)
    std = (reduce(centred.square().sum()) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-8)


def token_rewards(
    scores: torch.Tensor, logprob: torch.Tensor, ref_logprob: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Reward of every token, (batch, length): -kl_coef (log pi - log pi_ref), and on the last real token the score.

    The charge is the one-sample estimate of the KL divergence, of either sign. scores: (batch,); the end-of-text token
    is an action like any other and, where it was sampled, carries the score.
    """
    rewards = torch.where(mask, -kl_coef * (logprob - ref_logprob), 0.0)
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2018): advantages and returns, (batch, length) like rewards.

    The episode is over after the last real token, with value 0; past it both are 0.
    """
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(rewards.shape[1])):
        advantage = deltas[:, t] + gamma * gae_lambda * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def generate(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch_size: int
) -> list[list[int]]:
    """A response to each prompt, with its end-of-text token where there is one; prompts of like length go together."""
    responses, order = [[] for _ in prompts], sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        tokens, mask, _ = pad([prompts[i] for i in rows], [[]] * len(rows), policy.device)
        with torch.no_grad():
            output = policy.generate(tokens, attention_mask=mask)[:, tokens.shape[1] :].tolist()
        for i, response in zip(rows, output):
            ended = tokenizer.eos_token_id in response
            responses[i] = response[: response.index(tokenizer.eos_token_id) + 1] if ended else response
    return responses


def prompt_indices(num_prompts: int, update: int, num_trajectories: int, seed: int) -> np.ndarray:
    """Prompts of an update, (num_trajectories,): all in random order, again and again; the same when resumed."""
    start = update * num_trajectories
    epochs = range(start // num_prompts, (start + num_trajectories - 1) // num_prompts + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in epochs])
    return order[start % num_prompts :][:num_trajectories]


def seed_everything(*entropy: int) -> None:
    """Seed torch from several numbers, such as seed, update and process."""
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def generation_config(args: Args, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Sampling as the arguments have it, and nothing of what the model's own folder says about it."""
    return GenerationConfig(
        do_sample=True,
        top_k=args.top_k,
        max_new_tokens=args.response_length,
        min_new_tokens=args.min_response_length,
        remove_invalid_values=True,  # a policy of NaNs is found out by its loss
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


@dataclass
class Rollout:
    """Trajectories of one process. Tensors are (trajectories, response_length), 0 past the last real token."""

    prompts: list[list[int]]
    responses: list[list[int]]
    targets: list[list[int]]  # first tokens of the reference, for --target-coef
    mask: torch.Tensor  # real tokens
    logprob: torch.Tensor  # of pi_old
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class Learner:
    """Data and networks of a run on this process: policy, value model, frozen reference and reward model."""

    def __init__(self, args: Args, accelerator: Accelerator):
        """Raises InputError when something cannot be loaded or does not fit together."""
        self.accelerator, self.device = accelerator, accelerator.device
        with accelerator.main_process_first():  # the others find the caches filled
            train, validation = load_texts(args.dataset, ["text"])
            require(
                not load("policy", args.policy, find_adapter_config_file),
                f"--policy {args.policy} is an adapter: give a model that the adapter has been merged into",
            )
            tokenizer = args.tokenizer or TOKENIZERS.get(args.policy, args.policy)
            self.tokenizer = load_auto("policy" if tokenizer == args.policy else "tokenizer", tokenizer, AutoTokenizer)
            policy = load_auto("policy", args.policy, AutoModelForCausalLM, dtype=torch.float32)
            value_model = load_auto("policy", args.policy, AutoModel, dtype=torch.float32)
            check_vocabulary("policy", args.policy, self.tokenizer, policy)
            self.reward = Reward(args, self.device)
        room = getattr(policy.config, "max_position_embeddings", None) or sys.maxsize
        length = args.prompt_length + args.response_length
        require(
            length <= room, f"--prompt-length plus --response-length is {length}; {args.policy} has {room} positions"
        )
        self.reviews = [row["text"] for row in train if first_half(row["text"])]
        self.validation = [row["text"] for row in validation if first_half(row["text"])]
        for split, reviews in (("training", self.reviews), ("validation", self.validation)):
            enough = len(reviews) >= accelerator.num_processes
            require(enough, f"--dataset {args.dataset} has {len(reviews)} {split} reviews of at least two words")
        policy.generation_config = generation_config(args, self.tokenizer)
        self.reference = deepcopy(policy).to(self.device).eval().requires_grad_(False)
        torch.manual_seed(args.seed)  # the value head is the same in every process
        model = ActorCritic(policy, value_model).to(self.device).eval()  # eval: dropout is never active
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, eps=1e-5, weight_decay=args.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @property
    def actor_critic(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(x, "sum")

    def mine(self, rows: Sequence) -> Sequence:
        """This process's share of rows that all processes hold."""
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def state(self) -> dict:
        """What is trained, by name, and the optimizer's state."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        parameters = {name: p.detach() for name, p in self.actor_critic.named_parameters() if id(p) in trained}
        return {"model": parameters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Take over what state() returned."""
        parameters = dict(self.actor_critic.named_parameters())
        for name, value in state["model"].items():
            parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def rollout(learner: Learner, reviews: list[str], args: Args) -> tuple[Rollout, dict[str, float], list[str]]:
    """Respond to this process's reviews, score the responses and estimate advantages.

    Returns the trajectories, means over those of all processes as {tag: mean}, and a few responses to look at.
    """
    tokenizer, device = learner.tokenizer, learner.device
    prompts = encode(tokenizer, [first_half(review) for review in reviews], args.prompt_length, "left")
    responses = generate(learner.actor_critic.policy, tokenizer, prompts, args.rollout_batch_size)
    texts = [tokenizer.decode(p + r, skip_special_tokens=True) for p, r in zip(prompts, responses)]
    scores = torch.tensor(learner.reward(texts), device=device)

    # pi_old, V and pi_ref from a fresh forward pass: generation has other log-probabilities (top-k) and other kernels.
    mask = torch.zeros(len(prompts), args.response_length, dtype=torch.bool, device=device)
    logprob, values, ref_logprob = torch.zeros(3, *mask.shape, device=device)
    for start in range(0, len(prompts), args.micro_batch_size):
        micro = slice(start, start + args.micro_batch_size)
        tokens, attention, real = pad(prompts[micro], responses[micro], device)
        R = real.shape[1]
        mask[micro, :R] = real
        logprob[micro, :R], values[micro, :R], _ = learner.actor_critic(tokens, attention, R)
        ref_logprob[micro, :R] = response_logprobs(learner.reference, tokens, attention, R)
    logprob, values, ref_logprob = (torch.where(mask, x, 0.0) for x in (logprob, values, ref_logprob))

    rewards = token_rewards(scores, logprob, ref_logprob, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    kl, ended = (logprob - ref_logprob).sum(1), [r[-1] == tokenizer.eos_token_id for r in responses]
    sums = {
        "objective/scores": scores.sum(),
        "objective/kl": kl.sum(),
        "objective/entropy": -logprob.sum(),
        "objective/non_score_reward": -args.kl_coef * kl.sum(),
        "objective/rlhf_reward": rewards.sum(),
        "val/response_length": mask.sum(),
        "val/eos_rate": torch.tensor(sum(ended)),
        "losses/explained_variance": len(prompts) * (1 - (returns - values)[mask].var() / returns[mask].var()),
    }
    means = learner.sum(torch.stack([x.float().to(device) for x in sums.values()])) / args.num_trajectories
    targets = encode_targets(tokenizer, reviews, args.response_length) if args.target_coef else [[] for _ in reviews]
    samples = [f"{score:.3f} | {text}" for score, text in zip(scores.tolist()[:4], texts)]
    trajectories = Rollout(prompts, responses, targets, mask, logprob, values, advantages, returns)
    return trajectories, dict(zip(sums, means.tolist())), samples


def backward(learner: Learner, trajectories: Rollout, rows: list[int], args: Args) -> dict[str, float]:
    """Gradients of a minibatch, this process's rows of its rollout, and its losses as {tag: mean}.

    Every mean is over the real tokens of the whole minibatch, of all micro-batches and all processes: a micro-batch
    counts by its share of the tokens. Gradients are averaged over processes, hence the factor num_processes.
    """
    mask, advantages = trajectories.mask[rows], trajectories.advantages[rows]
    normalized = normalize(advantages, mask, learner.sum) if args.norm_adv else advantages
    num_tokens = learner.sum(mask.sum())
    num_target_tokens = learner.sum(
        torch.tensor(sum(len(trajectories.targets[i]) for i in rows), device=learner.device)
    )
    sums = {}
    for start in range(0, len(rows), args.micro_batch_size):
        micro = rows[start : start + args.micro_batch_size]
        prompts = [trajectories.prompts[i] for i in micro]
        tokens, attention, mask = pad(prompts, [trajectories.responses[i] for i in micro], learner.device)
        R = mask.shape[1]
        A, A_normalized = (x[start : start + args.micro_batch_size, :R] for x in (advantages, normalized))
        old_logprob, old_values, returns = (
            x[micro, :R] for x in (trajectories.logprob, trajectories.values, trajectories.returns)
        )
        target = pad(prompts, [trajectories.targets[i] for i in micro], learner.device) if args.target_coef else None
        last = start + args.micro_batch_size >= len(rows)
        with nullcontext() if last else learner.accelerator.no_sync(learner.model):
            logprob, values, target_logprob = learner.model(tokens, attention, R, target)
            policy_loss = symmetric_ppo_loss(
                logprob, old_logprob, A_normalized, args.clip_coef, args.alpha, args.beta, args.Z, mask
            )
            value_loss = clipped_value_loss(values, old_values, returns, args.clip_coef_value, mask)
            share = mask.sum() / num_tokens
            loss = share * (policy_loss + args.vf_coef * value_loss)
            target_loss = torch.zeros((), device=learner.device)
            if target:
                target_loss = -torch.where(target[2], target_logprob, 0.0).sum() / num_target_tokens
                loss = loss + args.target_coef * target_loss
            learner.accelerator.backward(loss * learner.accelerator.num_processes)

        with torch.no_grad():
            logratio = torch.where(mask, logprob - old_logprob, 0.0)
            ratio = logratio.exp()
            for tag, value in {
                "loss/policy_avg": share * policy_loss,
                "loss/value_avg": share * value_loss,
                "loss/target_avg": target_loss,
                "policy/approxkl_avg": share * masked_mean(ratio - 1 - logratio, mask),
                "policy/clipfrac_avg": share * masked_mean(((ratio - 1).abs() > args.clip_coef).float(), mask),
                "val/clipfrac_avg": share
                * masked_mean(((values - old_values).abs() > args.clip_coef_value).float(), mask),
                "val/ratio": share * masked_mean(ratio, mask),
                "losses/sign_flips": share * masked_mean(((A > 0) != (A_normalized > 0)).float(), mask),  # Figure 2
            }.items():
                sums[tag] = sums.get(tag, 0) + value
    return dict(zip(sums, learner.sum(torch.stack(list(sums.values()))).tolist()))


def train(args: Args, run_dir: Path, learner: Learner) -> None:
    """Train to the end and leave a result.json in run_dir.

    Goes on from the run's checkpoint. Raises RunError when a loss is not finite, and KeyboardInterrupt on Ctrl-C or
    SIGTERM after the running update, with a checkpoint to go on from.
    """
    start_time, commit = time.monotonic(), git_commit()
    accelerator, main_process = learner.accelerator, learner.accelerator.is_main_process
    num_processes, process_index = accelerator.num_processes, accelerator.process_index
    counters = {"update": 0, "rollout_tokens": 0, "rollout_seconds": 0.0, "update_tokens": 0, "update_seconds": 0.0}
    counters |= {"wall_seconds": 0.0, "before": None}
    checkpoint = load_checkpoint(run_dir)
    if checkpoint:
        try:
            learner.load(checkpoint["learner"])
        except (RuntimeError, KeyError, ValueError):
            raise InputError(f"the checkpoint in {run_dir} is of another network") from None
        counters = checkpoint["counters"]
    log = RunLog(run_dir, args, counters["update"] if checkpoint else -1) if main_process else None
    progress = Progress(counters["update"], args.num_updates)

    def save_checkpoint() -> None:
        now = counters | {"wall_seconds": counters["wall_seconds"] + time.monotonic() - start_time}
        state = {"script": SCRIPT, "learner": learner.state(), "counters": now}
        if main_process:
            write_atomic(run_dir / "checkpoint.pt", partial(torch.save, state))

    stop_signals = []

    def on_signal(number: int, _) -> None:
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if main_process:
            print("\nstopping after this update")

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    if counters["before"] is None:
        metrics = evaluate(learner, args)
        counters["before"] = {tag: value for tag, value in metrics.items() if tag != "samples"}
        if main_process:
            log.write(0, {tag: metrics[tag] for tag in metrics if tag in METRICS})
            print(f"before training: {summary(metrics)}", flush=True)

    stopped = False
    while counters["update"] < args.num_updates and not stopped:
        update = counters["update"]
        seed_everything(args.seed, TRAINING, update, process_index)
        begin = time.perf_counter()
        indices = learner.mine(prompt_indices(len(learner.reviews), update, args.num_trajectories, args.seed))
        trajectories, metrics, samples = rollout(learner, [learner.reviews[i] for i in indices], args)
        rollout_end = time.perf_counter()

        stats = []
        rows_per_minibatch = args.minibatch_size // num_processes
        for _ in range(args.update_epochs):
            order = torch.randperm(len(indices)).tolist()
            for start in range(0, len(order), rows_per_minibatch):
                learner.optimizer.zero_grad()
                losses = backward(learner, trajectories, order[start : start + rows_per_minibatch], args)
                grad_norm = accelerator.clip_grad_norm_(learner.model.parameters(), args.max_grad_norm).item()
                if not np.isfinite(grad_norm):
                    raise RunError(
                        f"seed {args.seed} stopped in update {update + 1}: the loss is not finite. "
                        "Try a lower --learning-rate or a lower --beta"
                    )
                learner.optimizer.step()
                stats.append(losses | {"losses/grad_norm": grad_norm})
        update_end = time.perf_counter()

        counters["update"] = update + 1
        num_tokens = metrics["val/response_length"] * args.num_trajectories
        counters["rollout_tokens"] += num_tokens
        counters["rollout_seconds"] += rollout_end - begin
        counters["update_tokens"] += num_tokens * args.update_epochs
        counters["update_seconds"] += update_end - rollout_end
        metrics |= {tag: float(np.mean([s[tag] for s in stats])) for tag in stats[0]}
        metrics["perf/rollout_tokens_per_second"] = num_tokens / (rollout_end - begin)
        metrics["perf/update_tokens_per_second"] = num_tokens * args.update_epochs / (update_end - rollout_end)
        if args.eval_every and counters["update"] % args.eval_every == 0 and counters["update"] < args.num_updates:
            metrics |= evaluate(learner, args)
        if main_process:
            log.writer.add_text("samples", "\n\n".join(samples), counters["update"])
            log.write(counters["update"], {tag: value for tag, value in metrics.items() if tag in METRICS})
            progress.show(counters["update"], metrics["objective/scores"], metrics["objective/kl"])
        stopped = learner.sum(torch.tensor(len(stop_signals), device=learner.device)).item() > 0  # in any process
        if counters["update"] % args.checkpoint_every == 0 or counters["update"] == args.num_updates or stopped:
            save_checkpoint()

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt

    metrics = evaluate(learner, args)
    memory = learner.sum(torch.tensor(peak_memory(learner.device), device=learner.device)).item()
    if not main_process:
        return
    save_policy(learner, run_dir)
    samples = metrics.pop("samples")
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    write_atomic(run_dir / "eval_samples.jsonl", lambda temporary: temporary.write_text(lines))
    installed = {d.name: d.version for d in distributions()}
    versions = {"python": platform.python_version()} | {p: installed[p] for p in PACKAGES if p in installed}
    result = {"script": SCRIPT, "policy": args.policy, "dataset": args.dataset, "reward_model": args.reward_model}
    result |= {"seed": args.seed, "args": asdict(args), "num_updates": counters["update"]}
    result |= {tag.replace("/", "_"): value for tag, value in metrics.items()}
    result |= {
        "eval_scores": [round(sample["score"], 6) for sample in samples],
        "before": {tag.replace("/", "_"): value for tag, value in counters["before"].items()},
        "rollout_tokens_per_second": counters["rollout_tokens"] / max(counters["rollout_seconds"], 1e-9),
        "update_tokens_per_second": counters["update_tokens"] / max(counters["update_seconds"], 1e-9),
        "peak_memory_gib": memory,
        "num_processes": num_processes,
        "device": torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu",
        "wall_seconds": counters["wall_seconds"] + time.monotonic() - start_time,
        "versions": versions,
        "commit": commit,
    }
    write_json(run_dir / "result.json", result)
    (run_dir / "checkpoint.pt").unlink()  # it is several times as large as the policy
    log.write(args.num_updates, {tag: metrics[tag] for tag in metrics if tag in METRICS})
    log.close()


def evaluate(learner: Learner, args: Args) -> dict:
    """Scores and perplexity of Table 3 on the validation reviews as {tag: value}, and "samples", what was scored.

    A response is sampled for each prompt; the classifier sees the full first half of the review and the response.
    Empty responses, responses cut in half and the reviews themselves are scored as well (compare Figure 1, Table 15).
    """
    tokenizer = learner.tokenizer
    seed_everything(args.seed, EVALUATION, learner.accelerator.process_index)
    index = learner.mine(range(len(learner.validation))[: args.eval_samples or None])
    reviews = [learner.validation[i] for i in index]
    halves = [first_half(review) for review in reviews]
    prompts = encode(tokenizer, halves, args.prompt_length, "left")
    responses = generate(learner.actor_critic.policy, tokenizer, prompts, args.rollout_batch_size)
    texts = [continuation(tokenizer, p, r) for p, r in zip(prompts, responses)]
    cut = [continuation(tokenizer, p, r[: len(r) // 2]) for p, r in zip(prompts, responses)]
    scored = {
        "score": learner.reward([half + text for half, text in zip(halves, texts)]),
        "score_reference": learner.reward(reviews),
        "score_empty": learner.reward(halves),
        "score_truncated": learner.reward([half + text for half, text in zip(halves, cut)]),
    }
    samples = [
        {"index": i, "prompt": half, "response": text, "reference": " ".join(review.split())[len(half) :]}
        | {name: scores[row] for name, scores in scored.items()}
        for row, (i, half, text, review) in enumerate(zip(index, halves, texts, reviews))
    ]
    samples = sorted(gather_object(samples), key=lambda sample: sample["index"])
    metrics = {f"eval/{name}": float(np.mean([sample[name] for sample in samples])) for name in scored}
    metrics["eval/empty_wins"] = float(np.mean([s["score_empty"] > s["score"] for s in samples]))
    metrics["eval/truncated_wins"] = float(np.mean([s["score_truncated"] > s["score"] for s in samples]))
    return metrics | {"eval/perplexity": perplexity(learner, learner.validation), "samples": samples}


@torch.no_grad()
def perplexity(learner: Learner, texts: list[str]) -> float:
    """The policy's perplexity of texts, joined by blank lines: strides of 512 tokens, each with as many before it."""
    policy = learner.actor_critic.policy
    tokens = learner.tokenizer("\n\n".join(texts), verbose=False, return_tensors="pt").input_ids.to(learner.device)
    stride = min(512, (getattr(policy.config, "max_position_embeddings", None) or sys.maxsize) // 2)
    loss = torch.zeros((), dtype=torch.float64, device=learner.device)
    for start in learner.mine(range(0, tokens.shape[1], stride)):
        window = tokens[:, max(0, start - stride) : start + stride]
        num_predicted = min(stride, tokens.shape[1] - start) - (start == 0)  # nothing predicts the first token
        if num_predicted:
            loss -= response_logprobs(policy, window, torch.ones_like(window), num_predicted).sum()
    return (learner.sum(loss) / (tokens.shape[1] - 1)).exp().item()


def summary(metrics: dict) -> str:
    """An evaluation in one line."""
    return f"score {metrics['eval/score']:.4f}, perplexity {metrics['eval/perplexity']:.2f}"


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename: a kill or a full disk leaves the old file or the new one.

    Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have exceptions of their own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, is the disk full? {error}") from error


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def check_unused(run_dir: Path) -> None:
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"--run-dir {run_dir} is in use: continue it with --resume {run_dir}, or name another")


def create_run_dir(args: Args, run_dir: Path) -> None:
    """Make run_dir with the arguments of the run in it. Raises InputError when it is in use or cannot be made."""
    check_unused(run_dir)
    require(run_dir.name not in ("", ".."), f"--run-dir {run_dir} has no name of its own: name a directory")
    temporary = run_dir.with_name(f".{run_dir.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_json(temporary / "args.json", {"script": SCRIPT, "args": asdict(args) | {"run_dir": str(run_dir)}})
        os.replace(temporary, run_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"--run-dir {run_dir} cannot be made: {error.strerror or error}") from None


def open_run_dir(run_dir: Path) -> Args:
    """Arguments of an existing run. Raises InputError when run_dir holds no run of this script."""
    if not (run_dir / "args.json").exists():
        raise InputError(f"{run_dir} holds no run of {SCRIPT}.py: there is no args.json in it")
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        args = Args(**saved["args"]) if saved["script"] == SCRIPT else None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{run_dir / 'args.json'} cannot be read") from None
    require(args is not None, f"{run_dir} is a run of {saved['script']}.py, not of {SCRIPT}.py")
    return args


def load_checkpoint(run_dir: Path) -> dict | None:
    """The run's last checkpoint, None before the first. Raises InputError when it cannot be read."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["script"] == SCRIPT
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint of {SCRIPT}.py ({type(error).__name__})") from None
    return checkpoint


def save_policy(learner: Learner, run_dir: Path) -> None:
    """The policy as a folder that from_pretrained() loads: weights (safetensors), configuration, tokenizer."""
    folder, temporary = run_dir / "policy", run_dir / "policy.tmp"
    for old in (folder, temporary):
        shutil.rmtree(old, ignore_errors=True)  # of an attempt that was killed
    try:
        learner.actor_critic.policy.save_pretrained(temporary)
        learner.tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{folder} cannot be written, is the disk full? {error}") from error


def git_commit() -> str | None:
    """Commit of the repository this file is in, with "-dirty" when this file differs; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", __file__))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changes else "")


class RunLog:
    """TensorBoard, curves.csv and Weights & Biases of one run; on resume, what lies past the checkpoint goes."""

    def __init__(self, run_dir: Path, args: Args, global_step: int):
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        path = run_dir / "curves.csv"
        rows = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= global_step]
        header = ",".join(("global_step", *METRICS)) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(header + "".join(rows)))
        self.file = path.open("a", newline="")
        self.csv = csv.DictWriter(self.file, ("global_step", *METRICS), lineterminator="\n")
        self.wandb = None
        if args.track:
            import wandb

            begun = (run_dir / "args.json").stat().st_mtime_ns  # a new run in an old place is another one
            run_id = hashlib.sha1(f"{run_dir.resolve()} {begun}".encode()).hexdigest()[:12]
            self.wandb = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                reinit="create_new",
                config=asdict(args),
                dir=run_dir,
            )

    def write(self, global_step: int, metrics: dict[str, float]) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, global_step)
        self.csv.writerow({"global_step": global_step} | {tag: f"{value:.6g}" for tag, value in metrics.items()})
        self.file.flush()
        self.writer.flush()  # a kill loses nothing that a later checkpoint counts as written
        if self.wandb:
            self.wandb.log(metrics, step=global_step)

    def close(self) -> None:
        self.writer.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class Progress:
    """One line: redrawn in place on a terminal, printed at most every 30 seconds when output is redirected."""

    def __init__(self, first: int, total: int):
        self.first, self.total, self.begin = first, total, time.monotonic()
        self.last = -np.inf

    def show(self, update: int, score: float, kl: float) -> None:
        terminal = sys.stdout.isatty()
        if not terminal and time.monotonic() - self.last < 30 and update < self.total:
            return
        self.last = time.monotonic()
        left = int((self.total - update) * (self.last - self.begin) / (update - self.first))
        bar = f"[{'#' * int(20 * update / self.total):20}] " if terminal else ""
        line = f"{bar}update {update} of {self.total}  score {score:.4f}  KL {kl:.3f}  "
        line += f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        end = "" if terminal and update < self.total else "\n"
        print(f"\r{line}\x1b[K" if terminal else line, end=end, flush=True)


def validate(args: Args) -> None:
    """Raise InputError with one line that says what is wrong and what is allowed."""
    counts = (
        "num_updates prompt_length response_length num_trajectories update_epochs minibatch_size micro_batch_size "
        "rollout_batch_size checkpoint_every"
    )
    for allowed, is_allowed, names in (
        ("at least 1", lambda x: x >= 1, counts),
        ("above 0", lambda x: 0 < x < np.inf, "alpha learning_rate clip_coef clip_coef_value max_grad_norm"),
        (
            "0 or above",
            lambda x: 0 <= x < np.inf,
            "beta kl_coef target_coef vf_coef weight_decay top_k min_response_length eval_every eval_samples "
            "num_threads",
        ),
        ("0 or above, below 2**63", lambda x: 0 <= x < 2**63, "seed"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma gae_lambda"),
        ("below 0", lambda x: -np.inf < x < 0, "Z"),
    ):
        for name in names.split():
            value = getattr(args, name)
            require(is_allowed(value), f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    require(
        args.min_response_length <= args.response_length,
        f"--min-response-length {args.min_response_length} is more than --response-length {args.response_length}",
    )
    require(
        args.num_trajectories % args.minibatch_size == 0,
        f"{args.num_trajectories} trajectories do not divide into minibatches of {args.minibatch_size}: "
        "--num-trajectories must be a multiple of --minibatch-size",
    )
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    require(
        args.minibatch_size % num_processes == 0,
        f"--minibatch-size {args.minibatch_size} does not divide among {num_processes} processes",
    )
    require(
        args.eval_samples == 0 or args.eval_samples >= num_processes,
        f"--eval-samples must be 0 (all) or at least the number of processes, {num_processes}, got {args.eval_samples}",
    )
    require(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")


def check_vocabulary(flag: str, name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError when the tokenizer has tokens that the model has no embedding for, or no end-of-text token.

    For a folder without a tokenizer, transformers makes an empty one of some families.
    """
    instead = ": give one with --tokenizer" if flag == "policy" else ""
    require(tokenizer("text", add_special_tokens=False).input_ids, f"--{flag} {name} has no tokenizer{instead}")
    rows = model.get_input_embeddings().num_embeddings
    message = f"--{flag} {name}: the tokenizer has {len(tokenizer)} tokens and the model embeddings for {rows}"
    require(len(tokenizer) <= rows, message + "; they belong to different models")
    if flag == "policy":
        require(tokenizer.eos_token_id is not None, f"--{flag} {name}: the tokenizer has no end-of-text token")


def given() -> list[str]:
    """Names of the arguments on the command line."""
    flags = {word.partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
    return [f.name for f in fields(Args) if {f"__{f.name}", f"__no_{f.name}"} & flags]


def only(*names: str) -> None:
    """Raise InputError when any other argument than names was given."""
    extra = [name for name in given() if name not in names]
    require(not extra, f"--{names[0]} takes its arguments from the run: drop --{', --'.join(extra).replace('_', '-')}")


def run(args: Args, run_dir: Path) -> int:
    """Train, resume or evaluate as the arguments say; print the result."""
    empty = "" in (args.run_dir, args.resume, args.evaluate)
    require(not empty, "--run-dir, --resume and --evaluate need a path, got an empty one")
    if args.evaluate or args.resume:
        only("evaluate" if args.evaluate else "resume", *MAY_CHANGE)
        run_dir = Path(args.evaluate or args.resume)
        saved = open_run_dir(run_dir)
        if args.evaluate:
            require(
                (run_dir / "policy").exists(), f"{run_dir} holds no policy: it is written when the run has finished"
            )
            saved = replace(saved, policy=str(run_dir / "policy"), tokenizer=None, evaluate=args.evaluate)
        smaller = {name: getattr(args, name) for name in MAY_CHANGE if name in given()}
        args = replace(saved, **smaller)
    else:
        check_unused(run_dir)
    resumed = (run_dir / "args.json").exists()
    if args.evaluate or not (run_dir / "result.json").exists():
        validate(args)
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        accelerator = Accelerator(cpu=args.cpu or not torch.cuda.is_available())
        world_size = os.environ.get("WORLD_SIZE", "1")
        require(
            str(accelerator.num_processes) == world_size,
            f"started as one of {world_size} processes, but Accelerate sees {accelerator.num_processes}: use torchrun",
        )
        learner = Learner(args, accelerator)
        if args.evaluate:
            metrics = evaluate(learner, args)
            if accelerator.is_main_process:
                print(summary(metrics))
            return 0
        if not resumed:
            (name,) = broadcast_object_list([str(run_dir)])  # the default has the time in it
            run_dir = Path(name)
            if accelerator.is_main_process:
                create_run_dir(args, run_dir)
            accelerator.wait_for_everyone()
            args = open_run_dir(run_dir)
        train(args, run_dir, learner)
    if os.environ.get("RANK", "0") != "0":
        return 0
    result = json.loads((run_dir / "result.json").read_text())
    metrics = {"eval/" + key.removeprefix("eval_"): value for key, value in result.items() if key.startswith("eval_")}
    print(f"seed {args.seed}: {result['num_updates']} updates, {summary(metrics)}")
    print(f"  everything is in {run_dir}; evaluate again with --evaluate {run_dir}")
    return 0


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = f"{Path(args.dataset).name}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    code, hint = 1, ""
    to_go_on = f"to go on: python {SCRIPT}.py --resume {run_dir}"
    try:
        return run(args, run_dir)
    except InputError as error:
        message, code = f"error: {' '.join(str(error).split())}", 2
    except RunError as error:  # a resumed run would draw the same random numbers and come here again
        message = "\n" * sys.stdout.isatty() + f"error: {error}"
    except OSError as error:
        message, hint = f"error: {' '.join(str(error).split())}", f"\n{to_go_on}"
    except torch.OutOfMemoryError:
        message, hint = f"error: the GPU is out of memory: {OOM_HINT}", f"\n{to_go_on}"
    except KeyboardInterrupt:
        message, code, hint = "\nstopped", 130, f"; {to_go_on}"
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message + hint * (run_dir / "args.json").exists(), file=sys.stderr)
    elif code == 1 and hint:  # a disk or a GPU may be full for one process alone
        print(f"process {rank}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
