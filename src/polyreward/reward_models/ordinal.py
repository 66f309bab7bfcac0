r"""Ordinal probabilistic rewards: the quality of a response as a distribution over ratings, learned from preferences.

A response has probabilities p(k) of the ratings k = 1 to K, the softmax of K logits. A preference says that the chosen
response's rating is above the rejected one's, the two drawn apart:

    P(c > r) = sum_{k > j} p_c(k) p_r(j) = sum_k p_c(k) F_r(k - 1),      loss = -mean log P

F is the cumulative distribution; the mass of equal ratings counts as not preferred. With labels of quality, the sum
runs over a region of (k, j) in place of k > j (`polyreward.reward_models.quality_levels`). The reward is the mean
rating, its uncertainty the variance. Preferences alone do not fix the scale: mass drifts to the ends, and only labels
of quality anchor it. "Learning Ordinal Probabilistic Reward from Preferences" (arXiv 2602.12660).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.quality_levels import QualityPartition

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class OrdinalDistribution:
    """Distributions over the ratings 1 to K (arXiv 2602.12660).

    Results have the dtype and device of the logits and are computed in float32 or wider.

    Parameters
    ----------
    logits : float (..., K)
        ``-inf`` is a rating that cannot be; adding a constant to all K changes nothing.

    Raises
    ------
    InvalidInputError
        Fewer than two ratings; logits that are NaN, ``+inf``, or all ``-inf``.
    """

    logits: Tensor

    def __post_init__(self) -> None:
        _check(self.logits, "logits")

    @classmethod
    def of_probs(cls, probs: Tensor) -> OrdinalDistribution:
        """From probabilities (..., K) that sum to 1 within 1e-4."""
        total = probs.detach().sum(dim=-1)
        if bool((probs < 0).any()) or not bool(((total - 1).abs() <= 1e-4).all()):
            raise InvalidInputError("probabilities of ratings must be at least 0 and sum to 1")
        return cls(probs.log())

    @property
    def num_ratings(self) -> int:
        """K."""
        return int(self.logits.shape[-1])

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities, (..., K)."""
        return self._out(log_ratings(self.logits))

    @property
    def probs(self) -> Tensor:
        """Probabilities, (..., K)."""
        return self._out(self._probs)

    @property
    def mean(self) -> Tensor:
        """The reward: the expected rating, (...) in [1, K]. A distribution of two peaks has no mass there."""
        return self._out(self._mean)

    @property
    def variance(self) -> Tensor:
        """Its uncertainty, (...) in [0, (K - 1)^2 / 4]; largest for half the mass at either end."""
        p, k = self._probs, self._ratings
        return self._out((p * (k - self._mean.unsqueeze(-1)).square()).sum(dim=-1))

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, (...) in [0, log K]."""
        log_p = log_ratings(self.logits)
        return self._out(-(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(dim=-1))

    def level_probs(self, partition: QualityPartition | None = None) -> Tensor:
        """Probability of each level, (..., L), worst first."""
        partition = QualityPartition() if partition is None else partition
        if partition.num_ratings != self.num_ratings:
            raise InvalidInputError(
                f"the partition holds {partition.num_ratings} ratings, the distribution {self.num_ratings}"
            )
        p = self._probs
        member = torch.from_numpy(partition.membership).to(p.device, p.dtype)
        return self._out(p @ member.T)

    def prob_greater(self, other: OrdinalDistribution) -> Tensor:
        """Probability of a higher rating than `other`'s, (...), the two drawn apart; equal ratings do not count."""
        self._match(other)
        below = other._probs.cumsum(dim=-1)[..., :-1]
        return self._out((self._probs[..., 1:] * below).sum(dim=-1))

    def prob_equal(self, other: OrdinalDistribution) -> Tensor:
        """Probability of the same rating, (...)."""
        self._match(other)
        return self._out((self._probs * other._probs).sum(dim=-1))

    @property
    def _probs(self) -> Tensor:
        return log_ratings(self.logits).exp()

    @property
    def _ratings(self) -> Tensor:
        return torch.arange(1, self.num_ratings + 1, device=self.logits.device, dtype=_wide(self.logits).dtype)

    @property
    def _mean(self) -> Tensor:
        return (self._probs * self._ratings).sum(dim=-1)

    def _out(self, values: Tensor) -> Tensor:
        return values.to(self.logits.dtype)

    def _match(self, other: OrdinalDistribution) -> None:
        if self.num_ratings != other.num_ratings:
            raise InvalidInputError(f"distributions over {self.num_ratings} and {other.num_ratings} ratings")


@dataclass(frozen=True)
class OrdinalRewardHead:
    """Logits as distributions over ratings (arXiv 2602.12660); it has no weights.

    Parameters
    ----------
    num_ratings : int
        K, at least 2.
    """

    num_ratings: int = 9

    def __post_init__(self) -> None:
        if self.num_ratings < 2:
            raise InvalidInputError(f"an ordinal reward needs at least 2 ratings, got {self.num_ratings}")

    def __call__(self, logits: Tensor) -> OrdinalDistribution:
        """Distributions of logits (..., K); `InvalidInputError` for another number of them."""
        if logits.shape[-1:] != (self.num_ratings,):
            raise InvalidInputError(f"logits have shape {tuple(logits.shape)}, expected (..., {self.num_ratings})")
        return OrdinalDistribution(logits)


