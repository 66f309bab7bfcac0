"""The contract of a curriculum: probabilities over sources, updated by the advantages of their rollouts.

A curriculum holds one probability for each named source. After each training step `Curriculum.update` hears which
source every rollout came from and what its advantage was; `Curriculum.sample` draws the sources of the next prompts,
independently and with replacement. The state is plain data that JSON can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.grouped import factorize

Sources = Sequence[str] | Sequence[int] | np.ndarray | Tensor


class UnknownSourceError(UnknownNameError, InvalidInputError):
    """A source that the curriculum does not have: a bad value, and a name that does not exist."""


class Curriculum:
    """Base of all curricula. Subclasses define `probabilities`, `_learn`, `state_dict` and `load_state_dict`.

    Parameters
    ----------
    names : the n sources, distinct strings, at least one

    Raises
    ------
    InvalidInputError
        No name, a repeated name, or a name that is not a string.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InvalidInputError(f"a curriculum needs a sequence of source names (strings), got {names!r}")
        if not len(names):
            raise InvalidInputError("a curriculum needs at least one source")
        if len(set(names)) != len(names):
            raise InvalidInputError(f"source names must be distinct, got {list(names)}")
        self.names: tuple[str, ...] = tuple(names)

    def probabilities(self) -> np.ndarray:
        """Probability of each source in the order of `names`, float64 (n,), summing to 1."""
        raise TypeError(f"{type(self).__name__} does not define probabilities")

    def update(self, sources: Sources, advantages: Sequence[float] | np.ndarray | Tensor) -> None:
        """Hear the rollouts of one training step.

        Parameters
        ----------
        sources : (B,) names, or integer positions in `names`
            Where each rollout's prompt came from.
        advantages : float (B,)
            The scalar advantage of each rollout, with its sign. Zeros count: they are the evidence of saturation.

        Raises
        ------
        InvalidInputError
            Lengths differ, or an advantage is NaN or infinite (the message names the row). Nothing is learned then.
        UnknownSourceError
            A source that the curriculum does not have. Nothing is learned then.
        """
        codes = self.positions(sources)
        if isinstance(advantages, Tensor):
            advantages = advantages.detach().cpu().double().numpy()
        values = np.asarray(advantages, dtype=np.float64)
        if values.shape != codes.shape:
            raise InvalidInputError(f"{codes.shape[0]} sources but advantages of shape {values.shape}")
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InvalidInputError(
                f"the advantage of row {row} (source {self.names[codes[row]]!r}) is {values[row]}; "
                "advantages must be finite, 0 for a group without signal"
            )
        self._learn(codes, values)

    def sample(self, rng: np.random.Generator, size: int) -> list[str]:
        """Draw `size` source names, independently and with replacement, by the present probabilities."""
        if size < 0:
            raise InvalidInputError(f"size must be at least 0, got {size}")
        drawn = rng.choice(len(self.names), size=size, p=self.probabilities())
        return [self.names[code] for code in drawn.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """What the curriculum has learned, as plain data (JSON holds it)."""
        raise TypeError(f"{type(self).__name__} does not define state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; ``InvalidInputError`` if it belongs to other sources."""
        raise TypeError(f"{type(self).__name__} does not define load_state_dict")

    def positions(self, sources: Sources) -> np.ndarray:
        """Position of each source in `names`, int64 (B,); `UnknownSourceError` for one that is not there."""
        if isinstance(sources, str):
            raise InvalidInputError(f"sources must be one name a row, got the single string {sources!r}")
        if len(sources) == 0:
            return np.zeros(0, dtype=np.int64)
        segments = factorize(sources, name="sources")
        present = segments.sizes > 0
        labels = [segments.label(code) for code in range(segments.count)]
        places = np.array(
            [self._place(label) if here else 0 for label, here in zip(labels, present.tolist(), strict=True)]
        )
        return places[segments.codes.cpu().numpy()]

    def _learn(self, codes: np.ndarray, advantages: np.ndarray) -> None:
        raise TypeError(f"{type(self).__name__} does not define _learn")

    def _place(self, source: Any) -> int:
        if isinstance(source, str):
            if source not in self.names:
                raise UnknownSourceError(f"the curriculum has no source {source!r}{nearest(source, self.names)}")
            return self.names.index(source)
        if not isinstance(source, int | np.integer) or not 0 <= source < len(self.names):
            last = len(self.names) - 1
            raise UnknownSourceError(f"the curriculum has no source {source!r}; positions are 0 to {last}")
        return int(source)

    def _require(self, state: Mapping[str, Any], *keys: str) -> None:
        """Refuse a state of other sources, or one without `keys`."""
        if "names" not in state or tuple(state["names"]) != self.names:
            raise InvalidInputError(
                f"the state is for the sources {state.get('names')}, the curriculum has {list(self.names)}"
            )
        for key in keys:
            if key not in state:
                raise InvalidInputError(
                    f"the state has no {key!r}: expected what {type(self).__name__}.state_dict returns"
                )
