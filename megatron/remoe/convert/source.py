"""Models to convert, of either format, in the same terms.

A source has a config, the items of the conversion plan, and each item's tensors by their names in
Hugging Face.
"""

from argparse import Namespace
from collections import defaultdict
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.remoe import checkpoint
from megatron.remoe import pattern as patterns
from megatron.remoe.convert.architecture import to_config
from megatron.remoe.convert.checkpoint_args import read_arguments
from megatron.remoe.convert.facts import training_facts
from megatron.remoe.convert.hf_source import DTYPES, HFSource, check_finite, config_key
from megatron.remoe.convert.table import (
    CONFIG,
    Config,
    Item,
    check_names,
    check_shape,
    is_exact,
    plan,
)
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.convert.values import check_config, check_whole
from megatron.remoe.formats.legacy import LegacyReader, is_legacy
from megatron.remoe.formats.names import CanonicalReader, Reader, RenamedReader
from megatron.remoe.formats.torch_dist import TorchDistReader

_EMBEDDING = "embedding.word_embeddings.weight"


class Source(Protocol):
    """A model of which any tensor can be asked for, in Hugging Face's terms."""

    config: Config
    items: list[Item]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which every weight keeps its value."""

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        """The model's tokenizer, or the one that was chosen in its place."""

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        """Read the tensors of an item, by their names in Hugging Face."""


def open_source(path: Path, tokenizer: Path | None = None) -> "MegatronSource | HFSource":
    """Open a Hugging Face folder, or else the checkpoint that is found in a folder of Megatron's.

    Args:
        path: a Hugging Face folder, a run directory, a folder of checkpoints, or a checkpoint.
        tokenizer: a tokenizer to use in place of the model's own.

    Raises:
        ValueError: there is no model, or one that cannot be converted.
    """
    if (path / "config.json").is_file():
        return HFSource(path, tokenizer=tokenizer)
    return MegatronSource(path, tokenizer)


