"""Translation of a model's architecture between Megatron's arguments and a Hugging Face config.

The tables of equal settings below serve both directions. What neither the model in `remoe.hf` nor
LLaMA (for models without experts) can do is refused by name.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron.remoe.convert.table import Config
from megatron.remoe.options import layers_with_experts, router_name
from remoe.config import ROUTINGS
from remoe.settings import Setting, settings_of

# Arguments that must have these values (or be absent), because neither of our two models in
# transformers can do anything else.
_REQUIRED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "apply_query_key_layer_scaling": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "mtp_num_layers": None,
    "masked_lm": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    # shortcuts of earlier versions, which proved to be of no use (docs/log.md)
    "moe_relu_l1_reg_coeff_rule": "sign",
    "moe_relu_start_sparse": False,
}
# The same for a Hugging Face config, which may say what Megatron's flags cannot express.
_REQUIRED_IN_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "l1_coeff_rule": "sign",  # of earlier versions
    "router_bias": False,  # likewise
}
# Megatron's name of a setting, and that of Hugging Face.
_MODEL = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
}
_EXPERTS = {
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
ROUTER_DTYPES = {"fp32": "float32", "fp64": "float64", None: None}
# Values of arguments that checkpoints of the published code may lack.
_ABSENT: dict[str, Any] = {"moe_layer_freq": 1}
# Why models of these routers cannot be exported.
_NOT_EXPORTED = {
    "soft": "has slots, of which the exported model has none",
    "expert_choice": "looks at whole sequences, and the exported model is causal",
}
# The types of routers in a config for transformers.
ROUTER_TYPES = (
    *(name for name in ROUTINGS if name != "topk" and name not in _NOT_EXPORTED),
    "topk_pre_softmax",
    "topk_post_softmax",
    "topk_sigmoid",
)

# Fields of a budget that is set after training, of which Megatron knows the last, for `relu`.
BUDGET = ("gate_threshold", "gate_offset", "max_active_experts")


def to_config(args: argparse.Namespace) -> Config:
    """Return the architecture part of `config.json`, without vocabulary, special tokens and dtype.

    Raises:
        ValueError: an argument has a value that the model on the other side cannot have.
    """
    given = _ABSENT | vars(args)
    for name, required in _REQUIRED.items():
        value = given.get(name, required)
        if value != required:
            raise ValueError(
                f"the run has {name}={value!r}, which the exported model does not do; only "
                f"{name}={required!r} can be converted"
            )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    config: Config = {hf: given[megatron] for megatron, hf in _MODEL.items()} | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": groups,
        "hidden_act": "silu",
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    qk_norm = "head" if given.get("qk_layernorm") else None
    if args.num_experts is None:
        if qk_norm is not None:
            raise ValueError(
                "the run is dense and has qk_layernorm=True, which a Llama does not do; only "
                "qk_layernorm=False can be converted"
            )
        return config
    with_experts = layers_with_experts(given["moe_layer_freq"], args.num_layers)
    dense = [layer for layer in range(args.num_layers) if layer not in with_experts]
    router = router_name(given)
    if router not in ROUTINGS or router in _NOT_EXPORTED:
        why = _NOT_EXPORTED.get(router, "is none that this version knows")
        raise ValueError(f"the run has the router {router}, which {why}")
    config |= {hf: given[megatron] for megatron, hf in _EXPERTS.items()} | {
        "model_type": "remoe",
        "architectures": ["ReMoEForCausalLM"],
        "router_type": router_type_of(router, given),
        "router_dtype": ROUTER_DTYPES[args.moe_router_dtype],
        "mlp_only_layers": dense or None,
        "qk_norm": qk_norm,
        "target_sparsity": 1 - args.moe_router_topk / args.num_experts,
    }
    # The published code has some of these arguments only; it does as our defaults do.
    settings = exported_settings(router)
    return config | {s.name: getattr(args, s.dest, s.default) for s in settings}


def router_type_of(router: str, given: Mapping[str, Any]) -> str:
    """Return the type of a router in the config for transformers.

    Args:
        router: the router's name.
        given: Megatron's arguments, or the fields of its configuration of a model.

    Raises:
        ValueError: a score that the model for transformers does not have.
    """
    if router != "topk":
        return router
    score = given.get("moe_router_score_function", "softmax")
    if score == "sigmoid":
        return "topk_sigmoid"
    if score == "softmax":
        return "topk_pre_softmax" if given["moe_router_pre_softmax"] else "topk_post_softmax"
    raise ValueError(
        f"the run has moe_router_score_function={score!r}, which the exported model does not do; "
        f"only softmax and sigmoid can be converted"
    )


def check_expressible(config: Config) -> None:
    """Check that Megatron's flags can express a Hugging Face config.

    Raises:
        ValueError: a setting has a value that they cannot express.
    """
    for name, required in _REQUIRED_IN_CONFIG.items():
        if config.get(name, required) != required:
            raise ValueError(
                f"config.json has {name} = {config[name]!r}; only {required!r} can be converted"
            )
    if config.get("qk_norm") == "projection":
        raise ValueError(
            "config.json has qk_norm = 'projection', as OLMoE does, but Megatron's qk_layernorm "
            "norms each head on its own; only models with qk_norm 'head' or null can be converted"
        )
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json scales RoPE (rope_type = {rope['rope_type']!r}); only 'default' can be "
            f"converted to Megatron, so take a model that was trained without scaling"
        )
    if not float(rope["rope_theta"]).is_integer():
        raise ValueError(
            f"config.json has rope_theta {rope['rope_theta']}, but Megatron's rotary_base is a "
            f"whole number"
        )
    _check_budget(config)


def _check_budget(config: Config) -> None:
    """Refuse a budget of active experts that was set after training."""
    for name in BUDGET:
        value = config.get(name)
        is_trained = config.get("router_type") == "relu" and isinstance(value, int)
        if value is not None and not (name == "max_active_experts" and is_trained):
            raise ValueError(
                f"config.json has {name} = {value!r}, a budget that was set after training and "
                f"that Megatron's routers do not have; clear it (set {name} to null, or call "
                f"model.set_budget(None) and save the model), and set it again after training"
            )


def to_flags(config: Config, padded_vocab_size: int) -> dict[str, Any]:
    """Return Megatron's and our flags of a model, as a config of `remoe train` has them.

    Raises:
        ValueError: a setting has a value that Megatron's flags cannot express.
    """
    check_expressible(config)
    flags: dict[str, Any] = {
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": int(config["rope_parameters"]["rope_theta"]),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **{megatron: config[hf] for megatron, hf in _MODEL.items()},
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "seq_length": config["max_position_embeddings"],
        "padded_vocab_size": padded_vocab_size,
        "no_create_attention_mask_in_dataloader": True,
    }
    if config["model_type"] == "llama":
        return flags
    flags |= {"qk_layernorm": True} if config.get("qk_norm") == "head" else {}
    router = config["router_type"]
    dtypes = {value: key for key, value in ROUTER_DTYPES.items()}
    flags |= {megatron: config[hf] for megatron, hf in _EXPERTS.items()} | {
        "moe_router_pre_softmax": router not in ("topk_post_softmax", "topk_sigmoid"),
        "moe_router_score_function": "sigmoid" if router == "topk_sigmoid" else "softmax",
        "moe_router_dtype": dtypes[config["router_dtype"]],
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
    }
    with_experts = moe_layers(config)
    if len(with_experts) < config["num_hidden_layers"]:
        pattern = (str(int(i in with_experts)) for i in range(config["num_hidden_layers"]))
        flags["moe_layer_freq"] = f"[{','.join(pattern)}]"  # Megatron takes no spaces
    if router == "relu":
        flags["moe_relu_routing"] = True
    elif router in ROUTINGS:
        flags["moe_routing"] = router
    settings = exported_settings(router)
    return flags | {s.dest: config.get(s.name, s.default) for s in settings}


def exported_settings(router: str) -> list[Setting]:
    """Return the settings of a router that a model for transformers has.

    Args:
        router: the name of the router, or its type in the config for transformers.
    """
    settings = settings_of(ROUTINGS[routing_of(router)])
    return [setting for setting in settings if setting.exported]


def routing_of(router_type: str) -> str:
    """Return the name of a router, by its type in the config for transformers, or its name."""
    return "topk" if router_type.startswith("topk") else router_type


def moe_layers(config: Config) -> list[int]:
    """Return the indices of the layers with experts."""
    if config["model_type"] == "llama":
        return []
    dense = set(config.get("mlp_only_layers") or ())
    return [i for i in range(config["num_hidden_layers"]) if i not in dense]
