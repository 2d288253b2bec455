"""Dispatch on 1 and 2 ranks against plain loops: nothing is dropped, padded or counted twice."""

import contextlib
import dataclasses

import pytest
import torch

from megatron.remoe.ranks import Ranks
from remoe.config import ROUTINGS, TopKRouting
from tests.mcore import moe_cases
from tests.mcore.moe_cases import Layout

# Shift of the router's weights, and the mean number of active experts per token that it gives, for
# k = 1: a dispatcher that assumes tokens * k assignments fails on all but one of them.
DENSITIES = {"silent": -1e3, "below k": -0.6, "near k": -0.4, "above k": 0.0, "all": 1e3}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def active_per_token(shift: float) -> float:
    router, _, _ = moe_cases.weights(shift)
    return (
        sum((moe_cases.inputs(r) @ router.T > 0).sum(-1).float().mean().item() for r in (0, 1)) / 2
    )


def test_densities_are_what_their_names_say():
    mean = {name: active_per_token(shift) for name, shift in DENSITIES.items()}
    assert mean["silent"] < 0.1 < mean["below k"] < 0.9 < mean["near k"] < 1.1 < mean["above k"]
    assert mean["above k"] < 3 < mean["all"]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "layout",
    [
        Layout("alltoall", ep=2),
        Layout("allgather", ep=2),
        Layout("alltoall"),
        Layout("allgather"),
        Layout("alltoall", ep=2, grouped=False),
        Layout("allgather", ep=2, grouped=False),
    ],
    ids=lambda x: f"{x.dispatcher}-ep{x.ep}-{'grouped' if x.grouped else 'sequential'}",
)
def test_two_ranks_equal_the_reference(ranks, layout, density):
    shift = DENSITIES[density]
    outcomes = ranks.run(moe_cases.run_layer, layout, shift, 0.1)
    for actual, expected in zip(outcomes, moe_cases.expected(2, shift, 0.1), strict=True):
        for field in dataclasses.fields(actual):
            a, b = getattr(actual, field.name), getattr(expected, field.name)
            # fp32 sums in another order: errors are relative to the largest terms
            scale = max(1.0, b.abs().max().item())
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale), field.name


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_forward_asks_no_tensor_for_a_number(ranks, dispatcher):
    """On a GPU each such question makes the host wait; the counts come in one copy."""
    for asked in ranks.run(operations_of_forward, Layout(dispatcher, ep=2)):
        assert asked  # the operations were seen
        assert not [name for name in asked if "_local_scalar_dense" in name]


def operations_of_forward(layout: Layout) -> list[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = moe_cases.build_layer(layout, DENSITIES["above k"])
    x = moe_cases.inputs(torch.distributed.get_rank())
    with Record():
        layer(x)
    return names


def test_megatrons_own_dispatcher_fails_this_comparison(ranks):
    """What the comparison above must catch: a dispatcher that sizes buffers by tokens * k."""
    shift = DENSITIES["above k"]
    with pytest.raises(AssertionError):
        outcomes = ranks.run(run_with_stock_dispatcher, Layout("alltoall", ep=2), shift)
        for actual, expected in zip(outcomes, moe_cases.expected(2, shift, 0.1), strict=True):
            assert torch.allclose(actual, expected.output, rtol=1e-4, atol=1e-4)


def run_with_stock_dispatcher(layout: Layout, shift: float):
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    layer = moe_cases.build_layer(layout, shift)
    layer.token_dispatcher.__class__ = MoEAlltoAllTokenDispatcher
    return layer(moe_cases.inputs(torch.distributed.get_rank()))[0].detach()


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({}, "DroplessMoELayer"),
        ({"moe_expert_capacity_factor": 1.0}, "MoELayer"),
    ],
    ids=["dropless", "capacity"],
)
def test_options_that_need_a_known_count_keep_megatrons_layer(ranks, changes, layer):
    """TopK routing may have them; ReLU routing and the warm-up of TopK refuse them."""
    for found in ranks.run(classes_with_topk, changes):
        assert found == (layer, "CountingTopKRouter")


def classes_with_topk(changes: dict) -> tuple[str, str]:
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(Layout())
    config = moe_cases.transformer_config(Layout(), **changes)
    spec = block_spec(config, TopKRouting()).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    return type(layer).__name__, type(layer.router).__name__


# What Megatron takes from Transformer Engine, and its own code in torch that does the same.
FUSED = {
    "fused_permute": "permute",
    "fused_permute_with_probs": "permute",
    "fused_unpermute": "unpermute",
    "fused_sort_chunks_by_index": "sort_chunks_by_idxs",
    "fused_sort_chunks_by_index_with_probs": "sort_chunks_by_idxs",
    "fused_topk_with_score_function": "topk_routing_with_score_function",
}


