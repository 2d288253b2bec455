"""Comparisons of runs, on files written by hand: settling, grouping, verdicts, loads, figures."""

import csv
import io
import json
import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from megatron.remoe.analysis import compare as tables
from megatron.remoe.analysis import figures
from megatron.remoe.analysis.measures import half_width, steps_to_settle, verdict
from megatron.remoe.analysis.routers import order_of, router_of
from megatron.remoe.analysis.runs import Run
from tests.test_runs import evaluation

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
            row |= {"sparsity": value, "dead_experts": 2, "active_experts": 8 * (1 - value)}
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


# Differences over seeds, the verdict at a margin of 0.05, and how it follows. With three seeds,
# Student's t is 2.920 for the two one-sided tests and 4.303 for the interval.
DIFFERENCES = [
    ([-0.30, -0.20, -0.10], "undecided"),  # -0.2 +- 0.248
    ([-0.26, -0.20, -0.14], "lower"),  # -0.2 +- 0.149
    ([0.26, 0.20, 0.14], "higher"),
    ([-0.02, 0.00, 0.02], "equivalent within 0.05"),  # 0 +- 0.034 at 90%
    ([-0.03, 0.00, 0.03], "undecided"),  # 0 +- 0.0506 at 90%
    ([-0.030, -0.028, -0.026], "equivalent within 0.05"),  # lower as well, but by too little
    ([0.0, 0.0], "equivalent within 0.05"),
    ([0.06, 0.06], "higher"),
    ([math.nan, -0.2, -0.2], "undecided"),
    ([math.inf, 0.0], "undecided"),
]


@pytest.mark.parametrize(("differences", "expected"), DIFFERENCES)
def test_a_verdict_is_worked_out_by_hand(differences, expected):
    assert verdict(differences, 0.05) == expected


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_a_verdict_is_that_of_scipys_t_tests(count):
    """Each p-value of scipy against 5%, on differences whose mean and spread cover all verdicts."""
    from scipy.stats import ttest_1samp

    margin, found, noise = 0.05, set(), np.random.RandomState(count)
    for mean in np.linspace(-0.12, 0.12, 25):
        for spread in (0.002, 0.01, 0.03, 0.1):
            d = (mean + spread * noise.standard_normal(count)).tolist()
            above = ttest_1samp(d, -margin, alternative="greater").pvalue < 0.05
            below = ttest_1samp(d, margin, alternative="less").pvalue < 0.05
            expected = "undecided"
            if above and below:
                expected = "equivalent within 0.05"
            elif ttest_1samp(d, 0.0).pvalue < 0.05:
                expected = "lower" if np.mean(d) < 0 else "higher"
            assert verdict(d, margin) == expected, d
            interval = ttest_1samp(d, 0.0).confidence_interval(0.95)
            assert half_width(d) == pytest.approx((interval.high - interval.low) / 2)
            found.add(expected)
    assert len(found) == 4


def test_one_seed_has_no_verdict():
    with pytest.raises(ValueError, match="^1 difference between paired runs cannot be tested; tra"):
        verdict([0.1], 0.05)


@pytest.mark.parametrize("margin", [0.0, -0.05, math.nan, math.inf])
def test_a_margin_that_is_no_positive_number_is_refused(tmp_path, margin):
    runs = [Run.load(topk(tmp_path, "run", 2.0))]
    with pytest.raises(ValueError, match=f"^the margin is {margin:g}; it must be above 0"):
        tables.compare(runs, margin=margin)


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
    # Rows of runs that shared a machine have no speed worth a comparison.
    assert not any("second" in column for column in rows["dense"])
    assert "tokens/s" not in four_routers.to_markdown()
    # 2 embeddings of 32 x 8, 2 layers of attention 4 x 64 and MLP 3 x 128, 5 norms of 8
    assert rows["dense"]["total_params"] == str(512 + 2 * (256 + 384) + 40)
    assert rows["ReMoE"]["total_params"] == str(512 + 2 * (256 + 8 * 384) + 40)


def test_a_dense_start_counts_among_the_active_experts_of_all_steps(tmp_path):
    remoe(tmp_path, "a", 1.0, [0.0] * 20 + [TARGET] * 20, seed=1)
    remoe(tmp_path, "b", 1.0, [TARGET] * 40, seed=2)
    (group,) = tables.compare(tables.load_runs([tmp_path])).groups
    assert group.row["active_all_steps"] == pytest.approx((8 + 2 + 2 * 2) / 4)
    assert group.row["sparsity"] == TARGET


