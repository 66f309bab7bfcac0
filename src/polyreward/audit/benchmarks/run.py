"""Any reward model on a benchmark file: RewardMATH's problems, personalised pairs, or plain preferences.

    report = run_benchmark(model, "rewardmath", "rewardmath_direct.json.gz")
    report.figures["accuracy"], report.intervals["accuracy"], report.tables["per source"]

Evaluating Robustness of Reward Models for Mathematical Reasoning, arXiv 2410.01729; Personalized RewardBench, arXiv
2604.07343.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import Interval, wilson
from polyreward.audit.benchmarks.model_audit import ModelAudit, Progress, audit_model, plain_json, score_rows
from polyreward.audit.benchmarks.one_to_many import FIGURES, OneToManyBenchmark
from polyreward.audit.benchmarks.personalized import (
    EvalReport,
    PersonalizedPairItem,
    PointwiseEvaluator,
    evaluate_scores,
    users_of,
)
from polyreward.audit.benchmarks.personalized_items import POSTS, Condition
from polyreward.audit.benchmarks.readers import read_one_to_many, read_personalized, read_recorded_scores, rows_of
from polyreward.audit.benchmarks.style import style_features, style_gap
from polyreward.data.preferences import read_preferences
from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.preferences import PreferenceData

BENCHMARKS = ("rewardmath", "personalized", "pairs")


@dataclass(frozen=True)
class BenchmarkReport:
    """Figures of a reward model on a benchmark.

    Attributes
    ----------
    benchmark : "rewardmath", "personalized" or "pairs"
    path, model : str
    figures : mapping of name to figure
    intervals : mapping of name to its 95 % interval, for figures that have one
    tables : mapping of title to rows, each a mapping of column to value
        "per source", "per user", "per category", "per annotator", "style", "calibration", "per <column>".
    counts : mapping of name to whole number
    notes : sentences for the reader: what is no comparison, what was left out
    audit : ModelAudit of plain pairs, else None
    """

    benchmark: str
    path: str
    model: str
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    tables: Mapping[str, list[dict[str, Any]]]
    counts: Mapping[str, int]
    notes: list[str] = field(default_factory=list)
    audit: ModelAudit | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is None."""
        made: dict[str, Any] = plain_json(self)
        return made


