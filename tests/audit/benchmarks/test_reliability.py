import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.audit.benchmarks.intervals import BLOCKS, blocked, bootstrap_ratios, wilson
from polyreward.audit.benchmarks.reliability import (
    accuracy_by,
    calibration_curve,
    length_only_accuracy,
    length_partial_effect,
    pairwise_calibration,
)
from polyreward.errors import InvalidInputError


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_curve_by_hand():
    curve = calibration_curve([0.1, 0.3, 0.9, 1.0], [0, 1, 1, 0.5], bins=2, resamples=50)
    assert curve.edges.tolist() == [0, 0.5, 1]
    assert curve.count.tolist() == [2, 2]
    assert curve.stated == pytest.approx([0.2, 0.95])
    assert curve.happened == pytest.approx([0.5, 0.75])
    assert curve.ece == pytest.approx(0.5 * 0.3 + 0.5 * 0.2)
    assert curve.brier == pytest.approx((0.01 + 0.49 + 0.01 + 0.25) / 4)
    assert curve.reliability == pytest.approx(0.5 * 0.09 + 0.5 * 0.04)
    assert curve.resolution == pytest.approx(0.125**2)
    assert curve.uncertainty == pytest.approx(0.625 * 0.375)
    assert (curve.low <= curve.happened).all()
    empty = calibration_curve([0.1], [0], bins=4, resamples=5)
    assert np.isnan(empty.stated[1:]).all()
    assert empty.low[1:].tolist() == [0] * 3
    assert empty.high[1:].tolist() == [1] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from(["width", "mass"]))
def test_ece_equals_plain_python(seed, bins, strategy):
    rng = np.random.default_rng(seed)
    p, y = rng.random(30).round(1), rng.integers(0, 2, 30)
    curve = calibration_curve(p, y, bins=bins, strategy=strategy, resamples=2)
    total = 0.0
    for b, (low, high) in enumerate(zip(curve.edges[:-1], curve.edges[1:], strict=True)):
        last = b == len(curve.edges) - 2
        inside = [i for i in range(30) if low <= p[i] < high or (last and p[i] == high)]
        assert len(inside) == curve.count[b]
        total += abs(sum(y[i] - p[i] for i in inside)) / 30
    assert curve.ece == pytest.approx(total)
    assert curve.count.sum() == 30


def test_calibrated_and_overconfident_probabilities():
    rng = np.random.default_rng(0)
    d = 2 * rng.normal(size=4000)
    y = (rng.random(4000) < sigmoid(d)).astype(float)
    good, sure = pairwise_calibration(sigmoid(d), y), pairwise_calibration(sigmoid(3 * d), y)
    assert good.ece < 0.02
    assert good.ece_interval[0] < 0.01
    assert sure.ece > 0.08
    assert sure.ece_interval[0] > good.ece_interval[1]
    assert sure.ece_interval[0] < sure.ece < sure.ece_interval[1]
    for curve in (good, sure):
        assert curve.brier == pytest.approx(curve.reliability - curve.resolution + curve.uncertainty, abs=0.01)
    assert sure.log_loss > good.log_loss


def test_pairwise_calibration_does_not_depend_on_the_order_in_a_pair():
    rng = np.random.default_rng(0)
    p, y = rng.random(200), rng.choice([0, 0.5, 1], 200)
    p[:5] = 0.5
    swap = rng.random(200) < 0.5
    one, other = pairwise_calibration(p, y), pairwise_calibration(np.where(swap, 1 - p, p), np.where(swap, 1 - y, y))
    assert one.happened == pytest.approx(other.happened)
    assert one.ece == pytest.approx(other.ece)
    assert (one.edges[0], one.edges[-1], one.uncertainty) == (0.5, 1.0, 0.25)
    # by default the first was preferred
    assert pairwise_calibration([0.9, 0.2]).happened[[6, 8]].tolist() == [0.0, 1.0]


