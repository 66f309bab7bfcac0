"""VeRPO: a hard-coded shortcut that passes all easy tests, against the general program that must be found slot by slot.

Claim: tests weighted by their difficulty and divided by the density of tests as hard, with the outcome, train better
than the outcome alone: Codeforces pass@1 40.44 against 31.61 with GRPO in the multi-turn setting, while the pass rate
as local reward gives 35.75 and difficulty weights without density 35.11 (arXiv 2601.03525, from a digest of v3).

The task. A program has six slots with five fragments each. The dispatcher is a shortcut (two fragments: all 16 easy
tests and none of 4 hard ones), general (one), or broken (two). A general program passes the easy tests only where the
fragment for plain numbers is right, and each hard test where one further fragment is. 48 problems differ in which
option is which fragment; a policy is one softmax table a slot. The pass table is read off programs run in the sandbox.

Three panels beside it: sensitivity to bandwidth, alpha and copies of the easy tests; episodes of up to three programs,
in which a turn draws again the slots that a failing test touches; and, with real data, mutants of the HumanEval
solutions, where nothing is learned: which mutant does the pass rate rank first, and which VeRPO?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from polyreward.advantages.turns import FusedAdvantage, degenerate_group_ratio
from polyreward.rewards.density_calibrated import DensityCalibratedReward
from polyreward.rewards.execution import Limits, Program, Sandbox
from polyreward.rewards.unit_tests import tests_of
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
from polyreward.studies.verpo_mutants import mutants
from polyreward.tasks.shortcut_programs import EASY, OPTIONS, SLOTS, TESTS, program

PROBLEMS, GROUP, STEPS, TURNS = 48, 10, 600, 3
RATE, RATES = 2.0, (0.5, 2.0, 8.0, 32.0, 128.0)
HARD = len(TESTS) - EASY
BANDWIDTHS, ALPHAS, COPIES = (0.02, 0.05, 0.2, 0.5), (0.0, 1.0, 4.0), (4, 16, 64)
GAMMAS = (1.0, 0.9)
MUTANT_SEEDS = (0, 1)


@dataclass(frozen=True)
class Arm:
    """Local reward (None, "pass rate", calibrated), weight of the outcome, normalisation, copies of the easy tests."""

    local: DensityCalibratedReward | str | None = field(default_factory=DensityCalibratedReward)
    outcome: float = 1.0
    normalise: str = "mean"
    copies: int = 1

    def rewards(self, passed: np.ndarray, groups: np.ndarray, device: str) -> np.ndarray:
        """Local rewards of programs, from bool (rows, 20), each easy test counted `copies` times."""
        easy = np.repeat(passed[:, :EASY], self.copies, axis=1)
        table = np.concatenate([easy, passed[:, EASY:]], axis=1)
        if self.local is None:
            return np.zeros(len(table))
        if isinstance(self.local, str):
            return np.asarray(table.mean(axis=1))
        score = self.local.score(torch.as_tensor(table, device=device), torch.as_tensor(groups, device=device))
        return np.asarray(score.cpu())


TUNED = {
    "outcome": Arm(None),
    "outcome, std": Arm(None, normalise="std"),
    "pass rate": Arm("pass rate", outcome=0.0),
    "pass rate + outcome": Arm("pass rate"),
    "difficulty + outcome": Arm(DensityCalibratedReward(density=False)),
    "VeRPO without outcome": Arm(outcome=0.0),
    "VeRPO": Arm(),
}
OTHERS = {
    "VeRPO, std": Arm(normalise="std"),
    **{f"VeRPO, bandwidth {width:g}": Arm(DensityCalibratedReward(bandwidth=width)) for width in BANDWIDTHS},
    **{f"VeRPO, alpha {alpha:g}": Arm(DensityCalibratedReward(alpha=alpha)) for alpha in ALPHAS},
    **{f"VeRPO, easy tests x {copies}": Arm(copies=copies) for copies in COPIES},
    **{f"pass rate + outcome, easy tests x {copies}": Arm("pass rate", copies=copies) for copies in COPIES},
}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm, then the sensitivity and multi-turn panels, then rank mutants where there is real data."""
    torch.set_num_threads(1)
    steps, device = 40 if config.quick else STEPS, config.device
    figures: dict[str, dict[str, float]] = {}
    for name, part in TUNED.items():
        for rate, found in zip(RATES, train(part, seed, steps, RATES, device), strict=True):
            figures[rated(name, rate)] = found
    for name, part in OTHERS.items():
        figures[name] = train(part, seed, steps, (RATE,), device)[0]
    for gamma in GAMMAS:
        figures[f"turns, gamma {gamma:g}"] = train_turns(gamma, seed, steps, device=device)
    if config.data is not None and seed in MUTANT_SEEDS:
        figures["mutants"] = mutants(config.data, seed, problems=12 if config.quick else None)
    return figures


