"""Triton kernels against torch over shapes that hypothesis makes; `test_triton.py` runs this file.

It is no test module of its own: without a GPU Triton must interpret kernels, which it decides when
it is imported, so that this file needs a process whose environment says so.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.remoe.bench import choices
from megatron.remoe.bench.layer import Shape
from megatron.remoe.verify.kernels import Case, compare, quantities
from remoe.config import ReMoELayerConfig
from remoe.kernels import Permutation, ReLURouted, combine, experts, permute, relu_router
from remoe.kernels.backend import VARIABLE
from remoe.kernels.fused import MAX_EXPERTS
from remoe.kernels.router import relu_router_in_torch
from remoe.layer import ReMoELayer, l1_penalty
from tests import test_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large to interpret")


@st.composite
def cases(draw):
    """Sizes around the tiles' own, and few enough rows for the interpreter."""
    experts = draw(st.sampled_from([1, 2, 3, 7, 8, 31, 64, 130, 1000, 1024]))
    shift = draw(st.sampled_from([0.0, -1.0, -2.5, 99.0, -99.0]))
    share = {0.0: 0.5, -1.0: 0.16, -2.5: 0.01, 99.0: 1.0, -99.0: 0.0}[shift]
    most = min(70, int(600 / (experts * share))) if share else 70
    return Case(
        tokens=draw(st.integers(0, most)),
        experts=experts,
        hidden=draw(st.sampled_from([1, 5, 16, 257, 1040])),
        shift=shift,
        padding=draw(st.booleans()),
        dtype=draw(st.sampled_from(["fp32", "bf16", "fp64"])),
        seed=draw(st.integers(0, 9)),
    )


@given(cases())
@settings(max_examples=25, derandomize=True)
def test_outputs_and_gradients_equal_torch(case):
    wrong = [row for row in compare(case, DEVICE) if not row.ok]
    assert not wrong


def test_more_experts_than_a_tile_has_run_in_torch_and_triton():
    assert all(row.ok for row in compare(Case(3, MAX_EXPERTS + 1, 4, shift=-2), DEVICE))


@pytest.mark.parametrize("used", ["gates", "sums"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_router_has_the_gradient_of_one_output_alone(used, padded, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=generator).to(DEVICE).requires_grad_()
    padding = torch.arange(9, device=DEVICE) % 3 == 0 if padded else None
    grads = []
    for route in (relu_router, relu_router_in_torch):
        routed = route(logits, padding, dtype=torch.float32)
        output = routed.probs_TE if used == "gates" else routed.sum_E
        direction = torch.arange(1.0, output.numel() + 1, device=DEVICE).view_as(output)
        grads += torch.autograd.grad(output, logits, direction)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def forced(choice, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, choice)
        return run()


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "experts", "shift"), [(16384, 8, -1.15), (16381, 128, -2.4), (4099, 1024, -2.9)]
)
def test_sizes_of_real_models_equal_torch(dtype, tokens, experts, shift):
    case = Case(tokens, experts, 768, shift=shift, padding=True, dtype=dtype)
    wrong = [row for row in compare(case, DEVICE) if not row.ok]
    assert not wrong


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_run_gives_the_same_bits(dtype, monkeypatch):
    """An interpreter, which runs one program after another, could not differ."""
    monkeypatch.setenv(VARIABLE, "triton")
    case = Case(16384, 64, 768, shift=-1, dtype=dtype)
    first = dict(quantities(case, DEVICE))
    for _ in range(3):
        for name, again in quantities(case, DEVICE):
            assert torch.equal(first[name], again), name


def test_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    logits = logits.to(DEVICE).requires_grad_()
    padding = torch.tensor([0, 1, 0, 0, 1], dtype=torch.bool, device=DEVICE)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()

    def function(logits, x):
        routed: ReLURouted = relu_router(logits, padding)
        count = int(routed.routing_map_TE.sum())
        permutation = Permutation.of(routed.routing_map_TE, count)
        rows, prob = permute(x, routed.probs_TE, permutation)
        return combine(rows.sin() * prob.unsqueeze(1), permutation), routed.sum_E

    assert torch.autograd.gradcheck(function, (logits, x))


