"""The figures of a diagnosis, one for each kind of finding, with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polyreward.errors import require
from polyreward.report.html import PALETTE

if TYPE_CHECKING:
    from polyreward.audit.diagnose import Finding, Table


def _plotly() -> Any:
    return require("plotly.graph_objects", "report")


def bars(labels: Sequence[Any], series: Mapping[str, Sequence[Any]], title: str, axis: str) -> Any:
    """Bars of one or several series over named things."""
    go = _plotly()
    plot = go.Figure([go.Bar(name=name, x=[str(x) for x in labels], y=list(values)) for name, values in series.items()])
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    plot.update_layout(title=title, yaxis_title=axis, barmode="group", xaxis_type="category", legend=legend)
    plot.update_layout(showlegend=len(series) > 1)
    plot.update_xaxes(automargin=True)
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


def shares(tables: Any, finding: Finding | None) -> tuple[Any, str]:
    """Each reward's share of the advantage variance; the reward of the finding is orange."""
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
    name, column, title, axis, caption = _BY_TASK[finding.kind]
    subject = finding.subject
    rows = [row for row in tables[name].rows if subject in (row[0], f"{row[0]} / {row[1]}")]
    if not rows:
        return None
    reward = rows[0][0]
    rows = [row for row in tables[name].rows if row[0] == reward and row[column] is not None]
    marked = next((k for k, row in enumerate(rows) if subject == f"{row[0]} / {row[1]}"), None)
    go = _plotly()
    colours = [PALETTE[1] if k == marked else PALETTE[0] for k in range(len(rows))]
    plot = go.Figure(go.Bar(x=[row[1] for row in rows], y=[row[column] for row in rows], marker_color=colours))
    plot.update_layout(title=f"{title} ({reward})", yaxis_title=axis, xaxis_title="task", xaxis_type="category")
    if finding.kind != "scale":
        plot.update_yaxes(tickformat=".0%")
    return plot, caption


_BY_TASK = {
    "scale": (
        "scale", 2, "How far apart the reward sets the samples of a group", "scale (in units of the reward)",
        "Orange: the task that the finding is about.",
    ),
    "skew": (
        "shape", 2, "Skew of the reward inside groups", "share of the largest possible",
        "Above zero: a few samples stand far above the rest of their group; below zero: far below.",
    ),
    "heavy tail": (
        "shape", 3, "Share of the squared deviations that outliers carry", "share",
        "Outliers: samples further than six robust deviations from the median of their task.",
    ),
}  # fmt: skip


def _dead(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["groups without signal"].rows
    labels = [row[0] for row in rows]
    series = {"all steps": [row[2] for row in rows]}
    if any(row[3] is not None for row in rows):
        series |= {"first third": [row[3] for row in rows], "last third": [row[4] for row in rows]}
    plot = bars(labels, series, "Groups in which all samples get the same reward", "share of groups")
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
    pairs = {(row[0], row[1]): row[2] for row in tables["conflict"].rows}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    values = [[pairs.get((a, b), pairs.get((b, a))) for b in names] for a in names]
    shown = [["" if value is None else f"{value:.2f}" for value in row] for row in values]
    go = _plotly()
    colours = [[0, PALETTE[1]], [0.5, "#ffffff"], [1, PALETTE[0]]]
    plot = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=values,
            text=shown,
            texttemplate="%{text}",
            zmin=-1,
            zmax=1,
            colorscale=colours,
            xgap=2,
            ygap=2,
        )
    )
    plot.update_layout(title="Rank correlation of rewards inside groups")
    plot.update_yaxes(autorange="reversed", automargin=True)
    plot.update_xaxes(automargin=True)
    return plot, "Below zero (orange) the two rewards prefer opposite samples of the same group."


def _length(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = tables["length"].rows
    series = {"with length": [row[1] for row in rows]}
    if any(row[2] is not None for row in rows):
        series["with length, at equal correctness"] = [row[2] for row in rows]
    plot = bars([row[0] for row in rows], series, "Rank correlation of rewards and length inside groups", "correlation")
    plot.update_yaxes(range=[-1, 1])
    return plot, "What is left at equal correctness is what length alone earns (above zero) or costs (below)."


def _drift(tables: Any, finding: Finding) -> tuple[Any, str]:
    subplots: Any = require("plotly.subplots", "report")
    rows = [row for row in tables["drift"].rows if row[0] == finding.subject]
    trusted = tables["drift"].headers[3].removeprefix("mean of ")
    titles = (f"mean of {finding.subject}", f"mean of {trusted} (trusted)", "their correlation inside groups")
    plot = subplots.make_subplots(rows=3, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    for place, (column, colour) in enumerate(((2, PALETTE[1]), (3, PALETTE[0]), (4, PALETTE[2])), start=1):
        x, y = [row[1] for row in rows], [row[column] for row in rows]
        plot.add_scatter(x=x, y=y, mode="lines+markers", line={"color": colour}, row=place, col=1, showlegend=False)
    plot.update_xaxes(title="step", row=3, col=1)
    plot.update_yaxes(range=[-1.05, 1.05], row=3, col=1)
    plot.update_annotations(font_size=13, x=0, xanchor="left")
    return plot, "A proxy that rises while the trusted reward does not, or that stops going with it, is exploited."


def coupling(tables: Any) -> tuple[Any, str]:
    """Correlation of every reward with the trusted one over the steps."""
    go = _plotly()
    plot = go.Figure()
    for k, name in enumerate(list(dict.fromkeys(row[0] for row in tables["drift"].rows))[: len(PALETTE)]):
        rows = [row for row in tables["drift"].rows if row[0] == name]
        x, y = [row[1] for row in rows], [row[4] for row in rows]
        plot.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": PALETTE[k]})
    trusted = tables["drift"].headers[3].removeprefix("mean of ")
    plot.update_layout(
        title=f"How far each reward goes with {trusted}, the trusted one", xaxis_title="step", yaxis_title="correlation"
    )
    plot.update_yaxes(range=[-1.05, 1.05])
    return plot, "Correlation inside groups. It falls without harm where a reward reaches its ceiling."


def _diversity(tables: Any, finding: Finding) -> tuple[Any, str]:
    rows = [row for row in tables["diversity"].rows if row[0] == finding.subject]
    go = _plotly()
    plot = go.Figure(go.Scatter(x=[row[1] for row in rows], y=[row[2] for row in rows], mode="lines+markers"))
    plot.update_layout(
        title=f"{finding.subject.capitalize()} over the steps", xaxis_title="step", yaxis_title=finding.subject
    )
    plot.update_yaxes(rangemode="tozero")
    return plot, ""


FIGURES: dict[str, Callable[[Mapping[str, Table], Finding], tuple[Any, str] | None]] = {
    "drowned": shares,
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
