"""A ReMoE layer for any torch model, each replica of which is on one device.

    layer = ReMoELayer(ReMoELayerConfig(hidden_size=256, ffn_hidden_size=1024))
    loss = loss_fn(layer(x)) + l1_penalty(layer)   # l1_penalty takes any model with such layers
    loss.backward(); optimizer.step(); update_l1_coeff(layer)

Recurrent layers hand a state on, `[..., p]`, and share the cell of the first of them:

    first = ReMoELayer(config)   # with recurrence="gru"
    second = ReMoELayer(config, cell=first.recurrent_cell)
    y, state = first(x)
    z, state = second(y, state)

Shapes: T tokens, H hidden, E experts, F expert width, A active (token, expert) pairs, p state.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812

from remoe.buffers import ExactBuffers
from remoe.config import ReMoELayerConfig
from remoe.controller import move_l1_coeff, register_l1_coeff
from remoe.kernels import (
    Chunk,
    Permutation,
    counts_of_chunks,
    fuses,
    plan_chunks,
    relu_router,
    routed_swiglu,
    run_chunks,
)
from remoe.recurrent import RecurrentCell, passed_on
from remoe.regularization import load_weights, penalty, router_regularization, sum_over_tokens
from remoe.routing import bounded_routing, relu_routing, tokens_per_expert
from remoe.statistics import TokenCounts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReMoELayer(ExactBuffers):
    """Mixture of SwiGLU experts behind a ReLU router, in place of a transformer's MLP.

    After a training forward, `l1_reg` holds the layer's regularizer (0-d, differentiable); use
    `l1_penalty` and `update_l1_coeff` on the whole model. Counts accumulate over the forwards
    between two updates, so gradient accumulation needs nothing special, and `update_l1_coeff` adds
    up those of all ranks.

    With `config.recurrence` the router reads a state instead of the tokens (`remoe.recurrent`). All
    layers of a model share one cell. The layer that made it has it as a module, so that it is
    trained and saved once; the others only refer to it.

    Weights:
        router: `[E, H]`, or `[E, p]` with recurrence; gate_up: `[E, 2F, H]` (gate first); down:
            `[E, H, F]`; projection: `[p, H]`, with recurrence and unless all layers share one.

    Args:
        config: sizes and settings.
        cell: the cell of another layer, for recurrence; None makes one.
        device, dtype: of the parameters. A cell is fp32 whatever the dtype is.

    Raises:
        ValueError: the cell is not that of the config, or the config has no recurrence.
    """

    l1_coeff: Tensor
    load: Tensor | None
    projection: nn.Parameter | None

    def __init__(
        self,
        config: ReMoELayerConfig,
        *,
        cell: RecurrentCell | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if cell is not None:
            _check_cell(cell, config)
        shape, hidden = config.experts, config.hidden_size
        self._topk = shape.topk

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))

        width = config.recurrent_size if config.is_recurrent else hidden
        self.router = weight(shape.num_experts, width)
        own_projection = config.is_recurrent and config.recurrent_projection == "layer"
        self.register_parameter("projection", weight(width, hidden) if own_projection else None)
        self.gate_up = weight(shape.num_experts, 2 * shape.ffn_hidden_size, hidden)
        self.down = weight(shape.num_experts, hidden, shape.ffn_hidden_size)
        register_l1_coeff(self, config.controller, device)
        weighs = config.load_balancing == "global_batch"
        load = torch.ones(shape.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("load", load if weighs else None)
        # `TokenCounts` since the last update of the coefficient. It is no buffer, because DDP would
        # replace it with that of the first rank at every forward.
        self.counts: Tensor | None = None
        self.l1_reg: Tensor | None = None
        self.reset_parameters()
        self._cell = (cell,)  # not a module of this layer
        if config.recurrence != "none" and cell is None:
            self.cell = RecurrentCell(
                config.recurrence,
                config.recurrent_size,
                hidden_size=None if own_projection else hidden,
                init_std=config.recurrent_init_std,
                device=device,
            )
            self._cell = (self.cell,)

    @property
    def recurrent_cell(self) -> RecurrentCell:
        """The cell, for the other layers of the model.

        Raises:
            ValueError: the layer has none.
        """
        (cell,) = self._cell
        if cell is None:
            raise ValueError("the layer has no cell; set recurrence in its config to gru or rnn")
        return cell

    def reset_parameters(self) -> None:
        """Draw the layer's own weights, and let its coefficient, loads and counts start again.

        Weights have a normal distribution with mean zero, whose standard deviation is `init_std`,
        or `recurrent_init_std` for a recurrent router. A layer that was made on the meta device
        has neither weights nor state before.
        """
        config = self.config
        router_std = config.recurrent_init_std if config.is_recurrent else config.init_std
        for name, parameter in self.named_parameters(recurse=False):
            is_router = name in ("router", "projection")
            nn.init.normal_(parameter, std=router_std if is_router else config.init_std)
        with torch.no_grad():
            self.l1_coeff.fill_(config.controller.l1_coeff_init)
            self.counts = None
            if self.load is not None:
                self.load.fill_(1)

    @overload
    def forward(self, hidden_states: Tensor) -> Tensor: ...

    @overload
    def forward(self, hidden_states: Tensor, state: Tensor | None) -> Any: ...

    def forward(self, hidden_states: Tensor, state: Tensor | None = None) -> Any:
        """Sum the outputs of every token's active experts, weighted by their gates, `[..., H]`.

        Args:
            hidden_states: `[..., H]`.
            state: with recurrence, that of the layer before, `[..., p]`; None before the first one.

        Returns:
            The sums; with recurrence also the state to hand on, fp32 `[..., p]`.

        Raises:
            ValueError: the state is not of these tokens, or the layer has no recurrence.
        """
        if state is not None:
            _check_state(state, hidden_states, self.config)
        x_TH = hidden_states.reshape(-1, self.config.hidden_size)
        if not self.config.is_recurrent:
            return self._experts(x_TH, x_TH).view_as(hidden_states)
        if state is not None:
            state = state.reshape(-1, self.config.recurrent_size)
            state = passed_on(state, self.config.recurrent_passing)
        with _without_autocast(x_TH):
            state_Tp = self.recurrent_cell(x_TH, state, self.projection)
        y_TH = self._experts(x_TH, state_Tp)
        state_shape = (*hidden_states.shape[:-1], self.config.recurrent_size)
        return y_TH.view_as(hidden_states), state_Tp.view(state_shape)

    def _experts(self, x_TH: Tensor, routed_by: Tensor) -> Tensor:
        """Compute the layer, `[T, H]`; the router reads `routed_by`, `[T, H]` or `[T, p]`."""
        router_dtype = torch.promote_types(x_TH.dtype, torch.float32)
        with _without_autocast(x_TH):
            logits_TE = F.linear(routed_by.to(router_dtype), self.router.to(router_dtype))
        probs_TE, routing_map_TE, counts_E = self._route(logits_TE, x_TH.dtype)
        balanced = self._topk * max(1, len(x_TH))
        limit = self.config.max_assignments
        return routed_experts(
            x_TH,
            probs_TE.to(x_TH.dtype),
            routing_map_TE,
            self.gate_up,
            self.down,
            tokens_per_expert_E=counts_E,
            max_assignments=limit or 2 * balanced,
            max_rows_per_chunk=limit or max(1, balanced // 3),
        )

    def _route(self, logits_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return gates and map, both `[T, E]`, and tokens per expert if they are counted already.

        The gates have any dtype from which `dtype` rounds.
        """
        observes = self.training and torch.is_grad_enabled()
        most, at_least_one = self.config.max_active_experts, self.config.at_least_one_expert
        is_bounded = most is not None or at_least_one
        if not is_bounded and fuses(logits_TE):
            routed = relu_router(logits_TE, dtype=dtype)
            if observes:
                self._observe(routed.sum_E, routed.counts, len(logits_TE))
            return routed.probs_TE, routed.routing_map_TE, routed.counts.per_expert
        probs_TE, routing_map_TE = relu_routing(logits_TE)
        counts_E = None
        if observes:
            counts = TokenCounts.of(routing_map_TE)
            self._observe(sum_over_tokens(probs_TE), counts, len(logits_TE))
            counts_E = counts.per_expert
        if not is_bounded:
            return probs_TE, routing_map_TE, counts_E
        bounded = bounded_routing(
            logits_TE,
            probs_TE,
            max_active=None if most is None else most * self.config.granularity,
            at_least_one=at_least_one,
        )
        return *bounded, None

    def extra_repr(self) -> str:
        """Return the sizes that a printed model shows."""
        config = self.config
        sizes = f"hidden_size={config.hidden_size}, ffn_hidden_size={config.ffn_hidden_size}"
        experts = f"num_experts={config.num_experts}, topk={config.topk}"
        router = "relu" if config.recurrence == "none" else f"relu, recurrence={config.recurrence}"
        return f"{sizes}, {experts}, granularity={config.granularity}, router={router}"

    def _observe(self, sum_E: Tensor, counts: TokenCounts, num_tokens: int) -> None:
        """Take in the sums of every expert's gates, and the counts, of a micro-batch."""
        self.l1_reg = router_regularization(
            sum_E,
            tokens_per_expert_E=counts.per_expert,
            # The host knows it too. A GPU would launch a kernel for each operation with it.
            num_tokens=torch.tensor(num_tokens, device="cpu"),
            topk=self._topk,
            load_balancing=self.config.load_balancing,
            last_load_E=self.load,
        )
        self.counts = counts.flat if self.counts is None else self.counts + counts.flat


