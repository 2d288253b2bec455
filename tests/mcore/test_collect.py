"""Records of models and the cost of interventions, held against plain torch and other commands."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from megatron.remoe.analysis import trace
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.evaluate.analysis import spread
from remoe.hf import modeling_remoe
from tests.mcore import tiny
from tests.mcore.convert_cases import FLAGS, RELU, UNTIED
from tests.mcore.test_analyze import LENGTH, SEQUENCES, home, tokens_of  # noqa: F401
from tests.mcore.test_convert import fails
from tests.test_compare import remoe
from tests.test_hf import build

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 24}
FOREIGN = {
    "olmoe": OlmoeConfig(**SIZES, num_experts=6),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=6),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, **EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[0]
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, head_dim=16),
}
OURS = ("relu", "relu_gru", "relu_l2", "topk", "topk_sigmoid_gru")


@pytest.fixture(scope="module")
def place(home, call) -> Path:  # noqa: F811
    """The models of `test_analyze`, those of transformers, and hash routing."""
    for name, config in FOREIGN.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
    build(router_type="hash").save_pretrained(home / "hash")
    return home


def run(base: Path, out: Path, name: str, **changes) -> tuple[trace.Trace, list[dict], list]:
    """Analyze a model; called on a rank."""
    from megatron.remoe.evaluate import analysis

    given = {"data": base / "tokens", "sequence_length": LENGTH} | changes
    job = analysis.prepare(base / name, analysis.Settings(**given), out)
    seen = []
    analysis.run(job, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    return trace.read(job.last), json.loads((job.folder / "interventions.json").read_text()), seen


def losses_by_domain(model: Path, data: Path) -> dict[str, float]:
    from megatron.remoe.evaluate.perplexity import perplexity

    found = perplexity(model, data, sequence_length=LENGTH, seed=1234)
    return {name: loss.loss for name, loss in found.items()}


@pytest.fixture(scope="module")
def analyzed(place, call, tmp_path_factory):
    """Analyses by the name of the model, each of which is made once."""
    known: dict[str, tuple] = {}

    def analyze(name: str) -> tuple:
        if name not in known:
            known[name] = call(run, place, tmp_path_factory.mktemp("out"), name)
        return known[name]

    return analyze


def loaded(place: Path, name: str):
    return AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32).eval()


def routers(model) -> dict[int, torch.nn.Module]:
    blocks = {n: layer.mlp for n, layer in enumerate(model.model.layers, start=1)}
    found = {n: getattr(b, "router", getattr(b, "gate", None)) for n, b in blocks.items()}
    return {n: r for n, r in found.items() if r is not None and hasattr(r, "num_experts")}


def loss_of(model, found) -> torch.Tensor:
    """The loss of all tokens but the last of each sequence, whose label is not in the record."""
    tokens = found.tokens.view(-1, LENGTH)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


@pytest.mark.parametrize("name", [*OURS, "hash", *FOREIGN])
def test_losses_and_routing_are_those_of_the_model_itself(place, analyzed, call, name):
    found, _, _ = analyzed(name)
    assert found.facts.sequences == sum(SEQUENCES.values()) and found.texts == {}
    model, calls = loaded(place, name), {}
    if name not in FOREIGN:  # which `remoe evaluate` does not take
        losses = call(losses_by_domain, place / name, place / "tokens")
        for number, domain in enumerate(found.facts.domains):
            mean = found.losses[found.domains == number].double().mean().item()
            assert mean == pytest.approx(losses[domain], abs=1e-6)
        assert found.losses.double().mean().item() == pytest.approx(losses["all"], abs=1e-6)
    assert found.losses.double().mean().item() == pytest.approx(whole_loss(model), abs=1e-6)
    for number, router in routers(model).items():
        router.register_forward_hook(
            lambda router, x, output, number=number: calls.update({number: (x, output)})
        )
    inside = found.losses.view(-1, LENGTH)[:, :-1].flatten()
    assert torch.allclose(loss_of(model, found), inside, atol=1e-5)
    assert list(found.layers) == list(calls)
    for number, layer in found.layers.items():
        x, output = calls[number]
        if name in FOREIGN:
            probs, active, scores = by_loops(x[0].flatten(0, -2), routers(model)[number])
            assert torch.allclose(layer.scores, scores, atol=1e-6)
        else:
            probs, active, *_ = output
        assert torch.allclose(layer.probs(), probs, atol=1e-6)
        assert torch.equal(layer.active(), active)


def by_loops(x_TH: torch.Tensor, router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates, map and scores of a router of transformers, token by token."""
    scores = (x_TH @ router.weight.detach().T).softmax(dim=1)
    gates, active = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    for token, row in enumerate(scores.tolist()):
        chosen = sorted(range(len(row)), key=lambda e: -row[e])[:2]
        whole = sum(row[e] for e in chosen) if getattr(router, "norm_topk_prob", True) else 1
        for expert in chosen:
            gates[token, expert] = row[expert] / whole
            active[token, expert] = True
    return gates, active, scores


