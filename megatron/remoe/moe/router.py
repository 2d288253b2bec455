"""The router of every selection that reads logits, as a Megatron module: an adapter.

The equations are in `remoe`. TopK and null experts have Megatron's own router (`topk_router`), and
hash routing has no logits (`hash_router`).

Shapes, as in Megatron: s sequence, b micro-batch, h hidden; T = s * b local tokens, E experts.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.counting import CountsRouting
from remoe.config import ReLURouting, Selection
from remoe.kernels import fuses, relu_router
from remoe.regularization import penalty
from remoe.selections.expert_choice import ExpertChoiceRouting
from remoe.statistics import TokenCounts


class SelectionRouter(CountsRouting, Router):
    """Routes by the selection's function of `x W`, and counts what it routed.

    With an L1 budget it adds the penalty in backward. The parameters and buffers of the selection
    are its own, by their names.
    """

    # These methods of Megatron's TopK router need nothing else of it.
    apply_input_jitter = TopKRouter.apply_input_jitter
    apply_z_loss = TopKRouter.apply_z_loss

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: Selection | None = None,
        **newer: Any,
    ) -> None:
        super().__init__(
            config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, **newer
        )
        self.input_jitter = None  # set by apply_input_jitter
        self.register_selection(routing or ReLURouting(), self.num_experts, config.moe_router_topk)

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, *newer: Any
    ) -> tuple[Tensor, Tensor]:
        """Route the tokens.

        Args:
            input: `[s, b, h]`.
            padding_mask: bool `[s, b]`, True for padding tokens, or None. Padding is routed like
                any token, as in Megatron, but it is neither penalized nor counted.
            newer: what a newer Megatron passes on to its own router, which this one has no use for.

        Returns:
            probs `[T, E]` in the dtype of `input`, and routing_map, bool `[T, E]`.
        """
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        jittered = self.apply_input_jitter(input)
        logits = router_gating_linear(jittered, self.weight, self.bias, dtype)
        probs, routing_map = self.routing(logits, padding_mask, dtype=input.dtype)
        return probs.to(input.dtype), routing_map

    def routing(
        self,
        logits: Tensor,
        padding_mask: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn logits `[s, b, E]` into fp32 (or fp64) probs and the routing map, both `[T, E]`.

        In training this also attaches the penalty, counts and observes. Given a dtype, probs may be
        rounded to it already.
        """
        shape = logits.shape
        logits = logits.view(-1, self.num_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        if self.selection.is_plain_relu and fuses(logits):
            return self._routing_in_one_pass(logits, padding_mask, dtype)
        probs, routing_map = self._select(logits, shape, padding_mask)
        if self.counts_now:
            probs = self._observe(logits, probs, routing_map, padding_mask)
        # What the selection activates is penalized and counted; bounds would mislead the state.
        return self.selection.bound(logits, probs, routing_map)

    def _routing_in_one_pass(
        self, logits: Tensor, padding_mask: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Do what `routing` does for plain ReLU, with all sums and counts from one kernel."""
        assert isinstance(self.selection, ReLURouting)
        routed = relu_router(logits, padding_mask, dtype=dtype)
        if not self.counts_now:
            return routed.probs_TE, routed.routing_map_TE
        self.statistics.add_counts(
            routed.counts, routed.most_active, num_ranks=self.tp_cp_group.size()
        )
        counts = self._over_ranks(routed.counts)
        l1_reg = self.selection.regularizer_of_sums(
            routed.sum_E, self.tensors, counts=counts, topk=self.config.moe_router_topk
        )
        return self._penalized(routed.probs_TE, l1_reg, counts), routed.routing_map_TE

    def _select(
        self, logits: Tensor, shape: torch.Size, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        topk = self.config.moe_router_topk
        if not isinstance(self.selection, ExpertChoiceRouting):
            return self.selection.select(logits, self.tensors, topk=topk)
        # Experts choose among the tokens of a whole sequence, of which a rank may have a part.
        whole, mask = self._gathered(logits.view(shape), padding_mask, self.tp_group)
        if mask is not None:
            mask = mask.view(whole.shape[:2]).transpose(0, 1)
        chosen = self.selection.choose(whole.transpose(0, 1), topk=topk, padding_mask_bT=mask)
        first = self.tp_group.rank() * shape[0] if len(whole) > shape[0] else 0
        probs, routing_map = (
            part.transpose(0, 1)[first : first + shape[0]].reshape(-1, self.num_experts)
            for part in chosen
        )
        return probs, routing_map

    def _observe(
        self, logits: Tensor, probs: Tensor, routing_map: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """Count and observe, and attach the gradient of the penalty to `probs`, which stay.

        The load weights count the tokens of the micro-batch over TP and CP, not over DP, as the
        published code does.
        """
        topk = self.config.moe_router_topk
        counts = self.count(routing_map, padding_mask)
        if self.selection.observes:
            whole, mask = self._gathered(logits.detach(), padding_mask, self.tp_cp_group)
            found = self.selection.observe(whole, topk=topk, padding_mask_T=mask)
            has_tokens = 1.0 if mask is None else (~mask).any().double()
            share = has_tokens / self.tp_cp_group.size()
            self.observed[:1].add_(share)
            self.observed[1:].add_(found * share)
        if self.selection.budget != "l1":
            return probs
        counts = self._over_ranks(counts)
        l1_reg = self.selection.regularizer(
            logits, probs, self.tensors, counts=counts, topk=topk, padding_mask_T=padding_mask
        )
        return self._penalized(probs, l1_reg, counts)

    def _over_ranks(self, counts: TokenCounts) -> TokenCounts:
        """Sum the counts of this rank, in place, over the ranks that share its micro-batch."""
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts.flat, group=self.tp_cp_group)
        return counts

    def _penalized(self, probs: Tensor, l1_reg: Tensor, counts: TokenCounts) -> Tensor:
        """Add the gradient of the penalty to what backward brings to `probs`, which stay."""
        self.statistics.l1_reg.add_(l1_reg.detach())
        # With a loss per token Megatron divides every gradient by the number of tokens of the
        # global batch, to which this micro-batch contributes; ranks may have unequal parts of it.
        summed_tokens = counts.num_tokens if self.calculate_per_token_loss else None
        attached: Tensor = MoEAuxLossAutoScaler.apply(
            probs, penalty(self.state["l1_coeff"], l1_reg, summed_tokens=summed_tokens)
        )
        return attached

    def _gathered(
        self, values: Tensor, mask: Tensor | None, group: torch.distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor | None]:
        """Return values and mask of all ranks of a group along the first dimension.

        Gradients reach the values of this rank only.
        """
        if group.size() == 1 or not (self.config.sequence_parallel or self.cp_group.size() > 1):
            return values, mask

        def gather(part: Tensor) -> Tensor:
            whole = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
            torch.distributed.all_gather_into_tensor(whole, part.contiguous(), group=group)
            return whole

        whole = list(gather(values.detach()).chunk(group.size()))
        whole[group.rank()] = values
        return torch.cat(whole), None if mask is None else gather(mask)
