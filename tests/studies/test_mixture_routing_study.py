from collections import Counter

import numpy as np
import pytest

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.mixture_routing import (
    ALPHA,
    BUDGETS,
    CODE,
    MIXTURE,
    PAPER_MIXTURE,
    RATES,
    STATIC,
    STUDY,
    TASTES,
    Population,
    digits,
    run_seed,
    single_cross_entropy,
)


def test_tastes_of_the_images():
    features, tastes = digits()
    assert features.shape == (1797, 64)
    assert tastes.shape == (1797, len(TASTES))
    assert tastes.std(axis=0) == pytest.approx(np.ones(4))
    assert np.array_equal(tastes[:, 0], -tastes[:, 1])
    # every taste is linear in the features: a linear head can hold each, and none can hold two that conflict
    design = np.c_[features, np.ones(1797)]
    fitted = design @ np.linalg.lstsq(design, tastes, rcond=None)[0]
    assert fitted == pytest.approx(tastes, abs=1e-4)


def test_who_judges_which_topic_and_what_the_prompts_hold():
    _, tastes = digits()
    people = Population(np.random.default_rng(0), tastes)
    assert people.shares.sum(axis=1) == pytest.approx(np.ones(4))
    assert people.shares[2].tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])
    images = np.arange(300)
    pooled = people.pooled(images, 50)
    few = people.of_taste(images, 80, 1, noisy=False, context=True)
    prompts = np.concatenate(people.prompts)
    assert prompts.shape == (130, 2 * CODE)
    assert not prompts[pooled.prompts, CODE:].any()
    assert prompts[few.prompts, CODE:].all()
    chosen, rejected = few.responses[::2], few.responses[1::2]
    assert (tastes[chosen, 1] > tastes[rejected, 1]).all()
    assert set(pooled.responses.tolist()) <= set(images.tolist())


def test_labels_are_drawn_from_the_gap():
    _, tastes = digits()
    people = Population(np.random.default_rng(1), tastes)
    data = people.of_taste(np.arange(1797), 20_000, 2, noisy=True, context=False)
    gap = np.abs(tastes[data.responses[::2], 2] - tastes[data.responses[1::2], 2])
    right = tastes[data.responses[::2], 2] > tastes[data.responses[1::2], 2]
    assert right.mean() == pytest.approx((1 / (1 + np.exp(-2 * gap))).mean(), abs=0.01)


def test_cross_entropy_of_one_reward_by_hand():
    probs, shares = np.array([[0.9, 0.1, 0.5, 0.5]]), np.array([[0.7, 0.1, 0.1, 0.1]])
    pooled, q = 0.74, 1 / (1 + np.exp(-0.4))
    expected = -pooled * np.log(q) - (1 - pooled) * np.log(1 - q)
    assert single_cross_entropy(np.array([0.4]), probs, shares) == pytest.approx(expected)


@pytest.mark.slow
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert figures == run_seed(0, StudyConfig(quick=True))
    single = figures[rated("single", 1e-2)]
    assert single["cross-entropy"] >= single["floor"]
    assert single["best head"] == single["best head, chosen on the test"]
    ours = figures[rated(MIXTURE, 1e-2)]
    assert ours["best head"] <= ours["best head, chosen on the test"]
    assert -1 < STUDY.judge([figures]).effect < 1


def figures_of(single=0.6, static=0.7, best=0.9, before=0.58, after=0.75, excess=0.1, paper=0.8):
    made = {}
    for rate in RATES:
        usual = 0.5 + 0.1 * (rate == 1e-2)
        bad = 0.0 if rate == 1e-2 else -0.3
        made[rated("single", rate)] = {"validation": usual, "best head": single + bad, "cross-entropy": 0.5 + excess}
        made[rated("single", rate)] |= {"floor": 0.5}
        made[rated("ensemble", rate)] = {"validation": usual, "best head": single + bad, "reweighted": single}
        for name, less in zip(STATIC, (0.0, 0.1), strict=True):
            made[rated(name, rate)] = {"validation": usual - less, "best head": static + bad - less, "routed": 0.6}
        for name, value in ((MIXTURE, best), (PAPER_MIXTURE, paper)):
            own = Counter({f"routed, {budget} pairs": after + bad for budget in BUDGETS})
            own |= {"validation": usual, "best head": value + bad, "best head, chosen on the test": value}
            own |= {"routed before": before - 0.02 + bad, "routed before, no context": before + bad}
            own |= {"routed, cold": after, "reweighted": 0.8, "router, entropy": 0.5, "router, usage_entropy": 1.0}
            made[rated(name, rate)] = dict(own)
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"best": 0.74}, "inconclusive"),
        ({"static": 0.87}, "inconclusive"),
        ({"after": 0.67}, "inconclusive"),
        ({"best": 0.55, "static": 0.5}, "not supported"),
        ({"static": 0.91}, "not supported"),
        ({"after": 0.57}, "not supported"),
        ({"single": 0.7, "before": 0.5, "after": 0.69}, "not supported"),
        ({"excess": -1e-3}, "not supported"),
        ({"paper": 0.5}, "supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    runs = [figures_of(**changed) for _ in range(STUDY.seeds)]
    judged = STUDY.judge(runs)
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_a_gain_of_some_seeds_only_is_not_enough():
    runs = [figures_of(best=best) for best in (0.99, 0.99, 0.99, 0.99, 0.3)]
    assert STUDY.judge(runs).verdict == "inconclusive"


def test_the_effect_is_best_head_less_single_at_the_best_rates():
    judged = STUDY.judge([figures_of()] * STUDY.seeds)
    assert judged.effect == pytest.approx(0.3)
    assert f"{ALPHA:g}" in STUDY.rule
