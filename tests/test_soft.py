"""Soft MoE: against loops, against a recorded run of the published router, and its invariants."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remoe import SoftMoELayer, SoftMoELayerConfig, soft_routing
from remoe.reference import reference_expert, reference_soft_moe, reference_soft_routing
from remoe.soft import (
    by_expert,
    by_sequence,
    mass_of_slots,
    share_of_part,
    slots_for_equal_flops,
    slots_of_tokens,
    soft_logits,
)
from tests.golden.soft import NAMES, TOLERANCES, GoldenSoftMoE, largest_deviations

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden/soft_moe.npz"
ACTIVATIONS = ("swiglu", "gelu")
CONFIG = SoftMoELayerConfig(
    hidden_size=6, ffn_hidden_size=5, num_experts=3, slots_per_expert=2, init_std=0.5
)
BATCH, TOKENS = 2, 7


def new_layer(seed=0, **changes):
    torch.manual_seed(seed)
    layer = SoftMoELayer(replace(CONFIG, **changes), dtype=torch.float64)
    with torch.no_grad():
        layer.scale.fill_(3.0)
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def some_tokens(seed=1, batch=BATCH, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 6, dtype=torch.float64, generator=generator)


def loops(layer, x, padding=None):
    biases = [] if layer.up_bias is None else [layer.up_bias, layer.down_bias]
    experts = [reference_expert(*w) for w in zip(layer.up, layer.down, *biases, strict=True)]
    rows = []
    for index, sequence in enumerate(x):
        mask = None if padding is None else padding[index]
        weights = reference_soft_routing(sequence, layer.router, layer.scale, mask)
        rows.append(reference_soft_moe(sequence, *weights, experts))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient_equal_the_loops(activation, padded):
    layer, x = new_layer(activation=activation), some_tokens().requires_grad_()
    padding = None
    if padded:
        padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        padding[0, 4:], padding[1, [0, 3]] = True, True
    direction = some_tokens(seed=2)
    found = []
    for y in (layer(x, padding), loops(layer, x, padding)):
        found.append([y, *torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert ours.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_weights_by_hand():
    """Two tokens and two slots, with softmaxes of (0, log 3) and of (log 2, 0)."""
    logits = torch.log(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]))
    dispatch, combine = soft_routing(logits)
    assert torch.allclose(dispatch, torch.tensor([[[1 / 4, 2 / 3], [3 / 4, 1 / 3]]]))
    assert torch.allclose(combine, torch.tensor([[[1 / 3, 2 / 3], [3 / 4, 1 / 4]]]))
    dispatch, combine = soft_routing(logits, torch.tensor([[False, True]]))
    assert torch.equal(dispatch, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    assert torch.allclose(combine, torch.tensor([[[1 / 3, 2 / 3], [0.0, 0.0]]]))


def test_logits_are_cosines_times_the_scale():
    x = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    router = torch.tensor([[0.0, 2.0], [5.0, 0.0]])
    logits = soft_logits(x, router, torch.tensor([10.0]))
    assert torch.allclose(logits, torch.tensor([[[8.0, 6.0], [8.0, 6.0]]]), rtol=1e-5)
    # The epsilon is inside of the root: a tiny vector is divided by 1e-3.
    tiny = soft_logits(1e-6 * x[:, :1], router, torch.tensor([1.0]))
    assert torch.allclose(tiny, torch.tensor([[[4e-3, 3e-3]]]), rtol=1e-4)


@given(st.data())
def test_padding_changes_nothing_and_gets_nothing(data):
    """Whatever padding contains and wherever it is, the other tokens do as without it."""
    layer = new_layer(seed=data.draw(st.integers(0, 99)))
    keep = data.draw(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS).filter(any))
    size = data.draw(st.sampled_from([1.0, 1e6]))
    keep, x = torch.tensor(keep), some_tokens(seed=data.draw(st.integers(0, 99)), batch=1)
    x = torch.where(keep[:, None], x, size * x).requires_grad_()
    y = layer(x, ~keep[None])
    alone = x.detach()[:, keep].requires_grad_()
    y_alone = layer(alone)
    assert torch.allclose(y[:, keep], y_alone, rtol=1e-9, atol=1e-12)
    assert not y[:, ~keep].any()
    direction = some_tokens(seed=3, batch=1)
    grads = torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(
        (y_alone * direction[:, keep]).sum(), [alone, *layer.parameters()]
    )
    assert not grads[0][:, ~keep].any()
    for ours, theirs in zip((grads[0][:, keep], *grads[1:]), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@given(st.permutations(range(TOKENS)), st.permutations(range(3)), st.integers(0, 99))
def test_orders_of_tokens_and_experts_do_not_matter(tokens, experts, seed):
    layer, x = new_layer(seed), some_tokens(seed)
    y = layer(x)
    assert torch.allclose(layer(x[:, tokens]), y[:, tokens], atol=1e-12)
    with torch.no_grad():
        layer.up.copy_(layer.up[experts])
        layer.down.copy_(layer.down[experts])
        layer.router.copy_(layer.router.view(3, 2, 6)[experts].flatten(end_dim=1))
    assert torch.allclose(layer(x), y, atol=1e-12)


def test_sequences_do_not_see_each_other():
    layer, x = new_layer(), some_tokens()
    assert torch.allclose(layer(x)[1], layer(x[1]), atol=1e-12)
    assert torch.equal(layer(x.view(2, 1, TOKENS, 6)), layer(x).view(2, 1, TOKENS, 6))


def test_slots_of_an_expert_are_neighbors():
    slots = torch.arange(2 * 6).view(2, 6, 1)
    assert by_expert(slots, 3)[1].flatten().tolist() == [2, 3, 8, 9]
    assert torch.equal(by_sequence(by_expert(slots, 3), 6), slots)


def test_a_batch_of_padding_only_has_neither_weights_nor_nan():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    dispatch, combine = soft_routing(logits, torch.ones(1, 3, dtype=torch.bool))
    assert not dispatch.any() and not combine.any()
    (dispatch.sum() + combine.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("padded", [False, True])
def test_parts_of_a_sequence_make_the_same_slots_with_all_gradients(padded):
    """The second part is all padding in the first sequence, and the second sequence is nothing."""
    x, router = some_tokens(batch=3).requires_grad_(), new_layer().router
    padding = None
    if padded:
        padding = torch.zeros(3, TOKENS, dtype=torch.bool)
        padding[0, 3:5], padding[1], padding[2, 0] = True, True, True
    parts = [slice(0, 3), slice(3, 5), slice(5, TOKENS)]

    def slots(part, scale=1.0):
        mask = None if padding is None else padding[:, part]
        logits = soft_logits(x[:, part], router, torch.tensor([5.0]))
        return slots_of_tokens(soft_routing(logits, mask)[0] * scale, x[:, part])

    def mass(part):
        mask = None if padding is None else padding[:, part]
        return mass_of_slots(soft_logits(x[:, part], router, torch.tensor([5.0])), mask)

    masses = torch.stack([mass(part) for part in parts])
    shares = [share_of_part(masses, i).unsqueeze(1) for i in range(len(parts))]
    split = sum(slots(part, share) for part, share in zip(parts, shares, strict=True))
    whole, direction = slots(slice(None)), torch.randn(3, 6, 6, dtype=torch.float64)
    found = [
        [y, *torch.autograd.grad((y * direction).sum(), (x, router), retain_graph=True)]
        for y in (split, whole)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (3,), (2, 4)])
def test_a_mask_that_torch_would_repeat_is_refused(shape):
    with pytest.raises(ValueError, match=r"padding_mask is .*; it must be \[2, 3\], the sequences"):
        soft_routing(torch.zeros(2, 3, 4), torch.zeros(shape, dtype=torch.bool))


def test_no_tokens_are_no_error():
    layer = new_layer()
    assert layer(torch.zeros(2, 0, 6, dtype=torch.float64)).shape == (2, 0, 6)
    assert layer(torch.zeros(0, 5, 6, dtype=torch.float64)).shape == (0, 5, 6)
    mask = torch.zeros(2, 0, dtype=torch.bool)
    assert layer(torch.zeros(2, 0, 6, dtype=torch.float64), mask).shape == (2, 0, 6)


def test_half_precision_routes_in_fp32():
    layer, x = new_layer().bfloat16(), some_tokens().bfloat16()
    logits = soft_logits(x, layer.router, layer.scale)
    assert logits.dtype == torch.float32
    wide = soft_logits(x.double(), layer.router.double(), layer.scale.double())
    assert torch.allclose(logits.double(), wide, atol=1e-6)
    assert layer(x).dtype == torch.bfloat16


def test_autocast_leaves_the_routing_in_fp32():
    layer, x = new_layer().float(), some_tokens().float()
    logits = soft_logits(x, layer.router, layer.scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_logits(x, layer.router, layer.scale), logits)
        y = layer(x)
    assert torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameter_counts_are_those_of_the_module(activation):
    layer = new_layer(activation=activation)
    assert layer.config.num_params == sum(p.numel() for p in layer.parameters())
    assert layer.config.num_active_params == layer.config.num_params


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flops_are_those_that_torch_counts(activation):
    from torch.utils.flop_counter import FlopCounterMode

    layer = new_layer(activation=activation)
    with FlopCounterMode(display=False) as counter:
        layer(some_tokens())
    assert counter.get_total_flops() == BATCH * layer.config.flops(TOKENS)


def test_slots_for_equal_flops():
    assert slots_for_equal_flops(64, 16) == 4
    with pytest.raises(
        ValueError, match="5 experts cannot share as many slots as a sequence of 64"
    ):
        slots_for_equal_flops(64, 5)


def test_a_new_layer_has_slots_of_unit_length_and_says_what_it_is():
    layer = SoftMoELayer(SoftMoELayerConfig(hidden_size=16, ffn_hidden_size=8))
    assert torch.allclose(layer.router.norm(dim=1), torch.ones(8))
    assert layer.scale.tolist() == [1.0]
    assert "num_experts=8, slots_per_expert=1, activation=swiglu" in repr(layer)


def test_memory_has_no_copy_per_token_and_slot():
    """With 64 tokens, 64 slots and 32 features, the largest tensor is far from their product."""
    config = SoftMoELayerConfig(hidden_size=32, ffn_hidden_size=32, num_experts=64)
    layer, sizes = SoftMoELayer(config), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Sizes():
        layer(torch.randn(1, 64, 32).requires_grad_()).sum().backward()
    assert max(sizes) == 64 * 64 * 32 == config.num_experts * 2 * 32 * 32  # the experts' weights
    sizes.clear()
    with Sizes(), torch.no_grad():
        soft_logits(torch.randn(1, 64, 32), layer.router, layer.scale)
    assert max(sizes) == 64 * 64


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        ({"slots_per_expert": 0}, "slots_per_expert is 0; it must be a whole number"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"activation": "relu"}, "activation is 'relu'; choose one of swiglu, gelu"),
    ],
)
def test_config_names_the_bad_value(change, names):
    with pytest.raises(ValueError, match=names):
        replace(CONFIG, **change)


def test_inputs_that_do_not_fit_are_named():
    layer, x = new_layer(), some_tokens()
    with pytest.raises(ValueError, match=r"hidden_states is \[6\]; it must be \[..., tokens, 6\]"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match=r"padding_mask is torch.bool \[7\]; it must be"):
        layer(x, torch.zeros(TOKENS, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"padding_mask is torch.float32 \[2, 7\]; it must be"):
        layer(x, torch.zeros(BATCH, TOKENS))
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1] = True
    with pytest.raises(ValueError, match="leaves a sequence without a token"):
        layer(x, padding)


def test_the_published_run_replays():
    for key, deviation in largest_deviations(GoldenSoftMoE.load(GOLDEN)).items():
        assert deviation <= TOLERANCES[key][1], key


@pytest.mark.parametrize(
    ("name", "changed", "quantity"),
    [
        ("normalize", lambda x, eps=0: x / (x.norm(dim=-1, keepdim=True) + 1e-2), "dispatch"),
        ("soft_routing", lambda z, mask=None: 2 * (z.softmax(2),), "dispatch"),
        ("by_expert", lambda s, n: s.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2), "y"),
    ],
)
def test_a_wrong_formula_is_caught(monkeypatch, name, changed, quantity):
    monkeypatch.setattr(f"remoe.soft.{name}", changed)
    if name == "soft_routing":
        monkeypatch.setattr("tests.golden.soft.soft_routing", changed)
    found = largest_deviations(GoldenSoftMoE.load(GOLDEN))
    assert found[quantity] > 10 * TOLERANCES[quantity][1]


def as_recorded(batch, tokens, hidden, experts, slots, width, scale):
    """A run of another size, in fp64 and by einsum in the notation of the published code."""
    torch.manual_seed(0)
    shapes = {"x": (batch, tokens, hidden), "mu": (hidden, experts, slots),
              "w1": (experts, hidden, width), "b1": (experts, width),
              "w2": (experts, width, hidden), "b2": (experts, hidden),
              "target": (batch, tokens, hidden)}  # fmt: skip
    a = {n: torch.randn(s, dtype=torch.float64) * (0.2 if n[0] in "wb" else 1)
         for n, s in shapes.items()}  # fmt: skip
    a["scale"] = torch.tensor(scale, dtype=torch.float64)
    given = [a[n].requires_grad_() for n in ("x", "mu", "scale", "w1", "b1", "w2", "b2")]
    unit = [v * (v.square().sum(d, True) + 1e-6).rsqrt() for v, d in ((a["x"], -1), (a["mu"], 0))]
    z = torch.einsum("gmd,dnp->gmnp", *unit) * a["scale"]
    dispatch, combine = z.softmax(1), z.flatten(2).softmax(2).view_as(z)
    x_slots = torch.einsum("gmnp,gmd->gnpd", dispatch, a["x"])
    h = torch.einsum("gnpd,ndf->gnpf", x_slots, a["w1"]) + a["b1"][:, None]
    h = torch.nn.functional.gelu(h, approximate="tanh")
    out = torch.einsum("gnpf,nfd->gnpd", h, a["w2"]) + a["b2"][:, None]
    y = torch.einsum("gmnp,gnpd->gmd", combine, out)
    loss = (y - a["target"]).square().mean()
    grads = torch.autograd.grad(loss, given)
    names = ("x", "mu", "scale", "w1", "b1", "w2", "b2")
    a |= {f"grad.{n}": g for n, g in zip(names, grads, strict=True)}
    a |= {"dispatch": dispatch, "combine": combine, "slots": x_slots, "y": y, "loss": loss}
    return {name: value.detach().float().numpy() for name, value in a.items()}


@pytest.mark.processes
def test_the_command_replays_other_sizes_and_scales_and_refuses_other_files(tmp_path):
    def replay(path):
        command = [sys.executable, "-m", "tests.golden.replay", str(path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    good, wrong, other = tmp_path / "good.npz", tmp_path / "wrong.npz", tmp_path / "other.npz"
    arrays = as_recorded(2, 9, 16, 4, 3, 8, 40.0)
    assert set(arrays) == NAMES
    np.savez(good, **arrays)
    np.savez(wrong, **arrays | {"grad.mu": 1.001 * arrays["grad.mu"]})
    np.savez(other, mu=arrays["mu"])
    done = replay(good)
    assert done.returncode == 0, done.stdout + done.stderr
    done = replay(wrong)
    assert done.returncode == 1 and done.stdout.count("DIFFERS") == 1
    done = replay(other)
    assert done.returncode == 2 and "it lacks" in done.stderr and len(done.stderr.split("\n")) == 2


@pytest.mark.parametrize(
    "sizes",
    [(1, 5, 8, 1, 1, 8, 0.1), (2, 9, 16, 4, 3, 8, 10.0), (2, 32, 64, 16, 2, 32, 60.0)],
)
def test_other_sizes_and_scales_replay(sizes):
    arrays = {name: torch.from_numpy(array) for name, array in as_recorded(*sizes).items()}
    for key, deviation in largest_deviations(GoldenSoftMoE(arrays)).items():
        assert deviation <= TOLERANCES[key][1], key
