"""Checkpoints of a run on disk: which exist, whether they are whole, and which to keep.

Megatron writes `iter_0000123/` with `metadata.json` as its last data file, then with
`--verify-integrity` the SHA-256 of every file to `integrity.json`, and then the iteration to
`latest_checkpointed_iteration.txt`, its tracker. It overwrites the tracker and fills the directory
in place, so that a kill or a full disk may leave either of them half written. With this module a
run finds the last checkpoint that is whole before it starts.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # in the tracker and as a directory: weights without a known iteration
_MANIFEST = "integrity.json"
_SECONDS_BETWEEN_PRUNES = 2.0


@dataclass(frozen=True)
class Checkpoint:
    """One `iter_*` directory.

    Attributes:
        path: its directory.
        iteration: the number of training steps before it was written.
    """

    path: Path
    iteration: int

    @property
    def is_complete(self) -> bool:
        """Whether all its data was written. A manifest may still be missing."""
        return (self.path / "metadata.json").is_file()

    @property
    def has_manifest(self) -> bool:
        """Whether there is a manifest with the hashes of its files."""
        return (self.path / _MANIFEST).is_file()

    @property
    def size(self) -> int:
        """Size of its files in bytes."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    @cached_property
    def damage(self) -> list[str]:
        """What differs from the manifest, by file; empty also if there is no manifest."""
        if not self.has_manifest:
            return []
        try:
            hashes = json.loads((self.path / _MANIFEST).read_text())["files"]
        except (ValueError, KeyError, TypeError):
            return [f"{_MANIFEST} is not readable"]
        with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
            found = pool.map(self._compare, hashes, hashes.values())
        return [problem for problem in found if problem]

    def _compare(self, name: str, expected: str) -> str | None:
        try:
            with (self.path / name).open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if actual == expected else f"{name} has changed since it was written"


