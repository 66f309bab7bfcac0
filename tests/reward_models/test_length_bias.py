import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from polyreward.errors import InvalidInputError
from polyreward.reward_models.length_bias import (
    BiasFitter,
    LengthEncoding,
    confound_split_accuracy,
    correlation_ratio,
    identity_fitter,
    pearson,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_pearson_of_the_paper_and_its_gradient():
    r = f64(1, 2, 4, 3).requires_grad_()
    rho = pearson(r, torch.tensor([10, 20, 30, 40]))
    rho.backward()
    assert rho.item() == pytest.approx(0.8, abs=1e-9)
    assert r.grad.tolist() == pytest.approx([-0.06, -0.02, -0.14, 0.22], abs=1e-9)
    assert float(r.grad.sum()) == pytest.approx(0, abs=1e-12)
    assert float(r.grad @ (r.detach() - r.detach().mean())) == pytest.approx(0, abs=1e-9)


samples = st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-50, 50), min_size=n, max_size=n)] * 2))


@settings(deadline=None)
@given(samples, st.floats(0.1, 20), st.floats(-30, 30))
def test_pearson_is_scipys_and_affine_maps_do_not_matter(pair, scale, shift):
    a, b = (np.array(one, float) for one in pair)
    rho = pearson(a, b)
    assert isinstance(rho, float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert rho == 0
        return
    assert rho == pytest.approx(pearsonr(a, b).statistic, abs=1e-7)
    assert -1 - 1e-12 <= rho <= 1 + 1e-12
    assert pearson(scale * a + shift, b) == pytest.approx(rho, abs=1e-6)
    assert pearson(-scale * a, b) == pytest.approx(-rho, abs=1e-6)
    assert pearson(a, a) == pytest.approx(1, abs=1e-7)
    order = np.random.default_rng(0).permutation(len(a))
    assert pearson(a[order], b[order]) == pytest.approx(rho, abs=1e-9)


@pytest.mark.parametrize("constant", [0.1, 7.0, 0.0])
def test_no_variance_is_zero_without_gradient(constant):
    # the mean of equal 0.1 is not 0.1 in float32, so that a variance of rounding is left
    same = torch.full((7,), constant, requires_grad=True)
    other = torch.arange(7.0).requires_grad_()
    for pair in ((same, other), (other, same)):
        rho = pearson(*pair)
        assert float(rho.detach()) == 0
        rho.abs().backward()
    assert not same.grad.any()
    assert not other.grad.any()
    assert float(pearson(torch.zeros(0), torch.zeros(0))) == 0
    assert float(pearson(torch.ones(1), torch.ones(1))) == 0


def test_the_absolute_correlation_has_no_gradient_at_zero():
    r = f64(1, -1, -1, 1).requires_grad_()
    rho = pearson(r, f64(1, 1, -1, -1)).abs()
    rho.backward()
    assert float(rho.detach()) == 0
    assert not r.grad.any()


def test_extreme_scales_and_dtypes():
    r, length = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    expected = float(pearson(r.double(), length))
    assert float(pearson(r * 1e-4, length)) == pytest.approx(expected, abs=1e-5)
    assert float(pearson(r * 1e25, length)) == pytest.approx(expected, abs=1e-5)
    assert pearson(r.half(), length).dtype == torch.float16
    assert float(pearson(r.half(), length)) == pytest.approx(expected, abs=1e-2)
    assert torch.autograd.gradcheck(pearson, (r.double().requires_grad_(), (length.double() ** 2).requires_grad_()))


def test_wrong_samples():
    with pytest.raises(InvalidInputError, match=r"shapes \(3,\) and \(2,\)"):
        pearson([1.0, 2, 3], [1.0, 2])
    with pytest.raises(InvalidInputError, match="value 1 of the second sample is nan"):
        pearson([1.0, 2], [1.0, math.nan])
    with pytest.raises(InvalidInputError, match="value 0 of the first sample is inf"):
        correlation_ratio(torch.tensor([torch.inf, 1]), torch.tensor([1, 2]))
    with pytest.raises(InvalidInputError, match="at least 1"):
        correlation_ratio([1.0], [1.0], bins=0)


def test_encoding():
    zero = LengthEncoding()(torch.tensor([0.0]))
    assert zero.shape == (1, 32)
    assert zero[0].tolist() == [0.0, 1.0] * 16
    found = LengthEncoding()(f64(3.0, 250.0))
    for row, length in enumerate((3.0, 250.0)):
        for j in range(16):
            angle = length / 10000 ** (2 * j / 32)
            assert found[row, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert found[row, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    # frequencies from 1 down to 10000^(-30/32)
    small = LengthEncoding()(f64(1e-6))[0, ::2] / 1e-6
    assert small[0].item() == pytest.approx(1)
    assert small[15].item() == pytest.approx(10000 ** (-30 / 32))
    assert LengthEncoding(4)(torch.tensor([1, 2])).dtype == torch.float32
    for wrong in ({"dim": 31}, {"dim": 0}, {"base": 1.0}):
        with pytest.raises(ValueError, match=r"even|above 1"):
            LengthEncoding(**wrong)


def test_fitter():
    fitter = BiasFitter()
    assert sum(p.numel() for p in fitter.parameters()) == 6465
    assert fitter(torch.tensor([3, 40, 500])).shape == (3,)
    assert fitter(torch.zeros(0)).shape == (0,)
    small = BiasFitter(LengthEncoding(8), blocks=1, hidden=5)
    assert sum(p.numel() for p in small.parameters()) == 16 + 8 * 5 + 5 + 5 * 8 + 8 + 9
    # one block, by hand
    lengths = torch.tensor([7.0, 31.0])
    h = LengthEncoding(8)(lengths)
    norm, first, _, second, _ = small.blocks[0]
    inner = torch.relu(norm(h) @ first.weight.T + first.bias)
    h = h + torch.relu(inner @ second.weight.T + second.bias)
    assert torch.allclose(small(lengths), h @ small.head.weight[0] + small.head.bias)
    assert identity_fitter(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    with pytest.raises(InvalidInputError, match="hidden at least 1"):
        BiasFitter(hidden=0)


def slow_ratio(r, place):
    means = {b: np.mean([x for x, p in zip(r, place, strict=True) if p == b]) for b in set(place)}
    between = np.mean([(means[p] - np.mean(r)) ** 2 for p in place])
    return between / np.var(r)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=1, max_size=30))
def test_ratio_of_few_values(rows):
    r, attribute = (np.array(one, float) for one in zip(*rows, strict=True))
    found = correlation_ratio(r, attribute)
    if np.ptp(r) == 0:
        assert found == 0
        return
    assert found == pytest.approx(slow_ratio(r, attribute.tolist()), abs=1e-9)
    assert -1e-12 <= found <= 1 + 1e-9
    # no curve of the attribute correlates better than its root
    assert pearson(r, np.sin(attribute)) ** 2 <= found + 1e-9


def test_ratio_of_deciles():
    rng = np.random.default_rng(0)
    attribute = rng.permutation(1000).astype(float)
    r = np.sin(attribute / 100) + rng.normal(size=1000)
    assert correlation_ratio(r, attribute) == pytest.approx(slow_ratio(r, (attribute // 100).tolist()), abs=1e-12)
    assert correlation_ratio(r, attribute, bins=4) == pytest.approx(slow_ratio(r, (attribute // 250).tolist()))
    # equal attributes stay together
    skewed = np.where(attribute < 600, 0.0, attribute)
    assert correlation_ratio(np.where(attribute < 600, 1.0, 0.0), skewed) == pytest.approx(1)
    assert correlation_ratio(r, attribute, bins=1) == pytest.approx(0, abs=1e-12)
    assert correlation_ratio(attribute, attribute, 1000) == pytest.approx(1)
    assert 0 < correlation_ratio(rng.normal(size=1000), attribute) < 0.03
    tensor = correlation_ratio(torch.tensor(r, requires_grad=True), torch.tensor(attribute))
    assert tensor.item() == pytest.approx(correlation_ratio(r, attribute))
    tensor.backward()
    assert correlation_ratio([], []) == 0


def test_split_accuracy():
    length_w, length_l = np.array([9, 3, 5, 8, 2]), np.array([4, 6, 5, 1, 7])
    by_length = confound_split_accuracy(length_w, length_l, length_w, length_l)
    assert by_length == (1.0, 0.0, 0.5, 0.5)  # overall: two of five longer, and half of the equal one
    without = confound_split_accuracy(*[v[[0, 1, 3, 4]] for v in (length_w, length_l, length_w, length_l)])
    assert without.overall == 0.5 == np.mean(length_w > length_l) / np.mean(length_w != length_l)
    assert without.equal is None
    found = confound_split_accuracy(torch.tensor([1.0, 0, 2, 3, 3]), torch.zeros(5), length_w, length_l)
    assert found.greater == 1.0
    assert found.less == 0.75
    assert found.equal == 1.0
    assert found.overall == pytest.approx(0.9)
    assert confound_split_accuracy([], [], [], []) == (None, None, None, None)
    with pytest.raises(InvalidInputError, match=r"attr_l has shape \(4,\)"):
        confound_split_accuracy(length_w, length_l, length_w, length_l[:4])
    with pytest.raises(InvalidInputError, match=r"r_l\[1\] is NaN"):
        confound_split_accuracy([1.0, 2], [1.0, math.nan], [1, 2], [2, 1])


def test_the_best_fitter_reaches_the_root_of_the_ratio():
    from polyreward.reward_models.bias_fitting import fit_curve

    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 5, (600,), generator=rng).float() * 20
    curve = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5])[(lengths / 20).long()]
    torch.manual_seed(0)
    for noise in (0.0, 1.0):
        reward = curve + noise * torch.randn(600, generator=rng)
        fitter = BiasFitter()
        fit_curve(fitter, reward, lengths, 150, 600, 1e-2, rng)
        best = float(correlation_ratio(reward, lengths)) ** 0.5
        with torch.no_grad():
            reached = abs(float(pearson(reward, fitter(lengths))))
        assert best - 0.01 < reached <= best + 1e-6
    assert float(correlation_ratio(curve, lengths)) == pytest.approx(1)
