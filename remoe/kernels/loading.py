"""The operations in Triton, which are imported only when something runs in them."""

from typing import Any


def triton_kernels() -> Any:
    """Return the module with the operations in Triton, which takes Triton a while to import."""
    from remoe.kernels import fused

    return fused


def fit_in_a_tile(num_experts: int) -> bool:
    """Return whether the kernels can take all experts of a token at once."""
    return num_experts <= int(triton_kernels().MAX_EXPERTS)
