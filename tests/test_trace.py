"""The record of a model on disk: nothing changes on the way, and damage is named."""

import dataclasses
import random

import pytest
import torch

from megatron.remoe.analysis import trace
from megatron.remoe.analysis.trace import Facts, Part, layer_trace

FACTS = Facts(
    model="runs/a",
    iteration=300,
    model_class="ReMoEForCausalLM",
    router="relu",
    topk=1,
    num_experts=5,
    flops_per_expert=12.0,
    flops_others=34.5,
    domains=("code", "prose"),
    data="tokens",
    sequence_length=4,
    sequences=6,
    seed=7,
)
TEXTS = {0: "<|endoftext|>", 41: " \n\"é'"}


def part(seed: int, *, with_scores: bool) -> Part:
    """Two sequences, whose second layer is silent in the first part."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(3, 8, 5, generator=generator).relu()
    gates[1] *= seed > 0
    layers = {
        number: layer_trace(probs, probs > 0, probs.softmax(1) if with_scores else None)
        for number, probs in zip((1, 2, 4), gates, strict=True)
    }
    tokens = torch.randint(60000, (8,), generator=generator)
    losses = torch.rand(8, generator=generator)
    return Part(tokens, losses, torch.tensor([0, 1]).repeat_interleave(4), layers)


def write(folder, *, with_scores: bool = False, parts: int = 3) -> list[Part]:
    made = [part(seed, with_scores=with_scores) for seed in range(parts)]
    assert trace.begin(folder, FACTS, (1, 2, 4), "x") == 0
    for number, one in enumerate(made):
        trace.write_part(folder, number, one)
    trace.finish(folder, parts, TEXTS)
    return made


@pytest.mark.parametrize("with_scores", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, with_scores):
    parts = write(tmp_path / "a", with_scores=with_scores)
    found = trace.read(tmp_path / "a")
    assert found.facts == FACTS and found.texts == TEXTS
    for name in ("tokens", "losses", "domains"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(one, name) for one in parts]))
    assert list(found.layers) == [1, 2, 4]
    for number, layer in found.layers.items():
        before = [one.layers[number] for one in parts]
        assert torch.equal(layer.probs(), torch.cat([one.probs() for one in before]))
        assert torch.equal(layer.active(), torch.cat([one.active() for one in before]))
        assert torch.equal(layer.ranked(), torch.cat([one.ranked() for one in before]))
        assert (layer.scores is not None) is with_scores
    assert (found.layers[2].counts()[:8] == 0).all() and found.layers[2].counts()[8:].any()
    assert found.sequence.tolist() == [n // 4 for n in range(24)]


def test_a_record_of_dense_arrays_is_that_of_loops():
    probs = torch.tensor([[0.0, 0.5, -2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5]])
    active = torch.tensor([[True, True, True], [False, False, False], [False, False, True]])
    found = layer_trace(probs, active, None)
    assert found.starts.tolist() == [0, 3, 3, 4]
    assert found.experts.tolist() == [0, 1, 2, 2]
    assert found.gates.tolist() == [0.0, 0.5, -2.0, 1.5]  # an active expert may have a gate of zero
    assert torch.equal(found.active(), active) and torch.equal(found.probs(), probs)
    assert found.ranked()[0].tolist() == [0.0, 0.5, 2.0]


def test_a_record_goes_on_after_the_last_whole_part(tmp_path):
    write(tmp_path / "whole")
    folder = tmp_path / "a"
    assert trace.begin(folder, FACTS, (1, 2, 4), "x") == 0
    trace.write_part(folder, 0, part(0, with_scores=False))
    (folder / ".partial-part-0001.npz").write_bytes(b"half")  # of a process that was killed
    with pytest.raises(ValueError, match="is not complete; finish it with the same remoe analyze"):
        trace.read(folder)
    renamed = dataclasses.replace(FACTS, model="elsewhere/a")
    assert trace.begin(folder, renamed, (1, 2, 4), "x") == 1
    for number in (1, 2):
        trace.write_part(folder, number, part(number, with_scores=False))
    trace.finish(folder, 3, TEXTS)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_record_is_not_gone_on_with(tmp_path):
    trace.begin(tmp_path / "a", FACTS, (1,), "x")
    other = dataclasses.replace(FACTS, seed=8, data="others")
    with pytest.raises(ValueError, match="differs in data, seed; analyze the model again"):
        trace.begin(tmp_path / "a", other, (1,), "x")
    with pytest.raises(ValueError, match="differs in weights or tokens"):
        trace.begin(tmp_path / "a", FACTS, (1,), "y")


def flip(path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << random.Random(0).randrange(8)
    path.write_bytes(data)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.unlink()])
def test_a_damaged_part_is_named_and_written_again(tmp_path, harm):
    write(tmp_path / "a")
    harm(tmp_path / "a/part-0001.npz")
    with pytest.raises(ValueError, match=r"part-0001\.npz (has changed|is missing)"):
        trace.read(tmp_path / "a")
    (tmp_path / "a/trace.json").unlink()  # as if the collection had not ended
    assert trace.begin(tmp_path / "a", FACTS, (1, 2, 4), "x") == 1


def test_no_record(tmp_path):
    assert trace.read_facts(tmp_path) is None and not trace.is_complete(tmp_path)
    with pytest.raises(ValueError, match=r"has no trace\.json, so it is no record"):
        trace.read(tmp_path)
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trace\.json has no complete; analyze the model again"):
        trace.read(tmp_path)
