import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.contract import Sample
from polyreward.rewards.schedules import TwoStage
from polyreward.rewards.tool_calls import (
    ParseError,
    ToolCallReward,
    ToolFormatReward,
    ToolUseCost,
    count_calls,
    matches_format,
    parse_tool_calls,
    reference_calls,
    toolrl,
)
from polyreward.rewards.tool_matching import GRANULARITIES, ToolCall

ONE = '{"name": "f", "parameters": {"a": 1}}'
TWO = '{"name": "g", "parameters": {}}'
BOTH = f"<think>t</think>\n<tool_call>\n{ONE}\n{TWO}\n</tool_call>\n<response>r</response>"


def block(*lines):
    return "<think>t</think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def one(reward, completion, answer, **columns):
    return reward(["q"], [completion], answer=[answer], **columns)[0]


def test_parse_reads_one_call_a_line():
    assert parse_tool_calls(BOTH) == [ToolCall("f", {"a": 1}), ToolCall("g", {})]
    assert parse_tool_calls(block('{"name": "f", "parameters": {"a": 1, "a": 2}, "id": 5}')) == [
        ToolCall("f", {"a": 2})
    ]


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("nothing", "no <tool_call>", 0),
        ("<tool_call>\n" + ONE, "no </tool_call>", 0),
        (block(""), "the block is empty", 0),
        (block(ONE, "", TWO), "the line is not JSON", 2),
        (block("f(a=1)"), "the line is not JSON", 1),
        (block("[" * 100_000), "the line is not JSON", 1),
        (block(ONE, "5"), "the line is not an object", 2),
        (block('{"parameters": {}}'), "'name' is missing or not a text", 1),
        (block('{"name": 5, "parameters": {}}'), "'name' is missing or not a text", 1),
        (block('{"name": "f"}'), "'parameters' is missing or not an object", 1),
        (block('{"name": "f", "parameters": []}'), "'parameters' is missing or not an object", 1),
    ],
)
def test_unreadable_calls_give_a_reason_and_the_lower_limit(text, reason, line):
    assert parse_tool_calls(text) == ParseError(reason, line)
    assert one(ToolCallReward(), text, BOTH) == -3
    explained = ToolCallReward().explain(Sample(0, None, text, {"answer": BOTH}))
    assert explained.total == -3
    assert explained.reason == (f"line {line}: {reason}" if line else reason)


def test_reference_calls():
    assert reference_calls("<think>t</think>\n<response>r</response>") is None
    assert reference_calls([]) is None
    assert reference_calls([{"name": "f", "parameters": {}}, ToolCall("g")]) == [ToolCall("f"), ToolCall("g")]
    for bad in (block(""), block("x"), "<tool_call>", [{"name": "f"}], 5):
        with pytest.raises(InvalidInputError):
            reference_calls(bad)


def test_reference_without_a_call_earns_exactly_zero_whatever_the_model_does():
    for completion in (BOTH, "", "<think>t</think>\n<response>r</response>"):
        assert one(ToolCallReward(), completion, "<think>t</think>\n<response>r</response>") == 0
    assert ToolCallReward().explain(Sample(0, None, BOTH, {"answer": "no call"})) is None


def test_correctness_of_the_papers_example_from_text():
    def price(**places):
        return json.dumps({"name": "Get_Price", "parameters": places})

    gold = block(price(loc_1="ORD", loc_2="SFO"), price(loc_1="ORD", loc_2="LAX"))
    first = block(price(loc_1="ORD", loc_2="SFO"), price(loc_2="LAX"))
    flight = json.dumps({"name": "Get_Flight", "parameters": {"from": "ORD", "to": "SFO"}})
    second = block(flight, price(loc_1="ORD", loc_2="LAX"))
    values = ToolCallReward()(["q"] * 3, [gold, first, second], answer=[gold] * 3)
    assert values == pytest.approx([3, 6 * 5.5 / 7 - 3, -1])
    optimal = ToolCallReward(matching="optimal")
    assert optimal(["q"] * 3, [gold, first, second], answer=[gold] * 3)[2] == pytest.approx(-1 / 7)
    scaled = ToolCallReward(limits=(0, 1))
    assert scaled(["q"] * 3, [gold, first, second], answer=[gold] * 3) == pytest.approx([1, 5.5 / 7, 7 / 21])


