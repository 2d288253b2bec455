"""Experts chunk by chunk, computed again in backward: memory holds what one chunk needs.

Chunks are sums of the same terms (arXiv 2412.14711, Eq. 1), so outputs and gradients are those of
all experts at once up to the order of sums. Experts are split first, so that every weight is read
once and its gradient is written once; tokens are split only where one expert has more rows than a
chunk may have. An assignment is an active (token, expert) pair, and takes a row.

Shapes: T tokens, H hidden, E experts, L local experts of a rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The automatic limits, as parts of the stable stage's assignments (topk per token). Layers are
# computed at once up to SLACK, which is more than sparsity varies by around its target (by 0.05 of
# them in the paper's figure 3).
SLACK = 1.25
# A layer keeps and passes on rows that are 3H + 2F wide. In backward an expert needs 2H + 4F more
# for each of its own rows, and a chunk may be one expert: for a third of the rows that is never
# more than what the rows of the layer need.
CHUNK = 1 / 3
UNLIMITED = 10**15  # a value of `max_assignments` that no layer reaches


@dataclass(frozen=True)
class Chunk:
    """Consecutive experts, with one of several equal parts of the tokens."""

    experts: slice
    part: int = 0
    parts: int = 1

    def tokens(self, num_tokens: int) -> slice:
        """Return this chunk's part of `num_tokens` tokens."""
        return slice(
            num_tokens * self.part // self.parts, num_tokens * (self.part + 1) // self.parts
        )


@dataclass(frozen=True)
class Limits:
    """Limits on the assignments of a layer on a rank.

    Attributes:
        share: number that is set aside for the layer.
        at_once: number that may be computed at once, as a mean over the layers that keep their
            activations at the same time.
        chunk: largest number in a chunk.
    """

    share: float
    at_once: float
    chunk: float

    @classmethod
    def of(cls, balanced: float, max_assignments: int | None) -> "Limits":
        """Derive the limits.

        Args:
            balanced: assignments at topk per token.
            max_assignments: the limit; None is the automatic one.
        """
        if max_assignments:
            share = max(1.0, max_assignments)
            return cls(share, share, share)
        share = max(1.0, balanced)
        return cls(share, SLACK * share, max(1.0, CHUNK * share))


@dataclass
class AssignmentBudget:
    """Number of assignments that the layers of a model may keep together for backward.

    Layers use experts unevenly, also when routing is sparse, and memory holds the sum over layers:
    a layer is computed at once while the layers up to it fit, and the other layers are chunked.
    The decision depends on the current forward only, so a resumed run decides alike.

    Attributes:
        num_layers: number of layers that keep their activations at the same time.
        max_assignments: limit per rank and layer, as a mean over layers; None is topk per token.
    """

    num_layers: int
    max_assignments: int | None = None
    _held: float = field(default=0.0, init=False)
    _last_layer: int = field(default=0, init=False)

    def max_rows_per_chunk(self, layer: int, rows: float, balanced: float) -> float | None:
        """Return the largest number of rows in a chunk, or None to compute the layer at once.

        Args:
            layer: number of the layer; numbers grow within a forward.
            rows: assignments that the fullest rank would hold.
            balanced: assignments of a rank at topk per token.
        """
        limits = Limits.of(balanced, self.max_assignments)
        fits = rows <= limits.at_once
        if not torch.is_grad_enabled():  # nothing is kept
            return None if fits else limits.chunk
        if layer <= self._last_layer:  # another forward has begun
            self._held = 0.0
        self._last_layer = layer
        # A dense layer leaves room for a chunk of the layers that follow.
        room = 0.0 if fits else limits.share
        if self._held + rows <= self.num_layers * limits.at_once - room:
            self._held += rows
            return None
        return limits.chunk


def plan_chunks(rows_per_expert: Sequence[float], max_rows: float) -> list[Chunk]:
    """Split experts into chunks of at most `max_rows` rows, assuming that tokens are alike.

    Every expert is in one chunk, or in several chunks that share its tokens.

    Args:
        rows_per_expert: E numbers of assignments.
        max_rows: largest number of rows in a chunk, above zero.
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


def plan_over_ranks(
    counts: Tensor, max_rows_per_chunk: Callable[[float], float | None]
) -> list[Chunk]:
    """Plan the chunks of a layer whose experts are spread over ranks.

    The plan is the same on every rank that has the same counts. The rows of a rank are the rows
    that it sends or the rows that it receives, whichever are more.

    Args:
        counts: tokens of every rank for every expert, `[expert parallel, expert tensor parallel,
            E]`, on the host.
        max_rows_per_chunk: as in `AssignmentBudget`, given the rows of the fullest rank.

    Returns:
        Chunks of the L local experts; an empty list to compute all experts at once.
    """
    ep, tp, _ = counts.shape
    by_owner = counts.view(ep, tp, ep, -1)
    sent = by_owner.sum(dim=2).flatten(end_dim=1)
    received = by_owner.sum(dim=(0, 1)) / tp  # over tensor parallelism every rank gets all rows
    fullest = max(sent.sum(dim=1).tolist() + received.sum(dim=1).tolist())
    limit = max_rows_per_chunk(fullest)
    if limit is None:
        return []
    rows = torch.maximum(sent.amax(dim=0), received.amax(dim=0).ceil().long())
    return plan_chunks(rows.tolist(), limit)


def counts_of_chunks(
    chunks: Sequence[Chunk], counts: Tensor, count: Callable[[list[Chunk]], Tensor]
) -> dict[Chunk, Tensor]:
    """Return the tokens of every chunk's experts, with at most one more copy to the host.

    A chunk of all tokens has the counts of the layer; chunks of some tokens are counted together.

    Args:
        chunks: of a layer.
        counts: tokens of the layer's experts, `[..., L]`, on the host.
        count: given n chunks of some tokens, returns the tokens of all their experts, one chunk
            after another, `[..., sum of experts]`, on the host.
    """
    split = [chunk for chunk in chunks if chunk.parts > 1]
    sizes = [chunk.experts.stop - chunk.experts.start for chunk in split]
    found = (
        dict(zip(split, count(split).split_with_sizes(sizes, dim=-1), strict=True)) if split else {}
    )
    return {c: found[c] if c.parts > 1 else counts[..., c.experts] for c in chunks}


class ChunkOfExperts(Protocol):
    """Computes one chunk of a layer's experts."""

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return views of the chunk's part of the weights, or of tensors of the same shapes."""
        ...

    def compute(
        self,
        chunk: Chunk,
        x_TH: Tensor,
        probs_TE: Tensor,
        weights: list[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """Return the chunk's contribution `[T, H]` to the outputs of its tokens.

        With `only_for_backward` the contribution is computed again for its gradients, and its value
        may be anything.
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
    """Sum the contributions of all chunks, `[T, H]`, in fp32 if they are narrower.

    Backward keeps the arguments only. Every weight gets its gradient once, however many chunks
    there are, as hooks on gradients expect.

    Args:
        experts: computes a chunk; it must be free of randomness, because it runs twice.
        chunks: as `plan_chunks` returns them. Where chunks communicate, all ranks need the same.
        x_TH: tokens.
        probs_TE: routing weights.
        weights: weights of all experts.
        main_grads: buffers of the weights' shapes. When given, backward adds the weights' gradients
            to them, and returns uninitialized memory as the weights' gradients, which the caller
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
