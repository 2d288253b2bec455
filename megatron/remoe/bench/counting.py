"""Count what operations would launch on a GPU, and the bytes that they read and write."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations without a kernel, beside views and what returns no tensor.
_NO_KERNEL = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view,
}  # fmt: skip
# Operations that read nothing of the tensor that they are given.
_FILLS = {
    aten.new_zeros, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like, aten.zero_,
    aten.fill_,
}  # fmt: skip


@dataclass(frozen=True)
class Count:
    """What was counted: launches of kernels, and bytes of their inputs and outputs."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.launches + other.launches, self.bytes + other.bytes)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that is not a view, with the bytes of its inputs and outputs.

    An operation counts as one launch, though sorts and running sums take several, and a tensor
    counts as a whole, though an operation may read a part of it.

    Args:
        num_pairs: what `nonzero` would find in fake tensors, which have no values. Real tensors
            need none.
    """

    def __init__(self, num_pairs: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_pairs = num_pairs
        self.count = Count()

    def add(self, *values: Any) -> None:
        """Count a launch with these inputs and outputs, which may be anything."""
        moved = sum(t.numel() * t.element_size() for t in _tensors(values))
        self.count += Count(1, moved)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.overloadpacket is aten.nonzero and self.num_pairs is not None:
            result = args[0].new_empty((self.num_pairs, args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        if _tensors(result) and not func.is_view and func.overloadpacket not in _NO_KERNEL:
            self.add(*(() if func.overloadpacket in _FILLS else (args, kwargs)), result)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
