"""The roofline of a ReMoE layer: what its operations move and launch, and what a GPU allows.

The fewest bytes of an operation are those of its inputs and outputs, each once. What the code moves
is counted while it runs: in torch on fake tensors, which have sizes and no values, and in Triton by
recording launches. No GPU is needed, and no time is measured.

Shapes: T tokens, H hidden, E experts, F expert width, A = T k active (token, expert) pairs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.analysis.gpus import GPU
from megatron.remoe.analysis.memory import RankLoad
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.bench.counting import Count, Counting
from megatron.remoe.bench.layer import Shape
from megatron.remoe.testing.launches import recorded_launches
from remoe.kernels import Permutation, combine, permute
from remoe.kernels.loading import triton_kernels
from remoe.kernels.router import relu_router_in_torch

_INDEX, _FP32, _FLAG = 8, 4, 1  # bytes of an index, of a logit, and of an entry of the map
PRODUCTS = "experts' products"


@dataclass(frozen=True)
class Work:
    """What one pass of an operation has to do.

    Attributes:
        bytes: of inputs and outputs.
        flops: operations of its matrix products.
        fp32: whether these are in fp32, outside of tensor cores.
    """

    bytes: int = 0
    flops: int = 0
    fp32: bool = False

    def seconds(self, gpu: GPU) -> float:
        """Return the time that the memory of a GPU allows, or its cores if they allow less."""
        return max(self.bytes / gpu.bandwidth, self.flops / (gpu.fp32 if self.fp32 else gpu.bf16))


class Passes[T](NamedTuple):
    """Something about the forward and the backward pass of an operation."""

    forward: T
    backward: T


def logits_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the product of tokens and router, in fp32."""
    item, logits = s.dtype.itemsize, _FP32 * s.tokens * s.num_experts
    given = item * (s.tokens + s.num_experts) * s.hidden_size
    flops = 2 * s.tokens * s.num_experts * s.hidden_size
    return Passes(Work(given + logits, flops, True), Work(2 * given + logits, 2 * flops, True))


def router_work(s: Shape) -> Passes[Work]:
    """Return the fewest of gates and map (Eq. 5), and of the sums and counts of every expert.

    Backward reads the gradients of gates and sums, which have the gradient of the penalty.
    """
    entries, item = s.tokens * s.num_experts, s.dtype.itemsize
    moved = entries * (_FP32 + item + _FLAG)
    sums, counts = _FP32 * s.num_experts, _INDEX * (s.num_experts + 3)
    return Passes(Work(moved + sums + counts), Work(moved + sums))


def permutation_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the map's pairs, by expert and by token; there is no gradient."""
    return Passes(
        Work(s.tokens * s.num_experts * _FLAG + _INDEX * (3 * s.pairs + s.tokens)), Work()
    )


def gather_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the rows of tokens for their experts, and of their gates.

    Backward writes the gradient of all gates, also of those that are not active.
    """
    item = s.dtype.itemsize
    rows = item * (s.tokens + s.pairs) * s.hidden_size
    entries = s.tokens * s.num_experts
    return Passes(
        Work(rows + 2 * item * s.pairs + 2 * _INDEX * s.pairs),
        Work(rows + item * (s.pairs + entries) + _INDEX * (2 * s.pairs + s.tokens)),
    )


def products_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the experts' two products, and of the four of their gradients."""
    item, hidden, width = s.dtype.itemsize, s.hidden_size, s.ffn_hidden_size
    gate_up = s.pairs * (hidden + 2 * width) + s.num_experts * 2 * width * hidden
    down = s.pairs * (hidden + width) + s.num_experts * width * hidden
    moved, flops = item * (gate_up + down), 6 * s.pairs * hidden * width
    fp32 = s.dtype == torch.float32
    return Passes(Work(moved, flops, fp32), Work(2 * moved, 2 * flops, fp32))


def swiglu_work(s: Shape) -> Passes[Work]:
    """Return the fewest of `silu(gate) * up`.

    Backward reads the product with gate and up and the gradient of the activation, and writes the
    activation for the gradient of the weights, the gradient of the product, and that of the gates.
    """
    item, width = s.dtype.itemsize, s.ffn_hidden_size
    return Passes(Work(item * s.pairs * 3 * width), Work(item * s.pairs * (6 * width + 1)))


def weighting_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the weights of rows (Eq. 1), which can be part of the activation.

    Our kernels in Triton then read the gates, and nothing else more.
    """
    gates = s.dtype.itemsize * s.pairs
    return Passes(Work(gates), Work(gates))


def combine_work(s: Shape) -> Passes[Work]:
    """Return the fewest of the sum of every token's rows."""
    rows = s.dtype.itemsize * (s.tokens + s.pairs) * s.hidden_size
    indices = _INDEX * s.pairs
    return Passes(Work(rows + indices + _INDEX * s.tokens), Work(rows + indices))


