"""The layer on two ranks, wrapped by DDP or FSDP2, against one process that has all tokens."""

import copy
import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron.remoe.ranks import Ranks
from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty, update_l1_coeff

HIDDEN, STEPS, MICRO_BATCHES = 8, 3, 2
TOKENS = ((24, 16), (5, 9))  # of each rank's micro-batches


class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "ffn_hidden_size": 12, "num_experts": 8, "topk": 4}
        settings = {"init_std": 0.1, "l1_coeff_init": 0.01, "max_assignments": 48} | settings
        config = ReMoELayerConfig(**sizes, **settings)
        self.layers = nn.ModuleList(ReMoELayer(config, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def batch_of(rank, step, micro_batch):
    """Tokens that activate more experts on the first rank than on the second."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    tokens = TOKENS[rank][micro_batch]
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)
    direction = Model().layers[0].router.detach().mean(dim=0)
    return x + (4 if rank == 0 else -8) * direction / direction.norm()


def gradient_and_update(model, batches, wrapped, *, weight, **update):
    """One step over micro-batches: the gradients by name, and the sparsity of the layers."""
    for index, x in enumerate(batches):
        ends = index == len(batches) - 1
        with nullcontext() if ends or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
            loss = wrapped(x).square().mean() + l1_penalty(wrapped)
            (loss * weight).backward()
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    model.zero_grad()
    sparsity = update_l1_coeff(wrapped, **update)
    return gradients, sparsity, torch.stack([layer.l1_coeff for layer in model.layers])


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_on_ranks(kind, settings):
    """Train a model that is wrapped; what every step has, and the sparsity of this rank alone."""
    rank = dist.get_rank()
    model = wrapped = Model(**settings)
    if kind == "DDP":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    steps, alone = [], []
    for step in range(STEPS):
        batches = [batch_of(rank, step, index) for index in range(MICRO_BATCHES)]
        weight = 1 / MICRO_BATCHES
        steps.append(gradient_and_update(model, batches, wrapped, weight=weight))
        single = Model(**settings)
        single.load_state_dict({name: whole(t) for name, t in model.state_dict().items()})
        for x in batches:
            single(x)
        alone.append(update_l1_coeff(single, group="rank"))
    return steps, alone


def train_alone(settings):
    """Train on the micro-batches of all ranks, one after the other."""
    model, steps = Model(**settings), []
    for step in range(STEPS):
        batches = [batch_of(rank, step, i) for rank in range(2) for i in range(MICRO_BATCHES)]
        steps.append(gradient_and_update(model, batches, model, weight=1 / len(batches)))
    return steps


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"load_balancing": "global_batch", "l1_coeff_per_layer": True}],
    ids=["aux_loss", "global_batch, per layer"],
)
def test_ranks_train_as_one_process_with_all_tokens(ranks, kind, settings):
    expected = train_alone(settings)
    results = ranks.run(train_on_ranks, kind, settings)
    for found, _ in results:
        for (grads, sparsity, coeff), (grads_of_one, sparsity_of_one, coeff_of_one) in zip(
            found, expected, strict=True
        ):
            assert torch.equal(sparsity, sparsity_of_one)
            assert torch.equal(coeff, coeff_of_one)
            for name, gradient in grads.items():
                # fp32 in the load weights, otherwise fp64
                assert torch.allclose(gradient, grads_of_one[name], rtol=1e-5, atol=1e-9), name
    dense, sparse = (alone[0].mean() for _, alone in results)
    assert dense < 0.5 < sparse, "each rank alone must move its own way"
    assert expected[0][1].mean() < 0.5 < (dense + sparse) / 2, "the number of tokens must matter"


def update_with_idle_ranks():
    """The first rank runs both layers, the second one the first layer, then none."""
    rank, model = dist.get_rank(), Model()
    maps = []
    for layer in list(model.layers)[: 2 - rank]:
        x = batch_of(rank, 0, 0)
        maps.append((x @ layer.router.T > 0).detach())
        layer(x)
    sparsity = update_l1_coeff(model)
    coeff = [layer.l1_coeff.item() for layer in model.layers]
    before = copy.deepcopy(coeff)
    idle = update_l1_coeff(model)
    unmoved = [layer.l1_coeff.item() for layer in model.layers] == before
    return maps, sparsity, coeff, idle.isnan().all().item() and unmoved


def test_tokens_are_counted_over_ranks_and_idle_layers_take_no_part(ranks):
    (first, *found), (second, *other) = ranks.run(update_with_idle_ranks)
    seen = [torch.cat([first[0], second[0]]), first[1]]
    expected = [1 - routing_map.double().mean().item() for routing_map in seen]
    for sparsity, coeff, idle in (found, other):
        assert sparsity.tolist() == pytest.approx(expected)
        moved = 0.01 * 1.2 if sum(expected) / 2 < 0.5 else 0.01 / 1.2
        assert coeff == pytest.approx([moved] * 2) and idle


def update_of_groups():
    """Each rank in a group of its own, and the second one in the group of the first."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank, model = dist.get_rank(), Model()
    model(batch_of(rank, 0, 0))
    sparsity = update_l1_coeff(model, group=groups[rank]).tolist()
    model(batch_of(rank, 0, 0))
    same = update_l1_coeff(model, group="rank").tolist() == sparsity
    try:
        update_l1_coeff(model, group=groups[0])
    except ValueError as error:
        return sparsity, same, str(error)
    return sparsity, same, ""


def test_a_group_bounds_the_reduction_and_must_have_the_rank(ranks):
    (first, same, none), (second, same_too, message) = ranks.run(update_of_groups)
    assert same and same_too and first != second
    assert none == "" and "rank 1 is not in the group" in message


def train_the_example(steps, fsdp):
    path = Path(__file__).parents[1] / "examples/own_model_ddp.py"
    return runpy.run_path(str(path))["train"](steps, fsdp=fsdp)


def test_the_example_keeps_coefficients_equal_under_both_wrappers(ranks):
    ddp, other = ranks.run(train_the_example, 12, fsdp=False)
    fsdp, _ = ranks.run(train_the_example, 12, fsdp=True)
    assert [row[1:] for row in ddp] == [row[1:] for row in other]
    assert ddp[-1][0] != other[-1][0], "ranks must see different tokens"
    assert ddp[-1][2] == pytest.approx(1e-5 * 1.2**12)
    for a, b in zip(ddp, fsdp, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
