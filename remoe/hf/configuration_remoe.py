"""Configuration of a ReMoE language model: LLaMA with mixture-of-experts layers.

This file is exported with every model and therefore self-contained. Its fields for the router are
the exported settings in `remoe.selections`; a test compares names, defaults and checks.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

L1_ROUTERS = ("relu", "relu_rms", "relu_l2")  # those under the L1 penalty
ROUTER_TYPES = (
    *L1_ROUTERS, "topk_pre_softmax", "topk_post_softmax", "topk_sigmoid", "null_experts", "top_p",
    "expert_threshold", "hash",
)  # fmt: skip
# Routers whose small gates may be switched off: besides, those of TopK, which then use k at most.
THRESHOLD_ROUTERS = (*L1_ROUTERS, "topk_pre_softmax", "topk_post_softmax", "topk_sigmoid")
BUDGET = ("gate_threshold", "gate_offset", "max_active_experts")
# Version of config.json and of the names of weights; older code refuses a newer one. A model whose
# budget, or whose norm of queries and keys, older code would ignore has the second.
FORMAT_VERSION, BUDGET_VERSION = 1, 2

_FORMER = {"l1_coeff_rule": "sign", "router_bias": False}  # settings of earlier versions


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_coefficients(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_number(one) and one >= 0 for one in value)


def _one_or_each(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a test of a value for all layers, or of a list of values for each of them."""
    return lambda x: all(map(is_valid, x if isinstance(x, list | tuple) else (x,)))


_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "num_experts", "num_experts_per_tok", "recurrent_size", "num_null_experts",
)  # fmt: skip
# What a value must be, by name: a test, and the same in words. A default of None passes as well.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gate_threshold": (
        lambda x: _one_or_each(_is_number)(x) and (isinstance(x, list | tuple) or x >= 0),
        "a number that is not negative, or a list of numbers",
    ),
    "gate_offset": (_one_or_each(_is_number), "a number, or a list of them"),
    "max_active_experts": (
        _one_or_each(_is_count), "a whole number of at least 1, or a list of them",
    ),
    **dict.fromkeys(_COUNTS, (_is_count, "a whole number of at least 1")),
    "router_type": (lambda x: x in ROUTER_TYPES, f"one of {', '.join(ROUTER_TYPES)}"),
    "router_dtype": (lambda x: x in ("float32", "float64", None), "float32, float64 or null"),
    "load_balancing": (
        lambda x: x in ("aux_loss", "squared", "global_batch", "none"),
        "one of aux_loss, squared, global_batch, none",
    ),
    "recurrence": (lambda x: x in ("none", "gru", "rnn"), "one of none, gru, rnn"),
    "recurrent_passing": (
        lambda x: x in ("full", "detached", "none"), "one of full, detached, none",
    ),
    "recurrent_projection": (lambda x: x in ("layer", "shared"), "layer or shared"),
    "rms_norm_eps": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "l1_coeff": (_is_coefficients, "a list of numbers that are not negative"),
    "l1_coeff_init": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "l1_coeff_multiplier": (lambda x: _is_number(x) and x > 1, "a number above 1"),
    "target_sparsity": (
        lambda x: _is_number(x) and 0 <= x < 1, "a number of at least 0 and below 1",
    ),
    "at_least_one_expert": (lambda x: isinstance(x, bool), "true or false"),
    "l1_coeff_per_layer": (lambda x: isinstance(x, bool), "true or false"),
    "top_p_odds": (_is_coefficients, "a list of numbers that are not negative"),
    "top_p_multiplier": (lambda x: _is_number(x) and x > 1, "a number above 1"),
    "threshold_updates": (_is_coefficients, "a list of numbers that are not negative"),
    "expert_threshold_decay": (
        lambda x: _is_number(x) and 0 <= x < 1, "a number of at least 0 and below 1",
    ),
    "attention_dropout": (lambda x: _is_number(x) and 0 <= x <= 1, "a number between 0 and 1"),
    "qk_norm": (lambda x: x in ("projection", "head"), "projection, head or null"),
    "clip_qkv": (lambda x: _is_number(x) and x > 0, "a positive number, or null"),
}  # fmt: skip


