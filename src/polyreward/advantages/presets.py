"""Published recipes as chains of parts, under the name of the paper or of the library that released them.

A preset is a function that returns a transform. Its defaults are the paper's; where released code differs in something
that changes results (epsilon, sample or population deviation, group or batch, what a group of one gets, floor and
guard, one pass or two), the difference is a named argument and the released code has a preset of its own.

Every preset takes `weights`, the weights of the rewards in the sum (a mapping by name, K numbers, or None for 1 each),
and maps the rewards (N, K) of a batch to advantages (N,) in their dtype. Rewards that do not apply (NaN) take part in
nothing and a row without any gets 0. A group of equal rewards gets exactly 0 wherever nothing is compared beyond the
group; a last step over the batch, its tokens or a task (REINFORCE++, GDPO, the released Gaussian one) moves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from polyreward.advantages.gaussian import Gaussianize
from polyreward.advantages.moving_scale import MovingScale
from polyreward.advantages.normal import By, Singleton
from polyreward.advantages.parts import Center, LeaveOneOut, Standardize, WeightedSum, Whiten
from polyreward.advantages.stratified import Stratify
from polyreward.advantages.transform import Transform, chain
from polyreward.errors import InvalidInputError, UnknownNameError, nearest

Weights = Mapping[str, float] | Sequence[float] | None
TRL_EPSILON = 1e-4
VERL_EPSILON = 1e-6
SAME_QUANTILE = 1e-9
"""Scores of an earlier pass that differ by no more are one quantile, reached in groups of different size."""


def reinforce(weights: Weights = None, *, baseline: By = "group", singleton: Singleton = "zero") -> Transform:
    """REINFORCE with the mean of `baseline` subtracted: (N, K) -> (N,).

    Paper: Simple statistical gradient-following algorithms for connectionist reinforcement learning (Williams, 1992).
    """
    return chain(WeightedSum(weights), Center(baseline, singleton))


def rloo(weights: Weights = None, *, singleton: Singleton = "zero") -> Transform:
    """RLOO, the mean of the other rows of the group as baseline: (N, K) -> (N,).

    Paper: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
    (arXiv 2402.14740).
    """
    return chain(WeightedSum(weights), LeaveOneOut("group", singleton))


def rloo_trl(weights: Weights = None, *, normalize: bool = False) -> Transform:
    """RLOO as in TRL's ``RLOOTrainer``; `normalize` standardises over the batch: (N, K) -> (N,).

    Paper: arXiv 2402.14740.
    """
    whole: list[Transform] = []
    if normalize:
        whole.append(Standardize("batch", epsilon=TRL_EPSILON, ignore_single="group"))
    return chain(WeightedSum(weights), LeaveOneOut("group"), *whole)


def rloo_verl(weights: Weights = None, *, singleton: Singleton = "raw") -> Transform:
    """RLOO as in verl, where a group of one keeps its reward (in ``rloo_vectorized`` it gets 0): (N, K) -> (N,).

    Paper: arXiv 2402.14740.
    """
    return chain(WeightedSum(weights), LeaveOneOut("group", singleton))


def grpo(weights: Weights = None, *, epsilon: float = 1e-6, ddof: int = 1) -> Transform:
    """GRPO, the sum standardised by its group: (N, K) -> (N,).

    The paper writes ``(r - mean(r)) / std(r)``, without epsilon and without saying which deviation; the sample
    deviation is what released code computes, and 1e-6 its smallest usual epsilon. `ddof` 0 is the population deviation.

    Paper: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv 2402.03300).
    """
    return chain(WeightedSum(weights), Standardize("group", epsilon=epsilon, ddof=ddof))


def grpo_trl(weights: Weights = None, *, scale_rewards: Literal["group", "batch", "none"] = "group") -> Transform:
    """GRPO as in TRL's ``GRPOTrainer`` (``sum_then_normalize``): (N, K) -> (N,).

    Epsilon 1e-4, sample deviation. `scale_rewards` "batch" divides by the deviation of all sums of the batch, "none"
    by nothing.

    Paper: arXiv 2402.03300; "batch" follows arXiv 2508.08221, "none" arXiv 2503.20783.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise InvalidInputError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}")
    if scale_rewards == "none":
        return chain(WeightedSum(weights), Center("group"))
    scale_by = None if scale_rewards == "group" else "batch"
    return chain(WeightedSum(weights), Standardize("group", scale_by, epsilon=TRL_EPSILON))


def grpo_verl(weights: Weights = None, *, scale: bool = True) -> Transform:
    """GRPO as in verl (``grpo``, ``grpo_vectorized``): (N, K) -> (N,).

    Epsilon 1e-6, sample deviation; a group of one has mean 0 and deviation 1, so it keeps its reward. ``scale=False``
    is verl's ``norm_adv_by_std_in_grpo=False``.

    Paper: arXiv 2402.03300.
    """
    part: Transform = Standardize("group", epsilon=VERL_EPSILON, singleton="raw") if scale else Center("group", "raw")
    return chain(WeightedSum(weights), part)


