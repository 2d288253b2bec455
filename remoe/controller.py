"""The adaptive coefficient of the L1 penalty (arXiv 2412.14711, Eq. 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remoe.config import ControllerConfig


def next_l1_coeff(l1_coeff: Tensor, sparsity: Tensor, config: ControllerConfig) -> Tensor:
    """One step of the rule, elementwise and without a device-to-host copy.

    Too dense multiplies the coefficient by alpha, else it is divided. At equality the published
    code divides, where Eq. 7 would hold (sign(0) = 0); we follow the code. A sparsity of NaN, which
    a step without any real token has, leaves the coefficient as it is: nothing was measured.

    Args:
        l1_coeff: coefficients of any shape, fp32.
        sparsity: measured sparsity, broadcastable to `l1_coeff`.
        config: target, alpha and bounds.

    Returns:
        The coefficients of the next step, same shape and dtype.
    """
    too_dense = sparsity < config.target_sparsity
    alpha = config.l1_coeff_multiplier
    stepped = torch.where(too_dense, l1_coeff * alpha, l1_coeff / alpha)
    stepped = torch.where(sparsity.isnan(), l1_coeff, stepped)
    if config.floor is None and config.ceiling is None:
        return stepped
    return stepped.clamp(config.floor, config.ceiling)


def register_l1_coeff(
    module: nn.Module, config: ControllerConfig, device: torch.device | str | int | None
) -> None:
    """Give a module the buffer of its coefficient, `l1_coeff`, fp32, 0-d and saved with it."""
    coeff = torch.tensor(config.l1_coeff_init, dtype=torch.float32, device=device)
    module.register_buffer("l1_coeff", coeff)


@torch.no_grad()
def move_l1_coeff(coeffs: Sequence[Tensor], sparsity: Tensor, config: ControllerConfig) -> None:
    """One step of all coefficients, 0-d each, in place, given the sparsity of the step, 0-d."""
    moved = next_l1_coeff(torch.stack(list(coeffs)), sparsity, config)
    torch._foreach_copy_(list(coeffs), list(moved.unbind()))


class SparsityController:
    """Holds one coefficient, or one per layer, and moves it once per optimizer step.

    Args:
        config: target sparsity, initial coefficient, multiplier and bounds.
        num_coeffs: 1 for a coefficient shared by all layers, or the number of layers.
        device: where the coefficients live; nothing here copies them to the host.
    """

    def __init__(
        self,
        config: ControllerConfig,
        *,
        num_coeffs: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self.l1_coeff = torch.full(
            (num_coeffs,), config.l1_coeff_init, dtype=torch.float32, device=device
        )

    def update(self, sparsity: Tensor) -> Tensor:
        """Move the coefficients in place, given the sparsity of the step (0-d or `[num_coeffs]`).

        Returns:
            The coefficients of the next step, fp32 `[num_coeffs]`.

        Raises:
            ValueError: `sparsity` has neither one element nor one per coefficient.
        """
        if sparsity.numel() not in (1, self.l1_coeff.numel()):
            raise ValueError(
                f"sparsity has {sparsity.numel()} elements for {self.l1_coeff.numel()} "
                f"coefficients; pass one value, or one per coefficient"
            )
        self.l1_coeff.copy_(next_l1_coeff(self.l1_coeff, sparsity, self.config))
        return self.l1_coeff

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the coefficients, `l1_coeff`."""
        return {"l1_coeff": self.l1_coeff.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the coefficients exactly.

        Raises:
            ValueError: a missing or unknown key, or another number of coefficients.
        """
        if set(state) != {"l1_coeff"}:
            raise ValueError(
                f"controller state has keys {sorted(state)}; it must have exactly 'l1_coeff'"
            )
        if state["l1_coeff"].shape != self.l1_coeff.shape:
            raise ValueError(
                f"controller state has coefficients of shape {tuple(state['l1_coeff'].shape)}, "
                f"this controller {tuple(self.l1_coeff.shape)}; build it with the same num_coeffs"
            )
        self.l1_coeff.copy_(state["l1_coeff"])
