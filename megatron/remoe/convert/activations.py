"""Activations inside a dense model on some text, and its loss on that text.

Shapes: T tokens, H hidden.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.convert.exported import check_vocabulary, continue_tokens
from megatron.remoe.data.pairs import check_pair

_BATCH = 8
_SAMPLE_LENGTH = 256


def tokens_for(model: Any, data: list[Path] | None, num_tokens: int, seed: int) -> Tensor:
    """Return text for a model, `[sequences, length]`, an even number of them in random order.

    Args:
        model: the model, which samples the text itself if there is no data.
        data: prefixes of token files.
        num_tokens: the approximate number of tokens.
        seed: the seed of the order, or of the samples.

    Raises:
        ValueError: the data does not exist, is too little, or has another vocabulary.
    """
    length = min(model.config.max_position_embeddings, _SAMPLE_LENGTH)
    count = max(2, num_tokens // length // 2 * 2)
    if data is None:
        return _samples(model, count, length, seed)
    found = torch.cat([_read(prefix, -(-count * length // len(data))) for prefix in data])
    if len(found) < count * length:
        raise ValueError(
            f"the data has {len(found)} tokens of the {count * length} that are asked for; name "
            f"more (--data), or ask for fewer (--tokens)"
        )
    check_vocabulary(found, model.config.vocab_size)
    pieces = found[: count * length].view(count, length)
    return pieces[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def _read(prefix: Path, num_tokens: int) -> Tensor:
    """Read the first tokens of a pair of `.bin/.idx` files, one document after the other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_pair(prefix)
    dataset = IndexedDataset(str(prefix))
    parts, total = [], 0
    for index in range(len(dataset)):
        parts.append(torch.from_numpy(dataset[index].astype("int64")))
        total += len(parts[-1])
        if total >= num_tokens:
            break
    if not parts:
        raise ValueError(f"{prefix} holds no tokens; name other data (--data)")
    return torch.cat(parts)[:num_tokens]


@torch.no_grad()
def _samples(model: Any, count: int, length: int, seed: int) -> Tensor:
    """Let the model sample text, from its end-of-document token or from a random one."""
    torch.manual_seed(seed)
    start = model.config.eos_token_id
    first = torch.randint(model.config.vocab_size, (count, 1))
    if isinstance(start, int):
        first = torch.full((count, 1), start)
    return continue_tokens(model, first, length - 1, do_sample=True, top_k=0)


@torch.no_grad()
def mlp_inputs(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the inputs of every layer's MLP, `[T, H]` each."""
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1))
        )
        for layer, seen in zip(model.model.layers, inputs, strict=True)
    ]
    for batch in torch.split(tokens, _BATCH):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen) for seen in inputs]


@torch.no_grad()
def mean_loss(model: Any, tokens: Tensor) -> float:
    """Return the mean loss in nats per token."""
    total = 0.0
    for batch in torch.split(tokens, _BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))
