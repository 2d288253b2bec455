"""Gather, experts and combine as one autograd function, for a layer whose experts are all here.

Where the host is the limit, every autograd function in Python costs a layer time. Megatron's layer
has its dispatcher between the parts, and calls them one by one.

Shapes, as in `remoe.kernels.experts` and `remoe.kernels.permutation`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from remoe.kernels.experts import (
    WeightGrads,
    blocks_of,
    grouped_swiglu,
    swiglu_backward,
    swiglu_forward,
)
from remoe.kernels.permutation import (
    Permutation,
    combine,
    gather,
    gather_backward,
    permute,
    rows_of_tokens,
    sum_by_token,
)


def routed_swiglu(
    x_TH: Tensor,
    probs_TE: Tensor,
    gate_up: Tensor,
    down: Tensor,
    permutation: Permutation,
    tokens_per_expert: list[int],
    *,
    only_for_backward: bool = False,
) -> Tensor:
    """Return `combine(grouped_swiglu(*permute(x, probs), ...))`, `[T, H]`, to the bit.

    Args:
        x_TH: tokens.
        probs_TE: routing weights, in the dtype of `x_TH`.
        gate_up: `[E, 2F, H]`, gate first.
        down: `[E, H, F]`.
        permutation: the active pairs.
        tokens_per_expert: their counts, on the host.
        only_for_backward: the values of the result may be anything.
    """
    options = (tokens_per_expert, only_for_backward)
    if torch.is_autocast_enabled(x_TH.device.type):
        # The parts differ in dtype, between which autograd casts.
        x_AH, prob_A = permute(x_TH, probs_TE, permutation)
        y_AH = grouped_swiglu(
            x_AH, prob_A, gate_up, down, tokens_per_expert, only_for_backward=only_for_backward
        )
        return combine(y_AH, permutation)
    inputs = (x_TH, probs_TE, gate_up, down, permutation, *options)
    y_TH: Tensor = _RoutedSwiGLU.apply(*inputs)  # type: ignore[no-untyped-call]
    return y_TH


class _RoutedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        probs_TE: Tensor,
        gate_up: Tensor,
        down: Tensor,
        permutation: Permutation,
        tokens_per_expert: list[int],
        only_for_backward: bool,
    ) -> Tensor:
        x_AH, prob_A = gather(x_TH, probs_TE, permutation)
        ctx.permutation, ctx.tokens_per_expert = permutation, tokens_per_expert
        ctx.blocks = blocks_of(x_AH, tokens_per_expert, down.shape[2])
        tensors = (x_AH, prob_A, gate_up, down)
        y_AH, products = swiglu_forward(*tensors, ctx.blocks, only_for_backward)
        ctx.save_for_backward(*tensors, *products)
        return sum_by_token(y_AH, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TH: Tensor) -> tuple[Tensor | None, ...]:
        p: Permutation = ctx.permutation
        x_AH, prob_A, gate_up, down, *products = ctx.saved_tensors
        needed, counts = ctx.needs_input_grad, ctx.tokens_per_expert
        grads = WeightGrads((gate_up, down), needed[2:4], counts)
        grad_y_AH = rows_of_tokens(grad_y_TH, p.token_A)
        tensors = (x_AH, prob_A, gate_up, down, products)
        rows = swiglu_backward(grad_y_AH, *tensors, ctx.blocks, grads)
        del grad_y_AH  # for the memory of what follows
        inputs = gather_backward(*rows, p, len(counts), needed[:2])
        return *inputs, *grads.result(), None, None, None
