"""Configs: inheritance, overrides, and the command line that they become; our flags' checks."""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

import remoe
from megatron.remoe import cpu
from megatron.remoe.options import router_name
from megatron.remoe.run import examples, kept, rundir
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.config import RunConfig, load_config
from megatron.remoe.unsupported import REFUSALS
from remoe.config import ROUTINGS
from tests.mcore import tiny


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_wins_over_its_bases_and_a_later_base_over_an_earlier(tmp_path):
    write(tmp_path / "bases/root.yaml", "lr: 1\nseed: 1\nnum_layers: 1\nhidden_size: 1\n")
    write(tmp_path / "bases/a.yaml", "base: root.yaml\nlr: 2\nseed: 2\nnum_layers: 2\n")
    write(tmp_path / "bases/b.yaml", "lr: 3\nseed: 3\n")
    path = write(tmp_path / "run.yaml", "base: [bases/a.yaml, bases/b.yaml]\nlr: 4\n")
    assert load_config(path).flags == {"lr": 4, "seed": 3, "num_layers": 2, "hidden_size": 1}


def test_a_cycle_of_bases_is_named(tmp_path):
    a = write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ValueError, match=r"form a cycle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(a)


def test_a_base_may_be_reached_twice(tmp_path):
    write(tmp_path / "root.yaml", "lr: 1\n")
    for name in "ab":
        write(tmp_path / f"{name}.yaml", f"base: root.yaml\n{name}: 1\n")
    path = write(tmp_path / "run.yaml", "base: [a.yaml, b.yaml]\n")
    assert load_config(path).flags == {"lr": 1, "a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml\n", r"nowhere\.yaml does not exist; pass the path of a YAML file"),
        ("- lr\n", r"run\.yaml is not a mapping"),
        ("lr: ${nothing}\n", r"run\.yaml: .*'nothing' not found \(in lr\); correct the value"),
        ("lr: [1\n", r"run\.yaml: line 2, column 1: .*expected .*; correct the YAML there"),
        ("nproc: 0\n", r"nproc is 0; it must be a positive number"),
        ("nproc: two\n", r"nproc is 'two'; it must be a positive number"),
    ],
)
def test_a_bad_file_is_an_error(tmp_path, text, message):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config(path)


def test_overrides_have_yaml_types(tmp_path):
    path = write(tmp_path / "run.yaml", "num_experts: 8\nlr: 1\nseed: 1\nbf16: false\nsave: x\n")
    overrides = ["lr=5e-4", "seed=2", "bf16=true", "save=null", "names=[a, b]", "split='99,1'"]
    expected = {"num_experts": 8, "lr": 5e-4, "seed": 2, "bf16": True, "save": None}
    expected |= {"names": ["a", "b"], "split": "99,1"}
    flags = load_config(path, overrides).flags
    assert flags == expected
    assert {k: type(v) for k, v in flags.items()} == {k: type(v) for k, v in expected.items()}


def test_an_override_without_equals_is_an_error(tmp_path):
    path = write(tmp_path / "run.yaml", "lr: 1\n")
    with pytest.raises(ValueError, match=r"override 'lr' is not of the form key=value"):
        load_config(path, ["seed=1", "lr"])


def test_without_experts_every_key_of_theirs_is_dropped():
    path = tiny.EXAMPLES / "quickstart.yaml"
    sparse, dense = load_config(path), load_config(path, ["num_experts=null"])
    dropped = set(sparse.flags) - set(dense.flags)
    assert dropped == {
        "num_experts",
        "moe_grouped_gemm",
        "expert_model_parallel_size",
        "moe_routing",
        "moe_router_topk",
        "moe_token_dispatcher_type",
        "moe_relu_l1_reg_coeff_init",
        "moe_relu_l1_reg_coeff_multiplier",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_router_pre_softmax",
    }
    assert dense.flags == {k: v for k, v in sparse.flags.items() if k not in dropped}


