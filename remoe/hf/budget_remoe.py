"""A budget of active experts that is set after training, for routers with ReLU gates.

The number of experts that such a router activates is not fixed, so that a trained model can spend
less on every token: gates below a threshold are switched off, and the others keep their value. The
threshold that meets a budget is found by bisection on text.

This file is exported with every model and therefore self-contained. Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor


def limited_gates(
    probs_TE: Tensor,
    active_TE: Tensor,
    *,
    threshold: float | None = None,
    most: int | None = None,
    keep_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Switch off the small gates of every token; those that stay keep their value.

    Args:
        probs_TE: gates `[T, E]`, zero where inactive. Their size counts, not their sign.
        active_TE: map of active experts, bool `[T, E]`.
        threshold: gates of a smaller size are switched off.
        most: the number of a token's experts that stay, those with the largest gates.
        keep_one: whether the largest gate of a token stays in spite of the threshold.

    Returns:
        The gates that stay, and their map.
    """
    size_TE = probs_TE.abs().masked_fill(~active_TE, -1)  # an active gate may be zero
    kept_TE = active_TE
    if threshold is not None:
        kept_TE = kept_TE & (size_TE >= threshold)
        if keep_one:
            first_T1 = size_TE.argmax(dim=1, keepdim=True)
            first_TE = torch.zeros_like(kept_TE).scatter(1, first_T1, True)
            kept_TE = kept_TE | (first_TE & active_TE)
    if most is not None and most < probs_TE.shape[1]:
        largest = size_TE.topk(most, dim=1).indices
        kept_TE = kept_TE & torch.zeros_like(kept_TE).scatter(1, largest, True)
    return probs_TE.masked_fill(~kept_TE, 0), kept_TE
