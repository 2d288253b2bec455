"""Output folders that appear whole or not at all, and never replace what must be kept."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.remoe.files import hold_folder

# A folder with one of these files was made by a conversion, and may be replaced.
_MADE_HERE = ("config.json", "model.yaml", "hf/config.json")


@contextmanager
def new_folder(out: Path, *, reads: Iterable[Path], force: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` at the end, or is removed after an error.

    What a killed process leaves beside `out` is removed by the next call for the same `out`. A
    folder that is replaced is moved aside first. If the process is killed before the new folder is
    in its place, the next call puts the old one back.

    Args:
        out: a folder that does not exist yet, or is empty.
        reads: what the new folder is made from, which must therefore not be in `out`.
        force: whether to replace what a conversion has made there.

    Raises:
        ValueError: `out` is not empty, holds what is read or must not be replaced, or is being
            made by another process.
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
    """Check in advance, before hours of work, that `new_folder` can make `out`.

    Raises:
        ValueError: it cannot, for a reason that `new_folder` names.
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
    """Make the folder to fill, which this process holds until the stack is closed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(out, target)
        while True:
            partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            # Before the folder is held, another process may have removed it as a leftover.
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
    """Remove what killed processes have left, and put back what they moved aside."""
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
