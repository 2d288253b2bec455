"""Megatron's `torch_dist` checkpoints, read and written in one process without Megatron.

A checkpoint is a folder of `.distcp` files, in which every shard is a `torch.save` at some offset,
and `.metadata`, a pickle that says which shard of which tensor is where. A reader is asked for one
tensor at a time and opens only the shards of that tensor, whatever parallel layout they are from.

Megatron stacks layers of one kind: `decoder.layers.mlp.router.weight` is `[L, E, H]`. Here each
layer has its own name, `decoder.layers.3.mlp.router.weight`, as in models whose layers differ.
"""

import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron.remoe.files import read_json_object, sha256_file
from megatron.remoe.formats.pickles import MetadataUnpickler, load_allowed
from megatron.remoe.formats.safetensors import is_plain_name, is_possible

_METADATA, _BACKEND = ".metadata", "metadata.json"
_COMMON, _COMMON_FILE = "common_state/shard_0_1", "common.pt"  # the file is of versions before 0.19
_HASHES = "integrity.json"
_DATA = "__0_0.distcp"  # the only data file that is written
_LAYERS = "decoder.layers."
# State of a training run that is no part of its model.
_TRAINING_STATE = re.compile(r"(chained_\d+\.)?optimizer[.\d]|rng_state|rerun_state_machine_state")

MOST_LAYERS = 10_000  # the most layers that a model may have


@dataclass(frozen=True)
class _Location:
    """The place of a tensor: one layer of the stored tensor `key`, or all of it for None."""

    key: str
    layer: int | None
    meta: Tensor


class TorchDistReader:
    """The model in one `iter_*` folder.

    Raises:
        ValueError: the folder is not a complete torch_dist checkpoint, or holds what is not
            allowed in one.
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
        self.meta = {name: where.meta for name, where in self._locations.items()}

    def _locate(self) -> Iterator[tuple[str, _Location]]:
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata) or _TRAINING_STATE.match(key):
                continue
            shape = tuple(entry.size)
            whole = torch.empty(shape, dtype=entry.properties.dtype, device="meta")
            rest = key.removeprefix(_LAYERS)
            if rest == key or rest.split(".")[0].isdigit():
                yield key, _Location(key, None, whole)
                continue
            if not shape or not 1 <= shape[0] <= MOST_LAYERS:
                raise ValueError(
                    f"{self.folder / _METADATA} has {key} of shape {list(shape)}; its first "
                    f"dimension must be the number of layers, at most {MOST_LAYERS}"
                )
            for layer in range(shape[0]):
                yield f"{_LAYERS}{layer}.{rest}", _Location(key, layer, whole[layer])

    def read(self, name: str) -> Tensor:
        """Return one tensor, put together from its shards.

        Raises:
            ValueError: the shards do not cover the tensor, or cannot be read.
        """
        where = self._locations[name]
        meta, covered = where.meta, 0
        out = torch.empty(0)
        boxes: list[tuple[slice, ...]] = []
        for chunk in self._metadata.state_dict_metadata[where.key].chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            index: Any = ...
            if where.layer is not None:
                first, count = offsets.pop(0), sizes.pop(0)
                if not first <= where.layer < first + count:
                    continue
                index = where.layer - first
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            if box in boxes:  # another rank wrote the same values
                continue
            data = self._load(where.key, chunk, meta.dtype)[index]
            if tuple(sizes) == meta.shape:  # it is the whole tensor, and needs no copy
                return data
            if any(_overlap(box, other) for other in boxes):
                break
            if not boxes:
                out = torch.empty_like(meta, device="cpu")
            boxes.append(box)
            out[box] = data
            covered += data.numel()
        if not boxes or covered != meta.numel():
            raise ValueError(
                f"{self.folder} holds {covered} of the {meta.numel()} values of "
                f"{name}; the checkpoint is damaged"
            )
        return out

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share: `args`, `iteration` and the like."""
        where = f"the common state of {self.folder}"
        if (self.folder / _COMMON_FILE).is_file():
            common = load_allowed((self.folder / _COMMON_FILE).read_bytes(), where)
        elif _COMMON in self._shards:
            with self._open(_COMMON, ()) as view:
                common = load_allowed(view.read(), where)
        else:
            raise ValueError(f"{self.folder} has no common state, so its arguments are unknown")
        common = common[0] if isinstance(common, list) and common else common
        if not isinstance(common, dict) or "args" not in common:
            raise ValueError(f"{where} has no args; save them (no_save_*)")
        return common

    def _load(self, key: str, chunk: Any, dtype: torch.dtype) -> Tensor:
        what = f"{key} of {self.folder}"
        with self._open(key, tuple(chunk.offsets)) as view:
            tensor = load_allowed(view, what)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} is no tensor, but a {type(tensor).__name__}; copy it again")
        if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != dtype:
            raise ValueError(
                f"{what} is {tensor.dtype} {list(tensor.shape)} in its file, but "
                f"{dtype} {list(chunk.sizes)} in {_METADATA}; the checkpoint is damaged"
            )
        return tensor.detach()

    @contextmanager
    def _open(self, key: str, offset: tuple[int, ...]) -> Iterator[Any]:
        """Yield a shard as a file of its own, from which torch reads only what it needs."""
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
    """A part of an open file, as a file of its own.

    PyTorch has such a view too, but its `seek` from the end, which zipfile needs, is wrong.
    """

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


