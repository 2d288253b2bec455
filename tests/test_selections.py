"""Selections: against loops in double precision, by hand, and their invariants."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from remoe.config import ROUTINGS, ControllerConfig, Routing
from remoe.controller import next_l1_coeff
from remoe.reference import (
    reference_expert_threshold,
    reference_l1,
    reference_null_experts,
    reference_relu_l2,
    reference_relu_rms,
    reference_top_p,
)
from remoe.regularization import balancing_weights, load_weights, router_regularization
from remoe.routing import relu_routing, sparsity, tokens_per_expert
from remoe.selections import (
    expert_threshold,
    hashed,
    null_experts,
    relu_l2,
    relu_rms,
    top_p,
)
from remoe.statistics import RoutingStatistics, StepReport

E = 5  # experts
SCALE = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.7], dtype=torch.float64)
THRESHOLDS = torch.tensor([0.3, -0.2, 1.0, 0.0, 5.0], dtype=torch.float64)
HASHES = ([7, 0, 3, 6, 1, 1], [3, 0, 1, 5, 0])
Routed = tuple[Tensor, Tensor]


@dataclass
class Case:
    """One selection of logits, its loops, and how many columns logits have."""

    select: Callable[..., Routed]
    loops: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()  # as many as experts, or one value
    columns: int = E


def p_half(logits: Tensor) -> Routed:
    return top_p.top_p_routing(logits, 0.5)


def two_of_ten(logits: Tensor) -> Routed:
    return null_experts.null_experts_routing(logits, num_experts=E, topk_of_all=4)


CASES = {
    "relu_rms": Case(
        relu_rms.relu_rms_routing,
        lambda z, scale: reference_relu_rms(z, scale, relu_rms.EPS),
        (SCALE,),
    ),
    "relu_l2": Case(
        relu_l2.relu_l2_routing,
        lambda z, scale: reference_relu_l2(z, scale, relu_l2.EPS),
        (SCALE[2:3],),
    ),
    "top_p": Case(p_half, lambda z: reference_top_p(z, 0.5)),
    "expert_threshold": Case(
        expert_threshold.expert_threshold_routing, reference_expert_threshold, (THRESHOLDS,)
    ),
    "null_experts": Case(two_of_ten, lambda z: reference_null_experts(z, E, 4), columns=10),
}
LEARNED = {"relu_rms", "relu_l2"}  # those whose tensors have a gradient


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def some_logits(case: Case, num_tokens: int = 12, seed: int = 1) -> Tensor:
    """Logits with tokens of few and of many positive ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, case.columns)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits + torch.linspace(-2, 2, num_tokens, dtype=torch.float64).unsqueeze(1)


def test_values_and_gradients_equal_those_of_loops(name):
    case = CASES[name]
    logits = some_logits(case)
    found = []
    for function in (lambda *a: case.select(*a)[0], case.loops):
        inputs = [x.clone().requires_grad_() for x in (logits, *case.tensors)]
        probs = function(*inputs)
        weights = torch.arange(probs.numel(), dtype=torch.float64).view_as(probs).cos()
        (probs * weights).sum().backward()
        found.append((probs, inputs[0].grad, *(x.grad for x in inputs[1:] if name in LEARNED)))
    for ours, loops in zip(*found, strict=True):
        torch.testing.assert_close(ours, loops, rtol=1e-12, atol=1e-12)
    probs, gradient = found[0][:2]
    assert probs.count_nonzero() not in (0, probs.numel())
    assert gradient.count_nonzero() > 0


