"""Megatron's MoE layer with dispatchers that are sized by the routing map, and chunked experts."""

import copy

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.chunking import (
    AssignmentBudget,
    ChunkOfLayer,
    can_chunk,
    plan,
    wait_for_parameters,
)
from megatron.remoe.moe.dispatcher import DISPATCHERS, Dispatcher, is_dropless
from megatron.remoe.moe.experts import GroupedExperts, in_order, main_grads, mark_gradients
from remoe.kernels import Chunk, run_chunks


class DroplessMoELayer(MoELayer):
    """MoE layer for a router that may activate a varying number of experts per token.

    Args:
        budget: when the layer's assignments exceed it, dispatch, experts and combine run chunk by
            chunk, and again in backward. The router runs once, outside. None never chunks.

    Raises:
        ValueError: a limit is asked for, and these experts cannot be computed in parts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        budget: AssignmentBudget | None = None,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.budget: AssignmentBudget | None = None
        self._chunks: list[Chunk] = []
        self._routing_map: Tensor | None = None
        if not is_dropless(config):
            return
        self._pg_collection = pg_collection
        self._dispatchers: dict[int, Dispatcher] = {}
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        if budget is not None and can_chunk(self.experts, config):
            self.budget = budget
        elif budget is not None and budget.max_assignments is not None:
            raise ValueError(
                f"moe_relu_max_assignments is {budget.max_assignments}, but "
                f"{type(self.experts).__name__} cannot be computed in parts; leave it out, or use "
                f"transformer_impl local without gradient_accumulation_fusion"
            )

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._chunks = self._plan(routing_map)
        if not self._chunks:
            rows: tuple[Tensor, Tensor] = super().preprocess(hidden_states, probs, routing_map)
            return rows
        self._routing_map = routing_map
        return hidden_states, probs

    def _plan(self, routing_map: Tensor) -> list[Chunk]:
        if self.budget is None:
            return []
        budget, layer = self.budget, self.layer_number or 1
        counts, tokens = self.token_dispatcher.count(routing_map)
        balanced = tokens * self.config.moe_router_topk
        return plan(
            counts,
            self.num_local_experts,
            lambda rows: budget.rows_of_a_chunk(layer, rows, balanced),
        )

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        if self._chunks:
            return hidden_states, probs
        rows: tuple[Tensor, Tensor] = super().dispatch(hidden_states, probs)
        return rows

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        if not self._chunks:
            output, bias = super().routed_experts_compute(hidden_states, probs)
            if self.budget is not None and not isinstance(self.experts, GroupedExperts):
                output = mark_gradients(output, list(self.experts.parameters()), added=False)
            return output, bias
        shared = None
        if self.use_shared_expert and self.shared_expert_overlap:
            # The dispatcher would run these parts beside its communication, in this order, which is
            # therefore the order in which gradients arrive on ranks that are not chunked.
            shared = self.shared_experts
            shared.pre_forward_comm(hidden_states)
            shared.linear_fc1_forward_and_act()
        assert self._routing_map is not None
        wait_for_parameters(self.experts)
        weights = list(self.experts.parameters())
        chunk = ChunkOfLayer(
            self.experts, self._routing_map, self._dispatcher_for, self.token_dispatcher.ep_size
        )
        buffers = main_grads(weights)
        output = run_chunks(
            chunk,
            self._chunks,
            hidden_states.flatten(end_dim=-2),
            probs,
            in_order(weights),
            main_grads=buffers,
        ).view_as(hidden_states)
        output = mark_gradients(output, weights, added=buffers is not None)
        self._routing_map = None
        if shared is not None:
            shared.linear_fc2_forward()
            shared.post_forward_comm()
            output = output + shared.get_output()
        return output, None

    def _dispatcher_for(self, num_local_experts: int) -> Dispatcher:
        """Between the experts of a chunk, so many of every rank."""
        if num_local_experts not in self._dispatchers:
            config, groups = copy.copy(self.config), self._pg_collection
            config.num_moe_experts = num_local_experts * groups.ep.size()
            first = num_local_experts * groups.ep.rank()
            self._dispatchers[num_local_experts] = DISPATCHERS[config.moe_token_dispatcher_type](
                num_local_experts,
                list(range(first, first + num_local_experts)),
                config=config,
                pg_collection=groups,
            )
        return self._dispatchers[num_local_experts]

    def combine(self, output: Tensor) -> Tensor:
        return output if self._chunks else super().combine(output)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        if not self._chunks:
            whole: Tensor = super().postprocess(output, shared_expert_output)
            return whole
        self._chunks = []
        return output if shared_expert_output is None else output + shared_expert_output
