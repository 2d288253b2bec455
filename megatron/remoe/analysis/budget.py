"""Curves of loss against the number of active experts, as tables and a figure.

A curve is measured by `megatron.remoe.evaluate.curves`; this module only shows it.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.remoe.analysis.plots import figure_file
from megatron.remoe.files import write_whole

FILES = ("budget.json", "budget.csv", "budget.md", "budget.png")


@dataclass(frozen=True)
class Point:
    """A model with one budget. Intervals are of 95%, by Student's t over sequences.

    Attributes:
        by: what was changed: "k", "threshold", "offset", or "none" for the model as it is.
        value: k, the threshold or those of all layers, or the offset.
        active: the mean number of active experts of a token and layer.
        loss: the mean loss in nats per token.
        half_width: half the width of the loss's interval.
        extra_loss: the mean difference from the model as it is, sequence by sequence.
        extra_half_width: half the width of that difference's interval.
    """

    by: str
    value: float | list[float] | None
    active: float
    loss: float
    half_width: float
    extra_loss: float
    extra_half_width: float


@dataclass(frozen=True)
class Curve:
    """The points of a model, the first of which is the model as it is.

    Attributes:
        model: the model as it was named.
        router: the type of its router.
        topk, num_experts: k, the mean number of active experts that it was trained for, and E.
        points: its points.
        left_out: numbers of active experts that were asked for, and that nothing reaches.
    """

    model: str
    router: str
    topk: int
    num_experts: int
    points: list[Point]
    left_out: list[float]


@dataclass(frozen=True)
class Measured:
    """Curves of some models on the same text.

    Attributes:
        data: the token files as they were named.
        seed: the seed of the order of documents.
        sequences, sequence_length: the number of sequences, and that of tokens of each.
        curves: that of each model.
    """

    data: str
    seed: int
    sequences: int
    sequence_length: int
    curves: list[Curve]


def write(measured: Measured, out: Path) -> list[Path]:
    """Write the numbers, two tables and the figure to a folder, and return the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in FILES]
    write_whole(files[0], json.dumps(asdict(measured), indent=2) + "\n")
    write_whole(files[1], _to_csv(measured.curves))
    write_whole(files[2], to_markdown(measured))
    draw(measured.curves, files[3])
    return files


def _to_csv(curves: Sequence[Curve]) -> str:
    text = io.StringIO()
    rows = [
        {"model": curve.model, "router": curve.router} | asdict(point)
        for curve in curves
        for point in curve.points
    ]
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def to_markdown(measured: Measured) -> str:
    """Return the tables of all models, each from the fewest active experts to the most."""
    tokens = measured.sequences * measured.sequence_length
    lines = [
        f"Loss in nats per token on {tokens:,} tokens of {measured.data}, {measured.sequences} "
        f"sequences of {measured.sequence_length}; ± is half of a 95% interval over sequences.",
    ]
    for curve in measured.curves:
        lines += [
            "",
            f"{curve.model}: {curve.router}, {curve.num_experts} experts, k {curve.topk}",
            "",
            "| changed | active experts | loss | against the model as it is |",
            "|---|---|---|---|",
        ]
        for point in sorted(curve.points, key=lambda one: one.active):
            lines.append(
                f"| {_changed(point)} | {point.active:.3f} | "
                f"{point.loss:.4f} ± {point.half_width:.4f} | "
                f"{point.extra_loss:+.4f} ± {point.extra_half_width:.4f} |"
            )
        if curve.left_out:
            numbers = ", ".join(f"{number:g}" for number in curve.left_out)
            lines += ["", f"Left out, because no threshold or offset leaves as many: {numbers}."]
    return "\n".join(lines) + "\n"


def _changed(point: Point) -> str:
    """Say what was changed; `budget.json` has the thresholds of every layer."""
    if isinstance(point.value, list):
        least, most = min(point.value), max(point.value)
        return f"{point.by}s of layers, {least:.4g} to {most:.4g}"
    return "-" if point.value is None else f"{point.by} {point.value:.4g}"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw loss against active experts, a line for each model and way to change the number.

    Bars are intervals of the difference from the model as it is, since the interval of the loss
    itself is that of the text, which all points share.
    """
    with figure_file(path, 1, (7.5, 5)) as (_, (axis,)):
        for number, curve in enumerate(curves):
            color = f"C{number % 10}"
            name = Path(curve.model).name or curve.model
            first, *others = curve.points
            for by, style in (("threshold", "-"), ("k", "--")):
                kinds = ("threshold", "offset") if by == "threshold" else ("k",)
                points = [one for one in others if one.by in kinds]
                if not points:
                    continue
                points = sorted([first, *points], key=lambda one: one.active)
                axis.errorbar(
                    [one.active for one in points],
                    [one.loss for one in points],
                    [one.extra_half_width for one in points],
                    label=f"{name}, by {'/'.join(kinds)}" if by == "threshold" else f"{name}, by k",
                    color=color,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    linewidth=1.2,
                )
            axis.plot(first.active, first.loss, marker="*", markersize=12, color=color)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.set_xlabel("active experts per token and layer (a star is the model as it is)")
        axis.set_ylabel("loss, nats per token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
