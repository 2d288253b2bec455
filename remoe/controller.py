"""The adaptive coefficient of the L1 penalty (arXiv 2412.14711, Eq. 7)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remoe.config import ControllerConfig

# What is active where nothing is: a twentieth of the target, for the logarithm.
_LEAST_DENSITY = 0.05


def next_l1_coeff(
    l1_coeff: Tensor,
    sparsity: Tensor,
    config: ControllerConfig,
    last_sparsity: Tensor | None = None,
) -> Tensor:
    """One step of the rule, elementwise and without a device-to-host copy.

    `sign`: too dense multiplies the coefficient by alpha, else divides. At equality the published
    code divides, where Eq. 7 would hold (sign(0) = 0); we follow the code.

    `pi`: `log c += P (d - d_last) + I d` with `d = log(density / target density)`, at most two
    steps of `sign`. The coefficient itself is the integral, so that what a bound or the largest
    step cuts off is never made up for later.

    Args:
        l1_coeff: coefficients of any shape, fp32.
        sparsity: measured sparsity, broadcastable to `l1_coeff`.
        config: rule, target, alpha and bounds.
        last_sparsity: that of the step before, for `pi`; None or -1 where there was none.

    Returns:
        The coefficients of the next step, same shape and dtype.
    """
    if config.rule == "pi":
        stepped = l1_coeff * _pi_factor(sparsity, last_sparsity, config)
    else:
        too_dense = sparsity < config.target_sparsity
        stepped = torch.where(too_dense, l1_coeff * config.multiplier, l1_coeff / config.multiplier)
    if config.floor is None and config.ceiling is None:
        return stepped
    return stepped.clamp(config.floor, config.ceiling)


def _pi_factor(sparsity: Tensor, last: Tensor | None, config: ControllerConfig) -> Tensor:
    def excess(sparsity: Tensor) -> Tensor:
        density = (1 - sparsity) / (1 - config.target_sparsity)
        return density.clamp(min=_LEAST_DENSITY).log()

    now = excess(sparsity)
    change = torch.zeros_like(now) if last is None else (now - excess(last)) * (last >= 0)
    move = config.proportional_gain * change + config.integral_gain * now
    most = 2 * math.log(config.multiplier)
    return move.clamp(-most, most).exp()


def register_l1_coeff(
    module: nn.Module, config: ControllerConfig, device: torch.device | str | int | None
) -> None:
    """Give a module the buffers of its coefficient, fp32 and saved with it.

    `l1_coeff`, 0-d, and with the rule `pi` also `last_sparsity`, 0-d, -1 before the first step.
    """
    state = {"l1_coeff": config.init}
    if config.rule == "pi":
        state["last_sparsity"] = -1.0
    for name, value in state.items():
        module.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=device))


def l1_coeff_state(module: nn.Module) -> list[Tensor]:
    """The buffers that `register_l1_coeff` made."""
    found = (getattr(module, name, None) for name in ("l1_coeff", "last_sparsity"))
    return [buffer for buffer in found if isinstance(buffer, Tensor)]


@torch.no_grad()
def move_l1_coeff(modules: Sequence[nn.Module], sparsity: Tensor, config: ControllerConfig) -> None:
    """One step of all modules' coefficients, in place, given the sparsity of the step, 0-d."""
    states = zip(*map(l1_coeff_state, modules), strict=True)
    coeffs, *last = (list(buffers) for buffers in states)
    before = torch.stack(last[0]) if last else None
    moved = next_l1_coeff(torch.stack(coeffs), sparsity, config, before)
    torch._foreach_copy_(coeffs, list(moved.unbind()))
    for buffers in last:
        torch._foreach_copy_(buffers, [sparsity.to(buffers[0])] * len(buffers))


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
        self.l1_coeff = torch.full((num_coeffs,), config.init, dtype=torch.float32, device=device)
        self.last_sparsity = torch.full_like(self.l1_coeff, -1)

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
        moved = next_l1_coeff(self.l1_coeff, sparsity, self.config, self.last_sparsity)
        self.l1_coeff.copy_(moved)
        self.last_sparsity.copy_(sparsity)
        return self.l1_coeff

    def state_dict(self) -> dict[str, Tensor]:
        """`l1_coeff`, and `last_sparsity` with the rule `pi`."""
        return {name: getattr(self, name).clone() for name in self._names}

    @property
    def _names(self) -> list[str]:
        return ["l1_coeff", "last_sparsity"] if self.config.rule == "pi" else ["l1_coeff"]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the coefficients exactly.

        Raises:
            ValueError: a missing or unknown key, or another number of coefficients.
        """
        if set(state) != set(self._names):
            raise ValueError(
                f"controller state has keys {sorted(state)}; it must have exactly "
                f"{', '.join(map(repr, self._names))}"
            )
        for name in self._names:
            own = getattr(self, name)
            if state[name].shape != own.shape:
                raise ValueError(
                    f"controller state has coefficients of shape {tuple(state[name].shape)}, "
                    f"this controller {tuple(own.shape)}; build it with the same num_coeffs"
                )
        for name in self._names:
            getattr(self, name).copy_(state[name])
