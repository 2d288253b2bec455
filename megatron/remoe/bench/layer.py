"""One MoE layer, forward and backward: ours, Megatron's, Hugging Face's, and the dense limit.

Shapes: T tokens, H hidden, E experts, F expert width, k active experts per token on average.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.bench.timing import Alternative
from megatron.remoe.testing.golden import transformer_config
from remoe import ReMoELayer, ReMoELayerConfig, SoftMoELayer, SoftMoELayerConfig, l1_penalty
from remoe.kernels.experts import DOWN, GATE_UP, WeightGrads, blocks_of, multiply
from remoe.routing import tokens_per_expert
from remoe.soft import slots_for_equal_flops

DENSE = "dense SwiGLU of equal active FLOPs"


class Like(TypedDict):
    """Device and dtype of tensors, as keyword arguments of torch."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its input; routing makes T * k assignments."""

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    num_experts: int
    topk: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def like(self) -> Like:
        """Device and dtype of its tensors."""
        return {"device": self.device, "dtype": self.dtype}

    @property
    def pairs(self) -> int:
        """The number of active (token, expert) pairs."""
        return self.tokens * self.topk


class Inputs(NamedTuple):
    """Tokens `[T, H]` and router weights `[E, H]`."""

    x: Tensor
    router: Tensor


class ExpertWeights(NamedTuple):
    """Weights of SwiGLU experts: `gate_up` `[..., 2F, H]` and `down` `[..., H, F]`."""

    gate_up: Tensor
    down: Tensor


def inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Return tokens, and a router that has exactly T * k positive logits for them.

    The first three features of every token are 1, and their weights add up to minus the threshold
    that lets T * k logits through, which three bf16 numbers hold as exactly as one fp32 number.
    Routing is that of a ReLU router, uneven over tokens and experts.

    Raises:
        ValueError: ties make T * k assignments impossible.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.hidden_size, generator=generator)
    router = 0.02 * torch.randn(shape.num_experts, shape.hidden_size, generator=generator)
    x[:, :3], router[:, :3] = 1, 0
    found = Inputs(x.to(**shape.like), router.to(**shape.like))
    wanted = shape.tokens * shape.topk
    rest = -threshold(_logits(found), wanted)
    for feature in range(3):
        found.router[:, feature] = rest
        rest = rest - found.router[0, feature].float()
    positive = int((_logits(found) > 0).sum())
    if abs(positive - wanted) > wanted // 1000:  # logits that are nearly the threshold are rounded
        raise ValueError(f"{positive} assignments instead of {wanted}; choose another size or seed")
    return found


def _logits(inputs: Inputs) -> Tensor:
    return F.linear(inputs.x.float(), inputs.router.float())


def _counts(shape: Shape) -> list[int]:
    counts: list[int] = tokens_per_expert(_logits(inputs(shape)) > 0).tolist()
    return counts


def threshold(logits: Tensor, count: int) -> Tensor:
    """Return a value that `count` of the logits are above, halfway to the next logit."""
    highest = logits.flatten().topk(min(count + 1, logits.numel())).values
    return (highest[count - 1] + highest[-1]) / 2


def weights(shape: Shape, *leading: int, topk: int = 1) -> ExpertWeights:
    """Return weights of experts, or of one MLP that is `topk` times as wide as an expert."""
    generator = torch.Generator().manual_seed(1)
    width, hidden = shape.ffn_hidden_size * topk, shape.hidden_size
    gate_up = 0.02 * torch.randn(*leading, 2 * width, hidden, generator=generator)
    down = 0.02 * torch.randn(*leading, hidden, width, generator=generator)
    return ExpertWeights(gate_up.to(**shape.like), down.to(**shape.like))


def alternatives(shape: Shape) -> list[Alternative]:
    """Return every alternative at one shape; process groups must exist (`initialize`)."""
    given, experts = inputs(shape), weights(shape, shape.num_experts)
    return [
        _dense(given.x, weights(shape, topk=shape.topk)),
        remoe_layer(shape),
        matrix_products(shape),
        *_megatron(shape, given, experts),
        *_hugging_face(shape, given, experts),
    ]


def remoe_layer(shape: Shape) -> Alternative:
    """Return `remoe.ReMoELayer`, with its penalty."""
    x, router = inputs(shape)
    config = ReMoELayerConfig(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_experts=shape.num_experts,
        topk=shape.topk,
    )
    layer = ReMoELayer(config, **shape.like)
    values = (router, *weights(shape, shape.num_experts))
    for parameter, value in zip(layer.parameters(), values, strict=True):
        parameter.data = value
    name = f"ReMoE, E={shape.num_experts}"
    return _step(name, layer, x, layer, lambda: l1_penalty(layer))


