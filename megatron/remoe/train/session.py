"""The context around Megatron's `pretrain`, once `configure` has made the hook."""

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
    """Wrap Megatron's `pretrain`, so that the run is as reliable as docs/reliability.md says.

        hook = remoe.configure(model_config, args)
        with remoe.running(args, hook):
            pretrain(...)

    `remoe.training` is both in one line.

    The run locks the folder of checkpoints and continues from the last checkpoint that is whole,
    writes `--metrics-file`, keeps `--save-keep-last` checkpoints, and says when the disk is full. A
    rank that fails ends at once, together with everything that it has started; it also ends when
    torchrun does. The context manager is a decorator as well:
    `pretrain = remoe.running(args, hook)(pretrain)`.

    A mistake of the user ends the process with one line and code 2.

    Args:
        args: Megatron's arguments, parsed with ours.
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
    """Choose the checkpoint, and check it unless `configure` has done so."""
    seen = saved.to_be_loaded(args)
    chosen = resume.prepare(args)
    if chosen is not None and chosen != seen:
        saved.check(args, saved.read(chosen))