def _without_autocast(x: Tensor) -> torch.autocast:
    """Return the context of a router: a cast to fp32 is not enough where autocast casts it back."""
    return torch.autocast(x.device.type, enabled=False)


def _check_cell(cell: RecurrentCell, config: ReMoELayerConfig) -> None:
    found = {
        "recurrence": cell.cell,
        "recurrent_size": cell.size,
        "recurrent_projection": "layer" if cell.projection is None else "shared",
    }
    for name, value in found.items():
        if value != getattr(config, name):
            raise ValueError(
                f"the cell has {name} {value}, and the layer's config has {getattr(config, name)}; "
                f"give all layers of a model the same config"
            )


def _check_state(state: Tensor, hidden_states: Tensor, config: ReMoELayerConfig) -> None:
    if not config.is_recurrent:
        raise ValueError(
            "a state is given to a layer without recurrence; set recurrence in its config to gru "
            "or rnn, or leave the state out"
        )
    expected = (*hidden_states.shape[:-1], config.recurrent_size)
    if state.shape != expected:
        raise ValueError(
            f"the state has the shape {tuple(state.shape)}, and that of these tokens has "
            f"{expected}; pass what the layer before returned for the same tokens"
        )


def routed_experts(
    x_TH: Tensor,
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tokens_per_expert_E: Tensor | None = None,
    max_assignments: int | None = None,
    max_rows_per_chunk: int | None = None,
) -> Tensor:
    """Compute `y_t = sum_e p_te FFN_e(x_t)` over the active pairs (Eq. 1) of any router, `[T, H]`.

    This copies once to the host: the token counts, which size the experts' inputs; and a second
    time if there are chunks of some tokens.

    Args:
        x_TH: tokens.
        probs_TE: routing weights, in the dtype of `x_TH`.
        routing_map_TE: bool, the active pairs.
        gate_up: `[E, 2F, H]`, gate first.
        down: `[E, H, F]`.
        tokens_per_expert_E: the map's counts, int64 `[E]`; None is to count them.
        max_assignments: with more active pairs than this, experts run chunk by chunk, and again in
            backward; None is no limit.
        max_rows_per_chunk: largest number of pairs in a chunk; None is `max_assignments`.
    """
    if tokens_per_expert_E is None:
        tokens_per_expert_E = tokens_per_expert(routing_map_TE)
    counts_E = tokens_per_expert_E.cpu()
    counts = counts_E.tolist()
    if max_assignments is None or sum(counts) <= max_assignments:
        return _experts_at_once(x_TH, probs_TE, routing_map_TE, gate_up, down, counts)
    chunks = plan_chunks(counts, max_rows_per_chunk or max_assignments)

    def count(split: list[Chunk]) -> Tensor:
        parts = (routing_map_TE[c.tokens(len(x_TH)), c.experts] for c in split)
        return torch.cat([tokens_per_expert(part) for part in parts]).cpu()

    experts = _ChunkedSwiGLU(routing_map_TE, counts_of_chunks(chunks, counts_E, count))
    return run_chunks(experts, chunks, x_TH, probs_TE, (gate_up, down))


