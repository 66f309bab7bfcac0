"""Retrieval of digit images: for a query image, rank a pool of others so that those of its class come first.

Images are the 1797 of scikit-learn's digits. A document shows one number x to a reranker: its similarity to the query
(cosine of 16 principal components plus noise), seen through an affine map that differs from query to
query,

    x = a_q + b_q similarity,   a_q ~ N(0, 1),   ln b_q ~ N(0, 0.6^2)

so that x of a lone document is ambiguous while its place among other documents of the query is not. Two teachers judge
every document, each relevance plus noise of its own. The task of the GroupRank study (arXiv 2511.11653).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, require

COMPONENTS, TRAIN = 16, 1200
FEWEST, MOST = 2, 9
NOISE, TEACHER_NOISE, SHIFT, STRETCH = 0.25, 0.5, 1.0, 0.6


@dataclass(frozen=True)
class DigitPools:
    """Q queries with a pool of n documents each, in random order.

    Attributes
    ----------
    signal : float64 (Q, n)
        x, all that a reranker sees.
    relevant : bool (Q, n)
        Whether the document has the class of the query; 2 to 9 of a pool do.
    teachers : float64 (2, Q, n)
        Judgments of two teachers, higher is better.
    similarity : float64 (Q, n)
        What x is without the map of the query.
    """

    signal: np.ndarray
    relevant: np.ndarray
    teachers: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class DigitRetrieval:
    """Makes pools from one part of the images.

    Parameters
    ----------
    rows : int (m,)
        Images from which queries and documents are drawn; see `split`.
    shift, stretch : float
        Deviations of a_q and of ln b_q; with 0 and 0 x is the similarity, and a lone document says all.
    noise : float
        Deviation of the noise on the cosine, which has deviation 0.32 over pairs of images. With 0.25 the order by
        similarity has NDCG@10 of about 0.66.
    teacher_noise : float
    """

    rows: np.ndarray
    shift: float = SHIFT
    stretch: float = STRETCH
    noise: float = NOISE
    teacher_noise: float = TEACHER_NOISE

    def pools(self, queries: int, size: int, rng: np.random.Generator) -> DigitPools:
        """Draw `queries` pools of `size` documents.

        Raises
        ------
        InvalidInputError
            A size that does not hold 9 relevant documents, or above the number of images.
        """
        if not MOST <= size < len(self.rows):
            raise InvalidInputError(f"a pool holds {MOST} to {len(self.rows) - 1} documents, got size {size}")
        features, classes = digit_features()
        asked = rng.choice(self.rows, size=queries)
        same = classes[self.rows] == classes[asked, None]
        itself = self.rows == asked[:, None]
        keys = rng.random(same.shape)
        alike = np.argsort(np.where(same & ~itself, keys, 2 + keys), axis=1)[:, :MOST]
        others = np.argsort(np.where(same, 2 + keys, keys), axis=1)[:, :size]
        number, place = rng.integers(FEWEST, MOST + 1, size=(queries, 1)), np.arange(size)
        relevant = place < number
        found = np.where(
            relevant,
            np.take_along_axis(alike, np.minimum(place, MOST - 1)[None].repeat(queries, 0), axis=1),
            np.take_along_axis(others, np.maximum(place - number, 0), axis=1),
        )
        order = np.argsort(rng.random(found.shape), axis=1)
        relevant, found = np.take_along_axis(relevant, order, axis=1), np.take_along_axis(found, order, axis=1)
        cosine = np.einsum("qnd,qd->qn", features[self.rows[found]], features[asked])
        similarity = cosine + self.noise * rng.normal(size=cosine.shape)
        shift = self.shift * rng.normal(size=(queries, 1))
        signal = shift + np.exp(self.stretch * rng.normal(size=(queries, 1))) * similarity
        teachers = relevant + self.teacher_noise * rng.normal(size=(2, *relevant.shape))
        return DigitPools(signal, relevant, teachers, similarity)


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images for training (1200) and for test, by seed."""
    order = np.random.default_rng(seed).permutation(len(digit_features()[1]))
    return order[:TRAIN], order[TRAIN:]


@cache
def digit_features() -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float64 (1797, 16) of the principal components, and classes int64 (1797,)."""
    require("sklearn", "tasks")
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = data.data.astype(np.float64)
    centred = pixels - pixels.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    components = centred @ axes[:COMPONENTS].T
    return components / np.linalg.norm(components, axis=1, keepdims=True), data.target.astype(np.int64)
