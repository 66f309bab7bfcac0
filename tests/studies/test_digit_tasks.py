import numpy as np
import pytest

from polyreward.advantages.presets import dr_grpo
from polyreward.studies import ema_grpo, gaussian_grpo
from polyreward.studies.base import StudyConfig
from polyreward.studies.digit_tasks import MICRO_SPREAD, digit_tasks, train


def test_rewards_of_the_right_and_the_neighbouring_actions():
    spread = digit_tasks(micro=False).spread
    for task, best, next_best, mean in ((0, 1.0, 0.0, 0.1), (1, 0.05, 0.05 * 2 / 3, 0.015), (2, 0.3, 0.15, 0.06)):
        ordered = np.sort(spread[task], axis=1)
        np.testing.assert_allclose(ordered[:, -1], best)
        np.testing.assert_allclose(ordered[:, -2], next_best)
        np.testing.assert_allclose(spread[task].mean(axis=1), mean)


def test_constant_answers_gain_little():
    spread = digit_tasks(micro=False).spread
    by_action = spread.mean(axis=1)
    assert (by_action.max(axis=1) < 1.2 * by_action.mean(axis=1)).all()


def test_micro_variance_prompts_point_elsewhere():
    clean, micro = digit_tasks(micro=False).spread, digit_tasks(micro=True).spread
    np.testing.assert_array_equal(clean[0], micro[0])
    changed = (clean[1] != micro[1]).any(axis=1)
    assert changed.mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(changed, (clean[2] != micro[2]).any(axis=1))
    for task in (1, 2):
        ours, theirs = micro[task][changed], clean[task][changed]
        np.testing.assert_allclose(ours, MICRO_SPREAD * np.roll(theirs, 5, axis=1))


def test_return_is_a_share_of_the_best():
    tasks = digit_tasks(micro=False)
    rows = np.arange(50)
    uniform = np.zeros((3, 65, 10))
    np.testing.assert_allclose(tasks.normalised_return(uniform, rows), [0.1, 0.3, 0.2])


def test_training_learns_and_repeats():
    first, second = (train(dr_grpo(), 0, steps=80) for _ in range(2))
    assert first.figures == second.figures
    assert first.figures["return, digit"] > 0.5
    assert sum(v for k, v in first.figures.items() if k.startswith("gradient share")) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("study", [ema_grpo, gaussian_grpo])
def test_quick_run_is_finite_and_judged(study):
    figures = study.run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(v) for arm in figures.values() for v in arm.values())
    assert study.STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")
