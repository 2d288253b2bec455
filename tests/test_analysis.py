"""Measures of gates: against loops, numbers worked out by hand, and scikit-learn's."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.remoe.analysis import routing
from megatron.remoe.analysis.trace import Facts, Trace, layer_trace
from remoe.analysis import (
    expert_information,
    frequency_classes,
    inner_balance,
    joint_counts,
    leading_expert,
    mutual_information,
    outer_balance,
    shuffle,
)
from tests.test_compare import remoe, topk

TOKENS, EXPERTS, TOPK = 400, 6, 2


def relu_gates(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Gates of which a token has any number: none, one, or more than k."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64) - 0.8).relu()


def softmax_scores(seed: int, scale: float = 2.0, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    return torch.softmax(scale * logits, dim=1)


@pytest.mark.parametrize("make", [relu_gates, softmax_scores])
def test_balance_and_leading_experts_equal_the_loops(make):
    scores = make(0)
    ratios, shares, leading = [], [], []
    for token in scores.tolist():
        largest = sorted(token, reverse=True)
        if largest[1] > 0:
            ratios.append(largest[0] / largest[1])
        if largest[0] > 0:
            shares.append(sum(largest[:TOPK]) / sum(token))
        leading.append(token.index(largest[0]) if largest[0] > 0 else EXPERTS)
    assert inner_balance(scores).tolist() == pytest.approx(ratios)
    assert outer_balance(scores, TOPK).tolist() == pytest.approx(shares)
    assert leading_expert(scores).tolist() == leading
    if make is relu_gates:
        assert 0 < len(ratios) < len(shares) < TOKENS and EXPERTS in leading


def test_one_expert_has_no_second():
    assert inner_balance(torch.ones(3, 1)).shape == (0,)
    assert outer_balance(torch.ones(3, 1), 1).tolist() == [1, 1, 1]


def information(first: torch.Tensor, second: torch.Tensor) -> float:
    return mutual_information(joint_counts(first, second, EXPERTS + 1))


def loop_information(first: list[int], second: list[int]) -> float:
    pairs, total = list(zip(first, second, strict=True)), 0.0
    for a, b in set(pairs):
        joint = pairs.count((a, b)) / len(pairs)
        total += joint * math.log(joint / (first.count(a) * second.count(b) / len(pairs) ** 2))
    return total


def test_mutual_information_is_that_of_the_loop_and_of_scikit_learn():
    first, second = leading_expert(relu_gates(0)), leading_expert(relu_gates(0) + 0.1)
    mixed = torch.where(torch.arange(TOKENS) % 3 == 0, shuffle(first, 1), first)
    for other in (second, mixed, shuffle(first, 2)):
        found = information(first, other)
        assert found == pytest.approx(loop_information(first.tolist(), other.tolist()), abs=1e-12)
        metrics = pytest.importorskip("sklearn.metrics")
        assert found == pytest.approx(metrics.mutual_info_score(first, other), abs=1e-12)


def test_a_layer_that_repeats_another_shares_its_entropy():
    choices = torch.tensor([0, 0, 1, 2])
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert information(choices, choices) == pytest.approx(entropy)
    assert information(choices, 3 - choices) == pytest.approx(entropy)  # other experts, same tokens


def test_independent_layers_share_no_more_than_the_control():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(EXPERTS, (2, 20_000), generator=generator)
    found, control = information(first, second), information(first, shuffle(second, 1))
    bias = (EXPERTS - 1) ** 2 / (2 * 20_000)  # the mean of both, which are chi-squared
    assert 0 < found < 3 * bias and 0 < control < 3 * bias
    assert information(first, shuffle(first, 1)) < 3 * bias < 0.01 * information(first, first)


def test_without_tokens_there_is_no_information():
    assert math.isnan(mutual_information(torch.zeros(2, 2)))


def loop_expert_information(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    edges = np.linspace(0, 1, 100)
    found = []
    for token in zip(first.numpy(), second.numpy(), strict=True):
        shares = [scores / max(scores.sum(), 1e-300) for scores in token]
        found.append(loop_information(*(np.digitize(s, edges).tolist() for s in shares)))
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (softmax_scores(0), softmax_scores(1)),
        (softmax_scores(0, 9.0), softmax_scores(1, 9.0)),
        (relu_gates(0), relu_gates(1)),
    ],
    ids=["flat", "sharp", "relu"],
)
def test_the_published_information_equals_the_loop(first, second):
    expected = loop_expert_information(first, second)
    assert expert_information(first, second).tolist() == pytest.approx(expected, abs=1e-9)


def test_the_published_information_is_of_flat_scores_not_of_related_layers():
    """Unrelated flat layers have more of it than a sharp layer has with itself."""
    flat = expert_information(softmax_scores(0, 0.5), softmax_scores(1, 0.5)).mean()
    sharp = expert_information(softmax_scores(0, 9.0), softmax_scores(0, 9.0)).mean()
    assert flat > 2 * sharp
    leading = [leading_expert(softmax_scores(seed, 0.5)) for seed in (0, 1)]
    assert information(*leading) < 0.1 < information(leading[0], leading[0])


def test_a_shuffle_is_an_order_of_the_same_tokens_which_the_seed_gives():
    scores = relu_gates(0)
    assert torch.equal(shuffle(scores, 3), shuffle(scores, 3))
    assert not torch.equal(shuffle(scores, 3), shuffle(scores, 4))
    assert sorted(shuffle(scores, 3).tolist()) == sorted(scores.tolist())


def measured(path, record):
    return routing.report(path, record, routing.balance(record, seed=1))


def gates_of(*layers: torch.Tensor) -> Trace:
    numbered = {2 * i + 1: layer_trace(g, g > 0, None) for i, g in enumerate(layers)}
    tokens = torch.arange(len(layers[0]))
    facts = Facts(
        model="a",
        iteration=None,
        model_class="ReMoEForCausalLM",
        router="relu",
        topk=TOPK,
        num_experts=layers[0].shape[1],
        flops_per_expert=0.0,
        flops_others=0.0,
        domains=("even", "odd"),
        data="tokens",
        sequence_length=1,
        sequences=len(tokens),
        seed=1,
    )
    return Trace(facts, tokens, torch.zeros(len(tokens)), tokens % 2, numbered, {})


def test_a_report_has_a_row_for_each_layer_and_one_for_the_tokens_of_all():
    first = torch.tensor([[4.0, 1, 1], [0, 0, 0], [0, 2, 0], [3, 0, 1]]).double()
    second = torch.tensor([[0.0, 5, 0], [1, 0, 0], [0, 5, 0], [0, 0, 0]]).double()
    found = measured(Path("a"), gates_of(first, second))
    assert (found.tokens, [row["layer"] for row in found.layers]) == (4, [1, 3])
    one, three = found.layers
    assert (one["active_experts"], one["two_active"]) == (1.5, 0.5)
    assert one["inner_balance"] == 3  # of 4 and 3, the lower of the two in the middle
    assert (one["outer_balance"], one["outer_balance_mean"]) == (1, pytest.approx(17 / 18))
    # leading experts 0, none, 1, 0 and 1, 0, 1, none
    assert one["information"] == pytest.approx(loop_information([0, 3, 1, 0], [1, 0, 1, 3]))
    assert three["inner_balance"] is None and three["information"] is None
    every = found.summary
    assert every["active_experts"] == 9 / 8 and every["two_active"] == 2 / 8
    assert every["inner_balance"] == 3 and every["information"] == one["information"]
    # active experts of the four tokens in both layers: 3 and 1, 0 and 1, 1 and 1, 2 and 0
    assert [every[f"active_frequency_{i}"] for i in (1, 2, 3, 4)] == [2, 0.5, 1, 1]
    assert (every["active_domain_even"], every["active_domain_odd"]) == (1.5, 0.75)


def test_classes_of_frequency_are_of_whole_ids_and_of_about_as_many_tokens():
    #                     once: 8; twice: 5, 6; three times: 1; four times: 9
    tokens = torch.tensor([9, 1, 5, 9, 6, 1, 8, 9, 5, 1, 6, 9])
    # occurrences before them, from the rarest: 0, 1 and 3, 5, 8
    classes = {8: 0, 5: 0, 6: 1, 1: 1, 9: 2}
    assert frequency_classes(tokens, 4).tolist() == [classes[i] for i in tokens.tolist()]
    assert frequency_classes(tokens, 1).tolist() == [0] * 12


def test_layers_that_route_nothing_have_no_balance():
    row = measured(Path("a"), gates_of(torch.zeros(4, 2))).summary
    assert row["active_experts"] == 0
    assert {key for key, value in row.items() if value is None} == {
        "inner_balance", "outer_balance", "outer_balance_mean", *routing._BETWEEN
    }  # fmt: skip


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path):
    runs = [topk(tmp_path, f"topk-{seed}", 2.0, seed=seed) for seed in (1, 2)]
    runs += [remoe(tmp_path, f"remoe-{n}", 2.0, seed=1, num_layers=n) for n in (2, 3)]
    other = tmp_path / "exported"
    groups = routing.group_models([other, *runs])
    assert groups == {
        "TopK": runs[:2],
        "ReMoE, 2 layers": [runs[2]],
        "ReMoE, 3 layers": [runs[3]],
        str(other): [other],
    }
    made = {path: gates_of(relu_gates(i), relu_gates(9)) for i, path in enumerate([*runs, other])}
    reports = [measured(path, record) for path, record in made.items()]
    rows = {row["run"]: row for row in routing.summarize(groups, reports)}
    values = [found.summary["inner_balance"] for found in reports[:2]]
    assert rows["TopK"]["seeds"] == 2
    assert rows["TopK"]["inner_balance"] == pytest.approx(sum(values) / 2)
    deviation = abs(values[0] - values[1]) / math.sqrt(2)
    assert rows["TopK"]["inner_balance_std"] == pytest.approx(deviation)
    assert rows[str(other)]["inner_balance"] == reports[4].summary["inner_balance"]
    assert rows[str(other)]["inner_balance_std"] is None
    text = routing.to_markdown(list(rows.values()))
    assert f"| {rows['TopK']['inner_balance']:.3f} ± {deviation:.3f} |" in text
    by_token = text.split("\n\n")[1].splitlines()
    assert by_token[0].startswith("| active experts | rarest quarter | 2 | 3 | most frequent")
    assert by_token[0].endswith("| even | odd |") and len(by_token) == 6
    mean = sum(found.summary["active_domain_odd"] for found in reports[:2]) / 2
    assert f"| {mean:.3f} ±" in by_token[2]
