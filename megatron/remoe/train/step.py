"""Once per step: reduce the routers' statistics, move their state, keep a report.

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
from megatron.remoe.moe.shared_cell import SharedCells, check_installed
from remoe.config import Selection
from remoe.statistics import RoutingStatistics, StepReport


def counting_routers(model: list[torch.nn.Module]) -> list[CountsRouting]:
    """Return the routers of this rank's model chunks that count."""
    modules = (m for chunk in model for m in chunk.modules() if isinstance(m, CountsRouting))
    # Layers of multi-token prediction (TopK only) have numbers of their own.
    return [m for m in modules if not m.is_mtp_layer]


@torch.no_grad()
def update_routers(
    routers: list[CountsRouting],
    config: TransformerConfig,
    selection: Selection,
    *,
    has_state: bool = False,
    move: bool = True,
) -> StepReport:
    """Reduce and clear the statistics, and move the state of every router in place.

    Args:
        routers: routers of this rank; none on a pipeline stage without experts.
        config: configuration of the model.
        selection: that of all routers of the model.
        has_state: whether they are recurrent.
        move: False only measures, for a step that will be repeated.
    """
    num_layers, device = config.num_layers, torch.cuda.current_device()
    one = RoutingStatistics.zeros(config.num_moe_experts, device).sums
    width = len(one)
    observed = 1 + config.num_moe_experts if selection.observes else 0
    sums = one.new_zeros(num_layers, width + observed)
    maxima = sums.new_zeros(num_layers, 2)
    most_active_L, level_L = maxima.unbind(dim=1)
    level_L.fill_(-torch.inf)  # a level may be negative
    for router in routers:
        layer = router.layer_number - 1
        sums[layer, :width] = router.statistics.sums
        most_active_L[layer] = router.statistics.most_active
        if selection.reports is not None:
            level_L[layer] = selection.report(router.state)
        if selection.observes:
            sums[layer, width:] = router.observed
            router.observed.zero_()
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
        RoutingStatistics(sums[:, :width], most_active_L),
        topk=config.moe_router_topk,
        penalizes=selection.budget == "l1",
        level_L=level_L if selection.reports is not None else None,
        level_name=selection.reports,
        per_layer=selection.per_layer,
        observed=sums[:, width:] if observed else None,
        has_state=has_state,
    )
    if routers and move:
        _move(routers, selection, report)
    return report


def _move(routers: list[CountsRouting], selection: Selection, report: StepReport) -> None:
    """Move the buffers of all routers of this rank at once."""
    states = [router.state for router in routers]
    layers = [router.layer_number - 1 for router in routers]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    if not stacked:
        return
    for name, values in selection.moved(stacked, report.of_layers(layers)).items():
        torch._foreach_copy_([state[name] for state in states], list(values.unbind()))


class FinalizeStep:
    """Megatron's `finalize_model_grads_func`, followed by the routers' update.

        config.finalize_model_grads_func = FinalizeStep()

    Megatron may run forward and backward again in one iteration (its rerun state machine), or write
    a checkpoint of the step before and exit, to repeat the step elsewhere. Every pass of a step has
    the same state of the routers, as the coefficient, which moves after the last one; the
    statistics are those of the last pass.

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
        self._selections: list[Selection] | None = None  # of all stages; at most one

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
        if self._selections is None:
            check_installed(model, self.cells)
            compat.make_room_for_losses(get_model_config(model[0]))
        megatron_finalize_model_grads(
            model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
        )
        if self.cells is not None:
            self.cells.sum_gradients(model)
        routers = counting_routers(model)
        if self._selections is None:
            self._selections = _on_any_stage(routers)
        if not self._selections:
            return
        self.report = update_routers(
            routers,
            get_model_config(model[0]),
            self._selections[0],
            has_state=self.cells is not None,
            move=not compat.step_will_be_repeated(),
        )


def _on_any_stage(routers: list[CountsRouting]) -> list[Selection]:
    """Return the selection of the model's routers, which a pipeline stage may not have."""
    ours = [router.selection for router in routers[:1]]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return ours
    found: list[list[Selection]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(found, ours, group=group)
    return [selection for stage in found for selection in stage][:1]
