import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.prefix_trees import DuplicateResponsesWarning, PairSampler, PrefixTree
from polyreward.errors import InvalidInputError, UnknownNameError


def distinct(prompt, prefixes, length, rng):
    """Continuations that are all different: the first token is the row."""
    tokens = rng.integers(100, size=(len(prefixes), length))
    tokens[:, 0] = np.arange(len(prefixes))
    return tokens


def few(prompt, prefixes, length, rng):
    return rng.integers(2, size=(len(prefixes), length))


def tree_of(depth=3, branching=2, length=2, step=distinct, seed=0):
    return PrefixTree.sample(step, "p", depth, branching, length, np.random.default_rng(seed))


def shared(a, b, length):
    """Leading segments that two responses have in common, by hand."""
    count = 0
    while (
        count * length < len(a)
        and (a[count * length : (count + 1) * length] == b[count * length : (count + 1) * length]).all()
    ):
        count += 1
    return count


@pytest.mark.parametrize(("depth", "branching"), [(1, 2), (3, 2), (2, 4), (4, 3)])
def test_distinct_continuations_give_all_leaves(depth, branching):
    tree = tree_of(depth, branching)
    assert len(tree) == branching**depth
    assert len(tree.parent) == sum(branching**d for d in range(depth + 1))
    assert tree.depth == depth
    assert tree.parent[0] == -1
    assert (tree.tokens[0] == -1).all()
    assert tree.responses.shape == (branching**depth, 2 * depth)
    assert tree.duplicates == 0


@pytest.mark.filterwarnings("ignore::polyreward.data.prefix_trees.DuplicateResponsesWarning")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(1, 2), st.booleans(), st.integers(0, 200))
def test_leaves_at_depth_h_share_exactly_h_segments(depth, branching, length, many, seed):
    try:
        tree = tree_of(depth, branching, length, distinct if many else few, seed)
    except InvalidInputError:
        return
    for i, j in itertools.product(range(len(tree)), repeat=2):
        assert tree.lca_depth(i, j) == shared(tree.responses[i], tree.responses[j], length)
    assert len(np.unique(tree.responses, axis=0)) == len(tree)
    assert len(tree) + tree.duplicates == branching**depth
    grid = tree.lca_depth(np.arange(len(tree))[:, None], np.arange(len(tree)))
    assert (grid == grid.T).all()
    assert (np.diag(grid) == depth).all()


def test_the_policy_sees_prompt_and_prefix_and_equal_continuations_are_one_node():
    seen = []

    def step(prompt, prefixes, length, rng):
        seen.append((prompt, prefixes.tolist(), length))
        return np.array([[7], [7], [8]]) if len(prefixes) == 3 else np.arange(len(prefixes))[:, None]

    with pytest.warns(DuplicateResponsesWarning) as caught:
        tree = PrefixTree.sample(lambda *a: np.array([[1], [1]]) if a[1].shape[1] == 0 else few(*a), "p", 3, 2, 1,
                                 np.random.default_rng(0))  # fmt: skip
    assert len(caught) == 1
    assert len(tree) + tree.duplicates == 8
    tree = PrefixTree.sample(step, "q", 2, [3, 2], 1, np.random.default_rng(0))
    assert seen == [("q", [[], [], []], 1), ("q", [[7]] * 4 + [[8]] * 2, 1)]
    assert tree.tokens[:, 0].tolist() == [-1, 7, 8, 0, 1, 2, 3, 4, 5]  # 7 came twice, and has four continuations
    assert tree.parent.tolist() == [-1, 0, 0, 1, 1, 1, 1, 2, 2]
    assert tree.responses.tolist() == [[7, 0], [7, 1], [7, 2], [7, 3], [8, 4], [8, 5]]


def test_the_same_generator_gives_the_same_tree():
    assert np.array_equal(tree_of(seed=3).tokens, tree_of(seed=3).tokens)
    assert not np.array_equal(tree_of(seed=3).tokens, tree_of(seed=4).tokens)


def test_wrong_trees():
    with pytest.raises(ValueError, match="at least two different leaves"):
        tree_of(step=lambda p, x, n, r: np.zeros((len(x), n), int))  # a greedy policy
    with pytest.raises(InvalidInputError, match="depth must be a whole number"):
        tree_of(depth=0)
    with pytest.raises(InvalidInputError, match="branching must be"):
        tree_of(branching=0)
    with pytest.raises(InvalidInputError, match="branching has 2 entries for a depth of 3"):
        tree_of(branching=[2, 2])
    with pytest.raises(InvalidInputError, match=r"returned shape \(2, 1\) for 2 prefixes"):
        tree_of(step=lambda p, x, n, r: np.zeros((len(x), 1), int))
    with pytest.raises(InvalidInputError, match="parents come before"):
        PrefixTree(np.array([-1, 2, 0]), np.zeros((3, 1)), np.array([1, 2]))
    with pytest.raises(InvalidInputError, match="one depth"):
        PrefixTree(np.array([-1, 0, 0, 1]), np.zeros((4, 1)), np.array([2, 3]))
    with pytest.raises(InvalidInputError, match="got shapes"):
        PrefixTree(np.array([-1, 0]), np.zeros((3, 1)), np.array([1]))
    with pytest.raises(InvalidInputError, match="leaf 9 of a tree of 8"):
        tree_of().lca_depth(0, 9)


