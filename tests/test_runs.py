"""Reading a run directory and drawing it, on files written by hand."""

import json
import struct
from pathlib import Path

import pytest

from megatron.remoe.analysis.plots import plot_curves
from megatron.remoe.analysis.runs import Run, Stages

# Target 1 - 2/8 = 0.75. Dense until 3, although 2 is not: the last step below one half counts.
# Settled from 6 on, since 20 steps near the target follow.
SPARSITY = [0.4, 0.55, 0.45, 0.51, 0.7] + [0.75, 0.74] * 10
STEPS = len(SPARSITY)


def write_run(path: Path, rows: list[dict], config: str = "num_experts: 8\nmoe_router_topk: 2\n"):
    path.mkdir()
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(iteration: int, **routing) -> dict:
    return {"iteration": iteration, "lm_loss": 5.0 / iteration, **routing}


def relu_rows(sparsities: list[float]) -> list[dict]:
    return [
        step(
            i,
            sparsity=value,
            sparsity_per_layer=[value - 0.1, value + 0.1],
            l1_coeff=1e-8 * 1.2**i,
            l1_reg=1.0 / i,
        )
        for i, value in enumerate(sparsities, start=1)
    ]


def evaluation(iteration: int, split: str, loss: float) -> dict:
    return {"iteration": iteration, "split": split, "lm_loss": loss}


@pytest.fixture
def relu_run(tmp_path) -> Path:
    rows = relu_rows(SPARSITY)
    first = [evaluation(3, "valid/code", 4.0), evaluation(3, "valid", 4.5)]
    last = [evaluation(STEPS, "valid/code", 2.0), evaluation(STEPS, "valid", 2.5)]
    return write_run(tmp_path / "relu", rows[:3] + first + rows[3:] + last)


@pytest.fixture
def dense_run(tmp_path) -> Path:
    return write_run(tmp_path / "dense", [step(1), step(2)], "num_layers: 2\n")


def test_a_step_of_padding_alone_has_no_sparsity_and_disturbs_nothing(tmp_path):
    """Its row has null; stages, plots and the summary of a run are those of the other rows."""
    from rich.console import Console

    from megatron.remoe.analysis.measures import sparsity_deviation, steps_to_settle
    from megatron.remoe.run.progress import describe_row, summarize

    rows = relu_rows([0.4, 0.6] + [0.75] * 24)
    for row in rows:
        row |= {"tokens": 100 * row["iteration"], "tokens_per_second": 50.0}
    nothing = rows[5] | {"sparsity": None, "sparsity_per_layer": [None, None]}
    path = write_run(tmp_path / "run", rows[:5] + [nothing] + rows[6:])
    run = Run.load(path)
    assert run.stages == Stages(1, 3)
    assert steps_to_settle(run) == 3
    others = Run("", run.config, rows[:5] + rows[6:], [])
    assert sparsity_deviation(run) == pytest.approx(sparsity_deviation(others))
    assert "sparsity" not in describe_row(nothing) and "sparsity 0.750" in describe_row(rows[6])
    summarize(path, Console(quiet=True))
    assert (path / "curves.png").stat().st_size > 0


def test_a_run_is_read_as_it_was_written(relu_run):
    run = Run.load(relu_run)
    assert run.path == relu_run
    assert run.config == {"num_experts": 8, "moe_router_topk": 2}
    assert run.series("sparsity") == SPARSITY
    assert run.series("iteration") == list(range(1, STEPS + 1))
    assert [row["lm_loss"] for row in run.evaluations] == [4.0, 4.5, 2.0, 2.5]
    assert run.last_evaluation() == {"valid/code": 2.0, "valid": 2.5}
    assert run.has_relu_routing and run.target_sparsity == 0.75


def test_a_dense_run_has_no_routing_and_perhaps_no_evaluation(dense_run):
    run = Run.load(dense_run)
    assert not run.has_relu_routing
    assert run.last_evaluation() == {}


def test_a_line_that_is_being_written_is_left_out(relu_run):
    with (relu_run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "lm_lo')
    assert Run.load(relu_run).series("iteration") == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("sparsity", "stages"),
    [
        (SPARSITY, Stages(dense_until=3, sparse_from=6)),
        (SPARSITY[:-1], Stages(dense_until=3, sparse_from=None)),
        ([0.4, 0.45], Stages(dense_until=2, sparse_from=None)),
        ([0.6, 0.7], Stages(dense_until=0, sparse_from=None)),
        ([0.8, 0.3], Stages(dense_until=0, sparse_from=None)),
        ([0.8, 0.3] + [0.75] * 20, Stages(dense_until=0, sparse_from=3)),
        ([0.4, 0.76, 0.4], Stages(dense_until=1, sparse_from=None)),
        ([0.4, 0.8, 0.4] + [0.75] * 20, Stages(dense_until=1, sparse_from=4)),
    ],
)
def test_stages(tmp_path, sparsity, stages):
    assert Run.load(write_run(tmp_path / "run", relu_rows(sparsity))).stages == stages


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_not_a_run_is_named(relu_run, missing):
    (relu_run / missing).unlink()
    with pytest.raises(ValueError, match=f"relu is not a run directory: it has no {missing}"):
        Run.load(relu_run)


