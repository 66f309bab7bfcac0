"""A warning when nearly all groups have had equal rewards for many steps: such training has no gradient."""

from __future__ import annotations

import math
import warnings
from collections import deque

import numpy as np


class NoSignalWarning(UserWarning):
    """Nearly all groups had equal rewards for many steps: the active tiers are out of the model's reach."""


class DeadGroupWatch:
    """Warns when nearly all groups had equal rewards over many steps.

    Parameters
    ----------
    window : int
        Steps that are looked at together.
    share : float
        Share of the groups without signal above which it warns; after a warning it looks at new steps only.
    """

    def __init__(self, window: int = 20, share: float = 0.95) -> None:
        self.window, self.share = window, share
        self._steps: deque[list[float]] = deque(maxlen=window)

    def update(self, dead: int, groups: int, step: float | None = None, about: str = "") -> bool:
        """Hear how many groups of a batch are dead; calls of one `step` are added up. True where it warned."""
        if groups == 0:
            return False
        if step is None or not self._steps or self._steps[-1][0] != step:
            self._steps.append([math.nan if step is None else step, 0, 0])
        self._steps[-1][1] += dead
        self._steps[-1][2] += groups
        total = np.array(self._steps).sum(axis=0)
        if len(self._steps) < self.window or total[1] <= self.share * total[2]:
            return False
        warnings.warn(
            f"{total[1] / total[2]:.0%} of the groups of the last {self.window} steps had equal rewards below the "
            f"highest{about}: there is no gradient. The active tiers are out of reach; begin with easier ones",
            NoSignalWarning,
            stacklevel=3,
        )
        self._steps.clear()
        return True
