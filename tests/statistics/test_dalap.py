import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.statistics import DiscreteLaplaceAnalogue

MUS = st.floats(-40, 40).map(lambda x: round(x, 6))
GAMMAS = st.floats(0.01, 0.97)


def dalap(mu, gamma, **bounds):
    return DiscreteLaplaceAnalogue(
        torch.tensor(mu, dtype=torch.float64), torch.tensor(gamma, dtype=torch.float64), **bounds
    )


def reference(n, mu, gamma):
    f = mu - math.floor(mu)
    return gamma ** abs(n - mu) * (1 - gamma) / (gamma**f + gamma ** (1 - f))


def test_worked_example():
    d = dalap(2.3, 0.5)
    expected = [0.071109, 0.142219, 0.284437, 0.215563, 0.107781, 0.053891]
    assert d.log_prob(torch.arange(6)).exp().tolist() == pytest.approx(expected, abs=1e-6)
    assert d.log_prob(torch.arange(-100, 105)).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert d.mean.item() == pytest.approx(2.293378, abs=1e-6)
    assert d.variance.item() == pytest.approx(4.207307, abs=1e-6)
    assert d.gamma.item() == pytest.approx(0.5)
    assert d.log_normaliser.exp().item() == pytest.approx((0.5**0.3 + 0.5**0.7) / 0.5)


@pytest.mark.parametrize("mu", [-3.0, 0.0, 5.0])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.99])
def test_a_whole_location_is_the_classic_one(mu, gamma):
    n = np.arange(-30, 31)
    expected = scipy.stats.dlaplace.logpmf(n, -math.log(gamma), loc=mu)
    assert dalap(mu, gamma).log_prob(n).numpy() == pytest.approx(expected, abs=1e-12)
    assert dalap(mu, gamma).log_prob(int(mu)).exp().item() == pytest.approx((1 - gamma) / (1 + gamma))
    assert dalap(mu, gamma).mean.item() == pytest.approx(mu, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(MUS, GAMMAS, st.integers(-60, 60))
def test_equals_a_plain_reference(mu, gamma, n):
    d = dalap(mu, gamma)
    assert d.log_prob(n).exp().item() == pytest.approx(reference(n, mu, gamma), rel=1e-9)
    floor, f = math.floor(mu), mu - math.floor(mu)
    z = (gamma**f + gamma ** (1 - f)) / (1 - gamma)
    below = gamma ** (mu - n) / ((1 - gamma) * z) if n <= floor else 1 - gamma ** (n + 1 - mu) / ((1 - gamma) * z)
    assert d.cdf(n).item() == pytest.approx(below, abs=1e-12)
    w = gamma**f / (gamma**f + gamma ** (1 - f))
    mean = w * (floor - gamma / (1 - gamma)) + (1 - w) * (floor + 1 + gamma / (1 - gamma))
    assert d.mean.item() == pytest.approx(mean, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(MUS, GAMMAS, st.integers(-60, 60))
def test_shift_and_reflection(mu, gamma, n):
    here = dalap(mu, gamma).log_prob(n).item()
    assert dalap(mu + 1, gamma).log_prob(n + 1).item() == pytest.approx(here, abs=1e-9)
    assert dalap(-mu, gamma).log_prob(-n).item() == pytest.approx(here, abs=1e-9)


@pytest.mark.parametrize("mu", [-2.5, 0.5, 7.0, 7.5])
def test_the_mean_is_mu_at_integers_and_half_integers(mu):
    for gamma in (0.05, 0.6, 0.98):
        assert dalap(mu, gamma).mean.item() == pytest.approx(mu, abs=1e-9)


def test_continuous_at_integers_with_a_kink():
    n = torch.arange(-5, 6)
    left, right = (dalap(1.0 + e, 0.4).log_prob(n) for e in (-1e-9, 1e-9))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-8)
    slopes = []
    for mu in (1 - 1e-7, 1 + 1e-7):
        location = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(DiscreteLaplaceAnalogue(location, 0.4).log_prob(0), location)
        slopes.append(slope.item())
    assert abs(slopes[0] - slopes[1]) > 0.3
    # log p(0) at mu = 1 + f: log gamma (1 + f) - log(gamma^f + gamma^(1-f)): slope from the right
    g, L = 0.4, math.log(0.4)
    assert slopes[1] == pytest.approx(L - L * (1 - g) / (1 + g), abs=1e-5)
    assert slopes[0] == pytest.approx(L - L * (g - 1) / (1 + g), abs=1e-5)


def test_a_location_just_below_an_integer_in_float32():
    # mu - floor(mu) rounds to 1, where the two halves swap roles.
    d = DiscreteLaplaceAnalogue(torch.tensor(-1e-9), torch.tensor(0.5))
    expected = scipy.stats.dlaplace.logpmf(np.arange(-5, 6), math.log(2))
    assert d.log_prob(torch.arange(-5, 6)).numpy() == pytest.approx(expected, abs=1e-6)


def test_small_gamma_is_a_point_mass():
    for mu, masses in ((2.3, {2: 1, 3: 0}), (2.5, {2: 0.5, 3: 0.5}), (2.8, {2: 0, 3: 1}), (-4.0, {-4: 1, -5: 0})):
        d = DiscreteLaplaceAnalogue(torch.tensor(mu), log_gamma=torch.tensor(-1e8))
        for n, mass in masses.items():
            assert d.log_prob(n).exp().item() == pytest.approx(mass, abs=1e-6)


def test_gamma_near_one():
    for dtype in (torch.float32, torch.float64):
        decay = torch.tensor(-1e-6, dtype=dtype)
        d = DiscreteLaplaceAnalogue(torch.tensor(0.25, dtype=dtype), log_gamma=decay)
        assert d.log_normaliser.item() == pytest.approx(math.log(2 / -math.expm1(-1e-6)), abs=1e-5)
        assert d.log_prob(0).item() == pytest.approx(math.log(-math.expm1(-1e-6) / 2), abs=1e-5)
        assert d.variance.item() == pytest.approx(2e12, rel=1e-5)
    wide = DiscreteLaplaceAnalogue(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1 - 1e-12, dtype=torch.float64))
    assert wide.log_normaliser.item() == pytest.approx(math.log(2e12), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(MUS, GAMMAS, st.integers(-50, 30), st.integers(0, 40))
def test_truncated_equals_dividing_by_the_sum(mu, gamma, low, length):
    high = low + length
    d, n = dalap(mu, gamma, low=low, high=high), torch.arange(low, high + 1)
    with mpmath.workdps(40):
        total = mpmath.fsum(mpmath.mpf(gamma) ** abs(m - mpmath.mpf(mu)) for m in range(low, high + 1))
        plain = [float(mpmath.mpf(gamma) ** abs(m - mpmath.mpf(mu)) / total) for m in range(low, high + 1)]
    mass = d.log_prob(n).exp()
    assert mass.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-300)
    mean = sum(p * m for p, m in zip(plain, n.tolist(), strict=True))
    assert d.mean.item() == pytest.approx(mean, abs=1e-8)
    assert d.variance.item() == pytest.approx(
        sum(p * (m - mean) ** 2 for p, m in zip(plain, n.tolist(), strict=True)), abs=1e-8
    )
    assert d.cdf(n).numpy() == pytest.approx(np.cumsum(plain), abs=1e-10)
    assert low <= d.mode.item() <= high
    assert mass.max().item() == pytest.approx(d.log_prob(d.mode).exp().item())


