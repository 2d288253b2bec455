"""The trained TopK mixture that is adopted, as our model for transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.convert.architecture import moe_layers
from megatron.remoe.convert.exported import load_source, on_device
from megatron.remoe.convert.foreign import config_of, is_foreign, load_foreign, stored_dtype
from megatron.remoe.convert.source import open_source
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.tokenizer import TokenizerFiles


@dataclass(frozen=True)
class Teacher:
    """A TopK mixture that is not loaded yet.

    Attributes:
        path: the model as it was named.
        config: the config of our model that computes the same.
        tokenizer: its tokenizer; None if there is none.
        dtype: the dtype of its weights on disk.
        source: the model to convert; None for the classes of transformers.
    """

    path: Path
    config: Config
    tokenizer: TokenizerFiles | None
    dtype: torch.dtype
    source: Any

    @property
    def topk(self) -> int:
        """k, the number of experts of every token."""
        return int(self.config["num_experts_per_tok"])

    @property
    def positions(self) -> int:
        """The number of positions, which no sequence may exceed."""
        return int(self.config["max_position_embeddings"])

    def load(self) -> Any:
        """Load the model in fp32, on the GPU if there is one.

        Raises:
            ValueError: a weight is missing, NaN or infinite.
        """
        if self.source is None:
            return on_device(load_foreign(self.path, self.config))
        return load_source(self.source)


def open_teacher(path: Path, tokenizer: Path | None = None) -> Teacher:
    """Open a TopK mixture.

    Args:
        path: a run directory, a checkpoint, or a Hugging Face folder of ours, of OLMoE, Mixtral or
            Qwen3-MoE.
        tokenizer: a tokenizer to use in place of the model's own.

    Raises:
        ValueError: there is no model, or one of another kind.
    """
    if is_foreign(path):
        config = config_of(path)
        found = TokenizerFiles.of_folder(path, tokenizer)
        if not moe_layers(config):
            raise _dense(path)
        if found is not None:
            found.check_fits(config["vocab_size"])
        return Teacher(path, config, found, stored_dtype(path), None)
    source = open_source(path, tokenizer)
    config = source.config
    if config["model_type"] != "remoe":
        raise _dense(path)
    if not config["router_type"].startswith("topk_"):
        raise ValueError(
            f"{path} has the router {config['router_type']}, and a TopK router is adopted; the "
            f"budget of a router with ReLU gates can be set as it is (remoe budget)"
        )
    if config.get("gate_threshold") is not None:
        raise ValueError(
            f"{path} has a threshold of gates, so that it is adopted already; its budget can be "
            f"set as it is (remoe budget)"
        )
    return Teacher(path, config, source.tokenizer, source.dtype, source)


def _dense(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a dense model, which has no experts to choose; remoe convert upcycle makes a "
        f"mixture from it"
    )
