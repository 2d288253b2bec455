"""Training of a cell: a golden run with Megatron's modules under one parallel layout."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.remoe.ranks import initialize_layout
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.golden import (
    SLOTS_PER_EXPERT,
    Padding,
    fill_with_golden_weights,
    golden_tokens,
    make_extreme,
    model_config_of,
    padding_mask,
    transformer_config,
)
from remoe.config import ROUTINGS, AnyRouting, L1Routing, Selection

if TYPE_CHECKING:
    from megatron.remoe.pretrain import Loss
    from megatron.remoe.train.step import FinalizeStep

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Fields of Megatron's TransformerConfig.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}
_ON_ALL_TENSOR_RANKS = (
    ".router.weight", ".router.scale", ".router.gate_scale", ".projection", ".l1_coeff", ".load",
    ".odds", ".thresholds", ".num_updates", "layernorm.weight",
    "final_norm.weight",
)  # fmt: skip
_BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
_ROUTER: dict[str, dict[str, Any]] = {
    "topk": _BALANCED,
    "null_experts": _BALANCED,
    "dense": {"num_moe_experts": None, "moe_ffn_hidden_size": None},
}


def run_cell(cell: Cell, golden: dict[str, Any], steps: int, weights: Path) -> list[dict[str, Any]]:
    """Train and return what every step measured; all ranks of the cell call this.

    Replicas of a weight must be equal at the end, bit for bit.

    Args:
        cell: the layout.
        golden: configuration of a golden run.
        steps: number of steps to train.
        weights: a checkpoint that `save_golden_weights` wrote for the same model.

    Raises:
        AssertionError: data-parallel or tensor-parallel ranks hold different values of a replica.
    """
    config = cell.config(golden)
    initialize(cell)
    training = Training(cell, config, weights)
    batches = golden_tokens(config)[:steps].to(torch.cuda.current_device())
    trajectory = [training.step(batch) for batch in batches]
    differing = training.replicas_that_differ()
    assert not differing, (
        f"ranks hold different values of {len(differing)} replicas, of which the first is "
        f"{differing[0]}"
    )
    return trajectory


class Training:
    """The model of a cell and its optimizer; process groups must exist already."""

    def __init__(self, cell: Cell, config: dict[str, Any], weights: Path | None) -> None:
        self.cell, self.config = cell, config
        self.chunks, self.hook = _build(cell, config, weights)
        self.optimizer = _optimizer(cell, config, self.chunks)
        transformer = self.chunks[0].config
        transformer.grad_scale_func = self.optimizer.scale_loss
        if cell.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_sync if len(self.chunks) > 1 else no_sync[0]

    def step(self, batch: Tensor) -> dict[str, Any]:
        """Train on tokens `[nmb, mbs, seq + 1]`; return what was measured."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, padding=self.cell.padding),
            data_iterator=[_micro_batches(batch, self.cell) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=self.config["nmb"] // self.cell.dp,
            seq_length=self.config["seq"],
            micro_batch_size=self.config["mbs"],
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        return _measure(losses, grad_norm, self.hook, self.cell)

    def replicas_that_differ(self) -> list[str]:
        """Return the parameters and buffers that are not equal on all ranks that replicate them.

        Every rank compares its values with those of rank 0 of a group; all ranks call this.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import unwrap_model

        tensor = parallel_state.get_tensor_model_parallel_group()
        data = parallel_state.get_data_parallel_group()
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        expert_data = parallel_state.get_expert_data_parallel_group()
        differing = []
        for chunk in self.chunks:
            if self.cell.overlaps_gather:
                chunk.start_param_sync(force_sync=True)  # instead of during the next forward pass
            (model,) = unwrap_model([chunk])
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                groups = [expert_data if ".experts." in name else data]
                if name.endswith(_ON_ALL_TENSOR_RANKS) or ".recurrent_cell." in name:
                    groups.append(tensor)
                for group in groups:
                    first = value.detach().clone()
                    torch.distributed.broadcast(first, group=group, group_src=0)
                    if not torch.equal(first, value):
                        differing.append(name)
        # A stage may have no copy of the cell, or several.
        ours = [item for item in self._parameters() if ".recurrent_cell." in item[0]]
        copies: list[list[tuple[str, Tensor]]] = [[] for _ in range(pipeline.size())]
        torch.distributed.all_gather_object(copies, ours, group=pipeline)
        of_cell: dict[str, Tensor] = {}
        for name, value in (item for stage in copies for item in stage):
            if not torch.equal(value, of_cell.setdefault(name, value)):
                differing.append(name)
        return differing

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [
            (name, parameter.detach())
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
        ]


def save_golden_weights(cell: Cell, golden: dict[str, Any], weights: Path) -> None:
    """Write a one-rank checkpoint of a cell's model at its golden weights."""
    from megatron.core import dist_checkpointing

    config = cell.config(golden)
    initialize(cell)
    (model,), _ = _models(cell, config, wrap=False)
    fill_with_golden_weights(model, config["seed"])
    if cell.routing is not None:
        make_extreme(model, cell.routing)
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(weights))


