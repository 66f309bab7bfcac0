"""Writes the README's table of methods and verdicts from ``results/*.json``, between two markers.

``--check`` writes nothing and exits with 1 when the table is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from polyreward.catalogue import METHODS
from polyreward.storage import write_text

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def table(results: Path) -> str:
    """Markdown table, one row a method; a method without a result gets a dash."""
    lines = ["| method | paper | kind | verdict | effect [95 % interval] |", "|---|---|---|---|---|"]
    for method in METHODS:
        path = results / f"{method.slug}.json"
        verdict, effect = "-", "-"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            low, high = record["interval"]
            verdict = record["verdict"]
            effect = f"{record['effect']:.3g} [{low:.3g}, {high:.3g}] {record.get('effect_of', '')}".strip()
        paper = f"[{method.title}](https://arxiv.org/abs/{method.arxiv})"
        cells = (f"`{method.name}`", paper, method.kind, verdict, effect)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def updated(readme: str, results: Path) -> str:
    """The README's text with a fresh table."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md needs {BEGIN} and {END} once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before, ROOT / "results")
    if "--check" in sys.argv[1:]:
        if after != before:
            raise SystemExit("the table in README.md is out of date; run python scripts/update_readme.py")
    else:
        write_text(path, after)
