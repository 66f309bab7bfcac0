"""Aggregation: one number from the losses of all tokens.

    sequence-mean  mean over sequences of the mean over their tokens   (GRPO, arXiv 2402.03300)
    token-mean     mean over all tokens of the batch                   (DAPO, arXiv 2503.14476)
    fixed-length   sum over tokens / (sequences * length)              (Dr. GRPO, arXiv 2503.20783)

The first gives a token of a long answer less weight, the second gives a long answer more weight; the third is the sum
with a constant in place of the length, unbiased in both senses.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

Aggregation = Literal["sequence-mean", "token-mean", "fixed-length"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def aggregate(
    losses: Tensor,
    mask: Tensor,
    aggregation: str = "sequence-mean",
    *,
    length: int | None = None,
    normaliser: float | Tensor | None = None,
) -> Tensor:
    """Reduce token losses to a scalar.

    Parameters
    ----------
    losses : float tensor (N, T), finite where `mask` is true; what stands elsewhere does not matter
    mask : bool tensor (N, T)
        Response tokens that count. A sequence without any contributes 0.
    aggregation : "sequence-mean", "token-mean" or "fixed-length"
    length : int > 0
        The constant of "fixed-length".
    normaliser : float or scalar tensor
        Replaces the number of sequences ("sequence-mean", "fixed-length") or of tokens ("token-mean") in the divisor,
        for a loss whose mean runs over several micro-batches or processes. Default: this tensor's own number.

    Raises
    ------
    UnknownNameError
        No such aggregation.
    InvalidInputError
        "fixed-length" without a positive `length`.
    """
    if aggregation not in AGGREGATIONS:
        raise UnknownNameError(f"no aggregation {aggregation!r}{nearest(aggregation, AGGREGATIONS)}")
    mask = mask.to(torch.bool)
    kept = torch.where(mask, losses, 0.0).sum(dim=1)
    sequences = max(losses.shape[0], 1) if normaliser is None else normaliser
    if aggregation == "token-mean":
        return kept.sum() / (mask.sum().clamp(min=1) if normaliser is None else normaliser)
    if aggregation == "fixed-length":
        if length is None or length <= 0:
            raise InvalidInputError(f"the aggregation 'fixed-length' needs a positive length, got {length}")
        return kept.sum() / (sequences * length)
    return (kept / mask.sum(dim=1).clamp(min=1)).sum() / sequences
