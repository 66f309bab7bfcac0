"""Comparisons as tensors: all of a data set (`ComparisonTable`), and those of a batch (`Comparisons`).

A batch of B comparisons has R responses in a row, comparison after comparison. What a likelihood needs of them is
a list of pairs (`Comparisons.pairs`) or a grid (B, K), K the largest number of responses (`Comparisons.grid`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses of which one was preferred, or that were judged a tie.

    Attributes
    ----------
    first, second : int64 (P,)
        Rows among the R responses; the first is preferred unless `tie`.
    tie : bool (P,)
    weight : float32 (P,)
        Sums to 1: each comparison counts the same, however many pairs it gives.
    target, margin : float32 (P,)
        Probability that the first is the better one, and strength; 1 and 0 by default.
    comparison : int64 (P,)
    """

    first: Tensor
    second: Tensor
    tie: Tensor
    weight: Tensor
    target: Tensor
    margin: Tensor
    comparison: Tensor

    def accuracy(self, ahead: Tensor) -> Tensor:
        """Share of the pairs that are no ties in which the first is ahead, by `weight`; 0 counts half.

        Parameters
        ----------
        ahead : float (P,)
            Above 0 where the model puts the first before the second.
        """
        weight = torch.where(self.tie, 0.0, self.weight)
        right = (ahead.detach() > 0).float() + 0.5 * (ahead.detach() == 0).float()
        return (right * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


@dataclass(frozen=True)
class Comparisons:
    """A batch.

    Attributes
    ----------
    index : int64 (B,)
        Places in the data set.
    row : int64 (R,)
        Places of the responses among all responses of the data set.
    comparison, slot : int64 (R,)
        Comparison of each response, 0 to B - 1, and its place there, 0 to K - 1.
    width : int
        K.
    ranks : float32 (R,)
        Lower is better; NaN was not compared.
    top_only : bool (B,)
        Equal ranks are no ties: only the best is known.
    ratings : float32 (R,)
        NaN where there is none.
    target, margin : float32 (B,)
    annotator : int64 (B,)
        -1 is unknown.
    columns : mapping of name to (B, ...) tensors
        The numeric columns of the data set.
    """

    index: Tensor
    row: Tensor
    comparison: Tensor
    slot: Tensor
    width: int
    ranks: Tensor
    top_only: Tensor
    ratings: Tensor
    target: Tensor
    margin: Tensor
    annotator: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def grid(self, values: Tensor, filler: float = 0.0) -> Tensor:
        """Values (R, ...) as (B, K, ...), `filler` where a comparison has fewer responses."""
        if len(values) == len(self) * self.width:
            return values.reshape(len(self), self.width, *values.shape[1:])
        out = values.new_full((len(self), self.width, *values.shape[1:]), filler)
        return out.index_put((self.comparison, self.slot), values)

    @cached_property
    def pairs(self) -> Pairs:
        """Every pair of which the order, or that it is a tie, is known."""
        rows = torch.arange(len(self.ranks), device=self.ranks.device)
        if self.width == 2 and len(rows) == 2 * len(self):
            # two responses each, the usual case: no grid of pairs is needed
            left, right = self.ranks.view(-1, 2).unbind(1)
            known = ~(torch.isnan(left) | torch.isnan(right))
            tie = left == right  # a choice between two leaves no equal ranks
            where = torch.nonzero(known & (tie | (left != right))).squeeze(1)
            swap = (right < left)[where].long()
            return self._pairs(2 * where + swap, 2 * where + 1 - swap, tie[where], where)
        ranks, place = self.grid(self.ranks, torch.nan), self.grid(rows, -1)
        better = ranks.unsqueeze(2) < ranks.unsqueeze(1)
        equal = (ranks.unsqueeze(2) == ranks.unsqueeze(1)).triu(1) & ~self.top_only.view(-1, 1, 1)
        comparison, i, j = torch.nonzero(better | equal).unbind(1)
        return self._pairs(place[comparison, i], place[comparison, j], equal[comparison, i, j], comparison)

    def _pairs(self, first: Tensor, second: Tensor, tie: Tensor, comparison: Tensor) -> Pairs:
        count = torch.bincount(comparison, minlength=len(self))
        weight = 1.0 / (count[comparison] * (count > 0).sum()).float()
        return Pairs(first, second, tie, weight, self.target[comparison], self.margin[comparison], comparison)


class ComparisonTable:
    """All comparisons of a data set as arrays.

    Parameters
    ----------
    data : PreferenceData
    annotators : names, optional
        Code i is the i-th name; default those of the data.

    Raises
    ------
    InvalidInputError
        `require_order` with data in which no response is preferred to another.
    """

    def __init__(self, data: PreferenceData, annotators: Sequence[Any] | None = None) -> None:
        self.data = data
        self.annotators = data.annotator_names if annotators is None else tuple(annotators)
        count, flat = len(data), len(data.responses)
        self.offsets, self.sizes = np.asarray(data.offsets), data.sizes
        self.ranks, self.top_only = data.order()
        self.ratings = np.full(flat, np.nan, np.float32) if data.ratings is None else data.ratings
        self.target = np.ones(count, np.float32) if data.target is None else np.nan_to_num(data.target, nan=1.0)
        self.margin = np.zeros(count, np.float32) if data.margin is None else np.nan_to_num(data.margin, nan=0.0)
        self.annotator = data.annotator_codes(self.annotators)
        self.columns = {
            name: column for name, values in data.columns.items() if (column := _numbers(values)) is not None
        }
        self._pairs_only = bool((self.sizes == 2).all())

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows of the responses of some comparisons, int64 (R,)."""
        if self._pairs_only:
            return (2 * index[:, None] + np.arange(2)).reshape(-1)
        sizes = self.sizes[index]
        return np.repeat(self.offsets[:-1][index] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())

    def batch(self, index: np.ndarray, device: torch.device | str = "cpu") -> Comparisons:
        """Some comparisons as tensors."""
        rows, sizes = self.rows(index), self.sizes[index]
        comparison = np.repeat(np.arange(len(index)), sizes)
        slot = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

        def send(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return Comparisons(
            send(np.asarray(index, np.int64)),
            send(rows),
            send(comparison),
            send(slot),
            int(sizes.max()) if len(sizes) else 0,
            send(self.ranks[rows]),
            send(self.top_only[index]),
            send(self.ratings[rows]),
            send(self.target[index]),
            send(self.margin[index]),
            send(self.annotator[index]),
            {name: send(values[index]) for name, values in self.columns.items()},
        )

    def require_order(self) -> None:
        """Refuse data in which no response is preferred to another: all ties, all ratings equal, nothing judged."""
        best = (
            np.minimum.reduceat(np.nan_to_num(self.ranks, nan=np.inf), self.offsets[:-1]) if len(self) else self.ranks
        )
        worst = np.maximum.reduceat(np.nan_to_num(self.ranks, nan=-np.inf), self.offsets[:-1]) if len(self) else best
        if not (best < worst).any():
            raise InvalidInputError(
                f"{self.data.source}: none of the {len(self)} comparisons prefers one response to another"
            )

    def require_ratings(self) -> None:
        """Refuse data without ratings, or with only one value of them."""
        known = self.ratings[~np.isnan(self.ratings)]
        if not len(known) or known.min() == known.max():
            found = f"only the rating {known[0]:g}" if len(known) else "no ratings"
            raise InvalidInputError(f"{self.data.source} has {found}, expected at least two different ratings")


def _numbers(values: Any) -> np.ndarray | None:
    """A column as float32, or None where it does not hold numbers."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float32) if values.dtype.kind in "fiub" else None
    if not all(value is None or isinstance(value, int | float | np.number) for value in values):
        return None
    return np.array([np.nan if value is None else value for value in values], np.float32)
