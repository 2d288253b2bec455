"""Where a model comes from: a Megatron checkpoint or a Hugging Face folder, read in the same terms.

A source has a config, the items of the conversion plan, and each item's tensors on either side.
"""

import argparse
from collections import Counter
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe import checkpoint
from megatron.remoe.convert.architecture import check_arguments, moe_layers, to_config
from megatron.remoe.convert.facts import training_facts
from megatron.remoe.convert.fork import is_fork, translated
from megatron.remoe.convert.table import (
    CONFIG,
    PADDING,
    Config,
    Item,
    check_names,
    check_shape,
    plan,
)
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.convert.values import check_config, check_whole
from megatron.remoe.files import read_json_object
from megatron.remoe.formats.legacy import LegacyReader, is_legacy
from megatron.remoe.formats.names import CanonicalReader
from megatron.remoe.formats.safetensors import SafetensorsReader
from megatron.remoe.formats.torch_dist import TorchDistReader

PADDING_FILE = "megatron_padding.safetensors"
MODEL_TYPES = ("remoe", "llama")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EMBEDDING = "embedding.word_embeddings.weight"


def open_source(path: Path, tokenizer: Path | None = None) -> "MegatronSource | HFSource":
    """A Hugging Face folder, or else whatever Megatron's checkpoints may be found in."""
    if (path / "config.json").is_file():
        return HFSource(path, tokenizer=tokenizer)
    return MegatronSource(path, tokenizer)


