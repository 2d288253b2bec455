"""Numbers of parameters and floating-point operations of a model, from its flags.

They are counted as in the ReMoE paper (arXiv 2412.14711, section 4.1): with both embedding
matrices, without the routers' weights, and with attention over the whole sequence, which is not
halved for the causal mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.remoe.options import layers_with_experts, router_name
from megatron.remoe.pattern import as_gpt
from remoe.config import ROUTINGS, Selection
from remoe.settings import settings_of

# Flags that change a model's size in ways that are not counted, with the values that do not.
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
    """The shape of a decoder, after granularity.

    Attributes:
        query_width, key_width: the number of heads, and of query groups, times the width of a head.
        ffn_width: the width of the MLP in dense layers.
        matrices: the number of matrices of an MLP: 3 with a gate (SwiGLU), else 2.
        num_moe_layers: the number of layers with experts.
        num_experts, topk, expert_width, shared_width: the shape of these layers. In Soft MoE topk
            is the number of all experts, since every token is in the slots of all.
        slots: the number of slots of a sequence in Soft MoE, else 0.
        logits, router_scales: the number of logits of a token, and of what a router learns beside
            its weight; both are 0 in Soft MoE.
        norm_weights: the weights of a norm per hidden unit: 1, or 2 with a bias.
        state_size, cell_gates: of recurrent routers, with 3 gates for a GRU and 1 for an RNN; both
            are 0 without recurrence.
        projections: the number of matrices that project tokens to the size of the state: one per
            layer with experts, or one.
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
    state_size: int = 0
    cell_gates: int = 0
    projections: int = 0
    slots: int = 0
    logits: int = 0
    router_scales: int = 0

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "ModelSize":
        """Read Megatron's flags, with underscores, from a config or from parsed arguments.

        Raises:
            ValueError: a flag is missing, or the model has parts that are not counted.
        """
        flags = as_gpt(flags)
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
        recurrence = flags.get("moe_router_recurrence") or "none"
        gates = {"gru": 3, "rnn": 1, "none": 0}[recurrence] if experts else 0
        shared = flags.get("moe_router_recurrent_projection") == "shared"
        moe_layers = layers_with_experts(flags.get("moe_layer_freq"), layers)
        topk, slots = (_int(flags, "moe_router_topk") or 2) * granularity if experts else 0, 0
        router = router_name(flags)
        if router == "soft":
            topk, slots = experts, experts * (_int(flags, "moe_soft_slots_per_expert") or 1)
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
            topk=topk,
            expert_width=(_int(flags, "moe_ffn_hidden_size") or ffn) // granularity,
            shared_width=_int(flags, "moe_shared_expert_intermediate_size"),
            tied=not flags.get("untie_embeddings_and_output_weights", False),
            norm_weights=1 if flags.get("normalization") == "RMSNorm" else 2,
            state_size=(_int(flags, "moe_router_recurrent_size") or 128) if gates else 0,
            cell_gates=gates,
            projections=1 if shared else len(moe_layers),
            slots=slots,
            **_of_router(router, flags, experts, topk, granularity),
        )

    @property
    def total_params(self) -> int:
        """The number of all parameters except the routers' (`router_params`)."""
        return self._params(self.num_experts)

    @property
    def router_params(self) -> int:
        """The number of the routers' parameters, with the cell that recurrent routers share."""
        if self.slots:
            return self.num_moe_layers * (self.slots * self.hidden + 1)
        if not self.cell_gates:
            return self.num_moe_layers * (self.logits * self.hidden + self.router_scales)
        weights = self.projections * self.hidden + self.num_moe_layers * self.logits
        cell = 2 * self.cell_gates * (self.state_size + 1)
        return self.state_size * (weights + cell) + self.num_moe_layers * self.router_scales

    @property
    def active_params(self) -> int:
        """The number of parameters that an average token uses, without the routers'."""
        return self._params(self.topk)

    @property
    def rows_per_token(self) -> float:
        """The number of rows that a layer's experts compute, per token: k, or slots by tokens."""
        return self.slots / self.seq_length if self.slots else self.topk

    def _params(self, experts: int) -> int:
        norms = (2 * self.num_layers + 1) * self.hidden * self.norm_weights
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return embeddings + norms + self._layer_weights(experts)

    def _layer_weights(self, experts: float) -> int:
        """Count the matrices of attention and MLPs, with this number of experts per layer."""
        attention = self.num_layers * 2 * (self.query_width + self.key_width)
        mlps: float = (self.num_layers - self.num_moe_layers) * self.ffn_width
        mlps += self.num_moe_layers * (experts * self.expert_width + self.shared_width)
        return round(self.hidden * (attention + mlps * self.matrices))

    @property
    def flops_per_sequence(self) -> int:
        """The operations of one sequence, forward and backward, at k active experts.

        The backward pass counts twice as much as the forward pass, which has two operations per
        weight and token. The router, a thousandth of the whole, is left out as in the paper, but a
        recurrent one is counted: every layer applies the cell. So are the three products of slots
        and tokens in Soft MoE (`remoe.soft`).
        """
        weights = self._layer_weights(self.rows_per_token) + self.vocab * self.hidden
        weights += self.num_moe_layers * 3 * self.slots * self.hidden
        if self.cell_gates:
            read = self.hidden + self.logits + 2 * self.cell_gates * self.state_size
            weights += self.num_moe_layers * self.state_size * read
        scores = 2 * self.num_layers * self.seq_length * self.query_width
        return 3 * 2 * self.seq_length * (weights + scores)

    @property
    def expert_share(self) -> float:
        """The share of the experts in the operations of a sequence; shared ones are not counted."""
        weights = self.hidden * self.matrices * self.expert_width
        flops = 3 * 2 * self.seq_length * self.num_moe_layers * self.rows_per_token * weights
        return flops / self.flops_per_sequence


def _of_router(
    router: str, flags: Mapping[str, Any], experts: int, topk: int, granularity: int
) -> dict[str, int]:
    """Count what a router of a selection has, after granularity."""
    routing = ROUTINGS.get(router)
    if not experts or routing is None or not issubclass(routing, Selection):
        return {}
    given = {s.name: flags.get(s.dest) for s in settings_of(routing) if s.per_granularity}
    split = {name: value * granularity for name, value in given.items() if value is not None}
    selection = routing(**split)
    learned = selection.parameters(experts, topk).values()
    return {
        "logits": selection.num_logits(experts),
        "router_scales": sum(tensor.numel() for tensor in learned),
    }


def _int(flags: Mapping[str, Any], name: str) -> int:
    return int(flags.get(name) or 0)
