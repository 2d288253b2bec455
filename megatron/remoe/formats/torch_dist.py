"""Megatron's `torch_dist` checkpoints, read and written in one process without Megatron.

A checkpoint is a folder of `.distcp` files, in which every shard is a `torch.save` at some offset,
and `.metadata`, a pickle that says which shard of which tensor is where. Reading asks for one
tensor at a time and touches its shards only, under whatever parallel layout they were written.

Megatron stacks layers of one kind: `decoder.layers.mlp.router.weight` is `[L, E, H]`. Here each
layer has its own name, `decoder.layers.3.mlp.router.weight`, as in models whose layers differ.
Pickles are read with explicit allow-lists.
"""

import argparse
import io
import json
import os
import pickle
import re
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron.remoe.files import read_json_object, sha256_file
from megatron.remoe.formats.safetensors import is_plain_name

_METADATA, _BACKEND = ".metadata", "metadata.json"
_COMMON, _COMMON_FILE = "common_state/shard_0_1", "common.pt"  # the file is of versions before 0.19
_HASHES = "integrity.json"
_LAYERS = "decoder.layers."
# State of a training run that is no part of its model.
_TRAINING_STATE = re.compile(r"(chained_\d+\.)?optimizer[.\d]|rng_state|rerun_state_machine_state")

MOST_LAYERS = 10_000  # that a model may have


class _StandIn:
    """A value of a class of Megatron's that is not needed, and so not imported."""

    def __init__(self, *value: Any) -> None:
        self.value = value


