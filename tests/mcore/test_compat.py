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


def test_an_optimizer_steps_where_the_gpu_is_hidden(call):
    call(step_without_a_device)


def step_without_a_device() -> None:
    """CUDA says that there is no device only where it has a driver, as a hidden GPU does."""
    import torch

    with pytest.MonkeyPatch.context() as patch:

        def no_device() -> bool:
            raise torch.AcceleratorError("CUDA error: no CUDA-capable device is detected")

        patch.setattr("torch.cuda.graphs._cuda_isCurrentStreamCapturing", no_device)
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        torch.optim.AdamW([weight]).step()
        assert weight[0] < 1
