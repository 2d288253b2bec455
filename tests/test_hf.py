"""The transformers model: its copies of our equations, caching, padding, training, and its cost."""

import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import remoe
from megatron.remoe.convert.tokenizer import TokenizerFiles
from remoe import regularization, routing
from remoe.config import ROUTINGS
from remoe.hf import (
    ReMoEConfig,
    ReMoEForCausalLM,
    ReMoEModel,
    configuration_remoe,
    modeling_remoe,
)
from remoe.selections import (
    expert_threshold,
    hashed,
    null_experts,
    relu_l2,
    relu_rms,
    top_p,
)
from remoe.settings import settings_of
from remoe.statistics import TokenCounts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROUTERS = ("relu", "topk_pre_softmax", "topk_post_softmax", "topk_sigmoid")
SELECTIONS = ("relu_rms", "relu_l2", "top_p", "expert_threshold", "null_experts")


def build(**changes) -> ReMoEForCausalLM:
    torch.manual_seed(0)
    return ReMoEForCausalLM(ReMoEConfig(**(SIZES | changes))).eval()


def state_of_its_own(model: ReMoEForCausalLM) -> ReMoEForCausalLM:
    """The model, whose routers have neither the same state nor scales of one."""
    for number, layer in enumerate(model.model.layers):
        if not layer.is_dense and model.config.router_type != "hash":
            router = layer.mlp.router
            for name, tensor in router.state_dict().items():
                if name in ("thresholds", "gate_scale", "load"):
                    spread = torch.linspace(0.5, 1.5, len(tensor) + number)
                    tensor.copy_(spread[-len(tensor) :])
    return model


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


def code(function) -> str:
    """The source of a function's body without its docstring."""
    lines = inspect.getsource(function)
    return textwrap.dedent(lines.split('"""')[2])


@pytest.mark.parametrize(
    "name",
    [
        "at_least_fp32",
        "at_least_one",
        "expert_threshold_routing",
        "hash_routing",
        "l1_of_sums",
        "l1_regularization",
        "load_weights",
        "_mix",
        "relu_l2_initial_scale",
        "relu_l2_penalized",
        "relu_l2_routing",
        "relu_rms_routing",
        "relu_routing",
        "top_p_routing",
    ],
)
def test_the_copied_equations_are_those_of_the_package(name):
    places = (routing, regularization, relu_rms, relu_l2, top_p, expert_threshold, hashed)
    original = next(getattr(place, name) for place in places if hasattr(place, name))
    copied = getattr(modeling_remoe, name)
    assert code(copied) == code(original)
    defaults = [value.default for value in inspect.signature(original).parameters.values()]
    assert [v.default for v in inspect.signature(copied).parameters.values()] == defaults


def test_the_copied_constants_are_those_of_the_package():
    for name in ("_BITS", "_FACTORS"):
        assert getattr(modeling_remoe, name) == getattr(hashed, name)
    by_budget = [name for name, routing in ROUTINGS.items() if routing.budget == "l1"]
    assert list(configuration_remoe.L1_ROUTERS) == by_budget