def test_differences_are_paired_by_seed(four_routers):
    (pair,) = [d for d in four_routers.differences if {d.first, d.second} == {"TopK", "ReMoE"}]
    sign = 1 if pair.first == "TopK" else -1
    assert pair.seeds == 3 and sign * pair.mean == pytest.approx(0.2)
    # 0.1, 0.2, 0.3: deviation 0.1, whatever the losses themselves do
    assert pair.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3))
    (single,) = [d for d in four_routers.differences if "TopK with warm-up" in (d.first, d.second)
                 and "TopK" in (d.first, d.second)]  # fmt: skip
    assert single.seeds == 1 and single.half_width is None
    assert len(four_routers.differences) == 6
    text = f"{pair.mean:+.4f} ± {pair.half_width:.4f} | undecided |"
    assert text in four_routers.to_markdown()
    assert single.verdict is None and "| one seed |" in four_routers.to_markdown()


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
    names = {f"{r}, {e} experts" for r in ("TopK", "ReMoE") for e in (8, 16)}
    assert {g.name for g in comparison.groups} == names | {"dense"}
    expected = {frozenset((f"TopK, {e} experts", f"ReMoE, {e} experts")) for e in (8, 16)}
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
    assert found["RMoE, 4 layers", "TopK, 4 layers"] == pytest.approx(-0.1)
    assert found["recurrent ReMoE, 2 layers", "ReMoE, 2 layers"] == pytest.approx(-0.3)


ROUTERS = [
    ({"num_experts": None}, "dense"),
    ({"num_experts": None, "moe_relu_routing": True}, "dense"),
    ({"moe_routing": "hash"}, "Hash"),
    ({}, "TopK"),
    ({"moe_routing": "topk", "moe_relu_load_balancing": "none"}, "TopK"),
    ({"moe_router_score_function": "sigmoid"}, "TopK, sigmoid"),
    ({"moe_topk_warmup_steps": 50}, "TopK with warm-up"),
    ({"moe_router_recurrence": "gru"}, "RMoE"),
    ({"moe_routing": "null_experts"}, "Null experts"),
    ({"moe_soft_routing": True}, "Soft MoE"),
    ({"moe_routing": "top_p"}, "Top-p"),
    ({"moe_routing": "top_p", "moe_router_recurrence": "rnn"}, "recurrent Top-p"),
    ({"moe_routing": "relu_rms"}, "ReLU with RMS norm"),
    ({"moe_relu_routing": True, "moe_relu_load_balancing": "aux_loss"}, "ReMoE"),
    (
        {"moe_routing": "relu", "moe_relu_l1_reg_coeff_per_layer": True},
        "ReMoE, coefficient per layer",
    ),
    ({"moe_relu_routing": True, "moe_relu_load_balancing": "none"}, "ReMoE, no load weights"),
    ({"moe_routing": "relu", "moe_relu_load_balancing": "squared"}, "ReMoE, squared load weights"),
    ({"moe_routing": "relu", "moe_router_recurrence": "gru"}, "recurrent ReMoE"),
    ({"moe_routing": "one_of_your_own"}, "one_of_your_own"),
]


def test_routers_have_names_and_an_order():
    configs = [{"num_experts": 8} | config for config, _ in ROUTERS]
    assert [router_of(config) for config in configs] == [name for _, name in ROUTERS]
    assert sorted(configs, key=order_of) == configs


def test_a_router_is_the_same_by_either_of_its_flags_and_with_defaults_left_out(tmp_path):
    """Runs with other weights of the penalty are routers of their own, and paired."""
    remoe(tmp_path, "old", 2.0, seed=1)
    new = {"moe_routing": "relu", "moe_relu_routing": None, "moe_relu_load_balancing": "aux_loss"}
    topk(tmp_path, "new", 2.5, seed=2, moe_router_recurrence="none", **new)
    remoe(tmp_path, "none", 1.9, seed=1, moe_relu_load_balancing="none")
    comparison = tables.compare(tables.load_runs([tmp_path]))
    names = ["ReMoE", "ReMoE, no load weights"]
    assert [(g.name, len(g.runs)) for g in comparison.groups] == [(names[0], 2), (names[1], 1)]
    assert [(d.first, d.second) for d in comparison.differences] == [(names[1], names[0])]


def test_loads_are_a_table_with_the_step_time_that_follows(tmp_path):
    """Half of the last rows have a busiest rank at 3 times the mean, and half at 2 times."""
    path = topk(tmp_path, "run", 2.0, num_layers=1)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows[:-1]):
        row |= {"expert_load_max": 4.0, "expert_load_cv": 0.5, "busiest_rank_load": 2.0 + i % 2}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = tables.compare(tables.load_runs([tmp_path]))
    # Weights of a token: attention 4 x 64, 2 experts of 3 x 128, and 32 x 8 of the output; scores
    # of attention 2 x 4 x 8.
    share = 768 / (256 + 768 + 256 + 64)
    (row,) = (group.row for group in comparison.groups)
    assert row["busiest_rank_load"] == 2.5 and row["step_time"] == pytest.approx(1 + 1.5 * share)
    text = f"| TopK | 2.0 of 8 | 4.00 | 0.500 | 8 | 2.50 | {1 + 1.5 * share:.3f} |"
    assert text in comparison.to_markdown()


def test_settings_of_a_router_are_compared_with_a_baseline(tmp_path):
    for value, loss in ((1e-4, 2.5), (1e-12, 2.25), (1e-8, 2.0)):
        for seed in (1, 2):
            flags = {"moe_relu_l1_reg_coeff_init": value, "seed": seed}
            remoe(tmp_path, f"{value}-{seed}", loss + seed, **flags)
    topk(tmp_path, "topk", 2.0, seed=1)
    runs = tables.load_runs([tmp_path])
    comparison = tables.compare(runs, baseline=tmp_path / "1e-08-2")
    names = [f"ReMoE, coefficient from {v:g}" for v in (1e-12, 1e-8, 1e-4)]
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
    assert "| TopK | dense | 2 | +nan ± nan | undecided |" in comparison.to_markdown()


