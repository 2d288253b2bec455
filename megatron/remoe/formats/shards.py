"""How Megatron splits a model over ranks, and the tensors that the parts of all ranks make.

Tensor-parallel ranks split the weights of linears and embeddings, expert-parallel ranks have
neighboring experts, and pipeline stages have layers that are numbered from zero in each. Every
other tensor is the same on all ranks that have it.

Shapes: E experts, H hidden, F expert width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = Sequence[Sequence[Tensor]]  # one tensor's parts by expert-parallel and tensor-parallel rank


@dataclass(frozen=True)
class _Split:
    """How a tensor is split.

    Attributes:
        pattern: matches the tensor's name; the group `expert` is its number on its rank.
        dim: the dimension that tensor-parallel ranks split.
        is_gated: whether each rank has a part of the gate's rows above a part of the others.
        has_experts: whether the first dimension is that of the rank's experts.
        folded: the dimension that experts share with another one, as in the old grouped GEMM.
    """

    pattern: re.Pattern[str]
    dim: int
    is_gated: bool = False
    has_experts: bool = False
    folded: int | None = None


def _named(pattern: str, dim: int, **settings: bool | int) -> _Split:
    return _Split(re.compile(pattern), dim, **settings)  # type: ignore[arg-type]


_ONE = (
    r".*\.mlp\.experts\.(?:local_experts\.(?P<expert>\d+)\.{0}\.weight|{0}\.weight(?P<number>\d+))"
)
_SPLITS = (
    _named(r"embedding\.word_embeddings\.weight|output_layer\.weight", 0),
    _named(r".*\.self_attention\.linear_qkv\.weight", 0),  # whole groups of heads
    _named(r".*\.self_attention\.linear_proj\.weight", 1),
    # a single expert
    _named(_ONE.format("linear_fc1"), 0, is_gated=True),
    _named(_ONE.format("linear_fc2"), 1),
    # the modules of `megatron.remoe.moe.experts`: `[E, 2F, H]` and `[E, H, F]`
    _named(r".*\.mlp\.experts\.linear_fc1", 1, is_gated=True, has_experts=True),
    _named(r".*\.mlp\.experts\.linear_fc2", 2, has_experts=True),
    # the old grouped GEMM: `[H, E * 2F]`, in memory `[E, H, 2F]`; and `[E * F, H]`
    _named(r".*\.mlp\.experts\.weight1", 2, is_gated=True, has_experts=True, folded=1),
    _named(r".*\.mlp\.experts\.weight2", 1, has_experts=True, folded=0),
    # dense layers and shared experts
    _named(r".*\.linear_fc1\.weight", 0, is_gated=True),
    _named(r".*\.linear_fc2\.weight", 1),
)
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)", re.DOTALL)
_EXPERT = re.compile(
    r"(.*\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)", re.DOTALL
)


def layer_of(name: str) -> int | None:
    """Return the number of a tensor's layer in its stage, or None outside of layers."""
    match = _LAYER.fullmatch(name)
    return int(match[2]) if match else None


def with_layer(name: str, offset: int) -> str:
    """Return a name with its layer's number in the model, given the layers before the stage."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{int(match[2]) + offset}{match[3]}" if match else name


def expert_of(name: str) -> int | None:
    """Return the number of a single expert on its rank, or None for any other tensor."""
    match = _EXPERT.fullmatch(name)
    return int(match[2]) if match else None


def with_expert(name: str, offset: int) -> str:
    """Return a single expert's name with its number in the model."""
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}{int(match[2]) + offset}{match[3]}" if match else name


def join(name: str, grid: Grid, *, is_gated: bool, num_local_experts: int) -> Tensor:
    """Return the tensor that the parts of all ranks make.

    Args:
        name: the tensor's name.
        grid: its parts, one list of the tensor-parallel ranks' for every expert-parallel rank. A
            single expert is on one expert-parallel rank.
        is_gated: whether MLPs are gated, as SwiGLU is.
        num_local_experts: the experts of a rank in the tensor's layer, 0 if it has none.

    Raises:
        ValueError: parts that should be equal differ, or have shapes that cannot be joined.
    """
    if len(grid) == 1 and len(grid[0]) == 1:
        return grid[0][0]
    split = next((one for one in _SPLITS if one.pattern.fullmatch(name)), None)
    if split is None:
        return _the_same(name, [part for parts in grid for part in parts])
    try:
        if split.has_experts:
            return _join_experts(split, grid, is_gated, num_local_experts)
        return _the_same(name, [_join_ranks(split, parts, is_gated) for parts in grid])
    except (RuntimeError, IndexError) as error:
        shape = list(grid[0][0].shape)
        raise ValueError(
            f"{name} has shape {shape} on each rank, which its ranks cannot have; take a whole "
            f"checkpoint"
        ) from error


def _the_same(name: str, copies: Sequence[Tensor]) -> Tensor:
    first = copies[0]
    if not first.is_meta and not all(torch.equal(first, other) for other in copies[1:]):
        raise ValueError(
            f"{name} must be the same on all ranks, and differs; the files are of different "
            f"checkpoints, or the run's ranks had diverged"
        )
    return first


def _join_ranks(split: _Split, parts: Sequence[Tensor], is_gated: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if not (split.is_gated and is_gated):
        return torch.cat(list(parts), dim=split.dim)
    halves = [part.chunk(2, dim=split.dim) for part in parts]
    return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)], dim=split.dim)


def _join_experts(split: _Split, grid: Grid, is_gated: bool, num_local: int) -> Tensor:
    if split.folded is None:
        return torch.cat([_join_ranks(split, parts, is_gated) for parts in grid])
    # The dimension of F cannot be told from that of the experts, so H keeps its place.
    hidden = grid[0][0].shape[1 - split.folded]
    unfolded = (num_local, hidden, -1) if split.folded == 1 else (num_local, -1, hidden)
    whole = torch.cat(
        [_join_ranks(split, [p.reshape(unfolded) for p in parts], is_gated) for parts in grid]
    )
    return whole.reshape(hidden, -1) if split.folded == 1 else whole.reshape(-1, hidden)
