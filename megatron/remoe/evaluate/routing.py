"""Run a model over labeled text and record what its routers do, with the loss of every token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.analysis import trace
from megatron.remoe.analysis.trace import Facts, Part, layer_trace
from megatron.remoe.evaluate.models import (
    Opened,
    Routing,
    flops_of_others,
    flops_per_expert,
    hooked,
    routers_of,
    routing_of,
)
from megatron.remoe.evaluate.text import Text, hash_of

Advance = Callable[[int], None]

_SEQUENCES, _TOKENS = 8, 4096  # the most in a batch, which has one sequence at least
_LOGITS = 2**22  # computed at a time; 16 MB are allocated without new pages each time


def facts_of(opened: Opened, text: Text, dtype: torch.dtype) -> Facts:
    """Return the facts of a record before anything is computed."""
    return Facts(
        model=str(opened.path),
        iteration=opened.iteration,
        model_class=type(opened.shape).__name__,
        router=opened.router,
        topk=int(opened.config.num_experts_per_tok),
        num_experts=opened.num_experts,
        flops_per_expert=flops_per_expert(opened.shape),
        flops_others=flops_of_others(opened.shape, text.length),
        domains=text.names,
        data=text.data,
        sequence_length=text.length,
        sequences=len(text.inputs),
        seed=text.seed,
        dtype=str(dtype).removeprefix("torch."),
    )


def record(
    opened: Opened,
    model: Any,
    facts: Facts,
    text: Text,
    folder: Path,
    *,
    advance: Advance = lambda sequences: None,
) -> None:
    """Record what a model does with a text, or go on with an interrupted record.

    Args:
        opened: the model as it was opened.
        model: the same, loaded.
        facts: its facts (`facts_of`).
        text: the text.
        folder: the folder of the record.
        advance: called with the number of sequences that have just been done.

    Raises:
        ValueError: the folder has the record of other settings, weights or tokens.
    """
    fingerprint = hash_of(*model.state_dict().values()) + text.fingerprint()
    done = trace.begin(folder, facts, routers_of(model), fingerprint)
    batches = list(batches_of(text))
    for number, (inputs, labels, domains) in enumerate(batches):
        if number >= done:
            with routings(model) as found:
                losses = losses_of(model, inputs, labels)
            layers = {layer: _layer(routing) for layer, routing in found.items()}
            numbers = domains.repeat_interleave(text.length)
            trace.write_part(folder, number, Part(inputs.flatten(), losses, numbers, layers))
        advance(len(inputs))
    texts = {}
    if opened.tokenizer is not None:
        texts = opened.tokenizer.texts(sorted(set(text.inputs.flatten().tolist())))
    trace.finish(folder, len(batches), texts)


def batches_of(text: Text) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs, labels and domains of a few sequences at a time."""
    size = max(1, min(_SEQUENCES, _TOKENS // text.length))
    columns = (text.inputs, text.labels, text.domains)
    yield from zip(*(torch.split(column, size) for column in columns), strict=True)


@contextmanager
def routings(model: Any) -> Iterator[dict[int, Routing]]:
    """Collect the routing of the next forward pass by the number of the layer."""
    found: dict[int, Routing] = {}

    def read(layer: int, *call: Any) -> None:
        found[layer] = routing_of(*call)

    with hooked(model, read):
        yield found


def _layer(routing: Routing) -> trace.LayerTrace:
    scores = None if routing.scores is None else routing.scores.cpu()
    return layer_trace(routing.probs.cpu(), routing.active.cpu(), scores)


@torch.no_grad()
def losses_of(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every token in nats, fp32 `[N * S]`, on the CPU.

    Args:
        model: a model for causal language modeling, of transformers.
        inputs: ids, int64 `[N, S]`.
        labels: the token that follows each, int64 `[N, S]`.
    """
    hidden = model.model(inputs.to(model.device), use_cache=False).last_hidden_state.flatten(0, 1)
    tokens = max(1, _LOGITS // model.config.vocab_size)
    parts = (torch.split(of, tokens) for of in (hidden, labels.to(model.device).flatten()))
    losses = [
        F.cross_entropy(model.lm_head(some).float(), targets, reduction="none")
        for some, targets in zip(*parts, strict=True)
    ]
    return torch.cat(losses).cpu()
