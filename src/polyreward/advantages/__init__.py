"""Advantages: from the rewards of a batch to one number a sample.

A transform maps a signal and its batch to a signal; `chain` and `blend` combine transforms, and a published recipe is a
preset that returns such a chain. `compute_advantages` runs one on a `RewardBatch`:

    advantages = compute_advantages(stratified_grpo(blend=0.8), batch)
    advantages = compute_advantages(chain(WeightedSum(), Center("group"), Scale("task")), batch)

``PRESETS`` and ``PARTS`` map the names that recipes use to presets and parts.
"""

from polyreward.advantages.config import PARTS, columns_of, from_config, to_code, to_config
from polyreward.advantages.gaussian import Gaussianize, gaussianize
from polyreward.advantages.moving_scale import MovingScale, TaskMoments
from polyreward.advantages.parts import Center, LeaveOneOut, Scale, Standardize, WeightedSum, Whiten
from polyreward.advantages.presets import (
    PRESETS,
    dr_grpo,
    ema_grpo,
    ema_grpo_released,
    gaussian_gdpo,
    gaussian_grpo,
    gaussian_grpo_released,
    gdpo,
    gdpo_trl,
    gdpo_verl,
    grpo,
    grpo_trl,
    grpo_verl,
    preset,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    reinforce_plus_plus_baseline_verl,
    reinforce_plus_plus_verl,
    rloo,
    rloo_trl,
    rloo_verl,
    stratified_grpo,
)
from polyreward.advantages.stratified import UNUSED, Stratify, by_key, by_quantile, by_tool_calls
from polyreward.advantages.transform import Blend, Chain, Multiply, Transform, blend, chain, compute_advantages
from polyreward.advantages.turns import FusedAdvantage, degenerate_group_ratio

__all__ = [
    "PARTS",
    "PRESETS",
    "UNUSED",
    "Blend",
    "Center",
    "Chain",
    "FusedAdvantage",
    "Gaussianize",
    "LeaveOneOut",
    "MovingScale",
    "Multiply",
    "Scale",
    "Standardize",
    "Stratify",
    "TaskMoments",
    "Transform",
    "WeightedSum",
    "Whiten",
    "blend",
    "by_key",
    "by_quantile",
    "by_tool_calls",
    "chain",
    "columns_of",
    "compute_advantages",
    "degenerate_group_ratio",
    "dr_grpo",
    "ema_grpo",
    "ema_grpo_released",
    "from_config",
    "gaussian_gdpo",
    "gaussian_grpo",
    "gaussian_grpo_released",
    "gaussianize",
    "gdpo",
    "gdpo_trl",
    "gdpo_verl",
    "grpo",
    "grpo_trl",
    "grpo_verl",
    "preset",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reinforce_plus_plus_baseline_verl",
    "reinforce_plus_plus_verl",
    "rloo",
    "rloo_trl",
    "rloo_verl",
    "stratified_grpo",
    "to_code",
    "to_config",
]
