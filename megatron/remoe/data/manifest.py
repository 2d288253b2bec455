"""The manifest of a folder of token files, as `remoe data tokenize` writes it."""

from pathlib import Path
from typing import Any

from megatron.remoe.files import read_manifest

UNFINISHED = "unfinished"  # key of the manifest: pairs that are being moved into place
_ENTRY = {"input_sha256", "pair_bytes", "documents", "tokens", "empty", "invalid"}


def read_token_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of token files, after checking that nothing of it is missing.

    Raises:
        ValueError: the manifest is of something else, or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    outputs = manifest.get("outputs")
    entries = outputs.values() if isinstance(outputs, dict) else [None]
    are_ours = all(isinstance(entry, dict) and entry.keys() >= _ENTRY for entry in entries)
    if not are_ours or not isinstance(manifest.get("settings"), dict) or "training" not in manifest:
        raise ValueError(
            f"{folder} has a manifest that is not of token files, or damaged; choose another folder"
        )
    return manifest
