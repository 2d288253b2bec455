"""The `remoe` command. Every command is a thin call into the package, which it imports itself."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperGroup

from megatron.remoe.cli import adopt, bench, checkpoint, convert, evaluate, runs

if TYPE_CHECKING:
    from rich.console import Console

# The panels of `remoe --help` and their commands, in the order in which they are shown.
PANELS = {
    "Data": ("data",),
    "Train": ("describe", "train", "launch", "sweep", "plot", "compare", "checkpoint"),
    "Models": ("convert", "generate", "evaluate"),
    "Check": ("doctor", "verify", "bench"),
}


class _InPanels(TyperGroup):
    """A group whose commands are listed in the order of `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in PANELS.values() for name in names]


app = typer.Typer(
    cls=_InPanels,
    help="ReMoE: mixture-of-experts with ReLU routing, on unmodified Megatron.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Build corpora and token files.", no_args_is_help=True)
app.add_typer(data, name="data")
verify = typer.Typer(help="Check what this project claims, on this machine.", no_args_is_help=True)
app.add_typer(verify, name="verify")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bench.app, name="bench")
runs.register(app)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
app.add_typer(convert.convert, name="convert")
app.command()(convert.generate)
adopt.register(convert.convert)
evaluate.register(app, data)


def _print_versions(wanted: bool) -> None:
    """Print the versions of this package and of the Megatron that is imported, and exit."""
    if not wanted:
        return
    import remoe
    from megatron.remoe import compat, cpu

    cpu.silence_megatron()
    typer.echo(f"remoe {remoe.__version__}")
    try:
        version, path = compat.imported_version()
        typer.echo(f"megatron-core {version}, imported from {path}")
    except ValueError as error:  # it is not installed
        typer.echo(error)
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of remoe and of the imported Megatron, and exit.",
        ),
    ] = False,
) -> None:
    """Define the options that come before a command."""


@data.command()
def corpus(
    out: Annotated[Path, typer.Argument(help="Folder of the corpus.")],
    max_mb_per_domain: Annotated[
        float, typer.Option(help="Most megabytes of text in a domain.")
    ] = 8.0,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of every domain held out for validation.")
    ] = 0.02,
    force: Force = False,
) -> None:
    """Build a corpus from what is installed: Python, C++, prose, markup. Nothing is downloaded."""
    from megatron.remoe.data.corpus import CorpusConfig, build_corpus

    config = CorpusConfig(max_mb_per_domain=max_mb_per_domain, valid_fraction=valid_fraction)
    manifest, written = build_corpus(out, config, force=force)
    for name, entry in manifest["files"].items():
        typer.echo(f"{name:20} {entry['documents']:6} documents {entry['bytes'] / 1e6:8.3f} MB")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    typer.echo(f"{out}: {total / 1e6:.1f} MB" + ("" if written else ", up to date"))


@data.command()
def tokenize(
    inputs: Annotated[
        list[Path], typer.Argument(help="Corpus folder, or .jsonl / .jsonl.zst files or folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the .bin/.idx files.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, or a folder with it or with vocab.json, merges.txt."),
    ] = None,
    vocab_file: Annotated[Path | None, typer.Option(help="GPT-2's vocab.json.")] = None,
    merge_file: Annotated[Path | None, typer.Option(help="GPT-2's merges.txt.")] = None,
    eod_token: Annotated[
        str | None, typer.Option(help="End-of-document token of the given tokenizer.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="Entries of the tokenizer that is trained when none is given.")
    ] = 8192,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes.", show_default="all cores")
    ] = None,
    text_key: Annotated[str, typer.Option(help="JSON key of a document's text.")] = "text",
    append_eod: Annotated[
        bool, typer.Option("--append-eod/--no-append-eod", help="End every document.")
    ] = True,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Count malformed lines and go on.")
    ] = False,
    force: Force = False,
) -> None:
    """Write Megatron's token files, one pair per file or per domain and split of a corpus."""
    from megatron.remoe import cpu
    from megatron.remoe.data.tokenize import TokenizeConfig
    from megatron.remoe.data.tokenize import tokenize as run

    cpu.silence_megatron()
    config = TokenizeConfig(
        tokenizer=tokenizer,
        vocab_file=vocab_file,
        merge_file=merge_file,
        eod_token=eod_token,
        vocab_size=vocab_size,
        text_key=text_key,
        append_eod=append_eod,
        skip_invalid=skip_invalid,
        **({} if workers is None else {"workers": workers}),
    )
    manifest, written = run(inputs, out, config, force=force)
    for name, entry in manifest["outputs"].items():
        typer.echo(
            f"{name:20} {entry['documents']:8} documents {entry['tokens']:12} tokens "
            f"(left out: {entry['empty']} empty, {entry['invalid']} malformed)"
        )
    typer.echo(
        f"{out}: {sum(entry['tokens'] for entry in manifest['outputs'].values())} tokens, "
        f"vocabulary {manifest['settings']['vocab_size']}" + ("" if written else ", up to date")
    )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of Megatron's flags.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Continue a run with other settings.")
    ] = False,
) -> None:
    """Train on this machine: checks everything, starts torchrun, shows progress, draws curves."""
    from rich.console import Console

    from megatron.remoe import cpu
    from megatron.remoe.run import launch
    from megatron.remoe.run.config import load_config

    cpu.prepare_megatron()
    console = Console()
    more = [] if nproc is None else [f"nproc={nproc}"]
    run = load_config(config, [*(overrides or []), *more])
    with console.status("checking the configuration"):
        run, argv = launch.prepare(run, force=force)
    console.print(f"{run.run_dir}: {run.nproc} processes, output in log.txt", highlight=False)
    if code := launch.train(run, argv, console):
        raise typer.Exit(code)
    launch.summarise(run.run_dir, console)


@app.command()
def plot(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
) -> None:
    """Draw loss, sparsity and coefficient of a run."""
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    out = out or run_dir / "curves.png"
    plot_curves(Run.load(run_dir), out)
    typer.echo(out)


@app.command()
def doctor() -> None:
    """Say what this machine has, what will be used of it, and what is disabled and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megatron.remoe import cpu
    from megatron.remoe.run.doctor import examine

    cpu.prepare_megatron()
    colors = {"ok": "green", "disabled": "yellow", "missing": "red"}
    table = Table(show_header=False)
    for finding in examine():
        status = f"[{colors[finding.status]}]{finding.status}[/]"
        table.add_row(finding.subject, status, escape(finding.detail))
    Console().print(table)


@verify.command()
def parallel(
    only: Annotated[
        list[str] | None, typer.Argument(help="Cells whose names contain one of these.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each run.", show_default="all, 40 or 60")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
) -> None:
    """Train the same run under every parallel layout, on CPU ranks, and compare with one rank.

    Exits with 1 if a cell deviates more than its tolerance.
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


@verify.command()
def resume(
    only: Annotated[
        list[str] | None, typer.Argument(help="Pairs whose names contain one of these.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps before the save, and after it.")] = 10,
    kills: Annotated[
        int | None, typer.Option(min=1, help="Instead, kill a real run so many times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
) -> None:
    """Save, load and train on, in one layout and across layouts; compare with no interruption.

    Exits with 1 if a trajectory differs.
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


def _put_in_panels() -> None:
    """Give every command its panel. A command that is in no panel is a KeyError."""
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    for command in app.registered_commands:
        assert command.callback is not None
        command.rich_help_panel = panel_of[command.name or command.callback.__name__]
    for group in app.registered_groups:
        assert group.name is not None
        group.rich_help_panel = panel_of[group.name]


_put_in_panels()


class _Named(Protocol):
    """A cell or a pair of cells."""

    @property
    def name(self) -> str: ...


class _Result(_Named, Protocol):
    """What came of a cell or a pair."""

    @property
    def deviations(self) -> dict[str, float]: ...

    @property
    def ok(self) -> bool: ...

    @property
    def verdict(self) -> str: ...


def _named[T: _Named](everything: list[T], only: list[str] | None, what: str) -> list[T]:
    """Those whose names contain one of the given parts."""
    found = [one for one in everything if not only or any(part in one.name for part in only)]
    if not found:
        raise ValueError(f"no {what}'s name contains any of {only}; run without names for all")
    return found


def _reporter(console: "Console") -> Callable[[_Result], None]:
    """Prints a result as it is known."""

    def report(result: _Result) -> None:
        worst = " ".join(f"{key} {value:.0e}" for key, value in result.deviations.items())
        console.print(f"{result.verdict:11} {result.name}: {worst}", highlight=False)

    return report


def _conclude(results: Sequence[_Result], claim: str, console: "Console") -> None:
    """Say how many results are as claimed; exit with 1 if one is not."""
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


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user's mistake (`ValueError`, `OSError`) is one line and exit code 2."""
    try:
        app(args=argv)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a file that cannot be read or written
        named = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {named}{error.strerror or error}; correct the path", err=True)
        sys.exit(2)
