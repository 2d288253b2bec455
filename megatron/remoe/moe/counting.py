"""What every router counts while training, whatever it routes by.

Shapes: L transformer layers of the whole model, T local tokens, E experts.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from remoe.buffers import ExactBuffers
from remoe.routing import active_experts, tokens_per_expert


class CountsRouting(ExactBuffers):
    """Mixin for Megatron routers: sums over the micro-batches of a step on this rank.

    Buffers, none persistent:
        stats: fp64 `[3 + E]`: regulariser (zero without one), micro-batches (as fractions over the
            ranks that share one), tokens, and tokens per expert.
        most_active: int64, 0-d: the most experts that a token activated.
    """

    stats: Tensor
    most_active: Tensor
    # What Megatron's routers set. The groups are process groups, or stand-ins of the same methods.
    config: TransformerConfig
    num_experts: int
    layer_number: int
    is_mtp_layer: bool
    tp_cp_group: Any
    tp_dp_cp_group: Any

    def register_counters(self, num_experts: int) -> None:
        device = torch.cuda.current_device()
        stats = torch.zeros(3 + num_experts, dtype=torch.float64, device=device)
        self.register_buffer("stats", stats, persistent=False)
        most = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("most_active", most, persistent=False)

    @torch.no_grad()
    def count(self, routing_map: Tensor, padding_mask: Tensor | None, *, num_ranks: int) -> Tensor:
        """Add a micro-batch.

        Args:
            routing_map: bool `[T, E]`.
            padding_mask: bool `[T]`, True for padding, which is not counted, or None.
            num_ranks: ranks that share the micro-batch's tokens.

        Returns:
            Tokens and tokens per expert of this rank's part, int64 `[1 + E]`; not a view.
        """
        counts = tokens_per_expert(routing_map, padding_mask)
        active = active_experts(routing_map)
        if padding_mask is None:
            num_tokens = counts.new_full((1,), routing_map.shape[0])
        else:
            num_tokens = (~padding_mask).sum(dim=0, keepdim=True)
            active = active.masked_fill(padding_mask, 0)
        local = torch.cat([num_tokens, counts])
        self.stats[1] += 1 / num_ranks
        self.stats[2:] += local
        self.most_active.copy_(torch.maximum(self.most_active, active.max()))
        return local

    def clear_counters(self) -> None:
        self.stats.zero_()
        self.most_active.zero_()
