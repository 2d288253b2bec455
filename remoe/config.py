"""Validated configurations: the settings of every router, and the parameter counts of a layer.

To add a setting, add a field to the class of its router; `remoe.settings` says what follows from
it. To add a router, add a subclass of `Routing` and its name in `ROUTINGS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from remoe.settings import Settings, setting, settings_of

LoadBalancing = Literal["aux_loss", "none"]
Recurrence = Literal["none", "gru", "rnn"]
RecurrentPassing = Literal["full", "detached", "none"]
RecurrentProjection = Literal["layer", "shared"]
Activation = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one layer after granularity, which are those that the layer is built with."""

    num_experts: int
    topk: int
    ffn_hidden_size: int


def apply_granularity(
    *, num_experts: int, topk: int, ffn_hidden_size: int, granularity: int
) -> ExpertShape:
    """Split every expert into `granularity` narrower ones (ReMoE, arXiv 2412.14711, Eq. 12-13).

    Experts and active experts are multiplied by G, expert width is divided by G: total and active
    parameters of the experts stay the same.

    Raises:
        ValueError: G < 1, G does not divide the width, or k is not in 1..E.
    """
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; it must be at least 1 (1 = no splitting)")
    if ffn_hidden_size % granularity:
        raise ValueError(
            f"granularity {granularity} does not divide the expert width {ffn_hidden_size}; "
            f"choose a granularity that divides it, or another width"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a mixture needs at least 1 expert")
    if not 1 <= topk <= num_experts:
        raise ValueError(
            f"topk is {topk * granularity} of {num_experts * granularity} experts "
            f"(topk {topk}, num_experts {num_experts}, granularity {granularity}); "
            f"choose topk between 1 and num_experts"
        )
    return ExpertShape(
        num_experts * granularity, topk * granularity, ffn_hidden_size // granularity
    )


@dataclass(frozen=True, kw_only=True)
class L1Coefficient(Settings):
    """Start and step of the coefficient of the L1 penalty (arXiv 2412.14711, Eq. 7)."""

    l1_coeff_init: float = setting(
        1e-8,
        flag="--moe-relu-l1-reg-coeff-init",
        help="Initial coefficient of the L1 penalty on the router's outputs.",
        within="(0, inf)",
        exported=True,
        may_idle=True,
    )
    l1_coeff_multiplier: float = setting(
        1.2,
        flag="--moe-relu-l1-reg-coeff-multiplier",
        help="Factor by which every step multiplies or divides the coefficient.",
        within="(1, inf)",
        on_resume="warned",
        exported=True,
        may_idle=True,
    )


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(L1Coefficient):
    """The rule that moves the L1 coefficient (arXiv 2412.14711, Eq. 7).

    Attributes:
        target_sparsity: fraction of inactive (token, expert) pairs to reach, `1 - k/E`, in [0, 1).
        floor, ceiling: bounds on the coefficient; None is unbounded, as published.
    """

    target_sparsity: float
    floor: float | None = None
    ceiling: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}; it must be in [0, 1), usually 1 - k/E"
            )
        low = 0.0 if self.floor is None else self.floor
        high = float("inf") if self.ceiling is None else self.ceiling
        if not low <= self.l1_coeff_init <= high:
            raise ValueError(
                f"l1_coeff_init is {self.l1_coeff_init}, which is outside its bounds [{low}, "
                f"{high}]; move the bounds or the initial value"
            )


