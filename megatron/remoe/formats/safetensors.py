"""Safetensors files: written tensor by tensor, and read with checks of their names.

The writer is our own because the safetensors library wants all tensors of a file at once. A file
consists of 8 bytes with the length of a JSON header, the header (dtype, shape and byte range of
every tensor), and the tensors' bytes.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.remoe.files import parse_json, read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MOST_VALUES = 2**56  # of one tensor; PyTorch cannot count the bytes of a larger one
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def parse_size(text: str) -> int:
    """Return the number of bytes in "5GB", "500MB", "1GiB" or a plain number.

    Raises:
        ValueError: the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match else 0
    if size <= 0:
        raise ValueError(f"max-shard-size is {text!r}; it must be a size such as 500MB or 5GB")
    return size


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """A writer of tensors, in a given order, to files of a limited size, and of their index.

    Args:
        folder: the folder of the files.
        spec: dtype and shape of every tensor, in the order in which the tensors will come.
        max_shard_bytes: the largest size of a file; a larger tensor has a file for itself.
        name: the file's name if there is only one.
    """

    def __init__(
        self, folder: Path, spec: Spec, max_shard_bytes: int, *, name: str = WEIGHTS
    ) -> None:
        self.folder, self.spec = folder, spec
        self._sizes = {n: dtype.itemsize * math.prod(shape) for n, (dtype, shape) in spec.items()}
        self.total = sum(self._sizes.values())
        shards: list[list[str]] = [[]]
        size = 0
        for tensor, more in self._sizes.items():
            if shards[-1] and size + more > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += more
        stem, count = name.removesuffix(".safetensors"), len(shards)
        files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._shards = dict(zip([name] if count == 1 else files, shards, strict=True))
        self._weight_map = {t: file for file, shard in self._shards.items() for t in shard}
        self._order = iter(spec)
        self._file: Any = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            return
        if missing := list(self._order):
            raise ValueError(f"{', '.join(missing[:8])} were not produced")
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: the tensor is not the next one, or has another dtype or shape.
        """
        expected = next(self._order, "no other tensor")
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != self.spec[name]:
            raise ValueError(
                f"{name} ({tensor.dtype}, {list(tensor.shape)}) came where {expected} "
                f"({self.spec.get(expected)}) was expected"
            )
        file = self._weight_map[name]
        if name == self._shards[file][0]:
            self._open(file)
        self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def _open(self, file: str) -> None:
        """Open the next file, and write its header."""
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self._shards[file]:
            (dtype, shape), start, end = self.spec[tensor], end, end + self._sizes[tensor]
            header[tensor] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / file).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)


class SafetensorsReader:
    """The weights of a Hugging Face folder, and of files beside them.

    Args:
        folder: the model's folder.
        extra: names of files beside the weights, which need not exist, each with the prefix that
            all names of tensors in it have.

    Attributes:
        meta: a tensor without values for every name, which has the shape and the dtype.

    Raises:
        ValueError: there are no safetensors, a file is damaged or does not fit the index, a tensor
            is there twice, or has a dtype in which no model is stored.
    """

    def __init__(self, folder: Path, extra: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self.meta: dict[str, Tensor] = {}
        if (folder / INDEX).is_file():
            weight_map = _read_index(folder / INDEX)
            for file in sorted(set(weight_map.values())):
                self._add(file)
            if different := set(weight_map.items()) ^ set(self._where.items()):
                names = ", ".join(dict.fromkeys(name for name, _ in sorted(different)[:8]))
                raise ValueError(
                    f"{folder / INDEX} and its files differ in {names}; copy them again"
                )
        elif (folder / WEIGHTS).is_file():
            self._add(WEIGHTS)
        else:
            raise ValueError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read, so save "
                f"the model with save_pretrained first"
            )
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
            view = self._files[file].get_slice(name)
            if (kind := view.get_dtype()) not in _DTYPES:
                raise ValueError(
                    f"{path} has {name} as {kind}; only weights in {', '.join(sorted(_DTYPES))} "
                    f"can be converted"
                )
            if not is_possible(shape := view.get_shape()):
                raise ValueError(f"{path} has {name} of the impossible shape {shape}")
            self.meta[name] = torch.empty(shape, dtype=_DTYPES[kind], device="meta")

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """Return the name of every tensor's file, which is beside the index.

    Raises:
        ValueError: there is no such map, or it names a file that is elsewhere.
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


def is_possible(shape: Iterable[int]) -> bool:
    """Return whether PyTorch can count the bytes of a tensor, even where a dimension is 0."""
    return math.prod(max(1, size) for size in shape) <= _MOST_VALUES


def is_plain_name(name: object) -> bool:
    """Return whether this is the name of a file, and not a path that leads elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _check_header(path: Path) -> None:
    """Check that every name is in the header once; the safetensors library takes the last one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(length))