@pytest.mark.parametrize(
    ("calls", "response", "text", "good"),
    [
        (False, True, "<think>t</think>\n<response>r</response>", True),
        (False, True, "<think>a\nb</think>\n<response>c\nd</response>\n", True),
        (False, True, "<think>t</think><response>r</response>", False),
        (False, True, "<think>t</think>\n\n<response>r</response>", False),
        (False, True, "x<think>t</think>\n<response>r</response>", False),
        (False, True, "<think>t</think>\n<response>r</response>x", False),
        (False, True, "<think>t</think>\n<response>r</response><response>r</response>", False),
        (False, True, "<think>t</think>\n<response>r</response>\n</response>", False),
        (True, False, block(ONE), True),
        (True, False, block("not json"), True),
        (True, False, "<think>t</think>\n<tool_call>" + ONE + "</tool_call>", False),
        (True, False, BOTH, False),
        (True, True, BOTH, True),
        (True, True, BOTH.replace("</tool_call>\n", "</tool_call>"), False),
        (False, False, "<think>t</think>", True),
        (False, False, "<think>t</think> more", False),
        (False, False, "t</think>", False),
        (False, True, BOTH, True),  # a call where none is wanted sits inside the thinking part of the pattern
    ],
)
def test_format(calls, response, text, good):
    if text == BOTH and not calls:
        good = matches_format(text, calls, response)
        assert good is False
        return
    assert matches_format(text, calls, response) is good


def test_format_is_inferred_from_the_reference():
    think, respond = "<think>t</think>", "<think>t</think>\n<response>r</response>"
    references = [think, respond, block(ONE), BOTH]
    for row, reference in enumerate(references):
        values = ToolFormatReward()(None, references, answer=[reference] * 4)
        assert values == [float(row == column) for column in range(4)]
    assert one(ToolFormatReward(), block(ONE), [{"name": "f", "parameters": {}}]) == 1


def test_limits_follow_the_training_step():
    class State:
        global_step = 30

    reward = toolrl("two_stage")
    wrong = block('{"name": "h", "parameters": {}}')
    assert reward(None, [BOTH, wrong], answer=[BOTH] * 2, step=0) == [2, -1]
    assert reward(None, [BOTH, wrong], answer=[BOTH] * 2, trainer_state=State()) == [3.5, -3]
    dynamic = toolrl("dynamic")
    assert dynamic(None, [BOTH, BOTH, ""], answer=[BOTH] * 3, step=[0, 75, 75]) == pytest.approx([4, 4, -3.5])
    with pytest.raises(MissingColumnError, match="limits that change with the step"):
        dynamic(None, [BOTH], answer=[BOTH])
    custom = ToolCallReward(limits=TwoStage((0, 1), (0, 2), switch=5))
    assert custom(None, [BOTH] * 2, answer=[BOTH] * 2, step=[4, 5]) == [1, 2]


def test_whole_reward_of_the_paper():
    assert one(toolrl(), BOTH, BOTH) == 4
    assert one(toolrl("equal"), BOTH, BOTH) == 2
    assert one(toolrl(), "<think>t</think>", BOTH) == -3
    lazy = f"{BOTH}\nx"
    assert one(toolrl(), lazy, BOTH) == 3
    long = BOTH.replace("<think>t", "<think>" + "w " * 256)
    assert one(toolrl(think_length="static"), long, BOTH) == 4.5
    assert one(toolrl(think_length="dynamic"), long, BOTH, step=[0]) == pytest.approx(4 + round(256 / 384, 2))
    with pytest.raises(InvalidInputError, match="think_length"):
        toolrl(think_length="long")
    assert toolrl().__name__ == "toolrl"


def test_advantages_of_a_group():
    batch = RewardBatch(torch.tensor([4.0, 2.7142857, 0.0, -3.0], dtype=torch.float64))
    advantages = compute_advantages(chain(WeightedSum(), Center("group"), Scale("group", epsilon=1e-6, ddof=1)), batch)
    assert advantages.tolist() == pytest.approx([0.9893, 0.5752, -0.2991, -1.2653], abs=1e-4)


