import math

import numpy as np
import pytest
from planted import Figures

from polyreward.advantages.presets import grpo_trl
from polyreward.studies.base import StudyConfig
from polyreward.studies.multirole import ARMS, RATES, STUDY, advantages, filters, gradient, run_seed, train
from polyreward.studies.stratified_grpo import softmax


def planted(shaped=0.92, plain=0.7, passed=0.9, alone=0.14, dead=0.0, cue=0.95, noise=0.71, precision=0.5):
    rows = {}
    accuracy = {"delta 0.9": shaped, "delta 1": plain, "delta 0": alone, "noise for diversity": noise,
                "delta 1, planted": 0.95, "delta 0.9, planted": cue}  # fmt: skip
    for name, part in ARMS.items():
        for rate in part.rates:
            title = f"{name}, rate {rate:g}"
            rows[title, "accuracy"] = accuracy.get(name, 0.5) - (0.0 if rate == part.rates[1] else 0.3)
            rows[title, "pass@5"] = passed if name == "delta 0.9" else 0.4
            rows[title, "dead groups"] = dead
    rows["filter, 3", "precision"] = precision
    for name in ("independent", "copies"):
        rows["roles", name] = 0.7
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([planted()] * 3, "supported"),
        ([planted(), planted(shaped=0.75)], "inconclusive"),
        ([planted(passed=0.6)], "inconclusive"),
        ([planted(dead=0.05)], "inconclusive"),
        ([planted(alone=0.45)], "inconclusive"),
        ([planted(cue=1.0)], "inconclusive"),
        ([planted(noise=0.82)], "inconclusive"),
        ([planted(precision=0.55)], "inconclusive"),
        ([planted(shaped=0.7)], "not supported"),
        ([planted(shaped=0.6)], "not supported"),
        ([planted(alone=0.88)], "not supported"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict


def test_every_arm_counts_at_its_best_rate():
    run = planted()
    run[f"delta 1, rate {RATES[-1]:g}"]["accuracy"] = 0.93
    assert STUDY.judge([run]).verdict == "not supported"


def test_gradient_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    chances, words = softmax(rng.normal(size=(2, 3, 2, 4))), rng.integers(0, 4, (2, 3, 5, 2, 3))
    gain = rng.normal(size=(2, 3, 5))
    expected = np.zeros_like(chances)
    for a, q, g, role, at in np.ndindex(*words.shape):
        score = np.eye(4)[words[a, q, g, role, at]] - chances[a, q, role]
        expected[a, q, role] += gain[a, q, g] * score / (5 * 3)
    np.testing.assert_allclose(gradient(chances, words, gain), expected, atol=1e-12)


def test_advantages_are_standardised_inside_groups():
    gain, dead = advantages(np.array([[[0.0, 1.0], [0.5, 0.5]]]), grpo_trl())
    assert gain[0, 0] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], abs=2e-4)
    assert gain[0, 1].tolist() == [0, 0]
    assert dead.tolist() == [0.5]


def test_shaping_keeps_groups_alive_and_words_apart():
    figures = train(0, 25)
    shaped, plain = figures["delta 0.9, rate 10"], figures["delta 1, rate 10"]
    assert plain["dead groups"] > 0.5
    assert shaped["dead groups"] < 0.05
    assert shaped["entropy"] > plain["entropy"]
    assert shaped["accuracy"] > 0.2


def test_the_making_of_data():
    figures = filters(0, 3000)
    for k in range(1, 10):
        found = figures[f"filter, {k}"]
        assert found["precision"] == pytest.approx(found["formula"], abs=0.015)
    assert figures["filter, 3"]["formula"] == pytest.approx(0.784)
    assert figures["roles"]["independent"] == pytest.approx(0.784, abs=0.025)
    assert figures["roles"]["copies"] == pytest.approx(0.7, abs=0.025)
    assert figures["roles"]["chosen by contrast"] > figures["roles"]["chosen at random"]


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")
