"""The answers of an analysis: tables in long format, drawn from stored traces, as JSON and CSV.

What each table has is said by the functions that make them, in `by_token` and `by_expert`, where
the figures of the papers are cited to which they correspond. Values are integers, numbers, texts or
None, which stands for what has no value.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.remoe.analysis import by_expert, by_token, routing
from megatron.remoe.analysis.trace import Trace
from megatron.remoe.files import read_json_object, write_whole

Row = dict[str, Any]
FILE, FOLDER = "answers.json", "answers"

_MEAN = ("tokens", "mean", "low", "high")
_COST = ("loss", "active", "extra_loss", "tokens")
_BETWEEN = (
    "information", "information_shuffled", "expert_information", "expert_information_shuffled",
)  # fmt: skip
# The columns of each table.
COLUMNS: dict[str, tuple[str, ...]] = {
    "by_frequency": ("layer", "class", "count_low", "count_high", *_MEAN),
    "by_loss": ("layer", "class", "loss", *_MEAN),
    "by_position": ("layer", "first", "last", *_MEAN),
    "by_word_part": ("layer", "part", *_MEAN),
    "by_domain": ("layer", "domain", *_MEAN, "loss"),
    "experts_by_domain": ("layer", "expert", "domain", "share", "lift", "per_token"),
    "specialization": ("layer", "information", "shuffled", "shuffled_std", "excess", "share"),
    "vocabulary": (
        "layer", "expert", "rank", "id", "text", "occurrences", "count", "expected", "lift",
        "lower",
    ),
    "coactivation": ("layer", "first", "second", "tokens", "expected", "jaccard", "cosine"),
    "between_layers": ("first", "second", *_BETWEEN),
    "flips": (
        "first", "second", "layer", "flip_rate", "low", "high", "flip_count", "leading_changed",
    ),
    "load": ("layer", "expert", "share", "per_token", "gate", "dead", "starved"),
    "load_time": ("parallel_size", "layer", "slowdown", "step_time"),
    "histogram": ("layer", "active", "tokens", "share", "flops"),
    "pruning": ("layer", "removed", *_COST),
    "shift": ("offset", *_COST),
    "lower_k": ("k", *_COST),
    "balance": (
        "layer", "active_experts", "two_active", "inner_balance", "outer_balance",
        "outer_balance_mean", *_BETWEEN,
    ),
}  # fmt: skip
_INTERVENTIONS = ("pruning", "shift", "lower_k")


def answers(traces: list[Trace], interventions: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Return all tables by name; their columns are `COLUMNS`.

    Args:
        traces: those of a model's checkpoints in the order of iterations. All tables but `flips`
            are drawn from the last one.
        interventions: the rows of `pruning`, `shift` and `lower_k`, which need the model; `table`
            says of which of them a row is.
        seed: the seed of shuffled controls.

    Raises:
        ValueError: checkpoints were traced on different tokens, or a sequence has two domains.
    """
    trace = traces[-1]
    balance = routing.balance(trace, seed)
    numbers = list(trace.layers)
    tables: dict[str, list[Row]] = {
        "by_frequency": by_token.by_frequency(trace),
        "by_loss": by_token.by_loss(trace),
        "by_position": by_token.by_position(trace),
        "by_word_part": by_token.by_word_part(trace),
        "by_domain": by_token.by_domain(trace),
        "experts_by_domain": by_expert.experts_by_domain(trace),
        "specialization": by_expert.specialization(trace, seed),
        "vocabulary": by_expert.vocabulary(trace),
        "coactivation": by_expert.coactivations(trace),
        "between_layers": [
            {"first": first, "second": second} | {key: row[key] for key in _BETWEEN}
            for (first, second), row in zip(pairwise(numbers), balance, strict=False)
        ],
        "flips": by_token.flips(traces),
        "load": by_expert.load(trace),
        "load_time": by_expert.load_time(trace),
        "histogram": by_token.histogram(trace),
        "balance": balance,
    }
    for name in _INTERVENTIONS:
        tables[name] = [row for row in interventions if row["table"] == name]
    return {
        name: [{column: _finite(row.get(column)) for column in columns} for row in tables[name]]
        for name, columns in COLUMNS.items()
    }


def _finite(value: Any) -> Any:
    """Return a value, or None for a number that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_answers(folder: Path, tables: dict[str, list[Row]]) -> None:
    """Write `answers.json` and a CSV of each table to the folder of an analysis.

    The JSON is written last, so that the files of an interrupted call are not taken for answers.

    Args:
        folder: an existing folder.
        tables: what `answers` returns.
    """
    (folder / FILE).unlink(missing_ok=True)
    (folder / FOLDER).mkdir(exist_ok=True)
    for name, rows in tables.items():
        text = io.StringIO()
        # Texts are in quotes, so that an empty one differs from None, and line ends stay in a cell.
        writer = csv.DictWriter(text, COLUMNS[name], lineterminator="\n", quoting=csv.QUOTE_STRINGS)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / FOLDER / f"{name}.csv", text.getvalue())
    write_whole(folder / FILE, json.dumps(tables, allow_nan=False, ensure_ascii=False) + "\n")


def read_answers(folder: Path) -> dict[str, list[Row]]:
    """Read what `write_answers` wrote.

    Raises:
        ValueError: there are no answers, or they are damaged.
    """
    remedy = "run remoe analyze again, into an empty folder"
    tables = read_json_object(folder / FILE, remedy)
    missing = COLUMNS.keys() - tables.keys()
    if missing:
        raise ValueError(f"{folder / FILE} has no table {min(missing)}; {remedy}")
    for name, columns in COLUMNS.items():
        rows = tables[name]
        if not isinstance(rows, list) or any(
            not isinstance(row, dict) or tuple(row) != columns for row in rows
        ):
            raise ValueError(f"{folder / FILE} has no rows of {name}; {remedy}")
    return {name: tables[name] for name in COLUMNS}
