"""Files on disk: hashes, JSON, and outputs that appear complete or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_SCRATCH = ".partial-"
# Errors of file systems that cannot lock folders, such as NFS.
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file, in which every key is once and every number is finite.

    Args:
        path: the file.
        remedy: what the user should do about a bad file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(value).__name__}; {remedy}")
    return value


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text in UTF-8, in which every key is once and no number is NaN.

    Raises:
        ValueError: the text is something else; the message has the reason.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there more than once")
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, or None when there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    return read_json_object(path, "delete it or choose another folder")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of `folder` in one step, so that a reader sees the old or the new one."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step, so that a reader sees the old or the new one."""
    partial = path.with_name(f"{_SCRATCH}{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def check_in_folder(file: Path) -> None:
    """Check that a file of results can be written, before the work that it is for.

    Raises:
        ValueError: it is a folder, or something above it is no folder.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file (--out)")
    nearest = next(folder for folder in file.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; name a folder (--out)")


@contextmanager
def hold_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder alone, by a lock that the kernel releases when this process ends.

    Yields whether the folder is held, because some file systems cannot lock folders.

    Raises:
        BlockingIOError: another process holds the folder.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(lock)
    finally:
        os.close(lock)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Make `out`, and let no other process write to it meanwhile.

    Files that a killed writer has left there are removed. So is `out` itself, if it did not exist
    before and holds nothing afterwards.

    Raises:
        ValueError: `out` is a file, or another process writes to it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a folder to write to is needed; choose another")
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, created)
        try:
            held = stack.enter_context(hold_folder(out))
        except BlockingIOError as error:
            raise ValueError(
                f"{out} is being written by another process; wait until it ends, or choose "
                f"another folder"
            ) from error
        for left in out.glob(f"{_SCRATCH}*") if held else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `out`; remove it afterwards, whatever happened.

    The folder is on the file system of `out`, so that its content moves into place by a rename.
    """
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=out))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
