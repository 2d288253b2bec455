"""Which files to tokenize, and the names of their outputs."""

from pathlib import Path

from megatron.remoe.data.jsonl import SUFFIXES

_KIND = f"{' or '.join(SUFFIXES)} file"


def find_inputs(paths: list[Path]) -> dict[str, Path]:
    """Return the input file of each output name.

    A corpus folder (with `train/` and `valid/`) gives `train/<stem>` and `valid/<stem>`, another
    folder gives the stems of its files, and a file gives its stem.

    Raises:
        ValueError: a path is missing or of another kind, a folder has no files, or two files have
            one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for prefix, files in _files_by_prefix(path).items():
            for file in files:
                suffix = next((s for s in SUFFIXES if file.name.endswith(s)), None)
                if suffix is None:
                    raise ValueError(f"{file} is not a {_KIND}; convert it")
                name = prefix + file.name.removesuffix(suffix)
                if name in found:
                    raise ValueError(
                        f"{found[name]} and {file} would both become {name}.bin; "
                        "rename one, or use one --out for each"
                    )
                found[name] = file
    return found


def with_both_sides(inputs: dict[str, Path]) -> dict[str, Path]:
    """Return the input file of `train/NAME` and of `valid/NAME` for every name.

    Raises:
        ValueError: there are validation files already.
    """
    for name, path in inputs.items():
        if name.startswith(("train/", "valid/")):
            raise ValueError(
                f"{path} is of a corpus that has its own validation files; leave --valid-fraction "
                f"out"
            )
    return {f"{side}/{name}": path for name, path in inputs.items() for side in ("train", "valid")}


def _files_by_prefix(path: Path) -> dict[str, list[Path]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a {_KIND} or folder")
    if path.is_file():
        return {"": [path]}
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder; write it to a file first")
    if (path / "train").is_dir() and (path / "valid").is_dir():
        return {f"{split}/": _json_files(path / split) for split in ("train", "valid")}
    return {"": _json_files(path)}


def _json_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if ".jsonl" in p.name and not p.name.startswith("."))
    if other := [path for path in found if not path.name.endswith(SUFFIXES)]:
        raise ValueError(f"{other[0]} is not a {_KIND}; convert it, or move it away")
    if not found:
        raise ValueError(f"{folder} holds no {_KIND}; name a folder that does")
    return found
