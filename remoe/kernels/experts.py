"""SwiGLU experts over contiguous segments of tokens, as one autograd function.

`y_a = p_a W_down[e] (silu(W_gate[e] x_a) * W_up[e] x_a)` for the expert e of every pair (Eq. 1).
If stacked weights were indexed per expert, autograd would allocate a gradient of all experts for
each of them, which is quadratic in E; here every expert's gradient is written once, in its place.

Shapes: A pairs sorted by expert, H hidden, E experts, F expert width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from remoe.kernels.backend import uses_triton
from remoe.kernels.loading import triton_kernels
from remoe.kernels.swiglu import activate, activate_backward

_FEW_TOKENS = 128
GATE_UP, DOWN = 0, 1
# How a block is multiplied: all experts in one launch, given where their rows end, on the device;
# all experts with a launch for each, given their tokens; or, None, a single expert.
Segments = Tensor | list[int] | None


@dataclass(frozen=True)
class Block:
    """Experts that are computed together: one of them, or all.

    Attributes:
        rows: the rows of its tokens; None are all rows.
        expert: its index; None are all experts.
        segments: how it is multiplied.
    """

    rows: slice | None
    expert: int | None
    segments: Segments

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return the block's part of a tensor of all rows."""
        return tensor if self.rows is None else tensor[self.rows]

    def weight_of(self, tensor: Tensor) -> Tensor:
        """Return the block's part of stacked weights."""
        return tensor if self.expert is None else tensor[self.expert]


def grouped_swiglu(
    x_AH: Tensor,
    prob_A: Tensor,
    gate_up: Tensor,
    down: Tensor,
    tokens_per_expert: list[int],
    *,
    main_grads: tuple[Tensor, Tensor] | None = None,
    only_for_backward: bool = False,
) -> Tensor:
    """Apply every expert to its segment of rows, and weight the result, `[A, H]`.

    Backward keeps `x` and the product with `gate_up`, and computes the activation again. Experts
    without tokens cost only the zeros of their gradient.

    Args:
        x_AH: tokens, sorted by expert.
        prob_A: routing weights of the tokens, in the dtype of `x_AH`.
        gate_up: `[E, 2F, H]`, gate first.
        down: `[E, H, F]`.
        tokens_per_expert: E lengths of segments, on the host.
        main_grads: buffers of the weights' shape and dtype. When given, backward adds the weights'
            gradients to them, and returns uninitialized memory as the weights' gradients, which the
            caller must not use.
        only_for_backward: leave out the product with `down`, which backward does not need; the
            result is then uninitialized.
    """
    device = x_AH.device.type
    without_casts: AbstractContextManager[Any] = nullcontext()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_AH, prob_A, gate_up, down = (t.to(dtype) for t in (x_AH, prob_A, gate_up, down))
        without_casts = torch.autocast(device, enabled=False)
    with without_casts:
        inputs = (x_AH, prob_A, gate_up, down, tokens_per_expert, main_grads, only_for_backward)
        y_AH: Tensor = _GroupedSwiGLU.apply(*inputs)  # type: ignore[no-untyped-call]
        return y_AH


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_AH: Tensor,
        prob_A: Tensor,
        gate_up: Tensor,
        down: Tensor,
        tokens_per_expert: list[int],
        main_grads: tuple[Tensor, Tensor] | None,
        only_for_backward: bool,
    ) -> Tensor:
        ctx.tokens_per_expert, ctx.main_grads = tokens_per_expert, main_grads
        ctx.blocks = blocks_of(x_AH, tokens_per_expert, down.shape[2])
        tensors = (x_AH, prob_A, gate_up, down)
        y_AH, products = swiglu_forward(*tensors, ctx.blocks, only_for_backward)
        ctx.save_for_backward(*tensors, *products)
        return y_AH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_AH: Tensor) -> tuple[Tensor | None, ...]:
        x_AH, prob_A, gate_up, down, *products = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:4]
        grads = WeightGrads((gate_up, down), needed, ctx.tokens_per_expert, ctx.main_grads)
        tensors = (x_AH, prob_A, gate_up, down, products)
        rows = swiglu_backward(grad_y_AH.contiguous(), *tensors, ctx.blocks, grads)
        return *rows, *grads.result(), None, None, None


