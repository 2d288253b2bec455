"""ReMoE for transformers: LLaMA whose MLPs are mixtures of SwiGLU experts behind a ReLU router.

This file is exported with every model and therefore self-contained: its routing functions are
copies of those in `remoe`, and tests compare both. The paper is arXiv 2412.14711; the functions in
`remoe/selections` name those of the other routers.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, E experts, F expert width, L layers with
experts, p state of a recurrent router (arXiv 2408.06793).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging

from .budget_remoe import Budget, limited_gates, set_budget
from .configuration_remoe import L1_ROUTERS, THRESHOLD_ROUTERS, ReMoEConfig, refuse_misspelled
from .experts_remoe import ReMoEExperts

logger = logging.get_logger(__name__)

FORWARD_ARGUMENTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache", "output_attentions", "output_hidden_states", "output_routing", "logits_to_keep",
    "return_dict", "num_items_in_batch", "shift_labels", "ignore_index",
)  # fmt: skip
# Attention by the norm of its queries and keys; the last two have the weights q_norm and k_norm.
ATTENTIONS = {None: LlamaAttention, "projection": OlmoeAttention, "head": Qwen3MoeAttention}
# transformers 5.24 calls the cache of keys and values `cache`, and will forget its old name.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"
UNMOVED_STEPS = 100  # forward passes with equal coefficients before a warning


def at_least_fp32(logits: Tensor) -> Tensor:
    """Return the logits in fp32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
    return l1_of_sums(probs_TE.sum(dim=0), num_tokens=num_tokens, load_weights_E=load_weights_E)


def l1_of_sums(
    sum_E: Tensor, *, num_tokens: Tensor | int, load_weights_E: Tensor | None = None
) -> Tensor:
    """Return the regularizer, given the sum over tokens of every expert's gates, `[E]`."""
    if load_weights_E is not None:
        sum_E = sum_E * load_weights_E
    return sum_E.sum() / at_least_one(num_tokens)


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


