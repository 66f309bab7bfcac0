import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.rewards.length import LengthBudget, ThinkLengthReward, Trapezoid, TrapezoidReward

LENGTHS = [5, 10, 15, 20, 40, 60, 80, 81]
VALUES = [0, 0, 0.5, 1, 1, 0.5, 0, 0]


def words(count):
    return " ".join(["w"] * count)


def test_trapezoid_oracle():
    shape = Trapezoid(10, 20, 40, 80)
    assert shape(np.array(LENGTHS)).tolist() == VALUES
    assert [shape(n) for n in LENGTHS] == VALUES
    tensor = shape(torch.tensor(LENGTHS, dtype=torch.float32))
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == VALUES
    assert shape(torch.tensor(LENGTHS)).tolist() == VALUES


def test_equal_thresholds_are_a_step():
    assert Trapezoid(10, 10, 20, 20)(np.array([9, 10, 20, 21])).tolist() == [0, 1, 1, 0]
    assert Trapezoid(0, 0, 5, 10)(np.array([0, 5, 7.5])).tolist() == [1, 1, 0.5]
    assert Trapezoid(3, 3, 3, 3)(np.array([2, 3, 4])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("bounds", [(2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3), (-1, 0, 1, 2), (0, 1, 2, math.inf)])
def test_thresholds_out_of_order(bounds):
    with pytest.raises(InvalidInputError, match="minimum <= low <= high <= maximum"):
        Trapezoid(*bounds)


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).map(sorted), st.integers(0, 60))
def test_trapezoid_equals_the_cases_of_the_paper(bounds, n):
    minimum, low, high, maximum = bounds
    if low <= n <= high:
        value = 1.0
    elif n < minimum or n > maximum:
        value = 0.0
    elif n < low:
        value = (n - minimum) / (low - minimum)
    else:
        value = (maximum - n) / (maximum - high)
    assert Trapezoid(*bounds)(n) == pytest.approx(value)


def test_tokens_where_known_else_words():
    reward = TrapezoidReward(10, 20, 40, 80)
    texts = [words(n) for n in LENGTHS]
    assert reward(None, texts) == VALUES
    assert reward(None, ["x"] * 8, completion_ids=[[7] * n for n in LENGTHS]) == VALUES
    assert TrapezoidReward(10, 20, 40, 80, unit="words")(None, ["x"], completion_ids=[[0] * 30]) == [0]
    assert TrapezoidReward(10, 20, 40, 80, unit="characters")(None, ["x" * 15]) == [0.5]


def test_thresholds_by_task():
    reward = TrapezoidReward(tasks={"long": (10, 20, 40, 80), "short": Trapezoid(0, 1, 2, 4)})
    texts, tasks = [words(15), words(2), words(3), words(30)], ["long", "short", "short", "other"]
    assert reward(None, texts, task=tasks) == [0.5, 1, 0.5, None]
    with_default = TrapezoidReward(0, 0, 100, 100, tasks={"short": (0, 1, 2, 4)}, column="source")
    assert with_default(None, texts[2:], source=["short", "other"]) == [0.5, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"minimum": 1},
        {"tasks": {"a": (1, 2, 3)}},
        {"minimum": 1, "low": 2, "high": 3, "maximum": 4, "unit": "lines"},
    ],
)
def test_bad_trapezoid_rewards(options):
    with pytest.raises(InvalidInputError):
        TrapezoidReward(**options)


@pytest.mark.parametrize("wrong", [(4, 3, 2, 1), (1, 2, 3), 5, ("a", 1, 2, 3), (0, 1, 2, math.inf)])
def test_thresholds_of_a_task_are_refused_with_its_name(wrong):
    with pytest.raises(InvalidInputError, match=f"task 'a': expected .* got {re.escape(repr(wrong))}"):
        TrapezoidReward(tasks={"b": (1, 2, 3, 4), "a": wrong})


def test_budget_is_the_soft_overlong_punishment():
    lengths = [0, 100, 110, 125, 150, 200]
    ids = [[0] * n for n in lengths]
    texts = [""] * 6
    assert LengthBudget(100, 150)(None, texts, completion_ids=ids) == pytest.approx([0, 0, -0.2, -0.5, -1, -1])
    cosine = LengthBudget(100, 150, penalty=-2, shape="cosine")(None, texts, completion_ids=ids)
    assert cosine == pytest.approx([0, 0, -(1 - math.cos(0.2 * math.pi)), -1, -2, -2])
    assert all(math.copysign(1, v) > 0 for v in cosine[:2])


@pytest.mark.parametrize(
    "options",
    [{"budget": 5, "limit": 5}, {"budget": -1, "limit": 5}, {"budget": 1, "limit": 5, "penalty": 0},
     {"budget": 1, "limit": 5, "shape": "step"}, {"budget": 1, "limit": 5, "penalty": -math.inf},
     {"budget": 1, "limit": math.inf}],
)  # fmt: skip
def test_bad_budgets(options):
    with pytest.raises(InvalidInputError):
        LengthBudget(**options)


def test_thinking_length_of_the_card():
    def think(count):
        return f"<think> {words(count)} </think>\n<response>x</response>"

    texts = [think(256), think(512), think(700), think(5), think(0), words(600), "<think>a"]
    assert ThinkLengthReward()(None, texts) == [0.5, 1, 1, 0.01, 0, 0, 0]
    dynamic = ThinkLengthReward(dynamic=True)
    assert dynamic(None, [think(192)] * 2, step=[0, 105]) == [0.5, 0.3]
    with pytest.raises(InvalidInputError, match="is dynamic"):
        dynamic(None, [think(1)])
    with pytest.raises(InvalidInputError):
        ThinkLengthReward(0)


def test_the_last_thinking_counts():
    assert ThinkLengthReward(4)(None, ["<think>a b c d</think> <think>a b</think>"]) == [0.5]
