"""Self-contained HTML pages: text, tables and Plotly figures in one file that opens without a network.

A page is a title and a list of sections; a section is a heading and HTML fragments made by `text`, `table`, `figure`,
`code`, `notice`, `cards` and `details`. Every helper escapes what it is given, so a reward or task name cannot break
the page. Plotly's script is written into the page once, and only when the page holds a figure.

    page("Training", [Section("Reward", [text("Reward over steps."), figure(plotly_figure)])])
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyreward.errors import require
from polyreward.storage import write_text

PALETTE = ("#2f6f9f", "#d1773b", "#4f9d69", "#8b5fa8", "#c2a13a", "#b0484f", "#4aa3a2", "#7a7a7a")

_ids = itertools.count()

_STYLE = """
:root{--ink:#1f2933;--soft:#5b6773;--line:#dde3e9;--back:#f6f8fa;--accent:#2f6f9f;--error:#b3261e;--warning:#b26a00;
--info:#2f6f9f;--good:#2e7d4f}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 24px 80px}
h1{font-size:27px;line-height:1.25;margin:0 0 4px}
h2{font-size:20px;margin:0 0 12px}
h3{font-size:16px;margin:18px 0 6px}
p{margin:0 0 10px;max-width:82ch}
.subtitle{color:var(--soft);margin-bottom:20px}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:16px 0}
.scroll{overflow-x:auto;margin:6px 0 12px}
table{border-collapse:collapse;font-size:14px;width:100%}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{background:#f0f3f6;border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:13.5px;
line-height:1.45;margin:6px 0 12px;white-space:pre-wrap;overflow-wrap:anywhere}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.notice{border-left:5px solid var(--info);background:#f3f7fb;border-radius:6px;padding:10px 14px;margin:10px 0}
a{color:var(--accent)}
.notice a{white-space:nowrap}
.notice b{display:block;font-size:12px;letter-spacing:.05em;text-transform:uppercase;color:var(--info)}
.notice.error{border-color:var(--error);background:#fdf3f2}.notice.error b{color:var(--error)}
.notice.warning{border-color:var(--warning);background:#fff8ec}.notice.warning b{color:var(--warning)}
.notice.good{border-color:var(--good);background:#f1f9f4}.notice.good b{color:var(--good)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:12px 0}
.card{border:1px solid var(--line);border-radius:8px;padding:10px 14px;background:#fff}
.card .value{font-size:22px;font-weight:650}.card .label{color:var(--soft);font-size:13px}
.caption{color:var(--soft);font-size:14px;margin:-2px 0 12px}
details{margin:8px 0}summary{cursor:pointer;color:var(--accent)}
.figure{width:100%}
"""


@dataclass(frozen=True)
class Section:
    """A block of a page: heading, then fragments of HTML in order; `key` is what a notice can link to."""

    title: str
    fragments: Sequence[str] = field(default_factory=tuple)
    key: str = ""


def text(sentence: str) -> str:
    """A paragraph."""
    return f"<p>{_prose(sentence)}</p>"


def _prose(sentence: str) -> str:
    """Escaped text in which a per cent sign stays on the line of its number."""
    return html.escape(sentence).replace(" %", "&nbsp;%")


def heading(words: str) -> str:
    """A heading inside a section."""
    return f"<h3>{html.escape(words)}</h3>"


def code(source: str) -> str:
    """Code to copy."""
    return f"<pre><code>{html.escape(source)}</code></pre>"


def notice(label: str, sentence: str, kind: str = "info", link: str = "") -> str:
    """A highlighted sentence; `kind` is "info", "good", "warning" or "error", `link` the key of a section."""
    more = f' <a href="#{html.escape(link)}">Figure and remedy</a>' if link else ""
    return f'<div class="notice {html.escape(kind)}"><b>{html.escape(label)}</b>{_prose(sentence)}{more}</div>'


def cards(facts: Iterable[tuple[str, str]]) -> str:
    """Headline figures: pairs of label and value."""
    boxes = "".join(
        f'<div class="card"><div class="value">{html.escape(value)}</div>'
        f'<div class="label">{html.escape(label)}</div></div>'
        for label, value in facts
    )
    return f'<div class="cards">{boxes}</div>'


def details(summary: str, fragments: Iterable[str]) -> str:
    """Fragments that open on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(fragments)}</details>"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table; numbers are right-aligned and shown with three significant digits, None and NaN as a dash."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[k], int | float) or row[k] is None for row in rows)
        for k in range(len(headers))
    ]
    mark = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{mark[k]}>{html.escape(name)}</th>" for k, name in enumerate(headers))
    body = "".join(
        "<tr>" + "".join(f"<td{mark[k]}>{html.escape(show(value))}</td>" for k, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    note = f'<div class="caption">{html.escape(caption)}</div>' if caption else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def show(value: Any) -> str:
    """A value as text: integers with thousands separators, other numbers with three significant digits."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:,.0f}" if abs(value) >= 1000 else (f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}")
    return str(value)


def figure(plot: Any, caption: str = "", height: int = 340) -> str:
    """A Plotly figure, drawn in the reader's browser.

    Parameters
    ----------
    plot : plotly.graph_objects.Figure
    caption : one line below the figure
    height : pixels
    """
    plot.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 46, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        colorway=list(PALETTE),
        title={"font": {"size": 15}, "x": 0.01, "xanchor": "left"},
    )
    name = f"figure-{next(_ids)}"
    # "</" inside a script element would end it
    data = plot.to_json().replace("</", "<\\/")
    note = f'<div class="caption">{html.escape(caption)}</div>' if caption else ""
    return (
        f'<div class="figure" id="{name}" style="height:{height}px"></div>'
        f"<script>(function(){{var f={data};Plotly.newPlot('{name}',f.data,f.layout,"
        f"{{responsive:true,displaylogo:false,displayModeBar:false}});}})();</script>{note}"
    )


def page(title: str, sections: Sequence[Section], subtitle: str = "", lead: Sequence[str] = ()) -> str:
    """A whole page as text; `lead` are fragments above the first section.

    Raises
    ------
    MissingExtraError
        The page holds a figure and Plotly is not installed.
    """
    content = [*lead]
    for section in sections:
        key = f' id="{html.escape(section.key)}"' if section.key else ""
        content.append(f"<section{key}><h2>{html.escape(section.title)}</h2>{''.join(section.fragments)}</section>")
    body = "\n".join(content)
    script = f"<script>{_plotly_script()}</script>" if "Plotly.newPlot(" in body else ""
    below = f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>{script}</head>"
        f"<body><main><h1>{html.escape(title)}</h1>{below}\n{body}\n</main></body></html>\n"
    )


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], subtitle: str = "", lead: Sequence[str] = ()
) -> Path:
    """Write `page` to a file, whole or not at all."""
    return write_text(path, page(title, sections, subtitle, lead))


def _plotly_script() -> str:
    offline: Any = require("plotly.offline", "report")
    return offline.get_plotlyjs()
