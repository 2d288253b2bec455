"""`remoe data tokenize`: JSON Lines to Megatron's `.bin`/`.idx`, one pair per file or domain.

With a share for validation, every file becomes two pairs, `train/NAME` and `valid/NAME`.

The output folder holds the pairs, `tokenizer/` as Megatron reads it, and `manifest.json`. Each pair
appears whole or not at all, and a run that stopped continues after the pairs that it finished.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megatron.remoe.data.encode import encode_chunks, start_workers
from megatron.remoe.data.holdout import Side
from megatron.remoe.data.inputs import find_inputs, with_both_sides
from megatron.remoe.data.jsonl import iter_texts, line_error, read_chunks
from megatron.remoe.data.manifest import UNFINISHED, read_token_manifest
from megatron.remoe.data.pairs import pair_of
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
    scratch_folder,
    sha256_file,
    write_manifest,
)
from megatron.remoe.progress import byte_progress

TRAINING_BYTES = 256_000_000  # text to train on, spread evenly over the files; it bounds memory


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How to tokenize.

    Without a tokenizer, a new one of at most `vocab_size` entries is trained on the input.
    """

    tokenizer: Path | None = None
    vocab_file: Path | None = None
    merge_file: Path | None = None
    eod_token: str | None = None
    vocab_size: int = 8192
    text_key: str = "text"
    append_eod: bool = True
    skip_invalid: bool = False
    valid_fraction: float | None = None
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
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise ValueError(
                f"--valid-fraction {self.valid_fraction} is not between 0 and 1; use a share of "
                f"the documents such as 0.02"
            )
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} leaves nobody to work; use at least 1")

    @property
    def trains(self) -> bool:
        """Whether the tokenizer is trained on the input."""
        return self.tokenizer is None and self.vocab_file is None

    @property
    def holdout(self) -> dict[str, float]:
        """The share for validation as the manifest has it; nothing if there is none."""
        return {} if self.valid_fraction is None else {"valid_fraction": self.valid_fraction}

    def side_of(self, output: str) -> Side | None:
        """Return the documents of an input that an output gets; None is all of them."""
        if self.valid_fraction is None:
            return None
        return Side(self.valid_fraction, output.startswith("valid/"))


