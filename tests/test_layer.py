"""The single-device layer against plain loops, and its use in a training loop."""

import subprocess
import sys

import pytest
import torch

from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty, update_l1_coeff
from remoe.reference import reference_l1, reference_moe, reference_routing
from remoe.routing import bounded_routing
from remoe.statistics import TokenCounts

CONFIG = ReMoELayerConfig(hidden_size=8, ffn_hidden_size=12, num_experts=4, topk=1, init_std=0.5)


def layer_and_input(config=CONFIG, tokens=10, seed=0):
    torch.manual_seed(seed)
    layer = ReMoELayer(config, dtype=torch.float64)
    return layer, torch.randn(tokens, config.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize("load_balancing", ["aux_loss", "none"])
@pytest.mark.parametrize("granularity", [1, 2])
def test_output_and_every_gradient_equal_the_reference(load_balancing, granularity):
    config = ReMoELayerConfig(
        **(vars(CONFIG) | {"load_balancing": load_balancing, "granularity": granularity})
    )
    layer, x = layer_and_input(config)
    weight = torch.randn_like(x)  # makes the loss depend on every output differently
    x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()

    y = layer(x_fast)
    fast_reg = layer.l1_reg
    loss = (y * weight).sum() + 0.1 * fast_reg
    fast = torch.autograd.grad(loss, [x_fast, *layer.parameters()])

    probs = reference_routing(x_slow, layer.router)
    y_slow = reference_moe(x_slow, probs, layer.gate_up, layer.down)
    slow_reg = reference_l1(
        probs, topk=config.experts.topk, load_balancing=load_balancing == "aux_loss"
    )
    slow_loss = (y_slow * weight).sum() + 0.1 * slow_reg
    slow = torch.autograd.grad(slow_loss, [x_slow, *layer.parameters()])

    assert (probs == 0).any(), "the case must contain inactive experts"
    assert torch.allclose(y, y_slow, rtol=1e-12)
    # fp32 in f, otherwise fp64
    assert torch.allclose(fast_reg, slow_reg, rtol=1e-6)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("granularity", [1, 2])
def test_shortcuts_bound_the_experts_of_a_token_and_not_the_penalty(granularity):
    shortcuts = {"max_active_experts": 1, "at_least_one_expert": True}
    config = ReMoELayerConfig(**(vars(CONFIG) | shortcuts | {"granularity": granularity}))
    layer, x = layer_and_input(config)
    plain, _ = layer_and_input(ReMoELayerConfig(**(vars(CONFIG) | {"granularity": granularity})))
    x[0] = -torch.linalg.pinv(layer.router.detach()).sum(dim=1)  # all its logits are -1
    logits = x @ layer.router.T
    probs = reference_routing(x, layer.router)
    before, counts = probs > 0, (probs > 0).sum(dim=1)
    assert counts.max() > granularity and counts.min() == 0, "the case must need both shortcuts"
    probs, active = bounded_routing(logits, probs, max_active=granularity, at_least_one=True)
    assert set(active.sum(dim=1).tolist()) <= set(range(1, granularity + 1))
    y, y_plain = layer(x), plain(x)
    assert torch.allclose(y, reference_moe(x, probs, layer.gate_up, layer.down), rtol=1e-12)
    assert not torch.allclose(y, y_plain)
    assert torch.equal(layer.l1_reg, plain.l1_reg)
    assert TokenCounts(layer.counts).per_expert.tolist() == before.sum(dim=0).tolist()


def test_no_active_expert_gives_zero_and_gradients_for_every_parameter():
    layer, x = layer_and_input()
    with torch.no_grad():
        layer.router.copy_(-x.abs().sum() * torch.ones_like(layer.router))
    y = layer(x.abs())
    assert torch.equal(y, torch.zeros_like(x))
    (y.sum() + l1_penalty(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_all_experts_active():
    layer, x = layer_and_input()
    with torch.no_grad():
        layer.router.copy_(layer.router.abs())
    probs = reference_routing(x.abs(), layer.router)
    assert (probs > 0).all()
    expected = reference_moe(x.abs(), probs, layer.gate_up, layer.down)
    assert torch.allclose(layer(x.abs()), expected)


def test_any_leading_shape():
    layer, x = layer_and_input()
    assert torch.equal(layer(x.view(2, 5, 8)), layer(x).view(2, 5, 8))


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_parameter_counts_are_those_of_the_module(granularity):
    config = ReMoELayerConfig(hidden_size=8, ffn_hidden_size=12, topk=2, granularity=granularity)
    layer = ReMoELayer(config)
    assert config.num_params == sum(p.numel() for p in layer.parameters())
    per_expert = layer.gate_up[0].numel() + layer.down[0].numel()
    active = layer.router.numel() + config.experts.topk * per_expert
    assert config.num_active_params == active
    sizes = "hidden_size=8, ffn_hidden_size=12, num_experts=8, topk=2"
    assert repr(layer) == f"ReMoELayer({sizes}, granularity={granularity}, router=relu)"


def test_coefficient_moves_by_the_mean_sparsity_of_all_layers_and_micro_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[ReMoELayer(CONFIG) for _ in range(2)])
    maps = [[], []]
    for layer, seen in zip(model, maps, strict=True):
        layer.register_forward_hook(
            lambda module, args, _, seen=seen: seen.append(args[0] @ module.router.T > 0)
        )
    for _ in range(2):
        model(torch.randn(16, 8))
    expected = [1 - torch.cat(seen).double().mean().item() for seen in maps]
    assert update_l1_coeff(model).tolist() == pytest.approx(expected)
    assert sum(expected) / 2 < 0.75
    assert [layer.l1_coeff.item() for layer in model] == pytest.approx([1.2e-8] * 2)


def test_loads_of_the_step_before_and_coefficients_of_single_layers():
    changes = {"load_balancing": "global_batch", "l1_coeff_per_layer": True, "topk": 2}
    config = ReMoELayerConfig(**(vars(CONFIG) | changes))
    layer, x = layer_and_input(config)
    other, _ = layer_and_input(config)
    with torch.no_grad():
        other.router.fill_(-1)
    x = x.abs()
    with torch.no_grad():
        layer.router[:3] = layer.router[:3].abs()  # three of four experts are always active
        layer.router[3] = -1
    model = torch.nn.ModuleList([layer, other])
    layer(x[:5]), other(x[:5])
    probs = reference_routing(x[:5], layer.router)
    assert layer.l1_reg.item() == pytest.approx(probs.sum().item() / 5)  # loads of one
    layer(x[5:]), other(x[5:])
    assert update_l1_coeff(model).tolist() == [0.25, 1]
    assert layer.l1_coeff.item() == pytest.approx(1e-8 * 1.2)  # 3 of 4 are more than 2 of 4
    assert other.l1_coeff.item() == pytest.approx(1e-8 / 1.2)
    assert layer.load.tolist() == [2, 2, 2, 0] and other.load.tolist() == [0] * 4
    layer(x)
    probs = reference_routing(x, layer.router)
    assert layer.l1_reg.item() == pytest.approx(2 * probs.sum().item() / 10)
    assert set(layer.state_dict()) - set(layer_and_input()[0].state_dict()) == {"load"}


def test_evaluation_and_no_grad_forwards_are_not_counted():
    layer, x = layer_and_input()
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert layer.counts is None
    with pytest.raises(ValueError, match="training mode"):
        l1_penalty(layer)


@pytest.mark.parametrize("recurrent", [{}, {"recurrence": "gru", "recurrent_size": 16}])
def test_autocast_leaves_the_routing_in_fp32(recurrent):
    config = ReMoELayerConfig(hidden_size=64, ffn_hidden_size=32, **recurrent)
    layer, x = ReMoELayer(config), torch.randn(256, 64)
    layer(x)
    expected = layer.l1_reg, layer.counts.clone()
    layer.counts.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(layer.l1_reg, expected[0]) and torch.equal(layer.counts, expected[1])


def test_coefficient_keeps_its_value_through_casts_and_state_dict():
    layer = ReMoELayer(CONFIG)
    layer.l1_coeff.fill_(1.2345678e-5)
    before = layer.l1_coeff.clone()
    layer.bfloat16()
    assert layer.router.dtype == torch.bfloat16
    assert torch.equal(layer.l1_coeff, before)
    other = ReMoELayer(CONFIG)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.l1_coeff, before)
    assert "counts" not in layer.state_dict()


def test_materialises_from_the_meta_device():
    layer = ReMoELayer(CONFIG, device="meta").to_empty(device="cpu")
    assert layer.l1_coeff.dtype == torch.float32


def test_a_reset_also_sets_the_state_of_a_layer_from_the_meta_device():
    config = ReMoELayerConfig(hidden_size=8, ffn_hidden_size=16, load_balancing="global_batch")
    layer = ReMoELayer(config, device="meta").to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(7)  # what is in new memory
    layer.reset_parameters()
    new = ReMoELayer(config)
    assert {name for name, _ in new.named_buffers()} == {"l1_coeff", "load"}
    for name, buffer in new.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), name