class MegatronSource:
    """A model in a Megatron checkpoint, every tensor of which must be in the plan.

    Args:
        path: a run directory, a folder of checkpoints, or a checkpoint.
        tokenizer: a tokenizer to use in place of the one that the run names.
        fork: whether the checkpoint is of the published implementation.

    Attributes:
        folder: the run's directory, or where it would be.
        pattern: the layers of a hybrid model, of which the equivalent GPT model is converted.

    Raises:
        ValueError: there is no checkpoint, it does not fit the plan, or it is of the other kind.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None, *, fork: bool = False) -> None:
        self.checkpoint = find_checkpoint(path)
        has_config = (path / "config.yaml").is_file()
        self.folder = path if has_config else self.checkpoint.absolute().parents[1]
        self._is_old = is_legacy(self.checkpoint)
        stored: Reader = (LegacyReader if self._is_old else TorchDistReader)(self.checkpoint)
        self.args = read_arguments(stored.common["args"], self.checkpoint, fork=fork)
        self.pattern: str | None = getattr(self.args, "hybrid_layer_pattern", None)
        if self.pattern is not None:
            self.args = Namespace(**patterns.as_gpt(vars(self.args)))
            stored = RenamedReader(stored, partial(patterns.gpt_name, pattern=self.pattern))
        self.reader = CanonicalReader(stored, l1_coeff=fork and self.args.moe_relu_routing)
        iteration = self.reader.common.get("iteration") or 0
        check_whole(str(self.checkpoint), "iteration", iteration, 0)
        # A run keeps its tokenizer, and so does the folder of an imported checkpoint.
        is_run = (self.folder / "config.yaml").is_file()
        keeper = self.folder if is_run else self.checkpoint.parent
        self.tokenizer = TokenizerFiles.find(self.args, tokenizer, [keeper / "tokenizer"])
        architecture = to_config(self.args) | {"vocab_size": self._vocab_size()}
        check_config(f"the arguments in {self.checkpoint} make a model that", architecture)
        self.items = plan(architecture, self.padded_vocab_size)
        self._check_tensors()
        facts = training_facts(self.args, iteration, self.padded_vocab_size, self.folder)
        self.config = architecture | self._other_settings() | {"training_facts": facts}

    def _check_tensors(self) -> None:
        check_names(str(self.checkpoint), self.reader.meta, [i.megatron for i in self.items])
        for item in self.items:
            name, meta = item.megatron, self.reader.meta[item.megatron]
            check_shape(name, tuple(meta.shape), item.megatron_shape)
            if meta.dtype not in DTYPES.values():
                raise ValueError(
                    f"{name} is stored as {meta.dtype}; only {', '.join(DTYPES)} can be converted"
                )

    @property
    def is_loadable(self) -> bool:
        """Whether our Megatron loads the checkpoint as it is."""
        return not self._is_old and not self.reader.is_renamed

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype in which every weight keeps its value, but for those in fp32."""
        cast = (i for i in self.items if not is_exact(next(iter(i.hf))))
        weights = (self.reader.meta[i.megatron] for i in cast)
        return reduce(torch.promote_types, (weight.dtype for weight in weights))

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of the embedding."""
        if _EMBEDDING not in self.reader.meta:
            check_names(str(self.checkpoint), [], [_EMBEDDING])
        shape = self.reader.meta[_EMBEDDING].shape
        if len(shape) != 2:
            raise ValueError(f"{_EMBEDDING} has shape {list(shape)}; it must be a matrix")
        return shape[0]

    def _vocab_size(self) -> int:
        """Return how many entries the tokenizer can produce; all other rows are padding."""
        padded = self.padded_vocab_size
        if self.tokenizer is not None:
            size = self.tokenizer.vocab_size
            if size > padded:
                raise ValueError(
                    f"vocabulary mismatch: tokenizer {self.tokenizer.path} has {size} entries, the "
                    f"model's embedding has {padded}; name the model's own (--tokenizer PATH)"
                )
            return size
        if self.args.tokenizer_type == "NullTokenizer" and self.args.vocab_size:
            entries: int = self.args.vocab_size + 1  # the end of documents is one more
            return min(entries, padded)
        return padded

    def _other_settings(self) -> Config:
        """Return what the config has beside the architecture: tokens, dtype, and coefficients."""
        settings: Config = {"use_cache": True, "dtype": str(self.dtype).removeprefix("torch.")}
        settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        settings |= self.tokenizer.ids if self.tokenizer else {}
        values: dict[str, list[Any]] = defaultdict(list)
        for item in filter(_is_setting, self.items):
            for name, value in self.hf_tensors(item).items():
                values[config_key(name)].append(value.tolist())
        return settings | values

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        """Read the tensors of an item, by their names in Hugging Face.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        tensor = self.reader.read(item.megatron)
        check_finite(f"{item.megatron} of {self.checkpoint}", tensor)
        return item.to_hf(tensor)


def _is_setting(item: Item) -> bool:
    """Return whether an item is a value in the config, and no weight."""
    return next(iter(item.hf)).startswith(CONFIG)


def find_checkpoint(path: Path) -> Path:
    """Find the last complete checkpoint of a run directory or folder, or `path` if it is one.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; name a run directory, a checkpoint or a model")
    if _is_checkpoint(path):
        return path
    folder = checkpoint.folder_of(path)
    newest_first = [found.path for found in reversed(checkpoint.find(folder))]
    tracked = checkpoint.tracked_path(folder)
    for candidate in (tracked, *newest_first):
        if candidate is not None and _is_checkpoint(candidate):
            if tracked not in (None, candidate):
                print(f"remoe: warning: {tracked} is not complete; reading {candidate} instead")
            return candidate
    raise ValueError(
        f"{path} holds no complete checkpoint; name a run directory, a folder of checkpoints "
        f"(iter_*), or one of them"
    )


def find_checkpoints(path: Path) -> list[Path]:
    """Find the complete checkpoints of a run or a folder, up to the one that `find_checkpoint` has.

    Args:
        path: as for `find_checkpoint`; a checkpoint is alone.

    Raises:
        ValueError: there is none.
    """
    last = find_checkpoint(path)
    if last == path or last.name == checkpoint.RELEASE:
        return [last]
    found = [one.path for one in checkpoint.find(last.parent) if _is_checkpoint(one.path)]
    return found[: found.index(last) + 1]


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() or is_legacy(folder)
