"""A small language of real Python programs whose output a small network can learn to predict.

Two shapes, with operands from 0 to 5 and the operators ``+ - * // %``:

    a = 3 + 2          xs = [4, 0, 1]
    b = a * 4          i = 2 - 5
    print(b // 0)      print(xs[i])

A program is a row of 13 tokens (7 of the first shape, 6 of the second, absent ones -1) and has a number from 0 to
200,879. What it prints comes from running it: thousands of programs share one run of a driver, so that the whole
language is known in seconds. An outcome is one of 30 classes, the integers from -5 to 20 and four errors told apart by
kind and line; a program that prints another integer is outside. Tracebacks lose their lines of carets, which depend on
the version of Python.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.tasks.code_prediction import ExecutionOutcome, Snippet

OPERATORS = ("+", "-", "*", "//", "%")
OPERANDS = 6
TOKENS = OPERANDS + len(OPERATORS)
"""Tokens 0 to 5 are operands, 6 to 10 operators."""
LOWEST, HIGHEST = -5, 20
INTEGERS = HIGHEST - LOWEST + 1
ERRORS = (("ZeroDivisionError", 1), ("ZeroDivisionError", 2), ("ZeroDivisionError", 3), ("IndexError", 3))
CLASSES = INTEGERS + len(ERRORS)
OUTSIDE = -1
"""Class of a program that prints an integer without a class."""

_SHAPES = ("xoxoxox", "xxxxox")  # x: operand, o: operator
IS_OPERATOR = np.array([slot == "o" for slot in "".join(_SHAPES)])
SLOTS = IS_OPERATOR.size
_FIRST = len(_SHAPES[0])
_SIZES = np.where(IS_OPERATOR, len(OPERATORS), OPERANDS)
ARITHMETIC = int(np.prod(_SIZES[:_FIRST]))
PROGRAMS = ARITHMETIC + int(np.prod(_SIZES[_FIRST:]))
CHUNK = 2000

_FORMS = ("a = {} {} {}\nb = a {} {}\nprint(b {} {})\n", "xs = [{}, {}, {}]\ni = {} {} {}\nprint(xs[i])\n")
_PATTERNS = tuple(
    re.compile(re.escape(form).replace(r"\{\}", r"([0-9]+|//|[-+*%])").replace(r"\ ", r"\s+")) for form in _FORMS
)
_MARKERS = re.compile(r"^[ ^~]+\n", re.MULTILINE)
_DRIVER = """\
import contextlib, io, json, linecache, sys, traceback

def outcome(code):
    printed = io.StringIO()
    linecache.cache["main.py"] = (len(code), None, code.splitlines(True), "main.py")
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "main.py", "exec"), {"__name__": "__main__"})
    except Exception as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
        return printed.getvalue(), "".join(lines)
    return printed.getvalue(), ""

