"""When the experts of a layer run chunk by chunk, and how Megatron's modules compute a chunk.

Shapes: T local tokens, H hidden, E experts, L local experts, of each of which a rank of the
expert-parallel group has its own; n tokens of a chunk.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.remoe.moe.experts import GroupedExperts
from remoe.kernels.chunks import Chunk, Limits, plan_chunks


@dataclass
class AssignmentBudget:
    """How many assignments the layers of a model chunk may keep for backward together.

    Layers use experts unevenly, also when routing is sparse, and memory is that of their sum: a
    layer is computed at once while the layers up to it fit, and the rest are chunked. What a layer
    does depends on the present forward only, so that a resumed run does the same.

    Attributes:
        num_layers: how many layers keep their activations at the same time.
        max_assignments: of a rank and a layer, mean over layers; None is topk per token.
    """

    num_layers: int
    max_assignments: int | None = None
    _held: float = field(default=0.0, init=False)
    _last_layer: int = field(default=0, init=False)

    @classmethod
    def of(
        cls, config: TransformerConfig, num_layers: int, max_assignments: int | None
    ) -> "AssignmentBudget":
        """The budget of a model chunk with so many layers of experts."""
        if config.recompute_granularity == "full":
            again = config.recompute_num_layers or 1
            held = again if config.recompute_method == "uniform" else num_layers - again
            num_layers = max(1, min(held, num_layers))
        elif "moe" in (config.recompute_modules or ()):
            num_layers = 1
        return cls(num_layers, max_assignments)

    def rows_of_a_chunk(self, layer: int, rows: float, balanced: float) -> float | None:
        """The most rows of a chunk; None where the layer is computed at once.

        Args:
            layer: its number; numbers grow within a forward.
            rows: assignments that the fullest rank would hold.
            balanced: those of a rank at topk per token.
        """
        limits = Limits.of(balanced, self.max_assignments)
        fits = rows <= limits.at_once
        if not torch.is_grad_enabled():  # nothing is kept
            return None if fits else limits.chunk
        if layer <= self._last_layer:  # another forward
            self._held = 0.0
        self._last_layer = layer
        # A dense layer leaves room for a chunk of those that follow.
        room = 0.0 if fits else limits.share
        if self._held + rows <= self.num_layers * limits.at_once - room:
            self._held += rows
            return None
        return limits.chunk


def plan(
    counts: Tensor, num_local_experts: int, rows_of_a_chunk: Callable[[float], float | None]
) -> list[Chunk]:
    """The chunks of a layer, the same on every rank that has the same counts; [] for all at once.

    The rows of a rank are what it sends and what it receives, whichever is more.

    Args:
        counts: tokens of every rank for every expert, `[ep, expert tp, E]`, on the host.
        num_local_experts: L.
        rows_of_a_chunk: the limit of `AssignmentBudget`, given the rows of the fullest rank.
    """
    ep, tp, _ = counts.shape
    by_owner = counts.view(ep, tp, ep, num_local_experts)
    sent = by_owner.sum(dim=2).flatten(end_dim=1)
    received = by_owner.sum(dim=(0, 1)) / tp  # over tensor parallelism every rank gets all rows
    fullest = max(sent.sum(dim=1).tolist() + received.sum(dim=1).tolist())
    limit = rows_of_a_chunk(fullest)
    if limit is None:
        return []
    rows = torch.maximum(sent.amax(dim=0), received.amax(dim=0).ceil().long())
    return plan_chunks(rows.tolist(), limit)


def can_chunk(experts: torch.nn.Module, config: TransformerConfig) -> bool:
    """Whether these experts can be computed in parts.

    Transformer Engine's cannot be split, and Megatron's fused accumulation of gradients would look
    for buffers that a part of the weights does not have.
    """
    if isinstance(experts, GroupedExperts):
        return True
    return isinstance(experts, SequentialMLP) and not config.gradient_accumulation_fusion


def wait_for_parameters(module: torch.nn.Module) -> None:
    """Run the hooks by which Megatron's DDP waits for gathered parameters.

    Chunks use views of the parameters, in which the hooks would not recognise them.
    """
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            hook(part, ())


class ChunkOfLayer:
    """Dispatch, experts and combine of a chunk; a `remoe.kernels.chunks.ChunkOfExperts`.

    Args:
        experts: of this rank.
        routing_map: bool `[T, E]`.
        dispatcher: makes a token dispatcher for a number of local experts.
        ep: size of the expert-parallel group.
    """

    def __init__(
        self,
        experts: GroupedExperts | SequentialMLP,
        routing_map: Tensor,
        dispatcher: Callable[[int], MoETokenDispatcher],
        ep: int,
    ) -> None:
        self.experts, self.routing_map, self.dispatcher = experts, routing_map, dispatcher
        self.ep = ep

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        if isinstance(self.experts, GroupedExperts):
            return [tensor[chunk.experts] for tensor in tensors]
        each = len(tensors) // self.experts.num_local_experts
        return list(tensors[chunk.experts.start * each : chunk.experts.stop * each])

    def compute(
        self,
        chunk: Chunk,
        x: Tensor,
        probs: Tensor,
        weights: list[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """`[n, H]` and `[n, E]` to `[n, H]`."""
        routing_map = self.routing_map[chunk.tokens(len(self.routing_map))]
        dispatcher = self.dispatcher(chunk.experts.stop - chunk.experts.start)
        rows, prob = dispatcher.dispatch_preprocess(
            x.unsqueeze(1), self._columns(chunk, routing_map), self._columns(chunk, probs)
        )
        rows, prob = dispatcher.token_dispatch(rows, prob)
        rows, counts, prob = dispatcher.dispatch_postprocess(rows, prob)
        if isinstance(self.experts, GroupedExperts):
            rows = self.experts.compute(
                rows, counts, prob, weights, only_for_backward=only_for_backward
            )
        else:
            rows = self._compute_modules(chunk, weights, rows, counts, prob)
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        output: Tensor = dispatcher.combine_postprocess(rows).squeeze(1)
        return output

    def _columns(self, chunk: Chunk, values: Tensor) -> Tensor:
        """Those of the chunk's experts on every rank."""
        by_owner = values.view(len(values), self.ep, -1)
        return by_owner[:, :, chunk.experts].flatten(start_dim=1)

    def _compute_modules(
        self, chunk: Chunk, weights: list[Tensor], rows: Tensor, counts: Tensor, prob: Tensor
    ) -> Tensor:
        part = copy.copy(self.experts)  # a module of the same experts, but fewer
        modules = torch.nn.ModuleList(self.experts.local_experts[chunk.experts])
        part._modules = {"local_experts": modules}
        part.num_local_experts = len(modules)
        names = [name for name, _ in part.named_parameters()]
        output: Tensor
        output, _ = torch.func.functional_call(
            part, dict(zip(names, weights, strict=True)), (rows, counts, prob)
        )
        return output
