"""MultiRole-R1: accuracy judged by role plus text diversity, on roles that must find different words.

Claim: GRPO on an accuracy blended with text diversity at weight 0.1 beats accuracy alone, because it keeps groups of
equal accuracy alive and the roles apart: GLOQA 47.22 -> 49.10 with R1-Distill-Qwen-7B, and pass@5 that rises to 0.71
where it falls to 0.68 without (arXiv 2507.20187).

The task. 24 questions; a response is 3 role segments of 5 words from 30. A role is right where its segment holds its
hidden cue, none of the 3 likeliest words; all roles start with the same peaked softmax (accuracy 0.03). 8 responses a
step, the gradient a mean over the tokens of a segment. Diversity is the mean of five of the eight metrics; segments
have equal length, no questions and no function words, so that the other three are 0. A second part tests the making of
data: the majority filter and the choice of roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyreward.advantages.presets import dr_grpo, grpo_trl
from polyreward.advantages.transform import Transform, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.data.roles import majority_is_right, select_roles, self_consistency_filter
from polyreward.rewards.roles import RoleAwareAccuracy, ShapedReward
from polyreward.rewards.text_diversity import DiversityReward
from polyreward.rewards.text_encoding import EncodedTexts
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
from polyreward.studies.stratified_grpo import softmax
from polyreward.tasks.cue_finding import ROLES, SEGMENT, WORDS, cue_finding, pass_at, role_accuracy

QUESTIONS, GROUP, STEPS = 24, 8, 300
RATES, RATE = (0.3, 1.0, 3.0, 10.0, 30.0), 1.0
CENTRED_RATES, FEW_RATES = (10.0, 30.0, 100.0), (1.0, 3.0)
FIVE = dict.fromkeys(("lex", "ent", "adj", "yule", "bi"), 0.2)
NOISY_ROLES, SAMPLES, RIGHT, TRIALS = 5, range(1, 10), 0.7, 4000


@dataclass(frozen=True)
class Arm:
    """How a response is rewarded and compared, and where the cue is."""

    delta: float = 0.9
    noise: bool = False
    planted: bool = False
    centred: bool = False
    rates: tuple[float, ...] = RATES


ARMS = {
    "delta 1": Arm(1.0),
    "delta 0.9": Arm(0.9),
    "delta 0": Arm(0.0),
    "noise for diversity": Arm(noise=True),
    # without division by the deviation, gradients are smaller by about that
    "delta 0.9, centred": Arm(centred=True, rates=CENTRED_RATES),
    **{f"delta {delta:g}": Arm(delta, rates=FEW_RATES) for delta in (0.95, 0.8, 0.5)},
    "delta 1, planted": Arm(1.0, planted=True, rates=FEW_RATES),
    "delta 0.9, planted": Arm(planted=True, rates=FEW_RATES),
}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train every arm at every rate, side by side, and test the making of data."""
    torch.set_num_threads(1)
    steps, trials = (40, 500) if config.quick else (STEPS, TRIALS)
    return train(seed, steps, config.device) | filters(seed, trials)


