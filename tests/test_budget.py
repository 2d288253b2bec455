"""A budget of active experts that is set after training, in the model for transformers."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from megatron.remoe.convert import architecture
from megatron.remoe.ranks import Ranks
from remoe.hf import ReMoEConfig, configuration_remoe
from remoe.hf.budget_remoe import Calibration, calibrate, limited_gates
from tests.test_hf import SIZES, build, some_tokens, state_of_its_own

GATED = ("relu", "relu_rms", "relu_l2")


def by_loops(router, logits, *, offset, threshold, most):
    """The gates of one token, one by one."""
    scale = 1.0 if router.gate_scale is None else router.gate_scale.tolist()
    scales = scale * len(logits) if isinstance(scale, list) and len(scale) == 1 else scale
    scales = [1.0] * len(logits) if router.gate_scale is None else scales
    norm = 1.0
    if router.router_type == "relu_l2":
        norm = sum(z * z for z in logits) ** 0.5 + 1e-8
    gates = [max(0.0, z / norm - offset) for z in logits]
    if router.router_type == "relu_rms":
        rms = (sum(g * g for g in gates) / len(gates) + 1e-6) ** 0.5
        gates = [g / rms for g in gates]
    gates = [g * s for g, s in zip(gates, scales, strict=True)]
    gates = [g if abs(g) >= threshold else 0.0 for g in gates]
    order = sorted(range(len(gates)), key=lambda e: -abs(gates[e]))
    return [g if e in order[:most] else 0.0 for e, g in enumerate(gates)]


@pytest.mark.parametrize("router", GATED)
def test_gates_within_a_budget_are_those_of_loops(router):
    """Offset, threshold and limit of one layer, whose scales are negative too."""
    model = state_of_its_own(build(router_type=router))
    model.config.gate_offset, model.config.gate_threshold = [0.0, 0.1], [9.0, 0.4]
    model.config.max_active_experts = [1, 2]
    module = model.model.layers[2].mlp.router
    if module.gate_scale is not None:
        module.gate_scale.data[0] *= -1
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        probs, active, penalized, _ = module(x)
        logits = module.score(x)[0]
        plain = module.penalized(logits)
    budget = {"offset": 0.1, "threshold": 0.4, "most": 2}
    expected = torch.tensor([by_loops(module, row, **budget) for row in logits.tolist()])
    torch.testing.assert_close(probs, expected)
    assert torch.equal(active, expected != 0)
    assert torch.equal(penalized, plain) and (penalized > 0).sum() > active.sum()
    assert set(active.sum(dim=1).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("router", ["topk_pre_softmax", "topk_post_softmax", "topk_sigmoid"])
def test_a_threshold_leaves_k_gates_of_a_topk_router_or_fewer(router):
    model = build(router_type=router)
    module = model.model.layers[0].mlp.router
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = module(x)[0]
        model.config.gate_threshold = float(plain[plain > 0].median())
        probs, active, *_ = module(x)
    for before, after, chosen in zip(plain.tolist(), probs.tolist(), active.tolist(), strict=True):
        kept = [gate if gate >= model.config.gate_threshold else 0.0 for gate in before]
        assert after == kept and chosen == [gate > 0 for gate in kept]
    assert {1, 2} <= set(active.sum(dim=1).tolist()) <= {0, 1, 2}
    assert model.config.to_dict()["format_version"] == 2


def test_what_a_threshold_leaves_keeps_its_value_and_its_gradient():
    gates = torch.tensor([[0.2, 0.5, 0.0], [0.3, 0.1, 0.2]], requires_grad=True)
    active = gates > 0
    kept, map_TE = limited_gates(gates, active, threshold=0.3)
    assert kept.tolist() == torch.tensor([[0.0, 0.5, 0.0], [0.3, 0.0, 0.0]]).tolist()
    assert torch.equal(map_TE, kept > 0)
    kept.sum().backward()
    assert torch.equal(gates.grad, map_TE.float())
    one, _ = limited_gates(gates, active, threshold=0.4, keep_one=True)
    assert one.tolist() == kept.tolist()
    none, _ = limited_gates(gates * 0, gates > 1, threshold=0.4, keep_one=True)
    assert not none.any()


def test_a_negative_offset_adds_experts_and_a_threshold_takes_them_away():
    model, tokens = build(), some_tokens(2, 9)

    def active() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(model(tokens, output_routing=True).active_experts)

    before = active()
    model.config.gate_offset = -0.5
    assert active().sum() > before.sum()
    model.config.gate_offset, model.config.gate_threshold = None, 0.5
    assert active().sum() < before.sum()
    model.config.gate_threshold = [1.0]
    with pytest.raises(ValueError, match="gate_threshold has 1 values for 2 layers"):
        active()


def test_a_budget_is_saved_with_a_version_that_older_code_refuses(tmp_path):
    model, tokens = build(), some_tokens(2, 9)
    assert model.config.to_dict()["format_version"] == 1
    model.config.gate_threshold, model.config.max_active_experts = 0.25, [3, 1]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.format_version == 2
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not torch.equal(again(tokens).logits, build()(tokens).logits)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gate_threshold=0.5)
    assert other.config.gate_threshold == 0.5
    again.config.gate_threshold = -1
    with pytest.raises(ValueError, match="gate_threshold is -1"):
        again.save_pretrained(tmp_path / "never")
    again.config.gate_threshold = again.config.max_active_experts = None
    assert again.config.to_dict()["format_version"] == 1
    for changes, version in (
        ({"max_active_experts": 2}, 1),  # which older code has
        ({"max_active_experts": 2, "router_type": "relu_l2"}, 2),
        ({"gate_offset": [0.1, -0.1]}, 2),
    ):
        assert ReMoEConfig(**SIZES | changes).to_dict()["format_version"] == version


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_threshold": 0.1},
        {"gate_offset": -0.1},
        {"max_active_experts": [1, 2]},
        {"max_active_experts": 2, "router_type": "relu_rms"},
    ],
)
def test_megatron_is_not_given_a_model_with_a_budget(changes):
    config = ReMoEConfig(**SIZES | changes).to_dict()
    with pytest.raises(ValueError, match=f"has {next(iter(changes))} = .*, a budget that was set"):
        architecture.check_expressible(config)
    architecture.check_expressible(ReMoEConfig(**SIZES, max_active_experts=2).to_dict())
    assert architecture.BUDGET == configuration_remoe.BUDGET


def test_the_calibration_finds_what_a_falling_function_reaches():
    found = calibrate(lambda x: 8 * 2.0**-x, 3.0, tolerance=1e-3)
    assert found.reached == pytest.approx(3.0, rel=1e-3)
    assert found.value == pytest.approx(1.415, abs=2e-3)
    negative = calibrate(lambda x: 8 * 2.0**-x, 20.0)
    assert negative.value < 0 and negative.reached == pytest.approx(20.0, rel=0.01)
    assert calibrate(lambda x: 8 * 2.0**-x, 20.0, least=0.0) == Calibration(0.0, 8.0, 1)
    assert calibrate(lambda x: max(1.0, 8 - x), 0.5).reached == 1.0
    assert calibrate(lambda x: 2.0 if x < 0.3 else 0.4, 0.5).reached == 0.4
    assert calibrate(lambda x: 5.0, 5.0).steps == 1


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(1, 64, (12, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :20] = mask[1, 40:] = 0
    return ids, mask


def active_per_token(model, ids, mask) -> float:
    with torch.no_grad():
        counts = torch.stack(model(ids, attention_mask=mask, output_routing=True).active_experts)
    return float(counts[:, mask.bool()].double().mean())


@pytest.mark.parametrize(
    ("router", "by", "target", "per_layer"),
    [
        ("relu", "threshold", 0.7, False),
        ("relu", "offset", 3.0, False),
        ("relu_rms", "threshold", 1.2, True),
        ("relu_l2", "offset", 0.5, True),
        ("relu_l2", "threshold", 0.5, False),
    ],
)
def test_a_budget_is_met_on_tokens_that_are_no_padding(text, router, by, target, per_layer):
    model = state_of_its_own(build(router_type=router)).train()
    before = active_per_token(model.eval(), *text)
    budget = model.train().set_budget(target, *text, by=by, per_layer=per_layer)
    assert model.training
    reached = active_per_token(model.eval(), *text)
    assert reached == pytest.approx(target, rel=0.01)
    assert budget.active_experts == pytest.approx(reached)
    assert budget.before == pytest.approx(before) and budget.tokens == text[1].sum()
    stored, other = model.config.gate_threshold, model.config.gate_offset
    stored, other = (stored, other) if by == "threshold" else (other, stored)
    assert stored == budget.value and other is None
    assert isinstance(stored, list) == per_layer
    assert model.set_budget(None) is None
    assert active_per_token(model, *text) == before


@pytest.mark.parametrize(
    ("changes", "target", "more", "message"),
    [
        ({}, 4.5, {}, "active_experts is 4.5; it must be .* at most 4, the number of experts"),
        ({}, 0, {}, "active_experts is 0; it must be a number .* above 0"),
        ({}, float("nan"), {}, "active_experts is nan"),
        ({}, 3.9, {}, r"active_experts is 3.9, which cannot .* by='offset'\) can add"),
        ({}, 1e-5, {}, "active_experts is 1e-05, which cannot be met within 1%: .* more text"),
        ({"at_least_one_expert": True}, 0.5, {}, "the nearest threshold leaves 1 on this text"),
        ({}, True, {}, "active_experts is True; it must be a number"),
        ({}, 1.0, {"inputs": ([[1]],)}, "input_ids is a list; pass a tensor of token ids"),
        (
            {},
            1.0,
            {"inputs": (torch.ones(600),)},
            r"is a Tensor of torch.float32, \[600\]; pass",
        ),
        (
            {},
            1.0,
            {"inputs": (torch.full((1, 600), 64),)},
            "are from 64 to 64, and .* has 64 entries",
        ),
        (
            {},
            1.0,
            {"inputs": (torch.ones(2, 9).long(), torch.ones(12, 60))},
            r"a Tensor, \[12, 60\]; pass .* \[2, 9\]",
        ),
        ({}, 1.0, {"rows": 8}, "the text has 440 tokens .*; pass at least 512"),
        ({}, 1.0, {"rows": None}, "input_ids are not given"),
        ({}, 1.0, {"by": "scale"}, "by is 'scale'; it must be one of threshold, offset"),
        ({"router_type": "top_p"}, 1.0, {}, "router_type is top_p, whose number of experts has"),
        ({"router_type": "topk_sigmoid"}, 1.0, {"by": "offset"}, "whose number of experts has no"),
        ({"mlp_only_layers": [0, 1, 2]}, 1.0, {}, "the model is dense"),
    ],
)
def test_a_budget_that_cannot_be_set_is_refused_and_changes_nothing(
    text, changes, target, more, message
):
    model = build(**changes)
    if not changes:
        model.config.gate_threshold = 0.25
    rows = more.pop("rows", 12)
    inputs = more.pop("inputs", () if rows is None else tuple(one[:rows] for one in text))
    with pytest.raises(ValueError, match=message):
        model.set_budget(target, *inputs, **more)
    assert model.config.gate_threshold == (0.25 if not changes else None)


@pytest.mark.parametrize("kind", [list, tuple])
def test_thresholds_of_layers_are_moved_by_one_number_and_back(text, tmp_path, kind):
    model, profile = state_of_its_own(build()), [0.1, 0.5]
    model.config.gate_threshold = kind(profile)
    plain = model.set_budget(0.6, *text)
    for target in (1.75, 0.1, 0.6):  # with the first, one of the thresholds is negative
        before = active_per_token(model, *text)
        budget = model.set_budget(target, *text)
        assert active_per_token(model, *text) == pytest.approx(target, rel=0.01)
        assert budget.value == model.config.gate_threshold
        assert (budget.value[0] < 0) == (target == 1.75)
        assert budget.value[1] - budget.value[0] == pytest.approx(profile[1] - profile[0])
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert active_per_token(model, *text) == pytest.approx(budget.active_experts)
        assert abs(budget.active_experts - before) > 0.5
    assert budget.active_experts == pytest.approx(plain.active_experts, rel=0.02)
    layers = model.set_budget(0.6, *text, per_layer=True).value
    assert layers[1] - layers[0] != pytest.approx(profile[1] - profile[0])
    model.set_budget(None)
    assert isinstance(model.set_budget(0.6, *text).value, float)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def set_on_ranks(target, per_rank, ids):
    """Set a budget; the arguments of this rank are in a list of those of all."""
    model = state_of_its_own(build())
    target = target[torch.distributed.get_rank()] if isinstance(target, list) else target
    first, last = per_rank[torch.distributed.get_rank()]
    try:
        budget = model.set_budget(target, ids[first:last])
    except ValueError as error:
        return str(error)
    return budget.value, budget.active_experts


def test_ranks_set_one_budget_for_the_texts_of_all(text, ranks):
    ids, alone = text[0].repeat(2, 1), state_of_its_own(build())
    ids[12:] = ids[12:].flip(0, 1)
    budget = alone.set_budget(0.7, ids)
    assert (
        ranks.run(set_on_ranks, 0.7, [(0, 12), (12, 24)], ids)
        == [(budget.value, budget.active_experts)] * 2
    )


def test_ranks_refuse_together_what_would_leave_one_waiting(text, ranks):
    ids = text[0].repeat(2, 1)
    few, told = ranks.run(set_on_ranks, 0.7, [(0, 2), (12, 24)], ids)
    assert few.startswith("the text has 120 tokens")
    assert told == f"rank 0: {few}"
    numbers = ranks.run(set_on_ranks, [0.7, 0.8], [(0, 12), (12, 24)], ids)
    assert (
        "rank 1 asks for (0.8, 'threshold', False, None, None, 1) and this one for (0.7,"
        in numbers[0]
    )
    assert "rank 0 asks for (0.7, " in numbers[1]
    lengths = ranks.run(set_on_ranks, 0.7, [(0, 12), (0, 240)], ids.repeat(10, 1))
    assert "None, None, 2) and this one for (0.7, 'threshold', False, None, None, 1)" in lengths[0]
