"""The `remoe` command. Every command is a thin call into the package, which it imports itself."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="ReMoE: mixture-of-experts with ReLU routing, on unmodified Megatron.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Build corpora and token files.", no_args_is_help=True)
app.add_typer(data, name="data")

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


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


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a user's mistake (`ValueError`) is one line and exit code 2."""
    try:
        app(args=argv)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
