"""ReLU routing (arXiv 2412.14711, Eq. 5 and 8).

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor


def at_least_fp32(logits: Tensor) -> Tensor:
    """Return the logits in fp32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def relu_routing(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Route every token to the experts whose logit is positive: `R(x) = ReLU(x W)` (Eq. 5).

    The value is both gate and weight: there is no softmax, no bias and no renormalization. It is
    computed in fp32, or in the logits' dtype where that is wider.

    Args:
        logits_TE: router logits `[T, E]`.

    Returns:
        probs: `[T, E]`, at least fp32, zero where inactive.
        routing_map: bool `[T, E]`, True where the expert is active. A row may be all False (the
            token passes on its residual only), and so may a column.
    """
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    probs_TE = torch.relu(logits_TE.to(dtype))
    return probs_TE, probs_TE > 0


def bounded_routing(
    logits_TE: Tensor,
    probs_TE: Tensor,
    *,
    max_active: int | None = None,
    at_least_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bound the number of active experts of every token; ReMoE itself has no such bounds.

    Args:
        logits_TE: router logits `[T, E]`.
        probs_TE: gates of `relu_routing`, `[T, E]`.
        max_active: number of a token's experts to keep, namely those with the largest gates.
        at_least_one: give a token without experts the expert of its largest logit, with the softmax
            of the logits as its gate, as a TopK router with k = 1 does.

    Returns:
        probs and routing_map, as `relu_routing` returns them.
    """
    if max_active is not None and max_active < probs_TE.shape[1]:
        largest = probs_TE.topk(max_active, dim=1)
        probs_TE = torch.zeros_like(probs_TE).scatter(1, largest.indices, largest.values)
    if at_least_one:
        silent = ~(probs_TE > 0).any(dim=1, keepdim=True)
        first = torch.zeros_like(silent.expand_as(probs_TE))
        first = first.scatter(1, logits_TE.argmax(dim=1, keepdim=True), silent)
        softmax = torch.softmax(logits_TE.to(probs_TE.dtype), dim=1)
        probs_TE = torch.where(first, softmax, probs_TE)
    return probs_TE, probs_TE > 0


def topk_routing(
    logits_TE: Tensor, *, topk: int, pre_softmax: bool = True, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Route every token to the `topk` experts with the largest logits.

    Args:
        logits_TE: router logits `[T, E]`.
        topk: k, the number of active experts per token.
        pre_softmax: whether gates are the softmax over all experts (Switch), or the softmax over
            the chosen ones (Mixtral).
        renormalize: whether gates before are divided by their sum over the chosen experts, which
            gives those of the softmax over the chosen ones (RMoE, arXiv 2408.06793).

    Returns:
        probs and routing_map, as `relu_routing` returns them.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    chosen = logits_TE.topk(topk, dim=1)
    if pre_softmax:
        gates = torch.softmax(logits_TE, dim=1).gather(1, chosen.indices)
        if renormalize:
            gates = gates / gates.sum(dim=1, keepdim=True)
    else:
        gates = torch.softmax(chosen.values, dim=1)
    empty = torch.zeros_like(logits_TE)
    return (
        empty.scatter(1, chosen.indices, gates),
        empty.bool().scatter(1, chosen.indices, True),
    )


def expert_choice_routing(
    logits_TE: Tensor, *, tokens_per_expert: int, padding_mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let every expert choose tokens, those of the largest softmax over experts.

    This is Expert Choice (arXiv 2202.09368, Sec. 3.2). It is not causal: whether an expert takes a
    token depends on all others. A token may get no expert, or several.

    Args:
        logits_TE: router logits `[..., T, E]`. Experts choose in every `[T, E]` by itself.
        tokens_per_expert: the number of tokens that each expert takes, k T / E for k experts per
            token on average.
        padding_mask_T: bool `[..., T]`, True for padding tokens. No expert takes them, so that it
            takes fewer tokens if there are too few others.

    Returns:
        probs and routing_map as `relu_routing` returns them, `[..., T, E]`.

    Raises:
        ValueError: experts cannot choose so many tokens.
    """
    num_tokens = logits_TE.shape[-2]
    if not 0 <= tokens_per_expert <= num_tokens:
        raise ValueError(
            f"tokens_per_expert is {tokens_per_expert}; choose it between 0 and the {num_tokens} "
            f"tokens that there are"
        )
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    softmax_TE = torch.softmax(logits_TE.to(dtype), dim=-1)
    if padding_mask_T is not None:
        softmax_TE = softmax_TE.masked_fill(padding_mask_T.unsqueeze(-1), 0)
    chosen = softmax_TE.topk(tokens_per_expert, dim=-2).indices
    routing_map = torch.zeros_like(softmax_TE, dtype=torch.bool).scatter(-2, chosen, True)
    if padding_mask_T is not None:
        routing_map = routing_map & ~padding_mask_T.unsqueeze(-1)
    return softmax_TE * routing_map, routing_map


def active_experts(routing_map_TE: Tensor) -> Tensor:
    """Return the number of active experts of every token, int64 `[T]`."""
    return routing_map_TE.sum(dim=1)


def tokens_per_expert(
    routing_map_TE: Tensor, padding_mask_T: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the number of tokens that activate each expert, int64 `[E]`.

    Args:
        routing_map_TE: bool `[T, E]`.
        padding_mask_T: bool `[T]`, True for padding tokens, which are not counted.
        out: where to write them.
    """
    if padding_mask_T is not None:
        routing_map_TE = routing_map_TE & ~padding_mask_T.unsqueeze(1)
    return torch.sum(routing_map_TE, dim=0, out=out)


def sparsity(tokens_per_expert_E: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Return the fraction of inactive (token, expert) pairs of a layer (Eq. 8), 0-d, in [0, 1].

    Leading dimensions are batched: `[L, E]` counts and `[L]` tokens give the sparsity of each of L
    layers, whose mean is Eq. 8.
    """
    num_experts = tokens_per_expert_E.shape[-1]
    return 1 - tokens_per_expert_E.sum(dim=-1) / (num_tokens * num_experts)
