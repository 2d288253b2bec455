"""Replay a recorded run of the published RMoE classes through `remoe`'s recurrent router.

The recorded model has no attention: `x = embedding[tokens]`, for every layer
`x = x + experts(rms_norm(x))`, and logits `rms_norm(x) output^T`. Fp32, CPU.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from remoe.layer import routed_experts
from remoe.recurrent import recurrent_scores
from remoe.regularization import switch_loss
from remoe.routing import topk_routing

# Kind and size of the allowed deviations.
TOLERANCES = {
    "state": ("absolute", 1e-6),
    "logits": ("absolute", 2e-6),  # 1.01e-6 on an H200
    "choices": ("differing", 0),
    "weights": ("absolute", 1e-6),
    "gradients": ("relative", 1e-5),
    "lm_loss": ("relative", 1e-4),
    "aux_loss": ("relative", 1e-4),
    "grad_norm": ("relative", 1e-4),
}


@dataclass(frozen=True)
class GoldenRMoE:
    """A recorded run: its sizes, and arrays by name."""

    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "GoldenRMoE":
        """Read a file.

        Raises:
            ValueError: it is not a recorded run of RMoE.
        """
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        if not {"meta", "tokens", "trajectory"} <= set(arrays):
            raise ValueError("it lacks meta, tokens or trajectory")
        meta = json.loads(arrays.pop("meta").tobytes())
        return cls(meta, {name: torch.from_numpy(array) for name, array in arrays.items()})

    def parameters(self) -> dict[str, Tensor]:
        """The first weights, by their recorded names."""
        found = {}
        for name, shape in self.meta["shapes"].items():
            seed = (zlib.crc32(name.encode()) ^ self.meta["seed"]) & 0xFFFFFFFF
            numbers = np.random.RandomState(seed).standard_normal(shape)
            values = torch.from_numpy((numbers * self.meta["std"][name]).astype(np.float32))
            found[name] = values.requires_grad_()
        return found


@dataclass
class Seen:
    """What one layer computed."""

    logits: Tensor
    state: Tensor
    probs: Tensor
    routing_map: Tensor


def forward(
    golden: GoldenRMoE, weights: dict[str, Tensor], tokens: Tensor
) -> tuple[Tensor, Tensor, list[Seen]]:
    """Return cross-entropy and balancing loss of a batch, and what the layers computed."""
    meta = golden.meta
    stacked = [_stacked(weights, layer, meta["E"]) for layer in range(meta["L"])]
    cell = _cell(weights, meta["cell"])
    x = weights["embedding"][tokens[:, :-1].long()].flatten(end_dim=1)
    state, seen = None, []
    for layer, (gate_up, down) in enumerate(stacked):
        normed = F.rms_norm(x, x.shape[-1:], eps=meta["norm_eps"])
        logits, state = recurrent_scores(
            normed,
            state,
            cell=meta["cell"],
            weights=cell,
            projection_pH=weights[f"layers.{layer}.weight1"],
            router_Ep=weights[f"layers.{layer}.weight2"],
        )
        probs, routing_map = topk_routing(logits, topk=meta["topk"], renormalize=True)
        x = x + routed_experts(normed, probs, routing_map, gate_up, down)
        seen.append(Seen(logits, state, probs, routing_map))
    logits = F.rms_norm(x, x.shape[-1:], eps=meta["norm_eps"]) @ weights["output"].T
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten().long())
    # The published code balances all layers at once, as if their tokens were one batch.
    aux = switch_loss(
        torch.cat([layer.logits for layer in seen]),
        torch.cat([layer.routing_map for layer in seen]),
    )
    return loss, aux, seen


def _stacked(weights: dict[str, Tensor], layer: int, experts: int) -> tuple[Tensor, Tensor]:
    def expert(index: int, name: str) -> Tensor:
        return weights[f"layers.{layer}.experts.{index}.{name}.weight"]

    gate_up = [torch.cat([expert(i, "w1"), expert(i, "w3")]) for i in range(experts)]
    return torch.stack(gate_up), torch.stack([expert(i, "w2") for i in range(experts)])


def _cell(weights: dict[str, Tensor], cell: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates = "rzn" if cell == "gru" else "n"  # the letters at the end of the names

    def joined(kind: str, source: str) -> Tensor:
        return torch.cat([weights[f"recurrent.{kind}_{source}{gate}"] for gate in gates])

    return joined("weight", "i"), joined("weight", "h"), joined("bias", "i"), joined("bias", "h")


def _forget_unused_experts(weights: dict[str, Tensor], seen: list[Seen]) -> None:
    """Take the zero gradients of experts without tokens away.

    The published code skips these experts, and the optimizer then neither decays nor moves them.
    """
    for layer, one in enumerate(seen):
        for expert in (~one.routing_map.any(dim=0)).nonzero().flatten().tolist():
            for name in ("w1", "w2", "w3"):
                weights[f"layers.{layer}.experts.{expert}.{name}.weight"].grad = None


def largest_deviations(
    golden: GoldenRMoE, steps: int | None = None, device: str = "cpu"
) -> dict[str, float]:
    """Train for `steps` steps, all by default, and return the largest deviations by quantity."""
    meta = golden.meta
    recorded = {name: array.to(device) for name, array in golden.arrays.items()}
    weights = {
        name: weight.detach().to(device).requires_grad_()
        for name, weight in golden.parameters().items()
    }
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=meta["lr"],
        betas=tuple(meta["betas"]),
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
    )
    largest = dict.fromkeys(TOLERANCES, 0.0)

    def note(key: str, ours: Tensor | float, theirs: Tensor | float, scale: float = 1.0) -> None:
        difference = torch.as_tensor(ours).double().cpu() - torch.as_tensor(theirs).double().cpu()
        largest[key] = max(largest[key], difference.abs().max().item() / scale)

    for step, tokens in enumerate(recorded["tokens"][:steps]):
        loss, aux, seen = forward(golden, weights, tokens)
        (loss + meta["aux_coeff"] * aux).backward()
        if step == 0:
            for index, layer in enumerate(seen):
                note("state", layer.state.detach(), recorded[f"layer{index}.state"])
                note("logits", layer.logits.detach(), recorded[f"layer{index}.logits"])
                choices = recorded[f"layer{index}.experts"]
                chosen = torch.zeros_like(layer.routing_map).scatter(1, choices, True)
                differing = (chosen != layer.routing_map).sum().item()
                largest["choices"] = max(largest["choices"], differing)
                note(
                    "weights",
                    layer.probs.detach().gather(1, choices),
                    recorded[f"layer{index}.weights"],
                )
            for name, grad in recorded.items():
                if name.startswith("grad."):
                    ours = weights[name.removeprefix("grad.")].grad
                    note("gradients", ours, grad, grad.abs().max().item())
        _forget_unused_experts(weights, seen)
        grads = [weight.grad for weight in weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        values = {"lm_loss": loss.item(), "aux_loss": aux.item(), "grad_norm": norm}
        for (key, ours), theirs in zip(
            values.items(), recorded["trajectory"][step].tolist(), strict=True
        ):
            note(key, ours, theirs, abs(theirs))
        optimizer.step()
        optimizer.zero_grad()
    return largest
