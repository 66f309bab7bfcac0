"""Training data for groupwise rerankers: candidate pools, gold scores fused from two teachers, training groups.

A pool holds the best candidates of a hybrid retriever and a random share of the rest. A pointwise teacher scores every
document alone, a listwise teacher orders the pool; their ranks are fused and mapped to gold scores of 0 to 10, and
groups that span the whole order are drawn from the pool:

    S(d) = -beta ln L_p(d) - (1 - beta) ln L_l(d)

Paper: GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning (arXiv 2511.11653).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from polyreward.errors import InvalidInputError

TOP, HEAD, TAIL, LAST = 10.0, 10, 40, 200
#: Sizes of training groups and how often each is drawn: 5 to 20, mostly 10 and 20. The shares are our choice.
GROUP_SIZES = {5: 0.1, 10: 0.4, 15: 0.1, 20: 0.4}


def rank_fusion_labels(rank_a: np.ndarray, rank_b: np.ndarray, beta: float = 0.5) -> np.ndarray:
    """Fused score of two rankings, ``-beta ln a - (1 - beta) ln b``: (..., n), (..., n) -> float64 (..., n), at most 0.

    Parameters
    ----------
    rank_a, rank_b : (..., n) numbers from 1 up
        Places of each document, 1 the best; tied documents may share a mean place. Pointwise and listwise teacher.
    beta : float in [0, 1]
        Weight of the first; with 1 the order is that of the first alone.

    Raises
    ------
    InvalidInputError
        Shapes that differ, a rank below 1 or not finite, beta outside [0, 1].
    """
    first, second = np.asarray(rank_a, dtype=np.float64), np.asarray(rank_b, dtype=np.float64)
    if first.shape != second.shape:
        raise InvalidInputError(f"rank_fusion_labels: ranks of shape {first.shape} and {second.shape}")
    _check_share("rank_fusion_labels", beta=beta)
    for name, ranks in (("rank_a", first), ("rank_b", second)):
        if not (np.isfinite(ranks) & (ranks >= 1)).all():
            raise InvalidInputError(f"rank_fusion_labels: {name} must hold finite ranks from 1 up")
    return -beta * np.log(first) - (1 - beta) * np.log(second)


def gold_scores(fused: np.ndarray, by: Literal["score", "place"] = "score") -> np.ndarray:
    """Gold scores of a pool, 10 for the best document and 0 for the last: (..., n) -> float64 (..., n).

    Parameters
    ----------
    fused : (..., n) finite numbers, higher is better, as `rank_fusion_labels` gives them
    by : "score" to map the fused score linearly, or "place" for evenly spaced gold scores
        The paper states neither; a figure of it shows 10, 9.3, 8.7, .., 0.3, 0. Tied documents share a mean place.

    A pool without differences (one document, or all equal) teaches nothing: 0 for all, and the reward drops it.

    Raises
    ------
    InvalidInputError
        NaN or infinity, an unknown `by`.
    """
    values = np.asarray(fused, dtype=np.float64)
    if by not in ("score", "place"):
        raise InvalidInputError(f"gold_scores: by must be 'score' or 'place', got {by!r}")
    return TOP * min_max(values if by == "score" else -places(values), "gold_scores: fused scores")


def min_max(scores: np.ndarray, what: str = "min_max: scores") -> np.ndarray:
    """Scores of a query mapped linearly onto [0, 1]: (..., n) -> float64 (..., n); 0 where all are equal."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 0 or not np.isfinite(values).all():
        raise InvalidInputError(f"{what} must be an array of finite numbers, got shape {values.shape}")
    if values.shape[-1] == 0:
        return values
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    span = high - low
    return np.where(span > 0, (values - low) / np.where(span > 0, span, 1), 0.0)


