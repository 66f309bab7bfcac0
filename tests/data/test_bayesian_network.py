import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.bayesian_network import (
    InducedBayesianNetwork,
    ResponseTree,
    autoencoding_gap,
    behaviour_distribution,
    logistic_variance,
    rate_ratio,
    sample_strengths,
    structural_function,
)
from polyreward.data.response_tree import EXACT
from polyreward.errors import InvalidInputError, UnknownNameError

A, B, C, D = range(4)
TWO_CLUSTERS = np.array([[A, B], [C, D], [A, C], [A, D], [B, C], [B, D]])
FOUR = InducedBayesianNetwork(4, TWO_CLUSTERS, [1, 1, 4, 4, 4, 4], [[A, C]], [0.1])


def test_distances_of_the_worked_example():
    assert FOUR.inference_distance(A, C) == pytest.approx(0.1)
    assert FOUR.inference_distance(B, D) == pytest.approx(2.1)
    assert FOUR.inference_distance(A, B) == pytest.approx(1.0)
    assert FOUR.with_comparisons((), 1.0).inference_distance(B, D) == pytest.approx(4.0)
    grid = FOUR.inference_distance(np.arange(4)[:, None], np.arange(4))
    assert grid.shape == (4, 4)
    assert (FOUR.posterior_variance(np.arange(4)[:, None], np.arange(4)) <= grid + 1e-12).all()


def test_an_edge_and_a_comparison_in_parallel():
    network = InducedBayesianNetwork(2, [[0, 1]], 4.0, [[1, 0]], 0.1)
    assert network.posterior_variance(0, 1) == pytest.approx(0.097561, abs=1e-6)
    assert network.inference_distance(0, 1) == pytest.approx(0.1)
    twice = InducedBayesianNetwork(2, [[0, 1]], 4.0, [[1, 0], [0, 1]], [0.1, 0.1])
    assert twice.posterior_variance(0, 1) == pytest.approx(1 / (0.25 + 20))
    assert twice.inference_distance(0, 1) == pytest.approx(0.1)


def graphs(nodes, seed, share=0.5):
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.combinations(range(nodes), 2)))
    kept = every[rng.random(len(every)) < share]
    compared = np.sort(rng.permuted(np.tile(np.arange(nodes), (3, 1)), axis=1)[:, :2])
    return InducedBayesianNetwork(nodes, kept, rng.uniform(0.1, 3, len(kept)), compared, rng.uniform(0.1, 1, 3))


def floyd_warshall(network):
    d = np.full((network.n_nodes,) * 2, math.inf)
    np.fill_diagonal(d, 0)
    edges = [
        *zip(network.ib_edges, network.ib_variance, strict=True),
        *zip(network.hp_edges, network.hp_variance, strict=True),
    ]
    for (i, j), v in edges:
        d[i, j] = d[j, i] = min(d[i, j], v)
    for k, i, j in itertools.product(range(network.n_nodes), repeat=3):
        d[i, j] = min(d[i, j], d[i, k] + d[k, j])
    return d, edges


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_distances_and_variances_against_plain_python(nodes, seed):
    network = graphs(nodes, seed)
    at = np.arange(nodes)
    found = network.inference_distance(at[:, None], at)
    slow, edges = floyd_warshall(network)
    assert np.allclose(found, slow)
    assert np.allclose(found, found.T)
    assert (found[:, None, :] <= found[:, :, None] + found[None, :, :] + 1e-9).all()
    laplacian = np.zeros((nodes, nodes))
    for (i, j), v in edges:
        laplacian[[i, j, i, j], [i, j, j, i]] += np.array([1, 1, -1, -1]) / v
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    resistance = np.add.outer(np.diag(inverse), np.diag(inverse)) - 2 * inverse
    exact = network.posterior_variance(at[:, None], at)
    joined = np.isfinite(slow)
    assert np.allclose(exact[joined], resistance[joined], atol=1e-8)
    assert np.isinf(exact[~joined]).all()
    assert (exact <= found + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 7), st.integers(0, 10_000))
