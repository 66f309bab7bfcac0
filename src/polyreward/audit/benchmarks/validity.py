"""Does a benchmark's order of reward models hold where they are used?

`benchmark_validity` compares a benchmark's scores with what policies reach under each of M reward models: r-square and
Spearman, with bootstrap intervals and the range over leaving one out (arXiv 2410.01729). `predictive_validity` compares
the two orders: Spearman, weighted Kendall tau, NDCG, rank-biased overlap, with a bootstrap over items (arXiv
2604.07343). `selection_reliability` asks how many wrong solutions a problem needs to predict selection elsewhere.

A dozen models give wide intervals, and models of one family are not independent: pass `families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import check_resampling, generator, numbers, percentiles, resampled
from polyreward.errors import InvalidInputError, UnknownNameError, nearest

METRICS = ("spearman", "weighted_tau", "ndcg", "rbo", "rbo_truncated")
PERSISTENCE = 0.9


def benchmark_validity(
    bench_scores: Any,
    policy_results: Any,
    *,
    families: Sequence[Any] | None = None,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> dict[str, Any]:
    """r-square and rank correlation of a benchmark with the results of policies, over M reward models.

    Parameters
    ----------
    bench_scores, policy_results : (M,), M >= 3
    families : length M, optional
        Models of one family are resampled, and left out, together.

    Returns
    -------
    dict
        ``r2``, ``pearson``, ``spearman``; ``pearson_p``, ``spearman_p``; ``ci95`` (low, high) of ``r2``, ``pearson``
        and ``spearman``, by a percentile bootstrap over models (families); ``r2_leave_one_out`` and
        ``spearman_leave_one_out`` (lowest, highest); ``models``, ``families``.

    Raises
    ------
    InvalidInputError
        Fewer than three models, lengths that differ, values that are not finite, or all the same.
    """
    check_resampling(n_boot, level)
    x, y = _both(bench_scores, policy_results, least=3)
    labels = np.arange(len(x)) if families is None else _family_codes(families, len(x))
    from scipy import stats

    groups = labels.max() + 1
    members = labels[None, :] == np.arange(groups)[:, None]
    draws = [_weighted(counts @ members, x, y) for counts in resampled(int(groups), n_boot, generator(seed))]
    low, high = percentiles(np.concatenate(draws), level)
    left_out = _weighted((~members).astype(np.float64), x, y)
    known = left_out[np.isfinite(left_out).all(axis=1)]
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    names = ("r2", "pearson", "spearman")
    ranges = {
        f"{name}_leave_one_out": (float(known[:, i].min()), float(known[:, i].max())) if len(known) else None
        for i, name in enumerate(names)
        if name != "pearson"
    }
    return {
        "r2": float(pearson.statistic) ** 2,
        "pearson": float(pearson.statistic),
        "spearman": float(spearman.statistic),
        "pearson_p": float(pearson.pvalue),
        "spearman_p": float(spearman.pvalue),
        "ci95": {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)},
        **ranges,
        "models": len(x),
        "families": int(groups),
    }


def _family_codes(families: Sequence[Any], models: int) -> np.ndarray:
    if len(families) != models:
        raise InvalidInputError(f"families has {len(families)} entries for {models} models")
    known: dict[Any, int] = {}
    return np.array([known.setdefault(family, len(known)) for family in families])


def _weighted(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """r-square, Pearson and Spearman (B, 3) of models that come as often as `weights` (B, M) says; else NaN."""
    pearson = _correlation(weights, x[None], y[None])
    spearman = _correlation(weights, _midranks(weights, x), _midranks(weights, y))
    return np.stack([pearson**2, pearson, spearman], axis=1)


def _midranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean rank of each model where copies share theirs, (B, M)."""
    below = values[None, :] < values[:, None]
    same = values[None, :] == values[:, None]
    return np.asarray(weights @ below.T + 0.5 * (weights @ same.T))


def _correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        a = x - (weights * x).sum(axis=1, keepdims=True) / total
        b = y - (weights * y).sum(axis=1, keepdims=True) / total
        square = (weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1)
        spread = np.sqrt(square)
        # copies of one value leave rounding, not spread
        scale = np.abs(x).max() * np.abs(y).max() * total[:, 0]
        return np.where(spread > 1e-12 * scale, (weights * a * b).sum(axis=1) / spread, np.nan)


