"""Fast paths in plain torch: permutation of tokens, and experts over contiguous segments.

`remoe.reference` is what they are tested against.
"""

from remoe.kernels.experts import grouped_swiglu
from remoe.kernels.permutation import Permutation, combine, permute

__all__ = ["Permutation", "combine", "grouped_swiglu", "permute"]
