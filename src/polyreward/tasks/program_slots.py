"""Programs of four slots (core, loop, complex, edge) with one test in each of four tiers.

The program reads rows of whole numbers. ``core`` maps a number, ``loop`` a row, ``complex`` brings rows together, and
``edge`` answers for a negative number. A tier passes when the slots that it needs are right:

    basic: core    medium: core, loop    high: core, loop, complex    edge: core, edge

Every slot takes one of eight fragments; fragment 0 is right. ``DEGENERATE`` is one more fragment for the core: it
prints a constant and ends the program, which passes the edge tier alone, whatever the other slots hold.

`program` and `TESTS` are plain data in the form that `polyreward.rewards.unit_tests` reads; nothing runs here.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyreward.errors import InvalidInputError

SLOTS = ("core", "loop", "complex", "edge")
#: Slots that each tier needs, by tier.
NEEDS: dict[str, tuple[int, ...]] = {"basic": (0,), "medium": (0, 1), "high": (0, 1, 2), "edge": (0, 3)}

TESTS: tuple[dict[str, str], ...] = (
    {"stdin": "3\n", "stdout": "10\n", "tier": "basic"},
    {"stdin": "2 5 4\n", "stdout": "48\n", "tier": "medium"},
    {"stdin": "1 2\n3 4\n5 1\n", "stdout": "28 62\n", "tier": "high"},
    {"stdin": "-4\n", "stdout": "-17\n", "tier": "edge"},
)

FRAGMENTS: tuple[tuple[str, ...], ...] = (
    ("n * n + 1", "n * n", "n + 1", "2 * n", "n * n - 1", "n * n * n", "n * n + 2", "n"),
    (
        "sum(core(n) for n in row)",
        "sum(row)",
        "sum(core(n) for n in row[1:])",
        "sum(core(n) for n in row[:-1])",
        "max(core(n) for n in row)",
        "core(sum(row))",
        "len(row)",
        "row",
    ),
    (
        "f'{max(totals)} {sum(totals)}'",
        "f'{min(totals)} {sum(totals)}'",
        "f'{sum(totals)} {max(totals)}'",
        "max(totals)",
        "sum(totals)",
        "f'{max(totals)} {len(totals)}'",
        "totals",
        "f'{totals[0]} {sum(totals)}'",
    ),
    ("-first", "first", "0", "core(-first)", "-n", "first - 1", "abs(n)", "None"),
)
DEGENERATE = "(print(-17), sys.exit())"
OPTIONS = len(FRAGMENTS[0])

_PROGRAM = """\
import sys

def core(n):
    return {0}

def loop(row):
    return {1}

def complex(totals):
    return {2}

def edge(n, first):
    return {3}

rows = [[int(n) for n in line.split()] for line in sys.stdin if line.strip()]
first = core(abs(rows[0][0]))
if rows[0][0] < 0:
    print(edge(rows[0][0], first))
elif len(rows) > 1:
    print(complex([loop(row) for row in rows]))
elif len(rows[0]) > 1:
    print(loop(rows[0]))
else:
    print(first)
"""


def program(choice: Sequence[int]) -> str:
    """The program with fragment ``choice[s]`` in slot s; a core of 8 is the degenerate one.

    Raises
    ------
    InvalidInputError
        Not four numbers from 0 to 7 (8 for the core).
    """
    limits = [OPTIONS + 1, OPTIONS, OPTIONS, OPTIONS]
    if len(choice) != len(SLOTS) or not all(0 <= c < limit for c, limit in zip(choice, limits, strict=True)):
        raise InvalidInputError(f"a program takes 4 fragments, each from 0 to 7 (8 for the core), got {list(choice)}")
    parts = [(*FRAGMENTS[0], DEGENERATE)[choice[0]], *(FRAGMENTS[slot][choice[slot]] for slot in (1, 2, 3))]
    return _PROGRAM.format(*parts)
