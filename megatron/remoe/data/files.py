"""Files on disk: hashes, and outputs that appear complete or not at all."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, or None when there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it or choose another folder"
        ) from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of `folder` in one step: a reader sees the old one or the new one."""
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `out`; remove it afterwards, whatever happened.

    Being on the file system of `out`, what is made in it is moved into place by a rename. An `out`
    that did not exist before and holds nothing afterwards is removed too. Raises `ValueError` when
    `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a folder to write to is needed; choose another")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
        if created and not any(out.iterdir()):
            out.rmdir()
