"""Routing statistics: what a router counts in a step, and the numbers that are reported from it.

Equations are those of arXiv 2412.14711. Everything here is a function of tensors or numbers; who
reduces them over ranks, and who writes them to a file, is decided elsewhere.

Shapes: T tokens, E experts, L layers; `...` stands for any leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from remoe.routing import active_experts, sparsity, tokens_per_expert

# A dead expert receives less than a balanced share of the tokens divided by this number. For k = 1
# of E = 8 experts the threshold is 1/64 of the tokens, as in the paper.
DEAD_SHARE = 8
# The number of expert-parallel ranks for which the load of the busiest is reported.
EXPERT_RANKS = 8
# Sparsity has settled once this many consecutive steps are this close to the target.
SETTLED_STEPS, SETTLED_WITHIN = 20, 0.02


@dataclass(frozen=True)
class TokenCounts:
    """Number of tokens and number of tokens per expert, as named views of one buffer.

    Attributes:
        flat: `[..., 1 + E]`, of any dtype.
    """

    flat: Tensor

    @classmethod
    def of(cls, routing_map_TE: Tensor, padding_mask_T: Tensor | None = None) -> "TokenCounts":
        """Count the tokens of a routing map in int64; padding tokens (True) are not counted."""
        num_tokens, num_experts = routing_map_TE.shape
        size = (1 + num_experts,)
        flat = torch.full(size, num_tokens, dtype=torch.int64, device=routing_map_TE.device)
        if padding_mask_T is not None:
            torch.sum(~padding_mask_T, dim=0, keepdim=True, out=flat[:1])
        tokens_per_expert(routing_map_TE, padding_mask_T, out=flat[1:])
        return cls(flat)

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens, `[...]`."""
        return self.flat[..., 0]

    @property
    def per_expert(self) -> Tensor:
        """Number of tokens that activate each expert, `[..., E]`."""
        return self.flat[..., 1:]

    @property
    def sparsity(self) -> Tensor:
        """Fraction of inactive (token, expert) pairs (Eq. 8), `[...]`; NaN without tokens."""
        return sparsity(self.per_expert, self.num_tokens)


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing of the micro-batches of a step, as named views of two buffers.

    Over ranks and layers the sums are reduced by addition, and `most_active` by the maximum.

    Attributes:
        sums: `[..., 4 + E]`: regularizer, micro-batches, tokens, tokens per expert, and norms of
            the tokens' states.
        most_active: `[...]`, the largest number of experts that one token activated.
    """

    sums: Tensor
    most_active: Tensor

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device | str | int) -> "RoutingStatistics":
        """Return the statistics of one router before the first micro-batch, in fp64 and int64."""
        return cls(
            torch.zeros(4 + num_experts, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def l1_reg(self) -> Tensor:
        """Sum of the micro-batches' regularizers (Eq. 9, 10), zero for a router without one."""
        return self.sums[..., 0]

    @property
    def micro_batches(self) -> Tensor:
        """Number of micro-batches; a rank counts its fraction of those that ranks share."""
        return self.sums[..., 1]

    @property
    def state_norm(self) -> Tensor:
        """Sum over tokens of the norm of their state, zero for a router without recurrence."""
        return self.sums[..., -1]

    @property
    def counts(self) -> TokenCounts:
        """Tokens, and tokens per expert."""
        return TokenCounts(self.sums[..., 2:-1])

    @torch.no_grad()
    def add(
        self, routing_map_TE: Tensor, padding_mask_T: Tensor | None = None, *, num_ranks: int = 1
    ) -> TokenCounts:
        """Add a micro-batch, without its regularizer.

        Args:
            routing_map_TE: bool `[T, E]`.
            padding_mask_T: bool `[T]`, True for padding tokens, which are not counted.
            num_ranks: number of ranks that share the tokens of the micro-batch.

        Returns:
            The counts of this rank's tokens in int64, in a buffer of their own.
        """
        counts = TokenCounts.of(routing_map_TE, padding_mask_T)
        active_T = active_experts(routing_map_TE)
        if padding_mask_T is not None:
            active_T = active_T.masked_fill(padding_mask_T, 0)
        self.add_counts(counts, active_T.max(), num_ranks=num_ranks)
        return counts

    @torch.no_grad()
    def add_counts(self, counts: TokenCounts, most_active: Tensor, *, num_ranks: int = 1) -> None:
        """Add a micro-batch whose tokens are counted already, without its regularizer.

        Args:
            counts: of this rank's tokens, without padding.
            most_active: the largest number of experts that one of them activates, 0-d.
            num_ranks: number of ranks that share the tokens of the micro-batch.
        """
        self.micro_batches.add_(1 / num_ranks)
        self.counts.flat.add_(counts.flat)
        torch.maximum(self.most_active, most_active, out=self.most_active)

    @torch.no_grad()
    def add_states(self, state_Tp: Tensor, padding_mask_T: Tensor | None = None) -> None:
        """Add the Euclidean norms of states, without those of padding (True)."""
        norm_T = state_Tp.norm(dim=1)
        if padding_mask_T is not None:
            norm_T = norm_T.masked_fill(padding_mask_T, 0)
        self.state_norm.add_(norm_T.sum())

    def clear(self) -> None:
        """Set all statistics to zero."""
        self.sums.zero_()
        self.most_active.zero_()


