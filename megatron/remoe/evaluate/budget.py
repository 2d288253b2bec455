"""A budget of active experts for a command: calibrated on text, or the one that a model has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.architecture import BUDGET
from megatron.remoe.convert.exported import check_vocabulary, load_source
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.evaluate.perplexity import DEFAULT_SEED, default_length, find_domains
from megatron.remoe.evaluate.text import read_text, validation_files
from megatron.remoe.files import read_json_object

TOKENS = 8192  # of the text: the mean over them has a standard error of about 1%
_OPTION = "--calibrate-on"


@dataclass(frozen=True)
class Chosen:
    """The budget of a command.

    Attributes:
        fields: fields of the config that replace the model's own; empty if those stay.
        said: what to tell the user; empty if the model has no budget.
    """

    fields: dict[str, Any]
    said: str


def choose(
    path: Path,
    active_experts: float | None,
    calibrate_on: Path | None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> Chosen:
    """Calibrate a budget on text; without a number, keep the model's own.

    The text is `calibrate_on`, or else the validation files of the run, and never a prompt, with
    which the same command would route every prompt by another threshold.

    Args:
        path: Hugging Face folder, run or checkpoint.
        active_experts: mean number of active experts per token; None keeps the model's budget.
        calibrate_on: folder of token files, one of them without its suffix, or a file of text.
        dtype: dtype of the model; None is that of its weights.
        tokenizer: tokenizer to use in place of the model's own.

    Raises:
        ValueError: there is no text, too little of it, or the model cannot have the budget.
    """
    if active_experts is None:
        if calibrate_on is not None:
            raise ValueError(
                f"{_OPTION} is {calibrate_on}, but there is nothing to calibrate; give a number of "
                f"experts (--active-experts), or leave it out"
            )
        return Chosen({}, _own(path))
    source = open_source(path, tokenizer)
    named, ids = _text(source, calibrate_on)
    model = load_source(source, dtype)
    check_vocabulary(ids, model.config.vocab_size)
    if not hasattr(model, "set_budget"):
        raise ValueError(f"{path} is a dense model; leave --active-experts out")
    found = model.set_budget(active_experts, ids)
    fields = {name: getattr(model.config, name) for name in BUDGET[:2]}
    return Chosen(
        fields,
        f"budget: a gate threshold of {found.value:.4g} leaves {found.active_experts:.3f} of "
        f"{found.before:.3f} active experts per token ({found.tokens} tokens of {named})",
    )


def _own(path: Path) -> str:
    """Say which budget a model has; one in a checkpoint of Megatron has none."""
    file = path / "config.json"
    config = read_json_object(file, "copy it again") if file.is_file() else {}
    stored = [f"{name} {config[name]}" for name in BUDGET if config.get(name) is not None]
    return f"budget: the model's own, {', '.join(stored)}" if stored else ""


def _text(source: MegatronSource | HFSource, given: Path | None) -> tuple[str, Tensor]:
    """Return the name of the text, and its ids `[N, S]`."""
    length = default_length(source.config)
    if given is not None and given.is_file() and given.suffix not in (".bin", ".idx"):
        return str(given), _ids_of_file(source, given, length)
    if given is not None:
        named, domains = str(given), find_domains(given, source.tokenizer)
    else:
        args = source.args if isinstance(source, MegatronSource) else None
        named, domains = validation_files(args, _OPTION)
    tokens = max(TOKENS, length * len(domains))
    return named, read_text(named, domains, length=length, tokens=tokens, seed=DEFAULT_SEED).inputs


def _ids_of_file(source: MegatronSource | HFSource, file: Path, length: int) -> Tensor:
    if source.tokenizer is None:
        raise ValueError(f"the model has no tokenizer to read {file} with; name one (--tokenizer)")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} is no text in UTF-8; name such a file or token files ({_OPTION})"
        ) from None
    ids = torch.tensor(source.tokenizer.encode(text)[:TOKENS], dtype=torch.int64)
    if not len(ids):
        raise ValueError(f"{file} has no text to calibrate on; name another file ({_OPTION})")
    length = min(length, max(1, len(ids)))
    return ids[: len(ids) // length * length].view(-1, length)
