"""Pickles in checkpoints, read with explicit lists of what may be in them.

A pickle can ask for any function of Python and call it. Here it may ask only for what is listed:
tensors, plain values, Megatron's arguments and PyTorch's description of a distributed checkpoint.
"""

import argparse
import io
import pickle
import re
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray


class _StandIn:
    """A value of one of Megatron's classes, which is not needed and therefore not imported."""

    def __init__(self, *value: Any) -> None:
        self.value = value


_ALLOWED: list[Any] = [
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
    # random states of numpy (uint32), which are in one-file checkpoints of a training
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


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler of the `.metadata` of a distributed checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of the allow-list; refuse every other one."""
        if name not in _ALLOWED_IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed there")
        return super().find_class(module, name)


def load_allowed(source: Any, what: str) -> Any:
    """Load a `torch.save` that holds only tensors, plain values and Megatron's arguments.

    Its checksums are compared first, which `torch.load` does not do.

    Args:
        source: the bytes, an open file, or the path of a file that is mapped into memory.
        what: the name of the source in error messages.

    Raises:
        ValueError: the source is damaged, or holds something else.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    mapped = isinstance(source, Path)
    try:
        with zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
        if not mapped:
            file.seek(0)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {name[1]}" if name else (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{what} cannot be read safely: {reason}; only tensors, plain values and Megatron's "
            f"arguments are allowed in it"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{what} is cut off or damaged ({reason}); copy it again") from error
