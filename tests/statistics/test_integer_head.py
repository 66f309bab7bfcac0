import math

import pytest
import torch

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.statistics import (
    FAMILIES,
    BitwiseBernoulli,
    DiscreteLaplaceAnalogue,
    DiscreteWeibull,
    DiscretizedNormal,
    IntegerHead,
    IntegerMixture,
    PoissonCounts,
    TargetStats,
    bits,
    family_of,
    nll,
)

STATS = TargetStats(10.0, 4.0, 0, 30)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_to_distribution(family, components):
    torch.manual_seed(0)
    head = IntegerHead(family, components, STATS, width=5)
    parameters = {"poisson": 1, "bitwise": 5, "bitwise-offset": 5, "categorical": 31}.get(family, 2)
    assert head.linear.out_features == (parameters if components == 1 else components * (1 + parameters))
    distribution, n = head(torch.randn(7, 5)), torch.arange(7)
    assert distribution.batch_shape == (7,)
    assert isinstance(distribution, IntegerMixture) == (components > 1)
    loss = nll(distribution, n)
    assert loss.shape == (7,)
    torch.testing.assert_close(bits(loss), loss / math.log(2))
    loss.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert distribution.mean.shape == distribution.mode.shape == distribution.icdf(0.5).shape == (7,)
    assert distribution.sample((2,), torch.Generator().manual_seed(0)).shape == (2, 7)
    assert f"family={family}" in repr(head)


def test_parametrisation():
    o = torch.tensor([0.5, -0.3], dtype=torch.float64)
    dalap = IntegerHead("dalap", 1, STATS, width=1).distribution(o)
    assert isinstance(dalap, DiscreteLaplaceAnalogue)
    assert dalap.mu.item() == pytest.approx(12.0)
    assert dalap.log_gamma.item() == pytest.approx(-math.exp(-0.3) / 4)
    normal = IntegerHead(DiscretizedNormal, 1, STATS, width=1).distribution(o)
    assert (normal.mu.item(), normal.scale.item()) == pytest.approx((12.0, 4 * math.exp(-0.3)))
    poisson = IntegerHead("poisson", 1, STATS, width=1).distribution(o[:1])
    assert isinstance(poisson, PoissonCounts)
    assert poisson.rate.item() == pytest.approx(10 * math.exp(0.5))
    weibull = IntegerHead("dweib", 1, STATS, width=1).distribution(o)
    assert isinstance(weibull, DiscreteWeibull)
    b = math.exp(-0.3)
    assert weibull.cdf(6).item() == pytest.approx(1 - math.exp(-((7 / (10 * math.exp(0.5))) ** b)))


def test_mixture_layout():
    o = torch.arange(9.0)[None] / 10
    mixture = IntegerHead("dlaplace", 3, STATS, width=1).distribution(o)
    torch.testing.assert_close(mixture.weights, o[:, :3].softmax(-1))
    torch.testing.assert_close(mixture.components.mu, 10 + 4 * o[:, [3, 5, 7]])
    torch.testing.assert_close(mixture.components.scale, 4 * o[:, [4, 6, 8]].exp())


def test_log_gamma_is_capped_and_can_come_back():
    head = IntegerHead("dalap", 1, TargetStats(0.0, 1e8, -(10**9), 10**9), width=1)
    o = torch.zeros(2, requires_grad=True)
    distribution = head.distribution(o)
    assert distribution.log_gamma.item() == pytest.approx(-1e-6)
    nll(distribution, torch.tensor(3)).backward()
    assert o.grad[1].item() < 0  # a narrower distribution fits: the scale's exponent is to grow


@pytest.mark.parametrize("value", [5.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"categorical"}))
def test_no_nan_at_extreme_outputs(family, components, value):
    head = IntegerHead(family, components, TargetStats(100.0, 50.0, 0, 10_000), width=1)
    for sign in (1, -1):
        for n in (0, 1, 7, 10_000):
            o = torch.full((head.linear.out_features,), sign * value, requires_grad=True)
            loss = nll(head.distribution(o), torch.tensor(n))
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(o.grad).all()


