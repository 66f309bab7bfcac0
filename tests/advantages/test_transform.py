"""Chains, blends, memory, and what `compute_advantages` promises."""

import json
from typing import Any

import pytest
import torch

from polyreward.advantages import (
    Center,
    Chain,
    MovingScale,
    Multiply,
    Scale,
    Transform,
    WeightedSum,
    blend,
    chain,
    compute_advantages,
    dr_grpo,
    ema_grpo,
    grpo,
)
from polyreward.advantages.transform import Blend, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError

NAN = float("nan")


def pair() -> RewardBatch:
    return RewardBatch(torch.tensor([[1.0, 4.0], [0.0, 2.0], [0.0, NAN], [NAN, NAN]]), ("a", "b"), [0, 0, 1, 1])


def test_grpo_by_hand() -> None:
    batch = RewardBatch(torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0]), groups=["x", "y", "x", "y", "y"])
    parts = chain(WeightedSum(), Center("group"), Scale("group", epsilon=0.0))
    expected = torch.tensor([0.5**0.5, -8.0 / 84**0.5, -(0.5**0.5), -2.0 / 84**0.5, 10.0 / 84**0.5])
    torch.testing.assert_close(compute_advantages(parts, batch), expected)
    torch.testing.assert_close(compute_advantages(grpo(epsilon=0.0), batch), expected)


def test_chains_are_flat_whatever_they_are_made_of() -> None:
    sum_, center, scale = WeightedSum(), Center(), Scale()
    assert chain(chain(sum_, center), scale) == chain(sum_, chain(center, scale)) == Chain((sum_, center, scale))
    assert Chain((Chain((sum_,)), Chain((center, scale)))).parts == (sum_, center, scale)
    assert chain(chain()).parts == ()


def test_a_blend_is_the_weighted_sum_of_its_branches() -> None:
    batch = pair()
    first, second = compute_advantages(grpo(), batch), compute_advantages(dr_grpo(), batch)
    mixture = blend(0.7 * grpo(), dr_grpo() * 0.3)
    torch.testing.assert_close(compute_advantages(mixture, batch), 0.7 * first + 0.3 * second)
    assert compute_advantages(blend(dr_grpo()), batch).equal(second)
    assert (2 * grpo()).parts[-1] == Multiply(2.0)


def test_what_a_chain_without_parts_does() -> None:
    assert compute_advantages(chain(), RewardBatch([1.0, None, 3.0])).tolist() == [1.0, 0.0, 3.0]
    assert compute_advantages(0.5 * chain(), RewardBatch([1.0, None, 3.0])).tolist() == [0.5, 0.0, 1.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(grpo), "chain takes transforms, got grpo; call it first"),
        (lambda: chain("grpo"), "chain takes transforms, got 'grpo'"),
        (lambda: blend(grpo(), 3), "blend takes transforms, got 3"),
        (lambda: blend(), "blend needs at least one transform"),
        (lambda: Blend(()), "blend needs at least one transform"),
        (lambda: NAN * grpo(), "factor must be a finite number, got nan"),
        (lambda: Multiply(float("inf")), "factor must be a finite number, got inf"),
    ],
)
def test_combinations_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_branches_of_different_shapes_are_refused() -> None:
    square = RewardBatch(torch.zeros(2, 2))  # N = K, where adding (N,) and (N, K) would not fail by itself
    with pytest.raises(InvalidInputError, match=r"different shapes: \(2,\) and \(2, 2\)"):
        compute_advantages(blend(grpo(), Center()), square)


def test_a_transform_that_forgets_to_reduce_is_told_so() -> None:
    with pytest.raises(InvalidInputError, match=r"returned shape \(4, 2\), expected \(4,\); add WeightedSum\(\)"):
        compute_advantages(Center(), pair())
    assert compute_advantages(Center(), RewardBatch([1.0, 3.0])).tolist() == [-1.0, 1.0]


class Broken(Transform):
    def __call__(self, signal: torch.Tensor, batch: RewardBatch) -> torch.Tensor:
        return torch.where(torch.arange(len(batch)) == 2, NAN, torch.ones(len(batch)))


