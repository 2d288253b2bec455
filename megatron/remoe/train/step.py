"""Once per step: reduce the routers' statistics, move the coefficient, keep a report.

Nothing here is on the path of a token, and nothing copies to the host: the report's tensors stay on
the device until they are logged.

Shapes: L transformer layers of the whole model, E experts.
"""

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
from megatron.remoe.moe.shared_cell import SharedCells, check_installed
from remoe.controller import move_l1_coeff
from remoe.statistics import RoutingStatistics, StepReport


def relu_routers(model: list[torch.nn.Module]) -> list[ReLURouter]:
    """Return the ReLU routers of this rank's model chunks."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, ReLURouter)]


def counting_routers(model: list[torch.nn.Module]) -> list[CountsRouting]:
    """Return the routers of this rank's model chunks that count, with ReLU or TopK routing."""
    modules = (m for chunk in model for m in chunk.modules() if isinstance(m, CountsRouting))
    # Layers of multi-token prediction (TopK only) have numbers of their own.
    return [m for m in modules if not m.is_mtp_layer]


@torch.no_grad()
def update_routers(
    routers: list[CountsRouting],
    config: TransformerConfig,
    *,
    is_relu: bool,
    has_state: bool = False,
    move_coeff: bool = True,
) -> StepReport:
    """Reduce and clear the statistics, and move every ReLU router's coefficient in place.

    Args:
        routers: routers of this rank; none on a pipeline stage without experts.
        config: configuration of the model.
        is_relu: whether the model's routers are `ReLURouter`s.
        has_state: whether they are recurrent.
        move_coeff: False only measures, for a step that will be repeated.
    """
    num_layers, device = config.num_layers, torch.cuda.current_device()
    one = RoutingStatistics.zeros(config.num_moe_experts, device).sums
    sums = one.expand(num_layers, -1).clone()
    maxima = sums.new_zeros(num_layers, 2)
    most_active_L, l1_coeff_L = maxima.unbind(dim=1)
    for router in routers:
        layer = router.layer_number - 1
        sums[layer], most_active_L[layer] = router.statistics.sums, router.statistics.most_active
        if isinstance(router, ReLURouter):
            l1_coeff_L[layer] = router.l1_coeff
        router.statistics.clear()
    # Ranks that share tokens (tensor parallelism without sequence parallelism) count them equally
    # often in the numerator and in the denominator of every quotient.
    groups = [parallel_state.get_pipeline_model_parallel_group()]
    if routers:
        groups.insert(0, routers[0].tp_dp_cp_group)
    for group in groups:
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
            torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX, group=group)
    report = StepReport.of(
        RoutingStatistics(sums, most_active_L),
        topk=config.moe_router_topk,
        l1_coeff_L=l1_coeff_L if is_relu else None,
        has_state=has_state,
    )
    relu = [router for router in routers if isinstance(router, ReLURouter)]
    if relu and move_coeff:
        move_l1_coeff([router.l1_coeff for router in relu], report.sparsity, relu[0].controller)
    return report


class FinalizeStep:
    """Megatron's `finalize_model_grads_func`, followed by the routers' update.

        config.finalize_model_grads_func = FinalizeStep()

    Megatron may run forward and backward again in one iteration (its rerun state machine), or write
    a checkpoint of the step before and exit, to repeat the step elsewhere. Every pass of a step has
    the same coefficient, which moves after the last one; the statistics are those of the last pass.

    When gradients overflow in fp16 the optimizer skips the step. The coefficient still moves, as in
    the published code: the sparsity of the step was measured.

    Args:
        cells: those of recurrent routers, or None.

    Attributes:
        report: what the last step measured; None before the first step, or without routers that
            count.
    """

    def __init__(self, cells: SharedCells | None = None) -> None:
        self.cells = cells
        self.report: StepReport | None = None
        self._kinds: tuple[bool, bool] | None = None

    def __call__(
        self,
        model: list[torch.nn.Module],
        num_tokens: Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Finalize the gradients of a step, and update its routers.

        Raises:
            ValueError: the cell of recurrent routers would not be trained.
        """
        if self._kinds is None:
            check_installed(model, self.cells)
        megatron_finalize_model_grads(
            model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
        )
        if self.cells is not None:
            self.cells.sum_gradients(model)
        routers = counting_routers(model)
        if self._kinds is None:
            self._kinds = _on_any_stage(bool(routers), bool(relu_routers(model)))
        counts, is_relu = self._kinds
        if not counts:
            return
        self.report = update_routers(
            routers,
            get_model_config(model[0]),
            is_relu=is_relu,
            has_state=self.cells is not None,
            move_coeff=is_relu and not compat.step_will_be_repeated(),
        )


def _on_any_stage(counts: bool, is_relu: bool) -> tuple[bool, bool]:
    """Return whether any pipeline stage has routers that count, and whether any has ReLU routers.

    A stage may have none of them.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    kinds = torch.tensor([counts, is_relu], dtype=torch.int32, device=torch.cuda.current_device())
    if group.size() > 1:
        torch.distributed.all_reduce(kinds, op=torch.distributed.ReduceOp.MAX, group=group)
    counts, is_relu = kinds.bool().tolist()
    return counts, is_relu
