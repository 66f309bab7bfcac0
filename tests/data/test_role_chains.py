import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.data.roles import (
    GLUE,
    RoleSamples,
    drop_extremes,
    majority_is_right,
    merge_chains,
    role_chains,
    role_probabilities,
    select_roles,
    self_consistency_filter,
)
from polyreward.errors import InvalidInputError
from polyreward.rewards.roles import RoleAnswersReward, role_answers


def plain_probabilities(relevance, embeddings, alpha):
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    scores = []
    for i, h in enumerate(embeddings):
        others = [1 - cosine(h, other) for j, other in enumerate(embeddings) if j != i]
        scores.append(relevance[i] + alpha * (sum(others) / len(others) if others else 0))
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def test_probabilities_of_roles_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    relevance, embeddings = rng.normal(size=(4, 5)), rng.normal(size=(4, 5, 3))
    found = role_probabilities(relevance, embeddings, 1.5)
    for row in range(4):
        assert found[row] == pytest.approx(plain_probabilities(relevance[row], embeddings[row].tolist(), 1.5))


def test_worked_probabilities():
    embeddings = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]  # distances (0 + 2) / 2 = 1, 1 and 2
    weights = np.exp([1.0, 1.0, 2.0])
    assert role_probabilities(np.zeros(3), embeddings) == pytest.approx(weights / weights.sum())
    assert role_probabilities(np.zeros(3), embeddings, 0.0) == pytest.approx([1 / 3] * 3)
    assert role_probabilities([3.0], [[1.0]]).tolist() == [1.0]
    assert role_probabilities([0.0, 0.0], [[0.0, 0.0], [1.0, 0.0]]).tolist() == [0.5, 0.5]


def test_the_softmax_maximises_expected_score_plus_entropy():
    rng = np.random.default_rng(1)
    relevance, embeddings = rng.normal(size=4), rng.normal(size=(4, 3))
    best = role_probabilities(relevance, embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    score = relevance + (1 - (unit @ unit.T).sum(1) / 3 + 1 / 3)

    def objective(p):
        return p @ score - (p * np.log(p)).sum()

    assert all(objective(p) <= objective(best) + 1e-12 for p in rng.dirichlet(np.ones(4), 500))


def test_selection_draws_without_replacement():
    rng = np.random.default_rng(2)
    relevance, embeddings = np.array([1.0, 0.0, -1.0, 0.5]), np.eye(4)
    chances = role_probabilities(relevance, embeddings)
    drawn = select_roles(np.tile(relevance, (20_000, 1)), np.tile(embeddings, (20_000, 1, 1)), 1.0, 2, rng)
    assert drawn.shape == (20_000, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for first, second in itertools.permutations(range(4), 2):
        expected = chances[first] * chances[second] / (1 - chances[first])
        assert ((drawn == [first, second]).all(1)).mean() == pytest.approx(expected, abs=0.012)
    assert select_roles(relevance, embeddings).tolist() == [0, 3, 1]
    one, other = (select_roles(relevance, embeddings, rng=np.random.default_rng(3)) for _ in range(2))
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [[1.0]]), r"embeddings \(..., R, d\)"),
        (([], np.zeros((0, 2))), r"relevance"),
        (([math.nan, 1.0], np.eye(2)), "must be finite"),
        (([1.0, 2.0], np.eye(2), 1.0, 3), "n must be between 1 and the 2 roles"),
        (([1.0, 2.0], np.eye(2), 1.0, 0), "n must be between"),
    ],
)
def test_selections_that_make_no_sense(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        select_roles(*arguments)


@pytest.mark.parametrize(
    ("answers", "first", "dropped"),
    [
        (["A", "B", "A"], [1, 0, 1], [1, 0, 1]),
        (["B", "A", "A", "B"], [1, 0, 0, 1], [0, 0, 0, 0]),
        (["A", None, "A", None, None], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]),
        ([None, None], [0, 0], [0, 0]),
        ([math.nan, "A"], [0, 1], [0, 1]),
        ([], [], []),
        ([1, 2, 2], [0, 1, 1], [0, 1, 1]),
        ([["A", "B", "A"], ["C", "C", "D"]], [[1, 0, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 0]]),
    ],
)
def test_self_consistency(answers, first, dropped):
    mask = self_consistency_filter(answers)
    assert mask.dtype == bool
    assert (mask * 1).tolist() == first
    assert (self_consistency_filter(answers, tie="drop") * 1).tolist() == dropped


@given(st.lists(st.sampled_from(["A", "B", "C", None]), max_size=9))
def test_self_consistency_equals_a_plain_loop(answers):
    votes = Counter(answer for answer in answers if answer is not None)
    best = max(votes.values(), default=0)
    winner = next((answer for answer in answers if answer is not None and votes[answer] == best), None)
    expected = [answer is not None and answer == winner for answer in answers]
    assert self_consistency_filter(answers).tolist() == expected
    assert self_consistency_filter(np.array(answers, dtype=object)).tolist() == expected