@dataclass(frozen=True)
class StepReport:
    """Routing of one step, over all layers, micro-batches and tokens of the global batch.

    Attributes:
        has_router: bool `[L]`, True for layers with a router; other entries are meaningless.
        sparsity: 0-d, the mean of `sparsity_L` over routers (Eq. 8), on which the controller acts.
        sparsity_L: `[L]`. Both are NaN in a step whose batch consists of padding only.
        tokens_L: `[L]`, number of tokens.
        tokens_per_expert_LE: `[L, E]`.
        most_active_L: `[L]`, the largest number of experts that one token activated.
        topk: k of the model, after granularity.
        l1_reg_L: `[L]`, the regularizer before its coefficient, as a mean over micro-batches; None
            without an L1 penalty.
        level_L: `[L]`, the number that stands for the state of each router in this step, as the
            coefficient of the penalty; None without a state that moves.
        level_name: what that number is; "l1_coeff" is the coefficient of the L1 penalty.
        per_layer: whether each layer has a number of its own; otherwise all share one.
        observed_LE: `[L, E]`, what the selection observed, as a mean over the micro-batches that
            have real tokens; NaN without any. None if it observes nothing.
        state_norm_L: `[L]`, mean Euclidean norm of the tokens' states; None without recurrence.
    """

    has_router: Tensor
    sparsity: Tensor
    sparsity_L: Tensor
    tokens_L: Tensor
    tokens_per_expert_LE: Tensor
    most_active_L: Tensor
    topk: int
    l1_reg_L: Tensor | None = None
    level_L: Tensor | None = None
    level_name: str | None = None
    per_layer: bool = False
    observed_LE: Tensor | None = None
    state_norm_L: Tensor | None = None

    @classmethod
    def of(
        cls,
        statistics: RoutingStatistics,
        *,
        topk: int,
        penalizes: bool = False,
        level_L: Tensor | None = None,
        level_name: str | None = None,
        per_layer: bool = False,
        observed: Tensor | None = None,
        has_state: bool = False,
    ) -> "StepReport":
        """Derive the report from the reduced statistics of all layers, on their device.

        Args:
            statistics: of all layers, `[L, 4 + E]` and `[L]`; zeros for a layer without a router.
            topk: k of the model, after granularity.
            penalizes: whether there is an L1 penalty.
            level_L, level_name, per_layer: as the attributes.
            observed: `[L, 1 + E]`, the number of micro-batches with real tokens, and the sums over
                them of what the selection observed; None if it observes nothing.
            has_state: whether routers have a state that tokens take from layer to layer.
        """
        has_router = statistics.micro_batches > 0
        counts = statistics.counts
        sparsity_L = counts.sparsity
        return cls(
            has_router=has_router,
            sparsity=sparsity_L.where(has_router, 0).sum() / has_router.sum(),
            sparsity_L=sparsity_L,
            tokens_L=counts.num_tokens,
            tokens_per_expert_LE=counts.per_expert,
            most_active_L=statistics.most_active.long(),
            topk=topk,
            l1_reg_L=statistics.l1_reg / statistics.micro_batches if penalizes else None,
            level_L=level_L,
            level_name=level_name,
            per_layer=per_layer,
            observed_LE=None if observed is None else observed[:, 1:] / observed[:, :1],
            state_norm_L=statistics.state_norm / counts.num_tokens if has_state else None,
        )

    @property
    def level(self) -> Tensor | None:
        """The number of all routers, fp32, 0-d: that of the first layer with one, or the mean."""
        if self.level_L is None:
            return None
        if self.per_layer:
            mean = self.level_L.where(self.has_router, 0).sum() / self.has_router.sum()
            return mean.float()
        first = self.has_router.int().argmax(dim=0, keepdim=True)
        return self.level_L.gather(0, first).squeeze(0).float()

    @property
    def l1_coeff(self) -> Tensor | None:
        """The coefficient of the L1 penalty, 0-d, as `level` has it; None without a penalty."""
        return self.level if self.level_name == "l1_coeff" else None

    def of_layers(self, layers: Sequence[int]) -> "StepReport":
        """Return the report of some layers, by index, with the mean sparsity of all."""

        def part(values: Tensor | None) -> Any:
            return None if values is None else torch.stack([values[layer] for layer in layers])

        names = [f.name for f in fields(self) if f.name.endswith(("_L", "_LE", "has_router"))]
        return replace(self, **{name: part(getattr(self, name)) for name in names})


