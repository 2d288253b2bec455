"""What a model did with some text: the record from which all figures of its routing are drawn.

The record of a model is a folder: `trace.json` with the facts, `part-0000.npz` and so on with the
arrays of a few sequences each, and `texts.json` with the texts of ids. A part appears whole or not
at all, and `trace.json` says that the record is complete in the end only, so that an interrupted
collection goes on after the last whole part.

Shapes: T tokens, E experts, A assignments of a token to an expert.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.remoe.files import read_json_object, sha256_file, write_whole
from remoe.routing import active_experts

_FACTS, _TEXTS = "trace.json", "texts.json"
_REMEDY = "analyze the model again (remoe analyze --force)"


@dataclass(frozen=True)
class Facts:
    """What was run over which text.

    Attributes:
        model: the model as it was named.
        iteration: the iteration of the checkpoint; None for a Hugging Face folder without one.
        model_class: the class that computed it, such as `ReMoEForCausalLM` or `OlmoeForCausalLM`.
        router: the router's type, as in the config for transformers.
        topk: the (mean) number of active experts that the model was trained for.
        num_experts: number of experts of a layer.
        flops_per_expert: FLOPs of one expert for one token, forward.
        flops_others: FLOPs of everything else for one token, forward, at this sequence length.
        domains: the names of the domains, which `Trace.domains` counts from 0.
        data: the token files as they were named.
        sequence_length: number of tokens of a sequence.
        sequences: number of sequences.
        seed: seed of the order of documents.
        dtype: the type of the weights and activations, as torch names it.
    """

    model: str
    iteration: int | None
    model_class: str
    router: str
    topk: int
    num_experts: int
    flops_per_expert: float
    flops_others: float
    domains: tuple[str, ...]
    data: str
    sequence_length: int
    sequences: int
    seed: int
    dtype: str = "float32"


@dataclass(frozen=True)
class LayerTrace:
    """The routing of one layer.

    Attributes:
        starts: int64 `[T + 1]`; the assignments of token t are those from `starts[t]` up to
            `starts[t + 1]`, in the order of their experts.
        experts: int64 `[A]`.
        gates: fp32 `[A]`, what the outputs of experts are multiplied by.
        scores: fp32 `[T, E]`, what a router that compares experts with each other ranks them by
            (see `remoe.analysis`); None if these are the sizes of the gates.
    """

    starts: Tensor
    experts: Tensor
    gates: Tensor
    scores: Tensor | None
    num_experts: int

    def active(self) -> Tensor:
        """Return the map of active experts, bool `[T, E]`."""
        return self._dense(torch.ones_like(self.experts, dtype=torch.bool))

    def probs(self) -> Tensor:
        """Return the gates, fp32 `[T, E]`, which are zero for inactive experts."""
        return self._dense(self.gates)

    def ranked(self) -> Tensor:
        """Return what experts are ranked by, fp64 `[T, E]`, never negative."""
        return (self.probs().abs() if self.scores is None else self.scores).double()

    def counts(self) -> Tensor:
        """Return the number of active experts of each token, int64 `[T]`."""
        return self.starts.diff()

    def _dense(self, values: Tensor) -> Tensor:
        tokens = torch.arange(len(self.starts) - 1).repeat_interleave(self.counts())
        dense = values.new_zeros(len(self.starts) - 1, self.num_experts)
        dense[tokens, self.experts] = values
        return dense


def layer_trace(probs_TE: Tensor, active_TE: Tensor, scores_TE: Tensor | None) -> LayerTrace:
    """Return the record of a layer from its gates, map and scores, each `[T, E]`."""
    tokens, experts = active_TE.nonzero(as_tuple=True)
    starts = _starts(active_experts(active_TE))
    gates = probs_TE[tokens, experts].float()
    scores = None if scores_TE is None else scores_TE.float()
    return LayerTrace(starts, experts, gates, scores, active_TE.shape[1])


def _starts(counts_T: Tensor) -> Tensor:
    """Return where the assignments of each token start and those of the last end, `[T + 1]`."""
    return torch.cat((counts_T.new_zeros(1), counts_T.cumsum(0)))


@dataclass(frozen=True)
class Part:
    """The record of some sequences; its attributes are those of `Trace`."""

    tokens: Tensor
    losses: Tensor
    domains: Tensor
    layers: dict[int, LayerTrace]


@dataclass(frozen=True)
class Trace:
    """The record of one model.

    Attributes:
        facts: what was run.
        tokens: ids, int64 `[T]`, sequence after sequence.
        losses: the loss of the token that follows, in nats, fp32 `[T]`.
        domains: number of the token's domain, int64 `[T]`.
        layers: the routing of every layer with experts by the layer's number, which begins with 1.
        texts: the text of each id that occurs; `{}` if no tokenizer was found.
    """

    facts: Facts
    tokens: Tensor
    losses: Tensor
    domains: Tensor
    layers: dict[int, LayerTrace]
    texts: dict[int, str]

    @property
    def sequence(self) -> Tensor:
        """The number of the sequence of each token, int64 `[T]`."""
        return torch.arange(len(self.tokens)) // self.facts.sequence_length

    @property
    def position(self) -> Tensor:
        """The position of each token in its sequence, int64 `[T]`."""
        return torch.arange(len(self.tokens)) % self.facts.sequence_length


def read(folder: Path) -> Trace:
    """Read the record of a model.

    Raises:
        ValueError: there is none, or it is not complete or damaged.
    """
    header = _read_header(folder)
    if not header["complete"]:
        raise ValueError(f"{folder} is not complete; finish it with the same remoe analyze")
    parts = []
    for name, known in header["parts"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {_REMEDY}")
        if sha256_file(folder / name) != known:
            raise ValueError(f"{folder / name} has changed since it was written; {_REMEDY}")
        parts.append(_read_part(folder / name, header))
    whole = _joined(parts)
    texts = read_json_object(folder / _TEXTS, _REMEDY)
    return Trace(
        _facts_of(header, folder),
        whole.tokens,
        whole.losses,
        whole.domains,
        whole.layers,
        {int(number): text for number, text in texts.items()},
    )


def read_facts(folder: Path) -> Facts | None:
    """Return the facts of a record, complete or not; None if there is no record.

    Raises:
        ValueError: the file with the facts is damaged.
    """
    if not (folder / _FACTS).is_file():
        return None
    return _facts_of(_read_header(folder), folder)


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a complete record.

    Raises:
        ValueError: the file with the facts is damaged.
    """
    return (folder / _FACTS).is_file() and bool(_read_header(folder)["complete"])


