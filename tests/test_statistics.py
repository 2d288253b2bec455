"""Routing statistics on a few tokens worked out by hand, and where sparsity settles."""

import math

import pytest
import torch

from remoe.statistics import (
    RoutingStatistics,
    StepReport,
    TokenCounts,
    busiest_rank_load,
    expert_ranks,
    settling_index,
)

TARGET = 0.875
# Three tokens and four experts; the second token activates no expert.
ROUTING = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
PADDING = torch.tensor([True, False, False])


@pytest.mark.parametrize(
    ("padding", "tokens", "per_expert"), [(None, 3, [2, 1, 1, 1]), (PADDING, 2, [1, 1, 0, 0])]
)
def test_tokens_are_counted_without_padding(padding, tokens, per_expert):
    counts = TokenCounts.of(ROUTING, padding)
    assert counts.flat.dtype == torch.int64
    assert counts.num_tokens.item() == tokens and counts.per_expert.tolist() == per_expert
    assert counts.sparsity.item() == pytest.approx(1 - sum(per_expert) / (4 * tokens))


def test_micro_batches_add_up_in_the_buffers_that_are_given():
    sums, most_active = torch.zeros(8, dtype=torch.float64), torch.tensor(0)
    statistics = RoutingStatistics(sums, most_active)
    local = statistics.add(ROUTING, num_ranks=2)
    statistics.add(ROUTING, PADDING, num_ranks=2)
    statistics.l1_reg.add_(0.5)
    states = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]])
    statistics.add_states(states, torch.tensor([False, False, True]))
    assert sums.tolist() == [0.5, 1, 5, 3, 2, 1, 1, 6] and most_active.item() == 3
    assert statistics.micro_batches.item() == 1 and statistics.counts.num_tokens.item() == 5
    local.flat.zero_()  # a buffer of its own, which may be reduced
    assert sums[2] == 5
    statistics.clear()
    assert sums.sum() == most_active == 0


def test_padding_does_not_set_the_largest_number_of_active_experts():
    statistics = RoutingStatistics.zeros(4, "cpu")
    statistics.add(ROUTING, PADDING)
    assert statistics.most_active.item() == 2
    assert (statistics.sums.dtype, statistics.most_active.dtype) == (torch.float64, torch.int64)


def test_a_report_is_of_the_layers_that_have_a_router():
    """Two micro-batches; the first layer has no router, and its coefficient does not count."""
    rows = [[0.0] * 6, [3, 2, 8, 4, 0, 4], [1, 2, 8, 16, 0, 16]]
    sums = torch.tensor(rows, dtype=torch.float64)
    statistics = RoutingStatistics(sums, torch.tensor([0.0, 1.0, 2.0]).double())
    level = {"level_L": torch.tensor([-math.inf, 0.25, 0.5]).double(), "level_name": "l1_coeff"}
    report = StepReport.of(statistics, topk=1, penalizes=True, **level)
    assert report.has_router.tolist() == [False, True, True]
    assert report.sparsity_L[1:].tolist() == [0.75, 0] and report.sparsity.item() == 0.375
    assert report.l1_reg_L[1:].tolist() == [1.5, 0.5] and report.l1_coeff.item() == 0.25
    assert report.l1_coeff.dtype == torch.float32 and report.most_active_L.tolist() == [0, 1, 2]
    assert StepReport.of(statistics, topk=1, **level, per_layer=True).level.item() == 0.375
    topk = StepReport.of(statistics, topk=1)
    assert topk.l1_reg_L is topk.l1_coeff is topk.state_norm_L is topk.observed_LE is None
    observed = torch.tensor([[0.0, 0, 0], [2, 3, 5], [0, 0, 0]])
    report = StepReport.of(statistics, topk=1, observed=observed).of_layers([2, 1])
    assert report.tokens_per_expert_LE.tolist() == [[16, 0], [4, 0]]
    assert report.observed_LE[1].tolist() == [1.5, 2.5] and report.observed_LE[0].isnan().all()
    recurrent = StepReport.of(statistics, topk=1, has_state=True)
    assert recurrent.state_norm_L[1:].tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("counts", "ranks", "load"),
    [
        ([[5, 5, 5, 5], [2, 2, 2, 2]], 4, 1.0),
        ([[8, 0, 0, 0]], 4, 4.0),
        ([[8, 0, 0, 0]], 2, 2.0),
        ([[8, 0, 8, 0]], 2, 1.0),  # neighbors are on one rank
        ([[8, 8, 0, 0]], 2, 2.0),
        ([[6, 6, 4, 0]], 2, 12 / 8),  # and their assignments add up
        # The ranks wait in every layer, in proportion to its load: (12 + 3) / (6 + 2).
        ([[12, 4, 4, 4], [1, 3, 2, 2]], 4, 15 / 8),
        ([[12, 4, 4, 4], [0, 0, 0, 0]], 4, 2.0),
        ([[0, 0, 0, 0]], 4, 1.0),
    ],
)
def test_all_ranks_wait_for_the_busiest(counts, ranks, load):
    assert busiest_rank_load(torch.tensor(counts), ranks) == pytest.approx(load)


def test_experts_are_split_evenly_over_at_most_eight_ranks():
    sizes = {8: 8, 64: 8, 4: 4, 12: 6, 7: 7, 11: 1, 1: 1}
    assert {experts: expert_ranks(experts) for experts in sizes} == sizes


def test_a_step_of_padding_alone_has_no_sparsity():
    sums = torch.tensor([[0.0, 2, 0, 0, 0, 0]], dtype=torch.float64)
    report = StepReport.of(RoutingStatistics(sums, torch.zeros(1)), topk=1)
    assert math.isnan(report.sparsity.item())


@pytest.mark.parametrize(
    ("sparsities", "index"),
    [
        ([], None),
        ([TARGET] * 19, None),
        ([TARGET] * 20, 0),
        ([0.5] * 7 + [TARGET + 0.0199] * 10 + [TARGET - 0.0199] * 10, 7),
        ([TARGET] * 19 + [TARGET + 0.021] + [TARGET] * 20, 20),  # one batch ends the first series
        ([0.5] * 3 + [TARGET] * 25 + [0.9] * 5, 3),  # later steps do not matter
    ],
)
def test_sparsity_settles_where_twenty_steps_near_the_target_begin(sparsities, index):
    assert settling_index(sparsities, TARGET) == index
