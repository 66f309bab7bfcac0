import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.objectives.posterior import (
    PosteriorTarget,
    SelfNormalizedKL,
    brain_grad,
    brain_loss,
    brain_weights,
    dpg_grad,
    gdcpp_grad,
)

REWARD = torch.tensor([[1.0, 0.0, -1.0]])
ZERO = torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("logq", "loss", "difference"),
    [
        ([0.0, 0.0, 0.0], 0.266217, [0.3319, -0.0886, -0.2433]),
        ([0.5, 0.0, -0.5], 0.060269, [0.1588, -0.0625, -0.0963]),
        ([1.0, 0.0, -1.0], 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_the_worked_example(logq, loss, difference):
    assert brain_weights(ZERO, ZERO, REWARD)[0].tolist() == pytest.approx([0.6652, 0.2447, 0.0900], abs=1e-4)
    policy = torch.tensor([logq], requires_grad=True)
    found, metrics = brain_loss(policy, ZERO, ZERO, REWARD)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert (-policy.grad[0]).tolist() == pytest.approx(difference, abs=1e-4)
    assert brain_grad(policy, ZERO, ZERO, REWARD)[0].tolist() == pytest.approx(difference, abs=1e-4)
    assert metrics["kl"].item() == pytest.approx(loss, abs=1e-6)
    assert metrics["max_weight"].item() == pytest.approx(0.6652, abs=1e-4)
    assert metrics["effective_sample_size"].item() == pytest.approx(1 / (0.6652**2 + 0.2447**2 + 0.09**2), abs=1e-3)
    assert metrics["collapsed"].item() == 1


def test_two_samples_and_a_hard_target_are_dpo():
    loss = SelfNormalizedKL()([[1.0, 0.0]], [[0.7, 0.0]], [[0.0, 0.0]]).loss
    assert loss.item() == pytest.approx(0.403186, abs=1e-6)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)))


def test_one_sample_has_nothing_to_compare():
    logq = torch.tensor([[-3.0]], requires_grad=True)
    loss, metrics = brain_loss(logq, torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), torch.tensor([[5.0]]))
    loss.backward()
    assert loss.item() == 0
    assert logq.grad.item() == 0
    assert metrics["collapsed"].item() == 0


def test_temperature_limits():
    prior, proposal = torch.randn(2, 5), torch.randn(2, 5)
    reward = torch.tensor([[0.1, 3.0, 2.0, -1.0, 0.0]] * 2)
    flat = brain_weights(prior, proposal, reward, math.inf)
    assert torch.allclose(flat, (prior - proposal).softmax(dim=1))
    assert torch.allclose(brain_weights(prior, proposal, reward, 1e9), flat, atol=1e-6)
    assert torch.allclose(brain_weights(prior, proposal, reward, 1e-9), torch.eye(5)[[1, 1]])


def tables(seed, prompts=3, samples=4, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.normal(size=(prompts, samples)) for _ in range(4)]


@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_equals_plain_python_and_autograd(seed, beta):
    logq, prior, proposal, reward = tables(seed)
    policy = torch.tensor(logq, requires_grad=True)
    loss, _ = brain_loss(policy, *(torch.tensor(t) for t in (prior, proposal, reward)), beta)
    loss.backward()
    total = 0.0
    for p in range(3):
        target = [math.exp(a - b + r / beta) for a, b, r in zip(prior[p], proposal[p], reward[p], strict=True)]
        own = [math.exp(q - b) for q, b in zip(logq[p], proposal[p], strict=True)]
        alpha, bhat = [t / sum(target) for t in target], [o / sum(own) for o in own]
        total += sum(a * math.log(a / b) for a, b in zip(alpha, bhat, strict=True)) / 3
        assert policy.grad[p].tolist() == pytest.approx(
            [(b - a) / 3 for a, b in zip(alpha, bhat, strict=True)], abs=1e-9
        )
        assert brain_weights(prior, proposal, reward, beta)[p] == pytest.approx(alpha)
        assert brain_grad(logq, prior, proposal, reward, beta)[p].sum() == pytest.approx(0, abs=1e-12)
    assert loss.item() == pytest.approx(total)


@given(st.integers(0, 10**6))
def test_constants_of_a_prompt_change_nothing(seed):
    logq, prior, proposal, reward = tables(seed)
    before = brain_loss(logq, prior, proposal, reward).loss.item()
    shift = 500 * np.random.default_rng(seed).normal(size=(4, 3, 1))
    after = brain_loss(logq + shift[0], prior + shift[1], proposal + shift[2], reward + shift[3]).loss.item()
    assert after == pytest.approx(before, abs=1e-9)


