import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.statistics import DiscreteWeibull, PoissonCounts


def weibull(q, b, dtype=torch.float64):
    return DiscreteWeibull(torch.tensor(q, dtype=dtype), torch.tensor(b, dtype=dtype))


@pytest.mark.parametrize("rate", [1e-3, 0.5, 3.0, 16.0, 105.0, 12_000.0, 1e7])
def test_poisson_equals_scipy(rate):
    n = np.unique(np.round(np.concatenate([np.arange(40), rate + np.sqrt(rate) * np.arange(-6, 7)]))).astype(np.int64)
    n = n[n >= 0]
    d = PoissonCounts(torch.tensor(rate, dtype=torch.float64))
    # scipy subtracts numbers of size n log n: its own digits are the limit.
    assert d.log_prob(n).numpy() == pytest.approx(scipy.stats.poisson.logpmf(n, rate), rel=1e-9, abs=1e-7)
    assert d.cdf(n).numpy() == pytest.approx(scipy.stats.poisson.cdf(n, rate), abs=1e-8)
    assert d.mean.item() == d.variance.item() == rate


def test_poisson_is_exact_for_large_counts_in_float32():
    for rate, n in ((1e6, 1_001_000), (1e7, 10_000_003), (2.0**30, 2**30 + 12345), (17.3, 15), (0.5, 3), (1e6, 2)):
        d = PoissonCounts(torch.tensor(rate, dtype=torch.float32))
        with mpmath.workdps(50):
            r = mpmath.mpf(float(d.rate))
            exact = float(n * mpmath.log(r) - r - mpmath.loggamma(n + 1))
        assert d.log_prob(n).item() == pytest.approx(exact, rel=2e-6, abs=2e-6)


def test_poisson_mode_and_wrong_input():
    assert PoissonCounts(torch.tensor([0.3, 3.0, 3.5])).mode.tolist() == [0, 2, 3]
    for rate in (0.0, -1.0):
        with pytest.raises(InvalidInputError, match="rate must be positive"):
            PoissonCounts(rate)
    for family in (PoissonCounts(2.0), DiscreteWeibull(0.5, 1.0)):
        with pytest.raises(ValueError, match="outside the support, 0 to inf; got -1"):
            family.log_prob(torch.tensor(-1))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 400))
def test_weibull_with_exponent_one_is_geometric(q, n):
    d = weibull(q, 1.0)
    assert d.log_prob(n).item() == pytest.approx(n * math.log(q) + math.log1p(-q), rel=1e-9, abs=1e-9)
    assert d.mean.item() == pytest.approx(q / (1 - q), rel=1e-8)
    assert d.variance.item() == pytest.approx(q / (1 - q) ** 2, rel=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.3, 2.5), st.integers(0, 60))
def test_weibull_equals_a_plain_reference(q, b, n):
    with mpmath.workdps(60):
        first = mpmath.mpf(q) ** (mpmath.mpf(n) ** b) if n else mpmath.mpf(1)
        expected = float(mpmath.log(first - mpmath.mpf(q) ** (mpmath.mpf(n + 1) ** mpmath.mpf(b))))
    assert weibull(q, b).log_prob(n).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert weibull(q, b).cdf(n).item() == pytest.approx(1 - q ** ((n + 1) ** b), abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 10**6, 10**8])
def test_weibull_in_float32_far_out(n):
    for decay in (-20.0, -5.0, -0.5):
        for b in (0.05, 0.3, 1.0):
            d = DiscreteWeibull(log_decay=torch.tensor(decay), b=torch.tensor(b))
            with mpmath.workdps(200):
                e, power = mpmath.exp(mpmath.mpf(decay)), mpmath.mpf(float(d.b))
                exact = float(mpmath.log(mpmath.exp(-e * mpmath.mpf(n) ** power) - mpmath.exp(-e * (n + 1) ** power)))
            assert d.log_prob(n).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_weibull_heavy_tail_moments_equal_long_sums():
    n = np.arange(1, 3_000_000, dtype=np.float64)
    for q, b in ((0.5, 0.3), (0.9, 0.5), (0.999, 1.5)):
        survival = q ** (n**b)
        d = weibull(q, b)
        mean = survival.sum()
        assert d.mean.item() == pytest.approx(mean, rel=1e-7)
        assert d.variance.item() == pytest.approx(((2 * n - 1) * survival).sum() - mean**2, rel=1e-6)


def test_zeros_give_the_weibull_no_nan():
    q = torch.full((5,), 0.4, requires_grad=True)
    b = torch.full((5,), 1.7, requires_grad=True)
    DiscreteWeibull(q, b).log_prob(torch.zeros(5, dtype=torch.int64)).sum().backward()
    assert q.grad.tolist() == pytest.approx([-1 / 0.6] * 5)
    assert b.grad.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_gradients_at_extremes(dtype):
    for n in (0, 1, 7, 10**6, 2**61):
        for decay in (-60.0, -5.0, 0.0, 5.0, 60.0):
            for b in (1e-6, 0.05, 1.0, 5.0, 50.0):
                a, power = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (decay, b))
                log_prob = DiscreteWeibull(log_decay=a, b=power).log_prob(n)
                slopes = torch.autograd.grad(log_prob, (a, power))
                assert torch.isfinite(log_prob), (n, decay, b)
                assert all(torch.isfinite(s) for s in slopes), (n, decay, b)
        for rate in (1e-30, 1e-3, 1.0, 1e6, 1e15):
            lam = torch.tensor(rate, dtype=dtype, requires_grad=True)
            log_prob = PoissonCounts(lam).log_prob(n)
            (slope,) = torch.autograd.grad(log_prob, lam)
            assert torch.isfinite(log_prob)
            assert torch.isfinite(slope) or n / rate > 1e38  # what float32 can hold
            if n < 1e6 and rate < 1e7:
                assert slope.item() == pytest.approx(n / rate - 1, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 0.5}, "needs b and exactly one"),
        ({"b": 1.0}, "needs b and exactly one"),
        ({"q": 1.0, "b": 1.0}, "q must be between 0 and 1, got 1"),
        ({"q": 0.5, "b": 0.0}, "b must be positive, got 0"),
    ],
)
def test_wrong_weibull_parameters(options, message):
    with pytest.raises(InvalidInputError, match=message):
        DiscreteWeibull(**options)


def test_weibull_chance_and_mode():
    assert weibull(0.7, 1.5).q.item() == pytest.approx(0.7)
    assert weibull([0.5, 0.999, 0.99999], [0.8, 2.0, 3.0]).mode.tolist()[0] == 0
