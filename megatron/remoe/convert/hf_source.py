"""A model in a Hugging Face folder, checked when it is opened and read tensor by tensor."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron.remoe.convert.architecture import moe_layers
from megatron.remoe.convert.table import (
    CONFIG,
    PADDING,
    Config,
    Item,
    check_names,
    check_shape,
    dtype_of,
    plan,
)
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.convert.values import check_config
from megatron.remoe.files import read_json_object
from megatron.remoe.formats.safetensors import SafetensorsReader

PADDING_FILE = "megatron_padding.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MODEL_TYPES = ("remoe", "llama")
_INITIAL = {
    "l1_coeff": "the published initial value is 1e-8",
    "top_p_odds": "the initial value is E / k - 1",
    "threshold_updates": "the initial value is 0",
}


class HFSource:
    """A model in a Hugging Face folder; names and shapes are checked before anything is read.

    Args:
        path: the folder.
        padded_vocab_size: the number of rows of Megatron's embedding; None is that of the run which
            the model is from, or else the size of the vocabulary.
        tokenizer: a tokenizer to use in place of the folder's.

    Raises:
        ValueError: the files do not make a model of type `remoe` or `llama`.
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
        self._check_weights()
        if self.tokenizer is not None:
            self.tokenizer.check_fits(self.config["vocab_size"])
        self._check_values()

    def _stored_padding(self) -> int:
        """Return the number of rows in the file beside the weights, which all its tensors share.

        Raises:
            ValueError: something else is in the file.
        """
        stored = [name for name in self.reader.meta if name.startswith(PADDING)]
        if not stored:
            return 0
        known = [name for item in plan(self.config, self.config["vocab_size"]) for name in item.hf]
        check_names(str(self.path / PADDING_FILE), stored, set(stored) & set(known))
        shapes = sorted({tuple(self.reader.meta[name].shape) for name in stored})
        if len(shapes) > 1 or shapes[0][1:] != (self.config["hidden_size"],):
            raise ValueError(
                f"{self.path / PADDING_FILE} has tensors of shape "
                f"{' and '.join(str(list(shape)) for shape in shapes)}; they must be rows of the "
                f"model's hidden_size (without the file they become zeros)"
            )
        return shapes[0][0]

    def _check_weights(self) -> None:
        weights = {
            name: shape
            for item in self.items
            for name, shape in item.hf.items()
            if not name.startswith((CONFIG, PADDING))
        }
        found = [name for name in self.reader.meta if not name.startswith(PADDING)]
        if self.config["tie_word_embeddings"]:  # some savers write the shared tensor twice
            found = [name for name in found if name != "lm_head.weight"]
        check_names(str(self.path), found, weights)
        vocab = self.config["vocab_size"]
        embedding = self.reader.meta["model.embed_tokens.weight"].shape
        if embedding[:1] not in ((vocab,), ()):
            raise ValueError(
                f"vocabulary mismatch: {self.path / 'config.json'} has vocab_size {vocab}, but "
                f"model.embed_tokens.weight has {embedding[0]} rows; they must be of one model"
            )
        for name, shape in weights.items():
            meta = self.reader.meta[name]
            check_shape(f"{self.path}: {name}", tuple(meta.shape), shape)
            if meta.dtype != dtype_of(name, self.dtype):
                raise ValueError(
                    f"{self.path}: {name} is {meta.dtype}, but model.norm.weight is {self.dtype}; "
                    f"save the model with all weights in one dtype, but for the fp32 cell of "
                    f"recurrent routers and the fp32 state of others"
                )

    def _check_values(self) -> None:
        for item in self.items:
            for name in item.hf:
                if name.startswith(CONFIG):
                    value_in_config(str(self.path / "config.json"), self.config, name)

    @cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        """The chosen tokenizer, or the folder's own; None if there is none."""
        if self.chosen_tokenizer is not None:
            return TokenizerFiles.chosen(self.chosen_tokenizer)
        has_one = (self.path / "tokenizer.json").is_file()
        return TokenizerFiles(self.path) if has_one else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights, but for the cell and the state of routers."""
        return self.reader.meta["model.norm.weight"].dtype

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        """Read the tensors of an item by their names in Hugging Face; rows of padding may be zeros.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        return {name: self._read(name, shape) for name, shape in item.hf.items()}

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.startswith(CONFIG):
            return value_in_config(str(self.path / "config.json"), self.config, name)
        if name.startswith(PADDING) and (
            name not in self.reader.meta or self.reader.meta[name].shape != shape
        ):
            return torch.zeros(shape, dtype=self.dtype)
        tensor = self.reader.read(name)
        check_finite(f"{name} of {self.path}", tensor)
        return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor has neither NaN nor infinities, with which a model computes nothing.

    Raises:
        ValueError: it has some.
    """
    if not (finite := torch.isfinite(tensor)).all():
        raise ValueError(
            f"{name} has {int((~finite).sum())} values that are NaN or infinite; take an earlier "
            f"checkpoint, or copy it again"
        )


def value_in_config(where: str, config: Config, name: str) -> Tensor:
    """Return a value of a router that is no weight, by its name `config.KEY.LAYER`, in fp32.

    Raises:
        ValueError: the config has not one value for every layer with experts, or it is not finite.
    """
    key, layers = config_key(name), moe_layers(config)
    values = config.get(key) or ()
    if len(values) != len(layers):
        raise ValueError(
            f"{where} has no {key} of {len(layers)} values, one for every layer with experts; add "
            f"it ({_INITIAL[key]})"
        )
    value = torch.tensor(values[layers.index(int(name.rpartition(".")[2]))], dtype=torch.float32)
    check_finite(f"{key} of {where}", value)
    return value


def config_key(name: str) -> str:
    """Return the key of a value in the config: `l1_coeff` of `config.l1_coeff.3`."""
    return name.split(".")[1]


def _read_config(path: Path) -> Config:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no Hugging Face model: it has no config.json")
    raw = read_json_object(file, "copy it again")
    kind = raw.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(
            f"{file} has model_type {kind!r}; {' and '.join(_MODEL_TYPES)} can be converted"
        )
    check_config(str(file), raw)
    config = validated(raw)
    check_config(str(file), config)
    return config


def validated(config: Config) -> Config:
    """Return a config as transformers reads it, with its defaults.

    Raises:
        ValueError: the config class refuses a value.
    """
    from transformers import LlamaConfig

    from remoe.hf import ReMoEConfig

    cls = ReMoEConfig if config["model_type"] == "remoe" else LlamaConfig
    try:
        complete: Config = cls.from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers takes any value, and fails where it is used
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config.json: {reason}") from error
    return complete
