"""The fully reshardable save, where Megatron 0.19.2 takes the states of other weights.

It does so after a padded bucket. `test_resume.py` has a run across layouts with padded buckets.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.remoe import compat
from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.cell import DISTRIBUTED, ODD_SIZES, Cell
from megatron.remoe.testing.golden import CLOSED_LOOP
from megatron.remoe.verify.resume import ResumableTraining

LAYOUT = Cell("DP2", 2, overlap=True, run=ODD_SIZES, **DISTRIBUTED)
IN_BF16: dict[str, Any] = {"dtype": "bf16", "recurrence": "gru"}  # with fp32 weights in the routers
LAYOUTS = [
    LAYOUT,
    replace(LAYOUT, name="bf16 EP2", ep=2, run=(*ODD_SIZES, ("groups", 4)), **IN_BF16),
]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("cell", LAYOUTS, ids=lambda cell: cell.name)
def test_states_are_saved_and_loaded_with_their_weights(ranks, tmp_path, cell):
    for padded, compared, wrong in ranks.run(save_and_compare, cell, tmp_path / "checkpoint"):
        assert padded[0] and padded[-1]  # of the dense weights, and of the experts
        assert compared > 100
        assert wrong == []


def save_and_compare(cell: Cell, folder: Path) -> tuple[list[bool], int, list[str]]:
    """Save a run after two steps and load it, and compare the checkpoint with both runs.

    Returns:
        Whether a bucket but the last one is padded, for every buffer; the number of tensors that
        were compared; and the names of those that differ.
    """
    from megatron.core.dist_checkpointing import load_plain_tensors

    training = ResumableTraining(cell, CLOSED_LOOP, None)
    training.steps(0, 2)
    buffers = [buffer for part in training.optimizer.chained_optimizers for buffer in part.buffers]
    places = [buffer.param_index_map for buffer in buffers]
    training.save(folder)
    assert all(a.param_index_map is b for a, b in zip(buffers, places, strict=True))
    states = states_of(training)
    loaded = ResumableTraining(cell, CLOSED_LOOP, None)
    loaded.load(folder)
    states += states_of(loaded)
    written = load_plain_tensors(str(folder))
    wrong = [s.key for s in states if not s.data.equal(written[s.key][s.global_slice()])]
    padded = [any(b.grad_data.numel() > b.numel_unpadded for b in x.buckets[:-1]) for x in buffers]
    return padded, len(states), wrong


def states_of(training: ResumableTraining) -> list[Any]:
    """Return the main weights and the states of Adam, named and cut as the model's weights are.

    Every rank fills in its shard, and the sum over the ranks is the whole.
    """
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
    from megatron.core.utils import unwrap_model

    (model,) = unwrap_model(training.chunks)
    sharded, _ = extract_sharded_tensors_and_factories(model.sharded_state_dict())
    of_weight = {each.data: each for each in nested_values(sharded)}
    states: dict[str, Any] = {}
    for part in training.optimizer.chained_optimizers:
        for weight in (weight for buffer in part.buffers for weight in buffer.params):
            named = of_weight[weight]
            for name in ("param", "exp_avg", "exp_avg_sq"):
                whole = torch.zeros(weight.numel())
                if weight in part.model_param_gbuf_map:
                    shard = part._get_model_param_range_map(weight)["param"]
                    ours = part._get_main_param_and_optimizer_states(weight)
                    whole[shard.start : shard.end] = ours[name].detach()
                torch.distributed.all_reduce(whole, group=part.data_parallel_group)
                key = f"optimizer.state.{name}.{named.key}"
                changes = {"key": key, "data": whole.view(weight.shape)}
                if isinstance(named, ShardedTensor):
                    changes["dtype"] = whole.dtype
                states[f"{key} {len(states)}"] = replace(named, **changes)
    apply_factories(states)
    return list(nested_values(states))


def test_nothing_wrong_is_saved_and_a_mended_megatron_is_left_alone(ranks, tmp_path):
    for refusal, compared in ranks.run(save_with_other_methods, tmp_path):
        assert refusal.startswith("megatron-core 0.19.2 would save optimizer.state.param.")
        assert compared == (True, [])


def save_with_other_methods(folder: Path) -> tuple[str, tuple[bool, list[str]]]:
    """Save without the repair, and then with a method of Megatron that has one itself."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    method = "sharded_param_state_fully_reshardable"
    original = getattr(DistributedOptimizer, method)

    def mended(self: Any, *args: Any) -> Any:
        assert all(buffer.buckets for buffer in self.buffers)
        with unpadded_places(self.buffers):
            return original(self, *args)

    unpadded_places = compat._unpadded_places
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "_unpadded_places", lambda buffers: nullcontext())
        with pytest.raises(RuntimeError) as error:
            save_and_compare(LAYOUT, folder / "refused")
        patch.setattr(DistributedOptimizer, method, mended)
        padded, _, wrong = save_and_compare(LAYOUT, folder / "mended")
    return str(error.value), (any(padded), wrong)
