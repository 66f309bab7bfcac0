"""Terminal output: tables and the summary of a diagnosis, with Rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polyreward.report.html import show
from polyreward.report.reward_models import warnings_of

if TYPE_CHECKING:
    from polyreward.audit.benchmarks import BenchmarkReport
    from polyreward.audit.diagnose import Diagnosis

STYLE = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}


def make_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A Rich table; numbers are right-aligned with three significant digits."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for k, header in enumerate(headers):
        numeric = bool(rows) and all(isinstance(row[k], int | float) or row[k] is None for row in rows)
        table.add_column(header, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row))
    return table


def show_diagnosis(diagnosis: Diagnosis, source: str, console: Console) -> None:
    """Print facts, findings, the suggested change and what was not checked."""
    facts = diagnosis.facts
    line = f"{facts['rollouts']:,} rollouts in {facts['groups']:,} groups, {len(facts['rewards'])} reward(s)"
    if facts["tasks"]:
        line += f", {len(facts['tasks'])} task(s)"
    if facts["steps"]:
        line += f", steps {facts['steps'][0]:.0f} to {facts['steps'][1]:.0f}"
    console.print(Text(source, style="bold"))
    console.print(Text(line))
    trusted = (
        f"trusted reward: {facts['reference']}"
        if facts["reference"]
        else "no trusted reward (name one with --reference)"
    )
    console.print(Text(trusted, style="dim"))
    if any(weight != 1 for weight in facts["weights"].values()):
        weights = ", ".join(f"{name} {weight:g}" for name, weight in facts["weights"].items())
        console.print(Text(f"weights: {weights}", style="dim"))
    console.print()
    problems = diagnosis.problems()
    if not problems:
        console.print(Text("No problem found.", style="bold green"))
    for finding in diagnosis.findings:
        style = STYLE[finding.severity]
        if finding.severity == "info":
            console.print(Text.assemble(("info     ", style), finding.statement))
            continue
        body = [Text(finding.statement)]
        if finding.part:
            body.append(Text.assemble(("part: ", "dim"), (finding.part, "bold")))
        title = Text.assemble((finding.severity, style), ("  " + finding.kind, "bold"), "  " + finding.subject)
        console.print(Panel(Group(*body), title=title, title_align="left", border_style=style))
        # one suggestion below answers all findings about the advantages
        if finding.fix and not (diagnosis.what_if and "advantage = " in finding.fix):
            _code(console, finding.fix)
    if "shares" in diagnosis.tables and len(facts["rewards"]) > 1:
        table = diagnosis.tables["shares"]
        console.print()
        console.print(make_table(table.title, table.headers, table.rows))
    if diagnosis.what_if:
        change = diagnosis.what_if
        console.print()
        console.print(Text("What if", style="bold"))
        sample = f"on {change.rollouts:,} rollouts of {change.steps} step(s)"
        console.print(
            Text(
                f"With the suggested advantage, {sample}: cosine with the present one {change.cosine:.2f}, "
                f"{change.sign_flips:.0%} change sign."
            )
        )
        console.print(
            Text(
                f"Pairs the rewards tell apart that get one advantage: {change.lost[0]:.0%} now, "
                f"{change.lost[1]:.0%} suggested."
            )
        )
        for table in change.tables.values():
            console.print()
            console.print(make_table(table.title, table.headers, table.rows))
        console.print()
        console.print(Text("The advantage that answers these findings, in Python", style="bold"))
        _code(console, change.code)
        console.print(Text("and in a recipe", style="bold"))
        _code(console, change.recipe)
    if diagnosis.not_checked:
        console.print()
        for what, reason in diagnosis.not_checked.items():
            console.print(Text(f"not checked: {what} ({reason})", style="dim"))


def show_audit(report: BenchmarkReport, console: Console) -> None:
    """Print the figures of a reward model on a benchmark, short tables of groups, and what deserves attention."""
    console.print(Text(f"{report.model} on {report.path} ({report.benchmark})", style="bold"))
    console.print(Text(", ".join(f"{value:,} {name}" for name, value in report.counts.items() if value)))
    rows = [
        (name, float(value), "{:.3f} to {:.3f}".format(*report.intervals[name]) if name in report.intervals else "")
        for name, value in report.figures.items()
    ]
    console.print(make_table("", ("", "value", "95 % interval"), rows))
    for title, entries in report.tables.items():
        if title != "calibration" and 0 < len(entries) <= 20:
            console.print()
            console.print(make_table(title.capitalize(), list(entries[0]), [list(row.values()) for row in entries]))
    for sentence in warnings_of(report):
        console.print(Text(sentence, style="bold yellow"))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))


def _code(console: Console, source: str) -> None:
    """Code to copy: no frame, no line broken."""
    console.print(Text(source, style="green"), soft_wrap=True)
    console.print()
