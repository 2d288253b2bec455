"""Megatron's old `torch` checkpoints: `mp_rank_00/model_optim_rng.pt`.

Only the file of a single rank is read: the published runs have no tensor, pipeline or expert
parallelism. The file is a pickle. It is read with the allow-list of `pickles` and mapped into
memory, so that only the tensors that are asked for are read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.formats.pickles import load_allowed

_FILE = "mp_rank_00/model_optim_rng.pt"


def is_legacy(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of the old format."""
    return (folder / _FILE).is_file() and not (folder / "metadata.json").is_file()


class LegacyReader:
    """The model of a one-rank checkpoint, under the names that its modules gave.

    Raises:
        ValueError: the checkpoint has several ranks, or holds something else than tensors and
            arguments.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / _FILE
        ranks = sorted(p.name for p in folder.glob("mp_rank_*"))
        if len(ranks) > 1:
            raise ValueError(
                f"{folder} was written by {len(ranks)} ranks; old checkpoints can be read from one "
                f"rank only: resave it as torch_dist (--ckpt-convert-format torch_dist)"
            )
        state = load_allowed(file, str(file))
        if not isinstance(state, dict) or not {"args", "model"} <= state.keys():
            raise ValueError(f"{file} has no model with args; save it with its arguments")
        model = state["model"]
        if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
            raise ValueError(f"{file} has no tensors by name as its model; copy it again")
        self.common: dict[str, Any] = {k: state.get(k) for k in ("args", "iteration")}
        self._tensors: dict[str, Tensor] = {
            name: value
            for name, value in model.items()
            if isinstance(value, Tensor) and not name.endswith("_extra_state")
        }
        for name, tensor in self._tensors.items():
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise ValueError(f"{file} has no values of {name}; save the model again")
        self.meta = {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name].detach()
