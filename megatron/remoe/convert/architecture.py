"""A model's architecture: Megatron's arguments to a Hugging Face config, and back to flags.

Whatever the model in `remoe.hf` (or LLaMA, without experts) does not do is refused by name.
"""

import argparse
import reprlib
from typing import Any

from megatron.remoe.analysis.size import layers_with_experts
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.values import (
    check_facts,
    check_number,
    check_sizes,
    check_whole,
)
from remoe.config import ROUTINGS
from remoe.settings import Setting, settings_of

# Arguments whose other values make a model that neither of our two is. Absent is as required.
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
    "qk_layernorm": False,
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
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
    "moe_router_score_function": "softmax",
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    # shortcuts of earlier versions, which proved to be of no use (docs/log.md)
    "moe_relu_l1_reg_coeff_rule": "sign",
    "moe_relu_start_sparse": False,
}
_ROUTER_DTYPES = {"fp32": "float32", "fp64": "float64", None: None}
# What a Hugging Face config may say, and we could not express in Megatron's flags.
_REQUIRED_IN_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "l1_coeff_rule": "sign",  # of earlier versions
    "router_bias": False,  # likewise
}


_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
          "max_position_embeddings")  # fmt: skip
_LATER_SIZES = ("kv_channels",)  # which the published implementation may leave out
_EXPERT_SIZES = ("num_experts", "moe_router_topk")
_LATER_EXPERT_SIZES = ("moe_ffn_hidden_size",)
_NUMBERS = {"layernorm_epsilon": 1.0, "init_method_std": 1e3, "rotary_base": 2.0**53}
_SWITCHES = ("group_query_attention", "untie_embeddings_and_output_weights")
_SWITCHES_IF_GIVEN = ("moe_relu_routing", "moe_relu_at_least_one_expert")
_TEXTS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "metrics_file")
_LISTS = ("data_path", "train_data_path")
_PRESENT = ("num_experts", "vocab_size", "mock_data", *_TEXTS[:-1], *_LISTS)


def check_arguments(where: str, args: argparse.Namespace, *, complete: bool) -> None:
    """Check the arguments that a conversion reads, which a checkpoint may have as it pleases.

    Args:
        where: they are, for the message.
        args: of a checkpoint.
        complete: whether those of the published implementation have their later form by now.

    Raises:
        ValueError: naming the argument that is missing or has no possible value.
    """
    given = vars(args)
    if missing := [name for name in _PRESENT if complete and name not in given]:
        raise ValueError(f"{where} lack {', '.join(missing)}; save the model with its arguments")
    has_experts = given.get("num_experts") is not None
    sizes = _SIZES + (_EXPERT_SIZES if has_experts else ())
    check_sizes(where, given, sizes)
    if not complete:
        if (granularity := given.get("moe_granularity")) is not None:
            check_whole(where, "moe_granularity", granularity, 1)
        if given.get("moe_ffn_hidden_size") is not None:
            check_sizes(where, given, _LATER_EXPERT_SIZES)
        return
    check_sizes(where, given, _LATER_SIZES + (_LATER_EXPERT_SIZES if has_experts else ()))
    needed = _SWITCHES + (("moe_router_pre_softmax",) if has_experts else ())
    for name in (*needed, *(name for name in _SWITCHES_IF_GIVEN if name in given)):
        if not isinstance(given.get(name), bool):
            raise ValueError(f"{where} have {name} = {given.get(name)!r}; it must be true or false")
    if args.group_query_attention:
        check_sizes(where, given, ("num_query_groups",))
    for name, below in _NUMBERS.items():
        check_number(where, name, given.get(name), above=0, below=below)
    for kind, names in ((str, _TEXTS), (list, _LISTS)):
        for name in names:
            if not isinstance(given.get(name), kind | None):
                raise ValueError(
                    f"{where} have {name} = {reprlib.repr(given[name])}, which is none"
                )
    for name in ("vocab_size", "consumed_train_samples"):
        if given.get(name) is not None:
            check_whole(where, name, given[name], 0)
    check_facts(where, given.get("remoe_training_facts"))
    if has_experts:
        _check_expert_arguments(where, given)


