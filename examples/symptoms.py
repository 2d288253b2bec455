"""Three symptoms of a run with ReLU routing, each beside its remedy: docs/how_it_works.md.

    pip install 'remoe[analysis]'
    python examples/symptoms.py --out docs/images

A single `ReMoELayer` of eight experts learns 32 clusters of tokens, each with a linear map of its
own. With the layer's defaults and a learning rate of 3e-3, sparsity settles at its target and every
expert serves some clusters. Each other run differs from that one in one to three settings. The
program takes less than a minute; it prints a table of all runs and draws a figure of every symptom.
"""

import argparse
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty, update_l1_coeff
from remoe.statistics import DEAD_SHARE, TokenCounts, settling_index

EXPERTS, TOPK, HIDDEN, WIDTH = 8, 1, 16, 32
CLUSTERS, TOKENS = 32, 128
TARGET = 1 - TOPK / EXPERTS
STEPS, LAST = 400, 50  # The table has means over the last steps.
LEARNING_RATE = 3e-3
RED, GREEN = "#b03a00", "#00694c"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass
class Run:
    """What was seen in every step of a training run, and the trained layer.

    Attributes:
        loss, sparsity, coefficient: a number of every step; the loss is without the penalty.
        loads: of every step, the fraction of the tokens that activated each expert, `[steps, E]`.
        layer: the layer after the last step.
        tokens: a batch that the layer has not seen, `[T, H]`.
    """

    loss: list[float]
    sparsity: list[float]
    coefficient: list[float]
    loads: Tensor
    layer: ReMoELayer
    tokens: Tensor

    @property
    def dead(self) -> list[int]:
        """Experts with less than an eighth of a balanced share of the last tokens."""
        share_E = self.loads[-LAST:].mean(dim=0)
        return (share_E < TOPK / EXPERTS / DEAD_SHARE).nonzero().flatten().tolist()

    @property
    def settles_at(self) -> int | None:
        """The first of 20 steps in a row near the target, counted from 1, or None."""
        index = settling_index(self.sparsity, TARGET)
        return None if index is None else index + 1


def train(
    *,
    steps: int = STEPS,
    lr: float = LEARNING_RATE,
    seed: int = 0,
    penalty: bool = True,
    **settings: Any,
) -> Run:
    """Train a layer on tokens of some clusters, each of which has to be mapped differently.

    Args:
        steps: the number of training steps.
        lr: the learning rate of AdamW.
        seed: the seed of the weights; that of the data is another one.
        penalty: whether the penalty is added to the loss.
        settings: settings of `ReMoELayerConfig`.
    """
    # Equal seeds would give router and centers the same numbers: an expert for some clusters each.
    generator = torch.Generator().manual_seed(1000 + seed)
    centers = torch.randn(CLUSTERS, HIDDEN, generator=generator) + 1
    maps = torch.randn(CLUSTERS, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5

    def batch() -> tuple[Tensor, Tensor]:
        cluster = torch.randint(CLUSTERS, (TOKENS,), generator=generator)
        x = centers[cluster] + 0.1 * torch.randn(TOKENS, HIDDEN, generator=generator)
        return x, torch.einsum("th,thk->tk", x, maps[cluster])

    torch.manual_seed(seed)
    config = ReMoELayerConfig(
        HIDDEN, WIDTH, num_experts=EXPERTS, topk=TOPK, init_std=0.1,
        max_assignments=TOKENS * EXPERTS,  # so few tokens are never computed chunk by chunk
        **settings,
    )  # fmt: skip
    layer = ReMoELayer(config)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0)
    loss, sparsity, coefficient, loads = [], [], [], []
    for _ in range(steps):
        x, y = batch()
        task = torch.nn.functional.mse_loss(layer(x), y)
        (task + l1_penalty(layer) if penalty else task).backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = TokenCounts(layer.counts.double())
        loads.append(counts.per_expert / counts.num_tokens)
        coefficient.append(layer.l1_coeff.item())
        sparsity.append(update_l1_coeff(layer).item())
        loss.append(task.item())
    return Run(loss, sparsity, coefficient, torch.stack(loads), layer, batch()[0])


@dataclass(frozen=True)
class Figure:
    """A figure of a symptom: what it shows, of which runs with the symptom and the remedy."""

    rows: tuple[str, str]
    symptom: tuple[dict[str, Any], ...]
    remedy: tuple[dict[str, Any], ...]