def test_a_comparison_more_never_makes_anything_less_certain(nodes, seed):
    more = graphs(nodes, seed, share=0.7)
    less = more.with_comparisons(more.hp_edges[:2], more.hp_variance[:2])
    at = np.arange(nodes)
    assert (more.inference_distance(at[:, None], at) <= less.inference_distance(at[:, None], at) + 1e-12).all()
    assert (more.posterior_variance(at[:, None], at) <= less.posterior_variance(at[:, None], at) + 1e-9).all()


def test_the_posterior_is_that_of_the_normal_model():
    rng = np.random.default_rng(0)
    network = graphs(5, 1, share=1.0)
    edges = np.concatenate([network.ib_edges, network.hp_edges])
    variance = np.concatenate([network.ib_variance, network.hp_variance])
    design = np.zeros((len(edges), 5))
    design[np.arange(len(edges)), edges[:, 0]], design[np.arange(len(edges)), edges[:, 1]] = 1, -1
    precision = design.T @ (design / variance[:, None]) + 1e-9 * np.eye(5)
    draws = rng.multivariate_normal(np.zeros(5), np.linalg.inv(precision), 200_000)
    assert np.var(draws[:, 0] - draws[:, 3]) == pytest.approx(network.posterior_variance(0, 3), rel=0.02)


def test_without_comparisons_the_distance_is_that_of_the_tree():
    tree = ResponseTree(3, 4, 0.6)
    network = InducedBayesianNetwork.of_tree(tree)
    i, j = np.random.default_rng(0).integers(tree.leaves, size=(2, 60))
    assert np.allclose(network.inference_distance(i, j), tree.distance(i, j))
    assert np.allclose(network.posterior_variance(i, j), tree.distance(i, j))
    assert network.n_nodes == 1 + 3 + 9 + 27 + 81
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        common = next((h for h in range(4) if a // 3 ** (3 - h) != b // 3 ** (3 - h)), 4)
        assert tree.common_depth(a, b) == common
        assert tree.distance(a, b) == pytest.approx(0 if common == 4 else 3 ** (-0.6 * common))


def test_noiseless_comparisons_that_join_all_leaves_leave_nothing_unknown():
    tree = ResponseTree(2, 4, 0.3)
    circle = np.stack([np.arange(16), (np.arange(16) + 5) % 16], axis=1)
    for noise in (1e-3, 1e-6, 1e-9):
        network = InducedBayesianNetwork.of_tree(tree, circle, noise)
        assert network.mean_distance(100, np.random.default_rng(0)) <= 16 * noise
        assert network.mean_distance(100, np.random.default_rng(0), posterior=True) <= 16 * noise


def test_mean_distance_draws_responses_and_no_hubs():
    tree = ResponseTree(2, 3, 0.5)
    network = InducedBayesianNetwork.of_tree(tree, [[0, 7]], 0.01)
    every = np.array(list(itertools.product(range(8), repeat=2)))
    exact = network.mean_distance(every)
    drawn = network.mean_distance(20_000, np.random.default_rng(0))
    assert drawn == pytest.approx(exact, rel=0.02)
    assert network.mean_distance(every, posterior=True) <= exact
    with pytest.raises(InvalidInputError, match="and rng"):
        network.mean_distance(10)
    with pytest.raises(InvalidInputError, match=r"shape \(S, 2\)"):
        network.mean_distance(np.zeros((0, 2), int))


def test_parts_that_nothing_joins_are_infinitely_far():
    network = InducedBayesianNetwork(4, (), 1.0, [[0, 1], [2, 3]], 0.5)
    assert network.inference_distance(0, 2) == math.inf
    assert network.posterior_variance([0, 0, 3, 2], [2, 1, 3, 3]).tolist() == pytest.approx([math.inf, 0.5, 0.0, 0.5])
    alone = InducedBayesianNetwork(1, ())
    assert alone.inference_distance(0, 0) == 0
    assert alone.posterior_variance(0, 0) == 0
    assert InducedBayesianNetwork(2, ()).posterior_variance(0, 1) == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hp_variance": 0.0}, "hp_variance, row 0: 0.0, expected a finite number above 0"),
        ({"hp_variance": -1.0}, "above 0"),
        ({"ib_variance": [1.0, math.nan]}, "ib_variance, row 1: nan"),
        ({"ib_variance": math.inf}, "finite"),
        ({"ib_variance": [1.0]}, r"shape \(1,\) for 2 edges"),
        ({"hp_edges": [[0, 3]]}, r"hp_edges, row 0: \[0, 3\], expected two different nodes below 3"),
        ({"hp_edges": [[-1, 0]]}, "below 3"),
        ({"ib_edges": [[0, 1], [1, 1]]}, r"ib_edges, row 1: \[1, 1\]"),
        ({"ib_edges": [[0, 1, 2]]}, r"\(E, 2\)"),
        ({"ib_edges": [[0.5, 1.0]]}, "whole numbers"),
        ({"n_nodes": 0}, "n_nodes"),
        ({"responses": 4}, "responses must be from 1 to 3"),
    ],
)
def test_wrong_networks(options, message):
    usual = {"n_nodes": 3, "ib_edges": [[0, 1], [1, 2]], "ib_variance": 1.0, "hp_edges": [[0, 2]], "hp_variance": 0.1}
    with pytest.raises(ValueError, match=message):
        InducedBayesianNetwork(**{**usual, **options})


