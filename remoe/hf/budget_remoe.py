"""A budget of active experts that is set after training, for routers with ReLU gates, and TopK.

A trained model can spend less on every token: gates below a threshold are switched off, and the
others keep their value. The threshold that meets a budget is found by bisection on text.

This file is exported with every model and therefore self-contained. Shapes: T tokens, E experts.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .configuration_remoe import L1_ROUTERS, THRESHOLD_ROUTERS

# The number of a token's active experts deviates from its mean by about as much as that is. Over
# these tokens the mean then has a standard error of 1 / sqrt(512), 4.4% of itself.
LEAST_TOKENS = 512
TOLERANCE = 0.01  # of the target
_FIELDS = {"threshold": "gate_threshold", "offset": "gate_offset"}
_TOKENS_AT_ONCE = 8192
_MOST_STEPS = 24  # of doubling, and of halving


class UnreachableBudget(ValueError):
    """No threshold or offset leaves the number of active experts that was asked for."""


@dataclass(frozen=True)
class Calibration:
    """What a search has found.

    Attributes:
        value: the argument.
        reached: what was measured with it.
        steps: the number of measurements.
    """

    value: float
    reached: float
    steps: int


@dataclass(frozen=True)
class Budget:
    """A budget that a model has got.

    Attributes:
        by: what was set: "threshold" or "offset".
        value: the value of all layers, or those of each layer with experts.
        active_experts: the mean number of active experts per token that was reached on the text.
        before: the same without the budget.
        tokens: the number of tokens of the text, without padding.
    """

    by: str
    value: float | list[float]
    active_experts: float
    before: float
    tokens: int


def limited_gates(
    probs_TE: Tensor,
    active_TE: Tensor,
    *,
    threshold: float | None = None,
    most: int | None = None,
    keep_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Switch off the small gates of every token; those that stay keep their value.

    Args:
        probs_TE: gates `[T, E]`, zero where inactive. Their size counts, not their sign.
        active_TE: map of active experts, bool `[T, E]`.
        threshold: gates of a smaller size are switched off.
        most: the number of a token's experts that stay, those with the largest gates.
        keep_one: whether the largest gate of a token stays in spite of the threshold.

    Returns:
        The gates that stay, and their map.
    """
    size_TE = probs_TE.abs().masked_fill(~active_TE, -1)  # an active gate may be zero
    kept_TE = active_TE
    if threshold is not None:
        kept_TE = kept_TE & (size_TE >= threshold)
        if keep_one:
            first_T1 = size_TE.argmax(dim=1, keepdim=True)
            first_TE = torch.zeros_like(kept_TE).scatter(1, first_T1, True)
            kept_TE = kept_TE | (first_TE & active_TE)
    if most is not None and most < probs_TE.shape[1]:
        largest = size_TE.topk(most, dim=1).indices
        kept_TE = kept_TE & torch.zeros_like(kept_TE).scatter(1, largest, True)
    return probs_TE.masked_fill(~kept_TE, 0), kept_TE


def calibrate(
    measure: Callable[[float], float],
    target: float,
    *,
    least: float = -math.inf,
    step: float = 0.05,
    tolerance: float = TOLERANCE,
) -> Calibration:
    """Find the argument of a falling function at which it has a value, by bisection from zero.

    Args:
        measure: a function that falls, if not at every step, as its argument grows.
        target: the value, above zero.
        least: the smallest argument that is tried, at most zero.
        step: the first step away from zero, which is doubled until the target is between two steps.
        tolerance: the difference from the target, as a share of it, that ends the search.

    Returns:
        The argument whose value is nearest to the target, which may be out of reach.
    """
    found: dict[float, float] = {}

    def is_above(value: float) -> bool:
        found[value] = measure(value)
        return found[value] > target

    def is_met() -> bool:
        return any(abs(reached - target) <= tolerance * target for reached in found.values())

    low = high = 0.0
    rises = is_above(0.0)
    for _ in range(_MOST_STEPS):
        if is_met() or (not rises and low <= least):
            break
        if rises:
            low, high = high, high + step
        else:
            low, high = max(least, low - step), low
        step *= 2
        if is_above(high if rises else low) != rises:
            break
    for _ in range(_MOST_STEPS):
        middle = (low + high) / 2
        if is_met() or middle in found:  # or there is no number between the two
            break
        low, high = (middle, high) if is_above(middle) else (low, middle)
    value = min(found, key=lambda one: abs(found[one] - target))
    return Calibration(value, found[value], len(found))


