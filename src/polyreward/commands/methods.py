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

    rows = [{**asdict(method), "verdict": _verdict(results / f"{method.slug}.json")} for method in search(query)]
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo(f"no method matches {query!r}; polyreward methods lists all", err=True)
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("method", no_wrap=True), "what it does", Column("verdict", no_wrap=True), show_edge=False)
    for row in rows:
        what = f"{row['summary']} [dim]{row['kind'].capitalize()}, arXiv {row['arxiv']}[/dim]"
        table.add_row(row["name"], what, row["verdict"] or "-")
    Console().print(table, highlight=False)


def _verdict(path: Path) -> str | None:
    import json

    from polyreward.errors import InvalidInputError

    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["verdict"])
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInputError(f"{path} is not the result of a study: expected JSON with a verdict") from error