def test_bits_of_the_head_follow_the_range():
    signed = IntegerHead("bitwise", 1, TargetStats(0.0, 1.0, -5, 3), width=1)
    assert signed.outputs == 4
    distribution = signed.distribution(torch.zeros(4))
    assert isinstance(distribution, BitwiseBernoulli)
    assert (distribution.low, distribution.high) == (-8, 7)
    offset = IntegerHead("bitwise-offset", 1, TargetStats(0.0, 1.0, -5, 2), width=1)
    assert offset.outputs == 3
    assert (offset.distribution(torch.zeros(3)).low, offset.distribution(torch.zeros(3)).high) == (-5, 2)
    categorical = IntegerHead("categorical", 1, TargetStats(0.0, 1.0, -5, 2), width=1)
    assert categorical.distribution(torch.zeros(8)).log_prob(-5).exp().item() == pytest.approx(1 / 8)


def test_a_head_learns_the_distribution_of_its_targets():
    torch.manual_seed(0)
    n = torch.tensor([0, 3, 3, 3, 4, 4, 9, 12])
    for family, components in (("categorical", 1), ("bitwise", 4)):
        head = IntegerHead(family, components, n, width=1)
        optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
        for _ in range(300):
            optimiser.zero_grad()
            nll(head(torch.ones(8, 1)), n).mean().backward()
            optimiser.step()
        entropy = -sum(p * math.log(p) for p in (1 / 8, 3 / 8, 2 / 8, 1 / 8, 1 / 8))
        assert nll(head(torch.ones(8, 1)), n).mean().item() == pytest.approx(entropy, abs=0.02)


def test_statistics_of_targets():
    stats = TargetStats.of(torch.tensor([1, 3, 3, 9]))
    assert (stats.mean, stats.std, stats.low, stats.high) == pytest.approx((4.0, 3.0, 1, 9))
    assert IntegerHead("dalap", 1, [1, 3, 3, 9], width=1).stats == stats
    with pytest.raises(InvalidInputError, match="at least one target"):
        TargetStats.of([])
    with pytest.raises(InvalidInputError, match="whole numbers"):
        TargetStats.of([1.5])
    with pytest.raises(InvalidInputError, match="finite mean"):
        TargetStats(math.nan, 1.0, 0, 1)
    with pytest.raises(InvalidInputError, match="low <= high"):
        TargetStats(0.0, 1.0, 2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_constant_targets_of_zero(family):
    head = IntegerHead(family, 1, torch.zeros(6, dtype=torch.int64), width=2)
    loss = nll(head(torch.ones(6, 2)), torch.zeros(6, dtype=torch.int64))
    assert torch.isfinite(loss).all()


def test_width_from_the_first_call_and_saving():
    torch.manual_seed(0)
    head = IntegerHead("dalap", 2, STATS)
    first = head(torch.ones(3, 6)).log_prob(4)
    other = IntegerHead("dalap", 2, STATS, width=6)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(torch.ones(3, 6)).log_prob(4), first)


def test_wrong_use():
    with pytest.raises(UnknownNameError, match="did you mean 'dalap'"):
        IntegerHead("dalp", 1, STATS)
    with pytest.raises(UnknownNameError, match="Linear"):
        IntegerHead(torch.nn.Linear, 1, STATS)
    with pytest.raises(InvalidInputError, match="at least 1 component, got 0"):
        IntegerHead("dalap", 0, STATS)
    with pytest.raises(InvalidInputError, match="needs target_stats"):
        IntegerHead("dalap")
    with pytest.raises(InvalidInputError, match="over 1048576 values"):
        IntegerHead("categorical", 1, TargetStats(0.0, 1.0, 0, 2**21))
    head = IntegerHead("dalap", 1, STATS, width=3)
    with pytest.raises(InvalidInputError, match="made for 3 features, got 4"):
        head(torch.ones(2, 4))
    with pytest.raises(InvalidInputError, match="float features"):
        head(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=r"2 outputs in the last place, got \(5, 3\)"):
        head.distribution(torch.ones(5, 3))
    with pytest.raises(InvalidInputError, match="mu has NaN"):
        head(torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="outside the support"):
        nll(IntegerHead("bitwise", 1, STATS, width=3)(torch.ones(1, 3)), torch.tensor([32]))
    assert family_of(FAMILIES["dalap"]) is FAMILIES["dalap"]
