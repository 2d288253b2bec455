"""A checkpoint goes on as what it was trained as, or not at all."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron.remoe import checkpoint
from megatron.remoe.train import saved
from tests.mcore import tiny

BOTH = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_granularity": 2}
RELU = BOTH | {"moe_relu_routing": True, "moe_relu_load_balancing": "aux_loss"}
TOPK = BOTH | {"moe_relu_routing": False, "moe_router_pre_softmax": True}
RMS = BOTH | {"moe_routing": "relu_rms", "moe_change_routing": True}
L2 = BOTH | {"moe_routing": "relu_l2"}
TOP_P = BOTH | {"moe_routing": "top_p", "moe_relu_routing": False}
GLOBAL = RELU | {"moe_relu_load_balancing": "global_batch"}
GRU = {"moe_router_recurrence": "gru", "moe_router_recurrent_size": 8}
SOFT = BOTH | {"moe_soft_routing": True, "masked_lm": True, "moe_soft_slots_per_expert": 4}
CHOICE = BOTH | {"moe_routing": "expert_choice", "masked_lm": True}
ENCODER = TOPK | {"masked_lm": True}
DENSE: dict[str, Any] = {"num_experts": None, "ffn_hidden_size": 64}
ROUTER, CELL = "decoder.layers.0.mlp.router.weight", "decoder.recurrent_cell.weight_hh"
BIAS = "decoder.layers.0.mlp.router.bias"
PURPOSE = "pass --moe-change-routing to change"


def check(folder: Path, before: dict, now: dict, tensors: tuple = ()) -> tuple[str | None, str]:
    """What is said about a checkpoint with arguments and tensors: refusal, and what is printed."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    path = folder / "iter_0000002"
    path.mkdir(parents=True)
    state: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.ones(2)) for name in ("weight", *tensors)
    }
    dist_checkpointing.save(state | ({"args": Namespace(**before)} if before else {}), str(path))
    checkpoint.write_tracker(folder, 2)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            saved.check_before_start(run(folder, **now))
        except ValueError as error:
            return str(error).removeprefix(f"checkpoint {path} "), out.getvalue()
    return None, out.getvalue()


