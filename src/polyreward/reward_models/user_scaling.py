"""Test-time scaling over users: scores by one's own history and by those of similar users, as one.

    s^i = w_own (1/m) sum own^i + w_nb (1/n) sum neighbours^i

A chain that could not be read is NaN and takes part in no mean. The paper adds the two means, weights (1, 1); the
released code weighs them by a half. Both pick the same response where both sides have scores.

Paper: P-GenRM: Personalized Generative Reward Model with Test-time User-based Scaling (arXiv 2602.12116).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

Missing = Literal["renormalise", "nan"]


@dataclass(frozen=True)
class UserScaler:
    """Combines own and neighbours' scores (arXiv 2602.12116).

    Parameters
    ----------
    m, n : int >= 0, not both 0
        Samples with one's own history, and of neighbours; 16 and 8 in the paper.
    weights : (own, neighbours)
        At least 0, not both 0. (1, 1) in the paper, (0.5, 0.5) in the released code.
    missing : "renormalise" or "nan"
        What a response without a score on one side gets: the weighted mean of the sides that it has, on the scale of
        the others; or NaN. A side without any score at all is left out, and the other's mean is the result.
    """

    m: int = 16
    n: int = 8
    weights: tuple[float, float] = (1.0, 1.0)
    missing: Missing = "renormalise"

    def __post_init__(self) -> None:
        if type(self.m) is not int or type(self.n) is not int or min(self.m, self.n) < 0 or self.m + self.n == 0:
            raise InvalidInputError(
                f"m and n must be whole numbers of at least 0 and not both 0, got {self.m!r} and {self.n!r}"
            )
        if not isinstance(self.weights, tuple | list):
            raise InvalidInputError(f"weights must be two numbers from 0, not both 0, got {self.weights!r}")
        weights = tuple(float(w) for w in self.weights)
        if len(weights) != 2 or not np.isfinite(weights).all() or min(weights) < 0 or not sum(weights) > 0:
            raise InvalidInputError(f"weights must be two numbers from 0, not both 0, got {self.weights}")
        object.__setattr__(self, "weights", weights)
        if self.missing not in get_args(Missing):
            raise UnknownNameError(f"unknown missing {self.missing!r}{nearest(str(self.missing), get_args(Missing))}")

    def __call__(self, own: Any, neighbours: Any = None) -> Any:
        """As `combine`."""
        return self.combine(own, neighbours)

    def combine(self, own: Any, neighbours: Any = None) -> Any:
        """Final scores.

        Parameters
        ----------
        own : float (..., m, b), NaN where a chain gave none; None where there are none
        neighbours : float (..., n, b), or None

        Returns
        -------
        (..., b) in the type of the input, float32 or wider; NaN where no chain scored a response

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, more rows than m or n, infinite scores, no side at all.
        """
        given = own if own is not None else neighbours
        if given is None:
            raise InvalidInputError("UserScaler needs own scores or those of neighbours")
        sides = [_side(own, self.m, "own"), _side(neighbours, self.n, "neighbours")]
        shapes = {(*s.shape[:-2], s.shape[-1]) for s in sides if s is not None}
        if len(shapes) != 1:
            raise InvalidInputError(f"own and neighbours score different responses: shapes {sorted(shapes)}")
        means, shares, present = [], [], []
        for side, factor in zip(sides, self.weights, strict=True):
            if side is not None and factor:
                known = ~torch.isnan(side)
                count = known.sum(dim=-2)
                means.append(torch.where(known, side, 0.0).sum(dim=-2) / count.clamp(min=1))
                shares.append(factor * (count > 0).to(side.dtype))
                present.append((count > 0).any(dim=-1, keepdim=True).to(side.dtype) * factor)
        if not means:
            return _like(torch.full(shapes.pop(), torch.nan), given)
        mean, share, present_share = torch.stack(means), torch.stack(shares), torch.stack(present)
        weight, scale = share.sum(dim=0), present_share.sum(dim=0)
        result = (share * mean).sum(dim=0) / torch.where(weight > 0, weight, 1.0)
        # a side that scored nothing is left out; what is left is then the other side's mean
        result = torch.where((present_share > 0).sum(dim=0) > 1, scale * result, result)
        whole = weight > 0 if self.missing == "renormalise" else (weight == scale) & (weight > 0)
        return _like(torch.where(whole, result, torch.nan), given)

    def choose(self, scores: Any) -> int:
        """Index of the best of b final scores; the first of equals, and NaN comes last."""
        values = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, np.float64)
        if values.ndim != 1 or not len(values):
            raise InvalidInputError(f"choose needs scores (b,) of at least one response, got shape {values.shape}")
        return int(np.where(np.isnan(values), -np.inf, values).argmax())


def _side(values: Any, most: int, name: str) -> Tensor | None:
    if values is None:
        return None
    side = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, np.float64))
    side = side if side.dtype in (torch.float32, torch.float64) else side.float()
    if side.ndim < 2:
        raise InvalidInputError(f"{name} must have shape (samples, responses), got {tuple(side.shape)}")
    if side.shape[-2] > most:
        raise InvalidInputError(f"{name} has {side.shape[-2]} samples, the scaler takes at most {most}")
    if bool(torch.isinf(side).any()):
        raise InvalidInputError(f"{name} holds an infinite score; mark what could not be read as NaN")
    return side


def _like(result: Tensor, given: Any) -> Any:
    return result.to(given.device) if isinstance(given, Tensor) else result.numpy()
