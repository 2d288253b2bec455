"""The experts of a layer, which compute the active (token, expert) pairs and nothing else.

transformers' own implementations (`transformers.integrations.moe`) take an index of k experts for
each token, the same k for all, and compute every slot of it unless experts are spread over
processes. Here the number of experts varies from token to token, and may be zero.

This file is exported with every model and therefore self-contained. Shapes: T tokens, E experts, H
hidden, F expert width, A active pairs, sorted by expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .configuration_remoe import ReMoEConfig


class ReMoEExperts(nn.Module):
    """Stacked SwiGLU experts: `gate_up_proj` is `[E, 2F, H]` (gate first), `down_proj` `[E, H, F]`.

    Experts without tokens cost nothing.
    """

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_experts, config.hidden_size, config.moe_intermediate_size
        )  # fmt: skip
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TH: Tensor, active_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """Return the weighted sum of the active experts' outputs, `[T, H]`.

        The order of the arguments is that of `moe_tp_experts`, transformers' plan for tensors that
        are split over processes.
        """
        weights = (self.gate_up_proj, self.down_proj)
        is_learned = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        grouped = _uses_grouped_mm(x_TH, *weights, is_learned=is_learned)
        if len(x_TH) == 1 and not grouped and not torch.is_grad_enabled():
            return _one_token(x_TH, active_TE, probs_TE, *weights)
        expert_A, token_A = active_TE.T.nonzero().unbind(1)
        counts_E = active_TE.sum(dim=0)
        # On a GPU index_add sums in any order, here and in the backward of index_select; index_put
        # and the backward of indexing sort.
        on_gpu = x_TH.device.type == "cuda"
        x_AH = x_TH[token_A] if on_gpu else x_TH.index_select(0, token_A)
        counts = counts_E.cumsum(0, dtype=torch.int32) if grouped else counts_E.tolist()
        h_AF = _swiglu(_multiply(x_AH, self.gate_up_proj, counts, is_learned))
        out_AH = _multiply(h_AF, self.down_proj, counts, is_learned)
        out_AH = (out_AH * probs_TE[token_A, expert_A, None].to(out_AH.dtype)).to(x_TH.dtype)
        y_TH = torch.zeros_like(x_TH)
        if on_gpu:
            return y_TH.index_put((token_A,), out_AH, accumulate=True)
        return y_TH.index_add(0, token_A, out_AH)


def _swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def _one_token(
    x_1H: Tensor, active_1E: Tensor, probs_1E: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return the output for a single token, `[1, H]`, as decoding needs it."""
    y_1H = torch.zeros_like(x_1H)
    for expert in active_1E[0].nonzero().flatten().tolist():
        out = F.linear(_swiglu(F.linear(x_1H, gate_up[expert])), down[expert])
        y_1H = y_1H + (out * probs_1E[0, expert].to(out.dtype)).to(x_1H.dtype)
    return y_1H


def _multiply(
    rows_A: Tensor, weight: Tensor, counts: Tensor | list[int], is_learned: bool
) -> Tensor:
    """Multiply the rows of every expert by its weight, `[A, out]`.

    Args:
        rows_A: `[A, in]`, sorted by expert.
        weight: `[E, out, in]`.
        counts: the number of rows of each expert; or, on the device, where its rows end.
        is_learned: whether the weight gets a gradient.
    """
    if isinstance(counts, Tensor):
        return F.grouped_mm(rows_A.to(weight.dtype), weight.mT, offs=counts)
    # Unbound at once, so that backward stacks the gradients of all experts at once.
    matrices = weight.unbind(0) if is_learned else weight
    # The first expert of a layer without any active pair still computes zero rows, so that every
    # parameter gets a gradient (of zeros), as data parallelism and weight decay expect.
    busy = [expert for expert, count in enumerate(counts) if count] or [0]
    parts = rows_A.split([counts[expert] for expert in busy])
    return torch.cat([F.linear(x, matrices[e]) for x, e in zip(parts, busy, strict=True)])


def _uses_grouped_mm(x_TH: Tensor, *weights: Tensor, is_learned: bool) -> bool:
    """Return whether torch can multiply all experts in one launch, without asking the host.

    It does so in bf16, on compute capability 9 and 10, and for rows that are multiples of 16 bytes.
    Elsewhere torch's function copies the ends to the host, and then multiplies them one by one. On
    capability 10 the gradient of an expert without rows is undefined
    (github.com/pytorch/pytorch/issues/172439).
    """
    if x_TH.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    capability = torch.cuda.get_device_capability(x_TH.device)[0]
    return all(
        w.dtype == torch.bfloat16 and w.shape[-1] % 8 == 0 for w in weights
    ) and capability in ((9,) if is_learned else (9, 10))
