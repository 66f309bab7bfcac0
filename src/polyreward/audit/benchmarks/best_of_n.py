"""Best of n on recorded samples: what selecting by a reward model is worth, and how far it moves the policy.

`best_of_n_curve` is the accuracy of the best of n by score, exact over all subsets of the samples;
``KL = log n - (n - 1) / n`` nats is the divergence that this spends (`bon_kl`). Robust reward models keep rising
with it, fragile ones turn down (Evaluating Robustness of Reward Models for Mathematical Reasoning, arXiv 2410.01729).
`best_of_k` takes the first k samples instead (Personalized RewardBench, arXiv 2604.07343).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import generator, numbers
from polyreward.errors import InvalidInputError
from polyreward.tilting import best_of_n_kl, expected_best_of_n

Ties = Literal["mean", "first", "majority"]


def best_of_n_curve(
    scores: Any,
    correct: Any,
    ns: Sequence[int],
    *,
    how: Literal["subsets", "prefix"] = "subsets",
    ties: Ties = "mean",
    answers: Any = None,
    draws: int = 32,
    rng: int | np.random.Generator = 0,
) -> np.ndarray:
    """Accuracy of the best of n by score, mean over questions.

    Parameters
    ----------
    scores : (Q, N) finite
    correct : (Q, N)
        1 or true where the sample is right; any finite worth.
    ns : whole numbers from 1 to N
    how : "subsets" or "prefix"
        All subsets of n of the N samples, exactly; or the first n samples.
    ties : "mean", "first" or "majority"
        Of samples with the highest score: each is as likely; the first; the first of those whose answer is the most
        frequent among them (the paper's).
    answers : (Q, N), for "majority"
        Hashable; equal entries are equal answers.
    draws : int
        Random orders of the samples whose prefixes stand for all subsets where ties go by majority, which has no
        closed form.

    Returns
    -------
    float64 (len(ns),)

    Raises
    ------
    InvalidInputError
        Shapes that differ, values that are not finite, an n that is no whole number from 1 to N, majority without
        answers, an unknown option.
    """
    score, worth, counts = _checked(scores, correct, ns, "correct")
    if ties not in ("mean", "first", "majority") or how not in ("subsets", "prefix"):
        raise InvalidInputError(
            f"how must be 'subsets' or 'prefix', ties 'mean', 'first' or 'majority', got {how!r}, {ties!r}"
        )
    if ties == "majority":
        codes = _codes(answers, score.shape)
        if how == "prefix":
            return _majority(score, worth, codes, counts)
        order, total = generator(rng), np.zeros(len(counts))
        for _ in range(draws):
            shuffled = order.permuted(np.tile(np.arange(score.shape[1]), (len(score), 1)), axis=1)
            mixed = [np.take_along_axis(table, shuffled, axis=1) for table in (score, worth, codes)]
            total += _majority(mixed[0], mixed[1], mixed[2], counts)
        return total / draws
    if how == "subsets":
        ranked = _ranks(score) if ties == "first" else score
        return np.asarray(expected_best_of_n(ranked, counts, worth)).reshape(len(score), -1).mean(axis=0)
    found = [_of_prefix(score, worth, n, ties).mean() for n in counts]
    return np.array(found, dtype=np.float64)


def bon_kl(n: Any) -> Any:
    """``log n - (n - 1) / n``: divergence of the best of `n` from the policy in nats, for a number or an array."""
    return best_of_n_kl(n)


def best_of_k(scores: Any, values: Any, ks: Sequence[int]) -> dict[int, tuple[float, float]]:
    """What the best of the first k samples by score is worth; of equal scores the first one is taken.

    Parameters
    ----------
    scores : (Q, N) finite
    values : (Q, N)
        A NaN has no value: the question takes no part where it is picked.
    ks : whole numbers from 1 to N

    Returns
    -------
    dict of k to (mean over questions, its standard error)
        The error is NaN for fewer than two questions, the mean for none.

    Raises
    ------
    InvalidInputError
        As `best_of_n_curve`.
    """
    given = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    score, worth, counts = _checked(scores, np.where(np.isnan(given), 0.0, given), ks, "values")
    worth = np.where(np.isnan(given), np.nan, worth)
    found: dict[int, tuple[float, float]] = {}
    for k in counts:
        picked = worth[np.arange(len(score)), score[:, :k].argmax(axis=1)]
        picked = picked[~np.isnan(picked)]
        mean = float(picked.mean()) if len(picked) else float("nan")
        error = float(picked.std(ddof=1) / np.sqrt(len(picked))) if len(picked) > 1 else float("nan")
        found[k] = (mean, error)
    return found


def _checked(scores: Any, values: Any, ns: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    score, worth = numbers(scores, "scores", 2), numbers(values, name, 2)
    if score.shape != worth.shape or not score.size:
        raise InvalidInputError(
            f"scores and {name} must have one shape (questions, samples) with entries, got {score.shape}, {worth.shape}"
        )
    for n in ns:
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= score.shape[1]:
            raise InvalidInputError(f"n must be a whole number from 1 to {score.shape[1]} (the samples), got {n!r}")
    return score, worth, [int(n) for n in ns]


def _ranks(score: np.ndarray) -> np.ndarray:
    """Scores without ties: of equal ones the earlier is higher."""
    order = np.argsort(-score, axis=1, kind="stable")
    ranks = np.empty(score.shape)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(score.shape[1], 0, -1.0), score.shape), axis=1)
    return ranks


def _of_prefix(score: np.ndarray, worth: np.ndarray, n: int, ties: str) -> np.ndarray:
    if ties == "first":
        return worth[np.arange(len(score)), score[:, :n].argmax(axis=1)]
    top = score[:, :n] == score[:, :n].max(axis=1, keepdims=True)
    return np.asarray((top * worth[:, :n]).sum(axis=1) / top.sum(axis=1))


def _codes(answers: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Answers of each question as numbers below N."""
    if answers is None:
        raise InvalidInputError("ties='majority' needs the answers of the samples")
    table = np.empty(shape, dtype=np.int64)
    if len(answers) != shape[0]:
        raise InvalidInputError(f"answers has {len(answers)} questions, scores {shape[0]}")
    for question, row in enumerate(answers):
        if len(row) != shape[1]:
            raise InvalidInputError(f"answers[{question}] has {len(row)} samples, scores {shape[1]}")
        known: dict[Any, int] = {}
        table[question] = [known.setdefault(answer, len(known)) for answer in row]
    return table


def _majority(score: np.ndarray, worth: np.ndarray, codes: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    rows, width = np.arange(len(score)), score.shape[1]
    found = []
    for n in counts:
        top = score[:, :n] == score[:, :n].max(axis=1, keepdims=True)
        cells = rows[:, None] * width + codes[:, :n]
        votes = np.bincount(cells.ravel(), top.ravel(), minlength=len(score) * width)[cells]
        found.append(worth[rows, np.where(top, votes, -1.0).argmax(axis=1)].mean())
    return np.array(found)
