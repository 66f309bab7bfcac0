"""A personal judge: training stages and test-time scaling over users, with a small judge and exact tastes.

Claim: a judge that writes a persona and a rubric for each user gains from reinforcement learning with process and
outcome rewards after supervised fine-tuning, from a curriculum, and from averaging 16 chains of its own and 8 with the
histories of similar users: 66.8, 71.1, 72.7 and 75.9 % accuracy (arXiv 2602.12116).

The task is that of `polyreward.studies.taste_judges`: 450 users to train on, 150 to test on, 20 choices each. Stages:
supervised on noisy teacher chains whose verdict is right; policy gradient with 8 chains an input, where the process
reward is how much of the user's two most important criteria the rubric has; the same with the outcome alone, on more
and more pairs that the judge gets wrong or splits on. Then scaling, with three earlier choices and with one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from polyreward.objectives import FixedClip, KLPenalty, PolicyObjective
from polyreward.reward_models.rubric_chains import RubricChainReward, chain_advantages, hard_share
from polyreward.reward_models.user_prototypes import UserPrototypes
from polyreward.reward_models.user_scaling import UserScaler
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
from polyreward.studies.taste_judges import (
    Batch,
    RubricPolicy,
    Users,
    chain_logp,
    quantised,
    rubric_scores,
    rubric_weights,
    sampled,
)

USERS, TRAIN_USERS, PAIRS, HISTORY = 600, 450, 20, 3
TEACHER_NOISE, SUPERVISED_STEPS, BATCH = 0.15, 300, 256
SUPERVISED_RATES, SUPERVISED_RATE = (1e-3, 3e-3, 1e-2), 3e-3
RL_STEPS, RL_RATE, GROUP, CLIP, KL = 150, 1e-3, 8, 0.2, 1e-3
CURRICULUM_STEPS, REFRESH = 100, 20
PROTOTYPES, POOL = 12, 4
COUNTS = ((1, 0), (16, 0), (32, 0), (16, 8), (0, 8))
SEEDS = 8


def supervised(policy: RubricPolicy, users: Users, steps: int, rate: float, generator: torch.Generator) -> None:
    """Learn from teacher chains whose verdict is right."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        batch = drawn(users, BATCH, HISTORY, generator)
        chains = quantised(users.true_weights(batch.user, batch.pair), TEACHER_NOISE, generator).unsqueeze(1)
        scores = rubric_scores(chains, batch.responses)[:, 0]
        right = scores[:, 0] > scores[:, 1]
        each = -chain_logp(policy(batch), chains).mean(dim=(1, 2))
        optimizer.zero_grad()
        (torch.where(right, each, 0.0).sum() / right.sum().clamp(min=1)).backward()
        optimizer.step()


def reinforced(
    policy: RubricPolicy,
    users: Users,
    steps: int,
    alpha: float,
    generator: torch.Generator,
    beta: float = 1.0,
    curriculum: bool = False,
    capped: bool = True,
) -> RubricPolicy:
    """A copy of the judge, trained by policy gradient on its own chains."""
    reference, policy = policy, copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RL_RATE, weight_decay=0.0)
    reward = RubricChainReward(alpha, beta)
    objective = PolicyObjective(FixedClip(CLIP, CLIP), kl=KLPenalty(KL))
    hard: Tensor | None = None
    for step in range(steps):
        if curriculum and step % REFRESH == 0:
            hard = hard_pairs(policy, users, generator)
        batch = drawn(users, BATCH, HISTORY, generator, hard, hard_share(step / max(steps - 1, 1)))
        chances = policy(batch)
        chains = sampled(chances, GROUP, generator)
        scores = rubric_scores(chains, batch.responses)
        outcome = (scores[..., 0] > scores[..., 1]).double()
        process = coverage(chains, users.true_weights(batch.user, batch.pair), capped)
        advantages = chain_advantages(reward.combine(process, outcome)).flatten().float()
        logp = chain_logp(chances, chains).flatten(0, 1)
        with torch.no_grad():
            before = chain_logp(reference(batch), chains).flatten(0, 1)
        loss = objective(logp, logp.detach(), advantages, torch.ones_like(logp), reference_logp=before).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def coverage(chains: Tensor, truth: Tensor, capped: bool = True) -> Tensor:
    """Process reward (N, K) in [0, 1]: how much of the weight of the user's two most important criteria chains have.

    Each criterion counts up to its own weight. Without that cap, all weight on the two is worth the most, which is a
    worse rubric than the user's.
    """
    own, top = truth.topk(2, dim=1)
    found = rubric_weights(chains).gather(2, top.unsqueeze(1).expand(-1, chains.shape[1], -1))
    if not capped:
        return found.sum(dim=2).clamp(max=1).double()
    return (torch.minimum(found, own.unsqueeze(1)).sum(dim=2) / own.sum(dim=1, keepdim=True)).double()


