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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

_METADATA, _BACKEND = ".metadata", "metadata.json"
_COMMON = "common_state/shard_0_1"
_LAYERS = "decoder.layers."
# State of a training run that is no part of its model.
_TRAINING_STATE = re.compile(r"(chained_\d+\.)?optimizer[.\d]|rng_state|rerun_state_machine_state")


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
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # before numpy 2
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
        try:
            with (folder / _METADATA).open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{folder / _METADATA} cannot be read: {error}; copy the checkpoint again"
            ) from error
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
        for chunk in self._metadata.state_dict_metadata[where.key].chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            index: Any = ...
            if where.layer is not None:
                first, count = offsets.pop(0), sizes.pop(0)
                if not first <= where.layer < first + count:
                    continue
                index = where.layer - first
            data = self._load(where.key, tuple(chunk.offsets))[index]
            if tuple(sizes) == where.shape:  # it is the whole, and needs no copy
                return data
            out = torch.empty(where.shape, dtype=where.dtype) if out is None else out
            target = out
            for axis, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
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
        if (self.folder / "common.pt").is_file():  # before 0.19
            raw = (self.folder / "common.pt").read_bytes()
        elif _COMMON in self._shards:
            raw = self._bytes(_COMMON)
        else:
            raise ValueError(f"{self.folder} has no common state, so its arguments are unknown")
        common = load_allowed(raw, f"the common state of {self.folder}")
        common = common[0] if isinstance(common, list) else common
        if not isinstance(common, dict) or "args" not in common:
            raise ValueError(
                f"the common state of {self.folder} has no args; save them (no_save_*)"
            )
        return common

    def _load(self, key: str, offset: tuple[int, ...]) -> Tensor:
        with self._open(key, offset) as view:
            tensor = torch.load(view, weights_only=True)
        assert isinstance(tensor, Tensor)
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
                yield filesystem._create_file_view(file, info.offset, info.length)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged: {key} cannot be read ({reason})") from error


def load_allowed(source: bytes | Path, what: str) -> Any:
    """A `torch.save` with nothing in it but tensors, plain values, and Megatron's arguments.

    Args:
        source: its bytes, or a file that is mapped into memory.
        what: its name in errors.

    Raises:
        ValueError: it holds something else.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    mapped = isinstance(source, Path)
    try:
        with torch.serialization.safe_globals(_ALLOWED_IN_COMMON):
            return torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise ValueError(
            f"{what} cannot be read safely: {reason.splitlines()[0]}; only tensors, plain values "
            f"and Megatron's arguments are allowed in it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
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
