"""Cue finding: a response argues from several roles, and each role is right where its words hold a hidden cue.

The policy is a table of softmaxes, one a question and role, whose prior is the same for all roles and peaked: it says
the same few words for everyone. The cue of a role is none of the most likely words, so that it takes exploration to
find it; planted in the most likely word, it takes none. Accuracy and pass@k are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyreward.errors import InvalidInputError

WORDS, ROLES, SEGMENT = 30, 3, 5
LIKELY = 3


@dataclass(frozen=True)
class CueFinding:
    """Questions and the policy at the start.

    Attributes
    ----------
    cues : int (Q, roles)
        The word that each role must say.
    prior : float (words,)
        Logits ``-2 ln(rank)`` of every question and role.
    """

    cues: np.ndarray
    prior: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Logits of the policy at the start, float64 (Q, roles, words)."""
        return np.broadcast_to(self.prior, (*self.cues.shape, len(self.prior))).copy()


def cue_finding(
    rng: np.random.Generator, questions: int = 24, *, roles: int = ROLES, words: int = WORDS, planted: bool = False
) -> CueFinding:
    """Questions whose cues are uniform over the words beyond the 3 likeliest, or the likeliest word if `planted`."""
    if questions < 1 or roles < 1 or words <= LIKELY:
        raise InvalidInputError(f"cue_finding needs questions and roles >= 1 and words > {LIKELY}")
    cues = rng.integers(LIKELY, words, (questions, roles))
    return CueFinding(np.zeros_like(cues) if planted else cues, -2 * np.log(np.arange(1, words + 1)))


def role_accuracy(probabilities: np.ndarray, cues: np.ndarray, segment: int = SEGMENT) -> np.ndarray:
    """Chance that each role says its cue in `segment` words: (..., roles, words) and (..., roles) -> (..., roles)."""
    cue = np.take_along_axis(probabilities, cues[..., None], axis=-1)[..., 0]
    return np.asarray(1 - (1 - cue) ** segment)


def pass_at(accuracy: np.ndarray, samples: int = 5) -> np.ndarray:
    """Chance that one of `samples` responses has all roles right: (..., roles) -> (...)."""
    return np.asarray(1 - (1 - accuracy.prod(axis=-1)) ** samples)
