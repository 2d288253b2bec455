"""Grouped experts without compiled extras: `--moe-grouped-gemm` for `--transformer-impl local`.

Shapes, as in `remoe.kernels`: A assignments to the experts of this rank, H hidden, E local experts,
F expert width on this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from remoe.kernels import grouped_swiglu


class GroupedExperts(MegatronModule):
    """SwiGLU experts with stacked weights, in place of Megatron's SequentialMLP.

    Initial weights, parallel layout and checkpoint (keys, shapes, axes) are those of SequentialMLP,
    which Transformer Engine's grouped experts share.

    Parameters:
        linear_fc1: `[E, 2F, H]`, gate first; linear_fc2: `[E, H, F]`.

    Raises:
        ValueError: experts that are not SwiGLU without bias.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        _check(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        hidden = config.hidden_size
        self.linear_fc1 = self._weight(2 * width, hidden, partition_dim=1, stride=2)
        self.linear_fc2 = self._weight(hidden, width, partition_dim=2, stride=1)
        if config.perform_initialization:
            self._initialize()

    def _weight(
        self, rows: int, columns: int, *, partition_dim: int, stride: int
    ) -> torch.nn.Parameter:
        config, device = self.config, torch.cuda.current_device()
        size = (self.num_local_experts, rows, columns)
        weight = torch.nn.Parameter(torch.empty(size, device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(
            weight, is_parallel=True, dim=partition_dim, stride=stride
        )
        # As Megatron's linears: True means that gradients are those of the dense parameters' group.
        weight.allreduce = not (  # type: ignore[attr-defined]
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        return weight

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw the numbers that SequentialMLP draws, in its order."""
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for fc1, fc2 in zip(self.linear_fc1, self.linear_fc2, strict=True):
                self.config.init_method(fc1)
                self.config.output_layer_init_method(fc2)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Rows `[A, H]` sorted by expert, counts `[E]` on the host, probs `[A]`: to `[A, H]`."""
        weights = (self.linear_fc1, self.linear_fc2)
        buffers = main_grads(weights, same_dtype=True)
        rows = permuted_local_hidden_states
        output = self.compute(rows, tokens_per_expert, permuted_probs, in_order(weights), buffers)
        return mark_gradients(output, weights, added=buffers is not None), None

    @staticmethod
    def compute(
        rows: Tensor,
        tokens_per_expert: Tensor,
        probs: Tensor,
        weights: Sequence[Tensor],
        buffers: Sequence[Tensor] | None = None,
        *,
        only_for_backward: bool = False,
    ) -> Tensor:
        """Forward with other weights, `[e, 2F, H]` and `[e, H, F]`: those of some experts."""
        return grouped_swiglu(
            rows,
            probs.to(rows.dtype),
            weights[0],
            weights[1],
            tokens_per_expert.tolist(),
            main_grads=None if buffers is None else (buffers[0], buffers[1]),
            only_for_backward=only_for_backward,
        )

    def get_extra_state(self) -> None:
        """Nothing; other experts have an entry per linear, for Transformer Engine's fp8."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what others may have saved there."""

    def backward_dw(self) -> None:
        """Nothing is left: weight gradients are computed in backward."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Keys, shapes and axes of SequentialMLP, the local experts in one shard."""
        layers, replica = len(sharded_offsets), (0, 0, self.dp_group.rank())
        experts = (layers, self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def shard(
            key: str, weight: Tensor, axis: int, rank: int, size: int, replica: ReplicaId
        ) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                weight,
                *sharded_offsets,
                experts,
                (layers + axis, rank, size),
                replica_id=replica,
                prepend_axis_num=layers,
            )

        def gate_and_up(
            key: str, weight: Tensor, replica: ReplicaId, flattened_range: Any
        ) -> list[ShardedTensor]:
            """Tensor parallelism splits each of them, so they are not one range of the whole."""
            gate, up = weight.chunk(2, dim=1)
            return [
                shard(key, gate, 1, tp_rank, 2 * tp_size, replica),
                shard(key, up, 1, tp_size + tp_rank, 2 * tp_size, replica),
            ]

        first = self.ep_group.rank() * self.num_local_experts
        num_experts = self.ep_group.size() * self.num_local_experts
        extra_states = [
            make_sharded_object_for_checkpoint(
                None,
                f"{prefix}experts.{linear}._extra_state",
                (*sharded_offsets, (layers, first + i, num_experts)),
                (0, tp_rank, self.dp_group.rank()),
            )
            for linear in ("linear_fc1", "linear_fc2")
            for i in range(self.num_local_experts)
        ]
        fc1 = f"{prefix}experts.linear_fc1.weight"
        fc2 = f"{prefix}experts.linear_fc2.weight"
        return {
            f"{prefix}_extra_state": extra_states,
            f"{prefix}linear_fc1": ShardedTensorFactory(
                fc1, self.linear_fc1, gate_and_up, lambda parts: torch.cat(parts, dim=1), replica
            ),
            f"{prefix}linear_fc2": shard(fc2, self.linear_fc2, 2, tp_rank, tp_size, replica),
        }


def _check(config: TransformerConfig) -> None:
    swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    refused = {
        "add_bias_linear": config.add_bias_linear,
        "activation other than SwiGLU": not swiglu,
        "activation_func_clamp_value": config.activation_func_clamp_value is not None,
        "glu_linear_offset": config.glu_linear_offset != 0,
        "use_cpu_initialization": config.use_cpu_initialization,
        "fp8": config.fp8 is not None,
        "fp4": config.fp4 is not None,
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_latent_size": config.moe_latent_size is not None,
    }
    for name, found in refused.items():
        if found:
            raise ValueError(
                f"moe_grouped_gemm with transformer_impl local has SwiGLU experts without bias, "
                f"and does not know {name}; use moe_grouped_gemm=false or transformer_engine"
            )


def main_grads(
    weights: Sequence[torch.nn.Parameter], *, same_dtype: bool = False
) -> list[Tensor] | None:
    """Buffers of Megatron's DDP that backward may add to, which saves a copy of all gradients.

    Args:
        weights: all of them need a buffer.
        same_dtype: only buffers of the weights' dtype will do.
    """
    if not torch.is_grad_enabled():
        return None
    buffers = []
    for weight in weights:
        buffer = getattr(weight, "main_grad", None)
        if buffer is None or not weight.requires_grad:
            return None
        if same_dtype and buffer.dtype != weight.dtype:
            return None
        buffers.append(buffer)
    return buffers


def in_order(weights: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Views of the weights, whose gradients autograd delivers one by one, the last weight's first.

    With overlapped reduction Megatron's DDP reduces a bucket as soon as its gradients are there,
    and data-parallel ranks pair their buckets by that order alone. Ranks decide for themselves
    whether a layer is chunked, so both ways must deliver gradients in one order: that of Megatron's
    sequential experts. The gradients that one autograd function returns for several parameters
    arrive in no order that could be relied on; nodes of views run in reverse order of creation.
    """
    return [weight.view_as(weight) for weight in weights]


def mark_gradients(output: Tensor, weights: Sequence[torch.nn.Parameter], *, added: bool) -> Tensor:
    """The output, whose backward tells Megatron's DDP how the weights' gradients come.

    That is told in backward and not before, because micro-batches differ: with pipeline stages the
    forward of a later one, chunked or not, comes before the backward of an earlier one.

    Args:
        output: of a computation with the weights.
        weights: parameters of Megatron's DDP.
        added: whether backward adds to their main gradients itself (`main_grads`).
    """
    marked: Tensor = _MarkGradients.apply(output, weights, added)  # type: ignore[no-untyped-call]
    return marked


class _MarkGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, weights: Sequence[torch.nn.Parameter], added: bool
    ) -> Tensor:
        ctx.weights, ctx.added = weights, added
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = ctx.added
        return grad, None, None
