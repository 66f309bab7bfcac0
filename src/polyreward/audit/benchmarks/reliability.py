"""How far a reward model's preferences can be believed: calibration, length, and who is served worse.

Of pairs with the score margin d of the preferred over the other response:

    calibration     how often the model is right where it is sure to 0.5..1; ECE = sum_b n_b / n |right_b - sure_b|
    Brier           mean (1 - p)^2 = reliability - resolution + uncertainty (up to the spread within bins)
    length effect   log-odds of preference = b_score d / sd + b_length (difference of lengths) / sd, no intercept:
                    what length adds to what the score says already; below 0, the score pays for length too much
    length alone    accuracy of preferring the longer response

Functions take arrays; `polyreward.audit.benchmarks.model_audit.audit_model` applies them to a model and its data.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import (
    Interval,
    blocked,
    check_resampling,
    generator,
    numbers,
    percentiles,
    resampled,
    wilson,
)
from polyreward.errors import InvalidInputError

PRIOR_PRECISION = 1e-3
"""Of the coefficients of standardised differences: keeps the fit finite where data are separable, moves no other."""


@dataclass(frozen=True, eq=False)
class CalibrationCurve:
    """Stated probability against what happened, in B bins.

    Attributes
    ----------
    edges : float64 (B + 1,)
    count : int64 (B,)
    stated, happened : float64 (B,)
        Mean probability and mean outcome; NaN in an empty bin.
    low, high : float64 (B,)
        Wilson's interval of `happened`; 0 and 1 in an empty bin.
    ece : float
        Expected calibration error.
    ece_interval : (low, high)
        Basic bootstrap over pairs, which takes off what chance adds to the error.
    brier, reliability, resolution, uncertainty, log_loss : float
        Reliability and resolution of the bins' means: 0 is best of the first, `uncertainty` of the second.
    """

    edges: np.ndarray
    count: np.ndarray
    stated: np.ndarray
    happened: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ece: float
    ece_interval: Interval
    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    log_loss: float


def calibration_curve(
    probabilities: Any,
    outcomes: Any,
    *,
    bins: int = 10,
    strategy: Literal["width", "mass"] = "width",
    span: Interval = (0.0, 1.0),
    base: float | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> CalibrationCurve:
    """Calibration of probabilities.

    Parameters
    ----------
    probabilities : (N,) in `span`
    outcomes : (N,) in [0, 1]
        1 happened, 0 did not; 0.5 for a tie.
    bins : int
    strategy : "width" (bins of equal width over `span`) or "mass" (of equally many; equal probabilities share one)
    base : float, optional
        Rate that resolution and uncertainty compare with; default the mean outcome.

    Raises
    ------
    InvalidInputError
        No pair, lengths that differ, numbers out of range, an unknown option.
    """
    p, y = numbers(probabilities, "probabilities", 1), numbers(outcomes, "outcomes", 1)
    check_resampling(resamples, level)
    if len(p) != len(y) or not len(p):
        raise InvalidInputError(f"expected one probability and outcome a pair, got {len(p)} and {len(y)}")
    for name, values, (least, most) in (("probabilities", p, span), ("outcomes", y, (0.0, 1.0))):
        wrong = (values < least) | (values > most)
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidInputError(f"{name}[{at}] is {values[at]:g}, expected a number from {least:g} to {most:g}")
    if (
        isinstance(bins, bool)
        or not isinstance(bins, int | np.integer)
        or bins < 1
        or strategy not in ("width", "mass")
    ):
        raise InvalidInputError(f"expected bins from 1 and strategy 'width' or 'mass', got {bins!r}, {strategy!r}")
    edges = np.linspace(*span, bins + 1)
    if strategy == "mass":
        edges = np.unique(np.concatenate([[span[0]], np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]), [span[1]]]))
    place = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, len(edges) - 2)
    size = len(edges) - 1
    count = np.bincount(place, minlength=size)
    sums = [np.bincount(place, values, minlength=size) for values in (p, y)]
    with np.errstate(invalid="ignore"):
        stated, happened = (total / count for total in sums)
    low, high = wilson(sums[1], count, level)
    gaps = np.zeros((len(p), size))
    gaps[np.arange(len(p)), place] = y - p
    ece = float(np.abs(gaps.sum(axis=0)).sum() / len(p))
    share, rate = count / len(p), float(y.mean()) if base is None else base
    known = count > 0
    eps = np.finfo(np.float64).tiny
    return CalibrationCurve(
        edges,
        count,
        stated,
        happened,
        np.asarray(low),
        np.asarray(high),
        ece,
        _ece_interval(gaps, ece, resamples, level, generator(seed)),
        float(((p - y) ** 2).mean()),
        float((share[known] * (stated[known] - happened[known]) ** 2).sum()),
        float((share[known] * (happened[known] - rate) ** 2).sum()),
        float(rate * (1 - rate)),
        float(-(y * np.log(np.maximum(p, eps)) + (1 - y) * np.log(np.maximum(1 - p, eps))).mean()),
    )


def _ece_interval(gaps: np.ndarray, ece: float, resamples: int, level: float, rng: np.random.Generator) -> Interval:
    sums = blocked(gaps, rng)
    draws = [np.abs(counts @ sums).sum(axis=1) / len(gaps) for counts in resampled(len(sums), resamples, rng)]
    low, high = percentiles(np.concatenate(draws)[:, None], level)
    return max(0.0, 2 * ece - float(high[0])), max(0.0, 2 * ece - float(low[0]))


def pairwise_calibration(probabilities: Any, outcomes: Any = None, **options: Any) -> CalibrationCurve:
    """Calibration of pairwise probabilities, which do not depend on which response is called the first.

    A pair counts at ``max(p, 1 - p)``, as right where the more probable response was preferred; bins cover 0.5 to 1.

    Parameters
    ----------
    probabilities : (N,)
        That the first response is preferred.
    outcomes : (N,), optional
        1 where it was, 0 where the other was, 0.5 for a tie; default 1 everywhere.
    options : as of `calibration_curve`
    """
    p = numbers(probabilities, "probabilities", 1)
    y = np.ones(len(p)) if outcomes is None else numbers(outcomes, "outcomes", 1)
    if len(p) != len(y) or ((p < 0) | (p > 1)).any():
        raise InvalidInputError(f"expected probabilities in [0, 1] and as many outcomes, got {len(p)} and {len(y)}")
    right = np.where(p > 0.5, y, np.where(p < 0.5, 1 - y, 0.5))
    return calibration_curve(np.maximum(p, 1 - p), right, span=(0.5, 1.0), base=0.5, **options)


@dataclass(frozen=True)
class LengthEffect:
    """What length says of a preference beyond the score.

    Attributes
    ----------
    score, length : float
        Log-odds of preference for one deviation of the margin, and of the difference of lengths.
    score_interval, length_interval : (low, high)
    odds_ratio : float
        ``exp(length)``: how much likelier the longer of two responses with equal scores is preferred, for one
    deviation. correlation : float
        Spearman's, of margin and difference of lengths: how far the score follows length.
    margin_deviation, length_deviation : float
        Root mean squares that the differences are divided by.
    pairs : int
    separable : bool
        The two explain every preference: coefficients have no finite estimate, and what is given is a lower bound.
    """

    score: float
    length: float
    score_interval: Interval
    length_interval: Interval
    odds_ratio: float
    correlation: float
    margin_deviation: float
    length_deviation: float
    pairs: int
    separable: bool


def length_partial_effect(
    margin: Any, length_difference: Any, preferred: Any = None, *, level: float = 0.95
) -> LengthEffect:
    """Logistic regression, without intercept, of preference on score margin and difference of lengths.

    Without intercept the result does not depend on which response is called the first. Intervals are Wald's.

    Parameters
    ----------
    margin, length_difference : (N,)
        First less second response.
    preferred : (N,), optional
        1 where the first was preferred, 0 where the second was; 0.5, a tie, takes no part. Default 1 everywhere.

    Raises
    ------
    InvalidInputError
        Fewer than two pairs; margins or lengths that do not differ in any pair.
    """
    from scipy.special import ndtri
    from scipy.stats import spearmanr

    d, length, y = _pairs(margin, length_difference, preferred, "length_difference")
    kept = y != 0.5
    sign = np.where(y[kept] == 1, 1.0, -1.0)
    raw = np.stack([d[kept], length[kept]], axis=1) * sign[:, None]
    if len(raw) < 2:
        raise InvalidInputError(f"the length effect needs two pairs with a preference, got {len(raw)}")
    scale = np.sqrt((raw**2).mean(axis=0))
    for name, value in zip(("margin", "length_difference"), scale, strict=True):
        if not value > 0:
            raise InvalidInputError(f"{name} is 0 in all {len(raw)} pairs: there is nothing to compare")
    x = raw / scale
    beta, covariance = _logistic(x)
    reach = float(ndtri(0.5 + level / 2)) * np.sqrt(np.diag(covariance))
    bounds = [(float(b - r), float(b + r)) for b, r in zip(beta, reach, strict=True)]
    # both directions of every pair, since which is the first says nothing
    both = np.concatenate([raw, -raw])
    return LengthEffect(
        float(beta[0]),
        float(beta[1]),
        bounds[0],
        bounds[1],
        float(np.exp(min(beta[1], 700.0))),
        float(spearmanr(both[:, 0], both[:, 1]).statistic),
        float(scale[0]),
        float(scale[1]),
        len(raw),
        bool((x @ beta > 0).all()),
    )


def _logistic(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (2,) for which all rows are wins, and their covariance, by Newton's method with halved steps."""
    beta = np.zeros(x.shape[1])
    prior = PRIOR_PRECISION * np.eye(x.shape[1])

    def loss(b: np.ndarray) -> float:
        return float(np.logaddexp(0, -x @ b).sum() + 0.5 * b @ prior @ b)

    for _ in range(100):
        lost = 1 / (1 + np.exp(np.clip(x @ beta, -700, 700)))
        gradient = prior @ beta - x.T @ lost
        hessian = (x * (lost * (1 - lost))[:, None]).T @ x + prior
        step, size, before = np.linalg.solve(hessian, gradient), 1.0, loss(beta)
        while size > 1e-6 and loss(beta - size * step) > before:
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    lost = 1 / (1 + np.exp(np.clip(x @ beta, -700, 700)))
    return beta, np.linalg.inv((x * (lost * (1 - lost))[:, None]).T @ x + prior)


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of one annotator (or value of a column) with Wilson's interval; a pair of equal scores counts half."""

    name: Any
    accuracy: float
    low: float
    high: float
    pairs: int