@pytest.mark.parametrize("pairing", ["uniform", "cyclic", "lca_uniform"])
def test_pairs_of_trees(pairing):
    trees = [tree_of(3, 3, seed=s) for s in range(3)]
    found = PairSampler("tree", pairing, 100)(trees, np.random.default_rng(0))
    assert found.pairs.shape == (100, 2)
    assert (found.pairs[:, 0] != found.pairs[:, 1]).all()
    assert np.bincount(found.tree).tolist() == [34, 33, 33]
    for (i, j), number, depth, tokens, cost in zip(
        found.pairs, found.tree, found.lca_depth, found.tokens_shared, found.cost, strict=True
    ):
        assert depth == trees[number].lca_depth(i, j)
        assert tokens == 2 * depth
        assert cost == 2 * (6 - tokens)
    assert found.report()["pairs"] == 100
    assert found.report()["tokens"] == found.cost.sum()
    assert found.dropped == 0
    again = PairSampler("tree", pairing, 100)(trees, np.random.default_rng(0))
    assert np.array_equal(again.pairs, found.pairs)


def test_lca_uniform_takes_every_depth_and_every_pair_as_often():
    tree = tree_of(3, 2)
    found = PairSampler("tree", "lca_uniform", 30_000)(tree, np.random.default_rng(0))
    assert np.bincount(found.lca_depth) / 30_000 == pytest.approx([1 / 3] * 3, abs=0.01)
    # of all tokens before the fork, (D - 1) / 2D are shared
    assert found.tokens_shared.mean() / 6 == pytest.approx(1 / 3, abs=0.01)
    counts = np.zeros((8, 8))
    np.add.at(counts, (found.pairs[:, 0], found.pairs[:, 1]), 1)
    for depth, pairs in ((0, 32), (1, 16), (2, 8)):
        own = counts[tree.lca_depth(np.arange(8)[:, None], np.arange(8)) == depth]
        assert len(own) == pairs
        assert own / 10_000 == pytest.approx(np.full(pairs, 1 / pairs), abs=0.01)


def test_lca_uniform_of_an_uneven_tree():
    #        root: 1 -> (3, 4, 5), 2 -> (6)
    tree = PrefixTree(np.array([-1, 0, 0, 1, 1, 1, 2]), np.arange(7)[:, None], np.array([3, 6, 4, 5]))
    found = PairSampler("tree", "lca_uniform", 6000)(tree, np.random.default_rng(1))
    assert np.bincount(found.lca_depth) / 6000 == pytest.approx([0.5, 0.5], abs=0.03)
    assert ((found.pairs == 1).any(axis=1) == (found.lca_depth == 0)).all()
    one_fork = PrefixTree(np.array([-1, 0, 1, 1]), np.arange(4)[:, None], np.array([2, 3]))
    assert (PairSampler("tree", "lca_uniform", 5)(one_fork, np.random.default_rng(0)).lca_depth == 1).all()


def test_uniform_pairs_share_only_the_root_most_of_the_time():
    tree = tree_of(4, 4)
    found = PairSampler("tree", "uniform", 20_000)(tree, np.random.default_rng(0))
    expected = 3 / 4 * 256 / 255
    assert (found.lca_depth == 0).mean() == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 20_000) * 2)


def test_cyclic_pairs_use_each_leaf_as_often():
    tree = tree_of(3, 2)
    found = PairSampler("tree", "cyclic", 24)(tree, np.random.default_rng(0))
    assert np.bincount(found.pairs.reshape(-1)).tolist() == [6] * 8
    part = PairSampler("tree", "cyclic", 5)(tree, np.random.default_rng(0))
    assert np.bincount(part.pairs.reshape(-1), minlength=8).max() <= 2


def test_a_chain_uses_each_response_once_and_drops_copies():
    responses = np.arange(20).reshape(10, 2)
    found = PairSampler("chain", n=5)(responses, np.random.default_rng(0))
    assert sorted(found.pairs.reshape(-1).tolist()) == list(range(10))
    assert found.tokens_shared.tolist() == [0] * 5
    assert found.cost.tolist() == [4] * 5
    assert found.report() == {"pairs": 5, "responses": 10, "tokens": 20}
    same = np.array([[1, 2], [1, 2], [1, 3], [1, 3]])
    with pytest.warns(DuplicateResponsesWarning, match="pairs of a response and its copy"):
        kept = PairSampler("chain", n=4)([same, same + 5], np.random.default_rng(1))
    assert len(kept) + kept.dropped == 4
    assert kept.dropped > 0
    assert (kept.tokens_shared == 1).all()
    assert len(PairSampler("chain", n=0)(responses, np.random.default_rng(0))) == 0
    leaves = PairSampler("chain", n=4)(tree_of(), np.random.default_rng(0))
    assert sorted(leaves.pairs.reshape(-1).tolist()) == list(range(8))


def test_wrong_samplers():
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownNameError, match="did you mean 'chain'"):
        PairSampler("chains")
    with pytest.raises(UnknownNameError, match="did you mean 'lca_uniform'"):
        PairSampler("tree", "lca-uniform")
    with pytest.raises(InvalidInputError, match="n must be"):
        PairSampler(n=-1)
    with pytest.raises(InvalidInputError, match="at least one tree"):
        PairSampler()([], rng)
    with pytest.raises(InvalidInputError, match="tree 0 is a ndarray"):
        PairSampler()(np.zeros((4, 2)), rng)
    with pytest.raises(InvalidInputError, match="R of at least 6"):
        PairSampler("chain", n=3)(np.zeros((4, 2)), rng)
