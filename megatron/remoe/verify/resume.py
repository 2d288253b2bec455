"""`remoe verify resume`: a run that is saved and loaded is the run that was not interrupted.

A pair of layouts trains N steps under the first, writes a `torch_dist` checkpoint as Megatron's
loop does, loads it under the second and trains N more. In the same layout all 2N steps must equal
the uninterrupted run's bit for bit; across layouts they must equal one rank's within the tolerances
of `grid`.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.remoe.ranks import Pools
from megatron.remoe.testing import cells
from megatron.remoe.testing.cells import Cell
from megatron.remoe.testing.golden import CLOSED_LOOP, golden_tokens
from megatron.remoe.verify.grid import Comparison, Trajectory, reference_of, table


@dataclass(frozen=True)
class Pair:
    """A layout to save in and one to load in."""

    before: Cell
    after: Cell

    @property
    def name(self) -> str:
        return f"{self.before.name} -> {self.after.name}"

    @property
    def is_same(self) -> bool:
        return self.before == self.after


@dataclass(frozen=True)
class Result:
    """Of an interrupted run against one that was not interrupted."""

    pair: Pair
    steps: int
    compared: Comparison
    error: str | None = None

    @property
    def deviations(self) -> dict[str, float]:
        return self.compared.deviations

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def ok(self) -> bool:
        if self.error is not None:
            return False
        if self.pair.is_same:
            return not any(self.deviations.values())
        return self.compared.is_within(self.pair.before.dtype)

    @property
    def verdict(self) -> str:
        if self.error is not None:
            return self.error
        if not self.ok:
            return "DIFFERS"
        return "bit for bit" if self.pair.is_same else f"ok{self.compared.flip}"


def pairs() -> list[Pair]:
    """Every dimension of the grid in itself, and from and to the others."""
    dist: dict[str, Any] = {"distributed_optimizer": True}
    one, dp2, ep2, tp2, pp2 = (
        Cell("1"), Cell("DP2", 2), Cell("EP2", 2, ep=2), Cell("TP2", 2, tp=2), Cell("PP2", 2, pp=2),
    )  # fmt: skip
    one_dist, dp2_dist, tp2_dist = (
        replace(cell, name=f"{cell.name}, distributed optimizer", **dist)
        for cell in (one, dp2, tp2)
    )
    ep2_dist = Cell("EP2, distributed optimizer, overlap", 2, ep=2, overlap=True, **dist)
    tp2_ep2 = Cell("TP2 x EP2", 2, tp=2, ep=2)
    expert_tp2 = Cell("TP2, expert TP2", 2, tp=2, expert_tp=2, dispatcher="allgather")
    four = (("nmb", 4),)
    one_of_four, ep2_of_four = replace(one, run=four), replace(ep2, run=four)
    dp2_ep2 = Cell("DP2 x EP2", 4, ep=2, run=four)
    dp2_ep2_dist = replace(dp2_ep2, name="DP2 x EP2, distributed optimizer", **dist)
    pp2_ep2 = Cell("PP2 x EP2", 4, pp=2, ep=2, run=four)
    tp2_pp2 = Cell("TP2 x PP2", 4, tp=2, pp=2, run=four)
    deep = (("L", 4),)
    vp2 = Cell("PP2, 2 virtual stages", 2, pp=2, vp=2, run=deep)
    topk, dense = replace(ep2, name="TopK EP2", router="topk"), Cell("dense TP2", 2, tp=2)
    same = [one, one_dist, dp2, dp2_dist, ep2, ep2_dist, tp2, tp2_dist, expert_tp2, pp2, vp2, topk]
    same += [replace(dense, router="dense"), tp2_ep2, dp2_ep2, dp2_ep2_dist, pp2_ep2, tp2_pp2]
    same += [
        replace(c, name=f"bf16: {c.name}", dtype="bf16") for c in (one, ep2, dp2_dist, ep2_dist)
    ]
    across = [
        (one, dp2), (one, ep2), (one, tp2), (one, pp2), (ep2, one), (tp2, one), (pp2, one),
        (ep2, tp2), (tp2, ep2), (ep2, pp2), (pp2, ep2), (pp2, tp2), (dp2, tp2_ep2),
        (tp2_ep2, pp2), (expert_tp2, ep2), (vp2, replace(pp2, run=deep)),
        (vp2, replace(one, run=deep)),
        (one_of_four, dp2_ep2), (dp2_ep2, one_of_four), (dp2_ep2, pp2_ep2), (tp2_pp2, dp2_ep2),
        (ep2_of_four, tp2_pp2),
        (one_dist, dp2_dist), (one_dist, ep2_dist), (ep2_dist, one_dist), (ep2_dist, tp2_dist),
        (tp2_dist, dp2_dist), (replace(one_dist, run=four), dp2_ep2_dist),
        (dp2_ep2_dist, replace(tp2_dist, run=four)),
    ]  # fmt: skip
    across += [
        (replace(a, name=f"bf16: {a.name}", dtype="bf16"), replace(b, dtype="bf16"))
        for a, b in ((ep2, tp2), (ep2_dist, one_dist))
    ]
    return [*(Pair(cell, cell) for cell in same), *(Pair(a, b) for a, b in across)]


def verify(
    chosen: list[Pair], *, steps: int, report: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Run pairs and compare each with its uninterrupted run, which is run once per layout.

    Args:
        chosen: the pairs.
        steps: N, the steps before the save and again after it.
        report: called with each result as it is known.
    """
    results = []
    straight: dict[Cell, Trajectory] = {}
    weights: dict[Cell, Path] = {}
    with tempfile.TemporaryDirectory() as folder, Pools() as pools:

        def weights_of(cell: Cell) -> Path:
            reference = reference_of(cell)
            if reference not in weights:
                weights[reference] = Path(folder) / f"weights{len(weights)}"
                pools.run(1, cells.save_golden_weights, reference, CLOSED_LOOP, weights[reference])
            return weights[reference]

        def run(function: Callable[..., Any], cell: Cell, *args: Any) -> Trajectory:
            trajectories = pools.run(cell.world, function, cell, CLOSED_LOOP, *args)
            return next(t for t in trajectories if "lm_loss" in t[0])

        for i, pair in enumerate(sorted(chosen, key=lambda p: (p.before.world, p.after.world))):
            before, after = pair.before, pair.after
            expected_of = before if pair.is_same else reference_of(before)
            checkpoint = Path(folder) / f"checkpoint{i}"
            try:
                start = weights_of(before)
                if expected_of not in straight:
                    straight[expected_of] = run(cells.run_cell, expected_of, 2 * steps, start)
                first = run(train_and_save, before, steps, start, checkpoint)
                second = run(load_and_train, after, steps, start, checkpoint)
                compared = Comparison.of([*first, *second], straight[expected_of])
                result = Result(pair, 2 * steps, compared)
            except AssertionError as error:
                problem = str(error).strip().splitlines()[-1]
                result = Result(pair, 2 * steps, Comparison(), problem)
            results.append(result)
            report(result)
    return results


