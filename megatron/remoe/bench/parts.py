"""The parts around the experts: router, permutation and combine, in time and in bytes.

The fewest bytes of a part are those of its inputs and outputs, each read or written once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.bench.counting import Counting
from megatron.remoe.bench.layer import Shape, inputs
from megatron.remoe.bench.roofline import combine_work, gather_work, permutation_work
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
    tokens = x.numel() * x.element_size()
    gates = shape.tokens * shape.num_experts

    def route_and_back() -> None:
        torch.autograd.grad(route()[0], (x, router), probs.detach().float())

    def permute_and_back() -> None:
        outputs = permute(x, probs, permutation)
        torch.autograd.grad(outputs, (x, probs), (grad_rows, grad_probs))

    def combine_and_back() -> None:
        torch.autograd.grad(combine(rows, permutation), rows, x.detach())

    weights = router.numel() * router.element_size()
    works = (permutation_work(shape), gather_work(shape), combine_work(shape))
    indices, gathered, combined = (sum(work.bytes for work in passes) for passes in works)
    return [
        _part(COPY, lambda: x.detach().clone(), 2 * tokens),
        _part("router", route_and_back, 3 * tokens + 3 * weights + gates * (4 + 1 + 4)),
        _part("permutation", lambda: Permutation.of(routing_map, count), indices),
        _part("permute", permute_and_back, gathered),
        _part("combine", combine_and_back, combined),
    ]


def _part(name: str, run: Callable[[], Any], fewest: int) -> Alternative:
    with Counting() as counting:
        run()
    touched = counting.count.bytes
    facts = {
        "fewest MB": f"{fewest / 1e6:.1f}",
        "touched MB": f"{touched / 1e6:.1f}",
        "touched / fewest": f"{touched / fewest:.2f}",
    }
    return Alternative(name, run, facts)