def _experts_at_once(
    x_TH: Tensor,
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    gate_up: Tensor,
    down: Tensor,
    counts: list[int],
    only_for_backward: bool = False,
) -> Tensor:
    permutation = Permutation.of(routing_map_TE, sum(counts))
    tensors = (x_TH, probs_TE, gate_up, down)
    return routed_swiglu(*tensors, permutation, counts, only_for_backward=only_for_backward)


class _ChunkedSwiGLU:
    """Stacked SwiGLU experts on one device, as a `ChunkOfExperts`."""

    def __init__(self, routing_map_TE: Tensor, counts: dict[Chunk, Tensor]) -> None:
        self.routing_map_TE, self.counts = routing_map_TE, counts

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor[chunk.experts] for tensor in tensors]

    def compute(
        self,
        chunk: Chunk,
        x_TH: Tensor,
        probs_TE: Tensor,
        weights: list[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        rows = chunk.tokens(len(self.routing_map_TE))
        routing_map = self.routing_map_TE[rows, chunk.experts]
        counts = self.counts[chunk].tolist()
        probs = probs_TE[:, chunk.experts]
        gate_up, down = weights
        return _experts_at_once(x_TH, probs, routing_map, gate_up, down, counts, only_for_backward)


def remoe_layers(model: nn.Module) -> list[ReMoELayer]:
    """Return the model's ReMoE layers.

    Raises:
        ValueError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, ReMoELayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} contains no ReMoELayer")
    return layers


def l1_penalty(model: nn.Module) -> Tensor:
    """Return `lambda * L_reg` of the last forward, summed over layers, to add to the loss (Eq. 6).

    Raises:
        ValueError: a layer has not run forward in training mode since the last call.
    """
    penalties = []
    for layer in remoe_layers(model):
        if layer.l1_reg is None:
            raise ValueError(
                "l1_penalty needs a forward pass in training mode with gradients enabled before it"
            )
        penalties.append(penalty(layer.l1_coeff, layer.l1_reg))
        layer.l1_reg = None
    return torch.stack(penalties).sum()


@torch.no_grad()
def update_l1_coeff(
    model: nn.Module, *, group: "ProcessGroup | Literal['rank'] | None" = None
) -> Tensor:
    """Move all layers' coefficients by their mean sparsity (Eq. 7, 8), once per optimizer step.

    The mean is taken over the layers that have seen tokens since the last update. If none has, the
    coefficients stay as they are. A layer with `l1_coeff_per_layer` takes its own sparsity, and one
    whose `load_balancing` is "global_batch" the load of these tokens.

    Where `torch.distributed` is initialized, the counts of all ranks are added up first, so that a
    rank with more tokens weighs more and all ranks move alike. Every rank of the group must then
    call this, also one that has seen no tokens.

    Args:
        model: a model with ReMoE layers, also one that DDP or FSDP2 has wrapped.
        group: the ranks that train the same layers on different tokens. None is all ranks; with
            pipeline parallelism it must be the data-parallel group. "rank" is this rank alone, for
            a model that no other rank trains.

    Returns:
        The sparsity of every layer since the last update, `[L]`; NaN for a layer without tokens.

    Raises:
        ValueError: the model has no ReMoE layer, or this rank is not in the group.
    """
    layers = remoe_layers(model)
    counts = TokenCounts(_summed(torch.stack([_counts_of(layer) for layer in layers]), group))
    sparsity_L = counts.sparsity
    mean = sparsity_L.nanmean()
    for index, layer in enumerate(layers):
        own = sparsity_L[index]
        decides = own if layer.config.l1_coeff_per_layer else mean
        move_l1_coeff([layer.l1_coeff], decides, layer.config.controller)
        if layer.load is not None:
            topk, seen = layer.config.experts.topk, counts.num_tokens[index]
            load_E = load_weights(counts.per_expert[index], num_tokens=seen, topk=topk)
            layer.load.copy_(torch.where(own.isnan(), layer.load, load_E))
        layer.counts = None
    return sparsity_L


def _counts_of(layer: ReMoELayer) -> Tensor:
    """Return the layer's `TokenCounts` since the last update, fp64 `[1 + E]`."""
    if layer.counts is None:
        size = 1 + layer.config.experts.num_experts
        return torch.zeros(size, dtype=torch.float64, device=layer.l1_coeff.device)
    return layer.counts.double()


def _summed(counts: Tensor, group: "ProcessGroup | Literal['rank'] | None") -> Tensor:
    """Return the sum of the counts over the ranks of a group; see `update_l1_coeff`."""
    if group == "rank" or not (dist.is_available() and dist.is_initialized()):
        return counts
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group of update_l1_coeff, whose ranks would "
            f"move without it; give a group that this rank is in"
        )
    dist.all_reduce(counts, group=group)
    return counts