_ALLOWED_IN_COMMON: list[Any] = [
    argparse.Namespace,
    signal.Signals,
    io.BytesIO,  # extra states of Transformer Engine; what is in them is not read
    *(
        (_StandIn, f"megatron.core.{name}")
        for name in (
            "transformer.enums.AttnBackend",
            "transformer.enums.CudaGraphModule",
            "transformer.enums.CudaGraphScope",
            "transformer.enums.InferenceCudaGraphScope",
            "rerun_state_machine.RerunMode",
            "rerun_state_machine.RerunState",
        )
    ),
    # random states of numpy (uint32), in one-file checkpoints of training
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # before numpy 2
]
_ALLOWED_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "uint8",
        "bool",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED_IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed there")
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Location:
    """One layer of a stored tensor, or all of a tensor whose `layer` is None."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class TorchDistReader:
    """The model in one `iter_*` folder.

    Raises:
        ValueError: not a complete torch_dist checkpoint, or one that holds what is not allowed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (_BACKEND, _METADATA):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} is not a complete torch_dist checkpoint: it has no {name}"
                )
        _check_hashes(folder)
        self._metadata = _read_metadata(folder / _METADATA)
        self._shards: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, info in self._metadata.storage_data.items():
            self._shards.setdefault(index.fqn, {})[tuple(index.offset or ())] = info
        self._locations = dict(self._locate())

    def _locate(self) -> Iterator[tuple[str, _Location]]:
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata) or _TRAINING_STATE.match(key):
                continue
            shape, dtype = tuple(entry.size), entry.properties.dtype
            rest = key.removeprefix(_LAYERS)
            if rest == key or rest.split(".")[0].isdigit():
                yield key, _Location(key, None, shape, dtype)
                continue
            _check_layers(f"{self.folder / _METADATA}", key, shape)
            for layer in range(shape[0]):
                yield f"{_LAYERS}{layer}.{rest}", _Location(key, layer, shape[1:], dtype)

    @property
    def names(self) -> list[str]:
        """The model's tensors, layer by layer."""
        return list(self._locations)

    def dtype(self, name: str) -> torch.dtype:
        return self._locations[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._locations[name].shape

    def read(self, name: str) -> Tensor:
        """One tensor, put together from its shards.

        Raises:
            ValueError: shards that do not cover it, or that cannot be read.
        """
        where = self._locations[name]
        out: Tensor | None = None
        size, covered = torch.Size(where.shape).numel(), 0
        boxes: list[_Box] = []
        for chunk in self._metadata.state_dict_metadata[where.key].chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            index: Any = ...
            if where.layer is not None:
                first, count = offsets.pop(0), sizes.pop(0)
                if not first <= where.layer < first + count:
                    continue
                index = where.layer - first
            box = list(zip(offsets, sizes, strict=True))
            if box in boxes:  # the same values from another rank
                continue
            data = self._load(where.key, chunk, where.dtype)[index]
            if tuple(sizes) == where.shape:  # it is the whole, and needs no copy
                return data
            if any(_overlap(box, other) for other in boxes):
                break
            boxes.append(box)
            out = torch.empty(where.shape, dtype=where.dtype) if out is None else out
            target = out
            for axis, (start, length) in enumerate(box):
                target = target.narrow(axis, start, length)
            target.copy_(data)
            covered += target.numel()
        if out is None or covered != size:
            raise ValueError(
                f"{self.folder} holds {covered} of the {size} values of {name}; "
                f"the checkpoint is damaged"
            )
        return out

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share: `args`, `iteration` and the like."""
        if (self.folder / _COMMON_FILE).is_file():
            raw = (self.folder / _COMMON_FILE).read_bytes()
        elif _COMMON in self._shards:
            raw = self._bytes(_COMMON)
        else:
            raise ValueError(f"{self.folder} has no common state, so its arguments are unknown")
        common = load_allowed(raw, f"the common state of {self.folder}")
        common = common[0] if isinstance(common, list) and common else common
        if not isinstance(common, dict) or "args" not in common:
            raise ValueError(
                f"the common state of {self.folder} has no args; save them (no_save_*)"
            )
        return common

    def _load(self, key: str, chunk: Any, dtype: torch.dtype) -> Tensor:
        with self._open(key, tuple(chunk.offsets)) as view:
            tensor = _load_tensor(view, f"{key} of {self.folder}")
        if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != dtype:
            raise ValueError(
                f"{key} of {self.folder} is {tensor.dtype} {list(tensor.shape)} in its file, but "
                f"{dtype} {list(chunk.sizes)} in {_METADATA}; the checkpoint is damaged"
            )
        return tensor.detach()

    def _bytes(self, key: str) -> bytes:
        with self._open(key, ()) as view:
            data: bytes = view.read()
            return data

    @contextmanager
    def _open(self, key: str, offset: tuple[int, ...]) -> Iterator[Any]:
        """A shard as a file of its own; torch reads from it what it needs."""
        info = self._shards.get(key, {}).get(offset)
        if info is None:
            raise ValueError(f"{self.folder} has no shard of {key} at {list(offset)}")
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < info.offset + info.length:
                    raise ValueError(f"{path} is cut off: the values of {key} are missing")
                yield io.BufferedReader(_Part(file, info.offset, info.length))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        count: int = self._file.readinto(memoryview(buffer)[:room])
        self._position += count
        return count


_Box = list[tuple[int, int]]  # the start and the length of every axis


def _overlap(one: _Box, other: _Box) -> bool:
    return all(a < d + n and d < a + m for (a, m), (d, n) in zip(one, other, strict=True))


def _check_hashes(folder: Path) -> None:
    """Hold the files that say where everything is against their hashes, if there are any.

    Tensors have checksums of their own.
    """
    if not (folder / _HASHES).is_file():
        return
    hashes = read_json_object(folder / _HASHES, "copy the checkpoint again").get("files")
    for name in (_METADATA, _BACKEND, _COMMON_FILE):
        known = hashes.get(name) if isinstance(hashes, dict) else None
        if known and (folder / name).is_file() and sha256_file(folder / name) != known:
            raise ValueError(
                f"{folder / name} has changed since it was written; copy the checkpoint again"
            )


def _read_metadata(path: Path) -> Any:
    """The description of all tensors, every part of it of the type that it should have.

    Raises:
        ValueError: it is damaged, or asks for what is not allowed in it.
    """
    try:
        with path.open("rb") as file:
            whole = _MetadataUnpickler(file).load()
    except Exception as error:  # the remains of a pickle may mean anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}; copy the checkpoint again") from error
    try:
        problem = _find_problem(whole)
    except (AttributeError, TypeError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(f"{path} cannot be read: {problem}; copy the checkpoint again")
    return whole


def _find_problem(whole: Any) -> str | None:
    if not isinstance(whole, metadata.Metadata):
        return f"it is no description of tensors, but a {type(whole).__name__}"
    for index, info in whole.storage_data.items():
        if not is_plain_name(info.relative_path):
            return (
                f"{index.fqn} is in {info.relative_path!r}, which must be a file beside it, by its "
                f"name alone"
            )
        if not (_is_size(info.offset) and _is_size(info.length) and isinstance(index.fqn, str)):
            return f"{index.fqn} has no place in {info.relative_path}"
    for key, entry in whole.state_dict_metadata.items():
        if not isinstance(key, str):
            return f"it names a tensor {key!r}"
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype) or not _are_sizes(entry.size):
            return f"{key} has no dtype and shape"
        for chunk in entry.chunks:
            box = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
            if not _are_sizes([*chunk.offsets, *chunk.sizes]) or any(o + n > m for o, n, m in box):
                return f"a part of {key} lies outside of it"
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_sizes(values: Any) -> bool:
    return all(map(_is_size, values))


def _load_tensor(file: Any, what: str) -> Tensor:
    tensor = load_allowed(file, what)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} is no tensor, but a {type(tensor).__name__}; copy it again")
    return tensor


def load_allowed(source: Any, what: str) -> Any:
    """A `torch.save` with nothing in it but tensors, plain values, and Megatron's arguments.

    Its checksums are compared first, which torch itself does not do.

    Args:
        source: its bytes, an open file, or the path of a file that is mapped into memory.
        what: its name in errors.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    mapped = isinstance(source, Path)
    try:
        with zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
        if not mapped:
            file.seek(0)
        with torch.serialization.safe_globals(_ALLOWED_IN_COMMON):
            return torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {name[1]}" if name else (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{what} cannot be read safely: {reason}; only tensors, plain values and Megatron's "
            f"arguments are allowed in it"
        ) from error
    except Exception as error:  # the remains of a file may mean anything
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{what} is cut off or damaged ({reason}); copy it again") from error


