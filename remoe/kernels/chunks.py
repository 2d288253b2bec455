"""Experts chunk by chunk, computed again in backward: what one chunk needs is all that is held.

Chunks are sums of the same terms (Eq. 1), so outputs and gradients are those of all experts at once
up to the order of sums. Experts are split first, so that every weight is read and its gradient
written once, and tokens only where one expert has more rows than a chunk may have.

Shapes: T tokens, H hidden, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What the automatic limits are, as parts of the stable stage's assignments (topk per token). Layers
# are computed at once up to more than what sparsity varies by around its target (by 0.05 of them in
# the paper's figure 3).
SLACK = 1.25
# Beside the rows that a layer keeps and passes on, 3H + 2F wide, an expert needs 2H + 4F for each
# of its own rows in backward, and a chunk may be one expert: a third of the rows is never more.
CHUNK = 1 / 3
UNLIMITED = 10**15  # as `max_assignments`: more than any layer has


@dataclass(frozen=True)
class Chunk:
    """Consecutive experts, with one of several equal parts of the tokens."""

    experts: slice
    part: int = 0
    parts: int = 1

    def tokens(self, num_tokens: int) -> slice:
        """The part, of so many tokens."""
        return slice(
            num_tokens * self.part // self.parts, num_tokens * (self.part + 1) // self.parts
        )


@dataclass(frozen=True)
class Limits:
    """Numbers of a layer's assignments on a rank.

    Attributes:
        share: what is set aside for the layer.
        at_once: what may be computed at once, mean over the layers that keep their activations.
        chunk: what a chunk may have.
    """

    share: float
    at_once: float
    chunk: float

    @classmethod
    def of(cls, balanced: float, max_assignments: int | None) -> "Limits":
        """Given the assignments at topk per token, and the limit; None is the automatic one."""
        if max_assignments:
            share = max(1.0, max_assignments)
            return cls(share, share, share)
        share = max(1.0, balanced)
        return cls(share, SLACK * share, max(1.0, CHUNK * share))


def plan_chunks(rows_per_expert: Sequence[float], max_rows: float) -> list[Chunk]:
    """Chunks of at most so many rows, if tokens are alike; every expert is in one of them.

    Args:
        rows_per_expert: E numbers of (token, expert) pairs.
        max_rows: above zero.
    """
    chunks: list[Chunk] = []
    first, rows = 0, 0.0

    def close(end: int) -> None:
        parts = max(1, math.ceil(rows / max_rows))
        chunks.extend(Chunk(slice(first, end), part, parts) for part in range(parts))

    for expert, more in enumerate(rows_per_expert):
        if rows > 0 and rows + more > max_rows:
            close(expert)
            first, rows = expert, 0.0
        rows += more
    close(len(rows_per_expert))
    return chunks


class ChunkOfExperts(Protocol):
    """How a chunk is computed."""

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the chunk's part of the weights, or of tensors of their shapes."""
        ...

    def compute(
        self,
        chunk: Chunk,
        x_TH: Tensor,
        probs_TE: Tensor,
        weights: list[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """The chunk's contribution `[T, H]` to the outputs of its tokens.

        In backward it is computed again for its gradients, and its value may be anything.
        """
        ...


def run_chunks(
    experts: ChunkOfExperts,
    chunks: Sequence[Chunk],
    x_TH: Tensor,
    probs_TE: Tensor,
    weights: Sequence[Tensor],
    *,
    main_grads: Sequence[Tensor] | None = None,
) -> Tensor:
    """`y = sum of the chunks' contributions`, `[T, H]`, summed in fp32 if they are narrower.

    Kept for backward are the arguments only. Every weight gets its gradient once, however many
    chunks there are, as hooks on gradients expect.

    Args:
        experts: what a chunk computes; it must be free of randomness, because it is done twice.
        chunks: as `plan_chunks` gives them. Where they communicate, the same on all ranks.
        x_TH: tokens.
        probs_TE: routing weights.
        weights: of all experts.
        main_grads: buffers of the weights' shapes. When given, backward adds the weights' gradients
            to them, and returns uninitialised memory as the weights' gradients, which the caller
            must not use.
    """
    inputs = (experts, chunks, main_grads, x_TH, probs_TE, *weights)
    y_TH: Tensor = _RunChunks.apply(*inputs)  # type: ignore[no-untyped-call]
    return y_TH


class _RunChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        experts: ChunkOfExperts,
        chunks: Sequence[Chunk],
        main_grads: Sequence[Tensor] | None,
        x_TH: Tensor,
        probs_TE: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.experts, ctx.chunks, ctx.main_grads = experts, chunks, main_grads
        device = x_TH.device.type
        enabled = torch.is_autocast_enabled(device)
        ctx.autocast = {"device_type": device, "enabled": enabled}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(device)
        ctx.save_for_backward(x_TH, probs_TE, *weights)
        total, dtype = None, x_TH.dtype
        for chunk in chunks:
            rows = chunk.tokens(len(x_TH))
            parts = experts.weights_of(chunk, weights)
            y = experts.compute(chunk, x_TH[rows], probs_TE[rows], parts, False)
            if total is None:
                dtype = y.dtype
                total = _zeros(x_TH, dtype)
            total[rows] += y
        assert total is not None, "there is at least one chunk"
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TH: Tensor) -> tuple[Tensor | None, ...]:
        experts: ChunkOfExperts = ctx.experts
        x_TH, probs_TE, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        grad_x, grad_probs = _zeros(x_TH, x_TH.dtype), torch.zeros_like(probs_TE)
        buffers = ctx.main_grads or [torch.zeros_like(w) for w in weights]
        for chunk in ctx.chunks:
            rows = chunk.tokens(len(x_TH))
            x, probs = (
                t[rows].detach().requires_grad_(need)
                for t, need in zip((x_TH, probs_TE), needs, strict=False)
            )
            views = experts.weights_of(chunk, weights)
            parts = [view.detach().requires_grad_(any(needs[2:])) for view in views]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y = experts.compute(chunk, x, probs, parts, True)
            torch.autograd.backward(y, grad_y_TH[rows])
            if x.grad is not None:
                grad_x[rows] += x.grad
            if probs.grad is not None:
                grad_probs[rows] += probs.grad
            for buffer, part in zip(experts.weights_of(chunk, buffers), parts, strict=True):
                if part.grad is not None:
                    buffer += part.grad
        if ctx.main_grads is not None:
            buffers = [torch.empty_like(w) for w in weights]
        grads = [grad_x.to(x_TH.dtype), grad_probs, *buffers]
        found = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (None, None, None, *found)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32))
