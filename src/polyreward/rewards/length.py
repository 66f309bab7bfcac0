"""Length rewards: a trapezoid per task, a budget, and the length of the thinking.

The trapezoid is the length shaping of OpenVLThinkerV2 (arXiv 2604.08539, Eq. 9): 0 outside [minimum, maximum], 1 on
[low, high], straight lines between. Lengths are tokens of the completion where the trainer passes ``completion_ids``,
and words otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, Sample, is_finite

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["tokens", "words", "characters"]
UNITS = ("tokens", "words", "characters")


@dataclass(frozen=True)
class Trapezoid:
    """Trapezoid over lengths, arXiv 2604.08539, Eq. 9.

    Parameters
    ----------
    minimum, low, high, maximum : float, minimum <= low <= high <= maximum
        L_min, L_low, L_high, L_max in the paper. Where two neighbours of a ramp are equal the ramp is a step, and the
        value at the step is 1.

    Raises
    ------
    InvalidInputError
        Thresholds that are negative, not finite, or not in order.
    """

    minimum: float
    low: float
    high: float
    maximum: float

    def __post_init__(self) -> None:
        bounds = (self.minimum, self.low, self.high, self.maximum)
        if not all(is_finite(b) and b >= 0 for b in bounds) or list(bounds) != sorted(bounds):
            raise InvalidInputError(f"expected 0 <= minimum <= low <= high <= maximum, got {bounds}")

    def __call__(self, length: np.ndarray | Tensor | float) -> Any:
        """Value in [0, 1] of each length; a tensor for a tensor, else a numpy array (a float for a number)."""
        values: Any = length if hasattr(length, "new_tensor") else np.asarray(length, dtype=np.float64)
        rise = (values >= self.low) * 1.0
        if self.low > self.minimum:
            rise = ((values - self.minimum) / (self.low - self.minimum)).clip(0, 1)
        fall = (values <= self.high) * 1.0
        if self.maximum > self.high:
            fall = ((self.maximum - values) / (self.maximum - self.high)).clip(0, 1)
        shape = rise * fall
        return float(shape) if isinstance(length, int | float) else shape


@dataclass(frozen=True)
class TrapezoidReward(Reward):
    """Trapezoid of the completion's length, one for all tasks or one a task (arXiv 2604.08539, Eq. 9). Range [0, 1].

    Parameters
    ----------
    minimum, low, high, maximum : float
        See `Trapezoid`. Left out, the reward applies only to the tasks in `tasks`.
    tasks : mapping of task name to (minimum, low, high, maximum)
        Thresholds of single tasks; the task is read from the column `column`.
    unit : "tokens" (words where the trainer passes no ``completion_ids``), "words" or "characters"
    """

    minimum: float | None = None
    low: float | None = None
    high: float | None = None
    maximum: float | None = None
    tasks: Mapping[str, Sequence[float] | Trapezoid] = field(default_factory=dict)
    unit: Unit = "tokens"
    column: str = "task"

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        bounds = (self.minimum, self.low, self.high, self.maximum)
        given = [bound for bound in bounds if bound is not None]
        if len(given) not in (0, 4) or (not given and not self.tasks):
            raise InvalidInputError(f"give minimum, low, high and maximum, or tasks; got {bounds}")
        shapes = {task: t if isinstance(t, Trapezoid) else _trapezoid(task, t) for task, t in self.tasks.items()}
        object.__setattr__(self, "tasks", shapes)
        object.__setattr__(self, "_shape", Trapezoid(*given) if given else None)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the task, where tasks differ."""
        return (self.column,) if self.tasks else ()

    def score(self, sample: Sample) -> float | None:
        """Value in [0, 1]; None for a task without thresholds."""
        shape: Any = self._shape  # type: ignore[attr-defined]
        if self.tasks:
            shape = self.tasks.get(sample.columns[self.column], shape)
        return None if shape is None else shape(float(length_of(sample, self.unit)))


@dataclass(frozen=True)
class LengthBudget(Reward):
    """0 up to `budget`, then down to `penalty` at `limit` and beyond. Range [penalty, 0].

    With ``shape="linear"`` this is the soft overlong punishment of DAPO (arXiv 2503.14476, Eq. 13), whose cache is
    ``limit - budget``; ``"cosine"`` falls along half a cosine wave, the shape of arXiv 2502.03373.

    Parameters
    ----------
    budget, limit : float, 0 <= budget < limit
    penalty : float < 0
    unit : "tokens" (words where the trainer passes no ``completion_ids``), "words" or "characters"
    """

    budget: float
    limit: float
    penalty: float = -1.0
    shape: Literal["linear", "cosine"] = "linear"
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        given = (self.budget, self.limit, self.penalty)
        if not all(map(is_finite, given)) or not 0 <= self.budget < self.limit or not self.penalty < 0:
            raise InvalidInputError(f"expected finite 0 <= budget < limit and penalty < 0, got {given}")
        if self.shape not in ("linear", "cosine"):
            raise InvalidInputError(f"shape must be 'linear' or 'cosine', got {self.shape!r}")

    def score(self, sample: Sample) -> float:
        """Value in [penalty, 0]."""
        over = (length_of(sample, self.unit) - self.budget) / (self.limit - self.budget)
        over = min(max(over, 0.0), 1.0)
        return self.penalty * (over if self.shape == "linear" else (1 - math.cos(math.pi * over)) / 2) + 0.0


@dataclass(frozen=True)
class ThinkLengthReward(Reward):
    """Words of thinking against a target: ``min(1, round(words / target, 2))`` (ToolRL, arXiv 2504.13958).

    0 where ``<think>`` or ``</think>`` is missing. The paper reports that this reward does not help.

    Parameters
    ----------
    max_words : float > 0
        Target of the static reward; 512 in the paper.
    dynamic : bool
        Use ``384 + 256 * step / 105`` as target; needs the step.

    Range [0, 1].
    """

    max_words: float = 512
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.max_words > 0:
            raise InvalidInputError(f"max_words must be positive, got {self.max_words}")

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        target = self.max_words
        if self.dynamic:
            if sample.step is None:
                raise InvalidInputError(f"reward {self.__name__!r} is dynamic and found no trainer_state or 'step'")
            target = 384 + 256 * sample.step / 105
        if "<think>" not in sample.text or "</think>" not in sample.text:
            return 0.0
        thinking = sample.text.rpartition("<think>")[2].partition("</think>")[0]
        return min(1.0, round(len(thinking.split()) / target, 2))


def length_of(sample: Sample, unit: Unit) -> int:
    """Length of a completion; in words where tokens are asked for and not known."""
    if unit == "characters":
        return len(sample.text)
    if unit == "tokens" and sample.tokens is not None:
        return sample.tokens
    return len(sample.text.split())


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise InvalidInputError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def _trapezoid(task: str, bounds: Sequence[float]) -> Trapezoid:
    try:
        return Trapezoid(*bounds)
    except (TypeError, InvalidInputError) as error:  # TypeError: not a list of four
        raise InvalidInputError(
            f"task {task!r}: expected (minimum, low, high, maximum) with 0 <= minimum <= low <= high <= maximum, "
            f"got {bounds!r}"
        ) from error