def routing_metrics(report: StepReport) -> dict[str, Any]:
    """Return the numbers of a report that are logged. This copies tensors to the host.

    The keys are:

    - `sparsity` and `sparsity_per_layer` (Eq. 8);
    - `active_experts` and `active_experts_max`: mean and largest number of experts of a token;
    - `expert_load_*`, `dead_experts` and `busiest_rank_load`: see `load_metrics`;
    - `silent_layers`, in which no token activates an expert, and `dense_layers`, in which every
      token activates every expert, as numbers that begin with 1;
    - with an L1 penalty `l1_coeff`, and `l1_reg`, the sum over layers before the coefficient;
    - with another state that moves a number that stands for it, under a name of its own. If every
      layer has its own number, the name has the mean, and the name with `_per_layer` has all;
    - with recurrence `state_norm_per_layer`, the mean Euclidean norm of the tokens' states.
    """
    has_router = report.has_router.tolist()

    def per_layer(values: Tensor) -> list[float]:
        return [v for v, has in zip(values.tolist(), has_router, strict=True) if has]

    def layers_at(value: float) -> list[int]:
        return (
            (report.has_router & (report.sparsity_L == value)).nonzero().add(1).flatten().tolist()
        )

    num_experts = report.tokens_per_expert_LE.shape[1]
    sparsity = report.sparsity.item()
    row = {
        "sparsity": sparsity,
        "sparsity_per_layer": per_layer(report.sparsity_L),
        "active_experts": num_experts * (1 - sparsity),
        "active_experts_max": int(max(per_layer(report.most_active_L))),
        **load_metrics(report),
        "silent_layers": layers_at(1.0),
        "dense_layers": layers_at(0.0),
    }
    if report.level is not None and report.level_L is not None:
        row[str(report.level_name)] = report.level.item()
        if report.per_layer:
            row[f"{report.level_name}_per_layer"] = per_layer(report.level_L)
    if report.l1_reg_L is not None:
        row["l1_reg"] = sum(per_layer(report.l1_reg_L))
    if report.state_norm_L is not None:
        row["state_norm_per_layer"] = per_layer(report.state_norm_L)
    return row


