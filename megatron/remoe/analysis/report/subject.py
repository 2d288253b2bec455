"""What a report shows: models that were analyzed, with the runs that trained them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.answers import FILE, read_answers
from megatron.remoe.analysis.routers import router_of, selection_of
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.analysis.trace import Trace, read

Row = dict[str, Any]


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
    home = path.parent if (path / FILE).is_file() else path
    folder = path if home != path else path / "analysis"
    run = Run.load(home) if (home / "metrics.jsonl").is_file() else None
    if run and selection_of(run.config) == "dense":
        raise ValueError(f"{path} is a dense model, which has no experts to report; name another")
    if not (folder / FILE).is_file():
        if run is None:
            raise ValueError(
                f"{path} is neither a run directory nor the folder of an analysis; name one"
            )
        raise ValueError(f"{path} was not analyzed yet; remoe analyze {path}")
    return Subject(name, folder, run, read(_last_trace(folder)), read_answers(folder))


def _last_trace(folder: Path) -> Path:
    traces = sorted((folder / "traces").glob("*/trace.json"))
    if not traces:
        raise ValueError(f"{folder} has answers but no trace; analyze the model again")
    return traces[-1].parent
