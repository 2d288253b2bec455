"""Figures of a comparison of runs, as in the ReMoE paper (arXiv 2412.14711, figures 3 and 6)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.compare import Group, RunComparison
from megatron.remoe.analysis.plots import figure_file

_COLORS = {
    "dense": "#7f7f7f",
    "TopK": "#1f4e79",
    "TopK with warm-up": "#5b8c5a",
    "RMoE": "#7d5ba6",
    "RMoE with warm-up": "#b39ac8",
    "Soft MoE": "#8c6d46",
    "ReMoE": "#c0392b",
    "recurrent ReMoE": "#e08e0b",
}
_STYLES = ("-", "--", ":", "-.")
_SMOOTHING = 20  # rows


def draw_all(comparison: RunComparison, folder: Path) -> list[Path]:
    """Draw the figures of a comparison, and return their paths.

    Loss against steps is always drawn; sparsity and coefficient are drawn if a run has recorded
    them, and loss against parameters, experts and granularity if the runs have two values of it.
    """
    figures: dict[str, Callable[[Any, list[Group]], None]] = {"loss": _loss}
    groups = comparison.groups
    if any("sparsity" in group.any_run.train[-1] for group in groups):
        figures["sparsity"] = _sparsity
    if any(group.any_run.has_relu_routing for group in groups):
        figures["coefficient"] = _coefficient
    for name, (label, value) in _AXES.items():
        if len({value(group) for group in groups} - {None}) > 1:
            figures[name] = _against(label, value)
    return [_draw(folder / f"{name}.png", draw, groups) for name, draw in figures.items()]


def _draw(path: Path, draw: Callable[[Any, list[Group]], None], groups: list[Group]) -> Path:
    with figure_file(path, 1, (7, 4.5)) as (_, (axis,)):
        draw(axis, groups)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return path


def _style(group: Group, groups: list[Group]) -> dict[str, Any]:
    """Return a color for the router and a line style for the settings, or colors for one router."""
    same = [g for g in groups if g.router == group.router]
    index = next(i for i, g in enumerate(same) if g is group)
    if len(same) == len(groups) > 1:
        return {"color": f"C{index}"}
    return {"color": _COLORS[group.router], "linestyle": _STYLES[index % len(_STYLES)]}


def _curves(axis: Any, groups: list[Group], key: str, *, window: int = 1) -> None:
    """Draw one quantity over steps, a line per run; the runs of a group look alike."""
    for group in groups:
        for index, run in enumerate(group.runs.values()):
            rows = [row for row in run.train if row.get(key) is not None]
            if rows:
                axis.plot(
                    [row["iteration"] for row in rows],
                    _smooth([row[key] for row in rows], window),
                    linewidth=1,
                    alpha=0.8,
                    label=group.name if index == 0 else None,
                    **_style(group, groups),
                )
    axis.set_xlabel("step")


def _smooth(values: list[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at every place."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _loss(axis: Any, groups: list[Group]) -> None:
    _curves(axis, groups, "lm_loss", window=_SMOOTHING)
    axis.set_ylabel(f"training loss, mean of {_SMOOTHING} rows")


def _sparsity(axis: Any, groups: list[Group]) -> None:
    _curves(axis, groups, "sparsity")
    targets = {g.any_run.target_sparsity for g in groups if g.any_run.has_relu_routing}
    for target in sorted(targets):
        axis.axhline(
            target, color="black", linewidth=0.8, linestyle=":", label=f"target {target:g}"
        )
    axis.set_ylabel("sparsity")


def _coefficient(axis: Any, groups: list[Group]) -> None:
    _curves(axis, groups, "l1_coeff")
    axis.set_yscale("log")
    axis.set_ylabel("coefficient of the penalty")


def _against(label: str, value: Callable[[Group], float | None]) -> Callable[..., None]:
    """Make a function that draws validation loss against a property, a line per router."""

    def draw(axis: Any, groups: list[Group]) -> None:
        for router in dict.fromkeys(group.router for group in groups):
            points = [(value(g), g) for g in groups if g.router == router]
            known = [(x, g.row) for x, g in points if x is not None]
            known.sort(key=lambda point: point[0])
            if known:
                axis.errorbar(
                    [x for x, _ in known],
                    [row["valid_loss_mean"] for _, row in known],
                    yerr=[row["valid_loss_std"] or 0.0 for _, row in known],
                    marker="o", markersize=4, capsize=3, label=router, color=_COLORS[router],
                )  # fmt: skip
        axis.set_xscale("log", base=2)
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


_AXES: dict[str, tuple[str, Callable[[Group], float | None]]] = {
    "parameters": ("active parameters (millions)", _active_params),
    "experts": ("experts", _experts),
    "granularity": ("granularity", _granularity),
}
