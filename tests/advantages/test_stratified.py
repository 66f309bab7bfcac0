"""Stratified GRPO: the card's oracles, the decomposition, invariances, builders of strata."""

import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages import (
    Center,
    Stratify,
    by_key,
    by_quantile,
    by_tool_calls,
    compute_advantages,
    grpo,
    stratified_grpo,
)
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError

NAN = float("nan")
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
STRATA = [0, 0, 0, 1, 1, 1]


def advantages(rewards: Any, strata: Any, groups: Any = None, **arguments: Any) -> torch.Tensor:
    batch = RewardBatch(torch.tensor(rewards, dtype=torch.float64), groups=groups, columns={"stratum": strata})
    return compute_advantages(stratified_grpo(**{"epsilon": 0.0, **arguments}), batch)


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        (0.0, [1.0, -1.0, -1.0, 1.0, 1.0, -1.0]),
        (1.0, [1.4142, -0.7071, -0.7071, 0.7071, 0.7071, -1.4142]),
        (0.8, [1.3314, -0.7657, -0.7657, 0.7657, 0.7657, -1.3314]),
    ],
)
def test_the_worked_example(blend: float, expected: list[float]) -> None:
    for strata in (STRATA, ["one", "one", "one", "two", "two", "two"], [5, 5, 5, 2, 2, 2]):  # names are only names
        got = advantages(REWARDS, strata, blend=blend)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)
    got = advantages(REWARDS, STRATA, blend=blend, epsilon=1e-6)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-5)


def test_the_variance_between_strata() -> None:
    batch = RewardBatch(torch.tensor(REWARDS, dtype=torch.float64), columns={"stratum": STRATA})
    whole, inside = (part(batch.rewards[:, 0], batch) for part in (Center("group"), Center(("group", "stratum"))))
    assert whole.var(correction=0).item() == pytest.approx(0.25)
    assert inside.var(correction=0).item() == pytest.approx(0.2222, abs=5e-5)
    assert (whole.var(correction=0) - inside.var(correction=0)).item() == pytest.approx(0.027778, abs=5e-7)
    bias = whole - inside  # constant inside a stratum: the cross-stratum bias
    assert bias.tolist() == pytest.approx([-1 / 6] * 3 + [1 / 6] * 3)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_one_stratum_is_grpo(blend: float) -> None:
    rewards, groups = [0.0, 1.0, 0.5, 2.0, 2.0, -1.0], [0, 1, 0, 1, 0, 1]
    got = advantages(rewards, [4] * 6, groups, blend=blend)
    batch = RewardBatch(torch.tensor(rewards, dtype=torch.float64), groups=groups)
    torch.testing.assert_close(got, compute_advantages(grpo(epsilon=0.0, ddof=0), batch))


def test_strata_of_one_leave_the_share_of_the_group() -> None:
    rewards = [0.1, 0.7, 0.4, 0.9]
    whole = compute_advantages(grpo(epsilon=0.0, ddof=0), RewardBatch(torch.tensor(rewards, dtype=torch.float64)))
    for ddof in (0, 1):  # the sample deviation of one row is no reason for a NaN
        assert advantages(rewards, [0, 1, 2, 3], blend=1.0, ddof=ddof).tolist() == [0.0] * 4
    torch.testing.assert_close(advantages(rewards, [0, 1, 2, 3], blend=0.8), 0.2 * whole)


def test_strata_of_equal_rewards_are_exactly_zero() -> None:
    got = advantages([0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3], [0, 0, 0, 1, 1, 1, 1], blend=1.0)
    assert got.tolist() == [0.0] * 7


def test_a_policy_over_strata_gets_no_gradient_from_pure_strata() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    strata = torch.randint(0, 3, (16,), generator=generator)
    rewards = torch.rand(16, generator=generator, dtype=torch.float64) + strata
    for blend, is_zero in ((1.0, True), (0.8, False)):
        weights = advantages(rewards.tolist(), strata, blend=blend)
        (gradient,) = torch.autograd.grad((weights * logits.log_softmax(0)[strata]).sum(), logits)
        assert (gradient.abs().max().item() < 1e-12) is is_zero


Rows = list[tuple[int, int, float]]
TABLES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(-1, 2),
        st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0, 0.1]), st.floats(-5, 5)),
    ),
    min_size=1,
    max_size=16,
)


