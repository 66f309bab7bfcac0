"""Sweet spot learning: tiered proximity added to a verifier's outcome, on a procedural screen that wants a click.

Claim: zones of closeness added to a binary outcome keep the order of solutions, raise the signal-to-noise ratio of the
policy gradient, and are up to 2.5 times as sample-efficient; four zones are best (arXiv 2601.22491).

The task. A screen of 24 x 24 cells shows a box with half-widths of 1 or 2 cells. The policy sees 10 Gaussian bumps a
coordinate of the box's centre and clicks: a softmax over columns and one over rows, linear in the bumps, zero at the
start (hit rate 2 %). Proximity is ``exp(-d^2 / 2)``, d in units of two half-widths. Two panels: the exact
signal-to-noise ratio of the gradient in one dimension, and 4 x 4 Sudoku with a table of softmaxes, where success is 1
in a million at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.rewards.proximity import BlockMatch, GaussianBoxField
from polyreward.rewards.sweet_spot import Gate, ZoneQuantizer, sweet_spot
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
from polyreward.studies.stratified_grpo import draw, softmax

CELLS, BUMPS, WIDTH, SPREAD = 24, 10, 0.08, 2.0
SCREENS, GROUP, STEPS, TEST_SCREENS, CLOSELY, EVERY = 16, 8, 1000, 500, 100, 5
RATES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
RATE, WEIGHT, NOISE = 8.0, 0.5, 0.1
OFFSETS = (4, 8, 12)
PUZZLES, EMPTY, SUDOKU_STEPS, SUDOKU_RATE = 16, 10, 1000, 2.0
GRPO = chain(WeightedSum(), Center("group"), Scale("group", epsilon=1e-6, ddof=0))


@dataclass(frozen=True)
class Arm:
    """How outcome and proximity become a reward."""

    quantizer: ZoneQuantizer | None = None
    weight: float = WEIGHT
    gate: Gate = "none"
    noise: float = 0.0

    def rewards(self, outcome: np.ndarray, proximity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rewards of outcome and proximity, with noise on the proximity where the arm has some."""
        noisy = proximity + self.noise * rng.normal(size=proximity.shape)
        return np.asarray(sweet_spot(outcome, noisy, self.quantizer, self.weight, self.gate).total)


TUNED = {"binary": Arm(weight=0.0), "SSL-4": Arm(ZoneQuantizer(4)), "continuous": Arm()}
OTHERS = {
    "SSL-2": Arm(ZoneQuantizer(2)),
    "SSL-8": Arm(ZoneQuantizer(8)),
    "SSL-16": Arm(ZoneQuantizer(16)),
    "SSL-4 amplified": Arm(ZoneQuantizer(4, levels="amplified")),
    "SSL-4 on success": Arm(ZoneQuantizer(4), gate="only_success"),
    "SSL-4, noise": Arm(ZoneQuantizer(4), noise=NOISE),
    "continuous, noise": Arm(noise=NOISE),
}
SUDOKU = {
    "binary": (Arm(weight=0.0), BlockMatch((2, 2))),
    "SSL-4": (Arm(ZoneQuantizer(4)), BlockMatch((2, 2))),
    "SSL, zoned blocks": (Arm(), BlockMatch((2, 2), ZoneQuantizer(3, thresholds=(0.5, 1.0)))),
    "continuous": (Arm(), BlockMatch((2, 2))),
}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm of the screen and of the Sudoku panel, and compute the signal-to-noise panel."""
    torch.set_num_threads(1)
    steps, device = 60 if config.quick else STEPS, config.device
    figures = {
        rated(name, rate): click(tuned, seed, steps, rate, device=device)
        for name, tuned in TUNED.items()
        for rate in RATES
    }
    figures |= {name: click(other, seed, steps, device=device) for name, other in OTHERS.items()}
    figures |= {
        f"{name}, 28 cells": click(tuned, seed, steps, cells=28, device=device) for name, tuned in TUNED.items()
    }
    for offset in OFFSETS:
        figures[f"signal to noise, {offset} cells off"] = signal_to_noise(offset)
    sudoku_steps = 60 if config.quick else SUDOKU_STEPS
    return figures | {f"sudoku, {name}": sudoku(*parts, seed, sudoku_steps, device) for name, parts in SUDOKU.items()}


def advantages(rewards: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, float]:
    """GRPO advantages of rewards (groups, members), and the share of groups without signal."""
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    batch = RewardBatch(torch.as_tensor(rewards.reshape(-1, 1), device=device), ("reward",), groups)
    dead = batch.segments("group").constant(batch.rewards[:, 0])
    return compute_advantages(GRPO, batch).cpu().numpy().reshape(rewards.shape), float(dead.double().mean())


class Screens:
    """A batch of screens: bumps (S, 2, 10) of the centre, and boxes (S, 4) in cells."""

    def __init__(self, rng: np.random.Generator, count: int, cells: int) -> None:
        centre, half = rng.uniform(0.05, 0.95, size=(count, 2)), rng.integers(1, 3, size=(count, 2))
        bumps = np.exp(-(((centre[..., None] - np.linspace(0, 1, BUMPS)) / WIDTH) ** 2) / 2)
        self.bumps = bumps / bumps.sum(axis=-1, keepdims=True)
        self.boxes = np.concatenate([centre * cells - half, centre * cells + half], axis=1)

    def inside(self, positions: np.ndarray) -> np.ndarray:
        """Whether positions (S, 2, ...), in cells, lie between the box's edges on each axis."""
        low, high = (edge.reshape(*edge.shape, *[1] * (positions.ndim - 2)) for edge in np.split(self.boxes, 2, axis=1))
        return (positions >= low) & (positions <= high)