def matrix_products(shape: Shape) -> Alternative:
    """Return the matrix products of the experts of `remoe_layer` alone, a bound on its time.

    Every expert has two products forward and four backward, which read weights and write gradients
    as those of the layer do. Shapes, strides and order are the layer's, and values are not.
    """
    counts = _counts(shape)
    width, experts = shape.ffn_hidden_size, weights(shape, shape.num_experts)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(sum(counts), shape.hidden_size, generator=generator).to(**shape.like)

    def run() -> tuple[Tensor | None, ...]:
        blocks = blocks_of(rows, counts, width)
        kept = []
        for b in blocks:
            z = multiply(b.rows_of(rows), b.weight_of(experts.gate_up).mT, b.segments)
            multiply(z[:, :width], b.weight_of(experts.down).mT, b.segments)
            kept.append(z)
        grads = WeightGrads(experts, (True, True), counts)
        for b, z in zip(blocks, kept, strict=True):
            grad_y = b.rows_of(rows)
            multiply(grad_y, b.weight_of(experts.down), b.segments)
            grads.add(DOWN, b.expert, grad_y.mT, z[:, :width], b.segments)
            grads.add(GATE_UP, b.expert, z.mT, grad_y, b.segments)
            multiply(z, b.weight_of(experts.gate_up), b.segments)
        return grads.result()

    return Alternative(products_name(shape.num_experts), run)


def products_name(num_experts: int) -> str:
    """Return the name of the row of `matrix_products`."""
    return f"matrix products of ReMoE alone, E={num_experts}"


def soft_alternatives(shapes: list[Shape], sequence: int) -> list[Alternative]:
    """Return the dense MLP and Soft MoE of every shape, whose experts cost what the MLP costs.

    The column `FLOPs / dense` has those of logits, slots and outputs too, which grow with the
    length of a sequence.

    Args:
        shapes: layers that differ in their number of experts; `topk` has no meaning.
        sequence: tokens of a sequence, and slots of all experts.

    Raises:
        ValueError: sequences do not divide the tokens, or experts the slots.
    """
    first = shapes[0]
    if sequence < 1 or first.tokens % sequence:
        raise ValueError(
            f"sequence is {sequence}, which does not divide the {first.tokens} tokens; choose a "
            f"length that divides them"
        )
    generator = torch.Generator().manual_seed(0)
    size = (first.tokens // sequence, sequence, first.hidden_size)
    x = torch.randn(size, generator=generator).to(**first.like)
    dense_flops = 6 * sequence * first.hidden_size * first.ffn_hidden_size
    configs = [
        SoftMoELayerConfig(
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_experts=shape.num_experts,
            slots_per_expert=slots_for_equal_flops(sequence, shape.num_experts),
        )
        for shape in shapes
    ]
    found = [replace(_dense(x, weights(first)), facts={"FLOPs / dense": "1.000"})]
    for config in configs:
        layer = SoftMoELayer(config, **first.like)
        facts = {"FLOPs / dense": f"{config.flops(sequence) / dense_flops:.3f}"}
        name = soft_name(config.num_experts)
        found.append(replace(_step(name, layer, x, layer), facts=facts))
    return found


def soft_name(num_experts: int) -> str:
    """Return the name of a row of `soft_alternatives`."""
    return f"Soft MoE, E={num_experts}"


def _dense(x: Tensor, weights: ExpertWeights) -> Alternative:
    layer = torch.nn.ParameterList(weights)

    def forward(x: Tensor) -> Tensor:
        gate, up = F.linear(x, layer[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer[1])

    return _step(DENSE, layer, x, forward)


def _step(
    name: str,
    module: torch.nn.Module,
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    penalty: Callable[[], Tensor] | None = None,
) -> Alternative:
    x = x.clone().requires_grad_()
    direction = torch.ones_like(x)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        y = forward(x)
        if penalty is None:
            y.backward(direction.view_as(y))  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([y, penalty()], [direction.view_as(y), None])

    return Alternative(name, run)


def initialize() -> None:
    """Make process groups of one rank, which Megatron's layers need."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron.remoe import cpu

    if not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        backend = "gloo" if cpu.is_enabled() else "nccl"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)


def _megatron(shape: Shape, given: Inputs, experts: ExpertWeights) -> list[Alternative]:
    """Return our modules in Megatron with both routers, and Megatron's own layers."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ReLURouting

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=shape.device))
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    relu, topk = megatron_config(shape), megatron_config(shape, **balanced)
    sequential = megatron_config(shape, **balanced, moe_grouped_gemm=False)
    sequential_spec = get_gpt_decoder_block_spec(sequential, use_transformer_engine=False)
    variants = [
        ("ReMoE in Megatron", relu, block_spec(relu, ReLURouting())),
        ("TopK in our layer", topk, block_spec(topk, None)),
        ("TopK, Megatron's sequential experts", sequential, sequential_spec),
    ]
    if HAVE_TE:  # has not been run where this was written
        spec = get_gpt_decoder_block_spec(topk, use_transformer_engine=True)
        variants.append(("TopK, Transformer Engine's experts", topk, spec))
    found = []
    for name, config, spec in variants:
        layer = megatron_layer(config, spec, shape, given.router, experts)
        found.append(_step(name, layer, given.x.unsqueeze(1), partial(_output, layer)))
    return found