def train(seed: int, steps: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Figures of every arm and rate; all of them see the same random numbers."""
    rng, noise = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    tasks = {planted: cue_finding(np.random.default_rng(seed), QUESTIONS, planted=planted) for planted in (False, True)}
    runs = [(name, part, rate) for name, part in ARMS.items() for rate in part.rates]
    cues = np.stack([tasks[part.planted].cues for _, part, _ in runs])  # (A, Q, roles)
    logits = np.stack([tasks[part.planted].start for _, part, _ in runs])
    rates = np.array([rate for *_, rate in runs])[:, None, None]
    noisy, centred = (np.array([getattr(part, name) for _, part, _ in runs]) for name in ("noise", "centred"))
    shaped = np.array([part.delta < 1 for _, part, _ in runs])
    diversity, blends = DiversityReward(FIVE), [ShapedReward(part.delta) for _, part, _ in runs]
    dead = np.zeros(len(runs))
    for _ in range(steps):
        chances = softmax(logits)
        uniform = rng.random((QUESTIONS, GROUP, ROLES, SEGMENT))
        words = _drawn(chances, uniform)  # (A, Q, G, roles, segment)
        found = (words == cues[:, :, None, :, None]).any(axis=-1)
        accuracy = np.asarray(RoleAwareAccuracy()(found, True))
        extra = np.zeros_like(accuracy)
        texts = EncodedTexts.from_array(words[shaped].reshape(-1, ROLES, SEGMENT))
        extra[shaped] = diversity.values(texts).reshape(-1, QUESTIONS, GROUP)
        if noisy.any():
            spread = extra[noisy].var(axis=-1).mean(axis=-1)[:, None, None]
            extra[noisy] = 0.5 + np.sqrt(12 * spread) * (noise.random(accuracy.shape[1:]) - 0.5)
        rewards = np.asarray([blend(a, e) for blend, a, e in zip(blends, accuracy, extra, strict=True)])
        gain, silent = np.empty_like(rewards), np.empty(len(runs))
        for among, recipe in ((~centred, grpo_trl()), (centred, dr_grpo())):
            gain[among], silent[among] = advantages(rewards[among], recipe, device)
        dead += silent / steps
        logits += rates[..., None] * gradient(chances, words, gain)
    right = role_accuracy(softmax(logits), cues)
    chances = softmax(logits)
    entropy = -(chances * np.log(np.maximum(chances, 1e-300))).sum(axis=-1)
    return {
        rated(name, rate): {
            "accuracy": float(right[at].mean()),
            "pass@5": float(pass_at(right[at]).mean()),
            "entropy": float(entropy[at].mean()),
            "dead groups": float(dead[at]),
        }
        for at, (name, _, rate) in enumerate(runs)
    }


def advantages(rewards: np.ndarray, recipe: Transform, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Advantages of rewards (A, Q, G) inside groups of G, and the share of groups without signal, (A,)."""
    groups = torch.arange(rewards.shape[0] * rewards.shape[1]).repeat_interleave(rewards.shape[2])
    batch = RewardBatch(torch.as_tensor(rewards.reshape(-1, 1), device=device), ("reward",), groups)
    dead = batch.segments("group").constant(batch.rewards[:, 0]).cpu().numpy().reshape(rewards.shape[:2])
    return compute_advantages(recipe, batch).cpu().numpy().reshape(rewards.shape), dead.mean(axis=1)


def gradient(chances: np.ndarray, words: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Mean over responses and tokens of a segment of advantage times gradient of the log-probability, (A, Q, R, W).

    Parameters
    ----------
    chances : (A, Q, roles, words)
    words : int (A, Q, G, roles, segment)
    gain : (A, Q, G)
    """
    groups, length = gain.shape[-1], words.shape[-1]
    table = np.arange(chances.size // chances.shape[-1]).reshape(chances.shape[:-1])  # (A, Q, roles)
    at = table[:, :, None, :, None] * chances.shape[-1] + words
    weight = np.broadcast_to(gain[..., None, None], words.shape)
    said = np.bincount(at.ravel(), weight.ravel(), minlength=chances.size).reshape(chances.shape)
    return np.asarray((said - length * gain.sum(axis=-1)[..., None, None] * chances) / (groups * length))


def filters(seed: int, trials: int) -> dict[str, dict[str, float]]:
    """The making of data: answers of roles that are right with probability 0.7, in yes-or-no questions.

    "filter, k": share of roles whose majority over k samples is right, and what the binomial formula says. "roles":
    share of questions whose majority over three roles is right where the roles are independent, copies of one, or
    chosen among five of which three are copies, by contrast (alpha 8) or at random (alpha 0).
    """
    rng = np.random.default_rng([seed, 3])
    figures = {}
    for k in SAMPLES:
        answers = (rng.random((trials, NOISY_ROLES, k)) < RIGHT).astype(int)
        kept = self_consistency_filter(answers)
        precision = np.take_along_axis(answers, kept.argmax(axis=-1)[..., None], axis=-1).mean()
        figures[f"filter, {k}"] = {"precision": float(precision), "formula": majority_is_right(RIGHT, k)}
    pool = (rng.random((trials, 3)) < RIGHT).astype(int)
    rule = RoleAwareAccuracy("convergent")
    truth = np.ones(trials, dtype=int)
    five, directions = pool[:, [0, 0, 0, 1, 2]], np.eye(3)[[0, 0, 0, 1, 2]]
    figures["roles"] = {
        "independent": float(rule(pool, truth).mean()),
        "copies": float(rule(five[:, :3], truth).mean()),
    }
    relevance, embeddings = np.zeros((trials, 5)), np.broadcast_to(directions, (trials, 5, 3))
    for name, alpha in (("chosen by contrast", 8.0), ("chosen at random", 0.0)):
        chosen = select_roles(relevance, embeddings, alpha, 3, rng)
        figures["roles"][name] = float(rule(np.take_along_axis(five, chosen, axis=1), truth).mean())
    return figures


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    chosen = {name: rated(name, best_rate(runs, name, "accuracy", part.rates)) for name, part in ARMS.items()}

    def of(name: str, quantity: str) -> np.ndarray:
        return arm(runs, chosen[name], quantity)

    effect, interval = paired_bootstrap(of("delta 0.9", "accuracy") - of("delta 1", "accuracy"))
    passed = (of("delta 0.9", "pass@5") - of("delta 1", "pass@5")).mean()
    alone = (of("delta 0.9", "accuracy") - of("delta 0", "accuracy")).mean()
    planted = (of("delta 0.9, planted", "accuracy") - of("delta 1, planted", "accuracy")).mean()
    noise = (of("noise for diversity", "accuracy") - of("delta 1", "accuracy")).mean()
    misses = [
        abs(arm(runs, f"filter, {k}", "precision").mean() - arm(runs, f"filter, {k}", "formula").mean())
        for k in SAMPLES
    ]
    checks = {
        "accuracy: lower end of the interval of shaped - accuracy alone at least 0.1": interval[0] >= 0.1,
        "pass@5: shaped - accuracy alone at least 0.3": bool(passed >= 0.3),
        "groups without signal under the shaped reward below 0.05": bool(of("delta 0.9", "dead groups").mean() < 0.05),
        "shaped at least 0.5 above diversity alone": bool(alone >= 0.5),
        "gain below 0.05 where the cue is the likeliest word": bool(planted < 0.05),
        "noise of equal variance gains less than half as much": bool(noise < effect / 2),
        "precision of the majority filter within 0.02 of the binomial formula": bool(max(misses) <= 0.02),
    }
    refuted = effect <= 0 or alone <= 0.05
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def row(name: str, quantity: str) -> str:
        return " ".join(f"{arm(runs, rated(name, rate), quantity).mean():.3f}" for rate in ARMS[name].rates)

    def listed(quantity: str, digits: int = 3) -> str:
        return ", ".join(f"{name} {of(name, quantity).mean():.{digits}f}" for name in ARMS)

    grid = "; ".join(
        f"{name} at {' '.join(f'{r:g}' for r in part.rates)}: {row(name, 'accuracy')} (pass@5 {row(name, 'pass@5')})"
        for name, part in ARMS.items()
    )
    roles = ", ".join(f"{name} {arm(runs, 'roles', name).mean():.3f}" for name in runs[0]["roles"])
    slow = {name: rated(name, RATE) for name in ("delta 1", "delta 0.9")}
    shared = [
        (arm(runs, slow["delta 0.9"], quantity) - arm(runs, slow["delta 1"], quantity)).mean()
        for quantity in ("accuracy", "pass@5")
    ]
    summary = (
        f"Accuracy at the best rate of the grid: {listed('accuracy')}; pass@5 {listed('pass@5')}; entropy "
        f"{listed('entropy', 2)}; groups without signal {listed('dead groups', 2)}. Delta 0.9 - delta 1 at the shared "
        f"rate {RATE:g}: accuracy {shared[0]:+.3f}, pass@5 {shared[1]:+.3f}; at the best rates {effect:+.3f} and "
        f"{passed:+.3f}. Noise of equal variance gains {noise:+.3f}; with the cue planted the shaped reward gains "
        f"{planted:+.3f}. Accuracy over the grid: {grid}. The majority filter misses the binomial formula by at most "
        f"{max(misses):.3f}; majority over three roles: {roles}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="40-multirole-r1",
    method="multirole-r1",
    claim="Blending role accuracy with text diversity at weight 0.1 beats accuracy alone and keeps pass@5: GLOQA "
    "47.22 -> 49.10 with R1-Distill-Qwen-7B, pass@5 0.71 against 0.68 (arXiv 2507.20187).",
    task="24 questions with a hidden cue for each of 3 roles, responses of 3 x 5 words from 30, tabular softmax "
    "policies that start peaked and alike; 8 responses a step, 300 steps. Roles with noisy answers, for the making "
    "of data.",
    baselines="Accuracy alone (delta 1), diversity alone (delta 0), uniform noise with the variance of the diversity "
    "in its place, as the shaped reward at learning rates 0.3, 1, 3, 10, 30, of which the best mean accuracy counts; "
    "the shaped reward without division by the deviation at 10, 30, 100; delta 0.95, 0.8 and 0.5, and delta 1 and 0.9 "
    "with the cue planted in the likeliest word, at 1 and 3. GRPO as in TRL.",
    measure="Exact role accuracy and pass@5 (all roles right) of the final policy, entropy of its words, share of "
    "groups with equal rewards over the training.",
    rule="Supported: lower end of the 95 % interval of delta 0.9 - delta 1 (accuracy) at least 0.1, pass@5 at least "
    "0.3 higher, fewer than 0.05 of the groups without signal, at least 0.5 above delta 0; the gain is below 0.05 with "
    "the cue planted, noise gains less than half as much, and the majority filter is within 0.02 of the binomial "
    "formula; every arm at its best rate. Not supported: no gain, or delta 0.9 at most 0.05 above delta 0. "
    "Otherwise inconclusive.",
    effect="accuracy, delta 0.9 - delta 1",
    full_scale="R1-Distill-Qwen-7B and three more, 2,700 merged chains, TRL GRPO of 1000 steps on 4 to 8 GPUs of 80 "
    "GB, BBQ, GlobalOpinionQA, ETHICS, CALI, CSQA, GSM8K, AIME24; pass@5 on GlobalOpinionQA over the training.",
    seeds=10,
    run_seed=run_seed,
    judge=judge,
    config={
        "questions": QUESTIONS,
        "words": WORDS,
        "roles": ROLES,
        "words a segment": SEGMENT,
        "group": GROUP,
        "steps": STEPS,
        "rates": RATES,
        "centred rates": CENTRED_RATES,
        "few rates": FEW_RATES,
        "weights of the metrics": FIVE,
        "samples": tuple(SAMPLES),
        "role is right": RIGHT,
        "trials": TRIALS,
    },
)


def _drawn(chances: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Words by inversion: (A, Q, roles, words) and (Q, G, roles, segment) -> (A, Q, G, roles, segment)."""
    edges = chances.cumsum(axis=-1)[:, :, None, :, None, :-1]
    return np.asarray((uniform[..., None] > edges).sum(axis=-1))
