"""Bandit over sources whose value is the mean absolute advantage: sample where there is still something to learn.

A source that is saturated (every rollout right) or hopeless (every rollout wrong) has zero group advantages; the mean
absolute advantage L is largest in between. For a binary reward with pass rate p and deviation-normalised advantages it
is 2 sqrt(p (1 - p)). An upper-confidence bonus keeps rarely drawn sources in play, and a softmax turns scores into
weights:

    L_j = mean of the last `window` values |A| of source j          (0 before the first)
    score_j = L_j + exploration * sqrt(2 ln(n_total + 1) / (n_j + 1))
    w = softmax(score / temperature)

n_j counts all rollouts of source j, not only those in the window. Noise on a reward also makes |A| large: a coin-flip
verifier has L = 1, and the bandit prefers it.

DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training, arXiv 2504.09710.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyreward.curricula.sampler import Curriculum
from polyreward.errors import InvalidInputError


class AdvantageBandit(Curriculum):
    """Upper-confidence bandit on the mean absolute advantage of each source (arXiv 2504.09710).

    Parameters
    ----------
    names : the n sources
    window : int >= 1
        Values of |A| kept for each source (k in the paper).
    temperature : float > 0
        Of the softmax (tau in the paper): a difference D between two scores is a weight ratio of exp(D / temperature).
    exploration : float >= 0
        Factor of the confidence bonus; 0 leaves it out.
    floor : float in [0, 1]
        Share of uniform sampling mixed in, for sources whose value changes while they are not drawn; 0 in the paper.

    Raises
    ------
    InvalidInputError
        A parameter outside its range.

    `update` takes the absolute value itself, and refuses NaN and unknown sources before anything is learned.
    """

    def __init__(
        self,
        names: Sequence[str],
        window: int = 300,
        temperature: float = 0.1,
        exploration: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__(names)
        if not isinstance(window, int | np.integer) or window < 1:
            raise InvalidInputError(f"window must be an integer of at least 1, got {window!r}")
        for name, value in (("temperature", temperature), ("exploration", exploration), ("floor", floor)):
            if not isinstance(value, int | float | np.number):
                raise InvalidInputError(f"{name} must be a number, got {value!r}")
        if not temperature > 0:
            raise InvalidInputError(f"temperature must be positive, got {temperature}")
        if not 0 <= exploration < math.inf:
            raise InvalidInputError(f"exploration must be finite and at least 0, got {exploration}")
        if not 0 <= floor <= 1:
            raise InvalidInputError(f"floor must be between 0 and 1, got {floor}")
        self.window, self.temperature, self.exploration, self.floor = int(window), temperature, exploration, floor
        self.counts = np.zeros(len(self.names), dtype=np.int64)
        # Ring buffers: row j holds the values of source j, the next one goes to counts[j] % window.
        self._values = np.zeros((len(self.names), self.window))

    def learnability(self) -> np.ndarray:
        """Mean absolute advantage in the window of each source (L in the paper), float64 (n,); 0 before the first."""
        return self._values.sum(axis=1) / np.clip(self.counts, 1, self.window)

    def scores(self) -> np.ndarray:
        """Learnability plus confidence bonus, float64 (n,)."""
        total = max(1, int(self.counts.sum()))
        return self.learnability() + self.exploration * np.sqrt(2 * np.log(total + 1) / (self.counts + 1))

    def probabilities(self) -> np.ndarray:
        """Softmax of the scores, mixed with the floor, float64 (n,). All sources are recomputed, drawn or not."""
        scores = self.scores()
        with np.errstate(over="ignore"):  # at a temperature near 0 the difference is -infinity, and the weight 0
            weights = np.exp((scores - scores.max()) / self.temperature)
        weights /= weights.sum()
        return (1 - self.floor) * weights + self.floor / len(weights)

    def state_dict(self) -> dict[str, Any]:
        """Names, counts, and the values in each window, oldest first."""
        return {
            "names": list(self.names),
            "counts": self.counts.tolist(),
            "values": [self._window_of(j).tolist() for j in range(len(self.names))],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises
        ------
        InvalidInputError
            The state is for other sources, its windows do not fit the counts and this bandit's window, or it holds a
            value that is not finite. Nothing is taken over then.
        """
        self._require(state, "counts", "values")
        try:
            counts = np.array(state["counts"], dtype=np.int64)
            windows = [np.array(values, dtype=np.float64).reshape(-1) for values in state["values"]]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the state has counts or values that are no numbers: {error}") from error
        if counts.shape != (len(self.names),) or (counts < 0).any():
            raise InvalidInputError(f"the state has counts {counts.tolist()} for {len(self.names)} sources")
        lengths = [len(values) for values in windows]
        if lengths != np.minimum(counts, self.window).tolist():
            raise InvalidInputError(
                f"the state holds {lengths} values for counts {counts.tolist()}, which does not fit "
                f"window={self.window}"
            )
        if not all(np.isfinite(values).all() for values in windows):
            raise InvalidInputError("the state holds an advantage that is not finite")
        self.counts = counts
        self._values = np.zeros((len(self.names), self.window))
        for j, values in enumerate(windows):
            self._values[j, np.arange(counts[j] - len(values), counts[j]) % self.window] = values

    def measure(self, advantages: np.ndarray) -> np.ndarray:
        """What of an advantage enters the window, (B,) -> (B,): its absolute value (signed advantages average to 0)."""
        return np.abs(advantages)

    def _learn(self, codes: np.ndarray, advantages: np.ndarray) -> None:
        values = self.measure(advantages)
        for j in np.unique(codes):
            new = values[codes == j]
            places = np.arange(self.counts[j], self.counts[j] + new.size)[-self.window :] % self.window
            self._values[j, places] = new[-self.window :]
            self.counts[j] += new.size

    def _window_of(self, j: int) -> np.ndarray:
        count = int(self.counts[j])
        return self._values[j, np.arange(max(0, count - self.window), count) % self.window]