@contextlib.contextmanager
def pretended_transformer_engine():
    """Yield the calls of fused functions that stand in for those of Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    calls = []

    def fused(name: str):
        in_torch = getattr(moe_utils, FUSED[name])

        def function(*args, **kwargs):
            calls.append((name, kwargs.get("topk")))
            if name == "fused_permute_with_probs":
                tokens, probs, routing_map = args
                return in_torch(tokens, routing_map, probs, **kwargs)[:3]
            if name == "fused_permute":
                return in_torch(*args, **kwargs)[:3:2]
            if name == "fused_unpermute":
                assert kwargs.pop("merging_probs") is None  # experts have weighted their outputs
            if name == "fused_sort_chunks_by_index":
                return in_torch(*args)[0]
            if name == "fused_sort_chunks_by_index_with_probs":
                rows, probs, sizes, order = args
                return in_torch(rows, sizes, order, probs=probs)
            return in_torch(*args, **kwargs)

        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_utils, "HAVE_TE", True)
        patch.setattr(moe_utils, "is_te_min_version", lambda _: False)
        for name in FUSED:
            patch.setattr(moe_utils, name, fused(name))
        yield calls


def run_fused(layout: Layout, routing, iteration: int = 0, **flags: bool):
    """Run a TopK layer with fused functions: its class, output, gradients, counts, and calls."""
    with pretended_transformer_engine() as calls:
        layer = moe_cases.build_layer(layout, 0.0, routing=routing, **flags)
        layer.router._iteration = lambda: iteration
        outcome = moe_cases.outcome_of(layer, 0.0)
    return type(layer).__name__, outcome, calls


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_topk_takes_the_fused_functions_it_is_given(ranks, dispatcher):
    layout, routing = Layout(dispatcher, ep=2), TopKRouting()
    flags = {"moe_permute_fusion": True, "moe_router_fusion": True}
    plain = ranks.run(run_fused, layout, routing)
    fused = ranks.run(run_fused, layout, routing, **flags)
    used = {"fused_topk_with_score_function", "fused_unpermute"} | (
        {"fused_permute"}
        if dispatcher == "allgather"
        else set(FUSED) - {"fused_permute", "fused_topk_with_score_function"}
    )
    for (own, expected, none), (theirs, actual, calls) in zip(plain, fused, strict=True):
        assert (own, none) == ("DroplessMoELayer", [])
        assert theirs == "MoELayer" and {name for name, _ in calls} == used
        for field in dataclasses.fields(actual):
            a, b = getattr(actual, field.name), getattr(expected, field.name)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), field.name


def test_a_fused_router_warms_up_in_our_layer(ranks):
    """Its k is that of the step, and what it routes is counted."""
    routing = TopKRouting(warmup_steps=3, warmup_topk=3)
    for iteration, k in ((2, 3), (3, 1)):
        for layer, outcome, calls in ranks.run(
            run_fused, Layout(ep=2), routing, iteration, moe_router_fusion=True
        ):
            assert layer == "DroplessMoELayer"
            assert calls == [("fused_topk_with_score_function", k)]
            assert outcome.stats[3:].sum() == k * moe_cases.SEQUENCE * moe_cases.BATCH


@pytest.mark.parametrize("flag", ["moe_permute_fusion", "moe_router_fusion"])
def test_routers_that_cannot_use_a_fused_function_refuse_it_by_name(ranks, flag):
    """With Transformer Engine installed, which would run the flag."""
    routings = {name: routing() for name, routing in ROUTINGS.items()}
    routings["warm-up"] = TopKRouting(warmup_steps=3, warmup_topk=3)
    takes = {"moe_permute_fusion": {"topk"}, "moe_router_fusion": {"topk", "warm-up"}}[flag]
    for messages in ranks.run(refusals, routings, flag):
        assert {name for name, message in messages.items() if message is None} == takes
        assert all(m.startswith(f"{flag} is True, which") for m in messages.values() if m)


def refusals(routings: dict, flag: str) -> dict[str, str | None]:
    """What every router says to the flag when a model is specified; None if it takes it."""
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(Layout())
    found = dict.fromkeys(routings)
    with pretended_transformer_engine():
        config = moe_cases.transformer_config(Layout(), **{flag: True})
        for name, routing in routings.items():
            try:
                block_spec(config, routing, bidirectional=True)
            except ValueError as error:
                found[name] = str(error)
    return found
