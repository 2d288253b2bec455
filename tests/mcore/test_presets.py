"""The published configs: what they say, what they count to, and that shrunken ones run."""

import contextlib
import json
import math
import os
import random
import struct
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zstandard
from torch.utils.flop_counter import FlopCounterMode

from megatron.remoe.analysis import wandb_run
from megatron.remoe.analysis.memory import RankLoad, activation_bytes
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.ranks import Ranks, initialize_layout
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.config import load_config
from remoe import SoftMoELayer, SoftMoELayerConfig
from remoe.config import ROUTINGS
from remoe.kernels.backend import has_triton
from tests.mcore import tiny
from tests.mcore.test_metrics import ROUTING
from tests.mcore.test_train import finish, training

EXAMPLES = tiny.EXAMPLES
SHRUNK = [
    "num_layers=2",
    "hidden_size=64",
    "ffn_hidden_size=128",
    "num_attention_heads=4",
    "seq_length=32",
    "max_position_embeddings=32",
    "micro_batch_size=1",
    "global_batch_size=8",
    # of torch's own optimizer and experts, until those of a GPU are there
    "use_distributed_optimizer=false",
    "moe_grouped_gemm=false",
]


def preset(size: str, router: str, *overrides: str) -> dict:
    return load_config(EXAMPLES / f"llama_{size}/{router}.yaml", list(overrides)).flags


PUBLISHED = {
    "seq_length": 1024, "global_batch_size": 512, "train_iters": 60000, "lr": 5e-4, "min_lr": 5e-5,
    "lr_decay_style": "cosine", "lr_warmup_fraction": 0.01, "clip_grad": 1.0, "bf16": True,
    "init_method_std": 0.01, "untie_embeddings_and_output_weights": True, "rotary_base": 1000000,
    "position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm",
    "group_query_attention": True, "num_query_groups": 4, "padded_vocab_size": 51200,
    "split": "969,30,1", "micro_batch_size": 16, "eval_interval": 1000, "eval_iters": 100,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.01,
}  # fmt: skip
SIZES = {"182m": (12, 768, 12), "469m": (24, 1024, 16), "978m": (24, 1536, 16)}
PARAMS = {"182m": ("182.5M", "777.0M"), "469m": ("469.8M", "2.58B"), "978m": ("978.4M", "5.73B")}
GFLOPS = {"182m": 995, "469m": 2873, "978m": 5991}


@pytest.mark.parametrize("router", ["dense", "moe", "moe_warmup", "remoe"])
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_every_published_value(size, router):
    flags = preset(size, router)
    assert {key: flags[key] for key in PUBLISHED} == PUBLISHED
    shape = tuple(flags[k] for k in ("num_layers", "hidden_size", "num_attention_heads"))
    assert shape == SIZES[size] and flags["ffn_hidden_size"] == 4 * shape[1]
    experts = {k: v for k, v in flags.items() if k.startswith("moe_")}
    if router == "dense":
        assert experts == {} and "num_experts" not in flags
        return
    assert (flags["num_experts"], flags["moe_router_topk"]) == (8, 1)
    assert experts["moe_router_load_balancing_type"] == "aux_loss"
    assert experts["moe_aux_loss_coeff"] == 0.01
    assert experts.get("moe_relu_routing", False) == (router == "remoe")
    warmup = experts.get("moe_topk_warmup_steps"), experts.get("moe_topk_warmup_topk")
    assert warmup == ((100, 6) if router == "moe_warmup" else (None, None))
    assert experts["moe_relu_l1_reg_coeff_init"] == 1e-8
    assert experts["moe_relu_l1_reg_coeff_multiplier"] == 1.2
    expected = ("selective", ["moe"]) if size == "182m" else ("full", None)
    assert (flags["recompute_granularity"], flags.get("recompute_modules")) == expected


@pytest.mark.parametrize("router", ["moe", "remoe"])
def test_the_long_runs_are_120b_tokens_in_batches_of_4m(router):
    flags = preset("469m", f"{router}_120b")
    batch = flags["global_batch_size"] * flags["seq_length"]
    assert batch == 4 * 1024**2
    assert flags["train_iters"] * batch == pytest.approx(120e9, rel=1e-4)


