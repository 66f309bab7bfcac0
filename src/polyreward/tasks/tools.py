"""Tools that a policy calls from inside its text, and the protocol that carries the calls.

A call is ``<name>argument</name>``; the environment answers with ``<result>value</result>`` in the same text and the
policy goes on from there. A call that a tool cannot serve is answered ``<result>error</result>``. The final answer
stands in ``<answer>...</answer>``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polyreward.errors import UnknownNameError, nearest

Tool = Callable[[str], str]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LARGEST = 10**12


class ToolError(ValueError):
    """The tool cannot serve this argument; the policy reads ``error``."""


def calculate(expression: str) -> str:
    """Evaluate integer arithmetic with ``+ - * // %`` and parentheses: ``calculate("3*4-2") == "10"``.

    Raises
    ------
    ToolError
        Anything else than such an expression, a division by zero, or a value beyond 10**12.
    """
    if len(expression) > 200:
        raise ToolError("the expression is longer than 200 characters")
    try:
        return str(_evaluate(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot calculate {expression!r}") from error


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_evaluate(node.operand)
    else:
        raise ToolError(f"{type(node).__name__} is not arithmetic")
    if abs(value) > _LARGEST:
        raise ToolError("the value is too large")
    return value


def search(query: str) -> str:
    """Look up how many legs an animal has, in reasoning-gym's own table: ``search("Cat") == "4"``.

    Raises
    ------
    ToolError
        An animal that the table does not hold.
    """
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    try:
        return str(ANIMALS[query.strip().lower()])
    except KeyError as error:
        raise ToolError(f"no entry for {query!r}") from error


TOOLS: dict[str, Tool] = {"calc": calculate, "search": search}


@dataclass(frozen=True)
class ToolBox:
    """The tools a policy may call.

    Parameters
    ----------
    tools : mapping of name to function from argument text to result text
        A function refuses an argument by raising `ToolError`.
    """

    tools: Mapping[str, Tool]

    @classmethod
    def of(cls, names: list[str] | tuple[str, ...]) -> ToolBox:
        """Take tools by their names in `TOOLS`."""
        for name in names:
            if name not in TOOLS:
                raise UnknownNameError(f"no tool {name!r}{nearest(name, TOOLS)}")
        return cls({name: TOOLS[name] for name in names})

    def respond(self, text: str) -> str | None:
        """What the environment appends when `text` ends with a complete call; None when it does not."""
        for name, tool in self.tools.items():
            closing = f"</{name}>"
            if not text.endswith(closing):
                continue
            start = text.rfind(f"<{name}>")
            argument = text[start + len(name) + 2 : -len(closing)] if start >= 0 else ""
            try:
                value = tool(argument) if start >= 0 else "error"
            except ToolError:
                value = "error"
            return f"<result>{value}</result>"
        return None

    def calls(self, text: str) -> int:
        """Number of calls in `text` that the environment answered."""
        return sum(text.count(f"</{name}><result>") for name in self.tools)


def final_answer(completion: Any) -> str | None:
    """The last ``<answer>...</answer>`` of a completion (text or chat messages), stripped; None if there is none."""
    found = _ANSWER.findall(text_of(completion))
    return str(found[-1]).strip() if found else None


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)
