"""The settings of Soft MoE, whose functions are in `remoe.soft`: it selects no experts."""

from dataclasses import dataclass
from typing import ClassVar

from remoe.selections.base import AnyRouting
from remoe.settings import setting


@dataclass(frozen=True, kw_only=True)
class SoftRouting(AnyRouting):
    """The settings of a soft router (arXiv 2308.00951), for bidirectional models only."""

    title: ClassVar[str] = "Soft MoE"
    source: ClassVar[str] = "arXiv 2308.00951"
    causal: ClassVar[bool] = False  # a slot is a mean of all tokens

    slots_per_expert: int = setting(
        1,
        flag="--moe-soft-slots-per-expert",
        help="Number of slots of every expert. With (tokens of a sequence / experts) slots the "
        "experts cost as much as a dense MLP.",
        within="[1, inf)",
        on_resume="refused",
    )
