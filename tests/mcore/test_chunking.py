"""Chunked experts are the unchunked ones: outputs, every gradient, statistics, on 1 and 2 ranks."""

import dataclasses

import pytest
import torch

from megatron.remoe.ranks import Ranks
from remoe.kernels.chunks import UNLIMITED
from tests.mcore import moe_cases
from tests.mcore.moe_cases import EXPERTS, Layout

DENSE = 1e3  # shift of the router's weights: nearly all experts for nearly all tokens
LIMITS = {"parts of an expert": 5, "an expert": 16, "two experts": 40}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield lambda function, *args, **kwargs: ranks.run(function, *args, **kwargs)[0]


def same(actual, expected):
    for field in dataclasses.fields(expected):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        # fp32 sums in another order: errors are relative to the largest terms
        scale = max(1.0, b.abs().max().item())
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale), field.name


LAYOUTS = [
    Layout(dispatcher, ep=ep, grouped=grouped)
    for dispatcher in ("alltoall", "allgather")
    for ep in (1, 2)
    for grouped in (True, False)
] + [Layout("alltoall", tp=2, ep=2)]


def ids(x):
    experts = "grouped" if x.grouped else "sequential"
    return f"{x.dispatcher}-ep{x.ep}-tp{x.tp}-{experts}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_chunked_equals_unchunked_on_two_ranks(ranks, layout, limit):
    for shift in (0.0, DENSE):
        chunked = ranks.run(run, layout, shift, limit)
        expected = ranks.run(run, layout, shift, UNLIMITED)
        for (a, chunks), (b, none) in zip(chunked, expected, strict=True):
            assert none == 0
            assert chunks > 0 or shift < DENSE
            same(a, b)
        if layout.ep > 1:  # nobody waits for ever
            assert len({chunks for _, chunks in chunked}) == 1


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("recompute", [None, "moe"])
def test_chunked_equals_the_reference_on_one_rank(rank, grouped, recompute):
    changes = {}
    if recompute:
        changes = {"recompute_granularity": "selective", "recompute_modules": [recompute]}
    for limit in LIMITS.values():
        actual, chunks = rank(run, Layout(grouped=grouped), DENSE, limit, **changes)
        assert chunks > 0
        same(actual, moe_cases.expected(1, DENSE, 0.1)[0])


def run(layout, shift, limit, **changes):
    """Outcome of the layer, and the number of chunks of its last forward."""
    layer = moe_cases.build_layer(layout, shift, 0.1, max_assignments=limit, **changes)
    planned = plans_of(layer)
    return moe_cases.outcome_of(layer, shift), len(planned[-1])


def plans_of(layer):
    """The chunks of every forward from now on."""
    planned, plan = [], layer.chunked.plan
    layer.chunked.plan = lambda *args: planned.append(plan(*args)) or planned[-1]
    return planned


def test_chunks_copy_no_more_counts_to_the_host(rank):
    """One copy plans them, and another one counts those of some tokens; backward needs none."""
    assert rank(copies_of_counts, Layout(), 20) == (1, 1)
    assert rank(copies_of_counts, Layout(), 5) == (2, 2)  # tokens are split
    assert rank(copies_of_counts, Layout("allgather"), 5) == (2, 2)


def copies_of_counts(layout, limit):
    """Copies after forward and after backward."""
    from megatron.remoe.moe.dispatcher import CountsAssignments

    layer = moe_cases.build_layer(layout, DENSE, max_assignments=limit)
    copies, gather = [], CountsAssignments.of_all_ranks
    CountsAssignments.of_all_ranks = lambda self, n: copies.append(n) or gather(self, n)
    try:
        output = layer(moe_cases.inputs(0).requires_grad_())[0]
        forward = len(copies)
        output.sum().backward()
    finally:
        CountsAssignments.of_all_ranks = gather
    return forward, len(copies)


def test_ranks_of_different_density_run_the_same_chunks(ranks):
    """One rank's tokens activate everything, the other's nothing."""
    for uneven in (uneven_ranks_all_to_all, uneven_ranks_all_gather):
        chunks, finite = zip(*ranks.run(uneven), strict=True)
        assert chunks[0] == chunks[1] > 1
        assert all(finite)


def uneven_ranks_all_to_all():
    return uneven(Layout("alltoall", ep=2))


def uneven_ranks_all_gather():
    return uneven(Layout("allgather", ep=2))


def uneven(layout):
    layer = moe_cases.build_layer(layout, DENSE, max_assignments=20)
    sign = 1 if torch.distributed.get_rank() == 0 else -1
    x = (sign * moe_cases.inputs(0).abs()).requires_grad_()
    planned = plans_of(layer)
    layer(x)[0].sum().backward()
    return len(planned[-1]), bool(x.grad.isfinite().all())


