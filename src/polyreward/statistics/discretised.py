"""Densities integrated over unit cells: discretised normal, Laplace and logistic (arXiv 2602.10751).

    p(n) = F((n + 1/2 - mu) / s) - F((n - 1/2 - mu) / s)

with F the cumulative distribution of the standard density. The difference is never formed as such: far from mu both
ends are 0 or 1, and for a wide scale they are equal. With d = |n - mu| and h = 1 / s each family has forms in which
only positive terms are added, or whose ratio is factored out, so that log p and its gradient are finite and exact to
the last digits hundreds of scales away, for narrow and for wide scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    location_scale,
    log1mexp,
    nearest_integer,
    split_location,
    standardised,
    uniform,
)

# Gauss-Legendre rule of ten points on [-1/2, 1/2], the five positive nodes with twice their weight.
NODES = (0.0744371694908156, 0.21669769706462355, 0.33970478414951225, 0.4325316833444922, 0.48695326425858586)
WEIGHTS = (0.29552422471475287, 0.26926671930999635, 0.21908636251598204, 0.1494513491505806, 0.06667134430868814)


class DiscretizedNormal(IntegerDistribution):
    """dnormal: a normal density integrated over unit cells (arXiv 2602.10751).

    Parameters
    ----------
    mu : float (*batch)
        Location, up to 2^61 in size.
    scale : float (*batch) > 0
        Standard deviation of the density; the variance is ``s^2 + 1/12`` to many digits once it exceeds 1.5.

    Raises
    ------
    InvalidInputError
        A scale that is not positive, NaN, shapes that do not broadcast.
    """

    fields = ("mu", "scale")

    def __init__(self, mu: Any, scale: Any) -> None:
        self.mu, self.scale = location_scale(type(self).__name__, mu, scale)
        super().__init__(self.mu.shape)

    @property
    def mode(self) -> Tensor:
        """The integer whose cell holds mu, the lower one on a border; int64."""
        return nearest_integer(self.mu)

    def _moments(self) -> tuple[Tensor, Tensor]:
        return _rounded_moments(self.mu, self.scale, torch.special.ndtr, wide=1.5, reach=15, spread=1.0)

    def _log_prob(self, n: Tensor) -> Tensor:
        d, scale = _distance(n, self.mu), _at_least(self.scale)
        h = 1 / scale
        tilt = standardised(d, scale, 2) * h
        # Three forms: a density that hardly changes over the cell; a cell that holds mu; a cell in the tail.
        flat = (h < 0.8) & (tilt < 0.35)
        inside = ~flat & (d < 0.5)
        outer = ~flat & ~inside
        # Each form computes on values it can take elsewhere too, or NaN would come back through the gradient.
        h1, t1 = torch.where(flat, h, 0.5), torch.where(flat, tilt, 0.1)
        cell: Any = sum(
            w * (t1 * x).cosh() * (-(h1 * x).square() / 2).exp() for x, w in zip(NODES, WEIGHTS, strict=True)
        )
        even = -(t1 / h1).square() / 2 + h1.log() - 0.5 * math.log(2 * math.pi) + cell.log()
        h2, d2 = torch.where(inside, h, 1.0), torch.where(inside, d, 0.25)
        root = math.sqrt(0.5)
        holds = (((0.5 - d2) * h2 * root).erf() + ((0.5 + d2) * h2 * root).erf()).log() - math.log(2)
        s3, d3, t3 = torch.where(outer, scale, 1.0), torch.where(outer, d, 1.0), torch.where(outer, tilt, 1.0)
        a, b = standardised(d3 - 0.5, s3, 2), standardised(d3 + 0.5, s3, 2)
        ends = torch.special.erfcx(a * root) - torch.special.erfcx(b * root) * (-t3).exp()
        tail = -a.square() / 2 + ends.log() - math.log(2)
        return torch.where(flat, even, torch.where(inside, holds, tail))

    def _cdf(self, n: Tensor) -> Tensor:
        return torch.special.ndtr(_border(n, self.mu, self.scale))

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(shape, dtype=torch.float64, device=self.mu.device, generator=generator)
        return _rounded(self.mu, self.scale * noise)


class DiscretizedLaplace(IntegerDistribution):
    """dlaplace: a Laplace density integrated over unit cells (arXiv 2602.10751).

    Parameters
    ----------
    mu : float (*batch)
        Location, up to 2^61 in size.
    scale : float (*batch) > 0
        b, the mean distance from mu under the density.

    Raises
    ------
    InvalidInputError
        A scale that is not positive, NaN, shapes that do not broadcast.
    """

    fields = ("mu", "scale")

    def __init__(self, mu: Any, scale: Any) -> None:
        self.mu, self.scale = location_scale(type(self).__name__, mu, scale)
        super().__init__(self.mu.shape)

    @property
    def mode(self) -> Tensor:
        """The integer whose cell holds mu, the lower one on a border; int64."""
        return nearest_integer(self.mu)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Sums of two geometric tails around the cell that holds mu."""
        centre = nearest_integer(self.mu)
        r, h = _offset(centre, self.mu).double().neg(), 1 / _at_least(self.scale).double()
        sign = torch.where(r < 0, -1.0, 1.0)
        rest, edge = -torch.expm1(-h), ((sign * r - 0.5) * h).exp() / 2
        first = sign * edge * -torch.expm1(-2 * sign * r * h) / rest
        second = edge * (1 + (-2 * sign * r * h).exp()) * (2 - rest) / rest.square()
        dtype = self.mu.dtype
        return (centre + first).to(dtype), (second - first.square()).to(dtype)

    def _log_prob(self, n: Tensor) -> Tensor:
        d, scale = _distance(n, self.mu), _at_least(self.scale)
        inside, h = d < 0.5, 1 / scale
        d1, d2 = torch.where(inside, d, 0.25), torch.where(inside, 1.0, d)
        holds = (-(torch.expm1(-(0.5 - d1) * h) + torch.expm1(-(0.5 + d1) * h)) / 2).log()
        tail = -standardised(d2 - 0.5, scale) + log1mexp(-h) - math.log(2)
        return torch.where(inside, holds, tail)

    def _cdf(self, n: Tensor) -> Tensor:
        return _laplace_cdf(_border(n, self.mu, self.scale))

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        u = uniform(shape, self.mu.device, generator) - 0.5
        return _rounded(self.mu, -self.scale * u.sign() * torch.log1p(-2 * u.abs()))


