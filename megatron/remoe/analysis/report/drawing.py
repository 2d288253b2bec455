"""What the figures of a report are made of, and how they look.

Figures are described by Plotly's Python classes and drawn by its script in the browser.
"""

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly import graph_objects as go

from megatron.remoe.analysis.report.subject import Row, Subject

# Colors that color-blind people can tell apart, and that are seen on white and on black: Okabe and
# Ito's without black and yellow (https://jfly.uni-koeln.de/color/). Symbols tell as much.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
SCALE = "Cividis"  # of heat maps
DIVERGING = "RdBu"
HEIGHT = 330  # pixels
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


@dataclass(frozen=True)
class Panel:
    """A picture.

    Attributes:
        title: what tells it from other pictures of its figure, such as the run; may be empty.
        drawn: what Plotly draws.
        layers: the selections of the switch for the layer in which it is shown; () for always.
    """

    title: str
    drawn: go.Figure
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """Pictures that answer a question, with their numbers.

    Attributes:
        name: the name of the table that it draws.
        title: the question or its subject.
        says: one sentence: what is shown, and how to read it.
        panels: its pictures.
        rows: its numbers.
        wide: whether it takes the whole width of the page.
        nothing: what is said instead of a figure that has no panel.
    """

    name: str
    title: str
    says: str
    panels: list[Panel] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    wide: bool = False
    nothing: str = "The analysis has no numbers for this."


def template(*, dark: bool) -> dict[str, Any]:
    """Return the look of all figures, which the browser chooses by its setting."""
    text, grid, zero = ("#d7dce2", "#333a44", "#5b6673") if dark else ("#23292f", "#e3e7eb", "#aab")
    axis = {
        "gridcolor": grid, "zerolinecolor": zero, "linecolor": zero, "automargin": True,
        "title": {"standoff": 8},
    }  # fmt: skip
    label = {"bgcolor": "#20262e" if dark else "#ffffff", "font": {"color": text, "size": 13}}
    layout = {
        "font": {"family": _FONT, "size": 13, "color": text},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(COLORS),
        "xaxis": axis,
        "yaxis": axis,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 40},
        "hoverlabel": label | {"bordercolor": zero, "align": "left"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    }
    return {"layout": layout}


def style(number: int, *, hollow: bool = False, dash: bool = False) -> dict[str, Any]:
    """Return the color, the symbol and the dash of the run with this number, from 0."""
    color = COLORS[number % len(COLORS)]
    symbol = SYMBOLS[number % len(SYMBOLS)]
    dashes = DASHES[1:] if dash else DASHES
    return {
        "marker": {"color": color, "symbol": symbol + "-open" * hollow, "size": 8},
        "line": {"color": color, "dash": dashes[number // len(COLORS) % len(dashes)], "width": 2},
    }


def plain(text: Any) -> str:
    """Return a text that Plotly shows as it is, without markup."""
    return html.escape(str(text), quote=False)


def number(value: Any, form: str = ".3g") -> str:
    """Return a number in words; a dash if there is none."""
    return "–" if value is None else format(value, form)


def figure(
    traces: Iterable[Any], x: str, y: str, *, height: int = HEIGHT, **layout: Any
) -> go.Figure:
    """Return a picture with titled axes.

    Args:
        traces: Plotly's traces.
        x: the title of the horizontal axis.
        y: the title of the vertical axis.
        height: in pixels.
        layout: other settings of the layout; `xaxis` and `yaxis` are added to those here.
    """
    traces = list(traces)
    axes = {
        "xaxis": {"title": {"text": x}} | layout.pop("xaxis", {}),
        "yaxis": {"title": {"text": y}} | layout.pop("yaxis", {}),
    }
    several = sum(trace.showlegend is not False for trace in traces) > 1
    look = {"height": height, "template": "none", "showlegend": several}
    return go.Figure(traces, look | axes | layout)


def layers_of(subjects: Sequence[Subject], table: str) -> list[str]:
    """Return the selections of the switch for which a table has rows, "all" first."""
    found = {str(row["layer"]) for subject in subjects for row in subject.tables[table]}
    return sorted(found, key=lambda layer: (layer != "all", layer.zfill(9)))


def of_layer(subject: Subject, table: str, layer: str) -> list[Row]:
    """Return the rows of a table of a layer, or of "all"."""
    return [row for row in subject.tables[table] if str(row["layer"]) == layer]


def joined(subjects: Sequence[Subject], table: str) -> list[Row]:
    """Return the rows of a table of all models, with the name of the model as first column."""
    return [{"run": one.name} | row for one in subjects for row in one.tables[table]]


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV, whose numbers have six digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: rounded(value, 6) for key, value in row.items()})
    return text.getvalue()


def rounded(value: Any, digits: int = 5) -> Any:
    """Return a value of JSON in which numbers have this many digits, and none is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 10**digits else short
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value
