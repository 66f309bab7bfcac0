"""``polyreward methods``: the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def methods(
    query: Annotated[str, typer.Argument(help="Words to look for.", metavar="[QUERY]")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    results: Annotated[Path, typer.Option(help="Folder with the results of the studies.")] = Path("results"),
) -> None:
    """List the methods, their papers and the verdicts of their studies."""
    import json
    from dataclasses import asdict

    from polyreward.catalogue import search

    rows = []
    for method in search(query):
        path = results / f"{method.slug}.json"
        verdict = json.loads(path.read_text(encoding="utf-8"))["verdict"] if path.is_file() else None
        rows.append({**asdict(method), "verdict": verdict})
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "kind", "summary", "arXiv", "verdict")
    for row in rows:
        table.add_row(row["name"], row["kind"], row["summary"], row["arxiv"], row["verdict"] or "-")
    Console().print(table)
