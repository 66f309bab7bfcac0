import math
import re

import pytest

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.schedules import Constant, LinearRamp, TwoStage, as_schedule, limits_at, tool_limits
from polyreward.rewards.tool_calls import ToolCallReward, ToolFormatReward


@pytest.mark.parametrize(
    ("step", "form", "correctness"),
    [
        (0, (-2, 2), (-2, 2)),
        (30, (-1.6, 1.8), (-2.2, 2.2)),
        (75, (-1, 1.5), (-2.5, 2.5)),
        (120, (-1, 1.2), (-2.8, 2.8)),
        (150, (-1, 1), (-3, 3)),
        (4000, (-1, 1), (-3, 3)),
    ],
)
def test_dynamic_scale_of_the_card(step, form, correctness):
    assert tool_limits("format", "dynamic")(step) == pytest.approx(form)
    assert tool_limits("correctness", "dynamic")(step) == pytest.approx(correctness)


@pytest.mark.parametrize("step", range(0, 200, 7))
def test_dynamic_scale_equals_the_formula(step):
    high, low = max(1, 2 - (2 - 1) * step / 150), min(-1, -2 + (2 + 0) * step / 150)
    assert tool_limits("format", "dynamic")(step) == pytest.approx((low, high))
    assert tool_limits("correctness", "dynamic")(step) == pytest.approx(
        (max(-3, -2 - step / 150), min(3, 2 + step / 150))
    )


def test_two_stages_switch_at_step_30():
    form, correctness = tool_limits("format", "two_stage"), tool_limits("correctness", "two_stage")
    assert [form(s) for s in (0, 29, 30, 99)] == [(0, 1), (0, 1), (0, 0.5), (0, 0.5)]
    assert [correctness(s) for s in (0, 29, 30, 99)] == [(-1, 1), (-1, 1), (-3, 3), (-3, 3)]


def test_constant_scales():
    assert tool_limits("format")(7) == tool_limits("format", "equal")(7) == (0, 1)
    assert tool_limits("correctness")(7) == (-3, 3)
    assert tool_limits("correctness", "equal")(7) == (-1, 1)


def test_as_schedule():
    assert as_schedule([0, 2], "format") == Constant(0, 2)
    assert as_schedule("default", "correctness") == Constant(-3, 3)
    ramp = LinearRamp([0, 1], [1, 3], [10, 20])
    assert as_schedule(ramp, "format") is ramp
    assert ramp(5) == (0.5, 1.5)
    assert ramp(-5) == (0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(1, 1),
        lambda: TwoStage((0, 1), (2, 1)),
        lambda: LinearRamp((0, 1), (1,)),
        lambda: LinearRamp((0, 1), (0, 2), (0, 1)),
        lambda: tool_limits("format", "fast"),
        lambda: tool_limits("colour", "default"),
        lambda: as_schedule((0, 1, 2), "format"),
        lambda: TwoStage((0, 1), (0, 2), "late"),
    ],
)
def test_bad_limits(make):
    with pytest.raises(InvalidInputError):
        make()


@pytest.mark.parametrize("wrong", [5, ("a", "b"), (0, math.inf), (math.nan, 1), None])
def test_limits_that_are_no_numbers_are_named(wrong):
    found = re.escape(repr(wrong))
    for make in (ToolCallReward, ToolFormatReward):
        with pytest.raises(InvalidInputError, match=f"limits: expected finite .low, high.* got {found}"):
            make(limits=wrong)
    with pytest.raises(InvalidInputError, match=f"TwoStage.after: expected finite .low, high.* got {found}"):
        TwoStage((0, 1), wrong)
    with pytest.raises(InvalidInputError, match=f"LinearRamp.steps must be two positive numbers, got {found}"):
        LinearRamp((0, 1), (0, 2), wrong)


def test_a_changing_schedule_needs_a_step():
    assert limits_at(Constant(0, 1), None, "x") == (0, 1)
    with pytest.raises(MissingColumnError, match="reward 'x' has limits that change"):
        limits_at(TwoStage((0, 1), (0, 2)), None, "x")
