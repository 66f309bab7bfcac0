import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.best_of_n import BestOfN
from polyreward.rewards.learned_verifier import LogisticVerifier, TableVerifier, VerifierFit

NAN = float("nan")


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", ("c", 1), 7]), st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 3)),
        max_size=20,
    )
)
@settings(deadline=None)
def test_table_equals_plain_counting(rows):
    keys, outcomes, weights = [k for k, _, _ in rows], [o for _, o, _ in rows], [w for _, _, w in rows]
    counts, sums = {}, {}
    for key, outcome, weight in rows:
        if not math.isnan(outcome) and weight:
            counts[key] = counts.get(key, 0) + weight
            sums[key] = sums.get(key, 0) + weight * outcome
    asked = ["a", "b", ("c", 1), 7, "never"]
    mean = VerifierFit().fit(keys, outcomes, weights)(asked)
    verdict = VerifierFit("zero_one").fit(keys, outcomes, weights)(asked)
    for key, m, v in zip(asked, mean, verdict, strict=True):
        if key not in counts:
            assert math.isnan(m)
            assert math.isnan(v)
        else:
            assert m == pytest.approx(sums[key] / counts[key])
            assert v == (2 * sums[key] > counts[key])


def test_each_loss_has_the_least_training_error_of_its_class():
    rng = np.random.default_rng(0)
    keys, outcomes = rng.integers(4, size=60), rng.integers(2, size=60).astype(float)
    squared, zero_one = (VerifierFit(loss).fit(keys, outcomes)(keys) for loss in ("squared", "zero_one"))
    for values in np.indices((3,) * 4).reshape(4, -1).T / 2:  # tables with entries 0, .5 and 1
        table = values[keys]
        assert ((outcomes - squared) ** 2).sum() <= ((outcomes - table) ** 2).sum() + 1e-9
        if set(values) <= {0.0, 1.0}:
            assert (outcomes != zero_one).sum() <= (outcomes != table).sum()


def test_a_table_of_returns_is_their_mean():
    verifier = VerifierFit().fit([3, 3, 10**12], [4.0, 8.0, -2.0])
    assert verifier([10**12, 3]).tolist() == [-2, 6]
    assert verifier(torch.tensor([3, 4])).tolist() == pytest.approx([6, NAN], nan_ok=True)
    assert verifier([]).shape == (0,)
    assert verifier.counts.sum() == 3


def test_lower_bound_is_the_least_table_within_the_tolerance():
    verifier = VerifierFit().fit(["a"] * 4 + ["b"], [1.0, 1.0, 1.0, 0.0, 1.0])
    assert verifier.lower(["a", "b", "c"], 0.0).tolist() == [0.75, 1, 0]
    lower = verifier.lower(["a", "b", "c"], 0.25)
    assert lower.tolist() == pytest.approx([0.75 - 0.25, 0.5, 0])
    # The table with that value fits worse by exactly the tolerance.
    best = sum((o - 0.75) ** 2 for o in (1, 1, 1, 0))
    assert sum((o - lower[0]) ** 2 for o in (1, 1, 1, 0)) == pytest.approx(best + 0.25)
    assert verifier.lower(["a"], 100.0, least=-1.0).tolist() == [-1]
    with pytest.raises(InvalidInputError, match="tolerance"):
        verifier.lower(["a"], -1.0)


def test_no_outcome_is_an_empty_table():
    for keys, outcomes in (([], []), (["a"], [NAN])):
        verifier = VerifierFit().fit(keys, outcomes)
        assert verifier.keys == ()
        assert np.isnan(verifier(["a"])).all()
    with pytest.raises(InvalidInputError, match="no outcome to fit to"):
        VerifierFit().fit(np.zeros((2, 3)), [NAN, NAN])
    with pytest.raises(InvalidInputError, match="no outcome to fit to"):
        VerifierFit().fit(np.zeros((0, 3)), [])


