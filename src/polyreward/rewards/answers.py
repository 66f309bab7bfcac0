"""Finding the answer in what a model wrote: in a tag, a box, after ``####``, or the last number."""

from __future__ import annotations

import math
import re

from polyreward.errors import InvalidInputError

_PLAIN = r"[-+]?(?:\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
_COORDINATE = re.compile(_PLAIN)
_NUMBER = re.compile(_PLAIN.replace(r"\d+|", r"\d{1,3}(?:,\d{3})+(?!\d)|\d+|", 1))
_FRACTION = re.compile(r"\s*/\s*")
_TAG = re.compile(r"<([A-Za-z_][\w-]*)>")
PLACES = ("text", "boxed", "####", "last_number")


def check_place(place: str) -> None:
    """Refuse a place that `find_answer` does not know."""
    if place not in PLACES and not _TAG.fullmatch(place):
        raise InvalidInputError(f"extract={place!r}: expected one of {', '.join(PLACES)}, or a tag such as '<answer>'")


def find_answer(text: str, place: str) -> str | None:
    r"""The answer that stands in `place`, stripped; None where there is none. The last one counts.

    A last number may be a fraction ``a/b``.

    Parameters
    ----------
    place : "text" (everything), "boxed" (``\boxed{...}``), "####" (the rest of the line), "last_number", or a tag such
        as "<answer>"
    """
    if place == "text":
        return text.strip()
    if place == "####":
        _, mark, rest = text.rpartition("####")
        return rest.split("\n")[0].strip() or None if mark else None
    if place == "boxed":
        return _boxed(text)
    if place == "last_number":
        return _last_number(text)
    end = text.rfind(f"</{place[1:]}")
    start = text.rfind(place, 0, end) if end >= 0 else -1
    return text[start + len(place) : end].strip() if start >= 0 else None


def numbers_in(text: str, thousands: bool = True) -> list[str]:
    """Every number in the text, as written, left to right. A minus straight after a digit or letter is a dash.

    Parameters
    ----------
    thousands : bool
        Read ``1,234`` as one number. False for lists of coordinates, where ``[10,200]`` are two.
    """
    return [number for _, _, number in _numbers(text, thousands)]


def parse_number(text: str) -> float | None:
    """The number that `text` is: thousands separators, a currency or percent sign and fractions ``a/b`` are read.

    A comma is a separator only in front of groups of three digits. A percent sign does not divide by 100. None where
    the text is no finite number.
    """
    bare = text.replace("−", "-").strip().strip("$€£%").strip().rstrip(".")
    above, slash, below = (part.strip() for part in bare.partition("/"))
    if not all(_NUMBER.fullmatch(part) for part in ((above, below) if slash else (above,))):
        return None
    try:
        value = _float(above) / _float(below) if slash else _float(above)
    except (ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _float(number: str) -> float:
    return float(number.replace(",", ""))


def _numbers(text: str, thousands: bool) -> list[tuple[int, int, str]]:
    """Start, end and text of every number."""
    text, found = text.replace("−", "-"), []
    for match in (_NUMBER if thousands else _COORDINATE).finditer(text):
        start, end, number = match.start(), match.end(), match.group()
        before = text[start - 1] if start else " "
        dash = number[0] in "+-" and (before.isalnum() or before in ")]")
        found.append((start + dash, end, number[1:] if dash else number))
    return found


def _last_number(text: str) -> str | None:
    """The last number, with its numerator where it is the denominator of a fraction; not the end of ``2024/5/6``."""
    *_, earlier, above, below = (0, 0, ""), (0, 0, ""), (0, 0, ""), *_numbers(text, thousands=True)
    joined = [bool(first[2] and _FRACTION.fullmatch(text[first[1] : second[0]]))
              for first, second in ((earlier, above), (above, below))]  # fmt: skip
    return f"{above[2]}/{below[2]}" if joined == [False, True] else below[2] or None


def _boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    begin, depth = start + len(r"\boxed{"), 1
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at].strip()
    return None
