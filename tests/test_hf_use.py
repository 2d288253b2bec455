"""The transformers model in use: generation, padding, training, saving and casting."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.masking_utils import create_causal_mask

import remoe
from remoe.hf import ReMoEConfig, ReMoEForCausalLM, modeling_remoe
from tests.test_hf import SIZES, build, some_tokens

COEFFS = [0.1, 0.2]


@pytest.fixture
def warned(caplog):
    modeling_remoe.logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records]


def trained(**changes) -> ReMoEForCausalLM:
    return build(**({"l1_coeff": COEFFS} | changes)).train()


def gradients(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*args, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A text of four tokens, the same with three of padding, and its mask."""
    text, pads = some_tokens(1, 4), (3, 0) if left else (0, 3)
    return text, F.pad(text, pads), F.pad(torch.ones_like(text), pads)


# Values and names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": -4, "num_experts_per_tok": -5}, "num_experts is -4; it must be a whole"),
        ({"num_experts": "4"}, "num_experts is '4'; it must be a whole number"),
        ({"num_experts": True, "num_experts_per_tok": 1}, "num_experts is True"),
        ({"num_experts_per_tok": 1.5}, "num_experts_per_tok is 1.5"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide .*, 4"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"max_active_experts": 0}, "max_active_experts is 0"),
        ({"at_least_one_expert": "no"}, "at_least_one_expert is 'no'"),
        ({"max_active_experts": [2, 1, 1]}, "max_active_experts has 3 values for 2 layers"),
        (
            {"router_type": "topk_sigmoid", "max_active_experts": 2},
            "max_active_experts is 2, .* of the routers relu, relu_rms, relu_l2, and router",
        ),
        ({"router_type": "hash", "gate_offset": 0.1}, "gate_offset is 0.1, .* router_type is hash"),
        ({"gate_threshold": -0.1}, "gate_threshold is -0.1; it must be a number that is not neg"),
        (
            {"gate_threshold": [-0.1, float("nan")]},
            "gate_threshold is .*; it must be a number that",
        ),
        ({"gate_threshold": [0.1, "x"]}, "gate_threshold is .*; it must be a number that is"),
        ({"gate_offset": float("inf")}, "gate_offset is inf; it must be a number, or a list"),
        ({"router_type": "top_p", "at_least_one_expert": True}, "at_least_one_expert is True, wh"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\]; .* from 0 to 2"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers is '1'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"target_sparsity": 1.0}, "target_sparsity is 1.0; .* below 1"),
        ({"l1_coeff_init": 0.0}, "l1_coeff_init is 0.0"),
        ({"l1_coeff_multiplier": 1.0}, "l1_coeff_multiplier is 1.0; .* above 1"),
        ({"l1_coeff": [0.1, float("nan")]}, r"l1_coeff is \[0.1, nan\]"),
        ({"l1_coeff": 0.1}, "l1_coeff is 0.1; it must be a list"),
        ({"pad_token_id": -1}, "pad_token_id is -1 of a vocabulary of 64"),
        ({"format_version": 3}, "format_version is 3; this code reads only 1 and 2: update it"),
        ({"router_bias": True}, "router_bias is True, which this code does not have any more"),
        ({"l1_coeff_rule": "pi"}, "l1_coeff_rule is 'pi', which this code does not have any more"),
        ({"l1_coef": COEFFS}, "'l1_coef' is not known; did you mean 'l1_coeff'"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReMoEConfig(**(SIZES | changes))


def test_settings_of_other_tools_pass():
    assert ReMoEConfig(**SIZES, tool_version="3").tool_version == "3"
    assert ReMoEConfig(**SIZES, router_bias=False, l1_coeff_rule="sign", l1_coeff_memory=None)
    assert ReMoEConfig.from_dict(ReMoEConfig(**SIZES).to_dict()).format_version == 1


def test_a_misspelt_argument_is_refused_and_that_of_a_tool_is_not():
    model, tokens = build(), some_tokens(1, 4)
    with pytest.raises(ValueError, match="'output_routng' is not known; did you mean"):
        model(tokens, output_routng=True)
    with pytest.raises(ValueError, match="output_routng"):
        model.generate(tokens, output_routng=True, max_new_tokens=1)
    with pytest.raises(ValueError, match="generate does not return the routing"):
        model.generate(tokens, output_routing=True, max_new_tokens=1)
    assert torch.equal(model(tokens, token_type_ids=tokens).logits, model(tokens).logits)


# Generation


def test_caches_and_beams_agree_with_each_text_alone():
    """Left padding, dynamic, static and no cache, and beams of which some end early.

    The beams are those of a model with a budget.
    """
    model, tokens = build(pad_token_id=0, eos_token_id=5), some_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    batch = tokens * mask
    for beams, threshold in ((1, None), (3, 0.3)):
        model.config.gate_threshold = threshold
        request = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams}
        dynamic = model.generate(batch, attention_mask=mask, **request)
        without = model.generate(batch, attention_mask=mask, use_cache=False, **request)
        static = model.generate(
            batch, attention_mask=mask, cache_implementation="static", **request
        )
        assert torch.equal(dynamic, without)
        assert torch.equal(dynamic, static)
        for row, text in enumerate((tokens[:1, 2:], tokens[1:])):
            alone = model.generate(text, attention_mask=torch.ones_like(text), **request)
            new = alone[0, text.shape[1] :]
            assert torch.equal(dynamic[row, 6 : 6 + len(new)], new)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_no_logits(left):
    model = build(pad_token_id=0, gate_threshold=0.2)
    text, batch, mask = padded(left)
    with torch.no_grad():
        alone = model(text).logits
        logits = model(batch, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, alone[0], rtol=1e-4, atol=1e-4)


def test_text_goes_on_from_a_cache_and_from_embeddings():
    model, tokens = build(pad_token_id=0), some_tokens(2, 6)
    request = {"do_sample": False, "return_dict_in_generate": True}

    def generate(new_tokens: int, *inputs, **more):
        return model.generate(*inputs, max_new_tokens=new_tokens, **request, **more)

    mask = torch.ones_like(tokens)
    whole = generate(8, tokens, attention_mask=mask).sequences
    half = generate(4, tokens, attention_mask=mask)
    rest = generate(
        4,
        half.sequences,
        attention_mask=torch.ones_like(half.sequences),
        past_key_values=half.past_key_values,
    )
    assert torch.equal(rest.sequences, whole)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(generate(8, inputs_embeds=embeds).sequences, whole[:, 6:])
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embeds)