def test_wrong_nodes_and_trees():
    with pytest.raises(InvalidInputError, match="from 0 to 3"):
        FOUR.inference_distance(0, 4)
    with pytest.raises(InvalidInputError, match="whole numbers"):
        FOUR.posterior_variance(0.5, 1)
    with pytest.raises(InvalidInputError, match="alpha above 0"):
        ResponseTree(2, 3, 0.0)


def test_strengths_and_rates():
    assert logistic_variance(1.0) == pytest.approx(3.289868, abs=1e-6)
    assert logistic_variance(2.0) == pytest.approx(3.289868 / 4, abs=1e-6)
    drawn = sample_strengths([1.0, 0.0], np.tile([[0, 1]], (200_000, 1)), 2.0, np.random.default_rng(0))
    assert (drawn > 0).mean() == pytest.approx(0.880797, abs=0.003)
    assert drawn.var() == pytest.approx(logistic_variance(2.0), rel=0.02)
    assert drawn.mean() == pytest.approx(1.0, abs=0.01)
    for n, ratio in ((1e3, 3.574), (1e4, 4.148), (1e6, 5.261)):
        assert rate_ratio(n) == pytest.approx(ratio, abs=1e-3)
    assert rate_ratio(1e3, 0.5) == pytest.approx(1.360, abs=1e-3)
    for call in (lambda: logistic_variance(0.0), lambda: rate_ratio(2), lambda: behaviour_distribution([0.0], -1.0),
                 lambda: sample_strengths([0.0], [[0, 0]], 0.0, np.random.default_rng(0))):  # fmt: skip
        with pytest.raises(InvalidInputError):
            call()


def slow_structural(matrix, clusters):
    """All assignments to clusters."""
    count, best = len(matrix), math.inf
    for labels in itertools.product(range(clusters), repeat=count):
        value = 0.0
        for c in range(clusters):
            own = [i for i in range(count) if labels[i] == c]
            if not count / (2 * clusters) <= len(own) <= 2 * count / clusters:
                break
            pairs = [matrix[i][j] for i, j in itertools.combinations(own, 2)]
            value = max(value, sum(pairs) / len(pairs) if pairs else 0.0)
        else:
            best = min(best, value)
    return best


def test_structural_function_of_two_clusters():
    matrix = np.array([[0, 1, 4, 4], [1, 0, 4, 4], [4, 4, 0, 1], [4, 4, 1, 0]], float)
    assert structural_function(matrix, 1) == pytest.approx((2 * 1 + 4 * 4) / 6)
    assert structural_function(matrix, 2) == 1.0
    assert structural_function(matrix, 4) == 0.0
    assert structural_function(matrix, 3) == slow_structural(matrix, 3)


def test_no_cluster_of_the_structural_function_is_too_small():
    at = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 9.0])
    matrix = np.abs(at[:, None] - at)
    # the far response must not stay alone: at least 6 / 4 in each of two clusters
    assert structural_function(matrix, 2) == pytest.approx((0.1 + 0.2 + 0.1 + 8.8 + 8.7 + 8.6) / 6)
    assert structural_function(matrix, 2) == pytest.approx(slow_structural(matrix, 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 1000))
