"""Progress bars of long work: on a terminal only, in one style."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def bars(console: Console, *columns: ProgressColumn) -> Progress:
    """Return bars with a description, which show nothing where the console is no terminal.

    Args:
        console: The console on which the bars are drawn.
        columns: What stands to the right of each bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yield a function that takes what is done and the total.

    Args:
        unit: What is counted, which describes the bar.
    """
    with bars(Console(stderr=True), TimeRemainingColumn()) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def told_progress(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar as `progress` does; the function that is yielded also takes a text to show."""
    with bars(
        Console(stderr=True), TextColumn("{task.fields[told]}"), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task(unit, total=None, told="")
        yield lambda done, total, told: bar.update(task, completed=done, total=total, told=told)


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress through `total` bytes; yield a function that takes the bytes just done.

    Where standard error is no terminal, one line says what is being done.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.print(f"{description} ({total / 1e6:.1f} MB)", markup=False)
    with bars(console, DownloadColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
