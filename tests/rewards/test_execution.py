"""The sandbox: every test of every program gets its result, and every script its output."""

import gzip
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyreward.errors import InvalidInputError
from polyreward.rewards import sandbox_launch
from polyreward.rewards.execution import (
    AssertTest,
    Limits,
    OutputTest,
    Program,
    ProgramResult,
    Sandbox,
    SandboxError,
    SandboxWarning,
    Script,
    ScriptResult,
    TestResult,
    shared_sandbox,
)
from polyreward.rewards.sandbox_tame import is_tame

PATIENT = Limits(wall_seconds=30)


@pytest.fixture(scope="module", params=["bubblewrap", "limits"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = Sandbox(workers=1, limits=PATIENT, isolation=request.param)
        except SandboxError as error:
            pytest.skip(str(error))
    with made:
        yield made


def result_of(sandbox: Sandbox, code: str, *tests: AssertTest | OutputTest) -> ProgramResult:
    (result,) = sandbox.run([Program(code, tests)])
    return result


def check(sandbox: Sandbox, code: str, test: str, entry_point: str | None = None) -> None:
    """The test passes, both in a process of its own and in one that it shares with other tests."""
    tests = [AssertTest(head + test, entry_point=entry_point) for head in ("import sys\n", "")]
    result = result_of(sandbox, code, *tests)
    assert result.all_passed, result


def refuted(sandbox: Sandbox, code: str, test: str) -> list[TestResult]:
    """What comes of a test that must not pass, in both kinds of process."""
    result = result_of(sandbox, code, AssertTest("import sys\n" + test), AssertTest(test))
    assert not result.passed.any()
    return list(result.tests)


# ---- tests by output


@pytest.mark.parametrize(
    ("compare", "expected", "same", "other"),
    [
        ("lines", "1\n2\n", ["1\n2", " 1 \n2  \n\n\n", "1\r\n2\r\n"], ["1\n\n2", "\n1\n2", "1 2", "1", "1\n2\n3", ""]),
        ("lines", "", ["", "\n \n"], ["0"]),
        ("tokens", "1 2\n3", ["1 2 3", "1\n\n2\t3\n"], ["12 3", "1 2", "1 2 3 4"]),
        ("exact", "1\n", ["1\n"], ["1", "1\n\n", " 1\n"]),
    ],
)
def test_how_outputs_are_compared(compare: str, expected: str, same: list[str], other: list[str]) -> None:
    test = OutputTest(stdout=expected, compare=compare)  # type: ignore[arg-type]
    assert all(map(test.agrees, same))
    assert not any(map(test.agrees, other))


def test_output_tests(sandbox: Sandbox) -> None:
    code = "a, b = map(int, input().split())\nprint(a + b)\nif a == 7:\n    raise SystemExit(3)\nif a == 8:\n    1 / 0"
    result = result_of(
        sandbox, code, OutputTest("1 2\n", "3\n", name="small"), OutputTest("1 2", "4"), OutputTest("7 1", "8"),
        OutputTest("8 1", "9"), OutputTest("", "0"),
    )  # fmt: skip
    assert [test.status for test in result.tests] == ["passed", "failed", "error", "error", "error"]
    assert result.tests[0].name == "small"
    assert result.tests[2].message == "exit status 3"
    assert result.tests[3].message == "ZeroDivisionError: division by zero"
    assert result.tests[4].message.startswith("EOFError")
    assert result.passed.dtype == bool
    np.testing.assert_array_equal(result.passed, [True, False, False, False, False])
    assert result.pass_rate == 0.2
    assert not result.all_passed
    assert 0 < result.seconds < 30


def test_text_beyond_ascii(sandbox: Sandbox) -> None:
    code = "def f(text):\n    return text + 'é\\ud800'\nif __name__ == '__main__':\n    print(input() + 'é😀')"
    result = result_of(sandbox, code, OutputTest("ü", "üé😀"), AssertTest("assert f('ü') == 'üé\\ud800'"))
    assert result.all_passed, result


def test_the_end_of_a_script_is_pythons(sandbox: Sandbox) -> None:
    code = (
        "import atexit, threading, time, sys\natexit.register(print, 'atexit')\ndef late():\n    time.sleep(0.05)\n"
        "    print('thread')\nthreading.Thread(target=late).start()\nprint('end', __name__, len(sys.argv))\n"
    )
    assert result_of(sandbox, code, OutputTest("", "end __main__ 1\nthread\natexit")).all_passed
    assert result_of(sandbox, "print('a', end='')\nexit()", OutputTest("", "a", "exact")).all_passed
    assert result_of(
        sandbox, "import asyncio\nasync def f(): print(1)\nasyncio.run(f())", OutputTest("", "1")
    ).all_passed


# ---- tests by assertion


def test_assert_tests(sandbox: Sandbox) -> None:
    result = result_of(
        sandbox, "def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x * 2",
        AssertTest("assert f(2) == 4", name="twice"), AssertTest("x = 3\nassert f(2) == x, 'wrong'"),
        AssertTest("assert f(-1) == 0"), AssertTest("assert g(1)"), AssertTest("1 / 0"),
        AssertTest("try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\n"
        "else:\n    assert 0"),
    )  # fmt: skip
    assert [test.status for test in result.tests] == ["passed", "failed", "error", "error", "error", "passed"]
    assert result.tests[0].name == "twice"
    assert result.tests[1].message == "AssertionError: wrong (tests, line 2: assert f(2) == x, 'wrong')"
    assert result.tests[2].message.startswith("the program raised ValueError: negative (tests, line 1")
    assert "NameError: name 'g' is not defined" in result.tests[3].message


def test_entry_points(sandbox: Sandbox) -> None:
    code = "def f(x): return x\ndef check(candidate): raise SystemExit(0)"
    test = "def check(candidate):\n    assert candidate(1) == 1\n    assert f(2) == 2"
    check(sandbox, code, test, "f")
    assert (
        result_of(sandbox, code, AssertTest(test.replace("== 1", "== 2"), entry_point="f")).tests[0].status == "failed"
    )
    missing = result_of(sandbox, code, AssertTest(test, entry_point="g")).tests[0]
    assert (missing.status, missing.message) == ("error", "the program does not define 'g'")
    check(sandbox, code, "assert candidate(3) == 3", "f")  # no check of the test's own: the program's is not called


def test_programs_that_do_not_load(sandbox: Sandbox) -> None:
    for code, message in (
        ("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division by zero (main.py, line 1)"),
        ("import no_such_package", "ModuleNotFoundError"), ("x = bytearray(1 << 50)", "MemoryError"),
    ):  # fmt: skip
        result = result_of(sandbox, code, AssertTest("assert True"), OutputTest("", ""))
        assert message in result.tests[0].message
        assert {test.status for test in result.tests} == ({"memory"} if "Memory" in message else {"error"})


VALUES = [
    "None", "True", "0", "-1", "2 ** 63", "-(2 ** 200)", "1.5", "float('inf')", "1 + 2j", "'a\\x00\\u20ac'", "b'\\xff'",
    "bytearray(b'a')", "[]", "[1, [2, (3,)]]", "()", "(1, 'a')", "{}", "{1: {'a': None}}", "{1, 2}", "set()",
    "frozenset({(1, 2)})", "range(1, 10, 2)", "slice(1, None, 2)", "...", "int", "ValueError", "type(None)",
    "collections.deque([1, 2], 3)", "collections.OrderedDict(b=1, a=2)", "collections.Counter('aab')",
    "collections.defaultdict(None, {1: 2})", "decimal.Decimal('1.10')", "fractions.Fraction(1, 3)",
    "datetime.date(2020, 2, 29)", "datetime.datetime(2020, 2, 29, 1, 2, 3, 4)",
    "datetime.timedelta(days=-1, seconds=5)",
    "datetime.time(1, 2)", "datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)",
]  # fmt: skip


def test_plain_values_cross_both_ways(sandbox: Sandbox) -> None:
    heads = "import collections, datetime, decimal, fractions\n"
    tests = "\n".join(
        f"value = {value}\nassert same(value) == value and type(same(value)) is type(value), same(value)\n"
        f"assert made({number}) == value and type(made({number})) is type(value), made({number})"
        for number, value in enumerate(VALUES)
    )
    code = f"{heads}VALUES = [{', '.join(VALUES)}]\ndef same(x): return x\ndef made(number): return VALUES[number]"
    result = result_of(sandbox, code, AssertTest(heads + tests))
    assert result.all_passed, result
    check(
        sandbox,
        "import math\ndef f(): return float('nan'), -0.0",
        "nan, zero = f()\nassert nan != nan and str(zero) == '-0.0'",
    )


def test_arguments_changed_in_place(sandbox: Sandbox) -> None:
    code = (
        "def change(values, table, letters, data):\n    values.sort()\n    values.append([values[0]])\n"
        "    table['b'] = values\n"
        "    del table['a']\n    letters.add('c')\n    letters.discard('a')\n    data[0:1] = b'xy'\n    return values\n"
        "def nested(grid):\n    grid[1][0] = 5\ndef fails(values):\n    values.clear()\n    raise KeyError('k')\n"
        "def same(values): return values\ndef append(values, value=[]):\n    value.append(values)\n"
        "    return len(value)"
    )
    check(
        sandbox, code,
        "values, table, letters, data = [3, 1], {'a': 1}, {'a'}, bytearray(b'abc')\n"
        "result = change(values, table, letters, data)\n"
        "assert values == [1, 3, [1]] and result is values\nassert table['b'] is values and list(table) == ['b']\n"
        "assert letters == {'c'} and data == bytearray(b'xybc')\n"
        "row = [1, 2]\ngrid = [row, [3, 4], row]\nnested(grid)\nassert grid == [[1, 2], [5, 4], [1, 2]]\n"
        "assert grid[0] is row and grid[2] is row\n"
        "full = [1]\ntry:\n    fails(full)\nexcept KeyError as error:\n    assert error.args == ('k',)\n"
        "assert full == []\n"
        "loop = []\nloop.append(loop)\nassert same(loop) is loop\n"
        "assert append(1) == 1 and append(2) == 2 and append(values=3) == 3",
    )  # fmt: skip


def test_objects_of_the_program(sandbox: Sandbox) -> None:
    code = """
from dataclasses import dataclass
from collections import namedtuple
import enum

class Stack:
    limit = 3
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        if len(self.items) >= self.limit:
            raise Full(len(self.items))
        self.items.append(item)
        return self
    def __len__(self): return len(self.items)
    def __getitem__(self, index): return self.items[index]
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __repr__(self): return f'Stack({self.items})'
    def __add__(self, other): return Stack(self.items + other.items)
    def __lt__(self, other): return len(self) < len(other)
    def __enter__(self): return self
    def __exit__(self, *_): self.items.clear()

class Full(ValueError):
    pass

class Fuller(Full):
    pass

def overflow(): raise Fuller('full')

@dataclass
class Point:
    x: int
    y: int = 0

Pair = namedtuple('Pair', 'a b')
class Color(enum.IntEnum):
    RED = 1

def point(): return Point(1, 2)
def pair(): return Pair(1, [2])
def color(): return Color.RED
def count():
    number = 0
    while True:
        yield number
        number += 1
def adder(n): return lambda x: x + n
def apply(function, values): return [function(value) for value in values]
async def later(x): return x + 1
"""
    check(
        sandbox, code,
        "s = Stack([1])\n"
        "assert s.push(2) is s and len(s) == 2 and s[1] == 2 and list(s) == [1, 2] and 2 in s and 3 not in s\n"
        "assert s == Stack([1, 2]) and s != Stack() and s != [1, 2] and not s == [1, 2]\n"
        "assert repr(s) == 'Stack([1, 2])' and str(s + Stack([5])) == 'Stack([1, 2, 5])'\n"
        "assert s > Stack() and Stack() < s\n"
        "assert isinstance(s, Stack) and not isinstance(point(), Stack)\n"
        "assert s.limit == 3 and type(s).__name__ == 'Stack'\n"
        "assert not Stack() and bool(s) and s.items == [1, 2]\n"
        "try:\n    s.push(3).push(4)\nexcept Full as error:\n"
        "    assert error.args == (3,) and isinstance(error, ValueError)\n"
        "else:\n    assert 0\n"
        "try:\n    overflow()\nexcept Full as error:\n    assert str(error) == 'full'\n"
        "p = point()\n"
        "assert (p.x, p.y) == (1, 2) and p == Point(1, 2) and p != (1, 2) and repr(p) == 'Point(x=1, y=2)'\n"
        "q = pair()\nassert q == (1, [2]) and q.b == [2] and q[0] == 1 and len(q) == 2 and list(q) == [1, [2]]\n"
        "assert color() == 1 and color() + 1 == 2 and 1 + color() == 2 and color().name == 'RED' and color() < 2\n"
        "numbers = count()\nassert [next(numbers) for _ in range(5)] == [0, 1, 2, 3, 4]\n"
        "assert next(n for n in count() if n > 2000) == 2001\n"
        "assert adder(2)(3) == 5 and apply(lambda v: v * 2, [1, 2]) == [2, 4] and apply(str, [1]) == ['1']\n"
        "assert apply(lambda v: adder(v)(1), [1, 2]) == [2, 3]\n",
    )  # fmt: skip
    others = (
        "import asyncio, sys\nassert asyncio.run(main()) == 3\ns = Stack([1])\nwith s as t:\n    assert t is s\n"
        "assert s.items == []\ns.limit = 5\nassert s.limit == 5 and Stack.limit == 3"
    )
    result = result_of(sandbox, code, AssertTest("async def main():\n    return await later(2)\n" + others))
    assert result.all_passed, result


def test_comparisons_with_objects_are_made_by_the_tests(sandbox: Sandbox) -> None:
    code = "class E(float):\n    def __eq__(self, o): return True\n    def __sub__(self, o): return 0.0\n"
    code += "def f(): return E(2.5)"
    check(sandbox, code, "assert f() == 2.5 and f() - 0.5 == 2.0 and abs(f() - 2.5) < 1e-9 and 1 + f() == 3.5")
    for test in refuted(sandbox, code, "assert abs(f() - 3.5) < 1e-6"):
        assert test.status == "failed"
    for test in refuted(sandbox, "class E:\n    def __sub__(self, o): return 0.0\ndef f(): return E()", "f() - 3.5"):
        assert "unsupported operand" in test.message


def test_modules_and_names_of_the_program(sandbox: Sandbox) -> None:
    code = "import math as m, itertools\nfrom collections import Counter\nLIMIT = [1, 2]\nVALUE = 1\ndef bump():\n" \
        "    global VALUE\n    VALUE += 1\nlen = lambda x: 0"  # fmt: skip
    check(
        sandbox, code, "assert m.sqrt(4) == 2 and list(itertools.chain([1], [2])) == LIMIT and Counter('aa')['a'] == 2"
    )
    check(sandbox, code, "assert VALUE == 1\nbump()\nassert VALUE == 2 and len(LIMIT) == 2")
    for test in refuted(sandbox, "import nothing_like_it", "assert 1"):
        assert "ModuleNotFoundError" in test.message


def test_unittest_and_exit_status_of_tests(sandbox: Sandbox) -> None:
    case = (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), {})\n"
        "        with self.assertRaises(ValueError):\n            f('a')\nif __name__ == '__main__':\n"
        "    unittest.main()"
    )
    code = "def f(x): return int(x)"
    assert [test.status for test in result_of(sandbox, code, *(AssertTest(case.format(n)) for n in "12")).tests] == [
        "passed", "failed",
    ]  # fmt: skip


