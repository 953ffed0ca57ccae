"""The language scripts from the inside: padding, log-probabilities, rewards, advantages, gradients, data.

On tiny models with dropout in their configurations, which must never be active. test_rlhf_cli.py runs whole scripts.
"""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from conftest import import_scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

IMDB, TLDR = (param.values[0] for param in import_scripts("sppo_rlhf_*.py"))
examples = settings(deadline=None, derandomize=True, max_examples=50)
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
both = pytest.mark.parametrize("script", import_scripts("sppo_rlhf_*.py"))
# For what is the same text in both (test_siblings.py).
either = pytest.mark.parametrize("script", import_scripts("sppo_rlhf_*.py")[:1])


@pytest.fixture
def make_learner(assets):
    def make(script, **changes):
        args = script.Args(**tiny.flags(script.SCRIPT, assets) | changes)
        return script.Learner(args), args

    return make


@pytest.fixture
def scrambled(make_learner):
    """A learner whose trained parameters are not where they start: LoRA's B is not 0, the policy not the reference."""

    def make(script, **changes):
        learner, args = make_learner(script, **changes)
        tiny.randomize(trained(learner).items(), 0.1)
        return learner, args

    return make


def rewards(learner, texts):
    """Rewards of texts, each of which is a prompt of one word and a response."""
    prompts = [text.partition(" ")[0] for text in texts]
    return learner.reward(prompts, [text[len(p) :] for text, p in zip(texts, prompts)], [{}] * len(texts))


