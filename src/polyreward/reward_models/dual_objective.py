"""The loss of a model that thinks and then scores: policy gradient on the thinking, Bradley-Terry on the scoring.

    L = L_GRPO(thoughts) + beta KL(pi || pi_ref) + w L_BT(scores)

The thoughts earn a rule reward and learn by a clipped policy gradient; the score after the thoughts learns by the exact
gradient of Bradley-Terry, which flows into head and backbone. The score is no part of the thoughts' reward. Without
L_BT (w = 0) the policy gradient moves the backbone under the head, and the scores drift.

Advantages are ``(R - mean) / (deviation + 1e-6)`` over the rollouts of one sample, with the sample's deviation (n - 1).
The policy loss is the token mean of the clipped surrogate with ratio bounds 0.2 below and 0.3 above, and at most
``3 |A|`` where A is negative; KL is the estimate ``exp(-d) + d - 1``.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import Scores
from polyreward.reward_models.likelihoods import BradleyTerry, bradley_terry_loss, tied_bradley_terry_loss

Ties = Literal["counted", "dropped"]
TIES = get_args(Ties)
TIE, UNLABELLED = -1, -2
LOG_RATIO_LIMIT = 20.0
EPSILON = 1e-6


def dual_objective_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    scores_pair: Tensor,
    labels: Tensor,
    bt_weight: float = 5e-3,
    kl_coef: float = 1e-5,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
    ties: Ties = "dropped",
    margin: float = 0.0,
    theta: float | None = None,
) -> dict[str, Tensor]:
    """Loss of a batch and its terms (arXiv 2605.05922).

    Parameters
    ----------
    logp, old_logp : float (N, T)
        Log-probabilities of the tokens of N thoughts, now and when they were written, without the query token.
    advantages : float (N,) or (N, T), finite
        Of `group_advantages`; no gradient.
    mask : bool or 0/1 (N, T)
        Tokens that count; what stands elsewhere does not matter.
    ref_logp : float (N, T), or None with ``kl_coef=0``
    scores_pair : float (B, 2)
        Scores of the pairs of rollouts.
    labels : int (B,)
        0 or 1 is the preferred one, -1 a tie, -2 not judged.
    bt_weight, kl_coef : float >= 0
        w and beta; 5e-3 and 1e-5 in the paper. The weights belong to their learning rate and model: sweep `bt_weight`.
    clip_low, clip_high : float >= 0
    dual_clip : float > 1, or None
    ties, margin, theta : as in `preference_loss`; the second stage divides by the pairs that are no ties

    Returns
    -------
    dict of scalars: ``loss`` with gradient and its unweighted terms ``policy``, ``kl``, ``bt``; without gradient
    ``accuracy`` (of the pairs that are no ties), ``clip_fraction``

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, values that are not finite, labels out of range, a KL term without `ref_logp`.
    """
    given = {"bt_weight": bt_weight, "kl_coef": kl_coef, "clip_low": clip_low, "clip_high": clip_high}
    for name, number in given.items():
        if not 0 <= number < float("inf"):
            raise InvalidInputError(f"dual_objective_loss: {name} must be a finite number from 0, got {number}")
    if dual_clip is not None and not dual_clip > 1:
        raise InvalidInputError(f"dual_objective_loss: dual_clip must be above 1, got {dual_clip}")
    keep = _checked(mask, logp, "mask").to(torch.bool)
    now = _tokens(logp, keep, "logp")
    old = _tokens(_checked(old_logp, logp, "old_logp"), keep, "old_logp").detach()
    weight = _advantages(advantages, now, keep)
    ratio = (now - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain, clipped = -ratio * weight, -ratio.clamp(1 - clip_low, 1 + clip_high) * weight
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(weight < 0, torch.minimum(losses, -dual_clip * weight), losses)
    policy = _token_mean(losses, keep)
    kl = policy.new_zeros(())
    if ref_logp is not None:
        reference = _tokens(_checked(ref_logp, logp, "ref_logp"), keep, "ref_logp").detach()
        gap = (now - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = _token_mean((-gap).exp() + gap - 1, keep)
    elif kl_coef:
        raise InvalidInputError("dual_objective_loss: kl_coef is above 0 and ref_logp is None; pass it, or kl_coef=0")
    bt = preference_loss(scores_pair, labels, ties=ties, margin=margin, theta=theta)
    with torch.no_grad():
        judged = labels >= 0
        ahead = scores_pair[:, 0] - scores_pair[:, 1]
        right = torch.where(labels == 0, ahead > 0, ahead < 0).to(bt.dtype) + 0.5 * (ahead == 0)
        accuracy = (right * judged).sum() / judged.sum().clamp(min=1)
        fraction = _token_mean((clipped > plain).to(policy.dtype), keep)
    return {
        "loss": policy + kl_coef * kl + bt_weight * bt,
        "policy": policy,
        "kl": kl,
        "bt": bt,
        "accuracy": accuracy,
        "clip_fraction": fraction,
    }


def preference_loss(
    scores_pair: Tensor,
    labels: Tensor,
    *,
    ties: Ties = "dropped",
    margin: float = 0.0,
    theta: float | None = None,
) -> Tensor:
    """Bradley-Terry loss of pairs, mean over those that are no ties, or over all with their ties at 0.

    Parameters
    ----------
    scores_pair : float (B, 2), finite
    labels : int (B,)
        0 or 1 is the preferred one, -1 a tie, -2 not judged.
    ties : "dropped", or "counted"
        Whether pairs without a preference are in the divisor. 0 where no pair has a preference.
    margin : float
        Constant by which the preferred one should be ahead.
    theta : float > 1, optional
        Ties are judgements too (`tied_bradley_terry_loss`; 5 in the released code), and count in the mean.
    """
    if ties not in TIES:
        raise UnknownNameError(f"unknown ties {ties!r}{nearest(str(ties), TIES)}")
    if scores_pair.ndim != 2 or scores_pair.shape[1] != 2 or labels.shape != scores_pair.shape[:1]:
        raise InvalidInputError(
            f"expected scores_pair (B, 2) and labels (B,), got {tuple(scores_pair.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or bool(((labels < UNLABELLED) | (labels > 1)).any()):
        raise InvalidInputError("labels must be whole numbers: 0 or 1 the preferred one, -1 a tie, -2 not judged")
    if not bool(torch.isfinite(scores_pair).all()):
        row = int((~torch.isfinite(scores_pair)).any(dim=1).int().argmax())
        raise InvalidInputError(f"scores_pair, row {row}: the scores are {scores_pair[row].tolist()}, expected numbers")
    scores = scores_pair if scores_pair.dtype in (torch.float32, torch.float64) else scores_pair.float()
    difference = scores[:, 0] - scores[:, 1]
    difference = torch.where(labels == 1, -difference, difference)
    if theta is None:
        known = labels >= 0
        each = bradley_terry_loss(difference, margin=margin, reduction="none")
    else:
        known = labels > UNLABELLED
        shift = torch.where(labels >= 0, margin, 0.0)
        each = tied_bradley_terry_loss(difference - shift, labels == TIE, theta, reduction="none")
    divisor = known.sum().clamp(min=1) if ties == "dropped" else max(len(labels), 1)
    return torch.where(known, each, 0.0).sum() / divisor


def group_advantages(rewards: Tensor, epsilon: float = EPSILON, ddof: int = 1) -> Tensor:
    """``(R - mean) / (deviation + epsilon)`` over the last axis, no gradient.

    Parameters
    ----------
    rewards : float (..., G)
        Rewards of the G rollouts of a sample. NaN: does not apply; it takes part in no figure and gets 0.
    epsilon : float >= 0
    ddof : 1 for the deviation of the sample (n - 1), 0 for that of the population

    Returns
    -------
    the same shape in float32 or wider; exactly 0 where all rewards of a group are equal, or only one applies

    Raises
    ------
    InvalidInputError
        G < 2, an infinite reward.
    """
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise InvalidInputError(
            f"group_advantages compares the rollouts of a sample and needs at least 2, got shape {tuple(rewards.shape)}"
        )
    if bool(torch.isinf(rewards).any()):
        raise InvalidInputError("group_advantages: a reward is infinite, expected numbers or NaN")
    values = rewards.detach()
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    known = ~torch.isnan(values)
    filled, count = torch.where(known, values, 0.0), known.sum(dim=-1, keepdim=True)
    low = torch.where(known, values, torch.inf).amin(dim=-1, keepdim=True)
    varies = known & (low < torch.where(known, values, -torch.inf).amax(dim=-1, keepdim=True))
    centred = torch.where(varies, filled - filled.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)
    deviation = (centred.square().sum(dim=-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    return centred / torch.where(deviation > 0, deviation + epsilon, 1.0)


@dataclass(frozen=True)
class DecidedPairs:
    """Bradley-Terry on pairs with a preference; ties teach nothing (arXiv 2605.05922).

    Parameters
    ----------
    ties : "counted" as in the first stage, or "dropped"
        Whether ties are in the divisor of the mean.
    margin : float
        Constant by which the preferred one should be ahead.
    """

    ties: Ties = "counted"
    margin: float = 0.0
    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __post_init__(self) -> None:
        if self.ties not in TIES:
            raise UnknownNameError(f"unknown ties {self.ties!r}{nearest(str(self.ties), TIES)}")

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over comparisons of the mean over their pairs, ties at 0 or left out."""
        values, pairs = self.score(scores), comparisons.pairs
        plain, metrics = BradleyTerry().loss(scores, comparisons)
        each = bradley_terry_loss(values[pairs.first] - values[pairs.second], margin=self.margin, reduction="none")
        weight = torch.where(pairs.tie, 0.0, pairs.weight)
        nll = (each * weight).sum()
        if self.ties == "dropped":
            nll = nll / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        return nll, {**metrics, "nll": nll.detach(), "bradley_terry": plain.detach()}

    def score(self, scores: Scores) -> Tensor:
        """The score itself."""
        return BradleyTerry().score(scores)

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d)``."""
        return BradleyTerry().probability(first, second)

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-probability that the first is preferred, of scores (...,)."""
        return BradleyTerry().pair_log_probability(first, second)


