"""Configuration of a ReMoE language model: LLaMA with mixture-of-experts layers.

This file is exported with every model and therefore self-contained. Its fields for the router are
the exported settings of `remoe.config.ReLURouting`; a test compares names, defaults and checks.
"""

import difflib
import math
from collections.abc import Iterable
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

ROUTER_TYPES = ("relu", "topk_pre_softmax", "topk_post_softmax")
FORMAT_VERSION = (
    1  # version of config.json and of the names of weights; older code refuses a newer one
)

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "num_experts", "num_experts_per_tok", "max_active_experts",
)  # fmt: skip

_FORMER = {"l1_coeff_rule": "sign", "router_bias": False}  # settings of earlier versions


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
        router_type: `relu` (arXiv 2412.14711, Eq. 5), or `topk` of the softmax (pre) or with the
            softmax over the chosen logits (post).
        router_dtype: dtype of logits and gates, "float32" or "float64"; None takes the model's.
        num_experts: E.
        num_experts_per_tok: k; with ReLU routing the mean at the target sparsity.
        moe_intermediate_size: width of one expert.
        mlp_only_layers: layers with a dense MLP of width `intermediate_size` in place of experts.
        l1_coeff: coefficient of the L1 penalty for every layer with experts; None means no penalty.
        l1_coeff_init, l1_coeff_multiplier, target_sparsity: settings of its controller (Eq. 7).
        max_active_experts: most experts of a token, those with the largest gates; None is no limit.
        at_least_one_expert: whether a token without any expert gets that of its largest logit.
        load_balancing: "aux_loss" weights the penalty by load (Eq. 10), "none" does not (Eq. 9).
        training_facts: what is known about the training: iteration, tokens, losses, sparsity.
        format_version: version of the exported files.

    Raises:
        ValueError: a value that no model can have, a misspelled name, or a newer format.
    """

    model_type = "remoe"
    # LLaMA's plans for tensor and pipeline parallelism do not know the experts.
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    router_type: str = "relu"
    router_dtype: str | None = "float32"
    num_experts: int = 8
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 11008
    mlp_only_layers: list[int] | None = None
    l1_coeff: list[float] | None = None
    l1_coeff_init: float = 1e-8
    l1_coeff_multiplier: float = 1.2
    target_sparsity: float | None = None
    load_balancing: str = "aux_loss"
    max_active_experts: int | None = None
    at_least_one_expert: bool = False
    training_facts: dict[str, Any] | None = None
    format_version: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version!r}; this code reads only "
                f"{FORMAT_VERSION}: update it, or load the model with the code in its own folder "
                f"(trust_remote_code=True)"
            )
        for name, only in _FORMER.items():
            if kwargs.get(name, only) != only:
                raise ValueError(
                    f"{name} is {kwargs[name]!r}, which this code does not have any more; load the "
                    f"model with the code in its own folder (trust_remote_code=True)"
                )
        refuse_misspelled(kwargs, vars(self), "the setting")
        self._check_numbers()
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(
                f"router_type is {self.router_type!r}, which is not known; "
                f"it must be one of {', '.join(ROUTER_TYPES)}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts; "
                f"it must be between 1 and num_experts"
            )
        if self.router_dtype not in ("float32", "float64", None):
            raise ValueError(
                f"router_dtype is {self.router_dtype!r}; it must be float32, float64 or null"
            )
        if self.load_balancing not in ("aux_loss", "none"):
            raise ValueError(
                f"load_balancing is {self.load_balancing!r}; it must be aux_loss or none"
            )
        if self.target_sparsity is None:
            self.target_sparsity = 1 - self.num_experts_per_tok / self.num_experts
        super().__post_init__(**kwargs)
        self._check_layers()

    def _check_numbers(self) -> None:
        """Refuse counts that are no positive whole numbers, and numbers out of their range."""
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        ranges = {
            "rms_norm_eps": (lambda x: x > 0, "a positive number"),
            "l1_coeff_init": (lambda x: x > 0, "a positive number"),
            "l1_coeff_multiplier": (lambda x: x > 1, "a number above 1"),
            "target_sparsity": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
            "attention_dropout": (lambda x: 0 <= x <= 1, "a number between 0 and 1"),
        }
        for name, (is_valid, meaning) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and is_valid(value)):
                raise ValueError(f"{name} is {value!r}; it must be {meaning}")
        if not isinstance(self.at_least_one_expert, bool):
            raise ValueError(
                f"at_least_one_expert is {self.at_least_one_expert!r}; it must be true or false"
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
        """Refuse heads that do not divide, layers that do not exist, and bad coefficients."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        dense = self.mlp_only_layers
        layers = range(self.num_hidden_layers)
        if dense is not None and not (
            isinstance(dense, list | tuple) and all(type(i) is int and i in layers for i in dense)
        ):
            raise ValueError(
                f"mlp_only_layers is {dense!r}; it must be a list of layers from 0 to {layers[-1]}"
            )
        coeffs = self.l1_coeff
        if coeffs is not None and not (
            isinstance(coeffs, list | tuple) and all(_is_finite(c) and c >= 0 for c in coeffs)
        ):
            raise ValueError(
                f"l1_coeff is {coeffs!r}; it must be a list of numbers that are not negative"
            )
        if self.l1_coeff is not None and len(self.l1_coeff) != len(self.moe_layers):
            raise ValueError(
                f"l1_coeff has {len(self.l1_coeff)} values for {len(self.moe_layers)} layers with "
                f"experts; it needs one for each"
            )

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with experts."""
        dense = set(self.mlp_only_layers or ())
        return [i for i in range(self.num_hidden_layers) if i not in dense]


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


__all__ = ["ReMoEConfig"]