def half(review):
    """First half of a review's words."""
    return " ".join(review.split()[: len(review.split()) // 2])


def trained(learner):
    return {name: p for name, p in learner.actor_critic.named_parameters() if p.requires_grad}


def gradients(learner):
    return {name: p.grad.clone() for name, p in trained(learner).items()}


def assert_same_gradients(actual, expected, tolerance=1e-4):
    """Relative to each parameter's own gradient; what is 0 but for rounding counts against the whole."""
    assert actual.keys() == expected.keys()
    floor = 1e-6 * torch.stack([g.norm() for g in expected.values()]).norm()
    assert floor > 0
    for name in actual:
        assert (actual[name] - expected[name]).norm() <= tolerance * expected[name].norm() + floor, name


def backward(script, learner, rollout, args, rows=range(8)):
    learner.optimizer.zero_grad()
    losses = script.backward(learner, rollout, list(rows), args)
    return losses, gradients(learner)


def policy_of(learner):
    ac = learner.actor_critic
    return ac.switch_to("policy_adapter") if hasattr(ac, "switch_to") else ac.policy


def policy_logprobs(learner, prompt, response):
    """Log-probabilities of one response by one unpadded sequence."""
    logits = policy_of(learner)(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


def unpadded_values(script, learner, prompt, response):
    """Values of the states before each token of a response, by one unpadded sequence."""
    ac, tokens = learner.actor_critic, torch.tensor([prompt + response])
    if script is IMDB:
        hidden = ac.value_model(tokens).last_hidden_state[0]
    else:
        ac.adapters.set_adapter("value_adapter")
        ac.adapters.set_requires_grad(["policy_adapter", "value_adapter"])
        hidden = ac.lm.base_model(tokens).last_hidden_state[0]
    return ac.value_head(hidden[len(prompt) - 1 : -1]).squeeze(-1)


PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22]]
RESPONSES = [[30, 31, 32, 0], [0], [40, 41, 42, 43, 44, 45]]


# Padding and log-probabilities


def test_pad_puts_prompts_left_and_responses_right_of_one_column():
    tokens, mask, real = IMDB.pad([[5], [7, 8, 9]], [[1, 2], [4]], torch.device("cpu"))
    assert tokens.tolist() == [[0, 0, 5, 1, 2], [7, 8, 9, 4, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert real.tolist() == [[True, True], [True, False]]
    assert IMDB.run_network(lambda *_, position_ids, **__: position_ids, tokens, mask).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 3],
    ]


families = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.mark.parametrize(
    "script, model", [(IMDB, "gpt2"), (IMDB, "llama"), (TLDR, "gpt2"), *((TLDR, name) for name in tiny.FAMILIES)]
)
def test_padded_batch_has_the_logprobs_and_values_of_each_sequence_alone(script, model, scrambled, assets):
    """With the absolute positions of GPT-2 and the rotary ones of the others, which are blind to a common shift."""
    changes = {"policy": str(assets / model)}
    if (script, model) == (TLDR, "gpt2"):
        changes |= {"lora_targets": ("c_attn",), "reward_model": str(assets / "scalar")}
    elif script is TLDR:
        changes |= tiny.family(model, assets)
    learner, _ = scrambled(script, **changes)
    tokens, attention, mask = script.pad(PROMPTS, RESPONSES, learner.device)
    with torch.no_grad():
        logprob, values = learner.actor_critic(tokens, attention, 6)
        assert values.shape == (3, 6) and learner.actor_critic(tokens, attention, 6, 2)[1].shape == (2, 6)
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
            assert mask[i].sum() == len(response)
            assert_close(logprob[i][mask[i]], policy_logprobs(learner, prompt, response))
            assert_close(values[i][mask[i]], unpadded_values(script, learner, prompt, response))


def test_base_in_bfloat16_has_adapters_head_and_log_probabilities_in_float32(scrambled):
    learner, args = scrambled(TLDR, base_precision="bfloat16")
    ac = learner.actor_critic
    assert {p.dtype for n, p in ac.named_parameters() if "lora_" in n or "value_head" in n} == {torch.float32}
    assert {p.dtype for n, p in ac.named_parameters() if "lora_" not in n and "value_head" not in n} == {torch.bfloat16}
    rollout, _, _ = TLDR.rollout(learner, learner.rows[:8], args)
    losses, grads = backward(TLDR, learner, rollout, args)
    assert {x.dtype for x in (rollout.logprob, rollout.values, *grads.values())} == {torch.float32}
    assert losses["val/ratio"] == pytest.approx(1, abs=0.05) and all(g.any() for g in grads.values())


def test_imdb_in_bfloat16_has_weights_log_probabilities_and_values_in_float32(scrambled):
    learner, args = scrambled(IMDB, bfloat16=True)
    exact, _ = scrambled(IMDB)
    ac, (tokens, attention, mask) = learner.actor_critic, IMDB.pad(PROMPTS, RESPONSES, learner.device)
    with torch.no_grad():
        assert {m(tokens).logits.dtype for m in (ac.policy, learner.reference)} == {torch.bfloat16}
        for actual, expected in zip(ac(tokens, attention, 6), exact.actor_critic(tokens, attention, 6)):
            error = (actual - expected)[mask].abs()
            assert actual.dtype == torch.float32 and 0 < error.mean() < 0.05
    rollout, _, _ = IMDB.rollout(learner, learner.rows[:8], args)
    losses, grads = backward(IMDB, learner, rollout, args)
    assert {x.dtype for x in (*trained(learner).values(), *grads.values())} == {torch.float32}
    assert losses["val/ratio"] == pytest.approx(1, abs=0.05)
    fresh, args = scrambled(IMDB, bfloat16=True)
    fresh.actor_critic.policy.load_state_dict(fresh.reference.state_dict())
    assert IMDB.rollout(fresh, fresh.rows[:8], args)[1]["objective/kl"] == 0
    assert 1 < IMDB.evaluate(fresh, args)[0]["eval/perplexity"] < 1e4


@families
def test_gradient_checkpointing_computes_layers_again_with_their_adapter_and_changes_no_gradient(
    scrambled, assets, family
):
    gradients, calls = [], []
    for on in (False, True):
        learner, args = scrambled(TLDR, gradient_checkpointing=on, target_coef=0.1, **tiny.family(family, assets))
        rollout = tiny.fixed_rollout(TLDR, learner, args)
        (linear, *_) = (m for n, m in learner.actor_critic.lm.named_modules() if n.endswith(args.lora_targets))
        linear.register_forward_hook(lambda *_, on=on: calls.append(on))
        gradients.append(backward(TLDR, learner, rollout, args)[1])
    assert calls.count(True) == 2 * calls.count(False) == 12  # policy and value of three micro-batches
    assert_same_gradients(*gradients, tolerance=1e-6)


@both
def test_tf32_is_off_unless_asked_for(script, assets):
    flags = tiny.flags(script.SCRIPT, assets)
    for on in (True, False):
        script.Learner(script.Args(**flags, tf32=on))
        assert torch.backends.cuda.matmul.allow_tf32 == on


@pytest.mark.parametrize("double_quant", [True, False])
def test_base_in_4_bits_is_nf4_that_computes_in_bfloat16(monkeypatch, double_quant):
    seen = {}
    monkeypatch.setattr(TLDR, "load_network", lambda *a, **options: seen.update(options))
    flag = {} if double_quant else {"double_quant": False}
    TLDR.load_base(TLDR.Args(policy="base", **flag), torch.device("cuda", 3))
    config = seen["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.bnb_4bit_use_double_quant == double_quant
    assert seen["device_map"] == {"": torch.device("cuda", 3)} and seen["dtype"] == torch.bfloat16


@both
def test_what_stands_in_the_padding_changes_nothing(script, scrambled):
    learner, _ = scrambled(script)
    tokens, attention, mask = script.pad(PROMPTS, RESPONSES, learner.device)
    other = torch.where(attention.bool(), tokens, 77)
    assert not torch.equal(tokens, other)
    with torch.no_grad():
        expected, actual = (learner.actor_critic(t, attention, 6) for t in (tokens, other))
    for i in range(2):
        assert_close(actual[i][mask], expected[i][mask], rtol=0, atol=1e-6)


@either
def test_a_model_that_gives_the_logits_of_all_tokens_whatever_it_is_asked_for_is_as_good(script, assets):
    lm = AutoModelForCausalLM.from_pretrained(assets / "gpt2").eval()
    tokens, attention_mask, mask = script.pad(PROMPTS, RESPONSES, torch.device("cpu"))

    def all_logits(tokens, logits_to_keep, **options):
        return lm(tokens, **options)

    with torch.no_grad():
        expected, actual = (script.response_logprobs(m, tokens, attention_mask, 6) for m in (lm, all_logits))
    assert_close(actual[mask], expected[mask])


@either
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_left_padded_prompts_generate_what_each_generates_alone(script, model, assets):
    policy = AutoModelForCausalLM.from_pretrained(assets / model).eval()
    args = script.Args(top_k=1, response_length=8, min_response_length=0)
    policy.generation_config = script.generation_config(args, [0])
    generate = partial(script.generate, policy, sample=True)
    alone = [generate([prompt], batch_size=1)[0] for prompt in PROMPTS]
    assert generate(PROMPTS, batch_size=3) == alone == generate(PROMPTS, batch_size=2)
    assert len({tuple(response) for response in alone}) == 3


@either
@pytest.mark.parametrize("min_length", [0, 3])
def test_responses_end_with_the_first_end_token_and_only_there(script, make_learner, min_length):
    learner, args = make_learner(script, top_k=4, response_length=7, min_response_length=min_length)
    policy, counts = policy_of(learner), torch.zeros(learner.tokenizer.vocab_size)
    torch.manual_seed(0)
    for response in script.generate(policy, PROMPTS * 8, 24, sample=True):
        assert len(response) == 7 or response[-1] == 0
        counts[response] += 1
    end = counts[1:].argmax().item() + 1  # a token that is often sampled plays the end token
    policy.generation_config = script.generation_config(args, [end])
    responses = script.generate(policy, PROMPTS * 8, 24, sample=True)
    ended = [response[-1] == end for response in responses]
    assert 0 < sum(ended) < len(ended)
    for response, end_sampled in zip(responses, ended):
        assert end not in response[:-1]
        assert len(response) == 7 or end_sampled
        assert len(response) > min_length
    assert min_length < min(map(len, responses)) <= min_length + 2


@either
def test_sampling_is_among_top_k_and_log_probabilities_are_of_the_full_softmax(script, scrambled):
    learner, args = scrambled(script, top_k=2, num_trajectories=24)
    torch.manual_seed(0)
    rollout, _, _ = script.rollout(learner, learner.rows[:24], args)
    assert any(len(r) > 1 for r in rollout.responses)
    with torch.no_grad():
        for prompt, response, logprob in zip(rollout.prompts, rollout.responses, rollout.logprob):
            logits = policy_of(learner)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            ranks = (logits > logits.gather(-1, torch.tensor(response).unsqueeze(-1))).sum(-1)
            assert ranks.max() < 2
            full = logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)
            assert_close(logprob[: len(response)], full)


@either
def test_top_k_0_samples_among_all_tokens(script, make_learner):
    learner, _ = make_learner(script, top_k=0)
    policy = policy_of(learner)
    torch.manual_seed(0)
    responses = script.generate(policy, [[5]] * 64, 64, sample=True)
    with torch.no_grad():
        logits = policy(torch.tensor([[5]])).logits[0, -1]
    assert max((logits > logits[response[0]]).sum() for response in responses) > 60


@both
def test_ratio_is_1_before_the_first_step_although_dropout_is_configured(script, scrambled):
    learner, args = scrambled(script, target_coef=0.1, num_trajectories=24)
    config = policy_of(learner).config
    assert max(getattr(config, name, 0) for name in ("attn_pdrop", "resid_pdrop", "attention_dropout")) == 0.5
    rollout, _, _ = script.rollout(learner, learner.rows[:24], args)
    for rows in (range(12), range(12, 24)):
        losses, _ = backward(script, learner, rollout, args, rows)
        assert losses["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert abs(losses["policy/approxkl_avg"]) < 1e-9
        assert losses["policy/clipfrac_avg"] == losses["val/clipfrac_avg"] == 0
    with torch.no_grad():
        for row in range(24):
            expected = policy_logprobs(learner, rollout.prompts[row], rollout.responses[row])
            assert_close(rollout.logprob[row][rollout.mask[row]], expected)
            values = unpadded_values(script, learner, rollout.prompts[row], rollout.responses[row])
            assert_close(rollout.values[row][rollout.mask[row]], values)


@both
def test_no_module_is_ever_in_training_mode(script, make_learner):
    learner, args = make_learner(script)
    rollout, _, _ = script.rollout(learner, learner.rows[:8], args)
    backward(script, learner, rollout, args)
    script.evaluate(learner, args)
    models = [learner.model, *([learner.reference, learner.reward.model] if script is IMDB else [])]
    assert not any(module.training for model in models for module in model.modules())


# Rewards


@either
def test_token_rewards_by_hand(script):
    logprob = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 9.0], [-4.0, 9.0, 9.0]])
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-3.0, -1.0, 7.0], [-2.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    rewards = script.token_rewards(torch.tensor([10.0, 20.0, 30.0]), logprob, reference, mask, 0.1)
    assert_close(rewards, torch.tensor([[-0.05, 0.1, 10.0], [-0.2, 20.0, 0.0], [30.2, 0.0, 0.0]]))


@either
def test_score_is_on_the_last_real_token_also_of_an_empty_response_and_one_cut_off(script, scrambled, monkeypatch):
    learner, args = scrambled(script, gamma=1.0, gae_lambda=1.0, kl_coef=0.0)
    responses = [[30, 31, 0], [0], [40, 41, 42, 43, 44, 45], [50, 0]]
    monkeypatch.setattr(script, "generate", lambda *a, **k: responses)
    monkeypatch.setattr(learner, "reward", lambda *_: [1.0, 2.0, 3.0, 4.0])
    seen = {}
    token_rewards = script.token_rewards

    def spy(*inputs):
        seen["rewards"] = token_rewards(*inputs)
        return seen["rewards"]

    monkeypatch.setattr(script, "token_rewards", spy)
    rollout, metrics, _ = script.rollout(learner, learner.rows[:4], replace(args, num_trajectories=4))
    z = [0.0] * 6
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    assert_close(seen["rewards"], torch.tensor([[0, 0, 1, 0, 0, 0], [2, *z[1:]], [*z[1:], 3], [0, 4, *z[2:]]]).float())
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(1)
    assert_close(rollout.returns, torch.where(rollout.mask, scores, 0.0))  # gamma = lambda = 1: the sum of rewards
    assert_close(rollout.advantages, torch.where(rollout.mask, scores - rollout.values, 0.0))
    assert (rollout.values != 0).equal(rollout.mask) and (rollout.logprob != 0).equal(rollout.mask)
    assert metrics["objective/scores"] == metrics["objective/rlhf_reward"] == 2.5
    assert metrics["val/response_length"] == 3 and metrics["val/eos_rate"] == 0.75


@either
def test_empty_response_teaches(script, scrambled, monkeypatch):
    """A minibatch of nothing but immediate end tokens has a gradient that raises or lowers their probability."""
    learner, args = scrambled(script, norm_adv=False, vf_coef=0.0)
    monkeypatch.setattr(script, "generate", lambda *a, **k: [[0]] * 8)
    for score, sign in ((50.0, 1), (-50.0, -1)):
        monkeypatch.setattr(learner, "reward", lambda prompts, *_, score=score: [score] * len(prompts))
        rollout, _, _ = script.rollout(learner, learner.rows[:8], args)
        _, grads = backward(script, learner, rollout, args)
        prompts, before = rollout.prompts, rollout.logprob[:, 0].sum()
        with torch.no_grad():
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            for name, p in trained(learner).items():
                p -= 1e-2 * grads[name] / norm
            after = sum(policy_logprobs(learner, prompt, [0]).sum() for prompt in prompts)
        assert sign * (after - before) > 1e-3


@either
def test_metrics_of_a_rollout_are_means_over_trajectories(script, scrambled):
    learner, args = scrambled(script, num_trajectories=8, kl_coef=0.3)
    rollout, metrics, samples = script.rollout(learner, learner.rows[:8], args)
    kl = entropy = 0.0
    reference = AutoModelForCausalLM.from_pretrained(args.policy).eval()
    for prompt, response in zip(rollout.prompts, rollout.responses):
        with torch.no_grad():
            logprob = policy_logprobs(learner, prompt, response).sum().item()
            logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        kl += logprob - logits.gather(-1, torch.tensor(response).unsqueeze(-1)).sum().item()
        entropy -= logprob
    assert metrics["objective/kl"] == pytest.approx(kl / 8, rel=1e-4) and abs(kl) > 0.1
    assert metrics["objective/entropy"] == pytest.approx(entropy / 8, rel=1e-4)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.3 * kl / 8, rel=1e-4)
    total = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(total, rel=1e-4)
    assert metrics["val/response_length"] == np.mean([len(r) for r in rollout.responses])
    assert len(samples) == 4
    real_returns, errors = rollout.returns[rollout.mask], (rollout.returns - rollout.values)[rollout.mask]
    explained = 1 - np.var(errors.numpy(), ddof=1) / np.var(real_returns.numpy(), ddof=1)
    assert metrics["losses/explained_variance"] == pytest.approx(explained, rel=1e-4)