FIGURES = {
    "sparsity": Figure(
        ("sparsity", "coefficient"),
        ({"l1_coeff_multiplier": 1.02}, {"l1_coeff_multiplier": 1.5}),
        ({}, {"l1_coeff_multiplier": 1.02, "l1_coeff_init": 1e-2}),
    ),
    "dead_expert": Figure(
        ("load", "loss"),
        ({"l1_coeff_init": 1.0}, {"load_balancing": "none"}),
        ({},),
    ),
    "coefficient": Figure(
        ("coefficient", "sparsity"),
        ({"penalty": False}, {"lr": 3e-4}),
        ({}, {"lr": 3e-4, "l1_coeff_multiplier": 1.02, "l1_coeff_init": 1e-2}),
    ),
}


def label(settings: dict[str, Any]) -> str:
    """Return the name of a run: its settings that are not the default ones."""
    if settings == {"penalty": False}:
        return "penalty not in the loss"
    names = [f"{name.removeprefix('l1_coeff_')} {value}" for name, value in settings.items()]
    return ", ".join(names) or f"defaults, lr {LEARNING_RATE}"


def row(settings: dict[str, Any], run: Run) -> str:
    """Return the row of a run in the table of docs/how_it_works.md."""
    cells = [
        label(settings),
        f"{statistics.mean(run.sparsity[-LAST:]):.3f}",
        str(run.settles_at or "never"),
        f"{max(run.coefficient):.1e}, {run.coefficient[-1]:.1e}",
        str(len(run.dead)),
        f"{statistics.mean(run.loss[-LAST:]):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    f"| run | sparsity (target {TARGET:g}) | settles at step | coefficient: highest, last "
    "| dead experts of 8 | loss |\n|---|---|---|---|---|---|"
)


def plot(axis: Axes, what: str, run: Run) -> None:
    """Draw the sparsity, the coefficient, the loss or the loads of a run over its steps."""
    steps = range(1, len(run.loss) + 1)
    limit: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 0.9}
    if what == "sparsity":
        axis.plot(steps, run.sparsity, color=COLORS[0], linewidth=1.2)
        axis.axhline(TARGET, **limit)
        axis.set_ylim(-0.03, 1.03)
    elif what == "load":
        mean_SE = run.loads[: len(run.loads) // 10 * 10].unflatten(0, (-1, 10)).mean(dim=1)
        for color, load in zip(COLORS, mean_SE.T, strict=True):
            axis.plot(steps[9::10], load.tolist(), color=color, linewidth=1)
        axis.axhline(TOPK / EXPERTS / DEAD_SHARE, **limit)
        axis.set_ylim(-0.03, 1.03)
    else:
        values = run.coefficient if what == "coefficient" else run.loss
        axis.semilogy(steps, values, color=COLORS[3] if what == "coefficient" else COLORS[2])
    axis.grid(alpha=0.25)


def draw(path: Path, figure: Figure, runs: dict[str, Run]) -> None:
    """Draw a symptom and its remedy side by side, a column for every run."""
    cases = [(case, "symptom", RED) for case in figure.symptom]
    cases += [(case, "remedy", GREEN) for case in figure.remedy]
    # Equal numbers make equal files, and text stays text.
    with plt.rc_context({"svg.hashsalt": "symptoms", "svg.fonttype": "none", "font.size": 8}):
        canvas, axes = plt.subplots(
            2, len(cases), figsize=(2.6 * len(cases) + 0.3, 3.8), sharex=True, sharey="row",
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for column, (case, kind, color) in zip(axes.T, cases, strict=True):
            run = runs[label(case)]
            for axis, what in zip(column, figure.rows, strict=True):
                plot(axis, what, run)
            title = textwrap.fill(f"{kind}: {label(case)}", 36)
            column[0].set_title(title, color=color, fontsize=8)
            column[1].set_xlabel("step")
        for axis, what in zip(axes[:, 0], figure.rows, strict=True):
            axis.set_ylabel({"load": "load: share of the tokens"}.get(what, what))
            if what == "coefficient":  # One that falls to 1e-45 would flatten all others.
                bottom, top = axis.get_ylim()
                axis.set_ylim(max(bottom, 1e-20), top)
        canvas.savefig(path, metadata={"Date": None})
        plt.close(canvas)


def main() -> None:
    """Train all runs, print their table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="The folder for the three figures.")
    add("--steps", type=int, default=STEPS, help=f"The steps of a run, {LAST} or more.")
    add("--seed", type=int, default=0, help="The seed of data and weights.")
    options = parser.parse_args()
    if options.steps < LAST:
        parser.error(f"--steps is {options.steps}; the table needs at least {LAST}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a layer is fastest on one

    print(HEADER)
    runs: dict[str, Run] = {}
    for name, figure in FIGURES.items():
        for case in (*figure.symptom, *figure.remedy):
            if label(case) not in runs:
                runs[label(case)] = train(steps=options.steps, seed=options.seed, **case)
                print(row(case, runs[label(case)]), flush=True)
        draw(options.out / f"symptom_{name}.svg", figure, runs)


if __name__ == "__main__":
    main()
