import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr, weightedtau

from polyreward.audit.benchmarks.validity import benchmark_validity, predictive_validity, selection_reliability
from polyreward.errors import InvalidInputError, UnknownNameError

BENCH, DOWN = (0.9, 0.8, 0.7, 0.6), (1.2, 1.3, 1.0, 0.9)


def test_four_models_by_hand():
    found = predictive_validity(BENCH, DOWN, n_boot=50)
    assert found["spearman"] == pytest.approx(0.8)
    assert found["weighted_tau"] == pytest.approx(0.52)
    assert found["ndcg"] == pytest.approx(0.987467, abs=1e-6)
    assert found["rbo"] == pytest.approx(0.9)
    assert found["models"] == 4
    assert set(found["ci95"]) == {"spearman", "weighted_tau", "ndcg", "rbo"}
    by_rank = predictive_validity(BENCH, DOWN, ("ndcg", "rbo_truncated"), 0, ndcg_relevance="rank")
    assert by_rank["ndcg"] == pytest.approx(0.922495, abs=1e-6)
    assert by_rank["rbo_truncated"] == pytest.approx(0.2439)
    assert "ci95" not in by_rank


def test_the_papers_figures_are_those_of_six_models():
    # sums of squared differences of rank of 26 and 22
    for order, squares, rho in (([0, 2, 3, 5, 4, 1], 22, 0.3714), ([0, 2, 4, 5, 3, 1], 26, 0.2571)):
        assert sum((a - b) ** 2 for a, b in enumerate(order)) == squares
        assert predictive_validity(range(6), order, ["spearman"], 0)["spearman"] == pytest.approx(rho, abs=1e-4)
    assert predictive_validity(range(6), range(6), n_boot=0)["spearman_se"] == pytest.approx(0.4472, abs=1e-4)