def dr_grpo(weights: Weights = None) -> Transform:
    """Dr. GRPO, the sum centred by its group and not scaled: (N, K) -> (N,).

    Paper: Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783).
    """
    return chain(WeightedSum(weights), Center("group"))


def reinforce_plus_plus(weights: Weights = None, *, epsilon: float = 1e-8, ddof: int = 1) -> Transform:
    """REINFORCE++, the sum standardised over the whole batch: (N, K) -> (N,).

    Paper: REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization
    (arXiv 2501.03262).
    """
    return chain(WeightedSum(weights), Standardize("batch", epsilon=epsilon, ddof=ddof))


def reinforce_plus_plus_baseline(weights: Weights = None, *, epsilon: float = 1e-8, ddof: int = 1) -> Transform:
    """REINFORCE++ with baseline, centred by the group and then standardised over the batch: (N, K) -> (N,).

    Paper: arXiv 2501.03262.
    """
    return chain(WeightedSum(weights), Center("group"), Standardize("batch", epsilon=epsilon, ddof=ddof))


def reinforce_plus_plus_verl(weights: Weights = None, *, weight: str | None = "length") -> Transform:
    """REINFORCE++ as in verl, whitened over the tokens of the batch: (N, K) -> (N,).

    A row counts by its length: needs the column `weight` (number of response tokens; None counts rows). Outcome rewards
    and verl's default discount of 1.

    Paper: arXiv 2501.03262.
    """
    return chain(WeightedSum(weights), Whiten("batch", weight))


def reinforce_plus_plus_baseline_verl(weights: Weights = None, *, weight: str | None = "length") -> Transform:
    """REINFORCE++ with baseline as in verl, where a group of one keeps its reward: (N, K) -> (N,).

    Centred by the group, then whitened over the tokens of the batch. Needs the column `weight`.

    Paper: arXiv 2501.03262.
    """
    return chain(WeightedSum(weights), Center("group", "raw"), Whiten("batch", weight))


def gdpo(weights: Weights = None, *, epsilon: float = 1e-6, ddof: int = 1) -> Transform:
    """GDPO, each reward standardised by its group, summed, then standardised over the batch: (N, K) -> (N,).

    Paper: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization
    (arXiv 2601.05242).
    """
    inner, outer = (Standardize(by, epsilon=epsilon, ddof=ddof) for by in ("group", "batch"))
    return chain(inner, WeightedSum(weights), outer)


def gdpo_trl(weights: Weights = None) -> Transform:
    """GDPO as in TRL (``multi_objective_aggregation="normalize_then_sum"``): (N, K) -> (N,).

    Epsilon 1e-4 in both steps.

    Paper: arXiv 2601.05242.
    """
    return gdpo(weights, epsilon=TRL_EPSILON)


def gdpo_verl(weights: Weights = None, *, scale: bool = True, weight: str | None = "length") -> Transform:
    """GDPO as in verl: (N, K) -> (N,).

    Each reward standardised by its group (epsilon 1e-6, a group of one keeps its reward), summed, then whitened over
    the tokens of the batch. Needs the column `weight` (number of response tokens).

    Paper: arXiv 2601.05242.
    """
    part: Transform = Standardize("group", epsilon=VERL_EPSILON, singleton="raw") if scale else Center("group", "raw")
    return chain(part, WeightedSum(weights), Whiten("batch", weight))


def stratified_grpo(
    weights: Weights = None, *, blend: float = 0.8, by: By = "stratum", epsilon: float = 1e-6, ddof: int = 0
) -> Transform:
    """Stratified GRPO, a blend of the comparison inside the stratum and inside the group: (N, K) -> (N,).

    `blend` is alpha in the paper; a row of stratum -1 takes no part. Needs the column `by`.

    Paper: Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents
    (arXiv 2510.06214).
    """
    return chain(WeightedSum(weights), Stratify(blend, by, epsilon, ddof))


def ema_grpo(
    weights: Weights = None,
    *,
    by: By = "task",
    decay: float = 0.99,
    minimum: float = 0.0,
    epsilon: float = 0.0,
    guard: float | None = None,
    moment: Literal["task", "group"] = "task",
    singleton: Literal["error", "zero"] = "error",
) -> Transform:
    """EMA-GRPO, centred by the group and divided by a moving deviation of the task: (N, K) -> (N,). Has memory.

    The paper's formula: no floor, no epsilon, no guard. Needs the column `by`. See `MovingScale`.

    Paper: OneThinker: All-in-one Reasoning Model for Image and Video (arXiv 2512.03043).
    """
    return chain(WeightedSum(weights), MovingScale(by, decay, minimum, epsilon, guard, moment, singleton))


