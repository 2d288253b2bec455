"""Megatron's own TopK router, with near-dense warm-up, and with null experts.

With the warm-up, many experts per token are active for the first steps, then k. It is the control
of ReMoE's dense stage (arXiv 2412.14711, appendix H): a softmax router that spends the same early
compute. k depends on the training iteration, which every checkpoint carries, so a resumed run goes
on with the right k. The routing map determines the size of the dispatch.
"""

import copy
from collections.abc import Callable
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.counting import CountsRouting
from remoe.config import TopKRouting
from remoe.selections.null_experts import NullExpertsRouting, real_gates


def current_iteration() -> int:
    """Return Megatron's number of finished training steps, also in a process that evaluates."""
    from megatron.training import get_args

    args = get_args()
    return int(getattr(args, "curr_iteration", None) or args.iteration or 0)


class CountingTopKRouter(CountsRouting, TopKRouter):
    """Megatron's TopK router, which counts what it routed and may warm up.

    An evaluation routes with the k of the last training step.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: TopKRouting | None = None,
        iteration: Callable[[], int] = current_iteration,
        **newer: Any,
    ) -> None:
        super().__init__(
            config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **newer
        )
        self.warmup = routing or TopKRouting()
        self._iteration = iteration
        self.register_selection(self.warmup, self.num_experts, config.moe_router_topk)

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **newer: Any
    ) -> tuple[Tensor, Tensor]:
        """Turn logits `[s, b, E]` into probs and the routing map, both `[T, E]`."""
        if self.warmup.warmup_steps:
            self.topk = self.warmup.topk_at(self._iteration(), self.config.moe_router_topk)
        probs, routing_map = super().routing(logits, padding_mask, **newer)
        if self.counts_now:
            self.count(routing_map, None if padding_mask is None else padding_mask.reshape(-1))
        return probs, routing_map


class NullExpertsRouter(CountsRouting, TopKRouter):
    """Megatron's TopK router of E experts and n null experts, which do nothing.

    The router's own config has E + n experts and the k of all of them, so that Megatron's auxiliary
    losses balance them all. What it returns, and what is counted, are the E experts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: NullExpertsRouting,
        **newer: Any,
    ) -> None:
        self.num_real = config.num_moe_experts
        wide = copy.copy(config)
        routing.check_model(config.num_moe_experts, config.moe_router_topk)
        wide.num_moe_experts = routing.num_logits(config.num_moe_experts)
        wide.moe_router_topk = routing.topk_of_all(config.num_moe_experts, config.moe_router_topk)
        super().__init__(
            config=wide, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **newer
        )
        self.register_selection(routing, config.num_moe_experts, config.moe_router_topk)

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **newer: Any
    ) -> tuple[Tensor, Tensor]:
        """Turn logits `[s, b, E + n]` into probs and the routing map, both `[T, E]`."""
        probs, routing_map = super().routing(logits, padding_mask, **newer)
        probs, routing_map = real_gates(probs, routing_map, num_experts=self.num_real)
        if self.counts_now:
            self.count(routing_map, None if padding_mask is None else padding_mask.reshape(-1))
        return probs, routing_map
