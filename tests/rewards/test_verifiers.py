import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.answers import find_answer, numbers_in, parse_number
from polyreward.rewards.overlap import RelativeAccuracyReward
from polyreward.rewards.verifiers import ExactMatch, FieldsCorrect, LinesCorrect, NumericAnswer, ReasoningGymScore


def one(reward, completion, **columns):
    return reward(["q"], [completion], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        ("  a b ", "text", "a b"),
        ("<answer>1</answer> <answer> 2 </answer>", "<answer>", "2"),
        ("<answer>1", "<answer>", None),
        ("1</answer>", "<answer>", None),
        ("x #### 1\n#### 22 \nrest", "####", "22"),
        ("no mark", "####", None),
        ("#### \n5", "####", None),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1", "boxed", None),
        ("from 3 to 1,234.5!", "last_number", "1,234.5"),
        ("none", "last_number", None),
        ("so 3/4", "last_number", "3/4"),
        ("3 / -4.", "last_number", "3/-4"),
        ("on 2024/5/6", "last_number", "6"),
        ("x/2", "last_number", "2"),
        ("−2", "last_number", "-2"),
    ],
)
def test_find_answer(text, place, answer):
    assert find_answer(text, place) == answer


@pytest.mark.parametrize("place", ["answer", "<answer", "", "box", "<a b>"])
def test_unknown_places_are_refused_at_construction(place):
    for verifier in (ExactMatch, NumericAnswer, LinesCorrect, FieldsCorrect, ReasoningGymScore):
        with pytest.raises(InvalidInputError, match="expected one of"):
            verifier(extract=place)


def test_numbers_in_text():
    assert numbers_in("a1-2, -3 +4 .5 1,000 1,00 2.5e3 (7)-8 10.") == [
        "1", "2", "-3", "+4", ".5", "1,000", "1", "00", "2.5e3", "7", "8", "10",
    ]  # fmt: skip
    assert numbers_in("[10,200,-300.5,1,2345]") == ["10,200", "-300.5", "1", "2345"]
    assert numbers_in("[10,200,-300.5,1,2345]", thousands=False) == ["10", "200", "-300.5", "1", "2345"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("$5.50", 5.5), ("20%", 20), ("3/4", 0.75), ("-2", -2), ("−2", -2), ("7.", 7), ("1e3", 1000),
        ("7,2", None), ("1,234,5", None), ("12,345/5", 2469), ("1_000", None), ("- 2", None), ("$-5", -5),
        ("1e999", None), ("x", None), ("1/0", None), ("inf", None), ("nan", None), ("", None), ("1/2/3", None),
    ],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("options", "completion", "value"),
    [
        ({}, "The  Cat", 1), ({}, "the cat", 0), ({}, "The Cat.", 0),
        ({"ignore_spaces": False}, "The  Cat", 0),
        ({"ignore_case": True}, " the cat\n", 1),
        ({"ignore_punctuation": True}, "The Cat!", 1),
        ({"ignore_articles": True}, "Cat", 1),
        ({"ignore_articles": True, "ignore_case": True, "ignore_punctuation": True}, "a cat?", 1),
    ],
)  # fmt: skip
def test_exact_match_normalises_only_what_it_is_told(options, completion, value):
    assert one(ExactMatch(**options), completion, answer="The Cat") == value


def test_exact_match_accepts_any_of_several_and_numbers():
    assert one(ExactMatch(), "two", answer=["one", "two"]) == 1
    assert one(ExactMatch(), "2", answer=2) == 1
    assert one(ExactMatch(), "None", answer=["one", None]) == 0
    with pytest.raises(InvalidInputError, match="empty list of accepted answers"):
        one(ExactMatch(), "None", answer=[None])
    assert one(ExactMatch("label", "<answer>"), "x <answer>2</answer>", label="2") == 1


@pytest.mark.parametrize(
    ("options", "completion", "value"),
    [
        ({}, "The answer is 72.", 1),
        ({}, "72 or 73", 0),
        ({"extract": "####"}, "work\n#### 72", 1),
        ({"extract": "####"}, "it is 72", 0),
        ({"extract": "####"}, "#### $72.00", 1),
        ({"absolute": 0.5}, "72.5", 1),
        ({"absolute": 0.5}, "72.51", 0),
        ({"relative": 0.01}, "71.28", 1),
        ({"relative": 0.01}, "71.27", 0),
        ({"extract": "boxed"}, r"\boxed{144/2}", 1),
    ],
)
def test_numeric_answer(options, completion, value):
    assert one(NumericAnswer(**options), completion, answer="Half of 144 is 144/2.\n#### 72") == value


