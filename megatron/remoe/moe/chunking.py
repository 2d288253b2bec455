"""Experts of a Megatron layer chunk by chunk: the plan, and dispatch, experts and combine of one.

Shapes: s sequence, b micro-batch, H hidden; T = s * b local tokens, E experts, n tokens of a chunk.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.dispatcher import DISPATCHERS, Dispatcher
from megatron.remoe.moe.experts import PartialExperts, in_parts
from megatron.remoe.moe.gradients import in_order, main_grads, mark_gradients
from remoe.kernels.chunks import (
    AssignmentBudget,
    Chunk,
    counts_of_chunks,
    plan_over_ranks,
    run_chunks,
)
from remoe.routing import tokens_per_expert


def budget_of(
    config: TransformerConfig, with_experts: list[bool], max_assignments: int | None
) -> AssignmentBudget:
    """Return the budget of the layers with experts of a model chunk.

    Layers that are recomputed in backward keep nothing, except those that are recomputed together.

    Args:
        config: of the model.
        with_experts: which layers of the chunk have experts; in a hybrid model, which letters.
        max_assignments: largest number of assignments of a layer; None is an automatic limit.
    """
    held = sum(with_experts)
    if config.recompute_granularity == "full":
        again = config.recompute_num_layers or 1
        starts = range(0, len(with_experts), again)
        together = max((sum(with_experts[i : i + again]) for i in starts), default=0)
        held = together if config.recompute_method == "uniform" else sum(with_experts[again:])
    elif "moe" in (config.recompute_modules or ()):
        held = 1
    return AssignmentBudget(max(1, held), max_assignments)


@dataclass
class ChunkedExperts:
    """The experts of a layer, which are dispatched, computed and combined chunk by chunk.

    Attributes:
        experts: module with the experts of this rank.
        parts: the same experts, to compute parts of them.
        budget: shared by the layers of a model chunk.
    """

    experts: torch.nn.Module
    parts: PartialExperts
    budget: AssignmentBudget
    config: TransformerConfig
    groups: ProcessGroupCollection
    _dispatchers: dict[int, Dispatcher] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        experts: torch.nn.Module,
        budget: AssignmentBudget | None,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> "ChunkedExperts | None":
        """Return the chunked experts; None without a budget, or if the experts have no parts.

        Raises:
            ValueError: a limit is asked for, and these experts cannot be computed in parts.
        """
        if budget is None:
            return None
        parts = in_parts(experts, config)
        if parts is not None:
            return cls(experts, parts, budget, config, groups)
        if budget.max_assignments is not None:
            raise ValueError(
                f"moe_relu_max_assignments is {budget.max_assignments}, but "
                f"{type(experts).__name__} cannot be computed in parts; leave it out, or use "
                f"transformer_impl local without gradient_accumulation_fusion"
            )
        return None

    def plan(self, layer: int, counts: Tensor, tokens: float) -> list[Chunk]:
        """Plan the chunks of a forward; an empty list computes all experts at once.

        Args:
            layer: number of the layer.
            counts: tokens of every rank for every expert, `[ep, expert tp, E]`, on the host.
            tokens: mean number of tokens of a rank.
        """
        balanced = tokens * self.config.moe_router_topk
        return plan_over_ranks(
            counts, lambda rows: self.budget.max_rows_per_chunk(layer, rows, balanced)
        )

    def compute(
        self,
        chunks: list[Chunk],
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Compute all chunks: `[s, b, H]`, `[T, E]` and bool `[T, E]` to `[s, b, H]`.

        The counts are those of the plan.
        """
        _wait_for_parameters(self.experts)
        weights = list(self.experts.parameters())
        buffers = main_grads(weights)
        output = run_chunks(
            self._routed(chunks, routing_map, counts),
            chunks,
            hidden_states.flatten(end_dim=-2),
            probs,
            in_order(weights),
            main_grads=buffers,
        ).view_as(hidden_states)
        return mark_gradients(output, weights, added=buffers is not None)

    def _routed(self, chunks: list[Chunk], routing_map: Tensor, counts: Tensor) -> "_RoutedChunks":
        """Count the tokens of every chunk, so that none waits for the device later."""
        ep = self.groups.ep.size()
        routed = _RoutedChunks(self.parts, routing_map, self._dispatcher_for, ep)
        by_owner = counts.view(*counts.shape[:2], ep, -1)

        def count(split: list[Chunk]) -> Tensor:
            parts = [tokens_per_expert(routed.map_of(chunk)).view(ep, -1) for chunk in split]
            flat = torch.cat(parts, dim=1).flatten()
            gathered = self._dispatcher_for(1).of_all_ranks(flat)
            return gathered.view(*gathered.shape[:2], ep, -1)

        found = counts_of_chunks(chunks, by_owner, count)
        routed.counts = {chunk: part.flatten(start_dim=2) for chunk, part in found.items()}
        return routed

    def _dispatcher_for(self, num_local_experts: int) -> Dispatcher:
        """Return a dispatcher for a chunk with `num_local_experts` experts of every rank."""
        if num_local_experts not in self._dispatchers:
            config, ep = copy.copy(self.config), self.groups.ep
            config.num_moe_experts = num_local_experts * ep.size()
            first = num_local_experts * ep.rank()
            self._dispatchers[num_local_experts] = DISPATCHERS[config.moe_token_dispatcher_type](
                num_local_experts,
                list(range(first, first + num_local_experts)),
                config=config,
                pg_collection=self.groups,
            )
        return self._dispatchers[num_local_experts]


@dataclass
class _RoutedChunks:
    """Chunks of a layer with one routing map, as a `remoe.kernels.chunks.ChunkOfExperts`."""

    parts: PartialExperts
    routing_map: Tensor
    dispatcher_for: Callable[[int], Dispatcher]
    ep_size: int
    counts: dict[Chunk, Tensor] = field(default_factory=dict)

    def map_of(self, chunk: Chunk) -> Tensor:
        """Return the routing of the chunk's tokens to its experts, bool `[n, E of the chunk]`."""
        rows = chunk.tokens(len(self.routing_map))
        return self._columns(chunk, self.routing_map[rows])

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the chunk's part of the weights, or of tensors of the same shapes."""
        return self.parts.weights_of(chunk, tensors)

    def compute(
        self,
        chunk: Chunk,
        x: Tensor,
        probs: Tensor,
        weights: list[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """Return the chunk's part of the output: `[n, H]` and `[n, E]` to `[n, H]`."""
        dispatcher = self.dispatcher_for(chunk.experts.stop - chunk.experts.start)
        dispatcher.expect(self.counts[chunk])
        rows, prob = dispatcher.dispatch_preprocess(
            x.unsqueeze(1), self.map_of(chunk), self._columns(chunk, probs)
        )
        rows, prob = dispatcher.token_dispatch(rows, prob)
        rows, counts, prob = dispatcher.dispatch_postprocess(rows, prob)
        rows = self.parts.compute_part(chunk, rows, counts, prob, weights, only_for_backward)
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        output: Tensor = dispatcher.combine_postprocess(rows).squeeze(1)
        return output

    def _columns(self, chunk: Chunk, values: Tensor) -> Tensor:
        """Return the columns of this chunk's experts, for every expert-parallel rank."""
        by_owner = values.view(len(values), self.ep_size, -1)
        return by_owner[:, :, chunk.experts].flatten(start_dim=1)


def _wait_for_parameters(module: torch.nn.Module) -> None:
    """Run the hooks by which Megatron's DDP waits for gathered parameters.

    Chunks use views of the parameters, which the hooks would not recognize.
    """
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            hook(part, ())
