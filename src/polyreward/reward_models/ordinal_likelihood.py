"""Ordinal ratings in `PreferenceModel`: `OrdinalHead`, `OrdinalLikelihood`, and the distributions of a fitted model.

    model = PreferenceModel(encoder, OrdinalHead, OrdinalLikelihood()).fit(data)
    model.score(prompts, completions)                                  # expected ratings
    ordinal_distribution(model, prompts, completions).variance

Comparisons whose data hold the numeric columns ``chosen_level`` and ``rejected_level`` (0 is the worst level; -1, NaN
or None is unlabelled), or ratings with ``levels="ratings"``, anchor the scale; the others only order.
"Learning Ordinal Probabilistic Reward from Preferences" (arXiv 2602.12660).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.comparisons import Comparisons, ComparisonTable, Pairs
from polyreward.reward_models.heads import Items, LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.ordinal import OrdinalDistribution, log_ratings, region_log_probability
from polyreward.reward_models.quality_levels import (
    MODES,
    UNKNOWN_LEVEL,
    QualityPartition,
    RegionMode,
    is_contradiction,
    region_mask,
)

CHOSEN_LEVEL, REJECTED_LEVEL = "chosen_level", "rejected_level"


class ContradictingLevelsWarning(UserWarning):
    """Pairs are left out because the chosen response is labelled worse than the rejected one."""


class OrdinalHead(nn.Module):
    """Logits of the ratings 1 to M of each response; linear, or with hidden layers.

    A linear head with one component begins with equal ratings.

    Parameters
    ----------
    width : int
        d.
    ratings : int
        M, at least 2.
    hidden : int, optional
        Width of the hidden layers; None is a linear head.
    layers : int
        Linear layers in all, where `hidden` is given.
    activation, dropout : as of `TwoLayerHead`
    components : int
        K. With more than one, values are (R, K, M), and the log-weights (R, K) are learned, the same for all responses;
        for a likelihood of mixtures.
    """

    def __init__(
        self,
        width: int,
        ratings: int = 9,
        hidden: int | None = None,
        layers: int = 2,
        activation: str = "silu",
        dropout: float = 0.0,
        components: int = 1,
    ) -> None:
        super().__init__()
        if ratings < 2 or components < 1:
            raise InvalidInputError(
                f"OrdinalHead needs at least 2 ratings and 1 component, got {ratings} and {components}"
            )
        self.config: dict[str, Any] = {
            "width": width,
            "ratings": ratings,
            "hidden": hidden,
            "layers": layers,
            "activation": activation,
            "dropout": dropout,
            "components": components,
        }
        self.network: nn.Module
        if hidden is None:
            self.network = LinearHead(width, bias=True, outputs=ratings * components)
            if components == 1:
                nn.init.zeros_(self.network.linear.weight)
                nn.init.zeros_(self.network.linear.bias)
        else:
            self.network = TwoLayerHead(width, hidden, layers, activation, dropout, ratings * components)
        self.mixing = nn.Parameter(torch.zeros(components)) if components > 1 else None

    def forward(self, items: Items) -> Scores:
        """Values (R, M), or (R, K, M) with log-weights (R, K)."""
        values: Tensor = self.network(items)
        if self.mixing is None:
            return Scores(values)
        shape = (len(values), self.config["components"], self.config["ratings"])
        return Scores(values.reshape(shape), self.mixing.log_softmax(0).expand(shape[:2]))


@dataclass(frozen=True)
class OrdinalLikelihood:
    """Preferences as ratings of which one is higher, with labels of quality where there are some (arXiv 2602.12660).

    Ties say nothing here and are left out, as are pairs whose chosen response is labelled worse than the rejected one;
    the loss is the mean over the comparisons that remain, 0 where none do, and ``dropped`` counts the pairs left out. A
    `target` below 1 weighs both orders where the labels allow both; margins are not used.

    Parameters
    ----------
    ratings : int
        M, at least 2.
    partition : QualityPartition or its boundaries, default three levels as even as can be
        Kept as boundaries, so that it can be stored.
    mode : "triangle", "rectangle" or "weighted"
        Region of a labelled pair, as of `region_mask`.
    levels : "columns" or "ratings"
        Labels from the columns ``chosen_level`` and ``rejected_level`` of comparisons of two, or from the data's
        ratings in [1, M]; data without either are unlabelled.

    Raises
    ------
    InvalidInputError
        Fewer than two ratings; a partition of another number of ratings.
    UnknownNameError
        Another mode, another source of levels.
    """

    ratings: int = 9
    partition: Any = None
    mode: RegionMode = "triangle"
    levels: Literal["columns", "ratings"] = "columns"
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        if self.ratings < 2:
            raise InvalidInputError(f"OrdinalLikelihood needs at least 2 ratings, got {self.ratings}")
        for name, known in (("mode", MODES), ("levels", ("columns", "ratings"))):
            value = getattr(self, name)
            if value not in known:
                raise UnknownNameError(f"unknown {name} {value!r}{nearest(str(value), known)}")
        found = self.partition
        if found is None:
            found = QualityPartition.even(self.ratings, min(3, self.ratings))
        elif not isinstance(found, QualityPartition):
            found = QualityPartition(tuple(tuple(block) for block in found))
        if found.num_ratings != self.ratings:
            raise InvalidInputError(f"the partition {list(found.boundaries)} does not hold {self.ratings} ratings")
        object.__setattr__(self, "partition", found.boundaries)

    @property
    def quality(self) -> QualityPartition:
        """The levels."""
        return QualityPartition(self.partition)

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-probability that the first's rating is higher, of logits (..., M); what a mixture mixes."""
        return region_log_probability(first, second)

    def prepare(self, table: ComparisonTable, features: Any = None) -> None:
        """Check the labels of all data before a fit, and warn of pairs that they contradict, with their number."""
        warn_of_contradictions(table, self)

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over comparisons of the mean over their pairs."""
        values, pairs = self._logits(scores), comparisons.pairs
        if values.ndim != 2:
            raise InvalidInputError(
                f"the head returned components, shape {tuple(values.shape)}; a mixture likelihood around "
                "OrdinalLikelihood reads them"
            )
        chosen, rejected = self.pair_levels(comparisons, pairs)
        kept = ~pairs.tie & ~is_contradiction(chosen, rejected)
        rows = torch.nonzero(kept).squeeze(1)
        first, second = values[pairs.first], values[pairs.second]
        region = region_mask(chosen[rows], rejected[rows], self.quality, self.mode)
        each = -region_log_probability(first[rows], second[rows], region)
        target = pairs.target[rows]
        if bool((target < 1).any()):
            # a label that sets the two apart has settled their order
            settled = (chosen[rows] != rejected[rows]) & (chosen[rows] >= 0) & (rejected[rows] >= 0)
            flipped = -region_log_probability(second[rows], first[rows], region)
            each = torch.where(settled, each, target * each + (1 - target) * flipped)
        weight = pairs.weight[rows]
        loss = (each * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        metrics = {
            "nll": loss.detach(),
            "accuracy": _accuracy(first.detach(), second.detach(), pairs),
            "dropped": (~kept).sum(),
        }
        return loss, metrics

    def score(self, scores: Scores) -> Tensor:
        """The expected rating, (R,) in [1, M]; of each component (R, K) where there are some."""
        if not scores.values.numel():
            return scores.values.new_zeros(scores.values.shape[: max(scores.values.ndim - 1, 1)])
        return OrdinalDistribution(self._logits(scores)).mean

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability of a higher rating, plus half of that of the same one."""
        a, b = (OrdinalDistribution(self._logits(scores)) for scores in (first, second))
        return a.prob_greater(b) + 0.5 * a.prob_equal(b)

    def pair_levels(self, comparisons: Comparisons, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Levels of both responses of each pair, int64 (P,), -1 where there is none.

        Raises
        ------
        MissingColumnError
            One of the two columns without the other.
        InvalidInputError
            A label that is no level; a rating outside 1 to M; labelled columns in comparisons of more than two.
        """
        if self.levels == "ratings":
            level = self.quality.level_of(comparisons.ratings)
            return level[pairs.first], level[pairs.second]
        given = [name for name in (CHOSEN_LEVEL, REJECTED_LEVEL) if name in comparisons.columns]
        if not given:
            none = torch.full_like(pairs.first, UNKNOWN_LEVEL)
            return none, none
        if len(given) == 1:
            lacks = REJECTED_LEVEL if given == [CHOSEN_LEVEL] else CHOSEN_LEVEL
            raise MissingColumnError(f"the data have the column {given[0]!r} and no column {lacks!r} of numbers")
        found = [self._column(comparisons, name)[pairs.comparison] for name in given]
        return found[0], found[1]

    def _column(self, comparisons: Comparisons, name: str) -> Tensor:
        values = torch.nan_to_num(comparisons.columns[name], nan=float(UNKNOWN_LEVEL))
        count = self.quality.num_levels
        wrong = (values != values.floor()) | (values < UNKNOWN_LEVEL) | (values >= count)
        if values.ndim != 1 or bool(wrong.any()):
            place = int(wrong.reshape(-1).int().argmax()) if values.ndim == 1 else 0
            raise InvalidInputError(
                f"column {name!r} is {values[place].tolist()} in comparison {int(comparisons.index[place]) + 1}, "
                f"expected a level from 0 to {count - 1}, or -1 for none"
            )
        if comparisons.width > 2 and bool((values >= 0).any()):
            raise InvalidInputError(
                f"column {name!r} speaks of two responses, and comparison {int(comparisons.index[0]) + 1} or one beside"
                ' it has more; give the responses ratings and use levels="ratings"'
            )
        return values.long()

    def _logits(self, scores: Scores) -> Tensor:
        if scores.values.ndim < 2 or scores.values.shape[-1] != self.ratings:
            raise InvalidInputError(
                f"OrdinalLikelihood needs {self.ratings} logits a response, the head returned shape "
                f"{tuple(scores.values.shape)}; use OrdinalHead with ratings={self.ratings}"
            )
        return scores.values


def ordinal_distribution(
    model: Any, prompts: Column, completions: Column, annotator: Any = None
) -> OrdinalDistribution:
    """Distributions of the ratings of N completions: mean, variance, entropy, probabilities of levels.

    Parameters
    ----------
    model : PreferenceModel
        Fitted, with a head of logits (R, M), or of components (R, K, M) with log-weights, which are then mixed.
    prompts, completions, annotator : as of `PreferenceModel.score`

    Returns
    -------
    OrdinalDistribution with batch shape (N,)

    Raises
    ------
    InvalidInputError
        The head gives one score a response.
    """
    found = model.evaluate_head(prompts, completions, annotator)
    values = found.values
    if not len(values) and values.ndim == 1:
        return OrdinalDistribution(values.new_zeros(0, getattr(model.likelihood, "ratings", 9)))
    if values.ndim == 3 and found.log_weights is not None:
        values = torch.logsumexp(log_ratings(values) + found.log_weights.unsqueeze(-1), dim=1)
    if values.ndim != 2:
        raise InvalidInputError(
            f"the head gives scores of shape {tuple(values.shape)}, expected logits of ratings; fit with OrdinalHead"
        )
    return OrdinalDistribution(values)


def without_contradictions(data: PreferenceData, likelihood: OrdinalLikelihood | None = None) -> PreferenceData:
    """Without the comparisons of two whose chosen response is labelled worse, with a warning that counts them."""
    likelihood = OrdinalLikelihood() if likelihood is None else likelihood
    table = ComparisonTable(data)
    wrong = warn_of_contradictions(table, likelihood)
    return data.select(np.setdiff1d(np.arange(len(data)), wrong[data.sizes[wrong] == 2]))


def warn_of_contradictions(table: ComparisonTable, likelihood: OrdinalLikelihood) -> np.ndarray:
    """Comparisons with a pair whose chosen response is labelled worse, int64; `ContradictingLevelsWarning` counts."""
    batch = table.batch(np.arange(len(table)))
    pairs = batch.pairs
    wrong = is_contradiction(*likelihood.pair_levels(batch, pairs)) & ~pairs.tie
    places = np.asarray(pairs.comparison[wrong].unique().numpy())
    if len(places):
        warnings.warn(
            ContradictingLevelsWarning(
                f"{table.data.source}: {int(wrong.sum())} of {len(wrong)} pairs are left out, for the chosen response "
                f"is labelled worse than the rejected one (first: {table.data.where(int(places[0]))})"
            ),
            stacklevel=3,
        )
    return places


def _accuracy(first: Tensor, second: Tensor, pairs: Pairs) -> Tensor:
    """Share of the pairs that are no ties in which the better one is more often above; even pairs count half."""
    if not len(first):
        return first.new_zeros(())
    a, b = OrdinalDistribution(first), OrdinalDistribution(second)
    return pairs.accuracy(a.prob_greater(b) - b.prob_greater(a))