def accuracy_by(
    labels: Sequence[Hashable] | np.ndarray, margin: Any, preferred: Any = None, *, level: float = 0.95
) -> list[GroupAccuracy]:
    """Accuracy of each group of pairs, in the order in which the groups first come.

    Parameters
    ----------
    labels : N hashables, such as annotators
    margin : (N,)
        Score of the first less that of the second response.
    preferred : (N,), optional
        As of `length_partial_effect`; ties take no part, and a group of ties only is left out.
    """
    d, _, y = _pairs(margin, margin, preferred, "margin")
    if len(labels) != len(d):
        raise InvalidInputError(f"labels has {len(labels)} entries for {len(d)} pairs")
    codes: dict[Any, int] = {}
    code = np.array([codes.setdefault(label, len(codes)) for label in _plain(labels)], np.int64)
    kept = y != 0.5
    right = _right(d, y)[kept]
    count = np.bincount(code[kept], minlength=len(codes))
    won = np.bincount(code[kept], right, minlength=len(codes))
    low, high = wilson(won, count, level)
    return [
        GroupAccuracy(name, float(won[i] / count[i]), float(low[i]), float(high[i]), int(count[i]))
        for name, i in codes.items()
        if count[i]
    ]


def length_only_accuracy(
    length_first: Any, length_second: Any, preferred: Any = None, *, level: float = 0.95
) -> GroupAccuracy:
    """Accuracy of preferring the longer response; equal lengths count half. Far from 0.5, length is a shortcut."""
    first, second = numbers(length_first, "length_first", 1), numbers(length_second, "length_second", 1)
    if len(first) != len(second):
        raise InvalidInputError(f"expected two lengths a pair, got {len(first)} and {len(second)}")
    found = accuracy_by(np.zeros(len(first), np.int64), first - second, preferred, level=level)
    if not found:
        raise InvalidInputError("no pair has a preference")
    return GroupAccuracy("longer", found[0].accuracy, found[0].low, found[0].high, found[0].pairs)


def _pairs(first: Any, second: Any, preferred: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d, other = numbers(first, "margin", 1), numbers(second, name, 1)
    y = np.ones(len(d)) if preferred is None else numbers(preferred, "preferred", 1)
    if not len(d) == len(other) == len(y):
        raise InvalidInputError(f"margin, {name} and preferred have {len(d)}, {len(other)} and {len(y)} entries")
    wrong = ~np.isin(y, (0, 0.5, 1))
    if wrong.any():
        at = int(wrong.argmax())
        raise InvalidInputError(f"preferred[{at}] is {y[at]:g}, expected 1, 0 or 0.5")
    return d, other, y


def _right(margin: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """1 where the order of the scores is that of the preference, 0.5 for equal scores."""
    return 0.5 + 0.5 * np.sign(margin) * np.where(preferred == 1, 1.0, -1.0)


def _plain(labels: Any) -> list[Any]:
    return labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