@pytest.mark.parametrize(
    ("below", "above", "chosen"),
    [
        # The three keys choose one router, and the last choice counts.
        ("moe_routing: relu", "moe_relu_routing=false", "topk"),
        ("moe_routing: relu", "moe_routing=top_p", "top_p"),
        ("moe_relu_routing: true", "moe_routing=top_p", "top_p"),
        ("moe_relu_routing: true", "moe_soft_routing=true", "soft"),
        ("moe_relu_routing: true", "moe_soft_routing=false", "relu"),
        ("moe_routing: top_p", "moe_relu_routing=false", "top_p"),
        ("moe_routing: top_p", "moe_relu_routing=true", "relu"),
        ("moe_relu_routing: false\nmoe_soft_routing: true", "moe_soft_routing=false", "topk"),
        ("moe_relu_routing: true", "moe_routing=null", "relu"),
        ("moe_routing: top_p", "lr=1", "top_p"),
    ],
)
def test_the_last_choice_of_a_router_counts(tmp_path, below, above, chosen):
    base = write(tmp_path / "base.yaml", f"num_experts: 4\n{below}\n")
    key, _, value = above.partition("=")
    file = write(tmp_path / "file.yaml", f"base: base.yaml\n{key}: {value}\n")
    for config in (load_config(base, [above]), load_config(file)):
        assert router_name(config.flags) == chosen


def test_a_config_that_chooses_two_routers_is_refused(tmp_path):
    file = write(
        tmp_path / "two.yaml", "moe_routing: top_p\nmoe_relu_routing: true\nnum_experts: 4\n"
    )
    with pytest.raises(ValueError, match="moe_routing is top_p and moe_relu_routing are both set"):
        router_name(load_config(file).flags)


def test_a_run_goes_on_whatever_key_names_its_router(tmp_path):
    """Runs of earlier versions have the published keys in their `config.yaml`."""
    published = {"num_experts": 4, "moe_relu_routing": True, "moe_soft_routing": False}
    rundir.write(RunConfig(tmp_path, 1, published))
    rundir.refuse_another_run(RunConfig(tmp_path, 1, {"num_experts": 4, "moe_routing": "relu"}))
    other = RunConfig(tmp_path, 1, {"num_experts": 4, "moe_routing": "top_p"})
    with pytest.raises(ValueError, match="holds a run that differs in moe_routing; give this one"):
        rundir.refuse_another_run(other)


def test_run_dir_and_nproc_are_not_flags(tmp_path):
    path = write(tmp_path / "tiny.yaml", "lr: 1\nrun_dir: here\nnproc: 2\n")
    assert load_config(path) == RunConfig(Path("here"), 2, {"lr": 1})
    assert load_config(path, ["run_dir=there", "nproc=1"]) == RunConfig(Path("there"), 1, {"lr": 1})


def test_variations_of_a_file_get_directories_of_their_own(tmp_path):
    path = write(tmp_path / "tiny.yaml", "lr: 1\n")
    assert load_config(path).run_dir == Path("runs/tiny")
    varied = load_config(path, ["lr=2", "data_path=a/b"]).run_dir
    assert varied == Path("runs/tiny-lr=2-data_path=a_b")


def test_a_resolved_config_round_trips(tmp_path):
    path = write(
        tmp_path / "run.yaml",
        "lr: 1.0e-8\nmin_lr: ${lr}\nbf16: true\nsave: null\nsplit: '99,1,0'\npaths: [1, a, 2, b]\n"
        "seed: 1234\nrun_dir: here\nnproc: 2\n",
    )
    config = load_config(path)
    again = load_config(write(tmp_path / "resolved.yaml", config.to_yaml()))
    assert again == config
    assert again.flags["min_lr"] == 1e-8 and again.flags["save"] is None


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("--paths", nargs="*")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-rope", action="store_false", dest="rope")
    parser.add_argument("--fusion", action=argparse.BooleanOptionalAction, default=True)
    return parser


