"""ReMoE on unmodified Megatron: what a pretraining script needs.

    import megatron.remoe as remoe
    args = parse_and_validate_args(extra_args_provider=remoe.add_arguments)
    cfg = gpt_config_from_args(args)
    remoe.configure(cfg, args)

The names are imported on first use, so that `megatron.remoe.cpu.enable()` can run before anything
imports `megatron.core`.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "FinalizeStep": "step",
    "MetricsWriter": "metrics",
    "ReLURouting": "router",
    "add_arguments": "arguments",
    "configure": "arguments",
    "layer_spec": "spec",
    "routing_from_args": "arguments",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
