"""`remoe convert from-fork`: checkpoints of the published implementation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron.remoe.formats.legacy import LegacyReader
from tests.mcore import tiny
from tests.mcore.fork_cases import COEFFICIENT, VARIANTS, logits_of, write_fork, write_ranks
from tests.mcore.test_convert import fails

STEP = "iter_0000003"
FILE = f"{STEP}/mp_rank_00/model_optim_rng.pt"


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


LAYOUTS = {
    "TP2": {"stages": [[0, 1, 2, 3]], "tp": 2},
    "EP4": {"stages": [[0, 1, 2, 3]], "ep": 4},
    "PP2, uneven": {"stages": [[0], [1, 2, 3]]},
    "PP2, virtual": {"stages": [[0], [1], [2], [3]], "virtual": 2},
    "TP2 x PP2 x EP2": {"stages": [[0, 1], [2, 3]], "tp": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def deep(models, tmp_path_factory) -> Path:
    """The checkpoint of every variant, with four layers."""
    home = tmp_path_factory.mktemp("deep")
    for variant in VARIANTS:
        state = torch.load(models / variant / FILE, weights_only=False)
        for name in [n for n in state["model"] if n.startswith("decoder.layers.")]:
            words, value = name.split("."), state["model"][name]
            words[2] = str(int(words[2]) + 2)
            more = value + 1 if isinstance(value, torch.Tensor) else value
            state["model"][".".join(words)] = more
        (home / variant / FILE).parent.mkdir(parents=True)
        torch.save(state, home / variant / FILE)
    return home


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_make_the_checkpoint_of_one_rank(deep, tmp_path, variant, layout):
    whole = deep / variant / STEP
    write_ranks(whole, tmp_path / STEP, **LAYOUTS[layout])
    expected, found = LegacyReader(whole), LegacyReader(tmp_path / STEP)
    assert len(list((tmp_path / STEP).iterdir())) > 1
    assert expected.meta.keys() == found.meta.keys()
    for name, meta in expected.meta.items():
        assert found.meta[name].shape == meta.shape, name
        assert torch.equal(found.read(name), expected.read(name)), name


def test_ranks_are_converted_to_the_same_model(call, models, tmp_path):
    """Every kind of parallelism at once, with a copy of nothing else than the ranks' files."""
    write_ranks(models / "grouped GEMM" / STEP, tmp_path / "in" / STEP, [[0], [1]], tp=2, ep=2)
    code, _, error = call(tiny.remoe, tmp_path, "convert", "from-fork", "in", "out")
    assert code == 0, error
    expected = load_file(models / "hf/model.safetensors")
    found = load_file(tmp_path / "out/hf/model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_tensor_parallel_ranks_may_have_coefficients_of_their_own(deep, tmp_path, capsys):
    """The fork reduces the sparsity over the other ranks only."""
    write_ranks(deep / "local" / STEP, tmp_path / STEP, [[0, 1], [2, 3]], tp=2)
    for stage in range(2):
        file = tmp_path / STEP / f"mp_rank_01_00{stage}/model_optim_rng.pt"
        _of_file(file, lambda s: s["model"].update(moe_relu_l1_reg_coeff=torch.tensor(0.5)))
    reader = LegacyReader(tmp_path / STEP)
    assert reader.read("moe_relu_l1_reg_coeff").item() == COEFFICIENT
    assert f"have the coefficients {COEFFICIENT}, 0.5, since" in capsys.readouterr().out


def test_a_copy_of_the_embedding_on_the_last_stage_is_no_weight_of_its_own(deep, tmp_path):
    changes = {"untie_embeddings_and_output_weights": False}
    write_ranks(deep / "local" / STEP, tmp_path / STEP, [[0, 1], [2, 3]], tp=2, **changes)
    with pytest.raises(ValueError, match="must be the same, and differ"):
        LegacyReader(tmp_path / STEP)
    for t in range(2):
        first, last = (tmp_path / STEP / f"mp_rank_0{t}_00{p}/model_optim_rng.pt" for p in range(2))
        copy = torch.load(first, weights_only=False)["model"]["embedding.word_embeddings.weight"]
        state = torch.load(last, weights_only=False)
        state["model"]["output_layer.weight"] = copy
        torch.save(state, last)
    names = LegacyReader(tmp_path / STEP).meta.keys()
    assert "output_layer.weight" not in names and "decoder.layers.3.mlp.router.weight" in names


RANK = "mp_rank_01_001_001"


def _of_rank(edit):
    """Change what the last rank has saved."""
    return lambda folder: _of_file(folder / RANK / "model_optim_rng.pt", edit)


MISFITS = {
    "missing": (lambda f: shutil.rmtree(f / RANK), f"{RANK}/model_optim_rng.pt is missing"),
    "first missing": (
        lambda f: shutil.rmtree(f / "mp_rank_00_000_000"),
        "mp_rank_00_000_000/model_optim_rng.pt is missing: .* 2 x 2 x 2 ranks",
    ),
    "one too many": (
        lambda f: shutil.copytree(f / RANK, f / "mp_rank_02_001_001"),
        "mp_rank_02_001_001 is not a rank of this checkpoint",
    ),
    "iteration": (_of_rank(lambda s: s.update(iteration=4)), f"{RANK}.* has iteration 4, and"),
    "argument": (
        _of_rank(lambda s: setattr(s["args"], "seed", 7)),
        f"{RANK}/model_optim_rng.pt has seed 7, and",
    ),
    "shape": (
        _of_rank(lambda s: s["model"].update({"decoder.final_layernorm.weight": torch.ones(3)})),
        r"has decoder.final_layernorm.weight as torch.float32 of shape \[3\]",
    ),
    "lacks": (
        _of_rank(lambda s: s["model"].pop("decoder.final_layernorm.weight")),
        f"{RANK}/model_optim_rng.pt lacks decoder.final_layernorm.weight",
    ),
    "coefficient": (
        _of_rank(lambda s: s["model"].update(moe_relu_l1_reg_coeff=torch.tensor(1.0))),
        "moe_relu_l1_reg_coeff must be the same on all ranks, and differs",
    ),
    "other split of experts": (
        lambda f: [
            _of_file(file, lambda s: setattr(s["args"], "expert_tensor_parallel_size", 1))
            for file in f.glob("*/model_optim_rng.pt")
        ],
        "expert_tensor_parallel_size 1 and tensor_model_parallel_size 2",
    ),
    "no size": (
        lambda f: [
            _of_file(file, lambda s: setattr(s["args"], "pipeline_model_parallel_size", 10**12))
            for file in f.glob("*/model_optim_rng.pt")
        ],
        "mp_rank_00_002_000/model_optim_rng.pt is missing",
    ),
}


def _of_file(file: Path, edit) -> None:
    state = torch.load(file, weights_only=False)
    edit(state)
    torch.save(state, file)


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS)
def test_ranks_that_do_not_fit_are_named(deep, tmp_path, spoil, message):
    write_ranks(deep / "TE, grouped" / STEP, tmp_path / STEP, [[0, 1], [2, 3]], tp=2, ep=2)
    spoil(tmp_path / STEP)
    with pytest.raises(ValueError, match=message):
        reader = LegacyReader(tmp_path / STEP)
        reader.read("moe_relu_l1_reg_coeff")


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
