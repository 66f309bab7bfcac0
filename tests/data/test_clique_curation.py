import itertools
import random
from difflib import SequenceMatcher

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.clique_curation import (
    _common,
    _improve,
    _places,
    long_enough,
    maximum_clique_curation,
    maximum_independent_set,
)
from polyreward.errors import InvalidInputError


def matrix(seed, n, share):
    """A random symmetric similarity of the numbers 0..n-1, as a function."""
    values = np.random.default_rng(seed).random((n, n))
    table = np.where(np.triu(values, 1) + np.triu(values, 1).T < share, 0.9, 0.1)
    return lambda a, b: float(table[a, b])


def largest_by_brute_force(texts, similarity, threshold):
    for size in range(len(texts), 0, -1):
        for chosen in itertools.combinations(texts, size):
            if all(similarity(a, b) < threshold for a, b in itertools.combinations(chosen, 2)):
                return size
    return 0


def pairwise_below(texts, kept, similarity, threshold):
    return all(similarity(texts[i], texts[j]) < threshold for i, j in itertools.combinations(kept, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0, 1), st.randoms())
def test_size_equals_brute_force_in_every_order(seed, n, share, shuffler):
    similarity, texts = matrix(seed, n, share), list(range(n))
    kept = maximum_clique_curation(texts, similarity=similarity)
    assert kept.exact
    assert kept.pairwise
    assert kept.passes == 1
    assert pairwise_below(texts, kept, similarity, 0.5)
    assert len(kept) == largest_by_brute_force(texts, similarity, 0.5)
    shuffler.shuffle(texts)
    assert len(maximum_clique_curation(texts, similarity=similarity)) == len(kept)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_size_equals_networkx_on_sixty_texts(seed, share):
    n, similarity = 60, matrix(seed, 60, share)
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pair for pair in itertools.combinations(range(n), 2) if similarity(*pair) < 0.5)
    kept = maximum_clique_curation(list(range(n)), similarity=similarity)
    assert kept.exact
    assert len(kept) == nx.max_weight_clique(graph, weight=None)[1]


def test_path_of_three():
    pairs = {(0, 1): 0.0, (1, 2): 0.0, (0, 2): 1.0}
    kept = maximum_clique_curation([0, 1, 2], similarity=lambda a, b: pairs[min(a, b), max(a, b)])
    assert len(kept) == 2
    assert 1 in kept


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab\n ", max_size=8), max_size=9), st.sampled_from([0.3, 0.5, 0.8]))
def test_characters_agree_with_a_plain_loop_over_difflib(texts, threshold):
    def similarity(a, b):
        return max(SequenceMatcher(None, a, b).ratio(), SequenceMatcher(None, b, a).ratio())

    kept = maximum_clique_curation(texts, threshold)
    assert pairwise_below(texts, kept, similarity, threshold)
    assert len(kept) == largest_by_brute_force(texts, similarity, threshold)
    by_line = maximum_clique_curation(texts, threshold, similarity="lines")
    split = [text.splitlines() for text in texts]
    assert pairwise_below(split, by_line, similarity, threshold)
    assert len(by_line) == largest_by_brute_force(split, similarity, threshold)


def test_a_ratio_that_depends_on_the_order_counts_at_its_larger_value():
    assert SequenceMatcher(None, "tide", "diet").ratio() == 0.25
    assert SequenceMatcher(None, "diet", "tide").ratio() == 0.5
    assert len(maximum_clique_curation(["tide", "diet"])) == len(maximum_clique_curation(["diet", "tide"])) == 1


def test_a_similarity_of_exactly_the_threshold_is_too_much():
    assert len(maximum_clique_curation([0, 1], 0.5, similarity=lambda a, b: 0.5)) == 1
    assert len(maximum_clique_curation([0, 1], 0.5, similarity=lambda a, b: 0.4999)) == 2
    assert SequenceMatcher(None, "ab", "ac").ratio() == 0.5
    assert len(maximum_clique_curation(["ab", "ac"])) == 1
    assert len(maximum_clique_curation(["x\na", "x\nb"], similarity="lines")) == 1


def test_thresholds_at_the_ends():
    texts = ["a", "a", "b", "", ""]
    assert maximum_clique_curation(texts, 1.01) == [0, 1, 2, 3, 4]
    assert len(maximum_clique_curation(texts, 0)) == 1
    assert len(maximum_clique_curation([str(i) for i in range(10)], 0, block=4, passes=1)) == 3
    assert len(maximum_clique_curation([str(i) for i in range(10)], 0, block=4, passes=10)) == 1
    assert maximum_clique_curation([]) == []
    assert maximum_clique_curation([]).exact


def test_exactly_one_copy_of_a_duplicate_survives():
    texts = ["import os\nprint(os.name)\n", "for i in range(3):\n    y = i\n", "{[(<>)]}"]
    corpus = [*texts, *texts, texts[0]]
    for unit in ("characters", "lines"):
        kept = maximum_clique_curation(corpus, similarity=unit)
        assert sorted(corpus[i] for i in kept) == sorted(texts)
        assert list(kept) == sorted(kept)
        assert isinstance(kept, list)


