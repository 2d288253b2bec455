"""A budget of active experts for a command: calibrated on text, or the one that a model has."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.architecture import BUDGET
from megatron.remoe.convert.exported import check_vocabulary, continue_tokens, load_source
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.evaluate.perplexity import DEFAULT_SEED, default_length, find_domains
from megatron.remoe.evaluate.text import read_text, validation_files
from megatron.remoe.files import read_json_object
from remoe.hf.budget_remoe import UnreachableBudget, check_budget

TOKENS = 8192  # of the text: the mean over them has a standard error of about 1%
_SAMPLED = 2048  # of them if the model samples the text, one after the other
_SAMPLE_LENGTH = 256
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

    The text is `calibrate_on`, or else the validation files of a run, or a sample from the model.
    It is never a prompt: every prompt would be routed by another threshold.

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
    read = None
    if calibrate_on is not None or isinstance(source, MegatronSource):
        read = _text(source, calibrate_on)
    model = load_source(source, dtype)
    if not hasattr(model, "set_budget"):
        raise ValueError(f"{path} is a dense model; leave --active-experts out")
    check_budget(model.config, active_experts)
    named, ids = read or ("text that the model has sampled", sampled(model, _SAMPLED))
    check_vocabulary(ids, model.config.vocab_size)
    try:
        found = model.set_budget(active_experts, ids)
    except UnreachableBudget as error:
        raise UnreachableBudget(f"{error} ({named}; {_OPTION} names other text)") from None
    values = found.value if isinstance(found.value, list) else [found.value]
    thresholds = f"a gate threshold of {values[0]:.4g} leaves"
    if len(values) > 1:
        listed = ", ".join(f"{value:.4g}" for value in values)
        thresholds = f"gate thresholds of {listed} leave"
    fields = {name: getattr(model.config, name) for name in BUDGET[:2]}
    return Chosen(
        fields,
        f"budget: {thresholds} {found.active_experts:.3f} of "
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
        assert isinstance(source, MegatronSource)
        named, domains = validation_files(source.args, _OPTION)
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


def sampled(model: Any, tokens: int) -> Tensor:
    """Return documents that a model samples, int64 `[N, S]`, from the end of the one before.

    Samples go on after the end of a document, as the sequences of training do. The seed is always
    the same, so that a model samples the same on a device.

    Args:
        model: a model for transformers.
        tokens: the number of tokens, which is divided into sequences of the same length.

    Raises:
        ValueError: the model names no token at which documents end.
    """
    start = model.config.eos_token_id
    if not isinstance(start, int) or not 0 <= start < model.config.vocab_size:
        raise ValueError(
            f"the model is no run, so that it names no text, and its eos_token_id is {start}, no "
            f"token at which it could begin to sample one; name token files ({_OPTION})"
        )
    length = min(_SAMPLE_LENGTH, model.config.max_position_embeddings)
    first = torch.full((math.ceil(tokens / length), 1), start, device=model.device)
    # A generation_config.json may have other values.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(DEFAULT_SEED)
        return continue_tokens(model, first, length - 1, **sampling).cpu()
