"""The experts of a rank: our grouped ones, and how they and Megatron's are computed in parts.

Grouped experts need no compiled extras: `--moe-grouped-gemm` for `--transformer-impl local`.

Shapes, as in `remoe.kernels`: A assignments to the experts of this rank, H hidden, E local experts,
F expert width on this rank.
"""

import copy
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
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from megatron.remoe.moe.gradients import in_order, main_grads, mark_gradients
from remoe.kernels import Chunk, grouped_swiglu


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
        # As in Megatron's linears: True reduces gradients over the dense parameters' group.
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
        """Compute all experts: rows `[A, H]` sorted by expert, counts `[E]`, probs `[A]`."""
        weights = (self.linear_fc1, self.linear_fc2)
        buffers = main_grads(weights, same_dtype=True)
        fc1, fc2 = in_order(weights)
        output = grouped_swiglu(
            permuted_local_hidden_states,
            permuted_probs.to(permuted_local_hidden_states.dtype),
            fc1,
            fc2,
            tokens_per_expert.tolist(),
            main_grads=None if buffers is None else (buffers[0], buffers[1]),
        )
        return mark_gradients(output, weights, added=buffers is not None), None

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the chunk's part of the weights, or of tensors of the same shapes."""
        return [tensor[chunk.experts] for tensor in tensors]

    def compute_part(
        self,
        chunk: Chunk,
        rows: Tensor,
        counts: Tensor,
        probs: Tensor,
        weights: Sequence[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """Compute the chunk's experts with weights that the caller passes.

        Args:
            chunk: consecutive local experts.
            rows: `[A, H]`, sorted by expert.
            counts: tokens of the chunk's experts, on the host.
            probs: `[A]`.
            weights: as `weights_of` returns them.
            only_for_backward: the values of the result may be anything.
        """
        fc1, fc2 = weights
        return grouped_swiglu(
            rows,
            probs.to(rows.dtype),
            fc1,
            fc2,
            counts.tolist(),
            only_for_backward=only_for_backward,
        )

    def get_extra_state(self) -> None:
        """Return nothing; other experts have an entry per linear, for Transformer Engine's fp8."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what others may have saved there."""

    def backward_dw(self) -> None:
        """Do nothing, because backward has computed the gradients of the weights."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return keys, shapes and axes of SequentialMLP, with the local experts in one shard."""
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
            # Tensor parallelism splits each of them, so they are not one range of the whole.
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


class SequentialParts:
    """Megatron's SequentialMLP, whose parts are computed as those of `GroupedExperts`."""

    def __init__(self, experts: SequentialMLP) -> None:
        self.experts = experts

    def weights_of(self, chunk: Chunk, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the chunk's experts; every expert has equally many."""
        each = len(tensors) // self.experts.num_local_experts
        return list(tensors[chunk.experts.start * each : chunk.experts.stop * each])

    def compute_part(
        self,
        chunk: Chunk,
        rows: Tensor,
        counts: Tensor,
        probs: Tensor,
        weights: Sequence[Tensor],
        only_for_backward: bool,
    ) -> Tensor:
        """Compute the chunk's experts; there is nothing to leave out for backward."""
        part = copy.copy(self.experts)  # the same module with fewer experts
        modules = torch.nn.ModuleList(self.experts.local_experts[chunk.experts])
        part._modules = {"local_experts": modules}
        part.num_local_experts = len(modules)
        names = [name for name, _ in part.named_parameters()]
        output: Tensor
        output, _ = torch.func.functional_call(
            part, dict(zip(names, weights, strict=True)), (rows, counts, probs)
        )
        return output


PartialExperts = GroupedExperts | SequentialParts


def in_parts(experts: torch.nn.Module, config: TransformerConfig) -> PartialExperts | None:
    """Return these experts as `PartialExperts`; None if they cannot be computed in parts.

    Transformer Engine's experts cannot be split. Megatron's fused accumulation of gradients would
    look for buffers that a part of the weights does not have.
    """
    if isinstance(experts, GroupedExperts):
        return experts
    if isinstance(experts, SequentialMLP) and not config.gradient_accumulation_fusion:
        return SequentialParts(experts)
    return None
