"""ReMoE in plain loops over tokens and experts, against which the fast paths are tested.

Shapes: T tokens, H hidden, E experts, F expert width. The loops are slow on purpose.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def reference_routing(x_TH: Tensor, router_EH: Tensor) -> Tensor:
    """Compute `R(x_t)_e = max(0, w_e . x_t)`, `[T, E]` (Eq. 5)."""
    rows = [torch.stack([(w * x).sum().clamp(min=0) for w in router_EH]) for x in x_TH]
    return torch.stack(rows)


def reference_relu_rms(logits_TE: Tensor, scale_E: Tensor, eps: float) -> Tensor:
    """Compute `w_e ReLU(z_e) / sqrt(mean_e ReLU(z_e)^2 + eps)`, `[T, E]` (BlockFFN)."""
    rows = []
    for z in logits_TE:
        relu = [value.clamp(min=0) for value in z]
        mean = sum((value * value for value in relu), z.new_zeros(())) / len(relu)
        root = torch.sqrt(mean + eps)
        rows.append(torch.stack([w * value / root for w, value in zip(scale_E, relu, strict=True)]))
    return torch.stack(rows)


def reference_relu_l2(logits_TE: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `scale max(0, z_e / (|z| + eps))`, `[T, E]` (UniPool, Eq. 7)."""
    rows = []
    for z in logits_TE:
        norm = torch.sqrt(sum((value * value for value in z), z.new_zeros(())))
        rows.append(torch.stack([scale.sum() * (v / (norm + eps)).clamp(min=0) for v in z]))
    return torch.stack(rows)


def reference_top_p(logits_TE: Tensor, p: float) -> Tensor:
    """Compute the softmax of the fewest experts that reach p, and zeros, `[T, E]`."""
    rows = []
    for z in logits_TE:
        exponentials = [torch.exp(value - z.max()) for value in z]
        total = sum(exponentials, z.new_zeros(()))
        softmax = [value / total for value in exponentials]
        numbers = [float(value) for value in softmax]
        order = sorted(range(len(z)), key=numbers.__getitem__, reverse=True)
        chosen = order[:1]
        while sum(numbers[e] for e in chosen) < p and len(chosen) < len(z):
            chosen.append(order[len(chosen)])
        zero = z.new_zeros(())
        rows.append(torch.stack([s if e in chosen else zero for e, s in enumerate(softmax)]))
    return torch.stack(rows)


def reference_expert_threshold(logits_TE: Tensor, thresholds_E: Tensor) -> Tensor:
    """Compute the sigmoid of the logits that reach their expert's threshold, `[T, E]`."""
    rows = []
    for z in logits_TE:
        pairs = zip(z, thresholds_E, strict=True)
        gates = [1 / (1 + torch.exp(-v)) if v >= c else torch.zeros_like(v) for v, c in pairs]
        rows.append(torch.stack(gates))
    return torch.stack(rows)


def reference_null_experts(logits_TN: Tensor, num_experts: int, topk_of_all: int) -> Tensor:
    """Compute the gates of the chosen experts that are not null, `[T, E]` (AdaMoE)."""
    rows = []
    for z in logits_TN:
        numbers = [float(value) for value in z]
        first = sorted(range(len(z)), key=numbers.__getitem__, reverse=True)[:topk_of_all]
        total = sum((torch.exp(z[e]) for e in first if e < num_experts), z.new_zeros(()))
        zero = z.new_zeros(())
        gates = [torch.exp(z[e]) / total if e in first else zero for e in range(num_experts)]
        rows.append(torch.stack(gates))
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


def reference_l1(probs_TE: Tensor, *, topk: int, load_balancing: bool, power: int = 1) -> Tensor:
    """Compute the regularizer of one layer and micro-batch, 0-d (Eq. 9-11 without 1/L).

    The load f is raised to `power`.
    """
    num_tokens, num_experts = probs_TE.shape
    total = probs_TE.new_zeros(())
    for e in range(num_experts):
        count = sum(int(probs_TE[t, e] > 0) for t in range(num_tokens))
        f = num_experts * count / (topk * num_tokens) if load_balancing else 1.0
        for t in range(num_tokens):
            total = total + f**power * probs_TE[t, e]
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


def reference_soft_routing(
    x_TH: Tensor, router_SH: Tensor, scale: Tensor, padding_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute Soft MoE's dispatch and combine weights of one sequence, both `[T, S]`.

    Args:
        x_TH: the tokens.
        router_SH: parameters of the slots.
        scale: factor of the logits.
        padding_T: bool, True for padding tokens.
    """

    def unit(v: Tensor) -> Tensor:
        return v / torch.sqrt((v * v).sum() + 1e-6)

    def weight(t: int, s: int) -> Tensor:
        padded = padding_T is not None and bool(padding_T[t])
        exponential = torch.exp((unit(x_TH[t]) * unit(router_SH[s])).sum() * scale.sum())
        return torch.zeros_like(exponential) if padded else exponential

    tokens, slots = range(len(x_TH)), range(len(router_SH))
    weights = [[weight(t, s) for s in slots] for t in tokens]
    dispatch, combine = [], []
    for t in tokens:
        of_token = sum(weights[t], x_TH.new_zeros(()))
        alone = of_token == 0  # a padding token
        for s in slots:
            of_slot = sum((weights[u][s] for u in tokens), x_TH.new_zeros(()))
            dispatch.append(weights[t][s] / of_slot)
            combine.append(weights[t][s] if alone else weights[t][s] / of_token)
    shape = (len(tokens), len(slots))
    return torch.stack(dispatch).view(shape), torch.stack(combine).view(shape)


def reference_soft_moe(
    x_TH: Tensor, dispatch_TS: Tensor, combine_TS: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """Compute `y_t = sum_s C_ts f(sum_u D_us x_u)` of one sequence, `[T, H]`.

    Args:
        x_TH: the tokens.
        dispatch_TS, combine_TS: the weights.
        experts: functions of a vector `[H]`; each has as many neighboring slots as any other.
    """
    slots = range(dispatch_TS.shape[1])
    per_expert = len(slots) // len(experts)
    outputs = []
    for s in slots:
        mean = torch.stack([d * x for d, x in zip(dispatch_TS[:, s], x_TH, strict=True)]).sum(dim=0)
        outputs.append(experts[s // per_expert](mean))
    return torch.stack([sum(c[s] * outputs[s] for s in slots) for c in combine_TS])


def reference_expert(up: Tensor, down: Tensor, *biases: Tensor) -> Expert:
    """Return one expert as a function of a vector: SwiGLU without biases, GELU (tanh) with them."""
    width = down.shape[1]

    def swiglu(x: Tensor) -> Tensor:
        gate, linear = up[:width] @ x, up[width:] @ x
        return down @ (gate * torch.sigmoid(gate) * linear)

    def gelu(x: Tensor) -> Tensor:
        h = up @ x + biases[0]
        inner = math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)
        return down @ (0.5 * h * (1 + torch.tanh(inner))) + biases[1]

    return gelu if biases else swiglu
