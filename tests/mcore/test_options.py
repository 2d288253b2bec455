"""Every MoE option of Megatron has an answer, and the answers are true."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.remoe import compat, options
from megatron.remoe.ranks import Ranks
from tests.mcore import moe_cases
from tests.mcore.moe_cases import Layout

DOCS = Path(__file__).parents[2] / "docs" / "options.md"


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield lambda function, *args: ranks.run(function, *args)[0]


def test_every_field_is_classified(rank):
    """Fails when a new megatron-core brings a field: give it an answer in `options`."""
    version, _ = compat.imported_version()
    assert set(rank(options.moe_fields)) == options.fields_of(version)


def test_what_only_one_version_has_is_classified_once():
    assert set(options.ONLY_IN) <= set(options.OPTIONS)
    assert set(options.ONLY_IN.values()) == set(compat.VERSIONS)
    older, newer = (options.fields_of(f"{minor}.0") for minor in compat.VERSIONS)
    assert older - newer == {"moe_ncclep_static_shape"}
    assert newer - older == set(options.ONLY_IN) - older


def test_what_only_the_next_version_has_is_refused_by_its_value():
    config = SimpleNamespace(moe_use_grouped_tensor=True)
    with pytest.raises(ValueError, match="^moe_use_grouped_tensor is True, which ReLU routing"):
        options.check(config)
    config.moe_use_grouped_tensor = False
    options.check(config)


def test_documentation_is_the_table():
    assert options.to_markdown() in DOCS.read_text()


def flags_by_table() -> dict[str, set[str]]:
    from megatron.remoe import unsupported
    from megatron.remoe.arguments import megatron_parser

    known = {action.dest for action in megatron_parser()._actions}
    tables: dict[str, set[str]] = {
        "every entry point": {refusal.name for refusal in unsupported.REFUSALS},
        "unused": {refusal.name for refusal in unsupported._UNUSED},
        "never": {name.partition(".")[0] for name in unsupported._REFUSED},
        "needs a GPU": set(unsupported._NEEDS_GPU),
        "needs a package": set(unsupported._NEEDS_PACKAGE) & known,
    }
    for group in megatron_parser()._action_groups:
        if group.title in unsupported._OTHER_PROGRAMS:
            flags = {action.dest for action in group._group_actions}
            tables[group.title] = flags - set(unsupported._NOT_BY_GROUP)
    assert set.union(*tables.values()) <= known
    return tables


def test_no_flag_is_refused_in_two_tables(rank):
    tables = list(rank(flags_by_table).values())
    assert len(tables) > 8
    assert sum(map(len, tables)) == len(set.union(*tables))


REFUSED = {
    "moe_expert_capacity_factor": 1.0,
    "moe_router_topk_scaling_factor": 2.0,
    "moe_router_num_groups": 2,
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_force_load_balancing": True,
    "moe_router_fusion": True,
    "moe_permute_fusion": True,
    "moe_apply_probs_on_input": True,
    "moe_enable_routing_replay": True,
    "moe_token_dispatcher_type": "flex",
    "moe_latent_size": 4,
    "mtp_num_layers": 1,
    "cuda_graph_impl": "local",
    "moe_router_load_balancing_type": "sinkhorn",
}


def refusal(name, value):
    config = moe_cases.transformer_config(Layout())
    setattr(config, name, value)  # past Megatron's own validation
    try:
        options.check(config)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_name_value_and_reason(rank, name):
    message = rank(refusal, name, REFUSED[name])
    assert message.startswith(f"{name} is {REFUSED[name]}")
    assert options.OPTIONS[name].answer == "refused"
    assert options.OPTIONS[name].why in message


def test_every_refused_option_passes_at_its_default(rank):
    assert rank(refusal, "num_moe_experts", 4) is None


def with_z_loss():
    """Gradients of the router's weight by the z-loss alone, and by hand."""
    layer = moe_cases.build_layer(Layout(), 0.0, 1e-30, moe_z_loss_coeff=0.1)
    x = moe_cases.inputs(0)
    probs, _ = layer.router(x)
    (probs * 0).sum().backward()
    weight = moe_cases.weights(0.0)[0].requires_grad_()
    logits = x.view(-1, moe_cases.HIDDEN) @ weight.T
    loss = 0.1 * torch.logsumexp(logits, dim=-1).square().mean()
    return layer.router.weight.grad, torch.autograd.grad(loss, weight)[0]


def test_z_loss_works_on_the_logits(rank):
    actual, expected = rank(with_z_loss)
    assert torch.allclose(actual, expected, rtol=1e-5)


def with_jitter():
    layer = moe_cases.build_layer(Layout(), 0.0, moe_input_jitter_eps=0.1)
    plain = moe_cases.build_layer(Layout(), 0.0)
    x = moe_cases.inputs(0)
    return [router(x)[0].detach() for router in (layer.router, layer.router, plain.router)]


def test_jitter_perturbs_the_routers_input_only_slightly(rank):
    first, second, exact = rank(with_jitter)
    assert not torch.equal(first, second)
    assert 0 < (first - exact).abs().max() < 0.5 * exact.max()


def with_shared_experts(overlap):
    layer = moe_cases.build_layer(
        Layout(),
        0.0,
        moe_shared_expert_intermediate_size=moe_cases.WIDTH,
        moe_shared_expert_overlap=overlap,
    )
    plain = moe_cases.build_layer(Layout(), 0.0)
    x = moe_cases.inputs(0)
    with torch.no_grad():
        shared = layer.shared_experts
        gate, up = (x @ shared.linear_fc1.weight.T).chunk(2, dim=-1)
        by_hand = (torch.nn.functional.silu(gate) * up) @ shared.linear_fc2.weight.T
    output, _ = layer(x)
    output.sum().backward()
    return output.detach(), plain(x)[0].detach() + by_hand, shared.linear_fc1.weight.grad


@pytest.mark.parametrize("overlap", [False, True])
def test_shared_experts_are_added_to_the_routed_ones(rank, overlap):
    actual, expected, grad = rank(with_shared_experts, overlap)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("text", ["1", "2", "[0,1,1,0]", "[0]*2+[1]*2", "([1]+[0])*2"])
def test_the_text_of_a_pattern_is_read_as_megatron_reads_it(text):
    from megatron.training.arguments import moe_freq_type

    expected = options.layers_with_experts(moe_freq_type(text), 4)
    assert options.layers_with_experts(text, 4) == expected != []


def test_a_pattern_is_not_run():
    with pytest.raises(ValueError, match="write a number, or a list"):
        options.layers_with_experts("__import__('os').getpid()", 4)
