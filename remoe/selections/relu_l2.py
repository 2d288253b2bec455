"""ReLU routing of L2-normalized logits with one learned scale (UniPool's NormRouter).

UniPool (arXiv 2605.06665, Eq. 7) computes `s = sigma c max(0, z / (|z| + eps))`, where sigma is
learned and starts at one, and c is a constant (App. H). It keeps the k largest scores afterwards
and balances them by an auxiliary loss. Here nothing follows the ReLU, as in ReMoE (arXiv
2412.14711), whose controller moves an L1 penalty so that k experts are active on average; and c is
the initial value of the learned scale, not a factor beside it.

The penalty acts on `max(0, z / (|z| + eps))`, without the scale. It does not depend on the length
of z, so that shrinking all logits is no way out, and it can fall to zero, since z may turn until
all of its values are negative: it reaches every sparsity. A penalty on the scores would shrink the
scale instead.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.routing import at_least_fp32
from remoe.selections.base import Tensors
from remoe.selections.relu import L1Routing

EPS = 1e-8  # of the published code (github.com/Centaurus-Alpha/UniPool)


def relu_l2_routing(logits_TE: Tensor, scale: Tensor, *, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Multiply the scale by the ReLU of the logits, which are divided by their norm (Eq. 7).

    A token whose logits are all zero has gates of zero, and no gradient.

    Args:
        logits_TE: router logits `[T, E]`.
        scale: learned, with one value.
        eps: constant that is added to the norm.

    Returns:
        probs: `[T, E]`, at least fp32, zero where inactive, negative where the scale is.
        routing_map: bool `[T, E]`, True where the logit is positive.
    """
    unit_TE = relu_l2_penalized(logits_TE, eps=eps)
    return unit_TE * scale.to(unit_TE.dtype), unit_TE > 0


def relu_l2_penalized(logits_TE: Tensor, *, eps: float = EPS) -> Tensor:
    """Return what the L1 penalty acts on, `[T, E]`: the scores before the scale."""
    logits_TE = at_least_fp32(logits_TE)
    norm_T1 = torch.linalg.vector_norm(logits_TE, dim=1, keepdim=True)
    return torch.relu(logits_TE / (norm_T1 + eps))


def relu_l2_initial_scale(num_experts: int, topk: int, *, num_samples: int = 20_000) -> float:
    """Return c, with which the k largest scores of normal logits have a norm of about one (App. H).

    We take the inverse of the mean norm of samples. The published constant is the mean of the
    inverse, which a sample with hardly a positive logit moves at will: its expectation is infinite.
    Over many experts, as in that paper, the two are close to each other.

    Args:
        num_experts: E.
        topk: k, the target number of active experts per token.
        num_samples: number of logits that are drawn, always the same ones.
    """
    with torch.device("cpu"):  # a model may be built on another device, or on none
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(num_samples, num_experts, generator=generator, dtype=torch.float64)
    largest = relu_l2_penalized(samples, eps=0).topk(topk, dim=1).values
    return 1 / float(torch.linalg.vector_norm(largest, dim=1).mean())


@dataclass(frozen=True, kw_only=True)
class ReLUL2Routing(L1Routing):
    """The settings of a ReLU router of logits with L2 norm.

    Parameters:
        gate_scale: `[1]`, at first that with which k gates have a norm of about one.
    """

    title: ClassVar[str] = "ReLU routing with L2 norm"
    source: ClassVar[str] = "UniPool, arXiv 2605.06665"

    def parameters(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial scale."""
        return {"gate_scale": torch.full((1,), relu_l2_initial_scale(num_experts, topk))}

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return the scaled gates."""
        return relu_l2_routing(logits_TE, tensors["gate_scale"])

    def penalized(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """Return the gates before the scale, `[T, E]`."""
        return relu_l2_penalized(logits_TE)