def _overlap(one: tuple[slice, ...], other: tuple[slice, ...]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.start < b.stop and b.start < a.stop for a, b in pairs)


def _check_hashes(folder: Path) -> None:
    """Compare the files that say where everything is with their hashes, if there are hashes.

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
    """Return the description of all tensors, of which every part has its proper type.

    Raises:
        ValueError: the file is damaged, or asks for what is not allowed in it.
    """
    try:
        with path.open("rb") as file:
            whole = MetadataUnpickler(file).load()
        _check_metadata(whole)
    except Exception as error:  # a damaged pickle can raise anything, and hold anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}; copy the checkpoint again") from error
    return whole


def _check_metadata(whole: Any) -> None:
    if not isinstance(whole, metadata.Metadata):
        raise ValueError(f"it is no description of tensors, but a {type(whole).__name__}")
    for index, info in whole.storage_data.items():
        if not is_plain_name(info.relative_path):
            raise ValueError(
                f"{index.fqn} is in {info.relative_path!r}, which must be a file beside it, by its "
                f"name alone"
            )
        if not (_are_sizes([info.offset, info.length]) and isinstance(index.fqn, str)):
            raise ValueError(f"{index.fqn} has no place in {info.relative_path}")
    for key, entry in whole.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError(f"it names a tensor {key!r}")
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype) or not _are_sizes(entry.size):
            raise ValueError(f"{key} has no dtype and shape")
        if not is_possible(entry.size):
            raise ValueError(f"{key} has the impossible shape {list(entry.size)}")
        for chunk in entry.chunks:
            box = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
            if not _are_sizes([*chunk.offsets, *chunk.sizes]) or any(o + n > m for o, n, m in box):
                raise ValueError(f"a part of {key} lies outside of it")


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


class TorchDistWriter:
    """A writer of one `iter_*` folder, tensor by tensor; `finish` completes the checkpoint.

    Args:
        folder: an empty folder.
        num_layers: the number of layers, L.
        stacked: whether all layers are of one kind, and are therefore stacked as Megatron does.
    """

    def __init__(self, folder: Path, *, num_layers: int, stacked: bool) -> None:
        self.folder, self.num_layers, self.stacked = folder, num_layers, stacked
        self._file = (folder / _DATA).open("wb")
        self._entries: dict[str, Any] = {}
        self._storage: dict[metadata.MetadataIndex, Any] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor, whose name is that of the reader."""
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
        """Store the empty extra state that Megatron keeps for a linear, or for each expert's."""
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
        """Store the common state and complete the checkpoint."""
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
        """Close the file; a folder that was not finished is no checkpoint."""
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
        self._storage[index] = filesystem._StorageInfo(_DATA, start, length)