def as_the_card_says(completion, answer, granularity):
    """Correctness in [-3, 3] in plain Python, after the description of the released code; greedy."""
    if "<tool_call>" not in answer:
        return 0.0
    gold = [json.loads(x) for x in answer.split("<tool_call>")[1].split("</tool_call>")[0].strip().split("\n")]
    try:
        assert "<tool_call>" in completion
        assert "</tool_call>" in completion
        inside = completion.split("<tool_call>")[1].split("</tool_call>")[0].strip()
        given = [json.loads(line) for line in inside.split("\n")]
        names, params = [call["name"] for call in given], [call["parameters"] for call in given]
    except (AssertionError, ValueError, KeyError, TypeError):
        return -3.0

    def jaccard(a, b):
        if a == b or granularity == "refined":
            return float(a == b)
        shared = sum(min(a.count(x), b.count(x)) for x in set(a))
        return shared / (len(a) + len(b) - shared) if a and b else 0.0

    if gold == given:
        return 3.0
    if granularity == "coarse":
        return -3.0
    score, largest, used = jaccard([call["name"] for call in gold], names), 1.0, set()
    for call in gold:
        largest += 1 if granularity == "intermediate" else 1 + len(call["parameters"])
        best, at = 0.0, None
        for i in range(len(given)):
            if i in used or names[i] != call["name"]:
                continue
            if granularity == "intermediate":
                m = float(given[i] == call)
            else:
                m = jaccard(list(call["parameters"]), list(params[i]))
                m += sum(k in params[i] and params[i][k] == v for k, v in call["parameters"].items())
            if m > best:
                best, at = m, i
        if at is not None:
            used.add(at)
            score += best
    return 6 * score / largest - 3


values = st.sampled_from([0, 1, 1.0, "1", True, None, [1, 2], [2, 1], {"x": 1}])
some_calls = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("fg"), "parameters": st.dictionaries(st.sampled_from("abc"), values, max_size=3)}
    ),
    min_size=1,
    max_size=3,
)
odd_lines = st.sampled_from(["5", "x", "", "null", '{"name": "f"}', '{"parameters": {}}', '{"name": "f", "name": "g"}'])


@given(some_calls, some_calls, st.one_of(st.none(), odd_lines), st.sampled_from(GRANULARITIES))
def test_correctness_equals_the_released_code(gold, predicted, odd, granularity):
    answer = block(*map(json.dumps, gold))
    completion = block(*map(json.dumps, predicted), *([] if odd is None else [odd, json.dumps(predicted[0])]))
    reward = ToolCallReward(granularity=granularity)
    assert one(reward, completion, answer) == pytest.approx(as_the_card_says(completion, answer, granularity))
    assert one(reward, answer, answer) == 3


def test_structured_calls_of_messages():
    def chat(*functions):
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": f} for f in functions]}
        ]

    gold = [{"name": "f", "parameters": {"a": 1}}]
    assert one(ToolCallReward(), chat({"name": "f", "arguments": {"a": 1}}), gold) == 3
    assert one(ToolCallReward(), chat({"name": "f", "arguments": '{"a": 1}'}), gold) == 3
    assert (
        one(ToolCallReward(), [{"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]}], gold) == 3
    )
    assert -3 < one(ToolCallReward(), chat({"name": "f", "arguments": {"a": 2}}), gold) < 3
    for broken in ({"name": "f", "arguments": "{"}, {"arguments": {}}, {"name": "f"}, "f"):
        assert one(ToolCallReward(), chat(broken), gold) == -3
    turns = [*chat({"name": "f", "arguments": {}}), {"role": "tool", "content": "<tool_call>\n1\n</tool_call>"}]
    assert count_calls(Sample(0, None, turns * 2, {})) == 2


def test_cost_of_calls():
    texts = ["no call", block(ONE), BOTH, BOTH + BOTH, "<tool_call>\nbroken", block("")]
    assert [count_calls(Sample(0, None, text, {})) for text in texts] == [0, 1, 2, 4, 1, 0]
    assert ToolUseCost(0.5)(None, texts) == [0, -0.5, -1, -2, -0.5, 0]
    assert ToolUseCost(0.5, free=1, most=3)(None, texts) == [0, 0, -0.5, -1, 0, 0]
    assert math.copysign(1, ToolUseCost()(None, ["x"])[0]) == 1
    for options in (
        {"cost": -1},
        {"cost": math.nan},
        {"cost": math.inf},
        {"cost": "x"},
        {"free": -1},
        {"free": math.nan},
        {"free": 3, "most": 2},
        {"most": math.inf},
    ):
        with pytest.raises(InvalidInputError):
            ToolUseCost(**options)