def test_the_data_are_one_variable():
    flags = preset("182m", "remoe", "data_root=/somewhere/pile")
    assert flags["data_path"] == [f"/somewhere/pile/{i:02}" for i in range(1, 30)]
    assert flags["tokenizer_model"] == "/somewhere/pile/tokenizer"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", ["dense", "moe", "remoe"])
def test_describe_prints_the_published_size_and_cost(call, tmp_path, size, router):
    path = str(EXAMPLES / f"llama_{size}/{router}.yaml")
    code, out, error = call(tiny.remoe, tmp_path, "describe", path, "--tflops", "100")
    assert code == 0, error
    rows = {row[0].strip(): row[1].strip() for row in table(out)}
    active, total = PARAMS[size]
    assert rows["active parameters"] == active
    assert rows["total parameters"] == (active if router == "dense" else total)
    assert float(rows["GFLOPs per sequence"]) == pytest.approx(GFLOPS[size], abs=1)
    assert rows["tokens"] == "31.46B"  # 60k x 512 x 1024, published as 30B
    hours = GFLOPS[size] * 1e9 * 512 * 60000 / (100e12 * 8) / 3600
    assert float(rows["hours at this throughput"]) == pytest.approx(hours, rel=2e-3)
    peak = max(
        float(rows[f"memory per GPU, {x}"].split()[0]) for x in ("dense warm-up", "stable stage")
    )
    for gpu in (40, 80, 141):
        verdict = "yes" if peak <= 0.9 * gpu else "no"
        expected = f"{verdict}: {peak} of {0.9 * gpu:.1f} GB, 10% is left free"
        assert rows[f"fits GPUs of {gpu} GB"] == expected


def table(out: str) -> list[list[str]]:
    return [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]


def test_describe_refuses_two_throughputs(call, tmp_path):
    argv = ["describe", str(EXAMPLES / "llama_182m/remoe.yaml"), "--tflops", "1"]
    code, _, error = call(tiny.remoe, tmp_path, *argv, "--tokens-per-second", "1")
    assert code == 2 and "give one throughput" in error


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_the_share_of_our_operations_shrinks_with_the_model(call, tmp_path):
    configs = [str(EXAMPLES / f"llama_{size}/remoe.yaml") for size in ("182m", "469m", "978m")]
    argv = ["bench", "roofline", *configs, "--json", "shares.json"]
    code, out, error = call(tiny.remoe, tmp_path, *argv)
    assert code == 0, error
    rows = json.loads((tmp_path / "shares.json").read_text())["runs"]
    names = [f"llama_{size}/remoe" for size in ("182m", "469m", "978m")]
    assert [row[""] for row in rows[::3]] == names and len(rows) == 9
    for column in ("share in torch", "in Triton", "at the fewest"):
        h100 = [float(row[column].rstrip("%")) for row in rows if row["GPU"].startswith("H100")]
        assert 50 > h100[0] > h100[1] > h100[2] > 0
    assert all(row["torch ms"] > row["Triton ms"] > row["fewest ms"] for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llama_182m/moe.yaml"], "llama_182m/moe.yaml has no ReLU routing, whose operations"),
        (["llama_182m/dense.yaml"], "llama_182m/dense.yaml has no ReLU routing"),
        (["llama_182m/remoe.yaml", "--ffn", "8"], "--ffn is given, but the configs have their own"),
        (["--experts", "4", "--topk", "8"], "topk is 8 of 4 experts; choose it between 1"),
        (["--dtype", "fp8"], "dtype 'fp8' is not one of fp32, bf16"),
    ],
)
def test_what_has_no_roofline_is_refused(call, tmp_path, argv, message):
    argv = [str(EXAMPLES / word) if word.endswith("yaml") else word for word in argv]
    code, _, error = call(tiny.remoe, tmp_path, "bench", "roofline", *argv)
    assert code == 2 and message in error and error.count("\n") == 1


# What follows builds models, on ranks.


