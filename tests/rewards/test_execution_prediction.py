import itertools
import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.execution_prediction import (
    PARTS,
    ExecutionPredictionReward,
    ExecutionReward,
    answer_block,
    codeboost,
    execute_programs,
    fill_masked_lines,
    line_multiset_iou,
    normalise_stderr,
    same_output,
)

LINES = st.lists(st.sampled_from(["a", "b", "", " c"]), max_size=6)
CLEAN = {"stdout": "3\n", "stderr": ""}


def blocks(**content):
    return "\n".join(f"```answer_{tag}\n{text}\n```" for tag, text in content.items())


@pytest.mark.parametrize(
    ("stdout", "stderr", "reward"),
    [
        ("3\n", "T\nF", 0.775),  # c 1, IoU 1, fmt 1
        ("4\n", "T\nF", 0.325),  # c 0, IoU 1, fmt 1
        ("3\n", None, 0.5),  # c 1, IoU 0, fmt 1/2
        ("4\n", "T", 0.2125),  # c 0, IoU 1/2, fmt 1
        (None, None, 0.0),
    ],
)
def test_reward_table(stdout, stderr, reward):
    parts = ExecutionReward()({"stdout": "3\n", "stderr": "T\nF"}, {"stdout": stdout, "stderr": stderr})
    assert parts["overall"] == pytest.approx(reward, abs=1e-12)


def test_worked_example():
    parts = ExecutionReward()({"stdout": "3\n", "stderr": "T\nF\nE"}, {"stdout": "3", "stderr": "T\nE"})
    assert parts == pytest.approx(
        {"overall": 0.7, "format": 1.0, "accuracy": 2 / 3, "stdout": 1.0, "stderr": 1 / 3}, abs=1e-12
    )


def test_iou_of_the_worked_examples():
    assert line_multiset_iou("a\na", "a") == 0.5
    assert line_multiset_iou("", "") == 1
    assert line_multiset_iou("a", "") == 0
    assert line_multiset_iou(["a", "b"], "b\na\n") == 1
    assert line_multiset_iou("T\nF\nE", "T\nE") == pytest.approx(2 / 3)


@given(LINES, LINES, st.randoms())
def test_iou_equals_a_plain_count_and_is_symmetric_and_blind_to_order(first, second, shuffler):
    value = line_multiset_iou(first, second)
    assert value == line_multiset_iou(second, first)
    assert 0 <= value <= 1
    shuffled = list(first)
    shuffler.shuffle(shuffled)
    assert line_multiset_iou(shuffled, second) == value
    one, other = Counter(first), Counter(second)
    names = set(one) | set(other)
    union = sum(max(one[n], other[n]) for n in names)
    assert value == (sum(min(one[n], other[n]) for n in names) / union if union else 1)
    assert line_multiset_iou(first, first) == 1


@given(LINES, LINES, st.sampled_from(["3\n", "3", "\n3\n", "4", None]), st.booleans(), st.booleans())
def test_reward_equals_a_plain_reading_of_the_paper(true_lines, lines, stdout, missing, rescale):
    truth = {"stdout": "3\n", "stderr": "\n".join(true_lines)}
    answer = {"stdout": stdout, "stderr": None if missing else "\n".join(lines)}
    for count_stderr in (True, False):
        present = sum(value is not None for value in answer.values()) / 2
        c = 1.0 if stdout in ("3\n", "3", "\n3\n", "3\n\n") else 0.0
        e = 0.0 if missing else 0.5 * line_multiset_iou(truth["stderr"], answer["stderr"])
        accuracy = (c + e) / 2 if count_stderr else c
        if rescale and count_stderr:
            accuracy /= 0.75
        expected = 0.0 if present == 0 else 0.9 * accuracy + 0.1 * present
        got = ExecutionReward(reward_stderr=count_stderr, rescale=rescale)(truth, answer)
        assert got["overall"] == pytest.approx(expected)


def test_a_perfect_answer_earns_one_after_rescaling():
    for options in ({"rescale": True}, {"reward_stderr": False}, {"rescale": True, "reward_stderr": False}):
        assert ExecutionReward(**options)(CLEAN, CLEAN)["overall"] == pytest.approx(1)
    assert ExecutionReward(0.25, 1.0)(CLEAN, CLEAN)["overall"] == pytest.approx(1)


def test_one_newline_at_either_end_does_not_count():
    for answer in ("3", "3\n", "\n3\n", "3\n\n"):
        assert same_output("3\n", answer)
        assert same_output(answer, "3\n")
    for answer in ("", "3\n\n\n", " 3\n", "\n\n3\n", "3 ", "\n3"):
        assert not same_output("3\n", answer)


