"""The adaptive coefficient of the L1 penalty (arXiv 2412.14711, Eq. 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remoe.settings import Settings, setting


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
        floor, ceiling: bounds on the coefficient. None is no ceiling, as published, and as floor
            the smallest number with all its digits, 1.2e-38 in fp32. Below it, numbers lose digits
            until alpha times a coefficient rounds to itself, which could then never rise again.
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


def next_l1_coeff(l1_coeff: Tensor, sparsity: Tensor, config: ControllerConfig) -> Tensor:
    """Return the coefficients of the next step, elementwise and without a copy to the host.

    A sparsity below the target multiplies the coefficient by alpha, and any other divides it. At
    equality the published code divides, where Eq. 7 would hold (sign(0) = 0); we follow the code. A
    step without any real token has a sparsity of NaN: nothing was measured, and the coefficient
    stays as it is.

    Args:
        l1_coeff: coefficients of any shape, fp32.
        sparsity: measured sparsity, broadcastable to `l1_coeff`.
        config: target, alpha and bounds.

    Returns:
        Coefficients of the same shape and dtype.
    """
    too_dense = sparsity < config.target_sparsity
    alpha = config.l1_coeff_multiplier
    stepped = torch.where(too_dense, l1_coeff * alpha, l1_coeff / alpha)
    stepped = torch.where(sparsity.isnan(), l1_coeff, stepped)
    floor = torch.finfo(l1_coeff.dtype).tiny if config.floor is None else config.floor
    return stepped.clamp(floor, config.ceiling)


def register_l1_coeff(
    module: nn.Module, config: ControllerConfig, device: torch.device | str | int | None
) -> None:
    """Give a module its coefficient: the buffer `l1_coeff`, fp32, 0-d, saved with the module."""
    coeff = torch.tensor(config.l1_coeff_init, dtype=torch.float32, device=device)
    module.register_buffer("l1_coeff", coeff)


@torch.no_grad()
def move_l1_coeff(coeffs: Sequence[Tensor], sparsity: Tensor, config: ControllerConfig) -> None:
    """Move all coefficients by one step in place.

    Args:
        coeffs: coefficients, 0-d each, fp32.
        sparsity: measured sparsity of the step, 0-d.
        config: target, alpha and bounds.
    """
    moved = next_l1_coeff(torch.stack(list(coeffs)), sparsity, config)
    torch._foreach_copy_(list(coeffs), list(moved.unbind()))
