"""What the files of commands share: how a command is registered, and the help of common options."""

import copy
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ParameterInfo

from megatron.remoe.run import examples

AtLeastOne = Annotated[int, typer.Option(min=1)]
AtLeastOneOrNone = Annotated[int | None, typer.Option(min=1)]
Words = Annotated[list[str] | None, typer.Argument()]
ConfigFile = Annotated[Path, typer.Argument(callback=examples.config_file)]

# The help of options that mean the same in several commands, which docstrings leave out.
_COMMON = {
    "config": "The YAML file of Megatron's flags that describes the run.",
    "overrides": "Flags that replace those of the file, each written as key=value.",
    "nodes": "The number of machines that share a run.",
    "gpus_per_node": "The number of GPUs of each machine, with a process for each.",
    "force": "Replace what is in the output folder already.",
    "model": "A run directory, a checkpoint or a Hugging Face folder.",
    "tokenizer": "The folder of the tokenizer, or its tokenizer.json; by default the model's own.",
    "active_experts": (
        "The mean number of active experts per token to keep, for routers with ReLU gates and "
        "TopK: smaller gates than a threshold are switched off. By default the model's own budget "
        "stays."
    ),
    "calibrate_on": (
        "The text on which the threshold of --active-experts is found: a folder of token files, "
        "one of them without its suffix, or a text file. By default it is the validation files of "
        "a run; a model that is no run samples text itself."
    ),
    "license": (
        "The license that the model card names, as the hub writes it: apache-2.0, mit, other. By "
        "default none is claimed."
    ),
    "tensor_parallel": "The number of ranks that share each layer.",
    "pipeline_parallel": "The number of pipeline stages of the model.",
    "expert_parallel": "The number of ranks that share the experts.",
    "padded_vocab_size": (
        "The number of rows of the embedding with its padding. By default it is the number in the "
        "run that was exported, or else the next multiple of 128."
    ),
    "tokens": "The number of tokens of a batch.",
    "hidden": "The hidden size of the model.",
    "ffn": "The width of each expert, before granularity.",
    "topk": "The number of active experts per token, on average.",
    "rounds": "The number of measured rounds, after two that are not counted.",
    "json_path": "The JSON file to which the results are written, by default none.",
}


def command[F: Callable[..., None]](app: typer.Typer, name: str | None = None) -> Callable[[F], F]:
    """Register a function as a command whose help is the function's docstring.

    The docstring says what the command does, gives an example after `Example:`, and describes the
    options under `Args:`. A parameter without a default is an argument, and one whose default is
    False is a switch, unless its annotation says otherwise.

    Args:
        app: The group of the command.
        name: The command's name, if it is not the function's.
    """

    def register(function: F) -> F:
        text, _, options = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
        text, _, example = text.partition("\n\nExample: ")
        described = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", options, re.MULTILINE)
        told = _COMMON | {key: " ".join(words.split()) for key, words in described}
        for key, parameter in inspect.signature(function).parameters.items():
            info = copy.copy(_info(key, parameter))
            info.help = told[key]
            kind = parameter.annotation
            plain = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
            function.__annotations__[key] = Annotated[plain, info]
        app.command(name, help=text, epilog=f"Example: {example}")(function)
        return function

    return register


def _info(name: str, parameter: inspect.Parameter) -> ParameterInfo:
    """Return what typer knows of a parameter, from its annotation or else from its default."""
    for one in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(one, ParameterInfo):
            return one
    info: Any = typer.Option()
    if parameter.default is parameter.empty:
        info = typer.Argument()
    elif parameter.default is False:  # Otherwise typer would add --no-NAME.
        info = typer.Option(f"--{name.replace('_', '-')}")
    assert isinstance(info, ParameterInfo)
    return info


def prepare() -> None:
    """Prepare Megatron as for training, and silence transformers and checkpoint loading."""
    from transformers.utils import logging as transformers_logging

    from megatron.remoe import cpu

    cpu.prepare_megatron()
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
