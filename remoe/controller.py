"""The adaptive coefficient of the L1 penalty (arXiv 2412.14711, Eq. 7)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remoe.config import ControllerConfig

# The rule `pi`: gains, and how far from the target density, relative to it, it is near.
_PROPORTIONAL, _INTEGRAL, _BAND = 8.0, 0.5, 0.25
_FLOOR = 0.01  # of the highest coefficient so far


def next_l1_coeff(
    l1_coeff: Tensor,
    sparsity: Tensor,
    config: ControllerConfig,
    memory: Tensor | None = None,
) -> Tensor:
    """One step of the rule, elementwise and without a device-to-host copy.

    `sign`: too dense multiplies the coefficient by alpha, else divides. At equality the published
    code divides, where Eq. 7 would hold (sign(0) = 0); we follow the code.

    `pi`: `log c += P (b(d) - b(d_last)) + I d`, where d is the density relative to the target minus
    1 and b bounds it to 0.25, by log(alpha) at most: a faster rise can close all gates before
    sparsity tells, and closed gates have no gradient. While d is within 0.25, c does not fall below
    a hundredth of its highest value: a lower one changes little, and the way back would be long.
    The coefficient itself is the integral, so what a bound cuts off is not made up for later.

    Args:
        l1_coeff: coefficients of any shape, fp32.
        sparsity: measured sparsity, broadcastable to `l1_coeff`.
        config: rule, target, alpha and bounds.
        memory: for `pi`, what `remember` made in the step before, `[..., 2]`; None in the first.

    Returns:
        The coefficients of the next step, same shape and dtype.
    """
    if config.rule == "pi":
        stepped = _pi_step(l1_coeff, sparsity, memory, config)
    else:
        too_dense = sparsity < config.target_sparsity
        stepped = torch.where(too_dense, l1_coeff * config.multiplier, l1_coeff / config.multiplier)
    if config.floor is None and config.ceiling is None:
        return stepped
    return stepped.clamp(config.floor, config.ceiling)


def _pi_step(
    l1_coeff: Tensor, sparsity: Tensor, memory: Tensor | None, config: ControllerConfig
) -> Tensor:
    def excess(sparsity: Tensor) -> Tensor:
        return (1 - sparsity) / (1 - config.target_sparsity) - 1

    def bounded(excess: Tensor) -> Tensor:
        return excess.clamp(-_BAND, _BAND)

    now = excess(sparsity)
    move = _INTEGRAL * now
    most = math.log(config.multiplier)
    if memory is None:
        return l1_coeff * move.clamp(-most, most).exp()
    last, highest = memory.unbind(-1)
    move = move + _PROPORTIONAL * (bounded(now) - bounded(excess(last))) * (last >= 0)
    moved = l1_coeff * move.clamp(-most, most).exp()
    least = torch.minimum(l1_coeff, _FLOOR * highest)
    return torch.where(now.abs() <= _BAND, torch.maximum(moved, least), moved)


def remember(l1_coeff: Tensor, sparsity: Tensor, memory: Tensor) -> Tensor:
    """What the rule `pi` needs in the next step, `[..., 2]`: sparsity, and highest coefficient.

    Args:
        l1_coeff: coefficients of the next step.
        sparsity: of this step.
        memory: of the step before; a sparsity of -1 where there was none.
    """
    highest = torch.maximum(memory[..., 1], l1_coeff)
    return torch.stack((sparsity.to(highest).expand_as(highest), highest), dim=-1)


_NOTHING = (-1.0, 0.0)  # a memory before the first step


def register_l1_coeff(
    module: nn.Module, config: ControllerConfig, device: torch.device | str | int | None
) -> None:
    """Give a module the buffers of its coefficient, fp32 and saved with it.

    `l1_coeff`, 0-d, and with the rule `pi` also `l1_coeff_memory`, `[2]`; see `remember`.
    """
    state: dict[str, float | tuple[float, ...]] = {"l1_coeff": config.init}
    if config.rule == "pi":
        state["l1_coeff_memory"] = _NOTHING
    for name, value in state.items():
        module.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=device))


def l1_coeff_state(module: nn.Module) -> list[Tensor]:
    """The buffers that `register_l1_coeff` made."""
    found = (getattr(module, name, None) for name in ("l1_coeff", "l1_coeff_memory"))
    return [buffer for buffer in found if isinstance(buffer, Tensor)]


@torch.no_grad()
def move_l1_coeff(modules: Sequence[nn.Module], sparsity: Tensor, config: ControllerConfig) -> None:
    """One step of all modules' coefficients, in place, given the sparsity of the step, 0-d."""
    coeffs, *memories = (
        list(buffers) for buffers in zip(*map(l1_coeff_state, modules), strict=True)
    )
    memory = torch.stack(memories[0]) if memories else None
    moved = next_l1_coeff(torch.stack(coeffs), sparsity, config, memory)
    torch._foreach_copy_(coeffs, list(moved.unbind()))
    if memory is not None:
        torch._foreach_copy_(memories[0], list(remember(moved, sparsity, memory).unbind()))


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
        nothing = torch.tensor(_NOTHING, dtype=torch.float32, device=device)
        self.l1_coeff_memory = nothing.repeat(num_coeffs, 1)

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
        moved = next_l1_coeff(self.l1_coeff, sparsity, self.config, self.l1_coeff_memory)
        self.l1_coeff.copy_(moved)
        self.l1_coeff_memory.copy_(remember(moved, sparsity, self.l1_coeff_memory))
        return self.l1_coeff

    def state_dict(self) -> dict[str, Tensor]:
        """`l1_coeff`, and `l1_coeff_memory` with the rule `pi`."""
        return {name: getattr(self, name).clone() for name in self._names}

    @property
    def _names(self) -> list[str]:
        return ["l1_coeff", "l1_coeff_memory"] if self.config.rule == "pi" else ["l1_coeff"]

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
