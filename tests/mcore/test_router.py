"""The Megatron router on one rank: its penalty, its statistics, and when it counts."""

import math

import pytest
import torch

from megatron.remoe.ranks import Ranks
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


def passes_of_three_steps(fatal):
    """Coefficients of every pass and after every step; Megatron repeats the second step.

    Its rerun state machine does so when a result is rejected: here, or, where the rejection is
    fatal, again from a checkpoint of the step before.
    """
    from megatron.core import rerun_state_machine as rerun

    from megatron.remoe.train import step

    layer = moe_cases.build_layer(Layout(), 0.0)
    step.megatron_finalize_model_grads = lambda *args, **kwargs: None
    rerun.destroy_rerun_state_machine()
    rerun.initialize_rerun_state_machine(mode=rerun.RerunMode.VALIDATE_RESULTS)
    machine, hook = rerun.get_rerun_state_machine(), step.FinalizeStep()
    passes, after, sparsities = [], [], []
    for number in range(3):
        passes.append([])
        while machine.should_run_forward_backward(None):
            passes[-1].append(layer.router.l1_coeff.item())
            layer(moe_cases.inputs(0))
            machine.validate_result(
                torch.tensor(1.0), lambda _, bad=number == 1: bad, message="rejected", fatal=fatal
            )
            hook([layer])
            sparsities.append(hook.report.sparsity.item())
        after.append(layer.router.l1_coeff.item())
        if machine.should_checkpoint_and_exit()[1]:
            break
    rerun.destroy_rerun_state_machine()
    return passes, after, sparsities


def test_every_pass_of_a_repeated_step_has_its_coefficient(rank):
    passes, after, sparsities = rank(passes_of_three_steps, False)
    assert passes == [pytest.approx(p) for p in ([1e-8], [1.2e-8, 1.2e-8], [1.44e-8])]
    assert after == pytest.approx([1.2e-8, 1.44e-8, 1.728e-8])
    assert len(set(sparsities)) == 1 and sparsities[0] < 0.75


def test_a_step_that_will_be_repeated_from_a_checkpoint_leaves_the_coefficient(rank):
    passes, after, _ = rank(passes_of_three_steps, True)
    assert passes == [pytest.approx(p) for p in ([1e-8], [1.2e-8, 1.2e-8])]
    assert after == pytest.approx([1.2e-8, 1.2e-8])


def reports_of_two_steps():
    """Reports of a layer's first and second step, and of a new layer whose first it is."""
    from megatron.remoe.train import step

    step.megatron_finalize_model_grads = lambda *args, **kwargs: None
    reports = []
    for batches in ((0, 1), (1,)):
        layer, hook = moe_cases.build_layer(Layout(), 0.0), step.FinalizeStep()
        for batch in batches:
            x = moe_cases.inputs(batch)
            if batch == 0:  # a token for which every logit is 1
                x[0, 0] = torch.linalg.pinv(layer.router.weight.detach()).sum(dim=1)
            layer(x)
            hook([layer])
            reports.append(hook.report)
    return reports


def test_every_step_counts_afresh(rank):
    first, second, alone = rank(reports_of_two_steps)
    assert first.most_active_L[0] > alone.most_active_L[0]
    for name in ("sparsity", "tokens_L", "tokens_per_expert_LE", "most_active_L", "l1_reg_L"):
        assert torch.equal(getattr(second, name), getattr(alone, name)), name


def step_of(padded):
    """A step of two micro-batches, of which some are padding alone."""
    from megatron.remoe.train import step

    step.megatron_finalize_model_grads = lambda *args, **kwargs: None
    layer, hook = moe_cases.build_layer(Layout(), 0.0, COEFF), step.FinalizeStep()
    x = moe_cases.inputs(0)
    for all_of_it in padded:
        probs, _ = layer.router(x, torch.full(x.shape[:2], all_of_it))
        (probs * 0).sum().backward()
    hook([layer])
    return layer.router.weight.grad, layer.router.l1_coeff.item(), hook.report


def test_padding_alone_has_no_penalty_and_leaves_the_coefficient(rank):
    from remoe.statistics import routing_metrics

    grad, coeff, report = rank(step_of, (True, True))
    assert torch.equal(grad, torch.zeros_like(grad))
    assert coeff == COEFF
    row = routing_metrics(report)
    assert report.l1_reg_L.tolist() == [0] and row["l1_reg"] == 0
    assert math.isnan(row["sparsity"])  # null in the file: nothing was measured
    assert row["silent_layers"] == row["dense_layers"] == []
    assert all(math.isfinite(v) for k, v in row.items() if k.startswith(("expert_load", "dead")))


def test_a_micro_batch_of_padding_leaves_the_other_as_it_is(rank):
    grad, coeff, report = rank(step_of, (True, False))
    expected, expected_coeff, alone = rank(step_of, (False,))
    assert torch.equal(grad, expected) and expected.abs().max() > 0
    assert coeff == expected_coeff != COEFF
    assert report.sparsity == alone.sparsity
    assert report.l1_reg_L.tolist() == [alone.l1_reg_L.item() / 2]


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


def printed():
    return repr(moe_cases.build_layer(Layout(), 0.0).router)


def test_a_printed_router_shows_its_sizes(rank):
    assert rank(printed) == "SelectionRouter(ReLU routing, hidden_size=8, num_experts=4, topk=1)"
