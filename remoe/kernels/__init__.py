"""Fast paths: the router, permutation of tokens, and experts over contiguous segments.

They run in plain torch, or on GPUs in Triton (`remoe.kernels.backend`). The tests compare them with
the loops of `remoe.reference`, and the kernels in Triton with torch.
"""

from remoe.kernels.chunks import Chunk, counts_of_chunks, plan_chunks, run_chunks
from remoe.kernels.experts import grouped_swiglu
from remoe.kernels.permutation import Permutation, combine, permute
from remoe.kernels.routed import routed_swiglu
from remoe.kernels.router import ReLURouted, fuses, relu_router

__all__ = [
    "Chunk",
    "Permutation",
    "ReLURouted",
    "combine",
    "counts_of_chunks",
    "fuses",
    "grouped_swiglu",
    "permute",
    "plan_chunks",
    "relu_router",
    "routed_swiglu",
    "run_chunks",
]
