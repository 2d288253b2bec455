"""Megatron's `HybridModel` with our layers: the run of a GPT model, its checkpoints, bad patterns.

The layouts are in `test_parallel`, and the published trajectories in `tests/golden`.
"""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron.remoe import pattern
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.run.config import load_config
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.cells import run_cell, save_golden_weights
from megatron.remoe.testing.golden import CLOSED_LOOP
from megatron.remoe.train import saved
from megatron.remoe.verify.trajectories import FP32, deviations
from tests.mcore import tiny

CONFIG = CLOSED_LOOP | {"L": 4, "moe_layer_freq": (0, 1, 0, 1)}
MEASURED = {"lm_loss", "grad_norm", "sparsity", "sparsity_per_layer", "l1_reg", "l1_coeff_used"}


def trajectory(host, folder, **changes):
    cell = Cell("one rank", host=host, **changes)
    weights = Path(folder) / host
    save_golden_weights(cell, CONFIG, weights)
    return run_cell(cell, CONFIG, 6, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer": True},
        {"recurrence": "gru"},
        {"recompute": "full"},
        {"max_assignments": 64},
        {"dtype": "bf16"},
    ],
    ids=str,
)
def test_trains_the_run_of_a_gpt_model_with_the_same_weights(call, tmp_path, changes):
    """Layers with experts are every fourth letter; numbers of letters and of layers differ."""
    gpt, hybrid = (call(trajectory, host, str(tmp_path), **changes) for host in ("gpt", "hybrid"))
    assert hybrid[0].keys() >= MEASURED
    assert len(hybrid[0]["sparsity_per_layer"]) == 2
    for key, deviation in deviations(hybrid, gpt).items():
        assert deviation <= FP32.get(key, 1e-5), key


def test_a_pattern_on_the_command_line_needs_no_quotes_of_yaml(tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml")
    for given in ("*E*E", "'*E*E'", "*E|*E", "-*E*", "|*E*E"):
        config = load_config(tmp_path / "tiny.yaml", [f"hybrid_layer_pattern={given}"])
        assert config.flags["hybrid_layer_pattern"] == given.strip("'")


def test_names_and_layers_of_the_equivalent_gpt_model():
    assert pattern.gpt_layers("*-|*E") == [0, 1]
    assert pattern.of_gpt([0, 1]) == "*-*E"
    for other in ("E*", "**EE", "*E*", "M*E", ""):
        assert pattern.gpt_layers(other) is None
    names = {
        "decoder.layers.2.self_attention.linear_qkv.weight": "decoder.layers.1.self_attention."
        "linear_qkv.weight",
        "decoder.layers.3.mlp.router.weight": "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.linear_fc1.weight": "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.final_norm.weight": "decoder.final_layernorm.weight",
        "decoder.recurrent_cell.bias_ih": "decoder.recurrent_cell.bias_ih",
    }
    assert {name: pattern.gpt_name(name, "*-|*E") for name in names} == names


def test_counts_the_equivalent_gpt_model():
    flags = {
        "hidden_size": 64, "num_attention_heads": 4, "padded_vocab_size": 256, "seq_length": 32,
        "ffn_hidden_size": 128, "num_experts": 8, "disable_bias_linear": True, "swiglu": True,
    }  # fmt: skip
    gpt = ModelSize.from_flags(flags | {"num_layers": 2, "moe_layer_freq": "[0,1]"})
    assert ModelSize.from_flags(flags | {"hybrid_layer_pattern": "*-|*E"}) == gpt
    assert gpt.num_layers == 2 and gpt.num_moe_layers == 1
    with pytest.raises(ValueError, match=r"hybrid_layer_pattern is E\*, and only sequences"):
        ModelSize.from_flags(flags | {"hybrid_layer_pattern": "E*"})


PP2 = ("--pipeline-model-parallel-size", "2")
EXPERTS = ("--num-experts", "4", "--moe-relu-routing", "--ffn-hidden-size", "64")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("*-*-", *EXPERTS), "is *-*-, in which no layer has experts, but num_experts is 4; use E"),
        (("*E",), "is *E, with layers of experts (E), but num_experts is not set; pass --num-exp"),
        (("*E*X", *EXPERTS), "is *E*X, with the unknown letter 'X'; letters are * (attention), "),
        (
            ("*E*E", "--num-layers", "3", *EXPERTS),
            "is *E*E, which has 4 letters, but num_layers is 3; leave num_layers out, or set it to "
            "4, or 2 as a GPT model counts its layers",
        ),
        (
            ("E*", "--num-layers", "1", *EXPERTS),
            "is E*, which has 2 letters, but num_layers is 1; leave num_layers out, or set it to 2",
        ),
        (("ME*E", *EXPERTS), "is ME*E, and Mamba (M) has CUDA kernels only; use * - E on a mach"),
        (("GE*E", *EXPERTS), "is GE*E, and a gated delta net (G) has not been run with our layers"),
        (("*E/*E", *EXPERTS), "is *E/*E, and multi-token prediction (/) has not been run with our"),
        (("|", *EXPERTS), "is |, which has no layers; write one letter per layer, as in *E*E"),
        (
            ("*E|*E", *EXPERTS),
            "is *E|*E, with 2 pipeline stages, but pipeline_model_parallel_size is 1; leave | out",
        ),
        (
            ("*E|*E|*E", *PP2, *EXPERTS),
            "is *E|*E|*E, with 3 pipeline stages, but pipeline_model_parallel_size is 2; write |",
        ),
        (
            ("*E*", *PP2, *EXPERTS),
            "is *E*, with 3 letters, which 2 pipeline stages cannot share equally; write | where",
        ),
        (
            ("*E|", *PP2, "--moe-router-recurrence", "gru", *EXPERTS),
            "is *E|, with a pipeline stage without layers, and the state of recurrent routers",
        ),
    ],
)
def test_refuses_a_wrong_pattern_in_one_line(call, flags, message):
    parsed, error = call(tiny.parse, "--hybrid-layer-pattern", *flags)
    assert parsed == {}
    assert error.startswith(f"error: hybrid_layer_pattern {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--rotary-interleaved",),
            "rotary_interleaved is set, but Megatron's HybridModel ignores",
        ),
        (("--use-rope-scaling",), "use_rope_scaling is set, but Megatron's HybridModel ignores it"),
        (
            ("--position-embedding-type", "mrope"),
            "position_embedding_type is mrope, but it has not been run in hybrid models; use rope,",
        ),
        (("--no-rope-freq", "2"), "no_rope_freq is 2, but it would count all letters of hybrid_l"),
        (
            ("--window-size", "8,0", "--window-attn-skip-freq", "2"),
            "window_attn_skip_freq is 2, but it would count all letters of hybrid_layer_pattern",
        ),
    ],
)
def test_refuses_what_a_hybrid_model_would_do_otherwise(call, flags, message):
    parsed, error = call(tiny.parse, "--hybrid-layer-pattern", "*E*E", *EXPERTS, *flags)
    assert parsed == {} and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert call(tiny.parse, "--num-layers", "2", *EXPERTS, *flags)[1] == ""