@torch.no_grad()
def set_budget(
    model: Any,
    active_experts: float | None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    by: Literal["threshold", "offset"] = "threshold",
    per_layer: bool = False,
) -> Budget | None:
    """Set the budget of a model; see `ReMoEForCausalLM.set_budget`."""
    config = model.config
    before = {field: getattr(config, field) for field in _FIELDS.values()}
    if active_experts is None:
        _write(config, dict.fromkeys(before))
        return None
    ids, mask = _agreed(model, active_experts, input_ids, attention_mask, by, per_layer)
    was_training = model.training
    model.eval()
    try:
        _write(config, dict.fromkeys(before))
        profile = None if per_layer or by == "offset" else before["gate_threshold"]
        profile = profile if isinstance(profile, list | tuple) else None
        budget = _calibrated(model, active_experts, ids, mask, by, per_layer, profile)
    except BaseException:
        _write(config, before)
        raise
    finally:
        model.train(was_training)
    return budget


def _calibrated(
    model: Any,
    target: float,
    ids: Tensor,
    mask: Tensor,
    by: str,
    per_layer: bool,
    profile: Sequence[float] | None,
) -> Budget:
    """Set the field of a model without a budget, and return what was reached.

    With a profile, which has a threshold for each layer, all of them are moved by one number. Those
    that become negative switch nothing off, and are kept, so that the way back leads to the same.
    """
    config, field = model.config, _FIELDS[by]
    plain_L = active_by_layer(model, ids, mask)
    before = float(plain_L.mean())
    values = [0.0] * len(plain_L)
    least = -max(profile or [0.0]) if by == "threshold" else -math.inf
    value: float | list[float]

    def of_all(change: float) -> float | list[float]:
        return change if profile is None else [one + change for one in profile]

    def measure(change: float) -> float:
        setattr(config, field, of_all(change))
        return float(active_by_layer(model, ids, mask).mean())

    if per_layer:
        # Every layer gets the same share of its experts. Layers change the input of later ones.
        for layer, plain in enumerate(plain_L.tolist()):

            def measure_layer(value: float, layer: int = layer) -> float:
                setattr(config, field, [*values[:layer], value, *values[layer + 1 :]])
                return float(active_by_layer(model, ids, mask)[layer])

            share = target / before if before else 0
            if plain:
                values[layer] = calibrate(measure_layer, plain * share, least=least).value
        value = values
        setattr(config, field, value)
        reached = float(active_by_layer(model, ids, mask).mean())
    else:
        found = calibrate(measure, target, least=least)
        value, reached = of_all(found.value), found.reached
        setattr(config, field, value)
    if abs(reached - target) > TOLERANCE * target:
        takes_only = by == "threshold" and target > before
        why = (
            "a threshold only takes experts away; model.set_budget(..., by='offset') can add some"
            if takes_only
            else ("choose another number, or more text")
        )
        raise UnreachableBudget(
            f"active_experts is {target:g}, which cannot be met within {TOLERANCE:.0%}: the model "
            f"has {before:.4g} without a budget, and the nearest {by} leaves {reached:.4g} on this "
            f"text; {why}"
        )
    tokens = int(mask.sum())
    return Budget(by, value, reached, before, tokens)


