"""Pessimistic improvement, the verifier-based learner: the best policy near the base, where there is evidence.

    pi = argmax over {q: D(q || base) <= kappa} of E_q r,    r what a verifier learned

The ball is chi-square (the paper) or KL, one for every row: a row is a whole distribution over traces, which is the
ball of the theory, or the actions of one state, whose tilts compound over a trajectory. An entry of which the verifier
has no opinion (NaN) keeps its probability under the base, so that nothing is gained or lost by what was never seen; a
row without any opinion is the base itself. With a verifier that never calls a failure a success, the result is
therefore at least as good as the base.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polyreward.errors import UnknownNameError, nearest
from polyreward.objectives.cloning import NoEvidenceWarning
from polyreward.tilting.arrays import Array, broadcast, distribution, like, positive
from polyreward.tilting.balls import check_radius, chi2_tilt, kl_tilt

Ball = Literal["chi2", "kl"]


@dataclass(frozen=True)
class PessimisticImprove:
    """Tilt a base policy towards learned rewards, inside a ball and where there is evidence (VB in arXiv 2502.12118).

    Parameters
    ----------
    kappa : float >= 0
        Radius of every row's ball (kappa in the paper; 0.5 is this library's choice). 0 is the base.
    ball : "chi2" or "kl"

    Raises
    ------
    InvalidInputError
        A negative or NaN radius.
    UnknownNameError
        No such ball.
    """

    kappa: float = 0.5
    ball: Ball = "chi2"

    def __post_init__(self) -> None:
        check_radius(self.kappa, "PessimisticImprove")
        if self.ball not in get_args(Ball):
            raise UnknownNameError(f"no ball {self.ball!r}{nearest(self.ball, get_args(Ball))}")

    def __call__(self, base: Array, reward: Array, known: Array | None = None) -> Any:
        """Improved policy.

        Parameters
        ----------
        base : float (..., A), each row a distribution: traces of a prompt, or actions of a state
        reward : float (..., A), broadcasts with `base`
            The verifier's opinion; NaN where it has none.
        known : bool, broadcasts with `base`
            False says the same as NaN.

        Returns
        -------
        (..., A) in the kind and dtype of `base`. Mass moves only between entries with an opinion. The divergence of
        every row from its base is at most kappa.

        Warns
        -----
        NoEvidenceWarning
            No entry of any row has an opinion: the result is the base.

        Raises
        ------
        InvalidInputError
            A row that is no distribution, an infinite reward, shapes that do not broadcast.
        """
        p, worth, valid = broadcast("PessimisticImprove", base, reward, known)
        p, total = distribution("PessimisticImprove", p, torch.ones_like(valid), "base")
        seen = valid & ~worth.isnan()
        if seen.numel() and not bool(seen.any()):
            warnings.warn("no evidence: the result is the base policy", NoEvidenceWarning, stacklevel=2)
        mass = torch.where(seen, p, 0.0).sum(-1, keepdim=True)
        inside = torch.where(seen, p / positive(mass), 0.0)
        # A divergence of d inside a part of mass m is one of m d of the whole.
        radius = torch.where(mass > 0, self.kappa / positive(mass / positive(total)), 0.0)[..., 0]
        movable = seen & (mass > 0)
        tilt = chi2_tilt if self.ball == "chi2" else kl_tilt
        moved = mass * tilt(inside, torch.where(seen, worth, 0.0), radius, movable)
        still = ~seen | (radius[..., None] == 0)
        return like(torch.where(still, p, moved), base)

    def gain(self, deviation: float | Tensor) -> Any:
        """What the chi-square ball adds to the mean reward at most: ``deviation * sqrt(kappa)``.

        Reached where no weight is cut at 0. `deviation` is that of the reward under the base.
        """
        return deviation * math.sqrt(self.kappa)