def test_numeric_answer_takes_references_of_every_form():
    for reference in (72, 72.0, "72", "#### 72", "1 + 71 = 72\n#### 72", "$72"):
        assert one(NumericAnswer(), "72", answer=reference) == 1
    with pytest.raises(InvalidInputError):
        NumericAnswer(relative=-1)


@given(st.from_regex(r"[-+−]?[$]?[0-9]{1,6}([.,][0-9]{1,3}){0,2}(e[0-9])?( ?/ ?[-−]?[0-9,]{1,5})?%?", fullmatch=True))
def test_whatever_is_a_reference_number_is_its_own_right_answer(reference):
    if parse_number(reference) is not None:
        for completion in (reference, f"It is {reference}.", f"<answer>{reference}</answer>"):
            assert one(NumericAnswer(), completion, answer=reference) == 1
            assert one(RelativeAccuracyReward(), completion, answer=reference) == 1


@given(st.integers(-(10**8), 10**8))
def test_a_worked_solution_is_its_own_right_answer(number):
    solution = f"So 3 * 4 = 12 and then {number:,}\n#### {number:,}"
    assert one(NumericAnswer(extract="####"), solution, answer=solution) == 1
    assert one(NumericAnswer(extract="####"), f"#### {number + 1}", answer=solution) == 0


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("a\nb\nc", 1),
        ("a\n\n b \nc\n", 1),
        ("a\nx\nc", 2 / 3),
        ("a", 1 / 3),
        ("b\nc", 0),
        ("a\nb\nc\nd", 3 / 4),
        ("", 0),
    ],
)
def test_lines_correct(completion, value):
    assert one(LinesCorrect(), completion, answer="a\nb\nc") == pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"a": 1, "b": [1, 2]}', 1), ('{"b": [1, 2], "a": 1.0}', 1), ('{"a": 1}', 0.5),
        ('{"a": "1", "b": [1, 2]}', 0.5),
        ('{"a": 1, "b": [2, 1]}', 0.5), ('{"a": 1, "b": [1, 2], "c": 0}', 2 / 3), ("[1]", 0), ("a: 1", 0), ("", 0),
    ],
)  # fmt: skip
def test_fields_correct(completion, value):
    for reference in ({"a": 1, "b": [1, 2]}, '{"a": 1, "b": [1, 2]}'):
        assert one(FieldsCorrect(), completion, answer=reference) == pytest.approx(value)


def test_fields_of_a_reference_that_json_writes_otherwise():
    reference = {"a": (1, 2), "b": np.int64(3), 4: np.array([0.5])}
    assert one(FieldsCorrect(), '{"a": [1, 2], "b": 3, "4": [0.5]}', answer=reference) == 1
    with pytest.raises(InvalidInputError, match="no JSON object"):
        one(FieldsCorrect(), "{}", answer={"a": {1, 2}})


TASKS = ["chain_sum", "mini_sudoku", "spell_backward", "leg_counting", "palindrome_generation", "products", "gcd",
         "letter_counting", "word_sorting", "maze", "countdown", "base_conversion", "sudoku"]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym_gives_the_reference_its_maximum(task):
    import reasoning_gym

    reward = ReasoningGymScore()
    for entry in reasoning_gym.create_dataset(task, size=3, seed=4):
        right, wrong = f"<answer>{entry['answer']}</answer>", "<answer>no idea</answer>"
        values = reward(["q"] * 3, [right, wrong, "nothing"], entry=[entry] * 3)
        assert values[0] == 1.0
        assert values[1] < 0.5
        assert values[2] < 0.5


def test_reasoning_gym_entry_as_json_with_task_column():
    entry = {"answer": "7", "metadata": json.dumps({"x": 1})}
    reward = ReasoningGymScore()
    assert reward(["q"], ["<answer>7</answer>"], entry=[json.dumps(entry)], task=["chain_sum"]) == [1.0]
    with pytest.raises(UnknownNameError, match="no task 'chain_summ'; did you mean 'chain_sum'"):
        reward(["q"], ["<answer>7</answer>"], entry=[entry], task=["chain_summ"])


def test_reasoning_gym_tells_a_broken_entry_from_an_odd_answer():
    entry = {"answer": "1 2\n2 1", "metadata": {"source_dataset": "mini_sudoku"}}  # the scorer needs the solution
    with pytest.raises(InvalidInputError, match="cannot score 'mini_sudoku': KeyError"):
        one(ReasoningGymScore(), "<answer>1 2</answer>", entry=entry)