@pytest.mark.slow
def test_logistic_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 3)) * [1, 10, 0.1] + [0, 5, 1]
    y = (rng.random(200) < 1 / (1 + np.exp(-(x[:, 0] + 0.2 * x[:, 1] - 1)))).astype(float)
    scaled = (x - x.mean(0)) / x.std(0)
    peer = linear.LogisticRegression(C=0.5).fit(scaled, y)
    ours = VerifierFit("zero_one", ridge=2.0).fit(x, y)
    assert ours.probability(x) == pytest.approx(peer.predict_proba(scaled)[:, 1], abs=1e-4)


def test_squared_loss_of_features_is_at_a_minimum():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 2))
    y = (x[:, 0] + rng.normal(size=150) > 0).astype(float)
    y[:10] = 1 - y[:10]
    verifier = VerifierFit(ridge=0.5).fit(x, y)
    scale = torch.from_numpy(x.std(0))

    def total(weights, bias):
        values = torch.sigmoid(torch.from_numpy(x) @ weights + bias)
        return float(((values - torch.from_numpy(y)) ** 2).sum() + 0.25 * ((weights * scale) ** 2).sum())

    best = total(verifier.weights, verifier.bias)
    for _ in range(50):
        move = 0.05 * torch.from_numpy(rng.normal(size=3))
        assert total(verifier.weights + move[:2], verifier.bias + move[2]) > best - 1e-5
    log = VerifierFit("zero_one", ridge=0.5).fit(x, y)
    assert ((verifier(x) - y) ** 2).sum() < ((log.probability(x) - y) ** 2).sum()


def test_zero_one_threshold_makes_the_fewest_errors():
    rng = np.random.default_rng(3)
    for _ in range(10):
        x = rng.normal(size=(40, 1))
        y = (x[:, 0] + rng.normal(size=40) > rng.normal()).astype(float)
        verifier = VerifierFit("zero_one").fit(x, y)
        errors = (verifier(x) != y).sum()
        probability = verifier.probability(x)
        for cut in [*probability, 0.0, 1.1]:
            assert errors <= ((probability >= cut).astype(float) != y).sum()
            assert set(verifier(x)) <= {0.0, 1.0}


def test_equal_probabilities_have_equal_verdicts():
    x = np.zeros((5, 1))
    assert VerifierFit("zero_one").fit(x, [0, 0, 0, 1, 1])(x).tolist() == [0] * 5
    assert VerifierFit("zero_one").fit(x, [0, 1, 0, 1, 1])(x).tolist() == [1] * 5
    two = np.array([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])
    assert VerifierFit("zero_one").fit(two, [0, 0, 1, 0, 1, 1])(two).tolist() == [0, 0, 0, 1, 1, 1]


def test_outcomes_of_one_kind_have_a_finite_fit():
    for outcome in (0.0, 1.0):
        for loss in ("squared", "zero_one"):
            verifier = VerifierFit(loss).fit(np.random.default_rng(4).normal(size=(20, 2)), np.full(20, outcome))
            assert torch.isfinite(verifier.weights).all()
            assert abs(verifier.probability(np.zeros((1, 2)))[0] - outcome) < 0.05
            assert (verifier(np.zeros((1, 2))) > 0.5)[0] == bool(outcome)


def test_constant_features_shifts_and_tensors():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 2))
    y = (x[:, 0] > 0).astype(float)
    plain = VerifierFit().fit(x, y)(x)
    padded = np.column_stack([x * [100, 0.01] + [7, -3], np.ones(60)])
    assert VerifierFit().fit(padded, y)(padded) == pytest.approx(plain, abs=1e-4)
    tensor = VerifierFit().fit(torch.from_numpy(x).float(), torch.from_numpy(y))
    values = tensor(torch.from_numpy(x).float())
    assert isinstance(values, torch.Tensor)
    assert values.numpy() == pytest.approx(plain, abs=1e-4)
    weighted = VerifierFit().fit(x, y, np.r_[np.zeros(30), np.ones(30)])
    assert weighted(x) == pytest.approx(VerifierFit().fit(x[30:], y[30:])(x), abs=1e-4)
    unknown = VerifierFit().fit(np.r_[x, [[NAN, 0.0]]], np.r_[y, NAN])
    assert unknown(x) == pytest.approx(plain, abs=1e-4)
    assert np.isnan(plain.sum() + VerifierFit().fit(x, y)([[NAN, 0.0], [math.inf, 0.0]])).all()