@pytest.mark.parametrize("router", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_selects_as_the_package(router, dtype):
    model = state_of_its_own(build(router_type=router, top_p_odds=[0.4, 1.7])).to(dtype)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    for odds, layer in zip((0.4, 1.7), (0, 2), strict=True):
        module = model.model.layers[layer].mlp.router
        with torch.no_grad():
            probs, active, penalized, _ = module(x)
            logits = x.float() @ module.weight.float().T
        tensors = {**module.state_dict(), "odds": torch.tensor(odds)}
        settings = ROUTINGS[router]()
        if router == "null_experts":
            assert logits.shape == (50, 8)
            expected = null_experts.null_experts_routing(logits, num_experts=4, topk_of_all=4)
        else:
            expected = settings.select(logits, tensors, topk=2)
        assert torch.equal(active, expected[1])
        torch.testing.assert_close(probs, expected[0])
        assert 0 < active.float().mean() < 1
        assert (penalized is not None) == (settings.budget == "l1")
        if penalized is not None:
            torch.testing.assert_close(penalized, settings.penalized(logits, probs))


def test_a_hash_router_hashes_as_that_of_megatron():
    """The seed is Megatron's number of a layer, which counts dense ones and begins with 1."""
    model, ids = build(router_type="hash"), some_tokens(2, 9)
    with torch.no_grad():
        output = model(ids, output_routing=True)
    for layer, probs in zip((0, 2), output.router_probs, strict=True):
        expected, _ = ROUTINGS["hash"]().select_by_id(
            ids.flatten(), num_experts=4, topk=2, layer_number=layer + 1
        )
        assert torch.equal(probs.flatten(0, 1), expected)
    assert not torch.equal(*output.router_probs)
    with pytest.raises(ValueError, match="the router is hash, which reads the ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


EXPORTED = {
    setting.name: setting
    for routing in ROUTINGS.values()
    for setting in settings_of(routing)
    if setting.exported
}.values()
VALUES = (
    *(-1, 0, 0.5, 1, 1.0, 2, 1.5, float("nan"), float("inf"), True, [1]),
    *("none", "aux_loss", "squared", "global_batch"),
)


@pytest.mark.parametrize("setting", EXPORTED, ids=lambda setting: setting.name)
def test_the_copied_settings_are_those_of_the_package(setting):
    assert getattr(ReMoEConfig, setting.name) == setting.default
    for value in VALUES:
        assert is_refused(setting.check, value) == is_refused(
            lambda value: ReMoEConfig(**SIZES | {setting.name: value}), value
        ), value


def is_refused(take, value) -> bool:
    try:
        take(value)
    except ValueError:
        return True
    return False


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("router", [*ROUTERS, "top_p"])
@pytest.mark.parametrize(("cell", "projection"), [("gru", "layer"), ("rnn", "shared")])
def test_a_recurrent_model_generates_with_a_cache_and_checkpoints_gradients(
    router, cell, projection
):
    """The state runs over depth, so that decoding keeps nothing of it."""
    model = build(
        router_type=router, recurrence=cell, recurrent_size=8, recurrent_projection=projection
    )
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    assert torch.allclose(whole[:, 8:], rest, atol=1e-4)
    model.train()
    plain = gradients(model, ids)
    assert all(gradient.any() for name, gradient in plain.items() if "cell" in name)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in gradients(model, ids).items():
            assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-6), name


def test_a_recurrent_model_is_the_layers_for_torch(tmp_path):
    """Its blocks are compared with `ReMoELayer`, in bf16 too, and it is saved with an fp32 cell."""
    changes = {"recurrence": "gru", "recurrent_size": 8, "num_experts_per_tok": 1}
    model = build(**changes).bfloat16()
    config = remoe.ReMoELayerConfig(
        hidden_size=32, ffn_hidden_size=24, num_experts=4, recurrence="gru", recurrent_size=8
    )
    layer = remoe.ReMoELayer(config).bfloat16()
    layer.recurrent_cell.load_state_dict(model.model.recurrent_cell.state_dict())
    block = model.model.layers[0].mlp
    with torch.no_grad():
        layer.router.copy_(block.router.weight)
        layer.projection.copy_(block.router.projection)
        layer.gate_up.copy_(block.experts.gate_up_proj)
        layer.down.copy_(block.experts.down_proj)
    x, state = torch.randn(2, 5, 32, dtype=torch.bfloat16), torch.randn(10, 8)
    with torch.no_grad():
        ours, after = layer(x, state.view(2, 5, 8))
        theirs, *_, state = block(x, state, model.model.recurrent_cell)
    assert torch.equal(after.view_as(state), state)
    assert torch.allclose(ours, theirs, rtol=2e-2, atol=1e-2)  # sums in another order
    model.save_pretrained(tmp_path)
    loaded = ReMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        assert parameter.dtype == (torch.float32 if "cell" in name else torch.bfloat16)


def test_the_cell_of_a_recurrent_model_may_be_on_another_device_than_its_layers(tmp_path):
    """Accelerate moves what a layer is given, and a module on the disk cannot be moved."""
    model = build(recurrence="gru", recurrent_size=8)
    model.save_pretrained(tmp_path / "model")
    parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    loaded = ReMoEForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(parts, "cpu") | {"model.recurrent_cell": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    assert loaded.model.recurrent_cell.weight_hh.is_meta
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_recurrent_model_generates_alike_with_padding_and_beams(router):
    model = build(router_type=router, recurrence="gru", recurrent_size=8)
    ids = torch.randint(1, 64, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        plain = model.generate(ids, num_beams=beams, use_cache=False, **ask)
        left = model.generate(padded, attention_mask=mask, num_beams=beams, **ask)
        assert torch.equal(left[:, 3:], plain)


def test_registered_with_the_auto_classes():
    config = ReMoEConfig(**SIZES)
    assert type(AutoModelForCausalLM.from_config(config)) is ReMoEForCausalLM
    assert type(AutoModel.from_config(config)) is ReMoEModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_type": "soft"}, "router_type is 'soft'.* must be one of relu, relu_rms"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 of 4 experts"),
        ({"l1_coeff": [0.1]}, "l1_coeff has 1 values for 2 layers"),
        ({"router_dtype": "int8"}, "router_dtype is 'int8'"),
        ({"load_balancing": "some"}, "load_balancing is 'some'"),
        ({"top_p_odds": [0.1]}, "top_p_odds has 1 values for 2 layers"),
        ({"router_type": "null_experts", "num_null_experts": 3}, r"3; k \(E \+ n\) / E must be"),
        ({"router_type": "hash", "recurrence": "gru"}, "recurrence is 'gru'; a hash router"),
    ],
)
def test_a_wrong_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReMoEConfig(**(SIZES | changes))