def test_equal_and_reversed_orders():
    same = predictive_validity([1, 2, 3, 4], [10, 20, 30, 40], n_boot=0)
    assert [same[name] for name in ("spearman", "weighted_tau", "ndcg", "rbo")] == pytest.approx([1, 1, 1, 1])
    back = predictive_validity([1, 2, 3, 4], [40, 30, 20, 10], n_boot=0)
    assert (back["spearman"], back["weighted_tau"]) == pytest.approx((-1, -1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_equals_scipy_and_scikit_learn_with_ties(seed, models):
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, models).astype(float), rng.integers(0, 4, models).astype(float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    found = predictive_validity(x, y, n_boot=0)
    assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert found["weighted_tau"] == pytest.approx(weightedtau(x, y).statistic)
    assert found["ndcg"] == pytest.approx(ndcg_score(y[None], x[None]))


def test_bootstrap_over_items_is_narrower_with_more_items():
    rng = np.random.default_rng(0)
    skill = np.linspace(0.55, 0.95, 6)
    widths = []
    for items in (50, 5000):
        right = rng.random((6, items)) < skill[:, None]
        found = predictive_validity(right, skill, ["spearman"], 200)
        low, high = found["ci95"]["spearman"]
        widths.append(high - low)
    assert widths[1] < widths[0]
    paired = predictive_validity(right, right * 1.0, ["spearman"], 100, paired=True)
    assert paired["ci95"]["spearman"] == (1.0, 1.0)
    apart = predictive_validity(right[:, :100], right[:, :100] * 1.0, ["spearman"], 100)
    assert apart["ci95"]["spearman"][0] < 1
    with pytest.raises(InvalidInputError, match="paired items need one shape"):
        predictive_validity(right, right[:, :5], paired=True)


def test_wrong_validity_input():
    with pytest.raises(UnknownNameError, match="did you mean 'spearman'"):
        predictive_validity(BENCH, DOWN, ["spaerman"])
    with pytest.raises(InvalidInputError, match="figures from 0 up"):
        predictive_validity(BENCH, [-1, 0, 1, 2])
    assert predictive_validity(BENCH, [-1, 0, 1, 2], ["spearman"], 0)["spearman"] == pytest.approx(-1)
    with pytest.raises(InvalidInputError, match="they have no order"):
        predictive_validity([1, 1, 1], [1, 2, 3])
    with pytest.raises(InvalidInputError, match="got 4, 3"):
        predictive_validity(BENCH, [1, 2, 3])
    with pytest.raises(InvalidInputError, match=r"bench\[1, 0\] is nan"):
        predictive_validity([[1.0], [np.nan]], [1, 2])
    with pytest.raises(InvalidInputError, match="3 or more models"):
        benchmark_validity([1, 2], [1, 2])
    with pytest.raises(InvalidInputError, match="persistence"):
        predictive_validity(BENCH, DOWN, persistence=1.0)


def test_r_square_of_a_line_and_of_noise():
    x = np.arange(6.0)
    line = benchmark_validity(x, 3 - 2 * x)
    assert line["r2"] == pytest.approx(1)
    assert line["pearson"] == pytest.approx(-1)
    assert line["ci95"]["r2"] == pytest.approx((1, 1))
    assert line["r2_leave_one_out"] == pytest.approx((1, 1))
    rng = np.random.default_rng(0)
    found = benchmark_validity(rng.normal(size=12), rng.normal(size=12))
    low, high = found["ci95"]["r2"]
    assert 0 <= low < found["r2"] + 0.2
    assert high > 0.3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_validity_equals_numpy_on_every_left_out_model(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=6), rng.integers(0, 3, 6).astype(float)
    if np.ptp(y) == 0:
        return
    found = benchmark_validity(x, y, n_boot=20)
    assert found["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    kept = [np.delete(np.arange(6), i) for i in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r2 = [np.corrcoef(x[k], y[k])[0, 1] ** 2 for k in kept if np.ptp(y[k]) > 0]
        rho = [spearmanr(x[k], y[k]).statistic for k in kept if np.ptp(y[k]) > 0]
    assert found["r2_leave_one_out"] == pytest.approx((min(r2), max(r2)), abs=1e-9)
    assert found["spearman_leave_one_out"] == pytest.approx((min(rho), max(rho)), abs=1e-9)


def test_families_are_left_out_together():
    x, y = [1.0, 1.1, 2, 3, 4], [5.0, 5.1, 1, 3, 2]
    found = benchmark_validity(x, y, families=["a", "a", "b", "c", "d"], n_boot=50)
    assert (found["models"], found["families"]) == (5, 4)
    without = np.corrcoef(x[2:], y[2:])[0, 1] ** 2
    assert found["r2_leave_one_out"][0] == pytest.approx(without)
    with pytest.raises(InvalidInputError, match="families has 1"):
        benchmark_validity(x, y, families=["a"])


def test_more_comparisons_predict_selection_better():
    rng = np.random.default_rng(0)
    # each model misses some types of error altogether
    blind = rng.random((8, 5)) < np.linspace(0.05, 0.6, 8)[:, None]
    types = rng.integers(5, size=(200, 9))
    wrong = np.where(blind[:, types], 1.0, -1.0) + 0.1 * rng.normal(size=(8, 200, 9))
    scores = np.concatenate([np.zeros((8, 200, 1)), wrong], axis=2)
    found = selection_reliability(scores, [1, 3], problems=25, splits=60)
    assert found[1] < found[3] < 1
    assert selection_reliability(scores, [9], held_out=9, splits=5)[9] > 0.9
    with pytest.raises(InvalidInputError, match="up to 100 for the benchmark"):
        selection_reliability(scores, [1], problems=101)
    with pytest.raises(InvalidInputError, match="from 1 to 9"):
        selection_reliability(scores, [10])
    # models without any difference cannot be told apart
    assert selection_reliability(np.zeros((3, 8, 3)), [1], held_out=1, splits=2) == {1: 0.0}
