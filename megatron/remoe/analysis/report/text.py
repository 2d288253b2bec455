"""The sample of text in a report, in which every token shows its number of active experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.analysis.report.subject import Subject
from megatron.remoe.analysis.trace import Trace

LEVELS = 9  # colors, from none to the most experts
_TOKENS = 1500  # of all domains


@dataclass(frozen=True)
class Passage:
    """Tokens of one domain that follow each other.

    Attributes:
        domain: the name of the domain.
        texts: the text of each token.
        levels: the color of each token for the mean over layers.
    """

    domain: str
    texts: list[str]
    levels: str


@dataclass(frozen=True)
class Sample:
    """The text of one model.

    Attributes:
        passages: one for each domain.
        selections: for "all" and each layer the colors of all tokens, a digit each, and the scale:
            pairs of a color and the number of experts that it means.
        counts: for each layer the number of active experts of each token.
        losses: the loss of the token that follows each token, in nats.
    """

    passages: list[Passage]
    selections: dict[str, tuple[str, list[tuple[int, str]]]]
    counts: dict[str, list[int]]
    losses: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return what the switch for the layer needs."""
        levels = {key: {"levels": a, "scale": b} for key, (a, b) in self.selections.items()}
        return {"layers": levels, "counts": self.counts, "losses": self.losses}


def samples(subjects: Sequence[Subject], tokens: int = _TOKENS) -> list[Sample]:
    """Choose the first tokens of each domain, and color them alike for all models.

    A token without an active expert has color 0. The last color is the most experts that a token of
    any model has in what is selected, or twice the number that the models were trained for, if this
    is more. Tokens whose text is not known show their id.

    Args:
        subjects: the models.
        tokens: the number of tokens of all domains together, for each model.
    """
    chosen = [_choose(subject.trace, tokens) for subject in subjects]
    counts = [
        {"all": _mean(one, places)}
        | {str(n): layer.counts()[places].double() for n, layer in one.layers.items()}
        for one, places in ((s.trace, torch.cat(c)) for s, c in zip(subjects, chosen, strict=True))
    ]
    highest = {
        key: max(
            max(found[key].max().item() for found in counts if key in found),
            *(2.0 * subject.trace.facts.topk for subject in subjects),
        )
        for key in {key for found in counts for key in found}
    }
    return [
        _sample(subject.trace, of_domains, found, highest)
        for subject, of_domains, found in zip(subjects, chosen, counts, strict=True)
    ]


def _choose(trace: Trace, tokens: int) -> list[Tensor]:
    """Return the places of the tokens of each domain."""
    domains = len(trace.facts.domains)
    found = ((trace.domains == number).nonzero(as_tuple=True)[0] for number in range(domains))
    return [places[: tokens // domains] for places in found]


def _mean(trace: Trace, places: Tensor) -> Tensor:
    counts = [layer.counts()[places] for layer in trace.layers.values()]
    return torch.stack(counts).double().mean(dim=0)


def _sample(
    trace: Trace, chosen: list[Tensor], counts: dict[str, Tensor], highest: dict[str, float]
) -> Sample:
    selections = {key: _levels(values, highest[key]) for key, values in counts.items()}
    passages, start = [], 0
    for domain, of_domain in zip(trace.facts.domains, chosen, strict=True):
        ids, end = trace.tokens[of_domain].tolist(), start + len(of_domain)
        texts = [trace.texts.get(token, f"[{token}]") for token in ids]
        if end > start:
            passages.append(Passage(domain, texts, selections["all"][0][start:end]))
        start = end
    of_layers = {str(number): counts[str(number)].long().tolist() for number in trace.layers}
    losses = [round(loss, 2) for loss in trace.losses[torch.cat(chosen)].tolist()]
    return Sample(passages, selections, of_layers, losses)


def _levels(values_T: Tensor, highest: float) -> tuple[str, list[tuple[int, str]]]:
    """Return a digit for each value, 0 for zero alone, and the values that digits mean."""
    levels_T = (values_T / highest * (LEVELS - 1)).round().clamp(min=1).long()
    levels_T = levels_T.where(values_T > 0, 0)
    digits = "".join(map(str, levels_T.tolist()))
    scale = []
    for level in sorted(set(levels_T.tolist())):
        of_level = values_T[levels_T == level]
        low, high = of_level.min().item(), of_level.max().item()
        scale.append((level, f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"))
    return digits, scale
