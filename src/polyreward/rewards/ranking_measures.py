"""Ranking measures on arrays (..., c): DCG, NDCG, recall, rank-biased overlap and Jensen-Shannon divergence.

A group is c documents with a predicted score and a gold score each. Everything is vectorised over the leading axes, for
NumPy arrays and torch tensors alike:

    DCG@k = sum_{i <= k} gain(rel_i) / log2(i + 1),   NDCG@k = DCG@k / DCG@k of the best order
    JS(P, Q) = 1/2 KL(P || M) + 1/2 KL(Q || M),   M = (P + Q) / 2

Scores that are whole numbers tie a lot. ``ties="stable"`` keeps tied documents in the order in which they came;
``ties="expected"`` takes the mean over all orders of the tied, which no order of the input can change and which
equals scikit-learn's ``ndcg_score``. Paper: GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning
(arXiv 2511.11653).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.sweet_spot import at_first

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor

Gain = Literal["linear", "exp2"]
Ties = Literal["stable", "expected"]
GAINS, TIES = ("linear", "exp2"), ("stable", "expected")
SUM_TOLERANCE = 2e-3  # half precision
LARGEST_EXPONENT = 1000


def dcg(relevance: Array, k: int | None = None, gain: Gain = "linear") -> Array:
    """Discounted cumulative gain of relevance in ranked order, best place first: (..., c) -> (...,).

    Parameters
    ----------
    relevance : (..., c) finite numbers
    k : int >= 1, or None for all places
    gain : "linear" (the paper's) or "exp2", ``2^rel - 1``

    Raises
    ------
    InvalidInputError
        No place, a number that is not finite, an unknown gain, k below 1.
    """
    check_options(k, gain)
    xp, (values,), restore = arrays("dcg", relevance=relevance)
    return restore((_gain(values, gain) * _discounts(xp, values, k)).sum(axis=-1))


def ndcg(scores: Array, gold: Array, k: int | None = 10, gain: Gain = "linear", ties: Ties = "stable") -> Array:
    """DCG of the order that the scores give over that of the best order: (..., c), (..., c) -> (...,) in [0, 1].

    A group whose gold scores are all 0 has no best order: 0 there (`rankable` tells).

    Parameters
    ----------
    scores, gold : (..., c) finite numbers; leading axes broadcast; gold is not negative
    k : int >= 1, or None for all places
    gain : "linear" or "exp2"
    ties : "stable" or "expected"

    Returns
    -------
    (...,) in the floating dtype of the input (float64 for lists and whole numbers), computed in float64

    Raises
    ------
    InvalidInputError
        No document, another number of gold scores, NaN or infinity, negative gold, an unknown option.
    """
    check_options(k, gain, ties)
    xp, (s, g), restore = arrays("ndcg", scores=scores, gold=gold)
    gains = _gain(_non_negative(g, "ndcg", "gold"), gain)
    steps = _discounts(xp, g, k)
    found = (_take(xp, gains, _order(xp, s)) * _by_place(xp, s, steps, ties)).sum(axis=-1)
    best = (_take(xp, gains, _order(xp, gains)) * steps).sum(axis=-1)
    # sums of different order may put the best order a rounding above 1
    return restore(xp.where(best > 0, found / xp.where(best > 0, best, 1.0), 0.0).clip(0, 1))


def recall(scores: Array, gold: Array, k: int = 10, ties: Ties = "stable") -> Array:
    """Share of the relevant documents among the predicted first: (..., c), (..., c) -> (...,) in [0, 1].

    The paper states no rule of relevance for graded gold scores, and Recall@10 of at most 10 documents is always 1. So
    for graded gold ``k_eff = min(k, ceil(c / 2))``: the k_eff documents of highest gold are relevant and the predicted
    first k_eff count. A group whose gold scores are all 0 or 1 has the plain Recall@k, relevant where gold is 1.

    Ties: "stable" takes tied documents in the order of the input, gold as well as predicted; "expected" is the mean
    over the orders of tied predictions, and every document tied with the k_eff-th gold is relevant. All gold 0: 0.

    Raises
    ------
    InvalidInputError
        As `ndcg`.
    """
    check_options(k, ties=ties)
    xp, (s, g), restore = arrays("recall", scores=scores, gold=gold)
    _non_negative(g, "recall", "gold")
    count = g.shape[-1]
    cut = min(k, -(-count // 2))
    order, best = _order(xp, s), _order(xp, g)
    places = xp.arange(count, device=g.device)
    binary = ((g == 0) | (g == 1)).all(axis=-1)[..., None]
    least = _take(xp, g, best)[..., cut - 1 : cut]
    relevant = xp.where(binary, g == 1, _inverse(xp, best) < cut if ties == "stable" else g >= least)
    counted = [_by_place(xp, s, _floats(xp, places < first, g), ties) for first in (k, cut)]
    hits = (_floats(xp, _take(xp, relevant, order), g) * xp.where(binary, *counted)).sum(axis=-1)
    wanted = xp.where(binary[..., 0], _floats(xp, g == 1, g).sum(axis=-1), float(cut))
    some = (g > 0).any(axis=-1)
    return restore(xp.where(some, hits / xp.where(wanted > 0, wanted, 1.0), 0.0).clip(0, 1))


def rbo(scores: Array, gold: Array, p: float = 0.9) -> Array:
    """Rank-biased overlap of the predicted and the gold order, extrapolated: (..., c), (..., c) -> (...,) in [0, 1].

    ``p^c + (1 - p) / p * sum_d p^d X_d / d``, with X_d the documents that both orders have among their first d (A
    similarity measure for indefinite rankings, Webber, Moffat and Zobel, 2010). Equal orders give 1. Tied documents
    stay in the order of the input. p weighs depth: the first 10 places hold 86 % of the weight at p = 0.9.

    Raises
    ------
    InvalidInputError
        p outside (0, 1), or as `ndcg`.
    """
    if not 0 < p < 1:
        raise InvalidInputError(f"rbo: p must lie between 0 and 1, got {p}")
    xp, (s, g), restore = arrays("rbo", scores=scores, gold=gold)
    ranks = [_inverse(xp, _order(xp, values)) for values in (s, g)]
    depth = np.arange(1, g.shape[-1] + 1)
    tail = np.cumsum((p**depth / depth)[::-1])[::-1].copy()  # a document counts at every depth from its worse rank on
    overlap = _like(xp, tail, g)[xp.maximum(*ranks)].sum(axis=-1)
    return restore((p ** g.shape[-1] + (1 - p) / p * overlap).clip(0, 1))


def jensen_shannon(p: Array, q: Array, base: float = 2) -> Array:
    """Jensen-Shannon divergence of distributions: (..., c), (..., c) -> (...,) in [0, log_base 2].

    With base 2 it is 1 for disjoint supports. It is the square of ``scipy.spatial.distance.jensenshannon``.

    Raises
    ------
    InvalidInputError
        A base not above 1, negative entries, entries that do not add up to 1, or as `ndcg`.
    """
    if not base > 1 or math.isinf(base):
        raise InvalidInputError(f"jensen_shannon: the base must be above 1, got {base}")
    xp, (first, second), restore = arrays("jensen_shannon", p=p, q=q)
    for name, values in (("p", first), ("q", second)):
        off = abs(_non_negative(values, "jensen_shannon", name).sum(axis=-1) - 1) > SUM_TOLERANCE
        if bool(off.any()):
            raise InvalidInputError(f"jensen_shannon: {name}{at_first(off)} does not add up to 1")
    middle = (first + second) / 2
    filled = xp.where(middle > 0, middle, 1.0)

    def from_middle(values: Any) -> Any:
        return (values * xp.log(xp.where(values > 0, values / filled, 1.0))).sum(axis=-1)

    nats = (from_middle(first) + from_middle(second)) / 2
    return restore((nats / math.log(base)).clip(0, math.log(2, base)))


def rankable(gold: Array) -> Array:
    """Whether a group has a document with gold above 0, bool (...,): without one NDCG is undefined."""
    values: Any = gold if hasattr(gold, "new_tensor") else np.asarray(gold)
    return (values > 0).any(axis=-1)  # type: ignore[no-any-return]


def check_options(k: int | None = None, gain: str = "linear", ties: str = "stable") -> None:
    """Refuse options that the measures do not know."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
        raise InvalidInputError(f"k must be a whole number, at least 1, got {k!r}")
    for name, value, known in (("gain", gain, GAINS), ("ties", ties, TIES)):
        if value not in known:
            raise InvalidInputError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}")