def loop(data: Rows, blend: float, epsilon: float, ddof: int) -> list[float]:
    def parts_by(key: Any) -> dict[Any, list[float]]:
        found = defaultdict(list)
        for row in data:
            if row[1] != -1 and not math.isnan(row[2]):
                found[key(row)].append(row[2])
        return found

    def score(r: float, x: list[float]) -> float:
        if len(set(x)) == 1:
            return 0.0
        mean = math.fsum(x) / len(x)
        return (r - mean) / (math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (len(x) - ddof)) + epsilon)

    groups, strata = parts_by(lambda row: row[0]), parts_by(lambda row: row[:2])
    return [
        0.0
        if row[1] == -1 or math.isnan(row[2])
        else blend * score(row[2], strata[row[:2]]) + (1 - blend) * score(row[2], groups[row[0]])
        for row in data
    ]


@settings(max_examples=80, deadline=None)
@given(TABLES, st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([0, 1]))
def test_against_a_loop_over_groups_and_strata(data: Rows, blend: float, ddof: int) -> None:
    groups, strata, rewards = (list(column) for column in zip(*data, strict=True))
    got = advantages(rewards, strata, groups, blend=blend, epsilon=1e-3, ddof=ddof)
    expected = torch.tensor(loop(data, blend, 1e-3, ddof), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(TABLES, st.lists(st.tuples(st.sampled_from([0.5, 2.0, 8.0]), st.integers(-4, 4)), min_size=9, max_size=9))
def test_each_stratum_may_have_a_scale_and_a_shift_of_its_own(data: Rows, maps: list[tuple[float, int]]) -> None:
    groups, strata, rewards = (list(column) for column in zip(*data, strict=True))
    moved = [r * maps[3 * g + s][0] + maps[3 * g + s][1] for g, s, r in data]
    first, second = (advantages(values, strata, groups, blend=1.0) for values in (rewards, moved))
    spread = defaultdict(list)
    for row in data:
        spread[row[:2]].append(row[2])
    # differences at the level of rounding do not survive a shift; the property is about those that do
    clear = [max(spread[row[:2]]) - min(spread[row[:2]]) == 0 or _gap(spread[row[:2]]) > 1e-6 for row in data]
    torch.testing.assert_close(first[clear], second[clear], rtol=1e-6, atol=1e-6)


def _gap(x: list[float]) -> float:
    known = sorted({v for v in x if not math.isnan(v)})
    return min((b - a for a, b in pairwise(known)), default=math.inf)


def test_rows_that_are_not_used() -> None:
    full = advantages([1.0, 0.0, 0.5, 9.0], [0, 0, 1, -1])
    torch.testing.assert_close(full[:3], advantages([1.0, 0.0, 0.5], [0, 0, 1]))
    assert full[3] == 0.0
    crossed = RewardBatch([1.0, 0.0, 5.0, 7.0], columns={"calls": [1, 1, -1, 1], "depth": ["a", "a", "a", "b"]})
    got = compute_advantages(stratified_grpo(by=("calls", "depth"), blend=1.0, epsilon=0.0), crossed)
    assert got.tolist() == [1.0, -1.0, 0.0, 0.0]
    mixed = RewardBatch([1.0, 0.0, 5.0], columns={"stratum": np.array(["a", "a", -1], dtype=object)})
    assert compute_advantages(stratified_grpo(epsilon=0.0), mixed).tolist() == [1.0, -1.0, 0.0]
    assert advantages([1.0, 2.0], [-1, -1]).tolist() == [0.0, 0.0]
    assert advantages([1.0, 2.0], [0, 0], groups=[-1, -1], by=("group", "stratum")).tolist() == [-1.0, 1.0]


def test_several_rewards_have_strata_each() -> None:
    rewards = torch.tensor([[1.0, 5.0], [0.0, 5.0], [NAN, 1.0]], dtype=torch.float64)
    batch = RewardBatch(rewards, columns={"stratum": [0, 0, 0]})
    got = Stratify(1.0, epsilon=0.0)(batch.rewards, batch)
    torch.testing.assert_close(got[:, 0], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(got[:, 1], torch.tensor([0.5**0.5, 0.5**0.5, -(2**0.5)], dtype=torch.float64))


@pytest.mark.parametrize("blend", [-0.1, 1.1, NAN])
def test_blend_out_of_range(blend: float) -> None:
    with pytest.raises(InvalidInputError, match=r"blend must be in \[0, 1\], got"):
        stratified_grpo(blend=blend)


def test_strata_that_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"column 'stratum' must be integers or strings, got torch\.float64"):
        advantages([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(InvalidInputError, match="column 'stratum' must be one-dimensional"):
        advantages([1.0, 2.0], torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(MissingColumnError, match="no column 'stratum'"):
        compute_advantages(stratified_grpo(), RewardBatch([1.0]))


# builders


def test_by_tool_calls() -> None:
    assert by_tool_calls([0, 2, None, ["a", "b"], [], {"q": 1}, (1,), 3.0]).tolist() == [0, 2, -1, 2, 0, 1, 1, 3]
    assert by_tool_calls([0, 5, None, 2], most=2).tolist() == [0, 2, -1, 2]
    assert by_tool_calls([0, 5], most=0).tolist() == [0, 0]
    assert by_tool_calls(torch.tensor([1, 0])).tolist() == [1, 0]
    assert by_tool_calls([np.array([1, 2]), np.int64(4)]).tolist() == [2, 4]
    assert by_tool_calls([]).tolist() == []
    assert by_tool_calls([]).dtype == torch.int64


@pytest.mark.parametrize("call", [-1, 0.5, NAN, float("inf"), "search", b"x", object()])
def test_calls_that_are_not_a_number(call: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"row 1 has .* tool calls; expected a whole number"):
        by_tool_calls([0, call])


def test_most_calls_out_of_range() -> None:
    with pytest.raises(InvalidInputError, match="most must be at least 0, got -1"):
        by_tool_calls([1], most=-1)


def test_by_key() -> None:
    trajectories = ["search search", "", "search", "x", "", "search search"]
    assert by_key(trajectories, lambda t: t.count("search")).tolist() == [0, 1, 2, 1, 1, 0]
    assert by_key([1, 2, None], lambda t: t).tolist() == [0, 1, -1]
    assert by_key([[1, "a"], [1, "a"], [1]], lambda t: t).tolist() == [0, 0, 1]
    assert by_key([1.0, 1, NAN], lambda t: t).tolist() == [0, 0, -1]
    assert by_key([], lambda t: t).tolist() == []
    with pytest.raises(InvalidInputError, match="the key of row 1 is a dict; expected a number, string or tuple"):
        by_key([1, {}], lambda t: t)


def test_by_quantile() -> None:
    assert by_quantile([1, 2, 3, 4, 5, 6, 7, 8]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert by_quantile(torch.tensor([8, 1, 5, 2]), 2).tolist() == [1, 0, 1, 0]
    assert by_quantile([3.0, None, 1.0, NAN], 2).tolist() == [1, -1, 0, -1]
    assert by_quantile([5, 5, 5], 3).tolist() == [0, 0, 0]
    assert by_quantile([7.0], 4).tolist() == [0]
    assert by_quantile([3, 1, 2], 1).tolist() == [0, 0, 0]
    assert by_quantile([NAN, NAN]).tolist() == [-1, -1]
    assert by_quantile([]).tolist() == []
    assert by_quantile(np.array([1.0, 2.0])[::-1], 2).tolist() == [1, 0]
    assert by_quantile(torch.tensor([1.0, 2.0], dtype=torch.float16, requires_grad=True), 2).tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=1, max_size=30), st.integers(1, 6), st.randoms())
def test_quantile_strata_keep_order_and_ties(feature: list[int], parts: int, random: Any) -> None:
    strata = by_quantile(feature, parts).tolist()
    assert all(0 <= s < parts for s in strata)
    for a, s in zip(feature, strata, strict=True):
        assert all(s <= t for b, t in zip(feature, strata, strict=True) if a <= b)
    order = list(range(len(feature)))
    random.shuffle(order)
    assert by_quantile([feature[i] for i in order], parts).tolist() == [strata[i] for i in order]


@pytest.mark.parametrize(
    ("feature", "parts", "message"),
    [
        ([1.0], 0, "parts must be a whole number of at least 1, got 0"),
        ([1.0], 2.5, "parts must be a whole number of at least 1, got 2.5"),
        ([float("inf")], 2, "feature must be one-dimensional and finite"),
        ([[1.0]], 2, "feature must be one-dimensional and finite"),
        (["long"], 2, "feature must hold one number a row"),
    ],
)
def test_quantiles_that_are_refused(feature: Any, parts: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        by_quantile(feature, parts)
