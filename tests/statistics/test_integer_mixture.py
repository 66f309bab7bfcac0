import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily

from polyreward.errors import InvalidInputError
from polyreward.statistics import (
    BitwiseBernoulli,
    DiscreteLaplaceAnalogue,
    DiscretizedNormal,
    IntegerCategorical,
    IntegerMixture,
    PoissonCounts,
    restricted,
)


def test_identical_components_equal_one():
    n, phi = torch.arange(-20, 20), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    one = DiscreteLaplaceAnalogue(torch.tensor(2.3, dtype=torch.float64), 0.5)
    many = IntegerMixture(phi, one.expand((3,)))
    torch.testing.assert_close(many.log_prob(n), one.log_prob(n))
    torch.testing.assert_close(many.cdf(n), one.cdf(n))
    torch.testing.assert_close(many.mean, one.mean)
    torch.testing.assert_close(many.variance, one.variance)
    assert many.mode == one.mode
    assert many.icdf(0.9) == one.icdf(0.9)


def test_equals_a_plain_sum_and_torchs_own_mixture():
    phi = torch.tensor([[0.3, -1.0], [0.0, 0.5]], dtype=torch.float64)
    components = PoissonCounts(torch.tensor([[2.0, 9.0], [0.5, 30.0]], dtype=torch.float64))
    mixture, n = IntegerMixture(phi, components), torch.arange(0, 40)[:, None]
    weights = phi.softmax(-1)
    expected = sum(weights[:, k] * components.log_prob(n[..., None]).exp()[..., k] for k in range(2))
    torch.testing.assert_close(mixture.log_prob(n).exp(), expected)
    reused = MixtureSameFamily(Categorical(logits=phi), components)
    torch.testing.assert_close(mixture.log_prob(n), reused.log_prob(n))
    assert isinstance(mixture, MixtureSameFamily)
    torch.testing.assert_close(mixture.weights, weights)


def test_mode_between_far_and_near_components():
    def mode(mus, scales, phi):
        t = [torch.tensor(x, dtype=torch.float64) for x in (phi, mus, scales)]
        return IntegerMixture(t[0], DiscretizedNormal(t[1], t[2])).mode.item()

    assert mode([0.0, 4.0], [3.0, 3.0], [0.0, 0.0]) == 2
    assert mode([-1e6, 2e6], [5.0, 1.0], [0.0, 0.0]) == 2_000_000
    # Two wide ones far apart: the sum peaks between them, off the grid of the first search.
    for phi in (0.0, 0.1, 0.3):
        weights, mus, scales = (torch.tensor(x, dtype=torch.float64) for x in ([0, phi], [0, 2000], [1500, 1500]))
        mixture, n = IntegerMixture(weights, DiscretizedNormal(mus, scales)), torch.arange(-100, 2101)
        assert mixture.mode.item() == n[mixture.log_prob(n).argmax()].item()


def test_mode_of_a_bounded_mixture_stays_inside():
    mixture = IntegerMixture(torch.zeros(2), BitwiseBernoulli(torch.tensor([[5.0, 5.0], [5.0, 5.0]])))
    assert mixture.mode.item() == 3


def test_categorical_over_a_range():
    d = IntegerCategorical(torch.tensor([0.1, 0.2, 0.7]).log(), low=-1)
    assert d.log_prob(torch.tensor([-1, 0, 1])).exp().tolist() == pytest.approx([0.1, 0.2, 0.7])
    assert d.mean.item() == pytest.approx(0.6)
    assert d.variance.item() == pytest.approx(0.1 * 2.56 + 0.2 * 0.36 + 0.7 * 0.16)
    assert d.entropy().item() == pytest.approx(-sum(p * math.log(p) for p in (0.1, 0.2, 0.7)))
    with pytest.raises(InvalidInputError, match="1 to 1048576 values"):
        IntegerCategorical(torch.zeros(2, 0))


def test_restricted_renormalises():
    full = BitwiseBernoulli(torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    part = restricted(full, 1, 5)
    assert part.log_prob(torch.arange(1, 6)[:, None]).exp().sum(0).tolist() == pytest.approx([1, 1])
    mass = full.log_prob(torch.arange(1, 6)[:, None]).exp()
    torch.testing.assert_close(part.log_prob(3).exp(), mass[2] / mass.sum(0))
    cut = restricted(DiscreteLaplaceAnalogue(2.3, 0.5), -3, 6)
    closed = DiscreteLaplaceAnalogue(2.3, 0.5, low=-3, high=6)
    torch.testing.assert_close(cut.log_prob(torch.arange(-3, 7)), closed.log_prob(torch.arange(-3, 7)))
    with pytest.raises(InvalidInputError, match="more than 1048576"):
        restricted(DiscreteLaplaceAnalogue(2.3, 0.5), 0, 2**20)
    with pytest.raises(InvalidInputError, match="outside the support"):
        restricted(full, 0, 8)
    with pytest.raises(InvalidInputError, match="no mass on 0 to 1"):
        restricted(BitwiseBernoulli(probs=torch.tensor([0.5, 1.0])), 0, 1)


def test_wrong_mixtures():
    with pytest.raises(InvalidInputError, match="needs an integer distribution as components, got Poisson"):
        IntegerMixture(torch.zeros(2), torch.distributions.Poisson(torch.ones(2)))
    with pytest.raises(InvalidInputError, match=r"shape \(3,\) do not fit components of batch shape \(2,\)"):
        IntegerMixture(torch.zeros(3), PoissonCounts(torch.ones(2)))
    with pytest.raises(InvalidInputError, match="weights has NaN"):
        IntegerMixture(torch.tensor([0.0, math.nan]), PoissonCounts(torch.ones(2)))
