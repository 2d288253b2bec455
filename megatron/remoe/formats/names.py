"""The names of a checkpoint's tensors, whichever modules wrote them, under those of our table.

Megatron has named one tensor differently over time and by backend: experts one by one, stacked, or
as the two matrices of the grouped GEMM; norms as modules of their own, or fused into the next
linear. The published implementation has one coefficient at the model's root. All are renamed here,
the table of `megatron.remoe.convert.table` knows one name each.

Shapes: E experts, H hidden, F expert width.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

COEFFICIENT = "moe_relu_l1_reg_coeff"  # of the published implementation
_ROUTER = re.compile(r"(.*\.mlp)\.router\.weight")
_ONE_EXPERT = (
    # sequential experts
    re.compile(r"(?P<at>.*\.mlp\.experts)\.local_experts\.(?P<expert>\d+)\.(?P<fc>\w+)\.weight"),
    # Transformer Engine's grouped linear
    re.compile(r"(?P<at>.*\.mlp\.experts)\.(?P<fc>linear_fc[12])\.weight(?P<expert>\d+)"),
)
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])")  # ours
_GROUPED = re.compile(r"(.*\.mlp\.experts)\.weight([12])")  # the grouped GEMM's
_FUSED_NORM = "mlp.linear_fc1.layer_norm_weight"
_NORM = "pre_mlp_layernorm.weight"


class Reader(Protocol):
    """A checkpoint on disk, tensor by tensor, and what it holds beside tensors (`common`)."""

    @property
    def common(self) -> dict[str, Any]: ...

    @property
    def names(self) -> list[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Stored:
    """Where one of our tensors is: under one name, or under one for each expert."""

    names: tuple[str, ...]
    form: Literal["same", "by expert", "grouped", "coefficient"] = "same"


class CanonicalReader:
    """A checkpoint under the names of the conversion table.

    Args:
        reader: the checkpoint as it is.
        l1_coeff: give every router the coefficient at the model's root.

    Raises:
        ValueError: experts of which some are missing, or no coefficient.
    """

    def __init__(self, reader: Reader, *, l1_coeff: bool = False) -> None:
        self._reader = reader
        self._has_l1_coeff = l1_coeff
        self._routers = {match[1] for n in reader.names if (match := _ROUTER.fullmatch(n))}
        self._stored = self._resolve(reader.names)

    def _resolve(self, names: Iterable[str]) -> dict[str, _Stored]:
        found: dict[str, _Stored] = {}
        experts: dict[str, dict[int, str]] = {}
        for name in names:
            matches = [match for pattern in _ONE_EXPERT if (match := pattern.fullmatch(name))]
            if matches:
                key = f"{matches[0]['at']}.experts.{matches[0]['fc']}.weight"
                by_expert, number = experts.setdefault(key, {}), int(matches[0]["expert"])
                if number in by_expert or found.get(key, _Stored(())).names:
                    _refuse_two(key, name)
                by_expert[number] = name
                found[key] = _Stored(())  # keeps the place of the first
            elif name != COEFFICIENT:
                key, stored = self._renamed(name)
                if key in found:
                    _refuse_two(key, name)
                found[key] = stored
        for key, by_expert in experts.items():
            missing = next(i for i in range(len(by_expert) + 1) if i not in by_expert)
            if missing <= max(by_expert):
                raise ValueError(f"{key}: the checkpoint lacks expert {missing}; copy it again")
            found[key] = _Stored(tuple(by_expert[i] for i in sorted(by_expert)), "by expert")
        if self._has_l1_coeff:
            if self._coefficient is None:
                raise ValueError(
                    f"the checkpoint routes with ReLU but has no {COEFFICIENT}; take one that the "
                    f"published implementation saved with its model"
                )
            for layer in self._routers:
                found[f"{layer}.router.l1_coeff"] = _Stored((COEFFICIENT,), "coefficient")
        return found

    def _renamed(self, name: str) -> tuple[str, _Stored]:
        if match := _STACKED.fullmatch(name):
            return f"{match[1]}.experts.{match[2]}.weight", _Stored((name,))
        if match := _GROUPED.fullmatch(name):
            return f"{match[1]}.experts.linear_fc{match[2]}.weight", _Stored((name,), "grouped")
        return self._norm(name), _Stored((name,))

    def _norm(self, name: str) -> str:
        """Norms have the names of Transformer Engine: fused, except before experts."""
        name = name.replace(
            ".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"
        )
        for old in (_NORM, _FUSED_NORM):
            if name.endswith(f".{old}"):
                layer = name.removesuffix(old)
                return layer + (_NORM if f"{layer}mlp" in self._routers else _FUSED_NORM)
        return name

    @cached_property
    def _coefficient(self) -> Tensor | None:
        if COEFFICIENT in self._reader.names:
            return self._reader.read(COEFFICIENT).float()
        value = (self.common.get("model") or {}).get(COEFFICIENT)
        return None if value is None else torch.as_tensor(value, dtype=torch.float32)

    @property
    def common(self) -> dict[str, Any]:
        return self._reader.common

    @property
    def is_renamed(self) -> bool:
        """Whether the checkpoint has other names than the table."""
        return any(stored != _Stored((name,)) for name, stored in self._stored.items())

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._stored[name]
        if stored.form == "coefficient":
            return torch.float32
        return self._reader.dtype(stored.names[0])

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        if stored.form == "coefficient":
            return ()
        shape = self._reader.shape(stored.names[0])
        if stored.form == "by expert":
            return (len(stored.names), *shape)
        if stored.form == "grouped":
            return tuple(
                _linear(torch.empty(shape, device="meta"), name, self._experts(name)).shape
            )
        return shape

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        if stored.form == "coefficient":
            assert self._coefficient is not None
            return self._coefficient.clone()
        parts = [self._reader.read(part) for part in stored.names]
        if stored.form == "by expert":
            return torch.stack(parts)
        if stored.form == "grouped":
            return _linear(parts[0], name, self._experts(name)).contiguous()
        return parts[0]

    def _experts(self, name: str) -> int:
        layer = name.partition(".experts.")[0]
        if layer not in self._routers:
            raise ValueError(f"the checkpoint has {name} but no {layer}.router.weight")
        return self._reader.shape(f"{layer}.router.weight")[0]


def _refuse_two(key: str, name: str) -> None:
    raise ValueError(
        f"the checkpoint has {key} twice, the second time as {name}; save it again with one of them"
    )


def _linear(weight: Tensor, name: str, num_experts: int) -> Tensor:
    """The grouped GEMM's `[H, E * 2F]` or `[E * F, H]`, as every expert's linear `[E, out, in]`.

    Raises:
        ValueError: a matrix that so many experts cannot share.
    """
    if weight.dim() != 2 or weight.numel() % num_experts:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}, which {num_experts} experts cannot share"
        )
    if name.endswith("linear_fc1.weight"):
        return weight.reshape(num_experts, weight.shape[0], -1).transpose(1, 2)
    return weight.reshape(num_experts, -1, weight.shape[1]).transpose(1, 2)
