"""The symmetric losses against the paper's equations and against explicit sums over all actions.

One script of each kind stands for its siblings, which have the same loss word for word (test_siblings.py). Gradients
are with respect to the logits z and by autograd in float64. Equation numbers are the paper's. i is the sampled action;
the entry y of a gradient belongs to the action y.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sppo_continuous_discretized as control
import sppo_rlhf_imdb as language
from sa2c_continuous_discretized import symmetric_a2c_loss

EPS = 0.2
examples = settings(deadline=None, derandomize=True, max_examples=60)
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def of_ragged_sequences(loss):
    """A language script's loss for 1-D inputs: spread over three sequences of unequal length, garbage as padding."""

    def of_samples(logprob, old_logprob, advantages, *constants):
        n = len(logprob)
        lengths = torch.tensor([n // 2, n - n // 2, 0])
        mask = torch.arange(n + 1) < lengths.unsqueeze(1)
        tensors = (logprob, old_logprob, advantages)
        garbage = (torch.nan, torch.inf, torch.nan)
        padded = (torch.full(mask.shape, g, dtype=x.dtype).masked_scatter(mask, x) for x, g in zip(tensors, garbage))
        return loss(*padded, *constants, mask)

    return of_samples


ppo_scripts = pytest.mark.parametrize(
    "loss",
    [control.symmetric_ppo_loss, of_ragged_sequences(language.symmetric_ppo_loss)],
    ids=["control", "language"],
)


class Sample(NamedTuple):
    """One sampled action i with its advantage; pi_old is such that PPO does not clip it."""

    logits: torch.Tensor
    i: int
    A: float
    Z: float
    pi_old: float

    @property
    def pi(self) -> torch.Tensor:
        return self.logits.softmax(-1)

    def gradient(self, loss_of_logits) -> torch.Tensor:
        logits = self.logits.clone().requires_grad_()
        return torch.autograd.grad(loss_of_logits(logits), logits)[0]

    def a2c_gradient(self, loss, alpha: float, beta: float) -> torch.Tensor:
        A = torch.tensor([self.A], dtype=torch.float64)
        return self.gradient(lambda logits: loss(logits.log_softmax(-1)[[self.i]], A, alpha, beta, self.Z))

    def ppo_gradient(self, loss, alpha: float, beta: float) -> torch.Tensor:
        A, old_logprob = torch.tensor([[self.A], [self.pi_old]], dtype=torch.float64)
        return self.gradient(
            lambda logits: loss(logits.log_softmax(-1)[[self.i]], old_logprob.log(), A, EPS, alpha, beta, self.Z)
        )

    def cases(self, i_is_y: torch.Tensor, i_is_not_y: torch.Tensor) -> torch.Tensor:
        """The gradient with the entry i_is_y where y = i and i_is_not_y elsewhere, each given for all y."""
        return torch.where(torch.arange(len(self.logits)) == self.i, i_is_y, i_is_not_y)


@st.composite
def samples(draw, signs=(-1, 1)) -> Sample:
    k = draw(st.integers(2, 8))
    logits = torch.tensor(draw(st.lists(st.floats(-4, 4), min_size=k, max_size=k)), dtype=torch.float64)
    i = draw(st.integers(0, k - 1))
    A = draw(st.floats(0.01, 5)) * draw(st.sampled_from(signs))
    ratio = draw(st.floats(0.85, 1.15))
    return Sample(logits, i, A, Z=draw(st.floats(-4, -0.1)), pi_old=logits.softmax(-1)[i].item() / ratio)


@given(s=samples())
@examples
def test_a2c_gradient_is_eq_11_and_eq_17_to_19(s):
    pi, A = s.pi, s.A
    assert_close(s.a2c_gradient(symmetric_a2c_loss, 1, 0), s.cases(A * (pi - 1), A * pi))


@given(s=samples())
@examples
def test_reverse_a2c_gradient_is_eq_12_for_both_signs_of_the_advantage(s):
    pi, A, Z = s.pi, s.A, s.Z
    assert_close(s.a2c_gradient(symmetric_a2c_loss, 0, 1), s.cases(-A * Z * pi * (pi - 1), -A * Z * pi * pi[s.i]))


@given(s=samples())
@examples
def test_symmetric_a2c_gradient_is_eq_31_to_34_and_its_two_parts_point_the_same_way(s):
    pi, A, Z = s.pi, s.A, s.Z
    eq_31_33 = A * (pi - 1) - A * Z * pi * (pi - 1)
    eq_32_34 = A * pi - A * Z * pi * pi[s.i]
    assert_close(s.a2c_gradient(symmetric_a2c_loss, 1, 1), s.cases(eq_31_33, eq_32_34))
    assert (s.a2c_gradient(symmetric_a2c_loss, 1, 0) * s.a2c_gradient(symmetric_a2c_loss, 0, 1) > 0).all()


@ppo_scripts
@given(s=samples())
@examples
def test_ppo_gradient_is_eq_27_without_its_stray_minus_and_eq_28(loss, s):
    pi, A = s.pi, s.A
    expected = s.cases(A * pi * (pi - 1) / s.pi_old, A * pi[s.i] * pi / s.pi_old)
    assert_close(s.ppo_gradient(loss, 1, 0), expected)


@ppo_scripts
@given(s=samples())
@examples
def test_symmetric_ppo_gradient_is_eq_36_and_37_for_both_signs_and_its_parts_point_the_same_way(loss, s):
    pi, A, Z = s.pi, s.A, s.Z
    eq_36 = A * pi * (pi - 1) / s.pi_old - A * Z * pi * (pi - 1) / s.pi_old
    eq_37 = A * pi[s.i] * pi / s.pi_old - A * Z * pi * pi[s.i] / s.pi_old
    assert_close(s.ppo_gradient(loss, 1, 1), s.cases(eq_36, eq_37))
    assert (s.ppo_gradient(loss, 1, 0) * s.ppo_gradient(loss, 0, 1) > 0).all()


def check_printed_sign(s: Sample, reverse: torch.Tensor, pi_old: float):
    pi, A, Z, others = s.pi, s.A, s.Z, torch.arange(len(s.logits)) != s.i
    printed = s.gradient(lambda logits: (logits.softmax(-1)[others] * A * Z / pi_old).sum())
    assert_close(printed, s.cases(A * Z * pi * (pi - 1) / pi_old, A * Z * pi * pi[s.i] / pi_old))
    assert_close(reverse, -printed)

    gradient_of_pi = s.gradient(lambda logits: logits.softmax(-1)[s.i])
    assert -(gradient_of_pi @ printed) > 0  # descending the printed loss raises the probability of a bad action
    assert -(gradient_of_pi @ reverse) < 0


@given(s=samples(signs=(-1,)))
@examples
def test_printed_sign_for_negative_advantages_in_eq_7_20_23_to_25_raises_a_bad_action(s):
    check_printed_sign(s, s.a2c_gradient(symmetric_a2c_loss, 0, 1), pi_old=1.0)


@ppo_scripts
@given(s=samples(signs=(-1,)))
@examples
def test_printed_sign_for_negative_advantages_in_eq_8_29_38_39_raises_a_bad_action(loss, s):
    check_printed_sign(s, s.ppo_gradient(loss, 0, 1), s.pi_old)


class Batch(NamedTuple):
    """Samples of a product of categoricals, with old probabilities that leave some of them clipped."""

    logits: torch.Tensor  # (n, action_dim, bins)
    actions: torch.Tensor  # (n, action_dim)
    old_logprob: torch.Tensor  # (n,)
    advantages: torch.Tensor  # (n,)


def make_batch(seed: int, action_dim: int = 3, bins: int = 3, n: int = 24) -> Batch:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, action_dim, bins, dtype=torch.float64, generator=g).requires_grad_()
    actions = torch.randint(bins, (n, action_dim), generator=g)
    log_ratio = 0.3 * torch.randn(n, dtype=torch.float64, generator=g)
    old_logprob = joint_logprob(logits.detach(), actions) - log_ratio
    return Batch(logits, actions, old_logprob, torch.randn(n, dtype=torch.float64, generator=g))


def joint_logprob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)