def _agreed(
    model: Any,
    active_experts: float,
    ids: Tensor | None,
    mask: Tensor | None,
    by: str,
    per_layer: bool,
) -> tuple[Tensor, Tensor]:
    """Return the ids and the mask of this rank's text, both `[B, S]`.

    Ranks of a process group measure together. One whose text is refused, or that asks for something
    else, would leave the others waiting, so that all of them raise a ValueError.
    """
    config, refused, found, batches = model.config, None, None, 0
    try:
        check_budget(config, active_experts, by)
        found = _checked(config, ids, mask)
        batches = math.ceil(len(found[0]) / _rows(found[0]))
    except ValueError as error:
        refused = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Wrappers that shard weights gather them for every batch.
        own = (config.gate_threshold, config.max_active_experts)
        request = (active_experts, by, per_layer, *own, batches)
        given: list[Any] = [None] * torch.distributed.get_world_size()
        is_cuda = model.device.type == "cuda"
        with torch.cuda.device(model.device) if is_cuda else nullcontext():
            torch.distributed.all_gather_object(given, (request, refused and str(refused)))
        for rank, (other, reason) in enumerate(given):
            if refused is None and reason is not None:
                raise ValueError(f"rank {rank}: {reason}")
            if refused is None and other != request:
                raise ValueError(
                    f"rank {rank} asks for {other} and this one for {request}, which are "
                    f"active_experts, by, per_layer, gate_threshold, max_active_experts and the "
                    f"batches of the text; ask for the same"
                )
    if refused is not None:
        raise refused
    assert found is not None
    return found


def _rows(ids: Tensor) -> int:
    """Return the number of sequences that are read at a time."""
    return max(1, _TOKENS_AT_ONCE // ids.shape[1])


def active_by_layer(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean number of active experts of tokens that are no padding, fp64 `[L]`.

    In a process group it is the mean over the texts of all ranks, which must all call this.
    """
    rows = _rows(ids)
    counts = torch.zeros(len(model.config.moe_layers) + 1, dtype=torch.int64, device=model.device)
    for some, real in zip(ids.split(rows), mask.split(rows), strict=True):
        some, real = some.to(model.device), real.to(model.device)
        active = model.model(
            some, attention_mask=real, use_cache=False, output_routing=True, return_dict=True
        ).active_experts
        sums = [(one * real.to(one.device)).sum().to(counts.device) for one in active]
        counts += torch.stack([*sums, real.sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts[:-1].double() / counts[-1]


def _checked(config: Any, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the ids and the mask of a text, both `[B, S]`; raises a ValueError for no such text.

    A list is refused as well, since it would need a device and a dtype.
    """
    if ids is None:
        raise ValueError(
            "input_ids are not given; a budget is calibrated on text, so pass the token ids "
            f"[B, S] of some, at least {LEAST_TOKENS} tokens"
        )
    whole = (torch.int32, torch.int64)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in whole:
        shape = f" of {ids.dtype}, {list(ids.shape)}" if isinstance(ids, Tensor) else ""
        raise ValueError(
            f"input_ids is a {type(ids).__name__}{shape}; pass a tensor of token ids [B, S], int64"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = f", {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}{shape}; pass a tensor of the shape of "
            f"input_ids, {list(ids.shape)}"
        )
    tokens = int(mask.sum())
    if tokens < LEAST_TOKENS:
        raise ValueError(
            f"the text has {tokens} tokens that are no padding; pass at least {LEAST_TOKENS}, "
            f"since the mean over fewer says too little of other text"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"input_ids are from {int(ids.min())} to {int(ids.max())}, and the vocabulary has "
            f"{config.vocab_size} entries; use the model's tokenizer"
        )
    return ids, mask


def check_budget(config: Any, active_experts: float, by: str = "threshold") -> None:
    """Check that a model may have a budget, before it is calibrated.

    Raises:
        ValueError: the model has no such gates, or the number is impossible.
    """
    allowed = L1_ROUTERS if by == "offset" else THRESHOLD_ROUTERS
    if config.router_type not in allowed:
        raise ValueError(
            f"router_type is {config.router_type}, whose number of experts has no {by}; a "
            f"budget can be set for {', '.join(allowed)}"
        )
    if not config.moe_layers:
        raise ValueError("the model is dense, so that it has no active experts to budget")
    is_number = isinstance(active_experts, int | float) and not isinstance(active_experts, bool)
    if not is_number or not 0 < active_experts <= config.num_experts:
        raise ValueError(
            f"active_experts is {active_experts!r}; it must be a number of experts per token above "
            f"0 and at most {config.num_experts}, the number of experts"
        )
    if by not in _FIELDS:
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(_FIELDS)}")


def _write(config: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
