"""From features to a distribution over integers: one linear layer and a family (arXiv 2602.10751).

The layer gives P numbers o for a family of P parameters, and ``K + K P`` for a mixture of K components. With m and s
the mean and standard deviation of the training targets, a fresh layer already sits at the scale of the data:

    location mu = m + s o_1;   scale = s exp(o_2);   Dalap's log gamma = -exp(o_2) / s, at most -1e-6
    Poisson's lambda = m exp(o_1);   Dweib's lambda = m exp(o_1), b = exp(o_2), survival exp(-(n / lambda)^b)

A sigmoid would not do for gamma: on wide data it must come within 1e-6 of 1. Exponents are cut at 20 on either side,
and that cut, like the one of log gamma, passes gradients, so that a unit which left the range can return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.statistics.bitwise import BitwiseBernoulli, bits_needed
from polyreward.statistics.counts import DiscreteWeibull, PoissonCounts
from polyreward.statistics.dalap import DiscreteLaplaceAnalogue
from polyreward.statistics.danorm import DiscreteNormalAnalogue
from polyreward.statistics.discretised import DiscretizedLaplace, DiscretizedLogistic, DiscretizedNormal
from polyreward.statistics.integer_distributions import IntegerDistribution, clamp_through, whole_numbers
from polyreward.statistics.mixture import MOST_VALUES, IntegerCategorical, IntegerMixture

LARGEST_EXPONENT = 20.0
LARGEST_LOG_GAMMA = -1e-6


@dataclass(frozen=True)
class TargetStats:
    """What a head knows of the training targets.

    Attributes
    ----------
    mean, std : float
        m and s; a deviation of 0 counts as 1, and where a positive scale is needed a mean of 0 counts as 1 too.
    low, high : int
        Smallest and largest target that the head must be able to predict; used by Bitwise and the categorical.
    """

    mean: float
    std: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std >= 0 and self.low <= self.high):
            raise InvalidInputError(
                f"TargetStats needs a finite mean, a deviation of at least 0 and low <= high, got {self}"
            )

    @classmethod
    def of(cls, targets: Any) -> TargetStats:
        """Statistics (population deviation) of training targets, integers (N,).

        Raises
        ------
        InvalidInputError
            No targets, or one that is not a whole number.
        """
        n = whole_numbers(targets, where="TargetStats")
        if n.numel() == 0:
            raise InvalidInputError("TargetStats needs at least one target, got none")
        wide = n.double()
        return cls(float(wide.mean()), float(wide.std(correction=0)), int(n.min()), int(n.max()))


@dataclass(frozen=True)
class IntegerFamily:
    """A family that a head can predict.

    Attributes
    ----------
    name : str
    outputs : (stats) -> int
        P, numbers a component.
    build : (o (*batch, P), stats) -> distribution of batch shape (*batch)
    """

    name: str
    outputs: Callable[[TargetStats], int]
    build: Callable[[Tensor, TargetStats], IntegerDistribution]


class IntegerHead(nn.Module):
    """Linear layer from features to a distribution over integers (arXiv 2602.10751).

    Parameters
    ----------
    family : str, IntegerFamily or class of distribution
        A key of `FAMILIES`, one of its classes, or a family of one's own. Of Bitwise, "bitwise" is unsigned where no
        target is negative and two's complement otherwise; "bitwise-offset" is offset binary from `low`.
    components : int
        K; 1 gives the family itself (P outputs), more an `IntegerMixture` (K + K P outputs).
    target_stats : TargetStats, or the training targets
    width : int or None
        Number of features H; None takes it from the first call.

    Raises
    ------
    InvalidInputError, UnknownNameError
        Fewer than one component, no statistics, an unknown family, features of another shape.
    """

    def __init__(
        self,
        family: str | IntegerFamily | type[IntegerDistribution],
        components: int = 1,
        target_stats: TargetStats | Any = None,
        *,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if components < 1 or components != int(components):
            raise InvalidInputError(f"IntegerHead needs at least 1 component, got {components}")
        if target_stats is None:
            raise InvalidInputError("IntegerHead needs target_stats: TargetStats.of(training targets)")
        self.stats = target_stats if isinstance(target_stats, TargetStats) else TargetStats.of(target_stats)
        self.family, self.components = family_of(family), int(components)
        self.outputs = self.family.outputs(self.stats)
        size = self.outputs if components == 1 else self.components * (1 + self.outputs)
        self.linear = nn.LazyLinear(size) if width is None else nn.Linear(width, size)

    def forward(self, features: Tensor) -> IntegerDistribution | IntegerMixture:
        """Distribution of batch shape (*batch) from features (*batch, H).

        Raises
        ------
        InvalidInputError
            Features that are not floating point or of another width; outputs that are NaN or infinite.
        """
        if not features.is_floating_point() or features.dim() == 0:
            found = f"{features.dtype} {tuple(features.shape)}"
            raise InvalidInputError(f"IntegerHead needs float features (*batch, H), got {found}")
        width = getattr(self.linear, "in_features", 0)
        if width and features.shape[-1] != width:
            raise InvalidInputError(f"IntegerHead was made for {width} features, got {features.shape[-1]}")
        return self.distribution(self.linear(features))

    def distribution(self, outputs: Tensor) -> IntegerDistribution | IntegerMixture:
        """Distribution from the numbers of a layer of one's own, (*batch, P) or (*batch, K + K P).

        Component weights come first, then the parameters of each component in turn.
        """
        k, p = self.components, self.outputs
        expected = p if k == 1 else k * (1 + p)
        if outputs.dim() == 0 or outputs.shape[-1] != expected:
            raise InvalidInputError(
                f"IntegerHead needs {expected} outputs in the last place, got {tuple(outputs.shape)}"
            )
        if k == 1:
            return self.family.build(outputs, self.stats)
        parameters = outputs[..., k:].unflatten(-1, (k, p))
        return IntegerMixture(outputs[..., :k], self.family.build(parameters, self.stats))

    def extra_repr(self) -> str:
        """Family and number of components."""
        return f"family={self.family.name}, components={self.components}"


def nll(distribution: IntegerDistribution | IntegerMixture, targets: Any) -> Tensor:
    """``-log_prob`` in nats, (*batch). Raises as `log_prob` does."""
    return -distribution.log_prob(targets)


def bits(nats: Tensor) -> Tensor:
    """Nats as bits."""
    return nats / math.log(2)


def family_of(family: str | IntegerFamily | type[IntegerDistribution]) -> IntegerFamily:
    """A family by name, by the class of its distribution, or itself.

    Raises
    ------
    UnknownNameError
        A name or class that no family has.
    """
    if isinstance(family, IntegerFamily):
        return family
    name = family.lower() if isinstance(family, str) else _CLASSES.get(family, getattr(family, "__name__", str(family)))
    if name not in FAMILIES:
        raise UnknownNameError(f"unknown family of integer distributions {name!r}{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def _exp(x: Tensor) -> Tensor:
    return clamp_through(x, -LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


def _deviation(stats: TargetStats) -> float:
    return stats.std if stats.std > 0 else 1.0


def _size(stats: TargetStats) -> float:
    return stats.mean if stats.mean > 0 else 1.0


def _location(o: Tensor, stats: TargetStats) -> Tensor:
    return stats.mean + _deviation(stats) * o[..., 0]


def _dalap(o: Tensor, stats: TargetStats) -> IntegerDistribution:
    decay = clamp_through(-_exp(o[..., 1]) / _deviation(stats), -math.inf, LARGEST_LOG_GAMMA)
    return DiscreteLaplaceAnalogue(_location(o, stats), log_gamma=decay)


def _with_scale(distribution: Callable[[Tensor, Tensor], IntegerDistribution]) -> Callable[..., IntegerDistribution]:
    def build(o: Tensor, stats: TargetStats) -> IntegerDistribution:
        return distribution(_location(o, stats), _deviation(stats) * _exp(o[..., 1]))

    return build


def _weibull(o: Tensor, stats: TargetStats) -> IntegerDistribution:
    # b between exp(-4) and exp(4): beyond, every power is 1 or out of the dtype.
    shape = clamp_through(o[..., 1], -4.0, 4.0).exp()
    scale = clamp_through(o[..., 0], -LARGEST_EXPONENT, LARGEST_EXPONENT) + math.log(_size(stats))
    return DiscreteWeibull(log_decay=-shape * scale, b=shape)


def _bitwise(o: Tensor, stats: TargetStats) -> IntegerDistribution:
    return BitwiseBernoulli(o, signed=stats.low < 0)


def _bitwise_offset(o: Tensor, stats: TargetStats) -> IntegerDistribution:
    return BitwiseBernoulli(o, offset=stats.low)


def _values(stats: TargetStats) -> int:
    if stats.high - stats.low >= MOST_VALUES:
        raise InvalidInputError(
            f"a categorical head over {stats.low} to {stats.high} has over {MOST_VALUES} values; use another family"
        )
    return stats.high - stats.low + 1


def _family(
    name: str, outputs: int | Callable[[TargetStats], int], build: Callable[[Tensor, TargetStats], IntegerDistribution]
) -> IntegerFamily:
    return IntegerFamily(name, (lambda stats: outputs) if isinstance(outputs, int) else outputs, build)


FAMILIES: Mapping[str, IntegerFamily] = {
    family.name: family
    for family in (
        _family("dalap", 2, _dalap),
        _family("danorm", 2, _with_scale(DiscreteNormalAnalogue)),
        _family("dnormal", 2, _with_scale(DiscretizedNormal)),
        _family("dlaplace", 2, _with_scale(DiscretizedLaplace)),
        _family("dlogistic", 2, _with_scale(DiscretizedLogistic)),
        _family("dweib", 2, _weibull),
        _family("poisson", 1, lambda o, stats: PoissonCounts(_size(stats) * _exp(o[..., 0]))),
        _family("bitwise", lambda stats: bits_needed(stats.low, stats.high, stats.low < 0), _bitwise),
        _family("bitwise-offset", lambda stats: bits_needed(0, stats.high - stats.low), _bitwise_offset),
        _family("categorical", _values, lambda o, stats: IntegerCategorical(o, stats.low)),
    )
}

_CLASSES: Mapping[Any, str] = {
    DiscreteLaplaceAnalogue: "dalap",
    DiscreteNormalAnalogue: "danorm",
    DiscretizedNormal: "dnormal",
    DiscretizedLaplace: "dlaplace",
    DiscretizedLogistic: "dlogistic",
    DiscreteWeibull: "dweib",
    PoissonCounts: "poisson",
    BitwiseBernoulli: "bitwise",
    IntegerCategorical: "categorical",
}