def digit_logits(vocab_logits: Tensor, token_ids: Any) -> Tensor:
    """Logits of the tokens of the ratings, out of those of the vocabulary.

    Parameters
    ----------
    vocab_logits : float (..., V)
        At the position where the rating would stand.
    token_ids : int (K,)
        One token a rating, worst first, all different.

    Returns
    -------
    float (..., K)

    Raises
    ------
    InvalidInputError
        Fewer than two tokens, one that comes twice, or one outside the vocabulary.
    """
    ids = torch.as_tensor(token_ids, device=vocab_logits.device)
    if ids.ndim != 1 or len(ids) < 2 or ids.is_floating_point() or len(ids.unique()) != len(ids):
        raise InvalidInputError(
            f"token_ids must be two or more different tokens in one dimension, got {ids.tolist()!r}"
        )
    size = vocab_logits.shape[-1] if vocab_logits.ndim else 0
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise InvalidInputError(f"token_ids {ids.tolist()} are not all in a vocabulary of {size} tokens")
    return vocab_logits.index_select(-1, ids.long())


def region_log_probability(logits_c: Tensor, logits_r: Tensor, region: Tensor | None = None) -> Tensor:
    """``log sum_{(k, j) in region} p_c(k) p_r(j)``, in log space throughout.

    Parameters
    ----------
    logits_c, logits_r : float (..., K)
    region : bool (..., K, K) or weights at least 0, optional
        Rows are the first response's ratings. Default ``k > j``.

    Returns
    -------
    (...). A region that has no probability at all gives -87.3 (-708.4 in float64) and no gradient.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, fewer than two ratings, logits that are NaN, an empty region, negative weights.
    """
    count = logits_c.shape[-1] if logits_c.ndim else 0
    if logits_r.shape[-1:] != (count,):
        raise InvalidInputError(
            f"chosen logits have shape {tuple(logits_c.shape)}, rejected {tuple(logits_r.shape)}: expected the same"
        )
    _check(logits_c, "chosen logits")
    _check(logits_r, "rejected logits")
    if region is None:
        region = torch.ones(count, count, dtype=torch.bool, device=logits_c.device).tril(-1)
    _check_region(region, np.broadcast_shapes(logits_c.shape, logits_r.shape))
    first, second = log_ratings(logits_c), log_ratings(logits_r)
    cells = first.unsqueeze(-1) + second.unsqueeze(-2)
    if region.dtype != torch.bool:
        cells = cells + torch.where(region > 0, region.to(cells.dtype), 1.0).log()
    cells = torch.where(region > 0, cells, -torch.inf).flatten(-2)
    possible = cells.amax(dim=-1) > -torch.inf
    # the sum over nothing has no gradient but NaN, so it never enters the logarithm
    found = torch.logsumexp(torch.where(possible.unsqueeze(-1), cells, 0.0), dim=-1)
    floor = math.log(torch.finfo(found.dtype).tiny)
    return torch.where(possible, found, floor).to(torch.promote_types(logits_c.dtype, logits_r.dtype))


def ordinal_preference_loss(
    logits_c: Tensor,
    logits_r: Tensor,
    region: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """``-log P``, P the probability that the chosen response's rating is above the rejected one's, or of a region.

    Parameters
    ----------
    logits_c, logits_r : float (B, K)
    region : bool (B, K, K) or weights, optional
        Of `polyreward.reward_models.quality_levels.region_mask`. Default the strict triangle for all.
    reduction : "mean", "sum", or "none" for (B,)
        The mean of no pairs is 0.

    Raises
    ------
    InvalidInputError
        As of `region_log_probability`.
    UnknownNameError
        Another reduction.
    """
    if reduction not in REDUCTIONS:
        raise UnknownNameError(f"unknown reduction {reduction!r}{nearest(str(reduction), REDUCTIONS)}")
    if logits_c.shape != logits_r.shape:
        raise InvalidInputError(
            f"chosen logits have shape {tuple(logits_c.shape)}, rejected {tuple(logits_r.shape)}: expected the same"
        )
    loss = -region_log_probability(logits_c, logits_r, region)
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


def log_ratings(logits: Tensor) -> Tensor:
    """Log-probabilities of the ratings, (..., K), in float32 or wider."""
    return torch.log_softmax(_wide(logits), dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _check(logits: Tensor, name: str) -> None:
    if not logits.is_floating_point() or not logits.ndim or logits.shape[-1] < 2:
        raise InvalidInputError(
            f"{name} must be floating-point with at least 2 ratings in the last dimension, got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    if not logits.numel():
        return
    # the largest is NaN, infinite or -inf exactly where there is no distribution
    wrong = ~torch.isfinite(logits.detach().amax(dim=-1)).reshape(-1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        values = [round(value, 4) for value in logits.detach().reshape(-1, logits.shape[-1])[row].tolist()]
        raise InvalidInputError(f"{name} of row {row} are NaN, infinite or all -inf: {values}")


def _check_region(region: Tensor, logits: tuple[int, ...]) -> None:
    expected = (*logits[:-1], logits[-1], logits[-1])
    try:
        fits = np.broadcast_shapes(region.shape, expected) == expected
    except ValueError:
        fits = False
    if not fits or region.ndim < 2 or region.shape[-2:] != expected[-2:]:
        raise InvalidInputError(f"region has shape {tuple(region.shape)}, expected {expected}")
    if region.dtype != torch.bool and not bool(((region >= 0) & torch.isfinite(region)).all()):
        raise InvalidInputError("weights of a region must be finite numbers from 0")
    empty = ~(region > 0).any(dim=-1).any(dim=-1).reshape(-1)
    if bool(empty.any()):
        raise InvalidInputError(f"the region of pair {int(empty.int().argmax())} is empty: no ratings are left for it")
