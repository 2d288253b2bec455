"""Read JSON Lines, plain or zstd-compressed, as a stream; errors name the line number."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

SUFFIXES = (".jsonl", ".jsonl.zst")
BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 18
_KEYS_SHOWN = 8
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which some programs put before UTF-8
MAX_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file; `first_line` counts from 1."""

    first_line: int
    lines: list[bytes]


def read_chunks(path: Path, advance: Callable[[int], None]) -> Iterator[Chunk]:
    """Yield the lines of `path` in chunks of about `CHUNK_BYTES`.

    `advance` is called with the number of bytes just read from disk.

    Raises:
        ValueError: a zstd file is damaged or ends early.
    """
    first_line, lines, size = 1, [], 0
    for line in _read_lines(path, advance):
        lines.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield Chunk(first_line, lines)
            first_line, lines, size = first_line + len(lines), [], 0
    if lines:
        yield Chunk(first_line, lines)


def parse_text(line: bytes, text_key: str) -> str:
    """Return the text of one document.

    Raises:
        ValueError: the line is not a JSON object in UTF-8 with a string under `text_key`. The error
            gives the reason.
    """
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__}, not an object")
    if text_key not in document:
        more = len(document) - _KEYS_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        keys = sorted(document)[:_KEYS_SHOWN]
        raise ValueError(f"no key {text_key!r} among {keys}{rest} (see --text-key)")
    text = document[text_key]
    if not isinstance(text, str):
        raise ValueError(f"key {text_key!r} holds a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("text with half a surrogate pair, which UTF-8 cannot encode") from error
    return text


def line_error(path: Path, line: int, reason: str) -> ValueError:
    """Return the error for a malformed line of `path`; lines are counted from 1."""
    return ValueError(f"{path}:{line}: {reason}; fix the line or pass --skip-invalid")


def iter_texts(
    path: Path, text_key: str, *, skip_invalid: bool, advance: Callable[[int], None]
) -> Iterator[str]:
    """Yield the texts of `path`.

    Raises:
        ValueError: a line is malformed, and `skip_invalid` is off.
    """
    for chunk in read_chunks(path, advance):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                yield parse_text(line, text_key)
            except ValueError as error:
                if not skip_invalid:
                    raise line_error(path, number, str(error)) from error


def _read_lines(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield lines without their newline; only a newline byte ends a line."""
    blocks = _read_blocks(path, advance)
    if path.suffix == ".zst":
        blocks = _decompress(path, blocks)
    first, rest = True, b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        if lines and first:
            first, lines[0] = False, lines[0].removeprefix(_BYTE_ORDER_MARK)
        yield from lines
    if rest:
        yield rest.removeprefix(_BYTE_ORDER_MARK) if first else rest


def _read_blocks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            advance(len(block))
            yield block


def _decompress(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress concatenated zstd frames, one by one.

    The stream reader of zstandard takes the end of a truncated file for the end of the data.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = None
    try:
        for block in blocks:
            while block:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(block)
                block = b""
                if frame.eof:
                    block, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: damaged zstd data ({error}); fetch the file again") from error
    if frame is not None:
        raise ValueError(f"{path}: the zstd data ends early (truncated?); fetch the file again")
