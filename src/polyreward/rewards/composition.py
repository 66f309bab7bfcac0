"""Rewards made of rewards: sum, gate, tier, penalise, clip, affine.

Every function here takes rewards (any callable of TRL's form) and returns one. The members are called once each on the
whole batch; NaN and None mean "does not apply" on the way in and on the way out. Weighted sums are also what
``0.5 * a + b`` builds.

    reward = gate(correct + 0.2 * brevity, condition=well_formed, threshold=1.0, floor=-1.0)

Composition takes no part in normalisation: rewards that should be normalised one by one belong in the trainer's list
and in an advantage chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, RewardFunction, as_list, check_values, is_finite, name_of, values_of


@dataclass(frozen=True)
class Composed(Reward):
    """A reward computed from the values of its members.

    Parameters
    ----------
    members : K rewards
    combine : function of float64 (K, N), NaN where a member does not apply, to float64 (N,)
        Must pickle: a module's function or a `functools.partial` of one.
    name : str
        Name in logs.

    Range: that of `combine`.
    """

    members: tuple[RewardFunction, ...]
    combine: Callable[[np.ndarray], np.ndarray]
    name: str

    def __post_init__(self) -> None:
        for member in self.members:
            if not callable(member):
                raise InvalidInputError(f"{self.name}: {member!r} is not a reward function")

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return self.name

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion. `InvalidInputError` names a member that returns something else, and an overflow."""
        values = [values_of(member, prompts, completions, columns) for member in self.members]
        with np.errstate(over="ignore", invalid="ignore"):  # the check below names reward and row
            combined = self.combine(np.stack(values))
        return as_list(check_values(combined, len(completions), self.name))


def named(reward: RewardFunction, name: str) -> Reward:
    """The same reward under another name."""
    if isinstance(reward, Composed):
        return replace(reward, name=name)
    return Composed((reward,), _first, name)


def weighted_sum(*rewards: RewardFunction, weights: Sequence[float] | None = None, name: str | None = None) -> Reward:
    """Sum of the members that apply, each times its weight (default 1); does not apply where none of them does.

    Raises
    ------
    InvalidInputError
        No rewards, or not one finite weight a reward.
    """
    factors = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
    if not rewards:
        raise InvalidInputError("weighted_sum needs at least one reward")
    if len(factors) != len(rewards) or not np.isfinite(factors).all():
        raise InvalidInputError(f"weighted_sum of {len(rewards)} rewards needs as many finite weights, got {weights}")
    terms = [
        name_of(reward) if factor == 1 else f"{factor:g}*{name_of(reward)}"
        for reward, factor in zip(rewards, factors, strict=True)
    ]
    return Composed(rewards, partial(_sum, weights=tuple(factors)), name or " + ".join(terms))


def gate(
    reward: RewardFunction,
    condition: RewardFunction,
    threshold: float = 0.5,
    floor: float = 0.0,
    name: str | None = None,
) -> Reward:
    """`reward` where `condition` is at least `threshold`, else `floor`.

    Where the condition does not apply the gate is open; where the reward does not apply, the result does not either.

    Raises
    ------
    InvalidInputError
        A threshold or floor that is not finite.
    """
    _finite("gate", threshold=threshold, floor=floor)
    combine = partial(_gate, threshold=float(threshold), floor=float(floor))
    return Composed((reward, condition), combine, name or f"{name_of(reward)} if {name_of(condition)}")


