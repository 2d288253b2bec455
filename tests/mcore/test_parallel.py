"""The 2-rank cells of `remoe verify parallel`, for a few steps, and what they would catch.

The whole grid, with 4 ranks and all steps, is `remoe verify parallel`.
"""

import re
from types import SimpleNamespace

import pytest
import torch

from megatron.remoe import compat
from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.cells import Training, initialize, run_cell, save_golden_weights
from megatron.remoe.testing.golden import CLOSED_LOOP, golden_tokens
from megatron.remoe.verify import grid
from megatron.remoe.verify.trajectories import FP32, TrajectoryComparison, deviations

STEPS = 4
RECURRENT = (
    ": TP2", ": TP2 x EP2 all-to-all", ": PP2", ": PP2, 2 virtual stages",
    ": PP2, a stage without experts", ": PP2, distributed optimizer, MoE recompute", " TopK: TP2",
    ", chunked: PP2", ", padded: TP2", ", plain torch: TP2 x EP2 all-to-all", ", plain torch: PP2",
)  # fmt: skip
SOFT = (": DP2", ": TP2 x EP2", ": PP2", ": TP2, MoE recompute", ": EP2, overlap", ", padded: TP2")
HYBRID = (
    ": TP2 x EP2 all-to-all", ": PP2", ": PP2, a stage without experts", ", router soft: TP2",
    ", recurrent: TP2 x EP2 all-to-all", ", dense: TP2", ", chunked: EP2, full recompute",
    ", padded: TP2 x EP2 all-to-all",
)  # fmt: skip
ROUTERS = ": TP2 x EP2"
SUBSET = [
    *[c for c in grid.grid() if c.world <= 2 and re.match(r"(DP|EP|TP|PP|one rank)", c.name)],
    *[c for c in grid.grid() if c.name in ("TopK: EP2 all-to-all", "TopK: TP2", "bf16: TP2")],
    *[c for c in grid.extremes() if c.name.endswith("alltoall")],
    *[c for c in grid.extremes() if c.name.startswith("a silent rank") and c.overlap],
    *[c for c in grid.accumulation() if c.name.startswith("2")],
    *[c for c in grid.grid() if c.name in ("chunked: EP2 all-gather", "chunked: EP2, overlap")],
    *[
        c
        for c in grid.grid()
        if c.name in ("padded, loss per token: TP2", "a micro-batch of padding: DP2")
    ],
    *[c for c in grid.against_plain_torch() if c.world <= 2],
    *[c for c in grid.chunked_differently() if c.world <= 2 and "differently" in c.name],
    *[c for c in grid.recurrent() if c.name.removeprefix("recurrent") in RECURRENT],
    *[c for c in grid.soft() if c.name.removeprefix("soft") in SOFT],
    *[c for c in grid.hybrid() if c.name.removeprefix("hybrid") in HYBRID],
    *[c for c in grid.routers() if c.name.endswith(ROUTERS) and c.router != "relu"],
    *[c for c in grid.routers() if c.name.endswith("step before: TP2")],
    *[c for c in grid.routers() if c.name == "router expert_threshold, padded: TP2"],
]


@pytest.fixture(scope="module")
def results():
    return {result.cell.name: result for result in grid.verify(SUBSET, steps=STEPS)}


@pytest.mark.processes
@pytest.mark.parametrize("name", [cell.name for cell in SUBSET])
def test_cell_trains_the_run_of_one_rank(results, name):
    result = results[name]
    assert result.error is None
    assert result.ok, result.deviations
    assert result.steps == STEPS


@pytest.mark.processes
def test_cells_compare_every_quantity(results):
    for result in results.values():
        name, expected = result.cell.router, {"lm_loss", "grad_norm"}
        if name not in ("topk", "soft", "dense"):
            expected |= {"sparsity", "sparsity_per_layer", "most_active"}
        if name.startswith("relu"):
            expected |= {"l1_reg", "l1_coeff_used"}
        elif name in ("top_p", "expert_threshold"):
            expected |= {"level"}
        assert set(result.deviations) == expected


@pytest.mark.processes
def test_replicas_that_differ_are_named(tmp_path):
    """A weight that one data-parallel rank changes by itself is named, whatever the losses are."""
    with Ranks(2) as ranks:
        assert ranks.run(replicas_after, None) == [[], []]
        name = "decoder.layers.1.mlp.experts.linear_fc1"
        assert ranks.run(replicas_after, name) == [[], [name]]


def replicas_after(changed):
    cell = Cell("DP2", 2)
    initialize(cell)
    torch.manual_seed(1)
    training = Training(cell, CLOSED_LOOP, None)
    if changed is not None and torch.distributed.get_rank() == 1:
        with torch.no_grad():
            training.chunks[0].module.get_parameter(changed)[0, 0, 0] += 1
    return training.replicas_that_differ()


