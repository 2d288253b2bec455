"""Any model as transformers loads it: as it is, or exported for the time of its use."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import remoe.hf  # noqa: F401, registers the model with transformers
from megatron.remoe.convert.export import export
from megatron.remoe.convert.source import HFSource, MegatronSource, open_source
from megatron.remoe.convert.tokenizer import TokenizerFiles


@contextmanager
def exported(source: MegatronSource | HFSource) -> Iterator[Path]:
    """The Hugging Face folder of a model; that of a checkpoint, or one with another tokenizer than
    the folder's own, is temporary.

    Raises:
        ValueError: a weight that is NaN or infinite.
    """
    if isinstance(source, HFSource):
        for item in source.items:
            source.hf_tensors(item)  # checks them
        if source.chosen_tokenizer is None:
            yield source.path
            return
        with tempfile.TemporaryDirectory() as scratch:  # the model's files, and other tokens
            for file in source.path.absolute().iterdir():
                if file.name == "config.json" or "safetensors" in file.name:
                    (Path(scratch) / file.name).symlink_to(file)
            TokenizerFiles.chosen(source.chosen_tokenizer).write(Path(scratch))
            yield Path(scratch)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export(source, folder)
        yield folder


@contextmanager
def exported_with_tokenizer(path: Path, tokenizer: Path | None = None) -> Iterator[Path]:
    """`exported` for a model with a tokenizer, its own or the one that is given.

    Raises:
        ValueError: no model there, or no tokenizer.
    """
    source = open_source(path, tokenizer)
    if source.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer; name one (--tokenizer PATH)")
    with exported(source) as folder:
        yield folder


def load(folder: Path, dtype: torch.dtype | None = torch.float32) -> Any:
    """The model of a Hugging Face folder, on the CPU; None is the dtype of its weights."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False
    )
    return model.eval()


def check_vocabulary(tokens: torch.Tensor, model: Any) -> None:
    """Whether all tokens are of the model's vocabulary.

    Raises:
        ValueError: they are not.
    """
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= model.config.vocab_size:
        raise ValueError(
            f"the data has token {least if least < 0 else largest}, the model's vocabulary has "
            f"{model.config.vocab_size} entries; tokenize with the model's tokenizer"
        )
