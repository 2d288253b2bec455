"""The operations in Triton: what they take and return, and how they are launched.

`remoe.kernels.permutation`, `router` and `swiglu` have the same operations in torch, which say what
is computed. Sizes of tiles depend on shapes alone, never on the device, so that the order of sums
does not either.

Shapes: T tokens, H hidden, E experts, F expert width, A active (token, expert) pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from remoe.kernels import jit
from remoe.kernels.backend import device_of

MAX_EXPERTS = 4096  # a tile has all experts of a token
_TILE = 1024  # values of a tile, 8 for each of 128 threads
_PROGRAMS = 512  # partial sums of the router
_TILE_H = 256


def relu_router(
    logits_TE: Tensor, padding_mask_T: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gates in `dtype`, map, sums of the gates, counts, silent tokens, and most active ones.

    They are those of `remoe.kernels.router.ReLURouted`, in its order. Gradients flow from the gates
    and their sums to the logits, in one pass.
    """
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    outputs = _ReLURouter.apply(logits_TE, padding_mask_T, dtype)  # type: ignore[no-untyped-call]
    return outputs


class _ReLURouter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, padding_mask_T: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        logits_TE = logits_TE.contiguous()
        if padding_mask_T is not None:
            padding_mask_T = padding_mask_T.contiguous()
        num_tokens, num_experts = logits_TE.shape
        acc = torch.promote_types(logits_TE.dtype, torch.float32)
        probs_TE = torch.empty_like(logits_TE, dtype=dtype)
        map_TE = torch.empty_like(logits_TE, dtype=torch.bool)
        tile_t, tile_e, tiles = _tiles(num_tokens, num_experts)
        per_program = max(1, _ceil(tiles, _PROGRAMS))
        programs = _ceil(tiles, per_program)
        sum_E = logits_TE.new_empty(num_experts, dtype=acc)
        counted = logits_TE.new_empty(3 + num_experts, dtype=torch.int64)
        counts, silent, most = counted[:-2], counted[-2], counted[-1]
        sums_PE = logits_TE.new_empty(programs, num_experts, dtype=acc)
        counts_PE = logits_TE.new_empty(programs, num_experts, dtype=torch.int32)
        tokens_3P = logits_TE.new_empty(3, programs, dtype=torch.int32)
        with device_of(logits_TE):
            if programs:
                jit.route[(programs,)](
                    logits_TE,
                    padding_mask_T,
                    probs_TE,
                    map_TE,
                    sums_PE,
                    counts_PE,
                    tokens_3P,
                    num_tokens,
                    per_program,
                    E=num_experts,
                    HAS_PADDING=padding_mask_T is not None,
                    ACC=_triton_type(acc),
                    TILE_T=tile_t,
                    TILE_E=tile_e,
                )
            jit.route_sums[(_ceil(num_experts, 16),)](
                sums_PE,
                counts_PE,
                tokens_3P,
                sum_E,
                counts,
                silent,
                most,
                programs,
                E=num_experts,
                ACC=_triton_type(acc),
                TILE_P=64,
                TILE_E=16,
            )
        ctx.save_for_backward(map_TE, padding_mask_T)
        ctx.logits_dtype, ctx.acc = logits_TE.dtype, acc
        ctx.mark_non_differentiable(map_TE, counts, silent, most)
        # Autograd would fill gradients of all outputs with zeros, with a launch for each.
        ctx.set_materialize_grads(False)
        return probs_TE, map_TE, sum_E, counts, silent, most

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_probs_TE: Tensor | None, _: Any, grad_sum_E: Tensor | None, *__: Any
    ) -> tuple[Tensor, None, None]:
        map_TE, padding_mask_T = ctx.saved_tensors
        num_tokens, num_experts = map_TE.shape
        grad_logits_TE = torch.empty_like(map_TE, dtype=ctx.logits_dtype)
        tile_t, tile_e, tiles = _tiles(num_tokens, num_experts)
        if tiles:
            with device_of(map_TE):
                jit.route_backward[(tiles,)](
                    None if grad_probs_TE is None else grad_probs_TE.contiguous(),
                    None if grad_sum_E is None else grad_sum_E.contiguous(),
                    map_TE,
                    padding_mask_T,
                    grad_logits_TE,
                    num_tokens,
                    E=num_experts,
                    HAS_PROBS=grad_probs_TE is not None,
                    HAS_SUM=grad_sum_E is not None,
                    HAS_PADDING=padding_mask_T is not None,
                    ACC=_triton_type(ctx.acc),
                    TILE_T=tile_t,
                    TILE_E=tile_e,
                )
        return grad_logits_TE, None, None


