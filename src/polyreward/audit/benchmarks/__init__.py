"""Benchmarks of reward models as tools, and how far a model's preferences can be believed.

`run_benchmark` scores any reward model on a file, `audit_model` on preferences. The parts: one correct solution against
many wrong ones (`OneToManyBenchmark`), personalised pairs (`PointwiseEvaluator`, `PairwiseEvaluator`), best of n,
whether a benchmark predicts what happens downstream (`benchmark_validity`, `predictive_validity`), style, and
calibration.
"""

from polyreward.audit.benchmarks.best_of_n import best_of_k, best_of_n_curve, bon_kl
from polyreward.audit.benchmarks.model_audit import ModelAudit, audit_model, rated_best_of_n
from polyreward.audit.benchmarks.one_to_many import OneToManyBenchmark, aggregate_steps, parse_rating
from polyreward.audit.benchmarks.personalized import (
    EvalReport,
    ModelView,
    PairBuilder,
    PairsBuilt,
    PairwiseEvaluator,
    PersonalizedPairItem,
    PointwiseEvaluator,
    evaluate_scores,
    judge_prompt,
    parse_result,
    quality_match,
    quality_match_report,
    rank_by_dot_product,
    rubric_score,
    rubric_scores,
)
from polyreward.audit.benchmarks.readers import (
    OneToManyFile,
    read_one_to_many,
    read_personalized,
    read_recorded_scores,
)
from polyreward.audit.benchmarks.reliability import (
    CalibrationCurve,
    GroupAccuracy,
    LengthEffect,
    accuracy_by,
    calibration_curve,
    length_only_accuracy,
    length_partial_effect,
    pairwise_calibration,
)
from polyreward.audit.benchmarks.run import BENCHMARKS, BenchmarkReport, report_pairs, run_benchmark
from polyreward.audit.benchmarks.style import style_features, style_gap
from polyreward.audit.benchmarks.validity import benchmark_validity, predictive_validity, selection_reliability

__all__ = [
    "BENCHMARKS",
    "BenchmarkReport",
    "CalibrationCurve",
    "EvalReport",
    "GroupAccuracy",
    "LengthEffect",
    "ModelAudit",
    "ModelView",
    "OneToManyBenchmark",
    "OneToManyFile",
    "PairBuilder",
    "PairsBuilt",
    "PairwiseEvaluator",
    "PersonalizedPairItem",
    "PointwiseEvaluator",
    "accuracy_by",
    "aggregate_steps",
    "audit_model",
    "benchmark_validity",
    "best_of_k",
    "best_of_n_curve",
    "bon_kl",
    "calibration_curve",
    "evaluate_scores",
    "judge_prompt",
    "length_only_accuracy",
    "length_partial_effect",
    "pairwise_calibration",
    "parse_rating",
    "parse_result",
    "predictive_validity",
    "quality_match",
    "quality_match_report",
    "rank_by_dot_product",
    "rated_best_of_n",
    "read_one_to_many",
    "read_personalized",
    "read_recorded_scores",
    "report_pairs",
    "rubric_score",
    "rubric_scores",
    "run_benchmark",
    "selection_reliability",
    "style_features",
    "style_gap",
]
