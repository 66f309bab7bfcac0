import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.statistics import DiscretizedLaplace, DiscretizedLogistic, DiscretizedNormal

FAMILIES = {
    DiscretizedNormal: mpmath.ncdf,
    DiscretizedLaplace: lambda z: mpmath.exp(z) / 2 if z < 0 else 1 - mpmath.exp(-z) / 2,
    DiscretizedLogistic: lambda z: 1 / (1 + mpmath.exp(-z)),
}


def exact(family, n, mu, scale):
    """log p with 300 digits."""
    with mpmath.workdps(300):
        # Reflected to the left tail, where no digits cancel.
        d, s, half = abs(n - mpmath.mpf(mu)), mpmath.mpf(scale), mpmath.mpf(1) / 2
        cdf = FAMILIES[family]
        return float(mpmath.log(cdf((half - d) / s) - cdf((-half - d) / s)))


def make(family, mu, scale, dtype=torch.float64):
    return family(torch.tensor(mu, dtype=dtype), torch.tensor(scale, dtype=dtype))


def test_worked_examples():
    assert DiscretizedNormal(2.3, 1.0).log_prob(2).exp().item() == pytest.approx(0.367404, abs=1e-6)
    assert DiscretizedLaplace(2.3, 1.0).log_prob(2).exp().item() == pytest.approx(0.365970, abs=1e-6)
    expected = 1 / (1 + math.exp(-0.2)) - 1 / (1 + math.exp(0.8))
    assert DiscretizedLogistic(2.3, 1.0).log_prob(2).exp().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 1.24, 1.26, 3.0, 30.0, 1e3, 1e5])
def test_exact_at_every_distance_and_scale(family, scale):
    # In float64 to the last digits; in float32 to its own. mu and scale are what the dtype holds.
    for mu in (0.0, 0.5, -2.75, 1000.25):
        for n in {math.floor(mu + k * scale) for k in (-300, -9, -1, 0, 0.4, 1, 5, 40)} | {math.floor(mu) + 1}:
            d = make(family, mu, scale)
            assert d.log_prob(n).item() == pytest.approx(exact(family, n, mu, scale), rel=1e-13, abs=1e-13)
            narrow = make(family, mu, scale, torch.float32)
            expected = exact(family, n, mu, float(narrow.scale))
            assert narrow.log_prob(n).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.floats(-20, 20), st.floats(0.05, 50), st.integers(-60, 60))
def test_equals_the_difference_of_the_cdf(family, mu, scale, n):
    d = make(family, mu, scale)
    assert d.log_prob(n).exp().item() == pytest.approx((d.cdf(n) - d.cdf(n - 1)).item(), abs=1e-13)
    mirrored = make(family, -mu, scale).log_prob(-n)
    assert d.log_prob(n).item() == pytest.approx(mirrored.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_on_both_sides_of_the_border(family):
    for scale in (0.1, 0.7, 1.49, 1.51, 1.99, 2.01, 20.0):
        d, n = make(family, 0.3, scale), torch.arange(-2000, 2001)
        mass = d.log_prob(n).exp()
        mean = (mass * n).sum()
        assert d.mean.item() == pytest.approx(mean.item(), abs=1e-11)
        assert d.variance.item() == pytest.approx((mass * (n - mean) ** 2).sum().item(), rel=1e-10)
    assert make(DiscretizedNormal, 0.3, 1e6).variance.item() == pytest.approx(1e12 + 1 / 12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_gradients_at_extremes(family, dtype):
    for n in (0, -7, 10**6, -(10**12), 2**61):
        for mu in (0.0, 0.5, -0.25, 1e6, -1e12, 2.0**60):
            for scale in (1e-30, 1e-12, 1e-3, 0.1, 1.0, 1e3, 1e12, 1e18):
                location = torch.tensor(mu, dtype=dtype, requires_grad=True)
                width = torch.tensor(scale, dtype=dtype, requires_grad=True)
                d = family(location, width)
                for part in (d.log_prob(n), d.mean, d.variance, d.cdf(n)):
                    slopes = torch.autograd.grad(part, (location, width), retain_graph=True)
                    assert torch.isfinite(part), (n, mu, scale)
                    assert all(torch.isfinite(s) for s in slopes), (n, mu, scale, slopes)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float32_equal_float64(family):
    for n, mu, scale in (
        (0, 0.3, 1.0),
        (40, 0.3, 1.0),
        (-300, 2.6, 0.5),
        (7, 6.9, 0.05),
        (10**6, 0.0, 1e5),
        (3, 0, 1e6),
    ):
        slopes = []
        for dtype in (torch.float32, torch.float64):
            location = torch.tensor(mu, dtype=dtype).requires_grad_()
            width = torch.tensor(scale, dtype=dtype).requires_grad_()
            log_prob = family(location, width).log_prob(n)
            slopes.append([s.item() for s in torch.autograd.grad(log_prob, (location, width))])
        assert slopes[0] == pytest.approx(slopes[1], rel=2e-4, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_huge_locations_in_float32(family):
    for place in (2.0**24 + 2, 1e12, -(2.0**60)):
        location = torch.tensor(place, dtype=torch.float32)
        centre = int(location.item())
        near = family(location, torch.tensor(1.0)).log_prob(torch.tensor([centre, centre + 3]))
        expected = family(torch.tensor(0.0), torch.tensor(1.0)).log_prob(torch.tensor([0, 3]))
        torch.testing.assert_close(near, expected)
        draws = family(location, torch.tensor(1.0)).sample((500,), torch.Generator().manual_seed(0)) - centre
        assert abs(draws.double().mean().item()) < 0.5
