"""The commands `remoe bench ...`: what to compare, and what to print."""

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


def memory(
    tokens: int,
    hidden: int,
    ffn: int,
    experts: list[int],
    topk: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Peak memory of the stages by number of experts, and what chunks cost in time."""
    console = Console()
    for e in experts:
        if not 1 <= topk <= e:
            raise ValueError(f"topk is {topk} of {e} experts; choose it between 1 and experts")
    rows: list[dict[str, Any]] = []
    cases = memories.cases(tokens, hidden, ffn, experts, topk)
    for name, case in track(cases, "processes", console=console, transient=True):
        row: dict[str, Any] = {
            "experts": case.experts,
            "routing": name,
            "active_experts": case.active,
        }
        row["peak_mb"] = memories.peak_in_fresh_process(case) / 1e6
        row["estimate_mb"] = case.estimate / 1e6
        stable = next(r for r in [*rows, row] if r["experts"] == case.experts)
        row["of_stable"] = row["peak_mb"] / stable["peak_mb"]
        rows.append(row)
    layers.initialize()
    for name, case in cases:
        if name == "warm-up, chunked":
            row = next(r for r in rows if (r["experts"], r["routing"]) == (case.experts, name))
            row["time_of_at_once"] = memories.time_ratio(case, rounds=rounds, console=console)
    table = Table(title=f"One layer, forward + backward: T={tokens} H={hidden} F={ffn} k={topk}")
    for column in (
        "E",
        "routing",
        "active",
        "peak MB",
        "estimate MB",
        "/ stable",
        "time / at once",
    ):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for row in rows:
        time = f"{row['time_of_at_once']:.2f}" if "time_of_at_once" in row else ""
        table.add_row(
            str(row["experts"]), row["routing"], str(row["active_experts"]),
            f"{row['peak_mb']:.1f}", f"{row['estimate_mb']:.1f}", f"{row['of_stable']:.2f}", time,
        )  # fmt: skip
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
