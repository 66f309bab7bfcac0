import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.best_of_n import BestOfN, best_rows
from polyreward.rewards.verifiers import ExactMatch, NumericAnswer

NAN = float("nan")


def score(prompts, completions, **columns):
    return [None if text == "?" else float(text.split()[-1]) for text in completions]


def slow_best(scores, groups):
    best = {}
    for row, (value, group) in enumerate(zip(scores, groups, strict=True)):
        best.setdefault(group, -1)
        if not np.isnan(value) and (best[group] < 0 or value > scores[best[group]]):
            best[group] = row
    return list(best.values())


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, NAN, -np.inf]), st.integers(0, 3)), max_size=15), st.data())
@settings(deadline=None)
def test_best_rows_equal_a_plain_loop(rows, data):
    scores, groups = [s for s, _ in rows], [g for _, g in rows]
    scores = [-5.0 if s == -np.inf else s for s in scores]
    want = slow_best(scores, groups)
    assert best_rows(np.array(scores), groups).tolist() == want
    assert best_rows(torch.tensor(scores), [f"g{g}" for g in groups]).tolist() == want


def test_best_of_each_prompt_with_stable_ties():
    texts = ["1", "3", "3", "2", "0", "0"]
    chosen = BestOfN(score).select(["a", "a", "a", "b", "b", "c"], texts)
    assert chosen.rows.tolist() == [1, 3, 5]
    assert chosen.values.tolist() == [3, 2, 0]
    assert chosen.scores.tolist() == [1, 3, 3, 2, 0, 0]
    assert (chosen.queries, chosen.tokens) == (6, 6)
    assert BestOfN(score)(["a", "a", "a", "b", "b", "c"], texts) == [0, 1, 0, 1, 0, 1]


def test_groups_by_column_messages_and_order():
    texts = ["1", "2", "3", "4"]
    assert BestOfN(score).select(None, texts, group=[7, 3, 7, 3]).rows.tolist() == [2, 3]
    prompts = [[{"role": "user", "content": c}] for c in "abab"]
    assert BestOfN(score).select(prompts, texts).rows.tolist() == [2, 3]
    answers = [[{"role": "assistant", "content": text}] for text in ("6", "5")]
    chosen = BestOfN(NumericAnswer(extract="last_number")).select(["a", "a"], answers, answer=["5", "5"])
    assert chosen.rows.tolist() == [1]


def test_budget_counts_what_was_looked_at():
    texts = ["1", "a 5", "b c 9", "2", "d 0"]
    prompts = ["p", "p", "p", "q", "q"]
    first = BestOfN(score, n=1).select(prompts, texts)
    assert first.rows.tolist() == [0, 3]
    assert (first.queries, first.tokens) == (2, 2)
    two = BestOfN(score, n=2).select(prompts, texts)
    assert two.rows.tolist() == [1, 3]
    assert (two.queries, two.tokens) == (4, 6)
    assert np.isnan(two.scores[2])
    ids = [[0] * length for length in (10, 20, 30, 40, 50)]
    assert BestOfN(score, n=2).select(prompts, texts, completion_ids=ids).tokens == 120
    assert BestOfN(score, n=2)(prompts, texts) == [0, 1, None, 1, 0]
    values = [BestOfN(score, n=n).select(prompts, texts).values.mean() for n in (1, 2, 3)]
    assert values == sorted(values)


def test_a_verifier_that_does_not_apply_never_wins():
    chosen = BestOfN(score).select(["a", "a", "b", "b"], ["?", "-3", "?", "?"])
    assert chosen.rows.tolist() == [1, -1]
    assert chosen.values[0] == -3
    assert np.isnan(chosen.values[1])
    assert BestOfN(score)(["a", "a", "b", "b"], ["?", "-3", "?", "?"]) == [None, 1, None, None]


def test_empty_batches_single_samples_names_and_pickles():
    assert BestOfN(score)(None, []) == []
    empty = BestOfN(score).select([], [])
    assert (len(empty.rows), empty.queries, empty.tokens) == (0, 0, 0)
    assert BestOfN(score)(["a"], ["1"]) == [1]
    assert BestOfN(score, 4).__name__ == "best_of_4_by_score"
    part = pickle.loads(pickle.dumps(BestOfN(ExactMatch())))
    assert part(["a", "a"], ["x", "y"], answer=["y", "y"]) == [0, 1]
    assert part(np.array(["a", "a"]), np.array(["x", "y"]), answer=np.array(["y", "y"])) == [0, 1]
    assert part.__name__ == "best_of_n_by_exact_match"


def test_bad_input_is_named():
    for n in (0, 1.5, True, "2"):
        with pytest.raises(InvalidInputError, match="n must be a whole number"):
            BestOfN(score, n)
    with pytest.raises(InvalidInputError, match="the verifier must be a reward function"):
        BestOfN("score")
    with pytest.raises(InvalidInputError, match="give prompts or 'group'"):
        BestOfN(score)(None, ["1"])
    with pytest.raises(InvalidInputError, match="column 'group' has 1 entries, expected 2"):
        BestOfN(score)(None, ["1", "2"], group=[0])
    with pytest.raises(InvalidInputError, match="column 'group' has no value in row 1"):
        BestOfN(score)(None, ["1", "2"], group=[0, None])
    with pytest.raises(InvalidInputError, match="prompts has 1 entries, expected 2"):
        BestOfN(score)(["a"], ["1", "2"])
    with pytest.raises(MissingColumnError, match="'answer'"):
        BestOfN(ExactMatch())(["a"], ["1"])
    with pytest.raises(InvalidInputError, match="returned inf for completion 0"):
        BestOfN(lambda prompts, completions, **columns: [np.inf])(["a"], ["1"])
    with pytest.raises(InvalidInputError, match=r"scores have shape \(1,\)"):
        best_rows([1.0], [0, 1])