def test_assisted_generation_is_greedy_generation():
    model, tokens = build(pad_token_id=0), some_tokens(1, 6)
    request = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    greedy = model.generate(tokens, **request)
    helper = build(num_hidden_layers=1, mlp_only_layers=None, pad_token_id=0)
    assert torch.equal(greedy, model.generate(tokens, assistant_model=helper, **request))
    assert torch.equal(greedy, model.generate(tokens, prompt_lookup_num_tokens=2, **request))


def test_the_pipeline_gives_the_same_in_batches():
    words = ["<pad>", *(f"w{i}" for i in range(63))]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", padding_side="left"
    )
    run = pipeline("text-generation", model=build(pad_token_id=0), tokenizer=tokenizer)
    texts, request = ["w3 w9", "w1 w5 w2 w60 w8"], {"max_new_tokens": 5, "do_sample": False}
    assert run(texts, **request) == run(texts, batch_size=2, **request)


def test_hidden_states_and_attentions_are_of_every_layer(warned):
    model, tokens = build(), some_tokens(2, 5)
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert output.attentions == ()
    assert any("sdpa attention does not return its weights" in text for text in warned())
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, 4, 5, 5)] * 3
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")


# Padding


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["two", "four", "additive"])
def test_padding_is_in_no_statistic_and_no_gradient(left, kind):
    model = trained(pad_token_id=0)
    text, batch, mask = padded(left)
    alone = gradients(model, text, labels=text)
    penalty, counted = model(text).penalty, model.model.routed / 2
    labels = batch.masked_fill(mask == 0, -100)
    labels[mask.argmax(dim=1, keepdim=True) == torch.arange(7)] = -100  # padding predicts it
    if kind != "two":
        prepared = create_causal_mask(
            model.config, model.get_input_embeddings()(batch), mask, past_key_values=None
        )
        lowest = torch.zeros(prepared.shape).masked_fill(~prepared, torch.finfo().min)
        mask = prepared if kind == "four" else lowest
    model.model.routed = None
    inputs = {"attention_mask": mask, "labels": labels}
    together = gradients(model, batch, **inputs)
    assert torch.equal(model.model.routed, counted)
    torch.testing.assert_close(model(batch, **inputs).penalty, penalty)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_padding_without_a_mask_is_warned_of(warned, monkeypatch):
    model, seen = trained(pad_token_id=0), []
    monkeypatch.setattr(
        type(model),
        "warn_if_padding_and_no_attention_mask",
        lambda self, *given: seen.append(given),
    )
    _, batch, _ = padded(left=False)
    model(batch, labels=batch)
    assert seen == [(batch, None)]