@pytest.mark.parametrize(
    ("flags", "argv"),
    [
        ({"lr": 1e-8}, ["--lr", "1e-08"]),
        ({"lr": None, "paths": None, "bf16": None, "fusion": None}, []),
        ({"bf16": True, "no_rope": True}, ["--bf16", "--no-rope"]),
        ({"bf16": False, "no_rope": False}, []),
        ({"fusion": True}, ["--fusion"]),
        ({"fusion": False}, ["--no-fusion"]),
        ({"no_fusion": True}, ["--no-fusion"]),
        ({"no_fusion": False}, ["--fusion"]),
        ({"paths": [1, "a", 2, "b"]}, ["--paths", "1", "a", "2", "b"]),
    ],
)
def test_flags_become_a_command_line_that_parses(parser, flags, argv):
    assert to_argv(flags, parser) == argv
    parser.parse_args(argv)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"path": 1}, "unknown config key 'path'; did you mean 'paths'?"),
        ({"bf6": True}, "unknown config key 'bf6'; did you mean 'bf16'?"),
        ({"rundir": "x"}, "unknown config key 'rundir'; did you mean 'run_dir'?"),
        ({"bf16": "yes"}, "config key 'bf16' is 'yes'; it must be true or false"),
        ({"lr": {"a": 1}}, "config key 'lr' is a mapping; flags take values or lists"),
    ],
)
def test_keys_and_values_are_checked(parser, flags, message):
    with pytest.raises(ValueError) as error:
        to_argv(flags, parser)
    assert str(error.value) == message


def test_an_example_that_is_not_here_is_the_installed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = Path("examples/llama_182m/remoe.yaml")
    assert examples.config_file(name) == examples.FOLDER / "llama_182m/remoe.yaml"
    assert capsys.readouterr().err == (
        f"{name} does not exist here; reading the example of remoe {remoe.__version__}\n"
    )
    for other in ("examples/none.yaml", "mine/quickstart.yaml", "examples", "quickstart.yaml"):
        assert examples.config_file(Path(other)) == Path(other)
    examples.copy(Path("examples"))
    assert examples.config_file(name) == name
    assert capsys.readouterr().err == ""
    whole = load_config(name)  # with its bases, which are copied too
    assert whole.to_dict() == load_config(examples.FOLDER / "llama_182m/remoe.yaml").to_dict()
    with pytest.raises(ValueError, match="examples is not empty; name a folder that does not"):
        examples.copy(Path("examples"))
    assert [path.name for path in tmp_path.iterdir()] == ["examples"]


def test_examples_are_listed_with_the_paths_that_commands_take():
    listed = dict(examples.summaries())
    known = {str(p.relative_to(tiny.EXAMPLES.parent)) for p in tiny.EXAMPLES.rglob("*.yaml")}
    assert set(listed) == {name for name in known if "/bases/" not in name}
    assert listed["examples/llama_182m/remoe.yaml"] == "LLaMA with 182M active parameters, ReMoE."
    assert all(len(sentence) > 20 for sentence in listed.values())


def example_command_lines() -> dict[str, list[str]]:
    from megatron.remoe.arguments import megatron_parser

    parser = megatron_parser()
    paths = (p for p in tiny.EXAMPLES.rglob("*.yaml") if "sweep:" not in p.read_text())
    names = sorted(str(path.relative_to(tiny.EXAMPLES)) for path in paths)
    # This one needs no other data than those that a user brings.
    given = {"own_corpus.yaml": ["mock_data=true", "tokenizer_type=NullTokenizer"]}
    argvs = {
        name: to_argv(load_config(tiny.EXAMPLES / name, given.get(name)).flags, parser)
        for name in names
    }
    for argv in argvs.values():
        parser.parse_args(argv)
    return argvs


def test_every_example_is_made_of_known_flags_with_valid_values(call):
    argvs = call(example_command_lines)
    assert {"quickstart.yaml", "bases/llama.yaml"} <= argvs.keys()
    assert {"--moe-routing", "--swiglu"} <= set(argvs["quickstart.yaml"])


EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2"]
RELU = [*EXPERTS, "--moe-relu-routing"]


@pytest.mark.parametrize("width", [["--ffn-hidden-size", "64"], ["--moe-ffn-hidden-size", "64"]])
@pytest.mark.parametrize("router", [EXPERTS, RELU])
def test_granularity_splits_experts_once(call, router, width):
    args, _ = call(tiny.parse, *router, *width, "--moe-granularity", "4")
    assert (args["num_experts"], args["moe_router_topk"], args["moe_ffn_hidden_size"]) == (
        16,
        8,
        16,
    )
    # The width of dense layers, if there are any, is not an expert's.
    assert args["ffn_hidden_size"] == (64 if width[0] == "--ffn-hidden-size" else None)


def test_granularity_is_applied_once_from_command_line_to_model(call, tmp_path):
    path = tiny.write_config(tmp_path / "tiny.yaml", moe_granularity=2, run_dir=..., nproc=...)
    saved, built = call(shapes_of, path)
    assert saved == built == (8, 2, 32)