class DiscretizedLogistic(IntegerDistribution):
    """A logistic density integrated over unit cells, as pixel models use it; kin of those of arXiv 2602.10751.

    Parameters
    ----------
    mu : float (*batch)
        Location, up to 2^61 in size.
    scale : float (*batch) > 0
        s; the standard deviation of the density is ``pi s / sqrt(3)``, and the variance ``(pi s)^2 / 3 + 1/12`` to many
        digits once s exceeds 2.

    Raises
    ------
    InvalidInputError
        A scale that is not positive, NaN, shapes that do not broadcast.
    """

    fields = ("mu", "scale")

    def __init__(self, mu: Any, scale: Any) -> None:
        self.mu, self.scale = location_scale(type(self).__name__, mu, scale)
        super().__init__(self.mu.shape)

    @property
    def mode(self) -> Tensor:
        """The integer whose cell holds mu, the lower one on a border; int64."""
        return nearest_integer(self.mu)

    def _moments(self) -> tuple[Tensor, Tensor]:
        return _rounded_moments(self.mu, self.scale, torch.sigmoid, wide=2.0, reach=80, spread=math.pi**2 / 3)

    def _log_prob(self, n: Tensor) -> Tensor:
        d, scale = _distance(n, self.mu), _at_least(self.scale)
        ends = logsigmoid(standardised(0.5 - d, scale)) + logsigmoid(standardised(0.5 + d, scale))
        return ends + log1mexp(-1 / scale)

    def _cdf(self, n: Tensor) -> Tensor:
        return torch.sigmoid(_border(n, self.mu, self.scale))

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return _rounded(self.mu, self.scale * torch.logit(uniform(shape, self.mu.device, generator)))


def _at_least(scale: Tensor) -> Tensor:
    """The scale, not below 1e-12: such distributions are point masses already."""
    return scale.clamp(min=1e-12)


def _offset(n: Tensor, mu: Tensor) -> Tensor:
    floor, fraction = split_location(mu)
    return (n - floor).to(mu.dtype) - fraction


def _distance(n: Tensor, mu: Tensor) -> Tensor:
    return _offset(n, mu).abs()


def _border(n: Tensor, mu: Tensor, scale: Tensor) -> Tensor:
    """``(n + 1/2 - mu) / s``."""
    return standardised(_offset(n, mu) + 0.5, _at_least(scale), 2)


def _laplace_cdf(z: Tensor) -> Tensor:
    side = (-z.abs()).exp() / 2
    return torch.where(z < 0, side, 1 - side)


def _rounded(mu: Tensor, noise: Tensor) -> Tensor:
    """Nearest integer of ``mu + noise``, formed so that a large mu loses nothing."""
    floor, fraction = split_location(mu)
    return floor + (fraction + noise + 0.5).floor().clamp(-(2.0**61), 2.0**61).long()


def _rounded_moments(
    mu: Tensor, scale: Tensor, cdf: Callable[[Tensor], Tensor], wide: float, reach: int, spread: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a rounded symmetric variable.

    Above the scale `wide` rounding adds 1/12 to the variance and nothing to the mean, to the digits of float64. Below
    it, they are sums of the two tails over `reach` cells.
    """
    narrow = scale <= wide
    s = torch.where(narrow, scale, torch.ones_like(scale)).double()[..., None].clamp(min=1e-12)
    centre = nearest_integer(mu)
    r = _offset(centre, mu).double().neg()[..., None]
    j = torch.arange(1, reach + 1, device=mu.device, dtype=torch.float64)
    up, down = cdf((r + 0.5 - j) / s), cdf((-r + 0.5 - j) / s)
    first = (up - down).sum(-1)
    second = ((2 * j - 1) * (up + down)).sum(-1)
    mean = torch.where(narrow, centre + first, mu.double())
    variance = torch.where(narrow, second - first.square(), spread * scale.double().square() + 1 / 12)
    return mean.to(mu.dtype), variance.to(mu.dtype)
