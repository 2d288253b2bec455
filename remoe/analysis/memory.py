"""Activations that a rank holds for the backward pass: an estimate of the largest tensors.

Counted are the inputs of the linear layers, norms, attention and activation function, as the
backward pass needs them; not counted are the optimizer, communication buffers and fragmentation.
Experts are taken to be balanced over ranks.
"""

from dataclasses import dataclass
from typing import Literal

from remoe.analysis.size import ModelSize

Recompute = Literal["none", "moe", "full"]


@dataclass(frozen=True)
class Layout:
    """How a run is split over ranks, and what a rank holds at a time.

    Attributes:
        tp, pp, cp, expert_tp: sizes of tensor, pipeline, context and expert tensor parallelism.
        sequence_parallel: whether tensor-parallel ranks share the tokens outside linear layers.
        micro_batch: sequences of a micro-batch.
        num_micro_batches: micro-batches of a step, by data-parallel rank.
        recompute: what is computed again in the backward pass.
        bytes_per_value: 2 for bf16, 4 for fp32.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    expert_tp: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    num_micro_batches: int = 1
    recompute: Recompute = "none"
    bytes_per_value: int = 2


def activation_bytes(size: ModelSize, layout: Layout, active_experts: float) -> float:
    """Bytes of activations on the fullest pipeline stage.

    Args:
        size: the model.
        layout: how it is split.
        active_experts: per token, k in the stable stage and up to E in the dense warm-up.
    """
    tokens = size.seq_length * layout.micro_batch / layout.cp
    outside = tokens / layout.tp if layout.sequence_parallel else tokens
    # norm, its output as the input of the projection, and the residual's second norm likewise
    shared = 4 * size.hidden * outside
    split = (2 * size.query_width + 2 * size.key_width) * tokens / layout.tp
    split += size.shared_width * size.matrices * tokens / layout.tp if size.num_moe_layers else 0
    dense_mlp = size.ffn_width * size.matrices * tokens / layout.tp
    # gathered inputs and outputs of the experts, gate, up and their product
    assignment = 2 * size.hidden * layout.expert_tp + size.expert_width * size.matrices
    experts = assignment * active_experts * tokens / layout.tp
    num_dense = size.num_layers - size.num_moe_layers

    if layout.recompute == "full":
        held = size.num_layers * size.hidden * outside
        largest = shared + split + (experts if size.num_moe_layers else dense_mlp)
    else:
        held = size.num_layers * (shared + split) + num_dense * dense_mlp
        held += size.num_moe_layers * (0 if layout.recompute == "moe" else experts)
        largest = experts if layout.recompute == "moe" and size.num_moe_layers else 0
    # logits in the model's precision and in fp32 for the cross-entropy
    logits = tokens * size.vocab / layout.tp * (1 + 4 / layout.bytes_per_value)
    in_flight = min(layout.pp, layout.num_micro_batches)
    first = held / layout.pp * in_flight + largest
    last = held / layout.pp + max(largest, logits)
    return max(first, last) * layout.bytes_per_value