def _output(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Return the output of one of Megatron's layers, without its bias."""
    output: Tensor = layer(x)[0]
    return output


def megatron_config(shape: Shape, **changes: Any) -> Any:
    """Return a TransformerConfig of one layer with our modules; `changes` are fields of it."""
    sizes = {"L": 1, "H": shape.hidden_size, "F": shape.ffn_hidden_size, "heads": 8, "groups": 8,
             "E": shape.num_experts, "k": shape.topk, "G": 1}  # fmt: skip
    fields: dict[str, Any] = {
        "moe_grouped_gemm": True,
        "params_dtype": shape.dtype,
        "bf16": shape.dtype == torch.bfloat16,
    }
    return transformer_config(sizes, **fields | changes)


@torch.no_grad()
def megatron_layer(
    config: Any, spec: Any, shape: Shape, router: Tensor, experts: ExpertWeights
) -> torch.nn.Module:
    """Return the MoE layer of a block's spec, with given weights."""
    from megatron.remoe.moe.experts import GroupedExperts

    layer = spec.layer_specs[0].submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    layer = layer.to(**shape.like).train()
    layer.router.weight.copy_(router)
    if isinstance(layer.experts, GroupedExperts):
        layer.experts.linear_fc1.copy_(experts.gate_up)
        layer.experts.linear_fc2.copy_(experts.down)
    for i, expert in enumerate(getattr(layer.experts, "local_experts", [])):
        expert.linear_fc1.weight.copy_(experts.gate_up[i])
        expert.linear_fc2.weight.copy_(experts.down[i])
    module: torch.nn.Module = layer
    return module


def _hugging_face(shape: Shape, given: Inputs, experts: ExpertWeights) -> list[Alternative]:
    """Return the blocks of Mixtral and OLMoE, each with both portable implementations."""
    from transformers import MixtralConfig, OlmoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_experts_per_tok": shape.topk,
    }
    mixtral = MixtralConfig(**sizes, num_local_experts=shape.num_experts)
    olmoe = OlmoeConfig(**sizes, num_experts=shape.num_experts)
    blocks: list[tuple[str, Callable[[Any], Any], Any]] = [
        ("Mixtral", MixtralSparseMoeBlock, mixtral),
        ("OLMoE", OlmoeSparseMoeBlock, olmoe),
    ]
    found = []
    for name, block, config in blocks:
        for implementation in ("eager", "grouped_mm"):
            config._experts_implementation = implementation
            layer = block(config).to(**shape.like).train()
            with torch.no_grad():
                layer.gate.weight.copy_(given.router)
                layer.experts.gate_up_proj.copy_(experts.gate_up)
                layer.experts.down_proj.copy_(experts.down)
            label = f"TopK, Hugging Face {name} ({implementation})"
            found.append(_step(label, layer, given.x.unsqueeze(0), layer))
    return found


def assignments(shape: Shape) -> dict[str, float]:
    """Return facts about the routing that ReMoE is timed with."""
    active = _logits(inputs(shape)) > 0
    load = tokens_per_expert(active)
    per_token = active.sum(dim=1)
    return {
        "assignments": int(load.sum()),
        "busiest_expert": int(load.max()),
        "idlest_expert": int(load.min()),
        "most_experts_of_a_token": int(per_token.max()),
        "tokens_without_expert": int((per_token == 0).sum()),
    }
