"""SwiGLU experts over contiguous segments of tokens, as one autograd function.

`y_a = p_a W_down[e] (silu(W_gate[e] x_a) * W_up[e] x_a)` for the expert e of every pair (Eq. 1).
If stacked weights were indexed per expert, autograd would allocate a gradient of all experts for
each of them, which is quadratic in E; here every expert's gradient is written once, in its place.

Shapes: A pairs sorted by expert, H hidden, E experts, F expert width.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

_FEW_TOKENS = 128
_GATE_UP, _DOWN = 0, 1
# How a block is multiplied: all experts in one launch, given where their rows end, on the device;
# all experts with a launch for each, given their tokens; or, None, a single expert.
Segments = Tensor | list[int] | None


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
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_AH, prob_A, gate_up, down = (t.to(dtype) for t in (x_AH, prob_A, gate_up, down))
    with torch.autocast(device, enabled=False):
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
        y_AH = torch.empty_like(x_AH)
        products = []
        blocks = list(_blocks(x_AH, tokens_per_expert, down.shape[2]))
        for rows, expert, segments in blocks:
            z = _matmul(x_AH[rows], gate_up[expert].mT, segments)
            products.append(z)
            if not only_for_backward:
                y = _matmul(_fused(_activate, z)(z), down[expert].mT, segments)
                torch.mul(y, prob_A[rows, None], out=y_AH[rows])
        ctx.tokens_per_expert, ctx.main_grads, ctx.blocks = tokens_per_expert, main_grads, blocks
        ctx.save_for_backward(x_AH, prob_A, gate_up, down, *products)
        return y_AH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_AH: Tensor) -> tuple[Tensor | None, ...]:
        x_AH, prob_A, gate_up, down, *products = ctx.saved_tensors
        grad_y_AH = grad_y_AH.contiguous()
        grad_x, grad_prob = torch.empty_like(x_AH), torch.empty_like(prob_A)
        weight_grads = _WeightGrads(gate_up, down, ctx)
        for (rows, expert, segments), z in zip(ctx.blocks, products, strict=True):
            # The routing weight scales rows of width H, which are cheaper than those of width F.
            prob, grad_y = prob_A[rows, None], grad_y_AH[rows]
            grad_h = _matmul(grad_y, down[expert], segments)
            h, grad_z, grad_prob[rows] = _fused(_activate_backward, z)(z, grad_h)
            weight_grads.add(_DOWN, expert, (grad_y * prob).mT, h, segments)
            weight_grads.add(_GATE_UP, expert, grad_z.mT, x_AH[rows] * prob, segments)
            torch.mul(_matmul(grad_z, gate_up[expert], segments), prob, out=grad_x[rows])
        return grad_x, grad_prob, *weight_grads.result(), None, None, None


class _WeightGrads:
    """Gradients of stacked weights, which are written in place or added to the main gradients."""

    def __init__(self, gate_up: Tensor, down: Tensor, ctx: Any) -> None:
        self.weights = (gate_up, down)
        self.needed = ctx.needs_input_grad[2:4]
        self.accumulates = ctx.main_grads is not None
        self.grads: list[Tensor | None] = list(ctx.main_grads or (None, None))
        self.inactive = _runs_of_zeros(ctx.tokens_per_expert)

    def add(self, which: int, expert: Any, a: Tensor, b: Tensor, segments: Segments) -> None:
        """Add the gradient `a b` of an expert's weight, or of all: `_GATE_UP` or `_DOWN`."""
        if not self.needed[which]:
            return
        if isinstance(segments, Tensor):
            # For a group without rows, grouped_mm returns what was in its registers on compute
            # capability 10 (github.com/pytorch/pytorch/issues/172439).
            grad = self._zero_inactive(_matmul(a, b, segments))
            self.grads[which] = self._buffer(which).add_(grad) if self.accumulates else grad
            return
        buffer, beta = self._buffer(which), int(self.accumulates)
        if segments is None:
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


def _blocks(
    x_AH: Tensor, tokens_per_expert: list[int], width: int
) -> Iterator[tuple[slice, int | slice, Segments]]:
    """Yield each expert's rows, the expert, and None; or all rows, all experts, and the segments.

    One expert at a time keeps its activations in a CPU's cache. A GPU takes all of them, for fewer
    launches.
    """
    if len(x_AH) and uses_grouped_mm(x_AH.device, x_AH.dtype, x_AH.shape[1], width):
        ends = torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32)
        yield slice(None), slice(None), ends.to(x_AH.device, non_blocking=True)
        return
    if len(x_AH) and takes_all_experts(x_AH.device):
        yield slice(None), slice(None), tokens_per_expert
        return
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        if count:
            yield slice(start, start + count), expert, None
            start += count


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


def _matmul(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
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


def _fused(function: Callable[..., Any], z: Tensor) -> Callable[..., Any]:
    """Compile the function into one kernel on a GPU, where torch needs no other tools for it."""
    return _compiled(function) if z.device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _activate(z: Tensor) -> Tensor:
    """Return `silu(gate) * up`, given `z = [gate, up]`."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def _activate_backward(z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `h = silu(gate) * up`, the gradient of z, and the gradient of each row's weight."""
    gate, up = z.chunk(2, dim=-1)
    silu = F.silu(gate)
    h = silu * up
    grad_z = torch.empty_like(z)  # with the strides of z, which `cat` would not keep
    grad_gate, grad_up = grad_z.chunk(2, dim=-1)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_h * up, gate))
    grad_up.copy_(grad_h * silu)
    return h, grad_z, (h * grad_h).sum(dim=-1)
