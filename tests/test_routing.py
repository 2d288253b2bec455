"""Routing, regularizers and controller on a few tokens worked out by hand, and their invariants."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from remoe import (
    ControllerConfig,
    active_experts,
    apply_granularity,
    l1_regularization,
    load_weights,
    next_l1_coeff,
    relu_routing,
    sparsity,
    tokens_per_expert,
)
from remoe.controller import move_l1_coeff, register_l1_coeff
from remoe.reference import reference_l1, reference_sparsity
from remoe.routing import expert_choice_routing

# Three tokens, four experts; the second token activates nobody, the fourth expert gets nothing.
LOGITS = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, -1.0, -0.1, -3.0], [2.0, 3.0, -1.0, -1.0]])


def test_routing_by_hand():
    probs, routing_map = relu_routing(LOGITS)
    assert probs.tolist() == [[1, 0, 0.5, 0], [0, 0, 0, 0], [2, 3, 0, 0]]
    assert routing_map.tolist() == [
        [True, False, True, False],
        [False, False, False, False],
        [True, True, False, False],
    ]
    assert active_experts(routing_map).tolist() == [2, 0, 2]
    counts = tokens_per_expert(routing_map)
    assert counts.tolist() == [2, 1, 1, 0]
    assert sparsity(counts, 3).item() == pytest.approx(1 - 4 / 12)


def test_padding_is_not_counted():
    _, routing_map = relu_routing(LOGITS)
    padding = torch.tensor([False, False, True])
    assert tokens_per_expert(routing_map, padding).tolist() == [1, 0, 1, 0]


def test_routing_is_fp32_for_half_precision_logits_and_keeps_fp64():
    assert relu_routing(LOGITS.bfloat16())[0].dtype == torch.float32
    assert relu_routing(LOGITS.double())[0].dtype == torch.float64


def test_regularizers_by_hand():
    probs, routing_map = relu_routing(LOGITS)
    # Plain: (1 + 0.5 + 2 + 3) / 3 tokens.
    assert l1_regularization(probs, num_tokens=3).item() == pytest.approx(6.5 / 3)
    # f_e = E / (k T) * count = 4 / (1 * 3) * [2, 1, 1, 0]; L1 per expert is [3, 3, 0.5, 0].
    weights = load_weights(tokens_per_expert(routing_map), num_tokens=3, topk=1)
    assert weights.tolist() == pytest.approx([8 / 3, 4 / 3, 4 / 3, 0])
    expected = (3 * 8 / 3 + 3 * 4 / 3 + 0.5 * 4 / 3) / 3
    actual = l1_regularization(probs, num_tokens=3, load_weights_E=weights)
    assert actual.item() == pytest.approx(expected)


def test_gradient_of_the_regularizer_is_the_load_over_tokens_where_active():
    logits = LOGITS.clone().requires_grad_()
    probs, routing_map = relu_routing(logits)
    weights = load_weights(tokens_per_expert(routing_map), num_tokens=3, topk=1)
    l1_regularization(probs, num_tokens=3, load_weights_E=weights).backward()
    assert torch.allclose(logits.grad, routing_map * weights / 3)


@pytest.mark.parametrize("load_balancing", [True, False])
def test_regularizer_equals_the_reference(load_balancing):
    probs, routing_map = relu_routing(torch.randn(17, 6, dtype=torch.float64))
    weights = load_weights(tokens_per_expert(routing_map), num_tokens=17, topk=2)
    actual = l1_regularization(
        probs, num_tokens=17, load_weights_E=weights if load_balancing else None
    )
    expected = reference_l1(probs, topk=2, load_balancing=load_balancing)
    assert torch.allclose(actual, expected, rtol=1e-6)


def test_sparsity_equals_the_reference_over_layers():
    probs, routing_map = relu_routing(torch.randn(3 * 5, 4))
    counts = torch.stack([tokens_per_expert(layer) for layer in routing_map.view(3, 5, 4)])
    actual = sparsity(counts, torch.tensor([5, 5, 5])).mean().item()
    assert actual == pytest.approx(reference_sparsity(probs.view(3, 5, 4)))


@given(st.permutations(range(4)), st.integers(0, 2**31))
def test_routing_is_equivariant_to_permuting_experts(order, seed):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    probs, routing_map = relu_routing(logits)
    permuted, permuted_map = relu_routing(logits[:, order])
    assert torch.equal(permuted, probs[:, order])
    assert torch.equal(tokens_per_expert(permuted_map), tokens_per_expert(routing_map)[order])


@pytest.mark.parametrize("module", ["remoe.routing", "remoe.hf.modeling_remoe"])
@pytest.mark.parametrize(
    ("bounds", "active"),
    [
        ({"max_active": 1}, [[0], [], [1]]),
        ({"max_active": 9}, [[0, 2], [], [0, 1]]),
        ({"at_least_one": True}, [[0, 2], [2], [0, 1]]),
        ({"max_active": 1, "at_least_one": True}, [[0], [2], [1]]),
    ],
)
def test_bounded_routing_by_hand(module, bounds, active):
    bounded_routing = importlib.import_module(module).bounded_routing
    logits = LOGITS.clone().requires_grad_()
    gates, _ = relu_routing(logits)
    probs, routing_map = bounded_routing(logits, gates, **bounds)
    assert [row.nonzero().flatten().tolist() for row in routing_map] == active
    kept = routing_map & (gates > 0)
    assert torch.equal(probs[kept], gates[kept])
    if "at_least_one" in bounds:
        assert probs[1, 2] == torch.softmax(LOGITS[1], 0)[2]
    probs.sum().backward()
    assert (logits.grad[kept] != 0).all()
    assert bool((logits.grad[1] != 0).any()) == ("at_least_one" in bounds)


def test_experts_choose_their_tokens_by_hand():
    """Expert 0 takes the first two tokens and expert 1 the last two; token 1 has both."""
    logits = torch.log(torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]])).requires_grad_()
    probs, routing_map = expert_choice_routing(logits, tokens_per_expert=2)
    assert routing_map.tolist() == [[True, False], [True, True], [False, True]]
    assert torch.allclose(probs, torch.tensor([[0.75, 0], [0.5, 0.5], [0, 0.75]]))
    probs[0, 0].backward()
    # The softmax's gradient, also for the expert that the token did not get.
    assert torch.allclose(logits.grad[0], torch.tensor([0.1875, -0.1875]))
    two = torch.stack([logits, logits.flip(0)])
    assert torch.equal(expert_choice_routing(two, tokens_per_expert=2)[1][1], routing_map.flip(0))
    with pytest.raises(ValueError, match="tokens_per_expert is 4; choose it between 0 and the 3"):
        expert_choice_routing(logits, tokens_per_expert=4)


def test_balanced_routing_at_the_target_has_unit_load():
    counts = torch.tensor([4, 4, 4, 4])
    assert load_weights(counts, num_tokens=8, topk=2).tolist() == [1, 1, 1, 1]


CONFIG = ControllerConfig(target_sparsity=0.875, l1_coeff_init=1e-3, l1_coeff_multiplier=1.2)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(0.5, 1.2e-3), (0.9, 1e-3 / 1.2), (0.875, 1e-3 / 1.2)],
    ids=["too dense grows", "too sparse shrinks", "equality divides"],
)
def test_controller_by_hand(measured, expected):
    module = with_coefficient()
    move_l1_coeff([module.l1_coeff], torch.tensor(measured), CONFIG)
    assert module.l1_coeff.item() == pytest.approx(expected, rel=1e-6)


def with_coefficient(config=CONFIG):
    module = nn.Module()
    register_l1_coeff(module, config, None)
    return module


def test_controller_holds_where_nothing_was_measured():
    """A step of padding alone has no sparsity; the coefficient neither moves nor becomes NaN."""
    moved = next_l1_coeff(torch.full((2,), 1e-3), torch.tensor([float("nan"), 0.5]), CONFIG)
    assert moved.tolist() == pytest.approx([1e-3, 1.2e-3])
    module = with_coefficient()
    move_l1_coeff([module.l1_coeff], torch.tensor(float("nan")), CONFIG)
    assert module.l1_coeff.item() == pytest.approx(1e-3)


def test_controller_moves_each_layer_by_itself():
    moved = next_l1_coeff(torch.full((2,), 1e-3), torch.tensor([0.5, 0.9]), CONFIG)
    assert moved.tolist() == pytest.approx([1.2e-3, 1e-3 / 1.2])


def test_controller_stays_within_bounds():
    config = ControllerConfig(target_sparsity=0.5, l1_coeff_init=1e-3, floor=9e-4, ceiling=1.1e-3)
    coeff = with_coefficient(config).l1_coeff
    move_l1_coeff([coeff], torch.tensor(0.0), config)
    assert coeff.item() == pytest.approx(1.1e-3)
    for _ in range(3):
        move_l1_coeff([coeff], torch.tensor(1.0), config)
    assert coeff.item() == pytest.approx(9e-4)


def test_controller_comes_back_from_the_smallest_coefficient():
    config = ControllerConfig(target_sparsity=0.5, l1_coeff_init=1e-3, l1_coeff_multiplier=1.2)
    coeff = with_coefficient(config).l1_coeff
    for _ in range(700):  # 1e-59 without a floor, which fp32 would not leave again
        move_l1_coeff([coeff], torch.tensor(1.0), config)
    assert coeff.item() == torch.finfo(torch.float32).tiny
    for _ in range(500):
        move_l1_coeff([coeff], torch.tensor(0.0), config)
    assert coeff.item() > 1


def test_controller_resumes_exactly():
    first, second = with_coefficient(), with_coefficient()
    for step in range(7):
        move_l1_coeff([first.l1_coeff], torch.tensor(0.5 + 0.1 * step), CONFIG)
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ["l1_coeff"]
    for module in (first, second):
        move_l1_coeff([module.l1_coeff], torch.tensor(0.1), CONFIG)
    assert torch.equal(first.l1_coeff, second.l1_coeff)


def test_modules_move_together():
    modules, alone = [with_coefficient() for _ in range(2)], torch.tensor(1e-3)
    for measured in (0.4, 0.8, 0.9):
        move_l1_coeff([m.l1_coeff for m in modules], torch.tensor(measured), CONFIG)
        alone = next_l1_coeff(alone, torch.tensor(measured), CONFIG)
        for module in modules:
            assert module.l1_coeff.item() == alone.item()


def test_published_defaults_reach_5_in_110_steps():
    config = ControllerConfig(target_sparsity=0.875)
    coeff = torch.tensor(config.l1_coeff_init)
    for _ in range(110):
        coeff = next_l1_coeff(coeff, torch.tensor(0.0), config)
    assert coeff.item() == pytest.approx(1e-8 * 1.2**110, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity is 1.0"),
        ({"l1_coeff_init": 0.0}, "l1_coeff_init is 0.0"),
        ({"l1_coeff_multiplier": 1.0}, "multiplier is 1.0"),
        ({"floor": 1.0}, "outside its bounds"),
        ({"l1_coeff_init": float("inf")}, "l1_coeff_init is inf"),
        ({"l1_coeff_init": float("nan")}, "l1_coeff_init is nan"),
        ({"l1_coeff_multiplier": float("inf")}, "multiplier is inf"),
        ({"l1_coeff_multiplier": float("nan")}, "multiplier is nan"),
    ],
)
def test_controller_config_names_the_bad_value(change, names):
    with pytest.raises(ValueError, match=names):
        ControllerConfig(**({"target_sparsity": 0.5} | change))


def test_granularity_by_hand():
    shape = apply_granularity(num_experts=8, topk=1, ffn_hidden_size=256, granularity=4)
    assert (shape.num_experts, shape.topk, shape.ffn_hidden_size) == (32, 4, 64)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"granularity": 0}, "granularity is 0"),
        ({"granularity": 3}, "granularity 3 does not divide the expert width 256"),
        ({"topk": 9}, "topk is 9 of 8"),
        ({"topk": 9, "granularity": 2}, "topk is 18 of 16"),
        ({"topk": 0}, "topk is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
    ],
)
def test_granularity_names_the_bad_value(change, names):
    base = {"num_experts": 8, "topk": 1, "ffn_hidden_size": 256, "granularity": 1}
    with pytest.raises(ValueError, match=names):
        apply_granularity(**(base | change))