@cache
def pass_table() -> np.ndarray:
    """What a program with dispatcher d and fragment v in all other slots passes, bool (5, 5, 20); run once a process.

    Every test calls one slot beside the dispatcher, so these 25 programs hold what any program passes (`passed_by`).
    """
    tests = tuple(entry.test for entry in tests_of(list(TESTS)))
    choices = [(way, *[option] * (SLOTS - 1)) for way in range(OPTIONS) for option in range(OPTIONS)]
    with Sandbox(limits=Limits(wall_seconds=20.0)) as sandbox:
        results = sandbox.run([Program(program(choice), tests) for choice in choices])
    return np.array([result.passed for result in results]).reshape(OPTIONS, OPTIONS, len(TESTS))


def passed_by(fragments: np.ndarray) -> np.ndarray:
    """What programs with these fragments (..., 6) pass, bool (..., 20)."""
    table, way = pass_table(), fragments[..., 0]
    easy = table[way, fragments[..., SLOTS - 1], :EASY]
    hard = [table[way, fragments[..., slot], EASY + slot - 1] for slot in range(1, HARD + 1)]
    return np.concatenate([easy, np.stack(hard, axis=-1)], axis=-1)


class ProgramPolicies:
    """Softmax tables (rates * problems, 6, 5) and which fragment each option is; equal tables at the start."""

    def __init__(self, seed: int, rates: int) -> None:
        rng = np.random.default_rng([seed, 1])
        fragment = rng.permuted(np.tile(np.arange(OPTIONS), (PROBLEMS, SLOTS, 1)), axis=2)
        self.fragment = np.tile(fragment, (rates, 1, 1))
        self.logits = np.zeros((rates * PROBLEMS, SLOTS, OPTIONS))

    def fragments(self, chosen: np.ndarray) -> np.ndarray:
        """Fragments of options (rows, members, 6)."""
        return np.take_along_axis(self.fragment[:, None], chosen[..., None], axis=3)[..., 0]

    def chance(self, fragment: int) -> np.ndarray:
        """Probability of a fragment in each slot, (rows, 6)."""
        return np.asarray((softmax(self.logits) * (self.fragment == fragment)).sum(axis=2))

    def figures(self, rates: int) -> list[dict[str, float]]:
        """Exact probability of the right program and of a shortcut, mean over the problems."""
        success = self.chance(0).prod(axis=1).reshape(rates, -1).mean(axis=1)
        shortcut = (self.chance(1) + self.chance(2))[:, 0].reshape(rates, -1).mean(axis=1)
        return [{"success": float(a), "shortcut": float(b)} for a, b in zip(success, shortcut, strict=True)]


