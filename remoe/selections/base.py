"""What a router says of itself: its settings, how it selects experts, and what it keeps.

The score of a token is linear, or recurrent (`remoe.recurrent`); the selection follows. To add one,
write a file in this folder with the pure function and a subclass of `Routing`, and give it a name
in `ROUTINGS`. The class holds no tensor: a module registers those of `parameters` and `buffers`,
and hands them to `select`, `regularizer`, `observe` and `moved` by their names.

Shapes: T tokens, E experts, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from remoe.settings import Settings, setting, settings_of
from remoe.statistics import StepReport, TokenCounts

Budget = Literal["l1", "fixed k", "threshold", "none"]
Recurrence = Literal["none", "gru", "rnn"]
RecurrentPassing = Literal["full", "detached", "none"]
RecurrentProjection = Literal["layer", "shared"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AnyRouting(Settings):
    """The base of the settings of every router, which selects experts for a token or does not.

    Attributes:
        title: what messages and tables call the router.
        source: where it was published.
        causal: whether no token sees those after it.
        budget: what keeps the mean number of active experts: the adaptive L1 penalty, a fixed k, a
            threshold that moves with what was measured, or nothing.
        state: what the router keeps from step to step, in words.
        starts_dense: whether far more than k experts are active in the first steps.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    causal: ClassVar[bool] = True
    budget: ClassVar[Budget] = "none"
    state: ClassVar[str] = ""
    starts_dense: ClassVar[bool] = False

    @property
    def is_recurrent(self) -> bool:
        """Whether routers read a state instead of the tokens."""
        return False

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes from batch to batch."""
        return False


@dataclass(frozen=True, kw_only=True)
class Selection(AnyRouting):
    """The settings of every router that selects experts, and what it does with them.

    Attributes:
        reads: what `select` takes: the logits of the tokens, one by one; the logits of whole
            sequences, `[b, T, E]`, of which it also needs to know the padding; or the tokens' ids.
        reports: the key of `metrics.jsonl` under which `report` stands; None without a state that
            moves.
    """

    reads: ClassVar[Literal["tokens", "sequences", "ids"]] = "tokens"
    reports: ClassVar[str | None] = None

    max_assignments: int | None = setting(
        None,
        flag="--moe-relu-max-assignments",
        help="Number of assignments per layer and rank (mean over layers) to compute at once. A "
        "layer with more runs its experts in chunks, and again in backward. Default: 1.25 times "
        "topk per token.",
        within="[1, inf)",
    )

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes from batch to batch."""
        return True

    @property
    def per_layer(self) -> bool:
        """Whether `report` has a number of its own for every layer."""
        return False

    @property
    def is_plain_relu(self) -> bool:
        """Whether gates are the ReLU of the logits alone, so that `kernels.relu_router` is all."""
        return False

    def num_logits(self, num_experts: int) -> int:
        """Return the number of logits of a token: E, unless a subclass has more or none."""
        return num_experts

    def check_model(self, num_experts: int, topk: int) -> None:
        """Refuse numbers of experts, after granularity, that the router cannot have.

        Raises:
            ValueError: naming the number and the remedy.
        """

    def parameters(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial values of what is learned beside the weight of the logits, fp32."""
        return {}

    def buffers(self, num_experts: int, topk: int) -> dict[str, Tensor]:
        """Return the initial values of the state, fp32, which checkpoints have."""
        return {}

    def select(self, logits_TE: Tensor, tensors: Tensors, *, topk: int) -> tuple[Tensor, Tensor]:
        """Select experts.

        Args:
            logits_TE: what `reads` says.
            tensors: the parameters and buffers by their names.
            topk: k of the model.

        Returns:
            probs `[T, E]`, at least fp32, zero where inactive; and routing_map, bool `[T, E]`.
        """
        raise NotImplementedError

    def bound(
        self, logits_TE: Tensor, probs_TE: Tensor, routing_map_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is routed of what `select` returned, and counted, all `[T, E]`."""
        return probs_TE, routing_map_TE

    def regularizer(
        self,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tensors: Tensors,
        *,
        counts: TokenCounts,
        topk: int,
        padding_mask_T: Tensor | None = None,
    ) -> Tensor:
        """Return what the coefficient of an L1 budget penalizes in a micro-batch, 0-d.

        Args:
            logits_TE, probs_TE: of the local tokens, as `select` takes and returns them.
            tensors: the parameters and buffers by their names.
            counts: of the whole micro-batch, without padding.
            topk: k of the model.
            padding_mask_T: bool `[T]`, True for padding tokens.
        """
        raise NotImplementedError

    @property
    def observes(self) -> bool:
        """Whether `observe` is to be called."""
        return False

    def observe(
        self, logits_TE: Tensor, *, topk: int, padding_mask_T: Tensor | None = None
    ) -> Tensor:
        """Return what `moved` needs of a micro-batch, `[E]`, whose mean over micro-batches it gets.

        Args:
            logits_TE: of all tokens of the micro-batch.
            topk: k of the model.
            padding_mask_T: bool `[T]`, True for padding tokens, which do not count.
        """
        raise NotImplementedError

    def moved(self, state: Tensors, step: StepReport) -> dict[str, Tensor]:
        """Return the buffers of the next step.

        Args:
            state: the buffers by their names, each `[L, ...]` of the layers of this rank.
            step: what the step measured in the same layers, and its mean over all layers.
        """
        return {}

    def report(self, state: Tensors) -> Tensor:
        """Return the number that stands for the state of a layer, 0-d."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Routing(Selection):
    """The settings of every router that selects by logits of single tokens.

    With a `recurrence`, routers read a state that tokens take from layer to layer, instead of the
    tokens themselves (RMoE, arXiv 2408.06793).

    Raises:
        ValueError: a setting of recurrence is given, and `recurrence` is "none".
    """

    recurrence: Recurrence = setting(
        "none",
        flag="--moe-router-recurrence",
        help="Route by a state that every token takes from layer to layer, and which a GRU or an "
        "RNN that all layers share moves on. With none, route by the token alone.",
        on_resume="refused",
        exported=True,
    )
    recurrent_size: int = setting(
        128,
        flag="--moe-router-recurrent-size",
        help="Number of values of the state of a recurrent router.",
        within="[1, inf)",
        on_resume="refused",
        exported=True,
    )
    recurrent_init_std: float = setting(
        0.02,
        flag="--moe-router-recurrent-init-std",
        help="Standard deviation of the initial matrices of recurrent routers and of their cell. "
        "The default is the paper's, whose model is ten times as wide as the quickstart's.",
        within="(0, inf)",
    )
    recurrent_passing: RecurrentPassing = setting(
        "full",
        flag="--moe-router-recurrent-passing",
        help="Ablation: hand the state on to the next layer without its gradient (detached), or "
        "start every layer from zero (none).",
        on_resume="refused",
        exported=True,
    )
    recurrent_projection: RecurrentProjection = setting(
        "layer",
        flag="--moe-router-recurrent-projection",
        help="Ablation: project tokens to the size of the state by one matrix that all layers "
        "share (shared), instead of one of every layer (layer).",
        on_resume="refused",
        exported=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_idle_recurrence({s.name: getattr(self, s.name) for s in settings_of(type(self))})

    @property
    def is_recurrent(self) -> bool:
        """Whether routers read a state instead of the tokens."""
        return self.recurrence != "none"


def refuse_idle_recurrence(values: Mapping[str, Any], *, by_flag: bool = False) -> None:
    """Refuse a setting of recurrence without recurrence.

    Args:
        values: the settings of a router, by their names, or by the names of their flags.
        by_flag: whether they are named by their flags.

    Raises:
        ValueError: naming the value and what to do.
    """
    named = {s.name: s for s in settings_of(Routing)}
    name_of = {n: s.dest if by_flag else n for n, s in named.items()}
    if values[name_of["recurrence"]] != "none":
        return
    for name in (
        "recurrent_size",
        "recurrent_init_std",
        "recurrent_passing",
        "recurrent_projection",
    ):
        value = values[name_of[name]]
        if value != named[name].default:
            raise ValueError(
                f"{name_of[name]} is {value}, but {name_of['recurrence']} is none; choose gru or "
                f"rnn, or leave {name_of[name]} out"
            )


def scalar(value: float) -> Tensor:
    """Return a number as a buffer has it: fp32, 0-d."""
    return torch.tensor(value, dtype=torch.float32)
