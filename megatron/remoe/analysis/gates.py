"""A figure of the gates of every router that selects experts: how a gate depends on its logit.

One token has 8 logits, of which that of the drawn expert is varied and the others stay. The routers
keep 2 experts, or have the state with which about 2 of these 8 are active. Shapes: T values of the
varied logit, E = 8 experts.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.config import ROUTINGS, Selection
from remoe.selections.expert_choice import ExpertChoiceRouting
from remoe.selections.hashed import HashRouting
from remoe.selections.null_experts import null_experts_routing

_OTHERS = (1.4, 0.5, -0.2, -0.5, -0.9, -1.3, -1.8)
_TOPK = 2
_ID = 2  # of a token that the drawn expert has
_NULL_LOGIT = 0.2  # of all null experts
_STATE = {"odds": torch.tensor(0.7), "thresholds": torch.full((8,), 0.8)}


def drawn_routers() -> list[str]:
    """Return the names of the routers that have a panel: all that select experts."""
    return [name for name, routing in ROUTINGS.items() if issubclass(routing, Selection)]


def gate_of(name: str, values_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gate of an expert, `[T]`, and whether it is active, for values of its logit."""
    others = torch.tensor(_OTHERS, dtype=values_T.dtype).expand(len(values_T), -1)
    logits_TE = torch.cat([values_T.unsqueeze(1), others], dim=1)
    probs_TE, routing_map = _routed(name, logits_TE)
    return probs_TE[:, 0], routing_map[:, 0]


def _routed(name: str, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    settings = ROUTINGS[name]()
    assert isinstance(settings, Selection)
    num_experts = logits_TE.shape[1]
    if name == "null_experts":
        nulls = torch.full_like(logits_TE, _NULL_LOGIT)
        return null_experts_routing(
            torch.cat([logits_TE, nulls], dim=1), num_experts=num_experts, topk_of_all=2 * _TOPK
        )
    if isinstance(settings, HashRouting):
        ids = torch.full((len(logits_TE),), _ID)
        return settings.select_by_id(ids, num_experts=num_experts, topk=_TOPK, layer_number=1)
    if isinstance(settings, ExpertChoiceRouting):
        return _chosen(settings, logits_TE)
    tensors = settings.parameters(num_experts, _TOPK) | _STATE
    return settings.select(logits_TE, tensors, topk=_TOPK)


def _chosen(settings: ExpertChoiceRouting, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Let experts choose among the token and 15 others, whose logits are turned by one expert."""
    line = torch.linspace(-2, 2, 15, dtype=logits_TE.dtype)
    others = torch.stack([line.roll(2 * e) for e in range(8)])
    whole = torch.cat([logits_TE.unsqueeze(1), others.T.expand(len(logits_TE), -1, -1)], dim=1)
    probs, routing_map = settings.choose(whole, topk=_TOPK)
    return probs[:, 0], routing_map[:, 0]


def draw_gates(path: Path) -> None:
    """Draw a panel of every router that selects experts, as an SVG or a PNG.

    Raises:
        ValueError: the file's name says neither.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"figure is {path}; choose a name that ends in .svg or .png")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = torch.linspace(-3, 3, 61)
    names = drawn_routers()
    rows = -(-len(names) // 3)
    fixed: Any = {"svg.hashsalt": "gates", "svg.fonttype": "none", "font.size": 8}
    with pyplot.rc_context(fixed):
        figure, axes = pyplot.subplots(
            rows, 3, figsize=(7.5, 1.75 * rows), sharex=True, layout="constrained"
        )
        for axis, name in zip(axes.flat, names, strict=True):
            gate, active = gate_of(name, values)
            for part, style in ((~active, ("#b0b0b0", 1.5)), (active, ("#1f4e79", 2.0))):
                color, width = style
                axis.plot(values[part], gate[part], color=color, linewidth=width)
            axis.set_title(name)
            axis.set_ylim(-0.08, max(1.08, 1.08 * float(gate.max())))
        for axis in axes[-1]:
            axis.set_xlabel("logit of the expert")
        for axis in axes[:, 0]:
            axis.set_ylabel("gate")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