def test_a_logit_that_is_no_number_is_seen_in_gates_and_sums(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    logits = torch.tensor([[1.0, float("nan")], [2.0, -1.0]], device=DEVICE)
    routed = relu_router(logits)
    assert routed.probs_TE.isnan().tolist() == [[False, True], [False, False]]
    assert routed.sum_E.isnan().tolist() == [False, True]
    assert routed.counts.flat.tolist() == [2, 2, 0]


def test_slices_of_a_map_and_of_gates_are_permuted_as_copies_of_them(monkeypatch):
    """Chunks pass parts of the tokens and experts, which are not contiguous."""
    monkeypatch.setenv(VARIABLE, "triton")
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(20, 9, generator=generator).to(DEVICE)
    x = torch.randn(12, 4, generator=generator).to(DEVICE)
    results = []
    for copied in (False, True):
        probs = whole[3:15, 2:7]
        probs = probs.contiguous() if copied else probs
        routing_map = probs > 0.6
        routing_map = routing_map if copied else (whole > 0.6)[3:15, 2:7]
        permutation = Permutation.of(routing_map, int(routing_map.sum()))
        results.append([*permute(x, probs, permutation), permutation.by_token_A])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def swiglu_in_triton(monkeypatch):
    """Without the one in torch, so that nothing can run it unseen."""
    monkeypatch.setenv(VARIABLE, "triton")
    for name in ("activate", "activate_backward"):
        monkeypatch.setattr(experts, name, None)


@pytest.mark.parametrize("all_experts", [False, True])  # one by one as on a CPU, or as on a GPU
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["mixed", "none active"])
def test_experts_equal_the_loops(routing, dtype, all_experts, swiglu_in_triton, monkeypatch):
    monkeypatch.setattr(experts, "takes_all_experts", lambda _: all_experts)
    if all_experts and dtype == torch.bfloat16:
        monkeypatch.setattr(experts, "uses_grouped_mm", lambda *_: True)
    test_kernels.test_output_and_every_gradient_equal_the_reference(routing, dtype, DEVICE)


def test_main_gradients_are_added_to(swiglu_in_triton):
    test_kernels.test_main_gradients_are_added_to()


def test_what_is_timed_runs():
    names = [
        alternative.name
        for alternative in choices.alternatives(Shape(8, 8, 8, 2, 1, device=DEVICE))
    ]
    assert names == [
        *("ReMoE, E=2, all in torch", "ReMoE, E=2, all in triton"),
        *("SwiGLU and weighting, torch", "SwiGLU and weighting, triton"),
    ]
    for alternative in choices.alternatives(Shape(8, 8, 8, 2, 1, device=DEVICE)):
        alternative.run()


@pytest.mark.parametrize(("load_balancing", "most"), [("aux_loss", 10**6), ("none", 20)])
def test_a_layer_is_the_same_with_either_choice(load_balancing, most):
    """At once, and in chunks, which compute the activation again."""
    config = ReMoELayerConfig(
        hidden_size=16,
        ffn_hidden_size=8,
        num_experts=6,
        topk=1,
        load_balancing=load_balancing,
        max_assignments=most,
    )

    def run():
        torch.manual_seed(0)
        layer = ReMoELayer(config, device=DEVICE)
        layer.l1_coeff.fill_(0.5)
        x = torch.randn(19, 16).to(DEVICE).requires_grad_()
        y = layer(x)
        loss = y.square().sum() + l1_penalty(layer)
        parameters = [x, *layer.parameters()]
        return [y, layer.counts, *torch.autograd.grad(loss, parameters)]

    expected, actual = forced("torch", run), forced("triton", run)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())), f"quantity {i}"


def test_cases_are_interpreted_without_a_gpu():
    assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