@pytest.mark.parametrize("rows", [[], [evaluation(0, "valid", 1.0)]])
def test_a_run_without_a_step_says_so(tmp_path, rows):
    with pytest.raises(ValueError, match="run has no training step yet; wait for the first"):
        Run.load(write_run(tmp_path / "run", rows))


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def drawn(monkeypatch, path: Path, png: Path) -> list:
    """The axes that `plot_curves` has drawn on."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_curves(Run.load(path), png)
    monkeypatch.undo()
    (figure,) = figures
    pyplot.close(figure)
    return figure.axes


def lines(axis) -> dict[str, list]:
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def test_the_curves_of_a_relu_run(monkeypatch, relu_run, tmp_path):
    loss, sparsity, coefficient = drawn(monkeypatch, relu_run, tmp_path / "c.png")
    assert size_of_png(tmp_path / "c.png") == (1170, 1170)
    assert lines(loss)["training"] == [5.0 / i for i in range(1, STEPS + 1)]
    assert lines(loss)["valid"] == [4.5, 2.5] and lines(loss)["valid/code"] == [4.0, 2.0]
    assert lines(sparsity)["mean"] == SPARSITY
    assert lines(sparsity)["target 0.75"] == [0.75, 0.75]
    assert len(sparsity.lines) == 4  # two layers
    assert lines(coefficient)["coefficient"] == [1e-8 * 1.2**i for i in range(1, STEPS + 1)]
    assert [text.get_text() for text in loss.texts] == ["dense", "sparsifying", "stable"]
    assert [text.get_position()[0] for text in loss.texts] == [2.0, 4.5, 15.5]


@pytest.mark.parametrize(
    ("sparsity", "names"),
    [([0.4, 0.45], ["dense"]), ([0.6, 0.7], ["sparsifying"]), ([0.75] * 20, ["stable"])],
)
def test_stages_that_a_run_has_not_reached_are_not_named(monkeypatch, tmp_path, sparsity, names):
    path = write_run(tmp_path / "run", relu_rows(sparsity))
    loss, *_ = drawn(monkeypatch, path, tmp_path / "c.png")
    assert [text.get_text() for text in loss.texts] == names


def test_the_curves_of_a_dense_run_are_the_loss(monkeypatch, dense_run, tmp_path):
    (loss,) = drawn(monkeypatch, dense_run, tmp_path / "c.png")
    assert lines(loss) == {"training": [5.0, 2.5]}
    assert size_of_png(tmp_path / "c.png") == (1170, 520)


def test_a_run_that_diverged_is_drawn_to_its_end(monkeypatch, tmp_path):
    rows = relu_rows(SPARSITY)
    rows[-1] |= {"lm_loss": None, "l1_reg": None}
    path = write_run(tmp_path / "run", [*rows, evaluation(STEPS, "valid", None)])
    loss, *_ = drawn(monkeypatch, path, tmp_path / "c.png")
    assert lines(loss)["training"][:-1] == [5.0 / i for i in range(1, STEPS)]
    assert size_of_png(tmp_path / "c.png") == (1170, 1170)


def test_costs_of_the_stages(tmp_path):
    """Steps of 100 tokens; the dense ones (up to 3) take 4 s, the next two 2 s, the rest 1 s."""
    rows = relu_rows(SPARSITY)
    for row, seconds in zip(rows, [4, 4, 4, 2, 2] + [1] * 20, strict=True):
        row["tokens"], row["tokens_per_second"] = 100 * row["iteration"], 100 / seconds
        row["peak_memory"] = 10**9 * seconds
    run = Run.load(write_run(tmp_path / "run", rows))
    found = [(c.name, c.first, c.last, c.seconds, c.peak_memory) for c in run.stage_costs]
    assert found == [
        ("dense warm-up", 1, 3, 12, 4 * 10**9),
        ("sparsifying", 4, 5, 4, 2 * 10**9),
        ("stable", 6, 25, 20, 10**9),
    ]
    assert [c.share for c in run.stage_costs] == pytest.approx([12 / 36, 4 / 36, 20 / 36])
    assert run.early_overhead == pytest.approx(36 / 25 - 1)


def test_a_run_that_is_still_dense_has_one_stage_and_no_overhead(tmp_path):
    rows = [r | {"tokens": 100 * r["iteration"], "tokens_per_second": 50} for r in relu_rows([0.4])]
    run = Run.load(write_run(tmp_path / "run", rows))
    ((name, peak),) = [(c.name, c.peak_memory) for c in run.stage_costs]
    assert (name, peak) == ("dense warm-up", None)
    assert run.early_overhead is None