def drawn(monkeypatch, comparison, folder) -> dict:
    """The axes of every figure of a comparison, by the names of the files."""
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    paths = figures.draw_all(comparison, folder)
    monkeypatch.undo()
    for figure in kept:
        pyplot.close(figure)
    return {path.name: figure.axes[0] for path, figure in zip(paths, kept, strict=True)}


def test_figures_are_of_what_varies_and_small(four_routers, tmp_path):
    names = {path.name for path in figures.draw_all(four_routers, tmp_path)}
    # two active experts have more parameters than one dense layer
    assert names == {"loss.svg", "sparsity.svg", "coefficient.svg", "parameters.svg"}
    before = {name: (tmp_path / name).read_bytes() for name in names}
    figures.draw_all(four_routers, tmp_path)
    for name, content in before.items():
        assert ElementTree.fromstring(content).tag.endswith("svg") and len(content) < 150_000
        assert (tmp_path / name).read_bytes() == content  # no date, and no random names


def test_a_group_is_one_line_with_its_name_at_the_end_and_a_band(
    monkeypatch, four_routers, tmp_path
):
    for group in four_routers.groups:
        for seed, run in group.runs.items():
            for row in run.train:
                row["lm_loss"] = 10.0 * seed
    axis = drawn(monkeypatch, four_routers, tmp_path)["loss.svg"]
    names = ["dense", "TopK", "TopK with warm-up", "ReMoE"]
    assert [line.get_label() for line in axis.lines] == names
    assert [set(line.get_ydata()) for line in axis.lines] == [{20.0}, {20.0}, {10.0}, {20.0}]
    assert sorted(text.get_text() for text in axis.texts) == sorted(names)
    bands = [band.get_paths()[0].get_extents() for band in axis.collections]
    assert [(band.ymin, band.ymax) for band in bands] == [(10.0, 30.0)] * 3  # one seed has none
    assert len({line.get_color() for line in axis.lines}) == 4
    places = sorted(text.xyann[1] for text in axis.texts)
    assert all(b - a > 0.04 for a, b in pairwise(places))


def test_a_run_that_lacks_a_quantity_does_not_hide_the_others_of_its_group(monkeypatch, tmp_path):
    for seed in (1, 2):
        remoe(tmp_path / "runs", f"{seed}", 2.0, seed=seed)
    comparison = tables.compare(tables.load_runs([tmp_path / "runs"]))
    for row in comparison.groups[0].runs[2].train:
        del row["sparsity"]
    axis = drawn(monkeypatch, comparison, tmp_path)["sparsity.svg"]
    assert [line.get_label() for line in axis.lines][0] == "ReMoE"
    assert set(axis.lines[0].get_ydata()) == {TARGET}


def test_many_groups_differ_in_color_or_style(monkeypatch, tmp_path):
    for i in range(16):
        topk(tmp_path / "runs", f"{i}", 2.0, moe_routing=f"router_{i:02d}")
    comparison = tables.compare(tables.load_runs([tmp_path / "runs"]))
    axis = drawn(monkeypatch, comparison, tmp_path)["loss.svg"]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 16
    places = sorted(text.xyann[1] for text in axis.texts)
    assert len(places) == 16 and places[0] >= 0 and places[-1] <= 1
    assert (tmp_path / "loss.svg").stat().st_size < 150_000


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([0.2, 0.5], [0.2, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.3, 0.42, 0.42], [0.28, 0.38, 0.48]),  # a block grows until it touches no other
        ([0.0, 0.0], [0.0, 0.1]),
        ([0.97, 1.0, 1.0], [0.8, 0.9, 1.0]),
    ],
)
def test_names_move_as_little_as_possible(places, expected):
    assert figures.spread(places, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "values", "figure"),
    [
        ("num_experts", (4, 8), "experts.svg"),
        ("moe_granularity", (1, 2), "granularity.svg"),
        ("ffn_hidden_size", (16, 32), "parameters.svg"),
    ],
)
def test_loss_is_drawn_against_what_a_sweep_varies(tmp_path, monkeypatch, key, values, figure):
    for value in values:
        config = EXPERTS | {key: value}
        write(tmp_path / "runs", f"{value}", 1.0 / value, [TARGET] * 30, **config)
    comparison = tables.compare(tables.load_runs([tmp_path / "runs"]))
    axis = drawn(monkeypatch, comparison, tmp_path)[figure]
    line, *others = (line for line in axis.lines if line.get_label() == "TopK")
    assert not others
    points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert [y for _, y in points] == pytest.approx([1.0 / v for v in values])
    if key != "ffn_hidden_size":
        assert [x for x, _ in points] == list(values)
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [str(v) for v in values]
        assert not axis.get_xticklabels(minor=True)
