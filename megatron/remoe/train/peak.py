"""The peak of this process's memory since it was last asked for.

On a GPU this is what the allocator has handed out, and on a CPU the resident set. Linux keeps a
peak of it that can be reset; other systems know only the peak of the whole life of the process.
"""

import resource
import sys
from pathlib import Path

import torch

from megatron.remoe import cpu

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Return the peak since `reset`, or since the start."""
    if cpu.has_gpu():
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():
        return _status("VmHWM")
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def reset() -> int:
    """Reset the peak to the current usage, and return it."""
    if cpu.has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    try:
        _CLEAR.write_text("5")
    except OSError:  # on another system, or in a container that forbids it
        return peak_bytes()
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