def build(flags: dict, *, split: bool = True):
    """The model of a command line on this rank, and its config."""
    import os
    import sys

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron.remoe.arguments import add_arguments, configure, megatron_parser

    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    sys.argv = ["pretrain", *to_argv(flags, megatron_parser())]
    args = parse_args(extra_args_provider=add_arguments)
    validate_args(args)
    unset_num_microbatches_calculator()
    initialize_layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
    )
    config = gpt_config_from_args(args)
    configure(config, args, hides_tokens=args.masked_lm)
    if "moe_topk_warmup_steps" in flags:
        from megatron.training import global_vars

        args.iteration = 0
        global_vars._GLOBAL_ARGS = args
    chunks = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return chunks, args


def forward_loss(flags: dict) -> float | None:
    """Mean loss of a random batch, on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron.remoe.testing.cells import _forward_step

    chunks, args = build(flags)
    shape = (args.micro_batch_size, args.seq_length + 1)
    tokens = torch.randint(0, args.padded_vocab_size, shape, generator=torch.Generator())

    def step(data, model):
        return _forward_step(data, model, padding="none")

    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([(0, tokens)]),
        model=chunks,
        num_microbatches=1,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
    )
    if not losses:
        return None
    total = losses[0]["lm loss"]
    return (total[0] / total[1]).item()


FORWARDS = {
    "EP4": ["expert_model_parallel_size=4"],
    "TP2 EP2, expert TP1": [
        "tensor_model_parallel_size=2",
        "expert_model_parallel_size=2",
        "expert_tensor_parallel_size=1",
    ],
    "PP2 EP2": ["pipeline_model_parallel_size=2", "expert_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.mark.processes
@pytest.mark.parametrize("layout", FORWARDS)
@pytest.mark.parametrize("router", ["dense", "moe", "moe_warmup", "remoe"])
def test_a_shrunken_preset_runs_forward_under_every_layout_of_four_ranks(four, router, layout):
    overrides = [o for o in FORWARDS[layout] if router != "dense" or "expert" not in o]
    small = ["padded_vocab_size=512", "tokenizer_type=NullTokenizer", "vocab_size=511"]
    flags = preset("182m", router, *SHRUNK, *small, *overrides)
    for name in ("data_path", "tokenizer_model"):
        del flags[name]
    losses = four.run(forward_loss, flags | {"mock_data": True})
    seen = [loss for loss in losses if loss is not None]
    assert len(seen) == (2 if "PP2" in layout else 4)
    # untrained: every token is about equally probable
    assert seen == pytest.approx([math.log(512)] * len(seen), abs=0.1)


def counted(flags: dict) -> tuple[int, int]:
    """Parameters of the routers, and of the rest of the model."""
    chunks, _ = build(flags)
    sizes = {name: p.numel() for chunk in chunks for name, p in chunk.named_parameters()}
    routers = sum(n for name, n in sizes.items() if "router" in name or "recurrent_cell" in name)
    return routers, sum(sizes.values()) - routers


RECURRENT = ["moe_router_recurrence=gru", "moe_router_recurrent_size=24"]
SOFT = [
    "moe_relu_routing=false", "moe_soft_routing=true", "moe_soft_slots_per_expert=3",
    "masked_lm=true",
]  # fmt: skip


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize(
    "router",
    ["dense", "remoe", "recurrent", "shared projection", "relu_rms", "relu_l2", "null_experts",
     "hash"],
)  # fmt: skip
def test_parameters_are_those_of_the_module(call, router, granularity):
    more = [] if router == "dense" else [f"moe_granularity={granularity}"]
    if router in ROUTINGS:
        router, more = "remoe", [*more, f"moe_routing={router}"]
        if more[-1].endswith("null_experts"):
            more.append("moe_null_experts=24")
    if router in ("recurrent", "shared projection"):
        shared = ["moe_router_recurrent_projection=shared"] * (router == "shared projection")
        router, more = "remoe", [*more, *RECURRENT, *shared]
    flags = preset("469m", router, *SHRUNK, "padded_vocab_size=512", *more)
    size = ModelSize.from_flags(flags)
    assert call(counted, flags) == (size.router_params, size.total_params)
    active = ModelSize.from_flags(preset("469m", "dense", *SHRUNK, "padded_vocab_size=512"))
    assert size.active_params == active.total_params
    assert (size.flops_per_sequence > active.flops_per_sequence) == ("recurrence" in str(more))


def saved_bytes(flags: dict, tokens: int) -> tuple[int, float]:
    """Bytes that autograd keeps for the backward of a model, and mean active experts."""
    (model,), args = build(flags)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    inputs = torch.randint(0, 512, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs, positions, None, labels=inputs)
        total = sum(kept.values())
    loss.sum().backward()
    counts = [m.stats for m in model.modules() if hasattr(m, "most_active")]
    active = sum((s[3:].sum() / s[2]).item() for s in counts) / max(1, len(counts))
    return total, active


def test_parameters_and_operations_of_soft_moe(call):
    flags = preset("469m", "remoe", *SHRUNK, "padded_vocab_size=512", *SOFT)
    size = ModelSize.from_flags(flags)
    assert call(counted, flags) == (size.router_params, size.total_params)
    assert size.active_params == size.total_params
    # Operations are those that torch counts in the layer, forward and backward.
    layer = SoftMoELayer(
        SoftMoELayerConfig(size.hidden, size.expert_width, size.num_experts, slots_per_expert=3)
    )
    counter = FlopCounterMode(display=False)
    with counter:
        layer(torch.randn(1, size.seq_length, size.hidden, requires_grad=True)).sum().backward()
    dense = ModelSize.from_flags(preset("469m", "dense", *SHRUNK, "padded_vocab_size=512"))
    mlp = 3 * 2 * size.seq_length * size.matrices * dense.hidden * dense.ffn_width
    others = dense.flops_per_sequence - size.num_layers * mlp
    assert size.flops_per_sequence - others == size.num_layers * counter.get_total_flops()


@pytest.mark.parametrize("router", ["dense", "moe", "remoe", "soft"])
def test_activations_are_about_what_autograd_keeps(call, router):
    overrides = [o for o in SHRUNK if not o.startswith(("hidden", "ffn", "seq", "max_"))]
    overrides += ["hidden_size=256", "ffn_hidden_size=1024", "seq_length=256"]
    overrides += ["max_position_embeddings=256", "padded_vocab_size=512"]
    overrides += ["recompute_granularity=null", "recompute_modules=null"]
    if router == "soft":
        router, overrides = "remoe", [*overrides, *SOFT]
    flags = preset("182m", router, *overrides)
    kept, active = call(saved_bytes, flags, 256)
    size = ModelSize.from_flags(flags)
    if size.slots:
        active = size.rows_per_token
    estimate = activation_bytes(size, RankLoad(), active)
    # routing, masks, casts of norms and rope are not counted
    assert 0.5 < estimate / kept < 1.1, (estimate, kept)


def write_shards(folder: Path) -> None:
    """Shards named as the Pile's, with enough documents for a split of 969,30,1."""
    folder.mkdir()
    for shard in range(30):
        words = random.Random(shard)
        texts = (" ".join(words.choices(tiny.WORDS, k=40)) for _ in range(520))
        lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts)
        path = folder / f"{shard:02}.jsonl.zst"
        path.write_bytes(zstandard.compress(lines.encode()))