@pytest.mark.parametrize("grouped", [True, False])
def test_every_weight_gets_its_gradient_once(rank, grouped):
    """DDP reduces a bucket when the hooks of its weights have run."""
    for dtype in (torch.float32, torch.float64):
        calls, flags, main, expected = rank(gradients_by_hook, Layout(grouped=grouped), dtype)
        assert calls == [1] * len(main)
        assert all(flags)
        for a, b in zip(main, expected, strict=True):
            assert torch.allclose(a.float(), b + 1, rtol=1e-5, atol=1e-4)


def gradients_by_hook(layout, dtype):
    layer = moe_cases.build_layer(layout, DENSE, max_assignments=5)
    x = moe_cases.inputs(0)
    weights = list(layer.experts.parameters())
    layer(x)[0].sum().backward()
    expected = [w.grad for w in weights]
    calls = dict.fromkeys(weights, 0)

    def count(weight):
        calls[weight] += 1

    nodes = as_ddp(weights, dtype, 1.0, count)
    layer(x)[0].sum().backward()
    del nodes
    return (
        list(calls.values()),
        [w.grad_added_to_main_grad for w in weights],
        [w.main_grad for w in weights],
        expected,
    )


def as_ddp(weights, dtype, start, hook):
    """Main gradients, and hooks on the accumulators, which live as long as what is returned."""
    nodes = []
    for w in weights:
        w.grad, w.grad_added_to_main_grad = None, False
        w.main_grad = torch.full_like(w, start, dtype=dtype)
        nodes.append(w.expand_as(w).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *_, w=w: hook(w))
    return nodes


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_of_which_one_is_chunked_lose_no_gradient(rank, grouped, dtype):
    """Both forwards first, as on a pipeline stage; main gradients may be of another dtype."""
    main, expected = rank(mixed_micro_batches, Layout(grouped=grouped), dtype)
    for a, b in zip(main, expected, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def mixed_micro_batches(layout, dtype):
    few = 2 * EXPERTS
    layer = moe_cases.build_layer(layout, DENSE, max_assignments=few)
    x = moe_cases.inputs(0).abs()
    micro_batches = [x, x[:1], x, x[:1]]
    weights = list(layer.experts.parameters())
    for micro_batch in micro_batches:
        layer(micro_batch)[0].sum().backward()
    expected = [w.grad.clone() for w in weights]

    def add(weight):  # what DDP's hook does
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    nodes = as_ddp(weights, dtype, 0.0, add)
    planned = plans_of(layer)
    for first, second in (micro_batches[:2], micro_batches[2:]):
        outputs = [layer(first)[0], layer(second)[0]]
        for output in outputs:
            output.sum().backward()
    del nodes
    assert [bool(chunks) for chunks in planned] == [True, False, True, False]
    return [w.main_grad for w in weights], expected


ORDERS = {
    "grouped": (True, {}),
    "sequential": (False, {}),
    "sequential, shared experts": (False, {"moe_shared_expert_intermediate_size": 6}),
    "sequential, overlapped shared experts": (
        False,
        {"moe_shared_expert_intermediate_size": 6, "moe_shared_expert_overlap": True},
    ),
}


@pytest.mark.parametrize(("grouped", "changes"), ORDERS.values(), ids=ORDERS)
def test_gradients_arrive_in_one_order_whether_chunked_or_not(rank, grouped, changes):
    """DDP reduces buckets as gradients arrive, and ranks decide for themselves what is chunked."""
    at_once, chunked, by_expert, silent = rank(orders_of_gradients, grouped, changes)
    names = [name for name in at_once if name.startswith("experts.")]
    assert len(at_once) == len(set(at_once)) and len(names) == (2 if grouped else 2 * EXPERTS)
    assert at_once == chunked == by_expert == silent


def orders_of_gradients(grouped, changes):
    """Names of the parameters as their gradients arrive: at once, and in chunks of two sizes."""
    orders = []
    for shift, limit in ((DENSE, UNLIMITED), (DENSE, 5), (DENSE, 16), (-DENSE, UNLIMITED)):
        layer = moe_cases.build_layer(
            Layout(grouped=grouped), shift, max_assignments=limit, **changes
        )
        orders.append([])
        for name, weight in layer.named_parameters():
            weight.register_post_accumulate_grad_hook(
                lambda _, name=name, order=orders[-1]: order.append(name)
            )
        layer(moe_cases.inputs(0).abs())[0].sum().backward()
    return orders


def test_shared_experts_are_added_once(rank):
    for overlap in (False, True):
        actual, expected = rank(with_shared_experts, overlap)
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-3)


def with_shared_experts(overlap):
    changes = {"moe_shared_expert_intermediate_size": 6, "moe_shared_expert_overlap": overlap}
    outputs = []
    for limit in (5, UNLIMITED):
        layer = moe_cases.build_layer(Layout(), DENSE, max_assignments=limit, **changes)
        outputs.append(layer(moe_cases.inputs(0))[0].detach())
    return outputs


