from itertools import islice

import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig
from polyreward.studies.bias_fitting import (
    BATCH,
    FIMI,
    GRIDS,
    LINE,
    PLAIN,
    POSTHOC,
    STAGED,
    STUDY,
    TASKS,
    Reward,
    batches,
    bias_of,
    draw_answers,
    prefer,
    run_seed,
    task_name,
)


def test_biases_by_hand():
    lengths = np.array([50.0, 100.0, 400.0, 500.0])
    assert bias_of(lengths, "saturating").tolist() == pytest.approx([1.0, 2.0, 2.0, 1.7])
    assert bias_of(np.array([250.0, 370.0]), "hump").tolist() == pytest.approx([2.0, 2 / np.e])


def test_answers_and_annotators():
    rng = np.random.default_rng(0)
    answers = draw_answers(rng, 8000, 0.0)
    length = answers.lengths.numpy()
    assert answers.features.shape == (8000, 22)
    assert answers.inputs([0, 1]).shape == (2, 23)
    assert length.min() >= 5
    assert length.max() <= 600
    assert answers.quality.std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(answers.quality, length)[0, 1]) < 0.03
    linked = draw_answers(rng, 8000, 0.3)
    assert np.corrcoef(linked.quality, np.log(linked.lengths.numpy()))[0, 1] == pytest.approx(0.3, abs=0.04)
    pairs = prefer(rng, answers, "saturating", 4000)
    assert set(pairs.ravel()) == set(range(8000))
    assert (answers.quality[pairs[:, 0]] > answers.quality[pairs[:, 1]]).mean() > 0.75
    assert (length[pairs[:, 0]] > length[pairs[:, 1]]).mean() > 0.58


def test_the_reward_does_not_read_the_last_column():
    torch.manual_seed(0)
    model, inputs = Reward(), torch.randn(3, 23)
    changed = torch.cat([inputs[:, :-1], inputs[:, -1:] + 5], dim=1)
    assert torch.equal(model(inputs), model(changed))


def test_batches_repeat_and_cover():
    inputs, pairs = torch.arange(2 * 3 * BATCH).float().unsqueeze(1), np.arange(2 * 3 * BATCH).reshape(-1, 2)
    first, again = (list(islice(batches(inputs, pairs, 7), 4)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert sorted(torch.cat([chosen for chosen, _ in first[:3]]).flatten().tolist()) == list(range(0, 6 * BATCH, 2))


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert np.isfinite(STUDY.judge([figures]).effect)
    assert len(figures) == len(TASKS) * sum(map(len, GRIDS.values()))


def figures_of(fimi=0.955, gap=0.01, best=1.75, line=0.90, throughout=0.92, line_gap=0.09, plain=0.86):
    made = {}
    for shape, link in TASKS:
        for name, grid in GRIDS.items():
            found = {"accuracy": line, "gap": line_gap, "best of 16": 1.70}
            if name == PLAIN:
                found = {"accuracy": plain, "gap": 0.2, "best of 16": 1.6}
            if name == LINE:
                found["accuracy"] = throughout
            if name not in (PLAIN, POSTHOC, LINE, STAGED):
                found = {"accuracy": fimi, "gap": gap, "best of 16": best}
            rest = dict.fromkeys(("longer", "shorter", "correlation ratio", "length of the best"), 0.5)
            made |= {f"{one}, {task_name(shape, link)}": found | rest for one in grid}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"gap": 0.04, "line_gap": 0.2}, "inconclusive"),
        ({"gap": 0.025, "line_gap": 0.03}, "inconclusive"),
        ({"best": 1.69}, "inconclusive"),
        ({"plain": 0.91}, "inconclusive"),
        ({"throughout": 0.95}, "not supported"),
        ({"throughout": 0.97}, "not supported"),
        ({"fimi": 0.85}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) or verdict != "supported"


def test_every_seed_counts_and_the_best_of_a_grid_is_taken():
    runs = [figures_of() for _ in range(4)] + [figures_of(gap=0.05)]
    assert STUDY.judge(runs).verdict == "inconclusive"
    runs = [figures_of() for _ in range(5)]
    for run in runs:
        run[f"{FIMI}, weight 3, hump"] = {**run[f"{FIMI}, weight 3, hump"], "accuracy": 0.5}
    assert STUDY.judge(runs).verdict == "supported"
