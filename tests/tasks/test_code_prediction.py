import json

import numpy as np
import pyarrow as pa
import pytest

from polyreward.data.code_mutation import CodeMutator, compiles
from polyreward.errors import InvalidInputError
from polyreward.rewards.execution_prediction import ExecutionPredictionReward, execute_programs
from polyreward.tasks.code_prediction import (
    SUPPORTED_ERRORS,
    ForwardTask,
    LineInfillTask,
    PredictionTasks,
    Snippet,
    fenced,
    ground_truths,
    reference_answer,
    supported_error,
)

TRUTH = {"stdout": "3\n", "stderr": ""}
PROGRAMS = [
    "x = 1 + 2\nprint(x)\n",
    "values = [1, 2, 3]\nfor v in values:\n    print(v * 2)\nprint('end', end='')\n",
    "def f(a):\n    return a[5]\n\nprint(len('```'))\nf([1])\n",
    'if __name__ == "__main__":\n    print("```py\\nx\\n````")\n    print(int("a"))\n',
    "import sys\nprint(input() + sys.argv[1])\nprint('\\n', file=sys.stderr)\n",
    "print('\\n\\n')",
    "pass",
]


def run(snippets):
    return execute_programs(snippets)


def test_supported_errors_are_the_seven_of_the_paper():
    for name in ("Syntax", "Index", "Value", "Name", "Type", "Key", "ZeroDivision"):
        assert supported_error(f"Traceback\n{name}Error: x")
    assert supported_error("Zero division error")
    assert supported_error("")
    assert supported_error("Traceback\nStopIteration")
    for text in ("AttributeError: x", "ModuleNotFoundError: x", "main.py:1: SyntaxWarning: x", "ERROR"):
        assert not supported_error(text)
    assert supported_error("AttributeError: x", ("attribute",))
    assert len(SUPPORTED_ERRORS) == 7


@pytest.mark.slow
def test_truth_comes_from_running_twice():
    codes = [
        "print(1 + 2)",
        "print({}['k'])",
        "while True:\n    pass",
        "import time\nprint(time.perf_counter_ns())",
        "print(object())",
        "import missing_module",
        "import os\nos.abort()",
        "print({'b', 'a', 'c'})",
    ]

    def quick(snippets):
        return execute_programs(snippets, seconds=1.0)

    checked = ground_truths([Snippet(code) for code in codes], quick)
    assert [c.reason for c in checked] == [
        "", "", "timeout", "not deterministic", checked[4].reason, "unsupported error", "killed", ""
    ]  # fmt: skip
    assert checked[0].truth == {"stdout": "3\n", "stderr": ""}
    assert checked[1].truth["stderr"].endswith("KeyError: 'k'\n")
    assert 'File "main.py", line 1' in checked[1].truth["stderr"]
    assert ground_truths([Snippet("import missing_module")], run, errors=None)[0].truth is not None
    assert ground_truths([], run) == []


def test_bad_runs_are_refused():
    with pytest.raises(InvalidInputError, match="0 outcomes for 2 programs"):
        ground_truths([Snippet("")], lambda snippets: [])
    with pytest.raises(InvalidInputError, match="repeats"):
        ground_truths([Snippet("")], run, repeats=0)
    for task in (ForwardTask(), LineInfillTask()):
        with pytest.raises(InvalidInputError, match="needs the truth"):
            task.build("x = 1")
        with pytest.raises(InvalidInputError, match="no texts"):
            task.build("x = 1", {"stdout": "a"})


def test_a_forward_prompt_shows_everything_but_the_answer():
    item = ForwardTask().build(Snippet("import sys\nprint(sys.argv[1], input())\n", "in put\n", ("a b",)), TRUTH)
    for part in ("print(sys.argv[1], input())", "main.py", "python main.py 'a b'", "in put", "answer_stdout"):
        assert part in item.prompt
    assert item.truth == TRUTH
    assert (item.meta["task"], item.meta["arguments"], item.meta["masked"]) == ("forward", ["a b"], 0)


def test_a_backward_prompt_hides_its_lines():
    code = "secret = 1 + 2\n\nprint(secret)\n"
    seen = set()
    for seed in range(20):
        prompt, truth, meta = LineInfillTask().build(code, TRUTH, np.random.default_rng(seed))
        (line,) = meta["lines"]
        seen.add(line)
        assert meta["code"].split("\n").count("MASKED_LINE_0") == 1
        assert meta["code"].replace("MASKED_LINE_0", line) == code
        assert line not in prompt
        assert "```stdout\n3\n```" in prompt
        assert truth == TRUTH
    assert seen == {"secret = 1 + 2", "print(secret)"}


