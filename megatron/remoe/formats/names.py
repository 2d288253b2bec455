"""Translation of the names of a checkpoint's tensors to those of the conversion table.

Megatron has named the same tensor differently over time and by backend. Experts are stored one by
one, stacked, or as the two matrices of the grouped GEMM; norms are modules of their own, or fused
into the next linear. The published implementation has one coefficient at the model's root.
`_SPELLINGS` lists these names. Each has its name in `megatron.remoe.convert.table`, and a function
that makes the table's tensor from the stored ones.

Shapes: E experts, H hidden, F expert width.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

COEFFICIENT = "moe_relu_l1_reg_coeff"  # of the published implementation


class Reader(Protocol):
    """A checkpoint on disk.

    Attributes:
        meta: a tensor without values for every name, which has the shape and the dtype.
    """

    meta: dict[str, Tensor]

    @property
    def common(self) -> dict[str, Any]:
        """What the checkpoint holds beside tensors: `args`, `iteration` and the like."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""


class RenamedReader:
    """A checkpoint under other names.

    Args:
        reader: the checkpoint under its own names.
        rename: the function of a stored name that returns its other name.

    Raises:
        ValueError: two tensors would have the same name.
    """

    def __init__(self, reader: Reader, rename: Callable[[str], str]) -> None:
        self._reader = reader
        self._stored: dict[str, str] = {}
        for name in reader.meta:
            first = self._stored.setdefault(rename(name), name)
            if first != name:
                raise ValueError(f"{first} and {name} are one tensor of the converted model")
        self.meta = {name: reader.meta[stored] for name, stored in self._stored.items()}

    @property
    def common(self) -> dict[str, Any]:
        """What the checkpoint holds beside tensors."""
        return self._reader.common

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._reader.read(self._stored[name])


def _only(parts: list[Tensor], num_experts: int) -> Tensor:
    return parts[0]


def _stack(parts: list[Tensor], num_experts: int) -> Tensor:
    return torch.stack(parts)


def _ungroup_fc1(parts: list[Tensor], num_experts: int) -> Tensor:
    """Turn the grouped GEMM's `[H, E * 2F]` into `[E, 2F, H]`."""
    hidden, _ = parts[0].shape
    return parts[0].reshape(num_experts, hidden, -1).transpose(1, 2).contiguous()


def _ungroup_fc2(parts: list[Tensor], num_experts: int) -> Tensor:
    """Turn the grouped GEMM's `[E * F, H]` into `[E, H, F]`."""
    _, hidden = parts[0].shape
    return parts[0].reshape(num_experts, -1, hidden).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Spelling:
    """One way to name a tensor.

    Attributes:
        pattern: matches the stored name; a group `expert` is the number of a single expert.
        ours: the name in the conversion table, as a template of the pattern's groups.
        join: makes the table's tensor from the stored ones; it is told the number of experts.
        has_experts: whether the layer must have experts; None where it does not matter.
    """

    pattern: re.Pattern[str]
    ours: str
    join: Callable[[list[Tensor], int], Tensor] = _only
    has_experts: bool | None = None


def _in_layer(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<layer>.*\.){pattern}")


_ROUTER = _in_layer(r"mlp\.router\.weight")
_OF_EXPERTS = _in_layer(r"mlp\.(router|experts)\..*")  # a router may have no weight
_EXPERTS = r"\g<layer>mlp.experts.experts.\g<fc>.weight"
_SPELLINGS = (
    # sequential experts
    _Spelling(
        _in_layer(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<fc>\w+)\.weight"),
        _EXPERTS,
        _stack,
    ),
    # Transformer Engine's grouped linear
    _Spelling(
        _in_layer(r"mlp\.experts\.(?P<fc>linear_fc[12])\.weight(?P<expert>\d+)"), _EXPERTS, _stack
    ),
    # the modules of `megatron.remoe.moe.experts`
    _Spelling(_in_layer(r"mlp\.experts\.(?P<fc>linear_fc[12])"), _EXPERTS),
    # the old grouped GEMM
    _Spelling(
        _in_layer(r"mlp\.experts\.weight1"),
        r"\g<layer>mlp.experts.experts.linear_fc1.weight",
        _ungroup_fc1,
    ),
    _Spelling(
        _in_layer(r"mlp\.experts\.weight2"),
        r"\g<layer>mlp.experts.experts.linear_fc2.weight",
        _ungroup_fc2,
    ),
    # Norms are named as Transformer Engine names them: fused, except before experts.
    _Spelling(
        _in_layer(r"input_layernorm\.weight"),
        r"\g<layer>self_attention.linear_qkv.layer_norm_weight",
    ),
    _Spelling(
        _in_layer(r"mlp\.linear_fc1\.layer_norm_weight"),
        r"\g<layer>pre_mlp_layernorm.weight",
        has_experts=True,
    ),
    _Spelling(
        _in_layer(r"pre_mlp_layernorm\.weight"),
        r"\g<layer>mlp.linear_fc1.layer_norm_weight",
        has_experts=False,
    ),
    # every other name is that of the table
    _Spelling(re.compile(r"(?s:.*)"), r"\g<0>"),
)