@pytest.mark.parametrize("name", ["relu", "topk_gru", *FOREIGN])
def test_operations_are_those_that_torch_counts(place, analyzed, name):
    found, _, _ = analyzed(name)
    model, tokens = loaded(place, name), found.tokens[:LENGTH][None]
    model.set_attn_implementation("eager")
    if name in FOREIGN:
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    experts = sum(int(layer.counts()[:LENGTH].sum()) for layer in found.layers.values())
    facts = found.facts
    ours = experts * facts.flops_per_expert + LENGTH * facts.flops_others
    assert counter.get_total_flops() == ours


@pytest.mark.parametrize("name", ["relu", "relu_l2", "topk", *FOREIGN])
def test_interventions_cost_what_other_models_lose(place, analyzed, name):
    """Experts without output, routers with other gates, and models with another k."""
    found, rows, _ = analyzed(name)
    plain = found.losses.double().mean().item()
    kinds = {key: [row for row in rows if key in row] for key in ("removed", "offset", "k")}
    assert [row["removed"] for row in kinds["removed"]][0] == 0
    assert bool(kinds["offset"]) is name.startswith("relu")
    assert bool(kinds["k"]) is not name.startswith("relu")
    unchanged = [row for row in rows if 0 in (row.get("removed"), row.get("offset"))]
    unchanged += [row for row in kinds["k"] if row["k"] == 2]
    assert len(unchanged) == 2
    for row in unchanged:  # exactly
        assert row["loss"] == plain and row["extra_loss"] == 0 and row["tokens"] == 208
        assert row["active"] == mean_active(found)

    for row in kinds["removed"][1:]:
        model = loaded(place, name)
        for number in routers(model):
            loads = found.layers[number].active().sum(dim=0).tolist()
            least = sorted(range(len(loads)), key=lambda e: (loads[e], e))[: row["removed"]]
            with torch.no_grad():
                model.model.layers[number - 1].mlp.experts.down_proj[least] = 0
        assert row["loss"] == pytest.approx(whole_loss(model), abs=1e-6)
    for row in kinds["k"]:
        model = loaded(place, name)
        config = type(model.config).from_dict(
            model.config.to_dict() | {"num_experts_per_tok": row["k"], "target_sparsity": None}
        )
        fewer = AutoModelForCausalLM.from_pretrained(place / name, config=config).eval()
        assert row["loss"] == pytest.approx(whole_loss(fewer), abs=1e-6)
        assert row["active"] == row["k"]
    for row in kinds["offset"]:
        model = loaded(place, name)
        for router in routers(model).values():
            router.select = lambda logits, row=row, router=router: relu_gates(
                router, logits - row["offset"]
            )
        assert row["loss"] == pytest.approx(whole_loss(model), abs=1e-6)
    if kinds["offset"]:
        active = [row["active"] for row in kinds["offset"]]
        assert active == sorted(active, reverse=True) and active[0] > active[-1]