def test_sparsity_reaches_its_target_in_a_training_loop():
    torch.manual_seed(0)
    config = ReMoELayerConfig(16, 32, num_experts=8, topk=1, l1_coeff_init=1e-4)
    layer = ReMoELayer(config)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    # Off-center, as hidden states are: a router without bias halves a symmetric cloud of tokens.
    data = torch.randn(4, 256, 16) + 1
    target = torch.tanh(data.flip(-1))
    history = []
    for step in range(250):
        x, y = data[step % 4], target[step % 4]
        loss = torch.nn.functional.mse_loss(layer(x), y) + l1_penalty(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(update_l1_coeff(layer).item())
    assert history[0] < 0.6
    assert sum(history[-50:]) / 50 == pytest.approx(0.875, abs=0.05)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"load_balancing": "aux"}, "load_balancing is 'aux'"),
        ({"topk": 5}, "topk is 5 of 4"),
        ({"granularity": 5}, "does not divide"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"l1_coeff_multiplier": 0.5}, "multiplier is 0.5"),
    ],
)
def test_config_names_the_bad_value(change, names):
    with pytest.raises(ValueError, match=names):
        ReMoELayerConfig(**(vars(CONFIG) | change))


def test_layers_without_tokens_take_no_part_in_the_update():
    """An empty batch is no error, and a layer that saw nothing does not make the mean NaN."""
    model = torch.nn.ModuleList([ReMoELayer(CONFIG), ReMoELayer(CONFIG)])
    before = model[0].l1_coeff.item()
    empty = torch.zeros(0, CONFIG.hidden_size)
    for layer in model:
        assert layer(empty).shape == empty.shape
    assert l1_penalty(model).item() == 0
    assert update_l1_coeff(model).isnan().all()
    assert [layer.l1_coeff.item() for layer in model] == [before, before]
    model[0](torch.randn(64, CONFIG.hidden_size))
    seen, unseen = update_l1_coeff(model)
    assert 0 < seen < 1 and unseen.isnan()
    factor = 1.2 if seen < 1 - CONFIG.topk / CONFIG.num_experts else 1 / 1.2
    for layer in model:
        assert layer.l1_coeff.item() == pytest.approx(before * factor)


@pytest.mark.processes
def test_importing_remoe_loads_neither_megatron_nor_transformers():
    code = (
        "import sys, remoe\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
