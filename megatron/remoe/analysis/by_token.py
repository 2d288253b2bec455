"""How many experts tokens activate, by what the tokens are: answers 1, 5 and 7 of an analysis.

Rows are in long format. `layer` is a layer's number, which begins with 1, or "all" for the mean
over layers. `mean`, `low` and `high` are a mean and its 95% interval by Student's t, of which the
unit is the sequence (`remoe.usage.group_means`); `low` and `high` are None where tokens of one
sequence only are there.

Shapes: T tokens, L layers with experts.
"""

import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from megatron.remoe.analysis.trace import Trace
from remoe.analysis import frequency_classes, leading_expert
from remoe.usage import changed_experts, doubling_bins, equal_classes, group_means

Row = dict[str, Any]
FREQUENCY_CLASSES = 8
LOSS_CLASSES = 10
POSITION_BINS = 16
WORD_PARTS = (
    "word start", "inside a word", "number", "punctuation", "white space", "other",
)  # fmt: skip
_START, _INSIDE, _NUMBER, _PUNCTUATION, _SPACE, _OTHER = range(len(WORD_PARTS))


def by_frequency(trace: Trace) -> list[Row]:
    """Return the active experts by how often the token's id occurs in the traced text.

    Class 1 has the rarest ids, and each class about as many tokens. ReMoE's figure 7 (arXiv
    2412.14711) has more active experts for rare tokens.
    """
    classes_T = frequency_classes(trace.tokens, FREQUENCY_CLASSES)
    counts_T = torch.bincount(trace.tokens)[trace.tokens]

    def label(group: int, of_T: Tensor) -> Row:
        counts = counts_T[of_T]
        return {
            "class": group + 1,
            "count_low": int(counts.min()),
            "count_high": int(counts.max()),
        }

    return _active_by(trace, classes_T, FREQUENCY_CLASSES, label)


def by_loss(trace: Trace) -> list[Row]:
    """Return the active experts by the loss of the token that follows; class 1 has the lowest.

    The paper has no such figure. It is the test of whether difficult tokens get more experts.
    """
    classes_T = equal_classes(trace.losses, LOSS_CLASSES)

    def label(group: int, of_T: Tensor) -> Row:
        return {"class": group + 1, "loss": _mean(trace.losses[of_T])}

    return _active_by(trace, classes_T, LOSS_CLASSES, label)


def by_position(trace: Trace) -> list[Row]:
    """Return the active experts by the position in the sequence, from 0, in bins that double."""
    bins_T = doubling_bins(trace.position, POSITION_BINS)

    def label(group: int, of_T: Tensor) -> Row:
        positions = trace.position[of_T]
        return {"first": int(positions.min()), "last": int(positions.max())}

    return _active_by(trace, bins_T, POSITION_BINS, label)


def by_word_part(trace: Trace) -> list[Row]:
    """Return the active experts by the part of a word that a token is; no row without texts.

    ReMoE's figure 7 has few experts for white space and for "the".
    """
    if not trace.texts:
        return []
    return _active_by(
        trace, word_parts(trace), len(WORD_PARTS), lambda group, _: {"part": WORD_PARTS[group]}
    )


def by_domain(trace: Trace) -> list[Row]:
    """Return the active experts and the loss by the domain of the text.

    ReMoE's appendix G finds that domains differ in this number, in deep layers most.
    """
    losses = {
        name: _mean(trace.losses[trace.domains == number])
        for number, name in enumerate(trace.facts.domains)
    }
    rows = _active_by(
        trace, trace.domains, len(losses), lambda group, _: {"domain": trace.facts.domains[group]}
    )
    return [row | {"loss": losses[row["domain"]]} for row in rows]


def active_by_layer(trace: Trace) -> dict[int | str, Tensor]:
    """Return the active experts of each token, fp64 `[T]`, by layer, and their mean as "all"."""
    found: dict[int | str, Tensor] = {
        number: layer.counts().double() for number, layer in trace.layers.items()
    }
    return found | {"all": torch.stack(list(found.values())).mean(dim=0)}


def _active_by(
    trace: Trace, groups_T: Tensor, num_groups: int, label: Callable[[int, Tensor], Row]
) -> list[Row]:
    """Return a row for each layer and group that has tokens, with what the group is called."""
    groups = torch.unique(groups_T).tolist()
    labels = {group: label(group, groups_T == group) for group in groups}
    rows = []
    for number, active_T in active_by_layer(trace).items():
        means = list(_means(active_T, groups_T, trace.sequence, num_groups))
        rows += [{"layer": number} | labels[group] | means[group] for group in groups]
    return rows


def _means(
    values_T: Tensor, groups_T: Tensor, sequences_T: Tensor, num_groups: int
) -> Iterator[Row]:
    """Yield tokens, mean and interval of each group."""
    found = group_means(values_T, groups_T, sequences_T, num_groups)
    freedom_G = (found.sequences - 1).clamp(min=1)
    half_G = torch.as_tensor(stdtrit(freedom_G.numpy(), 0.975)) * found.standard_error
    columns = (found.tokens, found.mean, found.mean - half_G, found.mean + half_G)
    for cells in zip(*(column.tolist() for column in columns), strict=True):
        yield dict(zip(("tokens", "mean", "low", "high"), cells, strict=True))