FEWEST: dict[str, Callable[[Shape], Passes[Work]]] = {
    "logits": logits_work,
    "router": router_work,
    "permutation": permutation_work,
    "gather": gather_work,
    PRODUCTS: products_work,
    "SwiGLU": swiglu_work,
    "weighting": weighting_work,
    "combine": combine_work,
}


def counted_in_torch(s: Shape) -> dict[str, Passes[Count]]:
    """Count what the operations launch and move in torch."""
    with FakeTensorMode():
        x, logits = _new(s, s.tokens, s.hidden_size), _logits(s)
        router = _new(s, s.num_experts, s.hidden_size)
        routed = relu_router_in_torch(logits, dtype=s.dtype)
        probs, routing_map = routed.probs_TE.detach().requires_grad_(), routed.routing_map_TE
        with Counting(s.pairs):
            permutation = Permutation.of(routing_map, s.pairs)
        rows = _new(s, s.pairs, s.hidden_size)
        count = partial(_count, num_pairs=s.pairs)
        return {
            "logits": count(lambda: F.linear(x.float(), router.float()), (x, router)),
            "router": count(lambda: _gates_and_sums(logits, s.dtype), logits),
            "permutation": count(lambda: Permutation.of(routing_map, s.pairs)),
            "gather": count(lambda: permute(x, probs, permutation), (x, probs)),
            **_of_experts(s),
            "combine": count(lambda: combine(rows, permutation), rows),
        }


def counted_in_triton(s: Shape) -> dict[str, Passes[Count]]:
    """Count the same with our kernels in Triton.

    Raises:
        ValueError: Triton cannot launch anything (`recorded_launches`).
    """
    kernels = triton_kernels()
    with FakeTensorMode():
        x, rows = _new(s, s.tokens, s.hidden_size), _new(s, s.pairs, s.hidden_size)
        prob, probs, logits = _new(s, s.pairs), _new(s, s.tokens, s.num_experts), _logits(s)
        token_A, entry_A, by_token_A = (torch.zeros(s.pairs, dtype=torch.int64) for _ in range(3))
        starts_T = torch.zeros(s.tokens, dtype=torch.int64)
        routing_map = probs > 0
        count = partial(_count, in_triton=True)
        gather = count(lambda: kernels.gather(x, token_A, probs, entry_A))
        gather_backward = count(
            lambda: kernels.gather_backward(
                rows, prob, by_token_A, starts_T, entry_A, s.num_experts
            )
        )
        combined = count(lambda: kernels.sum_by_token(rows, by_token_A, starts_T))
        combined_backward = count(lambda: kernels.gather(x, token_A))
        z, grad_h = (_new(s, s.pairs, n * s.ffn_hidden_size) for n in (2, 1))
        swiglu = count(lambda: kernels.weighted_swiglu(z, prob))
        swiglu_backward = count(lambda: kernels.weighted_swiglu_backward(z, prob, grad_h))
        return counted_in_torch(s) | {
            "router": count(lambda: kernels.relu_router(logits, None, s.dtype)[:3:2], logits),
            "permutation": count(lambda: kernels.count_permutation(routing_map, s.pairs)),
            "gather": Passes(gather.forward, gather_backward.forward),
            "SwiGLU": Passes(swiglu.forward, swiglu_backward.forward),
            "weighting": Passes(Count(), Count()),  # is part of the SwiGLU
            "combine": Passes(combined.forward, combined_backward.forward),
        }


def _of_experts(s: Shape) -> dict[str, Passes[Count]]:
    """Return what the experts launch and move where `grouped_mm` takes all of them in one launch.

    In Triton the products are the same. Without it, torch.compile makes one kernel of the
    activation, and two of its gradients: one for the product with gate and up, and one for the
    activation and the gates. Every weighting reads and writes rows of width H; backward has three.
    """
    item = s.dtype.itemsize
    products = products_work(s)
    activations, gates = item * s.pairs * s.ffn_hidden_size, item * s.pairs
    rows = item * s.pairs * 2 * s.hidden_size + gates
    return {
        PRODUCTS: Passes(Count(2, products.forward.bytes), Count(4, products.backward.bytes)),
        "SwiGLU": Passes(Count(1, 3 * activations), Count(2, 9 * activations + gates)),
        "weighting": Passes(Count(1, rows), Count(3, 3 * rows)),
    }


