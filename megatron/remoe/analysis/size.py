"""Parameters and floating-point operations of a model, from its flags.

Counted as the ReMoE paper counts (arXiv 2412.14711, section 4.1): both embedding matrices, without
the routers' weights, and attention over the whole sequence without halving it for the causal mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What changes the size of a model in ways that are not counted here, with its values that do not.
_NOT_COUNTED: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "moe_latent_size": (None,),
    "moe_shared_expert_gate": (None, False),
    "qk_layernorm": (None, False),
    "attention_output_gate": (None, False),
    "position_embedding_type": (None, "rope", "none"),
}


@dataclass(frozen=True)
class ModelSize:
    """Shape of a decoder, after granularity.

    Attributes:
        query_width, key_width: heads, and query groups, times their width.
        ffn_width: width of the MLP of dense layers.
        matrices: matrices of an MLP: 3 with a gate (SwiGLU), else 2.
        num_moe_layers, num_experts, topk, expert_width, shared_width: of layers with experts.
        norm_weights: weights of a norm per hidden unit: 1, or 2 with a bias.
    """

    num_layers: int
    hidden: int
    query_width: int
    key_width: int
    ffn_width: int
    vocab: int
    seq_length: int
    matrices: int = 3
    num_moe_layers: int = 0
    num_experts: int = 0
    topk: int = 0
    expert_width: int = 0
    shared_width: int = 0
    tied: bool = False
    norm_weights: int = 1

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "ModelSize":
        """Read Megatron's flags (underscores), of a config or of parsed arguments.

        Raises:
            ValueError: a flag is missing, or the model has parts that are not counted.
        """
        for name, plain in _NOT_COUNTED.items():
            if flags.get(name) not in plain:
                raise ValueError(f"{name} is {flags[name]}, whose parameters are not counted")
        needed = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
        missing = [n for n in (*needed, "ffn_hidden_size", "seq_length") if not _int(flags, n)]
        if missing:
            raise ValueError(f"{missing[0]} is not given; the model's size depends on it")
        if flags.get("add_bias_linear", not flags.get("disable_bias_linear", False)):
            raise ValueError(
                "linear layers have biases, which are not counted; disable_bias_linear"
            )
        layers, hidden, heads = (_int(flags, n) for n in needed[:3])
        channels = _int(flags, "kv_channels") or hidden // heads
        groups = heads
        if flags.get("group_query_attention"):
            groups = _int(flags, "num_query_groups") or 1
        granularity = _int(flags, "moe_granularity") or 1
        experts = _int(flags, "num_experts") * granularity
        ffn = _int(flags, "ffn_hidden_size")
        moe_layers = layers_with_experts(flags.get("moe_layer_freq"), layers)
        return cls(
            num_layers=layers,
            hidden=hidden,
            query_width=channels * heads,
            key_width=channels * groups,
            ffn_width=ffn,
            vocab=_int(flags, "padded_vocab_size"),
            seq_length=_int(flags, "seq_length"),
            matrices=3 if flags.get("swiglu") else 2,
            num_moe_layers=len(moe_layers) if experts else 0,
            num_experts=experts,
            topk=(_int(flags, "moe_router_topk") or 2) * granularity if experts else 0,
            expert_width=(_int(flags, "moe_ffn_hidden_size") or ffn) // granularity,
            shared_width=_int(flags, "moe_shared_expert_intermediate_size"),
            tied=not flags.get("untie_embeddings_and_output_weights", False),
            norm_weights=1 if flags.get("normalization") == "RMSNorm" else 2,
        )

    @property
    def total_params(self) -> int:
        """All parameters but the routers' (`router_params`)."""
        return self._params(self.num_experts)

    @property
    def router_params(self) -> int:
        return self.num_moe_layers * self.num_experts * self.hidden

    @property
    def active_params(self) -> int:
        """Parameters that an average token uses, at k active experts, but the routers'."""
        return self._params(self.topk)

    def _params(self, experts: int) -> int:
        norms = (2 * self.num_layers + 1) * self.hidden * self.norm_weights
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return embeddings + norms + self._layer_weights(experts)

    def _layer_weights(self, experts: int) -> int:
        """Attention's and MLPs' matrices of all layers, with so many experts per layer."""
        attention = self.num_layers * 2 * (self.query_width + self.key_width)
        mlps = (self.num_layers - self.num_moe_layers) * self.ffn_width
        mlps += self.num_moe_layers * (experts * self.expert_width + self.shared_width)
        return self.hidden * (attention + mlps * self.matrices)

    @property
    def flops_per_sequence(self) -> int:
        """Forward and backward (three times the forward) of one sequence, at k active experts.

        Two operations per weight and token; the router, a thousandth of the whole, is left out as
        in the published figures.
        """
        weights = self._layer_weights(self.topk) + self.vocab * self.hidden
        scores = 2 * self.num_layers * self.seq_length * self.query_width
        return 3 * 2 * self.seq_length * (weights + scores)


def layers_with_experts(frequency: int | list[int] | None, num_layers: int) -> list[int]:
    """By Megatron's `moe_layer_freq`: every n-th from the first on, or a pattern of 0 and 1."""
    if isinstance(frequency, list):
        return [i for i in range(num_layers) if frequency[i]]
    return list(range(0, num_layers, int(frequency or 1)))


def _int(flags: Mapping[str, Any], name: str) -> int:
    return int(flags.get(name) or 0)