def test_each_test_starts_anew(sandbox: Sandbox) -> None:
    code = "values = []\ndef f():\n    values.append(1)\n    return len(values)"
    assert result_of(sandbox, code, *[AssertTest("assert f() == 1 and f() == 2")] * 4).all_passed
    leave = AssertTest("import sys\nsys.setrecursionlimit(77)\nimport math\nmath.pi = 3\nbuiltin = 1")
    look = AssertTest(
        "import math\nassert math.pi > 3.1\ntry:\n    builtin\nexcept NameError:\n    pass\nelse:\n    assert 0"
    )
    assert result_of(sandbox, code, leave, look, leave, look).all_passed
    tame = AssertTest("x = 1\ndef helper():\n    return x")
    assert is_tame(tame.code)
    assert result_of(sandbox, code, tame, AssertTest("helper()")).tests[1].status == "error"


def test_one_timeout_does_not_take_the_others_down(sandbox: Sandbox) -> None:
    code = "def f(x):\n    while x == 2:\n        pass\n    return x"
    tests = [AssertTest(f"assert f({number}) == {number}", name=str(number)) for number in range(4)]
    (result,) = sandbox.run([Program(code, tests, Limits(wall_seconds=0.5))])
    assert [test.status for test in result.tests] == ["passed", "passed", "timeout", "passed"]
    assert result.tests[2].message == "over the limit on time"
    assert result.tests[2].seconds >= 0.5


