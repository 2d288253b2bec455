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

import torch
from torch import Tensor

from remoe.routing import at_least_fp32, topk_routing


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
