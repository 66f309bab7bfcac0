"""``polyreward fit``: a reward model from a file of preferences."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyreward.preferences import PreferenceData
    from polyreward.reward_models import FitProgress


def fit(
    data: Annotated[Path, typer.Argument(help="Preferences: JSON lines, CSV or Parquet, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its report.")] = Path("runs/reward-model"),
    encoder: Annotated[
        str, typer.Option(help="hashing, sentence, frozen or fine-tuned; the last three with :MODEL (name or folder).")
    ] = "hashing",
    head: Annotated[str, typer.Option(help="linear, two-layer, ...; a wrong name lists all.")] = "linear",
    likelihood: Annotated[
        str | None, typer.Option(help="bradley-terry, plackett-luce, ...; default the head's own.")
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="More than one makes an ensemble.")] = 1,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share kept for the audit; 0 for none.")] = 0.1,
    by: Annotated[str, typer.Option(help="What the two parts do not share: prompt, annotator or a column.")] = "prompt",
    layout: Annotated[str, typer.Option(help="auto, native, trl, hh or ultrafeedback.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="Column of a field, e.g. choice=label. Repeatable.", metavar="FIELD=NAME")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Most passes over the data; default 50, fine-tuned 2. A fit may stop earlier."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the fit and the split.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Argument of encoder, head, likelihood, ensemble or fit, e.g. fit.learning_rate=0.01. Repeatable.",
            metavar="PART.KEY=VALUE",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Replace a model in the folder.")] = False,
) -> None:
    """Fit a reward model to preferences, audit it on held-out ones, and write model, figures and HTML report.

    Ctrl-C leaves a fit that the same command goes on with.
    """
    from rich.console import Console

    from polyreward.commands.options import pairs, settings
    from polyreward.data.preferences import read_preferences
    from polyreward.errors import InvalidInputError
    from polyreward.reward_models import FitOptions
    from polyreward.reward_models.parts import compose

    started = time.perf_counter()
    console = Console(stderr=True)
    if (out / "config.json").exists() and not fresh:
        raise InvalidInputError(f"{out} holds a model already; pass --fresh to replace it, or another --out")
    options = settings(set_, ("encoder", "head", "likelihood", "ensemble", "fit"))
    of_fit = {"seed": seed, "device": device, **options.pop("fit", {})}
    if epochs is not None:
        of_fit.setdefault("epochs", epochs)
    FitOptions.of(of_fit)  # a misspelt option costs no reading
    preferences = read_preferences(data, layout=layout, columns=pairs(column, "--column"))
    training, test = _split(preferences, by, held_out, seed)
    of_fit = _defaults(encoder, len(training)) | of_fit
    model = compose(training, encoder, head, likelihood, members, out / "features", options)
    console.print(f"{len(training):,} comparisons to fit, {len(test) if test else 0:,} held out", highlight=False)
    try:
        with _Bar(console, members) as bar:
            model.fit(training, checkpoint=out / "fit.pt", progress=bar, **of_fit)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.", highlight=False)
        raise typer.Exit(130) from None
    model.save_pretrained(out)
    command = {
        "data": str(data), "encoder": encoder, "head": head, "likelihood": likelihood, "members": members,
        "held_out": held_out, "by": by, "options": {**options, "fit": of_fit},
    }  # fmt: skip
    _finish(model, out, command, len(training), test, time.perf_counter() - started)


def _defaults(encoder: str, count: int) -> dict[str, Any]:
    """How to fit where nothing is said: some twenty steps an epoch for heads on frozen features."""
    if encoder.startswith("fine-tuned"):
        return {"epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "schedule": "cosine", "warmup": 0.05}
    return {"epochs": 50, "batch_size": min(1024, max(32, count // 20)), "learning_rate": 3e-3}


def _split(data: PreferenceData, by: str, share: float, seed: int) -> tuple[PreferenceData, PreferenceData | None]:
    if share == 0:
        return data, None
    training, test = data.split(by=by, fraction=share, seed=seed)
    return training, test


def _finish(
    model: Any, out: Path, command: dict[str, Any], count: int, test: PreferenceData | None, seconds: float
) -> None:
    from rich.console import Console

    from polyreward.storage import write_json

    histories = [getattr(member, "history", []) for member in getattr(model, "members", [model])]
    record = {"command": command, "comparisons": count, "seconds": round(seconds, 2), "histories": histories}
    console = Console()
    if test is not None:
        from polyreward.audit.benchmarks import report_pairs
        from polyreward.report.reward_models import write_audit
        from polyreward.report.terminal import show_audit

        report = replace(report_pairs(model, test), model=str(out))
        record["audit"] = report.to_json()
        show_audit(report, console)
        page = write_audit(out / "report.html", report, histories)
        console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    write_json(out / "fit.json", record)
    console.print(f"Model:  {out}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Next:   polyreward score {out} FILE", markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """Progress of a fit; on a stream that is no terminal, a line an epoch."""

    def __init__(self, console: Any, members: int) -> None:
        from polyreward.commands.options import progress_bars

        self.bars = progress_bars(console)
        self.console, self.members, self.member, self.last = console, members, 0, 0
        self.losses: list[float] = []
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, progress: FitProgress) -> None:
        """Report of `FitOptions.progress`."""
        if self.bar is None or progress.step < self.last:
            self.member += 1
            label = "fit" if self.members == 1 else f"member {self.member} of {self.members}"
            self.bar = self.bars.add_task(label, total=progress.steps, note="")
        each = progress.steps // progress.epochs
        self.losses.append(progress.loss)
        note = f"epoch {progress.epoch} loss {sum(self.losses) / len(self.losses):.3f}"
        if progress.validation is not None:
            note += f", held out {progress.validation:.3f}"
        self.bars.update(self.bar, completed=progress.step, note=note)
        if progress.step % each == 0:
            self.losses.clear()
            if self.bars.disable:
                self.console.print(f"{self.bars.tasks[self.bar].description}: {note}", highlight=False)
        self.last = progress.step
