"""Task family `write_function`: write a small Python function of two integers that keeps to every clause of its spec.

The spec is an expression and up to two exceptions: a constant where a is negative, another where a equals b. Most tests
are about the expression, one is about each exception, as in the test suites of real problems: a program without the
exceptions passes most tests.
"""

from __future__ import annotations

import json
import random
from typing import Any

from polyreward.errors import InvalidInputError
from polyreward.tasks.own import Entry, OwnTask

_OPENING, _CLOSING = "```python\ndef f(a,b):\n", "```"
_NEGATIVE, _EQUAL, _RETURN = " if a<0:return ", " if a==b:return ", " return "
_OPERATORS = ("+", "-", "*")


def problem(rng: random.Random, *, exceptions: int, tests: int) -> Entry:
    """One problem with `exceptions` (0 to 2) exceptions and `tests` tests of the expression."""
    if exceptions not in (0, 1, 2) or tests < 1:
        raise InvalidInputError("expected exceptions = 0, 1 or 2 and at least one test")
    expression = f"a{rng.choice(_OPERATORS)}b{rng.choice('+-')}{rng.randint(1, 9)}"
    clauses = rng.sample(("negative", "equal"), exceptions)
    constants = {clause: rng.randint(0, 9) for clause in sorted(clauses, reverse=True)}
    inside = [(a, b) for a in range(10) for b in range(10) if a != b]
    cases = [(a, b, _value(expression, a, b)) for a, b in rng.sample(inside, tests)]
    if "negative" in constants:
        cases.append((-rng.randint(1, 9), rng.randint(0, 9), constants["negative"]))
    if "equal" in constants:
        both = rng.randint(0, 9)
        cases.append((both, both, constants["equal"]))
    answer = _program(expression, constants)
    words = "".join(
        f", except {value} where {'a is negative' if clause == 'negative' else 'a equals b'}"
        for clause, value in constants.items()
    )
    return {
        "question": f"Write a Python function f(a, b) of two integers that returns {expression}{words}. "
        "Answer with one fenced python block.",
        "answer": answer,
        "metadata": {"expression": expression, "constants": constants},
        "columns": {"tests": json.dumps([f"assert f({a}, {b}) == {value}" for a, b, value in cases])},
    }


def prompt(entry: Entry) -> str:
    """``a*b+3;a<0 7;a==b 0``."""
    details = entry["metadata"]
    signs = {"negative": ";a<0 ", "equal": ";a==b "}
    return details["expression"] + "".join(f"{signs[clause]}{n}" for clause, n in details["constants"].items())


def solution(entry: Entry, rng: random.Random, noise: float) -> str:
    """The program; with probability `noise` it forgets an exception or has a wrong sign or number."""
    expression, constants = entry["metadata"]["expression"], dict(entry["metadata"]["constants"])
    if rng.random() < noise:
        if constants and rng.random() < 0.7:
            constants.pop(rng.choice(sorted(constants)))
        elif rng.random() < 0.5:
            expression = expression[:-1] + rng.choice("123456789")
        else:
            expression = expression[0] + rng.choice(_OPERATORS) + expression[2:]
    text = _program(expression, constants)
    return text.removesuffix(_CLOSING) if rng.random() < noise / 4 else text


def _value(expression: str, a: int, b: int) -> int:
    first = {"+": a + b, "-": a - b, "*": a * b}[expression[1]]
    return first + int(expression[3:])


def _program(expression: str, constants: dict[str, Any]) -> str:
    lines = {"negative": _NEGATIVE, "equal": _EQUAL}
    body = "".join(f"{lines[clause]}{value}\n" for clause, value in constants.items())
    return f"{_OPENING}{body}{_RETURN}{expression}\n{_CLOSING}"


TASK = OwnTask(
    problem,
    prompt,
    solution,
    words=(_OPENING, _NEGATIVE, _EQUAL, _RETURN, _CLOSING),
    options={"exceptions": 2, "tests": 4},
)
