"""Show the progress of runs, and summarize a run that has ended."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.table import Table

from megatron.remoe.analysis.runs import parse_row
from megatron.remoe.progress import bars

_STEPS_OF_ETA = 20
_SECONDS_BETWEEN_LINES = 15  # where the output is no terminal
# Lines of the log that begin with one of these are shown.
_NOTICES = ("remoe: warning: ", "remoe: error: ", "remoe: continuing ")


class Display:
    """A bar for each thing that is going on; where there are none, a line from time to time.

    Args:
        console: The console to write to. It has bars if it is a terminal.
        seconds: Least time between two lines about the same thing.
    """

    def __init__(self, console: Console, seconds: float) -> None:
        self.has_bars = console.is_terminal
        self._console, self._seconds = console, seconds
        self._bars = bars(console, MofNCompleteColumn())
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._bars.start()

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str, text: str, total: int | None = None) -> None:
        """Show a thing that begins, by a bar alone."""
        self._last_line[name] = time.monotonic()
        self._tasks[name] = self._bars.add_task(text, total=total)

    def show(
        self, name: str, done: int, total: int | None, text: str, *, at_once: bool = False
    ) -> None:
        """Update a bar, or print a line if it is time for one.

        Args:
            name: What is going on; empty if there is one thing only.
            done: Number of steps that are done.
            total: Number of steps of the whole, or None if it is not known.
            text: What else to say.
            at_once: Whether a line must not wait for its time.
        """
        bar = f"{name}  {text}".strip()
        self._bars.update(self._tasks[name], completed=done, total=total, description=bar)
        now = time.monotonic()
        if not self.has_bars and (at_once or now - self._last_line[name] >= self._seconds):
            self._last_line[name] = now
            self.say((f"{name}: " if name else "") + f"{done}/{total or '?'}  {text}")

    def end(self, name: str) -> None:
        """Remove the bar of a thing that has ended."""
        self._bars.remove_task(self._tasks.pop(name))

    def close(self) -> None:
        """Stop drawing."""
        self._bars.stop()


def follow(
    rows: Iterator[dict[str, Any] | None], log: TextIO, total: int | None, console: Console
) -> None:
    """Show a run's progress until its rows end, and the notices in its log.

    Args:
        rows: Rows of metrics as `new_rows` yields them.
        log: The log, opened where the run begins.
        total: Steps of the whole run, if they are known.
        console: The console to write to.
    """
    display = Display(console, _SECONDS_BETWEEN_LINES)
    display.begin("", "starting", total)
    speeds: deque[float] = deque(maxlen=_STEPS_OF_ETA)
    try:
        for row in rows:
            for line in _complete_lines(log):
                if line.startswith(_NOTICES):
                    display.say(line.strip())
            if row is not None and "split" not in row:
                at_once = not speeds or row["iteration"] == total
                text = describe_row(row) + _eta(row, speeds, total)
                display.show("", row["iteration"], total, text, at_once=at_once)
    finally:
        display.close()


def new_rows(
    path: Path, started: float, wait: Callable[[], bool]
) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a metrics file that a run writes, until the run has ended.

    Whenever there is nothing new, None is yielded.

    Args:
        path: The file, which need not exist yet.
        started: When the run started; a file that was written before is another run's.
        wait: Waits for a moment, and returns whether the run had not ended before.
    """
    position, goes_on = 0, True
    while goes_on:
        goes_on = wait()
        if path.exists() and path.stat().st_mtime >= started:
            with path.open(errors="replace") as file:
                file.seek(position)
                for line in _complete_lines(file):
                    position = file.tell()
                    with contextlib.suppress(ValueError):  # `Run.load` names a damaged line.
                        yield parse_row(line)
        yield None


def _complete_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines from here on; a line that is still being written is left for later."""
    position = file.tell()
    while (line := file.readline()).endswith("\n"):
        position = file.tell()
        yield line
    file.seek(position)


def _eta(row: dict[str, Any], speeds: deque[float], total: int | None) -> str:
    """Return the time left at the speed of the last rows, which also holds for a resumed run."""
    speeds.append(row["tokens_per_second"])
    if total is None:
        return ""
    tokens_left = row["tokens"] * (total / row["iteration"] - 1)
    return f"  ETA {tokens_left / (sum(speeds) / len(speeds)):.0f} s"


def describe_row(row: dict[str, Any]) -> str:
    """Return a training row in a few words."""
    text = f"loss {_loss(row['lm_loss'], 3)}"
    if row.get("sparsity") is not None:  # It is null if the batch was padding alone.
        text += f"  sparsity {row['sparsity']:.3f}"
    if "l1_coeff" in row:
        text += f"  coefficient {row['l1_coeff']:.1e}"
    for name, word in (("top_p", "p"), ("expert_threshold", "threshold")):
        if name in row:
            text += f"  {word} {row[name]:.3f}"
    return text


def summarize(run_dir: Path, console: Console) -> None:
    """Print what a finished run has reached, and draw `curves.png`."""
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    try:
        run = Run.load(run_dir)
    except ValueError as error:  # The run itself has ended well.
        console.print(f"no summary: {error}", markup=False, highlight=False)
        return
    plot_curves(run, run_dir / "curves.png")
    table = Table(title=str(run_dir), show_header=False)
    table.add_row("iterations", str(run.train[-1]["iteration"]))
    table.add_row("training loss", _loss(run.train[-1]["lm_loss"], 4))
    if run.has_relu_routing and run.measured:
        last = [row["sparsity"] for row in run.measured[-20:]]
        table.add_row(
            f"sparsity, mean of the last {len(last)} rows",
            f"{sum(last) / len(last):.4f} (target {run.target_sparsity:g})",
        )
        stages = run.stages
        table.add_row("dense until step", str(stages.dense_until))
        table.add_row("sparsity settles at step", str(stages.sparse_from or "not settled"))
        for cost in run.stage_costs:
            text = f"steps {cost.first}-{cost.last}: {cost.seconds:.0f} s ({cost.share:.2%})"
            if cost.peak_memory is not None:
                text += f", peak memory {cost.peak_memory / 1e9:.2f} GB"
            table.add_row(f"{cost.name} stage", text)
        overhead = run.early_overhead
        if overhead is not None:
            table.add_row("time above the stable stage's speed", f"{overhead:.2%}")
    for split, loss in sorted(run.last_evaluation().items()):
        table.add_row(f"loss, {split}", _loss(loss, 4))
    console.print(table)
    console.print(f"curves: {run_dir / 'curves.png'}", highlight=False)


def _loss(value: float | None, digits: int) -> str:
    return "nan" if value is None else f"{value:.{digits}f}"
