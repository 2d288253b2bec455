"""The cell of recurrent routers, whose weights are those of one module on all pipeline stages.

Every model chunk with experts has a copy of the cell. The copies start equal, get the sum of all
copies' gradients, and are saved once, as Megatron does with tied embeddings.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config, make_sharded_tensor_for_checkpoint, unwrap_model
from torch import Tensor

from megatron.remoe.moe.recurrent import Recurrent, columns
from remoe.config import AnyRouting, Routing
from remoe.recurrent import RecurrentCell


class SharedCell(RecurrentCell):
    """A cell, as a module of Megatron's transformer block.

    Attributes:
        copy: how many copies are on earlier model chunks; `SharedCells` sets it.
    """

    def __init__(self, config: TransformerConfig, routing: Routing) -> None:
        assert routing.recurrence != "none"
        super().__init__(
            routing.recurrence,
            routing.recurrent_size,
            hidden_size=config.hidden_size if routing.recurrent_projection == "shared" else None,
            init_std=routing.recurrent_init_std,
            device=torch.cuda.current_device(),
        )
        self.copy = 0
        for parameter in self.parameters():
            # Ranks of sequence parallelism see their own part of the tokens.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the weights for a distributed checkpoint, where the first copy is saved."""
        tensor = parallel_state.get_tensor_model_parallel_rank()
        data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(
                parameter,
                f"{prefix}{name}",
                prepend_offsets=sharded_offsets,
                replica_id=(self.copy, tensor, data),
            )
            for name, parameter in self.named_parameters()
        }


class PipelineConfig:
    """A model's config as the schedules see it, with the width of what pipeline stages send.

    Megatron computes the shape from `hidden_size`. Its `variable_seq_lengths` would send the shape
    first, which waits for the device at every message, and never ends with two interleaved stages.
    """

    hidden_size: int

    def __init__(self, config: TransformerConfig, width: int) -> None:
        vars(self).update(config=config, hidden_size=width)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the config."""
        return getattr(vars(self)["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the config."""
        setattr(vars(self)["config"], name, value)


class SharedCells:
    """Keeps the copies of a model's cell equal.

        cells = SharedCells.of(routing)
        cells.install(model_config)
        model_config.finalize_model_grads_func = FinalizeStep(cells)

    Args:
        routing: of the model, also for pipeline stages without experts.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._num_weights: int | None = None

    @classmethod
    def of(cls, routing: AnyRouting | None) -> "SharedCells | None":
        """Return the cells of a model with these routers; None if they have no recurrence."""
        return cls(routing) if isinstance(routing, Routing) and routing.is_recurrent else None

    def install(self, model_config: Any) -> None:
        """Let Megatron call `prepare` and `widen` when it builds a model of this configuration."""
        model_config.pre_wrap_hooks.append(self.prepare)
        model_config.post_wrap_hooks.append(self.widen)

    def prepare(self, models: list[Any]) -> list[Any]:
        """Make the cell of every model chunk a module of it, and the copies of a model equal.

        This is a function for `pre_wrap_hooks` of Megatron's model configuration, which all ranks
        call.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        # Megatron distributes chunks over stages in turn.
        position = {i * group.size() + group.rank(): cell for i, cell in _cells(models).items()}
        for i, cell in _cells(models).items():
            models[i].decoder.recurrent_cell = cell
        if group.size() == 1 or torch.device(torch.cuda.current_device()).type == "meta":
            return models  # with a single copy, or without values where a run is rehearsed
        ends = torch.tensor(
            [-min(position, default=len(models) * group.size()), max(position, default=-1)],
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX, group=group)
        first, last = -int(ends[0]), int(ends[1])
        if first == last:
            return models
        weights = self._zeros(list(position.values()), group)
        if first in position:
            weights = _flat([p.detach() for p in position[first].parameters()])
        torch.distributed.broadcast(weights, group=group, group_src=first % group.size())
        for place, cell in position.items():
            cell.copy = place - first
            _fill([p.detach() for p in cell.parameters()], weights)
            for parameter in cell.parameters():
                # The norm of the gradients counts the first copy.
                parameter.shared = cell.copy > 0  # type: ignore[attr-defined]
        return models

    def widen(self, models: list[Any]) -> list[Any]:
        """Let pipeline stages send hidden states with the columns of the state.

        This is a function for `post_wrap_hooks` of Megatron's model configuration.
        """
        config = get_model_config(models[0])
        if config.pipeline_model_parallel_size > 1 and self.routing.recurrent_passing != "none":
            width = columns(self.routing.recurrent_size, config.pipeline_dtype)
            for model in models:
                model.config = PipelineConfig(config, config.hidden_size + width)
        return models

    def sum_gradients(self, models: list[Any]) -> None:
        """Give all copies the sum of their gradients, after Megatron has finalized these."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() == 1:
            return
        cells, copies = _cells(unwrap_model(models)), []
        total = self._zeros(list(cells.values()), group)
        for i, cell in cells.items():
            weights: list[Any] = list(cell.parameters())
            copies.append([weight.main_grad for weight in weights])
            total += _flat([_reduced_part(models[i], weight) for weight in weights])
        if models[0].ddp_config.use_distributed_optimizer:
            torch.distributed.all_reduce(total, group=models[0].intra_dp_cp_group)
        torch.distributed.all_reduce(total, group=group)
        for gradients in copies:
            _fill(gradients, total)

    def _zeros(self, cells: list[SharedCell], group: Any) -> Tensor:
        """Return a zero for every weight of a cell, also on a stage without a copy."""
        device = torch.cuda.current_device()
        if self._num_weights is None:
            num_weights = max((sum(p.numel() for p in c.parameters()) for c in cells), default=0)
            most = torch.tensor(num_weights, device=device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
            self._num_weights = int(most)
        return torch.zeros(self._num_weights, device=device)


def check_installed(models: list[Any], cells: SharedCells | None) -> None:
    """Refuse recurrent routers whose cell would be neither trained nor saved.

    Raises:
        ValueError: the cell is no module of the model, or nothing sums its gradients.
    """
    for i, cell in _cells(models).items():
        if cells is None or not any(module is cell for module in models[i].modules()):
            raise ValueError(
                "the cell of recurrent routers is no module of the model, or FinalizeStep does "
                "not know it, so that it would be neither trained nor saved; let "
                "megatron.remoe.configure build the model"
            )


def _reduced_part(model: Any, weight: Any) -> Tensor:
    """Return the gradient of a weight where this rank has it summed over data parallelism.

    The rest is zero. With the distributed optimizer every rank has another part, which differs
    between stages, because the weight has another place in their buffers.
    """
    gradient: Tensor = weight.main_grad
    if not model.ddp_config.use_distributed_optimizer:
        return gradient
    buckets = (bucket for buffer in model.buffers for bucket in buffer.buckets)
    bucket = next(bucket for bucket in buckets if weight in bucket.params)
    start, end = bucket.param_to_index[weight]
    size = bucket.grad_data.numel() // model.intra_dp_cp_group.size()
    first = model.intra_dp_cp_group.rank() * size
    low, high = (min(max(edge, start), end) - start for edge in (first, first + size))
    part = torch.zeros_like(gradient)
    part.view(-1)[low:high] = gradient.view(-1)[low:high]
    return part


def _cells(models: list[Any]) -> dict[int, SharedCell]:
    """Return the cells of the model chunks of this rank, by the number of the chunk."""
    found = {}
    for i, model in enumerate(models):
        for module in model.modules():
            if isinstance(module, Recurrent):
                assert isinstance(module.cell, SharedCell)
                found[i] = module.cell
    return found


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def _fill(tensors: list[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
