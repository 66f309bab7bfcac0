"""``polyreward reproduce``: the studies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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
        Path | None,
        typer.Option(
            envvar="POLYREWARD_DATA", exists=True, file_okay=False, resolve_path=True, help="Folder with real data."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the results.")] = Path("results"),
) -> None:
    """Run studies: each puts a paper's claim to the test and writes a verdict. Ctrl-C leaves a resumable run."""
    from rich.console import Console
    from rich.table import Column, Table

    from polyreward.catalogue import METHODS, find
    from polyreward.studies.base import StudyConfig
    from polyreward.studies.runner import run_study

    chosen = [find(name) for name in dict.fromkeys(names or [])] or [method for method in METHODS if method.study]
    config = StudyConfig(quick=quick, device=device, data=data)
    table = Table(Column("method", no_wrap=True), "verdict", "effect", "95 % interval", "seeds", "seconds")
    table.add_column("result", overflow="fold")
    try:
        with _bars() as bars:
            for method in chosen:
                bar = bars.add_task(method.name, total=None, due=None)
                result = run_study(
                    method.load_study(),
                    config,
                    seeds=seeds,
                    workers=workers,
                    ray_address=ray,
                    output=output,
                    progress=_Advance(bars, bar),
                )
                low, high = result.record["interval"]
                table.add_row(
                    method.name,
                    result.record["verdict"],
                    f"{result.record['effect']:.4g}",
                    f"{low:.4g} .. {high:.4g}",
                    str(result.record["seeds"]),
                    f"{result.record['wall_seconds']:.1f}",
                    str(result.path),
                )
    except KeyboardInterrupt:
        typer.echo("finished seeds are kept; the same command goes on from them", err=True)
        raise
    finally:  # what is finished is shown on Ctrl-C and after a failure too
        if table.rows:
            Console().print(table)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Left(ProgressColumn):
        """Time left, counted down between two seeds; Rich's own column needs two finished seeds first."""

        def render(self, task: Task) -> Text:
            due = task.fields["due"]
            if due is None or task.finished:
                return Text("")
            seconds = max(0, round(due - time.monotonic()))
            return Text(f"{seconds // 60}:{seconds % 60:02d} left")

    name, count = TextColumn("{task.description}"), MofNCompleteColumn()
    return Progress(
        SpinnerColumn(), name, BarColumn(), count, TimeElapsedColumn(), Left(), console=Console(stderr=True)
    )


class _Advance:
    """Moves a bar and estimates when the study is done, without the seeds that an earlier run finished."""

    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self.bars, self.bar, self.start = bars, bar, time.monotonic()
        self.before: int | None = None

    def __call__(self, finished: int, total: int) -> None:
        now = time.monotonic()
        if self.before is None:
            self.before = finished
        new = finished - self.before
        due = now + (now - self.start) / new * (total - finished) if new else None
        self.bars.update(self.bar, completed=finished, total=total, due=due)