def shapes_of(path: Path) -> list[tuple[int, int, int]]:
    from megatron.remoe.arguments import megatron_parser

    return tiny.shapes(*to_argv(load_config(path).flags, megatron_parser()))


def test_relu_routing_needs_no_flags_of_the_softmax_router(call):
    args, _ = call(tiny.parse, *RELU)
    assert args["moe_router_pre_softmax"] and args["moe_router_dtype"] == "fp32"
    assert args["moe_router_load_balancing_type"] == "none"
    topk, _ = call(tiny.parse, *EXPERTS, "--moe-router-load-balancing-type", "aux_loss")
    assert not topk["moe_router_pre_softmax"]
    assert topk["moe_router_load_balancing_type"] == ["aux_loss"]


WIDE = ["--ffn-hidden-size", "64"]
SOFT = ["--num-experts", "4", "--moe-soft-routing", "--masked-lm"]
NAMED = ["--num-experts", "4", "--moe-routing"]


def test_soft_routing_needs_no_flags_of_the_topk_router(call):
    args, error = call(tiny.parse, *SOFT, "--tensor-model-parallel-size", "2")
    assert not error
    assert args["moe_router_pre_softmax"] and args["moe_router_load_balancing_type"] == "none"
    assert args["expert_tensor_parallel_size"] == 1 and args["sequence_parallel"]
    assert args["moe_soft_slots_per_expert"] == 1
    assert not args["create_attention_mask_in_dataloader"]


