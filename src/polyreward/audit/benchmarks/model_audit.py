"""A reward model against preferences: one record of accuracy, calibration, length and annotators, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from polyreward.audit.benchmarks.best_of_n import bon_kl
from polyreward.audit.benchmarks.intervals import Interval, bootstrap_ratios, check_resampling, numbers, wilson
from polyreward.audit.benchmarks.reliability import (
    CalibrationCurve,
    GroupAccuracy,
    LengthEffect,
    accuracy_by,
    length_only_accuracy,
    length_partial_effect,
    pairwise_calibration,
)
from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.heads import Scores
from polyreward.reward_models.texts import plain
from polyreward.tilting import expected_best_of_n

Progress = Callable[[int, int], None]
ROWS = 2048
SELECTED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class ModelAudit:
    """What `audit_model` found. Figures that need lengths are None where responses are no texts.

    Attributes
    ----------
    source : str
        Where the preferences come from.
    comparisons, pairs, judged_ties, equal_scores, unscored : int
        Comparisons; pairs with a preference; pairs that people judged to be ties; pairs with a preference to which the
        model gives equal scores; pairs left out because the model has no opinion (NaN).
    accuracy : float
        Share of the pairs in the right order, each comparison counting the same; equal scores count half.
    accuracy_interval : (low, high), bootstrap over prompts
    probabilities : "model", or "sigmoid" of the margin where the model offers no probability
    calibration : CalibrationCurve of the pairs with a preference
    length_only : GroupAccuracy of preferring the longer response, or None
    length_effect : LengthEffect or None
    accuracy_longer, accuracy_shorter : GroupAccuracy or None
        Where the longer, and where the shorter response was preferred.
    per_annotator : list of GroupAccuracy; empty without annotators
    unknown_annotators : int
        Annotators whom the model has not seen (0 where it does not know annotators).
    by_column : mapping of column to list of GroupAccuracy
    margin_quantiles : mapping of quantile to margin of the preferred over the other response
    best_of_n : list of dict, as of `rated_best_of_n`; empty without ratings
    """

    source: str
    comparisons: int
    pairs: int
    judged_ties: int
    equal_scores: int
    unscored: int
    accuracy: float
    accuracy_interval: Interval
    probabilities: str
    calibration: CalibrationCurve
    length_only: GroupAccuracy | None = None
    length_effect: LengthEffect | None = None
    accuracy_longer: GroupAccuracy | None = None
    accuracy_shorter: GroupAccuracy | None = None
    per_annotator: list[GroupAccuracy] = field(default_factory=list)
    unknown_annotators: int = 0
    by_column: Mapping[str, list[GroupAccuracy]] = field(default_factory=dict)
    margin_quantiles: Mapping[float, float] = field(default_factory=dict)
    best_of_n: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is None."""
        made: dict[str, Any] = plain_json(self)
        return made


