"""Buffers that keep their exact value when a module is cast to another dtype."""

from collections.abc import Callable
from typing import Any

import torch


class ExactBuffers(torch.nn.Module):
    """A module whose buffers move between devices but are never cast.

    `model.bfloat16()` would round a coefficient to 8 bits and lose the steps of its controller.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExactBuffers":
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if buffer.is_meta:  # being materialized: there is no value to keep yet
                setattr(self, name, moved.to(buffer.dtype))
            else:
                setattr(self, name, buffer.to(moved.device))
        return self
