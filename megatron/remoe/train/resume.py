"""Before a run starts: check that it may write, and choose the checkpoint to continue from."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.remoe import checkpoint, processes


def prepare(args: argparse.Namespace) -> Path | None:
    """Make sure that a run may write its checkpoints, and choose the one to continue from.

    Only rank 0 does so, before the process groups are made: the other ranks wait for it there, and
    read the tracker afterwards. Checkpoints after the chosen one that are incomplete, because their
    save was killed, are deleted.

    Args:
        args: Megatron's arguments, with ours.

    Returns:
        The checkpoint; None on other ranks, or if there is no checkpoint yet.

    Raises:
        ValueError: another run writes there, or no checkpoint is whole.
    """
    if args.rank != 0:
        return None
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        processes.hold_lock(Path(args.save) / ".lock", args.save)
    folder = Path(args.load) if args.load else None
    if folder is None or _is_release(folder) or (chosen := _chosen(args, folder)) is None:
        return _start(args, folder)
    print(f"remoe: continuing from {chosen.path}", flush=True)
    is_ours = args.save and folder.resolve() == Path(args.save).resolve()
    if is_ours and not args.ckpt_step:
        for other in checkpoint.find(folder):
            if other.iteration > chosen.iteration and not other.is_complete:
                shutil.rmtree(other.path)
    if not args.ckpt_step and checkpoint.tracked(folder) != chosen.iteration:
        if not is_ours:
            raise ValueError(
                f"load: the last checkpoint of {folder} is damaged; pass ckpt_step="
                f"{chosen.iteration} to load the last one that is whole"
            )
        print(f"remoe: warning: continuing from iteration {chosen.iteration} instead", flush=True)
        checkpoint.write_tracker(folder, chosen.iteration)
    return chosen.path


@contextmanager
def explained(args: argparse.Namespace) -> Iterator[None]:
    """Say that the disk is full when the run fails and there is no room for a checkpoint."""
    try:
        yield
    except BaseException:  # torch's CheckpointException is not an Exception
        folder = Path(args.save) if args.save else None
        complete = [c for c in checkpoint.find(folder) if c.is_complete] if folder else []
        if args.rank == 0 and complete:
            free, size = shutil.disk_usage(args.save).free, complete[-1].size
            if free < size:
                print(
                    f"remoe: error: {args.save} has {free / 1e6:.1f} MB left, and a checkpoint has "
                    f"{size / 1e6:.1f} MB; make room, and the same command continues",
                    flush=True,
                )
        raise


def _chosen(args: argparse.Namespace, folder: Path) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that `ckpt_step` names, or the last one that is whole."""
    if args.ckpt_step:
        named = [c for c in checkpoint.find(folder) if c.iteration == args.ckpt_step]
        if not named:
            there = ", ".join(str(c.iteration) for c in checkpoint.find(folder)) or "none"
            raise ValueError(
                f"ckpt_step: {folder} has no iteration {args.ckpt_step} (it has {there})"
            )
        if named[0].damage:
            raise ValueError(
                f"ckpt_step: checkpoint {named[0].path} is damaged: {'; '.join(named[0].damage)}; "
                f"choose another"
            )
        return named[0]

    def warn(message: str) -> None:
        print(f"remoe: warning: {message}", flush=True)

    return checkpoint.choose(folder, need_manifest=args.verify_integrity, warn=warn)


def _is_release(folder: Path) -> bool:
    path = checkpoint.tracked_path(folder)
    return path is not None and path.name == checkpoint.RELEASE


def _start(args: argparse.Namespace, load: Path | None) -> Path | None:
    """Return the checkpoint to start a new run from.

    One that is damaged, or that has no manifest where one is needed, is refused.
    """
    folder, flag = args.pretrained_checkpoint, "pretrained_checkpoint"
    if load is not None and _is_release(load):
        folder, flag = load, "load"
    if folder is None:
        return None
    path = checkpoint.tracked_path(Path(folder))
    if path is None:
        raise ValueError(f"{flag}: {folder} is no folder of checkpoints (no {checkpoint.TRACKER})")
    start = checkpoint.Checkpoint(path, 0)
    if args.verify_integrity:
        checkpoint.check_has_manifest(start)
    if start.damage:
        raise ValueError(f"{flag}: checkpoint {path} is damaged: {'; '.join(start.damage)}")
    return path
