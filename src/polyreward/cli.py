"""The command line. Commands live in `polyreward.commands`, one module each, and load heavy libraries when they run."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from polyreward import __version__
from polyreward.commands.audit import audit
from polyreward.commands.diagnose import diagnose
from polyreward.commands.fit import fit
from polyreward.commands.methods import methods
from polyreward.commands.reproduce import reproduce
from polyreward.commands.score import score
from polyreward.commands.train import train
from polyreward.errors import PolyrewardError

app = typer.Typer(
    name="polyreward",
    help="Heterogeneous rewards: score, combine, normalise, optimise, steer by and audit them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, diagnose, fit, score, reproduce, methods):
    app.command()(command)
app.add_typer(audit, name="audit")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyreward {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: exit code 2 with one red line on bad input; Ctrl-C is 130."""
    plain = warnings.formatwarning

    def in_one_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> str:
        own = category.__module__.startswith("polyreward.")
        return f"warning: {message}\n" if own else plain(message, category, *rest, **more)

    warnings.formatwarning = in_one_line
    try:
        app()
    except PolyrewardError as error:
        red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}error: {error}{reset}", file=sys.stderr)
        raise SystemExit(2) from None
