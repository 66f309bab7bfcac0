"""Rewards: what a sample is worth by rule, verifier or format, and how rewards compose into rewards.

A reward is TRL's own callable, ``reward(prompts, completions, **columns) -> list[float | None]``; None and NaN say
that it does not apply to a sample. `Reward` is the base of those defined here. ``REWARDS`` maps the names that recipes
use to import paths; each is called with the recipe's options. `RewardExecutor` runs any reward in processes of its own,
with a time limit for every sample.
"""

from polyreward.rewards.composition import Composed, affine, clip, gate, named, penalise, tier, weighted_sum
from polyreward.rewards.contract import Reward, RewardFunction, Sample, name_of, text_of, values_of
from polyreward.rewards.executor import RewardExecutor, RewardFailureWarning, RewardTiming
from polyreward.rewards.formats import RegexFormat, TagFormat
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
from polyreward.rewards.sweet_spot import SweetSpotReward, ZoneQuantizer
from polyreward.rewards.tool_calls import ToolCallReward, ToolFormatReward, ToolUseCost, toolrl
from polyreward.rewards.verifiers import ExactMatch, FieldsCorrect, LinesCorrect, NumericAnswer, ReasoningGymScore

__all__ = [
    "REWARDS",
    "BlockMatch",
    "BoxProximity",
    "Composed",
    "ExactMatch",
    "FieldsCorrect",
    "GaussianBoxField",
    "GridProximity",
    "LengthBudget",
    "LinesCorrect",
    "NumericAnswer",
    "OverlapReward",
    "PointInBox",
    "PointsReward",
    "ReasoningGymScore",
    "RegexFormat",
    "RelativeAccuracyReward",
    "Reward",
    "RewardExecutor",
    "RewardFailureWarning",
    "RewardFunction",
    "RewardTiming",
    "Sample",
    "SequencePrefix",
    "SequenceProximity",
    "SweetSpotReward",
    "TagFormat",
    "ThinkLengthReward",
    "ToolCallReward",
    "ToolFormatReward",
    "ToolUseCost",
    "TranscriptionReward",
    "Trapezoid",
    "TrapezoidReward",
    "ZoneQuantizer",
    "affine",
    "clip",
    "gate",
    "name_of",
    "named",
    "penalise",
    "text_of",
    "tier",
    "toolrl",
    "values_of",
    "weighted_sum",
]

REWARDS: dict[str, str] = {
    "box_proximity": "polyreward.rewards.proximity:BoxProximity",
    "exact_match": "polyreward.rewards.verifiers:ExactMatch",
    "fields_correct": "polyreward.rewards.verifiers:FieldsCorrect",
    "grid_proximity": "polyreward.rewards.proximity:GridProximity",
    "length_budget": "polyreward.rewards.length:LengthBudget",
    "lines_correct": "polyreward.rewards.verifiers:LinesCorrect",
    "numeric_answer": "polyreward.rewards.verifiers:NumericAnswer",
    "overlap_reward": "polyreward.rewards.overlap:OverlapReward",
    "point_in_box": "polyreward.rewards.overlap:PointInBox",
    "points_reward": "polyreward.rewards.overlap:PointsReward",
    "reasoning_gym_score": "polyreward.rewards.verifiers:ReasoningGymScore",
    "regex_format": "polyreward.rewards.formats:RegexFormat",
    "relative_accuracy_reward": "polyreward.rewards.overlap:RelativeAccuracyReward",
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
