"""The benchmarks of `remoe bench ...`: what to compare, and what to print."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron.remoe import cpu
from megatron.remoe.analysis.gpus import GPUS
from megatron.remoe.bench import generate as generation
from megatron.remoe.bench import layer as layers
from megatron.remoe.bench import memory as memories
from megatron.remoe.bench import parts
from megatron.remoe.bench import step as steps
from megatron.remoe.bench.roofline import Roofline, share
from megatron.remoe.bench.timing import Measured, measure, report, save
from megatron.remoe.options import router_name
from megatron.remoe.run.config import load_config
from megatron.remoe.run.describe import describe

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Columns of `remoe bench memory`: the key of a row, and the format of its value.
_MEMORY_COLUMNS = {
    "E": ("experts", ""),
    "routing": ("routing", ""),
    "active": ("active_experts", ""),
    "peak MB": ("peak_mb", ".1f"),
    "estimate MB": ("estimate_mb", ".1f"),
    "/ stable": ("of_stable", ".2f"),
    "time / at once": ("time_of_at_once", ".2f"),
}


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of one layer and its batch.

    Attributes:
        tokens: Number of tokens.
        hidden: Hidden size.
        ffn: Width of an expert.
        topk: Number of active experts per token, on average.
    """

    tokens: int
    hidden: int
    ffn: int
    topk: int

    def check(self, experts: int) -> None:
        """Refuse a number of experts of which topk cannot be active, with a ValueError."""
        if not 1 <= self.topk <= experts:
            raise ValueError(
                f"topk is {self.topk} of {experts} experts; choose it between 1 and experts"
            )

    def shape(self, experts: int, dtype: str) -> layers.Shape:
        """Return the layer with a number of experts and a dtype by its short name.

        Raises:
            ValueError: The dtype is unknown.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
        device = "cuda" if cpu.has_gpu() else "cpu"
        return layers.Shape(
            self.tokens, self.hidden, self.ffn, experts, self.topk, _DTYPES[dtype], device
        )


@dataclass(frozen=True)
class Timing:
    """How often alternatives are timed, and where the result goes.

    Attributes:
        rounds: Number of measured rounds.
        json_path: The JSON file for the result, or None.
    """

    rounds: int
    json_path: Path | None


def layer(sizes: LayerSizes, experts: list[int], dtype: str, timing: Timing) -> None:
    """Time every alternative at the first number of experts, and ReMoE at the others.

    The matrix products of ReMoE alone are a bound, which shows what is left to win.
    """
    console = Console()
    shapes = [sizes.shape(e, dtype) for e in experts]
    layers.initialize()
    found = layers.alternatives(shapes[0])
    for shape in shapes[1:]:
        found += [layers.remoe_layer(shape), layers.matrix_products(shape)]
    for shape in shapes:
        console.print(f"E={shape.num_experts}: {layers.assignments(shape)}", highlight=False)
    rows = measure(found, rounds=timing.rounds, baseline=layers.DENSE, console=console)
    settings = asdict(sizes) | {"experts": experts, "dtype": dtype, "rounds": timing.rounds,
                                "routing": [layers.assignments(s) for s in shapes]}  # fmt: skip
    title = (f"One MoE layer, forward + backward: T={sizes.tokens} H={sizes.hidden} F={sizes.ffn} "
             f"k={sizes.topk} {dtype}")  # fmt: skip
    report(rows, title=title, baseline="dense", settings=settings, console=console,
           json_path=timing.json_path)  # fmt: skip
    _growth(rows, [f"ReMoE, E={e}" for e in experts], console)
    _growth(rows, [layers.products_name(e) for e in experts], console)


def soft_layer(
    sizes: LayerSizes, sequence: int, experts: list[int], dtype: str, timing: Timing
) -> None:
    """Time Soft MoE at every number of experts against a dense MLP that costs as much."""
    console = Console()
    found = layers.soft_alternatives([sizes.shape(e, dtype) for e in experts], sequence)
    rows = measure(found, rounds=timing.rounds, baseline=layers.DENSE, console=console)
    settings = asdict(sizes) | {"sequence": sequence, "experts": experts, "dtype": dtype,
                                "rounds": timing.rounds}  # fmt: skip
    title = (f"Soft MoE with as many slots as tokens, forward + backward: T={sizes.tokens} "
             f"sequence={sequence} H={sizes.hidden} F={sizes.ffn} {dtype}")  # fmt: skip
    report(rows, title=title, baseline="dense", settings=settings, console=console,
           json_path=timing.json_path)  # fmt: skip
    _growth(rows, [layers.soft_name(e) for e in experts], console)


def router(sizes: LayerSizes, experts: int, dtype: str, timing: Timing) -> None:
    """Time the parts around the experts."""
    console = Console()
    found = parts.alternatives(sizes.shape(experts, dtype))
    rows = measure(found, rounds=timing.rounds, baseline=parts.COPY, console=console)
    settings = {"tokens": sizes.tokens, "hidden": sizes.hidden, "experts": experts,
                "topk": sizes.topk, "dtype": dtype, "rounds": timing.rounds}  # fmt: skip
    title = (f"Around the experts, forward + backward: T={sizes.tokens} H={sizes.hidden} "
             f"E={experts} k={sizes.topk}")  # fmt: skip
    report(rows, title=title, baseline="copy", settings=settings, console=console,
           json_path=timing.json_path)  # fmt: skip


def step(
    model: steps.Model,
    experts: list[int],
    granularities: list[int],
    routings: list[str],
    timing: Timing,
) -> None:
    """Time training steps, and print how their time grows with experts and granularity."""
    console = Console()
    layers.initialize()
    found = steps.alternatives(model, experts, granularities, routings)
    rows = measure(found, rounds=timing.rounds, baseline=steps.DENSE, console=console)
    settings = model.config() | {
        "experts": experts, "granularities": granularities, "routings": routings
    }  # fmt: skip
    title = (f"A training step: L={model.layers} H={model.hidden_size} F={model.ffn_hidden_size} "
             f"T={model.sequence * model.micro_batch} k={model.topk}")  # fmt: skip
    report(rows, title=title, baseline="dense", settings=settings, console=console,
           json_path=timing.json_path)  # fmt: skip
    times = {row.name: row.ratio for row in rows}
    for name, ratio in times.items():
        if name.startswith("ReMoE"):
            relative = ratio / times[name.replace("ReMoE", "TopK")]
            console.print(f"{name}: {relative:.3f} of the time of TopK", highlight=False)
        if f" {model.recurrence} " in name:
            relative = ratio / times[name.replace(f" {model.recurrence} ", " ")]
            console.print(f"{name}: {relative:.3f} of the time without it", highlight=False)
        if name.split()[0] in routings:
            relative = ratio / times[f"TopK E={experts[0]}"]
            console.print(f"{name}: {relative:.3f} of the time of TopK", highlight=False)
    _growth(rows, [f"ReMoE E={e}" for e in experts], console)


def generate(model: generation.Model, dtype: str, timing: Timing) -> None:
    """Time prefill and decoding in transformers, relative to experts in a loop."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if not 1 <= model.topk <= model.experts:
        raise ValueError(
            f"topk is {model.topk} of {model.experts} experts; choose it between 1 and experts"
        )
    if model.hidden % (2 * model.heads):
        raise ValueError(
            f"hidden is {model.hidden}; it must be a multiple of {2 * model.heads}, for "
            f"{model.heads} heads"
        )
    console, rows = Console(), []
    device = "cuda" if cpu.has_gpu() else "cpu"
    for case, found in generation.cases(model, _DTYPES[dtype], device).items():
        measured = measure(found, rounds=timing.rounds, baseline=generation.LOOP, console=console)
        title = (f"{case}: L={model.layers} H={model.hidden} F={model.ffn} E={model.experts} "
                 f"k={model.topk} {dtype}")  # fmt: skip
        report(measured, title=title, baseline="loop", settings={}, console=console,
               json_path=None)  # fmt: skip
        times = {row.name: row.ratio for row in measured}
        for name in times:
            if name.startswith("OLMoE"):
                relative = times[generation.OURS] / times[name]
                console.print(f"ReMoE: {relative:.3f} of the time of {name}", highlight=False)
        rows += [asdict(row) | {"case": case} for row in measured]
    settings = asdict(model) | {"dtype": dtype, "rounds": timing.rounds}
    save({"settings": settings, "rows": rows}, timing.json_path)


