"""Recurrent routers in Megatron (RMoE, arXiv 2408.06793): an adapter to `remoe.recurrent`.

The state of a token rides in the hidden states, as extra columns between the first and the last
layer with experts: `[s, b, h + columns]`. It is thereby an input and an output of all that Megatron
checkpoints, sends between pipeline stages, or splits along the sequence. Megatron's layer needs no
subclass: norms are given the tokens only, residuals keep the columns, and the MoE layer reads and
writes them.

The state is fp32. In hidden states of half precision it has two columns per value, a rounded value
and a remainder: one column would lose 2^-9 of the state at every boundary of a layer, as
`tests/mcore/test_recurrent.py` shows, and two lose 2^-17.

Shapes, as in Megatron: s sequence, b micro-batch, h hidden; T = s * b local tokens, E experts, p
state.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.counting import CountsRouting
from megatron.remoe.moe.layer import DroplessMoELayer
from megatron.remoe.moe.router import SelectionRouter
from megatron.remoe.moe.topk_router import CountingTopKRouter, NullExpertsRouter
from remoe.config import RecurrentPassing, Routing
from remoe.recurrent import RecurrentCell, passed_on

Bda = Callable[[bool, bool], Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]]


def join(x: Tensor, state: Tensor) -> Tensor:
    """Return `[x | state]` in the dtype of x; the fp32 state has one or two columns per value."""
    if x.dtype == torch.float32:
        return torch.cat([x, state], dim=-1)
    rounded = state.to(x.dtype)
    remainder = (state - rounded.float()).to(x.dtype)
    return torch.cat([x, rounded, remainder], dim=-1)


def split(wide: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Return x and the fp32 state of `[x | state]`; without columns the state is None."""
    x, columns = wide[..., :hidden_size], wide[..., hidden_size:]
    if columns.shape[-1] == 0:
        return x, None
    if wide.dtype == torch.float32:
        return x, columns
    rounded, remainder = columns.float().chunk(2, dim=-1)
    return x, rounded + remainder


class Recurrent(CountsRouting, Router):
    """Mixin for a router that reads the state of the tokens, and not the tokens.

    The base router routes by the state as it would route by hidden states, with a weight `[E, p]`.

    Parameters beside the weight:
        projection: `[p, h]`, unless all layers share that of the cell.
    """

    weight: torch.nn.Parameter
    projection: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: Routing,
        cell: RecurrentCell,
        **newer: Any,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer, routing=routing, **newer)
        self.passing: RecurrentPassing = routing.recurrent_passing
        self._init_std = routing.recurrent_init_std
        self._cell = (cell,)  # a module of the model, and not of its routers
        self.weight = self._parameter(len(self.weight), cell.size)
        own_projection = routing.recurrent_projection == "layer"
        self.register_parameter(
            "projection",
            self._parameter(cell.size, config.hidden_size) if own_projection else None,
        )

    @property
    def cell(self) -> RecurrentCell:
        """The cell that all routers of the model chunk share."""
        return self._cell[0]

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, *newer: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move the state on, and route by it.

        Args:
            input: `[x | state]`, or `[s, b, h]` before the first layer with experts.
            padding_mask: bool `[s, b]`, True for padding tokens, or None.
            newer: what a newer Megatron passes on, for the base router.

        Returns:
            probs `[T, E]` in the dtype of `input`; routing_map, bool `[T, E]`; and the state to
            hand on, fp32 `[s, b, p]`.
        """
        x, before = split(input, self.config.hidden_size)
        if before is not None:
            before = passed_on(before.flatten(end_dim=-2), self.passing)
        state = self.cell(x.flatten(end_dim=-2), before, self.projection)
        if self.counts_now:
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            self.statistics.add_states(state, mask)
        state = state.view(*x.shape[:-1], -1)
        probs, routing_map = super().forward(state, padding_mask, *newer)
        return probs.to(input.dtype), routing_map, state

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        """Return a weight as Megatron makes that of its router, with another deviation."""
        weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if self.config.perform_initialization:
            torch.nn.init.normal_(weight, std=self._init_std)
        weight.data = weight.data.to(self.config.params_dtype)
        weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return weight


class RecurrentSelectionRouter(Recurrent, SelectionRouter):  # type: ignore[misc]
    """The router of a selection, by a state."""


class RecurrentTopKRouter(Recurrent, CountingTopKRouter):
    """Megatron's TopK router of a state."""


class RecurrentNullExpertsRouter(Recurrent, NullExpertsRouter):
    """Megatron's TopK router of a state, with null experts."""