def enumerate_actions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability of the sampled joint action and the sum over all others: every joint action is written out."""
    action_dim, bins = batch.logits.shape[1:]
    joint_actions = torch.cartesian_prod(*[torch.arange(bins)] * action_dim).view(-1, action_dim)
    per_dim = batch.logits.softmax(-1)[:, torch.arange(action_dim), joint_actions]  # (n, joint actions, action_dim)
    pi = per_dim.prod(-1)
    sampled = (joint_actions == batch.actions.unsqueeze(1)).all(-1)
    assert (sampled.sum(-1) == 1).all()
    return pi[sampled], pi.masked_fill(sampled, 0).sum(-1)


def has_ppo_gradient(ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The ratio may still move the way the advantage pushes it (Eq. 3, Section A.4)."""
    return torch.where(advantages > 0, ratio < 1 + EPS, ratio > 1 - EPS)


def plain_ppo_loss(logprob: torch.Tensor, old_logprob: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    limit = (1 + EPS * advantages.sign()) * advantages
    return -torch.min((logprob - old_logprob).exp() * advantages, limit).mean()


def gradient(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


seeds = st.integers(0, 2**31)
weights = st.tuples(st.floats(0.1, 2), st.floats(0, 30), st.floats(-4, -0.1))  # alpha, beta, Z
policies = pytest.mark.parametrize(("action_dim", "bins"), [(1, 5), (3, 3)], ids=["one dimension", "three dimensions"])


@policies
@given(seed=seeds, abz=weights)
@examples
def test_a2c_value_and_gradient_are_eq_9_with_the_sum_over_all_other_actions(action_dim, bins, seed, abz):
    (alpha, beta, Z), batch = abz, make_batch(seed, action_dim, bins)
    pi, others = enumerate_actions(batch)
    A = batch.advantages
    expected = (alpha * -A * pi.log() + beta * -others * A * Z).mean()
    actual = symmetric_a2c_loss(joint_logprob(batch.logits, batch.actions), A, alpha, beta, Z)
    assert_close(actual, expected)
    assert_close(gradient(actual, batch.logits), gradient(expected, batch.logits))


@policies
@ppo_scripts
@given(seed=seeds, abz=weights)
@examples
def test_ppo_value_and_gradient_are_eq_9_with_the_sum_over_all_other_actions(loss, action_dim, bins, seed, abz):
    (alpha, beta, Z), batch = abz, make_batch(seed, action_dim, bins)
    pi, others = enumerate_actions(batch)
    A, pi_old = batch.advantages, batch.old_logprob.exp()
    active = has_ppo_gradient(pi / pi_old, A)
    L_ppo = -torch.min(pi / pi_old * A, (pi / pi_old).clamp(1 - EPS, 1 + EPS) * A)
    expected = (alpha * L_ppo + beta * (-others * A * Z / pi_old) * active).mean()
    actual = loss(joint_logprob(batch.logits, batch.actions), batch.old_logprob, A, EPS, alpha, beta, Z)
    constant = (beta * -A * Z / pi_old * active).mean()  # left out of the value on purpose: it has no gradient
    assert_close(actual + constant, expected)
    assert_close(gradient(actual, batch.logits), gradient(expected, batch.logits))


@ppo_scripts
@given(seed=seeds, abz=weights)
@examples
def test_ppo_gradient_is_scaled_by_alpha_minus_beta_z_where_ppo_has_one_and_zero_elsewhere(loss, seed, abz):
    (alpha, beta, Z), batch = abz, make_batch(seed)
    A, logprob = batch.advantages, joint_logprob(batch.logits, batch.actions)
    active = has_ppo_gradient((logprob - batch.old_logprob).exp(), A)
    actual = gradient(loss(logprob, batch.old_logprob, A, EPS, alpha, beta, Z), logprob)
    assert_close(actual, (alpha - beta * Z) * gradient(plain_ppo_loss(logprob, batch.old_logprob, A), logprob))
    assert torch.equal(actual != 0, active)


@ppo_scripts
@pytest.mark.parametrize("clip_coef", [0.2, torch.tensor(0.2, dtype=torch.float64)], ids=["float", "tensor"])
def test_reverse_ppo_counts_only_samples_with_a_ppo_gradient_and_divides_by_all(loss, clip_coef):
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    A = torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    active = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    logprob = ratio.log().requires_grad_()
    value = loss(logprob, torch.zeros(8, dtype=torch.float64), A, clip_coef, 0, 3, -0.5)
    assert_close(value, (3 * -0.5 * A * ratio * active).sum() / 8)
    assert_close(gradient(value, logprob), 3 * -0.5 * A * ratio * active / 8)


@given(seed=seeds, abz=weights)
@examples
def test_a2c_gradient_is_scaled_by_alpha_minus_beta_z_pi_of_each_sample(seed, abz):
    (alpha, beta, Z), batch = abz, make_batch(seed)
    A, logprob = batch.advantages, joint_logprob(batch.logits, batch.actions)
    actual = gradient(symmetric_a2c_loss(logprob, A, alpha, beta, Z), batch.logits)
    factor = alpha - beta * Z * logprob.exp().detach()
    assert_close(actual, gradient(-(factor * A * logprob).mean(), batch.logits))


@ppo_scripts
def test_only_the_product_of_beta_and_z_matters_for_ppo(loss):
    batch = make_batch(0)
    logprob = joint_logprob(batch.logits, batch.actions)
    a, b = (loss(logprob, batch.old_logprob, batch.advantages, EPS, 0.5, *bz) for bz in ((1.0, -1.0), (10.0, -0.1)))
    assert_close(a, b)
    assert_close(gradient(a, batch.logits), gradient(b, batch.logits))


def test_only_the_product_of_beta_and_z_matters_for_a2c():
    batch = make_batch(0)
    logprob = joint_logprob(batch.logits, batch.actions)
    a, b = (symmetric_a2c_loss(logprob, batch.advantages, 0.5, *bz) for bz in ((1.0, -1.0), (10.0, -0.1)))
    assert_close(a, b)
    assert_close(gradient(a, batch.logits), gradient(b, batch.logits))


@ppo_scripts
@given(seed=seeds)
@examples
def test_alpha_1_beta_0_is_plain_ppo(loss, seed):
    batch = make_batch(seed)
    logprob = joint_logprob(batch.logits, batch.actions)
    actual = loss(logprob, batch.old_logprob, batch.advantages, EPS, 1.0, 0.0, -1.0)
    expected = plain_ppo_loss(logprob, batch.old_logprob, batch.advantages)
    assert_close(actual, expected)
    assert_close(gradient(actual, batch.logits), gradient(expected, batch.logits))


@given(seed=seeds)
@examples
def test_alpha_1_beta_0_is_plain_a2c(seed):
    batch = make_batch(seed)
    logprob = joint_logprob(batch.logits, batch.actions)
    actual = symmetric_a2c_loss(logprob, batch.advantages, 1.0, 0.0, -1.0)
    expected = -(batch.advantages * logprob).mean()
    assert_close(actual, expected)
    assert_close(gradient(actual, batch.logits), gradient(expected, batch.logits))


def humanoid_gradient(loss_of, std: float, dtype: torch.dtype) -> torch.Tensor:
    """Logit gradient of 64 samples with HumanoidStandup's 17 action dimensions, everything computed in dtype."""
    g = torch.Generator().manual_seed(0)
    old_logits = std * torch.randn(64, 17, 11, generator=g)
    logits = (old_logits + 0.02 * torch.randn(64, 17, 11, generator=g)).to(dtype).requires_grad_()
    actions = old_logits.softmax(-1).flatten(0, 1).multinomial(1, generator=g).view(64, 17)
    advantages = torch.randn(64, generator=g).to(dtype)
    old_logprob = joint_logprob(old_logits.to(dtype), actions)
    return gradient(loss_of(logits, actions, old_logprob, advantages), logits)


def relative_error(loss_of, std: float) -> float:
    exact = humanoid_gradient(loss_of, std, torch.float64)
    return ((humanoid_gradient(loss_of, std, torch.float32) - exact).norm() / exact.norm()).item()


logit_stds = pytest.mark.parametrize("std", [0.5, 0.01], ids=["random policy", "near-uniform policy"])


@logit_stds
@ppo_scripts
def test_float32_ppo_gradient_is_accurate_with_17_action_dimensions(loss, std):
    def loss_of(logits, actions, old_logprob, advantages):
        return loss(joint_logprob(logits, actions), old_logprob, advantages, EPS, 0.5, 20.0, -1.0)

    assert relative_error(loss_of, std) < 1e-5


@logit_stds
def test_float32_a2c_gradient_is_accurate_with_17_action_dimensions(std):
    def loss_of(logits, actions, old_logprob, advantages):
        return symmetric_a2c_loss(joint_logprob(logits, actions), advantages, 0.5, 20.0, -1.0)

    assert relative_error(loss_of, std) < 1e-5


@logit_stds
def test_float32_gradient_is_roundoff_if_it_runs_through_the_sum_of_all_probabilities(std):
    def naive_reverse_loss(logits, actions, old_logprob, advantages):
        sum_of_probs = logits.softmax(-1).sum(-1).prod(-1)
        return (advantages * (sum_of_probs - joint_logprob(logits, actions).exp()) / old_logprob.exp()).mean()

    assert relative_error(naive_reverse_loss, std) > 1000


def test_ppo_loss_of_several_agents_is_one_value_per_agent():
    batches = [make_batch(seed) for seed in range(3)]
    logprob = torch.stack([joint_logprob(b.logits, b.actions) for b in batches])
    old_logprob, A = torch.stack([b.old_logprob for b in batches]), torch.stack([b.advantages for b in batches])
    together = control.symmetric_ppo_loss(logprob, old_logprob, A, EPS, 0.5, 20.0, -1.0)
    assert together.shape == (3,)
    for i in range(3):
        assert_close(together[i], control.symmetric_ppo_loss(logprob[i], old_logprob[i], A[i], EPS, 0.5, 20.0, -1.0))


def test_a2c_loss_of_several_agents_is_one_value_per_agent():
    batches = [make_batch(seed) for seed in range(3)]
    logprob = torch.stack([joint_logprob(b.logits, b.actions) for b in batches])
    A = torch.stack([b.advantages for b in batches])
    together = symmetric_a2c_loss(logprob, A, 0.5, 5.0, -1.0)
    assert together.shape == (3,)
    for i in range(3):
        assert_close(together[i], symmetric_a2c_loss(logprob[i], A[i], 0.5, 5.0, -1.0))


class TokenBatch(NamedTuple):
    """Sampled tokens of two responses, five and three real ones, some of them clipped."""

    logits: torch.Tensor  # (sequence, token, vocabulary)
    tokens: torch.Tensor  # (sequence, token), like the rest
    old_logprob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


def make_tokens(vocabulary: int, dtype: torch.dtype) -> TokenBatch:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, vocabulary, generator=g)).to(dtype)
    tokens = logits.float().softmax(-1).flatten(0, 1).multinomial(1, generator=g).view(2, 5)
    log_ratio = torch.tensor([[0.1, -0.1, 0.3, -0.3, 0.0], [0.3, -0.3, 0.05, 9.0, 9.0]])
    advantages = torch.tensor([[1.0, -2.0, 0.5, 0.7, -1.5], [-1.0, -0.4, 3.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    return TokenBatch(logits, tokens, chosen_logprob(logits.float(), tokens) - log_ratio, advantages, mask)


def chosen_logprob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def explicit_loss(logits: torch.Tensor, batch: TokenBatch, alpha: float, beta: float, Z: float) -> torch.Tensor:
    """Eq. 9, one real token after the other, with the sum over all other tokens of the vocabulary."""
    losses = []
    for row, t in batch.mask.nonzero().tolist():
        pi, i = logits[row, t].softmax(-1), batch.tokens[row, t]
        A, pi_old = batch.advantages[row, t].double(), batch.old_logprob[row, t].double().exp()
        ratio, others = pi[i] / pi_old, pi[:i].sum() + pi[i + 1 :].sum()
        L_ppo = -torch.min(ratio * A, ratio.clamp(1 - EPS, 1 + EPS) * A)
        losses.append(alpha * L_ppo + beta * (-others * A * Z / pi_old) * has_ppo_gradient(ratio, A))
    return torch.stack(losses).mean()


def token_logprobs(logits, tokens):
    """response_logprobs with a model that returns these logits, of which the last one predicts what comes next."""
    after = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
    return language.response_logprobs(
        lambda *_, **__: SimpleNamespace(logits=after), tokens, torch.ones_like(tokens), tokens.shape[1]
    )


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_gradient_of_a_50257_token_vocabulary_is_eq_9_with_the_sum_over_all_other_tokens(dtype, error):
    batch, (alpha, beta, Z) = make_tokens(50_257, dtype), (0.5, 0.4, -1.5)
    exact = batch.logits.double().requires_grad_()
    expected = gradient(explicit_loss(exact, batch, alpha, beta, Z), exact)
    logits = batch.logits.clone().requires_grad_()
    logprob = token_logprobs(logits, batch.tokens)
    loss = language.symmetric_ppo_loss(logprob, batch.old_logprob, batch.advantages, EPS, alpha, beta, Z, batch.mask)
    actual = gradient(loss, logits)
    assert actual.dtype == dtype and loss.dtype == torch.float32
    assert ((actual.double() - expected).norm() / expected.norm()).item() < error
    assert torch.equal(actual.flatten(0, 1).any(-1), expected.flatten(0, 1).any(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_those_of_the_full_softmax_with_its_gradient(dtype):
    logits, tokens = make_tokens(50_257, dtype)[:2]
    weights = torch.arange(10.0).view(2, 5) - 3
    exact, logits = logits.double().requires_grad_(), logits.requires_grad_()
    actual, expected = token_logprobs(logits, tokens), chosen_logprob(exact, tokens)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)
    actual, expected = (gradient((x * weights).sum(), z) for x, z in ((actual, logits), (expected, exact)))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_one_tensor_of_the_size_of_the_logits_is_kept_for_the_backward_pass(dtype):
    logits = torch.randn(8, 5, 1000, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logprobs(logits, torch.randint(1000, (8, 5)))
    assert 4 * logits.numel() <= sum(size for size, _ in kept.values()) < 1.1 * 4 * logits.numel()


@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.inf, -torch.inf, torch.nan])
def test_what_is_masked_out_changes_neither_value_nor_gradient(garbage):
    batch, weights = make_tokens(11, torch.float64), (EPS, 0.5, 20.0, -1.0)
    logprob = chosen_logprob(batch.logits, batch.tokens)

    def value_and_gradient(padding: float) -> list[torch.Tensor]:
        tensors = (logprob, batch.old_logprob.double(), batch.advantages.double())
        x, old_logprob, advantages = (t.masked_fill(~batch.mask, padding) for t in tensors)
        value = language.symmetric_ppo_loss(x.requires_grad_(), old_logprob, advantages, *weights, batch.mask)
        return [value, gradient(value, x)]

    (value, grad), (expected, expected_grad) = value_and_gradient(garbage), value_and_gradient(-1.0)
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)
    assert value.shape == () and not grad[~batch.mask].any() and grad[batch.mask].any()


def test_language_loss_is_that_of_the_control_scripts_over_the_real_tokens():
    batch, weights = make_tokens(11, torch.float64), (EPS, 0.5, 20.0, -1.0)
    logprob = chosen_logprob(batch.logits, batch.tokens).requires_grad_()
    tensors = (logprob, batch.old_logprob.double(), batch.advantages.double())
    actual = language.symmetric_ppo_loss(*tensors, *weights, batch.mask)
    expected = control.symmetric_ppo_loss(*(x[batch.mask] for x in tensors), *weights)
    assert_close(actual, expected)
    assert_close(gradient(actual, logprob), gradient(expected, logprob))
