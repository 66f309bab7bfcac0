import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.personal_judge import (
    COUNTS,
    STUDY,
    SUPERVISED_RATES,
    accuracy,
    coverage,
    drawn,
    everything,
    named,
    run_seed,
)
from polyreward.studies.taste_judges import (
    CRITERIA,
    LEVELS,
    Batch,
    RubricPolicy,
    Users,
    chain_logp,
    quantised,
    rubric_scores,
    rubric_weights,
    sampled,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def users(count=20, pairs=8, seed=0):
    return Users.drawn(np.random.default_rng(seed), count, pairs)


def test_users_have_weights_and_choose_by_them():
    made = users(400, 20)
    assert torch.allclose(made.weights.sum(dim=2), torch.ones(400, 3))
    # in every scenario another criterion is worth 0.25 more, of 1.25 in all
    own = (made.weights * 1.25).amin(dim=1)
    assert torch.allclose((made.weights * 1.25 - own.unsqueeze(1)).sum(dim=2), torch.full((400, 3), 0.25), atol=1e-5)
    truth = made.weights[torch.arange(400).unsqueeze(1), made.scenario]
    gap = (truth.unsqueeze(2) * made.responses).sum(dim=3)
    ahead = gap[..., 0] - gap[..., 1]
    assert float((ahead[ahead.abs() > 1.5] > 0).float().mean()) > 0.97
    assert 0.55 < float((ahead[ahead.abs() < 0.4] > 0).float().mean()) < 0.75
    assert made.responses.min() == 1
    assert made.responses.max() == 10


def test_the_current_choice_is_not_among_the_earlier_ones():
    made = users(4, 3)
    batch = everything(made, 2, generator())
    for row in range(len(batch.user)):
        user, pair = int(batch.user[row]), int(batch.pair[row])
        others = [made.responses[user, p, 0] - made.responses[user, p, 1] for p in range(3) if p != pair]
        found = sorted((9 * batch.history[row]).round().tolist())
        assert found == sorted(other.tolist() for other in others)
    assert torch.equal(batch.gap, made.responses[batch.user, batch.pair, 0] - made.responses[batch.user, batch.pair, 1])


def test_rubric_arithmetic():
    levels = torch.tensor([[[4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0]]])
    responses = torch.tensor([[[9.0, 1, 3, 3, 3, 5], [1.0, 9, 3, 3, 3, 1]]])
    scores = rubric_scores(levels, responses)[0]
    assert scores[0].tolist() == [9, 1]
    assert scores[1].tolist() == pytest.approx([4, 20 / 6])
    assert scores[2].tolist() == pytest.approx([3, 7])
    assert rubric_weights(3 * levels)[0, 2].tolist() == rubric_weights(levels)[0, 2].tolist()


def test_coverage_counts_each_criterion_up_to_its_own_weight():
    truth = torch.tensor([[0.5, 0.3, 0.2, 0, 0, 0]])
    chains = torch.tensor([[[4, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0], [0, 0, 4, 0, 0, 0], [3, 1, 0, 0, 0, 0]]])
    assert coverage(chains, truth)[0].tolist() == pytest.approx([0.5 / 0.8, 1.0, 0, 0.75 / 0.8], abs=1e-6)
    assert coverage(chains, truth, capped=False)[0].tolist() == pytest.approx([1, 1, 0, 1])


def test_chains_are_drawn_from_the_judge():
    torch.manual_seed(0)
    batch = drawn(users(), 6, 3, generator())
    chances = RubricPolicy()(batch)
    assert chances.shape == (6, CRITERIA, LEVELS)
    chains = sampled(chances, 4000, generator())
    assert chains.shape == (6, 4000, CRITERIA)
    share = torch.stack([(chains == level).float().mean(dim=1) for level in range(LEVELS)], dim=2)
    assert torch.allclose(share, chances.exp(), atol=0.04)
    logp = chain_logp(chances, chains)
    assert float(logp[2, 7, 3].detach()) == pytest.approx(float(chances[2, 3, chains[2, 7, 3]].detach()))


def test_teachers_and_accuracy():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0]])
    assert quantised(weights, 0.0, generator()).tolist() == [[4, 2, 2, 0, 0, 0]]
    assert accuracy(torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [3.0, 1.0]])) == 0.625
    assert named(16, 8) == "Ind-16,Pro-8"
    assert named(32, 0) == "Ind-32"


def test_hard_pairs_take_their_share_of_a_batch():
    hard = torch.tensor([[3, 5]])
    batch = drawn(users(), 40, 2, generator(), hard, 0.25)
    assert (batch.user[:10] == 3).all()
    assert (batch.pair[:10] == 5).all()
    assert len(batch.user[10:].unique()) > 3
    assert isinstance(drawn(users(), 4, 2, generator(), torch.zeros(0, 2).long(), 0.5), Batch)


@pytest.mark.slow
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(0 <= value <= 1 for part in figures.values() for value in part.values())
    assert figures == run_seed(0, StudyConfig(quick=True))
    judged = STUDY.judge([figures, figures])
    assert np.isfinite([judged.effect, *judged.interval]).all()


def figures_of(learned=0.03, scaled=0.02, near=0.004):
    made = {}
    for rate in SUPERVISED_RATES:
        made[rated("supervised", rate)] = {"accuracy": 0.73 - rate}
        made[rated("supervised, as long", rate)] = {"accuracy": 0.735 - rate}
    best = 0.735 - min(SUPERVISED_RATES)
    for name in (
        "untrained",
        "outcome alone",
        "process alone",
        "process without its cap",
        "curriculum",
        "no curriculum, as long",
    ):
        made[name] = {"accuracy": 0.76}
    made["process and outcome"] = {"accuracy": best + learned}
    for history in (3, 1):
        part = {named(m, n): 0.76 for m, n in COUNTS}
        part["Ind-16"] = part["Ind-1"] + scaled
        part["Ind-16,Pro-8"] = part["Ind-32"] + near
        made[f"scaling, {history} earlier choices"] = part
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"learned": 0.015}, "inconclusive"),
        ({"scaled": 0.006}, "inconclusive"),
        ({"near": -0.002}, "inconclusive"),
        ({"scaled": -0.001}, "not supported"),
        ({"near": -0.01}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
