"""Boxes as arrays: pairs of predictions and targets checked, box centres, and the Gaussian of a box (arXiv 2507.15846).

Everything works on numpy arrays and tensors along the last axis, in float64 (float32 on devices without it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.proximity import arrays
from polyreward.rewards.sweet_spot import at_first

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SpatialGaussian:
    """Independent normal distributions of two coordinates; leading axes broadcast.

    Parameters
    ----------
    center, std : float (..., 2), numpy or torch

    Raises
    ------
    InvalidInputError
        Not 2 numbers in the last axis.
    """

    center: Any
    std: Any

    def __post_init__(self) -> None:
        for name, values in zip(("center", "std"), arrays(self.center, self.std), strict=True):
            if not values.shape or values.shape[-1] != 2:
                raise InvalidInputError(
                    f"{name} of a SpatialGaussian has 2 numbers in the last axis, got {values.shape}"
                )
            object.__setattr__(self, name, values)

    @classmethod
    def from_boxes(cls, boxes: np.ndarray | Tensor, alpha: float = 0.5) -> SpatialGaussian:
        """Gaussian of boxes (..., 4), left, top, right, bottom; its deviation is ``alpha`` times width and height."""
        return cls(centers(boxes), alpha * (boxes[..., 2:] - boxes[..., :2]))

    def density(self, points: np.ndarray | Tensor) -> Any:
        """``exp(-(x - c)^2 / (2 s^2))`` of points (..., 2), 1 at the centre: (...) in [0, 1]."""
        with np.errstate(all="ignore"):
            squared = ((points - self.center) / self.std) ** 2
            return module_of(squared).exp(-(squared[..., 0] + squared[..., 1]) / 2)

    def bhattacharyya(self, other: SpatialGaussian, eps: float = 0.0) -> Any:
        """Bhattacharyya coefficient, the integral of ``sqrt(p q)``: (...) in [0, 1], 1 where equal, 0 where a std is 0.

        Parameters
        ----------
        eps : float >= 0
            The mean covariance counts ``1 + eps`` times. Relative, so that the unit of the coordinates does not matter;
            the result stays at most 1.
        """
        module = module_of(self.std)
        # hypot and ratios neither overflow nor cancel where squares and determinants would
        with np.errstate(all="ignore"):
            distance = (self.center - other.center) / module.hypot(self.std, other.std)
            ratio = abs(self.std / other.std)
            squared, match = distance**2, 2 / ((ratio + 1 / ratio) * (1 + eps))
            near = module.exp(-(squared[..., 0] + squared[..., 1]) / (4 * (1 + eps)))
            value = near * module.sqrt(match[..., 0] * match[..., 1])
        wide = ((self.std != 0) & (other.std != 0)).all(-1)
        return module.where(wide, value, module.zeros_like(value))


def score_boxes(reward: Any, pred: Any, target: Any) -> Any:
    """What every box reward shares: shapes, checks, 0 where the prediction is not usable, float32."""
    p, t = paired(pred, target)
    usable = usable_boxes(p, reward)
    with np.errstate(all="ignore"):
        value = reward.values(p, t)
    module = module_of(value)
    value = module.where(usable & module.isfinite(value), value, module.zeros_like(value))
    return value.astype(np.float32) if module is np else value.float()


def paired(pred: Any, target: Any) -> tuple[Any, Any]:
    """Predictions and checked targets as float64 (..., 4) whose leading axes broadcast."""
    try:
        p, t = (_wide(boxes) for boxes in arrays(pred, target))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"pred and target must be arrays of numbers (..., 4): {error}") from error
    shapes = tuple(p.shape), tuple(t.shape)
    if any(not shape or shape[-1] != 4 for shape in shapes):
        raise InvalidInputError(f"boxes have 4 numbers in the last axis, got pred {shapes[0]} and target {shapes[1]}")
    if t.ndim == p.ndim - 1:
        t = t[..., None, :]
    try:
        np.broadcast_shapes(p.shape, t.shape)
    except ValueError:
        raise InvalidInputError(
            f"pred {shapes[0]} and target {shapes[1]} do not fit: expected shapes that broadcast, or one target a "
            "group, (B, N, 4) with (B, 4)"
        ) from None
    return p, checked_targets(t)


def checked_targets(target: Any) -> Any:
    """The targets (..., 4); `InvalidInputError` with the first box that has no area, is inside out or not finite."""
    # NaN compares false; an infinite edge has no finite size
    size = target[..., 2:] - target[..., :2]
    wrong = ~((size > 0) & (size < math.inf)).all(-1)
    if bool(wrong.any()):
        box = target[wrong].reshape(-1, 4)[0].tolist()
        raise InvalidInputError(
            f"the target box {box}{at_first(wrong)} has no area or is not finite: expected left < right, top < bottom"
        )
    return target


def usable_boxes(pred: Any, reward: Any) -> Any:
    """Which predictions are boxes, (...); the others are counted."""
    finite = module_of(pred).isfinite(pred).all(-1)
    inverted = ~(pred[..., :2] <= pred[..., 2:]).all(-1) & finite
    counts = {"non-finite": int((~finite).sum())}
    if not reward.allow_inverted:
        counts["inverted"] = int(inverted.sum())
        finite = finite & ~inverted
    reward.invalid.update({name: count for name, count in counts.items() if count})
    return finite


def gaussian_of(boxes: Any, options: Any) -> SpatialGaussian:
    """Gaussian of boxes (..., 4) with the deviation that `options` (``alpha``, ``std``) asks for."""
    gaussian = SpatialGaussian.from_boxes(boxes, options.alpha)
    if options.std is None:
        return gaussian
    tensor = hasattr(boxes, "new_tensor")
    constant = boxes.new_tensor(options.std) if tensor else np.array(options.std)
    return SpatialGaussian(gaussian.center, constant)


def released_coefficient(p: SpatialGaussian, g: SpatialGaussian, eps: float) -> Any:
    """Coverage with the absolute epsilons of the released code."""
    module = module_of(p.std)
    first, second = p.std**2, g.std**2
    mean = (first + second) / 2
    apart = (p.center - g.center) ** 2 / (mean + eps)
    product = first[..., 0] * first[..., 1] * second[..., 0] * second[..., 1]
    match = module.sqrt(product + eps) / (mean[..., 0] * mean[..., 1])
    return module.exp(-(apart[..., 0] + apart[..., 1]) / 8) * module.sqrt(match)


def centers(boxes: Any) -> Any:
    """Centres (..., 2) of boxes (..., 4); halves first, so that they do not overflow."""
    return boxes[..., :2] / 2 + boxes[..., 2:] / 2


def rounded(values: Any, digits: int | None) -> Any:
    """Values with `digits` decimals, or as they are."""
    if digits is None:
        return values
    return module_of(values).round(values, decimals=digits)


def _wide(values: Any) -> Any:
    """Float64, float32 on devices without it."""
    if not hasattr(values, "new_tensor"):
        return values
    return values.float() if values.device.type == "mps" else values.double()


def module_of(values: Any) -> Any:
    """`numpy`, or `torch` for a tensor."""
    if not hasattr(values, "new_tensor"):
        return np
    import torch

    return torch