def _checked(values: Tensor, like: Tensor, name: str) -> Tensor:
    if like.ndim != 2 or values.shape != like.shape:
        raise InvalidInputError(
            f"dual_objective_loss: {name} has shape {tuple(values.shape)}, logp {tuple(like.shape)}; expected (N, T)"
        )
    return values


def _tokens(values: Tensor, keep: Tensor, name: str) -> Tensor:
    bad = keep & ~torch.isfinite(values)
    if bool(bad.any()):
        row, token = bad.nonzero()[0].tolist()
        raise InvalidInputError(
            f"dual_objective_loss: {name} is {float(values[row, token])} in row {row}, token {token}; expected a "
            "log-probability"
        )
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    return torch.where(keep, wide, 0.0)


def _advantages(advantages: Tensor, like: Tensor, keep: Tensor) -> Tensor:
    found = advantages.detach().to(like.dtype)
    if found.shape == like.shape[:1]:
        found = found.unsqueeze(1).expand_as(like)
    if found.shape != like.shape:
        raise InvalidInputError(
            f"dual_objective_loss: advantages has shape {tuple(advantages.shape)}, expected {tuple(like.shape[:1])} or "
            f"{tuple(like.shape)}"
        )
    found = torch.where(keep, found, 0.0)
    if not bool(torch.isfinite(found).all()):
        row = int((~torch.isfinite(found)).any(dim=1).int().argmax())
        raise InvalidInputError(f"dual_objective_loss: the advantage of row {row} is not finite")
    return found


def _token_mean(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, 0.0).sum() / keep.sum().clamp(min=1)
