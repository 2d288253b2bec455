"""A whole training step of a small model: ReMoE, TopK and dense, by experts and granularity.

With a recurrence, both routers are also timed with it. Other routers are timed when they are named.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.bench.layer import threshold
from megatron.remoe.bench.timing import Alternative
from megatron.remoe.testing.cell import Cell, RouterKind
from megatron.remoe.testing.cells import Training
from megatron.remoe.testing.golden import golden_tokens
from remoe.config import ROUTINGS, Recurrence
from remoe.selections.top_p import TopPRouting, odds_against, top_p_routing

DENSE = "dense of equal active FLOPs"
ROUTERS: dict[str, RouterKind] = {"TopK": "topk", "ReMoE": "relu"}
# Routers of which a bias of the logits decides how many experts are active.
_BIASED = ("relu", "relu_rms", "relu_l2", "expert_threshold")
_BISECTIONS = 30


@dataclass(frozen=True)
class Model:
    """Sizes of a model and of its batch; expert width and topk are those before granularity."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    sequence: int
    micro_batch: int
    topk: int
    num_experts: int = 8
    granularity: int = 1
    recurrence: Recurrence = "none"
    recurrent_size: int = 128

    def config(self) -> dict[str, Any]:
        """Return the sizes in the terms of the golden runs."""
        # The learning rate is 0, so that routing stays as it is calibrated.
        return {
            "seed": 1, "E": self.num_experts, "k": self.topk, "G": self.granularity,
            "L": self.layers, "H": self.hidden_size, "F": self.ffn_hidden_size, "heads": 8,
            "groups": 4, "seq": self.sequence, "mbs": self.micro_batch, "nmb": 1, "steps": 1,
            "lr": 0.0, "coeff_init": 1e-8,
        }  # fmt: skip


def alternatives(
    model: Model, experts: list[int], granularities: list[int], routings: list[str]
) -> list[Alternative]:
    """Return the dense model, and TopK and ReMoE for every number of experts and granularity.

    Granularities above 1, and other routers, are combined with the first number of experts.

    Raises:
        ValueError: a routing is none of `ROUTINGS`.
    """
    for name in routings:
        if name not in ROUTINGS:
            raise ValueError(
                f"routing is {name}, which is no router; choose one of {', '.join(ROUTINGS)}"
            )
    models = [replace(model, num_experts=e) for e in experts]
    models += [replace(models[0], granularity=g) for g in granularities if g != 1]
    dense = replace(model, ffn_hidden_size=model.ffn_hidden_size * model.topk)
    found = [_alternative(DENSE, "dense", replace(dense, recurrence="none"))]
    for each in models:
        granularity = f" G={each.granularity}" if each.granularity > 1 else ""
        name = f"E={each.num_experts}{granularity}"
        for router, kind in ROUTERS.items():
            found.append(_alternative(f"{router} {name}", kind, replace(each, recurrence="none")))
            if each.recurrence != "none":
                found.append(_alternative(f"{router} {each.recurrence} {name}", kind, each))
    first = replace(models[0], recurrence="none")
    others: list[Any] = [name for name in dict.fromkeys(routings) if name not in ROUTERS.values()]
    return found + [_alternative(f"{name} E={first.num_experts}", name, first) for name in others]


def _alternative(name: str, router: RouterKind, model: Model) -> Alternative:
    config = model.config()
    cell = Cell(
        name, router=router, recurrence=model.recurrence, recurrent_size=model.recurrent_size
    )
    training = Training(cell, config, None)
    batch = golden_tokens(config)[0].to(torch.cuda.current_device())
    facts = {}
    if router in _BIASED or router == "top_p":
        reach_k(training, batch)
    if router not in ("dense", "topk", "soft"):
        facts["sparsity"] = f"{training.step(batch)['sparsity']:.5f}"
    return Alternative(name, lambda: training.step(batch), facts)


@torch.no_grad()
def reach_k(training: Training, batch: Tensor) -> None:
    """Set every router so that it makes T * k assignments on this batch.

    A bias of the logits does that exactly, and the p of top-p routing as nearly as it can. Routing
    stays as uneven over tokens and experts as the weights of the router make it. Layers are set in
    order, because each of them changes the input of the next.
    """
    from megatron.core.utils import unwrap_model

    from megatron.remoe.train.step import counting_routers

    (model,) = unwrap_model(training.chunks)
    tokens = batch.flatten(end_dim=-2)[:, :-1]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    routers: list[Any] = counting_routers([model])
    for router in routers:
        seen: list[Tensor] = []
        # A recurrent router also returns what it reads, its state.
        hook = router.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(out[2] if len(out) == 3 else args[0])
        )
        model(tokens, positions, None)
        hook.remove()
        x = seen[0].flatten(end_dim=-2).float()
        logits = x @ router.weight.float().T
        wanted = len(x) * router.config.moe_router_topk
        if isinstance(router.selection, TopPRouting):
            router.odds.fill_(odds_against(_probability(logits, wanted)))
            continue
        bias = -threshold(logits, wanted)
        router.bias = torch.nn.Parameter(
            bias.expand(router.num_experts).contiguous(), requires_grad=False
        )


def _probability(logits_TE: Tensor, wanted: int) -> float:
    """Return the largest p, to about nine digits, with which at most so many pairs are active."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = int(top_p_routing(logits_TE, middle)[1].sum()) > wanted
        low, high = (low, middle) if too_many else (middle, high)
    return high
