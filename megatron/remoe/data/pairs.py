"""Megatron's `.bin`/`.idx` pairs: whether one is whole, before Megatron maps it into memory.

Megatron reads past the end of a file that is cut off. An index has a header with `MMIDIDX` and two
zeros, a version (8 bytes), the code of the dtype (1), and the numbers of sequences and of document
boundaries (8 each). Then come lengths (4 each) and offsets (8 each) of the sequences, and the
boundaries (8 each).
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # bytes of a token, by the code of its dtype


def pair_of(prefix: Path) -> list[Path]:
    """Return the paths of the two files of a prefix."""
    return [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]


def prefixes_of(blend: Sequence[Any]) -> list[str]:
    """Return the prefixes of a list of Megatron's, which may have a weight before each of them."""
    words = [str(word) for word in blend]
    return words[1::2] if len(words) % 2 == 0 and all(map(_is_number, words[::2])) else words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def count_tokens(prefix: Path) -> int:
    """Return the number of tokens of a pair that is whole."""
    tokens, index = pair_of(prefix)
    with index.open("rb") as file:
        code = _HEADER.unpack(file.read(_HEADER.size))[2]
    return tokens.stat().st_size // _BYTES[code]


def check_pair(prefix: Path, *, contents: bool = True) -> None:
    """Check that the files of a prefix are a pair, and whole.

    Args:
        prefix: path of the two files without their suffixes.
        contents: whether to read the whole index, and not only its header and its last entries.

    Raises:
        ValueError: a file is missing, is cut off or is not a token file.
    """
    tokens, index = pair_of(prefix)
    for path in (tokens, index):
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; name token files without their suffix (remoe data "
                f"tokenize makes them)"
            )
    again = "tokenize the data again (remoe data tokenize), or copy it again"
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        magic, version, code, sequences, boundaries = (
            _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        )
        if magic != _MAGIC or version != 1 or code not in _BYTES:
            raise ValueError(f"{index} is no index of token files; {again}")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if index.stat().st_size != expected:
            raise ValueError(
                f"{index} has {index.stat().st_size} bytes, but its header asks for {expected}; "
                f"{again}"
            )
        if not contents:
            _check_size(tokens, _last_byte(file, sequences, _BYTES[code]), again)
            return
        lengths = np.fromfile(file, np.int32, sequences)
        offsets = np.fromfile(file, np.int64, sequences)
        documents = np.fromfile(file, np.int64, boundaries)
    sizes = lengths.astype(np.int64) * _BYTES[code]
    size = int(sizes.sum())
    is_sound = (lengths >= 0).all() and (offsets == np.cumsum(sizes) - sizes).all()
    if not is_sound or ((documents < 0) | (documents > sequences)).any():
        raise ValueError(f"{index} is damaged: it points outside of its tokens; {again}")
    _check_size(tokens, size, again)


def _last_byte(index: BinaryIO, sequences: int, bytes_per_token: int) -> int:
    """Return where the last sequence of an open index ends."""
    if sequences == 0:
        return 0
    index.seek(_HEADER.size + 4 * (sequences - 1))
    (length,) = np.fromfile(index, np.int32, 1).tolist()
    index.seek(_HEADER.size + 12 * sequences - 8)
    (offset,) = np.fromfile(index, np.int64, 1).tolist()
    return int(offset + length * bytes_per_token)


def _check_size(tokens: Path, size: int, again: str) -> None:
    found, index = tokens.stat().st_size, tokens.with_suffix(".idx")
    if found != size:
        raise ValueError(f"{tokens} has {found} bytes, but {index} asks for {size}; {again}")
