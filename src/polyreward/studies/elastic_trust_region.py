"""Elastic trust regions: prompts of very different pass rate, and enough inner steps that the clip binds.

Claim: a clip interval that widens with |advantage| and with the variance of the group's rewards is consistently more
accurate than GRPO while the policy's entropy decays much more slowly (ETR, arXiv 2601.03723, abstract).

The task. Each of 60 prompts has its own softmax over 64 responses, of which 2 to 6 are correct; the initial probability
of a correct one runs from sigmoid(-4) to sigmoid(2). A step takes 20 prompts, 16 samples each, group-normalised
advantages, and 8 gradient steps on the clipped surrogate. With one gradient step the ratio is 1 and no clip acts.
The radius of ETR is smaller on average than its base, so a static clip of the same average radius is among the arms,
and a sweep of static clips for the whole trade-off of pass rate and entropy.

Responses of a kind (correct, wrong) start equally likely, which is the highest entropy at a given pass rate. A panel
starts them from Gaussian logits of deviation 1, at the same pass rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.objectives import ElasticTrustRegion, FixedClip, PolicyObjective
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, arm, paired_bootstrap

PROMPTS, RESPONSES, GROUP, PROMPTS_PER_STEP = 60, 64, 16, 20
STEPS, INNER_STEPS, LEARNING_RATE = 60, 8, 2.0
RADIUS, LABEL_NOISE, TARGET = 0.3, 0.05, 0.9
STATIC = (0.15, 0.2, 0.25, 0.4)
NOISY, UNEQUAL = f"{LABEL_NOISE:.0%} of labels flipped", "unequal start"
ADVANTAGE = chain(WeightedSum(), Center("group"), Scale("group", epsilon=1e-6, ddof=0))
REGIONS: dict[str, FixedClip | ElasticTrustRegion] = {
    "etr": ElasticTrustRegion(low=RADIUS, high=RADIUS),
    "micro only": ElasticTrustRegion(low=RADIUS, high=RADIUS, macro=0.0),
    "macro only": ElasticTrustRegion(low=RADIUS, high=RADIUS, micro=0.0),
    "grpo": FixedClip(RADIUS, RADIUS),
    "clip-higher": FixedClip(0.2, 0.28),
    **{f"static {radius:g}": FixedClip(radius, radius) for radius in STATIC},
}
MATCHED = "grpo-matched"


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm on the prompts of this seed; the matched radius is the one that the ETR arm had."""
    torch.set_num_threads(1)
    steps, device = 5 if config.quick else STEPS, config.device
    figures = {name: train(region, seed, steps, device=device) for name, region in REGIONS.items()}
    figures[MATCHED] = train(matched(figures["etr"]), seed, steps, device=device)
    for name in ("etr", "micro only", "macro only", "grpo"):
        figures[f"{name}, {NOISY}"] = train(REGIONS[name], seed, steps, label_noise=LABEL_NOISE, device=device)
    for name in ("etr", "grpo"):
        figures[f"{name}, {UNEQUAL}"] = train(REGIONS[name], seed, steps, unequal=True, device=device)
    region = matched(figures[f"etr, {UNEQUAL}"])
    figures[f"{MATCHED}, {UNEQUAL}"] = train(region, seed, steps, unequal=True, device=device)
    return figures


def matched(figures: Mapping[str, float]) -> FixedClip:
    """A static clip of the mean radius that an arm had."""
    return FixedClip(figures["radius"], figures["radius"])


def make_prompts(generator: torch.Generator, unequal: bool = False) -> tuple[Tensor, Tensor]:
    """Logits (60, 64) at the start, and which responses are correct, bool (60, 64)."""
    counts = torch.randint(2, 7, (PROMPTS, 1), generator=generator)
    places = torch.rand(PROMPTS, RESPONSES, generator=generator).argsort(dim=1).argsort(dim=1)
    correct = places < counts
    mass = torch.linspace(-4, 2, PROMPTS).sigmoid()[:, None]
    odds = torch.randn(correct.shape, generator=generator).exp() if unequal else torch.ones(correct.shape)
    inside, outside = odds * correct, odds * ~correct
    share = torch.where(correct, mass * inside / inside.sum(1, True), (1 - mass) * outside / outside.sum(1, True))
    return share.log(), correct


