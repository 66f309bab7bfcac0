"""Study: BRAIn's gradient variance, recovery of an exact posterior, and its weights (arXiv 2402.02479).

(a) Variance of the gradient of DPG, GDC++ and BRAIn on Gaussians, the experiment of the authors' repository.
(b) Offline training on 32 prior samples a prompt, where the posterior is in the policy's family and where it is not.
(c) Fewer samples, and weights hardened towards the best sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from polyreward.objectives.posterior import (
    SelfNormalizedKL,
    brain_grad,
    brain_loss,
    brain_weights,
    dpg_grad,
    gdcpp_grad,
)
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
from polyreward.tasks.posterior_recovery import PosteriorProblem, PosteriorTask

OFFSETS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS, DRAWS = 20_000, 8
RATES = (0.01, 0.05, 0.2)
SAMPLES, STEPS, NOISY_STEPS = 32, 1500, 600
FEWER, HARDENING = (2, 4, 8, 32), (0.0, 0.5, 0.9, 1.0)
RATE = 0.05
EXACT, NOISY = PosteriorTask(), PosteriorTask(noise=0.5)
BASELINES = ("weighted SFT", "GDC++", "best-of-32 SFT", "DPO, sampled labels", "DPO, arg-max")
TRAINED = ("BRAIn", *BASELINES)


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """All three parts."""
    torch.set_num_threads(1)
    figures: dict[str, Mapping[str, float]] = {}
    for offset in OFFSETS:
        figures[f"variance, m={offset:g}"] = variance(offset, seed, 2000 if config.quick else REPEATS, config.device)
    for part, task, steps in (("exact", EXACT, STEPS), ("noisy", NOISY, NOISY_STEPS)):
        steps = 60 if config.quick else steps
        problem = task.draw(seed, config.device)
        figures[f"{part}, SFT"] = measured(problem, problem.prior)
        figures[f"{part}, posterior"] = {"reward": float((problem.posterior().exp() * problem.reward).sum(1).mean())}
        for name in TRAINED:
            for rate in RATES:
                figures[rated(f"{part}, {name}", rate)] = recover(problem, objective(name), seed, steps, rate)
    problem, steps = NOISY.draw(seed, config.device), 60 if config.quick else NOISY_STEPS
    for number in FEWER:
        figures[f"samples, {number}"] = recover(problem, objective("BRAIn"), seed, steps, RATE, number)
    for share in HARDENING:
        figures[f"hardening, {share:g}"] = recover(problem, hardened(share), seed, steps, RATE)
    return figures


def variance(offset: float, seed: int, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Variance and mean of the gradient in the policy's mean: target N(0,1), policy N(1,1), proposal N(offset,1)."""
    rng = np.random.default_rng([seed, round(100 * offset)])
    y = torch.from_numpy(rng.normal(size=(repeats, DRAWS)) + offset).to(device)
    target, policy, proposal = (-((y - mean) ** 2) / 2 for mean in (0.0, 1.0, offset))
    score, uniform = y - 1.0, torch.zeros_like(y)
    found = {
        "DPG": dpg_grad(target, proposal, log_z=0.0, score=score),
        "GDC++": gdcpp_grad(policy, target, proposal, log_z=0.0, score=score),
        "BRAIn": brain_grad(policy, target, proposal, uniform, score=score),
    }
    return {f"{name} {what}": float(getattr(g, what)()) for name, g in found.items() for what in ("var", "mean")}


class Drawn:
    """Samples of the prior (P, n) with log p and reward, and random pairs of them with sampled preferences."""

    def __init__(self, problem: PosteriorProblem, seed: int, number: int) -> None:
        rng = np.random.default_rng([seed, number])
        self.chosen = problem.sample(number, rng)
        self.prior = problem.logp(problem.prior).gather(1, self.chosen)
        self.reward = problem.reward.gather(1, self.chosen)
        first, second = self.reward[:, 0::2], self.reward[:, 1::2]  # samples are independent, so neighbours are pairs
        better = torch.from_numpy(rng.random(tuple(first.shape))).to(first.device)
        self.prefers_first = better < (first - second).double().sigmoid()


Objective = Callable[[Tensor, Drawn], Tensor]


