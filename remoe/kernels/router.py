"""The ReLU router with everything that is summed over its tokens (arXiv 2412.14711, Eq. 5, 8-10).

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from remoe.kernels.backend import uses_triton
from remoe.kernels.loading import fit_in_a_tile, triton_kernels
from remoe.regularization import sum_over_tokens
from remoe.routing import active_experts, at_least_fp32, relu_routing
from remoe.statistics import TokenCounts


@dataclass(frozen=True)
class ReLURouted:
    """What a ReLU router says of a micro-batch. Padding is routed, but neither summed nor counted.

    Attributes:
        probs_TE: gates `[T, E]`.
        routing_map_TE: bool `[T, E]`, the active pairs.
        sum_E: the sum of every expert's gates, at least fp32, which the L1 penalty weights.
        counts: tokens, and tokens per expert, int64.
        silent: number of tokens without any active expert, int64, 0-d.
        most_active: the largest number of experts that one token activates, int64, 0-d.
    """

    probs_TE: Tensor
    routing_map_TE: Tensor
    sum_E: Tensor
    counts: TokenCounts
    silent: Tensor
    most_active: Tensor


def fuses(logits_TE: Tensor) -> bool:
    """Return whether `relu_router` is one pass over these logits."""
    return uses_triton(logits_TE, "router") and fit_in_a_tile(logits_TE.shape[1])


def relu_router(
    logits_TE: Tensor,
    padding_mask_T: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> ReLURouted:
    """Route by the ReLU of the logits, and sum and count in the same pass where Triton runs.

    Backward adds the gradients of gates and sums in one pass as well, so that the gradient of the
    penalty, which is a function of the sums, costs nothing of its own.

    Args:
        logits_TE: router logits `[T, E]`.
        padding_mask_T: bool `[T]`, True for padding tokens.
        dtype: of the gates; by default at least fp32. Sums are those of the gates before they are
            rounded to it.
    """
    dtype = dtype or torch.promote_types(logits_TE.dtype, torch.float32)
    if not fuses(logits_TE):
        return relu_router_in_torch(logits_TE, padding_mask_T, dtype=dtype)
    probs, routing_map, sum_E, counts, silent, most_active = triton_kernels().relu_router(
        logits_TE, padding_mask_T, dtype
    )
    return ReLURouted(probs, routing_map, sum_E, TokenCounts(counts), silent, most_active)


def relu_router_in_torch(
    logits_TE: Tensor, padding_mask_T: Tensor | None = None, *, dtype: torch.dtype
) -> ReLURouted:
    """Return the same, operation by operation."""
    probs_TE, routing_map_TE = relu_routing(at_least_fp32(logits_TE))
    counted_TE = routing_map_TE
    counts = TokenCounts.of(routing_map_TE, padding_mask_T)
    if padding_mask_T is not None:
        counted_TE = routing_map_TE & ~padding_mask_T.unsqueeze(1)
    active_T = active_experts(counted_TE)
    return ReLURouted(
        probs_TE=probs_TE.to(dtype),
        routing_map_TE=routing_map_TE,
        sum_E=sum_over_tokens(probs_TE, padding_mask_T),
        counts=counts,
        silent=counts.num_tokens - (active_T > 0).sum(),
        most_active=torch.cat([active_T, active_T.new_zeros(1)]).max(),
    )
