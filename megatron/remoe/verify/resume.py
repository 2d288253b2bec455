"""`remoe verify resume`: a run that is saved and loaded is the run that was not interrupted.

A pair of layouts trains N steps under the first, writes a `torch_dist` checkpoint as Megatron's
loop does, loads it under the second and trains N more. In the same layout all 2N steps must equal
the uninterrupted run's bit for bit; across layouts they must equal one rank's within the tolerances
of `trajectories`.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.remoe.testing import cells
from megatron.remoe.testing.cell import DISTRIBUTED, FOUR_RANKS, ODD_SIZES, Cell, variants
from megatron.remoe.testing.golden import Host, golden_tokens
from megatron.remoe.verify.runs import Runner, check_all, reference_of
from megatron.remoe.verify.trajectories import (
    Trajectory,
    TrajectoryComparison,
    TrajectoryResult,
    table,
)
from remoe.config import ROUTINGS

_GRU: dict[str, Any] = {"recurrence": "gru"}
_SHARDED_GRU = DISTRIBUTED | _GRU
_PADDED: dict[str, Any] = {"overlap": True, "run": ODD_SIZES} | DISTRIBUTED
_LAYOUTS = [
    Cell("1"),
    Cell("1, distributed optimizer", **DISTRIBUTED),
    Cell("DP2", 2),
    Cell("DP2, distributed optimizer", 2, **DISTRIBUTED),
    Cell("DP2, distributed optimizer, padded buckets", 2, **_PADDED),
    Cell("EP2", 2, ep=2),
    Cell("EP2, distributed optimizer, overlap", 2, ep=2, overlap=True, **DISTRIBUTED),
    Cell("TP2", 2, tp=2),
    Cell("TP2, distributed optimizer", 2, tp=2, **DISTRIBUTED),
    Cell("TP2, expert TP2", 2, tp=2, expert_tp=2, dispatcher="allgather"),
    Cell("PP2", 2, pp=2),
    Cell("PP2, 2 virtual stages", 2, pp=2, vp=2, run=(("L", 4),)),
    Cell("TopK EP2", 2, ep=2, router="topk"),
    Cell("dense TP2", 2, tp=2, router="dense"),
    Cell("TP2 x EP2", 2, tp=2, ep=2),
    Cell("DP2 x EP2", 4, ep=2, run=FOUR_RANKS),
    Cell("DP2 x EP2, distributed optimizer", 4, ep=2, run=FOUR_RANKS, **DISTRIBUTED),
    Cell("PP2 x EP2", 4, pp=2, ep=2, run=FOUR_RANKS),
    Cell("TP2 x PP2", 4, tp=2, pp=2, run=FOUR_RANKS),
    Cell("recurrent 1", **_GRU),
    Cell("recurrent EP2, distributed optimizer, overlap", 2, ep=2, overlap=True, **_SHARDED_GRU),
    Cell("recurrent TP2", 2, tp=2, **_GRU),
    Cell("recurrent PP2", 2, pp=2, **_GRU),
    Cell("recurrent PP2, distributed optimizer", 2, pp=2, **_SHARDED_GRU),
    Cell("recurrent TopK PP2", 2, pp=2, router="topk", **_GRU),
    Cell("recurrent DP2 x PP2, distributed optimizer", 4, pp=2, run=FOUR_RANKS, **_SHARDED_GRU),
    Cell("soft 1", router="soft"),
    Cell("soft TP2 x EP2", 2, tp=2, ep=2, router="soft"),
]
_HYBRID = (
    "1", "TP2", "PP2", "PP2, 2 virtual stages", "TopK EP2", "DP2, distributed optimizer",
    "EP2, distributed optimizer, overlap", "TP2 x PP2", "recurrent 1", "recurrent PP2",
    "recurrent EP2, distributed optimizer, overlap", "soft TP2 x EP2",
)  # fmt: skip
_LAYOUTS += variants(_LAYOUTS, "hybrid: ", _HYBRID, host="hybrid")
# Every other router, and ReLU routing with all of its state.
_ROUTERS: dict[str, dict[str, Any]] = {
    **{name: {"router": name} for name in ROUTINGS if name not in ("relu", "topk", "soft")},
    "relu, load of the step before": {"load_balancing": "global_batch", "per_layer": True},
}
_LAYOUTS += [
    replace(cell, name=f"router {name}: {cell.name}", **changes)
    for name, changes in _ROUTERS.items()
    for cell in (
        Cell("1"),
        Cell("TP2", 2, tp=2),
        Cell("EP2, distributed optimizer", 2, ep=2, **DISTRIBUTED),
    )
]
_ACROSS = {
    "1": ("DP2", "EP2", "TP2", "PP2", "DP2 x EP2"),
    "EP2": ("1", "TP2", "PP2", "TP2 x PP2"),
    "TP2": ("1", "EP2"),
    "PP2": ("1", "EP2", "TP2"),
    "DP2": ("TP2 x EP2",),
    "TP2 x EP2": ("PP2",),
    "TP2, expert TP2": ("EP2",),
    "PP2, 2 virtual stages": ("PP2", "1"),
    "DP2 x EP2": ("1", "PP2 x EP2"),
    "TP2 x PP2": ("DP2 x EP2",),
    "1, distributed optimizer": (
        "DP2, distributed optimizer",
        "EP2, distributed optimizer, overlap",
        "DP2 x EP2, distributed optimizer",
    ),
    "DP2, distributed optimizer, padded buckets": ("1, distributed optimizer",),
    "EP2, distributed optimizer, overlap": (
        "1, distributed optimizer",
        "TP2, distributed optimizer",
    ),
    "TP2, distributed optimizer": ("DP2, distributed optimizer",),
    "DP2 x EP2, distributed optimizer": ("TP2, distributed optimizer",),
    "recurrent 1": ("recurrent TP2", "recurrent PP2"),
    "recurrent PP2": ("recurrent 1", "recurrent TP2"),
    "recurrent PP2, distributed optimizer": ("recurrent EP2, distributed optimizer, overlap",),
    "recurrent EP2, distributed optimizer, overlap": ("recurrent PP2, distributed optimizer",),
    "recurrent DP2 x PP2, distributed optimizer": ("recurrent PP2, distributed optimizer",),
    "soft 1": ("soft TP2 x EP2",),
    "soft TP2 x EP2": ("soft 1",),
    # The RMS norm amplifies what layouts round differently, see `grid.routers`.
    **{f"router {n}: 1": (f"router {n}: TP2",) for n in _ROUTERS if n != "relu_rms"},
    **{f"router {n}: TP2": (f"router {n}: 1",) for n in _ROUTERS if n != "relu_rms"},
    "hybrid: 1": ("hybrid: TP2", "hybrid: PP2"),
    "hybrid: PP2": ("hybrid: 1", "hybrid: TP2 x PP2"),
    "hybrid: PP2, 2 virtual stages": ("hybrid: PP2",),
    "hybrid: EP2, distributed optimizer, overlap": ("hybrid: DP2, distributed optimizer",),
    "hybrid: recurrent PP2": ("hybrid: recurrent 1",),
    "bf16: EP2": ("TP2",),
    "bf16: EP2, distributed optimizer, overlap": ("1, distributed optimizer",),
}
# From a checkpoint of a GPT model to a hybrid model.
_TO_HYBRID = {
    "1": ("1", "TP2"),
    "EP2": ("PP2",),
    "PP2, 2 virtual stages": ("PP2, 2 virtual stages",),
    "TopK EP2": ("TopK EP2",),
    "EP2, distributed optimizer, overlap": (
        "EP2, distributed optimizer, overlap",
        "DP2, distributed optimizer",
    ),
    "recurrent 1": ("recurrent 1", "recurrent PP2"),
    "soft 1": ("soft TP2 x EP2",),
}
_IN_BF16 = (
    "1", "EP2", "DP2, distributed optimizer", "EP2, distributed optimizer, overlap",
    "recurrent PP2, distributed optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A layout to save in and one to load in."""

    before: Cell
    after: Cell

    @property
    def name(self) -> str:
        """The names of both layouts."""
        return f"{self.before.name} -> {self.after.name}"

    @property
    def is_same(self) -> bool:
        """Whether the run is loaded in the layout that it is saved in."""
        return self.before == self.after


