import numpy as np
import pytest

from polyreward.studies.base import StudyConfig
from polyreward.studies.ordinal_rewards import (
    HEADS,
    RATES,
    SHARES,
    STUDY,
    calibration_error,
    digits,
    draw_pairs,
    preferences,
    run_seed,
)


def test_images_and_pairs():
    rng = np.random.default_rng(0)
    features, digit, train, test = digits(rng)
    assert len(train) == 800
    assert len(train) + len(test) == 1619
    assert not set(train) & set(test)
    assert features.responses.max() == 1.0
    assert 0 not in digit[train]
    assert digits(np.random.default_rng(0), 4)[1][digits(np.random.default_rng(0), 4)[2]].min() == 4
    pairs = draw_pairs(rng, train, digit, 50)
    assert (digit[pairs[:, 0]] > digit[pairs[:, 1]]).all()
    assert set(np.diff(digit[draw_pairs(rng, test, digit, 50, adjacent=True)], axis=1).ravel()) == {-1}
    data = preferences(pairs, digit, np.arange(50) < 10)
    assert data.columns["chosen_level"][:10].tolist() == ((digit[pairs[:10, 0]] - 1) // 3).tolist()
    assert (data.columns["rejected_level"][10:] == -1).all()
    assert (data.columns["chosen_level"] >= data.columns["rejected_level"]).all()


def test_calibration_error_by_hand():
    # in the bin from 0.9: confidence 0.95 four times, three right; in the bin from 0.6: 0.62, right
    found = calibration_error(np.array([0.95, 0.95, 0.95, 0.05, 0.62]))
    assert found == pytest.approx((4 * (0.95 - 0.75) + (1 - 0.62)) / 5)
    assert calibration_error(np.ones(3)) == 0


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    judged = STUDY.judge([figures])
    assert np.isfinite(judged.effect)
    assert figures["OPRM, rate 0.003"]["accuracy"] > 0.55


def figures_of(bt=0.85, oprm=0.90, bt_error=0.12, error=0.06, free=0.5, level=0.97, fives=11.0, others=0.7):
    made = {}
    for name in HEADS:
        found = {"accuracy": bt, "calibration error": bt_error, "adjacent": 0.7}
        if name != "Bradley-Terry":
            found |= {"accuracy": oprm, "calibration error": error}
        made |= {f"{name}, rate {rate:g}": found for rate in RATES}
        made[f"{name}, 1000 pairs"] = found
    for name in ("OPRM", "RgFT", "RgFT, rectangle"):
        made[f"{name}, digits from 4"] = {
            "level accuracy": free if name == "OPRM" else level,
            "error": 0.2,
            "accuracy": 0.97,
        }
    for name in ("OPRM, disputed", "OPRM, undisputed"):
        made[name] = {
            "variance of fives": fives,
            "variance of others": others,
            "lesser of the outer levels, fives": 0.4,
        }
    made["Bradley-Terry, disputed"] = {"mean rank of fives": 0.5}
    for share in SHARES:
        for name in ("RgFT", "RgFT, rectangle"):
            made[f"{name}, {share:.0%} labelled"] = {"accuracy": 0.9}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"oprm": 0.87}, "inconclusive"),
        ({"oprm": 0.84}, "not supported"),
        ({"error": 0.1}, "inconclusive"),
        ({"level": 0.6}, "inconclusive"),
        ({"level": 0.53}, "not supported"),
        ({"fives": 2.0}, "inconclusive"),
        ({"fives": 0.5}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_one_seed_below_the_bar_is_enough_to_fail():
    runs = [figures_of() for _ in range(4)] + [figures_of(oprm=0.86)]
    assert STUDY.judge(runs).verdict == "inconclusive"