class MegatronSource:
    """A model in a Megatron checkpoint; every tensor of it is in the plan, or it is refused.

    Args:
        path: a run directory, a folder of checkpoints, or a checkpoint.
        tokenizer: in place of the one that the run names.
        fork: the checkpoint is of the published implementation.

    Raises:
        ValueError: no checkpoint there, one that does not fit the plan, or one of the other kind.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None, *, fork: bool = False) -> None:
        self.checkpoint = find_checkpoint(path)
        has_config = (path / "config.yaml").is_file()
        self._run_dir = path if has_config else self.checkpoint.absolute().parents[1]
        self._is_old = is_legacy(self.checkpoint)
        stored = LegacyReader(self.checkpoint) if self._is_old else TorchDistReader(self.checkpoint)
        self.args = _arguments(stored.common["args"], self.checkpoint, fork=fork)
        self.reader = CanonicalReader(stored, l1_coeff=fork and self.args.moe_relu_routing)
        self.iteration = self.reader.common.get("iteration") or 0
        check_whole(str(self.checkpoint), "iteration", self.iteration, 0)
        self.tokenizer = TokenizerFiles.find(self.args, tokenizer)
        architecture = to_config(self.args) | {"vocab_size": self._vocab_size()}
        check_config(f"the arguments in {self.checkpoint} make a model that", architecture)
        self.items = plan(architecture, self.padded_vocab_size)
        check_names(str(self.checkpoint), self.reader.names, [i.megatron for i in self.items])
        for item in self.items:
            check_shape(item.megatron, self.reader.shape(item.megatron), item.megatron_shape)
            check_dtype(item.megatron, self.reader.dtype(item.megatron))
        self.config = self._complete(architecture)

    @property
    def is_loadable(self) -> bool:
        """Whether our Megatron loads the checkpoint as it is."""
        return not self._is_old and not self.reader.is_renamed

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest in which every weight keeps its value."""
        weights = (i.megatron for i in self.items if not next(iter(i.hf)).startswith(CONFIG))
        return reduce(torch.promote_types, map(self.reader.dtype, weights))

    @property
    def padded_vocab_size(self) -> int:
        if _EMBEDDING not in self.reader.names:
            check_names(str(self.checkpoint), [], [_EMBEDDING])
        shape = self.reader.shape(_EMBEDDING)
        if len(shape) != 2:
            raise ValueError(f"{_EMBEDDING} has shape {list(shape)}; it must be a matrix")
        return shape[0]

    def _vocab_size(self) -> int:
        """Entries that the tokenizer can produce; the rest of the rows is padding."""
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
            entries: int = self.args.vocab_size + 1  # and the end of documents
            return min(entries, padded)
        return padded

    def _complete(self, architecture: Config) -> Config:
        ids = self.tokenizer.ids if self.tokenizer else {}
        config = architecture | {"use_cache": True, "bos_token_id": None, "eos_token_id": None}
        config |= {"pad_token_id": None} | ids
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        coeffs = [item for item in self.items if next(iter(item.hf)).startswith(CONFIG)]
        if coeffs:
            values: dict[str, list[Any]] = {}
            for name, value in (pair for item in coeffs for pair in self.hf_tensors(item).items()):
                values.setdefault(_config_key(name), []).append(value.tolist())
            config |= values
        config["training_facts"] = training_facts(
            self.args, self.iteration, self.padded_vocab_size, self._run_dir
        )
        return config

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        tensor = self.reader.read(item.megatron)
        check_finite(f"{item.megatron} of {self.checkpoint}", tensor)
        return item.to_hf(tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Whether a tensor is without NaN and infinities.

    Raises:
        ValueError: it is not; a model with one such weight computes nothing.
    """
    if not (finite := torch.isfinite(tensor)).all():
        raise ValueError(
            f"{name} has {int((~finite).sum())} values that are NaN or infinite; take an earlier "
            f"checkpoint, or copy it again"
        )


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Whether a weight is stored as weights are.

    Raises:
        ValueError: it is not.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"{name} is stored as {dtype}; only {', '.join(DTYPES)} can be converted")


def _arguments(args: argparse.Namespace, checkpoint: Path, *, fork: bool) -> argparse.Namespace:
    """Complete arguments, of the kind of checkpoint that was asked for."""
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{checkpoint} has no arguments of Megatron's; save it with its arguments")
    where = f"the arguments in {checkpoint}"
    if fork and not is_fork(args):
        raise ValueError(
            f"{checkpoint} was not written by the published implementation (the arguments in it "
            f"are another's); convert it with remoe convert to-hf"
        )
    if not fork and is_fork(args):
        raise ValueError(
            f"{checkpoint} was written by the published implementation; convert it with remoe "
            f"convert from-fork"
        )
    check_arguments(where, args, complete=not fork)
    if fork:
        args = translated(args)
        check_arguments(where, args, complete=True)
    return args


class HFSource:
    """A model in a Hugging Face folder; names and shapes are checked before anything is read.

    Args:
        path: the folder.
        padded_vocab_size: rows of Megatron's embedding; as in the run that the model is from, or
            the vocabulary's, when None.
        tokenizer: in place of the folder's.

    Raises:
        ValueError: files that do not make a model of type `remoe` or `llama`.
    """

    def __init__(
        self,
        path: Path,
        padded_vocab_size: int | None = None,
        *,
        tokenizer: Path | None = None,
    ) -> None:
        self.path, self.chosen_tokenizer = path, tokenizer
        self.config = _read_config(path)
        self.reader = SafetensorsReader(path, extra={PADDING_FILE: PADDING})
        if padded_vocab_size is None:
            padded_vocab_size = self.config["vocab_size"] + self._stored_padding()
        self.padded_vocab_size = padded_vocab_size
        self.items = plan(self.config, padded_vocab_size)
        self._check()

    def _stored_padding(self) -> int:
        """Rows of the vocabulary in the file beside the weights, the same for every matrix.

        Raises:
            ValueError: something else is in it.
        """
        stored = [name for name in self.reader.names if name.startswith(PADDING)]
        known = [name for item in plan(self.config, self.config["vocab_size"]) for name in item.hf]
        check_names(str(self.path / PADDING_FILE), stored, set(stored) & set(known))
        shapes = {self.reader.shape(name) for name in stored} or {(0, self.config["hidden_size"])}
        rows, *width = min(shapes)[:1] or (0,), min(shapes)[1:]
        if len(shapes) > 1 or width != [(self.config["hidden_size"],)]:
            raise ValueError(
                f"{self.path / PADDING_FILE} has tensors of shape "
                f"{' and '.join(str(list(shape)) for shape in sorted(shapes))}; they must be rows "
                f"of the model's hidden_size (without the file they become zeros)"
            )
        return rows[0]

    def _check(self) -> None:
        expected = {name: shape for item in self.items for name, shape in item.hf.items()}
        weights = {n: s for n, s in expected.items() if not n.startswith((CONFIG, PADDING))}
        found = [name for name in self.reader.names if not name.startswith(PADDING)]
        if self.config["tie_word_embeddings"]:  # some savers write the shared tensor twice
            found = [name for name in found if name != "lm_head.weight"]
        check_names(str(self.path), found, weights)
        vocab = self.config["vocab_size"]
        embedding = self.reader.shape("model.embed_tokens.weight")
        if embedding[:1] not in ((vocab,), ()):
            raise ValueError(
                f"vocabulary mismatch: {self.path / 'config.json'} has vocab_size {vocab}, but "
                f"model.embed_tokens.weight has {embedding[0]} rows; they must be of one model"
            )
        for name, shape in weights.items():
            check_shape(f"{self.path}: {name}", self.reader.shape(name), shape)
            if (dtype := self.reader.dtype(name)) != self.dtype:
                raise ValueError(
                    f"{self.path}: {name} is {dtype}, but model.norm.weight is {self.dtype}; save "
                    f"the model with all weights in one dtype"
                )
        tokenizer = self.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > vocab:
            raise ValueError(
                f"vocabulary mismatch: the tokenizer of {tokenizer.path} has "
                f"{tokenizer.vocab_size} entries, config.json has vocab_size {vocab}; they must "
                f"be of one model"
            )
        in_config = Counter(_config_key(name) for name in expected if name.startswith(CONFIG))
        for key, count in in_config.items():
            if len(self.config.get(key) or ()) != count:
                raise ValueError(
                    f"{self.path / 'config.json'} has no {key} of {count} values, one for every "
                    f"layer with experts; add it (the published initial value is 1e-8)"
                )

    @cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        if self.chosen_tokenizer is not None:
            return TokenizerFiles.chosen(self.chosen_tokenizer)
        has_one = (self.path / "tokenizer.json").is_file()
        return TokenizerFiles(self.path) if has_one else None

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.dtype("model.norm.weight")

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        return {name: self._read(name, shape) for name, shape in item.hf.items()}

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.startswith(CONFIG):
            index = moe_layers(self.config).index(int(name.rpartition(".")[2]))
            value = torch.tensor(self.config[_config_key(name)][index], dtype=torch.float32)
            check_finite(f"{_config_key(name)} of {self.path / 'config.json'}", value)
            return value
        if name.startswith(PADDING):
            stored = name in self.reader.names and self.reader.shape(name) == shape
            if not stored:
                return torch.zeros(shape, dtype=self.dtype)
        tensor = self.reader.read(name)
        check_finite(f"{name} of {self.path}", tensor)
        return tensor


def _config_key(name: str) -> str:
    """`config.l1_coeff.3` is a value of the config's list `l1_coeff`."""
    return name.split(".")[1]


def _read_config(path: Path) -> Config:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no Hugging Face model: it has no config.json")
    raw = read_json_object(file, "copy it again")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(
            f"{file} has model_type {kind!r}; {' and '.join(MODEL_TYPES)} can be converted"
        )
    check_config(str(file), raw)
    config = validated(raw)
    check_config(str(file), config)
    return config


def validated(config: Config) -> Config:
    """A config as transformers reads it, with its defaults.

    Raises:
        ValueError: values that the config class refuses.
    """
    from transformers import LlamaConfig

    from remoe.hf import ReMoEConfig

    cls = ReMoEConfig if config["model_type"] == "remoe" else LlamaConfig
    try:
        complete: Config = cls.from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers takes any value and fails where it is used
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config.json: {reason}") from error
    return complete


def find_checkpoint(path: Path) -> Path:
    """The last complete checkpoint of a run directory or a folder of checkpoints, or `path` itself.

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


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() or is_legacy(folder)