@dataclass(frozen=True)
class PairResult(TrajectoryResult):
    """The result of an interrupted run, compared with one that was not interrupted."""

    pair: Pair

    @property
    def name(self) -> str:
        """The name of the pair."""
        return self.pair.name

    @property
    def agrees(self) -> bool:
        """Whether the deviations are zero, or within tolerance if the layout has changed."""
        if self.pair.is_same:
            return not any(self.deviations.values())
        return self.compared.is_within(self.pair.before.dtype)

    @property
    def praise(self) -> str:
        """The verdict of a pair that passed."""
        return "bit for bit" if self.pair.is_same else super().praise


def pairs() -> list[Pair]:
    """Return every layout paired with itself, and pairs of different layouts."""
    cells = [*_LAYOUTS, *variants(_LAYOUTS, "bf16: ", _IN_BF16, dtype="bf16")]
    layouts = {cell.name: cell for cell in cells}
    to_hybrid = {k: tuple(f"hybrid: {name}" for name in v) for k, v in _TO_HYBRID.items()}
    across = []
    for saved in {**_ACROSS, **to_hybrid}:
        before = layouts[saved]
        for after in (layouts[n] for n in (*_ACROSS.get(saved, ()), *to_hybrid.get(saved, ()))):
            run = before.run or after.run  # both train the same run, in the same precision
            changes: dict[str, Any] = {"run": run, "dtype": before.dtype}
            across.append(Pair(replace(before, run=run), replace(after, **changes)))
    return [*(Pair(cell, cell) for cell in layouts.values()), *across]


