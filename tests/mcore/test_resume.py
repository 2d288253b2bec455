"""A few pairs of `remoe verify resume`, which runs all of them, and what they would catch."""

import math
import re
import time
from pathlib import Path

import pytest

from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.cells import run_cell, save_golden_weights
from megatron.remoe.testing.golden import CLOSED_LOOP
from megatron.remoe.verify import kills, resume
from megatron.remoe.verify.trajectories import FP32, TrajectoryComparison, deviations

SAME = "EP2, distributed optimizer, overlap"
EXACT = " -> ".join(["router expert_threshold: EP2, distributed optimizer"] * 2)
HYBRID = " -> ".join([f"hybrid: {SAME}"] * 2)
NAMES = [
    f"{SAME} -> {SAME}",
    "EP2 -> TP2",
    f"1, distributed optimizer -> {SAME}",
    "DP2, distributed optimizer, padded buckets -> 1, distributed optimizer",
    "soft TP2 x EP2 -> soft 1",
    "router top_p: 1 -> router top_p: TP2",
    "router relu, load of the step before: TP2 -> router relu, load of the step before: 1",
    EXACT,
    HYBRID,
    "EP2 -> hybrid: PP2",
]
STEPS = 2


@pytest.fixture(scope="module")
def results():
    chosen = [pair for pair in resume.pairs() if pair.name in NAMES]
    return {result.pair.name: result for result in resume.verify(chosen, steps=STEPS)}


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_continues_in_the_same_and_in_another_layout(results, name):
    result = results[name]
    assert result.error is None
    assert result.ok, result.deviations
    assert result.verdict == ("bit for bit" if name in (NAMES[0], EXACT, HYBRID) else "ok")


def test_the_pairs_cover_what_is_claimed():
    pairs = {pair.name: pair for pair in resume.pairs()}
    assert len(pairs) == len(resume.pairs())
    for name in ("EP2 -> TP2", "PP2 -> 1", "1 -> DP2 x EP2", "PP2, 2 virtual stages -> PP2"):
        assert name in pairs
    same = [pair.before for pair in pairs.values() if pair.is_same]
    assert {(c.tp, c.ep, c.pp) for c in same} >= {(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2)}
    assert any(c.distributed_optimizer and c.dtype == "bf16" for c in same)


def test_a_pair_is_judged_bit_for_bit_only_in_the_same_layout():
    one, two = Cell("1"), Cell("EP2", 2, ep=2)
    off, far_off = (TrajectoryComparison({"lm_loss": x}, {"lm_loss": x}) for x in (1e-7, 1e-4))
    assert not resume.PairResult(resume.Pair(one, one), steps=4, compared=off).ok
    assert resume.PairResult(resume.Pair(one, two), steps=4, compared=off).ok
    assert not resume.PairResult(resume.Pair(one, two), steps=4, compared=far_off).ok


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    with Ranks(1) as ranks:
        ranks.run(save_golden_weights, Cell("1"), CLOSED_LOOP, folder / "weights")
        yield lambda function, *args: ranks.run(function, folder / "weights", folder, *args)[0]


def test_forgotten_step_counts_are_caught(one_rank):
    """The comparison fails for a resume that restores all but the steps of the optimizer."""
    expected, actual = one_rank(forget_the_steps)
    assert deviations(actual, expected)["lm_loss"] > 2 * FP32["lm_loss"]


def forget_the_steps(weights: Path, folder: Path):
    expected = run_cell(Cell("1"), CLOSED_LOOP, 6, weights)
    path = folder / "forgetful"
    first = resume.train_and_save(Cell("1"), CLOSED_LOOP, 3, weights, path)
    training = resume.ResumableTraining(Cell("1"), CLOSED_LOOP, weights)
    training.load(path)
    for part in training.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"].zero_()
    return expected, [*first, *training.steps(3, 3)]


def test_megatrons_own_distributed_optimizer_does_not_resume(one_rank):
    assert one_rank(resume_without_the_fix) == "AssertionError"


def resume_without_the_fix(weights: Path, folder: Path) -> str | None:
    """Return the error of Megatron's own optimizer, which other tests replace by ours."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron.remoe import compat

    cell = Cell("1, distributed optimizer", distributed_optimizer=True)
    resume.train_and_save(cell, CLOSED_LOOP, 1, weights, folder / "distributed")
    fix = compat._resume_distributed_optimizer
    compat._resume_distributed_optimizer = lambda: None
    optimizers.DistributedOptimizer = DistributedOptimizer
    try:
        resume.load_and_train(cell, CLOSED_LOOP, 1, weights, folder / "distributed")
    except AssertionError as error:
        return type(error).__name__
    finally:
        compat._resume_distributed_optimizer = fix
    return None


def test_an_asynchronous_save_overlaps_and_writes_the_state_of_its_step(one_rank):
    was_writing, equal, later_differ = one_rank(save_while_training)
    assert was_writing  # after three more steps
    assert equal and all(equal.values())
    assert later_differ


def save_while_training(weights: Path, folder: Path):
    """Compare an asynchronous save, whose writer is slow, with a synchronous one of the step."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    training = resume.ResumableTraining(Cell("1"), CLOSED_LOOP, weights)
    training.steps(0, 2)
    training.save(folder / "step")
    write = FileSystemWriterAsync.write_preloaded_data_multithread
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(
        lambda *args: (time.sleep(3), write(*args))
    )
    request = training.save(folder / "asynchronous", asynchronous=True)
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(write)
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    training.steps(2, 3)
    queue.maybe_finalize_async_calls(blocking=False, no_dist=False)
    was_writing = queue.get_num_unfinalized_calls() == 1
    queue.maybe_finalize_async_calls(blocking=True, no_dist=False)
    queue.close()
    training.save(folder / "later")
    step, ours, later = (
        dist_checkpointing.load_plain_tensors(str(folder / name))
        for name in ("step", "asynchronous", "later")
    )
    tensors = {key for key, value in step.items() if hasattr(value, "shape")}
    equal = {key: bool((step[key] == ours[key]).all()) for key in tensors}
    return was_writing, equal, any(bool((step[key] != later[key]).any()) for key in tensors)


def rows(*changes):
    base = [
        {
            "iteration": i,
            "lm_loss": 1.0 / i,
            "sparsity_per_layer": [0.5, 0.5],
            "tokens_per_second": i,
        }
        for i in (1, 2, 3)
    ]
    for position, change in changes:
        base[position] = change and base[position] | change
    return [row for row in base if row]


@pytest.mark.parametrize(
    ("change", "difference", "problem"),
    [
        ((0, {"tokens_per_second": 9.0}), 0, None),
        ((1, {"lm_loss": 0.5 + 2**-20}), 2**-20, None),
        ((2, {"sparsity_per_layer": [0.5, 0.25]}), 0.25, None),
        ((1, None), math.nan, "rows are missing or doubled"),
        ((1, {"iteration": 1}), math.nan, "rows are missing or doubled"),
        ((1, {"more": 1}), math.nan, "row .* has other keys than .*"),
    ],
)
def test_runs_are_compared_row_by_row(tmp_path, change, difference, problem):
    import json

    for name, content in (("whole", rows()), ("killed", rows(change))):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    result = kills.compare(tmp_path / "whole", tmp_path / "killed", [])
    assert result.rows == 3
    assert result.difference == pytest.approx(difference, nan_ok=True)
    assert re.fullmatch(problem or "None", str(result.problem))
    assert result.ok == (problem is None and difference == 0)