def places(scores: np.ndarray) -> np.ndarray:
    """Places of documents by their scores, 1 the highest, tied ones at their mean place: (..., n) -> float64 (..., n).

    The mean keeps the order in which documents came out of the labels.
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(-np.asarray(scores, dtype=np.float64), axis=-1), dtype=np.float64)


def hybrid_scores(bm25: np.ndarray, dense: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """``weight * bm25 + (1 - weight) * dense``, each mapped onto [0, 1] per query: (..., n) -> float64 (..., n)."""
    _check_share("hybrid_scores", weight=weight)
    sparse, close = min_max(bm25, "hybrid_scores: bm25"), min_max(dense, "hybrid_scores: dense")
    if sparse.shape != close.shape:
        raise InvalidInputError(f"hybrid_scores: {sparse.shape} BM25 and {close.shape} dense scores")
    return weight * sparse + (1 - weight) * close


def candidate_pool(
    bm25: np.ndarray,
    dense: np.ndarray,
    rng: np.random.Generator,
    *,
    head: int = HEAD,
    tail: int = TAIL,
    last: int = LAST,
    weight: float = 0.5,
) -> np.ndarray:
    """Candidates of a query: the first `head` of the hybrid order and `tail` drawn from the ranks behind, up to `last`.

    Parameters
    ----------
    bm25, dense : (..., n) scores of the same documents, as a BM25 index and an encoder give them
    rng : numpy Generator
    head, tail, last : int
        10, 40 and 200 in the paper. With fewer documents the pool is smaller.
    weight : float in [0, 1]
        Weight of BM25, 0.5 in the paper.

    Returns
    -------
    int64 (..., p), p = min(head + tail, n, last)
        Indices of documents in hybrid order, best first; ties in the order of the input.

    Raises
    ------
    InvalidInputError
        Scores of different shape or not finite, a weight outside [0, 1], head + tail of 0 or above `last`.
    """
    if min(head, tail) < 0 or not 1 <= head + tail <= last:
        raise InvalidInputError(f"candidate_pool: head {head} and tail {tail} must fit into the first {last} ranks")
    hybrid = hybrid_scores(bm25, dense, weight)
    order = np.argsort(-hybrid, axis=-1, kind="stable")[..., :last]
    front, behind = order[..., :head], order[..., head:]
    drawn = np.argsort(rng.random(behind.shape), axis=-1)[..., :tail]
    return np.concatenate([front, np.take_along_axis(behind, np.sort(drawn, axis=-1), axis=-1)], axis=-1)


def interval_groups(
    gold: np.ndarray, size: int, groups: int, rng: np.random.Generator, *, shuffle: bool = True
) -> np.ndarray:
    """Training groups from a pool, one document of each of `size` equal intervals of its order: int64 (groups, size).

    So each group spans the pool from best to worst, in random order: the place in the input tells nothing about the
    gold score. "Interval sampling" is all that the paper says; drawing one document an interval is our reading.

    Parameters
    ----------
    gold : (n,) gold scores of the pool
    size : int in [1, n]
    groups : int >= 0
    rng : numpy Generator
    shuffle : bool
        False leaves every group in the order of gold, best first.

    Raises
    ------
    InvalidInputError
        NaN gold, a size outside [1, n], fewer than 0 groups.
    """
    values = np.asarray(gold, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise InvalidInputError(f"interval_groups: gold must be numbers of one pool, got shape {values.shape}")
    if not 1 <= size <= values.size or groups < 0:
        raise InvalidInputError(f"interval_groups: {groups} groups of {size} from a pool of {values.size} documents")
    edges = np.arange(size + 1) * values.size // size
    picked = rng.integers(edges[:-1], edges[1:], size=(groups, size))
    chosen = np.argsort(-values, kind="stable")[picked]
    return rng.permuted(chosen, axis=1) if shuffle else chosen


def group_sizes(
    count: int, rng: np.random.Generator, largest: int | None = None, shares: dict[int, float] | None = None
) -> np.ndarray:
    """Sizes of `count` training groups, int64 (count,), drawn by `shares` (default `GROUP_SIZES`).

    Sizes above `largest`, the number of documents, are left out.

    Raises
    ------
    InvalidInputError
        No size is possible, or a share is negative.
    """
    table = GROUP_SIZES if shares is None else shares
    sizes = [size for size in table if largest is None or size <= largest]
    odds = np.array([table[size] for size in sizes], dtype=np.float64)
    if not sizes or (odds < 0).any() or odds.sum() <= 0:
        raise InvalidInputError(
            f"group_sizes: no size of {sorted(table)} with a positive share fits {largest} documents"
        )
    return np.asarray(rng.choice(sizes, size=count, p=odds / odds.sum()), dtype=np.int64)


def _check_share(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise InvalidInputError(f"{where}: {name} must lie in [0, 1], got {number!r}")
