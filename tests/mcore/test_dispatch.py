"""Dispatch on 1 and 2 ranks against plain loops: nothing is dropped, padded or counted twice."""

import dataclasses

import pytest
import torch

from megatron.remoe.ranks import Ranks
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
    from remoe.config import TopKRouting

    moe_cases.initialize(Layout())
    config = moe_cases.transformer_config(Layout(), **changes)
    spec = block_spec(config, TopKRouting()).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    return type(layer).__name__, type(layer.router).__name__
