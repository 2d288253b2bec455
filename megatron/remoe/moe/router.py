"""The ReLU router as a Megatron module: an adapter, the equations are in `remoe`.

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
from remoe.regularization import l1_regularization, load_weights
from remoe.routing import bounded_routing, relu_routing


class ReLURouter(CountsRouting, Router):
    """Routes with `relu(x W)`, adds the L1 penalty in backward, and counts what it routed.

    Buffers beside the counters:
        l1_coeff: fp32, 0-d, persistent: the coefficient of the penalty.
    """

    l1_coeff: Tensor
    # Megatron's own, which need nothing of its top-k router.
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
        self.input_jitter = None  # made by apply_input_jitter
        device = torch.cuda.current_device()
        register_l1_coeff(self, self.controller, device)
        self.register_counters(self.num_experts)

    @cached_property
    def controller(self) -> ControllerConfig:
        return self.relu_routing.controller_for(self.num_experts, self.config.moe_router_topk)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens.

        Args:
            input: `[s, b, h]`.
            padding_mask: bool `[s, b]`, True for padding tokens, or None. Padding is routed like
                any token, as in Megatron, but neither penalised nor counted.

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
        """`[T, E]` logits to fp32 (or fp64) probs and the routing map; penalises when training."""
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map = relu_routing(logits)
        # With activation recompute the router runs twice: first without gradients, then with.
        if self.training and torch.is_grad_enabled():
            probs = self._penalise(probs, routing_map, padding_mask)
        shortcuts = self.relu_routing
        if shortcuts.max_active_experts is None and not shortcuts.at_least_one_expert:
            return probs, routing_map
        # Penalised and counted is what the ReLU activates, or the controller would be misled.
        return bounded_routing(
            logits,
            probs,
            max_active=shortcuts.max_active_experts,
            at_least_one=shortcuts.at_least_one_expert,
        )

    def _penalise(self, probs: Tensor, routing_map: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Attach the regulariser's gradient to `probs`, unchanged in value, and count.

        The load weights count the tokens of the micro-batch over TP and CP, not over DP, as the
        published code does.
        """
        num_ranks = self.tp_cp_group.size()
        penalised = probs
        if padding_mask is not None:
            penalised = probs.masked_fill(padding_mask.unsqueeze(1), 0)
        total = self.count(routing_map, padding_mask, num_ranks=num_ranks)
        if num_ranks > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)

        weights = None
        if self.relu_routing.load_balancing == "aux_loss":
            weights = load_weights(total[1:], num_tokens=total[0], topk=self.config.moe_router_topk)
        l1_reg = l1_regularization(penalised, num_tokens=total[0], load_weights_E=weights)
        with torch.no_grad():
            self.stats[0] += l1_reg
        penalty = self.l1_coeff * l1_reg
        if self.calculate_per_token_loss:
            # Megatron will divide every gradient by the number of tokens of the global batch, of
            # which these are the micro-batch's. Ranks need not have equal parts of them.
            penalty = penalty * total[0]
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, penalty)
        return attached