@either
def test_kl_charge_pulls_the_policy_back_to_the_reference(script, scrambled, monkeypatch):
    """With no score at all the exact KL divergence of the next token at the visited states falls."""
    changes = {"norm_adv": False, "vf_coef": 0.0, "kl_coef": 1.0, "gamma": 0.0, "top_k": 0, "learning_rate": 5e-3}
    learner, args = scrambled(script, num_trajectories=32, micro_batch_size=32, rollout_batch_size=32, **changes)
    reference = AutoModelForCausalLM.from_pretrained(args.policy).eval()
    monkeypatch.setattr(learner, "reward", lambda prompts, *_: [0.0] * len(prompts))

    def divergence(rollout):
        total = 0.0
        with torch.no_grad():
            for prompt, response in zip(rollout.prompts, rollout.responses):
                models = (reference, policy_of(learner))
                log_q, log_p = (m(torch.tensor([prompt + response])).logits[0].log_softmax(-1) for m in models)
                total += (log_p.exp() * (log_p - log_q))[len(prompt) - 1 : -1].sum().item()
        return total

    torch.manual_seed(0)
    for step in range(10):
        rollout, _, _ = script.rollout(learner, learner.rows[:32], args)
        if step == 0:
            first, before = rollout, divergence(rollout)
        rollout = rollout._replace(advantages=rollout.returns)  # without the noise of an untrained value model
        backward(script, learner, rollout, args, range(32))
        learner.optimizer.step()
    assert divergence(first) < 0.8 * before


# Advantages and losses


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    return mask, torch.randn(4, len(lengths), 6, generator=torch.Generator().manual_seed(seed)).double()


@either
@given(data=ragged(), gamma=st.sampled_from([1.0, 0.99, 0.5]), lam=st.sampled_from([0.0, 0.95, 1.0]))
@examples
def test_gae_is_the_sum_of_discounted_td_errors_up_to_the_last_real_token(script, data, gamma, lam):
    mask, (rewards, values, *_) = data
    advantages, returns = script.gae(torch.where(mask, rewards, 0.0), values, mask, gamma, lam)
    for i, length in enumerate(mask.sum(1).tolist()):
        V = [*values[i, :length].tolist(), 0.0]
        for t in range(length):
            deltas = [rewards[i, u].item() + gamma * V[u + 1] - V[u] for u in range(t, length)]
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[i, t].item() == pytest.approx(expected + V[t], abs=1e-9)
        assert not advantages[i, length:].any() and not returns[i, length:].any()


@either
@given(data=ragged())
@examples
def test_normalize_is_numpys_over_real_tokens_and_0_elsewhere(script, data):
    mask, (x, *_) = data
    actual = script.normalize(torch.where(mask, x, torch.nan), mask, lambda total: total)
    real = x[mask].numpy()
    std = real.std(ddof=1) if len(real) > 1 else 0.0
    np.testing.assert_allclose(actual[mask].numpy(), (real - real.mean()) / (std + 1e-8), atol=1e-9)
    assert not actual[~mask].any()


@either
@given(data=ragged(), clip_coef=st.sampled_from([0.1, 0.2, 1.0]))
@examples
def test_value_loss_is_half_the_mean_of_the_larger_squared_error(script, data, clip_coef):
    mask, (values, old_values, returns, _) = data
    losses = []
    for V, V_old, R in zip(*(x[mask].tolist() for x in (values, old_values, returns))):
        clipped = min(max(V, V_old - clip_coef), V_old + clip_coef)
        losses.append(0.5 * max((V - R) ** 2, (clipped - R) ** 2))
    actual = script.clipped_value_loss(values, old_values, returns, clip_coef, mask)
    assert actual.item() == pytest.approx(np.mean(losses), rel=1e-9)


@either
def test_value_loss_by_hand(script):
    values, old_values = torch.tensor([[1.0, 1.0, 3.0]]), torch.tensor([[0.5, 0.5, 9.0]])
    values.requires_grad_()
    returns, mask = torch.tensor([[2.0, 0.0, 9.0]]), torch.tensor([[True, True, False]])
    loss = script.clipped_value_loss(values, old_values, returns, 0.2, mask)
    assert_close(loss, torch.tensor(0.5 * ((0.7 - 2) ** 2 + 1.0) / 2))
    loss.backward()
    assert_close(values.grad, torch.tensor([[0.0, 0.5, 0.0]]))  # the first one is clipped: no gradient


