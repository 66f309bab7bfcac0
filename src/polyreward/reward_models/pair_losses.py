"""Losses of a margin between two responses, their weights over tokens and users, and `PairLoss` as a likelihood.

    hinge           max(0, 1 - m)
    smoothed hinge  max(0, 1 - m)^2 / (2 gamma)  where m >= 1 - gamma, and  1 - gamma / 2 - m  below
    logistic        log(1 + exp(-m)); the cross-entropy of two classes with logits s_left, s_right is the same of their
                    difference

m is positive where the preferred response is ahead. Losses of "PAL: Pluralistic Alignment Framework for Learning from
Heterogeneous Preferences" (arXiv 2406.08469) and of its released code, whose own sign is the opposite one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import Scores
from polyreward.reward_models.likelihoods import Reduction

PairLossName = Literal["hinge", "smoothed_hinge", "logistic", "cross_entropy"]
TokenMode = Literal["mean", "last", "cumulative"]
LOSSES = get_args(PairLossName)
TOKEN_MODES = get_args(TokenMode)


def pair_loss(
    margin: Tensor, loss: PairLossName = "logistic", *, gamma: float = 5.0, reduction: Reduction = "mean"
) -> Tensor:
    """Loss of margins, see the module.

    Parameters
    ----------
    margin : float (...,)
        Score of the preferred response minus that of the other; with logits of two classes, their difference.
    loss : "hinge", "smoothed_hinge", "logistic" or "cross_entropy"
        The last two are the same function.
    gamma : float > 0
        Width of the quadratic part of the smoothed hinge, 5 in the paper's code.
    reduction : "mean", or "none" for (...,)
        The mean of no margins is 0.

    Raises
    ------
    UnknownNameError, InvalidInputError
        Another loss; `gamma` that is not a positive number.
    """
    check_loss(loss, gamma)
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "hinge": lambda m: (1 - m).clamp(min=0),
        "smoothed_hinge": lambda m: torch.where(
            m >= 1 - gamma, (1 - m).clamp(min=0).square() / (2 * gamma), 1 - gamma / 2 - m
        ),
    }
    each = made.get(loss, lambda m: softplus(-m))(margin)
    return each if reduction == "none" else each.sum() / max(each.numel(), 1)


def check_loss(loss: str, gamma: float = 5.0) -> None:
    """`UnknownNameError` or `InvalidInputError` for what `pair_loss` does not take."""
    if loss not in LOSSES:
        raise UnknownNameError(f"unknown loss {loss!r}{nearest(str(loss), LOSSES)}")
    if not 0 < gamma < math.inf:
        raise InvalidInputError(f"gamma must be a positive number, got {gamma}")


def token_weighted_loss(
    per_token: Tensor,
    start: Tensor,
    end: Tensor,
    mode: TokenMode = "cumulative",
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss of a pair from the losses at its tokens, counted from where the two responses part.

    Of n tokens with losses l_1 .. l_n: "mean" ``sum_i l_i / n``, "last" ``l_n``, and "cumulative", the paper's,
    ``sum_i i l_i / (n (n + 1) / 2)``.

    Parameters
    ----------
    per_token : float (B, T)
        Losses; what lies outside the span is not read, and may be NaN.
    start, end : int64 (B,)
        First token, and one past the last, with ``0 <= start <= end <= T``.
    mode : "mean", "last" or "cumulative"
    reduction : "mean" over the pairs that have a token, or "none" for (B,)
        A pair without one, which is two equal responses, is 0; so is the mean of none.

    Raises
    ------
    UnknownNameError, InvalidInputError
        Another mode; shapes that do not fit, a span outside the tokens, with its row.
    """
    if mode not in TOKEN_MODES:
        raise UnknownNameError(f"unknown mode {mode!r}{nearest(str(mode), TOKEN_MODES)}")
    if per_token.ndim != 2 or start.shape != per_token.shape[:1] or end.shape != start.shape:
        raise InvalidInputError(
            f"token_weighted_loss takes (B, T) losses and (B,) starts and ends, got {tuple(per_token.shape)}, "
            f"{tuple(start.shape)}, {tuple(end.shape)}"
        )
    wrong = (start < 0) | (end < start) | (end > per_token.shape[1])
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise InvalidInputError(
            f"row {row}: the span from {int(start[row])} to {int(end[row])} does not lie within "
            f"{per_token.shape[1]} tokens; the end is one past the last"
        )
    losses = per_token if per_token.dtype in (torch.float32, torch.float64) else per_token.float()
    place = torch.arange(losses.shape[1], device=losses.device) - start.unsqueeze(1)
    count = (end - start).unsqueeze(1)
    inside = (place >= 0) & (place < count)
    weight = {"mean": torch.ones_like(place), "last": (place == count - 1).long(), "cumulative": place + 1}[mode]
    weight = torch.where(inside, weight, 0).to(losses.dtype)
    total = (torch.where(inside, losses, 0.0) * weight).sum(dim=1)
    each = total / weight.sum(dim=1).clamp(min=1)
    return each if reduction == "none" else each.sum() / (count > 0).sum().clamp(min=1)


