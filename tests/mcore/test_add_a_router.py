"""CONTRIBUTING.md's walk through adding a router, followed with the code that the page shows."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron.remoe.ranks import Ranks
from remoe.config import Routing
from tests.mcore import moe_cases
from tests.mcore.moe_cases import Layout, Outcome

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def blocks() -> list[str]:
    section = PAGE.read_text().split("## Add a router")[1].split("\n## ")[0]
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S)]


def followed(codes: list[str], **imports: Any) -> dict[str, Any]:
    """Names that the steps define, given those that their files import."""
    names = {"torch": torch, "Tensor": Tensor, "Routing": Routing, "ClassVar": ClassVar}
    names |= {"dataclass": dataclasses.dataclass, "__name__": __name__} | imports
    for code in codes:
        exec(code, names)
    return names


def test_the_fast_path_equals_the_loops():
    names = followed(blocks()[:2])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    router = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gates, active = names["squared_relu_routing"](x @ router.T)
    expected = names["reference_squared_relu"](x, router)
    assert torch.allclose(gates, expected) and torch.equal(active, expected > 0)
    direction = torch.randn_like(gates)
    grads = torch.autograd.grad((gates * direction).sum(), (x, router))
    for ours, theirs in zip(
        grads, torch.autograd.grad((expected * direction).sum(), (x, router)), strict=True
    ):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_the_router_equals_its_reference_on_two_ranks(ranks, dispatcher):
    reference = followed(blocks()[:2])["reference_squared_relu"]
    expected = moe_cases.expected(2, 0.0, 0.0, reference)
    for ours, theirs in zip(ranks.run(outcome, Layout(dispatcher, ep=2)), expected, strict=True):
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "stats":  # the first of them is a penalty, which this router lacks
                a, b = a[1:], b[1:]
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max())), field.name


def outcome(layout: Layout) -> Outcome:
    from megatron.core.transformer.moe.router import Router

    from megatron.remoe.moe import spec
    from megatron.remoe.moe.counting import CountsRouting

    with mock.patch.dict(spec.ROUTERS):
        imports = {"Router": Router, "CountsRouting": CountsRouting, "ROUTERS": spec.ROUTERS}
        names = followed(blocks(), **imports)
        layer = moe_cases.build_layer(layout, 0.0, routing=names["SquaredReLURouting"]())
    assert type(layer.router).__name__ == "SquaredReLURouter"
    return moe_cases.outcome_of(layer, 0.0)
