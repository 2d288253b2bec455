"""Figures of a comparison of runs, as in the ReMoE paper (arXiv 2412.14711, figures 3 and 6)."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.compare import Group, RunComparison
from megatron.remoe.analysis.plots import figure_file
from megatron.remoe.analysis.routers import name_of

# Colors that color-blind people can tell apart: Okabe and Ito, without yellow, which is too light
# for lines (https://jfly.uni-koeln.de/color/).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DENSE = "#7F7F7F"
_STYLES = ("-", "--", ":", "-.")
_SMOOTHING = 20  # rows
_POINTS = 800  # of all lines, so that files stay below 150 kB
_LABEL_SIZE = 8  # points
_HEIGHT = 4.5  # inches
_LABEL_HEIGHT = 0.155  # inches


def draw_all(comparison: RunComparison, folder: Path) -> list[Path]:
    """Draw the figures of a comparison as SVG, and return their paths.

    Loss against steps is always drawn; sparsity and coefficient are drawn if a run has recorded
    them, and loss against parameters, experts and granularity if the runs have two values of it.
    """
    figures: dict[str, Callable[[Any, list[Group]], None]] = {"loss": _loss}
    groups = comparison.groups
    if any("sparsity" in group.any_run.train[-1] for group in groups):
        figures["sparsity"] = _sparsity
    if any(group.any_run.has_relu_routing for group in groups):
        figures["coefficient"] = _coefficient
    for name, (label, keys, value) in _AXES.items():
        if len({value(group) for group in groups} - {None}) > 1:
            figures[name] = _against(label, keys, value)
    return [_draw(folder / f"{name}.svg", draw, groups) for name, draw in figures.items()]


def _draw(path: Path, draw: Callable[[Any, list[Group]], None], groups: list[Group]) -> Path:
    longest = max(len(group.name) for group in groups)
    size = (5.5 + 0.07 * longest, max(_HEIGHT, (len(groups) + 2) * _LABEL_HEIGHT / 0.85))
    with figure_file(path, 1, size) as (_, (axis,)):
        draw(axis, groups)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        _label_ends(axis, size[1])
    return path


def _style(group: Group, groups: list[Group]) -> dict[str, Any]:
    """Return a color for the router and a line style for the settings, or colors for one router."""
    routers = list(dict.fromkeys(g.router for g in groups if g.router != "dense"))
    same = [g for g in groups if g.router == group.router]
    index = next(i for i, g in enumerate(same) if g is group)
    if group.router == "dense":
        return {"color": _DENSE, "linestyle": _STYLES[index % len(_STYLES)]}
    if len(routers) == 1:
        place, more = index, index // len(_COLORS)
    else:
        place = routers.index(group.router)
        more = index + place // len(_COLORS)
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": _STYLES[more % len(_STYLES)]}


def _curves(
    axis: Any,
    groups: list[Group],
    key: str,
    *,
    shown: list[Group] | None = None,
    window: int = 1,
    geometric: bool = False,
) -> None:
    """Draw one quantity over steps: the mean over a group's seeds, and their range as a band.

    Args:
        axis: where it is drawn.
        groups: all groups, which determine the colors.
        key: the quantity.
        shown: the groups that are drawn, by default all.
        window: the number of rows over which each run is averaged first.
        geometric: whether the mean over seeds is geometric.
    """
    for group in groups if shown is None else shown:
        series = []
        for run in group.runs.values():
            rows = [row for row in run.train if row.get(key) is not None]
            if geometric:
                rows = [row for row in rows if row[key] > 0]
            if not rows:  # an older run does not have it
                continue
            smooth = _smooth([row[key] for row in rows], window)
            series.append(dict(zip([row["iteration"] for row in rows], smooth, strict=True)))
        common = sorted(set.intersection(*map(set, series))) if series else []
        stride = math.ceil(len(common) * len(groups) / _POINTS)
        steps = common[::-1][:: max(stride, 1)][::-1]  # the last one is among them
        if not steps:
            continue
        values = [[one[step] for one in series] for step in steps]
        mean = statistics.geometric_mean if geometric else statistics.fmean
        style = _style(group, groups)
        axis.plot(steps, [mean(v) for v in values], linewidth=1.5, label=group.name, **style)
        if len(series) > 1:
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xlabel("step")


def _smooth(values: list[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at every place."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _loss(axis: Any, groups: list[Group]) -> None:
    _curves(axis, groups, "lm_loss", window=_SMOOTHING)
    axis.set_ylabel(f"training loss, mean of {_SMOOTHING} rows")
    # The first steps, in which all routers fall alike, would leave no room for the others.
    steps = sorted({x for line in axis.lines for x in line.get_xdata()})
    if not steps:
        return
    bands = [vertex for band in axis.collections for vertex in band.get_paths()[0].vertices]
    points = [*bands, *(point for line in axis.lines for point in line.get_xydata())]
    late = [y for x, y in points if x >= steps[len(steps) // 3] and math.isfinite(y)]
    if late and min(late) < max(late):
        space = 0.03 * (max(late) - min(late))
        axis.set_ylim(min(late) - space, max(late) + space)
        axis.set_xlim(left=steps[len(steps) // 4])


def _sparsity(axis: Any, groups: list[Group]) -> None:
    varying = [g for g in groups if len({row.get("sparsity") for row in g.any_run.train}) > 1]
    _curves(axis, groups, "sparsity", shown=varying or groups)
    targets = {g.any_run.target_sparsity for g in groups if g.any_run.has_relu_routing}
    for target in sorted(targets):
        axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"target {target:g}", (0, target), xycoords=("axes fraction", "data"),
            xytext=(3, 3), textcoords="offset points", fontsize=_LABEL_SIZE,
        )  # fmt: skip
    axis.set_ylabel("sparsity")


def _coefficient(axis: Any, groups: list[Group]) -> None:
    _curves(axis, groups, "l1_coeff", geometric=True)
    axis.set_yscale("log")
    axis.set_ylabel("coefficient of the penalty")


def _label_ends(axis: Any, height: float) -> None:
    """Name every line that has a label, right of its end, so that no two names overlap."""
    axis.margins(x=0.02)
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    low, high = axis.get_ylim()
    ends = []
    for line in lines:
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        if math.isfinite(y):
            at = axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[1]
            ends.append((min(max(at, 0.0), 1.0), (x, min(max(y, low), high)), line))
    ends.sort(key=lambda end: end[0])
    gap = _LABEL_HEIGHT / (0.85 * height)
    places = spread([place for place, _, _ in ends], gap)
    for place, (_, point, line) in zip(places, ends, strict=True):
        # The way from a single point to its name must not look like a line of data.
        style = line.get_linestyle() if len(line.get_xdata()) > 1 else (0, (1, 5))
        axis.annotate(
            line.get_label(), point, xytext=(1.05, place), textcoords="axes fraction",
            va="center", fontsize=_LABEL_SIZE, color=line.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7,
                        "linestyle": style, "alpha": 0.6, "relpos": (0, 0.5),
                        "shrinkA": 1, "shrinkB": 1},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places in [0, 1] as little as possible until neighbors are `gap` apart.

    Places that are too close become a block around their mean, as blocks that touch do (the pool
    of adjacent violators). If there is no room for all, the last ones are above 1.

    Args:
        places: places in ascending order.
        gap: the least distance.
    """
    shifted = [place - i * gap for i, place in enumerate(places)]
    blocks: list[list[float]] = []
    for place in shifted:
        blocks.append([place])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [statistics.fmean(block) for block in blocks for _ in block]
    highest = 1 - gap * (len(places) - 1)
    return [max(0.0, min(mean, highest)) + i * gap for i, mean in enumerate(means)]


