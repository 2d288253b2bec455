"""The entry point with a fault: FAULT=hang|nan|inf in a step of the last rank, or
FAULT=slow-writer in the process that writes checkpoints.
"""

import os
import sys
import time

from megatron.remoe import cpu, pretrain, processes

STEP = 8  # forward passes before the fault; a step has several
SECONDS = 6  # that a writer of checkpoints waits


def break_a_step() -> None:
    forward_step, calls = pretrain.forward_step, iter(range(10**6))
    fault = os.environ["FAULT"]

    def faulty(data_iterator, model):
        is_broken = next(calls) >= STEP
        while is_broken and fault == "hang":
            time.sleep(1)
        output, loss_func = forward_step(data_iterator, model)
        return output * float(fault) if is_broken else output, loss_func

    pretrain.forward_step = faulty


def slow_the_writer_down() -> None:
    cpu.enable()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data_multithread

    def slow(*args):
        time.sleep(SECONDS)
        write(*args)

    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(slow)


if __name__ == "__main__":
    if os.environ["FAULT"] == "slow-writer":
        slow_the_writer_down()
    elif os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        break_a_step()
    sys.exit(pretrain.main())
elif __name__ == "__mp_main__":
    processes.end_with_parent()
