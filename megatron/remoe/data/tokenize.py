"""`remoe data tokenize`: JSON Lines to Megatron's `.bin`/`.idx`, one pair per file or domain.

The output folder holds the pairs, `tokenizer/` as Megatron reads it, and `manifest.json`. Each pair
appears complete or not at all, and a run that stopped goes on after the pairs it finished.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megatron.remoe.data.encode import encode_chunks, start_workers
from megatron.remoe.data.jsonl import SUFFIXES, iter_texts, line_error, read_chunks
from megatron.remoe.data.tokenizer import (
    END_OF_DOCUMENT,
    MIN_VOCAB_SIZE,
    largest_id,
    load_gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from megatron.remoe.files import (
    output_folder,
    read_manifest,
    scratch_folder,
    sha256_file,
    write_manifest,
)
from megatron.remoe.progress import byte_progress

_ENTRY = {"input_sha256", "pair_bytes", "documents", "tokens", "empty", "invalid"}
_UNFINISHED = "unfinished"  # in the manifest: pairs that are being moved into their place
TRAINING_BYTES = 256_000_000  # of text, spread evenly over the files: keeps memory bounded


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How to tokenize. Without a tokenizer, one of `vocab_size` entries is trained on the input."""

    tokenizer: Path | None = None
    vocab_file: Path | None = None
    merge_file: Path | None = None
    eod_token: str | None = None
    vocab_size: int = 8192
    text_key: str = "text"
    append_eod: bool = True
    skip_invalid: bool = False
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if (self.vocab_file is None) != (self.merge_file is None):
            raise ValueError("--vocab-file and --merge-file belong together; give both or neither")
        if self.tokenizer is not None and self.vocab_file is not None:
            raise ValueError("--tokenizer and --vocab-file both name a tokenizer; give one of them")
        if self.trains and self.eod_token is not None:
            raise ValueError(
                f"--eod-token {self.eod_token!r} is for a tokenizer that exists; a new one ends "
                f"documents with {END_OF_DOCUMENT!r}"
            )
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"--vocab-size {self.vocab_size} is too small for the 256 bytes and the end of a "
                f"document; use at least {MIN_VOCAB_SIZE}"
            )
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} leaves nobody to work; use at least 1")

    @property
    def trains(self) -> bool:
        """Whether the tokenizer is trained on the input."""
        return self.tokenizer is None and self.vocab_file is None


def tokenize(
    paths: list[Path], out: Path, config: TokenizeConfig, *, force: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Tokenize files and corpus folders into `out`; return its manifest and the outputs written.

    Outputs that `out` holds already, of the same input and settings, are kept as they are. Raises
    `ValueError` for bad input, when `force` is off and something else would be overwritten, and
    while another process writes to `out`.
    """
    inputs = find_inputs(paths)
    with output_folder(out):
        return _tokenize(inputs, out, config, force)


def _tokenize(
    inputs: dict[str, Path], out: Path, config: TokenizeConfig, force: bool
) -> tuple[dict[str, Any], list[str]]:
    hashes = {name: sha256_file(path) for name, path in inputs.items()}
    old = _read_own_manifest(out)
    tokenizer, eod_token, training = _choose_tokenizer(inputs, hashes, out, old, config, force)
    manifest = _new_manifest(tokenizer, eod_token, training, config)
    if old is not None and old["settings"] == manifest["settings"]:
        manifest = old
    elif old is not None:
        _check_replaceable(out, old, inputs, force)
    todo = _select_todo(inputs, hashes, out, manifest, force)
    if not todo:
        return manifest, []

    eod_id = tokenizer.token_to_id(eod_token) if config.append_eod else None
    pool = start_workers(tokenizer, workers=config.workers, text_key=config.text_key, eod_id=eod_id)
    with scratch_folder(out) as scratch, pool:
        save_tokenizer(tokenizer, eod_token, scratch / "tokenizer")
        finished: dict[str, Any] = {}
        for name, path in todo.items():
            entry = _write_pair(path, scratch / name, pool, config, largest_id(tokenizer) + 1)
            finished[name] = {"input": path.name, "input_sha256": hashes[name]} | entry
            # Tokens of other settings are replaced all at once: the pairs of a folder match.
            if old is None or manifest is old:
                _publish(scratch, out, manifest, finished)
                finished = {}
        _publish(scratch, out, manifest, finished)
    return manifest, list(todo)


def find_inputs(paths: list[Path]) -> dict[str, Path]:
    """Return the input file of each output name.

    A corpus folder (with `train/` and `valid/`) gives `train/<stem>` and `valid/<stem>`, another
    folder the stems of its files, a file its stem. Raises `ValueError` for a path that is missing
    or of another kind, a folder without files, or two files of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} does not exist; name a {' or '.join(SUFFIXES)} file or folder"
            )
        if path.is_file():
            named = {"": [path]}
        elif (path / "train").is_dir() and (path / "valid").is_dir():
            named = {f"{split}/": _json_files(path / split) for split in ("train", "valid")}
        elif path.is_dir():
            named = {"": _json_files(path)}
        else:
            raise ValueError(f"{path} is neither a file nor a folder; write it to a file first")
        for prefix, files in named.items():
            for file in files:
                suffix = next((s for s in SUFFIXES if file.name.endswith(s)), None)
                if suffix is None:
                    raise ValueError(f"{file} is not a {' or '.join(SUFFIXES)} file; convert it")
                name = prefix + file.name.removesuffix(suffix)
                if name in found:
                    raise ValueError(
                        f"{found[name]} and {file} would both become {name}.bin; "
                        "rename one, or use one --out for each"
                    )
                found[name] = file
    return found


