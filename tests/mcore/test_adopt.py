"""`remoe adopt` and `remoe budget` on an OLMoE that was trained on a chain, by transformers."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from remoe.hf import ReMoEForCausalLM
from tests.mcore import tiny
from tests.mcore.test_convert import fails
from tests.test_hf import build

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "eos_token_id": None,
}
LENGTH, DOCUMENTS = 32, ("even", "odd")
FLAGS = ["--data", "tokens", "--steps", "30", "--batch-size", "4", "--router", "relu"]
FLAGS += ["--active-experts", "0.7"]


def chain(name: str) -> torch.Tensor:
    """A document whose tokens follow each other by a sparse random matrix of its own."""
    generator = torch.Generator().manual_seed(len(name))
    likely = torch.randint(64, (64, 3), generator=generator)
    tokens = [0]
    for pick in torch.randint(3, (16 * LENGTH,), generator=generator).tolist():
        tokens.append(int(likely[tokens[-1], pick]))
    return torch.tensor(tokens)


def write_tokens(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir()
    for name in DOCUMENTS:
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"))
        builder.add_document(chain(name), [16 * LENGTH + 1])
        builder.finalize(str(folder / f"{name}.idx"))


@pytest.fixture(scope="module")
def home(call, tmp_path_factory) -> Path:
    """Token files and an OLMoE that has learned from them; `adopted` is made from it."""
    home = tmp_path_factory.mktemp("adopt")
    call(write_tokens, home / "tokens")
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    text = torch.cat([chain(name)[:-1].view(-1, LENGTH) for name in DOCUMENTS])
    for _ in range(40):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 3  # that of chance is 4.2
    model.save_pretrained(home / "olmoe")
    code, out, error = call(tiny.remoe, home, "adopt", "olmoe", "adopted", *FLAGS)
    assert code == 0, error
    return home


def loss_of(model, sequences: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(sequences[:, :-1]).logits
    return float(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    )


def test_losses_are_those_of_transformers_on_text_that_was_held_out(home):
    record = json.loads((home / "adopted/adoption.json").read_text())
    losses, facts = record["losses"], json.loads((home / "adopted/config.json").read_text())
    facts = facts["training_facts"]["adoption"]
    assert facts["final"] == losses["final"] and facts["k"] == 2
    # The first sequences of both documents are held out, an eighth of the 32.
    assert (record["held_out_sequences"], record["train_sequences"]) == (4, 28)
    generator = [_sequences(home, name)[:2] for name in DOCUMENTS]
    held_out = torch.cat(generator)
    teacher = OlmoeForCausalLM.from_pretrained(home / "olmoe")
    assert losses["teacher"] == pytest.approx(loss_of(teacher, held_out), abs=1e-5)
    adopted = AutoModelForCausalLM.from_pretrained(home / "adopted", trust_remote_code=True)
    assert losses["final"] == pytest.approx(loss_of(adopted, held_out), abs=1e-5)
    with torch.no_grad():
        active = ReMoEForCausalLM.from_pretrained(home / "adopted")(
            held_out[:, :-1], output_routing=True
        ).active_experts
    assert losses["active"] == pytest.approx(float(torch.stack(active).double().mean()))
    assert losses["active"] == pytest.approx(0.7, rel=0.15)
    # The first sequences that are left are those that thresholds are set by, layer by layer.
    calibration = torch.cat([_sequences(home, name)[2:10] for name in DOCUMENTS])[:, :-1]
    with torch.no_grad():
        active = adopted(calibration, output_routing=True).active_experts
    of_layers = torch.stack(active).double().mean(dim=tuple(range(1, active[0].ndim + 1))).tolist()
    assert of_layers == pytest.approx(record["active_experts_of_layers"], rel=0.02)
    assert sum(of_layers) / 2 == pytest.approx(0.7, rel=0.01)
    assert losses["initial"] < losses["teacher"] + 0.1  # with two experts per token
    assert losses["final"] < losses["pruned"]
    card = (home / "adopted/README.md").read_text()
    assert f"{losses['final']:.4f}" in card and f"{losses['teacher']:.4f}" in card


def _sequences(home: Path, name: str) -> torch.Tensor:
    """The sequences of a document with their last label, in the order of Megatron's dataset."""
    import tempfile

    from megatron.remoe.evaluate.perplexity import sequences

    with tempfile.TemporaryDirectory() as scratch:
        dataset = sequences(home / "tokens" / name, LENGTH, 1234, Path(scratch))
        rows = [dataset[i] for i in range(len(dataset))]
    return torch.stack([torch.cat((row["tokens"], row["labels"][-1:])) for row in rows])


