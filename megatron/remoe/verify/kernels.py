"""Prove the Triton kernels: against torch, on a GPU or interpreted, and compiled for several GPUs.

Triton decides when it is imported whether it interprets kernels or compiles them, so each of the
two proofs has a process of its own: `python -m megatron.remoe.verify.kernels compare|compile`.

Shapes: T tokens, H hidden, E experts, A active (token, expert) pairs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.kernels import Permutation, combine, permute
from remoe.kernels.backend import INTERPRETER, VARIABLE, has_triton
from remoe.kernels.router import relu_router, relu_router_in_torch

CAPABILITIES = (80, 90, 100)  # A100, H100, B200
# Sums in another order, relative to the largest value or to 1. In bf16, which has 8 bits, Triton's
# interpreter cuts values off where torch rounds them; products of two such values differ by twice
# as much.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
_NAMES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A batch on which kernels are compared with torch.

    Attributes:
        tokens, experts, hidden: T, E and H.
        shift: added to normal logits; 99 activates all experts, and -99 none.
        padding: whether a third of the tokens is padding.
        dtype: of tokens and gates: fp64, fp32 or bf16. Logits are at least fp32.
        seed: of the random numbers.
    """

    tokens: int
    experts: int
    hidden: int = 16
    shift: float = 0.0
    padding: bool = False
    dtype: str = "fp32"
    seed: int = 0

    @property
    def name(self) -> str:
        """The name in tables."""
        padding = " padded" if self.padding else ""
        shape = f"T={self.tokens} E={self.experts} H={self.hidden}"
        return f"{shape} shift={self.shift:g} {self.dtype}{padding}"


CASES = (
    Case(0, 8),
    Case(1, 1),
    Case(37, 5, 33, padding=True, dtype="bf16"),
    Case(40, 8, 300, shift=-1),
    Case(13, 6, shift=99, dtype="bf16"),
    Case(13, 6, shift=-99, padding=True),
    Case(33, 1024, 8, shift=-2.5, padding=True),
    Case(9, 12, dtype="fp64", padding=True),
)


@dataclass(frozen=True)
class Compared:
    """The largest deviation of one quantity of a case, relative to its largest value, or to 1."""

    case: str
    quantity: str
    deviation: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is within its tolerance; NaN is not."""
        return self.deviation <= self.tolerance


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs of a GPU.

    Attributes:
        kernel: name and sizes.
        capability: of the GPU: 90 is 9.0.
        registers: number per thread.
        stack, local: bytes per thread outside of registers, where spilled values go.
        shared: bytes of shared memory per program.
        error: why it does not compile, or nothing.
    """

    kernel: str
    capability: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it compiles, and spills nothing."""
        return not self.error and self.stack == 0 and self.local == 0


def compare(case: Case, device: str = "cpu") -> list[Compared]:
    """Run a case in Triton and in torch, and compare all outputs and gradients."""
    found = {}
    before = os.environ.get(VARIABLE)
    try:
        for choice in ("torch", "triton"):
            os.environ[VARIABLE] = choice
            found[choice] = list(quantities(case, device))
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
    return [
        Compared(case.name, name, _deviation(actual, expected), _tolerance(expected.dtype))
        for (name, expected), (_, actual) in zip(found["torch"], found["triton"], strict=True)
    ]


def quantities(case: Case, device: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all outputs and gradients of a case, by name, with the kernels of REMOE_KERNELS."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = _NAMES[case.dtype]
    exact = torch.promote_types(dtype, torch.float32)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=exact).to(device)

    logits = (randn(case.tokens, case.experts) + case.shift).requires_grad_()
    padding = None
    if case.padding:
        padding = (torch.rand(case.tokens, generator=generator) < 1 / 3).to(device)
    in_torch = os.environ[VARIABLE] == "torch"
    route: Callable[..., Any] = relu_router_in_torch if in_torch else relu_router
    routed = route(logits, padding, dtype=dtype)
    directions = (randn(case.tokens, case.experts).to(dtype), randn(case.experts))
    (grad,) = torch.autograd.grad((routed.probs_TE, routed.sum_E), logits, directions)
    yield "gates", routed.probs_TE
    yield "map", routed.routing_map_TE
    yield "sums of gates", routed.sum_E
    yield "counts", routed.counts.flat
    yield "silent tokens", routed.silent
    yield "most active", routed.most_active
    yield "grad logits", grad

    count = int(routed.routing_map_TE.sum())
    permutation = Permutation.of(routed.routing_map_TE, count)
    yield "tokens of pairs", permutation.token_A
    yield "entries of pairs", permutation.entry_A
    yield "pairs by token", permutation.by_token_A
    yield "starts of tokens", permutation.starts_T

    x = randn(case.tokens, case.hidden).to(dtype).requires_grad_()
    probs = routed.probs_TE.detach().requires_grad_()
    rows, prob = permute(x, probs, permutation)
    yield "rows", rows
    yield "probabilities", prob
    y = combine(rows * prob.unsqueeze(1), permutation)
    yield "combined", y
    grads = torch.autograd.grad(y, (x, probs), randn(case.tokens, case.hidden).to(dtype))
    yield "grad tokens", grads[0]
    yield "grad gates", grads[1]


def _deviation(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, 0.0)  # integers and flags are equal


def compile_all(capability: int) -> Iterator[Compiled]:
    """Compile every kernel for a GPU, which need not be there, at sizes of real models and at 1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    target = GPUTarget("cuda", capability, 32)
    for name, kernel, signature, constants in _sources():
        # Pointers of torch are aligned to 16 bytes, which Triton sees when it launches a kernel.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, key in enumerate(kernel.arg_names)
            if signature[key].startswith("*")
        }
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        try:
            compiled = triton_compile(source, target=target)
        except Exception as problem:  # any: Triton raises what its passes raise
            yield Compiled(name, capability, error=str(problem).strip().splitlines()[0])
            continue
        yield resources(name, capability, _dump(compiled.asm["cubin"]))


