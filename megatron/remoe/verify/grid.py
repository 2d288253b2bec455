"""The grid of parallel layouts: each must train the run of one rank, within float tolerance.

The loss, gradient norm, regularizer, sparsity (also per layer) and coefficient of every step are
compared with those of one rank at equal micro-batch size. The run is the closed loop of the golden
files, which crosses its target several times and is insensitive to rounding. The dense stage is
covered by the first steps of a run from the published coefficient 1e-8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron.remoe.testing.cell import DISTRIBUTED, FOUR_RANKS, Cell, variants
from megatron.remoe.testing.cells import run_cell
from megatron.remoe.testing.golden import CLOSED_LOOP, OPEN_LOOP_STEPS, PUBLISHED_COEFF_INIT
from megatron.remoe.verify.runs import Runner, check_all, reference_of
from megatron.remoe.verify.trajectories import TrajectoryComparison, TrajectoryResult, table
from remoe.config import ROUTINGS, Routing, Selection
from remoe.kernels.chunks import UNLIMITED


@dataclass(frozen=True)
class CellResult(TrajectoryResult):
    """The result of a cell, compared with one rank."""

    cell: Cell

    @property
    def name(self) -> str:
        """The name of the cell."""
        return self.cell.name

    @property
    def agrees(self) -> bool:
        """Whether the deviations are within tolerance, or need not be."""
        return self.cell.informational or self.compared.is_within(self.cell.dtype)

    @property
    def praise(self) -> str:
        """The verdict of a cell that passed."""
        return "differs by definition" if self.cell.informational else super().praise


def _layouts() -> list[Cell]:
    return [
        Cell("DP2", 2),
        Cell("EP2 all-to-all", 2, ep=2),
        Cell("EP2 all-gather", 2, ep=2, dispatcher="allgather"),
        Cell("TP2", 2, tp=2),
        Cell("TP2 all-gather, expert TP2", 2, tp=2, expert_tp=2, dispatcher="allgather"),
        Cell("TP2 x EP2 all-to-all", 2, tp=2, ep=2),
        Cell("PP2", 2, pp=2),
        Cell("PP2, 2 virtual stages", 2, pp=2, vp=2, run=(("L", 4),)),
        Cell("PP2, a stage without experts", 2, pp=2, run=(("moe_layer_freq", (0, 1)),)),
        Cell("one rank"),
        Cell("one rank, full recompute", recompute="full"),
        Cell("one rank, MoE recompute", recompute="moe"),
        Cell("EP2, full recompute", 2, ep=2, recompute="full"),
        Cell("EP2, MoE recompute", 2, ep=2, recompute="moe"),
        Cell("DP2, distributed optimizer", 2, **DISTRIBUTED),
        Cell("DP2, overlap", 2, overlap=True, **DISTRIBUTED),
        Cell("EP2, distributed optimizer", 2, ep=2, **DISTRIBUTED),
        Cell("EP2, overlap", 2, ep=2, overlap=True, **DISTRIBUTED),
        Cell("EP2, overlapped reduction, plain optimizer", 2, ep=2, overlap=True),
        Cell("TP2 x EP2, 4 ranks", 4, tp=2, ep=2, run=FOUR_RANKS),
        Cell("DP2 x EP2, 4 ranks", 4, ep=2, run=FOUR_RANKS),
        Cell(
            "TP2 x EP2, expert TP2, all-gather, 4 ranks",
            4, tp=2, ep=2, expert_tp=2, dispatcher="allgather", run=FOUR_RANKS,
        ),
        Cell("PP2 x EP2, 4 ranks", 4, pp=2, ep=2, run=FOUR_RANKS),
        Cell("TP2 x PP2, 4 ranks", 4, tp=2, pp=2, run=FOUR_RANKS),
    ]  # fmt: skip


def grid() -> list[Cell]:
    """Return every cell of the grid.

    These are ReLU routing in fp32, with padding, in bf16, in the dense stage, in chunks and at its
    extremes, TopK routing, gradient accumulation, cells that are compared with plain torch,
    recurrent routers, Soft MoE, and the other routers.
    Experts are grouped; the layouts of ReLU routing run with Megatron's sequential ones as well.
    """
    layouts = _layouts()
    dp2_ep2_tp2 = ("DP2", "EP2 all-to-all", "TP2")
    bf16 = ("one rank", *dp2_ep2_tp2, "PP2", "EP2, distributed optimizer")
    dense_stage = (*dp2_ep2_tp2, "EP2 all-gather", "PP2")
    dense_run = (("coeff_init", PUBLISHED_COEFF_INIT), ("steps", OPEN_LOOP_STEPS))
    padded = (*dp2_ep2_tp2, "TP2 x EP2 all-to-all", "EP2, full recompute")
    # With tensor parallelism, the ranks' parts of a sequence have unequal numbers of real tokens.
    per_token = ("DP2", "TP2", "TP2 x EP2 all-to-all")
    return [
        *layouts,
        *variants(layouts, "sequential: ", experts="sequential"),
        *variants(layouts, "padded: ", padded, padding="ends"),
        *variants(
            layouts, "padded, loss per token: ", per_token, padding="ends", per_token_loss=True
        ),
        *variants(
            layouts, "a micro-batch of padding: ", ("one rank", *dp2_ep2_tp2), padding="micro-batch"
        ),
        *variants(layouts, "TopK: ", router="topk"),
        *variants(layouts, "bf16: ", bf16, dtype="bf16"),
        *variants(layouts, "dense stage: ", dense_stage, run=dense_run),
        *_chunked(layouts),
        *chunked_differently(),
        *extremes(),
        *accumulation(),
        *against_plain_torch(),
        *recurrent(),
        *soft(),
        *routers(),
    ]


# Numbers of steps after which a router makes more of roundings than the tolerances allow.
_STEPS = {
    # A token's only active logit has the same gate however small it is, so that the slope at a tiny
    # one is up to 1000, and roundings grow as fast: on one processor to 1e-5 of the gradient norm
    # in step 4, and to 1e-2 in step 6.
    "relu_rms": 4,
    # Two tokens whose scores differ by one rounding change places among those that an expert
    # chooses (3e-8 of 0.157, in step 25 on one processor). Their gates are far from zero, so that
    # the loss moves by 2e-5 at once. The numbers of assignments stay, so that the comparison does
    # not see the flip, which it allows for in other routers.
    "expert_choice": 20,
}


def routers() -> list[Cell]:
    """Return layouts of every other router, and of the variants of the penalty of ReLU routing."""
    layouts = [
        Cell("DP2", 2),
        Cell("EP2", 2, ep=2),
        Cell("TP2", 2, tp=2),
        Cell("TP2 x EP2", 2, tp=2, ep=2),
        Cell("one rank, full recompute", recompute="full"),
        Cell("TP2, MoE recompute", 2, tp=2, recompute="moe"),
        Cell("EP2, overlap", 2, ep=2, overlap=True, **DISTRIBUTED),
        Cell("PP2, a stage without experts", 2, pp=2, run=(("moe_layer_freq", (0, 1)),)),
    ]
    cells = []
    for name, routing in ROUTINGS.items():
        one = [Cell("one rank"), Cell("TP2", 2, tp=2), Cell("PP2", 2, pp=2)]
        if name in ("relu", "topk", "soft"):
            continue
        ids = issubclass(routing, Selection) and routing.reads == "ids"
        of_one_stage = [cell for cell in layouts if cell.pp == 1 or not ids]
        router: dict[str, Any] = {"router": name}
        if name in _STEPS:
            short = ("steps", _STEPS[name])
            of_one_stage = [replace(c, run=(*c.run, short)) for c in of_one_stage]
            one = [replace(c, run=(short,)) for c in one]
        cells += [
            *variants(of_one_stage, f"router {name}: ", **router),
            *variants(one[:2], f"router {name}, bf16: ", dtype="bf16", **router),
            *variants(one[1:2], f"router {name}, padded: ", padding="ends", **router),
        ]
        if issubclass(routing, Routing):
            cells += variants(one[1:], f"router {name}, recurrent: ", recurrence="gru", **router)
        if routing().varies:
            chunked: dict[str, Any] = {"max_assignments": 64} | router
            ep2 = Cell("EP2", 2, ep=2, run=one[0].run)
            cells += variants([ep2], f"router {name}, chunked: ", **chunked)
    variants_of_relu: dict[str, dict[str, Any]] = {
        "squared load": {"load_balancing": "squared"},
        "load of the step before": {"load_balancing": "global_batch"},
        "a coefficient per layer": {"per_layer": True},
    }
    for name, changes in variants_of_relu.items():
        cells += variants([*layouts[:3], Cell("PP2", 2, pp=2)], f"router relu, {name}: ", **changes)
    # With the load of the step before, micro-batches do not change the algorithm.
    short = ("steps", 12)
    cells += [
        Cell(
            f"router relu, load of the step before: {count} micro-batches",
            load_balancing="global_batch",
            run=(("mbs", 8 // count), ("nmb", count), short),
            reference_run=(("mbs", 8), ("nmb", 1), short),
        )
        for count in (2, 4)
    ]
    return cells


def soft() -> list[Cell]:
    """Return layouts of Soft MoE, whose slots cross the ranks of sequences and of experts."""
    layouts = [
        Cell("DP2", 2),
        Cell("EP2", 2, ep=2),
        Cell("TP2", 2, tp=2),
        Cell("TP2 x EP2", 2, tp=2, ep=2),
        Cell("PP2", 2, pp=2),
        Cell("one rank"),
        Cell("one rank, full recompute", recompute="full"),
        Cell("one rank, MoE recompute", recompute="moe"),
        Cell("TP2, MoE recompute", 2, tp=2, recompute="moe"),
        Cell("EP2, overlap", 2, ep=2, overlap=True, **DISTRIBUTED),
        Cell("TP2 x EP2, 4 ranks", 4, tp=2, ep=2, run=FOUR_RANKS),
        Cell("TP2 x EP4, 4 ranks", 4, tp=2, ep=4, run=FOUR_RANKS),
        Cell("TP4 x EP2, 4 ranks", 4, tp=4, ep=2, run=(("groups", 4),)),
        Cell("half of the layers have experts, PP2", 2, pp=2, run=(("moe_layer_freq", (0, 1)),)),
    ]
    padded = ("DP2", "EP2", "TP2")
    router: dict[str, Any] = {"router": "soft"}
    return [
        *variants(layouts, "soft: ", **router),
        *variants(layouts, "soft, padded: ", padded, padding="ends", **router),
        *variants(
            layouts, "soft, a micro-batch of padding: ", ("DP2", "TP2"),
            padding="micro-batch", **router,
        ),
        *variants(layouts, "soft, bf16: ", ("one rank", "EP2", "TP2"), dtype="bf16", **router),
    ]  # fmt: skip


def recurrent() -> list[Cell]:
    """Return layouts of recurrent routers, whose state crosses layers, ranks and stages."""
    layouts = [
        *_layouts(),
        Cell(
            "PP2, layers without experts between", 2, pp=2,
            run=(("L", 4), ("moe_layer_freq", (1, 0, 0, 1))),
        ),
        Cell("DP2, overlap, full recompute", 2, overlap=True, recompute="full", **DISTRIBUTED),
        Cell("PP2, distributed optimizer, MoE recompute", 2, pp=2, recompute="moe", **DISTRIBUTED),
        Cell(
            "DP2 x PP2, distributed optimizer, 4 ranks", 4, pp=2, run=FOUR_RANKS, **DISTRIBUTED
        ),
    ]  # fmt: skip
    bf16 = ("one rank", "TP2", "PP2", "EP2, distributed optimizer")
    chunked = ("EP2 all-to-all", "PP2", "one rank, MoE recompute")
    padded = ("TP2", "PP2")
    shared = ("EP2, distributed optimizer", "TP2", "PP2, 2 virtual stages")
    plain_torch = ("one rank", "TP2 x EP2 all-to-all", "PP2")
    # A logit of step 38 is within rounding of zero.
    deep = (("L", 4), ("seq", 16), ("steps", 36))
    gru: dict[str, Any] = {"recurrence": "gru"}
    return [
        *variants(layouts, "recurrent: ", **gru),
        *variants(layouts, "recurrent TopK: ", router="topk", **gru),
        *variants(layouts, "recurrent RNN: ", ("TP2", "PP2"), recurrence="rnn"),
        *variants(
            layouts, "recurrent, shared projection: ", shared, recurrent_projection="shared", **gru
        ),
        *variants(layouts, "recurrent, bf16: ", bf16, dtype="bf16", **gru),
        *variants(layouts, "recurrent, chunked: ", chunked, max_assignments=64, **gru),
        *variants(layouts, "recurrent, padded: ", padded, padding="ends", **gru),
        *variants(
            layouts, "recurrent, plain torch: ", plain_torch, plain=True, run=deep, **gru
        ),
    ]  # fmt: skip


def _chunked(layouts: list[Cell]) -> list[Cell]:
    """Return layouts whose layers go chunk by chunk at every density.

    A chunk is a quarter of the assignments of the stable stage.
    """
    all_to_all_and_gather = ("EP2 all-to-all", "EP2 all-gather")
    names = (
        *all_to_all_and_gather, "TP2 x EP2 all-to-all", "PP2", "one rank",
        "TP2 all-gather, expert TP2", "EP2, full recompute", "EP2, MoE recompute",
        "EP2, distributed optimizer", "EP2, overlap",
    )  # fmt: skip
    return [
        *variants(layouts, "chunked: ", names, max_assignments=64),
        *variants(
            layouts, "chunked: sequential, ", all_to_all_and_gather,
            experts="sequential", max_assignments=64,
        ),
    ]  # fmt: skip


def chunked_differently() -> list[Cell]:
    """Return data-parallel layouts in which every other rank chunks all layers, and the rest none.

    With overlapped reduction and buckets as small as an expert, ranks that delivered gradients in
    different orders would sum the gradients of different weights.
    """
    layouts = [
        Cell("DP2, overlapped reduction, plain optimizer", 2, overlap=True),
        Cell("DP2, overlap", 2, overlap=True, **DISTRIBUTED),
        Cell("DP2 x EP2, overlap, 4 ranks", 4, ep=2, overlap=True, run=FOUR_RANKS),
    ]
    limits = (64, UNLIMITED)
    return [
        *variants(layouts, "ranks chunk differently, grouped: ", max_assignments=limits),
        *variants(
            layouts, "ranks chunk differently, sequential: ", max_assignments=limits,
            experts="sequential",
        ),
        # Where decisions are left to the automatic limit, ranks differ from step 8 on.
        *variants(layouts[:1], "sequential: ", experts="sequential"),
    ]  # fmt: skip


def extremes() -> list[Cell]:
    """Return the extremes of routing, through every dispatcher and both optimizers."""
    layouts = [
        Cell("EP2 alltoall", 2, ep=2),
        Cell("EP2 allgather", 2, ep=2, dispatcher="allgather"),
        Cell("EP2 alltoall, distributed optimizer, overlap", 2, ep=2, overlap=True, **DISTRIBUTED),
    ]
    cases: dict[str, dict[str, Any]] = {
        "all experts active": {"routing": "all active"},
        "a silent layer": {"routing": "silent layer"},
        "a silent rank": {"routing": "silent rank"},
        "one expert takes everything": {"routing": "one expert"},
        "128 experts, k = 1": {"run": (("E", 128), ("F", 16))},
        "odd sizes": {"run": (("seq", 37), ("mbs", 3))},
    }
    return [cell for name, case in cases.items() for cell in variants(layouts, f"{name}: ", **case)]


def accumulation() -> list[Cell]:
    """Return runs with the same global batch in 2 or 4 micro-batches, instead of 1.

    Without load weights this is the same algorithm. With them it is not, by definition, because the
    load is counted per micro-batch, as in the published code: the difference is only reported.

    The runs are short. Micro-batches of other sizes round differently, and without load weights the
    closed loop amplifies the first assignment that flips (at step 13 of 40 on some processors).
    """
    short = ("steps", 12)
    return [
        Cell(
            f"{count} micro-batches, load balancing {balancing}",
            load_balancing=balancing,
            run=(("mbs", 8 // count), ("nmb", count), short),
            reference_run=(("mbs", 8), ("nmb", 1), short),
            informational=balancing == "aux_loss",
        )
        for balancing in ("none", "aux_loss")
        for count in (2, 4)
    ]


def against_plain_torch() -> list[Cell]:
    """Return cells to compare with `plain.train`, which shares no code with Megatron or our layers.

    The other cells are compared with one rank of the same code, so that a mistake that every layout
    makes would not show there.
    """
    layouts = [
        Cell("EP2 all-to-all", 2, ep=2, experts="sequential"),
        Cell("TP2 x EP2 all-to-all", 2, tp=2, ep=2),
        Cell("PP2", 2, pp=2),
        Cell("DP2 x EP2, 4 ranks", 4, ep=2, run=FOUR_RANKS),
        Cell("padded, loss per token: TP2", 2, tp=2, padding="ends", per_token_loss=True),
        Cell("a micro-batch of padding: DP2", 2, padding="micro-batch"),
    ]
    # The loops over tokens and experts are slow, so that sequences are short.
    return [
        replace(cell, name=f"plain torch: {cell.name}", plain=True, run=(*cell.run, ("seq", 16)))
        for cell in layouts
    ]


def verify(
    cells: list[Cell],
    *,
    steps: int | None = None,
    report: Callable[[CellResult], None] = lambda result: None,
) -> list[CellResult]:
    """Run cells and compare each with its reference.

    Args:
        cells: the cells.
        steps: largest number of steps of a run; None is all of them, 40 or 60.
        report: called with each result as it is known.
    """

    def steps_of(cell: Cell) -> int:
        whole: int = cell.config(CLOSED_LOOP)["steps"]
        return min(steps or whole, whole)

    def compare(runner: Runner, cell: Cell) -> TrajectoryComparison:
        weights = runner.weights_of(cell)
        expected = runner.uninterrupted(reference_of(cell), steps_of(cell), weights)
        return TrajectoryComparison.of(
            runner.run(run_cell, cell, steps_of(cell), weights), expected
        )

    return check_all(
        sorted(cells, key=lambda cell: cell.world),
        compare,
        lambda cell, **found: CellResult(cell, steps=steps_of(cell), **found),
        report,
    )


def to_markdown(results: list[CellResult]) -> str:
    """Return a table of the largest deviations, with a row per cell."""
    rows = [((r.name, r.cell.world, r.steps), r) for r in results]
    return table(("cell", "ranks", "steps"), rows)
