"""Counting while training, for every Megatron router, whatever it routes by.

Shapes: T local tokens, E experts.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from remoe.buffers import ExactBuffers
from remoe.statistics import RoutingStatistics, TokenCounts


class CountsRouting(ExactBuffers):
    """Mixin for Megatron routers that adds up what they route over the micro-batches of a step.

    Buffers, none of them persistent:
        stats: fp64 `[4 + E]`, and most_active: int64, 0-d; see `RoutingStatistics`.
    """

    stats: Tensor
    most_active: Tensor
    # Megatron's routers set these. The groups are process groups, or stand-ins with their methods.
    config: TransformerConfig
    num_experts: int
    layer_number: int
    is_mtp_layer: bool
    tp_cp_group: Any
    tp_dp_cp_group: Any

    def register_counters(self, num_experts: int) -> None:
        """Register the buffers."""
        zeros = RoutingStatistics.zeros(num_experts, torch.cuda.current_device())
        self.register_buffer("stats", zeros.sums, persistent=False)
        self.register_buffer("most_active", zeros.most_active, persistent=False)

    @property
    def statistics(self) -> RoutingStatistics:
        """The statistics of this rank since the last step, as views of the buffers."""
        return RoutingStatistics(self.stats, self.most_active)

    @property
    def counts_now(self) -> bool:
        """Whether this forward pass is counted: in training, and once.

        With activation recompute the router runs twice, first without gradients and then with.
        """
        return self.training and torch.is_grad_enabled()

    def count(self, routing_map: Tensor, padding_mask: Tensor | None) -> TokenCounts:
        """Add a micro-batch, bool `[T, E]`, without its padding (True), bool `[T]`.

        Returns:
            The counts of this rank's tokens, int64, in a buffer of their own.
        """
        return self.statistics.add(routing_map, padding_mask, num_ranks=self.tp_cp_group.size())
