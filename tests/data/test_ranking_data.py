import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import ChatServer, completion
from polyreward.data.ranking import (
    GROUP_SIZES,
    candidate_pool,
    gold_scores,
    group_sizes,
    hybrid_scores,
    interval_groups,
    min_max,
    places,
    rank_fusion_labels,
)
from polyreward.data.ranking_teachers import TeacherLabels, read_order, read_score, training_groups
from polyreward.endpoints import ChatClient
from polyreward.errors import InvalidInputError
from polyreward.rewards.groupwise import group_prompt
from polyreward.rewards.ranking import GroupRankReward
from polyreward.rewards.score_answers import format_answer


def test_fusion_of_the_worked_example():
    first, second = [1, 3, 2, 4], [2, 1, 3, 4]
    expected = [-0.346574, -0.549306, -0.895880, -1.386294]
    np.testing.assert_allclose(rank_fusion_labels(first, second, 0.5), expected, atol=1e-6)
    np.testing.assert_allclose(rank_fusion_labels(second, first), expected, atol=1e-6)
    np.testing.assert_allclose(rank_fusion_labels(first, second, 1), -np.log(first))
    assert np.argsort(-rank_fusion_labels(first, second, 1)).tolist() == [0, 2, 1, 3]
    assert np.argsort(-rank_fusion_labels(first, second, 0)).tolist() == [1, 0, 2, 3]


@given(st.permutations(range(1, 8)), st.permutations(range(1, 8)), st.floats(0, 1))
def test_fusion_and_gold_equal_a_plain_loop(first, second, beta):
    fused = rank_fusion_labels([first, second], [second, first], beta)
    for place in range(7):
        expected = -beta * math.log(first[place]) - (1 - beta) * math.log(second[place])
        assert fused[0, place] == pytest.approx(expected)
    gold = gold_scores(fused)
    low, high = min(fused[0]), max(fused[0])
    assert gold[0] == pytest.approx([10 * (s - low) / (high - low) if high > low else 0 for s in fused[0]])
    if high - low > 1e-9:
        assert (gold.min(axis=1)[0], gold.max(axis=1)[0]) == (0, 10)


def test_gold_scores():
    fused = np.array([-0.346574, -0.549306, -0.895880, -1.386294])
    np.testing.assert_allclose(gold_scores(fused), [10, 8.05013, 4.71679, 0], atol=1e-5)
    assert gold_scores(fused[[2, 0, 3, 1]], "place") == pytest.approx([10 / 3, 10, 0, 20 / 3])
    assert gold_scores([5.0, 5.0, 5.0]).tolist() == [0, 0, 0]
    assert gold_scores([5.0]).tolist() == [0]
    assert gold_scores(np.zeros((0,))).tolist() == []
    assert gold_scores([3.0, 1.0, 3.0, 0.0], "place") == pytest.approx([10, 4, 10, 0])


def test_places_and_min_max():
    assert places([[5, 1, 5, 0]]).tolist() == [[1.5, 3, 1.5, 4]]
    assert min_max([[1, 3, 2], [7, 7, 7]]).tolist() == [[0, 1, 0.5], [0, 0, 0]]
    assert hybrid_scores([0, 5, 10], [3, 1, 2]).tolist() == [0.5, 0.25, 0.75]
    assert hybrid_scores([0, 5, 10], [3, 1, 2], 1.0).tolist() == [0, 0.5, 1]


def test_pool_of_the_paper():
    rng = np.random.default_rng(0)
    bm25, dense = rng.random((3, 1000)) * 30, rng.random((3, 1000))
    pool = candidate_pool(bm25, dense, rng)
    hybrid = hybrid_scores(bm25, dense)
    assert pool.shape == (3, 50)
    for own, scores in zip(pool, hybrid, strict=True):
        order = np.argsort(-scores).tolist()
        ranks = [order.index(document) for document in own]
        assert ranks[:10] == list(range(10))
        assert all(10 <= rank < 200 for rank in ranks[10:])
        assert ranks == sorted(ranks)
        assert len(set(ranks)) == 50
    assert not (candidate_pool(bm25, dense, rng) == pool).all()
    again = np.random.default_rng(0)
    again.random((3, 1000)), again.random((3, 1000))
    assert (candidate_pool(bm25, dense, again) == pool).all()


def test_every_rank_behind_the_head_is_drawn_equally_often():
    scores = np.arange(200.0)
    drawn = candidate_pool(np.tile(scores, (2000, 1)), np.tile(scores, (2000, 1)), np.random.default_rng(1))[:, 10:]
    counts = np.bincount(199 - drawn.ravel(), minlength=200)
    assert counts[:10].sum() == 0
    assert counts[10:].min() > 300  # 2000 * 40 / 190 = 421 each
    assert counts[10:].max() < 550


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 1), (7, 7), (30, 30), (55, 50)])
def test_few_documents_give_a_smaller_pool(count, size):
    rng = np.random.default_rng(0)
    pool = candidate_pool(rng.random(count), rng.random(count), rng)
    assert len(set(pool.tolist())) == len(pool) == size


