"""`remoe convert upcycle`: a dense model as the start of a mixture."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812

from tests.mcore import tiny
from tests.mcore.convert_cases import RELU, UNTIED, write_model
from tests.mcore.test_convert import fails


def route(granularity: int):
    """Gates over held-out tokens off center, `[T, E, G]`, and the router's weights."""
    from megatron.remoe.convert.upcycle import Settings, router_weights

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 24, generator=generator) + torch.linspace(0, 2, 24)
    settings = Settings(num_experts=8, granularity=granularity)
    weights = router_weights(x[:2000], x[2000:], settings, generator)
    return torch.relu(x[2000:] @ weights.T).view(2000, 8, granularity), weights


@pytest.mark.parametrize("granularity", [1, 2])
def test_gates_of_a_slices_copies_sum_to_one_and_differ(call, granularity):
    gates, weights = call(route, granularity)
    sums = gates.sum(dim=1)
    assert torch.allclose(sums.mean(dim=0), torch.ones(granularity), atol=1e-4)
    assert float(sums.std()) < 0.25  # of a random router as large: 0.5 and more
    assert float((gates > 0).float().mean()) > 0.85  # it starts in the dense stage
    # over tokens a gate's noise is half of its mean of 1/8, by which copies differ
    noise = (gates - gates.mean(dim=1, keepdim=True)) * 8
    assert 0.4 < float(noise.std(dim=0).mean()) < 0.6
    # and it sums to zero: the sum of weights is a linear function near 1, with no noise in it
    total = weights.view(8, granularity, -1).sum(dim=0)
    assert torch.allclose(total[0] / total[0].norm(), total[-1] / total[-1].norm(), atol=1e-4)


@pytest.fixture(scope="module")
def home(call, tmp_path_factory) -> Path:
    """A dense checkpoint of ours, and its export."""
    home = tmp_path_factory.mktemp("upcycle")
    call(write_model, UNTIED, home / "dense/iter_0000003")
    code, _, error = call(tiny.remoe, home, "convert", "to-hf", "dense", "llama")
    assert code == 0, error
    return home


@pytest.mark.parametrize(("source", "granularity"), [("dense", 1), ("llama", 2)])
def test_slices_of_the_dense_mlp_are_copied(call, home, tmp_path, source, granularity):
    argv = [str(home / source), "out", "--num-experts", "4", "--granularity", str(granularity)]
    code, out, error = call(tiny.remoe, tmp_path, "convert", "upcycle", *argv, "--tokens", "1024")
    assert code == 0, error
    # Stated on the model's own samples; a random router loses more than that by far.
    gap = re.search(r"gap ([+-][\d.]+)", out)
    assert gap and abs(float(gap[1])) < 0.5, out
    code, _, error = call(tiny.remoe, tmp_path, "convert", "to-hf", "out", "hf")
    assert code == 0, error
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["num_experts"] == 4 * granularity
    assert config["moe_intermediate_size"] == 48 // granularity
    assert config["target_sparsity"] == 0.75
    assert config["l1_coeff"] == pytest.approx([1e-8] * 2)
    dense, mixture = load_file(home / "llama/model.safetensors"), {}
    mixture = load_file(tmp_path / "hf/model.safetensors")
    shared = dense.keys() & mixture.keys()
    assert all(torch.equal(dense[name], mixture[name]) for name in shared)
    assert {n for n in dense if n not in shared} == {
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in ("gate", "up", "down")
    }
    x = torch.randn(5, 32)
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        gate, up, down = (dense[f"{layer}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        expected = F.linear(F.silu(x @ gate.T) * (x @ up.T), down)
        halves = torch.einsum("th,efh->etf", x, mixture[f"{layer}.experts.gate_up_proj"])
        first, second = halves.chunk(2, dim=-1)
        experts = torch.einsum(
            "etf,ehf->eth", F.silu(first) * second, mixture[f"{layer}.experts.down_proj"]
        )
        copies = experts.view(4, granularity, 5, 32)
        assert all(torch.equal(copies[0], copy) for copy in copies)
        assert torch.allclose(copies[0].sum(dim=0), expected, atol=1e-4)


MISTAKES = {
    "granularity": (["--num-experts", "4", "--granularity", "5"], "granularity 5 does not divide"),
    "one expert": (["--num-experts", "1"], "num_experts is 1; a mixture needs at least 2"),
    "no noise": (["--num-experts", "4", "--spread", "0"], "spread is 0.0; it must be positive"),
    "topk": (["--num-experts", "4", "--topk", "9"], "choose topk between 1 and num_experts"),
    "no data": (["--num-experts", "4", "--data", "no"], "no.bin does not exist; name token files"),
    "layout": (
        ["--num-experts", "4", "--expert-parallel", "3"],
        "does not divide the model's num_experts of 4",
    ),
    "padding": (
        ["--num-experts", "4", "--padded-vocab-size", "96", "--data", "no"],
        "vocabulary mismatch: padded-vocab-size is 96",  # before the data is looked for
    ),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_nothing(call, home, tmp_path, argv, message):
    error = fails(call, tmp_path, "convert", "upcycle", str(home / "llama"), "out", *argv)
    assert message in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "only models with full_attention in all 2"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type = 'spiral'; it must be one of"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "scales RoPE (rope_type = 'linear'); only 'default' can be converted to Megatron",
        ),
    ],
)
def test_what_megatron_cannot_express_is_named_before_any_work(
    call, home, tmp_path, changes, message
):
    llama_of_nan(home, tmp_path, changes)  # the command ends before it reads a weight
    error = fails(call, tmp_path, "convert", "upcycle", "llama", "out", "--num-experts", "4")
    assert message in error and [p.name for p in tmp_path.iterdir()] == ["llama"]


def llama_of_nan(home: Path, folder: Path, changes: dict) -> None:
    shutil.copytree(home / "llama", folder / "llama")
    config = folder / "llama/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    weights = folder / "llama/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights)


def test_a_model_of_nan_is_not_used(call, home, tmp_path):
    """The weights are read once, by transformers, and checked then."""
    llama_of_nan(home, tmp_path, {})
    error = fails(call, tmp_path, "convert", "upcycle", "llama", "out", "--num-experts", "4")
    assert "model.norm.weight of llama has 32 values that are NaN or infinite" in error
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_a_mixture_is_no_start(call, tmp_path):
    call(write_model, RELU | UNTIED, tmp_path / "moe/iter_0000003")
    error = fails(call, tmp_path, "convert", "upcycle", "moe", "out", "--num-experts", "4")
    assert "moe has experts already; upcycling starts from a dense model" in error