def test_saying_nothing_has_a_floor():
    assert ExecutionReward().silent(CLEAN) == pytest.approx(0.325)
    assert ExecutionReward().silent({"stdout": "", "stderr": ""}) == pytest.approx(0.775)
    assert ExecutionReward().silent({"stdout": "", "stderr": "E"}) == pytest.approx(0.55)


def test_tags_serve_as_keys_and_other_values_are_missing_blocks():
    parts = ExecutionReward()(CLEAN, {"answer_stdout": "3", "answer_stderr": ""})
    assert parts["overall"] == pytest.approx(0.775)
    assert ExecutionReward()(CLEAN, {"stdout": 3, "stderr": ["x"]})["overall"] == 0
    assert ExecutionReward()(CLEAN, CLEAN, format=0.5)["overall"] == pytest.approx(0.725)
    assert ExecutionReward()(CLEAN, {}, format=1)["overall"] == pytest.approx(0.1)
    assert ExecutionReward()(CLEAN, CLEAN, format=0) == dict.fromkeys(PARTS, 0.0)


def test_bad_settings_and_truths():
    for options in ({"format_weight": 1.5}, {"format_weight": float("nan")}, {"stderr_weight": -1}):
        with pytest.raises(InvalidInputError, match="format_weight must be in"):
            ExecutionReward(**options)
    for truth in ({}, {"stdout": "a"}, {"stdout": "a", "stderr": None}):
        with pytest.raises(InvalidInputError, match="expected a text"):
            ExecutionReward()(truth, {})
    with pytest.raises(InvalidInputError, match="format must be in"):
        ExecutionReward()(CLEAN, CLEAN, format=2)
    with pytest.raises(InvalidInputError, match="pick must be"):
        ExecutionPredictionReward(pick="longest")
    with pytest.raises(InvalidInputError, match="seconds must be positive"):
        ExecutionPredictionReward(seconds=0)


def test_blocks_by_position_and_as_released():
    text = "\n".join([blocks(x="b"), blocks(x="a"), blocks(x="aa")])
    assert answer_block(text, "answer_x", "first") == "b"
    assert answer_block(text, "answer_x") == "aa"
    assert answer_block(text, "answer_x", "released") == "b"
    assert answer_block(text, "answer_y") is None
    assert answer_block("```answer_x\nno end", "answer_x") is None


def test_what_a_block_holds():
    assert answer_block("```t\n```", "t") == ""
    assert answer_block("```t\n\n```", "t") == ""
    assert answer_block("```t\n\n\n```", "t") == "\n"
    assert answer_block("``` t\nx\n```", "t") is None
    assert answer_block("```t  \nx\n```", "t") == "x"
    assert answer_block("```t\r\nx\n```", "t") == "x"
    assert answer_block("```t\n    x = 1  \n```", "t") == "    x = 1  "
    assert answer_block("```t\nx```", "t") == "x"
    assert answer_block("````t\na ``` b\n````", "t") == "a ``` b"
    assert answer_block("```t\nx\n  \n```", "t", "released") == "x"
    assert answer_block("```t\n\n\n    x\n```", "t", "released") == "    x"


def test_a_tag_is_no_prefix_of_another():
    text = blocks(MASKED_LINE_10="ten", MASKED_LINE_1="one")
    assert answer_block(text, "answer_MASKED_LINE_1") == "one"
    assert answer_block(text, "answer_MASKED_LINE_1", "released") == "one"


@pytest.mark.parametrize("text", ["`" * 50_000, "```t\n" * 20_000, "```t" * 20_000, "```t" + " " * 50_000])
def test_hostile_texts_are_read_in_no_time(text):
    for pick in ("last", "first", "released"):
        answer_block(text, "t", pick)


def test_masked_lines_are_filled_all_at_once():
    code = "\n".join(f"MASKED_LINE_{k}" for k in range(11)) + "\nx = 'MASKED_LINE_1'"
    filled = fill_masked_lines(code, ["MASKED_LINE_1", None, *map(str, range(2, 11))])
    assert filled.split("\n") == [
        "MASKED_LINE_1", "MASKED_LINE_1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "x = 'MASKED_LINE_1'"
    ]  # fmt: skip
    every = fill_masked_lines(code, [f"line {k}" for k in range(11)])
    assert every.split("\n") == [*(f"line {k}" for k in range(11)), "x = 'MASKED_LINE_1'"]
    assert fill_masked_lines("for i in x:\nMASKED_LINE_0\n", ["    print(i)"]) == "for i in x:\n    print(i)\n"


