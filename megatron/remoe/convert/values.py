"""Checks of whether the values of a model's configuration can be those of a model at all.

Files from elsewhere may say anything. These checks run before anything is computed from a value:
of its type, its range, and sizes that no machine could hold. Whether the weights have these sizes
is checked where the weights are opened.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.remoe.convert.architecture import BUDGET, ROUTER_TYPES, exported_settings
from megatron.remoe.convert.table import Config
from megatron.remoe.formats.torch_dist import MOST_LAYERS

_MOST = 2**31 - 1  # of any size
_MOST_VALUES = 2**48  # of one tensor: a petabyte
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# Sizes for which transformers has no sensible default.
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "vocab_size")  # fmt: skip
_LAYERS = ("num_hidden_layers", "num_layers")
_FULL = "full_attention"
_NUMBERS = {"rms_norm_eps": 1.0, "initializer_range": 1e3}
_FACTS = {"iteration": 0, "tokens": 0, "sequence_length": 1, "padded_vocab_size": 1}


def check_sizes(where: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that values are whole numbers from 1 to what any machine could hold.

    Raises:
        ValueError: a value is none.
    """
    for name in names:
        most = MOST_LAYERS if name in _LAYERS else _MOST
        check_whole(where, name, values.get(name), 1, most)


def check_whole(where: str, name: str, value: Any, least: int, most: int = 2**62) -> None:
    """Check that a value is a whole number in a range.

    Raises:
        ValueError: the value is something else.
    """
    is_valid = type(value) is int and least <= value <= most
    _require(is_valid, where, name, value, f"a whole number from {least} to {most}")


def check_number(where: str, name: str, value: Any, *, above: float, below: float) -> None:
    """Check that a value is a finite number between two others.

    Raises:
        ValueError: the value is something else.
    """
    is_valid = type(value) in (int, float) and above < value < below and math.isfinite(value)
    _require(is_valid, where, name, value, f"a number above {above:g} and below {below:g}")


def check_config(where: str, config: Config) -> None:
    """Check a `config.json` of ours or of a Llama, with or without the defaults of transformers.

    Raises:
        ValueError: a value is impossible; the message names it.
    """
    names = [name for name in _SIZES if name in _NEEDED or config.get(name) is not None]
    has_experts = config["model_type"] == "remoe"
    check_sizes(where, config, [*names, *(_EXPERT_SIZES if has_experts else ())])
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    is_valid = groups is None or heads % groups == 0
    _require(is_valid, where, "num_key_value_heads", groups, f"a divisor of the {heads} heads")
    _check_tensors(where, config)
    for name, below in _NUMBERS.items():
        if config.get(name) is not None:
            check_number(where, name, config[name], above=0, below=below)
    _check_rope(where, config.get("rope_parameters"))
    layers = config.get("layer_types")
    if layers is not None and layers != [_FULL] * config["num_hidden_layers"]:
        raise ValueError(
            f"{where} has layer_types = {reprlib.repr(layers)}; only models with {_FULL} in all "
            f"{config['num_hidden_layers']} layers can be converted, so take such a model"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(f"{where} is of quantized weights; only weights in floats are converted")
    if has_experts:
        _check_dense(where, config.get("mlp_only_layers"), config["num_hidden_layers"])
        _check_routing(where, config)
    check_facts(where, config.get("training_facts"))


def _check_tensors(where: str, config: Config) -> None:
    """Check that sizes that are possible one by one do not make an impossible tensor."""
    width = max(
        config["vocab_size"],
        config["intermediate_size"],
        config["num_attention_heads"] * (config.get("head_dim") or 1),
        (config.get("num_key_value_heads") or 1) * (config.get("head_dim") or 1),
        2 * (config.get("num_experts") or 0) * (config.get("moe_intermediate_size") or 0),
    )
    if width * config["hidden_size"] > _MOST_VALUES:
        raise ValueError(
            f"{where} has sizes that make a tensor of {width * config['hidden_size']:.1e} values "
            f"(hidden_size {config['hidden_size']}); correct them"
        )


def _check_rope(where: str, rope: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope is None:
        return
    wanted = "a mapping with rope_type and rope_theta"
    _require(isinstance(rope, dict), where, "rope_parameters", rope, wanted)
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{where} has rope_parameters of their own for {name}; only models with the same "
                f"RoPE in all layers can be converted"
            )
    kind, known = rope.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]
    _require(kind in known, where, "rope_type", kind, f"one of {', '.join(known)}")
    if "rope_theta" in rope:
        check_number(where, "rope_theta", rope["rope_theta"], above=0, below=2.0**53)


def _check_dense(where: str, layers: Any, num_layers: int) -> None:
    is_valid = layers is None or (
        isinstance(layers, list) and all(type(i) is int and 0 <= i < num_layers for i in layers)
    )
    _require(is_valid, where, "mlp_only_layers", layers, f"a list of layers below {num_layers}")


def _check_routing(where: str, config: Config) -> None:
    most, k = config["num_experts"], config["num_experts_per_tok"]
    _require(k <= most, where, "num_experts_per_tok", k, f"at most num_experts, {most}")
    router = config.get("router_type", "relu")
    known = isinstance(router, str) and router in ROUTER_TYPES
    _require(known, where, "router_type", router, f"one of {', '.join(ROUTER_TYPES)}")
    if (limit := config.get("max_active_experts")) is not None:
        for one in limit if isinstance(limit, list) else [limit]:
            check_whole(where, "max_active_experts", one, 1, most)
    if (target := config.get("target_sparsity")) is not None:
        check_number(where, "target_sparsity", target, above=-1e-9, below=1)
        is_valid = abs(target - (1 - k / most)) <= 1e-6
        _require(is_valid, where, "target_sparsity", target, f"1 - k/E, {1 - k / most:g}")
    for setting in exported_settings(router):
        is_of_layers = isinstance(config.get(setting.name), list)  # of the budget: checked above
        if setting.name in config and not (setting.name in BUDGET and is_of_layers):
            value = config[setting.name]
            if setting.type is float:
                above = -1e-9 if str(setting.within).startswith("[0") else 0
                check_number(where, setting.name, value, above=above, below=1e30)
            setting.check(value, f"{where}: {setting.name}")
    for name, above in (("l1_coeff", 0), ("top_p_odds", -1e-9), ("threshold_updates", -1e-9)):
        values = config.get(name)
        _require(isinstance(values, list | None), where, name, values, "a list of numbers")
        for value in values or ():
            check_number(where, name, value, above=above, below=1e38)


def check_facts(where: str, facts: Any) -> None:
    """Check what is known about a training: a mapping, or nothing.

    Raises:
        ValueError: a value is impossible; the message names it.
    """
    if facts is None:
        return
    _require(isinstance(facts, dict), where, "training_facts", facts, "a mapping")
    for name, least in _FACTS.items():
        if facts.get(name) is not None:
            check_whole(where, f"training_facts.{name}", facts[name], least)


def _require(is_valid: bool, where: str, name: str, value: Any, wanted: str) -> None:
    if not is_valid:
        raise ValueError(f"{where} has {name} = {reprlib.repr(value)}; it must be {wanted}")
