"""``polyreward diagnose``: what is heterogeneous in a rollout log, what it does to the update, which part fixes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from polyreward.advantages import Transform
    from polyreward.audit.diagnose import Diagnosis
    from polyreward.batch import RewardBatch

_USED = (
    "task", "stratum", "tool_calls", "step", "length", "logp", "entropy", "completion_hash", "embedding",
    "completion_length", "response_length", "completion_tokens", "response_tokens", "num_tokens",
)  # fmt: skip


def diagnose(
    log: Annotated[
        Path, typer.Argument(help="Rollout log: a run or log folder, TRL's completions, verl's dumps, or a table.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the diagnosis as JSON; with --follow one line a look.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Look again whenever the log grows; Ctrl-C ends (exit code 0).")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks with --follow.")] = 5.0,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit with 1 if a finding is at least this severe: warning or error.")
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
    """Find what is wrong with the rewards of a rollout log, and print the line that fixes it.

    Exit code 0; 1 if --fail-on is given and there is such a finding; 2 on bad input.
    """
    from polyreward.errors import InvalidInputError, PolyrewardError

    try:
        if fail_on not in (None, "warning", "error"):
            raise InvalidInputError(f"--fail-on must be 'warning' or 'error', got {fail_on!r}")
        look = _Look(log, _pairs(mapping, "--map"), _weights(weight), reference, task, stratum, what_if)
        if follow:
            failed = _follow(look, html, json, every, fail_on)
        else:
            diagnosis = look.of_run().diagnose(quiet=json)
            _show(diagnosis, log, html, json)
            failed = _fails(diagnosis, fail_on)
    except PolyrewardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Look:
    """What one look at the log needs."""

    log: Path
    mapping: dict[str, list[str]]
    weights: dict[str, float]
    reference: str | None
    task: str
    stratum: str | None
    what_if: bool
    transform: Transform | None = None

    def of_run(self) -> _Look:
        """For a run of `polyreward train`: with the weights, the trusted reward and the advantage of its recipe."""
        path = (self.log.parent if self.log.name == "rollouts" else self.log) / "recipe.toml"
        if self.mapping or not path.is_file():
            return self
        from polyreward.training.parts import make_advantage
        from polyreward.training.recipe import load_recipe

        recipe = load_recipe(path)
        weights = {reward.name: reward.weight for reward in recipe.rewards} | self.weights
        transform = make_advantage(recipe.advantage, recipe.rewards)
        trusted = self.reference or recipe.evaluation.score
        return replace(self, weights=weights, reference=trusted, transform=transform)

    def read(self, unfinished: bool = False) -> RewardBatch:
        """The log, without the columns that no check asks for."""
        from polyreward.advantages.config import columns_of
        from polyreward.audit.diagnose.reference import may_be_trusted
        from polyreward.data.files import UnfinishedError
        from polyreward.data.rollouts import read_rollouts

        of_transform = () if self.transform is None else columns_of(self.transform)
        chosen = {*_USED, self.task, self.stratum, self.reference, *self.mapping, *of_transform}

        def keep(name: str) -> bool:
            return name in chosen or may_be_trusted(name)

        batch = read_rollouts(self.log, self.mapping, columns=keep, measure_texts=True, unfinished=unfinished)
        sizes = batch.segments("group").sizes
        if int(sizes.max()) < 2:
            raise UnfinishedError(
                f"{self.log}: each of the {len(sizes):,} groups has one row, the first in row 1; expected at least two "
                "samples of a prompt at one step. If 'group' does not name the prompt: --map group=COLUMN"
            )
        return batch

    def diagnose(self, batch: RewardBatch | None = None, quiet: bool = False) -> Diagnosis:
        """Diagnose `batch`, or the log as it is now."""
        import torch

        from polyreward.audit.diagnose import diagnose as run

        torch.set_num_threads(min(2, torch.get_num_threads()))
        with _progress(quiet) as advance:
            advance(f"reading {self.log}", 0.0)
            return run(
                self.read() if batch is None else batch,
                weights=self.weights,
                reference=self.reference,
                task=self.task,
                stratum=self.stratum,
                transform=self.transform,
                recompute=self.what_if,
                progress=lambda name, share: advance(name, 0.1 + 0.9 * share),
            )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left, on stderr; nothing when quiet or where stderr is no terminal."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console, begin = Console(stderr=True), time.monotonic()
    columns = (BarColumn(24), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        job = bar.add_task("", total=1.0, left="")

        def advance(name: str, share: float) -> None:
            seconds = (time.monotonic() - begin) * (1 - share) / share if share > 0 else 0.0
            bar.update(job, description=name, completed=share, left=f"about {seconds:.0f} s left" if seconds else "")

        yield advance


def _show(diagnosis: Diagnosis, log: Path, html: Path | None, as_json: bool, line: bool = False) -> None:
    """Write the report where it is asked for, and print the summary or the JSON (on one line if `line`)."""
    if html:
        from polyreward.report.diagnosis import write_diagnosis

        write_diagnosis(html, diagnosis, log)
    if as_json:
        import json

        indent = None if line else 1
        typer.echo(json.dumps(diagnosis.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    from polyreward.report.terminal import show_diagnosis

    show_diagnosis(diagnosis, str(log), Console())
    if html:
        typer.echo(f"Report: {html}")


def _fails(diagnosis: Diagnosis, fail_on: str | None) -> bool:
    return fail_on is not None and diagnosis.worst() in ("error", fail_on)


def _follow(look: _Look, html: Path | None, as_json: bool, every: float, fail_on: str | None) -> bool:
    """Look, wait until the log has changed, look again; return whether --fail-on ended it (Ctrl-C does not fail)."""
    import time

    from rich.console import Console

    from polyreward.data.files import UnfinishedError
    from polyreward.errors import MissingFileError

    console, seen = Console(stderr=as_json), None
    try:
        while True:
            state = _state(look.log)
            if state != seen:
                seen = state
                try:
                    now = look.of_run()  # a run writes its recipe when it starts
                    batch = now.read(unfinished=True)
                except (MissingFileError, UnfinishedError) as error:
                    # nothing has been written yet, or the first file only in part
                    console.print(f"waiting for {look.log}: {error}", markup=False, soft_wrap=True)
                else:
                    diagnosis = now.diagnose(batch, quiet=True)
                    console.clear()
                    _show(diagnosis, look.log, html, as_json, line=True)
                    if _fails(diagnosis, fail_on):
                        return True
                    console.print(f"following {look.log}; Ctrl-C ends", style="dim", markup=False, soft_wrap=True)
            time.sleep(every)
    except KeyboardInterrupt:
        console.print("\nstopped following", style="dim")
        return False


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


def _pairs(entries: list[str] | None, option: str) -> dict[str, list[str]]:
    from polyreward.errors import InvalidInputError

    pairs: dict[str, list[str]] = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        values = [part.strip() for part in value.split(",")]
        if not equals or not name.strip() or not all(values):
            raise InvalidInputError(f"{option} {entry!r}: expected NAME=VALUE")
        pairs[name.strip()] = values
    return pairs


def _weights(entries: list[str] | None) -> dict[str, float]:
    from polyreward.errors import InvalidInputError

    weights = {}
    for name, values in _pairs(entries, "--weights").items():
        try:
            (weights[name],) = map(float, values)
        except ValueError:
            raise InvalidInputError(f"--weights {name}={','.join(values)}: expected one number") from None
    return weights
