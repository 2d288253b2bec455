"""What a report shows: models that were analyzed, with the runs that trained them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.routers import router_of, selection_of
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.analysis.trace import Trace, read
from megatron.remoe.files import read_json_object

Row = dict[str, Any]
# The columns of `answers.json` that are drawn. Other columns and tables are left alone.
COLUMNS: dict[str, tuple[str, ...]] = {
    "by_frequency": ("layer", "class", "count_low", "count_high", "tokens", "mean", "low", "high"),
    "by_loss": ("layer", "class", "loss", "tokens", "mean", "low", "high"),
    "by_position": ("layer", "first", "last", "tokens", "mean", "low", "high"),
    "by_word_part": ("layer", "part", "tokens", "mean", "low", "high"),
    "by_domain": ("layer", "domain", "tokens", "mean", "low", "high", "loss"),
    "experts_by_domain": ("layer", "expert", "domain", "share", "lift"),
    "specialization": ("layer", "information", "shuffled", "shuffled_std", "excess", "share"),
    "vocabulary": ("layer", "expert", "rank", "id", "text", "count", "expected", "lift"),
    "coactivation": ("layer", "first", "second", "tokens", "expected", "jaccard", "cosine"),
    "between_layers": (
        "first", "second", "information", "shuffled", "expert_information",
        "expert_information_shuffled",
    ),
    "flips": ("first", "second", "layer", "flip_rate", "low", "high", "leading_changed"),
    "load": ("layer", "expert", "share", "per_token", "gate", "dead"),
    "load_time": ("parallel_size", "layer", "slowdown"),
    "histogram": ("layer", "active", "tokens", "share", "flops"),
    "pruning": ("removed", "loss", "active", "extra_loss"),
    "shift": ("offset", "loss", "active", "extra_loss"),
    "lower_k": ("k", "loss", "active", "extra_loss"),
    "balance": ("layer", "active_experts", "two_active", "inner_balance", "outer_balance"),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model that was analyzed.

    Attributes:
        name: how the report calls it.
        folder: the folder of its analysis.
        run: the run that trained it; None for a model of which only the weights are known.
        trace: the last of its traces.
        tables: the answers by the name of their table.
    """

    name: str
    folder: Path
    run: Run | None
    trace: Trace
    tables: dict[str, list[Row]]

    @property
    def router(self) -> str:
        """The router in words."""
        return router_of(self.run.config) if self.run else self.trace.facts.router

    @cached_property
    def size(self) -> ModelSize | None:
        """The size of the model; None if it is not known."""
        try:
            return ModelSize.from_flags(self.run.config) if self.run else None
        except ValueError:
            return None

    def rows(self, table: str, **where: Any) -> list[Row]:
        """Return the rows of a table in which columns have these values."""
        rows = self.tables[table]
        return [row for row in rows if all(row[key] == value for key, value in where.items())]


def load(paths: Sequence[Path]) -> list[Subject]:
    """Read analyzed runs, or folders of analyses.

    Raises:
        ValueError: one of them was not analyzed, is a dense model, is damaged or is named twice.
    """
    names = list(_names(paths))
    return [_load(path, name) for path, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the last part of each path, with as many parts before it as tell it from the others."""
    whole = [path.resolve() for path in paths]
    for path, full in zip(paths, whole, strict=True):
        if whole.count(full) > 1:
            raise ValueError(f"{path} is named more than once; name every run once")
        parts = full.parts[:-1] if full.name == "analysis" else full.parts
        for count in range(1, len(parts)):
            ends = [_end(other, count) for other in whole]
            if ends.count(_end(full, count)) == 1:
                break
        yield os.path.join(*parts[-count:])


def _end(path: Path, count: int) -> tuple[str, ...]:
    return (path.parent if path.name == "analysis" else path).parts[-count:]


def _load(path: Path, name: str) -> Subject:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; name a run directory that was analyzed")
    home = path.parent if (path / "answers.json").is_file() else path
    folder = path if home != path else path / "analysis"
    run = Run.load(home) if (home / "metrics.jsonl").is_file() else None
    if run and selection_of(run.config) == "dense":
        raise ValueError(f"{path} is a dense model, which has no experts to report; name another")
    if not (folder / "answers.json").is_file():
        if run is None:
            raise ValueError(
                f"{path} is neither a run directory nor the folder of an analysis; name one"
            )
        raise ValueError(f"{path} was not analyzed yet; remoe analyze {path}")
    tables = _tables(folder / "answers.json")
    return Subject(name, folder, run, read(_last_trace(folder)), tables)


def _last_trace(folder: Path) -> Path:
    traces = sorted((folder / "traces").glob("*/trace.json"))
    if not traces:
        raise ValueError(f"{folder} has answers but no trace; analyze the model again")
    return traces[-1].parent


def _tables(path: Path) -> dict[str, list[Row]]:
    remedy = "analyze the model again"
    found = read_json_object(path, remedy)
    for name, columns in COLUMNS.items():
        rows = found.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} has no table {name}; {remedy}")
        missing = [key for row in rows for key in columns if key not in row]
        if missing:
            raise ValueError(f"{path}: the table {name} has no column {missing[0]}; {remedy}")
    return found