def ema_grpo_released(
    weights: Weights = None,
    *,
    by: By = "task",
    decay: float = 0.99,
    minimum: float = 1e-3,
    epsilon: float = 1e-6,
    guard: float | None = 5.0,
    singleton: Literal["error", "zero"] = "error",
) -> Transform:
    """EMA-GRPO as its code was released: floor 1e-3, epsilon 1e-6, guard 5: (N, K) -> (N,). Has memory.

    A group with an ``|advantage|`` above the guard falls back to GRPO with the population deviation.

    Paper: arXiv 2512.03043.
    """
    return ema_grpo(weights, by=by, decay=decay, minimum=minimum, epsilon=epsilon, guard=guard, singleton=singleton)


def gaussian_grpo(
    weights: Weights = None,
    *,
    by: By = "task",
    levels: Sequence[By] | None = None,
    zero_dead_groups: bool = True,
    tolerance: float = 1e-6,
) -> Transform:
    """Gaussian GRPO (G2RPO), ranks mapped onto N(0, 1), inside the group and then over the task: (N, K) -> (N,).

    Parameters
    ----------
    by : keys of the last level
    levels : sequence of keys, or None for ``("group", by)``
        One pass for each, every one on the scores of the one before. The training code makes these two passes;
        ``(by,)`` ranks all rewards of a task at once, as the paper's equation reads, and ``("group",)`` the group only.
    zero_dead_groups : bool
        Segments of the first level without a preference (all values tie, or one row) are left out of later passes and
        get 0, as the authors filter such groups before. False: they get a constant that is not 0 in general.
    tolerance : float >= 0
        Sums that differ by no more than this are ties in the first pass. 0 is equality to the bit.

    Needs the columns that the levels name.

    Paper: OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks (arXiv 2604.08539).
    """
    return chain(WeightedSum(weights), *_passes(by, levels, zero_dead_groups, tolerance))


def gaussian_grpo_released(weights: Weights = None, *, by: By = "task") -> Transform:
    """Gaussian GRPO as its code was released: (N, K) -> (N,).

    Two passes, ties to the bit, and groups of equal rewards take part in the second pass.

    Paper: arXiv 2604.08539.
    """
    return gaussian_grpo(weights, by=by, zero_dead_groups=False, tolerance=0.0)


def gaussian_gdpo(
    weights: Weights = None, *, by: By = "task", zero_dead_groups: bool = True, tolerance: float = 1e-6
) -> Transform:
    """GS-GDPO, each reward ranked inside the group, summed, then ranked over the task: (N, K) -> (N,).

    Needs the column `by`.

    Paper: arXiv 2604.08539 (variant of the released code).
    """
    last = Gaussianize(by, tolerance, "group" if zero_dead_groups else None)
    return chain(Gaussianize("group", tolerance), WeightedSum(weights), last)


def _passes(by: By, levels: Sequence[By] | None, zero_dead_groups: bool, tolerance: float) -> list[Transform]:
    if isinstance(levels, str) or (levels is not None and not len(levels)):
        raise InvalidInputError(f"levels must be a sequence of keys such as ('group', 'task'), got {levels!r}")
    first, *others = ("group", by) if levels is None else tuple(levels)
    dead = first if zero_dead_groups else None
    return [Gaussianize(first, tolerance), *(Gaussianize(keys, SAME_QUANTILE, dead) for keys in others)]


PRESETS: dict[str, Callable[..., Transform]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        reinforce, rloo, rloo_trl, rloo_verl, grpo, grpo_trl, grpo_verl, dr_grpo, reinforce_plus_plus,
        reinforce_plus_plus_baseline, reinforce_plus_plus_verl, reinforce_plus_plus_baseline_verl, gdpo, gdpo_trl,
        gdpo_verl, stratified_grpo, ema_grpo, ema_grpo_released, gaussian_grpo, gaussian_grpo_released, gaussian_gdpo,
    )
}  # fmt: skip
"""Every preset by its name on the command line and in recipes."""


def preset(name: str, **parameters: Any) -> Transform:
    """Make the preset called `name` (dashes or underscores).

    Raises
    ------
    UnknownNameError
        No such preset or parameter; the message offers the nearest one.
    """
    name = name.replace("_", "-")
    if name not in PRESETS:
        raise UnknownNameError(f"no preset {name!r}{nearest(name, PRESETS)}")
    known = inspect.signature(PRESETS[name]).parameters
    for parameter in parameters:
        if parameter not in known:
            raise UnknownNameError(f"preset {name!r} has no parameter {parameter!r}{nearest(parameter, known)}")
    return PRESETS[name](**parameters)
