"""A portfolio of test curricula, of which the model's capability chooses one (TAROT).

Easy tests first help a model that passes few; a capable model gains more from hard tests first. The base model is
probed once, without training: c_t is its pass rate on tier t over a held-out slice, and ``C = mean_t c_t`` its
capability. Where pilot runs are affordable, the curriculum with the highest measured gain on held-out problems is
chosen. Else a rule: easy to hard for ``C < theta``, hard first for ``C >= theta``. Training rewards are never looked
at: those of different curricula are not comparable.

The curricula themselves (schedules and weights of tiers) are `polyreward.rewards.tiered_tests.PORTFOLIO`; nothing here
looks inside them.

Paper: TAROT: Test-driven and Capability-adaptive Curriculum Reinforcement Fine-tuning for Code Generation with Large
Language Models (arXiv 2602.15449). The abstract says that the choice depends on capability; the rule is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

#: Tiers that count for the capability, in the order of their difficulty.
TIERS = ("basic", "medium", "high", "edge")
THETA = 0.4


@dataclass(frozen=True)
class CapabilityProfile:
    """Pass rates of a model that was not trained yet.

    Parameters
    ----------
    pass_rates : mapping of tier to number in [0, 1], at least one
        c_t in the module's text; a tier that no probed suite has is left out.

    Raises
    ------
    InvalidInputError
        No rate, an unknown tier, or a rate outside [0, 1].
    """

    pass_rates: Mapping[str, float]

    def __post_init__(self) -> None:
        rates = dict(self.pass_rates) if isinstance(self.pass_rates, Mapping) else {}
        if not rates:
            raise InvalidInputError(f"a capability profile needs the pass rate of a tier, got {self.pass_rates!r}")
        for tier, rate in rates.items():
            if tier not in TIERS:
                raise InvalidInputError(f"a capability profile has no tier {tier!r}{nearest(str(tier), TIERS)}")
            if not isinstance(rate, int | float | np.number) or not 0 <= rate <= 1:
                raise InvalidInputError(f"the pass rate of tier {tier!r} must be in [0, 1], got {rate!r}")
        object.__setattr__(self, "pass_rates", {tier: float(rates[tier]) for tier in TIERS if tier in rates})

    @property
    def score(self) -> float:
        """Capability C in [0, 1], the mean over the tiers."""
        return float(np.mean(list(self.pass_rates.values())))

    @property
    def basic(self) -> float | None:
        """Pass rate of the basic tier, reported beside the score; None where it was not probed."""
        return self.pass_rates.get("basic")

    @property
    def ordered(self) -> bool:
        """Whether the rates fall from basic over medium to high: labels are written by models, and may be wrong."""
        rates = [self.pass_rates[tier] for tier in TIERS[:3] if tier in self.pass_rates]
        return all(a >= b for a, b in itertools.pairwise(rates))


@dataclass(frozen=True)
class CurriculumPortfolio:
    """Test curricula by name, and the rule that chooses one.

    Parameters
    ----------
    curricula : mapping of name to (schedule, weights)
        For example `polyreward.rewards.tiered_tests.PORTFOLIO`.
    theta : float in [0, 1]
        Capability from which on hard tests come first. 0.4, ours; calibrate it on pilot runs, keep it with the policy.
    easy_to_hard, hard_first : names among the curricula

    Raises
    ------
    InvalidInputError
        No curriculum, or a theta outside [0, 1].
    """

    curricula: Mapping[str, tuple[Any, Any]]
    theta: float = THETA
    easy_to_hard: str = "var_asce_normal"
    hard_first: str = "var_asce_rev"

    def __post_init__(self) -> None:
        if not isinstance(self.curricula, Mapping) or not self.curricula:
            raise InvalidInputError(
                f"a portfolio needs a mapping of names to (schedule, weights), got {self.curricula!r}"
            )
        for name, parts in self.curricula.items():
            if not isinstance(parts, tuple | list) or len(parts) != 2:
                raise InvalidInputError(f"curriculum {name!r} must be a pair (schedule, weights), got {parts!r}")
        object.__setattr__(self, "curricula", {str(name): tuple(parts) for name, parts in self.curricula.items()})
        _check_theta(self.theta)

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self.curricula:
            raise UnknownNameError(f"the portfolio has no curriculum {name!r}{nearest(str(name), self.curricula)}")
        return self.curricula[name]

    def __iter__(self) -> Any:
        return iter(self.curricula)

    def __len__(self) -> int:
        return len(self.curricula)

    def select(self, profile: CapabilityProfile, gains: Mapping[str, float] | None = None) -> str:
        """Name of the curriculum for a model of this capability.

        Parameters
        ----------
        profile : CapabilityProfile
        gains : mapping of names to held-out gains of pilot runs, optional
            The highest is chosen, the first in the order of the portfolio among equal ones. Gains are differences of
            held-out all-tier pass rates, never of training rewards.

        Raises
        ------
        UnknownNameError
            The name that was chosen, or one of the gains, is not in the portfolio.
        InvalidInputError
            A gain that is not finite, or an empty mapping of gains.
        """
        if gains is not None:
            for name in gains:
                self[name]
            return _best({name: gains[name] for name in self.curricula if name in gains})
        name = select(profile, self.theta, self.easy_to_hard, self.hard_first)
        self[name]
        return name


def select(
    profile: CapabilityProfile,
    theta: float = THETA,
    easy_to_hard: str = "var_asce_normal",
    hard_first: str = "var_asce_rev",
) -> str:
    """The rule alone: `easy_to_hard` where the capability is below `theta`, `hard_first` from there on."""
    _check_theta(theta)
    return easy_to_hard if profile.score < theta else hard_first


def probe_capability(
    policy: Callable[[Any], str | Sequence[str]],
    suites: Iterable[Any] | Mapping[Any, Any],
    runner: Any = None,
    **options: Any,
) -> CapabilityProfile:
    """Pass rate of a model on each tier, over a held-out slice; nothing is trained.

    Parameters
    ----------
    policy : function of a problem -> one completion (greedy), or a list of sampled ones
    suites : mapping of problem to suite, or a sequence of suites
        `polyreward.rewards.tiered_tests.TieredSuite`, or anything with its methods ``passed(completion, runner)`` and
        ``tiers_passed(passed)``. For a sequence the policy is given the suite itself.
    runner, options : passed to ``suite.passed``
        `runner` None is the sandbox.

    Returns
    -------
    CapabilityProfile
        The rate of a tier is the mean over the problems that have it of the share of completions which pass all its
        cases. Tiers beyond the four do not count.

    Raises
    ------
    InvalidInputError
        No suite, a policy that returns no completion, or suites without any of the four tiers.
    """
    problems = list(suites.items()) if isinstance(suites, Mapping) else [(suite, suite) for suite in suites]
    if not problems:
        raise InvalidInputError("probe_capability needs at least one suite")
    rates: dict[str, list[float]] = {}
    for place, (problem, suite) in enumerate(problems):
        answer = policy(problem)
        completions = [answer] if isinstance(answer, str) else list(answer)
        if not completions:
            raise InvalidInputError(f"the policy returned no completion for problem {place}")
        found: dict[str, list[bool]] = {}
        for completion in completions:
            for tier, passed in suite.tiers_passed(suite.passed(completion, runner, **options)).items():
                found.setdefault(tier, []).append(passed)
        for tier, values in found.items():
            rates.setdefault(tier, []).append(float(np.mean(values)))
    return CapabilityProfile({tier: float(np.mean(values)) for tier, values in rates.items() if tier in TIERS})


def _best(gains: Mapping[str, float]) -> str:
    if not gains:
        raise InvalidInputError("gains names no curriculum; expected the held-out gain of at least one")
    for name, gain in gains.items():
        if not isinstance(gain, int | float | np.number) or not math.isfinite(gain):
            raise InvalidInputError(f"the gain of {name!r} must be a finite number, got {gain!r}")
    return max(gains, key=lambda name: gains[name])


def _check_theta(theta: float) -> None:
    if not isinstance(theta, int | float | np.number) or not 0 <= theta <= 1:
        raise InvalidInputError(f"theta must be in [0, 1], got {theta!r}")
