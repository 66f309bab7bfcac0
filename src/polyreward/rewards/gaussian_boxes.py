"""Gaussian rewards of predicted boxes for GUI grounding, the baselines they are compared with, and a reward of text.

A box is a Gaussian around its centre whose deviation is a fixed part of its size. The point reward is the target's
density at the predicted centre; the coverage reward is the overlap of the predicted and the target's Gaussian. Both
fall smoothly, so that a group of misses is still ordered, and both grow with the element: a large one forgives more.

    R_point = exp(-1/2 * sum_axis (c_p - c_g)^2 / s_g^2)                                     s = alpha * size
    R_cov   = exp(-1/8 * d' S_m^-1 d) * sqrt(sqrt(det S_p * det S_g) / det S_m)   S = diag(s^2), S_m = (S_p + S_g) / 2

Paper: GUI-G2: Gaussian Reward Modeling for GUI Grounding (arXiv 2507.15846). The advantage of the paper is
`polyreward.advantages.presets.grpo_trl`, which makes small differences as loud as large ones once a group's deviation
is well above 1e-4. Coverage rewards the size too, which hit metrics ignore: keep ``coverage_weight`` near
``point_weight``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.answers import check_place, find_answer
from polyreward.rewards.box_geometry import (
    SpatialGaussian,
    centers,
    checked_targets,
    gaussian_of,
    module_of,
    released_coefficient,
    rounded,
    score_boxes,
    usable_boxes,
)
from polyreward.rewards.contract import Reward, finite_numbers, is_finite, text_of
from polyreward.rewards.overlap import iou_2d
from polyreward.rewards.proximity import arrays, read_numbers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BoxParser",
    "BoxReward",
    "GaussianCoverageReward",
    "GaussianPointReward",
    "GuiGroundingReward",
    "SpatialGaussian",
    "fixed_std",
]

Kind = Literal[
    "gaussian", "gaussian_point", "gaussian_coverage", "point", "iou", "point+iou", "inside", "fixed", "distance"
]
_NUMBER = r"\s*([-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_WHOLE_BOX = re.compile(r"\[\s*[0-9]+\s*,\s*[0-9]+\s*,\s*[0-9]+\s*,\s*[0-9]+\s*\]")


@dataclass(frozen=True)
class GaussianPointReward:
    """R_point of GUI-G2 (arXiv 2507.15846): the target's Gaussian at the centre of the prediction.

    Parameters
    ----------
    alpha : float > 0
        Deviation over size. With 0.5 the reward inside the target is at least ``exp(-1)``.
    round_digits : int or None
        3 decimals as in the released code, which makes the reward 0 beyond 3.9 deviations; None for the exact formula.
    std : (x, y) or None
        Constant deviations for every element, in units of the boxes; the ablation "fixed".
    allow_inverted : bool
        Score predictions with left > right or top > bottom as the released code does, by the square of their size.

    Attributes
    ----------
    invalid : Counter
        Predictions that earned 0 so far because they are "non-finite" or "inverted".
    """

    alpha: float = 0.5
    round_digits: int | None = 3
    std: tuple[float, float] | None = None
    allow_inverted: bool = False
    invalid: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_options(self)

    def __call__(self, pred: np.ndarray | Tensor, target: np.ndarray | Tensor) -> Any:
        """Rewards in [0, 1], float32 (...), of predictions (..., 4) and targets.

        Parameters
        ----------
        pred, target : float (..., 4), left, top, right, bottom; numpy or torch, on one device
            Shapes broadcast. A target with one axis less than the prediction holds one box a group: (B, N, 4) with
            (B, 4) gives (B, N).

        Raises
        ------
        InvalidInputError
            A target without area, inside out or not finite; shapes that do not fit.
        """
        return score_boxes(self, pred, target)

    def values(self, pred: Any, target: Any) -> Any:
        """Rewards of valid boxes in the dtype of the boxes, without checks."""
        return rounded(gaussian_of(target, self).density(centers(pred)), self.round_digits)


@dataclass(frozen=True)
class GaussianCoverageReward:
    """R_cov of GUI-G2 (arXiv 2507.15846): Bhattacharyya coefficient of the Gaussians of prediction and target.

    Parameters
    ----------
    alpha, round_digits, std, allow_inverted, invalid : as in `GaussianPointReward`
    eps : float >= 0
        Relative, see `SpatialGaussian.bhattacharyya`.
    absolute_eps : bool
        Add ``eps`` to the covariances and to the product of determinants as the released code does. That supposes
        pixels: on boxes in [0, 1] the reward exceeds 1.

    A prediction without area earns exactly 0, unless `absolute_eps` asks for what the released code gives.
    """

    alpha: float = 0.5
    eps: float = 1e-8
    round_digits: int | None = 3
    std: tuple[float, float] | None = None
    allow_inverted: bool = False
    absolute_eps: bool = False
    invalid: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_options(self)

    def __call__(self, pred: np.ndarray | Tensor, target: np.ndarray | Tensor) -> Any:
        """Rewards in [0, 1], float32 (...), as `GaussianPointReward`."""
        return score_boxes(self, pred, target)

    def values(self, pred: Any, target: Any) -> Any:
        """Rewards of valid boxes in the dtype of the boxes, without checks."""
        p, g = gaussian_of(pred, self), gaussian_of(target, self)
        value = released_coefficient(p, g, self.eps) if self.absolute_eps else p.bhattacharyya(g, self.eps)
        return rounded(value, self.round_digits)


@dataclass(frozen=True)
class BoxReward:
    """The rewards that GUI-G2 (arXiv 2507.15846) compares, by name.

    Parameters
    ----------
    kind : str
        ==================== =============================================================================
        "gaussian"           ``point_weight * R_point + coverage_weight * R_cov``, the paper's reward
        "gaussian_point"     R_point alone
        "gaussian_coverage"  R_cov alone
        "point"              1 where the centre lies in the target, border included
        "iou"                1 where the intersection over union exceeds `threshold`
        "point+iou"          sum of these two
        "inside"             "gaussian" where the centre lies in the target, else 0
        "fixed"              "gaussian" with the constant deviations `std`, for example those of `fixed_std`
        "distance"           ``1 - distance of the centres / diagonal``, not below 0
        ==================== =============================================================================
    point_weight, coverage_weight : float
        nu and gamma in the paper.
    std : (x, y)
        For "fixed" only, in units of the boxes.
    diagonal : float > 0
        For "distance" only: of the screen, in units of the boxes.
    alpha, eps, round_digits, allow_inverted, absolute_eps, invalid : as in `GaussianCoverageReward`
        Gaussian terms are rounded one by one, as in the released code.
    """

    kind: Kind = "gaussian"
    alpha: float = 0.5
    point_weight: float = 1.0
    coverage_weight: float = 1.0
    std: tuple[float, float] | None = None
    diagonal: float | None = None
    threshold: float = 0.5
    eps: float = 1e-8
    round_digits: int | None = 3
    allow_inverted: bool = False
    absolute_eps: bool = False
    invalid: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownNameError(f"kind of box reward {self.kind!r}{nearest(str(self.kind), get_args(Kind))}")
        for name in ("point_weight", "coverage_weight", "threshold"):
            if not is_finite(getattr(self, name)):
                raise InvalidInputError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if self.kind == "distance" and not (is_finite(self.diagonal) and self.diagonal > 0):  # type: ignore[operator]
            raise InvalidInputError(f"kind 'distance' needs diagonal > 0, that of the screen, got {self.diagonal!r}")
        if (self.kind == "fixed") != (self.std is not None):
            raise InvalidInputError(
                f"std belongs to kind 'fixed', which needs it; got kind {self.kind!r}, {self.std!r}"
            )
        _check_options(self)

    def __call__(self, pred: np.ndarray | Tensor, target: np.ndarray | Tensor) -> Any:
        """Rewards, float32 (...), as `GaussianPointReward`."""
        return score_boxes(self, pred, target)

    def values(self, pred: Any, target: Any) -> Any:
        """Rewards of valid boxes in the dtype of the boxes, without checks."""
        if self.kind == "distance":
            apart = (centers(pred) - centers(target)) / self.diagonal
            return (1 - module_of(apart).hypot(apart[..., 0], apart[..., 1])).clip(0, 1)
        value: Any = 0.0
        if self.kind in ("gaussian", "gaussian_point", "inside", "fixed"):
            point = GaussianPointReward(self.alpha, self.round_digits, self.std)
            value = (1.0 if self.kind == "gaussian_point" else self.point_weight) * point.values(pred, target)
        if self.kind in ("gaussian", "gaussian_coverage", "inside", "fixed"):
            cover = GaussianCoverageReward(
                self.alpha, self.eps, self.round_digits, self.std, absolute_eps=self.absolute_eps
            )
            weight = 1.0 if self.kind == "gaussian_coverage" else self.coverage_weight
            value = value + weight * cover.values(pred, target)
        if self.kind in ("point", "point+iou", "inside"):
            center = centers(pred)
            hit = ((target[..., :2] <= center) & (center <= target[..., 2:])).all(-1) * 1.0
            value = value * hit if self.kind == "inside" else value + hit
        if self.kind in ("iou", "point+iou"):
            value = value + (iou_2d(pred, target) > self.threshold) * 1.0
        return value


@dataclass(frozen=True)
class BoxParser:
    """Reads the first ``[number, number, number, number]`` of a text (GUI-G2, arXiv 2507.15846).

    Parameters
    ----------
    marker : str or None
        Only what follows its last occurrence counts, as in the released code.
    extract : as in `ExactMatch`
    """

    marker: str | None = "assistant\n"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    def __call__(self, completion: Any) -> np.ndarray | None:
        """Box of a text or of chat messages, float64 (4,); None where there is none. Never raises on text."""
        return self.from_text(text_of(completion))

    def from_text(self, text: str) -> np.ndarray | None:
        """Box of a text, float64 (4,), as written: it may be inside out or infinite; None where there is none."""
        match = _BOX.search(find_answer(self.after_marker(text), self.extract) or "")
        return None if match is None else np.array([float(number) for number in match.groups()])

    def is_whole(self, text: str) -> bool:
        """Whether the text is one box of whole numbers and nothing else."""
        return _WHOLE_BOX.fullmatch(self.after_marker(text)) is not None

    def after_marker(self, text: str) -> str:
        """What follows the last marker."""
        return text.rpartition(self.marker)[2] if self.marker else text


@dataclass(frozen=True)
class GuiGroundingReward(Reward):
    """`BoxReward` of the first box in the text, `BoxParser` (GUI-G2, arXiv 2507.15846).

    Parameters
    ----------
    column : str
        Column of the target (left, top, right, bottom), or of a list of boxes of which the best counts.
    format_weight : float
        Added where the whole text is ``[int, int, int, int]``; 1 in the released code, 0 in the paper.
    marker, extract : as in `BoxParser`
    kind, alpha, point_weight, coverage_weight, std, diagonal, eps, round_digits, allow_inverted, absolute_eps :
        as in `BoxReward`

    Range [0, point_weight + coverage_weight + format_weight] for "gaussian". Text without a box earns 0, and so does a
    box that is inside out or infinite; `invalid` counts these in its own process, and where the trainer passes
    ``log_metric`` it hears their share. A target without area or of negative size is an error with column and row.
    """

    column: str = "box"
    kind: Kind = "gaussian"
    alpha: float = 0.5
    point_weight: float = 1.0
    coverage_weight: float = 1.0
    format_weight: float = 0.0
    std: tuple[float, float] | None = None
    diagonal: float | None = None
    eps: float = 1e-8
    round_digits: int | None = 3
    allow_inverted: bool = False
    absolute_eps: bool = False
    marker: str | None = "assistant\n"
    extract: str = "text"

    def __post_init__(self) -> None:
        if not is_finite(self.format_weight):
            raise InvalidInputError(f"format_weight must be a finite number, got {self.format_weight!r}")
        names = ("kind", "alpha", "point_weight", "coverage_weight", "std", "diagonal", "eps", "round_digits",
                 "allow_inverted", "absolute_eps")  # fmt: skip
        object.__setattr__(self, "_boxes", BoxReward(**{name: getattr(self, name) for name in names}))
        object.__setattr__(self, "_parser", BoxParser(self.marker, self.extract))

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the target."""
        return (self.column,)

    @property
    def invalid(self) -> Counter[str]:
        """Completions that earned 0 so far because they are "unreadable", "non-finite" or "inverted"."""
        return self._boxes.invalid  # type: ignore[attr-defined, no-any-return]

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion; all boxes of the batch are scored at once."""
        values: list[float | None] = [None] * len(completions)
        samples = list(self.samples(prompts, completions, columns))
        if not samples:
            return values
        targets = [read_numbers(self, sample, self.column, 4) for sample in samples]
        for sample, boxes in zip(samples, targets, strict=True):
            if not (boxes[:, 2:] > boxes[:, :2]).all():
                raise self.refuse(sample, self.column, f"{boxes.tolist()}: expected left < right and top < bottom")
        parser: BoxParser = self._parser  # type: ignore[attr-defined]
        found = [parser.from_text(sample.text) for sample in samples]
        missing = sum(box is None for box in found)
        given = np.stack([np.zeros(4) if box is None else box for box in found])
        usable = usable_boxes(given, self._boxes) & np.array([box is not None for box in found])  # type: ignore[attr-defined]
        self.invalid.update({"unreadable": missing} if missing else {})
        counts = np.array([len(boxes) for boxes in targets])
        safe = np.where(usable[:, None], given, [0.0, 0.0, 1.0, 1.0])
        with np.errstate(all="ignore"):
            each = self._boxes.values(np.repeat(safe, counts, axis=0), np.concatenate(targets))  # type: ignore[attr-defined]
        best = np.maximum.reduceat(each, np.cumsum(counts) - counts)
        best = np.where(usable & np.isfinite(best), best, 0.0)
        whole = np.array([parser.is_whole(sample.text) for sample in samples]) if self.format_weight else 0.0
        for sample, value in zip(samples, (best + self.format_weight * whole).tolist(), strict=True):
            values[sample.row] = value
        if callable(log := columns.get("log_metric")):
            log(f"{self.__name__}/invalid", float(1 - usable.mean()))
        return values


def fixed_std(targets: np.ndarray | Tensor, alpha: float = 0.5) -> tuple[float, float]:
    """Deviations for ``BoxReward("fixed")``: the medians of ``alpha`` times width and height of targets (N, 4).

    The paper (arXiv 2507.15846) does not give its constant.
    """
    boxes = checked_targets(arrays(targets, targets)[1])
    wide, high = (alpha * (boxes[..., 2:] - boxes[..., :2])).reshape(-1, 2).T.tolist()
    return float(np.median(wide)), float(np.median(high))


def _check_options(reward: Any) -> None:
    for name in ("alpha", "eps"):
        value = getattr(reward, name, 1.0)
        if not (is_finite(value) and (value > 0 or (value == 0 and name == "eps"))):
            raise InvalidInputError(f"{name} must be a finite number > 0, got {value!r}")
    digits = reward.round_digits
    if not (digits is None or (isinstance(digits, int) and digits >= 0)):
        raise InvalidInputError(f"round_digits must be None or a whole number >= 0, got {digits!r}")
    if reward.std is not None:
        std = finite_numbers(reward.std)
        if std is None or len(std) != 2 or min(std) <= 0:
            raise InvalidInputError(f"std must be two positive numbers (x, y), got {reward.std!r}")
        object.__setattr__(reward, "std", std)
