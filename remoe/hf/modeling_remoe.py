"""ReMoE for transformers: LLaMA whose MLPs are mixtures of SwiGLU experts behind a ReLU router.

This file is exported with every model and therefore self-contained: its routing functions are
copies of those in `remoe`, and a test compares both. The paper is arXiv 2412.14711.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, E experts, F expert width, L layers with
experts, p state of a recurrent router (arXiv 2408.06793).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .configuration_remoe import ReMoEConfig, refuse_misspelled

logger = logging.get_logger(__name__)

FORWARD_ARGUMENTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache", "output_attentions", "output_hidden_states", "output_routing", "logits_to_keep",
    "return_dict", "num_items_in_batch", "shift_labels", "ignore_index",
)  # fmt: skip
UNMOVED_STEPS = 100  # forward passes with equal coefficients before a warning


def relu_routing(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gates `relu(logits)` and the map of active experts, both `[T, E]` (Eq. 5)."""
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    probs_TE = torch.relu(logits_TE.to(dtype))
    return probs_TE, probs_TE > 0


def bounded_routing(
    logits_TE: Tensor,
    probs_TE: Tensor,
    *,
    max_active: int | None = None,
    at_least_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keep the largest gates only, or add the largest logit where no gate is active.

    Both are shortcuts, which Eq. 5 does not have.
    """
    if max_active is not None and max_active < probs_TE.shape[1]:
        largest = probs_TE.topk(max_active, dim=1)
        probs_TE = torch.zeros_like(probs_TE).scatter(1, largest.indices, largest.values)
    if at_least_one:
        silent = ~(probs_TE > 0).any(dim=1, keepdim=True)
        first = torch.zeros_like(silent.expand_as(probs_TE))
        first = first.scatter(1, logits_TE.argmax(dim=1, keepdim=True), silent)
        softmax = torch.softmax(logits_TE.to(probs_TE.dtype), dim=1)
        probs_TE = torch.where(first, softmax, probs_TE)
    return probs_TE, probs_TE > 0


def load_weights(tokens_per_expert_E: Tensor, *, num_tokens: Tensor | int, topk: int) -> Tensor:
    """Return the load weights f of the penalty, `[E]` (Eq. 11)."""
    num_experts = tokens_per_expert_E.shape[0]
    return tokens_per_expert_E.detach() * (num_experts / (topk * at_least_one(num_tokens)))


def l1_regularization(
    probs_TE: Tensor, *, num_tokens: Tensor | int, load_weights_E: Tensor | None = None
) -> Tensor:
    """Return the regularizer of one layer, a 0-d tensor (Eq. 9 or 10)."""
    l1_E = probs_TE.sum(dim=0)
    if load_weights_E is not None:
        l1_E = l1_E * load_weights_E
    return l1_E.sum() / at_least_one(num_tokens)


def at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """Return a number of tokens to divide by, which is 1 for a micro-batch of padding alone."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(1, num_tokens)


def topk_pre_softmax(logits_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of the softmax, and the active map, both `[T, E]`."""
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    return _scatter(*torch.topk(probs_TE, topk, dim=-1), logits_TE)


def topk_post_softmax(logits_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the softmax of the k largest logits, and the active map, both `[T, E]`."""
    chosen_Tk, index_Tk = torch.topk(logits_TE, topk, dim=-1)
    return _scatter(torch.softmax(chosen_Tk, dim=-1, dtype=torch.float32), index_Tk, logits_TE)


def _scatter(probs_Tk: Tensor, index_Tk: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    probs_TE = torch.zeros_like(logits_TE).scatter(1, index_Tk, probs_Tk.to(logits_TE.dtype))
    active_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_Tk, True)
    return probs_TE, active_TE


def route(logits_TE: Tensor, router_type: str, topk: int) -> tuple[Tensor, Tensor]:
    """Return gates and the map of active experts for a type of router, both `[T, E]`."""
    if router_type == "relu":
        return relu_routing(logits_TE)
    routers = {"topk_pre_softmax": topk_pre_softmax, "topk_post_softmax": topk_post_softmax}
    return routers[router_type](logits_TE, topk)


class ReMoECell(nn.Module):
    """The GRU or RNN of recurrent routers, which all layers share, in fp32.

    It keeps its dtype when a model is cast as a whole.
    """

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        size, gates = config.recurrent_size, {"gru": 3, "rnn": 1}[config.recurrence]
        self.function = torch.gru_cell if config.recurrence == "gru" else torch.rnn_tanh_cell
        self.passing = config.recurrent_passing
        dtype = torch.float32
        self.weight_ih = nn.Parameter(torch.empty(gates * size, size, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(gates * size, size, dtype=dtype))
        self.bias_ih = nn.Parameter(torch.empty(gates * size, dtype=dtype))
        self.bias_hh = nn.Parameter(torch.empty(gates * size, dtype=dtype))

        self.projection = None
        if config.recurrent_projection == "shared":
            self.projection = nn.Parameter(torch.empty(size, config.hidden_size, dtype=dtype))

    def forward(
        self, x_TH: Tensor, state_Tp: Tensor | None, projection_pH: Tensor | None
    ) -> Tensor:
        """Return the state after a layer, `[T, p]`, given that of the layer before, or None."""
        projection_pH = self.projection if projection_pH is None else projection_pH
        assert projection_pH is not None
        x_Tp = F.linear(x_TH.float(), projection_pH.float())
        if state_Tp is None or self.passing == "none":
            state_Tp = torch.zeros_like(x_Tp)
        elif self.passing == "detached":
            state_Tp = state_Tp.detach()
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return self.function(x_Tp, state_Tp, *weights)

    def _apply(self, fn: Any, recurse: bool = True) -> "ReMoECell":
        exact = {name: p.detach() for name, p in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                before = parameter if exact[name].is_meta else exact[name]
                parameter.data = before.to(device=parameter.device, dtype=torch.float32)
        return self


class ReMoERouter(nn.Module):
    """A router from tokens `[T, H]` to gates and the map of active experts, both `[T, E]`.

    With recurrence it reads a state `[T, p]`, which it also returns for the next layer.
    """

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        width, self.projection = config.hidden_size, None
        if config.recurrence != "none":
            width = config.recurrent_size
        if config.recurrence != "none" and config.recurrent_projection == "layer":
            self.projection = nn.Parameter(torch.empty(width, config.hidden_size))
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.max_active, self.at_least_one = config.max_active_experts, config.at_least_one_expert
        self.router_type, self.topk = config.router_type, config.num_experts_per_tok
        self.dtype = getattr(torch, config.router_dtype) if config.router_dtype else None

    def forward(
        self, x_TH: Tensor, state_Tp: Tensor | None = None, cell: ReMoECell | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gates, the map of active experts, and the state if there is a cell."""
        # A cast is not enough under autocast, which would cast it back.
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE, state_Tp = self.score(x_TH, state_Tp, cell)
            probs_TE, active_TE = route(logits_TE, self.router_type, self.topk)
            if self.max_active is not None or self.at_least_one:
                probs_TE, active_TE = bounded_routing(
                    logits_TE, probs_TE, max_active=self.max_active, at_least_one=self.at_least_one
                )
            return probs_TE, active_TE, state_Tp

    def score(
        self, x_TH: Tensor, state_Tp: Tensor | None = None, cell: ReMoECell | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits `[T, E]` from which experts are selected, and the state."""
        read = x_TH
        if cell is not None:
            # The cell may be on another device than the layer.
            read = state_Tp = cell(x_TH, state_Tp, self.projection).to(x_TH.device)
        dtype = self.dtype or read.dtype
        return F.linear(read.to(dtype), self.weight.to(dtype)), state_Tp


class ReMoEExperts(nn.Module):
    """Stacked SwiGLU experts: `gate_up_proj` is `[E, 2F, H]` (gate first), `down_proj` `[E, H, F]`.

    Only active (token, expert) pairs are computed, and experts without tokens cost nothing.
    """

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_experts, config.hidden_size, config.moe_intermediate_size
        )  # fmt: skip
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TH: Tensor, probs_TE: Tensor, active_TE: Tensor) -> Tensor:
        """Return the weighted sum of the active experts' outputs, `[T, H]`."""
        y_TH = torch.zeros_like(x_TH)
        # The weights are unbound once, so that backward stacks the gradients of all experts once.
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        counts = active_TE.sum(dim=0).tolist()
        tokens = active_TE.T.nonzero()[:, 1].split(counts)
        # The first expert of a layer without any active pair still computes zero rows, so that
        # every parameter gets a gradient (of zeros), as data parallelism and weight decay expect.
        for expert in [e for e, count in enumerate(counts) if count] or [0]:
            token_a = tokens[expert]
            gate, up = F.linear(x_TH[token_a], gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down[expert])
            out = out * probs_TE[token_a, expert, None].to(out.dtype)
            y_TH = y_TH.index_add(0, token_a, out.to(y_TH.dtype))
        return y_TH


class ReMoEBlock(nn.Module):
    """Router and experts, in place of the MLP of a LLaMA layer."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.router = ReMoERouter(config)
        self.experts = ReMoEExperts(config)

    def forward(
        self, hidden_states: Tensor, state_Tp: Tensor | None = None, cell: ReMoECell | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the new `[B, S, H]` states, gates and active map, both `[B, S, E]`, and `[T, p]`.

        The last is the state of a recurrent router, if there is a cell.
        """
        x_TH = hidden_states.flatten(0, 1)
        probs_TE, active_TE, state_Tp = self.router(x_TH, state_Tp, cell=cell)
        y_TH = self.experts(x_TH, probs_TE.to(x_TH.dtype), active_TE)
        shape = (*hidden_states.shape[:2], -1)
        return y_TH.view_as(hidden_states), probs_TE.view(shape), active_TE.view(shape), state_Tp


class ReMoERotaryEmbedding(LlamaRotaryEmbedding):
    """LlamaRotaryEmbedding whose frequencies keep their dtype when a model is cast as a whole.

    In bf16 they would be off by up to 0.2%, which is two radians after a thousand tokens.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "ReMoERotaryEmbedding":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != exact[name].dtype and not exact[name].is_meta:
                setattr(self, name, exact[name].to(buffer.device))
        return self


class ReMoEDecoderLayer(GradientCheckpointingLayer):
    """A LLaMA layer, with experts in place of its MLP unless the config makes it dense."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.is_dense = layer_idx in (config.mlp_only_layers or ())
        self.mlp = LlamaMLP(config) if self.is_dense else ReMoEBlock(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        state_Tp: Tensor | None = None,
        cell: ReMoECell | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return new hidden states, attention weights (eager only), gates, active map and state.

        Gates and active map are None for a dense layer, which hands on the state of the recurrent
        routers, if the model has such.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if self.is_dense:
            return hidden_states + self.mlp(normed), weights, None, None, state_Tp
        output, probs, active, state_Tp = self.mlp(normed, state_Tp, cell=cell)
        return hidden_states + output, weights, probs, active, state_Tp


@dataclass
class ReMoEModelOutput(ModelOutput):
    """What `ReMoEModel` returns.

    Attributes:
        router_probs: gates of every layer with experts, `[B, S, E]`, zero where inactive.
        active_experts: number of active experts per token of every such layer, int64 `[B, S]`.
        l1_reg: the L1 regularizer of every such layer, `[L]`, over tokens that are no padding.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    active_experts: tuple[Tensor, ...] | None = None
    l1_reg: Tensor | None = None


@dataclass
class ReMoECausalLMOutput(ModelOutput):
    """What `ReMoEForCausalLM` returns; see `ReMoEModelOutput`.

    Attributes:
        loss: cross-entropy, plus `penalty` in training mode.
        penalty: the sum of `l1_coeff * l1_reg` over layers (Eq. 6), when the model is training.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    active_experts: tuple[Tensor, ...] | None = None
    l1_reg: Tensor | None = None
    penalty: Tensor | None = None


class ReMoEPreTrainedModel(PreTrainedModel):
    """What both models share: their config, and how weights are initialized."""

    config_class = ReMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReMoEDecoderLayer"]
    # Accelerate would move the cell, which is a module, from layer to layer.
    _skip_keys_device_placement = ["past_key_values", "cell"]
    _keep_in_fp32_modules_strict = {"recurrent_cell"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ReMoEExperts | ReMoERouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ReMoECell):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 1:
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ReMoEModel(ReMoEPreTrainedModel):
    """The transformer without its head.

    Attributes:
        routed: int64 `[2]`, the number of active (token, expert) pairs and that of all pairs, since
            the coefficients moved last in training; padding does not count. None before the first
            step.
    """

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__(config)
        # There is no `padding_idx`, which would keep gradients from a token that also ends texts.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(ReMoEDecoderLayer(config, i) for i in layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.recurrent_cell = None if config.recurrence == "none" else ReMoECell(config)
        self.rotary_emb = ReMoERotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.routed: Tensor | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ReMoEModelOutput | tuple[Any, ...]:
        """Compute hidden states of `[B, S]` tokens.

        With `output_routing` the output has the routing of every layer.
        """
        config = self.config
        if kwargs and not torch.compiler.is_compiling():
            refuse_misspelled(kwargs, FORWARD_ARGUMENTS, "argument")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:  # with a cache, transformers would not separate packed texts
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:  # layers would ignore it
                raise ValueError(
                    "past_key_values are given, but gradient checkpointing has no cache in "
                    "training mode; call model.eval() to generate, or pass use_cache=False"
                )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        with_attentions = (
            config.output_attentions if output_attentions is None else output_attentions
        )
        with_hidden = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        attention = config._attn_implementation
        if with_attentions and attention != "eager":
            logger.warning_once(
                f"output_attentions is set, but {attention} attention does not return its weights; "
                f"call set_attn_implementation('eager') first."
            )
        common = {
            "attention_mask": create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        hidden_states, state = inputs_embeds, None
        all_hidden: list[Tensor] = []
        all_attentions: list[Tensor] = []
        routing: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            all_hidden += [hidden_states] if with_hidden else []
            hidden_states, weights, probs, active, state = layer(
                hidden_states, state, cell=self.recurrent_cell, **common, **kwargs
            )
            all_attentions += [weights] if with_attentions and weights is not None else []
            if probs is not None and (output_routing or self.training):
                routing.append((probs, active))
        hidden_states = self.norm(hidden_states)
        output = ReMoEModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden, hidden_states) if with_hidden else None,
            attentions=tuple(all_attentions) if with_attentions else None,
        )
        if output_routing:
            output.router_probs = tuple(probs for probs, _ in routing)
            output.active_experts = tuple(active.sum(dim=-1) for _, active in routing)
        if routing and config.router_type == "relu":
            output.l1_reg = self._l1_reg(routing, attention_mask)
        return output if _wants_dict(config, return_dict) else output.to_tuple()

    def _l1_reg(self, routing: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> Tensor:
        device = routing[0][0].device  # layers may be on several
        real_T = _real_tokens(mask, routing[0][0].shape[1])
        regularizers, active_pairs = [], []
        for probs, active in routing:
            probs_TE, active_TE = probs.flatten(0, 1), active.flatten(0, 1)
            num_tokens: Tensor | int = len(probs_TE)
            if real_T is not None:
                padding_T1 = ~real_T.to(probs.device)[:, None]
                probs_TE, active_TE = probs_TE.masked_fill(padding_T1, 0), active_TE & ~padding_T1
                num_tokens = (~padding_T1).sum()
            weights_E = None
            tokens_per_expert_E = active_TE.sum(dim=0)
            if self.config.load_balancing == "aux_loss":
                weights_E = load_weights(
                    tokens_per_expert_E,
                    num_tokens=num_tokens,
                    topk=self.config.num_experts_per_tok,
                )
            l1_reg = l1_regularization(probs_TE, num_tokens=num_tokens, load_weights_E=weights_E)
            regularizers.append(l1_reg.to(device))
            active_pairs.append(tokens_per_expert_E.sum().to(device))
        if self.training and torch.is_grad_enabled():
            active_pair_count = torch.stack(active_pairs).sum()
            real = torch.full_like(active_pair_count, probs.shape[:2].numel())
            if real_T is not None:
                real = real_T.sum().to(device)
            routed = torch.stack((active_pair_count, real * len(routing) * self.config.num_experts))
            self.routed = routed if self.routed is None else routed + self.routed.to(device)
        return torch.stack(regularizers)


class ReMoEForCausalLM(ReMoEPreTrainedModel, GenerationMixin):
    """The language model.

    In training mode the loss includes the L1 penalty with the coefficients of `config.l1_coeff`.
    The coefficients only move if the training calls `update_l1_coeff` after every step, or if the
    Trainer gets `sparsity_callback()`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__(config)
        self.model = ReMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._unmoved: tuple[list[float], int] = ([], 0)  # coefficients, steps that used them
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text as `GenerationMixin` does, whose output has no place for the routing.

        Raises:
            ValueError: `output_routing` is set.
        """
        if kwargs.get("output_routing"):
            raise ValueError(
                "output_routing is set, but generate does not return the routing; call the model "
                "itself on the text that was generated"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def update_l1_coeff(self) -> float | None:
        """Move the coefficients of the penalty once (Eq. 7), after an optimizer step.

        The mean sparsity decides, over all layers and over all tokens (of all processes) since the
        last call in training. All layers move alike, as in pretraining.

        Returns:
            That sparsity. It is None, and nothing moves, if there was no token or the router is no
            ReLU router.
        """
        routed, self.model.routed = self.model.routed, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if routed is None:
                routed = torch.zeros(2, dtype=torch.int64, device=self.device)
            torch.distributed.all_reduce(routed)
        active, pairs = (0, 0) if routed is None else routed.tolist()
        if pairs == 0:
            return None
        sparsity = 1 - active / pairs
        config = self.config
        if config.l1_coeff is not None:
            coeff, alpha = torch.tensor(config.l1_coeff), config.l1_coeff_multiplier
            too_dense = sparsity < config.target_sparsity
            config.l1_coeff = (coeff * alpha if too_dense else coeff / alpha).tolist()
        return sparsity

    def sparsity_callback(self) -> "SparsityCallback":
        """Return a callback for the Trainer that keeps the sparsity at its target."""
        return SparsityCallback()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ReMoECausalLMOutput | tuple[Any, ...]:
        """Compute logits `[B, S, V]` of `[B, S]` tokens, and with `labels` also the loss.

        Args:
            labels: `[B, S]`, unshifted.
            logits_to_keep: the number of last positions to compute, or the positions; 0 means all.
            num_items_in_batch: the number of labels in all micro-batches of a step, if the caller
                sums their losses.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_routing=output_routing,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = penalty = None
        if self.training and outputs.l1_reg is not None and self.config.l1_coeff is not None:
            penalty = (outputs.l1_reg * outputs.l1_reg.new_tensor(self.config.l1_coeff)).sum()
            if torch.is_grad_enabled():
                self._warn_of_training(input_ids, attention_mask, labels)
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
            if penalty is not None:
                share = torch.ones_like(penalty)
                if num_items_in_batch is not None:  # the share of this micro-batch in the step
                    shifted = kwargs.get("shift_labels")
                    counted = labels[..., 1:] if shifted is None else shifted
                    num_labels = (counted != kwargs.get("ignore_index", -100)).sum()
                    share = num_labels.to(loss.device) / torch.as_tensor(
                        num_items_in_batch, device=loss.device
                    )
                loss = loss + penalty.to(loss.device) * share.to(loss.device)
        output = ReMoECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_probs=outputs.router_probs,
            active_experts=outputs.active_experts,
            l1_reg=outputs.l1_reg,
            penalty=penalty,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _warn_of_training(
        self, input_ids: Tensor | None, mask: Tensor | None, labels: Tensor | None
    ) -> None:
        """Warn once of what training would silently lack."""
        if torch.compiler.is_compiling():
            return
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, mask)
        if labels is None:
            logger.warning_once(
                "The model is in training mode without labels. The L1 penalty is then in no loss: "
                "add output.penalty to your own."
            )
        coeff, steps = self._unmoved
        steps = steps + 1 if coeff == self.config.l1_coeff else 1
        self._unmoved = (list(self.config.l1_coeff), steps)
        if steps == UNMOVED_STEPS:
            logger.warning_once(
                f"The coefficients of the L1 penalty have not moved in {steps} forward passes, so "
                f"nothing keeps the sparsity at its target. Give the Trainer "
                f"callbacks=[model.sparsity_callback()], or call model.update_l1_coeff() after "
                f"every optimizer step."
            )


class SparsityCallback(TrainerCallback, ExportableState):
    """Moves the coefficients of the L1 penalty once per step of the Trainer.

    Checkpoints hold them in the model's config and in the Trainer's state, from which a resumed
    training takes them.
    """

    def __init__(self, l1_coeff: list[float] | None = None) -> None:
        self.l1_coeff = l1_coeff

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the config's coefficients, or from the saved ones when training resumes.

        Raises:
            ValueError: an option of the Trainer leaves the penalty out of the loss.
        """
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but with it the Trainer "
                f"computes a loss without the L1 penalty, of labels that are not shifted for a "
                f"model that it does not know; set it to 0"
            )
        config = _causal_lm(kwargs["model"]).config
        if config.router_type == "relu" and config.l1_coeff is None:
            config.l1_coeff = [config.l1_coeff_init] * len(config.moe_layers)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("args", {})
        if state.global_step > 0 and saved.get("l1_coeff") is not None:
            config.l1_coeff = list(saved["l1_coeff"])
        self.l1_coeff = config.l1_coeff

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the coefficients after an optimizer step."""
        model = _causal_lm(kwargs["model"])
        model.update_l1_coeff()
        self.l1_coeff = model.config.l1_coeff

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves of this callback."""
        return {"args": {"l1_coeff": self.l1_coeff}, "attributes": {}}


def _real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Return which tokens of a call are no padding, bool `[T]`; None means all.

    Args:
        mask: `[B, S + past]`, or a prepared `[B, 1, S, S]`, in which padding does not attend to
            itself.
        length: S.
    """
    if mask is None:
        return None
    if mask.dim() == 2:  # the last S columns are this call's tokens
        return mask[:, -length:].bool().flatten()
    if mask.dim() != 4 or mask.shape[-1] != length:
        return None
    itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return (itself if itself.dtype == torch.bool else itself == 0).flatten()


def _causal_lm(model: nn.Module) -> ReMoEForCausalLM:
    """Return the language model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, ReMoEForCausalLM))


def _wants_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


__all__ = ["ReMoEForCausalLM", "ReMoEModel", "ReMoEPreTrainedModel"]
