"""What the functions of `polyreward.tilting` share: float64 tensors of any input, and errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError

Array = Tensor | np.ndarray | Sequence[Any]

SUM_TOLERANCE = 1e-3


def tensor(values: Any) -> Tensor:
    """Numbers of any kind as a float64 tensor; a tensor stays on its device."""
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    try:
        return torch.from_numpy(np.array(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise InvalidInputError(f"expected numbers in the form of an array, got {values!r:.80}") from None


def like(result: Tensor, original: Any) -> Any:
    """The result in the kind and floating dtype of what was given."""
    if isinstance(original, Tensor):
        return result.to(original.dtype if original.is_floating_point() else torch.get_default_dtype())
    dtype = original.dtype if isinstance(original, np.ndarray) and original.dtype.kind == "f" else np.float64
    return result.detach().cpu().numpy().astype(dtype)[()]


def broadcast(name: str, first: Array, second: Array | None, mask: Array | None) -> tuple[Tensor, Tensor, Tensor]:
    """Two inputs and their mask in one shape; zeros for an absent second, true for an absent mask.

    Raises
    ------
    InvalidInputError
        Shapes that do not go together, a single number, an axis of length 0.
    """
    left = tensor(first)
    right = left.new_zeros(()) if second is None else tensor(second).to(left.device)
    valid = torch.tensor(True) if mask is None else tensor(mask).to(torch.bool)
    shapes = ", ".join(str(tuple(t.shape)) for t in (left, right, valid))
    try:
        left, right, valid = torch.broadcast_tensors(left, right, valid.to(left.device))
    except RuntimeError:
        raise InvalidInputError(f"{name}: inputs and mask of shapes {shapes} do not go together") from None
    if left.ndim == 0 or left.shape[-1] == 0:
        raise InvalidInputError(f"{name}: expected at least one entry on the last axis, got shape {tuple(left.shape)}")
    return left, right, valid


def distribution(name: str, p: Tensor, valid: Tensor, what: str = "p") -> tuple[Tensor, Tensor]:
    """`p` with 0 outside `valid`, and its sums (..., 1).

    Raises
    ------
    InvalidInputError
        A row with an entry that is no probability, or that does not sum to 1 within 0.001.
    """
    base = torch.where(valid, p, 0.0)
    refuse(~((base >= 0) & torch.isfinite(base)), base, f"{name}: {what}", "a probability")
    total = base.sum(-1, keepdim=True)
    wrong = valid.any(-1, keepdim=True) & ~((total - 1).abs() <= SUM_TOLERANCE)
    refuse(wrong[..., 0], total[..., 0], f"{name}: the sum of {what}", "1")
    return base, total


def positive(values: Tensor) -> Tensor:
    """Values as divisors: 1 where they are 0."""
    return torch.where(values > 0, values, 1.0)


def refuse(wrong: Tensor, values: Tensor, what: str, expected: str) -> None:
    """`InvalidInputError` for the first entry that is wrong."""
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        place = f" at index {at[0] if len(at) == 1 else at}" if at else ""
        raise InvalidInputError(f"{what}{place} is {values.expand(wrong.shape)[at].item():g}, expected {expected}")


def whole(n: Any, name: str) -> int:
    """`n` as an int of at least 1."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise InvalidInputError(f"{name}: n must be a whole number of at least 1, got {n!r}")
    return int(n)
