"""Memory of forward and backward of one layer, dense and sparse, chunked and not.

Every measurement has its own process. On a CPU it is the highest resident set during the run minus
the one before it, on a GPU the allocator's peak minus what was allocated before. Weights, main
gradients, the input and the gradient of the output exist before; the run makes everything else.

    python -m megatron.remoe.bench.memory '{"tokens": 4096, ...}'   # one measurement, as JSON
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron.remoe import cpu
from megatron.remoe.analysis.memory import ExpertsMemory, layers_at_once, routing_bytes
from megatron.remoe.bench.layer import (
    Shape,
    initialize,
    inputs,
    megatron_config,
    megatron_layer,
    weights,
)
from megatron.remoe.bench.timing import Alternative, measure
from megatron.remoe.train import peak
from remoe.kernels.chunks import UNLIMITED

CHUNKED = "warm-up, chunked"


@dataclass(frozen=True)
class Case:
    """One layer and its routing.

    Attributes:
        routing: name of the routing.
        active: mean number of active experts per token.
        chunked: whether experts may run chunk by chunk.
    """

    routing: str

    tokens: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    active: int
    chunked: bool

    @property
    def shape(self) -> Shape:
        """The layer with this many active experts, on this machine's device."""
        device = "cuda" if cpu.has_gpu() else "cpu"
        return Shape(self.tokens, self.hidden, self.ffn, self.experts, self.active, device=device)

    @property
    def max_assignments(self) -> int | None:
        """The limit above which the layer runs chunk by chunk; None is the automatic one."""
        return None if self.chunked else UNLIMITED

    @property
    def estimate(self) -> float:
        """The estimate of `remoe describe` in bytes."""
        memory = ExpertsMemory(self.hidden, self.ffn)
        rows, balanced = self.active * self.tokens, self.topk * self.tokens
        _, chunk = layers_at_once(1, rows, balanced, self.max_assignments)
        rows_and_sums = 2 * self.tokens * self.hidden * 4  # output, and the input's gradient
        routing = routing_bytes(self.tokens, self.experts, 4)
        return memory.peak(rows, rows / self.experts, chunk) + rows_and_sums + routing


def cases(tokens: int, hidden: int, ffn: int, experts: list[int], topk: int) -> list[Case]:
    """Return the density of the stable stage and of the warm-up for every number of experts.

    In the warm-up, half of the experts are active.
    """
    return [
        Case(routing, tokens, hidden, ffn, e, topk, active, chunked)
        for e in experts
        for routing, active, chunked in (
            ("stable", topk, True),
            (CHUNKED, max(topk, e // 2), True),
            ("warm-up, at once", max(topk, e // 2), False),
        )
    ]


def build(case: Case) -> Callable[[int], None]:
    """Return a function that trains a layer in Megatron, with main gradients, on some tokens."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ReLURouting

    shape = case.shape
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=shape.device))
    config = megatron_config(shape, moe_router_topk=case.topk)
    spec = block_spec(config, ReLURouting(max_assignments=case.max_assignments))
    x, router = inputs(shape)
    layer = megatron_layer(config, spec, shape, router, weights(shape, case.experts))
    for parameter in layer.parameters():  # ones, so that the memory is touched
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    x = x.unsqueeze(1)
    direction = torch.ones_like(x)

    def run(tokens: int) -> None:
        layer.zero_grad(set_to_none=True)
        some = x[:tokens].detach().requires_grad_()
        layer(some)[0].backward(direction[:tokens])

    return run


def measure_here(case: Case) -> int:
    """Return the bytes of a run in this process, which must be fresh."""
    run = build(case)
    run(max(1, case.tokens // 64))  # libraries allocate their own buffers
    before = peak.reset()
    run(case.tokens)
    return peak.peak_bytes() - before


def peak_in_fresh_process(case: Case) -> int:
    """Return the bytes of a run in a process whose freed memory goes back to the system at once.

    Raises:
        RuntimeError: the process failed, for example because memory ran out.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["THP_MEM_ALLOC_ENABLE"] = "0"  # huge pages are resident as a whole
    environment["MALLOC_MMAP_MAX_"] = "65536"  # the default, which training sets to none
    done = subprocess.run(
        [sys.executable, "-m", "megatron.remoe.bench.memory", json.dumps(asdict(case))],
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {case} failed ({done.returncode}): {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


def time_ratio(case: Case, *, rounds: int, console: Any) -> float:
    """Return the time of the chunked layer relative to the same layer at once.

    Both run in turns in this process.
    """
    names = {"at once": False, "chunked": True}
    layers = {name: build(replace(case, chunked=chunked)) for name, chunked in names.items()}
    for train in layers.values():  # a round takes long, so that few tokens must do for the warm-up
        train(max(1, case.tokens // 64))
    runs = [Alternative(name, partial(train, case.tokens)) for name, train in layers.items()]
    rows = measure(runs, rounds=rounds, baseline="at once", console=console, warm_up=0)
    return rows[1].ratio


if __name__ == "__main__":
    cpu.prepare_megatron()
    initialize()
    print(measure_here(Case(**json.loads(sys.argv[1]))))