def relu_gates(router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if router.gate_scale is None:
        return modeling_remoe.relu_routing(logits)
    return modeling_remoe.relu_l2_routing(logits, router.gate_scale)


def mean_active(found) -> float:
    counts = torch.cat([layer.counts() for layer in found.layers.values()])
    return counts.double().mean().item()


def whole_loss(model) -> float:
    """The mean loss of all tokens, by the documents themselves."""
    losses = []
    for domain in SEQUENCES:
        tokens = tokens_of(domain)
        with torch.no_grad():
            logits = model(tokens[:-1].view(-1, LENGTH), use_cache=False).logits.flatten(0, 1)
        losses.append(functional.cross_entropy(logits, tokens[1:], reduction="none"))
    return torch.cat(losses).double().mean().item()


class Killed(Exception):
    """Stands for the end of a process."""


def run_twice(base: Path, out: Path, name: str) -> list[tuple[int, int]]:
    """Analyze a model, which ends after the first part, and go on; called on a rank."""
    from megatron.remoe.evaluate import analysis

    settings = analysis.Settings(data=base / "tokens", sequence_length=LENGTH)

    def end(done: int, total: int) -> None:
        raise Killed

    job = analysis.prepare(base / name, settings, out)
    with pytest.raises(Killed):
        analysis.run(job, end)
    assert not job.is_finished and (job.last / "part-0000.npz").is_file()
    written = (job.last / "part-0000.npz").stat().st_mtime_ns
    (job.last / ".partial-part-0001.npz").write_bytes(b"half")
    _, _, seen = run(base, out, name)
    assert (job.last / "part-0000.npz").stat().st_mtime_ns == written
    return seen


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_an_interrupted_analysis_goes_on(place, call, tmp_path, name):
    call(run, place, tmp_path / "at_once", name)
    call(run_twice, place, tmp_path / "twice", name)
    files = [p.relative_to(tmp_path / "at_once") for p in (tmp_path / "at_once").rglob("*")]
    assert {p.relative_to(tmp_path / "twice") for p in (tmp_path / "twice").rglob("*")} == {*files}
    assert len([p for p in files if p.name.startswith("part-")]) == 2
    for file in files:
        if (tmp_path / "at_once" / file).is_file():
            again = (tmp_path / "twice" / file).read_bytes()
            assert again == (tmp_path / "at_once" / file).read_bytes(), file


def test_checkpoints_are_spread_evenly_and_the_last_is_one():
    paths = [Path(str(n)) for n in range(1, 11)]
    for count in range(1, 13):
        found = [int(path.name) for path in spread(paths, count)]
        assert len(found) == min(count, 10) and found[-1] == 10 and found == sorted(set(found))
        if count > 1:
            gaps = {b - a for a, b in zip(found, found[1:], strict=False)}
            assert found[0] == 1 and max(gaps) - min(gaps) <= 1


def write_checkpoint(folder: Path, number: int) -> None:
    """Save a model, whose weights are of the number, with the arguments of a run."""
    from megatron.core import dist_checkpointing

    from megatron.remoe.convert.forward import build_model

    model, args = build_model(FLAGS | RELU | UNTIED)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    args.valid_data_path = ["1", "tokens/code", "1", "tokens/prose"]
    args.consumed_train_samples = 24
    folder.mkdir()
    state = {"model": model.sharded_state_dict(), "args": args, "iteration": number}
    with contextlib.redirect_stdout(io.StringIO()):
        dist_checkpointing.save(state | {"checkpoint_version": 3.0}, str(folder))


@pytest.fixture(scope="module")
def trained(place, call) -> Path:
    """A run of three checkpoints, which names its validation files."""
    run_dir = remoe(place / "runs", "run", 2.0)
    for number in (3, 6, 9):
        call(write_checkpoint, run_dir / f"iter_{number:07d}", number)
    (run_dir / "iter_0000012").mkdir()  # of a save that has not ended
    return run_dir


def test_a_run_is_analyzed_in_its_own_directory(place, call, trained):
    code, out, error = call(tiny.remoe, place, "analyze", "runs/run", "--tokens", "128")
    assert code == 0, out + error
    folder = trained / "analysis"
    assert out.splitlines()[-1] == "runs/run/analysis"
    records = [trace.read(path) for path in sorted((folder / "traces").iterdir())]
    assert [record.facts.iteration for record in records] == [3, 6, 9]
    names = [path.name for path in sorted((folder / "traces").iterdir())]
    assert names == ["iter_0000003", "iter_0000006", "iter_0000009"]
    for record in records:
        assert record.facts.domains == ("code", "prose") and record.facts.sequence_length == 32
        assert record.domains.view(-1, 32)[:, 0].tolist() == [0, 1, 0, 1]
        assert torch.equal(record.tokens, records[0].tokens)
    assert not torch.equal(records[0].losses, records[2].losses)
    assert "is finished already; look at it (remoe report)" in fails(
        call, place, "analyze", "runs/run", "--tokens", "128"
    )
    assert "runs/run/analysis holds an analysis that differs in seed, sequences; replace" in fails(
        call, place, "analyze", "runs/run", "--seed", "5"
    )
    few = ["--checkpoints", "2", "--tokens", "128"]
    assert "differs in checkpoints; replace" in fails(call, place, "analyze", "runs/run", *few)
    code, out, error = call(tiny.remoe, place, "analyze", "runs/run", *few, "--force")
    assert code == 0, out + error
    names = [path.name for path in sorted((folder / "traces").iterdir())]
    assert names == ["iter_0000003", "iter_0000009"]
    assert torch.equal(trace.read(folder / "traces/iter_0000009").losses, records[2].losses)


OUT = ["--out", "out"]
DATA = ["--data", "tokens", "--sequence-length", "16"]
MISTAKES = {
    "one domain": (
        ["relu", *OUT, "--data", "tokens/code"],
        "tokens/code holds text of one domain only (code), so that nothing can be compared; name",
    ),
    "no text": (["relu", *OUT], "the model is no run, so that it names no text; name token files"),
    "no place": (["relu", *DATA], "relu is no run directory, in which its analysis could be; name"),
    "no checkpoints": (["runs/empty"], "runs/empty holds no complete checkpoint; name a run"),
    "another class": (
        ["other", *OUT, *DATA],
        "other/config.json has model_type 'gpt2', whose routers are not known here; remoe, olmoe, "
        "mixtral, qwen2_moe, qwen3_moe can be analyzed",
    ),
    "layers that are all dense": (["all_dense", *OUT, *DATA], "all_dense is a dense model, which"),
    "a damaged config": (["damaged", *OUT, *DATA], "damaged/config.json: "),
    "another folder": (
        ["hash", "--out", "runs", *DATA],
        "runs/hash is no analysis, since it has notes.txt; move it away, or name another",
    ),
    "two of one name": (
        ["relu", "copies/relu", *OUT, *DATA],
        "two models would be analyzed in out/relu; analyze them one by one, with",
    ),
    "a domain too much": (
        ["relu", *OUT, *DATA, "--tokens", "31"],
        "tokens is 31, less than one sequence of 16 for each of 2 domains; ask for more (--tokens)",
    ),
    "data elsewhere": (
        ["runs/moved"],
        "tokens/code.idx does not exist here; go to the directory that the run was started in, or",
    ),
}


@pytest.fixture(scope="module")
def mistaken(place, trained) -> Path:
    """What the mistakes are made with."""
    (place / "copies").mkdir()
    shutil.copytree(place / "relu", place / "copies/relu")
    remoe(place / "runs", "empty", 2.0)
    (place / "runs/hash").mkdir()
    (place / "runs/hash/notes.txt").write_text("mine\n")
    (place / "other").mkdir()
    (place / "other/config.json").write_text('{"model_type": "gpt2"}')
    dense = FOREIGN["qwen3_moe"].to_dict() | {"mlp_only_layers": [0, 1]}
    damaged = FOREIGN["mixtral"].to_dict() | {"hidden_size": "many"}
    for name, config in (("all_dense", dense), ("damaged", damaged)):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, mistaken, trained, tmp_path, argv, message):
    cwd = mistaken
    if argv == ["runs/moved"]:
        cwd = tmp_path
        (tmp_path / "runs").mkdir()
        shutil.copytree(trained, tmp_path / "runs/moved", ignore=lambda *_: ["analysis"])
        argv = ["runs/moved"]
    before = sorted(cwd.rglob("*"))
    assert message in fails(call, cwd, "analyze", *argv)
    assert sorted(cwd.rglob("*")) == before


def byte_level() -> Tokenizer:
    vocab = {"<|endoftext|>": 0, "a": 1, "Ġa": 2, "the": 3, "Ġthe": 4, "Ã": 5, "Ċ": 6}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    vocab = {"<|endoftext|>": 0, "a": 1, "▁a": 2, "the": 3, "▁the": 4, "<0xC3>": 5, "<0x0A>": 6}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


@pytest.mark.parametrize("made_by", [byte_level, metaspace])
def test_texts_of_ids_have_the_space_in_front_of_a_word(tmp_path, made_by):
    made_by().save(str(tmp_path / "tokenizer.json"))
    found = TokenizerFiles.chosen(tmp_path).texts([0, 2, 3, 4, 5, 6, 63])
    assert found == {0: "<|endoftext|>", 2: " a", 3: "the", 4: " the", 5: "\ufffd", 6: "\n"}