def test_results_come_in_order_whatever_takes_long(sandbox: Sandbox) -> None:
    programs = [
        Program(
            f"import time\ntime.sleep({0.05 if number % 5 == 0 else 0})\nprint({number})", [OutputTest("", str(number))]
        )
        for number in range(20)
    ]
    seen: list[tuple[int, int]] = []
    results = sandbox.run([*programs, Program("", ())], progress=lambda done, total: seen.append((done, total)))
    assert all(result.all_passed for result in results[:20])
    assert not results[20].all_passed
    assert results[20].pass_rate == 0
    assert seen == [(number, 21) for number in range(2, 22)]
    assert sandbox.run([]) == []


def test_huge_results_cross(sandbox: Sandbox) -> None:
    check(sandbox, "def f(n): return list(range(n))", "assert f(200000) == list(range(200000))")
    check(sandbox, "def f(x): return x", "text = 'ab' * 10 ** 6\nassert f(text) == text")
    for test in refuted(sandbox, "def f(x): return x", "f('a' * 2 ** 25)"):
        assert "TypeError: cannot be passed to the program" in test.message
    for test in refuted(sandbox, "def f(): return 'a' * 2 ** 25", "f()"):
        assert test.status == "error"


def test_what_tests_cannot_pass_to_a_program(sandbox: Sandbox) -> None:
    for test in refuted(sandbox, "def f(x): return x", "class A: pass\nf(A())"):
        assert "TypeError: cannot be passed to the program: an object of class A" in test.message