def find(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints of a folder, complete or not, by iteration."""
    if not folder.is_dir():
        return []
    matches = [(path, re.fullmatch(r"iter_(\d{7,})", path.name)) for path in folder.iterdir()]
    found = [Checkpoint(path, int(match[1])) for path, match in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.iteration)


def tracked(folder: Path) -> int | None:
    """Return the iteration that Megatron's tracker names, or None without a readable tracker."""
    text = _tracker_text(folder)
    return int(text) if text.isascii() and text.isdigit() else None


def tracked_path(folder: Path) -> Path | None:
    """Return the directory that the tracker names: an iteration's, or that of a release."""
    if _tracker_text(folder) == RELEASE:
        return folder / RELEASE
    iteration = tracked(folder)
    return None if iteration is None else folder / f"iter_{iteration:07d}"


def _tracker_text(folder: Path) -> str:
    path = folder / TRACKER
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def folder_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints, also when the run was moved or copied with them.

    Raises:
        ValueError: `run` is neither a run directory nor a folder of checkpoints.
    """
    config = run / "config.yaml"
    if config.is_file():
        try:
            flags = yaml.safe_load(config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{config} cannot be read ({reason}); mend or remove it") from error
        saved, before = (
            flags.get(key) if isinstance(flags, dict) else None for key in ("save", "run_dir")
        )
        if not isinstance(saved, str):
            return run / "checkpoints"
        if isinstance(before, str) and Path(saved).is_relative_to(before):
            # The path may be that of another run here, if this one was copied.
            return run / Path(saved).relative_to(before)
        return Path(saved) if Path(saved).is_dir() else run / "checkpoints"
    if find(run) or (run / TRACKER).is_file():
        return run
    raise ValueError(
        f"{run} is neither a run directory (it has no config.yaml) nor a folder of checkpoints"
    )


def choose(
    folder: Path, *, need_manifest: bool, warn: Callable[[str], None] = print
) -> Checkpoint | None:
    """Choose the checkpoint to continue from: the tracker's, or the best one of the others.

    Without a usable tracker the newest checkpoint is the best. Otherwise one that is older than the
    tracker's is better than a newer one, which comes from a save that did not end, or from a run
    that was turned back.

    Args:
        folder: the folder of the checkpoints.
        need_manifest: whether to distrust a checkpoint without a manifest.
        warn: the function that is told what is damaged.

    Returns:
        The checkpoint, or None if no save in the folder has ever ended.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    latest = tracked(folder)
    complete = [c for c in find(folder) if c.is_complete]
    usable = [c for c in complete if c.has_manifest or not need_manifest]
    if latest is not None:
        _check_tracked(folder, latest, complete, need_manifest)
        usable.sort(key=lambda c: (c.iteration <= latest, c.iteration))
    for checkpoint in reversed(usable):
        if not checkpoint.damage:
            return checkpoint
        warn(f"checkpoint {checkpoint.path} is damaged: {'; '.join(checkpoint.damage)}")
    if usable or latest is not None:
        raise ValueError(
            f"no checkpoint in {folder} is whole, so the run cannot continue; restore one from a "
            f"copy, or move {folder} away to start from the beginning"
        )
    return None


def _check_tracked(
    folder: Path, latest: int, complete: list[Checkpoint], need_manifest: bool
) -> None:
    for checkpoint in complete:
        if checkpoint.iteration == latest and need_manifest:
            check_has_manifest(checkpoint)


def check_has_manifest(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without a manifest; raises a ValueError."""
    if not checkpoint.has_manifest:
        raise ValueError(
            f"checkpoint {checkpoint.path} has no {_MANIFEST}, so it cannot be verified; "
            f"continue without verification (verify_integrity=false)"
        )


def write_tracker(folder: Path, iteration: int) -> None:
    """Make Megatron continue from this iteration, by replacing the tracker as a whole."""
    temporary = folder / f"{TRACKER}.tmp"
    temporary.write_text(str(iteration))
    os.replace(temporary, folder / TRACKER)


def prune(
    folder: Path, *, keep_last: int, milestone_interval: int | None = None, dry_run: bool = False
) -> list[Checkpoint]:
    """Delete complete checkpoints that are neither among the latest ones nor milestones.

    The tracker's checkpoint stays, and so does everything after it, because that may be in
    progress.

    Args:
        folder: the folder of the checkpoints.
        keep_last: the number of latest checkpoints to keep, at least 1.
        milestone_interval: also keep the checkpoints at multiples of this many iterations.
        dry_run: whether to delete nothing.

    Returns:
        The deleted checkpoints.
    """
    latest = tracked(folder)
    if latest is None:
        return []
    past = [c for c in find(folder) if c.is_complete and c.iteration <= latest]
    old = past[:-keep_last]
    if milestone_interval:
        old = [c for c in old if c.iteration % milestone_interval]
    old = [c for c in old if c.iteration != latest]
    for checkpoint in [] if dry_run else old:
        # Without this file a checkpoint is incomplete, even if the deletion is interrupted.
        (checkpoint.path / "metadata.json").unlink(missing_ok=True)
        shutil.rmtree(checkpoint.path)
    return old


@contextmanager
def retention(args: argparse.Namespace) -> Iterator[None]:
    """Prune the checkpoints on rank 0 during a run, when `--save-keep-last` asks for it.

    A thread waits for the tracker to change, because asynchronous saves end between steps.
    """
    if args.rank != 0 or not args.save or not args.save_keep_last:
        yield
        return
    folder, ended, seen = Path(args.save), threading.Event(), None
    rule = {"keep_last": args.save_keep_last, "milestone_interval": args.save_milestone_interval}

    def watch() -> None:
        nonlocal seen
        while not ended.wait(_SECONDS_BETWEEN_PRUNES):
            if (latest := tracked(folder)) != seen:
                seen = latest
                prune(folder, **rule)

    thread = threading.Thread(target=watch, name="retention", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        prune(folder, **rule)
