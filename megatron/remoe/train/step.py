"""Once per step: reduce the routers' statistics, move the coefficient, remember what was measured.

Nothing here is on the path of a token, and nothing copies to the host: the report's tensors stay on
the device until somebody logs them.

Shapes: L transformer layers of the whole model, E experts.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron.remoe import compat
from megatron.remoe.moe.counting import CountsRouting
from megatron.remoe.moe.router import ReLURouter
from remoe.controller import move_l1_coeff
from remoe.routing import sparsity


@dataclass(frozen=True)
class StepReport:
    """Routing of one step, over all layers, micro-batches and tokens of the global batch.

    Attributes:
        has_router: bool `[L]`, True for layers with a router; other entries are meaningless.
        sparsity_L: `[L]`; `sparsity` is its mean over routers, what the controller acts on. Both
            are NaN in a step whose batch is padding alone, and the coefficient then stays.
        tokens_L: `[L]`, and tokens_per_expert_LE: `[L, E]`.
        most_active_L: `[L]`, the most experts that a token activated.
        topk: k of the model, after granularity.
        l1_reg_L: `[L]`, the regulariser before its coefficient, mean over micro-batches; None
            without ReLU routing.
        l1_coeff: 0-d, the coefficient used in this step, which layers share (that of the first with
            a router); None without ReLU routing.
    """

    has_router: Tensor
    sparsity: Tensor
    sparsity_L: Tensor
    tokens_L: Tensor
    tokens_per_expert_LE: Tensor
    most_active_L: Tensor
    topk: int
    l1_reg_L: Tensor | None = None
    l1_coeff: Tensor | None = None


def relu_routers(model: list[torch.nn.Module]) -> list[ReLURouter]:
    """The ReLU routers of this rank's model chunks."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, ReLURouter)]


def counting_routers(model: list[torch.nn.Module]) -> list[CountsRouting]:
    """The routers of this rank's model chunks that count, of ReLU or TopK routing."""
    modules = (m for chunk in model for m in chunk.modules() if isinstance(m, CountsRouting))
    # Layers of multi-token prediction (TopK only) are numbered on their own.
    return [m for m in modules if not m.is_mtp_layer]


@torch.no_grad()
def update_routers(
    routers: list[CountsRouting],
    config: TransformerConfig,
    *,
    is_relu: bool,
    move_coeff: bool = True,
) -> StepReport:
    """Reduce and clear the statistics, and move every ReLU router's coefficient in place.

    Args:
        routers: the routers of this rank; none on a pipeline stage without experts.
        config: of the model.
        is_relu: whether the model's routers are `ReLURouter`s.
        move_coeff: False only measures, when the step will be done again.
    """
    num_layers, num_experts = config.num_layers, config.num_moe_experts
    device = torch.cuda.current_device()
    stats = torch.zeros(num_layers, 3 + num_experts, dtype=torch.float64, device=device)
    highest = stats.new_zeros(num_layers, 2)  # most experts of a token, and coefficient
    for router in routers:
        stats[router.layer_number - 1] = router.stats
        highest[router.layer_number - 1, 0] = router.most_active
        if isinstance(router, ReLURouter):
            highest[router.layer_number - 1, 1] = router.l1_coeff
        router.clear_counters()
    # Ranks that share tokens (tensor parallelism without sequence parallelism) count them equally
    # often above and below the line.
    groups = [parallel_state.get_pipeline_model_parallel_group()]
    if routers:
        groups.insert(0, routers[0].tp_dp_cp_group)
    for group in groups:
        if group.size() > 1:
            torch.distributed.all_reduce(stats, group=group)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX, group=group)

    l1_reg, micro_batches, tokens, counts = torch.split(stats, [1, 1, 1, num_experts], dim=1)
    has_router = micro_batches.squeeze(1) > 0
    sparsity_L = sparsity(counts, tokens.squeeze(1))
    mean_sparsity = sparsity_L.where(has_router, 0).sum() / has_router.sum()
    relu = [router for router in routers if isinstance(router, ReLURouter)]
    first = has_router.int().argmax(dim=0, keepdim=True)
    report = StepReport(
        has_router=has_router,
        sparsity=mean_sparsity,
        sparsity_L=sparsity_L,
        tokens_L=tokens.squeeze(1),
        tokens_per_expert_LE=counts,
        most_active_L=highest[:, 0].long(),
        topk=config.moe_router_topk,
        l1_reg_L=(l1_reg / micro_batches).squeeze(1) if is_relu else None,
        l1_coeff=highest[:, 1].gather(0, first).squeeze(0).float() if is_relu else None,
    )
    if relu and move_coeff:
        coeffs = [router.l1_coeff for router in relu]
        move_l1_coeff(coeffs, mean_sparsity, relu[0].controller)
    return report


class FinalizeStep:
    """Megatron's `finalize_model_grads_func`, followed by the routers' update.

        config.finalize_model_grads_func = FinalizeStep()

    Megatron may run forward and backward again in one iteration (its rerun state machine), or write
    a checkpoint of the step before and exit, to repeat the step elsewhere. Every pass of a step has
    the same coefficient, which moves after the last one; the statistics are those of the last one.

    A step whose gradients overflow in fp16, which the optimizer then skips, moves the coefficient
    like any other, as in the published code: its sparsity was measured.

    Attributes:
        report: what the last step measured; None before the first, or without routers that count.
    """

    def __init__(self) -> None:
        self.report: StepReport | None = None
        self._kinds: tuple[bool, bool] | None = None

    def __call__(
        self,
        model: list[torch.nn.Module],
        num_tokens: Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> None:
        megatron_finalize_model_grads(
            model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
        )
        routers = counting_routers(model)
        relu = [router for router in routers if isinstance(router, ReLURouter)]
        if self._kinds is None:
            self._kinds = _on_any_stage(bool(routers), bool(relu))
        counts, is_relu = self._kinds
        if not counts:
            return
        self.report = update_routers(
            routers,
            get_model_config(model[0]),
            is_relu=is_relu,
            move_coeff=is_relu and not compat.step_will_be_repeated(),
        )


def _on_any_stage(counts: bool, is_relu: bool) -> tuple[bool, bool]:
    """Whether any pipeline stage has routers that count, and ReLU routers; some may have none."""
    group = parallel_state.get_pipeline_model_parallel_group()
    kinds = torch.tensor([counts, is_relu], dtype=torch.int32, device=torch.cuda.current_device())
    if group.size() > 1:
        torch.distributed.all_reduce(kinds, op=torch.distributed.ReduceOp.MAX, group=group)
    counts, is_relu = kinds.bool().tolist()
    return counts, is_relu
