"""Runs of cells on CPU ranks, which share groups of ranks, initial weights and references."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.remoe.ranks import Pools
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.cells import run_cell, save_golden_weights
from megatron.remoe.testing.golden import CLOSED_LOOP, Host
from megatron.remoe.verify import plain
from megatron.remoe.verify.trajectories import Trajectory, TrajectoryComparison, TrajectoryResult
from remoe.kernels.chunks import UNLIMITED


def reference_of(cell: Cell) -> Cell:
    """Return the cell to compare with: one rank with the same model, data and precision.

    Its model is a GPT model. Its experts are those of `cell`, so that nothing else but the layout
    differs, and it computes all experts of a layer at once. Grouped experts on one rank are
    themselves compared with Megatron's own. The reference of a `plain` cell is the run in plain
    torch.
    """
    return Cell(
        "plain torch" if cell.plain else "one rank",
        experts="sequential" if cell.world == 1 or cell.plain else cell.experts,
        max_assignments=UNLIMITED,
        dtype=cell.dtype,
        router=cell.router,
        recurrence=cell.recurrence,
        recurrent_projection=cell.recurrent_projection,
        load_balancing=cell.load_balancing,
        per_layer=cell.per_layer,
        routing=cell.routing,
        padding=cell.padding,
        per_token_loss=cell.per_token_loss,
        plain=cell.plain,
        run=cell.run if cell.reference_run is None else cell.reference_run,
    )


class Runner:
    """Runs cells from golden weights, which are written once per model."""

    def __init__(self, folder: Path, pools: Pools) -> None:
        self.folder, self._pools = folder, pools
        self._weights: dict[Cell, Path] = {}
        self._uninterrupted: dict[Cell, Trajectory] = {}

    def weights_of(self, cell: Cell, *, host: Host | None = None) -> Path:
        """Return a checkpoint with the initial weights of a cell and of its reference.

        Args:
            cell: the cell.
            host: the class of the model that will load them; None is that of the cell.
        """
        reference = replace(reference_of(cell), host=host or cell.host)
        if reference not in self._weights:
            path = self.folder / f"weights{len(self._weights)}"
            self._pools.run(1, save_golden_weights, reference, CLOSED_LOOP, path)
            self._weights[reference] = path
        return self._weights[reference]

    def run(self, function: Callable[..., Any], cell: Cell, *args: Any) -> Trajectory:
        """Call a function on the ranks of a cell; return the trajectory that includes the loss."""
        trajectories = self._pools.run(cell.world, function, cell, CLOSED_LOOP, *args)
        return next(t for t in trajectories if "lm_loss" in t[0])

    def uninterrupted(self, cell: Cell, steps: int, weights: Path) -> Trajectory:
        """Return the trajectory of a reference, which is run once."""
        if cell not in self._uninterrupted:
            self._uninterrupted[cell] = (
                plain.train(
                    cell.config(CLOSED_LOOP),
                    steps,
                    padding=cell.padding,
                    per_token_loss=cell.per_token_loss,
                    recurrence=cell.recurrence,
                )
                if cell.plain
                else self.run(run_cell, cell, steps, weights)
            )
        return self._uninterrupted[cell]


def check_all[Case, Result: TrajectoryResult](
    cases: Iterable[Case],
    compare: Callable[[Runner, Case], TrajectoryComparison],
    result: Callable[..., Result],
    report: Callable[[Result], None],
) -> list[Result]:
    """Compare every case with its reference; a rank that fails makes a result with an error.

    Args:
        cases: the cases, in order.
        compare: runs a case and its reference.
        result: makes the result of a case, from the case, `compared` and `error`.
        report: called with each result as it is known.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder, Pools() as pools:
        runner = Runner(Path(folder), pools)
        for case in cases:
            error = None
            try:
                compared = compare(runner, case)
            except AssertionError as failure:
                compared = TrajectoryComparison()
                error = str(failure).strip().splitlines()[-1]
            results.append(result(case, compared=compared, error=error))
            report(results[-1])
    return results
