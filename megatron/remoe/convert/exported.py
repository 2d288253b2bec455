"""Any model as transformers loads it: a Hugging Face folder as it is, or a temporary export."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import remoe.hf  # noqa: F401, registers the model with transformers
from megatron.remoe.convert.export import export
from megatron.remoe.convert.hf_source import HFSource, check_finite, validated
from megatron.remoe.convert.source import MegatronSource, open_source


@contextmanager
def exported(source: MegatronSource | HFSource) -> Iterator[Path]:
    """Yield the Hugging Face folder of a model, to be loaded with `load`.

    The folder is temporary for a checkpoint, and for a model with another tokenizer than its own.
    """
    if isinstance(source, HFSource) and source.chosen_tokenizer is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if isinstance(source, MegatronSource):
            export(source, folder)
        else:  # the model's own files, and the other tokenizer
            folder.mkdir()
            for file in source.path.absolute().iterdir():
                if file.name == "config.json" or "safetensors" in file.name:
                    (folder / file.name).symlink_to(file)
            if source.tokenizer is not None:
                source.tokenizer.write(folder)
        yield folder


@contextmanager
def exported_with_tokenizer(
    path: Path, tokenizer: Path | None = None, *, check: bool = False
) -> Iterator[Path]:
    """Yield the Hugging Face folder of a model that has a tokenizer, or is given one.

    Args:
        path: any model.
        tokenizer: a tokenizer to use in place of the model's own.
        check: whether to check the weights here, for callers that do not use `load`.

    Raises:
        ValueError: there is no model or no tokenizer, or a weight is NaN or infinite.
    """
    source = open_source(path, tokenizer)
    if source.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; name one (--tokenizer PATH)")
    if check and isinstance(source, HFSource):  # an export checks all weights anyway
        for item in source.items:
            source.hf_tensors(item)
    with exported(source) as folder:
        yield folder


@contextmanager
def with_budget(folder: Path, budget: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yield the Hugging Face folder of a model with fields of its config replaced, or itself."""
    if not budget:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for file in folder.absolute().iterdir():
            if file.name != "config.json":
                (copy / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text()) | dict(budget)
        config["format_version"] = validated(config)["format_version"]
        (copy / "config.json").write_text(json.dumps(config))
        yield copy


def load(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    budget: Mapping[str, Any] | None = None,
) -> Any:
    """Load the model of a Hugging Face folder on the CPU; None is the dtype of its weights.

    Fields in `budget` replace those of the model's config.

    Raises:
        ValueError: the files are damaged or of another model, or a weight is NaN or infinite.
    """
    model = from_files(folder, dtype)
    for name, weight in model.named_parameters():
        check_finite(f"{name} of {folder}", weight)
    for name, value in (budget or {}).items():
        setattr(model.config, name, value)
    return model.eval()


def from_files(folder: Path, dtype: torch.dtype | None) -> Any:
    """Load a model of transformers on the CPU, all of whose weights must be in its files.

    transformers itself gives random values to those that are missing, with a warning.

    Raises:
        ValueError: the files cannot be read, or are of another model.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged file, or one of another model
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}: {reason}; copy it again") from error
    model, found = loaded
    for what in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, found[f"{what}_keys"])):
            raise ValueError(
                f"{folder} has {len(names)} {what} weights, such as {names[0]}; its config.json "
                f"and its weights must be of one model, so copy it again"
            )
    return model


def load_source(
    source: MegatronSource | HFSource,
    dtype: torch.dtype | None = torch.float32,
    budget: Mapping[str, Any] | None = None,
) -> Any:
    """Load an open model as `load` does, on the GPU if there is one.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    with exported(source) as folder:
        return on_device(load(folder, dtype, budget))


def on_device(model: Any) -> Any:
    """Return a model on the GPU if there is one, and otherwise as it is on the CPU."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def continue_tokens(model: Any, tokens: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Generate `count` tokens after `tokens`, `[sequences, length]`, whatever they are."""
    whole: torch.Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        **sampling,
    )
    return whole


def check_vocabulary(tokens: torch.Tensor, vocab_size: int, data: str = "the data") -> None:
    """Check that all tokens are in a model's vocabulary; an error names the data.

    Raises:
        ValueError: they are not.
    """
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= vocab_size:
        raise ValueError(
            f"{data} has token {least if least < 0 else largest}, the model's vocabulary has "
            f"{vocab_size} entries; tokenize with the model's tokenizer"
        )
