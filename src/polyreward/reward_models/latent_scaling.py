"""`RewardScaler`: rewards of different users on one scale, for a policy that serves them all.

Preferences fix a reward only up to a scale, so that the rewards of two latent users may span very different ranges.
Ways of "Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning" (arXiv
2408.10075):

    minmax         c (r - min) / (max - min),                    c = 1e-2
    max            c r / max |r|,                                c = 1
    learned_norm   exp(c (r - logmeanexp_{s'} r(s'))),           c = 1e-3
    spo            mean_{s'} sigma(r(s) - r(s')), or exp of it over a temperature
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.tilting import logmeanexp

Array = TypeVar("Array", Tensor, np.ndarray)
MODES = ("none", "minmax", "max", "learned_norm", "spo")
_FACTORS = {"none": 1.0, "minmax": 1e-2, "max": 1.0, "learned_norm": 1e-3, "spo": 1.0}


@dataclass(frozen=True)
class RewardScaler:
    """Puts rewards of each user on a common scale (arXiv 2408.10075).

    Parameters
    ----------
    mode : "none", "minmax", "max", "learned_norm" or "spo"
    factor : float > 0, optional
        c above; default that of the paper.
    temperature : float > 0, optional
        With "spo": give ``exp(r / temperature)``.
    """

    mode: Literal["none", "minmax", "max", "learned_norm", "spo"] = "none"
    factor: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError(f"unknown mode of RewardScaler {self.mode!r}{nearest(str(self.mode), MODES)}")
        for name in ("factor", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInputError(f"{name} must be above 0, got {value}")
        if self.temperature is not None and self.mode != "spo":
            raise InvalidInputError(f"temperature belongs to mode 'spo', not {self.mode!r}")

    def __call__(self, rewards: Array, reference: Array | None = None) -> Array:
        """Scale rewards.

        Parameters
        ----------
        rewards : float (..., R)
            Each leading index is a user.
        reference : float (..., M), optional
            Rewards of the states that range, maximum and mean are taken over; default the rewards themselves.

        Returns
        -------
        float (..., R)
            On device and dtype of the rewards. Where all of the reference is equal, "minmax" is 0; where it is all 0,
            "max" is 0.

        Raises
        ------
        InvalidInputError
            NaN or infinite values, an empty reference, or shapes that do not fit.
        """
        given: Any = rewards
        if isinstance(given, np.ndarray):
            other = None if reference is None else torch.from_numpy(np.ascontiguousarray(reference))
            scaled: Any = self(torch.from_numpy(np.ascontiguousarray(given)), other).numpy()
            return scaled
        if given.ndim < 1 or not given.is_floating_point():
            raise InvalidInputError(f"rewards must be floats (..., R), got {given.dtype} {tuple(given.shape)}")
        values = given.to(torch.promote_types(given.dtype, torch.float32))
        base = values if reference is None else torch.as_tensor(reference).to(values)
        if base.ndim != values.ndim or base.shape[:-1] != values.shape[:-1] or (values.numel() and not base.numel()):
            raise InvalidInputError(
                f"rewards have shape {tuple(values.shape)}, the reference {tuple(base.shape)}: expected the same "
                "leading dimensions and at least one value"
            )
        for name, found in (("rewards", values), ("reference", base)):
            if not bool(torch.isfinite(found).all()):
                place = torch.nonzero(~torch.isfinite(found))[0].tolist()
                raise InvalidInputError(f"{name}{place} is {float(found[tuple(place)])}, expected a finite reward")
        result: Any = self._scaled(values, base).to(given.dtype) if values.numel() else given.clone()
        return result

    def _scaled(self, values: Tensor, base: Tensor) -> Tensor:
        factor = _FACTORS[self.mode] if self.factor is None else self.factor
        if self.mode == "none":
            return factor * values
        if self.mode == "minmax":
            low = base.amin(dim=-1, keepdim=True)
            span = base.amax(dim=-1, keepdim=True) - low
            return factor * torch.where(span > 0, (values - low) / torch.where(span > 0, span, 1.0), 0.0)
        if self.mode == "max":
            most = base.abs().amax(dim=-1, keepdim=True)
            return factor * torch.where(most > 0, values / torch.where(most > 0, most, 1.0), 0.0)
        if self.mode == "learned_norm":
            return torch.exp(factor * (values - logmeanexp(base).unsqueeze(-1)))
        return self._beating(values, base) * factor if self.temperature is None else torch.exp(
            self._beating(values, base) / self.temperature
        )  # fmt: skip

    def _beating(self, values: Tensor, base: Tensor) -> Tensor:
        size = max((1 << 24) // max(values.numel(), 1), 1)
        total = torch.zeros_like(values)
        for some in base.split(size, dim=-1):
            total = total + torch.sigmoid(values.unsqueeze(-1) - some.unsqueeze(-2)).sum(dim=-1)
        return total / base.shape[-1]
