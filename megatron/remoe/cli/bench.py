"""`remoe bench`: alternatives timed side by side."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Time alternatives side by side.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="Measured rounds, after two to warm up.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results as JSON.")]
Dtype = Annotated[str, typer.Option(help="fp32 or bf16.")]


@app.command()
def layer(
    tokens: int = 4096,
    hidden: int = 512,
    ffn: Annotated[int, typer.Option(help="Width of an expert.")] = 2048,
    experts: Annotated[
        list[int] | None,
        typer.Option(help="Numbers of experts, 8 if none: all at the first, ReMoE at the others."),
    ] = None,
    topk: int = 1,
    dtype: Dtype = "fp32",
    rounds: Rounds = 10,
    json_path: Json = None,
) -> None:
    """One layer, forward and backward, at exactly tokens x topk assignments of ReLU routing."""
    from megatron.remoe.bench import main

    _prepare()
    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    main.layer(sizes, experts or [8], dtype, main.Timing(rounds, json_path))


@app.command()
def router(
    tokens: int = 4096,
    hidden: int = 512,
    experts: int = 8,
    topk: int = 1,
    dtype: Dtype = "fp32",
    rounds: Rounds = 30,
    json_path: Json = None,
) -> None:
    """Router, permutation and combine alone: time, and bytes against the fewest possible."""
    from megatron.remoe.bench import main

    _prepare()
    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=1, topk=topk)
    main.router(sizes, experts, dtype, main.Timing(rounds, json_path))


@app.command()
def step(
    layers: int = 2,
    hidden: int = 256,
    ffn: Annotated[int, typer.Option(help="Width of an expert at granularity 1.")] = 1024,
    sequence: int = 512,
    micro_batch: int = 4,
    experts: Annotated[
        list[int] | None, typer.Option(help="Numbers of experts, 8 if none.")
    ] = None,
    granularity: Annotated[list[int] | None, typer.Option(help="At the first of these.")] = None,
    topk: int = 1,
    rounds: Rounds = 10,
    json_path: Json = None,
) -> None:
    """A training step in Megatron: ReMoE and TopK at equal assignments, and dense."""
    from megatron.remoe.bench import main
    from megatron.remoe.bench.step import Model

    _prepare()
    model = Model(layers, hidden, ffn, sequence, micro_batch, topk)
    main.step(model, experts or [8], granularity or [], main.Timing(rounds, json_path))


@app.command()
def memory(
    tokens: int = 2048,
    hidden: int = 256,
    ffn: Annotated[int, typer.Option(help="Width of an expert.")] = 512,
    experts: Annotated[
        list[int] | None, typer.Option(help="Numbers of experts, 8, 32 and 128 if none.")
    ] = None,
    topk: int = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Of the comparison of times.")] = 3,
    json_path: Json = None,
) -> None:
    """One layer's peak memory at warm-up and stable density, chunked and at once, and the time."""
    from megatron.remoe.bench import main

    _prepare()
    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    main.memory(sizes, experts or [8, 32, 128], main.Timing(rounds, json_path))


def _prepare() -> None:
    """Run with the environment of training, which torch reads when it starts."""
    from megatron.remoe import cpu
    from megatron.remoe.run.launch import cpu_environment

    missing = {k: v for k, v in cpu_environment(1).items() if k not in os.environ}
    if missing:
        os.environ |= missing
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    cpu.prepare_megatron()
    logging.disable(logging.WARNING)