def tokenize(
    paths: list[Path], out: Path, config: TokenizeConfig, *, force: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Tokenize files and corpus folders into `out`; return its manifest and the outputs written.

    Outputs of the same input and settings that `out` holds already are kept as they are.

    Raises:
        ValueError: the input is bad, something else would be overwritten and `force` is off, or
            another process writes to `out`.
    """
    inputs = find_inputs(paths)
    if config.valid_fraction is not None:
        inputs = with_both_sides(inputs)
    with output_folder(out):
        by_path = {path: sha256_file(path) for path in set(inputs.values())}
        hashes = {name: by_path[path] for name, path in inputs.items()}
        return _Call(inputs, hashes, out, read_token_manifest(out), config, force).tokenize()


class _Chosen(NamedTuple):
    """A tokenizer, its end-of-document token and, if it is trained, what determined it."""

    tokenizer: Tokenizer
    eod_token: str
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Call:
    """A call of `tokenize`.

    Attributes:
        inputs: input file by output name.
        hashes: SHA-256 of the input by output name.
        out: the output folder.
        old: the manifest that `out` had before, if any.
    """

    inputs: dict[str, Path]
    hashes: dict[str, str]
    out: Path
    old: dict[str, Any] | None
    config: TokenizeConfig
    force: bool

    def tokenize(self) -> tuple[dict[str, Any], list[str]]:
        out, config, chosen = self.out, self.config, self._choose_tokenizer()
        manifest = self._choose_manifest(chosen)
        todo = self._select_todo(manifest)
        if not todo:
            return manifest, []

        tokenizer = chosen.tokenizer
        eod_id = tokenizer.token_to_id(chosen.eod_token) if config.append_eod else None
        pool = start_workers(
            tokenizer, workers=config.workers, text_key=config.text_key, eod_id=eod_id
        )
        with scratch_folder(out) as scratch, pool:
            save_tokenizer(tokenizer, chosen.eod_token, scratch / "tokenizer")
            finished: dict[str, Any] = {}
            for name, path in todo.items():
                size = largest_id(tokenizer) + 1
                entry = _write_pair(path, scratch / name, pool, config, size, config.side_of(name))
                finished[name] = {"input": path.name, "input_sha256": self.hashes[name]} | entry
                # Tokens of other settings are replaced all at once, so that a folder's pairs match.
                if self.old is None or manifest is self.old:
                    _publish(scratch, out, manifest, finished)
                    finished = {}
            _publish(scratch, out, manifest, finished)
        return manifest, list(todo)

    def _choose_tokenizer(self) -> _Chosen:
        config = self.config
        if config.tokenizer is not None:
            return _Chosen(*load_tokenizer(config.tokenizer, config.eod_token))
        if config.vocab_file is not None and config.merge_file is not None:
            files = (config.vocab_file, config.merge_file)
            return _Chosen(*load_gpt2_tokenizer(*files, config.eod_token))

        used = {k: path for k, path in sorted(self.inputs.items()) if not k.startswith("valid/")}
        training = {
            "vocab_size": config.vocab_size,
            "text_key": config.text_key,
            "inputs": {name: self.hashes[name] for name in used},
        } | config.holdout
        # After a kill the tokenizer may not be in place yet; training gives the same one again.
        is_same = self.old is not None and self.old["training"] == training
        if self.old is not None and not self.force and not (is_same and UNFINISHED in self.old):
            folder = self.out / "tokenizer"
            if is_same:
                return _Chosen(*load_tokenizer(folder), training)
            raise ValueError(
                f"{self.out} holds tokens of a tokenizer that these inputs would not give again; "
                f"pass --tokenizer {folder} to add to them, --force to replace them, "
                "or choose another --out"
            )
        texts = _training_texts(used, config)
        return _Chosen(train_tokenizer(texts, config.vocab_size), END_OF_DOCUMENT, training)

    def _choose_manifest(self, chosen: _Chosen) -> dict[str, Any]:
        """Return the old manifest if its settings are the same, or else a new one.

        Raises:
            ValueError: the old settings differ, and not all of `out` may be replaced.
        """
        settings = {
            "tokenizer_sha256": sha256(chosen.tokenizer.to_str().encode()).hexdigest(),
            "vocab_size": chosen.tokenizer.get_vocab_size(),
            "eod_token": chosen.eod_token,
            "eod_id": chosen.tokenizer.token_to_id(chosen.eod_token),
            "append_eod": self.config.append_eod,
            "text_key": self.config.text_key,
        } | self.config.holdout
        if self.old is not None:
            if self.old["settings"] == settings:
                return self.old
            what = f"{self.out} holds tokens of another tokenizer or other settings"
            if not self.force:
                raise ValueError(f"{what}; pass --force to replace them, or choose another --out")
            if left := sorted(self.old["outputs"].keys() - self.inputs.keys()):
                raise ValueError(
                    f"{what} that --force would leave ({', '.join(left)}); use another --out"
                )
        return {
            "settings": settings,
            "training": chosen.training,
            "versions": {name: version(name) for name in ("remoe", "megatron-core", "tokenizers")},
            "outputs": {},
        }

    def _select_todo(self, manifest: dict[str, Any]) -> dict[str, Path]:
        """Return the inputs to tokenize.

        Raises:
            ValueError: something else would be overwritten, and `force` is off.
        """
        todo: dict[str, Path] = {}
        for name, path in self.inputs.items():
            entry = manifest["outputs"].get(name, {})
            pair = pair_of(self.out / name)
            sizes = [file.stat().st_size if file.exists() else None for file in pair]
            done = entry.get("input_sha256") == self.hashes[name] and entry["pair_bytes"] == sizes
            interrupted = name in manifest.get(UNFINISHED, ())
            if not done and not self.force and not interrupted and sizes != [None, None]:
                raise ValueError(
                    f"{pair[0]} exists but is not, or not whole, of {path} with these settings; "
                    "pass --force to replace it, or choose another --out"
                )
            if self.force or not done:
                todo[name] = path
        return todo


def _training_texts(inputs: dict[str, Path], config: TokenizeConfig) -> Iterator[str]:
    """Yield texts from the beginning of every file, up to an equal share of `TRAINING_BYTES`."""
    for name, path in inputs.items():
        room, side = TRAINING_BYTES // len(inputs), config.side_of(name)
        with byte_progress(f"training the tokenizer on {path}", path.stat().st_size) as advance:
            for text in iter_texts(
                path, config.text_key, skip_invalid=config.skip_invalid, advance=advance
            ):
                if room <= 0:
                    break
                if side is not None and not side.keeps(text):
                    continue
                room -= len(text.encode())
                yield text


def _write_pair(
    path: Path,
    prefix: Path,
    pool: ProcessPoolExecutor,
    config: TokenizeConfig,
    vocab_size: int,
    side: Side | None,
) -> dict[str, Any]:
    """Tokenize one file into `prefix`.bin and .idx; return its entry in the manifest.

    A document without text is counted and left out, because it would consist of its end only.

    Raises:
        ValueError: a line is malformed and those are not skipped, or no document has text.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    counts = dict.fromkeys(("documents", "tokens", "text_bytes", "empty", "invalid"), 0)
    with byte_progress(f"tokenizing {path}", path.stat().st_size) as advance:
        chunks = read_chunks(path, advance)
        for encoded in encode_chunks(pool, chunks, workers=config.workers, side=side):
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
    if counts["documents"] == 0 and side is not None:
        what = "validation" if side.is_valid else "training"
        raise ValueError(
            f"{path} has too few documents: none is left for {what} at --valid-fraction "
            f"{side.fraction}; add documents, or change the share"
        )
    if counts["documents"] == 0:
        raise ValueError(f"{path} holds no document with text; leave it out")
    if counts["tokens"] == counts["documents"] * int(config.append_eod):
        raise ValueError(f"{path} has no text of which the tokenizer knows a token; name another")
    builder.finalize(f"{prefix}.idx")
    pair_bytes = [file.stat().st_size for file in pair_of(prefix)]
    return counts | {"dtype": dtype.__name__, "pair_bytes": pair_bytes}


def _publish(scratch: Path, out: Path, manifest: dict[str, Any], finished: dict[str, Any]) -> None:
    """Move `finished` pairs, and at first the tokenizer, into `out`, and add them to the manifest.

    Before a pair changes, the manifest lists it as unfinished and not as an output, so that the
    same call can continue after a kill.
    """
    manifest["outputs"] = {k: v for k, v in manifest["outputs"].items() if k not in finished}
    manifest.pop(UNFINISHED, None)
    write_manifest(out, manifest | {UNFINISHED: sorted(finished)})
    files = [file for name in finished for file in pair_of(scratch / name)]
    if (scratch / "tokenizer").is_dir():
        files += (scratch / "tokenizer").iterdir()
    for file in files:
        target = out / file.relative_to(scratch)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
    manifest["outputs"] = dict(sorted((manifest["outputs"] | finished).items()))
    write_manifest(out, manifest)
