"""The commands `remoe verify ...`: check on this machine what the project claims."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from megatron.remoe.cli.common import AtLeastOne, AtLeastOneOrNone, Words, command

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Check that a run is the same in every parallel layout, after it is resumed, and with "
    "kernels in Triton; and prove everything on a GPU.",
    no_args_is_help=True,
)


class _Named(Protocol):
    """A cell or a pair of cells."""

    @property
    def name(self) -> str: ...


class _Verdict(_Named, Protocol):
    """What came of a cell or a pair of cells."""

    @property
    def deviations(self) -> dict[str, float]: ...

    @property
    def ok(self) -> bool: ...

    @property
    def verdict(self) -> str: ...


@command(app)
def parallel(only: Words = None, steps: AtLeastOneOrNone = None, out: Path | None = None) -> None:
    """Train one run under every parallel layout, on CPU ranks, and compare each with one rank.

    Exits with 1 if a cell deviates more than its tolerance.

    Example: remoe verify parallel EP2 --steps 10

    Args:
        only: Check only the cells whose names contain one of these, by default all of them.
        steps: The number of training steps of each run, by default all of its 40 or 60.
        out: The Markdown file to which the table is written, by default none.
    """
    from rich.console import Console

    from megatron.remoe.verify import grid

    cells = _named(grid.grid(), only, "cell")
    console = Console()
    with console.status(f"{len(cells)} cells"):
        results = grid.verify(cells, steps=steps, report=_reporter(console))
    if out is not None:
        out.write_text(grid.to_markdown(results) + "\n")
    _conclude(results, "cells agree with one rank", console)


@command(app)
def resume(
    only: Words = None,
    steps: AtLeastOne = 10,
    kills: AtLeastOneOrNone = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Compare runs that were saved and resumed, also in another layout, with uninterrupted ones.

    Exits with 1 if a trajectory differs.

    Example: remoe verify resume --kills 5 --seed 1

    Args:
        only: Check only the pairs whose names contain one of these, by default all of them.
        steps: The number of steps before the save, and again after it.
        kills: Instead of comparing layouts, kill a real run this many times. By default none is
            killed.
        seed: The seed that chooses which processes --kills kills, and when.
        out: The Markdown file to which the table is written, by default none.
    """
    from rich.console import Console

    from megatron.remoe.verify import resume

    console = Console(soft_wrap=True)
    if kills is not None:
        _verify_kills(kills, seed, console)
        return
    pairs = _named(resume.pairs(), only, "pair")
    with console.status(f"{len(pairs)} pairs of layouts"):
        results = resume.verify(pairs, steps=steps, report=_reporter(console))
    if out is not None:
        out.write_text(resume.to_markdown(results) + "\n")
    same = [max(r.deviations.values()) for r in results if r.pair.is_same and r.deviations]
    if same:
        console.print(f"largest difference in the same layout: {max(same):g}", highlight=False)
    _conclude(results, "pairs continue the run", console)


@command(app)
def kernels() -> None:
    """Compare the Triton kernels with torch, and compile them for compute capability 8, 9 and 10.

    Without a GPU, Triton interprets the kernels for the comparison. Compiling needs no GPU. Exits
    with 1 if an output or a gradient deviates, or if a kernel spills registers.

    Example: remoe verify kernels
    """
    from rich.console import Console

    from megatron.remoe.verify import kernels

    console = Console(soft_wrap=True)
    results = kernels.verify(
        lambda row: console.print(kernels.to_line(row), highlight=False, markup=False)
    )
    good = sum(row.ok for row in results)
    console.print(f"{good} of {len(results)} kernels and quantities are as claimed")
    if good < len(results):
        raise typer.Exit(1)


@command(app)
def gpu(
    budget: str = "40m",
    out: Path = Path("verify_gpu"),
    golden: Path | None = None,
    rehearse: bool = False,
) -> None:
    """Run everything that only a GPU can prove, in order of worth, and write a report.

    The report, report.md and report.json, is written anew after every stage. A stage that fails
    ends no other one. Exits with 1 if one has failed, and with 2 on a machine without a GPU.

    Example: remoe verify gpu --budget 40m --out proof

    Args:
        budget: The time for all stages together, such as 90s, 40m or 1.5h. The last stage takes
            what the others leave.
        out: The folder of the report, of the logs and of the runs. It must be new or empty.
        golden: The folder with the published trajectories, which is tests/golden of a checkout. By
            default it is that of the checkout from which this command runs, if there is one.
        rehearse: Run every stage on the CPU, at a size that takes a few minutes. This proves that
            the stages work, and nothing about a GPU.
    """
    from rich.console import Console

    from megatron.remoe.verify.gpu import runner

    console = Console(soft_wrap=True)
    report = runner.prove(
        out,
        runner.parse_budget(budget),
        golden,
        rehearse=rehearse,
        say=lambda line: console.print(line, markup=False, highlight=False),
    )
    passed = sum(entry.status == "passed" for entry in report.entries)
    console.print(f"{passed} of {len(report.entries)} stages passed; see {out / 'report.md'}")
    if any(entry.status == "failed" for entry in report.entries):
        raise typer.Exit(1)


def _named[T: _Named](everything: list[T], only: list[str] | None, what: str) -> list[T]:
    """Return those whose names contain one of the given parts."""
    found = [one for one in everything if not only or any(part in one.name for part in only)]
    if not found:
        raise ValueError(f"no {what}'s name contains any of {only}; run without names for all")
    return found


def _reporter(console: "Console") -> Callable[[_Verdict], None]:
    """Return a function that prints a result as soon as it is known."""

    def report(result: _Verdict) -> None:
        worst = " ".join(f"{key} {value:.0e}" for key, value in result.deviations.items())
        console.print(f"{result.verdict:11} {result.name}: {worst}", highlight=False)

    return report


def _conclude(results: Sequence[_Verdict], claim: str, console: "Console") -> None:
    """Print how many results are as claimed; exit with 1 if one is not."""
    good = sum(result.ok for result in results)
    console.print(f"{good} of {len(results)} {claim}")
    if good < len(results):
        raise typer.Exit(1)


def _verify_kills(kills: int, seed: int, console: "Console") -> None:
    import tempfile

    from megatron.remoe import cpu
    from megatron.remoe.verify import kills as runs

    cpu.prepare_megatron()
    with tempfile.TemporaryDirectory() as folder:
        result = runs.verify(
            Path(folder), kills, seed=seed, report=lambda line: console.print(line, highlight=False)
        )
    in_save = sum(kill.in_save for kill in result.kills)
    console.print(
        f"{len(result.kills)} kills, {in_save} of them in a save; largest difference of "
        f"{result.rows} rows: {result.difference:g} {result.problem or ''}",
        highlight=False,
    )
    if not result.ok:
        raise typer.Exit(1)
