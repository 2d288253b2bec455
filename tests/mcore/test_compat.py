"""What depends on the version of Megatron."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_the_version_that_counts_is_the_one_that_is_imported(tmp_path):
    """Pip knows of another one than the one that is first on the path."""
    package = tmp_path / "megatron/core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "package_info.py").write_text('__version__ = "0.18.3"\n')
    code = "from megatron.remoe import compat; compat.apply()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].startswith(
        f"ValueError: megatron-core 0.18.3 is imported from {package}, but this release of remoe "
        f"works with 0.19."
    )


def test_whether_a_stream_is_captured_is_known_where_the_gpu_is_hidden(call):
    """Optimizers of torch 2.11 ask; CUDA with a driver and a hidden GPU has no device to ask."""
    assert call(is_captured) is False


def is_captured() -> bool:
    import torch

    def no_device() -> bool:
        raise torch.AcceleratorError("CUDA error: no CUDA-capable device is detected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.graphs._cuda_isCurrentStreamCapturing", no_device)
        return torch.cuda.is_current_stream_capturing()