def test_wrong_probabilities():
    for p, y, message in (
        ([1.2], [1], r"probabilities\[0\] is 1.2"),
        ([0.2], [2], r"outcomes\[0\] is 2"),
        ([np.nan], [1], "nan"),
        ([], [], "got 0 and 0"),
        ([0.5], [1, 0], "got 1 and 2"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            calibration_curve(p, y)
    with pytest.raises(InvalidInputError, match="bins from 1"):
        calibration_curve([0.5], [1], bins=0)
    with pytest.raises(InvalidInputError, match="in \\[0, 1\\]"):
        pairwise_calibration([1.5])


def test_the_length_effect_is_found_again():
    rng = np.random.default_rng(0)
    d, length = rng.normal(size=(2, 20_000))
    y = (rng.random(20_000) < sigmoid(1.5 * d - 0.4 * length)).astype(float)
    found = length_partial_effect(3 * d, 10 * length, y)
    assert found.score == pytest.approx(1.5, abs=0.06)
    assert found.length == pytest.approx(-0.4, abs=0.05)
    assert found.length_interval[0] < -0.4 < found.length_interval[1]
    assert found.length_interval[1] < 0
    assert found.odds_ratio == pytest.approx(np.exp(found.length))
    assert (found.margin_deviation, found.length_deviation) == pytest.approx((3, 10), rel=0.02)
    assert abs(found.correlation) < 0.03
    assert (found.separable, found.pairs) == (False, 20_000)
    # units and the order in a pair change nothing
    flip = rng.random(20_000) < 0.5
    again = length_partial_effect(np.where(flip, -d, d), np.where(flip, -length, length), np.where(flip, 1 - y, y))
    assert (again.score, again.length) == pytest.approx((found.score, found.length))
    assert again.correlation == pytest.approx(found.correlation)
    assert again.length_interval == pytest.approx(found.length_interval)


def test_the_length_effect_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 2))
    y = (rng.random(300) < sigmoid(x @ [1.0, 0.5])).astype(int)
    found = length_partial_effect(x[:, 0], x[:, 1], y)
    scale = np.sqrt((x**2).mean(axis=0))
    peer = LogisticRegression(fit_intercept=False, C=1e3, tol=1e-10).fit(x / scale, y)
    assert (found.score, found.length) == pytest.approx(tuple(peer.coef_[0]), abs=1e-4)


def test_separable_preferences_stay_finite():
    found = length_partial_effect([1.0, 2.0, 3.0], [1.0, -1.0, 2.0])
    assert found.separable
    assert np.isfinite([found.score, found.length, *found.score_interval, *found.length_interval]).all()
    assert found.score_interval[0] < found.score
    assert not length_partial_effect([1.0, -2.0, 3.0, 1.0], [1.0, -1.0, 2.0, -3.0]).separable


def test_wrong_length_effects():
    for margin, length, preferred, message in (
        ([0.0, 0.0], [1, 2], None, "margin is 0 in all 2 pairs"),
        ([1.0, 2.0], [0, 0], None, "length_difference is 0"),
        ([1.0, 2.0], [1, 2], [0.5, 1], "needs two pairs"),
        ([1.0, 2.0], [1, 2], [0.3, 1], r"preferred\[0\] is 0.3"),
        ([1.0], [1, 2], None, "1, 2 and 1 entries"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            length_partial_effect(margin, length, preferred)


def test_accuracy_by_annotator():
    found = accuracy_by(["b", "a", "b", "b", "c"], [1.0, -1, 0, -2, 1], [1, 0, 1, 1, 0.5])
    assert [(g.name, g.accuracy, g.pairs) for g in found] == [("b", 0.5, 3), ("a", 1.0, 1)]
    assert found[0].low < 0.5 < found[0].high
    assert found[1].high == 1
    assert accuracy_by(np.array([], int), [], []) == []
    with pytest.raises(InvalidInputError, match="labels has 1 entries for 2"):
        accuracy_by(["a"], [1.0, 2.0])


def test_length_alone():
    found = length_only_accuracy([3, 1, 2, 5], [1, 2, 2, 1], [1, 1, 1, 0.5])
    assert (found.accuracy, found.pairs) == (0.5, 3)
    with pytest.raises(InvalidInputError, match="no pair"):
        length_only_accuracy([1], [2], [0.5])
    with pytest.raises(InvalidInputError, match="got 1 and 2"):
        length_only_accuracy([1], [2, 3])


def test_intervals():
    # Wilson's interval of 8 of 10
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = bootstrap_ratios(np.array([[1.0, 0.0], [1.0, 0.0]]), resamples=20)
    assert (high[0], low[1]) == (1.0, 0.0)
    assert low[0] < 0.5 < high[1]
    nothing, _ = bootstrap_ratios(np.zeros((3, 1)), np.zeros((3, 1)), resamples=5)
    assert np.isnan(nothing).all()


def test_many_items_are_resampled_in_blocks():
    rng = np.random.default_rng(0)
    won = (rng.random((25_000, 1)) < 0.3).astype(float)
    sums = blocked(np.concatenate([won, np.ones_like(won)], axis=1), rng)
    assert len(sums) == BLOCKS
    assert sums.sum(axis=0).tolist() == [won.sum(), 25_000]
    assert set(sums[:, 1]) == {2.0, 3.0}
    low, high = bootstrap_ratios(won, resamples=300)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 25_000), rel=0.2)
    assert np.array_equal(blocked(won[:5], rng), won[:5])
