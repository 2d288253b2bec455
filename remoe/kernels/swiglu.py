"""The activation of SwiGLU experts and its gradients, in torch.

`remoe.kernels.fused` has the same in Triton, with the routing weight in it.

Shapes: A rows, F expert width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_aten = torch.ops.aten


def activate(z: Tensor) -> Tensor:
    """Return `silu(gate) * up`, `[A, F]`, given `z = [gate, up]`, `[A, 2F]`."""
    h: Tensor = _fused(_activate, z)(z)
    return h


def activate_backward(z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `activate` does, the gradient of z, and that of each row's weight, `[A]`.

    The weight is a factor of the row, so that its gradient is the sum of `h * grad_h`.
    """
    grads: tuple[Tensor, Tensor, Tensor] = _fused(_activate_backward, z)(z, grad_h)
    return grads


def _fused(function: Callable[..., Any], z: Tensor) -> Callable[..., Any]:
    """Compile the function into one kernel on a GPU, where torch needs no other tools for it."""
    return _compiled(function) if z.device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _activate(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activate_backward(z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = z.chunk(2, dim=-1)
    scratch = F.silu(gate)
    h = scratch * up
    grad_z = torch.empty_like(z)  # with the strides of z, which `cat` would not keep
    grad_gate, grad_up = grad_z.chunk(2, dim=-1)
    _write(grad_up, "out", _aten.mul, grad_h, scratch)
    _write(scratch, "out", _aten.mul, grad_h, up)
    _write(grad_gate, "grad_input", _aten.silu_backward, scratch, gate)
    _write(scratch, "out", _aten.mul, h, grad_h)
    return h, grad_z, scratch.sum(dim=-1)


def _write(out: Tensor, name: str, operator: Callable[..., Any], *arguments: Tensor) -> None:
    """Write what an operator returns, where its argument of this name takes the output.

    Without the copy that a compiler removes; torch's breaks a graph at such outputs with strides.
    """
    if torch.compiler.is_compiling():
        out.copy_(operator(*arguments))
    else:
        operator(*arguments, **{name: out})