@dataclass(frozen=True, kw_only=True)
class AnyRouting(Settings):
    """The base of the settings of every router, which selects experts for a token or does not."""

    title: ClassVar[str]
    causal: ClassVar[bool] = True  # whether no token sees those after it

    @property
    def is_recurrent(self) -> bool:
        """Whether routers read a state instead of the tokens."""
        return False

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes from batch to batch."""
        return False


@dataclass(frozen=True, kw_only=True)
class Routing(AnyRouting):
    """The settings of every router that selects experts. A subclass adds those of one router.

    With a `recurrence`, routers read a state that tokens take from layer to layer, instead of the
    tokens themselves (RMoE, arXiv 2408.06793).

    Raises:
        ValueError: a setting of recurrence is given, and `recurrence` is "none".
    """

    max_assignments: int | None = setting(
        None,
        flag="--moe-relu-max-assignments",
        help="Number of assignments per layer and rank (mean over layers) to compute at once. A "
        "layer with more runs its experts in chunks, and again in backward. Default: 1.25 times "
        "topk per token.",
        within="[1, inf)",
    )
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

    @property
    def varies(self) -> bool:
        """Whether the number of assignments changes from batch to batch."""
        return True


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


@dataclass(frozen=True, kw_only=True)
class ReLURouting(L1Coefficient, Routing):
    """The settings of a ReLU router (arXiv 2412.14711, Eq. 5)."""

    title: ClassVar[str] = "ReLU routing"

    load_balancing: LoadBalancing = setting(
        "aux_loss",
        flag="--moe-relu-load-balancing",
        help="Weight the L1 penalty by the load of each expert (Eq. 10), or not (none, Eq. 9).",
        on_resume="refused",
        exported=True,
        may_idle=True,
    )
    max_active_experts: int | None = setting(
        None,
        flag="--moe-relu-max-active-experts",
        help="Shortcut: keep only this many of a token's experts, those with the largest gates. "
        "The number is that before granularity.",
        within="[1, inf)",
        on_resume="refused",
        exported=True,
        per_granularity=True,
    )
    at_least_one_expert: bool = setting(
        False,
        flag="--moe-relu-at-least-one-expert",
        help="Shortcut: give a token without any active expert the one with the largest logit.",
        on_resume="refused",
        exported=True,
    )

    def controller_for(self, num_experts: int, topk: int) -> ControllerConfig:
        """Return the rule that reaches a mean of `topk` active experts out of `num_experts`."""
        return ControllerConfig(
            target_sparsity=1 - topk / num_experts,
            l1_coeff_init=self.l1_coeff_init,
            l1_coeff_multiplier=self.l1_coeff_multiplier,
        )


@dataclass(frozen=True, kw_only=True)
class TopKRouting(Routing):
    """The settings of a TopK router, which may activate more experts in its first steps."""

    title: ClassVar[str] = "TopK routing"

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


@dataclass(frozen=True, kw_only=True)
class SoftRouting(AnyRouting):
    """The settings of a soft router (arXiv 2308.00951), for bidirectional models only."""

    title: ClassVar[str] = "Soft MoE"
    causal: ClassVar[bool] = False  # a slot is a mean of all tokens

    slots_per_expert: int = setting(
        1,
        flag="--moe-soft-slots-per-expert",
        help="Number of slots of every expert. With (tokens of a sequence / experts) slots the "
        "experts cost as much as a dense MLP.",
        within="[1, inf)",
        on_resume="refused",
    )


ROUTINGS: dict[str, type[AnyRouting]] = {
    "relu": ReLURouting,
    "topk": TopKRouting,
    "soft": SoftRouting,
}


@dataclass(frozen=True)
class ReMoELayerConfig(ReLURouting):
    """One ReMoE layer of SwiGLU experts: its sizes, and the settings of `ReLURouting`.

    `max_assignments` counts the active (token, expert) pairs of one call. With None, a call with
    more than twice `topk` per token computes a third of that at once, so that the dense first
    steps need no more memory than later ones.

    Attributes:
        hidden_size: width of the tokens.
        ffn_hidden_size: width of one expert before granularity.
        num_experts, topk: experts, and how many are active per token on average, both before
            granularity.
        granularity: G; experts x G, active experts x G, expert width / G.
        init_std: standard deviation of the initial weights.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_experts: int = 8
    topk: int = 1
    granularity: int = 1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size < 1 or self.ffn_hidden_size < 1:
            raise ValueError(
                f"hidden_size {self.hidden_size} and ffn_hidden_size {self.ffn_hidden_size} "
                f"must be positive"
            )
        _ = self.experts, self.controller  # their own validation

    @property
    def experts(self) -> ExpertShape:
        """Experts as built, after granularity."""
        return apply_granularity(
            num_experts=self.num_experts,
            topk=self.topk,
            ffn_hidden_size=self.ffn_hidden_size,
            granularity=self.granularity,
        )

    @property
    def controller(self) -> ControllerConfig:
        """The rule that moves the coefficient of the layer's penalty."""
        return self.controller_for(self.num_experts, self.topk)

    @property
    def num_params(self) -> int:
        """Number of parameters of the layer: the router and all experts, without a shared cell."""
        return self._num_params(self.experts.num_experts)

    @property
    def num_active_params(self) -> int:
        """Number of parameters that a token uses at the target: the router and topk experts."""
        return self._num_params(self.experts.topk)

    def _num_params(self, num_experts: int) -> int:
        shape = self.experts
        router = shape.num_experts * self.hidden_size
        if self.is_recurrent:
            router = self.recurrent_size * shape.num_experts
            if self.recurrent_projection == "layer":
                router += self.recurrent_size * self.hidden_size
        expert = 3 * self.hidden_size * shape.ffn_hidden_size
        return router + num_experts * expert


@dataclass(frozen=True)
class SoftMoELayerConfig(SoftRouting):
    """One Soft MoE layer: its sizes, and the settings of `SoftRouting`.

    Attributes:
        hidden_size: width of the tokens.
        ffn_hidden_size: width of one expert.
        num_experts: number of experts.
        activation: "swiglu" without biases, as the experts of `ReMoELayer`, or "gelu" with biases,
            as published.
        init_std: standard deviation of the experts' initial weights.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_experts: int = 8
    activation: Activation = "swiglu"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_size", "ffn_hidden_size", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation is {self.activation!r}; choose one of "
                f"{', '.join(get_args(Activation))}"
            )

    @property
    def num_slots(self) -> int:
        """Number of slots of all experts."""
        return self.num_experts * self.slots_per_expert

    @property
    def num_params(self) -> int:
        """Number of parameters of the layer: slots, scale and experts."""
        biases = self.hidden_size + self.ffn_hidden_size if self.activation == "gelu" else 0
        expert = self._weights_per_expert + biases
        return self.num_slots * self.hidden_size + 1 + self.num_experts * expert

    @property
    def num_active_params(self) -> int:
        """Number of parameters that a token uses: all, since every token is in every slot."""
        return self.num_params

    def flops(self, num_tokens: int) -> int:
        """Return the multiplications and additions of a forward pass of one sequence.

        They are those of the matrix products: logits, slots and outputs of 2TSH each, and the
        experts on their slots.
        """
        experts = 2 * self.num_slots * self._weights_per_expert
        return 3 * 2 * num_tokens * self.num_slots * self.hidden_size + experts

    @property
    def _weights_per_expert(self) -> int:
        """Number of weights of the matrices of one expert."""
        matrices = 3 if self.activation == "swiglu" else 2
        return matrices * self.hidden_size * self.ffn_hidden_size
