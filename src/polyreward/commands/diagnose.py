"""``polyreward diagnose``: what is heterogeneous in a rollout log, what it does to the update, which part fixes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyreward.audit.diagnose import Diagnosis

_USED = ("stratum", "tool_calls", "step", "length", "logp", "entropy", "completion_hash", "embedding")
_TEXTS = ("completion", "response", "output", "text")


def diagnose(
    log: Annotated[
        Path, typer.Argument(help="Rollout log: a run or log folder, TRL's completions, verl's dumps, or a table.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Look again whenever the log grows; Ctrl-C ends.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks with --follow.")] = 5.0,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit with 1 if there is a finding of this severity: warning or error.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The trusted reward or column (verifier, held-out score).")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weights", help="Weight of a reward in the sum, default 1. Repeatable.", metavar="NAME=VALUE"),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="Column of a field, e.g. group=prompt, rewards=a,b, task=source. Repeatable.",
            metavar="FIELD=COLUMN",
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="Column that holds the task.")] = "task",
    stratum: Annotated[
        str | None, typer.Option(help="Column that holds the stratum; default stratum or tool_calls.")
    ] = None,
    what_if: Annotated[bool, typer.Option(help="Recompute the advantages with the suggested parts.")] = True,
) -> None:
    """Find what is wrong with the rewards of a rollout log, and print the line that fixes it."""
    from polyreward.errors import InvalidInputError, PolyrewardError

    try:
        if fail_on not in (None, "warning", "error"):
            raise InvalidInputError(f"--fail-on must be 'warning' or 'error', got {fail_on!r}")
        options = _Options(log, _pairs(mapping, "--map"), _weights(weight), reference, task, stratum, what_if)
        if follow:
            _follow(options, html, every)
            return
        diagnosis = _diagnose(options, quiet=json)
        if html:
            from polyreward.report.diagnosis import write_diagnosis

            write_diagnosis(html, diagnosis, log)
        _print(diagnosis, log, json)
        if html and not json:
            typer.echo(f"Report: {html}")
    except PolyrewardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    worst = diagnosis.worst()
    if worst == "error" or (worst == "warning" and fail_on == "warning"):
        raise typer.Exit(1 if fail_on else 0)


class _Options:
    """What one look at the log needs."""

    def __init__(
        self,
        log: Path,
        mapping: dict[str, Any],
        weights: dict[str, float],
        reference: str | None,
        task: str,
        stratum: str | None,
        what_if: bool,
    ) -> None:
        self.log, self.mapping, self.weights, self.reference = log, mapping, weights, reference
        self.task, self.stratum, self.what_if = task, stratum, what_if

    def columns(self) -> list[str] | None:
        """Columns to read; None (all) where a mapping decides."""
        if self.mapping:
            return None
        chosen = [*_USED, *_TEXTS, self.task, self.stratum, self.reference]
        return list(dict.fromkeys(name for name in chosen if name))


def _diagnose(options: _Options, quiet: bool = False) -> Diagnosis:
    import torch

    from polyreward.audit.diagnose import diagnose as run
    from polyreward.data.rollouts import read_rollouts

    torch.set_num_threads(min(2, torch.get_num_threads()))
    with _progress(quiet) as advance:
        advance(f"reading {options.log}", 0.0)
        columns = options.columns()
        batch = read_rollouts(options.log, options.mapping or None, columns=columns)
        return run(
            batch,
            weights=options.weights,
            reference=options.reference,
            task=options.task,
            stratum=options.stratum,
            recompute=options.what_if,
            progress=lambda name, share: advance(name, 0.3 + 0.7 * share),
        )


class _progress:
    """A progress bar on stderr that shows itself after half a second; nothing when quiet or not a terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.bar = Progress(
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self.job = self.bar.add_task("", total=1.0)

    def __enter__(self) -> Any:
        self.bar.__enter__()
        return lambda name, share: self.bar.update(self.job, description=name, completed=share)

    def __exit__(self, *reason: Any) -> None:
        self.bar.__exit__(*reason)


def _print(diagnosis: Diagnosis, log: Path, as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(diagnosis.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    from polyreward.report.terminal import show_diagnosis

    show_diagnosis(diagnosis, str(log), Console())


def _follow(options: _Options, html: Path | None, every: float) -> None:
    """Look, wait until the log has changed, look again."""
    import time

    from rich.console import Console

    from polyreward.errors import PolyrewardError
    from polyreward.report.diagnosis import write_diagnosis
    from polyreward.report.terminal import show_diagnosis

    console = Console()
    seen: object = None
    try:
        while True:
            state = _state(options.log)
            if state != seen:
                seen = state
                try:
                    diagnosis = _diagnose(options, quiet=True)
                except PolyrewardError as error:
                    # a run that has not written its first step yet is no error here
                    console.print(f"waiting for {options.log}: {error}", markup=False, soft_wrap=True)
                else:
                    console.clear()
                    show_diagnosis(diagnosis, str(options.log), console)
                    console.print(f"following {options.log}; Ctrl-C ends", style="dim", markup=False, soft_wrap=True)
                    if html:
                        write_diagnosis(html, diagnosis, options.log)
            time.sleep(every)
    except KeyboardInterrupt:
        console.print("\nstopped following", style="dim")


def _state(log: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of the log."""
    files = [log] if log.is_file() else sorted(log.rglob("*"))
    found = []
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        if file.is_file() and not file.name.startswith("."):
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(found)


def _pairs(entries: list[str] | None, option: str) -> dict[str, Any]:
    from polyreward.errors import InvalidInputError

    pairs: dict[str, Any] = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals or not name or not value:
            raise InvalidInputError(f"{option} {entry!r}: expected NAME=VALUE")
        pairs[name] = value.split(",") if "," in value else value
    return pairs


def _weights(entries: list[str] | None) -> dict[str, float]:
    from polyreward.errors import InvalidInputError

    weights = {}
    for name, value in _pairs(entries, "--weights").items():
        try:
            weights[name] = float(value)
        except (TypeError, ValueError):
            raise InvalidInputError(f"--weights {name}={value}: expected a number") from None
    return weights
