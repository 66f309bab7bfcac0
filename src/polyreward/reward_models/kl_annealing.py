"""`CyclicalAnnealer`: the weight of a divergence, risen again and again so that the latent is used before it is
penalised.

    cosine   (cos(pi (t / T - 1)) + 1) / 2        linear   t / T        logistic   1 / (1 + exp(T / 2 - t))

with t the step within a cycle of T. Used by variational preference learning (arXiv 2408.10075).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

SHAPES = ("cosine", "linear", "logistic", "none")


class CyclicalAnnealer:
    """Weight that rises from `baseline` to 1 in each cycle.

    Parameters
    ----------
    total : float > 0
        Steps of all cycles together; a cycle has ``T = total / cycles``. Beyond, cycles go on.
    cycles : int
    shape : "cosine", "linear", "logistic" or "none" (always 1)
    baseline : in [0, 1]
        ``w`` becomes ``w (1 - baseline) + baseline``.
    scale : float >= 0
        Multiplies the weight, so that it rises to `scale`.

    Notes
    -----
    The end of a cycle, ``t = T``, belongs to it and has weight 1; right after it the next begins.
    """

    def __init__(
        self,
        total: float,
        cycles: int = 4,
        shape: Literal["cosine", "linear", "logistic", "none"] = "cosine",
        baseline: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        if shape not in SHAPES:
            raise UnknownNameError(f"unknown shape of an annealer {shape!r}{nearest(str(shape), SHAPES)}")
        if not total > 0 or cycles < 1 or not 0 <= baseline <= 1 or not scale >= 0:
            raise InvalidInputError(
                "an annealer needs total above 0, cycles from 1, baseline in [0, 1] and scale from 0, got "
                f"{total}, {cycles}, {baseline}, {scale}"
            )
        self.total, self.cycles, self.shape, self.baseline, self.scale = total, cycles, shape, baseline, scale
        self.steps = 0

    @property
    def period(self) -> float:
        """T."""
        return self.total / self.cycles

    @property
    def value(self) -> float:
        """Weight at the step it has come to."""
        return self(self.steps)

    def __call__(self, step: float | None = None) -> float:
        """Weight at a step, default the one it has come to; `InvalidInputError` below 0."""
        step = self.steps if step is None else step
        if not step >= 0:
            raise InvalidInputError(f"a step is at least 0, got {step}")
        period = self.period
        cycle = max(math.ceil(step / period - 1e-9) - 1, 0)
        share = min(max(step / period - cycle, 0.0), 1.0)
        if self.shape == "cosine":
            weight = (math.cos(math.pi * (share - 1)) + 1) / 2
        elif self.shape == "linear":
            weight = share
        elif self.shape == "logistic":
            weight = 0.5 * (1 + math.tanh(0.5 * period * (share - 0.5)))  # without overflow
        else:
            weight = 1.0
        return self.scale * (weight * (1 - self.baseline) + self.baseline)

    def step(self) -> None:
        """One step on."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Steps done."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.steps = int(state["steps"])