def audit_model(
    model: Any,
    data: PreferenceData,
    *,
    lengths: Any = None,
    by: Sequence[str] = (),
    bins: int = 10,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelAudit:
    """Audit a reward model on preferences.

    Parameters
    ----------
    model : RewardModel, or function of (prompts, completions) -> scores
        With annotators in the data, ``score`` is called with ``annotator=...``. Probabilities are the model's own where
        it is a `PreferenceModel`, else the sigmoid of the margin.
    data : PreferenceData
    lengths : (M,), optional
        Of all responses; default their words, where they are texts or messages.
    by : columns of the data whose values get an accuracy each
    bins : int
        Of the calibration curve.
    progress : (responses scored, all) -> None

    Raises
    ------
    InvalidInputError
        No comparison, none with a preference, scores of another shape, lengths that do not fit.
    MissingColumnError
        A column of `by` that the data does not have.
    """
    check_resampling(resamples, level)
    if not isinstance(data, PreferenceData) or not len(data):
        raise InvalidInputError(f"expected PreferenceData with a comparison, got {type(data).__name__}")
    groups = {name: _values(data, name) for name in by}
    table = ComparisonTable(data)
    table.require_order()
    pairs = table.batch(np.arange(len(data))).pairs
    first, second, tie, weight, owner = (
        part.numpy() for part in (pairs.first, pairs.second, pairs.tie, pairs.weight.double(), pairs.comparison)
    )
    scores, probability, own = _judged(model, data, first, second, owner, progress)
    margin = scores[first] - scores[second]
    known = ~np.isnan(margin)
    part = known & ~tie
    if not part.any():
        raise InvalidInputError(f"{data.source}: the model has scores for no pair with a preference")
    d, where = margin[part], owner[part]
    right = 0.5 + 0.5 * np.sign(d)
    prompts = data.groups("prompt")[where]
    sums = np.stack([np.bincount(prompts, values) for values in (weight[part] * right, weight[part])], axis=1)
    sums = sums[sums[:, 1] > 0]
    low, high = bootstrap_ratios(sums[:, :1], sums[:, 1:], resamples=resamples, level=level, rng=seed)
    annotators = None if data.annotators is None else [data.annotators[i] for i in where.tolist()]
    return ModelAudit(
        data.source,
        len(data),
        int(part.sum()),
        int(tie.sum()),
        int((d == 0).sum()),
        int((~known & ~tie).sum()),
        float(sums[:, 0].sum() / sums[:, 1].sum()),
        (float(low[0]), float(high[0])),
        "model" if own else "sigmoid",
        pairwise_calibration(probability[part], bins=bins, resamples=resamples, level=level, seed=seed),
        **_lengths(_length_of(data, lengths), first[part], second[part], d, level),
        per_annotator=[] if annotators is None else accuracy_by(annotators, d, level=level),
        unknown_annotators=_unknown(model, data),
        by_column={
            name: accuracy_by([values[i] for i in where.tolist()], d, level=level) for name, values in groups.items()
        },
        margin_quantiles=dict(zip(QUANTILES, np.quantile(d, QUANTILES).tolist(), strict=True)),
        best_of_n=rated_best_of_n(data, scores, resamples=resamples, level=level, seed=seed),
    )


def rated_best_of_n(
    data: PreferenceData, scores: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[dict[str, float]]:
    """What selecting by the scores does to people's ratings, exact over all subsets: proxy against gold over KL.

    Taken from the comparisons with the most common number N of responses, all of them rated and scored.

    Returns
    -------
    list of dict
        For each n up to N: ``n``, ``kl`` in nats, mean ``score`` and ``rating`` of the selected response, and ``low``
        and ``high`` of the rating (bootstrap over comparisons). Empty without such comparisons.
    """
    if data.ratings is None:
        return []
    starts = np.asarray(data.offsets)[:-1]
    whole = np.logical_and.reduceat(~np.isnan(data.ratings) & np.isfinite(scores), starts)
    sizes = np.where(whole, data.sizes, 0)
    most = int(np.bincount(sizes, minlength=2)[1:].argmax() + 1)
    if most < 2:
        return []
    rows = starts[sizes == most][:, None] + np.arange(most)
    ns = [n for n in SELECTED if n < most] + [most]
    proxy, gold = (np.asarray(expected_best_of_n(scores[rows], ns, worth[rows])) for worth in (scores, data.ratings))
    low, high = bootstrap_ratios(gold, resamples=resamples, level=level, rng=seed)
    columns = (ns, bon_kl(np.array(ns)).tolist(), proxy.mean(0).tolist(), gold.mean(0).tolist(), low, high)
    names = ("n", "kl", "score", "rating", "low", "high")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def score_rows(
    model: Any,
    prompts: Any,
    completions: Any,
    annotators: Any = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Scores of any reward model, or function, in pieces; float64 (N,), NaN where it has no opinion.

    Raises
    ------
    InvalidInputError
        No reward model, or scores of another shape.
    """
    call = getattr(model, "score", model)
    if not callable(call):
        raise InvalidInputError(f"expected a reward model with score(prompts, completions), got {type(model).__name__}")
    total = len(completions)
    found = [np.zeros(0)]
    for start in range(0, total, ROWS):
        rows = slice(start, start + ROWS)
        options = {} if annotators is None else {"annotator": annotators[rows]}
        given = call(prompts[rows], completions[rows], **options)
        scores = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64)
        if scores.shape != (min(ROWS, total - start),):
            raise InvalidInputError(
                f"the model gave scores of shape {scores.shape} for {min(ROWS, total - start)} completions"
            )
        found.append(scores)
        if progress is not None:
            progress(min(start + ROWS, total), total)
    return np.concatenate(found)


def _judged(
    model: Any,
    data: PreferenceData,
    first: np.ndarray,
    second: np.ndarray,
    owner: np.ndarray,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Score of every response, probability of every pair, and whether the latter is the model's own."""
    prompts = data.of_responses(data.prompts)
    annotators = None if data.annotators is None else data.of_responses(data.annotators)
    own = hasattr(model, "evaluate_head") and hasattr(getattr(model, "likelihood", None), "probability")
    if not own:
        scores = score_rows(model, prompts, data.responses, annotators, progress)
        return scores, 1 / (1 + np.exp(-np.clip(scores[first] - scores[second], -700, 700))), False
    scores, probability = np.zeros(len(data.responses)), np.zeros(len(first))
    offsets = np.asarray(data.offsets)
    start = 0
    while start < len(data):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + ROWS, side="right")) - 1)
        rows = slice(int(offsets[start]), int(offsets[stop]))
        here = np.flatnonzero((owner >= start) & (owner < stop))
        said = model.evaluate_head(
            prompts[rows], data.responses[rows], None if annotators is None else annotators[rows]
        )
        sides = [_rows(said, side[here] - rows.start) for side in (first, second)]
        scores[rows] = model.likelihood.score(said).double().cpu().numpy()
        probability[here] = model.likelihood.probability(*sides).double().cpu().numpy()
        start = stop
        if progress is not None:
            progress(rows.stop, len(data.responses))
    # rounding may put a probability a hair outside
    return scores, np.clip(probability, 0, 1), True


