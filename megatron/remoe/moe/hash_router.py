"""The router that needs the ids of the tokens, and how they reach it.

Megatron's layers know hidden states only. A hook of the model keeps the ids of the micro-batch at
the start of every forward pass, for the routers of the model. Without pipeline stages, backward of
a micro-batch follows its forward, so that layers that are computed again in backward see its ids.

Shapes, as in Megatron: s sequence, b micro-batch, h hidden; T = s * b local tokens, E experts.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.counting import CountsRouting
from remoe.config import AnyRouting
from remoe.selections.hashed import HashRouting


class HashRouter(CountsRouting, Router):
    """Routes by the ids of the tokens, and has no weight.

    Attributes:
        token_ids: of the micro-batch, `[b, s]`, before sequence parallelism splits it;
            `keep_token_ids` sets it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: HashRouting,
        **newer: Any,
    ) -> None:
        super().__init__(
            config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **newer
        )
        # Parameters without a gradient would keep overlapped reductions waiting.
        for name in ("weight", "bias"):
            delattr(self, name)
            self.register_parameter(name, None)
        self.token_ids: Tensor | None = None
        self.routing_settings = routing
        self.register_selection(routing, self.num_experts, config.moe_router_topk)

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, *newer: Any
    ) -> tuple[Tensor, Tensor]:
        """Route the tokens, as `SelectionRouter` does.

        Raises:
            ValueError: the ids are not known, or not those of these tokens.
        """
        probs, routing_map = self.routing(self._local_ids(input))
        if self.counts_now:
            self.count(routing_map, None if padding_mask is None else padding_mask.reshape(-1))
        return probs.to(input.dtype), routing_map

    def routing(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Turn ids `[T]` into fp32 probs and the routing map, both `[T, E]`."""
        return self.routing_settings.select_by_id(
            token_ids,
            num_experts=self.num_experts,
            topk=self.config.moe_router_topk,
            layer_number=self.layer_number,
        )

    def _local_ids(self, input: Tensor) -> Tensor:
        """Return the ids of the tokens of this rank, `[T]`, in the order of `[s, b]`."""
        if self.token_ids is None:
            raise ValueError(
                "hash routing does not know the ids of the tokens; pass input_ids to the model, "
                "and let megatron.remoe.arguments.configure set it up, or add "
                "moe.hash_router.keep_token_ids to its pre_wrap_hooks"
            )
        ids = self.token_ids.transpose(0, 1)
        if self.config.sequence_parallel:
            ids = ids.chunk(self.tp_group.size())[self.tp_group.rank()]
        if ids.shape != input.shape[:2]:
            raise ValueError(
                f"hash routing has ids of {tuple(ids.shape)} tokens, and is given "
                f"{tuple(input.shape[:2])}; pass all tokens of a micro-batch through the model"
            )
        return ids.reshape(-1)


def keep_token_ids(models: list[Any]) -> list[Any]:
    """Let every model chunk hand the ids of a micro-batch to its hash routers.

    It is one of Megatron's `pre_wrap_hooks`.
    """
    for model in models:
        routers = [module for module in model.modules() if isinstance(module, HashRouter)]

        def keep(
            _: torch.nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            routers: list[HashRouter] = routers,
        ) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            for router in routers:
                router.token_ids = ids

        if routers:
            model.register_forward_pre_hook(keep, with_kwargs=True)
    return models


def install(model_config: Any, routing: AnyRouting | None) -> None:
    """Let Megatron call `keep_token_ids` when it builds a model that needs it."""
    if isinstance(routing, HashRouting):
        model_config.pre_wrap_hooks.append(keep_token_ids)
