import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.statistics import BitwiseBernoulli, bits, bits_needed, nll

CHANCES = (0.9, 0.2, 0.7, 0.1)


def logits_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_example():
    d = BitwiseBernoulli(probs=torch.tensor(CHANCES, dtype=torch.float64))
    assert d.log_prob(5).exp().item() == pytest.approx(0.4536, abs=1e-12)
    assert bits(nll(d, 5)).item() == pytest.approx(1.140507, abs=1e-6)
    assert d.mean.item() == pytest.approx(4.9)
    assert d.variance.item() == pytest.approx(9.85)
    assert d.mode.item() == 5
    assert d.bits_of(torch.tensor(5)).tolist() == [True, False, True, False]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_logits_of_zero_cost_one_bit_each(count):
    d = BitwiseBernoulli(torch.zeros(count))
    cost = bits(nll(d, torch.arange(2**count)))
    assert cost.tolist() == pytest.approx([count] * 2**count)
    assert d.log_prob(torch.arange(2**count)).exp().sum().item() == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_equals_enumeration(count, signed, seed):
    logits = logits_of(count, seed=seed)
    d, p = BitwiseBernoulli(logits, num_bits=count, signed=signed), logits.sigmoid().tolist()
    masses = {}
    for pattern in itertools.product((0, 1), repeat=count):
        weights = [2**b for b in range(count)]
        if signed:
            weights[-1] *= -1
        n = sum(w * on for w, on in zip(weights, pattern, strict=True))
        masses[n] = math.prod(q if on else 1 - q for q, on in zip(p, pattern, strict=True))
    assert sorted(masses) == list(range(d.low, d.high + 1))
    values = torch.tensor(sorted(masses))
    expected = torch.tensor([masses[n] for n in sorted(masses)], dtype=torch.float64)
    torch.testing.assert_close(d.log_prob(values).exp(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(d.cdf(values), expected.cumsum(0), rtol=0, atol=1e-12)
    mean = (expected * values).sum()
    assert d.mean.item() == pytest.approx(mean.item(), abs=1e-9)
    assert d.variance.item() == pytest.approx((expected * (values - mean) ** 2).sum().item(), abs=1e-9)
    assert d.entropy().item() == pytest.approx(-(expected * expected.log()).sum().item())


def test_one_bit_is_logistic_regression():
    theta = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    target = torch.tensor([1, 0])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(theta[:, 0], target.double(), reduction="none")
    torch.testing.assert_close(nll(BitwiseBernoulli(theta), target), loss)


def test_a_constant_fit_has_its_optimum_at_the_frequency_of_each_bit():
    n = torch.tensor([1, 5, 5, 6, 7, 12])
    frequency = torch.stack([(n >> b) & 1 for b in range(4)], -1).double().mean(0)
    theta = torch.logit(frequency).requires_grad_()
    nll(BitwiseBernoulli(theta), n).mean().backward()
    assert theta.grad.abs().max().item() < 1e-12


def test_twos_complement_and_offset_binary():
    d = BitwiseBernoulli(logits_of(24), signed=True)
    assert (d.low, d.high) == (-(2**23), 2**23 - 1)
    assert d.bits_of(torch.tensor(-1)).all()
    assert d.bits_of(torch.tensor(-(2**23))).tolist() == [False] * 23 + [True]
    plain = BitwiseBernoulli(d.logits)
    assert d.log_prob(-5).item() == pytest.approx(plain.log_prob(2**24 - 5).item())
    offset = BitwiseBernoulli(d.logits, offset=-1000)
    assert offset.log_prob(-5).item() == pytest.approx(plain.log_prob(995).item())
    assert offset.mean.item() == pytest.approx(plain.mean.item() - 1000)


def test_large_integers_keep_every_bit():
    n = 2**60 - 3
    d = BitwiseBernoulli(torch.where(torch.arange(61) == 1, -40.0, 40.0).to(torch.float32) * (torch.arange(61) < 60))
    assert d.log_prob(n).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert d.log_prob(n + 2).item() < -39
    assert d.mode.item() == n
    assert BitwiseBernoulli(torch.zeros(61)).high == 2**61 - 1


@pytest.mark.parametrize(("signed", "wrong"), [(False, -1), (False, 16), (True, 8), (True, -9)])
def test_nothing_wraps(signed, wrong):
    with pytest.raises(ValueError, match=f"outside the support.*got {wrong} at 1"):
        BitwiseBernoulli(torch.zeros(4), signed=signed).log_prob(torch.tensor([0, wrong]))


def test_certain_bits():
    d = BitwiseBernoulli(probs=torch.tensor([1.0, 0.0]))
    assert d.log_prob(1).item() == 0
    assert d.log_prob(2).item() == -math.inf
    assert d.mean.item() == 1
    assert d.variance.item() == 0
    assert d.sample((5,)).tolist() == [1] * 5


def test_gradients_are_finite_at_extremes():
    theta = torch.tensor([1e30, -1e30, 200.0, -200.0], requires_grad=True)
    d = BitwiseBernoulli(theta)
    for n in (0, 5, 10, 15):
        (slope,) = torch.autograd.grad(d.log_prob(n), theta)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of logits and probs"),
        ({"logits": torch.zeros(3), "num_bits": 4}, "num_bits is 4, the logits have 3"),
        ({"logits": torch.tensor(0.0)}, r"shape \(\*batch, bits\)"),
        ({"logits": torch.zeros(62)}, "1 to 61 bits"),
        ({"logits": torch.zeros(3), "signed": True, "offset": 1}, "two's complement and has no offset"),
        ({"probs": torch.tensor([0.5, 1.5])}, "between 0 and 1, got 1.5"),
    ],
)
def test_wrong_parameters(options, message):
    with pytest.raises(InvalidInputError, match=message):
        BitwiseBernoulli(**options)


@pytest.mark.parametrize(
    ("low", "high", "signed", "count"),
    [
        (0, 0, False, 1),
        (0, 1, False, 1),
        (0, 16, False, 5),
        (0, 15, False, 4),
        (0, 977, False, 10),
        (-8, 7, True, 4),
        (-9, 7, True, 5),
        (-1, 8, True, 5),
        (-(2**23), 0, True, 24),
    ],
)
def test_bits_needed(low, high, signed, count):
    assert bits_needed(low, high, signed) == count


def test_bits_needed_refuses():
    with pytest.raises(InvalidInputError, match="no unsigned bits hold -1 to 3"):
        bits_needed(-1, 3)
    with pytest.raises(InvalidInputError, match="the limit is 61"):
        bits_needed(0, 2**61)
