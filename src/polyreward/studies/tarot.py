"""TAROT: programs of four slots with a test in each of four tiers, and models of different capability.

Claim: which order of tests is best depends on the capability of the model: less capable ones gain from easy to hard,
competent ones from hard tests first, up to about 4.3 points of pass@1 over strong baselines (arXiv 2602.15449).

The task. A problem has one of 12 skills; its program has four slots (core, loop, complex, edge), each filled with one
of 8 fragments of Python, one of them right for each skill and slot. Basic needs the core, medium core and loop, high
core, loop and complex, edge core and edge. Programs with every fragment in the slots that a test calls are run in the
sandbox once (729 runs); the table of what they pass is the verifier. The policy is one softmax table a slot and skill,
and its capability is the probability of the right fragment at the start. In a third regime every core has one wrong
fragment that prints a constant and ends the program: it passes the edge tier alone.

With real data, the released sample of 14 problems is run on its gold solutions.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from polyreward.advantages.presets import grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.curricula.tier_portfolio import CurriculumPortfolio, probe_capability
from polyreward.errors import MissingFileError
from polyreward.rewards.execution import Limits, Program, Sandbox
from polyreward.rewards.tiered_tests import PORTFOLIO, TIERS, TestCase, TieredReward, TieredSuite
from polyreward.rewards.unit_tests import tests_of
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap, rated
from polyreward.studies.stratified_grpo import draw, softmax
from polyreward.tasks.program_slots import NEEDS, OPTIONS, SLOTS, TESTS, program

SKILLS, PROBLEMS, GROUP, STEPS = 12, 16, 7, 250
RATE = 0.5 * SKILLS / 4
RATES = (RATE / 2, RATE, 2 * RATE)
PROBES = 8
EASY_TO_HARD, HARD_FIRST, STATIC, ALL = "var_asce_normal", "var_asce_rev", "binary", "all or nothing"
ARMS = (ALL, STATIC, "uni", EASY_TO_HARD, HARD_FIRST)
#: Probability of the right fragment of each slot at the start, and whether a core has the degenerate fragment.
REGIMES: dict[str, tuple[tuple[float, ...], bool]] = {
    "weak": ((0.20, 0.15, 0.12, 0.12), False),
    "strong": ((0.97, 0.93, 0.40, 0.35), False),
    "degenerate": ((0.12, 0.12, 0.12, 0.12), True),
}
CURRICULA = CurriculumPortfolio(PORTFOLIO)


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm in every regime, choose a curriculum in each, and run the released sample in seed 0."""
    torch.set_num_threads(1)
    steps = 25 if config.quick else STEPS
    figures: dict[str, dict[str, float]] = {}
    for regime, (chances, degenerate) in REGIMES.items():
        for name in ARMS:
            for rate, found in zip(
                RATES, train(name, seed, steps, RATES, chances, degenerate, config.device), strict=True
            ):
                figures[rated(f"{regime}, {name}", rate)] = found
        figures[f"{regime}, probe"] = probe(seed, chances, degenerate)
    if config.data is not None and seed == 0:
        figures["released sample"] = released_sample(config.data)
    return figures


@cache
def truth_table() -> np.ndarray:
    """What every program passes, bool (9, 8, 8, 8, 4); a core of 8 is the degenerate one. Run once a process.

    The program of a test takes every fragment in the slots that the test calls, and the right one in the others.
    """
    sizes = (OPTIONS + 1, OPTIONS, OPTIONS, OPTIONS)
    choices = [
        [tuple(made.get(slot, 0) for slot in range(len(SLOTS))) for made in _fillings(slots, sizes)]
        for slots in NEEDS.values()
    ]
    tests = [entry.test for entry in tests_of(list(TESTS))]
    programs = [Program(program(c), (test,)) for test, own in zip(tests, choices, strict=True) for c in own]
    with Sandbox(limits=Limits(wall_seconds=20.0)) as sandbox:
        passed = iter(bool(result.all_passed) for result in sandbox.run(programs))
    table = np.zeros((*sizes, len(TESTS)), dtype=bool)
    for tier, (slots, own) in enumerate(zip(NEEDS.values(), choices, strict=True)):
        part = np.array([next(passed) for _ in own])
        table[..., tier] = part.reshape([size if slot in slots else 1 for slot, size in enumerate(sizes)])
    return table


