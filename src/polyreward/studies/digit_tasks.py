"""Three tasks on digit images under one update budget: the environment of the EMA-GRPO and Gaussian GRPO studies.

Inputs are the 1797 images of scikit-learn's digits (64 standardised pixels and a constant), 1200 for training. Each
task has a linear softmax policy over 10 actions, starting at zero:

    digit   the class of the image, reward 1 or 0
    ink     decile of the total ink, reward 0.9 + 0.05 max(0, 1 - d/3)
    centre  decile of the horizontal centre of mass, reward 0.3 (0.5 [d <= 1] + 0.5 [d = 0])

d is the distance modulo 10, so that a constant answer gains nothing. One norm bound covers the gradients of all tasks
together: the scale of a task's advantages decides its share of the update.

Conditions: with `micro`, half of the prompts of ink and centre have their spread multiplied by 0.02 and point at the
action shifted by 5 (differences too small to matter, and spurious). With `outliers`, that share of the rollouts of ink
is paid 2.0 more by luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from polyreward.advantages.transform import Transform, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import require

TASKS = ("digit", "ink", "centre")
ACTIONS, PROMPTS, GROUP, TRAIN = 10, 16, 8, 1200
RATE, NORM_BOUND, STEPS = 0.25, 1.0, 800
RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
MICRO_SPREAD, LUCK = 0.02, 2.0


@dataclass(frozen=True)
class DigitTasks:
    """Images and the table of rewards.

    Attributes
    ----------
    images : float64 (N, 65)
    spread : float64 (3, N, 10)
        Reward of every action above the task's base.
    base : float64 (3,)
    """

    images: np.ndarray
    spread: np.ndarray
    base: np.ndarray

    def normalised_return(self, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Expected reward above the base over the best possible, each summed over the prompts `rows`: (3,)."""
        spread = self.spread[:, rows]
        expected = (self.policy(weights, np.broadcast_to(rows, (len(TASKS), len(rows)))) * spread).sum(axis=(1, 2))
        return expected / spread.max(axis=2).sum(axis=1)

    def policy(self, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Action probabilities (3, P, 10) of the images `rows` (3, P) under `weights` (3, 65, 10)."""
        logits = self.images[rows] @ weights
        odds = np.exp(logits - logits.max(axis=2, keepdims=True))
        return odds / odds.sum(axis=2, keepdims=True)


@cache
def digit_tasks(micro: bool) -> DigitTasks:
    """The tasks, the same for every seed."""
    require("sklearn", "tasks")
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = data.data.astype(np.float64)
    deviation = pixels.std(axis=0)
    images = (pixels - pixels.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    ink = pixels.sum(axis=1)
    centre = (pixels.reshape(-1, 8, 8).sum(axis=1) * np.arange(8)).sum(axis=1) / ink
    answers = np.stack([data.target, _deciles(ink), _deciles(centre)])
    spread = _spread(answers)
    if micro:
        # A fixed half of the prompts: bit 16 of a multiplicative hash of the image's number.
        half = (np.arange(len(images)) * 2654435761 >> 16) % 2 == 0
        shifted = MICRO_SPREAD * _spread((answers + 5) % ACTIONS)
        spread[1:, half] = shifted[1:, half]
    return DigitTasks(np.concatenate([images, np.ones((len(images), 1))], axis=1), spread, np.array([0.0, 0.9, 0.0]))


def _deciles(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(values, np.arange(1, ACTIONS) / ACTIONS), values, side="right")


def _spread(answers: np.ndarray) -> np.ndarray:
    gap = np.abs(np.arange(ACTIONS) - answers[..., None])
    distance = np.minimum(gap, ACTIONS - gap)
    digit, ink, centre = distance
    return np.stack(
        [
            (digit == 0).astype(np.float64),
            0.05 * np.maximum(0.0, 1 - ink / 3),
            0.3 * (0.5 * (centre <= 1) + 0.5 * (centre == 0)),
        ]
    )


@dataclass(frozen=True)
class DigitRun:
    """What one arm of one seed leaves behind.

    Attributes
    ----------
    figures : dict
        Normalised return on the test images for each task, their mean and worst, and each task's share of the gradient
        norm over the first quarter of training.
    advantages : float64 (steps, 3, 128)
        Advantages of each task, for a look at their distribution.
    """

    figures: dict[str, float]
    advantages: np.ndarray


def train(
    transform: Transform,
    seed: int,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    micro: bool = False,
    outliers: float = 0.0,
    device: str = "cpu",
) -> DigitRun:
    """Train the three policies with the advantages of `transform`; all arms of a seed share the random numbers."""
    tasks = digit_tasks(micro)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tasks.images))
    training, test = order[:TRAIN], order[TRAIN:]
    weights = np.zeros((len(TASKS), tasks.images.shape[1], ACTIONS))
    shape = (len(TASKS), PROMPTS, GROUP)
    groups = torch.arange(len(TASKS) * PROMPTS).repeat_interleave(GROUP)
    columns = {"task": torch.arange(len(TASKS)).repeat_interleave(PROMPTS * GROUP)}
    which = np.arange(len(TASKS))[:, None, None]
    shares, kept = [], []
    for _ in range(steps):
        rows = rng.choice(training, size=shape[:2])
        chances = tasks.policy(weights, rows)
        below = (rng.random(shape)[..., None] > chances.cumsum(axis=2)[:, :, None]).sum(axis=3)
        actions = np.minimum(below, ACTIONS - 1)
        rewards = tasks.base[:, None, None] + tasks.spread[which, rows[..., None], actions]
        rewards[1] += LUCK * (rng.random(shape[1:]) < outliers)
        batch = RewardBatch(torch.as_tensor(rewards.reshape(-1, 1), device=device), ("score",), groups, columns)
        advantages = compute_advantages(transform, batch).cpu().numpy().reshape(shape)
        score = (advantages[..., None] * (np.eye(ACTIONS)[actions] - chances[:, :, None])).mean(axis=2)
        gradient = np.matmul(tasks.images[rows].transpose(0, 2, 1), score) / PROMPTS
        norms = np.sqrt((gradient**2).sum(axis=(1, 2)))
        total = float(np.sqrt((norms**2).sum()))
        weights += rate * min(1.0, NORM_BOUND / max(total, 1e-12)) * gradient
        shares.append(norms / max(float(norms.sum()), 1e-12))
        kept.append(advantages.reshape(len(TASKS), -1))
    returns = tasks.normalised_return(weights, test)
    share = np.mean(shares[: max(1, steps // 4)], axis=0)
    figures = {f"return, {name}": float(value) for name, value in zip(TASKS, returns, strict=True)}
    figures |= {"mean return": float(returns.mean()), "worst return": float(returns.min())}
    figures |= {f"gradient share, {name}": float(value) for name, value in zip(TASKS, share, strict=True)}
    return DigitRun(figures, np.array(kept))
