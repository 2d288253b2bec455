"""Report what this machine has, what will be used of it, and what is disabled and why."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from megatron.remoe import compat, cpu
from megatron.remoe.unsupported import has_package
from remoe.kernels.experts import uses_grouped_mm


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        subject: What was looked at.
        status: "ok", "disabled" or "missing".
        detail: The version, the choice, or the reason with its remedy.
    """

    subject: str
    status: str
    detail: str


_PACKAGES = ("torch", "transformers", "tokenizers", "omegaconf", "remoe")
_OPTIONAL = {
    "transformer-engine": "transformer_impl transformer_engine, context parallelism, fp8 "
    "(pip install 'remoe[te]'; unverified with ReLU routing)",
    "triton": "Megatron's Triton kernels, on GPUs",
    "tensorboard": "tensorboard_dir",
    "wandb": "wandb_project (pip install 'remoe[wandb]')",
    "matplotlib": "remoe plot (pip install 'remoe[analysis]')",
    "scipy": "remoe compare (pip install 'remoe[analysis]')",
}


def examine() -> list[Finding]:
    """Return versions, device, backends and fused paths, in the order of the report."""
    return [*_versions(), *_device(), *_backends()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    findings = [Finding("python", "ok", platform.python_version())]
    for package in _PACKAGES:
        version = _version(package)
        detail = version or "not installed; pip install 'remoe[megatron]'"
        findings.append(Finding(package, "ok" if version else "missing", detail))
    try:
        compat.apply()
        version, path = compat.imported_version()
        findings.insert(2, Finding("megatron-core", "ok", f"{version}, imported from {path}"))
    except ValueError as error:
        findings.insert(2, Finding("megatron-core", "missing", str(error)))
    for package, use in _OPTIONAL.items():
        version = _version(package)
        detail = version or f"needed for {use}"
        findings.append(Finding(package, "ok" if version else "disabled", detail))
    return findings


def _device() -> list[Finding]:
    if not cpu.has_gpu():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        threads = torch.get_num_threads()
        return [
            Finding("device", "ok", f"CPU, {threads} threads (no GPU is visible; {built})"),
            Finding("torch.compile", "disabled", "compiling Megatron's small functions for a CPU "
                    "costs more than it saves"),
            Finding("communication", "ok", "gloo"),
        ]  # fmt: skip
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        Finding("device", "ok", f"{len(names)} x {names[0]}"),
        Finding("communication", "ok", "nccl (unverified over several GPUs)"),
    ]


def _backends() -> list[Finding]:
    has_te = _version("transformer-engine") is not None
    has_apex_fusion = has_package("fused_weight_gradient_mlp_cuda")
    device = torch.device("cuda" if cpu.has_gpu() else "cpu")
    grouped_mm = uses_grouped_mm(device, torch.bfloat16)
    without_te = "Transformer Engine is not installed; torch's own kernels are used"
    return [
        Finding(
            "transformer_impl", "ok", "transformer_engine" if has_te else f"local: {without_te}"
        ),
        Finding("attention", "ok", "Transformer Engine" if has_te else "torch SDPA, grouped query"),
        Finding(
            "experts", "ok",
            "Transformer Engine grouped GEMM" if has_te else "grouped, in torch (moe_grouped_gemm)",
        ),
        Finding(
            "recurrent routers", "ok",
            f"torch's cells in fp32 ({'GRU fused' if cpu.has_gpu() else 'not fused on a CPU'}); "
            "what they refuse is in docs/options.md",
        ),
        _fused("torch grouped_mm", grouped_mm, "experts take a launch each: it needs bf16 on a "
               "GPU of compute capability 9 or 10"),
        _fused("rope fusion", has_te, without_te),
        _fused("persistent layer norm", has_te, without_te),
        _fused("gradient accumulation fusion", has_apex_fusion,
               "needs NVIDIA apex's fused_weight_gradient_mlp_cuda"),
        Finding("permute fusion", "disabled", "unverified with ReLU routing, and refused"),
        Finding("CUDA graphs", "disabled", "buffer sizes change every step under ReLU routing"),
        Finding("flex dispatcher (DeepEP)", "disabled", "selects top-k again, and is refused"),
    ]  # fmt: skip


def _fused(name: str, available: bool, why: str) -> Finding:
    return Finding(name, "ok" if available else "disabled", "available" if available else why)
