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

from megatron.remoe.files import parse_json, read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_BY_NAME = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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

    Args:
        folder: of the model.
        extra: files beside the weights, and the prefix that all names in them have.

    Raises:
        ValueError: no safetensors there, files that are damaged or do not fit their index, or a
            tensor that is there twice.
    """

    def __init__(self, folder: Path, extra: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if (folder / INDEX).is_file():
            weight_map = _read_index(folder / INDEX)
        elif (folder / WEIGHTS).is_file():
            weight_map = None
        else:
            raise ValueError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read, so save "
                f"the model with save_pretrained first"
            )
        for file in [WEIGHTS] if weight_map is None else sorted(set(weight_map.values())):
            self._add(file)
        if weight_map is not None and weight_map != self._where:
            different = sorted(set(weight_map.items()) ^ set(self._where.items()))
            names = ", ".join(dict.fromkeys(name for name, _ in different[:8]))
            raise ValueError(f"{folder / INDEX} and its files differ in {names}; copy them again")
        for file, prefix in (extra or {}).items():
            if (folder / file).is_file():
                self._add(file, prefix)

    def _add(self, file: str, prefix: str = "") -> None:
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {INDEX} names it")
        try:
            self._files[file] = safe_open(path, framework="pt")
            _check_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name in self._files[file].keys():  # noqa: SIM118, it is no dict
            if name in self._where:
                other = self.folder / self._where[name]
                raise ValueError(f"{name} is in {path} and in {other}; remove one of them")
            if not name.startswith(prefix):
                raise ValueError(f"{path} has {name}, whose name does not begin with {prefix}")
            self._where[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """One of the dtypes in which a model is stored.

        Raises:
            ValueError: it is of another.
        """
        kind = self._files[self._where[name]].get_slice(name).get_dtype()
        if kind not in _BY_NAME:
            raise ValueError(
                f"{self.folder / self._where[name]} has {name} as {kind}; only weights in "
                f"{', '.join(sorted(_BY_NAME))} can be converted"
            )
        return _BY_NAME[kind]

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, each beside the index.

    Raises:
        ValueError: no such map, or a file that is elsewhere.
    """
    weight_map = read_json_object(path, "copy it again").get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has no weight_map of tensors to files; copy it again")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise ValueError(
                f"{path} has {name} in {file!r}; it must be a file beside it, by its name alone"
            )
    return weight_map


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file, and no path that leads elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _check_header(path: Path) -> None:
    """Whether every name is in the header once; the safetensors library takes the last."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(length))
