"""`Judgements`: who preferred what to what, for heads that read someone's earlier comparisons.

Every comparison with an order and an annotator gives its pairs; those of one annotator lie together. A comparison is
known again by its content, a hash of the features of its responses, so that what is to be predicted can be kept out of
what it is predicted from, whichever batch or split it comes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import FeatureTable

ROWS = 16_384
_ODD, _PERSON = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


def content_hash(features: Tensor) -> Tensor:
    """A number for each row's content, int64 (R,); equal rows have equal numbers on every device."""
    width = features.shape[1]
    rng = np.random.default_rng(0)
    odd = torch.from_numpy(rng.integers(-(2**62), 2**62, size=width, dtype=np.int64) * 2 + 1).to(features.device)
    clean = features.float() + 0.0  # -0 is 0
    return (clean.contiguous().view(torch.int32).long() * odd).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Judgements:
    """Pairs by annotator.

    Attributes
    ----------
    features : FeatureTable
    first, second : int64 (P,)
        Rows of the features; the first was preferred, or it was a tie.
    label : float32 (P,)
        1, or 0.5 for a tie.
    key : int64 (P,)
        Of the comparison and its annotator.
    starts, sizes : int64 (A,)
        Where each annotator's pairs begin, and how many they are; their order is random but fixed.
    """

    features: FeatureTable
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray
    key: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, table: ComparisonTable, features: FeatureTable) -> Judgements:
        """All pairs of a table whose annotator is known."""
        index = np.flatnonzero(table.annotator >= 0)
        found: list[list[np.ndarray]] = []
        for some in np.array_split(index, max(-(-len(index) // ROWS), 1)):
            if not len(some):
                continue
            batch, rows = table.batch(some), table.rows(some)
            hashes = content_hash(features.take(rows))
            person = batch.annotator[batch.comparison]
            key = _keys(hashes, person, batch.comparison, len(some))
            pairs = batch.pairs
            found.append([
                rows[pairs.first.numpy()], rows[pairs.second.numpy()], np.where(pairs.tie.numpy(), 0.5, 1.0),
                key[pairs.comparison].numpy(), batch.annotator[pairs.comparison].numpy(),
            ])  # fmt: skip
        columns: list[np.ndarray] = (
            [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else [np.zeros(0)] * 5
        )
        owner = columns[4].astype(np.int64)
        order = np.random.default_rng(0).permutation(len(owner))
        order = order[np.argsort(owner[order], kind="stable")]
        sizes = np.bincount(owner, minlength=len(table.annotators))
        ordered = [column[order] for column in columns[:4]]
        return cls(
            features, ordered[0].astype(np.int64), ordered[1].astype(np.int64), ordered[2].astype(np.float32),
            ordered[3].astype(np.int64), np.cumsum(sizes) - sizes, sizes,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.first)

    def keys_of(self, hashes: Tensor, annotator: Tensor, comparison: Tensor) -> np.ndarray:
        """Keys of the comparisons of a batch, from the content of its responses (R,)."""
        dense = torch.unique(comparison, return_inverse=True)[1]
        return np.unique(_keys(hashes, annotator, dense, int(dense.max()) + 1 if len(dense) else 0).cpu().numpy())

    def asked(self, keys: np.ndarray) -> np.ndarray:
        """Codes of the annotators of whom one of the comparisons is here."""
        hit = np.flatnonzero(np.isin(self.key, keys))
        return np.unique(np.searchsorted(np.cumsum(self.sizes), hit, side="right"))

    def draw(self, users: np.ndarray, count: int, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From 1 to `count` different pairs of each user, none of a comparison in `without`; from torch's generator.

        Returns
        -------
        rows : int64 (U, C)
            Places among the pairs.
        mask : bool (U, C)
        """
        sizes = self.sizes[users][:, None]
        uniform = torch.rand(len(users), count + 1, dtype=torch.float64).numpy()
        rows = np.sort((uniform[:, 1:] * sizes).astype(np.int64), axis=1)
        twice = np.concatenate([np.zeros((len(users), 1), bool), rows[:, 1:] == rows[:, :-1]], axis=1)
        # which of the sorted draws stay must not depend on where they lie
        kept = torch.rand(len(users), count).argsort(dim=1).numpy() < 1 + (uniform[:, :1] * count).astype(np.int64)
        rows = np.minimum(rows, np.maximum(sizes - 1, 0)) + self.starts[users][:, None]
        rows = np.minimum(rows, max(len(self) - 1, 0))
        return rows, kept & ~twice & (sizes > 0) & ~np.isin(self.key[rows], without)

    def latest(self, users: np.ndarray, count: int, without: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` pairs of each user in the fixed order, as of `draw`."""
        sizes = self.sizes[users][:, None]
        # as many more as could be left out
        extra = 0 if without is None else len(without)
        width = int(min(count + extra, sizes.max())) if len(users) else 0
        rows = np.minimum(np.arange(max(width, 1)) + self.starts[users][:, None], max(len(self) - 1, 0))
        mask = np.arange(max(width, 1)) < sizes
        if without is not None:
            mask &= ~np.isin(self.key[rows], without)
            mask &= np.cumsum(mask, axis=1) <= count
            keep = np.argsort(~mask, axis=1, kind="stable")[:, :count]
            rows, mask = np.take_along_axis(rows, keep, axis=1), np.take_along_axis(mask, keep, axis=1)
        return rows, mask

    def take(self, rows: np.ndarray, mask: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pairs where the mask is true, as of `PreferenceSetEncoder.encode_pairs`, and the mask (U, C')."""
        width = max(int(mask.sum(axis=1).max()) if mask.size else 0, 1)
        if width < mask.shape[1]:  # no places that are empty everywhere
            keep = np.argsort(~mask, axis=1, kind="stable")[:, :width]
            rows, mask = np.take_along_axis(rows, keep, axis=1), np.take_along_axis(mask, keep, axis=1)
        there = rows[mask]
        sides = np.stack([self.first[there], self.second[there]], axis=1).reshape(-1)
        pairs = self.features.take(sides, device).view(len(there), 2 * self.features.width)
        tied = np.flatnonzero(self.label[there] == 0.5)
        if len(tied):
            at = torch.from_numpy(tied).to(device)
            mean = pairs[at].view(len(tied), 2, -1).mean(dim=1)
            pairs = pairs.index_copy(0, at, torch.cat([mean, mean], dim=1))
        return pairs, torch.from_numpy(np.ascontiguousarray(mask)).to(device)


def _keys(hashes: Tensor, annotator: Tensor, comparison: Tensor, count: int) -> Tensor:
    mixed = (hashes ^ (hashes >> 31)) * (_ODD - 2**64)
    total = torch.zeros(count, dtype=torch.int64, device=hashes.device).index_add(0, comparison, mixed)
    person = torch.zeros_like(total).index_put((comparison,), annotator)
    return total ^ (person * (_PERSON - 2**64))
