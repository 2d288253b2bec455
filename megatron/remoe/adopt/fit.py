"""The first routers of an adopted model, fitted to what the teacher's routers did with text.

The teacher's gate of a chosen expert is close to an affine function of what a router with ReLU
gates computes before its ReLU, v: the logit z (`relu`), or z over the norm of all logits of the
token (`relu_l2`). A least-squares line g ~ a v + b over the chosen pairs of a layer gives

    relu:     W' = a W,              gate = relu(W' x - c),         c = -b
    relu_l2:  W' = W,  scale s = a,  gate = s relu(z / |z| - c),    c = -b / a

where c is `gate_offset`. Both gates are then a v + b, above zero. Which of them stay is decided by
`gate_threshold`, whose gates jump to zero as those of a TopK router do.

Shapes: T tokens, E experts, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.evaluate.models import hooked, routing_of
from remoe.hf.modeling_remoe import at_least_fp32

ROUTERS = ("relu", "relu_l2")


@dataclass(frozen=True)
class Line:
    """A least-squares line of gates over what is before the ReLU.

    Attributes:
        slope, intercept: a and b.
        explained: the share of the gates' variance that the line explains.
    """

    slope: float
    intercept: float
    explained: float

    @classmethod
    def through(cls, values: Tensor, gates: Tensor) -> "Line":
        """Fit a line to some pairs, in fp64."""
        x, y = values.double(), gates.double()
        dx, dy = x - x.mean(), y - y.mean()
        slope = (dx * dy).sum() / dx.square().sum().clamp(min=1e-30)
        left = (dy - slope * dx).square().sum()
        explained = 1 - left / dy.square().sum().clamp(min=1e-30)
        return cls(float(slope), float(y.mean() - slope * x.mean()), float(explained))


def before_relu(logits_TE: Tensor, router: str) -> Tensor:
    """Return what the ReLU of a router acts on, `[T, E]`, without an offset."""
    if router == "relu":
        return logits_TE
    norm_T1 = torch.linalg.vector_norm(at_least_fp32(logits_TE), dim=1, keepdim=True)
    return logits_TE / (norm_T1 + 1e-8)


@torch.no_grad()
def fit_lines(model: Any, inputs: Tensor, router: str) -> list[Line]:
    """Return the line of every layer with experts.

    Args:
        model: the teacher.
        inputs: ids, int64 `[N, S]`.
        router: one of `ROUTERS`.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def read(layer: int, module: Any, given: Any, named: Any, output: Any) -> None:
        routing = routing_of(module, given, named, output)
        values_TE = before_relu(module.score(*given, **named)[0], router)
        pairs = (values_TE[routing.active].cpu(), routing.probs[routing.active].cpu())
        found.setdefault(layer, []).append(pairs)

    with hooked(model, read):
        for batch in inputs.split(8):
            model.model(batch.to(model.device), use_cache=False)
    return [
        Line.through(*(torch.cat(part) for part in zip(*found[layer], strict=True)))
        for layer in sorted(found)
    ]


def fitted(
    state: dict[str, Tensor], lines: list[Line], layers: list[int], router: str
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the routers' new weights by name, and the offset of every layer with experts.

    Args:
        state: the teacher's weights.
        lines: the line of every layer with experts.
        layers: the indices of these layers.
        router: one of `ROUTERS`.
    """
    weights: dict[str, Tensor] = {}
    offsets = []
    for layer, line in zip(layers, lines, strict=True):
        # A line that falls would rank the experts the other way round.
        slope = max(line.slope, 1e-3)
        prefix = f"model.layers.{layer}.mlp.router"
        weight = state[f"{prefix}.weight"]
        if router == "relu":
            weights[f"{prefix}.weight"] = slope * weight
            offsets.append(-line.intercept)
        else:
            weights[f"{prefix}.weight"] = weight.clone()
            weights[f"{prefix}.gate_scale"] = weight.new_tensor([slope])
            offsets.append(-line.intercept / slope)
    return weights, offsets
