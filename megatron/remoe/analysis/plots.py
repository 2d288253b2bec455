"""Curves of a single run, drawn from its run directory alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.runs import Run

_STAGES = (("dense", "#d9e6f2"), ("sparsifying", "#fbe6cd"), ("stable", "#e2f0df"))


def plot_curves(run: Run, path: Path) -> None:
    """Draw loss, sparsity with its target, and coefficient over steps, as a PNG.

    For a run without ReLU routing, only the loss is drawn.
    """
    steps = run.series("iteration")
    panels = [_loss, _sparsity, _coefficient] if run.has_relu_routing else [_loss]
    with figure_file(path, len(panels), (9, 1.5 + 2.5 * len(panels))) as (figure, axes):
        for draw, axis in zip(panels, axes, strict=True):
            draw(axis, run, steps)
            if run.has_relu_routing:
                _shade_stages(axis, run, steps, labels=axis is axes[0])
            axis.grid(alpha=0.3)
            axis.set_xlim(steps[0], steps[-1])
        axes[-1].set_xlabel("step")
        figure.suptitle(run.path.resolve().name)


@contextmanager
def figure_file(path: Path, panels: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its panels, one below the other; save it afterwards.

    The format is that of the path's suffix. An SVG is the same whenever it is drawn from the same
    numbers.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "remoe"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        panels, 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    yield figure, axes[:, 0]
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _loss(axis: Any, run: Run, steps: list[int]) -> None:
    axis.plot(steps, run.series("lm_loss"), color="#1f4e79", linewidth=1.2, label="training")
    splits = sorted({row["split"] for row in run.evaluations})
    for split in splits:
        rows = [row for row in run.evaluations if row["split"] == split]
        overall = split == "valid"
        axis.plot(
            [row["iteration"] for row in rows],
            [row["lm_loss"] for row in rows],
            marker="o",
            markersize=6 if overall else 3,
            color="black" if overall else None,
            linewidth=1.5 if overall else 0.7,
            label=split,
        )
    axis.set_ylabel("loss")
    axis.legend(fontsize=7, ncols=2)


def _sparsity(axis: Any, run: Run, steps: list[int]) -> None:
    for layer, values in enumerate(zip(*run.series("sparsity_per_layer"), strict=True), start=1):
        label = "each layer" if layer == 1 else None
        axis.plot(steps, values, color="#9db8d2", linewidth=0.7, label=label)
    axis.plot(steps, run.series("sparsity"), color="#1f4e79", linewidth=1.5, label="mean")
    target = run.target_sparsity
    axis.axhline(target, color="#c0392b", linestyle="--", linewidth=1, label=f"target {target:g}")
    axis.set_ylabel("sparsity")
    axis.legend(fontsize=7, loc="lower right")


def _coefficient(axis: Any, run: Run, steps: list[int]) -> None:
    axis.semilogy(steps, run.series("l1_coeff"), color="#8e5a9e", label="coefficient")
    axis.semilogy(steps, run.series("l1_reg"), color="#5b8c5a", label="regularizer")
    axis.set_ylabel("L1 penalty")
    axis.legend(fontsize=7)


def _shade_stages(axis: Any, run: Run, steps: list[int], *, labels: bool) -> None:
    stages = run.stages
    ends = [max(stages.dense_until, steps[0]), stages.sparse_from or steps[-1], steps[-1]]
    start = steps[0]
    for (name, color), end in zip(_STAGES, ends, strict=True):
        if end > start:
            axis.axvspan(start, end, color=color, zorder=0)
            if labels:
                middle = (start + end) / 2
                axis.text(middle, 1.01, name, transform=axis.get_xaxis_transform(),
                          ha="center", va="bottom", fontsize=8)  # fmt: skip
        start = max(start, end)
