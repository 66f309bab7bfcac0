"""KL divergence from a reference policy, estimated on the sampled tokens.

With d = log pi - log pi_ref at a token sampled from pi, three estimators of KL(pi || pi_ref):

    k1  d                      unbiased, can be negative
    k2  d^2 / 2                biased, low variance, always >= 0
    k3  exp(-d) + d - 1        unbiased, low variance, always >= 0 (GRPO, arXiv 2402.03300)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated."""


def kl_estimate(logp: Tensor, reference_logp: Tensor, estimator: str = "k3") -> Tensor:
    """KL estimate of each token, in the shape of `logp`; |log-ratio| is clamped to 20.

    Raises
    ------
    UnknownNameError
        No such estimator.
    """
    if estimator not in ESTIMATORS:
        raise UnknownNameError(f"no KL estimator {estimator!r}{nearest(estimator, ESTIMATORS)}")
    difference = (logp - reference_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return (-difference).exp() + difference - 1


@dataclass(frozen=True)
class KLPenalty:
    """Add ``weight * KL(pi || pi_ref)`` to the loss of each token.

    Parameters
    ----------
    weight : float >= 0 (beta in the papers)
    estimator : "k1", "k2" or "k3"
        The gradient of k1 as a loss has mean zero: it is a monitor rather than a penalty. k3 is what GRPO and TRL use.
    """

    weight: float = 0.04
    estimator: Literal["k1", "k2", "k3"] = "k3"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InvalidInputError(f"the weight of a KL penalty must be finite and >= 0, got {self.weight}")
        if self.estimator not in ESTIMATORS:
            raise UnknownNameError(f"no KL estimator {self.estimator!r}{nearest(self.estimator, ESTIMATORS)}")
