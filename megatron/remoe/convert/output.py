"""Folders that appear whole or not at all, and never at the cost of something else."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.remoe.files import hold_folder

# What a folder has that a conversion made, so that it may be replaced.
_MADE_HERE = ("config.json", "model.yaml", "hf/config.json")


@contextmanager
def new_folder(out: Path, *, reads: Iterable[Path], force: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` at the end, or is removed after an error.

    What a kill leaves beside `out` is removed by the next call for the same `out`. A folder that is
    replaced is moved aside first, and put back by that call if the kill came before the new one was
    in its place.

    Args:
        out: does not exist yet, or is an empty folder.
        reads: what the new folder is made from, and what must therefore not be in `out`.
        force: replace what a conversion has made there.

    Raises:
        ValueError: there is something already, something that is read or not to be replaced, or
            another process that makes the same folder.
    """
    check_folder(out, reads=reads, force=force)
    target = Path(os.path.abspath(out))
    created = [p for p in target.parents if not p.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, created)
        partial = _make(out, target, stack)
        check_folder(out, reads=reads, force=force)  # what a kill had moved may be back
        yield partial
        _publish(out, target, partial, force)


def check_folder(out: Path, *, reads: Iterable[Path], force: bool = False) -> None:
    """Check what `new_folder` would say of an `out`, before hours of work.

    Raises:
        ValueError: as there.
    """
    target = Path(os.path.abspath(out))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{out} is no folder; choose another name")
    real = Path(os.path.realpath(target))
    for path in (*reads, Path.cwd(), Path(os.path.expanduser("~"))):
        kept = Path(os.path.realpath(path))
        if real == kept or real in kept.parents:
            raise ValueError(f"{out} holds {path}, which must stay; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise ValueError(f"{out} is not empty; choose another folder, or replace it (--force)")
    if not any((target / name).is_file() for name in _MADE_HERE):
        raise ValueError(
            f"{out} was not made by a conversion (it has neither config.json nor model.yaml), so "
            f"--force does not replace it; delete it yourself, or choose another folder"
        )


def _make(out: Path, target: Path, stack: contextlib.ExitStack) -> Path:
    """The folder to fill, held by this process until the stack is closed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(out, target)
        while True:
            partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            # Another process that clears may have taken it for a dead one's before it was held.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(hold_folder(partial))
                if partial.exists():
                    stack.callback(shutil.rmtree, partial, ignore_errors=True)
                    break
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    except OSError as error:
        raise ValueError(
            f"{out} cannot be made ({error.strerror}); choose another folder"
        ) from error
    return partial


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _clear(out: Path, target: Path) -> None:
    """Remove what killed calls have left, unless its maker lives, and put back what they moved."""
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and path.is_dir():
            try:
                with hold_folder(path) as held:
                    if held:
                        shutil.rmtree(path)
            except BlockingIOError:
                raise ValueError(
                    f"{out} is being made by another process; wait for it, or choose another folder"
                ) from None
    aside = _aside(target)
    if aside.is_dir():
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def _publish(out: Path, target: Path, partial: Path, force: bool) -> None:
    if force and target.exists():
        target.rename(_aside(target))
    try:
        partial.rename(target)
    except OSError as error:
        if force and _aside(target).is_dir() and not target.exists():
            _aside(target).rename(target)
        raise ValueError(
            f"{out} cannot be made ({error.strerror}): something has appeared there meanwhile; "
            f"choose another folder"
        ) from error
    if _aside(target).is_dir():
        shutil.rmtree(_aside(target))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