def _dump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel: str, capability: int, dump: str) -> Compiled:
    """Read what `cuobjdump --dump-resource-usage` prints.

    Raises:
        ValueError: it does not say how many registers there are.
    """
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", dump)}
    if "REG" not in found:
        raise ValueError(f"cuobjdump says nothing about registers of {kernel}: {dump[:200]!r}")
    return Compiled(
        kernel,
        capability,
        registers=found["REG"],
        stack=found.get("STACK", 0),
        local=found.get("LOCAL", 0),
        shared=found.get("SHARED", 0),
    )


def _sources() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield a name, the kernel, the types of its arguments, and its constants."""
    from remoe.kernels import fused, jit

    acc = {"ACC": jit.tl.float32}
    gates, tokens, i64 = "*bf16", "*bf16", "*i64"
    for experts in (8, 128, 1024):
        tile_t, tile_e, _ = fused._tiles(1, experts)
        tile = {"E": experts, "TILE_T": tile_t, "TILE_E": tile_e}
        router = {**tile, **acc, "HAS_PADDING": True}
        sums = {"E": experts, **acc, "TILE_P": 64, "TILE_E": 16}
        table: list[tuple[Any, list[str], dict[str, Any]]] = [
            (jit.route, ["*fp32", "*i1", gates, "*i1", "*fp32", "*i32", "*i32"], router),
            (jit.route_sums, ["*fp32", "*i32", "*i32", "*fp32", i64, i64, i64], sums),
            (jit.route_backward, [gates, "*fp32", "*i1", "*i1", "*fp32"], router),
            (jit.count_pairs, ["*i1", "i32", "i32", "*i32"], tile),
            (jit.place_pairs, ["*i1", "i32", "i32", i64, i64, i64, i64, i64], tile),
        ]
        for kernel, types, constants in table:
            yield f"{kernel.__name__} E={experts}", kernel, _signature(kernel, types), constants
    for hidden in (1, 768):
        tile_t, tile_h = fused._row_tile(hidden)
        rows = {"H": hidden, "HAS_PROBS": True, "TILE_H": tile_h}
        types = [tokens, i64, tokens, gates, "i32", "i32", i64, gates]
        one = {**rows, "E": 128, "TILE_A": tile_t}
        yield f"gather H={hidden}", jit.gather, _signature(jit.gather, types), one
        types = [tokens, i64, i64, tokens, gates, i64, gates]
        two = {**rows, **acc, "TILE_T": tile_t}
        signature = _signature(jit.sum_by_token, types)
        yield f"sum_by_token H={hidden}", jit.sum_by_token, signature, two


def _signature(kernel: Any, types: list[str]) -> dict[str, str]:
    """Return the type of every argument: those given, sizes, and constants in capitals."""
    given = dict(zip(kernel.arg_names, types, strict=False))
    return {
        key: given.get(key, "constexpr" if key.isupper() or key.startswith("TILE_") else "i32")
        for key in kernel.arg_names
    }


def to_line(row: Compared | Compiled) -> str:
    """Return a row in words."""
    verdict = "ok" if row.ok else "FAILED"
    if isinstance(row, Compared):
        limit = f"at most {row.tolerance:.0e}" if row.tolerance else "equal"
        return f"{verdict:6} {row.case}, {row.quantity}: {row.deviation:.1e} ({limit})"
    where = f"{verdict:6} {row.kernel}, compute capability {row.capability / 10:.1f}"
    if row.error:
        return f"{where}: {row.error}"
    spilled = row.stack + row.local
    return f"{where}: {row.registers} registers, {spilled} B spilled, {row.shared} B shared"


def verify(report: Callable[[Compared | Compiled], None]) -> list[Compared | Compiled]:
    """Run both proofs in processes of their own, and return and report what they find.

    Without a GPU, kernels are interpreted for the comparison.

    Raises:
        ValueError: Triton is not installed.
    """
    if not has_triton():
        raise ValueError("Triton is not installed; install it (torch's CUDA wheels bring it)")
    found: list[Compared | Compiled] = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != INTERPRETER}
        environment |= {"TRITON_CACHE_DIR": cache}
        interpret = {} if torch.version.cuda and _has_gpu() else {INTERPRETER: "1"}
        for what, more in (("compare", interpret), ("compile", {})):
            command = [sys.executable, "-m", "megatron.remoe.verify.kernels", what]
            with subprocess.Popen(
                command, env=environment | more, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    row = (Compared if what == "compare" else Compiled)(**json.loads(line))
                    found.append(row)
                    report(row)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return found


def _has_gpu() -> bool:
    from megatron.remoe import cpu

    return cpu.has_gpu()


def main(what: str) -> None:
    """Print the rows of one of the proofs, a JSON object a line."""
    if what == "compile":
        for capability in CAPABILITIES:
            for row in compile_all(capability):
                print(json.dumps(asdict(row)), flush=True)
        return
    device = "cpu" if os.environ.get(INTERPRETER) else "cuda"
    for case in CASES:
        for compared in compare(case, device):
            print(json.dumps(asdict(compared)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
