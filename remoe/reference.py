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


def reference_gru(x_p: Tensor, h_p: Tensor, w: Tensor, u: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute the next state of one token by a GRU, number by number, `[p]` (RMoE, Eq. 5).

    Args:
        x_p: projected input.
        h_p: state of the layer before.
        w, u: matrices `[3p, p]` of input and state, with the gates r, z and n one after the other.
        b, c: their biases `[3p]`.
    """
    size = len(h_p)
    rows = []
    for i in range(size):

        def sums(gate: int, row: int = i) -> tuple[Tensor, Tensor]:
            j = gate * size + row
            return (w[j] * x_p).sum() + b[j], (u[j] * h_p).sum() + c[j]

        (xr, hr), (xz, hz), (xn, hn) = sums(0), sums(1), sums(2)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        rows.append((1 - z) * torch.tanh(xn + r * hn) + z * h_p[i])
    return torch.stack(rows)


def reference_rnn(x_p: Tensor, h_p: Tensor, w: Tensor, u: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute the next state of one token by an RNN, number by number, `[p]`."""
    numbers = [(w[i] * x_p).sum() + b[i] + (u[i] * h_p).sum() + c[i] for i in range(len(h_p))]
    return torch.tanh(torch.stack(numbers))


def reference_recurrent_scores(
    x_TH: Tensor,
    state_Tp: Tensor,
    projection_pH: Tensor,
    router_Ep: Tensor,
    cell: str,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Compute logits `[T, E]` and states `[T, p]` token by token (RMoE, Eq. 4-6)."""
    step = {"gru": reference_gru, "rnn": reference_rnn}[cell]
    states = []
    for x, h in zip(x_TH, state_Tp, strict=True):
        projected = torch.stack([(row * x).sum() for row in projection_pH])
        states.append(step(projected, h, *weights))
    logits = [torch.stack([(row * h).sum() for row in router_Ep]) for h in states]
    return torch.stack(logits), torch.stack(states)
