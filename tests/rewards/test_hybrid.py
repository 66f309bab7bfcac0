import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.contract import Reward
from polyreward.rewards.embedding_similarity import EmbeddingSurrogateReward, SquashedReward
from polyreward.rewards.hybrid import ConfidentRule, HybridReward, blend
from polyreward.rewards.verifiers import ExactMatch, NumericAnswer


def column(name):
    """A reward that reads its values off a column."""

    def read(prompts, completions, **columns):
        return columns[name]

    read.__name__ = name
    return read


def kind(prompt):
    return "verifiable" if prompt.startswith("v") else "open"


CONFIDENT = {"rule": column("pairs"), "model": column("model")}


def test_the_rule_scores_verifiable_and_the_model_open_prompts():
    reward = HybridReward(**CONFIDENT, route=kind)
    values = reward(
        ["v1", "o1", "v2"], ["a", "b", "c"], pairs=[(1.0, 1.0), (0.0, 1.0), (0.0, 1.0)], model=[0.3, 0.4, 0.9]
    )
    assert values == [1, 0.4, 0]


def test_the_model_cannot_change_what_a_confident_rule_says():
    for fallback in ("zero", "model"):
        reward = HybridReward(**CONFIDENT, route=kind, fallback=fallback)
        for score in (0.0, 0.37, 1.0):
            assert reward(["v"], ["a"], pairs=[(1.0, 1.0)], model=[score]) == [1]


@pytest.mark.parametrize(
    ("fallback", "confidence", "value"),
    [("model", 0.25, 0.55), ("model", 0.0, 0.4), ("model", 1.0, 1.0), ("zero", 0.0, 0.0), ("zero", 0.25, 1.0)],
)
def test_confidence_blends_rule_and_model(fallback, confidence, value):
    reward = HybridReward(**CONFIDENT, route=kind, fallback=fallback)
    assert reward(["v"], ["a"], pairs=[(1.0, confidence)], model=[0.4]) == [pytest.approx(value)]


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 3, st.booleans()), min_size=1, max_size=12),
    st.sampled_from(["zero", "model"]),
)
def test_equals_a_plain_loop(rows, fallback):
    expected = []
    for rule, confidence, model, verifiable in rows:
        if not verifiable:
            expected.append(model)
        elif fallback == "zero":
            expected.append(rule if confidence > 0 else 0.0)
        else:
            expected.append(confidence * rule + (1 - confidence) * model)
    rule, confidence, model, verifiable = (list(part) for part in zip(*rows, strict=True))
    assert blend(rule, confidence, model, verifiable, fallback) == pytest.approx(np.array(expected))
    reward = HybridReward(**CONFIDENT, route="type", fallback=fallback)
    values = reward(
        None,
        ["x"] * len(rows),
        pairs=list(zip(rule, confidence, strict=True)),
        model=model,
        type=["verifiable" if v else "open" for v in verifiable],
    )
    assert values == pytest.approx(expected)


def test_forms_that_a_rule_may_return():
    for form in (
        [(1.0, 0.5), (0.0, 1.0), (1.0, 1.0)],
        ([1.0, 0.0, 1.0], [0.5, 1.0, 1.0]),
        (np.array([1.0, 0.0, 1.0]), np.array([0.5, 1.0, 1.0])),
        [[1.0, 0.5], 0.0, np.float32(1)],
    ):
        reward = HybridReward(lambda form=form, **_: form, column("model"), kind, "model")
        assert reward(["v"] * 3, ["a"] * 3, model=[0.5] * 3) == [0.75, 0, 1]
    pairs = ([1.0, 0.5], [0.0, 1.0])
    assert HybridReward(lambda **_: list(pairs), column("model"), kind, "model")(
        ["v"] * 2, ["a"] * 2, model=[0.5] * 2
    ) == [0.75, 0]
    assert HybridReward(lambda **_: pairs, column("model"), kind)(["v"] * 2, ["a"] * 2, model=[0.5] * 2) == [
        0,
        0.5,
    ]


def test_each_source_sees_only_its_rows():
    seen = {}

    def spy(name, value):
        def source(prompts, completions, **columns):
            seen[name] = (list(prompts), list(completions), columns["extra"], columns.get("log_extra"), columns["note"])
            return [value] * len(completions)

        return source

    reward, logged = HybridReward(spy("rule", 1.0), spy("model", 0.5), kind), {}
    values = reward(["v1", "o1", "v2"], ["a", "b", "c"], extra=[1, 2, 3], note="n", log_extra=logged.__setitem__)
    assert values == [1, 0.5, 1]
    assert seen == {"rule": (["v1", "v2"], ["a", "c"], [1, 3], None, "n"), "model": (["o1"], ["b"], [2], None, "n")}
    assert logged == {"hybrid_source": ["rule", "model", "rule"]}
    assert reward([], []) == []


def test_sources_are_told():
    reward = HybridReward(**CONFIDENT, route=kind, fallback="model")
    parts = reward.explain(
        ["v", "v", "v", "o", "o", "v"],
        ["x"] * 6,
        pairs=[(1, 1), (1, 0.5), (None, 0), (None, None), (None, None), (1, 0.5)],
        model=[None, 0.5, 0.5, 0.2, None, None],
    )
    assert parts.source == ["rule", "blend", "model", "model", "none", "none"]
    assert parts.values == pytest.approx([1, 0.75, 0.5, 0.2, np.nan, np.nan], nan_ok=True)
    assert parts.verifiable.tolist() == [True, True, True, False, False, True]
    assert np.isnan(parts.rule[3])


