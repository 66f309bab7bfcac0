"""Study: likelihood rewards on a latent chain of thought with exact marginals (arXiv 2602.03979).

Short answers of one token and long ones of 24: which rewards move the likelihood of the reference, and which success?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from polyreward.objectives.likelihood import LikelihoodPolicyLoss
from polyreward.rewards.likelihood import LikelihoodReward, rloo
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
from polyreward.tasks.latent_chain import LatentChainPolicy, LatentChainTask

RATES = (1e-3, 3e-3, 1e-2)
SHARED = 3e-3
GROUP, BATCH = 8, 32
SHORT, LONG, OPINIONATED = "short", "long", "short, opinionated"
TASKS = {  # task, steps, deviation of the embeddings
    SHORT: (LatentChainTask(prompts=64, length=1), 600, 0.1),
    LONG: (LatentChainTask(prompts=32, length=24, own=0.1), 300, 0.1),
    OPINIONATED: (LatentChainTask(prompts=64, length=1), 600, 1.0),
}
KINDS = ("prob", "avg-prob", "log-prob", "avg-log-prob", "geo-prob", "jepo")
ARMS = ("sft", "binary", *KINDS, "log-prob, no direct term")
MOVED, NEAR, FAR = 0.02, 0.1, 0.3


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm at every rate on every task, and measure the rewards' deviation before training."""
    torch.set_num_threads(1)
    figures: dict[str, Mapping[str, float]] = {}
    for name, (task, steps, opinion) in TASKS.items():
        answers = torch.from_numpy(task.answers(np.random.default_rng([seed, 48]))).to(config.device)
        start = LatentChainPolicy(task, seed, opinion=opinion).to(config.device)
        figures[f"{name}, start"] = start.measure(answers)
        figures[f"{name}, deviation over thoughts"] = deviations(start, answers)
        for kind in ARMS:
            for rate in RATES:
                final = train(kind, task, answers, seed, 8 if config.quick else steps, rate, opinion)
                figures[rated(f"{name}, {kind}", rate)] = final
    return figures


