"""The kernels in Triton: how they are chosen, and that they are right, interpreted and compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron.remoe.verify import kernels
from megatron.remoe.verify.kernels import Compared, Compiled
from remoe.kernels import backend, relu_router
from remoe.kernels.router import relu_router_in_torch

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not backend.has_triton(), reason="needs Triton")


def python(*arguments, **environment):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **interpret, **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=whole, cwd=ROOT, capture_output=True, text=True
    )


def test_torch_is_chosen_on_a_cpu(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert not backend.uses_triton(torch.zeros(1), "sum by token")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_triton
def test_triton_is_chosen_on_a_gpu_where_it_is_faster(monkeypatch):
    x = torch.zeros(1, device="cuda")
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    operations = get_args(backend.Operation)
    assert {o for o in operations if backend.uses_triton(x, o)} == backend.FASTER
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert all(backend.uses_triton(x, o) for o in operations)


def test_a_tensor_without_memory_runs_in_torch(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv(backend.VARIABLE, "triton")
    with FakeTensorMode():
        assert not backend.uses_triton(torch.zeros(1, device="cuda"), "sum by token")


@pytest.mark.parametrize(
    ("value", "installed", "said"),
    [
        ("fast", True, "REMOE_KERNELS is 'fast'; set it to one of auto, torch, triton"),
        ("triton", True, "a tensor is on cpu; move it to a GPU, set TRITON_INTERPRET=1, or unset"),
        ("triton", False, "Triton is not installed"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(monkeypatch, value, installed, said):
    monkeypatch.setenv(backend.VARIABLE, value)
    monkeypatch.delenv(backend.INTERPRETER, raising=False)
    monkeypatch.setattr(backend, "has_triton", lambda: installed)
    with pytest.raises(ValueError, match=said):
        relu_router(torch.zeros(1, 1))


@pytest.mark.processes
def test_kernels_can_be_imported_without_triton():
    result = python(
        "-c",
        "import importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a); "
        "from remoe.kernels import backend, fused, jit; "
        "assert jit.tl is None and not backend.has_triton()",
    )
    assert result.returncode == 0, result.stderr


def test_routing_in_torch_by_hand():
    logits = torch.tensor([[1.0, -1.0], [2.0, 3.0], [-1.0, 0.0], [5.0, 5.0]])
    padding = torch.tensor([False, False, False, True])
    routed = relu_router_in_torch(logits, padding, dtype=torch.bfloat16)
    assert routed.probs_TE.tolist() == [[1, 0], [2, 3], [0, 0], [5, 5]]
    assert routed.probs_TE.dtype == torch.bfloat16
    assert routed.routing_map_TE.sum() == 5
    assert routed.sum_E.tolist() == [3, 3]
    assert routed.counts.flat.tolist() == [3, 2, 1]
    assert (routed.silent, routed.most_active) == (1, 2)


@needs_triton
@pytest.mark.processes
def test_kernels_equal_torch_over_many_shapes():
    result = python("-m", "pytest", "-p", "no:cacheprovider", "tests/triton_cases.py")
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@needs_triton
@pytest.mark.processes
def test_a_wrong_kernel_fails():
    """A combine that leaves out the last row of every token, and a wrong derivative of silu."""
    broken = ROOT / "remoe/kernels/jit.py"
    text = broken.read_text()
    assert "range(start, end)" in text and "silu * (1 - sigmoid)" in text
    result = python(
        "-c",
        "import sys, types, pathlib, linecache\n"
        f"path = pathlib.Path({str(broken)!r})\n"
        "text = path.read_text().replace('range(start, end)', 'range(start, end - 1)')\n"
        "text = text.replace('silu * (1 - sigmoid)', 'silu * sigmoid')\n"
        "import tempfile, importlib.util as u\n"
        "file = pathlib.Path(tempfile.mkdtemp()) / 'jit.py'\n"
        "file.write_text(text)\n"
        "spec = u.spec_from_file_location('remoe.kernels.jit', file)\n"
        "module = u.module_from_spec(spec)\n"
        "sys.modules['remoe.kernels.jit'] = module\n"
        "spec.loader.exec_module(module)\n"
        "import remoe.kernels; remoe.kernels.jit = module\n"
        "from megatron.remoe.verify import kernels\n"
        "import torch\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "rows = kernels.compare(kernels.Case(9, 3), device)\n"
        "print(sorted(row.quantity for row in rows if not row.ok))\n",
    )
    wrong = ["combined", "grad gate and up", "grad gates", "grad tokens"]
    assert result.stdout.strip() == str(wrong), result.stderr


def test_a_deviation_or_a_spill_fails():
    assert Compared("case", "rows", 1e-6, 1e-5).ok
    assert not Compared("case", "rows", float("nan"), 1e-5).ok
    assert not Compared("case", "rows", 1e-4, 1e-5).ok
    assert Compiled("gather", 90, registers=32, shared=512).ok
    assert not Compiled("gather", 90, registers=255, local=8).ok
    assert not Compiled("gather", 90, registers=255, stack=8).ok
    assert not Compiled("gather", 90, error="no such operation").ok


def test_resources_are_read_from_cuobjdump():
    dump = " Function k:\n  REG:40 STACK:16 SHARED:512 LOCAL:8 CONSTANT[0]:980 TEXTURE:0\n"
    assert kernels.resources("k", 90, dump) == Compiled("k", 90, 40, 16, 8, 512)
    with pytest.raises(ValueError, match="nothing about registers"):
        kernels.resources("k", 90, "")


@needs_triton
@pytest.mark.processes
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """For one capability and some shapes; `remoe verify kernels` takes three, and all."""
    environment = {k: v for k, v in os.environ.items() if k != backend.INTERPRETER}
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from megatron.remoe.verify import kernels\n"
            "launches = kernels.launches_of(s for s in kernels.SHAPES if s.hidden == 16)\n"
            "for row in kernels.compile_all(90, launches): print(row.ok, kernels.to_line(row))",
        ],
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("True") for line in lines), lines
    assert {line.split()[2] for line in lines} == {
        *("route", "route_sums", "route_backward", "count_pairs", "place_pairs"),
        *("gather", "sum_by_token", "weighted_swiglu", "weighted_swiglu_backward"),
    }
