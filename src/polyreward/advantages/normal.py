"""Arithmetic that the parts share: centring and scaling inside segments, in float64, exact for equal values."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments, per_column, root

By = str | tuple[str, ...]
Singleton = Literal["zero", "raw"]


def centred(values: Tensor, mask: Tensor | None, segments: Segments, singleton: Singleton = "zero") -> Tensor:
    """Values minus their segment's mean, float64; 0 where `mask` is false and where all values are equal."""
    return segments.centred(values, mask, keep_single=singleton == "raw")


def standardized(
    deviations: Tensor,
    mask: Tensor | None,
    segments: Segments,
    epsilon: float,
    ddof: int,
    singleton: Singleton = "zero",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Centred values divided by their segment's ``deviation + epsilon``; float64 inside, `dtype` outside."""
    total = segments.sum(deviations.square())
    number = per_column(segments.number(mask), total)
    deviation = root(total / (number - ddof).clamp(min=1))
    if singleton == "raw":
        deviation = torch.where(number > 1, deviation, 1.0)
    return deviations.to(dtype) / segments.spread(divisor_of(deviation, epsilon).to(dtype))


def divisor_of(deviation: Tensor, epsilon: float) -> Tensor:
    """``deviation + epsilon``, and 1 where the deviation is exactly 0."""
    return torch.where(deviation > 0, deviation + epsilon, 1.0)


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
    check_keys(part, "by")
    check_keys(part, "scale_by", optional=True)


def check_numbers(part: object, *names: str) -> None:
    """Refuse an argument that is neither a number nor None."""
    for name in names:
        value = getattr(part, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
            raise InvalidInputError(f"{name} must be a number, got {value!r}")


def check_keys(part: object, *names: str, optional: bool = False) -> None:
    """Turn lists of keys into tuples, and refuse what is neither a name nor several."""
    for name in names:
        keys = getattr(part, name, None)
        if keys is None and optional:
            continue
        several = tuple(keys) if isinstance(keys, list | tuple) else (keys,)
        if not several or not all(isinstance(key, str) for key in several):
            raise InvalidInputError(f"{name} must be the name of a column or several names, got {keys!r}")
        if isinstance(keys, list):
            object.__setattr__(part, name, several)
