"""Figures of experts: what they are for, whom they work with, and how busy they are."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from plotly import graph_objects as go

from megatron.remoe.analysis.report.drawing import (
    COLORS,
    DIVERGING,
    SCALE,
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
from megatron.remoe.analysis.report.tokens import curves, interval, points

SHOWN = 32  # experts of a layer that are drawn in a map of pairs
_FEW = 5  # tokens, below which a ratio says nothing
_CLIP = 3  # powers of two


def by_domain(subjects: Sequence[Subject]) -> Figure:
    """Return which experts the tokens of each domain use."""
    panels = []
    for one in subjects:
        rows = one.tables["experts_by_domain"]
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        if layers:
            panels.append(Panel(one.name, _domains(rows, layers), ("all",)))
        for layer in layers:
            of = one.rows("experts_by_domain", layer=layer)
            panels.append(Panel(one.name, _domains(of, [layer]), (str(layer),)))
    says = (
        "Each row is a kind of text in a layer, and each column an expert: the brighter a field, "
        "the more tokens of this text use the expert; rows that differ are specialization."
    )
    rows = joined(subjects, "experts_by_domain")
    return Figure("experts_by_domain", "Experts by domain", says, panels, rows, wide=True)


def _domains(rows: Sequence[Row], layers: Sequence[Any]) -> go.Figure:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    experts = sorted({row["expert"] for row in rows})
    found = {(row["layer"], row["domain"], row["expert"]): row for row in rows}
    kinds = [(layer, domain) for layer in layers for domain in domains]

    def text(layer: Any, domain: str, expert: int) -> str:
        row = found.get((layer, domain, expert))
        if row is None:
            return ""
        assignments = f"{number(row['share'], '.2%')} of assignments"
        return (
            f"layer {layer}, {plain(domain)}<br>expert {expert}: {number(row['per_token'], '.2%')} "
            f"of tokens<br>{assignments}, {number(row['lift'])} times as much as in all text"
        )

    grid = [
        [found.get((layer, domain, e), {}).get("per_token") for e in experts]
        for layer, domain in kinds
    ]
    names = [f"{layer} · {plain(d)}" if len(layers) > 1 else plain(d) for layer, d in kinds]
    texts = [[text(layer, domain, e) for e in experts] for layer, domain in kinds]
    return _map(grid, texts, experts, names, "share of tokens", x="expert")


def _map(
    grid: list[list[Any]],
    texts: list[list[str]],
    columns: Sequence[Any],
    rows: Sequence[Any],
    title: str,
    *,
    x: str,
    y: str = "",
    **look: Any,
) -> go.Figure:
    """Return a heat map with the first row at the top."""
    drawn = go.Heatmap(
        z=grid, x=list(map(str, columns)), y=list(map(str, rows)), hovertext=texts,
        hoverinfo="text", xgap=1, ygap=1,
        colorbar={"title": {"text": title, "side": "right"}, "thickness": 10, "outlinewidth": 0},
        **{"colorscale": SCALE} | look,
    )  # fmt: skip
    height = 90 + min(max(14 * len(rows), min(36 * len(rows), 300)), 1200)  # pixels
    axes = {"type": "category", "showgrid": False, "zeroline": False}
    vertical = axes | {"autorange": "reversed"}
    return figure([drawn], x, y, height=height, xaxis=axes, yaxis=vertical)


def specialization(subjects: Sequence[Subject]) -> Figure:
    """Return how much the experts of a token say about its domain."""

    def hover(row: Row) -> str:
        noise = f"{number(row['shuffled'], '.4f')} ± {number(row['shuffled_std'], '.4f')}"
        return (
            f"layer {row['layer']}: {number(row['information'], '.4f')} nats<br>shuffled: {noise}"
            f"<br>excess: {number(row['share'], '.2%')} of what there is to know"
        )

    traces = []
    for place, one in enumerate(subjects):
        rows = [row for row in one.tables["specialization"] if row["layer"] != "all"]
        for key, name in (("information", ""), ("shuffled", "shuffled")):
            traces.append(
                points(
                    one, place, rows, lambda row: row["layer"], key, hover, name=name,
                    hollow=bool(name),
                )
            )  # fmt: skip
    says = (
        "The mutual information between the domain of a token and its experts; hollow marks are "
        "the same after the domains of sequences were shuffled, and only what is above is real."
    )
    drawn = figure(traces, "layer", "nats", xaxis={"dtick": 1}, yaxis={"rangemode": "tozero"})
    rows = joined(subjects, "specialization")
    return Figure(
        "specialization", "Size of the specialization", says, [Panel("", drawn)] * bool(rows), rows
    )


def coactivation(subjects: Sequence[Subject]) -> Figure:
    """Return which experts are active for the same tokens."""
    panels = []
    for one in subjects:
        layers = [layer for layer in layers_of([one], "coactivation") if _has_pairs(one, layer)]
        few = layers if len(layers) <= 4 else [layers[0], layers[len(layers) // 2], layers[-1]]
        for layer in layers:
            shown = (layer, "all") if layer in few else (layer,)
            panels.append(Panel(f"{one.name}, layer {layer}", _pairs(one, layer), shown))
    says = (
        "Blue pairs of experts are active for the same tokens more often than by chance, red pairs "
        f"less often, in powers of two; pairs that chance gives fewer than {_FEW} tokens are empty."
    )
    if any(one.trace.facts.num_experts > SHOWN for one in subjects):
        says += f" The {SHOWN} busiest experts of each layer are drawn."
    rows = [
        {"run": one.name} | row
        for one in subjects
        for layer in layers_of([one], "coactivation")
        for row in _of_busiest(one, layer)
    ]
    return Figure(
        "coactivation",
        "Experts that work together",
        says,
        panels,
        rows,
        wide=True,
        nothing="Every token has one expert at most, so that no two work together.",
    )


def _has_pairs(subject: Subject, layer: str) -> bool:
    """Return whether chance gives a pair of experts enough tokens, and any pair has some."""
    rows = list(_of_busiest(subject, layer))
    return any(r["tokens"] for r in rows) and any(r["expected"] >= _FEW for r in rows)


def busiest(subject: Subject, layer: str) -> list[int]:
    """Return the experts of a layer with the largest loads, in the order of their numbers."""
    rows = of_layer(subject, "load", layer)
    ranked = sorted(rows, key=lambda row: float(-(row["share"] or 0)))
    return sorted(row["expert"] for row in ranked[:SHOWN])


def _of_busiest(subject: Subject, layer: str) -> Iterator[Row]:
    """Yield the pairs of the experts that are drawn."""
    shown = set(busiest(subject, layer))
    rows = of_layer(subject, "coactivation", layer)
    return (row for row in rows if row["first"] in shown and row["second"] in shown)


def _pairs(subject: Subject, layer: str) -> go.Figure:
    experts = busiest(subject, layer)
    place = {expert: i for i, expert in enumerate(experts)}
    grid: list[list[float | None]] = [[None] * len(experts) for _ in experts]
    texts = [[""] * len(experts) for _ in experts]
    for row in _of_busiest(subject, layer):
        first, second = place[row["first"]], place[row["second"]]
        if first == second:
            continue
        text = (
            f"experts {row['first']} and {row['second']}<br>{row['tokens']} tokens, "
            f"{row['expected']:.1f} by chance<br>Jaccard {number(row['jaccard'])}, "
            f"cosine of gates {number(row['cosine'])}"
        )
        value = None
        if row["expected"] >= _FEW:
            ratio = row["tokens"] / row["expected"]
            value = max(-_CLIP, min(_CLIP, math.log2(ratio))) if ratio else -_CLIP
        for a, b in ((first, second), (second, first)):
            grid[a][b], texts[a][b] = value, text
    look: dict[str, Any] = {"colorscale": DIVERGING, "zmin": -_CLIP, "zmax": _CLIP}
    return _map(grid, texts, experts, experts, "log2 ratio", x="expert", **look)


def between_layers(subjects: Sequence[Subject]) -> Figure:
    """Return how much neighboring layers know of each other."""

    def hover(row: Row) -> str:
        return (
            f"layers {row['first']} and {row['second']}<br>leading experts: "
            f"{number(row['information'], '.4f')} nats, shuffled "
            f"{number(row['information_shuffled'], '.4f')}<br>within tokens: "
            f"{number(row['expert_information'], '.4f')}, shuffled "
            f"{number(row['expert_information_shuffled'], '.4f')}"
        )

    def pair(row: Row) -> str:
        return f"{row['first']} → {row['second']}"

    traces = []
    for place, one in enumerate(subjects):
        rows = one.tables["between_layers"]
        for key, name in (("information", ""), ("information_shuffled", "shuffled")):
            traces.append(points(one, place, rows, pair, key, hover, name=name, hollow=bool(name)))
    says = (
        "The mutual information between a token's leading experts in two neighboring layers: the "
        "higher, the better one layer's choice tells the next one's; hollow marks are chance."
    )
    drawn = figure(traces, "layers", "nats", yaxis={"rangemode": "tozero"})
    rows = joined(subjects, "between_layers")
    return Figure(
        "between_layers",
        "What layers know of each other",
        says,
        [Panel("", drawn)] * bool(rows),
        rows,
        nothing="A model with one layer of experts has no neighboring layers.",
    )


def flips(subjects: Sequence[Subject]) -> Figure:
    """Return how much the experts of the same tokens change between checkpoints."""

    def hover(row: Row) -> str:
        return (
            f"iteration {row['first']} to {row['second']}<br>{interval(row, 'flip_rate')} of the "
            f"experts change<br>{number(row['leading_changed'], '.1%')} of the leading experts do"
        )

    says = (
        "The share of a token's experts that differ between one checkpoint and the next, for the "
        "same text: a curve that falls means that routing settles. Bars are 95% intervals."
    )
    panels = curves(
        subjects, "flips", lambda row: row["second"], "iteration of the later checkpoint", hover,
        y="flip_rate", y_title="share that changes", yaxis={"rangemode": "tozero"},
    )  # fmt: skip
    return Figure(
        "flips",
        "Changes between checkpoints",
        says,
        panels,
        joined(subjects, "flips"),
        nothing="Changes need two checkpoints of a run, and these models have one each.",
    )


def load(subjects: Sequence[Subject]) -> Figure:
    """Return the load of each expert."""
    panels = []
    for one in subjects:
        layers = [layer for layer in layers_of([one], "load") if layer != "all"]
        if layers:
            panels.append(Panel(one.name, _loads(one, layers), ("all",)))
    for layer in (layer for layer in layers_of(subjects, "load") if layer != "all"):
        panels.append(Panel("", _bars(subjects, layer), (layer,)))
    says = (
        "The assignments of each expert in means of its layer: 1 is an even load, a busy expert is "
        "brighter or higher, and a dead one is marked with a cross."
    )
    rows = joined(subjects, "load")
    return Figure("load", "Load of the experts", says, panels, rows, wide=True)


def _relative(subject: Subject, row: Row) -> float:
    return float(row["share"] or 0) * subject.trace.facts.num_experts


def _about(subject: Subject, row: Row) -> str:
    dead = "<br>dead: no token of this text" if row["dead"] else ""
    return (
        f"<b>{plain(subject.name)}</b><br>layer {row['layer']}, expert {row['expert']}: "
        f"{_relative(subject, row):.3g} times the mean<br>{number(row['per_token'], '.2%')} of "
        f"tokens, mean gate {number(row['gate'])}{dead}"
    )


def _loads(subject: Subject, layers: Sequence[str]) -> go.Figure:
    found = {(str(row["layer"]), row["expert"]): row for row in subject.tables["load"]}
    experts = sorted({expert for layer, expert in found if layer != "all"})
    rows = [[found.get((layer, expert)) for expert in experts] for layer in layers]
    grid = [[None if row is None else _relative(subject, row) for row in line] for line in rows]
    texts = [["" if row is None else _about(subject, row) for row in line] for line in rows]
    drawn = _map(grid, texts, experts, layers, "load / mean", x="expert", y="layer", zmin=0)
    dead = [row for line in rows for row in line if row is not None and row["dead"]]
    if dead:
        drawn.add_scatter(
            x=[str(row["expert"]) for row in dead],
            y=[str(row["layer"]) for row in dead],
            mode="markers",
            marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": COLORS[4]}},
            hoverinfo="skip",
            showlegend=False,
        )
    return drawn


def _bars(subjects: Sequence[Subject], layer: str) -> go.Figure:
    bars = []
    for place, one in enumerate(subjects):
        rows = of_layer(one, "load", layer)
        bars.append(
            go.Bar(
                x=[row["expert"] for row in rows],
                y=[_relative(one, row) for row in rows],
                text=["×" if row["dead"] else "" for row in rows],
                textposition="outside",
                name=plain(one.name),
                hovertext=[_about(one, row) for row in rows],
                hoverinfo="text",
                marker={"color": style(place)["marker"]["color"]},
            )
        )
    even = {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1,
        "line": {"dash": "dot", "width": 1, "color": "#8a8f98"},
    }  # fmt: skip
    return figure(bars, "expert", "load / mean", barmode="group", shapes=[even])


def load_time(subjects: Sequence[Subject]) -> Figure:
    """Return what the busiest rank costs under expert parallelism."""

    def hover(row: Row) -> str:
        text = f"{row['parallel_size']} ranks<br>experts: {number(row['slowdown'], '.3f')} times"
        whole = row["step_time"]
        return text if whole is None else f"{text}<br>whole forward pass: {whole:.3f} times"

    says = (
        "Where experts are split over ranks, all wait for the busiest one: the curve is the time "
        "of the experts relative to an even load."
    )
    panels = curves(
        subjects, "load_time", lambda row: row["parallel_size"], "expert-parallel ranks", hover,
        y="slowdown", y_title="time / time under an even load",
        xaxis={"type": "log", "dtick": math.log10(2)},
    )  # fmt: skip
    rows = joined(subjects, "load_time")
    return Figure("load_time", "Cost of an uneven load", says, panels, rows)