def memory(sizes: LayerSizes, experts: list[int], timing: Timing) -> None:
    """Measure the peak memory of the stages by number of experts, and what chunks cost in time."""
    console = Console()
    for e in experts:
        sizes.check(e)
    cases = memories.cases(sizes.tokens, sizes.hidden, sizes.ffn, experts, sizes.topk)
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
            row["time_of_at_once"] = memories.time_ratio(
                case, rounds=timing.rounds, console=console
            )
    title = (f"One layer, forward + backward: T={sizes.tokens} H={sizes.hidden} F={sizes.ffn} "
             f"k={sizes.topk}")  # fmt: skip
    table = Table(title=title)
    for column in _MEMORY_COLUMNS:
        table.add_column(column, justify="left" if column == "routing" else "right")
    for row in rows:
        columns = _MEMORY_COLUMNS.values()
        table.add_row(*(format(row[key], form) if key in row else "" for key, form in columns))
    console.print(table)
    settings = asdict(sizes) | {"rounds": timing.rounds}
    save({"settings": settings, "rows": rows}, timing.json_path)


def roofline(
    sizes: list[LayerSizes], experts: list[int], dtype: str, json_path: Path | None
) -> None:
    """Print the roofline of every layer, and what moves beyond it."""
    console, records = Console(), []
    for layer in sizes:
        for e in experts:
            layer.check(e)
            rows = _roofline_rows(Roofline.of(layer.shape(e, dtype)))
            title = (f"Roofline of one layer: T={layer.tokens} H={layer.hidden} F={layer.ffn} "
                     f"E={e} k={layer.topk} {dtype}")  # fmt: skip
            console.print(_table(title, rows))
            records.append(asdict(layer) | {"experts": e, "dtype": dtype, "rows": rows})
    save({"layers": records}, json_path)


