"""The example of vision transformers: one command, and models of equal FLOPs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples/vision/digits.py"

pytest.importorskip("sklearn", reason="the example needs scikit-learn: pip install 'remoe[vision]'")


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_models_differ_in_flops_by_their_routers_only(digits):
    flops = {mixture: digits.size(mixture)[1] for mixture in digits.MIXTURES}
    layers, rows = digits.BLOCKS // 2, digits.PATCHES
    router = layers * 2e-6 * rows * digits.EXPERTS * digits.HIDDEN
    assert flops["topk"] - flops["dense"] == pytest.approx(router)
    assert flops["expert_choice"] == pytest.approx(flops["topk"])
    assert flops["soft"] - flops["dense"] == pytest.approx(3 * router)


def test_images_are_cut_into_patches_and_split_without_overlap(digits):
    x, labels, x_test, labels_test = digits.digits(1)
    assert len(x) + len(x_test) == len(labels) + len(labels_test) == 1797
    seen = {tuple(image.flatten().tolist()) for image in x}
    assert sum(tuple(image.flatten().tolist()) in seen for image in x_test) == 0
    image = torch.tensor(digits.load_digits().images[0], dtype=torch.float32) / 8 - 1
    every = torch.cat([x, x_test])
    patches = torch.stack([image[r : r + 2, c : c + 2].flatten()
                           for r in range(0, 8, 2) for c in range(0, 8, 2)])  # fmt: skip
    assert (every == patches).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("mixture", ["topk", "expert_choice", "soft"])
def test_every_parameter_is_trained(digits, mixture):
    torch.manual_seed(0)
    model = digits.VisionTransformer(mixture)
    loss = model(digits.digits(1)[0][:64]).square().sum() + model.balancing_loss()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.processes
def test_one_command_writes_table_and_plot(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--seeds", "1", "--epochs", "4"]
    environment = dict(os.environ) | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in ("Dense", "TopK", "Expert Choice", "Soft MoE"))
    curves = json.loads((tmp_path / "accuracies.json").read_text())
    assert all(runs[0][-1] > 30 for runs in curves.values()), curves
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_no_seed_is_refused(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--seeds", "0"])
    assert digits.main() == 2
    assert capsys.readouterr().err == "error: seeds is 0; choose at least 1\n"