def tier(
    reward: RewardFunction, thresholds: Sequence[float], levels: Sequence[float] | None = None, name: str | None = None
) -> Reward:
    """``levels[number of thresholds <= value]``; exactly on a threshold belongs to the upper level.

    Parameters
    ----------
    thresholds : K - 1 increasing numbers
    levels : K numbers, default K values evenly spaced from 0 to 1

    Raises
    ------
    InvalidInputError
        Thresholds that do not increase, or not one level more than thresholds.
    """
    edges = np.asarray(thresholds, dtype=np.float64)
    steps = np.linspace(0, 1, edges.size + 1) if levels is None else np.asarray(levels, dtype=np.float64)
    if edges.ndim != 1 or edges.size == 0 or not ((np.diff(edges) > 0).all() and np.isfinite(edges).all()):
        raise InvalidInputError(f"tier needs increasing thresholds, got {thresholds}")
    if steps.shape != (edges.size + 1,) or not np.isfinite(steps).all():
        raise InvalidInputError(f"tier with {edges.size} thresholds needs {edges.size + 1} finite levels, got {levels}")
    combine = partial(_tier, thresholds=tuple(edges.tolist()), levels=tuple(steps.tolist()))
    return Composed((reward,), combine, name or f"tier({name_of(reward)})")


def penalise(
    reward: RewardFunction,
    penalty: RewardFunction,
    weight: float = 1.0,
    floor: float | None = None,
    name: str | None = None,
) -> Reward:
    """``reward - weight * penalty``, not below `floor`. A penalty that does not apply costs nothing.

    Raises
    ------
    InvalidInputError
        A weight or floor that is not finite.
    """
    _finite("penalise", weight=weight, floor=floor)
    combine = partial(_penalise, weight=float(weight), floor=floor)
    return Composed((reward, penalty), combine, name or f"{name_of(reward)} - {weight:g}*{name_of(penalty)}")


def clip(
    reward: RewardFunction, low: float | None = None, high: float | None = None, name: str | None = None
) -> Reward:
    """`reward` kept inside [low, high].

    Raises
    ------
    InvalidInputError
        Neither bound is given, one is not finite, or low > high.
    """
    _finite("clip", low=low, high=high)
    if (low is None and high is None) or (low is not None and high is not None and low > high):
        raise InvalidInputError(f"clip needs low <= high, at least one of them, got low={low}, high={high}")
    return Composed((reward,), partial(_clip, low=low, high=high), name or f"clip({name_of(reward)})")


def affine(reward: RewardFunction, scale: float = 1.0, shift: float = 0.0, name: str | None = None) -> Reward:
    """``scale * reward + shift``.

    Raises
    ------
    InvalidInputError
        A scale or shift that is not finite.
    """
    _finite("affine", scale=scale, shift=shift)
    title = name_of(reward) if scale == 1 else f"{scale:g}*({name_of(reward)})"
    title = title if shift == 0 else f"{title} {'+' if shift > 0 else '-'} {abs(shift):g}"
    return Composed((reward,), partial(_affine, scale=float(scale), shift=float(shift)), name or title)


def _finite(where: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not is_finite(number):
            raise InvalidInputError(f"{where}: {name} must be a finite number, got {number!r}")


def _first(values: np.ndarray) -> np.ndarray:
    return values[0]


def _sum(values: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    # term by term: a matrix product rounds equal rows differently, by their place in the batch
    total = sum(weight * member for weight, member in zip(weights, np.nan_to_num(values), strict=True))
    total = np.where(np.isnan(total), np.inf, total)  # inf - inf is an overflow, not "does not apply"
    return np.where(np.isnan(values).all(axis=0), np.nan, total)


def _gate(values: np.ndarray, threshold: float, floor: float) -> np.ndarray:
    reward, condition = values
    return np.where((condition < threshold) & ~np.isnan(reward), floor, reward)


def _tier(values: np.ndarray, thresholds: tuple[float, ...], levels: tuple[float, ...]) -> np.ndarray:
    zones = np.searchsorted(thresholds, np.nan_to_num(values[0]), side="right")
    return np.where(np.isnan(values[0]), np.nan, np.asarray(levels)[zones])


def _penalise(values: np.ndarray, weight: float, floor: float | None) -> np.ndarray:
    result = values[0] - weight * np.nan_to_num(values[1])
    return result if floor is None else np.maximum(result, floor)


def _clip(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    return np.clip(values[0], low, high)


def _affine(values: np.ndarray, scale: float, shift: float) -> np.ndarray:
    return scale * values[0] + shift
