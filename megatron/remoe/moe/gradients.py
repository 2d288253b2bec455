"""How the gradients of experts reach Megatron's DDP: in which order, and who adds them.

With overlapped reduction DDP reduces a bucket as soon as its gradients are there, and data-parallel
ranks pair their buckets by that order alone. Ranks decide for themselves whether a layer is
chunked, so chunked and unchunked experts must deliver their gradients in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def main_grads(
    weights: Sequence[torch.nn.Parameter], *, same_dtype: bool = False
) -> list[Tensor] | None:
    """Return the buffers of DDP that backward may add to, which saves a copy of all gradients.

    Args:
        weights: parameters, all of which need a buffer; otherwise the result is None.
        same_dtype: whether the buffers must have the dtype of the weights.
    """
    if not torch.is_grad_enabled():
        return None
    buffers = []
    for weight in weights:
        buffer = getattr(weight, "main_grad", None)
        if buffer is None or not weight.requires_grad:
            return None
        if same_dtype and buffer.dtype != weight.dtype:
            return None
        buffers.append(buffer)
    return buffers


def in_order(weights: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Return views of the weights; autograd delivers their gradients one by one, the last first.

    That is the order of Megatron's sequential experts. The gradients that one autograd function
    returns for several parameters arrive in no order to rely on, but the nodes of views run in
    reverse order of their creation.
    """
    return [weight.view_as(weight) for weight in weights]


def mark_gradients(output: Tensor, weights: Sequence[torch.nn.Parameter], *, added: bool) -> Tensor:
    """Return the output, whose backward tells DDP whether it must add the weights' gradients.

    DDP must be told in backward and not earlier, because micro-batches differ: with pipeline stages
    the forward of a later micro-batch comes before the backward of an earlier one, and either may
    be chunked.

    Args:
        output: result of a computation with the weights.
        weights: parameters of Megatron's DDP.
        added: whether backward itself adds to the buffers (`main_grads`).
    """
    marked: Tensor = _MarkGradients.apply(output, weights, added)  # type: ignore[no-untyped-call]
    return marked


class _MarkGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, weights: Sequence[torch.nn.Parameter], added: bool
    ) -> Tensor:
        ctx.weights, ctx.added = weights, added
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = ctx.added
        return grad, None, None
