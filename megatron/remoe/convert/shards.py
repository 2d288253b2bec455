"""Safetensors files, written as tensors come; the safetensors library wants a file's all at once.

The format: 8 bytes with the length of a JSON header, the header (dtype, shape and byte range of
every tensor), and the tensors' bytes.
"""

import json
import re
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1GiB" or a number.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match else 0
    if size <= 0:
        raise ValueError(f"max-shard-size is {text!r}; it must be a size such as 500MB or 5GB")
    return size


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


class ShardWriter:
    """Writes tensors in the given order to files of at most a given size, and their index.

    Args:
        folder: where the files go.
        spec: dtype and shape of every tensor, in the order in which they will come.
        max_shard_bytes: size of a file; a tensor that is larger has one for itself.
        name: of the file when there is one only.
    """

    def __init__(
        self, folder: Path, spec: Spec, max_shard_bytes: int, *, name: str = WEIGHTS
    ) -> None:
        self.folder, self.spec, self.total = folder, spec, 0
        shards: list[list[str]] = [[]]
        size = 0
        for tensor, (dtype, shape) in spec.items():
            more = num_bytes(dtype, shape)
            if shards[-1] and size + more > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += more
            self.total += more
        stem, count = name.removesuffix(".safetensors"), len(shards)
        self.files = (
            [name]
            if count == 1
            else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        self._shards = deque(zip(self.files, shards, strict=True))
        self._waiting: deque[str] = deque()
        self._weight_map = {t: f for f, s in self._shards for t in s}
        self._file: Any = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            return
        missing = [*self._waiting, *(t for _, shard in self._shards for t in shard)]
        if missing:
            raise ValueError(f"{', '.join(missing[:8])} were not produced")
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it is not the next, or of another dtype or shape.
        """
        if not self._waiting:
            self._open_next(name)
        expected = self._waiting.popleft()
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != self.spec[name]:
            raise ValueError(
                f"{name} ({tensor.dtype}, {list(tensor.shape)}) came where {expected} "
                f"({self.spec[expected]}) was expected"
            )
        self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def _open_next(self, name: str) -> None:
        if not self._shards:
            raise ValueError(f"{name} was produced more than once")
        if self._file is not None:
            self._file.close()
        file, tensors = self._shards.popleft()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            dtype, shape = self.spec[tensor]
            start, end = end, end + num_bytes(dtype, shape)
            entry = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            header[tensor] = entry
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / file).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._waiting.extend(tensors)


class SafetensorsReader:
    """The weights of a Hugging Face folder, and the rows of padding beside them if there are any.

    Raises:
        ValueError: no safetensors there, or files that are damaged or do not fit their index.
    """

    def __init__(self, folder: Path, extra: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (folder / WEIGHTS).is_file():
            weight_map, files = None, [WEIGHTS]
        else:
            raise ValueError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read, so save "
                f"the model with save_pretrained first"
            )
        for file in files:
            self._add(file)
        if weight_map is not None and set(weight_map) != set(self._where):
            different = sorted(set(weight_map) ^ set(self._where))
            raise ValueError(f"{folder / INDEX} and its files differ in {', '.join(different[:8])}")
        for file in extra:
            if (folder / file).is_file():
                self._add(file)

    def _add(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {INDEX} names it")
        try:
            self._files[file] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name in self._files[file].keys():  # noqa: SIM118, it is no dict
            self._where[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor
