"""Options that several commands share, and what they do before they begin."""

import logging
from pathlib import Path
from typing import Annotated

import typer

# What `dtype` of a command may be, for the help texts.
DTYPES = "fp32, bf16 or fp16"

Config = Annotated[
    Path, typer.Argument(help="The YAML file of Megatron's flags that describes the run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Flags that replace those of the file, each written as key=value."),
]
Nodes = Annotated[int, typer.Option(min=1, help="The number of machines that share each run.")]
GPUsPerNode = Annotated[int, typer.Option(min=1, help="The number of GPUs of each machine.")]
ForceRun = Annotated[
    bool,
    typer.Option(
        "--force", help="Continue the run in the run directory although its settings differ."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what is in the output folder already.")
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="The tokenizer, as a folder or a tokenizer.json.", show_default="the model's own"
    ),
]
TensorParallel = Annotated[
    int, typer.Option(help="The number of ranks that share each layer (tensor parallelism).")
]
PipelineParallel = Annotated[
    int, typer.Option(help="The number of stages of the model (pipeline parallelism).")
]
ExpertParallel = Annotated[
    int, typer.Option(help="The number of ranks that share the experts (expert parallelism).")
]
PaddedVocabSize = Annotated[
    int | None,
    typer.Option(
        help="The number of rows of the embedding, padding included.",
        show_default="as before, or the next multiple of 128",
    ),
]


def example(line: str) -> str:
    """Return the end of a command's help, which shows how the command is used.

    Args:
        line: What a user types after `remoe`.
    """
    return f"Example: remoe {line}"


def prepare() -> None:
    """Prepare Megatron as for training, and silence transformers and checkpoint loading."""
    from transformers.utils import logging as transformers_logging

    from megatron.remoe import cpu

    cpu.prepare_megatron()
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
