"""ReMoE in plain loops over tokens and experts, against which the fast paths are tested.

Shapes: T tokens, H hidden, E experts, F expert width. The loops are slow on purpose.
"""

import torch
from torch import Tensor


def reference_routing(x_TH: Tensor, router_EH: Tensor) -> Tensor:
    """Compute `R(x_t)_e = max(0, w_e . x_t)`, `[T, E]` (Eq. 5)."""
    rows = [torch.stack([(w * x).sum().clamp(min=0) for w in router_EH]) for x in x_TH]
    return torch.stack(rows)


def reference_moe(x_TH: Tensor, probs_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute `y_t = sum_e R(x_t)_e FFN_e(x_t)` over active experts, `[T, H]` (Eq. 1).

    Args:
        x_TH: the tokens.
        probs_TE: the router's outputs.
        gate_up: first weights of the experts, `[E, 2F, H]`, with the gate first.
        down: second weights of the experts, `[E, H, F]`.
    """
    width = down.shape[-1]
    rows = []
    for x, probs in zip(x_TH, probs_TE, strict=True):
        y = torch.zeros_like(x)
        for e, prob in enumerate(probs):
            if prob > 0:
                gate, up = gate_up[e, :width] @ x, gate_up[e, width:] @ x
                y = y + prob * (down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def reference_l1(probs_TE: Tensor, *, topk: int, load_balancing: bool) -> Tensor:
    """Compute the regularizer of one layer and micro-batch, 0-d (Eq. 9-11 without 1/L)."""
    num_tokens, num_experts = probs_TE.shape
    total = probs_TE.new_zeros(())
    for e in range(num_experts):
        count = sum(int(probs_TE[t, e] > 0) for t in range(num_tokens))
        f = num_experts * count / (topk * num_tokens) if load_balancing else 1.0
        for t in range(num_tokens):
            total = total + f * probs_TE[t, e]
    return total / num_tokens


def reference_sparsity(probs_LTE: Tensor) -> float:
    """Compute the mean share of zeros over layers, tokens and experts (Eq. 8)."""
    return sum(float(p == 0) for p in probs_LTE.flatten()) / probs_LTE.numel()
