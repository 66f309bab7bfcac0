import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.statistics import DiscreteNormalAnalogue, restricted


def danorm(mu, scale, dtype=torch.float64):
    return DiscreteNormalAnalogue(torch.tensor(mu, dtype=dtype), torch.tensor(scale, dtype=dtype))


def window(mu, scale):
    """log Z by the paper's truncated sum."""
    reach, centre = math.ceil(6 * scale) + 2, round(mu)
    return math.log(
        math.fsum(math.exp(-((m - mu) ** 2) / (2 * scale**2)) for m in range(centre - reach, centre + reach + 1))
    )


def test_worked_example():
    d = danorm(2.3, 1.0)
    assert d.log_prob(2).exp().item() == pytest.approx(0.381388, abs=1e-6)
    assert d.log_normaliser.exp().item() == pytest.approx(2.5066283, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(0.15, 30), st.integers(-40, 40))
def test_equals_the_truncated_sum(mu, scale, n):
    d = danorm(mu, scale)
    assert d.log_normaliser.item() == pytest.approx(window(mu, scale), abs=5e-9)
    expected = -((n - mu) ** 2) / (2 * scale**2) - window(mu, scale)
    assert d.log_prob(n).item() == pytest.approx(expected, rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.999, 1.0, 1.001, 3.0, 100.0])
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5, -7.75, 1e6 + 0.25])
def test_exact_on_both_sides_of_the_border_between_the_series(mu, scale):
    with mpmath.workdps(50):
        m, s = mpmath.mpf(mu), mpmath.mpf(scale)
        middle, reach = int(mpmath.nint(m)), int(16 * scale) + 3
        weights = [mpmath.exp(-((k - m) ** 2) / (2 * s**2)) for k in range(middle - reach, middle + reach + 1)]
        total = mpmath.fsum(weights)
        for n in (middle, middle + 1, middle - int(3 * scale) - 1):
            exact = float(-((n - m) ** 2) / (2 * s**2) - mpmath.log(total))
            assert danorm(mu, scale).log_prob(n).item() == pytest.approx(exact, rel=1e-13, abs=1e-13)
            narrow = danorm(mu, scale, torch.float32)
            expected = float(-((n - m) ** 2) / (2 * mpmath.mpf(float(narrow.scale)) ** 2) - mpmath.log(total))
            assert narrow.log_prob(n).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_memory_does_not_grow_with_the_scale():
    d = danorm([0.25, -3.5], [1e9, 1e12])
    expected = [-0.5 * math.log(2 * math.pi) - math.log(s) for s in (1e9, 1e12)]
    assert d.log_prob(0).tolist() == pytest.approx(expected)
    assert d.cdf(torch.tensor([-(10**9), 2 * 10**12])).tolist() == pytest.approx([0.15865525, 0.97724987], abs=1e-7)
    assert d.variance.tolist() == pytest.approx([1e18, 1e24])
    assert d.icdf(0.5).tolist() == pytest.approx([0, -4], abs=2)


def test_a_narrow_scale_is_a_point_mass():
    for dtype in (torch.float32, torch.float64):
        d = danorm([2.3, 2.5, -1.0], [1e-6, 1e-6, 1e-12], dtype)
        assert d.log_prob(torch.tensor([2, 2, -1])).exp().tolist() == pytest.approx([1, 0.5, 1])
        assert d.mean.tolist() == pytest.approx([2, 2.5, -1])
        assert d.variance.tolist() == pytest.approx([0, 0.25, 0], abs=1e-6)


def test_cdf_on_both_sides_of_its_series():
    for scale in (1.01, 2.0, 5.0, 15.99, 16.01):
        d, n = danorm(0.3, scale), torch.arange(-400, 401)
        torch.testing.assert_close(d.cdf(n), d.log_prob(n).exp().cumsum(0), rtol=0, atol=1e-14)
        far = d.cdf(-120).item()
        assert far == pytest.approx(d.log_prob(torch.arange(-500, -119)).exp().sum().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_gradients_at_extremes(dtype):
    for n in (0, 10**6, -(10**12), 2**61):
        for mu in (0.5, 1e6, -1e12, 2.0**60):
            for scale in (1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e18):
                location = torch.tensor(mu, dtype=dtype, requires_grad=True)
                width = torch.tensor(scale, dtype=dtype, requires_grad=True)
                d = DiscreteNormalAnalogue(location, width)
                for part in (d.log_prob(n), d.mean, d.variance, d.cdf(n)):
                    slopes = torch.autograd.grad(part, (location, width), retain_graph=True)
                    assert torch.isfinite(part)
                    assert all(torch.isfinite(s) for s in slopes), (n, mu, scale)


def test_a_bounded_range_sums_over_it():
    d = restricted(danorm(2.3, 3.0), 0, 16)
    weights = torch.exp(-((torch.arange(17) - 2.3) ** 2).double() / 18)
    torch.testing.assert_close(d.probs, weights / weights.sum(), rtol=1e-6, atol=0)