def swiglu_forward(
    x_AH: Tensor,
    prob_A: Tensor,
    gate_up: Tensor,
    down: Tensor,
    blocks: Sequence[Block],
    only_for_backward: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the weighted rows `[A, H]`, and every block's product with `gate_up` for backward.

    In Triton the activation has the routing weight, and no rows are weighted.
    """
    in_triton = uses_triton(x_AH, "SwiGLU")
    y_AH, products = torch.empty_like(x_AH), []
    for block in blocks:
        z = multiply(block.rows_of(x_AH), block.weight_of(gate_up).mT, block.segments)
        products.append(z)
        if not only_for_backward:
            prob = block.rows_of(prob_A)
            h = triton_kernels().weighted_swiglu(z, prob) if in_triton else activate(z)
            y = multiply(h, block.weight_of(down).mT, block.segments)
            y_AH = _put(y, block, y_AH, weights=None if in_triton else prob.unsqueeze(1))
    return y_AH, products


def swiglu_backward(
    grad_y_AH: Tensor,
    x_AH: Tensor,
    prob_A: Tensor,
    gate_up: Tensor,
    down: Tensor,
    products: Sequence[Tensor],
    blocks: Sequence[Block],
    weight_grads: "WeightGrads",
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows `[A, H]` and of their routing weights `[A]`.

    Those of the experts' weights are added to `weight_grads`.
    """
    in_triton = uses_triton(x_AH, "SwiGLU")
    grad_x_AH, grad_prob = torch.empty_like(x_AH), []
    for block, z in zip(blocks, products, strict=True):
        segments, prob = block.segments, block.rows_of(prob_A)
        x, grad_y = block.rows_of(x_AH), block.rows_of(grad_y_AH)
        grad_h = multiply(grad_y, block.weight_of(down), segments)
        if in_triton:
            weights = None
            h, grad_z, grad_rows = triton_kernels().weighted_swiglu_backward(z, prob, grad_h)
        else:
            # The routing weight scales rows of width H, which are cheaper than those of width F.
            weights = prob.unsqueeze(1)
            h, grad_z, grad_rows = activate_backward(z, grad_h)
        grad_prob.append(grad_rows)
        weight_grads.add(DOWN, block.expert, _weighted(grad_y, weights).mT, h, segments)
        weight_grads.add(GATE_UP, block.expert, grad_z.mT, _weighted(x, weights), segments)
        grad_x = multiply(grad_z, block.weight_of(gate_up), segments)
        grad_x_AH = _put(grad_x, block, grad_x_AH, weights)
    if len(grad_prob) == 1:
        return grad_x_AH, grad_prob[0]
    return grad_x_AH, torch.cat(grad_prob) if grad_prob else torch.empty_like(prob_A)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights


def _put(rows: Tensor, block: Block, all_rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return all rows, with those of a block, which are weighted unless they are already."""
    if weights is not None:
        torch.mul(rows, weights, out=block.rows_of(all_rows))
    elif block.rows is None:
        return rows.contiguous()
    else:
        block.rows_of(all_rows).copy_(rows)
    return all_rows


class WeightGrads:
    """Gradients of stacked weights, which are written in place or added to the main gradients.

    Args:
        weights: `gate_up` and `down`.
        needed: which of the two need gradients.
        tokens_per_expert: those of the experts; a gradient without tokens is zero.
        main_grads: buffers to add to, as `grouped_swiglu` has them.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        needed: Sequence[bool],
        tokens_per_expert: list[int],
        main_grads: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.weights, self.needed = weights, needed
        self.accumulates = main_grads is not None
        self.grads: list[Tensor | None] = list(main_grads or (None, None))
        self.inactive = _runs_of_zeros(tokens_per_expert)

    def add(self, which: int, expert: int | None, a: Tensor, b: Tensor, segments: Segments) -> None:
        """Add the gradient `a b` of an expert's weight, or of all: `GATE_UP` or `DOWN`."""
        if not self.needed[which]:
            return
        if isinstance(segments, Tensor):
            # For a group without rows, grouped_mm returns what was in its registers on compute
            # capability 10 (github.com/pytorch/pytorch/issues/172439).
            grad = self._zero_inactive(multiply(a, b, segments))
            self.grads[which] = self._buffer(which).add_(grad) if self.accumulates else grad
            return
        buffer, beta = self._buffer(which), int(self.accumulates)
        if segments is None:
            assert expert is not None, "a block without segments is one expert"
            buffer[expert].addmm_(a, b, beta=beta)
            return
        parts = zip(
            buffer, a.split_with_sizes(segments, dim=1), b.split_with_sizes(segments), strict=True
        )
        for part, columns, rows in parts:
            if len(rows):
                part.addmm_(columns, rows, beta=beta)

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the gradients for autograd, None for a weight that needs none."""
        return tuple(self._returned(i) if needed else None for i, needed in enumerate(self.needed))

    def _returned(self, which: int) -> Tensor:
        return torch.empty_like(self.weights[which]) if self.accumulates else self._buffer(which)

    def _buffer(self, which: int) -> Tensor:
        grad = self.grads[which]
        if grad is None:
            grad = self.grads[which] = self._zero_inactive(torch.empty_like(self.weights[which]))
        return grad

    def _zero_inactive(self, grad: Tensor) -> Tensor:
        for run in self.inactive:
            grad[run].zero_()
        return grad


def _runs_of_zeros(tokens_per_expert: list[int]) -> list[slice]:
    """Return the experts without tokens. A GPU waits for a list of indices, not for slices."""
    runs, start = [], 0
    for active, run in groupby(tokens_per_expert, key=bool):
        stop = start + sum(1 for _ in run)
        if not active:
            runs.append(slice(start, stop))
        start = stop
    return runs


def blocks_of(x_AH: Tensor, tokens_per_expert: list[int], width: int) -> list[Block]:
    """Return every active expert by itself, or one block of all of them.

    One expert at a time keeps its activations in a CPU's cache. A GPU takes all of them, for fewer
    launches.
    """
    if len(x_AH) and uses_grouped_mm(x_AH.device, x_AH.dtype, x_AH.shape[1], width):
        ends = torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32)
        return [Block(None, None, ends.to(x_AH.device, non_blocking=True))]
    if len(x_AH) and takes_all_experts(x_AH.device):
        return [Block(None, None, tokens_per_expert)]
    ends_E = accumulate(tokens_per_expert)
    return [
        Block(slice(end - count, end), expert, None)
        for expert, (count, end) in enumerate(zip(tokens_per_expert, ends_E, strict=True))
        if count
    ]


def takes_all_experts(device: torch.device) -> bool:
    """Return whether the device computes what is no product for all experts together."""
    return device.type == "cuda"


def uses_grouped_mm(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Return whether torch can multiply all experts in one launch, without asking the host.

    It does so in bf16, on compute capability 9 and 10, and for rows that are multiples of 16 bytes.
    Elsewhere (an A100 has 8.0) torch's function copies the ends of the segments to the host for
    every product, and then multiplies them one by one; the host has them already here.

    Args:
        device: that of the tensors.
        dtype: that of the tensors.
        widths: the number of columns of every matrix.
    """
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and all(width % 8 == 0 for width in widths)
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )


def multiply(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """Multiply once, or per segment of rows of `a` (of columns, when `b` is 2-d as well).

    For an expert with few tokens the product is computed transposed, with tokens as columns: on a
    CPU that is up to 1.6 times faster.
    """
    if isinstance(segments, Tensor):
        return F.grouped_mm(a, b, offs=segments)
    if segments is None:
        return torch.mm(b.mT, a.mT).mT if len(a) <= _FEW_TOKENS else torch.mm(a, b)
    product = a.new_empty(len(a), b.shape[2])
    for part, rows, factor in zip(
        product.split_with_sizes(segments), a.split_with_sizes(segments), b, strict=True
    ):
        if len(rows):
            torch.mm(rows, factor, out=part)
    return product
