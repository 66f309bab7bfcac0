"""The HTML report of a reward model on a benchmark: figures, calibration, groups, best of n, how the fit went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyreward.errors import require
from polyreward.report.html import PALETTE, Section, cards, details, figure, notice, table, text, write_page

if TYPE_CHECKING:
    from polyreward.audit.benchmarks import BenchmarkReport

Rows = Sequence[Mapping[str, Any]]
_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
_SHOWN = 60


def write_audit(
    path: str | Path, report: BenchmarkReport, histories: Sequence[Sequence[Mapping[str, float]]] = ()
) -> Path:
    """Write the report; `histories` are those of a fit, one a member."""
    sections = [_figures(report)]
    for title, rows in report.tables.items():
        if title == "calibration":
            sections.append(_calibration(report, rows))
        elif title == "best of n":
            sections.append(_best_of_n(rows))
        elif rows:
            sections.append(_groups(title, rows, report.figures.get("accuracy")))
    if any(histories):
        sections.append(_fit(histories))
    low, high = report.intervals.get("accuracy", (None, None))
    facts = [(name, f"{value:,}") for name, value in report.counts.items() if value]
    if "accuracy" in report.figures:
        facts = [("accuracy", f"{report.figures['accuracy']:.3f}"), ("95 % interval", _range(low, high)), *facts]
    lead = [cards(facts), *(text(_sentence(note)) for note in report.notes)]
    return write_page(
        path, "What this reward model is worth", sections, f"{report.model} on {report.path} ({report.benchmark})", lead
    )


def warnings_of(report: BenchmarkReport) -> list[str]:
    """Sentences about what deserves attention, each true at the 95 % level."""
    found = []
    low, high = report.intervals.get("accuracy", (1.0, 1.0))
    if report.benchmark == "pairs" and low <= 0.5 <= high:
        found.append("The interval of the accuracy holds 0.5: no better than a coin.")
    low, high = report.intervals.get("effect of length", (0.0, 0.0))
    if high < 0:
        found.append(
            "Given the scores, people prefer the shorter response: the scores give length more than people do."
        )
    elif low > 0:
        found.append("Given the scores, people still prefer the longer response: the scores give length less.")
    curve = report.tables.get("best of n", [])
    if curve:
        peak = max(curve, key=lambda row: row["rating"])
        if curve[-1]["high"] < peak["rating"]:
            found.append(
                f"Selecting by this model, ratings peak at the best of {peak['n']} and fall beyond while scores go on "
                "rising: over-optimisation."
            )
    return found


def _figures(report: BenchmarkReport) -> Section:
    rows = [
        (name, float(value), *map(_number, report.intervals.get(name, (None, None))))
        for name, value in report.figures.items()
    ]
    found = [notice("look here", sentence, "warning") for sentence in warnings_of(report)]
    return Section("Figures", [*found, table(("", "value", "95 % from", "to"), rows)])


def _calibration(report: BenchmarkReport, rows: Rows) -> Section:
    known = [row for row in rows if row["pairs"]]
    plot = _plotly().Figure()
    plot.add_scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", line={"dash": "dot", "color": "#7a7a7a"}, name="exact")
    plot.add_scatter(
        x=[row["stated"] for row in known], y=[row["right"] for row in known], mode="lines+markers", name="model",
        line={"color": PALETTE[0]}, error_y=_bars(known, "right"),
    )  # fmt: skip
    plot.update_layout(
        title="How sure, and how often right",
        xaxis_title="probability of the favoured response",
        yaxis_title="share preferred",
        legend=_LEGEND,
    )
    low, high = report.intervals.get("calibration error", (float("nan"), float("nan")))
    words = (
        f"The expected calibration error is {report.figures['calibration error']:.3f} (95 %: {low:.3f} to {high:.3f}, "
        "without what chance adds)."
    )
    caption = "Points below the line: surer than right. Bars are 95 % intervals."
    return Section("Calibration", [text(words), figure(plot, caption), details("The numbers", [_table(known)])])


def _groups(title: str, rows: Rows, everyone: float | None) -> Section:
    name = next(iter(rows[0]))
    if "accuracy" not in rows[0] or len(rows) < 2:
        return Section(title.capitalize(), [_table(rows)])
    order = sorted(rows, key=lambda row: row["accuracy"])
    shown = order if len(order) <= _SHOWN else [*order[: _SHOWN // 2], *order[-_SHOWN // 2 :]]
    plot = _plotly().Figure()
    plot.add_scatter(
        x=[str(row[name]) for row in shown], y=[row["accuracy"] for row in shown], mode="markers",
        marker={"color": PALETTE[0], "size": 8}, error_y=_bars(shown, "accuracy"),
    )  # fmt: skip
    if everyone is not None:
        plot.add_hline(y=everyone, line={"dash": "dot", "color": "#7a7a7a"})
    plot.update_layout(title=f"Accuracy {title}", yaxis_title="accuracy", xaxis_type="category")
    plot.update_xaxes(automargin=True)
    caption = "The dotted line is the accuracy over all." if everyone is not None else ""
    if len(shown) < len(order):
        caption += f" The {_SHOWN // 2} lowest and highest of {len(order):,}."
    return Section(title.capitalize(), [figure(plot, caption.strip()), details("The numbers", [_table(shown)])])


def _best_of_n(rows: Rows) -> Section:
    kl = [row["KL, nats"] for row in rows]
    plot = _plotly().Figure()
    plot.add_scatter(
        x=[*kl, *kl[::-1]], y=[*(row["high"] for row in rows), *(row["low"] for row in reversed(rows))],
        fill="toself", mode="lines", line={"width": 0}, fillcolor="rgba(47,111,159,0.15)", hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    plot.add_scatter(x=kl, y=[row["rating"] for row in rows], mode="lines+markers", name="rating")
    plot.add_scatter(
        x=kl, y=[row["score"] for row in rows], mode="lines+markers", name="score (right axis)", yaxis="y2",
        line={"color": PALETTE[1], "dash": "dash"},
    )  # fmt: skip
    plot.update_layout(
        title="The best of n by this model",
        xaxis_title="KL of best of n, nats",
        yaxis_title="rating of the selected",
        yaxis2={"title": "score of the selected", "overlaying": "y", "side": "right", "showgrid": False},
        legend=_LEGEND,
    )
    caption = "Ratings that fall while scores rise are over-optimisation."
    return Section("Best of n", [figure(plot, caption), details("The numbers", [_table(rows)])])


def _fit(histories: Sequence[Sequence[Mapping[str, float]]]) -> Section:
    plot = _plotly().Figure()
    for number, history in enumerate(histories):
        name = "" if len(histories) == 1 else f", member {number}"
        for key, label, dash in (("loss", "training", "dot"), ("validation_loss", "validation", "solid")):
            if history and key in history[0]:
                plot.add_scatter(
                    x=[entry["epoch"] for entry in history], y=[entry[key] for entry in history],
                    name=f"{label}{name}", mode="lines+markers",
                    line={"color": PALETTE[number % len(PALETTE)], "dash": dash},
                )  # fmt: skip
    plot.update_layout(title="Loss over the fit", xaxis_title="epoch", yaxis_title="loss", legend=_LEGEND)
    return Section("The fit", [figure(plot, "The weights of the lowest validation loss are kept.")])


def _bars(rows: Rows, name: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [row["high"] - row[name] for row in rows],
        "arrayminus": [row[name] - row["low"] for row in rows],
        "thickness": 1.2,
    }


def _table(rows: Rows) -> str:
    return table(list(rows[0]), [[_number(value) for value in row.values()] for row in rows])


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _range(low: Any, high: Any) -> str:
    return "–" if low is None else f"{low:.3f}–{high:.3f}"


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:] + ("" if note.endswith(".") else ".")


def _plotly() -> Any:
    return require("plotly.graph_objects", "report")
