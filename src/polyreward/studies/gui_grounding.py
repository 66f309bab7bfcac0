"""GUI-G2: Gaussian rewards of boxes against sparse ones, where the policy starts beside the element.

Claim: smooth rewards of the offset and of the overlap, both with a spread that follows the size of the element, learn
where a hit reward has nothing to say: on ScreenSpot-v2 93.3 against 87.4 (hit), 85.8 (IoU) and 86.5 (both), and 88.4
where the Gaussian counts only inside the element (arXiv 2507.15846).

The task. 400 elements; each has a diagonal normal policy over centre and log-sizes that starts off the centre by
``off * U(0.2, 1.8)`` element sizes: off = 2 hits 5 % of the elements, off = 1 hits 24 %. 8 boxes a step, GRPO
advantages as in TRL, 300 natural-gradient steps of the means. No network: the reward alone decides what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polyreward.advantages.presets import grpo_trl
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.rewards.gaussian_boxes import BoxReward, fixed_std
from polyreward.rewards.overlap import iou_2d
from polyreward.studies.base import (
    Figures,
    Judgement,
    Study,
    StudyConfig,
    Verdict,
    arm,
    best_rate,
    paired_bootstrap,
    rated,
)
from polyreward.tasks.grounding import SCREEN, NearMiss, boxes_of, hit_rate, near_miss

ELEMENTS, GROUP, STEPS = 400, 8, 300
RATES = (0.05, 0.15, 0.5, 1.5, 5.0)
RATE = 0.15
OFFSETS = (2, 1)
ALPHAS = (0.1, 0.3, 0.7, 0.9, 5.0, 10.0)
SPARSE = ("point", "iou", "point+iou")
KINDS = (*SPARSE, "inside", "gaussian_point", "gaussian_coverage", "fixed", "distance", "gaussian", "random")
OTHERS: Mapping[str, BoxReward] = {
    **{f"gaussian, alpha {alpha:g}": BoxReward(alpha=alpha) for alpha in ALPHAS},
    "gaussian, alpha 10, not rounded": BoxReward(alpha=10.0, round_digits=None),
    "gaussian, not rounded": BoxReward(round_digits=None),
    "gaussian_point, not rounded": BoxReward("gaussian_point", round_digits=None),
    "gaussian_coverage, not rounded": BoxReward("gaussian_coverage", round_digits=None),
    "gaussian, weights 0.8 and 0.2": BoxReward(point_weight=0.8, coverage_weight=0.2),
    "gaussian, weights 0.2 and 0.8": BoxReward(point_weight=0.2, coverage_weight=0.8),
}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm from both starts; the arms beside the comparison from the harder one at the middle rate."""
    torch.set_num_threads(1)
    elements, steps = (20, 12) if config.quick else (ELEMENTS, STEPS)
    figures: dict[str, dict[str, float]] = {}
    for offset in OFFSETS:
        task = near_miss(np.random.default_rng([seed, offset]), elements, offset)
        for kind in KINDS:
            runs = train(task, reward_of(kind, task), seed, steps, RATES, config.device)
            figures |= {rated(f"{kind}, off {offset}", rate): run for rate, run in zip(RATES, runs, strict=True)}
        if offset == OFFSETS[0]:
            for name, reward in OTHERS.items():
                figures[name] = train(task, reward, seed, steps, (RATE,), config.device)[0]
    return figures


def reward_of(kind: str, task: NearMiss) -> BoxReward | None:
    """The reward of an arm; None for uniform random numbers."""
    if kind == "fixed":
        return BoxReward("fixed", std=fixed_std(task.targets))
    if kind == "distance":
        return BoxReward("distance", diagonal=SCREEN * 2**0.5)
    return None if kind == "random" else BoxReward(kind)  # type: ignore[arg-type]


