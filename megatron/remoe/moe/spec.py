"""Layer specs: Megatron's GPT layers with our backend, router and MoE layer put in.

`GPTModel` is built from them as they are, and `HybridModel` from their halves (`hybrid`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron.remoe import options
from megatron.remoe.moe.backend import TorchSpecProvider
from megatron.remoe.moe.chunking import budget_of
from megatron.remoe.moe.dispatcher import is_dropless
from megatron.remoe.moe.hash_router import HashRouter
from megatron.remoe.moe.layer import DroplessMoELayer
from megatron.remoe.moe.recurrent import (
    RecurrentMoELayer,
    RecurrentNullExpertsRouter,
    RecurrentSelectionRouter,
    RecurrentTopKRouter,
    add_and_take_state,
    add_to_tokens,
    norm_of_tokens,
)
from megatron.remoe.moe.router import SelectionRouter
from megatron.remoe.moe.shared_cell import SharedCell
from megatron.remoe.moe.soft import SoftMoELayer, SoftRouter
from megatron.remoe.moe.topk_router import CountingTopKRouter, NullExpertsRouter
from remoe.config import AnyRouting, Routing, Selection, SoftRouting, TopKRouting
from remoe.kernels.chunks import AssignmentBudget
from remoe.selections.hashed import HashRouting
from remoe.selections.null_experts import NullExpertsRouting

# Selections whose router is another one than `SelectionRouter`, or `RecurrentSelectionRouter`.
ROUTERS: dict[type[Selection], Any] = {
    TopKRouting: CountingTopKRouter,
    NullExpertsRouting: NullExpertsRouter,
    HashRouting: HashRouter,
}
RECURRENT_ROUTERS: dict[type[Selection], Any] = {
    TopKRouting: RecurrentTopKRouter,
    NullExpertsRouting: RecurrentNullExpertsRouter,
}


def layer_spec(
    routing: AnyRouting | None, *, bidirectional: bool = False
) -> Callable[..., TransformerBlockSubmodules]:
    """Return a value for `GPTModelConfig.transformer_layer_spec`.

    Args:
        routing: settings of a router; None keeps Megatron's TopK router, which does not count.
            Without experts in the model config the layers are dense either way.
        bidirectional: whether every token attends to all tokens that are no padding, as in BERT.
            With padding a caller gives the model an `attention_mask` as well as a `padding_mask`,
            which Megatron hands to routers only.
    """

    def build(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        return block_spec(
            model_config.transformer, routing, vp_stage=vp_stage, bidirectional=bidirectional
        )

    return build


def block_spec(
    config: TransformerConfig,
    routing: AnyRouting | None,
    *,
    vp_stage: int | None = None,
    bidirectional: bool = False,
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, for the local or the Transformer Engine backend.

    Megatron's own block spec decides which layers are on this stage and which of them have experts;
    we exchange modules in it.

    Raises:
        ValueError: an option that the router refuses (`options`), a router in a causal model that
            is not causal, or recurrence without a layer that has experts, or with a pipeline stage
            without layers.
    """
    check_model(config, routing, bidirectional=bidirectional)
    use_te = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if not use_te:
        block.layer_norm = TorchSpecProvider().layer_norm()
    block.layer_specs = with_our_modules(
        block.layer_specs, config, routing, bidirectional=bidirectional
    )
    if isinstance(routing, Routing) and routing.is_recurrent:
        block.layer_specs = _with_states(block.layer_specs, config, routing, vp_stage)
    return block


def check_model(
    config: TransformerConfig, routing: AnyRouting | None, *, bidirectional: bool
) -> None:
    """Refuse a model that a router cannot be in; the errors are those of `block_spec`."""
    if routing is not None and not routing.causal and not bidirectional:
        raise ValueError(options.not_causal(routing))
    if routing is not None and config.num_moe_experts is not None:
        options.check_router(config, routing)
    if isinstance(routing, Routing) and routing.is_recurrent:
        options.check_recurrent(config)


def with_our_modules(
    layers: list[ModuleSpec],
    config: TransformerConfig,
    routing: AnyRouting | None,
    *,
    bidirectional: bool,
) -> list[ModuleSpec]:
    """Return the layers of a model chunk with our backend, router and MoE layer.

    Args:
        layers: GPT layers of Megatron's.
        config: of the model.
        routing: settings of a router; None keeps Megatron's own.
        bidirectional: whether attention masks padding only.
    """
    if config.transformer_impl != "transformer_engine":
        layers = [_with_torch_modules(spec, config) for spec in layers]
    if bidirectional:
        layers = [_bidirectional(spec) for spec in layers]
    if isinstance(routing, SoftRouting):
        return [_with_slots(spec, routing) if has_experts(spec) else spec for spec in layers]
    if not isinstance(routing, Selection):
        return layers
    router = partial(ROUTERS.get(type(routing), SelectionRouter), routing=routing)
    if isinstance(routing, Routing) and routing.is_recurrent:
        cell = SharedCell(config, routing)
        kind = RECURRENT_ROUTERS.get(type(routing), RecurrentSelectionRouter)
        router = partial(kind, routing=routing, cell=cell)
    budget = {}
    if routing.varies and is_dropless(config):
        with_experts = [has_experts(spec) for spec in layers]
        budget = {"budget": budget_of(config, with_experts, routing.max_assignments)}
    return [
        _with_routing(spec, config, router, **budget) if has_experts(spec) else spec
        for spec in layers
    ]


def _bidirectional(layer: ModuleSpec) -> ModuleSpec:
    """Return a layer whose attention masks what is padding, and nothing else."""
    attention = layer.submodules.self_attention
    params = attention.params | {"attn_mask_type": AttnMaskType.padding}
    attention = replace(attention, params=params)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_slots(layer: ModuleSpec, routing: SoftRouting) -> ModuleSpec:
    given = layer.submodules.mlp.keywords["submodules"]
    submodules = replace(given, router=partial(SoftRouter, routing=routing))
    mlp = partial(SoftMoELayer, submodules=submodules)
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))


def _with_states(
    layers: list[ModuleSpec], config: TransformerConfig, routing: Routing, vp_stage: int | None
) -> list[ModuleSpec]:
    """Return layers of this stage that take the state of recurrent routers and hand it on.

    The hidden states have its columns between the first and the last layer with experts. With
    pipeline stages, they have them between the first and the last layer of the model, because
    Megatron sends tensors of one shape.
    """
    if config.num_moe_experts is None:
        raise ValueError(
            f"moe_router_recurrence is {routing.recurrence}, but the model has no experts; set "
            f"num_experts, or leave moe_router_recurrence out"
        )
    with_experts = options.layers_with_experts(config.moe_layer_freq, config.num_layers)
    if not with_experts:
        raise ValueError(
            f"moe_layer_freq is {config.moe_layer_freq}, with which no layer has a router for "
            f"moe_router_recurrence; give a layer experts, or leave num_experts out"
        )
    first, last = with_experts[0], with_experts[-1]
    if config.pipeline_model_parallel_size > 1:
        first, last = 0, config.num_layers - 1
        # Every rank looks at all stages, so that all of them end.
        if min(_layers_of_stages(config)) == 0:
            raise ValueError(
                "a pipeline stage has no layers, and the state of recurrent routers needs one to "
                "pass; give every stage a layer, or leave moe_router_recurrence out"
            )
    passes, changed = routing.recurrent_passing != "none", []
    for index, layer in enumerate(layers, get_transformer_layer_offset(config, vp_stage)):
        takes = passes and first < index <= last
        hands_on = passes and first <= index < last
        layer = attention_with_state(layer, config, routing, takes=takes, hands_on=takes)
        changed.append(mlp_with_state(layer, config, routing, takes=takes, hands_on=hands_on))
    return changed


def attention_with_state(
    layer: ModuleSpec, config: TransformerConfig, routing: Routing, *, takes: bool, hands_on: bool
) -> ModuleSpec:
    """Return a layer whose attention leaves the state of recurrent routers alone.

    Args:
        layer: of Megatron's.
        config: of the model.
        routing: settings of the routers.
        takes: whether its input has the columns of the state.
        hands_on: whether its output has them.
    """
    given, size = layer.submodules, routing.recurrent_size
    changes: dict[str, Any] = {}
    if takes:
        changes["input_layernorm"] = norm_of_tokens(given.input_layernorm, size, keeps_state=False)
    if takes or hands_on:
        kept = size if hands_on else None
        changes["self_attn_bda"] = add_to_tokens(given.self_attn_bda, config.hidden_size, kept)
    return replace(layer, submodules=replace(given, **changes))


def mlp_with_state(
    layer: ModuleSpec, config: TransformerConfig, routing: Routing, *, takes: bool, hands_on: bool
) -> ModuleSpec:
    """Return a layer whose experts move the state on, or whose dense MLP leaves it alone.

    The arguments are those of `attention_with_state`.
    """
    given, hidden, size = layer.submodules, config.hidden_size, routing.recurrent_size
    moves = has_experts(layer)
    changes: dict[str, Any] = {}
    if takes:
        norm = given.pre_mlp_layernorm
        changes["pre_mlp_layernorm"] = norm_of_tokens(norm, size, keeps_state=moves)
    if moves:
        changes["mlp"] = partial(RecurrentMoELayer, **given.mlp.keywords, hands_on=hands_on)
        changes["mlp_bda"] = add_and_take_state(given.mlp_bda, hidden)
    elif takes or hands_on:
        changes["mlp_bda"] = add_to_tokens(given.mlp_bda, hidden, size if hands_on else None)
    return replace(layer, submodules=replace(given, **changes))


def _layers_of_stages(config: TransformerConfig) -> list[int]:
    """Return the number of layers of every pipeline stage, virtual ones one by one."""
    layout: Any = config.pipeline_model_parallel_layout
    chunks: list[int | None] = [None]
    if config.virtual_pipeline_model_parallel_size is not None:
        chunks = list(range(config.virtual_pipeline_model_parallel_size))
    return [
        get_num_layers_to_build(config, chunk, stage)
        if layout is None
        else layout.get_num_layers_to_build(vp_stage=chunk, pp_rank=stage)
        for stage in range(config.pipeline_model_parallel_size)
        for chunk in chunks
    ]


def has_experts(layer: ModuleSpec) -> bool:
    """Return whether a layer of a spec has experts."""
    mlp = getattr(layer.submodules.mlp, "func", None)
    return isinstance(mlp, type) and issubclass(mlp, MoELayer)


def _with_torch_modules(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    backend = TorchSpecProvider()
    norm = backend.layer_norm()
    attention = layer.submodules.self_attention
    mlp = layer.submodules.mlp
    # Checkpoints name norms as Transformer Engine does: they are fused into the next linear, except
    # before experts.
    names = dict(layer.submodules.sharded_state_dict_keys_map)
    if has_experts(layer):
        names.pop("pre_mlp_layernorm.")
        mlp = _moe(layer, config, experts=backend.grouped_mlp_modules(config.moe_grouped_gemm))
    submodules = replace(
        layer.submodules,
        input_layernorm=norm,
        pre_mlp_layernorm=norm,
        self_attention=replace(
            attention,
            submodules=replace(attention.submodules, core_attention=backend.core_attention()),
        ),
        mlp=mlp,
        sharded_state_dict_keys_map=names,
    )
    return replace(layer, submodules=submodules)


def _with_routing(
    layer: ModuleSpec, config: TransformerConfig, router: Any, **budget: AssignmentBudget
) -> ModuleSpec:
    mlp = partial(_moe(layer, config, router=router), **budget)
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))


def _moe(layer: ModuleSpec, config: TransformerConfig, **modules: Any) -> partial[MoELayer]:
    """Return the layer's experts with some modules exchanged, and our dispatcher where it fits."""
    submodules = replace(layer.submodules.mlp.keywords["submodules"], **modules)
    return partial(DroplessMoELayer if is_dropless(config) else MoELayer, submodules=submodules)