def explicit_update(script, learner, rollout, args, rows):
    """Losses and gradients of a minibatch by a loop over unpadded sequences and the paper's formulas, Eq. 3, 8, 9.

    As in the scripts, the logged policy loss is without the reverse loss's constant, which has no gradient.
    """
    lengths = [len(rollout.responses[i]) for i in rows]
    A = torch.cat([rollout.advantages[i, :n] for i, n in zip(rows, lengths)])
    A_normalized = (A - A.mean()) / (A.std() + 1e-8) if args.norm_adv else A
    old_logprob = torch.cat([rollout.logprob[i, :n] for i, n in zip(rows, lengths)])
    old_values = torch.cat([rollout.values[i, :n] for i, n in zip(rows, lengths)])
    returns = torch.cat([rollout.returns[i, :n] for i, n in zip(rows, lengths)])
    pairs = [(rollout.prompts[i], rollout.responses[i]) for i in rows]
    logprob = torch.cat([policy_logprobs(learner, *pair) for pair in pairs])
    targets = [(rollout.prompts[i], rollout.targets[i]) for i in rows if rollout.targets[i]]
    target_logprob = torch.cat([policy_logprobs(learner, *pair) for pair in targets])
    values = torch.cat([unpadded_values(script, learner, *pair) for pair in pairs])

    pi, pi_old, eps = logprob.exp(), old_logprob.exp(), args.clip_coef
    ratio, clipped = pi / pi_old, (pi / pi_old).clamp(1 - eps, 1 + eps)
    L_ppo = -torch.min(ratio * A_normalized, clipped * A_normalized).mean()
    has_gradient = torch.where(A_normalized > 0, ratio < 1 + eps, ratio > 1 - eps)
    L_rppo = (-A_normalized * args.Z * (1 - pi) / pi_old * has_gradient).mean()
    policy_loss = args.alpha * L_ppo + args.beta * L_rppo
    clipped_values = old_values + (values - old_values).clamp(-args.clip_coef_value, args.clip_coef_value)
    value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped_values - returns) ** 2).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.target_coef * target_logprob.mean()
    learner.optimizer.zero_grad()
    loss.backward()
    losses = {
        "loss/policy_avg": args.alpha * L_ppo + args.beta * (A_normalized * args.Z * ratio * has_gradient).mean(),
        "loss/value_avg": value_loss,
        "loss/target_avg": -target_logprob.mean() * (args.target_coef > 0),
        "policy/approxkl_avg": (ratio - 1 - ratio.log()).mean(),
        "policy/clipfrac_avg": ((ratio < 1 - eps) | (ratio > 1 + eps)).float().mean(),
        "val/clipfrac_avg": ((values - old_values).abs() > args.clip_coef_value).float().mean(),
        "val/ratio": ratio.mean(),
        "losses/sign_flips": (A.sign() != A_normalized.sign()).float().mean(),
    }
    return {tag: value.item() for tag, value in losses.items()}, gradients(learner)


UPDATES = {
    "defaults": {},
    "plain PPO": {"alpha": 1.0, "beta": 0.0},
    "strong reverse loss": {"alpha": 0.5, "beta": 20.0, "Z": -0.5},
    "target": {"target_coef": 0.7},
    "advantages as they are": {"norm_adv": False},
    "other clip ranges": {"clip_coef": 0.1, "clip_coef_value": 0.4, "vf_coef": 1.5},
}


@pytest.mark.parametrize(
    "script, kind", [*((IMDB, kind) for kind in UPDATES), (TLDR, "strong reverse loss"), (TLDR, "target")]
)
def test_gradients_of_a_minibatch_are_those_of_unpadded_sequences_and_the_papers_formulas(script, scrambled, kind):
    learner, args = scrambled(script, **UPDATES[kind])
    rollout, rows = tiny.fixed_rollout(script, learner, args), [6, 0, 3, 4, 5, 7, 1]
    expected_losses, expected = explicit_update(script, learner, rollout, args, rows)
    losses, actual = backward(script, learner, rollout, args, rows)
    assert_same_gradients(actual, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-4, abs=1e-6)
    assert 0 < losses["policy/clipfrac_avg"] < 1 and 0 < losses["val/clipfrac_avg"] < 1
    assert (losses["losses/sign_flips"] > 0) == args.norm_adv


@pytest.mark.parametrize("script, target_coef", [(IMDB, 0.0), (IMDB, 0.5), (TLDR, 0.5)])
def test_micro_batches_have_the_gradient_of_the_whole_batch(script, scrambled, target_coef):
    learner, args = scrambled(script, target_coef=target_coef)
    rollout = tiny.fixed_rollout(script, learner, args)
    expected_losses, expected = backward(script, learner, rollout, replace(args, micro_batch_size=8))
    for size in (1, 3):
        losses, actual = backward(script, learner, rollout, replace(args, micro_batch_size=size))
        assert_same_gradients(actual, expected)
        assert losses == pytest.approx(expected_losses, rel=1e-4, abs=1e-6)


@either
def test_batches_of_a_rollout_have_the_results_of_the_whole_batch_and_like_lengths(script, scrambled, monkeypatch):
    learner, args = scrambled(script)
    answers = tiny.responses(8, args.response_length, learner.tokenizer.vocab_size)
    monkeypatch.setattr(script, "generate", lambda *a, **k: answers)
    one, _, _ = script.rollout(learner, learner.rows[:8], replace(args, rollout_batch_size=1))
    all_, _, _ = script.rollout(learner, learner.rows[:8], replace(args, rollout_batch_size=8))
    pad, padded = script.pad, []
    monkeypatch.setattr(
        script, "pad", lambda *inputs: (padded.append(inputs[:2]) if inputs[0][0] else None) or pad(*inputs)
    )
    script.rollout(learner, learner.rows[:8], replace(args, micro_batch_size=1, rollout_batch_size=3))
    lengths = [[len(p) + len(r) for p, r in zip(*batch)] for batch in padded if batch[1][0]]
    assert [len(batch) for batch in lengths] == [3, 3, 2] and [*chain(*lengths)] == sorted(chain(*lengths))
    for name in ("mask", "logprob", "values", "advantages", "returns"):
        assert_close(getattr(one, name), getattr(all_, name), rtol=1e-4, atol=1e-4)


# Networks


@both
def test_policy_and_value_model_learn_and_nothing_else_changes(script, make_learner):
    learner, args = make_learner(script, target_coef=0.1)
    ac = learner.actor_critic
    frozen = {n: p.clone() for n, p in ac.named_parameters() if not p.requires_grad}
    if script is IMDB:
        frozen |= {f"reference.{n}": p.clone() for n, p in learner.reference.named_parameters()}
        frozen |= {f"reward.{n}": p.clone() for n, p in learner.reward.model.named_parameters()}
    else:
        assert all(
            ".policy_adapter." in n or ".value_adapter." in n or n.startswith("value_head") for n in trained(learner)
        )
    before = {n: p.detach().clone() for n, p in trained(learner).items()}
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        rollout, _, _ = script.rollout(learner, learner.rows[:8], args)
        _, grads = backward(script, learner, rollout, args)
        learner.optimizer.step()
    assert all(g.any() for g in grads.values())
    assert all(not torch.equal(before[n], p) for n, p in trained(learner).items())
    now = dict(ac.named_parameters())
    if script is IMDB:
        now |= {f"reference.{n}": p for n, p in learner.reference.named_parameters()}
        now |= {f"reward.{n}": p for n, p in learner.reward.model.named_parameters()}
    assert len(frozen) > 20 and all(torch.equal(now[n], p) for n, p in frozen.items())


@families
def test_reward_and_reference_of_tldr_are_those_of_the_base_while_the_adapters_learn(scrambled, assets, family):
    learner, args = scrambled(TLDR, **tiny.family(family, assets))
    ac, base = learner.actor_critic, AutoModelForCausalLM.from_pretrained(assets / family).eval()
    scores = rewards(learner, ["the movie", "was good to watch"])
    tokens, attention, _ = TLDR.pad(PROMPTS, RESPONSES, learner.device)
    for active in ("policy_adapter", "value_adapter", "reward_adapter"):
        ac.switch_to(active)
        with torch.no_grad():
            actual = learner.reference_logprobs(tokens, attention, 6)
            expected = TLDR.response_logprobs(base, tokens, attention, 6)
            policy, _ = ac(tokens, attention, 6)
        assert_close(actual, expected, rtol=0, atol=1e-6)
        assert (policy - expected).abs().max() > 0.1
    tiny.randomize(trained(learner).items(), 0.1)
    assert rewards(learner, ["the movie", "was good to watch"]) == scores
    for name, p in base.named_parameters():
        for target in args.lora_targets:
            name = name.replace(target, f"{target}.base_layer")
        name = f"lm.{name}"
        assert torch.equal(dict(ac.named_parameters())[name], p), name


def test_rollout_of_tldr_charges_the_kl_against_the_base(scrambled, assets, monkeypatch):
    learner, args = scrambled(TLDR)
    seen = {}
    monkeypatch.setattr(TLDR, "token_rewards", lambda s, logprob, ref, *rest: seen.update(ref=ref) or 0 * ref)
    rollout, _, _ = TLDR.rollout(learner, learner.rows[:8], args)
    base = AutoModelForCausalLM.from_pretrained(assets / "llama").eval()
    tokens, attention, mask = TLDR.pad(rollout.prompts, rollout.responses, learner.device)
    with torch.no_grad():
        expected = TLDR.response_logprobs(base, tokens, attention, mask.shape[1])
    assert_close(seen["ref"][rollout.mask], expected[mask])


