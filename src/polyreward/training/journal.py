"""Names and files that the parts of a run share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[str, int, int, str], None]
"""Progress: phase, steps done, steps in all, a short note."""

COMPLETE = "polyreward.json"
"""File that is written into a checkpoint after everything else: the checkpoint is whole."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSONL file; a last line that a killed process left unfinished is dropped."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
