"""`remoe analyze`: its numbers are those of plain torch, worked out from the routers' weights."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from remoe.hf import ReMoEForCausalLM
from tests.mcore import tiny
from tests.mcore.convert_cases import RELU, TOPK, UNTIED, write_model
from tests.mcore.test_convert import GRU, fails
from tests.test_analysis import loop_information
from tests.test_compare import remoe
from tests.test_hf import SIZES, build

LENGTH, SEQUENCES = 16, {"code": 5, "prose": 8}
RECURRENT = {"recurrence": "gru", "recurrent_size": 8}
RELU_ROUTER = {"router_type": "relu", "l1_coeff": [1e-8, 1e-8]}
MODELS = {
    "relu": RELU_ROUTER,
    "relu_gru": RELU_ROUTER | RECURRENT,
    "relu_l2": RELU_ROUTER | {"router_type": "relu_l2"},
    "topk": {"router_type": "topk_pre_softmax"},
    "topk_sigmoid_gru": {"router_type": "topk_sigmoid"} | RECURRENT,
    "topk_gru": {"router_type": "topk_post_softmax"} | RECURRENT,
}


def write_tokens(folder: Path) -> None:
    """One document for each domain, of whole sequences and the last label."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir()
    for domain, count in SEQUENCES.items():
        builder = IndexedDatasetBuilder(str(folder / f"{domain}.bin"))
        builder.add_document(tokens_of(domain), [count * LENGTH + 1])
        builder.finalize(str(folder / f"{domain}.idx"))


def tokens_of(domain: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(domain))
    return torch.randint(64, (SEQUENCES[domain] * LENGTH + 1,), generator=generator)