def test_policy_and_value_adapters_of_tldr_do_not_touch_each_other(scrambled):
    learner, _ = scrambled(TLDR)
    tokens, attention, mask = TLDR.pad(PROMPTS, RESPONSES, learner.device)

    def outputs():
        with torch.no_grad():
            logprob, values = learner.actor_critic(tokens, attention, 6)
        return logprob[mask], values[mask]

    for adapter, changes in (
        (".policy_adapter.", (True, False)),
        (".value_adapter.", (False, True)),
        ("value_head", (False, True)),
    ):
        before = outputs()
        tiny.randomize([(n, p) for n, p in trained(learner).items() if adapter in n], 0.3)
        assert tuple(not torch.equal(a, b) for a, b in zip(before, outputs())) == changes


def test_networks_of_imdb_start_from_the_policy_and_share_nothing(make_learner, assets):
    learner, _ = make_learner(IMDB)
    networks = [learner.actor_critic.policy, learner.actor_critic.value_model, learner.reference]
    storages = [{p.data_ptr() for p in network.parameters()} for network in networks]
    assert not storages[0] & storages[1] and not storages[0] & storages[2] and not storages[1] & storages[2]
    start = AutoModel.from_pretrained(assets / "gpt2").state_dict()
    for network in (networks[0].transformer, networks[1], networks[2].transformer):
        assert all(torch.equal(network.state_dict()[name], x) for name, x in start.items())
    assert not any(p.requires_grad for p in learner.reference.parameters())


@both
def test_rollout_scores_what_the_policy_saw_and_discounts_as_told(script, make_learner, monkeypatch):
    learner, args = make_learner(script, prompt_length=4, gamma=0.9, gae_lambda=0.5)
    gae, reward, decode = script.gae, learner.reward, partial(learner.tokenizer.decode, skip_special_tokens=True)
    told, scored = [], []
    monkeypatch.setattr(script, "gae", lambda *inputs: told.append(inputs[-2:]) or gae(*inputs))
    learner.reward = lambda *inputs: scored.append(inputs) or reward(*inputs)
    rows = learner.rows[:8]
    trajectories, _, _ = script.rollout(learner, rows, args)
    prompts, responses, scored_rows = scored[0]
    assert told == [(0.9, 0.5)] and len(scored) == 1 and scored_rows == rows
    texts = [p + r if script is IMDB else f"{p} {r.strip()}" for p, r in zip(prompts, responses, strict=True)]
    for text, row, prompt, response in zip(texts, rows, trajectories.prompts, trajectories.responses):
        if script is IMDB:
            assert text == decode(prompt + response)
            assert len(prompt) == 4 and half(row["text"]).endswith(decode(prompt)) and row["text"] not in text
        else:
            assert text == f"{decode(prompt)} {decode(response).strip()}"
            assert row["prompt"].startswith(decode(prompt[:4])) and row["prompt"].split("TL;DR:")[0] not in text


@either
def test_updates_have_prompts_of_their_own_and_gradients_that_are_clipped_together(
    script, make_learner, monkeypatch, tmp_path
):
    learner, args = make_learner(script, max_grad_norm=1e-3, num_updates=2)
    rollout, step = script.rollout, learner.optimizer.optimizer.step
    seen, norms = [], []

    def spy(*inputs, **options):
        grads = [p.grad for group in learner.optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads if g is not None]).norm().item())
        return step(*inputs, **options)

    monkeypatch.setattr(
        script, "rollout", lambda learner, rows, args: seen.append(rows) or rollout(learner, rows, args)
    )
    learner.optimizer.optimizer.step = spy
    args = replace(args, run_dir=str(tmp_path / "run"))
    run = script.Run(args, learner)
    run.log(0, script.evaluate(learner, args)[0])
    script.train(args, learner, run)
    rows = learner.rows
    assert seen == [[rows[i] for i in script.prompt_indices(len(rows), update, 8, args.seed)] for update in (0, 1)]
    assert seen[0] != seen[1]
    assert norms == pytest.approx([1e-3] * 8, rel=0.01)


@both
def test_the_optimizer_has_the_papers_settings(script, make_learner):
    learner, args = make_learner(script, weight_decay=0.25)
    groups, names = learner.optimizer.param_groups, {id(p): name for name, p in trained(learner).items()}
    assert [(g["lr"], g["eps"]) for g in groups] == [(args.learning_rate, 1e-5)] * 2
    decay = {names.pop(id(p)): g["weight_decay"] for g in groups for p in g["params"]}
    assert not names and set(decay.values()) == {0.0, 0.25}
    for name, x in decay.items():  # as in the authors' files
        assert x == (0.0 if name.endswith("bias") or ".ln_" in name else 0.25), name


@both
def test_same_seed_same_networks_another_seed_another_value_head(script, make_learner):
    first, again, other = (trained(make_learner(script, seed=seed)[0]) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["value_head.weight"], other["value_head.weight"])


# Reward models


def test_classifier_of_imdb_gives_the_probability_of_its_positive_label(make_learner, assets):
    learner, _ = make_learner(IMDB, rollout_batch_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(assets / "sentiment").eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "sentiment")
    texts = ["the movie was good", "so bad", "the cast was a pain to watch again", "all fine", "x" * 300 + " the plot"]
    with torch.no_grad():
        tokens = [tokenizer(text).input_ids[-64:] for text in texts]  # label 0 is POSITIVE; of a long text its end
        expected = [model(torch.tensor([t])).logits.softmax(-1)[0, 0].item() for t in tokens]
    assert rewards(learner, texts) == pytest.approx(expected, abs=1e-5)


def test_classifier_of_tldr_gives_its_logit(make_learner, assets):
    learner, _ = make_learner(TLDR, rollout_batch_size=2, reward_model=str(assets / "scalar"))
    model = AutoModelForSequenceClassification.from_pretrained(assets / "scalar").eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "scalar")
    texts = ["the movie was good", "so bad", "the cast was a pain to watch again", "all fine", "x" * 300 + " the plot"]
    with torch.no_grad():
        tokens = [tokenizer(text).input_ids[-64:] for text in texts]
        expected = [model(torch.tensor([t])).logits[0, 0].item() for t in tokens]
    assert rewards(learner, texts) == pytest.approx(expected, abs=1e-5)


def test_classifier_on_pythia_gives_its_logit_on_the_end_token(make_learner, assets):
    changes = {"reward_model": str(assets / "neox-reward"), "reward_end": "<|endoftext|>", "rollout_batch_size": 2}
    learner, _ = make_learner(TLDR, **tiny.family("neox", assets) | changes)
    options = {"dtype": torch.float32}  # it is stored in bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(assets / "neox-reward", **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "neox-reward")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = ["the movie was good", "so bad", "the cast was a pain to watch again again"]
    with torch.no_grad():
        tokens = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
        hidden = [model.gpt_neox(torch.tensor([t])).last_hidden_state[0, -1] for t in tokens]
        expected = [model.score(h).item() for h in hidden]
    assert rewards(learner, texts) == pytest.approx(expected, abs=1e-5) and np.std(expected) > 0.01


