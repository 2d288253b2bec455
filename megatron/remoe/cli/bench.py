"""The commands `remoe bench ...`: alternatives timed side by side."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import example

app = typer.Typer(help="Time alternatives side by side.", no_args_is_help=True)

Tokens = Annotated[int, typer.Option(help="The number of tokens in a batch.")]
Hidden = Annotated[int, typer.Option(help="The hidden size of the model.")]
Width = Annotated[int, typer.Option(help="The width of each expert, before granularity.")]
TopK = Annotated[int, typer.Option(help="The number of active experts per token, on average.")]
Rounds = Annotated[
    int, typer.Option(min=1, help="The number of measured rounds, after two that are not counted.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="The JSON file to which the results are written.",
        show_default="no file is written",
    ),
]
Dtype = Annotated[str, typer.Option(help="The type of weights and tokens: fp32 or bf16.")]


@app.command(epilog=example("bench layer --experts 8 --experts 64 --rounds 10"))
def layer(
    tokens: Tokens = 4096,
    hidden: Hidden = 512,
    ffn: Width = 2048,
    experts: Annotated[
        list[int] | None,
        typer.Option(
            help="The numbers of experts. All alternatives run at the first, ReMoE at the others.",
            show_default="8",
        ),
    ] = None,
    topk: TopK = 1,
    dtype: Dtype = "fp32",
    rounds: Rounds = 10,
    json_path: Json = None,
) -> None:
    """Time one layer, forward and backward, at exactly tokens x topk assignments."""
    _prepare()
    from megatron.remoe.bench import main

    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    main.layer(sizes, experts or [8], dtype, main.Timing(rounds, json_path))


@app.command(epilog=example("bench router --tokens 8192 --experts 64"))
def router(
    tokens: Tokens = 4096,
    hidden: Hidden = 512,
    experts: Annotated[int, typer.Option(help="The number of experts.")] = 8,
    topk: TopK = 1,
    dtype: Dtype = "fp32",
    rounds: Rounds = 30,
    json_path: Json = None,
) -> None:
    """Time router, permutation and combine alone, and compare bytes with the fewest possible."""
    _prepare()
    from megatron.remoe.bench import main

    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=1, topk=topk)
    main.router(sizes, experts, dtype, main.Timing(rounds, json_path))


@app.command(epilog=example("bench step --experts 8 --experts 32 --granularity 2 --rounds 7"))
def step(
    layers: Annotated[int, typer.Option(help="The number of layers of the model.")] = 2,
    hidden: Hidden = 256,
    ffn: Width = 1024,
    sequence: Annotated[int, typer.Option(help="The number of tokens of a sequence.")] = 512,
    micro_batch: Annotated[int, typer.Option(help="The number of sequences of a batch.")] = 4,
    experts: Annotated[
        list[int] | None, typer.Option(help="The numbers of experts to time.", show_default="8")
    ] = None,
    granularity: Annotated[
        list[int] | None,
        typer.Option(
            help="The granularities to time as well, at the first number of experts.",
            show_default="none",
        ),
    ] = None,
    topk: TopK = 1,
    rounds: Rounds = 10,
    json_path: Json = None,
) -> None:
    """Time a training step in Megatron: ReMoE and TopK at equal assignments, and a dense model."""
    _prepare()
    from megatron.remoe.bench import main
    from megatron.remoe.bench.step import Model

    model = Model(
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        sequence=sequence,
        micro_batch=micro_batch,
        topk=topk,
    )
    main.step(model, experts or [8], granularity or [], main.Timing(rounds, json_path))


@app.command(epilog=example("bench memory --tokens 4096 --experts 8 --experts 128"))
def memory(
    tokens: Tokens = 2048,
    hidden: Hidden = 256,
    ffn: Width = 512,
    experts: Annotated[
        list[int] | None,
        typer.Option(help="The numbers of experts to measure.", show_default="8, 32 and 128"),
    ] = None,
    topk: TopK = 1,
    rounds: Rounds = 3,
    json_path: Json = None,
) -> None:
    """Measure one layer's peak memory at warm-up and stable density, chunked and at once.

    The time of the chunked layer is compared with the time of the other one.
    """
    _prepare()
    from megatron.remoe.bench import main

    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    main.memory(sizes, experts or [8, 32, 128], main.Timing(rounds, json_path))


def _prepare() -> None:
    """Run with the environment of training, which torch reads when it starts."""
    from megatron.remoe import cpu
    from megatron.remoe.run.torchrun import cpu_environment

    missing = {k: v for k, v in cpu_environment(1).items() if k not in os.environ}
    if missing:
        os.environ |= missing
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    cpu.prepare_megatron()
    logging.disable(logging.WARNING)
