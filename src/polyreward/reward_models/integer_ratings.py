"""Ratings, votes and passed tests as whole numbers: a distribution over the integers for each response.

A head gives the parameters of a family of `polyreward.statistics` (arXiv 2602.10751), the loss is the negative
log-probability of the rating, and the score is the mean of the distribution.

    ratings = IntegerRatings.of(data, "dalap", components=4)
    PreferenceModel(encoder, ratings.head, ratings).fit(data)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import Comparisons, ComparisonTable
from polyreward.reward_models.heads import LinearHead, Scores, TwoLayerHead
from polyreward.statistics import IntegerDistribution, IntegerHead, IntegerMixture, TargetStats

WIDEST_GRID = 4096
"""Whole numbers over which the probability of a preference is summed; beyond, the two are taken as normal."""


@dataclass(frozen=True)
class IntegerRatings:
    """Whole-number ratings under a family of distributions over the integers (arXiv 2602.10751).

    Parameters
    ----------
    family : str
        A key of `polyreward.statistics.FAMILIES`: "dalap", "bitwise", "categorical", ...
    components : int
        Of the mixture; 1 is the family itself.
    mean, std : float
        Of the ratings, where a fresh head begins.
    low, high : int
        The range that it must be able to predict.

    Raises
    ------
    InvalidInputError, UnknownNameError
        Statistics out of range; an unknown family.
    """

    family: str
    components: int = 1
    mean: float = 0.0
    std: float = 1.0
    low: int = 0
    high: int = 1
    needs: ClassVar[Literal["order", "ratings"]] = "ratings"

    def __post_init__(self) -> None:
        assert self._integers.outputs

    @classmethod
    def of(cls, data: PreferenceData, family: str, components: int = 1) -> IntegerRatings:
        """For the ratings of a data set.

        Raises
        ------
        InvalidInputError
            No ratings, or one that is not a whole number.
        """
        ratings = ComparisonTable(data).ratings
        known = ratings[~np.isnan(ratings)]
        if not len(known):
            raise InvalidInputError(f"{data.source} has no ratings")
        stats = TargetStats.of(torch.from_numpy(known))
        return cls(family, components, stats.mean, stats.std, stats.low, stats.high)

    @cached_property
    def _integers(self) -> IntegerHead:
        # its own layer stays unmade: the head of the model gives the numbers
        return IntegerHead(self.family, self.components, TargetStats(self.mean, self.std, self.low, self.high))

    @property
    def outputs(self) -> int:
        """Numbers a response that a head must give."""
        return int(self._integers.linear.out_features)

    def head(self, width: int) -> LinearHead:
        """A linear head of the right size."""
        return LinearHead(width, bias=True, outputs=self.outputs)

    def two_layer_head(self, width: int) -> TwoLayerHead:
        """A head of two layers of the right size."""
        return TwoLayerHead(width, outputs=self.outputs)

    def distribution(self, scores: Scores) -> IntegerDistribution | IntegerMixture:
        """Distribution of each response's rating, batch shape (R,); see `PreferenceModel.evaluate_head`."""
        values = scores.values
        return self._integers.distribution(values.unsqueeze(-1) if values.ndim == 1 else values)

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over the rated responses of the negative log-probability, in nats."""
        known = ~torch.isnan(comparisons.ratings)
        distribution = self.distribution(Scores(scores.values[known]))
        loss = -distribution.log_prob(comparisons.ratings[known]).mean()
        expected, pairs = self.score(Scores(scores.values.detach())), comparisons.pairs
        accuracy = pairs.accuracy(expected[pairs.first] - expected[pairs.second])
        return loss, {"nll": loss.detach(), "accuracy": accuracy}

    def score(self, scores: Scores) -> Tensor:
        """The expected rating, (R,)."""
        return self.distribution(scores).mean.float()

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability of a higher rating, plus half of that of an equal one; the two drawn apart."""
        if self.high - self.low >= WIDEST_GRID:
            a, b = self.distribution(first), self.distribution(second)
            spread = (a.variance + b.variance).clamp(min=1e-12).sqrt()
            return torch.special.ndtr((a.mean - b.mean) / spread).float()
        masses = [self._masses(scores) for scores in (first, second)]
        below = masses[1].cumsum(-1) - 0.5 * masses[1]
        return (masses[0] * below).sum(-1).float()

    def _masses(self, scores: Scores) -> Tensor:
        """Probabilities of `low` to `high`, (R, values), what lies outside counted at the ends."""
        distribution: Any = self.distribution(scores)
        grid = torch.arange(self.low, self.high + 1, device=scores.values.device).unsqueeze(-1)
        below = distribution.cdf(grid[:-1])
        edge = torch.zeros_like(below[:1]) if len(below) else scores.values.new_zeros(1, len(scores.values))
        return torch.cat([edge, below, torch.ones_like(edge)]).diff(dim=0).T
