"""Collect the gates of a model of any format over token files, by the model for transformers."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.analysis.routing import LayerGates, ModelGates
from megatron.remoe.convert.architecture import moe_layers
from megatron.remoe.convert.export import Progress
from megatron.remoe.convert.exported import check_vocabulary, exported, load
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.evaluate.perplexity import default_length, find_domains, sequences
from remoe.hf.configuration_remoe import L1_ROUTERS

_BATCH = 8  # sequences


def open_routed(path: Path) -> MegatronSource | HFSource:
    """Open a model that has experts.

    Raises:
        ValueError: there is no model, or a dense one.
    """
    source = open_source(path)
    if not moe_layers(source.config):
        raise ValueError(f"{path} is a dense model, which routes no token; leave it out")
    return source


@torch.no_grad()
def collect(
    path: Path,
    source: MegatronSource | HFSource,
    data: Path,
    *,
    tokens: int,
    seed: int,
    sequence_length: int | None = None,
    progress: Progress = lambda done, total: None,
) -> ModelGates:
    """Run a model over tokens, and keep the gates of every layer.

    Args:
        path: the model as it was named.
        source: the model.
        data: folder of token files, or one of them without its suffix.
        tokens: the largest number of tokens; whole sequences are read, one of each domain in turn.
        seed: seed of the order of documents.
        sequence_length: length of the sequences; None is that of the run, or else the number of
            positions of the model.
        progress: called with the number of sequences that are done, and of all sequences.

    Raises:
        ValueError: there are too few tokens for one sequence, or the data has another vocabulary.
    """
    length = sequence_length or default_length(source.config)
    inputs, domains = _inputs(data, length, tokens, seed)
    with exported(source) as folder:
        model = load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    check_vocabulary(inputs, model)
    routers = {
        number: layer.mlp.router
        for number, layer in enumerate(model.model.layers, start=1)
        if not layer.is_dense
    }
    found: dict[int, list[LayerGates]] = {number: [] for number in routers}
    for number, router in routers.items():
        router.register_forward_hook(
            lambda *call, found=found[number]: found.append(_gates(*call)), with_kwargs=True
        )
    done = 0
    for batch in torch.split(inputs, _BATCH):
        model.model(batch.to(model.device), use_cache=False)
        done += len(batch)
        progress(done, len(inputs))
    layers = {
        number: LayerGates(
            torch.cat([part.scores for part in parts]), torch.cat([part.active for part in parts])
        )
        for number, parts in found.items()
    }
    return ModelGates(
        path,
        model.config.router_type,
        model.config.num_experts_per_tok,
        layers,
        inputs.flatten(),
        {
            name: torch.tensor([of == name for of in domains]).repeat_interleave(length)
            for name in dict.fromkeys(domains)
        },
    )


def _gates(
    router: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: tuple[Any, ...]
) -> LayerGates:
    """Return the gates of a call; fp64 keeps scores of a softmax apart from zero."""
    probs_TE, active_TE, *_ = output
    if router.router_type in (*L1_ROUTERS, "hash"):
        scores_TE = probs_TE.double().abs()  # a learned scale may be negative
    else:  # what other routers return is zero for the experts that they have not selected
        logits_TN = router.score(*inputs, **named)[0].double()
        if router.router_type in ("expert_threshold", "topk_sigmoid"):
            scores_TE = torch.sigmoid(logits_TN)
        else:
            scores_TE = torch.softmax(logits_TN, dim=1)[:, : probs_TE.shape[1]]
    return LayerGates(scores_TE.cpu(), active_TE.cpu())


def _inputs(data: Path, length: int, tokens: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Return sequences of all domains in turn, int64 `[sequences, length]`, and their domains."""
    count = tokens // length
    if count == 0:
        raise ValueError(
            f"tokens is {tokens}, less than one sequence of {length}; ask for more (--tokens), or "
            f"for shorter sequences (--sequence-length)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        sets = {
            name: sequences(prefix, length, seed, Path(scratch))
            for name, prefix in find_domains(data).items()
        }
        turns = [(i, name) for name, domain in sets.items() for i in range(len(domain))]
        turns = sorted(turns, key=lambda turn: turn[0])[:count]
        inputs = torch.stack([sets[name][i]["tokens"] for i, name in turns])
        return inputs, [name for _, name in turns]
