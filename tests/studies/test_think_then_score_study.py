import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.think_then_score import (
    BT_WEIGHTS,
    DROPOUTS,
    RATES,
    STUDY,
    Coupled,
    ordered,
    right_digits,
    run_seed,
)
from polyreward.studies.thinking_digits import FIRST_IMAGE, QUERY, TRAIN_IMAGES, VALUES, Items, Task, pretrained


def test_quality_is_the_sum_of_the_values_of_the_digits():
    task = Task(np.random.default_rng(0))
    items, test = task.items(50), task.items(50, test=True)
    assert items.shape == (50, 2, 3)
    assert items.max() < TRAIN_IMAGES <= test.min()
    digits = task.digits[items]
    expected = [[sum(VALUES[d] for d in item) for item in pair] for pair in digits.tolist()]
    assert np.allclose(task.quality(items), expected)
    assert task.images.max() == 1
    # the order by quality is right, its opposite is wrong, a constant is half right
    quality = task.quality(test).reshape(-1)
    assert ordered(quality, task, test) == 1
    assert ordered(-quality, task, test) == 0
    assert ordered(np.zeros(100), task, test) == 0.5


def test_preferences_follow_quality_and_err():
    task = Task(np.random.default_rng(1))
    items, choice = task.pairs(4000)
    quality = task.quality(items)
    better = quality.argmax(axis=1)
    gap = np.abs(quality[:, 0] - quality[:, 1])
    assert (choice == better)[gap > 2].mean() > 0.97
    assert 0.55 < (choice == better)[(gap > 0.1) & (gap < 0.5)].mean() < 0.75


def test_thoughts_earn_their_share_of_right_digits():
    task = Task(np.random.default_rng(0))
    items = task.items(2)
    true = torch.from_numpy(task.digits[items.reshape(-1, 3)])
    wrong = true.clone()
    wrong[1, 0] = (wrong[1, 0] + 1) % 10
    wrong[2] = (wrong[2] + 1) % 10
    assert right_digits(task, items)(np.array([0, 1, 2, 3]), wrong) == pytest.approx([1, 2 / 3, 0, 1])
    assert Items().contexts([0], [(4, 5, 6)]).tolist() == [[4 + FIRST_IMAGE, 5 + FIRST_IMAGE, 6 + FIRST_IMAGE]]
    assert Items().thoughts([(1, 2, 3), None]).tolist() == [[1, 2, 3], [-1, -1, -1]]


def test_the_network_is_causal_and_never_writes_the_query():
    task = Task(np.random.default_rng(0))
    network = pretrained(task, 2, 50, seed=0)
    contexts = torch.from_numpy(task.items(5).reshape(-1, 3)) + FIRST_IMAGE
    cot = network.generate_cot(contexts, generator=torch.Generator().manual_seed(0))
    assert cot.shape == (10, 3)
    assert cot.max() < QUERY
    query = torch.full((10, 1), QUERY)
    alone = network.score_sequence(torch.cat([contexts, query], dim=1))
    followed = network.score_sequence(torch.cat([contexts, query, cot], dim=1))
    assert torch.allclose(alone, followed, atol=1e-6)


def test_the_coupled_chain_has_a_token_more():
    task = Task(np.random.default_rng(0))
    model = Coupled(pretrained(task, 2, 50, seed=0))
    contexts = torch.from_numpy(task.items(2).reshape(-1, 3)).repeat_interleave(8, dim=0) + FIRST_IMAGE
    cots, marks = model.rollouts(contexts, torch.Generator().manual_seed(0))
    logp = model.logp(contexts, cots, marks)
    assert logp.shape == (32, 4)
    chances = model.chances(contexts, cots)
    assert torch.allclose(chances.exp().sum(dim=1), torch.ones(32), atol=1e-5)
    assert torch.allclose(logp[:, 3], chances[torch.arange(32), marks.squeeze(1)])
    loss = model.loss(contexts, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(loss))


@pytest.mark.slow
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    judged = STUDY.judge([figures, figures])
    assert np.isfinite([judged.effect, *judged.interval]).all()
    assert figures["w_BT = 0"] != figures["w_BT = 0.5"]


def figures_of(drift=-0.03, gain=0.06, shield=0.03, absent=0.005, coupled=0.75, noise=30.0):
    made = {}
    for rate in RATES:
        worse = 0.0 if rate == 1e-3 else 0.1
        for name in DROPOUTS:
            lost = absent + (shield if name == "thoughts" else 0.0)
            made[rated(name, rate)] = {
                "true": 0.78 - worse, "self": 0.76 - worse, "half wrong": 0.75 - worse, "absent": 0.78 - lost - worse,
                "digits": 0.8,
            }  # fmt: skip
        made[rated("no thoughts", rate)]["absent"] = 0.74 - worse
        made[rated("decoupled", rate)] = {"self": 0.8 - worse}
        made[rated("coupled", rate)] = {"self": coupled - worse, "self, sampled score": coupled - 0.1}
    made["cold start"] = {"self": 0.8, "digits": 0.75}
    for weight in BT_WEIGHTS:
        made[f"w_BT = {weight:g}"] = {"self": 0.8 + drift + (gain if weight else 0.0), "digits": 0.95}
    made["gradient noise"] = {"coupled": noise, "decoupled": 1.0}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"absent": 0.02}, "inconclusive"),
        ({"shield": -0.01}, "inconclusive"),
        ({"coupled": 0.82}, "inconclusive"),
        ({"noise": 0.5}, "inconclusive"),
        ({"drift": -0.005}, "inconclusive"),
        ({"gain": 0.02}, "inconclusive"),
        ({"drift": 0.02}, "not supported"),
        ({"gain": -0.01}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