def _mean(values_T: Tensor) -> float:
    return float(values_T.double().mean())


def word_parts(trace: Trace) -> Tensor:
    """Return what part of a word each token is, as an index of `WORD_PARTS`, int64 `[T]`.

    Letters are a word's start if white space is before them, in the token itself or at the end of
    the token before, or anything else that is no letter, and at the start of a sequence. Signs such
    as `+` are punctuation. A token of several kinds, part of a character, or without text is
    "other".
    """
    texts = trace.texts
    ids, of_T = torch.unique(trace.tokens, return_inverse=True)
    known = [texts.get(i, "") for i in ids.tolist()]
    kinds_T = torch.tensor([_kind(text) for text in known])[of_T]
    spaced_T = torch.tensor([text[:1].isspace() for text in known])[of_T]
    lettered_T = torch.tensor([_category(text[-1:]) in "LM" for text in known])[of_T]
    continues_T = torch.zeros_like(lettered_T)
    continues_T[1:] = lettered_T[:-1] & ~spaced_T[1:] & (trace.position[1:] > 0)
    return torch.where((kinds_T == _START) & continues_T, _INSIDE, kinds_T)


def _kind(text: str) -> int:
    """Return the kind of a text, which is `_START` for letters."""
    if text.isspace():
        return _SPACE
    kinds = {_KINDS.get(_category(character), _OTHER) for character in text.strip()}
    return kinds.pop() if len(kinds) == 1 else _OTHER


_KINDS = {"L": _START, "M": _START, "N": _NUMBER, "P": _PUNCTUATION, "S": _PUNCTUATION}


def _category(character: str) -> str:
    """Return the first letter of the general category of a character; "?" for none or a broken one.

    What cannot be decoded is the replacement character.
    """
    return unicodedata.category(character)[0] if character not in ("", "\ufffd") else "?"


def histogram(trace: Trace) -> list[Row]:
    """Return how many tokens activate each number of experts, and the FLOPs of these experts.

    `active` has all numbers from the smallest to the largest that occurs. In rows of layer "all"
    tokens are counted by the sum over layers: `active` is this sum divided by the number of layers,
    and `flops` are those of all layers. The means of the paper hide this spread.
    """
    totals_T = torch.stack([layer.counts() for layer in trace.layers.values()]).sum(dim=0)
    counts: dict[int | str, tuple[Tensor, int]] = {
        number: (layer.counts(), 1) for number, layer in trace.layers.items()
    }
    rows = []
    for number, (counts_T, layers) in (counts | {"all": (totals_T, len(counts))}).items():
        tokens = torch.bincount(counts_T).tolist()
        rows += [
            {
                "layer": number,
                "active": active if number != "all" else active / layers,
                "tokens": tokens[active],
                "share": tokens[active] / len(counts_T),
                "flops": active * trace.facts.flops_per_expert,
            }
            for active in range(int(counts_T.min()), len(tokens))
        ]
    return rows


def flips(traces: list[Trace]) -> list[Row]:
    """Return how far the experts of the same tokens change between neighboring checkpoints.

    `flip_rate` is the mean over tokens of the Jaccard distance of their sets of experts, with its
    interval; `flip_count` the mean number of experts that joined or left, the flip count of ReMoE's
    figure 10 (appendix A), there between neighboring steps; and `leading_changed` the share of
    tokens whose expert of the largest score is another. A token without a positive score has none.

    Raises:
        ValueError: two checkpoints were not traced on the same tokens, or have other layers.
    """
    rows = []
    for first, second in pairwise(traces):
        if not torch.equal(first.tokens, second.tokens) or first.layers.keys() != (
            second.layers.keys()
        ):
            raise ValueError(
                f"{first.facts.model} was traced at iterations {first.facts.iteration} and "
                f"{second.facts.iteration} on different tokens or layers, so that flips cannot be "
                f"counted; trace the run again, into an empty folder"
            )
        changes: dict[int | str, tuple[Tensor, ...]] = {}
        for number, layer in first.layers.items():
            other = second.layers[number]
            leading_T = [leading_expert(part.ranked()) for part in (layer, other)]
            changes[number] = (
                *changed_experts(layer.active(), other.active()),
                leading_T[0] != leading_T[1],
            )
        parts = zip(*changes.values(), strict=True)
        changes["all"] = tuple(torch.stack(part).double().mean(dim=0) for part in parts)
        for layer_number, (rate_T, count_T, leading_changed_T) in changes.items():
            (found,) = _means(rate_T, torch.zeros_like(first.tokens), first.sequence, 1)
            rows.append(
                {
                    "first": first.facts.iteration,
                    "second": second.facts.iteration,
                    "layer": layer_number,
                    "flip_rate": found["mean"],
                    "low": found["low"],
                    "high": found["high"],
                    "flip_count": _mean(count_T),
                    "leading_changed": _mean(leading_changed_T),
                }
            )
    return rows
