"""Limits of a reward that change with the training step: constant, in two stages, or along a line.

ToolRL (arXiv 2504.13958) studies how the share of format and correctness should move during training. A schedule is a
function ``step -> (low, high)``; `tool_limits` gives those of the paper's released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.contract import finite_numbers, is_finite

Limits = tuple[float, float]
Scale = Literal["default", "equal", "two_stage", "dynamic"]


class Schedule:
    """Base of schedules: frozen dataclasses that define `__call__`."""

    def __call__(self, step: float) -> Limits:
        """Lowest and highest value of the reward at `step`."""
        raise TypeError(f"{type(self).__name__} does not define __call__")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same limits at every step."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check("Constant", (self.low, self.high))

    def __call__(self, step: float) -> Limits:
        """Lowest and highest value."""
        return self.low, self.high


@dataclass(frozen=True)
class TwoStage(Schedule):
    """Limits `before` while ``step < switch``, then `after`."""

    before: Limits
    after: Limits
    switch: float = 30

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            object.__setattr__(self, name, _check(f"TwoStage.{name}", getattr(self, name)))
        if not is_finite(self.switch):
            raise InvalidInputError(f"TwoStage.switch must be a finite number, got {self.switch!r}")

    def __call__(self, step: float) -> Limits:
        """Lowest and highest value at `step`."""
        return self.before if step < self.switch else self.after


@dataclass(frozen=True)
class LinearRamp(Schedule):
    """Limits that move on a straight line from `start` to `end` and stay there.

    Parameters
    ----------
    start, end : (low, high)
    steps : (float, float) > 0
        Steps that the low and the high limit take.
    """

    start: Limits
    end: Limits
    steps: tuple[float, float] = (150, 150)

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, _check(f"LinearRamp.{name}", getattr(self, name)))
        steps = finite_numbers(self.steps)
        if steps is None or len(steps) != 2 or min(steps) <= 0:
            raise InvalidInputError(f"LinearRamp.steps must be two positive numbers, got {self.steps!r}")
        object.__setattr__(self, "steps", steps)

    def __call__(self, step: float) -> Limits:
        """Lowest and highest value at `step`."""
        share = [min(max(step / steps, 0.0), 1.0) for steps in self.steps]
        low, high = (a + (b - a) * s for a, b, s in zip(self.start, self.end, share, strict=True))
        return low, high


def tool_limits(term: Literal["format", "correctness"], scale: Scale = "default") -> Schedule:
    """Limits of a term of the ToolRL reward, as in its released code (arXiv 2504.13958).

    Parameters
    ----------
    term : "format" or "correctness"
    scale : "default" (0 to 1, -3 to 3), "equal" (0 to 1, -1 to 1), "two_stage" (correctness a third up to step 30,
        then format half), "dynamic" (from -2..2 each to -1..1 and -3..3 over 150 steps)

    With "dynamic" the lower limit of the format ends at -1, reached at step 75, and not at 0.
    """
    table: dict[tuple[str, str], Schedule] = {
        ("format", "default"): Constant(0.0, 1.0),
        ("format", "equal"): Constant(0.0, 1.0),
        ("format", "two_stage"): TwoStage((0.0, 1.0), (0.0, 0.5)),
        ("format", "dynamic"): LinearRamp((-2.0, 2.0), (-1.0, 1.0), (75, 150)),
        ("correctness", "default"): Constant(-3.0, 3.0),
        ("correctness", "equal"): Constant(-1.0, 1.0),
        ("correctness", "two_stage"): TwoStage((-1.0, 1.0), (-3.0, 3.0)),
        ("correctness", "dynamic"): LinearRamp((-2.0, 2.0), (-3.0, 3.0)),
    }
    if (term, scale) not in table:
        raise InvalidInputError(
            f"no limits for term {term!r} and scale {scale!r}; terms: format, correctness; "
            "scales: default, equal, two_stage, dynamic"
        )
    return table[term, scale]


def as_schedule(limits: Schedule | str | Sequence[float], term: Literal["format", "correctness"]) -> Schedule:
    """A schedule from itself, the name of a ToolRL scale, or constant ``(low, high)``."""
    if isinstance(limits, Schedule):
        return limits
    if isinstance(limits, str):
        return tool_limits(term, limits)  # type: ignore[arg-type]
    return Constant(*_check("limits", limits))


def limits_at(schedule: Schedule, step: float | None, name: str) -> Limits:
    """Limits at a step. A schedule that changes needs one.

    Raises
    ------
    MissingColumnError
        The schedule changes, and the batch tells no step.
    """
    if step is None and not isinstance(schedule, Constant):
        raise MissingColumnError(
            f"reward {name!r} has limits that change with the step, and found neither trainer_state nor a column 'step'"
        )
    return schedule(step or 0.0)


def _check(where: str, limits: Sequence[float]) -> Limits:
    pair = finite_numbers(limits)
    if pair is None or len(pair) != 2 or not pair[0] < pair[1]:
        raise InvalidInputError(f"{where}: expected finite (low, high) with low < high, got {limits!r}")
    return pair  # type: ignore[return-value]
