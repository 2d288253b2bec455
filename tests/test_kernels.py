"""Permutation and grouped experts against plain loops: outputs and every gradient."""

import pytest
import torch

from remoe import ReMoELayer, ReMoELayerConfig
from remoe.kernels import (
    Permutation,
    combine,
    experts,
    grouped_swiglu,
    permute,
    routed_swiglu,
    swiglu,
)
from remoe.layer import routed_experts
from remoe.reference import reference_moe

HIDDEN, WIDTH, EXPERTS = 16, 24, 4
# Of experts: name, and the tokens (of 13) that activate each.
ROUTINGS = {
    "mixed": [[0, 1, 2, 5], [2, 3, 12], [], [1, 2, 3, 4, 6]],
    "all active": [list(range(13))] * 4,
    "none active": [[], [], [], []],
    "one expert": [[], [], list(range(13)), []],
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
]
# fp64 and fp32: sums in another order. bf16: values of size 1 to 10 with 8 bits, rounded at each of
# the three products, where the reference rounds at other places.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-2}


def case(routing, dtype, device="cpu", tokens=13):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    routing_map = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    for expert, active in enumerate(ROUTINGS[routing]):
        routing_map[active, expert] = True
    x, gate_up, down = (
        randn(tokens, HIDDEN),
        randn(EXPERTS, 2 * WIDTH, HIDDEN),
        randn(EXPERTS, HIDDEN, WIDTH),
    )
    probs = (torch.rand(tokens, EXPERTS, generator=generator) + 0.1) * routing_map
    probs = probs.to(device, dtype).requires_grad_()
    direction = torch.randn(tokens, HIDDEN, generator=generator).to(device, dtype)
    return (x, probs, gate_up, down), routing_map.to(device), direction


def outputs_and_gradients(function, inputs, direction):
    y = function(*inputs)
    if not y.requires_grad:  # the reference of no active pair
        return [y, *(torch.zeros_like(t) for t in inputs)]
    return [y, *torch.autograd.grad((y * direction).sum(), inputs, materialize_grads=True)]


