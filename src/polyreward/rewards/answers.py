"""Finding the answer in what a model wrote: in a tag, a box, after ``####``, or the last number."""

from __future__ import annotations

import math
import re

from polyreward.errors import InvalidInputError

_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_TAG = re.compile(r"<([A-Za-z_][\w-]*)>")
PLACES = ("text", "boxed", "####", "last_number")


def check_place(place: str) -> None:
    """Refuse a place that `find_answer` does not know."""
    if place not in PLACES and not _TAG.fullmatch(place):
        raise InvalidInputError(f"extract={place!r}: expected one of {', '.join(PLACES)}, or a tag such as '<answer>'")


def find_answer(text: str, place: str) -> str | None:
    r"""The answer that stands in `place`, stripped; None where there is none. The last one counts.

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
        numbers = numbers_in(text)
        return numbers[-1] if numbers else None
    end = text.rfind(f"</{place[1:]}")
    start = text.rfind(place, 0, end) if end >= 0 else -1
    return text[start + len(place) : end].strip() if start >= 0 else None


def numbers_in(text: str) -> list[str]:
    """Every number in the text, as written, left to right. A minus straight after a digit or letter is a dash."""
    found = []
    for match in _NUMBER.finditer(text):
        number = match.group()
        before = text[match.start() - 1] if match.start() else " "
        found.append(number[1:] if number[0] in "+-" and (before.isalnum() or before in ")]") else number)
    return found


def parse_number(text: str) -> float | None:
    """The number that `text` is: thousands separators, a currency or percent sign and fractions ``a/b`` are read.

    A percent sign does not divide by 100. None where the text is no finite number.
    """
    bare = text.strip().strip("$€£%").strip().rstrip(".").replace(",", "").replace("−", "-")
    above, slash, below = bare.partition("/")
    try:
        value = float(above) / float(below) if slash else float(bare)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


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