def test_the_padding_token_learns_where_it_is_no_padding():
    """Exported tokenizers without a padding token pad with the one that ends texts."""
    tokens = some_tokens(2, 9)
    tokens[:, 4] = 7
    name = "model.embed_tokens.weight"
    plain = gradients(trained(), tokens, labels=tokens)[name]
    same = gradients(trained(pad_token_id=7), tokens, labels=tokens)[name]
    assert plain[7].abs().max() > 0
    torch.testing.assert_close(same, plain)


def test_packed_texts_do_not_see_each_other_in_training():
    model, tokens = trained(), some_tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    packed = model(tokens, position_ids=positions).logits
    alone = [model(text).logits for text in (tokens[:, :5], tokens[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


# Training


def test_labels_that_are_shifted_or_ignored_are_heeded():
    model, tokens = build(), some_tokens(2, 9)
    logits = model(tokens).logits
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    shifted[:, 2:5] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(model(tokens, labels=tokens, shift_labels=shifted).loss, expected)
    labels = tokens.clone()
    labels[:, 3:6] = 77
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=77
    )
    torch.testing.assert_close(model(tokens, labels=labels, ignore_index=77).loss, expected)


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_micro_batches_of_a_step_add_up(given):
    model, tokens = trained(load_balancing="none"), some_tokens(4, 9)
    more = {"labels": tokens}
    if given == "shift_labels":
        more["shift_labels"] = F.pad(tokens[:, 1:], (0, 1), value=-100)
        more["shift_labels"][:, 2:5] = -100
    whole = gradients(model, tokens, **more)
    num_items = (more["shift_labels"] != -100).sum() if given == "shift_labels" else 32
    summed = {name: torch.zeros_like(g) for name, g in whole.items()}
    for rows in (slice(2), slice(2, 4)):
        part = {name: value[rows] for name, value in more.items()}
        found = gradients(model, tokens[rows], **part, num_items_in_batch=num_items)
        for name, gradient in found.items():
            summed[name] += gradient
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coeffs", [None, COEFFS])
def test_a_layer_without_an_active_pair_has_gradients_of_zero(coeffs):
    model, tokens = trained(l1_coeff=coeffs), some_tokens(2, 9)
    silent = model.model.layers[0].mlp
    torch.nn.init.zeros_(silent.router.weight)
    found = gradients(model, tokens, labels=tokens)  # None has no clone
    assert not any(found[f"model.layers.0.mlp.{n}"].any() for n, _ in silent.named_parameters())
    assert found["model.layers.2.mlp.experts.down_proj"].any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_the_routing_once(reentrant):
    tokens, found = some_tokens(2, 9), []
    for enabled in (False, True):
        model = trained()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append((gradients(model, tokens, labels=tokens), model.model.routed))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][1][:, 0].tolist() == [2 * 9] * 2


def test_generation_under_gradient_checkpointing_is_right_or_refused():
    model, tokens = trained(pad_token_id=0), some_tokens(1, 6)
    model.gradient_checkpointing_enable()
    request = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="gradient checkpointing has no cache in training mode"):
        model.generate(tokens, **request)
    without = model.generate(tokens, use_cache=False, **request)
    assert torch.equal(without, model.eval().generate(tokens, **request))


