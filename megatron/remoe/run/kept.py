"""The tokenizer's files in the run directory: with them a run needs nothing outside of it.

A run starts with the tokenizer that its flags name, and keeps a copy in `tokenizer/`. Where the
named files are gone, as on another machine, the copy takes their place.
"""

import contextlib
import filecmp
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron.remoe.run.config import RUN_CONFIG, read_yaml

FOLDER = "tokenizer"
KEYS = ("tokenizer_model", "vocab_file", "merge_file")
_NAMES = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
# A folder may hold a whole model, whose weights are not kept.
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def resolve(flags: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the flags with the kept copy in the place of the run's files that are not here.

    A flag that is not what the run has recorded stays as it is, and so does a name on the hub of
    which there is no copy yet.
    """
    found, recorded = dict(flags), _recorded(run_dir)
    for key in KEYS:
        given = flags.get(key)
        if isinstance(given, str) and given == recorded.get(key) and not os.path.exists(given):
            copy = run_dir / FOLDER / _NAMES.get(key, Path(given).name)
            if key == "tokenizer_model" and not copy.is_file():
                copy = run_dir / FOLDER
            if copy.exists():
                found[key] = str(copy)
    return found


def as_recorded(flags: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the flags as the run's config has them: with the files' own names, and no copy's."""
    folder, recorded = os.path.abspath(run_dir / FOLDER), _recorded(run_dir)
    return flags | {
        key: recorded[key]
        for key in KEYS
        if recorded.get(key) and Path(os.path.abspath(str(flags.get(key)))).is_relative_to(folder)
    }


def _recorded(run_dir: Path) -> dict[str, Any]:
    """Return the flags in the run's config, or none if there is no whole one."""
    with contextlib.suppress(ValueError):
        return read_yaml(run_dir / RUN_CONFIG)
    return {}


def is_comparable(flags: dict[str, Any], run_dir: Path) -> bool:
    """Return whether `refuse_another` can compare the tokenizer's files with a kept copy."""
    return (run_dir / FOLDER).is_dir() and bool(_sources(flags))


def refuse_another(flags: dict[str, Any], run_dir: Path) -> None:
    """Raise `ValueError` when the tokenizer differs from the one that the run has kept."""
    for name in _differing(flags, run_dir / FOLDER) if (run_dir / FOLDER).is_dir() else ():
        source = _sources(flags)[name]
        raise ValueError(
            f"{source} differs from {run_dir / FOLDER / name}, with which the run was started; "
            f"restore it, choose another run_dir, or continue with the new file (--force)"
        )


def keep(flags: dict[str, Any], run_dir: Path) -> None:
    """Copy the tokenizer into the run directory, unless the same one is there already.

    Raises:
        ValueError: The tokenizer is a name on the hub and cannot be read.
    """
    folder = run_dir / FOLDER
    sources, model = _sources(flags), flags.get("tokenizer_model")
    is_same = not _differing(flags, folder) if sources else model == _recorded(run_dir).get(KEYS[0])
    if folder.is_dir() and is_same:
        return
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=run_dir) as scratch:
        whole = Path(scratch) / FOLDER
        whole.mkdir(mode=0o755)
        for name, source in sources.items():
            shutil.copyfile(source, whole / name)
        if not sources and not _save_from_hub(flags, whole):
            return
        if folder.is_dir():
            shutil.rmtree(folder)
        try:
            os.replace(whole, folder)
        except OSError:
            if not folder.is_dir():  # Another machine of the run has put its copy there.
                raise


def _sources(flags: dict[str, Any]) -> dict[str, Path]:
    """Return the tokenizer's files on this machine, by their names in the copy."""
    found = {
        name: Path(flags[key])
        for key, name in _NAMES.items()
        if isinstance(flags.get(key), str) and Path(flags[key]).is_file()
    }
    model = Path(str(flags.get("tokenizer_model") or ""))
    if flags.get("tokenizer_model") and model.is_file():
        found[model.name] = model
    elif flags.get("tokenizer_model") and model.is_dir():
        files = (file for file in sorted(model.iterdir()) if file.is_file())
        usable = (file for file in files if file.suffix in _SUFFIXES)
        found |= {f.name: f for f in usable if not f.name.endswith(".index.json")}
    return found


def _differing(flags: dict[str, Any], folder: Path) -> list[str]:
    return [
        name
        for name, source in _sources(flags).items()
        if not (folder / name).is_file() or not filecmp.cmp(source, folder / name, shallow=False)
    ]


def _save_from_hub(flags: dict[str, Any], folder: Path) -> bool:
    """Write the files of a tokenizer that is a name on the hub; return whether it is one."""
    name = flags.get("tokenizer_model")
    if flags.get("tokenizer_type") != "HuggingFaceTokenizer" or not name or os.path.exists(name):
        return False
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    except Exception as error:  # Tokenizers come from many libraries.
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer_model: {name} cannot be read: {reason}") from error
    return True
