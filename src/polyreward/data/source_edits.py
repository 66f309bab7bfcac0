"""Changes of a program's text at the places of its syntax tree, so that layout and comments survive."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import Any, NamedTuple

_LINE_END = re.compile(r"\r\n|\r|\n")


class Edit(NamedTuple):
    """Characters ``start`` to ``end`` of the text become ``text``."""

    start: int
    end: int
    text: str


class Source:
    """A program with the places of its tokens and nodes, as offsets in characters."""

    def __init__(self, code: str) -> None:
        self.code, self.lines = code, line_starts(code)
        self.tokens = [
            (self.lines[t.start[0] - 1] + t.start[1], self.lines[t.end[0] - 1] + t.end[1], t.string)
            for t in tokenize.generate_tokens(io.StringIO(code, newline="").readline)
            if t.type in (tokenize.OP, tokenize.NAME)
        ]

    def place(self, node: Any) -> tuple[int, int]:
        """Start and end of a node; the tree counts bytes in a line."""
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column: int) -> int:
        start = self.lines[line - 1]
        end = self.lines[line] if line < len(self.lines) else len(self.code)
        return start + len(self.code[start:end].encode()[:column].decode(errors="ignore"))

    def between(self, left: Any, right: Any, old: str, new: str) -> list[Edit]:
        """The edit of the operator between two nodes; empty where it is not found there."""
        start, end, words = self.place(left)[1], self.place(right)[0], old.split()
        inside = [token for token in self.tokens if token[0] >= start and token[1] <= end and token[2] in words]
        if [token[2] for token in inside] != words:
            return []
        first, last = inside[0][0], inside[-1][1]
        return [Edit(first, last, spaced(self.code, first, last, new))]

    def brackets(self, node: Any) -> list[Edit]:
        """Round brackets around a node."""
        start, end = self.place(node)
        return [Edit(start, start, "("), Edit(end, end, ")")]


def same_tree(code: str, tree: ast.AST) -> bool:
    """Whether `code` is a program with this syntax tree, places aside."""
    try:
        return ast.dump(ast.parse(code)) == ast.dump(tree)
    except (SyntaxError, ValueError):
        return False


def spaced(code: str, start: int, end: int, text: str) -> str:
    """`text` with a space on each side where it would run into a name or number (``not x``, ``a in b``)."""
    before = text[0].isalnum() and start > 0 and (code[start - 1].isalnum() or code[start - 1] == "_")
    after = text[-1].isalnum() and end < len(code) and not code[end].isspace()
    return " " * before + text + " " * after


def apply_edits(code: str, edits: list[Edit]) -> str:
    """`code` after all edits, whose places are those in `code`."""
    for edit in sorted(edits, reverse=True):
        code = code[: edit.start] + edit.text + code[edit.end :]
    return code


def line_starts(code: str) -> list[int]:
    """Offset of the start of every line."""
    return [0, *(match.end() for match in _LINE_END.finditer(code))]
