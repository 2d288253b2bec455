"""Validated configurations, and the parameter counts that follow from them."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

LoadBalancing = Literal["aux_loss", "none"]


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one layer after granularity: what the layer is built with."""

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
class ControllerConfig:
    """The rule that moves the L1 coefficient (arXiv 2412.14711, Eq. 7).

    Attributes:
        target_sparsity: fraction of inactive (token, expert) pairs to reach, `1 - k/E`, in [0, 1).
        init: coefficient of the first step.
        multiplier: factor alpha > 1 by which one step moves the coefficient.
        floor, ceiling: bounds on the coefficient; None is unbounded, as published.
    """

    target_sparsity: float
    init: float = 1e-8
    multiplier: float = 1.2
    floor: float | None = None
    ceiling: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}; it must be in [0, 1), usually 1 - k/E"
            )
        if not 0 < self.init < math.inf:
            raise ValueError(
                f"the initial L1 coefficient is {self.init}; it must be positive and finite, "
                f"because the rule multiplies it (the published value is 1e-8)"
            )
        if not 1 < self.multiplier < math.inf:
            raise ValueError(
                f"the L1 coefficient's multiplier is {self.multiplier}; it must be finite and "
                f"above 1 (the published value is 1.2)"
            )
        low = 0.0 if self.floor is None else self.floor
        high = float("inf") if self.ceiling is None else self.ceiling
        if not low <= self.init <= high:
            raise ValueError(
                f"the initial L1 coefficient {self.init} is outside its bounds [{low}, {high}]; "
                f"move the bounds or the initial value"
            )


@dataclass(frozen=True)
class ReMoEConfig:
    """One ReMoE layer of SwiGLU experts.

    Attributes:
        hidden_size: width of the tokens.
        ffn_hidden_size: width of one expert before granularity.
        num_experts, topk: experts, and how many are active per token on average, both before
            granularity.
        granularity: G; experts x G, active experts x G, expert width / G.
        load_balancing: "aux_loss" weights the L1 penalty by load (Eq. 10), "none" does not (Eq. 9).
        l1_coeff_init, l1_coeff_multiplier: see `ControllerConfig`.
        init_std: standard deviation of the initial weights.
        max_assignments: active (token, expert) pairs that the layer computes at once; with more it
            goes chunk by chunk, and again in backward. None: above twice `topk` per token it goes
            by a third of that, so that the dense first steps need no more memory than the others.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_experts: int = 8
    topk: int = 1
    granularity: int = 1
    load_balancing: LoadBalancing = "aux_loss"
    l1_coeff_init: float = 1e-8
    l1_coeff_multiplier: float = 1.2
    init_std: float = 0.02
    max_assignments: int | None = None

    def __post_init__(self) -> None:
        if self.max_assignments is not None and self.max_assignments < 1:
            raise ValueError(
                f"max_assignments is {self.max_assignments}; it must be at least 1, or None"
            )
        if self.hidden_size < 1 or self.ffn_hidden_size < 1:
            raise ValueError(
                f"hidden_size {self.hidden_size} and ffn_hidden_size {self.ffn_hidden_size} "
                f"must be positive"
            )
        if self.load_balancing not in get_args(LoadBalancing):
            raise ValueError(
                f"load_balancing is {self.load_balancing!r}; "
                f"choose one of {', '.join(get_args(LoadBalancing))}"
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
        return ControllerConfig(
            target_sparsity=1 - self.topk / self.num_experts,
            init=self.l1_coeff_init,
            multiplier=self.l1_coeff_multiplier,
        )

    @property
    def num_params(self) -> int:
        """Parameters of the layer: router and all experts."""
        return self._num_params(self.experts.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that an average token uses at the target sparsity: router and topk experts."""
        return self._num_params(self.experts.topk)

    def _num_params(self, num_experts: int) -> int:
        shape = self.experts
        router = shape.num_experts * self.hidden_size
        expert = 3 * self.hidden_size * shape.ffn_hidden_size
        return router + num_experts * expert
