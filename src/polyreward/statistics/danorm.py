"""Danorm: the analogue of the normal distribution on the integers (arXiv 2602.10751).

    p(n) = exp(-(n - mu)^2 / (2 s^2)) / Z,   Z = sum over all integers m of exp(-(m - mu)^2 / (2 s^2))

The paper truncates the sum to a window of 6 s, whose memory grows with s. Here Z is the Jacobi theta function, whose
two series cover every scale with few terms: the sum itself for s <= 1, and by Poisson summation, for s > 1,

    Z = s sqrt(2 pi) (1 + 2 sum over k >= 1 of exp(-2 pi^2 s^2 k^2) cos(2 pi k mu))

of which two terms reach float64. Both are exact to the last digits, and memory does not depend on s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    location_scale,
    nearest_integer,
    split_location,
    standardised,
    uniform,
)

WIDE = 1.0  # scales above it use Poisson summation
REACH = 10  # integers on each side of mu in the plain sum: exp(-10^2 / 2) is below float64 at s = 1
SMOOTH = 16.0  # scales above it use the Euler-Maclaurin series of the cdf
TAIL = 160  # terms of the plain cdf: ten scales


class DiscreteNormalAnalogue(IntegerDistribution):
    """Danorm, ``p(n)`` proportional to ``exp(-(n - mu)^2 / (2 scale^2))`` (arXiv 2602.10751).

    For a bounded range use `restricted`, which sums over it.

    Parameters
    ----------
    mu : float (*batch)
        Location, up to 2^61 in size.
    scale : float (*batch) > 0
        s in the paper; the variance is s^2 to many digits once it exceeds 1. Below 1e-12 all mass sits on the nearest
        integer.

    Raises
    ------
    InvalidInputError
        A scale that is not positive, NaN, shapes that do not broadcast.
    """

    fields = ("mu", "scale")

    def __init__(self, mu: Any, scale: Any) -> None:
        self.mu, self.scale = location_scale(type(self).__name__, mu, scale)
        self._floor, self._fraction = split_location(self.mu)
        super().__init__(self.mu.shape)

    @property
    def log_normaliser(self) -> Tensor:
        """``log Z``."""
        nearest = torch.minimum(self._fraction, 1 - self._fraction) / self._narrow
        plain = self._log_sum() - nearest.square() / 2
        return torch.where(self.scale <= WIDE, plain, self._log_theta())

    @property
    def mode(self) -> Tensor:
        """The integer next to mu, the lower one half-way; int64."""
        return nearest_integer(self.mu)

    @property
    def mean(self) -> Tensor:
        """Expected value: ``mu + s^2 d log Z / d mu``."""
        return (self._floor + self._moments()[0].double()).to(self.mu.dtype)

    @property
    def _narrow(self) -> Tensor:
        """The scale where the plain sum is used, else 1."""
        return torch.where(self.scale <= WIDE, self.scale, torch.ones_like(self.scale)).clamp(min=1e-12)

    @property
    def _broad(self) -> Tensor:
        return torch.where(self.scale <= WIDE, torch.ones_like(self.scale), self.scale)

    def _log_prob(self, n: Tensor) -> Tensor:
        d = ((n - self._floor).to(self.mu.dtype) - self._fraction).abs()
        nearest = torch.minimum(self._fraction, 1 - self._fraction)
        # (d^2 - nearest^2) / s^2 as a product: with a narrow scale both squares are huge and nearly equal.
        narrow = self._narrow
        excess = standardised(d - nearest, narrow, 2) * standardised(d + nearest, narrow, 2)
        plain = -excess / 2 - self._log_sum()
        wide = -standardised(d, self._broad, 2).square() / 2 - self._log_theta()
        return torch.where(self.scale <= WIDE, plain, wide)

    def _offsets(self) -> Tensor:
        """Distances of the integers around mu, (*batch, 2 REACH)."""
        steps = torch.arange(1 - REACH, REACH + 1, device=self.mu.device, dtype=self.mu.dtype)
        return steps - self._fraction[..., None]

    def _exponents(self) -> Tensor:
        """``-(x^2 - nearest^2) / (2 s^2)`` of these; the largest is 0."""
        x, nearest = self._offsets().abs(), torch.minimum(self._fraction, 1 - self._fraction)[..., None]
        narrow = self._narrow[..., None]
        return -((x - nearest) / narrow) * ((x + nearest) / narrow) / 2

    def _log_sum(self) -> Tensor:
        """Logarithm of Z without the term of the nearest integer, for narrow scales."""
        return self._exponents().logsumexp(-1)

    def _waves(self) -> list[tuple[float, Tensor]]:
        """Frequency and coefficient ``2 exp(-2 pi^2 s^2 k^2)`` of the terms of the other series."""
        scale = self._broad.clamp(max=8)  # beyond, nothing is left of them
        return [(2 * math.pi * k, 2 * (-2 * (math.pi * k * scale).square()).exp()) for k in (1, 2)]

    def _log_theta(self) -> Tensor:
        ripple = sum(c * (w * self._fraction).cos() for w, c in self._waves())
        return self._broad.log() + 0.5 * math.log(2 * math.pi) + torch.log1p(torch.as_tensor(ripple))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean, counted from floor(mu), and variance."""
        share, x = self._exponents().softmax(-1), self._offsets()
        first = (share * x).sum(-1)
        spread = (share * (x - first[..., None]).square()).sum(-1)
        f, squared = self._fraction, self._broad.clamp(max=8).square()
        theta: Any = 1 + sum(c * (w * f).cos() for w, c in self._waves())
        slope: Any = sum(-c * w * (w * f).sin() for w, c in self._waves())
        bend: Any = sum(-c * w * w * (w * f).cos() for w, c in self._waves())
        slope, bend = slope / theta, bend / theta - (slope / theta).square()
        narrow = self.scale <= WIDE
        return (
            f + torch.where(narrow, first, squared * slope),
            torch.where(narrow, spread, self._broad.square() * (1 + squared * bend)),
        )

    def _cdf(self, n: Tensor) -> Tensor:
        smooth = self.scale > SMOOTH
        border = (n - self._floor).to(self.mu.dtype) - self._fraction + 0.5
        z = standardised(border, torch.where(smooth, self.scale, SMOOTH), 2).clamp(-1e3, 1e3)
        h = 1 / torch.where(smooth, self.scale, SMOOTH).square()
        density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
        # Sum over a half-line by the midpoint rule: odd derivatives of the density at n + 1/2.
        series = z / 24 + h * 7 / 5760 * (3 * z - z**3) + h.square() * 31 / 967680 * (z**5 - 10 * z**3 + 15 * z)
        wide = torch.special.ndtr(z) + h * density * series
        left = n < self._floor + 1
        start = torch.where(left, n, n + 1)
        steps = torch.arange(TAIL + 1, device=n.device)
        members = start[..., None] + torch.where(left, -1, 1)[..., None] * steps
        kept = DiscreteNormalAnalogue(
            self.mu[..., None], torch.where(smooth, torch.ones_like(self.scale), self.scale)[..., None]
        )
        tail = kept._log_prob(members).logsumexp(-1).exp()
        return torch.where(smooth, wide, torch.where(left, tail, 1 - tail))

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """Rejection from rounded normals, accepted at 92 % or more; by the cdf for narrow scales."""
        device = self.mu.device
        mu, scale = self.mu.expand(shape), self._broad.expand(shape)
        floor, fraction = self._floor.expand(shape), self._fraction.expand(shape)
        draws, waiting = torch.zeros(shape, dtype=torch.int64, device=device), torch.ones(shape, dtype=torch.bool)
        waiting = waiting.to(device)
        while bool(waiting.any()):
            noise = torch.randn(shape, dtype=mu.dtype, device=device, generator=generator)
            step = (fraction + scale * noise + 0.5).floor()
            x = step - fraction
            cell = torch.special.ndtr((x.abs() * -1 + 0.5) / scale) - torch.special.ndtr((x.abs() * -1 - 0.5) / scale)
            ratio = (-(x / scale).square() / 2 - 1 / (24 * scale.square())).exp()
            chance = ratio / (cell * scale * math.sqrt(2 * math.pi))
            taken = waiting & (uniform(shape, device, generator) < chance)
            draws = torch.where(taken, floor + step.long(), draws)
            waiting = waiting & ~taken
        u = uniform(shape, device, generator)
        shares = self._exponents().softmax(-1).cumsum(-1)
        place = (shares < u[..., None]).sum(-1).clamp(max=2 * REACH - 1)
        return torch.where(self.scale <= WIDE, self._floor + 1 - REACH + place, draws)
