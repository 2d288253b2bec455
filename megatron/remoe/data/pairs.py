"""Megatron's `.bin`/`.idx` pairs: whether one is whole, before Megatron maps it into memory.

The index: `MMIDIDX` and two zeros, a version (8 bytes), the code of the dtype (1), the numbers of
sequences and of document boundaries (8 each); then lengths (4 each) and offsets (8 each) of the
sequences, and the boundaries (8 each). Megatron reads past the end of a file that is cut off.
"""

import struct
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # of a token, by the code of its dtype


def check_pair(prefix: Path) -> None:
    """Check that the files of a prefix are a pair, and whole.

    Raises:
        ValueError: a file that is missing, cut off or no token file.
    """
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(
                f"{prefix}{suffix} does not exist; name token files without their suffix (remoe "
                f"data tokenize makes them)"
            )
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
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
        lengths = np.fromfile(file, np.int32, sequences)
        offsets = np.fromfile(file, np.int64, sequences)
        documents = np.fromfile(file, np.int64, boundaries)
    sizes = lengths.astype(np.int64) * _BYTES[code]
    size = int(sizes.sum())
    is_sound = (lengths >= 0).all() and (offsets == np.cumsum(sizes) - sizes).all()
    if not is_sound or ((documents < 0) | (documents > sequences)).any():
        raise ValueError(f"{index} is damaged: it points outside of its tokens; {again}")
    if tokens.stat().st_size != size:
        raise ValueError(
            f"{tokens} has {tokens.stat().st_size} bytes, but {index} asks for {size}; {again}"
        )
