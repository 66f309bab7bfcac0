"""Trust regions: how far the ratio of new to old probability may move before a sample stops pulling.

A clipped surrogate ignores a sample once its ratio leaves ``[1 - low, 1 + high]``. `FixedClip` uses one for all;
`ElasticTrustRegion` gives each sample its own, wide where the outcome is strong evidence (large |advantage|) and the
group is undecided (large variance of the rewards), narrow where the signal is weak:

    bounded       radius = base * (1 + micro (2m - 1)) * (1 + macro (2v - 1)),  m = |A| / (1 + |A|)
    proportional  radius = base * |A|
    additive      radius = base + micro * tanh|A| + macro * v

with v = 4 Var(group) / (range of the reward)^2 in [0, 1], and every radius clamped to ``[minimum, maximum]``.

Paper: ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization (arXiv 2601.03723). The abstract states the two
levels and their direction; the closed forms here are this library's reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest

Bound = float | Tensor

LARGEST_LOW = 0.99
"""The lower radius stays below 1, so that the lower bound of the ratio stays above 0."""

ELASTICITIES = {"bounded": (0.8, 0.4), "additive": (0.1, 0.1), "proportional": (0.0, 0.0)}
"""Default micro and macro of each form."""


class TrustRegion(Protocol):
    """Contract of a trust region."""

    def bounds(self, advantages: Tensor, batch: RewardBatch) -> tuple[Bound, Bound]:
        """Lower and upper radius, each a number or a tensor (N,), for the rollouts of `batch`."""
        ...


@dataclass(frozen=True)
class FixedClip:
    """The same interval ``[1 - low, 1 + high]`` for every sample.

    Parameters
    ----------
    low : float in [0, 1]
    high : float >= 0
        Larger than `low` for DAPO's "clip higher" (arXiv 2503.14476).
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and self.high >= 0):
            raise InvalidInputError(
                f"a fixed clip needs 0 <= low <= 1 and high >= 0, got low={self.low}, high={self.high}"
            )

    def bounds(self, advantages: Tensor, batch: RewardBatch) -> tuple[Bound, Bound]:
        """The two numbers, whatever the rollouts."""
        return self.low, self.high


