"""The L1 penalty on router outputs, plain and load-balanced (arXiv 2412.14711, Eq. 6 and 9-11).

Scaling follows the published code (github.com/thu-ml/ReMoE): the penalties of the layers are
summed, where the paper divides by their number. A micro-batch without real tokens has neither load
nor penalty: both are zero. Shapes: T tokens, E experts.
"""

from typing import Literal

import torch
from torch import Tensor

LoadBalancing = Literal["aux_loss", "squared", "global_batch", "none"]


def switch_loss(logits_TE: Tensor, routing_map_TE: Tensor) -> Tensor:
    """Return the balancing loss of TopK routers: `E sum_e f_e P_e` (arXiv 2101.03961, Eq. 4), 0-d.

    P is the mean softmax of the logits, and f the number of choices of an expert per token, as the
    published RMoE code counts them: it adds up to k. That code passes the logits of all layers as
    if they were those of more tokens; Megatron adds up the losses of single layers, with f / k.

    Args:
        logits_TE: router logits `[T, E]`.
        routing_map_TE: bool `[T, E]`, the chosen experts.
    """
    chosen_E = routing_map_TE.float().mean(dim=0)
    mean_E = torch.softmax(logits_TE.float(), dim=1).mean(dim=0)
    return logits_TE.shape[1] * (chosen_E * mean_E).sum()


def load_weights(tokens_per_expert_E: Tensor, *, num_tokens: Tensor | int, topk: int) -> Tensor:
    """Return every expert's load relative to a balanced one: `f_e = E / (k T) * tokens_e` (Eq. 11).

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
    """Return the L1 norm of the router's output: `1/T sum_t sum_e f_e R(x_t)_e` (Eq. 9, 10), 0-d.

    Args:
        probs_TE: non-negative router outputs `[T, E]`, local tokens only when a sequence is split
            over ranks (the penalties of the ranks then add up to that of the sequence).
        num_tokens: T of the whole micro-batch.
        load_weights_E: f of Eq. 10, `[E]`; None is f = 1 (Eq. 9), at the same scale.
    """
    return l1_of_sums(probs_TE.sum(dim=0), num_tokens=num_tokens, load_weights_E=load_weights_E)


def l1_of_sums(
    sum_E: Tensor, *, num_tokens: Tensor | int, load_weights_E: Tensor | None = None
) -> Tensor:
    """Return `l1_regularization`, 0-d, given the sum over tokens of every expert's gates, `[E]`."""
    if load_weights_E is not None:
        sum_E = sum_E * load_weights_E
    return sum_E.sum() / at_least_one(num_tokens)


def balancing_weights(
    load_balancing: LoadBalancing,
    tokens_per_expert_E: Tensor,
    *,
    num_tokens: Tensor | int,
    topk: int,
    last_load_E: Tensor | None = None,
) -> Tensor | None:
    """Return the weights of the experts in the penalty, `[E]`; None is a weight of one.

    "aux_loss" is f of the micro-batch (Eq. 11) and "squared" its square, which the paper suggests
    and does not try. "global_batch" is f of all tokens of the step before: all layouts and
    micro-batches of a step have the same weights, without communication.

    Args:
        load_balancing: which weights.
        tokens_per_expert_E: counts `[E]` of the micro-batch, without padding.
        num_tokens: T of the micro-batch, without padding.
        topk: k, the target number of active experts per token.
        last_load_E: `load_weights` of the step before, `[E]`, and ones in the first step.

    Raises:
        ValueError: "global_batch" without the load of the step before.
    """
    if load_balancing == "none":
        return None
    if load_balancing == "global_batch":
        if last_load_E is None:
            raise ValueError("load_balancing is global_batch; give last_load_E, ones at first")
        return last_load_E
    weights_E = load_weights(tokens_per_expert_E, num_tokens=num_tokens, topk=topk)
    return weights_E.square() if load_balancing == "squared" else weights_E


def sum_over_tokens(probs_TE: Tensor, padding_mask_T: Tensor | None = None) -> Tensor:
    """Return the sum of every expert's gates over the tokens that are not padding (True), `[E]`."""
    if padding_mask_T is not None:
        probs_TE = probs_TE.masked_fill(padding_mask_T.unsqueeze(1), 0)
    return probs_TE.sum(dim=0)


def router_regularization(
    sum_E: Tensor,
    *,
    tokens_per_expert_E: Tensor,
    num_tokens: Tensor | int,
    topk: int,
    load_balancing: LoadBalancing,
    last_load_E: Tensor | None = None,
) -> Tensor:
    """Return the regularizer of a router, 0-d: Eq. 10, or Eq. 9 with "none".

    Args:
        sum_E: sums of non-negative router outputs over the local tokens, see `sum_over_tokens`.
        tokens_per_expert_E: counts `[E]` of the whole micro-batch, without padding.
        num_tokens: T of the whole micro-batch, without padding.
        topk: k, the target number of active experts per token.
        load_balancing: how experts are weighted with their load; see `balancing_weights`.
        last_load_E: load of the step before, for "global_batch".
    """
    weights_E = balancing_weights(
        load_balancing,
        tokens_per_expert_E,
        num_tokens=num_tokens,
        topk=topk,
        last_load_E=last_load_E,
    )
    return l1_of_sums(sum_E, num_tokens=num_tokens, load_weights_E=weights_E)


def penalty(l1_coeff: Tensor, l1_reg: Tensor, *, summed_tokens: Tensor | None = None) -> Tensor:
    """Return `lambda * L_reg`, which is added to the loss (Eq. 6), 0-d.

    Args:
        l1_coeff: lambda, 0-d.
        l1_reg: regularizer of a micro-batch, 0-d.
        summed_tokens: for a loss that is a sum over tokens instead of a mean, the number of tokens
            of the micro-batch; the penalty is multiplied by it.
    """
    scaled = l1_coeff * l1_reg
    return scaled if summed_tokens is None else scaled * summed_tokens


def at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    """Return a number of tokens to divide by, also for a micro-batch that is only padding."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(1, num_tokens)