@either
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_classifiers_that_name_no_token_to_pad_with(script, assets, make_learner, tmp_path, family):
    """GPT-2 takes several texts only if its configuration has one; Bloom has no limit of positions."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2")
    assert tokenizer.pad_token is None
    labels = ["POSITIVE", "NEGATIVE"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if family == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, **names)
        model = GPT2ForSequenceClassification(config)
    else:
        config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2, **names)
        model = BloomForSequenceClassification(config)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    learner, _ = make_learner(script, reward_model=str(tmp_path / "classifier"))
    texts = ["very good", "the plot was a pain to watch", "a fine cast"]
    assert rewards(learner, texts) == pytest.approx([rewards(learner, [text])[0] for text in texts], abs=1e-5)


@families
def test_adapter_reward_is_its_head_on_the_end_token_with_only_that_adapter(scrambled, assets, family):
    learner, args = scrambled(TLDR, rollout_batch_size=2, **tiny.family(family, assets))
    base = AutoModel.from_pretrained(assets / family)
    weights = load_file(Path(args.reward_model) / "adapter_model.safetensors")
    (head,) = (x for name, x in weights.items() if "score" in name)
    config = json.loads((Path(args.reward_model) / "adapter_config.json").read_text())
    modules = dict(base.named_modules())
    for name, A in weights.items():  # W + B A alpha / r, by hand
        if "lora_A" in name:
            prefix = f"base_model.model.{learner.actor_critic.lm.base_model_prefix}."
            linear = modules[name.removeprefix(prefix).removesuffix(".lora_A.weight")]
            B = weights[name.replace("lora_A", "lora_B")]
            linear.weight.data += B @ A * config["lora_alpha"] / config["r"]
    texts = ["the movie was good", "so bad", "the cast was a pain to watch again", "all fine"]
    with torch.no_grad():
        tokens = [learner.tokenizer(f"<|startoftext|>{text}").input_ids + [0] for text in texts]
        expected = [(base.eval()(torch.tensor([t])).last_hidden_state[0, -1] @ head[0]).item() for t in tokens]
    assert np.std(expected) > 0.05
    assert rewards(learner, texts) == pytest.approx(expected, abs=1e-4)
    learner.actor_critic.switch_to("value_adapter")
    assert rewards(learner, texts) == pytest.approx(expected, abs=1e-4)


def test_adapter_reward_of_a_long_text_is_that_of_its_end(make_learner):
    learner, _ = make_learner(TLDR)
    read = []
    room = learner.actor_critic.lm.config.max_position_embeddings
    hidden = learner.actor_critic.hidden

    def spy(adapter, tokens, mask):
        read.append(tokens[mask.bool()].tolist())
        return hidden(adapter, tokens, mask)

    learner.actor_critic.hidden = spy
    short, long = "a summary", "the movie was good " * room + "a summary"
    scores = rewards(learner, [short, long])
    tokens = [
        [*learner.tokenizer(f"<|startoftext|>{x}").input_ids, learner.tokenizer.eos_token_id] for x in (short, long)
    ]
    assert len(tokens[0]) < room < len(tokens[1])
    assert [*chain(*read)] == tokens[0] + tokens[1][-room:]
    assert len(scores) == 2 and scores[0] == pytest.approx(rewards(learner, [short])[0], abs=1e-5)


def test_checkpoint_of_tldr_holds_both_adapters_whichever_was_used_last(scrambled, tmp_path):
    learner, args = scrambled(TLDR)
    expected = {name: p.detach().clone() for name, p in trained(learner).items()}
    run = TLDR.Run(replace(args, run_dir=str(tmp_path)), learner)
    for use in ("policy_adapter", "value_adapter", "reward_adapter"):
        learner.actor_critic.switch_to(use)
        run.save()
        state = torch.load(tmp_path / "checkpoint.pt")["model"]
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_adapter_reward_adds_the_bias_of_its_head(make_learner, assets, tmp_path):
    weights = load_file(assets / "adapter" / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.score.bias": torch.tensor([3.5])}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((assets / "adapter" / "adapter_config.json").read_text())
    with_bias, without = (make_learner(TLDR, **c)[0] for c in ({"reward_model": str(tmp_path)}, {}))
    texts = ["the movie was good", "so bad"]
    assert rewards(with_bias, texts) == pytest.approx([score + 3.5 for score in rewards(without, texts)], abs=1e-5)


def test_adapter_reward_that_holds_its_head_twice_has_the_trained_one(make_learner, assets, tmp_path):
    folder = Path(shutil.copytree(assets / "adapter", tmp_path / "twice"))
    weights = load_file(folder / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    weights |= {
        f"base_model.model.score.{x}.weight": head * i for i, x in enumerate(("original_module", "modules_to_save"))
    }
    save_file(weights, folder / "adapter_model.safetensors")
    twice, once = (make_learner(TLDR, **c)[0] for c in ({"reward_model": str(folder)}, {}))
    assert rewards(twice, ["the movie was good"]) == rewards(once, ["the movie was good"]) != [0.0]


def test_no_adapter_is_mistaken_for_a_module_of_the_model(scrambled, assets, tmp_path):
    """Bert's attention has a module "value"."""
    config = BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    changes = {"tokenizer": str(assets / "llama"), "lora_targets": ("query", "value")}
    changes |= {"policy": str(tmp_path / "bert"), "reward_model": str(assets / "scalar")}
    learner, args = scrambled(TLDR, **changes)
    (tmp_path / "run").mkdir()
    TLDR.Run(replace(args, run_dir=str(tmp_path / "run")), learner).save_policy()
    saved = load_file(tmp_path / "run" / "policy" / "adapter_model.safetensors")
    assert len(saved) == 4 == sum("policy" in name for name in trained(learner))  # A and B of query and value


def adapter_without_head(assets, folder):
    tiny.reward_adapter(AutoModelForCausalLM.from_pretrained(assets / "llama").config, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: x for n, x in weights.items() if "lora" in n}, folder / "adapter_model.safetensors")


def adapter_for_another_llama(assets, folder, **changes):
    tiny.reward_adapter(tiny.llama_config(300, **changes), folder)


WRONG_ADAPTERS = {
    "no head": adapter_without_head,
    "another hidden size": partial(adapter_for_another_llama, hidden_size=24),
    "more layers": partial(adapter_for_another_llama, num_hidden_layers=3),
    "fewer layers": partial(adapter_for_another_llama, num_hidden_layers=1),
    "other heads": partial(adapter_for_another_llama, num_key_value_heads=2),
    "other modules": lambda assets, folder: (
        adapter_for_another_llama(assets, folder),
        (folder / "adapter_config.json").write_text(
            json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]})
        ),
    ),
    "no weights": lambda assets, folder: (
        adapter_for_another_llama(assets, folder),
        (folder / "adapter_model.safetensors").unlink(),
    ),
}


@pytest.mark.parametrize("kind", WRONG_ADAPTERS)
def test_reward_adapter_that_does_not_fit_is_refused(make_learner, assets, tmp_path, ends_with, kind):
    WRONG_ADAPTERS[kind](assets, tmp_path / "wrong")
    with ends_with(r"--reward-model .*wrong"):
        make_learner(TLDR, reward_model=str(tmp_path / "wrong"))


# Evaluation


