"""The published trajectories, replayed; and what the replay would catch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.golden import CLOSED_LOOP as CLOSED_LOOP_CONFIG
from megatron.remoe.testing.golden import Golden, golden_tokens, golden_weight, parameter_shapes
from megatron.remoe.verify import trajectories
from tests.golden.replay import TOLERANCES, replay

FOLDER = Path(__file__).parent
OPEN_LOOP = FOLDER / "upstream_remoe_e8k1.json"
CLOSED_LOOP = FOLDER / "upstream_remoe_e8k1_closed_loop.json"


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield lambda function, *args: ranks.run(function, *args)[0]


def deviations(path, steps=None, host="gpt", **changes):
    golden = Golden.load(path)
    golden = replace(golden, **changes)
    steps = steps or golden.comparable_steps
    return trajectories.deviations(replay(golden, steps, host), golden.trajectory[:steps])


@pytest.mark.parametrize("host", ["gpt", "hybrid"])
@pytest.mark.parametrize("path", [OPEN_LOOP, CLOSED_LOOP], ids=lambda path: path.stem)
def test_published_trajectory(rank, path, host):
    for key, deviation in rank(deviations, path, None, host).items():
        assert deviation <= TOLERANCES[key][1], key


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("path", [OPEN_LOOP, CLOSED_LOOP], ids=lambda path: path.stem)
def test_published_trajectory_on_a_gpu(path):
    command = [sys.executable, "-m", "tests.golden.replay", str(path), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr


def test_comparable_steps():
    assert Golden.load(OPEN_LOOP).comparable_steps == 60
    assert Golden.load(CLOSED_LOOP).comparable_steps == 40


def without_load_balancing(path):
    from remoe import regularization

    original = regularization.load_weights
    regularization.load_weights = lambda counts, **_: torch.ones_like(counts, dtype=torch.float32)
    try:
        return deviations(path, 8)
    finally:
        regularization.load_weights = original


def test_a_wrong_regularizer_is_caught(rank):
    """The closed loop without load weights: the loss alone would say little in 8 steps."""
    found = rank(without_load_balancing, CLOSED_LOOP)
    assert found["l1_reg"] > TOLERANCES["l1_reg"][1]
    assert found["grad_norm"] > TOLERANCES["grad_norm"][1]


@pytest.mark.parametrize("granularity", [1, 2])
def test_other_configurations_replay(rank, granularity):
    """Sizes that the given files do not have run, and the controller sees their target."""
    golden = Golden.load(CLOSED_LOOP)
    config = golden.config | {
        "E": 4, "k": 2, "G": granularity, "L": 3, "H": 32, "F": 48, "groups": 4, "steps": 2
    }  # fmt: skip
    params = parameter_shapes(config)
    other = replace(
        golden, config=config, num_experts=4 * granularity, topk=2 * granularity, params=params
    )
    first, second = rank(replay, other, 2)
    assert len(first["l1_reg"]) == 3
    expected = 1.2 if first["sparsity"] < 0.5 else 1 / 1.2
    assert second["l1_coeff_used"] / first["l1_coeff_used"] == pytest.approx(expected, rel=1e-6)


def test_shapes_of_the_given_file_follow_the_same_rule():
    golden = Golden.load(OPEN_LOOP)
    assert parameter_shapes(golden.config) == golden.params


def test_weights_and_data_are_functions_of_name_and_seed():
    golden = Golden.load(OPEN_LOOP)
    name, shape = "decoder.layers.0.mlp.router.weight", [8, 64]
    seed = golden.config["seed"]
    assert torch.equal(golden_weight(name, shape, seed), golden_weight(name, shape, seed))
    assert not torch.equal(golden_weight(name, shape, seed), golden_weight(name, shape, seed + 1))
    assert torch.equal(golden_weight("final_layernorm.weight", [3], seed), torch.ones(3))
    assert golden_tokens(golden.config).shape == (160, 2, 4, 65)


def test_the_packaged_closed_loop_is_the_golden_one():
    assert Golden.load(CLOSED_LOOP).config == CLOSED_LOOP_CONFIG
