"""The HTML report of a diagnosis: findings in plain words, a figure for each, the what-if, what was not checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyreward.report.html import (
    PALETTE,
    Section,
    cards,
    code,
    details,
    figure,
    heading,
    notice,
    table,
    text,
    write_page,
)

if TYPE_CHECKING:
    from polyreward.audit.diagnose import Diagnosis, Finding, Table


def write_diagnosis(path: str | Path, diagnosis: Diagnosis, source: str | Path) -> Path:
    """Write the report of `diagnosis` on the log `source` to `path`, whole or not at all."""
    problems = diagnosis.problems()
    sections = [_headlines(diagnosis)]
    sections += [_finding(diagnosis, finding) for finding in problems]
    if diagnosis.what_if:
        sections.append(_what_if(diagnosis))
    sections += [_background(diagnosis, problems), _not_checked(diagnosis)]
    return write_page(path, "What drives this policy's update", sections, f"Diagnosis of {source}", [_facts(diagnosis)])


def _facts(diagnosis: Diagnosis) -> str:
    facts = diagnosis.facts
    shown = [
        ("rollouts", f"{facts['rollouts']:,}"),
        ("groups", f"{facts['groups']:,}"),
        ("rewards", str(len(facts["rewards"]))),
        ("tasks", str(len(facts["tasks"]) or "–")),
        ("steps", f"{facts['steps'][0]:.0f}–{facts['steps'][1]:.0f}" if facts["steps"] else "–"),
        ("trusted reward", facts["reference"] or "none"),
    ]
    return cards(shown)


def _headlines(diagnosis: Diagnosis) -> Section:
    fragments = [
        notice(f"{f.severity}: {f.kind}", f.statement, f.severity) for f in diagnosis.findings if f.severity != "info"
    ]
    if not fragments:
        fragments = [notice("no problem found", "None of the checks below found a problem in this log.", "good")]
    fragments += [notice(f.kind, f.statement) for f in diagnosis.findings if f.severity == "info"]
    return Section("Findings", fragments)


def _finding(diagnosis: Diagnosis, finding: Finding) -> Section:
    fragments = [text(finding.statement)]
    draw = _FIGURES.get(finding.kind)
    plot = draw(diagnosis.tables, finding) if draw else None
    if plot is not None:
        fragments.append(figure(plot[0], plot[1]))
    if finding.part:
        fragments.append(heading(f"What addresses it: {finding.part}"))
    if finding.fix:
        fragments.append(code(finding.fix))
    return Section(f"{finding.kind.capitalize()}: {finding.subject}", fragments)


def _what_if(diagnosis: Diagnosis) -> Section:
    change = diagnosis.what_if
    assert change is not None
    fragments = [
        text(
            f"The advantages of {change.rollouts:,} rollouts ({change.steps} steps) were computed again with the "
            f"suggested parts. Their "
            f"cosine with the present ones is {change.cosine:.2f}, and {change.sign_flips:.0%} of the samples change "
            f"sign: what was "
            "pushed up is pushed down, or the reverse. Of the pairs of samples that the rewards tell apart, "
            f"{change.lost[0]:.0%} get the same advantage now and {change.lost[1]:.0%} with the suggestion."
        ),
        code(change.code),
        heading("The same in a recipe"),
        code(change.recipe),
    ]
    for name, entry in change.tables.items():
        now, then = (1, 2) if name == "reward" else (2, 3)
        plot = _bars(
            [row[0] for row in entry.rows],
            {"now": [row[now] for row in entry.rows], "suggested": [row[then] for row in entry.rows]},
            entry.title,
            "correlation" if name == "reward" else "share",
        )
        fragments.append(figure(plot))
        fragments.append(details("figures", [table(entry.headers, entry.rows)]))
    return Section("What if: the update with the suggested parts", fragments)


def _background(diagnosis: Diagnosis, problems: Sequence[Finding]) -> Section:
    fragments = []
    tables = diagnosis.tables
    drawn = {f.kind for f in problems}
    if "shares" in tables and len(tables["shares"].rows) > 1 and "drowned" not in drawn:
        plot = _shares(tables, None)
        fragments.append(figure(plot[0], plot[1]))
    if "drift" in tables and "drift" not in drawn and tables["drift"].rows:
        plot = _drift(tables, None)
        fragments.append(figure(plot[0], plot[1]))
    for entry in tables.values():
        fragments.append(details(entry.title, [table(entry.headers, entry.rows)]))
    return Section("All measurements", fragments)


def _not_checked(diagnosis: Diagnosis) -> Section:
    rows = list(diagnosis.not_checked.items())
    facts = diagnosis.facts
    fragments = [table(("not checked", "why"), rows)] if rows else [text("Every check could be made.")]
    fragments.append(
        text(
            f"{facts['tests']} tests were made; a warning needs an effect that is above its threshold at a "
            f"family-wise level of "
            f"{facts['family_wise_level']:.0%} (Holm). Intervals are 95 % jackknife intervals over "
            f"{facts['jackknife_blocks']:,} blocks "
            "of groups."
        )
    )
    return Section("What was not checked, and how the rest was", fragments)


def _plotly() -> Any:
    from polyreward.errors import require

    return require("plotly.graph_objects", "report")


def _bars(labels: Sequence[Any], series: Mapping[str, Sequence[Any]], title: str, axis: str) -> Any:
    go = _plotly()
    plot = go.Figure([go.Bar(name=name, x=[str(x) for x in labels], y=list(values)) for name, values in series.items()])
    plot.update_layout(
        title=title, yaxis_title=axis, barmode="group", showlegend=len(series) > 1, xaxis_type="category"
    )
    return plot


def _with_interval(
    labels: Sequence[Any],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    title: str,
    axis: str,
    marked: int | None = None,
) -> Any:
    go = _plotly()
    colours = [PALETTE[1] if k == marked else PALETTE[0] for k in range(len(labels))]
    up = [_finite(h - v) for h, v in zip(high, values, strict=True)]
    down = [_finite(v - b) for v, b in zip(values, low, strict=True)]
    errors = {"type": "data", "array": up, "arrayminus": down, "symmetric": False, "color": "#1f2933", "thickness": 1.2}
    plot = go.Figure(go.Bar(x=[str(x) for x in labels], y=list(values), marker_color=colours, error_y=errors))
    plot.update_layout(title=title, yaxis_title=axis, xaxis_type="category")
    return plot


def _finite(value: float) -> float:
    return value if abs(value) < float("inf") else 0.0


def _shares(tables: Any, finding: Finding | None) -> tuple[Any, str]:
    rows = tables["shares"].rows
    names = [row[0] for row in rows]
    marked = names.index(finding.subject) if finding and finding.subject in names else None
    plot = _with_interval(
        names,
        [r[2] for r in rows],
        [r[3] for r in rows],
        [r[4] for r in rows],
        "Who drives the advantages",
        "share of advantage variance",
        marked,
    )
    plot.update_yaxes(tickformat=".0%")
    return plot, "Shares add up to 100 %; below zero: the reward pulls against the sum. Bars with 95 % intervals."


def _collapse(tables: Any, finding: Finding) -> tuple[Any, str] | None:
    if "collapse" not in tables:
        return None
    rows = tables["collapse"].rows[::-1]
    go = _plotly()
    labels = [f"{row[0]}<br>{row[1]}" for row in rows]
    plot = go.Figure(go.Bar(y=labels, x=[row[2] for row in rows], orientation="h"))
    plot.update_layout(
        title="Different rewards, same advantage", xaxis_title="share of the lost distinctions", xaxis_tickformat=".0%"
    )
    plot.update_yaxes(automargin=True)
    return plot, "The combinations that the sum cannot tell apart, most frequent at the top."


def _scale(tables: Any, finding: Finding) -> tuple[Any, str] | None:
    column = {"scale": 2, "skew": 3, "heavy tail": 4}[finding.kind]
    reward = finding.subject.split(" / ")[0]
    rows = [row for row in tables["scale"].rows if row[0] == reward and row[column] is not None]
    title = {
        2: "Deviation inside groups, by task",
        3: "Skew by task",
        4: "Share of the variance carried by outliers, by task",
    }[column]
    names = [row[1] for row in rows]
    task = finding.subject.split(" / ")[-1]
    go = _plotly()
    colours = [PALETTE[1] if name == task else PALETTE[0] for name in names]
    plot = go.Figure(go.Bar(x=names, y=[row[column] for row in rows], marker_color=colours))
    plot.update_layout(title=f"{title} ({reward})", yaxis_title=title.split(",")[0].lower(), xaxis_type="category")
    return plot, ""


def _dead(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["groups without signal"].rows
    labels = [row[0] for row in rows]
    series = {"all steps": [row[2] for row in rows]}
    if any(row[3] is not None for row in rows):
        series |= {"first third": [row[3] for row in rows], "last third": [row[4] for row in rows]}
    plot = _bars(labels, series, "Groups in which all samples get the same reward", "share of groups")
    plot.update_yaxes(tickformat=".0%", range=[0, 1])
    return plot, ""


def _strata(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["strata"].rows
    plot = _with_interval(
        [row[0] for row in rows],
        [r[2] for r in rows],
        [r[3] for r in rows],
        [r[4] for r in rows],
        "Baseline error by stratum",
        "mean offset (reward)",
    )
    plot.update_xaxes(title=finding.subject)
    return (
        plot,
        "What every sample of the stratum gains (above zero) or loses (below) because one baseline serves all strata.",
    )


def _conflict(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["conflict"].rows
    labels = [f"{row[0]} / {row[1]}" for row in rows]
    marked = labels.index(finding.subject)
    plot = _with_interval(
        labels,
        [r[2] for r in rows],
        [r[3] for r in rows],
        [r[4] for r in rows],
        "Rank correlation inside groups",
        "correlation",
        marked,
    )
    plot.update_yaxes(range=[-1, 1])
    return plot, "Below zero the two rewards prefer opposite samples of the same group."


def _length(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["length"].rows
    series = {"with length": [row[1] for row in rows]}
    if any(row[2] is not None for row in rows):
        series["with length, at equal correctness"] = [row[2] for row in rows]
    plot = _bars(
        [row[0] for row in rows], series, "Rank correlation of rewards and length inside groups", "correlation"
    )
    plot.update_yaxes(range=[-1, 1])
    return plot, ""


def _drift(tables: Any, finding: Finding | None) -> tuple[Any, str]:
    entry = tables["drift"]
    names = [finding.subject] if finding else list(dict.fromkeys(row[0] for row in entry.rows))[:6]
    go = _plotly()
    plot = go.Figure()
    for k, name in enumerate(names):
        rows = [row for row in entry.rows if row[0] == name]
        steps = [row[1] for row in rows]
        if finding:
            plot.add_scatter(x=steps, y=[row[2] for row in rows], name=f"{name} (mean)", line={"color": PALETTE[1]})
            plot.add_scatter(
                x=steps, y=[row[3] for row in rows], name="trusted reward (mean)", line={"color": PALETTE[0]}
            )
        colour = PALETTE[2] if finding else PALETTE[k % len(PALETTE)]
        plot.add_scatter(
            x=steps,
            y=[row[4] for row in rows],
            name=f"{name}: correlation" if finding else name,
            line={"color": colour, "dash": "dot"},
        )
    title = (
        entry.title
        if finding
        else f"Correlation with the trusted reward inside groups ({entry.title.split(' ', 2)[-1]})"
    )
    plot.update_layout(
        title=title,
        xaxis_title="step",
        yaxis_title="reward; correlation" if finding else "correlation",
        legend={"orientation": "h", "y": -0.25},
    )
    return (
        plot,
        "Dotted: correlation inside groups. A proxy that rises while the trusted reward falls is being exploited.",
    )


def _diversity(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = [row for row in tables["diversity"].rows if row[0] == finding.subject]
    go = _plotly()
    plot = go.Figure(go.Scatter(x=[row[1] for row in rows], y=[row[2] for row in rows], mode="lines+markers"))
    plot.update_layout(
        title=f"{finding.subject.capitalize()} over the steps", xaxis_title="step", yaxis_title=finding.subject
    )
    plot.update_yaxes(rangemode="tozero")
    return plot, ""


_FIGURES: dict[str, Callable[[Mapping[str, Table], Finding], tuple[Any, str] | None]] = {
    "drowned": _shares,
    "collapse": _collapse,
    "scale": _scale,
    "skew": _scale,
    "heavy tail": _scale,
    "groups without signal": _dead,
    "cross-stratum bias": _strata,
    "conflict": _conflict,
    "length dependence": _length,
    "drift": _drift,
    "loss of diversity": _diversity,
}
