"""Run Megatron on a machine without a GPU: the CPU plays the part of `torch.cuda`.

Megatron asks for CUDA by name: it wants tensors on `device="cuda"`, streams, and the CUDA random
state. `enable()` answers those calls with the CPU, so that the stock training loop runs unchanged
over gloo. Apart from the fixes in `compat`, no other module replaces functions of other packages.
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

_CPU = torch.device("cpu")
_enabled = False


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Event(_Stream):
    _recorded = 0.0  # seconds

    def record(self, stream: object = None) -> None:
        self._recorded = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end._recorded - self._recorded)  # milliseconds, as CUDA's

    def wait(self, stream: object = None) -> None:
        pass


@contextlib.contextmanager
def _stream(stream: object) -> Iterator[None]:
    yield


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces `device="cuda"` by the CPU in factory calls and in `.to(...)`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = _CPU
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _splits_as_on_cuda(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Copy splits to the host as Megatron does, where gloo accepts no CPU tensors as splits."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def is_enabled() -> bool:
    """Return whether the CPU stands in for CUDA in this process."""
    return _enabled


def has_gpu() -> bool:
    """Return whether there is a real GPU, not the stand-in."""
    return not _enabled and torch.cuda.is_available()


def prepare_megatron() -> None:
    """Let the CPU stand in where there is no GPU; call it before importing `megatron.core`."""
    silence_megatron()
    if not torch.cuda.is_available():
        enable()


def silence_megatron() -> None:
    """Hide the warnings that importing Megatron prints without a GPU or Transformer Engine."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.(core|training)")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def enable() -> None:
    """Make the CPU stand in for CUDA in this process; call it before importing `megatron.core`.

    Raises:
        RuntimeError: this machine has a GPU, where Megatron needs no stand-in.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron.remoe.cpu.enable() was called on a machine with a GPU; hide the GPU with "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    _enabled = True
    # Megatron's jit_fuser is torch.compile, and compiling dozens of tiny functions for a CPU
    # costs more than it saves.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from torch import _dynamo

    _dynamo.config.disable = True

    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    # From compute capability 10 on, Megatron does not ask for CUDA_DEVICE_MAX_CONNECTIONS.
    properties = SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=1)
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (10, 0)
    cuda.device_memory_used = lambda device=None: 0
    cuda.is_current_stream_capturing = lambda: False  # optimizers ask; CUDA would have no device

    cuda.Stream, cuda.Event = _Stream, _Event
    default_stream = _Stream()
    cuda.current_stream = cuda.default_stream = lambda device=None: default_stream
    cuda.stream, cuda.set_stream = _stream, lambda stream: None

    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.manual_seed = module.manual_seed_all = torch.default_generator.manual_seed
    # The data loaders and the pinned memory of torch itself must still see no accelerator.
    torch.accelerator.is_available = lambda: False

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:  # Megatron compares the answer with "torch.cuda.FloatTensor"
            return "torch.cuda." + tensor_type(self).rpartition(".")[2]
        return tensor_type(self, dtype, **kwargs)

    torch.Tensor.type = cuda_type  # type: ignore[method-assign, assignment]
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]

    make_iterator = DataLoader.__iter__

    def iterate(self: DataLoader[Any]) -> Any:
        # A loader draws a seed for its workers. On a GPU machine dropout draws from another
        # generator. Here dropout must not depend on when iterators are made, or a resumed run
        # would differ.
        state = torch.get_rng_state()
        iterator = make_iterator(self)
        torch.set_rng_state(state)
        return iterator

    DataLoader.__iter__ = iterate  # type: ignore[method-assign]

    import megatron.core.tensor_parallel.random as megatron_random

    def set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random._set_cuda_rng_state = set_rng_state
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_on_cuda
    # Megatron warns when a "CUDA" random state changes the CPU's, which is the same one here.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