def train(
    task: NearMiss, reward: BoxReward | None, seed: int, steps: int, rates: Sequence[float], device: str = "cpu"
) -> list[dict[str, float]]:
    """Figures of one arm at each rate; all arms and rates of a seed see the same random numbers."""
    rng, random = np.random.default_rng([seed, 10]), np.random.default_rng([seed, 11])
    step_sizes, targets = np.array(rates)[:, None, None], task.targets[None, :, None]
    mean = np.repeat(task.start[None], len(rates), axis=0)  # (rates, E, 4)
    dead, early = np.zeros(len(rates)), np.zeros(len(rates))
    shape = (len(rates), len(task.targets), GROUP)
    for step in range(steps):
        moves = rng.normal(size=(*shape[1:], 4)) * task.std[:, None]
        boxes = boxes_of(mean[:, :, None] + moves)
        values = random.random(shape) if reward is None else reward(boxes, targets)
        gain, silent = advantages(values, device)
        dead += silent / steps
        mean += step_sizes * (gain[..., None] * moves).mean(axis=2)  # deviation^2 times the gradient of the log-density
        if step + 1 == max(steps // 4, 1):
            early = hit_rate(mean, task.targets)
    final, overlap = hit_rate(mean, task.targets), iou_2d(boxes_of(mean), task.targets).mean(axis=-1)
    return [
        {
            "hit rate": float(final[at]),
            "hit rate, a quarter": float(early[at]),
            "overlap": float(overlap[at]),
            "dead groups": float(dead[at]),
        }
        for at in range(len(rates))
    ]


def advantages(rewards: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """GRPO advantages of rewards (rates, elements, members), and the share of groups without signal, (rates,)."""
    groups = torch.arange(rewards.shape[0] * rewards.shape[1]).repeat_interleave(rewards.shape[2])
    batch = RewardBatch(torch.as_tensor(rewards.reshape(-1, 1), device=device), ("reward",), groups)
    dead = batch.segments("group").constant(batch.rewards[:, 0]).cpu().numpy().reshape(rewards.shape[:2])
    return compute_advantages(grpo_trl(), batch).cpu().numpy().reshape(rewards.shape), dead.mean(axis=1)


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    hard, easy = (f"off {offset}" for offset in OFFSETS)

    def chosen(kind: str, start: str) -> str:
        return rated(f"{kind}, {start}", best_rate(runs, f"{kind}, {start}", "hit rate", RATES))

    hits = {kind: arm(runs, chosen(kind, hard), "hit rate") for kind in KINDS}
    sparse = max(SPARSE, key=lambda kind: hits[kind].mean())
    effect, interval = paired_bootstrap(hits["gaussian"] - hits[sparse])
    inside = abs(hits["inside"].mean() - hits["point"].mean())
    dead = arm(runs, chosen("gaussian", hard), "dead groups").mean()
    checks = {
        "hit rate: lower end of the interval of Gaussian - best sparse at least 0.3": interval[0] >= 0.3,
        "Gaussian only inside the element within 0.05 of the sparse hit": bool(inside <= 0.05),
        "groups without signal under the Gaussian reward below 0.1": bool(dead < 0.1),
    }
    refuted = effect <= 0.05 or hits["inside"].mean() >= hits["gaussian"].mean() - 0.05
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def listed(quantity: str, start: str, digits: int = 2, rate: float | None = None) -> str:
        names = {kind: chosen(kind, start) if rate is None else rated(f"{kind}, {start}", rate) for kind in KINDS}
        return ", ".join(f"{kind} {arm(runs, name, quantity).mean():.{digits}f}" for kind, name in names.items())

    at_hard = {name: listed(name, hard, rate=RATE) for name in ("hit rate", "dead groups", "overlap")}
    at_easy = {name: listed(name, easy, rate=RATE) for name in ("hit rate", "hit rate, a quarter")}
    others = ", ".join(f"{name} {arm(runs, name, 'hit rate').mean():.3f}" for name in OTHERS)
    rates = ", ".join(f"{kind} {best_rate(runs, f'{kind}, {hard}', 'hit rate', RATES):g}" for kind in KINDS)
    summary = (
        f"Final hit rate from the hard start, best rate of the grid: {listed('hit rate', hard)} (rates: {rates}); the "
        f"best sparse reward is {sparse}. At the shared rate {RATE:g}: {at_hard['hit rate']}; groups without signal "
        f"{at_hard['dead groups']}; overlap at the end {at_hard['overlap']}. From the easy start at {RATE:g}: "
        f"{at_easy['hit rate']}; after a quarter of the steps {at_easy['hit rate, a quarter']}. Hard start, rate "
        f"{RATE:g}, variants: {others}. The size term of the coverage does not depend on alpha: at a large one it "
        "drowns the offset, with rounding and without."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="12-gui-g2",
    method="gui-g2",
    claim="Gaussian point and coverage rewards learn GUI grounding where sparse rewards have no signal: on "
    "ScreenSpot-v2 93.3 against 87.4 (hit), 85.8 (IoU), 86.5 (both) and 88.4 with the Gaussian only inside the element "
    "(arXiv 2507.15846).",
    task="400 elements of 2 % to 25 % of the screen; a diagonal normal policy over boxes for each, which starts beside "
    "the element (hits 5 % or 24 %); 8 boxes a step, 300 natural-gradient steps.",
    baselines="Hit, IoU above 0.5, their sum, Gaussian only inside the element, point and coverage alone, constant "
    "deviation (median of the elements), distance over the diagonal, random rewards; every arm, the method included, "
    "at learning rates 0.05, 0.15, 0.5, 1.5, 5, of which the best mean counts. Variants at 0.15: alpha 0.1, 0.3, 0.7, "
    "0.9, 5, 10; no rounding, also at alpha 10; weights (0.8, 0.2) and (0.2, 0.8).",
    measure="Share of elements that the mean of the policy hits at the end and after a quarter of the steps; share of "
    "groups with equal rewards; mean overlap of the mean's box with the element.",
    rule="Supported, at the hard start: lower end of the 95 % interval of Gaussian - best sparse reward (hit rate) at "
    "least 0.3, Gaussian only inside the element within 0.05 of the hit reward, and fewer than 0.1 of the groups of "
    "the Gaussian reward without signal. Not supported: difference at most 0.05, or Gaussian only inside within 0.05 "
    "of the whole reward. Otherwise inconclusive.",
    effect="final hit rate from the hard start, Gaussian - best sparse reward",
    full_scale="Qwen2.5-VL-3B and 7B, 100k grounding samples, one epoch, 8 x 80 GB, all arms; centre-in-box accuracy "
    "on ScreenSpot, ScreenSpot-v2 and ScreenSpot-Pro.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "elements": ELEMENTS,
        "group": GROUP,
        "steps": STEPS,
        "rates": RATES,
        "shared rate": RATE,
        "offsets": OFFSETS,
        "alphas": ALPHAS,
        "digits of the rewards": 3,
    },
)
