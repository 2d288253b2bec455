"""A file of JSON objects, one per line, in the order of training, across resumed runs."""

import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class JSONLWriter:
    """Appends rows, which have an `iteration`; evaluations, which have a `split`, follow steps.

    The first row that a run writes drops the rows of an earlier run that it does again: those from
    this row on, and those after the checkpoint.

    Args:
        path: the file; its folder is made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_written = False

    def write(self, row: Row, *, checkpoint: int) -> None:
        """Append a row.

        Args:
            row: NaN and infinity, which JSON does not have, become null.
            checkpoint: iteration from which the run continues; 0 for a new run.
        """
        if not self._has_written:
            self._drop_rows_from(min(_position(row), (checkpoint, math.inf)))
            self._has_written = True
        with self.path.open("a") as file:
            file.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")

    def _drop_rows_from(self, end: tuple[float, float]) -> None:
        """Replace the file as a whole with the rows before a position."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _position_of_line(line) < end]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self.path)


def _position(row: Row) -> tuple[float, float]:
    return row["iteration"], float("split" in row)


def _position_of_line(line: str) -> tuple[float, float]:
    try:
        return _position(json.loads(line))
    except json.JSONDecodeError:  # a kill has cut off the line
        return math.inf, math.inf


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
