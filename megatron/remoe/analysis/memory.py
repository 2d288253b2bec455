"""An estimate of the activations that a rank holds for the backward pass.

The estimate counts the inputs of linear layers, norms, attention and the activation function, as
the backward pass needs them. It does not count the optimizer, communication buffers and
fragmentation, and assumes that the load of the experts is balanced over ranks. `remoe bench memory`
measures what `ExpertsMemory` estimates.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.remoe.analysis.size import ModelSize
from remoe.kernels.chunks import AssignmentBudget

Recompute = Literal["none", "moe", "full"]
_INDEX_BYTES = 3 * 8  # three indices for each (token, expert) assignment


@dataclass(frozen=True)
class RankLoad:
    """How a run is split over ranks, and how much a rank holds at a time.

    Attributes:
        tp, pp, cp, expert_tp: sizes of tensor, pipeline, context and expert tensor parallelism.
        sequence_parallel: whether tensor-parallel ranks share the tokens outside linear layers.
        micro_batch: the number of sequences in a micro-batch.
        num_micro_batches: the number of micro-batches of a step on each data-parallel rank.
        recompute: what is computed again in the backward pass.
        bytes_per_value: 2 for bf16, 4 for fp32.
        max_assignments: the most assignments of a layer that a rank computes at once; None is the
            automatic limit.
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
    max_assignments: int | None = None


@dataclass(frozen=True)
class ExpertsMemory:
    """The bytes of one layer's routed experts on a rank, as `remoe.kernels` computes them.

    Attributes:
        hidden: the width of the rows.
        width: the width of an expert on this rank.
        matrices: the number of an expert's matrices: 3 with a gate, else 2.
        bytes_per_value: the size of an activation.
    """

    hidden: float
    width: float
    matrices: int = 3
    bytes_per_value: int = 4

    def kept(self, rows: float) -> float:
        """Return the bytes kept for backward: the inputs, and their products with gate and up."""
        values = self.hidden + (self.matrices - 1) * self.width
        return rows * (values * self.bytes_per_value + _INDEX_BYTES)

    def passing(self, rows: float, busiest: float) -> float:
        """Return the additional bytes in backward: gradients of the rows and of one expert's work.

        Args:
            rows: the number of all assignments.
            busiest: the number of assignments that are computed together: those of the busiest
                expert, or all on a GPU that takes them in one call.
        """
        values = 2 * self.hidden * rows
        values += busiest * (2 * self.hidden + (self.matrices + 1) * self.width)
        return values * self.bytes_per_value

    def peak(self, rows: float, busiest: float, chunk: float | None) -> float:
        """Return the peak of this layer alone, computed in chunks of `chunk` rows or at once."""
        if chunk is None:
            return self.kept(rows) + self.passing(rows, busiest)
        return self.kept(chunk) + self.passing(chunk, min(busiest, chunk))


def routing_bytes(tokens: float, num_experts: int, bytes_per_value: int) -> float:
    """Return the bytes of a layer's routing: fp32 values, the routing map, and probabilities."""
    return tokens * num_experts * (4 + 1 + bytes_per_value)


def slot_bytes(tokens: float, slots: int, hidden: int, bytes_per_value: int) -> float:
    """Return the bytes of a layer's soft routing: both weights, and the normalized tokens in fp32.

    The tokens are kept twice, before and after they are normalized.
    """
    return tokens * (2 * slots * (4 + bytes_per_value) + 2 * hidden * 4)


def layers_at_once(
    num_layers: int, rows: float, balanced: float, max_assignments: int | None
) -> tuple[int, float | None]:
    """Return how many layers are computed at once, and the rows of the other layers' chunks.

    `AssignmentBudget` decides, as it does in Megatron's layer.

    Args:
        num_layers: the number of layers that keep their activations at the same time.
        rows: the number of assignments of each layer on a rank.
        balanced: the same number at topk experts per token.
        max_assignments: the limit; None is the automatic one.

    Returns:
        The number of layers, and the rows of a chunk, which are None if no layer has chunks.
    """
    budget = AssignmentBudget(num_layers, max_assignments)
    chunks = [
        budget.max_rows_per_chunk(layer, rows, balanced) for layer in range(1, num_layers + 1)
    ]
    return chunks.count(None), next((chunk for chunk in chunks if chunk is not None), None)


def activation_bytes(size: ModelSize, layout: RankLoad, active_experts: float) -> float:
    """Return the bytes of activations on the fullest pipeline stage.

    Args:
        size: the model.
        layout: how the run is split over ranks.
        active_experts: the number per token, k in the stable stage and up to E in the dense one; in
            Soft MoE `rows_per_token`.
    """
    tokens = size.seq_length * layout.micro_batch / layout.cp
    outside = tokens / layout.tp if layout.sequence_parallel else tokens
    # the inputs of two norms, and their outputs, which are the inputs of projections
    shared = 4 * size.hidden * outside
    split = (2 * size.query_width + 2 * size.key_width) * tokens / layout.tp
    split += size.shared_width * size.matrices * tokens / layout.tp if size.num_moe_layers else 0
    dense_mlp = size.ffn_width * size.matrices * tokens / layout.tp
    num_dense = size.num_layers - size.num_moe_layers
    experts, expert_peak = _experts(size, layout, active_experts, tokens / layout.tp)

    if layout.recompute == "full":
        held = size.num_layers * size.hidden * outside
        largest = shared + split + (expert_peak if size.num_moe_layers else dense_mlp)
    else:
        held = size.num_layers * (shared + split) + num_dense * dense_mlp
        held += 0 if layout.recompute == "moe" else experts
        largest = expert_peak
    # logits in the model's precision and in fp32 for the cross-entropy
    logits = tokens * size.vocab / layout.tp * (1 + 4 / layout.bytes_per_value)
    in_flight = min(layout.pp, layout.num_micro_batches)
    first = held / layout.pp * in_flight + largest
    last = held / layout.pp + max(largest, logits)
    return max(first, last) * layout.bytes_per_value


def _experts(
    size: ModelSize, layout: RankLoad, active: float, tokens: float
) -> tuple[float, float]:
    """Return the values that all experts keep, and those that one layer needs in its backward."""
    if not size.num_moe_layers:
        return 0.0, 0.0
    memory = ExpertsMemory(
        size.hidden * layout.expert_tp, size.expert_width, size.matrices, layout.bytes_per_value
    )
    rows, balanced = active * tokens, size.topk * tokens
    busiest = tokens * active / size.num_experts
    together = 1 if layout.recompute != "none" else max(1, size.num_moe_layers // layout.pp)
    at_once, chunk = layers_at_once(together, rows, balanced, layout.max_assignments)
    kept = size.num_moe_layers * at_once / together * memory.kept(rows)
    if layout.recompute == "none":
        routing = routing_bytes(tokens, size.num_experts, layout.bytes_per_value)
        if size.slots:
            routing = slot_bytes(tokens, size.slots, size.hidden, layout.bytes_per_value)
        kept += size.num_moe_layers * routing
    passing = memory.peak(rows, busiest, None) if at_once and layout.recompute != "none" else 0.0
    if at_once and layout.recompute == "none":
        passing = memory.passing(rows, busiest)
    if chunk is not None:
        passing = max(passing, memory.peak(rows, busiest, chunk))
    return kept / layout.bytes_per_value, passing / layout.bytes_per_value
