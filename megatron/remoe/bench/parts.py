"""The parts around the experts: router, permutation and combine, in time and in bytes.

The fewest bytes of a part are those of its inputs and outputs, each read or written once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.remoe.bench.layer import Shape, inputs
from megatron.remoe.bench.timing import Alternative
from remoe.kernels import Permutation, combine, permute
from remoe.routing import relu_routing, tokens_per_expert

COPY = "copy of the tokens"


def alternatives(shape: Shape) -> list[Alternative]:
    """Return every part, forward and backward, with its bytes."""
    x, router = inputs(shape)
    x, router = x.requires_grad_(), router.requires_grad_()

    def route() -> tuple[Tensor, Tensor]:
        return relu_routing(torch.nn.functional.linear(x.float(), router.float()))

    probs, routing_map = route()
    probs = probs.detach().to(shape.dtype).requires_grad_()
    count = sum(tokens_per_expert(routing_map).tolist())
    permutation = Permutation.of(routing_map, count)
    rows = x.detach()[permutation.token_A].requires_grad_()
    grad_rows, grad_probs = torch.ones_like(rows), torch.ones(count).to(rows)
    item, hidden = x.element_size(), shape.hidden_size
    tokens, pairs = shape.tokens * hidden * item, count * hidden * item
    gates = shape.tokens * shape.num_experts

    def route_and_back() -> None:
        torch.autograd.grad(route()[0], (x, router), probs.detach().float())

    def permute_and_back() -> None:
        outputs = permute(x, probs, permutation)
        torch.autograd.grad(outputs, (x, probs), (grad_rows, grad_probs))

    def combine_and_back() -> None:
        torch.autograd.grad(combine(rows, permutation), rows, x.detach())

    weights = router.numel() * item
    indices = gates + 8 * (3 * count + shape.tokens)
    return [
        _part(COPY, lambda: x.detach().clone(), 2 * tokens),
        _part("router", route_and_back, 3 * tokens + 3 * weights + gates * (4 + 1 + 4)),
        _part("permutation", lambda: Permutation.of(routing_map, count), indices),
        _part("permute", permute_and_back, 2 * (tokens + pairs) + 2 * (gates + count) * item),
        _part("combine", combine_and_back, 2 * (tokens + pairs)),
    ]


def _part(name: str, run: Callable[[], Any], fewest: int) -> Alternative:
    with _BytesTouched() as touched:
        run()
    facts = {
        "fewest MB": f"{fewest / 1e6:.1f}",
        "touched MB": f"{touched.total / 1e6:.1f}",
        "touched / fewest": f"{touched.total / fewest:.2f}",
    }
    return Alternative(name, run, facts)


class _BytesTouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum the bytes of the inputs and outputs of every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        allocates_only = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        if not func.is_view and not allocates_only:
            touched = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in touched)
        return result
