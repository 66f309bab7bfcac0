import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.curricula import AdvantageBandit
from polyreward.errors import InvalidInputError, UnknownNameError

NAMES = ["a", "b", "c"]


def heard(learnability, counts, **options):
    """A bandit after `counts` rollouts of constant advantage `learnability` for each source."""
    bandit = AdvantageBandit(NAMES, **options)
    bandit.update(np.repeat(np.arange(3), counts), np.repeat(learnability, counts))
    return bandit


class TestOracles:
    def test_a_source_never_drawn_takes_all(self):
        bandit = heard([0.9, 0.5, 0.0], [160, 160, 0])
        np.testing.assert_allclose(bandit.learnability(), [0.9, 0.5, 0.0])
        np.testing.assert_allclose(bandit.scores(), [1.1678, 0.7678, 3.3975], atol=5e-5)
        np.testing.assert_allclose(bandit.probabilities(), [0, 0, 1], atol=1e-8)

    def test_after_many_rollouts_the_learnable_source_leads(self):
        bandit = heard([0.9, 0.5, 0.2], [1600, 1600, 800])
        np.testing.assert_allclose(bandit.scores(), [1.0018, 0.6018, 0.3439], atol=5e-5)
        np.testing.assert_allclose(bandit.probabilities(), [0.9807, 0.0180, 0.0014], atol=5e-5)

    def test_equal_sources_are_uniform(self):
        np.testing.assert_allclose(heard([0.4, 0.4, 0.4], [50, 50, 50]).probabilities(), np.full(3, 1 / 3))
        np.testing.assert_array_equal(AdvantageBandit(NAMES).probabilities(), np.full(3, 1 / 3))

    def test_a_constant_added_to_all_learnabilities_changes_nothing(self):
        np.testing.assert_allclose(
            heard([0.3, 0.1, 0.2], [400, 300, 500]).probabilities(),
            heard([0.8, 0.6, 0.7], [400, 300, 500]).probabilities(),
        )

    def test_temperature_limits(self):
        cold, hot = (heard([0.9, 0.8, 0.7], [500] * 3, temperature=t).probabilities() for t in (1e-4, 1e6))
        np.testing.assert_allclose(cold, [1, 0, 0], atol=1e-12)
        np.testing.assert_allclose(hot, np.full(3, 1 / 3), atol=1e-6)

    @pytest.mark.parametrize(("successes", "expected"), [(8, 1.0), (1, 0.4841), (0, 0.0), (16, 0.0)])
    def test_binary_group_is_worth_twice_its_deviation(self, successes, expected):
        rewards = np.array([1.0] * successes + [0.0] * (16 - successes))
        deviation = rewards.std()
        bandit = AdvantageBandit(NAMES)
        bandit.update(["b"] * 16, (rewards - rewards.mean()) / (deviation if deviation > 0 else 1.0))
        np.testing.assert_allclose(bandit.learnability(), [0, expected, 0], atol=5e-5)
        assert bandit.counts.tolist() == [0, 16, 0]

    def test_300_zeros_empty_the_window_and_the_count_goes_on(self):
        bandit = heard([0.9, 0.5, 0.7], [250, 1000, 33])
        bandit.update(["a"] * 300, np.zeros(300))
        assert bandit.learnability()[0] == 0.0
        assert bandit.counts.tolist() == [550, 1000, 33]

    def test_zeros_enter_the_window(self):
        bandit = heard([0.8, 0.8, 0.8], [100, 100, 100])
        bandit.update(["c"] * 100, np.zeros(100))
        np.testing.assert_allclose(bandit.learnability(), [0.8, 0.8, 0.4])

    def test_score_difference_becomes_weight_ratio(self):
        w = heard([0.6, 0.4, 0.0], [1000] * 3).probabilities()
        assert w[0] / w[1] == pytest.approx(math.exp(10 * 0.2))

    def test_absolute_value_is_taken(self):
        bandit = AdvantageBandit(NAMES)
        bandit.update(["a", "a"], [-1.0, 1.0])
        assert bandit.learnability()[0] == 1.0

    def test_no_bonus_and_floor(self):
        np.testing.assert_allclose(heard([0.9, 0.5, 0.0], [9, 9, 0], exploration=0).scores(), [0.9, 0.5, 0.0])
        plain, floored = (heard([0.9, 0.2, 0.1], [500] * 3, floor=f).probabilities() for f in (0.0, 0.3))
        np.testing.assert_allclose(floored, 0.7 * plain + 0.1)


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(-5, 5)), max_size=12), max_size=6),
    window=st.integers(1, 7),
    temperature=st.floats(0.05, 3),
)
def test_equals_a_plain_loop(batches, window, temperature):
    bandit = AdvantageBandit(NAMES, window=window, temperature=temperature)
    history: list[list[float]] = [[], [], []]
    for batch in batches:
        bandit.update(np.array([s for s, _ in batch], dtype=np.int64), np.array([a for _, a in batch]))
        for source, advantage in batch:
            history[source].append(abs(advantage))
    counts = [len(h) for h in history]
    total = max(1, sum(counts))
    scores = []
    for h in history:
        recent = h[-window:]
        value = sum(recent) / len(recent) if recent else 0.0
        scores.append(value + math.sqrt(2 * math.log(total + 1) / (len(h) + 1)))
    weights = [math.exp((s - max(scores)) / temperature) for s in scores]
    np.testing.assert_allclose(bandit.probabilities(), np.array(weights) / sum(weights), rtol=1e-9, atol=1e-12)
    assert bandit.counts.tolist() == counts


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(list(range(12))))
def test_order_within_a_batch_that_fits_the_window_does_not_matter(order):
    sources, advantages = np.arange(12) % 3, np.linspace(-2, 2, 12)
    first, second = AdvantageBandit(NAMES), AdvantageBandit(NAMES)
    first.update(sources, advantages)
    second.update(sources[order], advantages[order])
    np.testing.assert_allclose(first.probabilities(), second.probabilities(), rtol=1e-12)


