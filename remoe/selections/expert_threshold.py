"""Expert Threshold: an expert takes the tokens whose logit reaches its threshold (2603.11535).

The threshold of an expert is a moving average of its cutoffs, which are the logits that a share of
k/E of the tokens of a step reached. A token is routed by thresholds of earlier steps alone, so that
routing is causal, in training too. We have not seen the paper (arXiv 2603.11535). What we have read
is a file of code with a full description of such routing, which a search for strings found without
the name of its repository: that it is the code of the paper's model is our guess. There, a gate is
the sigmoid of the logit, without a normalization; thresholds are compared with logits; a cutoff is
the m-th largest logit of a micro-batch, of m = k T / E tokens; the mean over the micro-batches of a
step enters the average, whose bias towards its start is corrected. That code trains the first 4000
steps by Expert Choice, which is not causal, and may bound the tokens of an expert; neither is here.
Instead, thresholds of the first step are zero, as they are for a ReLU router, and half of the
experts are active in it if logits are symmetric; the second step has the cutoffs of the first one.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remoe.routing import at_least_fp32
from remoe.selections.base import Budget, Routing, Tensors, scalar
from remoe.settings import setting
from remoe.statistics import StepReport


def expert_threshold_routing(logits_TE: Tensor, thresholds_E: Tensor) -> tuple[Tensor, Tensor]:
    """Route every token to the experts whose threshold its logit reaches.

    Args:
        logits_TE: router logits `[T, E]`.
        thresholds_E: thresholds `[E]`, in units of logits.

    Returns:
        probs: `[T, E]`, at least fp32: the sigmoid of the logit, zero where inactive.
        routing_map: bool `[T, E]`. A row may be all False, and so may a column.
    """
    logits_TE = at_least_fp32(logits_TE)
    routing_map = logits_TE >= thresholds_E
    return torch.sigmoid(logits_TE) * routing_map, routing_map


def expert_cutoffs(logits_TE: Tensor, *, topk: int, padding_mask_T: Tensor | None = None) -> Tensor:
    """Return the logit that a share of k/E of the tokens reach, of every expert, `[E]`.

    It is the m-th largest of the expert's logits, where m is T k / E, rounded down, and at least
    one.

    Args:
        logits_TE: router logits `[T, E]` of all tokens of the micro-batch.
        topk: k, the target number of active experts per token.
        padding_mask_T: bool `[T]`, True for padding tokens, which are not counted.

    Returns:
        Cutoffs, at least fp32, without a gradient; zero if there is no token but padding.
    """
    logits_TE = at_least_fp32(logits_TE.detach())
    num_tokens, num_experts = logits_TE.shape
    real = torch.full((), num_tokens, device=logits_TE.device)
    if padding_mask_T is not None:
        logits_TE = logits_TE.masked_fill(padding_mask_T.unsqueeze(1), -torch.inf)
        real = (~padding_mask_T).sum()
    rank = (real * topk // num_experts).clamp(min=1) - 1
    ordered_TE = logits_TE.sort(dim=0, descending=True).values
    cutoffs_E = ordered_TE.index_select(0, rank.unsqueeze(0)).squeeze(0)
    return torch.where(real > 0, cutoffs_E, 0)


def next_thresholds(
    thresholds_E: Tensor, cutoffs_E: Tensor, *, num_updates: Tensor | int, decay: float
) -> Tensor:
    """Return the thresholds of the next step: the average of all cutoffs until now, `[E]`.

    A cutoff has a weight of `decay` to the power of the number of steps after its own. After the
    first step, thresholds are its cutoffs, whatever they were before it. This equals the average of
    the code that we have read, which starts at zero and is divided by `1 - decay^n`.

    Args:
        thresholds_E: thresholds of the step, `[E]`.
        cutoffs_E: mean of the cutoffs over the micro-batches of the step, `[E]`.
        num_updates: number of steps before it, whose cutoffs `thresholds_E` is an average of.
        decay: in [0, 1).
    """
    updates = torch.as_tensor(num_updates, dtype=torch.float64, device=thresholds_E.device)
    share = (1 - decay) / (1 - decay ** (updates + 1))
    return torch.lerp(thresholds_E, cutoffs_E, share.to(thresholds_E.dtype))


@dataclass(frozen=True, kw_only=True)
class ExpertThresholdRouting(Routing):
    """The settings of an expert threshold router.

    Buffers:
        thresholds: fp32 `[E]`, zero at first; num_updates: fp32, 0-d, the number of steps whose
            cutoffs they are an average of.
    """

    title: ClassVar[str] = "expert threshold routing"
    source: ClassVar[str] = "arXiv 2603.11535"
    budget: ClassVar[Budget] = "threshold"
    state: ClassVar[str] = "a threshold of every expert"
    starts_dense: ClassVar[bool] = True  # in the first step, without thresholds
    reports: ClassVar[str | None] = "expert_threshold"

    expert_threshold_decay: float = setting(
        0.99,
        flag="--moe-expert-threshold-decay",
        help="Decay of the moving average of an expert's cutoffs, per step.",
        within="[0, 1)",
        on_resume="warned",
        exported=True,
    )

    @property
    def per_layer(self) -> bool:
        """Whether `report` has a number of its own for every layer."""
        return True

    @property
    def observes(self) -> bool:
        """Whether `observe` is to be called."""
        return True

    def buffers(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial thresholds."""
        return {"thresholds": torch.zeros(num_experts), "num_updates": scalar(0.0)}

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Return the sigmoid of the logits that reach their thresholds."""
        return expert_threshold_routing(logits_TE, tensors["thresholds"])

    def observe(
        self, logits_TE: Tensor, *, topk: int, padding_mask_T: Tensor | None = None
    ) -> Tensor:
        """Return the cutoffs of a micro-batch, `[E]`."""
        return expert_cutoffs(logits_TE, topk=topk, padding_mask_T=padding_mask_T)

    def moved(self, state: Tensors, step: StepReport) -> dict[str, Tensor]:
        """Return the next thresholds of layers whose cutoffs are finite.

        The others stay as they were: in a step without real tokens, or whose forward overflowed, so
        that the optimizer skips it. An infinite threshold would stay so in all later averages.
        """
        assert step.observed_LE is not None
        updates_L1 = state["num_updates"].unsqueeze(1)
        next_LE = next_thresholds(
            state["thresholds"],
            step.observed_LE.to(state["thresholds"].dtype),
            num_updates=updates_L1,
            decay=self.expert_threshold_decay,
        )
        is_measured_L1 = step.observed_LE.isfinite().all(dim=1, keepdim=True)
        return {
            "thresholds": torch.where(is_measured_L1, next_LE, state["thresholds"]),
            "num_updates": (updates_L1 + is_measured_L1).squeeze(1),
        }

    def report(self, state: Tensors) -> Tensor:
        """Return the mean of the thresholds."""
        return state["thresholds"].mean()
