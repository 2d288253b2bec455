"""Routers for a mixture whose experts are copies of a dense MLP, or of slices of it.

With gates g the mixture computes `sum over e of g_e * E_e(x)` (arXiv 2412.14711, Eq. 1), which is
the dense layer where the gates of the copies of every slice sum to 1. The gates are those of ReLU
routing (Eq. 5), and a ReLU of a linear function of x is not constant, so the sum can be 1 only on
average.

Shapes: T tokens, H hidden, E copies, G slices (granularity, Eq. 12).
"""

import torch
from torch import Tensor

_RIDGE = 1e-3  # relative to the mean square of an activation


def router_of_copies(
    fit_TH: Tensor,
    held_out_TH: Tensor,
    *,
    num_copies: int,
    num_slices: int,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    """Return a router `[E * G, H]` whose gates sum to 1 on average over the copies of every slice.

    Expert `c * G + s` is copy c of slice s. All experts share the `w` that minimizes `|x w - 1|^2`
    with a ridge, and each has noise, so that the copies can come to differ. The noise sums to zero
    over the copies, so while all copies of a slice are active the sum of their gates is `x w`. A
    ReLU is positively homogeneous: dividing by the mean sum over held-out tokens makes it 1 there.

    Args:
        fit_TH: activations that w and the noise are fitted to.
        held_out_TH: activations that the gates are scaled with.
        num_copies: E.
        num_slices: G.
        spread: standard deviation of the noise of a gate over tokens, relative to the gate's mean.
        generator: of the noise.
    """
    x, y = fit_TH.double(), held_out_TH.double()
    second = x.T @ x / len(x)
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    w_H: Tensor = torch.linalg.solve(second + ridge, x.mean(dim=0))
    noise_EGH = torch.randn(
        (num_copies, num_slices, x.shape[1]), generator=generator, dtype=x.dtype
    )
    noise_EGH -= noise_EGH.mean(dim=0)
    size_EG1 = (noise_EGH @ x.T).std(dim=-1, keepdim=True).mean(dim=0)
    noise_EGH *= spread * (x @ w_H).mean() / size_EG1
    weights_EGH = w_H + noise_EGH
    sums_GT = torch.relu(weights_EGH @ y.T).sum(dim=0)
    return (weights_EGH / sums_GT.mean(dim=-1)[None, :, None]).flatten(0, 1).float()
