import functools
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import ChatServer, Status, completion
from polyreward.endpoints import ChatClient
from polyreward.errors import InvalidInputError
from polyreward.rewards.groupwise import (
    RELEASED_SAMPLING,
    GroupPartitioner,
    GroupwiseReranker,
    PromptedScorer,
    SlidingWindowReranker,
    UnparsedGroupWarning,
    fuse,
    group_prompt,
    released,
)
from polyreward.rewards.score_answers import format_answer


class Counting:
    """Scores documents, which are numbers, by a function of the group; remembers the groups."""

    def __init__(self, function=lambda group: group):
        self.function, self.seen = function, []

    def __call__(self, query, documents):
        self.seen.append(list(documents))
        return self.function(np.asarray(documents, dtype=float))


@given(st.integers(0, 60), st.integers(1, 25), st.sampled_from(["random", "sorted"]), st.integers(0, 5))
def test_groups_are_disjoint_and_complete(count, size, strategy, seed):
    groups = GroupPartitioner(size, strategy, seed)(count)
    assert len(groups) == math.ceil(count / size)
    assert sorted(np.concatenate([*groups, np.zeros(0, dtype=int)]).tolist()) == list(range(count))
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    if groups:
        assert len(groups[-1]) == (count % size or size)  # never filled up


def test_seeds_and_passes():
    partition = GroupPartitioner(10, seed=3)
    assert partition.order(40).tolist() == GroupPartitioner(10, seed=3).order(40).tolist()
    assert partition.order(40, 0).tolist() != partition.order(40, 1).tolist()
    assert partition.order(40).tolist() != GroupPartitioner(10, seed=4).order(40).tolist()
    generator = GroupPartitioner(10, seed=np.random.default_rng(0))
    assert generator.order(40).tolist() != generator.order(40).tolist()


def test_sorted_keeps_neighbours_together():
    assert [group.tolist() for group in GroupPartitioner(2, "sorted")(5)] == [[0, 1], [2, 3], [4]]
    retriever = [0.1, 0.9, 0.5, 0.9, 0.2]
    assert [g.tolist() for g in GroupPartitioner(2, "sorted")(5, retriever=retriever)] == [[1, 3], [2, 4], [0]]


def test_a_hundred_thousand_candidates():
    groups = GroupPartitioner(20)(100_001)
    assert len(groups) == 5001
    assert len(groups[-1]) == 1

    class Many:
        def score_many(self, query, groups):
            return [group / 10 for group in groups]

    documents = np.arange(100_001.0)
    assert (GroupwiseReranker(Many(), 20)(None, documents) == documents / 10).all()


def test_groups_of_one_are_pointwise():
    scorer = Counting(lambda group: group - group.mean() + 1)
    found = GroupwiseReranker(scorer, 1).explain("q", [5.0, 1.0, 3.0])
    assert found.scores.tolist() == [1, 1, 1]  # nothing to compare with
    assert sorted(scorer.seen) == [[1.0], [3.0], [5.0]]
    assert (found.calls, found.rounds) == (3, 1)


def test_one_group_and_one_pass_is_one_call():
    scorer = Counting()
    found = GroupwiseReranker(scorer, 40).explain("q", list(range(40)))
    assert (found.calls, len(scorer.seen)) == (1, 1)
    assert found.scores.tolist() == list(range(40))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3))
def test_passes_of_a_scorer_that_ignores_the_group_equal_one(count, size, passes, seed):
    documents = np.random.default_rng(seed).random(count)
    single = GroupwiseReranker(Counting(), size, 1, seed=seed)("q", documents)
    scorer = Counting()
    several = GroupwiseReranker(scorer, size, passes, seed=seed).explain("q", documents)
    np.testing.assert_allclose(several.scores, single)
    np.testing.assert_allclose(single, documents)
    assert several.calls == len(scorer.seen) == passes * math.ceil(count / size)
    assert several.rounds == 1


def test_scores_are_the_mean_over_the_passes():
    documents = np.arange(6.0)

    def place(group):
        return group.argsort().argsort() * 1.0

    reranker = GroupwiseReranker(Counting(place), 4, 3, seed=7)
    expected = np.zeros(6)
    for number in range(3):
        for group in GroupPartitioner(4, seed=7)(6, number):
            for position, document in enumerate(group):
                expected[document] += place(documents[group])[position] / 3
    np.testing.assert_allclose(reranker("q", documents), expected)
    np.testing.assert_allclose(reranker("q", documents), expected)  # no state


