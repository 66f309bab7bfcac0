"""Quality levels, such as bad, normal and good, as blocks of ordinal ratings, and the ratings a labelled pair may have.

A label says which block a response belongs to. A pair of a chosen response of level c and a rejected one of level r has
its probability summed over a region of pairs of ratings (k chosen, j rejected):

    triangle    lo(r) <= j < k <= hi(c)      anchors both, and the order still has a gradient inside a level
    rectangle   k in level c, j in level r   nothing orders the ratings inside a level; of one level: the triangle in it
    weighted    the rectangle, each cell weighted by a tent over each of the two levels

After region flooding tuning in "Learning Ordinal Probabilistic Reward from Preferences" (arXiv 2602.12660). The paper's
exact region was not available; the triangle above is our reading, and so are the tents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

RegionMode = Literal["triangle", "rectangle", "weighted"]
MODES = ("triangle", "rectangle", "weighted")
UNKNOWN_LEVEL = -1


@dataclass(frozen=True)
class QualityPartition:
    """Levels as blocks of the ratings 1 to K, worst first (arXiv 2602.12660).

    Parameters
    ----------
    boundaries : ((first, last), ...)
        Ratings of each level, both included. They tile 1 to K.

    Raises
    ------
    InvalidInputError
        A gap, an overlap, a level without ratings, a start other than 1, or fewer than two ratings in all.
    """

    boundaries: tuple[tuple[int, int], ...] = ((1, 3), (4, 6), (7, 9))

    def __post_init__(self) -> None:
        try:
            blocks = tuple((int(first), int(last)) for first, last in self.boundaries)
            whole = all(first == a and last == b for (first, last), (a, b) in zip(self.boundaries, blocks, strict=True))
        except (TypeError, ValueError):
            blocks, whole = (), False
        expected = 1
        for first, last in blocks:
            if first != expected or last < first:
                raise InvalidInputError(
                    f"the levels {list(blocks)} must tile the ratings from 1 without gaps: the level ({first}, {last}) "
                    f"should begin at {expected} and hold a rating"
                )
            expected = last + 1
        if not whole or expected < 3:
            raise InvalidInputError(
                f"boundaries must be (first, last) pairs of whole numbers with two ratings in all, "
                f"got {self.boundaries!r}"
            )
        object.__setattr__(self, "boundaries", blocks)

    @classmethod
    def even(cls, num_ratings: int, levels: int = 3) -> QualityPartition:
        """Levels of equal size, the first ones a rating larger where K is not a multiple of their number."""
        if not 1 <= levels <= num_ratings:
            raise InvalidInputError(f"{num_ratings} ratings cannot be cut into {levels} levels")
        blocks = np.array_split(np.arange(1, num_ratings + 1), levels)
        return cls(tuple((int(block[0]), int(block[-1])) for block in blocks))

    @property
    def num_ratings(self) -> int:
        """K."""
        return self.boundaries[-1][1]

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.boundaries)

    @property
    def membership(self) -> np.ndarray:
        """Which rating (column) belongs to which level (row), bool (L, K)."""
        return np.arange(self.num_levels)[:, None] == self.level_of(np.arange(1, self.num_ratings + 1))[None]

    def level_of(self, ratings: Any) -> Any:
        """Level of each rating, 0 is the worst; -1 for NaN.

        Parameters
        ----------
        ratings : (...), in [1, K]
            A rating between two levels, such as 3.4, belongs to that of the nearest whole one, half up.

        Returns
        -------
        int64 (...), tensor or array as given

        Raises
        ------
        InvalidInputError
            A rating outside 1 to K.
        """
        given = torch.as_tensor(ratings)
        values = given.double()
        unknown = torch.isnan(values)
        nearest_whole = torch.floor(torch.where(unknown, 1.0, values) + 0.5)
        wrong = (nearest_whole < 1) | (nearest_whole > self.num_ratings)
        if bool(wrong.any()):
            raise InvalidInputError(
                f"rating {float(values[wrong][0]):g} is outside the scale 1 to {self.num_ratings} of the levels"
            )
        starts = torch.tensor([first for first, _ in self.boundaries], device=values.device)
        level = torch.searchsorted(starts, nearest_whole.long().contiguous(), right=True) - 1
        level = torch.where(unknown, UNKNOWN_LEVEL, level)
        return level if isinstance(ratings, Tensor) else level.numpy()


def region_mask(
    level_c: Any, level_r: Any, partition: QualityPartition | None = None, mode: RegionMode = "triangle"
) -> Any:
    """Pairs of ratings that a labelled pair may have; see the module.

    Parameters
    ----------
    level_c, level_r : int (B,)
        Levels of the chosen and the rejected response, 0 is the worst. -1, or NaN, is unlabelled; a pair with one
        unlabelled response counts as unlabelled and gets the whole strict triangle.
    partition : QualityPartition, default three levels of three ratings
    mode : "triangle", "rectangle" or "weighted"
        A tent is 1 at the centre of a level and falls linearly to 0 at the first ratings outside it.

    Returns
    -------
    bool (B, K, K), rows are the chosen response's ratings; float32 weights in [0, 1] in mode "weighted".
        A tensor on the device of `level_c`, or an array where that is none.

    Raises
    ------
    InvalidInputError
        An empty region: the chosen response's level below the rejected one's, or both of a level with a single rating;
        a level that does not exist; shapes that differ.
    UnknownNameError
        Another mode.
    """
    partition = QualityPartition() if partition is None else partition
    if mode not in MODES:
        raise UnknownNameError(f"unknown region mode {mode!r}{nearest(str(mode), MODES)}")
    chosen, rejected = (_levels(name, v, partition) for name, v in (("level_c", level_c), ("level_r", level_r)))
    rejected = rejected.to(chosen.device)
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        raise InvalidInputError(
            f"level_c has shape {tuple(chosen.shape)}, level_r {tuple(rejected.shape)}: expected (pairs,) of both"
        )
    unlabelled = (chosen == UNKNOWN_LEVEL) | (rejected == UNKNOWN_LEVEL)
    _refuse_empty(chosen, rejected, unlabelled, partition)
    region = _region(chosen.clamp(min=0), rejected.clamp(min=0), partition, mode)
    ratings = torch.arange(partition.num_ratings, device=chosen.device)
    below = ratings[:, None] > ratings[None, :]
    whole = unlabelled[:, None, None]
    found = torch.where(whole, below.to(region.dtype), region)
    return found if isinstance(level_c, Tensor) or isinstance(level_r, Tensor) else found.numpy()


def is_contradiction(level_c: Tensor, level_r: Tensor) -> Tensor:
    """Whether the chosen response is labelled worse than the rejected one, bool; false where one has no label."""
    return (level_c >= 0) & (level_r >= 0) & (level_c < level_r)


def _region(chosen: Tensor, rejected: Tensor, partition: QualityPartition, mode: str) -> Tensor:
    blocks = torch.tensor(partition.boundaries, device=chosen.device)
    ratings = torch.arange(1, partition.num_ratings + 1, device=chosen.device)
    k, j = ratings[None, :, None], ratings[None, None, :]
    own, other = blocks[chosen][:, :, None, None], blocks[rejected][:, :, None, None]
    region = (j < k) & (other[:, 0] <= j) & (k <= own[:, 1])
    if mode == "triangle":
        return region
    region = region & (own[:, 0] <= k) & (j <= other[:, 1])
    if mode == "rectangle":
        return region
    return region.float() * _tent(k, own) * _tent(j, other)


def _tent(ratings: Tensor, block: Tensor) -> Tensor:
    first, last = block[:, 0].float(), block[:, 1].float()
    return (1 - (ratings - (first + last) / 2).abs() / ((last - first) / 2 + 1)).clamp(min=0)


def _levels(name: str, values: Any, partition: QualityPartition) -> Tensor:
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = np.asarray(values)
    given = torch.as_tensor(values)
    if given.is_floating_point():
        given = torch.where(torch.isnan(given), float(UNKNOWN_LEVEL), given)
    wrong = (given != given.floor() if given.is_floating_point() else torch.zeros_like(given, dtype=torch.bool)) | (
        (given < UNKNOWN_LEVEL) | (given >= partition.num_levels)
    )
    if bool(wrong.any()):
        raise InvalidInputError(
            f"{name}[{int(wrong.reshape(-1).int().argmax())}] is {float(given[wrong][0]):g}, expected a level from 0 "
            f"to {partition.num_levels - 1}, or -1 for none"
        )
    return given.long()


def _refuse_empty(chosen: Tensor, rejected: Tensor, unlabelled: Tensor, partition: QualityPartition) -> None:
    below = (chosen < rejected) & ~unlabelled
    if bool(below.any()):
        pair = int(below.int().argmax())
        raise InvalidInputError(
            f"pair {pair}: the chosen response has level {int(chosen[pair])}, below the rejected one's "
            f"{int(rejected[pair])}, so no ratings are left; drop such pairs"
        )
    sizes = torch.tensor([last - first + 1 for first, last in partition.boundaries], device=chosen.device)
    alone = (chosen == rejected) & ~unlabelled & (sizes[chosen.clamp(min=0)] == 1)
    if bool(alone.any()):
        pair = int(alone.int().argmax())
        raise InvalidInputError(
            f"pair {pair}: both responses have level {int(chosen[pair])}, which holds a single rating, so neither can "
            "be above the other; use wider levels or leave the pair unlabelled"
        )
