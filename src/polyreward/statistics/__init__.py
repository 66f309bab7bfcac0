"""Statistics: distributions over the integers whose parameters a network predicts.

Each distribution has `log_prob`, `cdf`, `icdf`, `mean`, `variance`, `mode` and `sample` in the style of
`torch.distributions`. `IntegerHead` turns features into one of them, or into a mixture.
"""

from polyreward.statistics.bitwise import BitwiseBernoulli, bits_needed
from polyreward.statistics.counts import DiscreteWeibull, PoissonCounts
from polyreward.statistics.dalap import DiscreteLaplaceAnalogue
from polyreward.statistics.danorm import DiscreteNormalAnalogue
from polyreward.statistics.discretised import DiscretizedLaplace, DiscretizedLogistic, DiscretizedNormal
from polyreward.statistics.integer_distributions import IntegerDistribution
from polyreward.statistics.integer_head import (
    FAMILIES,
    IntegerFamily,
    IntegerHead,
    TargetStats,
    bits,
    family_of,
    nll,
)
from polyreward.statistics.mixture import IntegerCategorical, IntegerMixture, restricted

__all__ = [
    "FAMILIES",
    "BitwiseBernoulli",
    "DiscreteLaplaceAnalogue",
    "DiscreteNormalAnalogue",
    "DiscreteWeibull",
    "DiscretizedLaplace",
    "DiscretizedLogistic",
    "DiscretizedNormal",
    "IntegerCategorical",
    "IntegerDistribution",
    "IntegerFamily",
    "IntegerHead",
    "IntegerMixture",
    "PoissonCounts",
    "TargetStats",
    "bits",
    "bits_needed",
    "family_of",
    "nll",
    "restricted",
]
