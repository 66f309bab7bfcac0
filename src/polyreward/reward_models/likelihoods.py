"""Likelihoods: how probable the judgements are under the scores. Functions of tensors, and frozen parts around them.

    Bradley-Terry     P(a > b) = sigma(s_a - s_b - margin)
    with ties         P(a > b) = sigma(s_a - s_b - log theta), P(tie) the rest     (Rao and Kupper, 1967)
    Plackett-Luce     P(order) = prod_i exp(s_i) / sum_{j not better than i} exp(s_j)
    best of a list    P(best) = softmax(s)
    regression        rating = score + noise

A part has ``loss(scores, comparisons) -> (loss, metrics)``, ``score(scores) -> (R,)``, the number a response is worth,
and ``probability(first, second) -> (P,)``, that the first is preferred. `scores` is what the head returned
(`polyreward.reward_models.heads.Scores`). ``needs`` says whether it learns from "order" or from "ratings".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid, mse_loss

from polyreward.errors import InvalidInputError
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import Scores

Reduction = Literal["mean", "none"]


class Likelihood(Protocol):
    """What the fit needs of a likelihood."""

    needs: ClassVar[Literal["order", "ratings"]]

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Scalar loss of a batch, and figures about it."""
        ...

    def score(self, scores: Scores) -> Tensor:
        """What each response is worth, (R,)."""
        ...

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability that the first is preferred to the second, (P,)."""
        ...


def bradley_terry_loss(
    difference: Tensor,
    target: Tensor | float = 1.0,
    margin: Tensor | float = 0.0,
    *,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """``-t log sigma(d - m) - (1 - t) log sigma(m - d)``.

    Parameters
    ----------
    difference : float (...,)
        d: score of the chosen response minus that of the rejected one.
    target : in [0, 1], broadcasts
        Probability that the chosen one is the better one.
    margin : broadcasts
        m: by how much the chosen one should be ahead.
    smoothing : in [0, 0.5]
        alpha: t becomes ``(1 - alpha) t + alpha (1 - t)``.
    reduction : "mean", or "none" for (...,)

    Raises
    ------
    InvalidInputError
        Target or smoothing out of range.
    """
    if not 0 <= smoothing <= 0.5:
        raise InvalidInputError(f"smoothing must be in [0, 0.5], got {smoothing}")
    t = torch.as_tensor(target, dtype=difference.dtype, device=difference.device)
    if bool(((t < 0) | (t > 1) | torch.isnan(t)).any()):
        raise InvalidInputError("the target of bradley_terry_loss must be probabilities in [0, 1]")
    t = t + smoothing * (1 - 2 * t)
    shifted = difference - margin
    loss = -t * logsigmoid(shifted) - (1 - t) * logsigmoid(-shifted)
    return loss.mean() if reduction == "mean" else loss


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``mean (s_chosen + s_rejected)^2``: fixes what a prompt may add to all its scores (arXiv 2312.09244)."""
    return (chosen + rejected).square().mean()


@dataclass(frozen=True)
class CenteredBTLoss:
    """Bradley-Terry with the centring term of reward-model ensembles (arXiv 2312.09244).

    Parameters
    ----------
    eta : float >= 0
        Weight of the centring term.

    Calling it with chosen and rejected scores, each (B,), gives the loss and its parts ``nll`` and ``centering``.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise InvalidInputError(f"eta must be at least 0, got {self.eta}")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts."""
        if chosen.shape != rejected.shape:
            raise InvalidInputError(
                f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: expected the same"
            )
        parts = {"nll": bradley_terry_loss(chosen - rejected), "centering": centering_penalty(chosen, rejected)}
        return parts["nll"] + self.eta * parts["centering"], parts


def tied_bradley_terry_loss(difference: Tensor, tie: Tensor, theta: float, *, reduction: Reduction = "mean") -> Tensor:
    """Rao-Kupper: ``-log sigma(d - log theta)`` for a preference, and for a tie (up to its sign alike in d)
    ``-log sigma(d - log theta) - log sigma(-d - log theta) - log(theta^2 - 1)``.

    Parameters
    ----------
    difference : float (...,)
    tie : bool (...,)
    theta : float > 1
        The larger, the more ties.

    Raises
    ------
    InvalidInputError
        ``theta <= 1``: ties would be impossible.
    """
    if not theta > 1:
        raise InvalidInputError(f"theta must be above 1 for ties to be possible, got {theta}")
    cut = math.log(theta)
    won = -logsigmoid(difference - cut)
    # expm1 keeps log(theta^2 - 1) exact where theta is close to 1
    tied = won - logsigmoid(-difference - cut) - math.log(math.expm1(2 * cut))
    loss = torch.where(tie, tied, won)
    return loss.mean() if reduction == "mean" else loss