def test_values_that_are_not_finite_do_not_come_out() -> None:
    with pytest.raises(InvalidInputError, match="the transform returned nan for row 2"):
        compute_advantages(Broken(), RewardBatch([1.0, 1.0, 1.0]))
    assert compute_advantages(Broken(), RewardBatch([1.0, 1.0, NAN])).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(TypeError, match="Transform does not define __call__"):
        compute_advantages(Transform(), RewardBatch([1.0]))


def test_half_precision_is_rounded_once() -> None:
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.7], dtype=torch.bfloat16)
    got = compute_advantages(grpo(), RewardBatch(rewards))
    assert got.dtype == torch.bfloat16
    assert got.equal(compute_advantages(grpo(), RewardBatch(rewards.float())).to(torch.bfloat16))


def test_advantages_carry_the_gradient_of_the_rewards() -> None:
    rewards = torch.tensor([0.0, 1.0, 3.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 0, 1, 1])

    def advantages(r: torch.Tensor) -> torch.Tensor:
        return compute_advantages(grpo(), RewardBatch(r, groups=groups))

    compute = advantages(rewards)
    compute[:3].square().sum().backward(retain_graph=True)
    assert rewards.grad is not None
    assert bool(torch.isfinite(rewards.grad).all())
    assert torch.autograd.gradcheck(lambda r: advantages(torch.cat([r, rewards[3:].detach()])), (rewards[:3],))


# the signal


def test_what_applies() -> None:
    batch = pair()
    values, mask = applicable(batch.rewards, batch)
    assert values.tolist() == [[1.0, 4.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert mask is not None
    assert mask.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    _, row = applicable(torch.ones(4), batch)
    assert row is not None
    assert row.tolist() == [True, True, True, False]
    _, wide = applicable(torch.ones(4, 3), batch)
    assert wide is not None
    assert wide.tolist() == [[True] * 3] * 3 + [[False] * 3]
    values, mask = applicable(torch.tensor([1.0, NAN, 2.0, 3.0]), RewardBatch(torch.zeros(4)))
    assert values.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert mask is not None
    assert mask.tolist() == [True, False, True, True]
    assert applicable(torch.ones(4), RewardBatch(torch.zeros(4)))[1] is None
    _, both = applicable(torch.tensor([NAN, 1.0, 2.0, 3.0]), batch)  # neither NaN in the signal nor without a reward
    assert both is not None
    assert both.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (torch.tensor([0.0, 0.0, float("inf"), 0.0]), "the signal is inf in row 2"),
        (torch.tensor([[0.0, float("-inf")], [1, 1], [1, 1], [1, 1]]), "the signal is -inf in row 0"),
        (torch.zeros(3), r"a signal is a float tensor \(4,\) or \(4, K\), got torch.float32 \(3,\)"),
        (torch.zeros(4, 1, 1), r"a signal is a float tensor \(4,\) or \(4, K\), got torch.float32 \(4, 1, 1\)"),
        (torch.zeros(4, dtype=torch.int64), r"a signal is a float tensor \(4,\) or \(4, K\), got torch.int64 \(4,\)"),
    ],
)
def test_signals_that_are_refused(signal: torch.Tensor, message: str) -> None:
    for part in (Center(), Scale(), Multiply(2.0), MovingScale("batch")):
        with pytest.raises(InvalidInputError, match=message):
            part(signal, pair())


# memory


def test_memory_of_chains_and_blends_is_plain_data() -> None:
    batch = RewardBatch(torch.tensor([0.0, 1.0, 5.0, 2.0]), groups=[0, 0, 1, 1], columns={"task": list("xxyy")})
    first = blend(0.5 * ema_grpo(), grpo(), ema_grpo(decay=0.5))
    assert first.state_dict() == {}
    assert grpo().state_dict() == {}
    compute_advantages(first, batch)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"0", "2"}
    second = blend(0.5 * ema_grpo(), grpo(), ema_grpo(decay=0.5))
    second.load_state_dict(state)
    assert compute_advantages(first, batch).equal(compute_advantages(second, batch))
    second.load_state_dict({})
    assert second.state_dict() == {}


def test_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"WeightedSum has no state, but was given \['mean'\]"):
        grpo().load_state_dict({"0": {"mean": 1.0}})
    with pytest.raises(InvalidInputError, match=r"state for parts \['7'\], but the chain has 2 parts"):
        grpo().load_state_dict({"7": {}})
