"""Grouped experts are Megatron's sequential ones: initial weights, checkpoints, gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from megatron.remoe.ranks import Ranks
from remoe.kernels.chunks import UNLIMITED
from tests import test_hf as hf_cases
from tests.mcore import moe_cases
from tests.mcore.moe_cases import Layout


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


LAYOUTS = [
    Layout(),
    Layout(ep=2),
    Layout(tp=2, ep=2),
    Layout("allgather", tp=2, expert_tp=2),
]


def ids(layout):
    return f"tp{layout.tp}-ep{layout.ep}-etp{layout.expert_tp}"


def build(layout, grouped, **changes):
    """The layer as Megatron initializes it; not with the known weights."""
    from megatron.remoe.moe.spec import block_spec
    from remoe.config import ReLURouting

    moe_cases.initialize(layout)
    config = moe_cases.transformer_config(layout, **({"moe_grouped_gemm": grouped} | changes))
    spec = block_spec(config, ReLURouting()).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def weights_of(layer):
    """fc1 and fc2 of this rank's experts, stacked."""
    pairs = [pair for _, pair in moe_cases.local_experts(layer)]
    return [torch.stack([pair[i].detach() for pair in pairs]) for i in (0, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_initial_weights_and_attributes_are_those_of_sequential_experts(ranks, layout):
    for same, attributes in ranks.run(compare_initial, layout):
        assert same
        ours, theirs = attributes
        assert ours == theirs


def compare_initial(layout):
    def attributes(weight, axis):
        names = ("tensor_model_parallel", "allreduce", "partition_stride")
        return [*(getattr(weight, name) for name in names), weight.partition_dim - axis]

    sequential = build(layout, grouped=False)
    expected = weights_of(sequential)
    expert = sequential.experts.local_experts[0]
    theirs = [attributes(fc.weight, 0) for fc in (expert.linear_fc1, expert.linear_fc2)]
    grouped = build(layout, grouped=True)
    same = all(map(torch.equal, weights_of(grouped), expected))
    experts = grouped.experts
    return same, ([attributes(w, 1) for w in (experts.linear_fc1, experts.linear_fc2)], theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("saved_grouped", [False, True], ids=["from sequential", "from grouped"])
def test_a_checkpoint_moves_between_them(ranks, tmp_path, layout, saved_grouped):
    """Saved by one on one layout, loaded by the other on another layout, both ways."""
    path = str(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    ranks.run(save, Layout(ep=2), saved_grouped, path)
    full = [w for _, w in zip(range(3), moe_cases.weights(0.0), strict=False)]
    for actual, experts, part, parts in ranks.run(load, layout, not saved_grouped, path):
        fc1 = full[1][experts].view(len(experts), 2, moe_cases.WIDTH, moe_cases.HIDDEN)
        fc1 = fc1.chunk(parts, dim=2)[part].flatten(1, 2)
        fc2 = full[2][experts].chunk(parts, dim=2)[part]
        assert torch.equal(actual[0], fc1)
        assert torch.equal(actual[1], fc2)


def save(layout, grouped, path):
    from megatron.core import dist_checkpointing

    layer = moe_cases.build_layer(layout, 0.0, moe_grouped_gemm=grouped)
    dist_checkpointing.save(layer.sharded_state_dict(prefix="mlp."), path)


def load(layout, grouped, path):
    from megatron.core import dist_checkpointing

    layer = build(layout, grouped)
    state = dist_checkpointing.load(layer.sharded_state_dict(prefix="mlp."), path)
    layer.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})
    tp = layer.experts.tp_group
    return weights_of(layer), layer.local_expert_indices, tp.rank(), tp.size()


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("offsets", [(), ((0, 1, 3),)], ids=["own key", "layer axis"])
def test_keys_shapes_and_axes_are_those_of_sequential_experts(ranks, layout, offsets):
    """Also what Transformer Engine's grouped experts write, by Megatron's source (unverified)."""
    sequential = ranks.run(regions, layout, False, offsets)
    grouped = ranks.run(regions, layout, True, offsets)
    assert grouped == sequential
    keys = {key for key, _, _ in grouped[0] if "_extra_state" not in key}
    assert keys == {f"mlp.experts.experts.linear_{fc}.weight" for fc in ("fc1", "fc2")}


def regions(layout, grouped, offsets):
    """(key, global shape, global index of every element) of what this rank owns."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    experts = build(layout, grouped).experts
    owned = {}
    for entry in nested_values(experts.sharded_state_dict("mlp.experts.", offsets)):
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            if isinstance(shard, ShardedObject):
                owned[shard.unique_key, tuple(shard.global_shape)] = [shard.global_offset]
                continue
            start = shard.global_offset
            size = [1] * shard.prepend_axis_num + list(shard.local_shape)
            grid = torch.meshgrid(
                *(torch.arange(a, a + n) for a, n in zip(start, size, strict=True)), indexing="ij"
            )
            indices = torch.stack([axis.flatten() for axis in grid], dim=1).tolist()
            key = (shard.key, tuple(shard.global_shape))
            owned.setdefault(key, []).extend(map(tuple, indices))
    return sorted((key, shape, tuple(sorted(indices))) for (key, shape), indices in owned.items())


def test_gradients_go_to_the_main_gradients_of_ddp(ranks):
    """With the dtype of the weights nothing else is allocated; otherwise DDP adds as it does."""
    for dtype, added in ((torch.float32, True), (torch.float64, False)):
        for flags, main, expected in ranks.run(main_gradients, dtype):
            assert flags == [added, added]
            for a, b in zip(main, expected, strict=True):
                assert torch.allclose(a.float(), b + 1, rtol=1e-5, atol=1e-4)


def main_gradients(dtype):
    layer = moe_cases.build_layer(Layout(), 0.0, max_assignments=UNLIMITED)
    x = moe_cases.inputs(0)
    layer(x)[0].sum().backward()
    parameters = [layer.experts.linear_fc1, layer.experts.linear_fc2]
    expected = [p.grad for p in parameters]
    for p in parameters:
        p.grad, p.grad_added_to_main_grad = None, False
        p.main_grad = torch.ones_like(p, dtype=dtype)
    layer(x)[0].sum().backward()
    flags = [p.grad_added_to_main_grad for p in parameters]
    for p in parameters:  # what Megatron's hook does after backward
        if not p.grad_added_to_main_grad:
            p.main_grad.add_(p.grad)
    return flags, [p.main_grad for p in parameters], expected


@pytest.mark.parametrize(
    "change",
    [
        {"activation_func": torch.nn.functional.gelu},
        {"gated_linear_unit": False},
        {"add_bias_linear": True},
        {"use_cpu_initialization": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_experts_that_it_does_not_know_are_refused(ranks, change):
    with pytest.raises(AssertionError, match=r"ValueError: moe_grouped_gemm with transformer_impl"):
        ranks.run(build, Layout(), True, **change)


def in_tensor_parallel(folder: Path, tokens: torch.Tensor) -> tuple:
    """Loss, gradients, greedy text and shapes of a model that transformers splits over 2 ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import remoe.hf  # noqa: F401, registers the model with transformers

    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2)
    ).train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradients, shapes = {}, {}
    for name, parameter in model.named_parameters():
        is_split = isinstance(parameter, DTensor)
        gradients[name] = parameter.grad.full_tensor() if is_split else parameter.grad
        shapes[name] = (parameter.to_local() if is_split else parameter).shape
    model.save_pretrained(folder / "again")
    text = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
    )
    return loss.detach(), gradients, text, shapes


@pytest.mark.parametrize(
    "changes",
    [
        {"router_type": "relu_l2", "moe_intermediate_size": 23},  # which 2 does not divide
        {"recurrence": "gru", "recurrent_size": 8, "tie_word_embeddings": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_exported_model_is_split_by_the_plan_of_transformers(ranks, changes, tmp_path):
    """Losses, all gradients, greedy text and saved weights are those of one process."""
    model = hf_cases.build(l1_coeff=[0.1, 0.2], gate_threshold=0.05, **changes)
    tokens = hf_cases.some_tokens(2, 9)
    model.save_pretrained(tmp_path)
    text = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
    )
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for found in ranks.run(in_tensor_parallel, tmp_path, tokens):
        torch.testing.assert_close(found[0], loss.detach())
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[2], text)
        split = {name for name, p in model.named_parameters() if found[3][name] != p.shape}
        assert {f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")} < split
        assert not any("router" in name or "cell" in name for name in split)
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], p) for name, p in model.named_parameters())
