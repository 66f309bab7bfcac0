"""Graded comparisons for grounding, counting and transcription (OneThinker, arXiv 2512.03043).

Functions work on numpy arrays or tensors along the last axis; the rewards below read predictions from text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.answers import check_place, find_answer, numbers_in, parse_number
from polyreward.rewards.contract import Reward, Sample
from polyreward.rewards.proximity import arrays, numbers_from, read_numbers

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))


def iou_1d(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Any:
    """Intersection over union of intervals (..., 2) given as start, end; (...) in [0, 1].

    0 where an interval ends before it starts, and where the union is empty. NaN counts as no overlap.
    """
    return _iou(first, second, 1)


def iou_2d(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Any:
    """Intersection over union of boxes (..., 4) given as left, top, right, bottom; (...) in [0, 1].

    0 where a box has no area or is inside out. NaN counts as no overlap.
    """
    return _iou(first, second, 2)


def mean_relative_accuracy(
    prediction: np.ndarray | Tensor | float, target: np.ndarray | Tensor | float, tolerance: float = 1e-9
) -> Any:
    """Mean over t in {0.50, 0.55, ..., 0.95} of ``[relative error < 1 - t]``, in [0, 1] (arXiv 2512.03043).

    The comparison is strict: an error of exactly ``1 - t`` does not count. `tolerance`, at least 4 units of rounding of
    the given dtype, stands against rounding. For a target of 0 only 0 is right. NaN in the prediction earns 0.
    """
    tensor = next((values for values in (prediction, target) if hasattr(values, "new_tensor")), None)
    p, t = _in_float64(prediction, tensor), _in_float64(target, tensor)
    slack = max(tolerance, 4 * _rounding(prediction), 4 * _rounding(target))
    miss, size = abs(p - t), abs(t)
    counts = [((miss < (1 - threshold - slack) * size) | (miss == 0)) * 1.0 for threshold in THRESHOLDS]
    return sum(counts) / len(THRESHOLDS)


def matched_point_similarity(points: np.ndarray, targets: np.ndarray, spread: float = 50.0) -> float:
    """``exp(-d^2 / (2 spread^2))``, d the mean distance of the best one-to-one matching; in [0, 1].

    Parameters
    ----------
    points, targets : float (P, 2)
        Numbers of points may differ: then the similarity is 0.

    Raises
    ------
    InvalidInputError
        No targets, or arrays of another shape.
    """
    from scipy.optimize import linear_sum_assignment

    points, targets = np.asarray(points, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if targets.ndim != 2 or targets.shape[0] == 0 or points.ndim != 2 or points.shape[1] != targets.shape[1]:
        raise InvalidInputError(f"expected points (P, D) and targets (Q, D), got {points.shape} and {targets.shape}")
    if len(points) != len(targets) or not np.isfinite(points).all():
        return 0.0
    distance = np.linalg.norm(points[:, None] - targets[None], axis=2)
    mean = distance[linear_sum_assignment(distance)].mean()
    return float(np.exp(-(mean**2) / (2 * spread**2)))


def wer_score(reference: str, hypothesis: str) -> float:
    """``max(0, 1 - word error rate)``; the rate is the edit distance in words over the reference's words.

    Raises
    ------
    InvalidInputError
        A reference without words.
    """
    wanted, given = reference.split(), hypothesis.split()
    if not wanted:
        raise InvalidInputError("the reference has no words")
    known: dict[str, int] = {}
    codes = [np.array([known.setdefault(word, len(known)) for word in words]) for words in (wanted, given)]
    offsets = np.arange(len(given) + 1)
    row = offsets
    for number, word in enumerate(codes[0], start=1):
        step = np.empty_like(row)
        step[0] = number
        step[1:] = np.minimum(row[1:] + 1, row[:-1] + (codes[1] != word))
        row = np.minimum.accumulate(step - offsets) + offsets  # insertions: a running minimum along the row
    return max(0.0, 1.0 - float(row[-1]) / len(wanted))


@dataclass(frozen=True)
class OverlapReward(Reward):
    """Intersection over union of the interval or box in the text with the reference (arXiv 2512.03043). Range [0, 1].

    Parameters
    ----------
    column : str
        Column of the reference: 2 or 4 numbers, or a list of such, of which the best counts.
    shape : "interval" (start, end) or "box" (left, top, right, bottom)
    extract : as in `ExactMatch`

    The last 2 or 4 numbers of the answer count; fewer earn 0.
    """

    column: str = "box"
    shape: Literal["interval", "box"] = "box"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)
        if self.shape not in ("interval", "box"):
            raise InvalidInputError(f"shape must be 'interval' or 'box', got {self.shape!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        axes = 1 if self.shape == "interval" else 2
        wanted = read_numbers(self, sample, self.column, 2 * axes)
        if not (wanted[:, axes:] > wanted[:, :axes]).all():
            raise self.refuse(sample, self.column, f"{wanted.tolist()} has no extent")
        given = numbers_from(find_answer(sample.text, self.extract) or "", 2 * axes)
        return 0.0 if given is None else float(_iou(given, wanted, axes).max())


@dataclass(frozen=True)
class PointInBox(Reward):
    """1 where the last point in the text lies in the box, border included, else 0 (GUI grounding, arXiv 2601.22491).

    Parameters
    ----------
    column : str
        Column of the box (left, top, right, bottom), or of a list of boxes of which any counts.
    extract : as in `ExactMatch`

    Range: 0 or 1. Text without two numbers earns 0; a box without area is an error.
    """

    column: str = "box"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the box."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        boxes = read_numbers(self, sample, self.column, 4)
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise self.refuse(sample, self.column, f"{boxes.tolist()} has no extent")
        point = numbers_from(find_answer(sample.text, self.extract) or "", 2)
        if point is None:
            return 0.0
        return float(((boxes[:, :2] <= point) & (point <= boxes[:, 2:])).all(axis=1).any())


@dataclass(frozen=True)
class RelativeAccuracyReward(Reward):
    """`mean_relative_accuracy` of the last number in the answer (arXiv 2512.03043). Range [0, 1]."""

    column: str = "answer"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference number."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        target = parse_number(str(sample.columns[self.column]))
        if target is None:
            raise self.refuse(sample, self.column, f"{sample.columns[self.column]!r} is no number")
        number = find_answer(find_answer(sample.text, self.extract) or "", "last_number")
        value = None if number is None else parse_number(number)
        return 0.0 if value is None else float(mean_relative_accuracy(value, target))


@dataclass(frozen=True)
class PointsReward(Reward):
    """`matched_point_similarity` of the points in the answer, read two numbers at a time (arXiv 2512.03043).

    Range [0, 1]. The column holds a list of (x, y); another number of points earns 0.
    """

    column: str = "points"
    spread: float = 50.0
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)
        if not self.spread > 0:
            raise InvalidInputError(f"spread must be positive, got {self.spread}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the points."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        wanted = read_numbers(self, sample, self.column, 2)
        found = find_answer(sample.text, self.extract) or ""
        count = len(numbers_in(found, thousands=False))
        given = numbers_from(found, count) if count else None
        if given is None or count != wanted.size:
            return 0.0
        return matched_point_similarity(given.reshape(-1, 2), wanted, self.spread)


@dataclass(frozen=True)
class TranscriptionReward(Reward):
    """`wer_score` of the answer: 1 minus the word error rate, not below 0 (arXiv 2512.03043). Range [0, 1]."""

    column: str = "answer"
    extract: str = "text"
    ignore_case: bool = False

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference text."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        wanted = str(sample.columns[self.column])
        given = find_answer(sample.text, self.extract) or ""
        if not wanted.split():
            raise self.refuse(sample, self.column, "the reference has no words")
        return wer_score(wanted.lower(), given.lower()) if self.ignore_case else wer_score(wanted, given)


def _in_float64(values: Any, tensor: Any) -> Any:
    """An array, or a tensor on the device of `tensor` where there is one."""
    if tensor is None:
        return np.asarray(values, dtype=np.float64)
    import torch

    return torch.as_tensor(values, dtype=torch.float64, device=tensor.device)


def _rounding(values: Any) -> float:
    """Distance from 1 to the next number of the dtype; 0 for whole numbers."""
    if hasattr(values, "new_tensor"):
        import torch

        return torch.finfo(values.dtype).eps if values.dtype.is_floating_point else 0.0
    dtype = np.asarray(values).dtype
    return float(np.finfo(dtype).eps) if np.issubdtype(dtype, np.floating) else 0.0


def _iou(first: Any, second: Any, axes: int) -> Any:
    a, b = arrays(first, second)
    module: Any = np
    if hasattr(a, "new_tensor"):
        import torch

        module = torch
    shared = module.minimum(a[..., axes:], b[..., axes:]) - module.maximum(a[..., :axes], b[..., :axes])
    shared = shared.clip(0, None).prod(-1)
    sizes = [(box[..., axes:] - box[..., :axes]).clip(0, None).prod(-1) for box in (a, b)]
    union = sizes[0] + sizes[1] - shared
    fits = shared > 0
    return module.where(fits, shared / module.where(fits, union, 1.0), 0.0)