def test_self_consistency_of_arrays_and_errors():
    assert self_consistency_filter(np.array([[1, 2, 1], [3, 3, 4]])).tolist() == [
        [True, False, True],
        [True, True, False],
    ]
    assert self_consistency_filter(np.array([1.0, np.nan, np.nan])).tolist() == [True, False, False]
    with pytest.raises(InvalidInputError, match="pad the shorter ones"):
        self_consistency_filter([["A"], ["B", "C"]])
    with pytest.raises(InvalidInputError, match="tie must be"):
        self_consistency_filter(["A"], tie="none")
    with pytest.raises(InvalidInputError, match="list of labels"):
        self_consistency_filter("A")


def test_majority_of_independent_samples():
    assert majority_is_right(0.7, 3) == pytest.approx(0.784)
    assert majority_is_right(0.7, 1) == pytest.approx(0.7)
    assert majority_is_right(0.7, 2) == pytest.approx(0.7)
    for theta, k in itertools.product((0.55, 0.7, 0.9), range(1, 10)):
        by_enumeration = sum(
            math.prod(theta if s else 1 - theta for s in samples)
            * (0.5 if 2 * sum(samples) == k else 2 * sum(samples) > k)
            for samples in itertools.product((0, 1), repeat=k)
        )
        assert majority_is_right(theta, k) == pytest.approx(by_enumeration)
        assert 1 - majority_is_right(theta, k) <= math.exp(-2 * k * (theta - 0.5) ** 2)


def test_the_shortest_and_longest_tenth_go():
    lengths = np.random.default_rng(0).permutation(20)
    kept = drop_extremes(lengths)
    assert sorted(lengths[kept]) == list(range(2, 18))
    assert drop_extremes([5] * 9).all()
    assert drop_extremes([5] * 10).tolist() == [False, *[True] * 8, False]
    assert drop_extremes([], 0.1).tolist() == []
    assert drop_extremes(range(10), 0.3).sum() == 4
    for arguments in (([1, 2], 0.5), ([1, math.nan],), ([[1]],)):
        with pytest.raises(InvalidInputError, match="drop_extremes needs"):
            drop_extremes(*arguments)


CHAINS = {"nurse": "<think> n", "pilot": "<think> p", "cook": "<think> c"}


def test_merging():
    orders = set()
    for seed in range(20):
        merged = merge_chains(
            CHAINS, {"nurse": "A", "pilot": "B", "cook": "A"}, "divergent", np.random.default_rng(seed)
        )
        order = list(merged.answers)
        orders.add(tuple(order))
        body = merged.text.split(GLUE.format(role=order[1]))
        assert body[0].strip() == CHAINS[order[0]]
        assert body[1].split(GLUE.format(role=order[2]))[0].strip() == CHAINS[order[1]]
        assert merged.answer is None
        assert role_answers(merged.text, order) == {"nurse": "a", "pilot": "b", "cook": "a"}
    assert len(orders) == 6


def test_convergent_merging_has_the_majority_as_final_answer():
    rng = np.random.default_rng(0)
    merged = merge_chains(CHAINS, {"nurse": "A", "pilot": "B", "cook": "A"}, "convergent", rng)
    assert merged.answer == "A"
    assert merged.text.endswith("Final answer: A")
    assert RoleAnswersReward(mode="convergent")(None, [merged.text], answer=["A"]) == [1]
    assert merge_chains(CHAINS, {"nurse": "A", "pilot": "B", "cook": "C"}, "convergent", rng) is None


def test_merges_that_make_no_sense():
    for chains, answers, mode in (
        ({}, {}, "divergent"),
        (CHAINS, {"nurse": "A"}, "divergent"),
        (CHAINS, CHAINS, "both"),
    ):
        with pytest.raises(InvalidInputError, match=r"expected a chain|mode must be"):
            merge_chains(chains, answers, mode, np.random.default_rng(0))


def question(words, second=("B", "B", "B")):
    chains = {role: [f"{role} right " + "w " * words, f"{role} odd", " "] for role in CHAINS}
    return RoleSamples(chains, {"nurse": ["A", "C", "A"], "pilot": list(second), "cook": ["A", "D", "A"]})


def test_the_whole_way():
    rng = np.random.default_rng(0)
    merged = role_chains([question(i) for i in range(10)], "divergent", rng)
    assert len(merged) == 30 - 6
    assert {chain.question for chain in merged} <= set(range(10))
    for chain in merged:
        assert set(chain.answers) == set(CHAINS)
        assert "nurse odd" not in chain.text
        assert "cook odd" not in chain.text
    convergent = role_chains([question(i) for i in range(10)], "convergent", rng, share=0.0)
    assert {chain.answer for chain in convergent} == {"A"}
    assert len(convergent) == 30
    nobody = RoleSamples({"nurse": ["x"], "pilot": ["y"]}, {"nurse": ["A"], "pilot": [None]})
    assert role_chains([nobody], "divergent", rng) == []
    assert len(role_chains([nobody], "divergent", rng, roles=1, share=0.0)) == 3
    with pytest.raises(InvalidInputError, match="question 0, role 'nurse': 0 answers of 1 chains"):
        role_chains([RoleSamples({"nurse": ["x"]}, {})], "divergent", rng)
