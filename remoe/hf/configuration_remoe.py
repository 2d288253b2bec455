"""Configuration of a ReMoE language model: LLaMA with mixture-of-experts layers.

Self-contained: exported with every model.
"""

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

ROUTER_TYPES = ("relu", "topk_pre_softmax", "topk_post_softmax")


class ReMoEConfig(LlamaConfig):
    """LlamaConfig, and the experts.

    Attributes:
        router_type: `relu` (arXiv 2412.14711, Eq. 5), or `topk` of the softmax (pre) or with the
            softmax over the chosen logits (post).
        router_dtype: dtype of logits and gates, "float32" or "float64"; None is that of the model.
        num_experts: E.
        num_experts_per_tok: k; with ReLU routing the mean that the target sparsity stands for.
        moe_intermediate_size: width of one expert.
        mlp_only_layers: layers with a dense MLP of width `intermediate_size` in place of experts.
        l1_coeff: coefficient of the L1 penalty for every layer with experts; None is no penalty.
        l1_coeff_init, l1_coeff_multiplier, target_sparsity: of its controller (Eq. 7).
        max_active_experts: of a token, those with the largest gates; None is no limit.
        at_least_one_expert: whether a token without any has the expert of its largest logit.
        load_balancing: "aux_loss" weights the penalty by load (Eq. 10), "none" does not (Eq. 9).
        training_facts: what is known about the training: iteration, tokens, losses, sparsity.

    Raises:
        ValueError: an unknown router, or experts that cannot be chosen.
    """

    model_type = "remoe"
    # The layers' experts are no part of LLaMA's plans for tensor and pipeline parallelism.
    base_model_tp_plan = {}
    base_model_pp_plan = {}

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

    def __post_init__(self, **kwargs: Any) -> None:
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


__all__ = ["ReMoEConfig"]
