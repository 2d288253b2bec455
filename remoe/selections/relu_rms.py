"""ReLU routing with an RMS norm and a learned scale of every expert (BlockFFN, DECO).

BlockFFN (arXiv 2507.08771) computes `G(x) = RMSNorm(ReLU(x W))`, where RMSNorm has a weight of
every expert; we read that in its published code (github.com/thunlp/BlockFFN), whose weights start
at one. DECO (arXiv 2605.10933) describes its router as ReLU with a learned scale of every expert;
we have seen its abstract and its code not at all, so the norm here is BlockFFN's. Neither keeps its
sparsity by an L1 penalty that a controller moves: that budget is ReMoE's (arXiv 2412.14711).

The penalty acts on `ReLU(x W)`, before the norm, for two reasons. A penalty on gates would shrink
the learned scale, without any expert falling silent. And the L1 norm of a vector of fixed RMS is
smallest with one active expert, where it has no gradient: a token would never be without experts,
and a mean of k = 1 would be out of reach.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.routing import at_least_fp32, relu_routing
from remoe.selections.base import Tensors
from remoe.selections.relu import L1Routing

EPS = 1e-6  # of the published code


def relu_rms_routing(
    logits_TE: Tensor, scale_E: Tensor, *, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Divide the ReLU of the logits by their RMS over all experts, and multiply it by the scale.

    A token without a positive logit has gates of zero, and no gradient.

    Args:
        logits_TE: router logits `[T, E]`.
        scale_E: learned weights of the norm `[E]`, which start at one.
        eps: constant below the root.

    Returns:
        probs: `[T, E]`, at least fp32, zero where inactive, negative where the scale is.
        routing_map: bool `[T, E]`, True where the logit is positive.
    """
    relu_TE, routing_map = relu_routing(logits_TE)
    mean_square_T1 = relu_TE.square().mean(dim=1, keepdim=True)
    normed_TE = relu_TE * torch.rsqrt(mean_square_T1 + eps)
    return normed_TE * scale_E.to(normed_TE.dtype), routing_map


def relu_rms_penalized(logits_TE: Tensor) -> Tensor:
    """Return what the L1 penalty acts on, `[T, E]`: the ReLU of the logits, before the norm."""
    return torch.relu(at_least_fp32(logits_TE))


@dataclass(frozen=True, kw_only=True)
class ReLURMSRouting(L1Routing):
    """The settings of a ReLU router with RMS norm.

    Parameters:
        gate_scale: `[E]`, ones at first.
    """

    title: ClassVar[str] = "ReLU routing with RMS norm"
    source: ClassVar[str] = "BlockFFN, arXiv 2507.08771"

    def parameters(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial scale of every expert."""
        return {"gate_scale": torch.ones(num_experts)}

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return the normed and scaled gates."""
        return relu_rms_routing(logits_TE, tensors["gate_scale"])

    def penalized(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """Return the ReLU of the logits, `[T, E]`."""
        return relu_rms_penalized(logits_TE)
