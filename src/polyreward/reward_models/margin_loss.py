"""Bradley-Terry with a target and a margin for every pair, as a part (arXiv 2401.06080).

    L = mean -[t log sigma(d - m) + (1 - t) log sigma(m - d)]

The arithmetic is `bradley_terry_loss`; a `PreferenceModel` reads target and margin from its data and needs only
`BradleyTerry`. The log-sigmoid keeps a gradient on pairs that are far off, which ``log(sigma + eps)`` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.reward_models.likelihoods import Reduction, bradley_terry_loss


@dataclass(frozen=True, eq=False)
class BTLoss:
    """Loss of differences of scores (Secrets of RLHF Part II, arXiv 2401.06080).

    Parameters
    ----------
    target : in [0, 1], scalar or (B,)
        Probability that the chosen response is the better one.
    margin : scalar or (B,)
        By how much it should be ahead, from any source; may be negative.
    reduction : "mean", or "none" for (B,)

    Calling it with differences (B,) gives the loss; target and margin of a batch may be passed with them.

    Raises
    ------
    InvalidInputError
        A target outside [0, 1]; a margin or difference that is NaN; shapes that differ.
    """

    target: Any = 1.0
    margin: Any = 0.0
    reduction: Reduction = "mean"

    def __call__(self, difference: Tensor, target: Any = None, margin: Any = None) -> Tensor:
        """Scalar, or (B,) without reduction; float32 or wider."""
        work = difference if difference.dtype in (torch.float32, torch.float64) else difference.float()
        given = {
            "target": self.target if target is None else target,
            "margin": self.margin if margin is None else margin,
        }
        parts = {name: torch.as_tensor(value, dtype=work.dtype, device=work.device) for name, value in given.items()}
        for name, part in parts.items():
            if part.ndim and part.shape != work.shape:
                raise InvalidInputError(
                    f"{name} has shape {tuple(part.shape)}, the differences {tuple(work.shape)}: expected the same"
                )
        if bool(torch.isnan(work).any()) or bool(torch.isnan(parts["margin"]).any()):
            raise InvalidInputError("BTLoss got a difference or a margin that is NaN")
        if not work.numel():
            return work.sum() if self.reduction == "mean" else work
        return bradley_terry_loss(work, parts["target"], parts["margin"], reduction=self.reduction)
