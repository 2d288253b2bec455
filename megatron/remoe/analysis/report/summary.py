"""The tables of a report: what each model is, what it reached and took, and its experts' words."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.remoe.analysis.measures import last_mean
from megatron.remoe.analysis.report.drawing import joined, number
from megatron.remoe.analysis.report.experts import busiest
from megatron.remoe.analysis.report.subject import Row, Subject
from megatron.remoe.analysis.report.tokens import flops

_WORDS = 12  # tokens of an expert
_PAIRS = 600  # experts of all layers and models, above which only a few words of each are shown
_FEW_WORDS = 4


@dataclass(frozen=True)
class Card:
    """A number that the head of the report shows.

    Attributes:
        label: what it is.
        value: the number in words.
        note: what it is compared with; may be empty.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that can be sorted.

    Attributes:
        text: what it shows.
        key: what it is sorted by.
    """

    text: str
    key: float | str


@dataclass(frozen=True)
class Words:
    """The tokens that an expert gets more often than others.

    Attributes:
        run: the model.
        layer: the number of the layer.
        expert: the number of the expert.
        tokens: each token's text, and what it is told about.
    """

    run: str
    layer: int
    expert: int
    tokens: list[tuple[str, str]]


def cards(subject: Subject) -> list[Card]:
    """Return the numbers by which a model is introduced."""
    facts, run, found = subject.trace.facts, subject.run, []
    loss = statistics.fmean(subject.trace.losses.tolist())
    valid = run.last_evaluation().get("valid") if run else None
    if valid is not None:
        found.append(Card("validation loss", f"{valid:.3f}", "nats per token"))
    found.append(Card("loss on this text", f"{loss:.3f}", "nats per token"))
    found.append(Card("active experts", f"{active(subject):.3g}", f"of {facts.num_experts}"))
    if run is not None and run.has_relu_routing:
        sparsity = last_mean(run, "sparsity")
        target = f"target {run.target_sparsity:.4g}"
        found.append(Card("sparsity", number(sparsity, ".4f"), target))
    found.append(Card("dead experts", str(_dead(subject)), f"of {_experts(subject)}"))
    if subject.size:
        total = f"of {_millions(subject.size.total_params)}"
        found.append(Card("active parameters", _millions(subject.size.active_params), total))
    return found


def active(subject: Subject) -> float:
    """Return the mean number of active experts of a token in a layer."""
    counts = [layer.counts().double().mean().item() for layer in subject.trace.layers.values()]
    return statistics.fmean(counts)


def _dead(subject: Subject) -> int:
    return sum(bool(row["dead"]) for row in subject.tables["load"] if row["layer"] != "all")


def _experts(subject: Subject) -> int:
    return subject.trace.facts.num_experts * len(subject.trace.layers)


def _millions(value: float) -> str:
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.3g}M"


def summary(subjects: Sequence[Subject]) -> list[tuple[str, list[str]]]:
    """Return the rows of the summary, with a text for every model; empty rows are left out."""
    rows = [(label, [tell(one) for one in subjects]) for label, tell in _ROWS.items()]
    domains = dict.fromkeys(d for one in subjects for d in one.trace.facts.domains)
    for domain in domains:
        rows.append((f"loss on {domain}", [_loss_of(one, domain) for one in subjects]))
    return [(label, texts) for label, texts in rows if any(texts)]


def _loss_of(subject: Subject, domain: str) -> str:
    found = [row for row in subject.rows("by_domain", domain=domain) if row["layer"] == "all"]
    return number(found[0]["loss"], ".4f") if found else ""


def _of_run(tell: Callable[[Any], Any]) -> Callable[[Subject], str]:
    """Return a function that tells something of a run, or nothing where it is not known."""

    def text(subject: Subject) -> str:
        found = None if subject.run is None else tell(subject.run)
        return "" if found is None else str(found)

    return text


def _of_size(tell: Callable[[Any], str]) -> Callable[[Subject], str]:
    return lambda subject: "" if subject.size is None else tell(subject.size)


def _text(subject: Subject) -> str:
    facts = subject.trace.facts
    tokens, length = len(subject.trace.tokens), facts.sequence_length
    at = "" if facts.iteration is None else f", at iteration {facts.iteration}"
    return f"{tokens:,} tokens in sequences of {length}{at}"


def _settled(run: Any) -> str | None:
    if not run.has_relu_routing:
        return None
    return f"step {run.stages.sparse_from}" if run.stages.sparse_from else "not yet"


def _memory(run: Any) -> str | None:
    peaks = [row["peak_memory"] for row in run.train if row.get("peak_memory")]
    return f"{max(peaks) / 1e9:.2f} GB" if peaks else None


def _final(run: Any, key: str, form: str) -> str | None:
    value = last_mean(run, key)
    return None if value is None else format(value, form)


_ROWS: dict[str, Callable[[Subject], str]] = {
    "router": lambda one: one.router,
    "experts of a layer": lambda one: str(one.trace.facts.num_experts),
    "active experts, aim": lambda one: str(one.trace.facts.topk),
    "layers with experts": lambda one: str(len(one.trace.layers)),
    "granularity": _of_run(lambda run: run.config.get("moe_granularity") or 1),
    "parameters": _of_size(lambda size: _millions(size.total_params)),
    "active parameters": _of_size(lambda size: _millions(size.active_params)),
    "forward compute of a token": lambda one: flops(
        one.trace.facts.flops_others
        + one.trace.facts.flops_per_expert * active(one) * len(one.trace.layers)
    ),
    "steps": _of_run(lambda run: f"{run.train[-1]['iteration']:,}"),
    "tokens of training": _of_run(
        lambda run: f"{run.train[-1]['tokens']:,}" if "tokens" in run.train[-1] else None
    ),
    "training loss, last 20 steps": _of_run(lambda run: _final(run, "lm_loss", ".4f")),
    "sparsity, last 20 steps": _of_run(lambda run: _final(run, "sparsity", ".4f")),
    "sparsity settles at": _of_run(_settled),
    "dead experts, below 1/8 of an even load": _of_run(
        lambda run: _final(run, "dead_experts", ".3g")
    ),
    "highest peak of memory": _of_run(_memory),
    "analyzed text": _text,
    "active experts on it": lambda one: f"{active(one):.3f}",
    "dead experts on it, without a token": lambda one: f"{_dead(one)} of {_experts(one)}",
    "loss on it": lambda one: f"{statistics.fmean(one.trace.losses.tolist()):.4f}",
}


def stages(subjects: Sequence[Subject]) -> tuple[list[Row], list[list[Cell]]]:
    """Return time and memory of the stages of training: rows for CSV, and cells to show."""
    rows: list[Row] = [
        {
            "run": one.name, "stage": cost.name, "first": cost.first, "last": cost.last,
            "seconds": cost.seconds, "share": cost.share, "peak_memory": cost.peak_memory,
        }
        for one in subjects
        if one.run is not None and {"tokens", "tokens_per_second"} <= one.run.train[0].keys()
        for cost in one.run.stage_costs
    ]  # fmt: skip
    cells = [
        [
            _cell(row["run"]),
            _cell(row["stage"]),
            _cell(row["first"], f"{row['first']} to {row['last']}"),
            _cell(row["seconds"], f"{row['seconds']:.1f}"),
            _cell(row["share"], f"{row['share']:.1%}"),
            _cell(row["peak_memory"] or 0, _gigabytes(row["peak_memory"])),
        ]
        for row in rows
    ]
    return rows, cells


STAGES = ("run", "stage", "steps", "seconds", "share of time", "peak memory")


def _gigabytes(peak: int | None) -> str:
    return "–" if peak is None else f"{peak / 1e9:.2f} GB"


def _cell(key: float | str | None, text: str | None = None) -> Cell:
    shown = text if text is not None else number(key) if isinstance(key, float) else str(key)
    return Cell("–" if key is None else shown, -1.0 if key is None else key)


LOADS = ("run", "layer", "expert", "load / mean", "of tokens", "mean gate", "dead")


def loads(subjects: Sequence[Subject]) -> list[tuple[str, list[Cell]]]:
    """Return the loads of experts by layer: the layer of each row, and its cells."""
    return [
        (
            str(row["layer"]),
            [
                _cell(one.name),
                _cell(row["layer"]),
                _cell(row["expert"]),
                _cell((row["share"] or 0.0) * one.trace.facts.num_experts),
                _cell(row["per_token"], number(row["per_token"], ".2%")),
                _cell(row["gate"]),
                _cell("yes" if row["dead"] else "no"),
            ],
        )
        for one in subjects
        for row in one.tables["load"]
        if row["layer"] != "all" and row["expert"] in busiest(one, str(row["layer"]))
    ]


BALANCE = ("run", "layer", "active", "with two or more", "first / second", "share of the k largest")


def balance(subjects: Sequence[Subject]) -> list[list[Cell]]:
    """Return how sharply routers choose, by layer."""
    keys = ("active_experts", "two_active", "inner_balance", "outer_balance")
    return [
        [_cell(row["run"]), _cell(str(row["layer"])), *(_cell(row[key]) for key in keys)]
        for row in joined(subjects, "balance")
    ]


def vocabulary(subjects: Sequence[Subject]) -> list[Row]:
    """Return the rows of the tokens that are shown of each expert, of the busiest experts."""
    most = _WORDS if sum(map(_experts, subjects)) <= _PAIRS else _FEW_WORDS
    rows = []
    for one in subjects:
        drawn = {layer: busiest(one, str(layer)) for layer in one.trace.layers}
        rows += [
            {"run": one.name} | row
            for row in one.tables["vocabulary"]
            if row["rank"] <= most and row["expert"] in drawn[row["layer"]]
        ]
    return rows


def words(rows: Sequence[Row]) -> list[Words]:
    """Return the tokens of each expert, from the rows of `vocabulary`."""
    found: dict[tuple[str, int, int], list[tuple[str, str]]] = {}
    for row in rows:
        about = f"{row['count']} times, {row['expected']:.1f} by chance"
        text = f"[{row['id']}]" if row["text"] is None else visible(row["text"])
        key = (row["run"], row["layer"], row["expert"])
        found.setdefault(key, []).append((text, about))
    return [Words(*key, tokens) for key, tokens in found.items()]


def visible(text: str) -> str:
    """Return a token's text in which white space can be seen."""
    short = re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
    return short.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
