"""The first routers of an adopted model, fitted to what the teacher's routers did with text.

Over the chosen pairs of a layer, the teacher's gate of an expert is close to a linear function of
the expert's logit z = w x and of the token x, whose coefficients all experts share:

    g ~ a z + u x    by least squares, with a ridge

u x stands for the bias that our router does not have, and for the denominator of the softmax, which
all experts of a token share. The router is W' = a W + u, and its gates are relu(W' x). They reach
zero at another place than those of a TopK router, whose smallest gate is far from zero: which of
them stay is decided by `gate_threshold`, at which gates jump to zero as those of a TopK router do.

Shapes: T tokens, E experts, H hidden, P chosen pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.evaluate.models import hooked, routing_of

_RIDGE = 1e-3  # relative to the mean square of a feature


@dataclass(frozen=True)
class Line:
    """The fit of a layer.

    Attributes:
        slope: a.
        explained: the share of the gates' variance over the chosen pairs that it explains.
    """

    slope: float
    explained: float


def fitted_router(
    x_TH: Tensor, weight_EH: Tensor, probs_TE: Tensor, active_TE: Tensor
) -> tuple[Tensor, Line]:
    """Return W', `[E, H]`, and the fit that it follows.

    Args:
        x_TH: what the router reads.
        weight_EH: the teacher's router, W.
        probs_TE: the teacher's gates.
        active_TE: the map of its chosen experts.
    """
    x, w = x_TH.double(), weight_EH.double()
    z_P, gates_P = (x @ w.T)[active_TE], probs_TE[active_TE].double()
    x_PH = x[active_TE.nonzero()[:, 0]]
    size = z_P.square().mean().sqrt()
    features = torch.cat((z_P[:, None] / size * x_PH.square().mean().sqrt(), x_PH), dim=1)
    second = features.T @ features / len(features)
    eye = torch.eye(len(second), dtype=x.dtype, device=x.device)
    ridge = _RIDGE * second.diagonal().mean() * eye
    solved = torch.linalg.solve(second + ridge, features.T @ gates_P / len(features))
    slope = float(solved[0] * x_PH.square().mean().sqrt() / size)
    left = (gates_P - features @ solved).square().sum()
    explained = 1 - left / (gates_P - gates_P.mean()).square().sum().clamp(min=1e-30)
    # A slope that falls would rank the experts the other way round.
    router = max(slope, 1e-6) * w + solved[1:]
    return router.to(weight_EH.dtype), Line(slope, float(explained))


@torch.no_grad()
def fit(model: Any, inputs: Tensor) -> tuple[dict[str, Tensor], list[Line]]:
    """Return the new routers by the names of their weights, and the line of every layer.

    Args:
        model: the teacher.
        inputs: ids, int64 `[N, S]`.
    """
    read: dict[int, list[tuple[Tensor, ...]]] = {}
    routers: dict[int, Any] = {}

    def collect(layer: int, router: Any, given: Any, named: Any, output: Any) -> None:
        routing = routing_of(router, given, named, output)
        routers[layer] = router
        read.setdefault(layer, []).append((given[0].float(), routing.probs, routing.active))

    with hooked(model, collect):
        for batch in torch.split(inputs, 8):
            model.model(batch.to(model.device), use_cache=False)
    weights, lines = {}, []
    for layer in sorted(read):
        parts = (torch.cat(part) for part in zip(*read[layer], strict=True))
        x_TH, probs_TE, active_TE = parts
        weight, line = fitted_router(x_TH, routers[layer].weight, probs_TE, active_TE)
        weights[f"model.layers.{layer - 1}.mlp.router.weight"] = weight
        lines.append(line)
    return weights, lines