def refuse_misspelled(given: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Refuse names that resemble a known one; transformers would ignore them.

    Raises:
        ValueError: naming the first of them, and the name that it resembles.
    """
    known = set(known)
    for name in given:
        if name not in known and (near := difflib.get_close_matches(name, known, 1, 0.85)):
            raise ValueError(f"{kind} {name!r} is not known; did you mean {near[0]!r}?")


class ReMoEConfig(LlamaConfig):
    """LlamaConfig with experts.

    Attributes:
        router_type: `relu` (arXiv 2412.14711, Eq. 5); `topk` of the softmax (pre) or with the
            softmax over the chosen logits (post); or another router by its name.
        router_dtype: dtype of logits and gates, "float32" or "float64"; None takes the model's.
        num_experts: E.
        num_experts_per_tok: k; with ReLU routing the mean at the target sparsity.
        moe_intermediate_size: width of one expert.
        qk_norm: RMSNorm of queries and keys before RoPE: over the whole "projection" (as in OLMoE),
            over each "head" (as in Qwen3-MoE), or None.
        clip_qkv: bound on the size of queries, keys and values (as in OLMoE), or None.
        mlp_only_layers: layers with a dense MLP of width `intermediate_size` in place of experts.
        l1_coeff: coefficient of the L1 penalty for every layer with experts; None means no penalty.
        l1_coeff_init, l1_coeff_multiplier, target_sparsity: settings of its controller (Eq. 7).
        gate_threshold: gates of a smaller size are switched off, and the others keep their value;
            also with TopK routers, whose tokens then have k experts or fewer. In a list a negative
            one is as good as zero, and keeps its distance from the others (see `set_budget`).
        gate_offset: a constant that is taken from every logit before the ReLU, with `relu_l2` from
            the logits over their norm; a negative one lets more experts be active.
        max_active_experts: most experts of a token, those with the largest gates; None is no limit.
            These three are the budget of a router with ReLU gates (`relu`, `relu_rms`, `relu_l2`),
            of which the threshold acts on TopK routers too. They may change after loading, and each
            is one value or a list with one for every layer with experts. The offset comes first,
            then the threshold, then the limit.
        at_least_one_expert: whether a token without any expert gets that of its largest logit.
        recurrence: the cell of recurrent routers (arXiv 2408.06793), "gru" or "rnn"; or "none".
        recurrent_size: number of values of their state.
        recurrent_passing: what a layer takes of the state of the layer before it: "full",
            "detached" (without its gradient) or "none".
        recurrent_projection: whether every "layer" projects tokens by a matrix of its own, or all
            by one that is "shared".
        load_balancing: "aux_loss" weights the penalty by load (Eq. 10), "squared" by its square,
            "global_batch" by the load of the step before, and "none" does not (Eq. 9).
        l1_coeff_per_layer: whether the coefficient of a layer moves by the sparsity of that layer.
        num_null_experts: with `null_experts`, the number of them; None is as many as experts.
        top_p_odds: with `top_p`, the odds `(1 - p) / p` for every layer with experts; None is that
            of p = k / E. Training here does not move them.
        top_p_multiplier: how they move in pretraining.
        threshold_updates: with `expert_threshold`, the number of steps whose cutoffs the thresholds
            of a layer are an average of. Training here does not move them.
        expert_threshold_decay: how they move in pretraining.
        training_facts: what is known about the training: iteration, tokens, losses, sparsity.
        format_version: version of the exported files.

    Raises:
        ValueError: a value that no model can have, a misspelled name, or a newer format.
    """

    model_type = "remoe"
    # Tensor parallelism splits every expert; each rank routes all tokens, and alike.
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    # LLaMA's plan for pipeline parallelism knows neither experts nor their state.
    base_model_pp_plan = None  # type: ignore[assignment]

    router_type: str = "relu"
    router_dtype: str | None = "float32"
    num_experts: int = 8
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 11008
    qk_norm: str | None = None
    clip_qkv: float | None = None
    mlp_only_layers: list[int] | None = None
    l1_coeff: list[float] | None = None
    l1_coeff_init: float = 1e-8
    l1_coeff_multiplier: float = 1.2
    target_sparsity: float | None = None
    load_balancing: str = "aux_loss"
    gate_threshold: float | list[float] | None = None
    gate_offset: float | list[float] | None = None
    max_active_experts: int | list[int] | None = None
    at_least_one_expert: bool = False
    l1_coeff_per_layer: bool = False
    num_null_experts: int | None = None
    top_p_odds: list[float] | None = None
    top_p_multiplier: float = 1.02
    threshold_updates: list[float] | None = None
    expert_threshold_decay: float = 0.99
    recurrence: str = "none"
    recurrent_size: int = 128
    recurrent_passing: str = "full"
    recurrent_projection: str = "layer"
    training_facts: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version not in (FORMAT_VERSION, BUDGET_VERSION):
            raise ValueError(
                f"format_version is {self.format_version!r}; this code reads only "
                f"{FORMAT_VERSION} and {BUDGET_VERSION}: update it, or load the model with the "
                f"code in its own folder (trust_remote_code=True)"
            )
        for name, only in _FORMER.items():
            if kwargs.get(name, only) != only:
                raise ValueError(
                    f"{name} is {kwargs[name]!r}, which this code does not have any more; load the "
                    f"model with the code in its own folder (trust_remote_code=True)"
                )
        refuse_misspelled(kwargs, vars(self), "the setting")
        for name in _VALUES:
            self._check_value(name)
        self._check_sizes()
        if self.target_sparsity is None:
            self.target_sparsity = 1 - self.num_experts_per_tok / self.num_experts
        super().__post_init__(**kwargs)
        self._check_layers()
        self.check_budget()
        if self.router_type == "top_p" and self.top_p_odds is None:
            odds = self.num_experts / self.num_experts_per_tok - 1
            self.top_p_odds = [odds] * len(self.moe_layers)

    def _check_value(self, name: str) -> None:
        value, (is_valid, meaning) = getattr(self, name), _VALUES[name]
        is_default = value is None and getattr(type(self), name) is None
        if not is_default and not is_valid(value):
            raise ValueError(f"{name} is {value!r}; it must be {meaning}")

    def check_budget(self) -> None:
        """Check the fields of the budget, which may have changed since the config was made.

        Raises:
            ValueError: a value is none of that field, or the router has no gates to limit.
        """
        for name in BUDGET:
            value = getattr(self, name)
            if value is None:
                continue
            allowed = THRESHOLD_ROUTERS if name == "gate_threshold" else L1_ROUTERS
            if self.router_type not in allowed:
                raise ValueError(
                    f"{name} is {value!r}, which is a bound on gates of the routers "
                    f"{', '.join(allowed)}, and router_type is {self.router_type}; leave it out"
                )
            self._check_value(name)
            if isinstance(value, list | tuple) and len(value) != len(self.moe_layers):
                raise ValueError(
                    f"{name} has {len(value)} values for {len(self.moe_layers)} layers with "
                    f"experts; it needs one for each"
                )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the config as `LlamaConfig` does; raises a ValueError for an invalid budget."""
        self.check_budget()
        super().save_pretrained(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, with the version of the format that these need."""
        fields: dict[str, Any] = super().to_dict()
        added = (self.gate_threshold, self.gate_offset, self.qk_norm)
        is_new = any(value is not None for value in added)
        if (most := self.max_active_experts) is not None:  # which only `relu` had, for all layers
            is_new = is_new or self.router_type != "relu" or not isinstance(most, int)
        return fields | {"format_version": BUDGET_VERSION if is_new else FORMAT_VERSION}

    def _check_sizes(self) -> None:
        """Refuse values that contradict each other, before LLaMA's own config reads them."""
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts; "
                f"it must be between 1 and num_experts"
            )
        if self.router_type == "null_experts" and self.topk_of_all * self.num_experts != (
            self.num_experts_per_tok * self.num_router_logits
        ):
            raise ValueError(
                f"num_null_experts is {self.num_null_experts}; k (E + n) / E must be whole, with k "
                f"{self.num_experts_per_tok} and E {self.num_experts}"
            )
        if self.at_least_one_expert and self.router_type != "relu":
            raise ValueError(
                f"at_least_one_expert is {self.at_least_one_expert!r}, which is a bound on the "
                f"gates of ReLU routing, and router_type is {self.router_type}; leave it out"
            )
        if self.router_type == "hash" and self.recurrence != "none":
            raise ValueError(
                f"recurrence is {self.recurrence!r}; a hash router has no logits, so that it must "
                f"be none"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id} of a vocabulary of {self.vocab_size}; "
                f"it must be below that and not negative, or null"
            )
        if self.hidden_act not in ("silu", "swish") or self.mlp_bias:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r} and mlp_bias {self.mlp_bias!r}; experts have "
                f"the activation silu and no biases"
            )

    def _check_layers(self) -> None:
        """Refuse heads that do not divide, layers that do not exist, and missing coefficients."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        width = self.num_attention_heads * self.head_dim
        if self.qk_norm == "projection" and width != self.hidden_size:
            raise ValueError(
                f"qk_norm is 'projection', which asks for heads of {self.hidden_size} values in "
                f"all (hidden_size); num_attention_heads * head_dim is {width}"
            )
        if self.clip_qkv is not None and self.qk_norm != "projection":
            raise ValueError(
                f"clip_qkv is {self.clip_qkv!r}, which only goes with qk_norm 'projection'; leave "
                f"it out"
            )
        dense = self.mlp_only_layers
        layers = range(self.num_hidden_layers)
        if dense is not None and not (
            isinstance(dense, list | tuple) and all(type(i) is int and i in layers for i in dense)
        ):
            raise ValueError(
                f"mlp_only_layers is {dense!r}; it must be a list of layers from 0 to {layers[-1]}"
            )
        for name in ("l1_coeff", "top_p_odds", "threshold_updates"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.moe_layers):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(self.moe_layers)} layers with "
                    f"experts; it needs one for each"
                )

    @property
    def num_router_logits(self) -> int:
        """Number of logits of a token: E, and those of null experts."""
        if self.router_type != "null_experts":
            return self.num_experts
        return self.num_experts + (self.num_null_experts or self.num_experts)

    @property
    def topk_of_all(self) -> int:
        """Number of experts that a token chooses, null experts among them."""
        return self.num_experts_per_tok * self.num_router_logits // self.num_experts

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with experts."""
        dense = set(self.mlp_only_layers or ())
        return [i for i in range(self.num_hidden_layers) if i not in dense]


__all__ = ["ReMoEConfig"]