def user_balanced_weights(users: Sequence[Hashable] | np.ndarray | Tensor) -> np.ndarray:
    """``1 / n_u`` for each comparison, float32 (N,), n_u the number of comparisons of its user.

    As a column of `PreferenceData` it is what ``PairLoss(weights=...)`` reads; there it is normalised in each batch.
    """
    listed = users.tolist() if isinstance(users, Tensor | np.ndarray) else list(users)
    place: dict[Hashable, int] = {}
    codes = np.array([place.setdefault(user, len(place)) for user in listed], np.int64)
    return (1.0 / np.bincount(codes)[codes]).astype(np.float32) if len(codes) else np.zeros(0, np.float32)


@dataclass(frozen=True)
class PairLoss:
    """`pair_loss` of all pairs of a comparison, as a likelihood of `PreferenceModel`.

    A tie counts as half a win of each, targets mix the losses of the two orders, and the data's margin m lets the
    better one be ahead by 1 + m with the hinge.

    Parameters
    ----------
    loss : "hinge", "smoothed_hinge", "logistic" or "cross_entropy"
    gamma : float > 0
        Of the smoothed hinge.
    weights : str, optional
        A column of the data with the weight of each comparison, such as `user_balanced_weights`; it is normalised
        within the batch.
    use_margin : bool
        Ask for the margin of the data.
    """

    loss_name: PairLossName = "logistic"
    gamma: float = 5.0
    weights: str | None = None
    use_margin: bool = True
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        check_loss(self.loss_name, self.gamma)

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Weighted mean over comparisons of the mean over their pairs; 0 where no comparison has a weight.

        Raises
        ------
        MissingColumnError, InvalidInputError
            The data have no such column of weights; a weight is negative or not a number.
        """
        values, pairs = self.score(scores), comparisons.pairs
        difference = values[pairs.first] - values[pairs.second]
        margin = torch.where(pairs.tie, 0.0, pairs.margin) if self.use_margin else torch.zeros_like(difference)
        target = torch.where(pairs.tie, 0.5, pairs.target)
        won = pair_loss(difference - margin, self.loss_name, gamma=self.gamma, reduction="none")
        lost = pair_loss(margin - difference, self.loss_name, gamma=self.gamma, reduction="none")
        each = target * won + (1 - target) * lost
        weight = pairs.weight
        if self.weights is not None:
            weight = weight * self._weights(comparisons)[pairs.comparison]
            weight = weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        nll = (each * weight).sum()
        return nll, {"nll": nll.detach(), "accuracy": pairs.accuracy(difference)}

    def _weights(self, comparisons: Comparisons) -> Tensor:
        found = comparisons.columns.get(self.weights or "")
        if found is None:
            raise MissingColumnError(
                f"the data have no numeric column {self.weights!r} of weights"
                f"{nearest(str(self.weights), comparisons.columns)}"
            )
        bad = ~(torch.isfinite(found) & (found >= 0))
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise InvalidInputError(
                f"column {self.weights!r}, comparison {int(comparisons.index[row])}: weights are numbers from 0, got "
                f"{float(found[row])}"
            )
        return found

    def score(self, scores: Scores) -> Tensor:
        """The score itself."""
        if scores.values.ndim != 1:
            raise InvalidInputError(
                f"PairLoss needs one score a response, the head returned shape {tuple(scores.values.shape)}"
            )
        return scores.values

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d)``; of a hinge it orders pairs and is not calibrated."""
        return torch.sigmoid(self.score(first) - self.score(second))

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """``log sigma(d)`` of scores (...,)."""
        return logsigmoid(first - second)