def initialize(cell: Cell) -> None:
    """Replace the process groups of the previous cell by those of this one."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    unset_num_microbatches_calculator()
    destroy_moe_metrics_tracker()  # it is sized by the layers of the previous model
    initialize_layout(
        tensor=cell.tp,
        pipeline=cell.pp,
        virtual_pipeline=cell.vp,
        expert=cell.ep,
        expert_tensor=cell.expert_tp,
    )


def _models(cell: Cell, config: dict[str, Any], *, wrap: bool) -> tuple[list[Any], "FinalizeStep"]:
    """Return the model chunks of this rank, and the hook that runs once per step."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron.remoe.moe.shared_cell import SharedCells
    from megatron.remoe.train.step import FinalizeStep

    dtype = _DTYPES[cell.dtype]
    changes: dict[str, Any] = {
        "tensor_model_parallel_size": cell.tp,
        "pipeline_model_parallel_size": cell.pp,
        "virtual_pipeline_model_parallel_size": cell.vp,
        "expert_model_parallel_size": cell.ep,
        "expert_tensor_parallel_size": cell.expert_tp,
        "sequence_parallel": cell.tp > 1,
        "moe_token_dispatcher_type": cell.dispatcher,
        "moe_grouped_gemm": cell.experts == "grouped",
        # A list makes Megatron store layers one by one, even if all have experts.
        "moe_layer_freq": list(config["moe_layer_freq"]) if "moe_layer_freq" in config else 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": cell.dtype == "bf16",
        "fp16": cell.dtype == "fp16",
        "calculate_per_token_loss": cell.per_token_loss,
    }
    changes |= _RECOMPUTE[cell.recompute] | _ROUTER.get(cell.router, {})
    if cell.host == "hybrid":
        del changes["moe_layer_freq"]  # the pattern says it
    routing = _routing(cell, config)
    transformer = transformer_config(config, host=cell.host, **changes)
    model_config = model_config_of(transformer, config, routing, host=cell.host)
    hook = FinalizeStep(SharedCells.of(routing))
    model_config.transformer.finalize_model_grads_func = hook
    chunks = model_config.get_builder_cls()(model_config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=cell.overlap,
            overlap_param_gather=cell.overlaps_gather,
            use_distributed_optimizer=cell.distributed_optimizer,
            bucket_size=20_000 if cell.overlap else None,  # several buckets in a tiny model
        ),
        wrap_with_ddp=wrap,
        data_parallel_random_init=False,
    )
    return chunks, hook


def _routing(cell: Cell, config: dict[str, Any]) -> AnyRouting | None:
    """Return the settings of the router; None without experts, or for Megatron's own TopK."""
    settings: dict[str, Any] = {}
    if cell.recurrence != "none":
        settings = {
            "recurrence": cell.recurrence,
            "recurrent_size": cell.recurrent_size,
            "recurrent_projection": cell.recurrent_projection,
        }
    if cell.router == "dense" or (cell.router == "topk" and not settings):
        return None
    kind = ROUTINGS[cell.router]
    if issubclass(kind, L1Routing):
        settings |= {
            "l1_coeff_init": config["coeff_init"],
            "load_balancing": cell.load_balancing,
            "l1_coeff_per_layer": cell.per_layer,
        }
    if issubclass(kind, Selection):
        settings["max_assignments"] = _max_assignments(cell)
    if cell.router == "soft":
        settings["slots_per_expert"] = SLOTS_PER_EXPERT
    return kind(**settings)


