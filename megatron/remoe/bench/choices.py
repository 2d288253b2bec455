"""What REMOE_KERNELS chooses between, side by side: a layer, and the SwiGLU of its rows alone.

Shapes: A active (token, expert) pairs, H hidden, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.remoe.bench.layer import Shape, remoe_layer
from megatron.remoe.bench.timing import Alternative
from remoe.kernels.backend import can_run_triton, forced
from remoe.kernels.loading import triton_kernels
from remoe.kernels.swiglu import activate, activate_backward

CHOICES = ("torch", "triton")


def alternatives(shape: Shape) -> list[Alternative]:
    """Return both in torch and in Triton; nothing where Triton cannot run."""
    if not can_run_triton(shape.device):
        return []
    layer = remoe_layer(shape)
    layers = [
        Alternative(layer_name(shape.num_experts, choice), partial(_run, choice, layer.run))
        for choice in CHOICES
    ]
    activations = zip(CHOICES, _swiglu(shape), strict=True)
    return [*layers, *(Alternative(swiglu_name(choice), run) for choice, run in activations)]


def layer_name(num_experts: int, choice: str) -> str:
    """Return the name of a row of a layer with all of its kernels of one kind."""
    return f"ReMoE, E={num_experts}, all in {choice}"


def swiglu_name(choice: str) -> str:
    """Return the name of a row of the SwiGLU."""
    return f"SwiGLU and weighting, {choice}"


def _run(choice: str, run: Callable[[], Any]) -> None:
    with forced(choice):
        run()


def _swiglu(shape: Shape) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what the experts do beside their products, forward and backward, in both.

    In torch that is the activation, its gradients, and one pass forward and three backward that
    weight rows (`remoe.kernels.experts`).
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(**shape.like)

    pairs, width = shape.pairs, shape.ffn_hidden_size
    z, grad_h, rows = randn(pairs, 2 * width), randn(pairs, width), randn(pairs, shape.hidden_size)
    prob = randn(pairs)

    def in_torch() -> None:
        weights = prob.unsqueeze(1)
        activate(z)
        torch.mul(rows, weights)
        activate_backward(z, grad_h)
        for _ in range(3):
            torch.mul(rows, weights)

    def in_triton() -> None:
        kernels = triton_kernels()
        kernels.weighted_swiglu(z, prob)
        kernels.weighted_swiglu_backward(z, prob, grad_h)

    return in_torch, in_triton