@dataclass(frozen=True)
class _Stored:
    """The stored tensors that make one tensor of the table."""

    names: tuple[str, ...]
    join: Callable[[list[Tensor], int], Tensor] = _only
    num_experts: int = 0


class CanonicalReader:
    """A checkpoint under the names of the conversion table.

    Args:
        reader: the checkpoint under its own names.
        l1_coeff: whether to give every router the coefficient at the model's root.

    Attributes:
        meta: a tensor without values for every name, which has the shape and the dtype.

    Raises:
        ValueError: an expert is missing, a tensor is there twice or does not fit its layer's number
            of experts, or there is no coefficient.
    """

    def __init__(self, reader: Reader, *, l1_coeff: bool = False) -> None:
        self._reader = reader
        self._stored = dict(self._resolve())
        if l1_coeff:
            for router in filter(_ROUTER.fullmatch, reader.meta):
                name = router.removesuffix("weight") + "l1_coeff"
                self._stored[name] = _Stored((COEFFICIENT,))
        self.meta = {name: self._join_meta(stored) for name, stored in self._stored.items()}

    def _resolve(self) -> Iterator[tuple[str, _Stored]]:
        routers = [match for n in self._reader.meta if (match := _ROUTER.fullmatch(n))]
        num_experts = {m["layer"]: sum(self._reader.meta[m[0]].shape[:1]) for m in routers}
        with_experts = {m["layer"] for n in self._reader.meta if (m := _OF_EXPERTS.fullmatch(n))}
        found: dict[str, tuple[_Spelling, int, dict[int, str]]] = {}
        for name in self._reader.meta:
            if name == COEFFICIENT:
                continue
            spelling, match = _spelling_of(name, with_experts)
            groups = match.groupdict()
            experts = num_experts.get(groups.get("layer", ""), 0)
            key = match.expand(spelling.ours)
            first, _, by_expert = found.setdefault(key, (spelling, experts, {}))
            number = int(groups.get("expert", 0))
            if first.join is not spelling.join or number in by_expert:
                raise ValueError(
                    f"the checkpoint has {key} twice, the second time as {name}; save it again "
                    f"with one of them"
                )
            by_expert[number] = name
        for key, (spelling, experts, by_expert) in found.items():
            for number in range(len(by_expert)):
                if number not in by_expert:
                    raise ValueError(f"{key}: the checkpoint lacks expert {number}; copy it again")
            names = tuple(by_expert[number] for number in sorted(by_expert))
            yield key, _Stored(names, spelling.join, experts)

    def _join_meta(self, stored: _Stored) -> Tensor:
        """Return a tensor without values, which has the shape and the dtype of a joined one."""
        parts = [
            self._coefficient.to("meta") if part == COEFFICIENT else self._reader.meta[part]
            for part in stored.names
        ]
        try:
            return stored.join(parts, stored.num_experts)
        except (RuntimeError, ValueError) as error:
            shapes = " and ".join(sorted({str(list(part.shape)) for part in parts}))
            raise ValueError(
                f"{stored.names[0]} has shape {shapes}, which is not that of the experts of a "
                f"layer with {stored.num_experts} experts in its router; take a whole checkpoint"
            ) from error

    @cached_property
    def _coefficient(self) -> Tensor:
        if COEFFICIENT in self._reader.meta:
            return self._reader.read(COEFFICIENT).float()
        value = (self.common.get("model") or {}).get(COEFFICIENT)
        if value is None:
            raise ValueError(
                f"the checkpoint routes with ReLU but has no {COEFFICIENT}; take one that the "
                f"published implementation saved with its model"
            )
        return torch.as_tensor(value, dtype=torch.float32)

    @property
    def common(self) -> dict[str, Any]:
        """What the checkpoint holds beside tensors."""
        return self._reader.common

    @property
    def is_renamed(self) -> bool:
        """Whether a name in the checkpoint differs from that of the table."""
        return any(stored.names != (name,) for name, stored in self._stored.items())

    def read(self, name: str) -> Tensor:
        """Return a tensor, made from all stored ones that it consists of."""
        stored = self._stored[name]
        parts = [
            self._coefficient if part == COEFFICIENT else self._reader.read(part)
            for part in stored.names
        ]
        return stored.join(parts, stored.num_experts)


def _spelling_of(name: str, with_experts: set[str]) -> tuple[_Spelling, re.Match[str]]:
    matches = ((spelling, spelling.pattern.fullmatch(name)) for spelling in _SPELLINGS)
    return next(
        (spelling, match)
        for spelling, match in matches
        if match and spelling.has_experts in (None, match.groupdict().get("layer") in with_experts)
    )
