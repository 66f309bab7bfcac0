"""Preferences from a distribution of each response's worth: mean and variance, or a histogram.

What a single score cannot say of a response that people disagree about, its variance can; nobody's own taste is
modelled. The baselines of variational preference learning (arXiv 2408.10075), from distributional preference learning
(arXiv 2312.08358):

    mean-variance   P(a > b) = sigma(sqrt(2 pi) (m_a - m_b) / sqrt(v_a + v_b))
    categorical     P(a > b) = sum_i p_a(i) (sum_{j < i} p_b(j) + p_b(i) / 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from polyreward.errors import InvalidInputError
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import LinearHead, Scores, TwoLayerHead

STEEPNESS = math.sqrt(2 * math.pi)
"""c in the paper: close to the slope of the normal distribution function that it stands for."""


def mean_variance_loss(difference: Tensor, first_variance: Tensor, second_variance: Tensor) -> Tensor:
    """``softplus(-sqrt(2 pi) dm / sqrt(v1 + v2))``, elementwise; `difference` is mean of the preferred less the
    other.
    """
    return softplus(-STEEPNESS * difference / torch.sqrt(first_variance + second_variance))


def categorical_win_probability(first: Tensor, second: Tensor) -> Tensor:
    """Probability that a draw of the first is the higher one, a tie counted half.

    Parameters
    ----------
    first, second : float (..., A)
        Probabilities of the atoms, in rising order.

    Returns
    -------
    float (...,)
    """
    if first.shape[-1:] != second.shape[-1:]:
        raise InvalidInputError(f"{first.shape[-1]} and {second.shape[-1]} atoms: expected the same number")
    return (first * (second.cumsum(dim=-1) - 0.5 * second)).sum(dim=-1)


@dataclass(frozen=True)
class MeanVariance:
    """Pairs under a normal distribution of each response's worth; the head gives mean and log-variance, (R, 2).

    Parameters
    ----------
    variance_penalty : float >= 0
        Weight of the mean variance in the loss.
    """

    variance_penalty: float = 0.0
    outputs: ClassVar[int] = 2
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        if not self.variance_penalty >= 0:
            raise InvalidInputError(f"variance_penalty must be at least 0, got {self.variance_penalty}")

    def head(self, width: int) -> LinearHead:
        """A linear head of the right size."""
        return LinearHead(width, outputs=2)

    def two_layer_head(self, width: int) -> TwoLayerHead:
        """A head of two layers of the right size."""
        return TwoLayerHead(width, outputs=2)

    def variance(self, scores: Scores) -> Tensor:
        """Variance of each response's worth, (R,)."""
        return _wide(scores, 2, "MeanVariance")[..., 1].exp()

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over comparisons of the mean over their pairs; a tie is half a win of each."""
        values = _wide(scores, 2, "MeanVariance")
        nll, metrics = _pair_loss(self, values, self.score(scores), comparisons)
        variance = values[..., 1].exp().mean()
        return nll + self.variance_penalty * variance if self.variance_penalty else nll, metrics

    def score(self, scores: Scores) -> Tensor:
        """The mean, (R,)."""
        return _wide(scores, 2, "MeanVariance")[..., 0]

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability that the first is preferred, (P,)."""
        return self.pair_log_probability(first.values, second.values).exp()

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-probability that the first is preferred, of (..., 2) -> (...,)."""
        spread = torch.sqrt(first[..., 1].exp() + second[..., 1].exp())
        return logsigmoid(STEEPNESS * (first[..., 0] - second[..., 0]) / spread)


@dataclass(frozen=True)
class CategoricalPreference:
    """Pairs under a histogram of each response's worth over atoms evenly from 0 to 1; the head gives logits, (R, A).

    Parameters
    ----------
    atoms : int
        A; 10 in the paper.
    entropy : float >= 0
        Weight with which the entropy of the mean histogram of a batch is raised; 0.1 in the paper.
    """

    atoms: int = 10
    entropy: float = 0.1
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        if self.atoms < 2 or not self.entropy >= 0:
            raise InvalidInputError(
                f"atoms must be at least 2 and entropy at least 0, got {self.atoms}, {self.entropy}"
            )

    @property
    def outputs(self) -> int:
        """Numbers a response that a head must give."""
        return self.atoms

    def head(self, width: int) -> LinearHead:
        """A linear head of the right size."""
        return LinearHead(width, outputs=self.atoms)

    def two_layer_head(self, width: int) -> TwoLayerHead:
        """A head of two layers of the right size."""
        return TwoLayerHead(width, outputs=self.atoms)

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """As of `MeanVariance`, plus ``entropy * sum p log p`` of the mean histogram."""
        values = _wide(scores, self.atoms, "CategoricalPreference")
        nll, metrics = _pair_loss(self, values, self.score(scores), comparisons)
        if not self.entropy or not len(values):
            return nll, metrics
        mean = values.softmax(dim=-1).mean(dim=0)
        return nll + self.entropy * torch.special.xlogy(mean, mean).sum(), metrics

    def score(self, scores: Scores) -> Tensor:
        """The expected atom, in [0, 1], (R,)."""
        values = _wide(scores, self.atoms, "CategoricalPreference")
        atoms = torch.linspace(0, 1, self.atoms, dtype=values.dtype, device=values.device)
        return values.softmax(dim=-1) @ atoms

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability that the first is preferred, (P,)."""
        return categorical_win_probability(first.values.softmax(dim=-1), second.values.softmax(dim=-1))

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-probability that the first is preferred, of logits (..., A) -> (...,)."""
        chance = categorical_win_probability(first.softmax(dim=-1), second.softmax(dim=-1))
        return torch.log(chance.clamp(min=torch.finfo(chance.dtype).tiny))


def _pair_loss(
    likelihood: Any, values: Tensor, score: Tensor, comparisons: Comparisons
) -> tuple[Tensor, dict[str, Tensor]]:
    pairs = comparisons.pairs
    first, second = values[pairs.first], values[pairs.second]
    target = torch.where(pairs.tie, 0.5, pairs.target)
    won, lost = likelihood.pair_log_probability(first, second), likelihood.pair_log_probability(second, first)
    nll = -((target * won + (1 - target) * lost) * pairs.weight).sum()
    accuracy = pairs.accuracy(score[pairs.first] - score[pairs.second])
    return nll, {"nll": nll.detach(), "accuracy": accuracy}


def _wide(scores: Scores, outputs: int, name: str) -> Tensor:
    if scores.values.ndim != 2 or scores.values.shape[-1] != outputs:
        raise InvalidInputError(
            f"{name} needs {outputs} numbers a response, the head returned shape {tuple(scores.values.shape)}; "
            f"use its .head or .two_layer_head, or a head with outputs={outputs}"
        )
    return scores.values
