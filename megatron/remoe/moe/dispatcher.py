"""Token dispatchers whose sizes follow the routing map, for any number of assignments.

Megatron's dispatchers expect `tokens * topk` assignments, copy several tensors to the host, and
scatter rows with an index of the rows' size. These dispatchers copy the counts once, and sum rows
by token.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from remoe.kernels import Permutation, combine, permute
from remoe.routing import tokens_per_expert


class CountsAssignments:
    """Mixin for dispatchers that tells every rank who sends how many tokens to which expert."""

    _counts: Tensor | None = None
    ep_size: int
    tp_size: int
    tp_ep_group: Any

    def count(self, routing_map: Tensor) -> tuple[Tensor, float]:
        """Count assignments with one copy to the host, for the dispatch that follows.

        Returns:
            The tokens of every rank for every expert, `[ep, expert tp, E]`; and the mean number of
            tokens of a rank.
        """
        counts = tokens_per_expert(routing_map)
        counts = self.of_all_ranks(torch.cat([counts, counts.new_full((1,), len(routing_map))]))
        self._counts, tokens = counts[:, :, :-1].contiguous(), counts[:, :, -1].flatten().tolist()
        return self._counts, sum(tokens) / len(tokens)

    def of_all_ranks(self, counts: Tensor) -> Tensor:
        """Return counts `[n]` of every rank on the host, `[ep, expert tp, n]`; this waits."""
        if self.ep_size * self.tp_size > 1:
            counts = gather_from_sequence_parallel_region(counts, group=self.tp_ep_group)
        return counts.cpu().view(self.ep_size, self.tp_size, -1)

    def expect(self, counts: Tensor) -> None:
        """Take counts that are known, as `count` returns them, for the dispatch that follows."""
        self._counts = counts

    def _take_counts(self, routing_map: Tensor) -> Tensor:
        if self._counts is None:
            self.count(routing_map)
        counts, self._counts = self._counts, None
        assert counts is not None
        return counts


class DroplessAlltoAllTokenDispatcher(CountsAssignments, MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, for any routing map."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Compute the sizes of everything that follows, on the host.

        Returns:
            The number of tokens of each local expert.
        """
        counts = self._take_counts(routing_map)
        sent = counts[self.ep_rank, self.tp_rank]
        self.num_out_tokens = sum(sent.tolist())
        self.input_splits = sent.view(self.ep_size, -1).sum(dim=1).tolist()
        # [tp, ep, local experts]: what every rank sends to the experts here
        received = counts[:, :, self.local_expert_indices].transpose(0, 1)
        self.output_splits = received[self.tp_rank].sum(dim=1).tolist()
        self.output_splits_tp = received.sum(dim=(1, 2))
        self.num_global_tokens_per_local_expert = received.reshape(-1, self.num_local_experts)
        return received.sum(dim=(0, 1))

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor | None:
        return tokens_per_expert  # on the host already

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sort `[s, b, h]` into rows by expert, and return the rows and their probabilities."""
        self.hidden_shape, self.probs = hidden_states.shape, probs
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self.preprocess(routing_map)
        self.permutation = Permutation.of(routing_map, self.num_out_tokens)
        return permute(hidden_states.flatten(end_dim=-2), probs, self.permutation)

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the received rows by expert; those of a single source are sorted already."""
        if self.ep_size * self.tp_size == 1:
            return global_input_tokens, self.tokens_per_expert, global_probs
        received: tuple[Tensor, Tensor, Tensor]
        received = super().dispatch_postprocess(global_input_tokens, global_probs)
        return received

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sort the experts' rows by source."""
        if self.ep_size * self.tp_size == 1:
            return hidden_states
        rows: Tensor = super().combine_preprocess(hidden_states)
        return rows

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Sum the rows of each token, `[s, b, h]`, and add what overlapped shared experts gave."""
        output = combine(permutated_local_input_tokens, self.permutation).view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output


class DroplessAllGatherTokenDispatcher(CountsAssignments, MoEAllGatherTokenDispatcher):
    """Megatron's all-gather dispatcher with our permutation."""

    routing_map: Any  # set by Megatron; a tensor until `dispatch_postprocess` has used it

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the counts, and prepare as Megatron does."""
        self.received = self._take_counts(routing_map)[:, :, self.local_expert_indices]
        rows: tuple[Tensor, Tensor]
        rows = super().dispatch_preprocess(hidden_states, routing_map, probs)
        return rows

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select the gathered rows of the local experts, sorted by expert."""
        local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        routing_map, self.routing_map = self.routing_map[:, local], None
        counts = self.received.sum(dim=(0, 1))
        self.permutation = Permutation.of(routing_map, sum(counts.tolist()))
        rows, self.local_probs = permute(hidden_states, probs[:, local], self.permutation)
        return rows, counts, self.local_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token over the local experts."""
        return combine(hidden_states, self.permutation)


Dispatcher = DroplessAlltoAllTokenDispatcher | DroplessAllGatherTokenDispatcher
DISPATCHERS: dict[str, type[Dispatcher]] = {
    "alltoall": DroplessAlltoAllTokenDispatcher,
    "allgather": DroplessAllGatherTokenDispatcher,
}


def is_dropless(config: TransformerConfig) -> bool:
    """Return whether every assignment is computed, with buffers of the routing map's size.

    Options that cap or pad the number of assignments, or run a layer in steps of their own, leave
    Megatron's layer in place; ReLU routing and the warm-up of TopK refuse them.
    """
    return (
        config.moe_token_dispatcher_type in DISPATCHERS
        and config.moe_expert_capacity_factor is None
        and not config.moe_router_padding_for_quantization
        and not config.moe_permute_fusion
        and config.cuda_graph_impl == "none"
        and not config.overlap_moe_expert_parallel_comm
    )
