import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.audit.benchmarks.best_of_n import best_of_k, best_of_n_curve, bon_kl
from polyreward.errors import InvalidInputError


def test_the_divergence():
    expected = {1: 0.0, 2: 0.193147, 4: 0.636294, 16: 1.835089, 256: 4.549084}
    for n, value in expected.items():
        assert bon_kl(n) == pytest.approx(value, abs=1e-6)
    assert bon_kl(np.array(list(expected))) == pytest.approx(list(expected.values()), abs=1e-6)


def test_a_perfect_reward_and_one_that_says_nothing():
    rng = np.random.default_rng(0)
    right = (rng.random((5000, 8)) < 0.3).astype(float)
    curve = best_of_n_curve(right, right, [1, 2, 4, 8])
    assert curve == pytest.approx([1 - 0.7**n for n in (1, 2, 4, 8)], abs=0.02)
    constant = np.zeros_like(right)
    assert best_of_n_curve(constant, right, [1, 4]) == pytest.approx([right.mean()] * 2)
    assert best_of_n_curve(constant, right, [1, 4], ties="first") == pytest.approx([0.3, 0.3], abs=0.02)
    assert best_of_n_curve(constant, right, [1, 4], how="prefix", ties="first") == pytest.approx(
        [right[:, 0].mean()] * 2
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["mean", "first"]))
def test_the_curve_is_the_mean_over_all_subsets(seed, n, ties):
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(0, 3, size=(2, 5)), rng.integers(0, 2, size=(2, 5))
    found = []
    for q in range(2):
        for subset in itertools.combinations(range(5), n):
            top = [i for i in subset if scores[q, i] == max(scores[q, list(subset)])]
            found.append(right[q, top[0]] if ties == "first" else right[q, top].mean())
    assert best_of_n_curve(scores, right, [n], ties=ties)[0] == pytest.approx(np.mean(found))


def test_ties_go_to_the_most_frequent_answer():
    scores = [[1, 1, 1, 1, 0]]
    answers = [["x", "y", "y", "z", "x"]]
    right = [[0, 1, 1, 0, 0]]
    # first two: x and y once each, so the first; then y leads; the low x does not vote
    assert best_of_n_curve(scores, right, [1, 2, 3, 5], how="prefix", ties="majority", answers=answers).tolist() == [
        0, 0, 1, 1,
    ]  # fmt: skip
    all_ = best_of_n_curve(scores, right, [5], ties="majority", answers=answers, draws=4)
    assert all_.tolist() == [1]
    one = best_of_n_curve(scores, right, [1], ties="majority", answers=answers, draws=400)
    assert one[0] == pytest.approx(0.4, abs=0.08)
    with pytest.raises(InvalidInputError, match="needs the answers"):
        best_of_n_curve(scores, right, [1], ties="majority")
    with pytest.raises(InvalidInputError, match=r"answers\[0\] has 2 samples"):
        best_of_n_curve(scores, right, [1], ties="majority", answers=[["x", "y"]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_majority_equals_plain_python(seed):
    rng = np.random.default_rng(seed)
    scores, right, answers = rng.integers(0, 2, (3, 6)), rng.integers(0, 2, (3, 6)), rng.integers(0, 3, (3, 6))
    expected = []
    for n in (1, 3, 6):
        picks = []
        for q in range(3):
            top = [i for i in range(n) if scores[q, i] == scores[q, :n].max()]
            votes = [sum(answers[q, j] == answers[q, i] for j in top) for i in top]
            picks.append(right[q, top[votes.index(max(votes))]])
        expected.append(np.mean(picks))
    found = best_of_n_curve(scores, right, [1, 3, 6], how="prefix", ties="majority", answers=answers.tolist())
    assert found == pytest.approx(expected)


def test_the_best_of_the_first_k():
    scores = np.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    values = np.array([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]])
    found = best_of_k(scores, values, [1, 2, 4])
    assert list(found) == [1, 2, 4]
    assert [mean for mean, _ in found.values()] == [5.5, 10.5, 10.5]
    assert found[1][1] == pytest.approx(np.std([10, 1], ddof=1) / np.sqrt(2))
    # of equal scores the first: more samples change nothing for a constant scorer
    assert best_of_k(scores[1:], values[1:], [4])[4][0] == 1
    assert best_of_k(torch.tensor(scores), torch.tensor(values), [4])[4] == found[4]


def test_the_oracle_never_falls():
    values = np.random.default_rng(0).normal(size=(50, 32))
    for row in values:
        means = [mean for mean, _ in best_of_k(row[None], row[None], [1, 2, 4, 8, 16, 32]).values()]
        assert (np.diff(means) >= 0).all()
    assert best_of_k(values, values, [1])[1][0] == values[:, 0].mean()


def test_items_without_a_value_take_no_part():
    values = np.array([[np.nan, 2.0], [4.0, 1.0]])
    assert best_of_k([[1, 0], [1, 0]], values, [1])[1][0] == 4
    mean, error = best_of_k([[1, 0]], values[:1], [1])[1]
    assert np.isnan(mean)
    assert np.isnan(error)


def test_wrong_input():
    table = np.zeros((2, 3))
    for bad in (0, 4, 1.5, True):
        with pytest.raises(InvalidInputError, match="whole number from 1 to 3"):
            best_of_n_curve(table, table, [bad])
    with pytest.raises(InvalidInputError, match="one shape"):
        best_of_n_curve(table, table[:1], [1])
    with pytest.raises(InvalidInputError, match=r"scores\[1, 2\] is nan"):
        best_of_n_curve(np.where(np.arange(6).reshape(2, 3) == 5, np.nan, 0), table, [1])
    with pytest.raises(InvalidInputError, match="how must be"):
        best_of_n_curve(table, table, [1], how="random")
    with pytest.raises(InvalidInputError, match="2 dimensions"):
        best_of_k([1.0], [1.0], [1])
