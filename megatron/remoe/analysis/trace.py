"""What a model did with some text: the record from which all figures of its routing are drawn.

Shapes: T tokens, E experts, A assignments of a token to an expert.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remoe.routing import active_experts


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
    starts = torch.zeros(len(active_TE) + 1, dtype=torch.int64)
    starts[1:] = active_experts(active_TE).cumsum(0)
    gates = probs_TE[tokens, experts].float()
    scores = None if scores_TE is None else scores_TE.float()
    return LayerTrace(starts, experts, gates, scores, active_TE.shape[1])


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
    raise NotImplementedError(folder)
