"""Counting while training, for every Megatron router, whatever it routes by.

Shapes: T local tokens, E experts.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from remoe.buffers import ExactBuffers
from remoe.config import Selection
from remoe.statistics import RoutingStatistics, TokenCounts


class CountsRouting(ExactBuffers):
    """Mixin for Megatron routers that adds up what they route over the micro-batches of a step.

    Buffers, persistent:
        those of the selection, fp32, by their names.
    Buffers, not persistent:
        stats: fp64 `[4 + E]`, and most_active: int64, 0-d; see `RoutingStatistics`.
        observed: fp64 `[1 + E]`, the number of micro-batches with real tokens and the sums of what
            the selection observed, of this rank; only with a selection that observes.
    """

    selection: Selection
    stats: Tensor
    observed: Tensor
    most_active: Tensor
    # Megatron's routers set these. The groups are process groups, or stand-ins with their methods.
    config: TransformerConfig
    num_experts: int
    layer_number: int
    is_mtp_layer: bool
    tp_group: Any
    cp_group: Any
    tp_cp_group: Any
    tp_dp_cp_group: Any

    def register_selection(self, selection: Selection, num_experts: int, topk: int) -> None:
        """Register the buffers and the parameters of a selection of k out of E experts.

        Both are those of the model; a router with null experts has a config of its own.

        Raises:
            ValueError: the selection cannot have these experts.
        """
        self.selection = selection
        config, device = self.config, torch.cuda.current_device()
        selection.check_model(num_experts, topk)
        buffers = selection.buffers(num_experts, topk)
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device))
        self._state = tuple(buffers)
        parameters = selection.parameters(num_experts, topk)
        self._tensors = (*buffers, *parameters)
        for name, value in parameters.items():
            parameter = torch.nn.Parameter(value.to(device, config.params_dtype))
            # Every rank has the gradient of its own tokens, and Megatron sums them.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self._register_counters(num_experts)

    def _register_counters(self, num_experts: int) -> None:
        zeros = RoutingStatistics.zeros(num_experts, torch.cuda.current_device())
        if self.selection.observes:
            observed = zeros.sums.new_zeros(1 + num_experts)
            self.register_buffer("observed", observed, persistent=False)
        self.register_buffer("stats", zeros.sums, persistent=False)
        self.register_buffer("most_active", zeros.most_active, persistent=False)

    def extra_repr(self) -> str:
        """Return the sizes that a printed model shows."""
        name = type(self.selection).title
        return (
            f"{name}, hidden_size={self.config.hidden_size}, num_experts={self.num_experts}, "
            f"topk={self.config.moe_router_topk}"
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """The buffers of the selection by their names."""
        return {name: getattr(self, name) for name in self._state}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers and parameters of the selection by their names."""
        return {name: getattr(self, name) for name in self._tensors}

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