def _against(
    label: str, keys: set[str], value: Callable[[Group], float | None]
) -> Callable[..., None]:
    """Make a function that draws validation loss against a property that `keys` determine.

    There is a line for every router and its other settings.
    """

    def draw(axis: Any, groups: list[Group]) -> None:
        series: dict[str, list[Group]] = {}
        for group in groups:
            if value(group) is not None:
                others = [(k, v) for k, v in group.settings if k not in keys]
                series.setdefault(name_of(group.router, others), []).append(group)
        for name, members in series.items():
            members.sort(key=lambda group: value(group) or 0.0)
            rows = [group.row for group in members]
            drawn = axis.errorbar(
                [value(group) for group in members],
                [row["valid_loss_mean"] for row in rows],
                yerr=[row["valid_loss_std"] or 0.0 for row in rows],
                marker="o", markersize=4, capsize=3, **_style(members[0], groups),
            )  # fmt: skip
            drawn.lines[0].set_label(name)
        if keys != _SIZE:
            ticks = sorted({x for x in map(value, groups) if x is not None})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss, mean and deviation over seeds")

    return draw


def _active_params(group: Group) -> float | None:
    return group.size.active_params / 1e6 if group.size else None


def _experts(group: Group) -> float | None:
    experts = group.any_run.config.get("num_experts")
    return float(experts) if experts else None


def _granularity(group: Group) -> float | None:
    if not group.any_run.config.get("num_experts"):
        return None
    return float(group.any_run.config.get("moe_granularity") or 1)


_SIZE = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "moe_router_topk"}
_AXES: dict[str, tuple[str, set[str], Callable[[Group], float | None]]] = {
    "parameters": ("active parameters (millions)", _SIZE, _active_params),
    "experts": ("experts", {"num_experts"}, _experts),
    "granularity": ("granularity", {"moe_granularity"}, _granularity),
}
