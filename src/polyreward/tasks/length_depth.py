"""A bandit where the length of an answer matters and half of the questions can be checked: exact truth, mixed types.

A verifiable question wants a depth k of 2 to 6: an answer of length l >= k is right with probability 0.9, a shorter
one by luck, 0.25. An open one has a best length of 2 to 5 and quality ``exp(-(l - best)^2 / (2 * 1.2^2))``. A policy
picks a length of 1 to 8 for each question, and whether it keeps the required form; at the start it prefers short
answers.

Two imperfect scores stand in for learned models: a reward model that loves brevity, and a surrogate that is close to
the quality of open answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyreward.errors import InvalidInputError

LENGTHS = np.arange(1, 9)
RIGHT, LUCK, WIDTH = 0.9, 0.25, 1.2
SHORTNESS, FORM = 0.55, -1.0


@dataclass(frozen=True)
class LengthDepth:
    """Questions, verifiable ones first.

    Attributes
    ----------
    verifiable : bool (E,)
    wanted : int (E,)
        Depth of a verifiable question, best length of an open one.
    """

    verifiable: np.ndarray
    wanted: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, questions: int = 60) -> LengthDepth:
        """Half verifiable, half open."""
        if questions < 2:
            raise InvalidInputError(f"LengthDepth needs at least two questions, got {questions}")
        verifiable = np.arange(questions) < questions // 2
        wanted = np.where(verifiable, rng.integers(2, 7, size=questions), rng.integers(2, 6, size=questions))
        return cls(verifiable, wanted)

    def worth(self, lengths: np.ndarray = LENGTHS) -> np.ndarray:
        """Chance of being right, or quality, of answers of lengths (..., L) to each question: (E, L)."""
        wanted = self.wanted[:, None]
        right = np.where(lengths >= wanted, RIGHT, LUCK)
        return np.where(self.verifiable[:, None], right, np.exp(-((lengths - wanted) ** 2) / (2 * WIDTH**2)))

    def truth(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What answers of lengths (E, G) are worth: 0 or 1 where they can be checked, else their quality."""
        worth, luck = self.worth(lengths), rng.random(lengths.shape)
        return np.where(self.verifiable[:, None], luck < worth, worth)


def brevity_loving(truth: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores in (0, 1) of a reward model that is weakly right and loves short answers."""
    logits = 1.2 * (truth - 0.5) - 0.35 * (lengths - 3) + 0.8 * rng.normal(size=truth.shape)
    return np.asarray(1 / (1 + np.exp(-logits)))


def surrogate(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The truth with noise 0.1, clipped to [0, 1]."""
    return np.clip(truth + 0.1 * rng.normal(size=truth.shape), 0, 1)


class LengthPolicy:
    """A softmax over lengths and a coin for the form, one of each a question.

    Attributes
    ----------
    logits : float (E, 8)
    form : float (E,)
    """

    def __init__(self, questions: int) -> None:
        self.logits = np.tile(-SHORTNESS * LENGTHS, (questions, 1)).astype(np.float64)
        self.form = np.full(questions, FORM)

    def chances(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of the lengths (E, 8) and of the form (E,)."""
        exponential = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return exponential / exponential.sum(axis=1, keepdims=True), 1 / (1 + np.exp(-self.form))

    def sample(self, group: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Lengths (E, G) and whether the form is kept, bool (E, G)."""
        lengths, form = self.chances()
        drawn = rng.random((len(lengths), group, 1)) > np.cumsum(lengths, axis=1)[:, None]
        kept = rng.random((len(lengths), group)) < form[:, None]
        return LENGTHS[np.minimum(drawn.sum(axis=2), len(LENGTHS) - 1)], kept

    def learn(self, lengths: np.ndarray, kept: np.ndarray, advantages: np.ndarray, rate: float) -> None:
        """One step of the policy gradient on samples and their advantages (E, G)."""
        chances, form = self.chances()
        score = (lengths[:, :, None] == LENGTHS) - chances[:, None]
        self.logits = self.logits + rate * (advantages[:, :, None] * score).mean(axis=1)
        self.form = self.form + rate * (advantages * (kept - form[:, None])).mean(axis=1)

    def measure(self, task: LengthDepth) -> dict[str, float]:
        """Exact accuracy on verifiable questions, quality on open ones, mean length and share that keeps the form."""
        chances, form = self.chances()
        worth = (chances * task.worth()).sum(axis=1)
        return {
            "accuracy": float(worth[task.verifiable].mean()),
            "quality": float(worth[~task.verifiable].mean()),
            "length": float((chances @ LENGTHS).mean()),
            "form": float(form.mean()),
        }
