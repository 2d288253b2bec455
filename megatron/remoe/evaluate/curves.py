"""Measure the loss of models against the mean number of active experts, without training.

Routers with ReLU gates get a threshold, or below it a negative offset for more experts than they
activate. TopK routers get another k, and ours among them also a threshold. Thresholds of layers, as
adopted models have them, are moved by one number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.analysis.budget import Curve, Measured, Point
from megatron.remoe.analysis.measures import half_width
from megatron.remoe.convert.exported import check_vocabulary
from megatron.remoe.evaluate.interventions import Intervention
from megatron.remoe.evaluate.models import Opened, open_model
from megatron.remoe.evaluate.perplexity import default_length, find_domains
from megatron.remoe.evaluate.routing import batches_of, losses_of
from megatron.remoe.evaluate.text import Text, read_text
from remoe.hf.budget_remoe import LEAST_TOKENS, UnreachableBudget
from remoe.hf.configuration_remoe import L1_ROUTERS

POINTS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 3.0)  # times the trained mean
_CALIBRATION = 4096  # tokens, from the beginning of the text
_MET = 0.01  # a point this close to the model as it is, as a share, is not measured again


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        points: mean numbers of active experts, as multiples of the trained k.
        tokens: the largest number of tokens, in whole sequences of all domains in turn.
        sequence_length: the length of the sequences; None is the shortest default of the models.
        seed: the seed of the order of documents.
        tokenizer: a tokenizer to use in place of the models' own.
    """

    points: tuple[float, ...] = POINTS
    tokens: int = 32768
    sequence_length: int | None = None
    seed: int = 1234
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for point in self.points:
            if not 0 < point < 1e6:
                raise ValueError(
                    f"points has {point:g}; they are multiples of the trained number of active "
                    f"experts, above 0, such as 0.5,1,2"
                )


def measure(
    paths: Sequence[Path],
    data: Path,
    settings: Settings,
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Return the curve of every model on the same text.

    Args:
        paths: run directories, checkpoints or Hugging Face folders, each with experts.
        data: a folder of token files, or one of them without its suffix.
        settings: what to measure.
        shown: called with the number of models that are done, and of all models.

    Raises:
        ValueError: a model is dense or has a router without such a budget, or there is too little
            text, or text of another vocabulary.
    """
    opened = [open_model(path, settings.tokenizer) for path in paths]
    for one in opened:
        if not one.router.startswith("topk_") and one.router not in L1_ROUTERS:
            raise ValueError(
                f"{one.path} has the router {one.router}, whose number of active experts has no "
                f"threshold and no k to change; leave it out"
            )
    text = _text(opened, data, settings)
    curves = []
    for done, one in enumerate(opened):
        shown(done, len(opened))
        curves.append(_curve(one, text, settings))
    shown(len(opened), len(opened))
    return Measured(str(data), settings.seed, len(text.inputs), text.length, curves)


def _text(opened: list[Opened], data: Path, settings: Settings) -> Text:
    tokenizers = [one.tokenizer for one in opened if one.tokenizer is not None]
    if any(one.vocabulary() != tokenizers[0].vocabulary() for one in tokenizers):
        raise ValueError(
            f"the tokenizers of {', '.join(str(one.path) for one in opened)} have different "
            f"entries, so that no text is the same for all; measure the models one by one"
        )
    domains = find_domains(data, tokenizers[0] if tokenizers else None)
    configs = [one.config.to_dict() if one.source is None else one.source.config for one in opened]
    length = settings.sequence_length or min(map(default_length, configs))
    text = read_text(str(data), domains, length=length, tokens=settings.tokens, seed=settings.seed)
    if len(text.inputs) < 2:
        raise ValueError(
            f"{data} has one sequence of {length} tokens, from which no interval follows; name "
            f"more data, or use shorter sequences (--sequence-length)"
        )
    calibration = _calibration(text)
    if calibration.numel() < LEAST_TOKENS:
        raise ValueError(
            f"{calibration.numel()} tokens are too few to set a budget by; read at least "
            f"{LEAST_TOKENS} (--tokens)"
        )
    for one in opened:
        check_vocabulary(torch.cat((text.inputs, text.labels)), one.shape.config.vocab_size)
    return text


def _calibration(text: Text) -> Tensor:
    return text.inputs[: max(1, _CALIBRATION // text.length)]


def _curve(opened: Opened, text: Text, settings: Settings) -> Curve:
    model = opened.load(torch.float32)
    topk = int(opened.config.num_experts_per_tok)
    plain = _read(model, text, Intervention())
    points = [_point("none", None, plain, plain)]
    left_out: list[float] = []
    for change in _changes(model, opened, text, settings, plain[1]):
        if isinstance(change, float):
            left_out.append(change)
        else:
            by, value, intervention = change
            points.append(_point(by, value, _read(model, text, intervention), plain))
    return Curve(str(opened.path), opened.router, topk, opened.num_experts, points, left_out)


def _changes(
    model: Any,
    opened: Opened,
    text: Text,
    settings: Settings,
    active: float,
) -> Iterator[tuple[str, float | list[float], Intervention] | float]:
    """Change a model, one point after the other; yield what was changed, and how it is applied.

    A float alone is a number of active experts that nothing reaches. Targets grow, and an offset,
    which removes thresholds of layers, comes after all of these.
    """
    topk, experts = int(opened.config.num_experts_per_tok), opened.num_experts
    is_topk = opened.router.startswith("topk_")
    fields = [getattr(opened.config, name, None) for name in ("gate_threshold", "gate_offset")]
    has_budget = fields != [None, None]
    if is_topk and not has_budget:
        levels = {max(1, min(experts, round(topk * point))) for point in settings.points}
        for k in sorted(levels - {topk}):
            yield "k", k, Intervention(topk=k)
    if opened.source is None:
        return
    calibration, most = _calibration(text), active
    if has_budget:
        own = model.config.gate_threshold
        model.set_budget(None)
        most = _read(model, text, Intervention())[1]
        model.config.gate_threshold = own
    for target in [topk * point for point in sorted(set(settings.points))]:
        adds = target > most * (1 + _MET if is_topk else 1 - _MET)  # all of k are reached exactly
        if abs(target - active) <= _MET * active or (adds and is_topk and not has_budget):
            continue  # which is measured as it is, or by another k
        by = "offset" if adds else "threshold"
        try:
            if target >= experts or (adds and is_topk):
                raise UnreachableBudget
            budget = model.set_budget(target, calibration, by=by)
        except UnreachableBudget:
            yield float(target)
        else:
            yield by, budget.value, Intervention()


def _read(model: Any, text: Text, intervention: Intervention) -> tuple[Tensor, float]:
    """Return the loss of every sequence, `[N]`, in nats per token, and the mean active experts."""
    losses = []
    with intervention.apply(model) as counts:
        for inputs, labels, _ in batches_of(text):
            losses.append(losses_of(model, inputs, labels).view(labels.shape).double().mean(dim=1))
    return torch.cat(losses), float(torch.cat(counts).double().mean())


def _point(
    by: str,
    value: float | list[float] | None,
    found: tuple[Tensor, float],
    plain: tuple[Tensor, float],
) -> Point:
    losses, extra = found[0], found[0] - plain[0]
    return Point(
        by=by,
        value=value,
        active=found[1],
        loss=float(losses.mean()),
        half_width=half_width(losses.tolist()),
        extra_loss=float(extra.mean()),
        extra_half_width=half_width(extra.tolist()),
    )