print(json.dumps([outcome(code) for code in json.load(sys.stdin)]))
"""


def tokens_of(programs: np.ndarray | Sequence[int]) -> np.ndarray:
    """Token rows (N, 13) of program numbers (N,)."""
    numbers = np.asarray(programs, dtype=np.int64)
    rows = np.full((numbers.size, SLOTS), -1, dtype=np.int64)
    second = numbers >= ARITHMETIC
    for mask, start, stop, offset in ((~second, 0, _FIRST, 0), (second, _FIRST, SLOTS, ARITHMETIC)):
        digits = np.unravel_index(numbers[mask] - offset, _SIZES[start:stop])
        for slot, digit in zip(range(start, stop), digits, strict=True):
            rows[mask, slot] = digit + OPERANDS * IS_OPERATOR[slot]
    return rows


def programs_of(tokens: np.ndarray) -> np.ndarray:
    """Program numbers (N,) of token rows (N, 13)."""
    second = tokens[:, 0] < 0
    digits = tokens - OPERANDS * IS_OPERATOR
    numbers = np.empty(len(tokens), dtype=np.int64)
    for mask, start, stop, offset in ((~second, 0, _FIRST, 0), (second, _FIRST, SLOTS, ARITHMETIC)):
        numbers[mask] = np.ravel_multi_index(tuple(digits[mask, start:stop].T), _SIZES[start:stop]) + offset
    return numbers


def source(program: int) -> str:
    """The program as text."""
    row = tokens_of([program])[0]
    words = [str(t) if t < OPERANDS else OPERATORS[t - OPERANDS] for t in row[row >= 0]]
    return _FORMS[int(row[0] < 0)].format(*words)


def parse(code: str) -> int | None:
    """Number of a program; None for a text that is none of the language."""
    for pattern, shape, offset, start in zip(_PATTERNS, _SHAPES, (0, ARITHMETIC), (0, _FIRST), strict=True):
        match = pattern.fullmatch(code)
        if match is None:
            continue
        digits = []
        for word, kind in zip(match.groups(), shape, strict=True):
            known = OPERATORS if kind == "o" else tuple(map(str, range(OPERANDS)))
            if word not in known:
                return None
            digits.append(known.index(word))
        return int(np.ravel_multi_index(tuple(digits), tuple(_SIZES[start : start + len(shape)]))) + offset
    return None


class MiniPython:
    """What the programs of the language print, found out by running them and kept.

    Parameters
    ----------
    run : (snippets) -> outcomes
        For example ``polyreward.rewards.execution_prediction.execute_programs``.
    """

    def __init__(self, run: Callable[[Sequence[Snippet]], Sequence[ExecutionOutcome]]) -> None:
        self._run = run
        self._classes = np.full(PROGRAMS, -2, dtype=np.int8)
        self._texts: dict[int, tuple[str, str]] = {}

    def classes(self, programs: np.ndarray | Sequence[int]) -> np.ndarray:
        """Class (N,) of what each program prints, `OUTSIDE` for an integer without one; runs those not yet known."""
        numbers = np.asarray(programs, dtype=np.int64)
        self._execute(np.unique(numbers[self._classes[numbers] == -2]))
        return self._classes[numbers].astype(np.int64)

    def printed(self, program: int) -> tuple[str, str]:
        """Stdout and stderr of a program."""
        known = int(self.classes([program])[0])
        return (f"{known + LOWEST}\n", "") if 0 <= known < INTEGERS else self._texts[program]

    def rendered(self, program: int, outcome: int) -> tuple[str, str]:
        """Stdout and stderr that a program would have if its outcome were this class."""
        if outcome < INTEGERS:
            return f"{outcome + LOWEST}\n", ""
        kind, line = ERRORS[outcome - INTEGERS]
        text = source(program).split("\n")[line - 1]
        message = _message(kind, text)
        return (
            "",
            f'Traceback (most recent call last):\n  File "main.py", line {line}, in <module>\n    {text}\n{message}\n',
        )

    def _execute(self, numbers: np.ndarray) -> None:
        chunks = [numbers[at : at + CHUNK].tolist() for at in range(0, numbers.size, CHUNK)]
        batch = [Snippet(_DRIVER, json.dumps([source(number) for number in chunk])) for chunk in chunks]
        for chunk, outcome in zip(chunks, self._run(batch) if batch else [], strict=True):
            if outcome.status != "finished" or outcome.stderr:
                raise InvalidInputError(f"the programs could not be run: {outcome.status}, {outcome.stderr[-300:]}")
            for number, (stdout, stderr) in zip(chunk, json.loads(outcome.stdout), strict=True):
                self._keep(number, stdout, without_markers(stderr))

    def _keep(self, number: int, stdout: str, stderr: str) -> None:
        if not stderr and LOWEST <= int(stdout) <= HIGHEST:
            self._classes[number] = int(stdout) - LOWEST
            return
        self._texts[number] = stdout, stderr
        self._classes[number] = _error_class(stderr) if stderr else OUTSIDE


def without_markers(stderr: str) -> str:
    """A traceback without the lines that mark a place by carets and tildes."""
    return _MARKERS.sub("", stderr)


def _error_class(stderr: str) -> int:
    found: Any = re.search(r'File "main\.py", line (\d+)', stderr)
    last = stderr.rstrip("\n").rsplit("\n", 1)[-1]
    return INTEGERS + ERRORS.index((last.split(":")[0], int(found.group(1))))


def _message(kind: str, line: str) -> str:
    """The last line of a traceback: that of this Python, found out by raising it."""
    try:
        if kind == "IndexError":
            operator.getitem([], 0)
        (operator.mod if "%" in line else operator.floordiv)(1, 0)
    except (IndexError, ZeroDivisionError) as error:
        return f"{kind}: {error}"
    raise AssertionError
