import numpy as np
import pytest

from polyreward.studies.base import StudyConfig
from polyreward.studies.preference_strength import (
    CONTROLS,
    GRID,
    OTHERS,
    STUDY,
    TUNED,
    Digits,
    _auc,
    _votes,
    run_seed,
    setting,
)


def test_the_larger_digit_is_preferred_and_wrong_labels_are_turned():
    rng = np.random.default_rng(0)
    world = Digits.shuffled(rng)
    assert world.images.shape == (1797, 64)
    assert world.images.max() == 1
    pairs = world.pairs(rng, 0, 1200, 1800)
    assert pairs.shape == (1800, 2)
    assert pairs.max() < 1200
    digits = world.digits[pairs]
    assert (digits[:, 0] != digits[:, 1]).all()
    wrong = rng.random(1800) < 0.25
    data = world.preferences(pairs, wrong)
    chosen = np.take_along_axis(digits, data.choice[:, None], 1)[:, 0]
    assert ((chosen == digits.max(axis=1)) == ~wrong).all()


def test_shifted_images_are_rolled_by_a_pixel():
    rng = np.random.default_rng(0)
    world = Digits.shuffled(rng)
    moved = world.shifted(rng)
    difference = moved.images.reshape(-1, 8, 8)[:, :, 1:] - world.images.reshape(-1, 8, 8)[:, :, :-1]
    assert abs(float(difference.mean())) < 0.01
    assert float(difference.std()) == pytest.approx(0.2, abs=0.01)


def test_deciles_and_auc_by_hand():
    wrong = np.array([True, False, True, False])
    assert _auc(np.array([0.9, 0.1, 0.5, 0.7]), wrong) == pytest.approx(3 / 4)
    mean = np.arange(20.0) - 5
    found = _votes({"mean": mean, "std": np.arange(20.0)}, mean < 0)
    assert [found[f"wrong, decile {i}"] for i in range(1, 5)] == [1.0, 1.0, 0.5, 0.0]
    assert found["share below 0"] == found["wrong"] == 0.25
    assert found["wrong pairs found by mu (AUC)"] == 1.0


@pytest.mark.slow
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(0, StudyConfig(quick=True)) == figures
    assert np.isfinite(STUDY.judge([figures, figures]).effect)


def figures_of(flip=0.02, soft=0.02, margin=0.02, bottom=0.2, first=0.95, blind=-0.03, gentle=0.0, shift=0.0):
    made = {"votes": {f"wrong, decile {i}": max(first - 0.1 * (i - 1), 0.0) for i in range(1, 11)}}
    made["votes"] |= {
        "share below 0": 0.25, "wrong": 0.25, "rank correlation of s and |mu|": 0.0,
        "wrong pairs found by mu (AUC)": 0.9, "wrong pairs found by s (AUC)": 0.5,
    }  # fmt: skip
    made["votes, no noise"] = {"share below 0": 0.01}
    gains = {"vanilla": 0.0, "flip 10 %": flip, "soft": soft, "margin": margin}
    for name in TUNED:
        for number, (rate, epochs) in enumerate(GRID):
            # one setting is best for vanilla and another for the others
            made[setting(name, rate, epochs)] = {"accuracy": 0.8 + gains[name] - 0.01 * (number != len(name) % 9)}
        made[name] = {"accuracy": 0.78 + gains[name]}
    other = (*OTHERS, "drop 10 %", "vanilla, early stopping", "flip below 0, out of fold", "20 to 40 %", "top 20 %")
    made |= {name: {"accuracy": 0.8} for name in other}
    made["flip a share chosen on clean pairs"] = {"accuracy": 0.8, "share": 0.2}
    made["bottom 20 %"] = {"accuracy": bottom}
    made |= {f"{name}, no noise": {"accuracy": 0.9} for name in CONTROLS}
    made["flip 10 %, no noise"] = {"accuracy": 0.9 + blind}
    made["soft, no noise"] = {"accuracy": 0.9 + gentle}
    for name in ("vanilla", "continued", "dropout", "MetaRM", "SimCSE of pairs", "SimCSE of differences", "SwAV"):
        made[f"shift, {name}"] = {"accuracy": 0.65 + (shift if name == "MetaRM" else 0.0)}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"soft": 0.0}, "inconclusive"),
        ({"margin": -0.01}, "inconclusive"),
        ({"bottom": 0.55}, "inconclusive"),
        ({"first": 0.7}, "inconclusive"),
        ({"blind": 0.0}, "inconclusive"),
        ({"gentle": -0.02}, "inconclusive"),
        ({"shift": -0.02}, "inconclusive"),
        ({"flip": 0.0}, "not supported"),
        ({"flip": -0.01}, "not supported"),
        ({"first": 0.4}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
    assert judged.effect == pytest.approx(changed.get("flip", 0.02))
