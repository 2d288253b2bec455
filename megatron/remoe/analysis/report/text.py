"""The sample of text in a report, in which every token shows its number of active experts."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron.remoe.analysis.report.subject import Subject

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


def sample(subject: Subject, tokens: int = _TOKENS) -> Sample:
    """Choose the first tokens of each domain, and color them.

    A token without an active expert has color 0, and one with the most has the last color. Tokens
    whose text is not known show their id.

    Args:
        subject: the model.
        tokens: the number of tokens of all domains together.
    """
    trace = subject.trace
    per_domain = tokens // len(trace.facts.domains)
    chosen = []
    for number in range(len(trace.facts.domains)):
        (places,) = (trace.domains == number).nonzero(as_tuple=True)
        chosen.append(places[:per_domain])
    places = torch.cat(chosen)
    counts_LT = torch.stack([layer.counts()[places] for layer in trace.layers.values()])
    colored = {"all": counts_LT.double().mean(dim=0)}
    colored |= dict(zip(map(str, trace.layers), counts_LT.double(), strict=True))
    selections = {key: _levels(values) for key, values in colored.items()}
    passages, start = [], 0
    for domain, of_domain in zip(trace.facts.domains, chosen, strict=True):
        ids, end = trace.tokens[of_domain].tolist(), start + len(of_domain)
        texts = [trace.texts.get(token, f"[{token}]") for token in ids]
        if end > start:
            passages.append(Passage(domain, texts, selections["all"][0][start:end]))
        start = end
    counts = dict(zip(map(str, trace.layers), counts_LT.tolist(), strict=True))
    losses = [round(loss, 2) for loss in trace.losses[places].tolist()]
    return Sample(passages, selections, counts, losses)


def _levels(values_T: torch.Tensor) -> tuple[str, list[tuple[int, str]]]:
    """Return a digit for each value, 0 for zero alone, and the values that digits mean."""
    highest = max(values_T.max().item(), 1.0)
    levels_T = (values_T / highest * (LEVELS - 1)).round().clamp(min=1).long()
    levels_T = levels_T.where(values_T > 0, 0)
    digits = "".join(map(str, levels_T.tolist()))
    scale = []
    for level in sorted(set(levels_T.tolist())):
        of_level = values_T[levels_T == level]
        low, high = of_level.min().item(), of_level.max().item()
        scale.append((level, f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"))
    return digits, scale