def arrays(where: str, **named: Any) -> tuple[Any, list[Any], Any]:
    """Inputs on one backend: its namespace, float64 arrays of one shape (..., c), and what casts a result back.

    Raises
    ------
    InvalidInputError
        No document, shapes that do not fit, NaN or infinity; the message names function, argument and place.
    """
    tensor = next((value for value in named.values() if hasattr(value, "new_tensor")), None)
    try:
        xp, values, dtype = _on_numpy(named.values()) if tensor is None else _on_torch(named.values(), tensor.device)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: {' and '.join(named)} must be arrays of numbers: {error}") from None
    shapes = [tuple(value.shape) for value in values]
    for name, value, shape in zip(named, values, shapes, strict=True):
        if not shape or shape[-1] == 0:
            raise InvalidInputError(f"{where}: {name} has shape {shape}, expected (..., c) with at least one document")
        wrong = ~xp.isfinite(value)
        if bool(wrong.any()):
            raise InvalidInputError(f"{where}: {name}{at_first(wrong)} is NaN or infinite, expected a finite number")
    if len({shape[-1] for shape in shapes}) > 1:
        raise InvalidInputError(f"{where}: {' and '.join(named)} have shapes {shapes}, expected the same documents")
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise InvalidInputError(f"{where}: {' and '.join(named)} have shapes {shapes} that do not broadcast") from None
    values = [xp.broadcast_to(value, shape) for value in values]

    def restore(result: Any) -> Any:
        return result.to(dtype) if tensor is not None else np.asarray(result).astype(dtype)[()]

    return xp, values, restore


