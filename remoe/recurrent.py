"""Router scores with a memory over depth (RMoE, arXiv 2408.06793, Eq. 4-6).

A token takes a state from layer to layer: `x' = P_l x`, `h_l = cell(x', h_{l-1})`, and the logits
of layer l are `G_l h_l`. All layers share the cell; every layer has a projection `P_l` and a router
`G_l` of its own. The state is zero before the first layer, is not detached, and runs over depth
only, so that decoding with a cache keeps nothing of it.

State and cell are fp32 whatever the model's dtype is, as routers are. Shapes: T tokens, H hidden,
p size of the state, E experts, g gates of the cell (3 of a GRU, 1 of an RNN).
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from remoe.config import RecurrentPassing

Cell = Literal["gru", "rnn"]
CELLS: tuple[Cell, ...] = get_args(Cell)
GATES: dict[Cell, int] = {"gru": 3, "rnn": 1}
CellWeights = tuple[Tensor, Tensor, Tensor, Tensor]  # W, U, b, c; gates one after the other


def next_state(cell: Cell, x_Tp: Tensor, state_Tp: Tensor, weights: CellWeights) -> Tensor:
    """Return the state after a layer, `[T, p]` (Eq. 5).

    The GRU is that of `torch.nn.GRUCell` (gates r, z, n), as in the published code:
    `h' = (1 - z) * tanh(W_n x + b_n + r * (U_n h + c_n)) + z * h`. The RNN is
    `h' = tanh(W x + b + U h + c)`.

    Args:
        cell: "gru" or "rnn".
        x_Tp: projected inputs of the layer.
        state_Tp: the state after the layer before.
        weights: W, U, b and c.
    """
    function = torch.gru_cell if cell == "gru" else torch.rnn_tanh_cell
    state: Tensor = function(x_Tp, state_Tp, *weights)
    return state


def passed_on(state: Tensor, passing: RecurrentPassing) -> Tensor | None:
    """Return what a layer takes of the state of the layer before it.

    That is the whole state, or in the paper's ablations the state without its gradient ("detached")
    or nothing ("none").
    """
    if passing == "none":
        return None
    return state.detach() if passing == "detached" else state


def recurrent_state(
    x_TH: Tensor,
    state_Tp: Tensor | None,
    *,
    cell: Cell,
    weights: CellWeights,
    projection_pH: Tensor,
) -> Tensor:
    """Return the state after a layer, fp32 `[T, p]`; the arguments are `recurrent_scores`'."""
    x_Tp = F.linear(x_TH.float(), projection_pH.float())
    if state_Tp is None:
        state_Tp = torch.zeros_like(x_Tp)
    return next_state(cell, x_Tp, state_Tp, weights)


def recurrent_scores(
    x_TH: Tensor,
    state_Tp: Tensor | None,
    *,
    cell: Cell,
    weights: CellWeights,
    projection_pH: Tensor,
    router_Ep: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the logits `[T, E]` of a layer and the state that it hands on, `[T, p]`, both fp32.

    Args:
        x_TH: input of the layer's experts.
        state_Tp: the state of the layer before; None before the first layer with experts, and in
            every layer of the paper's ablation without passing.
        cell: "gru" or "rnn".
        weights: the cell's, shared by all layers.
        projection_pH: P of this layer.
        router_Ep: G of this layer.
    """
    state_Tp = recurrent_state(
        x_TH, state_Tp, cell=cell, weights=weights, projection_pH=projection_pH
    )
    return F.linear(state_Tp, router_Ep.float()), state_Tp


class RecurrentCell(nn.Module):
    """The cell that all layers of a model share, in fp32.

    The published code initializes every parameter of it, biases included, with a function that its
    configuration lacks. Here matrices have the paper's standard deviation, and biases are zero.

    Args:
        cell: "gru" or "rnn".
        size: p.
        hidden_size: H, for a projection that all layers share too; None if every layer has its own.
        init_std: standard deviation of the matrices.
        device: of the parameters.

    Parameters:
        weight_ih, weight_hh: `[g * p, p]`; bias_ih, bias_hh: `[g * p]`; projection: `[p, H]`, if it
            is shared.

    Raises:
        ValueError: an unknown cell, or a size below 1.
    """

    projection: nn.Parameter | None

    def __init__(
        self,
        cell: Cell,
        size: int,
        *,
        hidden_size: int | None = None,
        init_std: float = 0.02,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell is {cell!r}; choose one of {', '.join(CELLS)}")
        if size < 1:
            raise ValueError(f"size is {size}; the state of a recurrent router needs at least 1")
        self.cell, self.size, self.init_std = cell, size, init_std
        rows = GATES[cell] * size

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        self.weight_ih, self.weight_hh = weight(rows, size), weight(rows, size)
        self.bias_ih, self.bias_hh = weight(rows), weight(rows)
        self.register_parameter(
            "projection", None if hidden_size is None else weight(size, hidden_size)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices, and set the biases to zero."""
        for weight in self.parameters():
            if weight.ndim == 1:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=self.init_std)

    def forward(
        self, x_TH: Tensor, state_Tp: Tensor | None, projection_pH: Tensor | None
    ) -> Tensor:
        """Return the state after a layer; see `recurrent_state`.

        The projection is that of the layer, or None if all layers share that of the cell.
        """
        projection_pH = self.projection if projection_pH is None else projection_pH
        assert projection_pH is not None
        return recurrent_state(
            x_TH, state_Tp, cell=self.cell, weights=self.weights, projection_pH=projection_pH
        )

    def extra_repr(self) -> str:
        """Return the sizes that a printed model shows."""
        shared = "" if self.projection is None else f", hidden_size={self.projection.shape[1]}"
        return f"cell={self.cell}, size={self.size}{shared}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RecurrentCell":
        """Move the parameters to another device, but never cast them."""
        exact = {name: p.detach() for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                before = exact[name]
                parameter.data = (parameter if before.is_meta else before).to(
                    device=parameter.device, dtype=torch.float32
                )
        return self

    @property
    def weights(self) -> CellWeights:
        """The parameters in the order of `next_state`."""
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