def _json_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if ".jsonl" in p.name and not p.name.startswith("."))
    files = [path for path in found if path.name.endswith(SUFFIXES)]
    if other := sorted(set(found) - set(files)):
        raise ValueError(
            f"{other[0]} is not a {' or '.join(SUFFIXES)} file; convert it, or move it away"
        )
    if not files:
        raise ValueError(f"{folder} holds no {' or '.join(SUFFIXES)} file; name a folder that does")
    return files


def _read_own_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of token files, of which nothing is missing.

    Raises:
        ValueError: it is another's, or damaged.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return None
    outputs = manifest.get("outputs")
    entries = outputs.values() if isinstance(outputs, dict) else [None]
    are_ours = all(isinstance(entry, dict) and entry.keys() >= _ENTRY for entry in entries)
    if not are_ours or not isinstance(manifest.get("settings"), dict) or "training" not in manifest:
        raise ValueError(
            f"{out} has a manifest that is not of token files, or damaged; choose another --out"
        )
    return manifest


def _choose_tokenizer(
    inputs: dict[str, Path],
    hashes: dict[str, str],
    out: Path,
    old: dict[str, Any] | None,
    config: TokenizeConfig,
    force: bool,
) -> tuple[Tokenizer, str, dict[str, Any] | None]:
    """Return the tokenizer, its end-of-document token and, if it is trained, what determined it."""
    if config.tokenizer is not None:
        return *load_tokenizer(config.tokenizer, config.eod_token), None
    if config.vocab_file is not None and config.merge_file is not None:
        loaded = load_gpt2_tokenizer(config.vocab_file, config.merge_file, config.eod_token)
        return *loaded, None

    used = {name: path for name, path in sorted(inputs.items()) if not name.startswith("valid/")}
    training = {
        "vocab_size": config.vocab_size,
        "text_key": config.text_key,
        "inputs": {name: hashes[name] for name in used},
    }
    # After a kill the tokenizer may not be in its place yet; it is trained to the same one again.
    is_same = old is not None and old["training"] == training
    if old is not None and not force and not (is_same and _UNFINISHED in old):
        if is_same:
            return *load_tokenizer(out / "tokenizer"), training
        raise ValueError(
            f"{out} holds tokens of a tokenizer that these inputs would not give again; pass "
            f"--tokenizer {out / 'tokenizer'} to add to them, --force to replace them, "
            "or choose another --out"
        )
    texts = _training_texts(list(used.values()), config)
    return train_tokenizer(texts, config.vocab_size), END_OF_DOCUMENT, training


def _training_texts(paths: list[Path], config: TokenizeConfig) -> Iterator[str]:
    """Yield texts from the start of every file, up to an equal share of `TRAINING_BYTES`."""
    for path in paths:
        room = TRAINING_BYTES // len(paths)
        with byte_progress(f"training the tokenizer on {path}", path.stat().st_size) as advance:
            for text in iter_texts(
                path, config.text_key, skip_invalid=config.skip_invalid, advance=advance
            ):
                if room <= 0:
                    break
                room -= len(text.encode())
                yield text


def _new_manifest(
    tokenizer: Tokenizer, eod_token: str, training: dict[str, Any] | None, config: TokenizeConfig
) -> dict[str, Any]:
    return {
        "settings": {
            "tokenizer_sha256": sha256(tokenizer.to_str().encode()).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "eod_token": eod_token,
            "eod_id": tokenizer.token_to_id(eod_token),
            "append_eod": config.append_eod,
            "text_key": config.text_key,
        },
        "training": training,
        "versions": {name: version(name) for name in ("remoe", "megatron-core", "tokenizers")},
        "outputs": {},
    }


