"""`remoe convert from-fork`: checkpoints of the published implementation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.mcore import tiny
from tests.mcore.fork_cases import COEFFICIENT, VARIANTS, logits_of, write_fork
from tests.mcore.test_convert import fails


def golden() -> Path | None:
    """The published implementation's own checkpoints: named, or `shared/golden` above here."""
    named = os.environ.get("REMOE_GOLDEN")
    folders = [Path(named)] if named else [p / "shared/golden" for p in Path(__file__).parents]
    return next((f / "fork_checkpoint" for f in folders if (f / "fork_checkpoint").is_dir()), None)


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_a_real_checkpoint_has_the_logits_that_the_fork_had(call, tmp_path, kind):
    folder = golden()
    if folder is None:
        pytest.skip("no checkpoint of the published implementation here (REMOE_GOLDEN)")
    expected = np.load(folder / "expected.npz")
    code, out, error = call(tiny.remoe, tmp_path, "convert", "from-fork", str(folder / kind), "out")
    assert code == 0, error
    assert "out/megatron/model.yaml" in out
    config = json.loads((tmp_path / "out/hf/config.json").read_text())
    assert config["l1_coeff"] == [float(expected["l1_coeff"])] * 2
    for made in ("hf", "megatron"):
        found = call(logits_of, tmp_path / "out" / made, expected["tokens"].tolist())
        assert (
            float((torch.stack(found) - torch.from_numpy(expected["logits"])).abs().max()) <= 1e-5
        )


@pytest.fixture(scope="module")
def models(call, tmp_path_factory) -> Path:
    """One model as ours and as the fork's in every variant, and ours exported: `hf`."""
    home = tmp_path_factory.mktemp("fork")
    call(write_fork, home)
    code, _, error = call(tiny.remoe, home, "convert", "to-hf", "ours", "hf")
    assert code == 0, error
    return home


@pytest.mark.parametrize("variant", [*VARIANTS, "torch_dist"])
def test_names_of_every_backend_are_the_same_model(call, models, tmp_path, variant):
    source = str(models / variant)
    code, out, error = call(tiny.remoe, tmp_path, "convert", "from-fork", source, "out")
    assert code == 0, error
    assert f"coefficient {COEFFICIENT}" in out
    expected = load_file(models / "hf/model.safetensors")
    found = load_file(tmp_path / "out/hf/model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    configs = [
        json.loads((f / "config.json").read_text()) for f in (models / "hf", tmp_path / "out/hf")
    ]
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "head_dim",
                "rms_norm_eps", "target_sparsity", "router_type", "router_dtype"):  # fmt: skip
        assert configs[0][key] == configs[1][key], key
    assert configs[1]["num_experts"] == 8 and configs[1]["l1_coeff"] == [COEFFICIENT] * 2
    assert configs[1]["training_facts"]["iteration"] == 3


def test_training_continues_from_it(call, models, tmp_path):
    argv = ["convert", "from-fork", str(models / "TE, grouped"), "out"]
    assert call(tiny.remoe, tmp_path, *argv)[0] == 0
    steps = {"train_iters": 2, "lr": 1e-4, "micro_batch_size": 2, "global_batch_size": 4}
    config = {"base": "out/megatron/model.yaml", "run_dir": "run", "mock_data": True}
    config |= steps | {"log_interval": 1, "eval_iters": 0, "eval_interval": 2, "num_workers": 0}
    (tmp_path / "on.yaml").write_text(json.dumps(config))
    code, out, error = call(tiny.remoe, tmp_path, "train", "on.yaml")
    assert code == 0, out + error
    rows = tiny.rows(tmp_path / "run")
    assert rows[0]["l1_coeff"] == COEFFICIENT
    assert rows[1]["l1_coeff"] in (
        pytest.approx(COEFFICIENT * 1.2),
        pytest.approx(COEFFICIENT / 1.2),
    )


def _spoil(home: Path, edit) -> None:
    path = next(home.glob("**/model_optim_rng.pt"))
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def _cut(home: Path, share: float) -> None:
    for file in [*home.glob("**/model_optim_rng.pt"), *home.glob("**/.metadata")]:
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


MISTAKES = {
    "ours": ("ours", lambda f: None, "was not written by the published implementation"),
    "cut off": ("local", lambda f: _cut(f, 0.6), "is cut off or damaged"),
    "empty": ("local", lambda f: _cut(f, 0), "is cut off or damaged"),
    "cut off, torch_dist": ("torch_dist", lambda f: _cut(f, 0.6), "cannot be read"),
    "no coefficient": (
        "local",
        lambda f: _spoil(f, lambda s: s["model"].pop("moe_relu_l1_reg_coeff")),
        "has no moe_relu_l1_reg_coeff; take one that",
    ),
    "expert missing": (
        "TE, grouped",
        lambda f: _spoil(
            f, lambda s: s["model"].pop("decoder.layers.1.mlp.experts.linear_fc2.weight5")
        ),
        "lacks expert 5; copy it again",
    ),
    "expert of another shape": (
        "TE, grouped",
        lambda f: _spoil(
            f,
            lambda s: s["model"].update(
                {"decoder.layers.1.mlp.experts.linear_fc2.weight5": torch.ones(3, 3)}
            ),
        ),
        "linear_fc2.weight0 has shape [3, 3] and [32, 24], which is not that of the experts",
    ),
    "two names of an expert": (
        "TE, grouped",
        lambda f: _spoil(
            f,
            lambda s: s["model"].update(
                {"decoder.layers.1.mlp.experts.local_experts.5.linear_fc2.weight": torch.ones(3)}
            ),
        ),
        "twice, the second time as decoder.layers.1.mlp.experts.local_experts.5.linear_fc2.weight",
    ),
    "expert without end": (
        "TE, grouped",
        lambda f: _spoil(
            f,
            lambda s: s["model"].update(
                {f"decoder.layers.1.mlp.experts.linear_fc2.weight{10**12}": torch.ones(3)}
            ),
        ),
        "lacks expert 8; copy it again",
    ),
    "one expert too many": (
        "grouped GEMM",
        lambda f: _spoil(
            f,
            lambda s: s["model"].update({"decoder.layers.0.mlp.router.weight": torch.ones(7, 32)}),
        ),
        "which is not that of the experts of a layer with 7 experts in its router",
    ),
    "another model": (
        "grouped GEMM",
        lambda f: _spoil(f, lambda s: setattr(s["args"], "hidden_size", 64)),
        "has shape",
    ),
    "no arguments": (
        "local",
        lambda f: _spoil(f, lambda s: s.pop("args")),
        "has no model with args",
    ),
}


@pytest.mark.parametrize(("kind", "spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_checkpoint_that_is_not_one_is_named_and_leaves_nothing(
    call, models, tmp_path, kind, spoil, message
):
    shutil.copytree(models / kind, tmp_path / "in")
    spoil(tmp_path / "in")
    assert message in fails(call, tmp_path, "convert", "from-fork", "in", "deep/out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_other_converters_name_the_right_one(call, models, tmp_path):
    for command in (["convert", "to-hf"], ["convert", "verify"]):
        error = fails(call, tmp_path, *command, str(models / "local"), "out")
        assert (
            "written by the published implementation; convert it with remoe convert from-fork"
            in error
        )
    assert not any(tmp_path.iterdir())
