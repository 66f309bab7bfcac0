import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.likelihood import (
    EMAStdFilter,
    LikelihoodReward,
    efficiency_reward,
    nover_perplexity,
    nover_reward,
    rank_reward,
    rlpr_reward,
)

WORKED = np.log([[[0.5, 0.25, 0.8]]])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("log-prob", -2.302585),
        ("prob", 0.1),
        ("avg-prob", 0.516667),
        ("avg-log-prob", -0.767528),
        ("geo-prob", 0.464159),
    ],
)
def test_values_of_the_worked_example(kind, value):
    reward = LikelihoodReward(kind=kind)(torch.from_numpy(WORKED).float(), torch.ones(1, 1, 3))
    assert reward.shape == (1, 1)
    assert reward.dtype == torch.float32
    assert reward.item() == pytest.approx(value, abs=1e-6)


def test_the_group_bound_of_the_worked_example():
    logp = torch.tensor([-1.0, -2.0, -4.0]).view(1, 3, 1)
    assert LikelihoodReward("jepo")(logp) == pytest.approx(np.full((1, 3), -1.749600), abs=1e-5)
    assert torch.equal(LikelihoodReward("jepo")(logp[:, :1]), LikelihoodReward("log-prob")(logp[:, :1]))


def test_debiasing_by_the_reference_without_a_chain():
    logp, alone = np.log([[[0.5, 0.7], [0.1, 0.2]]]), np.log([[0.3, 0.3]])
    reward = LikelihoodReward("avg-prob", baseline_no_cot=True)
    assert reward(logp, baseline=alone) == pytest.approx(np.array([[0.3, -0.15]]))
    clipped = LikelihoodReward("avg-prob", baseline_no_cot=True, clip_min=0.0)
    assert clipped(logp, baseline=alone) == pytest.approx(np.array([[0.3, 0.0]]))
    assert clipped(logp, baseline=alone, failed=[[True, False]]) == pytest.approx(np.array([[0.0, 0.0]]))
    masked = clipped(logp, baseline=np.pad(alone, ((0, 0), (0, 1)), constant_values=np.nan), baseline_mask=[[1, 1, 0]])
    assert masked == pytest.approx(np.array([[0.3, 0.0]]))


def test_a_chain_that_the_model_ignores_scores_zero():
    alone = torch.randn(2, 1, 5).sigmoid().log()
    reward = LikelihoodReward("avg-prob", baseline_no_cot=True, clip_min=0.0)
    assert torch.equal(reward(alone.expand(2, 4, 5), baseline=alone[:, 0]), torch.zeros(2, 4))


def test_no_gradient_flows_into_the_baseline():
    logp = torch.full((1, 2, 3), -1.0, requires_grad=True)
    alone = torch.full((1, 3), -2.0, requires_grad=True)
    LikelihoodReward("avg-prob", baseline_no_cot=True)(logp, baseline=alone).sum().backward()
    assert alone.grad is None
    assert logp.grad.abs().min() > 0


def test_sigmoid_shaping():
    reward = LikelihoodReward("prob", shaping="sigmoid", steepness=6.0)
    assert reward(WORKED)[0, 0] == pytest.approx(1 / (1 + math.exp(-6 * (0.2 - 1))))


def test_rlpr_adds_the_format():
    assert rlpr_reward(np.array([[0.5, 0.0]]), [[1, 0]]) == pytest.approx(np.array([[0.55, 0.0]]))
    assert rlpr_reward(torch.tensor([[0.5]]), torch.tensor([[False]])).item() == pytest.approx(0.45)
    with pytest.raises(InvalidInputError, match="format_weight"):
        rlpr_reward(np.zeros((1, 1)), [[1]], 1.5)
    with pytest.raises(InvalidInputError, match="well_formed has shape"):
        rlpr_reward(np.zeros((1, 2)), [[1]])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kind": "logprob!"}, UnknownNameError),
        ({"shaping": "steep"}, UnknownNameError),
        ({"clip_min": math.inf}, InvalidInputError),
        ({"token_floor": 0.0}, InvalidInputError),
        ({"steepness": -1.0}, InvalidInputError),
        ({"kind": "jepo", "baseline_no_cot": True}, InvalidInputError),
    ],
)
def test_options_are_checked(options, error):
    with pytest.raises(error):
        LikelihoodReward(**options)