def differing_facts(first: Facts, second: Facts) -> set[str]:
    """Return the names of the facts in which two records differ, however the model was named."""
    one, other = asdict(first), asdict(second)
    return {name for name in one if one[name] != other[name]} - {"model"}


def begin(folder: Path, facts: Facts, layers: Iterable[int], fingerprint: str) -> int:
    """Begin a record, or go on with one; return how many parts are there.

    Args:
        folder: the folder, which is made if it does not exist.
        facts: the facts of the record.
        layers: the numbers of the layers with experts.
        fingerprint: a text that only the same weights and tokens have.

    Raises:
        ValueError: the folder has the record of other settings, weights or tokens.
    """
    header = {
        "facts": asdict(facts),
        "layers": list(layers),
        "fingerprint": fingerprint,
        "complete": False,
        "parts": {},
    }
    if (folder / _FACTS).is_file():
        there = _read_header(folder)
        differing = differing_facts(_facts_of(there, folder), facts)
        if there["fingerprint"] != fingerprint:
            differing.add("weights or tokens")
        if differing:
            raise ValueError(
                f"{folder} holds a record that differs in {', '.join(sorted(differing))}; {_REMEDY}"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FACTS, json.dumps(header, indent=2) + "\n")
    for left in folder.glob(".partial-*"):  # by a process that was killed
        left.unlink()
    done = 0
    while _is_whole(folder / part_name(done), header):
        done += 1
    return done


