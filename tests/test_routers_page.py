"""docs/routers.md: every router has its row, its section and its panel, and they say what is so."""

import re
from pathlib import Path

import pytest
import torch

from megatron.remoe.analysis.gates import draw_gates, drawn_routers, gate_of
from megatron.remoe.cli.run import _BUDGETS
from remoe.config import ROUTINGS
from remoe.settings import settings_of

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "routers.md").read_text()
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d{4}\.\d{5}", text))


def test_every_router_has_a_row_and_a_section():
    assert list(ROWS) == list(ROUTINGS)
    assert sorted(re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)) == sorted(ROUTINGS)


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_row_says_what_the_class_says(name):
    source, causal, budget, state = ROWS[name]
    routing = ROUTINGS[name]
    assert numbers(source) == numbers(routing.source)
    assert causal == ("yes" if routing.causal else "no")
    assert budget == _BUDGETS[routing.budget]
    assert (state == "none") == (not routing.state)


def test_settings_that_the_page_names_exist():
    named = set(re.findall(r"`(moe_\w+)`", PAGE))
    known = {s.dest for routing in ROUTINGS.values() for s in settings_of(routing)}
    megatron = {"moe_router_pre_softmax", "moe_router_dtype", "moe_aux_loss_coeff"}
    assert named - megatron <= known


def test_the_figure_has_a_panel_of_every_router_that_selects():
    figure = (DOCS / "images" / "routers.svg").read_text()
    assert re.findall(r">(\w+)</text>", figure) and len(figure) < 100_000
    for name in drawn_routers():
        assert f">{name}<" in figure


def test_gates_of_the_figure_are_those_of_the_routers(tmp_path):
    values = torch.linspace(-3, 3, 3001)
    for name in drawn_routers():
        gate, active = gate_of(name, values)
        assert ((gate > 0) == active).all(), name
        assert active[-1], name
        if name != "hash":
            assert not active[0], name
            rises = active.int().diff()
            assert (rises >= 0).all(), name
        # A gate begins at zero if it is a ReLU, and jumps otherwise.
        assert (gate[active].min() < 0.01) == (ROUTINGS[name].budget == "l1"), name
    with pytest.raises(ValueError, match=r"figure is .*gates.txt; choose a name that ends in .svg"):
        draw_gates(tmp_path / "gates.txt")
