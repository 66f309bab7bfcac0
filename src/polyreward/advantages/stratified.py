"""Compare a trajectory with those of the same structure: stratified advantage normalisation, blended with the group's.

Rollouts of one prompt differ in structure (number of tool calls, say), and so do their rewards for structural reasons.
Centring by the group then pushes whole structures up or down: ``A_G = A_S + (mu_stratum - mu_group)``, and the bracket
is the cross-stratum bias. Inside the stratum it is absent, but then nothing says which stratum is better; the blend
keeps a share of the group's comparison:

    A = blend * (R - mu_s) / (sigma_s + epsilon) + (1 - blend) * (R - mu) / (sigma + epsilon)

Paper: Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents
(arXiv 2510.06214).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.advantages.normal import By, centred, check_arguments, check_numbers, standardized
from polyreward.advantages.transform import Transform, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.grouped import hashable, per_column

UNUSED = -1
"""Stratum of a row that takes no part: advantage 0, and counted in no mean and no deviation."""


@dataclass(frozen=True)
class Stratify(Transform):
    """Blend of the comparison inside the stratum with the comparison inside the group.

    Parameters
    ----------
    blend : float in [0, 1]
        Share of the stratum's comparison; alpha in the paper. 1 is pure stratified normalisation, 0 is GRPO.
    by : name of the column of strata, or several names whose strata are crossed
        Integers or strings; a row of stratum -1 takes no part in its group either.
    epsilon, ddof : as in `Standardize`
        The paper divides by n (`ddof` 0), so that a stratum of one gets 0 from its stratum.

    A signal (N,) or (N, K) in, the same shape and dtype out. A stratum of one row or of equal rewards has exactly 0 in
    the stratum's share. Strata are compared inside their group only.

    Raises
    ------
    InvalidInputError
        `blend` is outside [0, 1], or the strata are floats.
    MissingColumnError
        The batch has no such column.
    """

    blend: float = 0.8
    by: By = "stratum"
    epsilon: float = 1e-6
    ddof: int = 0

    def __post_init__(self) -> None:
        check_arguments(self)
        check_numbers(self, "blend")
        if not 0 <= self.blend <= 1:
            raise InvalidInputError(f"blend must be in [0, 1], got {self.blend}")

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """(N, K) or (N,) -> the same shape."""
        keys = (self.by,) if isinstance(self.by, str) else self.by
        values, mask = applicable(signal, batch)
        group, stratum = batch.segments("group"), batch.segments(("group", *keys))
        used = _used(batch, keys)
        if used is not None:
            used = per_column(used, values).expand_as(values)
            mask = used if mask is None else mask & used
        wide = torch.promote_types(values.dtype, torch.float32)
        inside, whole = (
            standardized(centred(values, mask, segments), mask, segments, self.epsilon, self.ddof, dtype=wide)
            for segments in (stratum, group)
        )
        return (self.blend * inside + (1 - self.blend) * whole).to(signal.dtype)


def _used(batch: RewardBatch, keys: Sequence[str]) -> Tensor | None:
    """Rows whose strata are all in use; None where every row is."""
    used = None
    for key in keys:
        if key in ("group", "batch"):
            continue  # a group may be called -1
        strata = batch.segments(key)
        if strata.labels is not None and UNUSED in strata.labels:
            known = strata.codes != strata.labels.index(UNUSED)
            used = known if used is None else used & known
    return used


def by_tool_calls(calls: Iterable[int | Sequence[Any] | None], most: int | None = None) -> Tensor:
    """Strata by the number of tool calls of each trajectory, the main setting of the paper.

    Parameters
    ----------
    calls : length N
        The number of calls, or the calls themselves (anything with a length); None: do not use the row (-1).
    most : int >= 0, optional
        Trajectories with more calls share the stratum `most`.

    Returns
    -------
    int64 tensor (N,)

    Raises
    ------
    InvalidInputError
        A negative or fractional number, or neither a number nor calls, named with its row; `most` is negative.
    """
    if most is not None and most < 0:
        raise InvalidInputError(f"most must be at least 0, got {most}")
    strata = [UNUSED if call is None else _number_of_calls(call, row) for row, call in enumerate(calls)]
    result = torch.tensor(strata, dtype=torch.int64)
    return result if most is None else result.clamp(max=most)


def _number_of_calls(call: Any, row: int) -> int:
    listed = hasattr(call, "__len__") and getattr(call, "ndim", 1) > 0 and not isinstance(call, str | bytes)
    try:
        number = len(call) if listed else float(call)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(call, str) or not 0 <= number < math.inf or number != math.floor(number):
        raise InvalidInputError(f"row {row} has {call!r} tool calls; expected a whole number >= 0, the calls, or None")
    return int(number)


def by_key(trajectories: Iterable[Any], key: Callable[[Any], Any]) -> Tensor:
    """Strata by any structural key: rows with equal ``key(trajectory)`` share a stratum.

    A row whose key is None or NaN is not used (-1). The key must describe structure: one that follows the reward
    ("answer found") removes what there is to learn.

    Returns
    -------
    int64 tensor (N,), numbered in order of first appearance

    Raises
    ------
    InvalidInputError
        A key that cannot be hashed (a dict, say), named with its row.
    """
    code_of: dict[Any, int] = {}
    strata = []
    for row, trajectory in enumerate(trajectories):
        value = hashable(key(trajectory))
        try:
            unused = value is None or value != value
            strata.append(UNUSED if unused else code_of.setdefault(value, len(code_of)))
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise InvalidInputError(f"the key of row {row} is a {kind}; expected a number, string or tuple") from None
    return torch.tensor(strata, dtype=torch.int64)


def by_quantile(feature: Tensor | np.ndarray | Sequence[float | None], parts: int = 4) -> Tensor:
    """Strata by equal shares of a numeric feature (length, depth): 0 is the lowest share, ``parts - 1`` the highest.

    Parameters
    ----------
    feature : numbers, length N; NaN or None: do not use the row (-1)
    parts : int >= 1
        Number of shares. Equal values share a stratum, so strata may differ in size or stay empty.

    Returns
    -------
    int64 tensor (N,)

    Raises
    ------
    InvalidInputError
        `parts` is not a whole number >= 1, or the feature is not numbers or infinite.
    """
    if not isinstance(parts, int | np.integer) or parts < 1:
        raise InvalidInputError(f"parts must be a whole number of at least 1, got {parts!r}")
    try:
        values = feature if isinstance(feature, Tensor) else torch.from_numpy(np.array(feature, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"feature must hold one number a row: {error}") from error
    values = values.detach().to(torch.float64)
    if values.ndim != 1 or bool(torch.isinf(values).any()):
        raise InvalidInputError("feature must be one-dimensional and finite (NaN: do not use the row)")
    known = ~torch.isnan(values)
    if not bool(known.any()):
        return torch.full(values.shape, UNUSED, dtype=torch.int64, device=values.device)
    cuts = torch.quantile(values[known], torch.arange(1, parts, dtype=torch.float64, device=values.device) / parts)
    strata = torch.searchsorted(cuts, values.nan_to_num(0.0), right=False)
    return torch.where(known, strata, UNUSED)


__all__ = ["UNUSED", "Stratify", "by_key", "by_quantile", "by_tool_calls"]
