"""What every distribution over the integers offers: log_prob, cdf, mean, variance, mode, sample, quantiles.

A network predicts the real parameters of a distribution over integers, and is trained on ``-log_prob`` of counts,
ratings or votes (Predicting integers from continuous parameters, arXiv 2602.10751). The classes are
`torch.distributions` in style. Two things differ: targets and samples are whole numbers of 64 bits, because a float32
cannot hold an integer above 2^24, and `sample` takes a generator.

Distances between a target and a location are formed as ``(n - floor(mu)) - (mu - floor(mu))``, the first part in
integers, so that a float32 location of any size loses nothing; the gradient of ``floor`` is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from polyreward.errors import InvalidInputError

LARGEST = 2**62
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class _Integers(constraints.Constraint):
    """Whole numbers from `low` to `high`, either of which may be None."""

    is_discrete = True

    def __init__(self, low: int | None, high: int | None) -> None:
        self.low, self.high = low, high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values are in the set."""
        inside = value == value.floor() if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)
        if self.low is not None:
            inside = inside & (value >= self.low)
        return inside & (value <= self.high) if self.high is not None else inside


class IntegerDistribution(Distribution, ABC):
    """A distribution over integers whose parameters are real tensors (arXiv 2602.10751).

    `low` and `high` are the ends of the support, None where there is none. The batch shape is that of the parameters.
    A subclass names its tensors in ``fields``, by which its constructor takes them too, and defines `mode`,
    ``_moments`` (both at once) or `mean` and `variance`, and ``_log_prob``, ``_cdf``, ``_sample`` of checked int64
    values. Half-precision parameters are computed and returned in float32.
    """

    fields: ClassVar[tuple[str, ...]]
    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False
    low: int | None = None
    high: int | None = None

    def __init__(self, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected value, float."""
        return self._moments()[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def variance(self) -> Tensor:
        """Variance, float."""
        return self._moments()[1]  # type: ignore[attr-defined, no-any-return]

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Whole numbers from `low` to `high`."""
        return _Integers(self.low, self.high)

    def log_prob(self, value: Any) -> Tensor:
        """Natural logarithm of the mass at each integer, shape of `value` broadcast with the batch shape.

        Parameters
        ----------
        value : integer tensor, or whole numbers in floating point

        Raises
        ------
        InvalidInputError
            A value that is not whole, NaN, beyond 2^62 in size, outside the support, in a floating dtype that cannot
            hold it exactly, or of a shape that does not broadcast.
        """
        return self._log_prob(self._inside(value))

    def cdf(self, value: Any) -> Tensor:
        """``P(N <= value)``; 0 below the support and 1 above it. Raises as `log_prob` does, save for the support."""
        n = self._checked(value)
        inside = n.clamp(self.low, self.high) if self.low is not None or self.high is not None else n
        result = self._cdf(inside).clamp(0, 1)
        if self.low is not None:
            result = torch.where(n < self.low, torch.zeros_like(result), result)
        return torch.where(n >= self.high, torch.ones_like(result), result) if self.high is not None else result

    def icdf(self, value: Any) -> Tensor:
        """Quantile: the smallest integer ``n`` with ``cdf(n) >= value``, int64.

        Found by doubling and halving intervals, in float64.

        Parameters
        ----------
        value : float in (0, 1)
            Broadcasts with the batch shape.

        Raises
        ------
        InvalidInputError
            A level outside (0, 1), or of a shape that does not broadcast.
        """
        wide = self._rebuilt(lambda t: t.detach().double())
        return quantiles(wide, value)

    def quantile(self, value: Any) -> Tensor:
        """Another name of `icdf`."""
        return self.icdf(value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws, int64 ``sample_shape + batch_shape``, from `generator` (None: torch's own)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self._rebuilt(lambda t: t.detach().double())._sample(shape, generator)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values of a bounded support, int64 (values, *batch), or (values, 1, ...) without `expand`.

        Raises
        ------
        InvalidInputError
            The support is unbounded or has more than 2^24 values.
        """
        if self.low is None or self.high is None or self.high - self.low >= 2**24:
            raise InvalidInputError(
                f"the support of {type(self).__name__} runs from {self.low} to {self.high}: too many values to list"
            )
        values = torch.arange(self.low, self.high + 1, device=self._tensors()[0].device)
        values = values.reshape(-1, *[1] * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """The same distribution with another batch shape."""
        size, before = torch.Size(batch_shape), len(self.batch_shape)
        return self._rebuilt(lambda t: t.expand(size + t.shape[before:]))

    def _inside(self, value: Any) -> Tensor:
        n = self._checked(value)
        _within(n, self.low, self.high, type(self).__name__)
        return n

    def _checked(self, value: Any) -> Tensor:
        return checked_targets(value, self.batch_shape, self._tensors()[0].device, type(self).__name__)

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.fields)

    def _rebuilt(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same distribution from other tensors."""
        made: Any = type(self)
        found: Self = made(**{name: change(getattr(self, name)) for name in self.fields})
        return found

    @abstractmethod
    def _log_prob(self, n: Tensor) -> Tensor:
        """Logarithm of the mass at integers of the support."""

    @abstractmethod
    def _cdf(self, n: Tensor) -> Tensor:
        """``P(N <= n)`` at integers of the support."""

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """By default the quantile of a uniform number."""
        return quantiles(self, uniform(shape, self._tensors()[0].device, generator))

    def __repr__(self) -> str:
        shown = ", ".join(f"{tuple(t.shape)}" for t in self._tensors())
        return f"{type(self).__name__}(parameters {shown}, support {self.low} to {self.high})"


def whole_numbers(value: Any, device: torch.device | None = None, where: str = "targets") -> Tensor:
    """`value` as int64, checked and never rounded.

    Raises
    ------
    InvalidInputError
        NaN, a fraction, a size above 2^62, or a size above what its floating dtype holds exactly (2^24 in float32).
    """
    numbers = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if not isinstance(value, Tensor) and numbers.dtype is torch.float32:
        numbers = torch.as_tensor(value, dtype=torch.float64)  # Python floats are float64
    numbers = numbers.to(device) if device is not None else numbers
    if numbers.is_complex():
        raise InvalidInputError(f"{where}: targets must be integers, got dtype {numbers.dtype}")
    if numbers.is_floating_point():
        broken = ~torch.isfinite(numbers) | (numbers != numbers.floor())
        _refuse(broken, numbers, where, "must be whole numbers and are never rounded")
        exact = min(2 / torch.finfo(numbers.dtype).eps, LARGEST)
        _refuse(
            numbers.abs() > exact,
            numbers,
            where,
            f"are above 2^{int(math.log2(exact))}, beyond which {numbers.dtype} cannot hold every integer; use int64",
        )
        return numbers.long()
    numbers = numbers.long()
    _refuse((numbers > LARGEST) | (numbers < -LARGEST), numbers, where, "must not exceed 2^62 in size")
    return numbers


def checked_targets(value: Any, batch_shape: torch.Size, device: torch.device, where: str) -> Tensor:
    """`whole_numbers` that broadcast with the batch shape of a distribution."""
    n = whole_numbers(value, device, where)
    try:
        torch.broadcast_shapes(n.shape, batch_shape)
    except RuntimeError as error:
        raise InvalidInputError(
            f"{where}: targets of shape {tuple(n.shape)} do not fit the batch shape {tuple(batch_shape)}"
        ) from error
    return n


def quantiles(distribution: Any, value: Any) -> Tensor:
    """Smallest integers at which ``distribution.cdf`` reaches `value`; the distribution should be float64."""
    mean = distribution.mean.detach()
    level = torch.as_tensor(value, dtype=torch.float64, device=mean.device).detach()
    if bool((~((level > 0) & (level < 1))).any()):
        raise InvalidInputError(f"quantile levels of {type(distribution).__name__} must lie between 0 and 1")
    try:
        shape = torch.broadcast_shapes(level.shape, distribution.batch_shape)
    except RuntimeError as error:
        raise InvalidInputError(
            f"quantile levels of shape {tuple(level.shape)} do not fit the batch {tuple(distribution.batch_shape)}"
        ) from error
    first = -LARGEST if distribution.low is None else distribution.low - 1
    last = LARGEST if distribution.high is None else distribution.high
    centre = torch.nan_to_num(mean.double(), 0.0).clamp(-(2.0**61), 2.0**61).round().long().expand(shape)
    with torch.no_grad():
        low = _gallop(centre.clamp(first, last), -1, first, lambda n: distribution.cdf(n) >= level)
        high = _gallop(centre.clamp(first, last), 1, last, lambda n: distribution.cdf(n) < level)
        while bool((high - low > 1).any()):
            middle = low + (high - low) // 2
            reached = distribution.cdf(middle) >= level
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def _gallop(n: Tensor, direction: int, end: int, onward: Callable[[Tensor], Tensor]) -> Tensor:
    """Walk from `n` with doubling steps, not past `end`, where `onward` says so."""
    step = 1
    while bool((go := onward(n) & (n != end)).any()):
        n = torch.where(go, n + direction * step, n)
        n = n.clamp(min=end) if direction < 0 else n.clamp(max=end)
        step = min(step * 2, 2**60)
    return n


def real_parameters(where: str, **values: Any) -> list[Tensor]:
    """Parameters as tensors of one shape and floating dtype (at least float32).

    Raises
    ------
    InvalidInputError
        NaN or infinite parameters, or shapes that do not broadcast; the message names `where` and the parameter.
    """
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    device = tensors[0].device if tensors else None
    dtype = torch.float32 if any(t.dtype in FLOATS for t in tensors) else torch.get_default_dtype()
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.dtype in FLOATS else dtype
    found = [torch.as_tensor(v, dtype=dtype, device=device) for v in values.values()]
    for name, tensor in zip(values, found, strict=True):
        if bool((~torch.isfinite(tensor)).any()):
            raise InvalidInputError(f"{where}: {name} has NaN or infinite entries; the network has diverged, or log(0)")
    try:
        return list(torch.broadcast_tensors(*found))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(values, found, strict=True))
        raise InvalidInputError(f"{where}: parameters do not broadcast: {shapes}") from error


def require_parameter(right: Tensor, where: str, name: str, expected: str, values: Tensor) -> None:
    """`InvalidInputError` with the first value for which `right` is false."""
    if not bool(right.all()):
        bad = values.detach()[~right].flatten()[0].item()
        raise InvalidInputError(f"{where}: {name} must be {expected}, got {bad:g}")


def location_scale(where: str, mu: Any, scale: Any) -> tuple[Tensor, Tensor]:
    """A location and a positive scale of one shape, checked."""
    location, width = real_parameters(where, mu=mu, scale=scale)
    require_parameter(width > 0, where, "scale", "positive", width)
    check_location(location, where)
    return location, width


def check_location(mu: Tensor, where: str) -> None:
    """Locations up to 2^61 in size, so that distances fit 64 bits."""
    require_parameter(mu.abs() <= 2.0**61, where, "mu", "at most 2^61 in size", mu)


def split_location(mu: Tensor) -> tuple[Tensor, Tensor]:
    """``floor(mu)`` as int64, and ``mu - floor(mu)`` in [0, 1], which carries the gradient."""
    floor = mu.detach().floor()
    return floor.long(), mu - floor


def nearest_integer(mu: Tensor) -> Tensor:
    """The integer next to each location, the lower one half-way, int64."""
    floor, fraction = split_location(mu)
    return floor + (fraction > 0.5).long()


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, exact at both ends."""
    near = x > -0.6931471805599453
    small, large = torch.where(near, x, -torch.ones_like(x)), torch.where(near, -torch.ones_like(x), x)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))


def clamp_through(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is 1 everywhere, so that nothing that left the range is stuck outside."""
    return x.clamp(low, high).detach() + (x - x.detach())


def standardised(x: Tensor, scale: Tensor, power: int = 1) -> Tensor:
    """``x / scale``, held to a size at which its `power` and the gradient of that fit the dtype (4e9 in float32 for 2).

    Beyond, x gets no gradient, and the scale still one that widens it.
    """
    most = torch.finfo(x.dtype).max ** (0.5 / power) * scale.detach()
    return torch.maximum(torch.minimum(x, most), -most) / scale


def uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers inside (0, 1), float64."""
    numbers = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
    return numbers.clamp(2.0**-54, 1 - 2.0**-53)


def whole_bounds(low: int | None, high: int | None, where: str) -> tuple[int | None, int | None]:
    """Ends of a support, checked."""
    for end in (low, high):
        if end is not None and (end != int(end) or abs(int(end)) > LARGEST // 2):
            raise InvalidInputError(f"{where}: low and high must be whole numbers up to 2^61 in size, got {end!r}")
    if low is not None and high is not None and low > high:
        raise InvalidInputError(f"{where}: low {low} is above high {high}")
    return None if low is None else int(low), None if high is None else int(high)


def _within(n: Tensor, low: int | None, high: int | None, where: str) -> None:
    expected = f"are outside the support, {'-inf' if low is None else low} to {'inf' if high is None else high}"
    if low is not None:
        _refuse(n < low, n, where, expected)
    if high is not None:
        _refuse(n > high, n, where, expected)


def _refuse(wrong: Tensor, values: Tensor, where: str, problem: str) -> None:
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        at = "" if not place else f" at {place[0] if len(place) == 1 else place}"
        raise InvalidInputError(f"{where}: targets {problem}; got {values[wrong].flatten()[0].item()!r}{at}")
