"""Rewards: what a sample is worth by rule, verifier or format, and how rewards compose into rewards.

A reward is TRL's own callable, ``reward(prompts, completions, **columns) -> list[float | None]``; None and NaN say
that it does not apply to a sample. `Reward` is the base of those defined here. ``REWARDS`` maps the names that recipes
use to import paths; each is called with the recipe's options. `RewardExecutor` runs any reward in processes of its own,
with a time limit for every sample.
"""

from polyreward.rewards.best_of_n import BestOfN, Selection
from polyreward.rewards.composition import Composed, affine, clip, gate, named, penalise, tier, weighted_sum
from polyreward.rewards.contract import Reward, RewardFunction, Sample, name_of, text_of, values_of
from polyreward.rewards.embedders import HashingEmbedder, LatentEmbedder, SentenceEmbedder
from polyreward.rewards.embedding_similarity import (
    EmbeddingSurrogateReward,
    RunningSigmoid,
    SquashedReward,
    unrelated_threshold,
)
from polyreward.rewards.executor import RewardExecutor, RewardFailureWarning, RewardTiming
from polyreward.rewards.formats import RegexFormat, TagFormat
from polyreward.rewards.gaussian_boxes import (
    BoxParser,
    BoxReward,
    GaussianCoverageReward,
    GaussianPointReward,
    GuiGroundingReward,
    SpatialGaussian,
    fixed_std,
)
from polyreward.rewards.group_length import GroupLengthPenalty, GroupLengthReward
from polyreward.rewards.groups import GroupReward
from polyreward.rewards.groupwise import (
    GroupPartitioner,
    GroupwiseReranker,
    PromptedScorer,
    SlidingWindowReranker,
    UnparsedGroupWarning,
    fuse,
    group_prompt,
)
from polyreward.rewards.harmo import FormatReward, HarmoReward, answer_harmo, harmo, variance_shares
from polyreward.rewards.hybrid import ConfidentRule, HybridReward
from polyreward.rewards.judge import JudgeReward, JudgeWarning
from polyreward.rewards.learned_verifier import VerifierFit, VerifierReward
from polyreward.rewards.length import LengthBudget, ThinkLengthReward, Trapezoid, TrapezoidReward
from polyreward.rewards.overlap import (
    OverlapReward,
    PointInBox,
    PointsReward,
    RelativeAccuracyReward,
    TranscriptionReward,
)
from polyreward.rewards.proximity import (
    BlockMatch,
    BoxProximity,
    GaussianBoxField,
    GridProximity,
    SequencePrefix,
    SequenceProximity,
)
from polyreward.rewards.ranking import (
    FormatGate,
    GroupRankReward,
    RankingUtilityReward,
    ScoreDistributionReward,
    grouprank,
)
from polyreward.rewards.ranking_measures import dcg, jensen_shannon, ndcg, rbo, recall
from polyreward.rewards.roles import (
    RoleAnswersReward,
    RoleAwareAccuracy,
    ShapedReward,
    cantelli_bound,
    multirole_r1,
    role_answers,
)
from polyreward.rewards.score_answers import format_answer, parse_scores
from polyreward.rewards.sweet_spot import SweetSpotReward, ZoneQuantizer
from polyreward.rewards.text_diversity import DiversityReward, diversity_metrics
from polyreward.rewards.tool_calls import ToolCallReward, ToolFormatReward, ToolUseCost, toolrl
from polyreward.rewards.verifiers import ExactMatch, FieldsCorrect, LinesCorrect, NumericAnswer, ReasoningGymScore