@pytest.mark.parametrize("label", [None, "", "opne", 1, float("nan"), ["open"]])
def test_an_unknown_type_is_an_error(label):
    reward = HybridReward(**CONFIDENT, route="kind")
    with pytest.raises(ValueError, match=r"column 'kind', row 1: type .*, expected 'verifiable' or 'open'"):
        reward(None, ["a", "b"], kind=["open", label], pairs=[], model=[0.5, 0.5])
    with pytest.raises(InvalidInputError, match="route, row 0"):
        HybridReward(**CONFIDENT, route=lambda _: label)(["p"], ["a"])


def test_a_verifiable_row_without_reference_is_an_error_of_that_row():
    reward = HybridReward(NumericAnswer(), column("model"), kind)
    with pytest.raises(ValueError, match="numeric_answer, row 2: no value: a verifiable row needs a reference"):
        reward(["o", "v", "v"], ["x", "1", "2"], answer=["", "1", None], model=[0.1] * 3)
    with pytest.raises(ValueError, match=r"column 'answer', row 2: 'many' is no number"):
        reward(["o", "v", "v"], ["x", "1", "2"], answer=["", "1", "many"], model=[0.1] * 3)
    confident = HybridReward(ConfidentRule(NumericAnswer()), column("model"), kind)
    with pytest.raises(ValueError, match="row 1: no value"):
        confident(["v", "v"], ["1", "nothing"], answer=["1", None])


def test_raw_scores_are_refused_and_a_sigmoid_helps():
    reward = HybridReward(column("rule"), column("logits"), kind)
    with pytest.raises(InvalidInputError, match=r"logits, row 1: 7.5 is not in \[0, 1\]; squash raw scores first"):
        reward(["v", "o"], ["a", "b"], rule=[1.0, 0.0], logits=[0.0, 7.5])
    with pytest.raises(InvalidInputError, match=r"rule, row 0: 3 is not in"):
        reward(["v", "o"], ["a", "b"], rule=[3.0, 0.0], logits=[0.0, 0.5])
    with pytest.raises(InvalidInputError, match="confidence of pairs, row 0: 2 is not in"):
        HybridReward(**CONFIDENT, route=kind)(["v"], ["a"], pairs=[(1, 2)], model=[0])
    squashed = HybridReward(column("rule"), SquashedReward(column("logits")), kind)
    assert 0 < squashed(["v", "o", "o"], ["a", "b", "c"], rule=[1.0, 0, 0], logits=[0.0, 7.5, 2.0])[2] < 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HybridReward(None, column("m"), kind), InvalidInputError, "rule None is not a reward"),
        (lambda: HybridReward(column("r"), 3, kind), InvalidInputError, "model 3 is not a reward"),
        (lambda: HybridReward(column("r"), column("m"), 3), InvalidInputError, "route must be"),
        (lambda: HybridReward(column("r"), column("m"), kind, "rule"), InvalidInputError, "fallback must be"),
        (lambda: HybridReward(column("r"), column("m"))(["p"], ["a"], types=["open"]), MissingColumnError, "'types'"),
        (lambda: HybridReward(column("r"), column("m"))(["p"], ["a"], type="open"), InvalidInputError, "list of 1"),
        (
            lambda: HybridReward(column("r"), column("m"), kind)(None, ["a"]),
            InvalidInputError,
            "route reads the prompts",
        ),
        (
            lambda: HybridReward(column("r"), column("m"), kind)(["v"], ["a"], r=[(1, 1, 1)]),
            InvalidInputError,
            "not pairs",
        ),
        (lambda: HybridReward(column("r"), column("m"), kind)(["v"], ["a"], r=[1, 1]), InvalidInputError, "2 values"),
        (lambda: HybridReward(lambda **_: 1.0, column("m"), kind)(["v"], ["a"]), InvalidInputError, "returned float"),
        (lambda: ConfidentRule(column("r")), InvalidInputError, "does not say where"),
    ],
)
def test_bad_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_confidence_is_whether_an_answer_was_found():
    rule = ConfidentRule(NumericAnswer(extract="boxed"))
    completions = [r"\boxed{3}", r"\boxed{4}", "3", r"\boxed{three}", r"\boxed{}"]
    assert rule(None, completions, answer=["3"] * 5) == [(1, 1), (0, 1), (0, 0), (0, 0), (0, 0)]
    assert rule(None, ["3"], answer=[None]) == [None]
    text = ConfidentRule(ExactMatch(extract="<answer>"))
    assert text(None, ["<answer>b</answer>", "a"], answer=["a", "a"]) == [(0, 1), (0, 0)]
    reward = HybridReward(rule, column("model"), kind, "model")
    assert reward(["v"] * 3, completions[:3], answer=["3"] * 3, model=[0.4] * 3) == [1, 0, 0.4]


def test_pickles_and_composes():
    def fail(texts):
        raise AssertionError

    reward = HybridReward(ExactMatch(), EmbeddingSurrogateReward(len), "type")
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert isinstance(reward, Reward)
    doubled = 2 * HybridReward(ExactMatch(), EmbeddingSurrogateReward(fail), "type") + 1
    assert doubled(None, ["a", "b"], answer=["a", "a"], type=["verifiable"] * 2) == [3, 1]