def test_topk_before_and_after_the_softmax_by_hand():
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    weights = logits.exp()
    pre, active = modeling_remoe.topk_pre_softmax(logits, 2)
    torch.testing.assert_close(pre, weights / weights.sum() * torch.tensor([0.0, 0, 1, 1]))
    assert active.tolist() == [[False, False, True, True]]
    post, active = modeling_remoe.topk_post_softmax(logits, 2)
    chosen = weights * torch.tensor([0.0, 0, 1, 1])
    torch.testing.assert_close(post, chosen / chosen.sum())
    assert active.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("router", [*ROUTERS, *SELECTIONS])
def test_a_block_is_the_sum_of_its_active_experts_also_in_backward(router):
    config = ReMoEConfig(**(SIZES | {"router_type": router, "router_dtype": "float64"}))
    block = modeling_remoe.ReMoEBlock(config, 0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    x = (x + torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]).requires_grad_()
    y, probs, active, *_ = block(x)
    inputs = [x, *block.parameters()]
    ours = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    dense = torch.zeros_like(y)
    for e in range(4):
        gate, up = (x @ block.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T
        dense = dense + probs[..., e, None] * out
    torch.testing.assert_close(y, dense)
    theirs = torch.autograd.grad(dense.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(active, probs != 0)
    assert 0 < active.float().mean() < 1


def one_after_another(experts, x, active, probs):
    """The experts in a loop, each of which adds to its tokens."""
    y = torch.zeros_like(x)
    for e, chosen in enumerate(active.T):
        tokens = chosen.nonzero()[:, 0]
        gate, up = torch.nn.functional.linear(x[tokens], experts.gate_up_proj[e]).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out = torch.nn.functional.linear(hidden, experts.down_proj[e])
        y = y.index_add(0, tokens, out * probs[tokens, e, None])
    return y


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_experts_are_those_of_a_loop_bit_by_bit(tokens, share):
    """One token as in decoding, too; some without any expert, and experts without tokens."""
    torch.manual_seed(tokens)
    experts = modeling_remoe.ReMoEExperts(ReMoEConfig(**SIZES | {"num_experts": 6}))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(tokens, 32, requires_grad=True)
    active = torch.rand(tokens, 6) < share
    active[:, 2] = share == 1
    probs = (torch.rand(tokens, 6) * active).requires_grad_()
    expected = one_after_another(experts, x, active, probs)
    with torch.no_grad():
        assert torch.equal(experts(x, active, probs), expected)
    found = experts(x, active, probs)
    assert torch.equal(found, expected)
    inputs = (x, probs, *experts.parameters())
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    narrow = (experts.bfloat16(), x.bfloat16(), active, probs.bfloat16())
    wide = 2**-6 * expected.abs().max().item()  # the loop rounds every partial sum
    torch.testing.assert_close(
        narrow[0](*narrow[1:]), one_after_another(*narrow), rtol=0.02, atol=wide
    )


def test_experts_cost_what_they_use():
    experts = modeling_remoe.ReMoEExperts(ReMoEConfig(**SIZES))
    for parameter in experts.parameters():
        torch.nn.init.ones_(parameter)
    x, active = torch.ones(10, 32), torch.zeros(10, 4, dtype=torch.bool)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            experts(x, active, active.float())
        return counter.get_total_flops()

    assert flops() == 0
    active[:3, 0] = active[5, 2] = True
    assert flops() == 4 * 2 * 3 * 32 * 24  # 4 pairs, multiply and add, 3 matrices of H x F


@pytest.mark.parametrize("router", [*ROUTERS, *SELECTIONS, "hash"])
def test_with_a_cache_logits_are_those_of_the_whole_text(router):
    model, tokens = state_of_its_own(build(router_type=router)), some_tokens(2, 9)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_attention_implementations_agree():
    tokens = some_tokens(2, 9)
    logits = {}
    for name in ("eager", "sdpa"):
        model = build()
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(tokens).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["relu", *SELECTIONS, "hash"])
def test_a_batch_with_left_padding_generates_what_each_prompt_generates(router):
    model = state_of_its_own(build(pad_token_id=0, router_type=router))
    tokens = some_tokens(2, 6)
    request = {"do_sample": False, "max_new_tokens": 8}
    short = tokens[:1, 2:]
    alone = [
        model.generate(t, attention_mask=torch.ones_like(t), **request)[0, t.shape[1] :]
        for t in (short, tokens[1:])
    ]
    batch, mask = tokens.clone(), torch.ones_like(tokens)
    batch[0, :2] = mask[0, :2] = 0
    together = model.generate(batch, attention_mask=mask, **request)[:, 6:]
    assert torch.equal(together, torch.stack(alone))


def test_sampling_follows_the_seed():
    model, tokens = build(), some_tokens(1, 4)
    request = {"do_sample": True, "max_new_tokens": 8, "attention_mask": torch.ones_like(tokens)}

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(tokens, **request)[0].tolist()

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_loss_is_the_cross_entropy_and_in_training_the_penalty():
    coeffs = [0.5, 0.25]
    model, tokens = build(l1_coeff=coeffs), some_tokens(2, 9)
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.penalty is None

    output = model.train()(tokens, labels=tokens, output_routing=True)
    penalty = 0.0
    for coeff, probs in zip(coeffs, output.router_probs, strict=True):
        flat = probs.flatten(0, 1)
        load = remoe.load_weights((flat > 0).sum(dim=0), num_tokens=18, topk=2)
        penalty += coeff * remoe.l1_regularization(flat, num_tokens=18, load_weights_E=load)
    torch.testing.assert_close(output.penalty, penalty)
    torch.testing.assert_close(output.loss, expected + penalty)


@pytest.mark.parametrize("balancing", ["aux_loss", "squared", "global_batch", "none"])
@pytest.mark.parametrize("router", ["relu", "relu_rms", "relu_l2"])
def test_the_penalty_of_a_router_is_that_of_the_package(router, balancing):
    model = build(router_type=router, load_balancing=balancing, l1_coeff=[0.5, 0.25]).train()
    state_of_its_own(model)
    seen, tokens = [], some_tokens(2, 9)
    for layer in (0, 2):
        module = model.model.layers[layer].mlp.router
        module.register_forward_hook(
            lambda module, given, out: seen.append((module, given[0], *out))
        )
    l1_reg = model(tokens, labels=tokens).l1_reg
    for (module, x, probs, active, *_), found in zip(seen, l1_reg, strict=True):
        settings = ROUTINGS[router](load_balancing=balancing)
        expected = settings.regularizer(
            x.float() @ module.weight.T,
            probs,
            module.state_dict(),
            counts=TokenCounts(torch.tensor([18, *active.sum(dim=0).tolist()])),
            topk=2,
        )
        torch.testing.assert_close(found, expected.detach().float())


def test_loads_and_coefficients_of_layers_move_by_what_was_routed():
    model = build(
        load_balancing="global_batch",
        l1_coeff=[0.5, 0.25],
        l1_coeff_per_layer=True,
        target_sparsity=0.5,
    ).train()
    with torch.no_grad():  # the first layer is dense, the last one sparse
        for layer, size in ((0, 1.0), (2, -1.0)):
            router = model.model.layers[layer].mlp.router
            router.weight.copy_(0.05 * router.weight)
            model.model.layers[layer].post_attention_layernorm.weight.fill_(1)
            router.register_forward_pre_hook(lambda _, given, size=size: (given[0] + size, None))
            router.weight.add_(0.02)
    routing = []
    for half in some_tokens(4, 9).split(2):
        routing.append(model(half, labels=half, output_routing=True).router_probs)
    model.update_l1_coeff()
    active = [torch.cat([p[layer] for p in routing]).flatten(0, 1) > 0 for layer in (0, 1)]
    assert active[0].float().mean() > 0.5 > active[1].float().mean()
    assert model.config.l1_coeff == pytest.approx([0.5 * 1.2, 0.25 / 1.2])
    for layer, chosen in zip((0, 2), active, strict=True):
        load = remoe.load_weights(chosen.sum(dim=0), num_tokens=36, topk=2)
        torch.testing.assert_close(model.model.layers[layer].mlp.router.load, load)


def test_the_penalty_is_not_of_padding():
    model, tokens = build(l1_coeff=[1.0, 1.0], load_balancing="none").train(), some_tokens(1, 6)
    alone = model(tokens[:, 2:]).l1_reg
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    padded = model(tokens, attention_mask=mask, position_ids=positions).l1_reg
    torch.testing.assert_close(alone, padded)


def test_routing_is_what_the_layers_did():
    model, tokens = build(), some_tokens(2, 9)
    with torch.no_grad():
        output = model(tokens, output_routing=True)
    assert [p.shape for p in output.router_probs] == [(2, 9, 4)] * 2  # the middle layer is dense
    counts = [(probs > 0).sum(dim=-1) for probs in output.router_probs]
    assert all(map(torch.equal, output.active_experts, counts))
    assert len({int(n) for count in counts for n in count.flatten()}) > 1
    assert model(tokens).router_probs is None


def test_gradient_checkpointing_changes_no_gradient():
    tokens, gradients = some_tokens(2, 9), []
    for enabled in (False, True):
        model = build(l1_coeff=[0.1, 0.1]).train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_trains_with_the_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(1, 12).repeat(16, 1)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = build(l1_coeff=[1e-3, 1e-3], initializer_range=0.05)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert not torch.equal(before, model.model.layers[0].mlp.experts.down_proj)


def test_saved_and_loaded_alike_also_in_bf16(tmp_path):
    model, tokens = build(l1_coeff=[1e-8 / 3, 0.1]), some_tokens(1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.l1_coeff == [1e-8 / 3, 0.1]
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert narrow(tokens).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("router", "name"),
    [("expert_threshold", "thresholds"), ("relu_rms", "load"), ("relu_l2", "gate_scale")],
)
def test_the_state_of_a_router_is_saved_and_keeps_its_dtype(tmp_path, router, name):
    changes = {"router_type": router, "load_balancing": "global_batch"}
    model = state_of_its_own(build(**changes))
    with torch.no_grad():
        getattr(model.model.layers[0].mlp.router, name)[0] = 1 / 3
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = getattr(model.model.layers[0].mlp.router, name).detach().clone()
    for found in (narrow, build(**changes), model.bfloat16()):
        tensor = getattr(found.model.layers[0].mlp.router, name)
        if name == "gate_scale":
            assert tensor.dtype == found.dtype
        else:
            assert tensor.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(getattr(again.model.layers[0].mlp.router, name), expected)
    if name != "gate_scale":
        assert torch.equal(getattr(narrow.model.layers[0].mlp.router, name), expected)


def test_a_new_router_starts_as_that_of_the_package():
    for router in ("relu_rms", "relu_l2"):
        module = build(router_type=router).model.layers[0].mlp.router
        start = ROUTINGS[router]().parameters(4, 2)["gate_scale"]
        assert torch.equal(module.gate_scale.detach(), start)
    config = ReMoEConfig(**SIZES | {"router_type": "top_p"})
    assert config.top_p_odds == [ROUTINGS["top_p"]().buffers(4, 2)["odds"].item()] * 2


WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("remoe", "megatron"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import builtins, os
builtins.input = lambda question: os._exit(3)
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
assert tokenizer("relu the").input_ids == [1, 0]
assert "transformers_modules" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "remoe" not in sys.modules
print(type(model).__module__.split(".")[0], sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.processes
def test_an_exported_folder_loads_where_this_package_is_missing(tmp_path):
    model = build()
    model.config.auto_map = {
        "AutoConfig": "configuration_remoe.ReMoEConfig",
        "AutoModelForCausalLM": "modeling_remoe.ReMoEForCausalLM",
    }
    model.save_pretrained(tmp_path / "model")
    vocabulary = Tokenizer(
        models.WordLevel({"the": 0, "relu": 1, "<|endoftext|>": 2}, unk_token="the")
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    TokenizerFiles(tmp_path / "tokenizer.json").write(tmp_path / "model")
    for source in Path(modeling_remoe.__file__).parent.glob("*_remoe.py"):
        shutil.copyfile(source, tmp_path / "model" / source.name)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_US, str(tmp_path / "model")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    count = sum(p.numel() for p in model.parameters())
    assert done.stdout.split() == ["transformers_modules", str(count)]


@pytest.mark.processes
def test_the_example_trains_on_under_control(tmp_path):
    """The coefficient starts where the config left it and follows the rule; both are saved."""
    words = ["the", "router", "is", "a", "relu"]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="the"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path / "model")
    build(l1_coeff=[1e-3, 1e-3], target_sparsity=0.5).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(words) * 30)

    example = Path(__file__).parents[1] / "examples/continue_training.py"
    argv = ["model", "text", "--out", "new", "--steps", "3", "--length", "16", "--batch", "2"]
    command = [sys.executable, "-W", "ignore", str(example), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    coeff = torch.tensor(1e-3)
    for line in done.stdout.splitlines():
        sparsity = float(line.split()[4])
        coeff = coeff * 1.2 if sparsity < 0.5 else coeff / 1.2
        assert float(line.split()[6]) == pytest.approx(float(coeff), rel=1e-2)
    assert len(done.stdout.splitlines()) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert again.config.l1_coeff == pytest.approx([float(coeff)] * 2)
