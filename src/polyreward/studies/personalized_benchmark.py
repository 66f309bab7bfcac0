"""Personalized RewardBench: does a benchmark of personal pairs rank reward models as they turn out downstream?

Claim: pairs of equal general quality that differ in what one user wants rank reward models as best of n and PPO do,
better than benchmarks of general quality: NDCG 0.918 and 0.927, Spearman 0.26 and 0.37 over six models (arXiv
2604.07343).

The task. 200 users of 12 numbers each, half of them for training; a user's rubric is the three of ten aspects with the
highest affinity, a linear function of the profile plus what everybody likes. A response has a general quality
``q ~ N(0, 1)`` and covers each aspect not at all, partly or fully (0, 1, 2). General pairs prefer the higher q.
Personal pairs share q up to 0.05; the chosen answer covers the user's rubric fully and three other aspects not at all,
the rejected one the other way round, so that both cover equally much: without these three, the longer answer wins.

Twelve reward models: three sets of features (quality; coverage too; coverage by profile too) trained on four mixes of
general and personal pairs. Downstream, on users whom no model has seen: the rubric score of the best of 64, and of a
policy that draws each aspect from a softmax linear in the profile and learns from the model's rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyreward.advantages.presets import grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.audit.benchmarks.best_of_n import best_of_k
from polyreward.audit.benchmarks.personalized import evaluate_scores, quality_match
from polyreward.audit.benchmarks.validity import predictive_validity
from polyreward.batch import RewardBatch
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import LinearHead
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap

USERS, PROFILE, ASPECTS, RUBRIC, LEVELS = 200, 12, 10, 3, 3
POPULAR = 1.0
JITTER = 0.05
MIXES = ((2000, 0), (1500, 500), (500, 1500), (200, 4000))
SETS = ("quality", "coverage", "profile")
PAIRS, QUESTIONS, SAMPLES = 4000, 5, 64
KS = (1, 2, 4, 8, 16, 32, 64)
WEIGHT_DECAY, EPOCHS = 1e-3, 3
STEPS, GROUP = 60, 16
RATES = (1.0, 2.0, 4.0)
RATE = RATES[1]
BENCHES = ("personal", "general")
LONGER = ("longer wins", "longer wins without the three aspects")
METRICS = ("spearman", "weighted_tau", "ndcg", "rbo")
NAMES = tuple(f"{kind}, {general} general and {personal} personal" for kind in SETS for general, personal in MIXES)


@dataclass(frozen=True, eq=False)
class Population:
    """Users and what they want.

    Attributes
    ----------
    profile : (users, 12)
    rubric : bool (users, 10), three true a user
    """

    profile: np.ndarray
    rubric: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, users: int) -> Population:
        """Affinity is the profile times weights, plus what everybody likes."""
        profile = rng.normal(size=(users, PROFILE))
        weights = rng.normal(size=(PROFILE, ASPECTS)) / np.sqrt(PROFILE)
        affinity = profile @ weights + POPULAR * rng.normal(size=ASPECTS)
        rank = np.argsort(np.argsort(-affinity, axis=1), axis=1)
        return cls(profile, rank < RUBRIC)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of responses, the preferred one first: users (N,), quality (N, 2), coverage (N, 2, 10)."""

    user: np.ndarray
    quality: np.ndarray
    coverage: np.ndarray


def general_pairs(rng: np.random.Generator, users: np.ndarray, count: int) -> Pairs:
    """Of two random responses, the one of higher quality."""
    quality = np.sort(rng.normal(size=(count, 2)), axis=1)[:, ::-1]
    return Pairs(rng.choice(users, count), quality, rng.integers(LEVELS, size=(count, 2, ASPECTS)))


