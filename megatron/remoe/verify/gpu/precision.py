"""Compare layers in bf16 with fp32, and a run through Megatron in fp32 with plain torch.

    python -m megatron.remoe.verify.gpu.precision layers|run OUT.json [--toy]

Both parts run on the GPU, or on the CPU where there is none. Exits with 1 if a quantity deviates
more than its tolerance.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe import cpu
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.golden import CLOSED_LOOP
from remoe import ReMoELayer, ReMoELayerConfig, SoftMoELayer, SoftMoELayerConfig

# Norm of the difference relative to the norm in fp32. A rounding to bf16 has a relative error of
# up to 2^-8 (3.9e-3), and 1.6e-3 on average. Both layers have the same weights and tokens, which
# bf16 holds exactly, so that an output is behind about five roundings and a gradient behind ten.
# Routing is computed in fp32 in both, so that only values at the threshold may differ.
OUTPUT_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 2e-2
ROUTING_TOLERANCE = 1e-3
# Of the first step of a run in bf16. Its loss and norm are means over many roundings, and a logit
# near zero may flip. Adam turns the signs of tiny gradients into steps, so that later steps differ
# by more, with any rounding.
FIRST_STEP = {
    "lm_loss": 1e-4,
    "grad_norm": 5e-3,
    "l1_reg": 5e-3,
    "sparsity": 5e-3,
    "sparsity_per_layer": 5e-3,
    "most_active": 0.5,
    "l1_coeff_used": 0,
}


@dataclass(frozen=True)
class Case:
    """A layer and its batch.

    Attributes:
        soft: Whether it is Soft MoE.
        dense: Whether half of all pairs are active, as in the warm-up, instead of k experts.
    """

    experts: int
    topk: int = 1
    soft: bool = False
    dense: bool = False
    tokens: int = 4096
    hidden: int = 768
    ffn: int = 2048

    @property
    def name(self) -> str:
        """The name in tables."""
        if self.soft:
            return f"Soft MoE, E={self.experts}"
        return f"ReMoE, E={self.experts}, {'half active' if self.dense else f'k={self.topk}'}"


CASES = (
    Case(8), Case(8, dense=True), Case(64), Case(64, topk=8), Case(128, topk=8), Case(8, soft=True)
)  # fmt: skip
TOYS = (
    Case(4, tokens=64, hidden=32, ffn=48),
    Case(4, tokens=64, hidden=32, ffn=48, dense=True),
    Case(4, tokens=64, hidden=32, ffn=48, soft=True),
)


def compare(case: Case, device: str) -> list[dict[str, Any]]:
    """Return the deviation of every output and gradient of a layer in bf16."""
    expected = dict(_quantities(case, device, torch.float32))
    rows = []
    for name, actual in _quantities(case, device, torch.bfloat16):
        tolerance = GRADIENT_TOLERANCE if name.startswith("grad") else OUTPUT_TOLERANCE
        if name == "tokens of experts":
            tolerance = ROUTING_TOLERANCE
        rows.append(row(case.name, name, deviation(actual, expected[name]), tolerance))
    return rows


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the expected norm, in fp64."""
    a, b = actual.double(), expected.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def row(case: str, quantity: str, found: float, tolerance: float) -> dict[str, Any]:
    """Return a row of the result; NaN is not within a tolerance."""
    verdict = "ok" if found <= tolerance else "DIFFERS"
    return {"case": case, "quantity": quantity, "deviation": found, "tolerance": tolerance,
            "verdict": verdict}  # fmt: skip


def _quantities(case: Case, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Run a layer forward and backward; its weights and tokens are multiples of bf16 numbers."""
    torch.manual_seed(0)
    sizes: dict[str, Any]
    sizes = {"hidden_size": case.hidden, "ffn_hidden_size": case.ffn, "num_experts": case.experts}
    x = torch.randn(8, case.tokens // 8, case.hidden)
    direction = torch.randn_like(x)
    layer: ReMoELayer | SoftMoELayer
    if case.soft:
        layer = SoftMoELayer(SoftMoELayerConfig(**sizes, slots_per_expert=x.shape[1] // 8))
    else:
        layer = ReMoELayer(ReMoELayerConfig(**sizes, topk=case.topk))
        if not case.dense:
            _reach_k(layer, x, case.topk)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())
    layer = layer.to(device=device, dtype=dtype).train()
    x, direction = (t.bfloat16().to(device=device, dtype=dtype) for t in (x, direction))
    y = layer(x.requires_grad_())
    yield "output", y.detach()
    outputs, directions = [y], [direction]
    if isinstance(layer, ReMoELayer):
        assert layer.l1_reg is not None and layer.counts is not None
        outputs, directions = [y, layer.l1_reg], [direction, torch.ones_like(layer.l1_reg)]
        yield "regularizer", layer.l1_reg.detach()
        yield "tokens of experts", layer.counts.double()
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad(outputs, [x, *named.values()], directions)
    yield from zip(("grad tokens", *(f"grad {name}" for name in named)), gradients, strict=True)


@torch.no_grad()
def _reach_k(layer: ReMoELayer, x: Tensor, topk: int) -> None:
    """Let about k experts per token be active, by a feature that is the same in all tokens."""
    x[..., 0] = 1
    layer.router[:, 0] = 0
    logits = torch.nn.functional.linear(x, layer.router).flatten()
    layer.router[:, 0] = -logits.kthvalue(len(logits) - topk * x[..., 0].numel()).values


def run(steps: int) -> list[dict[str, Any]]:
    """Train the golden run on one rank: fp32 against plain torch on the CPU, bf16 against fp32."""
    from megatron.remoe.ranks import be_one_rank
    from megatron.remoe.testing.cells import run_cell, save_golden_weights
    from megatron.remoe.verify import plain, trajectories

    be_one_rank()
    fp32, bf16 = Cell("fp32"), Cell("bf16", dtype="bf16")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # Golden weights depend on the names of a model in fp32 with Megatron's sequential experts.
        weights = Path(folder) / "weights"
        save_golden_weights(replace(fp32, experts="sequential"), CLOSED_LOOP, weights)
        for cell, count in ((fp32, steps), (bf16, 1)):
            found[cell.name] = run_cell(cell, CLOSED_LOOP, count, weights)
    compared = trajectories.TrajectoryComparison.of(found["fp32"], plain.train(CLOSED_LOOP, steps))
    tolerances = trajectories.FP32 if compared.flipped is None else trajectories.FROM_A_FLIP_ON
    rows = [
        row(f"run in Megatron, fp32, {steps} steps", name, value, tolerances[name])
        for name, value in compared.deviations.items()
    ]
    first = trajectories.deviations(found["bf16"], found["fp32"][:1])
    return rows + [
        row("run in Megatron, bf16, first step", name, value, FIRST_STEP[name])
        for name, value in first.items()
    ]


def main() -> int:
    """Run one part and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("layers", "run"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    cpu.prepare_megatron()
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    if args.part == "run":
        rows = run(6 if args.toy else int(CLOSED_LOOP["steps"]))
    else:
        device = "cuda" if cpu.has_gpu() else "cpu"
        for case in TOYS if args.toy else CASES:
            rows += compare(case, device)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    for one in rows:
        print(f"{one['verdict']:7} {one['case']}, {one['quantity']}: {one['deviation']:.1e} "
              f"(at most {one['tolerance']:.0e})")  # fmt: skip
    return int(any(one["verdict"] != "ok" for one in rows))


if __name__ == "__main__":
    sys.exit(main())
