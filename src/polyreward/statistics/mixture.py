"""Mixtures of integer distributions, and distributions given as a table of a bounded range (arXiv 2602.10751).

    log p(n) = logsumexp over k of (log softmax(phi)_k + log p_k(n))

`IntegerMixture` is torch's `MixtureSameFamily` with whole-number targets, a mode, quantiles and draws from a generator.
`IntegerCategorical` is the free distribution on ``low .. low + C - 1``, the baseline whose size grows with the range;
and what `restricted` makes of any distribution whose support is cut to a small range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily

from polyreward.errors import InvalidInputError
from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    checked_targets,
    quantiles,
    real_parameters,
    uniform,
    whole_bounds,
)

MOST_VALUES = 2**20
GRID = 512


class IntegerCategorical(IntegerDistribution):
    """One logit for each integer of a bounded range.

    Parameters
    ----------
    logits : float (*batch, C)
        Unnormalised log-probabilities of ``low .. low + C - 1``.
    low : int

    Raises
    ------
    InvalidInputError
        NaN, no values, more than 2^20 values.
    """

    fields = ("logits",)

    def __init__(self, logits: Any, low: int = 0) -> None:
        name = type(self).__name__
        (found,) = real_parameters(name, logits=logits)
        if found.dim() == 0 or not 1 <= found.shape[-1] <= MOST_VALUES:
            raise InvalidInputError(
                f"{name} needs logits of shape (*batch, values), 1 to {MOST_VALUES} values, got {tuple(found.shape)}"
            )
        self.logits = found.log_softmax(-1)
        self.low = whole_bounds(low, None, name)[0] or 0
        self.high = self.low + found.shape[-1] - 1
        super().__init__(found.shape[:-1])

    @property
    def probs(self) -> Tensor:
        """Mass of each value, (*batch, C)."""
        return self.logits.exp()

    @property
    def mode(self) -> Tensor:
        """The likeliest integer, the lower of equal ones; int64."""
        return self._first + self.logits.argmax(-1)

    @property
    def mean(self) -> Tensor:
        """Expected value, float."""
        return (self.probs * self._places()).sum(-1) + self._first

    @property
    def variance(self) -> Tensor:
        """Variance, float."""
        places = self._places()
        centre = (self.probs * places).sum(-1, keepdim=True)
        return (self.probs * (places - centre).square()).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return -(self.probs * self.logits).sum(-1)

    @property
    def _first(self) -> int:
        return self.low or 0

    def _places(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], device=self.logits.device, dtype=self.logits.dtype)

    def _picked(self, table: Tensor, n: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(n.shape, self.batch_shape)
        table = table.expand(shape + table.shape[-1:])
        return table.gather(-1, (n - self._first).expand(shape)[..., None]).squeeze(-1)

    def _log_prob(self, n: Tensor) -> Tensor:
        return self._picked(self.logits, n)

    def _cdf(self, n: Tensor) -> Tensor:
        return self._picked(self.probs.cumsum(-1), n)

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        u = uniform(shape, self.logits.device, generator)
        below = self.probs.cumsum(-1).expand(shape + self.logits.shape[-1:]).contiguous()
        place = torch.searchsorted(below, u[..., None]).squeeze(-1)
        return self._first + place.clamp(max=self.logits.shape[-1] - 1)

    def _rebuilt(self, change: Callable[[Tensor], Tensor]) -> IntegerCategorical:
        return IntegerCategorical(change(self.logits), self._first)


def restricted(distribution: Any, low: int, high: int) -> IntegerCategorical:
    """`distribution` given that it lies in ``low .. high``, by summing over the range.

    Memory is the batch times the range. Dalap has a closed form instead, its own `low` and `high`.

    Raises
    ------
    InvalidInputError
        More than 2^20 values, a range that leaves the support, or one whose mass is 0 in the dtype.
    """
    low, high = (int(end) for end in whole_bounds(low, high, "restricted"))  # type: ignore[arg-type]
    if high - low >= MOST_VALUES:
        raise InvalidInputError(f"restricted: {low} to {high} has more than {MOST_VALUES} values")
    device = distribution.mean.device
    values = torch.arange(low, high + 1, device=device).reshape(-1, *[1] * len(distribution.batch_shape))
    logits = distribution.log_prob(values).movedim(0, -1)
    if bool(torch.isneginf(logits).all(-1).any()):
        raise InvalidInputError(f"restricted: the distribution has no mass on {low} to {high}")
    return IntegerCategorical(logits.clamp(min=torch.finfo(logits.dtype).min), low)


class IntegerMixture(MixtureSameFamily):
    """Mixture of K components of one family (arXiv 2602.10751).

    Parameters
    ----------
    weights : Categorical of batch shape (*batch), or logits (*batch, K)
        phi in the paper.
    components : IntegerDistribution of batch shape (*batch, K)

    Raises
    ------
    InvalidInputError
        Components that are not integer distributions, or a number of weights that does not fit.
    """

    def __init__(self, weights: Categorical | Tensor, components: IntegerDistribution) -> None:
        if not isinstance(components, IntegerDistribution):
            raise InvalidInputError(
                f"IntegerMixture needs an integer distribution as components, got {type(components).__name__}"
            )
        if not isinstance(weights, Categorical):
            (logits,) = real_parameters("IntegerMixture", weights=weights)
            weights = Categorical(logits=logits, validate_args=False)
        try:
            super().__init__(weights, components, validate_args=False)
        except ValueError as error:
            raise InvalidInputError(
                f"IntegerMixture: weights of shape {tuple(weights.logits.shape)} do not fit components of batch shape "
                f"{tuple(components.batch_shape)}"
            ) from error
        self.components, self.low, self.high = components, components.low, components.high

    @property
    def weights(self) -> Tensor:
        """Probability of each component, (*batch, K)."""
        return self.mixture_distribution.probs

    def log_prob(self, value: Any) -> Tensor:
        """Natural logarithm of the mass at each integer; raises as the components do."""
        each = self.components.log_prob(self._checked(value)[..., None])
        return torch.logsumexp(each + self.mixture_distribution.logits, -1)

    def cdf(self, value: Any) -> Tensor:
        """``P(N <= value)``."""
        n = self._checked(value)
        total = (self.components.cdf(n[..., None]) * self.weights).sum(-1).clamp(0, 1)
        return torch.where(n >= self.high, torch.ones_like(total), total) if self.high is not None else total

    def icdf(self, value: Any) -> Tensor:
        """Quantile, as `IntegerDistribution.icdf`."""
        return quantiles(self._rebuilt(lambda t: t.detach().double()), value)

    def quantile(self, value: Any) -> Tensor:
        """Another name of `icdf`."""
        return self.icdf(value)

    @property
    def mode(self) -> Tensor:
        """The likeliest integer that was found, int64.

        Sought at and around the components' modes and on 513 points between them, then around the best. That is exact
        when the modes of single-peaked components lie within 512 of each other.
        """
        with torch.no_grad():
            each = self.components.mode
            low, high = each.amin(-1, keepdim=True), each.amax(-1, keepdim=True)
            spacing = ((high - low) // GRID + 1).clamp(min=1)
            steps = torch.arange(GRID + 1, device=each.device)
            around = torch.arange(-8, 9, device=each.device)
            between = torch.minimum(low + spacing * steps, high)
            near = (each[..., None] + around).flatten(-2)
            best = self._best(torch.cat([between, near], -1))
            while bool((spacing > 1).any()):
                spacing = (spacing + 7) // 8
                best = self._best(best[..., None] + spacing * around)
            return best

    def _best(self, members: Tensor) -> Tensor:
        if self.low is not None or self.high is not None:
            members = members.clamp(self.low, self.high)
        members = members.sort(-1).values
        scores = self.log_prob(members.movedim(-1, 0))
        return members.gather(-1, scores.argmax(0)[..., None]).squeeze(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws, int64 ``sample_shape + batch_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        below = self.weights.double().cumsum(-1)
        u = uniform(shape, below.device, generator)
        which = (u[..., None] > below).sum(-1).clamp(max=below.shape[-1] - 1)
        return self.components.sample(sample_shape, generator).gather(-1, which[..., None]).squeeze(-1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> IntegerMixture:
        """The same mixture with another batch shape."""
        size = torch.Size(batch_shape)
        return self._rebuilt(lambda t: t.expand(size + t.shape[len(self.batch_shape) :]))

    def _checked(self, value: Any) -> Tensor:
        return checked_targets(value, self.batch_shape, self.weights.device, type(self).__name__)

    def _rebuilt(self, change: Callable[[Tensor], Tensor]) -> IntegerMixture:
        return IntegerMixture(change(self.mixture_distribution.logits), self.components._rebuilt(change))
