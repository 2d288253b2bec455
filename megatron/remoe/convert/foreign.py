"""TopK mixtures of transformers' own classes as our model, with the same logits.

OLMoE, Mixtral and Qwen3-MoE are LLaMA with experts, as our model is. They differ in the norm of
queries and keys, in the layers that are dense, and in whether the gates of a token sum to one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.exported import from_files
from megatron.remoe.convert.hf_source import check_finite, validated
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.values import check_config
from megatron.remoe.files import read_json_object
from remoe.hf import ReMoEConfig, ReMoEForCausalLM
from remoe.hf.modeling_remoe import ReMoERotaryEmbedding

# Norm of queries and keys, by the `model_type` of a config.
QK_NORM = {"olmoe": "projection", "mixtral": None, "qwen3_moe": "head"}
# Why other models with experts cannot become ours.
_REFUSED = {"qwen2_moe": "has shared experts, which our model does not have"}
_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "num_experts_per_tok",
)  # fmt: skip
# What our model cannot do, and the value that stands for its absence.
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}


def is_foreign(path: Path) -> bool:
    """Return whether a folder has a mixture of one of transformers' own classes."""
    file = path / "config.json"
    if not file.is_file():
        return False
    return read_json_object(file, "copy it again").get("model_type") in (*QK_NORM, *_REFUSED)


def config_of(path: Path) -> Config:
    """Return the config of our model that computes what a model of transformers does.

    Raises:
        ValueError: the model does something that ours cannot do, or its config is damaged.
    """
    from transformers import AutoConfig

    file = path / "config.json"
    kind = str(read_json_object(file, "copy it again").get("model_type"))
    if kind in _REFUSED:
        raise ValueError(f"{file} has model_type {kind!r}, which {_REFUSED[kind]}")
    try:
        raw: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers takes any value, and fails where it is used
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file}: {reason}; copy it again") from error
    for name, required in _REQUIRED.items():
        if (value := getattr(raw, name, required)) != required:
            raise ValueError(
                f"{file} has {name} = {value!r}, which our model does not do; only {required!r} "
                f"can be converted"
            )
    heads = int(raw.num_attention_heads)
    is_normed = kind == "mixtral" or raw.norm_topk_prob
    config: Config = {name: getattr(raw, name) for name in _SAME} | {
        "model_type": "remoe",
        "architectures": ["ReMoEForCausalLM"],
        "head_dim": getattr(raw, "head_dim", None) or raw.hidden_size // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "qk_norm": QK_NORM[kind],
        "clip_qkv": getattr(raw, "clip_qkv", None),
        "router_type": "topk_post_softmax" if is_normed else "topk_pre_softmax",
        "router_dtype": "float32",
        "num_experts": raw.num_experts,
        "intermediate_size": raw.intermediate_size,
        "moe_intermediate_size": getattr(raw, "moe_intermediate_size", raw.intermediate_size),
        "mlp_only_layers": _dense_layers(raw) or None,
        "training_facts": {"adopted_from": kind},
    }
    check_config(str(file), config)
    return validated(config)


def _dense_layers(raw: Any) -> list[int]:
    """Return the layers without experts of a Qwen3-MoE; others have none."""
    only, step = getattr(raw, "mlp_only_layers", None) or [], getattr(raw, "decoder_sparse_step", 1)
    return [i for i in range(raw.num_hidden_layers) if i in only or (i + 1) % step]


def load_foreign(path: Path, config: Config, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model of transformers as ours, on the CPU; memory holds the weights once.

    Args:
        path: its folder.
        config: its config as our model (`config_of`).
        dtype: the dtype of the weights.

    Raises:
        ValueError: the weights do not fit the config, or one is NaN or infinite.
    """
    state = {}
    for name, weight in from_files(path, dtype).state_dict().items():
        check_finite(f"{name} of {path}", weight)
        state[name.replace(".mlp.gate.weight", ".mlp.router.weight")] = weight
    return build(config, state)


def build(config: Config, state: dict[str, Tensor]) -> Any:
    """Return our model with the given tensors themselves as its weights, ready to evaluate.

    Args:
        config: the model's config.
        state: all of its parameters and buffers by name.
    """
    with torch.device("meta"):
        model: Any = ReMoEForCausalLM(ReMoEConfig.from_dict(dict(config)))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Its frequencies are in no state.
    rotary = ReMoERotaryEmbedding(config=model.config)
    model.model.rotary_emb = rotary.to(next(iter(state.values())).device)
    return model.eval()


def stored_dtype(path: Path) -> torch.dtype:
    """Return the dtype of the weights in a folder of transformers, by its norms.

    Raises:
        ValueError: there are no safetensors.
    """
    from megatron.remoe.formats.safetensors import SafetensorsReader

    return SafetensorsReader(path).meta["model.norm.weight"].dtype