@pytest.mark.processes
def test_a_later_stage_gets_its_part_of_the_padding():
    """The cells with such a stage and padding, `padded: TP2 x PP2, 4 ranks`, need four ranks."""
    with Ranks(2) as ranks:
        assert ranks.run(padding_of_a_later_stage) == [
            ([[False, True]], [[True, True]]),
            ([[True, False]], [[True, True]]),
        ]


def padding_of_a_later_stage():
    """Return the masks that its layers see of whole sequences, and of a part of them."""

    class Stage(torch.nn.Module):
        pre_process = False
        input_tensor = torch.zeros(2, 1, 8)  # [s / 2, b, h]

        def forward(self, hidden_states, padding_mask):
            return padding_mask

    initialize(Cell("TP2", 2, tp=2))
    stage = Stage()
    model = SimpleNamespace(decoder=stage, config=SimpleNamespace(sequence_parallel=True))
    compat.split_padding([model])
    masks = [[False, True, True, False]], [[True, True]]
    return tuple(
        stage(hidden_states=None, padding_mask=torch.tensor(mask)).tolist() for mask in masks
    )


@pytest.mark.processes
def test_a_skipped_step_of_fp16_moves_the_coefficient():
    """As in the published code, the sparsity of the step was measured, although no weight moved."""
    with Ranks(1) as ranks:
        coeffs, moved = ranks.run(steps_in_fp16)[0]
    assert moved == [False, False]
    assert coeffs[1] == pytest.approx(coeffs[0] * 1.2, rel=1e-6)


def steps_in_fp16():
    """Return coefficients of two steps, and whether weights moved; the loss scale overflows."""
    config = CLOSED_LOOP | {"seq": 16}
    cell = Cell("fp16", dtype="fp16")
    initialize(cell)
    torch.manual_seed(1)
    training = Training(cell, config, None)
    weights = list(training.chunks[0].parameters())
    coeffs, moved = [], []
    for batch in golden_tokens(config)[:2]:
        before = [weight.detach().clone() for weight in weights]
        coeffs.append(training.step(batch)["l1_coeff_used"])
        pairs = zip(before, weights, strict=True)
        moved.append(any(not torch.equal(a, b) for a, b in pairs))
    return coeffs, moved


@pytest.mark.processes
def test_load_weights_per_micro_batch_are_another_algorithm(results):
    same = results["2 micro-batches, load balancing none"]
    other = results["2 micro-batches, load balancing aux_loss"]
    assert other.verdict == "differs by definition"
    assert other.deviations["l1_reg"] > 10 * same.deviations["l1_reg"]


@pytest.mark.processes
def test_extremes_are_what_their_names_say(tmp_path):
    with Ranks(1) as ranks:
        measured = {
            cell.routing: ranks.run(first_step, cell, tmp_path / str(i))[0]
            for i, cell in enumerate(
                Cell("one rank", routing=extreme)
                for extreme in ("all active", "silent layer", "silent rank", "one expert")
            )
        }
    assert measured["all active"]["sparsity_per_layer"] == [0, 0]
    assert measured["silent layer"]["sparsity_per_layer"][0] == 1
    assert measured["silent layer"]["sparsity_per_layer"][1] < 0.7
    assert all(0.5 <= s < 1 for s in measured["silent rank"]["sparsity_per_layer"])
    assert all(0.875 <= s < 1 for s in measured["one expert"]["sparsity_per_layer"])


