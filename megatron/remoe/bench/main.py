"""The commands `remoe bench ...`: what to compare, and what to print."""

from pathlib import Path

import torch
from rich.console import Console

from megatron.remoe import cpu
from megatron.remoe.bench import layer as layers
from megatron.remoe.bench import parts
from megatron.remoe.bench import step as steps
from megatron.remoe.bench.timing import Measured, measure, report

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer(
    tokens: int,
    hidden: int,
    ffn: int,
    experts: list[int],
    topk: int,
    dtype: str,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Every alternative at the first number of experts, and ReMoE at the others."""
    console = Console()
    shapes = [layers.Shape(tokens, hidden, ffn, e, topk, _dtype(dtype), _device()) for e in experts]
    layers.initialize()
    found = layers.alternatives(shapes[0])
    found += [layers.remoe_layer(shape) for shape in shapes[1:]]
    for shape in shapes:
        console.print(f"E={shape.num_experts}: {layers.assignments(shape)}", highlight=False)
    rows = measure(found, rounds=rounds, baseline=layers.DENSE, console=console)
    settings = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "experts": experts, "topk": topk,
                "dtype": dtype, "rounds": rounds,
                "routing": [layers.assignments(s) for s in shapes]}  # fmt: skip
    title = f"One MoE layer, forward + backward: T={tokens} H={hidden} F={ffn} k={topk} {dtype}"
    report(rows, title=title, baseline="dense", settings=settings, console=console,
           json_path=json_path)  # fmt: skip
    _growth(rows, [f"ReMoE, E={e}" for e in experts], console)


def router(
    tokens: int,
    hidden: int,
    experts: int,
    topk: int,
    dtype: str,
    rounds: int,
    json_path: Path | None,
) -> None:
    """The parts around the experts."""
    console = Console()
    shape = layers.Shape(tokens, hidden, 1, experts, topk, _dtype(dtype), _device())
    rows = measure(parts.alternatives(shape), rounds=rounds, baseline=parts.COPY, console=console)
    settings = {"tokens": tokens, "hidden": hidden, "experts": experts, "topk": topk,
                "dtype": dtype, "rounds": rounds}  # fmt: skip
    title = f"Around the experts, forward + backward: T={tokens} H={hidden} E={experts} k={topk}"
    report(rows, title=title, baseline="copy", settings=settings, console=console,
           json_path=json_path)  # fmt: skip


def step(
    sizes: tuple[int, int, int, int, int, int],
    experts: list[int],
    granularities: list[int],
    rounds: int,
    json_path: Path | None,
) -> None:
    """Training steps, and how they grow."""
    console = Console()
    model = steps.Model(*sizes)
    layers.initialize()
    found = steps.alternatives(model, experts, granularities)
    rows = measure(found, rounds=rounds, baseline=steps.DENSE, console=console)
    settings = model.config() | {"experts": experts, "granularities": granularities}
    title = (f"A training step: L={model.layers} H={model.hidden_size} F={model.ffn_hidden_size} "
             f"T={model.sequence * model.micro_batch} k={model.topk}")  # fmt: skip
    report(rows, title=title, baseline="dense", settings=settings, console=console,
           json_path=json_path)  # fmt: skip
    times = {row.name: row.ratio for row in rows}
    for name, ratio in times.items():
        if name.startswith("ReMoE"):
            relative = ratio / times[name.replace("ReMoE", "TopK")]
            console.print(f"{name}: {relative:.3f} of the time of TopK", highlight=False)
    _growth(rows, [f"ReMoE E={e}" for e in experts], console)


def _growth(rows: list[Measured], names: list[str], console: Console) -> None:
    ratios = {row.name: row.ratio for row in rows}
    for name in names[1:]:
        growth = ratios[name] / ratios[names[0]]
        console.print(f"{name}: {growth:.3f} of the time of {names[0]}", highlight=False)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device() -> str:
    return "cuda" if cpu.has_gpu() else "cpu"
