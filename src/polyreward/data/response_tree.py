"""A regular tree of responses, and how diverse responses are: the structural function (arXiv 2402.10184).

    F(M) = least d such that the responses fall into M clusters of |Y| / 2M to 2 |Y| / M responses, in each of which
           the mean inductive-bias distance is at most d

Slow decay is a diverse task. Means are over different responses of a cluster and every cluster must keep the bound: the
paper's wording leaves both open. The least d over all partitions is found for up to `EXACT` responses and for a regular
tree where M is a power of its branching; otherwise the value is that of a good partition, from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError

EXACT = 10
"""Responses up to which all partitions of a matrix are tried."""


@dataclass(frozen=True)
class ResponseTree:
    """Responses as leaves of a regular tree; two that share h steps are ``branching^(-alpha h)`` apart.

    Parameters
    ----------
    branching, height : int
    alpha : float > 0
        Small is diverse: F(M) falls as ``M^-alpha``.

    Leaf i has the digits of i in base `branching` as its steps. Nodes of `edges` are the leaves, then the hubs from the
    deepest up to the root.
    """

    branching: int
    height: int
    alpha: float

    def __post_init__(self) -> None:
        if self.branching < 2 or self.height < 1 or not self.alpha > 0:
            raise InvalidInputError(f"needs branching from 2, height from 1, alpha above 0, got {self}")

    @property
    def leaves(self) -> int:
        """Number of responses."""
        return int(self.branching**self.height)

    def common_depth(self, i: Any, j: Any) -> np.ndarray:
        """Steps that leaves share, 0 to height."""
        powers = self.branching ** np.arange(self.height, -1, -1)
        return (np.asarray(i)[..., None] // powers == np.asarray(j)[..., None] // powers)[..., 1:].sum(axis=-1)

    def distance(self, i: Any, j: Any) -> np.ndarray:
        """Inductive-bias distance of leaves."""
        return self.distances[self.common_depth(i, j)]

    @property
    def distances(self) -> np.ndarray:
        """Distance at common depth 0 to height, (height + 1,); 0 at the last, which is the leaf itself."""
        return np.append(float(self.branching) ** (-self.alpha * np.arange(self.height)), 0.0)

    def edges(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Number of nodes, edges (E, 2) and their lengths; a hub is half as far from its leaves as they are apart."""
        edges, lengths, start = [], [], 0
        for depth in range(self.height, 0, -1):
            nodes = np.arange(self.branching**depth)
            edges.append(np.stack([start + nodes, start + len(nodes) + nodes // self.branching], axis=1))
            lengths.append(np.full(len(nodes), (self.distances[depth - 1] - self.distances[depth]) / 2))
            start += len(nodes)
        return start + 1, np.concatenate(edges), np.concatenate(lengths)


def structural_function(tree_or_matrix: Any, M: int) -> float:
    """F(M).

    Parameters
    ----------
    tree_or_matrix : ResponseTree, or inductive-bias distances (Y, Y), symmetric with diagonal 0
    M : int, 1 to |Y|
        Clusters.

    Returns
    -------
    float
        0 for clusters of one response each.

    Raises
    ------
    InvalidInputError
        Another M, a matrix that is not a distance, or no partition with clusters of the sizes asked for.
    """
    count = tree_or_matrix.leaves if isinstance(tree_or_matrix, ResponseTree) else len(np.asarray(tree_or_matrix))
    if not isinstance(M, int | np.integer) or not 1 <= M <= count:
        raise InvalidInputError(f"M must be a whole number from 1 to the {count} responses, got {M!r}")
    if isinstance(tree_or_matrix, ResponseTree):
        return _of_tree(tree_or_matrix, int(M))
    matrix = np.asarray(tree_or_matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape != (count, count) or not np.isfinite(matrix).all():
        raise InvalidInputError(f"distances must be a finite matrix (Y, Y), got shape {matrix.shape}")
    if (matrix < 0).any() or np.diag(matrix).any() or not np.allclose(matrix, matrix.T):
        raise InvalidInputError("distances must be symmetric, at least 0, and 0 on the diagonal")
    low, high = math.ceil(count / (2 * M) - 1e-9), math.floor(2 * count / M + 1e-9)
    return _of_all(matrix, M, low, high) if count <= EXACT else _of_order(matrix, M, low, high)


def _of_tree(tree: ResponseTree, clusters: int) -> float:
    """Neighbouring leaves in clusters of nearly equal size; subtrees where M is a power of the branching."""
    leaf = np.arange(tree.leaves)
    cluster = leaf * clusters // tree.leaves
    size = np.bincount(cluster).astype(np.float64)
    total = before = np.zeros(clusters)
    for depth in range(tree.height, -1, -1):
        subtree = leaf // tree.branching ** (tree.height - depth)
        begins = np.ones(tree.leaves, bool)
        begins[1:] = (np.diff(subtree) != 0) | (np.diff(cluster) != 0)
        run = np.bincount(np.cumsum(begins) - 1).astype(np.float64)
        sharing = np.asarray(
            np.bincount(cluster[begins], run**2, clusters), dtype=np.float64
        )  # ordered pairs that share at least `depth` steps
        total = total + tree.distances[depth] * (sharing - before)
        before = sharing
    return float(np.where(size > 1, total / np.maximum(size * (size - 1), 1), 0.0).max())


def _of_all(matrix: np.ndarray, clusters: int, low: int, high: int) -> float:
    """Every partition, by the subset that is left."""
    count = len(matrix)
    inside = np.zeros(2**count)
    for mask in range(1, 2**count):
        members = [i for i in range(count) if mask >> i & 1]
        size = len(members)
        pairs = matrix[np.ix_(members, members)].sum()
        inside[mask] = (pairs / (size * (size - 1)) if size > 1 else 0.0) if low <= size <= high else math.inf
    best = {0: 0.0}
    for _ in range(clusters):
        found: dict[int, float] = {}
        for used, value in best.items():
            rest = (2**count - 1) & ~used
            if not rest:
                continue
            first = rest & -rest  # a cluster holds the first response that is left: each partition comes once
            others = rest ^ first
            subset = others
            while True:
                mask = subset | first
                bound = max(value, float(inside[mask]))
                if bound < found.get(used | mask, math.inf):
                    found[used | mask] = bound
                if not subset:
                    break
                subset = (subset - 1) & others
        best = found
    return _found(best.get(2**count - 1, math.inf), count, clusters)


def _of_order(matrix: np.ndarray, clusters: int, low: int, high: int) -> float:
    """The best cut of one order of the responses, in which similar ones are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    count = len(matrix)
    order = leaves_list(linkage(squareform(matrix, checks=False), "average"))
    sums = np.zeros((count + 1, count + 1))
    sums[1:, 1:] = matrix[np.ix_(order, order)].cumsum(axis=0).cumsum(axis=1)
    best = np.full(count + 1, math.inf)
    best[0] = 0.0
    sizes = np.arange(max(low, 1), min(high, count) + 1)
    ends = np.arange(count + 1)
    starts = ends[:, None] - sizes
    valid, at = starts >= 0, np.maximum(starts, 0)
    inside = sums[ends, ends][:, None] - 2 * sums[ends[:, None], at] + sums[at, at]
    mean = np.where(sizes > 1, np.maximum(inside, 0.0) / np.maximum(sizes * (sizes - 1), 1), 0.0)
    for _ in range(clusters):
        best = np.where(valid, np.maximum(best[at], mean), math.inf).min(axis=1, initial=math.inf)
    return _found(float(best[count]), count, clusters)


def _found(value: float, count: int, clusters: int) -> float:
    if value == math.inf:
        raise InvalidInputError(
            f"{count} responses cannot be divided into {clusters} clusters of {count / (2 * clusters):g} to "
            f"{2 * count / clusters:g} responses"
        )
    return value