def test_losses_are_those_of_the_files_that_are_held_out(call, home, tmp_path):
    shutil.copytree(home / "tokens", home / "others")
    (home / "others/odd.bin").unlink(), (home / "others/odd.idx").unlink()
    argv = ["adopt", "olmoe", "apart", "--data", "tokens/odd", "--held-out", "others"]
    code, _, error = call(tiny.remoe, home, *argv, "--active-experts", "1.5", "--steps", "0")
    assert code == 0, error
    record = json.loads((home / "apart/adoption.json").read_text())
    assert (record["data"], record["held_out_data"]) == ("tokens/odd", "others")
    teacher = OlmoeForCausalLM.from_pretrained(home / "olmoe")
    expected = loss_of(teacher, _sequences(home, "even"))
    assert record["losses"]["teacher"] == pytest.approx(expected, abs=1e-5)


def adopt_until(home: Path, step: int, out: str) -> None:
    """Adopt as the fixture does, and stop after a step as ^C does."""
    import contextlib

    from megatron.remoe.adopt import adopt
    from megatron.remoe.cli.common import prepare

    def stop(done: int, total: int, text: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    prepare()
    settings = adopt.Settings(0.7, steps=30, batch_size=4, router="relu")
    with contextlib.chdir(home), contextlib.suppress(KeyboardInterrupt):
        adopt.adopt(Path("olmoe"), Path(out), Path("tokens"), settings, shown=stop)


def test_an_interrupted_adoption_goes_on_to_the_same_bits(call, home):
    call(adopt_until, home, 13, "again")  # and is saved again after that
    assert not (home / "again").exists() and (home / ".again.adopting/state.pt").is_file()
    message = fails(call, home, "adopt", "olmoe", "again", *FLAGS[:-1], "1.5")
    assert "an adoption to again with active_experts 0.7 was interrupted" in message
    code, _, error = call(tiny.remoe, home, "adopt", "olmoe", "again", *FLAGS)
    assert code == 0, error
    assert not (home / ".again.adopting").exists()
    for name in ("model.safetensors", "config.json", "adoption.json"):
        assert (home / "again" / name).read_bytes() == (home / "adopted" / name).read_bytes()


def test_an_adoption_of_weights_that_have_changed_does_not_go_on(call, home):
    shutil.copytree(home / "olmoe", home / "moved")
    argv = ["adopt", "moved", "stopped", "--data", "tokens", "--active-experts", "1", "--steps"]
    message = fails(call, home, *argv, "9", "--lr", "1e30", "--all-weights")
    assert "start anew with a lower learning rate than 1e+30" in message
    OlmoeForCausalLM(OlmoeConfig(**SIZES)).save_pretrained(home / "moved")
    message = fails(call, home, *argv, "9", "--lr", "1e30", "--all-weights")
    assert "an adoption to stopped with weights '" in message
    code, _, error = call(tiny.remoe, home, *argv, "1", "--batch-size", "1", "--force")
    assert code == 0 and not (home / ".stopped.adopting").exists(), error


def test_state_is_discarded_once_its_output_is_in_its_place(tmp_path):
    """As after a kill between the two, and not if the output is that of an earlier adoption."""
    from megatron.remoe.adopt.state import discard_finished, saved_beside

    out = tmp_path / "out"
    with saved_beside(out, {"steps": 1}, force=False) as saved:
        saved.write({})
        message = "is being made by another process"
        with pytest.raises(ValueError, match=message), saved_beside(out, {}, force=False):
            pass
        assert saved.read() == {}  # which the second one has left alone
        out.mkdir()
        record = out / "adoption.json"
        record.write_text("{}")
        os.utime(record, (0, 0))
        discard_finished(out, record)
        os.utime(record)
        discard_finished(out, record)  # while another process holds it
        assert saved.read() == {}
    discard_finished(out, record)
    assert not saved.folder.exists()


def test_a_topk_model_of_ours_is_adopted_in_other_ways(call, home):
    """With its own router under a threshold, with the L1 penalty, and with a lower k."""
    model = build(mlp_only_layers=[1], router_type="topk_pre_softmax", initializer_range=0.1)
    model.save_pretrained(home / "ours")
    before = model.state_dict()
    for name, flags in {
        "kept": ["--active-experts", "1.5"],
        "l1": ["--router", "relu", "--walk", "l1", "--active-experts", "1.5"],
        "lower": ["--keep-topk", "1"],
        "whole": ["--router", "relu", "--all-weights", "--active-experts", "1.5"],
    }.items():
        argv = ["adopt", "ours", name, "--data", "tokens", "--steps", "8", *flags]
        code, out, error = call(tiny.remoe, home, *argv, "--batch-size", "2")
        assert code == 0, error
        after = ReMoEForCausalLM.from_pretrained(home / name)
        changed = {n for n, w in after.state_dict().items() if not torch.equal(w, before[n])}
        is_router = {".mlp.router." in n for n in changed}
        assert is_router == ({True, False} if name == "whole" else {True})
        losses = json.loads((home / name / "adoption.json").read_text())["losses"]
        target = 1.0 if name == "lower" else 1.5
        if name == "l1":  # whose controller may take away more than it should, in a few steps
            assert losses["active"] < 1.65
        else:
            assert losses["active"] == pytest.approx(target, rel=0.25)  # of 128 tokens
        assert (losses["initial"] == losses["teacher"]) == (name in ("kept", "lower"))
        assert after.config.router_type == (
            "relu" if name in ("l1", "whole") else model.config.router_type
        )
    argv = ["budget", "kept", "--data", "tokens", "--points", "0.5,1,1.5", "--out", "moved"]
    code, out, error = call(tiny.remoe, home, *argv)
    assert code == 0, error
    own = ReMoEForCausalLM.from_pretrained(home / "kept").config.gate_threshold
    (curve,) = json.loads((home / "moved/budget.json").read_text())["curves"]
    assert curve["left_out"] == [3] and len(curve["points"]) == 3  # of the teacher's two
    assert [p["active"] for p in curve["points"][1:]] == pytest.approx([1, 2], rel=0.03)
    for point in curve["points"][1:]:
        assert point["value"][0] - own[0] == pytest.approx(point["value"][1] - own[1])
        assert f"| thresholds of layers, {min(point['value']):.4g} to " in out
    message = fails(call, home, "adopt", "kept", "twice", *FLAGS)
    assert "kept has a threshold of gates, so that it is adopted already" in message
    message = fails(call, home, "convert", "to-megatron", "kept", "back")
    assert "config.json has gate_threshold" in message
    message = fails(call, home, "convert", "to-megatron", "adopted", "back")
    assert "qk_norm = 'projection', as OLMoE does, but Megatron's qk_layernorm" in message


def test_the_budget_of_a_model_is_that_of_transformers_with_another_k(call, home):
    flags = ["--data", "tokens", "--points", "0.5,1,1.5", "--out", "curves"]
    code, out, error = call(tiny.remoe, home, "budget", "olmoe", "adopted", *flags)
    assert code == 0, error
    found = json.loads((home / "curves/budget.json").read_text())
    theirs, ours = found["curves"]
    text = torch.cat([_sequences(home, name) for name in DOCUMENTS])
    assert [(p["by"], p["active"]) for p in theirs["points"]] == [("none", 2), ("k", 1), ("k", 3)]
    losses = {}
    for point in theirs["points"]:
        config = {"num_experts_per_tok": int(point["active"])}
        model = OlmoeForCausalLM.from_pretrained(home / "olmoe", **config)
        losses[point["active"]] = torch.tensor([loss_of(model, row[None]) for row in text])
        assert point["loss"] == pytest.approx(float(losses[point["active"]].mean()), abs=1e-5)
        extra = losses[point["active"]] - losses[2]
        wide = 2.0395 * float(extra.std()) / math.sqrt(32)  # of t with 31 degrees of freedom
        assert point["extra_half_width"] == pytest.approx(wide, rel=1e-3, abs=1e-6)
    active = [p["active"] for p in ours["points"]]
    assert [p["by"] for p in ours["points"]][1:3] == ["threshold", "threshold"]
    assert active[1:] == pytest.approx([1, 2, 3], rel=0.02) and active[0] == pytest.approx(
        0.7, rel=0.15
    )
    rows = (home / "curves/budget.csv").read_text().splitlines()
    assert len(rows) == 1 + len(theirs["points"]) + len(ours["points"])
    assert (home / "curves/budget.png").stat().st_size > 10_000
    assert "| k 1 | 1.000 |" in out and "32 sequences of 32" in out
    assert "Left out" not in out


def test_a_number_of_experts_that_no_threshold_leaves_is_left_out_of_the_curve(call, home):
    limited = build(max_active_experts=1, num_experts_per_tok=1, l1_coeff=[1e-8] * 2)
    limited.save_pretrained(home / "limited")
    argv = ["budget", "limited", "--data", "tokens", "--points", "0.5,2,9,2"]
    code, out, error = call(tiny.remoe, home, *argv)
    assert code == 0, error
    (curve,) = json.loads((home / "limited/budget.json").read_text())["curves"]
    assert curve["left_out"] == [2, 9] and [p["by"] for p in curve["points"]][1:] == ["threshold"]
    assert "Left out, because no threshold or offset leaves as many: 2, 9." in out


MISTAKES = {
    "above k": (
        ["olmoe", "--active-experts", "3"],
        "active_experts is 3; it must be above 0 and at",
    ),
    "zero": (["olmoe", "--active-experts", "0"], "active_experts is 0; it must be above 0"),
    "nothing": (["olmoe"], "give one of --active-experts and --keep-topk"),
    "dense": (["dense", "--active-experts", "1"], "dense is a dense model, which has no experts"),
    "adaptive": (["adopted", "--active-experts", "1"], "adopted has the router relu, and a TopK"),
    "unknown": (["gpt", "--active-experts", "1"], "has model_type 'gpt2'; remoe and llama can be"),
    "router": (
        ["olmoe", "--active-experts", "1", "--router", "x"],
        "router is 'x'; it must be one",
    ),
    "no gates": (
        ["olmoe", "--active-experts", "1", "--walk", "l1"],
        "the walk is l1, which acts on gates of a ReLU; choose --router relu",
    ),
    "rate": (["olmoe", "--active-experts", "1", "--lr", "nan"], "lr is nan; it must be a number"),
    "two routers": (
        ["olmoe", "--keep-topk", "1", "--router", "relu"],
        "router is 'relu' beside keep_topk 1, which keeps the teacher's",
    ),
    "long": (
        ["olmoe", "--active-experts", "1", "--sequence-length", "64"],
        "sequence_length is 64, and olmoe has 32 positions",
    ),
    "short": (
        ["olmoe", "--active-experts", "1", "--sequence-length", "8", "--steps", "1"],
        "tokens has 128 tokens to set a threshold by, fewer than 512",
    ),
    "out of reach": (
        ["one", "--active-experts", "0.5"],
        "active_experts is 0.5, which cannot be met within 1%: the nearest threshold leaves",
    ),
    "held out": (
        ["olmoe", "--active-experts", "1", "--held-out", "nothing"],
        "nothing holds no .bin",
    ),
    "no experts": (["without", "--active-experts", "1"], "without is a dense model, which has no"),
    "little": (
        ["olmoe", "--active-experts", "1", "--batch-size", "40"],
        "tokens has 28 sequences of 32 tokens beside 4 held out, fewer than the 40 of a step",
    ),
    "vocabulary": (["small", "--active-experts", "1"], "the model's vocabulary has 20 entries"),
    "in place": (["olmoe", "--active-experts", "1", "--force"], "olmoe, which must stay"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(call, home, name):
    argv, message = MISTAKES[name]
    (home / "gpt").mkdir(exist_ok=True)
    (home / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    if not (home / "dense").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_attention_heads")}
        dense = LlamaConfig(**sizes, num_hidden_layers=1, intermediate_size=8)
        LlamaForCausalLM(dense).save_pretrained(home / "dense")
        OlmoeForCausalLM(OlmoeConfig(**SIZES | {"vocab_size": 20})).save_pretrained(home / "small")
        one = SIZES | {"num_experts_per_tok": 1, "norm_topk_prob": True}
        OlmoeForCausalLM(OlmoeConfig(**one)).save_pretrained(home / "one")
        without = Qwen3MoeConfig(
            **SIZES, num_key_value_heads=2, head_dim=16, mlp_only_layers=[0, 1]
        )
        Qwen3MoeForCausalLM(without).save_pretrained(home / "without")
    out = "olmoe" if name == "in place" else "made"
    argv = ["adopt", argv[0], out, "--data", "tokens", *argv[1:]]
    before = sorted(home.rglob("*"))
    assert message in fails(call, home, *argv)
    assert sorted(home.rglob("*")) == before


def test_a_budget_that_cannot_be_measured_is_refused(call, home):
    flags = ["--data", "tokens"]
    assert "2 models share one figure" in fails(call, home, "budget", "olmoe", "adopted", *flags)
    argv = ["budget", "olmoe", *flags, "--points", "0.5,none"]
    assert "points is '0.5,none'; it must be numbers" in fails(call, home, *argv)
    argv = ["budget", "olmoe", *flags, "--tokens", "64"]
    assert "64 tokens are too few to set a budget by" in fails(call, home, *argv)
    assert not (home / "olmoe/budget.json").exists()


def test_data_of_another_tokenizer_is_refused(call, home, tmp_path):
    from tokenizers import Tokenizer, models

    for folder, entries in (("model", ["a", "b"]), ("data", ["b", "a"])):
        target = tmp_path / folder / ("tokenizer" if folder == "data" else "")
        if folder == "model":
            shutil.copytree(home / "olmoe", target)
            shutil.copytree(home / "tokens", tmp_path / "data/train")
        target.mkdir(parents=True, exist_ok=True)
        ids = {entry: number for number, entry in enumerate([*entries, "<|endoftext|>"])}
        Tokenizer(models.WordLevel(ids, "a")).save(str(target / "tokenizer.json"))
    argv = ["adopt", "model", "out", "--data", "data/train", "--active-experts", "1"]
    assert "which has other entries than that of the model" in fails(call, tmp_path, *argv)
    argv = ["adopt", "../../model", "../../out", "--data", ".", "--active-experts", "1"]
    message = fails(call, tmp_path / "data/train", *argv)
    assert "which has other entries than that of the model" in message
    for command in ("budget", "analyze"):
        argv = [command, "model", "--data", "data/train", "--out", "out"]
        message = fails(call, tmp_path, *argv)
        assert "which has other entries than that of the model" in message
    build(router_type="topk_pre_softmax").save_pretrained(tmp_path / "ours")
    ours = ["--tokenizer", "model", "--perplexity", "data/train"]
    message = fails(call, tmp_path, "evaluate", "ours", *ours)
    assert "which has other entries than that of the model" in message
    argv = ["adopt", "../../model", "../../out", "--data", ".", "--active-experts", "1"]
    (tmp_path / "data/tokenizer/tokenizer.json").write_text("{}")
    assert "tokenizer.json" in fails(call, tmp_path / "data/train", *argv)
    large = {str(number): number for number in range(80)} | {"<|endoftext|>": 80}
    Tokenizer(models.WordLevel(large, "0")).save(str(tmp_path / "model/tokenizer.json"))
    message = fails(call, tmp_path / "data/train", *argv)
    assert "has 81 entries, config.json has vocab_size 64" in message


def test_the_fit_is_found_through_the_chosen_pairs():
    """Gates that are 0.3 z + u x of chosen experts give back both."""
    from megatron.remoe.adopt.fit import fitted_router

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    shared = torch.tensor([0.3, -0.1, 0, 0, 0.2, 0, 0, 0.1], dtype=torch.float64)
    logits = x @ weight.T
    active = torch.zeros(4000, 4, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    gates = torch.where(active, 0.3 * logits + (x @ shared)[:, None], 0)
    made, line = fitted_router(x, weight, gates, active)
    assert line.slope == pytest.approx(0.3, abs=0.003) and line.explained > 0.999
    torch.testing.assert_close(made, 0.3 * weight + shared, atol=5e-3, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_of_all(seed):
    """On convex curves of four layers with 0 to 5 experts, whose mean is to be 2."""
    from itertools import product

    from megatron.remoe.adopt.allocate import cheapest

    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(4, 5, generator=generator).sort(dim=1, descending=True).values
    costs = torch.cat((torch.zeros(4, 1), -falls.cumsum(dim=1)), dim=1).double()
    curves = [list(enumerate(row)) for row in costs.tolist()]
    found = cheapest(curves, 2.0)
    best = min(
        sum(curve[n][1] for curve, n in zip(curves, numbers, strict=True))
        for numbers in product(range(6), repeat=4)
        if sum(numbers) == 8
    )
    assert sum(found) == pytest.approx(8)
    lower = sum(curve[int(n)][1] for curve, n in zip(curves, found, strict=True))
    part = [n % 1 for n in found]
    assert sum(p > 1e-9 for p in part) <= 1  # between two numbers
    assert lower == pytest.approx(best) if not any(part) else lower > best
    assert cheapest(curves, 5.0) == [5.0] * 4
    assert cheapest([[(4.0, 0.0), (2.0, 1.0), (1.0, 9.0)], [(4.0, 0.0), (1.0, 0.1)]], 2.0) == (
        pytest.approx([3.0, 1.0])
    )


def test_layers_share_the_experts_no_worse_than_alike(home):
    """The divergence of the allocation, which is measured here in another way."""
    from megatron.remoe.adopt.allocate import allocate
    from megatron.remoe.adopt.distill import calibrate
    from megatron.remoe.adopt.teacher import open_teacher

    opened = open_teacher(home / "olmoe")
    teacher, student = opened.load(), opened.load()
    text = torch.cat([_sequences(home, name)[:4, :-1] for name in DOCUMENTS])  # all that is read
    student.config.gate_threshold = [0.0, 0.0]
    targets = allocate(teacher, student, text, 0.8)
    assert sum(targets) / 2 == pytest.approx(0.8) and student.config.gate_threshold == [0.0, 0.0]
    lost = {}
    for name, numbers in (("allocated", targets), ("alike", [0.8, 0.8])):
        assert calibrate(student, text, numbers) == pytest.approx(0.8, rel=0.01)
        with torch.no_grad():
            p, q = teacher(text).logits.double().softmax(-1), student(text).logits.double()
        lost[name] = float((p * (p.log() - q.log_softmax(-1))).sum(-1).mean())
    assert lost["allocated"] <= lost["alike"] + 1e-6


def test_a_threshold_leaves_as_many_gates_as_the_budget_asks_for():
    from megatron.remoe.adopt.distill import threshold_for

    generator = torch.Generator().manual_seed(0)
    gates = [torch.rand(50, 4, generator=generator).sub(0.3).relu() for _ in range(3)]
    for budget in (0.5, 1.0, 2.2):
        threshold = threshold_for(gates, budget)
        kept = sum(g >= threshold for layer in gates for row in layer.tolist() for g in row)
        assert kept == round(budget * 150)
    assert threshold_for(gates, 3.9) == 0  # more than there are
