"""Chunked experts are the unchunked ones: outputs, every gradient, statistics, on 1 and 2 ranks."""

import dataclasses

import pytest
import torch

from megatron.remoe.verify.ranks import Ranks
from tests.mcore import moe_cases
from tests.mcore.moe_cases import EXPERTS, SEQUENCE, Layout

UNLIMITED = 10**9
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
] + [Layout("allgather", tp=2, expert_tp=2), Layout("alltoall", tp=2, ep=2)]


def ids(x):
    experts = "grouped" if x.grouped else "sequential"
    return f"{x.dispatcher}-ep{x.ep}-tp{x.tp}-etp{x.expert_tp}-{experts}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_chunked_equals_unchunked_on_two_ranks(ranks, layout, limit):
    for shift in (0.0, DENSE):
        chunked = ranks.run(run, layout, shift, limit)
        expected = ranks.run(run, layout, shift, UNLIMITED)
        for (a, chunks), (b, none) in zip(chunked, expected, strict=True):
            assert none == 0 < chunks
            same(a, b)
        if layout.ep * layout.expert_tp > 1:  # nobody waits for ever
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
    planned, plan = [], layer._plan
    layer._plan = lambda routing_map: planned.append(plan(routing_map)) or planned[-1]
    return moe_cases.outcome_of(layer, shift), len(planned[-1])


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
    planned, plan = [], layer._plan
    layer._plan = lambda routing_map: planned.append(plan(routing_map)) or planned[-1]
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
    calls = [0] * len(weights)

    def count(i):
        calls[i] += 1

    nodes = []  # as DDP: hooks on the accumulators, which must be kept alive
    for i, w in enumerate(weights):
        w.grad, w.grad_added_to_main_grad = None, False
        w.main_grad = torch.ones_like(w, dtype=dtype)
        nodes.append(w.expand_as(w).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *_, i=i: count(i))
    layer(x)[0].sum().backward()
    return (
        calls,
        [w.grad_added_to_main_grad for w in weights],
        [w.main_grad for w in weights],
        expected,
    )


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
    assert rank(run, Layout(), DENSE, None)[1] == EXPERTS  # topk per token: an expert at a time
    assert rank(run, Layout(), -0.4, None)[1] == 0
    assert SEQUENCE * moe_cases.BATCH == 16