def drawn(
    users: Users, count: int, history: int, generator: torch.Generator, hard: Tensor | None = None, share: float = 0.0
) -> Batch:
    """Random choices; of them a share from the rows `hard` (M, 2) of (user, pair)."""
    user = torch.randint(len(users.weights), (count,), generator=generator)
    pair = torch.randint(users.responses.shape[1], (count,), generator=generator)
    if hard is not None and len(hard):
        rows = hard[torch.randint(len(hard), (round(share * count),), generator=generator)]
        user[: len(rows)], pair[: len(rows)] = rows[:, 0], rows[:, 1]
    return Batch.of(users, user, pair, history, generator)


@torch.no_grad()
def hard_pairs(policy: RubricPolicy, users: Users, generator: torch.Generator) -> Tensor:
    """Rows (M, 2) of (user, pair) that at most half of the judge's chains get right."""
    batch = everything(users, HISTORY, generator)
    scores = rubric_scores(sampled(policy(batch), GROUP, generator), batch.responses)
    right = (scores[..., 0] > scores[..., 1]).double().mean(dim=1)
    return torch.stack([batch.user, batch.pair], dim=1)[right <= 0.5]


def everything(users: Users, history: int, generator: torch.Generator, pairs: int | None = None) -> Batch:
    """The first choices of all users, all of them by default."""
    count = users.responses.shape[1] if pairs is None else pairs
    user = torch.arange(len(users.weights)).repeat_interleave(count)
    return Batch.of(users, user, torch.arange(count).repeat(len(users.weights)), history, generator)


def accuracy(scores: Tensor) -> float:
    """Share of items (N, 2) whose chosen response, the first, is ahead; ties count half."""
    gap = scores[:, 0] - scores[:, 1]
    return float(((gap > 1e-6).double() + 0.5 * (gap.abs() <= 1e-6).double()).mean())


@torch.no_grad()
def single(policy: RubricPolicy, users: Users, generator: torch.Generator) -> float:
    """Accuracy of one chain an item."""
    batch = everything(users, HISTORY, generator)
    return accuracy(rubric_scores(sampled(policy(batch), 1, generator), batch.responses)[:, 0])


@torch.no_grad()
def scaled(
    policy: RubricPolicy,
    train: Users,
    test: Users,
    history: int,
    generator: torch.Generator,
    prototypes: int,
    seed: int,
) -> dict[str, float]:
    """Accuracy of each number of own chains and of neighbours."""
    pool = everything(train, history, generator, POOL)
    expected = rubric_weights(sampled(policy(pool), 32, generator)).mean(dim=1)
    made = UserPrototypes(prototypes, refine=False, seed=seed).fit(expected, users=pool.user.tolist())
    batch = everything(test, history, generator)
    chains = sampled(policy(batch), max(m for m, _ in COUNTS), generator)
    own = rubric_scores(chains, batch.responses)
    near, _ = made.neighbours(rubric_weights(chains[:, 0]) + 1e-6, max(n for _, n in COUNTS))
    rows = torch.from_numpy(near)
    there, at = rows >= 0, rows.clamp(min=0)
    width = rows.shape[1]
    theirs = replace(
        batch,
        scenario=batch.scenario.repeat_interleave(width),
        history=pool.history[at].flatten(0, 1),
        past_scenario=pool.past_scenario[at].flatten(0, 1),
    )
    levels = sampled(policy(theirs), 1, generator).view(len(rows), width, -1)
    others = torch.where(there.unsqueeze(2), rubric_scores(levels, batch.responses), torch.nan)
    found = {}
    for m, n in COUNTS:
        scores = UserScaler(m, n).combine(own[:, :m], others[:, :n])
        found[named(m, n)] = accuracy(scores)
    return found


