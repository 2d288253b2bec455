"""The answers of several runs in Markdown: a small table for each, with intervals over seeds."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.remoe.analysis import markdown
from megatron.remoe.analysis.answers import read_answers
from megatron.remoe.analysis.measures import half_width, mean_of
from megatron.remoe.analysis.routing import models_by_seed

Row = dict[str, Any]
Tables = dict[str, list[Row]]
# The answers of runs that differ in their seed only, by the name of their router and the seed.
Groups = Mapping[str, Mapping[int, Tables]]
Number = Callable[[Tables], float | None]
_ALL = {"layer": "all"}


@dataclass(frozen=True)
class Finding:
    """What a paper found, as a number that should be positive.

    Attributes:
        text: the finding.
        source: where it is.
        number: what is positive if the finding is seen.
        router: the name of the group that has it.
        other: the group whose number at the same seed is subtracted; None for none.
    """

    text: str
    source: str
    number: Number
    router: str
    other: str | None = None


def read_groups(analyses: Mapping[Path, Path]) -> Groups:
    """Read the answers of models; runs that differ in their seed only are a group.

    Args:
        analyses: the folder of the analysis by the model, which is a run directory or any other. A
            model that is no run is a group of its own, of one seed, and named as it is given.

    Raises:
        ValueError: a run has no answers, or two runs have the same settings and seed.
    """
    return {
        name: {seed: read_answers(analyses[path]) for seed, path in sorted(by_seed.items())}
        for name, by_seed in models_by_seed(analyses).items()
    }


def results(groups: Groups) -> str:
    """Return a table for each of the eight answers, and one of the papers' findings.

    A cell is a mean over seeds, with half the width of its 95% interval by Student's t if there are
    two seeds or more. A number that no run has, has no cell, and a table without one is left out.

    Args:
        groups: what `answers` returns for each run, by the name of its router and the seed.
    """
    parts = []
    for title, numbers in _sections(groups).items():
        rows = [
            [name, len(runs), *(_cell(map(number, runs.values())) for number in numbers.values())]
            for name, runs in groups.items()
        ]
        titles = ["router", "seeds", *numbers]
        shown = [i for i in range(len(titles)) if any(row[i] for row in rows)]
        if len(shown) > 2:
            cells = ([row[i] for i in shown] for row in rows)
            parts += [f"## {title}", markdown.lines([titles[i] for i in shown], cells)]
    found = [row for finding in FINDINGS if (row := _found(finding, groups))]
    if found:
        titles = ["finding", "source", "number", "mean", "here"]
        parts += ["## What the papers found", markdown.lines(titles, found)]
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"


def _cell(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _interval(known, "") if known else ""


def _interval(known: list[float], sign: str) -> str:
    mean = f"{statistics.fmean(known):{sign}.4g}"
    return mean if len(known) < 2 else f"{mean} ± {half_width(known):.2g}"


def _found(finding: Finding, groups: Groups) -> list[str] | None:
    """Return the row of a finding; None without a run that has its number."""
    values = {seed: finding.number(run) for seed, run in groups.get(finding.router, {}).items()}
    name = finding.router
    if finding.other is not None:
        others = {seed: finding.number(run) for seed, run in groups.get(finding.other, {}).items()}
        values = {
            seed: value - other
            for seed, value in values.items()
            if value is not None and (other := others.get(seed)) is not None
        }
        name = f"{finding.router} minus {finding.other}"
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    return [finding.text, finding.source, name, _interval(known, "+"), _verdict(known)]


def _verdict(values: list[float]) -> str:
    """Return whether the 95% interval of the mean is above 0, below it, or neither."""
    if len(values) < 2:
        return "one seed"
    mean, half = statistics.fmean(values), half_width(values)
    if mean - half > 0:
        return "seen"
    return "the opposite is seen" if mean + half < 0 else "undecided"


def _sections(groups: Groups) -> dict[str, dict[str, Number]]:
    """Return the numbers of each answer by their titles."""
    runs = [tables for by_seed in groups.values() for tables in by_seed.values()]

    def every(table: str, column: str) -> list[Any]:
        return sorted({row[column] for tables in runs for row in tables[table]})

    return {
        "1. Active experts by token": {
            "rarest ids": _edge("by_frequency", 0),
            "most frequent ids": _edge("by_frequency", -1),
            "lowest loss": _edge("by_loss", 0),
            "highest loss": _edge("by_loss", -1),
            "first position": _edge("by_position", 0),
            "last positions": _edge("by_position", -1),
            **{part: _at("by_word_part", "mean", part=part, **_ALL) for part in _PARTS},
            "domain with fewest": _of("by_domain", "mean", min, **_ALL),
            "domain with most": _of("by_domain", "mean", max, **_ALL),
        },
        "2. Experts and domains": {
            "information, nats": _at("specialization", "information", **_ALL),
            "shuffled": _at("specialization", "shuffled", **_ALL),
            "excess / entropy": _at("specialization", "share", **_ALL),
            "largest difference of a domain": _largest_difference,
        },
        "3. Vocabulary": {
            "ids of an expert, of 20": _vocabulary_size,
            "lift of the first": _of("vocabulary", "lift", mean_of, rank=1),
            "routing probability of the first": _routing_probability,
        },
        "4. Experts with each other, and neighboring layers": {
            "Jaccard": _of("coactivation", "jaccard", mean_of),
            "cosine": _of("coactivation", "cosine", mean_of),
            **{title: _at("balance", key, **_ALL) for title, key in _BETWEEN.items()},
        },
        "5. Flips between the last two checkpoints": {
            "flip rate": _last_flip("flip_rate"),
            "experts changed": _last_flip("flip_count"),
            "leading expert changed": _last_flip("leading_changed"),
        },
        "6. Load": {
            "dead experts": _of("load", "dead", sum),
            "starved experts": _of("load", "starved", sum),
            "largest share of a layer": _of("load", "share", max),
            **{
                f"step time, EP {size}": _at("load_time", "step_time", parallel_size=size, **_ALL)
                for size in every("load_time", "parallel_size")
            },
        },
        "7. Active experts of a token in a layer": {
            "mean": lambda tables: _moments(tables)[0],
            "standard deviation": lambda tables: _moments(tables)[1],
            "share without any": _share_of(lambda active: active == 0),
            "share with two or more": _share_of(lambda active: active >= 2),
        },
        "8. Extra loss": {
            **{
                f"{removed} removed": _at("pruning", "extra_loss", removed=removed)
                for removed in every("pruning", "removed")
                if removed
            },
            **{
                f"shift of {part:g}": _shift_loss(part)
                for part in sorted({part for tables in runs for part in _shifts(tables)})
                if part
            },
            **{f"k = {k}": _at("lower_k", "extra_loss", k=k) for k in every("lower_k", "k")[:-1]},
        },
    }


_PARTS = ("word start", "inside a word", "number", "punctuation", "white space")
_BETWEEN = {
    "MI": "information",
    "MI control": "information_shuffled",
    "token MI": "expert_information",
    "token MI control": "expert_information_shuffled",
}


def _rows(tables: Tables, table: str, where: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a table that have these values."""
    return [row for row in tables[table] if all(row[key] == v for key, v in where.items())]


