"""The Megatron router on one rank: its penalty, its statistics, and when it counts."""


import pytest
import torch

from megatron.remoe.verify.ranks import Ranks
from remoe import l1_regularization, load_weights, relu_routing, tokens_per_expert
from tests.mcore import moe_cases
from tests.mcore.moe_cases import EXPERTS, HIDDEN, Layout

COEFF = 0.25


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield lambda function, *args: ranks.run(function, *args)[0]


def hand_penalty(weight, x, *, load_balancing, padding=None):
    """COEFF * L1 of the tokens that count, from the pure functions."""
    probs, routing_map = relu_routing(x.view(-1, HIDDEN) @ weight.T)
    if padding is not None:
        probs, routing_map = probs[~padding], routing_map[~padding]
    tokens = len(probs)
    f = load_weights(tokens_per_expert(routing_map), num_tokens=tokens, topk=1)
    f = f if load_balancing == "aux_loss" else None
    return COEFF * l1_regularization(probs, num_tokens=tokens, load_weights_E=f)


def penalty_gradients(load_balancing, with_padding):
    """Router weight gradients by the router and by hand; the outputs themselves carry none."""
    layer = moe_cases.build_layer(Layout(), 0.0, COEFF, load_balancing)
    x = moe_cases.inputs(0)
    padding = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 3 == 0
    padding = padding if with_padding else None
    probs, _ = layer.router(x, padding)
    (probs * 0).sum().backward()
    weight = moe_cases.weights(0.0)[0].requires_grad_()
    flat = None if padding is None else padding.view(-1)
    by_hand = hand_penalty(weight, x, load_balancing=load_balancing, padding=flat)
    (expected,) = torch.autograd.grad(by_hand, weight)
    return layer.router.weight.grad, expected, layer.router.stats, by_hand.item() / COEFF


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("load_balancing", ["aux_loss", "none"])
def test_penalty_and_its_gradient_are_those_of_the_equation(rank, load_balancing, with_padding):
    actual, expected, stats, l1_reg = rank(penalty_gradients, load_balancing, with_padding)
    assert expected.abs().max() > 0
    assert torch.allclose(actual, expected, rtol=1e-5)
    assert stats[0].item() == pytest.approx(l1_reg, rel=1e-6)
    assert stats[1:3].tolist() == [1, 10 if with_padding else 16]


def per_token_loss_scale():
    gradients = []
    for per_token in (False, True):
        layer = moe_cases.build_layer(Layout(), 0.0, COEFF, calculate_per_token_loss=per_token)
        probs, _ = layer.router(moe_cases.inputs(0))
        (probs * 0).sum().backward()
        gradients.append(layer.router.weight.grad)
    return gradients


def test_per_token_loss_scales_the_penalty_by_the_tokens_that_megatron_will_divide_by(rank):
    per_batch, per_token = rank(per_token_loss_scale)
    assert torch.allclose(per_token, per_batch * 16)


def stats_after(mode):
    """Statistics after one forward and, when training, backward."""
    changes = {}
    if mode == "recompute":
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layer = moe_cases.build_layer(Layout(), 0.0, **changes)
    x = moe_cases.inputs(0).requires_grad_()
    if mode == "evaluation":
        layer.eval()(x)
    elif mode == "no_grad":
        with torch.no_grad():
            layer(x)
    else:
        layer(x)[0].sum().backward()
    return layer.router.stats


def test_recompute_counts_once(rank):
    plain = rank(stats_after, "plain")
    assert plain[1:3].tolist() == [1, 16]
    assert torch.equal(rank(stats_after, "recompute"), plain)


@pytest.mark.parametrize("mode", ["evaluation", "no_grad"])
def test_forwards_without_training_are_not_counted(rank, mode):
    assert rank(stats_after, mode).sum() == 0


def cast_to_bfloat16():
    from megatron.core.transformer.module import Float16Module

    layer = moe_cases.build_layer(Layout(), 0.0, bf16=True, params_dtype=torch.bfloat16)
    router = layer.router
    router.l1_coeff.fill_(1.2345678e-5)
    before = router.l1_coeff.clone()
    Float16Module(layer.config, layer)
    probs, routing_map = router(moe_cases.inputs(0).bfloat16())
    logits = moe_cases.inputs(0).bfloat16().float() @ router.weight.float().T
    exact = torch.equal(routing_map, logits.view(-1, EXPERTS) > 0)
    return before, router.l1_coeff, router.stats.dtype, probs.dtype, exact


def test_bfloat16_keeps_the_coefficient_exact_and_routes_in_fp32(rank):
    before, after, stats_dtype, probs_dtype, routed_in_fp32 = rank(cast_to_bfloat16)
    assert torch.equal(before, after)
    assert after.dtype == torch.float32
    assert stats_dtype == torch.float64
    assert probs_dtype == torch.bfloat16
    assert routed_in_fp32


def update_twice():
    """FinalizeStep called twice in one iteration, as after a rerun, then in the next one."""
    from megatron.remoe import step

    layer = moe_cases.build_layer(Layout(), 0.0)
    calls, coeffs, sparsities = [], [], []
    hook = step.FinalizeStep(iter([0, 0, 1]).__next__)
    step.megatron_finalize_model_grads = lambda *args, **kwargs: calls.append(kwargs)
    for _ in range(3):
        layer(moe_cases.inputs(0))
        hook([layer])
        coeffs.append(layer.router.l1_coeff.item())
        sparsities.append(hook.report.sparsity.item())
    return len(calls), coeffs, sparsities


def test_a_rerun_iteration_moves_the_coefficient_once(rank):
    calls, coeffs, sparsities = rank(update_twice)
    assert calls == 3
    assert coeffs == pytest.approx([1.2e-8, 1.2e-8, 1.44e-8])
    assert sparsities[0] == sparsities[1] == sparsities[2] < 0.75


def routed_with_shortcuts():
    """Activity and output without shortcuts and with both bounds; then the gradients."""
    found = []
    for changes in ({}, {"max_active_experts": 2, "at_least_one_expert": True}):
        layer = moe_cases.build_layer(Layout(), 0.0, COEFF, routing_changes=changes)
        probs, routing_map = layer.router(moe_cases.inputs(0))
        (probs * torch.arange(1.0, 1 + EXPERTS)).sum().backward()
        found.append((probs.detach(), routing_map, layer.router.stats, layer.router.weight.grad))
    return found


def test_shortcuts_bound_what_is_routed_but_not_what_is_counted(rank):
    (probs, _, stats, grad), (bounded, routing_map, counted, bounded_grad) = rank(
        routed_with_shortcuts
    )
    active = routing_map.sum(dim=1)
    assert active.min() == 1 and active.max() == 2
    most = (probs > 0).sum(dim=1).max()
    assert most > 2 and (probs.amax(dim=1) == bounded.amax(dim=1))[probs.amax(dim=1) > 0].all()
    assert torch.equal(stats, counted)
    assert not torch.equal(grad, bounded_grad)


def build_with_flex():
    try:
        moe_cases.build_layer(Layout("flex"), 0.0)
    except ValueError as error:
        return str(error)


def test_flex_dispatcher_is_refused_where_the_layer_is_built_too(rank):
    assert "use alltoall or allgather" in rank(build_with_flex)
