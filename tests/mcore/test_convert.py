"""Megatron <-> Hugging Face: parity, round trips, layouts, mistakes, memory."""

import contextlib
import filecmp
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import remoe
from megatron.remoe import checkpoint
from megatron.remoe.convert.source import find_checkpoint
from megatron.remoe.ranks import Ranks
from tests.mcore import tiny
from tests.mcore.convert_cases import (
    RELU,
    TOPK,
    UNTIED,
    refusal,
    reshard,
    save_legacy,
    through_hf,
    through_hf_with,
    write_synthetic,
)

ROUTER = {name: flag for name, flag in RELU.items() if name != "moe_relu_routing"} | UNTIED
GRU = {"moe_router_recurrence": "gru", "moe_router_recurrent_size": 8}
CASES = {
    "relu, untied": RELU | UNTIED,
    "relu, E 8, k 2, G 2, one group, tied": RELU
    | {"num_experts": 8, "moe_router_topk": 2, "moe_granularity": 2, "num_query_groups": 1},
    "relu, as many groups as heads, normed": RELU
    | UNTIED
    | {"num_query_groups": 4, "qk_layernorm": True},
    "relu, dense first layer": RELU | {"moe_layer_freq": "[0,1]"},
    "relu, shortcuts": RELU
    | {"moe_relu_max_active_experts": 2, "moe_relu_at_least_one_expert": True},
    "topk, post-softmax": TOPK | UNTIED,
    "topk, pre-softmax, G 2": TOPK | {"moe_router_pre_softmax": True, "moe_granularity": 2},
    "topk, sigmoid": TOPK | UNTIED | {"moe_router_score_function": "sigmoid"},
    "topk, sigmoid, k 1, G 2": TOPK
    | {"moe_router_score_function": "sigmoid", "moe_router_topk": 1, "moe_granularity": 2},
    "relu rms, load of the step before": ROUTER
    | {"moe_routing": "relu_rms", "moe_relu_load_balancing": "global_batch"},
    "relu l2, recurrent": ROUTER | GRU | {"moe_routing": "relu_l2"},
    "top-p": ROUTER | {"moe_routing": "top_p"},
    "expert threshold, G 2": ROUTER | {"moe_routing": "expert_threshold", "moe_granularity": 2},
    "hash, dense first layer": ROUTER | {"moe_routing": "hash", "moe_layer_freq": "[0,1]"},
    "null experts": ROUTER
    | {"moe_routing": "null_experts", "moe_null_experts": 8}
    | {"moe_router_load_balancing_type": "none"},
    "recurrent relu, three layers": RELU | UNTIED | GRU | {"num_layers": 3},
    "recurrent relu, dense layer between": RELU
    | GRU
    | {"num_layers": 3, "moe_layer_freq": "[1,0,1]"},
    "recurrent relu, nothing passed": RELU | GRU | {"moe_router_recurrent_passing": "none"},
    "recurrent relu, shared projection": RELU | GRU | {"moe_router_recurrent_projection": "shared"},
    "recurrent topk, rnn": TOPK | {"moe_router_recurrence": "rnn", "moe_router_recurrent_size": 8},
    "dense, untied": UNTIED,
    "dense, tied": {},
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_both_forward_passes_agree_and_the_way_back_is_exact(call, tmp_path, flags):
    outcome = call(through_hf, flags, tmp_path)
    assert outcome.logits <= 1e-5
    assert outcome.flipped == 0
    assert outcome.round_trip == []
    assert outcome.returned_logits == 0
    if "moe_relu_routing" in flags or "moe_routing" in flags:
        assert 0.1 < outcome.active < 0.9


def test_routers_that_cannot_be_exported_are_refused_with_the_reason(call):
    assert call(refusal, "soft") == (
        "the run has the router soft, which has slots, of which the exported model has none"
    )
    assert call(refusal, "expert_choice") == (
        "the run has the router expert_choice, which looks at whole sequences, and the exported "
        "model is causal"
    )
    assert "router other, which is none that this version knows" in call(refusal, "other")
    assert call(refusal, "top_p") == ""


def test_bf16_agrees_to_its_rounding(call, tmp_path):
    # Logits are of order 10 here, and a bf16 has 8 bits: a rounding of them is 0.03.
    outcome = call(through_hf, RELU | UNTIED | {"bf16": True}, tmp_path)
    assert 0 < outcome.logits <= 0.3
    assert outcome.flipped <= 2  # of 96 pairs
    assert outcome.round_trip == [] and outcome.returned_logits == 0


def test_a_recurrent_model_in_bf16_keeps_its_cell_in_fp32(call, tmp_path):
    outcome = call(through_hf, RELU | UNTIED | GRU | {"bf16": True}, tmp_path)
    assert 0 < outcome.logits <= 0.3
    assert outcome.flipped <= 2  # of 96 pairs
    assert outcome.round_trip == [] and outcome.returned_logits == 0
    (weights,) = (tmp_path / "hf").glob("model*.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in load_file(weights).items()}
    cell = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    assert cell == {f"model.recurrent_cell.{name}" for name in names}


def test_stages_of_a_recurrent_model_are_exported_to_the_same_files(call, tmp_path):
    flags = RELU | UNTIED | GRU
    call(through_hf, flags, tmp_path)
    source = next((tmp_path / "back").glob("iter_*"))
    with Ranks(2) as ranks:
        ranks.run(reshard, flags | LAYOUTS["PP2"], 2, source, tmp_path / "PP2")
    code, _, error = call(tiny.remoe, tmp_path, "convert", "to-hf", "PP2", "hf-PP2")
    assert code == 0, error
    assert_same_folder(tmp_path / "hf", tmp_path / "hf-PP2")


@pytest.mark.parametrize("corruption", ["qkv", "gate and up", "norms"])
def test_a_corrupted_table_is_caught(call, tmp_path, corruption):
    """These mistakes keep every name and shape, and survive a round trip: the logits tell."""
    outcome = call(through_hf_with, corruption, RELU | UNTIED, tmp_path)
    assert outcome.round_trip == []
    assert outcome.logits > 1e-3


@pytest.fixture(scope="module")
def model(call, tmp_path_factory) -> Path:
    """A checkpoint and what it is exported to: `iter_0000003`, `hf`, `back`."""
    home = tmp_path_factory.mktemp("model")
    call(through_hf, RELU | UNTIED, home)
    return home


LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}


def test_every_layout_is_exported_to_the_same_files(call, model, tmp_path):
    """The layouts are loaded from what `to-megatron` wrote, so they check that too."""
    source = next((model / "back").glob("iter_*"))
    with Ranks(2) as ranks:
        for name, layout in LAYOUTS.items():
            ranks.run(reshard, RELU | UNTIED | layout, 2, source, tmp_path / name)
    for name in LAYOUTS:
        code, _, error = call(tiny.remoe, tmp_path, "convert", "to-hf", name, f"hf-{name}")
        assert code == 0, error
        assert_same_folder(model / "hf", tmp_path / f"hf-{name}")


def assert_same_folder(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    _, different, unreadable = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not different and not unreadable


@pytest.mark.parametrize("grouped", [True, False])
def test_an_old_one_file_checkpoint_is_exported_alike(call, tmp_path, grouped):
    call(save_legacy, RELU | UNTIED | {"moe_grouped_gemm": grouped}, tmp_path)
    for kind in ("new", "old"):
        code, _, error = call(tiny.remoe, tmp_path, "convert", "to-hf", kind, f"hf-{kind}")
        assert code == 0, error
    assert_same_folder(tmp_path / "hf-new", tmp_path / "hf-old")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_with_something_else_in_them_are_refused(call, model, tmp_path):
    """What is not on the allow-list is named, and does not run."""
    shutil.copytree(model / "iter_0000003", tmp_path / "new")
    (tmp_path / "new/.metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    (tmp_path / "old/mp_rank_00").mkdir(parents=True)
    torch.save({"model": _Evil(tmp_path / "ran")}, tmp_path / "old/mp_rank_00/model_optim_rng.pt")
    named = {"new": "pathlib.Path.touch", "old": "getattr"}
    for kind in named:
        error = fails(call, tmp_path, "convert", "to-hf", kind, "out")
        assert named[kind] in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def fails(call, cwd: Path, *argv: str) -> str:
    """The one line that a user's mistake prints."""
    code, _, error = call(tiny.remoe, cwd, *argv)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ")
    return error


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _shrink(tensors) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][:, :, :-1].contiguous()


MISTAKES = {
    "missing tensor": (
        lambda f: _edit_weights(f, lambda t: t.pop("model.layers.0.mlp.router.weight")),
        "lacks model.layers.0.mlp.router.weight;",
    ),
    "unknown tensor": (
        lambda f: _edit_weights(f, lambda t: t.update(stranger=torch.zeros(2))),
        "has the unknown stranger;",
    ),
    "wrong shape": (
        lambda f: _edit_weights(f, _shrink),
        "model.layers.1.mlp.experts.down_proj has shape [4, 32, 47], but the model's configuration "
        "asks for [4, 32, 48]",
    ),
    "unknown router": (
        lambda f: _edit_config(f, router_type="soft"),
        "config.json has router_type = 'soft'; it must be one of relu, relu_rms",
    ),
    "vocabulary": (
        lambda f: _edit_config(f, vocab_size=90),
        "vocabulary mismatch: hf/config.json has vocab_size 90, but model.embed_tokens.weight has "
        "100 rows",
    ),
    "model type": (
        lambda f: _edit_config(f, model_type="mixtral"),
        "model_type 'mixtral'; remoe and llama can be converted",
    ),
    "no coefficient": (lambda f: _edit_config(f, l1_coeff=None), "has no l1_coeff of 2 values"),
    "no config": (lambda f: (f / "config.json").unlink(), "hf is no Hugging Face model"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 9),
        "model.safetensors is damaged",
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only safetensors are read",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_spoiled_model_is_named_and_leaves_nothing(call, model, tmp_path, spoil, message):
    shutil.copytree(model / "hf", tmp_path / "hf")
    spoil(tmp_path / "hf")
    error = fails(call, tmp_path, "convert", "to-megatron", "hf", "deep/out")
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_model_of_unknown_origin_becomes_a_release(call, model, tmp_path):
    """Without facts and rows of padding: iteration 0, and the fewest rows, of zeros."""
    shutil.copytree(model / "hf", tmp_path / "hf")
    _edit_config(tmp_path / "hf", training_facts=None)
    (tmp_path / "hf/megatron_padding.safetensors").unlink()
    for argv in (["to-megatron", "hf", "out"], ["to-hf", "out", "again"]):
        code, _, error = call(tiny.remoe, tmp_path, "convert", *argv)
        assert code == 0, error
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    rows = load_file(tmp_path / "again/megatron_padding.safetensors")
    assert {name: tuple(t.shape) for name, t in rows.items()} == {
        "padding.embed_tokens.weight": (28, 32),
        "padding.lm_head.weight": (28, 32),
    }
    assert not any(t.any() for t in rows.values())
    weights = [load_file(tmp_path / f / "model.safetensors") for f in ("hf", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


LAYOUT_MISTAKES = {
    "experts": (["--expert-parallel", "3"], "does not divide the model's num_experts of 4"),
    "heads": (["--tensor-parallel", "4"], "does not divide the model's num_key_value_heads of 2"),
    "padding": (
        ["--padded-vocab-size", "96"],
        "vocabulary mismatch: padded-vocab-size is 96; it must be at least the model's vocab_size",
    ),
}


@pytest.mark.parametrize(("options", "message"), LAYOUT_MISTAKES.values(), ids=LAYOUT_MISTAKES)
def test_a_layout_that_does_not_fit_is_refused(call, model, tmp_path, options, message):
    source = str(model / "hf")
    error = fails(call, tmp_path, "convert", "to-megatron", source, "out", *options)
    assert message in error and not any(tmp_path.iterdir())


def test_a_converted_model_trains_on_from_its_coefficient(model, tmp_path):
    """`model.yaml` is the base of a config; weights and coefficient are where they were left."""
    steps = {"train_iters": 2, "lr": 1e-4, "micro_batch_size": 2, "global_batch_size": 4}
    config = {"base": str(model / "back/model.yaml"), "run_dir": "run", "mock_data": True}
    config |= steps | {"log_interval": 1, "eval_iters": 0, "eval_interval": 2, "num_workers": 0}
    # made under the folder's first name; Megatron loads by path
    (tmp_path / "on.yaml").write_text(
        json.dumps(config | {"pretrained_checkpoint": str(model / "back")})
    )
    process = tiny.start("train", "on.yaml", cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    first = tiny.rows(tmp_path / "run")[0]
    saved = json.loads((model / "hf/config.json").read_text())["l1_coeff"]
    assert first["iteration"] == 1 and first["l1_coeff"] == saved[0]


def test_a_damaged_checkpoint_leaves_nothing(call, model, tmp_path):
    shutil.copytree(model / "iter_0000003", tmp_path / "iter_0000003")
    for file in (tmp_path / "iter_0000003").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    error = fails(call, tmp_path, "convert", "to-hf", "iter_0000003", "out")
    assert "is cut off" in error
    assert [p.name for p in tmp_path.iterdir()] == ["iter_0000003"]


EXPORT_MISTAKES = {
    "nothing there": (["nowhere", "out"], "nowhere does not exist; name a run directory"),
    "no checkpoint": (["empty", "out"], "empty is neither a run directory"),
    "dtype": (["model", "out", "--dtype", "int8"], "dtype is 'int8'; it must be one of fp32"),
    "size": (["model", "out", "--max-shard-size", "big"], "max-shard-size is 'big'"),
    "full": (["model", "full"], "full is not empty; choose another folder, or replace it"),
    "tokenizer": (["model", "out", "--tokenizer", "no"], "the tokenizer no does not exist here"),
    "license": (["model", "out", "--license", "Apache 2"], "license is 'Apache 2'; it must be an"),
}


@pytest.mark.parametrize(("argv", "message"), EXPORT_MISTAKES.values(), ids=EXPORT_MISTAKES)
def test_mistakes_of_an_export(call, model, tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("kept")
    (tmp_path / "model").symlink_to(model / "iter_0000003")
    assert message in fails(call, tmp_path, "convert", "to-hf", *argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "model"]
    assert (tmp_path / "full/mine").read_text() == "kept"


def test_shards_and_dtype(call, model, tmp_path):
    """Small shards hold the same tensors as one file, and a dtype is what it says."""
    options = ["--max-shard-size", "40KB", "--dtype", "bf16"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/iter_0000003").symlink_to(model / "iter_0000003")
    point = {"active": 1.5, "loss": 2.25, "half_width": 0.125}
    curve = {"sequences": 4, "sequence_length": 512, "curves": [{"points": [point]}]}
    (tmp_path / "run/budget.json").write_text(json.dumps(curve))
    assert (
        call(tiny.remoe, tmp_path, "convert", "to-hf", "run/checkpoints", "out", *options)[0] == 0
    )
    assert "| 1.50 | 2.2500 ± 0.1250 |" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/budget.json").read_text()) == curve
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all(f.endswith(f"-of-{len(files):05}.safetensors") for f in files)
    parts = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    whole = load_file(model / "hf/model.safetensors")
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name].bfloat16()) for name in whole)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_config_and_card_carry_what_training_needs(model):
    config = json.loads((model / "hf/config.json").read_text())
    saved = sorted(set(config["l1_coeff"]))
    assert len(saved) == 2 and all(0 < c < 1e-4 for c in saved)
    assert config["target_sparsity"] == 0.75 and config["l1_coeff_multiplier"] == 1.2
    facts = config["training_facts"]
    assert facts["iteration"] == 3 and facts["tokens"] == 24 * 32
    assert facts["version"] == remoe.__version__


def run_code_of_card(folder: Path, monkeypatch) -> str:
    """What the card's Python prints, run in the folder."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_the_card_is_what_the_hub_reads(call, model, tmp_path, monkeypatch):
    folder = tmp_path / "tiny-remoe"
    shutil.copytree(model / "hf", folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["remoe", "mixture-of-experts", "relu"],
    }
    assert "claims no license" in card.text
    assert "| tokens | 768 |" in card.text and "remoe budget" not in card.text
    counts = re.search(
        r"of ([\d,]+) parameters, of which an average token uses ([\d,]+)", card.text
    )
    weights = load_file(folder / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    experts = sum(t.numel() for name, t in weights.items() if ".mlp.experts." in name)
    expected = total, total - experts * 3 // 4  # one of four experts
    assert tuple(int(n.replace(",", "")) for n in counts.groups()) == expected
    assert run_code_of_card(folder, monkeypatch).count("tensor(") == 3  # ids; experts of 2 layers

    config = json.loads((folder / "config.json").read_text())
    config["training_facts"] |= {
        "data": ["code", "prose"], "data_shares": [0.25, 0.75], "sparsity": 0.7,
        "sparsity_steps": 20, "validation_iteration": 3,
        "validation_loss": {"valid": 2.5, "valid/code": 2.0, "valid/prose": None},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    points = [(1.5, 2.25), (0.5, 2.75)]
    points = [{"active": active, "loss": loss, "half_width": 0.125} for active, loss in points]
    curve = {"sequences": 4, "sequence_length": 512, "curves": [{"points": points}]}
    (folder / "budget.json").write_text(json.dumps(curve))
    argv = ["convert", "card", "tiny-remoe"]
    code, out, error = call(tiny.remoe, tmp_path, *argv, "--license", "mit")
    assert (code, out, error) == (0, "tiny-remoe/README.md\n", "")
    assert call(tiny.remoe, tmp_path, *argv)[0] == 0  # which keeps the license
    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.license == "mit"
        and card.data.model_name == f"ReMoE language model of {total:,} parameters"
    )
    found = {
        (r.dataset_name, r.dataset_split, r.metric_type): r.metric_value
        for r in card.data.eval_results
    }
    assert found == {
        ("all domains", "validation", "loss"): 2.5,
        ("all domains", "validation", "perplexity"): pytest.approx(12.182494),
        ("code", "validation", "loss"): 2.0,
        ("code", "validation", "perplexity"): pytest.approx(7.389056),
    }
    for line in (
        "| code | 25.0%, about 192 tokens |",
        "| code, validation | 2.0000 | 7.39 |",
        "| 0.50 | 2.7500 ± 0.1250 |\n| 1.50 | 2.2500 ± 0.1250 |",
        "on 2,048 tokens",
        "| active experts, as measured there | 1.20 of 4 |",
        "| sparsity, mean of the last 20 steps | 0.700 (target 0.750) |",
        "| `load_balancing` | aux_loss |",
    ):
        assert line in card.text, line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("budget.json", "{}", "hf/budget.json is no curve of one model (KeyError: 'curves'); "),
        ("README.md", "---\n[\n---\n", "hf/README.md has no valid metadata ("),
        ("config.json", None, "hf is no Hugging Face model: it has no config.json"),
    ],
)
def test_a_card_of_damaged_files_is_one_line(call, model, tmp_path, file, content, message):
    shutil.copytree(model / "hf", tmp_path / "hf")
    if content is None:
        (tmp_path / "hf" / file).unlink()
    else:
        (tmp_path / "hf" / file).write_text(content)
    before = (tmp_path / "hf/README.md").read_bytes()
    assert message in fails(call, tmp_path, "convert", "card", "hf")
    assert (tmp_path / "hf/README.md").read_bytes() == before


def test_verify_says_what_differs(call, model, tmp_path):
    argv = [str(model / "hf"), "hf", "--tokens", "7,3,99,0,41", "--new-tokens", "3"]
    shutil.copytree(model / "hf", tmp_path / "hf")
    code, out, error = call(tiny.remoe, tmp_path, "convert", "verify", *argv)
    assert code == 0, out + error
    assert "bit-equal" in out and "largest difference 0," in out and out.endswith("ok\n")

    _edit_weights(tmp_path / "hf", lambda t: t["model.layers.0.mlp.experts.down_proj"].add_(0.5))
    code, out, _ = call(tiny.remoe, tmp_path, "convert", "verify", *argv)
    assert code == 1 and "model.layers.0.mlp.experts.down_proj: 0.5" in out
    assert out.endswith("the models DIFFER\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One word for each of the model's 100 entries."""
    words = {f"w{i}": i for i in range(99)} | {"<|endoftext|>": 99}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.save(str(folder / "tokenizer.json"))
    return folder


def test_generates_alike_from_a_checkpoint_and_from_its_export(
    call, model, tokenizer, tmp_path, monkeypatch
):
    checkpoint, chosen = str(model / "iter_0000003"), ["--tokenizer", str(tokenizer)]
    code, _, error = call(tiny.remoe, tmp_path, "convert", "to-hf", checkpoint, "hf", *chosen)
    assert code == 0, error
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == 99

    assert "w" in run_code_of_card(tmp_path / "hf", monkeypatch)
    assert "| tokenizer | WordLevel, 100 entries |" in (tmp_path / "hf/README.md").read_text()

    request = ["w7 w3 w41", "--max-new-tokens", "5"]
    code, out, error = call(tiny.remoe, tmp_path, "generate", checkpoint, *request, *chosen)
    assert code == 0, error
    assert out.startswith("w7 w3 w41") and 3 < len(out.split()) <= 8
    assert call(tiny.remoe, tmp_path, "generate", "hf", *request)[1] == out
    sampled = [*request, "--temperature", "2.0", "--seed"]
    texts = [call(tiny.remoe, tmp_path, "generate", "hf", *sampled, s)[1] for s in "112"]
    assert texts[0] == texts[1] != texts[2]

    # Without a prompt, every line is one; a refused one does not end the loop.
    lines = f"w7 w3 w41\n\n{'w1 ' * 99}\nw2\n"
    code, piped, error = call(with_input, lines, tmp_path, "generate", "hf", *request[1:])
    assert code == 2 and error.startswith("error: the prompt has 99 tokens; the model takes 1 to")
    assert error.endswith("error: 1 prompts were refused, as said above; change them\n")
    assert piped.startswith(out) and piped.removeprefix(out).startswith("w2")


def with_input(text: str, cwd: Path, *argv: str) -> tuple[int, str, str]:
    """The `remoe` command with a text as its standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return tiny.remoe(cwd, *argv)


def test_a_chosen_tokenizer_replaces_that_of_a_model(call, model, tokenizer, tmp_path):
    """`--tokenizer` is for a folder of transformers too, which has none of its own here."""
    shutil.copytree(model / "hf", tmp_path / "hf")
    prompt = ["generate", "hf", "def ", "--max-new-tokens", "2"]
    assert "tokenizer" in fails(call, tmp_path, *prompt)
    code, out, error = call(tiny.remoe, tmp_path, *prompt, "--tokenizer", str(tokenizer))
    assert code == 0 and out, error
    assert "does not exist" in fails(call, tmp_path, *prompt, "--tokenizer", "nowhere")


def test_reading_an_older_checkpoint_than_the_trackers_is_said(model, tmp_path, capsys):
    for number in (3, 4):
        shutil.copytree(model / "iter_0000003", tmp_path / f"iter_000000{number}")
    (tmp_path / checkpoint.TRACKER).write_text("4")
    assert find_checkpoint(tmp_path).name == "iter_0000004"
    assert capsys.readouterr().out == ""
    (tmp_path / "iter_0000004/metadata.json").unlink()
    assert find_checkpoint(tmp_path).name == "iter_0000003"
    assert "iter_0000004 is not complete; reading" in capsys.readouterr().out


def test_a_tokenizer_that_does_not_fit_is_a_vocabulary_mismatch(call, model, tokenizer, tmp_path):
    shutil.copytree(model / "hf", tmp_path / "hf")
    words = json.loads((tokenizer / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {f"more{i}": 100 + i for i in range(40)}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(words))
    error = fails(call, tmp_path, "convert", "to-megatron", "hf", "out")
    assert "vocabulary mismatch: the tokenizer of hf has 140 entries, config.json has" in error
    chosen = ["--tokenizer", "hf/tokenizer.json"]
    source = str(model / "iter_0000003")
    error = fails(call, tmp_path, "convert", "to-hf", source, "out", *chosen)
    assert "has 140 entries, the model's embedding has 128" in error
    assert "has no tokenizer; name one" in fails(call, tmp_path, "generate", source, "text")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


MEMORY = """
import resource, sys
from pathlib import Path
from megatron.remoe.convert.export import to_hf
from megatron.remoe.convert.source import MegatronSource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
to_hf(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def test_the_memory_of_an_export_is_a_fraction_of_the_model(call, tmp_path):
    size = call(write_synthetic, tmp_path / "iter_0000001", layers=12, hidden=256, width=768)
    assert size > 200e6
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, "iter_0000001", "hf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 0.4 * size
