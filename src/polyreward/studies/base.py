"""What a study is: a paper's claim made falsifiable at small scale, and the record of what came out.

A study module states its claim, measure and rule, and defines two functions. ``run_seed(seed, config)`` runs every
arm for one seed and returns ``{arm: {quantity: figure}}``; ``judge(runs)`` turns the figures of all seeds into a
verdict by a rule fixed before running. `polyreward.studies.runner` spreads the seeds over processes or a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError

Verdict = Literal["supported", "not supported", "inconclusive", "not judged"]
Figures = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class StudyConfig:
    """How to run a study.

    Attributes
    ----------
    quick : bool
        One or two seeds at reduced size; checks that everything runs, and never gives a verdict.
    device : str
        Torch device on which the library's parts compute; the small tables of the tasks stay in NumPy.
    data : Path or None
        Folder with real data (``POLYREWARD_DATA``); None when there is none.
    """

    quick: bool = False
    device: str = "cpu"
    data: Path | None = None


@dataclass(frozen=True)
class Judgement:
    """Verdict of a study.

    Attributes
    ----------
    verdict : "supported", "not supported" or "inconclusive"
    effect : float
        The quantity that the rule speaks about.
    interval : (low, high)
        Its 95 % interval.
    summary : str
        What came out, in one or two sentences with figures.
    checks : mapping of the name of each part of the rule to whether it held
    """

    verdict: Verdict
    effect: float
    interval: tuple[float, float]
    summary: str
    checks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study; each module of `polyreward.studies` holds one as ``STUDY``.

    Attributes
    ----------
    slug : str
        ``NN-technique``; the result is ``results/<slug>.json``.
    method : str
        Name in the catalogue.
    claim, task, baselines, measure, rule, effect, full_scale : str
        Text for the reader: the claim with its number and source; the task; the arms and the grid they were tuned on;
        what is measured; when the claim counts as supported or refuted; what the effect is a figure of, in a few words;
        model, data and GPUs of the full-scale version.
    seeds : int
        Seeds of a full run.
    run_seed : (seed, config) -> {arm: {quantity: figure}}
    judge : (list of these, one a seed) -> Judgement
    config : mapping
        Sizes and hyper-parameters, stored with the result.
    """

    slug: str
    method: str
    claim: str
    task: str
    baselines: str
    measure: str
    rule: str
    effect: str
    full_scale: str
    seeds: int
    run_seed: Callable[[int, StudyConfig], Figures]
    judge: Callable[[Sequence[Figures]], Judgement]
    config: Mapping[str, Any] = field(default_factory=dict)


def arm(runs: Sequence[Figures], name: str, quantity: str) -> np.ndarray:
    """Figures of one arm over the seeds, float64 (seeds,)."""
    return np.array([run[name][quantity] for run in runs], dtype=np.float64)


def rated(name: str, rate: float) -> str:
    """Name of an arm at one learning rate of its grid."""
    return f"{name}, rate {rate:g}"


def best_rate(
    runs: Sequence[Figures], name: str, quantity: str, rates: Sequence[float], *, lowest: bool = False
) -> float:
    """Learning rate at which the arm has the highest mean figure over the seeds (the lowest with `lowest`)."""
    means = [arm(runs, rated(name, rate), quantity).mean() for rate in rates]
    return rates[int(np.argmin(means) if lowest else np.argmax(means))]


def paired_bootstrap(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray | float = 0.0,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Mean of ``first - second`` over paired seeds, and its percentile-bootstrap interval.

    Parameters
    ----------
    first, second : float (seeds,)
        Figures of two arms on the same seeds; `second` may be a constant.
    statistic : function of (resamples, seeds) -> (resamples,), default the mean over seeds

    Raises
    ------
    InvalidInputError
        No pair, or arms of different length.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if right.ndim and left.shape != right.shape:
        raise InvalidInputError(
            f"paired_bootstrap needs arms on the same seeds, got shapes {left.shape}, {right.shape}"
        )
    differences = left - right
    if differences.ndim != 1 or differences.size == 0:
        raise InvalidInputError(f"paired_bootstrap needs at least one pair, got shape {differences.shape}")
    measure = statistic or (lambda rows: rows.mean(axis=1))
    rows = np.random.default_rng(seed).integers(0, differences.size, size=(resamples, differences.size))
    draws = measure(differences[rows])
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(measure(differences[None])[0]), (float(low), float(high))
