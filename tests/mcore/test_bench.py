"""`remoe bench` compares what it claims to compare; how fast that is, no test says."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.remoe.bench import generate, timing
from megatron.remoe.bench.layer import (
    DENSE,
    Shape,
    inputs,
    matrix_products,
    remoe_layer,
    soft_alternatives,
    soft_name,
)

SMALL = {
    "layer": "--tokens 64 --hidden 32 --ffn 32 --experts 4 --experts 8 --rounds 2",
    "layer --soft": "--tokens 64 --hidden 32 --ffn 32 --sequence 32 --experts 4 8 32 --rounds 2",
    "router": "--tokens 64 --hidden 32 --rounds 2",
    "step": "--hidden 32 --ffn 32 --sequence 32 --experts 4 --experts 8 --granularity 2 --rounds 2 "
    "--recurrence gru --recurrent-size 8 --routing relu_rms --routing top_p --routing hash",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the JSON of each benchmark at a small size, run as a user runs it."""
    folder, found = tmp_path_factory.mktemp("bench"), {}
    for name, flags in SMALL.items():
        path = folder / f"{name.replace(' ', '')}.json"
        remoe = [sys.executable, "-m", "megatron.remoe", "bench", *name.split()]
        done = subprocess.run(
            [*remoe, *flags.split(), "--json", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(path.read_text())
    return found


def test_generation_is_timed_with_equal_logits_and_equal_work():
    model = generate.Model(layers=1, hidden=32, ffn=16, experts=8, topk=2, heads=2)
    found = generate.cases(model, torch.float32, "cpu")
    assert list(found) == ["prefill of 512 tokens", "decoding, batch 1", "decoding, batch 8"]
    for alternatives, rows in zip(found.values(), (1, 1, 8), strict=True):
        loop, ours, *others = (one.run() for one in alternatives)
        assert torch.equal(loop, ours) and len(ours) == rows
        assert {other.shape for other in others} == {ours.shape}
        assert torch.equal(ours, alternatives[1].run())  # from the same cache
        assert float(alternatives[0].facts["active experts"]) == pytest.approx(2, rel=0.011)


@pytest.mark.processes
@pytest.mark.parametrize("name", SMALL)
def test_every_alternative_is_timed_relative_to_the_baseline(results, name):
    rows = results[name]["rows"]
    assert rows[0]["ratio"] == 1
    assert all(row["milliseconds"] > 0 for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)


@pytest.mark.processes
def test_the_layer_is_compared_with_what_users_would_take_instead(results):
    names = " ".join(row["name"] for row in results["layer"]["rows"])
    for part in ("ReMoE, E=4", "ReMoE, E=8", "alone, E=4", "alone, E=8", "ReMoE in Megatron",
                 "TopK in our layer", "Megatron's sequential", "Mixtral", "OLMoE",
                 "dense"):  # fmt: skip
        assert part in names
    for routing in results["layer"]["settings"]["routing"]:
        assert routing["assignments"] == 64
        assert routing["idlest_expert"] < routing["busiest_expert"]


@pytest.mark.processes
def test_soft_layers_cost_by_slots_and_not_by_experts(results):
    rows = {row["name"]: row["facts"]["FLOPs / dense"] for row in results["layer --soft"]["rows"]}
    # 6 T S H of logits, slots and outputs beside 6 T H F of a dense MLP.
    assert rows == {DENSE: "1.000"} | {soft_name(e): "2.000" for e in (4, 8, 32)}


@pytest.mark.parametrize(
    ("sequence", "experts", "names"),
    [(24, 4, "sequence is 24, which does not divide the 64 tokens"), (32, 5, "5 experts cannot")],
)
def test_soft_layers_that_cannot_be_compared_are_refused(sequence, experts, names):
    shape = Shape(tokens=64, hidden_size=16, ffn_hidden_size=8, num_experts=experts, topk=1)
    with pytest.raises(ValueError, match=names):
        soft_alternatives([shape], sequence)


@pytest.mark.processes
def test_steps_route_exactly_k_assignments_per_token(results):
    sparsity = {
        row["name"]: row["facts"]["sparsity"]
        for row in results["step"]["rows"]
        if row["name"].startswith("ReMoE")
    }
    expected = {"E=4": "0.75000", "E=8": "0.87500", "E=4 G=2": "0.75000"}
    assert sparsity == {
        f"ReMoE {cell}{name}": value for name, value in expected.items() for cell in ("", "gru ")
    }
    others = {
        row["name"]: float(row["facts"]["sparsity"])
        for row in results["step"]["rows"]
        if row["name"].startswith(("relu_rms", "top_p", "hash"))
    }
    assert others == {
        "relu_rms E=4": 0.75,
        "hash E=4": 0.75,
        "top_p E=4": pytest.approx(0.75, abs=0.02),
    }


@pytest.mark.processes
def test_parts_touch_no_less_than_the_fewest_bytes(results):
    parts = {row["name"]: row["facts"] for row in results["router"]["rows"]}
    assert set(parts) == {"copy of the tokens", "router", "permutation", "permute", "combine"}
    assert all(float(facts["touched / fewest"]) >= 1 for facts in parts.values())


@pytest.mark.parametrize("topk", [1, 2])
def test_inputs_have_exactly_k_assignments_per_token_unevenly(topk):
    shape = Shape(tokens=256, hidden_size=16, ffn_hidden_size=8, num_experts=8, topk=topk)
    x, router = inputs(shape)
    active = F.linear(x, router) > 0
    assert active.sum() == 256 * topk
    assert active.sum(dim=1).unique().numel() > 2
    assert active.sum(dim=0).unique().numel() > 2


def test_the_timed_run_is_a_training_step():
    shape = Shape(tokens=32, hidden_size=16, ffn_hidden_size=8, num_experts=4, topk=1)
    alternative = remoe_layer(shape)
    layer = alternative.run.__closure__  # the variables of the function
    module = next(c.cell_contents for c in layer if isinstance(c.cell_contents, torch.nn.Module))
    alternative.run()
    assert all(parameter.grad is not None for parameter in module.parameters())


class Products(TorchDispatchMode):
    """Counts the matrix products by the shapes of their factors."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.shapes[tuple(tuple(a.shape) for a in args[-2:])] += 1
        return func(*args, **(kwargs or {}))


def test_the_products_alone_are_those_of_the_layer():
    sizes = {"tokens": 512, "hidden_size": 16, "ffn_hidden_size": 24, "num_experts": 3}
    shape = Shape(**sizes, topk=1)
    found = []
    for alternative in (remoe_layer(shape), matrix_products(shape)):
        with Products() as products:
            alternative.run()
        found.append(products.shapes)
    layer, alone = found
    assert alone.total() == 6 * 3
    router = {((512, 16), (16, 3)), ((3, 512), (512, 16)), ((512, 3), (3, 16))}
    assert layer - alone == Counter(router) and not alone - layer


def test_ratios_are_of_the_same_round(monkeypatch):
    """A disturbance that lasts for a round changes no ratio."""
    clock = iter(range(10**6))
    seconds = {"a": 1.0, "b": 3.0}
    monkeypatch.setattr(timing, "_time", lambda run: run() * (1 + next(clock) // 2))
    rows = timing.measure(
        [timing.Alternative(name, lambda name=name: seconds[name]) for name in seconds],
        rounds=5, baseline="a", console=Console(quiet=True),
    )  # fmt: skip
    assert [row.ratio for row in rows] == [1, 3]
    assert rows[0].spread > 0


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--soft --topk 2", "topk is 2, and Soft MoE selects no experts"),
        ("--sequence 64", "sequence is 64, and only --soft has sequences"),
        ("--soft --experts 0", "0 experts cannot share as many slots as a sequence of 512"),
    ],
)
def test_what_soft_mixtures_do_not_have_is_refused(flags, names):
    done = subprocess.run(
        [sys.executable, "-m", "megatron.remoe", "bench", "layer", *flags.split()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and names in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.processes
def test_an_unknown_dtype_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "megatron.remoe", "bench", "layer", "--dtype", "fp8"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "fp8" in done.stderr
    assert "bf16" in done.stderr
