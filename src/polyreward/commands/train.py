"""``polyreward train``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyreward.training.recipe import Recipe


def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe: a TOML file or the name of a built-in one.", metavar="[RECIPE]")
    ] = "demo",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name of the recipe>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    fresh: Annotated[bool, typer.Option(help="Replace a run of another recipe in the run folder.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, each a process.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face causal model, or a local folder.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Prompts: a JSONL, Parquet or CSV file, or the name of a `datasets` data set.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Column of --data, e.g. prompt=question. Repeatable.", metavar="KEY=NAME")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a recipe key, e.g. training.steps=20. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
) -> None:
    """Train a policy on several rewards at once; write rollout log, checkpoints, metrics and an HTML report.

    Without a recipe: the built-in one, on CPU, in a few minutes. Ctrl-C leaves a run that the same command resumes.
    """
    from polyreward.errors import InvalidInputError, MissingFileError
    from polyreward.training.recipe import load_recipe

    if resume is not None:
        if not (resume / "recipe.toml").is_file():
            raise MissingFileError(f"{resume} holds no run (no recipe.toml in it)")
        loaded, folder = load_recipe(resume / "recipe.toml"), resume
    else:
        overrides = [f"seeds={seeds}"] if seeds is not None else []
        for key, value in (("policy.model", model), ("data.path", data), ("training.device", device)):
            overrides += [f'{key}="{value}"'] if value is not None else []
        for pair in column or []:
            if "=" not in pair:
                raise InvalidInputError(f"--column {pair!r}: expected KEY=NAME, e.g. prompt=question")
            overrides.append(f"data.columns.{pair}")
        if model is not None and device is None:
            overrides.append("training.device=auto")
        loaded = load_recipe(recipe, [*overrides, *(set_ or [])])
        folder = out or Path("runs") / loaded.name
    _run(loaded, folder, fresh)


def _run(recipe: Recipe, folder: Path, fresh: bool) -> None:
    from rich.console import Console

    from polyreward.training.run import Stopped
    from polyreward.training.seeds import run_recipe

    main = int(os.environ.get("RANK", "0")) == 0
    console = Console(stderr=True, quiet=not main)
    try:
        with _Bars(recipe, console) as bars:
            summary = run_recipe(recipe, folder, bars.show, fresh=fresh)
    except (Stopped, KeyboardInterrupt):
        console.print(f"Stopped. Go on with: polyreward train --resume {folder}", highlight=False)
        raise typer.Exit(130) from None
    if main:
        _finish(summary, folder)


def _finish(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from polyreward.report.training import write_training_report
    from polyreward.training.seeds import seed_folders

    report = write_training_report(folder)
    table = Table(title="Held-out score (share of the points)", title_justify="left")
    for name in ("task", "before", "after"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, when in summary["tasks"].items():
        table.add_row(task, f"{when['before']['mean']:.3f}", f"{when['after']['mean']:.3f}")
    table.add_section()
    table.add_row("all tasks", _interval(summary["before"]), _interval(summary["after"]), style="bold")
    console = Console()
    console.print(table)
    change, count = summary["change"], len(summary["seeds"])
    spread = f"[{change['low']:+.3f}, {change['high']:+.3f}] (95 %, {count} seeds)" if count > 1 else "(one seed)"
    console.print(f"Change: {change['mean']:+.3f} {spread}", markup=False, highlight=False)
    console.print(f"Report: {report}", markup=False, highlight=False, soft_wrap=True)
    first = seed_folders(folder)[0]
    console.print(f"Next:   polyreward diagnose {first}", markup=False, highlight=False, soft_wrap=True)


def _interval(entry: dict[str, Any]) -> str:
    if len(entry["per_seed"]) < 2:
        return f"{entry['mean']:.3f}"
    return f"{entry['mean']:.3f} \\[{entry['low']:.3f}, {entry['high']:.3f}]"


class _Bars:
    """One progress bar a seed; on a stream that is no terminal, a line at each tenth."""

    def __init__(self, recipe: Recipe, console: Any) -> None:
        from polyreward.commands.options import progress_bars

        self.progress = progress_bars(console, console.quiet)
        self.console, self.recipe = console, recipe
        self.bars: dict[int, Any] = {}
        self.phases: dict[int, str] = {}
        self.tenths: dict[int, int] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, seed: int, phase: str, done: int, total: int, note: str) -> None:
        """Report of `polyreward.training.seeds.run_recipe`."""
        label = f"seed {seed}: {phase}"
        if self.phases.get(seed) != phase:
            self.phases[seed], self.tenths[seed] = phase, -1
            if seed in self.bars:
                self.progress.remove_task(self.bars[seed])
            self.bars[seed] = self.progress.add_task(label, total=total, completed=done, note=note)
        self.progress.update(self.bars[seed], completed=done, total=total, note=note)
        tenth = 5 * done // max(total, 1)
        if self.progress.disable and tenth > self.tenths[seed]:
            self.tenths[seed] = tenth
            self.console.print(f"{label} {done}/{total} {note}", highlight=False)
