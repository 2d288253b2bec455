"""SwiGLU experts over contiguous segments of tokens, as one autograd function.

`y_a = p_a W_down[e] (silu(W_gate[e] x_a) * W_up[e] x_a)` for the expert e of every pair (Eq. 1).
If stacked weights were indexed per expert, autograd would allocate a gradient of all experts for
each of them, which is quadratic in E; here every expert's gradient is written once, in its place.

Shapes: A pairs sorted by expert, H hidden, E experts, F expert width.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

_FEW_TOKENS = 128
_GATE_UP, _DOWN = 0, 1


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
        for rows, expert, ends in _blocks(x_AH, tokens_per_expert):
            z = _matmul(x_AH[rows], gate_up[expert].mT, ends)
            products.append(z)
            if not only_for_backward:
                y = _matmul(_fused(_activate, z)(z), down[expert].mT, ends)
                torch.mul(y, prob_A[rows, None], out=y_AH[rows])
        ctx.tokens_per_expert, ctx.main_grads = tokens_per_expert, main_grads
        ctx.save_for_backward(x_AH, prob_A, gate_up, down, *products)
        return y_AH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_AH: Tensor) -> tuple[Tensor | None, ...]:
        x_AH, prob_A, gate_up, down, *products = ctx.saved_tensors
        grad_y_AH = grad_y_AH.contiguous()
        grad_x, grad_prob = torch.empty_like(x_AH), torch.empty_like(prob_A)
        weight_grads = _WeightGrads(gate_up, down, ctx)
        blocks = _blocks(x_AH, ctx.tokens_per_expert)
        for (rows, expert, ends), z in zip(blocks, products, strict=True):
            # The routing weight scales rows of width H, which are cheaper than those of width F.
            prob, grad_y = prob_A[rows, None], grad_y_AH[rows]
            grad_h = _matmul(grad_y, down[expert], ends)
            h, grad_z, grad_prob[rows] = _fused(_activate_backward, z)(z, grad_h)
            weight_grads.add(_DOWN, expert, (grad_y * prob).mT, h, ends)
            weight_grads.add(_GATE_UP, expert, grad_z.mT, x_AH[rows] * prob, ends)
            torch.mul(_matmul(grad_z, gate_up[expert], ends), prob, out=grad_x[rows])
        return grad_x, grad_prob, *weight_grads.result(), None, None, None


class _WeightGrads:
    """Gradients of stacked weights, which are written in place or added to the main gradients."""

    def __init__(self, gate_up: Tensor, down: Tensor, ctx: Any) -> None:
        self.needed = ctx.needs_input_grad[2:4]
        self.accumulates = ctx.main_grads is not None
        self.returned = [torch.empty_like(w) for w in (gate_up, down)]
        self.buffers = list(ctx.main_grads) if self.accumulates else self.returned
        inactive = [e for e, count in enumerate(ctx.tokens_per_expert) if count == 0]
        if inactive and not self.accumulates:
            for buffer in self.buffers:
                buffer[inactive] = 0

    def add(self, which: int, expert: Any, a: Tensor, b: Tensor, ends: Tensor | None) -> None:
        """Add the gradient `a b` of an expert's weight: `_GATE_UP` or `_DOWN`."""
        if not self.needed[which]:
            return
        if ends is None:
            self.buffers[which][expert].addmm_(a, b, beta=int(self.accumulates))
        elif self.accumulates:
            self.buffers[which].add_(_matmul(a, b, ends))
        else:
            self.returned[which] = _matmul(a, b, ends)

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the gradients for autograd, None for a weight that needs none."""
        pairs = zip(self.returned, self.needed, strict=True)
        return tuple(grad if needed else None for grad, needed in pairs)


def _blocks(
    x_AH: Tensor, tokens_per_expert: list[int]
) -> Iterator[tuple[slice, int | slice, Tensor | None]]:
    """Yield each expert's rows, the expert, and None; or all rows, all experts, and segment ends.

    One expert at a time keeps its activations in a CPU's cache; a GPU takes all in one launch.
    """
    if uses_grouped_mm(x_AH.device, x_AH.dtype) and len(x_AH):
        ends = torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32)
        yield slice(None), slice(None), ends.to(x_AH.device, non_blocking=True)
        return
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        if count:
            yield slice(start, start + count), expert, None
            start += count


def uses_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch can multiply all experts in one launch: bf16, compute capability 9+."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _matmul(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Multiply once, or per segment of rows of `a` (of columns, when `b` is 2-d as well).

    For an expert with few tokens the product is computed transposed, with tokens as columns: on a
    CPU that is up to 1.6 times faster.
    """
    if ends is not None:
        return F.grouped_mm(a, b, offs=ends)
    return torch.mm(b.mT, a.mT).mT if len(a) <= _FEW_TOKENS else torch.mm(a, b)


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
