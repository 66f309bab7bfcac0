"""The HTML report of a reward model: accuracy, calibration, length, annotators, best of n, how the fit went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyreward.errors import require
from polyreward.report.html import PALETTE, Section, cards, figure, notice, table, text, write_page

if TYPE_CHECKING:
    from polyreward.audit.reward_models import Estimate, ModelAudit

_HEADERS = ("", "value", "95 % from", "to", "pairs")


def write_audit(
    path: str | Path, audit: ModelAudit, source: str, histories: Sequence[Sequence[Mapping[str, float]]] = ()
) -> Path:
    """Write the report of `audit` on the model `source`; `histories` are those of a fit, one a member."""
    sections = [_accuracy(audit), _calibration(audit)]
    if audit.length is not None:
        sections.append(_length(audit))
    if len(audit.annotators) > 1:
        sections.append(_annotators(audit))
    if audit.best_of_n:
        sections.append(_best_of_n(audit))
    if any(histories):
        sections.append(_fit(histories))
    error = audit.calibration.error
    lead = [
        cards(
            [
                ("accuracy", f"{audit.accuracy.value:.3f}"),
                ("95 % interval", f"{audit.accuracy.low:.3f}–{audit.accuracy.high:.3f}"),
                ("pairs", f"{audit.accuracy.count:,}"),
                ("calibration error", f"{error.value:.3f}"),
                ("annotators", str(len(audit.annotators) or "–")),
            ]
        ),
        text(
            "Every figure is about pairs of responses to one prompt of which one was preferred, and comes with a 95 % "
            "interval. Intervals resample prompts."
        ),
    ]
    return write_page(path, "What this reward model is worth", sections, f"Audit of {source}", lead)


def _row(name: str, estimate: Estimate) -> tuple[Any, ...]:
    return (name, estimate.value, estimate.low, estimate.high, estimate.count)


def _accuracy(audit: ModelAudit) -> Section:
    rows = [_row("accuracy", audit.accuracy), _row("margin / its deviation", audit.margin)]
    chance = audit.accuracy.low <= 0.5 <= audit.accuracy.high
    fragments = [table(_HEADERS, rows)]
    if chance:
        fragments.insert(
            0, notice("chance", "The interval of the accuracy holds 0.5: no better than a coin.", "warning")
        )
    if audit.ties > 0.01:
        fragments.append(text(f"{audit.ties:.1%} of the pairs have equal scores; these count half."))
    return Section("Accuracy", fragments)


def _calibration(audit: ModelAudit) -> Section:
    curve, go = audit.calibration, _plotly()
    plot = go.Figure()
    plot.add_scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", line={"dash": "dot", "color": "#7a7a7a"}, name="exact")
    plot.add_scatter(
        x=curve.confidence,
        y=curve.observed,
        mode="lines+markers",
        line={"color": PALETTE[0]},
        name="model",
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [h - o for h, o in zip(curve.high, curve.observed, strict=True)],
            "arrayminus": [o - b for b, o in zip(curve.low, curve.observed, strict=True)],
            "thickness": 1.2,
        },
    )
    plot.update_layout(
        title="How sure, and how often right",
        xaxis_title="probability of the favoured response",
        yaxis_title="share preferred",
        legend=_LEGEND,
    )
    words = (
        f"The calibration error is {curve.error.value:.3f} (95 %: {curve.error.low:.3f} to {curve.error.high:.3f}). "
        f"A model with exact probabilities would have {curve.floor:.3f} on so many pairs."
    )
    rows = [
        _row("calibration error", curve.error),
        _row("Brier score", curve.brier),
        _row("log loss, nats", curve.log_loss),
    ]
    return Section(
        "Calibration",
        [
            text(words),
            figure(plot, "Points below the line: surer than right. Bars are 95 % intervals."),
            table(_HEADERS, rows),
        ],
    )


def _length(audit: ModelAudit) -> Section:
    effect = audit.length
    assert effect is not None
    rows = [
        _row("accuracy where the preferred response is longer", effect.longer),
        _row("accuracy where it is shorter", effect.shorter),
        _row("accuracy of preferring the longer", effect.length_only),
        _row("correlation of score margin and log-length", effect.correlation),
        _row("length beside the scores (logistic coefficient)", effect.partial),
    ]
    partial, fragments = effect.partial, []
    if partial.high < 0:
        words = "Given the scores, people prefer the shorter response: the scores give length more than people do."
        fragments.append(notice("length bias", words, "warning"))
    elif partial.low > 0:
        fragments.append(
            notice("length", "Given the scores, people still prefer the longer response: the scores give length less.")
        )
    return Section("Length", [*fragments, table(_HEADERS, rows)])


def _annotators(audit: ModelAudit) -> Section:
    order = sorted(audit.annotators.items(), key=lambda item: item[1].value)
    shown = order if len(order) <= 60 else [*order[:30], *order[-30:]]
    plot = _plotly().Figure()
    plot.add_scatter(
        x=[name for name, _ in shown],
        y=[e.value for _, e in shown],
        mode="markers",
        marker={"color": PALETTE[0], "size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [e.high - e.value for _, e in shown],
            "arrayminus": [e.value - e.low for _, e in shown],
            "thickness": 1.2,
        },
    )
    plot.add_hline(y=audit.accuracy.value, line={"dash": "dot", "color": "#7a7a7a"})
    plot.update_layout(title="Accuracy by annotator", yaxis_title="accuracy", xaxis_type="category")
    some = "" if len(shown) == len(order) else f" The 30 lowest and 30 highest of {len(order):,}."
    caption = f"The dotted line is the accuracy over all.{some}"
    return Section("Annotators", [figure(plot, caption), table(_HEADERS, [_row(name, e) for name, e in shown])])


def _best_of_n(audit: ModelAudit) -> Section:
    curve = audit.best_of_n
    kl = [point["kl"] for point in curve]
    plot = _plotly().Figure()
    plot.add_scatter(
        x=[*kl, *kl[::-1]],
        y=[*(point["high"] for point in curve), *(point["low"] for point in reversed(curve))],
        fill="toself", mode="lines", line={"width": 0}, fillcolor="rgba(47,111,159,0.15)", hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    plot.add_scatter(x=kl, y=[point["gold"] for point in curve], mode="lines+markers", name="mean rating")
    plot.add_scatter(
        x=kl, y=[point["proxy"] for point in curve], mode="lines+markers", name="mean score (right axis)", yaxis="y2",
        line={"color": PALETTE[1], "dash": "dash"},
    )  # fmt: skip
    plot.update_layout(
        title="Selecting the best of n by this model",
        xaxis_title="KL of best of n, nats",
        yaxis_title="rating of the selected",
        yaxis2={"title": "score of the selected", "overlaying": "y", "side": "right", "showgrid": False},
        legend=_LEGEND,
    )
    peak = max(range(len(curve)), key=lambda k: curve[k]["gold"])
    fragments = []
    if peak < len(curve) - 1 and curve[-1]["high"] < curve[peak]["gold"]:
        words = f"Ratings peak at n = {curve[peak]['n']} and fall beyond, while scores go on rising."
        fragments.append(notice("over-optimisation", words, "warning"))
    rows = [[p["n"], p["kl"], p["proxy"], p["gold"], p["low"], p["high"]] for p in curve]
    headers = ("n", "KL, nats", "mean score", "mean rating", "95 % from", "to")
    caption = "Ratings that fall while scores rise are over-optimisation."
    return Section("Best of n", [*fragments, figure(plot, caption), table(headers, rows)])


def _fit(histories: Sequence[Sequence[Mapping[str, float]]]) -> Section:
    plot = _plotly().Figure()
    for number, history in enumerate(histories):
        name = "" if len(histories) == 1 else f", member {number}"
        colour = PALETTE[number % len(PALETTE)]
        for key, label, dash in (("loss", "training", "dot"), ("validation_loss", "validation", "solid")):
            if history and key in history[0]:
                plot.add_scatter(
                    x=[entry["epoch"] for entry in history], y=[entry[key] for entry in history],
                    name=f"{label}{name}", mode="lines+markers", line={"color": colour, "dash": dash},
                )  # fmt: skip
    plot.update_layout(title="Loss over the fit", xaxis_title="epoch", yaxis_title="loss", legend=_LEGEND)
    return Section("The fit", [figure(plot, "The weights of the lowest validation loss are kept.")])


_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}


def _plotly() -> Any:
    return require("plotly.graph_objects", "report")
