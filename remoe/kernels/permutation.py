"""Tokens to experts and back: rows sorted by expert, and their sums by token.

Shapes: T tokens, H hidden, E experts, A active (token, expert) pairs. The only tensor of size
`T * E` that is made is the transposed routing map, of one byte per entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from remoe.kernels.backend import uses_triton
from remoe.kernels.loading import fit_in_a_tile, triton_kernels


@dataclass(frozen=True)
class Permutation:
    """The active pairs of a routing map, sorted by expert, and by token within an expert.

    Attributes:
        token_A: the token of every pair, int64.
        entry_A: the pair's entry in the flattened `[T, E]` probabilities, int64.
        by_token_A: the pairs sorted by token, and by expert within a token, int64.
        starts_T: the place in `by_token_A` where each token's pairs begin, int64.
    """

    token_A: Tensor
    entry_A: Tensor
    by_token_A: Tensor
    starts_T: Tensor

    @classmethod
    def of(cls, routing_map_TE: Tensor, num_pairs: int) -> "Permutation":
        """Return the permutation of a routing map.

        Args:
            routing_map_TE: bool `[T, E]`.
            num_pairs: A, the number of True entries. The caller passes it, because the host would
                have to wait for a GPU that counts them.
        """
        num_tokens, num_experts = routing_map_TE.shape
        if uses_triton(routing_map_TE, "permutation") and fit_in_a_tile(num_experts):
            return cls(*triton_kernels().count_permutation(routing_map_TE, num_pairs))
        pairs = _nonzero(routing_map_TE.T.flatten(), num_pairs)
        expert_A = pairs // max(num_tokens, 1)
        token_A = pairs - expert_A * num_tokens
        ends_T = routing_map_TE.sum(dim=1).cumsum(dim=0)
        return cls(
            token_A=token_A,
            entry_A=token_A * num_experts + expert_A,
            by_token_A=torch.argsort(token_A, stable=True),
            starts_T=torch.cat([ends_T.new_zeros(1), ends_T[:-1]])[:num_tokens],
        )


def permute(x_TH: Tensor, probs_TE: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Return the rows `[A, H]` and probabilities `[A]` of the active pairs, sorted by expert."""
    rows: tuple[Tensor, Tensor] = _Permute.apply(x_TH, probs_TE, permutation)  # type: ignore[no-untyped-call]
    return rows


def combine(y_AH: Tensor, permutation: Permutation) -> Tensor:
    """Sum the rows of every token's pairs, in the order of the experts, `[T, H]`.

    Every run adds in the same order, also on a GPU, and in fp32 if the rows are narrower.
    """
    y_TH: Tensor = _Combine.apply(y_AH, permutation)  # type: ignore[no-untyped-call]
    return y_TH


def gather(x_TH: Tensor, probs_TE: Tensor, p: Permutation) -> tuple[Tensor, Tensor]:
    """Do what `permute` does, without a graph."""
    if uses_triton(x_TH, "gather"):
        gathered: tuple[Tensor, Tensor] = triton_kernels().gather(
            x_TH, p.token_A, probs_TE, p.entry_A
        )
        return gathered
    x_AH = x_TH.index_select(0, p.token_A)
    return x_AH, probs_TE.flatten().index_select(0, p.entry_A)


def gather_backward(
    grad_x_AH: Tensor,
    grad_prob_A: Tensor,
    p: Permutation,
    num_experts: int,
    needed: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients `[T, H]` and `[T, E]` of what was gathered, None if it needs none."""
    in_triton = uses_triton(grad_x_AH, "sum by token") and fit_in_a_tile(num_experts)
    if in_triton and all(needed):
        grads: tuple[Tensor, Tensor] = triton_kernels().gather_backward(
            grad_x_AH, grad_prob_A, p.by_token_A, p.starts_T, p.entry_A, num_experts
        )
        return grads
    grad_x = grad_probs = None
    if needed[0]:
        grad_x = sum_by_token(grad_x_AH.contiguous(), p)
    if needed[1]:
        grad_probs = grad_prob_A.new_zeros(len(p.starts_T), num_experts)
        grad_probs.view(-1).index_copy_(0, p.entry_A, grad_prob_A)
    return grad_x, grad_probs


def sum_by_token(rows_AH: Tensor, p: Permutation) -> Tensor:
    """Do what `combine` does, without a graph."""
    if len(rows_AH) == 0 or len(p.starts_T) == 0:
        return rows_AH.new_zeros(len(p.starts_T), rows_AH.shape[1])
    if uses_triton(rows_AH, "sum by token"):
        sums: Tensor = triton_kernels().sum_by_token(rows_AH, p.by_token_A, p.starts_T)
        return sums
    return F.embedding_bag(p.by_token_A, rows_AH, p.starts_T, mode="sum")


def rows_of_tokens(grad_y_TH: Tensor, token_A: Tensor) -> Tensor:
    """Return the rows `[A, H]` of the pairs' tokens, which is the backward of `combine`."""
    if uses_triton(grad_y_TH, "gather"):
        rows_AH: Tensor = triton_kernels().gather(grad_y_TH, token_A)[0]
        return rows_AH
    return grad_y_TH.index_select(0, token_A)


def _nonzero(flags: Tensor, count: int) -> Tensor:
    if flags.device.type == "cuda":
        return torch.nonzero_static(flags, size=count).squeeze(1)  # does not wait for the count
    return flags.nonzero().squeeze(1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, probs_TE: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        ctx.permutation, ctx.num_experts = permutation, probs_TE.shape[1]
        return gather(x_TH, probs_TE, permutation)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x_AH: Tensor, grad_prob_A: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        grads = (grad_x_AH, grad_prob_A)
        needed = ctx.needs_input_grad[:2]
        return *gather_backward(*grads, ctx.permutation, ctx.num_experts, needed), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_AH: Tensor, permutation: Permutation) -> Tensor:
        ctx.token_A = permutation.token_A
        return sum_by_token(y_AH, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TH: Tensor) -> tuple[Tensor, None]:
        return rows_of_tokens(grad_y_TH, ctx.token_A), None
