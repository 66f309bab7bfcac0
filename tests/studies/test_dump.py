import itertools

import numpy as np
import pytest

from polyreward.curricula import AdvantageBandit
from polyreward.studies.base import StudyConfig
from polyreward.studies.dump import (
    DIFFICULTIES,
    GROUP,
    NAMES,
    STUDY,
    Puzzles,
    SignedBandit,
    _mean_product,
    run_seed,
)


def test_mean_product_equals_enumeration():
    chances = np.random.default_rng(0).random(7)
    expected = [
        np.mean([np.prod(chances[list(subset)]) for subset in itertools.combinations(range(7), size)])
        for size in range(5)
    ]
    np.testing.assert_allclose(_mean_product(chances, 4), expected)


def test_a_fresh_policy_solves_a_puzzle_by_chance():
    np.testing.assert_allclose(Puzzles.fresh(np.random.default_rng(0)).success(), 3.0**-DIFFICULTIES)


def test_only_the_skills_of_the_puzzles_move():
    rng = np.random.default_rng(0)
    puzzles = Puzzles.fresh(rng)
    no = np.zeros(32, dtype=bool)
    advantages = puzzles.step(np.zeros(32, dtype=np.int64), no, no, True, rng)
    assert advantages.shape == (32 * GROUP,)
    assert np.abs(puzzles.logits[:60]).max() > 0
    assert np.abs(puzzles.logits[60:]).max() == 0
    np.testing.assert_allclose(puzzles.logits.sum(axis=1), 0, atol=1e-12)


def test_a_broken_verifier_teaches_nothing():
    rng = np.random.default_rng(0)
    puzzles = Puzzles.fresh(rng)
    yes, no = np.ones(8, dtype=bool), np.zeros(8, dtype=bool)
    assert not puzzles.step(np.full(8, 12), no, yes, False, rng).any()
    assert puzzles.step(np.full(8, 12), no, yes, True, rng).any()
    assert np.abs(puzzles.logits[:60]).max() == 0


def test_signed_advantages_carry_no_signal():
    advantages = np.array([1.0, -1.0] * 8)
    signed, absolute = SignedBandit(NAMES), AdvantageBandit(NAMES)
    for bandit in (signed, absolute):
        bandit.update([NAMES[0]] * 16, advantages)
    assert signed.learnability()[0] == pytest.approx(0)
    assert absolute.learnability()[0] == pytest.approx(1)


def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(v) for arm in figures.values() for v in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")
