"""Megatron's MoE layer with dispatchers that are sized by the routing map, and chunked experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.chunking import ChunkedExperts
from megatron.remoe.moe.dispatcher import DISPATCHERS
from megatron.remoe.moe.experts import SequentialParts
from megatron.remoe.moe.gradients import mark_gradients
from remoe.kernels.chunks import AssignmentBudget


class DroplessMoELayer(MoELayer):
    """MoE layer for a router that may activate a varying number of experts per token.

    Megatron calls preprocess, dispatch, routed_experts_compute, combine and postprocess one after
    the other. Here routed_experts_compute does all of it, in one of two ways: at once, with
    Megatron's own methods, or chunk by chunk. The others hand on what they are given.

    Args:
        config: of a model that is `dispatcher.is_dropless`.
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
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.chunked = ChunkedExperts.of(self.experts, budget, config, pg_collection)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hand on the input and the routing."""
        return hidden_states, (probs, routing_map)

    def dispatch(self, hidden_states: Tensor, probs: Any) -> tuple[Tensor, Any]:
        """Hand on the input and the routing."""
        return hidden_states, probs

    def routed_experts_compute(self, hidden_states: Tensor, probs: Any) -> tuple[Tensor, None]:
        """Compute the output of the routed experts, `[s, b, h]`, given `(probs, routing_map)`."""
        probs, routing_map = probs
        if self.chunked is not None:
            counts, tokens = self.token_dispatcher.count(routing_map)
            if chunks := self.chunked.plan(self.layer_number or 1, counts, tokens):
                inputs = (chunks, hidden_states, probs, routing_map, counts)
                return self._in_chunks(hidden_states, partial(self.chunked.compute, *inputs)), None
        return self._at_once(hidden_states, probs, routing_map), None

    def combine(self, output: Tensor) -> Tensor:
        """Hand on the output."""
        return output

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Add the output of shared experts that ran before the routed ones."""
        return output if shared_expert_output is None else output + shared_expert_output

    def _at_once(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        rows, probs = super().preprocess(hidden_states, probs, routing_map)
        rows, probs = super().dispatch(rows, probs)
        rows, _ = super().routed_experts_compute(rows, probs)
        if self.chunked is not None and isinstance(self.chunked.parts, SequentialParts):
            # Chunks of another micro-batch may have added gradients themselves. Grouped experts
            # mark theirs in their own forward.
            rows = mark_gradients(rows, list(self.experts.parameters()), added=False)
        output: Tensor = super().postprocess(super().combine(rows), None)
        return output

    def _in_chunks(self, hidden_states: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Compute the routed experts, and the shared ones that run beside them."""
        if not (self.use_shared_expert and self.shared_expert_overlap):
            return compute()
        # At once, the dispatcher runs these parts beside its communication and in this order, in
        # which their gradients must arrive here too.
        shared = self.shared_experts
        shared.pre_forward_comm(hidden_states)
        shared.linear_fc1_forward_and_act()
        output = compute()
        shared.linear_fc2_forward()
        shared.post_forward_comm()
        whole: Tensor = output + shared.get_output()
        return whole
