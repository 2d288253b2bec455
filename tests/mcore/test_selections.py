"""Every router of the family as a Megatron module: against loops, and what it counts and keeps.

The functions themselves are tested in `tests/test_selections.py`, whole runs of every router by
`remoe verify`.
"""

from typing import get_args

import pytest
import torch

from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.cell import RouterKind
from remoe.config import ROUTINGS, L1Routing, Selection
from remoe.reference import (
    reference_expert_threshold,
    reference_l1,
    reference_moe,
    reference_null_experts,
    reference_relu_l2,
    reference_relu_rms,
    reference_top_p,
)
from remoe.selections import hashed, relu_l2, relu_rms
from tests.mcore import moe_cases
from tests.mcore.moe_cases import BATCH, EXPERTS, HIDDEN, SEQUENCE, Layout

SELECTIONS = [name for name, routing in ROUTINGS.items() if issubclass(routing, Selection)]
PENALIZED = [name for name in SELECTIONS if issubclass(ROUTINGS[name], L1Routing)]
COEFF = 0.25
TOKENS = SEQUENCE * BATCH


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield lambda function, *args, **kwargs: ranks.run(function, *args, **kwargs)[0]


def scale_of(name):
    values = torch.tensor([0.5, 1.5, 0.7, 2.0])
    return values if name == "relu_rms" else values[:1]


def token_ids(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(50, (BATCH, SEQUENCE), generator=generator)


def router_weight(name):
    rows = ROUTINGS[name]().num_logits(EXPERTS)
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3))


def reference_topk(logits):
    """The softmax of the largest logit, `[T, E]`."""
    rows = []
    for z in logits:
        first = max(range(len(z)), key=lambda e, z=z: float(z[e]))
        total = sum(torch.exp(value) for value in z)
        rows.append(torch.stack([torch.exp(z[e]) / total * (e == first) for e in range(len(z))]))
    return torch.stack(rows)


