"""Validated configurations of layers: sizes, settings of the router, and parameter counts.

The settings of every router are in `remoe.selections`; their names are those of this module too.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from remoe.controller import ControllerConfig, L1Coefficient
from remoe.regularization import LoadBalancing
from remoe.selections import (
    ROUTINGS,
    AnyRouting,
    L1Routing,
    Recurrence,
    RecurrentPassing,
    RecurrentProjection,
    ReLURouting,
    Routing,
    Selection,
    SoftRouting,
    TopKRouting,
    refuse_idle_recurrence,
)

__all__ = [
    "ROUTINGS",
    "Activation",
    "AnyRouting",
    "ControllerConfig",
    "ExpertShape",
    "L1Coefficient",
    "L1Routing",
    "LoadBalancing",
    "ReLURouting",
    "ReMoELayerConfig",
    "Recurrence",
    "RecurrentPassing",
    "RecurrentProjection",
    "Routing",
    "Selection",
    "SoftMoELayerConfig",
    "SoftRouting",
    "TopKRouting",
    "apply_granularity",
    "refuse_idle_recurrence",
]

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


@dataclass(frozen=True)
class ReMoELayerConfig(ReLURouting):
    """One ReMoE layer of SwiGLU experts: its sizes, and the settings of `ReLURouting`.

    `max_assignments` counts the active (token, expert) pairs of one call. With None, a call with
    more than twice `topk` per token computes a third of that at once, so that the dense first
    steps need no more memory than later ones.

    Attributes:
        hidden_size: width of the tokens.
        ffn_hidden_size: width of one expert before granularity.
        num_experts: experts before granularity.
        topk: how many of these are active per token on average.
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
