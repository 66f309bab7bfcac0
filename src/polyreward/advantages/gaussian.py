"""Map rewards onto a standard normal distribution by their ranks (Gaussian GRPO).

Mean and variance are all that linear normalisation matches; tails and clumps of the rewards survive it and steer the
update. The optimal transport onto N(0, 1) replaces a reward by the normal quantile of its rank:

    psi(r)_i = Phi^-1((rank_i - 1/2) / N),   equal rewards share the mean of their quantiles

so that only the order counts, the sum is 0 and the largest of N values gets ``Phi^-1(1 - 1/(2N))``, however far out.

Paper: OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks (arXiv 2604.08539).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        Rows of a segment whose values all lie within `tolerance` of each other (or that has one row) are not ranked and
        get 0. A second pass over the task needs it: without, a group of equal rewards gets a constant that is not 0.

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
        check_keys(self, "by")
        check_keys(self, "ignore_constant", optional=True)
        _check_tolerance(self.tolerance)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """(N, K) or (N,) -> the same shape."""
        values, mask = applicable(signal.detach(), batch)
        segments = batch.segments(self.by)
        if self.ignore_constant is not None:
            apart = batch.segments(self.ignore_constant)
            smallest, largest = apart.extremes(values, mask)
            alive = apart.spread(largest - smallest > self.tolerance)
            mask = alive if mask is None else mask & alive
        if values.ndim == 1:
            return segment_gaussianize(values, segments, mask, self.tolerance)
        masks = [None] * values.shape[1] if mask is None else mask.unbind(1)
        columns = zip(values.unbind(1), masks, strict=True)
        scores = [segment_gaussianize(column, segments, used, self.tolerance) for column, used in columns]
        return torch.stack(scores, dim=1) if scores else values


def gaussianize(values: Tensor, mask: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """Normal quantiles of the ranks along the last axis.

    Parameters
    ----------
    values : tensor (..., N)
    mask : bool tensor (..., N), optional
        Where a value takes part; elsewhere the result is 0. NaN never takes part.
    tolerance : float >= 0
        Sorted neighbours that differ by no more than this are ties and share the mean of their quantiles.

    Returns
    -------
    float tensor (..., N) in the dtype of `values` (float32 for integers)
        Sums to 0 along the axis; 0 where one value or none takes part.

    Raises
    ------
    InvalidInputError
        Infinite values, a negative tolerance, or a mask of another shape.
    """
    _check_tolerance(tolerance)
    if mask is not None and mask.shape != values.shape:
        raise InvalidInputError(f"mask has shape {tuple(mask.shape)}, values {tuple(values.shape)}")
    values = values.detach() if values.is_floating_point() else values.float()
    if values.ndim == 0 or values.numel() == 0:
        return torch.zeros_like(values)
    width = values.shape[-1]
    flat = values.reshape(-1)
    used = ~torch.isnan(flat) if mask is None else mask.reshape(-1).to(torch.bool) & ~torch.isnan(flat)
    flat = torch.where(used, flat, 0.0)
    if bool(torch.isinf(flat).any()):
        raise InvalidInputError(f"values hold {float(flat[torch.isinf(flat)][0])}; expected finite numbers or NaN")
    rows = flat.numel() // width
    codes = torch.arange(rows, device=flat.device).repeat_interleave(width)
    return segment_gaussianize(flat, Segments(codes, rows), used, tolerance).reshape(values.shape)


def segment_gaussianize(
    values: Tensor, segments: Segments, mask: Tensor | None = None, tolerance: float = 0.0
) -> Tensor:
    """Normal quantiles of the ranks inside each segment: (N,) finite values in, (N,) in their dtype out.

    0 where `mask` is false. Ties as in `Gaussianize`.
    """
    if not len(segments):
        return torch.zeros_like(values)
    if mask is not None and not bool(mask.all()):
        rows = mask.nonzero().squeeze(1)
        kept = Segments(segments.codes.index_select(0, rows), segments.count)
        scores = segment_gaussianize(values.index_select(0, rows), kept, None, tolerance)
        return torch.zeros_like(values).scatter_(0, rows, scores)
    order = _order(values, segments)
    codes, ranked = segments.codes.index_select(0, order), values.index_select(0, order)
    new = torch.ones_like(codes, dtype=torch.bool)
    new[1:] = (codes[1:] != codes[:-1]) | (ranked[1:] - ranked[:-1] > tolerance)
    block = new.cumsum(0).sub_(1)
    ties = torch.bincount(block)
    after = ties.cumsum(0)
    first = after - ties
    table, offset = _quantile_sums(segments.sizes)
    start = segments.sizes.cumsum(0) - segments.sizes
    shift = (offset - start).index_select(0, codes.index_select(0, first))
    score = (table.index_select(0, after + shift) - table.index_select(0, first + shift)) / ties
    return torch.empty_like(values).scatter_(0, order, score.to(values.dtype).index_select(0, block))


def _quantile_sums(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of N normal quantiles for each distinct segment size, one after the other, and where each starts.

    The sums are exactly symmetric, so that a whole segment of ties, and a middle tie, score exactly 0.
    """
    starts = torch.zeros_like(torch.bincount(sizes))
    tables, length = [], 0
    for size in torch.bincount(sizes).nonzero().squeeze(1).tolist():
        half = size // 2
        position = torch.arange(half, dtype=torch.float64, device=sizes.device)
        below = torch.special.ndtri((position + 0.5) / max(size, 1)).cumsum(0)
        rising = torch.cat([below.new_zeros(1), below])
        tables.append(torch.cat([rising, rising.flip(0)[1 - size % 2 :]]))
        starts[size] = length
        length += size + 1
    return torch.cat(tables), starts.index_select(0, sizes)


def _order(values: Tensor, segments: Segments) -> Tensor:
    """Rows sorted by segment, then by value. Sorting integers of the same order is several times faster than floats."""
    narrow = values.dtype != torch.float64
    bits = (values.float() if narrow else values).view(torch.int32 if narrow else torch.int64)
    keys = bits ^ ((bits >> (31 if narrow else 63)) & torch.iinfo(bits.dtype).max)
    rows, digits = len(keys), len(keys).bit_length()
    if narrow and not keys.is_cuda and segments.count.bit_length() + 32 + digits < 64:
        # segment, value and row fit into one integer, and numpy sorts integers alone faster than anything sorts pairs
        packed = ((((segments.codes << 32) + keys) << digits) + torch.arange(rows)).numpy()
        packed.sort()
        return torch.from_numpy(packed & ((1 << digits) - 1))
    by_value = torch.sort(keys).indices
    codes = segments.codes.index_select(0, by_value)
    codes = codes.to(torch.int16 if segments.count <= 2**15 else torch.int32)
    return by_value.index_select(0, torch.sort(codes, stable=True).indices)


def _check_tolerance(tolerance: float) -> None:
    if not isinstance(tolerance, int | float | np.number) or not 0 <= tolerance < float("inf"):
        raise InvalidInputError(f"tolerance must be a finite number >= 0, got {tolerance!r}")
