"""Replay a recorded forward and backward of the published Soft MoE router through our layer.

The experts of the recorded run are MLPs with GELU (tanh) and biases, and its loss is the mean of
the squared difference to `target`. Fp32.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remoe import SoftMoELayer, SoftMoELayerConfig
from remoe.soft import slots_of_tokens, soft_logits, soft_routing

# Kind and size of the allowed deviations. Gradients are relative to the largest of their tensor, or
# to a thousandth of the largest of all, since that of the scale is a sum that can cancel out. Fp32
# logits as large as the scale are rounded in proportion to it, and so are the softmax's gradients.
TOLERANCES = {
    "dispatch": ("absolute", 1e-5),
    "combine": ("absolute", 1e-5),
    "slots": ("absolute", 1e-5),
    "y": ("absolute", 1e-5),
    "loss": ("absolute", 1e-5),
    "gradients": ("relative", 1e-5),
}
_PARAMETERS = ("mu", "scale", "w1", "b1", "w2", "b2")
NAMES = frozenset({"x", "target", "dispatch", "combine", "slots", "y", "loss", "grad.x"}
                  | set(_PARAMETERS) | {f"grad.{name}" for name in _PARAMETERS})  # fmt: skip


@dataclass(frozen=True)
class GoldenSoftMoE:
    """A recorded run: arrays by the names of the published code's README."""

    arrays: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "GoldenSoftMoE":
        """Read a file.

        Raises:
            ValueError: it is not a recorded run of Soft MoE.
        """
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        if missing := NAMES - set(arrays):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return cls({name: torch.from_numpy(array) for name, array in arrays.items()})

    def layer(self) -> SoftMoELayer:
        """Return our layer with the recorded parameters."""
        given = self.arrays
        hidden, experts, slots = given["mu"].shape
        config = SoftMoELayerConfig(
            hidden_size=hidden,
            ffn_hidden_size=given["w1"].shape[2],
            num_experts=experts,
            slots_per_expert=slots,
            activation="gelu",
        )
        layer = SoftMoELayer(config)
        ours = _as_ours({name: given[name] for name in _PARAMETERS})
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(ours[name])
        return layer


def _as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return recorded parameters, or their gradients, under the names and in the shapes of ours."""
    return {
        "router": theirs["mu"].flatten(start_dim=1).T,
        "scale": theirs["scale"].reshape(1),
        "up": theirs["w1"].transpose(1, 2),
        "up_bias": theirs["b1"],
        "down": theirs["w2"].transpose(1, 2),
        "down_bias": theirs["b2"],
    }


def largest_deviations(golden: GoldenSoftMoE, device: str = "cpu") -> dict[str, float]:
    """Run forward and backward, and return the largest deviations by quantity."""
    recorded = {name: array.to(device) for name, array in golden.arrays.items()}
    layer = golden.layer().to(device)
    x = recorded["x"].clone().requires_grad_()
    y = layer(x)
    loss = (y - recorded["target"]).square().mean()
    loss.backward()
    with torch.no_grad():
        dispatch, combine = soft_routing(soft_logits(x, layer.router, layer.scale))
        slots = slots_of_tokens(dispatch, x)
    found = {"dispatch": dispatch, "combine": combine, "slots": slots, "y": y, "loss": loss}
    largest = {
        key: (value.detach().reshape(recorded[key].shape) - recorded[key]).abs().max().item()
        for key, value in found.items()
    }
    theirs = _as_ours({name: recorded[f"grad.{name}"] for name in _PARAMETERS})
    pairs = [(x.grad, recorded["grad.x"])]
    pairs += [(parameter.grad, theirs[name]) for name, parameter in layer.named_parameters()]
    size = [grad.abs().max().item() for _, grad in pairs]
    rounding = max(1.0, recorded["scale"].abs().item() / 30)
    relative = [
        (ours - grad).abs().max().item() / max(own, 1e-3 * max(size)) / rounding
        for (ours, grad), own in zip(pairs, size, strict=True)
    ]
    return largest | {"gradients": torch.tensor(relative).max().item()}  # NaN if one is