def test_the_map_is_where_gates_are_and_nothing_flows_elsewhere(name):
    case = CASES[name]
    logits = some_logits(case).requires_grad_()
    probs, routing_map = case.select(logits, *case.tensors)
    assert routing_map.dtype == torch.bool
    assert torch.equal(probs != 0, routing_map)
    (gradient,) = torch.autograd.grad(probs[~routing_map].sum(), logits)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "logits", "active"),
    [
        ("relu_rms", [-1.0, -2, -3, -1, -1], 0),
        ("relu_rms", [-1.0, -2, -3, 4, -1], 1),
        ("relu_rms", [1.0, 2, 3, 4, 1], 5),
        ("relu_l2", [-1.0, -2, -3, -1, -1], 0),
        ("relu_l2", [-1.0, -2, -3, 4, -1], 1),
        ("relu_l2", [1.0, 2, 3, 4, 1], 5),
        ("top_p", [0.0, 9, 0, 0, 0], 1),
        ("top_p", [0.0, 0, 0, 0, 0], 3),
        ("expert_threshold", [-1.0, -2, -3, -1, -1], 0),
        ("expert_threshold", [-1.0, -2, -3, -1, 6], 1),
        ("expert_threshold", [1.0, 2, 3, 4, 9], 5),
        ("null_experts", [0.0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 0),
        ("null_experts", [2.0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 1),
        ("null_experts", [2.0, 2, 2, 2, 0, 1, 1, 1, 1, 1], 4),
    ],
)
def test_none_one_and_all_experts(name, logits, active):
    case = CASES[name]
    logits = torch.tensor([logits], dtype=torch.float64).requires_grad_()
    probs, routing_map = case.select(logits, *case.tensors)
    assert routing_map.sum() == active
    torch.testing.assert_close(probs, case.loops(logits, *case.tensors).nan_to_num())
    (gradient,) = torch.autograd.grad(probs.square().sum(), logits)
    assert gradient.isfinite().all()
    if active == 0:
        assert gradient.count_nonzero() == 0


def test_zero_logits_are_finite_and_so_is_their_gradient(name):
    case = CASES[name]
    logits = torch.zeros(3, case.columns, requires_grad=True)
    tensors = [t.float().requires_grad_() for t in case.tensors]
    probs, _ = case.select(logits, *tensors)
    assert probs.dtype == torch.float32
    assert probs.isfinite().all()
    probs.sum().backward()
    gradients = [logits.grad, *(t.grad for t in tensors if t.grad is not None)]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_tiny_and_huge_logits_are_finite(name, size):
    case = CASES[name]
    logits = (some_logits(case).float() * size).requires_grad_()
    probs, routing_map = case.select(logits, *(t.float() for t in case.tensors))
    probs.sum().backward()
    assert probs.isfinite().all()
    assert logits.grad.isfinite().all()
    assert routing_map.any()


def test_bf16_logits_give_fp32_gates_of_their_exact_values(name):
    case = CASES[name]
    logits = some_logits(case).bfloat16()
    tensors = [t.bfloat16() for t in case.tensors]
    probs, routing_map = case.select(logits, *tensors)
    wide, wide_map = case.select(logits.double(), *(t.double() for t in tensors))
    assert probs.dtype == torch.float32
    assert torch.equal(routing_map, wide_map)
    torch.testing.assert_close(probs, wide.float(), rtol=1e-6, atol=1e-6)


def test_permuted_tokens_and_experts_are_routed_alike(name):
    case = CASES[name]
    logits = some_logits(case)
    probs, routing_map = case.select(logits, *case.tensors)
    tokens = torch.randperm(len(logits), generator=torch.Generator().manual_seed(2))
    moved, moved_map = case.select(logits[tokens], *case.tensors)
    assert torch.equal(moved, probs[tokens])
    assert torch.equal(moved_map, routing_map[tokens])
    experts = torch.tensor([3, 0, 4, 1, 2])
    columns = torch.cat([experts, torch.arange(E, case.columns)])
    tensors = [t[experts] if len(t) == E else t for t in case.tensors]
    moved, moved_map = case.select(logits[:, columns], *tensors)
    torch.testing.assert_close(moved, probs[:, experts], rtol=1e-12, atol=1e-12)
    assert torch.equal(moved_map, routing_map[:, experts])


def test_a_token_alone_is_routed_as_among_others(name):
    """No selection here looks at other tokens, so that none can look ahead."""
    case = CASES[name]
    logits = some_logits(case)
    probs, _ = case.select(logits, *case.tensors)
    for t in range(len(logits)):
        alone, _ = case.select(logits[t : t + 1], *case.tensors)
        torch.testing.assert_close(alone[0], probs[t], rtol=1e-13, atol=0)


def test_the_same_logits_are_routed_the_same(name):
    case = CASES[name]
    logits = some_logits(case, num_tokens=64).float()
    logits[:, 1] = logits[:, 0]  # ties
    first, again = (case.select(logits, *case.tensors) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


# Gates do not depend on the length of the logits.


@pytest.mark.parametrize("name", ["relu_rms", "relu_l2"])
def test_normed_gates_do_not_depend_on_the_length_of_logits(name):
    case = CASES[name]
    logits = some_logits(case)
    probs, _ = case.select(logits, *case.tensors)
    longer, _ = case.select(1000 * logits, *case.tensors)
    torch.testing.assert_close(longer, probs, rtol=1e-4, atol=0)  # the constants below the norms


def test_rms_of_the_gates_is_one_and_norm_of_the_unit_gates_too():
    logits = torch.tensor([[3.0, -1.0, 4.0, -2.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    probs, _ = relu_rms.relu_rms_routing(logits, torch.ones(4))
    assert probs.square().mean(dim=1).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert probs[0].tolist() == pytest.approx([1.2, 0, 1.6, 0], rel=1e-5)  # by hand: RMS is 2.5
    probs, _ = relu_l2.relu_l2_routing(torch.tensor([[3.0, -4.0, 12.0]]), torch.tensor([2.0]))
    assert probs[0].tolist() == pytest.approx([6 / 13, 0, 24 / 13])


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (64, 8)])
def test_initial_scale_makes_the_first_k_gates_of_norm_one(experts, k):
    c = relu_l2.relu_l2_initial_scale(experts, k)
    logits = torch.randn(20_000, experts, generator=torch.Generator().manual_seed(5))
    probs, _ = relu_l2.relu_l2_routing(logits, torch.tensor([c]))
    assert probs.topk(k, dim=1).values.norm(dim=1).mean().item() == pytest.approx(1, rel=5e-3)
    with torch.device("meta"):
        assert relu_l2.relu_l2_initial_scale(experts, k) == c


# What the penalty of the normed ReLUs acts on.


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("name", ["relu_rms", "relu_l2"])
def test_the_penalty_reaches_the_target(name, topk):
    """A router that learns gates of a teacher ends near k experts, and keeps its scale.

    With a penalty on gates some scales fall to zero; with one on the normed gates of `relu_rms` the
    mean is half an expert above k = 1.
    """
    selects = {
        "relu_rms": (relu_rms.relu_rms_routing, relu_rms.relu_rms_penalized, 8),
        "relu_l2": (relu_l2.relu_l2_routing, relu_l2.relu_l2_penalized, 1),
    }
    select, penalized, size = selects[name]
    generator = torch.Generator().manual_seed(3)
    x, teacher, start = (torch.randn(n, 16, generator=generator) for n in (256, 8, 8))
    x[:, 0] = 2  # what all tokens share serves as a bias
    wanted = torch.relu(x @ teacher.T) / 4
    router = (start / 8).requires_grad_()
    scale = torch.ones(size, requires_grad=True)
    optimizer = torch.optim.Adam([router, scale], lr=0.01)
    rule = ControllerConfig(
        target_sparsity=1 - topk / 8, l1_coeff_init=1e-4, l1_coeff_multiplier=1.05
    )
    coeff = torch.tensor(rule.l1_coeff_init)
    actives = []
    for _ in range(600):
        logits = x @ router.T
        probs, routing_map = select(logits, scale)
        loss = (probs - wanted).square().sum(dim=1).mean()
        loss = loss + coeff * penalized(logits).sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        coeff = next_l1_coeff(coeff, sparsity(tokens_per_expert(routing_map), len(x)), rule)
        actives.append(routing_map.sum().item() / len(x))
    assert actives[0] > 3
    assert sum(actives[-100:]) / 100 == pytest.approx(topk, rel=0.1)
    assert scale.min() > 0.5


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_router_says_whether_it_starts_dense(name):
    """With the small logits of a new model, and the state that it starts with."""
    kind = ROUTINGS[name]
    if not issubclass(kind, Routing):
        assert not kind.starts_dense
        return
    selection = kind()
    shape = (1000, selection.num_logits(8))
    logits = 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    tensors = {**selection.parameters(8, 1), **selection.buffers(8, 1)}
    active = selection.select(logits, tensors, topk=1)[1].sum(dim=1).float().mean()
    assert active > 3 if kind.starts_dense else active < 1.2


# Top-p.


def test_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    for p, active in [(0.4, 1), (0.5001, 2), (0.79, 2), (0.9, 3), (0.96, 4), (1.0, 4)]:
        _, routing_map = top_p.top_p_routing(logits, p)
        assert routing_map.sum(dim=1).tolist() == [active, active], p
    probs, routing_map = top_p.top_p_routing(logits, torch.tensor(0.7))
    assert probs[0].tolist() == pytest.approx([0.5, 0.3, 0, 0])
    assert routing_map[1].tolist() == [False, False, True, True]


def test_the_start_of_p_activates_k_experts_if_the_softmax_is_nearly_uniform():
    logits = 0.01 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(4))
    for k in (1, 2, 5):
        p = top_p.probability(torch.tensor(top_p.odds_against(k / 8)))
        assert p.item() == pytest.approx(k / 8)
        _, routing_map = top_p.top_p_routing(logits, p)
        assert routing_map.sum(dim=1).float().mean().item() == pytest.approx(k, abs=0.05)


def test_more_odds_against_p_give_fewer_experts():
    """The controller multiplies the odds if a model is too dense, which must make it sparser."""
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(4))
    counts = [
        top_p.top_p_routing(logits, top_p.probability(torch.tensor(u)))[1].sum().item()
        for u in (0.01, 0.1, 1.0, 3.0, 1000.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)
    assert counts[-1] == 500  # one each, whatever p


def one_step(counts: list[int], observed: list[float] | None = None) -> StepReport:
    """What a step measures in one layer, of 4 experts and 10 tokens, with k = 1."""
    sums = torch.tensor([[0.0, 1, 10, *counts, 0]], dtype=torch.float64)
    found = None if observed is None else torch.tensor([[1.0, *observed]], dtype=torch.float64)
    statistics = RoutingStatistics(sums, torch.ones(1))
    return StepReport.of(statistics, topk=1, observed=found)


@pytest.mark.parametrize(
    ("counts", "start", "end"),
    [
        ([3, 2, 3, 2], 0.0, 2.0**-24),  # as sparse as it should be, which counts as too sparse
        ([9, 9, 9, 9], 0.0, 2.0**-24),
        ([9, 9, 9, 9], 1.0, 1.02),
        ([9, 9, 9, 9], 3e38, 2.0**24),
        ([9, 9, 9, 9], math.inf, 2.0**24),
    ],
)
def test_odds_never_reach_where_no_factor_moves_them(counts, start, end):
    selection = top_p.TopPRouting()
    moved = selection.moved({"odds": torch.tensor([start])}, one_step(counts))
    assert moved["odds"].item() == pytest.approx(end)


def test_the_bounds_of_the_odds_are_where_p_ends():
    assert top_p.probability(torch.tensor(top_p.LEAST_ODDS)) == 1.0
    assert 0 < top_p.probability(torch.tensor(top_p.MOST_ODDS)) < 1e-7
    assert top_p.TopPRouting().buffers(4, 4)["odds"] == 0  # k = E: the start is dense
    with pytest.raises(ValueError, match=r"top_p_init is 1.0; it must be a .* in \(0, 1\)"):
        top_p.TopPRouting(top_p_init=1.0)


# Expert thresholds.


@pytest.mark.parametrize("cutoff", [math.inf, -math.inf, math.nan])
def test_cutoffs_that_overflowed_do_not_move_thresholds(cutoff):
    selection = expert_threshold.ExpertThresholdRouting()
    state = {"thresholds": torch.tensor([[0.1, 0.2, 0.3, 0.4]]), "num_updates": torch.ones(1)}
    moved = selection.moved(state, one_step([1, 2, 3, 4], [1.0, cutoff, 1, 1]))
    assert torch.equal(moved["thresholds"], state["thresholds"]) and moved["num_updates"] == 1
    moved = selection.moved(state, one_step([1, 2, 3, 4], [1.0, 1, 1, 1]))
    assert (moved["thresholds"] > state["thresholds"]).all() and moved["num_updates"] == 2


def test_cutoffs_are_reached_by_a_share_of_k_of_e():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(6))
    cutoffs = expert_threshold.expert_cutoffs(logits, topk=2)
    assert (logits >= cutoffs).sum(dim=0).tolist() == [10] * 8
    assert all(cutoffs[e] in logits[:, e] for e in range(8))
    assert not expert_threshold.expert_cutoffs(logits.requires_grad_(), topk=2).requires_grad
    few = expert_threshold.expert_cutoffs(logits[:3], topk=2)  # less than one token per expert
    assert torch.equal(few, logits[:3].amax(dim=0))


def test_cutoffs_do_not_see_padding():
    logits = torch.randn(48, 8, generator=torch.Generator().manual_seed(6))
    padding = torch.arange(48) % 6 == 0
    logits[padding] += 100
    cutoffs = expert_threshold.expert_cutoffs(logits, topk=2, padding_mask_T=padding)
    assert torch.equal(cutoffs, expert_threshold.expert_cutoffs(logits[~padding], topk=2))
    nothing = expert_threshold.expert_cutoffs(logits, topk=2, padding_mask_T=padding | True)
    assert nothing.tolist() == [0] * 8


@pytest.mark.parametrize("as_tensor", [False, True])
def test_thresholds_are_the_published_average(as_tensor):
    """The published one starts at zero, and is divided by what its weights add up to."""
    cutoffs = torch.randn(7, 3, generator=torch.Generator().manual_seed(7))
    thresholds, raw = torch.full((3,), 123.0), torch.zeros(3)
    for n, cutoff in enumerate(cutoffs):
        thresholds = expert_threshold.next_thresholds(
            thresholds, cutoff, num_updates=torch.tensor(n) if as_tensor else n, decay=0.9
        )
        raw = 0.9 * raw + 0.1 * cutoff
        torch.testing.assert_close(thresholds, raw / (1 - 0.9 ** (n + 1)), rtol=1e-5, atol=1e-5)
        if n == 0:
            torch.testing.assert_close(thresholds, cutoff, rtol=1e-5, atol=1e-5)


# Hashes.


def test_hashes_are_fixed():
    """Checkpoints rely on them: they must not change between versions."""
    ids = torch.tensor([0, 1, 2, 3, 50_256, 2**31 + 7])
    _, one = hashed.hash_routing(ids, num_experts=8, topk=1)
    assert one.int().argmax(dim=1).tolist() == HASHES[0]
    _, one = hashed.hash_routing(ids.int() % 2**20, num_experts=8, topk=1, seed=3)
    _, same = hashed.hash_routing(ids % 2**20, num_experts=8, topk=1, seed=3)
    assert torch.equal(one, same)
    assert one[:5].int().argmax(dim=1).tolist() == HASHES[1]


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 3), (7, 2), (4, 4)])
def test_hashes_are_balanced_and_choose_k_different_experts(experts, k):
    ids = torch.arange(50_000)
    probs, routing_map = hashed.hash_routing(ids, num_experts=experts, topk=k)
    assert routing_map.sum(dim=1).unique().tolist() == [k]
    assert torch.equal(probs, routing_map.float() / k)
    expected, variance = len(ids) * k / experts, len(ids) * k / experts * (1 - k / experts)
    spread = (routing_map.sum(dim=0) - expected).abs().max().item()
    assert spread <= 4 * variance**0.5
    pairs = routing_map.float().T @ routing_map.float()  # no two experts go together
    together = len(ids) * k * (k - 1) / experts / (experts - 1)
    between = pairs[~torch.eye(experts, dtype=torch.bool)]
    assert (between - together).abs().max().item() <= 5 * together**0.5