class TorchDistWriter:
    """Writes one `iter_*` folder, tensor by tensor; `finish` completes it.

    Args:
        folder: an empty folder.
        num_layers: L; layers of one kind are stacked, as Megatron does, when `stacked`.
        stacked: all layers are of one kind.
    """

    def __init__(self, folder: Path, *, num_layers: int, stacked: bool) -> None:
        self.folder, self.num_layers, self.stacked = folder, num_layers, stacked
        self._name = "__0_0.distcp"
        self._file = (folder / self._name).open("wb")
        self._entries: dict[str, Any] = {}
        self._storage: dict[metadata.MetadataIndex, Any] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; a layer's name is that of the reader."""
        key, layer = self._key(name)
        shape, offsets = tuple(tensor.shape), (0,) * tensor.dim()
        if layer is not None:
            tensor, offsets = tensor[None], (layer, *offsets)
            shape = (self.num_layers, *shape)
        properties = metadata.TensorProperties(dtype=tensor.dtype)
        entry = self._entries.setdefault(
            key, metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
        )
        chunk = metadata.ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
        entry.chunks.append(chunk)
        index = metadata.MetadataIndex(key, chunk.offsets, len(entry.chunks) - 1)
        # torch.save writes all of a storage, also for a view of a part of it.
        owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        self._save(index, tensor.contiguous() if owns_all else tensor.clone())

    def write_extra_state(self, name: str, num_experts: int | None = None) -> None:
        """Store the empty extra state that Megatron keeps for a linear, or for every expert's."""
        key, layer = self._key(f"{name}._extra_state")
        for expert in range(num_experts or 1):
            offset, shape = [], []
            if layer is not None:
                offset, shape = [layer], [self.num_layers]
            if num_experts is not None:
                offset, shape = [*offset, expert], [*shape, num_experts]
            if not shape:
                offset, shape = [0], [1]
            shard = f"{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"
            self._write_object(f"{key}/shard_{shard}", None)

    def finish(self, common: dict[str, Any]) -> None:
        """Store the common state, and complete the checkpoint."""
        self._write_object(_COMMON, common)
        self._file.close()
        whole = metadata.Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._storage,
            storage_meta=metadata.StorageMeta(),
        )
        with (self.folder / _METADATA).open("wb") as file:
            pickle.dump(whole, file)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / _BACKEND).write_text(json.dumps(backend))

    def close(self) -> None:
        """Release the file; what is not finished is not a checkpoint."""
        self._file.close()

    def _key(self, name: str) -> tuple[str, int | None]:
        rest = name.removeprefix(_LAYERS)
        if rest == name or not self.stacked:
            return name, None
        layer, _, rest = rest.partition(".")
        return f"{_LAYERS}{rest}", int(layer)

    def _write_object(self, key: str, value: Any) -> None:
        self._entries[key] = metadata.BytesStorageMetadata()
        self._save(metadata.MetadataIndex(key), [value])  # as Megatron, in a list

    def _save(self, index: metadata.MetadataIndex, value: Any) -> None:
        start = self._file.tell()
        torch.save(value, self._file)
        length = self._file.tell() - start
        self._storage[index] = filesystem._StorageInfo(self._name, start, length)


def _check_layers(where: str, name: str, shape: tuple[int, ...]) -> None:
    """Whether a tensor of stacked layers has as many as a model can.

    Raises:
        ValueError: it has none, or more.
    """
    if not shape or not 1 <= shape[0] <= MOST_LAYERS:
        raise ValueError(
            f"{where} has {name} of shape {list(shape)}; its first dimension must be the number of "
            f"layers, at most {MOST_LAYERS}"
        )
