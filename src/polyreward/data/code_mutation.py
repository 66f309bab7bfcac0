"""Random changes of a program, drawn anew each time it is shown: operators, digits, input text, arguments.

A program that is shown again comes with another operator or number, so its output has to be worked out and cannot be
learnt by rote. What comes back always compiles; whether it still runs is for execution to say, and a program that now
crashes is a task too.

Six visitors go over the syntax tree in the order binary, boolean, unary, augmented assignment, comparison, negation of
an ``if``. Each replaces, with probability `prob` a node and until its first success, the operator by another of its
class: at most one change a visitor. Then every decimal digit of a number is replaced with probability `prob` by another
digit from 1 to 9; numbers next to the bracket of an index stay.

Paper: CodeBoost: Boosting Code LLMs by Squeezing Knowledge from Code Snippets with RL (arXiv 2508.05242).
"""

from __future__ import annotations

import ast
import contextlib
import io
import string
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from polyreward.data.source_edits import Edit, Source, apply_edits, line_starts, same_tree, spaced
from polyreward.errors import InvalidInputError

DIGITS = "123456789"
RETRIES = 3
"""Further tries for the operators when the result does not compile; then they stay as they were."""

BINARY: dict[Any, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
}
BOOLEAN: dict[Any, str] = {ast.And: "and", ast.Or: "or"}
UNARY: dict[Any, str] = {ast.UAdd: "+", ast.USub: "-", ast.Invert: "~", ast.Not: "not"}
COMPARISON: dict[Any, str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


@dataclass(frozen=True)
class CodeMutator:
    """Random changes with a fixed probability (arXiv 2508.05242).

    Parameters
    ----------
    prob : float in [0, 1]
        Probability of a change, for every node, digit, character or argument; 0.1 in the paper.
    seed : int or numpy.random.Generator
        Every call goes on with the same generator: the same calls after the same seed give the same programs.
    operators, digits : bool
        Which changes `mutate` makes.

    Raises
    ------
    InvalidInputError
        `prob` outside [0, 1].
    """

    prob: float = 0.1
    seed: int | np.random.Generator = 0
    operators: bool = True
    digits: bool = True
    _rng: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise InvalidInputError(f"CodeMutator: prob must be in [0, 1], got {self.prob}")
        object.__setattr__(self, "_rng", np.random.default_rng(self.seed))

    def mutate(self, code: str) -> str | None:
        """A changed program that compiles; None where `code` does not compile, or its changed digits do not.

        Raises
        ------
        InvalidInputError
            `code` is not a str.
        """
        if not isinstance(code, str):
            raise InvalidInputError(f"CodeMutator: code is {type(code).__name__}, expected str")
        if not compiles(code):
            return None
        changed = mutate_operators(code, self.prob, self._rng) if self.operators else code
        return mutate_digits(changed, self.prob, self._rng) if self.digits else changed

    def mutate_stdin(self, text: str) -> str:
        """Input text with random letters and digits, see the function `mutate_stdin`."""
        return mutate_stdin(text, self.prob, self._rng)

    def mutate_arguments(self, value: Any) -> Any:
        """Function arguments with random changes, see the function `mutate_arguments`."""
        return mutate_arguments(value, self.prob, self._rng)


def compiles(code: str) -> bool:
    """Whether `code` is a Python program; it is compiled and not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "main.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def mutate_operators(code: str, prob: float, rng: np.random.Generator) -> str:
    """At most one operator of each class replaced, and at most one ``if`` negated.

    Nodes are visited from the inside out. ``__name__ == "__main__"`` and the expression or ``if`` that holds it stay.
    A chain ``a and b and c`` is one node; of ``a < b < c`` the first comparison changes. Layout and comments survive.
    Brackets are put where the new operator binds differently; where its place in the text cannot be told (in f-strings
    before Python 3.12), the text around it is written anew from the tree.

    Parameters
    ----------
    code : str
        A program that compiles.

    Returns
    -------
    str
        A program that compiles; `code` itself where nothing was drawn, or where `RETRIES` further tries failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the program, such as an invalid escape in one of its texts
        try:
            start = _inside_out(ast.parse(code))
            for _ in range(RETRIES + 1):
                changed, nodes = code, start
                for kind, change_of in VISITORS.items():
                    changed, nodes = _visit(changed, nodes, kind, change_of, prob, rng)
                if changed == code or compiles(changed):
                    return changed
                start = _inside_out(ast.parse(code))
        except (RecursionError, tokenize.TokenError):  # a tree too deep to walk, a text that only the compiler reads
            pass
    return code


def mutate_digits(code: str, prob: float, rng: np.random.Generator) -> str | None:
    """Decimal digits of the number tokens replaced by other digits from 1 to 9; None where that does not compile.

    Numbers directly after ``[`` or directly before ``]`` stay.
    """
    if prob == 0:
        return code
    edits, lines = [], line_starts(code)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code, newline="").readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    for at, token in enumerate(tokens):
        if token.type != tokenize.NUMBER:
            continue
        if tokens[at - 1].string == "[" or tokens[at + 1].string == "]":
            continue
        digits = "".join(
            _other_digit(c, rng) if c in string.digits and rng.random() < prob else c for c in token.string
        )
        if digits != token.string:
            start = lines[token.start[0] - 1] + token.start[1]
            edits.append(Edit(start, start + len(digits), digits))
    changed = apply_edits(code, edits)
    return changed if not edits or compiles(changed) else None


