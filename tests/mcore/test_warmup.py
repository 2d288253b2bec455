"""TopK with near-dense warm-up: router, dispatcher, flags, and what a resume goes on with."""

import pytest
import torch

from megatron.remoe.ranks import Ranks
from tests.mcore import moe_cases, tiny
from tests.mcore.moe_cases import EXPERTS, HIDDEN, WIDTH, Layout
from tests.mcore.test_train import training

STEPS, WARM_K = 3, 3


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def run_layer(layout: Layout, iteration: int):
    """Output of the layer at a training iteration, and what its router counted."""
    from megatron.remoe.moe.spec import block_spec
    from remoe.config import TopKRouting

    moe_cases.initialize(layout)
    config = moe_cases.transformer_config(layout)
    spec = block_spec(config, TopKRouting(warmup_steps=STEPS, warmup_topk=WARM_K)).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    router, fc1, fc2 = moe_cases.weights(0.0)
    with torch.no_grad():
        layer.router.weight.copy_(router)
        for index, (ours1, ours2) in moe_cases.local_experts(layer):
            ours1.copy_(fc1[index])
            ours2.copy_(fc2[index])
    layer.router._iteration = lambda: iteration
    x = moe_cases.inputs(torch.distributed.get_rank())
    output, _ = layer.train()(x)
    output.sum().backward()
    return output.detach(), layer.router.stats.clone(), layer.router.most_active.item()


def by_hand(rank: int, k: int) -> torch.Tensor:
    """The k most probable experts' outputs, weighted by the softmax over all experts."""
    router, fc1, fc2 = moe_cases.weights(0.0)
    x = moe_cases.inputs(rank).view(-1, HIDDEN)
    probs = torch.softmax(x @ router.T, dim=-1)
    y = torch.zeros_like(x)
    for token, row in enumerate(probs):
        for expert in row.topk(k).indices.tolist():
            gate, up = (fc1[expert] @ x[token]).split(WIDTH)
            out = fc2[expert] @ (torch.nn.functional.silu(gate) * up)
            y[token] += row[expert] * out
    return y


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(("iteration", "k"), [(STEPS - 1, WARM_K), (STEPS, 1)])
def test_router_and_dispatcher_change_k_together(ranks, dispatcher, iteration, k):
    outcomes = ranks.run(run_layer, Layout(dispatcher, ep=2), iteration)
    for rank, (output, stats, most_active) in enumerate(outcomes):
        # fp32 sums in another order
        expected = by_hand(rank, k)
        assert torch.allclose(output.view(-1, HIDDEN), expected, rtol=1e-4, atol=1e-4)
        tokens = len(expected)
        assert stats[1:3].tolist() == [1, tokens]
        assert stats[3:].sum() == k * tokens and most_active == k


EXPERT_FLAGS = ["--num-experts", str(EXPERTS), "--moe-router-topk", "1", "--ffn-hidden-size", "64"]
WARMUP = ["--moe-topk-warmup-steps", "100", "--moe-topk-warmup-topk", "3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (WARMUP[:2], "moe_topk_warmup_steps is 100 and moe_topk_warmup_topk is None; give both"),
        (WARMUP[2:], "moe_topk_warmup_steps is 0 and moe_topk_warmup_topk is 3; give both"),
        ([*WARMUP[:3], "5"], "moe_topk_warmup_topk is 5 of 4 experts; choose it between 1"),
        (["--moe-topk-warmup-steps", "-1"], "moe_topk_warmup_steps is -1; it must be at least 0"),
        ([*WARMUP, "--moe-relu-routing"], "moe_topk_warmup_steps is set, but it is a setting of T"),
        (
            [*WARMUP, "--moe-token-dispatcher-type", "flex"],
            "moe_token_dispatcher_type is flex, which TopK with near-dense warm-up refuses",
        ),
        (
            [*WARMUP, "--moe-expert-capacity-factor", "1.0"],
            "moe_expert_capacity_factor is 1.0, which TopK with near-dense warm-up refuses",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(call, argv, message):
    args, error = call(tiny.parse, *EXPERT_FLAGS, *argv)
    assert args == {} and error.startswith(f"error: {message}"), error
    assert error.count("\n") == 1


def test_warmup_of_a_dense_model_is_refused(call):
    _, error = call(tiny.parse, *WARMUP)
    assert error.startswith("error: moe_topk_warmup_steps is set but num_experts is not")


def test_granularity_multiplies_the_k_of_the_warmup_too(call):
    args, _ = call(tiny.parse, *EXPERT_FLAGS, *WARMUP, "--moe-granularity", "2")
    assert (args["moe_router_topk"], args["moe_topk_warmup_topk"]) == (2, 6)


def test_a_resumed_run_goes_on_with_the_right_k(call, tmp_path):
    changes = {"moe_relu_routing": False, "moe_router_pre_softmax": True}
    changes |= {"moe_topk_warmup_steps": STEPS, "moe_topk_warmup_topk": WARM_K}
    changes |= {"train_iters": 5, "exit_interval": 2, "run_dir": "run"}
    changes |= {"eval_interval": 9, "eval_iters": 0}
    tiny.write_config(tmp_path / "warm.yaml", **changes)
    active = []
    for _ in range(2):  # stops after steps 2 and 4
        code, out, error = call(tiny.remoe, tmp_path, "train", "warm.yaml")
        assert code == 0, out + error
        active.append([row["active_experts"] for row in training(tiny.rows(tmp_path / "run"))])
    assert active == [[3, 3], [3, 3, 3, 1]]
