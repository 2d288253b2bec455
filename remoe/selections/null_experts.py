"""TopK over experts and null experts, which do nothing (AdaMoE, arXiv 2406.13233).

A token chooses k' of E experts and n null experts, and as many experts remain to it as it has not
chosen null ones: their number varies, while the budget is fixed. Gates are the softmax over all
E + n, divided by their sum over the chosen experts that are not null, as in the published code
(github.com/CengZihao/AdaMoE), and in that of MoE++ (arXiv 2410.07348), whose null experts are also
copies and constants. A token's only expert has a gate of one, without a gradient, and a token that
has chosen null experts alone is not routed. LongCat-Flash (arXiv 2509.01322) steers the number of
null experts by a bias instead of a loss; that is not here.

Shapes: T tokens, E experts, N = E + n.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.routing import at_least_fp32, topk_routing
from remoe.selections.base import Budget, Routing, Tensors
from remoe.settings import setting


def null_experts_topk(*, num_experts: int, num_null_experts: int, topk: int) -> int:
    """Return k', with which k experts are active on average if all E + n have the same load.

    Args:
        num_experts: E.
        num_null_experts: n.
        topk: k, the target number of active experts per token.

    Raises:
        ValueError: there is no null expert, or k' = k (E + n) / E is not whole.
    """
    if num_null_experts < 1:
        raise ValueError(f"num_null_experts is {num_null_experts}; it must be at least 1")
    topk_of_all, rest = divmod(topk * (num_experts + num_null_experts), num_experts)
    if rest:
        raise ValueError(
            f"num_null_experts is {num_null_experts}, with which a token would choose "
            f"{topk} x ({num_experts} + {num_null_experts}) / {num_experts} experts, which is no "
            f"whole number; choose a multiple of {num_experts}, or another number with which it is"
        )
    return topk_of_all


def null_experts_routing(
    logits_TN: Tensor, *, num_experts: int, topk_of_all: int
) -> tuple[Tensor, Tensor]:
    """Route every token to those of its k' largest logits that do not belong to null experts.

    Args:
        logits_TN: router logits `[T, E + n]`, those of null experts last.
        num_experts: E.
        topk_of_all: k', the number of choices of a token.

    Returns:
        probs: `[T, E]`, at least fp32. Their sum is one, or zero if a token has null experts only.
        routing_map: bool `[T, E]`, True where the expert is active.
    """
    _, routing_map_TN = topk_routing(logits_TN, topk=topk_of_all)
    routing_map = routing_map_TN[:, :num_experts]
    logits_TE = at_least_fp32(logits_TN)[:, :num_experts].masked_fill(~routing_map, -torch.inf)
    # A row without experts would be NaN, and so would its gradient.
    logits_TE = logits_TE.masked_fill(~routing_map.any(dim=1, keepdim=True), 0)
    return torch.softmax(logits_TE, dim=1) * routing_map, routing_map


def real_gates(
    probs_TN: Tensor, routing_map_TN: Tensor, *, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return what `null_experts_routing` returns, given the softmax of the chosen experts.

    Args:
        probs_TN: `[T, E + n]`, softmax over all experts or over the chosen ones, zero elsewhere.
        routing_map_TN: bool `[T, E + n]`, True for the chosen experts.
        num_experts: E.
    """
    probs_TE, routing_map = probs_TN[:, :num_experts], routing_map_TN[:, :num_experts]
    total_T1 = probs_TE.sum(dim=1, keepdim=True)
    return probs_TE / total_T1.masked_fill(total_T1 == 0, 1), routing_map


@dataclass(frozen=True, kw_only=True)
class NullExpertsRouting(Routing):
    """The settings of TopK routing with null experts."""

    title: ClassVar[str] = "TopK routing with null experts"
    source: ClassVar[str] = "AdaMoE, arXiv 2406.13233"
    budget: ClassVar[Budget] = "fixed k"

    num_null_experts: int | None = setting(
        None,
        flag="--moe-null-experts",
        help="Number of null experts, which do nothing; k (E + n) / E must be whole. The number is "
        "that before granularity. Default: as many as experts.",
        within="[1, inf)",
        on_resume="refused",
        exported=True,
        per_granularity=True,
    )

    def num_logits(self, num_experts: int) -> int:
        """Return the number of logits of a token: E + n."""
        return num_experts + (self.num_null_experts or num_experts)

    def topk_of_all(self, num_experts: int, topk: int) -> int:
        """Return k', the number of experts that a token chooses, null ones among them."""
        nulls = self.num_logits(num_experts) - num_experts
        return null_experts_topk(num_experts=num_experts, num_null_experts=nulls, topk=topk)

    def check_model(self, num_experts: int, topk: int) -> None:
        """Refuse numbers with which k' is not whole."""
        self.topk_of_all(num_experts, topk)

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return gates and map of the experts, `[T, E]`, given logits `[T, E + n]`."""
        num_logits = logits_TE.shape[1]
        nulls = self.num_null_experts or num_logits // 2
        num_experts = num_logits - nulls
        return null_experts_routing(
            logits_TE, num_experts=num_experts, topk_of_all=self.topk_of_all(num_experts, topk)
        )