def to_markdown(results: list[Result]) -> str:
    """A table of the largest deviations, a row per pair."""
    rows = [(r.name, r.steps, r.deviations, r.verdict) for r in results]
    return table(("saved in -> loaded in", "steps"), rows)


# What follows runs on all ranks of a cell.


def train_and_save(
    cell: Cell, golden: dict[str, Any], steps: int, weights: Path, checkpoint: Path
) -> Trajectory:
    """Train the run's first steps and write a checkpoint."""
    training = Training(cell, golden, weights)
    trajectory = training.steps(0, steps)
    training.save(checkpoint)
    return trajectory


def load_and_train(
    cell: Cell, golden: dict[str, Any], steps: int, weights: Path, checkpoint: Path
) -> Trajectory:
    """Read a checkpoint of that step and train as many steps again."""
    training = Training(cell, golden, weights)
    training.load(checkpoint)
    return training.steps(steps, steps)


class Training(cells.Training):
    """A cell that can be stopped: model, optimizer and data of a golden run under one layout."""

    def __init__(self, cell: Cell, golden: dict[str, Any], weights: Path) -> None:
        from megatron.remoe import compat

        compat.apply()
        cells.initialize(cell)
        super().__init__(cell, cell.config(golden), weights)

    def steps(self, first: int, count: int) -> Trajectory:
        """Train so many steps on the run's batches from `first` on; what every step measured."""
        return [self.step(batch) for batch in golden_tokens(self.config)[first : first + count]]

    def save(self, checkpoint: Path, *, asynchronous: bool = False) -> Any:
        """Write model and optimizer; returns Megatron's request when asynchronous."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.training.training import force_param_sync

        if self.cell.overlap and self.cell.distributed_optimizer:
            force_param_sync(self.chunks, self.optimizer)  # as Megatron does before it saves
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        return dist_checkpointing.save(
            self._sharded_state(),
            str(checkpoint),
            async_sharded_save=asynchronous,
            async_strategy="mcore",
        )

    def load(self, checkpoint: Path) -> None:
        """Read model and optimizer."""
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(checkpoint))
        keys = [key for key in state if key.startswith("model")]
        for key, chunk in zip(sorted(keys), self.chunks, strict=True):
            chunk.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded_state(self, **optimizer_options: Any) -> dict[str, Any]:
        from megatron.core.utils import unwrap_model
        from megatron.training import checkpointing

        flags = Namespace(
            ckpt_format="torch_dist",
            use_distributed_optimizer=self.cell.distributed_optimizer,
            dist_ckpt_optim_fully_reshardable=True,
            distrib_optim_fully_reshardable_mem_efficient=False,
            no_save_optim=False,
            no_save_rng=True,
        )
        metadata = checkpointing._build_sharded_state_dict_metadata(flags)
        state: dict[str, Any] = checkpointing.generate_state_dict(
            flags,
            unwrap_model(self.chunks),
            self.optimizer,
            opt_param_scheduler=None,
            rng_state=None,
            optim_sd_kwargs={"metadata": metadata, **optimizer_options},
            model_sd_kwargs={"metadata": metadata},
        )
        return state
