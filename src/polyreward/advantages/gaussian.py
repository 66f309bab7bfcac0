"""Map rewards onto a standard normal distribution by their ranks (Gaussian GRPO).

Mean and variance are all that linear normalisation matches; tails and clumps of the rewards survive it and steer the
update. The optimal transport onto N(0, 1) replaces a reward by the normal quantile of its rank:

    psi(r)_i = Phi^-1((rank_i - 1/2) / N),   equal rewards share the mean of their quantiles

so that only the order counts, the sum is 0 and the largest of N values gets ``Phi^-1(1 - 1/(2N))``, however far out.

Paper: OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks (arXiv 2604.08539).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyreward.advantages.normal import By, check_keys
from polyreward.advantages.transform import Transform, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments


@dataclass(frozen=True)
class Gaussianize(Transform):
    """Rank the rows that share `by` and replace each value by its normal quantile.

    Parameters
    ----------
    by : keys of the rows that are ranked together
    tolerance : float >= 0
        Sorted neighbours that differ by no more than this are ties. 0: exact equality, as in the paper; float noise
        then turns equal sums of rewards into different ranks.
    ignore_constant : keys, or None
        Rows of a segment in which all values tie (or that has one row) are not ranked and get 0. A second pass over
        the task needs it: without, a group of equal rewards gets a constant that is not 0.

    A signal (N,) or (N, K) in, each column on its own; the same shape and dtype out. A segment of one row or of equal
    values gets exactly 0. Values that do not apply (NaN) are not ranked and get 0.

    Raises
    ------
    InvalidInputError
        `tolerance` is negative or not finite, or the signal holds an infinity.
    """

    by: By = "task"
    tolerance: float = 0.0
    ignore_constant: By | None = None

    def __post_init__(self) -> None:
        check_keys(self, "by", "ignore_constant")
        _check_tolerance(self.tolerance)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        _check_finite(values)
        segments = batch.segments(self.by)
        apart = None if self.ignore_constant is None else batch.segments(self.ignore_constant)
        columns = values.unsqueeze(1) if values.ndim == 1 else values
        masks = None if mask is None else (mask.unsqueeze(1) if mask.ndim == 1 else mask)
        result = torch.zeros_like(columns)
        for k in range(columns.shape[1]):
            column, used = columns[:, k].contiguous(), None if masks is None else masks[:, k].contiguous()
            if apart is not None:
                alive = apart.spread(_spread_of(column, used, apart) > self.tolerance)
                used = alive if used is None else used & alive
            result[:, k] = segment_gaussianize(column, segments, used, self.tolerance)
        return result.reshape(signal.shape)


def gaussianize(values: Tensor, mask: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """Normal quantiles of the ranks along the last axis.

    Parameters
    ----------
    values : float tensor (..., N)
    mask : bool tensor (..., N), optional
        Where a value takes part; elsewhere the result is 0. NaN never takes part.
    tolerance : float >= 0
        Sorted neighbours that differ by no more than this are ties and share the mean of their quantiles.

    Returns
    -------
    float tensor (..., N) in the dtype of `values`
        Sums to 0 along the axis; 0 where one value or none takes part.

    Raises
    ------
    InvalidInputError
        Infinite values, a negative tolerance, or a mask of another shape.
    """
    _check_tolerance(tolerance)
    if mask is not None and mask.shape != values.shape:
        raise InvalidInputError(f"mask has shape {tuple(mask.shape)}, values {tuple(values.shape)}")
    if values.ndim == 0 or values.numel() == 0:
        return torch.zeros_like(values)
    width = values.shape[-1]
    flat = values.reshape(-1)
    used = ~torch.isnan(flat) if mask is None else mask.reshape(-1) & ~torch.isnan(flat)
    flat = torch.where(used, flat, 0.0)
    _check_finite(flat)
    rows = flat.numel() // width
    codes = torch.arange(rows, device=flat.device).repeat_interleave(width)
    return segment_gaussianize(flat, Segments(codes, rows), used, tolerance).reshape(values.shape)


def segment_gaussianize(
    values: Tensor, segments: Segments, mask: Tensor | None = None, tolerance: float = 0.0
) -> Tensor:
    """Normal quantiles of the ranks inside each segment: (N,) finite values in, (N,) in their dtype out.

    0 where `mask` is false. Ties as in `Gaussianize`.
    """
    if mask is not None:
        if bool(mask.all()):
            mask = None
        else:
            rows = mask.nonzero().squeeze(1)
            kept = Segments(segments.codes[rows], segments.count)
            result = torch.zeros_like(values)
            result[rows] = segment_gaussianize(values[rows], kept, None, tolerance)
            return result
    if not len(segments):
        return torch.zeros_like(values)
    order = _order(values, segments)
    codes, ranked = segments.codes[order], values[order]
    new = torch.ones_like(codes, dtype=torch.bool)
    new[1:] = (codes[1:] != codes[:-1]) | (ranked[1:] - ranked[:-1] > tolerance)
    block = torch.cumsum(new, 0) - 1
    first = new.nonzero().squeeze(1)
    after = torch.cat([first[1:], first.new_tensor([len(values)])])
    sizes = segments.sizes
    start = torch.cumsum(sizes, 0) - sizes
    table, offset = _quantile_sums(sizes)
    base = (offset - start)[codes[first]]
    score = (table[after + base] - table[first + base]) / (after - first)
    result = torch.empty_like(values)
    result[order] = score.to(values.dtype)[block]
    return result


def _quantile_sums(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of the N normal quantiles, for each distinct segment size, one after the other; and where each starts.

    The sums are exactly symmetric, so that a whole segment of ties, and a middle tie, score exactly 0.
    """
    distinct, which = torch.unique(sizes, return_inverse=True)
    tables, starts, length = [], [], 0
    for size in distinct.tolist():
        half = size // 2
        position = torch.arange(half, dtype=torch.float64, device=sizes.device)
        below = torch.special.ndtri((position + 0.5) / max(size, 1)).cumsum(0)
        rising = torch.cat([below.new_zeros(1), below])
        tables.append(torch.cat([rising, rising.flip(0)[1 - size % 2 :]]))
        starts.append(length)
        length += size + 1
    return torch.cat(tables), torch.tensor(starts, device=sizes.device)[which]


def _order(values: Tensor, segments: Segments) -> Tensor:
    """Rows sorted by segment, then by value."""
    by_value = torch.sort(values, stable=True).indices
    return by_value[torch.sort(segments.codes[by_value], stable=True).indices]


def _spread_of(values: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:
    low = values if mask is None else torch.where(mask, values, torch.inf)
    high = values if mask is None else torch.where(mask, values, -torch.inf)
    smallest = values.new_full((segments.count,), torch.inf).scatter_reduce_(0, segments.codes, low, "amin")
    largest = values.new_full((segments.count,), -torch.inf).scatter_reduce_(0, segments.codes, high, "amax")
    return largest - smallest


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < float("inf"):
        raise InvalidInputError(f"tolerance must be a finite number >= 0, got {tolerance}")


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise InvalidInputError(f"the signal is {float(values.reshape(values.shape[0], -1)[row].max())} in row {row}")