def test_many_copies_are_known_to_be_solved():
    kept = maximum_clique_curation(["x = 1"] * 150 + ["{[(<>)]}"] * 150)
    assert len(kept) == 2
    assert kept.exact


def test_no_text_of_the_last_block_is_lost():
    kept = maximum_clique_curation(list(range(401)), similarity=lambda a, b: 0.0)
    assert kept == list(range(401))
    assert not kept.pairwise
    assert maximum_clique_curation(list(range(400)), similarity=lambda a, b: 0.0).pairwise


def test_copies_in_different_blocks_meet_in_later_passes():
    texts = list(range(20)) * 2

    def same(a, b):
        return float(a == b)

    assert len(maximum_clique_curation(texts, block=20, passes=1, similarity=same)) == 40
    later = maximum_clique_curation(texts, block=20, passes=30, similarity=same, seed=1)
    assert sorted(texts[i] for i in later) == list(range(20))
    assert later.pairwise
    assert later.passes < 30
    assert later == maximum_clique_curation(texts, block=20, passes=30, similarity=same, seed=np.random.default_rng(1))


def test_a_large_component_is_marked_as_not_exact():
    similarity = matrix(0, 90, 0.15)
    kept = maximum_clique_curation(list(range(90)), similarity=similarity)
    assert not kept.exact
    assert pairwise_below(list(range(90)), kept, similarity, 0.5)
    better = maximum_clique_curation(list(range(90)), similarity=similarity, exact_limit=90)
    assert better.exact
    assert len(better) - 3 <= len(kept) <= len(better)


def test_search_that_runs_out_of_time_keeps_what_it_found():
    similarity = matrix(1, 60, 0.2)
    kept = maximum_clique_curation(list(range(60)), similarity=similarity, time_limit=1e-9)
    assert not kept.exact
    assert pairwise_below(list(range(60)), kept, similarity, 0.5)
    assert len(kept) >= 8


def test_small_components_of_a_large_block_are_exact():
    kept = maximum_clique_curation(list(range(300)), similarity=lambda a, b: float(a // 5 == b // 5))
    assert len(kept) == 60
    assert kept.exact


def test_local_search_improves_on_greedy():
    # Two hubs that hide three leaves each.
    edges = [(0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7), (0, 1)]
    neighbours = [0] * 8
    for a, b in edges:
        neighbours[a] |= 1 << b
        neighbours[b] |= 1 << a
    assert _improve([0, 5, 6, 7], 0b11111111, neighbours) == [2, 3, 4, 5, 6, 7]
    assert maximum_independent_set(neighbours, exact_limit=0) == ([2, 3, 4, 5, 6, 7], False)
    assert maximum_independent_set(neighbours) == ([2, 3, 4, 5, 6, 7], True)


def test_prefilter():
    long, short = "x = 1  # and so on\n" * 10, "x = 1\n" * 9
    assert long_enough([long, short, long, "\n" * 10, long]) == [0, 2, 4]
    assert long_enough([long, short, long, long], keep_every=2) == [0, 3]
    assert long_enough([short], lines=9) == [0]
    with pytest.raises(InvalidInputError, match="keep_every"):
        long_enough([], keep_every=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["a", 1]}, "text 1 is int"),
        ({"texts": "abc"}, "single str"),
        ({"texts": ["a"], "block": 0}, "block must be a whole number >= 1, got 0"),
        ({"texts": ["a"], "block": 2.5}, "block"),
        ({"texts": ["a"], "passes": 0}, "passes"),
        ({"texts": ["a"], "threshold": float("nan")}, "threshold is NaN"),
        ({"texts": ["a"], "similarity": "words"}, "'words'"),
        ({"texts": ["a"], "time_limit": 0.0}, "time_limit"),
        ({"texts": ["a", "b"], "similarity": lambda a, b: float("nan")}, "texts 0 and 1 is NaN"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InvalidInputError, match=message):
        maximum_clique_curation(**options)


def test_edited_copies_of_one_function_are_near_duplicates():
    body = [f"    total += values[{i}] * weights[{i}]" for i in range(12)]
    original = "\n".join(["def weigh(values, weights):", "    total = 0", *body, "    return total"])
    rng = random.Random(0)
    copies = [original.replace(str(rng.randrange(12)), str(rng.randrange(12))) for _ in range(4)]
    for unit in ("characters", "lines"):
        assert len(maximum_clique_curation([original, *copies], similarity=unit)) == 1


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_longest_common_subsequence_equals_the_textbook_table(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        longer = max(table[i, j + 1], table[i + 1, j])
        table[i + 1, j + 1] = table[i, j] + 1 if first[i] == second[j] else longer
    assert _common(_places(first), len(first), second) == table[-1, -1]
    matched = sum(block.size for block in SequenceMatcher(None, first, second).get_matching_blocks())
    assert matched <= table[-1, -1]
