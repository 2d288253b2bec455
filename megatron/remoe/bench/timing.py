"""Alternatives that are timed in turns, so that a disturbance of one of them disturbs all."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron.remoe import cpu

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Alternative:
    """Something to time.

    Attributes:
        name: name of its row.
        run: the work to time, such as one forward and backward.
        facts: more values to report, by the names of their columns.
    """

    name: str
    run: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """The times of one alternative.

    Attributes:
        name: name of the alternative.
        milliseconds: median over rounds.
        spread: half the distance between the quartiles, relative to the median.
        ratio: time relative to the baseline in the same round, as the median over rounds.
        facts: the alternative's other values.
    """

    name: str
    milliseconds: float
    spread: float
    ratio: float
    facts: dict[str, Any]


def measure(
    alternatives: list[Alternative],
    *,
    rounds: int,
    baseline: str,
    console: Console,
    warm_up: int = WARM_UP_ROUNDS,
) -> list[Measured]:
    """Time the alternatives in turns; each round starts with another one.

    Args:
        alternatives: what to time.
        rounds: number of measured rounds, after the warm-up rounds.
        baseline: name of the alternative that ratios are relative to.
        console: shows progress.
        warm_up: number of rounds that are not measured.
    """
    seconds: dict[str, list[float]] = {a.name: [] for a in alternatives}
    for turn in track(range(warm_up + rounds), "rounds", console=console, transient=True):
        first = turn % len(alternatives)
        for alternative in alternatives[first:] + alternatives[:first]:
            elapsed = _time(alternative.run)
            if turn >= warm_up:
                seconds[alternative.name].append(elapsed)
    return [_row(a, seconds[a.name], seconds[baseline]) for a in alternatives]


def _time(run: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if cpu.has_gpu():
        torch.cuda.synchronize()


def _row(alternative: Alternative, seconds: list[float], baseline: list[float]) -> Measured:
    low, middle, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    ratio = median(a / b for a, b in zip(seconds, baseline, strict=True))
    return Measured(
        alternative.name, 1e3 * middle, (high - low) / 2 / middle, ratio, alternative.facts
    )


def report(
    rows: list[Measured],
    *,
    title: str,
    baseline: str,
    settings: dict[str, Any],
    console: Console,
    json_path: Path | None,
) -> None:
    """Print a table of the rows, and write them to `json_path` if it is given.

    Args:
        rows: the rows.
        title: title of the table.
        baseline: short name of the alternative that ratios are relative to.
        settings: settings of the benchmark, for the JSON file.
        console: prints the table.
        json_path: JSON file to write, if any.
    """
    table = Table(title=title)
    facts = list(dict.fromkeys(key for row in rows for key in row.facts))
    for column in ("", "ms", "spread", f"time / {baseline}", *facts):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        values = [str(row.facts.get(fact, "")) for fact in facts]
        table.add_row(
            row.name, f"{row.milliseconds:.2f}", f"{row.spread:.0%}", f"{row.ratio:.3f}", *values
        )
    console.print(table)
    record = {"title": title, "baseline": baseline, "settings": settings}
    save(record | {"rows": [asdict(row) for row in rows]}, json_path)


def save(record: dict[str, Any], json_path: Path | None) -> None:
    """Write a record and a description of the machine to `json_path`, if it is given."""
    if json_path is not None:
        json_path.write_text(json.dumps(record | {"machine": _machine()}, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if cpu.has_gpu() else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