def plackett_luce_loss(
    scores: Tensor, ranks: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """Negative log-probability of an order of K responses, drawn best first.

    Parameters
    ----------
    scores : float (B, K)
    ranks : (B, K)
        Lower is better. NaN was not compared and takes no part. Of equal ranks neither is better: each competes with
        what is below and not with the other; so the ranks (1, 2, 2, ...) give the softmax of the best alone.
    mask : bool (B, K), optional
        False takes no part.

    Raises
    ------
    InvalidInputError
        Shapes that differ.
    """
    if scores.ndim != 2 or ranks.shape != scores.shape:
        raise InvalidInputError(f"scores have shape {tuple(scores.shape)}, ranks {tuple(ranks.shape)}: expected (B, K)")
    part = ~torch.isnan(ranks) if ranks.is_floating_point() else torch.ones_like(ranks, dtype=torch.bool)
    part = part if mask is None else part & mask
    low = torch.finfo(scores.dtype).min
    below = (ranks.unsqueeze(1) > ranks.unsqueeze(2)) & part.unsqueeze(1)  # (B, i, j): j is worse than i
    against = below | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    clean = torch.where(part, scores, 0.0)
    drawn = torch.logsumexp(torch.where(against, clean.unsqueeze(1), low), dim=2) - clean
    loss = torch.where(part, drawn, 0.0).sum(dim=1)
    return loss.mean() if reduction == "mean" else loss


def select_best_loss(scores: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of the best of K responses.

    Parameters
    ----------
    scores : float (B, K)
        ``-inf`` where there is no response.
    labels : int64 (B,)
        Index of the best.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(scores):
        raise InvalidInputError(
            f"scores have shape {tuple(scores.shape)}, labels {tuple(labels.shape)}: expected (B, K), (B,), not empty"
        )
    inside = (labels >= 0) & (labels < scores.shape[1])
    wrong = ~inside | torch.isneginf(scores.gather(1, torch.where(inside, labels, 0).unsqueeze(1)).squeeze(1))
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise InvalidInputError(f"label {int(labels[row])} of row {row} points at no response; its score is -inf")
    return torch.nn.functional.cross_entropy(scores, labels, reduction=reduction)


@dataclass(frozen=True)
class BradleyTerry:
    """Pairs, as `bradley_terry_loss`; a list gives all its pairs and counts as one comparison.

    Parameters
    ----------
    smoothing : in [0, 0.5]
    centering : float >= 0
        Weight of `centering_penalty`; TRL's ``center_rewards_coefficient``.
    theta : float > 1, optional
        Ties by Rao and Kupper's model. None counts a tie as half a win of each.
    use_margin : bool
        Ask for the margin of the data.
    """

    smoothing: float = 0.0
    centering: float = 0.0
    theta: float | None = None
    use_margin: bool = True
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 0.5 or not self.centering >= 0:
            raise InvalidInputError(
                f"smoothing must be in [0, 0.5] and centering at least 0, got {self.smoothing}, {self.centering}"
            )
        if self.theta is not None and not self.theta > 1:
            raise InvalidInputError(f"theta must be above 1 for ties to be possible, got {self.theta}")

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over comparisons of the mean over their pairs."""
        values, pairs = _single(scores, "BradleyTerry"), comparisons.pairs
        first, second = values[pairs.first], values[pairs.second]
        difference = first - second
        margin = torch.where(pairs.tie, 0.0, pairs.margin) if self.use_margin else 0.0
        each = bradley_terry_loss(
            difference,
            torch.where(pairs.tie, 0.5, pairs.target),
            margin,
            smoothing=self.smoothing,
            reduction="none",
        )
        if self.theta is not None:
            cut = difference - margin
            won = bradley_terry_loss(
                cut - math.log(self.theta), pairs.target, smoothing=self.smoothing, reduction="none"
            )
            each = torch.where(
                pairs.tie, tied_bradley_terry_loss(difference, pairs.tie, self.theta, reduction="none"), won
            )
        nll = (each * pairs.weight).sum()
        centre = ((first + second).square() * pairs.weight).sum()
        metrics = {"nll": nll.detach(), "accuracy": pairs.accuracy(difference), "centering": centre.detach()}
        return nll + self.centering * centre if self.centering else nll, metrics

    def score(self, scores: Scores) -> Tensor:
        """The score itself."""
        return _single(scores, "BradleyTerry")

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d)``; with ties, the probability of a win plus half of that of a tie."""
        difference = self.score(first) - self.score(second)
        if self.theta is None:
            return torch.sigmoid(difference)
        cut = math.log(self.theta)
        return 0.5 * (torch.sigmoid(difference - cut) + 1 - torch.sigmoid(-difference - cut))

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-probability that the first is preferred, of scores (...,); what a mixture mixes."""
        return logsigmoid(first - second - (0.0 if self.theta is None else math.log(self.theta)))

    def tie_probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability of a tie, (P,); 0 without `theta`."""
        difference = self.score(first) - self.score(second)
        if self.theta is None:
            return torch.zeros_like(difference)
        cut = math.log(self.theta)
        return 1 - torch.sigmoid(difference - cut) - torch.sigmoid(-difference - cut)


@dataclass(frozen=True)
class PlackettLuce:
    """Whole orders of lists, as `plackett_luce_loss`; for a choice it is the softmax of the best.

    Parameters
    ----------
    top_only : bool
        Use only which is best, of rankings too.
    """

    top_only: bool = False
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over the comparisons with an order."""
        values, pairs = _single(scores, "PlackettLuce"), comparisons.pairs
        ranks = comparisons.grid(comparisons.ranks, torch.nan)
        if self.top_only:
            best = torch.nan_to_num(ranks, nan=torch.inf).amin(dim=1, keepdim=True)
            ranks = torch.where(torch.isnan(ranks), ranks, (ranks > best).to(ranks.dtype))
        each = plackett_luce_loss(comparisons.grid(values), ranks, reduction="none")
        known = torch.nan_to_num(ranks, nan=torch.inf).amin(1) < torch.nan_to_num(ranks, nan=-torch.inf).amax(1)
        loss = torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)
        return loss, {
            "nll": loss.detach(),
            "accuracy": pairs.accuracy(values[pairs.first] - values[pairs.second]),
        }

    def score(self, scores: Scores) -> Tensor:
        """The score itself."""
        return _single(scores, "PlackettLuce")

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d)``."""
        return torch.sigmoid(self.score(first) - self.score(second))


@dataclass(frozen=True)
class Regression:
    """Ratings as numbers.

    Parameters
    ----------
    kind : "squared" or "huber"
    delta : float
        Where Huber's loss turns linear.
    temperature : float
        Scale of a difference of ratings in `probability`.
    """

    kind: Literal["squared", "huber"] = "squared"
    delta: float = 1.0
    temperature: float = 1.0
    needs: ClassVar[Literal["order", "ratings"]] = "ratings"

    def __post_init__(self) -> None:
        if self.kind not in ("squared", "huber") or not self.delta > 0 or not self.temperature > 0:
            raise InvalidInputError(
                f"Regression needs kind 'squared' or 'huber', delta and temperature above 0, got {self}"
            )

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over the rated responses."""
        values, known = _single(scores, "Regression"), ~torch.isnan(comparisons.ratings)
        ratings = torch.where(known, comparisons.ratings, 0.0)
        if self.kind == "huber":
            each = huber_loss(values, ratings, reduction="none", delta=self.delta)
        else:
            each = mse_loss(values, ratings, reduction="none")
        loss = torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)
        pairs = comparisons.pairs
        accuracy = pairs.accuracy(values[pairs.first] - values[pairs.second])
        return loss, {"nll": loss.detach(), "accuracy": accuracy}

    def score(self, scores: Scores) -> Tensor:
        """The predicted rating."""
        return _single(scores, "Regression")

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d / temperature)``."""
        return torch.sigmoid((self.score(first) - self.score(second)) / self.temperature)


def _single(scores: Scores, name: str) -> Tensor:
    if scores.values.ndim != 1:
        raise InvalidInputError(
            f"{name} needs one score a response, the head returned shape {tuple(scores.values.shape)}; "
            "a head with several components has a likelihood of its own"
        )
    return scores.values