# ---- scripts


def test_scripts(sandbox: Sandbox) -> None:
    code = (
        "import os, sys\nprint(sys.argv[1:], input(), sorted(os.listdir('.')), open('data/a.txt').read())\n"
        "print('err', file=sys.stderr)\nsys.exit(7)"
    )
    (result,) = sandbox.execute([Script(code, "hello", ("a", "b c"), files={"data/a.txt": "é\n", "b": ""})])
    assert result.status == "finished"
    assert result.exit_code == 7
    assert result.stdout == "['a', 'b c'] hello ['b', 'data', 'main.py'] é\n\n"
    assert result.stderr == "err\n"
    assert not result.truncated


def test_tracebacks_of_scripts(sandbox: Sandbox) -> None:
    (result,) = sandbox.execute([Script("def f(x):\n    return 1 / x\n\nf(0)")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[:3] == [
        "Traceback (most recent call last):", '  File "main.py", line 4, in <module>', "    f(0)",
    ]  # fmt: skip
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    (result,) = sandbox.execute([Script("if x\n")])
    assert "SyntaxError" in result.stderr
    assert 'File "main.py", line 1' in result.stderr
    assert "sandbox" not in result.stderr


def test_statuses_of_scripts(sandbox: Sandbox) -> None:
    limits = Limits(wall_seconds=0.5, memory_mb=100, output_bytes=1000)
    codes = [
        "while True: pass", "x = [0]\nwhile True: x += x", "import ctypes\nctypes.string_at(0)", "print('x' * 5000)",
        "print('ok')", "import sys\nsys.exit('bad')",
    ]  # fmt: skip
    results = sandbox.execute([Script(code, limits=limits) for code in codes])
    assert [result.status for result in results] == ["timeout", "memory", "killed", "killed", "finished", "finished"]
    assert [result.exit_code for result in results] == [None, 1, -11, None, 0, 1]
    assert [result.truncated for result in results] == [False, False, False, True, False, False]
    assert len(results[3].stdout) == 1000
    assert results[5].stderr == "bad\n"


def test_hashes_are_the_same_in_every_run(sandbox: Sandbox) -> None:
    scripts = [Script("import random\nprint(list({'a', 'b', 'c', 'd'}), hash('x'))\nrandom.random()")] * 4
    assert len({result.stdout for result in sandbox.execute(scripts)}) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AssertTest("def f(:"), "AssertTest: its code does not parse: invalid syntax"),
        (lambda: AssertTest("x = 1\x00"), "does not parse"),
        (lambda: AssertTest("return 1", name="t1"), "AssertTest 't1': its code does not parse: 'return' outside"),
        (lambda: AssertTest(None), "AssertTest: code is NoneType"),  # type: ignore[arg-type]
        (lambda: AssertTest("", entry_point="a b"), "entry_point is 'a b'"),
        (lambda: OutputTest(stdout=3), "OutputTest: stdout is int"),  # type: ignore[arg-type]
        (lambda: OutputTest(compare="close"), "compare is 'close'"),  # type: ignore[arg-type]
        (lambda: Program(1, ()), "Program: code is int"),  # type: ignore[arg-type]
        (lambda: Program("", ("assert 1",)), "Program: test 0 is str"),  # type: ignore[arg-type]
        (lambda: Script("", files={"../x": ""}), "Script: the file '../x' is not in the script's folder"),
        (lambda: Script("", files={"/etc/x": ""}), "is not in the script's folder"),
        (lambda: Script("", files={"x": b""}), "the file 'x' is bytes"),  # type: ignore[dict-item]
        (lambda: Limits(wall_seconds=0), "wall_seconds is 0"),
        (lambda: Limits(wall_seconds=float("inf")), "wall_seconds is inf"),
        (lambda: Limits(memory_mb=float("nan")), "memory_mb is nan"),
        (lambda: Limits(processes=0), "processes is 0; it must be a finite number, at least 1"),
        (lambda: Limits(cpu_seconds=-1), "cpu_seconds is -1"),
        (lambda: Sandbox(workers=0), "workers is 0"),
        (lambda: Sandbox(isolation="docker"), "isolation is 'docker'"),  # type: ignore[arg-type]
        (lambda: Sandbox(limits=5), "limits is int"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_input_is_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInputError, match="(?s)" + message.replace("(", r"\(")):
        make()


def test_a_closed_sandbox_says_so() -> None:
    sandbox = Sandbox(workers=1)
    sandbox.close()
    sandbox.close()
    for call in (
        lambda: sandbox.run([Program("", (OutputTest(),))]),
        lambda: sandbox.execute([]),
        lambda: sandbox.run([]),
    ):
        with pytest.raises(SandboxError, match="the sandbox is closed"):
            call()


def test_one_warning_says_what_is_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyreward.rewards.execution._warned", set())
    with pytest.warns(SandboxWarning, match="no bubblewrap.*share the PID"):
        Sandbox(isolation="limits").close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sandbox(isolation="limits").close()


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_launch.find.cache_clear()
    monkeypatch.setattr("polyreward.rewards.execution._warned", set())
    try:
        with pytest.raises(SandboxError, match="install the package 'bubblewrap'"):
            Sandbox(isolation="bubblewrap")
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        with pytest.raises(SandboxError, match=r"does not work here: .*No permissions to create"):
            Sandbox(isolation="bubblewrap")
        with pytest.warns(SandboxWarning, match="No permissions"):
            sandbox = Sandbox()
        with sandbox:
            assert sandbox.isolation == "limits"
            assert sandbox.execute([Script("print(1)")])[0].stdout == "1\n"
    finally:
        sandbox_launch.find.cache_clear()


def test_what_is_in_force_is_told(sandbox: Sandbox) -> None:
    described = sandbox.describe()
    assert described["isolation"] == sandbox.isolation
    assert described["facts"]
    assert isinstance(described["weaker"], list)


def test_the_shared_sandbox_is_one() -> None:
    first = shared_sandbox()
    assert first is shared_sandbox()
    assert isinstance(first.execute([Script("print(1)")])[0], ScriptResult)
    first.close()
    assert shared_sandbox() is not first


# ---- which tests share a process


@pytest.mark.parametrize(
    "code",
    [
        "import os", "from math import *", "import math as m\nm.x = 1", "open('x')", "x.__class__", "class A: pass",
        "eval('1')", "f'{x.__dict__}'", "def f():\n"
        "    yield 1", "del x.y", "x.y += 1", "async def f(): pass", "__import__('os')",
        "type('A', (), {})", "getattr(x, 'y')", "'__class__'", "with x: pass", "@f\ndef g(): pass", "from . import x",
        "import collections", "x.register(1)", "f()[0] = 1", "lambda: (yield)", "match x:\n    case 1: pass", "vars(x)",
    ],
)  # fmt: skip
def test_tests_that_may_leave_something_run_apart(code: str) -> None:
    assert not is_tame(code)


@pytest.mark.parametrize(
    "code",
    [
        "assert f(1) == 2", "import math\nassert abs(f(1) - math.pi) < 1e-6", "METADATA = {'author': 'x'}\n"
        "def check(c):\n    "
        "for i in range(3):\n        assert c([i], key=lambda x: -x) == {i: [j for j in (1, 2)]}, f'{i}'",
        "from typing import List\nfrom collections import Counter\nx: List[int] = []\nx[0:1] = [1]\nx[0] += 1",
        "try:\n    f()\nexcept (ValueError, TypeError) as error:\n    pass\nelse:\n    raise AssertionError",
    ],
)  # fmt: skip
def test_tests_that_leave_nothing_share_a_process(code: str) -> None:
    assert is_tame(code)


# ---- HumanEval


def human_eval() -> list[dict[str, str]]:
    path = Path(os.environ.get("POLYREWARD_DATA", "/nowhere")) / "code" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("needs POLYREWARD_DATA")
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


@pytest.mark.slow
def test_human_eval(sandbox: Sandbox) -> None:
    """All canonical solutions pass, and none passes with another body."""
    problems = human_eval()
    tests = [(AssertTest(problem["test"], entry_point=problem["entry_point"]),) for problem in problems]
    for solution, passes in (
        ("canonical_solution", True),
        ("    return None\n", False),
        ("    pass\n    raise\n", False),
    ):
        programs = [
            Program(problem["prompt"] + problem.get(solution, solution), test)
            for problem, test in zip(problems, tests, strict=True)
        ]
        results = sandbox.run(programs)
        wrong = [
            problem["task_id"] for problem, result in zip(problems, results, strict=True) if result.all_passed != passes
        ]
        assert not wrong


def test_installed_packages_can_be_imported(sandbox: Sandbox) -> None:
    code = "import numpy\nprint(numpy.eye(2).sum())\ndef f():\n    return float(numpy.ones(3).sum())"
    result = result_of(sandbox, code, OutputTest("", "2.0"), AssertTest("assert f() == 3.0"))
    assert result.all_passed, result.tests


def test_what_was_written_to_the_first_stdout_is_seen(sandbox: Sandbox) -> None:
    code = "import io, sys\nsys.stdout = io.StringIO()\nsys.__stdout__.write('seen')"
    assert result_of(sandbox, code, OutputTest("", "seen")).all_passed
