"""Tiers of tests: which are active when, what a passed test of each is worth, and the curricula that combine both.

The tiers are basic, medium (the paper's intermediate), high (complex) and edge; tests without one are "minimal". A
`TierSchedule` says which tiers are active at training progress f, `TierWeights` how much a passed test counts.
`PORTFOLIO` holds the curricula of the released code; `polyreward.rewards.tiered_tests` makes rewards of them.

Paper: TAROT: Test-driven and Capability-adaptive Curriculum Reinforcement Fine-tuning for Code Generation with Large
Language Models (arXiv 2602.15449).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.contract import is_finite

TIERS = ("basic", "medium", "high", "edge")
MINIMAL = "minimal"
_OTHER_NAMES = {"intermediate": "medium", "complex": "high"}


def tier_name(label: Any) -> str:
    """A tier by its name; intermediate is medium, complex is high, None is minimal.

    Raises
    ------
    UnknownNameError
        Another name; it is a ``ValueError`` too.
    """
    if label is None:
        return MINIMAL
    name = label.strip().lower() if isinstance(label, str) else label
    name = _OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if name not in (*TIERS, MINIMAL):
        raise UnknownTierError(f"there is no tier {label!r}{nearest(str(label), (*TIERS, MINIMAL))}")
    return str(name)


class UnknownTierError(UnknownNameError, InvalidInputError):
    """A tier that does not exist."""


@dataclass(frozen=True)
class TierSchedule:
    """Which tiers are active at training progress f.

    Parameters
    ----------
    phases : pairs of a limit and tiers
        A phase is active for f below its limit and from the limit before it on. The last one stays active, whatever its
        limit; None and infinity are fine there.

    Raises
    ------
    InvalidInputError
        No phase, limits that do not increase from above 0, a phase without tiers, or an unknown tier.
    """

    phases: tuple[tuple[float, frozenset[str]], ...]

    def __post_init__(self) -> None:
        try:
            phases = [(math.inf if until is None else float(until), tiers) for until, tiers in self.phases]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"phases must be pairs of a limit and tiers, got {self.phases!r}") from error
        if not phases or not all(a < b for a, b in itertools.pairwise([0.0, *(until for until, _ in phases)])):
            raise InvalidInputError(
                f"phases need limits that increase from above 0, got {[until for until, _ in phases]}"
            )
        if any(isinstance(tiers, str) for _, tiers in phases):
            raise InvalidInputError(f"the tiers of a phase are a set, got {self.phases!r}")
        named = tuple((until, frozenset(map(tier_name, tiers))) for until, tiers in phases)
        for until, tiers in named:
            if not tiers:
                raise InvalidInputError(f"the phase until {until:g} has no tier; every reward would be 0")
        object.__setattr__(self, "phases", named)

    def __call__(self, progress: float) -> frozenset[str]:
        """Tiers active at `progress` >= 0."""
        return self.phases[self.phase(progress)][1]

    active = __call__

    def phase(self, progress: float) -> int:
        """Number of the phase at `progress`, from 0; exactly at a limit the next one.

        Raises
        ------
        InvalidInputError
            Progress below 0 or NaN.
        """
        if not isinstance(progress, int | float | np.number) or not progress >= 0:
            raise InvalidInputError(f"training progress must be a number >= 0, got {progress!r}")
        limits = [until for until, _ in self.phases[:-1]]
        return int(np.searchsorted(limits, progress, side="right"))

    def scaled(self, factor: float) -> TierSchedule:
        """The schedule with every limit times `factor`: the released recipes of three epochs use 3."""
        if not is_finite(factor) or factor <= 0:
            raise InvalidInputError(f"factor must be a finite number above 0, got {factor!r}")
        return TierSchedule(tuple((until * factor, tiers) for until, tiers in self.phases))

    @property
    def constant(self) -> bool:
        """Whether the active tiers never change."""
        return len({tiers for _, tiers in self.phases}) == 1

    @property
    def monotone(self) -> bool:
        """Whether tiers are only ever added."""
        return all(a[1] <= b[1] for a, b in itertools.pairwise(self.phases))


@dataclass(frozen=True)
class TierWeights:
    """How much a passed case of each tier is worth.

    Parameters
    ----------
    weights : mapping of tier to number >= 0
        All four tiers; "minimal" has 0 where it is left out.

    Raises
    ------
    InvalidInputError
        A tier without weight, an unknown one, or a weight that is negative or not finite.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise InvalidInputError(f"weights must be a mapping of tier to number, got {self.weights!r}")
        named = {tier_name(tier): weight for tier, weight in self.weights.items()}
        for tier in TIERS:
            if tier not in named:
                raise InvalidInputError(f"no weight for tier {tier!r}; use 0 to leave it out")
        for tier, weight in named.items():
            if not is_finite(weight) or weight < 0:
                raise InvalidInputError(f"the weight of tier {tier!r} must be a finite number >= 0, got {weight!r}")
        object.__setattr__(self, "weights", {tier: float(named.get(tier, 0.0)) for tier in (*TIERS, MINIMAL)})

    def __getitem__(self, tier: str) -> float:
        return self.weights[tier_name(tier)]

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    def of(self, tiers: Sequence[str], active: Iterable[str]) -> np.ndarray:
        """Weight of each case, float64 (cases,), 0 where its tier is not active."""
        wanted = set(active)
        return np.array([self.weights[tier] if tier in wanted else 0.0 for tier in tiers], dtype=np.float64)


def _schedule(*tiers: Sequence[str]) -> TierSchedule:
    return TierSchedule(tuple(zip((0.2, 0.4, 0.6, math.inf), map(frozenset, tiers), strict=True)))


def _weights(basic: float, medium: float, high: float, edge: float) -> TierWeights:
    return TierWeights({"basic": basic, "medium": medium, "high": high, "edge": edge})


_EASY_TO_HARD = _schedule(TIERS[:1], TIERS[:2], TIERS[:3], TIERS)
_HARD_FIRST = _schedule(("high",), ("high", "edge"), ("medium", "high", "edge"), TIERS)


def _only(tier: str) -> tuple[TierSchedule, TierWeights]:
    return TierSchedule(((math.inf, frozenset({tier})),)), TierWeights({t: float(t == tier) for t in TIERS})


#: The curricula of the paper's released code: schedule and weights by name. Progress is the fraction of one epoch.
PORTFOLIO: Mapping[str, tuple[TierSchedule, TierWeights]] = {
    "uni": (_EASY_TO_HARD, _weights(0.25, 0.25, 0.25, 0.25)),
    "var": (_EASY_TO_HARD, _weights(0.35, 0.35, 0.15, 0.15)),
    "var_asce_normal": (_EASY_TO_HARD, _weights(0.15, 0.15, 0.35, 0.35)),
    "var_asce_rev": (_HARD_FIRST, _weights(0.15, 0.15, 0.35, 0.35)),
    "basic_only": _only("basic"),
    "complex_only": _only("high"),
    "edge_only": _only("edge"),
    "binary": (TierSchedule(((math.inf, frozenset(TIERS)),)), _weights(0.25, 0.25, 0.25, 0.25)),
}
