"""See what our operations launch in Triton, on tensors of any device, without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from remoe.kernels.backend import INTERPRETER, has_triton, is_interpreted

Record = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def recorded_launches(record: Record) -> Iterator[None]:
    """Hand every launch of our kernels to `record`, and run none of them.

    Args:
        record: is called with the kernel, its arguments, and its keywords.

    Raises:
        ValueError: Triton is not installed, or interprets kernels, which it then does not launch.
    """
    if not has_triton():
        raise ValueError("Triton is not installed; install it (torch's CUDA wheels bring it)")
    if is_interpreted():
        raise ValueError(f"{INTERPRETER} is set, so that nothing is launched; unset it")
    from remoe.kernels import jit

    kernels = [kernel for kernel in vars(jit).values() if hasattr(kernel, "arg_names")]
    try:
        for kernel in kernels:
            kernel.run = _Recorder(kernel, record)
        yield
    finally:
        for kernel in kernels:
            del kernel.run


class _Recorder:
    """Takes the place of a kernel's `run`."""

    def __init__(self, kernel: Any, record: Record) -> None:
        self.kernel, self.record = kernel, record

    def __call__(self, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        self.record(self.kernel, args, keywords)
