"""Figures of the tokens that get many experts, and of what experts cost."""

from collections.abc import Callable, Sequence
from typing import Any

from plotly import graph_objects as go

from megatron.remoe.analysis.report.drawing import (
    Figure,
    Panel,
    figure,
    joined,
    layers_of,
    number,
    of_layer,
    plain,
    style,
)
from megatron.remoe.analysis.report.subject import Row, Subject

Place = Callable[[Row], Any]
ACTIVE = "active experts per token"


def points(
    subject: Subject,
    place: int,
    rows: Sequence[Row],
    x: Place,
    y: str,
    hover: Callable[[Row], str],
    *,
    name: str = "",
    mode: str = "lines+markers",
    hollow: bool = False,
) -> go.Scatter:
    """Return the curve of a model, with the intervals of its rows if they have them.

    Args:
        subject: the model.
        place: its number among the models, which determines its color.
        rows: the rows of a table.
        x: what a row's place on the horizontal axis is.
        y: the column that is drawn.
        hover: what the mouse shows of a row, as lines of Plotly's markup.
        name: what the curve is, if a model has several.
        mode: lines, markers or both.
        hollow: whether the marks are hollow and the line is broken.
    """
    bars = None
    if rows and rows[0].get("low") is not None:
        bars = {
            "type": "data", "symmetric": False, "width": 3, "thickness": 1.2,
            "array": [_minus(row["high"], row[y]) for row in rows],
            "arrayminus": [_minus(row[y], row["low"]) for row in rows],
        }  # fmt: skip
    title = plain(f"{subject.name}{', ' * bool(name)}{name}")
    return go.Scatter(
        x=[x(row) for row in rows],
        y=[row[y] for row in rows],
        error_y=bars,
        name=title,
        mode=mode,
        hovertext=[f"<b>{title}</b><br>{hover(row)}" for row in rows],
        hoverinfo="text",
        **style(place, hollow=hollow, dash=hollow),
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(0.0, a - b)


def interval(row: Row, key: str = "mean") -> str:
    """Return a mean in words, with its interval if there is one."""
    text = number(row[key])
    return text if row["low"] is None else f"{text} ({row['low']:.3g} to {row['high']:.3g})"


def curves(
    subjects: Sequence[Subject],
    table: str,
    x: Place,
    x_title: str,
    hover: Callable[[Row], str],
    *,
    y: str = "mean",
    y_title: str = ACTIVE,
    kinds: bool = False,
    **layout: Any,
) -> list[Panel]:
    """Return a picture for each layer of a table, in which every model is a curve.

    Args:
        subjects: the models.
        table: the name of the table.
        x: what a row's place on the horizontal axis is.
        x_title: the title of the horizontal axis.
        hover: what the mouse shows of a row, as lines of Plotly's markup.
        y: the column that is drawn.
        y_title: the title of the vertical axis.
        kinds: whether places are kinds without an order, so that models have marks side by side.
        layout: other settings of the layout.
    """
    mode = "markers" if kinds else "lines+markers"
    panels = []
    for layer in layers_of(subjects, table):
        drawn = [
            points(one, place, of_layer(one, table, layer), x, y, hover, mode=mode)
            for place, one in enumerate(subjects)
        ]
        if kinds:
            for place, trace in enumerate(drawn):
                trace.offsetgroup = str(place)
            names = list(dict.fromkeys(name for trace in drawn for name in trace.x or ()))
            category = {
                "type": "category",
                "categoryarray": names,
                "range": [-0.5, len(names) - 0.5],
            }
            layout |= {"scattermode": "group", "scattergap": 0.6, "xaxis": category}
        panels.append(Panel("", figure(drawn, x_title, y_title, **layout), (layer,)))
    return panels


def _active_by(
    subjects: Sequence[Subject],
    table: str,
    title: str,
    says: str,
    x: Place,
    x_title: str,
    about: Callable[[Row], str],
    *,
    nothing: str = Figure.nothing,
    **more: Any,
) -> Figure:
    """Return active experts by something that tokens are; the mouse shows what a row is `about`."""

    def hover(row: Row) -> str:
        return f"{about(row)}<br>{row['tokens']} tokens: {interval(row)} experts"

    panels = curves(subjects, table, x, x_title, hover, **more)
    text = f"{says} Bars are 95% intervals."
    return Figure(table, title, text, panels, joined(subjects, table), nothing=nothing)


def by_frequency(subjects: Sequence[Subject]) -> Figure:
    """Return active experts by how often a token's id occurs."""
    classes = sorted({row["class"] for one in subjects for row in one.tables["by_frequency"]})
    ticks = {"tickvals": classes, "ticktext": [str(c) for c in classes]}
    if classes:
        ticks["ticktext"] = ["rarest", *ticks["ticktext"][1:-1], "most<br>frequent"]
    return _active_by(
        subjects,
        "by_frequency",
        "By frequency",
        "The tokens are ordered by how often their id occurs in this text and cut into classes: a "
        "curve that falls means that rare tokens get more experts.",
        lambda row: row["class"],
        "class of the id",
        lambda row: f"ids that occur {row['count_low']} to {row['count_high']} times",
        xaxis=ticks,
    )


def by_loss(subjects: Sequence[Subject]) -> Figure:
    """Return active experts by the loss of a token."""
    return _active_by(
        subjects,
        "by_loss",
        "By loss",
        "The tokens are ordered by the loss on the token that follows: a curve that rises means "
        "that hard places get more experts.",
        lambda row: row["loss"],
        "loss (nats)",
        lambda row: f"class {row['class']}, loss {number(row['loss'])} nats",
    )


def by_position(subjects: Sequence[Subject]) -> Figure:
    """Return active experts by the position in a sequence."""

    def span(row: Row) -> str:
        first, last = row["first"], row["last"]
        return f"{first}" if first == last else f"{first}–{last}"

    return _active_by(
        subjects,
        "by_position",
        "By position",
        "The place of a token in its sequence, from 0: a level curve means that the number of "
        "experts does not depend on how much text came before.",
        span,
        "position",
        lambda row: f"positions {row['first']} to {row['last']}",
        xaxis={"type": "category"},
    )


def by_word_part(subjects: Sequence[Subject]) -> Figure:
    """Return active experts by the part of a word."""

    def part(row: Row) -> str:
        return plain(row["part"])

    return _active_by(
        subjects,
        "by_word_part",
        "By part of a word",
        "What a token is: the start of a word, a piece inside it, a number, a mark or space; the "
        "higher the mark, the more experts such tokens get.",
        part,
        "",
        part,
        kinds=True,
        nothing="No tokenizer was found, so that the text of the tokens is not known.",
    )


def by_domain(subjects: Sequence[Subject]) -> Figure:
    """Return active experts by domain."""
    return _active_by(
        subjects,
        "by_domain",
        "By domain",
        "The kind of text that a token is from: the higher the mark, the more experts its tokens "
        "get.",
        lambda row: plain(row["domain"]),
        "",
        lambda row: f"{plain(row['domain'])}, loss {number(row['loss'], '.3f')} nats",
        kinds=True,
    )


def histogram(subjects: Sequence[Subject]) -> Figure:
    """Return how many tokens have how many experts."""
    panels = []
    for layer in layers_of(subjects, "histogram"):
        bars = []
        for place, one in enumerate(subjects):
            rows = of_layer(one, "histogram", layer)
            others = one.trace.facts.flops_others
            texts = [
                f"<b>{plain(one.name)}</b><br>{number(row['active'])} experts: "
                f"{row['share']:.2%} of tokens ({row['tokens']})<br>"
                f"{flops(row['flops'])} in {'all experts' if layer == 'all' else 'this layer'}, "
                f"{flops(others)} in the rest of the model"
                for row in rows
            ]
            bars.append(
                go.Bar(
                    x=[row["active"] for row in rows],
                    y=[row["share"] for row in rows],
                    name=plain(one.name),
                    hovertext=texts,
                    hoverinfo="text",
                    marker={"color": style(place)["marker"]["color"]},
                )
            )
        what = "active experts, mean over layers" if layer == "all" else "active experts"
        drawn = figure(bars, what, "share of tokens", yaxis={"tickformat": ".0%"}, barmode="group")
        panels.append(Panel("", drawn, (layer,)))
    says = (
        "Each bar is the share of tokens with so many active experts, whose compute the mouse "
        "shows: a single bar is a fixed budget, and a wide spread is compute given where needed."
    )
    return Figure(
        "histogram", "Experts and compute per token", says, panels, joined(subjects, "histogram")
    )


def flops(value: float) -> str:
    """Return a number of operations in words."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOPs"
    return f"{value:.3g} FLOPs"


def pruning(subjects: Sequence[Subject]) -> Figure:
    """Return the loss without the least used experts."""

    def hover(row: Row) -> str:
        change = f"loss {number(row['loss'], '.4f')} ({number(row['extra_loss'], '+.4f')} nats)"
        return f"{row['removed']} experts removed<br>{change}<br>{number(row['active'])} active"

    traces = [
        points(one, place, one.tables["pruning"], lambda row: row["removed"], "extra_loss", hover)
        for place, one in enumerate(subjects)
        if one.tables["pruning"]
    ]
    says = (
        "The experts with the fewest tokens are removed from every layer, without training again: "
        "the curve is what this costs in loss."
    )
    drawn = figure(traces, "experts removed from each layer", "additional loss (nats)")
    rows = joined(subjects, "pruning")
    return Figure("pruning", "Removing experts", says, [Panel("", drawn)] * bool(traces), rows)


def budget(subjects: Sequence[Subject]) -> Figure:
    """Return the loss at other numbers of active experts than those of training."""
    traces, rows = [], []
    for place, one in enumerate(subjects):
        for table, key, words in (
            ("shift", "offset", "taken from every logit"),
            ("lower_k", "k", "experts for each token"),
        ):
            found = one.tables[table]

            def hover(row: Row, key: str = key, words: str = words) -> str:
                change = f"{number(row['loss'], '.4f')} ({number(row['extra_loss'], '+.4f')} nats)"
                return f"{row[key]:.3g} {words}<br>{number(row['active'])} active: loss {change}"

            if found:
                ordered = sorted(found, key=lambda row: float(row["active"]))
                traces.append(
                    points(one, place, ordered, lambda row: row["active"], "extra_loss", hover)
                )
                rows += [{"run": one.name, "change": table} | row for row in found]
    says = (
        "A trained model is given fewer or more experts, by a constant taken from the logits of a "
        "ReLU or by another k: the curve is what this costs in loss, 0 where nothing is changed."
    )
    drawn = figure(traces, ACTIVE, "additional loss (nats)")
    return Figure(
        "shift",
        "Another budget",
        says,
        [Panel("", drawn)] * bool(traces),
        rows,
        nothing="These routers have neither a ReLU nor a k to change.",
    )