def train(
    region: FixedClip | ElasticTrustRegion,
    seed: int,
    steps: int,
    *,
    label_noise: float = 0.0,
    unequal: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Train one arm; all arms of a seed share the prompts and the stream of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    logits, correct = make_prompts(generator, unequal)
    objective = PolicyObjective(region, aggregation="token-mean")
    groups = torch.arange(PROMPTS_PER_STEP).repeat_interleave(GROUP)
    mask = torch.ones(len(groups), 1, dtype=torch.bool, device=device)
    pass_rates = [float((logits.softmax(dim=1) * correct).sum(dim=1).mean())]
    entropies = [float(entropy(logits.softmax(dim=1)).mean())]
    radii, clipped, rare, weak = [], [], [], []
    for _ in range(steps):
        chosen = torch.randperm(PROMPTS, generator=generator)[:PROMPTS_PER_STEP]
        drawn = torch.multinomial(logits[chosen].softmax(dim=1), GROUP, replacement=True, generator=generator)
        flipped = torch.rand(drawn.shape, generator=generator) < label_noise
        rewards = (correct[chosen].gather(1, drawn) ^ flipped).double().reshape(-1, 1)
        batch = RewardBatch(rewards.to(device), ("correct",), groups)
        advantages = compute_advantages(ADVANTAGE, batch).float()
        low, high = objective.bounds(advantages, batch)
        table, drawn = logits[chosen].to(device).requires_grad_(), drawn.to(device)
        old = table.detach().log_softmax(dim=1).gather(1, drawn).reshape(-1, 1)
        for _ in range(INNER_STEPS):
            logp = table.log_softmax(dim=1).gather(1, drawn).reshape(-1, 1)
            # Sum over prompts of the mean over each group: a prompt's step does not depend on their number.
            loss, metrics = objective(logp, old, advantages, mask, low=low, high=high, normaliser=GROUP)
            (gradient,) = torch.autograd.grad(loss, table)
            table = (table - LEARNING_RATE * gradient).detach().requires_grad_()
        ratio = (table.detach().log_softmax(dim=1).gather(1, drawn).reshape(-1) - old.squeeze(1)).exp()
        logits[chosen] = table.detach().cpu()
        active = advantages != 0
        radii.append(((torch.as_tensor(low) + torch.as_tensor(high)) / 2).expand(len(groups))[active.to(_place(low))])
        clipped.append(float(metrics["clip_fraction"]) * len(groups) / max(int(active.sum()), 1))
        rare.append(ratio[advantages > 2])
        weak.append((ratio - 1).abs()[active & (advantages.abs() < 0.5)])
        probabilities = logits.softmax(dim=1)
        pass_rates.append(float((probabilities * correct).sum(dim=1).mean()))
        entropies.append(float(entropy(probabilities).mean()))
    inside = torch.where(correct, logits, -torch.inf).softmax(dim=1)
    return {
        "pass rate": pass_rates[-1],
        "entropy": entropies[-1],
        "entropy among correct": float((entropy(inside) / correct.sum(dim=1).log()).mean()),
        "area": float(np.mean(pass_rates[1:])),
        "entropy at pass rate 0.9": entropy_at(pass_rates, entropies),
        "clip fraction": float(np.mean(clipped)),
        "radius": float(torch.cat(radii).mean()),
        "ratio of rare correct": _mean(rare),
        "ratio change of weak": _mean(weak),
    }


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each row in nats."""
    return torch.special.entr(probabilities).sum(dim=1)


def entropy_at(pass_rates: Sequence[float], entropies: Sequence[float], target: float = TARGET) -> float:
    """Entropy where the pass rate first reaches `target`, linear between steps; the last one if it never does."""
    reached = np.flatnonzero(np.asarray(pass_rates) >= target)
    if not reached.size or reached[0] == 0:
        return entropies[-1]
    after = int(reached[0])
    before, share = after - 1, (target - pass_rates[after - 1]) / (pass_rates[after] - pass_rates[after - 1])
    return entropies[before] + share * (entropies[after] - entropies[before])


def _place(bound: float | Tensor) -> torch.device:
    return torch.as_tensor(bound).device


def _mean(parts: Sequence[Tensor]) -> float:
    values = torch.cat(list(parts))
    return float(values.mean()) if len(values) else 1.0


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def mean(name: str, quantity: str) -> float:
        return float(arm(runs, name, quantity).mean())

    gain = arm(runs, "etr", "entropy") - arm(runs, "grpo", "entropy")
    loss = mean("grpo", "pass rate") - mean("etr", "pass rate")
    area, area_interval = paired_bootstrap(arm(runs, "etr", "area"), arm(runs, MATCHED, "area"))
    effect, interval = paired_bootstrap(gain)
    checks = {
        "(a) more entropy than GRPO in at least 80 % of the seeds": bool((gain > 0).mean() >= 0.8),
        "(a) mean loss of pass rate below 0.01": loss < 0.01,
        "(b) area above the matched static radius by more than 0.008": area > 0.008,
    }

    def listed(names: Sequence[str], *quantities: str) -> str:
        return ", ".join(f"{name} " + " / ".join(f"{mean(name, part):.3f}" for part in quantities) for name in names)

    rare, weak = (mean("etr", part) - mean(MATCHED, part) for part in ("ratio of rare correct", "ratio change of weak"))
    both = ("entropy", "area")
    beyond = [f"{r:g}" for r in STATIC if all(mean(f"static {r:g}", part) >= mean("etr", part) for part in both)]
    noisy = [f"{name}, {NOISY}" for name in ("grpo", "etr", "micro only", "macro only")]
    unequal = [f"{name}, {UNEQUAL}" for name in ("grpo", "etr", MATCHED)]
    summary = (
        "Final pass rate / entropy / entropy at pass rate 0.9 / area: "
        + listed(
            ("grpo", "etr", MATCHED, "micro only", "macro only", "clip-higher"),
            *("pass rate", "entropy", "entropy at pass rate 0.9", "area"),
        )
        + f". The matched radius is {mean('etr', 'radius'):.3f}. Entropy gain over GRPO {effect:+.3f} in "
        f"{(gain > 0).sum()} of {len(runs)} seeds, pass rate {-loss:+.4f}; area over the matched clip {area:+.4f} "
        f"[{area_interval[0]:+.4f}, {area_interval[1]:+.4f}]. Static clips, entropy / area: "
        + listed([f"static {radius:g}" for radius in STATIC], *both)
        + f"; at least ETR's in both: {', '.join(beyond) or 'none'}. Ratio reached with A > 2: {rare:+.3f} against the "
        f"matched clip; change with |A| < 0.5: {weak:+.3f}. With {NOISY}, entropy / pass rate: "
        + listed(noisy, "entropy", "pass rate")
        + ". Unequal start, entropy / area: "
        + listed(unequal, *both)
        + "."
    )
    return Judgement("supported" if all(checks.values()) else "not supported", effect, interval, summary, checks)


STUDY = Study(
    slug="38-etr",
    method="elastic-trust-region",
    claim="Clip intervals that depend on |advantage| and on the variance of the group are consistently more accurate "
    "than GRPO's 1 - eps to 1 + eps on AIME and MATH, while the policy's entropy decays much more slowly (arXiv "
    "2601.03723; the claim is in words).",
    task="60 softmax policies over 64 responses, initial pass rates 0.02 to 0.88; 8 inner steps a batch.",
    baselines="GRPO with clip 0.3, GRPO with a static clip equal to ETR's mean radius in the same seed (over rollouts "
    "with an advantage), static clips 0.15, 0.2, 0.25 and 0.4, clip-higher 0.2/0.28. ETR has base 0.3 and its default "
    "elasticities; micro only and macro only switch one level off. All arms share learning rate 2.0, group size 16, 60 "
    "steps of 8 gradient steps. Reported beside: GRPO, ETR and its ablations with 5 % of the labels flipped; GRPO, ETR "
    "and the matched clip from unequal responses.",
    measure="Exact pass rate and entropy of the final policy (mean over prompts), area under the pass-rate curve, "
    "entropy interpolated at pass rate 0.9, entropy among correct responses, ratio reached by rare correct and by weak "
    "samples.",
    rule="Supported: (a) final entropy above GRPO's in at least 80 % of the seeds, at a mean loss of pass rate "
    "below 0.01, and (b) mean area above the matched static radius by more than 0.008. Not supported: either fails. "
    "Higher accuracy than GRPO, which the paper claims, is reported and not part of the rule.",
    effect="entropy of the final policy, ETR minus GRPO",
    full_scale="Qwen3-8B-Base on DAPO-Math-17k, GRPO against ETR, AIME24/25 avg@32 and MATH500, entropy curves; "
    "8 to 64 GPUs.",
    seeds=20,
    run_seed=run_seed,
    judge=judge,
    config={
        "prompts": PROMPTS,
        "responses": RESPONSES,
        "group": GROUP,
        "prompts a step": PROMPTS_PER_STEP,
        "steps": STEPS,
        "inner steps": INNER_STEPS,
        "learning rate": LEARNING_RATE,
        "radius": RADIUS,
        "static radii": STATIC,
        "label noise": LABEL_NOISE,
    },
)
