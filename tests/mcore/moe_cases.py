"""What the ranks run: one MoE layer of our Megatron modules, with weights known on every rank.

Shapes: s sequence, b batch, H hidden, E experts, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.remoe.ranks import initialize_layout
from remoe.config import ReLURouting, Routing
from remoe.reference import reference_l1, reference_moe, reference_routing

HIDDEN, WIDTH, EXPERTS, SEQUENCE, BATCH = 8, 6, 4, 8, 2


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a layer."""

    dispatcher: str = "alltoall"
    ep: int = 1
    tp: int = 1
    expert_tp: int = 1
    grouped: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a rank saw: its part of the output, and gradients of full weights, summed over ranks."""

    output: Tensor
    grad_input: Tensor
    grad_router: Tensor
    grad_fc1: Tensor
    grad_fc2: Tensor
    stats: Tensor


def inputs(rank: int, seed: int = 0) -> Tensor:
    """The tokens of a data-parallel rank, `[s, b, H]`."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) + 1


def weights(shift: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Router `[E, H]`, fc1 `[E, 2F, H]`, fc2 `[E, H, F]`; `shift` makes routing denser."""
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator) + shift
    fc1 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    fc2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
    return router, fc1, fc2


def initialize(layout: Layout) -> None:
    """Process groups of a layout, replacing those of the case before."""
    initialize_layout(tensor=layout.tp, expert=layout.ep, expert_tensor=layout.expert_tp)


def transformer_config(layout: Layout, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 1,
        "moe_ffn_hidden_size": WIDTH,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": layout.dispatcher,
        "moe_grouped_gemm": layout.grouped,
        "expert_model_parallel_size": layout.ep,
        "tensor_model_parallel_size": layout.tp,
        "expert_tensor_parallel_size": layout.expert_tp,
        "sequence_parallel": layout.tp > 1,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
    }
    return TransformerConfig(**(defaults | changes))


def build_layer(
    layout: Layout,
    shift: float,
    l1_coeff: float = 1e-8,
    load_balancing: str = "aux_loss",
    max_assignments: int | None = None,
    routing_changes: dict[str, object] | None = None,
    routing: Routing | None = None,
    fill: bool = True,
    **changes,
):
    """Our MoE layer in training mode, with its part of the known weights."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec

    initialize(layout)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    config = transformer_config(layout, **changes)
    routing = routing or ReLURouting(
        l1_coeff_init=l1_coeff,
        load_balancing=load_balancing,
        max_assignments=max_assignments,
        **(routing_changes or {}),
    )
    spec = block_spec(config, routing).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    if not fill:
        return layer.train()
    router, fc1, fc2 = weights(shift)
    with torch.no_grad():
        layer.router.weight.copy_(router)
        for index, (ours1, ours2) in local_experts(layer):
            ours1.copy_(fc1[index])
            ours2.copy_(fc2[index])
    return layer.train()


def local_experts(layer, part=lambda weight: weight):
    """(global index, fc1 and fc2) of every expert of this rank; `part` is of a parameter."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        pairs = [
            (part(e.linear_fc1.weight), part(e.linear_fc2.weight)) for e in experts.local_experts
        ]
    else:
        pairs = zip(part(experts.linear_fc1), part(experts.linear_fc2), strict=True)
    return zip(layer.local_expert_indices, pairs, strict=True)


def run_layer(layout: Layout, shift: float, l1_coeff: float, **changes) -> Outcome:
    """Forward and backward of `sum(output * direction)` plus the penalty, on this rank's tokens."""
    layer = build_layer(layout, shift, l1_coeff, **changes)
    return outcome_of(layer, shift)


def outcome_of(layer, shift: float) -> Outcome:
    rank = torch.distributed.get_rank()
    x = inputs(rank).requires_grad_()
    output, _ = layer(x)
    (output * direction(rank)).sum().backward()

    grads = [torch.zeros_like(w) for w in weights(shift)]
    grads[0] += layer.router.weight.grad
    for index, (grad1, grad2) in local_experts(layer, lambda weight: weight.grad):
        assert grad1 is not None, f"expert {index} has no gradient"
        grads[1][index] += grad1
        grads[2][index] += grad2
    for grad in grads:
        torch.distributed.all_reduce(grad)
    return Outcome(output.detach(), x.grad, *grads, layer.router.stats.clone())


def direction(rank: int) -> Tensor:
    """A fixed direction in output space, so that every output matters differently."""
    generator = torch.Generator().manual_seed(77 + rank)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)


def expected(
    world: int, shift: float, l1_coeff: float, route: Callable = reference_routing
) -> list[Outcome]:
    """The same by the plain-loop reference, every rank's tokens being one micro-batch."""
    parameters = [w.requires_grad_() for w in weights(shift)]
    router, fc1, fc2 = parameters
    outputs, losses, counts, tokens = [], [], [], []
    for rank in range(world):
        x = inputs(rank).requires_grad_()
        flat = x.view(-1, HIDDEN)
        probs = route(flat, router)
        y = reference_moe(flat, probs, fc1, fc2).view_as(x)
        l1 = reference_l1(probs, topk=1, load_balancing=True)
        losses.append((y * direction(rank)).sum() + l1_coeff * l1)
        outputs.append(y.detach())
        counts.append((l1.detach(), probs > 0))
        tokens.append(x)
    grads = torch.autograd.grad(sum(losses), [*tokens, *parameters], materialize_grads=True)
    return [
        Outcome(
            outputs[rank],
            grads[rank],
            *grads[world:],
            torch.tensor([l1, 1, len(active), *active.sum(dim=0), 0], dtype=torch.float64),
        )
        for rank, (l1, active) in enumerate(counts)
    ]