def objective(name: str) -> Objective:
    """Loss of log q of the samples (P, n), by the name of the arm."""

    def loss(logq: Tensor, drawn: Drawn) -> Tensor:
        prior, reward = drawn.prior, drawn.reward
        if name == "BRAIn":
            return brain_loss(logq, prior, prior, reward).loss
        if name == "weighted SFT":
            return -(brain_weights(prior, prior, reward) * logq).sum(dim=1).mean()
        if name == "GDC++":
            return -(gdcpp_grad(logq, prior + reward, prior) * logq).sum(dim=1).mean()
        if name == "best-of-32 SFT":
            return -logq.gather(1, reward.argmax(dim=1, keepdim=True)).mean()
        margin = (logq - prior)[:, 0::2] - (logq - prior)[:, 1::2]
        first = drawn.prefers_first if name == "DPO, sampled labels" else reward[:, 0::2] > reward[:, 1::2]
        return -torch.nn.functional.logsigmoid(torch.where(first, margin, -margin)).mean()

    return loss


def hardened(share: float) -> Objective:
    """BRAIn with its weights mixed with all weight on the best sample."""

    def loss(logq: Tensor, drawn: Drawn) -> Tensor:
        weights = brain_weights(drawn.prior, drawn.prior, drawn.reward)
        best = torch.zeros_like(weights).scatter_(1, drawn.reward.argmax(dim=1, keepdim=True), 1.0)
        return SelfNormalizedKL()((1 - share) * weights + share * best, logq, drawn.prior).loss

    return loss


def recover(
    problem: PosteriorProblem, loss: Objective, seed: int, steps: int, rate: float, number: int = SAMPLES
) -> dict[str, float]:
    """Train from the prior on one set of its samples; all arms of a seed see the same samples."""
    drawn = Drawn(problem, seed, number)
    parameters = problem.prior.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameters], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(problem.logp(parameters).gather(1, drawn.chosen), drawn).backward()
        optimizer.step()
    return measured(problem, parameters.detach())


