from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import UnknownNameError
from polyreward.tasks.tools import TOOLS, ToolBox, ToolError, calculate, final_answer, search, text_of

BOX = ToolBox(TOOLS)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12+7-3", "16"),
        ("3*4-2", "10"),
        ("-(2+3)*2", "-10"),
        ("7//2", "3"),
        ("7%4", "3"),
        (" 5 ", "5"),
        ("2*10+3*6", "38"),
    ],
)
def test_calculator_knows_integer_arithmetic(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1/2",
        "2**9",
        "1.5",
        "True",
        "abs(3)",
        "__import__('os')",
        "1+",
        "9" * 30,
        "1//0",
        "(" * 150,
        "01",
        "x",
        "1+" * 150 + "1",
    ],
)
def test_calculator_refuses_everything_else(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.data())
def test_calculator_agrees_with_a_running_sum(terms: list[int], data: st.DataObject) -> None:
    total, text = terms[0], str(terms[0])
    for term in terms[1:]:
        plus = data.draw(st.booleans())
        total += term if plus else -term
        text += f"{'+' if plus else '-'}{term}"
    assert calculate(text) == str(total)


def test_search_knows_every_animal_of_the_task() -> None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    assert search("Praying Mantis") == "6"
    assert [search(name.title()) for name in ANIMALS] == [str(legs) for legs in ANIMALS.values()]
    with pytest.raises(ToolError):
        search("Unicorn")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<calc>2+2</calc>", "<result>4</result>"),
        ("so <search>Cat</search>", "<result>4</result>"),
        ("<calc>2+2</calc> ", None),
        ("<calc>1</calc><result>1</result><calc>2*3</calc>", "<result>6</result>"),
        ("</calc>", "<result>error</result>"),
        ("<calc>two</calc>", "<result>error</result>"),
        ("<search>2+2</search>", "<result>error</result>"),
        ("plain", None),
    ],
)
def test_environment_answers_a_complete_call_at_the_end(text: str, answer: str | None) -> None:
    assert BOX.respond(text) == answer


def test_only_answered_calls_count() -> None:
    assert BOX.calls("<calc>1</calc><result>1</result><search>Cat</search><result>4</result><calc>2</calc>") == 2
    assert ToolBox.of(["calc"]).calls("<search>Cat</search><result>4</result>") == 0


def test_a_misspelt_tool_is_named() -> None:
    with pytest.raises(UnknownNameError, match="no tool 'clac'; did you mean 'calc'"):
        ToolBox.of(["clac"])


def test_final_answer_is_the_last_one_of_text_or_messages() -> None:
    assert final_answer("<answer>1</answer> no, <answer> 2 </answer>") == "2"
    assert final_answer([{"role": "assistant", "content": "<answer>x</answer>"}]) == "x"
    assert final_answer("2") is None
    assert text_of([{"role": "assistant", "content": None}]) == ""