def write_part(folder: Path, number: int, part: Part) -> None:
    """Write the record of some sequences in one step, in the smallest types that hold it."""
    arrays: dict[str, Any] = {
        "tokens": part.tokens.to(torch.int32).numpy(),
        "losses": part.losses.numpy(),
        "domains": part.domains.numpy().astype(np.uint16),
    }
    for layer, trace in part.layers.items():
        arrays[f"counts_{layer}"] = trace.counts().numpy().astype(np.uint16)
        arrays[f"experts_{layer}"] = trace.experts.numpy().astype(np.uint16)
        arrays[f"gates_{layer}"] = trace.gates.numpy()
        if trace.scores is not None:
            arrays[f"scores_{layer}"] = trace.scores.numpy()
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **arrays)
    write_whole(folder / part_name(number), compressed.getvalue())


def finish(folder: Path, parts: int, texts: dict[int, str]) -> None:
    """Make a record complete.

    Args:
        folder: the folder of the record.
        parts: the number of its parts.
        texts: the texts of the ids that occur; `{}` if no tokenizer was found.
    """
    header = _read_header(folder)
    write_whole(folder / _TEXTS, json.dumps(texts, indent=0) + "\n")
    names = [part_name(number) for number in range(parts)]
    header["parts"] = {name: sha256_file(folder / name) for name in names}
    header["complete"] = True
    write_whole(folder / _FACTS, json.dumps(header, indent=2) + "\n")


def part_name(number: int) -> str:
    """Return the name of the file of a part, which is counted from 0."""
    return f"part-{number:04d}.npz"


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _FACTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {_FACTS}, so it is no record of a model's routing")
    header = read_json_object(path, _REMEDY)
    missing = {"facts", "layers", "fingerprint", "complete", "parts"} - set(header)
    if missing:
        raise ValueError(f"{path} has no {sorted(missing)[0]}; {_REMEDY}")
    return header


def _facts_of(header: dict[str, Any], folder: Path) -> Facts:
    given = header["facts"]
    if set(given) != {field.name for field in fields(Facts)}:
        raise ValueError(f"{folder / _FACTS} has the facts of another version; {_REMEDY}")
    return Facts(**given | {"domains": tuple(given["domains"])})


def _is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Return whether a part is there; one that cannot be read is computed again."""
    if not path.is_file():
        return False
    try:
        _read_part(path, header)
    except ValueError:
        return False
    return True


def _read_part(path: Path, header: dict[str, Any]) -> Part:
    num_experts = header["facts"]["num_experts"]
    try:
        with np.load(path) as stored:
            arrays = {name: torch.from_numpy(_wide(stored[name])) for name in stored.files}
        layers = {layer: _layer(arrays, layer, num_experts) for layer in header["layers"]}
        return Part(arrays["tokens"], arrays["losses"], arrays["domains"], layers)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}); {_REMEDY}") from error


def _wide(array: Any) -> Any:
    return array if array.dtype == np.float32 else array.astype(np.int64)


def _layer(arrays: dict[str, Tensor], layer: int, num_experts: int) -> LayerTrace:
    starts = _starts(arrays[f"counts_{layer}"])
    scores = arrays.get(f"scores_{layer}")
    return LayerTrace(
        starts, arrays[f"experts_{layer}"], arrays[f"gates_{layer}"], scores, num_experts
    )


def _joined(parts: list[Part]) -> Part:
    """Return the record of all parts together."""
    layers = {}
    for number, first in parts[0].layers.items():
        found = [part.layers[number] for part in parts]
        scores = [layer.scores for layer in found if layer.scores is not None]
        layers[number] = LayerTrace(
            _starts(torch.cat([layer.counts() for layer in found])),
            torch.cat([layer.experts for layer in found]),
            torch.cat([layer.gates for layer in found]),
            torch.cat(scores) if scores else None,
            first.num_experts,
        )
    return Part(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.losses for part in parts]),
        torch.cat([part.domains for part in parts]),
        layers,
    )