def first_step(cell, weights):
    save_golden_weights(cell, CLOSED_LOOP, weights)
    return run_cell(cell, CLOSED_LOOP, 1, weights)[0]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Return initial weights, and a trajectory of one rank in which every mutation shows."""
    weights = tmp_path_factory.mktemp("golden") / "weights"
    with Ranks(1) as ranks:
        ranks.run(save_golden_weights, Cell("one rank"), CLOSED_LOOP, weights)
        return weights, ranks.run(run_cell, Cell("one rank"), CLOSED_LOOP, 8, weights)[0]


@pytest.mark.parametrize(
    ("mutation", "quantity"),
    [
        ("statistics of one rank only", "sparsity"),
        ("load of one rank only", "l1_reg"),
        ("norm gradients of one rank only", "lm_loss"),
        ("most experts of a token over pipeline stages only", "most_active"),
    ],
)
def test_a_dropped_reduction_is_caught(one_rank, mutation, quantity):
    """The comparison of a TP2 run with one rank fails for code that forgets a reduction."""
    weights, expected = one_rank
    with Ranks(2) as ranks:
        actual = ranks.run(run_mutated, mutation, Cell("TP2", 2, tp=2), weights)[0]
    assert deviations(actual, expected)[quantity] > 2 * FP32[quantity]


def run_mutated(mutation, cell, weights):
    from megatron.remoe.moe import backend, router
    from megatron.remoe.train import step

    if mutation == "statistics of one rank only":
        step.torch = _WithoutAllReduce(torch)
    elif mutation == "load of one rank only":
        router.torch = _WithoutAllReduce(torch)
    elif mutation == "most experts of a token over pipeline stages only":
        step.torch = _WithoutAllReduce(torch, op=torch.distributed.ReduceOp.MAX)
    else:
        norm = backend.torch_norm

        def unmarked(**kwargs):
            module = norm(**kwargs)
            module.weight.sequence_parallel = False
            return module

        backend.torch_norm = unmarked
    initialize(cell)
    training = Training(cell, CLOSED_LOOP, weights)
    return [training.step(batch) for batch in golden_tokens(CLOSED_LOOP)[:8]]


@pytest.mark.processes
@pytest.mark.parametrize("mutation", ["tensor", "pipeline", "state"])
def test_a_recurrent_router_that_forgets_a_sum_or_the_state_is_caught(tmp_path, mutation):
    """That is the sum of the cell's gradients over tensor ranks, or over pipeline stages."""
    one = Cell("one rank", recurrence="gru")
    layout = {"tp": 2} if mutation == "tensor" else {"pp": 2}
    with Ranks(1) as ranks:
        ranks.run(save_golden_weights, one, CLOSED_LOOP, tmp_path / "weights")
        expected = ranks.run(run_cell, one, CLOSED_LOOP, 8, tmp_path / "weights")[0]
    with Ranks(2) as ranks:
        cell = Cell("two ranks", 2, recurrence="gru", **layout)
        trained = ranks.run(run_recurrent, mutation, cell, tmp_path / "weights")
        actual = next(t for t in trained if "lm_loss" in t[0])
    assert deviations(actual, expected)["l1_reg"] > 2 * FP32["l1_reg"]


def run_recurrent(mutation, cell, weights):
    from megatron.remoe.moe import recurrent, shared_cell

    if mutation == "pipeline":
        shared_cell.SharedCells.sum_gradients = lambda self, models: None
    elif mutation == "state":
        recurrent.passed_on = lambda state, passing: None
    initialize(cell)
    training = Training(cell, CLOSED_LOOP, weights)
    if mutation == "tensor":
        for parameter in training.chunks[0].module.decoder.recurrent_cell.parameters():
            parameter.sequence_parallel = False
    return [training.step(batch) for batch in golden_tokens(CLOSED_LOOP)[:8]]


class _WithoutAllReduce:
    """A torch whose distributed.all_reduce does nothing, or nothing for one operation."""

    def __init__(self, module, op=None):
        self._module, self._op = module, op
        self.distributed = self

    def all_reduce(self, *args, **kwargs):
        if self._op is not None and kwargs.get("op") != self._op:
            self._module.distributed.all_reduce(*args, **kwargs)

    def __getattr__(self, name):
        part = self._module if hasattr(self._module, name) else self._module.distributed
        return getattr(part, name)


def test_the_grid_covers_what_it_claims():
    cells = {cell.name: cell for cell in grid.grid()}
    assert len(cells) == len(grid.grid())
    assert {cell.world for cell in cells.values()} == {1, 2, 4}
    for part in (
        "TopK: ",
        "soft: ",
        "bf16: ",
        "dense stage: ",
        "virtual stages",
        "recompute",
        "overlap",
    ):
        assert any(part in name for name in cells), part
    assert {c.routing for c in cells.values()} >= {"all active", "silent layer", "silent rank"}


def test_a_flip_loosens_what_load_weights_move_and_only_from_its_step_on():
    """One more assignment changes the load, which weights the penalty, discontinuously."""

    def step(l1_reg=1.0, sparsity=0.5, loss=2.0):
        whole = {"lm_loss": loss, "grad_norm": 1.0, "l1_reg": l1_reg, "l1_coeff_used": 1.0}
        whole |= {"sparsity": sparsity, "sparsity_per_layer": [sparsity], "most_active": [4]}
        return whole

    one_rank = [step(), step(), step()]
    flipped = step(l1_reg=1.005, sparsity=0.5001)
    after = TrajectoryComparison.of([step(), flipped, step(l1_reg=1.005)], one_rank)
    assert (after.is_within("fp32"), after.flipped) == (True, 2)
    assert not TrajectoryComparison.of([step(l1_reg=1.005), flipped, step()], one_rank).is_within(
        "fp32"
    )
    assert not TrajectoryComparison.of([step(), step(l1_reg=1.005), step()], one_rank).is_within(
        "fp32"
    )
    assert not TrajectoryComparison.of([step(), flipped, step(loss=2.1)], one_rank).is_within(
        "fp32"
    )
    assert not TrajectoryComparison.of([step(), step(sparsity=0.51), step()], one_rank).is_within(
        "fp32"
    )
