"""Arithmetic that the parts share: centring and scaling inside segments, in float64, exact for equal values."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments

By = str | tuple[str, ...]
Singleton = Literal["zero", "raw"]


def centred(values: Tensor, mask: Tensor | None, segments: Segments, singleton: Singleton = "zero") -> Tensor:
    """Values minus their segment's mean, float64; 0 where `mask` is false.

    Exactly 0 in a segment whose values are all equal. For float32 and narrower this follows from the float64 sum; for
    float64 a difference within the rounding error of the mean counts as 0.
    """
    mean = segments.mean(values, mask)
    if singleton == "raw":
        mean = torch.where(per_column(segments.number(mask), mean) > 1, mean, 0.0)
    result = values.to(torch.float64, copy=True).sub_(segments.spread(mean))
    if values.dtype == torch.float64:
        rounding = torch.finfo(torch.float64).eps * per_column(segments.number(mask), mean) * mean.abs()
        result = torch.where(result.abs() > segments.spread(rounding), result, 0.0)
    return result if mask is None else result * mask


def standardized(
    deviations: Tensor,
    mask: Tensor | None,
    segments: Segments,
    epsilon: float,
    ddof: int,
    singleton: Singleton = "zero",
) -> Tensor:
    """Centred values divided by their segment's ``deviation + epsilon``, float64."""
    total = segments.sum(deviations.square())
    number = per_column(segments.number(mask), total)
    deviation = (total / (number - ddof).clamp(min=1)).sqrt()
    if singleton == "raw":
        deviation = torch.where(number > 1, deviation, 1.0)
    return deviations / segments.spread(divisor_of(deviation, epsilon))


def divisor_of(deviation: Tensor, epsilon: float) -> Tensor:
    """``deviation + epsilon``, and 1 where the deviation is exactly 0."""
    return torch.where(deviation > 0, deviation + epsilon, 1.0)


def per_column(per_segment: Tensor, like: Tensor) -> Tensor:
    """Counts (count,) or (count, K) in a shape that goes with `like`, (count,) or (count, K)."""
    return per_segment.unsqueeze(1) if per_segment.ndim < like.ndim else per_segment


def check_arguments(part: object) -> None:
    """Refuse an `epsilon`, `ddof` or `singleton` out of range, and turn lists of keys into tuples."""
    epsilon, ddof = getattr(part, "epsilon", 0.0), getattr(part, "ddof", 0)
    singleton = getattr(part, "singleton", "zero")
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise InvalidInputError(f"epsilon must be a finite number >= 0, got {epsilon!r}")
    if ddof not in (0, 1):
        raise InvalidInputError(f"ddof must be 0 (population deviation) or 1 (sample deviation), got {ddof!r}")
    if singleton not in ("zero", "raw"):
        raise InvalidInputError(f"singleton must be 'zero' or 'raw', got {singleton!r}")
    check_keys(part, "by", "scale_by")


def check_keys(part: object, *names: str) -> None:
    """Turn lists of keys into tuples, and refuse what is neither a name nor several."""
    for name in names:
        keys = getattr(part, name, None)
        several = tuple(keys) if isinstance(keys, list | tuple) else (keys,)
        if keys is not None and not all(isinstance(key, str) for key in several):
            raise InvalidInputError(f"{name} must be the name of a column or several names, got {keys!r}")
        if isinstance(keys, list):
            object.__setattr__(part, name, several)
