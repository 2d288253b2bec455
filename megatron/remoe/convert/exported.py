"""Any model as a Hugging Face folder: as it is, or exported for the time of its use."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import remoe.hf  # noqa: F401, registers the model with transformers
from megatron.remoe.convert.export import to_hf
from megatron.remoe.convert.source import HFSource


@contextmanager
def exported(path: Path, tokenizer: Path | None = None) -> Iterator[Path]:
    """The folder of a model with its tokenizer; that of a run or checkpoint is temporary.

    Raises:
        ValueError: no model there, or no tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if not (path / "config.json").is_file():
            folder = Path(scratch) / "model"
            to_hf(path, folder, tokenizer=tokenizer)
        if HFSource(folder).tokenizer is None:
            raise ValueError(f"{path} has no tokenizer; name one (--tokenizer PATH)")
        yield folder
