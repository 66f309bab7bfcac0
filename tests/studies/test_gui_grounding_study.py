import numpy as np
import pytest
from planted import Figures

from polyreward.rewards.gaussian_boxes import BoxReward
from polyreward.studies.base import StudyConfig
from polyreward.studies.gui_grounding import KINDS, OTHERS, RATES, STUDY, advantages, reward_of, run_seed, train
from polyreward.tasks.grounding import near_miss


def planted(sparse=0.3, gaussian=0.95, inside=0.3, dead=0.0):
    rows = {}
    for rate in RATES:
        down = 0.0 if rate == 0.5 else -0.2
        for kind in KINDS:
            hit = {"gaussian": gaussian, "inside": inside, "point": sparse, "point+iou": sparse - 0.01}.get(kind, 0.1)
            rows[f"{kind}, off 2, rate {rate:g}", "hit rate"] = hit + down
        rows[f"gaussian, off 2, rate {rate:g}", "dead groups"] = dead if rate == 0.5 else 0.5
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([planted()] * 3, "supported"),
        ([planted(), planted(gaussian=0.5)], "inconclusive"),
        ([planted(inside=0.4)], "inconclusive"),
        ([planted(dead=0.1)], "inconclusive"),
        ([planted(gaussian=0.35)], "not supported"),
        ([planted(gaussian=0.2)], "not supported"),
        ([planted(inside=0.91)], "not supported"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict


def test_every_arm_counts_at_its_best_rate():
    run = planted()
    run["iou, off 2, rate 5"]["hit rate"] = 0.93
    judged = STUDY.judge([run])
    assert judged.verdict == "not supported"
    assert judged.effect == pytest.approx(0.02)


def test_worked_advantages_and_dead_groups():
    gain, dead = advantages(np.array([[[1.963, 0.617, 0.0, 0.0], [0.0] * 4]], dtype=np.float32))
    assert gain[0, 0] == pytest.approx([1.4239, -0.0302, -0.6968, -0.6968], abs=5e-5)
    assert gain[0, 1].tolist() == [0] * 4
    assert dead.tolist() == [0.5]


def test_a_step_is_the_mean_of_advantage_times_move():
    task = near_miss(np.random.default_rng(0), 5, 1.0)
    figures = train(task, BoxReward(round_digits=None), 0, 1, (0.0, 0.5))
    assert figures[0]["hit rate"] == figures[0]["hit rate, a quarter"]
    assert set(figures[0]) == {"hit rate", "hit rate, a quarter", "overlap", "dead groups"}


def test_the_gaussian_reward_learns_and_the_hit_reward_does_not():
    task = near_miss(np.random.default_rng(0), 60, 2.0)
    smooth, sparse = (train(task, reward_of(kind, task), 0, 40, (1.5,))[0] for kind in ("gaussian", "point"))
    assert smooth["hit rate"] > sparse["hit rate"] + 0.4
    assert sparse["dead groups"] > 0.5
    assert smooth["dead groups"] < 0.01


def test_arms_are_the_rewards_that_they_say():
    task = near_miss(np.random.default_rng(0), 7, 2.0)
    assert reward_of("random", task) is None
    assert {reward_of(kind, task).kind for kind in KINDS if kind != "random"} == set(KINDS) - {"random"}
    widths = task.targets[:, 2] - task.targets[:, 0]
    assert reward_of("fixed", task).std[0] == pytest.approx(np.median(widths) / 2)


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert len(figures) == 2 * len(KINDS) * len(RATES) + len(OTHERS)
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")
