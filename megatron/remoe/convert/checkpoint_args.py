"""The arguments in a checkpoint: checked, and those of the published implementation translated.

A checkpoint may say anything, so every argument that a conversion reads is checked first. The
published implementation (thu-ml/ReMoE, a Megatron of 2024) stores its arguments without
granularity applied to them, and lacks those that came later.
"""

import reprlib
from argparse import Namespace
from typing import Any

from megatron.remoe.convert.architecture import ROUTER_DTYPES
from megatron.remoe.convert.values import check_facts, check_number, check_sizes, check_whole
from remoe.config import ROUTINGS, apply_granularity

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
          "max_position_embeddings")  # fmt: skip
_EXPERT_SIZES = ("num_experts", "moe_router_topk")
# These sizes may be missing in the published implementation's arguments.
_LATER_SIZES = ("kv_channels",)
_LATER_EXPERT_SIZES = ("moe_ffn_hidden_size",)
_NUMBERS = {"layernorm_epsilon": 1.0, "init_method_std": 1e3, "rotary_base": 2.0**53}
_WHOLE = ("vocab_size", "consumed_train_samples")  # or none
# Arguments that must have one of these types.
_TYPES: dict[str, Any] = {
    "group_query_attention": bool,
    "untie_embeddings_and_output_weights": bool,
    "tokenizer_type": str | None,
    "tokenizer_model": str | None,
    "vocab_file": str | None,
    "merge_file": str | None,
    "data_path": list | None,
    "train_data_path": list | None,
}
_TYPES_IF_GIVEN: dict[str, Any] = {
    "moe_routing": str | None,
    "moe_relu_routing": bool,
    "moe_relu_at_least_one_expert": bool,
    "metrics_file": str | None,
}
_PRESENT = ("num_experts", "vocab_size", "mock_data",
            *(name for name, kind in _TYPES.items() if kind is not bool))  # fmt: skip
# Defaults of the published implementation, also for arguments that its Megatron did not have.
_FORK_DEFAULTS: dict[str, Any] = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "init_method_std": 0.02,
    "rotary_base": 10000,
    "moe_router_pre_softmax": False,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "moe_granularity": 1,
    "consumed_train_samples": 0,
    "data_path": None,
    "train_data_path": None,
    "mock_data": False,
    "tokenizer_type": None,
    "tokenizer_model": None,
    "vocab_file": None,
    "merge_file": None,
    "vocab_size": None,
    "moe_router_topk": 2,
    "moe_relu_l1_reg_coeff_init": 1e-8,
    "moe_relu_l1_reg_coeff_multiplier": 1.2,
}


def read_arguments(args: Any, checkpoint: object, *, fork: bool) -> Namespace:
    """Return the complete arguments of a checkpoint of the kind that was asked for.

    Args:
        args: what the checkpoint holds as its arguments.
        checkpoint: the checkpoint's name in messages.
        fork: whether it must be of the published implementation; otherwise it must not be.

    Raises:
        ValueError: the checkpoint is of the other kind, or an argument is missing or has no
            possible value.
    """
    if not isinstance(args, Namespace):
        raise ValueError(f"{checkpoint} has no arguments of Megatron's; save it with its arguments")
    # The fork has our oldest flags, and not the later ones.
    is_fork = "moe_relu_routing" in args and "moe_relu_load_balancing" not in args
    if fork and not is_fork:
        raise ValueError(
            f"{checkpoint} was not written by the published implementation (the arguments in it "
            f"are another's); convert it with remoe convert to-hf"
        )
    if not fork and is_fork:
        raise ValueError(
            f"{checkpoint} was written by the published implementation; convert it with remoe "
            f"convert from-fork"
        )
    where = f"the arguments in {checkpoint}"
    if fork:
        _check_fork_sizes(where, vars(args))
    complete = _translated(args) if fork else args
    _check(where, vars(complete))
    return complete


def _check_fork_sizes(where: str, given: dict[str, Any]) -> None:
    """Check what the translation of the fork's arguments computes with."""
    check_sizes(where, given, _SIZES)
    if given.get("num_experts") is not None:
        check_sizes(where, given, _EXPERT_SIZES)
    if (granularity := given.get("moe_granularity")) is not None:
        check_whole(where, "moe_granularity", granularity, 1)
    if given.get("moe_ffn_hidden_size") is not None:
        check_sizes(where, given, _LATER_EXPERT_SIZES)


def _translated(args: Namespace) -> Namespace:
    """Return the fork's arguments as ours: complete, and with granularity applied."""
    args = Namespace(**(_FORK_DEFAULTS | vars(args)))
    if getattr(args, "kv_channels", None) is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if not hasattr(args, "layernorm_epsilon"):
        args.layernorm_epsilon = args.norm_epsilon
    # The fork's logits are in the dtype of the parameters; ours are in fp32, as in training.
    args.moe_router_dtype = "fp32" if args.moe_relu_routing else None
    if args.num_experts is not None:
        width = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
        shape = apply_granularity(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            ffn_hidden_size=width,
            granularity=args.moe_granularity,
        )
        args.num_experts, args.moe_router_topk = shape.num_experts, shape.topk
        args.moe_ffn_hidden_size = shape.ffn_hidden_size
    return args


def _check(where: str, given: dict[str, Any]) -> None:
    """Check everything that a conversion reads of complete arguments."""
    if missing := [name for name in _PRESENT if name not in given]:
        raise ValueError(f"{where} lack {', '.join(missing)}; save the model with its arguments")
    check_sizes(where, given, (*_SIZES, *_LATER_SIZES))
    types = _TYPES | {name: _TYPES_IF_GIVEN[name] for name in _TYPES_IF_GIVEN if name in given}
    if given["num_experts"] is not None:
        check_sizes(where, given, (*_EXPERT_SIZES, *_LATER_EXPERT_SIZES))
        _check_expert_arguments(where, given)
        types["moe_router_pre_softmax"] = bool
    for name, kind in types.items():
        if not isinstance(value := given.get(name), kind):
            wanted = "true or false" if kind is bool else f"of type {kind}"
            raise ValueError(f"{where} have {name} = {reprlib.repr(value)}; it must be {wanted}")
    if given["group_query_attention"]:
        check_sizes(where, given, ("num_query_groups",))
    for name, below in _NUMBERS.items():
        check_number(where, name, given.get(name), above=0, below=below)
    for name in _WHOLE:
        if given.get(name) is not None:
            check_whole(where, name, given[name], 0)
    check_facts(where, given.get("remoe_training_facts"))


def _check_expert_arguments(where: str, given: dict[str, Any]) -> None:
    dtype, frequency = given.get("moe_router_dtype"), given.get("moe_layer_freq", 1)
    if not isinstance(dtype, str | None) or dtype not in ROUTER_DTYPES:
        raise ValueError(f"{where} have moe_router_dtype = {dtype!r}; it must be fp32 or fp64")
    is_pattern = isinstance(frequency, list) and len(frequency) == given["num_layers"]
    if not is_pattern or not all(value in (0, 1) for value in frequency):
        check_whole(where, "moe_layer_freq", frequency, 1)
    if given.get("moe_relu_routing") or _is_penalized(given.get("moe_routing")):
        for name in ("init", "multiplier"):
            name = f"moe_relu_l1_reg_coeff_{name}"
            check_number(where, name, given.get(name), above=0, below=1e30)


def _is_penalized(router: Any) -> bool:
    return isinstance(router, str) and router in ROUTINGS and ROUTINGS[router].budget == "l1"
