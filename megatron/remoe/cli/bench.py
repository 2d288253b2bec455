"""The commands `remoe bench ...`: alternatives timed side by side."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron.remoe.cli.common import AtLeastOne, AtLeastOneOrNone, command

app = typer.Typer(
    help="Measure the time and memory of a layer, its parts, a training step and generation.",
    no_args_is_help=True,
)

Numbers = Annotated[list[int] | None, typer.Argument()]
Json = Annotated[Path | None, typer.Option("--json")]


@command(app)
def layer(
    more_experts: Numbers = None,
    tokens: AtLeastOneOrNone = None,
    hidden: AtLeastOneOrNone = None,
    ffn: AtLeastOneOrNone = None,
    experts: list[int] | None = None,
    topk: int = 1,
    soft: bool = False,
    sequence: AtLeastOneOrNone = None,
    dtype: str = "fp32",
    rounds: AtLeastOne = 10,
    json_path: Json = None,
) -> None:
    """Time one layer, forward and backward, at exactly tokens x topk assignments.

    With --soft, time Soft MoE with as many slots as tokens instead.

    Example: remoe bench layer --experts 8 64 --rounds 10

    Args:
        more_experts: Further numbers of experts after the first one of --experts, by default none.
        tokens: The number of tokens of a batch, by default 4096, or 32768 with --soft.
        hidden: The hidden size, by default 512, or 64 with --soft.
        ffn: The width of each expert, by default 2048, or 512 with --soft.
        experts: The numbers of experts, by default 8. All alternatives run at the first number, and
            ReMoE at the others, beside the matrix products of its experts alone.
        soft: Time Soft MoE at every number of experts, and a dense MLP that costs as much.
        sequence: The number of tokens of a sequence, and of the slots of all experts, with --soft,
            by default 512.
        dtype: The type of weights and tokens: fp32 or bf16.
    """
    if soft and topk != 1:
        raise ValueError(f"topk is {topk}, and Soft MoE selects no experts; leave --topk out")
    if sequence is not None and not soft:
        raise ValueError(f"sequence is {sequence}, and only --soft has sequences; leave it out")
    _prepare()
    from megatron.remoe.bench import main

    # Soft MoE needs many tokens for every expert to have some rows, and room for many experts.
    tokens, hidden, ffn = (
        given or default
        for given, default in zip(
            (tokens, hidden, ffn), (32768, 64, 512) if soft else (4096, 512, 2048), strict=True
        )
    )
    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    wanted = [*(experts or []), *(more_experts or [])] or [8]
    timing = main.Timing(rounds, json_path)
    if soft:
        main.soft_layer(sizes, sequence or 512, wanted, dtype, timing)
    else:
        main.layer(sizes, wanted, dtype, timing)


@command(app)
def router(
    tokens: int = 4096,
    hidden: int = 512,
    experts: int = 8,
    topk: int = 1,
    dtype: str = "fp32",
    rounds: AtLeastOne = 30,
    json_path: Json = None,
) -> None:
    """Time router, permutation and combine, and compare the bytes that they move with the fewest.

    Example: remoe bench router --tokens 8192 --experts 64

    Args:
        experts: The number of experts of the layer.
        dtype: The type of weights and tokens: fp32 or bf16.
    """
    _prepare()
    from megatron.remoe.bench import main

    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=1, topk=topk)
    main.router(sizes, experts, dtype, main.Timing(rounds, json_path))


@command(app)
def step(
    layers: int = 2,
    hidden: int = 256,
    ffn: int = 1024,
    sequence: int = 512,
    micro_batch: int = 4,
    experts: list[int] | None = None,
    granularity: list[int] | None = None,
    topk: int = 1,
    recurrence: Literal["none", "gru", "rnn"] = "none",
    recurrent_size: AtLeastOne = 128,
    routing: list[str] | None = None,
    rounds: AtLeastOne = 10,
    json_path: Json = None,
) -> None:
    """Time a training step in Megatron: ReMoE and TopK at equal assignments, and a dense model.

    Example: remoe bench step --experts 8 --experts 32 --granularity 2 --rounds 7

    Args:
        layers: The number of layers of the model.
        sequence: The number of tokens of a sequence.
        micro_batch: The number of sequences of a batch.
        experts: The numbers of experts to time, by default 8.
        granularity: The granularities to time at the first number of experts, by default only 1.
        recurrence: The cell of recurrent routers, which are timed as well, or none.
        recurrent_size: The number of values of their state.
        routing: Other routers to time at the first number of experts, by default none. Their names
            are those of remoe routers.
    """
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
        recurrence=recurrence,
        recurrent_size=recurrent_size,
    )
    main.step(
        model, experts or [8], granularity or [], routing or [], main.Timing(rounds, json_path)
    )


@command(app)
def generate(
    layers: AtLeastOne = 4,
    hidden: AtLeastOne = 512,
    ffn: AtLeastOne = 256,
    experts: AtLeastOne = 64,
    topk: AtLeastOne = 8,
    dtype: str = "fp32",
    rounds: AtLeastOne = 10,
    json_path: Json = None,
) -> None:
    """Time an exported model in transformers: the prefill of 512 tokens, and decoding.

    It is compared with its experts in a loop, and with OLMoE of equal shape.

    Example: remoe bench generate --experts 8 --topk 1 --ffn 1024

    Args:
        layers: The number of layers of the model.
        ffn: The width of each expert.
        experts: The number of experts of a layer.
        dtype: The type of the weights: fp32 or bf16.
    """
    _prepare()
    from megatron.remoe.bench import main
    from megatron.remoe.bench.generate import Model

    model = Model(layers=layers, hidden=hidden, ffn=ffn, experts=experts, topk=topk)
    main.generate(model, dtype, main.Timing(rounds, json_path))


@command(app)
def memory(
    tokens: int = 2048,
    hidden: int = 256,
    ffn: int = 512,
    experts: list[int] | None = None,
    topk: int = 1,
    rounds: AtLeastOne = 3,
    json_path: Json = None,
) -> None:
    """Measure a layer's peak memory in the dense warm-up and later, in chunks and at once.

    The layer in chunks is also timed against the layer that is computed at once.

    Example: remoe bench memory --tokens 4096 --experts 8 --experts 128

    Args:
        experts: The numbers of experts to measure, by default 8, 32 and 128.
    """
    _prepare()
    from megatron.remoe.bench import main

    sizes = main.LayerSizes(tokens=tokens, hidden=hidden, ffn=ffn, topk=topk)
    main.memory(sizes, experts or [8, 32, 128], main.Timing(rounds, json_path))


@command(app)
def roofline(
    configs: Annotated[list[Path] | None, typer.Argument()] = None,
    tokens: AtLeastOneOrNone = None,
    hidden: AtLeastOneOrNone = None,
    ffn: AtLeastOneOrNone = None,
    experts: list[int] | None = None,
    topk: list[int] | None = None,
    dtype: str | None = None,
    json_path: Json = None,
) -> None:
    """Print what a layer's operations move and launch, and the time that GPUs allow for it.

    With configs, print the share of a training step that these operations take instead. No GPU is
    needed, and no time is measured.

    Example: remoe bench roofline --experts 8 --experts 128 --topk 1 --topk 8

    Args:
        configs: The YAML files of runs with ReLU routing, each on one GPU, by default none.
        tokens: The number of tokens of a batch, by default 16384.
        hidden: The hidden size, by default 768.
        ffn: The width of each expert, by default 2048.
        experts: The numbers of experts, by default 8.
        topk: The numbers of active experts per token, on average, by default 1.
        dtype: The type of weights and tokens: bf16, the default, or fp32.
    """
    from megatron.remoe import cpu

    cpu.prepare_megatron()
    from megatron.remoe.bench import main

    sizes = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "experts": experts, "topk": topk,
             "dtype": dtype}  # fmt: skip
    if configs:
        for name, value in sizes.items():
            if value is not None:
                raise ValueError(f"--{name} is given, but the configs have their own; leave it out")
        main.shares(configs, json_path)
        return
    layers = [
        main.LayerSizes(tokens=tokens or 16384, hidden=hidden or 768, ffn=ffn or 2048, topk=k)
        for k in topk or [1]
    ]
    main.roofline(layers, experts or [8], dtype or "bf16", json_path)


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