def _fillings(slots: Sequence[int], sizes: Sequence[int]) -> list[dict[int, int]]:
    return [dict(zip(slots, made, strict=True)) for made in itertools.product(*(range(sizes[slot]) for slot in slots))]


class SlotPolicies:
    """Softmax tables (rates, 4 slots, 12 skills, 8 options), which fragment each option is, and what programs pass."""

    def __init__(self, seed: int, rates: int, chances: Sequence[float], degenerate: bool) -> None:
        rng = np.random.default_rng([seed, 1])
        fragments = np.tile(np.arange(OPTIONS), (len(SLOTS), SKILLS, 1))
        if degenerate:
            fragments[0, :, 1] = OPTIONS
        self.fragment = rng.permuted(fragments, axis=2)
        start = np.array(chances)[:, None, None]
        right = np.where(self.fragment == 0, np.log(start), np.log((1 - start) / (OPTIONS - 1)))
        self.logits = np.tile(right, (rates, 1, 1, 1))
        self.truth = truth_table()

    def passed(self, skills: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """What the programs of options (..., 4) pass on problems of `skills` (...,), bool (..., 4 tiers)."""
        slots = [self.fragment[slot][skills, chosen[..., slot]] for slot in range(len(SLOTS))]
        return np.asarray(self.truth[tuple(slots)])

    def right(self) -> np.ndarray:
        """Probability of the right fragment, (rates, 4, 12)."""
        return np.asarray((softmax(self.logits) * (self.fragment == 0)).sum(axis=-1))

    def success(self) -> np.ndarray:
        """Exact probability that every tier passes, mean over the skills, (rates,)."""
        return np.asarray(self.right().prod(axis=1).mean(axis=1))


def rewards_of(name: str, passed: np.ndarray, progress: float) -> np.ndarray:
    """Reward of an arm for what programs pass, bool (..., 4 tiers) -> (...,)."""
    if name == ALL:
        return np.asarray(passed.all(axis=-1), dtype=np.float64)
    schedule, weights = CURRICULA[name]
    return np.asarray(passed @ weights.of(tuple(NEEDS), schedule(progress)))


def train(
    name: str,
    seed: int,
    steps: int,
    rates: Sequence[float],
    chances: Sequence[float],
    degenerate: bool = False,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train one arm at every rate; all arms of a seed see the same problems and random numbers."""
    rng = np.random.default_rng(seed)
    policies = SlotPolicies(seed, len(rates), chances, degenerate)
    groups = torch.arange(len(rates) * PROBLEMS).repeat_interleave(GROUP)
    part, step_size = grpo(), np.array(rates)[:, None, None, None]
    dead = []
    for step in range(steps):
        skills = rng.integers(SKILLS, size=PROBLEMS)
        probabilities = softmax(policies.logits)[:, :, skills]  # (rates, 4, problems, 8)
        chosen = draw(probabilities[:, :, :, None], rng, (len(rates), len(SLOTS), PROBLEMS, GROUP))
        passed = policies.passed(skills[:, None], np.moveaxis(chosen, 1, -1))
        rewards = rewards_of(name, passed, step / steps)
        batch = RewardBatch(torch.as_tensor(rewards.reshape(-1, 1), device=device), ("tests",), groups)
        gain = compute_advantages(part, batch).cpu().numpy().reshape(len(rates), 1, PROBLEMS, GROUP)
        dead.append((rewards.max(axis=-1) == rewards.min(axis=-1)).mean(axis=-1))
        score = np.eye(OPTIONS)[chosen] - probabilities[:, :, :, None]
        gradient = np.zeros_like(policies.logits)
        by_problem = (gain[..., None] * score).sum(axis=3) / (PROBLEMS * GROUP)
        gradient += np.einsum("rspo,pk->rsko", by_problem, np.eye(SKILLS)[skills])
        policies.logits += step_size * gradient
    right, success, first = policies.right().mean(axis=2), policies.success(), max(steps // 5, 1)
    return [
        {
            "success": float(success[r]),
            "dead groups, first fifth": float(np.mean(dead[:first], axis=0)[r]),
            **{f"right {slot}": float(right[r, number]) for number, slot in enumerate(SLOTS)},
        }
        for r in range(len(rates))
    ]


def probe(seed: int, chances: Sequence[float], degenerate: bool) -> dict[str, float]:
    """Capability of the policy before training, by programs sampled and run, and what the rule chooses."""
    rng = np.random.default_rng([seed, 2])
    policies = SlotPolicies(seed, 1, chances, degenerate)
    suite = TieredSuite(tuple(TestCase(test["stdin"], test["stdout"], test["tier"]) for test in TESTS))

    def sampled(skill: int) -> list[str]:
        options = draw(softmax(policies.logits[0, :, skill])[:, None], rng, (len(SLOTS), PROBES))
        choices = np.take_along_axis(policies.fragment[:, skill], options, axis=1).T
        return [f"```python\n{program(choice.tolist())}```" for choice in choices]

    profile = probe_capability(sampled, dict.fromkeys(range(SKILLS), suite))
    chosen = CURRICULA.select(profile)
    return {
        "capability": profile.score,
        **{f"pass rate, {tier}": rate for tier, rate in profile.pass_rates.items()},
        "chooses hard first": float(chosen == HARD_FIRST),
    }


def released_sample(data: Path) -> dict[str, float]:
    """The gold solutions of the released problems on their cases: how many pass."""
    path = data / "code" / "tarot_sample.jsonl.gz"
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    figures = {
        "problems": 0.0,
        "cases": 0.0,
        "labelled cases passed": 0.0,
        "original, lines": 0.0,
        "original, tokens": 0.0,
    }
    for row in rows:
        cases = tuple(TestCase(c["input"], c["output"], c["label"]) for c in row["verification_info"]["test_cases"])
        suite, gold = TieredSuite(cases), row["gold_standard_solution"]
        figures["problems"] += 1
        figures["cases"] += len(cases)
        figures["labelled cases passed"] += float(TieredReward(suite, *CURRICULA[STATIC])(gold, 0.0).per_tier.sum())
        figures["original, lines"] += float(suite.passed(gold, tiers={"minimal"}).sum())
        figures["original, tokens"] += float(suite.passed(gold, tiers={"minimal"}, compare="tokens").sum())
    return figures


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def success(regime: str, name: str, rate: float = RATE) -> np.ndarray:
        return arm(runs, rated(f"{regime}, {name}", rate), "success")

    gaps = {regime: success(regime, EASY_TO_HARD) - success(regime, HARD_FIRST) for regime in REGIMES}
    means = {regime: float(gap.mean()) for regime, gap in gaps.items()}
    effect, interval = paired_bootstrap(gaps["weak"], gaps["strong"])
    over = float((success("degenerate", EASY_TO_HARD) - success("degenerate", STATIC)).mean())
    hard = {regime: arm(runs, f"{regime}, probe", "chooses hard first") for regime in REGIMES}
    picks = all((hard[regime] == float(means[regime] < 0)).all() for regime in ("weak", "strong"))
    checks = {
        "weak: easy to hard - hard first >= 0.15": means["weak"] >= 0.15,
        "strong: easy to hard - hard first <= -0.02": means["strong"] <= -0.02,
        "the rule picks the better of the two for weak and strong, in every seed": bool(picks),
        "degenerate: easy to hard - static >= 0.03": over >= 0.03,
    }
    refuted = not means["weak"] > 0 > means["strong"]
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def listed(regime: str, rates: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {success(regime, name, rate).mean():.3f}" for name, rate in rates.items())

    shared = "; ".join(f"{regime}: {listed(regime, dict.fromkeys(ARMS, RATE))}" for regime in REGIMES)
    grid = "; ".join(
        f"{regime}, rate {rate:g}: {listed(regime, dict.fromkeys(ARMS, rate))}"
        for regime in REGIMES for rate in RATES if rate != RATE
    )  # fmt: skip
    signs = {regime: int((np.sign(gaps[regime]) == np.sign(means[regime])).sum()) for regime in ("weak", "strong")}
    best = max(ARMS, key=lambda name: success("weak", name).mean())
    dead = arm(runs, rated(f"weak, {HARD_FIRST}", RATE), "dead groups, first fifth").mean()
    capability = ", ".join(f"{regime} {arm(runs, f'{regime}, probe', 'capability').mean():.2f}" for regime in REGIMES)
    real = next((run["released sample"] for run in runs if "released sample" in run), None)
    sample = "" if real is None else (
        f" Released sample: gold solutions of {real['problems']:.0f} problems pass {real['labelled cases passed']:.0f} "
        f"labelled cases, and {real['original, lines']:.0f} original ones by lines, {real['original, tokens']:.0f} by "
        "tokens."
    )  # fmt: skip
    summary = (
        f"Probability that all tiers pass, shared rate {RATE:g}: {shared}. Easy to hard - hard first: weak "
        f"{means['weak']:+.3f} ({signs['weak']} of {len(runs)} seeds with this sign), strong {means['strong']:+.3f} "
        f"({signs['strong']} of {len(runs)}). Easy to hard - static with a degenerate core: {over:+.3f}. Best in the "
        f"weak regime: {best}. Dead groups of hard first in the first fifth, weak: {dead:.0%}. Measured capability: "
        f"{capability}. Other rates: {grid}.{sample}"
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="05-tarot",
    method="tarot",
    claim="Less capable models gain most from easy-to-hard tests, competent ones from hard tests first, up to about "
    "4.3 points of pass@1 (arXiv 2602.15449).",
    task="Programs of four slots with 8 fragments each, 12 skills, tabular policies; four tiers of tests; a weak "
    "start, a strong start, and a weak start with a core that passes the edge tier alone.",
    baselines="All or nothing; static quarter weights of all tiers from the start (the released recipe without "
    "curriculum); uniform weights, easy to hard. All arms share the rate, as the paper's do; the rates half and twice "
    "as large are reported. GRPO with sample deviation, 16 problems x 7 programs, 250 steps.",
    measure="Exact probability that a program passes all four tiers, mean over the skills, after training.",
    rule="At the shared rate 1.5, means over the seeds. Supported: easy to hard (var_asce_normal) - hard first "
    "(var_asce_rev) >= 0.15 for the weak and <= -0.02 for the strong start, the capability rule picks the better of "
    "the two for both in every seed, and with the degenerate core easy to hard - static >= 0.03. Not supported: the "
    "difference does not change its sign from weak (above 0) to strong (below 0). Otherwise inconclusive.",
    effect="success, easy to hard minus hard first: weak minus strong start",
    full_scale="Qwen2.5 and Qwen2.5-Coder 1.5B to 7B, Qwen3-4B, Gemma-2 on 15.5k problems x 4 tiers with TRL and a "
    "sandbox; HumanEval(+), MBPP(+), LiveCodeBench v5, CodeForces, CruxEval; 8 x 80 GB.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "skills": SKILLS,
        "problems": PROBLEMS,
        "group": GROUP,
        "steps": STEPS,
        "rates": RATES,
        "probes": PROBES,
        "regimes": {name: list(chances) for name, (chances, _) in REGIMES.items()},
    },
)

assert tuple(NEEDS) == TIERS