def run(folder: Path, **changes: Any) -> Namespace:
    args = Namespace(load=str(folder), pretrained_checkpoint=None, ckpt_step=None, rank=0)
    vars(args).update(no_load_optim=False, finetune=False, adam_implementation="torch")
    vars(args).update(moe_change_routing=False, dist_ckpt_strictness="assume_ok_unexpected")
    vars(args).update(changes)
    return args


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (RELU, TOPK, "has ReLU routing, and this run has TopK routing; pass --moe-routing relu, "),
        (RELU, DENSE, "has ReLU routing, and this run has no experts; pass --moe-routing relu"),
        (TOPK, RELU, "has TopK routing, and this run has ReLU routing; pass --moe-routing topk, "),
        (TOP_P, RELU, "has top-p routing, and this run has ReLU routing; pass --moe-routing top_p"),
        (
            TOP_P,
            BOTH | {"moe_routing": "hash", "moe_change_routing": True},
            "has top-p routing, and this run has hash routing, whose routers have other weights",
        ),
        (
            TOPK,
            RMS,
            "has TopK routing, and this run has ReLU routing with RMS norm, of which only one "
            "learns gate_scale, so that the state of the optimizer does not fit; start with new",
        ),
        (
            RMS,
            TOPK | {"moe_change_routing": True},
            "has ReLU routing with RMS norm, and this run has TopK routing, of which only one lea",
        ),
        (
            L2,
            RMS | {"no_load_optim": True},
            "has ReLU routing with L2 norm, and this run has ReLU routing with RMS norm, whose rou",
        ),
        (
            RELU | {"moe_relu_l1_reg_coeff_per_layer": True},
            RELU,
            "was trained with moe_relu_l1_reg_coeff_per_layer True, and this run has False",
        ),
        (
            BOTH | {"moe_routing": "null_experts"},
            BOTH | {"moe_routing": "null_experts", "moe_null_experts": 16},
            "was trained with moe_null_experts None, and this run has 16",
        ),
        (TOP_P, TOP_P | {"moe_router_topk": 4}, "was trained with moe_router_topk 2, and this run"),
        (TOPK, DENSE, "has TopK routing, and this run has no experts; pass --num-experts and"),
        (DENSE, RELU, "has no experts, and this run has ReLU routing; leave num_experts out, "),
        (
            RELU,
            RELU | {"moe_relu_load_balancing": "none"},
            "was trained with moe_relu_load_balancing aux_loss, and this run has none; set moe",
        ),
        (
            RELU | GRU,
            RELU | {"moe_change_routing": True},
            "was trained with moe_router_recurrence gru, and this run has none, with which its",
        ),
        (
            RELU | GRU | {"masked_lm": True},
            CHOICE | {"moe_change_routing": True},
            "was trained with moe_router_recurrence gru, and this run has none, with which its",
        ),
        (
            RELU,
            TOPK | GRU | {"moe_change_routing": True},
            "was trained with moe_router_recurrence none, and this run has gru, with which its",
        ),
        (
            RELU | GRU,
            RELU | GRU | {"moe_router_recurrent_size": 4},
            "was trained with moe_router_recurrent_size 8, and this run has 4, with which its",
        ),
        (
            RELU | GRU,
            RELU | GRU | {"moe_router_recurrent_projection": "shared"},
            "was trained with moe_router_recurrent_projection layer, and this run has shared, with",
        ),
        (
            RELU | GRU,
            RELU | GRU | {"moe_router_recurrent_passing": "none"},
            "was trained with moe_router_recurrent_passing full, and this run has none; set moe",
        ),
        (
            RELU | {"moe_relu_l1_reg_coeff_rule": "pi"},
            RELU,
            "was trained with moe_relu_l1_reg_coeff_rule pi, and this run has sign; continue it",
        ),
        (
            RELU | {"moe_relu_start_sparse": True},
            RELU | {"moe_change_routing": True},
            "was trained with moe_relu_start_sparse, which no longer exists: its routers have a bi",
        ),
        (
            RELU | {"moe_relu_max_active_experts": 4},
            RELU,
            "was trained with moe_relu_max_active_experts 4, and this run has None",
        ),
        (
            RELU,
            RELU | {"moe_relu_at_least_one_expert": True},
            "was trained with moe_relu_at_least_one_expert False, and this run has True",
        ),
        (
            RELU,
            RELU | {"num_experts": 4, "moe_ffn_hidden_size": 64, "moe_granularity": 1},
            "has num_experts 8 (with moe_granularity 2), and this run 4 (with moe_granularity 1)",
        ),
        (
            RELU,
            RELU | {"moe_ffn_hidden_size": None, "ffn_hidden_size": 64},
            "has moe_ffn_hidden_size 32 (with moe_granularity 2), and this run 64 (with",
        ),
        (RELU, RELU | {"moe_router_topk": 4}, "was trained with moe_router_topk 2, and this run"),
        (TOPK, TOPK | {"moe_router_topk": 4}, "was trained with moe_router_topk 2, and this run"),
        (
            TOPK,
            TOPK | {"moe_router_pre_softmax": False},
            "was trained with moe_router_pre_softmax True, and this run has False",
        ),
        (RELU | {"adam_implementation": "apex"}, RELU, "holds the state of Adam of apex, and this"),
        (TOPK, ENCODER, "was trained with masked_lm False, and this run has True: one sees all"),
        (SOFT, ENCODER, "has Soft MoE, and this run has TopK routing, whose routers have other"),
        (
            ENCODER,
            SOFT | {"moe_change_routing": True},
            "has TopK routing, and this run has Soft MoE, whose routers have other weights; pass",
        ),
        (
            SOFT,
            SOFT | {"moe_soft_slots_per_expert": 8, "moe_change_routing": True},
            "has moe_soft_slots_per_expert 4 (with moe_granularity 2), and this run 8 (with moe_g",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_the_remedy(
    call, tmp_path, before, now, message
):
    refusal, _ = call(check, tmp_path, before, now)
    assert refusal is not None and refusal.startswith(message)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("before", "tensors", "now", "refused"),
    [
        # The tensors say it where the arguments do not, or say otherwise.
        ({}, ("decoder.layers.0.mlp.router.l1_coeff",), TOPK, "has ReLU routing"),
        (BOTH, ("decoder.layers.0.mlp.router.l1_coeff",), TOPK, "has ReLU routing"),
        ({}, ("decoder.layers.0.mlp.router.l1_coeff",), RELU, None),
        ({}, (ROUTER, BIAS, "decoder.layers.0.mlp.router.l1_coeff"), TOPK, "has ReLU routing"),
        ({}, ("decoder.layers.0.mlp.router.odds",), RELU, "has top-p routing"),
        ({}, ("decoder.layers.0.mlp.router.odds",), TOP_P, None),
        ({}, (ROUTER,), RELU, "has TopK routing"),
        ({}, (ROUTER,), TOPK, None),
        ({}, (), DENSE, None),
        (
            {},
            (ROUTER, CELL),
            TOPK,
            "has the cell of recurrent routers, and this run has",
        ),
        (
            {},
            (ROUTER,),
            TOPK | GRU,
            "has no cell of recurrent routers, and this run has",
        ),
        ({}, (ROUTER, CELL), TOPK | GRU, None),
        # Arguments of Megatron's own, and of the first of our runs.
        (BOTH, (), BOTH | {"moe_relu_routing": False}, None),
        (BOTH | {"moe_relu_routing": True}, (), RELU, None),
    ],
)
def test_old_checkpoints_and_those_without_arguments(call, tmp_path, before, tensors, now, refused):
    refusal, out = call(check, tmp_path, before, now, tensors)
    assert refusal is None if refused is None else refusal.startswith(refused)
    assert out == ""