def test_ranks_share_the_experts_of_a_soft_mixture_after_granularity(call):
    flags = ["--moe-granularity", "2", "--ffn-hidden-size", "64"]
    args, error = call(tiny.parse, *SOFT, *flags, "--expert-model-parallel-size", "8")
    assert not error and args["num_experts"] == 8 and args["moe_ffn_hidden_size"] == 32
    _, error = call(tiny.parse, *SOFT, *flags, "--expert-model-parallel-size", "16")
    assert "expert_model_parallel_size is 16, and 8 experts cannot be shared" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--num-experts", "4", "--moe-router-topk", "5", *WIDE, "--moe-granularity", "2"],
            "topk is 10 of 8 experts (topk 5, num_experts 4, granularity 2); choose topk between",
        ),
        (
            [*RELU, *WIDE, "--moe-granularity", "3"],
            "granularity 3 does not divide the expert width 64; choose a granularity that divides",
        ),
        ([*RELU, *WIDE, "--moe-granularity", "0"], "granularity is 0; it must be at least 1"),
        (
            [*RELU, "--moe-granularity", "2"],
            "moe_granularity is 2, but the width that it divides is not given; pass --moe-ffn-hid",
        ),
        (
            [*RELU, "--moe-token-dispatcher-type", "flex"],
            "moe_token_dispatcher_type is flex, which ReLU routing refuses",
        ),
        (
            [*RELU, "--context-parallel-size", "2", "--transformer-impl", "local"],
            "context_parallel_size is 2, but the attention of transformer_impl local",
        ),
        (
            ["--context-parallel-size", "2", "--transformer-impl", "local"],
            "context_parallel_size is 2, but the attention of transformer_impl local",
        ),
        (
            ["--moe-relu-routing"],
            "moe_relu_routing is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            ["--moe-granularity", "2"],
            "moe_granularity is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            [*RELU, "--moe-relu-l1-reg-coeff-init", "0"],
            "moe_relu_l1_reg_coeff_init is 0.0; it must be a finite number that is above 0",
        ),
        (
            [*RELU, "--moe-relu-l1-reg-coeff-multiplier", "1"],
            "moe_relu_l1_reg_coeff_multiplier is 1.0; it must be a finite number that is above",
        ),
        (
            [*RELU, "--moe-relu-load-balancing", "softmax"],
            "argument --moe-relu-load-balancing: invalid choice: 'softmax'",
        ),
        (
            ["--spec", "local"],
            "spec is local, but our layers take its place; leave it out",
        ),
        (
            ["--heterogeneous-layers-config-path", "x.json"],
            "heterogeneous_layers_config_path is x.json, but our layers are all alike",
        ),
        (
            ["--experimental-attention-variant", "gated_delta_net"],
            "experimental_attention_variant is gated_delta_net, but it needs layers of its own",
        ),
        (["--yaml-cfg", "x.yaml"], "yaml_cfg is x.yaml, but its arguments take the place of all"),
        (
            [*RELU, "--moe-routing-trace-path", "trace"],
            "moe_routing_trace_path is trace, but Megatron traces the k experts of a TopK router",
        ),
        (
            ["--reset-attention-mask", "--no-create-attention-mask-in-dataloader"],
            "reset_attention_mask is set, but no_create_attention_mask_in_dataloader leaves no",
        ),
        (
            ["--transformer-impl", "inference_optimized"],
            "transformer_impl is inference_optimized, but it does not train; use local or",
        ),
        (
            ["--transformer-impl", "local", "--multi-latent-attention"],
            "multi_latent_attention is set, but it has not been run with transformer_impl local",
        ),
        (
            ["--transformer-impl", "local", "--qk-layernorm", "--tensor-model-parallel-size", "2"],
            "qk_layernorm is set, but the norms of transformer_impl local cannot be split over",
        ),
        (
            ["--transformer-impl", "local", "--recompute-modules", "layernorm"],
            "recompute_modules is layernorm, but Megatron recomputes layernorm with Transformer",
        ),
        (
            ["--transformer-impl", "local", "--attention-backend", "flash"],
            "attention_backend is flash, but the layers of transformer_impl local ignore it",
        ),
        (
            ["--transformer-impl", "local", "--use-grouped-gemm-for-dense-mlp"],
            "use_grouped_gemm_for_dense_mlp is set, but the layers of transformer_impl local",
        ),
        (
            ["--transformer-impl", "local", "--save-tokens-per-expert-interval", "1"],
            "save_tokens_per_expert_interval is 1, but Megatron takes what it saves from Transf",
        ),
        (
            ["--transformer-impl", "local", "--te-precision-config-file", "x.yaml"],
            "te_precision_config_file is x.yaml, but it is for layers of Transformer Engine",
        ),
        (
            ["--transformer-impl", "local", "--apply-layernorm-1p"],
            "apply_layernorm_1p is set, but the norms of transformer_impl local do not have it",
        ),
        (
            ["--transformer-impl", "local", "--bf16", "--fp32-residual-connection"],
            "fp32_residual_connection is set, but the norms of transformer_impl local hand on fp32",
        ),
        (
            ["--transformer-impl", "local", "--cpu-offloading-num-layers", "1"],
            "cpu_offloading_num_layers is 1, but Megatron offloads activations with Transformer",
        ),
        (
            ["--moe-router-recurrence", "gru"],
            "moe_router_recurrence is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            ["--num-experts", "4", "--moe-router-recurrent-size", "64"],
            "moe_router_recurrent_size is 64, but moe_router_recurrence is none; choose gru or rnn",
        ),
        (
            ["--num-experts", "4", "--moe-router-recurrence", "rnn", "--mtp-num-layers", "1"],
            "mtp_num_layers is 1, which a recurrent router refuses: layers of multi-token",
        ),
        *(
            (
                ["--num-experts", "4", *relu, "--moe-router-recurrence", "gru", f"--{flag}"],
                f"{flag.replace('-', '_')} is True, which a recurrent router refuses: {why}",
            )
            for relu in ([], ["--moe-relu-routing"])
            for flag, why in (
                ("fp32-residual-connection", "the state has columns for the dtype of the weights"),
                ("fused-residual-rmsnorm", "the fused norm hands on residuals without the state"),
                ("fine-grained-activation-offloading", "it has not been run with hidden states"),
            )
        ),
        (
            ["--num-experts", "4", "--moe-soft-routing"],
            "moe_routing is soft, but the model is causal: a slot of Soft MoE is a mean of all",
        ),
        (
            ["--num-experts", "4", "--moe-routing", "expert_choice"],
            "moe_routing is expert_choice, but the model is causal: an expert of Expert Choice com",
        ),
        (
            ["--num-experts", "4", "--moe-routing", "top-p"],
            "moe_routing is top-p, which is no router; choose one of relu, relu_rms, relu_l2, topk",
        ),
        (
            [*RELU, "--moe-routing", "top_p"],
            "moe_routing is top_p and moe_relu_routing are both set; choose one router",
        ),
        (
            ["--moe-routing", "top_p"],
            "moe_routing is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            [*NAMED, "hash", "--pipeline-model-parallel-size", "2"],
            "pipeline_model_parallel_size is 2, which hash routing refuses: the ids of the tokens",
        ),
        (
            [*NAMED, "hash", "--moe-router-recurrence", "gru"],
            "moe_router_recurrence is set, but it is a setting of ReLU routing, and the router is",
        ),
        (
            [*NAMED, "hash", "--moe-relu-max-assignments", "64"],
            "moe_relu_max_assignments is 64, but hash routing always has the same number of",
        ),
        (
            [*NAMED, "top_p", "--moe-top-p-init", "1.0"],
            "moe_top_p_init is 1.0; it must be a finite number that is in (0, 1) (it can be left",
        ),
        (
            [*NAMED, "top_p", "--moe-router-score-function", "sigmoid"],
            "moe_router_score_function is sigmoid, which top-p routing refuses: top-p routing has",
        ),
        (
            [*NAMED, "expert_threshold", "--moe-expert-capacity-factor", "1.0"],
            "moe_expert_capacity_factor is 1.0, which expert threshold routing refuses: every",
        ),
        (
            [*NAMED, "null_experts", "--moe-null-experts", "3"],
            "num_null_experts is 3, with which a token would choose 2 x (4 + 3) / 4 experts, which",
        ),
        (
            [*NAMED, "null_experts", "--moe-router-enable-expert-bias"],
            "moe_router_enable_expert_bias is True, which TopK routing with null experts refuses",
        ),
        (
            [
                *NAMED,
                "expert_choice",
                "--masked-lm",
                "--seq-length",
                "30",
                "--moe-router-topk",
                "1",
            ],
            "a sequence has 30 tokens, of which each of 4 experts would choose 1 x 30 / 4, which",
        ),
        (
            ["--num-experts", "4", "--moe-top-p-multiplier", "1.5"],
            "moe_top_p_multiplier is set, but it is a setting of top-p routing, and the router is",
        ),
        (
            [*RELU, "--moe-soft-routing", "--masked-lm"],
            "moe_relu_routing and moe_soft_routing are both set; choose one router",
        ),
        (
            ["--moe-soft-routing", "--masked-lm"],
            "moe_soft_routing is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            [*SOFT, "--moe-soft-slots-per-expert", "0"],
            "moe_soft_slots_per_expert is 0; it must be a whole number that is at least 1",
        ),
        (
            ["--num-experts", "4", "--moe-soft-slots-per-expert", "2"],
            "moe_soft_slots_per_expert is set, but it is a setting of Soft MoE, and the router is",
        ),
        (
            [*SOFT, "--moe-router-recurrence", "gru"],
            "moe_router_recurrence is set, but it is a setting of ReLU routing, and the router is",
        ),
        (
            [*SOFT, "--moe-layer-freq", "[0,0]"],
            "moe_layer_freq is [0, 0], with which no layer is a Soft MoE; give a layer experts, or",
        ),
        (
            [*SOFT, "--expert-model-parallel-size", "8"],
            "expert_model_parallel_size is 8, and 4 experts cannot be shared by so many ranks",
        ),
        (
            [*SOFT, "--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "2"],
            "expert_tensor_parallel_size is 2, which Soft MoE refuses: an expert of Soft MoE is on",
        ),
        (
            [*SOFT, "--moe-z-loss-coeff", "0.1"],
            "moe_z_loss_coeff is 0.1, which Soft MoE refuses: the router of Soft MoE selects",
        ),
        (
            [*SOFT, "--moe-router-load-balancing-type", "sinkhorn"],
            "moe_router_load_balancing_type is sinkhorn, which Soft MoE refuses: nothing has to be",
        ),
        (
            [*SOFT, "--moe-router-topk", "3"],
            "moe_router_topk is 3, which Soft MoE refuses: every token is in every slot",
        ),
        (
            [*SOFT, "--moe-router-score-function", "sigmoid"],
            "moe_router_score_function is sigmoid, which Soft MoE refuses: the router of Soft",
        ),
        (
            [*SOFT, "--moe-expert-capacity-factor", "1.5"],
            "moe_expert_capacity_factor is 1.5, which Soft MoE refuses",
        ),
        (
            [*SOFT, "--reset-attention-mask"],
            "reset_attention_mask is set, but the tokens of masked_lm see the whole sequence",
        ),
        (
            [*SOFT, "--reset-position-ids"],
            "reset_position_ids is True, which Soft MoE refuses: a slot would mix the documents",
        ),
        (
            ["--masked-lm", "--eod-mask-loss"],
            "eod_mask_loss is set, but masked_lm never hides the end of a document",
        ),
        (
            ["--moe-change-routing"],
            "moe_change_routing is set but num_experts is not; pass --num-experts, or leave",
        ),
        (
            ["--metrics-file", "m", "--log-interval", "5", "--tensorboard-log-interval", "2"],
            "log_interval is 5, no multiple of tensorboard_log_interval 2",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line_with_the_remedy(call, argv, message):
    args, error = call(tiny.parse, *argv)
    assert args == {}
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_router_without_k_experts_of_every_token_is_not_traced():
    """Megatron's tracer leaves out, without a word, tokens of which it does not find k experts."""
    refused = next(r.when for r in REFUSALS if r.name == "moe_routing_trace_path")
    assert refused is not None
    with mock.patch.object(cpu, "is_enabled", return_value=False):
        traced = [
            name
            for name in ROUTINGS
            if not refused(argparse.Namespace(num_experts=4, moe_routing=name))
        ]
    assert traced == ["topk"]


def test_a_run_keeps_its_tokenizer_and_refuses_another(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    write(source / "tokenizer.json", "{}")
    write(source / "model.safetensors", "weights")
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(source)}
    config = RunConfig(run, 1, flags)
    rundir.write(config)
    assert [file.name for file in (run / "tokenizer").iterdir()] == ["tokenizer.json"]
    source.rename(tmp_path / "elsewhere")
    resolved = replace(config, flags=kept.resolve(flags, run))
    assert resolved.flags["tokenizer_model"] == str(run / "tokenizer")
    rundir.refuse_another_run(resolved)
    rundir.write(resolved)
    assert load_config(run / "config.yaml").flags == flags  # so that the same command goes on
    other = flags | {"tokenizer_model": "nowhere"}
    assert kept.resolve(other, run) == other
    with pytest.raises(ValueError, match="holds a run that differs in tokenizer_model"):
        rundir.refuse_another_run(replace(config, flags=other))
    elsewhere = replace(config, flags=flags | {"tokenizer_model": str(tmp_path / "elsewhere")})
    rundir.refuse_another_run(elsewhere)
    write(tmp_path / "elsewhere/tokenizer.json", "[]")
    with pytest.raises(ValueError, match=r"elsewhere/tokenizer.json differs from .*--force"):
        rundir.refuse_another_run(elsewhere)
    rundir.write(elsewhere)
    assert (run / "tokenizer/tokenizer.json").read_text() == "[]"


def test_a_run_keeps_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    def save(flags, folder):
        write(folder / "tokenizer.json", flags["tokenizer_model"])
        return True

    monkeypatch.setattr(kept, "_save_from_hub", save)
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "some/model"}
    rundir.write(RunConfig(tmp_path, 1, flags))
    resolved = kept.resolve(flags, tmp_path)  # without a network it goes on as well
    assert resolved["tokenizer_model"] == str(tmp_path / "tokenizer")
    other = flags | {"tokenizer_model": "other/model"}
    assert kept.resolve(other, tmp_path) == other
    rundir.write(RunConfig(tmp_path, 1, other))
    assert (tmp_path / "tokenizer/tokenizer.json").read_text() == "other/model"


def test_the_config_of_a_copied_run_is_that_of_the_copy(tmp_path):
    text = (
        "run_dir: a/run\nsave: a/run/checkpoints\nload: a/runs\nmetrics_file: a/run/metrics.jsonl\n"
    )
    path = write(tmp_path / "copy/config.yaml", text)
    assert load_config(path).run_dir == Path("a/run")  # this is a config of somebody's, and no run
    write(tmp_path / "copy/metrics.jsonl", "")
    config = load_config(path)
    assert config.run_dir == tmp_path / "copy"
    assert config.flags["save"] == str(tmp_path / "copy/checkpoints")
    assert config.flags["load"] == "a/runs"