@pytest.mark.parametrize("layers", ["4", "2"])
def test_accepts_the_number_of_letters_and_of_gpt_layers(call, layers):
    parsed, error = call(
        tiny.parse, "--hybrid-layer-pattern", "*E*E", "--num-layers", layers, *EXPERTS
    )
    assert error == "" and parsed["hybrid_layer_pattern"] == "*E*E"


GPT = {"num_layers": 2, "num_experts": 4, "moe_layer_freq": 1, "hybrid_layer_pattern": None}


@pytest.mark.parametrize(
    "before, now, message",
    [
        ({}, {"hybrid_layer_pattern": "E*E*"}, "is of a GPT model with the layers *E*E, and this"),
        ({}, {"hybrid_layer_pattern": "**EE"}, "is of a GPT model with the layers *E*E, and this"),
        ({}, {"hybrid_layer_pattern": "*E*E*E"}, "is of a GPT model with the layers *E*E, and"),
        (
            {"moe_layer_freq": [0, 1]},
            {"hybrid_layer_pattern": "*-*E"},
            "is of a GPT model with moe_layer_freq [0, 1], whose layers are stored one by one",
        ),
        (
            {"moe_layer_freq": [1, 1]},
            {"hybrid_layer_pattern": "*E*E"},
            "is of a GPT model with moe_layer_freq [1, 1], whose layers are stored one by one",
        ),
        (
            {"hybrid_layer_pattern": "*E*E"},
            {},
            "was trained with hybrid_layer_pattern *E*E, and this run has None; set hybrid_layer",
        ),
        (
            {"hybrid_layer_pattern": "*E*E"},
            {"hybrid_layer_pattern": "*EE*"},
            "was trained with hybrid_layer_pattern *E*E, and this run has *EE*; set hybrid_layer",
        ),
        (
            {},
            {"hybrid_layer_pattern": "*E*E", "use_distributed_optimizer": True},
            "was saved without dist_ckpt_optim_fully_reshardable, and Megatron does not load its",
        ),
    ],
)
def test_refuses_a_checkpoint_of_another_pattern(before, now, message):
    run = GPT | {"no_load_optim": False, "use_distributed_optimizer": False} | now
    with pytest.raises(ValueError) as refusal:
        saved._refuse_other_layers(
            Namespace(**run), saved.Saved(Path("x"), Namespace(**GPT | before), "relu")
        )
    assert str(refusal.value).startswith(f"checkpoint x {message}")