def made(name: str) -> ReMoEForCausalLM:
    """A model of `MODELS`, whose gates are negative if their scale is learned."""
    model = build(**MODELS[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gate_scale"):
                parameter.fill_(-0.5)
    return model


@pytest.fixture(scope="module")
def home(call, tmp_path_factory) -> Path:
    """Token files, and models of which the layer in the middle is dense."""
    home = tmp_path_factory.mktemp("analyze")
    call(write_tokens, home / "tokens")
    for name in MODELS:
        made(name).save_pretrained(home / name)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    dense = LlamaConfig(**sizes, num_hidden_layers=1, intermediate_size=48, num_key_value_heads=2)
    LlamaForCausalLM(dense).save_pretrained(home / "dense")
    return home


FLAGS = ["--data", "tokens", "--sequence-length", str(LENGTH)]


def analyze(call, home: Path, *argv: str) -> tuple[dict, str]:
    """The numbers that are written, and what is printed."""
    code, out, error = call(tiny.remoe, home, "analyze", *argv, *FLAGS, "--out", "out", "--force")
    assert code == 0, out + error
    return json.loads((home / "out/routing.json").read_text()), out


def plain_gates(model) -> list[torch.Tensor]:
    """Scores of both layers with experts by `torch.nn.GRUCell` and matrices, `[T, E]`."""
    read: list[torch.Tensor] = []
    layers = [layer for layer in model.model.layers if not layer.is_dense]
    for layer in layers:
        norm = layer.post_attention_layernorm
        norm.register_forward_hook(lambda _, __, out: read.append(out.flatten(0, 1)))
    state, gates = None, []
    with torch.no_grad():
        model(torch.cat([tokens_of(d)[:-1] for d in SEQUENCES]).view(-1, LENGTH))
        for x, layer in zip(read, layers, strict=True):
            router = layer.mlp.router
            if model.config.recurrence == "gru":
                cell = torch.nn.GRUCell(8, 8)
                cell.load_state_dict(model.model.recurrent_cell.state_dict())
                x = state = cell(x @ router.projection.T, state)
            logits = x @ router.weight.T
            match model.config.router_type:
                case "relu":
                    gates.append(logits.relu())
                case "relu_l2":  # the size of its gates, of a scale of -1/2
                    gates.append(functional.normalize(logits, dim=1).relu() / 2)
                case "topk_sigmoid":
                    gates.append(torch.sigmoid(logits))
                case _:
                    gates.append(torch.softmax(logits, dim=1))
    return gates


def cells_of(scores: torch.Tensor, k: int, is_relu: bool) -> dict[str, float]:
    """The numbers of some tokens, token by token."""
    ranked = [sorted(token, reverse=True) for token in scores.tolist()]
    active = [sum(s > 0 for s in token) if is_relu else k for token in ranked]
    masses = [sum(token[:k]) / sum(token) for token in ranked if token[0] > 0]
    ratios = [token[0] / token[1] for token in ranked if token[1] > 0]
    return {
        "active_experts": statistics.fmean(active),
        "two_active": statistics.fmean(a >= 2 for a in active),
        "inner_balance": statistics.median_low(ratios),
        "outer_balance": statistics.median_low(masses),
        "outer_balance_mean": statistics.fmean(masses),
    }


def leading(scores: torch.Tensor) -> list[int]:
    return [t.index(max(t)) if max(t) > 0 else -1 for t in scores.tolist()]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_the_routers_weights(call, home, name):
    found, out = analyze(call, home, name)
    (report,) = found["models"]
    assert report["tokens"] == LENGTH * sum(SEQUENCES.values())
    assert [row["layer"] for row in report["layers"]] == [1, 3]
    model = made(name)
    gates, is_relu = plain_gates(model), name.startswith("relu")
    for row, scores in zip(
        [*report["layers"], report["summary"]], [*gates, torch.cat(gates)], strict=True
    ):
        expected = cells_of(scores, model.config.num_experts_per_tok, is_relu)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    active = sum(scores.gt(0).sum(dim=1) if is_relu else model.config.num_experts_per_tok
                 for scores in gates) / len(gates)  # fmt: skip
    active = torch.as_tensor(active).expand(len(gates[0]))
    first = SEQUENCES["code"] * LENGTH  # tokens of the first domain, which come first here
    for domain, tokens in (("code", active[:first]), ("prose", active[first:])):
        found_mean = report["summary"][f"active_domain_{domain}"]
        assert found_mean == pytest.approx(tokens.double().mean().item())
    information = loop_information(leading(gates[0]), leading(gates[1]))
    assert report["summary"]["information"] == pytest.approx(information, abs=1e-6)
    assert 0 < report["summary"]["information_shuffled"] < information
    if is_relu:
        assert 0 < report["summary"]["two_active"] < 1 and -1 in leading(gates[0])
    assert f"{name}: {model.config.router_type}, k 2, 208 tokens" in out
    assert (home / "out/routing.md").read_text() in out.replace("\r", "")


def test_fewer_tokens_are_whole_sequences_of_all_domains_in_turn(call, home):
    """Three sequences: two of the first domain, and one of the other."""
    found, _ = analyze(call, home, "relu", "--tokens", str(4 * LENGTH - 1))
    assert found["models"][0]["tokens"] == 3 * LENGTH
    again, _ = analyze(call, home, "relu", "--tokens", str(4 * LENGTH - 1))
    assert again == found
    other, _ = analyze(call, home, "relu", "--tokens", str(4 * LENGTH - 1), "--seed", "7")
    assert other["models"][0]["layers"] != found["models"][0]["layers"]


@pytest.mark.parametrize("router", [RELU, TOPK], ids=["relu", "topk"])
def test_a_checkpoint_has_the_numbers_of_its_export_and_seeds_are_one_row(
    call, home, tmp_path, router
):
    (tmp_path / "tokens").symlink_to(home / "tokens")
    for seed in (1, 2):
        run = remoe(tmp_path, f"seed-{seed}", 2.0, seed=seed)
        call(write_model, router | UNTIED | GRU, run / "iter_0000003")  # where its `save` points
    code, out, error = call(tiny.remoe, tmp_path, "convert", "to-hf", "seed-1", "hf")
    assert code == 0, out + error
    found, _ = analyze(call, tmp_path, "seed-1", "seed-2", "hf")
    first, second, exported = found["models"]
    assert first["layers"] == second["layers"] == exported["layers"]
    grouped, alone = found["summary"]
    assert (grouped["run"], grouped["seeds"], alone["run"]) == ("ReMoE", 2, "hf")
    assert grouped["inner_balance"] == alone["inner_balance"]
    assert grouped["inner_balance_std"] == 0 and alone["inner_balance_std"] is None


MISTAKES = {
    "a dense model": (
        ["relu", "dense"],
        [],
        "dense is a dense model, which routes no token; leave",
    ),
    "no model": (["nowhere"], [], "nowhere does not exist; name a run directory, a checkpoint or"),
    "no token files": (
        ["relu"],
        ["--data", "relu"],
        "relu holds no .bin/.idx files; name a folder",
    ),
    "few tokens": (["relu"], ["--tokens", "15"], "tokens is 15, less than one sequence of 16; ask"),
    "long sequences": (
        ["relu"],
        ["--tokens", "900", "--sequence-length", "900"],
        "so no sequence of 900; use shorter sequences (--sequence-length)",
    ),
    "a file as folder": (["relu"], ["--out", "tokens/code.bin"], "tokens/code.bin is a file; name"),
    "another vocabulary": (["small"], [], "the model's vocabulary has 32 entries; tokenize with"),
}


@pytest.mark.parametrize(("models", "flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, home, tmp_path, models, flags, message):
    build(**RELU_ROUTER, vocab_size=32).save_pretrained(home / "small")
    before = sorted(home.rglob("*"))
    out = ["--out", str(tmp_path / "out")]
    assert message in fails(call, home, "analyze", *models, *FLAGS, *out, *flags)
    assert sorted(home.rglob("*")) == before and not (tmp_path / "out").exists()