def reference_expert_choice(logits):
    """The softmax over experts where an expert takes its T / E first tokens, `[T, E]`."""
    softmax = torch.stack([torch.exp(z) / torch.exp(z).sum() for z in logits])
    chosen = torch.zeros(logits.shape)
    for e in range(logits.shape[1]):
        ranked = sorted(range(len(logits)), key=lambda t, e=e: -float(softmax[t, e]))
        for t in ranked[: len(logits) // logits.shape[1]]:
            chosen[t, e] = 1
    return softmax * chosen


# Gates `[T, E]` of logits `[T, E]` and the scale of normed gates.
LOOPS = {
    "relu": lambda logits, scale: torch.stack([z.clamp(min=0) for z in logits]),
    "relu_rms": lambda logits, scale: reference_relu_rms(logits, scale, relu_rms.EPS),
    "relu_l2": lambda logits, scale: reference_relu_l2(logits, scale, relu_l2.EPS),
    "topk": lambda logits, scale: reference_topk(logits),
    "null_experts": lambda logits, scale: reference_null_experts(logits, EXPERTS, 2),
    "top_p": lambda logits, scale: reference_top_p(logits, 1 / EXPERTS),
    "expert_threshold": lambda logits, scale: reference_expert_threshold(
        logits, torch.zeros(EXPERTS)
    ),
}


def routed_by_loops(name, x, weight, scale, rank):
    """Gates of the tokens `[s, b, H]`, `[T, E]`, in loops."""
    if name == "hash":
        ids = token_ids(rank).T.reshape(-1)
        return hashed.hash_routing(ids, num_experts=EXPERTS, topk=1, seed=1)[0]
    if name == "expert_choice":
        sequences = [reference_expert_choice(x[:, b] @ weight.T) for b in range(BATCH)]
        return torch.stack(sequences, dim=1).flatten(end_dim=1)
    return LOOPS[name](x.reshape(-1, HIDDEN) @ weight.T, scale)


def build(name, layout=None, *, settings=None, **changes):
    """A layer with known weights, in training mode."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.moe.spec import block_spec

    layout = layout or Layout()
    moe_cases.initialize(layout)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    config = moe_cases.transformer_config(layout, **changes)
    if issubclass(ROUTINGS[name], L1Routing):
        settings = {"l1_coeff_init": 1e-30} | (settings or {})
    routing = ROUTINGS[name](**(settings or {}))
    spec = block_spec(config, routing, bidirectional=not routing.causal).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    _, fc1, fc2 = moe_cases.weights(0.0)
    with torch.no_grad():
        if layer.router.weight is not None:
            layer.router.weight.copy_(router_weight(name)[: len(layer.router.weight)])
        if name in ("relu_rms", "relu_l2"):
            layer.router.gate_scale.copy_(scale_of(name))
        for index, (ours1, ours2) in moe_cases.local_experts(layer):
            ours1.copy_(fc1[index])
            ours2.copy_(fc2[index])
    if name == "hash":
        layer.router.token_ids = token_ids(torch.distributed.get_rank())
    return layer.train()


def outcome(name, layout):
    """What a rank computes: its output, and gradients, those of weights summed over ranks."""
    layer, rank = build(name, layout), torch.distributed.get_rank()
    x = moe_cases.inputs(rank).requires_grad_()
    output, _ = layer(x)
    (output * moe_cases.direction(rank)).sum().backward()
    names = [n for n, p in layer.router.named_parameters() if p is not None]
    grads = {n: layer.router.get_parameter(n).grad for n in names}
    fc1 = torch.zeros_like(moe_cases.weights(0.0)[1])
    for index, (grad, _) in moe_cases.local_experts(layer, lambda weight: weight.grad):
        fc1[index] += grad
    grads["fc1"] = fc1
    for grad in grads.values():
        torch.distributed.all_reduce(grad)
    return output.detach(), x.grad, grads, layer.router.stats.clone()


def expected(name):
    """The same in loops, of both ranks."""
    weight, scale = router_weight(name).requires_grad_(), scale_of(name).requires_grad_()
    _, fc1, fc2 = moe_cases.weights(0.0)
    fc1.requires_grad_()
    tokens, outputs, active, loss = [], [], [], torch.zeros(())
    for rank in range(2):
        x = moe_cases.inputs(rank).requires_grad_()
        probs = routed_by_loops(name, x, weight, scale, rank)
        y = reference_moe(x.view(-1, HIDDEN), probs, fc1, fc2).view_as(x)
        loss = loss + (y * moe_cases.direction(rank)).sum()
        tokens.append(x)
        outputs.append(y.detach())
        active.append(probs > 0)
    found = torch.autograd.grad(
        loss, [*tokens, weight, scale, fc1], allow_unused=True, materialize_grads=True
    )
    grads = {"weight": found[2], "gate_scale": found[3], "fc1": found[4]}
    return outputs, found[:2], grads, active


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_layer_on_two_ranks_equals_the_loops(ranks, name, dispatcher):
    compare(ranks.run(outcome, name, Layout(dispatcher, ep=2)), name)


def compare(outcomes, name):
    """Compare what two ranks computed with the loops."""
    outputs, grads_input, grads, active = expected(name)
    for rank, found in enumerate(outcomes):
        output, grad_input, parameters, stats = found
        close(output, outputs[rank])
        close(grad_input, grads_input[rank])
        assert ("weight" in parameters) == (name != "hash")
        assert ("gate_scale" in parameters) == (name in ("relu_rms", "relu_l2"))
        for key, grad in parameters.items():
            close(grad, grads[key])
        assert stats[1:3].tolist() == [1, TOKENS]
        assert stats[3:-1].tolist() == active[rank].sum(dim=0).tolist()
        assert 0 < stats[3:-1].sum() < TOKENS * EXPERTS


def close(a, b):
    # fp32 sums in another order
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max()))


def test_verify_knows_every_router():
    assert {*get_args(RouterKind)} == {*ROUTINGS, "dense"}


@pytest.mark.parametrize("balancing", ["none", "aux_loss", "squared", "global_batch"])
@pytest.mark.parametrize("name", PENALIZED)
def test_penalty_and_its_gradient_are_those_of_the_loops(rank, name, balancing):
    weight = router_weight(name).requires_grad_()
    logits = moe_cases.inputs(0).view(-1, HIDDEN) @ weight.T
    gates = torch.stack([z.clamp(min=0) for z in logits])
    if name == "relu_l2":
        gates = torch.stack([z.clamp(min=0) / z.norm() for z in logits])
    power = {"none": 0, "aux_loss": 1, "squared": 2, "global_batch": 0}[balancing]
    # In the first step, the load of the step before counts as ones.
    l1 = reference_l1(gates, topk=1, load_balancing=power > 0, power=power)
    (by_hand,) = torch.autograd.grad(COEFF * l1, weight)
    grad, scale_grad, stats = rank(penalty_alone, name, balancing)
    close(grad, by_hand)
    assert by_hand.abs().max() > 0 and stats[0].item() == pytest.approx(l1.item(), rel=1e-5)
    assert scale_grad is None or not scale_grad.any()


def penalty_alone(name, balancing):
    """Gradients of a router whose gates have none."""
    layer = build(name, settings={"l1_coeff_init": COEFF, "load_balancing": balancing})
    probs, _ = layer.router(moe_cases.inputs(0))
    (probs * 0).sum().backward()
    scale = getattr(layer.router, "gate_scale", None)
    return layer.router.weight.grad, None if scale is None else scale.grad, layer.router.stats


def steps_of(name, batches, settings=None, layout=None, **changes):
    """State before and after every step, and the report of it; a batch is micro-batches.

    A micro-batch is a seed, or None for padding alone.
    """
    from megatron.remoe.train import step

    step.megatron_finalize_model_grads = lambda *args, **kwargs: None
    layer, hook = build(name, layout, settings=settings, **changes), step.FinalizeStep()
    states, reports = [], []

    def keep():
        states.append({key: value.clone() for key, value in layer.router.state.items()})

    keep()
    for batch in batches:
        for seed in batch:
            x = moe_cases.inputs(torch.distributed.get_rank(), seed or 0)
            padding = torch.ones(BATCH, SEQUENCE, dtype=torch.bool) if seed is None else None
            output, _ = layer(x, padding_mask=padding)
            output.sum().backward()
        hook([layer])
        keep()
        reports.append(hook.report)
    return states, reports


def logits_of(name, seed=0, rank=0):
    return moe_cases.inputs(rank, seed).view(-1, HIDDEN) @ router_weight(name).T


def test_thresholds_are_averages_of_the_cutoffs_of_steps(rank):
    decay = 0.9
    states, reports = rank(
        steps_of,
        "expert_threshold",
        [(1, 2), (3, None), (None,)],
        {"expert_threshold_decay": decay},
    )
    # The logits that 4 = k T / E tokens reach.
    logits = {seed: logits_of("expert_threshold", seed) for seed in (1, 2, 3)}
    cutoffs = {seed: values.sort(dim=0).values[-4] for seed, values in logits.items()}
    first = (cutoffs[1] + cutoffs[2]) / 2
    close(states[1]["thresholds"], first)
    # A mean in which the second step has a weight of 1 and the first of `decay`.
    second = (decay * first + cutoffs[3]) / (1 + decay)
    close(states[2]["thresholds"], second)
    assert torch.equal(states[3]["thresholds"], states[2]["thresholds"])
    assert [state["num_updates"].item() for state in states] == [0, 1, 2, 2]
    assert reports[1].level.item() == pytest.approx(first.mean().item(), rel=1e-5)
    assert reports[1].level_name == "expert_threshold"


def test_thresholds_of_two_ranks_are_those_of_all_tokens(ranks):
    """Data-parallel ranks have micro-batches of their own."""
    found = ranks.run(steps_of, "expert_threshold", [(1,)])
    cutoffs = [logits_of("expert_threshold", 1, rank).sort(dim=0).values[-4] for rank in range(2)]
    for states, _ in found:
        close(states[1]["thresholds"], (cutoffs[0] + cutoffs[1]) / 2)


def test_thresholds_of_ranks_that_share_a_sequence_are_those_of_the_sequence(ranks):
    layout = Layout(tp=2, ep=2)
    both = torch.cat([logits_of("expert_threshold", 1, rank) for rank in range(2)])
    for states, reports in ranks.run(steps_of, "expert_threshold", [(1,)], None, layout):
        close(states[1]["thresholds"], both.sort(dim=0).values[-8])
        assert reports[0].tokens_L.tolist() == [2 * TOKENS]


def test_top_p_falls_while_it_is_too_dense_and_rises_while_it_is_too_sparse(rank):
    for init, sign in ((0.9, -1), (0.05, 1)):
        settings = {"top_p_init": init, "top_p_multiplier": 1.1}
        states, reports = rank(steps_of, "top_p", [(1,), (None,)], settings)
        odds = [state["odds"].item() for state in states]
        assert odds[0] == pytest.approx((1 - init) / init)
        if sign > 0:  # one expert is active, the fewest: exactly k, where it rises
            assert reports[0].sparsity == 0.75
        assert odds[1] == pytest.approx(odds[0] * 1.1**-sign, rel=1e-6)
        assert odds[2] == odds[1]  # nothing was measured
        assert reports[0].level.item() == pytest.approx(init)


def test_the_load_of_a_step_weights_the_penalty_of_the_next(rank):
    settings = {"load_balancing": "global_batch"}
    states, reports = rank(steps_of, "relu", [(1, 2), (3,), (None,)], settings)
    counts = sum((logits_of("relu", seed) > 0).sum(dim=0) for seed in (1, 2))
    load = counts * EXPERTS / (2 * TOKENS)
    assert torch.equal(states[0]["load"], torch.ones(EXPERTS))
    close(states[1]["load"], load)
    gates = logits_of("relu", 3).clamp(min=0)
    l1 = (gates * load).sum() / TOKENS
    assert reports[1].l1_reg_L.item() == pytest.approx(l1.item(), rel=1e-5)
    assert torch.equal(states[3]["load"], states[2]["load"])
    assert states[0].keys() == {"l1_coeff", "load"}


def coefficients_of_layers(per_layer):
    """Coefficients of two layers before and after a step; the first is dense, the other silent."""
    from megatron.remoe.train import step
    from remoe.statistics import routing_metrics

    step.megatron_finalize_model_grads = lambda *args, **kwargs: None
    settings = {"l1_coeff_init": COEFF, "l1_coeff_per_layer": per_layer}
    layers = [build("relu", settings=settings, num_layers=2) for _ in range(2)]
    for number, layer in enumerate(layers, start=1):
        layer.router.layer_number = number
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:, 0] = 1.0 if number == 1 else -1.0
        layer(moe_cases.inputs(0).abs())
    hook = step.FinalizeStep()
    hook(layers)
    return [layer.router.l1_coeff.item() for layer in layers], routing_metrics(hook.report)


def test_every_layer_may_have_a_coefficient_of_its_own(rank):
    common, row = rank(coefficients_of_layers, False)
    assert common == [pytest.approx(COEFF * 1.2)] * 2  # the mean of 0 and 1 is below 3/4
    assert row["l1_coeff"] == COEFF and "l1_coeff_per_layer" not in row
    own, row = rank(coefficients_of_layers, True)
    assert own == pytest.approx([COEFF * 1.2, COEFF / 1.2])
    assert row["l1_coeff"] == COEFF and row["l1_coeff_per_layer"] == [COEFF, COEFF]


def facts_of(name):
    """Names in a checkpoint; what recompute and bf16 do to counters, state and routing."""
    from megatron.core.transformer.module import Float16Module

    names = {key.removeprefix("router.") for key in build(name).router.sharded_state_dict()}
    stats = []
    for changes in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}):
        layer = build(name, **changes)
        layer(moe_cases.inputs(0).requires_grad_())[0].sum().backward()
        stats.append(layer.router.stats.clone())
        if layer.router.selection.observes:
            stats[-1] = torch.cat([stats[-1], layer.router.observed])
    layer = build(name, bf16=True, params_dtype=torch.bfloat16)
    for value in layer.router.state.values():
        value.fill_(0.12345678)
    before = {key: value.clone() for key, value in layer.router.state.items()}
    Float16Module(layer.config, layer)
    after = layer.router.state
    exact = all(torch.equal(before[key], after[key]) for key in before)
    return names, stats, exact, layer.router(moe_cases.inputs(0).bfloat16())[0].dtype


NAMES = {
    "relu": {"weight", "l1_coeff"},
    "relu_rms": {"weight", "l1_coeff", "gate_scale"},
    "relu_l2": {"weight", "l1_coeff", "gate_scale"},
    "topk": {"weight"},
    "null_experts": {"weight"},
    "top_p": {"weight", "odds"},
    "expert_threshold": {"weight", "thresholds", "num_updates"},
    "hash": set(),
    "expert_choice": {"weight"},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_state_is_saved_exact_in_bf16_and_counted_once_under_recompute(rank, name):
    names, (plain, again), exact, dtype = rank(facts_of, name)
    assert names == NAMES[name]
    assert torch.equal(plain, again) and plain[1] == 1
    assert exact and dtype == torch.bfloat16


def null_router():
    """Gates, map, and the gradient of the auxiliary loss alone."""
    layer = build(
        "null_experts", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=COEFF
    )
    x = moe_cases.inputs(0)
    probs, routing_map = layer.router(x)
    (probs * 0).sum().backward()
    return probs.detach(), routing_map, layer.router.weight.grad


def test_null_experts_share_the_auxiliary_loss_of_megatron(rank):
    probs, routing_map, grad = rank(null_router)
    weight = router_weight("null_experts").requires_grad_()
    logits = moe_cases.inputs(0).view(-1, HIDDEN) @ weight.T
    close(probs, reference_null_experts(logits, EXPERTS, 2).detach())
    assert torch.equal(probs > 0, routing_map) and len(set(routing_map.sum(dim=1).tolist())) > 1
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2, dim=1).indices, 1.0)
    share = chosen.mean(dim=0) / 2
    loss = 2 * EXPERTS * (share * torch.softmax(logits, dim=1).mean(dim=0)).sum()
    (by_hand,) = torch.autograd.grad(COEFF * loss, weight)
    close(grad, by_hand)
    assert by_hand[EXPERTS:].abs().max() > 0  # those of null experts


def router_of_few_null_experts():
    """Number of choices and logits, and gates and map, of 4 experts, 2 null experts and k = 2."""
    layer = build("null_experts", settings={"num_null_experts": 2}, moe_router_topk=2)
    with torch.no_grad():
        probs, routing_map = layer.router(moe_cases.inputs(0))
    return layer.router.topk, layer.router.weight, probs, routing_map


def test_there_may_be_fewer_null_experts_than_experts(rank):
    topk, weight, probs, routing_map = rank(router_of_few_null_experts)
    assert topk == 3 and len(weight) == EXPERTS + 2
    logits = moe_cases.inputs(0).view(-1, HIDDEN) @ weight.T
    close(probs, reference_null_experts(logits, EXPERTS, 3).detach())
    assert torch.equal(probs > 0, routing_map)


def hash_without_ids():
    layer = build("hash")
    said = []
    for ids in (None, token_ids(0)[:, 1:]):
        layer.router.token_ids = ids
        try:
            layer(moe_cases.inputs(0))
        except ValueError as error:
            said.append(str(error))
    return said


def test_hash_routing_refuses_tokens_whose_ids_it_does_not_know(rank):
    unknown, others = rank(hash_without_ids)
    assert unknown.startswith("hash routing does not know the ids of the tokens; pass input_ids")
    assert others.startswith(f"hash routing has ids of {(SEQUENCE - 1, BATCH)} tokens, and is give")


def kept_ids():
    """The ids that a router has after calls of its model in several ways."""
    from megatron.remoe.moe.hash_router import keep_token_ids

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build("hash")

        def forward(self, input_ids=None, decoder_input=None):
            return self.layer.router.token_ids

    (model,) = keep_token_ids([Model()])
    ids, hidden = token_ids(0), moe_cases.inputs(0)
    kept = [model(ids), model(input_ids=ids), model(None, hidden), model(ids, hidden)]
    return [*kept, model(decoder_input=hidden)]


def test_the_ids_are_those_of_the_call_however_they_are_passed(rank):
    by_place, by_name, none, beside, left_out = rank(kept_ids)
    assert none is left_out is None  # and not those of the call before
    for found in (by_place, by_name, beside):
        assert torch.equal(found, token_ids(0))


def expert_choice_with_padding(padding):
    layer = build("expert_choice")
    probs, routing_map = layer.router(moe_cases.inputs(0), padding)
    return probs.detach().view(SEQUENCE, BATCH, -1), routing_map.view(SEQUENCE, BATCH, -1)


def test_experts_choose_in_every_sequence_and_no_padding(rank):
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    padding[3:, 1] = True
    probs, routing_map = rank(expert_choice_with_padding, padding)
    assert routing_map.sum(dim=0).tolist() == [[SEQUENCE // EXPERTS] * EXPERTS] * BATCH
    assert not routing_map[padding].any() and not probs[padding].any()
    padding[1:, 1] = True
    _, routing_map = rank(expert_choice_with_padding, padding)
    assert routing_map[:, 1].sum(dim=0).tolist() == [1] * EXPERTS


def test_a_sequence_that_cannot_be_shared_is_refused():
    selection = ROUTINGS["expert_choice"]()
    with pytest.raises(ValueError, match="a sequence has 6 tokens, of which each of 4 experts"):
        selection.select(torch.zeros(6, 4), {}, topk=1)