__all__ = [
    "REWARDS",
    "BestOfN",
    "BlockMatch",
    "BoxParser",
    "BoxProximity",
    "BoxReward",
    "Composed",
    "ConfidentRule",
    "DiversityReward",
    "EmbeddingSurrogateReward",
    "ExactMatch",
    "FieldsCorrect",
    "FormatGate",
    "FormatReward",
    "GaussianBoxField",
    "GaussianCoverageReward",
    "GaussianPointReward",
    "GridProximity",
    "GroupLengthPenalty",
    "GroupLengthReward",
    "GroupPartitioner",
    "GroupRankReward",
    "GroupReward",
    "GroupwiseReranker",
    "GuiGroundingReward",
    "HarmoReward",
    "HashingEmbedder",
    "HybridReward",
    "JudgeReward",
    "JudgeWarning",
    "LatentEmbedder",
    "LengthBudget",
    "LinesCorrect",
    "NumericAnswer",
    "OverlapReward",
    "PointInBox",
    "PointsReward",
    "PromptedScorer",
    "RankingUtilityReward",
    "ReasoningGymScore",
    "RegexFormat",
    "RelativeAccuracyReward",
    "Reward",
    "RewardExecutor",
    "RewardFailureWarning",
    "RewardFunction",
    "RewardTiming",
    "RoleAnswersReward",
    "RoleAwareAccuracy",
    "RunningSigmoid",
    "Sample",
    "ScoreDistributionReward",
    "Selection",
    "SentenceEmbedder",
    "SequencePrefix",
    "SequenceProximity",
    "ShapedReward",
    "SlidingWindowReranker",
    "SpatialGaussian",
    "SquashedReward",
    "SweetSpotReward",
    "TagFormat",
    "ThinkLengthReward",
    "ToolCallReward",
    "ToolFormatReward",
    "ToolUseCost",
    "TranscriptionReward",
    "Trapezoid",
    "TrapezoidReward",
    "UnparsedGroupWarning",
    "VerifierFit",
    "VerifierReward",
    "ZoneQuantizer",
    "affine",
    "answer_harmo",
    "cantelli_bound",
    "clip",
    "dcg",
    "diversity_metrics",
    "fixed_std",
    "format_answer",
    "fuse",
    "gate",
    "group_prompt",
    "grouprank",
    "harmo",
    "jensen_shannon",
    "multirole_r1",
    "name_of",
    "named",
    "ndcg",
    "parse_scores",
    "penalise",
    "rbo",
    "recall",
    "role_answers",
    "text_of",
    "tier",
    "toolrl",
    "unrelated_threshold",
    "values_of",
    "variance_shares",
    "weighted_sum",
]

REWARDS: dict[str, str] = {
    "box_proximity": "polyreward.rewards.proximity:BoxProximity",
    "diversity_reward": "polyreward.rewards.text_diversity:DiversityReward",
    "exact_match": "polyreward.rewards.verifiers:ExactMatch",
    "fields_correct": "polyreward.rewards.verifiers:FieldsCorrect",
    "format_reward": "polyreward.rewards.harmo:FormatReward",
    "grid_proximity": "polyreward.rewards.proximity:GridProximity",
    "grouprank": "polyreward.rewards.ranking:grouprank",
    "gui_grounding_reward": "polyreward.rewards.gaussian_boxes:GuiGroundingReward",
    "harmo": "polyreward.rewards.harmo:answer_harmo",
    "judge": "polyreward.rewards.judge:judge",
    "length_budget": "polyreward.rewards.length:LengthBudget",
    "lines_correct": "polyreward.rewards.verifiers:LinesCorrect",
    "multirole_r1": "polyreward.rewards.roles:multirole_r1",
    "numeric_answer": "polyreward.rewards.verifiers:NumericAnswer",
    "overlap_reward": "polyreward.rewards.overlap:OverlapReward",
    "point_in_box": "polyreward.rewards.overlap:PointInBox",
    "points_reward": "polyreward.rewards.overlap:PointsReward",
    "reasoning_gym_score": "polyreward.rewards.verifiers:ReasoningGymScore",
    "regex_format": "polyreward.rewards.formats:RegexFormat",
    "relative_accuracy_reward": "polyreward.rewards.overlap:RelativeAccuracyReward",
    "role_answers_reward": "polyreward.rewards.roles:RoleAnswersReward",
    "sequence_proximity": "polyreward.rewards.proximity:SequenceProximity",
    "tag_format": "polyreward.rewards.formats:TagFormat",
    "think_length_reward": "polyreward.rewards.length:ThinkLengthReward",
    "tool_call_reward": "polyreward.rewards.tool_calls:ToolCallReward",
    "tool_format_reward": "polyreward.rewards.tool_calls:ToolFormatReward",
    "tool_use_cost": "polyreward.rewards.tool_calls:ToolUseCost",
    "toolrl": "polyreward.rewards.tool_calls:toolrl",
    "transcription_reward": "polyreward.rewards.overlap:TranscriptionReward",
    "trapezoid_reward": "polyreward.rewards.length:TrapezoidReward",
}
