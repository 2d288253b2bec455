"""One MoE layer, forward and backward: ours, Megatron's, Hugging Face's, and the dense limit.

Shapes: T tokens, H hidden, E experts, F expert width.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.bench.timing import Alternative
from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty
from remoe.routing import tokens_per_expert

DENSE = "dense SwiGLU of equal active FLOPs"


class Like(TypedDict):
    """Where tensors are, and their dtype, as torch's keyword arguments."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """What is compared; T * k assignments, however the router distributes them."""

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    num_experts: int
    topk: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def like(self) -> Like:
        return {"device": self.device, "dtype": self.dtype}


def inputs(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens `[T, H]` and router `[E, H]` with exactly T * k positive logits.

    The first three features of every token are 1, and their weights add up to minus the threshold
    that lets T * k logits through, which three bf16 numbers hold as exactly as one fp32 number.
    Routing is that of a ReLU router, uneven over tokens and experts.

    Raises:
        ValueError: ties make T * k impossible.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.hidden_size, generator=generator)
    router = 0.02 * torch.randn(shape.num_experts, shape.hidden_size, generator=generator)
    x[:, :3], router[:, :3] = 1, 0
    x, router = x.to(**shape.like), router.to(**shape.like)
    wanted = shape.tokens * shape.topk
    rest = -threshold(F.linear(x.float(), router.float()), wanted)
    for feature in range(3):
        router[:, feature] = rest
        rest = rest - router[0, feature].float()
    found = int((F.linear(x.float(), router.float()) > 0).sum())
    if abs(found - wanted) > wanted // 1000:  # logits that are nearly the threshold are rounded
        raise ValueError(f"{found} assignments instead of {wanted}; choose another size or seed")
    return x, router


def threshold(logits: Tensor, count: int) -> Tensor:
    """A value that so many logits are above, halfway to the next one."""
    highest = logits.flatten().topk(min(count + 1, logits.numel())).values
    return (highest[count - 1] + highest[-1]) / 2


def weights(shape: Shape, *leading: int, topk: int = 1) -> tuple[Tensor, Tensor]:
    """`gate_up` `[..., 2F, H]` and `down` `[..., H, F]`, with F times `topk`."""
    generator = torch.Generator().manual_seed(1)
    width, hidden = shape.ffn_hidden_size * topk, shape.hidden_size
    gate_up = 0.02 * torch.randn(*leading, 2 * width, hidden, generator=generator)
    down = 0.02 * torch.randn(*leading, hidden, width, generator=generator)
    return gate_up.to(**shape.like), down.to(**shape.like)


def alternatives(shape: Shape) -> list[Alternative]:
    """Everything at one shape. Process groups of one rank must exist (`initialize`)."""
    x, router = inputs(shape)
    parts = (shape, x, router, *weights(shape, shape.num_experts))
    dense = _dense(x, *weights(shape, topk=shape.topk))
    return [dense, remoe_layer(shape), *_megatron(*parts), *_hugging_face(*parts)]


def remoe_layer(shape: Shape) -> Alternative:
    """`remoe.ReMoELayer`, with its penalty."""
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
    return _step(name, layer, x, lambda x: layer(x), lambda: l1_penalty(layer))


def _dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Alternative:
    layer = torch.nn.ParameterList([gate_up, down])

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
    """Process groups of one rank, which Megatron's layers need."""
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


def _megatron(
    shape: Shape, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor
) -> list[Alternative]:
    """Our modules in Megatron with both routers, and Megatron's own layer."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ReLURouting

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=shape.device))
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    relu, topk = megatron_config(shape), megatron_config(shape, **balanced)
    sequential = megatron_config(shape, **balanced, moe_grouped_gemm=False)
    variants = [
        ("ReMoE in Megatron", relu, block_spec(relu, ReLURouting())),
        ("TopK in our layer", topk, block_spec(topk, None)),
        (
            "TopK, Megatron's sequential experts",
            sequential,
            get_gpt_decoder_block_spec(sequential, use_transformer_engine=False),
        ),
    ]
    if HAVE_TE:  # unverified where this was written
        spec = get_gpt_decoder_block_spec(topk, use_transformer_engine=True)
        variants.append(("TopK, Transformer Engine's experts", topk, spec))
    found = []
    for name, config, spec in variants:
        layer = megatron_layer(shape, config, spec, router, gate_up, down)
        found.append(_step(name, layer, x.unsqueeze(1), partial(_output, layer)))
    return found


def _output(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What one of Megatron's layers returns beside its bias."""
    output: Tensor = layer(x)[0]
    return output


def megatron_config(shape: Shape, **changes: Any) -> Any:
    """A TransformerConfig of one layer with our modules."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": 8,
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.topk,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": shape.dtype,
        "bf16": shape.dtype == torch.bfloat16,
        "transformer_impl": "local",
    }
    return TransformerConfig(**settings | changes)


@torch.no_grad()
def megatron_layer(
    shape: Shape, config: Any, spec: Any, router: Tensor, gate_up: Tensor, down: Tensor
) -> torch.nn.Module:
    """The MoE layer of a block's spec, with known weights."""
    from megatron.remoe.moe.experts import GroupedExperts

    layer = spec.layer_specs[0].submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    layer = layer.to(**shape.like).train()
    layer.router.weight.copy_(router)
    if isinstance(layer.experts, GroupedExperts):
        layer.experts.linear_fc1.copy_(gate_up)
        layer.experts.linear_fc2.copy_(down)
    for i, expert in enumerate(getattr(layer.experts, "local_experts", [])):
        expert.linear_fc1.weight.copy_(gate_up[i])
        expert.linear_fc2.weight.copy_(down[i])
    module: torch.nn.Module = layer
    return module


def _hugging_face(
    shape: Shape, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor
) -> list[Alternative]:
    """Mixtral's and OLMoE's blocks, each with both of transformers' portable implementations."""
    from transformers import MixtralConfig, OlmoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_experts_per_tok": shape.topk,
    }
    blocks: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "Mixtral": (
            MixtralSparseMoeBlock,
            MixtralConfig(**sizes, num_local_experts=shape.num_experts),
        ),
        "OLMoE": (OlmoeSparseMoeBlock, OlmoeConfig(**sizes, num_experts=shape.num_experts)),
    }
    found = []
    for name, (block, config) in blocks.items():
        for implementation in ("eager", "grouped_mm"):
            config._experts_implementation = implementation
            layer = block(config).to(**shape.like).train()
            with torch.no_grad():
                layer.gate.weight.copy_(router)
                layer.experts.gate_up_proj.copy_(gate_up)
                layer.experts.down_proj.copy_(down)
            label = f"TopK, Hugging Face {name} ({implementation})"
            found.append(_step(label, layer, x.unsqueeze(0), layer))
    return found


def assignments(shape: Shape) -> dict[str, float]:
    """Facts about the routing that ReMoE is timed with."""
    x, router = inputs(shape)
    active = F.linear(x.float(), router.float()) > 0
    load = tokens_per_expert(active)
    per_token = active.sum(dim=1)
    return {
        "assignments": int(load.sum()),
        "busiest_expert": int(load.max()),
        "idlest_expert": int(load.min()),
        "most_experts_of_a_token": int(per_token.max()),
        "tokens_without_expert": int((per_token == 0).sum()),
    }
