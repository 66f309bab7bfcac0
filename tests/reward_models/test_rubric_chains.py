import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.evaluation_chains import EvaluationChain, FormatError
from polyreward.reward_models.rubric_chains import (
    RubricChainReward,
    chain_advantages,
    hard_negatives,
    hard_share,
    prefers,
    select_right_chains,
)

RIGHT, WRONG, EVEN = (EvaluationChain("p", stated=s) for s in ((7, 6), (6, 7), (6, 6)))
BAD = FormatError("no JSON")


def test_the_worked_example():
    coverage = {id(RIGHT): 0.6, id(WRONG): 0.6}
    other = EvaluationChain("q", stated=(9, 2))
    reward = RubricChainReward(0.5, 1.0, -0.1, lambda chain, item: coverage.get(id(chain), 0.4))
    found = reward([[RIGHT, WRONG, other, BAD]], [0])
    assert found.shape == (1, 4)
    assert found[0].tolist() == pytest.approx([1.3, 0.3, 1.2, -0.1])
    assert float(found.mean()) == pytest.approx(0.675)
    assert float(found.std(correction=0)) == pytest.approx(0.593191, abs=1e-6)
    expected = [1.053624, -0.632175, 0.885044, -1.306494]
    assert chain_advantages(found)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_earn_nothing():
    reward = RubricChainReward(alpha=0.0)
    assert reward([[RIGHT, WRONG, EVEN]], 0).tolist() == [[1, 0, 0]]
    assert reward([[RIGHT, WRONG, EVEN]], [1]).tolist() == [[0, 1, 0]]
    assert prefers(np.array([1.0, 3.0, 3.0]), 1) is False
    assert prefers(np.array([1.0, 3.0, 2.0]), 1) is True


def test_a_group_that_cannot_be_read_has_no_advantage():
    rewards = RubricChainReward(alpha=0.0)([[BAD, BAD, BAD], [RIGHT, BAD, WRONG]], 0)
    assert rewards[0].tolist() == [-0.1] * 3
    advantages = chain_advantages(rewards)
    assert advantages[0].tolist() == [0, 0, 0]
    assert not torch.isnan(advantages).any()
    assert float(advantages[1].sum()) == pytest.approx(0, abs=1e-12)


def test_items_reach_the_coverage_and_a_failed_rating_is_zero():
    seen = []

    def coverage(chain, item):
        seen.append(item)
        return {"a": 1.0, "b": math.nan, "c": None}[item]

    found = RubricChainReward(coverage_fn=coverage)([[RIGHT, BAD], [RIGHT, RIGHT], [RIGHT, WRONG]], 0, ["a", "b", "c"])
    assert found.tolist() == [[1.5, -0.1], [1, 1], [1, 0]]
    assert seen == ["a", "b", "b", "c", "c"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 2), st.floats(0, 2))
def test_equals_a_loop(seed, alpha, beta):
    rng = np.random.default_rng(seed)
    rows, best, slow = [], [], []
    for _ in range(3):
        row, chosen = [], int(rng.integers(3))
        for _ in range(4):
            scores = rng.integers(1, 5, size=3)
            chain = FormatError("x") if rng.random() < 0.2 else EvaluationChain("p", stated=tuple(scores))
            row.append(chain)
            wins = all(scores[chosen] > s for i, s in enumerate(scores) if i != chosen)
            slow.append(-0.1 if isinstance(chain, FormatError) else alpha * 0.3 + beta * wins)
        rows.append(row)
        best.append(chosen)
    found = RubricChainReward(alpha, beta, coverage_fn=lambda chain, item: 0.3)(rows, best)
    assert found.flatten().tolist() == pytest.approx(slow)
    combined = RubricChainReward(alpha, beta).combine(torch.full((2,), 0.3), torch.tensor([1.0, 0.0]))
    assert combined.tolist() == pytest.approx([alpha * 0.3 + beta, alpha * 0.3], abs=1e-6)


def test_texts_as_a_trainer_sends_them():
    text = '<JSON_START>{"better_response": {"response_1": 7, "response_2": 3}}<JSON_END>'
    reward = RubricChainReward(alpha=0.0)
    assert reward.of_texts([text, text, "?"], [0, 1, 0]) == pytest.approx([1, 0, -0.1])


def test_right_chains_and_hard_pairs():
    assert select_right_chains([RIGHT, WRONG, EVEN, BAD], [0, 0, 0, 0]).tolist() == [True, False, False, False]
    rows = [[RIGHT, RIGHT, RIGHT], [RIGHT, WRONG, BAD], [WRONG, WRONG, WRONG], [BAD, BAD, BAD], [RIGHT, RIGHT, WRONG]]
    assert hard_negatives(rows, [0] * 5).tolist() == [False, True, True, False, False]
    assert [hard_share(p) for p in (0, 0.25, 1, 2)] == [0, 0.25, 1, 1]
    assert select_right_chains([], []).shape == (0,)


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="no coverage_fn"):
        RubricChainReward()([[RIGHT]], 0)
    with pytest.raises(InvalidInputError, match=r"coverage of row 1 is 1\.5"):
        RubricChainReward(coverage_fn=lambda chain, item: item)([[RIGHT], [RIGHT]], 0, [1.0, 1.5])
    with pytest.raises(InvalidInputError, match=r"as many chains, got \[1, 2\]"):
        RubricChainReward(alpha=0.0)([[RIGHT], [RIGHT, RIGHT]], 0)
    with pytest.raises(InvalidInputError, match="chosen and items"):
        RubricChainReward(alpha=0.0)([[RIGHT]], [0, 1])
    with pytest.raises(InvalidInputError, match="chosen is 2, the chain scores 2"):
        RubricChainReward(alpha=0.0)([[RIGHT]], 2)
    with pytest.raises(InvalidInputError, match="finite"):
        RubricChainReward(alpha=math.inf)
    with pytest.raises(InvalidInputError, match="at least 2"):
        chain_advantages(torch.zeros(2, 1))
    assert RubricChainReward(alpha=0.0)([], []).shape == (0, 0)


def test_a_chain_that_leaves_a_response_out_wins_nothing():
    short = EvaluationChain("p", stated=(9,))
    assert RubricChainReward(alpha=0.0)([[short, RIGHT, WRONG]], 0).tolist() == [[-0.1, 1, 0]]
    assert RubricChainReward(alpha=0.0)([[short, RIGHT, WRONG]], 1).tolist() == [[-0.1, 0, 1]]
    assert RubricChainReward(alpha=0.0)([[short, BAD]], 0).tolist() == [[-0.1, -0.1]]
    # nor does one that makes up a response, and it does not spoil the others
    long = EvaluationChain("p", stated=(9, 2, 1))
    assert RubricChainReward(alpha=0.0)([[long, RIGHT, WRONG]], 0).tolist() == [[-0.1, 1, 0]]
    assert RubricChainReward(alpha=0.0)([[long, long, RIGHT]], 0, responses=2).tolist() == [[-0.1, -0.1, 1]]
    with pytest.raises(InvalidInputError, match="chosen is -1"):
        RubricChainReward(alpha=0.0)([[RIGHT]], -1)
    assert select_right_chains([short, WRONG], [1, 1]).tolist() == [False, True]
    assert select_right_chains([short], [0]).tolist() == [False]
