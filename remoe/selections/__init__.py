"""Selections, which decide which experts a token activates and with which gates, a file each.

`ROUTINGS` has the settings of every router by its name, which `--moe-routing` takes.
"""

from remoe.selections.base import (
    AnyRouting,
    Budget,
    Recurrence,
    RecurrentPassing,
    RecurrentProjection,
    Routing,
    Selection,
    Tensors,
    refuse_idle_recurrence,
)
from remoe.selections.expert_choice import ExpertChoiceRouting
from remoe.selections.expert_threshold import ExpertThresholdRouting
from remoe.selections.hashed import HashRouting
from remoe.selections.null_experts import NullExpertsRouting
from remoe.selections.relu import L1Routing, ReLURouting
from remoe.selections.relu_l2 import ReLUL2Routing
from remoe.selections.relu_rms import ReLURMSRouting
from remoe.selections.soft_moe import SoftRouting
from remoe.selections.top_p import TopPRouting
from remoe.selections.topk import TopKRouting

ROUTINGS: dict[str, type[AnyRouting]] = {
    "relu": ReLURouting,
    "relu_rms": ReLURMSRouting,
    "relu_l2": ReLUL2Routing,
    "topk": TopKRouting,
    "null_experts": NullExpertsRouting,
    "top_p": TopPRouting,
    "expert_threshold": ExpertThresholdRouting,
    "hash": HashRouting,
    "expert_choice": ExpertChoiceRouting,
    "soft": SoftRouting,
}

__all__ = [
    "ROUTINGS",
    "AnyRouting",
    "Budget",
    "ExpertChoiceRouting",
    "ExpertThresholdRouting",
    "HashRouting",
    "L1Routing",
    "NullExpertsRouting",
    "ReLUL2Routing",
    "ReLURMSRouting",
    "ReLURouting",
    "Recurrence",
    "RecurrentPassing",
    "RecurrentProjection",
    "Routing",
    "Selection",
    "SoftRouting",
    "Tensors",
    "TopKRouting",
    "TopPRouting",
    "refuse_idle_recurrence",
]
