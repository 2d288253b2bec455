"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711), the algorithm on torch alone.

Two names are not of the algorithm: `remoe.train` and `remoe.load_run` train with Megatron and read
a run (`megatron.remoe.api`). They are imported on first use, so that this package stays below that
one and needs torch alone.
"""

import importlib
from typing import Any

from remoe.config import (
    ControllerConfig,
    ReLURouting,
    ReMoELayerConfig,
    SoftMoELayerConfig,
    apply_granularity,
)
from remoe.controller import next_l1_coeff
from remoe.layer import ReMoELayer, l1_penalty, update_l1_coeff
from remoe.regularization import l1_regularization, load_weights
from remoe.routing import active_experts, relu_routing, sparsity, tokens_per_expert
from remoe.soft import SoftMoELayer, soft_routing

__version__ = "0.1.0"  # pyproject.toml reads this literal without importing the package

__all__ = [
    "ControllerConfig",
    "ReLURouting",
    "ReMoELayer",
    "ReMoELayerConfig",
    "SoftMoELayer",
    "SoftMoELayerConfig",
    "active_experts",
    "apply_granularity",
    "l1_penalty",
    "l1_regularization",
    "load_run",
    "load_weights",
    "next_l1_coeff",
    "relu_routing",
    "soft_routing",
    "sparsity",
    "tokens_per_expert",
    "train",
    "update_l1_coeff",
]


def __getattr__(name: str) -> Any:
    if name not in ("load_run", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("megatron.remoe.api"), name)