def _check_expert_arguments(where: str, given: dict[str, Any]) -> None:
    dtype, frequency = given.get("moe_router_dtype"), given.get("moe_layer_freq", 1)
    if not isinstance(dtype, str | None) or dtype not in _ROUTER_DTYPES:
        raise ValueError(f"{where} have moe_router_dtype = {dtype!r}; it must be fp32 or fp64")
    is_pattern = isinstance(frequency, list) and len(frequency) == given["num_layers"]
    if not is_pattern or not all(value in (0, 1) for value in frequency):
        check_whole(where, "moe_layer_freq", frequency, 1)
    if given.get("moe_relu_routing"):
        for name in ("init", "multiplier"):
            name = f"moe_relu_l1_reg_coeff_{name}"
            check_number(where, name, given.get(name), above=0, below=1e30)


def to_config(args: argparse.Namespace) -> Config:
    """The architecture part of `config.json`: no vocabulary, no tokens, no dtype.

    Raises:
        ValueError: an argument that the model on the other side does not have.
    """
    for name, required in _REQUIRED.items():
        value = getattr(args, name, required)
        if value != required:
            raise ValueError(
                f"the run has {name}={value!r}, which the exported model does not do; only "
                f"{name}={required!r} can be converted"
            )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    config: Config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": groups,
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "initializer_range": args.init_method_std,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    if args.num_experts is None:
        return config
    layers = range(args.num_layers)
    with_experts = layers_with_experts(getattr(args, "moe_layer_freq", 1), args.num_layers)
    dense = [layer for layer in layers if layer not in with_experts]
    is_relu = getattr(args, "moe_relu_routing", False)
    softmax = "topk_pre_softmax" if args.moe_router_pre_softmax else "topk_post_softmax"
    config |= {
        "model_type": "remoe",
        "architectures": ["ReMoEForCausalLM"],
        "router_type": "relu" if is_relu else softmax,
        "router_dtype": _ROUTER_DTYPES[args.moe_router_dtype],
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": args.moe_ffn_hidden_size,
        "mlp_only_layers": dense or None,
        "target_sparsity": 1 - args.moe_router_topk / args.num_experts,
    }
    if is_relu:
        # The published code has some of these arguments only; it does as our defaults do.
        config |= {s.name: getattr(args, s.dest, s.default) for s in _exported_settings()}
    return config


def to_flags(config: Config, padded_vocab_size: int) -> dict[str, Any]:
    """Megatron's and our flags of a model, as a config of `remoe train` has them.

    Raises:
        ValueError: a setting that Megatron's flags cannot express.
    """
    for name, required in _REQUIRED_IN_CONFIG.items():
        if config.get(name, required) != required:
            raise ValueError(
                f"config.json has {name} = {config[name]!r}; only {required!r} can be converted"
            )
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json scales RoPE ({rope['rope_type']!r}); only the default can be converted"
        )
    theta = float(rope["rope_theta"])
    if not theta.is_integer():
        raise ValueError(
            f"config.json has rope_theta {theta}, but Megatron's rotary_base is a whole number"
        )
    flags: dict[str, Any] = {
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": int(theta),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config["initializer_range"],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["head_dim"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "padded_vocab_size": padded_vocab_size,
        "no_create_attention_mask_in_dataloader": True,
    }
    if config["model_type"] == "llama":
        return flags
    router, dense = config["router_type"], set(config.get("mlp_only_layers") or ())
    dtypes = {value: key for key, value in _ROUTER_DTYPES.items()}
    flags |= {
        "num_experts": config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": router != "topk_post_softmax",
        "moe_router_dtype": dtypes[config["router_dtype"]],
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
    }
    if dense:
        pattern = (str(int(i not in dense)) for i in range(config["num_hidden_layers"]))
        flags["moe_layer_freq"] = f"[{','.join(pattern)}]"  # Megatron takes no spaces
    if router == "relu":
        flags["moe_relu_routing"] = True
        flags |= {s.dest: config[s.name] for s in _exported_settings()}
    return flags


def _exported_settings() -> list[Setting]:
    return [setting for setting in settings_of(ROUTINGS["relu"]) if setting.exported]


def moe_layers(config: Config) -> list[int]:
    """Indices of the layers with experts."""
    if config["model_type"] == "llama":
        return []
    dense = set(config.get("mlp_only_layers") or ())
    return [i for i in range(config["num_hidden_layers"]) if i not in dense]
