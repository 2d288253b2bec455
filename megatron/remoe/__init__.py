"""ReMoE on unmodified Megatron: what a pretraining script needs.

    import megatron.remoe as remoe
    remoe.prepare_megatron()
    ...
    args = parse_and_validate_args(extra_args_provider=remoe.add_arguments)
    model_cfg = gpt_config_from_args(args)
    with remoe.training(args, model_cfg):
        pretrain(pretrain_cfg_container_from_args(args, model_cfg), ...)

The names are imported on first use, so that `prepare_megatron()` can run before anything imports
`megatron.core`.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "FinalizeStep": "train.step",
    "MetricsWriter": "train.metrics",
    "ReLURouting": "moe.router",
    "add_arguments": "arguments",
    "args_provider": "arguments",
    "configure": "arguments",
    "layer_spec": "moe.spec",
    "prepare_megatron": "cpu",
    "routing_from_args": "arguments",
    "running": "train.session",
    "training": "session",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
