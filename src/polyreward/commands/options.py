"""Options that several commands share: pairs of names, and arguments of parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from polyreward.errors import InvalidInputError, UnknownNameError, nearest


def pairs(entries: Sequence[str] | None, option: str) -> dict[str, str]:
    """``KEY=VALUE`` entries as a mapping; `InvalidInputError` for another form or a key that comes twice."""
    found: dict[str, str] = {}
    for entry in entries or []:
        key, equals, value = entry.partition("=")
        if not (key and equals and value):
            raise InvalidInputError(f"{option} {entry!r}: expected KEY=VALUE")
        if key in found:
            raise InvalidInputError(f"{option} {key} is given twice")
        found[key] = value
    return found


def settings(entries: Sequence[str] | None, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``PART.KEY=VALUE`` entries as arguments of each part.

    A value is read as JSON (numbers, true, lists), else as the text it is.

    Raises
    ------
    UnknownNameError, InvalidInputError
        Another part; another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in pairs(entries, "--set").items():
        part, dot, name = key.partition(".")
        if not (dot and name):
            raise InvalidInputError(f"--set {key}={value}: expected PART.KEY=VALUE")
        if part not in parts:
            raise UnknownNameError(f"--set {key}={value}: unknown part {part!r}{nearest(part, parts)}")
        try:
            found.setdefault(part, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            found.setdefault(part, {})[name] = value
    return found
