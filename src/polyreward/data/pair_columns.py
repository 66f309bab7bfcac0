"""Responses of pairs as arrays, tensors or lists: swapped, selected, compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError


def flip_pairs(chosen: Any, rejected: Any, flipped: Any) -> tuple[Any, Any]:
    """Chosen and rejected swapped where `flipped` (N,); doing it twice changes nothing."""
    mask = flipped.cpu().numpy() if isinstance(flipped, Tensor) else np.asarray(flipped, bool)
    if mask.shape != (len(chosen),) or len(chosen) != len(rejected):
        raise InvalidInputError(f"{len(chosen)} and {len(rejected)} responses, flipped has shape {mask.shape}")
    if isinstance(chosen, Tensor):
        wide = torch.from_numpy(mask).to(chosen.device).reshape(-1, *[1] * (chosen.ndim - 1))
        return torch.where(wide, rejected, chosen), torch.where(wide, chosen, rejected)
    if isinstance(chosen, np.ndarray):
        other, wide_mask = np.asarray(rejected), mask.reshape(-1, *[1] * (chosen.ndim - 1))
        return np.where(wide_mask, other, chosen), np.where(wide_mask, chosen, other)
    pairs = [(r, c) if f else (c, r) for c, r, f in zip(chosen, rejected, mask.tolist(), strict=True)]
    return [c for c, _ in pairs], [r for _, r in pairs]


def take(values: Any, index: np.ndarray) -> Any:
    """Entries at `index`, int (K,), in the type of `values`."""
    if isinstance(values, Tensor):
        return values[torch.from_numpy(index).to(values.device)]
    return values[index] if isinstance(values, np.ndarray) else [values[i] for i in index.tolist()]


def identical_pairs(chosen: Any, rejected: Any) -> np.ndarray:
    """Where both responses are the same, bool (N,)."""
    if isinstance(chosen, Tensor | np.ndarray) and isinstance(rejected, Tensor | np.ndarray):
        if tuple(chosen.shape) != tuple(rejected.shape):
            raise InvalidInputError(f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}")
        same: Any = chosen == rejected
        same = same.cpu().numpy() if isinstance(same, Tensor) else np.asarray(same)
        return np.asarray(same.all(axis=tuple(range(1, same.ndim))))
    return np.array([_same(a, b) for a, b in zip(chosen, rejected, strict=True)], bool)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return np.array_equal(first, second) if isinstance(first, np.ndarray) else bool(first == second)