@pytest.mark.parametrize(
    ("reward", "arguments", "message"),
    [
        (LikelihoodReward(baseline_no_cot=True), {}, "pass baseline="),
        (LikelihoodReward(), {"baseline": WORKED}, "without baseline_no_cot"),
        (LikelihoodReward(baseline_no_cot=True), {"baseline": np.zeros((2, 1))}, "baseline is of shape"),
    ],
)
def test_a_baseline_must_fit(reward, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        reward(WORKED, **arguments)


def test_underflow_of_a_reward():
    logp = torch.full((1, 2, 24), -5.0)
    assert LikelihoodReward("prob").underflow(logp) == 2
    assert LikelihoodReward("log-prob").underflow(logp) == 0


def test_ranks_of_the_worked_example():
    expected = [1 / 3, 1, 0, 2 / 3]
    assert rank_reward(np.array([3, 1.5, np.nan, 2])) == pytest.approx(expected)
    assert rank_reward([3, 1.5, math.inf, 2]) == pytest.approx(expected)
    assert rank_reward(torch.tensor([[3, 1.5, 1.0, 2]]), torch.tensor([[1, 1, 0, 1]]))[0].tolist() == pytest.approx(
        expected
    )


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0, 9.0]), st.integers(1, 4), st.booleans()), min_size=1, max_size=7)
)
def test_ranks_and_efficiency_equal_plain_python(samples):
    values, lengths, valid = (list(column) for column in zip(*samples, strict=True))
    count = sum(valid)
    ranks, efficiencies = [], []
    for i, (value, length, ok) in enumerate(samples):
        others = [s for j, s in enumerate(samples) if j != i and s[2]]
        ranks.append((count - sum(o[0] < value for o in others)) / count if ok else 0.0)
        beaten = sum(o[0] > value and o[1] > length for o in others)
        efficiencies.append(beaten / len(others) if ok and others else 0.0)
    assert rank_reward(np.array([values]), np.array([valid]))[0] == pytest.approx(ranks)
    assert efficiency_reward(np.array([values]), np.array([lengths]), np.array([valid]))[0] == pytest.approx(
        efficiencies
    )
    total = nover_reward(np.array([values]), np.array([lengths]), np.array([valid]))[0]
    assert total == pytest.approx(np.array(ranks) + efficiencies + valid)


def test_no_valid_sample_earns_nothing():
    nothing = np.full((2, 3), np.nan)
    assert (rank_reward(nothing) == 0).all()
    assert (efficiency_reward(nothing, np.ones((2, 3))) == 0).all()
    assert efficiency_reward(np.array([2.0]), np.array([5])) == pytest.approx([0.0])


def test_perplexity_discounts_long_reasoning():
    logp = np.log([[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]])
    found = nover_perplexity(logp, reasoning_tokens=np.array([[0, 1, 100]]), failed=[[False, False, False]])
    assert found == pytest.approx(np.array([[2, 2, 2 ** (1 / 3)]]))
    assert np.isnan(nover_perplexity(logp, failed=[[True, False, False]])[0, 0])
    assert np.isfinite(nover_perplexity(np.full((1, 1, 2), -np.inf))).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: rank_reward(np.zeros((1, 2, 3))),
        lambda: rank_reward(np.zeros((1, 2)), [[1]]),
        lambda: efficiency_reward(np.zeros((1, 2)), [[1]]),
        lambda: nover_perplexity(WORKED, reasoning_tokens=[1, 2]),
    ],
)
def test_wrong_shapes(call):
    with pytest.raises(InvalidInputError, match="shape"):
        call()


def rewards_with(*deviations):
    return np.array([[-d, d] for d in deviations]) / math.sqrt(2)


def test_the_filter_waits_and_then_drops_prompts_that_vary_less_than_usual():
    keep = EMAStdFilter()
    assert (keep.start, keep.statistics_from) == (11, 6)
    for step in range(1, 6):
        assert keep(rewards_with(100.0 * step, 0.0)).all()
    assert keep.average is None
    for step in range(6, 11):
        assert keep(rewards_with(0.8, 1.2)).all(), step
    assert keep.average == pytest.approx(1.0)
    assert keep(rewards_with(0.49, 0.5, 3.0)).tolist() == [False, True, True]
    average = 0.99 * 1.0 + 0.01 * (0.49 + 0.5 + 3.0) / 3
    assert keep.average == pytest.approx(average)
    assert keep(rewards_with(0.5 * average - 1e-6, 0.5 * average + 1e-6)).tolist() == [False, True]


def test_the_first_average_is_the_plain_mean_of_the_steps_before():
    keep = EMAStdFilter(beta=1.0, decay=0.9, start=3, statistics_from=1)
    keep(rewards_with(1.0))
    keep(rewards_with(3.0))
    assert keep.average == pytest.approx(2.0)
    assert keep(rewards_with(1.9, 2.1)).tolist() == [False, True]
    assert keep.average == pytest.approx(0.9 * 2 + 0.1 * 2.0)


def test_the_filters_state_survives():
    first = EMAStdFilter(start=2)
    first(rewards_with(1.0))
    second = EMAStdFilter(start=2)
    second.load_state_dict(first.state_dict())
    rewards = rewards_with(0.4, 0.6)
    assert first(rewards).tolist() == second(rewards).tolist() == [False, True]
    assert first.state_dict() == second.state_dict()


def test_the_filter_passes_over_rewards_that_do_not_apply():
    keep = EMAStdFilter(start=1)
    assert keep(np.full((2, 3), np.nan)).all()
    assert keep.average is None
    keep(torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3]))
    assert keep.average == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("options", [{"beta": -1}, {"decay": 1.0}, {"start": 2, "statistics_from": 3}, {"start": 0}])
def test_the_filters_options_are_checked(options):
    with pytest.raises(InvalidInputError):
        EMAStdFilter(**options)
    with pytest.raises(InvalidInputError, match="needs rewards"):
        EMAStdFilter()(np.zeros(3))
