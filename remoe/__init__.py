"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711), the algorithm on torch alone."""

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
    "load_weights",
    "next_l1_coeff",
    "relu_routing",
    "soft_routing",
    "sparsity",
    "tokens_per_expert",
    "update_l1_coeff",
]
