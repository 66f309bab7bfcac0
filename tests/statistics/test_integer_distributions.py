"""What holds of every distribution over integers, and the arithmetic they share."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, PolyrewardError
from polyreward.statistics import (
    BitwiseBernoulli,
    DiscreteLaplaceAnalogue,
    DiscreteNormalAnalogue,
    DiscreteWeibull,
    DiscretizedLaplace,
    DiscretizedLogistic,
    DiscretizedNormal,
    IntegerCategorical,
    IntegerDistribution,
    IntegerMixture,
    PoissonCounts,
)
from polyreward.statistics.integer_distributions import clamp_through, log1mexp, nearest_integer, whole_numbers


def _logits(dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _t(dtype, *values):
    return torch.tensor(values, dtype=dtype)


# Each makes a batch of two from a dtype; the windows hold all but 1e-15 of the mass.
MEMBERS = {
    "dalap": (lambda t: DiscreteLaplaceAnalogue(_t(t, 2.3, -7.5), _t(t, 0.5, 0.9)), -400, 400),
    "dalap cut": (lambda t: DiscreteLaplaceAnalogue(_t(t, 2.3, 9.1), _t(t, 0.5, 0.99), low=-3, high=6), -3, 6),
    "dalap low": (lambda t: DiscreteLaplaceAnalogue(_t(t, 2.3, -9.1), _t(t, 0.5, 0.9), low=-3), -3, 600),
    "dalap high": (lambda t: DiscreteLaplaceAnalogue(_t(t, 2.3, 9.1), _t(t, 0.5, 0.9), high=4), -600, 4),
    "danorm": (lambda t: DiscreteNormalAnalogue(_t(t, 2.3, -7.5), _t(t, 0.4, 3.0)), -100, 100),
    "danorm wide": (lambda t: DiscreteNormalAnalogue(_t(t, 2.3, -7.5), _t(t, 15.9, 40.0)), -500, 500),
    "dnormal": (lambda t: DiscretizedNormal(_t(t, 2.3, -7.5), _t(t, 0.4, 30.0)), -400, 400),
    "dlaplace": (lambda t: DiscretizedLaplace(_t(t, 2.3, -7.25), _t(t, 0.4, 20.0)), -900, 900),
    "dlogistic": (lambda t: DiscretizedLogistic(_t(t, 2.3, -7.25), _t(t, 0.4, 10.0)), -500, 500),
    "dweib": (lambda t: DiscreteWeibull(_t(t, 0.9, 0.999), _t(t, 1.1, 2.0)), 0, 400),
    "poisson": (lambda t: PoissonCounts(_t(t, 0.7, 60.25)), 0, 300),
    "bitwise": (lambda t: BitwiseBernoulli(_logits(t, 2, 6)), 0, 63),
    "bitwise signed": (lambda t: BitwiseBernoulli(_logits(t, 2, 6), signed=True), -32, 31),
    "bitwise offset": (lambda t: BitwiseBernoulli(_logits(t, 2, 5), offset=-10), -10, 21),
    "categorical": (lambda t: IntegerCategorical(_logits(t, 2, 30), low=-4), -4, 25),
    "mixture": (
        lambda t: IntegerMixture(
            _logits(t, 2, 3), DiscreteLaplaceAnalogue(_logits(t, 2, 3, seed=1) * 9, log_gamma=-_t(t, 0.1, 0.5, 2.0))
        ),
        -500,
        500,
    ),
    "mixture of bits": (lambda t: IntegerMixture(_logits(t, 2, 3), BitwiseBernoulli(_logits(t, 2, 3, 5))), 0, 31),
}


@pytest.fixture(params=MEMBERS)
def member(request):
    make, low, high = MEMBERS[request.param]
    return make, torch.arange(low, high + 1)


def test_mass_sums_to_one_and_cdf_adds_it_up(member):
    make, values = member
    distribution = make(torch.float64)
    mass = distribution.log_prob(values[:, None]).exp()
    assert mass.shape == (len(values), 2)
    torch.testing.assert_close(mass.sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    cdf = distribution.cdf(values[:, None])
    torch.testing.assert_close(cdf, mass.cumsum(0), rtol=0, atol=1e-9)
    assert (cdf.diff(dim=0) >= -1e-15).all()
    assert (cdf >= 0).all()
    assert (cdf <= 1).all()


def test_mean_variance_and_mode_equal_sums_over_the_window(member):
    make, values = member
    distribution = make(torch.float64)
    mass, n = distribution.log_prob(values[:, None]).exp(), values[:, None].double()
    mean = (mass * n).sum(0)
    torch.testing.assert_close(distribution.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(distribution.variance, (mass * (n - mean) ** 2).sum(0), rtol=1e-8, atol=1e-9)
    assert distribution.mode.dtype is torch.int64
    torch.testing.assert_close(distribution.log_prob(distribution.mode).exp(), mass.amax(0), rtol=1e-12, atol=0)


def test_quantile_is_the_smallest_integer_that_reaches_the_level(member):
    make, values = member
    distribution = make(torch.float64)
    levels = torch.tensor([1e-6, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-6], dtype=torch.float64)[:, None]
    found = distribution.icdf(levels)
    cumulated = distribution.cdf(values[:, None])
    expected = torch.stack([values[(cumulated[:, b] < levels).sum(-1)] for b in range(2)], -1)
    assert found.dtype is torch.int64
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(distribution.quantile(levels), expected)


def test_samples_agree_with_the_mass(member):
    make, values = member
    distribution = make(torch.float32)
    draws = distribution.sample((4000,), torch.Generator().manual_seed(1))
    assert draws.shape == (4000, 2)
    assert draws.dtype is torch.int64
    again = distribution.sample((4000,), torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws, again)
    mass = make(torch.float64).log_prob(values[:, None]).exp().numpy()
    for b in range(2):
        seen = np.bincount(draws[:, b].numpy() - int(values[0]), minlength=len(values))
        assert len(seen) == len(values), "a draw outside the window"
        common = mass[:, b] * 4000 >= 5
        expected = np.append(mass[common, b], max(1 - mass[common, b].sum(), 1e-300)) * 4000
        counted = np.append(seen[common], seen[~common].sum())
        if expected[-1] < 1:
            expected, counted = expected[:-1], counted[:-1]
        statistic = ((counted - expected) ** 2 / expected).sum()
        assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


def test_float32_equals_float64(member):
    make, values = member
    narrow, wide = make(torch.float32), make(torch.float64)
    for part in ("mean", "variance"):
        assert getattr(narrow, part).dtype is torch.float32
        torch.testing.assert_close(getattr(narrow, part).double(), getattr(wide, part), rtol=2e-5, atol=1e-5)
    found = narrow.log_prob(values[:, None])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wide.log_prob(values[:, None]), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(narrow.mode, wide.mode)


def test_half_precision_is_computed_in_float32(member):
    make, values = member
    found = make(torch.float16).log_prob(values[len(values) // 2])
    assert found.dtype is torch.float32
    assert torch.isfinite(found).all()


def test_expand_and_broadcasting(member):
    make, values = member
    distribution = make(torch.float64)
    wide = distribution.expand((3, 2))
    assert wide.batch_shape == (3, 2)
    assert wide.event_shape == ()
    n = values[len(values) // 2 : len(values) // 2 + 3]
    torch.testing.assert_close(wide.log_prob(n[:, None]), distribution.log_prob(n[:, None]))
    assert wide.mean.shape == wide.mode.shape == (3, 2)
    assert wide.sample((4,), torch.Generator().manual_seed(0)).shape == (4, 3, 2)
    assert distribution.log_prob(int(n[0])).shape == (2,)


def test_whole_floats_lists_and_arrays_are_targets(member):
    make, values = member
    distribution, n = make(torch.float64), values[len(values) // 2 : len(values) // 2 + 2]
    expected = distribution.log_prob(n)
    for same in (n.double(), n.float(), n.int(), n.tolist(), [float(x) for x in n], n.numpy()):
        torch.testing.assert_close(distribution.log_prob(same), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([0.5, 1.0]), "whole numbers.*got 0.5 at 0"),
        (torch.tensor([1.0, math.nan]), "whole numbers.*nan at 1"),
        (torch.tensor([math.inf, 1.0]), "whole numbers"),
        (torch.tensor([2.0**24 + 2, 1.0]), r"above 2\^24"),
        (torch.tensor([1, 2**62 + 1]), r"2\^62"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\).*\(2,\)"),
        (torch.zeros(2, dtype=torch.complex64), "must be integers"),
    ],
)
def test_targets_that_cannot_be_used(member, value, message):
    make, _ = member
    for method in ("log_prob", "cdf"):
        with pytest.raises(ValueError, match=message) as error:
            getattr(make(torch.float32), method)(value)
        assert isinstance(error.value, PolyrewardError)


def test_targets_outside_the_support_are_refused_by_log_prob_and_known_to_cdf(member):
    make, _ = member
    distribution = make(torch.float64)
    if distribution.low is not None:
        with pytest.raises(InvalidInputError, match=f"outside the support, {distribution.low} to"):
            distribution.log_prob(distribution.low - 1)
        assert (distribution.cdf(distribution.low - 5) == 0).all()
    if distribution.high is not None:
        with pytest.raises(InvalidInputError, match=f"to {distribution.high}; got {distribution.high + 1}"):
            distribution.log_prob(distribution.high + 1)
        assert (distribution.cdf(distribution.high) == 1).all()
        assert (distribution.cdf(distribution.high + 7) == 1).all()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_quantile_levels_outside_zero_and_one(member, level):
    make, _ = member
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        make(torch.float64).icdf(level)


def test_empty_batches(member):
    make, _ = member
    distribution = make(torch.float64).expand((0, 2))
    assert distribution.log_prob(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert distribution.mean.shape == distribution.mode.shape == distribution.icdf(0.5).shape == (0, 2)
    assert distribution.sample((3,)).shape == (3, 0, 2)


def test_gradients_of_log_prob_equal_finite_differences(member):
    make, values = member
    distribution = make(torch.float64)
    inner = distribution.components if isinstance(distribution, IntegerMixture) else distribution
    tensors = [t.detach().clone().requires_grad_() for t in inner._tensors()]
    middle = len(values) // 2
    n = values[[max(middle - 9, 0), middle, min(middle + 9, len(values) - 1)]][:, None]

    def log_prob(*new):
        swap = dict(zip([id(t) for t in inner._tensors()], new, strict=True))
        rebuilt = inner._rebuilt(lambda t: swap[id(t)])
        if isinstance(distribution, IntegerMixture):
            rebuilt = IntegerMixture(distribution.mixture_distribution.logits, rebuilt)
        return rebuilt.log_prob(n)

    # A location at a half-integer or integer sits on a kink of Dalap; move off it.
    tensors[0].data += 0.013
    assert torch.autograd.gradcheck(log_prob, tensors, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_support_lists_what_is_bounded(member):
    make, values = member
    distribution = make(torch.float64)
    if isinstance(distribution, IntegerDistribution):
        assert not distribution.has_rsample
        if distribution.low is not None and distribution.high is not None:
            torch.testing.assert_close(distribution.enumerate_support(), values[:, None].expand(-1, 2))
            assert distribution.enumerate_support(expand=False).shape == (len(values), 1)
        else:
            with pytest.raises(InvalidInputError, match="too many values to list"):
                distribution.enumerate_support()
        inside = distribution.support.check(torch.tensor([0.0, 0.5]))
        assert inside.tolist() == [True, False]


def test_parameters_that_cannot_be_used():
    with pytest.raises(InvalidInputError, match="DiscretizedNormal: mu has NaN"):
        DiscretizedNormal(torch.tensor([0.0, math.nan]), 1.0)
    with pytest.raises(InvalidInputError, match="do not broadcast: mu \\(2,\\), scale \\(3,\\)"):
        DiscretizedNormal(torch.zeros(2), torch.ones(3))
    with pytest.raises(InvalidInputError, match="mu must be at most 2\\^61"):
        DiscretizedNormal(1e30, 1.0)
    for family in (DiscretizedNormal, DiscretizedLaplace, DiscretizedLogistic, DiscreteNormalAnalogue):
        for scale in (0.0, -1.0):
            with pytest.raises(InvalidInputError, match=f"{family.__name__}: scale must be positive, got {scale:g}"):
                family(0.0, torch.tensor([1.0, scale]))


def test_whole_numbers_keep_python_floats_exact():
    assert whole_numbers([2.0**53 - 1]).item() == 2**53 - 1
    assert whole_numbers(torch.tensor(2.0**53, dtype=torch.float64)).item() == 2**53
    with pytest.raises(InvalidInputError, match="above 2\\^53"):
        whole_numbers(torch.tensor(2.0**53 + 2, dtype=torch.float64))
    assert whole_numbers(-(2**62)).item() == -(2**62)


@settings(max_examples=50, deadline=None)
@given(st.floats(-700, -1e-300))
def test_log1mexp_equals_a_careful_reference(x):
    expected = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12, abs=1e-320)


def test_nearest_integer_prefers_the_lower_one_half_way():
    mu = torch.tensor([0.4, 0.5, 0.55, -0.5, -0.45, 3.0])
    assert nearest_integer(mu).tolist() == [0, 0, 1, -1, 0, 3]


def test_clamp_through_passes_gradients():
    x = torch.tensor([-5.0, 0.5, 1e30], requires_grad=True)
    clamp_through(x, -1, 1).sum().backward()
    assert clamp_through(x, -1, 1).tolist() == [-1, 0.5, 1]
    assert x.grad.tolist() == [1, 1, 1]
