"""The commands `remoe bench ...`: what they compare, and what they print."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron.remoe import cpu
from megatron.remoe.bench import layer as layers
from megatron.remoe.bench import memory as memories
from megatron.remoe.bench import parts
from megatron.remoe.bench import step as steps
from megatron.remoe.bench.timing import Measured, measure, report, save

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
    """Time every alternative at the first number of experts, and ReMoE at the others."""
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
    """Time the parts around the experts, and count their bytes."""
    console = Console()
    shape = layers.Shape(tokens, hidden, 1, experts, topk, _dtype(dtype), _device())
    rows = measure(parts.alternatives(shape), rounds=rounds, baseline=parts.COPY, console=console)
    settings = {"tokens": tokens, "hidden": hidden, "experts": experts, "topk": topk,
                "dtype": dtype, "rounds": rounds}  # fmt: skip
    title = f"Around the experts, forward + backward: T={tokens} H={hidden} E={experts} k={topk}"
    report(rows, title=title, baseline="copy", settings=settings, console=console,
           json_path=json_path)  # fmt: skip


def step(
    model: steps.Model,
    experts: list[int],
    granularities: list[int],
    rounds: int,
    json_path: Path | None,
) -> None:
    """Time training steps, and compare their growth with the number of experts."""
    console = Console()
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


def memory(
    tokens: int,
    hidden: int,
    ffn: int,
    experts: list[int],
    topk: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Measure the peak memory of the stages by number of experts, and the time that chunks cost."""
    console = Console()
    for e in experts:
        if not 1 <= topk <= e:
            raise ValueError(f"topk is {topk} of {e} experts; choose it between 1 and experts")
    cases = memories.cases(tokens, hidden, ffn, experts, topk)
    rows: list[dict[str, Any]] = []
    stable: dict[int, float] = {}
    for case in track(cases, "processes", console=console, transient=True):
        peak_mb = memories.peak_in_fresh_process(case) / 1e6
        row = {
            "experts": case.experts,
            "routing": case.routing,
            "active_experts": case.active,
            "peak_mb": peak_mb,
            "estimate_mb": case.estimate / 1e6,
            "of_stable": peak_mb / stable.setdefault(case.experts, peak_mb),
        }
        rows.append(row)
    layers.initialize()
    for case, row in zip(cases, rows, strict=True):
        if case.routing == memories.CHUNKED:
            row["time_of_at_once"] = memories.time_ratio(case, rounds=rounds, console=console)
    columns = {
        "E": ("experts", ""),
        "routing": ("routing", ""),
        "active": ("active_experts", ""),
        "peak MB": ("peak_mb", ".1f"),
        "estimate MB": ("estimate_mb", ".1f"),
        "/ stable": ("of_stable", ".2f"),
        "time / at once": ("time_of_at_once", ".2f"),
    }
    table = Table(title=f"One layer, forward + backward: T={tokens} H={hidden} F={ffn} k={topk}")
    for column in columns:
        table.add_column(column, justify="left" if column == "routing" else "right")
    for row in rows:
        table.add_row(
            *(format(row[key], form) if key in row else "" for key, form in columns.values())
        )
    console.print(table)
    settings = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "topk": topk, "rounds": rounds}
    save({"settings": settings, "rows": rows}, json_path)


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
