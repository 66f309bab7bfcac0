"""Dalap: the analogue of the Laplace distribution on the integers, with a real mean (arXiv 2602.10751).

    p(n) = gamma^|n - mu| / z,   z = (gamma^f + gamma^(1 - f)) / (1 - gamma),   f = mu - floor(mu)

It is two geometric distributions back to back. One starts at floor(mu) and runs down, with weight
``w = gamma^f / (gamma^f + gamma^(1-f)) = sigmoid((2 f - 1) log gamma)``; the other starts at floor(mu) + 1 and runs up.
All arithmetic follows that view and stays in logarithms: no power is formed that can overflow, and ``1 - gamma`` is
``-expm1(log gamma)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyreward.errors import InvalidInputError
from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    check_location,
    log1mexp,
    nearest_integer,
    real_parameters,
    require_parameter,
    split_location,
    uniform,
    whole_bounds,
)


@dataclass(frozen=True)
class _Half:
    """One geometric half: runs from `start` in `direction`; `count` values, None without end; `log_weight`."""

    start: Tensor
    direction: int
    count: Tensor | None
    log_weight: Tensor


class DiscreteLaplaceAnalogue(IntegerDistribution):
    """Dalap, ``p(n)`` proportional to ``gamma^|n - mu|`` (arXiv 2602.10751).

    Parameters
    ----------
    mu : float (*batch)
        Location, any real number up to 2^61 in size. `mean` equals it only at integers and half-integers.
    gamma : float (*batch) in (0, 1), or None
        Decay from one integer to the next.
    log_gamma : float (*batch) < 0, instead of gamma
        For gamma near 0 or 1, where gamma itself loses its digits.
    low, high : int or None
        Ends of a truncated support; the mass is divided by its sum over them, in closed form.

    Raises
    ------
    InvalidInputError
        Not exactly one of gamma and log_gamma, values outside the ranges above, NaN, shapes that do not broadcast.
    """

    fields = ("mu", "log_gamma")

    def __init__(
        self,
        mu: Any,
        gamma: Any = None,
        *,
        log_gamma: Any = None,
        low: int | None = None,
        high: int | None = None,
    ) -> None:
        name = type(self).__name__
        if (gamma is None) == (log_gamma is None):
            raise InvalidInputError(f"{name} needs exactly one of gamma and log_gamma")
        if gamma is not None:
            mu, decay = real_parameters(name, mu=mu, gamma=gamma)
            require_parameter((decay > 0) & (decay < 1), name, "gamma", "between 0 and 1", decay)
            log_gamma = torch.where(decay > 0.5, torch.log1p(decay - 1), decay.log())
        self.mu, self.log_gamma = real_parameters(name, mu=mu, log_gamma=log_gamma)
        require_parameter(self.log_gamma < 0, name, "log_gamma", "negative", self.log_gamma)
        check_location(self.mu, name)
        self.low, self.high = whole_bounds(low, high, name)
        self._floor, self._fraction = split_location(self.mu)
        super().__init__(self.mu.shape)

    @property
    def gamma(self) -> Tensor:
        """Decay from one integer to the next."""
        return self.log_gamma.exp()

    @property
    def log_normaliser(self) -> Tensor:
        """``log z`` of the distribution on all integers."""
        ends = torch.logaddexp(self._fraction * self.log_gamma, (1 - self._fraction) * self.log_gamma)
        return ends - log1mexp(self.log_gamma)

    @property
    def mode(self) -> Tensor:
        """The integer next to mu, the lower one half-way, moved into the support; int64."""
        return nearest_integer(self.mu).clamp(self.low, self.high) if self._bounded else nearest_integer(self.mu)

    @property
    def _bounded(self) -> bool:
        return self.low is not None or self.high is not None

    @property
    def _tilt(self) -> Tensor:
        """Logit of the weight of the lower half."""
        return (2 * self._fraction - 1) * self.log_gamma

    def _halves(self) -> tuple[_Half, _Half, Tensor | float]:
        """The lower and the upper half, cut to the support, with weights that sum to one; log-mass before the cut."""
        down, up = self._floor, self._floor + 1
        log_weights = [logsigmoid(self._tilt), logsigmoid(-self._tilt)]
        counts: list[Tensor | None] = [None, None]
        if self.high is not None:  # the upper half may be empty and the lower one start at `high`
            down = down.clamp(max=self.high)
            counts[1] = (self.high - up + 1).clamp(min=0)
            log_weights[0] = log_weights[0] + (self._floor - down) * self.log_gamma
        if self.low is not None:
            up = up.clamp(min=self.low)
            counts[0] = (down - self.low + 1).clamp(min=0)
            counts[1] = None if self.high is None else (self.high - up + 1).clamp(min=0)
            log_weights[1] = log_weights[1] + (up - self._floor - 1) * self.log_gamma
        for side, count in enumerate(counts):
            if count is not None:
                share = log1mexp(self.log_gamma * count.clamp(min=1))
                log_weights[side] = torch.where(count > 0, log_weights[side] + share, -torch.inf)
        total: Tensor | float = torch.logaddexp(*log_weights) if self._bounded else 0.0
        lower, upper = (weight - total for weight in log_weights)
        return _Half(down, -1, counts[0], lower), _Half(up, 1, counts[1], upper), total

    def _log_prob(self, n: Tensor) -> Tensor:
        below, dtype = n <= self._floor, self.mu.dtype
        steps = torch.where(below, self._floor - n, n - self._floor - 1).to(dtype)
        side = logsigmoid(torch.where(below, self._tilt, -self._tilt))
        return side + steps * self.log_gamma + log1mexp(self.log_gamma) - self._halves()[2]

    def _cdf(self, n: Tensor) -> Tensor:
        lower, upper, _ = self._halves()
        below = n <= self._floor
        left = self._tail(lower, (lower.start - n).clamp(min=0))
        right = self._tail(upper, (n - upper.start + 1).clamp(min=0))
        return torch.where(below, left, 1 - right)

    def _tail(self, half: _Half, steps: Tensor) -> Tensor:
        """Mass of a half at `steps` or more steps from its start."""
        reach = steps * self.log_gamma
        if half.count is None:
            return (half.log_weight + reach).exp()
        left = (half.count - steps).clamp(min=0)
        share = torch.expm1(left * self.log_gamma) / torch.expm1(half.count.clamp(min=1) * self.log_gamma)
        return (half.log_weight + reach).exp() * share

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, in float64: far from the support of a half its terms nearly cancel."""
        anchor = self._floor if not self._bounded else self._floor.clamp(self.low, self.high)
        first = second = torch.zeros((), dtype=torch.float64, device=self.mu.device)
        rate = -self.log_gamma.double()
        for half in self._halves()[:2]:
            steps, spread = _geometric_moments(rate, half.count)
            weight = half.log_weight.double().exp()
            offset = (half.start - anchor).double() + half.direction * steps
            first = first + weight * offset
            second = second + weight * (spread + offset.square())
        variance = (second - first.square()).clamp(min=0)
        return (anchor + first).to(self.mu.dtype), variance.to(self.mu.dtype)

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        device = self.mu.device
        lower, upper, _ = self._halves()
        go_down = uniform(shape, device, generator) < lower.log_weight.exp()
        u = uniform(shape, device, generator)
        draws = []
        for half in (lower, upper):
            if half.count is None:
                steps = (u.log() / self.log_gamma).floor()
            else:
                some = half.count.clamp(min=1)
                steps = (torch.log1p(u * torch.expm1(some * self.log_gamma)) / self.log_gamma).floor()
                steps = torch.minimum(steps, (some - 1).to(steps.dtype))
            draws.append(half.start + half.direction * steps.clamp(max=2.0**61).long())
        return torch.where(go_down, draws[0], draws[1])

    def _rebuilt(self, change: Callable[[Tensor], Tensor]) -> DiscreteLaplaceAnalogue:
        return DiscreteLaplaceAnalogue(change(self.mu), log_gamma=change(self.log_gamma), low=self.low, high=self.high)


def _geometric_moments(rate: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of steps 0, 1, ... (below `count`) with weights ``exp(-rate * steps)``, float64."""
    plain = 1 / torch.expm1(rate.clamp(max=700))
    if count is None:
        return plain, plain * (plain + 1)
    c = count.clamp(min=1).double()
    # Near the uniform the closed form is a difference of large numbers, and the series in the rate takes its place.
    flat = rate * c < 1e-2
    squared = c.square()
    mean_flat = (c - 1) / 2 - rate * (squared - 1) / 12 + rate**3 * (squared.square() - 1) / 720
    variance_flat = (squared - 1) / 12 - rate.square() * (squared.square() - 1) / 240
    reach = torch.where(flat, torch.ones_like(rate), (rate * c).clamp(max=700))
    cut = c / torch.expm1(reach)
    cut_spread = c.square() / (torch.expm1(reach) * -torch.expm1(-reach))
    return (
        torch.where(flat, mean_flat, plain - cut),
        torch.where(flat, variance_flat, plain * (plain + 1) - cut_spread),
    )
