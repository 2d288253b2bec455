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
from remoe.config import ROUTINGS, L1Routing
from remoe.selections import Tensors
from tests import test_selections as functions
from tests.mcore import test_selections as layers
from tests.mcore import tiny
from tests.mcore.moe_cases import Layout

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "squared_relu"


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def blocks() -> list[str]:
    section = PAGE.read_text().split("## Add a router")[1].split("\n## ")[0]
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S)]


class Followed:
    """The walk, followed for as long as the context lasts."""

    def __enter__(self) -> dict[str, Any]:
        tables = (ROUTINGS, functions.CASES, layers.LOOPS, layers.NAMES)
        self.patches = [mock.patch.dict(table) for table in tables]
        for patch in self.patches:
            patch.start()
        names = {"torch": torch, "Tensor": Tensor, "L1Routing": L1Routing, "Tensors": Tensors}
        names |= {"ClassVar": ClassVar, "dataclass": dataclasses.dataclass, "__name__": __name__}
        names |= {"ROUTINGS": ROUTINGS, "CASES": functions.CASES, "Case": functions.Case}
        names |= {"LOOPS": layers.LOOPS, "NAMES": layers.NAMES}
        for code in blocks():
            exec(code, names)
        return names

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def test_the_walk_has_less_than_sixty_lines():
    assert 20 < sum(len(code.splitlines()) for code in blocks()) < 60


def test_the_function_passes_the_tests_of_all_selections():
    with Followed():
        functions.test_values_and_gradients_equal_those_of_loops(NAME)
        functions.test_the_map_is_where_gates_are_and_nothing_flows_elsewhere(NAME)
        functions.test_permuted_tokens_and_experts_are_routed_alike(NAME)
        functions.test_a_token_alone_is_routed_as_among_others(NAME)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_the_layer_equals_its_loops_on_two_ranks(ranks, dispatcher):
    outcomes = ranks.run(outcome, Layout(dispatcher, ep=2))
    with Followed():
        layers.compare(outcomes, NAME)


def outcome(layout: Layout):
    with Followed():
        return layers.outcome(NAME, layout)


def facts():
    tiny._parser()  # Megatron's reads the file of a class, which the new one does not have
    with Followed():
        parsed = []
        for name in (NAME, "squared"):
            given = ["--num-experts", "4", "--moe-router-topk", "1", "--moe-routing", name]
            parsed.append(tiny.parse(*given, "--moe-relu-load-balancing", "squared"))
        _, out, _ = tiny.remoe(Path.cwd(), "routers")
        return layers.facts_of(NAME), parsed, out


def test_flags_checkpoints_and_the_list_of_routers_follow(call):
    (names, (plain, again), exact, dtype), parsed, out = call(facts)
    assert names == {"weight", "l1_coeff"}
    assert torch.equal(plain, again) and exact and dtype == torch.bfloat16
    (args, _), (_, error) = parsed
    assert args["moe_routing"] == NAME and args["moe_router_dtype"] == "fp32"
    assert error.startswith("error: moe_routing is squared, which is no router; choose one of relu")
    assert NAME in out and "an example" in out
