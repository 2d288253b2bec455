"""TopK models of transformers' own classes as our model: the same logits, also with a cache."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron.remoe.convert.exported import load
from megatron.remoe.convert.foreign import config_of, is_foreign, load_foreign
from remoe.hf import ReMoEConfig, ReMoEForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OLMOE = (OlmoeConfig, OlmoeForCausalLM)
QWEN3 = (Qwen3MoeConfig, Qwen3MoeForCausalLM)
MODELS = {
    "olmoe": (*OLMOE, {"rms_norm_eps": 1e-3}),
    "olmoe, gates sum to one": (*OLMOE, {"norm_topk_prob": True, "clip_qkv": 0.5}),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0}},
    ),
    "qwen3": (
        *QWEN3,
        {"head_dim": 16, "moe_intermediate_size": 20, "decoder_sparse_step": 2}
        | {"norm_topk_prob": True},
    ),
    "qwen3, dense by name": (
        *QWEN3,
        {"head_dim": 8, "moe_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
}


def made(kind, cls, changes):
    """A random model, whose norms are not ones either."""
    torch.manual_seed(0)
    model = cls(kind(**(SIZES | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("of", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers(tmp_path, of):
    theirs = made(*of)
    theirs.save_pretrained(tmp_path)
    assert is_foreign(tmp_path)
    ours = load_foreign(tmp_path, config_of(tmp_path))
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
        start = ours(tokens[:, :9], use_cache=True)
        rest = ours(tokens[:, 9:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, wanted[:, 9:], atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")  # with the norms of queries and keys
    again = ReMoEForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("load", [load, lambda path: load_foreign(path, config_of(path))])
def test_weights_that_are_missing_or_left_over_are_refused(tmp_path, load):
    """transformers gives random values to the former, with a warning, and ignores the latter."""
    made(*MODELS["olmoe"]).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    less = {name: w for name, w in whole.items() if name != "model.layers.1.mlp.gate.weight"}
    save_file(less, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 missing weights, such as model\.layers\.1\.mlp"):
        load(tmp_path)
    more = whole | {"model.layers.7.mlp.gate.weight": torch.zeros(4, 32)}
    save_file(more, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 unexpected weights, such as model\.layers\.7"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="copy it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_moe"}, "qwen2_moe', which has shared experts"),
        ({"attention_bias": True}, "has attention_bias = True, which our model does not do"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu', which our model does not do"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9; it must be at most num_experts, 4"),
    ],
)
def test_what_our_model_does_not_do_is_refused(tmp_path, changes, message):
    config = json.loads(OlmoeConfig(**SIZES).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="^.*" + message):
        config_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer"}, "qk_norm is 'layer'; it must be projection, head or null"),
        ({"qk_norm": "projection", "head_dim": 16}, "which asks for heads of 32 values in all"),
        ({"clip_qkv": 1.0}, "clip_qkv is 1.0, which only goes with qk_norm 'projection'"),
    ],
)
def test_a_norm_that_no_model_has_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReMoEConfig(**(SIZES | changes))
