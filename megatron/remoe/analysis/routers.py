"""The names of routers and of their settings in tables and figures."""

from collections.abc import Iterable
from typing import Any

from megatron.remoe.options import router_name
from remoe.config import ROUTINGS
from remoe.settings import settings_of

# Titles by the name of the selection, in the order of a table. A difference is that of a later
# router minus an earlier one.
_TITLES = {
    "dense": "dense",
    "hash": "Hash",
    "topk": "TopK",
    "null_experts": "Null experts",
    "expert_choice": "Expert Choice",
    "soft": "Soft MoE",
    "expert_threshold": "Expert Threshold",
    "top_p": "Top-p",
    "relu_l2": "ReLU with L2 norm",
    "relu_rms": "ReLU with RMS norm",
    "relu": "ReMoE",
}
# What the L1 penalty of a ReLU router weights its gates by, if not by the load of this step.
_LOAD_WEIGHTS = {
    "none": "no load weights",
    "squared": "squared load weights",
    "global_batch": "load weights of the last step",
}
_RELU = ("relu", "relu_rms", "relu_l2")
# Settings that are part of a router's name, or choose it.
NAMED = {
    "moe_routing", "moe_relu_routing", "moe_soft_routing", "moe_router_recurrence",
    "moe_router_score_function", "moe_relu_load_balancing", "moe_relu_l1_reg_coeff_per_layer",
}  # fmt: skip
# Other settings of a router; in all that are none, two routers must agree to be compared.
_ROUTER_PREFIXES = (
    "moe_relu_",
    "moe_soft_",
    "moe_topk_warmup_",
    "moe_router_recurren",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
    "moe_aux_loss_coeff",
)
_SETTINGS = {
    "num_experts": "{} experts",
    "num_layers": "{} layers",
    "moe_router_topk": "k = {}",
    "moe_granularity": "granularity {}",
    "train_iters": "{} steps",
    "moe_router_recurrent_size": "state of {}",
    "moe_router_recurrent_init_std": "initial deviation {}",
    "moe_relu_l1_reg_coeff_init": "coefficient from {}",
    "moe_relu_l1_reg_coeff_multiplier": "multiplier {}",
    "moe_topk_warmup_steps": "warm-up of {} steps",
    "moe_topk_warmup_topk": "warm-up k = {}",
}


def selection_of(config: dict[str, Any]) -> str:
    """Return the name of a run's selection, as `--moe-routing` has it, or "dense"."""
    if not config.get("num_experts"):
        return "dense"
    return router_name(config)


def router_of(config: dict[str, Any]) -> str:
    """Return the name of a run's router, in words.

    It tells the selection, the recurrence, the near-dense warm-up, sigmoid scores, and what the
    penalty of a ReLU router is weighted by. A selection without a title here has that of its class,
    or else its own name.
    """
    name = selection_of(config)
    if name == "dense":
        return _TITLES[name]
    title = _TITLES.get(name) or (ROUTINGS[name].title if name in ROUTINGS else name)
    if config.get("moe_router_recurrence") not in (None, "none"):
        title = "RMoE" if name == "topk" else f"recurrent {title}"
    if config.get("moe_topk_warmup_steps"):
        title += " with warm-up"
    parts = [title]
    if config.get("moe_router_score_function") == "sigmoid":
        parts.append("sigmoid")
    if name in _RELU:
        weights = config.get("moe_relu_load_balancing") or "aux_loss"
        if weights != "aux_loss":
            parts.append(_LOAD_WEIGHTS.get(weights, weights))
        if config.get("moe_relu_l1_reg_coeff_per_layer"):
            parts.append("coefficient per layer")
    return ", ".join(parts)


def order_of(config: dict[str, Any]) -> tuple[int, bool, bool, str]:
    """Return the place of a run's router among others: a key to sort by."""
    name = selection_of(config)
    known = list(_TITLES)
    place = known.index(name) if name in known else len(known)
    recurrent = config.get("moe_router_recurrence") not in (None, "none")
    return place, recurrent, bool(config.get("moe_topk_warmup_steps")), router_of(config)


def defaults_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the settings of a run's router, and of granularity, if left out."""
    name = selection_of(config)
    declared = settings_of(ROUTINGS[name]) if name in ROUTINGS else []
    granularity = {} if name == "dense" else {"moe_granularity": 1}
    return granularity | {setting.dest: setting.default for setting in declared}


def is_router_setting(key: str) -> bool:
    """Return whether a setting belongs to one router, so that others need not agree in it."""
    declared = {s.dest for routing in ROUTINGS.values() for s in settings_of(routing)}
    return key in NAMED or key in declared or key.startswith(_ROUTER_PREFIXES)


def name_of(router: str, settings: Iterable[tuple[str, Any]]) -> str:
    """Return a router and its settings in words."""
    return ", ".join([router, *(_in_words(key, value) for key, value in settings)])


def _in_words(key: str, value: Any) -> str:
    text = "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    if key in _SETTINGS:
        return _SETTINGS[key].format(text)
    return f"{key.removeprefix('moe_').removeprefix('relu_').replace('_', ' ')} {text}"
