"""Statistics of segments: sums, means, deviations over rows that share an id, for any order of the rows.

Ids may be integers or strings, unsorted and of ragged counts. They are turned into dense codes once (`factorize`);
every statistic is then a scatter over the codes, so nothing loops over rows or segments. Values are numbers of any
dtype, (N,) or (N, K) with each column on its own; sums accumulate in float64 and statistics come back in float64. On
CUDA the rows are sorted by code and reduced segment by segment, which makes the result the same in every run (atomic
adds would not).

Where a `mask` is given, bool (N,) or (N, K), only rows where it is true take part; what the values hold elsewhere, NaN
included, touches nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count as counting
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError

Ids = Tensor | np.ndarray | Sequence[Any]

_NOT_AN_ID = (type(None), float, complex, np.floating, np.complexfloating, Tensor)


@dataclass(frozen=True, eq=False)
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
    _cells: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.codes.shape[0]

    @cached_property
    def sizes(self) -> Tensor:
        """Rows in each segment, int64 (count,)."""
        return torch.bincount(self.codes, minlength=self.count)

    @cached_property
    def _order(self) -> Tensor:
        return torch.sort(self.codes, stable=True).indices

    def label(self, code: int) -> Any:
        """The id that `code` stands for."""
        return code if self.labels is None else self.labels[code]

    def sum(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum in each segment, float64 (count,) or (count, K). 0 for an empty segment."""
        self._check(values)
        values = _masked(values.to(torch.float64), mask)
        if self.count == 1:
            return values.sum(dim=0, keepdim=True)
        if values.is_cuda and len(self):
            return torch.segment_reduce(values[self._order], "sum", lengths=self.sizes, initial=0.0)
        cells, shape = self._cells_of(values)
        return values.new_zeros(shape.numel()).scatter_add_(0, cells, values.reshape(-1)).view(shape)

    def number(self, mask: Tensor | None = None) -> Tensor:
        """Number of rows that take part, float64 (count,) or (count, K) by the shape of `mask` (None: all rows)."""
        return self.sizes.to(torch.float64) if mask is None else self.sum(mask)

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean in each segment, float64. 0 where no row takes part."""
        total = self.sum(values, mask)
        return total / per_column(self.number(mask).clamp(min=1), total)

    def centred(self, values: Tensor, mask: Tensor | None = None, *, keep_single: bool = False) -> Tensor:
        """Values minus their segment's mean, float64 in the shape of `values`; 0 where `mask` is false.

        Exactly 0 in a segment whose values are all equal. With `keep_single` the only row of a segment keeps its value.
        """
        number = self.number(mask)
        result = _masked(values.to(torch.float64, copy=True), mask)
        # Sums of up to 2^29 equal float32 are exact; wider values leave the rounding of the mean to a second round.
        for _ in range(1 if values.dtype in (torch.float16, torch.bfloat16, torch.float32) else 2):
            total = self.sum(result)
            mean = total / per_column(number.clamp(min=1), total)
            if keep_single:
                mean = torch.where(per_column(number, mean) > 1, mean, 0.0)
            result = _masked(result.sub_(self.spread(mean)), mask)
        return result

    def variance(self, values: Tensor, mask: Tensor | None = None, ddof: int = 0) -> Tensor:
        """Variance in each segment (two passes: no cancellation), float64.

        0 where fewer than ``ddof + 1`` rows take part, and exactly 0 where all values are equal. `ddof` 0 is the
        population variance, 1 the sample variance.
        """
        total = self.sum(self.centred(values, mask).square())
        number = per_column(self.number(mask), total)
        return torch.where(number > ddof, total / (number - ddof).clamp(min=1), 0.0)

    def deviation(self, values: Tensor, mask: Tensor | None = None, ddof: int = 0) -> Tensor:
        """Square root of `variance`."""
        return root(self.variance(values, mask, ddof))

    def spread(self, per_segment: Tensor) -> Tensor:
        """Give each row its segment's entry: (count, ...) -> (N, ...)."""
        if self.count == 1:
            return per_segment.expand(len(self), *per_segment.shape[1:])
        return per_segment.index_select(0, self.codes)

    def extremes(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each segment, float64; infinity and -infinity where no row takes part."""
        self._check(values)
        values = values.detach().to(torch.float64)
        cells, shape = self._cells_of(values)
        found = []
        for bound, kind in ((torch.inf, "amin"), (-torch.inf, "amax")):
            rows = _masked(values, mask, bound).reshape(-1)
            found.append(values.new_full((shape.numel(),), bound).scatter_reduce_(0, cells, rows, kind).view(shape))
        return found[0], found[1]

    def constant(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether all rows that take part hold the same value (true if none does), bool (count,) or (count, K)."""
        smallest, largest = self.extremes(values, mask)
        return largest <= smallest

    def _cells_of(self, values: Tensor) -> tuple[Tensor, torch.Size]:
        """Where each entry of the flattened values goes among the flattened segments, and the shape of these."""
        if values.ndim == 1:
            return self.codes, torch.Size((self.count,))
        width = values.shape[1]
        if width == 1:
            return self.codes, torch.Size((self.count, 1))
        if width not in self._cells:
            columns = torch.arange(width, device=self.codes.device)
            self._cells[width] = (self.codes.unsqueeze(1) * width + columns).reshape(-1)
        return self._cells[width], torch.Size((self.count, width))

    def _check(self, values: Tensor) -> None:
        rows = len(self)
        if values.ndim not in (1, 2) or values.shape[0] != rows:
            raise InvalidInputError(f"values have shape {tuple(values.shape)}, expected ({rows},) or ({rows}, K)")


def per_column(per_segment: Tensor, like: Tensor) -> Tensor:
    """Numbers (count,) or (count, K) in a shape that goes with `like`, (count,) or (count, K)."""
    return per_segment.unsqueeze(1) if per_segment.ndim < like.ndim else per_segment


def root(variance: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite."""
    if not variance.requires_grad:
        return variance.sqrt()
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)


def _masked(values: Tensor, mask: Tensor | None, elsewhere: float = 0.0) -> Tensor:
    if mask is None:
        return values
    return torch.where(per_column(mask.to(torch.bool), values), values, elsewhere)


def factorize(ids: Ids, *, name: str = "ids", device: torch.device | str | None = None) -> Segments:
    """Turn any ids (integers, strings, tuples of these) into `Segments`.

    Parameters
    ----------
    ids : int tensor, numpy array or sequence, length N
        Unsorted and ragged is fine, and integers of any size or sign. Floats are refused (equality of floats is not an
        identity), NaN and None too. Lists count as tuples.
    name : str
        How an error names the ids.
    device : torch.device
        Where the codes go; default the ids' own device, or the CPU.

    Raises
    ------
    InvalidInputError
        Ids that are not one-dimensional, are or hold floats, hold None, or cannot be compared.
    """
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise InvalidInputError(f"{name} must be one-dimensional, got shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex():
            raise InvalidInputError(f"{name} must be integers or strings, got {ids.dtype}")
        return _of_integers(ids.to(device=device or ids.device, dtype=torch.int64))
    array = ids if isinstance(ids, np.ndarray) else _as_array(ids, name)
    if array.ndim != 1:
        raise InvalidInputError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind in "fc":
        raise InvalidInputError(f"{name} must be integers or strings, got {array.dtype}")
    if array.dtype.kind in "iub" and (array.dtype != np.uint64 or not (array > np.iinfo(np.int64).max).any()):
        return _of_integers(torch.from_numpy(np.require(array, np.int64, ["C", "W"])).to(device or "cpu"))
    codes, labels = _of_objects(array.tolist(), name)
    return Segments(torch.from_numpy(codes).to(device or "cpu"), len(labels), labels)


def cross(first: Segments, second: Segments) -> Segments:
    """Segments of rows that agree in both partitions (rows of one group and one stratum, say)."""
    if len(first) != len(second):
        raise InvalidInputError(f"partitions of {len(first)} and {len(second)} rows cannot be crossed")
    width = max(second.count, 1)
    codes, keys = _dense(torch.add(second.codes, first.codes, alpha=width))
    return Segments(codes, len(keys), _CrossLabels(first, second, keys, width))


@dataclass(frozen=True)
class _CrossLabels(Sequence[Any]):
    first: Segments
    second: Segments
    keys: Tensor | range
    width: int

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, code: Any) -> Any:
        key = int(self.keys[code])
        return self.first.label(key // self.width), self.second.label(key % self.width)


def whole(rows: int, device: torch.device | str = "cpu") -> Segments:
    """All rows in one segment."""
    return Segments(torch.zeros(rows, dtype=torch.int64, device=device), 1 if rows else 0)


def _as_array(ids: Iterable[Any], name: str) -> np.ndarray:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InvalidInputError(f"{name} must be a sequence with one id a row, got {ids!r}")
    ids = list(ids)
    if all(type(i) is int or isinstance(i, np.integer) for i in ids):
        try:
            return np.array(ids, dtype=np.int64)
        except OverflowError:  # wider than 64 bits: compared as objects
            pass
    return np.fromiter(ids, dtype=object, count=len(ids))


def _of_integers(ids: Tensor) -> Segments:
    codes, keys = _dense(ids)
    if isinstance(keys, Tensor):
        return Segments(codes, len(keys), keys.tolist())
    return Segments(codes, len(keys), keys if keys.start else None)


def _dense(ids: Tensor) -> tuple[Tensor, Tensor | range]:
    """Codes of integer ids, and the id behind each code."""
    if not len(ids):
        return ids, range(0)
    low, high = (int(bound) for bound in torch.aminmax(ids))
    # Ids in a narrow range are used as they are: a few empty segments cost less than a sort.
    few = 4 * len(ids) + 1024
    if low >= 0 and high < few:
        return ids, range(high + 1)
    if high - low < few:
        return ids - low, range(low, high + 1)
    keys, codes = torch.unique(ids, return_inverse=True)
    return codes, keys


def _of_objects(ids: list[Any], name: str) -> tuple[np.ndarray, list[Any]]:
    code_of: dict[Any, int] = defaultdict(counting().__next__)
    try:
        codes = np.fromiter(map(code_of.__getitem__, ids), dtype=np.int64, count=len(ids))
    except TypeError:
        frozen = [hashable(i) for i in ids]
        if frozen == ids:
            kinds = sorted({type(i).__name__ for i in ids})
            raise InvalidInputError(f"{name} must be integers, strings or tuples, got {', '.join(kinds)}") from None
        return _of_objects(frozen, name)
    if any(issubclass(kind, _NOT_AN_ID) for kind in set(map(type, code_of))):
        row = next(row for row, i in enumerate(ids) if isinstance(i, _NOT_AN_ID))
        if ids[row] is None:
            raise InvalidInputError(f"{name} has no value in row {row}; every row needs one")
        raise InvalidInputError(f"{name} must be integers or strings, got {ids[row]!r} in row {row}")
    return codes, list(code_of)


def hashable(value: Any) -> Any:
    """`value` with every list in it turned into a tuple."""
    return tuple(hashable(part) for part in value) if isinstance(value, list | tuple) else value
