"""A cell of the grid: a golden run under one parallel layout."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.remoe.testing.golden import RECURRENT_SIZE, Extreme, Host, Padding
from remoe.config import LoadBalancing, Recurrence, RecurrentProjection

RouterKind = Literal[
    "relu", "relu_rms", "relu_l2", "topk", "null_experts", "top_p", "expert_threshold", "hash",
    "expert_choice", "soft", "dense",
]  # fmt: skip

# Changes that many cells share.
FOUR_RANKS = (("nmb", 4),)  # of the golden run, so that every data-parallel rank has micro-batches
DISTRIBUTED: dict[str, Any] = {"distributed_optimizer": True}
# Few weights of the golden run then have a multiple of 128 values. Megatron pads the buckets of the
# distributed optimizer to such multiples.
ODD_SIZES = (("H", 56), ("F", 25))


@dataclass(frozen=True)
class Cell:
    """A parallel layout, and the run to train under it.

    Attributes:
        world, tp, ep, expert_tp, pp, vp: number of ranks, and sizes of the parallel dimensions; the
            remaining dimension is data parallelism. Sequence parallelism is on whenever tp > 1.
        overlap: whether gradient reduction and parameter gathering overlap with computation.
        host: the class of the model. One of Megatron's hybrid models is compared with a GPT model.
        router: a name in `ROUTINGS`, or "dense" for a model without experts. A router that is not
            causal is in a bidirectional model, which sees its labels.
        per_layer: whether every layer has a coefficient of its own.
        recurrence: of the routers.
        recurrent_size: number of values of their state.
        recurrent_projection: whether every layer projects to the state, or all share a matrix.
        experts: our grouped experts, or Megatron's sequential ones.
        routing: an extreme of routing to start from, see `golden.make_extreme`.
        max_assignments: largest number of assignments of a layer that are computed at once. None is
            the automatic limit. Several numbers belong to the experts' data-parallel ranks in turn,
            which then differ in which layers they compute chunk by chunk.
        padding: which tokens are padding, see `golden.padding_mask`.
        per_token_loss: whether to weight micro-batches by their real tokens, instead of equally.
        run: changes to the configuration of the golden run (number of layers, micro-batches, ...).
        reference_run: changes for the run to compare with, if they differ from `run`.
        informational: whether the cell differs by design, so that it is reported and not judged.
        plain: whether to compare with the run in plain torch (`verify.plain`), instead of one rank.
    """

    name: str
    world: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: int = 1
    pp: int = 1
    vp: int | None = None
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    recompute: Literal["none", "full", "moe"] = "none"
    distributed_optimizer: bool = False
    overlap: bool = False
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    host: Host = "gpt"
    router: RouterKind = "relu"
    recurrence: Recurrence = "none"
    recurrent_size: int = RECURRENT_SIZE
    recurrent_projection: RecurrentProjection = "layer"
    load_balancing: LoadBalancing = "aux_loss"
    per_layer: bool = False
    experts: Literal["grouped", "sequential"] = "grouped"
    routing: Extreme | None = None
    max_assignments: int | tuple[int, ...] | None = None
    padding: Padding = "none"
    per_token_loss: bool = False
    run: tuple[tuple[str, Any], ...] = ()
    reference_run: tuple[tuple[str, Any], ...] | None = None
    informational: bool = False
    plain: bool = False

    @property
    def dp(self) -> int:
        """Size of data parallelism."""
        return self.world // (self.tp * self.pp)

    @property
    def overlaps_gather(self) -> bool:
        """Whether parameters are gathered while the next forward pass runs."""
        return self.overlap and self.distributed_optimizer

    def config(self, golden: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration of a golden run with the changes of this cell."""
        return golden | dict(self.run)


def variants(
    cells: list[Cell], prefix: str, names: tuple[str, ...] = (), **changes: Any
) -> list[Cell]:
    """Return changed copies of the cells with these names, or of all cells."""
    chosen = [cell for cell in cells if not names or cell.name in names]
    return [replace(cell, name=f"{prefix}{cell.name}", **changes) for cell in chosen]
