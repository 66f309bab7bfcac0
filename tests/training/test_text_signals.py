from __future__ import annotations

import asyncio
import math

import pytest
import torch

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import blend, chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.training.reward_calls import checked_reward, with_reward_weights
from polyreward.training.signals import advantage_shares, batch_statistics


def batch() -> RewardBatch:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0], [5.0, 7.0], [5.0, 7.0]])
    return RewardBatch(
        rewards, ("score", "length"), [0, 0, 1, 1, 2, 2], {"task": list("aabbcc"), "stratum": [0, 1, 0, 1, 0, 1]}
    )


def test_shares_of_a_weighted_sum_are_the_split_of_its_variance() -> None:
    centred = compute_advantages(chain(WeightedSum({"score": 1.0, "length": 0.5}), Center()), batch())
    # Group-centred weighted rewards: score +-0.5 in one group, length +-1 in another; 0.5 and 2 of 2.5 in all.
    assert advantage_shares(batch(), centred).tolist() == pytest.approx([0.2, 0.8])


def test_shares_of_equal_rewards_split_evenly_and_of_no_variance_are_zero() -> None:
    twice = RewardBatch(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), ("a", "b"), [0, 0])
    assert advantage_shares(twice, torch.tensor([0.5, -0.5])).tolist() == pytest.approx([0.5, 0.5])
    assert advantage_shares(twice, torch.zeros(2)).tolist() == [0.0, 0.0]


def test_figures_of_tasks_and_strata() -> None:
    advantages = torch.tensor([0.5, -0.5, 2.0, -2.0, 0.0, 0.0])
    found = batch_statistics(batch(), advantages)
    assert found["advantage/zero_signal"] == pytest.approx(1 / 3)
    assert found["task/c/zero_signal"] == 1
    assert found["task/b/zero_signal"] == 0
    assert found["task/b/advantage_size"] == 2
    assert found["task/b/reward/length"] == 2
    assert found["stratum/0/advantage"] == pytest.approx(2.5 / 3)
    assert found["stratum/1/share"] == 0.5


def test_equal_advantages_other_than_zero_are_a_signal() -> None:
    pair = RewardBatch(torch.ones(2), groups=[0, 0])
    assert batch_statistics(pair, torch.tensor([1.0, 1.0]))["advantage/zero_signal"] == 0


def test_a_reward_that_never_applies_to_a_task_has_no_mean_there() -> None:
    rewards = torch.tensor([[1.0, torch.nan], [0.0, torch.nan], [1.0, 3.0], [0.0, 1.0]])
    some = RewardBatch(rewards, ("a", "b"), [0, 0, 1, 1], {"task": ["x", "x", "y", "y"]})
    found = batch_statistics(some, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert math.isnan(found["task/x/reward/b"])
    assert found["task/y/reward/b"] == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward 'r' returned 1 values for 2 completions"),
        (3.0, "reward 'r' returned float"),
        (["x", 1.0], "reward 'r' returned 'x' for completion 0"),
    ],
)
def test_a_wrong_result_names_the_reward(returned: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        checked_reward(lambda **_: returned, "r")(prompts=["a", "b"], completions=["c", "d"])

    async def later(**_: object) -> object:
        return returned

    with pytest.raises(InvalidInputError, match=message):
        asyncio.run(checked_reward(later, "r")(prompts=["a", "b"], completions=["c", "d"]))


def test_numbers_of_any_kind_pass() -> None:
    values = torch.tensor([0.5, 2.0])
    assert checked_reward(lambda **_: values, "r")(completions=["a", "b"]) == [0.5, 2.0]
    assert checked_reward(lambda **_: [None, True], "r")(completions=["a", "b"]) == [None, True]


def test_weights_reach_every_part_that_has_none() -> None:
    weights = {"score": 2.0, "length": 0.0}
    given = with_reward_weights(blend(0.5 * chain(WeightedSum(), Center()), chain(WeightedSum(), Scale())), weights)
    own = blend(0.5 * chain(WeightedSum(weights), Center()), chain(WeightedSum(weights), Scale()))
    assert torch.equal(compute_advantages(given, batch()), compute_advantages(own, batch()))
    alone = chain(WeightedSum(weights), Center())
    assert with_reward_weights(alone, weights) is alone


def test_contradicting_weights_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="set them in one place"):
        with_reward_weights(chain(WeightedSum({"score": 1.0, "length": 1.0}), Center()), {"score": 2.0, "length": 1.0})
    with pytest.raises(InvalidInputError, match="no part of the advantage takes weights"):
        with_reward_weights(Center(), {"score": 2.0, "length": 1.0})
    assert with_reward_weights(Center(), {"score": 1.0, "length": 1.0}) == Center()