def topk_sigmoid(logits_TE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the sigmoids of the k largest logits, and the active map, both `[T, E]`.

    The gates of more than one expert are divided by their sum.
    """
    probs_Tk, index_Tk = torch.topk(torch.sigmoid(at_least_fp32(logits_TE)), topk, dim=-1)
    if topk > 1:
        probs_Tk = probs_Tk / (probs_Tk.sum(dim=-1, keepdim=True) + 1e-20)
    return _scatter(probs_Tk, index_Tk, logits_TE)


def _scatter(probs_Tk: Tensor, index_Tk: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    probs_TE = torch.zeros_like(logits_TE).scatter(1, index_Tk, probs_Tk.to(logits_TE.dtype))
    active_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_Tk, True)
    return probs_TE, active_TE


def relu_rms_routing(
    logits_TE: Tensor, scale_E: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return the ReLU of the logits over its RMS, times the scale, and the active map."""
    relu_TE, routing_map = relu_routing(logits_TE)
    mean_square_T1 = relu_TE.square().mean(dim=1, keepdim=True)
    normed_TE = relu_TE * torch.rsqrt(mean_square_T1 + eps)
    return normed_TE * scale_E.to(normed_TE.dtype), routing_map


def relu_l2_routing(
    logits_TE: Tensor, scale: Tensor, *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Return the ReLU of the logits over their norm, times the scale, and the active map."""
    unit_TE = relu_l2_penalized(logits_TE, eps=eps)
    return unit_TE * scale.to(unit_TE.dtype), unit_TE > 0


def relu_l2_penalized(logits_TE: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return the gates of `relu_l2_routing` before the scale, `[T, E]`."""
    logits_TE = at_least_fp32(logits_TE)
    norm_T1 = torch.linalg.vector_norm(logits_TE, dim=1, keepdim=True)
    return torch.relu(logits_TE / (norm_T1 + eps))


def relu_l2_offset(
    logits_TE: Tensor, scale: Tensor, offset: float, *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Return the gates of `relu_l2_routing` whose ReLU is of the unit logits minus the offset."""
    logits_TE = at_least_fp32(logits_TE)
    norm_T1 = torch.linalg.vector_norm(logits_TE, dim=1, keepdim=True)
    probs_TE, routing_map = relu_routing(logits_TE / (norm_T1 + eps) - offset)
    return probs_TE * scale.to(probs_TE.dtype), routing_map


def relu_l2_initial_scale(num_experts: int, topk: int, *, num_samples: int = 20_000) -> float:
    """Return the scale with which k gates of normal logits have a norm of about one."""
    with torch.device("cpu"):  # a model may be built on another device, or on none
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(num_samples, num_experts, generator=generator, dtype=torch.float64)
    largest = relu_l2_penalized(samples, eps=0).topk(topk, dim=1).values
    return 1 / float(torch.linalg.vector_norm(largest, dim=1).mean())


def top_p_routing(logits_TE: Tensor, p: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the softmax of the fewest experts that reach p, and the active map."""
    softmax_TE = torch.softmax(at_least_fp32(logits_TE), dim=1)
    ordered = softmax_TE.detach().sort(dim=1, descending=True, stable=True)
    reached_TE = ordered.values.cumsum(dim=1)
    # An expert is needed if those before it do not reach p; before the first there are none.
    needed_TE = torch.ones_like(reached_TE, dtype=torch.bool)
    needed_TE[:, 1:] = reached_TE[:, :-1] < p
    routing_map = torch.zeros_like(needed_TE).scatter(1, ordered.indices, needed_TE)
    return softmax_TE * routing_map, routing_map


def expert_threshold_routing(logits_TE: Tensor, thresholds_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sigmoid of the logits that reach their expert's threshold, and the map."""
    logits_TE = at_least_fp32(logits_TE)
    routing_map = logits_TE >= thresholds_E
    return torch.sigmoid(logits_TE) * routing_map, routing_map


def null_experts_routing(
    logits_TN: Tensor, *, num_experts: int, topk_of_all: int
) -> tuple[Tensor, Tensor]:
    """Return the softmax over those of the largest logits that are of experts, and the map.

    The logits of null experts, which do nothing, come last.
    """
    _, routing_map_TN = topk_pre_softmax(logits_TN, topk_of_all)
    routing_map = routing_map_TN[:, :num_experts]
    logits_TE = at_least_fp32(logits_TN)[:, :num_experts].masked_fill(~routing_map, -torch.inf)
    # A row without experts would be NaN, and so would its gradient.
    logits_TE = logits_TE.masked_fill(~routing_map.any(dim=1, keepdim=True), 0)
    return torch.softmax(logits_TE, dim=1) * routing_map, routing_map


_BITS = 0xFFFFFFFF
_FACTORS = (0x7FEB352D, 0x4F1BBCDD)


def hash_routing(
    token_ids_T: Tensor, *, num_experts: int, topk: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return gates of 1/k and the map of the k experts with the largest hash of the token's id."""
    experts_E = torch.arange(num_experts, device=token_ids_T.device)
    seeded_E = _mix(experts_E + num_experts * seed)
    hashes_TE = _mix(_mix(token_ids_T.long()).unsqueeze(1) ^ seeded_E)
    chosen_TE = hashes_TE.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    routing_map = torch.zeros_like(hashes_TE, dtype=torch.bool).scatter(1, chosen_TE, True)
    return routing_map.float() / topk, routing_map


def _mix(numbers: Tensor) -> Tensor:
    """Return a permutation of the numbers of 32 bits, in int64, in which every bit counts."""
    numbers = (numbers + 0x3C6EF372) & _BITS
    for factor in _FACTORS:
        numbers = numbers ^ (numbers >> 16)
        numbers = (numbers * factor) & _BITS
    return numbers ^ (numbers >> 15)


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

    Attributes:
        gate_scale: learned scale of the gates, `[E]` or `[1]`, of `relu_rms` and `relu_l2`.
        thresholds: fp32 `[E]`, the logit that an expert asks for, of `expert_threshold`.
        load: fp32 `[E]`, the load weights of the last step, with `load_balancing` "global_batch".
    """

    thresholds: Tensor
    load: Tensor

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        width, self.projection = config.hidden_size, None
        if config.recurrence != "none":
            width = config.recurrent_size
        if config.recurrence != "none" and config.recurrent_projection == "layer":
            self.projection = nn.Parameter(torch.empty(width, config.hidden_size))
        experts, kind = config.num_experts, config.router_type
        self.weight = nn.Parameter(torch.empty(config.num_router_logits, width))
        self.gate_scale = None
        if kind in ("relu_rms", "relu_l2"):
            self.gate_scale = nn.Parameter(torch.empty(experts if kind == "relu_rms" else 1))
        if kind == "expert_threshold":
            self.register_buffer("thresholds", torch.zeros(experts, dtype=torch.float32))
        if kind in L1_ROUTERS and config.load_balancing == "global_batch":
            self.register_buffer("load", torch.ones(experts, dtype=torch.float32))
        self.odds = 0.0
        if config.top_p_odds is not None and kind == "top_p":
            self.odds = config.top_p_odds[config.moe_layers.index(layer_idx)]
        self.num_experts, self.topk_of_all = experts, config.topk_of_all
        self.config, self.moe_index = config, config.moe_layers.index(layer_idx)
        self.router_type, self.topk = kind, config.num_experts_per_tok
        self.dtype = getattr(torch, config.router_dtype) if config.router_dtype else None

    def extra_repr(self) -> str:
        """Return what a printed model shows."""
        return f"{self.router_type}, num_experts={self.num_experts}, topk={self.topk}"

    def forward(
        self, x_TH: Tensor, state_Tp: Tensor | None = None, cell: ReMoECell | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gates, the map of active experts, what is penalized, and the state.

        What is penalized is `[T, E]`, above zero for what the router activates before any bounds,
        or None for a router without the L1 penalty; the state is None if there is no cell.
        """
        # A cast is not enough under autocast, which would cast it back.
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE, state_Tp = self.score(x_TH, state_Tp, cell)
            probs_TE, active_TE = self.route(logits_TE)
            return probs_TE, active_TE, self.penalized(logits_TE), state_Tp

    def route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and the map of active experts within the budget, both `[T, E]`."""
        if self.router_type not in THRESHOLD_ROUTERS:
            return self.select(logits_TE)
        threshold, most = self._of_layer("gate_threshold"), self._of_layer("max_active_experts")
        at_least_one = self.config.at_least_one_expert
        probs_TE, active_TE = self.select(logits_TE)
        if threshold is not None or most is not None:
            probs_TE, active_TE = limited_gates(
                probs_TE, active_TE, threshold=threshold, most=most, keep_one=at_least_one
            )
        if at_least_one:
            return bounded_routing(logits_TE, probs_TE, at_least_one=True)
        return probs_TE, active_TE

    def _of_layer(self, name: str) -> Any:
        """Return a field of the budget, which the config has for all layers or for each."""
        value = getattr(self.config, name)
        return value[self.moe_index] if isinstance(value, list | tuple) else value

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and the map of active experts without bounds, both `[T, E]`."""
        if self.router_type in L1_ROUTERS and (offset := self._of_layer("gate_offset")):
            if self.router_type == "relu_l2":
                assert self.gate_scale is not None
                return relu_l2_offset(logits_TE, self.gate_scale, offset)
            logits_TE = logits_TE - offset
        match self.router_type:
            case "relu":
                return relu_routing(logits_TE)
            case "relu_rms":
                assert self.gate_scale is not None
                return relu_rms_routing(logits_TE, self.gate_scale)
            case "relu_l2":
                assert self.gate_scale is not None
                return relu_l2_routing(logits_TE, self.gate_scale)
            case "top_p":
                odds = torch.tensor(self.odds, dtype=torch.float32, device=logits_TE.device)
                return top_p_routing(logits_TE, 1 / (1 + odds))
            case "expert_threshold":
                return expert_threshold_routing(logits_TE, self.thresholds)
            case "null_experts":
                return null_experts_routing(
                    logits_TE, num_experts=self.num_experts, topk_of_all=self.topk_of_all
                )
            case "topk_pre_softmax":
                return topk_pre_softmax(logits_TE, self.topk)
            case "topk_sigmoid":
                return topk_sigmoid(logits_TE, self.topk)
            case _:
                return topk_post_softmax(logits_TE, self.topk)

    def penalized(self, logits_TE: Tensor) -> Tensor | None:
        """Return what the L1 penalty acts on, `[T, E]`, or None for a router without it.

        It knows nothing of the budget, which would mislead the coefficients.
        """
        match self.router_type:
            case "relu" | "relu_rms":
                return torch.relu(at_least_fp32(logits_TE))
            case "relu_l2":
                return relu_l2_penalized(logits_TE)
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> "ReMoERouter":
        _apply_exactly(self, super()._apply, fn, recurse)
        return self

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


class ReMoEHashRouter(nn.Module):
    """A router from the ids of tokens `[T]` to gates and the map of active experts."""

    router_type = "hash"

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts, self.topk = config.num_experts, config.num_experts_per_tok
        self.seed = layer_idx + 1

    def forward(self, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and the map of active experts, both `[T, E]`."""
        return hash_routing(
            token_ids_T, num_experts=self.num_experts, topk=self.topk, seed=self.seed
        )


class ReMoEBlock(nn.Module):
    """Router and experts, in place of the MLP of a LLaMA layer."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.hashes = config.router_type == "hash"
        self.router = (ReMoEHashRouter if self.hashes else ReMoERouter)(config, layer_idx)
        self.experts = ReMoEExperts(config)

    def forward(
        self,
        hidden_states: Tensor,
        state_Tp: Tensor | None = None,
        cell: ReMoECell | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the new `[B, S, H]` states, gates, active map, what is penalized, and `[T, p]`.

        Gates, map and what is penalized are `[B, S, E]`; the last but one is None for a router
        without the L1 penalty, and the last is the state of a recurrent router, if there is a cell.
        Only a hash router reads the ids, `[B, S]`.
        """
        x_TH = hidden_states.flatten(0, 1)
        penalized_TE = None
        if self.hashes:
            assert token_ids is not None
            probs_TE, active_TE = self.router(token_ids.flatten())
        else:
            probs_TE, active_TE, penalized_TE, state_Tp = self.router(x_TH, state_Tp, cell=cell)
        y_TH = self.experts(x_TH, active_TE, probs_TE.to(x_TH.dtype))
        shape = (*hidden_states.shape[:2], -1)
        penalized = None if penalized_TE is None else penalized_TE.view(shape)
        routed = probs_TE.view(shape), active_TE.view(shape), penalized
        return y_TH.view_as(hidden_states), *routed, state_Tp


class ReMoERotaryEmbedding(LlamaRotaryEmbedding):
    """LlamaRotaryEmbedding whose frequencies keep their dtype when a model is cast as a whole.

    In bf16 they would be off by up to 0.2%, which is two radians after a thousand tokens.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "ReMoERotaryEmbedding":
        _apply_exactly(self, super()._apply, fn, recurse)
        return self


class ReMoEDecoderLayer(GradientCheckpointingLayer):
    """A LLaMA layer, with experts in place of its MLP unless the config makes it dense."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ATTENTIONS[config.qk_norm](config, layer_idx)
        self.is_dense = layer_idx in (config.mlp_only_layers or ())
        self.mlp = LlamaMLP(config) if self.is_dense else ReMoEBlock(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        state_Tp: Tensor | None = None,
        cell: ReMoECell | None = None,
        token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """Return new hidden states, attention weights (eager only), and what a block returns.

        That is gates, active map, what is penalized, and state. All but the last are None for a
        dense layer, which hands on the state of the recurrent routers, if the model has such.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if self.is_dense:
            return hidden_states + self.mlp(normed), weights, None, None, None, state_Tp
        output, *routed = self.mlp(normed, state_Tp, cell=cell, token_ids=token_ids)
        return hidden_states + output, weights, *routed


@dataclass
class ReMoEModelOutput(BaseModelOutputWithPast):
    """What `ReMoEModel` returns.

    Attributes:
        router_probs: gates of every layer with experts, `[B, S, E]`, zero where inactive.
        active_experts: number of active experts per token of every such layer, int64 `[B, S]`.
        l1_reg: the L1 regularizer of every such layer, `[L]`, over tokens that are no padding.
    """

    router_probs: tuple[Tensor, ...] | None = None
    active_experts: tuple[Tensor, ...] | None = None
    l1_reg: Tensor | None = None


@dataclass
class ReMoECausalLMOutput(CausalLMOutputWithPast):
    """What `ReMoEForCausalLM` returns; see `ReMoEModelOutput`.

    Attributes:
        loss: cross-entropy, plus `penalty` in training mode.
        penalty: the sum of `l1_coeff * l1_reg` over layers (Eq. 6), when the model is training.
    """

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
    _skip_keys_device_placement = [CACHE, "cell"]
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
            for name, buffer in module.named_buffers(recurse=False):
                init.constant_(buffer, float(name == "load"))
        if isinstance(module, ReMoERouter) and module.gate_scale is not None:
            config, scale = self.config, 1.0
            if config.router_type == "relu_l2":
                scale = relu_l2_initial_scale(config.num_experts, config.num_experts_per_tok)
            init.constant_(module.gate_scale, scale)
        elif isinstance(module, ReMoECell):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 1:
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ReMoEModel(ReMoEPreTrainedModel):
    """The transformer without its head.

    Attributes:
        routed: int64 `[L, 1 + E]`, the number of tokens and that of the tokens of every expert, in
            every layer with experts, since the coefficients moved last in training; padding does
            not count. None before the first step.
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
        past_key_values = kwargs.pop("cache", past_key_values)
        if not torch.compiler.is_compiling():
            refuse_misspelled(kwargs, FORWARD_ARGUMENTS, "argument")
            config.check_budget()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if config.router_type == "hash" and input_ids is None:
            raise ValueError(
                "inputs_embeds are given, but the router is hash, which reads the ids of tokens; "
                "pass input_ids"
            )
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
        cache: dict[str, Any] = {CACHE: past_key_values}
        common = {
            "attention_mask": create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache,
            ),
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            "position_ids": position_ids,
            **cache,
            "token_ids": input_ids if config.router_type == "hash" else None,
        }
        hidden_states, state = inputs_embeds, None
        all_hidden: list[Tensor] = []
        all_attentions: list[Tensor] = []
        routing: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in self.layers:
            all_hidden += [hidden_states] if with_hidden else []
            hidden_states, weights, probs, active, penalized, state = layer(
                hidden_states, state, cell=self.recurrent_cell, **common, **kwargs
            )
            all_attentions += [weights] if with_attentions and weights is not None else []
            if probs is not None and (output_routing or self.training):
                routing.append((probs, active, penalized))
        hidden_states = self.norm(hidden_states)
        output = ReMoEModelOutput(
            last_hidden_state=hidden_states,
            **(cache if use_cache else {}),
            hidden_states=(*all_hidden, hidden_states) if with_hidden else None,
            attentions=tuple(all_attentions) if with_attentions else None,
        )
        if output_routing:
            output.router_probs = tuple(probs for probs, *_ in routing)
            output.active_experts = tuple(active.sum(dim=-1) for _, active, _ in routing)
        if routing and config.router_type in L1_ROUTERS:
            output.l1_reg = self._l1_reg(routing, attention_mask)
        return output if _wants_dict(config, return_dict) else output.to_tuple()

    def _l1_reg(self, routing: list[tuple[Tensor, Tensor, Tensor]], mask: Tensor | None) -> Tensor:
        device = routing[0][0].device  # layers may be on several
        real_T = _real_tokens(mask, routing[0][0].shape[1])
        regularizers, counted = [], []
        for layer, (*_, penalized) in zip(self.config.moe_layers, routing, strict=True):
            penalized_TE = penalized.flatten(0, 1)
            num_tokens = torch.full((), len(penalized_TE), device=penalized.device)
            if real_T is not None:
                padding_T1 = ~real_T.to(penalized.device)[:, None]
                penalized_TE = penalized_TE.masked_fill(padding_T1, 0)
                num_tokens = (~padding_T1).sum()
            # Counted is what the router activates: bounds would mislead the coefficients.
            tokens_per_expert_E = (penalized_TE > 0).sum(dim=0)
            weights_E = None
            if self.config.load_balancing == "global_batch":
                weights_E = self.layers[layer].mlp.router.load
            elif self.config.load_balancing != "none":
                weights_E = load_weights(
                    tokens_per_expert_E,
                    num_tokens=num_tokens,
                    topk=self.config.num_experts_per_tok,
                )
            if weights_E is not None and self.config.load_balancing == "squared":
                weights_E = weights_E.square()
            l1_reg = l1_regularization(
                penalized_TE, num_tokens=num_tokens, load_weights_E=weights_E
            )
            regularizers.append(l1_reg.to(device))
            counted.append(torch.cat((num_tokens[None], tokens_per_expert_E)).to(device))
        if self.training and torch.is_grad_enabled():
            routed = torch.stack(counted)
            self.routed = routed if self.routed is None else routed + self.routed.to(device)
        return torch.stack(regularizers)


class ReMoEForCausalLM(ReMoEPreTrainedModel, GenerationMixin):
    """The language model.

    In training mode the loss includes the L1 penalty with the coefficients of `config.l1_coeff`.
    The coefficients only move if the training calls `update_l1_coeff` after every step, or if the
    Trainer gets `sparsity_callback()`.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
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

    def set_budget(
        self,
        active_experts: float | None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        by: Literal["threshold", "offset"] = "threshold",
        per_layer: bool = False,
    ) -> Budget | None:
        """Let fewer experts be active, or more, by calibration on text; None clears the budget.

        The value is found by bisection, on which layers all act together, since each changes what
        later ones see. It is written to the config, with which it is saved. A limit of
        `max_active_experts` stays as it is. In a process group every rank must call this, each
        with text of its own; None clears the budget of this rank alone.

        Args:
            active_experts: the mean number of active experts per token, over layers with experts
                and tokens that are no padding, which is met within 1%; None clears the budget.
            input_ids: `[B, S]`, text like that which the model will read, at least 512 tokens.
            attention_mask: `[B, S]`, zero for padding.
            by: "threshold" switches off gates below a value, and the others keep theirs; "offset"
                takes a constant from every logit of a router with ReLU gates, which can be negative
                and add experts.
            per_layer: give each layer a value of its own, with which it keeps the same share of its
                experts. By default all layers have one value; but thresholds of layers that the
                model has already, as an adopted one does, are all moved by one number, and moving
                them back restores them. None and "offset" remove them.

        Returns:
            What was set and reached; None if the budget was cleared.

        Raises:
            ValueError: the number cannot be met, there is too little text, or the model is dense or
                has a router without such gates: thresholds act on those of a ReLU and of TopK. The
                budget is then as before.
        """
        return set_budget(
            self, active_experts, input_ids, attention_mask, by=by, per_layer=per_layer
        )

    @torch.no_grad()
    def update_l1_coeff(self) -> float | None:
        """Move the coefficients of the penalty once (Eq. 7), after an optimizer step.

        The mean sparsity decides, over all layers and over all tokens (of all processes) since the
        last call in training. All layers move alike, as in pretraining, unless the config has
        `l1_coeff_per_layer`. With `load_balancing` "global_batch" the loads of the experts become
        those of these tokens.

        Returns:
            That sparsity. It is None, and nothing moves, if there was no token or the router has no
            L1 penalty.
        """
        routed, self.model.routed = self.model.routed, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if routed is None:
                shape = (len(self.config.moe_layers), 1 + self.config.num_experts)
                routed = torch.zeros(shape, dtype=torch.int64, device=self.device)
            torch.distributed.all_reduce(routed)
        if routed is None or not routed[:, 0].any():
            return None
        config = self.config
        tokens_L, counts_LE = routed[:, 0], routed[:, 1:]
        pairs_L = tokens_L * config.num_experts
        active, pairs = int(counts_LE.sum()), int(pairs_L.sum())
        sparsity = 1 - active / pairs
        if config.l1_coeff is not None:
            coeff, alpha = torch.tensor(config.l1_coeff), config.l1_coeff_multiplier
            found: float | Tensor = sparsity
            if config.l1_coeff_per_layer:
                found = 1 - (counts_LE.sum(dim=1).double() / pairs_L).cpu()
            too_dense = torch.as_tensor(found < config.target_sparsity)
            stepped = torch.where(too_dense, coeff * alpha, coeff / alpha)
            # A smaller number loses digits, until alpha times it rounds to itself.
            config.l1_coeff = stepped.clamp(min=torch.finfo(coeff.dtype).tiny).tolist()
        if config.load_balancing == "global_batch" and config.router_type in L1_ROUTERS:
            for layer, counted in zip(config.moe_layers, routed, strict=True):
                load_E = load_weights(
                    counted[1:], num_tokens=counted[0], topk=config.num_experts_per_tok
                )
                self.model.layers[layer].mlp.router.load.copy_(load_E)
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
            past_key_values=kwargs.pop("cache", past_key_values),
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
            **{CACHE: outputs.get(CACHE)},
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
        if config.router_type in L1_ROUTERS and config.l1_coeff is None:
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


def _apply_exactly(module: nn.Module, apply: Any, fn: Any, recurse: bool) -> None:
    """Apply what moves or casts a module, and give its buffers their values back, uncast."""
    exact = dict(module.named_buffers(recurse=False))
    apply(fn, recurse)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype != exact[name].dtype and not exact[name].is_meta:
            setattr(module, name, exact[name].to(buffer.device))


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
