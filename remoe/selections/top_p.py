"""Top-p routing: the fewest experts whose softmax reaches p (arXiv 2403.07652).

A token is routed to its experts in descending order of the softmax, until their sum reaches p. The
gates are the softmax, which is not renormalized over the chosen experts, as in the published code
(github.com/ZhenweiAn/Dynamic_MoE). That paper keeps p fixed and adds an entropy loss. DTop-p
(arXiv 2512.13996) moves p by a PI controller, so that the mean number of active experts is k, and
normalizes logits per layer; we have seen its abstract only. Here p is moved by the rule of ReMoE's
coefficient (arXiv 2412.14711, Eq. 7), by way of the odds against it, `u = (1 - p) / p`: a model
that is too dense has u multiplied by alpha, so that p falls. Neither the
entropy loss nor the normalization of logits is here.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.controller import ControllerConfig, next_l1_coeff
from remoe.routing import at_least_fp32
from remoe.selections.base import Budget, Routing, Tensors, scalar
from remoe.settings import setting
from remoe.statistics import StepReport

# Bounds of the odds: below the first p rounds to one, and below the second it is less than any
# softmax that is the largest of 2^24 experts. Odds that went on would be zero or infinite some day,
# and no factor could move them again.
LEAST_ODDS, MOST_ODDS = 2.0**-24, 2.0**24


def top_p_routing(logits_TE: Tensor, p: Tensor | float) -> tuple[Tensor, Tensor]:
    """Route every token to the fewest experts whose softmax adds up to p, and to at least one.

    Of experts with equal logits, those of lower number come first.

    Args:
        logits_TE: router logits `[T, E]`.
        p: the sum to reach, in (0, 1]; a number or 0-d.

    Returns:
        probs: `[T, E]`, at least fp32: the softmax over all experts, zero where inactive.
        routing_map: bool `[T, E]`, True where the expert is active.
    """
    softmax_TE = torch.softmax(at_least_fp32(logits_TE), dim=1)
    ordered = softmax_TE.detach().sort(dim=1, descending=True, stable=True)
    reached_TE = ordered.values.cumsum(dim=1)
    # An expert is needed if those before it do not reach p; before the first there are none.
    needed_TE = torch.ones_like(reached_TE, dtype=torch.bool)
    needed_TE[:, 1:] = reached_TE[:, :-1] < p
    routing_map = torch.zeros_like(needed_TE).scatter(1, ordered.indices, needed_TE)
    return softmax_TE * routing_map, routing_map


def odds_against(p: float) -> float:
    """Return the coefficient of a probability, `u = (1 - p) / p`."""
    return (1 - p) / p


def probability(odds: Tensor) -> Tensor:
    """Return the probability of a coefficient, `p = 1 / (1 + u)`, with its shape and dtype."""
    return 1 / (1 + odds)


@dataclass(frozen=True, kw_only=True)
class TopPRouting(Routing):
    """The settings of a top-p router, whose p is moved so that k experts are active on average.

    Buffers:
        odds: fp32, 0-d, the odds against p.
    """

    title: ClassVar[str] = "top-p routing"
    source: ClassVar[str] = "arXiv 2403.07652 and 2512.13996"
    budget: ClassVar[Budget] = "threshold"
    state: ClassVar[str] = "the odds against p"
    reports: ClassVar[str | None] = "top_p"

    top_p_init: float | None = setting(
        None,
        flag="--moe-top-p-init",
        help="Initial p of top-p routing. Default: k/E, with which k experts are active if the "
        "softmax is nearly uniform.",
        within="(0, 1)",
    )
    top_p_multiplier: float = setting(
        1.02,
        flag="--moe-top-p-multiplier",
        help="Factor by which every step multiplies or divides the odds against p.",
        within="(1, inf)",
        on_resume="warned",
        exported=True,
    )

    def buffers(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial odds."""
        return {"odds": scalar(odds_against(self.top_p_init or topk / num_experts))}

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return the softmax of the fewest experts that reach p."""
        return top_p_routing(logits_TE, probability(tensors["odds"]))

    def moved(self, state: Tensors, step: StepReport) -> dict[str, Tensor]:
        """Return the next odds: more against p if the step was too dense."""
        rule = ControllerConfig(
            target_sparsity=1 - step.topk / step.tokens_per_expert_LE.shape[1],
            l1_coeff_init=1.0,
            l1_coeff_multiplier=self.top_p_multiplier,
            floor=LEAST_ODDS,
            ceiling=MOST_ODDS,
        )
        return {"odds": next_l1_coeff(state["odds"], step.sparsity, rule)}

    def report(self, state: Tensors) -> Tensor:
        """Return p."""
        return probability(state["odds"])
