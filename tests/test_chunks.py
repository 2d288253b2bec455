"""Chunks of experts without Megatron: the plan, and equality with all experts at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty
from remoe.kernels import plan_chunks
from remoe.layer import routed_experts
from tests.test_kernels import ROUTINGS, TOLERANCES, assert_close, case, outputs_and_gradients


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    st.floats(0.5, 80),
)
def test_every_expert_and_token_is_in_one_chunk_that_is_not_too_large(rows, limit):
    chunks = plan_chunks(rows, limit)
    tokens = 50
    seen = torch.zeros(len(rows), tokens, dtype=torch.int64)
    for chunk in chunks:
        seen[chunk.experts, chunk.tokens(tokens)] += 1
        assert sum(rows[chunk.experts]) / chunk.parts <= limit
        busy = sum(count > 0 for count in rows[chunk.experts])
        assert chunk.parts == 1 or busy == 1, "tokens are split for one expert only"
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("limit", [1, 4, 14, 30])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_chunked_equals_all_at_once(routing, limit, dtype):
    inputs, routing_map, direction = case(routing, dtype)

    def chunked(x, probs, gate_up, down):
        return routed_experts(x, probs, routing_map, gate_up, down, max_assignments=limit)

    def at_once(x, probs, gate_up, down):
        return routed_experts(x, probs, routing_map, gate_up, down)

    actual = outputs_and_gradients(chunked, inputs, direction)
    expected = outputs_and_gradients(at_once, inputs, direction)
    assert_close(actual, expected, TOLERANCES[dtype])


def test_autocast_is_that_of_forward():
    inputs, routing_map, direction = case("all active", torch.float32)

    def run(limit):
        def forward(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                x, probs, gate_up, down = inputs
                return routed_experts(x, probs, routing_map, gate_up, down, max_assignments=limit)

        return outputs_and_gradients(forward, inputs, direction.bfloat16())

    chunked, expected = run(14), run(None)
    assert [t.dtype for t in chunked] == [t.dtype for t in expected]
    assert_close(chunked, expected, TOLERANCES[torch.bfloat16])


def test_frozen_weights_get_no_gradient():
    (x, probs, gate_up, down), routing_map, direction = case("all active", torch.float32)
    gate_up, down = gate_up.detach(), down.detach()
    y = routed_experts(x, probs, routing_map, gate_up, down, max_assignments=14)
    (y * direction).sum().backward()
    expected = routed_experts(x, probs, routing_map, gate_up, down)
    grad = torch.autograd.grad((expected * direction).sum(), x)[0]
    assert torch.allclose(x.grad, grad, rtol=1e-4, atol=1e-4)
    assert gate_up.grad is None


def kept_for_backward(max_assignments):
    """Numbers that autograd holds after the forward of a dense layer, beside weights and input."""
    torch.manual_seed(0)
    config = ReMoELayerConfig(
        hidden_size=8, ffn_hidden_size=16, num_experts=16, max_assignments=max_assignments
    )
    layer = ReMoELayer(config)
    with torch.no_grad():
        layer.router.fill_(1.0)
    x = (torch.randn(32, 8) + 10).requires_grad_()
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    others = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    (y.sum() + l1_penalty(layer)).backward()
    return sum(size for pointer, size in sizes.items() if pointer not in others)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_dense_layer_keeps_its_arguments_only(limit):
    assert kept_for_backward(limit) < kept_for_backward(10**9) / 5
