"""Draw rows of a data set whose rows belong to sources, by a curriculum.

Each prompt draws its source by the curriculum's probabilities at that moment (never ahead of time: probabilities read
early are stale), then a row of that source uniformly with replacement. Small sources are therefore repeated; `epochs`
reports how often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyreward.curricula.sampler import Curriculum, Sources
from polyreward.errors import InvalidInputError


class CurriculumSampler:
    """Rows of a data set, drawn source by source.

    Parameters
    ----------
    sources : (N,) names, or integer positions in ``curriculum.names``
        Source of each row of the data set.
    curriculum : Curriculum
        Read at every draw.
    rng : numpy Generator
        Its state is part of `state_dict`, so a resumed run draws the same rows.

    Raises
    ------
    UnknownNameError
        A row of a source that the curriculum does not have.
    InvalidInputError
        A source of the curriculum without rows.
    """

    def __init__(self, sources: Sources, curriculum: Curriculum, rng: np.random.Generator) -> None:
        codes = curriculum.positions(sources)
        self.curriculum, self.rng = curriculum, rng
        # Rows sorted by source: source j owns rows[start[j] : start[j] + sizes[j]].
        self._rows = np.argsort(codes, kind="stable")
        self.sizes = np.bincount(codes, minlength=len(curriculum.names))
        if (self.sizes == 0).any():
            empty = curriculum.names[int(np.flatnonzero(self.sizes == 0)[0])]
            raise InvalidInputError(f"the data has no row of source {empty!r}")
        self._starts = np.cumsum(self.sizes) - self.sizes
        self.drawn = np.zeros(len(curriculum.names), dtype=np.int64)

    def draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the rows of the next `size` prompts.

        Returns
        -------
        rows : int64 (size,)
            Row numbers of the data set.
        sources : int64 (size,)
            Position of each row's source in ``curriculum.names``; `Curriculum.update` takes these.
        """
        if size < 0:
            raise InvalidInputError(f"size must be at least 0, got {size}")
        codes = self.rng.choice(len(self.sizes), size=size, p=self.curriculum.probabilities())
        rows = self._rows[self._starts[codes] + self.rng.integers(0, self.sizes[codes])]
        self.drawn += np.bincount(codes, minlength=len(self.sizes))
        return rows, codes

    def epochs(self) -> dict[str, float]:
        """Draws so far divided by the number of rows, for each source."""
        return dict(zip(self.curriculum.names, (self.drawn / self.sizes).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Draws so far, the generator's state and the curriculum's; plain data with numpy's default generator."""
        return {
            "drawn": self.drawn.tolist(),
            "rng": self.rng.bit_generator.state,
            "curriculum": self.curriculum.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises
        ------
        InvalidInputError
            The state is incomplete, for other sources, or of another kind of generator. Nothing is taken over then.
        """
        missing = {"curriculum", "drawn", "rng"} - set(state)
        if missing:
            raise InvalidInputError(f"the state of the sampler lacks {sorted(missing)}")
        drawn = np.asarray(state["drawn"])
        if drawn.shape != self.drawn.shape or drawn.dtype.kind not in "iu":
            raise InvalidInputError(f"the state has {drawn.tolist()} draws for {len(self.drawn)} sources")
        before = self.rng.bit_generator.state
        try:
            self.rng.bit_generator.state = state["rng"]
            self.curriculum.load_state_dict(state["curriculum"])
        except (TypeError, ValueError, KeyError) as error:
            self.rng.bit_generator.state = before
            raise InvalidInputError(f"the state does not fit this sampler: {error}") from error
        self.drawn = drawn.astype(np.int64)