def _on_numpy(given: Iterable[Any]) -> tuple[Any, list[Any], Any]:
    values = [np.asarray(value) for value in given]
    floating = [value.dtype for value in values if np.issubdtype(value.dtype, np.floating)]
    dtype = np.result_type(*floating) if floating else np.float64
    return np, [value.astype(np.float64) for value in values], dtype


def _on_torch(given: Iterable[Any], device: Any) -> tuple[Any, list[Any], Any]:
    import torch

    values = [torch.as_tensor(value, device=device) for value in given]
    floating = [value.dtype for value in values if value.dtype.is_floating_point]
    dtype = functools.reduce(torch.promote_types, floating) if floating else torch.get_default_dtype()
    wide = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
    return torch, [value.to(wide) for value in values], dtype


def _gain(relevance: Any, gain: str) -> Any:
    if gain == "linear":
        return relevance
    if bool((relevance > LARGEST_EXPONENT).any()):
        raise InvalidInputError(f"gain 'exp2' needs relevance up to {LARGEST_EXPONENT}, got {float(relevance.max()):g}")
    return 2.0**relevance - 1


def _discounts(xp: Any, like: Any, k: int | None) -> Any:
    """Weights (c,) of the places, 0 behind the k-th."""
    places = np.arange(like.shape[-1])
    table = 1 / np.log2(places + 2)
    return _like(xp, table if k is None else np.where(places < k, table, 0.0), like)


def _order(xp: Any, values: Any) -> Any:
    """Indices from the highest value to the lowest; ties in the order of the input."""
    return xp.argsort(-values, axis=-1, stable=True)


def _inverse(xp: Any, order: Any) -> Any:
    """Place of each document, from the documents in order."""
    return xp.argsort(order, axis=-1, stable=True)


def _by_place(xp: Any, scores: Any, weights: Any, ties: str) -> Any:
    """Weight of each place; under expected ties, the mean weight of the places that tied documents share."""
    if ties == "stable":
        return xp.broadcast_to(weights, scores.shape)
    sorted_ = _take(xp, scores, _order(xp, scores))
    count = scores.shape[-1]
    places = xp.arange(count, device=scores.device)
    differs = sorted_[..., 1:] != sorted_[..., :-1]
    edge = xp.ones_like(differs[..., :1]) if count > 1 else xp.ones_like(sorted_, dtype=bool)
    opens, closes = xp.concatenate([edge, differs], axis=-1), xp.concatenate([differs, edge], axis=-1)
    start = _running(xp, xp.where(opens, places, 0))
    end = count - xp.flip(_running(xp, xp.flip(xp.where(closes, count - 1 - places, 0), (-1,))), (-1,))
    summed = xp.concatenate([weights[:1] * 0, xp.cumsum(weights, axis=0)])
    return (summed[end] - summed[start]) / (end - start)


def _running(xp: Any, values: Any) -> Any:
    return np.maximum.accumulate(values, axis=-1) if xp is np else xp.cummax(values, dim=-1).values


def _take(xp: Any, values: Any, order: Any) -> Any:
    return np.take_along_axis(values, order, axis=-1) if xp is np else xp.take_along_dim(values, order, dim=-1)


def _like(xp: Any, table: np.ndarray, like: Any) -> Any:
    return table if xp is np else xp.as_tensor(table, dtype=like.dtype, device=like.device)


def _floats(xp: Any, values: Any, like: Any) -> Any:
    return values.astype(like.dtype) if xp is np else values.to(like.dtype)


def _non_negative(values: Any, where: str, name: str) -> Any:
    if bool((values < 0).any()):
        raise InvalidInputError(f"{where}: {name}{at_first(values < 0)} is negative, expected numbers from 0 up")
    return values