def _gates_and_sums(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    routed = relu_router_in_torch(logits, dtype=dtype)
    return routed.probs_TE, routed.sum_E


def _new(s: Shape, *size: int) -> Tensor:
    return torch.zeros(size, dtype=s.dtype, requires_grad=True)


def _logits(s: Shape) -> Tensor:
    return torch.zeros(s.tokens, s.num_experts, requires_grad=True)


def _count(
    run: Callable[[], Any],
    inputs: Any = None,
    *,
    num_pairs: int | None = None,
    in_triton: bool = False,
) -> Passes[Count]:
    """Count the forward pass, and the backward pass to the inputs if there are any."""
    with _counting(num_pairs, in_triton) as forward:
        outputs = run()
    if inputs is None:
        return Passes(forward.count, Count())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [torch.zeros_like(output) for output in outputs]
    with _counting(num_pairs, in_triton) as backward:
        torch.autograd.grad(outputs, inputs, given)
    return Passes(forward.count, backward.count)


@contextmanager
def _counting(num_pairs: int | None, in_triton: bool) -> Iterator[Counting]:
    counting = Counting(num_pairs)
    launches: AbstractContextManager[None] = nullcontext()
    if in_triton:
        launches = recorded_launches(lambda _, *arguments: counting.add(arguments))
    with launches, counting:
        yield counting


@dataclass(frozen=True)
class Roofline:
    """What the operations of a layer must do, and what they do in torch and in Triton.

    Attributes:
        fewest: by operation.
        in_torch, in_triton: what was counted.
    """

    fewest: dict[str, Passes[Work]]
    in_torch: dict[str, Passes[Count]]
    in_triton: dict[str, Passes[Count]]

    @classmethod
    def of(cls, s: Shape) -> "Roofline":
        """Return that of a layer; a ValueError is that of `recorded_launches`."""
        fewest = {name: work(s) for name, work in FEWEST.items()}
        return cls(fewest, counted_in_torch(s), counted_in_triton(s))

    def seconds(
        self, gpu: GPU, counted: dict[str, Passes[Count]] | None = None, *, forwards: int = 1
    ) -> float:
        """Return the time that a GPU allows for all operations but the experts' products.

        Args:
            gpu: the GPU.
            counted: what moves; the fewest bytes if it is not given.
            forwards: the number of forward passes for a backward pass, 2 with recomputation.
        """
        total = 0.0
        for name, passes in self.fewest.items():
            if name != PRODUCTS:
                moved = passes if counted is None else _moving(passes, counted[name])
                total += forwards * moved.forward.seconds(gpu) + moved.backward.seconds(gpu)
        return total


def _moving(passes: Passes[Work], counted: Passes[Count]) -> Passes[Work]:
    forward, backward = (
        replace(work, bytes=count.bytes) for work, count in zip(passes, counted, strict=True)
    )
    return Passes(forward, backward)


@dataclass(frozen=True)
class Share:
    """What the operations around the experts take of a micro-batch on one GPU, in seconds.

    Attributes:
        products: the model's matrix products and attention, at the peak of the GPU.
        fewest, in_torch, in_triton: our operations, by what they move.
    """

    products: float
    fewest: float
    in_torch: float
    in_triton: float

    def of_step(self, ours: float) -> float:
        """Return the part of a step that our operations take."""
        return ours / (self.products + ours)

    @property
    def to_win(self) -> float:
        """The part of a step with our kernels in Triton that the fewest bytes would save."""
        return (self.in_triton - self.fewest) / (self.products + self.in_triton)


def share(size: ModelSize, load: RankLoad, gpu: GPU) -> Share:
    """Return the share of a model of ReLU routing in its stable stage.

    The optimizer, communication, norms, and everything on the host are left out, so that the share
    of a real step is smaller. Products are at their peak, which no step reaches.

    Args:
        size: the model.
        load: its micro-batch, and what is recomputed.
        gpu: the GPU, which holds whole layers.
    """
    shape = Shape(
        tokens=load.micro_batch * size.seq_length,
        hidden_size=size.hidden,
        ffn_hidden_size=size.expert_width,
        num_experts=size.num_experts,
        topk=size.topk,
        dtype=torch.bfloat16 if load.bytes_per_value == 2 else torch.float32,
    )
    layers, roofline = size.num_moe_layers, Roofline.of(shape)
    flops = load.micro_batch * size.flops_per_sequence
    if load.recompute == "full":
        flops += flops // 3
    if load.recompute == "moe":
        flops += layers * products_work(shape).forward.flops
    seconds = partial(roofline.seconds, gpu, forwards=1 if load.recompute == "none" else 2)
    peak = gpu.bf16 if shape.dtype == torch.bfloat16 else gpu.fp32
    return Share(
        flops / peak,
        layers * seconds(),
        layers * seconds(roofline.in_torch),
        layers * seconds(roofline.in_triton),
    )