def test_a_change_on_purpose_passes_and_is_said(call, tmp_path):
    now = TOPK | {"moe_change_routing": True, "moe_router_topk": 4}
    refusal, out = call(check, tmp_path / "router", RELU, now)
    assert refusal is None
    assert "remoe: warning: moe_routing was relu in " in out and "and is now topk\n" in out
    assert "remoe: warning: moe_router_topk was 2 in " in out
    # What Megatron has always let pass: a setting of training.
    before, now = ({"moe_relu_l1_reg_coeff_multiplier": x} for x in (1.2, 1.5))
    refusal, out = call(check, tmp_path / "multiplier", RELU | before, RELU | now)
    assert refusal is None
    assert "moe_relu_l1_reg_coeff_multiplier was 1.2 in " in out and "and is now 1.5\n" in out


@pytest.mark.parametrize(
    ("before", "tensors", "now", "expected"),
    [
        (TOPK, (), RELU, "log_unexpected"),
        (RELU, ("l1_coeff",), RELU, "assume_ok_unexpected"),
        (RELU, ("l1_coeff",), TOPK, "assume_ok_unexpected"),
        (RELU, ("l1_coeff",), GLOBAL, "log_unexpected"),
        (GLOBAL, ("l1_coeff", "load"), RELU, "assume_ok_unexpected"),
        (TOPK, (), RMS | {"no_load_optim": True}, "log_unexpected"),
    ],
)
def test_state_that_the_checkpoint_lacks_need_not_be_found(
    call, tmp_path, before, tensors, now, expected
):
    assert call(strictness, tmp_path, before, tensors, now) == expected


def strictness(folder: Path, before: dict, tensors: tuple[str, ...], now: dict) -> str:
    """Of loading, for a run that may change the router."""
    check(folder, before, before, tuple(f"decoder.layers.0.mlp.router.{t}" for t in tensors))
    args = run(folder, **now | {"moe_change_routing": True})
    with contextlib.redirect_stdout(io.StringIO()):
        saved.check_before_start(args)
    return args.dist_ckpt_strictness


def test_the_checkpoint_is_the_one_that_megatron_will_load(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        for iteration in (2, 4):
            (folder / f"iter_{iteration:07d}").mkdir(parents=True)
        checkpoint.write_tracker(folder, 4)

    def found(**changes: Any) -> Path | None:
        return saved.to_be_loaded(run(mine, **changes))

    assert found() == mine / "iter_0000004"
    assert found(ckpt_step=2) == mine / "iter_0000002"
    assert found(pretrained_checkpoint=str(other)) == mine / "iter_0000004"
    (mine / checkpoint.TRACKER).unlink()
    assert found() is None
    assert found(pretrained_checkpoint=str(other)) == other / "iter_0000004"
    (other / checkpoint.TRACKER).write_text(checkpoint.RELEASE)
    (other / checkpoint.RELEASE).mkdir()
    assert found(load=None, pretrained_checkpoint=str(other)) == other / checkpoint.RELEASE
    assert found(load=None) is None


def test_a_damaged_checkpoint_is_left_to_the_search_for_another(call, tmp_path):
    assert call(check_damaged, tmp_path) is None


def check_damaged(folder: Path) -> str | None:
    check(folder, RELU, RELU)
    for file in (folder / "iter_0000002").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match="cannot be read"):
        saved.read(folder / "iter_0000002")
    return saved.check_before_start(run(folder, **TOPK))


def test_configure_refuses_what_it_cannot_configure(call):
    refusals = call(refusals_of_configure)
    assert refusals[0].startswith("the model's config is a HybridModelConfig, whose layers cannot")
    assert refusals[1].startswith("the model's config is a OtherBuilder, whose layers cannot")
    assert refusals[2].startswith("transformer_layer_spec of the GPTModelConfig is set already")


def refusals_of_configure() -> list[str]:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron.remoe.arguments import configure

    class OtherBuilder(GPTModelConfig):
        builder = "megatron.training.models.hybrid.HybridModelBuilder"

    with contextlib.redirect_stderr(io.StringIO()):
        args = Namespace(**tiny.parse("--num-experts", "4", "--moe-relu-routing")[0])
    transformer = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    configs = (
        HybridModelConfig(transformer=transformer, hybrid_layer_pattern="*E"),
        OtherBuilder(transformer=transformer),
        GPTModelConfig(transformer=transformer, transformer_layer_spec=lambda config: None),
    )
    messages = []
    for config in configs:
        with pytest.raises(ValueError) as refusal:
            configure(config, args)
        messages.append(str(refusal.value))
    return messages
