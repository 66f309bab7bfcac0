"""What several commands share: pairs of names, arguments of parts, progress bars."""

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


def progress_bars(console: Any, quiet: bool = False) -> Any:
    """Bars of long work: what, how far, time so far, time left, a note; hidden where `console` is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )
