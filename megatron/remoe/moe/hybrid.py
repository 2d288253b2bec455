"""Our layers in Megatron's `HybridModel`: halves of its GPT layers, one for each letter.

The attention of a GPT layer is a layer `*`, its MLP is `-`, and its experts are `E`. Names of
parameters are those of GPT layers, so that Megatron loads GPT checkpoints into hybrid models.
"""

import copy
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron.remoe import pattern as patterns
from megatron.remoe.moe.backend import TorchSpecProvider
from megatron.remoe.moe.hash_router import HashRouter
from megatron.remoe.moe.spec import (
    attention_with_state,
    check_model,
    mlp_with_state,
    with_our_modules,
)
from remoe.config import AnyRouting, Routing

_NO_ATTENTION: dict[str, Any] = {
    "input_layernorm": IdentityOp,
    "self_attention": IdentityOp,
    "self_attn_bda": IdentityFuncOp,
}
_NO_MLP: dict[str, Any] = {
    "pre_mlp_layernorm": IdentityOp,
    "mlp": IdentityOp,
    "mlp_bda": IdentityFuncOp,
}
# The class of a letter, and what is left out of a GPT layer for it.
_HALVES: dict[str, tuple[type, dict[str, Any]]] = {
    "*": (TransformerLayer, _NO_MLP),
    "-": (MLPLayer, _NO_ATTENTION),
    "E": (MoETransformerLayer, _NO_ATTENTION),
}


def stack_spec(
    pattern: str, routing: AnyRouting | None, *, bidirectional: bool = False
) -> ModuleSpec:
    """Return a value for `HybridModelConfig.hybrid_stack_spec`.

    Args:
        pattern: the model's `hybrid_layer_pattern`, which `pattern.check` accepts.
        routing: settings of a router; None keeps Megatron's own.
        bidirectional: as for `layer_spec`.
    """
    params = {"pattern": pattern, "routing": routing, "bidirectional": bidirectional}
    return ModuleSpec(module=RoutedHybridStack, params=params)


class RoutedHybridStack(HybridStack):
    """Megatron's stack of the layers of a pipeline stage, with our modules.

    Megatron has one spec for all layers of a letter. Here every layer has its own, because layers
    of experts share a budget of assignments in a stage, and recurrent routers hand on a state.

    Args:
        config: of the model.
        pattern: of the whole model.
        routing, bidirectional: as for `stack_spec`.
        layer_type_list: the letters of this stage.
        pp_layer_offset: the number of letters before them.
        post_layer_norm: whether the last stage ends with a norm.
        kwargs: what Megatron gives its own stack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pattern: str,
        routing: AnyRouting | None,
        bidirectional: bool,
        layer_type_list: list[str],
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        check_model(config, routing, bidirectional=bidirectional)
        specs = _layers(config, pattern, routing, layer_type_list, pp_layer_offset, bidirectional)
        params = {"specs": specs, "before": pp_layer_offset}
        ours = ModuleSpec(module=_LayerOfStage, params=params)
        submodules = replace(
            stock_spec.submodules, attention_layer=ours, mlp_layer=ours, moe_layer=ours
        )
        uses_te = config.transformer_impl == "transformer_engine"
        super().__init__(
            config,
            submodules,
            layer_type_list=layer_type_list,
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=post_layer_norm and uses_te,
            **kwargs,
        )
        if self.post_process and post_layer_norm and not uses_te:
            # Megatron's stack has the norm of Transformer Engine only.
            self.post_layer_norm = True
            self.final_norm = TorchSpecProvider().layer_norm()(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        for index, layer in enumerate(self.layers, pp_layer_offset):
            for module in layer.modules():
                if isinstance(module, HashRouter):
                    # The same table as in a GPT model, and in one that is exported.
                    module.seed = 1 + patterns.gpt_layer_of(pattern, index)


class _LayerOfStage:
    """Builds the layer of a number in place of a class that Megatron would call."""

    def __new__(
        cls, *, specs: list[ModuleSpec], before: int, layer_number: int, **kwargs: Any
    ) -> Any:
        spec = specs[layer_number - before - 1]
        return build_module(spec, layer_number=layer_number, **kwargs)


def _layers(
    config: TransformerConfig,
    pattern: str,
    routing: AnyRouting | None,
    letters: list[str],
    before: int,
    bidirectional: bool,
) -> list[ModuleSpec]:
    """Return the specs of the letters of a stage; those of letters that are not ours are unused."""
    dense, experts = _gpt_layers(config)
    layers = [experts if letter == "E" else dense for letter in letters]
    layers = with_our_modules(layers, config, routing, bidirectional=bidirectional)
    if isinstance(routing, Routing) and routing.is_recurrent:
        pipelined = config.pipeline_model_parallel_size > 1
        first, last = patterns.first_and_last(pattern, pipelined=pipelined)
        passes = routing.recurrent_passing != "none"
        for i, letter in enumerate(letters):
            give = attention_with_state if letter == "*" else mlp_with_state
            takes = passes and first < before + i <= last
            hands_on = passes and first <= before + i < last
            layers[i] = give(layers[i], config, routing, takes=takes, hands_on=hands_on)
    return [
        _half(layer, letter) if letter in _HALVES else layer
        for layer, letter in zip(layers, letters, strict=True)
    ]


def _gpt_layers(config: TransformerConfig) -> list[ModuleSpec]:
    """Return a GPT layer of Megatron's without experts, and one with them."""
    of_two = copy.copy(config)
    of_two.num_layers, of_two.moe_layer_freq = 2, [0, 1]
    layers: Any = get_gpt_decoder_layer_specs(
        of_two,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return list(layers)


def _half(layer: ModuleSpec, letter: str) -> ModuleSpec:
    kind, left_out = _HALVES[letter]
    return ModuleSpec(
        module=kind, params=layer.params, submodules=replace(layer.submodules, **left_out)
    )