def mutate_stdin(text: str, prob: float, rng: np.random.Generator) -> str:
    """Every digit replaced by a random digit and every letter by a random ASCII letter, with probability `prob`."""
    if prob == 0:
        return text
    return "".join(_other_character(c, rng) if c.isalnum() and rng.random() < prob else c for c in text)


def mutate_arguments(value: Any, prob: float, rng: np.random.Generator) -> Any:
    """Arguments with each number changed with probability `prob`, and texts as in `mutate_stdin`.

    A number is shifted by U(-5, 5), scaled by U(0.5, 1.5) or negated, one of the three at random; integers stay
    integers. Lists, tuples and the values of dicts are copied and entered; truth values, None and anything else stay.
    """
    if isinstance(value, str):
        return mutate_stdin(value, prob, rng)
    if isinstance(value, list):
        return [mutate_arguments(entry, prob, rng) for entry in value]
    if type(value) is tuple:
        return tuple(mutate_arguments(entry, prob, rng) for entry in value)
    if isinstance(value, dict):
        return {key: mutate_arguments(entry, prob, rng) for key, entry in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or rng.random() >= prob:
        return value
    change = ("shift", "scale", "negate")[rng.integers(3)]
    if change == "negate":
        return -value
    whole = isinstance(value, int)
    if change == "shift" or (whole and abs(value) > 2**53):
        return value + (int(rng.integers(-5, 6)) if whole else float(rng.uniform(-5, 5)))
    scaled = value * float(rng.uniform(0.5, 1.5))
    return int(scaled) if whole else scaled


class Change(NamedTuple):
    """What a visitor can do to a node: change the tree in place, and the same in the text where that place is known."""

    options: tuple[Any, ...]
    apply: Callable[[Any], None]
    edits: Callable[[Any, Source], list[Edit]]


def _visit(
    code: str,
    nodes: list[ast.AST],
    kind: type[ast.AST],
    change_of: Callable[[Any], Change | None],
    prob: float,
    rng: np.random.Generator,
) -> tuple[str, list[ast.AST]]:
    """One visitor: the first node whose draw succeeds is changed. The program, and its nodes from the inside out."""
    for node in nodes:
        change = change_of(node) if type(node) is kind else None
        if change is None or not rng.random() < prob:
            continue
        pick = change.options[rng.integers(len(change.options))]
        place, edits = Source(code), []
        with contextlib.suppress(IndexError):  # places in f-strings are wrong before Python 3.12
            edits = change.edits(pick, place)
        change.apply(pick)
        edited = code
        for written in _writings(code, place, node, nodes, edits):
            edited = written
            if same_tree(edited, nodes[-1]):
                return edited, _inside_out(ast.parse(edited))
        return edited, nodes  # not a program any more; the caller finds out
    return code, nodes


def _writings(code: str, place: Source, node: Any, nodes: list[ast.AST], edits: list[Edit]) -> Iterator[str]:
    """Texts that may have the changed tree, from the least change of the text to the largest."""
    if edits:
        yield apply_edits(code, edits)
        if isinstance(node, ast.expr):
            parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
            yield apply_edits(code, [*edits, *(edit for part in (node, *parts) for edit in place.brackets(part))])
    around = [outer for outer in nodes if isinstance(outer, ast.JoinedStr) and node in ast.walk(outer)]
    if around:
        yield apply_edits(code, [Edit(*place.place(around[-1]), ast.unparse(around[-1]))])
    yield ast.unparse(nodes[-1])


def _inside_out(tree: ast.AST) -> list[ast.AST]:
    """Every node after its children; the tree itself comes last."""
    order, stack = [], [tree]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(ast.iter_child_nodes(node))
    return order[::-1]


def _binary(node: ast.BinOp) -> Change:
    def edits(pick: Any, source: Source) -> list[Edit]:
        return source.between(node.left, node.right, BINARY[type(node.op)], BINARY[pick])

    return Change(_others(BINARY, node.op), lambda pick: setattr(node, "op", pick()), edits)


def _boolean(node: ast.BoolOp) -> Change | None:
    if _guarded(node):
        return None

    def edits(pick: Any, source: Source) -> list[Edit]:
        pairs = zip(node.values, node.values[1:], strict=False)
        found = [source.between(a, b, BOOLEAN[type(node.op)], BOOLEAN[pick]) for a, b in pairs]
        return [edit for edits in found for edit in edits] if all(found) else []

    return Change(_others(BOOLEAN, node.op), lambda pick: setattr(node, "op", pick()), edits)


def _unary(node: ast.UnaryOp) -> Change | None:
    if _guarded(node):
        return None

    def edits(pick: Any, source: Source) -> list[Edit]:
        start, old = source.place(node)[0], UNARY[type(node.op)]
        return [Edit(start, start + len(old), spaced(source.code, start, start + len(old), UNARY[pick]))]

    return Change(_others(UNARY, node.op), lambda pick: setattr(node, "op", pick()), edits)


def _augmented(node: ast.AugAssign) -> Change:
    def edits(pick: Any, source: Source) -> list[Edit]:
        return source.between(node.target, node.value, BINARY[type(node.op)] + "=", BINARY[pick] + "=")

    return Change(_others(BINARY, node.op), lambda pick: setattr(node, "op", pick()), edits)


def _comparison(node: ast.Compare) -> Change | None:
    if _guarded(node):
        return None

    def apply(pick: type) -> None:
        node.ops[0] = pick()

    def edits(pick: Any, source: Source) -> list[Edit]:
        return source.between(node.left, node.comparators[0], COMPARISON[type(node.ops[0])], COMPARISON[pick])

    return Change(_others(COMPARISON, node.ops[0]), apply, edits)


def _negation(node: ast.If) -> Change | None:
    if _guarded(node.test):
        return None

    def apply(pick: type) -> None:
        node.test = ast.UnaryOp(pick(), node.test)

    def edits(pick: Any, source: Source) -> list[Edit]:
        start, end = source.place(node.test)
        return [Edit(start, start, spaced(source.code, start, start, "not (")), Edit(end, end, ")")]

    return Change((ast.Not,), apply, edits)


VISITORS: dict[type[ast.AST], Callable[[Any], Change | None]] = {
    ast.BinOp: _binary,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.AugAssign: _augmented,
    ast.Compare: _comparison,
    ast.If: _negation,
}


def _guarded(node: ast.AST) -> bool:
    """Whether an expression holds a comparison of ``__name__`` with ``"__main__"``."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Compare):
            sides = [inner.left, *inner.comparators]
            named = any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides)
            if named and any(isinstance(side, ast.Constant) and side.value == "__main__" for side in sides):
                return True
    return False


def _others(known: dict[Any, str], operator: Any) -> tuple[Any, ...]:
    return tuple(kind for kind in known if kind is not type(operator))


def _other_digit(digit: str, rng: np.random.Generator) -> str:
    others = DIGITS.replace(digit, "")
    return others[rng.integers(len(others))]


def _other_character(character: str, rng: np.random.Generator) -> str:
    choices = string.digits if character.isdigit() else string.ascii_letters
    return choices[rng.integers(len(choices))]
