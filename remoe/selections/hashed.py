"""Hash routing: experts by a fixed hash of the token's id (arXiv 2106.04426).

Hash layers route a token by its id alone: nothing is learned, and there is no loss for balance. Of
the hashes that the paper compares, this is the random one, where the table of the vocabulary is
replaced by a function of the id. A token has k experts that differ from each other, with gates of
1/k; the paper has one expert, and for more (MultiHash) it cuts the expert's weights into parts. We
have seen parts of the paper only; the function and what it does for k > 1 are ours.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from remoe.selections.base import Budget, Selection

_BITS = 0xFFFFFFFF
_FACTORS = (0x7FEB352D, 0x4F1BBCDD)  # odd and below 2^31: products of 32 bits fit in int64


def hash_routing(
    token_ids_T: Tensor, *, num_experts: int, topk: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Route every token to the `topk` experts whose hash with its id is largest.

    Tokens of the same id have the same experts in all batches, layouts and runs.

    Args:
        token_ids_T: ids of the tokens, integers `[T]`.
        num_experts: E.
        topk: k, the number of active experts per token.
        seed: number that, with the id, decides the experts; layers of different numbers route
            differently.

    Returns:
        probs: fp32 `[T, E]`, 1/k where active and zero elsewhere, without a gradient.
        routing_map: bool `[T, E]`, True where the expert is active.
    """
    experts_E = torch.arange(num_experts, device=token_ids_T.device)
    seeded_E = _mix(experts_E + num_experts * seed)
    hashes_TE = _mix(_mix(token_ids_T.long()).unsqueeze(1) ^ seeded_E)
    chosen_TE = hashes_TE.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    routing_map = torch.zeros_like(hashes_TE, dtype=torch.bool).scatter(1, chosen_TE, True)
    return routing_map.float() / topk, routing_map


def _mix(numbers: Tensor) -> Tensor:
    """Return a permutation of the numbers of 32 bits, in int64, in which every bit counts."""
    numbers = (numbers + 0x3C6EF372) & _BITS
    for factor in _FACTORS:
        numbers = numbers ^ (numbers >> 16)
        numbers = (numbers * factor) & _BITS
    return numbers ^ (numbers >> 15)


@dataclass(frozen=True, kw_only=True)
class HashRouting(Selection):
    """The settings of hash routing, which has neither logits nor state."""

    title: ClassVar[str] = "hash routing"
    source: ClassVar[str] = "arXiv 2106.04426"
    budget: ClassVar[Budget] = "fixed k"
    reads: ClassVar[Literal["tokens", "sequences", "ids"]] = "ids"

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes from batch to batch."""
        return False

    def num_logits(self, num_experts: int) -> int:
        """Return the number of logits of a token."""
        return 0

    def select_by_id(
        self, token_ids_T: Tensor, *, num_experts: int, topk: int, layer_number: int
    ) -> tuple[Tensor, Tensor]:
        """Return gates and map of a layer, by its number, which begins with 1."""
        return hash_routing(token_ids_T, num_experts=num_experts, topk=topk, seed=layer_number)