def measured(problem: PosteriorProblem, parameters: Tensor) -> dict[str, float]:
    """Exact divergence from the posterior and expected reward."""
    return {"kl": problem.divergence(parameters), "reward": problem.value(parameters)}


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def of(offset: float, name: str, what: str) -> np.ndarray:
        return arm(runs, f"variance, m={offset:g}", f"{name} {what}")

    def relative(offset: float, name: str) -> float:
        return float((of(offset, name, "var") / of(offset, name, "mean") ** 2).mean())

    rivals, shifted = ("DPG", "GDC++"), OFFSETS[1:]
    least = all((of(m, "BRAIn", "var") < of(m, rival, "var")).all() for m in shifted for rival in rivals)
    even = {m: all(relative(m, "BRAIn") < relative(m, rival) for rival in rivals) for m in shifted}
    ratio = of(1.0, "DPG", "var") / of(1.0, "BRAIn", "var")

    def best(part: str, name: str, quantity: str = "kl") -> np.ndarray:
        rate = best_rate(runs, f"{part}, {name}", "kl", RATES, lowest=True)
        return arm(runs, rated(f"{part}, {name}", rate), quantity)

    exact = {"SFT": arm(runs, "exact, SFT", "kl")} | {name: best("exact", name) for name in TRAINED}
    others = np.min([exact[name] for name in exact if name != "BRAIn"], axis=0)
    effect, interval = paired_bootstrap(exact["BRAIn"], others)
    checks = {
        "variance: BRAIn least at every m from 0.25": bool(least),
        "variance: DPG / BRAIn at least 5 at m=1": bool(ratio.mean() >= 5),
        "variance / mean^2: BRAIn least at every m from 0.25": all(even.values()),
        "recovery: divergence of BRAIn below 0.01 in every seed": bool((exact["BRAIn"] < 0.01).all()),
        "recovery: below every baseline in every seed": bool((exact["BRAIn"] < others).all()),
    }
    refuted = not least or effect >= 0
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def row(what: str, digits: int = 3) -> str:
        return "; ".join(
            f"m={m:g} " + "/".join(f"{of(m, name, what).mean():.{digits}f}" for name in (*rivals, "BRAIn"))
            for m in OFFSETS
        )

    def listed(figures: Mapping[str, np.ndarray]) -> str:
        return ", ".join(f"{name} {values.mean():.4f}" for name, values in figures.items())

    def shared(part: str) -> dict[str, np.ndarray]:
        return {name: arm(runs, rated(f"{part}, {name}", RATE), "kl") for name in TRAINED}

    noisy = {"SFT": arm(runs, "noisy, SFT", "kl")} | {name: best("noisy", name) for name in TRAINED}
    fewer = {f"n={number}": arm(runs, f"samples, {number}", "kl") for number in FEWER}
    harder = {f"{share:g}": arm(runs, f"hardening, {share:g}", "kl") for share in HARDENING}
    uneven = ", ".join(f"{m:g}" for m, held in even.items() if not held)
    summary = (
        f"Variance DPG/GDC++/BRAIn: {row('var')}; means {row('mean', 2)}; DPG / BRAIn at m=1 {ratio.mean():.1f}. "
        f"Variance / mean^2 is least for BRAIn at every m from 0.25{f' but {uneven}' if uneven else ''}. Divergence "
        f"KL(posterior || q), best rate each: {listed(exact)}; at rate {RATE:g}: {listed(shared('exact'))}; expected "
        f"reward {arm(runs, 'exact, posterior', 'reward').mean():.2f} for the posterior, "
        f"{best('exact', 'BRAIn', 'reward').mean():.2f} for BRAIn, "
        f"{arm(runs, rated('exact, DPO, arg-max', RATE), 'reward').mean():.2f} for DPO on arg-max at rate {RATE:g}. "
        f"BRAIn - best baseline {effect:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]. Posterior out of the family: "
        f"{listed(noisy)}; at rate {RATE:g}: {listed(shared('noisy'))}. BRAIn by samples: {listed(fewer)}. Weights "
        f"mixed with arg-max: {listed(harder)}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="27-brain",
    method="brain",
    claim="The self-normalised baseline removes the variance of distribution-matching gradients and makes an offline "
    "loss that recovers the posterior, ahead of DPO, SLiC and RRHF on TL;DR and HH (arXiv 2402.02479).",
    task="(a) Gradient in a Gaussian policy's mean from 8 proposals. (b) 40 prompts, all 512 sequences of 3 tokens "
    "over 8 symbols, policies linear in 24 random features; 32 prior samples a prompt, drawn once; posterior in the "
    "family, or out of it by noise 0.5 on the reward. (c) The second with fewer samples and hardened weights.",
    baselines="(a) DPG and GDC++ with the exact normaliser. (b) GDC++ with an estimated normaliser, weighted SFT "
    "(BRAIn without its baseline, the same as DPG with an estimated normaliser), SFT (the prior), SFT on the best of "
    "32, DPO on pairs with Bradley-Terry labels, DPO on pairs with arg-max labels. Every trained arm at learning rates "
    "0.01, 0.05 and 0.2 (Adam, 1500 steps, 600 out of the family), each at its best.",
    measure="(a) Variance and mean of 20,000 estimates. (b), (c) Exact KL(posterior || policy), mean over prompts.",
    rule="Supported: for every m >= 0.25 BRAIn has the least variance in every seed and the least mean variance / "
    "mean^2; DPG / BRAIn >= 5 at m=1; in (b) its divergence is below 0.01 and below every baseline in every seed. Not "
    "supported: some rival has less variance at an m >= 0.25, or the mean of BRAIn - best baseline in (b) is not below "
    "0. Otherwise inconclusive. m=0, the posterior out of the family and (c) are reported beside the rule.",
    effect="BRAIn - best baseline of the seed, KL(posterior || policy) in the family",
    full_scale="Pythia or GPT-J class SFT models on TL;DR and Anthropic HH, 32 samples a prompt, win rates by reward "
    "model and judge against DPO, SLiC-HF and RRHF; 8 x 80 GB.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "offsets": OFFSETS,
        "repeats": REPEATS,
        "draws": DRAWS,
        "rates": RATES,
        "samples": SAMPLES,
        "steps": STEPS,
        "steps out of the family": NOISY_STEPS,
        "fewer samples": FEWER,
        "hardening": HARDENING,
        "prompts": EXACT.prompts,
        "features": EXACT.features,
        "reward scale": EXACT.scale,
        "noise": NOISY.noise,
    },
)
