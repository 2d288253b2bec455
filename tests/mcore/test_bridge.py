"""Our models go through Megatron-Bridge's own classes, and come back bit by bit.

Bridge is no dependency of the tests: `make test-bridge` fetches it and runs these. It needs a GPU's
packages; `bridge_cases` says what stands in for them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.remoe.ranks import Ranks
from tests.mcore.bridge_cases import (
    VARIABLE,
    between_ranks,
    bridge_folder,
    compare,
    config_and_hook,
    losses_in_transformers,
    names_of_transformer_engine,
    refusals,
    through_bridge,
)
from tests.mcore.convert_cases import FLAGS, RELU, UNTIED
from tests.mcore.test_convert import CASES, GRU

pytestmark = pytest.mark.skipif(
    bridge_folder() is None,
    reason=f"Megatron-Bridge is not here; run make test-bridge, or name its folder by {VARIABLE}",
)
MIXTURES = {name: flags for name, flags in CASES.items() if not name.startswith("dense")}
SEQUENTIAL = {"moe_grouped_gemm": False}


@pytest.mark.parametrize("flags", MIXTURES.values(), ids=MIXTURES)
def test_the_way_to_megatron_and_back_is_exact(call, tmp_path, flags):
    outcome = call(through_bridge, flags, tmp_path)
    assert outcome.different == [] and outcome.config == []
    assert len(outcome.names) > 10
    assert outcome.logits <= 1e-5
    assert outcome.to_ours == 0


def test_bf16_keeps_the_cell_and_the_coefficients_in_fp32(call, tmp_path):
    outcome = call(through_bridge, RELU | UNTIED | GRU | {"bf16": True}, tmp_path)
    assert outcome.different == [] and outcome.config == []
    assert outcome.to_ours == 0


@pytest.mark.parametrize("changes", [{}, SEQUENTIAL], ids=["grouped", "sequential"])
def test_a_trained_model_is_exported_as_by_remoe_convert(call, tmp_path, changes):
    outcome = call(through_bridge, RELU | UNTIED | changes, tmp_path, train=True)
    assert outcome.different == [] and outcome.to_ours == 0
    assert outcome.trained == [] and outcome.trained_config == []
    assert outcome.moved


@pytest.fixture(scope="module")
def model(call, tmp_path_factory) -> Path:
    """The folder of an exported model."""
    home = tmp_path_factory.mktemp("model")
    call(through_bridge, RELU | UNTIED, home)
    return home


def test_experts_have_the_names_of_transformer_engine_too(call, model):
    assert call(names_of_transformer_engine, model) == []


LAYOUTS = {
    "EP2": ({"expert_model_parallel_size": 2}, {}),
    "EP2, sequential": ({"expert_model_parallel_size": 2}, SEQUENTIAL),
    "TP2": ({"tensor_model_parallel_size": 2}, {}),
    "PP2": ({"pipeline_model_parallel_size": 2}, {}),
}


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_have_their_parts(two, model, layout):
    sizes, experts = LAYOUTS[layout]
    shutil.rmtree(model / "ranks", ignore_errors=True)
    results = two.run(between_ranks, RELU | UNTIED | experts, sizes, 2, model)
    check(results, model)


def test_experts_of_which_ranks_have_a_part(two, model):
    shutil.rmtree(model / "ranks", ignore_errors=True)
    layout = {"tensor_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}
    changes = {"expert_tensor_parallel_size": 2}
    results = two.run(between_ranks, RELU | UNTIED | changes, layout, 2, model)
    assert results[0][0]["decoder.layers.0.mlp.experts.linear_fc1"] == [4, 48, 32]
    check(results, model)


def check(results, model: Path) -> None:
    """What ranks have is the model, which two wrongs that undo each other would not be."""
    assert compare(model / "hf", model / "ranks")[0] == []
    expected = losses_in_transformers(model / "hf", FLAGS["padded_vocab_size"])
    for _, losses in results:
        if losses is not None:
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_by_name(call, model):
    for name in ("lacks", "without", "rope"):
        shutil.copytree(model / "hf", model / name)
    weights = load_file(model / "lacks/model.safetensors")
    del weights["model.layers.1.mlp.router.weight"]
    save_file(weights, model / "lacks/model.safetensors", metadata={"format": "pt"})
    edit(model / "without", l1_coeff=None)
    edit(model / "rope", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    said = call(refusals, RELU | UNTIED, model)
    missing = "the Megatron model lacks config.l1_coeff.0, config.l1_coeff.1; weights and"
    assert said["topk"].startswith(missing) and said["topk, saved"].startswith(missing)
    assert "the model's config has l1_coeff [" in said["stale"]
    assert "save the model with megatron.remoe.bridge.save_hf_pretrained" in said["stale"]
    assert "lacks model.layers.1.mlp.router.weight;" in said["lacks"]
    assert said["without l1_coeff"].startswith("the model's config has no l1_coeff of 2 values")
    assert "config.json scales RoPE" in said["rope"]


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_the_config_comes_back_and_bridge_calls_our_hook(call, model):
    different, is_ours, groups = call(config_and_hook, model)
    assert different == []
    assert is_ours and groups == "groups"