def test_the_number_of_masked_lines_is_uniform_and_never_more_than_there_are():
    code = "\n".join(f"x{i} = {i}" for i in range(12))
    rng, task = np.random.default_rng(0), LineInfillTask(max_lines=4)
    counts = np.bincount([task.build(code, TRUTH, rng).meta["masked"] for _ in range(800)], minlength=5)
    assert counts[0] == 0
    assert (abs(counts[1:] - 200) < 50).all()
    many = LineInfillTask(max_lines=11).build(code, TRUTH, 3)
    assert sorted(many.meta["lines"], key=code.index) == many.meta["lines"]
    assert {LineInfillTask(max_lines=9).build("a\n\nb", TRUTH, s).meta["masked"] for s in range(30)} == {1, 2}
    with pytest.raises(InvalidInputError, match="max_lines"):
        LineInfillTask(max_lines=0)


def test_programs_that_cannot_be_masked():
    assert LineInfillTask().build("\n \n", TRUTH) is None
    assert LineInfillTask().build("print('MASKED_LINE_0')", TRUTH) is None


def test_fences_are_longer_than_what_they_hold():
    assert fenced("t", "a\n") == "```t\na\n```"
    assert fenced("t", "a") == "```t\na\n```"
    assert fenced("t", "") == "```t\n```"
    assert fenced("t", "\n") == "```t\n\n\n```"
    assert fenced("t", "a\n\n") == "```t\na\n\n\n```"
    assert fenced("t", "x ```` y") == "`````t\nx ```` y\n`````"


def test_the_reference_answer_earns_the_maximum():
    snippets = [Snippet(code, "in\n", ("put",)) for code in PROGRAMS]
    items = []
    for snippet, checked in zip(snippets, ground_truths(snippets, run), strict=True):
        assert checked.truth is not None
        items.append(ForwardTask().build(snippet, checked.truth))
        items += [LineInfillTask(max_lines=3).build(snippet, checked.truth, seed) for seed in range(4)]
    items = [item for item in items if item is not None]
    columns = {"truth": [item.truth for item in items], "meta": [item.meta for item in items]}
    values = ExecutionPredictionReward()(None, [reference_answer(item) for item in items], **columns)
    assert values == pytest.approx([0.775] * len(items))
    frame = pa.table(columns).to_pandas()
    again = ExecutionPredictionReward()(
        None, [reference_answer(i) for i in items], truth=frame["truth"], meta=frame["meta"]
    )
    assert again == values
    assert json.loads(json.dumps(columns)) == columns


def test_more_than_ten_masked_lines_are_put_back():
    code = "\n".join(f"print({i})" for i in range(12)) + "\n"
    task = LineInfillTask(run, max_lines=12)
    item = next(i for s in range(100) if (i := task.build(code, {"stdout": "", "stderr": ""}, s)).meta["masked"] == 12)
    truth = ground_truths([Snippet(code)], run)[0].truth
    assert ExecutionPredictionReward()(
        None, [reference_answer(item)], truth=[truth], meta=[item.meta]
    ) == pytest.approx([0.775])


def test_tasks_with_their_own_run():
    assert ForwardTask(run).build("print(1 / 0)").truth["stderr"].endswith("ZeroDivisionError: division by zero\n")
    assert ForwardTask(run).build("import os\nprint(os.urandom(4))") is None
    assert LineInfillTask(run).build("print(3)").truth == TRUTH


def test_a_supply_of_tasks():
    mutator = CodeMutator(0.3, 0)
    tasks = PredictionTasks(PROGRAMS, run, mutator.mutate, mutator.mutate_stdin, forward=0.5)
    drawn = tasks.draw(80, np.random.default_rng(0))
    assert len(drawn.items) == 80
    kinds = [item.meta["task"] for item in drawn.items]
    assert 24 < kinds.count("forward") < 56
    changed = {item.meta["code"] for item in drawn.items if item.meta["task"] == "forward"}
    assert changed - set(PROGRAMS)
    assert all(compiles(code) for code in changed)
    assert all(supported_error(item.truth["stderr"]) for item in drawn.items)
    assert all(
        i.meta["task"] == "forward"
        for i in PredictionTasks(PROGRAMS[:2], run, forward=1).draw(9, np.random.default_rng(0)).items
    )


@pytest.mark.slow
def test_a_supply_without_usable_programs_says_why():
    def quick(snippets):
        return execute_programs(snippets, seconds=0.5)

    with pytest.raises(InvalidInputError, match=r"0 of 1 tasks after 2 rounds.*'timeout': 2"):
        PredictionTasks(["while True: pass"], quick, rounds=2).draw(1, np.random.default_rng(0))
    with pytest.raises(InvalidInputError, match="does not compile"):
        PredictionTasks(["x = ("], quick, lambda code: None, rounds=2).draw(1, np.random.default_rng(0))
    with pytest.raises(InvalidInputError, match="at least one snippet"):
        PredictionTasks([], quick)
    with pytest.raises(InvalidInputError, match="forward must be in"):
        PredictionTasks(["x"], quick, forward=2)