def verify(
    chosen: list[Pair],
    *,
    steps: int,
    report: Callable[[PairResult], None] = lambda result: None,
) -> list[PairResult]:
    """Run pairs and compare each with its uninterrupted run, which is run once per layout.

    Args:
        chosen: the pairs.
        steps: N, the number of steps before the save and again after it.
        report: called with each result as it is known.
    """

    def compare(runner: Runner, pair: Pair) -> TrajectoryComparison:
        before, after = pair.before, pair.after
        checkpoint = runner.folder / f"checkpoint{chosen.index(pair)}"
        reference = before if pair.is_same else reference_of(before)
        initial = runner.weights_of(before, host=reference.host)
        expected = runner.uninterrupted(reference, 2 * steps, initial)
        first = runner.run(train_and_save, before, steps, runner.weights_of(before), checkpoint)
        initial = runner.weights_of(before, host=after.host)
        second = runner.run(load_and_train, after, steps, initial, checkpoint, before.host)
        return TrajectoryComparison.of([*first, *second], expected)

    return check_all(
        sorted(chosen, key=lambda pair: (pair.before.world, pair.after.world)),
        compare,
        lambda pair, **found: PairResult(pair, steps=2 * steps, **found),
        report,
    )


def to_markdown(results: list[PairResult]) -> str:
    """Return a table of the largest deviations, with a row per pair."""
    return table(("saved in -> loaded in", "steps"), [((r.name, r.steps), r) for r in results])


# What follows runs on all ranks of a cell.


def train_and_save(
    cell: Cell, golden: dict[str, Any], steps: int, weights: Path, checkpoint: Path
) -> Trajectory:
    """Train the first steps of the run and write a checkpoint."""
    training = ResumableTraining(cell, golden, weights)
    trajectory = training.steps(0, steps)
    training.save(checkpoint)
    return trajectory


def load_and_train(
    cell: Cell,
    golden: dict[str, Any],
    steps: int,
    weights: Path,
    checkpoint: Path,
    saved_by: Host | None = None,
) -> Trajectory:
    """Read the checkpoint of that step and train as many steps again.

    The class of the model that saved it, `saved_by`, is that of the cell by default.
    """
    training = ResumableTraining(cell, golden, weights)
    training.load(checkpoint, saved_by=saved_by or cell.host)
    return training.steps(steps, steps)


class ResumableTraining(cells.Training):
    """A cell whose training can be saved and continued."""

    def __init__(self, cell: Cell, golden: dict[str, Any], weights: Path | None) -> None:
        from megatron.remoe import compat

        compat.apply()
        cells.initialize(cell)
        super().__init__(cell, cell.config(golden), weights)

    def steps(self, first: int, count: int) -> Trajectory:
        """Train on `count` batches of the run from `first` on; return what every step measured."""
        return [self.step(batch) for batch in golden_tokens(self.config)[first : first + count]]

    def save(self, checkpoint: Path, *, asynchronous: bool = False) -> Any:
        """Write model and optimizer; return Megatron's request when `asynchronous`."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.training.training import force_param_sync

        if self.cell.overlaps_gather:  # as Megatron does before it saves
            force_param_sync(self.chunks, self.optimizer)
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        return dist_checkpointing.save(
            self._sharded_state(),
            str(checkpoint),
            async_sharded_save=asynchronous,
            async_strategy="mcore",
        )

    def load(self, checkpoint: Path, *, saved_by: Host | None = None) -> None:
        """Read model and optimizer, also of a GPT model into a hybrid one, as Megatron's loop."""
        from megatron.core import dist_checkpointing

        state = self._sharded_state(is_loading=True)
        if self.cell.host == "hybrid" and saved_by == "gpt":
            self._look_in_gpt_checkpoint(state)
        state = dist_checkpointing.load(state, str(checkpoint))
        keys = [key for key in state if key.startswith("model")]
        for key, chunk in zip(sorted(keys), self.chunks, strict=True):
            chunk.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])

    def _look_in_gpt_checkpoint(self, state: dict[str, Any]) -> None:
        """Let the tensors of a hybrid model be looked up by their names in a GPT model."""
        from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop
        from megatron.core.utils import unwrap_model

        (model, *_) = unwrap_model(self.chunks)
        layers = interop.gpt_compatible_layer_maps(model.hybrid_layer_pattern)
        for key, part in state.items():
            if key.startswith(("model", "optimizer")):
                interop.retarget_sharded_state_dict_to_gpt_checkpoint(part, layers)

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