def brute_force_perplexity(model, tokens, stride):
    losses = []
    for t in range(1, len(tokens)):
        start = max(0, t // stride * stride - stride)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:t]])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[tokens[t]].item())
    return math.exp(np.mean(losses))


@either
def test_perplexity_is_that_of_strides_with_as_many_tokens_before_them(script, scrambled):
    learner, _ = scrambled(script)
    policy = policy_of(learner)
    stride = policy.config.max_position_embeddings // 2
    for texts in (
        tiny.REVIEWS[:8],
        tiny.REVIEWS[8:11],
        ["x" * (stride + 1)],
        ["x" * stride],
        ["x" * (stride - 1)],
        ["xx"],
    ):
        tokens = learner.tokenizer("\n\n".join(texts)).input_ids
        expected = brute_force_perplexity(policy, tokens, stride)
        assert script.perplexity(learner, policy, texts) == pytest.approx(expected, rel=1e-5)


@either
def test_context_of_perplexity_is_positions_minus_stride_up_to_gpt_js(script, make_learner, monkeypatch):
    learner, _ = make_learner(script)
    windows, policy, logprobs = [], policy_of(learner), torch.zeros(1, 512)
    monkeypatch.setattr(script, "response_logprobs", lambda lm, x, mask, n: windows.append((x.shape[1], n)) or logprobs)
    for room, context in ((1024, 512), (1100, 588), (2048, 1536), (8192, 1536)):
        windows.clear()
        policy.config.n_positions = room
        script.perplexity(learner, policy, ["x" * 4097])
        starts = range(0, 4096, 512)
        assert windows == [(min(start, context) + 512, 512 - (start == 0)) for start in starts] + [(1 + context, 1)]


@either
def test_perplexity_of_a_short_text_is_the_models_own_loss(script, scrambled):
    learner, _ = scrambled(script)
    tokens = torch.tensor([learner.tokenizer("the movie was\n\nfine to watch").input_ids])
    assert tokens.shape[1] < 20
    loss = policy_of(learner)(tokens, labels=tokens).loss.item()
    assert script.perplexity(learner, policy_of(learner), ["the movie was", "fine to watch"]) == pytest.approx(
        math.exp(loss), rel=1e-5
    )


def lengths_as_rewards(script, sign, seen):
    """A reward that puts the texts it reads into seen."""

    def reward(prompts, responses, rows):
        pairs = zip(prompts, responses, strict=True)
        seen.append([f"{p} {r.strip()}" if script is TLDR else p + r for p, r in pairs])
        assert len(rows) == len(prompts)
        return [sign * len(text) for text in seen[-1]]

    return reward


def test_evaluation_of_imdb_scores_the_full_first_half_and_the_continuation(scrambled, monkeypatch):
    learner, args = scrambled(IMDB, eval_samples=5)
    seen, tokenizer = [], learner.tokenizer
    monkeypatch.setattr(learner, "reward", lengths_as_rewards(IMDB, 1.0, seen))
    monkeypatch.setattr(IMDB, "generate", lambda *_, sample: [tokenizer(" great cast").input_ids] * 5)
    metrics, samples = IMDB.evaluate(learner, args)
    reviews = [json.loads(line)["text"] for line in (Path(args.dataset) / "validation.jsonl").open()][:5]
    halves = [" ".join(review.split()[: len(review.split()) // 2]) for review in reviews]
    responses, references, empty, cut = seen
    assert responses == [half + " great cast" for half in halves] and references == reviews and empty == halves
    assert all(len(half) < len(text) < len(half + " great cast") for half, text in zip(halves, cut))
    assert metrics["eval/score"] == np.mean([len(text) for text in responses])
    assert metrics["eval/empty_wins"] == metrics["eval/truncated_wins"] == 0
    assert [sample["index"] for sample in samples] == list(range(5))
    for sample, half, review in zip(samples, halves, reviews):
        assert sample["prompt"] == half and sample["response"] == " great cast"
        assert sample["prompt"] + sample["reference"] == review


def test_evaluation_of_tldr_is_greedy_and_has_rouge(scrambled, monkeypatch):
    learner, args = scrambled(TLDR, eval_samples=5)
    rows = learner.validation[:5]
    seen, generate = [], TLDR.generate
    monkeypatch.setattr(learner, "reward", lengths_as_rewards(TLDR, -1.0, seen))
    monkeypatch.setattr(TLDR, "generate", lambda *a, sample: seen.append(sample) or generate(*a, sample=sample))
    torch.manual_seed(0)
    first, samples = TLDR.evaluate(learner, args)
    sampled, responses, references, empty, cut = seen
    labels = [row["label"].strip() for row in rows]  # of the evaluated posts alone, as in the authors' runs
    expected = TLDR.perplexity(learner, policy_of(learner), labels)
    assert first["eval/perplexity"] == pytest.approx(expected, rel=1e-5)
    assert not sampled and len(learner.validation) == 8
    posts = [learner.tokenizer.decode(p) for p in TLDR.encode_prompts(learner.tokenizer, rows, args.prompt_length)]
    assert empty == [post + " " for post in posts]
    assert references == [f"{post} {row['label'].strip()}" for post, row in zip(posts, rows)]
    assert all(len(post) < len(text) for post, text in zip(posts, responses))
    assert all(len(a) < len(b) for a, b in zip(cut, responses))
    assert first["eval/empty_wins"] == first["eval/truncated_wins"] == 1
    assert TLDR.evaluate(learner, replace(args, seed=9))[1] == samples
    labels = [row["label"] for row in rows]
    monkeypatch.setattr(TLDR, "decode", lambda learner, prompts, _: [labels[0].upper()] * len(prompts))
    metrics, samples = TLDR.evaluate(learner, args)
    assert samples[0]["rougeL"] == samples[0]["rouge1"] == samples[0]["rouge2"] == 1
    assert metrics["eval/rouge1"] == pytest.approx(np.mean([sample["rouge1"] for sample in samples]))
    assert 0 < metrics["eval/rouge2"] < metrics["eval/rouge1"] < 1


# Data


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
@examples
def test_prompts_come_once_per_epoch_in_an_order_that_depends_on_seed_and_update_only(num_prompts, size, seed):
    for script in (IMDB, TLDR):
        updates = [script.prompt_indices(num_prompts, update, size, seed) for update in range(3 * num_prompts)]
        assert all(len(indices) == size for indices in updates)
        order = np.concatenate(updates).tolist()
        epochs = [order[i : i + num_prompts] for i in range(0, len(order) - num_prompts + 1, num_prompts)]
        assert len(epochs) >= 3 and all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
        assert np.array_equal(updates[-1], script.prompt_indices(num_prompts, 3 * num_prompts - 1, size, seed))
    if num_prompts > 10:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
        other = script.prompt_indices(num_prompts, 0, num_prompts, seed + 1).tolist()
        assert other != script.prompt_indices(num_prompts, 0, num_prompts, seed).tolist()


def test_prompt_of_imdb_is_the_first_half_of_the_words_cut_off_at_its_left(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2")
    review = "the movie was good and the plot was dull"
    tokens = tokenizer(review).input_ids
    rows = [{"text": f"{review} and what  comes later\nis the other half now"}, {"text": "the movie"}]
    short, long = (IMDB.make_examples(tokenizer, rows, IMDB.Args(prompt_length=length)) for length in (3, 50))
    assert short.prompts == [tokens[-3:], tokens[:1]] and long.prompts == [tokens, tokens[:1]]
    assert short.seen == [tokenizer.decode(tokens[-3:]), "the"] and long.seen == [review, "the"]
    assert short.whole == long.whole == [review, "the"]
    assert long.references == [" and what comes later is the other half now", " movie"]


def test_prompt_of_tldr_is_the_post_cut_off_at_its_end_and_tldr(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "llama")
    end = tokenizer("\nTL;DR:").input_ids
    posts = ["the movie was good and the plot was dull", "fine", ""]
    rows = [{"prompt": f" {post} \nTL;DR: "} for post in posts]
    tokens = [tokenizer(post).input_ids for post in posts]
    assert TLDR.encode_prompts(tokenizer, rows, 50) == [t + end for t in tokens]
    assert TLDR.encode_prompts(tokenizer, rows, 3) == [t[:3] + end for t in tokens]
    assert TLDR.encode_prompts(tokenizer, [{"prompt": "fine"}], 3) == [tokens[1] + end]
    middle = "my TL;DR: was good"  # which is a part of the post
    assert TLDR.encode_prompts(tokenizer, [{"prompt": f"{middle}\nTL;DR:"}], 50) == [tokenizer(middle).input_ids + end]
    chat = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    tokenizer.chat_template = chat
    before, after = (tokenizer(text).input_ids for text in ("<u>In short\n\n", "</u><a>"))
    assert TLDR.encode_prompts(tokenizer, rows, 3, "In short") == [before + t[:3] + after for t in tokens]
    before = tokenizer("<u>As in\nTL;DR: so\n\n").input_ids  # the same mark in the instruction
    assert TLDR.encode_prompts(tokenizer, rows, 3, "As in\nTL;DR: so") == [before + t[:3] + after for t in tokens]
    args = TLDR.Args(target_coef=0.1, response_length=3, instruction="In short")
    examples = TLDR.make_examples(tokenizer, [{"prompt": "fine", "label": "\n the plot was dull "}], args)
    assert examples.targets == [tokenizer(" the plot was dull").input_ids[:3]]
    assert examples.seen == examples.whole == ["fine\nTL;DR:"] and examples.references == ["the plot was dull"]


def test_targets_are_the_first_tokens_of_the_review_or_of_the_human_summary(make_learner):
    for script, column in ((IMDB, "text"), (TLDR, "label")):
        learner, args = make_learner(script, target_coef=0.1)
        rows = [json.loads(line) for line in (Path(args.dataset) / "train.jsonl").open()][:8]
        rollout, _, _ = script.rollout(learner, learner.rows[:8], args)
        end = [learner.tokenizer.eos_token_id] if script is TLDR else []  # a summary ends, a review goes on
        assert rollout.targets == [(learner.tokenizer(row[column]).input_ids + end)[:6] for row in rows]
        assert script is IMDB or any(target[-1] == end[0] for target in rollout.targets)
        assert script.rollout(learner, learner.rows[:8], replace(args, target_coef=0.0))[0].targets == [[]] * 8


@both
def test_targets_have_no_token_that_begins_texts(script, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2")
    plain = tokenizer(" the plot was good").input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    assert tokenizer(" the plot was good").input_ids == [tokenizer.eos_token_id, *plain]
    row = {"text": " the plot was good", "prompt": "", "label": "the plot was good"}
    short, long = (
        script.make_examples(tokenizer, [row], script.Args(target_coef=0.1, response_length=length)).targets
        for length in (3, 99)
    )
    assert short == [plain[:3]] and long == [plain + ([tokenizer.eos_token_id] if script is TLDR else [])]


@either
def test_tokenizer_of_the_policy_may_come_from_elsewhere(script, assets, make_learner, tmp_path, ends_with):
    name = Path(tiny.flags(script.SCRIPT, assets)["policy"]).name
    shutil.copytree(assets / name, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with ends_with(r"--policy .*bare (has no tokenizer|cannot be loaded)"):
        make_learner(script, policy=str(tmp_path / "bare"))
    learner, _ = make_learner(script, policy=str(tmp_path / "bare"), tokenizer=str(assets / name))
    assert len(learner.tokenizer) == policy_of(learner).config.vocab_size
    with ends_with("--tokenizer missing cannot be loaded"):
        make_learner(script, tokenizer="missing")
    assert script.TOKENIZERS.keys() == {script.Args().policy}


@either
def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(
    script, assets, make_learner, tmp_path, monkeypatch, ends_with
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    flags = tiny.flags(script.SCRIPT, assets)
    folder = Path(shutil.copytree(flags["policy"], tmp_path / "policy"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with ends_with(r"--policy .*contains custom code"):
        make_learner(script, policy=str(folder))
    assert not (tmp_path / "ran").exists()


@either
def test_continuation_is_what_the_response_adds_to_the_text(script, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2")
    prompt, response = tokenizer("the movie").input_ids, tokenizer(" was fine").input_ids
    learner = SimpleNamespace(tokenizer=tokenizer, ends=[0])
    assert script.decode(learner, [prompt] * 3, [response + [0], [0], []]) == [" was fine", "", ""]


ROWS = [{"text": f"review {i}", "label": str(i % 2)} for i in range(10)]


def save_split_files(folder):
    tiny.write_jsonl(folder / "train.jsonl", ROWS[:7])
    tiny.write_jsonl(folder / "validation.jsonl", ROWS[7:])


DATASETS = {
    "folder of files": save_split_files,
    "save_to_disk": lambda folder: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:7]), "validation": datasets.Dataset.from_list(ROWS[7:])}
    ).save_to_disk(folder),
    "clone of a hub's data set": lambda folder: (
        save_split_files(folder),
        (folder / "dataset_infos.json").write_text("{}"),
    ),
    "valid, as the paper's posts have it": lambda folder: datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS[:7]),
            "test": datasets.Dataset.from_list(ROWS[:2]),
            "valid": datasets.Dataset.from_list(ROWS[7:]),
        }
    ).save_to_disk(folder),
}


@either
@pytest.mark.parametrize("kind", DATASETS)
def test_data_set_with_a_validation_split(script, tmp_path, kind):
    DATASETS[kind](tmp_path / "data")
    train, validation, _ = script.load_rows(script.Args(dataset=str(tmp_path / "data")), ["text"])
    assert train == ROWS[:7] and validation == ROWS[7:]


WITHOUT_VALIDATION = {
    "one file": lambda path: tiny.write_jsonl(path, ROWS),
    "folder of one file": lambda path: tiny.write_jsonl(path / "train.jsonl", ROWS),
    "save_to_disk of one data set": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "save_to_disk with a test split": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    ).save_to_disk(path),
}


@either
@pytest.mark.parametrize("kind", WITHOUT_VALIDATION)
def test_data_set_without_a_validation_split_gives_a_fifth_drawn_by_the_seed(script, tmp_path, kind):
    path = tmp_path / "data.jsonl"
    WITHOUT_VALIDATION[kind](path)
    args = script.Args(dataset=str(path))
    train, validation, commit = script.load_rows(args, ["text", "label"])
    assert len(train) == 8 and len(validation) == 2
    assert sorted(train + validation, key=lambda row: row["text"]) == ROWS
    assert script.load_rows(args, ["text", "label"]) == (train, validation, None) and commit is None
    splits = [script.load_rows(replace(args, seed=seed), ["text"])[1] for seed in range(5)]
    assert len({str(split) for split in splits}) > 1  # as in the authors' runs, the seed draws the split


BAD_DATASETS = {
    "missing column": (
        lambda path: tiny.write_jsonl(path, [{"words": "a"}, {"words": "b"}]),
        "text is no text; its columns are words",
    ),
    "missing column in validation": (
        lambda path: (
            tiny.write_jsonl(path / "train.jsonl", ROWS),
            tiny.write_jsonl(path / "validation.jsonl", [{"words": "a"}]),
        ),
        "",
    ),
    "missing column in a validation split of its own": (
        lambda path: datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list([{"words": "a"}])}
        ).save_to_disk(path),
        "text is no text; its columns are words",
    ),
    "row without a text": (lambda path: tiny.write_jsonl(path, [*ROWS, {"label": "c"}]), "text is no text"),
    "numbers": (lambda path: tiny.write_jsonl(path, [{"text": 1}, {"text": 2}]), "text is no text"),
    "empty file": (lambda path: path.write_text(""), ""),
    "one row": (lambda path: tiny.write_jsonl(path, ROWS[:1]), "too few"),
    "no JSON": (lambda path: path.write_text("hello\n"), ""),
    "empty folder": (lambda path: path.mkdir(), ""),
    "no training split": (
        lambda path: datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(path),
        "no split train",
    ),
    "not there": (lambda path: path, ""),
}


@either
@pytest.mark.parametrize("kind", BAD_DATASETS)
def test_unusable_data_set_is_refused_by_name(script, tmp_path, ends_with, kind):
    make, words = BAD_DATASETS[kind]
    make(tmp_path / "data.jsonl")  # also where it is a folder
    with ends_with(f"--dataset {tmp_path / 'data.jsonl'}.*{words}"):
        script.load_rows(script.Args(dataset=str(tmp_path / "data.jsonl")), ["text"])


PAPER = {  # Section 5.3, Table 7, and where the paper is silent the authors' scripts
    "sppo_rlhf_imdb": {
        "policy": "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews",
        "reward_model": "lvwerra/distilbert-imdb",
        "dataset": "stanfordnlp/imdb",
        "num_updates": 60,
        "num_trajectories": 112,
        "update_epochs": 5,
        "minibatch_size": 28,
        "alpha": 0.5,
        "beta": 0.4,
        "kl_coef": 0.001,
        "prompt_length": 64,
        "response_length": 48,
        "min_response_length": 48,
        "weight_decay": 1e-6,
        "gamma": 0.99,
        "vf_coef": 0.5,
        "eval_samples": 0,
    },
    "sppo_rlhf_tldr": {
        "policy": "CarperAI/openai_summarize_tldr_sft",
        "reward_model": "jdchang/tldr_rm_adapter",
        "dataset": "CarperAI/openai_summarize_tldr",
        "base_precision": "4bit",
        "double_quant": True,
        "lora_rank": 8,
        "lora_alpha": 64,
        "lora_targets": ("q_proj", "v_proj"),
        "num_updates": 100,
        "num_trajectories": 64,
        "update_epochs": 4,
        "minibatch_size": 32,
        "alpha": 0.5,
        "beta": 0.2,
        "kl_coef": 0.002,
        "prompt_length": 495,
        "response_length": 50,
        "min_response_length": 0,
        "weight_decay": 0.01,
        "gamma": 1.0,
        "vf_coef": 0.1,
        "eval_samples": 100,
    },
}
SAME = {"learning_rate": 5e-6, "gae_lambda": 0.95, "clip_coef": 0.2, "clip_coef_value": 0.2, "max_grad_norm": 1.0}
SAME |= {"top_k": 50, "norm_adv": True, "Z": -1.0, "target_coef": 0.0}


@both
def test_defaults_are_the_papers_settings(script):
    expected = PAPER[script.SCRIPT] | SAME
    defaults = vars(script.Args())
    assert {name: defaults[name] for name in expected} == expected
