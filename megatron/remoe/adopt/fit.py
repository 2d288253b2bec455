"""The first routers of an adopted model, fitted to what the teacher's routers did with text.

The teacher's gate of a chosen expert is close to an affine function of its logit z = w x. Our
router has no bias; in its place is the linear function of x that is nearest to 1, m x. The line

    g ~ a z + b (m x)    over the chosen pairs of a layer, by least squares

gives the gates relu(W' x) with W' = a W + b m, for every expert of the layer. They reach zero at
another place than a TopK router, whose smallest gate is far from zero: which of them stay is
decided by `gate_threshold`, at which gates jump to zero as those of a TopK router do.

Shapes: T tokens, E experts, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.evaluate.models import hooked, routing_of
from remoe.upcycling import nearest_to_one


@dataclass(frozen=True)
class Line:
    """The line of a layer.

    Attributes:
        slope, intercept: a and b.
        explained: the share of the gates' variance over the chosen pairs that it explains.
        one: the standard deviation of m x, whose mean is close to 1, over tokens.
    """

    slope: float
    intercept: float
    explained: float
    one: float


def fitted_router(
    x_TH: Tensor, weight_EH: Tensor, probs_TE: Tensor, active_TE: Tensor
) -> tuple[Tensor, Line]:
    """Return W', `[E, H]`, and the line that it follows.

    Args:
        x_TH: what the router reads.
        weight_EH: the teacher's router, W.
        probs_TE: the teacher's gates.
        active_TE: the map of its chosen experts.
    """
    x, w = x_TH.double(), weight_EH.double()
    m_H = nearest_to_one(x)
    one_T = x @ m_H
    chosen = torch.stack(((x @ w.T)[active_TE], one_T[:, None].expand_as(active_TE)[active_TE]))
    gates = probs_TE[active_TE].double()
    solved = torch.linalg.lstsq(chosen.T, gates[:, None]).solution[:, 0]
    # A line that falls would rank the experts the other way round.
    slope, intercept = max(float(solved[0]), 1e-6), float(solved[1])
    left = (gates - slope * chosen[0] - intercept * chosen[1]).square().sum()
    explained = 1 - left / (gates - gates.mean()).square().sum().clamp(min=1e-30)
    line = Line(slope, intercept, float(explained), float(one_T.std()))
    return (slope * w + intercept * m_H).to(weight_EH.dtype), line


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
        for batch in inputs.split(8):
            model.model(batch.to(model.device), use_cache=False)
    weights, lines = {}, []
    for layer in sorted(read):
        parts = (torch.cat(part) for part in zip(*read[layer], strict=True))
        x_TH, probs_TE, active_TE = parts
        weight, line = fitted_router(x_TH, routers[layer].weight, probs_TE, active_TE)
        weights[f"model.layers.{layer - 1}.mlp.router.weight"] = weight
        lines.append(line)
    return weights, lines