def assert_close(actual, expected, tolerance):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = b.abs().max().clamp(min=1)
        assert (a - b).abs().max() <= tolerance * scale, f"quantity {i}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_output_and_every_gradient_equal_the_reference(routing, dtype, device):
    inputs, routing_map, direction = case(routing, dtype, device)
    ours = outputs_and_gradients(
        lambda x, p, gu, d: routed_experts(x, p, routing_map, gu, d), inputs, direction
    )
    expected = outputs_and_gradients(reference_moe, inputs, direction)
    # The reference gives no gradient to a probability of an inactive pair, and neither do we.
    assert_close(ours, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("frozen", [(), (0,), (1, 3), (0, 1)], ids=str)
@pytest.mark.parametrize("all_experts", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_function_equals_its_parts_to_the_bit(monkeypatch, routing, all_experts, frozen):
    monkeypatch.setattr(experts, "takes_all_experts", lambda _: all_experts)
    inputs, routing_map, direction = case(routing, torch.float32)
    inputs = [t.detach() if i in frozen else t for i, t in enumerate(inputs)]
    trained = [t for t in inputs if t.requires_grad]
    counts = routing_map.sum(dim=0).tolist()
    permutation = Permutation.of(routing_map, sum(counts))

    def parts(x, probs, gate_up, down):
        rows, prob = permute(x, probs, permutation)
        return combine(grouped_swiglu(rows, prob, gate_up, down, counts), permutation)

    whole = routed_swiglu(*inputs, permutation, counts)
    found = [whole, *torch.autograd.grad(whole, trained, direction)]
    expected = parts(*inputs)
    expected = [expected, *torch.autograd.grad(expected, trained, direction)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_compiled_gradient_of_the_activation_is_the_one_in_place(monkeypatch, transposed):
    z, grad_h = torch.randn(2 * WIDTH, 13).mT, torch.randn(WIDTH, 13).mT
    if not transposed:
        z, grad_h = z.contiguous(), grad_h.contiguous()
    in_place = swiglu._activate_backward(z, grad_h)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = swiglu._activate_backward(z, grad_h)
    gate, up = z.double().chunk(2, dim=1)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h = torch.nn.functional.silu(gate) * up
    grads = torch.autograd.grad(h, (gate, up), grad_h.double())
    expected = [h, torch.cat(grads, dim=1), (h * grad_h).sum(dim=1)]
    for found in (in_place, compiled):
        assert_close([t.double() for t in found], expected, 1e-6)
        assert found[1].stride() == z.stride()
    assert all(torch.equal(a, b) for a, b in zip(in_place, compiled, strict=True))


@pytest.mark.parametrize("routing", ["mixed", "all active", "one expert"])
def test_one_launch_for_all_experts_equals_one_expert_at_a_time(monkeypatch, routing):
    """The path of a GPU, with torch's own fallback of grouped_mm."""
    inputs, routing_map, direction = case(routing, torch.bfloat16)

    def run():
        return outputs_and_gradients(
            lambda x, p, gu, d: routed_experts(x, p, routing_map, gu, d), inputs, direction
        )

    expected, calls = run(), []
    grouped_mm = torch.nn.functional.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    monkeypatch.setattr(experts, "uses_grouped_mm", lambda *_: True)
    assert_close(run(), expected, 2e-2)  # products rounded to 8 bits, summed in another order
    assert len(calls) == 6  # two products forward, four backward


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_grouped_mm_leaves_in_empty_groups_is_no_gradient(monkeypatch, accumulates):
    """As on compute capability 10: github.com/pytorch/pytorch/issues/172439."""
    (x, probs, gate_up, down), routing_map, direction = case("mixed", torch.bfloat16)
    permutation, counts = Permutation.of(routing_map, 12), [4, 3, 0, 5]

    def weight_grads():
        buffers = (torch.ones_like(gate_up), torch.ones_like(down)) if accumulates else None
        rows, p = permute(x, probs, permutation)
        y = grouped_swiglu(rows, p, gate_up, down, counts, main_grads=buffers)
        grads = torch.autograd.grad((combine(y, permutation) * direction).sum(), (gate_up, down))
        return grads if buffers is None else buffers

    expected, grouped_mm = weight_grads(), torch.nn.functional.grouped_mm

    def poisoned(a, b, *, offs):
        product = grouped_mm(a, b, offs=offs)
        if product.dim() == 3:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return product

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    monkeypatch.setattr(experts, "uses_grouped_mm", lambda *_: True)
    assert_close(weight_grads(), expected, 2e-2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_launch_for_every_expert_equals_one_expert_at_a_time(monkeypatch, routing):
    """The path of a GPU without grouped_mm of its own, as an A100."""
    inputs, routing_map, direction = case(routing, torch.float64)

    def run():
        return outputs_and_gradients(
            lambda x, p, gu, d: routed_experts(x, p, routing_map, gu, d), inputs, direction
        )

    expected = run()
    monkeypatch.setattr(experts, "takes_all_experts", lambda _: True)
    activated, activate = [], swiglu._activate
    monkeypatch.setattr(swiglu, "_activate", lambda z: activated.append(z) or activate(z))
    assert_close(run(), expected, 1e-12)
    assert len(activated) == int(routing_map.any())  # once, for all experts


def test_a_launch_for_every_expert_adds_to_main_gradients(monkeypatch):
    monkeypatch.setattr(experts, "takes_all_experts", lambda _: True)
    test_main_gradients_are_added_to()


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "uses"),
    [
        ((9, 0), torch.bfloat16, (768, 2048), True),
        ((10, 0), torch.bfloat16, (768, 2048), True),
        ((8, 0), torch.bfloat16, (768, 2048), False),  # copies offsets to the host
        ((12, 0), torch.bfloat16, (768, 2048), False),  # the same
        ((9, 0), torch.float32, (768, 2048), False),  # the same
        ((9, 0), torch.bfloat16, (768, 2044), False),  # raises: not a multiple of 16 bytes
    ],
)
def test_grouped_mm_is_used_where_it_is_one_launch(monkeypatch, capability, dtype, widths, uses):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert experts.uses_grouped_mm(torch.device("cuda"), dtype, *widths) is uses


def test_gradients_by_finite_differences():
    (x, probs, gate_up, down), routing_map, _ = case("mixed", torch.float64)
    permutation = Permutation.of(routing_map, 12)

    def function(x, probs, gate_up, down):
        rows, p = permute(x, probs, permutation)
        return combine(grouped_swiglu(rows, p, gate_up, down, [4, 3, 0, 5]), permutation)

    # Fast: along random directions instead of entry by entry, of which there are thousands.
    assert torch.autograd.gradcheck(function, (x, probs, gate_up, down), fast_mode=True)


def test_main_gradients_are_added_to():
    (x, probs, gate_up, down), routing_map, direction = case("mixed", torch.float32)
    expected = outputs_and_gradients(
        lambda x, p, gu, d: routed_experts(x, p, routing_map, gu, d),
        (x, probs, gate_up, down),
        direction,
    )
    permutation = Permutation.of(routing_map, 12)
    rows, p = permute(x, probs, permutation)
    buffers = (torch.ones_like(gate_up), torch.full_like(down, 2))
    y = combine(
        grouped_swiglu(rows, p, gate_up, down, [4, 3, 0, 5], main_grads=buffers), permutation
    )
    grads = torch.autograd.grad((y * direction).sum(), (x, probs, gate_up, down))
    assert_close([y, *grads[:2]], expected[:3], 2e-5)
    assert_close([buffers[0] - 1, buffers[1] - 2], expected[3:], 2e-5)


def test_frozen_weights_get_no_gradient():
    (x, probs, gate_up, down), routing_map, direction = case("mixed", torch.float32)
    y = routed_experts(x, probs, routing_map, gate_up.detach(), down)
    (y * direction).sum().backward()
    assert gate_up.grad is None
    assert down.grad is not None
    assert x.grad is not None


def test_autocast_computes_in_its_dtype():
    inputs, routing_map, direction = case("mixed", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_experts(*inputs[:2], routing_map, *inputs[2:])
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad((y * direction).sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    expected = outputs_and_gradients(reference_moe, inputs, direction)
    assert_close([y.float(), *grads], expected, TOLERANCES[torch.bfloat16])


def test_permutation_sorts_by_expert_and_back():
    _, routing_map, _ = case("mixed", torch.float32)
    p = Permutation.of(routing_map, 12)
    assert p.token_A.tolist() == [0, 1, 2, 5, 2, 3, 12, 1, 2, 3, 4, 6]
    assert (p.entry_A % EXPERTS).tolist() == [0] * 4 + [1] * 3 + [3] * 5
    assert p.token_A[p.by_token_A].tolist() == sorted(p.token_A.tolist())
    assert p.starts_T.tolist() == [0, 1, 3, 6, 8, 9, 10, 11, 11, 11, 11, 11, 11]


def test_no_tensor_of_the_size_of_the_routing_map_is_kept():
    """What backward keeps grows with the assignments, not with the number of experts."""
    kept = []

    def record(tensor):
        kept.append(tensor)
        return tensor

    tokens, many = 32, 512
    routing_map = torch.zeros(tokens, many, dtype=torch.bool)
    routing_map[torch.arange(tokens), torch.arange(tokens)] = True
    x, probs = torch.randn(tokens, 4), torch.rand(tokens, many)
    weights = torch.randn(many, 6, 4), torch.randn(many, 4, 3)
    inputs = [t.requires_grad_() for t in (x, probs, *weights)]
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        routed_experts(inputs[0], inputs[1], routing_map, *inputs[2:])
    activations = [t for t in kept if not any(t is w for w in inputs)]
    assert activations
    assert max(t.numel() for t in activations) < tokens * many / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_layer_makes_the_host_wait_once(recwarn):
    """For the counts that size the experts' inputs; nothing else leaves the device."""
    config = ReMoELayerConfig(
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_experts=EXPERTS,
        topk=1,
        max_assignments=32 * EXPERTS,  # never in chunks, each of which counts again
    )
    layer = ReMoELayer(config, device="cuda")
    x = torch.randn(32, HIDDEN, device="cuda")
    layer(x)
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "called a synchronizing" in str(w.message)]) == 1
