"""Programs of six slots in which hard-coded answers are a shortcut: all easy tests at once, none of the hard ones.

The program squares a number that is written in one of five ways. Slot 0 is the dispatcher: it sends each notation to a
function of its own (the general way), or looks the answer up in a table of small numbers (two shortcuts), or fails
(two broken ones). Slots 1 to 4 square negative numbers, decimals, powers of ten and fractions, slot 5 plain numbers.
Every slot takes one of five fragments; fragment 0 is right. There are 16 easy tests of plain numbers and one hard test
for each other notation, so a general program with a mistake in slot 5 passes fewer tests than a shortcut.

`program` and `TESTS` are plain data in the form that `polyreward.rewards.unit_tests` reads; nothing runs here.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyreward.errors import InvalidInputError

_PLAIN = tuple(str(n) for n in range(16))
_SQUARES = " ".join(str(n * n) for n in range(16))

#: The tests: 16 easy ones, then one for each of slots 1 to 4.
TESTS: tuple[dict[str, str], ...] = (
    *({"stdin": n + "\n", "stdout": str(int(n) ** 2) + "\n", "name": f"plain {n}"} for n in _PLAIN),
    {"stdin": "-7\n", "stdout": "49\n", "name": "negative"},
    {"stdin": "2.5\n", "stdout": "6.25\n", "name": "decimal"},
    {"stdin": "1e3\n", "stdout": "1000000\n", "name": "power of ten"},
    {"stdin": "3/4\n", "stdout": "9/16\n", "name": "fraction"},
)
EASY = len(_PLAIN)

_GENERAL = """\
    for mark, way in (("/", fraction), ("e", power), (".", decimal), ("-", negative)):
        if mark in t:
            return way(t)
    return plain(t)"""

#: The five fragments of each slot; fragment 0 is right. Of the dispatcher, 1 and 2 are shortcuts, 3 and 4 are broken.
FRAGMENTS: tuple[tuple[str, ...], ...] = (
    (
        _GENERAL,
        "    return {str(n): n * n for n in range(16)}.get(t, 'unknown')",
        f"    return '{_SQUARES}'.split()[int(t)]",
        "    return None",
        "    raise NotImplementedError(t)",
    ),
    ("int(t) ** 2", "-(int(t) ** 2)", "int(t[1:]) * 2", "int(t) ** 3", "int(t)"),
    ("float(t) ** 2", "int(float(t)) ** 2", "float(t) * 2", "round(float(t)) ** 2", "float(t)"),
    ("int(float(t)) ** 2", "int(float(t)) * 2", "float(t) ** 2", "t + '2'", "int(float(t))"),
    (
        "'/'.join(str(int(x) ** 2) for x in t.split('/'))",
        "'/'.join(str(int(x) * 2) for x in t.split('/'))",
        "int(t.split('/')[0]) ** 2",
        "int(t.split('/')[1]) ** 2",
        "t",
    ),
    ("int(t) ** 2", "int(t) ** 2 + 1", "int(t) ** 2 - 1", "-1 - int(t)", "t + '?'"),
)
SLOTS, OPTIONS = len(FRAGMENTS), len(FRAGMENTS[0])


def program(choice: Sequence[int]) -> str:
    """The program with fragment ``choice[s]`` in slot s.

    Raises
    ------
    InvalidInputError
        Not six numbers from 0 to 4.
    """
    if len(choice) != SLOTS or not all(0 <= option < OPTIONS for option in choice):
        raise InvalidInputError(f"a program takes {SLOTS} fragments, each from 0 to {OPTIONS - 1}, got {list(choice)}")
    dispatcher, *ways = (fragments[option] for fragments, option in zip(FRAGMENTS, choice, strict=True))
    names = ("negative", "decimal", "power", "fraction", "plain")
    functions = "\n".join(f"def {name}(t):\n    return {body}\n" for name, body in zip(names, ways, strict=True))
    return f"import sys\n\n{functions}\ndef solve(t):\n{dispatcher}\n\nprint(solve(sys.stdin.read().strip()))\n"