@given(st.integers(1, 50), st.data())
def test_interval_groups_hold_one_document_of_each_interval(count, data):
    size = data.draw(st.integers(1, count))
    gold = np.random.default_rng(count).permutation(count) / count
    groups = interval_groups(gold, size, 4, np.random.default_rng(0), shuffle=False)
    order = np.argsort(-gold).tolist()
    edges = [place * count // size for place in range(size + 1)]
    for group in groups:
        ranks = [order.index(document) for document in group]
        assert all(low <= rank < high for rank, (low, high) in zip(ranks, itertools.pairwise(edges), strict=True))
    shuffled = interval_groups(gold, size, 4, np.random.default_rng(0))
    assert (np.sort(shuffled, axis=1) == np.sort(groups, axis=1)).all()


def test_group_sizes():
    sizes = group_sizes(4000, np.random.default_rng(0))
    assert {int(size) for size in sizes} == set(GROUP_SIZES)
    assert np.isin(sizes, [10, 20]).mean() == pytest.approx(0.8, abs=0.03)
    assert set(group_sizes(50, np.random.default_rng(0), 12)) == {5, 10}
    assert set(group_sizes(5, np.random.default_rng(0), shares={7: 1.0})) == {7}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_fusion_labels([1, 2], [1]), r"ranks of shape \(2,\) and \(1,\)"),
        (lambda: rank_fusion_labels([0, 1], [1, 2]), "rank_a must hold finite ranks from 1 up"),
        (lambda: rank_fusion_labels([1], [math.nan]), "rank_b must hold finite ranks"),
        (lambda: rank_fusion_labels([1], [1], 1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: gold_scores([1, math.nan]), "gold_scores: fused scores must be an array of finite numbers"),
        (lambda: gold_scores([1], by="rank"), "by must be 'score' or 'place', got 'rank'"),
        (lambda: hybrid_scores([1, 2], [1, math.inf]), "hybrid_scores: dense must be an array of finite numbers"),
        (lambda: hybrid_scores([1, 2], [1]), r"\(2,\) BM25 and \(1,\) dense"),
        (lambda: candidate_pool([1], [1], np.random.default_rng(0), head=0, tail=0), "head 0 and tail 0 must fit"),
        (lambda: candidate_pool([1], [1], np.random.default_rng(0), head=150, tail=60), "first 200 ranks"),
        (lambda: interval_groups([1, 2], 3, 1, np.random.default_rng(0)), "1 groups of 3 from a pool of 2 documents"),
        (lambda: interval_groups([1, math.nan], 1, 1, np.random.default_rng(0)), "gold must be numbers of one pool"),
        (lambda: group_sizes(1, np.random.default_rng(0), 3), "no size of .* fits 3 documents"),
        (lambda: TeacherLabels(list, list)(["q"], []), "1 queries and 0 pools"),
        (lambda: TeacherLabels(list, list)(["q", "r"], [["a"], []]), "the pool of query 1 is empty"),
        (lambda: TeacherLabels(lambda p: [], list)(["q"], [["a"]]), "the client gave 0 answers to 1 prompts"),
        (lambda: TeacherLabels(list, list, beta=2), "beta must lie in"),
        (lambda: TeacherLabels(list, list, by="x"), "by must be 'score' or 'place'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("reasoning <answer> 7.5 </answer>", 7.5),
        ("<answer>3</answer> no, <answer>4</answer>", 4),
        ("<answer>11</answer>", None),
        ("<answer>-1</answer>", None),
        ("<answer>nan</answer>", None),
        ("<answer>seven</answer>", None),
        ("7", None),
        ("", None),
        (None, None),
    ],
)
def test_reading_a_pointwise_answer(text, value):
    assert read_score(text) == value or (value is None and math.isnan(read_score(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>[3, 1, 2]</answer>", [2, 3, 1]),
        ("<answer>[1,2,3]</answer> or rather <answer>[2, 1, 3]</answer>", [2, 1, 3]),
        ("<answer>[3, 1]</answer>", None),
        ("<answer>[3, 1, 1]</answer>", None),
        ("<answer>[3, 1, 2, 4]</answer>", None),
        ("<answer>[3, 1, true]</answer>", None),
        ("<answer>3 > 1 > 2</answer>", None),
        ("<answer>" + "[" * 100_000 + "</answer>", None),
        ("[3, 1, 2]", None),
        (None, None),
    ],
)
def test_reading_a_listwise_answer(text, expected):
    found = read_order(text, 3)
    assert found.tolist() == expected if expected else np.isnan(found).all()


def stars(prompt):
    """A teacher in one function: counts the stars of passages, alone or in a list."""
    passages = re.findall(r"^\[\d+\] (.*)$", prompt, flags=re.MULTILINE)
    if passages:
        order = sorted(range(len(passages)), key=lambda place: -passages[place].count("*"))
        return f"<answer>{json.dumps([place + 1 for place in order])}</answer>"
    return f"<answer>{prompt.split('Passage: ')[1].split(chr(10))[0].count('*')}</answer>"


def test_teachers_label_pools_in_one_batch_each():
    calls = {"alone": [], "list": []}

    def ask(prompts, which):
        calls[which].append(len(prompts))
        return [stars(prompt) for prompt in prompts]

    teachers = TeacherLabels(functools.partial(ask, which="alone"), functools.partial(ask, which="list"))
    pools = [["a*", "b***", "c", "d**"], ["x**", "y*"]]
    first, second = teachers(["q", "r"], pools)
    assert calls == {"alone": [6], "list": [2]}
    assert first.pointwise.tolist() == [1, 3, 0, 2]
    assert first.listwise.tolist() == [3, 1, 4, 2]
    np.testing.assert_allclose(first.gold, gold_scores(-np.log([3, 1, 4, 2])))
    assert second.gold.tolist() == [10, 0]
    assert (first.failures, second.failures) == (0, 0)
    assert first.documents == tuple(pools[0])
    assert TeacherLabels(ask, ask)([], []) == []


def test_answers_that_cannot_be_read_are_recorded_and_the_batch_goes_on():
    def alone(prompts):
        return ["no idea" if "d**" in prompt else stars(prompt) for prompt in prompts]

    def listed(prompts):
        return [None if "x**" in prompt else stars(prompt) for prompt in prompts]

    first, second = TeacherLabels(alone, listed)(["q", "r"], [["a*", "b***", "c", "d**"], ["x**", "y*"]])
    np.testing.assert_allclose(first.gold, [*gold_scores(-np.log([2, 1, 3])), math.nan])
    assert (first.failures, second.failures) == (1, 1)
    assert np.isnan(second.gold).all()
    assert second.pointwise.tolist() == [2, 1]
    assert training_groups(second, 3, np.random.default_rng(0)) == []
    rows = training_groups(first, 5, np.random.default_rng(0))
    assert all("d**" not in row["documents"] and len(row["documents"]) == 3 for row in rows)


def test_tied_pointwise_scores_share_a_place():
    teachers = TeacherLabels(lambda prompts: ["<answer>5</answer>"] * len(prompts), lambda p: [stars(x) for x in p])
    (pool,) = teachers(["q"], [["a", "b**", "c*"]])
    np.testing.assert_allclose(pool.gold, gold_scores(rank_fusion_labels([2, 2, 2], [3, 1, 2])))


def test_long_passages_are_cut():
    seen = []

    def ask(prompts):
        seen.extend(prompts)
        return [stars(prompt) for prompt in prompts]

    (pool,) = TeacherLabels(ask, ask, max_characters=5)(["q"], [["0123456789", "*"]])
    assert all("01234" in prompt and "012345" not in prompt for prompt in (seen[0], seen[2]))
    assert pool.documents[0] == "0123456789"


def test_rows_train_with_the_reward():
    teachers = TeacherLabels(*[lambda prompts: [stars(prompt) for prompt in prompts]] * 2)
    (pool,) = teachers(["q"], [[f"{'*' * place} passage" for place in range(10)]])
    rows = training_groups(pool, 20, np.random.default_rng(0), size=5, prompt=group_prompt)
    assert len(rows) == 20
    for row in rows:
        assert row["prompt"] == group_prompt("q", row["documents"])
        assert [pool.gold[pool.documents.index(text)] for text in row["documents"]] == row["gold"]
        assert GroupRankReward()(None, [format_answer(row["gold"])], gold=[row["gold"]]) == pytest.approx([1.3])
    assert any(row["gold"] != sorted(row["gold"], reverse=True) for row in rows)  # the order tells nothing
    assert {len(row["documents"]) for row in training_groups(pool, 30, np.random.default_rng(0))} == {5, 10}
    assert {len(row["gold"]) for row in training_groups(pool, 3, np.random.default_rng(0), size=40)} == {10}


def test_teachers_over_a_real_server():
    with (
        ChatServer(lambda request: completion(stars(request["messages"][-1]["content"]))) as server,
        ChatClient(server.url, "tiny") as client,
    ):
        (pool,) = TeacherLabels(client.ask, client.ask)(["q"], [["a*", "b***", "c", "d**"]])
        assert pool.listwise.tolist() == [3, 1, 4, 2]
        assert len(server.requests) == 5