def test_stderr_without_what_depends_on_the_machine():
    text = (
        'Traceback (most recent call last):\n  File "/tmp/a b/main.py", line 1, in <module>\n'
        '  File "/usr/lib/python3.11/json/__init__.py", line 2\n  File "/v/site-packages/x/y.py", line 3\n'
        '  File "C:\\lib\\main.py", line 4\n  File "<string>", line 5\n<f at 0x7f3a5c0d1e80> 0xff\n'
    )
    plain = normalise_stderr(text)
    assert plain == (
        'Traceback (most recent call last):\n  File "main.py", line 1, in <module>\n'
        '  File "json/__init__.py", line 2\n  File "x/y.py", line 3\n'
        '  File "main.py", line 4\n  File "<string>", line 5\n<f at 0x0> 0xff\n'
    )
    assert normalise_stderr(plain) == plain


FORWARD = {"task": "forward", "code": "print(3)", "stdin": "", "arguments": [], "masked": 0, "lines": []}


def test_forward_completions():
    texts = [
        blocks(stdout="3", stderr=""),
        blocks(stdout="4", stderr=""),
        blocks(stdout="3"),
        "no block",
        blocks(stdout="", stderr=""),
        [{"role": "assistant", "content": blocks(stdout="3", stderr="")}],
        "x",
    ]
    truth = [CLEAN] * 6 + [None]
    reward = ExecutionPredictionReward()
    values = reward(None, texts, truth=truth, meta=[FORWARD] * 7)
    assert values == pytest.approx([0.775, 0.325, 0.5, 0, 0.325, 0.775, None])
    parts = reward.explain(None, texts, truth=truth, meta=[FORWARD] * 7)
    np.testing.assert_array_equal(parts["silent"], [0, 0, 0, 0, 1, 0, np.nan])
    np.testing.assert_allclose(parts["floor"], [0.325] * 6 + [np.nan])
    np.testing.assert_array_equal(parts["stdout"], [1, 0, 1, 0, 0, 1, np.nan])
    assert reward(None, []) == []
    assert reward.__name__ == "execution_prediction_reward"


def test_plain_options():
    assert codeboost() == ExecutionPredictionReward()
    scored = codeboost(rescale=True, pick="first", seconds=2.0)
    assert scored == ExecutionPredictionReward(ExecutionReward(rescale=True), "first", 2.0)
    assert scored(None, [blocks(stdout="3", stderr="")], truth=[CLEAN], meta=[FORWARD]) == pytest.approx([1.0])


def test_paths_of_the_machine_do_not_count():
    text = 'Traceback (most recent call last):\n  File "{}main.py", line 1, in <module>\nNameError: x'
    truth = {"stdout": "", "stderr": text.format("/tmp/run/")}
    answer = blocks(stdout="", stderr=text.format("/home/me/"))
    assert ExecutionPredictionReward()(None, [answer], truth=[truth], meta=[FORWARD]) == pytest.approx([0.775])


def backward(code, masked=1, **more):
    return FORWARD | {"task": "backward", "code": code, "masked": masked} | more


def test_backward_completions_are_run():
    code = "a, b = 1, 2\nMASKED_LINE_0\nprint(c)\n"
    texts = [
        blocks(MASKED_LINE_0=line) for line in ("c = a + b", "c = b + a", "c = 3", "c = 4", "c = ", "while True: pass")
    ]
    rows = len(texts) + 1
    values = ExecutionPredictionReward(seconds=1.0)(
        None, [*texts, "nothing"], truth=[CLEAN] * rows, meta=[backward(code)] * rows
    )
    # A wrong number keeps stderr right; a syntax error shares no line of stderr; what does not end keeps its format.
    assert values == pytest.approx([0.775, 0.775, 0.775, 0.325, 0.1, 0.1, 0])


def test_backward_reads_stdin_arguments_and_several_lines():
    code = "import sys\nMASKED_LINE_0\nMASKED_LINE_1\n"
    texts = [
        blocks(MASKED_LINE_0="x = input()", MASKED_LINE_1="print(x + sys.argv[1])"),
        blocks(MASKED_LINE_0="x = input()"),
    ]
    truth = [{"stdout": "ab\n", "stderr": ""}] * 2
    values = ExecutionPredictionReward()(
        None, texts, truth=truth, meta=[backward(code, 2, stdin="a\n", arguments=["b"])] * 2
    )
    assert values == pytest.approx([0.775, 0.05])