def train(
    kind: str, task: LatentChainTask, answers: Tensor, seed: int, steps: int, rate: float, opinion: float = 0.1
) -> dict[str, float]:
    """Train one arm; all arms of a seed see the same prompts and the same random numbers for their thoughts."""
    policy = LatentChainPolicy(task, seed, kind != "sft", opinion).to(answers.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        prompts = torch.from_numpy(rng.permutation(task.prompts)[:BATCH]).to(answers.device)
        draws = torch.from_numpy(rng.random((len(prompts), GROUP))).to(answers.device)
        noise = rng.random((len(prompts), GROUP, task.length)) if kind == "binary" else None
        optimizer.zero_grad()
        loss(kind, policy, prompts, answers[prompts], draws, noise).backward()
        optimizer.step()
    return policy.measure(answers)


def loss(
    kind: str, policy: LatentChainPolicy, prompts: Tensor, answers: Tensor, draws: Tensor, noise: np.ndarray | None
) -> Tensor:
    """Loss of one step, from uniform numbers `draws` (B, G) for the thoughts and `noise` for sampled answers."""
    table = policy.answers(prompts)  # (B, thoughts, L, symbols)
    logp = table.gather(-1, answers[:, None, :, None].expand(-1, table.shape[1], -1, -1)).squeeze(-1)
    if kind == "sft":
        return -logp.sum(dim=-1).mean()
    thoughts = policy.thoughts(prompts)
    chosen = pick(thoughts.detach(), draws)  # (B, G)
    cot = thoughts.gather(1, chosen)
    if kind == "binary":
        symbols = table[torch.arange(len(prompts)).unsqueeze(1), chosen]  # (B, G, L, symbols)
        said = pick(symbols.detach(), torch.as_tensor(noise, device=draws.device).unsqueeze(-1)).squeeze(-1)
        right = (said == answers.unsqueeze(1)).all(dim=-1).float()
        spoken = symbols.gather(-1, said.unsqueeze(-1)).squeeze(-1).sum(dim=-1)
        return -(rloo(right) * (cot + spoken)).mean()
    after = logp.gather(1, chosen.unsqueeze(-1).expand(-1, -1, logp.shape[-1]))
    name, _, ablation = kind.partition(", ")
    return LikelihoodPolicyLoss(name, direct_term=not ablation)(cot, after).loss


def pick(logp: Tensor, draws: Tensor) -> Tensor:
    """Indices drawn from log-probabilities (..., n) by uniform numbers (..., k), int64 (..., k)."""
    edges = logp.double().exp().cumsum(dim=-1)
    return torch.searchsorted(edges, (draws * edges[..., -1:]).contiguous(), right=True).clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def deviations(policy: LatentChainPolicy, answers: Tensor) -> dict[str, float]:
    """Deviation of each reward over the thoughts, mean over prompts: what there is to learn from."""
    table = policy.answers(torch.arange(len(answers), device=answers.device))
    logp = table.gather(-1, answers[:, None, :, None].expand(-1, table.shape[1], -1, -1)).squeeze(-1).double()
    kinds = [kind for kind in KINDS if kind != "jepo"]
    return {kind: float(LikelihoodReward(kind)(logp).std(dim=1).mean()) for kind in kinds}


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def best(task: str, kind: str, quantity: str) -> np.ndarray:
        name = f"{task}, {kind}"
        return arm(runs, rated(name, best_rate(runs, name, quantity, RATES, lowest=quantity == "nll")), quantity)

    start = arm(runs, "long, start", "nll")
    moved = {kind: best("long", kind, "nll") - start for kind in ("prob", "binary")}
    effect, interval = paired_bootstrap(best("long", "log-prob", "nll"), best("long", "sft", "nll"))
    success = {kind: best("short", kind, "success").mean() for kind in ("log-prob", "binary")}
    perplexity = {kind: np.exp(best(SHORT, kind, "nll")) for kind in ARMS}
    ratios = {kind: perplexity[kind].mean() / perplexity["log-prob"].mean() for kind in ("binary", "prob")}
    checks = {
        "long: prob moves the negative log-likelihood by less than 0.02": bool(abs(moved["prob"].mean()) < MOVED),
        "long: binary moves it by less than 0.02": bool(abs(moved["binary"].mean()) < MOVED),
        "long: log-prob ends at most 0.1 above sft": bool(interval[1] <= NEAR),
        "short: success of log-prob at least that of binary - 0.02": bool(
            success["log-prob"] >= success["binary"] - MOVED
        ),
        "short: perplexity of binary and prob at least 5 times that of log-prob": bool(min(ratios.values()) >= 5),
    }
    refuted = moved["prob"].mean() < -MOVED or effect > FAR
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def listed(task: str, quantity: str, digits: int, rate: float | None = None) -> str:
        names = {kind: rated(f"{task}, {kind}", rate) for kind in ARMS} if rate else {}
        means = {kind: (arm(runs, names[kind], quantity) if rate else best(task, kind, quantity)) for kind in ARMS}
        return ", ".join(f"{kind} {values.mean():.{digits}f}" for kind, values in means.items())

    def perplexities(figures: Mapping[str, np.ndarray]) -> str:
        return ", ".join(f"{kind} {values.mean():.2f}" for kind, values in figures.items())

    def spread(task: str) -> str:
        kinds = [kind for kind in KINDS if kind != "jepo"]
        means = [arm(runs, f"{task}, deviation over thoughts", kind).mean() for kind in kinds]
        return ", ".join(f"{kind} {mean:.1e}" for kind, mean in zip(kinds, means, strict=True))

    shared = {kind: np.exp(arm(runs, rated(f"short, {kind}", SHARED), "nll")) for kind in ARMS}
    beside = {kind: np.exp(best(OPINIONATED, kind, "nll")) for kind in ARMS}
    apart = {kind: beside[kind].mean() / beside["log-prob"].mean() for kind in ("binary", "prob")}
    summary = (
        f"Long answers, negative log-likelihood a token (start {start.mean():.3f}), best rate each: "
        f"{listed('long', 'nll', 3)}; success {listed('long', 'success', 2)}. Log-prob - sft {effect:+.3f} "
        f"[{interval[0]:+.3f}, {interval[1]:+.3f}]. Short answers, best rate each, success: "
        f"{listed('short', 'success', 2)}; perplexity {perplexities(perplexity)}; binary / log-prob "
        f"{ratios['binary']:.2f}, prob / log-prob {ratios['prob']:.2f}. At the shared rate {SHARED:g}: long "
        f"{listed('long', 'nll', 3, SHARED)}; short, success {listed('short', 'success', 2, SHARED)}; perplexity "
        f"{perplexities(shared)}. Short answers where the head begins with opinions, best rate each, success: "
        f"{listed(OPINIONATED, 'success', 2)}; perplexity {perplexities(beside)}; binary / log-prob "
        f"{apart['binary']:.1f}, prob / log-prob {apart['prob']:.1f}. Deviation over thoughts before training: short "
        f"{spread('short')}; long {spread('long')}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="48-likelihood-rewards",
    method="likelihood-rewards",
    claim="The log-probability of the reference is the only likelihood reward that works everywhere: on short answers "
    "success as with binary rewards and far lower perplexity (MATH, Llama-3.2-3B: about 2.2 against 67), on long ones "
    "as good as supervised training, where plain probability does not learn (arXiv 2602.03979).",
    task="Prompts of 8 hidden classes, one of 8 thoughts from a table, answer tokens from a small network given "
    "prompt, thought and place, nearly uniform at first. Short: 64 prompts, 1 token. Long: 32 prompts, 24 tokens, "
    "10 % the prompt's own. Beside the rule: short answers where the network begins with opinions (embeddings of "
    "deviation 1 in place of 0.1).",
    baselines="Supervised training without a thought, binary reward of sampled answers, prob, avg-prob, geo-prob; "
    "beside log-prob also avg-log-prob, JEPO, and log-prob without its direct term. Every arm at learning rates 1e-3, "
    "3e-3 and 1e-2 (Adam); for each quantity the rate that is best for the arm in the mean over seeds.",
    measure="By summing over thoughts: negative log-likelihood a token of the reference, perplexity (its exponential), "
    "greedy success. RLOO with 8 thoughts of 32 prompts a step; 600 steps short, 300 long.",
    rule="Supported: on long answers prob and binary move the negative log-likelihood by less than 0.02 in the mean "
    "and the upper end of the interval of log-prob - sft is at most 0.1; on short ones success of log-prob is at least "
    "that of binary - 0.02 and the perplexity of binary and prob at least 5 times that of log-prob. Not supported: "
    "prob lowers the negative log-likelihood on long answers by more than 0.02, or log-prob is more than 0.3 worse "
    "than sft. Otherwise inconclusive.",
    effect="log-prob - sft, negative log-likelihood a token on long answers",
    full_scale="Qwen2.5-3B and Llama-3.2-3B on MATH and NuminaProof, RLOO, eight rewards, groups of 32 and 4; 8 GPUs.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "rates": RATES,
        "group": GROUP,
        "prompts a step": BATCH,
        "steps": {name: steps for name, (_, steps, _) in TASKS.items()},
        "deviation of the embeddings": {name: opinion for name, (_, _, opinion) in TASKS.items()},
        "arms": ARMS,
    },
)
