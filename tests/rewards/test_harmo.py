import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import dr_grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.rewards.formats import TagFormat
from polyreward.rewards.groups import needs_group
from polyreward.rewards.harmo import FormatReward, HarmoReward, answer_harmo, harmo, variance_shares
from polyreward.rewards.verifiers import ExactMatch


def kind(prompt):
    return "open" if prompt.startswith("o") else "verifiable"


def model(prompts, completions, score, **columns):
    return score


def well_formed(answer, words):
    """A completion of so many words in the required form."""
    return f"<think>{'w ' * (words - 1)}</think><answer>{answer}</answer>"


def test_worked_example():
    reward = harmo(ExactMatch(extract="<answer>"), model, kind)
    completions = [well_formed(answer, 10) for answer in ("b", "a", "a", "b")]
    ids = [[0] * n for n in (40, 80, 100, 20)]
    parts = reward.explain(["q"] * 4, completions, answer=["a"] * 4, completion_ids=ids)
    assert parts.accuracy.tolist() == [0, 1, 1, 0]
    assert parts.length == pytest.approx([-0.277778, 0, 0, -0.388889], abs=1e-6)
    assert parts.format.tolist() == [0.5] * 4
    values = reward(["q"] * 4, completions, answer=["a"] * 4, completion_ids=ids)
    assert values == pytest.approx(parts.total)
    batch = RewardBatch(torch.tensor(values)[:, None], ("harmo",), torch.zeros(4, dtype=torch.int64))
    advantages = compute_advantages(dr_grpo(), batch).tolist()
    assert advantages == pytest.approx([-0.611111, 0.666667, 0.666667, -0.722222], abs=1e-6)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)


def test_without_format_and_length_it_is_the_verifier():
    reward = harmo(ExactMatch(), model, kind, p_max=0.0, format_value=0.0)
    completions = ["a", "b", "a a", "a"]
    assert reward(["q"] * 4, completions, answer=["a"] * 4) == ExactMatch()(["q"] * 4, completions, answer=["a"] * 4)


def test_groups_do_not_mix_and_types_do():
    reward = harmo(ExactMatch(), model, kind, unit="characters", pattern=r".*", weights=(1.0, 1.0, 2.0))
    prompts, completions = ["q", "o", "q", "o", "z"], ["aaaa", "bbbb", "bb", "b", "b"]
    values = reward(prompts, completions, answer=["aaaa", None, "aaaa", None, "a"], score=[0.9, 0.9, 0.9, 0.1, 0.9])
    assert values == pytest.approx([1 + 1, 0.9 + 1, -0.25 + 1, 0.1 - 0.375 + 1, 1])


def test_thresholds_by_type():
    options = {"unit": "characters", "pattern": "x"}
    completions, scores = ["bbbb", "b"], [0.8, 0.6]
    by_type = harmo(ExactMatch(), model, kind, tau={"open": 0.7}, **options)
    assert by_type(["o"] * 2, completions, score=scores) == pytest.approx([0.8, 0.6 - 0.375])
    assert harmo(ExactMatch(), model, kind, **options)(["o"] * 2, completions, score=scores) == scores
    for bad in ({"opne": 0.7}, {"open": float("nan")}):
        with pytest.raises(InvalidInputError, match="thresholds"):
            harmo(ExactMatch(), model, kind, tau=bad)


def test_rows_to_which_no_source_applies():
    reward = harmo(ExactMatch(), model, kind, unit="characters", pattern="x")
    values = reward(["o"] * 3, ["bbbb", "b", "bb"], score=[0.8, None, 0.2])
    assert values == [0.8, None, pytest.approx(0.2 - 0.25)]