def test_accepts_a_checkpoint_of_the_same_layers():
    run = GPT | {"no_load_optim": False, "use_distributed_optimizer": True}
    for before, now in (({}, "*E|*E"), ({"hybrid_layer_pattern": "*E*E"}, "*E|*E")):
        given = GPT | {"dist_ckpt_optim_fully_reshardable": True} | before
        saved._refuse_other_layers(
            Namespace(**run | {"hybrid_layer_pattern": now}),
            saved.Saved(Path("x"), Namespace(**given), "relu"),
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A GPT run, a hybrid run, and a hybrid run that continues the checkpoint of the GPT run."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_config(folder / "tiny.yaml", train_iters=4, save_interval=2, eval_iters=0)

    train(folder, "run_dir=gpt")
    train(folder, "run_dir=hybrid", "hybrid_layer_pattern=*E*E")
    checkpoints = folder / "continued/checkpoints"
    shutil.copytree(folder / "gpt/checkpoints/iter_0000002", checkpoints / "iter_0000002")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    train(folder, "run_dir=continued", "hybrid_layer_pattern=*E*E")
    return folder


def train(folder: Path, *changes: str) -> None:
    process = tiny.start("train", "tiny.yaml", *changes, cwd=folder)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error


@pytest.mark.processes
def test_a_run_is_that_of_gpt_from_the_start_and_from_its_checkpoint(runs):
    keys = ("iteration", "lm_loss", "sparsity", "sparsity_per_layer", "l1_coeff", "grad_norm")
    gpt, hybrid, continued = (
        [[row[key] for key in keys] for row in tiny.rows(runs / name) if "grad_norm" in row]
        for name in ("gpt", "hybrid", "continued")
    )
    assert [row[0] for row in gpt] == [1, 2, 3, 4]
    for ours, theirs in zip([*hybrid, *continued], [*gpt, *gpt[2:]], strict=True):
        assert ours[:1] == theirs[:1]
        flat = [torch.tensor([*row[1:3], *row[3], *row[4:]]) for row in (ours, theirs)]
        torch.testing.assert_close(*flat, rtol=1e-5, atol=0)


@pytest.mark.processes
def test_exports_the_weights_of_the_gpt_model(call, runs):
    for name in ("gpt", "hybrid", "continued"):
        code, _, error = call(tiny.remoe, runs, "convert", "to-hf", name, f"hf-{name}")
        assert code == 0, error
    gpt = load_file(runs / "hf-gpt/model.safetensors")
    for name in ("hybrid", "continued"):
        ours = load_file(runs / f"hf-{name}/model.safetensors")
        assert ours.keys() == gpt.keys()
        for key, value in gpt.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
    argv = ["hybrid", "hf-hybrid", "--tokens", "7,3,99,0,41", "--new-tokens", "3"]
    code, out, error = call(tiny.remoe, runs, "convert", "verify", *argv)
    assert code == 0, out + error


@pytest.mark.processes
@pytest.mark.parametrize(
    "changes, message",
    [
        (["hybrid_layer_pattern=*-*-"], "hybrid_layer_pattern is *-*-, in which no layer has exp"),
        (["hybrid_layer_pattern=*E*X"], "hybrid_layer_pattern is *E*X, with the unknown letter"),
        (["hybrid_layer_pattern=*E*E*E"], "hybrid_layer_pattern is *E*E*E, which has 6 letters, "),
        (["hybrid_layer_pattern=ME*E"], "hybrid_layer_pattern is ME*E, and Mamba (M) has CUDA k"),
        (
            ["hybrid_layer_pattern=E*E*", "num_layers=null", "run_dir=gpt"],
            "checkpoint gpt/checkpoints/iter_0000004 is of a GPT model with the layers *E*E, and "
            "this run has hybrid_layer_pattern E*E*; set it to *E*E, leave it out, or start a new",
        ),
        (
            ["run_dir=hybrid"],
            "checkpoint hybrid/checkpoints/iter_0000004 was trained with hybrid_layer_pattern "
            "*E*E, and this run has None; set hybrid_layer_pattern to *E*E, or start a new run",
        ),
    ],
)
def test_the_command_refuses_what_cannot_be_right_and_writes_nothing(call, runs, changes, message):
    before = written(runs)
    code, _, error = call(tiny.remoe, runs, "train", "tiny.yaml", "run_dir=new", *changes)
    assert code == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert written(runs) == before


def written(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.processes
def test_the_auxiliary_loss_is_that_of_a_gpt_model(tmp_path):
    """It is the mean over layers with experts, also where a pipeline stage has none of them."""
    flags = {"moe_relu_routing": False, "moe_aux_loss_coeff": 0.01, "train_iters": 3}
    tiny.write_config(
        tmp_path / "tiny.yaml", moe_router_load_balancing_type="aux_loss", eval_iters=0, **flags
    )
    stages = ("nproc=2", "pipeline_model_parallel_size=2")
    train(tmp_path, "run_dir=gpt", "moe_layer_freq='[0,1]'", *stages)
    train(tmp_path, "run_dir=hybrid", "hybrid_layer_pattern=*-|*E", *stages)
    gpt, hybrid = (
        re.findall(r"load_balancing_loss: (\S+)", (tmp_path / name / "log.txt").read_text())
        for name in ("gpt", "hybrid")
    )
    assert len(gpt) == 3
    assert [float(loss) for loss in hybrid] == pytest.approx([float(x) for x in gpt], rel=1e-5)
    ours, theirs = ([row["lm_loss"] for row in tiny.rows(tmp_path / n)] for n in ("hybrid", "gpt"))
    assert ours == pytest.approx(theirs, rel=1e-5)
