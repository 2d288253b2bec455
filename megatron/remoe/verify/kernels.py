"""Prove the Triton kernels: against torch, on a GPU or interpreted, and compiled for several GPUs.

Triton decides when it is imported whether it interprets kernels or compiles them, so each of the
two proofs has a process of its own: `python -m megatron.remoe.verify.kernels compare|compile`.

Shapes: T tokens, H hidden, E experts, A active (token, expert) pairs. The SwiGLU is compared
on T rows of width H, since no routing decides its sizes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe import cpu
from megatron.remoe.testing.launches import recorded_launches
from remoe.kernels import Permutation, combine, permute
from remoe.kernels.backend import INTERPRETER, VARIABLE, forced, has_triton
from remoe.kernels.loading import triton_kernels
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
    Case(3, 2, 2049, dtype="bf16"),  # two tiles of a row, and one column
    Case(3, 2, 517, dtype="fp64"),
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
    for choice in ("torch", "triton"):
        with forced(choice):
            found[choice] = list(quantities(case, device))
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

    z = randn(case.tokens, 2 * case.hidden).to(dtype)
    weights, grad_h = randn(case.tokens).to(dtype), randn(case.tokens, case.hidden).to(dtype)
    swiglu = swiglu_by_autograd if in_torch else swiglu_in_triton
    names = ("activation", "activation again", "grad gate and up", "grad weights")
    yield from zip(names, swiglu(z, weights, grad_h), strict=True)


def swiglu_by_autograd(z_AG: Tensor, prob_A: Tensor, grad_h_AF: Tensor) -> tuple[Tensor, ...]:
    """Return `prob * silu(gate) * up`, twice, and its gradients, computed in at least fp32."""
    exact = torch.promote_types(z_AG.dtype, torch.float32)
    z, prob = (t.to(exact).requires_grad_() for t in (z_AG, prob_A))
    gate, up = z.chunk(2, dim=1)
    h = prob.unsqueeze(1) * F.silu(gate) * up
    grads = torch.autograd.grad(h, (z, prob), grad_h_AF.to(exact))
    return tuple(t.to(z_AG.dtype) for t in (h, h, *grads))


def swiglu_in_triton(z_AG: Tensor, prob_A: Tensor, grad_h_AF: Tensor) -> tuple[Tensor, ...]:
    """Return what both kernels return."""
    kernels = triton_kernels()
    h: Tensor = kernels.weighted_swiglu(z_AG, prob_A)
    return h, *kernels.weighted_swiglu_backward(z_AG, prob_A, grad_h_AF)


def _deviation(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, 0.0)  # integers and flags are equal


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, with the arguments that were given."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def options(self) -> dict[str, Any]:
        """Return the keywords, as Triton completes them."""
        return {**self.keywords, "debug": False}


@dataclass(frozen=True)
class Shape:
    """Sizes of a launch, and the dtypes of logits, and of tokens and gates."""

    tokens: int
    experts: int
    hidden: int
    pairs: int
    logits: torch.dtype = torch.float32
    dtype: torch.dtype = torch.bfloat16
    padding: bool = False


# Whether a kernel compiles depends on each of these: tiles that the sizes fill or do not fill,
# sizes of 1, which Triton makes constants, and sizes that 16 divides, which it aligns.
SHAPES = (
    *(Shape(4096, experts, 768, 4096, padding=experts == 8) for experts in (8, 128, 1024)),
    *(Shape(4096, 8, hidden, 4097) for hidden in (1, 5, 16, 33, 64, 300, 512, 1024, 2048, 4104)),
    *(Shape(4095, 12, hidden, 31, dtype=torch.float32) for hidden in (8, 16, 256, 257, 768)),
    *(Shape(13, 1, hidden, 16, torch.float64, torch.float64) for hidden in (4, 16, 128, 768)),
    Shape(1, 1, 16, 1, padding=True),
    Shape(9, 3, 16, 27, dtype=torch.float32, padding=True),
    Shape(37, 5, 33, 70, torch.bfloat16, padding=True),
)


def compile_all(capability: int, launches: Iterable[Launch] | None = None) -> Iterator[Compiled]:
    """Compile every kernel for a GPU, which need not be there, for all launches of `SHAPES`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    target = GPUTarget("cuda", capability, 32)
    for launch in launches if launches is not None else launches_of(SHAPES):
        kernel = launch.kernel
        backend, bound, specialization, options = _specialized(launch, target)
        options, signature, constants, attributes = kernel._pack_args(
            backend, launch.options(), bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        try:
            compiled = triton_compile(source, target=target, options=options.__dict__)
        except Exception as problem:  # any: Triton raises what its passes raise
            error = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            yield Compiled(launch.name, capability, error=error)
            continue
        yield resources(launch.name, capability, _dump(compiled.asm["cubin"]))


def launches_of(shapes: Iterable[Shape]) -> list[Launch]:
    """Return the launches of the operations and their gradients, each specialization once.

    The operations run on CPU tensors, and what they launch is recorded and not run: Triton makes
    its specializations of these very arguments, with their types, alignments, and sizes of 1.
    """
    from triton.backends.compiler import GPUTarget

    recorded: list[Launch] = []
    target = GPUTarget("cuda", CAPABILITIES[0], 32)
    for shape in shapes:
        with recorded_launches(partial(_record, shape, recorded)):
            _launch_all(shape)
    found: dict[str, Launch] = {}
    for launch in recorded:
        _, bound, specialization, _ = _specialized(launch, target)
        constants = [
            str(value)
            for value, (kind, *_) in zip(bound.values(), specialization, strict=True)
            if kind == "constexpr"
        ]
        options = {k: v for k, v in launch.keywords.items() if k not in bound}
        key = f"{launch.kernel.__name__} {specialization} {constants} {options}"
        found.setdefault(key, launch)
    return list(found.values())


def _record(
    s: Shape, recorded: list[Launch], kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    sizes = f"T={s.tokens} E={s.experts} H={s.hidden} A={s.pairs}"
    dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in (s.logits, s.dtype))
    more = "".join(
        f" {key.lower()}" for key in keywords if key.startswith("HAS_") and keywords[key]
    )
    name = f"{kernel.__name__} {sizes} {dtypes}{more}"
    recorded.append(Launch(name, kernel, args, keywords))


def _launch_all(shape: Shape) -> None:
    """Call every operation and its gradient; nothing of what is returned has values."""
    from remoe.kernels import fused

    size = (shape.tokens, shape.experts)
    logits = torch.zeros(size, dtype=shape.logits).requires_grad_()
    padding = torch.zeros(shape.tokens, dtype=torch.bool) if shape.padding else None
    probs, routing_map, sum_E, *_ = fused.relu_router(logits, padding, shape.dtype)
    for outputs in ((probs, sum_E), (probs,), (sum_E,)):
        given = [torch.zeros_like(output) for output in outputs]
        torch.autograd.grad(outputs, logits, given, retain_graph=True)
    fused.count_permutation(routing_map, shape.pairs)
    chunk = routing_map.new_zeros(shape.tokens, shape.experts + 3)[:, 1:-2]
    fused.count_permutation(chunk, shape.pairs)
    index_A = torch.zeros(shape.pairs, dtype=torch.int64)
    starts_T = torch.zeros(shape.tokens, dtype=torch.int64)
    x = torch.zeros(shape.tokens, shape.hidden, dtype=shape.dtype)
    rows, prob = fused.gather(x, index_A, probs.detach(), index_A)
    assert prob is not None
    fused.gather(x, index_A)
    fused.sum_by_token(rows, index_A, starts_T)
    fused.gather_backward(rows, prob, index_A, starts_T, index_A, shape.experts)
    z, grad_h = x.new_zeros(shape.pairs, 2 * shape.hidden), x.new_zeros(shape.pairs, shape.hidden)
    fused.weighted_swiglu(z, prob)
    fused.weighted_swiglu_backward(z, prob, grad_h)


def _specialized(launch: Launch, target: Any) -> tuple[Any, Any, Any, Any]:
    """Return Triton's backend, and the arguments as it binds and specializes them at a launch."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options())
    return backend, bound, specialization, options


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
        interpret = {} if torch.version.cuda and cpu.has_gpu() else {INTERPRETER: "1"}
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
