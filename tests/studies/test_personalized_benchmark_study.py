import numpy as np
import pytest

from polyreward.studies.base import StudyConfig
from polyreward.studies.personalized_benchmark import (
    LONGER,
    METRICS,
    NAMES,
    RATES,
    SAMPLES,
    STUDY,
    Population,
    features,
    fit_model,
    general_pairs,
    of_pairs,
    personal_pairs,
    run_seed,
    score,
)


def test_users_want_three_aspects():
    people = Population.draw(np.random.default_rng(0), 50)
    assert people.profile.shape == (50, 12)
    assert people.rubric.sum(axis=1).tolist() == [3] * 50


def test_pairs_are_of_equal_quality_and_length():
    rng = np.random.default_rng(0)
    people = Population.draw(rng, 40)
    pairs = personal_pairs(rng, people, np.arange(20), 3000)
    assert pairs.user.max() < 20
    wanted = people.rubric[pairs.user]
    assert (pairs.coverage[:, 0][wanted] == 2).all()
    assert (pairs.coverage[:, 1][wanted] == 0).all()
    assert np.abs(np.diff(pairs.quality, axis=1)).max() <= 0.1
    longer = pairs.coverage.sum(axis=2)
    assert (longer[:, 0] - longer[:, 1]).mean() == pytest.approx(0, abs=0.15)
    apart = personal_pairs(rng, people, np.arange(20), 3000, matched=False).coverage.sum(axis=2)
    assert (apart[:, 0] - apart[:, 1]).mean() == pytest.approx(6, abs=0.15)
    general = general_pairs(rng, np.arange(20), 100)
    assert (general.quality[:, 0] > general.quality[:, 1]).all()


def test_what_models_see():
    rng = np.random.default_rng(0)
    quality, coverage, profile = rng.normal(size=4), rng.integers(3, size=(4, 10)), rng.normal(size=(4, 12))
    assert features("quality", quality, coverage, profile).shape == (4, 1)
    assert features("coverage", quality, coverage, profile).shape == (4, 11)
    table = features("profile", quality, coverage, profile)
    assert table.shape == (4, 131)
    assert table[1, 11 + 12 * 3 + 5] == pytest.approx((coverage[1, 3] - 1) * profile[1, 5], abs=1e-6)


def test_models_of_quality_alone_are_blind_to_persons():
    rng = np.random.default_rng(0)
    people = Population.draw(rng, 40)
    users = np.arange(40)
    model = fit_model(of_pairs("quality", general_pairs(rng, users, 300), people.profile), 0)
    pairs = personal_pairs(rng, people, users, 2000)
    scores = score(model, of_pairs("quality", pairs, people.profile))
    assert (scores[:, 0] > scores[:, 1]).mean() == pytest.approx(0.5, abs=0.05)
    general = score(model, of_pairs("quality", general_pairs(rng, users, 200), people.profile))
    assert (general[:, 0] > general[:, 1]).all()


@pytest.mark.slow
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(0, StudyConfig(quick=True)) == figures
    assert set(NAMES) < set(figures)
    assert np.isfinite(STUDY.judge([figures, figures]).effect)


def figures_of(personal=0.9, general=-0.9, policy=0.85, blind=0.5, others=0.8, gap=0.0, flip=-0.9):
    made = {}
    for name in NAMES:
        kind = name.split(",")[0]
        accuracy = {"quality": blind, "coverage": 0.9, "profile": 0.99}[kind]
        made[name] = {
            "general accuracy": 0.9, "personal accuracy": accuracy, "personal accuracy, profiles of others": others,
            f"rubric at {SAMPLES}": 1.2, **{f"policy, rate {rate:g}": 1.5 for rate in RATES},
        }  # fmt: skip
    tasks = {
        f"rubric of the best of {SAMPLES}": personal,
        **{f"rubric of the policy, rate {r:g}": policy for r in RATES},
    }
    for task, value in tasks.items():
        made[f"personal, {task}"] = dict.fromkeys(METRICS, value)
        made[f"general, {task}"] = dict.fromkeys(METRICS, general)
    for bench, value in (("personal", flip), ("general", -flip)):
        made[f"{bench}, quality of the best of {SAMPLES}"] = dict.fromkeys(METRICS, value)
    made["construction"] = {"quality gap in deviations": gap, **dict.fromkeys(LONGER, 0.5)}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"policy": 0.6}, "inconclusive"),
        ({"personal": 0.6}, "inconclusive"),
        ({"general": 0.5}, "inconclusive"),
        ({"general": 0.9}, "not supported"),
        ({"blind": 0.43}, "inconclusive"),
        ({"blind": 0.56}, "not supported"),
        ({"gap": 0.03}, "inconclusive"),
        ({"others": 0.95}, "inconclusive"),
        ({"flip": 0.1}, "inconclusive"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
