import numpy as np
import pytest

from polyreward.errors import InvalidInputError
from polyreward.tasks.length_depth import LENGTHS, LengthDepth, LengthPolicy, brevity_loving, surrogate

TASK = LengthDepth(np.array([True, True, False]), np.array([2, 6, 3]))


def test_worth_of_every_length():
    worth = TASK.worth()
    assert worth[0].tolist() == [0.25] + [0.9] * 7
    assert worth[1].tolist() == [0.25] * 5 + [0.9] * 3
    assert worth[2] == pytest.approx([np.exp(-((l - 3) ** 2) / 2.88) for l in range(1, 9)])
    assert worth[2].max() == worth[2][2] == 1


def test_half_of_the_questions_can_be_checked():
    task = LengthDepth.draw(np.random.default_rng(0))
    assert task.verifiable.sum() == 30
    assert (task.wanted[:30].min(), task.wanted[:30].max()) == (2, 6)
    assert (task.wanted[30:].min(), task.wanted[30:].max()) == (2, 5)
    with pytest.raises(InvalidInputError, match="at least two questions"):
        LengthDepth.draw(np.random.default_rng(0), 1)


def test_truth_is_drawn_where_it_can_be_checked_and_exact_elsewhere():
    lengths = np.tile([1, 8], (3, 20_000))
    truth = TASK.truth(lengths, np.random.default_rng(0))
    assert set(np.unique(truth[:2])) == {0, 1}
    assert truth[0, ::2].mean() == pytest.approx(0.25, abs=0.01)
    assert truth[1, 1::2].mean() == pytest.approx(0.9, abs=0.01)
    assert truth[2, :2] == pytest.approx([np.exp(-4 / 2.88), np.exp(-25 / 2.88)])


def test_the_scores_that_stand_in_for_models():
    rng = np.random.default_rng(0)
    truth = np.repeat([0.0, 1.0], 20_000)
    short, long = (brevity_loving(truth, np.full(40_000, l), rng) for l in (1, 8))
    assert short.mean() - long.mean() > 0.3
    assert 0.1 < short[20_000:].mean() - short[:20_000].mean() < 0.3
    close = surrogate(truth, rng)
    assert ((close >= 0) & (close <= 1)).all()
    assert close[:20_000].mean() == pytest.approx(0.1 / np.sqrt(2 * np.pi), abs=0.005)


def test_the_policy_samples_what_it_says():
    policy = LengthPolicy(3)
    chances, form = policy.chances()
    weights = np.exp(-0.55 * LENGTHS)
    assert chances == pytest.approx(np.tile(weights / weights.sum(), (3, 1)))
    assert form == pytest.approx(1 / (1 + np.e))
    lengths, kept = policy.sample(40_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(float(chances[0] @ LENGTHS), abs=0.02)
    assert kept.mean() == pytest.approx(form[0], abs=0.01)
    measured = policy.measure(TASK)
    assert measured["accuracy"] == pytest.approx(float((chances[:2] * TASK.worth()[:2]).sum() / 2))
    assert measured["quality"] == pytest.approx(float(chances[2] @ TASK.worth()[2]))


def test_a_step_follows_the_gradient_of_the_expected_advantage():
    policy = LengthPolicy(1)
    before, form = policy.chances()
    policy.learn(np.array([[2, 5]]), np.array([[True, False]]), np.array([[1.0, -0.5]]), 0.5)
    expected = -0.55 * LENGTHS + 0.5 * ((LENGTHS == 2) - before[0] - 0.5 * ((LENGTHS == 5) - before[0])) / 2
    assert policy.logits[0] == pytest.approx(expected)
    assert policy.form[0] == pytest.approx(-1 + 0.5 * ((1 - form[0]) - 0.5 * (0 - form[0])) / 2)