def _roofline_rows(found: Roofline) -> list[dict[str, Any]]:
    rows = []
    for name, passes in found.fewest.items():
        for direction, work, in_torch, in_triton in zip(
            ("forward", "backward"), passes, found.in_torch[name], found.in_triton[name],
            strict=True,
        ):  # fmt: skip
            if in_torch.launches:
                rows.append({
                    "": name,
                    "pass": direction,
                    "fewest MB": round(work.bytes / 1e6, 1),
                    "torch MB": round(in_torch.bytes / 1e6, 1),
                    "torch runs": in_torch.launches,
                    "Triton MB": round(in_triton.bytes / 1e6, 1),
                    "Triton runs": in_triton.launches,
                    **{
                        f"{gpu.name.split()[0]} us": round(1e6 * work.seconds(gpu), 1)
                        for gpu in GPUS
                    },
                })  # fmt: skip
    return rows


def shares(configs: list[Path], json_path: Path | None) -> None:
    """Print the share of a step that is ours, for runs with ReLU routing, each on one GPU."""
    rows = []
    for config in configs:
        run = load_config(config)
        router = router_name(run.flags)
        if router != "relu" or run.flags.get("num_experts") is None:
            raise ValueError(
                f"{config} has no ReLU routing, whose operations these are; give one of a run with "
                f"moe_relu_routing"
            )
        found = describe(run, 1)
        for gpu in GPUS:
            part = share(found.size, found.load, gpu)
            rows.append({
                "": f"{config.parent.name}/{config.stem}",
                "GPU": gpu.name.split()[0],
                "model ms": round(1e3 * part.products, 1),
                "fewest ms": round(1e3 * part.fewest, 2),
                "torch ms": round(1e3 * part.in_torch, 2),
                "Triton ms": round(1e3 * part.in_triton, 2),
                "share in torch": f"{part.of_step(part.in_torch):.1%}",
                "in Triton": f"{part.of_step(part.in_triton):.1%}",
                "at the fewest": f"{part.of_step(part.fewest):.1%}",
                "to win": f"{part.to_win:.1%}",
            })  # fmt: skip
    title = "Operations around the experts' products, and the model's products at their peak"
    Console().print(_table(f"{title}, in a micro-batch", rows))
    save({"runs": rows}, json_path)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in rows[0]:
        is_name = column in ("", "pass", "GPU")  # those come first and are not cut
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def _growth(rows: list[Measured], names: list[str], console: Console) -> None:
    ratios = {row.name: row.ratio for row in rows}
    for name in names[1:]:
        growth = ratios[name] / ratios[names[0]]
        console.print(f"{name}: {growth:.3f} of the time of {names[0]}", highlight=False)