def expert_loads(report: StepReport) -> Tensor:
    """Return the load of every expert of the layers with a router, fp64.

    The load of an expert is its number of tokens divided by the mean over the experts of its layer,
    and 1 in a layer without any active expert.
    """
    counts_LE = report.tokens_per_expert_LE[report.has_router].double()
    mean_L1 = counts_LE.mean(dim=1, keepdim=True)
    return torch.where(mean_L1 > 0, counts_LE / mean_L1, 1.0)


def load_metrics(report: StepReport) -> dict[str, float]:
    """Return how evenly the tokens are spread over the experts, by their loads (`expert_loads`).

    `expert_load_min` and `expert_load_max` are taken over all experts, and `expert_load_cv`, the
    coefficient of variation, is a mean over layers. `dead_experts` counts the experts of all layers
    that have less than `1 / DEAD_SHARE` of a balanced share, which is k/E of the tokens. In a
    silent layer every expert counts as balanced, and as dead. `busiest_rank_load` is that of
    `expert_ranks` ranks, and 1 if all layers are silent.
    """
    counts_LE = report.tokens_per_expert_LE[report.has_router].double()
    tokens_L = report.tokens_L[report.has_router].double()
    num_experts = counts_LE.shape[1]
    load_LE = expert_loads(report)
    balanced_L1 = (tokens_L * report.topk / num_experts).unsqueeze(1)
    return {
        "expert_load_min": load_LE.min().item(),
        "expert_load_max": load_LE.max().item(),
        "expert_load_cv": load_LE.std(dim=1, correction=0).mean().item(),
        "dead_experts": int((counts_LE < balanced_L1 / DEAD_SHARE).sum().item()),
        "busiest_rank_load": busiest_rank_load(counts_LE, expert_ranks(num_experts)),
    }


def expert_ranks(num_experts: int) -> int:
    """Return the largest number of expert-parallel ranks, up to 8, that divides the experts."""
    return max(n for n in range(1, EXPERT_RANKS + 1) if num_experts % n == 0)


def busiest_rank_load(counts_LE: Tensor, num_ranks: int) -> float:
    """Return the time that experts take on expert-parallel ranks, relative to an even load.

    Every rank has neighboring experts, as in Megatron, and in each layer all ranks wait for the one
    with the most assignments. With n of a layer and a rank, it is `sum_layers max_ranks n`, divided
    by `sum_layers mean_ranks n`: 1 for an even load, and `num_ranks` if one rank has all of it.

    Args:
        counts_LE: `[L, E]`, tokens per expert.
        num_ranks: number of ranks, which divides E.
    """
    num_layers, num_experts = counts_LE.shape
    counts_LRE = counts_LE.double().reshape(num_layers, num_ranks, num_experts // num_ranks)
    per_rank_LR = counts_LRE.sum(dim=2)
    even = per_rank_LR.mean(dim=1).sum().item()
    return per_rank_LR.amax(dim=1).sum().item() / even if even else 1.0


def settling_index(sparsities: Sequence[float], target: float) -> int | None:
    """Return where sparsity settles: the first of 20 consecutive steps with |S - target| <= 0.02.

    The first step that reaches the target would be another definition; but a single batch can be
    sparser than the target while the mean still rises.

    Args:
        sparsities: measured sparsity of consecutive steps.
        target: target sparsity, `1 - k/E`.

    Returns:
        An index into `sparsities`; None if sparsity has not settled.
    """
    length = 0
    for index, value in enumerate(sparsities):
        length = length + 1 if abs(value - target) <= SETTLED_WITHIN else 0
        if length == SETTLED_STEPS:
            return index - SETTLED_STEPS + 1
    return None
