"""Fast paths in plain torch: permutation of tokens, and experts over contiguous segments.

The tests compare them with the loops of `remoe.reference`.
"""

from remoe.kernels.chunks import Chunk, counts_of_chunks, plan_chunks, run_chunks
from remoe.kernels.experts import grouped_swiglu
from remoe.kernels.permutation import Permutation, combine, permute

__all__ = [
    "Chunk",
    "Permutation",
    "combine",
    "counts_of_chunks",
    "grouped_swiglu",
    "permute",
    "plan_chunks",
    "run_chunks",
]