def test_one_call_of_the_sandbox_a_batch():
    calls = []

    class Counting:
        def execute(self, scripts):
            from polyreward.rewards.execution import shared_sandbox

            calls.append(len(scripts))
            return shared_sandbox().execute(scripts)

    reward = ExecutionPredictionReward(sandbox=Counting())
    text, meta = blocks(MASKED_LINE_0="print(3)"), backward("MASKED_LINE_0")
    assert reward(None, [text] * 3, truth=[CLEAN] * 3, meta=[meta] * 3) == pytest.approx([0.775] * 3)
    assert calls == [3]
    assert reward(None, [blocks(stdout="3")], truth=[CLEAN], meta=[FORWARD]) == pytest.approx([0.5])
    assert calls == [3]


def test_execute_programs_normalises_stderr():
    @dataclass(frozen=True)
    class Plain:
        code: str
        stdin: str = ""
        arguments: tuple = ()

    first, second = execute_programs([Plain("print(input())", "hi\n"), Plain("1 // 0")])
    assert (first.status, first.stdout, first.stderr) == ("finished", "hi\n", "")
    assert 'File "main.py", line 1' in second.stderr
    assert second.stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert execute_programs([]) == []


@pytest.mark.parametrize(
    ("truth", "meta", "message"),
    [
        ({"stdout": "a"}, FORWARD, "column 'truth', row 1.*no texts"),
        ("a", FORWARD, "column 'truth', row 1"),
        (CLEAN, {"task": "sideways"}, "column 'meta', row 1.*no 'task'"),
        (CLEAN, "forward", "column 'meta', row 1"),
        (CLEAN, {"task": "backward", "code": "x", "masked": 0}, "row 1: 'masked' is 0"),
        (CLEAN, {"task": "backward", "code": None, "masked": 1}, "row 1: 'code' is None"),
    ],
)
def test_wrong_references_name_column_and_row(truth, meta, message):
    with pytest.raises(InvalidInputError, match=message):
        ExecutionPredictionReward()(None, ["a", "b"], truth=[CLEAN, truth], meta=[FORWARD, meta])


def test_missing_columns():
    with pytest.raises(MissingColumnError, match="'meta'"):
        ExecutionPredictionReward()(None, ["a"], truth=[CLEAN])


def test_columns_from_a_table_and_pickling():
    table = pa.table(
        {"truth": [CLEAN, CLEAN], "meta": [FORWARD, backward("MASKED_LINE_0", arguments=["x"])]}
    ).to_pandas()
    texts = [blocks(stdout="3", stderr=""), blocks(MASKED_LINE_0="print(3)")]
    reward = pickle.loads(pickle.dumps(ExecutionPredictionReward()))
    assert reward(None, texts, truth=table["truth"].tolist(), meta=table["meta"].tolist()) == pytest.approx([0.775] * 2)


def test_whatever_a_model_writes_earns_a_value():
    texts = [None, 5, "", "```answer_stdout", "```answer_stdout\n```" * 3, "\0", "é" * 10, [{"content": None}]]
    for meta in (FORWARD, backward("MASKED_LINE_0")):
        values = ExecutionPredictionReward()(None, texts, truth=[CLEAN] * len(texts), meta=[meta] * len(texts))
        assert all(0 <= value <= 0.775 for value in values)


def test_what_a_model_fills_in_earns_a_value():
    lines = ["\0", "\ud800", "import os; os._exit(3)", "x = " + "(" * 500, "raise SystemExit(2)", "é = 1"]
    texts = [blocks(MASKED_LINE_0=line) for line in lines]
    values = ExecutionPredictionReward()(
        None, texts, truth=[CLEAN] * len(lines), meta=[backward("MASKED_LINE_0")] * len(lines)
    )
    assert all(0.1 <= value <= 0.325 + 1e-9 for value in values)


def test_order_of_a_batch_does_not_matter():
    items = [
        (blocks(stdout="3", stderr=""), FORWARD),
        (blocks(MASKED_LINE_0="print(3)"), backward("MASKED_LINE_0")),
        (blocks(MASKED_LINE_0="print(4)"), backward("MASKED_LINE_0")),
    ]
    known = dict(zip(range(3), (0.775, 0.775, 0.325), strict=True))
    for order in itertools.permutations(range(3)):
        texts, metas = zip(*(items[i] for i in order), strict=True)
        values = ExecutionPredictionReward()(None, list(texts), truth=[CLEAN] * 3, meta=list(metas))
        assert values == pytest.approx([known[i] for i in order])
