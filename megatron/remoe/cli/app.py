"""The `remoe` command, put together from one file for each group of commands.

Each file exports `app`. A command is a thin call into the package, which it imports itself, so that
no command waits for the imports of another one.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron.remoe.cli import adapt, bench, checkpoint, convert, data, model, run, verify

# The panels of `remoe --help` and their commands, in the order in which they are shown.
PANELS = {
    "Data": ("data",),
    "Train": (
        "examples",
        "routers",
        "describe",
        "train",
        "launch",
        "sweep",
        "plot",
        "compare",
        "checkpoint",
    ),  # fmt: skip
    "Models": ("convert", "adopt", "budget", "generate", "evaluate", "analyze", "report"),
    "Check": ("doctor", "verify", "bench"),
}


class _InPanels(TyperGroup):
    """A group whose commands are listed by panel, in the order of `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for panel in PANELS.values() for name in panel]
        assert sorted(names) == sorted(self.commands), "a command is in no panel"
        for panel, commands in PANELS.items():
            for name in commands:
                self.commands[name].rich_help_panel = panel  # type: ignore[attr-defined]
        return names


app = typer.Typer(
    cls=_InPanels,
    help="ReMoE: mixture-of-experts with ReLU routing, on unmodified Megatron.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for commands in (run.app, model.app, adapt.app):  # Their commands stand beside the groups.
    app.add_typer(commands)
for name, group in (
    ("data", data.app),
    ("checkpoint", checkpoint.app),
    ("convert", convert.app),
    ("verify", verify.app),
    ("bench", bench.app),
):
    app.add_typer(group, name=name)


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
    except ValueError as error:  # Megatron is not installed.
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


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user's mistake (`ValueError`, `OSError`) is one line and exit code 2."""
    try:
        app(args=argv)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):  # A file cannot be read or written.
            named = f"{error.filename}: " if error.filename else ""
            message = f"{named}{error.strerror or error}; correct the path"
        typer.echo(f"error: {message}", err=True)
        sys.exit(2)