def test_truncated_and_nearly_flat():
    for rate in (1e-9, 1e-5, 1e-3):
        d = DiscreteLaplaceAnalogue(torch.tensor(-3.0), log_gamma=torch.tensor(-rate), low=0, high=999)
        p = np.exp(-rate * np.arange(1000))
        p /= p.sum()
        assert d.mean.item() == pytest.approx((p * np.arange(1000)).sum(), rel=1e-5)
        assert d.log_prob(0).item() == pytest.approx(math.log(p[0]), abs=1e-5)
        draws = d.sample((2000,), torch.Generator().manual_seed(0))
        assert draws.min() >= 0
        assert draws.max() <= 999


def test_huge_integers_keep_their_distance_in_float32():
    for place in (2**24 + 1, 10**12 + 7, -(2**60)):
        location = torch.tensor(float(place), dtype=torch.float32)
        d = DiscreteLaplaceAnalogue(location, torch.tensor(0.5))
        centre = int(location.item())
        near = d.log_prob(torch.tensor([centre, centre + 1, centre + 5]))
        assert near.tolist() == pytest.approx([math.log(1 / 3) - k * math.log(2) for k in (0, 1, 5)], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_gradients_at_extremes(dtype):
    for n in (0, -7, 10**6, -(10**12), 2**61):
        for mu in (0.0, 0.5, -0.25, 1e6, -1e12):
            for decay in (-1e-12, -1e-6, -0.1, -50.0, -1e4, -1e20):
                location = torch.tensor(mu, dtype=dtype, requires_grad=True)
                rate = torch.tensor(decay, dtype=dtype, requires_grad=True)
                d = DiscreteLaplaceAnalogue(location, log_gamma=rate)
                for part in (d.log_prob(n), d.mean, d.variance, d.cdf(n)):
                    slopes = torch.autograd.grad(part, (location, rate), retain_graph=True)
                    if part is not d.variance:
                        assert all(torch.isfinite(s) for s in slopes), (n, mu, decay, part)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of gamma and log_gamma"),
        ({"gamma": 0.5, "log_gamma": -1.0}, "exactly one"),
        ({"gamma": 0.0}, "gamma must be between 0 and 1, got 0"),
        ({"gamma": 1.0}, "gamma must be between 0 and 1, got 1"),
        ({"log_gamma": 0.0}, "log_gamma must be negative, got 0"),
        ({"gamma": 0.5, "low": 3, "high": 2}, "low 3 is above high 2"),
        ({"gamma": 0.5, "low": 0.5}, "whole numbers"),
    ],
)
def test_wrong_parameters(options, message):
    with pytest.raises(InvalidInputError, match=message):
        DiscreteLaplaceAnalogue(0.0, **options)