def click(
    arm_: Arm, seed: int, steps: int, rate: float = RATE, cells: int = CELLS, device: str = "cpu"
) -> dict[str, float]:
    """Train one arm; all arms of a seed see the same screens and the same random numbers."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    test = Screens(np.random.default_rng([seed, 2]), TEST_SCREENS, cells)
    weights = np.zeros((2, BUMPS, cells))
    looked, curve, dead = [0], [hit_rate(weights, test)], []
    field = GaussianBoxField(SPREAD)
    for step in range(1, steps + 1):
        screens = Screens(rng, SCREENS, cells)
        chances = softmax(np.einsum("sab,abc->sac", screens.bumps, weights))  # (S, 2, cells)
        chosen = draw(chances[:, :, None], rng, (SCREENS, 2, GROUP))
        hit = np.asarray(screens.inside(chosen + 0.5).all(axis=1), dtype=np.float64)
        near = np.asarray(field(np.moveaxis(chosen + 0.5, 1, 2), screens.boxes[:, None]))
        gain, silent = advantages(arm_.rewards(hit, near, noise), device)
        dead.append(silent)
        score = np.eye(cells)[chosen] - chances[:, :, None]
        weights += rate * np.einsum("sg,sagc,sab->abc", gain, score, screens.bumps) / gain.size
        if step <= CLOSELY or step % EVERY == 0 or step == steps:
            looked.append(step)
            curve.append(hit_rate(weights, test))
    reached = np.flatnonzero(np.array(curve) >= 0.5)
    return {
        "hit probability": curve[-1],
        "steps to 0.5": float(looked[reached[0]] if reached.size else steps),
        "reached 0.5": float(reached.size > 0),
        "dead groups, first 10 steps": float(np.mean(dead[:10])),
        "dead groups": float(np.mean(dead)),
    }


def hit_rate(weights: np.ndarray, screens: Screens) -> float:
    """Exact probability of a hit, mean over the screens."""
    cells = weights.shape[-1]
    chances = softmax(np.einsum("sab,abc->sac", screens.bumps, weights))
    inside = screens.inside(np.broadcast_to(np.arange(cells) + 0.5, (len(screens.boxes), 2, cells)))
    return float((chances * inside).sum(axis=2).prod(axis=1).mean())


def signal_to_noise(offset: float, deviation: float = 5.0) -> dict[str, float]:
    """``|E g|^2 / Var(g)`` of the gradient of a location parameter, exact: 41 cells, box of half-width 1.

    The policy is a Gaussian on the cells, `offset` off the target; proximity ``exp(-(x / 4)^2 / 2)``; the baseline is
    the expected reward.
    """
    x = np.arange(-20, 21, dtype=np.float64)
    policy = softmax(-(((x - offset) / deviation) ** 2) / 2)
    score = (x - offset) / deviation**2
    score = score - policy @ score
    outcome, proximity = (np.abs(x) <= 1).astype(np.float64), np.exp(-((x / 4) ** 2) / 2)
    figures = {}
    for name, quantizer, weight in (
        ("binary", None, 0.0),
        ("continuous", None, WEIGHT),
        ("SSL-4", ZoneQuantizer(4), WEIGHT),
    ):
        reward = np.asarray(sweet_spot(outcome, proximity, quantizer, weight).total)
        gradient = (reward - policy @ reward) * score
        mean = policy @ gradient
        figures[name] = float(mean**2 / (policy @ gradient**2 - mean**2))
    return figures


def sudoku_grids() -> np.ndarray:
    """All 288 solved 4 x 4 grids, (288, 4, 4) with cells 0..3."""
    rows = list(itertools.permutations(range(4)))
    squares = itertools.product(rows, repeat=4)
    grids = np.array([g for g in squares if all(len(set(column)) == 4 for column in zip(*g, strict=True))])
    blocks = grids.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    return np.asarray(grids[(np.sort(blocks, axis=2) == np.arange(4)).all(axis=(1, 2))])


def sudoku_puzzles(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Solutions (16, 4, 4) and which cells are empty (16, 4, 4); each has one solution and at most 10 empty."""
    grids = sudoku_grids()
    solutions = grids[rng.integers(len(grids), size=PUZZLES)]
    empty = np.zeros((PUZZLES, 16), dtype=bool)
    for puzzle, solution in enumerate(solutions):
        for cell in rng.permutation(16):
            trial = empty[puzzle].copy()
            trial[cell] = True
            agree = (grids.reshape(-1, 16) == solution.reshape(16))[:, ~trial].all(axis=1)
            if agree.sum() == 1 and trial.sum() <= EMPTY:
                empty[puzzle] = trial
    return solutions, empty.reshape(PUZZLES, 4, 4)


