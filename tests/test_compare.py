"""Comparisons of runs, on files written by hand: settling, grouping, differences, figures."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml

from megatron.remoe.analysis import compare as tables
from megatron.remoe.analysis import figures
from megatron.remoe.analysis.measures import steps_to_settle
from megatron.remoe.analysis.runs import Run
from tests.test_runs import evaluation, size_of_png

SHAPE = {
    "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16,
    "seq_length": 4, "padded_vocab_size": 32, "swiglu": True, "normalization": "RMSNorm",
    "disable_bias_linear": True, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "moe_router_topk": 2}
TARGET = 0.75


def write(folder: Path, name: str, loss: float | None, sparsity: list[float] | None, **config):
    path = folder / name
    path.mkdir(parents=True)
    config = SHAPE | {"run_dir": str(path), "save": str(path)} | config
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for i, value in enumerate(sparsity or [0.0] * 30, start=1):
        row = {"iteration": i, "lm_loss": 9.0 / i, "tokens_per_second": 100.0}
        if "num_experts" in config:
            row |= {"sparsity": value, "dead_experts": 2}
        if config.get("moe_relu_routing"):
            row |= {"l1_coeff": 1e-8, "l1_reg": 1.0, "sparsity_per_layer": [value]}
        rows.append(row)
    rows.append(evaluation(len(rows), "valid", loss))

    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def remoe(folder: Path, name: str, loss: float, sparsity: list[float] | None = None, **config):
    sparsity = sparsity or [TARGET] * 30
    return write(folder, name, loss, sparsity, moe_relu_routing=True, **EXPERTS, **config)


def topk(folder: Path, name: str, loss: float, **config):
    return write(folder, name, loss, [TARGET] * 30, **EXPERTS, **config)


@pytest.mark.parametrize(
    ("sparsity", "step"),
    [
        ([TARGET] * 20, 1),
        ([TARGET] * 19, None),
        ([0.5] * 7 + [TARGET + 0.0199] * 10 + [TARGET - 0.0199] * 10, 8),
        ([TARGET] * 19 + [TARGET + 0.021] + [TARGET] * 20, 21),  # too early the first time
        ([TARGET] * 19 + [0.9] + [TARGET] * 19, None),
        ([0.5] * 3 + [TARGET] * 25 + [0.9] * 5, 4),  # later steps do not matter
    ],
)
def test_a_run_settles_where_twenty_steps_near_the_target_begin(tmp_path, sparsity, step):
    assert steps_to_settle(Run.load(remoe(tmp_path, "run", 1.0, sparsity))) == step


def test_t_quantiles_are_those_of_the_distribution():
    for degrees, quantile in enumerate(tables._T95, start=1):
        # density of Student's t, integrated by the trapezoidal rule
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
        scale /= math.sqrt(degrees * math.pi)
        steps = 20000
        xs = [quantile * i / steps for i in range(steps + 1)]
        ys = [scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in xs]
        inside = 2 * (sum(ys) - (ys[0] + ys[-1]) / 2) * quantile / steps
        assert inside == pytest.approx(0.95, abs=5e-5), degrees


@pytest.fixture
def four_routers(tmp_path) -> tables.RunComparison:
    for seed, loss in ((1, 2.0), (2, 3.0), (3, 4.0)):
        topk(tmp_path, f"topk-{seed}", loss, seed=seed)
        remoe(tmp_path, f"remoe-{seed}", loss - 0.1 * seed, seed=seed)
        write(tmp_path, f"dense-{seed}", loss + 1, None, seed=seed)
    topk(tmp_path, "warm-1", 1.5, seed=1, moe_topk_warmup_steps=5, moe_topk_warmup_topk=4)
    return tables.compare(tables.load_runs([tmp_path]))


def test_seeds_are_one_row_with_mean_and_deviation(four_routers):
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(four_routers.to_csv()))}
    assert set(rows) == {"dense", "TopK", "TopK with warm-up", "ReMoE"}
    assert [float(rows["TopK"][k]) for k in ("valid_loss_mean", "valid_loss_std")] == [3.0, 1.0]
    assert rows["TopK"]["seeds"] == "3" and rows["TopK with warm-up"]["valid_loss_std"] == ""
    assert float(rows["ReMoE"]["sparsity"]) == TARGET
    assert float(rows["ReMoE"]["steps_to_settle"]) == 1 and rows["TopK"]["steps_to_settle"] == ""
    assert float(rows["TopK"]["dead_experts"]) == 2 and rows["dense"]["dead_experts"] == ""
    assert float(rows["dense"]["tokens_per_second"]) == 100
    # 2 embeddings of 32 x 8, 2 layers of attention 4 x 64 and MLP 3 x 128, 5 norms of 8
    assert rows["dense"]["total_params"] == str(512 + 2 * (256 + 384) + 40)
    assert rows["ReMoE"]["total_params"] == str(512 + 2 * (256 + 8 * 384) + 40)


def test_differences_are_paired_by_seed(four_routers):
    (pair,) = [d for d in four_routers.differences if {d.first, d.second} == {"TopK", "ReMoE"}]
    sign = 1 if pair.first == "TopK" else -1
    assert pair.seeds == 3 and sign * pair.mean == pytest.approx(0.2)
    # 0.1, 0.2, 0.3: deviation 0.1, whatever the losses themselves do
    assert pair.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    (single,) = [d for d in four_routers.differences if "TopK with warm-up" in (d.first, d.second)
                 and "TopK" in (d.first, d.second)]  # fmt: skip
    assert single.seeds == 1 and single.half_width is None
    assert len(four_routers.differences) == 6
    assert f"{pair.mean:+.4f} ± {pair.half_width:.4f}" in four_routers.to_markdown()


def test_accuracy_is_a_column_where_runs_were_evaluated(tmp_path):
    """A group stands for its tasks; runs without an evaluation have an empty cell."""
    runs = [remoe(tmp_path, "remoe", 2.0, seed=1), topk(tmp_path, "topk", 2.0, seed=1)]
    assert "accuracy" not in tables.compare(tables.load_runs([tmp_path])).to_markdown()
    tasks = {"corpus_cloze": {"acc": 0.5}, "corpus_cloze_prose": {"acc": 0.9}, "piqa": {"acc": 0.6}}
    (tmp_path / "remoe/evaluation.json").write_text(json.dumps({"tasks": tasks}))
    comparison = tables.compare(tables.load_runs([tmp_path]))
    first, second = (line for line in comparison.to_markdown().splitlines()[2:4])
    assert "|  |" in first and "| 55.00 |" in second
    assert len(runs) == 2 and [group.row["accuracy"] for group in comparison.groups] == [
        None,
        pytest.approx(0.55),
    ]


def test_routers_are_paired_at_equal_settings_only(tmp_path):
    for experts in (8, 16):
        more = {"num_experts": experts, "moe_router_topk": 2}
        for router, relu in (("topk", False), ("remoe", True)):
            path = f"{router}-{experts}"
            write(tmp_path, path, 2.0, [TARGET] * 30, moe_relu_routing=relu, **more)
    write(tmp_path, "dense", 3.0, None)
    comparison = tables.compare(tables.load_runs([tmp_path]))
    pairs = {frozenset((d.first, d.second)) for d in comparison.differences}
    names = {f"{r}, num_experts {e}" for r in ("TopK", "ReMoE") for e in (8, 16)}
    assert {g.name for g in comparison.groups} == names | {"dense"}
    expected = {frozenset((f"TopK, num_experts {e}", f"ReMoE, num_experts {e}")) for e in (8, 16)}
    assert pairs == expected | {frozenset(("dense", name)) for name in names}


def test_recurrent_routers_are_routers_of_their_own_and_paired_at_every_size(tmp_path):
    gru = {"moe_router_recurrence": "gru", "moe_router_recurrent_size": 4}
    for layers, offset in ((2, 0.0), (4, -0.5)):
        topk(tmp_path, f"topk{layers}", 5.0 + offset, num_layers=layers)
        topk(tmp_path, f"rmoe{layers}", 4.9 + offset, num_layers=layers, **gru)
        remoe(
            tmp_path,
            f"remoe{layers}",
            4.5 + offset,
            num_layers=layers,
            moe_router_recurrence="none",
        )
        remoe(tmp_path, f"both{layers}", 4.2 + offset, num_layers=layers, **gru)
    compared = tables.compare(tables.load_runs([tmp_path]))
    routers = ("TopK", "RMoE", "ReMoE", "recurrent ReMoE")
    assert [group.router for group in compared.groups] == [r for r in routers for _ in range(2)]
    assert len(compared.differences) == 12  # 6 pairs of routers at 2 sizes
    found = {(d.first, d.second): d.mean for d in compared.differences}
    assert found["RMoE, num_layers 4", "TopK, num_layers 4"] == pytest.approx(-0.1)
    assert found["recurrent ReMoE, num_layers 2", "ReMoE, num_layers 2"] == pytest.approx(-0.3)
    assert dict.fromkeys(tables.ROUTERS).keys() == figures._COLORS.keys()


def test_settings_of_a_router_are_compared_with_a_baseline(tmp_path):
    for value, loss in ((1e-4, 2.5), (1e-12, 2.25), (1e-8, 2.0)):
        for seed in (1, 2):
            flags = {"moe_relu_l1_reg_coeff_init": value, "seed": seed}
            remoe(tmp_path, f"{value}-{seed}", loss + seed, **flags)
    topk(tmp_path, "topk", 2.0, seed=1)
    runs = tables.load_runs([tmp_path])
    comparison = tables.compare(runs, baseline=tmp_path / "1e-08-2")
    names = [f"ReMoE, l1_reg_coeff_init {v}" for v in (1e-12, 1e-8, 1e-4)]
    assert [g.name for g in comparison.groups] == ["TopK", *names]  # in the order of the values
    own = [d for d in comparison.differences if d.second != "TopK"]
    assert [(d.first, d.second) for d in own] == [(names[0], names[1]), (names[2], names[1])]
    assert [d.mean for d in own] == pytest.approx([0.25, 0.5])
    assert [d.half_width for d in own] == pytest.approx([0, 0], abs=1e-12)
    with pytest.raises(ValueError, match="elsewhere is none of the runs"):
        tables.compare(runs, baseline=tmp_path / "elsewhere")


def test_oscillation_is_of_the_last_hundred_rows(tmp_path):
    fast, slow = [-0.01, 0.01] * 50, [0.02, -0.02] * 5
    steps = [0.0] * 50 + [TARGET + f + slow[i // 10] for i, f in enumerate(fast)]
    comparison = tables.compare([Run.load(remoe(tmp_path, "run", 1.0, steps))])
    row = comparison.groups[0].row
    assert row["oscillation"] == pytest.approx(0.02)
    assert row["deviation"] == pytest.approx(math.hypot(0.01, 0.02))
    assert "| 0.0224 | 0.0200 | 1.0e-08 | 1.0e-08 |" in comparison.to_markdown()


def test_two_runs_of_a_seed_are_refused(tmp_path):
    paths = [topk(tmp_path, name, 2.0, seed=1) for name in ("a", "b")]
    with pytest.raises(ValueError, match="the same settings and seed 1; leave one of them out"):
        tables.compare(tables.load_runs(paths))


def test_losses_of_hidden_and_of_next_tokens_are_not_compared(tmp_path):
    remoe(tmp_path, "causal", 2.0, seed=1)
    topk(tmp_path, "encoder", 1.0, seed=1, masked_lm=True)
    write(tmp_path, "soft", 1.0, None, seed=1, masked_lm=True, moe_soft_routing=True, **EXPERTS)
    with pytest.raises(ValueError, match="was trained with masked_lm and .*causal without, and"):
        tables.compare(tables.load_runs([tmp_path]))
    runs = tables.load_runs([tmp_path / name for name in ("encoder", "soft")])
    (pair,) = tables.compare(runs).differences
    assert (pair.first, pair.second, pair.mean) == ("Soft MoE", "TopK", 0)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        tables.load_runs([tmp_path])


def test_a_granularity_that_is_left_out_is_one(tmp_path):
    for name, granularity in (("fine", {"moe_granularity": 2}), ("coarse", {})):
        topk(tmp_path, f"topk-{name}", 3.0, seed=1, **granularity)
        remoe(tmp_path, f"remoe-{name}", 2.0, seed=1, **granularity)
    comparison = tables.compare(tables.load_runs([tmp_path]))
    pairs = [(d.first, d.second) for d in comparison.differences]
    assert pairs == [(f"ReMoE, granularity {g}", f"TopK, granularity {g}") for g in (1, 2)]


def test_a_run_that_diverged_has_no_loss(tmp_path):
    for seed, loss in ((1, 2.0), (2, None)):
        write(tmp_path, f"dense-{seed}", loss, None, seed=seed)
        topk(tmp_path, f"topk-{seed}", 3.0, seed=seed)
    comparison = tables.compare(tables.load_runs([tmp_path]))
    assert "| nan ± nan |" in comparison.to_markdown()
    assert "| TopK | dense | 2 | +nan ± nan |" in comparison.to_markdown()


def test_figures_are_of_what_varies(four_routers, tmp_path):
    drawn = {path.name for path in figures.draw_all(four_routers, tmp_path)}
    # two active experts have more parameters than one dense layer
    assert drawn == {"loss.png", "sparsity.png", "coefficient.png", "parameters.png"}
    for name in drawn:
        width, height = size_of_png(tmp_path / name)
        assert width > 800 and height > 500


@pytest.mark.parametrize(
    ("key", "values", "figure"),
    [
        ("num_experts", (4, 8), "experts.png"),
        ("moe_granularity", (1, 2), "granularity.png"),
        ("ffn_hidden_size", (16, 32), "parameters.png"),
    ],
)
def test_loss_is_drawn_against_what_a_sweep_varies(tmp_path, monkeypatch, key, values, figure):
    from matplotlib import pyplot

    for value in values:
        config = EXPERTS | {key: value}
        write(tmp_path / "runs", f"{value}", 1.0 / value, [TARGET] * 30, **config)
    comparison = tables.compare(tables.load_runs([tmp_path / "runs"]))
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    paths = figures.draw_all(comparison, tmp_path)
    assert figure in {path.name for path in paths}
    (axis,) = kept[[path.name for path in paths].index(figure)].axes
    monkeypatch.undo()
    for each in kept:
        pyplot.close(each)
    points = sorted(zip(axis.lines[0].get_xdata(), axis.lines[0].get_ydata(), strict=True))
    assert [y for _, y in points] == pytest.approx([1.0 / v for v in values])
    if key != "ffn_hidden_size":
        assert [x for x, _ in points] == list(values)