def _at(table: str, column: str, **where: Any) -> Number:
    """Return the number in the one row that has these values."""

    def number(tables: Tables) -> float | None:
        rows = _rows(tables, table, where)
        return rows[0][column] if rows else None

    return number


def _of(
    table: str, column: str, reduce: Callable[[list[float]], float | None], **where: Any
) -> Number:
    """Return a number from a column of the rows that have these values."""

    def number(tables: Tables) -> float | None:
        values = [row[column] for row in _rows(tables, table, where) if row[column] is not None]
        return reduce(values) if values else None

    return number


def _edge(table: str, index: int) -> Number:
    """Return the mean over layers of the first or the last class."""

    def number(tables: Tables) -> float | None:
        rows = _rows(tables, table, _ALL)
        return rows[index]["mean"] if rows else None

    return number


def _difference(first: Number, second: Number) -> Number:
    def number(tables: Tables) -> float | None:
        a, b = first(tables), second(tables)
        return None if a is None or b is None else a - b

    return number


def _largest_difference(tables: Tables) -> float | None:
    """Return how much more of a domain's tokens than of all tokens an expert has, at most."""
    every = {(row["layer"], row["expert"]): row["per_token"] for row in tables["load"]}
    rows = tables["experts_by_domain"]
    return max(
        (row["per_token"] - every[row["layer"], row["expert"]] for row in rows), default=None
    )


