"""TopK routing, the baseline, whose routers are Megatron's own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from remoe.routing import topk_routing
from remoe.selections.base import Budget, Routing, Tensors
from remoe.settings import setting


@dataclass(frozen=True, kw_only=True)
class TopKRouting(Routing):
    """The settings of a TopK router, which may activate more experts in its first steps."""

    title: ClassVar[str] = "TopK routing"
    source: ClassVar[str] = "Switch, arXiv 2101.03961"
    budget: ClassVar[Budget] = "fixed k"

    warmup_steps: int = setting(
        0,
        flag="--moe-topk-warmup-steps",
        help="Number of first training steps in which --moe-topk-warmup-topk experts are active.",
        within="[0, inf)",
        on_resume="warned",
    )
    warmup_topk: int | None = setting(
        None,
        flag="--moe-topk-warmup-topk",
        help="Number of active experts per token in the near-dense warm-up. The number is that "
        "before granularity.",
        within="[1, inf)",
        on_resume="warned",
        per_granularity=True,
    )

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes: after the warm-up, if there is one."""
        return self.warmup_steps > 0

    def topk_at(self, iteration: int, topk: int) -> int:
        """Return k of a training step; `iteration` counts the steps before it."""
        return self.warmup_topk or topk if iteration < self.warmup_steps else topk

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return the softmax over all experts of the k largest logits."""
        return topk_routing(logits_TE, topk=topk)
