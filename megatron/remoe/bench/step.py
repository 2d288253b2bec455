"""A whole training step of a small model: ReMoE, TopK and dense, by experts and granularity."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.bench.layer import threshold
from megatron.remoe.bench.timing import Alternative
from megatron.remoe.testing.cells import Cell, RouterKind, Training
from megatron.remoe.testing.golden import golden_tokens

DENSE = "dense of equal active FLOPs"


@dataclass(frozen=True)
class Model:
    """Sizes of the model and of its batch; F is the width of an expert before granularity."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    sequence: int
    micro_batch: int
    topk: int
    num_experts: int = 8
    granularity: int = 1

    def config(self) -> dict[str, Any]:
        """In the terms of the golden runs. Learning rate 0: routing stays as it is calibrated."""
        return {
            "seed": 1, "E": self.num_experts, "k": self.topk, "G": self.granularity,
            "L": self.layers, "H": self.hidden_size, "F": self.ffn_hidden_size, "heads": 8,
            "groups": 4, "seq": self.sequence, "mbs": self.micro_batch, "nmb": 1, "steps": 1,
            "lr": 0.0, "coeff_init": 1e-8,
        }  # fmt: skip


def alternatives(model: Model, experts: list[int], granularities: list[int]) -> list[Alternative]:
    """Dense, and TopK and ReMoE for all experts at granularity 1 and all granularities at E[0]."""
    shapes = [replace(model, num_experts=e) for e in experts]
    shapes += [
        replace(model, num_experts=experts[0], granularity=g) for g in granularities if g != 1
    ]
    dense = replace(model, ffn_hidden_size=model.ffn_hidden_size * model.topk)
    found = [_alternative(DENSE, "dense", dense)]
    for shape in shapes:
        name = f"E={shape.num_experts}" + (
            f" G={shape.granularity}" if shape.granularity > 1 else ""
        )
        found.append(_alternative(f"TopK {name}", "topk", shape))
        found.append(_alternative(f"ReMoE {name}", "relu", shape))
    return found


def _alternative(name: str, router: RouterKind, model: Model) -> Alternative:
    config = model.config()
    training = Training(Cell(name, router=router), config, None)
    batch = golden_tokens(config)[0]
    facts = {}
    if router == "relu":
        route_exactly(training, batch)
        measured = training.step(batch)
        facts["sparsity"] = f"{measured['sparsity']:.5f}"
    return Alternative(name, lambda: training.step(batch), facts)


@torch.no_grad()
def route_exactly(training: Training, batch: Tensor) -> None:
    """Give every router the bias that activates exactly T * k assignments on this batch.

    Routing stays uneven over tokens and experts, as the router's weights make it. Layers are set
    in order, since each changes the input of the next.
    """
    from megatron.core.utils import unwrap_model

    from megatron.remoe.train.step import relu_routers

    (model,) = unwrap_model(training.chunks)
    tokens = batch.flatten(end_dim=-2)[:, :-1]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    routers: list[Any] = relu_routers([model])
    for router in routers:
        seen: list[Tensor] = []
        hook = router.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(tokens, positions, None)
        hook.remove()
        x = seen[0].flatten(end_dim=-2).float()
        logits = x @ router.weight.float().T
        bias = -threshold(logits, len(x) * router.config.moe_router_topk)
        router.bias = torch.nn.Parameter(
            bias.expand(router.num_experts).contiguous(), requires_grad=False
        )
