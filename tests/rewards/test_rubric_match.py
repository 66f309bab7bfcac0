import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.rubric_match import (
    FormatReward,
    JsonFormatReward,
    LengthBucketReward,
    RubricMatchReward,
    judgement_reward,
    read_answer,
)

LABELS = {"motion": 3, "text": "good", "quality": 1}


def answer(scores, length=0, key="dimensional_scores"):
    text = f"<answer>{json.dumps({key: scores})}</answer>"
    return "t" * max(length - len(text), 0) + text


def test_two_of_three_labels_in_1200_characters():
    text = answer({"motion": 3, "text": "good", "quality": 2}, 1200)
    assert len(text) == 1200
    assert RubricMatchReward()(["p"], [text], labels=[LABELS]) == [pytest.approx(2 / 3)]
    assert judgement_reward()(["p"], [text], labels=[LABELS]) == [pytest.approx(0.646667, abs=1e-6)]
    assert judgement_reward(decimals=3)(["p"], [text], labels=[LABELS]) == [0.647]


@pytest.mark.parametrize(
    ("length", "value"),
    [
        (0, 0),
        (499, 0),
        (500, 0.2),
        (999, 0.2),
        (1000, 0.4),
        (1499, 0.4),
        (1500, 0.6),
        (1999, 0.6),
        (2000, 1),
        (9999, 1),
    ],
)
def test_length_buckets(length, value):
    assert LengthBucketReward()(None, ["x" * length]) == [value]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<answer>{"a": 1}</answer>', {"a": 1}),
        ('why <answer>\n```json\n{"a": 1}\n```\n</answer> bye', {"a": 1}),
        ('<answer>{"a": 1}</answer> no: <answer>{"a": 2}</answer>', {"a": 2}),
        ('{"a": 1}', None),
        ("<answer>[1]</answer>", None),
        ('<answer>{"a": 1}', None),
        ('</answer>{"a": 1}<answer>', None),
        ('<answer>{"a": </answer>', None),
        ("<answer>" + '{"a":' * 5000 + "</answer>", None),
        ("", None),
    ],
)
def test_reading_an_answer(text, found):
    assert read_answer(text) == found


def test_without_a_tag_the_last_object_counts():
    assert read_answer('{"a": 1} then {"b": {"c": 2}} {broken', None) == {"b": {"c": 2}}
    assert read_answer("{" * 3000, None) is None


def test_labels_must_be_equal_in_kind():
    reward = RubricMatchReward(field=None)
    texts = ['<answer>{"a": 1}</answer>', '<answer>{"a": true}</answer>', '<answer>{"a": "1"}</answer>',
             '<answer>{"a": 1.0}</answer>', '<answer>{"b": 1}</answer>', "?"]  # fmt: skip
    assert reward(None, texts, labels=[{"a": 1}] * 6) == [1, 0, 0, 1, 0, 0]
    assert reward(None, texts[:2], labels=[{"a": None}, {}]) == [0, None]
    nested = '<answer>{"dimensional_scores": [1]}</answer>'
    assert RubricMatchReward()(None, [nested], labels=[LABELS]) == [0]


def test_format():
    reward = JsonFormatReward()
    assert FormatReward is JsonFormatReward
    assert reward(None, [answer({}), answer({}, key="scores"), "<answer>{}</answer>", ""]) == [1, 0, 0, 0]
    assert JsonFormatReward(())(None, ["<answer>{}</answer>"]) == [1]


def test_a_row_without_labels_keeps_the_other_terms():
    reward = judgement_reward()
    values = reward(None, [answer({}, 2000)] * 3, labels=[None, {}, LABELS])
    assert values == [pytest.approx(0.3)] * 3
    assert judgement_reward(weights=(1, 0, 0))(None, [answer(LABELS)], labels=[LABELS]) == [1]
    assert pickle.loads(pickle.dumps(judgement_reward(decimals=3)))(None, ["x"], labels=[LABELS]) == [0]


def test_wrong_references_and_options():
    with pytest.raises(InvalidInputError, match="'rubric_match_reward': column 'labels', row 1: expected a mapping"):
        RubricMatchReward()(None, ["a", "b"], labels=[LABELS, "good"])
    with pytest.raises(MissingColumnError, match="reads the column 'labels'; did you mean 'label'"):
        RubricMatchReward()(None, ["a"], label=[LABELS])
    with pytest.raises(InvalidInputError, match="2 edges need 3 levels, got 2"):
        LengthBucketReward((1, 2), (0, 1))
    with pytest.raises(InvalidInputError, match="increasing edges"):
        LengthBucketReward((2, 1), (0, 1, 2))
    with pytest.raises(InvalidInputError, match="list of names"):
        JsonFormatReward("score")


@given(st.text(), st.dictionaries(st.text(max_size=3), st.integers(0, 2), min_size=1))
def test_what_a_model_writes_never_raises(text, labels):
    for completion in (text, f"<answer>{text}</answer>", f'<answer>{{"dimensional_scores": {text}}}</answer>'):
        value = judgement_reward()(None, [completion], labels=[labels])[0]
        assert 0 <= value <= 1


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(0, 3), min_size=1), st.data())
def test_share_equals_counting(labels, data):
    written = {name: data.draw(st.integers(0, 3)) for name in labels if data.draw(st.booleans())}
    hits = len([name for name in labels if name in written and written[name] == labels[name]])
    found = RubricMatchReward()(None, [answer(written)], labels=[labels])
    assert found == [pytest.approx(hits / len(labels))]