def _vocabulary_size(tables: Tables) -> float | None:
    return len(tables["vocabulary"]) / len(tables["load"]) if tables["load"] else None


def _routing_probability(tables: Tables) -> float | None:
    first = (row for row in tables["vocabulary"] if row["rank"] == 1)
    return mean_of(row["count"] / row["occurrences"] for row in first)


def _last_flip(column: str) -> Number:
    def number(tables: Tables) -> float | None:
        rows = _rows(tables, "flips", _ALL)
        return rows[-1][column] if rows else None

    return number


def _shifts(tables: Tables) -> dict[float, float]:
    """Return the extra loss by the offset, as a part of the largest one.

    Offsets are chosen for each model by the size of its logits, so that models share the parts
    only, not the offsets.
    """
    rows = tables["shift"]
    largest = max((row["offset"] for row in rows), default=0)
    return {round(row["offset"] / largest, 2): row["extra_loss"] for row in rows if largest > 0}


def _shift_loss(part: float) -> Number:
    return lambda tables: _shifts(tables).get(part)


def _layer_rows(tables: Tables) -> list[Row]:
    return [row for row in tables["histogram"] if row["layer"] != "all"]


def _moments(tables: Tables) -> tuple[float, float]:
    """Return mean and standard deviation of active experts over tokens and layers."""
    rows = _layer_rows(tables)
    tokens = sum(row["tokens"] for row in rows)
    mean = sum(row["tokens"] * row["active"] for row in rows) / tokens
    variance = sum(row["tokens"] * (row["active"] - mean) ** 2 for row in rows) / tokens
    return mean, variance**0.5


def _share_of(holds: Callable[[int], bool]) -> Number:
    def number(tables: Tables) -> float:
        rows = _layer_rows(tables)
        found = float(sum(row["tokens"] for row in rows if holds(row["active"])))
        return found / float(sum(row["tokens"] for row in rows))

    return number


_REMOE, _RMOE = "ReMoE, arXiv 2412.14711", "RMoE, arXiv 2408.06793"
FINDINGS = (
    Finding(
        "rare ids activate more experts than frequent ones",
        f"{_REMOE}, figure 7",
        _difference(_edge("by_frequency", 0), _edge("by_frequency", -1)),
        "ReMoE",
    ),
    Finding(
        "the start of a word activates more experts than white space",
        f"{_REMOE}, figure 7",
        _difference(
            _at("by_word_part", "mean", part="word start", **_ALL),
            _at("by_word_part", "mean", part="white space", **_ALL),
        ),
        "ReMoE",
    ),
    Finding(
        "experts tell the domain, beyond the control",
        f"{_REMOE}, figures 9 and 11",
        _at("specialization", "share", **_ALL),
        "ReMoE",
    ),
    Finding(
        "experts tell the domain, more than TopK's do",
        f"{_REMOE}, figures 9 and 11",
        _at("specialization", "share", **_ALL),
        "ReMoE",
        "TopK",
    ),
    Finding(
        "TopK changes more experts between checkpoints",
        f"{_REMOE}, figure 10, between steps",
        _last_flip("flip_count"),
        "TopK",
        "ReMoE",
    ),
    Finding(
        "neighboring layers share more information within tokens",
        f"{_RMOE}, figure 3",
        _at("balance", "expert_information", **_ALL),
        "RMoE",
        "TopK",
    ),
    Finding(
        "so do their leading experts, beyond the control",
        "ours",
        _difference(
            _at("balance", "information", **_ALL), _at("balance", "information_shuffled", **_ALL)
        ),
        "RMoE",
        "TopK",
    ),
)
