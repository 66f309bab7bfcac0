"""``polyreward reproduce``: the studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods; all when none is given.", metavar="[METHOD]...")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small smoke run without a verdict.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default the study's own.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")] = None,
    ray: Annotated[str | None, typer.Option(help='Address of a Ray cluster, or "local".')] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(envvar="POLYREWARD_DATA", exists=True, file_okay=False, help="Folder with real data.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Run studies: each puts a paper's claim to the test and writes a verdict. Ctrl-C leaves a resumable run."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from polyreward.catalogue import METHODS, find
    from polyreward.studies.base import StudyConfig
    from polyreward.studies.runner import run_study

    chosen = [find(name) for name in names] if names else [method for method in METHODS if method.study]
    config = StudyConfig(quick=quick, device=device, data=data)
    table = Table("method", "verdict", "effect", "95 % interval", "seeds", "seconds", "result")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        for method in chosen:
            bar = bars.add_task(method.name, total=None)
            result = run_study(
                method.load_study(),
                config,
                seeds=seeds,
                workers=workers,
                ray_address=ray,
                output=output,
                progress=lambda done, total, bar=bar: bars.update(bar, completed=done, total=total),  # type: ignore[misc]
            )
            record = result.record
            low, high = record["interval"]
            table.add_row(
                method.name,
                record["verdict"],
                f"{record['effect']:.4g}",
                f"{low:.4g} .. {high:.4g}",
                str(record["seeds"]),
                f"{record['seconds']:.1f}",
                str(result.path),
            )
    Console().print(table)
