"""Verifier-based against verifier-free learning, on the planted subsequence, exact in every value.

Claim: at equal data, cloning suffers where the base policy's traces are heterogeneous, and with data of the order of
the budget H the gap to a verifier-based learner grows at least like sqrt(H) (arXiv 2502.12118).

The task is `polyreward.tasks.planted_subsequence`: 20 symbols, 20 tokens, styles gamma of {.02, .05, .3, .6} or one of
.2425. Both learners get the same n = 2 H traces of the base.

VF clones solved traces up to the solving step. VB is told where the outcome of a trace flips, counts which token ended
each symbol, takes the map that fits best, and tilts the base inside a chi-square ball of radius .5 a state. That ball
stands around a policy, and there are two: the mean style, a Markov policy ("VB"), and each style by itself ("VB, style
kept"), of which radius 0 is exactly the base. The mean style is already better than the base, and needs no verifier:
"style mean" shows how much. "VF, traces alike" weighs traces and not tokens alike. A trace ends where it is solved, so
that this weight, one over the length, tells what the trace earned: it is a reward-weighted clone in disguise, which is
why it stands beside the rule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polyreward.audit.anti_concentration import anti_concentration, heterogeneity
from polyreward.objectives.cloning import BehaviourCloning, NoEvidenceWarning
from polyreward.objectives.pessimistic_improvement import PessimisticImprove
from polyreward.rewards.learned_verifier import VerifierFit
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap
from polyreward.studies.model_solutions import select_solutions
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, HOMOGENEOUS, PlantedSubsequence, Traces
from polyreward.tilting import best_of_n_distribution, chi2_tilt

BASES = {"heterogeneous": HETEROGENEOUS, "homogeneous": HOMOGENEOUS}
WEAK = (0.0, 0.0, 0.0, 0.6)
HORIZONS, SHORT, LONG, MIDDLE = (16, 32, 64, 128, 256), 64, 256, 128
SIZES, FEW, MANY = (16, 64, 128, 256, 1024), 128, 1024
KAPPA, BUDGETS = 0.5, (1, 2, 4, 8, 16)
NOISES, NOISE_KINDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95), ("random step", "decoy")
AUDITED, PER_PROMPT = 40, 50
LEARNERS = ("VF", "VF, traces alike", "VB", "VB, style kept")


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Every arm for one seed: horizons, data, weak anti-concentration, noise, best of N, and real solutions."""
    torch.set_num_threads(1)
    horizons = (SHORT, LONG) if config.quick else HORIZONS
    figures: dict[str, dict[str, float]] = {}
    for name, styles in BASES.items():
        for horizon in horizons:
            setting = Setting(styles, horizon, seed, config.device)
            figures[f"{name}, H = {horizon}"] = setting.figures(2 * horizon) | setting.spread()
        figures[f"best of N, {name}"] = Setting(styles, MIDDLE, seed, config.device).best_of_n()
    for size in SIZES:
        figures[f"heterogeneous, n = {size}"] = Setting(HETEROGENEOUS, MIDDLE, seed, config.device).figures(size)
        figures[f"weak, n = {size}"] = Setting(WEAK, MIDDLE, seed, config.device).figures(size)
    for kind in NOISE_KINDS:
        for noise in NOISES:
            setting = Setting(HETEROGENEOUS, MIDDLE, seed, config.device)
            figures[f"{kind}, noise = {noise:g}"] = setting.noisy(2 * MIDDLE, noise, kind)
    return figures | select_solutions(config.data, seed, config.quick)