@pytest.mark.parametrize("target", [0.01, 0.99])
def test_the_coefficient_moves_as_in_pretraining(target):
    """Over all tokens of a step, by the package's rule; evaluation does not count."""
    model, tokens = trained(target_sparsity=target, l1_coeff=[1e-8 / 3, 0.1]), some_tokens(4, 9)
    assert model.update_l1_coeff() is None
    rule = remoe.ControllerConfig(target_sparsity=target)
    expected = torch.tensor(model.config.l1_coeff)
    for _ in range(3):
        active = []
        for half in tokens.split(2):
            active += model(half, labels=half, output_routing=True).active_experts
        with torch.no_grad():
            model(tokens[:1])
        model.eval()(tokens[:1])
        model.train()
        sparsity = 1 - torch.stack(active).float().mean() / 4
        assert model.update_l1_coeff() == pytest.approx(sparsity.item())
        expected = remoe.next_l1_coeff(expected, sparsity, rule)
        assert model.config.l1_coeff == expected.tolist()
    batch = {"attention_mask": torch.zeros_like(tokens), "labels": torch.full_like(tokens, -100)}
    model(tokens, **batch)
    before = model.config.l1_coeff
    assert model.update_l1_coeff() is None
    assert model.config.l1_coeff == before


def test_bounds_of_a_token_do_not_mislead_the_coefficient():
    """As in pretraining, what the router activates is penalized and counted."""
    tokens, found = some_tokens(2, 9), []
    for bounds in ({}, {"max_active_experts": 1, "at_least_one_expert": True}):
        model = trained(**bounds)
        output = model(tokens, labels=tokens, output_routing=True)
        found.append((output.l1_reg[0].item(), model.model.routed[0].tolist()))
        counts = output.active_experts[0]
    assert (counts == 1).all() and sum(found[0][1][1:]) != counts.sum()
    assert found[0] == found[1]


def test_the_coefficient_moves_by_the_tokens_of_all_processes(monkeypatch):
    model, tokens = trained(target_sparsity=0.9), some_tokens(2, 9)
    model(tokens, labels=tokens)
    routed = model.model.routed
    active, pairs = routed[:, 1:].sum().item(), routed[:, 0].sum().item() * 4
    assert 1 - active / pairs < 0.9  # alone, the coefficient would rise
    others = torch.zeros_like(routed)
    others[:, 0] = 99 * routed[:, 0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(others))
    assert model.update_l1_coeff() == pytest.approx(1 - active / pairs / 100)
    assert model.config.l1_coeff == pytest.approx([c / 1.2 for c in COEFFS])


def trainer(folder, model, **changes) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(16, 12)]
    return Trainer(model, arguments, train_dataset=rows, callbacks=[model.sparsity_callback()])


@pytest.mark.parametrize("restore", [False, True])
def test_the_trainer_moves_the_coefficient_once_per_step_and_resumes_it(tmp_path, restore):
    model = trained(target_sparsity=0.99, l1_coeff=None)
    trainer(tmp_path, model).train()
    assert model.config.l1_coeff == pytest.approx([1e-8 * 1.2**4] * 2)
    saved = ReMoEConfig.from_pretrained(tmp_path / "checkpoint-3")
    assert saved.l1_coeff == pytest.approx([1e-8 * 1.2**3] * 2)
    again = trained(target_sparsity=0.99, l1_coeff=None)
    trainer(tmp_path, again, restore_callback_states_from_checkpoint=restore).train(
        resume_from_checkpoint=tmp_path / "checkpoint-3"
    )
    assert again.config.l1_coeff == model.config.l1_coeff
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_loss_of_the_trainer_without_the_penalty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.1"):
        trainer(tmp_path, trained(), label_smoothing_factor=0.1).train()
    assert not list(tmp_path.iterdir())


def test_what_training_would_miss_in_silence_is_said(warned):
    model, tokens = trained(), some_tokens(1, 3)
    for moves in (True, False):
        for _ in range(modeling_remoe.UNMOVED_STEPS):
            assert not any("have not moved" in text for text in warned())
            model(tokens, labels=tokens)
            if moves:
                model.update_l1_coeff()
    assert sum("call model.update_l1_coeff() after" in text for text in warned()) == 1
    model.generate(tokens, max_new_tokens=2)
    assert not any("without labels" in text for text in warned())
    model(tokens)
    assert any("add output.penalty to your own" in text for text in warned())


