"""torchrun as this project starts it: its command, its environment, and how it is stopped."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.remoe import processes


def command(
    argv: list[str],
    nproc: int,
    *,
    nodes: int = 1,
    name: str = "",
    endpoint: str = "",
    has_parent: bool = True,
) -> list[str]:
    """Return the command that runs torchrun on each machine of a run.

    Args:
        argv: The command line of every process.
        nproc: Number of processes on each machine.
        nodes: Number of machines.
        name: Name of the rendezvous, the same on all machines of a run and on no other's.
        endpoint: `host:port` of one of the machines, which a single machine does not need.
        has_parent: Whether a `remoe` command starts it and ends with it. Otherwise the command is
            for a shell.
    """
    module, meeting = "torch.distributed.run", ["--standalone"]
    if nodes > 1:
        meeting = [
            f"--nnodes={nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={name}",
            f"--rdzv-endpoint={endpoint}",
        ]
    options = [*meeting, f"--nproc-per-node={nproc}"]
    if has_parent:
        module = "megatron.remoe.agent"
        options.append("--signals-to-handle=SIGINT,SIGHUP,SIGQUIT")
    python = [sys.executable, "-W", "ignore", "-m"]
    return [*python, module, *options, "-m", "megatron.remoe.pretrain", *argv]


def launch_environment() -> dict[str, str]:
    """Return the variables that Megatron needs in a launched run, unless they are set already."""
    needed = {
        # Communication starts in the order of its launch only if each device has one queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # This is torchrun's own default, which it would announce with a warning.
        "OMP_NUM_THREADS": "1",
    }
    return needed | {name: os.environ[name] for name in needed if name in os.environ}


def cpu_environment(nproc: int) -> dict[str, str]:
    """Return the variables that make torch fast on a CPU, for every process of a run.

    Threads are divided among the processes, large tensors get huge pages, and freed memory is kept
    for the next step: otherwise activations and gradients of many experts are new memory in every
    step, and touching it for the first time costs more than writing to it. The last three variables
    are for glibc and have no effect elsewhere.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
    }


def start(
    words: list[str], environment: dict[str, str], *, lock: int | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process.

    Args:
        words: The command.
        environment: Variables that are not set in this process's environment.
        lock: File descriptor of a lock that the command and its children hold.
        options: Further options of `Popen`.
    """
    return subprocess.Popen(
        words,
        env=environment | os.environ | {processes.PARENT: str(os.getpid())},
        pass_fds=() if lock is None else (lock,),
        **options,
    )


class Stop:
    """A request to stop a run, which each rank is told once, as soon as it listens.

    A second signal would kill a rank that has saved, because Python gives up its handlers when it
    exits.

    Attributes:
        requested: Whether the request has been made.
    """

    def __init__(self, *, requested: bool = False) -> None:
        self.requested = threading.Event()
        self._told: set[int] = set()
        if requested:
            self.requested.set()

    @contextmanager
    def when(self, *numbers: signal.Signals) -> Iterator[None]:
        """Make the request when this process receives one of these signals."""
        before = [signal.signal(number, lambda *_: self.requested.set()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def pass_on(self, torchrun: subprocess.Popen[bytes], flags: dict[str, Any]) -> None:
        """Tell the ranks that have not been told; kill a run that would not save.

        Args:
            torchrun: The run.
            flags: Flags of its config.
        """
        if not self.requested.is_set():
            return
        if not flags.get("exit_signal_handler"):
            torchrun.kill()
        number = signal.Signals[flags.get("exit_signal") or "SIGTERM"]
        for rank in processes.children(torchrun.pid):
            if rank not in self._told and processes.catches(rank, number):
                self._told.add(rank)
                os.kill(rank, number)
