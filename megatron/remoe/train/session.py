"""What surrounds Megatron's `pretrain` in our entry point, and in any script that asks for it."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.remoe import checkpoint, processes
from megatron.remoe.train import resume, saved
from megatron.remoe.train.metrics import MetricsWriter
from megatron.remoe.train.step import FinalizeStep


@contextmanager
def running(args: argparse.Namespace, hook: FinalizeStep) -> Iterator[None]:
    """Let a run keep its promises (docs/reliability.md): wrap it around Megatron's `pretrain`.

        hook = remoe.configure(model_config, args)
        with remoe.running(args, hook):
            pretrain(...)

    It locks the folder of checkpoints and continues from the last one that is whole, writes
    `--metrics-file`, keeps `--save-keep-last` checkpoints, and says when the disk is full. A rank
    that fails ends at once, and with it everything that it has started; it ends with torchrun too.
    The context manager also decorates: `pretrain = remoe.running(args, hook)(pretrain)`.

    A mistake of the user ends the process with one line and code 2.

    Args:
        args: Megatron's, parsed with our arguments.
        hook: what `configure` returned.
    """
    if processes.PARENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        processes.end_with_parent()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:  # inherited from `megatron.remoe.agent`
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.end_children_with_me()
    with processes.exit_at_once(args.rank):
        with processes.mistakes_in_one_line():
            _choose_checkpoint(args)
        MetricsWriter.install(args, hook)
        with checkpoint.retention(args), resume.explained(args):
            yield


def _choose_checkpoint(args: argparse.Namespace) -> None:
    """Choose the checkpoint, and check one that `configure` has not seen."""
    seen = saved.to_be_loaded(args)
    chosen = resume.prepare(args)
    if chosen is not None and chosen != seen:
        saved.check(args, saved.read(chosen))