def predictive_validity(
    bench: Any,
    downstream: Any,
    metrics: Sequence[str] = ("spearman", "weighted_tau", "ndcg", "rbo"),
    n_boot: int = 1000,
    *,
    paired: bool = False,
    ndcg_relevance: Literal["value", "rank"] = "value",
    persistence: float = PERSISTENCE,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> dict[str, Any]:
    """Agreement of a benchmark's order of R reward models with the order of what they are worth downstream.

    Parameters
    ----------
    bench, downstream : (R,) figures of the models, or (R, items) figures of every item
        The mean over items counts. What has items is resampled by item, what has none stays as it is; where neither
        has, models are resampled.
    metrics : of "spearman", "weighted_tau" (scipy's hyperbolic weights), "ndcg" (models in the order of `bench`, all
        places; ties share), "rbo" (extrapolated), "rbo_truncated"
    n_boot : int
        0 for no intervals.
    paired : bool
        The items of both are the same and are resampled together.
    ndcg_relevance : "value" (the downstream figures, from 0 up) or "rank" (R less the rank)
    persistence : p of rank-biased overlap

    Returns
    -------
    dict
        The figure of each metric; ``ci95``: (low, high) of each; ``models`` (R); ``spearman_se``: ``1 / sqrt(R - 1)``,
        what chance alone gives Spearman's correlation.

    Raises
    ------
    InvalidInputError
        Fewer than two models, another number of them, values that are not finite, all the same, or below 0 for NDCG by
        value.
    UnknownNameError
        Another metric.
    """
    if not 0 < persistence < 1:
        raise InvalidInputError(f"persistence must lie between 0 and 1, got {persistence}")
    for name in metrics:
        if name not in METRICS:
            raise UnknownNameError(f"unknown metric {name!r}{nearest(str(name), METRICS)}")
    first, second = _figures(bench, "bench"), _figures(downstream, "downstream")
    x, y = _both(first.mean(axis=1), second.mean(axis=1), least=2)
    if "ndcg" in metrics and ndcg_relevance == "value" and (y < 0).any():
        raise InvalidInputError(
            f"downstream of model {int((y < 0).argmax())} is {y.min():g}; NDCG by value needs figures from 0 up: use "
            "ndcg_relevance='rank', shift them, or leave ndcg out"
        )

    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([_MEASURES[name](a, b, persistence, ndcg_relevance) for name in metrics], axis=1)

    values = measure(x[None], y[None])[0] if metrics else np.zeros(0)
    report: dict[str, Any] = dict(zip(metrics, values.tolist(), strict=True))
    if n_boot:
        check_resampling(n_boot, level)
        draws = measure(*_resampled_figures(first, second, n_boot, generator(seed), paired))
        low, high = percentiles(draws, level)
        report["ci95"] = {name: (float(low[i]), float(high[i])) for i, name in enumerate(metrics)}
    return report | {"models": len(x), "spearman_se": float(1 / np.sqrt(len(x) - 1))}


def _figures(values: Any, name: str) -> np.ndarray:
    array = numbers(values, name)
    if array.ndim not in (1, 2) or not array.size:
        raise InvalidInputError(f"{name} must be (R,) or (R, items), got shape {array.shape}")
    return array[:, None] if array.ndim == 1 else array


def _both(first: Any, second: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = numbers(first, "benchmark scores", 1), numbers(second, "downstream results", 1)
    if len(x) != len(y) or len(x) < least:
        raise InvalidInputError(
            f"expected benchmark scores and downstream results of the same {least} or more models, got {len(x)}, "
            f"{len(y)}"
        )
    for name, values in (("benchmark scores", x), ("downstream results", y)):
        if (values == values[0]).all():
            raise InvalidInputError(f"the {name} of all {len(values)} models are {values[0]:g}: they have no order")
    return x, y


def _resampled_figures(
    first: np.ndarray, second: np.ndarray, resamples: int, rng: np.random.Generator, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the models over resampled items, (B, R) each."""
    models = len(first)
    if first.shape[1] == 1 and second.shape[1] == 1:
        rows = rng.integers(models, size=(resamples, models))
        return first[:, 0][rows], second[:, 0][rows]
    if paired:
        if first.shape != second.shape:
            raise InvalidInputError(f"paired items need one shape, got {first.shape} and {second.shape}")
        both = np.concatenate([_means(np.concatenate([first, second]), resamples, rng)])
        return both[:, :models], both[:, models:]
    return _means(first, resamples, rng), _means(second, resamples, rng)


def _means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    items = values.shape[1]
    if items == 1:
        return np.broadcast_to(values.T, (resamples, len(values)))
    return np.concatenate([counts @ values.T / items for counts in resampled(items, resamples, rng)])


def _spearman(x: np.ndarray, y: np.ndarray, *_: Any) -> np.ndarray:
    from scipy.stats import rankdata

    return _correlation(np.ones(x.shape), rankdata(x, axis=1), rankdata(y, axis=1))


def _weighted_tau(x: np.ndarray, y: np.ndarray, *_: Any) -> np.ndarray:
    """Weighted Kendall tau with additive hyperbolic weights, mean of the ranks by either order, as of scipy."""
    agree = np.sign(x[:, :, None] - x[:, None, :]), np.sign(y[:, :, None] - y[:, None, :])

    def by(main: np.ndarray, other: np.ndarray) -> np.ndarray:
        weight = 1 / (1 + _inverse(np.lexsort((-other, -main), axis=-1)))
        pair = weight[:, :, None] + weight[:, None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt((agree[0] ** 2 * pair).sum(axis=(1, 2)) * (agree[1] ** 2 * pair).sum(axis=(1, 2)))
            return np.where(spread > 0, (agree[0] * agree[1] * pair).sum(axis=(1, 2)) / spread, np.nan)

    return np.asarray(0.5 * (by(x, y) + by(y, x)))


def _inverse(order: np.ndarray) -> np.ndarray:
    return np.argsort(order, axis=-1, kind="stable").astype(np.float64)


def _ndcg(x: np.ndarray, y: np.ndarray, _: float, relevance: str) -> np.ndarray:
    from scipy.stats import rankdata

    from polyreward.rewards.ranking_measures import ndcg

    worth = y if relevance == "value" else y.shape[1] - rankdata(-y, axis=1)
    return np.asarray(ndcg(x, worth, k=None, ties="expected"))


def _rbo(x: np.ndarray, y: np.ndarray, persistence: float, _: str) -> np.ndarray:
    from polyreward.rewards.ranking_measures import rbo

    return np.asarray(rbo(x, y, persistence))


_MEASURES: Mapping[str, Callable[[np.ndarray, np.ndarray, float, str], np.ndarray]] = {
    "spearman": _spearman,
    "weighted_tau": _weighted_tau,
    "ndcg": _ndcg,
    "rbo": _rbo,
    # all R places overlap in full at the end, which is what extrapolation adds
    "rbo_truncated": lambda x, y, p, r: _rbo(x, y, p, r) - p ** x.shape[1],
}


def selection_reliability(
    scores: Any,
    ks: Sequence[int],
    *,
    problems: int | None = None,
    held_out: int = 3,
    splits: int = 200,
    rng: int | np.random.Generator = 0,
) -> dict[int, float]:
    """How well a benchmark of k wrong solutions a problem predicts selection among `held_out` others on other problems.

    Half of the problems (or `problems` of them) make the benchmark: of each problem, k wrong solutions are drawn and
    the correct one must beat them all. On the other half it must beat `held_out` wrong solutions, exactly over all
    subsets of them. The r-square over models of the two, mean over random splits.

    Parameters
    ----------
    scores : (M, Q, 1 + m), the correct solution first
    ks : whole numbers from 1 to m

    Returns
    -------
    dict of k to the mean r-square; splits without spread between the models count 0

    Raises
    ------
    InvalidInputError
        Fewer than three models or four problems, numbers that do not fit.
    """
    table = numbers(scores, "scores", 3)
    models, questions, width = table.shape
    half = questions // 2
    size = half if problems is None else problems
    if models < 3 or not 1 <= size <= half or questions < 4 or width < 2:
        raise InvalidInputError(
            f"selection_reliability needs 3 models, 4 problems and up to {half} for the benchmark, got {table.shape} "
            f"and {size}"
        )
    for k in (*ks, held_out):
        if not isinstance(k, int | np.integer) or not 1 <= k <= width - 1:
            raise InvalidInputError(f"comparisons must be whole numbers from 1 to {width - 1}, got {k!r}")
    random = generator(rng)
    beaten = table[:, :, :1] > table[:, :, 1:]
    won = beaten.sum(axis=2)
    ways = np.array([comb(w, held_out) for w in range(width)]) / comb(width - 1, held_out)
    success = ways[won]
    found = {int(k): np.zeros(splits) for k in ks}
    for split in range(splits):
        order = random.permutation(questions)
        inside, outside = order[:size], order[half:]
        result = success[:, outside].mean(axis=1)
        drawn = random.permuted(np.tile(np.arange(width - 1), (size, 1)), axis=1)
        chosen = np.take_along_axis(beaten[:, inside], drawn[None], axis=2)
        for k, kept in found.items():
            bench = chosen[:, :, :k].all(axis=2).mean(axis=1)
            kept[split] = np.nan_to_num(_correlation(np.ones((1, models)), bench[None], result[None])[0] ** 2)
    return {k: float(kept.mean()) for k, kept in found.items()}
