import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.ordinal import (
    OrdinalDistribution,
    OrdinalRewardHead,
    digit_logits,
    ordinal_preference_loss,
    region_log_probability,
)
from polyreward.reward_models.quality_levels import QualityPartition, region_mask

HEAD = OrdinalRewardHead()


def masses(count=9, **by_rating):
    """Log-probabilities (1, K) of ``r7=0.5`` and so on, float64."""
    p = torch.zeros(1, count, dtype=torch.float64)
    for name, value in by_rating.items():
        p[0, int(name[1:]) - 1] = value
    return p.log()


CHOSEN = masses(r6=0.2, r7=0.5, r8=0.3)
REJECTED = masses(r4=0.5, r5=0.3, r7=0.2)


def levels(chosen, rejected, mode="triangle"):
    return region_mask(torch.tensor([chosen]), torch.tensor([rejected]), mode=mode)


def slow_probability(p, q, region):
    return sum(p[k] * q[j] for k in range(len(p)) for j in range(len(q)) if region(k + 1, j + 1))


def test_the_worked_example():
    c, r = HEAD(CHOSEN), HEAD(REJECTED)
    assert float(c.prob_greater(r)) == pytest.approx(0.86, abs=1e-12)
    assert float(c.prob_equal(r)) == pytest.approx(0.10, abs=1e-12)
    assert float(r.prob_greater(c)) == pytest.approx(0.04, abs=1e-12)
    assert float(ordinal_preference_loss(CHOSEN, REJECTED)) == pytest.approx(0.150823, abs=1e-6)
    assert float(c.mean) == pytest.approx(7.1)
    assert float(r.mean) == pytest.approx(4.9)
    assert float(c.variance) == pytest.approx(0.2 * 1.21 + 0.5 * 0.01 + 0.3 * 0.81)
    assert float(c.entropy) == pytest.approx(-(0.2 * math.log(0.2) + 0.5 * math.log(0.5) + 0.3 * math.log(0.3)))
    assert c.level_probs(QualityPartition())[0].tolist() == pytest.approx([0.0, 0.2, 0.8])


@pytest.mark.parametrize(
    ("pair", "mode", "expected"),
    [
        ((2, 1), "rectangle", 0.64),
        ((2, 1), "triangle", 0.86),
        ((1, 0), "triangle", 0.16),
        ((2, 0), "triangle", 0.86),
        ((2, 2), "triangle", 0.3 * 0.2),
        # tents of half, one and half: (0.5 / 2 + 0.3) over good, (0.5 / 2 + 0.3) over normal
        ((2, 1), "weighted", 0.55 * 0.55),
    ],
)
def test_regions_of_the_worked_example(pair, mode, expected):
    loss = ordinal_preference_loss(CHOSEN, REJECTED, levels(*pair, mode))
    assert float(loss) == pytest.approx(-math.log(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("triangle", [0, 0, 0, 0, 0.5, 0.8, 0.8, 1, 1]), ("rectangle", [0, 0, 0, 0, 0, 0, 0.8, 0.8, 0.8])],
)
def test_gradient_of_a_region_by_the_chosen_probabilities(mode, expected):
    # with an even p_c, d log P / d logit_i = p_i (g_i - P) / P, so that g comes back from the logits' gradient
    logits = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
    log_p = region_log_probability(logits, REJECTED, levels(2, 1, mode))
    log_p.sum().backward()
    total = log_p.exp().item()
    assert (logits.grad[0] * 9 * total + total).tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.integers(2, 7).flatmap(lambda k: st.tuples(*[st.lists(st.floats(-8, 8), min_size=k, max_size=k)] * 2)))
def test_everything_is_what_plain_python_says(pair):
    a, b = (torch.tensor([one], dtype=torch.float64) for one in pair)
    p, q = ([math.exp(x) / sum(map(math.exp, one)) for x in one] for one in pair)
    first, second = OrdinalRewardHead(len(p))(a), OrdinalRewardHead(len(p))(b)
    greater = slow_probability(p, q, lambda k, j: k > j)
    assert float(first.prob_greater(second)) == pytest.approx(greater, abs=1e-12)
    assert float(region_log_probability(a, b).exp()) == pytest.approx(greater, abs=1e-12)
    total = first.prob_greater(second) + second.prob_greater(first) + first.prob_equal(second)
    assert float(total) == pytest.approx(1, abs=1e-12)
    mean = sum((k + 1) * x for k, x in enumerate(p))
    assert float(first.mean) == pytest.approx(mean)
    assert 1 <= float(first.mean) <= len(p) + 1e-9
    assert float(first.variance) == pytest.approx(sum((k + 1 - mean) ** 2 * x for k, x in enumerate(p)), abs=1e-12)
    assert float(first.variance) <= ((len(p) - 1) / 2) ** 2 + 1e-9
    assert float(first.entropy) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-9)
    # a constant says nothing
    shifted = OrdinalDistribution(a + 3.7)
    assert torch.allclose(shifted.probs, first.probs, atol=1e-12)
    assert torch.allclose(ordinal_preference_loss(a + 3.7, b - 100), ordinal_preference_loss(a, b), atol=1e-10)


