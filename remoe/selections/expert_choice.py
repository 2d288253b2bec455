"""The settings of Expert Choice (arXiv 2202.09368): experts choose tokens, and see whole sequences.

Its function is `remoe.routing.expert_choice_routing`.

Shapes: b sequences, T tokens of each, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from remoe.routing import expert_choice_routing
from remoe.selections.base import Budget, Selection, Tensors


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouting(Selection):
    """The settings of Expert Choice, for bidirectional models only."""

    title: ClassVar[str] = "Expert Choice"
    source: ClassVar[str] = "arXiv 2202.09368"
    causal: ClassVar[bool] = False  # whether an expert takes a token depends on all others
    budget: ClassVar[Budget] = "fixed k"
    reads: ClassVar[Literal["tokens", "sequences", "ids"]] = "sequences"

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return gates and map of one sequence, or of several, `[..., T, E]`."""
        return self.choose(logits_TE, topk=topk)

    def choose(
        self, logits_bTE: Tensor, *, topk: int, padding_mask_bT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let every expert choose k T / E tokens of each sequence, but no padding (True).

        Raises:
            ValueError: k T / E is not whole.
        """
        num_tokens, num_experts = logits_bTE.shape[-2:]
        share = self.tokens_per_expert(num_tokens, num_experts, topk)
        return expert_choice_routing(
            logits_bTE, tokens_per_expert=share, padding_mask_T=padding_mask_bT
        )

    @staticmethod
    def tokens_per_expert(num_tokens: int, num_experts: int, topk: int) -> int:
        """Return the number of tokens of a sequence that every expert chooses, k T / E.

        Raises:
            ValueError: it is not whole.
        """
        share, rest = divmod(topk * num_tokens, num_experts)
        if rest:
            raise ValueError(
                f"a sequence has {num_tokens} tokens, of which each of {num_experts} experts would "
                f"choose {topk} x {num_tokens} / {num_experts}, which is no whole number; choose "
                f"a seq_length with which it is"
            )
        return share
