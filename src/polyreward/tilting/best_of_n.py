"""The best of n draws: its distribution, how far it is from the base, and what it is worth.

    q(a) = p(a) (F(a)^n - F(a-)^n) / (F(a) - F(a-)),    KL(q || p) <= log n - (n - 1) / n

F is the distribution function of the score under p. What the best of n is worth is estimated from N samples by the mean
over all subsets of n, a weighted mean of the sorted samples: nothing is drawn, and the estimate is unbiased.

KL bound: arXiv 2401.01879 (Theoretical guarantees on the best-of-n alignment policy); the estimator is that of pass@k
(arXiv 2107.03374) for graded scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.tilting.arrays import Array, broadcast, like, positive, refuse, tensor, whole
from polyreward.tilting.balls import ball


def best_of_n_distribution(p: Array, scores: Array, n: int, mask: Array | None = None) -> Any:
    """Distribution of the highest-scoring of `n` independent draws from `p`, (..., A).

    Of draws with equal scores the first one wins, so that equal scores share their mass in the proportions of `p`.

    Parameters
    ----------
    p : (..., A), each row a distribution
    scores : (..., A), finite, broadcasts with `p`
    n : int >= 1
    mask : bool, broadcasts with `p`

    Raises
    ------
    InvalidInputError
        A row of `p` that is no distribution, a score that is not finite, `n` that is no whole number of at least 1.
    """
    n = whole(n, "best_of_n_distribution")
    raw, gap, _, total = ball(p, scores, 0.0, mask, "best_of_n_distribution")
    base = raw / positive(total)
    order = gap.argsort(-1, descending=True)
    ranked, worth = -gap.gather(-1, order), -gap.contiguous()
    below = torch.nn.functional.pad(base.gather(-1, order).cumsum(-1), (1, 0))
    reached = positive(below.gather(-1, torch.searchsorted(ranked, worth, right=True)))
    tied = reached - below.gather(-1, torch.searchsorted(ranked, worth, right=False))
    share = (tied / reached).clamp(max=1)
    lowest = share == 1  # nothing lies below: 0^n is 0, and its logarithm has no gradient
    mass = reached**n * torch.where(lowest, 1.0, -torch.expm1(n * torch.log1p(-torch.where(lowest, 0.0, share))))
    chosen = torch.where(tied > 0, base * mass / positive(tied), 0.0)
    return like(chosen / positive(chosen.sum(-1, keepdim=True)), p)


def best_of_n_kl(n: int | Array) -> Any:
    """``log n - (n - 1) / n``: KL divergence of the best of `n` from the base, in nats.

    Exact where no two draws have equal scores, an upper bound elsewhere.

    Parameters
    ----------
    n : int >= 1, or an array of these

    Returns
    -------
    float for one number, else float64 in the shape of `n`

    Raises
    ------
    InvalidInputError
        `n` that is no whole number of at least 1.
    """
    if isinstance(n, int | np.integer):
        return math.log(whole(n, "best_of_n_kl")) - (n - 1) / n
    counts = tensor(n)
    refuse(~((counts >= 1) & (counts == counts.round())), counts, "best_of_n_kl: n", "a whole number of at least 1")
    result = counts.log() - (counts - 1) / counts
    return result if isinstance(n, Tensor) else result.numpy()[()]


def expected_best_of_n(
    scores: Array,
    n: int | Sequence[int],
    values: Array | None = None,
    mask: Array | None = None,
    *,
    replace: bool = False,
) -> Any:
    """What the best of `n` is worth, from N samples: the mean over all subsets of size `n`, without drawing any.

    Parameters
    ----------
    scores : (..., N), finite
        What selects; of equal scores each is as likely to be taken.
    n : int >= 1, or M of these
    values : (..., N), finite, optional
        What is measured on the selected sample, a gold reward beside a proxy. Default: the scores, which makes this
        the expected maximum.
    mask : bool, broadcasts with `scores`
    replace : bool
        False: subsets of different samples, unbiased for the best of n fresh ones; needs n <= N. True: draws with
        replacement, the best of n from the empirical distribution.

    Returns
    -------
    (...) for one `n`, (..., M) for several; differentiable in `values` (in `scores` where these are the values)

    Raises
    ------
    InvalidInputError
        A row with fewer than `n` samples (with none, for `replace`), scores or values that are not finite, `n` that is
        no whole number of at least 1.
    """
    single = isinstance(n, int | np.integer)
    counts = [whole(k, "expected_best_of_n") for k in ([n] if single else n)]  # type: ignore[union-attr,list-item]
    score, worth, valid = broadcast("expected_best_of_n", scores, scores if values is None else values, mask)
    for what, entries in (("score", score), ("value", worth)):
        refuse(valid & ~torch.isfinite(entries), entries, f"expected_best_of_n: {what}", "a finite number")
    rows = valid.sum(-1, keepdim=True)
    least = 1 if replace else max(counts, default=1)
    refuse(rows[..., 0] < least, rows[..., 0], "expected_best_of_n: the number of samples", f"at least {least}")
    with torch.no_grad():
        score = torch.where(valid, score, -torch.inf).contiguous()
        ranked, absent = score.sort(-1).values.contiguous(), score.shape[-1] - rows
        upto = torch.searchsorted(ranked, score, right=True) - absent
        less = torch.searchsorted(ranked, score, right=False) - absent
        draws = torch.tensor(counts, dtype=torch.float64, device=score.device)
        high, low = (_all_within(rank[..., None], rows[..., None], draws, replace) for rank in (upto, less))
        weights = torch.where(valid[..., None], (high - low) / (upto - less).clamp(min=1)[..., None], 0.0)
    result = (weights * torch.where(valid, worth, 0.0)[..., None]).sum(-2)
    return like(result[..., 0] if single else result, scores)


def _all_within(rank: Tensor, rows: Tensor, draws: Tensor, replace: bool) -> Tensor:
    """Probability that all draws are among the `rank` lowest of `rows` samples."""
    rank, rows = rank.to(torch.float64), rows.to(torch.float64)
    if replace:
        return (rank.clamp(min=0) / rows) ** draws
    enough = rank >= draws
    rank = torch.where(enough, rank, draws)
    log = torch.lgamma(rank + 1) - torch.lgamma(rank - draws + 1)
    log = log - torch.lgamma(rows + 1) + torch.lgamma(rows - draws + 1)
    return torch.where(enough, log.exp(), 0.0)
