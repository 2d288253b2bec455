"""A group of CPU ranks that lives as long as a test module and runs functions on all of them.

    @pytest.fixture(scope="module")
    def ranks():
        with Ranks(2) as ranks:
            yield ranks

    results = ranks.run(function, argument)   # function(argument) on every rank; list of results

Functions must be importable (at module level), and arguments and results must be picklable.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

_TIMEOUT_SECONDS = 300
_SECONDS_TO_END = 10
_store: Any = None  # the store of this process, when it is a rank
_generation = 0


class Ranks:
    """Processes with a gloo group, in which the CPU stands in for CUDA."""

    def __init__(self, size: int) -> None:
        try:
            self._start(size)
        except (ConnectionError, EOFError):
            # Gloo sometimes loses a connection while a loaded machine makes its first group.
            self.close()
            self._start(size)

    def _start(self, size: int) -> None:
        """Start the ranks, and wait until all of them have made their group.

        Raises:
            ConnectionError, EOFError: a rank has ended instead.
            AssertionError: a rank did not answer in time.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        context = multiprocessing.get_context("spawn")
        # This process serves it, so that no other program can take the port meanwhile.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes, self._calls = [], [], 0
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs))
            process.start()
            theirs.close()  # so that our end notices when the rank has ended
            self._pipes.append(ours)
            self._processes.append(process)
        starting = list(self._pipes)
        while starting:
            answered = connection.wait(starting, _TIMEOUT_SECONDS)
            assert answered, f"{len(starting)} of {size} ranks hang at their start"
            for pipe in answered:
                assert isinstance(pipe, connection.Connection)
                pipe.recv()
                starting.remove(pipe)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks and what they have started. A second call does nothing."""
        for pipe in self._pipes:
            pipe.close()  # a waiting rank ends, with the helpers that it has started
        for process in self._processes:
            process.join(_SECONDS_TO_END)
            assert process.pid is not None  # it was started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank and return the results by rank.

        Raises:
            AssertionError: a rank raised, or did not answer in time.
        """
        self._calls += 1
        for pipe in self._pipes:
            pipe.send((self._calls, function, args, kwargs))
        results = []
        for rank, pipe in enumerate(self._pipes):
            call = 0
            while call < self._calls:  # answers to a call in which another rank has failed
                assert pipe.poll(_TIMEOUT_SECONDS), f"rank {rank} hangs in {function.__name__}"
                call, ok, value = pipe.recv()
            assert ok, f"rank {rank}:\n{value}"
            results.append(value)
        return results


# A model that Megatron's DDP has wrapped stays alive, and so do its two dozen process groups, each
# with a polling thread of gloo. Therefore new ranks replace a pool after some runs, and sooner if
# the pool is idle.
_RUNS_PER_POOL = 8
_RUNS_OF_AN_IDLE_POOL = 3


class Pools:
    """Groups of ranks by size, which are started on first use and replaced after some runs."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}
        self._runs: Counter[int] = Counter()

    def __enter__(self) -> "Pools":
        return self

    def __exit__(self, *_: object) -> None:
        for world in list(self._ranks):
            self._close(world)

    def run(self, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank of a group of this size, as `Ranks.run` does."""
        for size in list(self._ranks):
            limit = _RUNS_PER_POOL if size == world else _RUNS_OF_AN_IDLE_POOL
            if self._runs[size] >= limit:
                self._close(size)
        if world not in self._ranks:
            self._ranks[world] = Ranks(world)
        self._runs[world] += 1
        try:
            return self._ranks[world].run(function, *args, **kwargs)
        except AssertionError:
            self._close(world)  # its ranks no longer wait for the same call
            raise

    def _close(self, world: int) -> None:
        self._ranks.pop(world).close()
        self._runs[world] = 0


def be_one_rank() -> None:
    """Make this process the only rank of a world, on its GPU or on the CPU in its place.

    `renew_groups` and `initialize_layout` work then as they do in the ranks of `Ranks`.
    """
    import torch

    global _store
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    _store = torch.distributed.HashStore()  # type: ignore[attr-defined]


def renew_groups() -> None:
    """Replace all process groups of this rank by a new world; every rank must call it.

    Only the rank that `be_one_rank` makes may have a GPU. Every gloo group keeps a polling thread,
    and Megatron makes two dozen groups per layout.
    """
    import torch
    from megatron.core import parallel_state

    from megatron.remoe import cpu

    global _generation
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    _generation += 1
    torch.distributed.init_process_group(
        "gloo" if cpu.is_enabled() else "nccl",
        store=torch.distributed.PrefixStore(str(_generation), _store),  # type: ignore[attr-defined]
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def initialize_layout(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    expert_tensor: int | None = None,
) -> None:
    """Make the process groups and random states of a layout, which replace the present ones."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    renew_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    import logging
    import warnings

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.setsid()  # so that the processes it starts can be ended with it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size)}
    from megatron.remoe import cpu

    cpu.enable()
    import torch

    logging.disable(logging.WARNING)
    # Megatron prints the size of every model it builds.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    torch.set_num_threads(1)
    global _store
    _store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False
    )
    renew_groups()
    pipe.send(None)
    while True:
        try:
            call, function, args, kwargs = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            pipe.send((call, True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((call, False, traceback.format_exc()))


def _end_with_parent(parent: int) -> None:
    """End this rank with its parent, which it would outlive if it hung in a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
