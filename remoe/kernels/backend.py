"""Which kernels run: those in Triton, or plain torch.

The environment variable REMOE_KERNELS decides: `triton`, `torch`, or `auto` (the default), which
takes Triton on a GPU where it is installed, for the operations that were measured to be faster in
it. This is the one place that imports Triton, which `remoe` does not need; torch's CUDA wheels
bring it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

VARIABLE = "REMOE_KERNELS"
CHOICES = ("auto", "torch", "triton")
INTERPRETER = "TRITON_INTERPRET"  # Triton's own variable: kernels run in numpy, on CPU tensors

Operation = Literal["router", "permutation", "gather", "sum by token", "SwiGLU"]
# What `auto` runs in Triton. On an H200 router and gather were slower than torch at some of the
# sizes that were measured (docs/performance.md), because starting a kernel takes Triton longer than
# torch. The SwiGLU has not been timed on a GPU.
FASTER: frozenset[Operation] = frozenset({"permutation", "sum by token"})


def uses_triton(tensor: Tensor, operation: Operation) -> bool:
    """Return whether an operation on a tensor runs as Triton kernels.

    Raises:
        ValueError: REMOE_KERNELS has a value that is not known, or asks for Triton where it cannot
            run.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}; set it to one of {', '.join(CHOICES)}")
    # Only plain tensors have memory that a kernel can take; a FakeTensor, for one, has none.
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if choice == "torch" or not plain:
        return False
    on_gpu = tensor.device.type == "cuda"
    if choice == "auto":
        return on_gpu and operation in FASTER and has_triton()
    if not has_triton():
        raise ValueError(f"{VARIABLE} is triton, but Triton is not installed; install it, or unset")
    if not on_gpu and not is_interpreted():
        raise ValueError(
            f"{VARIABLE} is triton, but a tensor is on {tensor.device.type}; move it to a GPU, set "
            f"{INTERPRETER}=1, or unset {VARIABLE}"
        )
    return True


@contextmanager
def forced(choice: str) -> Iterator[None]:
    """Run the operations as a value of REMOE_KERNELS says, for a while."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def can_run_triton(device: str) -> bool:
    """Return whether kernels in Triton can run on a kind of device, `cuda` or `cpu`."""
    return has_triton() and (device == "cuda" or is_interpreted())


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels, as it decides when it is imported."""
    return os.environ.get(INTERPRETER, "0") in ("1", "true", "on", "yes", "y")


def import_triton() -> tuple[Any, Any]:
    """Return Triton and its language, or None twice where it is not installed."""
    if not has_triton():
        return None, None
    import triton
    import triton.language

    return triton, triton.language


def jit[F: Callable[..., Any]](kernel: F) -> Any:
    """Mark a function as a Triton kernel, where Triton is installed."""
    triton, _ = import_triton()
    return kernel if triton is None else triton.jit(kernel)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, on which Triton launches kernels."""
    if tensor.device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(tensor.device)
