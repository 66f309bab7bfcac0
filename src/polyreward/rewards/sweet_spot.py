"""Tiered rewards: a verifier's outcome plus the zone of a proximity (SSL: Sweet Spot Learning, arXiv 2601.22491).

Proximity S in [0, 1] says how close a sample is to an ideal one. It is quantised into K nested zones whose levels grow
from 0 to 1, and added to the outcome C of a verifier:

    R = C + weight * level(zone(S)),    weight * (highest level - lowest level) < 1

so that every success outranks every failure, and among equals the closer one wins. Proximity fields for points, grids
and sequences are in `polyreward.rewards.proximity`; any reward with range [0, 1] serves as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, RewardFunction, as_list, finite_numbers, first_row, name_of, values_of

if TYPE_CHECKING:
    from torch import Tensor

Gate = Literal["none", "only_success"]


@dataclass(frozen=True)
class ZoneQuantizer:
    """Proximity to zone and level; a monotone step function, right-continuous (arXiv 2601.22491).

    Parameters
    ----------
    zones : int >= 2
        K in the paper, 4 by default.
    thresholds : K - 1 increasing numbers in (0, 1], default ``k / K``
        Exactly on a threshold belongs to the upper zone; a last threshold of 1 keeps that zone for the ideal itself.
    levels : "linear", "amplified", or K increasing numbers in [0, 1]
        Linear is ``k / (K - 1)``; amplified is ``(2^k - 1) / (2^(K-1) - 1)``, steps that double towards the centre.

    Raises
    ------
    InvalidInputError
        Fewer than 2 zones, or thresholds or levels of the wrong number or order.
    """

    zones: int = 4
    thresholds: tuple[float, ...] | None = None
    levels: Literal["linear", "amplified"] | tuple[float, ...] = "linear"

    def __post_init__(self) -> None:
        k = self.zones
        if not isinstance(k, int | np.integer) or k < 2:
            raise InvalidInputError(f"ZoneQuantizer needs a whole number of zones, at least 2, got {k}")
        edges = finite_numbers([i / k for i in range(1, k)] if self.thresholds is None else self.thresholds)
        if isinstance(self.levels, str):
            if self.levels not in ("linear", "amplified"):
                raise InvalidInputError(f"levels must be 'linear', 'amplified' or {k} numbers, got {self.levels!r}")
            linear = self.levels == "linear"
            steps = finite_numbers(i / (k - 1) if linear else (2**i - 1) / (2 ** (k - 1) - 1) for i in range(k))
        else:
            steps = finite_numbers(self.levels)
        if edges is None or len(edges) != k - 1 or not _increase([0.0, *edges]) or edges[-1] > 1:
            raise InvalidInputError(f"{k} zones need {k - 1} increasing thresholds in (0, 1], got {self.thresholds!r}")
        if steps is None or len(steps) != k or not _increase(steps) or steps[0] < 0 or steps[-1] > 1:
            raise InvalidInputError(f"{k} zones need {k} increasing levels in [0, 1], got {self.levels!r}")
        object.__setattr__(self, "thresholds", edges)
        object.__setattr__(self, "levels", steps)

    def zone(self, proximity: np.ndarray | Tensor | float) -> Any:
        """Zone 0..K-1 of each proximity, integer array or tensor of the same shape; proximity is clipped to [0, 1].

        Raises
        ------
        InvalidInputError
            NaN in the proximity.
        """
        values = _checked(proximity)
        edges: Any = self.thresholds
        zones = (values >= edges[0]) * 1
        for edge in edges[1:]:
            zones = zones + (values >= edge) * 1
        return zones

    def level(self, zone: Any) -> Any:
        """Level of each zone: a float tensor for a tensor, else float64."""
        if hasattr(zone, "new_tensor"):
            return zone.new_tensor(self.levels, dtype=_torch().get_default_dtype())[zone]
        return np.asarray(self.levels, dtype=np.float64)[zone]

    def __call__(self, proximity: np.ndarray | Tensor | float) -> Any:
        """Level of the zone of each proximity, same shape and floating dtype."""
        level = self.level(self.zone(proximity))
        dtype = getattr(proximity, "dtype", None)
        if hasattr(level, "new_tensor"):
            return level.to(dtype) if dtype.is_floating_point else level  # type: ignore[union-attr]
        return level.astype(dtype) if dtype is not None and np.issubdtype(dtype, np.floating) else level


@dataclass(frozen=True)
class RewardBreakdown:
    """A sweet-spot reward with its parts: `total`, `outcome`, `zone` (-1 without quantiser) and `level`, each (N,)."""

    total: Any
    outcome: Any
    zone: Any
    level: Any


def assert_order_preserving(weight: float, levels: Sequence[float] = (0.0, 1.0)) -> None:
    """Refuse a weight with which a failure could outrank a success.

    Raises
    ------
    InvalidInputError
        ``weight < 0`` or ``weight * (max(levels) - min(levels)) >= 1``.
    """
    spread = weight * (max(levels) - min(levels))
    if not (weight >= 0 and spread < 1):
        raise InvalidInputError(
            f"weight {weight} with levels from {min(levels):g} to {max(levels):g} does not preserve the order of "
            "outcomes: expected weight >= 0 and weight * (highest - lowest level) < 1"
        )


def sweet_spot(
    outcome: np.ndarray | Tensor,
    proximity: np.ndarray | Tensor,
    quantizer: ZoneQuantizer | None,
    weight: float = 0.5,
    gate: Gate = "none",
) -> RewardBreakdown:
    """Tiered reward of arrays (arXiv 2601.22491).

    Parameters
    ----------
    outcome : (...,) 0 or 1
        C in the paper.
    proximity : (...,) in [0, 1]
        S in the paper.
    quantizer : ZoneQuantizer, or None for the continuous reward, an ablation
    weight : float
        alpha in the paper.
    gate : "none", or "only_success" to count the level only where the outcome is 1

    Raises
    ------
    InvalidInputError
        A weight that does not preserve the order of outcomes, NaN, an outcome that is not 0 or 1, unknown gate.
    """
    assert_order_preserving(weight, (0.0, 1.0) if quantizer is None else quantizer.levels)  # type: ignore[arg-type]
    if gate not in ("none", "only_success"):
        raise InvalidInputError(f"gate must be 'none' or 'only_success', got {gate!r}")
    c: Any = outcome if hasattr(outcome, "new_tensor") else np.asarray(outcome, dtype=np.float64)
    wrong = (c != 0) & (c != 1)
    if bool(wrong.any()):
        raise InvalidInputError(
            f"the outcome{at_first(wrong)} of the sweet-spot reward must be 0 or 1; put a threshold on graded scores"
        )
    s = _checked(proximity)
    zone = s * 0 - 1 if quantizer is None else quantizer.zone(s)
    level = s if quantizer is None else quantizer(s)
    counted = level * c if gate == "only_success" else level
    return RewardBreakdown(c + weight * counted, c, zone, level)


@dataclass(frozen=True)
class SweetSpotReward(Reward):
    """Outcome of a verifier plus the level of the proximity's zone (SSL, arXiv 2601.22491).

    Parameters
    ----------
    verifier : reward with values 0 and 1
        C in the paper; the only judge of success.
    proximity : reward with values in [0, 1]
        S in the paper, for example one of `polyreward.rewards.proximity`, `LinesCorrect` or
        ``ToolCallReward(limits=(0, 1))``.
    quantizer : ZoneQuantizer, or None for the continuous reward
    weight : float
        alpha in the paper, 0.5 by default; 0 gives the verifier alone.
    gate : "none", or "only_success" to count the level only where the verifier gives 1

    Range [0, 1 + weight]. Does not apply where verifier or proximity do not.

    Raises
    ------
    InvalidInputError
        At construction: a weight with which a failure could outrank a success. At a call: values outside the ranges
        above, named by reward and row.
    """

    verifier: RewardFunction
    proximity: RewardFunction
    quantizer: ZoneQuantizer | None = field(default_factory=ZoneQuantizer)
    weight: float = 0.5
    gate: Gate = "none"

    def __post_init__(self) -> None:
        sweet_spot(np.zeros(0), np.zeros(0), self.quantizer, self.weight, self.gate)

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return "sweet_spot"

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        if len(completions) == 0:
            return []
        return as_list(self.explain(prompts, completions, **columns).total)

    def explain(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> RewardBreakdown:
        """The reward with its parts, float64 (N,), NaN where it does not apply."""
        outcome = values_of(self.verifier, prompts, completions, columns)
        proximity = values_of(self.proximity, prompts, completions, columns)
        _check_values(self.verifier, outcome, (outcome == 0) | (outcome == 1), "0 or 1")
        _check_values(self.proximity, proximity, (proximity >= 0) & (proximity <= 1), "a value in [0, 1]")
        applies = ~np.isnan(outcome) & ~np.isnan(proximity)
        parts = sweet_spot(
            np.where(applies, outcome, 0), np.where(applies, proximity, 0), self.quantizer, self.weight, self.gate
        )
        return RewardBreakdown(
            *(np.where(applies, part, np.nan) for part in (parts.total, parts.outcome, parts.zone, parts.level))
        )


def at_first(mask: Any) -> str:
    """Where the first true entry of an array or tensor is, for errors; empty for a single value."""
    shape = tuple(getattr(mask, "shape", ()))
    if not shape:
        return ""
    index = [int(i) for i in np.unravel_index(int((mask * 1).argmax()), shape)]
    return f" at index {index[0] if len(index) == 1 else tuple(index)}"


def _check_values(member: RewardFunction, values: np.ndarray, fits: np.ndarray, expected: str) -> None:
    wrong = ~fits & ~np.isnan(values)
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidInputError(
            f"sweet_spot: {name_of(member)!r} gave {values[row]:g} for completion {first_row.get() + row}, "
            f"expected {expected}"
        )


def _checked(proximity: Any) -> Any:
    values = proximity if hasattr(proximity, "new_tensor") else np.asarray(proximity, dtype=_float_of(proximity))
    if bool((values != values).any()):
        raise InvalidInputError(f"NaN in the proximity{at_first(values != values)}")
    return values.clip(0, 1)


def _float_of(values: Any) -> Any:
    dtype = getattr(values, "dtype", np.float64)
    return dtype if np.issubdtype(dtype, np.floating) else np.float64


def _increase(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _torch() -> Any:
    import torch

    return torch
