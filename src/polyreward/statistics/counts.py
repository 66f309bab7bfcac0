"""Distributions on 0, 1, 2, ...: Poisson and discrete Weibull, stable for large counts (arXiv 2602.10751's baselines).

Poisson with the rate lambda has log p(n) = n log lambda - lambda - log n!, a difference of large numbers; here it is
Loader's form, ``-log(2 pi n) / 2 - (Stirling's remainder) - n (u - log(1 + u))`` with ``u = (lambda - n) / n``.

The discrete Weibull (Dweib) has survival ``P(N >= n) = q^(n^b)``, so ``p(n) = q^(n^b) - q^((n+1)^b)``; b = 1 is the
geometric distribution. Its powers stay in logarithms; 0^b = 0 is a branch of its own, whose gradient is masked.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    log1mexp,
    real_parameters,
    require_parameter,
    split_location,
    uniform,
)

HEAD = 256  # terms of a Weibull moment summed one by one


class PoissonCounts(IntegerDistribution):
    """Poisson distribution as an integer distribution (a baseline of arXiv 2602.10751).

    Parameters
    ----------
    rate : float (*batch) > 0
        lambda, up to 2^61.

    Raises
    ------
    InvalidInputError
        A rate that is not positive, NaN; negative targets.
    """

    low: ClassVar[int] = 0  # type: ignore[misc]

    fields = ("rate",)

    def __init__(self, rate: Any) -> None:
        name = type(self).__name__
        (self.rate,) = real_parameters(name, rate=rate)
        require_parameter((self.rate > 0) & (self.rate <= 2.0**61), name, "rate", "positive, up to 2^61", self.rate)
        super().__init__(self.rate.shape)

    @property
    def mean(self) -> Tensor:
        """The rate."""
        return self.rate

    @property
    def variance(self) -> Tensor:
        """The rate."""
        return self.rate

    @property
    def mode(self) -> Tensor:
        """``floor(rate)``, the lower of two at a whole rate; int64."""
        floor, fraction = split_location(self.rate)
        return floor - ((fraction == 0) & (floor > 0)).long()

    def _log_prob(self, n: Tensor) -> Tensor:
        dtype = self.rate.dtype
        floor, fraction = split_location(self.rate)
        count = n.to(dtype)
        few = n < 16
        small = torch.where(few, count, torch.ones_like(count))
        plain = torch.xlogy(small, self.rate) - self.rate - torch.lgamma(small + 1)
        large = torch.where(few, torch.full_like(count, 16), count)
        # Not lambda - n in floating point: above 2^24 float32 has no digits left for it.
        u = torch.where(few, torch.zeros_like(count), ((floor - n).to(dtype) + fraction)) / large
        near = u.abs() < 0.1
        v = torch.where(near, u, torch.zeros_like(u))
        # u - log(1 + u) by the series of 2 artanh(v / (2 + v)), which has no cancellation.
        t = v / (2 + v)
        t2 = t.square()
        odd = t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9 + t2 * (1 / 11 + t2 / 13)))))
        # log(1 + u) away from 0; as a difference where the quotient would underflow, or its gradient overflow.
        small_rate = self.rate < 1e-3 * large
        quotient = torch.where(near | small_rate, torch.ones_like(u), self.rate / large)
        log_ratio = torch.where(small_rate, self.rate.log() - large.log(), quotient.log())
        gap = torch.where(near, v * t - 2 * t * odd, u - log_ratio)
        inverse = 1 / large
        square = inverse.square()
        stirling = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
        loader = -0.5 * (math.log(2 * math.pi) + large.log()) - stirling - large * gap
        return torch.where(few, plain, loader)

    def _cdf(self, n: Tensor) -> Tensor:
        wide = self.rate.double()
        return torch.special.gammaincc((n + 1).double(), wide).to(self.rate.dtype)

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(self.rate.expand(shape), generator=generator).long()


class DiscreteWeibull(IntegerDistribution):
    """Dweib, ``P(N >= n) = q^(n^b)`` (a baseline of arXiv 2602.10751).

    Parameters
    ----------
    q : float (*batch) in (0, 1), or None
    b : float (*batch) > 0
    log_decay : float (*batch), instead of q
        ``log(-log q)``. For a scale ``lambda`` of the counts it is ``-b log lambda``: survival is
        ``exp(-(n / lambda)^b)``.

    Raises
    ------
    InvalidInputError
        Not exactly one of q and log_decay, values outside the ranges above, NaN; negative targets.

    `mean` and `variance` carry no gradient.
    """

    low: ClassVar[int] = 0  # type: ignore[misc]

    fields = ("log_decay", "b")

    def __init__(self, q: Any = None, b: Any = None, *, log_decay: Any = None) -> None:
        name = type(self).__name__
        if (q is None) == (log_decay is None) or b is None:
            raise InvalidInputError(f"{name} needs b and exactly one of q and log_decay")
        if q is not None:
            q, b = real_parameters(name, q=q, b=b)
            require_parameter((q > 0) & (q < 1), name, "q", "between 0 and 1", q)
            log_decay = (-torch.where(q > 0.5, torch.log1p(q - 1), q.log())).log()
        self.log_decay, self.b = real_parameters(name, log_decay=log_decay, b=b)
        require_parameter(self.b > 0, name, "b", "positive", self.b)
        super().__init__(self.b.shape)

    @property
    def q(self) -> Tensor:
        """Chance of a positive count."""
        return (-self.log_decay.exp()).exp()

    @property
    def mode(self) -> Tensor:
        """The likeliest count, the lower of two that tie, int64; found among the counts near the density's peak."""
        with torch.no_grad():
            # The density peaks at lambda ((b - 1) / b)^(1/b), or at 0 for b <= 1.
            power, decay = self.b.double(), self.log_decay.double()
            above = (power > 1).double() * (power - 1).clamp(min=1e-300) / power
            peak = ((above.clamp(min=1e-300).log() - decay) / power).exp() * (power > 1)
            near = torch.arange(-4, 5, device=self.b.device)
            members = (peak.clamp(max=2.0**60).floor().long()[..., None] + near).clamp(min=0)
            wide = DiscreteWeibull(log_decay=decay[..., None], b=power[..., None])
            return members.gather(-1, wide._log_prob(members).argmax(-1, keepdim=True)).squeeze(-1)

    @torch.no_grad()
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Sums of the survival: 255 terms, and the rest by Euler and Maclaurin with the incomplete gamma function."""
        b, decay = self.b.double(), self.log_decay.double()
        n = torch.arange(1, HEAD, device=b.device, dtype=torch.float64)
        survival = (-_bounded_exp(decay[..., None] + b[..., None] * n.log())).exp()
        reach = _bounded_exp(decay + b * math.log(HEAD))
        last, slope = (-reach).exp(), -(b * reach / HEAD) * (-reach).exp()
        first_area, second_area = (
            (torch.lgamma(shape) - shape * decay - b.log()).exp() * torch.special.gammaincc(shape, reach)
            for shape in (1 / b, 2 / b)
        )  # integrals of S(x) and x S(x) beyond the terms
        mean = survival.sum(-1) + first_area + last / 2 - slope / 12
        edge, edge_slope = (2 * HEAD - 1) * last, 2 * last + (2 * HEAD - 1) * slope
        second = ((2 * n - 1) * survival).sum(-1) + 2 * second_area - first_area + edge / 2 - edge_slope / 12
        dtype = self.b.dtype
        return mean.to(dtype), (second - mean.square()).clamp(min=0).to(dtype)

    def _exponent(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """``log(n^b (-log q))`` for n >= 1 (0 elsewhere), and which n are zero."""
        zero = n == 0
        some = torch.where(zero, torch.ones_like(n), n).to(self.b.dtype)
        return self.log_decay + self.b * some.log(), zero

    def _log_prob(self, n: Tensor) -> Tensor:
        exponent, zero = self._exponent(n)
        some = torch.where(zero, torch.ones_like(n), n).to(self.b.dtype)
        step = (self.b * torch.log1p(1 / some)).clamp(min=torch.finfo(some.dtype).tiny)
        # log of n^b's growth to (n + 1)^b: no difference of powers, whose digits are gone for large n.
        growth = torch.where(zero, self.log_decay.expand(exponent.shape), exponent + step + log1mexp(-step))
        reached = torch.where(zero, torch.zeros_like(exponent), _bounded_exp(exponent))
        tiny = growth < -15
        fall = -_bounded_exp(torch.where(tiny, torch.zeros_like(growth), growth))
        return -reached + torch.where(tiny, growth - growth.clamp(max=-15).exp() / 2, log1mexp(fall))

    def _cdf(self, n: Tensor) -> Tensor:
        exponent, _ = self._exponent(n + 1)
        return -torch.expm1(-_bounded_exp(exponent))

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        u = uniform(shape, self.b.device, generator)
        size = (((-u.log()).log() - self.log_decay) / self.b).clamp(max=42.0).exp()
        return size.floor().long()


def _bounded_exp(x: Tensor) -> Tensor:
    """exp, cut where it would overflow, with gradient 0 there."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 8).exp()
