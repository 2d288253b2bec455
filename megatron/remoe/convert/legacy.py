"""Megatron's old `torch` checkpoints: `mp_rank_00/model_optim_rng.pt`.

One file of one rank: the published runs have no tensor, pipeline or expert parallelism. It is a
pickle, read with `weights_only=True` and the allow-list of `torch_dist`, and mapped into memory, so
that only what is asked for is read.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.torch_dist import load_allowed

_FILE = "mp_rank_00/model_optim_rng.pt"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])")  # ours
_GROUPED = re.compile(r"(.*\.mlp\.experts)\.weight([12])")
# Local specs have a module for each norm, which Transformer Engine fuses into the next linear.
_NORMS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}


def is_legacy(folder: Path) -> bool:
    return (folder / _FILE).is_file() and not (folder / "metadata.json").is_file()


class LegacyReader:
    """The model of a one-rank checkpoint, under the names of a torch_dist one.

    Raises:
        ValueError: several ranks, or a pickle with something else than tensors and arguments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ranks = sorted(p.name for p in folder.glob("mp_rank_*"))
        if len(ranks) > 1:
            raise ValueError(
                f"{folder} was written by {len(ranks)} ranks; old checkpoints can be read from one "
                f"rank only: resave it as torch_dist (--ckpt-convert-format torch_dist)"
            )
        state = load_allowed(folder / _FILE, str(folder / _FILE))
        if "args" not in state or "model" not in state:
            raise ValueError(f"{folder / _FILE} has no model with args; save it with its arguments")
        self.common: dict[str, Any] = {k: state.get(k) for k in ("args", "iteration")}
        self._parts: dict[str, list[Tensor]] = {}
        self._collect(state["model"])

    def _collect(self, model: dict[str, Any]) -> None:
        args = self.common["args"]
        for name, value in model.items():
            if name.endswith("_extra_state") or not isinstance(value, Tensor):
                continue
            if match := _EXPERT.fullmatch(name):
                key = f"{match[1]}.experts.{match[3]}.weight"
                parts = self._parts.setdefault(key, [])
                assert int(match[2]) == len(parts), "experts come in order"
                parts.append(value)
            elif match := _STACKED.fullmatch(name):
                self._parts[f"{match[1]}.experts.{match[2]}.weight"] = list(value)
            elif match := _GROUPED.fullmatch(name):
                self._parts[f"{match[1]}.experts.linear_fc{match[2]}.weight"] = list(
                    _grouped(value, int(match[2]), args)
                )
            else:
                self._parts[self._renamed(name, args)] = [value]

    def _renamed(self, name: str, args: Any) -> str:
        for old, new in _NORMS.items():
            name = name.replace(old, new)
        if args.num_experts is None:
            name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        return name

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][0].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts[name]
        shape = tuple(parts[0].shape)
        return (len(parts), *shape) if _is_experts(name) else shape

    def read(self, name: str) -> Tensor:
        parts = self._parts[name]
        return torch.stack(parts) if _is_experts(name) else parts[0]


def _is_experts(name: str) -> bool:
    return ".mlp.experts.experts." in name


def _grouped(weight: Tensor, which: int, args: Any) -> tuple[Tensor, ...]:
    """The grouped GEMM's weights: `[H, E * 2F]` and `[E * F, H]`, transposed to a linear's."""
    if which == 1:
        return tuple(w.T for w in weight.view(args.num_experts, args.hidden_size, -1))
    return tuple(w.T for w in weight.view(args.num_experts, -1, args.hidden_size))
