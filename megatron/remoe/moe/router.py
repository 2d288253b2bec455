"""The ReLU router as a Megatron module: an adapter, whose equations are in `remoe`.

Shapes, as in Megatron: s sequence, b micro-batch, h hidden; T = s * b local tokens, E experts.
"""

from functools import cached_property

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.counting import CountsRouting
from remoe.config import ControllerConfig, ReLURouting
from remoe.controller import register_l1_coeff
from remoe.regularization import penalty, router_regularization
from remoe.routing import bounded_routing, relu_routing


class ReLURouter(CountsRouting, Router):
    """Routes with `relu(x W)`, adds the L1 penalty in backward, and counts what it routed.

    Buffers beside the counters:
        l1_coeff: fp32, 0-d, persistent: the coefficient of the penalty.
    """

    l1_coeff: Tensor
    # These methods of Megatron's TopK router need nothing else of it.
    apply_input_jitter = TopKRouter.apply_input_jitter
    apply_z_loss = TopKRouter.apply_z_loss

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: ReLURouting | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.relu_routing = routing or ReLURouting()
        self.input_jitter = None  # set by apply_input_jitter
        register_l1_coeff(self, self.controller, torch.cuda.current_device())
        self.register_counters(self.num_experts)

    @cached_property
    def controller(self) -> ControllerConfig:
        """The rule that moves the coefficient."""
        return self.relu_routing.controller_for(self.num_experts, self.config.moe_router_topk)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens.

        Args:
            input: `[s, b, h]`.
            padding_mask: bool `[s, b]`, True for padding tokens, or None. Padding is routed like
                any token, as in Megatron, but it is neither penalized nor counted.

        Returns:
            probs `[T, E]` in the dtype of `input`, and routing_map, bool `[T, E]`.
        """
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        jittered = self.apply_input_jitter(input)
        logits = router_gating_linear(jittered, self.weight, self.bias, dtype)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        probs, routing_map = self.routing(logits.view(-1, self.num_experts), padding_mask)
        return probs.to(input.dtype), routing_map

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turn logits `[T, E]` into fp32 (or fp64) probs and the routing map.

        In training this also attaches the penalty and counts.
        """
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map = relu_routing(logits)
        if self.counts_now:
            probs = self._penalize(probs, routing_map, padding_mask)
        bounds = self.relu_routing
        if bounds.max_active_experts is None and not bounds.at_least_one_expert:
            return probs, routing_map
        # What the ReLU activates is penalized and counted; the bounds would mislead the controller.
        return bounded_routing(
            logits,
            probs,
            max_active=bounds.max_active_experts,
            at_least_one=bounds.at_least_one_expert,
        )

    def _penalize(self, probs: Tensor, routing_map: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Count, and attach the gradient of the penalty to `probs`, whose values do not change.

        The load weights count the tokens of the micro-batch over TP and CP, not over DP, as the
        published code does.
        """
        counts = self.count(routing_map, padding_mask)
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts.flat, group=self.tp_cp_group)
        l1_reg = router_regularization(
            probs,
            tokens_per_expert_E=counts.per_expert,
            num_tokens=counts.num_tokens,
            topk=self.config.moe_router_topk,
            load_balancing=self.relu_routing.load_balancing,
            padding_mask_T=padding_mask,
        )
        self.statistics.l1_reg.add_(l1_reg.detach())
        # With a loss per token Megatron divides every gradient by the number of tokens of the
        # global batch, to which this micro-batch contributes; ranks may have unequal parts of it.
        summed_tokens = counts.num_tokens if self.calculate_per_token_loss else None
        attached: Tensor = MoEAuxLossAutoScaler.apply(
            probs, penalty(self.l1_coeff, l1_reg, summed_tokens=summed_tokens)
        )
        return attached