def _rows(scores: Scores, index: np.ndarray) -> Scores:
    weights = scores.log_weights
    return Scores(scores.values[index], None if weights is None else weights[index])


def _values(data: PreferenceData, name: str) -> Any:
    data.groups(name)  # its error names the nearest column
    return data.prompts if name == "prompt" else data.annotators if name == "annotator" else data.columns[name]


def _unknown(model: Any, data: PreferenceData) -> int:
    if not getattr(model, "annotators", ()) or not hasattr(model, "knows"):
        return 0
    return int((~model.knows(data.annotator_names)).sum()) if data.annotator_names else 0


def _length_of(data: PreferenceData, lengths: Any) -> np.ndarray | None:
    if lengths is not None:
        given = numbers(lengths, "lengths", 1)
        if len(given) != len(data.responses):
            raise InvalidInputError(f"lengths has {len(given)} entries for {len(data.responses)} responses")
        return given
    if isinstance(data.responses, np.ndarray) or not all(isinstance(r, str | list) for r in data.responses):
        return None
    return np.array([len(plain(response, row=i).split()) for i, response in enumerate(data.responses)], np.float64)


def _lengths(
    lengths: np.ndarray | None, first: np.ndarray, second: np.ndarray, margin: np.ndarray, level: float
) -> dict[str, Any]:
    if lengths is None:
        return {}
    difference = lengths[first] - lengths[second]
    found: dict[str, Any] = {"length_only": length_only_accuracy(lengths[first], lengths[second], level=level)}
    if difference.any() and margin.any() and len(margin) > 1:
        found["length_effect"] = length_partial_effect(margin, difference, level=level)
    for name, part in (("accuracy_longer", difference > 0), ("accuracy_shorter", difference < 0)):
        if part.any():
            won = float((0.5 + 0.5 * np.sign(margin[part])).sum())
            low, high = wilson(won, part.sum(), level)
            share = won / int(part.sum())
            found[name] = GroupAccuracy(name[len("accuracy_") :], share, float(low), float(high), int(part.sum()))
    return found


def plain_json(value: Any) -> Any:
    """Dataclasses, arrays and mappings as plain values for JSON; what is not finite is None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain_json(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain_json(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
