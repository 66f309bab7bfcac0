"""``polyreward audit``: can this reward model be trusted?"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyreward.audit.benchmarks import BenchmarkReport

audit = typer.Typer(help="Audit reward models.", no_args_is_help=True)

RECORDED = "recorded"
_SHOWN = 3
"""Figures of each file where there are several; --json has all."""


@audit.command("rm")
def audit_rm(
    model: Annotated[
        str, typer.Argument(help='Folder of a reward model, module:name, or "recorded" where FILE holds the scores.')
    ],
    files: Annotated[list[Path], typer.Argument(help="Benchmark files, or preferences.", metavar="FILE...")],
    benchmark: Annotated[
        str, typer.Option(help="pairs (any preferences), rewardmath or personalized.", metavar="NAME")
    ] = "pairs",
    html: Annotated[Path | None, typer.Option(help="Write the report to this HTML file (of one FILE).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    steps: Annotated[
        str, typer.Option(help="How step scores become one: prod, geometric_mean, min, mean, last, ...")
    ] = "prod",
    condition: Annotated[
        list[str] | None, typer.Option(help="personalized: question, profile, oracle. Repeatable.")
    ] = None,
    profile_posts: Annotated[int, typer.Option(min=1, help="personalized: posts of a profile that are shown.")] = 10,
    by: Annotated[
        list[str] | None, typer.Option(help="pairs: column whose values get an accuracy each. Repeatable.")
    ] = None,
    layout: Annotated[str, typer.Option(help="pairs: auto, native, trl, hh or ultrafeedback.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="pairs: column of a field, e.g. choice=label.", metavar="FIELD=NAME")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score a benchmark with any reward model: accuracy, calibration, length, annotators, with 95 % intervals.

    With several files, one line each.
    """
    from polyreward.audit.benchmarks import run_benchmark
    from polyreward.commands.options import pairs
    from polyreward.errors import InvalidInputError
    from polyreward.reward_models.parts import load_reward_model

    if html is not None and len(files) > 1:
        raise InvalidInputError("--html is the report of one FILE")
    loaded = None if model == RECORDED else load_reward_model(model)
    options: dict[str, Any] = {"how": steps, "profile_k": profile_posts, "seed": seed, "layout": layout}
    options |= {"columns": pairs(column, "--column"), "by": tuple(by or ()), "conditions": condition}
    reports = []
    with _progress(json) as advance:
        for path in files:
            found = run_benchmark(loaded, benchmark, path, progress=advance(path), **options)  # type: ignore[arg-type]
            reports.append(replace(found, model=model) if loaded is not None else found)
    if json:
        plain = [report.to_json() for report in reports]
        typer.echo(jsonlib.dumps(plain[0] if len(plain) == 1 else plain, indent=1))
    else:
        _show(reports)
    if html is not None:
        from polyreward.report.reward_models import write_audit

        page = write_audit(html, reports[0])
        typer.echo(f"Report: {page}", err=json)


def _show(reports: Sequence[BenchmarkReport]) -> None:
    from rich.console import Console

    from polyreward.report.terminal import make_table, show_audit

    console = Console()
    if len(reports) == 1:
        show_audit(reports[0], console)
        return
    names = [name for name in reports[0].figures if name in reports[0].intervals][:_SHOWN]
    rows = []
    for report in reports:
        cells = [Path(report.path).name.split(".")[0]]
        for name in names:
            low, high = report.intervals.get(name, (float("nan"), float("nan")))
            cells.append(f"{report.figures.get(name, float('nan')):.3f} [{low:.3f}, {high:.3f}]")
        rows.append(cells)
    console.print(make_table(f"{reports[0].model} ({reports[0].benchmark}), 95 % intervals", ["file", *names], rows))
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        console.print(f"note: {note}", style="dim", markup=False, highlight=False)


class _progress:
    """A bar of scored responses on stderr; nothing when quiet or where stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bars = Progress(console=console, disable=quiet or not console.is_terminal, transient=True)

    def __enter__(self) -> Callable[[Path], Callable[[int, int], None]]:
        self.bars.start()
        return self._of

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def _of(self, path: Path) -> Callable[[int, int], None]:
        bar = self.bars.add_task(path.name, total=None)
        return lambda done, total: self.bars.update(bar, completed=done, total=total)
