"""Statistics of segments: sums, means, deviations over rows that share an id, for any order of the rows.

Ids may be integers or strings, unsorted and of ragged counts. They are turned into dense codes once (`factorize`); every
statistic is then a scatter over the codes, so nothing loops over rows or segments. Sums accumulate in float64 and come
back in the dtype of the values. On CUDA the rows are sorted by code and reduced segment by segment, which makes the
result the same in every run (atomic adds would not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from polyreward.errors import InvalidInputError

Ids = Tensor | np.ndarray | Sequence[Any]


@dataclass(frozen=True)
class Segments:
    """A partition of N rows into segments.

    Attributes
    ----------
    codes : int64 tensor (N,)
        Segment of each row, in ``[0, count)``. Some segments may be empty.
    count : int
        Number of segments (0 when there are no rows).
    labels : sequence of length `count`, or None
        The id behind each code; None when the codes are the ids themselves.
    """

    codes: Tensor
    count: int
    labels: Sequence[Any] | None = None

    def __len__(self) -> int:
        return self.codes.shape[0]

    @cached_property
    def sizes(self) -> Tensor:
        """Rows in each segment, int64 (count,)."""
        return torch.bincount(self.codes, minlength=self.count)

    @cached_property
    def _order(self) -> Tensor:
        return torch.sort(self.codes, stable=True).indices

    @cached_property
    def _incidence(self) -> sparse.csc_matrix:
        """1 where a row (column of the matrix) belongs to a segment; its product adds whole rows at once."""
        rows = len(self)
        return sparse.csc_matrix(
            (np.ones(rows), self.codes.numpy(), np.arange(rows + 1)), shape=(self.count, rows), copy=False
        )

    def label(self, code: int) -> Any:
        """The id that `code` stands for."""
        return code if self.labels is None else self.labels[code]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (N,) or (N, K) in each segment, float64 (count,) or (count, K). 0 for an empty segment."""
        values = values.to(torch.float64)
        if self.count == 1:
            return values.sum(dim=0, keepdim=True)
        if values.is_cuda:
            return torch.segment_reduce(values[self._order], "sum", lengths=self.sizes, initial=0.0)
        if values.ndim == 1:
            return values.new_zeros(self.count).scatter_add_(0, self.codes, values)
        if values.requires_grad:
            return values.new_zeros((self.count, values.shape[1])).index_add_(0, self.codes, values)
        return torch.from_numpy(self._incidence @ values.numpy())

    def number(self, mask: Tensor | None = None) -> Tensor:
        """Number of rows that take part, float64 (count,) or (count, K) by the shape of `mask` (None: all rows)."""
        return self.sizes.to(torch.float64) if mask is None else self.sum(mask)

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the rows where `mask` is true, float64. 0 where no row takes part. `values` must be finite."""
        total = self.sum(values if mask is None else values * mask)
        return total / _like(self.number(mask).clamp(min=1), total)

    def variance(self, values: Tensor, mask: Tensor | None = None, ddof: int = 0) -> Tensor:
        """Variance in each segment (two passes: no cancellation), float64.

        0 where fewer than ``ddof + 1`` rows take part. `ddof` 0 is the population variance, 1 the sample variance.
        """
        centred = values.to(torch.float64, copy=True).sub_(self.spread(self.mean(values, mask)))
        if mask is not None:
            centred = centred * mask
        total = self.sum(centred.square())
        number = _like(self.number(mask), total)
        return torch.where(number > ddof, total / (number - ddof).clamp(min=1), torch.zeros_like(total))

    def deviation(self, values: Tensor, mask: Tensor | None = None, ddof: int = 0) -> Tensor:
        """Square root of `variance`."""
        return self.variance(values, mask, ddof).sqrt()

    def spread(self, per_segment: Tensor) -> Tensor:
        """Give each row its segment's entry: (count, ...) -> (N, ...)."""
        if self.count == 1:
            return per_segment.expand(len(self), *per_segment.shape[1:])
        return per_segment.index_select(0, self.codes)

    def constant(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether all taking-part rows of the segment hold exactly the same value, bool (count,). True if none does."""
        values = values.to(torch.float64)
        low, high = values, values
        if mask is not None:
            low = torch.where(mask, values, torch.inf)
            high = torch.where(mask, values, -torch.inf)
        smallest = values.new_full((self.count,), torch.inf).scatter_reduce_(0, self.codes, low, "amin")
        largest = values.new_full((self.count,), -torch.inf).scatter_reduce_(0, self.codes, high, "amax")
        return largest <= smallest


def _like(per_segment: Tensor, total: Tensor) -> Tensor:
    return per_segment.unsqueeze(1) if per_segment.ndim < total.ndim else per_segment


def factorize(ids: Ids, *, name: str = "ids", device: torch.device | str | None = None) -> Segments:
    """Turn any ids (integers, strings, mixed tuples) into `Segments`.

    Parameters
    ----------
    ids : int tensor, numpy array or sequence, length N
        Unsorted and ragged is fine. Floats are refused (equality of floats is not an identity), NaN and None too.
    name : str
        How an error names the ids.
    device : torch.device
        Where the codes go; default the ids' own device, or the CPU.

    Raises
    ------
    InvalidInputError
        Ids that are not one-dimensional, are floats, or hold None.
    """
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise InvalidInputError(f"{name} must be one-dimensional, got shape {tuple(ids.shape)}")
        if ids.is_floating_point():
            raise InvalidInputError(f"{name} must be integers or strings, got {ids.dtype}")
        return _factorize_integers(ids.to(device=device or ids.device, dtype=torch.int64))
    array = ids if isinstance(ids, np.ndarray) else _as_array(ids)
    if array.ndim != 1:
        raise InvalidInputError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind in "iub":
        return _factorize_integers(torch.as_tensor(np.require(array, np.int64, ["W"])).to(device or "cpu"))
    if array.dtype.kind == "f":
        raise InvalidInputError(f"{name} must be integers or strings, got {array.dtype}")
    codes, labels = _factorize_objects(array.tolist())
    if None in labels:
        row = array.tolist().index(None)
        raise InvalidInputError(f"{name} has no value in row {row}; every row needs one")
    return Segments(torch.from_numpy(codes).to(device or "cpu"), len(labels), labels)


def cross(first: Segments, second: Segments) -> Segments:
    """Segments of rows that agree in both partitions (rows of one group and one stratum, say)."""
    if len(first) != len(second):
        raise InvalidInputError(f"partitions of {len(first)} and {len(second)} rows cannot be crossed")
    joint = _factorize_integers(first.codes * max(second.count, 1) + second.codes)
    keys = torch.arange(joint.count) if joint.labels is None else torch.as_tensor(joint.labels)
    width = max(second.count, 1)
    labels = _CrossLabels(first, second, keys, width)
    return Segments(joint.codes, joint.count, labels)


@dataclass(frozen=True)
class _CrossLabels(Sequence[Any]):
    first: Segments
    second: Segments
    keys: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, code: Any) -> Any:
        key = int(self.keys[code])
        return self.first.label(key // self.width), self.second.label(key % self.width)


def whole(rows: int, device: torch.device | str = "cpu") -> Segments:
    """All rows in one segment."""
    return Segments(torch.zeros(rows, dtype=torch.int64, device=device), 1 if rows else 0)


def _as_array(ids: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(ids), dtype=object)
    array[:] = list(ids)
    if len(ids) and all(type(i) is int or isinstance(i, np.integer) for i in ids):
        return array.astype(np.int64)
    if any(isinstance(i, float | np.floating) for i in ids):
        return array.astype(np.float64) if all(isinstance(i, int | float | np.number) for i in ids) else array
    return array


def _factorize_integers(ids: Tensor) -> Segments:
    rows = ids.shape[0]
    if rows == 0:
        return Segments(ids, 0)
    low, high = (int(bound) for bound in torch.aminmax(ids))
    # Dense ids are used as they are: a few empty segments cost less than a sort.
    if low >= 0 and high < 4 * rows + 1024:
        return Segments(ids, high + 1)
    if 0 <= high - low < 4 * rows + 1024:
        return Segments(ids - low, high - low + 1, range(low, high + 1))
    labels, codes = torch.unique(ids, return_inverse=True)
    return Segments(codes, labels.shape[0], labels.tolist())


def _factorize_objects(ids: list[Any]) -> tuple[np.ndarray, list[Any]]:
    labels = list(dict.fromkeys(ids))
    code_of = dict(zip(labels, range(len(labels)), strict=True))
    return np.fromiter(map(code_of.__getitem__, ids), dtype=np.int64, count=len(ids)), labels