def test_by_default_dense_layers_are_chunked_and_sparse_ones_are_not(rank):
    # A third of topk per token at a time: each expert, which has all tokens, in three parts.
    assert rank(run, Layout(), DENSE, None)[1] == 3 * EXPERTS
    assert rank(run, Layout(), -0.4, None)[1] == 0


def test_layers_share_a_budget():
    """One dense layer may be held where the others need little; only the present forward counts."""
    from remoe.kernels.chunks import AssignmentBudget

    budget = AssignmentBudget(num_layers=4)
    stable = [3.4, 0.3, 0.2, 0.1]
    assert [budget.max_rows_per_chunk(i, 30 * r, 30) for i, r in enumerate(stable, 1)] == [None] * 4
    for _ in range(2):  # 4 layers of 1.25, less a chunk's room, hold one layer of 4
        warm_up = [budget.max_rows_per_chunk(i, 120, 30) for i in range(1, 5)]
        assert warm_up == [None, 10, 10, 10]
    assert [budget.max_rows_per_chunk(i, 30 * 64, 30) for i in range(1, 5)] == [10] * 4
    with torch.no_grad():  # nothing is kept, so that every layer counts alone
        assert [budget.max_rows_per_chunk(i, r, 30) for i, r in ((1, 37), (2, 38))] == [None, 10]


@pytest.mark.parametrize(
    ("recompute", "held", "held_of_letters"),
    [({}, 6, 3), ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, 1, 1),
     ({"recompute_granularity": "full", "recompute_method": "uniform",
       "recompute_num_layers": 2}, 2, 1),
     ({"recompute_granularity": "full", "recompute_method": "block",
       "recompute_num_layers": 2}, 4, 2)],
)  # fmt: skip
def test_the_budget_is_of_layers_that_are_held_together(recompute, held, held_of_letters):
    """Those are layers of a GPT model, or letters of `*E*E*E`."""
    from megatron.remoe.moe.chunking import budget_of

    config = moe_cases.transformer_config(Layout(), **recompute)
    assert budget_of(config, [True] * 6, None).num_layers == held
    assert budget_of(config, [False, True] * 3, None).num_layers == held_of_letters


def test_experts_that_cannot_be_split_are_refused_with_a_limit(rank):
    assert rank(refusal, 5).startswith("moe_relu_max_assignments is 5, but SequentialMLP cannot")
    assert rank(refusal, None) is None  # at once, as before


def refusal(limit):
    from megatron.remoe.moe import chunking, experts

    chunking.in_parts = lambda experts, config: None
    try:
        built = moe_cases.build_layer(Layout(grouped=False), 0.0, max_assignments=limit)
    except ValueError as error:
        return str(error)
    finally:
        chunking.in_parts = experts.in_parts
    assert built.chunked is None
    return None


# A model whose experts' activations are what memory goes to: E=128, k=1, T=1024 tokens. At once,
# half of the experts keep 1024 x 64 rows x (H + 2F) x 4 bytes in each of two layers, 100 MB.
MANY_EXPERTS = {"E": 128, "H": 64, "F": 64, "seq": 256, "mbs": 4, "nmb": 1, "steps": 40}
LIMIT_MB = 110  # with gradients and optimizer states of 13 million weights


@pytest.mark.processes
def test_warm_up_of_128_experts_passes_in_a_memory_that_is_too_small_at_once():
    outcomes = {}
    for name, limit in (("chunked", None), ("at once", UNLIMITED)):
        with Ranks(1) as ranks:
            outcomes[name] = ranks.run(warm_up, limit, LIMIT_MB)[0]
    sparsity, error = outcomes["chunked"]
    assert error is None, error
    assert sparsity[0] < 0.6
    assert sparsity[-1] >= 1 - 1 / 128
    sparsity, error = outcomes["at once"]
    assert "alloc" in error and len(sparsity) == 0


def warm_up(max_assignments, limit_mb):
    """Sparsity of the steps until the target is reached, with so much memory beside the model."""
    import resource
    from pathlib import Path

    from megatron.remoe.testing import cells
    from megatron.remoe.testing.golden import CLOSED_LOOP, golden_tokens

    cell = cells.Cell("one rank", max_assignments=max_assignments)
    config = CLOSED_LOOP | MANY_EXPERTS
    cells.initialize(cell)
    torch.manual_seed(1)
    training = cells.Training(cell, config, None)
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit_mb * 2**20, hard))
    sparsity = []
    try:
        for batch in golden_tokens(config):
            sparsity.append(training.step(batch)["sparsity"])
            if sparsity[-1] >= 1 - 1 / 128:
                break
    except (RuntimeError, MemoryError) as error:
        return sparsity, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, hard))
    return sparsity, None
