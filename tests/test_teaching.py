"""The README's snippet, the notebook and the symptoms of docs/how_it_works.md do what they say."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbclient
import nbformat
import pytest
import torch

from remoe import l1_penalty, next_l1_coeff
from remoe.controller import ControllerConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/how_it_works.md").read_text()
STEPS = 250


@pytest.fixture(scope="module")
def symptoms():
    spec = importlib.util.spec_from_file_location("symptoms", ROOT / "examples/symptoms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def runs(symptoms):
    """Every run of the page once, shorter than there, by its label."""
    cases = [c for figure in symptoms.FIGURES.values() for c in (*figure.symptom, *figure.remedy)]
    return {symptoms.label(case): symptoms.train(steps=STEPS, **case) for case in cases}


def final(values):
    return sum(values[-20:]) / 20


def test_sparsity_does_not_settle_if_the_multiplier_is_too_small_or_too_large(runs, symptoms):
    slow, fast = runs["multiplier 1.02"], runs["multiplier 1.5"]
    default, nearer = runs["defaults, lr 0.003"], runs["multiplier 1.02, init 0.01"]
    assert slow.settles_at is None and final(slow.sparsity) < 0.5
    assert fast.settles_at is None and final(fast.sparsity) > 0.95
    # The coefficient needs 101 steps from 1e-8 to one.
    assert 90 <= default.settles_at <= 160
    assert final(default.sparsity) == pytest.approx(symptoms.TARGET, abs=0.02)
    assert final(nearer.sparsity) == pytest.approx(symptoms.TARGET, abs=0.05)
    assert final(default.loss) < default.loss[0] / 4 and final(fast.loss) > fast.loss[0] / 2


def test_experts_die_of_an_early_penalty_and_without_load_weights(runs, symptoms):
    early, blind, default = (
        runs[label] for label in ("init 1.0", "load_balancing none", "defaults, lr 0.003")
    )
    assert len(early.dead) >= 3 and len(blind.dead) >= 1 and default.dead == []
    silent = [e for e in range(symptoms.EXPERTS) if not early.loads[-50:, e].any()]
    assert silent, "the case must contain an expert without any token"
    layer = early.layer
    task = (layer(early.tokens) - 1).square().mean()
    gradient = torch.autograd.grad(task + l1_penalty(layer), layer.router)[0]
    active = (early.tokens @ layer.router.T > 0).any(dim=0)
    assert not active[silent].any() and not gradient[silent].any()
    assert gradient[active].any(dim=1).all()


def test_the_coefficient_runs_away_from_a_router_that_does_not_follow(runs):
    missing, small = runs["penalty not in the loss"], runs["lr 0.0003"]
    default, both = runs["defaults, lr 0.003"], runs["lr 0.0003, multiplier 1.02, init 0.01"]
    assert missing.coefficient[-1] == pytest.approx(1e-8 * 1.2 ** (STEPS - 1), rel=1e-3)
    assert max(small.coefficient) > 1e4 * max(default.coefficient)
    assert small.coefficient[-1] < 1 and final(small.sparsity) > 0.92
    assert small.settles_at is None
    assert max(both.coefficient) < 10 and 0.8 < final(both.sparsity) < 0.92
    assert both.dead == [] and len(small.dead) >= 2


def test_the_coefficient_would_be_stuck_without_a_floor():
    coefficient, steps = torch.tensor(1.0), 0
    config = ControllerConfig(target_sparsity=0.5, floor=0.0)
    while (lower := next_l1_coeff(coefficient, torch.tensor(0.9), config)) != coefficient:
        coefficient, steps = lower, steps + 1
    assert f"{steps} more steps down than up" in PAGE and f"{coefficient.item():.1e}" in PAGE
    assert next_l1_coeff(coefficient, torch.tensor(0.1), config) == coefficient
    floor = next_l1_coeff(coefficient, torch.tensor(0.9), ControllerConfig(target_sparsity=0.5))
    assert f"{floor.item():.1e}" in PAGE


def test_an_expert_may_be_born_dead(symptoms):
    run = symptoms.train(steps=50, seed=1)
    assert run.loads[:, 0].sum() == 0 and (run.loads[:, 1:].sum(dim=0) > 0).all()


def test_the_page_has_every_run_and_picture(runs, symptoms):
    rows = [line for line in PAGE.splitlines() if line.count("|") == 7]
    assert rows[0] == symptoms.HEADER.splitlines()[0]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {label}" for label in runs]
    pictures = re.findall(r"\]\((images/\w+\.svg)\)", PAGE)
    assert pictures == ["images/method.svg", *(f"images/symptom_{n}.svg" for n in symptoms.FIGURES)]
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 150_000
        assert ElementTree.parse(ROOT / "docs" / picture).getroot().tag.endswith("svg")
    for name, figure in symptoms.FIGURES.items():
        text = (ROOT / f"docs/images/symptom_{name}.svg").read_text()
        for kind, cases in (("symptom", figure.symptom), ("remedy", figure.remedy)):
            labels = [symptoms.label(case).split(", init")[0] for case in cases]
            assert [t for t in labels if f">{kind}: {t}" not in text] == []


def test_equal_runs_have_equal_pictures(runs, symptoms, tmp_path):
    for name in ("one.svg", "other.svg"):
        symptoms.draw(tmp_path / name, symptoms.FIGURES["dead_expert"], runs)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_the_snippet_of_the_readme_learns_as_it_says(capsys):
    readme = (ROOT / "README.md").read_text()
    found = re.search(
        r"```python\n(import torch\nfrom remoe .*?)```\n\n```\n(.*?)```", readme, re.S
    )
    code, printed = found.groups()
    with torch.random.fork_rng():
        exec(code, {})
    pattern = r"step (\d+): loss ([\d.]+), sparsity ([\d.]+)\n"
    rows = [re.findall(pattern, text) for text in (capsys.readouterr().out, printed)]
    for steps, losses, sparsities in (zip(*of, strict=True) for of in rows):
        assert steps == ("1", "50", "100", "150", "200")
        losses, sparsities = [float(x) for x in losses], [float(x) for x in sparsities]
        assert losses[-1] < losses[0] / 10
        assert sparsities[1] < 0.2 and sparsities[-1] == pytest.approx(0.75, abs=0.06)
        assert losses[1] < losses[2] > losses[-1]  # closing the gates costs loss for a while
    assert rows[0][0] == rows[1][0]


@pytest.mark.processes
def test_the_notebook_runs_and_its_layer_learns(tmp_path, monkeypatch):
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(ROOT / "examples/remoe_layer.ipynb", as_version=4)
    nbformat.validate(notebook)
    seen = "import json\nprint(json.dumps([losses, sparsities, shares(trained).tolist()]))"
    notebook.cells.append(nbformat.v4.new_code_cell(seen))
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    losses, sparsities, shares = json.loads(notebook.cells[-1].outputs[0].text)
    assert sum(losses[-20:]) / 20 < losses[0] / 10
    assert sum(sparsities[-50:]) / 50 == pytest.approx(0.75, abs=0.03)
    assert torch.tensor(shares).sum(dim=1).mean() == pytest.approx(2, abs=0.4)  # of 8 experts
    images = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in images) == 3
