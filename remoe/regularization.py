"""The L1 penalty on router outputs, plain and load-balanced (arXiv 2412.14711, Eq. 9-11).

Scaling follows the published code (github.com/thu-ml/ReMoE): the penalties of the layers are
summed, where the paper divides by their number. A micro-batch without real tokens has neither load
nor penalty: both are zero. Shapes: T tokens, E experts.
"""

from torch import Tensor


def load_weights(tokens_per_expert_E: Tensor, *, num_tokens: Tensor | int, topk: int) -> Tensor:
    """Load of every expert relative to a balanced one: `f_e = E / (k T) * tokens_e` (Eq. 11).

    The mean of f over experts is 1 when routing is at its target sparsity.

    Args:
        tokens_per_expert_E: counts `[E]`; integers, so no gradient flows through f.
        num_tokens: T, over which the counts were taken.
        topk: k, the target number of active experts per token.

    Returns:
        f, floating point `[E]`.
    """
    num_experts = tokens_per_expert_E.shape[0]
    return tokens_per_expert_E.detach() * (num_experts / (topk * at_least_one(num_tokens)))


def l1_regularization(
    probs_TE: Tensor, *, num_tokens: Tensor | int, load_weights_E: Tensor | None = None
) -> Tensor:
    """L1 norm of the router's output, a 0-d tensor: `1/T sum_t sum_e f_e R(x_t)_e` (Eq. 9, 10).

    Args:
        probs_TE: non-negative router outputs `[T, E]`, local tokens only when a sequence is split
            over ranks (the penalties of the ranks then add up to that of the sequence).
        num_tokens: T of the whole micro-batch.
        load_weights_E: f of Eq. 10, `[E]`; None is f = 1 (Eq. 9), at the same scale.
    """
    l1_E = probs_TE.sum(dim=0)
    if load_weights_E is not None:
        l1_E = l1_E * load_weights_E
    return l1_E.sum() / at_least_one(num_tokens)


def at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """A number of tokens that can be divided by, also for a micro-batch of padding alone."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(1, num_tokens)
