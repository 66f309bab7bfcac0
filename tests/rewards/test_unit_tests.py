import json
import pickle
import warnings

import numpy as np
import pytest

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.rewards.execution import AssertTest, Limits, OutputTest, Sandbox
from polyreward.rewards.unit_tests import SuiteTest, UnitTestReward, code_of, tests_of


@pytest.fixture(scope="module")
def sandbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without bubblewrap it says what is weaker
        made = Sandbox()
        yield made
        made.close()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```py\na\n```\ntext\n```python3\nb\n```", "b\n"),
        ("so ```Python\na\n```", "a\n"),
        ("```python\na\n```\n```cpp\nint b;\n```", "a\n"),
        ("```cpp\nint b;\n```", ""),
        ("no code, `a` or ```b```", ""),
        ("```python\na = 1", ""),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\n```", ""),
        ("", ""),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint(1)```\nthen", "print(1)"),
        ("```python\ns = '```'; t = 1\n```", "s = '```'; t = 1\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("1. do\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("```python title=x.py\na\n```", "a\n"),
        ("```a\n" * 3, ""),
    ],
)
def test_code_of(text, code):
    assert code_of(text) == code


def test_code_of_options():
    text = "```python\na\n```\n```cpp\nb\n```\n```\nc\n```"
    assert code_of(text) == "c\n"
    assert code_of(text, which="first") == "a\n"
    assert code_of("```cpp\nb\n```", "cpp") == "b\n"


def test_code_of_takes_time_in_proportion_to_the_text():
    assert code_of("x ```a\n" * 40_000) == ""
    assert code_of("`" * 200_000) == ""


LISTED = {"inputs": ["1", "2"], "outputs": ["3", "4"], "tier": "edge"}
FORMS = [
    (["assert f(1)"], [SuiteTest(AssertTest("assert f(1)"))]),
    ("assert f(1)", [SuiteTest(AssertTest("assert f(1)"))]),
    ({"code": "assert f(1)", "name": "n", "tier": "basic"}, [SuiteTest(AssertTest("assert f(1)", "n"), "basic")]),
    (
        {"code": "def check(c):\n    assert c(1)", "entry_point": "f"},
        [SuiteTest(AssertTest("def check(c):\n    assert c(1)", None, "f"))],
    ),
    ({"stdin": "1", "stdout": "2"}, [SuiteTest(OutputTest("1", "2"))]),
    ({"stdout": "2"}, [SuiteTest(OutputTest("", "2"))]),
    ({"input": "1", "output": "2", "type": "x", "label": "high"}, [SuiteTest(OutputTest("1", "2"), "high")]),
    ({"input": "1", "output": "2", "label": None, "code": None}, [SuiteTest(OutputTest("1", "2"))]),
    (LISTED, [SuiteTest(OutputTest("1", "3"), "edge"), SuiteTest(OutputTest("2", "4"), "edge")]),
    (
        ["assert 1", LISTED],
        [SuiteTest(AssertTest("assert 1")), *(SuiteTest(OutputTest(i, o), "edge") for i, o in ("13", "24"))],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "expected"), FORMS)
def test_tests_of(reference, expected):
    assert list(tests_of(reference)) == expected
    if not isinstance(reference, str):
        assert list(tests_of(json.dumps(reference))) == expected
    if isinstance(reference, dict):
        assert list(tests_of([json.dumps(reference)])) == expected  # as Python it would be a dict, which passes


def test_compare_goes_to_every_output():
    assert [entry.test.compare for entry in tests_of(LISTED, "tokens")] == ["tokens", "tokens"]


