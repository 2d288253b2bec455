"""torchrun as `remoe train` and `launch` start it: it ends with its parent and ignores SIGTERM.

    python -m megatron.remoe.agent --standalone --nproc-per-node 2 -m megatron.remoe.pretrain ...

torchrun alone would end the ranks some seconds after SIGTERM, whether they have saved or not. The
ranks get its process id, so that they notice if it has ended before they could watch it.

SIGUSR1, by which `remoe launch` stops its ranks, would end torchrun at once. Shells and Slurm may
send it to all processes of a run, so it is ignored here, and by the ranks until they listen to it.
"""

import os
import signal

from megatron.remoe import processes


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    processes.end_with_parent()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ[processes.PARENT] = str(os.getpid())
    from torch.distributed import run

    run.main()


if __name__ == "__main__":
    main()