def test_a_resumed_bandit_goes_on_alike():
    rng = np.random.default_rng(0)
    bandit = AdvantageBandit(NAMES, window=10)
    for _ in range(7):
        bandit.update(rng.integers(0, 3, 9), rng.normal(size=9))
    resumed = AdvantageBandit(NAMES, window=10)
    resumed.load_state_dict(json.loads(json.dumps(bandit.state_dict())))
    np.testing.assert_array_equal(resumed.probabilities(), bandit.probabilities())
    for each in (bandit, resumed):
        each.update(["a"] * 4 + ["c"] * 8, np.arange(12.0))
    np.testing.assert_array_equal(resumed.probabilities(), bandit.probabilities())
    assert resumed.state_dict() == bandit.state_dict()


def test_state_that_does_not_fit_is_refused():
    state = heard([1, 1, 1], [5, 5, 5]).state_dict()
    with pytest.raises(InvalidInputError, match="window=3"):
        AdvantageBandit(NAMES, window=3).load_state_dict(state)
    with pytest.raises(InvalidInputError, match="sources"):
        AdvantageBandit(["a", "b"]).load_state_dict(state)


def test_nan_is_refused_and_leaves_the_state_alone():
    bandit = heard([0.9, 0.5, 0.2], [5, 5, 5])
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=r"row 1 \(source 'b'\) is nan"):
        bandit.update(["a", "b"], torch.tensor([1.0, float("nan")]))
    assert bandit.state_dict() == before


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 2.5},
        {"window": "many"},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"exploration": -1},
        {"exploration": math.inf},
        {"exploration": math.nan},
        {"floor": 1.5},
        {"floor": math.nan},
    ],
)
def test_parameters_outside_their_range_are_refused(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        AdvantageBandit(NAMES, **options)


def test_unknown_sources_are_refused_before_the_state_changes():
    bandit = AdvantageBandit(["maths", "code"])
    for kind in (UnknownNameError, ValueError):
        with pytest.raises(kind, match="did you mean 'maths'"):
            bandit.update(["code", "math"], [1.0, 1.0])
    for source in (2, -1):
        with pytest.raises(ValueError, match="positions are 0 to 1"):
            bandit.update([0, source], [1.0, 1.0])
    with pytest.raises(InvalidInputError, match="the single string 'maths'"):
        bandit.update("maths", [1.0] * 5)
    assert bandit.counts.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("counts"), "no 'counts'"),
        (lambda state: state.pop("values"), "no 'values'"),
        (lambda state: state.update(counts=[5, 5]), "counts"),
        (lambda state: state.update(counts="x"), "no numbers"),
        (lambda state: state["values"][1].__setitem__(0, "x"), "no numbers"),
        (lambda state: state.update(counts=[5, 5, -5]), "counts"),
        (lambda state: state["values"][1].pop(), "does not fit window=300"),
        (lambda state: state["values"][1].__setitem__(0, math.nan), "not finite"),
    ],
)
def test_a_damaged_state_is_refused_and_leaves_the_bandit_alone(change, message):
    state, bandit = heard([1, 1, 1], [5, 5, 5]).state_dict(), heard([0.5, 0, 0], [2, 0, 0])
    change(state)
    before = bandit.state_dict()
    with pytest.raises(InvalidInputError, match=message):
        bandit.load_state_dict(state)
    assert bandit.state_dict() == before


def test_a_batch_larger_than_the_window_leaves_its_last_values():
    bandit = AdvantageBandit(NAMES, window=4)
    bandit.update(["a"] * 11, [9.0] * 7 + [1.0, 2.0, 3.0, 4.0])
    assert bandit.learnability()[0] == 2.5
    assert bandit.counts[0] == 11
    bandit.update(["a"], [-5.0])
    assert bandit.state_dict()["values"][0] == [2.0, 3.0, 4.0, 5.0]


def test_a_temperature_near_zero_is_the_argmax_without_warnings(recwarn):
    np.testing.assert_array_equal(heard([0.9, 0.8, 0.7], [500] * 3, temperature=1e-310).probabilities(), [1, 0, 0])
    assert not recwarn