def test_structural_function_against_all_assignments(count, clusters, seed):
    if clusters > count:
        return
    points = np.random.default_rng(seed).normal(size=(count, 2))
    matrix = np.linalg.norm(points[:, None] - points, axis=2)
    assert structural_function(matrix, clusters) == pytest.approx(slow_structural(matrix, clusters))


def test_structural_function_of_trees():
    tree = ResponseTree(2, 5, 0.5)
    at = np.arange(32)
    matrix = tree.distance(at[:, None], at)
    small = ResponseTree(2, 3, 0.5)
    near = small.distance(np.arange(8)[:, None], np.arange(8))
    for h in range(6):
        inside = [tree.distance(0, j) for j in range(1, 2 ** (5 - h))]
        expected = sum(inside) / len(inside) if inside else 0.0
        assert structural_function(tree, 2**h) == pytest.approx(expected)
        assert structural_function(matrix, 2**h) == pytest.approx(expected)  # cut from an order of more than EXACT
        if h <= 3:
            assert structural_function(near, 2**h) == pytest.approx(structural_function(small, 2**h))
    assert len(matrix) > EXACT >= len(near)
    for clusters in (3, 5, 7):
        blocks = np.arange(32) * clusters // 32
        slow = max(
            np.mean([matrix[i, j] for i, j in itertools.combinations(np.flatnonzero(blocks == c), 2)])
            for c in range(clusters)
        )
        assert structural_function(tree, clusters) == pytest.approx(slow)
        assert structural_function(matrix, clusters) <= slow + 1e-12
    decay = [structural_function(ResponseTree(4, 6, 0.3), 4**h) for h in range(5)]
    assert np.diff(np.log(decay)) / math.log(4) == pytest.approx([-0.3] * 4, abs=0.03)


def test_wrong_structures():
    matrix = np.array([[0, 1.0], [1.0, 0]])
    for wrong in (0, 3, 1.5):
        with pytest.raises(InvalidInputError, match="M must be a whole number from 1 to the 2"):
            structural_function(matrix, wrong)
    for bad in (np.ones((2, 2)), np.array([[0, 1.0], [2.0, 0]]), np.array([[0, -1.0], [-1.0, 0]])):
        with pytest.raises(InvalidInputError, match="symmetric, at least 0, and 0 on the diagonal"):
            structural_function(bad, 1)
    with pytest.raises(InvalidInputError, match="finite matrix"):
        structural_function(np.array([[0, math.nan], [math.nan, 0]]), 1)


def test_a_constant_added_to_the_rewards_closes_the_gap():
    reward = np.array([0.3, -1.0, 2.0])
    people = behaviour_distribution(reward, 2.0)
    assert people == pytest.approx(np.exp(2 * reward) / np.exp(2 * reward).sum())
    assert autoencoding_gap(people, behaviour_distribution(reward + 7.0, 2.0)) == pytest.approx(0, abs=1e-12)
    assert autoencoding_gap(people, behaviour_distribution(reward + 7.0, 2.0), "kl") == pytest.approx(0, abs=1e-12)


def test_gaps_by_hand():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]
    assert autoencoding_gap(p, q) == pytest.approx(0.5)
    assert autoencoding_gap(p, q, "kl") == pytest.approx(math.log(2))
    assert autoencoding_gap(q, p, "kl") == math.inf
    both = autoencoding_gap(np.array([p, q]), np.array([q, q]))
    assert both.tolist() == pytest.approx([0.5, 0.0])
    tensor = autoencoding_gap(torch.tensor([p, q]), torch.tensor([q, q]))
    assert isinstance(tensor, torch.Tensor)
    with pytest.raises(UnknownNameError, match="did you mean 'kl'"):
        autoencoding_gap(p, q, "k")
    with pytest.raises(InvalidInputError, match="sum to 1"):
        autoencoding_gap([0.5, 0.6], [0.5, 0.5])
    with pytest.raises(InvalidInputError, match="p_lm must be probabilities"):
        autoencoding_gap([0.5, 0.5], [1.5, -0.5])
    with pytest.raises(InvalidInputError, match="expected the same"):
        autoencoding_gap(p, [1.0])