def named(own: int, neighbours: int) -> str:
    """As the paper writes it."""
    return f"Ind-{own}" + (f",Pro-{neighbours}" if neighbours else "")


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """All stages, and scaling of the last judge."""
    torch.set_num_threads(1)
    quick = config.quick
    scale = 15 if quick else 1
    count, trained = (60, 45) if quick else (USERS, TRAIN_USERS)
    users = Users.drawn(np.random.default_rng(seed), count, PAIRS)
    train, test = users.select(slice(0, trained)), users.select(slice(trained, count))

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = RubricPolicy()
    figures: dict[str, dict[str, float]] = {"untrained": {"accuracy": single(untrained, test, generator())}}
    steps, more = SUPERVISED_STEPS // scale, RL_STEPS // scale
    taught = untrained
    for rate in SUPERVISED_RATES:
        policy = copy.deepcopy(untrained)
        supervised(policy, train, steps, rate, generator())
        if rate == SUPERVISED_RATE:
            taught = copy.deepcopy(policy)
        figures[rated("supervised", rate)] = {"accuracy": single(policy, test, generator())}
        supervised(policy, train, more, rate, torch.Generator().manual_seed(seed + 1000))
        figures[rated("supervised, as long", rate)] = {"accuracy": single(policy, test, generator())}
    tuned = reinforced(taught, train, more, 0.5, generator())
    figures["process and outcome"] = {"accuracy": single(tuned, test, generator())}
    for name, alpha, beta in (("outcome alone", 0.0, 1.0), ("process alone", 1.0, 0.0)):
        other = reinforced(taught, train, more, alpha, generator(), beta)
        figures[name] = {"accuracy": single(other, test, generator())}
    gamed = reinforced(taught, train, more, 0.5, generator(), capped=False)
    figures["process without its cap"] = {"accuracy": single(gamed, test, generator())}
    last = reinforced(tuned, train, CURRICULUM_STEPS // scale, 0.0, generator(), curriculum=True)
    figures["curriculum"] = {"accuracy": single(last, test, generator())}
    plain = reinforced(tuned, train, CURRICULUM_STEPS // scale, 0.5, generator())
    figures["no curriculum, as long"] = {"accuracy": single(plain, test, generator())}
    for history in (HISTORY, 1):
        figures[f"scaling, {history} earlier choices"] = scaled(
            last, train, test, history, generator(), PROTOTYPES, seed
        )
    return figures


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    rates = [rate for rate in SUPERVISED_RATES if rated("supervised", rate) in runs[0]]
    stages = {
        name: arm(runs, name, "accuracy")
        for name in (
            "untrained", "process and outcome", "outcome alone", "process alone", "process without its cap",
            "curriculum", "no curriculum, as long",
        )
    }  # fmt: skip
    short = arm(runs, rated("supervised", SUPERVISED_RATE), "accuracy")
    taught = max(
        (arm(runs, rated(name, best_rate(runs, name, "accuracy", rates)), "accuracy") for name in _SUPERVISED),
        key=lambda values: float(values.mean()),
    )
    warm, cold = (
        {named(m, n): arm(runs, f"scaling, {history} earlier choices", named(m, n)) for m, n in COUNTS}
        for history in (HISTORY, 1)
    )
    learned, learned_interval = paired_bootstrap(stages["process and outcome"], taught)
    effect, interval = paired_bootstrap(warm["Ind-16"], warm["Ind-1"])
    near, near_interval = paired_bootstrap(cold["Ind-16,Pro-8"], cold["Ind-32"])
    beside, beside_interval = paired_bootstrap(warm["Ind-16,Pro-8"], warm["Ind-32"])
    process, process_interval = paired_bootstrap(stages["process and outcome"], stages["outcome alone"])
    checks = {
        "reinforcement learning - supervised at least 0.02, interval above 0": learned >= 0.02
        and learned_interval[0] > 0,
        "16 own chains - 1 at least 0.008, interval above 0": effect >= 0.008 and interval[0] > 0,
        "with one earlier choice 16 own and 8 neighbours above 32 own, interval above 0": near_interval[0] > 0,
    }
    refuted = interval[1] <= 0 or near < -0.005
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def listed(values: dict[str, np.ndarray]) -> str:
        return ", ".join(f"{name} {found.mean():.3f}" for name, found in values.items())

    summary = (
        f"One chain: {listed(stages)}; supervised {short.mean():.3f}, at its best rate and length {taught.mean():.3f}. "
        f"Process and outcome - supervised {learned:+.3f} {_shown(learned_interval)}, - outcome alone {process:+.3f} "
        f"{_shown(process_interval)}. Scaling with three earlier choices: {listed(warm)}; 16 - 1 {effect:+.3f} "
        f"{_shown(interval)}, 16 and 8 neighbours - 32 {beside:+.3f} {_shown(beside_interval)}. With one: "
        f"{listed(cold)}; 16 and 8 neighbours - 32 {near:+.4f} [{near_interval[0]:.4f}, {near_interval[1]:.4f}]."
    )
    return Judgement(verdict, effect, interval, summary, checks)


_SUPERVISED = ("supervised", "supervised, as long")


def _shown(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


STUDY = Study(
    slug="19-p-genrm",
    method="p-genrm",
    claim="Reinforcement learning with process and outcome rewards and a curriculum lifts a personalised generative "
    "judge from 66.8 to 72.7 % accuracy, and averaging 16 own chains and 8 of similar users to 75.9 % "
    "(arXiv 2602.12116).",
    task="Users with sparse weights over six criteria that shift with three scenarios, noisy choices between responses "
    "of known levels; a judge that reads three earlier choices and samples a rubric of six tokens. 450 users to train "
    "on, 150 to test on, 20 choices each.",
    baselines="Supervised fine-tuning on right teacher chains, also for as many steps as reinforcement learning, at "
    f"rates {', '.join(f'{rate:g}' for rate in SUPERVISED_RATES)}, the best mean; outcome alone, process alone, a "
    "process reward without its cap; no curriculum; 1 and 32 own chains, neighbours alone.",
    measure="Share of 3000 choices of unseen users that the judge's scores order as the user did, ties half.",
    rule="Supported: process and outcome at least 0.02 above the best supervised judge, 16 own chains at least 0.008 "
    "above 1, and with one earlier choice 16 own chains and 8 neighbours above 32 own chains, each with its interval "
    "above 0. Not supported: 16 chains not above 1, or with one earlier choice more than 0.005 lost to 32 own chains. "
    "Otherwise inconclusive. Outcome alone, and neighbours with three earlier choices, are reported beside it.",
    effect="accuracy of 16 own chains - 1, with three earlier choices",
    full_scale="Llama-3.1-8B on PersonalRewardBench (131 and 720 users), o3 chains for supervised fine-tuning, 8 GPUs, "
    "5 runs.",
    seeds=SEEDS,
    run_seed=run_seed,
    judge=judge,
    config={
        "users": USERS,
        "to train on": TRAIN_USERS,
        "choices each": PAIRS,
        "earlier choices": HISTORY,
        "noise of the teacher": TEACHER_NOISE,
        "supervised steps": SUPERVISED_STEPS,
        "supervised rates": SUPERVISED_RATES,
        "rate before reinforcement learning": SUPERVISED_RATE,
        "batch": BATCH,
        "steps of reinforcement learning": RL_STEPS,
        "rate": RL_RATE,
        "chains an input": GROUP,
        "clip": CLIP,
        "weight of KL": KL,
        "steps of the curriculum": CURRICULUM_STEPS,
        "prototypes": PROTOTYPES,
        "personas of a user": POOL,
    },
)