def wandb_records(run: Path) -> list[Any]:
    """What W&B has written offline for a run: protobuf records in blocks, as LevelDB's log has."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run.glob("wandb/latest-run/run-*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no header fits before the end of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after the checksum
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.fixture(scope="module")
def pile_run(call, tmp_path_factory):
    """The recipe of docs/experiments.md, on synthetic shards and a shrunken preset."""
    home = tmp_path_factory.mktemp("pile")
    write_shards(home / "pile")
    argv = ["data", "tokenize", "pile", "--out", "tokens", "--vocab-size", "300", "--workers", "1"]
    code, out, error = call(tiny.remoe, home, *argv)
    assert code == 0, out + error
    overrides = [*SHRUNK, "data_root=tokens", "padded_vocab_size=512", "run_dir=runs/first"]
    overrides += ["train_iters=4", "eval_interval=4", "eval_iters=1", "save_interval=4"]
    overrides += ["wandb_project=pile", "wandb_tags=[a,b]", "wandb_mode=offline"]
    path = str(EXAMPLES / "llama_182m/remoe.yaml")
    finish(tiny.start("train", path, *overrides, cwd=home))
    return home


def test_from_the_piles_shards_to_training(pile_run):
    rows = training(tiny.rows(pile_run / "runs/first"))
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert all(abs(row["lm_loss"] - math.log(512)) < 0.5 for row in rows)
    assert all(row["sparsity"] > 0 for row in rows)


def test_wandb_gets_config_tags_curves_and_histograms(pile_run):
    records = wandb_records(pile_run / "runs/first")
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name, list(run.tags)) == ("pile", "first", ["a", "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lr"] == 5e-4 and config["moe_relu_routing"] is True
    logged: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            row = logged.setdefault(record.history.step.num, {})
            for item in record.history.item:
                name, *inner = item.nested_key
                value = json.loads(item.value_json)
                row[name] = row.get(name, {}) | {inner[0]: value} if inner else value
    for row in training(tiny.rows(pile_run / "runs/first")):
        found = logged[row["iteration"]]
        for key in ROUTING - {"sparsity_per_layer", "silent_layers", "dense_layers"}:
            assert found[f"remoe/{key}"] == pytest.approx(row[key])
        for layer, value in enumerate(row["sparsity_per_layer"], start=1):
            assert found[f"remoe/sparsity_per_layer/{layer}"] == pytest.approx(value)
            # The loads of the 8 experts, whose mean is 1 by definition.
            histogram = found[f"remoe/expert_load/{layer}"]
            assert histogram["_type"] == "histogram" and sum(histogram["values"]) == 8
        assert found["lm loss"] == pytest.approx(row["lm_loss"])
    assert any(record.HasField("exit") for record in records)


def test_a_report_becomes_an_artifact_of_the_same_wandb_run(pile_run, tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # else below the user's home
        monkeypatch.setenv(name, str(tmp_path))
    run = Run.load(pile_run / "runs/first")
    first = wandb_run.last_id(run.path)
    (pile_run / "report.html").write_text("<p>a report")
    with contextlib.chdir(pile_run):
        logged = wandb_run.WandbRun.of(replace(run, path=Path("runs/first")))
        line = logged.log_report(Path("report.html"))
    assert line.startswith(f"artifact report-{first} of the W&B run {first} in pile; wandb sync ")
    records, deadline = wandb_records(run.path), time.monotonic() + 30  # of its newest files
    while not any(r.HasField("artifact") for r in records) and time.monotonic() < deadline:
        time.sleep(0.2)  # W&B's process may write them later
        records = wandb_records(run.path)
    assert {r.run.run_id for r in records if r.HasField("run")} == {first}
    (artifact,) = (record.artifact for record in records if record.HasField("artifact"))
    assert (artifact.name, artifact.type) == (f"report-{first}", "report")
    (entry,) = artifact.manifest.contents
    assert entry.path == "report.html" and entry.size == len("<p>a report")


def test_a_run_that_goes_on_continues_its_wandb_run(tmp_path, monkeypatch):
    """Megatron starts W&B while it validates the arguments, before anything else is called."""
    folder = str(tmp_path / "checkpoints")
    args = Namespace(wandb_project="x", wandb_save_dir=str(tmp_path), load=folder, save=folder)
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # which the test's end restores
        monkeypatch.delenv(name)

    def run_id(**changes: Any) -> str | None:
        wandb_run.continue_last(Namespace(**vars(args) | changes))
        return os.environ.pop("WANDB_RUN_ID", None)

    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/latest-run").symlink_to("run-20261127_070840-a-b_c")
    assert run_id() is None  # there is no checkpoint
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    assert run_id() == "a-b_c" and os.environ["WANDB_RESUME"] == "allow"
    assert run_id(save="elsewhere") is run_id(wandb_project="") is None
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert run_id() == "mine"
    (tmp_path / "wandb/latest-run").unlink()
    assert run_id() is None


def without_wandb(cwd: Path, *argv: str) -> tuple[int, str, str]:
    with mock.patch.dict(sys.modules, {"wandb": None}):
        return tiny.remoe(cwd, *argv)


def test_wandb_that_is_not_installed_is_one_line(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml")
    code, _, error = call(without_wandb, tmp_path, "train", "tiny.yaml", "wandb_project=x")
    assert code == 2
    assert error.startswith("error: wandb_project is x, but wandb is not installed; run: pip inst")
