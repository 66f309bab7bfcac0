import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.rewards.tool_matching import ToolCall, multiset_jaccard, score_tool_calls

GOLD = [
    ToolCall("Get_Price", {"loc_1": "ORD", "loc_2": "SFO"}),
    ToolCall("Get_Price", {"loc_1": "ORD", "loc_2": "LAX"}),
]
FIRST = [GOLD[0], ToolCall("Get_Price", {"loc_2": "LAX"})]
SECOND = [ToolCall("Get_Flight", {"from": "ORD", "to": "SFO"}), GOLD[1]]


def total(gold, predicted, *options):
    return score_tool_calls(gold, predicted, -3, 3, *options).total


def test_worked_example_of_the_paper():
    score = score_tool_calls(GOLD, FIRST)
    assert (score.names, score.keys, score.values, score.largest, score.equal) == (1, 1.5, 3, 7, False)
    assert score.total == pytest.approx(6 * 5.5 / 7 - 3)
    assert score.total == pytest.approx(1.7143, abs=1e-4)
    assert total(GOLD, FIRST, "fine", "optimal") == score.total
    assert total(GOLD, SECOND) == pytest.approx(-1.0)
    assert total(GOLD, SECOND, "fine", "optimal") == pytest.approx(-0.142857, abs=1e-6)
    assert total(GOLD, FIRST, "intermediate") == pytest.approx(1.0)
    assert total(GOLD, SECOND, "intermediate") == pytest.approx(-1 / 3)
    assert total(GOLD, FIRST, "coarse") == total(GOLD, SECOND, "coarse") == -3


def test_refined_turns_every_jaccard_into_equality_of_lists():
    assert total(GOLD, FIRST, "refined") == pytest.approx(6 * (1 + 3 + 1) / 7 - 3)
    swapped = [ToolCall("Get_Price", {"loc_2": "SFO", "loc_1": "ORD"}), GOLD[1]]
    assert total(GOLD, swapped, "refined") == 3  # equal as objects: nothing is graded
    partial = [ToolCall("Get_Price", {"loc_2": "SFO", "loc_1": "XXX"}), GOLD[1]]
    assert total(GOLD, partial, "refined") == pytest.approx(6 * (1 + 2) / 7 - 3)  # greed: gold 1 takes call 2
    assert total(GOLD, partial, "refined", "optimal") == pytest.approx(6 * (1 + 1 + 3) / 7 - 3)
    assert total(GOLD, partial, "fine") == pytest.approx(6 * (1 + 1 + 1 + 3) / 7 - 3)


def test_no_prediction_earns_the_lower_limit():
    for granularity in ("fine", "refined", "intermediate", "coarse"):
        assert total(GOLD, [], granularity) == -3
        assert total(GOLD, [], granularity, "optimal") == -3


def test_an_unrelated_call_costs_only_in_the_names():
    gold = [ToolCall("f", {"a": 1, "b": 2, "c": 3})]
    score = score_tool_calls(gold, [*gold, ToolCall("g", {})], 0, 1)
    assert (score.names, score.keys + score.values, score.largest) == (0.5, 1 + 3, 5)
    assert score.total == pytest.approx((0.5 + 1 + 3) / 5)


def test_gold_in_another_order_is_not_equal_and_earns_the_maximum():
    score = score_tool_calls(GOLD, GOLD[::-1])
    assert (score.equal, score.total) == (False, 3)
    assert total(GOLD, GOLD[::-1], "coarse") == -3


def test_calls_without_parameters_score_one_of_one():
    gold = [ToolCall("f"), ToolCall("g")]
    score = score_tool_calls(gold, [ToolCall("f"), ToolCall("h")], 0, 1)
    assert (score.names, score.keys, score.values, score.largest) == (pytest.approx(1 / 3), 1, 0, 3)


@pytest.mark.parametrize(
    ("given", "right"),
    [(1.0, 1), (True, 1), ("1", 0), (None, 0), (2, 0)],
)
def test_values_are_equal_as_parsed_json(given, right):
    score = score_tool_calls([ToolCall("f", {"a": 1})], [ToolCall("f", {"a": given})])
    assert score.values == right


def test_nested_values_compare_whole():
    gold = [ToolCall("f", {"a": {"x": [1, 2], "y": 1}})]
    assert total(gold, [ToolCall("f", {"a": {"y": 1, "x": [1, 2]}})]) == 3
    assert total(gold, [ToolCall("f", {"a": {"y": 1, "x": [2, 1]}})]) < 3


def test_unknown_options():
    with pytest.raises(InvalidInputError, match="granularity must be one of"):
        score_tool_calls(GOLD, GOLD, granularity="medium")
    with pytest.raises(InvalidInputError, match="matching must be one of"):
        score_tool_calls(GOLD, GOLD, matching="best")


letters = st.lists(st.sampled_from("abc"), max_size=6)
calls = st.lists(
    st.builds(ToolCall, st.sampled_from("fg"), st.dictionaries(st.sampled_from("abc"), st.integers(0, 1), max_size=3)),
    max_size=4,
)


@given(letters, letters)
def test_multiset_jaccard_equals_counting(first, second):
    a, b = Counter(first), Counter(second)
    shared = sum(min(a[x], b[x]) for x in "abc")
    largest = sum(max(a[x], b[x]) for x in "abc")
    assert multiset_jaccard(first, second) == pytest.approx(shared / largest if largest else 1.0)


def points(gold, predicted, granularity):
    """m(g, p) of the paper, written out."""
    if gold.name != predicted.name:
        return 0.0
    if granularity == "intermediate":
        return float(gold == predicted)
    first, second = list(gold.parameters), list(predicted.parameters)
    if granularity == "refined":
        agree = float(first == second)
    else:
        union = set(first) | set(second)
        agree = len(set(first) & set(second)) / len(union) if union else 1.0
    return agree + sum(predicted.parameters.get(k, "none") == v for k, v in gold.parameters.items())


def by_permutations(gold, predicted, granularity):
    width = max(len(gold), len(predicted))
    padded = [*predicted, *[None] * (width - len(predicted))]
    return max(
        sum(points(g, p, granularity) for g, p in zip(gold, order, strict=False) if p is not None)
        for order in itertools.permutations(padded)
    )


def by_greed(gold, predicted, granularity):
    used, score = set(), 0.0
    for g in gold:
        best, at = 0.0, None
        for i, p in enumerate(predicted):
            if i not in used and points(g, p, granularity) > best:
                best, at = points(g, p, granularity), i
        if at is not None:
            used.add(at)
            score += best
    return score


@given(calls, calls, st.sampled_from(["fine", "refined", "intermediate"]))
def test_matching_equals_brute_force(gold, predicted, granularity):
    for matching, search in (("optimal", by_permutations), ("greedy", by_greed)):
        score = score_tool_calls(gold, predicted, -3, 3, granularity, matching)
        assert score.keys + score.values == pytest.approx(search(gold, predicted, granularity))


@given(calls, calls, st.randoms())
def test_bounds_identity_order_and_optimality(gold, predicted, random):
    shuffled = random.sample(predicted, len(predicted))
    for granularity in ("fine", "refined", "intermediate", "coarse"):
        greedy = total(gold, predicted, granularity)
        optimal = total(gold, predicted, granularity, "optimal")
        assert -3 <= greedy <= optimal + 1e-12 <= 3 + 1e-9
        assert total(gold, gold, granularity) == 3
    assert total(gold, shuffled, "fine", "optimal") == pytest.approx(total(gold, predicted, "fine", "optimal"))