def _check_replaceable(
    out: Path, old: dict[str, Any], inputs: dict[str, Path], force: bool
) -> None:
    """Raise `ValueError` unless all of `out`, which has other settings, may be replaced."""
    what = f"{out} holds tokens of another tokenizer or other settings"
    if not force:
        raise ValueError(f"{what}; pass --force to replace them, or choose another --out")
    if left := sorted(old["outputs"].keys() - inputs.keys()):
        raise ValueError(f"{what} that --force would leave ({', '.join(left)}); use another --out")


def _select_todo(
    inputs: dict[str, Path],
    hashes: dict[str, str],
    out: Path,
    manifest: dict[str, Any],
    force: bool,
) -> dict[str, Path]:
    """Return the inputs to tokenize; raise `ValueError` if that would overwrite without `force`."""
    todo: dict[str, Path] = {}
    for name, path in inputs.items():
        entry = manifest["outputs"].get(name, {})
        pair = [out / f"{name}{suffix}" for suffix in (".bin", ".idx")]
        sizes = [file.stat().st_size if file.exists() else None for file in pair]
        done = entry.get("input_sha256") == hashes[name] and entry["pair_bytes"] == sizes
        interrupted = name in manifest.get(_UNFINISHED, ())
        if not done and not force and not interrupted and sizes != [None, None]:
            raise ValueError(
                f"{pair[0]} exists but is not, or not whole, of {path} with these settings; "
                "pass --force to replace it, or choose another --out"
            )
        if force or not done:
            todo[name] = path
    return todo


def _write_pair(
    path: Path, prefix: Path, pool: ProcessPoolExecutor, config: TokenizeConfig, vocab_size: int
) -> dict[str, Any]:
    """Tokenize one file into `prefix`.bin and .idx; return its numbers for the manifest.

    A document without text is counted and left out: it would be nothing but its end. Raises
    `ValueError` for a malformed line unless they are skipped, and for a file without documents.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    counts = dict.fromkeys(("documents", "tokens", "text_bytes", "empty", "invalid"), 0)
    with byte_progress(f"tokenizing {path}", path.stat().st_size) as advance:
        chunks = read_chunks(path, advance)
        for encoded in encode_chunks(pool, chunks, workers=config.workers):
            if encoded.invalid and not config.skip_invalid:
                raise line_error(path, *encoded.invalid[0])
            ends = np.cumsum(encoded.lengths, dtype=np.int64)
            for document in np.split(encoded.ids, ends[:-1]) if encoded.lengths else []:
                builder.add_document(document, [len(document)])
            counts["documents"] += len(encoded.lengths)
            counts["tokens"] += len(encoded.ids)
            counts["text_bytes"] += encoded.text_bytes
            counts["empty"] += encoded.empty
            counts["invalid"] += len(encoded.invalid)
    if counts["documents"] == 0:
        raise ValueError(f"{path} holds no document with text; leave it out")
    if counts["tokens"] == counts["documents"] * int(config.append_eod):
        raise ValueError(f"{path} has no text of which the tokenizer knows a token; name another")
    builder.finalize(f"{prefix}.idx")
    pair_bytes = [Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    return counts | {"dtype": dtype.__name__, "pair_bytes": pair_bytes}


def _publish(scratch: Path, out: Path, manifest: dict[str, Any], finished: dict[str, Any]) -> None:
    """Move `finished` pairs, and the tokenizer before the first, into `out` and its manifest.

    The manifest never claims a pair that is about to change, and says that it is, so that the same
    call may go on after a kill.
    """
    manifest["outputs"] = {k: v for k, v in manifest["outputs"].items() if k not in finished}
    manifest.pop(_UNFINISHED, None)
    write_manifest(out, manifest | {_UNFINISHED: sorted(finished)})
    new_files = [f"{name}{suffix}" for name in finished for suffix in (".bin", ".idx")]
    if (scratch / "tokenizer").is_dir():
        new_files += [f"tokenizer/{file.name}" for file in (scratch / "tokenizer").iterdir()]
    for file in new_files:
        (out / file).parent.mkdir(exist_ok=True)
        (scratch / file).replace(out / file)
    manifest["outputs"] = dict(sorted((manifest["outputs"] | finished).items()))
    write_manifest(out, manifest)
