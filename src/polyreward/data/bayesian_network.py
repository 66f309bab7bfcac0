"""The induced Bayesian network: how far comparisons carry what they say about rewards.

Responses are nodes. An inductive-bias edge joins responses whose rewards the model expects to be close, a comparison
joins two that were compared; each has a variance. Along a path variances add up:

    inference distance d(a, b) = min over paths of the sum of the edges' variances
    posterior variance  v(a, b) = effective resistance between a and b, edges being resistors      v <= d

The distance is the paper's bound. The exact Gaussian posterior uses all paths at once, and there designs differ far
less: report both. The inductive-bias edges are assumed, never read off a reward model.

Paper: Reward Generalization in RLHF: A Topological Perspective (arXiv 2402.10184). Normal noise of the same variance in
place of logistic noise, and means over different responses, are this library's reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from polyreward.data.response_tree import ResponseTree, structural_function
from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.tilting import exponential_tilt

__all__ = [
    "InducedBayesianNetwork",
    "ResponseTree",
    "autoencoding_gap",
    "behaviour_distribution",
    "logistic_variance",
    "rate_ratio",
    "sample_strengths",
    "structural_function",
]

SOURCES = 64
"""Sources of shortest paths at once; bounds memory."""


@dataclass(frozen=True, eq=False)
class InducedBayesianNetwork:
    """Inductive-bias edges and comparisons (arXiv 2402.10184).

    Parameters
    ----------
    n_nodes : int
    ib_edges, hp_edges : int (E, 2)
        Inductive-bias edges and comparisons; edges come in any order and may come twice.
    ib_variance, hp_variance : (E,), or one for all
        Above 0; of a comparison with strength at inverse temperature beta it is `logistic_variance`.
    responses : int, optional
        The first so many nodes are responses, the others are hubs; default all.

    Raises
    ------
    InvalidInputError
        An edge to a node that is not there or to itself, a variance that is not above 0 and finite.
    """

    n_nodes: int
    ib_edges: Any
    ib_variance: Any = 1.0
    hp_edges: Any = ()
    hp_variance: Any = 1.0
    responses: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n_nodes, int | np.integer) or self.n_nodes < 1:
            raise InvalidInputError(f"n_nodes must be a whole number of at least 1, got {self.n_nodes!r}")
        if self.responses is not None and not 1 <= self.responses <= self.n_nodes:
            raise InvalidInputError(f"responses must be from 1 to {self.n_nodes}, got {self.responses}")
        for kind in ("ib", "hp"):
            edges, variance = self._edges(kind)
            object.__setattr__(self, f"{kind}_edges", edges)
            object.__setattr__(self, f"{kind}_variance", variance)

    def _edges(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        edges = np.asarray(getattr(self, f"{kind}_edges"))
        edges = edges.reshape(0, 2).astype(np.int64) if not edges.size else edges
        if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
            raise InvalidInputError(f"{kind}_edges must be whole numbers (E, 2), got {edges.dtype} {edges.shape}")
        wrong = ((edges < 0) | (edges >= self.n_nodes)).any(axis=1) | (edges[:, 0] == edges[:, 1])
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidInputError(
                f"{kind}_edges, row {at}: {edges[at].tolist()}, expected two different nodes below {self.n_nodes}"
            )
        variance = np.asarray(getattr(self, f"{kind}_variance"), dtype=np.float64)
        if variance.ndim == 0:
            variance = np.full(len(edges), float(variance))
        if variance.shape != (len(edges),):
            raise InvalidInputError(f"{kind}_variance has shape {variance.shape} for {len(edges)} edges")
        bad = ~((variance > 0) & np.isfinite(variance))
        if bad.any():
            raise InvalidInputError(
                f"{kind}_variance, row {int(bad.argmax())}: {variance[bad][0]}, expected a finite number above 0"
            )
        return edges.astype(np.int64), variance

    @classmethod
    def of_tree(cls, tree: ResponseTree, hp_edges: Any = (), hp_variance: Any = 1.0) -> InducedBayesianNetwork:
        """The network of a tree of responses with these comparisons of its leaves."""
        count, edges, lengths = tree.edges()
        return cls(count, edges, lengths, hp_edges, hp_variance, tree.leaves)

    def with_comparisons(self, edges: Any, variance: Any) -> InducedBayesianNetwork:
        """The network with these comparisons in place of its own."""
        return InducedBayesianNetwork(self.n_nodes, self.ib_edges, self.ib_variance, edges, variance, self.responses)

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        edges = np.sort(np.concatenate([self.ib_edges, self.hp_edges]), axis=1)
        return edges, np.concatenate([self.ib_variance, self.hp_variance])

    @cached_property
    def _graph(self) -> sparse.csr_matrix:
        """Shortest of parallel edges; a sparse matrix would add them."""
        edges, variance = self._all
        order = np.lexsort((variance, edges[:, 1], edges[:, 0]))
        edges, variance = edges[order], variance[order]
        first = np.ones(len(edges), bool)
        first[1:] = (np.diff(edges, axis=0) != 0).any(axis=1)
        shape = (self.n_nodes, self.n_nodes)
        return sparse.csr_matrix((variance[first], (edges[first, 0], edges[first, 1])), shape=shape)

    @cached_property
    def _factor(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """Factors of the Laplacian without one node of each component, the place of each node in it, components."""
        edges, variance = self._all
        count, component = csgraph.connected_components(self._graph, directed=False)
        ground = np.full(count, self.n_nodes)
        np.minimum.at(ground, component, np.arange(self.n_nodes))
        free = np.ones(self.n_nodes, bool)
        free[ground] = False
        place = np.where(free, np.cumsum(free) - 1, -1)
        shape = (self.n_nodes, self.n_nodes)
        weights = sparse.coo_matrix((1 / variance, (edges[:, 0], edges[:, 1])), shape=shape).tocsr()
        weights = weights + weights.T
        laplacian = sparse.diags(np.asarray(weights.sum(axis=1)).ravel()) - weights
        inner = laplacian.tocsc()[free][:, free]
        return (splu(inner.tocsc(), permc_spec="MMD_AT_PLUS_A") if free.any() else None), place, component

    def inference_distance(self, i: Any, j: Any) -> Any:
        """Least sum of variances over paths, of nodes i and j that broadcast; infinite without a path."""
        first, second, shape = self._nodes(i, j)
        sources, place = np.unique(first, return_inverse=True)
        found = np.empty(len(first))
        for start in range(0, len(sources), SOURCES):
            rows = csgraph.dijkstra(self._graph, directed=False, indices=sources[start : start + SOURCES])
            here = np.flatnonzero((place >= start) & (place < start + SOURCES))
            found[here] = rows[place[here] - start, second[here]]
        return _shaped(found, shape)

    def posterior_variance(self, i: Any, j: Any) -> Any:
        """Variance of the difference of rewards given all comparisons, by all paths; infinite without a path."""
        first, second, shape = self._nodes(i, j)
        solver, place, component = self._factor
        found = np.where(component[first] == component[second], 0.0, np.inf)
        open_ = np.flatnonzero((component[first] == component[second]) & (first != second))
        for start in range(0, len(open_), SOURCES):
            at = open_[start : start + SOURCES]
            columns = np.arange(len(at))
            side = np.zeros((int((place >= 0).sum()), len(at)))
            for nodes, sign in ((first[at], 1.0), (second[at], -1.0)):
                inner = place[nodes] >= 0  # the grounded node has potential 0
                side[place[nodes][inner], columns[inner]] += sign
            found[at] = (side * solver.solve(side)).sum(axis=0)
        return _shaped(found, shape)

    def mean_distance(self, samples: Any, rng: np.random.Generator | None = None, *, posterior: bool = False) -> float:
        """Mean inference distance of responses drawn uniformly, independently of one another.

        Parameters
        ----------
        samples : int, or pairs (S, 2) of nodes
            Of a number, `rng` draws the pairs.
        rng : numpy generator
        posterior : bool
            The posterior variance in place of the distance.
        """
        if isinstance(samples, int | np.integer):
            if rng is None or samples < 1:
                raise InvalidInputError("mean_distance needs pairs, or a number of at least 1 and rng")
            samples = rng.integers(self.responses or self.n_nodes, size=(int(samples), 2))
        pairs = np.asarray(samples)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise InvalidInputError(f"samples must have shape (S, 2), got {pairs.shape}")
        of = self.posterior_variance if posterior else self.inference_distance
        return float(of(pairs[:, 0], pairs[:, 1]).mean())

    def _nodes(self, i: Any, j: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        first, second = np.broadcast_arrays(np.asarray(i), np.asarray(j))
        for nodes in (first, second):
            wrong = nodes.dtype.kind not in "iu" or (nodes.size and (nodes.min() < 0 or nodes.max() >= self.n_nodes))
            if wrong:
                raise InvalidInputError(f"nodes must be whole numbers from 0 to {self.n_nodes - 1}, got {nodes!r}")
        return first.reshape(-1), second.reshape(-1), first.shape


def logistic_variance(beta: float) -> float:
    """Variance of a strength label: ``pi^2 / (3 beta^2)``."""
    if not beta > 0:
        raise InvalidInputError(f"beta must be above 0, got {beta}")
    return math.pi**2 / (3 * beta**2)


def sample_strengths(rewards: Any, pairs: Any, beta: float, rng: np.random.Generator) -> np.ndarray:
    """Strengths ``delta ~ Logistic(r_A - r_B, 1 / beta)`` of pairs (n, 2); ``P(delta > 0) = sigma(beta Delta)``."""
    if not beta > 0:
        raise InvalidInputError(f"beta must be above 0, got {beta}")
    values, at = np.asarray(rewards, dtype=np.float64), np.asarray(pairs)
    return values[at[:, 0]] - values[at[:, 1]] + rng.logistic(size=len(at)) / beta


def rate_ratio(n: float, alpha: float = 0.0) -> float:
    """By how much trees are ahead of chains of n pairs in theory: ``(log n)^(1 - alpha) / log log n``."""
    if not n > math.e:
        raise InvalidInputError(f"n must be above e, got {n}")
    return math.log(n) ** (1 - alpha) / math.log(math.log(n))


def behaviour_distribution(rewards: Any, beta: float = 1.0) -> Any:
    """``p proportional to exp(beta r)`` over the last axis; what a constant adds to the rewards changes nothing."""
    if not beta > 0:
        raise InvalidInputError(f"beta must be above 0, got {beta}")
    return exponential_tilt(rewards, 1 / beta).weights


def autoencoding_gap(p_h: Any, p_lm: Any, kind: Literal["tv", "kl"] = "tv") -> Any:
    """How far the policy's distribution is from people's.

    Parameters
    ----------
    p_h, p_lm : (..., Y) arrays or tensors
        Probabilities that sum to 1.
    kind : "tv": half the sum of differences, in [0, 1]; "kl": ``KL(p_h || p_lm)`` in nats, infinite where the policy
        never writes what people would

    Returns
    -------
    float, or (...) where there are leading dimensions

    Raises
    ------
    InvalidInputError
        Shapes that differ, negative or NaN entries, sums that are not 1.
    """
    if kind not in ("tv", "kl"):
        raise UnknownNameError(f"unknown kind {kind!r}{nearest(str(kind), ('tv', 'kl'))}")
    first, second = (torch.as_tensor(p, dtype=torch.float64) for p in (p_h, p_lm))
    if first.shape != second.shape or not first.ndim:
        raise InvalidInputError(f"p_h has shape {tuple(first.shape)}, p_lm {tuple(second.shape)}: expected the same")
    for name, p in (("p_h", first), ("p_lm", second)):
        if not bool((p >= 0).all()) or not bool(((p.sum(-1) - 1).abs() < 1e-4).all()):
            raise InvalidInputError(f"{name} must be probabilities that sum to 1")
    if kind == "tv":
        gap = 0.5 * (first - second).abs().sum(-1)
    else:
        gap = (torch.xlogy(first, first) - torch.xlogy(first, second)).sum(-1).clamp(min=0)
    if not gap.ndim:
        return float(gap)
    return gap if isinstance(p_h, torch.Tensor) else gap.numpy()


def _shaped(values: np.ndarray, shape: tuple[int, ...]) -> Any:
    return values.reshape(shape) if shape else float(values[0])
