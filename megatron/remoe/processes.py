"""Processes of a run: none outlives the one that started it, and no two runs share a directory.

The kernel ensures both, by a death signal and a lock, so that they hold after kill -9 as well.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

PARENT = "REMOE_PARENT_PID"  # environment variable with the id of the process that starts this one
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when the one that started it ends. Linux only.

    It ends this process now if that has already happened.

    Args:
        parent: the process that started this one; None takes the one that the environment names.
    """
    _set_death_signal()
    expected = parent or os.environ.get(PARENT)
    if expected and os.getppid() != int(expected):
        os._exit(1)


def end_children_with_me() -> None:
    """Let every process that this one forks end with it: data loaders, writers of checkpoints."""
    os.environ.pop(PARENT, None)
    parent = os.getpid()

    def in_child() -> None:
        nonlocal parent
        _set_death_signal()
        if os.getppid() != parent:  # the parent ended before this process could watch it
            os._exit(1)
        parent = os.getpid()

    os.register_at_fork(after_in_child=in_child)


def _set_death_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the running processes that a process has started. Linux only."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed a handler for a signal. Linux only."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def hold_lock(path: Path, subject: object) -> int:
    """Lock a file until this process and the children that share it have ended.

    Args:
        path: the file, which is made if it does not exist.
        subject: what the message says is in use.

    Returns:
        The file descriptor. Closing it gives the lock back, and a child may inherit it.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise ValueError(
            f"{subject} is in use by a run ({owner}); wait until it ends or stop it, or give this "
            f"run its own directory (run_dir=PATH)"
        ) from None
    os.ftruncate(lock, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
    return lock


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End this process with code 2 and one line when what the user asked for is refused."""
    try:
        yield
    except ValueError as error:
        _end(2, f"remoe: error: {error}")


@contextlib.contextmanager
def exit_at_once(rank: int) -> Iterator[None]:
    """End this process without cleaning up when it fails, so that nothing can delay its end.

    With Megatron's exit-signal handler the data loaders ignore SIGTERM. Python would wait for them,
    and the other ranks would wait for this one.

    Args:
        rank: the rank of this process, which the message names.
    """
    try:
        yield
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        code = end.code if isinstance(end.code, int) else 1
        _end(code, f"remoe: error: rank {rank} ended with code {code}")
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        _end(
            1,
            traceback.format_exc(),
            f"remoe: error: rank {rank}: {type(error).__name__}: {lines[0]}",
        )


def _end(code: int, *messages: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not delay the end either
        for message in messages:  # each in one write, because all ranks write to one file
            sys.stdout.write(f"{message}\n")
            sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