def run_benchmark(
    model: Any,
    name: Literal["rewardmath", "personalized", "pairs"],
    path: str | Path,
    *,
    how: str = "prod",
    conditions: Sequence[Condition] | None = None,
    profile_k: int = POSTS,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    by: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Score a benchmark file with a reward model.

    Parameters
    ----------
    model : RewardModel, or function of (prompts, completions) -> scores
        None for a file of recorded scores, whose figures need no model.
    name : "rewardmath"
        One row a solution (`read_one_to_many`), or recorded scores (`read_recorded_scores`), aggregated by `how`.
    name : "personalized"
        `read_personalized`. `conditions`: "question", "profile" (with `profile_k` posts), "oracle"; default the
        question, and the profile where every item has one. Items with a ``user`` are scored with ``annotator=user``.
    name : "pairs"
        Preferences of `read_preferences` in `layout` with `columns`; `by`: columns whose values get an accuracy.
    progress : (scored, all) -> None

    Raises
    ------
    UnknownNameError
        Another benchmark.
    MissingFileError, MissingColumnError, InvalidInputError
        The message names file, row and field; also for a score that is NaN.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError(f"unknown benchmark {name!r}{nearest(str(name), BENCHMARKS)}")
    common = (name, str(path), _name_of(model))
    if name == "rewardmath":
        return BenchmarkReport(*common, **_rewardmath(model, path, how, resamples, seed, progress))
    if model is None:
        raise InvalidInputError(f"benchmark {name!r} needs a reward model")
    if name == "personalized":
        return BenchmarkReport(*common, **_personalized(model, path, conditions, profile_k, resamples, seed, progress))
    data = read_preferences(path, layout=layout, columns=columns)
    return report_pairs(model, data, by=by, resamples=resamples, seed=seed, progress=progress)


def report_pairs(model: Any, data: PreferenceData, **options: Any) -> BenchmarkReport:
    """The benchmark "pairs" on preferences that are there already; `options` as of `audit_model`."""
    return BenchmarkReport("pairs", data.source, _name_of(model), **_pairs(audit_model(model, data, **options)))


def _name_of(model: Any) -> str:
    if model is None:
        return "recorded scores"
    return str(getattr(model, "name", None) or getattr(model, "__name__", None) or type(model).__name__)


def _rewardmath(
    model: Any, path: str | Path, how: str, resamples: int, seed: int, progress: Progress | None
) -> dict[str, Any]:
    first, _ = next(iter(rows_of(path)))
    tables: dict[str, list[dict[str, Any]]] = {}
    extra: dict[str, float] = {}
    if "score" in first or "output" in first:
        if model is not None:
            raise InvalidInputError(
                f"{path} holds recorded scores, and no solutions to be scored; pass model=None to evaluate them"
            )
        bench = read_recorded_scores(path, how)
    elif model is None:
        raise InvalidInputError(f"{path} holds solutions; a reward model is needed to score them")
    else:
        file = read_one_to_many(path)
        scores = score_rows(model, file.prompts, file.completions, progress=progress)
        if np.isnan(scores).any():
            raise InvalidInputError(f"{path}, row {int(np.isnan(scores).argmax()) + 1}: the model's score is NaN")
        bench = file.benchmark(scores)
        style = style_features(file.completions)
        gaps = style_gap(*({key: v[part] for key, v in style.items()} for part in (file.correct, ~file.correct)))
        tables["style"] = [
            {"feature": key, **{k: v for k, v in gap.items() if k != "interval"}, "low": gap["interval"][0],
             "high": gap["interval"][1]}
            for key, gap in gaps.items()
        ]  # fmt: skip
        extra = {
            "accuracy of the longest": float(file.benchmark(style["words"]).outcomes()["accuracy"].mean()),
            "accuracy of the shortest": float(file.benchmark(-style["words"]).outcomes()["accuracy"].mean()),
        }
    report = bench.evaluate(_mode(bench), resamples=resamples, seed=seed)
    bounds = report["intervals"]["per_source_accuracy"]
    tables["per source"] = [
        {"source": source or "(none)", "accuracy": share, "low": bounds[source][0], "high": bounds[source][1],
         "solutions": report["per_source_count"][source]}
        for source, share in report["per_source_accuracy"].items()
    ]  # fmt: skip
    figures = {key: report[key] for key in FIGURES}
    figures |= {f"{key} of random scores": value for key, value in report["random_level"].items()} | extra
    notes = [f"{report['duplicates']} rows of problems that were there already are left out"] * bool(
        report["duplicates"]
    )
    return {
        "figures": figures,
        "intervals": {key: report["intervals"][key] for key in FIGURES},
        "tables": tables,
        "counts": {"problems": report["problems"], "wrong solutions": int(bench.sizes.sum())},
        "notes": notes,
    }


def _mode(bench: OneToManyBenchmark) -> Literal["scalar", "pairwise"]:
    return "scalar" if bench.has_scores else "pairwise"


def _personalized(
    model: Any,
    path: str | Path,
    conditions: Sequence[Condition] | None,
    profile_k: int,
    resamples: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    items = read_personalized(path)
    if conditions is None:
        conditions = ("question", "profile") if all(len(item.profile) for item in items) else ("question",)
    if not conditions or "inferred" in conditions:
        raise InvalidInputError(
            f"conditions must be of question, profile and oracle, got {conditions!r}; for inferred aspects use "
            "PointwiseEvaluator with a planner"
        )
    known = all(item.user is not None for item in items)
    total = 2 * len(items) * len(conditions)
    figures: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    counts = {"items": len(items), "users": len(set(users_of(items)))}
    notes = []
    for number, condition in enumerate(conditions):

        def score(prompts: list[str], answers: list[str], annotator: Any = None, number: int = number) -> np.ndarray:
            def advance(done: int, _: int) -> None:
                if progress is not None:
                    progress(2 * len(items) * number + done, total)

            return score_rows(model, prompts, answers, annotator, advance)

        report = PointwiseEvaluator(score, annotators=known).evaluate(
            items, condition, profile_k=profile_k, resamples=resamples, seed=seed
        )
        figures |= {f"accuracy ({condition})": report.accuracy, f"mean gap ({condition})": report.mean_gap}
        intervals[f"accuracy ({condition})"] = report.ci95
        counts[f"ties ({condition})"] = report.ties
        if condition == "oracle":
            notes.append("the oracle condition shows the hidden aspects: an upper bound, never a figure to compare by")
    shortcut = _length_only(items, resamples, seed)
    figures["accuracy of the longer answer"] = shortcut.accuracy
    intervals["accuracy of the longer answer"] = shortcut.ci95
    tables = {
        f"per {kind}": _table(kind, shares, report.counts[kind])
        for kind, shares in (("user", report.per_user), ("category", report.per_category))
    }
    notes.append(f"tables are of the condition {report.condition!r}; accuracy without a profile above 0.5 is what "
                 "everybody prefers, and no personalisation")  # fmt: skip
    return {"figures": figures, "intervals": intervals, "tables": tables, "counts": counts, "notes": notes}


def _length_only(items: Sequence[PersonalizedPairItem], resamples: int, seed: int) -> EvalReport:
    words = [
        [float(len(text.split())) for text in texts]
        for texts in zip(*((i.chosen, i.rejected) for i in items), strict=True)
    ]
    return evaluate_scores(words[0], words[1], resamples=resamples, seed=seed)


def _table(kind: str, shares: Mapping[str, float], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    rows = []
    for name, share in shares.items():
        low, high = wilson(share * counts[name], counts[name])
        rows.append({kind: name, "accuracy": share, "low": float(low), "high": float(high), "items": counts[name]})
    return rows


def _pairs(audit: ModelAudit) -> dict[str, Any]:
    curve, effect = audit.calibration, audit.length_effect
    figures = {
        "accuracy": audit.accuracy,
        "calibration error": curve.ece,
        "log loss": curve.log_loss,
        "Brier score": curve.brier,
        "reliability": curve.reliability,
        "resolution": curve.resolution,
    }
    intervals = {"accuracy": audit.accuracy_interval, "calibration error": curve.ece_interval}
    for name, group in (
        ("accuracy of the longer response", audit.length_only),
        ("accuracy where the longer is preferred", audit.accuracy_longer),
        ("accuracy where the shorter is preferred", audit.accuracy_shorter),
    ):
        if group is not None:
            figures[name], intervals[name] = group.accuracy, (group.low, group.high)
    if effect is not None:
        figures |= {"effect of the score": effect.score, "effect of length": effect.length}
        intervals |= {"effect of the score": effect.score_interval, "effect of length": effect.length_interval}
        figures["correlation of score and length"] = effect.correlation
    tables = {
        "calibration": [
            {"from": curve.edges[i], "to": curve.edges[i + 1], "stated": curve.stated[i], "right": curve.happened[i],
             "low": curve.low[i], "high": curve.high[i], "pairs": curve.count[i]}
            for i in range(len(curve.count))
        ],
        **{
            f"per {name}": [
                {name: g.name, "accuracy": g.accuracy, "low": g.low, "high": g.high, "pairs": g.pairs} for g in groups
            ]
            for name, groups in {"annotator": audit.per_annotator, **audit.by_column}.items()
            if groups
        },
    }  # fmt: skip
    if audit.best_of_n:
        tables["best of n"] = [
            {"KL, nats" if name == "kl" else name: value for name, value in row.items()} for row in audit.best_of_n
        ]
    counts = {
        "comparisons": audit.comparisons,
        "pairs": audit.pairs,
        "judged ties": audit.judged_ties,
        "equal scores": audit.equal_scores,
        "unscored pairs": audit.unscored,
        "unknown annotators": audit.unknown_annotators,
    }
    notes = []
    if audit.probabilities == "sigmoid":
        notes.append("the model offers no probability: calibration is of the sigmoid of its margins")
    if effect is not None and effect.separable:
        notes.append("score and length explain every preference: their effects have no finite estimate")
    if audit.unscored:
        notes.append(f"{audit.unscored} pairs to which the model gives no score are left out")
    return {
        "figures": figures, "intervals": intervals, "tables": tables, "counts": counts, "notes": notes, "audit": audit,
    }  # fmt: skip
