"""How many experts each layer of an adopted model keeps.

Layers need their experts to very different degrees. Each is measured by itself: the divergence from
the teacher is found with one layer's gates below a threshold switched off, at several thresholds.
The divergences of layers are taken to add up, and the numbers are chosen for which their sum is
least while their mean over layers is the target: an allocation by Lagrange multiplier, as for bits
in quantization (Shoham and Gersho, 1988). Since they only nearly add up, the allocation is compared
with one threshold for all layers, and with the same number for all, and the best of them is taken.

Shapes: N sequences, S tokens of each, L layers with experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.adopt.distill import (
    calibrate,
    divergence_of,
    gates_of,
    kept_by,
    log_probs,
    threshold_for,
)

Curve = Sequence[tuple[float, float]]  # numbers of active experts and what they cost
# Shares of k that are tried in each layer, beside all of it, and one more of the target.
_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625, 0.025)
_LEAST = 0.1
_SEQUENCES = 8
_ROUNDS = 100  # of halving, which ends at neighboring floats long before


def cheapest(curves: Sequence[Curve], target: float) -> list[float]:
    """Return the number of active experts of each layer at which all of them cost least.

    Only numbers on a curve's lower convex hull are chosen, and at most one between two of them, so
    that the mean over layers is the target, or less if all layers have their most.

    Args:
        curves: for each layer numbers of active experts, and what the model loses with each.
        target: the mean over layers, at least that of the layers' smallest numbers.
    """

    def chosen(price: float) -> list[float]:
        return [
            min(curve, key=lambda one: (one[1] + price * one[0], one[0]))[0] for curve in curves
        ]

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(curves)

    low, high = 0.0, 1.0  # prices of an expert
    most = chosen(low)
    if mean(most) <= target:
        return most
    while mean(chosen(high)) > target:
        high *= 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(chosen(middle)) > target else (low, middle)
    more, fewer = chosen(low), chosen(high)
    share = (target - mean(fewer)) / (mean(more) - mean(fewer))
    return [a + share * (b - a) for a, b in zip(fewer, more, strict=True)]


@torch.no_grad()
def allocate(
    teacher: Any,
    student: Any,
    inputs: Tensor,
    target: float,
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Return the mean number of active experts of each layer at which the outputs change least.

    Args:
        teacher: the teacher.
        student: the student with a threshold for each layer, which stay as they are.
        inputs: ids, int64 `[N, S]`, of which the first 8 sequences are read.
        target: the mean over layers.
        shown: called with the number of layers that are done, and that of all layers.
    """
    some = inputs[:_SEQUENCES].to(teacher.device)
    wanted = log_probs(teacher(some, use_cache=False).logits)
    with gates_of(student) as gates:
        student.model(some, use_cache=False)
    before = list(student.config.gate_threshold)
    k = student.config.num_experts_per_tok
    numbers = [k * share for share in _SHARES] + [target * _LEAST]

    def cost() -> float:
        return float(divergence_of(wanted, log_probs(student(some, use_cache=False).logits)))

    curves = []
    for layer, own in enumerate(gates):
        shown(layer, len(gates))
        costs = [(float(k), 0.0)]
        for number in numbers:
            threshold = max(before[layer], threshold_for([own], number))
            student.config.gate_threshold = [*before[:layer], threshold, *before[layer + 1 :]]
            costs.append((number, cost()))
        curves.append(costs)
    threshold = threshold_for(gates, target)
    under_one = [kept_by(threshold, own) for own in gates]
    found = []
    for numbers in (cheapest(curves, target), under_one, [target] * len(gates)):
        student.config.gate_threshold = before
        calibrate(student, some, numbers)
        found.append((cost(), numbers))
    student.config.gate_threshold = before
    return min(found)[1]
