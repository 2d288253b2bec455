"""ReLU routing (arXiv 2412.14711), and what all routers under the adaptive L1 penalty share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.controller import ControllerConfig, L1Coefficient, next_l1_coeff
from remoe.regularization import (
    LoadBalancing,
    load_weights,
    router_regularization,
    sum_over_tokens,
)
from remoe.routing import bounded_routing, relu_routing
from remoe.selections.base import Budget, Routing, Tensors, scalar
from remoe.settings import setting
from remoe.statistics import StepReport, TokenCounts


@dataclass(frozen=True, kw_only=True)
class L1Routing(L1Coefficient, Routing):
    """The settings of a router whose number of active experts the adaptive L1 penalty keeps.

    Buffers:
        l1_coeff: fp32, 0-d, the coefficient of the penalty.
        load: fp32 `[E]`, with `load_balancing` "global_batch": the load weights of the step before,
            ones at first.
    """

    budget: ClassVar[Budget] = "l1"
    state: ClassVar[str] = "the coefficient of the penalty"
    starts_dense: ClassVar[bool] = True
    reports: ClassVar[str | None] = "l1_coeff"

    load_balancing: LoadBalancing = setting(
        "aux_loss",
        flag="--moe-relu-load-balancing",
        help="Weight the L1 penalty by the load of each expert (aux_loss, Eq. 10), by its square "
        "(squared), by its load in the step before, over the whole batch (global_batch), or not "
        "(none, Eq. 9).",
        on_resume="refused",
        exported=True,
        may_idle=True,
    )
    l1_coeff_per_layer: bool = setting(
        False,
        flag="--moe-relu-l1-reg-coeff-per-layer",
        help="Move the coefficient of every layer by the sparsity of that layer, instead of all by "
        "the mean.",
        # Coefficients that have moved apart stay apart, and no one of them is that of all.
        on_resume="refused",
        exported=True,
    )

    @property
    def per_layer(self) -> bool:
        """Whether every layer has a coefficient of its own."""
        return self.l1_coeff_per_layer

    def controller_for(self, num_experts: int, topk: int) -> ControllerConfig:
        """Return the rule that reaches a mean of `topk` active experts out of `num_experts`."""
        return ControllerConfig(
            target_sparsity=1 - topk / num_experts,
            l1_coeff_init=self.l1_coeff_init,
            l1_coeff_multiplier=self.l1_coeff_multiplier,
        )

    def buffers(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial coefficient, and the initial load if the penalty is weighted by it."""
        state = {"l1_coeff": scalar(self.controller_for(num_experts, topk).l1_coeff_init)}
        if self.load_balancing == "global_batch":
            state["load"] = torch.ones(num_experts)
        return state

    def penalized(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """Return the non-negative numbers whose L1 norm is penalized, `[T, E]`: the gates."""
        return probs_TE

    def regularizer(
        self,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tensors: Tensors,
        *,
        counts: TokenCounts,
        topk: int,
        padding_mask_T: Tensor | None = None,
    ) -> Tensor:
        """Return the L1 norm of Eq. 9 or 10, or of a variant of it, 0-d."""
        sum_E = sum_over_tokens(self.penalized(logits_TE, probs_TE), padding_mask_T)
        return self.regularizer_of_sums(sum_E, tensors, counts=counts, topk=topk)

    def regularizer_of_sums(
        self, sum_E: Tensor, tensors: Tensors, *, counts: TokenCounts, topk: int
    ) -> Tensor:
        """Return the same, given the sums over tokens of what is penalized, `[E]`."""
        return router_regularization(
            sum_E,
            tokens_per_expert_E=counts.per_expert,
            num_tokens=counts.num_tokens,
            topk=topk,
            load_balancing=self.load_balancing,
            last_load_E=tensors.get("load"),
        )

    def moved(self, state: Tensors, step: StepReport) -> dict[str, Tensor]:
        """Return the next coefficients (Eq. 7), and the load of the step (Eq. 11)."""
        num_experts = step.tokens_per_expert_LE.shape[1]
        sparsity = step.sparsity_L if self.per_layer else step.sparsity
        rule = self.controller_for(num_experts, step.topk)
        moved = {"l1_coeff": next_l1_coeff(state["l1_coeff"], sparsity, rule)}
        if "load" in state:
            tokens_L1 = step.tokens_L.unsqueeze(1)
            load_LE = torch.vmap(
                lambda counts, tokens: load_weights(counts, num_tokens=tokens, topk=step.topk)
            )(step.tokens_per_expert_LE, step.tokens_L)
            moved["load"] = torch.where(tokens_L1 > 0, load_LE, state["load"]).float()
        return moved

    def report(self, state: Tensors) -> Tensor:
        """Return the coefficient."""
        return state["l1_coeff"]


@dataclass(frozen=True, kw_only=True)
class ReLURouting(L1Routing):
    """The settings of a ReLU router (arXiv 2412.14711, Eq. 5)."""

    title: ClassVar[str] = "ReLU routing"
    source: ClassVar[str] = "ReMoE, arXiv 2412.14711"

    max_active_experts: int | None = setting(
        None,
        flag="--moe-relu-max-active-experts",
        help="Shortcut: keep only this many of a token's experts, those with the largest gates. "
        "The number is that before granularity.",
        within="[1, inf)",
        on_resume="refused",
        exported=True,
        per_granularity=True,
    )
    at_least_one_expert: bool = setting(
        False,
        flag="--moe-relu-at-least-one-expert",
        help="Shortcut: give a token without any active expert the one with the largest logit.",
        on_resume="refused",
        exported=True,
    )

    @property
    def is_plain_relu(self) -> bool:
        """Whether there are no bounds, which read the logits of whole tokens again."""
        bounded = self.max_active_experts is not None or self.at_least_one_expert
        return type(self) is ReLURouting and not bounded

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return `ReLU(z)`, without the bounds, which would mislead the controller."""
        return relu_routing(logits_TE)

    def bound(
        self, logits_TE: Tensor, probs_TE: Tensor, routing_map_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gates within the bounds."""
        if self.max_active_experts is None and not self.at_least_one_expert:
            return probs_TE, routing_map_TE
        return bounded_routing(
            logits_TE,
            probs_TE,
            max_active=self.max_active_experts,
            at_least_one=self.at_least_one_expert,
        )