class Setting:
    """One task of a seed: hidden map, base policies and exact values at one horizon."""

    def __init__(self, styles: Sequence[float], horizon: int, seed: int, device: str = "cpu") -> None:
        self.horizon, self.device, self.rng = horizon, device, np.random.default_rng([seed, horizon, len(styles)])
        self.task = PlantedSubsequence.draw(self.rng)
        self.base = self.task.base_policy(styles)

    def value(self, policy: np.ndarray) -> float:
        """Exact return of a policy or of styles drawn alike, mean over all prompts."""
        return float(self.task.value(policy, self.horizon).mean())

    def sample(self, count: int) -> Traces:
        """Traces of the base."""
        return self.task.sample(self.base, count, self.horizon, self.rng)

    def clone(self, traces: Traces, aggregation: str = "token-mean") -> np.ndarray:
        """The verifier-free policy (2, symbols, tokens)."""
        symbols, tokens = len(self.task.gold), self.task.tokens
        learner = BehaviourCloning(aggregation)  # type: ignore[arg-type]
        states = traces.progress * symbols + traces.needed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEvidenceWarning)
            table = learner.fit(
                states, traces.tokens, 2 * symbols, tokens, traces.until_solved, self.base.mean(0).reshape(-1, tokens)
            )
        return np.asarray(table).reshape(2, symbols, tokens)

    def improve(self, base: np.ndarray, rewards: np.ndarray, kappa: float = KAPPA) -> np.ndarray:
        """The verifier-based policy, around the given one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEvidenceWarning)
            better = PessimisticImprove(kappa)(torch.as_tensor(base, device=self.device), rewards)
        return np.asarray(better.cpu())

    def learn(self, traces: Traces, noise: float = 0.0, kind: str = "random step") -> dict[str, np.ndarray]:
        """What verifiers say of each symbol and token, (symbols, tokens), NaN for symbols never seen at a flip.

        "best map": 1 for the token that the best-fitting map gives a symbol, else 0; "means" and "verdicts": the tables
        of squared and zero-one loss themselves. A wrong report tells of a flip at a step drawn alike, or of the pair
        that a fixed wrong map gives, whether the trace was solved or not.
        """
        symbols, tokens = len(self.task.gold), self.task.tokens
        count = len(traces.tokens)
        wrong = self.rng.random(count) < noise
        steps = np.where(traces.solved[:, -1], traces.solved.argmax(axis=1), 1)
        random = self.rng.integers(1, self.horizon, size=count)
        pairs = traces.pairs(np.where(wrong, random, steps) if kind == "random step" else steps)
        if kind == "decoy":
            pairs = np.where(wrong[:, None], (self.task.gold[traces.prompts] + 1) % tokens, pairs)
        reported = traces.solved[:, -1] | wrong
        every = np.arange(tokens)
        keys = (traces.prompts[reported][..., None] * tokens + every).ravel()
        labels = (pairs[reported][..., None] == every).ravel().astype(np.float64)
        asked = np.arange(symbols * tokens)
        means, verdicts = (
            np.asarray(VerifierFit(loss).fit(keys, labels)(asked)).reshape(symbols, tokens)
            for loss in ("squared", "zero_one")
        )
        best = np.where(np.isnan(means), np.nan, np.eye(tokens)[np.nan_to_num(means).argmax(axis=1)])
        return {"best map": best, "means": means, "verdicts": verdicts}

    def figures(self, count: int) -> dict[str, float]:
        """Both learners on the same `count` traces, and what they stand on."""
        traces = self.sample(count)
        rewards, mean = self.learn(traces)["best map"], self.base.mean(axis=0)
        start = traces.until_solved & (traces.progress == 0)
        gold = self.task.gold[traces.needed] == traces.tokens
        return {
            "VF": self.value(self.clone(traces)),
            "VF, traces alike": self.value(self.clone(traces, "sequence-mean")),
            "VB": self.value(self.improve(mean, rewards)),
            "VB, style kept": self.value(self.improve(self.base, rewards)),
            "VB, style kept, kappa 0": self.value(self.improve(self.base, rewards, 0.0)),
            "style mean": self.value(mean),
            "base": self.value(self.base),
            "gold share in the cloned data": float(gold[start].mean()) if start.any() else 0.0,
            "gold share of the style mean": float(mean[0, np.arange(len(self.task.gold)), self.task.gold].mean()),
            "solved traces": float(traces.solved[:, -1].mean()),
            "symbols seen": float((~np.isnan(rewards[:, 0])).mean()),
        }

    def spread(self) -> dict[str, float]:
        """Heterogeneity and anti-concentration from traces, and the ball over whole traces, exact."""
        chosen = self.rng.permutation(self.task.prompts)[:AUDITED]
        prompts = np.repeat(chosen, PER_PROMPT, axis=0)
        traces = self.task.sample(self.base, len(prompts), self.horizon, self.rng, prompts)
        returns = traces.returns.reshape(AUDITED, PER_PROMPT)
        chances, worth = self._returns()
        mean = chances @ worth
        above = worth >= (mean + np.sqrt(KAPPA * (chances @ worth**2 - mean**2)))[:, None]
        return {
            "deviation": math.sqrt(float(np.median(heterogeneity(returns)))),
            "anti-concentration": float(anti_concentration(returns, KAPPA)),
            "anti-concentration, exact": float((chances * above).sum(axis=1).mean()),
            "best in the ball over traces": float((chi2_tilt(chances, worth, KAPPA) @ worth).mean()),
        }

    def best_of_n(self) -> dict[str, float]:
        """Exact mean return of the best of N base traces by the true checker."""
        chances, worth = self._returns()
        return {str(n): float((best_of_n_distribution(chances, worth, n) @ worth).mean()) for n in BUDGETS}

    def noisy(self, count: int, noise: float, kind: str) -> dict[str, float]:
        """VB with a checker that is wrong on a share `noise` of the traces, beside VF on clean ones."""
        traces = self.sample(count)
        mean, found = self.base.mean(axis=0), self.learn(traces, noise, kind)
        right = found["best map"][np.arange(len(self.task.gold)), self.task.gold]
        return {name: self.value(self.improve(mean, rewards)) for name, rewards in found.items()} | {
            "style kept": self.value(self.improve(self.base, found["best map"])),
            "VF": self.value(self.clone(traces)),
            "style mean": self.value(mean),
            "base": self.value(self.base),
            "symbols learned right": float(np.nan_to_num(right).mean()),
        }

    def _returns(self) -> tuple[np.ndarray, np.ndarray]:
        """Distribution of returns of the base on every prompt, and the returns."""
        chances = self.task.return_distribution(self.base, self.horizon).mean(axis=0)
        return chances.reshape(-1, self.horizon + 1), np.arange(self.horizon + 1, dtype=np.float64)


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def gap(base: str, horizon: int, learner: str = "VB") -> np.ndarray:
        name = f"{base}, H = {horizon}"
        return arm(runs, name, learner) - arm(runs, name, "VF")

    def growth(base: str, learner: str = "VB") -> tuple[float, tuple[float, float]]:
        """Mean gap at the long horizon over that at the short one; seeds are resampled in pairs."""
        long, short = gap(base, LONG, learner), gap(base, SHORT, learner)

        def ratio(rows: np.ndarray) -> np.ndarray:
            chosen = rows.astype(int)
            return np.asarray(long[chosen].mean(axis=1) / np.maximum(short[chosen].mean(axis=1), 1e-3))

        return paired_bootstrap(np.arange(len(runs)), statistic=ratio)

    effect, interval = growth("heterogeneous")
    kept, flat = growth("heterogeneous", "VB, style kept")[0], growth("homogeneous")[0]
    few, many = (
        (arm(runs, f"heterogeneous, n = {n}", "VB") - arm(runs, f"heterogeneous, n = {n}", "VF")).mean()
        for n in (FEW, MANY)
    )
    checks = {
        "heterogeneous: the gap at 256 is at least 3 times that at 64": effect >= 3,
        "and grows at least like sqrt(H), by the interval's low end": interval[0] >= 2,
        "also where VB keeps the style of each trace": kept >= 3,
        "homogeneous: the gap at 256 is at most 1.3 times that at 64": flat <= 1.3,
        "8 times the data leaves at least half of the gap": bool(many >= few / 2),
    }
    refuted = effect < 1.3 or many < MIDDLE / 100
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    return Judgement(verdict, effect, interval, _summary(runs, effect, kept, flat), checks)


def _summary(runs: Sequence[Figures], effect: float, kept: float, flat: float) -> str:
    def listed(arms: Sequence[str], quantity: str, digits: int = 1) -> str:
        return " ".join(f"{arm(runs, name, quantity).mean():.{digits}f}" for name in arms)

    def rows(arms: Sequence[str], quantities: Sequence[str]) -> str:
        return ", ".join(f"{quantity} {listed(arms, quantity)}" for quantity in quantities)

    def below(name: str, quantity: str) -> bool:
        return bool(arm(runs, name, quantity).mean() < arm(runs, name, "VF").mean())

    horizons = [h for h in HORIZONS if f"heterogeneous, H = {h}" in runs[0]]
    long = f"heterogeneous, H = {horizons[-1]}"
    at = {
        name: arm(runs, long, name).mean() for name in ("VB", "VB, style kept", "VF", "VF, traces alike", "style mean")
    }
    parts = [
        f"Gap at 256 over gap at 64: heterogeneous {effect:.2f} ({kept:.2f} with the style kept), homogeneous "
        f"{flat:.2f}."
    ]
    for base in BASES:
        arms = [f"{base}, H = {h}" for h in horizons]
        gaps = " ".join(
            f"{(arm(runs, a, 'VB') - arm(runs, a, 'VF')).mean() / math.sqrt(h):.2f}"
            for a, h in zip(arms, horizons, strict=True)
        )
        parts.append(
            f"{base.capitalize()}, H = {', '.join(map(str, horizons))}: "
            f"{rows(arms, (*LEARNERS, 'style mean', 'base'))}; (VB - VF) / sqrt(H) {gaps}; deviation "
            f"{listed(arms, 'deviation')}, c(.5) {listed(arms, 'anti-concentration', 2)} estimated and "
            f"{listed(arms, 'anti-concentration, exact', 2)} exact, best in the ball over traces "
            f"{listed(arms, 'best in the ball over traces')}."
        )
    parts.append(
        f"Of the gap of {at['VB'] - at['VF']:.1f} at H = {horizons[-1]}, {at['style mean'] - at['VF']:.1f} come from "
        f"averaging styles by trace, without any verifier; a clone that weighs traces alike, and so the quick ones "
        f"more, reaches {at['VF, traces alike']:.1f}, which leaves {at['VB'] - at['VF, traces alike']:.1f} to VB and "
        f"{at['VB, style kept'] - at['VF, traces alike']:.1f} to VB with the style kept. The rule speaks about cloning "
        "by maximum likelihood, as the paper defines it."
    )
    first = f"heterogeneous, n = {2 * MIDDLE}"
    sizes = [f"heterogeneous, n = {n}" for n in SIZES], [f"weak, n = {n}" for n in SIZES]
    parts.append(
        f"Data n = {', '.join(map(str, SIZES))} at H = {MIDDLE}: {rows(sizes[0], LEARNERS)}; weaker "
        f"anti-concentration: {rows(sizes[1], LEARNERS)}. Share of gold tokens in the cloned data before "
        f"the first one: heterogeneous {listed([first], 'gold share in the cloned data', 3)}, style mean "
        f"{listed([first], 'gold share of the style mean', 3)}. kappa = 0 with the style kept is the base to "
        f"{max(np.abs(arm(runs, a, 'VB, style kept, kappa 0') - arm(runs, a, 'base')).max() for a in sizes[0]):.0e}."
    )
    for kind in NOISE_KINDS:
        arms = [f"{kind}, noise = {noise:g}" for noise in NOISES]
        lost = [
            next((f"from {n:g} on" for n, a in zip(NOISES, arms, strict=True) if below(a, name)), "nowhere")
            for name in ("best map", "style kept")
        ]
        parts.append(
            f"Checker wrong on {', '.join(f'{n:g}' for n in NOISES)} of the traces ({kind}): "
            f"{rows(arms, ('best map', 'means', 'verdicts', 'style kept', 'VF'))}; VB falls below VF "
            f"{lost[0]}, with the style kept {lost[1]}."
        )
    best = {base: " ".join(f"{arm(runs, f'best of N, {base}', str(n)).mean():.1f}" for n in BUDGETS) for base in BASES}
    parts.append(
        f"Best of {', '.join(map(str, BUDGETS))} by the true checker, at as many times {MIDDLE} tokens and as many "
        f"queries: heterogeneous {best['heterogeneous']}, homogeneous {best['homogeneous']}."
    )
    return " ".join([*parts, *_real(runs)])


def _real(runs: Sequence[Figures]) -> list[str]:
    if "GSM8K selection" not in runs[0]:
        return ["No real model solutions were given."]

    def said(name: str) -> str:
        quantities: Mapping[str, float] = runs[0][name]
        return ", ".join(f"{quantity} {arm(runs, name, quantity).mean():.3f}" for quantity in quantities)

    sources = [name for name in runs[0] if name.startswith("GSM8K, ")]
    return [
        f"GSM8K, four solutions a question, best of 4 on the unseen half: {said('GSM8K selection')}.",
        *(f"{name}: {said(name)}." for name in sources),
    ]


STUDY = Study(
    slug="03-verifier-based",
    method="verifier-based",
    claim="With a heterogeneous, anti-concentrated base policy and data of the order of the budget H, the gap between "
    "a verifier-based learner and cloning grows at least like sqrt(H), and more data does not close it (arXiv "
    "2502.12118).",
    task="Planted subsequence: 20 symbols, 20 tokens, a random hidden map, budgets H of 16 to 256 tokens, return "
    "H - t; styles .02, .05, .3, .6 (heterogeneous), .2425 (homogeneous), 0, 0, 0, .6 (weak). With data: GSM8K "
    "questions with four solutions each of two model sizes.",
    baselines="VF: smoothed maximum likelihood (pseudo-count 1 a state) on the solved traces up to the solving step, "
    "weighing tokens alike as the paper does; the same weighing traces alike; the mean style; the base. Best of N by "
    "the true checker. Nothing has a learning rate. GSM8K: a random solution, majority vote, any right solution.",
    measure="Expected return by dynamic programming, mean over all 400 prompts; n = 2 H traces and as many queries of "
    "the checker for both learners; chi-square radius .5 for every state.",
    rule="Supported: with the heterogeneous base the mean VB - VF gap at H = 256 is at least 3 times that at 64, the "
    "low end of the ratio's interval is at least 2 (the growth of sqrt(H)), the ratio is at least 3 also for VB with "
    "the style kept, with the homogeneous base the ratio is at most 1.3, and at H = 128 the gap at n = 1024 is at "
    "least half of that at n = 128. Not supported: a ratio below 1.3, or VF within 1 % of H of VB at n = 1024. "
    "Otherwise inconclusive. The clone that weighs traces alike, noise, best of N and GSM8K stand beside the rule.",
    effect="heterogeneous VB - VF gap at H = 256 over that at H = 64",
    full_scale="Llama-3.2-3B and 3.1-8B on MATH, base models made more or less heterogeneous by mixing SFT styles; VF "
    "= SFT on correct traces, VB = RL or best of N with a trained verifier; budgets of 2^10 to 2^14 tokens; s1-32B.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "horizons": HORIZONS,
        "data": SIZES,
        "kappa": KAPPA,
        "styles": BASES | {"weak": WEAK},
        "pseudo-count": 1.0,
        "best of": BUDGETS,
        "checker noise": NOISES,
    },
)