@dataclass(frozen=True)
class ElasticTrustRegion:
    """An interval for each sample, from its |advantage| and the variance of its group's rewards.

    Parameters
    ----------
    form : "bounded", "proportional" or "additive"
    low, high : float > 0
        Base radius of each side (eps_low, eps_high in the paper); for "proportional" the slope kappa of each side.
    micro, macro : float >= 0, or None for the form's default
        Elasticity to |advantage| and to the group's variance (lambda_micro, lambda_macro); 0.8 and 0.4 for "bounded",
        where neither may exceed 1, 0.1 and 0.1 for "additive". "proportional" takes neither.
    minimum, maximum : float, 0 < minimum <= maximum
        Every radius is clamped to this interval; the lower radius also stays below 1.
    reward_range : (smallest, largest) or None
        Range of the weighted sum of the rewards. With None the variance is divided by the largest group variance of
        the batch instead; that depends on what else is in the batch, so declare the range where it is known.
    weights : mapping of reward name to weight, or None
        Weights of the sum; None means 1 each, and a reward that the mapping leaves out has weight 0.

    The radius does not decrease in |advantage| nor in the group's variance, is bounded, depends on outcomes only,
    carries no gradient, is the base for all when both elasticities are 0, and ignores the sign of the advantage.
    Compute it once per rollout batch and keep it for all inner steps. A group without variance has advantage 0, so its
    radius does not matter. NaN rewards take no part in the variance.

    Paper: ETR (arXiv 2601.03723).

    Raises
    ------
    UnknownNameError
        No such form.
    InvalidInputError
        Negative elasticities, minimum > maximum, a base outside ``[minimum, maximum]``, an empty reward range.
    """

    form: Literal["bounded", "proportional", "additive"] = "bounded"
    low: float = 0.2
    high: float = 0.2
    micro: float | None = None
    macro: float | None = None
    minimum: float = 0.02
    maximum: float = 0.8
    reward_range: tuple[float, float] | None = (0.0, 1.0)
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.form not in ELASTICITIES:
            raise UnknownNameError(
                f"no form {self.form!r} of the elastic trust region{nearest(self.form, ELASTICITIES)}"
            )
        for name in ("low", "high", "micro", "macro", "minimum", "maximum"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise InvalidInputError(f"{name} must be a number, got {value!r}")
        if not 0 < self.minimum <= self.maximum < math.inf:
            raise InvalidInputError(f"need 0 < minimum <= maximum, got minimum={self.minimum}, maximum={self.maximum}")
        if self.form == "proportional" and (self.micro or self.macro):
            raise InvalidInputError("the proportional form takes no micro or macro; low and high are its slopes")
        limit = 1.0 if self.form == "bounded" else math.inf
        for name, default in zip(("micro", "macro"), ELASTICITIES[self.form], strict=True):
            value = default if getattr(self, name) is None else getattr(self, name)
            if not 0 <= value <= limit or math.isinf(value):
                raise InvalidInputError(f"{name} must be in [0, {limit}] for the {self.form} form, got {value}")
            object.__setattr__(self, name, float(value))
        for name in ("low", "high"):
            base = getattr(self, name)
            inside = base > 0 if self.form == "proportional" else self.minimum <= base <= self.maximum
            if not inside:
                raise InvalidInputError(
                    f"{name}={base} must be in [minimum, maximum] = [{self.minimum}, {self.maximum}]"
                    if self.form != "proportional"
                    else f"{name} must be positive, got {base}"
                )
        if self.form != "proportional" and self.low > LARGEST_LOW:
            raise InvalidInputError(f"low={self.low} must be at most {LARGEST_LOW}: a ratio cannot fall below 0")
        if self.reward_range is not None:
            try:
                smallest, largest = (float(end) for end in self.reward_range)
            except (TypeError, ValueError):
                smallest = largest = math.nan
            if not (smallest < largest and math.isfinite(largest - smallest)):
                raise InvalidInputError(f"reward_range must be (smallest, largest), got {self.reward_range!r}")
            object.__setattr__(self, "reward_range", (smallest, largest))

    @torch.no_grad()
    def bounds(self, advantages: Tensor, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        """Lower and upper radius of every rollout.

        Parameters
        ----------
        advantages : float tensor (N,)
            The advantages that the loss will use.
        batch : RewardBatch of N rows

        Returns
        -------
        low, high : float tensors (N,), float32 or wider, without gradient

        Raises
        ------
        InvalidInputError
            `advantages` is not (N,) or not finite.
        MissingColumnError
            `weights` names a reward that the batch lacks.
        """
        if advantages.shape != (len(batch),):
            raise InvalidInputError(f"advantages has shape {tuple(advantages.shape)}, the batch has {len(batch)} rows")
        if not bool(torch.isfinite(advantages).all()):
            row = int((~torch.isfinite(advantages)).nonzero()[0])
            raise InvalidInputError(f"advantages is {float(advantages[row])} in row {row}; it must be finite")
        strength = advantages.abs().to(torch.float64)
        undecided = self.group_score(batch)
        low = self._radius(self.low, strength, undecided).clamp(max=LARGEST_LOW)
        high = self._radius(self.high, strength, undecided)
        wide = torch.promote_types(advantages.dtype, torch.float32)
        return low.to(wide), high.to(wide)

    def _radius(self, base: float, strength: Tensor, undecided: Tensor) -> Tensor:
        assert self.micro is not None
        assert self.macro is not None
        if self.form == "proportional":
            radius = base * strength
        elif self.form == "additive":
            radius = base + self.micro * strength.tanh() + self.macro * undecided
        else:
            score = strength / (1 + strength)
            radius = base * (1 + self.micro * (2 * score - 1)) * (1 + self.macro * (2 * undecided - 1))
        return radius.clamp(self.minimum, self.maximum)

    def group_score(self, batch: RewardBatch) -> Tensor:
        """Score v in [0, 1] of every rollout's group, float64 (N,): 4p(1-p) for 0/1 rewards with pass rate p."""
        signal, mask = self._signal(batch)
        segments = batch.segments("group")
        variance = segments.variance(signal, mask)
        if self.reward_range is not None:
            smallest, largest = self.reward_range
            score = 4 * variance / (largest - smallest) ** 2
        elif segments.count:
            peak = variance.max()
            score = torch.where(peak > 0, variance / torch.where(peak > 0, peak, 1.0), 0.0)
        else:
            score = variance
        return segments.spread(score.clamp(0, 1))

    def _signal(self, batch: RewardBatch) -> tuple[Tensor, Tensor | None]:
        rewards = batch.rewards.to(torch.float64)
        if batch.valid is not None:
            rewards = torch.where(batch.valid, rewards, 0.0)
        if self.weights is not None:
            for name in self.weights:
                if name not in batch.names:
                    raise MissingColumnError(f"a weight names reward {name!r}{nearest(name, batch.names)}")
            rewards = rewards * rewards.new_tensor([float(self.weights.get(name, 0.0)) for name in batch.names])
        return rewards.sum(dim=1), None if batch.valid is None else batch.valid.any(dim=1)