class RecurrentMoELayer(DroplessMoELayer):
    """MoE layer that takes `[x | state]`, or x before the first layer with experts.

    Args:
        hands_on: whether the output is `[y | state]`, for a later layer with experts, or y.
    """

    def __init__(self, *args: Any, hands_on: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hands_on = hands_on

    def rehearse(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return an output of the right shape, without a computation."""
        x = self._tokens(hidden_states)
        state = x.new_zeros((*x.shape[:-1], self.router.cell.size), dtype=torch.float32)
        return join(x, state) if self.hands_on else x, None

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Compute the shared experts, which need no state."""
        output: Tensor | None = super().shared_experts_compute(self._tokens(hidden_states))
        return output

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, *newer: Any
    ) -> tuple[Any, Tensor]:
        """Return `(probs, state)` and the routing map."""
        probs, routing_map, state = self.router(hidden_states, padding_mask, *newer)
        return (probs, state), routing_map

    def preprocess(
        self, hidden_states: Tensor, probs: Any, routing_map: Tensor
    ) -> tuple[Tensor, Any]:
        """Hand on the tokens, the routing and the state."""
        return self._tokens(hidden_states), (*probs, routing_map)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Any) -> tuple[Tensor, None]:
        """Compute the output of the routed experts, given `(probs, state, routing_map)`."""
        probs, state, routing_map = probs
        output, _ = super().routed_experts_compute(hidden_states, (probs, routing_map))
        return join(output, state) if self.hands_on else output, None

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Add the output of shared experts that ran before the routed ones."""
        if shared_expert_output is None:
            return output
        columns = output[..., self.config.hidden_size :]
        return torch.cat([self._tokens(output) + shared_expert_output, columns], dim=-1)

    def _tokens(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., : self.config.hidden_size].contiguous()


def norm_of_tokens(norm: Any, state_size: int, *, keeps_state: bool) -> Any:
    """Return a builder of the norm, for an input with the columns of a state.

    The names of parameters stay, because the norm itself is not wrapped.

    Args:
        norm: a builder of Megatron's.
        state_size: of the state. An input without its columns would start it from zero again.
        keeps_state: whether the output has the columns too.
    """

    def build(*, config: TransformerConfig, **kwargs: Any) -> torch.nn.Module:
        module: torch.nn.Module = norm(config=config, **kwargs)

        def take(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            (wide,) = args
            width = config.hidden_size + columns(state_size, wide.dtype)
            assert wide.shape[-1] == width, f"{wide.shape[-1]} columns, not {width}"
            x = wide[..., : config.hidden_size].contiguous()
            x.state_columns = wide[..., config.hidden_size :]  # type: ignore[attr-defined]
            return (x,)

        def give(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            columns: Tensor = vars(args[0]).pop("state_columns")
            return torch.cat([output, columns], dim=-1) if keeps_state else output

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give)
        return module

    return build


def columns(state_size: int, dtype: torch.dtype) -> int:
    """Return how many columns a state has in hidden states of a dtype."""
    return state_size if dtype == torch.float32 else 2 * state_size


def add_to_tokens(bda: Bda, hidden_size: int, state_size: int | None = None) -> Bda:
    """Return a bias-dropout-add for a residual that has the columns of a state.

    Args:
        bda: Megatron's bias-dropout-add.
        hidden_size: of the tokens.
        state_size: of the state, which is that of the residual, or zero if the residual has none.
            None drops it.
    """

    def get(training: bool, fused: bool) -> Any:
        add = bda(training, fused)

        def add_to_tokens(
            x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
        ) -> Tensor:
            x, state = residual[..., :hidden_size], residual[..., hidden_size:]
            x = add(x_with_bias, x, prob)
            if state_size is None:
                return x
            if state.shape[-1] == 0:
                state = x.new_zeros(*x.shape[:-1], columns(state_size, x.dtype))
            return torch.cat([x, state], dim=-1)

        return add_to_tokens

    return get


def add_and_take_state(bda: Bda, hidden_size: int) -> Bda:
    """Return a bias-dropout-add for the output of a `RecurrentMoELayer`.

    Its state, if it has one, takes the place of the columns of the residual.
    """

    def get(training: bool, fused: bool) -> Any:
        add = bda(training, fused)

        def add_and_take_state(
            x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
        ) -> Tensor:
            x, state = split(x_with_bias[0], hidden_size)
            x = add((x, x_with_bias[1]), residual[..., :hidden_size], prob)
            return x if state is None else join(x, state)

        return add_and_take_state

    return get