def last_word(sample):
    words = sample.text.split()
    return words[-1] if words else None


def length(sample):
    return [len(sample.text)]


def nothing(sample):
    return [NAN]


def test_verifiers_are_rewards():
    table = VerifierFit().fit(["yes", "yes", "no"], [1.0, 0.0, 0.0]).as_reward(last_word, "says")
    assert table(None, ["oh yes", "no", "perhaps", ""]) == [0.5, 0, None, None]
    assert table.__name__ == "says"
    assert table(None, []) == []
    again = pickle.loads(pickle.dumps(table))
    assert again(None, ["yes"]) == [0.5]
    chosen = BestOfN(table).select(["a"] * 3, ["no", "yes", "perhaps"])
    assert chosen.rows.tolist() == [1]
    logistic = VerifierFit().fit([[1.0], [2.0], [8.0], [9.0]], [0, 0, 1, 1]).as_reward(length)
    short, long = logistic(None, ["a", "aaaaaaaaa"])
    assert 0 < short < 0.5 < long < 1
    assert VerifierFit().fit([[1.0], [2.0]], [0, 1]).as_reward(nothing)(None, ["a"]) == [None]
    messages = [[{"role": "assistant", "content": "yes"}], [{"role": "tool", "content": "yes"}], 5, None]
    assert table(None, messages) == [0.5, None, None, None]


def test_kinds_of_input():
    assert isinstance(VerifierFit().fit([[0.5, 1.0]], [1.0]), LogisticVerifier)
    assert isinstance(VerifierFit().fit([(0, 1), (2, 3)], [1.0, 0.0]), TableVerifier)
    assert isinstance(VerifierFit().fit(np.array([4, 5]), [1.0, 0.0]), TableVerifier)


def test_bad_input_is_named():
    for loss in ("square", None):
        with pytest.raises(UnknownNameError, match="no loss"):
            VerifierFit(loss)
    for ridge in (-1, NAN):
        with pytest.raises(InvalidInputError, match="ridge"):
            VerifierFit(ridge=ridge)
    with pytest.raises(InvalidInputError, match=r"outcomes\[1\] is 0\.5, expected 0 or 1"):
        VerifierFit("zero_one").fit(["a", "b"], [1, 0.5])
    with pytest.raises(InvalidInputError, match=r"outcomes\[0\] is 3, expected a number in \[0, 1\]"):
        VerifierFit().fit([[1.0]], [3.0])
    with pytest.raises(InvalidInputError, match=r"outcomes\[0\] is inf, expected a finite number"):
        VerifierFit().fit(["a"], [math.inf])
    with pytest.raises(InvalidInputError, match=r"outcomes has shape \(1,\), expected \(2,\)"):
        VerifierFit().fit(["a", "b"], [1.0])
    with pytest.raises(InvalidInputError, match=r"weights\[1\] is -1"):
        VerifierFit().fit(["a", "b"], [1.0, 0.0], [1, -1])
    with pytest.raises(InvalidInputError, match=r"features\[1, 0\] is nan"):
        VerifierFit().fit([[0.0], [NAN]], [1.0, 0.0])
    with pytest.raises(InvalidInputError, match=r"features have shape \(1, 2\), expected \(M, 1\)"):
        VerifierFit().fit([[0.0], [1.0]], [1.0, 0.0])(np.zeros((1, 2)))
    with pytest.raises(InvalidInputError, match="keys must be integers or strings"):
        VerifierFit().fit([0.5], [1.0])