def test_documents_of_any_kind():
    array = np.arange(6.0)
    scores = GroupwiseReranker(Counting(), 4)("q", array)
    assert GroupwiseReranker(Counting(), 4)("q", array.tolist()).tolist() == scores.tolist()
    tensor = GroupwiseReranker(lambda query, rows: rows[:, 0], 4)("q", torch.arange(12.0).reshape(6, 2))
    assert tensor.tolist() == [0, 2, 4, 6, 8, 10]
    assert GroupwiseReranker(Counting(), 4)("q", []).shape == (0,)
    assert GroupwiseReranker(Counting(), 4).explain("q", []).calls == 0
    assert SlidingWindowReranker(Counting())("q", []).shape == (0,)


def test_failures_are_counted_and_told():
    def fails(query, documents):
        return None if 0 in documents else [4.0] * len(documents)

    reranker = GroupwiseReranker(fails, 2, 1, strategy="sorted")
    assert reranker.explain("q", range(5)).failures == 1
    with pytest.warns(UnparsedGroupWarning, match="1 of 3 groups got no answer that can be read"):
        assert reranker("q", range(5)).tolist() == [0, 0, 4, 4, 4]
    skip = GroupwiseReranker(fails, 2, 1, "sorted", on_failure="skip").explain("q", range(5))
    np.testing.assert_array_equal(skip.scores, [math.nan, math.nan, 4, 4, 4])
    answers = iter([None, [6.0, 6.0], [2.0, 2.0], [2.0, 2.0]])
    mixed = {name: [] for name in ("zero", "skip")}
    for name in mixed:
        answers = iter([None, [6.0, 6.0]])
        mixed[name] = GroupwiseReranker(lambda *_, a=answers: next(a), 2, 2, on_failure=name).explain("q", "ab").scores
    assert mixed["zero"].tolist() == [3, 3]
    assert mixed["skip"].tolist() == [6, 6]


def test_released_choices():
    scorer = Counting()
    reranker = released(scorer)
    assert (reranker.size, reranker.passes, reranker.on_failure, reranker.scale) == (10, 2, "zero", 10.0)
    assert reranker("q", np.full(25, 7.0)) == pytest.approx(np.full(25, 0.7))
    assert len(scorer.seen) == 6
    assert fuse([0.7, 0.1], [0.2, 1.0]) == pytest.approx([0.6 * 0.7 + 0.4 * 0.2, 0.6 * 0.1 + 0.4])