def train(part: Arm, seed: int, steps: int, rates: Sequence[float], device: str = "cpu") -> list[dict[str, float]]:
    """Train one arm at every rate, single turns; all arms of a seed see the same problems and random numbers."""
    rng, policies = np.random.default_rng(seed), ProgramPolicies(seed, len(rates))
    rows = len(rates) * PROBLEMS
    groups, step_size = np.repeat(np.arange(rows), GROUP), np.repeat(rates, PROBLEMS)[:, None, None]
    ones, index = np.ones(rows * GROUP, dtype=np.int64), np.arange(rows * GROUP)
    fuse = FusedAdvantage(float(part.local is not None), 1.0, part.normalise)  # type: ignore[arg-type]
    dead = []
    for step in range(steps):
        chances = softmax(policies.logits)
        drawn = rng.random((1, PROBLEMS, GROUP, SLOTS, 1))
        chosen = _inverted(
            chances, np.broadcast_to(drawn, (len(rates), *drawn.shape[1:])).reshape(rows, GROUP, SLOTS, 1)
        )
        passed = passed_by(policies.fragments(chosen)).reshape(rows * GROUP, -1)
        local = part.rewards(passed, groups, device)
        gain = fuse(local, part.outcome * passed.all(axis=1), ones, index, groups)
        if step >= steps - max(steps // 10, 1):
            dead.append(
                [
                    degenerate_group_ratio(g, h, 1e-9)
                    for g, h in zip(_split(gain, rates), _split(groups, rates), strict=True)
                ]
            )
        score = np.eye(OPTIONS)[chosen] - chances[:, None]
        policies.logits += step_size * (gain.reshape(rows, GROUP, 1, 1) * score).mean(axis=1)
    quiet = np.mean(dead, axis=0)
    found = policies.figures(len(rates))
    return [{**each, "dead groups, last tenth": float(q)} for each, q in zip(found, quiet, strict=True)]


def _split(values: np.ndarray, rates: Sequence[float]) -> list[np.ndarray]:
    return np.split(values, len(rates))


def _inverted(chances: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Options (rows, members, 6) by inversion of uniform numbers (rows, members, 6, 1)."""
    return np.minimum((drawn > chances[:, None].cumsum(axis=-1)).sum(axis=-1), OPTIONS - 1)


@dataclass(frozen=True)
class Episodes:
    """Turns of episodes as rows: problem, trajectory, options, which were drawn, passes; then the trajectories."""

    problem: np.ndarray
    trajectory: np.ndarray
    chosen: np.ndarray
    drawn: np.ndarray
    passed: np.ndarray
    lengths: np.ndarray
    solved: np.ndarray


def episodes(policies: ProgramPolicies, members: int, rng: np.random.Generator) -> Episodes:
    """Sample episodes of up to three programs; an episode ends with a program that passes every test."""
    chances = softmax(policies.logits)
    problem = np.repeat(np.arange(len(chances)), members)
    number = np.arange(len(problem))
    chosen, redrawn = np.zeros((len(problem), SLOTS), dtype=np.int64), np.ones((len(problem), SLOTS), dtype=bool)
    open_ = np.ones(len(problem), dtype=bool)
    lengths, parts = np.zeros(len(problem), dtype=np.int64), []
    solved = np.zeros(len(problem), dtype=bool)
    for _ in range(TURNS):
        fresh = draw(chances[problem], rng, chosen.shape)
        chosen = np.where(redrawn, fresh, chosen)
        fragments = np.take_along_axis(policies.fragment[problem], chosen[..., None], axis=2)[..., 0]
        passed = passed_by(fragments)
        parts.append((problem[open_], number[open_], chosen[open_], redrawn[open_], passed[open_]))
        lengths += open_
        solved |= open_ & passed.all(axis=1)
        open_ = open_ & ~passed.all(axis=1)
        redrawn = touched(fragments, passed)
    rows, trajectory, options, drawn, passes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Episodes(rows, trajectory, options, drawn, passes, lengths, solved)


def touched(fragments: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """Slots that a failing test runs, bool (rows, 6): the dispatcher, and where it is general the slot it calls."""
    failed: np.ndarray = ~passed
    some, easy = (np.any(part, axis=1, keepdims=True) for part in (failed, failed[:, :EASY]))
    general = np.asarray(fragments[:, :1] == 0)
    return np.concatenate([some, failed[:, EASY:] & general, easy & general], axis=1)


def train_turns(gamma: float, seed: int, steps: int, rate: float = RATE, device: str = "cpu") -> dict[str, float]:
    """Train VeRPO on episodes of up to three programs; success and number of turns of the final policy, sampled."""
    rng, policies, part = np.random.default_rng([seed, 2]), ProgramPolicies(seed, 1), Arm()
    fuse, groups = FusedAdvantage(gamma=gamma), np.repeat(np.arange(PROBLEMS), GROUP)
    for _ in range(steps):
        chances, found = softmax(policies.logits), episodes(policies, GROUP, rng)
        local = part.rewards(found.passed, found.problem, device)
        gain = fuse(local, found.solved, found.lengths, found.trajectory, groups)
        score = (np.eye(OPTIONS)[found.chosen] - chances[found.problem]) * found.drawn[..., None]
        gradient = np.zeros_like(policies.logits)
        np.add.at(gradient, found.problem, gain[:, None, None] * score / GROUP)
        policies.logits += rate * gradient
    final = episodes(policies, 200, np.random.default_rng([seed, 3]))
    first = policies.figures(1)[0]
    return {
        "success, first turn": first["success"],
        "success": float(final.solved.mean()),
        "turns": float(final.lengths.mean()),
    }


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    best = {name: best_rate(runs, name, "success", RATES) for name in TUNED}
    success = {name: arm(runs, rated(name, rate), "success") for name, rate in best.items()}
    mean = {name: float(values.mean()) for name, values in success.items()}
    effect, interval = paired_bootstrap(success["VeRPO"], success["difficulty + outcome"])
    joined, joined_interval = paired_bootstrap(success["VeRPO"], success["VeRPO without outcome"])
    checks = {
        "VeRPO succeeds at least 0.9 of the time": mean["VeRPO"] >= 0.9,
        "pass rate, alone and with the outcome, at most 0.1": max(mean["pass rate"], mean["pass rate + outcome"])
        <= 0.1,
        "difficulty without density at most 0.3": mean["difficulty + outcome"] <= 0.3,
        "outcome, centred or standardised, at most 0.4": max(mean["outcome"], mean["outcome, std"]) <= 0.4,
        "the outcome adds to the local reward": joined_interval[0] > 0,
    }
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if effect < 0.1 else "inconclusive"

    def listed(arms: Mapping[str, str], quantity: str = "success") -> str:
        return ", ".join(f"{shown} {arm(runs, name, quantity).mean():.3f}" for shown, name in arms.items())

    chosen = {f"{name} (rate {best[name]:g})": rated(name, best[name]) for name in TUNED}
    grid = "; ".join(
        f"{name} " + " ".join(f"{arm(runs, rated(name, rate), 'success').mean():.3f}" for rate in RATES)
        for name in TUNED
    )
    at_best = {name: rated(name, best[name]) for name in ("outcome", "pass rate", "VeRPO without outcome", "VeRPO")}
    turns = {f"gamma {gamma:g}": f"turns, gamma {gamma:g}" for gamma in GAMMAS}
    shorter = (arm(runs, "turns, gamma 1", "turns") - arm(runs, "turns, gamma 0.9", "turns")).mean()
    real = ""
    ranked = [run for run in runs if "mutants" in run]
    if ranked:
        shares = {quantity: arm(ranked, "mutants", quantity) for quantity in ranked[0]["mutants"]}
        real = (
            f" Mutants of HumanEval: in {shares['disagree'].mean():.1%} of {shares['problems'].sum():.0f} groups pass "
            f"rate and VeRPO rank different mutants first; of these, the one that VeRPO prefers passes the rarest "
            f"test in {shares['VeRPO passes the rarest'].mean():.0%}, the one of the pass rate in "
            f"{shares['pass rate passes the rarest'].mean():.0%}."
        )
    summary = (
        f"Probability of the right program, best rate of the grid: {listed(chosen)}; at rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)}: {grid}. VeRPO - VeRPO without outcome {joined:+.3f} "
        f"({joined_interval[0]:+.3f} to {joined_interval[1]:+.3f}). Shortcuts at the end: "
        f"{listed(at_best, 'shortcut')}. "
        f"Dead groups in the last tenth: {listed(at_best, 'dead groups, last tenth')}. At rate {RATE:g}: "
        f"{listed({name: name for name in OTHERS})}. Up to three turns, success: {listed(turns)}; turns: "
        f"{listed(turns, 'turns')}, {shorter:+.3f} fewer with decay.{real}"
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="45-verpo",
    method="verpo",
    claim="Difficulty weights over test density, with the outcome: Codeforces pass@1 40.44 against 31.61 for GRPO "
    "multi-turn; pass rate as local reward 35.75, difficulty without density 35.11 (arXiv 2601.03525).",
    task="Programs of six slots with five fragments; two hard-coded shortcuts pass all 16 easy tests and none of 4 "
    "hard ones. 48 problems, tabular policies, programs run in the sandbox.",
    baselines="Outcome (centred; standardised), pass rate, pass rate + outcome, difficulty without density + outcome, "
    "VeRPO without outcome: as VeRPO, each at its own best rate of 0.5, 2, 8, 32, 128 (highest mean success). "
    "Groups of 10, 600 steps, mean-centred advantages unless named. At rate 2: VeRPO standardised; bandwidth 0.02 to "
    "0.5; alpha 0 to 4; easy tests copied 4, 16, 64 times.",
    measure="Exact probability that the policy writes the right program, mean over the problems, after training.",
    rule="At each one's best rate, means over the seeds. Supported: VeRPO >= 0.9, pass rate (alone and with outcome) "
    "<= 0.1, difficulty without density + outcome <= 0.3, outcome (centred and standardised) <= 0.4, and the interval "
    "of VeRPO minus VeRPO without outcome above 0. Not supported: VeRPO less than 0.1 above difficulty without "
    "density. Otherwise inconclusive. The other panels are reported.",
    effect="success, VeRPO minus difficulty weights without density",
    full_scale="Qwen3-8B on 7.4k verified TACO problems, single- and multi-turn, verl, 8 GPUs; HumanEval+, "
    "BigCodeBench, LiveCodeBench v6, CodeElo.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "problems": PROBLEMS,
        "group": GROUP,
        "steps": STEPS,
        "rates": RATES,
        "rate": RATE,
        "bandwidths": (*BANDWIDTHS, 0.1),
        "alphas": (*ALPHAS, 2.0),
        "copies": (1, *COPIES),
        "turns": TURNS,
        "gammas": GAMMAS,
    },
)
