"""Soft MoE in Megatron: adapters of `remoe.soft`, for bidirectional models.

Experts are split over ranks, which exchange slots: with R ranks, b sequences of T tokens on each,
and S slots, a rank sends `2 b S H (R - 1) / R` numbers in forward. The other exchange, of tokens,
would gather and scatter `2 b T H (R - 1)`, so that slots are cheaper where S < R T, and R times as
cheap with as many slots as tokens. Their number is fixed, so that no rank waits for counts.

With sequence parallelism a rank has a part of the tokens. The softmax over tokens is corrected by
the share of the part (`share_of_part`), and the parts' sums are reduced and scattered over the
slots: every rank of the group goes on with the slots of its share of the experts.

Shapes: s tokens of a sequence on this rank, b sequences, H hidden, E experts, S slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.layer import DroplessMoELayer
from remoe.config import SoftRouting
from remoe.soft import (
    mass_of_slots,
    normalize,
    share_of_part,
    slots_of_tokens,
    soft_logits,
    soft_routing,
    tokens_of_slots,
)


class SoftRouter(MegatronModule):
    """Computes the weights with which slots take tokens, and tokens take slots.

    Parameters:
        weight: `[S, H]`, of unit length at first; scale: `[1]`, 1 at first.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        routing: SoftRouting,
        layer_number: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.layer_number = layer_number
        device, dtype = torch.cuda.current_device(), config.params_dtype
        size = (config.num_moe_experts * routing.slots_per_expert, config.hidden_size)
        weight = torch.empty(size, device=device)
        if config.perform_initialization:
            config.init_method(weight)
            weight = normalize(weight, eps=0.0)
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.scale = torch.nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        for parameter in (self.weight, self.scale):
            # Every rank has the gradient of its own tokens, and Megatron sums them.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """Return the sizes that a printed model shows."""
        slots, hidden = self.weight.shape
        return (
            f"Soft MoE, hidden_size={hidden}, num_experts={self.config.num_moe_experts}, "
            f"slots={slots}"
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer, as Megatron's routers have one."""
        self.layer_number = layer_number

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, *newer: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the dispatch and combine weights of the tokens of this rank, both `[b, s, S]`.

        Args:
            input: `[s, b, H]`.
            padding_mask: bool `[s, b]`, True for padding tokens, or None.
            newer: as for `SelectionRouter`.

        Raises:
            ValueError: a mask of another shape.
        """
        logits = soft_logits(input.transpose(0, 1), self.weight, self.scale)
        mask = None if padding_mask is None else padding_mask.transpose(0, 1)
        dispatch, combine = soft_routing(logits, mask)
        if self.tp_group.size() > 1:
            masses = gather_from_sequence_parallel_region(
                mass_of_slots(logits, mask).unsqueeze(0), group=self.tp_group
            )
            dispatch = dispatch * share_of_part(masses, self.tp_group.rank()).unsqueeze(1)
        return dispatch, combine


class SoftMoELayer(DroplessMoELayer):
    """Megatron's MoE layer whose experts work on slots.

    Raises:
        ValueError: a parallel layout that cannot share the slots.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tensor_ranks = self.attn_tp_group.size()
        if tensor_ranks > 1 and not self.config.sequence_parallel:
            raise ValueError(
                "sequence_parallel is false with tensor parallelism: every rank would add all "
                "tokens to the slots; set sequence_parallel"
            )
        # Megatron numbers the ranks of tensor parallelism first.
        ranks = torch.distributed.get_process_group_ranks(self.ep_group)
        self.exchange = Exchange.of(
            self.config.num_moe_experts,
            num_parts=tensor_ranks,
            part_of=[rank % tensor_ranks for rank in ranks],
            rank=self.ep_group.rank(),
            group=self.ep_group,
        )

    def routed_experts_compute(self, hidden_states: Tensor, probs: Any) -> tuple[Tensor, None]:
        """Compute the output, `[s, b, H]`, given the dispatch and combine weights."""
        dispatch, combine = probs
        slots = slots_of_tokens(dispatch, hidden_states.transpose(0, 1)).transpose(0, 1)
        if self.attn_tp_group.size() > 1:
            slots = reduce_scatter_to_sequence_parallel_region(
                slots.contiguous(), group=self.attn_tp_group
            )
        # The rows of an expert are neighbors: its slots, each of all sequences.
        rows = slots.reshape(-1, slots.shape[-1])
        each = len(rows) // sum(self.exchange.sent)
        rows = self.exchange.to_experts(rows, each)
        counts = torch.tensor(self.exchange.counts) * each
        output, _ = self.experts(rows, counts, rows.new_ones(len(rows)))
        output = self.exchange.from_experts(output, each).reshape(slots.shape)
        if self.attn_tp_group.size() > 1:
            output = gather_from_sequence_parallel_region(output, group=self.attn_tp_group)
        tokens = tokens_of_slots(combine, output.transpose(0, 1))
        return tokens.transpose(0, 1).contiguous(), None


@dataclass(frozen=True)
class Exchange:
    """The exchange of slots between the ranks of a group, with sizes that never change.

    A rank starts with the rows of some experts in their order, equally many for each.

    Attributes:
        group: the ranks that share the experts.
        sent: to every rank, the number of experts whose rows it gets from this one.
        received: from every rank, likewise.
        counts: the number of parts, one from a rank, of every expert of this rank.
        order: of the parts as they arrive, those of an expert after those of the one before.
    """

    group: Any
    sent: list[int]
    received: list[int]
    counts: list[int]
    order: list[int]

    @classmethod
    def of(
        cls, num_experts: int, *, num_parts: int, part_of: list[int], rank: int, group: Any
    ) -> "Exchange":
        """Plan the exchange of a rank.

        Args:
            num_experts: E.
            num_parts: the number of parts in which experts are divided before the exchange, which
                is that of tensor-parallel ranks.
            part_of: the part that each rank of the group starts with.
            rank: the rank in the group.
            group: the ranks that share the experts after the exchange.

        Raises:
            ValueError: the experts cannot be divided equally.
        """
        ranks = len(part_of)
        if num_experts % num_parts:
            raise ValueError(
                f"{num_experts} experts cannot be shared by {num_parts} tensor-parallel ranks, "
                f"each of which has the slots of equally many; choose num_experts as a multiple of "
                f"tensor_model_parallel_size"
            )
        share, local = num_experts // num_parts, num_experts // ranks

        def between(source: int, target: int) -> list[int]:
            """Experts, as numbered by the target, whose rows the source has."""
            first, begin = target * local, part_of[source] * share
            both = range(max(first, begin), min(first + local, begin + share))
            return [expert - first for expert in both]

        arriving = [between(source, rank) for source in range(ranks)]
        experts = [expert for one in arriving for expert in one]
        return cls(
            group=group,
            sent=[len(between(rank, target)) for target in range(ranks)],
            received=[len(one) for one in arriving],
            counts=[experts.count(expert) for expert in range(local)],
            order=sorted(range(len(experts)), key=lambda part: experts[part]),
        )

    def to_experts(self, rows: Tensor, each: int) -> Tensor:
        """Return the rows of the experts of this rank, in their order.

        Args:
            rows: those that this rank starts with.
            each: how many of them an expert has.
        """
        return self._reorder(self._send(rows, each, self.sent, self.received), self.order)

    def from_experts(self, rows: Tensor, each: int) -> Tensor:
        """Return what became of the rows that this rank gave to `to_experts`."""
        back = sorted(range(len(self.order)), key=lambda part: self.order[part])
        return self._send(self._reorder(rows, back), each, self.received, self.sent)

    def _send(self, rows: Tensor, each: int, sent: list[int], received: list[int]) -> Tensor:
        if self.group.size() == 1:
            return rows
        sizes = [[each * count for count in counts] for counts in (received, sent)]
        moved: Tensor = all_to_all(self.group, rows, *sizes)
        return moved

    def _reorder(self, rows: Tensor, order: list[int]) -> Tensor:
        if order == sorted(order):
            return rows
        parts = rows.chunk(len(order))
        return torch.cat([parts[part] for part in order])  # without a copy of the order to a device
