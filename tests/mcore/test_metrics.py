"""`metrics.jsonl` from what Megatron reports, with Megatron played by hand."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import megatron.training
import pytest
import torch

from megatron.remoe.train.metrics import MetricsWriter
from remoe.statistics import StepReport

EVERY = {"grad_norm", "iteration", "learning_rate", "lm_loss", "tokens", "tokens_per_second"}
EVERY |= {"peak_memory"}
COUNTED = {"sparsity", "sparsity_per_layer", "active_experts", "active_experts_max"}
COUNTED |= {"expert_load_min", "expert_load_max", "expert_load_cv", "dead_experts"}
COUNTED |= {"busiest_rank_load", "silent_layers", "dense_layers"}
ROUTING = COUNTED | {"l1_coeff", "l1_reg"}


def report(l1_reg: float = 0.25) -> StepReport:
    """Three layers, of which the second is dense, and four experts."""
    return StepReport(
        has_router=torch.tensor([True, False, True]),
        sparsity=torch.tensor(0.625),
        sparsity_L=torch.tensor([0.5, math.nan, 0.75]),
        tokens_L=torch.tensor([32, 0, 32]),
        # k = 1 of 4: a balanced share is 8 tokens, and an expert with fewer than 1 is dead.
        tokens_per_expert_LE=torch.tensor([[16, 16, 16, 16], [0, 0, 0, 0], [24, 7, 1, 0]]),
        most_active_L=torch.tensor([3, 0, 2]),
        topk=1,
        l1_reg_L=torch.tensor([l1_reg, math.nan, 0.5]),
        level_L=torch.full((3,), 1e-8),
        level_name="l1_coeff",
    )


class Recorder:
    """A TensorBoard or W&B writer that remembers."""

    Histogram = list  # W&B's class

    def __init__(self) -> None:
        self.scalars, self.histograms, self.flushed = [], [], 0

    def add_scalar(self, tag, value, iteration):
        self.scalars.append((tag, float(value), iteration))

    def log(self, values, iteration):
        for tag, value in values.items():
            if isinstance(value, list):
                self.add_histogram(tag, torch.tensor(value), iteration)
            else:
                self.add_scalar(tag, value, iteration)

    def add_histogram(self, tag, values, iteration):
        self.histograms.append((tag, values.tolist(), iteration))

    def flush(self):
        self.flushed += 1


class Megatron:
    """Reports as `megatron.training.training` does: in its order, with its timer."""

    def __init__(self, path, *, report=None, writer=None, start=0, **args) -> None:
        self.args = Namespace(
            iteration=start,
            log_interval=1,
            eval_interval=None,
            start_eval_at_iter=None,
            eval_iters=10,
            do_valid=True,
            do_test=False,
            global_batch_size=8,
            seq_length=16,
            consumed_train_samples=8 * start,
            metrics_file=str(path),
            rank=0,
            world_size=1,
        )
        vars(self.args).update(args)
        self.hook = SimpleNamespace(report=report)
        self.writer = MetricsWriter(path, self.args, self.hook, writer)
        self.seconds = 0.0
        self.iteration = start

    def elapsed(self, reset: bool) -> float:
        assert not reset  # or Megatron's own log would be wrong
        return self.seconds

    def step(self, seconds=1.0, loss=2.0, grad_norm=0.5) -> None:
        is_first = self.iteration == self.args.iteration
        self.iteration += 1
        self.seconds += seconds
        self.args.consumed_train_samples += self.args.global_batch_size
        samples = self.args.consumed_train_samples
        self.writer.add_scalar("learning-rate", 1e-3, self.iteration)
        self.writer.add_scalar("learning-rate vs samples", 1e-3, samples)
        self.writer.add_scalar("batch-size", 8, self.iteration)
        self.writer.add_scalar("lm loss", torch.tensor(loss), self.iteration)
        self.writer.add_scalar("lm loss vs samples", torch.tensor(loss), samples)
        if grad_norm is not None:  # an fp16 step that overflowed has none
            self.writer.add_scalar("grad-norm", grad_norm, self.iteration)
            self.writer.add_scalar("grad-norm vs samples", grad_norm, samples)
        if self.iteration % self.args.log_interval == 0 and not is_first:
            self.seconds = 0.0

    def evaluate(self, **losses: float) -> None:
        for name, loss in losses.items():
            tag = "lm loss validation" + ("" if name == "all" else f"-{name}")
            self.writer.add_scalar(tag, loss, self.iteration)
            self.writer.add_scalar(f"{tag} vs samples", loss, self.args.consumed_train_samples)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


@pytest.fixture
def megatron_on(path, monkeypatch):
    """Makes a `Megatron` that writes to `path`, and the one whose timer and W&B are asked."""
    wandb = Recorder()

    def make(**kwargs) -> Megatron:
        megatron_ = Megatron(path, **kwargs)
        monkeypatch.setattr(megatron.training, "get_timers", lambda: lambda name: megatron_)
        return megatron_

    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: wandb)
    make.wandb = wandb
    return make


def rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def evaluations(path):
    return [(r["iteration"], r["split"], r["lm_loss"]) for r in rows(path) if "split" in r]


def test_a_training_row_has_what_is_documented(megatron_on, path):
    run = megatron_on(report=report())
    run.step(seconds=2.0)
    (row,) = rows(path)
    assert row == {
        "iteration": 1,
        "lm_loss": 2.0,
        "sparsity": 0.625,
        "sparsity_per_layer": [0.5, 0.75],  # layers with experts only
        "active_experts": 4 * 0.375,
        "active_experts_max": 3,
        "expert_load_min": 0.0,
        "expert_load_max": 3.0,
        # the first layer is balanced; in the third loads are 3, 7/8, 1/8 and 0
        "expert_load_cv": pytest.approx(math.sqrt((4 + 1 / 64 + 49 / 64 + 1) / 4) / 2),
        "dead_experts": 1,
        "busiest_rank_load": pytest.approx((16 + 24) / (16 + 8)),
        "l1_coeff": torch.tensor(1e-8).item(),
        "l1_reg": 0.75,
        "silent_layers": [],
        "dense_layers": [],
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens": 8 * 16,
        "tokens_per_second": 64.0,
        "peak_memory": row["peak_memory"],
    }
    assert row["peak_memory"] > 0
    assert set(row) == EVERY | ROUTING


def test_layers_that_go_silent_or_dense_are_named_in_row_and_log(megatron_on, path, capsys):
    ordinary = report()
    extreme = replace(ordinary, sparsity_L=torch.tensor([1.0, math.nan, 0.0]))
    run = megatron_on(report=ordinary)
    for run.writer.hook.report in (ordinary, extreme, extreme, ordinary):
        run.step()
    silent, dense = ([row[key] for row in rows(path)] for key in ("silent_layers", "dense_layers"))
    assert silent == [[], [1], [1], []]
    assert dense == [[], [3], [3], []]
    assert capsys.readouterr().out.splitlines() == [
        "remoe: iteration 2: layer 1 is silent",
        "remoe: iteration 2: layer 3 is fully dense",
        "remoe: iteration 4: layer 1 is no longer silent",
        "remoe: iteration 4: layer 3 is no longer fully dense",
    ]


def test_a_topk_row_has_the_routing_without_a_penalty(megatron_on, path):
    megatron_on(report=replace(report(), l1_reg_L=None, level_L=None)).step()
    assert set(rows(path)[0]) == EVERY | COUNTED


def test_a_silent_layer_has_balanced_load_and_dead_experts(megatron_on, path):
    counts = torch.tensor([[16, 16, 16, 16], [0, 0, 0, 0], [0, 0, 0, 0]])
    megatron_on(report=replace(report(), tokens_per_expert_LE=counts)).step()
    (row,) = rows(path)
    assert (row["expert_load_min"], row["expert_load_max"], row["expert_load_cv"]) == (1, 1, 0)
    assert row["dead_experts"] == 4


def test_without_routers_that_count_a_row_has_no_routing(megatron_on, path):
    megatron_on().step()
    assert set(rows(path)[0]) == EVERY


def test_speed_leaves_out_what_megatrons_timer_holds_from_before(megatron_on, path):
    run = megatron_on()
    for seconds in (4.0, 1.0, 2.0):  # the first step warms up; Megatron does not reset after it
        run.step(seconds)
    assert [r["tokens_per_second"] for r in rows(path)] == [128 / 4, 128 / 1, 128 / 2]
    assert [r["tokens"] for r in rows(path)] == [128, 256, 384]


def test_with_a_log_interval_a_row_is_the_last_step_and_the_mean_speed(megatron_on, path):
    run = megatron_on(log_interval=3, start=4, iteration=4)
    for step in range(5, 13):
        run.step(seconds=step, loss=float(step))
    written = rows(path)
    assert [(r["iteration"], r["lm_loss"]) for r in written] == [(6, 6), (9, 9), (12, 12)]
    steps_and_seconds = [(2, 5 + 6), (3, 7 + 8 + 9), (3, 10 + 11 + 12)]
    expected = [round(128 * n / t, 1) for n, t in steps_and_seconds]
    assert [r["tokens_per_second"] for r in written] == expected


def test_a_skipped_step_has_no_row_and_does_not_count_twice(megatron_on, path):
    run = megatron_on()
    run.step()
    run.step(grad_norm=None)
    run.step(seconds=2.0)
    assert [(r["iteration"], r["tokens_per_second"]) for r in rows(path)] == [(1, 128), (3, 64)]


def test_nan_is_null(megatron_on, path):
    run = megatron_on(report=report(l1_reg=math.nan))
    run.step(loss=math.nan, grad_norm=math.inf)
    run.evaluate(all=math.nan)
    training, evaluation = rows(path)
    assert training["lm_loss"] is training["grad_norm"] is training["l1_reg"] is None
    assert training["sparsity"] == 0.625
    assert evaluation == {"iteration": 1, "split": "valid", "lm_loss": None}


def test_a_last_validation_and_the_test_set_are_told_apart(megatron_on, path):
    run = megatron_on(eval_interval=2, do_test=True)
    for step in (1, 2, 3):
        run.step()
        if step == 2:
            run.evaluate(all=2.5)
    run.evaluate(all=2.25)
    run.evaluate(all=2.125)
    assert evaluations(path) == [(2, "valid", 2.5), (3, "valid", 2.25), (3, "test", 2.125)]


def test_a_last_validation_that_repeats_the_one_in_training_is_written_once(megatron_on, path):
    run = megatron_on(eval_interval=2, do_test=True)
    run_steps(run, 2)
    for loss in (2.5, 2.5, 2.125):
        run.evaluate(all=loss)
    assert evaluations(path) == [(2, "valid", 2.5), (2, "test", 2.125)]


def test_an_evaluation_that_starts_late_does_not_hide_the_test_set(megatron_on, path):
    run = megatron_on(eval_interval=2, do_test=True, start_eval_at_iter=10)
    run_steps(run, 2)
    for loss in (2.5, 2.125):
        run.evaluate(all=loss)
    assert evaluations(path) == [(2, "valid", 2.5), (2, "test", 2.125)]


def test_validation_sets_have_a_mean_by_tokens(megatron_on, path):
    run = megatron_on(eval_interval=1, eval_iters=[3, 1])
    run.step()
    for _ in range(2):  # the last validation repeats it
        run.evaluate(code=2.0, prose=4.0)
    run.step()
    run.evaluate(code=1.0, prose=3.0)
    assert evaluations(path) == [
        (1, "valid/code", 2.0),
        (1, "valid/prose", 4.0),
        (1, "valid", 2.5),
        (2, "valid/code", 1.0),
        (2, "valid/prose", 3.0),
        (2, "valid", 1.5),
    ]


def run_steps(run, n, **losses):
    for _ in range(n):
        run.step()
        if losses:
            run.evaluate(**losses)


def test_a_resumed_run_replaces_the_rows_that_it_does_again(megatron_on, path):
    run_steps(megatron_on(eval_interval=1), 4, all=2.0)
    with path.open("a") as file:
        file.write('{"iteration": 5, "lm_lo')
    run_steps(megatron_on(eval_interval=1, start=2), 3, all=3.0)
    order = [(r["iteration"], "split" in r) for r in rows(path)]
    assert order == [(i, e) for i in range(1, 6) for e in (False, True)]
    assert [loss for _, _, loss in evaluations(path)] == [2, 2, 3, 3, 3]


def test_rows_after_the_checkpoint_are_cut_also_when_the_next_row_is_far(megatron_on, path):
    run_steps(megatron_on(), 5)
    run_steps(megatron_on(start=2, log_interval=4), 2)
    assert [r["iteration"] for r in rows(path)] == [1, 2, 4]


def test_a_run_from_the_beginning_replaces_everything(megatron_on, path):
    run_steps(megatron_on(), 3)
    run_steps(megatron_on(), 1)
    assert [r["iteration"] for r in rows(path)] == [1]


def test_a_resumed_run_that_evaluates_before_it_logs_replaces_too(megatron_on, path):
    settings = {"log_interval": 4, "eval_interval": 2}
    for start in (0, 0):
        run = megatron_on(start=start, **settings)
        for step in range(1, 5):
            run.step()
            if step % 2 == 0:
                run.evaluate(all=2.0)
    order = [(r["iteration"], "split" in r) for r in rows(path)]
    assert order == [(2, True), (4, False), (4, True)]


def test_a_finished_run_that_is_started_again_evaluates_once(megatron_on, path):
    run = megatron_on(eval_interval=2, do_test=True)
    run_steps(run, 2)
    for loss in (2.0, 2.0, 3.0):
        run.evaluate(all=loss)
    before = rows(path)
    again = megatron_on(eval_interval=2, do_test=True, start=2)
    for loss in (2.0, 3.0):  # no step, the last validation, the test set
        again.evaluate(all=loss)
    assert rows(path) == before and len(before) == 4


def test_tensorboard_and_wandb_get_the_same_numbers(megatron_on, path):
    tensorboard = Recorder()
    run = megatron_on(report=report(), writer=tensorboard)
    run.step()
    run.evaluate(all=2.5)
    (row, _) = rows(path)
    routing = [("remoe/sparsity", row["sparsity"], 1)]
    routing += [(f"remoe/sparsity_per_layer/{i}", v, 1) for i, v in ((1, 0.5), (2, 0.75))]
    plain = ROUTING - {"sparsity", "sparsity_per_layer", "silent_layers", "dense_layers"}
    routing += [(f"remoe/{k}", row[k], 1) for k in plain]
    routing += [("remoe/silent_layers", 0, 1), ("remoe/dense_layers", 0, 1)]  # how many
    # W&B has Megatron's own numbers from Megatron.
    assert sorted(megatron_on.wandb.scalars) == sorted(routing)
    by_megatron = {tag for tag, _, _ in tensorboard.scalars} - {tag for tag, _, _ in routing}
    assert set(tensorboard.scalars) >= {*routing, ("lm loss", 2.0, 1), ("grad-norm", 0.5, 1)}
    assert {"lm loss vs samples", "lm loss validation", "batch-size"} <= by_megatron
    # The loads of the four experts of both routers: their tokens by the mean of the layer.
    loads = [[1.0, 1.0, 1.0, 1.0], [3.0, 0.875, 0.125, 0.0]]
    drawn = [(f"remoe/expert_load/{i}", row, 1) for i, row in enumerate(loads, start=1)]
    assert tensorboard.histograms == megatron_on.wandb.histograms == drawn
    run.writer.flush()
    assert tensorboard.flushed == 1


def test_without_tensorboard_other_calls_do_nothing(megatron_on, path):
    assert megatron_on().writer.add_text("args", "x", global_step=0) is None


def test_it_is_installed_on_the_last_rank_when_asked_for(monkeypatch, tmp_path):
    from megatron.training import global_vars

    there = Recorder()
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", there)
    path = str(tmp_path / "m.jsonl")
    for file, rank in ((None, 1), (path, 0)):
        args = Namespace(metrics_file=file, rank=rank, world_size=2)
        assert MetricsWriter.install(args, SimpleNamespace(report=None)) is None
        assert megatron.training.global_vars.get_tensorboard_writer() is there
    args = Namespace(metrics_file=path, rank=1, world_size=2)
    writer = MetricsWriter.install(args, SimpleNamespace(report=None))
    assert megatron.training.global_vars.get_tensorboard_writer() is writer
    assert writer.writer is there