def count_permutation(
    routing_map_TE: Tensor, num_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `token_A`, `entry_A`, `by_token_A` and `starts_T` of `remoe.kernels.Permutation`.

    The places of pairs are counted: nothing is sorted, and the host waits for nothing.
    """
    num_tokens, num_experts = routing_map_TE.shape
    token_A, entry_A, by_token_A = (
        routing_map_TE.new_empty(num_pairs, dtype=torch.int64) for _ in range(3)
    )
    starts_T = routing_map_TE.new_empty(num_tokens, dtype=torch.int64)
    tile_t, tile_e, tiles = _tiles(num_tokens, num_experts)
    if tiles:
        counts = routing_map_TE.new_empty(num_experts * tiles + num_tokens, dtype=torch.int32)
        shape = {"E": num_experts, "TILE_T": tile_t, "TILE_E": tile_e}
        with device_of(routing_map_TE):
            jit.count_pairs[(tiles,)](
                routing_map_TE, *routing_map_TE.stride(), counts, num_tokens, **shape
            )
            jit.place_pairs[(tiles,)](
                routing_map_TE,
                *routing_map_TE.stride(),
                counts.cumsum(0),  # int64
                token_A,
                entry_A,
                by_token_A,
                starts_T,
                num_tokens,
                num_pairs,
                **shape,
            )
    return token_A, entry_A, by_token_A, starts_T


def gather(
    x_TH: Tensor,
    token_A: Tensor,
    probs_TE: Tensor | None = None,
    entry_A: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows `[A, H]` of the pairs' tokens, and their probabilities `[A]` if given."""
    x_TH = x_TH.contiguous()
    num_pairs, hidden = len(token_A), x_TH.shape[1]
    rows_AH = x_TH.new_empty(num_pairs, hidden)
    prob_A = None if probs_TE is None else probs_TE.new_empty(num_pairs)
    if num_pairs:
        tile_a, tile_h = _row_tile(hidden)
        with device_of(x_TH):
            jit.gather[(_ceil(num_pairs, tile_a), _ceil(hidden, tile_h))](
                x_TH,
                token_A,
                rows_AH,
                probs_TE,
                *((0, 0) if probs_TE is None else probs_TE.stride()),
                entry_A,
                prob_A,
                num_pairs,
                H=hidden,
                E=1 if probs_TE is None else probs_TE.shape[1],
                HAS_PROBS=probs_TE is not None,
                TILE_A=tile_a,
                TILE_H=tile_h,
            )
    return rows_AH, prob_A


def sum_by_token(rows_AH: Tensor, by_token_A: Tensor, starts_T: Tensor) -> Tensor:
    """Return the sums of every token's rows, `[T, H]`, taken in fp32 if rows are narrower."""
    return _sum_by_token(rows_AH, by_token_A, starts_T)


def gather_backward(
    grad_rows_AH: Tensor,
    grad_prob_A: Tensor,
    by_token_A: Tensor,
    starts_T: Tensor,
    entry_A: Tensor,
    num_experts: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients `[T, H]` and `[T, E]` of the inputs of `gather`, from one launch."""
    grad_probs_TE = grad_prob_A.new_empty(len(starts_T), num_experts)
    grads = (grad_prob_A.contiguous(), entry_A, grad_probs_TE)
    return _sum_by_token(grad_rows_AH, by_token_A, starts_T, *grads), grad_probs_TE


def _sum_by_token(
    rows_AH: Tensor,
    by_token_A: Tensor,
    starts_T: Tensor,
    grad_prob_A: Tensor | None = None,
    entry_A: Tensor | None = None,
    grad_probs_TE: Tensor | None = None,
) -> Tensor:
    rows_AH = rows_AH.contiguous()
    (num_pairs, hidden), num_tokens = rows_AH.shape, len(starts_T)
    sums_TH = rows_AH.new_empty(num_tokens, hidden)
    if num_tokens and hidden:
        num_experts = 1 if grad_probs_TE is None else grad_probs_TE.shape[1]
        acc = torch.promote_types(rows_AH.dtype, torch.float32)
        tile_h, warps = token_tile(hidden, acc)
        with device_of(rows_AH):
            jit.sum_by_token[(num_tokens, _ceil(hidden, tile_h))](
                rows_AH,
                by_token_A,
                starts_T,
                sums_TH,
                grad_prob_A,
                entry_A,
                grad_probs_TE,
                num_pairs,
                H=hidden,
                E=num_experts,
                HAS_PROBS=grad_probs_TE is not None,
                ACC=_triton_type(acc),
                TILE_H=tile_h,
                TILE_E=_power_of_two(num_experts),
                num_warps=warps,
            )
    return sums_TH


def weighted_swiglu(z_AG: Tensor, prob_A: Tensor) -> Tensor:
    """Return `prob * silu(gate) * up`, `[A, F]`, given `z = [gate, up]`, `[A, 2F]`.

    `W (p h) = p (W h)`: the routing weights (Eq. 1) are applied before the product with `down`,
    where they cost no pass over the rows of their own.
    """
    z_AG, prob_A = z_AG.contiguous(), prob_A.contiguous()
    num_rows, width = len(z_AG), z_AG.shape[1] // 2
    h_AF = z_AG.new_empty(num_rows, width)
    if num_rows:
        acc = torch.promote_types(z_AG.dtype, torch.float32)
        tile_f, warps = _swiglu_tile(width, acc)
        with device_of(z_AG):
            jit.weighted_swiglu[(num_rows, _ceil(width, tile_f))](
                z_AG,
                prob_A,
                h_AF,
                F=width,
                ACC=_triton_type(acc),
                TILE_F=tile_f,
                num_warps=warps,
            )
    return h_AF


def weighted_swiglu_backward(
    z_AG: Tensor, prob_A: Tensor, grad_h_AF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `weighted_swiglu` again, and the gradients of z and prob, from one launch.

    Args:
        z_AG: `[gate, up]`, `[A, 2F]`.
        prob_A: the routing weights.
        grad_h_AF: the gradient of what `weighted_swiglu` returns.
    """
    z_AG, prob_A, grad_h_AF = z_AG.contiguous(), prob_A.contiguous(), grad_h_AF.contiguous()
    h_AF, grad_z_AG = torch.empty_like(grad_h_AF), torch.empty_like(z_AG)
    grad_prob_A = torch.empty_like(prob_A)
    if len(z_AG):
        acc = torch.promote_types(z_AG.dtype, torch.float32)
        tile_f, warps = _swiglu_tile(grad_h_AF.shape[1], acc)
        with device_of(z_AG):
            jit.weighted_swiglu_backward[(len(z_AG),)](
                z_AG,
                prob_A,
                grad_h_AF,
                h_AF,
                grad_z_AG,
                grad_prob_A,
                F=grad_h_AF.shape[1],
                ACC=_triton_type(acc),
                TILE_F=tile_f,
                num_warps=warps,
            )
    return h_AF, grad_z_AG, grad_prob_A


def _tiles(num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    """Return the tokens and experts of a tile, which are powers of two, and the number of tiles."""
    tile_e = _power_of_two(num_experts)
    tile_t = max(1, _TILE // tile_e)
    return tile_t, tile_e, _ceil(num_tokens, tile_t)


def _row_tile(hidden: int) -> tuple[int, int]:
    tile_h = min(_TILE_H, max(16, _power_of_two(hidden)))
    return min(64, max(1, _TILE // tile_h)), tile_h


def token_tile(hidden: int, acc: torch.dtype) -> tuple[int, int]:
    """Return the columns of a token that a program sums, and its warps.

    A thread has 8 columns, or 4 of doubles, of which 8 would spill on compute capability 10.
    """
    tile_h = min(_TILE, max(16, _power_of_two(hidden)))
    return tile_h, max(1, tile_h * acc.itemsize // 1024)


def _swiglu_tile(width: int, acc: torch.dtype) -> tuple[int, int]:
    """Return the columns of a row that a program takes at a time, and its warps.

    A thread has 8 columns, or 2 of doubles, of which 4 would spill on compute capability 9.
    """
    per_warp = 64 if acc == torch.float64 else 256
    tile_f = min(4 * per_warp, max(16, _power_of_two(width)))
    return tile_f, max(1, tile_f // per_warp)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _triton_type(dtype: torch.dtype) -> Any:
    return jit.tl.float64 if dtype == torch.float64 else jit.tl.float32