def test_fuse():
    assert fuse([1.0], [0.0], w=1) == [1]
    assert fuse([1.0], [0.0], w=0) == [0]
    np.testing.assert_allclose(fuse([math.nan, 1.0], [0.3, 0.5]), [0.3, 0.8])
    tensor = fuse(torch.tensor([1.0, math.nan]), torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(tensor, torch.tensor([0.8, 0.25]))
    assert fuse(np.float32([1]), np.float32([0])).dtype == np.float32
    for call, message in (
        (lambda: fuse([1], [1], w=1.5), r"w must lie in \[0, 1\], got 1.5"),
        (lambda: fuse([1, 2], [1]), r"fuse: \(2,\) rerank and \(1,\) retriever scores"),
        (lambda: fuse([1], [math.nan]), "NaN in the retriever scores"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupPartitioner(0), "GroupPartitioner: size must be a whole number, at least 1, got 0"),
        (lambda: GroupPartitioner(5, "best"), "strategy must be 'random' or 'sorted', got 'best'"),
        (lambda: GroupPartitioner(5, seed=-1), "seed must be a whole number from 0 up or a numpy Generator"),
        (lambda: GroupPartitioner(5, "sorted")(3, retriever=[1, 2]), "retriever must be 3 numbers"),
        (lambda: GroupwiseReranker(Counting(), passes=0), "passes must be a whole number"),
        (lambda: GroupwiseReranker(Counting(), scale=0), "scale must be a positive number"),
        (lambda: GroupwiseReranker(Counting(), on_failure="raise"), "on_failure must be 'zero' or 'skip'"),
        (lambda: GroupwiseReranker(7), "is no function and has no score_many"),
        (lambda: GroupwiseReranker(lambda q, d: [1.0])("q", [1, 2]), r"returned \[1.0\] for a group of 2"),
        (lambda: GroupwiseReranker(lambda q, d: [math.nan])("q", [1]), "expected as many finite scores"),
        (lambda: GroupwiseReranker(lambda q, d: "a")("q", [1]), "returned 'a' for a group of 1"),
        (lambda: SlidingWindowReranker(Counting(), 5, 6), "step 6 above the window 5"),
        (lambda: PromptedScorer(lambda prompts: [])("q", ["a"]), "the client gave 0 answers to 1 prompts"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_sliding_window_carries_the_best_to_the_front():
    scorer = Counting()
    found = SlidingWindowReranker(scorer, 10, 5).explain("q", np.arange(40.0))
    assert found.scores.argmax() == 39
    assert np.argsort(-found.scores)[:5].tolist() == [39, 38, 37, 36, 35]
    assert (found.calls, found.rounds, len(scorer.seen)) == (7, 7, 7)  # (40 - 10) / 5 + 1
    assert sorted(found.scores.tolist()) == list(range(1, 41))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_sliding_window_covers_the_list_in_few_calls(count, window, step):
    if step > window:
        return
    scorer = Counting()
    found = SlidingWindowReranker(scorer, window, step).explain("q", np.arange(float(count)))
    assert found.calls == max(0, math.ceil((count - window) / step)) + 1
    assert {document for group in scorer.seen for document in group} == set(range(count))
    if step < window:
        assert found.scores[count - 1] == count


def test_a_window_without_an_answer_keeps_its_order():
    reranker = SlidingWindowReranker(lambda query, documents: None, 2, 1)
    with pytest.warns(UnparsedGroupWarning, match="2 of 2 groups"):
        assert reranker("q", ["a", "b", "c"]).tolist() == [3, 2, 1]


def test_prompt_names_every_passage_and_cuts_them():
    prompt = group_prompt("why {x}?", ["short", "y" * 4000])
    assert "why {x}?" in prompt
    assert "[1] short" in prompt
    assert "[2] " + "y" * 3000 + "\n" in prompt
    assert '<answer>{"1": score, ..., "2": score}</answer>' in prompt
    assert "y" * 4000 in group_prompt("q", ["y" * 4000], max_characters=None)


def judge(prompt):
    """A model in one function: scores a passage by its number of exclamation marks."""
    passages = re.findall(r"^\[(\d+)\] (.*)$", prompt, flags=re.MULTILINE)
    return format_answer([min(text.count("!"), 10) for _, text in passages], [name for name, _ in passages], "counted")


def test_reranking_with_a_language_model_is_one_batch_of_prompts():
    batches = []

    def ask(prompts):
        batches.append(list(prompts))
        return [judge(prompt) for prompt in prompts]

    documents = ["!" * (place % 7) for place in range(23)]
    found = GroupwiseReranker(PromptedScorer(ask), 5, 2).explain("q", documents)
    assert found.scores.tolist() == [place % 7 for place in range(23)]
    assert [len(batch) for batch in batches] == [10]
    assert PromptedScorer(ask)("q", ["!!", ""]).tolist() == [2, 0]
    assert PromptedScorer(lambda prompts: [None for _ in prompts])("q", ["a"]) is None
    assert pickle.loads(pickle.dumps(PromptedScorer(json.loads))) == PromptedScorer(json.loads)


def test_reranking_over_a_real_server_with_bad_answers():
    def reply(request):
        prompt = request["messages"][-1]["content"]
        return completion("no idea" if "[1] bad" in prompt else judge(prompt))

    def plan(request):
        return Status(400, {"error": "no"}) if "refused" in request["messages"][-1]["content"] else None

    documents = ["!", "!!", "bad", "!!!", "refused", "!!!!"]
    with ChatServer(reply, plan=plan) as server, ChatClient(server.url, "tiny", backoff=0.001, tries=2) as client:
        scorer = PromptedScorer(functools.partial(client.ask, **RELEASED_SAMPLING))
        with pytest.warns():  # the client's of a failed request, ours of groups without an answer
            found = GroupwiseReranker(scorer, 2, strategy="sorted").explain("q", documents)
        assert found.scores.tolist() == [1, 2, 0, 0, 0, 0]
        assert (found.calls, found.failures) == (3, 2)
        assert {(request["temperature"], request["top_p"]) for request in server.requests} == {(0.3, 0.8)}