def test_even_ratings_on_both_sides():
    even = torch.zeros(1, 9, dtype=torch.float64)
    assert float(HEAD(even).prob_greater(HEAD(even))) == pytest.approx(4 / 9)
    for count in (2, 5):
        loss = ordinal_preference_loss(*[torch.zeros(3, count, dtype=torch.float64)] * 2)
        assert float(loss) == pytest.approx(-math.log((count - 1) / (2 * count)))


def test_point_masses_and_two_ratings():
    at = [masses(**{f"r{k}": 1.0}) for k in range(1, 10)]
    found = [[float(HEAD(a).prob_greater(HEAD(b))) for b in at] for a in at]
    assert np.array_equal(found, np.tril(np.ones((9, 9)), -1))
    a, b = (torch.tensor([x], dtype=torch.float64) for x in ([0.3, 1.1], [-0.4, 0.2]))
    expected = -(a.softmax(1)[0, 1] * b.softmax(1)[0, 0]).log()
    assert float(ordinal_preference_loss(a, b)) == pytest.approx(float(expected))


def test_bradley_terry_is_the_limit_of_two_gumbels():
    grid = torch.linspace(-15, 25, 2000, dtype=torch.float64)

    def gumbel(location):
        z = grid - location
        return OrdinalDistribution((-z - torch.exp(-z)).unsqueeze(0))

    for a, b in ((1.0, 0.0), (0.3, 2.0), (0.0, 0.0)):
        first, second = gumbel(a), gumbel(b)
        expected = 1 / (1 + math.exp(b - a))
        found = float(first.prob_greater(second))
        assert found == pytest.approx(expected, abs=1e-2)
        assert found + 0.5 * float(first.prob_equal(second)) == pytest.approx(expected, abs=1e-4)


def test_unlabelled_the_triangle_and_no_region_are_one_loss():
    a, b = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    plain = ordinal_preference_loss(a, b, reduction="none")
    unlabelled = torch.full((6,), -1)
    assert torch.equal(ordinal_preference_loss(a, b, region_mask(unlabelled, unlabelled), reduction="none"), plain)
    whole = torch.ones(9, 9, dtype=torch.bool).tril(-1).expand(6, 9, 9)
    assert torch.equal(ordinal_preference_loss(a, b, whole, reduction="none"), plain)
    weights = region_mask(unlabelled, unlabelled, mode="weighted")
    assert torch.allclose(ordinal_preference_loss(a, b, weights, reduction="none"), plain)
    assert torch.equal(ordinal_preference_loss(a, b), plain.mean())
    assert torch.equal(ordinal_preference_loss(a, b, reduction="sum"), plain.sum())


def test_labelled_and_unlabelled_pairs_mix_in_a_batch():
    a, b = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    region = region_mask(torch.tensor([2, -1, 1]), torch.tensor([1, -1, 0]))
    each = ordinal_preference_loss(a, b, region, reduction="none")
    for i in range(3):
        alone = ordinal_preference_loss(a[i : i + 1], b[i : i + 1], region[i : i + 1])
        assert float(each[i]) == pytest.approx(float(alone), abs=1e-12)
        p, q = a[i].softmax(0).tolist(), b[i].softmax(0).tolist()
        inside = region[i].tolist()
        slow = slow_probability(p, q, lambda k, j, inside=inside: inside[k - 1][j - 1])
        assert float(each[i]) == pytest.approx(-math.log(slow), abs=1e-12)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(ordinal_preference_loss(a[order], b[order], region[order], reduction="none"), each[order])


def test_swapping_the_roles_transposes_the_region():
    a, b = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    region = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    swapped = region_log_probability(b, a, region.transpose(1, 2))
    assert torch.allclose(region_log_probability(a, b, region), swapped, atol=1e-12)


def test_gradients():
    a, b = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    region = region_mask(torch.tensor([2, -1, 1, 2]), torch.tensor([1, -1, 0, 2]))
    for mask in (None, region, region.double() * 0.3):
        assert torch.autograd.gradcheck(
            lambda x, y, mask=mask: ordinal_preference_loss(x, y, mask, reduction="none"),
            (a.requires_grad_(), b.requires_grad_()),
        )
    # rating 1 of the chosen one and rating 9 of the rejected one are in no pair: lowering them is all they can do
    loss = ordinal_preference_loss(a, b)
    ga, gb = torch.autograd.grad(loss, (a, b))
    assert torch.allclose(ga[:, 0], a.detach().softmax(1)[:, 0] / 4)
    assert torch.allclose(gb[:, 8], b.detach().softmax(1)[:, 8] / 4)
    for member in ("mean", "variance", "entropy"):
        assert torch.autograd.gradcheck(lambda x, member=member: getattr(HEAD(x), member), (a,))


