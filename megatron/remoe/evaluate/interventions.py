"""What it costs in loss to take experts from a model, or to let fewer of them be active.

Every intervention changes what routers return, on a part of the text, and nothing is trained.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.analysis.trace import Facts, Trace
from megatron.remoe.evaluate.models import hooked, is_foreign, routers_of, routing_of
from megatron.remoe.evaluate.routing import Advance, batches_of, losses_of
from megatron.remoe.evaluate.text import Text
from remoe.hf.configuration_remoe import L1_ROUTERS

Row = dict[str, Any]

TOKENS = 8192  # the most that an intervention is measured on
_LEVELS = 8  # of experts that are removed, and of k
_SHIFTS = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)  # in means of the positive logits


@dataclass(frozen=True)
class Intervention:
    """A change of what all routers of a model return.

    Attributes:
        keep: the experts that stay by the number of the layer, bool `[E]`; all stay in other
            layers. The gates of the others become zero, and no token gets another expert for them.
        offset: what is taken from every logit before the selection; only for ReLU routers.
        topk: k of TopK routers; None leaves it.
    """

    keep: dict[int, Tensor] = field(default_factory=dict)
    offset: float | None = None
    topk: int | None = None

    @contextmanager
    def apply(self, model: Any) -> Iterator[list[Tensor]]:
        """Change a model, and yield a list of the numbers of active experts of each call.

        The numbers are int64 `[T]`, one tensor for each router and forward pass.
        """
        counts: list[Tensor] = []
        with ExitStack() as stack:
            for router in routers_of(model).values() if self.topk is not None else ():
                name = "top_k" if is_foreign(router) else "topk"
                stack.callback(setattr, router, name, getattr(router, name))
                setattr(router, name, self.topk)
            stack.enter_context(hooked(model, partial(self._change, counts)))
            yield counts

    def _change(
        self,
        counts: list[Tensor],
        layer: int,
        router: Any,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        output: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        if self.offset is not None:
            output = _shifted(router, self.offset, inputs, named, output)
        active_TE = routing_of(router, inputs, named, output).active
        if layer in self.keep:
            keep_E = self.keep[layer].to(active_TE.device)
            active_TE = active_TE & keep_E
            output = _pruned(router, keep_E, output)
        counts.append(active_TE.sum(dim=1).cpu())
        return output


def _shifted(
    router: Any,
    offset: float,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    output: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Return the output of a ReLU router whose logits are smaller by the offset."""
    logits_TE = router.score(*inputs, **named)[0] - offset
    return *router.route(logits_TE), *output[2:]


def _pruned(router: Any, keep_E: Tensor, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the output of a router in which the gates of other experts are zero."""
    if is_foreign(router):
        logits_TE, gates_Tk, chosen_Tk = output
        return logits_TE, gates_Tk.masked_fill(~keep_E[chosen_Tk], 0), chosen_Tk
    probs_TE, active_TE, *others = output
    return probs_TE.masked_fill(~keep_E, 0), active_TE & keep_E, *others


def part_of(text: Text) -> Text:
    """Return the part of a text on which interventions are measured: sequences of all domains."""
    count = max(len(text.names), TOKENS // text.length)
    return text.rows(0, count)


def plan(model: Any, found: Trace) -> list[tuple[Row, Intervention]]:
    """Return the interventions that a model allows, each with its row so far.

    Args:
        model: the loaded model.
        found: its record, whose assignments say which experts are used least.
    """
    num_experts = found.facts.num_experts
    least_first = {
        layer: torch.bincount(one.experts, minlength=num_experts).argsort(stable=True)
        for layer, one in found.layers.items()
    }
    planned: list[tuple[Row, Intervention]] = []
    for removed in _removals(num_experts):
        keep = {}
        for layer, order in least_first.items():
            keep[layer] = torch.ones(num_experts, dtype=torch.bool)
            keep[layer][order[:removed]] = False
        row = {"table": "pruning", "layer": "all", "removed": removed}
        planned.append((row, Intervention(keep=keep)))
    if shifts := _shifts(found.facts):
        size = _mean_positive_logit(model, found)
        for shift in shifts:
            offset = float(f"{shift * size:.3g}")
            row = {"table": "shift", "offset": offset}
            planned.append((row, Intervention(offset=offset)))
    for k in _topks(found.facts):
        planned.append(({"table": "lower_k", "k": k}, Intervention(topk=k)))
    return planned


def passes(facts: Facts) -> int:
    """Return how often the part of the text is read in all (`measure`)."""
    return 1 + len(_removals(facts.num_experts)) + len(_shifts(facts)) + len(_topks(facts))


def _removals(num_experts: int) -> list[int]:
    return sorted({num_experts * level // _LEVELS for level in range(_LEVELS)})


def _shifts(facts: Facts) -> tuple[float, ...]:
    return _SHIFTS if facts.router in L1_ROUTERS else ()


def _topks(facts: Facts) -> list[int]:
    if not facts.router.startswith("topk"):
        return []
    levels = range(1, _LEVELS + 1)
    return sorted({-(-facts.topk * level // _LEVELS) for level in levels}, reverse=True)


@torch.no_grad()
def _mean_positive_logit(model: Any, found: Trace) -> float:
    """Return the mean of the positive logits of all layers in the first sequence; 1 without any."""
    positive: list[Tensor] = []

    def read(layer: int, router: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        logits = router.score(*inputs, **named)[0]
        positive.append(logits[logits > 0].double().cpu())

    with hooked(model, read):
        first = found.tokens[: found.facts.sequence_length]
        model.model(first[None].to(model.device), use_cache=False)
    values = torch.cat(positive)
    return float(values.mean()) if len(values) else 1.0


def measure(
    model: Any,
    found: Trace,
    text: Text,
    *,
    advance: Advance = lambda sequences: None,
) -> list[Row]:
    """Return a row for each intervention.

    A row says which `table` of answers it belongs to, and what was done: how many experts were
    `removed` from every layer, those with the fewest assignments; which `offset` was taken from
    every logit before the ReLU; or which `k` a TopK router had. It has the mean `loss` in nats, the
    mean number of `active` experts of a token and layer, the `extra_loss` against the unchanged
    model, and the number of `tokens` of which these are means.

    Args:
        model: the loaded model.
        found: its record.
        text: the text, of which a part is used (`part_of`).
        advance: called with the number of sequences that have just been done.
    """
    part = part_of(text)
    rows: list[Row] = []
    plain: float | None = None
    for row, intervention in [({}, Intervention()), *plan(model, found)]:
        losses: list[Tensor] = []
        with intervention.apply(model) as counts:
            for inputs, labels, _ in batches_of(part):
                losses.append(losses_of(model, inputs, labels))
                advance(len(inputs))
        loss = float(torch.cat(losses).double().mean())
        active = float(torch.cat(counts).double().mean())
        if plain is None:
            plain = loss
            continue
        measured = {"loss": loss, "active": active, "extra_loss": loss - plain}
        rows.append(row | measured | {"tokens": part.inputs.numel()})
    return rows