BAD = [
    ([], "there is no test"),
    ("", "test 0 is empty"),
    (["  "], "test 0 is empty"),
    (["assert 1", "assert f(1"], "test 1: .*Python"),
    ([{"code": "def check(:"}], "test 0: .*Python"),
    ([{"code": "assert 1", "entry_point": "a b"}], "test 0: .*entry_point"),
    ("[1, 2", "no JSON"),
    ("{'code': 1}", "no JSON"),
    ([3], "test 0 is int"),
    (7, "test 0 is int"),
    ([{}], "has the keys none"),
    ([{"stdin": "1"}], "expected 'stdout'"),
    ([{"stdin": 1, "stdout": "2"}], "'stdin' is int"),
    ([{"stdin": "1", "stdout": ["2"]}], "'stdout' is list"),
    ([{"inputs": ["1"], "outputs": []}], "1 inputs and 0 outputs"),
    ([{"inputs": [["1"]], "outputs": ["1"]}], "lists of texts"),
    ([{"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}], "'fn_name'"),
    ([{"stdout": "1", "tier": 3}], "'tier' is int"),
    ([{"inputs": [], "outputs": []}], "there is no test"),
]


@pytest.mark.parametrize(("reference", "words"), BAD)
def test_bad_references(reference, words, sandbox):
    with pytest.raises(InvalidInputError, match=words):
        tests_of(reference)
    with pytest.raises(InvalidInputError, match=f"'unit_test_reward': column 'tests', row 1: .*{words}"):
        UnitTestReward(sandbox=sandbox)(None, ["a", "b"], tests=[["assert 1"], reference])


ADD = """```python
def add(a, b):
    return a + b

if __name__ == '__main__':
    print(add(*map(int, input().split())))
```"""
MIXED = [
    "assert add(1, 2) == 3",
    {"code": "def check(candidate):\n    assert candidate(2, 2) == 4", "entry_point": "add"},
    {"stdin": "1 2\n", "stdout": "3\n"},
    "assert add(1, 1) == 3",
]


def test_rewards(sandbox):
    completions = [ADD, ADD.replace("a + b", "a - b"), "nothing", "```python\nimport sys; sys.exit(0)\n```", ADD]
    tests = [MIXED] * 4 + [MIXED[:3]]
    assert UnitTestReward(sandbox=sandbox)(None, completions, tests=tests) == [0, 0, 0, 0, 1]
    shares = UnitTestReward(mode="fraction", sandbox=sandbox)(None, completions, tests=tests)
    assert shares == [0.75, 0, 0, 0, 1]
    assert UnitTestReward(sandbox=sandbox)(None, [], tests=[]) == []


def test_places_of_the_program(sandbox):
    text = ADD + "\n```python\ndef add(a, b): return 0\n```"
    arguments = {"prompts": None, "completions": [text], "tests": [MIXED[:1]]}
    assert UnitTestReward(sandbox=sandbox)(**arguments) == [0]
    assert UnitTestReward(extract="first_code", sandbox=sandbox)(**arguments) == [1]
    plain = UnitTestReward(extract="text", sandbox=sandbox)
    assert plain(None, ["def add(a, b): return a + b"], tests=[MIXED[:1]]) == [1]


def test_messages_and_arrays(sandbox):
    chat = [{"role": "assistant", "content": ADD}]
    tests = [np.array(MIXED[:3], dtype=object), None]
    assert UnitTestReward(sandbox=sandbox)(["p", "p"], [chat, chat], tests=tests) == [1, None]
    with pytest.raises(MissingColumnError, match="'tests'"):
        UnitTestReward()(["p"], [chat], test=tests[:1])


def test_comparison_and_limits(sandbox):
    completion = "```python\nprint('1  2')\n```"
    tests = [[{"stdin": "", "stdout": "1 2\n"}]]
    assert UnitTestReward(sandbox=sandbox)(None, [completion], tests=tests) == [0]
    assert UnitTestReward(compare="tokens", sandbox=sandbox)(None, [completion], tests=tests) == [1]
    forever = "```python\nwhile True: pass\n```"
    assert UnitTestReward(limits={"wall_seconds": 0.3}, sandbox=sandbox)(None, [forever], tests=tests) == [0]


def test_options():
    assert UnitTestReward(limits={"wall_seconds": 2}).limits == Limits(wall_seconds=2)
    with pytest.raises(UnknownNameError, match="'wall_second'; did you mean 'wall_seconds'"):
        UnitTestReward(limits={"wall_second": 2})
    for options in ({"mode": "any"}, {"extract": "fence"}, {"compare": "bytes"}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            UnitTestReward(**options)


def test_pickles(sandbox):
    reward = UnitTestReward(mode="fraction", limits=Limits(wall_seconds=1), sandbox=sandbox)
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward
    assert copy.sandbox is None
    assert copy(None, [ADD], tests=[MIXED]) == [0.75]  # in the sandbox that the process shares