def test_layers_of_different_seeds_hash_independently():
    ids = torch.arange(50_000)
    maps = [hashed.hash_routing(ids, num_experts=8, topk=1, seed=s)[1] for s in (0, 1, 2)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = (maps[a].T.float() @ maps[b].float()).flatten()
        assert (both - len(ids) / 64).abs().max().item() <= 5 * (len(ids) / 64) ** 0.5


# Null experts.


def test_null_experts_by_hand():
    logits = torch.tensor([[3.0, 1, 0, 2, -1, 0.5], [0, -1, -1, 5, 4, 3]], dtype=torch.float64)
    probs, routing_map = null_experts.null_experts_routing(logits, num_experts=3, topk_of_all=3)
    assert routing_map.tolist() == [[True, True, False], [False, False, False]]
    e = torch.tensor([3.0, 1.0], dtype=torch.float64).exp()
    assert probs[0].tolist() == pytest.approx([*(e / e.sum()).tolist(), 0])
    assert probs[1].tolist() == [0, 0, 0]


def test_number_of_choices_with_null_experts():
    choices = null_experts.null_experts_topk
    assert choices(num_experts=8, num_null_experts=8, topk=1) == 2
    assert choices(num_experts=8, num_null_experts=4, topk=2) == 3
    assert choices(num_experts=8, num_null_experts=24, topk=3) == 12
    with pytest.raises(ValueError, match=r"num_null_experts is 3, .*choose a multiple of 8"):
        choices(num_experts=8, num_null_experts=3, topk=1)
    with pytest.raises(ValueError, match="num_null_experts is 0; it must be at least 1"):
        choices(num_experts=8, num_null_experts=0, topk=1)


# Weights of the penalty.


@pytest.mark.parametrize(
    ("load_balancing", "power"), [("none", 0), ("aux_loss", 1), ("squared", 2)]
)
def test_weighted_penalties_equal_the_loops(load_balancing, power):
    logits = torch.randn(17, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    logits.requires_grad_()
    probs, routing_map = relu_routing(logits)
    counts = tokens_per_expert(routing_map)
    actual = router_regularization(
        probs.sum(dim=0),
        tokens_per_expert_E=counts,
        num_tokens=17,
        topk=2,
        load_balancing=load_balancing,
    )
    expected = reference_l1(probs, topk=2, load_balancing=True, power=power)
    torch.testing.assert_close(actual, expected)
    f = counts.double() * 6 / (2 * 17)
    (gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(gradient, routing_map * f**power / 17)


def test_the_penalty_of_a_step_is_weighted_by_the_load_of_the_step_before():
    probs, routing_map = relu_routing(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    counts = tokens_per_expert(routing_map)
    options = {"tokens_per_expert_E": counts, "num_tokens": 2, "topk": 1}
    last = load_weights(torch.tensor([30, 10]), num_tokens=40, topk=1)
    assert last.tolist() == [1.5, 0.5]
    sums = probs.sum(dim=0)
    actual = router_regularization(sums, load_balancing="global_batch", last_load_E=last, **options)
    assert actual.item() == pytest.approx((4 * 1.5 + 2 * 0.5) / 2)
    first = router_regularization(
        sums, load_balancing="global_batch", last_load_E=torch.ones(2), **options
    )
    assert first == router_regularization(sums, load_balancing="none", **options)
    with pytest.raises(ValueError, match="global_batch; give last_load_E"):
        balancing_weights("global_batch", counts, num_tokens=2, topk=1)
