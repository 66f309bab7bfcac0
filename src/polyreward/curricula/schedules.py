"""Curricula that do not look at the advantages: uniform, fixed weights, and easy to hard by a known order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyreward.curricula.sampler import Curriculum
from polyreward.errors import InvalidInputError, UnknownNameError, nearest


class Schedule(Curriculum):
    """Base of curricula that only count training steps (calls of `update`)."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.steps_done = 0

    def _learn(self, codes: np.ndarray, advantages: np.ndarray) -> None:
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        """Names and the number of steps done."""
        return {"names": list(self.names), "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; ``InvalidInputError`` if it belongs to other sources."""
        self._require(state, "steps_done")
        self.steps_done = int(state["steps_done"])


class Uniform(Schedule):
    """Every source with probability 1/n."""

    def probabilities(self) -> np.ndarray:
        """1/n for each source, float64 (n,)."""
        return np.full(len(self.names), 1 / len(self.names))


class FixedWeights(Schedule):
    """Constant weights.

    Parameters
    ----------
    names : the n sources
    weights : mapping of each name to a weight >= 0, or n weights; any positive sum

    Raises
    ------
    InvalidInputError
        A source without weight, a negative or non-finite weight, or a sum of 0.
    UnknownNameError
        A weight for a source that does not exist.
    """

    def __init__(self, names: Sequence[str], weights: Mapping[str, float] | Sequence[float]) -> None:
        super().__init__(names)
        if isinstance(weights, Mapping):
            for name in weights:
                if name not in self.names:
                    raise UnknownNameError(f"a weight names source {name!r}{nearest(str(name), self.names)}")
            absent = [name for name in self.names if name not in weights]
            if absent:
                raise InvalidInputError(f"no weight for source {absent[0]!r}; use 0 to leave it out")
            weights = [weights[name] for name in self.names]
        values = np.array(weights, dtype=np.float64)
        if values.shape != (len(self.names),):
            raise InvalidInputError(f"weights of shape {values.shape} for {len(self.names)} sources")
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise InvalidInputError(f"weights must be finite, at least 0 and not all 0, got {values.tolist()}")
        self.weights = values / values.sum()

    def probabilities(self) -> np.ndarray:
        """The weights divided by their sum, float64 (n,)."""
        return self.weights.copy()


class EasyToHard(Schedule):
    """Walk through the sources in the given order, then sample all of them uniformly.

    The walk takes `steps` training steps, the same number for each source. During stage k the source k has probability
    ``1 - review`` and the sources 0 to k (itself included) share `review`.

    Parameters
    ----------
    names : the n sources, easiest first
    steps : int >= 1
        Length of the walk in training steps (calls of `update`).
    review : float in [0, 1], default 0.2
        Share of sampling that goes back over what was opened so far.
    """

    def __init__(self, names: Sequence[str], steps: int, review: float = 0.2) -> None:
        super().__init__(names)
        if not isinstance(steps, int | np.integer) or steps < 1:
            raise InvalidInputError(f"steps must be an integer of at least 1, got {steps!r}")
        if not 0 <= review <= 1:
            raise InvalidInputError(f"review must be between 0 and 1, got {review}")
        self.steps, self.review = steps, review

    def probabilities(self) -> np.ndarray:
        """Probabilities of the present stage, float64 (n,)."""
        n = len(self.names)
        if self.steps_done >= self.steps:
            return np.full(n, 1 / n)
        stage = self.steps_done * n // self.steps
        weights = np.zeros(n)
        weights[: stage + 1] = self.review / (stage + 1)
        weights[stage] += 1 - self.review
        return weights