def test_what_cannot_be_is_clamped_and_leaves_the_rest_alone():
    a = torch.cat([masses(r1=1.0), CHOSEN]).requires_grad_()
    b = torch.cat([masses(r9=1.0), REJECTED])
    each = ordinal_preference_loss(a, b, reduction="none")
    assert each.tolist() == pytest.approx([708.396, 0.150823], abs=1e-3)
    each.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert not a.grad[0].any()
    assert a.grad[1].any()
    # far apart and yet possible: exact, with a gradient
    far = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    loss = ordinal_preference_loss(far, -far.detach())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4000.0)  # p_c(2) = p_r(1) = exp(-2000)
    assert far.grad[0].tolist() == pytest.approx([1.0, -1.0])
    assert HEAD(CHOSEN.float()).entropy.isfinite().all()


def test_the_largest_variance_is_half_the_mass_at_either_end():
    assert float(HEAD(masses(r1=0.5, r9=0.5)).variance) == pytest.approx(16.0)
    assert float(HEAD(masses(r1=0.5, r9=0.5)).mean) == pytest.approx(5.0)
    assert float(HEAD(masses(r1=0.4, r9=0.6)).variance) < 16
    assert float(HEAD(masses(r1=0.5, r8=0.5)).variance) < 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_more_dimensions(dtype):
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = HEAD(logits)
    assert found.mean.shape == found.variance.shape == found.entropy.shape == (2, 3)
    assert found.level_probs(QualityPartition()).shape == (2, 3, 3)
    for values in (found.probs, found.mean, found.variance, found.entropy, found.prob_greater(found), found.log_probs):
        assert values.dtype == dtype
    loss = ordinal_preference_loss(logits, logits.flip(-1))
    assert loss.dtype == dtype
    exact = ordinal_preference_loss(logits.double(), logits.double().flip(-1))
    assert float(loss) == pytest.approx(float(exact), rel=1e-2)
    assert found.mean[1, 2].item() == pytest.approx(HEAD(logits[1, 2]).mean.item())


def test_no_pairs():
    nothing = torch.zeros(0, 9, requires_grad=True)
    loss = ordinal_preference_loss(nothing, nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert ordinal_preference_loss(nothing, nothing, reduction="none").shape == (0,)
    assert HEAD(nothing).mean.shape == (0,)


def test_probabilities_in():
    p = torch.tensor([[0.0, 0.25, 0.75]])
    assert torch.allclose(OrdinalDistribution.of_probs(p).probs, p)
    for wrong in (torch.tensor([[0.5, 0.4]]), torch.tensor([[1.5, -0.5]])):
        with pytest.raises(InvalidInputError, match="sum to 1"):
            OrdinalDistribution.of_probs(wrong)


def test_digit_logits():
    vocabulary = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    ids = torch.tensor([7, 3, 49])
    found = digit_logits(vocabulary, ids)
    assert torch.equal(found, vocabulary[:, [7, 3, 49]])
    # the softmax over the ratings is that over the vocabulary, renormalised
    p = vocabulary.softmax(1)[:, ids]
    assert torch.allclose(OrdinalRewardHead(3)(found).probs, p / p.sum(1, keepdim=True), atol=1e-6)
    assert digit_logits(vocabulary, [1, 0]).shape == (4, 2)
    for wrong in ([1], [1, 1], [[1, 2]], [1.0, 2.0]):
        with pytest.raises(InvalidInputError, match="different tokens"):
            digit_logits(vocabulary, wrong)
    for wrong in ([1, 50], [-1, 3]):
        with pytest.raises(InvalidInputError, match="vocabulary of 50"):
            digit_logits(vocabulary, wrong)


def test_wrong_input():
    a, nan = torch.zeros(3, 9), torch.zeros(3, 9)
    nan[1, 4] = torch.nan
    with pytest.raises(ValueError, match="chosen logits of row 1 are NaN"):
        ordinal_preference_loss(nan, a)
    with pytest.raises(ValueError, match="rejected logits of row 1"):
        ordinal_preference_loss(a, nan)
    with pytest.raises(ValueError, match="logits of row 1 are NaN"):
        HEAD(nan)
    for value in (torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="row 0"):
            HEAD(torch.full((2, 9), value))
    with pytest.raises(ValueError, match=r"expected \(..., 9\)"):
        HEAD(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="at least 2 ratings, got 1"):
        OrdinalRewardHead(1)
    with pytest.raises(ValueError, match="at least 2 ratings"):
        ordinal_preference_loss(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="expected the same"):
        ordinal_preference_loss(a, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="expected the same"):
        ordinal_preference_loss(a, a[:2])
    empty = torch.ones(3, 9, 9, dtype=torch.bool)
    empty[2] = False
    with pytest.raises(ValueError, match="region of pair 2 is empty"):
        ordinal_preference_loss(a, a, empty)
    with pytest.raises(ValueError, match=r"region has shape \(3, 9\)"):
        ordinal_preference_loss(a, a, empty[0, :3])
    with pytest.raises(ValueError, match="finite numbers from 0"):
        ordinal_preference_loss(a, a, -torch.ones(3, 9, 9))
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        ordinal_preference_loss(a, a, reduction="meen")
    with pytest.raises(ValueError, match="9 and 3 ratings"):
        HEAD(a).prob_greater(OrdinalDistribution(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="holds 9 ratings, the distribution 3"):
        OrdinalDistribution(torch.zeros(3, 3)).level_probs()