def _max_assignments(cell: Cell) -> int | None:
    from megatron.core import parallel_state

    if not isinstance(cell.max_assignments, tuple):
        return cell.max_assignments
    replica: int = parallel_state.get_expert_data_parallel_rank()
    return cell.max_assignments[replica % len(cell.max_assignments)]


def _build(
    cell: Cell, config: dict[str, Any], weights: Path | None
) -> tuple[list[Any], "FinalizeStep"]:
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    chunks, hook = _models(cell, config, wrap=True)
    if weights is not None:
        models = unwrap_model(chunks)
        states = {str(i): model.sharded_state_dict() for i, model in enumerate(models)}
        states = dist_checkpointing.load(states, str(weights))
        for i, model in enumerate(models):
            model.load_state_dict(states[str(i)])
    return [chunk.train() for chunk in chunks], hook


def _optimizer(cell: Cell, config: dict[str, Any], chunks: list[Any]) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config["lr"],
            weight_decay=0.01,
            adam_beta1=0.9,
            adam_beta2=0.999,
            clip_grad=1.0,
            bf16=cell.dtype == "bf16",
            fp16=cell.dtype == "fp16",
            params_dtype=_DTYPES[cell.dtype],
            use_distributed_optimizer=cell.distributed_optimizer,
            overlap_param_gather=cell.overlaps_gather,
        ),
        chunks,
    )
    for group in optimizer.param_groups:  # as Megatron's learning rate scheduler does
        group["weight_decay"] = 0.01 * group["wd_mult"]
    return optimizer


def _micro_batches(batch: Tensor, cell: Cell) -> Iterator[tuple[int, Tensor]]:
    """Return the micro-batches of this rank, each with its number in the step."""
    from megatron.core import parallel_state

    return islice(enumerate(batch), parallel_state.get_data_parallel_rank(), None, cell.dp)


def _forward_step(
    data_iterator: Iterator[tuple[int, Tensor]], model: Any, *, padding: Padding
) -> tuple[Tensor, "Callable[[Tensor], Loss]"]:
    from megatron.remoe.pretrain import loss_func

    number, tokens = next(data_iterator)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    padded = padding_mask(number, labels, padding)
    given = None if padding == "none" else padded
    output = model(inputs, positions, None, labels=labels, padding_mask=given)
    return output, partial(loss_func, (~padded).float(), check_for_nan=False)


def _measure(
    losses: list[dict[str, Tensor]], grad_norm: float | None, hook: "FinalizeStep", cell: Cell
) -> dict[str, Any]:
    """Return the step in the terms of the golden files.

    Only the last pipeline stage knows the loss.
    """
    from megatron.core import parallel_state

    # There is no gradient norm when the loss scaler of fp16 skips the step.
    step: dict[str, Any] = {"grad_norm": float("nan") if grad_norm is None else float(grad_norm)}
    if losses:
        loss = torch.stack([entry["lm loss"] for entry in losses]).sum(dim=0)
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        step["lm_loss"] = (loss[0] / loss[1]).item()
    report = hook.report
    if report is None or (cell.router == "topk" and cell.recurrence != "none"):
        return step
    has_router = report.has_router
    step |= {
        "sparsity": report.sparsity.item(),
        "sparsity_per_layer": report.sparsity_L[has_router].tolist(),
        "most_active": report.most_active_L[has_router].tolist(),
    }
    if report.l1_reg_L is not None:
        step["l1_reg"] = report.l1_reg_L[has_router].tolist()
    if report.level_L is not None:
        levels = report.level_L[has_router].tolist()
        name = "l1_coeff_used" if report.l1_coeff is not None else "level"
        step[name] = levels if report.per_layer else levels[0]
    return step
