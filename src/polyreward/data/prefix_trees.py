"""Responses that share prefixes, and pairs of them: the topology of a preference data set.

A prefix tree is sampled segment by segment: each text so far gets several continuations, and its leaves are complete
responses. Pairs of leaves of one tree share their beginning and the same leaf meets several others, at no more labels
than pairs of independent responses (a chain). In theory that makes a reward model more certain; see
`polyreward.data.bayesian_network`, which also measures where it does not.

With a reward that adds up over few positions trees lose to chains at the same number of pairs: few prefixes cover less.
What trees need is diverse responses and little noise. Equal pairs are not equal cost, nor equally many responses:
`SampledPairs.report` counts all three.

Paper: Reward Generalization in RLHF: A Topological Perspective (arXiv 2402.10184). Segments of equal length, pairs with
a uniform depth of the common prefix, and leaves used equally often are this library's reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

PolicyStep = Callable[[Any, np.ndarray, int, np.random.Generator], np.ndarray]
TOPOLOGIES, PAIRINGS = ("chain", "tree"), ("uniform", "cyclic", "lca_uniform")


class DuplicateResponsesWarning(UserWarning):
    """Samples that came twice were merged or dropped; they cannot be compared with themselves."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A tree of segments (arXiv 2402.10184).

    Attributes
    ----------
    parent : int64 (V,)
        -1 at the root, which is node 0; parents come before their children.
    tokens : (V, L)
        Segment of each node; -1 at the root.
    leaves : int64 (S,)
        Nodes that end complete responses, subtree by subtree.
    prompt : anything
    duplicates : int
        Sampled responses that came again and were merged.

    Raises
    ------
    InvalidInputError
        Fewer than two different leaves, leaves of different depth, shapes that do not fit.
    """

    parent: np.ndarray
    tokens: np.ndarray
    leaves: np.ndarray
    prompt: Any = None
    duplicates: int = 0

    def __post_init__(self) -> None:
        parent, tokens, leaves = np.asarray(self.parent), np.asarray(self.tokens), np.asarray(self.leaves)
        count = len(parent)
        if tokens.ndim != 2 or len(tokens) != count or parent.shape != (count,) or leaves.ndim != 1:
            raise InvalidInputError(
                "a tree needs parent (V,), tokens (V, L), leaves (S,); got shapes "
                f"{parent.shape}, {tokens.shape}, {leaves.shape}"
            )
        if not count or parent[0] != -1 or (parent[1:] < 0).any() or (parent[1:] >= np.arange(1, count)).any():
            raise InvalidInputError("node 0 is the root with parent -1, and parents come before their children")
        if len(leaves) < 2 or len(np.unique(leaves)) != len(leaves) or (leaves < 0).any() or (leaves >= count).any():
            raise InvalidInputError(
                f"a tree needs at least two different leaves to compare, found {len(np.unique(leaves))}; "
                "sample with a higher temperature, or leave the prompt out"
            )
        for name, value in (("parent", parent), ("tokens", tokens), ("leaves", leaves)):
            object.__setattr__(self, name, value)
        if len(np.unique(self.node_depth[leaves])) != 1:
            raise InvalidInputError("the leaves of a tree must have one depth")

    @classmethod
    def sample(
        cls,
        policy_step: PolicyStep,
        prompt: Any,
        depth: int,
        branching: int | Sequence[int],
        segment_len: int,
        rng: np.random.Generator,
    ) -> PrefixTree:
        """Sample a tree from a policy.

        Parameters
        ----------
        policy_step : function of (prompt, prefixes (F, t), segment_len, rng) -> (F, segment_len)
            One continuation for each prefix; a prefix comes as often as it is continued, next to itself.
        depth : int >= 1
            D, segments of a response.
        branching : int >= 1, or one for each depth
            B; 2 to 4 at depths of 3 to 4 are usual.
        segment_len : int >= 1
            L, tokens.
        rng : numpy generator, passed on

        Returns
        -------
        PrefixTree
            Equal continuations of a prefix are one node, which is continued as often as it came; up to B^D leaves, with
            a `DuplicateResponsesWarning` where there are fewer.
        """
        widths = [branching] * depth if isinstance(branching, int | np.integer) else list(branching)
        for name, value in (("depth", depth), ("segment_len", segment_len), *(("branching", b) for b in widths)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if len(widths) != depth:
            raise InvalidInputError(f"branching has {len(widths)} entries for a depth of {depth}")
        parents, rows, total = [np.array([-1])], [np.full((1, segment_len), -1)], 1
        # a node may be in the frontier several times: as often as the policy wrote it
        frontier, prefixes = np.zeros(1, np.int64), np.zeros((1, 0), np.int64)
        for width in widths:
            frontier, prefixes = np.repeat(frontier, width), np.repeat(prefixes, width, axis=0)
            segment = np.asarray(policy_step(prompt, prefixes, segment_len, rng))
            if segment.shape != (len(frontier), segment_len):
                raise InvalidInputError(
                    f"policy_step returned shape {segment.shape} for {len(frontier)} prefixes, expected "
                    f"({len(frontier)}, {segment_len})"
                )
            keys, place = np.unique(np.column_stack([frontier, segment]), axis=0, return_inverse=True)
            parents.append(keys[:, 0].astype(np.int64))
            rows.append(keys[:, 1:])
            place = place.reshape(-1)
            order = np.argsort(place, kind="stable")  # equal nodes next to one another, subtree by subtree
            frontier = (total + place)[order]
            prefixes = np.concatenate([prefixes, segment], axis=1)[order]
            total += len(keys)
        leaves = np.unique(frontier)
        duplicates = len(frontier) - len(leaves)
        if duplicates and len(leaves) > 1:
            warnings.warn(
                DuplicateResponsesWarning(f"{duplicates} of {len(frontier)} sampled responses came again"), stacklevel=2
            )
        return cls(np.concatenate(parents), np.concatenate(rows), leaves, prompt, duplicates)

    def __len__(self) -> int:
        return len(self.leaves)

    @cached_property
    def node_depth(self) -> np.ndarray:
        """Segments from the root to each node, int64 (V,)."""
        depth, node = np.zeros(len(self.parent), np.int64), self.parent.copy()
        while (node >= 0).any():
            depth += node >= 0
            node = np.where(node >= 0, self.parent[node], -1)
        return depth

    @property
    def depth(self) -> int:
        """Segments of a response, D."""
        return int(self.node_depth[self.leaves[0]])

    @cached_property
    def paths(self) -> np.ndarray:
        """Node of each leaf at depths 1 to D, int64 (S, D)."""
        steps = [self.leaves]
        for _ in range(self.depth - 1):
            steps.append(self.parent[steps[-1]])
        return np.stack(steps[::-1], axis=1)

    @cached_property
    def responses(self) -> np.ndarray:
        """Tokens of the complete responses, (S, D * L)."""
        return self.tokens[self.paths].reshape(len(self), -1)

    def lca_depth(self, i: Any, j: Any) -> Any:
        """Segments that leaves i and j share, 0 to D; arrays broadcast."""
        first, second = np.broadcast_arrays(np.asarray(i), np.asarray(j))
        for at in (first, second):
            if at.size and not ((at >= 0) & (at < len(self))).all():
                raise InvalidInputError(f"leaf {int(at.max())} of a tree of {len(self)} leaves")
        depth = (self.paths[first] == self.paths[second]).sum(axis=-1)
        return int(depth) if depth.ndim == 0 else depth


@dataclass(frozen=True, eq=False)
class SampledPairs:
    """Pairs to label.

    Attributes
    ----------
    pairs : int64 (n, 2)
        Places of both responses among those of their tree (or prompt).
    tree : int64 (n,)
        Which tree, or prompt.
    lca_depth : int64 (n,)
        Segments that both share; for a chain, tokens that happen to be the same at the start.
    tokens_shared, cost : int64 (n,)
        Tokens of the common prefix, and tokens of both responses after it, which is what is read to label the pair.
    dropped : int
        Pairs that would have compared a response with a copy of itself.
    """

    pairs: np.ndarray
    tree: np.ndarray
    lca_depth: np.ndarray
    tokens_shared: np.ndarray
    cost: np.ndarray
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def report(self) -> dict[str, int]:
        """Number of pairs, of different responses in them, and of tokens to read."""
        used = np.unique(np.column_stack([np.repeat(self.tree, 2), self.pairs.reshape(-1)]), axis=0)
        return {"pairs": len(self), "responses": len(used), "tokens": int(self.cost.sum())}


@dataclass(frozen=True)
class PairSampler:
    """Which responses are compared (arXiv 2402.10184).

    Parameters
    ----------
    topology : "chain" (independent responses, each in one pair) or "tree" (leaves of one tree)
    pairing : for trees
        "uniform": any two leaves; most share only the root. "cyclic": each leaf as often, in a random circle.
        "lca_uniform": every depth of the common prefix that the tree has is as frequent.
    n : int
        Pairs in all; trees (or prompts) get the same number, the first ones one more where it does not divide.
    """

    topology: Literal["chain", "tree"] = "tree"
    pairing: Literal["uniform", "cyclic", "lca_uniform"] = "lca_uniform"
    n: int = 1

    def __post_init__(self) -> None:
        for name, known in (("topology", TOPOLOGIES), ("pairing", PAIRINGS)):
            if getattr(self, name) not in known:
                raise UnknownNameError(
                    f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}"
                )
        if not isinstance(self.n, int | np.integer) or self.n < 0:
            raise InvalidInputError(f"n must be a whole number from 0, got {self.n!r}")

    def __call__(self, source: Any, rng: np.random.Generator) -> SampledPairs:
        """Draw pairs.

        Parameters
        ----------
        source : PrefixTree or list of them; for a chain responses (R, T), one array a prompt in a list, or a tree
            Rows are independent responses; a prompt with n pairs needs 2n of them.
        rng : numpy generator

        Raises
        ------
        InvalidInputError
            No source, one of the wrong kind, or too few responses for a chain.
        """
        sources = list(source) if isinstance(source, list | tuple) else [source]
        if not sources:
            raise InvalidInputError("PairSampler needs at least one tree or prompt")
        parts = []
        for number, each in enumerate(sources):
            count = self.n // len(sources) + (number < self.n % len(sources))
            if self.topology == "tree" and not isinstance(each, PrefixTree):
                raise InvalidInputError(f"tree {number} is a {type(each).__name__}, expected a PrefixTree")
            pairs, shared, lca, length = (
                self._tree(each, count, rng)
                if self.topology == "tree"
                else self._chain(each.responses if isinstance(each, PrefixTree) else each, count, number, rng)
            )
            parts.append((pairs, np.full(len(pairs), number), lca, shared, 2 * (length - shared)))
        pairs, place, lca, shared, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        dropped = self.n - len(pairs)
        if dropped:
            warnings.warn(
                DuplicateResponsesWarning(f"dropped {dropped} of {self.n} pairs of a response and its copy"),
                stacklevel=2,
            )
        return SampledPairs(pairs, place, lca, shared, cost, dropped)

    def _tree(
        self, tree: PrefixTree, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        draw = {"uniform": _uniform, "cyclic": _cyclic, "lca_uniform": _lca_uniform}[self.pairing]
        pairs = draw(tree, count, rng)
        lca = tree.lca_depth(pairs[:, 0], pairs[:, 1])
        width = tree.tokens.shape[1]
        return pairs, lca * width, lca, tree.depth * width

    def _chain(
        self, responses: Any, count: int, number: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        responses = np.asarray(responses)
        if responses.ndim != 2 or len(responses) < 2 * count:
            raise InvalidInputError(
                f"prompt {number}: a chain of {count} pairs needs responses (R, T) with R of at least {2 * count}, got "
                f"shape {responses.shape}"
            )
        pairs = rng.permutation(len(responses))[: 2 * count].reshape(count, 2)
        same = responses[pairs[:, 0]] == responses[pairs[:, 1]]
        shared = np.cumprod(same, axis=1, dtype=np.int64).sum(axis=1)
        kept = ~same.all(axis=1)
        return pairs[kept], shared[kept], shared[kept], responses.shape[1]


def _uniform(tree: PrefixTree, count: int, rng: np.random.Generator) -> np.ndarray:
    first, second = rng.integers(len(tree), size=count), rng.integers(len(tree) - 1, size=count)
    return np.stack([first, second + (second >= first)], axis=1)


def _cyclic(tree: PrefixTree, count: int, rng: np.random.Generator) -> np.ndarray:
    rounds = -(-count // len(tree))
    circles = rng.permuted(np.tile(np.arange(len(tree)), (rounds, 1)), axis=1)
    return np.stack([circles, np.roll(circles, -1, axis=1)], axis=2).reshape(-1, 2)[:count]


def _lca_uniform(tree: PrefixTree, count: int, rng: np.random.Generator) -> np.ndarray:
    size = len(tree)
    # leaves below a node are neighbours: where each leaf's subtree begins and ends, at depths 0 to D
    nodes = np.column_stack([np.zeros(size, np.int64), tree.paths])
    order = np.lexsort(nodes.T[::-1])
    changes = np.diff(nodes[order], axis=0) != 0
    number = np.concatenate([np.zeros((1, nodes.shape[1]), np.int64), changes.cumsum(axis=0)])
    begins = np.concatenate([np.ones((1, nodes.shape[1]), bool), changes])
    starts = np.maximum.accumulate(np.where(begins, np.arange(size)[:, None], 0), axis=0)
    sizes = np.stack([np.bincount(column)[column] for column in number.T], axis=1)
    partners = sizes[:, :-1] - sizes[:, 1:]  # leaves with which a leaf shares exactly h segments
    depths = np.flatnonzero(partners.sum(axis=0) > 0)
    depth = depths[rng.integers(len(depths), size=count)]
    reach = partners.cumsum(axis=0)
    pick = rng.integers(reach[-1, depth])
    first = np.zeros(count, np.int64)
    for h in depths.tolist():
        first[depth == h] = np.searchsorted(reach[:, h], pick[depth == h], side="right")
    offset = rng.integers(partners[first, depth])
    second = starts[first, depth] + offset
    inner = starts[first, depth + 1]
    second += np.where(second >= inner, sizes[first, depth + 1], 0)
    return np.asarray(order[np.stack([first, second], axis=1)])
