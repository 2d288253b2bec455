"""The conversion table: exact both ways, complete, and worked out by hand where it reorders."""

from dataclasses import replace

import pytest
import torch

from megatron.remoe.convert import table as conversion
from megatron.remoe.convert.architecture import ROUTER_TYPES
from megatron.remoe.convert.table import TABLE, check_names, plan
from remoe.config import ROUTINGS

CONFIG = {
    "model_type": "remoe",
    "router_type": "relu",
    "vocab_size": 10,
    "hidden_size": 4,
    "head_dim": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "intermediate_size": 6,
    "num_experts": 5,
    "moe_intermediate_size": 3,
    "tie_word_embeddings": False,
}


def item_of(name: str, **changes):
    return next(item for item in plan(CONFIG | changes, 12) if item.megatron.endswith(name))


OF_ROUTERS = {
    "relu": {"weight": (5, 4), "l1_coeff": ()},
    "relu_rms": {"weight": (5, 4), "gate_scale": (5,), "l1_coeff": ()},
    "relu_l2": {"weight": (5, 4), "gate_scale": (1,), "l1_coeff": ()},
    "topk_pre_softmax": {"weight": (5, 4)},
    "topk_post_softmax": {"weight": (5, 4)},
    "topk_sigmoid": {"weight": (5, 4)},
    "null_experts": {"weight": (10, 4)},
    "top_p": {"weight": (5, 4), "odds": ()},
    "expert_threshold": {"weight": (5, 4), "thresholds": (5,), "num_updates": ()},
    "hash": {},
}


@pytest.mark.parametrize("router", OF_ROUTERS)
def test_a_router_has_the_tensors_of_its_selection(router):
    for balancing in ("aux_loss", "global_batch"):
        items = plan(CONFIG | {"router_type": router, "load_balancing": balancing}, 12)
        found = {
            item.megatron.rpartition(".")[2]: item.megatron_shape
            for item in items
            if ".layers.0.mlp.router." in item.megatron
        }
        expected = OF_ROUTERS[router]
        if balancing == "global_batch" and "l1_coeff" in expected:
            expected = expected | {"load": (5,)}
        assert found == expected
        name = "topk" if router.startswith("topk") else router
        selection = ROUTINGS[name](**{"load_balancing": balancing} if "load" in found else {})
        own = selection.buffers(5, 1) | selection.parameters(5, 1)
        assert {n: tuple(t.shape) for n, t in own.items()} == {
            n: shape for n, shape in found.items() if n != "weight"
        }


def test_every_exportable_router_is_that_of_the_exported_model():
    pytest.importorskip("transformers")
    from remoe.hf import configuration_remoe

    assert set(ROUTER_TYPES) == set(configuration_remoe.ROUTER_TYPES) == set(OF_ROUTERS)


@pytest.mark.parametrize("router", OF_ROUTERS)
def test_every_item_is_undone_bit_by_bit(router):
    generator = torch.Generator().manual_seed(0)
    for item in plan(CONFIG | {"router_type": router, "load_balancing": "global_batch"}, 12):
        tensor = torch.randn(item.megatron_shape, generator=generator)
        assert torch.equal(item.to_megatron(item.to_hf(tensor)), tensor), item.megatron


def test_query_key_and_value_rows_by_hand():
    """2 groups of 2 query heads of 2 rows: q q k v, then q q k v."""
    item = item_of("layers.0.self_attention.linear_qkv.weight")
    rows = torch.arange(16.0)[:, None].expand(16, 4)
    q, k, v = (part[:, 0].tolist() for part in item.to_hf(rows).values())
    assert q == [0, 1, 2, 3, 8, 9, 10, 11]
    assert (k, v) == ([4, 5, 12, 13], [6, 7, 14, 15])


def test_gate_comes_first_in_a_dense_layer():
    item = item_of("layers.1.mlp.linear_fc1.weight")
    rows = torch.arange(12.0)[:, None].expand(12, 4)
    parts = {name.split(".")[-2]: part[:, 0].tolist() for name, part in item.to_hf(rows).items()}
    assert parts == {"gate_proj": [0, 1, 2, 3, 4, 5], "up_proj": [6, 7, 8, 9, 10, 11]}


def test_padding_of_the_vocabulary_is_set_apart():
    item = item_of("output_layer.weight")
    assert item.hf == {"lm_head.weight": (10, 4), "padding.lm_head.weight": (2, 4)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"experts", "router", "l1_coeff", "output_layer", "fc1"}),
        ({"router_type": "topk_pre_softmax"}, {"experts", "router", "output_layer", "fc1"}),
        ({"tie_word_embeddings": True}, {"experts", "router", "l1_coeff", "fc1"}),
        ({"model_type": "llama"}, {"output_layer", "fc1"}),
        ({"mlp_only_layers": None}, {"experts", "router", "l1_coeff", "output_layer"}),
    ],
)
def test_a_model_has_the_tensors_of_its_kind(changes, expected):
    names = [item.megatron for item in plan(CONFIG | changes, 12)]
    marks = {
        "experts": ".experts.experts.linear_fc1",
        "router": ".router.weight",
        "l1_coeff": ".router.l1_coeff",
        "output_layer": "output_layer.",
        "fc1": ".mlp.linear_fc1.weight",
    }
    assert {mark for mark, part in marks.items() if any(part in n for n in names)} == expected


def test_a_rule_too_few_or_twice_is_named(monkeypatch):
    expected = [item.megatron for item in plan(CONFIG, 12)]
    without = tuple(rule for rule in TABLE if "linear_proj" not in rule.megatron)
    monkeypatch.setattr(conversion, "TABLE", without)
    left = [item.megatron for item in plan(CONFIG, 12)]
    with pytest.raises(ValueError, match="has the unknown decoder.layers.0.self_attention.linear_"):
        check_names("the checkpoint", expected, left)
    with pytest.raises(ValueError, match="lacks decoder.layers.0.self_attention.linear_proj"):
        check_names("the checkpoint", left, expected)

    norm = TABLE[1]
    target = {"model.layers.*.self_attn.o_proj.weight": "H"}
    monkeypatch.setattr(conversion, "TABLE", (*TABLE, replace(norm, megatron="x.*", hf=target)))
    with pytest.raises(
        ValueError, match="names model.layers.0.self_attn.o_proj.weight.* more than"
    ):
        plan(CONFIG, 12)


def test_another_shape_is_named():
    item = item_of("layers.0.mlp.router.weight")
    with pytest.raises(ValueError, match=r"router.weight has shape \[4, 5\], .* asks for \[5, 4\]"):
        item.to_hf(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"fewer than the model's vocab_size of 10"):
        plan(CONFIG, 9)
