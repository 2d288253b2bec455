"""Memory of forward and backward of one layer, dense and sparse, chunked and not.

Every measurement has a process of its own: on a CPU the highest resident set during the run minus
the one before it, on a GPU the allocator's peak minus what was allocated. Weights, main gradients,
input and its direction exist before; the run makes everything else.

    python -m megatron.remoe.bench.memory '{"tokens": 4096, ...}'   # one measurement, as JSON
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Case:
    """One layer and its routing.

    Attributes:
        active: experts per token, on average.
        chunked: whether experts may run chunk by chunk.
    """

    tokens: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    active: int
    chunked: bool

    @property
    def shape(self) -> Shape:
        device = "cuda" if cpu.has_gpu() else "cpu"
        return Shape(self.tokens, self.hidden, self.ffn, self.experts, self.active, device=device)

    @property
    def max_assignments(self) -> int | None:
        return None if self.chunked else UNLIMITED

    @property
    def estimate(self) -> float:
        """Bytes by the model of memory that `remoe describe` uses."""
        memory = ExpertsMemory(self.hidden, self.ffn)
        rows, balanced = self.active * self.tokens, self.topk * self.tokens
        _, chunk = layers_at_once(1, rows, balanced, self.max_assignments)
        rows_and_sums = 2 * self.tokens * self.hidden * 4  # output, and the input's gradient
        routing = routing_bytes(self.tokens, self.experts, 4)
        return memory.peak(rows, rows / self.experts, chunk) + rows_and_sums + routing


def cases(
    tokens: int, hidden: int, ffn: int, experts: list[int], topk: int
) -> list[tuple[str, Case]]:
    """Stable and warm-up density (half of the experts) for every number of experts."""
    found = []
    for e in experts:

        def case(active: int, chunked: bool, e: int = e) -> Case:
            return Case(tokens, hidden, ffn, e, topk, active, chunked)

        found.append(("stable", case(topk, True)))
        found.append(("warm-up, chunked", case(max(topk, e // 2), True)))
        found.append(("warm-up, at once", case(max(topk, e // 2), False)))
    return found


def build(case: Case) -> Callable[[int], None]:
    """The layer in Megatron with main gradients, as a function that trains it on some tokens."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ReLURouting

    shape = case.shape
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=shape.device))
    config = megatron_config(shape, moe_router_topk=case.topk)
    spec = block_spec(config, ReLURouting(max_assignments=case.max_assignments))
    x, router = inputs(shape)
    layer = megatron_layer(shape, config, spec, router, *weights(shape, case.experts))
    for parameter in layer.parameters():  # gradients whose memory is touched
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    x = x.unsqueeze(1)
    direction = torch.ones_like(x)

    def run(tokens: int) -> None:
        layer.zero_grad(set_to_none=True)
        some = x[:tokens].detach().requires_grad_()
        layer(some)[0].backward(direction[:tokens])

    return run


def measure_here(case: Case) -> int:
    """Measure in this process, which must be fresh."""
    run = build(case)
    run(max(1, case.tokens // 64))  # libraries allocate their own buffers
    before = peak.reset()
    run(case.tokens)
    return peak.peak_bytes() - before


def peak_in_fresh_process(case: Case) -> int:
    """Measure in a process whose freed memory goes back to the system at once.

    Raises:
        RuntimeError: the process failed, out of memory for example.
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
    """Time of the chunked layer relative to the same at once, in turns in this process."""
    pair = [Case(**(asdict(case) | {"chunked": chunked})) for chunked in (False, True)]
    names = ["at once", "chunked"]
    layers = [build(each) for each in pair]
    for train in layers:  # as long as a round takes, a smaller one must do
        train(max(1, case.tokens // 64))
    runs = [
        Alternative(name, partial(train, case.tokens))
        for name, train in zip(names, layers, strict=True)
    ]
    rows = measure(runs, rounds=rounds, baseline=names[0], console=console, warm_up=0)
    return rows[1].ratio


if __name__ == "__main__":
    cpu.prepare_megatron()
    initialize()
    print(measure_here(Case(**json.loads(sys.argv[1]))))
