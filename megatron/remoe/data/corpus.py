"""`remoe data corpus`: a multi-domain text corpus from the local installation, without a download.

The corpus is `OUT/{train,valid}/<domain>.jsonl` with one `{"text", "domain", "path"}` per line, and
`OUT/manifest.json`. The choice of documents, their order and their split follow from hashes of
their paths, so that equal versions of Python and of the packages give equal bytes.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from megatron.remoe.data.cleaning import clean_text, content_key, is_worth_training_on
from megatron.remoe.data.sources import DOMAINS, Source, dependency_closure, iter_sources
from megatron.remoe.files import (
    MANIFEST,
    output_folder,
    read_manifest,
    scratch_folder,
    sha256_file,
    write_manifest,
)
from megatron.remoe.progress import byte_progress

SPLITS = ("train", "valid")
_UNFINISHED = {"unfinished": True}  # the manifest while files are being moved into place


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Size of a corpus in MB (1e6 bytes of text) per domain, and its share for validation."""

    max_mb_per_domain: float = 8.0
    valid_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not self.max_mb_per_domain > 0:
            raise ValueError(
                f"max_mb_per_domain={self.max_mb_per_domain} leaves no text; use a positive number"
            )
        if not 0 < self.valid_fraction < 1:
            raise ValueError(
                f"valid_fraction={self.valid_fraction} is not between 0 and 1; "
                "use a share such as 0.02"
            )


@dataclass(frozen=True)
class Document:
    """A cleaned text, the domain it belongs to, and where it came from."""

    text: str
    domain: str
    path: str


def build_corpus(
    out: Path, config: CorpusConfig, *, force: bool = False
) -> tuple[dict[str, Any], bool]:
    """Build the corpus in `out`; return its manifest and whether anything was written.

    If `out` already holds this corpus, it is left as it is. After a failure, `out` is as it was.

    Raises:
        ValueError: `out` holds something else and `force` is off, a split of a domain would be
            empty, or another process writes to `out`.
    """
    with output_folder(out):
        return _build_corpus(out, config, force)


def _build_corpus(out: Path, config: CorpusConfig, force: bool) -> tuple[dict[str, Any], bool]:
    distributions = dependency_closure("remoe", frozenset({"megatron"}))
    header = {"settings": asdict(config), "versions": _versions(distributions)}
    existing = read_manifest(out)
    if not force and (same := _same_corpus(out, header, existing)) is not None:
        return same, False

    documents = list(select_documents(iter_sources(distributions), config))
    splits = split_documents(documents, config.valid_fraction)
    with scratch_folder(out) as scratch:
        counts = _write_splits(scratch, documents, splits)
        files = {}
        for name, count in counts.items():
            if count == 0:
                raise ValueError(
                    f"{name} has no document at {config.max_mb_per_domain} MB per domain and a "
                    f"validation share of {config.valid_fraction}; raise one of them"
                )
            path = scratch / name
            files[name] = {
                "documents": count,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        manifest = header | {"files": files}
        # After a kill, the manifest must not describe other files, and the same call must continue.
        write_manifest(out, _UNFINISHED)
        for name in files:
            (out / name).parent.mkdir(exist_ok=True)
            (scratch / name).replace(out / name)
        write_manifest(out, manifest)
    return manifest, True


def _same_corpus(
    out: Path, header: dict[str, Any], existing: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the existing manifest if `out` holds this corpus, and None if it holds no corpus.

    Raises:
        ValueError: `out` holds something else.
    """
    if existing is None:
        names = [f"{split}/{domain}.jsonl" for split in SPLITS for domain in DOMAINS]
        if there := [name for name in names if (out / name).exists()]:
            raise ValueError(
                f"{out / there[0]} is there already, and no {MANIFEST} that says what it is; pass "
                f"--force to replace it, or choose another folder"
            )
        return None
    if existing == _UNFINISHED:
        return None
    if {key: existing.get(key) for key in header} != header:
        raise ValueError(
            f"{out} holds a corpus of other settings or package versions; "
            "pass --force to replace it, or choose another folder"
        )
    if not _files_match(out, existing):
        raise ValueError(
            f"the files in {out} differ from its {MANIFEST}; pass --force to build them again"
        )
    return existing


def select_documents(sources: Iterable[Source], config: CorpusConfig) -> Iterator[Document]:
    """Yield the documents of a corpus, domain by domain, each up to its budget of text bytes.

    Sources are read in the order of their tier and of a hash of their path until the budget is
    used, so that the choice depends neither on the machine nor on which other files exist.
    Documents that differ only in spacing are taken once, also across domains.
    """
    by_domain: dict[str, list[Source]] = {domain: [] for domain in DOMAINS}
    for source in sources:
        by_domain[source.domain].append(source)
    budget = int(config.max_mb_per_domain * 1e6)
    seen: set[bytes] = set()
    for domain, candidates in by_domain.items():
        candidates.sort(key=lambda source: (source.tier, _path_hash("select", source.path)))
        used = 0
        with byte_progress(f"collecting {domain}", budget) as advance:
            for source in candidates:
                text = clean_text(source.load())
                if not is_worth_training_on(text, prose=domain == "prose"):
                    continue
                size = len(text.encode())
                if used + size > budget:
                    break
                key = content_key(text)
                if key not in seen:
                    seen.add(key)
                    used += size
                    advance(size)
                    yield Document(text, domain, source.path)


def split_documents(documents: list[Document], valid_fraction: float) -> dict[str, str]:
    """Return the split of each path: `valid` for that share of every domain's text, or `train`.

    Documents join the validation split in the order of a hash of their path while they fit. None is
    larger than a quarter of it, so that it is varied. A path has one split in all domains, so that
    a module and its docstrings are in the same split.
    """
    splits: dict[str, str] = {}
    for domain in DOMAINS:
        sizes = {doc.path: len(doc.text.encode()) for doc in documents if doc.domain == domain}
        room = valid_fraction * sum(sizes.values())
        largest = room / 4
        room -= sum(size for path, size in sizes.items() if splits.get(path) == "valid")
        for path in sorted(sizes.keys() - splits.keys(), key=partial(_path_hash, "split")):
            splits[path] = "valid" if sizes[path] <= min(room, largest) else "train"
            room -= sizes[path] if splits[path] == "valid" else 0
    return splits


def _path_hash(purpose: str, path: str) -> int:
    """Hash a path for one purpose, so that choice and split are independent of each other."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{path}".encode()).digest())


def _write_splits(
    folder: Path, documents: list[Document], splits: dict[str, str]
) -> dict[str, int]:
    """Write `<split>/<domain>.jsonl` files into `folder`; return the document count of each."""
    counts = {f"{split}/{domain}.jsonl": 0 for split in SPLITS for domain in DOMAINS}
    files: dict[str, TextIO] = {}
    for split in SPLITS:
        (folder / split).mkdir()
    try:
        for name in counts:
            files[name] = (folder / name).open("w", encoding="utf-8", newline="\n")
        for document in documents:
            name = f"{splits[document.path]}/{document.domain}.jsonl"
            files[name].write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            counts[name] += 1
    finally:
        for file in files.values():
            file.close()
    return counts


def _versions(distributions: dict[str, metadata.Distribution]) -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    packages = {name: distribution.version for name, distribution in distributions.items()}
    return {"python": python, "remoe": metadata.version("remoe")} | packages


def _files_match(out: Path, manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and (out / name).is_file()
        and sha256_file(out / name) == entry.get("sha256")
        for name, entry in files.items()
    )