def test_what_is_logged():
    extra, metrics = {}, {}
    reward = harmo(ExactMatch(), model, kind, unit="characters", pattern=".*")
    values = reward(
        ["q", "q", "o", "o"], ["aaaa", "bb", "bbbb", "b"], answer=["aaaa"] * 4, score=[0, 0, 0.9, None],
        log_extra=extra.__setitem__, log_metric=metrics.__setitem__,
    )  # fmt: skip
    assert values == [1.5, 0.25, 1.4, None]
    assert extra == {"hybrid_source": ["rule", "rule", "model", "none"]}
    assert metrics["harmo/accuracy"] == pytest.approx((1 + 0 + 0.9) / 3)
    assert metrics["harmo/share/accuracy"] == pytest.approx(1 / 1.25)
    assert metrics["harmo/share/length"] == pytest.approx(0.25 / 1.25)
    assert metrics["harmo/share/format"] == 0
    assert metrics["harmo/wrong_length"] == 2
    quiet = {}
    reward(["o"], ["b"], score=[None], log_metric=quiet.__setitem__)
    assert quiet == {}


@given(
    st.lists(st.tuples(*[st.floats(-10, 10)] * 3, st.integers(0, 3)), min_size=2, max_size=16),
)
def test_shares_add_up_to_one(rows):
    terms, groups = np.array([row[:3] for row in rows]), [row[3] for row in rows]
    shares = variance_shares(terms, groups)
    total = terms.sum(axis=1)
    centred = np.array(
        [
            t - np.mean([u for u, h in zip(total, groups, strict=True) if h == g])
            for t, g in zip(total, groups, strict=True)
        ]
    )
    if (centred**2).sum() < 1e-12:
        return
    assert shares.sum() == pytest.approx(1)
    expected = [(terms[:, k] * centred).sum() / (centred**2).sum() for k in range(3)]
    assert shares == pytest.approx(np.array(expected), abs=1e-6)


def test_a_term_of_another_scale_shows():
    rng = np.random.default_rng(0)
    terms = np.stack([rng.integers(0, 2, 64), 10 * rng.normal(size=64)], axis=1)
    shares = variance_shares(terms, np.arange(64) // 8)
    assert shares[1] > 0.95
    assert variance_shares(np.ones((4, 2)), [0, 0, 1, 1]).tolist() == [0, 0]


def test_format_reward():
    form = FormatReward()
    texts = [
        well_formed("a", 3),
        "<answer>a</answer>",
        "<think></think><think></think><answer></answer>",
        "x" + well_formed("a", 3),
    ]
    assert form(None, texts) == [0.5, 0, 0, 0]
    assert FormatReward(r"a+", 2.0)(None, ["aaa", "ab", ""]) == [2, 0, 0]
    assert FormatReward(("b",))(None, ["<b>1</b>"]) == [0.5]
    assert form(None, texts) == (0.5 * TagFormat())(None, texts)
    with pytest.raises(InvalidInputError, match="no regular expression"):
        FormatReward("(")
    with pytest.raises(InvalidInputError, match="finite"):
        FormatReward(value=float("nan"))
    assert pickle.loads(pickle.dumps(form)) == form


@pytest.mark.parametrize("embedder", ["words", "characters"])
def test_from_plain_options(embedder):
    reward = answer_harmo(rule="number", embedder=embedder, pattern=["answer"], p_max=0.25, unit="characters")
    completions = [
        "<answer>3.0</answer>",
        "<answer>4</answer>",
        "<answer>two apples</answer>",
        "<answer>a boat</answer>",
    ]
    values = reward(
        ["q", "q", "o", "o"], completions, answer=["3", "3", "two apples", "two apples"],
        type=["verifiable", "verifiable", "open", "open"],
    )  # fmt: skip
    assert values[:3] == pytest.approx([1.5, 0.5 - 0.25 * (1 - 18 / 20), 1.5])
    assert 0.4 < values[3] < 0.6
    with pytest.raises(InvalidInputError, match="rule must be"):
        answer_harmo(rule="regex")


def test_is_a_group_reward_that_pickles():
    reward = harmo(ExactMatch(), ExactMatch(), "type")
    assert isinstance(reward, HarmoReward)
    assert needs_group(2 * reward)
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert reward([], []) == []
    assert reward.__name__ == "harmo"
    with pytest.raises(InvalidInputError, match="three finite weights"):
        harmo(ExactMatch(), ExactMatch(), "type", weights=(1.0, 2.0))
    with pytest.raises(InvalidInputError, match="give prompts or 'group'"):
        reward(None, ["a"], answer=["a"], type=["open"])