def test_layers_on_several_devices_train():
    """Devices are pretended; layers bring their inputs to their own, as accelerate makes them."""

    def bring(layer: torch.nn.Module) -> None:
        device = next(layer.parameters()).device

        def moved(value):
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return value.to(device) if isinstance(value, torch.Tensor) else value

        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (moved(args), {n: moved(v) for n, v in kwargs.items()}),
            with_kwargs=True,
        )

    def dense(self, x_TH, active_TE, probs_TE):  # pretended tensors cannot be selected by value
        return x_TH * probs_TE.sum(1, keepdim=True) * self.down_proj.sum()

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_remoe.ReMoEExperts, "forward", dense)
        parts = []
        for name in ("cuda:0", "cuda:1"):
            with torch.device(name):
                parts.append(ReMoEForCausalLM(ReMoEConfig(**SIZES, l1_coeff=COEFFS)))
        model, other = parts
        model.model.layers[2], model.model.norm = other.model.layers[2], other.model.norm
        model.lm_head = other.lm_head
        for layer in (*model.model.layers, model.model.norm, model.lm_head):
            bring(layer)
        tokens = torch.ones(2, 6, dtype=torch.long, device="cuda:0")
        request = {"attention_mask": torch.ones_like(tokens), "labels": tokens}
        for more in ({}, {"num_items_in_batch": torch.tensor(10, device="cuda:0")}):
            output = model.train()(tokens, **request, **more)
            assert output.loss.device == torch.device("cuda:1")


# Casting, copying and saving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_as_a_whole_keeps_the_frequencies_of_its_positions(dtype):
    model = build(max_position_embeddings=8192)
    position = torch.tensor([[8000]])
    expected = model.model.rotary_emb(torch.ones(1), position)
    model.to(dtype)
    torch.testing.assert_close(model.model.rotary_emb(torch.ones(1), position), expected)
    assert copy.deepcopy(model).float().model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_the_router_computes_in_fp32(way):
    model, seen = build(), {}
    router = model.model.layers[0].mlp.router
    router.register_forward_hook(lambda _, given, out: seen.update(x=given[0], probs=out[0]))
    if way == "cast":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        model(some_tokens(2, 9))
    expected = torch.relu(seen["x"].float() @ router.weight.float().T)
    torch.testing.assert_close(seen["probs"], expected)
    assert seen["probs"].dtype == torch.float32


def test_a_pickled_and_a_copied_model_are_the_same():
    model, tokens = build(), some_tokens(1, 5)
    model.train()(tokens)
    model.eval()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_shards_and_loaded_in_parts(tmp_path, tied):
    model = build(tie_word_embeddings=tied, l1_coeff=[1e-8 / 3, 0.1])
    tokens = some_tokens(1, 5)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places |= {"lm_head": "cpu" if tied else "disk"}
    for device_map in ("auto", places):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert again.config.l1_coeff == [1e-8 / 3, 0.1]
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.config.l1_coeff == [1e-8 / 3, 0.1]
    assert (narrow.lm_head.weight is narrow.model.embed_tokens.weight) == tied


def test_a_folder_saved_by_transformers_has_its_code(tmp_path):
    build().save_pretrained(tmp_path)
    ReMoEForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    sources = {file.name for file in Path(modeling_remoe.__file__).parent.glob("*_remoe.py")}
    assert len(sources) == 4 and sources <= set(os.listdir(tmp_path / "again"))
    names = ReMoEConfig.from_pretrained(tmp_path / "again").auto_map
    assert names["AutoModelForCausalLM"] == "modeling_remoe.ReMoEForCausalLM"
    assert names["AutoConfig"] == "configuration_remoe.ReMoEConfig"


def test_the_vocabulary_can_grow():
    tokens = some_tokens(1, 5)
    for tied in (False, True):
        model = build(tie_word_embeddings=tied)
        before = model(tokens).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        output = model(tokens, labels=tokens)
        assert torch.equal(output.logits[..., :64], before)
        assert output.logits.shape[-1] == model.config.vocab_size == 70
        assert output.loss.isfinite()


def test_a_new_model_is_initialized_everywhere():
    with torch.device("meta"):
        empty = ReMoEForCausalLM(ReMoEConfig(**SIZES))
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    torch.manual_seed(0)
    for name, parameter in build(initializer_range=0.02).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