@given(st.integers(0, 10**6))
def test_permuting_samples_permutes_weights(seed):
    logq, prior, proposal, reward = tables(seed)
    order = np.random.default_rng(seed).permutation(4)
    weights = brain_weights(prior, proposal, reward)[:, order]
    assert brain_weights(*(t[:, order] for t in (prior, proposal, reward))) == pytest.approx(weights)
    losses = [
        brain_loss(*tables_).loss.item()
        for tables_ in ((logq, prior, proposal, reward), [t[:, order] for t in (logq, prior, proposal, reward)])
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_the_posterior_has_gradient_zero_on_every_set_of_samples_and_dpg_has_not():
    _, prior, proposal, reward = tables(0, 50, 8, 3.0)
    posterior = prior + reward / 0.7
    score = np.random.default_rng(1).normal(size=(50, 8, 2))
    brain = brain_grad(posterior, prior, proposal, reward, 0.7, score=score)
    assert np.abs(brain).max() < 1e-12
    assert brain_loss(posterior, prior, proposal, reward, 0.7).loss.item() == pytest.approx(0, abs=1e-12)
    dpg = dpg_grad(posterior, proposal, score=score)
    assert np.var(dpg) > 0.1


def test_a_constant_score_has_gradient_zero():
    logq, prior, proposal, reward = tables(3)
    found = brain_grad(logq, prior, proposal, reward, score=np.ones((3, 4, 2)))
    assert found == pytest.approx(np.zeros((3, 2)), abs=1e-12)


def test_the_other_estimators():
    logq, target, proposal, _ = tables(4)
    weights = np.exp(target - proposal)
    assert dpg_grad(target, proposal, log_z=0.3) == pytest.approx(weights / math.exp(0.3) / 4)
    assert dpg_grad(target, proposal) == pytest.approx(weights / weights.sum(axis=1, keepdims=True))
    assert dpg_grad(target, proposal, log_z=np.full(3, 0.3)) == pytest.approx(weights / math.exp(0.3) / 4)
    ratio = np.exp(logq - proposal)
    assert gdcpp_grad(logq, target, proposal, log_z=0.0) == pytest.approx((weights - ratio) / 4)
    assert brain_grad(logq, target, proposal, np.zeros((3, 4)), use_baseline=False) == pytest.approx(
        dpg_grad(target, proposal)
    )


def test_self_normalised_gradient_is_unbiased_for_its_own_divergence():
    """Over all pairs of draws from the proposal, the mean gradient is that of the mean loss."""
    rng = np.random.default_rng(0)
    proposal = torch.tensor(rng.normal(size=5)).log_softmax(0)
    target, theta = torch.tensor(rng.normal(size=5)), torch.tensor(rng.normal(size=5), requires_grad=True)
    total, coefficients = 0.0, torch.zeros(5, dtype=torch.float64)
    for first in range(5):
        for second in range(5):
            pair = [first, second]
            chance = float((proposal[first] + proposal[second]).exp())
            logq = theta.log_softmax(0)[pair][None]
            args = (target[pair][None], proposal[pair][None], torch.zeros(1, 2, dtype=torch.float64))
            total = total + chance * brain_loss(logq, *args).loss
            score = torch.eye(5, dtype=torch.float64)[pair] - theta.detach().softmax(0)
            coefficients += chance * brain_grad(logq, *args, score=score[None])[0]
    (gradient,) = torch.autograd.grad(total, theta)
    assert torch.allclose(-gradient, coefficients)


def test_masked_samples_do_not_matter():
    logq, prior, proposal, reward = tables(5)
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    spoiled = [np.where(mask, table, np.nan) for table in (logq, prior, proposal, reward)]
    policy = torch.tensor(spoiled[0], requires_grad=True)
    loss, metrics = brain_loss(policy, *spoiled[1:], mask=mask)
    loss.backward()
    by_prompt = [
        brain_loss(*(t[p : p + 1, mask[p] > 0] for t in (logq, prior, proposal, reward))).loss.item() for p in range(3)
    ]
    assert loss.item() == pytest.approx(np.mean(by_prompt))
    assert policy.grad[torch.tensor(mask) == 0].eq(0).all()
    assert torch.isfinite(policy.grad).all()
    weights = brain_weights(*spoiled[1:], mask=mask)
    assert weights[mask == 0].tolist() == [0] * 4
    assert weights.sum(axis=1) == pytest.approx(np.ones(3))
    assert metrics["samples"].item() == pytest.approx(8 / 3)
    score = np.where(mask[..., None], 1.0, np.nan) * np.ones((3, 4, 2))
    assert np.isfinite(brain_grad(*spoiled, mask=mask, score=score)).all()


def test_sequence_log_probabilities_hundreds_of_nats_apart():
    logq = torch.tensor([[-900.0, -300.0, -600.0]], requires_grad=True)
    prior = torch.tensor([[-850.0, -310.0, -610.0]])
    loss, metrics = brain_loss(logq, prior, prior, torch.tensor([[2.0, 0.0, -300.0]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logq.grad).all()
    assert loss.dtype == torch.float32
    assert metrics["max_weight"].item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-5)


def test_duplicates_count_as_often_as_they_were_drawn():
    logq, prior, proposal, reward = tables(6, 1, 3)
    twice = [np.concatenate([t, t], axis=1) for t in (logq, prior, proposal, reward)]
    assert brain_loss(*twice).loss.item() == pytest.approx(brain_loss(logq, prior, proposal, reward).loss.item())
    once_more = [np.concatenate([t, t[:, :1]], axis=1) for t in (logq, prior, proposal, reward)]
    assert brain_weights(*once_more[1:])[0, [0, 3]].sum() > brain_weights(prior, proposal, reward)[0, 0]


def test_equal_rewards_leave_the_ratio_of_prior_and_proposal():
    _, prior, proposal, _ = tables(7)
    weights = brain_weights(prior, proposal, np.zeros((3, 4)))
    assert np.abs(weights - 0.25).max() > 0.1


def test_sigmoid_posterior():
    reward = np.array([[2.0, 0.0, -1.0]])
    found = PosteriorTarget("sigmoid", beta=0.5)(ZERO.numpy(), ZERO.numpy(), reward)
    centre = 1 / 3
    plain = [1 / (1 + math.exp(-(r - centre) / 0.5)) for r in reward[0]]
    assert found[0] == pytest.approx([p / sum(plain) for p in plain], abs=1e-6)
    fixed = PosteriorTarget("sigmoid", beta=0.5, baseline=np.array([1.0])).log_likelihood(reward)
    assert fixed[0] == pytest.approx([-math.log(1 + math.exp(-(r - 1) / 0.5)) for r in reward[0]])
    assert PosteriorTarget("sigmoid", baseline=1.0).log_likelihood(reward)[0, 1] == pytest.approx(-math.log(1 + math.e))
    low = PosteriorTarget("sigmoid").log_likelihood(np.array([[0.0, -2000.0]]))
    assert np.isfinite(low).all()


def test_reductions():
    alpha, logq = np.array([[1.0, 3.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 2.0]])
    each = SelfNormalizedKL("none")(alpha, logq, np.zeros((2, 2))).loss
    assert each.shape == (2,)
    assert SelfNormalizedKL("sum")(alpha, logq, np.zeros((2, 2))).loss.item() == pytest.approx(each.sum().item())
    assert SelfNormalizedKL()(alpha, logq, np.zeros((2, 2))).loss.item() == pytest.approx(each.mean().item())


def test_no_gradient_reaches_target_or_proposal():
    logq, prior, proposal, reward = (torch.tensor(t, requires_grad=True) for t in tables(8))
    brain_loss(logq, prior, proposal.detach(), reward).loss.backward()
    assert prior.grad is None
    assert reward.grad is None
    alpha = torch.full((3, 4), 0.25, requires_grad=True)
    SelfNormalizedKL()(alpha, logq, proposal.detach()).loss.backward()
    assert alpha.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"beta": math.nan}, "beta must be"),
        ({"reward": np.array([[0.0, np.inf]])}, "prompt 0, sample 1: reward is inf"),
        ({"logq": np.array([[-np.inf, 0.0]])}, "prompt 0, sample 0: logq is -inf"),
        ({"log_proposal": np.array([[0.0, np.nan]])}, "prompt 0, sample 1: log_proposal is nan"),
        ({"log_prior": np.zeros((1, 3))}, r"shape"),
        ({"mask": np.zeros((1, 2))}, "prompt 0 has no sample"),
        ({"mask": np.zeros((1, 3))}, "mask has shape"),
    ],
)
def test_errors_name_the_prompt(change, message):
    given_ = {name: np.zeros((1, 2)) for name in ("logq", "log_prior", "log_proposal", "reward")} | change
    with pytest.raises(InvalidInputError, match=message):
        brain_loss(**given_)


def test_other_errors():
    with pytest.raises(InvalidInputError, match="prompt 0 has no sample"):
        brain_weights(np.zeros((1, 0)), np.zeros((1, 0)), np.zeros((1, 0)))
    with pytest.raises(UnknownNameError):
        PosteriorTarget("bradley")
    with pytest.raises(UnknownNameError):
        SelfNormalizedKL("median")
    with pytest.raises(InvalidInputError, match="cancels"):
        PosteriorTarget(baseline=1.0)
    with pytest.raises(InvalidInputError, match="baseline has shape"):
        PosteriorTarget("sigmoid", baseline=np.zeros(3)).log_likelihood(np.zeros((2, 2)))
    with pytest.raises(InvalidInputError, match="weights must be"):
        SelfNormalizedKL()([[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]])
    with pytest.raises(InvalidInputError, match="score has shape"):
        dpg_grad(np.zeros((1, 2)), np.zeros((1, 2)), score=np.zeros((1, 3)))


def test_half_precision_is_computed_wider():
    loss = brain_loss(*(torch.tensor(t).bfloat16() for t in tables(9))).loss
    assert loss.dtype == torch.float32
