"""The curves of training in a report, from `metrics.jsonl`."""

import math
import statistics
from collections.abc import Callable, Sequence

from plotly import graph_objects as go

from megatron.remoe.analysis.report.drawing import Figure, Panel, figure, number, plain, style
from megatron.remoe.analysis.report.subject import Row, Subject

_POINTS = 400  # of a curve

Read = Callable[[Row], float | None]


def figures(subjects: Sequence[Subject]) -> list[Figure]:
    """Return the figures of all models whose runs are known."""
    trained = [(place, one) for place, one in enumerate(subjects) if one.run is not None]
    return [_loss(trained), _sparsity(trained), _coefficient(trained)] if trained else []


Trained = Sequence[tuple[int, Subject]]


def _curve(subject: Subject, read: Read, log: bool = False) -> list[Row]:
    """Return the means over blocks of steps: the last step of a block, and the mean."""
    assert subject.run is not None
    rows = [(row["iteration"], read(row)) for row in subject.run.train]
    known = [(step, value) for step, value in rows if value is not None and (value > 0 or not log)]
    block = max(1, math.ceil(len(known) / _POINTS))
    mean = statistics.geometric_mean if log else statistics.fmean
    blocks = [known[i : i + block] for i in range(0, len(known), block)]
    return [{"step": one[-1][0], "value": mean(value for _, value in one)} for one in blocks]


def _line(name: str, points: list[Row], place: int, what: str) -> go.Scatter:
    return go.Scatter(
        x=[point["step"] for point in points],
        y=[point["value"] for point in points],
        name=plain(name),
        mode="lines",
        line=style(place)["line"],
        hovertemplate=f"{plain(name)}<br>step %{{x}}: {what} %{{y:.4g}}<extra></extra>",
    )


def _loss(trained: Trained) -> Figure:
    traces, rows = [], []
    for place, subject in trained:
        assert subject.run is not None
        points = _curve(subject, lambda row: row.get("lm_loss"))
        traces.append(_line(f"{subject.name}, training", points, place, "loss"))
        rows += [{"run": subject.name, "split": "train"} | point for point in points]
        splits: dict[str, list[Row]] = {}
        for row in subject.run.evaluations:
            point = {"step": row["iteration"], "value": row["lm_loss"]}
            splits.setdefault(row["split"], []).append(point)
        for split, points in splits.items():
            rows += [{"run": subject.name, "split": split} | point for point in points]
        points = splits.get("valid", [])
        traces.append(
            go.Scatter(
                x=[point["step"] for point in points],
                y=[point["value"] for point in points],
                text=[_by_split(splits, point["step"]) for point in points],
                name=plain(f"{subject.name}, validation"),
                mode="lines+markers",
                hovertemplate="%{text}<extra></extra>",
                **style(place, dash=True),
            )
        )
    says = (
        "The loss on the next token falls with the steps of training: lines are means over the "
        "training batches, and marks are the loss on validation text."
    )
    drawn = figure(traces, "step", "loss (nats per token)", hovermode="closest")
    return Figure("loss", "Loss", says, [Panel("", drawn)], rows)


def _by_split(splits: dict[str, list[Row]], step: int) -> str:
    lines = [f"step {step}"]
    for split, points in sorted(splits.items()):
        lines += [
            f"{plain(split)}: {number(p['value'], '.4f')}" for p in points if p["step"] == step
        ]
    return "<br>".join(lines)


def _sparsity(trained: Trained) -> Figure:
    panels, rows = [], []
    layers = {str(layer) for _, subject in trained for layer in subject.trace.layers}
    for layer in ("all", *sorted(layers, key=int)):
        traces = []
        for place, subject in trained:
            points = _curve(subject, _sparsity_of(subject, layer))
            if points:
                traces.append(_line(subject.name, points, place, "sparsity"))
                rows += [{"run": subject.name, "layer": layer} | point for point in points]
        targets = {s.run.target_sparsity for _, s in trained if s.run and s.run.has_relu_routing}
        lines = [
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target,
                "line": {"dash": "dot", "width": 1, "color": "#8a8f98"},
                "label": {"text": f"target {target:.4g}", "textposition": "end", "yanchor": "top"},
            }
            for target in sorted(targets)
        ]  # fmt: skip
        if traces:
            drawn = figure(traces, "step", "sparsity", shapes=lines)
            panels.append(Panel("", drawn, (layer,)))
    says = (
        "Sparsity is the share of experts that a token leaves out; a ReLU router begins with about "
        "half of them and is driven to the dotted target."
    )
    return Figure("sparsity", "Sparsity", says, panels, rows)


def _sparsity_of(subject: Subject, layer: str) -> Read:
    if layer == "all":
        return lambda row: row.get("sparsity")
    if int(layer) not in subject.trace.layers:
        return lambda row: None
    place = list(subject.trace.layers).index(int(layer))

    def read(row: Row) -> float | None:
        values: list[float] = row.get("sparsity_per_layer") or []
        return values[place] if place < len(values) else None

    return read


def _coefficient(trained: Trained) -> Figure:
    traces, rows = [], []
    for place, subject in trained:
        for key, name in (("l1_coeff", "coefficient"), ("l1_reg", "regularizer")):
            points = _curve(subject, _value_of(key), log=True)
            if points:
                line = _line(f"{subject.name}, {name}", points, place, name)
                line.line.dash = "solid" if key == "l1_coeff" else "dot"
                traces.append(line)
                rows += [{"run": subject.name, "quantity": key} | point for point in points]
    says = (
        "The coefficient of the L1 penalty rises by a factor at every step on which sparsity is "
        "below its target and falls otherwise; it multiplies the regularizer, whose line is dotted."
    )
    drawn = figure(
        traces, "step", "value", yaxis={"type": "log", "exponentformat": "power", "dtick": 2}
    )
    panels = [Panel("", drawn)] if traces else []
    nothing = "Only routers with a ReLU have a coefficient, and none of these has."
    return Figure("coefficient", "L1 penalty", says, panels, rows, nothing=nothing)


def _value_of(key: str) -> Read:
    return lambda row: row.get(key)