def personal_pairs(
    rng: np.random.Generator, people: Population, users: np.ndarray, count: int, matched: bool = True
) -> Pairs:
    """Two responses of equal quality, of which the first covers the user's rubric and the second does not.

    `matched`: three other aspects are covered by the second and not by the first, so that both cover equally much.
    """
    user = rng.choice(users, count)
    quality = rng.normal(size=(count, 1)) + rng.uniform(-JITTER, JITTER, size=(count, 2))
    coverage = rng.integers(LEVELS, size=(count, 2, ASPECTS))
    wanted = people.rubric[user]
    coverage[:, 0][wanted], coverage[:, 1][wanted] = 2, 0
    if matched:
        order = np.argsort(np.where(wanted, 2.0, rng.random(wanted.shape)), axis=1)
        decoy = np.zeros_like(wanted)
        np.put_along_axis(decoy, order[:, :RUBRIC], True, axis=1)
        coverage[:, 0][decoy], coverage[:, 1][decoy] = 0, 2
    return Pairs(user, quality, coverage)


def features(kind: str, quality: np.ndarray, coverage: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """What a model sees of responses: quality (...,), coverage (..., 10), profile (..., 12) as float32 (..., d)."""
    parts = [quality[..., None]]
    if kind != "quality":
        centred = coverage - 1.0
        parts.append(centred)
        if kind == "profile":
            crossed = centred[..., :, None] * profile[..., None, :]
            parts.append(crossed.reshape(*crossed.shape[:-2], ASPECTS * PROFILE))
    return np.concatenate(parts, axis=-1).astype(np.float32)


def of_pairs(kind: str, pairs: Pairs, profile: np.ndarray) -> np.ndarray:
    """Features (N, 2, d) of pairs; `profile` (users, 12) may be another than the users' own."""
    return features(kind, pairs.quality, pairs.coverage, np.repeat(profile[pairs.user][:, None], 2, axis=1))


def fit_model(table: np.ndarray, seed: int) -> PreferenceModel:
    """A logistic reward model on pairs of features (N, 2, d), the preferred one first."""
    count = len(table)
    model = PreferenceModel(Features(table.reshape(2 * count, -1)), LinearHead, BradleyTerry())
    data = PreferenceData.pairs(np.arange(count), 2 * np.arange(count), 2 * np.arange(count) + 1)
    return model.fit(data, optimizer="lbfgs", epochs=EPOCHS, weight_decay=WEIGHT_DECAY, validation=None, seed=seed)


def score(model: PreferenceModel, table: np.ndarray) -> np.ndarray:
    """Rewards (...,) of features (..., d)."""
    flat = table.reshape(-1, table.shape[-1])
    model.encoder = Features(flat)
    rows = np.arange(len(flat))
    return np.asarray(model.score(rows, rows).double().numpy().reshape(table.shape[:-1]))


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train the twelve models, put them to both benchmarks, and use them."""
    torch.set_num_threads(1)
    scale = 10 if config.quick else 1
    rng = np.random.default_rng(seed)
    people = Population.draw(rng, USERS)
    seen, unseen = np.arange(USERS // 2), np.arange(USERS // 2, USERS)
    models: list[PreferenceModel] = []
    for kind in SETS:
        for mix in MIXES:
            sizes = [count // scale for count in mix]
            parts = (general_pairs(rng, seen, sizes[0]), personal_pairs(rng, people, seen, sizes[1]))
            tables = [of_pairs(kind, part, people.profile) for part in parts]
            models.append(fit_model(np.concatenate(tables), seed))
    kinds = [kind for kind in SETS for _ in MIXES]
    count = PAIRS // scale
    general, personal = general_pairs(rng, unseen, count), personal_pairs(rng, people, unseen, count)
    strangers = people.profile[rng.permutation(USERS)]
    figures: dict[str, dict[str, float]] = {}
    for name, kind, model in zip(NAMES, kinds, models, strict=True):
        figures[name] = {
            "general accuracy": _accuracy(score(model, of_pairs(kind, general, people.profile))),
            "personal accuracy": _accuracy(score(model, of_pairs(kind, personal, people.profile))),
            "personal accuracy, profiles of others": _accuracy(score(model, of_pairs(kind, personal, strangers))),
        }
    chosen = best_of(rng, people, unseen, kinds, models)
    learned = {rate: learn(rng, people, seen, unseen, kinds, models, rate, STEPS // scale) for rate in RATES}
    for index, name in enumerate(NAMES):
        figures[name] |= chosen[index] | {f"policy, rate {rate:g}": float(learned[rate][index]) for rate in RATES}
    figures |= agreement(figures)
    quality = quality_match(personal.quality[:, 0], personal.quality[:, 1])
    longer = {
        name: evaluate_scores(pairs.coverage[:, 0].sum(axis=1), pairs.coverage[:, 1].sum(axis=1), resamples=1)
        for name, pairs in (
            (LONGER[0], personal),
            (LONGER[1], personal_pairs(rng, people, unseen, count, matched=False)),
        )
    }
    figures["construction"] = {
        "quality gap in deviations": quality["mean_gap_sd"],
        "p of equal distributions": quality["ks_p"],
        **{name: (report.wins + 0.5 * report.ties) / report.items for name, report in longer.items()},
    }
    return figures


def _accuracy(scores: np.ndarray) -> float:
    """Strict accuracy of scores (N, 2)."""
    return evaluate_scores(scores[:, 0], scores[:, 1], resamples=1).accuracy


def best_of(
    rng: np.random.Generator,
    people: Population,
    users: np.ndarray,
    kinds: Sequence[str],
    models: Sequence[PreferenceModel],
) -> list[dict[str, float]]:
    """Rubric score and quality of the best of the first k of 64 random responses, of every model."""
    owner = np.repeat(users, QUESTIONS)
    quality = rng.normal(size=(len(owner), SAMPLES))
    coverage = rng.integers(LEVELS, size=(len(owner), SAMPLES, ASPECTS))
    rubric = (coverage * people.rubric[owner][:, None]).sum(axis=2) / RUBRIC
    profile = np.broadcast_to(people.profile[owner][:, None], (*quality.shape, PROFILE))
    found = []
    for kind, model in zip(kinds, models, strict=True):
        scores = score(model, features(kind, quality, coverage, profile))
        found.append(
            {f"rubric at {k}": mean for k, (mean, _) in best_of_k(scores, rubric, KS).items()}
            | {f"quality at {SAMPLES}": best_of_k(scores, quality, [SAMPLES])[SAMPLES][0]}
        )
    return found


def learn(
    rng: np.random.Generator,
    people: Population,
    seen: np.ndarray,
    unseen: np.ndarray,
    kinds: Sequence[str],
    models: Sequence[PreferenceModel],
    rate: float,
    steps: int,
) -> np.ndarray:
    """Rubric score on unseen users of a policy trained on the rewards of each model, (models,).

    Every aspect has logits linear in the profile; GRPO's advantages over the responses of a user, plain gradient steps
    (Adam turns the noise of a reward that says nothing of the aspects into steps of full size).
    """
    count, generator = len(models), torch.Generator().manual_seed(int(rng.integers(2**31)))
    profile = torch.from_numpy(np.concatenate([people.profile, np.ones((USERS, 1))], axis=1)).float()
    weights = torch.zeros(count, PROFILE + 1, ASPECTS * LEVELS, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=rate)
    groups = np.repeat(np.arange(count * len(seen)), GROUP)
    given = np.broadcast_to(people.profile[seen][:, None], (len(seen), GROUP, PROFILE))
    for _ in range(steps):
        logits = (profile[seen] @ weights).reshape(count, len(seen), 1, ASPECTS, LEVELS)
        log_p = torch.log_softmax(logits.expand(-1, -1, GROUP, -1, -1), dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().reshape(-1, LEVELS), 1, generator=generator)
        actions = drawn.reshape(count, len(seen), GROUP, ASPECTS)
        quality = rng.normal(size=(len(seen), GROUP))
        rewards = np.stack(
            [
                score(model, features(kind, quality, actions[index].numpy(), given))
                for index, (kind, model) in enumerate(zip(kinds, models, strict=True))
            ]
        )
        batch = RewardBatch(torch.from_numpy(rewards.reshape(-1)).float(), groups=groups)
        advantages = compute_advantages(grpo(), batch).reshape(count, len(seen), GROUP)
        chosen = log_p.gather(-1, actions[..., None])[..., 0].sum(dim=-1)
        # the models learn side by side: a sum over them, a mean over each one's responses
        loss = -(advantages * chosen).mean(dim=(1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = (profile[unseen] @ weights).reshape(count, len(unseen), ASPECTS, LEVELS)
        expected = (torch.softmax(logits, dim=-1) * torch.arange(LEVELS)).sum(dim=-1).double().numpy()
    return np.asarray((expected * people.rubric[unseen]).sum(axis=2).mean(axis=1) / RUBRIC)


def agreement(figures: Figures) -> dict[str, dict[str, float]]:
    """How both benchmarks rank the models, against every downstream figure."""
    downstream = {
        f"rubric of the best of {SAMPLES}": f"rubric at {SAMPLES}",
        **{f"rubric of the policy, rate {rate:g}": f"policy, rate {rate:g}" for rate in RATES},
        f"quality of the best of {SAMPLES}": f"quality at {SAMPLES}",
    }
    found = {}
    for bench in BENCHES:
        accuracy = [figures[name][f"{bench} accuracy"] for name in NAMES]
        for title, quantity in downstream.items():
            worth = np.array([figures[name][quantity] for name in NAMES])
            # quality may lie below 0, where NDCG has no meaning
            metrics = METRICS if worth.min() >= 0 and "quality" not in title else ("spearman", "weighted_tau", "rbo")
            report = predictive_validity(accuracy, worth, metrics, 0)
            found[f"{bench}, {title}"] = {metric: report[metric] for metric in metrics}
    return found


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    tasks = (f"rubric of the best of {SAMPLES}", f"rubric of the policy, rate {RATE:g}")
    rho = {(bench, task): arm(runs, f"{bench}, {task}", "spearman") for bench in BENCHES for task in tasks}
    gains = [paired_bootstrap(rho["personal", task], rho["general", task]) for task in tasks]
    blind = np.mean([arm(runs, name, "personal accuracy") for name in NAMES if name.startswith("quality")], axis=1)
    gap = arm(runs, "construction", "quality gap in deviations").mean()
    own, others, popular = _profile_use(runs)
    flip = [arm(runs, f"{b}, quality of the best of {SAMPLES}", "spearman").mean() for b in BENCHES]
    checks = {
        "personal less general rank correlation at least 0.5 in both tasks": all(gain >= 0.5 for gain, _ in gains),
        "personal rank correlation at least 0.7 in both tasks": all(rho["personal", t].mean() >= 0.7 for t in tasks),
        "models of quality alone within 0.05 of chance": bool(np.abs(blind - 0.5).max() <= 0.05),
        "quality of chosen and rejected within 0.02 deviations": bool(abs(gap) <= 0.02),
        "with the profiles of others, no better than without profiles": bool(
            others <= popular + 0.02 and own > popular
        ),
        "order turns round for a judge of quality alone": flip[0] < 0 < flip[1],
    }
    refuted = any(bounds[1] <= 0 for _, bounds in gains) or bool((blind > 0.55).any())
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    effect, interval = min(gains, key=lambda found: found[0])
    lines = []
    for task in tasks:
        for bench in BENCHES:
            values = {m: arm(runs, f"{bench}, {task}", m).mean() for m in METRICS}
            lines.append(f"{bench}, {task}: " + ", ".join(f"{m} {v:.2f}" for m, v in values.items()))
    best = {name: arm(runs, name, f"rubric at {SAMPLES}").mean() for name in NAMES}
    top, low = max(best, key=lambda n: best[n]), min(best, key=lambda n: best[n])
    policy = arm(runs, top, f"policy, rate {RATE:g}").mean()
    rates = ", ".join(
        f"{rate:g}: {arm(runs, f'personal, rubric of the policy, rate {rate:g}', 'spearman').mean():.2f} and "
        f"{arm(runs, f'general, rubric of the policy, rate {rate:g}', 'spearman').mean():.2f}"
        for rate in RATES
    )
    made = [arm(runs, "construction", name).mean() for name in LONGER]
    summary = (
        f"{'; '.join(lines)}. Personal less general Spearman: best of {SAMPLES} {_interval(gains[0])}, "
        f"policy {_interval(gains[1])}; at every rate (personal and general) {rates}. Rubric score of the best of "
        f"{SAMPLES} from {best[low]:.2f} ({low}) to {best[top]:.2f} ({top}; its policy {policy:.2f}). Personal "
        f"accuracy of models of quality alone {blind.min():.3f} to {blind.max():.3f}, of models with profiles "
        f"{own:.3f}, with the profiles of others {others:.3f}, of models with coverage alone {popular:.3f}. Quality "
        f"gap {gap:+.4f} deviations; the longer answer wins {made[0]:.3f} of the pairs, {made[1]:.3f} "
        f"without the three aspects of the rejected one. Judged by quality alone: Spearman {flip[0]:.2f} (personal) "
        f"and {flip[1]:.2f} (general)."
    )
    return Judgement(verdict, effect, interval, summary, checks)


def _profile_use(runs: Sequence[Figures]) -> tuple[float, float, float]:
    """Personal accuracy, with personal training pairs: with profiles, with those of others, and of coverage alone."""
    mixed = [name for name, (_, personal) in zip(NAMES, MIXES * len(SETS), strict=True) if personal]

    def mean(kind: str, quantity: str) -> float:
        return float(np.mean([arm(runs, name, quantity) for name in mixed if name.startswith(kind)]))

    others = mean("profile", "personal accuracy, profiles of others")
    return mean("profile", "personal accuracy"), others, mean("coverage", "personal accuracy")


def _interval(found: tuple[float, tuple[float, float]]) -> str:
    return f"{found[0]:+.2f} [{found[1][0]:.2f}, {found[1][1]:.2f}]"


CONFIG: dict[str, Any] = {
    "users": USERS,
    "profile": PROFILE,
    "aspects": ASPECTS,
    "rubric": RUBRIC,
    "popular aspects, deviation": POPULAR,
    "mixes": MIXES,
    "benchmark pairs": PAIRS,
    "questions a user": QUESTIONS,
    "samples": SAMPLES,
    "weight decay": WEIGHT_DECAY,
    "steps": STEPS,
    "group": GROUP,
    "rates": RATES,
}
STUDY = Study(
    slug="23-personalized-rewardbench",
    method="personalized-rewardbench",
    claim="Pairs of equal quality that differ in what one user wants rank reward models as best of n and PPO do, "
    "better than existing benchmarks: NDCG 0.918 and 0.927, Spearman 0.26 and 0.37 over six models (arXiv 2604.07343).",
    task="200 users with an exact rubric of three of ten aspects, linear in a profile plus what everybody likes; "
    "responses of a quality and a coverage of aspects; half of the users for training.",
    baselines="A benchmark of general quality on the same models: twelve logistic reward models, three sets of "
    "features by four mixes of general and personal training pairs, all fitted alike; policies at three rates.",
    measure="Spearman's correlation, over the twelve models, of accuracy on each benchmark (4000 pairs of unseen "
    "users) with the rubric score of unseen users: of the best of 64, and of a policy trained on the model's rewards "
    "at the middle of three rates. Weighted tau, NDCG and rank-biased overlap beside it.",
    rule="Supported: personal less general Spearman at least 0.5 and personal at least 0.7 in both tasks, models of "
    "quality alone within 0.05 of chance on personal pairs, qualities of chosen and rejected within 0.02 deviations, "
    "models with the profiles of others at most 0.02 above models without profiles and with the right ones above them, "
    "and the order turned round for a judge of quality alone. Not supported: personal less general Spearman not above "
    "0 in a task, by its interval, or quality alone more than 0.05 above chance. Otherwise inconclusive.",
    effect="Spearman with the rubric score downstream, personal - general benchmark, in the task where it is smaller",
    full_scale="The released test split, about 20 public reward models, best of 128 and PPO on Qwen2.5-0.5B with a "
    "judge of 32B; 8 x 80 GB.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config=CONFIG,
)