def sudoku(arm_: Arm, field: BlockMatch, seed: int, steps: int, device: str = "cpu") -> dict[str, float]:
    """Train a table of softmaxes, one a puzzle and empty cell; exact probability that a puzzle is solved."""
    rng, noise = np.random.default_rng([seed, 3]), np.random.default_rng([seed, 4])
    solutions, empty = sudoku_puzzles(rng)
    logits = np.zeros((PUZZLES, 4, 4, 4))
    dead = []
    for _ in range(steps):
        chances = softmax(logits)
        filled = draw(chances[:, None], rng, (PUZZLES, GROUP, 4, 4))
        answers = np.where(empty[:, None], filled, solutions[:, None])
        solved = (answers == solutions[:, None]).all(axis=(2, 3)).astype(np.float64)
        rewards = arm_.rewards(solved, np.asarray(field(answers, solutions[:, None])), noise)
        gain, silent = advantages(rewards, device)
        dead.append(silent)
        score = (np.eye(4)[filled] - chances[:, None]) * empty[:, None, :, :, None]
        logits += SUDOKU_RATE * (gain[:, :, None, None, None] * score).mean(axis=1)
    right = np.take_along_axis(softmax(logits), solutions[..., None], axis=3)[..., 0]
    right = np.where(empty, right, 1.0)
    return {
        "solved": float(right.prod(axis=(1, 2)).mean()),
        "cells right": float((right * empty).sum() / empty.sum()),
        "dead groups": float(np.mean(dead)),
    }


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    best = {name: best_rate(runs, name, "steps to 0.5", RATES, lowest=True) for name in TUNED}
    steps = {name: arm(runs, rated(name, rate), "steps to 0.5") for name, rate in best.items()}
    final = {name: arm(runs, rated(name, rate), "hit probability") for name, rate in best.items()}
    effect, interval = paired_bootstrap(steps["binary"] / steps["SSL-4"])
    dead = {name: arm(runs, rated(name, RATE), "dead groups, first 10 steps").mean() for name in TUNED}
    loss = final["SSL-4"] - final["binary"]
    panels = [f"signal to noise, {cells} cells off" for cells in OFFSETS]
    checks = {
        "steps to 0.5: binary / SSL-4 at least 1.5": effect >= 1.5,
        "SSL-4 never ends more than 0.05 below binary": bool((loss >= -0.05).all()),
        "dead groups at the start: binary above 80 %, SSL-4 below 50 %": bool(
            dead["binary"] > 0.8 and dead["SSL-4"] < 0.5
        ),
        "panel: tiered signal-to-noise above twice the binary one": all(
            (arm(runs, panel, "SSL-4") > 2 * arm(runs, panel, "binary")).all() for panel in panels
        ),
    }
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if effect < 1.2 else "inconclusive"
    same = arm(runs, rated("binary", RATE), "steps to 0.5") / arm(runs, rated("SSL-4", RATE), "steps to 0.5")
    apart = arm(runs, rated("SSL-4", RATE), "hit probability") - arm(runs, rated("binary", RATE), "hit probability")
    over = (steps["continuous"] / steps["SSL-4"]).mean()
    tuned = {f"{name} (rate {best[name]:g})": rated(name, best[name]) for name in TUNED}
    shared = {name: rated(name, RATE) for name in TUNED} | {name: name for name in OTHERS}
    large = {name: f"{name}, 28 cells" for name in TUNED}
    puzzles = {name: f"sudoku, {name}" for name in SUDOKU}

    def listed(arms: Mapping[str, str], quantity: str, digits: int) -> str:
        return ", ".join(f"{shown} {arm(runs, name, quantity).mean():.{digits}f}" for shown, name in arms.items())

    def grid(quantity: str, digits: int) -> str:
        means = {name: [arm(runs, rated(name, rate), quantity).mean() for rate in RATES] for name in TUNED}
        return "; ".join(f"{name} " + " ".join(f"{m:.{digits}f}" for m in row) for name, row in means.items())

    summary = (
        f"Steps to a hit probability of 0.5, best rate of the grid: {listed(tuned, 'steps to 0.5', 1)}; final hit "
        f"probability {listed(tuned, 'hit probability', 3)}; SSL-4 - binary {loss.mean():+.3f} in the mean, "
        f"{loss.min():+.3f} to {loss.max():+.3f} over the seeds. At rates {', '.join(f'{rate:g}' for rate in RATES)}, "
        f"steps: {grid('steps to 0.5', 0)}; final: {grid('hit probability', 3)}. Steps at the shared rate {RATE:g}: "
        f"{listed(shared, 'steps to 0.5', 0)}; binary / SSL-4 {same.mean():.2f}, SSL-4 - binary at the end "
        f"{apart.mean():+.3f} in the mean, {apart.min():+.3f} to {apart.max():+.3f}. Steps on 28 cells: "
        f"{listed(large, 'steps to 0.5', 0)}. Dead groups at the start: binary {dead['binary']:.0%}, SSL-4 "
        f"{dead['SSL-4']:.0%}. Sudoku solved: {listed(puzzles, 'solved', 3)}. The continuous reward takes {over:.2f} "
        "times the steps of SSL-4; the claimed advantage of zones over a continuous reward is not part of the rule."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="36-sweet-spot",
    method="sweet-spot",
    claim="Tiered rewards keep the order of solutions, raise the signal-to-noise ratio of the policy gradient and are "
    "up to 2.5 times as sample-efficient as binary rewards; four zones are best (arXiv 2601.22491).",
    task="Clicking a box on a 24 x 24 screen, softmax policies linear in 10 bumps a coordinate; 4 x 4 Sudoku with a "
    "table; the exact signal-to-noise ratio of a one-dimensional policy.",
    baselines="Binary outcome and continuous proximity, each with its own best learning rate of 4, 8, 16, 32, 64, 128 "
    "(fewest mean steps to 0.5), as has SSL-4; SSL with 2, 8 and 16 zones, amplified levels, levels only on success, "
    "and noise 0.1 on the proximity at rate 8. GRPO with population deviation, 16 screens x 8 clicks, 1000 steps, "
    "weight 0.5.",
    measure="Steps until the exact hit probability on 500 screens reaches 0.5, looked at every step up to 100 and "
    "every 5 steps after (1000 where it never does); final hit probability; share of groups with equal rewards in the "
    "first 10 steps.",
    rule="Supported: mean over the seeds of binary / SSL-4 steps >= 1.5, SSL-4 in no seed more than 0.05 below binary "
    "at the end, dead groups at the start above 80 % (binary) and below 50 % (SSL-4) at rate 8, and tiered "
    "signal-to-noise above twice the binary one at 4, 8 and 12 cells off. Not supported: ratio below 1.2. Otherwise "
    "inconclusive. The Sudoku panel is reported beside the rule.",
    effect="binary / SSL-4 steps to a hit probability of 0.5",
    full_scale="Qwen2.5-VL-3B and 7B on GUI-R1-style data (ScreenSpot, GUI-Act, OmniAct, AndroidControl), and text "
    "Sudoku, maze and ARC, with GRPO, binary against SSL; 8 x 80 GB.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "cells": CELLS,
        "screens": SCREENS,
        "group": GROUP,
        "steps": STEPS,
        "rates": RATES,
        "weight": WEIGHT,
        "spread": SPREAD,
        "noise": NOISE,
        "zones": (2, 4, 8, 16),
        "sudoku empty cells": EMPTY,
        "sudoku steps": SUDOKU_STEPS,
        "sudoku rate": SUDOKU_RATE,
    },
)
